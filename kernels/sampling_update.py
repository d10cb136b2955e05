"""One sampling step x_t -> x_{t_prev}.

Every sampler here is one affine update; samplers differ only in the rows of a small table, which
`sampling_table` makes:

    m      = (1 + w) · out - w · out_uncond        classifier-free guidance (Ho & Salimans, eq. 6)
    x0_hat = clamp(p · x - q · m, -1, 1)
    x_prev = A · x0_hat + B · x + H · x0_hist + S · exp(½ logvar) · z,    z ~ N(0, I)
    logvar = f · log_var_max + (1 - f) · log_var_min,    f = (v + 1) / 2   (IDDPM eq. 15)

p and q turn the network's output into x0_hat (Ho et al. 2020 eq. 15; v of Salimans & Ho 2022).
A, B and S are the Gaussian posterior q(x_prev | x, x0_hat) of Ho et al. 2020 eq. 6-7, or the
non-Markovian one of DDIM (Song et al. 2021 eq. 12 and 16). H weighs the x0_hat of the step before:
only DPM-Solver++(2M) uses it (Lu et al. 2022, algorithm 2). Fixed variances live in S alone, with
both log-variances 0; learned ones have S = 1 and out carries v in its second C channels. z is
`gaussian(x.shape, seeds, step)`.

Written line by line in PyTorch this reads and writes memory at every operator. The kernel reads
each input once, makes z in registers, and writes each result once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import check_devices, tl, triton, use_kernels
from kernels.philox import check_seeds, four_normals, gaussian, one_normal


class _Row(NamedTuple):
    """A row of the table as numbers, with what it asks for checked."""

    p: float
    q: float
    A: float
    B: float
    H: float
    S: float
    std: float  # S · exp(½ log_var_min)
    half_range: float  # ½ (log_var_max - log_var_min); 0 where the variance is not learned


def _read_row(x, out, table, step, history, seeds):
    p, q, A, B, H, S, log_var_min, log_var_max = table[step].tolist()
    if H != 0 and history is None:
        raise ValueError(f"history is needed: row {step} uses the x0_hat of the step before")
    if S != 0 and seeds is None:
        raise ValueError(f"seeds are needed: row {step} adds noise")
    if S != 0:
        check_seeds(seeds, x.shape[0])
    learned = S != 0 and log_var_min != log_var_max
    if learned and out.shape[1] == x.shape[1]:
        raise ValueError(f"out must have {2 * x.shape[1]} channels: row {step} learns its variance")
    half_range = 0.5 * (log_var_max - log_var_min) if learned else 0.0
    return _Row(p, q, A, B, H, S, S * math.exp(0.5 * log_var_min), half_range)


def _to(t, dtype):
    """t.to(dtype), but for the cost of the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def _reference(x, out, table, step, out_uncond, guidance, history, seeds, clip):
    row, channels = _read_row(x, out, table, step, history, seeds), x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_t, m = _to(x, dtype), _to(out, dtype)
    if out_uncond is not None:
        m = (1 + guidance) * m - guidance * out_uncond.to(dtype)
    if m.shape[1] != channels:
        m = m[:, :channels]  # v is the other half
    # In place where it may be: a batch of images is small, and every operator costs its call.
    x0_hat = (row.p * x_t).sub_(m, alpha=row.q)
    if clip:
        x0_hat.clamp_(-1, 1)
    x_prev = (row.A * x0_hat).add_(x_t, alpha=row.B)
    if row.H != 0:
        x_prev.add_(history.to(dtype), alpha=row.H)
    if row.S != 0:
        std = row.std
        if row.half_range != 0:
            f = (out[:, channels:].to(dtype) + 1) / 2
            std = std * torch.exp(row.half_range * f)
        x_prev.add_(std * gaussian(x.shape, seeds, step, x.device))
    return _to(x_prev, x.dtype), _to(x0_hat, x.dtype)


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
    positions,
    out_batch,  # elements from one sample of out to the next
    step,
    p, q, A, B, H, std, half_range,
    w_cond, w_uncond,  # 1 + w and w
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
        x0 = tl.clamp(x0, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
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


def _launch(x, out, table, step, out_uncond, guidance, history, seeds, clip, want_x0):
    """Checks the row's needs, plans and launches. Returns x_prev and x0_hat, or x_prev and None."""
    row = _read_row(x, out, table, step, history, seeds)
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
    history_rows = None if row.H == 0 else _as_rows(history, channels_last).contiguous()
    x0_rows = None if x0_hat is None else _as_rows(x0_hat, channels_last)
    seeds = None if row.S == 0 else seeds.to(x.device).contiguous()

    batch, positions, channels = x_rows.shape
    columns = min(triton.next_power_of_2(channels), 64)
    fours = channels == 1 or positions % 4 == 0
    # 128 threads have 4 elements each: a block of noise, and 16 bytes of fp32. Two are enough where
    # every element encrypts a counter of its own.
    rows = (512 if fours else 256) // columns
    grid = batch * triton.cdiv(positions, rows) * triton.cdiv(channels, columns)
    with torch.cuda.device_of(x):
        _update_kernel[(grid,)](
            x_rows,
            out_rows,
            uncond_rows,
            history_rows,
            seeds,
            _as_rows(x_prev, channels_last),
            x0_rows,
            positions,
            out_rows.stride(0),
            step,
            *(row.p, row.q, row.A, row.B, row.H, row.std, row.half_range),
            *(1 + guidance, guidance),
            CHANNELS=channels,
            OUT_ROW=out_rows.stride(1),
            CHANNELS_LAST=channels_last,
            LEARNED=row.half_range != 0,
            CLIP=clip,
            ROWS=rows,
            COLUMNS=columns,
            FOURS=fours,
            num_warps=4,
            enable_fp_fusion=False,  # multiply, then add, as PyTorch does, whatever the layout
        )
    return x_prev, x0_hat


@torch.library.custom_op("diffusion_book::sampling_update", mutates_args=())
def _update(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: int,
    out_uncond: Tensor | None,
    guidance: float,
    history: Tensor | None,
    seeds: Tensor | None,
    clip: bool,
    want_x0: bool,
) -> tuple[Tensor, Tensor]:
    """`_launch` as one operation that tracers do not look into; an unwanted x0_hat is empty."""
    x_prev, x0_hat = _launch(
        x, out, table, step, out_uncond, guidance, history, seeds, clip, want_x0
    )
    return x_prev, x.new_empty(0) if x0_hat is None else x0_hat


@_update.register_fake
def _(x, out, table, step, out_uncond, guidance, history, seeds, clip, want_x0):
    x_prev = torch.empty_like(_dense(x))
    return x_prev, torch.empty_like(x_prev) if want_x0 else x.new_empty(0)


def sampling_update(
    x,
    out,
    table,
    step,
    *,
    out_uncond=None,
    guidance=0.0,
    history=None,
    seeds=None,
    clip=True,
    want_x0=True,
):
    """One row of the table applied: x at t -> (x at t_prev, x0_hat).

    x: (B, C, ...), B may be 0. out: (B, C, ...), or (B, 2C, ...) from a network that also gives the
    variance's v. table: of `sampling_table`; it stays on the CPU so that reading a row never waits
    for a GPU. step: the row, from 0. out_uncond: out under the null label, same shape as out; the
    guided output is (1 + guidance) · out - guidance · out_uncond on the first C channels, v comes
    from out. history: the x0_hat of the step before, for rows with H != 0. seeds: (B,) int64, for
    rows with S > 0; the noise is gaussian(x.shape, seeds, step). clip: clamp x0_hat to [-1, 1].
    want_x0: False returns None for x0_hat, which then costs no memory traffic.

    Arithmetic is fp32 (float64 for float64 x). Returns x_prev and x0_hat in x's shape, dtype and
    memory format. Raises ValueError for what does not fit or is missing. The kernel is for
    sampling and has no gradient: where an input requires one, the PyTorch reference runs. A CUDA
    graph remembers the row: capture a whole walk, after one that was not captured.
    """
    _check_update(x, out, table, step, out_uncond, guidance, history)
    inputs = [t for t in (x, out, out_uncond, history) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    too_large = math.prod(x.shape[1:]) >= 2**30  # offsets in a sample of out have 32 bits
    if needs_grad or too_large or not use_kernels(x):
        x_prev, x0_hat = _reference(x, out, table, step, out_uncond, guidance, history, seeds, clip)
    else:
        x_prev, x0_hat = _update(
            x, out, table, step, out_uncond, float(guidance), history, seeds, clip, want_x0
        )
    return x_prev, x0_hat if want_x0 else None


def _check_update(x, out, table, step, out_uncond, guidance, history):
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got {tuple(x.shape)}")
    batch, channels, *size = x.shape
    if out.shape not in ((batch, channels, *size), (batch, 2 * channels, *size)):
        raise ValueError(
            f"out must be {tuple(x.shape)} like x, or with twice the channels, "
            f"got {tuple(out.shape)}"
        )
    if table.device.type != "cpu" or table.ndim != 2 or table.shape[1] != 8:
        raise ValueError(f"table must be (S, 8) on the CPU, got {tuple(table.shape)}")
    if not 0 <= step < len(table):
        raise ValueError(f"step must be a row of the table, 0 .. {len(table) - 1}, got {step}")
    if out_uncond is None and guidance != 0:
        raise ValueError(f"out_uncond is needed for guidance {guidance}")
    if out_uncond is not None and out_uncond.shape != out.shape:
        raise ValueError(
            f"out_uncond must have out's shape {tuple(out.shape)}, got {tuple(out_uncond.shape)}"
        )
    if history is not None and history.shape != x.shape:
        raise ValueError(
            f"history must have x's shape {tuple(x.shape)}, got {tuple(history.shape)}"
        )
    check_devices(x, out=out, out_uncond=out_uncond, history=history)
