"""The published autoencoders of latent diffusion: images (B,C,H,W) <-> latents (B,z,H/f,W/f).

Kingma, Welling, "Auto-Encoding Variational Bayes", 2014 (arXiv:1312.6114): q(z|x), a Gaussian.
Esser et al., "Taming Transformers", 2021 (arXiv:2012.09841), appendix B: encoder and decoder.
Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1, appendix G: LDM.
Bohan, "Tiny AutoEncoder for Stable Diffusion", 2023 (github.com/madebyollin/taesd): TAESD.

    KLVAE              LDM's, also of Stable Diffusion, SDXL, SD3 and FLUX.1: 84 M parameters
    TinyAutoencoder    TAESD: 2.4 M, distilled to the same latents, without a variance
    load_pretrained    either, with weights that others published

    ae, facts = load_pretrained("taef2")        a folder or a file; see published/
    mean, log_var = ae.encode(x)                x (B,3,H,W) in [-1,1]
    x_hat = ae.decode(mean)

Both have the interface of small_autoencoder.Autoencoder, and autoencoder.py trains KLVAE, too.
Their modules carry the names of the papers' code, so that its checkpoints need no conversion.

Latents come as the network makes them. Diffusion wants them with unit variance: (z - shift) *
scaling (LDM appendix G), which load_pretrained gives where they were published.
"""

from runtime.commandline import BadInput
from runtime.processes import exact

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels import attention, group_norm_silu
from networks.drawing import doubled, drawing, norm_in_stripes
from networks.published.autoencoder import read_autoencoder

EPS = 1e-6  # of the published norms


def conv(c_in, c_out, **options):
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def named(**parts):
    """Parts that run one after another, each under its name."""
    return nn.Sequential(OrderedDict(parts))


def check_images(x, channels, factor):
    """BadInput for images (B,C,H,W) of other channels, or not to be made `factor` times smaller."""
    height, width = x.shape[2:]
    if x.shape[1] != channels:
        raise BadInput(
            f"the autoencoder wants images of {channels} channels, not of {x.shape[1]}: name "
            "another, or train one on these images"
        )
    if height % factor or width % factor:
        near = [max(factor, round(n / factor) * factor) for n in (height, width)]
        raise BadInput(
            f"images of {height}x{width} cannot be made {factor} times smaller by the autoencoder; "
            f"sizes must be multiples of {factor}: resize them, such as to {near[0]}x{near[1]}"
        )


class Norm(nn.GroupNorm):
    """GroupNorm and, unless silu is False, SiLU in one operation."""

    def __init__(self, groups, channels, eps=1e-5, silu=True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x):
        how = self.num_groups, self.weight, self.bias
        if drawing(x) and not x.is_contiguous():
            return norm_in_stripes(x, *how, self.eps, self.silu)
        return group_norm_silu(x, *how, eps=self.eps, silu=self.silu)


# ------------------------------------------------------------------------- the autoencoder of LDM


class ResBlock(nn.Module):
    """(B,c_in,H,W) -> (B,c_out,H,W): two convolutions on a residual branch."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, c_in, EPS), conv(c_in, c_out)
        self.norm2, self.conv2 = Norm(groups, c_out, EPS), conv(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(self.norm1(x))  # (B,c_out,H,W)
        h = self.norm2(h)  # so that the second convolution no longer keeps what the first gave
        return self.conv2(h).add_(self.nin_shortcut(x))


class SelfAttention(nn.Module):
    """Every position (B,C,H,W) attends to all of its image, with one head as wide as C."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = Norm(groups, channels, EPS, silu=False)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (  # (B,1,HW,C) each
            rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v)
        )
        out = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])  # (B,C,H,W)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """(B,C,H,W) -> (B,C,H/2,W/2): a convolution of stride 2, zeros below and to the right."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B,C,H,W) -> (B,C,2H,2W): every pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        if drawing(x):
            return doubled(self.conv, x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels, groups):
    """Where the image is smallest: the only place that sees all of it."""
    return named(
        block_1=ResBlock(channels, channels, groups),
        attn_1=SelfAttention(channels, groups),
        block_2=ResBlock(channels, channels, groups),
    )


def make_encoder(channels, levels, blocks, z_channels, groups):
    """(B,C,H,W) -> (B,2z,H/f,W/f), f = 2^(len(levels)-1); each level but the last is halved."""
    down, c_in = [], levels[0]
    for level, c in enumerate(levels):
        parts = {"block": nn.Sequential(*chain(c_in, c, blocks, groups))}
        if level < len(levels) - 1:
            parts["downsample"] = Downsample(c)
        down.append(named(**parts))
        c_in = c
    return named(
        conv_in=conv(channels, levels[0]),
        down=nn.Sequential(*down),
        mid=middle(c_in, groups),
        norm_out=Norm(groups, c_in, EPS),
        conv_out=conv(c_in, 2 * z_channels),
    )


