"""Each operation of kernels/ at the shapes where the chapters use it: what tests and bench look at.

A case knows its inputs, laid out as the chapters lay them out, and what can be done with them:

    run(inputs)        the operation itself, as the chapters call it
    reference(inputs)  the PyTorch code beside its kernel; on float64 inputs it says what is right
    plain(inputs)      PyTorch's own operations, as one would write them without this project
    launch(inputs, backward)  nothing but the kernels, for instruments that need no GPU

The first three take a dict of tensors and return a tuple of tensors.
"""

import dataclasses
import functools
import importlib

import torch
import torch.nn.functional as F

from kernels import attention, group_norm_silu, philox, sampling_update
from tests.cases.rows import make_rows, rounded

# The package exports functions under the names of these modules; the launches are in the modules.
NORM, ATTENTION, UPDATE = (
    importlib.import_module(f"kernels.{name}")
    for name in ("group_norm_silu", "attention", "sampling_update")
)


def forget_launches():
    """Whatever launches the operations remember: the next ones are planned anew."""
    for module in (NORM, ATTENTION, UPDATE, philox):
        module._remembered.clear()


SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def normal(shape, dtype, device):
    """The numbers that inputs are made of, unless a caller of `inputs` has others."""
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


def size(*tensors):
    """Bytes of the tensors' elements; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Case:
    """What is common to the cases. A case has `where` it is used, a `name`, and a `batch`."""

    operation = ""
    directions = (False, True)  # backward?
    sums = ()  # inputs whose gradient sums over the positions of all samples
    slack = 0.0  # error that is allowed beyond the operation's bound

    @property
    def independent(self):
        """How many parts of the inputs are worked on alike and apart: samples, or their heads."""
        return self.batch

    @property
    def counted(self):
        """The case whose bytes are counted in place of this one's."""
        return self

    def has_kernel(self, backward, arch=80):
        """Whether a GPU of this architecture (90 for sm_90) has kernels for it."""
        return True

    def flops(self, backward):
        """Floating point operations of matrix products; None where bytes are what it costs."""
        return None

    def sensitivity(self, inputs, dy):
        """{input: how far its gradient moves where what cancels on the way is rounded, over the
        rounding's relative error}. Of float64 inputs, and only what an element's size hides."""
        return {}


