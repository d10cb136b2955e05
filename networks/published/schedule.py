"""A scheduler_config.json of diffusers, read and written: the noise, and how it is sampled.

    read_schedule(file)       what it says, in our words; every field is obeyed or refused by name
    scheduler_config(facts)   such a file's settings, of ours

Whether a script draws what such a file asks for, and what is said of it, stands in samplers.py.
"""

from runtime.commandline import BadInput
from runtime.files import is_number

import math
from typing import NamedTuple

import torch

from networks.published.files import read_json
from networks.sizes import check_alpha_bar

MOST_STEPS = 100_000
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_large": "large",
    "learned_range": "learned",
    "fixed_small_log": "small",
    "fixed_large_log": "large",  # diffusers itself takes the root of a logarithm there
}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid-beta": "sigmoid"}
SCHEDULES |= {"sigmoid": ""}  # Jabri et al.'s, which diffusers has not
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "linear"}

# All fields of the schedulers in CLASSES. These are obeyed, or refused where they cannot be,
OBEYED = {
    "num_train_timesteps": object,  # looked at where they are used
    "timesteps": object,  # the same, until 2022
    "beta_start": float,
    "beta_end": float,
    "beta_schedule": object,
    "trained_betas": object,
    "rescale_betas_zero_snr": bool,
    "prediction_type": object,
    "predict_epsilon": bool,  # false was prediction_type sample, until 2022
    "variance_type": object,
    "clip_sample": bool,
    "clip_sample_range": float,
    "thresholding": bool,
    "dynamic_thresholding_ratio": float,
    "sample_max_value": float,
    "timestep_spacing": object,
    "steps_offset": object,
    "set_alpha_to_one": bool,
}
# these are about the steps of a class. dpm_solver.py takes or refuses those in samplers.SOLVER; of
# the others only the type is looked at: steps of these classes are not taken here, or nothing of
# them hangs on the value, and the line of what is drawn says so,
OF_CLASS = {
    "skip_prk_steps": bool,
    "algorithm_type": str,
    "solver_order": int,
    "solver_type": str,
    "lower_order_final": bool,  # of orders above 2
    "euler_at_final": bool,  # as any step to sigma 0 is
    "lambda_min_clipped": float,
    "predict_x0": bool,
    "disable_corrector": list,
    "solver_p": object,
    "flow_shift": float,  # of use_flow_sigmas
    "time_shift_type": str,  # of use_dynamic_shifting
    "tensor_format": str,  # until 2022; it decided nothing
}
# and these must have the value that means "not used".
NOT_USED = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
    "timestep_type": "discrete",
    "interpolation_type": "linear",  # others are the sigmas of no timesteps
    "final_sigmas_type": "zero",
    "timestep_values": None,
}
WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
WORDS |= {list: "a list"}


class Kind(NamedTuple):
    """A class of schedulers: what draws like it, and what it means where a file says nothing."""

    command: str  # script and flags whose steps are its, or the nearest to them
    same: bool = True  # whether these are its steps, but for
    unlike: dict[str, str] = {}  # {spacing of ours: what differs there}
    spacing: str = "linspace"
    clip_sample: bool | None = None  # None: it has no such field, and never clips
    thresholding: bool | None = None  # the same
    set_alpha_to_one: bool | None = None  # the same: its last step ends at alpha_bar = 1
    betas: tuple[float, float] = (1e-4, 0.02)


_ZERO = "it leaves out timestep 0 and divides the rest by n + 1"
_NEXT = "it steps to t - T // n, not to the next timestep"
_START = "it starts at noise of variance 1 - alpha_bar, not 1"
_EULER = {"linear": f"{_START}, and does not round timesteps", "trailing": _START}
_DDPM = Kind("improved_ddpm.py", True, {}, "leading", True, False)
_DDIM = Kind("ddim.py", True, {"linear": _NEXT, "trailing": _NEXT}, "leading", True, False, True)
_SOLVER = Kind("dpm_solver.py", False, thresholding=False)
_OTHER = Kind("dpm_solver.py", False, betas=(0.00085, 0.012))
CLASSES = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": _DDIM._replace(same=False, thresholding=None),
    "PNDMScheduler": Kind("ddim.py", False, spacing="leading", set_alpha_to_one=False),
    "DPMSolverMultistepScheduler": _SOLVER._replace(
        same=True, unlike={"linear": _ZERO, "leading": _ZERO}
    ),
    "DPMSolverSinglestepScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
    "DEISMultistepScheduler": _SOLVER,
    "EulerDiscreteScheduler": Kind("ddim.py", True, _EULER),
    "EulerAncestralDiscreteScheduler": Kind("ddim.py --eta 1", True, _EULER),
    "LMSDiscreteScheduler": Kind("dpm_solver.py", False),
    "HeunDiscreteScheduler": _OTHER._replace(clip_sample=False),
    "KDPM2DiscreteScheduler": _OTHER,
    "KDPM2AncestralDiscreteScheduler": _OTHER,
}


