"""Group normalisation (Wu & He 2018), then an optional scale and shift, then SiLU.

The C channels are cut into `groups` runs of C / groups; mean and (biased) variance are taken over
the channels of a run and all positions of one sample, for x (B, C, ...) with groups g:

    y = (x - mean_g) / √(var_g + eps) · weight_c + bias_c
    y = y · (1 + scale_bc) + shift_bc             where scale and shift are given
    y = y · sigmoid(y)                            where silu is true

For the backward pass let xhat = (x - mean_g) / √(var_g + eps) = (x - mean_g) · rstd_g. Then

    z = xhat · A + B,    A = weight (1 + scale),    B = bias (1 + scale) + shift,    y = silu(z)
    dz = dy · s (1 + z (1 - s)),    s = sigmoid(z)
    dx = rstd (A dz - mean_g(A dz) - xhat · mean_g(A dz xhat))

where mean_g is the mean over a group. Two sums over the positions of a sample, S1 = Σ dz and
S2 = Σ dz · xhat, each (B, C), give these means and the gradients of everything else:

    dweight = Σ_b (1 + scale) S2        dscale = weight S2 + bias S1
    dbias   = Σ_b (1 + scale) S1        dshift = S1

The middle line is the conditioning of Dhariwal & Nichol 2021 (AdaGN, eq. 1) with 1 + scale for
their y_s, so that a zero-initialised projection starts as the identity.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import check_devices, tl, triton, use_kernels
from kernels.group_norm_split import (
    WIDEST,
    affine_of,
    combined_statistics,
    combined_sums,
    gradient_of_z,
    group_norm_statistics,
    group_norm_sums,
    group_sum,
    place_of,
    plan_tiles,
    tile_of,
)


def _centred(x, groups):
    """x minus its group means, taken as constants: no output of the norm depends on them.

    PyTorch's CPU kernel for channels_last computes E[x²] - E[x]², which at a mean of ten standard
    deviations has lost half of fp32's digits and at a thousand all of them.
    """
    mean = x.detach()[..., None].flatten(2).mean(2)  # (B,C)
    mean = mean.unflatten(1, (groups, -1)).mean(2)  # (B,G)
    mean = mean.repeat_interleave(x.shape[1] // groups, dim=1)  # (B,C)
    return x - mean.view(*mean.shape, *[1] * (x.ndim - 2))


def _reference(x, groups, weight, bias, eps, scale, shift, silu):
    dtype = torch.promote_types(x.dtype, torch.float32)  # float64 stays, half precision goes up
    y = x.to(dtype)
    if not x.is_contiguous():
        y = _centred(y, groups)
    y = torch.group_norm(y, groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        per_channel = (*scale.shape, *[1] * (x.ndim - 2))  # (B,C) -> (B,C,1,1)
        y = (y * (1 + scale.to(dtype)).view(per_channel)).add_(shift.to(dtype).view(per_channel))
    if silu:
        y = F.silu(y, inplace=not y.requires_grad)  # backward needs silu's input, sampling does not
    return y.to(x.dtype)


@triton.jit
def group_norm_forward(
    x, weight, bias, scale, shift, scale_stride, shift_stride, partial, y, mean, rstd, eps,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of one tile. Without `partial` the tile holds all positions and finds the statistics."""
    STRETCHES: tl.constexpr = triton.cdiv(P, ROWS)
    program = tl.program_id(0)
    if partial is not None:  # from the end: what group_norm_statistics read last may be in cache
        program = tl.num_programs(0) - 1 - program
    sample, stretch, channel, real = place_of(program, C, SIZE, GROUPS, WIDTH, STRETCHES)
    position = stretch * ROWS + tl.arange(0, ROWS)
    offset, exists = tile_of(position, channel, real, C, P, INNERMOST)
    value = tl.load(x + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    if partial is None:
        mu = group_sum(tl.sum(value, 0), SIZE, GROUPS) / (SIZE * P)
        value = tl.where(exists, value - mu[None, :], 0.0)
        # Far from zero the sum has lost digits. What the mean lacks is their mean, a small number.
        lacking = group_sum(tl.sum(value, 0), SIZE, GROUPS) / (SIZE * P)
        mu += lacking
        value = tl.where(exists, value - lacking[None, :], 0.0)
        variance = group_sum(tl.sum(value * value, 0), SIZE, GROUPS) / (SIZE * P)
    else:
        mu, variance = combined_statistics(
            partial, sample, channel, real, C, P, SIZE, CHUNKS, CHUNK
        )
        value = value - mu[None, :]
    r = tl.rsqrt(variance + eps)
    a, b = affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    z = value * (r * a)[None, :] + b[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + sample * (C * P) + offset, z.to(y.dtype.element_ty), mask=exists)
    group = sample * (C // SIZE) + channel // SIZE
    first = real & (channel % SIZE == 0) & (stretch == 0)
    tl.store(mean + group, mu, mask=first)
    tl.store(rstd + group, r, mask=first)


@triton.jit
def group_norm_backward(
    dy, x, weight, bias, scale, shift, scale_stride, shift_stride, mean, rstd, partial,
    dx, sum_dz, sum_dz_xhat,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one tile. Without `partial` the tile holds all positions and finds the sums."""
    STRETCHES: tl.constexpr = triton.cdiv(P, ROWS)
    program = tl.program_id(0)
    if partial is not None:  # from the end: what group_norm_sums read last may be in cache
        program = tl.num_programs(0) - 1 - program
    sample, stretch, channel, real = place_of(program, C, SIZE, GROUPS, WIDTH, STRETCHES)
    position = stretch * ROWS + tl.arange(0, ROWS)
    offset, exists = tile_of(position, channel, real, C, P, INNERMOST)
    xhat = tl.load(x + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    dz = tl.load(dy + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    group = sample * (C // SIZE) + channel // SIZE
    mu = tl.load(mean + group, mask=real, other=0.0)
    r = tl.load(rstd + group, mask=real, other=0.0)
    a, b = affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    xhat = (xhat - mu[None, :]) * r[None, :]
    dz = tl.where(exists, gradient_of_z(dz, xhat, a, b, SILU), 0.0)
    if partial is None:
        S1, S2 = tl.sum(dz, 0), tl.sum(dz * xhat, 0)
    else:
        S1, S2 = combined_sums(partial, sample, channel, real, C, CHUNKS)

    mean_1 = group_sum(a * S1, SIZE, GROUPS) / (SIZE * P)
    mean_2 = group_sum(a * S2, SIZE, GROUPS) / (SIZE * P)
    gradient = r[None, :] * (a[None, :] * dz - mean_1[None, :] - xhat * mean_2[None, :])
    tl.store(dx + sample * (C * P) + offset, gradient.to(dx.dtype.element_ty), mask=exists)
    tl.store(sum_dz + sample * C + channel, S1, mask=real & (stretch == 0))
    tl.store(sum_dz_xhat + sample * C + channel, S2, mask=real & (stretch == 0))


def _cut(x, groups, backward):
    """The Plan for x, and what every kernel wants to know by name."""
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    innermost = positions == 1 or not x.is_contiguous()
    plan = plan_tiles(len(x), channels, positions, groups, x.element_size(), innermost, backward)
    constants = dict(
        C=channels, P=positions, SIZE=channels // groups, GROUPS=plan.groups, WIDTH=plan.width,
        ROWS=plan.rows, CHUNKS=plan.chunks, INNERMOST=innermost,
    )  # fmt: skip
    return plan, constants


def _parameters(weight, bias, scale, shift):
    """The parameters with contiguous channels, and how far apart the samples of scale, shift lie.

    Scale and shift are usually the halves of one projection: read in place, never copied.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    if scale is None:
        return weight, bias, None, None, 0, 0
    scale, shift = (t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return weight, bias, scale, shift, scale.stride(0), shift.stride(0)


def _forward(x, weight, bias, scale, shift, groups, eps, silu):
    """y, and mean and rstd (B, groups) in fp32. x is contiguous or has its channels innermost."""
    y = torch.empty_like(x)
    mean = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    plan, constants = _cut(x, groups, backward=False)
    blocks = len(x) * groups // plan.groups
    partial = None
    if plan.chunks:
        partial = mean.new_empty(len(x), plan.chunks, groups, 2)
        group_norm_statistics[(blocks * plan.chunks,)](
            x, partial, CHUNK=plan.chunk, **constants, num_warps=16
        )
    group_norm_forward[(blocks * triton.cdiv(constants["P"], plan.rows),)](
        x, *_parameters(weight, bias, scale, shift), partial, y, mean, rstd, eps,
        CHUNK=plan.chunk, SILU=silu, **constants, num_warps=plan.warps,
    )  # fmt: skip
    return y, mean, rstd


def _backward(dy, x, weight, bias, scale, shift, mean, rstd, groups, silu):
    """dx, and S1 and S2 (B, C) in fp32. dy lies in memory as x does."""
    dx = torch.empty_like(x)
    sum_dz = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    sum_dz_xhat = torch.empty_like(sum_dz)
    if x.numel() == 0:
        return dx, sum_dz.zero_(), sum_dz_xhat.zero_()
    plan, constants = _cut(x, groups, backward=True)
    blocks = len(x) * groups // plan.groups
    inputs = (dy, x, *_parameters(weight, bias, scale, shift), mean, rstd)
    partial = None
    if plan.chunks:
        partial = mean.new_empty(len(x), plan.chunks, 2, x.shape[1])
        group_norm_sums[(blocks * plan.chunks,)](
            *inputs, partial, CHUNK=plan.chunk, SILU=silu, **constants, num_warps=16
        )
    group_norm_backward[(blocks * triton.cdiv(constants["P"], plan.rows),)](
        *inputs, partial, dx, sum_dz, sum_dz_xhat, SILU=silu, **constants, num_warps=plan.warps
    )
    return dx, sum_dz, sum_dz_xhat


@torch.library.custom_op("diffusion_book::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return _forward(x, weight, bias, scale, shift, groups, eps, silu)


@_group_norm_silu.register_fake
def _(x, weight, bias, scale, shift, groups, eps, silu):
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("diffusion_book::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return _backward(dy, x, weight, bias, scale, shift, mean, rstd, groups, silu)


@_group_norm_silu_backward.register_fake
def _(dy, x, weight, bias, scale, shift, mean, rstd, groups, silu):
    sums = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), sums, torch.empty_like(sums)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, scale, shift, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd, which nobody differentiates


def _gradients(ctx, dy, *_):
    """From dy to the gradients of all inputs; what is (B, C) stays in plain PyTorch."""
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    dim = -1 if x.is_contiguous() else 1  # x's innermost dimension
    dy = dy.movedim(dim, -1).contiguous().movedim(-1, dim)
    dx, S1, S2 = _group_norm_silu_backward(
        dy, x, weight, bias, scale, shift, mean, rstd, ctx.groups, ctx.silu
    )
    _, needs_weight, needs_bias, needs_scale, needs_shift, *_ = ctx.needs_input_grad
    gain = 1 if scale is None else 1 + scale.float()
    dweight = (gain * S2).sum(0).to(weight.dtype) if needs_weight else None
    dbias = (gain * S1).sum(0).to(bias.dtype) if needs_bias else None
    dscale = (weight.float() * S2 + bias.float() * S1).to(scale.dtype) if needs_scale else None
    dshift = S1.to(shift.dtype) if needs_shift else None
    return dx, dweight, dbias, dscale, dshift, None, None, None


_group_norm_silu.register_autograd(_gradients, setup_context=_save_for_backward)


def group_norm_silu(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """silu(group_norm(x) · weight + bias), with · (1 + scale) + shift before the SiLU if given.

    x: (B, C, ...), B may be 0; contiguous or channels_last. groups divides C.
    weight, bias: (C,). scale, shift: (B, C), both or neither. silu=False leaves out the SiLU.
    Statistics and arithmetic are in fp32 (float64 for float64 x). Returns x's shape, dtype and
    memory format. Raises ValueError for shapes that do not fit.

    The kernels read x in place if it is contiguous or has its channels innermost, and a contiguous
    copy of it otherwise; they can be differentiated once. The reference takes groups of more than
    4096 channels and samples of 2³¹ numbers, besides what is no work for kernels at all.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide x's {channels} channels, got {groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {tuple(value.shape)}")
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"scale and shift come together: {missing} is missing")
    if scale is not None:
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape != (batch, channels):
                raise ValueError(f"{name} must be ({batch}, {channels}), got {tuple(value.shape)}")
    check_devices(x, weight=weight, bias=bias, scale=scale, shift=shift)
    too_large = channels // groups > WIDEST or math.prod(x.shape[1:]) >= 2**31
    if too_large or not use_kernels(x):
        return _reference(x, groups, weight, bias, eps, scale, shift, silu)
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = x.contiguous()
    return _group_norm_silu(x, weight, bias, scale, shift, groups, eps, silu)[0]
