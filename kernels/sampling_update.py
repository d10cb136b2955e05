"""One sampling step x_t -> x_{t_prev}.

Every sampler here is one affine update of x, of the network's output, and of fresh noise. What
makes it DDPM or DDIM are eight numbers, a `Row`, which the chapter of that paper computes:

    m      = (1 + w) · out - w · out_uncond        classifier-free guidance (Ho & Salimans, eq. 6)
    x0_hat = clamp(p · x - q · m, -1, 1)
    x_prev = A · x0_hat + B · x + H · x0_hist + S · exp(½ logvar) · z,    z ~ N(0, I)
    logvar = f · log_var_max + (1 - f) · log_var_min,    f = (v + 1) / 2   (IDDPM eq. 15)

p and q turn the network's output into x0_hat: p = 1/√ᾱ and q = √(1/ᾱ - 1) for ε (Ho et al. 2020
eq. 15), p = √ᾱ and q = √(1 - ᾱ) for v (Salimans & Ho 2022), p = 0 and q = -1 for x0 itself. The
clamp is in no equation of theirs: it is in DDPM's code, and keeps images in their range.
A, B and S are the Gaussian posterior q(x_prev | x, x0_hat) of DDPM (Ho et al. 2020 eq. 6-7), or the
non-Markovian one of DDIM (Song et al. 2021 eq. 12 and 16), or one Euler step of an ODE, such as
p = c_skip, q = -c_out, B = σ_prev / σ, A = 1 - B (Karras et al. 2022). H weighs the x0_hat of the
step before, for DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). A fixed variance is S² and leaves
both log variances 0; a learned one has S = 1, and out carries v in its second C channels. S = 0 at
the last step. z is `gaussian(x.shape, seeds, step)`. What is not finite before the clamp is NaN
after it: a clamp alone would make an image of infinity.

Written line by line in PyTorch this reads and writes memory at every operator. The kernel reads
each input once, makes z in registers, and writes each result once.
"""

import functools
import math
from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import (
    Launch,
    check_devices,
    nobody_traces,
    signature,
    tl,
    triton,
    use_kernels,
)
from kernels.philox import check_seeds, four_normals, gaussian, one_normal


class Row(NamedTuple):
    """The numbers of one step: Python floats, which the chapters compute in float64."""

    p: float  # x0_hat = p · x - q · m
    q: float
    A: float  # x_prev = A · x0_hat + B · x + H · x0_hist + S · exp(½ logvar) · z
    B: float
    H: float = 0.0
    S: float = 0.0
    log_var_min: float = 0.0  # where the two differ, out's second C channels say how far
    log_var_max: float = 0.0


def _rounded(row, dtype):
    """The row in the precision of the arithmetic: float32, or float64 as it is."""
    return row if dtype == torch.float64 else Row(*(c_float(number).value for number in row))