# ------------------------------------------------------------------------------- the noise


def rising(schedule, T, start, end):
    """beta_t float64 (T,) from start to end: "linear", or by a sigmoid from -6 to 6."""
    rise = torch.linspace(0, 1, T, dtype=torch.float64)
    return start + (end - start) * (rise if schedule == "linear" else torch.sigmoid(12 * rise - 6))


def named_alpha_bar(schedule, T, alpha_min=0.001, beta_start=0.0, beta_end=0.0):
    """alpha_bar_t float64 (T,) of a schedule by its name, as ddpm_pixel.make_alpha_bar has it.

    It is spelled out here once more, because a room does not import a chapter.
    """
    if schedule in ("linear", "sigmoid-beta"):
        alpha = 1 - rising(schedule, T, beta_start or 0.1 / T, beta_end or 20 / T)
        return alpha.clamp(min=alpha_min).cumprod(0)
    t = torch.arange(T + 1, dtype=torch.float64) / T
    if schedule == "cosine":
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        f = torch.sigmoid(t.new_tensor(3.0)) - torch.sigmoid(6 * t - 3)
    return (f[1:] / f[:-1]).clamp(min=alpha_min).cumprod(0)


def config_alpha_bar(config, whose):
    """alpha_bar_t float64 (T,) of a chapter's settings by name, as ddpm_pixel.alpha_bar_of has it.

    BadInput, beginning with `whose` they are, for settings that are no schedule.
    """
    if config.get("trained_betas"):
        alpha_bar = (1 - torch.tensor(config["trained_betas"], dtype=torch.float64)).cumprod(0)
    else:
        numbers = config["timesteps"], config.get("alpha_min", 0.001)
        betas = config.get("beta_start", 0.0), config.get("beta_end", 0.0)
        alpha_bar = named_alpha_bar(config["schedule"], *numbers, *betas)
    check_alpha_bar(alpha_bar, config, whose)
    return alpha_bar


def betas_of(alpha_bar):
    """beta_t float64 (T,) of alpha_bar_t."""
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def zero_terminal(alpha_bar):
    """alpha_bar_t (T,) moved and stretched so that it ends at 0: Lin et al. 2024
    (arXiv:2305.08891), algorithm 1."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _betas(config, kind, path):
    """beta_t float64 (T,) of a scheduler's settings."""
    T = config.get("num_train_timesteps", 1000)
    schedule = config.get("beta_schedule", "linear")
    if type(T) is not int or not 1 <= T <= MOST_STEPS:
        raise BadInput(
            f"{path}: num_train_timesteps {_short(T)} must be a whole number from 1 to {MOST_STEPS}"
        )
    if config.get("timesteps", T) not in (T, None):
        told = f"timesteps {_short(config['timesteps'])} beside num_train_timesteps {T}"
        raise BadInput(f"{path}: {told}: expected the same")
    betas = config.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not betas or not all(map(_is_part, betas)):
            raise BadInput(
                f"{path}: trained_betas {_short(betas)} must be a list of numbers from 0 to 1"
            )
        if config.get("num_train_timesteps", len(betas)) != len(betas):
            told = f"num_train_timesteps {T} beside {len(betas)} trained_betas"
            raise BadInput(f"{path}: {told}: expected as many")
        return torch.tensor(betas, dtype=torch.float64)
    start, end = config.get("beta_start", kind.betas[0]), config.get("beta_end", kind.betas[1])
    known = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    known += ["sigmoid", "laplace"] if kind is _DDPM else []
    if schedule not in known:
        told = f"beta_schedule {_short(schedule)} is not supported: expected {', '.join(known)}"
        raise BadInput(f"{path}: {told}")
    if schedule in ("linear", "scaled_linear", "sigmoid"):
        for name, value in (("beta_start", start), ("beta_end", end)):
            if not _is_part(value):
                raise BadInput(f"{path}: {name} {_short(value)} must be a number from 0 to 1")
        if end < start:
            raise BadInput(f"{path}: beta_end {end} must not be below beta_start {start}")
    if schedule in ("linear", "sigmoid"):
        return rising(schedule, T, start, end)
    if schedule == "scaled_linear":  # of Stable Diffusion: sqrt(beta_t) rises linearly
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":  # IDDPM eq. 17
        return betas_of(named_alpha_bar("cosine", T))
    t = 0.5 - torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.sigmoid(-0.5 * torch.where(t < 0, -1, 1) * (1 - 2 * t.abs() + 1e-6).log()).sqrt()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _named(config, alpha_bar):
    """Our name of this table, and alpha_min and ends of beta where they are not the defaults.

    schedule "other" is a table that no name has.
    """
    said, least = config.get("_schedule"), config.get("_alpha_min", 0.001)
    least = least if _is_part(least) else 0.001
    ends = [config.get("beta_start"), config.get("beta_end")]
    for name in () if said == "other" else sorted(SCHEDULES, key=lambda name: name != said):
        rises = name in ("linear", "sigmoid-beta") and all(map(_is_part, ends))
        for start, end in [(0.0, 0.0), *([ends] if rises else [])]:
            known = named_alpha_bar(name, len(alpha_bar), least, start, end)
            if torch.allclose(alpha_bar, known, rtol=1e-3, atol=1e-9):
                found = {"schedule": name, "alpha_min": least}
                return found | {"beta_start": float(start), "beta_end": float(end)}
    return {"schedule": "other", "alpha_min": 0.001, "beta_start": 0.0, "beta_end": 0.0}


