"""OpenAI's UNetModel once more, by the names in its .pt files and without the project's network.

`published` lists the tensors as the constructors of improved-diffusion and guided-diffusion make
them; `forward` computes what they compute, in float64.
"""

import math

import torch
import torch.nn.functional as F


def published(
    model_channels,
    channel_mult,
    num_res_blocks,
    attention,
    *,
    classes=0,
    resblock_updown=False,
    use_scale_shift_norm=True,
    out=6,
):
    """{name: shape} of UNetModel; attention: the factors of downsampling that attend."""
    shapes, emb = {}, 4 * model_channels

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, c_in, c):
        layer(f"{name}.in_layers.0", c_in)
        layer(f"{name}.in_layers.2", c, c_in, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * c if use_scale_shift_norm else c, emb)
        layer(f"{name}.out_layers.0", c)
        layer(f"{name}.out_layers.3", c, c, 3, 3)
        if c_in != c:
            layer(f"{name}.skip_connection", c, c_in, 1, 1)

    def attend(name, c):
        layer(f"{name}.norm", c)
        layer(f"{name}.qkv", 3 * c, c, 1)
        layer(f"{name}.proj_out", c, c, 1)

    layer("time_embed.0", emb, model_channels)
    layer("time_embed.2", emb, emb)
    if classes:
        shapes["label_emb.weight"] = (classes, emb)
    c = int(channel_mult[0] * model_channels)
    layer("input_blocks.0.0", c, 3, 3, 3)
    chans, n, ds = [c], 1, 1
    for level, m in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            block(f"input_blocks.{n}.0", c, int(m * model_channels))
            c = int(m * model_channels)
            if ds in attention:
                attend(f"input_blocks.{n}.1", c)
            chans.append(c)
            n += 1
        if level < len(channel_mult) - 1:
            if resblock_updown:
                block(f"input_blocks.{n}.0", c, c)
            else:
                layer(f"input_blocks.{n}.0.op", c, c, 3, 3)
            chans.append(c)
            n, ds = n + 1, ds * 2
    block("middle_block.0", c, c)
    attend("middle_block.1", c)
    block("middle_block.2", c, c)
    n = 0
    for level, m in reversed(list(enumerate(channel_mult))):
        for i in range(num_res_blocks + 1):
            block(f"output_blocks.{n}.0", c + chans.pop(), int(m * model_channels))
            c, j = int(m * model_channels), 1
            if ds in attention:
                attend(f"output_blocks.{n}.1", c)
                j = 2
            if level and i == num_res_blocks:
                if resblock_updown:
                    block(f"output_blocks.{n}.{j}", c, c)
                else:
                    layer(f"output_blocks.{n}.{j}.conv", c, c, 3, 3)
                ds //= 2
            n += 1
    layer("out.0", c)
    layer("out.2", out, c, 3, 3)
    return shapes


def doubles(name, w):
    """Whether a tensor of output_blocks belongs to the part that doubles the image."""
    return name.split(".")[2] != "0" and (".conv.bias" in name or ".in_layers.0.bias" in name)


def forward(w, x, t, y, heads_of, new_order):
    """UNetModel on float64 weights w; heads_of(channels) -> heads. No part of the project."""

    def norm(name, h):
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def conv(name, h, **options):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h):
        return h * h.sigmoid()

    def resize(h, how):
        if how == "down":
            return (h[..., ::2, :] + h[..., 1::2, :]).unfold(3, 2, 2).sum(-1) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if how == "up" else h

    def block(name, h, how):
        a = conv(
            f"{name}.in_layers.2", resize(silu(norm(f"{name}.in_layers.0", h)), how), padding=1
        )
        e, channels = linear(f"{name}.emb_layers.1", silu(emb))[:, :, None, None], a.shape[1]
        if e.shape[1] == 2 * channels:
            a = norm(f"{name}.out_layers.0", a) * (1 + e[:, :channels]) + e[:, channels:]
        else:
            a = norm(f"{name}.out_layers.0", a + e)
        a, h = conv(f"{name}.out_layers.3", silu(a), padding=1), resize(h, how)
        return a + (
            conv(f"{name}.skip_connection", h) if f"{name}.skip_connection.bias" in w else h
        )

    def attend(name, h):
        n, c, tokens = heads_of(h.shape[1]), h.shape[1], norm(f"{name}.norm", h).flatten(2)
        qkv = w[f"{name}.qkv.weight"][..., 0] @ tokens + w[f"{name}.qkv.bias"][:, None]
        # The channels of head i: a third of its own part, or a part of each third.
        per, out = c // n, []
        for i in range(n):
            starts = [k * c + i * per if new_order else (3 * i + k) * per for k in range(3)]
            q, k, v = (qkv[:, s : s + per] for s in starts)  # (B,per,HW)
            out.append(v @ (q.transpose(1, 2) @ k / per**0.5).softmax(-1).transpose(1, 2))
        out = w[f"{name}.proj_out.weight"][..., 0] @ torch.cat(out, 1)
        return h + (out + w[f"{name}.proj_out.bias"][:, None]).view(h.shape)

    def run(name, h, how):
        """how: what a residual block does that is not the first of its layer, or is alone."""
        for j in range(3):
            at = f"{name}.{j}"
            if f"{at}.in_layers.0.bias" in w:
                h = block(at, h, how if j or how == "down" else "")
            elif f"{at}.qkv.bias" in w:
                h = attend(at, h)
            elif f"{at}.op.bias" in w:
                h = conv(f"{at}.op", h, stride=2, padding=1)
            elif f"{at}.conv.bias" in w:
                h = conv(f"{at}.conv", resize(h, "up"), padding=1)
        return h

    half = w["time_embed.0.weight"].shape[1] // 2
    # Phases in float32 and in the published order, which at t = 1000 counts; all else in float64.
    i = torch.arange(half, dtype=torch.float32)
    phase = t.float()[:, None] * torch.exp(-math.log(10000) * i / half)
    emb = torch.cat([phase.cos(), phase.sin()], 1).double()
    emb = linear("time_embed.2", silu(linear("time_embed.0", emb)))
    emb = emb if y is None else emb + w["label_emb.weight"][y]

    total = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("input_blocks"))
    outputs = [name for name in w if name.startswith("output_blocks")]
    per_level = min(int(name.split(".")[1]) for name in outputs if doubles(name, w)) + 1
    h = conv("input_blocks.0.0", x, padding=1)
    hs = [h]
    for n in range(1, total):
        h = run(f"input_blocks.{n}", h, "" if n % per_level else "down")
        hs.append(h)
    for j in (0, 2):
        h = block(f"middle_block.{j}", h, "")
        h = attend("middle_block.1", h) if j == 0 else h
    for n in range(total):
        h = run(f"output_blocks.{n}", torch.cat([h, hs.pop()], 1), "up")
    return conv("out.2", silu(norm("out.0", h)), padding=1)
