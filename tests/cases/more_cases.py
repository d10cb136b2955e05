"""Further cases of the operations, for verification alone: what no chapter does at full size.

Layouts, dtypes, lengths that divide by nothing, one key, a learned variance, the history of
DPM-Solver++. RAGGED are some so small that a sanitizer, which slows a kernel a hundredfold, gets
through all of them.
"""

import dataclasses

import torch

from kernels import attention
from tests.cases.kernel_cases import ATTENTION, Attention, GroupNorm, Sampling, Volume
from tests.cases.rows import make_rows, rounded

FURTHER, HALF, FULL = "further", torch.float16, torch.float32


class Contiguous(GroupNorm):
    """A group norm over images in the order N, C, H, W."""

    @property
    def name(self):
        return f"{super().name} NCHW"

    def inputs(self, device, **make):
        tensors = super().inputs(device, **make)
        return tensors | {"x": tensors["x"].contiguous()}


class WithoutSiLU(GroupNorm):
    """The norm before attention."""

    silu = False

    @property
    def name(self):
        return f"{super().name} no SiLU"


@dataclasses.dataclass(frozen=True)
class Cross(Attention):
    """Attention of `tokens` queries over `keys` keys, each a tensor of its own."""

    keys: int = 1

    @property
    def name(self):
        return f"{super().name} over {self.keys}"

    def inputs(self, device, **make):
        tensors = super().inputs(device, **make)
        others = dataclasses.replace(self, tokens=self.keys)
        # The same class with as many tokens as keys: its k and v are what is wanted.
        return tensors | {n: Attention.inputs(others, device, **make)[n] for n in "kv"}


class FromImage(Attention):
    """q, k, v as views of one projection (batch, 3 · heads · dim, tokens) of an NCHW image."""

    @property
    def name(self):
        return f"{super().name} NCHW"

    def inputs(self, device, **make):
        tensors = super().inputs(device, **make)
        return {n: t.transpose(2, 3).contiguous().transpose(2, 3) for n, t in tensors.items()}


class Scaled(Attention):
    """Attention with a scale of its own."""

    scale = 0.1

    @property
    def name(self):
        return f"{super().name} scale {self.scale:g}"

    def run(self, inputs):
        return (attention(**inputs, scale=self.scale),)

    def reference(self, inputs):
        return (ATTENTION._reference(*inputs.values(), self.scale),)


class Negative(Scaled):
    """The least product is then the largest score."""

    scale = -0.1


@dataclasses.dataclass(frozen=True)
class Step(Sampling):
    """A sampling step with a learned variance (DDPM), with a history (DPM-Solver++), or over
    images in the order N, C, H, W."""

    learned: bool = False
    history: bool = False
    contiguous: bool = False

    @property
    def noisy(self):
        return not self.history and super().noisy

    @property
    def name(self):
        marks = {"learned": self.learned, "history": self.history, "NCHW": self.contiguous}
        marked = "".join(f" {mark}" for mark, is_so in marks.items() if is_so)
        return f"{super().name}{marked}"

    @property
    def row(self):
        ts = list(range(999, -1, -10))
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        pairs = list(zip(ts, [*ts[1:], -1], strict=True))
        variance = "learned" if self.learned else "large"
        how = {"eta": self.eta, "variance": variance, "multistep": self.history}
        return rounded(make_rows(alpha_bar, pairs, **how)[self.step])

    def inputs(self, device, **make):
        tensors = super().inputs(device, **make)
        if self.learned:  # the second half of the channels says how large the variance is
            wide = dataclasses.replace(self, shape=(2 * self.shape[0], *self.shape[1:]))
            both = Sampling.inputs(wide, device, **make)
            tensors |= {name: both[name] for name in both.keys() & {"out", "out_uncond"}}
        if self.history:
            tensors["history"] = Sampling.inputs(self, device, **make)["x"]
        if self.contiguous:
            tensors = {n: t.contiguous() for n, t in tensors.items()}
        return tensors

    def _arguments(self, inputs):
        row, step, uncond, guidance, _, seeds, clip = super()._arguments(inputs)
        return row, step, uncond, guidance, inputs.get("history"), seeds, clip

    def plain(self, inputs):
        return self.reference(inputs)  # these are never timed


def cases(sides, lengths, batch):
    """All further cases with these sides of images and lengths of sequences, both ragged."""
    side, odd = sides
    long, short = lengths
    return (
        Contiguous(FURTHER, batch, 128, side),
        Contiguous(FURTHER, batch, 192, odd, adagn=True),
        Contiguous(FURTHER, batch, 96, odd, adagn=True, dtype=FULL),
        Contiguous(FURTHER, batch, 64, side, dtype=HALF),
        GroupNorm(FURTHER, batch, 128, side, dtype=FULL),
        GroupNorm(FURTHER, batch, 128, side, dtype=HALF),
        GroupNorm(FURTHER, batch, 192, odd, adagn=True, dtype=HALF),
        GroupNorm(FURTHER, batch, 160, odd, adagn=True, dtype=FULL),
        Volume(FURTHER, batch, 64, odd, frames=3, width=side),
        WithoutSiLU(FURTHER, batch, 256, side),
        WithoutSiLU(FURTHER, batch, 96, odd, adagn=True, dtype=FULL),
        Attention(FURTHER, batch, 2, long, 40),
        Attention(FURTHER, batch, 2, short, 40, HALF),
        Attention(FURTHER, batch, 2, short, 64),
        Attention(FURTHER, batch, 2, long, 64, HALF),
        Attention(FURTHER, batch, 1, short, 128, FULL),
        Attention(FURTHER, batch, 1, long, 32, FULL),
        Attention(FURTHER, batch, 1, long, 64, FULL),
        Attention(FURTHER, batch, 1, long, 256),
        Attention(FURTHER, batch, 1, short, 256, HALF),
        Attention(FURTHER, batch, 2, 1, 64),
        Attention(FURTHER, batch, 1, 1, 256, FULL),
        Cross(FURTHER, batch, 2, long, 64, FULL, keys=1),
        Cross(FURTHER, batch, 2, long, 40, keys=77),
        Cross(FURTHER, batch, 2, short, 128, FULL, keys=33),
        FromImage(FURTHER, batch, 1, long, 128),
        Scaled(FURTHER, batch, 2, short, 32),
        Negative(FURTHER, batch, 1, long, 64),
        Step(FURTHER, batch, (3, odd, side)),
        Step(FURTHER, batch, (3, side, side), dtype=HALF, contiguous=True),
        Step(FURTHER, batch, (4, odd, odd), dtype=FULL, guidance=1.5, eta=1.0, contiguous=True),
        Step(FURTHER, batch, (3, side, side), learned=True),
        Step(FURTHER, batch, (4, odd, odd), learned=True, guidance=1.5, contiguous=True),
        Step(FURTHER, batch, (4, side, side), history=True, guidance=2.0),
        Step(FURTHER, batch, (4, odd, side), dtype=HALF, history=True, contiguous=True),
    )


MORE_CASES = cases((32, 15), (1000, 49), 8)
# And some in which all tiles are whole, for then other code is compiled.
WHOLE = [(dim, FULL) for dim in (32, 64, 128)] + [(dim, torch.bfloat16) for dim in (64, 128, 256)]
RAGGED = (
    *cases((8, 5), (77, 17), 2),
    *(Attention(FURTHER, 1, 2, 128, dim, dtype) for dim, dtype in WHOLE),
)