def name_of(facts):
    """In words, the schedule that read_schedule found."""
    ends = facts["beta_start"], facts["beta_end"]
    return facts["schedule"] + (" from beta {:g} to {:g}".format(*ends) if any(ends) else "")


def _is_part(value):
    """Whether it is a number from 0 to 1; NaN is none."""
    return type(value) in (int, float) and 0 <= value <= 1


def _short(value):
    """A value of a file as it is written, of a long one the beginning."""
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."


# ------------------------------------------------------------------------------- the file


def read_fields(path):
    """The settings in a scheduler_config.json; BadInput for a field that means something unknown.

    Names that begin with _ are notes. Values of what is obeyed are looked at where they are used.
    """
    config = read_json(path)
    for name, value in config.items():
        kind = (OBEYED | OF_CLASS).get(name)
        if name.startswith("_") or value is None and name != "num_train_timesteps":
            continue  # null means "not used"
        if name in NOT_USED:
            expected = NOT_USED[name]
            if value != expected or type(value) is not type(expected):
                told = f"{name} {_short(value)} is not supported, expected {expected!r}"
                raise BadInput(f"{path}: {told}")
        elif kind is None and value is not False:
            raise BadInput(f"{path}: there is no counterpart here for {name} {_short(value)}")
        elif kind in WORDS and not name.startswith("beta_") and not _is_of(value, kind):
            raise BadInput(f"{path}: {name} {_short(value)} must be {WORDS[kind]}")
    return config


def _is_of(value, kind):
    """Whether a value has this type; numbers are finite, but for the limit that is none."""
    if kind is float:
        return is_number(value) or value == -math.inf
    return type(value) is kind


def read_schedule(path, latents=False, sampler=""):
    """What a scheduler_config.json says, in our words. BadInput for what is unknown here.

    alpha_bar    float64 (T,); betas: its beta_t, a tuple
    timesteps    T
    schedule     a name of SCHEDULES, with alpha_min, and beta_start and beta_end (0: the defaults),
                 where that is the table; else other
    prediction   eps, x0 or v
    variance     small, large or learned; "" where the class has none, or its file does not say it
    sampler      the class of the scheduler, "" if unsaid, which means DDPMScheduler
    clip         clamp, dynamic (Imagen's threshold) or none: what keeps x0_hat in [-1, 1]
    spacing      linear, leading or trailing
    fields       the settings of the class's steps, and steps_offset, set_alpha_to_one
    cannot       {flag: why}: what is not drawn here as it says, unless that flag says otherwise
    notes        what save_diffusers noted of a run of ours

    What a file leaves out is what its class means by that. latents: x0_hat has no range, and is
    never clipped, whatever is said of it. sampler: the class, if it is said elsewhere.
    """
    config = read_fields(path)
    name = sampler or config.get("_class_name") or ""
    if not isinstance(name, str):
        raise BadInput(f"{path}: _class_name {_short(name)} must be a text")
    kind = CLASSES.get(name, _DDPM)
    prediction = config.get("prediction_type")
    if prediction is None:
        prediction = "sample" if config.get("predict_epsilon") is False else "epsilon"
    if prediction not in list(PREDICTIONS):  # a list has no hash
        raise BadInput(f"{path}: prediction_type {prediction!r} is not supported")
    alpha_bar = (1 - (betas := _betas(config, kind, path))).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise BadInput(
                f"{path}: rescale_betas_zero_snr is not supported where prediction_type is "
                "'epsilon', which tells nothing of the image at alpha_bar 0: expected v_prediction "
                "or sample"
            )
        betas = betas_of(zero_terminal(alpha_bar))
        alpha_bar = (1 - betas).cumprod(0)
    variance = config.get("variance_type")
    if kind is not _DDPM and variance in ("learned", "learned_range"):
        variance = "learned_range"  # it only says that the network has such channels
    if variance is not None and variance not in list(VARIANCES):
        raise BadInput(f"{path}: variance_type {variance!r} is not supported")
    spacing = config.get("timestep_spacing")
    ours = "_schedule" in config  # written here before it had timestep_spacing
    spacing = spacing if spacing is not None else "linspace" if ours else kind.spacing
    if spacing not in list(SPACINGS):
        raise BadInput(
            f"{path}: timestep_spacing {spacing!r} is not supported: expected leading, trailing or "
            "linspace"
        )
    clip, cannot = ("none", {}) if latents else _clip(config, kind, path)
    offset = config.get("steps_offset")
    if offset is not None and not (type(offset) is int and offset >= 0):
        raise BadInput(f"{path}: steps_offset {offset!r} must be a small whole number, such as 1")
    if offset and spacing == "leading":
        cannot["spacing"] = f"{path}: steps_offset {offset} is not supported, expected 0"
    fields = {key: config.get(key) for key in (*OF_CLASS, "steps_offset")}
    fields["set_alpha_to_one"] = config.get("set_alpha_to_one", kind.set_alpha_to_one)
    return dict(
        alpha_bar=alpha_bar,
        betas=tuple(betas.tolist()),
        timesteps=len(betas),
        **_named(config, alpha_bar),
        prediction=PREDICTIONS[prediction],
        variance=VARIANCES.get(variance, ""),
        sampler=name,
        clip=clip,
        spacing=SPACINGS[spacing],
        fields=fields,
        cannot=cannot,
        notes=_notes(config, path),
    )


