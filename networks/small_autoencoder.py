"""A small autoencoder for small images: what the chapters train on two CPU cores.

Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1, in its simplest
form: residual blocks only. The image is first folded: its patches of `patch` x `patch` pixels
become channels, because convolutions at full resolution would cost most and see least.
"""

import math

import torch
from torch import nn

from kernels import group_norm_silu


class NormSiLU(nn.GroupNorm):
    """GroupNorm and SiLU in one operation.

    It has at most 32 groups and never one of a single channel: that would lose what is added to
    the channel.
    """

    def __init__(self, channels):
        super().__init__(1 if channels % 2 else math.gcd(32, channels // 2), channels)

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps)


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


class ResBlock(nn.Module):
    """(B,C,H,W) -> the same: two convolutions on a residual branch that starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(channels), conv(channels, channels)
        self.norm2, self.conv2 = NormSiLU(channels), conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))  # (B,C,H,W)


class Autoencoder(nn.Module):
    """Images (B,C,H,W) in [-1,1] <-> latents (B,z,H/f,W/f), f = patch * 2^(len(channel_mult)-1).

    channels        C of the images;  z_channels of the latents
    patch           side of the patches that are folded into channels
    model_channels  channels after that, times channel_mult at each resolution; each but the first
                    halves the image
    num_res_blocks  residual blocks at each resolution
    variance        without it the latents are no distribution: encode gives log-variances of -30
    """

    def __init__(
        self,
        channels,
        patch=4,
        model_channels=64,
        channel_mult=(1,),
        num_res_blocks=2,
        z_channels=4,
        variance=True,
    ):
        super().__init__()
        self.settings = {"kind": "kl", "channels": channels, "patch": patch}
        self.settings |= {"model_channels": model_channels, "channel_mult": tuple(channel_mult)}
        self.settings |= {"num_res_blocks": num_res_blocks, "z_channels": z_channels}
        self.channels, self.z_channels, self.variance = channels, z_channels, variance
        self.factor = patch * 2 ** (len(channel_mult) - 1)
        levels, folded = [model_channels * m for m in channel_mult], channels * patch**2
        encoder = [nn.PixelUnshuffle(patch), conv(folded, levels[0])]
        decoder = [conv(z_channels, levels[-1])]
        for level, c in enumerate(levels):
            if level:
                encoder.append(conv(levels[level - 1], c, stride=2))  # (B,c,h/2,w/2)
            encoder += [ResBlock(c) for _ in range(num_res_blocks)]
        for level, c in reversed(list(enumerate(levels))):
            decoder += [ResBlock(c) for _ in range(num_res_blocks)]
            if level:  # (B,c,2h,2w)
                decoder += [nn.Upsample(scale_factor=2.0), conv(c, levels[level - 1])]
        numbers = 2 * z_channels if variance else z_channels
        self.encoder = nn.Sequential(*encoder, NormSiLU(levels[-1]), conv(levels[-1], numbers))
        self.decoder = nn.Sequential(
            *decoder, NormSiLU(levels[0]), conv(levels[0], folded), nn.PixelShuffle(patch)
        )

    def encode(self, x):
        """(mean, log-variance) of q(z|x), both (B,z,H/f,W/f), float32 under autocast, too."""
        if not self.variance:
            mean = self.encoder(x).float()
            return mean, torch.full_like(mean, -30.0)
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def decode(self, z):
        """(B,C,H,W) in about [-1,1], not clamped."""
        return self.decoder(z)

    def forward(self, x, noise):
        """(x_hat, mean, log-variance) for noise (B,z,H/f,W/f) ~ N(0, 1); what training calls."""
        mean, log_var = self.encode(x)
        return self.decode(mean + (0.5 * log_var).exp() * noise), mean, log_var
