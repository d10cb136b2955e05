"""The Inception network whose features the published FID, KID and IS figures are made of.

Heusel et al. 2017 compare images by the 2048 features that the Inception-v3 network of Szegedy et
al. 2015 ("Rethinking the Inception Architecture for Computer Vision") has before its classifier.
The weights that everybody uses are those of a TensorFlow graph of 2015-12-05. It is not quite the
network of the paper, which torchvision has:

    average pools   a 3×3 window at the border is divided by the pixels in it, not by 9
    Mixed_7c        the pool of the last block takes the maximum, not the average
    classifier      1008 outputs, of 1000 classes; the Inception score leaves out their bias

A figure also depends on how images come to the 299×299 pixels that the network takes. Parmar et al.
2022 show by how much. Three ways are in use; features of one are never compared with another's.

    pytorch-fid     bilinear between pixel centres, without smoothing, of the package of that name
    tf1             bilinear as TensorFlow 1 does, half a pixel off: the original, torch-fidelity
    clean           bicubic, smoothed where images shrink, as Pillow does: clean-fid

    extractor = inception.load(resize="clean")  # downloads the weights (95 MB) the first time
    features, logits = extractor(images)  # uint8 (B, H, W, C) -> (B, 2048), (B, 1008)

The batch norms are folded into the convolutions and pixels lie channels last: on a CPU this is 1.8
times as fast as the same network as pytorch-fid runs it (bench/inception.py).
"""

from runtime.commandline import BadInput
from runtime.download import fetch, file_hash

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 299  # pixels, of the network's input
PROTOCOLS = ("pytorch-fid", "tf1", "clean")
AT_ONCE = 32  # images that go through the network together: about 1 GB

# Where others published their weights; behind the last dash stands what the SHA-256 begins with.
PUBLISHED = {
    "fid": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    "torchvision": ("https://download.pytorch.org/models", "inception_v3_google-0cc3c7bd.pth"),
}


# ------------------------------------------------------------------------------------- resizing
#
# Each protocol is linear and separable: an image X becomes A X Bᵀ, with one matrix for its rows and
# one for its columns. Two matrix products do on any device what each reference does.


def resize_matrix(n_in, n_out, protocol):
    """The float64 matrix (n_out, n_in) that resizes a line of n_in pixels; its rows add up to 1.

    In the two bilinear protocols the ratio of sizes and then each coordinate are rounded to
    float32, where the references do it: at 1024 pixels this alone moves a pixel by 5e-5 of the
    range. Raises BadInput for an unknown protocol.
    """
    check_protocol(protocol)
    if protocol == "clean":
        return _bicubic_matrix(n_in, n_out)
    ratio = torch.tensor(n_in / n_out, dtype=torch.float32).double()
    centre = 0.5 if protocol == "pytorch-fid" else 0.0  # of pixel 0; tf1 forgot that it is ½
    place = (torch.arange(n_out, dtype=torch.float64) + centre) * ratio - centre
    place = place.float().clamp(min=0)  # before the first centre there is nothing to blend with
    low = place.long().clamp(max=n_in - 1)  # (n_out,)
    high = (low + 1).clamp(max=n_in - 1)
    share = place.double() - low
    rows, matrix = torch.arange(n_out), torch.zeros(n_out, n_in, dtype=torch.float64)
    matrix[rows, low] = 1 - share
    matrix[rows, high] += share  # at the border both are the same pixel
    return matrix


