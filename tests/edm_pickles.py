"""Files in the layout of NVIDIA's EDM pickles, written by Python's pickle and torch themselves.

The classes that such a file names do not exist here. While one is written, stand-ins take the
places of torch_utils.persistence and dnnlib.util; when it is read, nothing does.
"""

import contextlib
import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch


class Persistent(torch.nn.Module):
    """An object of NVIDIA's persistent classes: a name, and what torch keeps of a module."""

    def __init__(self, kind, **attributes):
        super().__init__()
        object.__setattr__(self, "kind", kind)
        vars(self).update(attributes)

    def __reduce__(self):
        state = {name: value for name, value in vars(self).items() if name != "kind"}
        source = "raise SystemExit('the code in the file was executed')"
        meta = dict(type="class", version=6, module_src=source, class_name=self.kind, state=state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class Calls:
    """Pickled as the call of a function, whatever the arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def function(module, name):
    """A stand-in for a function of a module that is not there."""

    def called(*arguments):
        raise SystemExit(f"{module}.{name} was executed")

    called.__module__, called.__name__, called.__qualname__ = module, name, name
    return called


def easy_dict(**items):
    return sys.modules["dnnlib.util"].EasyDict(items)


@contextlib.contextmanager
def their_modules():
    """Inside, what NVIDIA's files name can be pickled."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    names = ("torch_utils.persistence", "_reconstruct_persistent_obj")
    persistence._reconstruct_persistent_obj = function(*names)
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    added = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    added |= {"torch_utils.persistence": persistence, "dnnlib.util": util}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def written(path, make):
    """Pickle what `make` returns; both happen where their modules are."""
    with their_modules(), open(path, "wb") as file:
        pickle.dump(make(), file, protocol=4)
    return path


def tree(tensors, dropout=0.13):
    """SongUNet's modules around {name: tensor} in the published names, without their filters."""
    root = Persistent("SongUNet", label_dropout=0)
    width = tensors["map_layer0.weight"].shape[1]
    half = dict(num_channels=width, max_positions=10000, endpoint=True)
    root.map_noise = Persistent("PositionalEmbedding", **half)
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for depth, part in enumerate(path, 1):
            if part not in module._modules:
                module.add_module(part, of_kind(".".join(path[:depth]), tensors, dropout))
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
        module._buffers.setdefault("resample_filter", None)
        if path[-1] in ("conv0", "skip") and path[1].endswith(("_up", "_down")):
            module._buffers["resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return root


def of_kind(path, tensors, dropout):
    """The module of SongUNet at a path, with its attributes, still empty."""
    last = path.split(".")[-1]
    if path in ("enc", "dec"):
        return torch.nn.ModuleDict()
    if path.startswith("map_") or last == "affine":
        return Persistent("Linear")
    if "norm" in last:
        groups = min(32, len(tensors[f"{path}.weight"]) // 4)
        return Persistent("GroupNorm", num_groups=groups, eps=1e-6)
    if f"{path}.weight" in tensors:
        resizes = last in ("conv0", "skip")
        up, down = (resizes and f"_{way}." in path for way in ("up", "down"))
        return Persistent("Conv2d", up=up, down=down, fused_resample=False)
    heads = int(f"{path}.qkv.weight" in tensors)
    more = dict(num_heads=heads, dropout=dropout, skip_scale=np.sqrt(0.5), adaptive_scale=False)
    return Persistent("UNetBlock", **more)


def precond(model, res, classes, kind="EDMPrecond", **changes):
    """The module around the network, as train.py makes it."""
    about = dict(img_resolution=res, img_channels=3, label_dim=classes, use_fp16=True)
    about |= dict(sigma_min=0, sigma_max=math.inf, sigma_data=0.5)
    net = Persistent(kind, **about | changes)
    net.model = model
    return net.eval()


def tensor_call(values, offset=0, size=None, stride=None, storage=None):
    """A tensor that says of itself what is given, over the storage of `values`."""
    size, stride = size or tuple(values.shape), stride or values.stride()
    storage = storage or values._typed_storage()
    arguments = storage, offset, size, stride, False, OrderedDict()
    return Calls(torch._utils._rebuild_tensor_v2, *arguments)
