"""What a checkpoint keeps is looked at before a network is built of it: types, ranges, shapes.

A file that is damaged, edited or of something else is refused in one line; without that it would
take any memory, loop for hours, or end in some line of a network.
"""

from runtime.commandline import BadInput

import contextlib
import math
import types
from dataclasses import fields
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import torch

KINDS = {
    "config": (dict, "settings by name"),
    "step": (int, "a whole number"),
    "model": (dict, "tensors by name"),
    "optimizer": (dict, "what torch's optimizers keep"),
    "resumed": (str, "a text"),
    "class_names": (list, "names of classes"),
    "shape": (list, "(C, H, W)"),
    "ema": (dict, "tensors by name"),
    "more_emas": (list, "such dictionaries"),
    "settings": (dict, "settings by name"),
    "ae": (dict, "settings by name"),
    "autoencoder": (dict, "tensors by name"),
    "scale": (int | float, "a number"),
}
# More of these no network here has. A network is built without memory before it is built, but that
# takes its time, too.
MOST = {"timesteps": 100_000, "num_res_blocks": 64, "depth": 256}
SIDE = 2**14  # pixels of an image, and levels of anything


def check_state(state, path):
    """BadInput where what a checkpoint `state` keeps is not of the kind that a run keeps."""
    for name, (kind, expected) in KINDS.items():
        if name in state and not _is(state[name], kind):
            raise BadInput(f"{path}: its {name} is {_short(state[name])}, expected {expected}")
    shape, names = state.get("shape", [1, 1, 1]), state.get("class_names", [])
    if len(shape) != 3 or not all(type(n) is int and 0 < n <= SIDE for n in shape):
        raise BadInput(f"{path}: its shape is {_short(shape)}, expected (C, H, W)")
    if not all(isinstance(name, str) for name in names):
        raise BadInput(f"{path}: its class_names are {_short(names)}, expected texts")
    if state.get("step", 0) < 0:
        raise BadInput(f"{path}: its step is {state['step']}, expected a whole number from 0")
    for name, value in state.get("config", {}).items():
        if not isinstance(name, str) or not _is_plain(value):
            raise BadInput(f"{path}: its config holds {_short(value)} under {_short(name)}")
    for name in ("model", "ema", "autoencoder"):
        _check_tensors(state.get(name, {}), name, path)
    for mean in state.get("more_emas", []):
        _check_tensors(mean, "more_emas", path)


def _check_tensors(found, name, path):
    if not isinstance(found, dict):
        raise BadInput(f"{path}: its {name} is {_short(found)}, expected tensors by name")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise BadInput(f"{path}: its {name} holds {_short(value)}, expected tensors by name")


def _is_plain(value, depth=0):
    """Whether a value is one that settings have: of numbers, texts, lists and dictionaries."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return depth < 9 and all(_is_plain(one, depth + 1) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def load_networks(net, emas, state):
    """Give a network and its running means what a checkpoint keeps of them.

    BadInput where that is of another network, or holds numbers that are not finite.
    """
    kept = [state["model"], state["ema"], *state["more_emas"]]
    for one, weights in zip([net, *emas], kept, strict=False):
        _check_finite(weights, state)
        with fitting(state, "network"):
            one.load_state_dict(weights)


def load_optimizer(optimizer, state):
    """The same of an optimizer."""
    from runtime import sharding

    with fitting(state, "optimizer"):
        for moments in state["optimizer"]["state"].values():
            _check_finite(moments, state)
        sharding.load_optimizer(optimizer, state["optimizer"])


def _check_finite(tensors, state):
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            told = f"{name} holds numbers that are not finite: name an earlier one by --resume"
            raise BadInput(f"checkpoint {state.path}: its {told}")


@contextlib.contextmanager
def fitting(state, what):
    """Inside, what a checkpoint keeps is loaded; BadInput where it is of something else."""
    from runtime.edges import is_of_memory

    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, BadInput) or is_of_memory(error):
            raise
        told = " ".join(str(error).split())[:200]
        raise BadInput(f"checkpoint {state.path}: its {what} is another one: {told}") from error


def check_settings(config_class, values, path):
    """BadInput where a setting that a checkpoint keeps is none that `config_class` could have."""
    hints = get_type_hints(config_class, include_extras=True)
    for name in [f.name for f in fields(config_class) if f.name in values]:
        value, most = values[name], MOST.get(name)
        if not _fits(value, hints[name]):
            raise BadInput(f"{path}: its setting {name} is {_short(value)}, which it cannot be")
        if most is not None and not 0 <= value <= most:
            raise BadInput(f"{path}: its setting {name} is {value}, expected at most {most}")
    levels = values.get("channel_mult", ())
    if isinstance(levels, list | tuple) and len(levels) > 16:
        raise BadInput(f"{path}: its setting channel_mult has {len(levels)} levels, expected 16")


def _fits(value, kind):
    """Whether a value is of an annotated type, where lists stand for tuples."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        # Published networks may have 1.5 times as many channels.
        kinds = [float if one is int else one for one in kinds]
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    return _is(value, kind)


def _is(value, kind):
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind is list:
        return isinstance(value, list | tuple)
    return isinstance(value, kind)


def _short(value):
    text = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
