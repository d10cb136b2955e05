"""The U-Net of latent diffusion, as Stable Diffusion 1 and 2 have it.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022
(arXiv:2112.10752), section 3.3 and appendix E.2.1: LDM below.

The U-Net of networks/adm_unet.py in style "adm", with the timestep added, and with one new part:
where that has self-attention, this has a transformer. Its positions look at each other and then at
a context y, tokens that say what to draw:

    Q = W_Q x,   K = W_K y,   V = W_V y,   softmax(Q K' / sqrt(d)) V            LDM section 3.3

The context is the text, as any encoder gives it, or a single token: the embedding of a class
(LDM's network for ImageNet). A softmax over one token is 1, whatever W_Q and W_K are. The class
then adds the same vector at all positions, and W_Q and W_K learn only from longer contexts.

networks/published/sd_unet.py reads the weights that others published for this network.
"""

from runtime.commandline import BadInput

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import attention as attend
from networks.adm_unet import Norm, timestep_embedding, zero
from networks.drawing import Linear, drawing
from networks.sizes import check_attention, check_unet

TOKENS = 1024  # that a FeedForward takes at a time where it may: their hidden units fit a cache


class ResBlock(nn.Module):
    """x (B,c_in,h,w), emb (B,c_emb) after its SiLU -> (B,c_out,h,w)."""

    def __init__(self, c_in, c_out, c_emb, groups):
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.conv2 = Norm(groups, c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        # A convolution's output is needed by nothing else, its own gradient included: add in place.
        h = self.conv1(self.norm1(x)).add_(self.emb(emb)[:, :, None, None])  # (B,c_out,h,w)
        return self.conv2(self.norm2(h)).add_(self.skip(x))


class SelfAttention(nn.Module):
    """Every token of (B,N,C) looks at all tokens of its sample; the heads split the channels."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.qkv = heads, Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x):
        # Views of the projection's memory: three times (B,heads,N,C/heads).
        q, k, v = rearrange(self.qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))  # (B,N,C)


class CrossAttention(nn.Module):
    """Every token of x (B,N,C) looks at the L tokens of context (B,L,D)."""

    def __init__(self, channels, heads, context_dim):
        super().__init__()
        self.heads, self.q = heads, Linear(channels, channels, bias=False)
        self.kv = Linear(context_dim, 2 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x, context):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(context), "b l (k h d) -> k b h l d", k=2, h=self.heads)
        return self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))  # (B,N,C)


class FeedForward(nn.Module):
    """(B,N,C) -> (B,N,C) through 4C hidden units, gated: W_2 (a * gelu(b)), where (a, b) = W_1 x.

    GEGLU of Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202), eq. 6.
    """

    def __init__(self, channels):
        super().__init__()
        self.widen = Linear(channels, 8 * channels)
        self.narrow = Linear(4 * channels, channels)

    def forward(self, x):
        if drawing(x):
            parts = [self.part(tokens) for tokens in x.flatten(0, 1).split(TOKENS)]
            return torch.cat(parts).view(x.shape)
        return self.part(x)

    def part(self, x):
        a, b = self.widen(x).chunk(2, dim=-1)  # (B,N,4C) each
        return self.narrow(a * F.gelu(b))


class TransformerBlock(nn.Module):
    """Tokens x (B,N,C) and a context (B,L,D) -> (B,N,C); each part adds to x."""

    def __init__(self, channels, heads, context_dim):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(channels), SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, heads, context_dim)
        self.norm3, self.feed_forward = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x, context):
        # As above: no gradient needs what a linear layer gave.
        x = self.self_attention(self.norm1(x)).add_(x)
        x = self.cross_attention(self.norm2(x), context).add_(x)
        return self.feed_forward(self.norm3(x)).add_(x)


class Transformer(nn.Module):
    """`depth` transformer blocks over the positions of (B,C,h,w), on a residual branch."""

    def __init__(self, channels, heads, context_dim, depth, groups):
        super().__init__()
        self.norm = Norm(groups, channels, eps=1e-6, silu=False)
        self.proj_in = Linear(channels, channels)
        self.proj_out = zero(Linear(channels, channels))
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )

    def forward(self, x, context):
        # A view of channels_last memory: (B,C,h,w) -> (B,hw,C).
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """(B,C,h,w) -> (B,C,ceil(h/2),ceil(w/2)): a convolution of stride 2."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """(B,C,h,w) -> (B,C,*size): the nearest pixel, then a convolution. An odd side halves to one
    that doubles to too many, so size is that of the skip connection to come."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return super().forward(F.interpolate(x, size=size, mode="nearest"))


class Layer(nn.Sequential):
    """Parts in a row, each with what it sees. skip is joined to the channels of what comes in."""

    def forward(self, h, emb, context, skip=None, size=None):
        if skip is not None:
            h = torch.cat([h, skip], dim=1)  # (B,C+C_skip,h,w)
        for part in self:
            if isinstance(part, ResBlock):
                h = part(h, emb)
            elif isinstance(part, Transformer):
                h = part(h, context)
            else:
                h = part(h, size) if isinstance(part, Upsample) else part(h)
        return h


