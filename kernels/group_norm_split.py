"""What the kernels of group_norm_silu share, and the pass before theirs where one is not enough.

A program works on a tile: positions of one sample (the H·W pixels of an image) by the channels of
one or more whole groups. Where the registers of one program hold all positions of its groups, it
reads them once and is done. Where they do not, the positions are cut into chunks. The kernels of
this file leave one partial result for every chunk, which the programs of the next pass combine.
"""

import functools
import itertools
from typing import NamedTuple

from kernels.dispatch import tl, triton


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

    A single pass is taken where a tile that 16 warps can hold without spilling has room for all
    positions of its groups. It reads everything once where two passes read everything twice, and
    it is one launch, which also settles small tensors: one multiprocessor moves the 128 KB of the
    largest tile in about the time that a second launch costs. Forward tiles of half that size come
    first, for then two programs share a multiprocessor: one computes while the other waits.

    Where channels lie innermost, a tile's row is a short run of memory, and what part of a sector
    of 32 bytes it leaves out is read again by its neighbour. Rows of whole sectors come first, best
    of two and more; last rows that can at least be loaded 16 bytes at a time, and no others: then
    two passes over wider rows are better. All groups together leave out nothing.

    Two passes take tiles of 8192 numbers and, where the tensor is large enough, as many chunks as
    give each of the 132 multiprocessors of an H100 four programs.
    """
    size = channels // groups
    padded = triton.next_power_of_2(positions)
    largest = 16384 if backward else 32768

    def tile_width(n):
        return triton.next_power_of_2(n * size)

    def together(n):  # bytes that n groups have side by side
        return n * size * itemsize * (1 if innermost else positions)

    def long_rows(n):  # and a tile that is worth its program
        whole = together(n) >= 64 and together(n) % 32 == 0 or not innermost
        return n == groups or (whole and n * size * positions * itemsize >= 1024)

    def whole_rows(n):
        return together(n) % 32 == 0

    def aligned_rows(n):
        return together(n) >= 48 and together(n) % 16 == 0

    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    for limit, rows_are_good, n in itertools.product(
        (16384, largest), (long_rows, whole_rows, aligned_rows), divisors
    ):
        numbers = tile_width(n) * padded
        if rows_are_good(n) and numbers <= limit:
            warp = 2048 if numbers > 8192 and not backward else 1024  # numbers that it works on
            return Plan(n, tile_width(n), padded, max(1, numbers // warp), 0, 0)

    n = next((n for n in divisors if long_rows(n) and tile_width(n) <= 1024), 1)
    width = tile_width(n)
    # With two numbers for each place, a thread of the backward pass needs over 64 registers however
    # few places it has: small tiles then keep more warps resident. Wide ones need the threads.
    small = backward and width <= 128
    rows = min(padded, max(1, (4096 if small else 8192) // width))
    tiles = triton.cdiv(positions, rows)
    chunks = triton.cdiv(4 * 132, batch * (groups // n))
    chunks = min(chunks, tiles, 32, max(3, rows // 16))  # a tile also reads the partial results
    chunk = triton.cdiv(tiles, chunks) * rows
    warps = 8 if small else 16
    return Plan(n, width, rows, warps, triton.cdiv(positions, chunk), chunk)


@triton.jit
def place_of(
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
def tile_of(position, channel, real, C: tl.constexpr, P: tl.constexpr, INNERMOST: tl.constexpr):
    """Offsets (positions, channels) within a sample, and which of them exist."""
    exists = (position < P)[:, None] & real[None, :]
    if INNERMOST:
        return position[:, None] * C + channel[None, :], exists
    else:
        return channel[None, :] * P + position[:, None], exists


@triton.jit
def affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real):
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
def group_sum(values, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel of the tile (WIDTH,) the sum of `values` over the channels of its group.

    Chosen by `where`, not multiplied by 0 and 1: a NaN stays within its group.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    column = tl.arange(0, values.shape[0])[None, :]
    member = column // SIZE == tl.arange(0, PADDED)[:, None]  # (PADDED, WIDTH)
    sums = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return tl.sum(tl.where(member, sums[:, None], 0.0), 0)


@triton.jit
def gradient_of_z(dy, xhat, a, b, SILU: tl.constexpr):
    """dz, the gradient before the SiLU: silu'(z) = s · (1 + z · (1 - s)) with s = sigmoid(z)."""
    if SILU:
        z = xhat * a[None, :] + b[None, :]
        s = tl.sigmoid(z)
        return dy * (s * (1 + z * (1 - s)))
    else:
        return dy


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
    are combined as Chan et al. 1979 do, eq. 2.1: no sum of raw squares, hence none that cancels.
    """
    sample, chunk, channel, real = place_of(tl.program_id(0), C, SIZE, GROUPS, WIDTH, CHUNKS)
    x += sample * (C * P)
    start = chunk * CHUNK
    row = tl.arange(0, ROWS)
    mean = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for done in range(0, CHUNK, ROWS):
        offset, exists = tile_of(start + done + row, channel, real, C, P, INNERMOST)
        value = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
        # A place that has come to the end of its positions sees no difference and stays as it is.
        difference = tl.where(exists, value - mean, 0.0)
        step = difference * (1 / (done // ROWS + 1))
        mean += step
        squares += difference * (difference - step)

    end = tl.minimum(start + CHUNK, P)
    met = ((end - start - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # numbers at each place
    count = ((end - start) * SIZE).to(tl.float32)
    chunk_mean = group_sum(tl.sum(mean * met, 0), SIZE, GROUPS) / count
    difference = mean - chunk_mean[None, :]
    # A mean far from zero lacks digits, as in group_norm_forward: they are the differences' mean.
    lacking = group_sum(tl.sum(difference * met, 0), SIZE, GROUPS) / count
    chunk_mean += lacking
    difference -= lacking[None, :]
    squares += difference * difference * met
    chunk_squares = group_sum(tl.sum(squares, 0), SIZE, GROUPS)
    place = partial + ((sample * CHUNKS + chunk) * (C // SIZE) + channel // SIZE) * 2
    first = real & (channel % SIZE == 0)
    tl.store(place, chunk_mean, mask=first)
    tl.store(place + 1, chunk_squares, mask=first)


@triton.jit
def combined_statistics(
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
    mean = tl.sum(chunk_mean * positions, 0) / P
    difference = chunk_mean - mean[None, :]
    lacking = tl.sum(difference * positions, 0) / P
    mean += lacking
    difference -= lacking[None, :]
    squares = tl.sum(chunk_squares + difference * difference * (positions * SIZE), 0)
    return mean, squares / (SIZE * P)


@triton.jit
def group_norm_sums(
    dy, x, weight, bias, scale, shift, scale_stride, shift_stride, mean, rstd, partial,
    C: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    INNERMOST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · xhat of every channel over every chunk: partial (B, CHUNKS, 2, C)."""
    sample, chunk, channel, real = place_of(tl.program_id(0), C, SIZE, GROUPS, WIDTH, CHUNKS)
    dy += sample * (C * P)
    x += sample * (C * P)
    group = sample * (C // SIZE) + channel // SIZE
    mu = tl.load(mean + group, mask=real, other=0.0)
    r = tl.load(rstd + group, mask=real, other=0.0)
    a, b = affine_of(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, real)
    row = chunk * CHUNK + tl.arange(0, ROWS)
    sum_dz = tl.zeros((ROWS, WIDTH), tl.float32)
    sum_dz_xhat = tl.zeros((ROWS, WIDTH), tl.float32)
    for done in range(0, CHUNK, ROWS):
        offset, exists = tile_of(done + row, channel, real, C, P, INNERMOST)
        xhat = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
        xhat = (xhat - mu[None, :]) * r[None, :]
        dz = tl.load(dy + offset, mask=exists, other=0.0).to(tl.float32)
        dz = tl.where(exists, gradient_of_z(dz, xhat, a, b, SILU), 0.0)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    place = partial + (sample * CHUNKS + chunk) * (2 * C) + channel
    tl.store(place, tl.sum(sum_dz, 0), mask=real)
    tl.store(place + C, tl.sum(sum_dz_xhat, 0), mask=real)


@triton.jit
def combined_sums(partial, sample, channel, real, C: tl.constexpr, CHUNKS: tl.constexpr):
    """Σ dz and Σ dz · xhat of each channel (WIDTH,) over all chunks."""
    PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk = tl.arange(0, PADDED)[:, None]
    place = partial + (sample * CHUNKS + chunk) * (2 * C) + channel[None, :]
    exists = (chunk < CHUNKS) & real[None, :]
    sum_dz = tl.sum(tl.load(place, mask=exists, other=0.0), 0)
    return sum_dz, tl.sum(tl.load(place + C, mask=exists, other=0.0), 0)