def _bicubic_matrix(n_in, n_out):
    """Keys' cubic with a = -1/2, as wide as the pixels that become one where images shrink."""
    ratio = n_in / n_out
    width = max(ratio, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * ratio
    pixels = torch.arange(n_in, dtype=torch.float64)
    d = ((pixels + 0.5 - centre) / width).abs()  # (n_out, n_in)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)  # at the border fewer pixels share the sum of 1


def resize(images, matrices, protocol):
    """Float images (B, 3, H, W) in 0..255 -> (B, 3, 299, 299) in the range of the network.

    matrices: those of the height and of the width, float32, None where nothing is to be done.
    """
    rows, columns = matrices
    if rows is not None:
        images = rows @ images  # (B, 3, 299, W)
    if columns is not None:
        images = images @ columns.T  # (B, 3, 299, 299)
    if protocol == "pytorch-fid":
        return images / 127.5 - 1
    if protocol == "clean":  # a cubic overshoots at edges
        images = images.clamp(0, 255)
    return (images - 128) / 128


def check_protocol(protocol):
    if protocol not in PROTOCOLS:
        raise BadInput(f"no resize protocol {protocol!r}: name one of {', '.join(PROTOCOLS)}")


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


def find_weights(weights="", root="data"):
    """The path of a file of weights, downloaded where `weights` is empty or names a published one.

    A file that bears the checksum of a published one in its name must have it. See `load`.
    """
    if (weights or "fid") in PUBLISHED:
        mirror, name = PUBLISHED[weights or "fid"]
        path = fetch(name, [mirror], Path(root) / "inception", sha256=_checksum(name))
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


def _checksum(name):
    return Path(name).stem.rpartition("-")[2]


def read_weights(path):
    """(variant, state dict) of a .pth in the layout of pytorch-fid or of torchvision.

    Which of the two is told by the outputs of its classifier. Loads plain tensors only. Raises
    BadInput, naming the file and what was expected, for anything else.
    """
    wanted = "expected the tensors of the FID Inception network or of torchvision's inception_v3"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or "unreadable").splitlines()[0][:100]
        raise BadInput(f"{path} is damaged or no file of weights ({reason}); {wanted}") from None
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or "fc.weight" not in state:
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
    unknown = [name for name in state if name not in expected and not _unused(name)]
    if unknown:
        raise BadInput(f"{path} holds {unknown[0]}, which this network does not have; {wanted}")
    return variant, {name: state[name].float() for name in expected}


def _unused(name):
    return name.startswith("AuxLogits.") or name.endswith("num_batches_tracked")


# --------------------------------------------------------------------------------- the extractor


class Extractor:
    """Features of images under given weights and a resize protocol.

    protocol      one line for people
    feature_hash  eight hex digits of weights, variant and resize protocol together: features, and
                  statistics of features, of two hashes do not compare
    dim, device   2048, and where the network is
    """

    dim = Inception.dim

    def __init__(self, state, variant="fid", *, resize="pytorch-fid", device="cpu", name="given"):
        """state: what `read_weights` gives; name: of the weights, for the line `protocol`."""
        check_protocol(resize)
        digest = hashlib.sha256(f"{variant} {resize}".encode())
        for key in sorted(key for key in state if not _unused(key)):
            digest.update(key.encode() + state[key].cpu().contiguous().numpy().tobytes())
        self.feature_hash, self.resize = digest.hexdigest()[:8], resize
        self.device = torch.device(device)
        graph = {"fid": "Inception 2015-12-05", "torchvision": "Inception v3 of torchvision"}
        self.protocol = (
            f"{graph[variant]}, {self.dim}-d, resize {resize}, weights {name}, "
            f"feature hash {self.feature_hash}"
        )
        with torch.device("meta"):  # without the time that random weights would take
            net = Inception(variant)
        net.load_state_dict(state, strict=False, assign=True)
        net = net.requires_grad_(False).eval().fold()
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.matrices = {}

    @torch.inference_mode()
    def __call__(self, images, spatial=False):
        """uint8 (B, H, W, C), C 1 or 3 -> float32 features (B, 2048), logits (B, K) on the device.

        With `spatial` also (B, 2023), for sFID. An image's features do not depend on the batch it
        is in, up to rounding. Raises BadInput for images of another form.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            form = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise BadInput(f"expected images uint8 (B, H, W, C) with C 1 or 3, got {form}")
        matrices = [self._matrix(side) for side in images.shape[1:3]]
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(self.device.type, enabled=False):
            parts = [self._part(part, matrices) for part in images.split(AT_ONCE)]
        found = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        return tuple(found if spatial else found[:2])

    def _part(self, images, matrices):
        x = images.to(self.device).permute(0, 3, 1, 2).float()  # (B, C, H, W) in 0..255
        x = resize(x.expand(-1, 3, -1, -1), matrices, self.resize)  # (B, 3, 299, 299) in [-1, 1]
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def _matrix(self, side):
        if side == SIZE:  # of all three protocols the identity
            return None
        if side not in self.matrices:
            matrix = resize_matrix(side, SIZE, self.resize)
            self.matrices[side] = matrix.to(self.device, torch.float32)
        return self.matrices[side]


def load(weights="", root="data", resize="pytorch-fid", device="cpu"):
    """An Extractor.

    weights  a .pth in the layout of pytorch-fid (torch-fidelity's is the same) or of torchvision's
             inception_v3; "fid" (or nothing) and "torchvision" name the published files, which are
             kept in root/inception and downloaded when missing, their SHA-256 checked
    resize   one of PROTOCOLS
    """
    check_protocol(resize)
    path = find_weights(weights, root)
    variant, state = read_weights(path)
    return Extractor(state, variant, resize=resize, device=device, name=path.name)
