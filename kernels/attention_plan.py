"""How fused attention is cut into programs: tiles, warps and stages for each head dimension.

One table for all NVIDIA GPUs from sm_80 on. Its entries are the largest tiles found that fit
everywhere, which compiling for sm_80, sm_90 and sm_100 shows without a GPU:

- No register is spilled to memory, for D divisible by 8 and any lengths. Accumulators set the
  limit: dk and dv of 64 keys and D = 256 alone are half of all registers that a multiprocessor has,
  128 of the 255 that a thread of 8 warps may have. (On sm_86 dkdv spills 8 bytes at
  D = 40 and partial tiles, on sm_120 36 bytes at D = 32 in fp32.)
- A program's shared memory is at most the 99 KiB of sm_86, sm_89 and sm_120. (On sm_100, which has
  227, Triton keeps one more tile in flight: up to 113 KiB for D > 128.)
- In 16 bits the tile that stays is at least 64 rows, the least for a warp-group product on sm_90,
  and loads of the next tiles run while this one is multiplied (two stages or more).

In fp32 an operand is two tf32 numbers and takes four times the registers of a 16-bit one, so tiles
are small. With D > 128 nothing useful fits, and the reference runs.
"""

import math

import torch

from kernels.dispatch import triton

# (bytes of a number, D up to): (BLOCK_N queries, BLOCK_M keys, warps, stages) of each kernel
TILES = {
    (2, 32): {"forward": (128, 64, 4, 3), "dq": (128, 64, 8, 2), "dkdv": (64, 128, 8, 2)},
    (2, 64): {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkdv": (64, 128, 8, 2)},
    (2, 128): {"forward": (128, 64, 8, 2), "dq": (64, 32, 4, 2), "dkdv": (32, 64, 8, 2)},
    (2, 256): {"forward": (64, 32, 8, 2), "dq": (64, 16, 8, 2), "dkdv": (16, 64, 8, 2)},
    (4, 32): {"forward": (64, 32, 4, 2), "dq": (64, 32, 8, 2), "dkdv": (16, 64, 4, 2)},
    (4, 64): {"forward": (64, 16, 8, 2), "dq": (32, 32, 8, 1), "dkdv": (32, 32, 8, 1)},
    (4, 128): {"forward": (16, 32, 4, 1), "dq": (16, 32, 8, 1), "dkdv": (32, 16, 8, 1)},
}


def plan(kernel, dim, itemsize):
    """(BLOCK_N, BLOCK_M, warps, stages) of a kernel; None if there is none for such inputs.

    kernel: "forward", "dq" or "dkdv". dim: D. itemsize: bytes of a number of q, k and v.
    """
    for (size, largest), tiles in TILES.items():
        if size == itemsize and 1 <= dim <= largest:
            return tiles[kernel]
    return None


def with_rows(x):
    """x (B, H, N, D), or a copy with the memory (B, N, H, D) if a row's numbers are not neighbours,
    or if rows are so far apart that offsets within a tile of 128 would pass 32 bits.

    Loads of 16 bytes need neighbours. Views of an NCHW image have them along N, but to turn such
    tiles takes registers that the plan has not got; one more pass over memory is the lesser cost.
    """
    fits = x.stride(3) == 1 and x.stride(2) < 2**24
    return x if fits else x.transpose(1, 2).contiguous().transpose(1, 2)


def constants(kernel, q, k, *others):
    """What a kernel takes by name, {name: value}, for q (B, H, N, D) and k (B, H, M, D).

    kernel: as in `plan`, which must have an entry for it.
    others: the further tensors whose strides the kernel takes.
    """
    dim = q.shape[3]
    block_n, block_m, warps, stages = plan(kernel, dim, q.element_size())
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
