"""The U-Net of pixel space, in the two forms that its papers publish.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239), appendix B:
style "ddpm".
Nichol, Dhariwal, "Improved DDPM", 2021 (arXiv:2102.09672), section 3 and appendix A, and
Dhariwal, Nichol, "Diffusion Models Beat GANs", 2021 (arXiv:2105.05233), section 3: style "adm".

On the way down, the image is halved from level to level; on the way up, doubled again. Every
output on the way down is kept, and joined to the input of one layer on the way up.

Each layer is a residual block that sees the timestep and, at some image heights, self-attention
after it. The two styles do the same but for four details:

                         ddpm                                   adm
    timestep embedding   sines, cosines; i / (half - 1)         cosines, sines; i / half
    halving convolution  zeros below and to the right           zeros all around
    GroupNorm epsilon    1e-6                                   1e-5
    used with            one attention head, adds embedding     num_head_channels=64, learn_sigma,
                                                                use_scale_shift_norm,
                                                                resblock_updown

ddpm_pixel.py spells out the first by itself; improved_ddpm.py trains both.
networks/noisy_classifier.py is the way down of the second, and a pool.
networks/published/unet.py reads and writes the weights that others publish for either style.
"""

from runtime.commandline import BadInput

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import attention, group_norm_silu
from networks.sizes import check_unet, groups_for

EPS = {"ddpm": 1e-6, "adm": 1e-5}  # of every GroupNorm, by style


def timestep_embedding(t, channels, style="ddpm"):
    """(B,) timesteps -> (B,channels) sines and cosines of t times 1, ..., 10000^-(i / last), ...

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, with all sines together. In float32, in
    the published order of operations: at t = 1000 a frequency's last bit is a phase of 6e-5.
    """
    half = channels // 2
    last = max(half - 1, 1) if style == "ddpm" else half
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * i / last)  # (B,channels/2)
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts if style == "ddpm" else parts[::-1], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm, an optional scale and shift (B,C), and with silu the SiLU: in one operation."""

    def __init__(self, groups, channels, eps=1e-5, silu=True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x, scale=None, shift=None):
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            silu=self.silu,
        )


def zero(layer):
    """Start a layer at zero: the residual branch that it ends at first adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def halve(x):
    """(B,C,H,W) -> (B,C,H/2,W/2), means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x):
    """(B,C,H,W) -> (B,C,2H,2W), every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Conv2d):
    """(B,C,H,W) -> (B,C,H/2,W/2): a convolution of stride 2."""

    def __init__(self, channels, style):
        super().__init__(channels, channels, 3, stride=2, padding=0 if style == "ddpm" else 1)

    def forward(self, x):
        # What TensorFlow calls "SAME" pads an even size by nothing before and by one after.
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B,C,H,W) -> (B,C,2H,2W): every pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(double(x))


class ResBlock(nn.Module):
    """x (B,c_in,H,W), emb (B,c_emb) after its SiLU -> (B,c_out,H,W).

    The embedding is added before the second norm, or, with use_scale_shift_norm, scales and shifts
    what that norm gives (ADM section 3.1). resample (halve, double or None) changes the size on
    both branches, before the first convolution (BigGAN, arXiv:1809.11096, figure 15).
    """

    def __init__(
        self,
        c_in,
        c_out,
        c_emb,
        *,
        groups,
        eps=1e-6,
        dropout=0.0,
        use_scale_shift_norm=False,
        resample=None,
    ):
        super().__init__()
        self.use_scale_shift_norm, self.resample = use_scale_shift_norm, resample
        self.norm1, self.conv1 = Norm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out if use_scale_shift_norm else c_out)
        self.norm2, self.drop = Norm(groups, c_out, eps), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.norm1(x)
        if self.resample:
            h, x = self.resample(h), self.resample(x)  # (B,c_in,H/2,W/2) or (B,c_in,2H,2W)
        h, emb = self.conv1(h), self.emb(emb)  # (B,c_out,H,W), (B,c_out) or (B,2*c_out)
        # A convolution's output is needed by nothing else, its own gradient included: add in place.
        if self.use_scale_shift_norm:
            h = self.norm2(h, *emb.chunk(2, dim=1))
        else:
            h = self.norm2(h.add_(emb[:, :, None, None]))
        return self.conv2(self.drop(h)).add_(self.skip(x))