def _to(t, dtype):
    """t.to(dtype), but for the cost of the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def _noise_factors(row):
    """exp(½ log_var_min), and half the range of log variances: 0 where nothing is learned."""
    return math.exp(0.5 * row.log_var_min), 0.5 * (row.log_var_max - row.log_var_min)


def _standard_deviation(row, out, S, dtype):
    """S · exp(½ logvar): a float, or (B, C, ...) of `dtype` where out's second half has a say."""
    least, half_range = _noise_factors(row)
    if half_range == 0:
        return S * least
    f = (out[:, out.shape[1] // 2 :].to(dtype) + 1) / 2
    return S * least * torch.exp(half_range * f)


def _reference(x, out, row, step, out_uncond, guidance, history, seeds, clip):
    dtype, channels = torch.float64 if x.dtype == torch.float64 else torch.float32, x.shape[1]
    row = _rounded(row, dtype)
    x_t, m = _to(x, dtype), _to(out, dtype)
    if out_uncond is not None:
        m = (1 + guidance) * m - guidance * out_uncond.to(dtype)
    if m.shape[1] != channels:
        m = m[:, :channels]  # v is the other half
    # In place where it may be: a batch of images is small, and every operator costs its call.
    x0_hat = (row.p * x_t).sub_(m, alpha=row.q)
    if clip:
        zero = x0_hat - x0_hat  # NaN where x0_hat is not finite
        x0_hat.clamp_(-1, 1).sub_(zero)
    x_prev = (row.A * x0_hat).add_(x_t, alpha=row.B)
    if row.H != 0:
        x_prev.add_(history.to(dtype), alpha=row.H)
    if row.S != 0:
        z = _to(gaussian(x.shape, seeds, step, x.device), dtype)
        x_prev.add_(_standard_deviation(row, out, row.S, dtype) * z)
    return _to(x_prev, x.dtype), _to(x0_hat, x.dtype)


# -------------------------------------------------------------------------------------- kernel
#
# One sample is a matrix of POSITIONS x CHANNELS, in memory row after row. That is what
# channels_last means; a sample in the usual order C, H, W is taken as C·H·W positions of a single
# channel. In both, element (i, c) is number c · POSITIONS + i in the order C, H, W, by which noise
# is numbered. A program works on a tile of ROWS x COLUMNS of one sample.
#
# ptr | None: with None, Triton compiles the kernel without what that pointer is for.
@triton.jit(do_not_specialize=["step"])
def _update_kernel(
    x,  # (B, positions, CHANNELS)
    out,  # (B, positions, at least CHANNELS), also out_uncond
    out_uncond,  # ptr | None
    history,  # ptr | None, like x
    seeds,  # ptr | None, (B,)
    x_prev,  # like x
    x0_hat,  # ptr | None, like x
    step,
    p, q, A, B, H, std, half_range,
    w_cond, w_uncond,  # 1 + w and w
    positions,
    out_batch,  # elements from one sample of out to the next
    CHANNELS: tl.constexpr,
    OUT_ROW: tl.constexpr,  # elements from one position of out to the next
    CHANNELS_LAST: tl.constexpr,
    LEARNED: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOURS: tl.constexpr,  # four neighbouring positions of a channel are one block of noise
):  # fmt: skip
    tiles_across = tl.cdiv(CHANNELS, COLUMNS)
    tiles = tl.cdiv(positions, ROWS) * tiles_across
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int32)
    top, left = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
    i = top + tl.arange(0, ROWS)[:, None]
    c = left + tl.arange(0, COLUMNS)[None, :]
    mask = (i < positions) & (c < CHANNELS)
    at = sample * positions * CHANNELS + (i * CHANNELS + c)
    out_at = sample * out_batch + (i * OUT_ROW + c)

    x_t = tl.load(x + at, mask).to(tl.float32)
    m = tl.load(out + out_at, mask).to(tl.float32)
    if out_uncond is not None:
        m = w_cond * m - w_uncond * tl.load(out_uncond + out_at, mask).to(tl.float32)
    x0 = p * x_t - q * m
    if CLIP:
        x0 = tl.clamp(x0, -1.0, 1.0) - (x0 - x0)  # NaN where x0 is not finite
    y = A * x0 + B * x_t
    if history is not None:
        y += H * tl.load(history + at, mask).to(tl.float32)
    if seeds is not None:
        seed = tl.load(seeds + sample)
        if FOURS:
            block = top // 4 + tl.arange(0, ROWS // 4)[:, None] + c * (positions // 4)
            z0, z1, z2, z3 = four_normals(seed, step, block)  # (ROWS/4, COLUMNS) each
            z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # (ROWS/4, COLUMNS, 2, 2)
            z = z.permute(0, 2, 3, 1).reshape(ROWS, COLUMNS)
        else:
            z = one_normal(seed, step, c * positions + i)
        if LEARNED:
            # v lies C channels further: in the same row, or after all the sample's positions.
            v_at = out_at + (CHANNELS if CHANNELS_LAST else positions)
            f = (tl.load(out + v_at, mask).to(tl.float32) + 1.0) * 0.5
            y += std * tl.exp(half_range * f) * z
        else:
            y += std * z
    tl.store(x_prev + at, y.to(x_prev.dtype.element_ty), mask)
    if x0_hat is not None:
        tl.store(x0_hat + at, x0.to(x0_hat.dtype.element_ty), mask)


# -------------------------------------------------------------------------------------- launch


def _is_channels_last(x):
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _dense(x):
    """x if its samples are dense as C, H, W or as H, W, C; else a copy of it that is."""
    return x if _is_channels_last(x) else x.contiguous()


def _as_rows(t, channels_last):
    """(B, positions, channels) on t's memory, or on a copy where t is not laid out like that."""
    rows = t.movedim(1, -1).flatten(1, -2) if channels_last else t.flatten(1)[:, :, None]
    inner = rows.stride(2 if channels_last else 1)
    return rows if inner == 1 else rows.contiguous()


@functools.lru_cache(maxsize=4096, typed=True)  # a walk takes the same rows for every batch
def _numbers(row):
    """What the kernel takes of a row, all rounded to fp32: p .. H, std and half_range.

    Raises ValueError for what is no row.
    """
    _check_row(row)
    row = _rounded(row, torch.float32)
    least, half_range = _noise_factors(row)
    return row.p, row.q, row.A, row.B, row.H, row.S * least, half_range


def _launch(x, out, row, step, out_uncond, guidance, history, seeds, clip, want_x0, launches=None):
    """Plans and launches. Returns x_prev and x0_hat, or x_prev and None.

    launches: a dict that keeps the Launch for inputs of the same signature. It is not kept where a
    tensor has to be copied first.
    """
    numbers = (step, *_numbers(row), 1 + guidance, guidance)
    history, seeds = (history if row.H != 0 else None), (seeds if row.S != 0 else None)
    if launches:
        x_prev = torch.empty_like(x)
        x0_hat = torch.empty_like(x) if want_x0 else None
        launches["step"](x, out, out_uncond, history, seeds, x_prev, x0_hat, *numbers)
        return x_prev, x0_hat
    given = x, out, out_uncond, history, seeds
    x = _dense(x)
    x_prev = torch.empty_like(x)
    x0_hat = torch.empty_like(x) if want_x0 else None
    if x.numel() == 0:
        return x_prev, x0_hat

    # A single channel is both; then out decides, which may have two.
    channels_last = _is_channels_last(x) or (x.shape[1] == 1 and _is_channels_last(out))
    x_rows, out_rows = _as_rows(x, channels_last), _as_rows(out, channels_last)
    uncond_rows = None if out_uncond is None else _as_rows(out_uncond, channels_last)
    if uncond_rows is not None and uncond_rows.stride() != out_rows.stride():
        out_rows, uncond_rows = out_rows.contiguous(), uncond_rows.contiguous()
    history_rows = None if history is None else _as_rows(history, channels_last).contiguous()
    x0_rows = None if x0_hat is None else _as_rows(x0_hat, channels_last)
    seeds = None if seeds is None else seeds.to(x.device).contiguous()

    batch, positions, channels = x_rows.shape
    columns = min(triton.next_power_of_2(channels), 64)
    fours = channels == 1 or positions % 4 == 0
    # 128 threads have 4 elements each: a block of noise, and 16 bytes of fp32. Two are enough where
    # every element encrypts a counter of its own.
    rows = (512 if fours else 256) // columns
    launch = Launch(
        _update_kernel,
        batch * triton.cdiv(positions, rows) * triton.cdiv(channels, columns),
        positions,
        out_rows.stride(0),
        CHANNELS=channels,
        OUT_ROW=out_rows.stride(1),
        CHANNELS_LAST=channels_last,
        LEARNED=row.S != 0 and row.log_var_min != row.log_var_max,  # as in `_key`, not rounded
        CLIP=clip,
        ROWS=rows,
        COLUMNS=columns,
        FOURS=fours,
        num_warps=4,
        enable_fp_fusion=False,  # multiply, then add, as PyTorch does, whatever the layout
    )
    taken = x_rows, out_rows, uncond_rows, history_rows, seeds
    launch(*taken, _as_rows(x_prev, channels_last), x0_rows, *numbers)
    if launches is not None and all(map(_same_place, given, taken)):
        launches["step"] = launch
    return x_prev, x0_hat


def _same_place(a, b):
    """Whether tensors a and b, or None, begin at one place in memory: b is a view of a, no copy."""
    return a is b or a.data_ptr() == b.data_ptr()


# -------------------------------------------------------------------------------------- wiring


@torch.library.custom_op("diffusion_book::sampling_update", mutates_args=())
def _update(
    x: Tensor, out: Tensor, row: list[float], step: int, out_uncond: Tensor | None,
    guidance: float, history: Tensor | None, seeds: Tensor | None, clip: bool, want_x0: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_launch` as one operation that tracers do not look into; an unwanted x0_hat is empty."""
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever x's is
        x_prev, x0_hat = _launch(
            x, out, Row(*row), step, out_uncond, guidance, history, seeds, clip, want_x0
        )
    return x_prev, x.new_empty(0) if x0_hat is None else x0_hat


@_update.register_fake
def _(x, out, row, step, out_uncond, guidance, history, seeds, clip, want_x0):
    x_prev = torch.empty_like(_dense(x))
    return x_prev, torch.empty_like(x_prev) if want_x0 else x.new_empty(0)


_remembered = {}  # {what decides it: the launch}


def sampling_update(
    x, out, row, *, step, out_uncond=None, guidance=0.0, history=None, seeds=None, clip=True,
    want_x0=True,
):  # fmt: skip
    """One step of a sampler: x at t -> (x at t_prev, x0_hat).

    x: (B, C, ...), B may be 0. out: (B, C, ...), or (B, 2C, ...) from a network that also gives the
    variance's v. row: the step's `Row`. step: its number, from 0; with the seeds it keys the noise.
    out_uncond: out under the null label, same shape as out; the guided output is
    (1 + guidance) · out - guidance · out_uncond on the first C channels, v comes from out.
    history: the x0_hat of the step before, for rows with H != 0. seeds: (B,) int64, for rows with
    S != 0; the noise is gaussian(x.shape, seeds, step). clip: clamp x0_hat to [-1, 1].
    want_x0: False returns None for x0_hat, which then costs no memory traffic.

    An estimate of x0 that the chapter has changed goes in as out, with p = 0 and q = -1.

    Arithmetic is fp32, to which the row's numbers are rounded first; for float64 x it is float64
    throughout. Returns x_prev and x0_hat in x's shape, dtype and memory format. Raises ValueError
    for what does not fit, is missing or is not finite. The kernel is for sampling and has no
    gradient: where an input requires one, the PyTorch reference runs. A CUDA graph remembers the
    row: leave the update outside, or capture a whole walk.
    """
    inputs = [t for t in (x, out, out_uncond, history) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    kernels = use_kernels(x) and not needs_grad
    key = _key(x, out, row, out_uncond, history, seeds, clip, want_x0) if kernels else None
    launches = None if key is None else _remembered.get(key)
    if launches is None:
        _check_update(x, out, row, step, out_uncond, history, seeds)
    _check_numbers(step, out_uncond, guidance)
    too_large = launches is None and math.prod(x.shape[1:]) >= 2**30  # 32 bits for out's offsets
    if not kernels or too_large:
        x_prev, x0_hat = _reference(x, out, row, step, out_uncond, guidance, history, seeds, clip)
        return x_prev, x0_hat if want_x0 else None
    how = out_uncond, float(guidance), history, seeds, clip, want_x0
    if key is None:
        x_prev, x0_hat = _update(x, out, list(row), step, *how)
        return x_prev, x0_hat if want_x0 else None
    return _launch(x, out, row, step, *how, _remembered.setdefault(key, {}))


def _key(x, out, row, out_uncond, history, seeds, clip, want_x0):
    """What decides how a step is launched, and that it was found right; None for tracers."""
    if type(row) is not Row or (row.S != 0 and seeds is None):
        return None
    noisy, learned = row.S != 0, row.log_var_min != row.log_var_max
    tensors = [x, out, out_uncond, history, seeds if noisy else None]
    which = tuple(t is None for t in tensors)
    tensors = [t for t in tensors if t is not None]
    if not nobody_traces(tensors):
        return None
    key = signature(tensors)
    return key and (*key, which, row.H != 0, noisy, learned, clip, want_x0)


def _check_row(row):
    if not isinstance(row, Row):
        raise ValueError(f"row must be a Row, got {type(row).__name__}")
    for name, number in zip(Row._fields, row, strict=True):
        if not isinstance(number, (int, float)) or not abs(number) < math.inf:  # nor NaN
            raise ValueError(f"{name} of the row must be a finite number, got {number!r}")


def _check_numbers(step, out_uncond, guidance):
    if not 0 <= step < 2**31:
        raise ValueError(f"step must be in 0 .. 2**31 - 1, got {step}")
    if out_uncond is None and guidance != 0:
        raise ValueError(f"out_uncond is needed for guidance {guidance}")


def _check_update(x, out, row, step, out_uncond, history, seeds):
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got {tuple(x.shape)}")
    batch, channels, *size = x.shape
    if out.shape not in ((batch, channels, *size), (batch, 2 * channels, *size)):
        raise ValueError(
            f"out must be {tuple(x.shape)} like x, or with twice the channels, "
            f"got {tuple(out.shape)}"
        )
    _check_row(row)
    if out_uncond is not None and out_uncond.shape != out.shape:
        raise ValueError(
            f"out_uncond must have out's shape {tuple(out.shape)}, got {tuple(out_uncond.shape)}"
        )
    if history is not None and history.shape != x.shape:
        raise ValueError(
            f"history must have x's shape {tuple(x.shape)}, got {tuple(history.shape)}"
        )
    if row.H != 0 and history is None:
        raise ValueError(f"history is needed: step {step} uses the x0_hat of the step before")
    if row.S != 0 and seeds is None:
        raise ValueError(f"seeds are needed: step {step} adds noise")
    if row.S != 0:
        check_seeds(seeds, batch)
    if row.S != 0 and row.log_var_min != row.log_var_max and out.shape[1] == channels:
        raise ValueError(f"out must have {2 * channels} channels: step {step} learns its variance")
    check_devices(x, out=out, out_uncond=out_uncond, history=history)


def step_variance(row, out):
    """exp(logvar) of a row (IDDPM eq. 15), the variance that a network learns.

    out: the network's output, (B, 2C, ...) where the row's two log variances differ. Returns
    (B, C, ...) in float32 (float64 for float64 out), or a float where they do not differ. A row of
    fixed variance has it in S and gives 1 here. At the last step S = 0 adds no noise; the log
    variances are there nevertheless, so that guidance by a classifier can go on (Dhariwal & Nichol
    2021, algorithm 1). Raises ValueError for a row that is none, and for an out without v.
    """
    _check_row(row)
    if row.log_var_min != row.log_var_max and out.shape[1] % 2:
        raise ValueError(f"out must have 2C channels, the row learns its variance: {out.shape[1]}")
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return _standard_deviation(_rounded(row, dtype), out, 1.0, dtype) ** 2