class LatentUNet(nn.Module):
    """net(z, t, y=None, context=None) -> (B,channels,h,w), the estimate of eps or v; with
    learn_sigma (B,2*channels,h,w).

    z (B,channels,h,w) of any sides, t (B,) timesteps from 0, and what to draw, one of
    y        (B,) int labels; net.null, which is num_classes, means "no label", and so does None
    context  (B,L,context_dim), such as an encoded text; y is then not looked at

    num_classes        None: no labels, a context must be given. 0: the only label is "none"
    model_channels     channels of the timestep embedding, and of every level with channel_mult
    channel_mult       channels of each level, in model_channels; each level but the last is halved
    num_res_blocks     residual blocks of a level on the way down; one more on the way up
    attention_levels   the levels, from 0, at which a transformer follows every residual block; one
                       always stands in the middle, so that the context is seen in any case
    num_heads          attention heads; num_head_channels > 0 gives the channels of each instead
    transformer_depth  transformer blocks in each transformer
    context_dim        channels of the context's tokens; 0 chooses 4 * model_channels
    add_label          the class token is also added, through a linear layer that starts at zero, to
                       the timestep embedding, which every residual block sees. Not in LDM
    learn_sigma        the second half of the channels gives the variance, about -1 ... 1: log
                       beta_tilde ... log beta (IDDPM eq. 15). Not in LDM
    norm_groups        of every GroupNorm; 0 chooses 32, fewer where a group would have one channel
    use_checkpoint     in training, keep only the layers' inputs and compute the rest again
    BadInput for settings that do not fit each other. net.settings holds all but the last.

    Stable Diffusion 1: channels 4, num_classes None, model_channels 320, channel_mult (1, 2, 4, 4),
    num_res_blocks 2, attention_levels (0, 1, 2), num_heads 8, context_dim 768. Stable Diffusion 2:
    num_head_channels 64, context_dim 1024. LDM's ImageNet: channels 3, num_classes 1000,
    model_channels 192, channel_mult (1, 2, 3, 5), num_res_blocks 2, attention_levels (1, 2, 3),
    num_heads 1, context_dim 512.
    """

    def __init__(
        self,
        channels,
        num_classes,
        *,
        model_channels,
        channel_mult,
        num_res_blocks,
        attention_levels,
        num_heads=8,
        num_head_channels=0,
        transformer_depth=1,
        context_dim=0,
        add_label=False,
        learn_sigma=False,
        norm_groups=0,
        use_checkpoint=False,
    ):
        super().__init__()
        levels, c_emb = [round(model_channels * m) for m in channel_mult], 4 * model_channels
        attention_levels, context_dim = tuple(attention_levels), context_dim or c_emb
        # A group of one channel would subtract from it what the timestep just added to it.
        norm_groups = norm_groups or math.gcd(32, max(1, math.gcd(*levels) // 2))
        check(model_channels, levels, attention_levels, num_heads, num_head_channels, norm_groups)
        self.model_channels, self.null = model_channels, num_classes
        self.use_checkpoint = use_checkpoint
        self.settings = dict(
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_levels=attention_levels,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            transformer_depth=transformer_depth,
            context_dim=context_dim,
            add_label=add_label,
            learn_sigma=learn_sigma,
            norm_groups=norm_groups,
        )

        def block(c_in, c_out):
            return ResBlock(c_in, c_out, c_emb, norm_groups)

        def transformer(c):
            heads = c // num_head_channels if num_head_channels else num_heads
            return Transformer(c, heads, context_dim, transformer_depth, norm_groups)

        first, second = nn.Linear(model_channels, c_emb), nn.Linear(c_emb, c_emb)
        self.time = nn.Sequential(first, nn.SiLU(), second)
        labels = num_classes is not None
        self.label = nn.Embedding(num_classes + 1, context_dim) if labels else None
        self.label_emb = zero(nn.Linear(context_dim, c_emb)) if labels and add_label else None
        c, skips = levels[0], [levels[0]]
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        for level, c_out in enumerate(levels):
            for _ in range(num_res_blocks):
                parts = [transformer(c_out)] if level in attention_levels else []
                self.down.append(Layer(block(c, c_out), *parts))
                c = c_out
                skips.append(c)
            if level < len(levels) - 1:
                self.down.append(Layer(Downsample(c)))
                skips.append(c)
        self.middle = Layer(block(c, c), transformer(c), block(c, c))
        self.up = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(levels))):
            for i in range(num_res_blocks + 1):
                parts = [transformer(c_out)] if level in attention_levels else []
                if level > 0 and i == num_res_blocks:
                    parts.append(Upsample(c_out))
                self.up.append(Layer(block(c + skips.pop(), c_out), *parts))
                c = c_out
        out = 2 * channels if learn_sigma else channels
        self.norm_out = Norm(norm_groups, c)
        self.conv_out = zero(nn.Conv2d(c, out, 3, padding=1))

    def forward(self, z, t, y=None, context=None):
        t_emb = timestep_embedding(t, self.model_channels, "adm")  # (B,model_channels)
        emb = self.time(t_emb.to(z.dtype))  # (B,4*model_channels)
        if context is None:
            if self.label is None:
                raise ValueError("a network without labels needs a context")
            if y is None:
                y = torch.full_like(t, self.null, dtype=torch.int64)
            context = self.label(y)[:, None]  # (B,1,context_dim)
            if self.label_emb is not None:
                emb = emb + self.label_emb(context[:, 0])
        emb = F.silu(emb)  # every residual block begins with it

        def run(layer, *inputs):
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                return checkpoint(layer, *inputs, use_reentrant=False)
            return layer(*inputs)

        h = self.conv_in(z)  # (B,C0,h,w)
        skips = [h]
        for layer in self.down:
            h = run(layer, h, emb, context)
            skips.append(h)
        h = run(self.middle, h, emb, context)  # (B,C_last,h/2^k,w/2^k), k = len(channel_mult) - 1
        for layer in self.up:
            skip = skips.pop()
            size = skips[-1].shape[2:] if skips else None
            h = run(layer, h, emb, context, skip, size)
        return self.conv_out(self.norm_out(h))  # (B,channels,h,w) or (B,2*channels,h,w)


