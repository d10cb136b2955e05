"""Normal noise from a counter: a number is a function of (seed, step, place in the sample) only.

Philox4x32-10 (Salmon et al. 2011) is a block cipher used as a random number generator. Under the
key seed_b it turns the counter (e // 4, step, 0, 0) into four 32-bit words, and Box-Muller (1958)
turns those into the four normals of places e .. e+3 of sample b:

    u = word / 2³¹ folded into [0, 1),    radius = √(-2 ln u1),    angle = 2π u2
    z = radius · cos(angle), radius · sin(angle)         of words (0, 1), and again of (2, 3)

So a sample does not depend on its batch, process or device. The same numbers are made twice here:
by PyTorch's operators, of which it takes some two hundred, and inside a Triton kernel. `gaussian`
launches a kernel of its own on a GPU; in that of the sampling update no noise goes through memory.
"""

import math

import torch

from kernels.dispatch import Launch, arch_of, nobody_traces, signature, tl, triton

WORD = 0xFFFFFFFF  # 32 bits; words are kept in int64 tensors, or are plain Python ints


def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32: counter words c0..c3, key words k0, k1 -> four words.

    The multipliers are written minus 2³² to keep every product within int64: the low 32 bits are
    the same, and the high word of the true product is (product >> 32) + c.
    """
    for _ in range(10):
        product0, product2 = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        high0, high2 = (product0 >> 32) + c0, (product2 >> 32) + c2
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, product2 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _uniform(word):
    """Words to float32 in [0, 1), rounded as triton's uint_to_uniform_float rounds them."""
    return torch.minimum(word, WORD - word).float().mul_(4.6566127342e-10)


def _box_muller(u1, u2):
    """Two uniforms to two normals, as triton's pair_uniform_to_normal."""
    radius = u1.clamp_(min=1e-7).log_().mul_(-2).sqrt_()
    angle = u2.mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def check_seeds(seeds, batch):
    """ValueError unless seeds is int64 (batch,)."""
    if seeds.dtype != torch.int64 or seeds.shape != (batch,):
        raise ValueError(f"seeds must be int64 ({batch},), got {seeds.dtype} {tuple(seeds.shape)}")


def _reference(shape, seeds, step):
    """`gaussian` for seeds (B, 1), which lie where the noise is wanted."""
    per_sample, device = math.prod(shape[1:]), seeds.device
    # + 0 made from data: torch.compile multiplies a bare arange in 32 bits (pytorch issue 175966)
    counter = torch.arange(math.ceil(per_sample / 4), device=device) + (seeds[:1] & 0)  # (1, n)
    words = _philox(counter, step & WORD, 0, 0, seeds & WORD, (seeds >> 32) & WORD)  # 4 x (B, n)
    u = [_uniform(word) for word in words]
    z = torch.stack((*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])), dim=-1)  # (B, n, 4)
    return z.flatten(1)[:, :per_sample].contiguous().view(shape)


@triton.jit
def _box_muller_kernel(u1, u2):
    """`_box_muller` without the compiled cos and sin, whose path for huge angles costs registers.

    The angle u2 of a turn is the nearest quarter turn k / 4 plus a rest f in [-1/8, 1/8]. Halving
    and subtracting are exact here, so f has no rounding error. cos(2πf) and sin(2πf) are then short
    polynomials in f² (Remez; errors 5e-11 and 3e-9, below float32's 6e-8), and the quarter turns
    only swap them and change their signs.
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1e-7)))
    quarters = tl.floor(u2 * 4.0 + 0.5)
    f = u2 - quarters * 0.25
    g = f * f
    c = tl.fma(tl.fma(tl.fma(g, 59.24596425, -85.44374173), g, 64.93932647), g, -19.73920869)
    s = tl.fma(tl.fma(tl.fma(g, -75.39356283, 81.59235355), g, -41.34166145), g, 6.28318529)
    c, s = tl.fma(c, g, 1.0), s * f
    k = quarters.to(tl.int32)
    odd = (k & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos, sin = tl.where(((k + 1) & 2) != 0, -cos, cos), tl.where((k & 2) != 0, -sin, sin)
    return radius * cos, radius * sin


@triton.jit
def _uniforms_kernel(seed, step, block):
    """Four uniforms of each block of four places. seed int64, step int32, block any int tensor."""
    block = block.to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero, zero)
    u0, u1 = tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1)
    return u0, u1, tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3)


@triton.jit
def four_normals(seed, step, block):
    """For a kernel: places 4·block .. 4·block+3 of `gaussian`, as four tensors of block's shape."""
    u0, u1, u2, u3 = _uniforms_kernel(seed, step, block)
    z0, z1 = _box_muller_kernel(u0, u1)
    z2, z3 = _box_muller_kernel(u2, u3)
    return z0, z1, z2, z3


