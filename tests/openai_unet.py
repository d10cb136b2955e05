"""OpenAI's networks once more, by the names in their .pt files and without the project's networks.

`published` lists the tensors as the constructors of improved-diffusion and guided-diffusion make
them, UNetModel's or EncoderUNetModel's; `forward` and `classify` compute what they compute, in
float64.
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
    pool=0,
):
    """{name: shape} of UNetModel; attention: the factors of downsampling that attend.

    With pool, of EncoderUNetModel instead, with attention pooling of pool x pool positions; out
    counts its classes.
    """
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
    if pool:
        layer("out.0", c)
        shapes["out.2.positional_embedding"] = (c, pool**2 + 1)
        layer("out.2.qkv_proj", 3 * c, c, 1)
        layer("out.2.c_proj", out, c, 1)
        return shapes
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


def weights(shapes, seed=0):
    """Random float32 weights {name: tensor}, none of them at a value that would hide a mistake."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value *= 0.7 * math.prod(shape[1:]) ** -0.5
        else:
            value = 0.3 * value + (name.endswith("weight"))
        state[name] = value
    return state


def doubles(name, w):
    """Whether a tensor of output_blocks belongs to the part that doubles the image."""
    return name.split(".")[2] != "0" and (".conv.bias" in name or ".in_layers.0.bias" in name)


class Parts:
    """The parts of a network on float64 weights w at timesteps t. No part of the project.

    heads_of(channels) -> heads of the attention blocks; new_order: of their channels.
    """

    def __init__(self, w, t, heads_of, new_order):
        self.w, self.heads_of, self.new_order = w, heads_of, new_order
        half = w["time_embed.0.weight"].shape[1] // 2
        # Phases in float32 and in the published order, which at t = 1000 counts; all else in
        # float64.
        i = torch.arange(half, dtype=torch.float32)
        phase = t.float()[:, None] * torch.exp(-math.log(10000) * i / half)
        emb = torch.cat([phase.cos(), phase.sin()], 1).double()
        self.emb = self.linear("time_embed.2", self.silu(self.linear("time_embed.0", emb)))

    def norm(self, name, h):
        return F.group_norm(h, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def conv(self, name, h, **options):
        return F.conv2d(h, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def linear(self, name, h):
        return h @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def pointwise(self, name, h):
        """(B,C_in,N) -> (B,C_out,N)."""
        return self.w[f"{name}.weight"][..., 0] @ h + self.w[f"{name}.bias"][:, None]

    def silu(self, h):
        return h * h.sigmoid()

    def resize(self, h, how):
        if how == "down":
            return (h[..., ::2, :] + h[..., 1::2, :]).unfold(3, 2, 2).sum(-1) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if how == "up" else h

    def block(self, name, h, how):
        a = self.resize(self.silu(self.norm(f"{name}.in_layers.0", h)), how)
        a = self.conv(f"{name}.in_layers.2", a, padding=1)
        e = self.linear(f"{name}.emb_layers.1", self.silu(self.emb))[:, :, None, None]
        channels = a.shape[1]
        if e.shape[1] == 2 * channels:
            a = self.norm(f"{name}.out_layers.0", a) * (1 + e[:, :channels]) + e[:, channels:]
        else:
            a = self.norm(f"{name}.out_layers.0", a + e)
        a, h = self.conv(f"{name}.out_layers.3", self.silu(a), padding=1), self.resize(h, how)
        skip = f"{name}.skip_connection"
        return a + (self.conv(skip, h) if f"{skip}.bias" in self.w else h)

    def attention(self, qkv, n, new_order):
        """(B,3C,N) -> (B,C,N), every position attending to all in n heads."""
        c, out = qkv.shape[1] // 3, []
        per = c // n
        # The channels of head i: a third of its own part, or a part of each third.
        for i in range(n):
            starts = [k * c + i * per if new_order else (3 * i + k) * per for k in range(3)]
            q, k, v = (qkv[:, s : s + per] for s in starts)  # (B,per,N)
            out.append(v @ (q.transpose(1, 2) @ k / per**0.5).softmax(-1).transpose(1, 2))
        return torch.cat(out, 1)

    def attend(self, name, h):
        qkv = self.pointwise(f"{name}.qkv", self.norm(f"{name}.norm", h).flatten(2))
        out = self.attention(qkv, self.heads_of(h.shape[1]), self.new_order)
        return h + self.pointwise(f"{name}.proj_out", out).view(h.shape)

    def run(self, name, h, how):
        """how: what a residual block does that is not the first of its layer, or is alone."""
        for j in range(3):
            at = f"{name}.{j}"
            if f"{at}.in_layers.0.bias" in self.w:
                h = self.block(at, h, how if j or how == "down" else "")
            elif f"{at}.qkv.bias" in self.w:
                h = self.attend(at, h)
            elif f"{at}.op.bias" in self.w:
                h = self.conv(f"{at}.op", h, stride=2, padding=1)
            elif f"{at}.conv.bias" in self.w:
                h = self.conv(f"{at}.conv", self.resize(h, "up"), padding=1)
        return h

    def down(self, x, per_level):
        """What the image and each input block gives, and the middle gives last."""
        total = len({name.split(".")[1] for name in self.w if name.startswith("input_blocks")})
        hs = [self.conv("input_blocks.0.0", x, padding=1)]
        for n in range(1, total):
            hs.append(self.run(f"input_blocks.{n}", hs[-1], "" if n % per_level else "down"))
        h = self.attend("middle_block.1", self.block("middle_block.0", hs[-1], ""))
        return [*hs, self.block("middle_block.2", h, "")]


def forward(w, x, t, y, heads_of, new_order):
    """UNetModel on float64 weights w; heads_of(channels) -> heads."""
    net = Parts(w, t, heads_of, new_order)
    if y is not None:
        net.emb = net.emb + w["label_emb.weight"][y]
    outputs = [name for name in w if name.startswith("output_blocks")]
    per_level = min(int(name.split(".")[1]) for name in outputs if doubles(name, w)) + 1
    *hs, h = net.down(x, per_level)
    for n in range(len(hs)):
        h = net.run(f"output_blocks.{n}", torch.cat([h, hs.pop()], 1), "up")
    return net.conv("out.2", net.silu(net.norm("out.0", h)), padding=1)


def classify(w, x, t, blocks, new_order=False):
    """EncoderUNetModel on float64 weights w: logits (B,K). blocks: residual blocks of a level."""
    net = Parts(w, t, lambda channels: channels // 64, new_order)
    h = net.down(x, blocks + 1)[-1]
    h = net.silu(net.norm("out.0", h)).flatten(2)  # (B,C,HW)
    h = torch.cat([h.mean(2, keepdim=True), h], 2) + w["out.2.positional_embedding"]
    qkv = net.pointwise("out.2.qkv_proj", h)
    out = net.attention(qkv, h.shape[1] // 64, new_order=True)
    return net.pointwise("out.2.c_proj", out)[:, :, 0]
