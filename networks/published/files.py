"""The files of published networks: where they lie, weights, and settings in JSON."""

from runtime.checkpoints import load_mapped
from runtime.commandline import BadInput
from runtime.files import atomic_write

import itertools
import json
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
PART = 2**25  # bytes of a file of weights that are mapped together; each map is an open file


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