@triton.jit
def one_normal(seed, step, place):
    """For a kernel: number `place` of `gaussian`; the other three of its four are thrown away."""
    u0, u1, u2, u3 = _uniforms_kernel(seed, step, place // 4)
    second_pair = (place & 2) != 0
    z0, z1 = _box_muller_kernel(tl.where(second_pair, u2, u0), tl.where(second_pair, u3, u1))
    return tl.where((place & 1) != 0, z1, z0)


BLOCKS = 256  # of four numbers, that a program makes


@triton.jit(do_not_specialize=["step"])
def _gaussian_kernel(z, seeds, step, count, BLOCKS: tl.constexpr):
    """Numbers of one sample, of which it has `count`: 4 · BLOCKS of them."""
    tiles = tl.cdiv(count, 4 * BLOCKS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCKS
    z0, z1, z2, z3 = four_normals(tl.load(seeds + sample), step, first + tl.arange(0, BLOCKS))
    four = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # (BLOCKS, 2, 2): z0 z1, z2 z3
    place = 4 * first + tl.arange(0, 4 * BLOCKS)
    tl.store(z + sample * count + place, four.reshape(4 * BLOCKS), place < count)


_remembered = {}  # {what decides it: the launch}


def _fits(shape):
    """Whether there is something to do for a kernel that counts a sample's numbers in 32 bits."""
    return shape[0] > 0 and 0 < math.prod(shape[1:]) < 2**31 - 4 * BLOCKS


def _launch(shape, seeds, step):
    z = torch.empty(shape, dtype=torch.float32, device=seeds.device)
    step &= WORD
    step -= (step >> 31) << 32  # the same 32 bits as an int32
    key = signature((z, seeds))
    launch = _remembered.get(key)
    if launch is None:
        count = z.numel() // len(z)
        launch = Launch(
            _gaussian_kernel, len(z) * triton.cdiv(count, 4 * BLOCKS), count, BLOCKS=BLOCKS
        )
        if key is not None:
            _remembered[key] = launch
    with torch.cuda.device_of(z):
        launch(z, seeds, step)
    return z


def gaussian(shape, seeds, step, device):
    """Standard normal noise that depends on nothing but (seed, step, place in the sample).

    shape: (B, ...). seeds: (B,) int64, any 64-bit values. step: int from -1 (the start noise x_T)
    to 2³² - 2. device: where the noise is made. Returns contiguous float32 of `shape`, numbered
    in the order of the sample's own C, H, W, whatever memory format it is added to.
    Raises ValueError for seeds that do not fit and steps out of range.
    """
    shape = torch.Size(shape)
    if len(shape) == 0:
        raise ValueError("shape must be (B, ...), got ()")
    check_seeds(seeds, shape[0])
    if not -1 <= step < WORD:
        raise ValueError(f"step must be in -1 .. 2**32 - 2, got {step}")
    seeds = seeds.to(device)
    if seeds.is_cuda and _fits(shape) and arch_of(seeds.device) and nobody_traces((seeds,)):
        return _launch(shape, seeds.contiguous(), step)
    return _reference(shape, seeds[:, None], step)