class AttentionMaps:
    """Where the first image of a batch looks at which token, while a LatentUNet runs.

    The softmax of every cross-attention, over all heads, layers and steps (Tang et al., "What the
    DAAM", 2022, arXiv:2210.04885). size: (h,w) of the latent.
    """

    def __init__(self, unet, size):
        self.size, self.sides, self.total = size, {}, 0
        while math.prod(size) not in self.sides:  # {h*w: (h,w)} of all levels, until one position
            self.sides[math.prod(size)] = size
            size = (-(-size[0] // 2), -(-size[1] // 2))
        layers = [part for part in unet.modules() if isinstance(part, CrossAttention)]
        self.hooks = [layer.register_forward_hook(self.see) for layer in layers]

    def see(self, layer, inputs, _):
        x, context = (part[:1] for part in inputs)  # (1,N,C), (1,L,D)
        q = rearrange(layer.q(x), "1 n (h d) -> h n d", h=layer.heads).float()
        k = rearrange(layer.kv(context), "1 l (k h d) -> k h l d", k=2, h=layer.heads)[0].float()
        p = (q @ k.mT / math.sqrt(q.shape[2])).softmax(-1).mean(0)  # (N,L), as in CrossAttention
        maps = p.T.unflatten(1, self.sides[len(p)])[None]  # (1,L,h,w) of this level
        self.total = self.total + F.interpolate(maps, self.size, mode="bilinear")[0]

    def of(self, groups):
        """(K,h,w) in 0..1 of K lists of tokens' places in the context; after this nobody looks."""
        for hook in self.hooks:
            hook.remove()
        means = torch.stack([self.total[tokens].mean(0) for tokens in groups])
        return means / means.amax((1, 2), keepdim=True)


def check(model_channels, levels, attention_levels, num_heads, num_head_channels, norm_groups):
    """BadInput for levels with these channels, heads or groups that make no network."""
    if any(level not in range(len(levels)) for level in attention_levels):
        raise BadInput(
            f"attention at {', '.join(map(str, attention_levels))} must be at levels of "
            f"--channel-mult, counted from 0 to {len(levels) - 1}"
        )
    # The middle always attends, at the last level's channels. Any sides of latents will do.
    attends = [levels[level] for level in (*attention_levels, -1)]
    check_unet((0, 0, 0), model_channels, attends, num_heads, num_head_channels)
    if any(c % norm_groups for c in levels):
        raise BadInput(
            f"{norm_groups} norm groups must divide the channels {sorted(set(levels))}: "
            "norm_groups=0 has them chosen"
        )


def denoiser(cfg, z_shape, num_classes):
    """The LatentUNet that the settings of a chapter describe, for latents z_shape (C,h,w).

    cfg.attention_resolutions are heights of the latent, which halves rounding up. cfg.model
    "sd-label" adds the class token to the timestep embedding, too.
    """
    check_attention(cfg.attention_resolutions, z_shape[1], len(cfg.channel_mult))
    heights = [z_shape[1]]
    for _ in cfg.channel_mult[1:]:
        heights.append(-(-heights[-1] // 2))
    levels = [i for i, height in enumerate(heights) if height in cfg.attention_resolutions]
    net = LatentUNet(
        z_shape[0],
        num_classes,
        model_channels=cfg.model_channels,
        channel_mult=cfg.channel_mult,
        num_res_blocks=cfg.num_res_blocks,
        attention_levels=levels,
        num_heads=cfg.num_heads,
        context_dim=cfg.context_dim,
        add_label=cfg.model == "sd-label",
        use_checkpoint=cfg.use_checkpoint,
    )
    return net.to(memory_format=torch.channels_last)
