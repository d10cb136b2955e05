"""DDPM++ networks in the pickles of NVIDIA's EDM code: their tensors and settings.

    read_edm("edm-cifar10-32x32-cond-vp.pkl")    a published network
    read_edm("network-snapshot-200000.pkl")      one that NVIDIA's code trained (--arch=ddpmpp)

edm_unet.DDPMpp bears the published names. Nothing in such a file is ever executed
(edm_pickle.py); so its code is not looked at, and names, shapes and settings must be DDPM++'s.
"""

from runtime.commandline import BadInput
from runtime.pickle_steps import shown

import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from image_data.augment import AUGMENT_DIM
from networks.edm_unet import SKIP_SCALE, Block, DDPMpp
from networks.published.edm_pickle import Module, Tensor, read_pickle

MOST_LEVELS, MOST_BLOCKS = 8, 32  # twice and eight times as many as the published networks have


def read_edm(path):
    """A published DDPM++.

    dict(state, settings, shape, num_classes, sigma_data, sigma_min, sigma_max)

    path      the pickle; its "ema" must be an EDMPrecond around a SongUNet with DDPM++'s settings
    state     state_dict of edm_unet.DDPMpp(shape, num_classes, **settings), float32
    shape     (C,H,W)
    sigma_... floats: sigma_data of the paper's eq. 7 in [-1, 1], and the least and the largest
              sigma that the network was made for, mostly 0 and inf

    The published networks always saw a label, if they have labels: guidance, which asks them for
    "no label", means nothing with them.
    BadInput, naming the file and what was found in it, for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; name a pickle, such as edm-cifar10-32x32-cond-vp.pkl"
        )
    try:
        return network(read_pickle(path), path.stat().st_size)
    except BadInput as error:
        told = str(error)
    except Exception as error:  # a torn pickle raises nearly anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"is no pickle of NVIDIA's EDM code, or a torn one: {shown(first)}"
    raise BadInput(f"{path} {told}; expected a DDPM++, such as edm-cifar10-32x32-cond-vp.pkl")


def network(found, size):
    """The result of read_edm for what a file of `size` bytes describes."""
    ema = found.get("ema") if isinstance(found, dict) else None
    if not isinstance(ema, Module):
        raise BadInput('holds no network under the name "ema"')
    if ema.kind != "EDMPrecond":
        raise BadInput(f"holds a network in {shown(ema.kind)}, not in EDMPrecond")
    model = ema.state["_modules"]["model"]
    if model.kind != "SongUNet":
        raise BadInput(f"holds a {shown(model.kind)}, no SongUNet")
    modules = modules_of(model)
    tensors = {
        f"{path}.{name}": value
        for path, module in modules.items()
        for group in ("_parameters", "_buffers")
        for name, value in module.state[group].items()
        if value is not None
    }
    names = ("img_channels", "img_resolution", "label_dim")
    channels, side, num_classes = (integer(ema, name) for name in names)
    shape, settings = (channels, side, side), settings_of(modules, tensors, side)
    with torch.device("meta"):
        net = DDPMpp(shape, num_classes, **settings)
    check_modules(net, modules)
    check_tensors(net, tensors, size)
    return dict(
        state={name: tensors[name].read() for name in net.state_dict()},
        settings=net.settings,
        shape=shape,
        num_classes=num_classes,
        **sigmas_of(ema),
    )


def integer(module, name):
    """A whole number among the attributes of a module; BadInput for anything else."""
    value = module.state.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise BadInput(f"has no whole number {name}")
    return value


def sigmas_of(ema):
    """dict(sigma_data, sigma_min, sigma_max), floats; BadInput for what are none."""
    names = ("sigma_data", "sigma_min", "sigma_max")
    data, low, high = (ema.state.get(name) for name in names)
    numbers = all(type(value) in (int, float) for value in (data, low, high))
    if not numbers or not (0 < data < math.inf and 0 <= low < high):
        raise BadInput("has no sigma_data above 0, or no sigma_min below sigma_max")
    return {"sigma_data": float(data), "sigma_min": float(low), "sigma_max": float(high)}


def modules_of(root):
    """{path: Module} of a network, itself at "".

    BadInput where two paths lead to the same module, or to the same dictionary in it: a small file
    could describe more of them than memory holds. And for long names, for the same reason.
    """
    found, left, seen = {}, [("", root)], set()
    while left:
        path, module = left.pop()
        if not isinstance(module, Module) or path.count(".") > 3:
            raise BadInput(f"has no module of a DDPM++ at {shown(path)}")
        groups = [module.state[group] for group in ("_modules", "_parameters", "_buffers")]
        parts = {id(part) for part in (module, *groups)}
        if len(parts) != 4 or parts & seen:
            raise BadInput(f"has at {shown(path)} a module that lies elsewhere, too")
        names = [name for group in groups for name in group]
        if odd := [name for name in names if not re.fullmatch(r"\w{1,40}", name)]:
            raise BadInput(f"has a part of the name {shown(odd[0])}")
        seen |= parts
        found[path] = module
        left += [(f"{path}.{name}" if path else name, child) for name, child in groups[0].items()]
    return found


def settings_of(modules, tensors, side):
    """Keywords of DDPMpp, read off names and shapes; BadInput for NCSN++, and for no U-Net."""
    noise = modules["map_noise"]
    if noise.kind != "PositionalEmbedding":
        raise BadInput(
            f"embeds the noise by a {shown(noise.kind)}, as NCSN++ does, not by a "
            "PositionalEmbedding"
        )
    width = length(tensors, f"enc.{side}x{side}_conv.weight", 0)
    wanted = dict(num_channels=width, max_positions=10000, endpoint=True)
    check_attributes("map_noise", noise, wanted)
    blocks = Counter(path.rpartition("_block")[0] for path in modules if path.count(".") == 1)
    here, mult, attention = side, [], []
    while blocks[f"enc.{here}x{here}"]:
        first = f"enc.{here}x{here}_block0"
        mult.append(length(tensors, f"{first}.conv1.weight", 0) // width)
        attention += [here] if f"{first}.qkv" in modules else []
        here //= 2
        if len(mult) > MOST_LEVELS:
            raise BadInput(f"has more than {MOST_LEVELS} levels")
    if not 0 < blocks[f"enc.{side}x{side}"] <= MOST_BLOCKS:
        raise BadInput(f"has no level of 1 to {MOST_BLOCKS} blocks at {side}x{side}")
    dropout = modules[f"enc.{side}x{side}_block0"].state.get("dropout")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadInput("has no dropout from 0 to 1 in its blocks")
    return dict(
        model_channels=width,
        channel_mult=tuple(mult),
        num_res_blocks=blocks[f"enc.{side}x{side}"],
        attention_resolutions=tuple(attention),
        dropout=float(dropout),
        augment_dim=length(tensors, "map_augment.weight", 1) if "map_augment" in modules else 0,
    )


def length(tensors, name, axis):
    """The length of a tensor along an axis; BadInput where there is no such tensor."""
    if not isinstance(tensors.get(name), Tensor) or not all(tensors[name].shape[axis : axis + 1]):
        raise BadInput(f"lacks a tensor of a DDPM++: {name}")
    return tensors[name].shape[axis]


# ------------------------------------------------------------------------ whether it is a DDPM++


def facts_of(path, module):
    """What NVIDIA's class of a module of ours is called, and what its attributes must be."""
    resized = path.endswith((".conv0", ".skip"))
    match module:
        case Block():
            heads, dropout = int(module.attends), module.drop.p
            fixed = dict(skip_scale=SKIP_SCALE, adaptive_scale=False)
            return "UNetBlock", dict(num_heads=heads, dropout=dropout, **fixed)
        case nn.GroupNorm():
            return "GroupNorm", dict(num_groups=module.num_groups, eps=module.eps)
        case nn.Conv2d():
            up, down = resized and "_up." in path, resized and "_down." in path
            return "Conv2d", dict(up=up, down=down, fused_resample=False)
    return type(module).__name__, {}


