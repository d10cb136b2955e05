"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), without mask or dropout.

    S = scale · q kᵀ          (N, M) for every sample and head
    P = softmax of each row of S
    o = P v                   (N, D)

Queries and keys may have different lengths N and M (cross attention). The three inputs may be
views of one packed qkv projection of tokens and are read where they lie. The output's memory runs
(B, N, H, D), so that merging heads, `o.transpose(1, 2).reshape(B, N, H * D)`, copies nothing.

The kernels are FlashAttention-2 (Dao 2023): S and P are never in memory. Forward (algorithm 1)
takes a tile of queries past one tile of keys after the other, and carries the row maximum m, the
row sum l and the output of the keys seen so far, each relative to m. The tile S_j turns them into

    m' = max(m, rowmax S_j)                 P_j = exp(S_j - m')                                (1)
    l' = exp(m - m') l + rowsum P_j         o' = exp(m - m') o + P_j v_j                       (2)

At the end o is divided by l, and L = m + log l is kept for backward. With dO = ∂loss/∂o backward
(algorithm 2) computes P again from L, and then

    P = exp(S - L)                          dv = Pᵀ dO                                         (3)
    dP = dO vᵀ                              dS = P ∘ (dP - δ),  δ = rowsum(dO ∘ o)             (4)
    dq = scale · dS k                       dk = scale · dSᵀ q                                 (5)

in two kernels. In the first a program owns a tile of queries, writes δ, and sums dq over the keys;
in the second it owns a tile of keys and sums dk and dv over the queries. No two programs add to the
same number, so nothing is atomic and a result is the same bit for bit every time.