def _clip(config, kind, path):
    """(clip, cannot) of read_schedule. A field that a class does not have means nothing to it."""
    most, ratio = config.get("sample_max_value", 1.0), config.get("dynamic_thresholding_ratio")
    ratio, most = 0.995 if ratio is None else ratio, math.inf if most is None else most
    if kind.thresholding is not None and config.get("thresholding", kind.thresholding):
        if most == 1:  # which leaves a plain clamp
            return "clamp", {}
        if ratio != 0.995 or most < 1e4:
            told = f"dynamic_thresholding_ratio {ratio}, sample_max_value {most}"
            told = f"{path}: thresholding with {told} is not supported, expected 0.995 and 1 or "
            return "dynamic", {"clip_denoised": told + "1e4 and more"}
        return "dynamic", {}
    if kind.clip_sample is None or not config.get("clip_sample", kind.clip_sample):
        return "none", {}
    if (reach := config.get("clip_sample_range", 1.0)) != 1:
        told = f"{path}: clip_sample_range {reach} is not supported, expected 1"
        return "clamp", {"clip_denoised": told}
    return "clamp", {}


# ------------------------------------------------------------------- what a run of ours noted

NOTES = {
    "sample_steps": lambda v: type(v) is int and v > 0,
    "guidance": is_number,
    "timestep_respacing": lambda v: type(v) is str,
    "variance": ("small", "large").__contains__,
}


def _notes(config, path):
    """The settings of a run that no scheduler has, as scheduler_config wrote them."""
    found = {name: config[f"_{name}"] for name in NOTES if f"_{name}" in config}
    for name, value in found.items():
        if isinstance(value, list | dict) or not NOTES[name](value):
            raise BadInput(f"{path}: _{name} {_short(value)} is none: leave it out")
    return found


def scheduler_config(facts, learned):
    """DDPMScheduler's settings for a schedule of ours.

    facts    alpha_bar float64 (T,), and what else differs from the defaults below: schedule,
             alpha_min, beta_start, beta_end, prediction, variance, clip, spacing, betas, which are
             kept as they are where no name has the table, and notes of a run: NOTES
    learned  whether the network gives variances

    trained_betas is what counts; where diffusers has a name for the table, that stands there, too.
    """
    betas = facts.get("betas") or betas_of(facts["alpha_bar"].double()).tolist()
    named = {}
    if facts.get("schedule") in ("linear", "sigmoid-beta"):
        named["beta_schedule"] = SCHEDULES[facts["schedule"]]
        named["beta_start"] = facts.get("beta_start") or 0.1 / len(betas)
        named["beta_end"] = facts.get("beta_end") or 20 / len(betas)
    variance = "learned" if learned else facts.get("variance", "small")
    names = {ours: theirs for theirs, ours in reversed(VARIANCES.items())}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()}
    clip = facts.get("clip", "clamp")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        **named,
        "trained_betas": list(betas),
        "_schedule": facts.get("schedule", "other"),
        "_alpha_min": facts.get("alpha_min", 0.001),
        "prediction_type": predictions[facts.get("prediction", "eps")],
        "variance_type": names[variance],
        "clip_sample": clip == "clamp",
        "clip_sample_range": 1.0,
        "thresholding": clip == "dynamic",
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1e4,
        "timestep_spacing": spacings[facts.get("spacing", "linear")],
        **{f"_{name}": value for name, value in facts.get("notes", {}).items()},
    }
