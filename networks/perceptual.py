"""How good is a reconstruction? What an autoencoder learns from beside |x - x_hat|, and figures.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018
(arXiv:1801.03924): LPIPS. Isola et al., "Image-to-Image Translation with Conditional Adversarial
Networks", 2017 (arXiv:1611.07004): PatchGAN. Wang et al., "Image Quality Assessment", 2004: SSIM.

    Perceptual      distance of what a trained classifier sees in both images
    Discriminator   scores of patches, which learn to tell those of x from those of x_hat

psnr and ssim only measure. Images are (B,C,H,W) in [-1,1] throughout. autoencoder.py trains with
both networks.
"""

from runtime.commandline import BadInput

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kernels import group_norm_silu
from networks.published.files import check_floats, read_weights

# -------------------------------------------------------------------------- perceptual distance

# VGG16's convolutions, by their places in torchvision's `features`. A pooling stands before each
# group but the first; the output of a group's last ReLU is what is compared.
GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MARKS = ("features.0.weight", "net.slice1.0.weight")  # each file of VGG16 has one
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for images in [-1,1]


class Perceptual(nn.Module):
    """LPIPS: distance of images (B,C,H,W), C 1 or 3, by VGG16's features (LPIPS eq. 1); fixed.

    layers   (weight, bias) of the thirteen convolutions in order
    channel  one (1,C) weight for each of the five groups' channels, or None: each counts 1
    """

    def __init__(self, layers, channel=None):
        super().__init__()
        self.cast = {}  # (device, dtype): what weights() gives
        for i, (weight, bias) in enumerate(layers):  # copied: they may be a map of their file
            self.register_buffer(f"weight{i}", weight.to(torch.float32, copy=True))
            self.register_buffer(f"bias{i}", bias.to(torch.float32, copy=True))
        for i in range(len(GROUPS)):
            self.register_buffer(f"channel{i}", None if channel is None else channel[i].float())
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def weights(self, device):
        """[(weight, bias)] in what autocast computes in: it keeps a cast only of what learns."""
        on = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
        if (device, dtype) not in self.cast:
            state = {name: value.to(dtype) for name, value in self.named_buffers()}
            pairs = ((state[f"weight{i}"], state[f"bias{i}"]) for i in range(sum(map(len, GROUPS))))
            self.cast[device, dtype] = list(pairs)
        return self.cast[device, dtype]

    def features(self, x):
        """Of each group, (B,C_i,H/2^i,W/2^i), scaled to unit length at every place."""
        h = (x - self.mean) / self.std  # (B,3,H,W): gray becomes three channels
        layers = iter(self.weights(x.device))
        for i, group in enumerate(GROUPS):
            h = F.max_pool2d(h, 2) if i else h
            for _ in group:
                h = F.relu(F.conv2d(h, *next(layers), padding=1))
            wide = h.float()
            yield wide / (wide.square().sum(1, keepdim=True) + 1e-8).sqrt()

    def forward(self, x, x_hat):
        """Distance of each pair, (B,)."""
        with torch.no_grad():
            wanted = list(self.features(x))
        total = 0
        for i, (a, b) in enumerate(zip(wanted, self.features(x_hat), strict=True)):
            weight = getattr(self, f"channel{i}")
            square = (a - b).square()  # (B,C_i,h,w)
            square = square if weight is None else square * weight.view(1, -1, 1, 1)
            total = total + square.sum(1).mean(dim=(1, 2))
        return total


