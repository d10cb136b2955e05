"""The Inception network whose features the published FID, KID and IS figures are made of.

Heusel et al. 2017 compare images by the 2048 features that the Inception-v3 network of Szegedy et
al. 2015 ("Rethinking the Inception Architecture for Computer Vision") has before its classifier.
The weights that everybody uses are those of a TensorFlow graph of 2015-12-05. It is not quite the
network of the paper, which torchvision has:

    average pools   a 3×3 window at the border is divided by the pixels in it, not by 9
    Mixed_7c        the pool of the last block takes the maximum, not the average
    classifier      1008 outputs, of 1000 classes; the Inception score leaves out their bias

How images come to the 299×299 pixels that it takes: evaluation/inception_features.py.
"""

from runtime.commandline import BadInput
from runtime.download import fetch, file_hash

import os
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from networks.published import files

# Where others published their weights; behind the last dash stands what the SHA-256 begins with.
PUBLISHED = {
    "fid": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    "torchvision": ("https://download.pytorch.org/models", "inception_v3_google-0cc3c7bd.pth"),
}

MARKS = ("Conv2d_1a_3x3.conv.weight",)  # which each file of these weights has

# ----------------------------------------------------------------------------------- the network
#
# A block sends its input through several branches and lays their channels side by side. A branch is
# a list of convolutions, each (channels, size) or, where it halves the image, (channels, size, 2);
# a list in its place stands for two that read the same input, side by side as well.

ROW, COLUMN = (1, 7), (7, 1)  # sizes (height, width): two thin kernels in place of a 7×7 one
BESIDE = [(384, (1, 3)), (384, (3, 1))]


def block_35(pooled):
    """The branches of a block at 35×35 pixels."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }


def block_17(narrow):
    """The branches of a block at 17×17 pixels."""
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(narrow, 1), (narrow, ROW), (192, COLUMN)],
        "branch7x7dbl": [
            (narrow, 1),
            (narrow, COLUMN),
            (narrow, ROW),
            (narrow, COLUMN),
            (192, ROW),
        ],
        "branch_pool": [(192, 1)],
    }


BLOCK_8 = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), BESIDE],
    "branch3x3dbl": [(448, 1), (384, 3), BESIDE],
    "branch_pool": [(192, 1)],
}
HALVE_35 = {
    "branch3x3": [(384, 3, 2)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
    "branch_pool": [],
}
HALVE_17 = {
    "branch3x3": [(192, 1), (320, 3, 2)],
    "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
    "branch_pool": [],
}
POOLS = {
    "inside": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}
# Of each variant: the pool of most blocks and of Mixed_7c, outputs, whether these have their bias.
VARIANTS = {
    "fid": ("inside", "maximum", 1008, False),
    "torchvision": ("average", "average", 1000, True),
}


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))  # (B, c_out, H, W), at stride 2 about half of H, W

    @torch.no_grad()
    def fold(self):
        """Of the convolution and the batch norm of inference, one convolution with a bias."""
        bn, dtype = self.bn, self.conv.weight.dtype
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()  # (c_out,)
        weight = self.conv.weight.double() * scale[:, None, None, None]
        bias = bn.bias.double() - bn.running_mean.double() * scale
        self.conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """A block of Inception: `branches` as above; what "branch_pool" reads is pooled before."""

    def __init__(self, c_in, branches, pool):
        super().__init__()
        self.pool, self.steps = pool, {branch: [] for branch in branches}
        for branch, layers in branches.items():
            width = c_in
            for i, layer in enumerate(layers, 1):
                beside = layer if isinstance(layer, list) else [layer]
                names = [f"{branch}_{i}" if len(layers) > 1 else branch]
                if len(beside) > 1:
                    names = [names[0] + letter for letter in "ab"]
                for name, (c_out, size, *stride) in zip(names, beside, strict=True):
                    size = size if isinstance(size, tuple) else (size, size)
                    padding = (0, 0) if stride else tuple(side // 2 for side in size)
                    self.add_module(name, Conv(width, c_out, size, *stride or [1], padding))
                width = sum(layer[0] for layer in beside)
                self.steps[branch].append(names)

    def forward(self, x):
        found = []
        for branch, steps in self.steps.items():
            y = POOLS[self.pool](x) if branch == "branch_pool" else x
            for names in steps:
                beside = [getattr(self, name)(y) for name in names]
                y = torch.cat(beside, 1) if len(beside) > 1 else beside[0]
            found.append(y)
        return torch.cat(found, 1)  # (B, channels of all branches, H, W); after "halve" about H/2


class Inception(nn.Module):
    """The network of Szegedy et al. 2015 in one of VARIANTS; its names are those of the files."""

    dim = 2048

    def __init__(self, variant="fid"):
        super().__init__()
        pool, last_pool, outputs, self.with_bias = VARIANTS[variant]
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed(192, block_35(32), pool)
        self.Mixed_5c = Mixed(256, block_35(64), pool)
        self.Mixed_5d = Mixed(288, block_35(64), pool)
        self.Mixed_6a = Mixed(288, HALVE_35, "halve")
        self.Mixed_6b = Mixed(768, block_17(128), pool)
        self.Mixed_6c = Mixed(768, block_17(160), pool)
        self.Mixed_6d = Mixed(768, block_17(160), pool)
        self.Mixed_6e = Mixed(768, block_17(192), pool)
        self.Mixed_7a = Mixed(768, HALVE_17, "halve")
        self.Mixed_7b = Mixed(1280, BLOCK_8, pool)
        self.Mixed_7c = Mixed(2048, BLOCK_8, last_pool)
        self.fc = nn.Linear(self.dim, outputs)

    def forward(self, x):
        """(B, 3, 299, 299) in [-1, 1] -> features (B, 2048), logits (B, K), spatial (B, 2023).

        The features are the mean of the last block over its 8×8 places (Heusel et al. 2017). K is
        1008, without the classifier's bias, as Salimans et al. 2016 compute the Inception score;
        the variant of torchvision has 1000, with it. The spatial features are the first 7 channels
        at the 17×17 places of a middle layer, in the order (17, 17, 7): sFID (Nash et al. 2021) as
        the ADM evaluation suite takes it.
        """
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5b(x)  # (B, 256, 35, 35)
        x = self.Mixed_5c(x)  # (B, 288, 35, 35)
        x = self.Mixed_5d(x)  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6b(x)  # (B, 768, 17, 17)
        x = self.Mixed_6c(x)  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17)
        # TensorFlow's mixed_6/conv is branch1x1 of this block, whose channels come first.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17, 17, 7), then (B, 2023)
        x = self.Mixed_6e(x)  # (B, 768, 17, 17)
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7b(x)  # (B, 2048, 8, 8)
        x = self.Mixed_7c(x)  # (B, 2048, 8, 8)
        x = x.mean((2, 3))  # (B, 2048)
        logits = F.linear(x, self.fc.weight, self.fc.bias if self.with_bias else None)  # (B, K)
        return x, logits, spatial

    def fold(self):
        """Fold every batch norm into its convolution: the same function, for inference only."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        return self


