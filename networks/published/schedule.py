"""The noise schedule in a scheduler_config.json of diffusers, read and written."""

from runtime.commandline import BadInput

import math

import torch

from networks.published.files import read_json

MOST_STEPS = 100_000
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_large": "large",
    "learned_range": "learned",
    "fixed_small_log": "small",
    "fixed_large_log": "large",
}


def scheduler_config(facts, learned):
    """DDPMScheduler's settings for a schedule of ours."""
    alpha_bar = facts["alpha_bar"].double()
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    variance = "learned" if learned else facts.get("variance", "small")
    names = {ours: theirs for theirs, ours in reversed(VARIANCES.items())}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    threshold = facts.get("threshold", "clamp")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "_schedule": facts.get("schedule", "other"),
        "_alpha_min": facts.get("alpha_min", 0.001),
        "prediction_type": predictions[facts.get("prediction", "eps")],
        "variance_type": names[variance],
        "clip_sample": threshold == "clamp",
        "clip_sample_range": 1.0,
        "thresholding": threshold == "dynamic",
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1e4,
    }


def named_alpha_bar(schedule, T, alpha_min=0.001):
    """alpha_bar_t float64 (T,) of a schedule by its name, as ddpm_pixel.make_alpha_bar has it.

    It is spelled out here once more, because a room does not import a chapter.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "cosine":
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        f = torch.sigmoid(t.new_tensor(3.0)) - torch.sigmoid(6 * t / T - 3)
    linear = 1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    alpha = linear if schedule == "linear" else f[1:] / f[:-1]
    return alpha.clamp(min=alpha_min).cumprod(0)


def _betas(config, path):
    """beta_t float64 (T,) of a scheduler's settings, and our name of the schedule."""
    T, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if type(T) is not int or not 1 <= T <= MOST_STEPS:
        raise BadInput(
            f"{path}: num_train_timesteps {_short(T)} must be a whole number from 1 to {MOST_STEPS}"
        )
    betas = config.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not betas or not all(map(_is_part, betas)):
            raise BadInput(
                f"{path}: trained_betas {_short(betas)} must be a list of numbers from 0 to 1"
            )
        return torch.tensor(betas, dtype=torch.float64), config.get("_schedule", "other")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if kind in ("linear", "scaled_linear"):
        for name, value in (("beta_start", start), ("beta_end", end)):
            if not _is_part(value):
                raise BadInput(f"{path}: {name} {_short(value)} must be a number from 0 to 1")
        if end < start:
            raise BadInput(f"{path}: beta_end {end} must not be below beta_start {start}")
    if kind == "linear":
        ours = math.isclose(start * T, 0.1) and math.isclose(end * T, 20)
        betas = torch.linspace(start, end, T, dtype=torch.float64)
        return betas, "linear" if ours else "other"
    if kind == "scaled_linear":  # of Stable Diffusion: sqrt(beta_t) rises linearly
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2, "other"
    if kind == "squaredcos_cap_v2":  # IDDPM eq. 17
        alpha_bar = named_alpha_bar("cosine", T)
        return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]), "cosine"
    raise BadInput(f"{path}: beta_schedule {kind!r} is not supported")


def _is_part(value):
    """Whether it is a number from 0 to 1; NaN is none."""
    return type(value) in (int, float) and 0 <= value <= 1


def _short(value):
    """A value of a file as it is written, of a long one the beginning."""
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."


def read_schedule(path):
    """facts of load_published; BadInput for a schedule, prediction or variance unknown here."""
    config = read_json(path)
    prediction = config.get("prediction_type", "epsilon")
    variance = config.get("variance_type") or "fixed_small"
    betas, name = _betas(config, path)
    if config.get("rescale_betas_zero_snr"):
        raise BadInput(f"{path}: rescale_betas_zero_snr is not supported")
    if prediction not in list(PREDICTIONS):  # a list has no hash
        raise BadInput(f"{path}: prediction_type {prediction!r} is not supported")
    if variance not in list(VARIANCES):
        raise BadInput(f"{path}: variance_type {variance!r} is not supported")
    return dict(
        alpha_bar=(1 - betas).cumprod(0),
        timesteps=len(betas),
        schedule=name,
        alpha_min=config.get("_alpha_min", 0.001),
        prediction=PREDICTIONS[prediction],
        variance=VARIANCES[variance],
    )