def pointwise(linear, x):
    """A linear layer at every position: (B,C_in,H,W) -> (B,C_out,H,W).

    On a CPU as a convolution of size 1, because its library is up to twice as fast there as that of
    matrix products. On a GPU not: autocast would cast this view of the weight at every call.
    """
    if x.device.type != "cpu":
        return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


class SelfAttention(nn.Module):
    """Every position (B,C,H,W) attends to all of its image; the heads split the channels."""

    def __init__(self, channels, heads, groups, eps):
        super().__init__()
        self.heads, self.norm = heads, Norm(groups, channels, eps, silu=False)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x):
        qkv = pointwise(self.qkv, self.norm(x))  # (B,3C,H,W)
        # Views of channels_last memory: three times (B,heads,HW,C/heads).
        q, k, v = rearrange(qkv, "b (k n d) h w -> k b n (h w) d", k=3, n=self.heads)
        out = rearrange(attention(q, k, v), "b n (h w) d -> b (n d) h w", h=x.shape[2])  # (B,C,H,W)
        return x + pointwise(self.proj, out)


class Layer(nn.Sequential):
    """Parts in a row; only residual blocks see the embedding. skip is joined to the channels."""

    def forward(self, h, emb, skip=None):
        if skip is not None:
            h = torch.cat([h, skip], dim=1)  # (B,C+C_skip,H,W)
        for part in self:
            h = part(h, emb) if isinstance(part, ResBlock) else part(h)
        return h


def checked(shape, settings):
    """The settings (see UNet) of a network of images (C,H,W), their norm_groups chosen.

    BadInput for settings that do not fit each other, or the images.
    """
    width, levels = settings["model_channels"], levels_of(settings)
    heads = settings["num_heads"], settings["num_head_channels"]
    check_unet(shape, width, levels, *heads, settings["attention_resolutions"])
    return dict(settings, norm_groups=groups_for(width, levels, settings["norm_groups"]))


def levels_of(settings):
    """Channels of each level."""
    return [round(settings["model_channels"] * m) for m in settings["channel_mult"]]


def time_layers(width):
    """(B,width) -> (B,4*width): what the embedding goes through before any residual block."""
    first, second = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
    return nn.Sequential(first, nn.SiLU(), second)


def makers(settings):
    """What makes the parts of a network: block(c_in, c_out, resample=None) and attend(c)."""
    groups, eps = settings["norm_groups"], EPS[settings["style"]]

    def block(c_in, c_out, resample=None):
        return ResBlock(
            c_in,
            c_out,
            4 * settings["model_channels"],
            groups=groups,
            eps=eps,
            dropout=settings["dropout"],
            use_scale_shift_norm=settings["use_scale_shift_norm"],
            resample=resample,
        )

    def attend(c):
        per = settings["num_head_channels"]
        return SelfAttention(c, c // per if per else settings["num_heads"], groups, eps)

    return block, attend


def down_half(shape, settings):
    """(conv_in, down, middle, kept) for images (C,H,W): the way down and the layer at its end.

    kept: channels of what conv_in and each layer of down give, which the way up is joined to.
    """
    (channels, height, _), levels = shape, levels_of(settings)
    block, attend = makers(settings)
    c, kept, down = levels[0], [levels[0]], nn.ModuleList()
    conv_in = nn.Conv2d(channels, c, 3, padding=1)
    for level, c_out in enumerate(levels):
        for _ in range(settings["num_res_blocks"]):
            parts = [attend(c_out)] if height in settings["attention_resolutions"] else []
            down.append(Layer(block(c, c_out), *parts))
            c = c_out
            kept.append(c)
        if level < len(levels) - 1:
            updown = settings["resblock_updown"]
            smaller = block(c, c, halve) if updown else Downsample(c, settings["style"])
            down.append(Layer(smaller))
            height //= 2
            kept.append(c)
    return conv_in, down, Layer(block(c, c), attend(c), block(c, c)), kept


def run(layer, *inputs, again=False):
    """layer(*inputs). again: keep its inputs only, and compute the rest once more in backward."""
    return checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)