@dataclasses.dataclass(frozen=True)
class GroupNorm(Case):
    """Group norm and SiLU over (batch, channels, side, side), with AdaGN's scale and shift or not.

    As under autocast: x, scale and shift have `dtype`, weight and bias are fp32, x is
    channels_last. scale and shift are the halves of one projection.
    """

    where: str
    batch: int
    channels: int
    side: int
    adagn: bool = False
    dtype: torch.dtype = torch.bfloat16
    groups: int = 32
    operation = "group_norm"
    sums = ("weight", "bias", "scale", "shift")
    silu = True

    def has_kernel(self, backward, arch=80):
        return arch >= 80 or self.dtype != torch.bfloat16

    @property
    def counted(self):
        """Where samples are large, a quarter of the groups in four times the samples: as many
        tiles, and the same ones, but a sample of them is counted in a quarter of the time."""
        if self.channels * self.side**2 <= 2**20:
            return self
        quarter = {"channels": self.channels // 4, "groups": self.groups // 4}
        return dataclasses.replace(self, batch=4 * self.batch, **quarter)

    @property
    def name(self):
        adagn = " AdaGN" if self.adagn else ""
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}{adagn} {SHORT[self.dtype]}"

    def inputs(self, device, make=normal):
        shape = (self.batch, self.side, self.side, self.channels)
        tensors = {
            "x": make(shape, self.dtype, device).permute(0, 3, 1, 2),
            "weight": make((self.channels,), torch.float32, device),
            "bias": make((self.channels,), torch.float32, device),
        }
        if self.adagn:
            both = make((self.batch, 2 * self.channels), self.dtype, device)
            tensors["scale"], tensors["shift"] = both.chunk(2, dim=1)
        return tensors

    def run(self, inputs):
        return (group_norm_silu(groups=self.groups, silu=self.silu, **inputs),)

    def reference(self, inputs):
        scale, shift = inputs.get("scale"), inputs.get("shift")
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        return (NORM._reference(x, self.groups, weight, bias, 1e-5, scale, shift, self.silu),)

    def plain(self, inputs):
        x = inputs["x"]
        y = F.group_norm(x, self.groups, inputs["weight"].to(x.dtype), inputs["bias"].to(x.dtype))
        if self.adagn:
            y = y * (1 + inputs["scale"])[:, :, None, None] + inputs["shift"][:, :, None, None]
        return (F.silu(y) if self.silu else y,)

    def launch(self, inputs, backward):
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        scale, shift = inputs.get("scale"), inputs.get("shift")
        if not backward:
            NORM._forward(x, weight, bias, scale, shift, self.groups, 1e-5, self.silu)
            return
        statistics = torch.zeros(self.batch, self.groups, 2)
        dy = torch.zeros_like(x)
        NORM._backward(dy, x, weight, bias, scale, shift, statistics, self.groups, self.silu)

    def sensitivity(self, inputs, dy):
        """Of dx = rstd · (A dy silu'(z) - its means) with z = xhat · A + B.

        Where AdaGN makes A = weight · (1 + scale) and B large, they may cancel in z, whose error is
        then that of large numbers; silu' turns it into one of dx, times A again. All ways to
        compute in fp32 round A, B and xhat: at 8x160x15x15 the error of PyTorch's own on a CPU is
        0.6 to 1.15 times what verify.py allows for without this.
        """
        if not self.silu:
            return {}
        x, places = inputs["x"].flatten(2), (..., None)
        gain = 1 + inputs["scale"] if self.adagn else torch.ones_like(x[..., 0])
        shift = inputs["shift"] if self.adagn else torch.zeros_like(gain)
        A, B = (inputs["weight"] * gain)[places], (inputs["bias"] * gain + shift)[places]
        large = ((inputs["bias"] * gain).abs() + shift.abs())[places]  # what B is the sum of
        runs = x.reshape(len(x), self.groups, -1)
        rstd = (runs.var(2, correction=0) + 1e-5).rsqrt()[places]
        xhat = ((runs - runs.mean(2)[places]) * rstd).view(x.shape)
        rstd = rstd.repeat_interleave(self.channels // self.groups, 1)
        z = xhat * A + B
        s = z.sigmoid()
        slope, bend = s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))  # silu', silu''
        moved = slope.abs() + bend.abs() * ((xhat * A).abs() + large)
        return {"x": ((rstd * A).abs() * moved).view(dy.shape) * dy.abs()}

    def floor(self, inputs, backward):
        """Bytes if every input is read once and every output written once."""
        x, statistics = size(inputs["x"]), 2 * 4 * self.batch * self.groups
        parameters = size(*inputs.values()) - x
        if not backward:
            return 2 * x + parameters + statistics
        return 3 * x + parameters + statistics + 2 * 4 * self.batch * self.channels


