"""A diffusion transformer from its definition, and small ones to compare with it."""

import math

import torch

import dit

SMALL = dict(hidden_size=32, depth=2, num_heads=2)
SHAPE = (4, 8, 8)


def opened(shape=SHAPE, classes=5, **settings):
    """A small DiT without a zero among its weights: zeros would hide what lies behind them."""
    torch.manual_seed(0)
    net = dit.DiT(shape, classes, **{**SMALL, **settings})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def batch(shape=SHAPE, n=4):
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return z, torch.tensor([0, 10, 999, 4])[:n], torch.tensor([0, 4, 5, 2])[:n]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def by_definition(state, heads, z, t, y, patch):
    """The published network in float64, straight from the weights' published names: no module."""
    s = {name: value.double() for name, value in state.items()}
    (b, _, h, w), d = z.shape, s["pos_embed"].shape[2]

    def affine(x, name):
        return torch.einsum("...i,oi->...o", x, s[f"{name}.weight"]) + s[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x, shift, scale):
        x = x - x.mean(2, keepdim=True)
        x = x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    i = torch.arange(128, dtype=torch.float64)
    angles = t[:, None] * 10000 ** (-i / 128)
    c = affine(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")
    c = affine(silu(c), "t_embedder.mlp.2") + s["y_embedder.embedding_table.weight"][y]

    tokens = []
    for row in range(0, h, patch):
        for column in range(0, w, patch):
            cut = z[:, :, row : row + patch, column : column + patch].double()
            kernel = s["x_embedder.proj.weight"]
            tokens.append(torch.einsum("bcij,ocij->bo", cut, kernel) + s["x_embedder.proj.bias"])
    x = torch.stack(tokens, 1) + s["pos_embed"]

    for n in range(sum(name.endswith("attn.qkv.weight") for name in s)):
        parts = affine(silu(c), f"blocks.{n}.adaLN_modulation.1").split(d, 1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        q, k, v = affine(norm(x, shift_1, scale_1), f"blocks.{n}.attn.qkv").split(d, 2)
        out, size = [], d // heads
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = torch.einsum("bnd,bmd->bnm", q[..., own], k[..., own]) / math.sqrt(size)
            out.append(scores.softmax(2) @ v[..., own])
        x = x + gate_1[:, None] * affine(torch.cat(out, 2), f"blocks.{n}.attn.proj")
        hidden = gelu(affine(norm(x, shift_2, scale_2), f"blocks.{n}.mlp.fc1"))
        x = x + gate_2[:, None] * affine(hidden, f"blocks.{n}.mlp.fc2")

    shift, scale = affine(silu(c), "final_layer.adaLN_modulation.1").split(d, 1)
    x = affine(norm(x, shift, scale), "final_layer.linear")
    out = torch.empty(b, x.shape[2] // patch**2, h, w, dtype=torch.float64)
    for n in range(x.shape[1]):
        row, column = n // (w // patch) * patch, n % (w // patch) * patch
        pixels = x[:, n].view(b, patch, patch, -1).permute(0, 3, 1, 2)
        out[:, :, row : row + patch, column : column + patch] = pixels
    return out
