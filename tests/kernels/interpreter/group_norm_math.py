"""What the tests of the GroupNorm kernels share: the formula in float64, inputs, errors, cases."""

import contextlib

import numpy as np
import torch
from recording import interpreted_launches
from triton.runtime import interpreter

from kernels.group_norm_silu import _reference, group_norm_silu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error / max(1, |exact|) of y and dx, by their dtype, and of the sums dweight, dbias, ...
TARGET = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TARGET_OF_SUMS = {**TARGET, torch.float32: 5e-6}

# name: (shape, groups). A group of these fits in the registers of one program,
SMALL = {
    "7x5": ((2, 30, 7, 5), 6),
    "28x28": ((2, 6, 28, 28), 2),
    "1x1": ((3, 8, 1, 1), 2),
    "8x8_in_32_groups": ((2, 64, 8, 8), 32),
    "a_group_for_each_channel": ((2, 5, 9, 4), 5),
    "one_group": ((2, 12, 6, 6), 1),
    "one_group_of_512": ((1, 512, 4, 4), 1),
    "no_positions": ((2, 30), 3),
    "1d": ((2, 6, 11), 3),
    "3d": ((2, 6, 3, 2, 5), 2),
}
# and one of these does not.
LARGE = {
    "128x128": ((1, 6, 128, 128), 2),
    "101x67": ((2, 6, 101, 67), 1),
    "92x92": ((1, 8, 92, 92), 2),
    "9x9_in_one_group_of_512": ((1, 512, 9, 9), 1),
}
CASES = SMALL | LARGE


def formula(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """The docstring of kernels/group_norm_silu.py, written out in float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    batch, channels = x.shape[:2]
    runs = x.reshape(batch, groups, -1)  # a group's channels and positions in one row
    centred = runs - runs.sum(2, keepdim=True) / runs.shape[2]
    variance = (centred * centred).sum(2, keepdim=True) / runs.shape[2]
    xhat = (centred / (variance + eps) ** 0.5).reshape(batch, channels, -1)
    z = xhat * weight[:, None] + bias[:, None]
    if scale is not None:
        z = z * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]
    return (z * torch.sigmoid(z) if silu else z).reshape(x.shape)


def pytorch(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """The reference beside the kernels: PyTorch in the same precision."""
    return _reference(x, groups, weight, bias, eps, scale, shift, silu)


def contiguous(x):
    """x with the positions of one channel beside each other in memory."""
    return x.contiguous()


def channels_innermost(x):
    """The same numbers, with the channels of one position beside each other in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x):
    """The same numbers, cut out of a larger tensor."""
    larger = x.new_zeros([n + 2 for n in x.shape])
    return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


def permuted(x):
    """The same numbers with all dimensions in reverse order in memory, the batch innermost."""
    dims = tuple(reversed(range(x.ndim)))
    return x.permute(dims).contiguous().permute(dims)


def expanded(x):
    """The first sample for every sample without a copy: the stride over the batch is 0."""
    return x[:1].contiguous().expand_as(x)


DENSE = [contiguous, channels_innermost]
STRIDED = [sliced, permuted, expanded]


def inputs(
    case,
    *,
    dtype=torch.float32,
    order=contiguous,
    film=True,
    mean=0.0,
    parameters=torch.float32,
    seed=0,
):
    """({"x": ..., "weight": ..., ...}, dy), random, x and dy of `dtype` and in `order`."""
    shape, _ = CASES[case]
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=g) for _ in range(2))
    dy = 0.5 + dy + 0.5 * x  # so that no sum over it is small by cancellation
    values = {"x": order((mean + x).to(dtype))}
    for name in ("weight", "bias", "scale", "shift") if film else ("weight", "bias"):
        size = shape[:2] if name in ("scale", "shift") else shape[1:2]
        value = (name == "weight") + 0.3 * torch.randn(size, generator=g)
        values[name] = value.to(parameters)
    return values, order(dy.to(dtype))


def outcome(function, case, values, dy, **settings):
    """{"y": the function's output, "dx": x's gradient, "dweight": ...} for the gradient dy of y."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    y = function(groups=CASES[case][1], **leaves, **settings)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    names = [f"d{name}" for name in leaves]
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def exact_outcome(case, values, dy, **settings):
    """The outcome of the formula. Every input becomes float64 first, and nothing is rounded."""
    values = {name: value.double() for name, value in values.items()}
    return outcome(formula, case, values, dy.double(), **settings)


def kernel_outcome(case, values, dy, **settings):
    """The outcome of the public function, and that it came out of Triton kernels."""
    with interpreted_launches() as launches:
        found = outcome(group_norm_silu, case, values, dy, **settings)
    assert len(launches) >= 2, "no kernel ran"
    return found


def errors(found, exact):
    """Every element's error / max(1, |exact|)."""
    return (found.double() - exact).abs() / exact.abs().clamp(min=1)


def check(case, values, dy, *, target=None, **settings):
    """The kernels' outcome, once it is seen to be right. target: for everything, if given.

    Against float64, no element's error exceeds the target, and the root mean square of the errors
    is at most twice PyTorch's and one unit in the last place, of sums four, which are as large: of
    a handful of numbers PyTorch may get every one right by chance. A single largest error would be
    too much of a chance itself.
    """
    found = kernel_outcome(case, values, dy, **settings)
    exact = exact_outcome(case, values, dy, **settings)
    at_its_best = values | {"x": values["x"].contiguous()}
    same_precision = outcome(pytorch, case, at_its_best, dy, **settings)
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == same_precision[name].dtype, name
        ours, theirs = (errors(each[name], exact[name]) for each in (found, same_precision))
        summed = name not in ("y", "dx")
        bound = target or (TARGET_OF_SUMS if summed else TARGET)[value.dtype]
        worst = ours.max().item()  # of NaN, which no bound admits, if there is one
        assert worst <= bound, f"{name}: error {worst:.2g}, target {bound:.2g}"
        ours, theirs = (each.square().mean().sqrt().item() for each in (ours, theirs))
        granted = 2 * theirs + (4 if summed else 1) * torch.finfo(value.dtype).eps
        assert ours <= granted, f"{name}: error {ours:.2g}, PyTorch's {theirs:.2g}"
    return found


@contextlib.contextmanager
def sums_in_pairs():
    """tl.sum adds as on a GPU, where partial sums of lanes and warps meet in a tree.

    Left alone the interpreter adds the rows of a tile one after another, whose rounding errors
    grow with the number of rows. numpy adds in pairs along the innermost dimension only.
    """
    plain = interpreter.ReduceOps.sum

    def total(self, value):
        numbers = value.handle.data
        if self.axis is None or numbers.dtype != np.float32:
            return plain(self, value)
        sums = np.ascontiguousarray(np.moveaxis(numbers, self.axis, -1)).sum(-1)
        if self.keep_dims:
            sums = np.expand_dims(sums, self.axis)
        return self.to_tensor(sums, value.dtype)

    interpreter.ReduceOps.sum = total
    try:
        yield
    finally:
        interpreter.ReduceOps.sum = plain