def load_perceptual(path, shape):
    """Perceptual with the weights in a file, for images of `shape` (C,H,W).

    The file is a state dict of VGG16 as torchvision names it (features.0.weight ...), or of LPIPS
    as the lpips package does (net.slice1.0.weight ..., lin0.model.1.weight ...), whose learned
    weights of the channels are then used. Loads with weights_only. Raises BadInput for another
    file, and for images that cannot be seen by it.
    """
    if shape[0] not in (1, 3) or min(shape[1:]) < 16:
        raise BadInput(
            f"--perceptual: VGG16 sees gray or colour images of at least 16x16, not {shape[1]}x"
            f"{shape[2]}x{shape[0]}; leave it out"
        )
    if not Path(path).is_file():
        raise BadInput(f"--perceptual {path}: no such file; name the weights of VGG16")
    state, found = read_weights(Path(path), MARKS), {}
    check_floats(state, f"--perceptual {path}")
    for name, value in state.items():
        place = re.fullmatch(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", name)
        found[place[1] if place else name] = value
    layers, c_in = [], 3
    for place in (place for group in GROUPS for place in group):
        weight, bias = found.get(f"{place}.weight"), found.get(f"{place}.bias")
        if weight is None or bias is None:
            raise BadInput(
                f"--perceptual {path} lacks features.{place}.weight or its bias; expected VGG16 "
                "as torchvision or the lpips package saves it"
            )
        if weight.shape[1:] != (c_in, 3, 3) or bias.shape != weight.shape[:1]:
            raise BadInput(
                f"--perceptual {path}: features.{place}.weight is {tuple(weight.shape)}, expected "
                f"(channels, {c_in}, 3, 3): it is not VGG16"
            )
        layers.append((weight, bias))
        c_in = len(weight)
    channel = [found.get(f"lin{i}.model.1.weight") for i in range(len(GROUPS))]
    if any(weight is None for weight in channel):
        return Perceptual(layers)
    for i, weight in enumerate(channel):
        wanted = layers[sum(map(len, GROUPS[: i + 1])) - 1][1].numel()
        if weight.numel() != wanted:
            raise BadInput(
                f"--perceptual {path}: lin{i}.model.1.weight has {weight.numel()} numbers, "
                f"expected {wanted}, one for each channel"
            )
    return Perceptual(layers, channel)


# -------------------------------------------------------------------------------- discriminator


class GroupNorm(nn.GroupNorm):
    """Normalises each image by itself: a verdict depends on no other image, nor on how a batch is
    shared among processes, as it would with pix2pix's batch norm."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, max(1, channels // 2)), channels)

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=False)


class Discriminator(nn.Module):
    """PatchGAN: (B,C,H,W) -> one score for each of many overlapping patches, (B,h,w).

    Three halvings, so that a score sees 70x70 pixels (Isola et al., appendix 6.1.2): it judges
    texture, and leaves what the image shows to the other losses. Sides are at least 24.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [
                nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False),
                GroupNorm(2 * c),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x):
        return self.layers(x)[:, 0]  # (B,H/8-2,W/8-2)


# -------------------------------------------------------------------------------------- figures


def psnr(x, x_hat):
    """Peak signal to noise ratio of each pair in [-1,1], (B,), in dB; at most 100."""
    mse = (x - x_hat).double().square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def ssim(x, x_hat, data_range=2.0):
    """Structural similarity of each pair, (B,), 1 for equal ones (Wang et al. 2004, eq. 13).

    Local means, variances and covariance under an 11x11 Gaussian of standard deviation 1.5, only
    where it lies inside the image, each channel alone; K1 = 0.01, K2 = 0.03. For a side below 11
    the window is cut to the largest odd number of pixels that fits.
    """
    taps = min(11, (min(x.shape[2:]) - 1) // 2 * 2 + 1)
    place = torch.arange(taps, dtype=torch.float64, device=x.device) - taps // 2
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, taps)
    # as matrices, which are ten times as fast as a convolution of one channel in float64
    down, across = (
        F.conv1d(torch.eye(n, dtype=torch.float64, device=x.device)[:, None], window)[:, 0]
        for n in x.shape[2:]
    )  # (H,H-taps+1), (W,W-taps+1)

    def mean(values):  # (B,C,H,W) -> (B,C,H-taps+1,W-taps+1)
        return down.t() @ values @ across

    x, y = x.double(), x_hat.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    cov = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    shape = (2 * cov + c2) / (var_x + var_y + c2)
    return (light * shape).mean(dim=(1, 2, 3))
