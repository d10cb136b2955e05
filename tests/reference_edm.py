"""DDPM++ once more, by the names in NVIDIA's files and without the project's network.

`published` lists the tensors as the constructor of their SongUNet makes them; `forward` computes
what it computes, with plain operations in any precision.
"""

import math

import torch
import torch.nn.functional as F


def published(
    res,
    classes,
    augment_dim,
    model_channels=128,
    channel_mult=(2, 2, 2),
    num_blocks=4,
    attention=(16,),
):
    """{name: shape} in their order, for images of res = (H, W), without resampling filters."""
    shapes, emb = {}, 4 * model_channels

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, c_in, c, skip=False, attend=False):
        layer(f"{name}.norm0", c_in)
        layer(f"{name}.conv0", c, c_in, 3, 3)
        layer(f"{name}.affine", c, emb)
        layer(f"{name}.norm1", c)
        layer(f"{name}.conv1", c, c, 3, 3)
        if skip or c_in != c:
            layer(f"{name}.skip", c, c_in, 1, 1)
        if attend:
            layer(f"{name}.norm2", c)
            layer(f"{name}.qkv", 3 * c, c, 1, 1)
            layer(f"{name}.proj", c, c, 1, 1)
        return c

    if classes:
        layer("map_label", model_channels, classes)
    if augment_dim:
        shapes["map_augment.weight"] = model_channels, augment_dim
    layer("map_layer0", emb, model_channels)
    layer("map_layer1", emb, emb)
    at = [f"{res[0] >> i}x{res[1] >> i}" for i in range(len(channel_mult))]
    attends = [res[0] >> i in attention for i in range(len(channel_mult))]
    c, kept = model_channels, []
    for i, m in enumerate(channel_mult):
        if i == 0:
            layer(f"enc.{at[i]}_conv", c, 3, 3, 3)
        else:
            block(f"enc.{at[i]}_down", c, c, skip=True)
        kept.append(c)
        for j in range(num_blocks):
            c = block(f"enc.{at[i]}_block{j}", c, m * model_channels, attend=attends[i])
            kept.append(c)
    block(f"dec.{at[-1]}_in0", c, c, attend=True)
    block(f"dec.{at[-1]}_in1", c, c)
    for i, m in reversed(list(enumerate(channel_mult))):
        if i < len(channel_mult) - 1:
            block(f"dec.{at[i]}_up", c, c, skip=True)
        for j in range(num_blocks + 1):
            last = j == num_blocks and attends[i]
            c = block(f"dec.{at[i]}_block{j}", c + kept.pop(), m * model_channels, attend=last)
    layer(f"dec.{at[0]}_aux_norm", c)
    layer(f"dec.{at[0]}_aux_conv", 3, c, 3, 3)
    return shapes


def parts(w, prefix):
    """Names of the parts of the encoder or decoder, in order."""
    return list(dict.fromkeys(".".join(k.split(".")[:2]) for k in w if k.startswith(prefix)))


def embedding(c_noise, channels):
    """Sines, then cosines of c_noise (B,) at the published frequencies, in float32 as there."""
    half = channels // 2
    i = torch.arange(half, dtype=torch.float32)
    angles = c_noise.float()[:, None] * torch.exp(-math.log(10000) * i / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def forward(w, x, c_noise, one_hot=None, augment=None):
    """SongUNet's output for weights w of x's dtype; one_hot (B,classes), zeros for "no label"."""

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def conv(name, h):
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[2] // 2)

    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        g = h.reshape(len(h), groups, -1)
        variance, mean = torch.var_mean(g, dim=2, keepdim=True, correction=0)
        g = ((g - mean) / (variance + 1e-6).sqrt()).reshape(h.shape)
        return g * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def silu(h):
        return h / (1 + (-h).exp())

    def resize(name, h):
        if name.endswith("_down"):
            rows = h[..., ::2, :] + h[..., 1::2, :]
            return (rows[..., ::2] + rows[..., 1::2]) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if name.endswith("_up") else h

    def attend(name, h):
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).flatten(2)
        q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]  # (B,C,HW)
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(q.shape[1])).softmax(dim=2)
        return conv(f"{name}.proj", torch.einsum("bqk,bck->bcq", weights, v).view(h.shape))

    def block(name, h):
        a = conv(f"{name}.conv0", resize(name, silu(norm(f"{name}.norm0", h))))
        a = silu(norm(f"{name}.norm1", a + linear(f"{name}.affine", emb)[:, :, None, None]))
        a, h = conv(f"{name}.conv1", a), resize(name, h)
        h = conv(f"{name}.skip", h) if f"{name}.skip.weight" in w else h
        h = (a + h) / math.sqrt(2)
        return (h + attend(name, h)) / math.sqrt(2) if f"{name}.qkv.weight" in w else h

    emb = embedding(c_noise, w["map_layer0.weight"].shape[1]).to(x.dtype)
    if "map_label.weight" in w:
        emb = emb + linear("map_label", one_hot * math.sqrt(one_hot.shape[1]))
    if augment is not None:
        emb = emb + linear("map_augment", augment)
    emb = silu(linear("map_layer1", silu(linear("map_layer0", emb))))

    first, *down = parts(w, "enc.")
    *up, norm_out, conv_out = parts(w, "dec.")
    h = conv(first, x)
    kept = [h]
    for name in down:
        h = block(name, h)
        kept.append(h)
    for name in up:
        h = block(name, torch.cat([h, kept.pop()], dim=1) if "_block" in name else h)
    return conv(conv_out, silu(norm(norm_out, h)))


def spread(shapes, dtype=torch.float64):
    """Weights of these shapes by a formula, about as large as those of a trained network."""
    weights = {}
    for n, (name, shape) in enumerate(shapes.items()):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        scale = 1.7 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values = centre + scale * torch.sin(i * 12.9898 + n * 78.233)
        weights[name] = values.reshape(shape).to(dtype)
    return weights