# ----------------------------------------------------------------------------------- the weights


def find_weights(weights="", root="data", patience=None):
    """The path of a file of weights, downloaded where `weights` is empty or names a published one.

    weights   a .pth; "fid" (or nothing) and "torchvision" name the files in PUBLISHED, which are
              kept in root/inception and downloaded when missing
    patience  seconds: BadInput where a download has not begun by then

    A file that bears the checksum of a published one in its name must have it. Raises BadInput
    where there is no such file, and where it cannot be downloaded.
    """
    if (weights or "fid") in PUBLISHED:
        mirror, name = PUBLISHED[weights or "fid"]
        path = Path(root) / "inception" / name
        if patience is not None and not path.exists():
            check_answer(mirror, path, patience)
        path = fetch(name, [mirror], path.parent, sha256=_checksum(name))
    else:
        path = Path(weights)
    if not path.is_file():
        known = " or ".join(PUBLISHED)
        raise BadInput(f"Inception weights {path}: no such file; name a .pth, or type {known}")
    expected = _checksum(path.name)
    if expected in {_checksum(name) for _, name in PUBLISHED.values()}:
        found = file_hash(path)[: len(expected)]
        if found != expected:
            why = f"its SHA-256 begins with {found}, not with {expected}"
            raise BadInput(f"{path} is not the file of this name ({why}); delete it, get it anew")
    return path


def check_answer(mirror, path, seconds):
    """Raise BadInput unless the mirror (see `fetch`) begins to send the file within `seconds`.

    In a thread, because looking up the name of a host has no limit of its own.
    """
    mirror = os.environ.get("DIFFUSION_MIRROR", mirror)
    address = mirror if "{}" in mirror else mirror.rstrip("/") + "/{}"
    address = address.replace("{}", path.name)
    failures = [f"no answer within {seconds:g} s"]

    def ask():
        try:
            first_byte = urllib.request.Request(address, headers={"Range": "bytes=0-0"})
            urllib.request.urlopen(first_byte, timeout=seconds).close()
            failures.clear()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not an address
            failures[:] = [getattr(error, "reason", None) or error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise BadInput(f"could not download {path.name} ({address}: {failures[0]}) to {path}")


def _checksum(name):
    return Path(name).stem.rpartition("-")[2]


def read_weights(path):
    """(variant, state dict) of a .pth in the layout of pytorch-fid or of torchvision.

    Which of the two is told by the outputs of its classifier. Loads plain tensors only. Raises
    BadInput, naming the file and what was expected, for anything else.
    """
    wanted = "expected the tensors of the FID Inception network or of torchvision's inception_v3"
    try:
        state = files.read_weights(path, MARKS)
    except BadInput as error:
        raise BadInput(f"{error}; {wanted}") from None
    if "fc.weight" not in state:
        raise BadInput(f"{path} holds no tensor fc.weight; {wanted}")
    outputs = {row[2]: variant for variant, row in VARIANTS.items()}
    variant = outputs.get(len(state["fc.weight"]) if state["fc.weight"].ndim else 0)
    if variant is None:
        shape, counts = tuple(state["fc.weight"].shape), " or ".join(map(str, outputs))
        raise BadInput(f"{path}: fc.weight is {shape}, expected ({counts}, {Inception.dim})")
    with torch.device("meta"):
        expected = Inception(variant).state_dict()
    for name in [name for name in expected if name.endswith("num_batches_tracked")]:
        del expected[name]  # a count that inference does not use, and older files do not hold
    for name, tensor in expected.items():
        if name not in state:
            raise BadInput(f"{path} holds no tensor {name}; {wanted}")
        if state[name].shape != tensor.shape:
            shapes = f"is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            raise BadInput(f"{path}: {name} {shapes} of the {variant} Inception network")
    unknown = [name for name in state if name not in expected and not unused(name)]
    if unknown:
        raise BadInput(f"{path} holds {unknown[0]}, which this network does not have; {wanted}")
    kept = {name: state[name] for name in expected}
    files.check_floats(kept, path)
    return variant, {name: value.to(torch.float32, copy=True) for name, value in kept.items()}


def unused(name):
    return name.startswith("AuxLogits.") or name.endswith("num_batches_tracked")