Exponentials are to base 2, as GPUs compute them: exp(x) = 2^(x·log₂e), and L is kept times log₂e.
Factors of matrix products have the inputs' dtype, to which P and dS are rounded; all else is fp32.
An fp32 factor becomes two of tf32, and three products (tf32x3) then come close to fp32. Backward
loses what L and o lost in rounding: of P about 6e-8 · max|S|, and in half precision a part of δ.
"""

import math

import torch
import torch.nn.functional as F

from kernels.dispatch import (
    Launch,
    applier,
    arch_of,
    check_devices,
    nobody_traces,
    signature,
    still,
    tl,
    triton,
    use_kernels,
)

LOG2E = math.log2(math.e)
SMALLEST = 2.0**-126  # positive fp32 number that a GPU does not take for 0


def _reference(q, k, v, scale):
    o = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2)  # copies only if o is not (B,N,H,D) yet


# ---------------------------------------------------------------------- what the kernels share
#
# Strides come as tuples (b, h, n, 1). Tiles are (BLOCK_N or BLOCK_M, BLOCK_D); BLOCK_D is D raised
# to a power of two, as Triton wants it. What a tile has beyond the matrix is read as zeros.


@triton.jit
def _times(index, stride, ALIGN: tl.constexpr):
    """index · stride, which the host knows to be a multiple of ALIGN.

    Triton knows a number's divisor only if it is 16. The head stride of a packed projection is D:
    for D = 40 it would have to take it for odd, and loads could not be wider than one number.
    """
    offset = index * stride
    return tl.multiple_of(offset, ALIGN) if ALIGN > 1 else offset


@triton.jit
def _matrix(tensor, strides, batch_head, H, start, ALIGN: tl.constexpr):
    """Pointer to row `start` of the matrix of one sample and head, as int64: tensors are large."""
    tensor += _times(batch_head // H, strides[0], ALIGN) + _times(batch_head % H, strides[1], ALIGN)
    return tensor + _times(start, strides[2], ALIGN)


@triton.jit
def _tile(matrix, strides, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to a tile at the top of a matrix."""
    rows = _times(tl.arange(0, BLOCK), strides[2], ALIGN)
    return matrix + rows[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(start, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """Which of a tile's elements exist. Where all do, it is a constant, which costs nothing."""
    rows, dims = start + tl.arange(0, BLOCK) < length, tl.arange(0, BLOCK_D) < D
    if EVEN:
        rows = tl.full((BLOCK,), True, tl.int1)
    if D == BLOCK_D:
        dims = tl.full((BLOCK_D,), True, tl.int1)
    return rows[:, None] & dims[None, :]


# ------------------------------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(q, k, v, o, lse, scale_log2, q_strides, k_strides, v_strides, o_strides,
                    H, N, M, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
                    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
                    POSITIVE: tl.constexpr):  # fmt: skip
    """Lines (1) and (2) for BLOCK_N queries of one sample and head.

    A positive scale keeps the order of a row: the largest product is the largest score, and only
    it is multiplied before the exponent, where scale · product - m is one instruction. For any
    other scale all products are multiplied first, and 1 takes the scale's place in the exponent.
    """
    tiles = tl.cdiv(N, BLOCK_N)  # neighbours on the grid read the same keys, from the L2 cache
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    q = _matrix(q, q_strides, batch_head, H, start, ALIGN)
    k = _matrix(k, k_strides, batch_head, H, 0, ALIGN)
    v = _matrix(v, v_strides, batch_head, H, 0, ALIGN)
    queries = _inside(start, N, D, BLOCK_N, BLOCK_D, EVEN_N)
    q_i = tl.load(_tile(q, q_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)

    # Not from -inf: keys whose scores are -inf would give exp(-inf + inf) = NaN instead of 0.
    m = tl.full((BLOCK_N,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    factor = scale_log2 if POSITIVE else 1.0
    for first in range(0, M, BLOCK_M):
        keys = _inside(first, M, D, BLOCK_M, BLOCK_D, EVEN_M)
        k_j = tl.load(_tile(k, k_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)
        v_j = tl.load(_tile(v, v_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)
        s = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION)
        if not POSITIVE:
            s *= scale_log2
        if not EVEN_M:
            s = tl.where((first + tl.arange(0, BLOCK_M) < M)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)  # loses NaN, but exp2(NaN - m_new) does not
        p = tl.exp2(s * factor - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_j.dtype), v_j, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
        k += BLOCK_M * k_strides[2]
        v += BLOCK_M * v_strides[2]

    acc = (acc / total[:, None]).to(o.dtype.element_ty)
    o = _matrix(o, o_strides, batch_head, H, start, ALIGN)
    tl.store(_tile(o, o_strides, BLOCK_N, BLOCK_D, ALIGN), acc, mask=queries)
    rows = start + tl.arange(0, BLOCK_N)
    tl.store(lse + batch_head * N + rows, m + tl.log2(total), mask=rows < N)


@triton.jit
def _dq_kernel(q, k, v, o, do, lse, delta, dq, scale, scale_log2, q_strides, k_strides, v_strides,
               o_strides, do_strides, H, N, M, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_N: tl.constexpr,
               EVEN_M: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """δ and dq (lines (4) and (5)) of BLOCK_N queries. dq lies in memory as o does."""
    tiles = tl.cdiv(N, BLOCK_N)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    q = _matrix(q, q_strides, batch_head, H, start, ALIGN)
    k = _matrix(k, k_strides, batch_head, H, 0, ALIGN)
    v = _matrix(v, v_strides, batch_head, H, 0, ALIGN)
    o = _matrix(o, o_strides, batch_head, H, start, ALIGN)
    do = _matrix(do, do_strides, batch_head, H, start, ALIGN)
    dq = _matrix(dq, o_strides, batch_head, H, start, ALIGN)
    queries = _inside(start, N, D, BLOCK_N, BLOCK_D, EVEN_N)
    q_i = tl.load(_tile(q, q_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)
    o_i = tl.load(_tile(o, o_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)
    do_i = tl.load(_tile(do, do_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)
    rows = start + tl.arange(0, BLOCK_N)
    lse_i = tl.load(lse + batch_head * N + rows, mask=rows < N, other=0.0)
    delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)
    tl.store(delta + batch_head * N + rows, delta_i, mask=rows < N)

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, M, BLOCK_M):
        keys = _inside(first, M, D, BLOCK_M, BLOCK_D, EVEN_M)
        k_j = tl.load(_tile(k, k_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)
        v_j = tl.load(_tile(v, v_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)
        s = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse_i[:, None])
        if not EVEN_M:  # beyond the last key s is 0, and exp2 of it less L may be infinite
            p = tl.where((first + tl.arange(0, BLOCK_M) < M)[None, :], p, 0.0)
        dp = tl.dot(do_i, tl.trans(v_j), input_precision=PRECISION)
        ds = p * (dp - delta_i[:, None])
        acc = tl.dot(ds.to(k_j.dtype), k_j, acc, input_precision=PRECISION)
        k += BLOCK_M * k_strides[2]
        v += BLOCK_M * v_strides[2]
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(_tile(dq, o_strides, BLOCK_N, BLOCK_D, ALIGN), acc, mask=queries)


@triton.jit
def _dkdv_kernel(q, k, v, do, lse, delta, dk, dv, scale, scale_log2, q_strides, k_strides,
                 v_strides, do_strides, dk_strides, H, N, M, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                 EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """dk and dv (lines (3) to (5)) of BLOCK_M keys, with Sᵀ and dPᵀ in place of S and dP."""
    tiles = tl.cdiv(M, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    q = _matrix(q, q_strides, batch_head, H, 0, ALIGN)
    k = _matrix(k, k_strides, batch_head, H, start, ALIGN)
    v = _matrix(v, v_strides, batch_head, H, start, ALIGN)
    do = _matrix(do, do_strides, batch_head, H, 0, ALIGN)
    dk = _matrix(dk, dk_strides, batch_head, H, start, ALIGN)
    dv = _matrix(dv, dk_strides, batch_head, H, start, ALIGN)
    keys = _inside(start, M, D, BLOCK_M, BLOCK_D, EVEN_M)
    k_j = tl.load(_tile(k, k_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)
    v_j = tl.load(_tile(v, v_strides, BLOCK_M, BLOCK_D, ALIGN), mask=keys, other=0.0)

    dk_j = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv_j = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        queries = _inside(first, N, D, BLOCK_N, BLOCK_D, EVEN_N)
        rows = first + tl.arange(0, BLOCK_N)
        exist = (rows < N) | EVEN_N
        q_i = tl.load(_tile(q, q_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)
        do_i = tl.load(_tile(do, do_strides, BLOCK_N, BLOCK_D, ALIGN), mask=queries, other=0.0)
        lse_i = tl.load(lse + batch_head * N + rows, mask=exist, other=0.0)
        delta_i = tl.load(delta + batch_head * N + rows, mask=exist, other=0.0)
        s = tl.dot(k_j, tl.trans(q_i), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse_i[None, :])
        if not EVEN_N:  # q_i and L are 0 beyond the last query: p is 1, NaN if k_j has an infinity
            p = tl.where(exist[None, :], p, 0.0)
        dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision=PRECISION)
        dp = tl.dot(v_j, tl.trans(do_i), input_precision=PRECISION)
        ds = p * (dp - delta_i[None, :])
        dk_j = tl.dot(ds.to(q_i.dtype), q_i, dk_j, input_precision=PRECISION)
        q += BLOCK_N * q_strides[2]
        do += BLOCK_N * do_strides[2]
    dk_j, dv_j = (dk_j * scale).to(dk.dtype.element_ty), dv_j.to(dv.dtype.element_ty)
    tl.store(_tile(dk, dk_strides, BLOCK_M, BLOCK_D, ALIGN), dk_j, mask=keys)
    tl.store(_tile(dv, dk_strides, BLOCK_M, BLOCK_D, ALIGN), dv_j, mask=keys)


# --------------------------------------------------------------------------------- launch plan
#
# One table of tiles, warps and stages for all NVIDIA GPUs from sm_80 on, but for sm_90. Its entries
# are the largest tiles found that fit everywhere, which compiling for sm_80, sm_90 and sm_100 shows
# without a GPU:
#
# - No register is spilled to memory, for D divisible by 8 and any lengths. Accumulators set the
#   limit: dk and dv of 64 keys and D = 256 alone are half of all registers that a multiprocessor
#   has, 128 of the 255 that a thread of 8 warps may have. (On sm_86 dkdv spills 8 bytes at D = 40
#   and partial tiles, on sm_120 36 bytes at D = 32 in fp32.)
# - A program's shared memory is at most the 99 KiB of sm_86, sm_89 and sm_120. (On sm_100, which
#   has 227, Triton keeps one more tile in flight: up to 113 KiB for D > 128.)
# - In 16 bits the tile that stays is at least 64 rows, the least for a warp-group product on sm_90,
#   and loads of the next tiles run while this one is multiplied (two stages or more).
#
# In fp32 an operand is two tf32 numbers and takes four times the registers of a 16-bit one, so
# tiles are small. With D > 128 nothing useful fits, and the reference runs.
#
# sm_90 has rows of its own, in 16 bits the best of bench/candidates.py on an H200, at the chapters'
# shapes; those in fp32 were not chosen by time:
#
# - In 16 bits and for D up to 128 programs of 4 warps, one warp group, win over 64 rows that stay;
#   8 warps were slower, and so were 128 rows, but in forward at D = 32.
# - At D = 256 8 warps win, and cuDNN is faster than they: 31.3 µs forward and 137.7 backward for
#   128 heads of 256 tokens, against 38.4 and 178.7. A row without "dq" and "dkdv" would leave all
#   of training to SDPA, and keep "forward" for sampling.
# - In fp32 8 warps over 64 queries and 16 keys, as everywhere else, end in an illegal access of
#   memory, the likely cause being that each of two warp groups multiplies 8 columns at a time. No
#   other tile here does so; dq with 8 warps would for D up to 16. Other GPUs have no products of
#   warp groups: sm_100 multiplies in tensor memory, the rest by the warp. Nobody has run these
#   tiles on sm_100; (64, 32, 4, 2) would spill there in forward, and on sm_80.

# (bytes of a number, D up to): (BLOCK_N queries, BLOCK_M keys, warps, stages) of each kernel
EVERYWHERE = {
    (2, 32): {"forward": (128, 64, 4, 3), "dq": (128, 64, 8, 2), "dkdv": (64, 128, 8, 2)},
    (2, 64): {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkdv": (64, 128, 8, 2)},
    (2, 128): {"forward": (128, 64, 8, 2), "dq": (64, 32, 4, 2), "dkdv": (32, 64, 8, 2)},
    (2, 256): {"forward": (64, 32, 8, 2), "dq": (64, 16, 8, 2), "dkdv": (16, 64, 8, 2)},
    (4, 32): {"forward": (64, 16, 4, 2), "dq": (64, 32, 8, 2), "dkdv": (16, 64, 4, 2)},
    (4, 64): {"forward": (64, 16, 8, 2), "dq": (32, 32, 8, 1), "dkdv": (32, 32, 8, 1)},
    (4, 128): {"forward": (16, 32, 4, 1), "dq": (16, 32, 8, 1), "dkdv": (32, 16, 8, 1)},
}
HOPPER = {(4, 16): {"forward": (64, 32, 4, 2), "dq": (64, 32, 4, 2), "dkdv": (16, 64, 4, 2)}}
HOPPER |= EVERYWHERE
HOPPER |= {
    (2, 32): {"forward": (128, 64, 4, 3), "dq": (64, 64, 4, 2), "dkdv": (64, 64, 4, 2)},
    (2, 64): {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkdv": (64, 64, 4, 2)},
    (2, 128): {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkdv": (32, 64, 4, 2)},
    (2, 256): {"forward": (128, 32, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (32, 64, 8, 2)},
    (4, 32): {"forward": (64, 32, 4, 2), "dq": (64, 32, 8, 2), "dkdv": (16, 64, 4, 2)},
    (4, 64): {"forward": (64, 32, 4, 2), "dq": (32, 32, 8, 1), "dkdv": (32, 32, 8, 1)},
}
TILES = {75: {}, 90: HOPPER}  # by architecture; all others have EVERYWHERE


def plan(kernel, dim, itemsize, arch):
    """(BLOCK_N, BLOCK_M, warps, stages) of a kernel; None if there is none for such inputs.

    kernel: "forward", "dq" or "dkdv". dim: D. itemsize: bytes of a number of q, k and v.
    arch: the GPU's, as dispatch.arch_of tells it.
    """
    for (size, largest), tiles in TILES.get(arch, EVERYWHERE).items():
        if size == itemsize and 1 <= dim <= largest:
            return tiles.get(kernel)
    return None


def planned(dim, itemsize, arch, gradient):
    """Whether `plan` has the kernels of forward, and with `gradient` those of backward."""
    kernels = ("forward", "dq", "dkdv") if gradient else ("forward",)
    return all(plan(kernel, dim, itemsize, arch) for kernel in kernels)


def _with_rows(x):
    """x (B, H, N, D), or a copy with the memory (B, N, H, D) if a row's numbers are not neighbours,
    or if rows are so far apart that offsets within a tile of 128 would pass 32 bits.

    Loads of 16 bytes need neighbours. Views of an NCHW image have them along N, but to turn such
    tiles takes registers that the plan has not got; one more pass over memory is the lesser cost.
    """
    fits = x.stride(3) == 1 and x.stride(2) < 2**24
    return x if fits else x.transpose(1, 2).contiguous().transpose(1, 2)


def _constants(kernel, q, k, *others):
    """What a kernel takes by name, {name: value}, for q (B, H, N, D) and k (B, H, M, D).

    kernel: as in `plan`, which must have an entry for it.
    others: the further tensors whose strides the kernel takes.
    """
    dim = q.shape[3]
    block_n, block_m, warps, stages = plan(kernel, dim, q.element_size(), arch_of(q.device))
    strides = [stride for tensor in (q, k, *others) for stride in tensor.stride()[:3]]
    return dict(
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),  # 16 is the least that tl.dot multiplies
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        EVEN_N=q.shape[2] % block_n == 0,
        EVEN_M=k.shape[2] % block_m == 0,
        ALIGN=math.gcd(16, *strides),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        num_warps=warps,
        num_stages=stages,
    )


# ------------------------------------------------------------------------------------ launches


def _empty(like):
    """An empty (B, H, N, D) whose memory runs (B, N, H, D)."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _launch(name, kernel, q, k, v, *others, **constants):
    """The Launch of a kernel, which `plan` calls by name; others: what else it takes strides of."""
    named = _constants(name, q, k, v, *others)
    (batch, heads, n), m = q.shape[:3], k.shape[2]
    block = named["BLOCK_M"] if name == "dkdv" else named["BLOCK_N"]
    grid = batch * heads * triton.cdiv(m if name == "dkdv" else n, block)
    strides = (tensor.stride() for tensor in (q, k, v, *others))
    return Launch(kernel, grid, *strides, heads, n, m, **named, **constants)


def _forward(q, k, v, scale, launches=None):
    """o (B, H, N, D), its memory (B, N, H, D), and L · log₂e (B, H, N) in fp32.

    launches: a dict that keeps each Launch for inputs of the same signature.
    """
    o, lse = _empty(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if k.shape[2] == 1:
        return o.copy_(v), lse  # the only key weighs 1, whatever its score; nobody reads L
    if o.numel() > 0:
        launches = {} if launches is None else launches
        q, k, v = _with_rows(q), _with_rows(k), _with_rows(v)
        if "forward" not in launches:
            positive = scale * LOG2E >= SMALLEST
            launches["forward"] = _launch("forward", _forward_kernel, q, k, v, o, POSITIVE=positive)
        launches["forward"](q, k, v, o, lse, scale * LOG2E)
    return o, lse


def _backward(do, q, k, v, o, lse, scale, launches=None):
    """dq, dk and dv, the memory of each in the order of o's."""
    dq, dk, dv, delta = _empty(q), _empty(k), _empty(v), torch.empty_like(lse)
    if o.numel() == 0:  # without queries no key has a gradient
        return dq, dk.zero_(), dv.zero_()
    if k.shape[2] == 1:
        # PyTorch adds fp32 rows to a few fp32 sums, which lose digits as they grow; of half
        # precision the result shows none of that.
        wide = torch.float64 if do.dtype == torch.float32 else torch.float32
        dv.copy_(do.sum(2, keepdim=True, dtype=wide))
        return dq.zero_(), dk.zero_(), dv
    if o.stride() != dq.stride():  # a hook on saved tensors gave back another one
        o = _empty(o).copy_(o)
    addresses = do.data_ptr() | o.data_ptr() | lse.data_ptr()
    if launches is None or do.stride() != o.stride() or addresses % 16:
        launches = {}
    do, q, k, v = _with_rows(do), _with_rows(q), _with_rows(k), _with_rows(v)
    if "dq" not in launches:
        launches["dq"] = _launch("dq", _dq_kernel, q, k, v, o, do)
        launches["dkdv"] = _launch("dkdv", _dkdv_kernel, q, k, v, do, dk)
    launches["dq"](q, k, v, o, do, lse, delta, dq, scale, scale * LOG2E)
    launches["dkdv"](q, k, v, do, lse, delta, dk, dv, scale, scale * LOG2E)
    return dq, dk, dv


# -------------------------------------------------------------------------------------- wiring


@torch.library.custom_op("diffusion_book::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever q's is
        return _forward(q, k, v, scale)


@_attention.register_fake
def _(q, k, v, scale):
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("diffusion_book::attention_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    lse: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        return _backward(do, q, k, v, o, lse, scale)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, scale):
    return _empty(q), _empty(k), _empty(v)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, _):
    return *_attention_backward(do, *ctx.saved_tensors, ctx.scale), None


_attention.register_autograd(_gradients, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The same where nobody traces."""

    @staticmethod
    def forward(ctx, q, k, v, scale, launches):
        o, lse = _forward(q, k, v, scale, launches)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.launches = scale, launches
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled() or not nobody_traces((do,)):  # refuses second derivatives
            return *_gradients(ctx, do, None), None
        q, k, v, o, lse = ctx.saved_tensors
        launches = still(ctx.launches, q, k, v)
        return *_backward(do, q, k, v, o, lse, ctx.scale, launches), None, None


_apply = applier(_Attention)
_remembered = {}  # {what decides it: the launches, by name}


def attention(q, k, v, *, scale=None):
    """softmax(scale · q kᵀ) v.

    q: (B, H, N, D); k, v: (B, H, M, D), M >= 1; floating point, one dtype, any strides (those
    without stride 1 along D are copied for a kernel). B, H and N may be 0. Autocast casts them.
    scale: factor on q kᵀ, any number; 1/√D if None.
    Returns (B, H, N, D) of q's dtype, its memory laid out (B, N, H, D).
    Raises ValueError if the shapes do not fit together, or dtypes or devices differ.

    D for which kernels run, without second derivatives; for all other D it is the reference:

        float16, bfloat16     1 to 256, forward and backward
        float32               1 to 128, forward and backward

    NaN and infinities do what they do in PyTorch: a score of -inf weighs 0, and a row with a score
    of +inf, or with none but -inf, is NaN. But where M is 1, a kernel's place is taken by a copy of
    v, and its score is not computed. Scores of a kernel may not exceed 2³¹.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (q, k, v))
    if not use_kernels(q):
        _check(q, k, v)
        return _reference(q, k, v, scale)
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    key = signature((q, k, v)) if nobody_traces((q, k, v)) else None
    launches = None if key is None else _remembered.get((key, scale, gradient))
    if launches is None:
        _check(q, k, v)
        if not planned(q.shape[3], q.element_size(), arch_of(q.device), gradient):
            return _reference(q, k, v, scale)
        if key is not None:
            launches = _remembered[key, scale, gradient] = {"signature": key}
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if launches is None:
        return _attention(q, k, v, scale)[0]
    if gradient:
        return _apply(q, k, v, scale, launches)
    return _forward(q, k, v, scale, launches)[0]


def _check(q, k, v):
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, N, D), got {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    if k.ndim != 4 or k.shape[:2] != (batch, heads) or k.shape[3] != dim or k.shape[2] == 0:
        raise ValueError(
            f"k must be ({batch}, {heads}, M, {dim}) with M >= 1 to fit q, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    check_devices(q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
