"""DDPM++, the U-Net that Karras et al. train on CIFAR-10, FFHQ and AFHQ.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021
(arXiv:2011.13456), appendix H; here as Karras, Aittala, Aila, Laine, "Elucidating the Design Space
of Diffusion-Based Generative Models", 2022 (arXiv:2206.00364), appendix F, have it.

It is DDPM's U-Net (networks/adm_unet.py, style "ddpm") with these differences:

    input            c_noise(sigma), a real number, in the place of the timestep
    condition        label and augmentation are added before the two layers of the embedding, each
                     through a linear layer; no label is the zero vector
    residual branch  its sum with the input is divided by sqrt(2), and so is that of attention
    change of size   in a residual block: means of 2x2 pixels, or every pixel four times
    attention        one head; on the way down after every block of its heights, on the way up
                     after the last only
    GroupNorm        min(32, C / 4) groups, for C channels that come in
    initial weights  Xavier-uniform; the branches end at 1e-5 of it instead of at zero

The modules bear the names of the published weights, which networks/published/edm.py reads.
"""

from runtime.commandline import BadInput

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import attention
from networks.adm_unet import Norm, double, halve, timestep_embedding
from networks.sizes import check_unet

SKIP_SCALE = 0.5**0.5  # the sum of two signals of variance 1 has variance 1 again