def make_decoder(channels, levels, blocks, z_channels, groups):
    """(B,z,H/f,W/f) -> (B,C,H,W): from the last level to the first, with one block more in each."""
    up, c_in = {}, levels[-1]
    for level, c in reversed(list(enumerate(levels))):
        parts = {"block": nn.Sequential(*chain(c_in, c, blocks + 1, groups))}
        if level:
            parts["upsample"] = Upsample(c)
        up[str(level)] = named(**parts)
        c_in = c
    return named(
        conv_in=conv(z_channels, levels[-1]),
        mid=middle(levels[-1], groups),
        up=nn.Sequential(OrderedDict(up)),
        norm_out=Norm(groups, c_in, EPS),
        conv_out=conv(c_in, channels),
    )


def chain(c_in, c_out, n, groups):
    """n residual blocks in a row; the first changes the channels."""
    return [ResBlock(c_out if i else c_in, c_out, groups) for i in range(n)]


class KLVAE(nn.Module):
    """LDM's KL-regularised autoencoder: images (B,C,H,W) in [-1,1] <-> latents (B,z,H/f,W/f).

    f = 2^(len(channel_mult)-1): the defaults are the f8 of Stable Diffusion; LDM's f4 has
    channel_mult (1,2,4) and z_channels 3.

    channels        C of the images;  z_channels of the latents
    model_channels  times channel_mult[i] are the channels of level i
    num_res_blocks  residual blocks of a level of the encoder; the decoder has one more
    norm_groups     of every GroupNorm. 0 chooses the published 32, or fewer where a level's
                    channels do not make 32 groups of two or more: a norm of single channels would
                    take the colour off the image
    quant           1x1 convolutions around the latents; SD3 and FLUX.1 have none
    """

    def __init__(
        self,
        channels=3,
        model_channels=128,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=4,
        *,
        norm_groups=0,
        quant=True,
    ):
        super().__init__()
        levels = [round(model_channels * m) for m in channel_mult]
        if not norm_groups:
            norm_groups = math.gcd(32, *(1 if c % 2 else c // 2 for c in levels))
        if any(c % norm_groups for c in levels):
            raise BadInput(
                f"{norm_groups} norm groups do not divide the autoencoder's channels {levels}: "
                "norm_groups=0 has them chosen"
            )
        self.settings = {"kind": "ldm", "channels": channels, "model_channels": model_channels}
        self.settings |= {"channel_mult": tuple(channel_mult), "num_res_blocks": num_res_blocks}
        self.settings |= {"z_channels": z_channels, "norm_groups": norm_groups, "quant": quant}
        self.channels, self.z_channels = channels, z_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        sizes = (channels, levels, num_res_blocks, z_channels, norm_groups)
        self.encoder = make_encoder(*sizes)
        self.decoder = make_decoder(*sizes)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if quant else nn.Identity()

    def encode(self, x):
        """(mean, log-variance) of q(z|x), both (B,z,H/f,W/f), the second within -30 ... 20.

        In the weights' precision whatever autocast says: in float16 the network published with
        Stable Diffusion overflows. BadInput for other channels or sizes that f does not divide.
        """
        check_images(x, self.channels, self.factor)
        with exact(), torch.autocast(x.device.type, enabled=False):
            return self._encode(x.to(self.encoder.conv_in.weight.dtype))

    def decode(self, z):
        """(B,C,H,W) in about [-1,1], not clamped; in the weights' precision, as encode."""
        with exact(), torch.autocast(z.device.type, enabled=False):
            return self._decode(z.to(self.encoder.conv_in.weight.dtype))

    def forward(self, x, noise):
        """(x_hat, mean, log-variance) for noise (B,z,H/f,W/f) ~ N(0, 1); what training calls.

        Here autocast counts: bfloat16 has float32's range.
        """
        mean, log_var = self._encode(x)
        return self._decode(mean + (0.5 * log_var).exp() * noise), mean, log_var

    def _encode(self, x):
        moments = self.quant_conv(self.encoder(x))  # (B,2z,H/f,W/f)
        mean, log_var = moments.to(self.encoder.conv_in.weight.dtype).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def _decode(self, z):
        return self.decoder(self.post_quant_conv(z))  # (B,C,H,W)


# ------------------------------------------------------------------------- the tiny autoencoders


class Clamp(nn.Module):
    """Squeeze latents softly into -3 ... 3: what lies outside is no latent of an image."""

    def forward(self, z):
        return torch.tanh(z / 3) * 3


class TinyBlock(nn.Module):
    """Three convolutions and a skip, (B,C,H,W) -> the same, without norms.

    pooled: before them a branch of 1x1 convolutions around a GroupNorm, which carries what it
    pools over the whole image to every position, as attention would.
    """

    def __init__(self, channels, pooled=False):
        super().__init__()
        self.conv = nn.Sequential(
            conv(channels, channels),
            nn.ReLU(),
            conv(channels, channels),
            nn.ReLU(),
            conv(channels, channels),
        )
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                Norm(4, 4 * channels, silu=False),
                nn.ReLU(),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


class TinyAutoencoder(nn.Module):
    """TAESD: images (B,C,H,W) in [-1,1] <-> latents (B,z,H/f,W/f), f = 2^(len(num_blocks)-1).

    z_channels      4 for the latents of Stable Diffusion and SDXL, 16 for SD3 and FLUX.1, 32 for
                    FLUX.2: those latents after their own shift and scaling, of about unit variance
    model_channels  channels of every level
    num_blocks      of each level of the encoder; the decoder's are the same in reverse
    pooled          the blocks at the smallest size pool over the image (the network for FLUX.2)
    """

    def __init__(
        self, z_channels=4, channels=3, model_channels=64, num_blocks=(1, 3, 3, 3), pooled=False
    ):
        super().__init__()
        self.settings = {"kind": "tiny", "z_channels": z_channels, "channels": channels}
        self.settings |= {"model_channels": model_channels, "num_blocks": tuple(num_blocks)}
        self.settings |= {"pooled": pooled}
        last, width = len(num_blocks) - 1, model_channels
        self.channels, self.z_channels, self.factor = channels, z_channels, 2**last
        encoder, decoder = [conv(channels, width)], [Clamp(), conv(z_channels, width), nn.ReLU()]
        for level, n in enumerate(num_blocks):
            if level:
                encoder.append(conv(width, width, stride=2, bias=False))  # (B,width,h/2,w/2)
            encoder += [TinyBlock(width, pooled and level == last) for _ in range(n)]
        for level, n in reversed(list(enumerate(num_blocks))):
            decoder += [TinyBlock(width, pooled and level == last) for _ in range(n)]
            if level:  # (B,width,2h,2w)
                decoder += [nn.Upsample(scale_factor=2.0), conv(width, width, bias=False)]
        self.encoder = nn.Sequential(*encoder, conv(width, z_channels))
        self.decoder = nn.Sequential(*decoder, conv(width, channels))

    def encode(self, x):
        """(mean, log-variance), both (B,z,H/f,W/f); the second is -30: nothing is random here.

        In the weights' precision whatever autocast says. BadInput for other channels, or sizes that
        f does not divide.
        """
        check_images(x, self.channels, self.factor)
        with exact(), torch.autocast(x.device.type, enabled=False):
            x = x.to(self.encoder[0].weight.dtype)
            mean = self.encoder((x + 1) / 2)  # (B,z,H/f,W/f); TAESD's images are in [0,1]
        return mean, torch.full_like(mean, -30)

    def decode(self, z):
        """(B,C,H,W) in about [-1,1], not clamped; in the weights' precision, as encode."""
        with exact(), torch.autocast(z.device.type, enabled=False):
            return self.decoder(z.to(self.encoder[0].weight.dtype)) * 2 - 1

    def forward(self, x, noise):
        """(x_hat, mean, log-variance) for noise (B,z,H/f,W/f) ~ N(0, 1)."""
        mean, log_var = self.encode(x)
        return self.decode(mean + (0.5 * log_var).exp() * noise), mean, log_var


# ------------------------------------------------------------------------------ published weights


def load_pretrained(path, device="cpu"):
    """(autoencoder, facts): a published KLVAE or TinyAutoencoder, float32, frozen, in eval mode.

    path    as networks.published.autoencoder.read_autoencoder has it
    facts   dict(kind "ldm" or "tiny", source: the path, scaling, shift): z of diffusion is (z -
            shift) * scaling; both None where the files do not say, to be measured then
    BadInput for files that hold no such network, naming the first tensor that does not fit.
    """
    settings, state, facts = read_autoencoder(path)
    with torch.device("meta"):
        ae = {"ldm": KLVAE, "tiny": TinyAutoencoder}[facts["kind"]](**settings)
    check_state(ae.state_dict(), state, path)
    ae.load_state_dict(state, assign=True)
    ae.eval().requires_grad_(False)
    return ae.to(device, memory_format=torch.channels_last), facts


def check_state(expected, state, path):
    """BadInput where a state_dict lacks, adds or reshapes tensors of the expected one."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected)
    if missing:
        raise BadInput(
            f"{path} lacks {len(missing)} tensors of an autoencoder like it, first {missing[0]} "
            "(as the papers' code names it): expected the whole file of encoder and decoder"
        )
    if unknown:
        raise BadInput(
            f"{path} has {len(unknown)} tensors that this autoencoder has no place for, first "
            f"{unknown[0]}: expected Stable Diffusion's autoencoder, or a tiny one"
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise BadInput(
                f"{path}: {name} is {tuple(value.shape)}, expected {tuple(expected[name].shape)}: "
                "its parts are not of one network"
            )