class UNet(nn.Module):
    """net(x, t, y=None) -> (B,C,H,W), or (B,2C,H,W) with learn_sigma.

    x (B,C,H,W) in [-1,1] plus noise, t (B,) int timesteps from 0, y (B,) int labels or None;
    the label net.null, which is num_classes, means "no label", and so does None. H and W must halve
    len(channel_mult) - 1 times.

    shape (C,H,W); num_classes 0 is a network without labels.
    model_channels         channels of the timestep embedding, and with channel_mult of every level
    channel_mult           channels of each level in model_channels; each but the last is halved
    num_res_blocks         residual blocks of a level on the way down; one more on the way up
    attention_resolutions  image heights at which self-attention follows every residual block
    num_heads              attention heads
    num_head_channels      above 0: the channels of each head, instead of num_heads
    style                  "ddpm" or "adm", see above
    use_scale_shift_norm   the embedding scales and shifts (ADM) instead of being added (DDPM)
    resblock_updown        sizes change in residual blocks (ADM) instead of convolutions (DDPM)
    learn_sigma            the second C channels are v, about -1 ... 1: log beta_tilde ... log beta
                           (IDDPM eq. 15)
    norm_groups            of every GroupNorm, 0 chooses (sizes.groups_for); 32 in published ones
    use_checkpoint         in training, keep only the layers' inputs and compute the rest again
    BadInput for settings that do not fit each other. net.settings holds all but the last.
    net.time_scale is what t is multiplied by, 1 but for networks that others trained so.
    """

    time_scale = 1.0

    def __init__(
        self,
        shape,
        num_classes,
        *,
        model_channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        num_heads=1,
        num_head_channels=0,
        dropout=0.0,
        style="adm",
        use_scale_shift_norm=False,
        resblock_updown=False,
        learn_sigma=False,
        norm_groups=0,
        use_checkpoint=False,
    ):
        super().__init__()
        if style not in EPS:
            raise BadInput(f'--style {style!r} is not known: type "ddpm" or "adm"')
        settings = dict(
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            dropout=dropout,
            style=style,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            learn_sigma=learn_sigma,
            norm_groups=norm_groups,
        )
        self.settings = checked(shape, settings)
        self.model_channels, self.style, self.null = model_channels, style, num_classes
        self.use_checkpoint = use_checkpoint
        self.time = time_layers(model_channels)
        self.label = nn.Embedding(num_classes + 1, 4 * model_channels) if num_classes else None
        self.conv_in, self.down, self.middle, kept = down_half(shape, self.settings)
        (block, attend), levels = makers(self.settings), levels_of(self.settings)
        c, height = levels[-1], shape[1] >> (len(levels) - 1)
        self.up = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(levels))):
            for i in range(num_res_blocks + 1):
                parts = [attend(c_out)] if height in attention_resolutions else []
                if level > 0 and i == num_res_blocks:
                    larger = block(c_out, c_out, double) if resblock_updown else Upsample(c_out)
                    parts.append(larger)
                    height *= 2
                self.up.append(Layer(block(c + kept.pop(), c_out), *parts))
                c = c_out
        self.norm_out = Norm(self.settings["norm_groups"], c, EPS[style])
        outputs = shape[0] * (2 if learn_sigma else 1)
        self.conv_out = zero(nn.Conv2d(c, outputs, 3, padding=1))

    def forward(self, x, t, y=None):
        angles = timestep_embedding(t * self.time_scale, self.model_channels, self.style)
        emb = self.time(angles.to(x.dtype))  # (B,4*model_channels)
        if self.label is not None:
            if y is None:
                y = torch.full_like(t, self.null, dtype=torch.int64)
            emb = emb + self.label(y)
        emb = F.silu(emb)  # every residual block begins with it
        again = self.use_checkpoint and self.training and torch.is_grad_enabled()

        h = self.conv_in(x)  # (B,C0,H,W)
        skips = [h]
        for layer in self.down:
            h = run(layer, h, emb, again=again)
            skips.append(h)
        # (B,C_last,H/2^k,W/2^k), k = len(channel_mult) - 1
        h = run(self.middle, h, emb, again=again)
        for layer in self.up:
            h = run(layer, h, emb, skips.pop(), again=again)
        return self.conv_out(self.norm_out(h))  # (B,C,H,W) or (B,2C,H,W)