def norm(channels, silu=True):
    """GroupNorm of the published groups; BadInput where they do not divide the channels."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise BadInput(
            f"--model-channels, --channel-mult: a layer's {channels} channels do not make "
            f"{groups or 1} norm groups of four or more: type --model-channels 32, or a multiple"
        )
    return Norm(groups, channels, 1e-6, silu)


def xavier(layer, gain=1.0):
    """Draw a layer's weights from U(-a, a), a = gain * sqrt(6 / (fan_in + fan_out)); no bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, size, gain=1.0):
    """A convolution of size x size that keeps H and W."""
    return xavier(nn.Conv2d(c_in, c_out, size, padding=size // 2), gain)


class Block(nn.Module):
    """x (B,c,H,W), emb (B,c_emb), and skip (B,c_skip,H,W) or None -> (B,c_out,H,W).

    skip is joined to x. resize (halve, double or None) changes the size on both branches, before
    the first convolution. With attends, attention follows, on a residual branch of its own.
    """

    def __init__(self, c, c_out, c_emb, *, c_skip=0, resize=None, attends=False, dropout=0.0):
        super().__init__()
        c_in = c + c_skip
        self.c_skip, self.resize, self.attends = c_skip, resize, attends
        self.norm0, self.conv0 = norm(c_in), conv(c_in, c_out, 3)
        self.affine = xavier(nn.Linear(c_emb, c_out))
        self.norm1, self.drop = norm(c_out), nn.Dropout(dropout)
        self.conv1 = conv(c_out, c_out, 3, gain=1e-5)
        same = c_in == c_out and resize is None
        self.skip = nn.Identity() if same else conv(c_in, c_out, 1)
        if attends:
            self.norm2, self.qkv = norm(c_out, silu=False), conv(c_out, 3 * c_out, 1, gain=0.2**0.5)
            self.proj = conv(c_out, c_out, 1, gain=1e-5)

    def forward(self, x, emb, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # (B,c+c_skip,H,W)
        h = self.norm0(x)
        if self.resize:
            h, x = self.resize(h), self.resize(x)  # (B,c,H/2,W/2) or (B,c,2H,2W)
        # A convolution's output is needed by nothing else, its own gradient included: add in place.
        h = self.conv0(h).add_(self.affine(emb)[:, :, None, None])  # (B,c_out,H,W)
        x = self.conv1(self.drop(self.norm1(h))).add_(self.skip(x)).mul_(SKIP_SCALE)
        return self.proj(self.attend(x)).add_(x).mul_(SKIP_SCALE) if self.attends else x

    def attend(self, x):
        """Every position of (B,C,H,W) attends to all of its image: (B,C,H,W)."""
        # Published channel 3c + k is channel c of q, k or v. Their weights are put in order here,
        # because a kernel would copy q, k and v, which are larger.
        parts = self.qkv.weight, self.qkv.bias
        weight, bias = (rearrange(part, "(c k) ... -> (k c) ...", k=3) for part in parts)
        qkv = F.conv2d(self.norm2(x), weight, bias)  # (B,3C,H,W)
        q, k, v = rearrange(qkv, "b (k c) h w -> k b 1 (h w) c", k=3)  # three times (B,1,HW,C)
        return rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])


class DDPMpp(nn.Module):
    """net(x, c_noise, y=None, augment=None) -> (B,C,H,W), F_theta of the paper's eq. 7.

    x (B,C,H,W), scaled to variance 1 by c_in; c_noise (B,) float, ln(sigma) / 4 in the paper;
    y (B,) int64 labels or None: the label net.null, which is num_classes, means "no label", and so
    does None; augment (B,augment_dim) float, what was done to the images, or None. H and W must
    halve len(channel_mult) - 1 times.

    shape (C,H,W); num_classes 0 is a network without labels.
    model_channels         channels of the first convolution, and with channel_mult of every level
    channel_mult           channels of each level in model_channels; each but the last is halved
    num_res_blocks         residual blocks of a level on the way down; one more on the way up
    attention_resolutions  image heights at which there is attention, as above
    dropout                before the second convolution of every block
    augment_dim            numbers that describe an augmentation; 0 is a network that takes none
    use_checkpoint         in training, keep only the blocks' inputs and compute the rest again
    BadInput for settings that do not fit each other. net.settings holds all but the last.
    """

    def __init__(
        self,
        shape,
        num_classes,
        *,
        model_channels=128,
        channel_mult=(2, 2, 2),
        num_res_blocks=4,
        attention_resolutions=(16,),
        dropout=0.0,
        augment_dim=0,
        use_checkpoint=False,
    ):
        super().__init__()
        (channels, height, width), c_emb = shape, 4 * model_channels
        levels = [round(model_channels * m) for m in channel_mult]
        check_unet(shape, model_channels, levels, attention=attention_resolutions)
        self.model_channels, self.null = model_channels, num_classes
        self.use_checkpoint = use_checkpoint
        self.settings = dict(
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dropout=dropout,
            augment_dim=augment_dim,
        )

        def block(c, c_out, **options):
            return Block(c, c_out, c_emb, dropout=dropout, **options)

        label = nn.Linear(num_classes, model_channels) if num_classes else None
        self.map_label = xavier(label) if label else None
        added = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_augment = xavier(added) if added else None
        self.map_layer0 = xavier(nn.Linear(model_channels, c_emb))
        self.map_layer1 = xavier(nn.Linear(c_emb, c_emb))

        c, skips = model_channels, [model_channels]
        self.enc = nn.ModuleDict({f"{height}x{width}_conv": conv(channels, c, 3)})
        for level, c_out in enumerate(levels):
            name = f"{height >> level}x{width >> level}"
            attends = height >> level in attention_resolutions
            if level > 0:
                self.enc[f"{name}_down"] = block(c, c, resize=halve)
                skips.append(c)
            for i in range(num_res_blocks):
                self.enc[f"{name}_block{i}"] = block(c, c_out, attends=attends)
                c = c_out
                skips.append(c)
        self.dec = nn.ModuleDict()
        for level, c_out in reversed(list(enumerate(levels))):
            name = f"{height >> level}x{width >> level}"
            attends = height >> level in attention_resolutions
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(c, c, attends=True)
                self.dec[f"{name}_in1"] = block(c, c)
            else:
                self.dec[f"{name}_up"] = block(c, c, resize=double)
            for i in range(num_res_blocks + 1):
                last = i == num_res_blocks
                options = dict(c_skip=skips.pop(), attends=attends and last)
                self.dec[f"{name}_block{i}"] = block(c, c_out, **options)
                c = c_out
        self.dec[f"{name}_aux_norm"] = norm(c)
        self.dec[f"{name}_aux_conv"] = conv(c, channels, 3, gain=1e-5)

    def forward(self, x, c_noise, y=None, augment=None):
        emb = timestep_embedding(c_noise, self.model_channels).to(x.dtype)  # (B,model_channels)
        if self.map_label is not None:
            if y is None:
                y = torch.full_like(c_noise, self.null, dtype=torch.int64)
            one_hot = F.one_hot(y, self.null + 1)[:, : self.null]  # all zeros for net.null
            emb = emb + self.map_label(one_hot.to(x.dtype) * self.null**0.5)
        if augment is not None:
            emb = emb + self.map_augment(augment)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))  # (B,4*model_channels)

        def run(layer, *inputs):
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                return checkpoint(layer, *inputs, use_reentrant=False)
            return layer(*inputs)

        first, *down = self.enc.values()
        h = first(x)  # (B,model_channels,H,W)
        skips = [h]
        for layer in down:
            h = run(layer, h, emb)
            skips.append(h)
        *up, norm_out, conv_out = self.dec.values()
        for layer in up:  # first (B,C_last,H/2^k,W/2^k), k = len(channel_mult) - 1
            h = run(layer, h, emb, skips.pop() if layer.c_skip else None)
        return conv_out(norm_out(h))  # (B,C,H,W)