def check_attributes(path, module, wanted):
    """BadInput where a module of the file has not the numbers `wanted` as its attributes."""
    for name, value in wanted.items():
        found = module.state.get(name)
        number = isinstance(found, int | float)
        if not number or not math.isclose(found, value, rel_tol=1e-6):
            told = shown(str(found)) if number else f"a {type(found).__name__}"
            raise BadInput(f"is no DDPM++: its {path}.{name} is {told}, expected {value}")


def check_modules(net, modules):
    """BadInput unless the file has the modules of `net`, with their settings, and no others."""
    kinds = (Block, nn.GroupNorm, nn.Conv2d, nn.Linear, nn.ModuleDict)
    ours = {path: module for path, module in net.named_modules() if isinstance(module, kinds)}
    if odd := sorted({"", "map_noise", *ours} ^ modules.keys()):
        does = "has" if odd[0] in modules else "lacks"
        raise BadInput(f"is no DDPM++ of {len(ours)} parts: it {does} {odd[0]}")
    for path, module in ours.items():
        kind, wanted = facts_of(path, module)
        if modules[path].kind != kind:
            raise BadInput(f"has a {shown(modules[path].kind)} at {path}, expected a {kind}")
        check_attributes(path, modules[path], wanted)


def check_tensors(net, tensors, size):
    """BadInput unless the file, of `size` bytes, has the tensors of `net`, and room for them."""
    filters = [
        f"{path}.{part}.resample_filter"
        for path, module in net.named_modules()
        if isinstance(module, Block) and module.resize
        for part in ("conv0", "skip")
    ]
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    shapes |= dict.fromkeys(filters, (1, 1, 2, 2))
    for name in sorted(shapes.keys() | tensors.keys()):
        there = tensors[name].shape if isinstance(tensors.get(name), Tensor) else "no tensor"
        wanted = shapes.get(name, "no such tensor")
        if there != wanted:
            raise BadInput(f"is no DDPM++: {name} is {there}, expected {wanted}")
    for name in filters:
        if not (tensors[name].read() == 0.25).all():
            raise BadInput(f"is no DDPM++: {name} is not the mean of 2x2 pixels")
    needed = 4 * sum(math.prod(shape) for shape in shapes.values())
    if needed > size:
        raise BadInput(
            f"has weights of {needed} bytes in a file of {size}: some share their memory"
        )


def as_checkpoint(path, scripts=()):
    """read_edm(path) in the form of a checkpoint of edm.py, whichever `scripts` are asked for.

    A dictionary: script, config, shape, class_names (numbers), ema, sigma_data. BadInput as
    read_edm, and for a network whose vectors of augmentation are not of augment.py's length.
    """
    found = read_edm(path)
    settings = dict(found["settings"])
    length = settings.pop("augment_dim")
    if length not in (0, AUGMENT_DIM):
        why = f"takes vectors of {length} numbers for the augmentation, expected {AUGMENT_DIM}"
        raise BadInput(f"{path} {why}")
    # 0.12 is what the published networks were trained with; sampling needs to know but whether.
    config = {"model": "ddpmpp", "augment": 0.12 * (length > 0), "label_dropout": 0.0, "ema": ()}
    config["data"] = ""  # the file does not say
    return {
        "script": "edm",
        "config": config | settings,
        "shape": found["shape"],
        "class_names": [str(i) for i in range(found["num_classes"])],
        "ema": found["state"],
        "sigma_data": found["sigma_data"],
        "sigma_range": (found["sigma_min"], found["sigma_max"]),
    }