@dataclasses.dataclass(frozen=True)
class Volume(GroupNorm):
    """The same over (batch, channels, frames, side, width), contiguous, as video models have it."""

    frames: int = 1
    width: int = 1

    @property
    def shape(self):
        return self.batch, self.channels, self.frames, self.side, self.width

    @property
    def counted(self):
        """Two groups of 64 rows of one frame: large enough for two passes, too."""
        small = {"channels": 2 * self.channels // self.groups, "groups": 2, "frames": 1}
        return dataclasses.replace(self, **small, side=min(self.side, 64))

    @property
    def name(self):
        return f"{'x'.join(map(str, self.shape))} {SHORT[self.dtype]}"

    def inputs(self, device, make=normal):
        parameters = (make((self.channels,), torch.float32, device) for _ in range(2))
        tensors = {"x": make(self.shape, self.dtype, device)}
        return tensors | dict(zip(("weight", "bias"), parameters, strict=True))


@dataclasses.dataclass(frozen=True)
class Attention(Case):
    """Self-attention of `heads` heads of `dim` channels over `tokens` tokens.

    q, k, v are views of one packed projection (batch, tokens, 3 · heads · dim).
    """

    where: str
    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    operation = "attention"

    @property
    def independent(self):
        return self.batch * self.heads

    @property
    def name(self):
        shape = (self.batch, self.heads, self.tokens, self.dim)
        return f"{'x'.join(map(str, shape))} {SHORT[self.dtype]}"

    def inputs(self, device, make=normal):
        packed = make((self.batch, self.tokens, 3 * self.heads * self.dim), self.dtype, device)
        parts = packed.view(self.batch, self.tokens, 3, self.heads, self.dim)
        return dict(zip("qkv", parts.permute(2, 0, 3, 1, 4), strict=True))

    def run(self, inputs):
        return (attention(**inputs),)

    def reference(self, inputs):
        return (ATTENTION._reference(*inputs.values(), self.dim**-0.5),)

    def plain(self, inputs):
        return (F.scaled_dot_product_attention(*inputs.values()),)

    def launch(self, inputs, backward):
        scale = self.dim**-0.5
        if not backward:
            ATTENTION._forward(*inputs.values(), scale)
            return
        shape = (self.batch, self.tokens, self.heads, self.dim)
        o, do = (torch.zeros(shape, dtype=self.dtype).transpose(1, 2) for _ in range(2))
        lse = torch.zeros(self.batch, self.heads, self.tokens)
        ATTENTION._backward(do, *inputs.values(), o, lse, scale)

    def floor(self, inputs, backward):
        """q, k, v, o once each; backward also do, dq, dk, dv; a log-sum-exp of every row."""
        rows = self.batch * self.heads * self.tokens
        return (8 if backward else 4) * size(inputs["q"]) + 4 * rows

    def flops(self, backward):
        """Two products of (tokens, tokens, dim) a head; five in the backward pass."""
        product = 2 * self.batch * self.heads * self.tokens**2 * self.dim
        return (5 if backward else 2) * product

    def has_kernel(self, backward, arch=80):
        return ATTENTION.planned(self.dim, self.dtype.itemsize, arch, backward)


@dataclasses.dataclass(frozen=True)
class Sampling(Case):
    """One sampling step on fp32 x (batch, *shape) with a network's output in bf16.

    guidance: w, or None for no unconditional output. eta: DDIM's, or None for DDPM's step, whose
    x0_hat is clamped. As in the chapters both x_prev and x0_hat are wanted, all channels_last.
    """

    where: str
    batch: int
    shape: tuple
    guidance: float | None = None
    eta: float | None = None
    dtype: torch.dtype = torch.bfloat16
    operation = "sampling"
    directions = (False,)
    step = 50  # halfway through 100 steps

    @property
    def noisy(self):
        return self.eta is None or self.eta > 0

    @property
    def slack(self):
        """A GPU's logarithm and root give the noise an error of their own."""
        return 1e-6 if self.noisy else 0.0

    @property
    def name(self):
        kind = "DDPM" if self.eta is None else f"DDIM({self.eta:g})"
        guided = "" if self.guidance is None else " CFG"
        return f"{'x'.join(map(str, (self.batch, *self.shape)))} {kind}{guided}"

    @functools.cached_property
    def row(self):
        ts = list(range(999, -1, -10))
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        pairs = list(zip(ts, [*ts[1:], -1], strict=True))
        rows = make_rows((1 - betas).cumprod(0), pairs, eta=self.eta, variance="large")
        return rounded(rows[self.step])  # so that float64 computes with the same numbers

    def inputs(self, device, make=normal):
        def images(count, dtype):
            channels, height, width = self.shape
            return make((count, height, width, channels), dtype, device).permute(0, 3, 1, 2)

        tensors = {"x": images(self.batch, torch.float32)}
        if self.guidance is None:
            tensors["out"] = images(self.batch, self.dtype)
        else:  # one pass of the network gives both
            both = images(2 * self.batch, self.dtype)
            tensors["out"], tensors["out_uncond"] = both.chunk(2)
        if self.noisy:
            tensors["seeds"] = torch.arange(self.batch, device=device)
        return tensors

    def _arguments(self, inputs):
        """What comes after x and out, in the order of `_reference` and `_launch`."""
        guidance = 0.0 if self.guidance is None else self.guidance
        uncond, seeds = inputs.get("out_uncond"), inputs.get("seeds")
        return self.row, self.step, uncond, guidance, None, seeds, self.eta is None

    def run(self, inputs):
        row, step, _, guidance, _, _, clip = self._arguments(inputs)
        return sampling_update(**inputs, row=row, step=step, guidance=guidance, clip=clip)

    def reference(self, inputs):
        return UPDATE._reference(inputs["x"], inputs["out"], *self._arguments(inputs))

    def plain(self, inputs):
        """With torch.randn's noise in place of that of the seeds."""
        x, m = inputs["x"], inputs["out"].float()
        p, q, A, B, _, S, *_ = self.row
        if self.guidance is not None:
            m = (1 + self.guidance) * m - self.guidance * inputs["out_uncond"].float()
        x0_hat = p * x - q * m
        if self.eta is None:
            x0_hat = x0_hat.clamp(-1, 1)
        x_prev = A * x0_hat + B * x
        return x_prev + S * torch.randn_like(x) if self.noisy else x_prev, x0_hat

    def launch(self, inputs, backward):
        UPDATE._launch(inputs["x"], inputs["out"], *self._arguments(inputs), True)

    def floor(self, inputs, backward):
        return size(*inputs.values()) + 2 * size(inputs["x"])


CIFAR, LATENT16, LATENT32 = "CIFAR-10 (chapter 1)", "latents 16x16", "latents 32x32"
DECODER = "autoencoder (chapter 3)"

# configs/cifar10_ddpm.yaml on one GPU. configs/imagenet100.yaml: a batch of 256 on eight GPUs,
# width 192 times 1, 2, 4, six heads; the same U-Net on 256x256 images has latents of 32x32.
CASES = (
    GroupNorm(CIFAR, 128, 128, 32),
    GroupNorm(CIFAR, 128, 256, 16),
    GroupNorm(CIFAR, 128, 512, 16),  # behind a skip connection
    GroupNorm(CIFAR, 128, 256, 8),
    GroupNorm(CIFAR, 128, 256, 4),
    GroupNorm(LATENT16, 32, 192, 16, adagn=True),
    GroupNorm(LATENT16, 32, 576, 16),  # behind a skip connection
    GroupNorm(LATENT16, 32, 384, 8, adagn=True),
    GroupNorm(LATENT16, 32, 768, 4, adagn=True),
    GroupNorm(LATENT32, 32, 192, 32, adagn=True),
    GroupNorm(LATENT32, 32, 576, 32),
    GroupNorm(DECODER, 32, 128, 64),  # of 128x128 images, folded by patches of 2
    GroupNorm(DECODER, 16, 128, 128),
    Attention(CIFAR, 128, 1, 256, 256),
    Attention(CIFAR, 128, 1, 256, 256, torch.float32),
    Attention(LATENT16, 32, 6, 256, 32),
    Attention(LATENT16, 32, 6, 64, 64),
    Attention(LATENT16, 32, 6, 16, 128),
    Attention(LATENT32, 32, 6, 1024, 32),
    Attention(LATENT32, 32, 6, 256, 64),
    Attention(LATENT32, 32, 6, 256, 64, torch.float32),
    Sampling(CIFAR, 128, (3, 32, 32)),
    Sampling(CIFAR, 128, (3, 32, 32), eta=0.0),
    Sampling(LATENT16, 32, (4, 16, 16), guidance=1.5, eta=0.0),
    Sampling(LATENT32, 32, (4, 32, 32), guidance=1.5, eta=0.0),
    Sampling(LATENT32, 32, (4, 32, 32), guidance=1.5, eta=1.0),
)
# What sglang publishes times of for its own group norm with SiLU: 260 and 70 µs on an H200. They
# stand apart from CASES, for a sample of theirs is too large to be counted in the interpreter.
PUBLIC = (
    Volume("sglang", 1, 128, 256, frames=20, width=256),
    Volume("sglang", 1, 512, 45, frames=8, width=80),
)
OPERATIONS = tuple(dict.fromkeys(case.operation for case in CASES))
