"""Autoencoders of latent diffusion as formulas over named weights, for comparison: no modules."""

import torch
import torch.nn.functional as F


def randomise(net, seed=0):
    """Every parameter away from its start: unit norms and zero biases would hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * spread + (0.5 if p.ndim == 1 else 0))
    return net.eval()


def conv(state, name, x, **options):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def norm(state, name, x, groups, eps=1e-6):
    """GroupNorm, spelled out."""
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(2, keepdim=True)
    x = (parts / (parts.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def swish(x):
    return x / (1 + (-x).exp())


def residual(state, name, x, groups):
    h = conv(state, f"{name}.conv1", swish(norm(state, f"{name}.norm1", x, groups)), padding=1)
    h = conv(state, f"{name}.conv2", swish(norm(state, f"{name}.norm2", h, groups)), padding=1)
    shortcut = f"{name}.nin_shortcut"
    return h + (conv(state, shortcut, x) if f"{shortcut}.weight" in state else x)


def attend(state, name, x, groups):
    h = norm(state, f"{name}.norm", x, groups)
    q, k, v = (conv(state, f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B,C,HW)
    scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
    weights = scores.exp() / scores.exp().sum(2, keepdim=True)
    out = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + conv(state, f"{name}.proj_out", out)


def middle(state, half, h, groups):
    h = residual(state, f"{half}.mid.block_1", h, groups)
    h = attend(state, f"{half}.mid.attn_1", h, groups)
    return residual(state, f"{half}.mid.block_2", h, groups)


def blocks(state, level):
    """Names of the residual blocks of a level."""
    count = 0
    while f"{level}.block.{count}.conv1.weight" in state:
        count += 1
    return [f"{level}.block.{i}" for i in range(count)]


def ldm_encode(state, x, groups):
    """(mean, log variance) of LDM's encoder, from its names."""
    h, level = conv(state, "encoder.conv_in", x, padding=1), 0
    while names := blocks(state, f"encoder.down.{level}"):
        for name in names:
            h = residual(state, name, h, groups)
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            wide = h.new_zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1)
            wide[..., :-1, :-1] = h
            h = conv(state, f"encoder.down.{level}.downsample.conv", wide, stride=2)
        level += 1
    h = swish(norm(state, "encoder.norm_out", middle(state, "encoder", h, groups), groups))
    h = conv(state, "encoder.conv_out", h, padding=1)
    h = conv(state, "quant_conv", h) if "quant_conv.weight" in state else h
    return tuple(h.tensor_split(2, dim=1))


def ldm_decode(state, z, groups):
    """The image of LDM's decoder."""
    z = conv(state, "post_quant_conv", z) if "post_quant_conv.weight" in state else z
    h = middle(state, "decoder", conv(state, "decoder.conv_in", z, padding=1), groups)
    level = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up."))
    while level >= 0:
        for name in blocks(state, f"decoder.up.{level}"):
            h = residual(state, name, h, groups)
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(state, f"decoder.up.{level}.upsample.conv", h, padding=1)
        level -= 1
    h = swish(norm(state, "decoder.norm_out", h, groups))
    return conv(state, "decoder.conv_out", h, padding=1)


def tiny_block(state, name, x):
    if f"{name}.pool.0.weight" in state:
        h = norm(state, f"{name}.pool.1", conv(state, f"{name}.pool.0", x), 4, eps=1e-5)
        x = x + conv(state, f"{name}.pool.3", h.clamp(min=0))
    h = x
    for i in (0, 2, 4):
        h = conv(state, f"{name}.conv.{i}", h.clamp(min=0) if i else h, padding=1)
    return (x + h).clamp(min=0)


def taesd_encode(state, x):
    """Latents of TAESD's encoder; its convolutions without a bias halve."""
    h, i = (x + 1) / 2, 0
    while True:
        name = f"encoder.{i}"
        if f"{name}.conv.0.weight" in state:
            h = tiny_block(state, name, h)
        elif f"{name}.weight" in state:
            h = conv(state, name, h, padding=1, stride=1 if f"{name}.bias" in state else 2)
        else:
            return h
        i += 1


def taesd_decode(state, z):
    """The image of TAESD's decoder; its convolutions without a bias follow a doubling."""
    h = conv(state, "decoder.1", (z / 3).tanh() * 3, padding=1).clamp(min=0)
    last = max(int(name.split(".")[1]) for name in state if name.startswith("decoder."))
    for i in range(3, last + 1):
        name = f"decoder.{i}"
        if f"{name}.conv.0.weight" in state:
            h = tiny_block(state, name, h)
        elif f"{name}.weight" in state:
            if f"{name}.bias" not in state:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(state, name, h, padding=1)
    return h * 2 - 1
