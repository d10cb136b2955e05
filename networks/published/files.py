"""The files of published networks: weights, and the schedule in a scheduler_config.json."""

from runtime.checkpoints import load_mapped
from runtime.commandline import BadInput
from runtime.files import atomic_write

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
# In which weights are numbers themselves. Others are codes, of quantised networks, whose scales lie
# elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS += (torch.float8_e4m3fn, torch.float8_e5m2)
MOST_STEPS = 100_000
PART = 2**25  # bytes of a file of weights that are mapped together; each map is an open file
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_large": "large",
    "learned_range": "learned",
    "fixed_small_log": "small",
    "fixed_large_log": "large",
}


class Inert:
    """What stands for an object of another package in a file: it keeps nothing and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# What PyTorch Lightning kept beside the weights in 2022: itself, as the key of its callback's
# state, and numpy's numbers and arrays in it. None of these names is ever looked up.
BESIDE = [
    (Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",  # as numpy 2 writes it
        "numpy._core.multiarray._reconstruct",
    )
]


def find_files(path):
    """(weights, config.json or None, scheduler_config.json or None) of what the user named."""
    if path.is_file():
        config = path.with_name("config.json")
        return path, config if config.exists() else None, None
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    net = path / "unet" if (path / "unet").is_dir() else path
    weights = find_weights(net)
    # Pipelines saved before 2023 keep the scheduler's settings beside the network's.
    schedulers = [path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"]
    scheduler = next((file for file in schedulers if file.is_file()), None)
    return weights, net / "config.json" if (net / "config.json").exists() else None, scheduler


def find_weights(folder):
    """The file of weights in a folder of diffusers; BadInput where there is none."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise BadInput(f"{folder} holds no weights: expected {' or '.join(WEIGHTS[:2])} in it")
    return found


def read_weights(path, inside=(), allowed=()):
    """The state_dict in a file: {name: tensor}, on the CPU, as it is there.

    path     .safetensors, also in another name, or what torch.save wrote, in any name but this
    inside   names under which it may lie among other things, such as "state_dict"; the first of
             them that holds a dictionary is taken, else the whole
    allowed  classes that may lie beside tensors, such as argparse.Namespace

    Tensors are mapped: of a checkpoint of gigabytes only what is used is read, and of none but
    names and shapes within `torch.device("meta")`, where a plan is made. Nothing in a file is
    ever executed: what BESIDE names becomes Inert. BadInput, naming the file, where it is missing,
    torn, or holds anything else.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file or folder")
    head = _head(path)
    if told := failed_download(head):
        raise BadInput(f"{path} {told}")
    named, tensors_only = path.suffix == ".safetensors", _is_safetensors(head)
    if named and not tensors_only and head.startswith((b"PK\x03\x04", b"\x80\x02")):
        # torch.load goes by the name, too.
        raise BadInput(f"{path} is no safetensors file but one of torch.save: rename it to .ckpt")
    try:
        with torch.device("cpu"):
            tensors_only = tensors_only or named
            state = load_parts(path) if tensors_only else load_mapped(path, [*BESIDE, *allowed])
    except SafetensorError as error:
        raise BadInput(f"{path} is no safetensors file, or a torn one: {error}") from None
    except Exception as error:  # a torn pickle makes torch.load raise nearly anything
        raise BadInput(
            f"{path} is no file of plain tensors, or a torn one: {_reason(error)}; expected "
            ".safetensors, or a file saved without Python objects"
        ) from None
    if isinstance(state, dict):
        state = next((state[key] for key in inside if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise BadInput(f"{path} is not a state_dict: expected names and tensors and nothing else")
    where = torch.get_default_device()
    return state if where.type == "cpu" else {name: v.to(where) for name, v in state.items()}


def load_parts(path):
    """The tensors of a .safetensors file, mapped in parts of about PART bytes.

    What was read of a map is memory of the process until the map ends, which a part does with the
    last of its tensors: a network is copied out of its file in little more than its own size.
    """
    whole = load_file(path)  # which checks the file, and reads only names, shapes and places
    state = {name: value.clone() for name, value in whole.items() if value.numel() == 0}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    places = {name: header[name]["data_offsets"] for name in whole.keys() - state.keys()}
    order = sorted(places, key=places.get)
    for _, names in itertools.groupby(order, key=lambda name: places[name][0] // PART):
        names = list(names)
        first, last = places[names[0]][0], places[names[-1]][1]
        part = np.memmap(path, np.uint8, "c", start + first, last - first)  # "c": never written
        for name in names:
            begin, end = places[name]
            numbers, dtype = torch.from_numpy(part[begin - first : end - first]), whole[name].dtype
            if (begin - first) % dtype.itemsize:  # others may write tensors where none can begin
                numbers = numbers.clone()
            state[name] = numbers.view(dtype).view(whole[name].shape)
    return {name: state[name] for name in whole}


def check_floats(state, path):
    """BadInput for a state_dict of quantised weights: as numbers they would draw something else."""
    for name, value in state.items():
        if value.dtype not in FLOATS:
            raise BadInput(
                f"{path} is quantised, {name} is {str(value.dtype).removeprefix('torch.')}: "
                "expected the weights in float16, bfloat16 or float32"
            )


def failed_download(head):
    """What a file with these first bytes is instead of weights, or None: text is no weights."""
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer of Git LFS: a failed download, fetch it again"
    if head and not re.search(rb"[^\t\n\r -~]", head[:64]):
        told = head[:20].decode()
        return f"is no file of plain tensors but text, {told!r}: a failed download, fetch it again"
    return None


def _head(path):
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _is_safetensors(head):
    """Whether a file begins so: the length of a header, 8 bytes, and the header, which is JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _reason(error):
    """What torch.load found, as one line; the first line of its own says how to run the file."""
    told = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error).strip()
    return told.splitlines()[0].partition(". ")[0] if told else type(error).__name__


def read_json(path):
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold settings by name, got a {type(value).__name__}")
    return value


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


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


def is_published(path):
    """Whether `path` is for load_published: a folder, .safetensors, or .pt in OpenAI's names."""
    path = Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".bin"):
        return True
    try:
        if _is_safetensors(_head(path)):
            return True
        state = load_mapped(path)
    except Exception:  # missing or damaged: what reads our own checkpoints says so
        return False
    return isinstance(state, dict) and "input_blocks.0.0.weight" in state
