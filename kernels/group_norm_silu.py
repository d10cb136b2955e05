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

The middle line is the conditioning of Dhariwal & Nichol 2021, section 3.1 (AdaGN), with 1 +
scale for their y_s, so that a zero-initialised projection starts as the identity.

The kernels work on tiles: positions of one sample (the H·W pixels of an image) by the channels of
one or more whole groups. Where the registers of one program hold all positions of its groups, it
reads them once and is done. Where they do not, the positions are cut into chunks: a first kernel
leaves one partial result for every chunk, and the programs of a second one combine and apply them.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import (
    Launch,
    applier,
    check_devices,
    nobody_traces,
    signature,
    still,
    tl,
    triton,
    use_kernels,
)


def _centred(x, groups):
    """x minus its group means, taken as constants: no output of the norm depends on them.

    PyTorch's CPU kernel for channels_last computes E[x²] - E[x]², which at a mean of ten standard
    deviations has lost half of fp32's digits and at a thousand all of them.
    """
    mean = x.detach()[..., None].flatten(2).mean(2).unflatten(1, (groups, -1)).mean(2)  # (B,G)
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


# ---------------------------------------------------------------------- what the kernels share


@triton.jit
def _place_of(
    program, C: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    STRETCHES: tl.constexpr,
):  # fmt: skip
    """Which sample, which stretch of its positions and which channels a program works on.

    A tile has WIDTH columns, a power of two: the first GROUPS · SIZE of them are `real` channels.
    Neighbours in channels run side by side: where channels lie innermost they share memory pages.
    """
    blocks = C // (GROUPS * SIZE)
    column = tl.arange(0, WIDTH)
    channel = program % blocks * (GROUPS * SIZE) + column
    stretch = program // blocks % STRETCHES
    sample = (program // (blocks * STRETCHES)).to(tl.int64)  # a batch may hold over 2³¹ numbers
    return sample, stretch, channel, column < GROUPS * SIZE


@triton.jit
def _tile_of(position, channel, real, C: tl.constexpr, P: tl.constexpr, INNERMOST: tl.constexpr):
    """Offsets (positions, channels) within a sample, and which of them exist."""
    exists = (position < P)[:, None] & real[None, :]
    if INNERMOST:
        return position[:, None] * C + channel[None, :], exists
    else:
        return channel[None, :] * P + position[:, None], exists


@triton.jit
def _affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real):
    """A = weight · (1 + scale) and B = bias · (1 + scale) + shift of every channel, in fp32."""
    a = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    if scale is not None:
        scale += sample * scale_stride
        shift += sample * shift_stride
        gain = 1 + tl.load(scale + channel, mask=real, other=0.0).to(tl.float32)
        a = a * gain
        b = b * gain + tl.load(shift + channel, mask=real, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _sigmoid(e):
    """1 / (1 + e), which is sigmoid(z) for e = exp(-z).

    A GPU has the reciprocal root as one instruction; an exact division would take ten.
    """
    root = tl.rsqrt(1 + e)
    return root * root


@triton.jit
def _column_sums(a, b):
    """Σ a · b over the rows of a tile (ROWS, WIDTH): (WIDTH,).

    Threads add what their neighbours send, and each then holds a copy of the sum. Were a product
    fused with the addition behind it, its own would keep the digits that a neighbour's has lost,
    and the copies would differ in the last bit. The compiler fuses a · b, but not a · b + 0.
    """
    return tl.sum(tl.fma(a, b, 0.0), 0)


@triton.jit
def _group_sum(values, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel of the tile (WIDTH,) the sum of `values` over the channels of its group.

    Chosen by `where`, not multiplied by 0 and 1: a NaN stays within its group.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    column = tl.arange(0, values.shape[0])[None, :]
    member = column // SIZE == tl.arange(0, PADDED)[:, None]  # (PADDED, WIDTH)
    sums = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return tl.sum(tl.where(member, sums[:, None], 0.0), 0)


# ------------------------------------------------------------------------------------- forward


@triton.jit
def group_norm_statistics(
    x, partial,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    INNERMOST: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of every group over every chunk: partial (B, CHUNKS, G, 2).

    Each place of the tile keeps the mean and the centred sum of squares of the numbers that it has
    met (Welford 1962), which needs no word from its neighbours. At the end of the chunk all places
    are combined as in Chan et al. 1979, eq. 2.1: no sum of raw squares, hence none that cancels.
    """
    sample, chunk, channel, real = _place_of(tl.program_id(0), C, SIZE, GROUPS, WIDTH, CHUNKS)
    x += sample * (C * P)
    start = chunk * CHUNK
    row = tl.arange(0, ROWS)
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for done in range(0, CHUNK, ROWS):
        offset, exists = _tile_of(start + done + row, channel, real, C, P, INNERMOST)
        value = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
        # A place that has come to the end of its positions sees no difference and stays as it is.
        difference = tl.where(exists, value - mean, 0.0)
        step = difference * (1 / (done // ROWS + 1))
        mean += step
        squares += difference * (difference - step)

    end = tl.minimum(start + CHUNK, P)
    met = ((end - start - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # numbers at each place
    count = ((end - start) * SIZE).to(tl.float32)
    chunk_mean = _group_sum(_column_sums(mean, met), SIZE, GROUPS) / count
    difference = mean - chunk_mean[None, :]
    # A mean far from zero lacks digits, as in group_norm_forward: they are the differences' mean.
    lacking = _group_sum(_column_sums(difference, met), SIZE, GROUPS) / count
    chunk_mean += lacking
    difference -= lacking[None, :]
    squares += difference * difference * met
    chunk_squares = _group_sum(tl.sum(squares, 0), SIZE, GROUPS)
    place = partial + ((sample * CHUNKS + chunk) * (C // SIZE) + channel // SIZE) * 2
    first = real & (channel % SIZE == 0)
    tl.store(place, chunk_mean, mask=first)
    tl.store(place + 1, chunk_squares, mask=first)


@triton.jit
def _combined_statistics(
    partial, sample, channel, real, C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each channel (WIDTH,) its group's mean and variance over all chunks (Chan et al.)."""
    PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk = tl.arange(0, PADDED)[:, None]
    positions = tl.maximum(tl.minimum(P - chunk * CHUNK, CHUNK), 0).to(tl.float32)
    place = partial + ((sample * CHUNKS + chunk) * (C // SIZE) + channel[None, :] // SIZE) * 2
    exists = (chunk < CHUNKS) & real[None, :]
    chunk_mean = tl.load(place, mask=exists, other=0.0)
    chunk_squares = tl.load(place + 1, mask=exists, other=0.0)
    mean = _column_sums(chunk_mean, positions) / P
    difference = chunk_mean - mean[None, :]
    lacking = _column_sums(difference, positions) / P
    mean += lacking
    difference -= lacking[None, :]
    squares = tl.sum(chunk_squares + difference * difference * (positions * SIZE), 0)
    return mean, squares / (SIZE * P)


@triton.jit
def group_norm_forward(
    x, weight, bias, scale, shift, scale_stride, shift_stride, partial, y, statistics, eps,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of one tile, and its groups' statistics (B, G, 2): mean and rstd.

    Without `partial` the tile holds all positions and finds the statistics.
    """
    STRETCHES: tl.constexpr = triton.cdiv(P, ROWS)
    program = tl.program_id(0)
    if partial is not None:  # from the end: what group_norm_statistics read last may be in cache
        program = tl.num_programs(0) - 1 - program
    sample, stretch, channel, real = _place_of(program, C, SIZE, GROUPS, WIDTH, STRETCHES)
    position = stretch * ROWS + tl.arange(0, ROWS)
    offset, exists = _tile_of(position, channel, real, C, P, INNERMOST)
    value = tl.load(x + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    if partial is None:
        mu = _group_sum(tl.sum(value, 0), SIZE, GROUPS) / (SIZE * P)
        value = tl.where(exists, value - mu[None, :], 0.0)
        # Far from zero the sum has lost digits. What the mean lacks is their mean, a small number.
        lacking = _group_sum(tl.sum(value, 0), SIZE, GROUPS) / (SIZE * P)
        mu += lacking
        value = tl.where(exists, value - lacking[None, :], 0.0)
        variance = _group_sum(_column_sums(value, value), SIZE, GROUPS) / (SIZE * P)
    else:
        mu, variance = _combined_statistics(
            partial, sample, channel, real, C, P, SIZE, CHUNKS, CHUNK
        )
        value = value - mu[None, :]
    r = tl.rsqrt(variance + eps)
    a, b = _affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    z = value * (r * a)[None, :] + b[None, :]
    if SILU:
        z = z * _sigmoid(tl.exp2(z * -1.4426950408889634))
    tl.store(y + sample * (C * P) + offset, z.to(y.dtype.element_ty), mask=exists)
    place = statistics + (sample * (C // SIZE) + channel // SIZE) * 2
    first = real & (channel % SIZE == 0) & (stretch == 0)
    tl.store(place, mu, mask=first)
    tl.store(place + 1, r, mask=first)


# ------------------------------------------------------------------------------------ backward


@triton.jit
def _gradient_of_z(dy, xhat, a, b, SILU: tl.constexpr):
    """dz, the gradient before the SiLU: silu'(z) = s · (1 + z · (1 - s)) with s = sigmoid(z).

    1 - s is taken as e · s with e = exp(-z): where s is near 1, the difference has lost its digits.
    """
    if SILU:
        z = xhat * a[None, :] + b[None, :]
        e = tl.exp2(z * -1.4426950408889634)
        s = _sigmoid(e)
        e = tl.minimum(e, 8.507059173023462e37)  # 2¹²⁶: e · s stays a number where s is 0
        return dy * (s * (1 + z * (e * s)))
    else:
        return dy


@triton.jit
def group_norm_sums(
    dy, x, weight, bias, scale, shift, scale_stride, shift_stride, statistics, partial,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · xhat of every channel over every chunk: partial (B, CHUNKS, 2, C)."""
    sample, chunk, channel, real = _place_of(tl.program_id(0), C, SIZE, GROUPS, WIDTH, CHUNKS)
    dy += sample * (C * P)
    x += sample * (C * P)
    place = statistics + (sample * (C // SIZE) + channel // SIZE) * 2
    mu = tl.load(place, mask=real, other=0.0)
    r = tl.load(place + 1, mask=real, other=0.0)
    a, b = _affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    row = chunk * CHUNK + tl.arange(0, ROWS)
    sum_dz = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_dz_xhat = tl.zeros((ROWS, WIDTH), tl.float32)
    for done in range(0, CHUNK, ROWS):
        offset, exists = _tile_of(done + row, channel, real, C, P, INNERMOST)
        xhat = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
        xhat = (xhat - mu[None, :]) * r[None, :]
        dz = tl.load(dy + offset, mask=exists, other=0.0).to(tl.float32)
        dz = tl.where(exists, _gradient_of_z(dz, xhat, a, b, SILU), 0.0)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    place = partial + (sample * CHUNKS + chunk) * (2 * C) + channel
    tl.store(place, tl.sum(sum_dz, 0), mask=real)
    tl.store(place + C, tl.sum(sum_dz_xhat, 0), mask=real)


@triton.jit
def _combined_sums(partial, sample, channel, real, C: tl.constexpr, CHUNKS: tl.constexpr):
    """Σ dz and Σ dz · xhat of each channel (WIDTH,) over all chunks."""
    PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk = tl.arange(0, PADDED)[:, None]
    place = partial + (sample * CHUNKS + chunk) * (2 * C) + channel[None, :]
    exists = (chunk < CHUNKS) & real[None, :]
    sum_dz = tl.sum(tl.load(place, mask=exists, other=0.0), 0)
    return sum_dz, tl.sum(tl.load(place + C, mask=exists, other=0.0), 0)


@triton.jit
def group_norm_backward(
    dy, x, weight, bias, scale, shift, scale_stride, shift_stride, statistics, partial,
    dx, sums,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one tile, and S1 and S2 of its channels, `sums` (B, 2, C).

    Without `partial` the tile holds all positions and finds the sums.
    """
    STRETCHES: tl.constexpr = triton.cdiv(P, ROWS)
    program = tl.program_id(0)
    if partial is not None:  # from the end: what group_norm_sums read last may be in cache
        program = tl.num_programs(0) - 1 - program
    sample, stretch, channel, real = _place_of(program, C, SIZE, GROUPS, WIDTH, STRETCHES)
    position = stretch * ROWS + tl.arange(0, ROWS)
    offset, exists = _tile_of(position, channel, real, C, P, INNERMOST)
    xhat = tl.load(x + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    dz = tl.load(dy + sample * (C * P) + offset, mask=exists, other=0.0).to(tl.float32)
    place = statistics + (sample * (C // SIZE) + channel // SIZE) * 2
    mu = tl.load(place, mask=real, other=0.0)
    r = tl.load(place + 1, mask=real, other=0.0)
    a, b = _affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    xhat = (xhat - mu[None, :]) * r[None, :]
    dz = tl.where(exists, _gradient_of_z(dz, xhat, a, b, SILU), 0.0)
    if partial is None:
        S1, S2 = tl.sum(dz, 0), _column_sums(dz, xhat)
    else:
        S1, S2 = _combined_sums(partial, sample, channel, real, C, CHUNKS)

    mean_1 = _group_sum(a * S1, SIZE, GROUPS) / (SIZE * P)
    mean_2 = _group_sum(a * S2, SIZE, GROUPS) / (SIZE * P)
    gradient = r[None, :] * (a[None, :] * dz - mean_1[None, :] - xhat * mean_2[None, :])
    tl.store(dx + sample * (C * P) + offset, gradient.to(dx.dtype.element_ty), mask=exists)
    place = sums + sample * (2 * C) + channel
    tl.store(place, S1, mask=real & (stretch == 0))
    tl.store(place + C, S2, mask=real & (stretch == 0))


@triton.jit
def group_norm_parameters(
    sums, weight, bias, scale, shift, scale_stride, shift_stride, dweight, dbias, dscale, dshift, B,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of all but x, of WIDTH channels: from S1 and S2, sums over the samples."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = channel < C
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, B, ROWS):
        sample = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        exists = (sample < B) & real[None, :]
        S1 = tl.load(sums + sample * (2 * C) + channel[None, :], mask=exists, other=0.0)
        S2 = tl.load(sums + sample * (2 * C) + C + channel[None, :], mask=exists, other=0.0)
        if scale is not None:
            place = sample * C + channel[None, :]
            from_scale = w[None, :] * S2 + b[None, :] * S1
            tl.store(dscale + place, from_scale.to(dscale.dtype.element_ty), mask=exists)
            tl.store(dshift + place, S1.to(dshift.dtype.element_ty), mask=exists)
            place = scale + sample * scale_stride + channel[None, :]
            gain = 1 + tl.load(place, mask=exists, other=0.0).to(tl.float32)
            S1, S2 = gain * S1, gain * S2
        sum_weight += S2
        sum_bias += S1
    tl.store(dweight + channel, tl.sum(sum_weight, 0).to(dweight.dtype.element_ty), mask=real)
    tl.store(dbias + channel, tl.sum(sum_bias, 0).to(dbias.dtype.element_ty), mask=real)


# --------------------------------------------------------------------------------- launch plan


class Plan(NamedTuple):
    """How x is cut into tiles."""

    groups: int  # whole groups in a tile
    width: int  # columns of a tile: the channels of these groups, padded to a power of two
    rows: int  # positions of a tile, a power of two
    warps: int  # of a single pass, or of the second; the first has 16
    chunks: int  # partial results of each group; 0 where one pass is enough
    chunk: int  # positions behind each of them, a multiple of rows


WIDEST = 4096  # channels in a group: a tile of wider ones spills registers


@functools.cache  # to make a plan takes longer than to launch, and a network needs only a few
def plan_tiles(batch, channels, positions, groups, itemsize, innermost, backward):
    """The Plan for x (batch, channels, positions), with numbers of `itemsize` bytes.

    innermost: whether channels lie innermost in memory. backward: for the gradient, whose kernels
    hold x and dy at the same time, hence tiles of half the size.

    What decides was measured on an H200 with bf16 at the chapters' shapes (bench/candidates.py);
    no other GPU was asked, and fp32 was not:

    - A single pass, which reads everything once and is one launch, beats two passes as long as the
      tile fits, even with rows of 24 bytes where channels lie innermost. Rows of 16 bytes lose to
      rows of 32, whose sectors no neighbour reads again. Alignment of rows showed no effect.
    - The smaller tile wins: programs share a multiprocessor, and one computes while others wait.
      At one limit of size rows of 64 bytes beat shorter ones. A tile of less than 1024 bytes is
      not worth its program.
    - So does the tile with fewer warps, down to one for 2048 numbers. In tiles of over 8192 the
      gradient wants one for 1024. The forward pass wants one for 4096, but not where rows are
      shorter than 32 bytes, whose numbers a thread loads a few at a time.
    - Two passes take the shortest rows of 64 bytes or more. As many chunks as give each of the 132
      multiprocessors four programs are enough. But up to four are better than fewer, as long as
      the first kernel then has no more than 2048 programs.

    All groups together leave out no byte: a tile of them is as good as one with long rows.
    """
    size = channels // groups
    padded = triton.next_power_of_2(positions)
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]

    def width(n):
        return triton.next_power_of_2(n * size)

    def row(n):  # bytes that n groups have side by side
        return n * size * itemsize * (1 if innermost else positions)

    wanted = [(8192, 64), (8192, 32), (16384, 64), (16384, 32), (16384, 24)]
    if not backward:
        wanted += [(32768, 64), (32768, 32), (32768, 24)]
    for (most, least), n in itertools.product(wanted, divisors):
        numbers = width(n) * padded
        worth = row(n) >= least and n * size * positions * itemsize >= 1024
        if numbers <= most and (worth or n == groups):
            warp = 2048  # numbers that it works on
            if numbers > 8192:
                warp = 1024 if backward else 4096 if row(n) >= 32 else 2048
            columns = width(n) // 1024  # warps for their statistics and parameters
            return Plan(n, width(n), padded, max(1, numbers // warp, columns), 0, 0)

    long = [n for n in divisors if (row(n) >= 64 or n == groups) and width(n) <= 1024]
    n = min(long, default=1)
    # With two numbers for each place, a thread of the backward pass needs over 64 registers however
    # few places it has: small tiles then keep more warps resident. Wide ones need the threads.
    small = backward and width(n) <= 128
    rows = min(padded, max(1, (4096 if small else 8192) // width(n)))
    tiles = triton.cdiv(positions, rows)
    programs = batch * (groups // n)  # with one chunk
    chunks = max(triton.cdiv(4 * 132, programs), min(4, 2048 // programs))
    chunks = min(chunks, tiles, 32, max(4, rows // 16))  # a tile also reads the partial results
    chunk = triton.cdiv(tiles, chunks) * rows
    warps = (4 if width(n) <= 32 else 8 if small else 16) if backward else 8
    return Plan(n, width(n), rows, warps, triton.cdiv(positions, chunk), chunk)


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


# ------------------------------------------------------------------------------------ launches


class Launches(NamedTuple):
    """How one pass over inputs of one signature is launched, forward or backward."""

    chunks: int  # partial results of each group; 0 where there is no first kernel
    first: Launch | None
    second: Launch


def _launches(x, groups, silu, backward):
    """The Launches for inputs like x, which is contiguous or has its channels innermost."""
    plan, constants = _cut(x, groups, backward)
    blocks = len(x) * groups // plan.groups
    silu_too = {"SILU": silu}  # statistics do not ask for it
    chunk = {"CHUNK": plan.chunk}  # and the last kernel of the backward pass not for this
    first = None
    if plan.chunks:
        kernel = group_norm_sums if backward else group_norm_statistics
        named = constants | chunk | (silu_too if backward else {})
        first = Launch(kernel, blocks * plan.chunks, **named, num_warps=16)
    kernel = group_norm_backward if backward else group_norm_forward
    named = constants | silu_too | ({} if backward else chunk)
    grid = blocks * triton.cdiv(constants["P"], plan.rows)
    return Launches(plan.chunks, first, Launch(kernel, grid, **named, num_warps=plan.warps))


def _parameters(weight, bias, scale, shift):
    """The parameters with contiguous channels, and how far apart the samples of scale, shift lie.

    Scale and shift are usually the halves of one projection: read in place, never copied.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    if scale is None:
        return weight, bias, None, None, 0, 0
    scale, shift = (t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return weight, bias, scale, shift, scale.stride(0), shift.stride(0)


def _forward(x, weight, bias, scale, shift, groups, eps, silu, launches=None):
    """y, and mean and rstd (B, groups, 2) in fp32. x is dense, its channels first or innermost.

    launches: a dict that keeps the Launches for inputs of the same signature.
    """
    y = torch.empty_like(x)
    statistics = x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)
    if x.numel() == 0:
        return y, statistics.zero_()
    launches = {} if launches is None else launches
    if "forward" not in launches:
        launches["forward"] = _launches(x, groups, silu, backward=False)
    chunks, first, second = launches["forward"]
    partial = None
    if chunks:
        partial = statistics.new_empty(x.shape[0], chunks, groups, 2)
        first(x, partial)
    second(x, *_parameters(weight, bias, scale, shift), partial, y, statistics, eps)
    return y, statistics


def _backward(dy, x, weight, bias, scale, shift, statistics, groups, silu, launches=None):
    """dx, and S1 and S2 (B, 2, C) in fp32. dy lies in memory as x does."""
    dx = torch.empty_like(x)
    sums = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
    if x.numel() == 0:
        return dx, sums.zero_()
    if launches is None or (dy.data_ptr() | statistics.data_ptr()) % 16:
        launches = {}
    if "backward" not in launches:
        launches["backward"] = _launches(x, groups, silu, backward=True)
    chunks, first, second = launches["backward"]
    inputs = (dy, x, *_parameters(weight, bias, scale, shift), statistics)
    partial = None
    if chunks:
        partial = statistics.new_empty(x.shape[0], chunks, 2, x.shape[1])
        first(*inputs, partial)
    second(*inputs, partial, dx, sums)
    return dx, sums


def _parameter_gradients(sums, weight, bias, scale, shift, launches):
    """dweight and dbias (C,), dscale and dshift (B, C) or None, from S1 and S2 (B, 2, C)."""
    found = [t if t is None else t.new_empty(t.shape) for t in (weight, bias, scale, shift)]
    if "parameters" not in launches:
        batch, _, channels = sums.shape
        width = min(64, triton.next_power_of_2(channels))
        rows = min(2048 // width, triton.next_power_of_2(batch))
        named = {"C": channels, "ROWS": rows, "WIDTH": width, "num_warps": 4}
        grid = triton.cdiv(channels, width)
        launches["parameters"] = Launch(group_norm_parameters, grid, batch, **named)
    launches["parameters"](sums, *_parameters(weight, bias, scale, shift), *found)
    return found


# -------------------------------------------------------------------------------------- wiring


@torch.library.custom_op("diffusion_book::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        return _forward(x, weight, bias, scale, shift, groups, eps, silu)


@_group_norm_silu.register_fake
def _(x, weight, bias, scale, shift, groups, eps, silu):
    return torch.empty_like(x), x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)


@torch.library.custom_op("diffusion_book::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, statistics: Tensor, groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        dx, sums = _backward(dy, x, weight, bias, scale, shift, statistics, groups, silu)
        # Copies even where a batch of one is contiguous: an operator's outputs share no memory.
        return dx, *(S.clone(memory_format=torch.contiguous_format) for S in sums.unbind(1))


@_group_norm_silu_backward.register_fake
def _(dy, x, weight, bias, scale, shift, statistics, groups, silu):
    sums = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), sums, torch.empty_like(sums)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, scale, shift, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])
    ctx.set_materialize_grads(False)  # no zeros for the statistics, which nobody differentiates


def _laid_out(dy, x):
    """dy, or a copy of it, in x's order of memory: contiguous or with channels innermost."""
    dim = -1 if x.is_contiguous() else 1  # x's innermost dimension
    return dy.movedim(dim, -1).contiguous().movedim(-1, dim)


def _gradients(ctx, dy, _):
    """From dy to the gradients of all inputs; what is (B, C) stays in plain PyTorch."""
    x, weight, bias, scale, shift, statistics = ctx.saved_tensors
    dx, S1, S2 = _group_norm_silu_backward(
        _laid_out(dy, x), x, weight, bias, scale, shift, statistics, ctx.groups, ctx.silu
    )
    _, needs_weight, needs_bias, needs_scale, needs_shift, *_ = ctx.needs_input_grad
    gain = 1 if scale is None else 1 + scale.float()
    dweight = (gain * S2).sum(0).to(weight.dtype) if needs_weight else None
    dbias = (gain * S1).sum(0).to(bias.dtype) if needs_bias else None
    dscale = (weight.float() * S2 + bias.float() * S1).to(scale.dtype) if needs_scale else None
    dshift = S1.to(shift.dtype) if needs_shift else None
    return dx, dweight, dbias, dscale, dshift, None, None, None


_group_norm_silu.register_autograd(_gradients, setup_context=_save_for_backward)


class _GroupNormSilu(torch.autograd.Function):
    """The same where nobody traces."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, eps, silu, launches):
        y, statistics = _forward(x, weight, bias, scale, shift, groups, eps, silu, launches)
        ctx.save_for_backward(x, weight, bias, scale, shift, statistics)
        ctx.groups, ctx.silu, ctx.launches = groups, silu, launches
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() or not nobody_traces((dy,)):  # refuses second derivatives
            return *_gradients(ctx, dy, None), None
        x, *parameters, statistics = ctx.saved_tensors
        launches = still(ctx.launches, x, *parameters)
        inputs = _laid_out(dy, x), x, *parameters, statistics, ctx.groups, ctx.silu
        dx, sums = _backward(*inputs, launches)
        wanted = any(ctx.needs_input_grad[1:5])
        found = _parameter_gradients(sums, *parameters, launches) if wanted else [None] * 4
        return dx, *found, None, None, None, None


_apply = applier(_GroupNormSilu)
_remembered = {}  # {what decides it: the Launches of both passes, by name}


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
    if not use_kernels(x):
        _check(x, groups, weight, bias, scale, shift)
        return _reference(x, groups, weight, bias, eps, scale, shift, silu)
    arguments = x, weight, bias, scale, shift, groups, float(eps), silu
    key = _key(arguments)
    launches = None if key is None else _remembered.get(key)
    if launches is None:
        _check(x, groups, weight, bias, scale, shift)
        if x.shape[1] // groups > WIDEST or math.prod(x.shape[1:]) >= 2**31:
            return _reference(x, groups, weight, bias, eps, scale, shift, silu)
        if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
            x, key = x.contiguous(), None
        if key is None or x.numel() == 0:
            return _group_norm_silu(x, *arguments[1:])[0]
        launches = _remembered[key] = {"signature": key[:-2]}
    if torch.is_grad_enabled() and _wants_gradient(x, weight, bias, scale, shift):
        return _apply(*arguments, launches)
    return _forward(*arguments, launches)[0]


def _key(arguments):
    """What decides how a call is launched, and that it was found right; None for tracers."""
    x, weight, bias, scale, shift, groups, _, silu = arguments
    tensors = (x, weight, bias) if scale is None else (x, weight, bias, scale, shift)
    if (scale is None) != (shift is None) or not nobody_traces(tensors):
        return None
    key = signature(tensors)
    return key and (*key, groups, silu)


def _wants_gradient(x, weight, bias, scale, shift):
    wanted = x.requires_grad or weight.requires_grad or bias.requires_grad
    return wanted or (scale is not None and (scale.requires_grad or shift.requires_grad))


def _check(x, groups, weight, bias, scale, shift):
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
