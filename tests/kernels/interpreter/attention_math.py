"""What the tests of attention's kernels share: the mathematics, inputs in many strides, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
# Errors under which the ratio to PyTorch's error is chance. Of half precision, the last rounding of
# a number near 1. Of float32, what backward pays for saving a log-sum-exp instead of P: it computes
# the scores again, products of q and k up to 30 summed in another order, and each unit in the last
# place that they differ by changes P by up to 3e-7; a large P times a large do shows several such
# units in dv (2.6e-6 was seen, with PyTorch at 6e-7). TOLERANCE is the bound that counts there.
CHANCE = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-8}
NAMES = ("o", "dq", "dk", "dv")


def exact(q, k, v, do, scale):
    """o and the gradients of sum(o · do), in float64 and by the formulas.

    S = scale · q kᵀ,  P = softmax(S),  o = P v
    dP = do vᵀ,  dS = P ∘ (dP - rowsum(do ∘ o))
    dq = scale · dS k,  dk = scale · dSᵀ q,  dv = Pᵀ do
    """
    q, k, v, do = (t.detach().double() for t in (q, k, v, do))
    s = scale * q @ k.mT
    p = (s - s.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    o = p @ v
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    return o, scale * ds @ k, scale * ds.mT @ q, p.mT @ do


def _with_gradients(function, q, k, v, do):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))  # the strides stay
    o = function(q, k, v)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def by_kernel(q, k, v, do, scale=None):
    """o, dq, dk, dv of the public function."""
    return _with_gradients(lambda *qkv: attention(*qkv, scale=scale), q, k, v, do)


def by_pytorch(q, k, v, do, scale=None):
    """o, dq, dk, dv of PyTorch's own formula.

    Inputs of half precision PyTorch takes to float32 first. For o a kernel can do as well; for the
    gradients it cannot, for tensor cores take P and dS in half precision only, and the fair measure
    is PyTorch with every step in the dtype of the inputs.
    """
    sdpa = F.scaled_dot_product_attention
    upcast = not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with sdpa_kernel(SDPBackend.MATH):
        o = sdpa(q, k, v, scale=scale)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            _, *grads = _with_gradients(lambda *qkv: sdpa(*qkv, scale=scale), q, k, v, do)
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not upcast)
    return o, *grads


def error(value, reference, size=None):
    """max |value - reference| / max(1, |reference|), or with `size` in place of |reference|."""
    size = reference.abs() if size is None else size
    return ((value.double() - reference).abs() / size.clamp(min=1)).max().item()


def sizes(q, k, v, do):
    """What o, dq, dk, dv would be if no two terms of any sum had opposite signs."""
    q, k, v, do = (t.detach().double() for t in (q, k, v, do))
    scale = q.shape[-1] ** -0.5
    p = (scale * q @ k.mT).softmax(-1)
    q, k, v, do = (t.abs() for t in (q, k, v, do))
    o = p @ v
    ds = p * (do @ v.mT + (do * o).sum(-1, keepdim=True))
    return o, scale * ds @ k, scale * ds.mT @ q, p.mT @ do


def check_sums(q, k, v, do):
    """As `check`, for shapes at which PyTorch's fused attention is not within TOLERANCE either.

    With many queries and few keys dk and dv are small sums of large terms: every term may have the
    error of its own size.
    """
    truth, kernel = exact(q, k, v, do, q.shape[-1] ** -0.5), by_kernel(q, k, v, do)
    for name, mine, true, size in zip(NAMES, kernel, truth, sizes(q, k, v, do), strict=True):
        assert mine.dtype == q.dtype and mine.shape == true.shape, name
        assert error(mine, true, size) <= TOLERANCE[q.dtype], name


def check(q, k, v, do, scale=None):
    """o, dq, dk, dv of the kernel are within TOLERANCE, and have at most twice PyTorch's error."""
    dtype = q.dtype
    truth = exact(q, k, v, do, q.shape[-1] ** -0.5 if scale is None else scale)
    kernel, pytorch = by_kernel(q, k, v, do, scale), by_pytorch(q, k, v, do, scale)
    for name, mine, theirs, true in zip(NAMES, kernel, pytorch, truth, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape, name
        bound = max(2 * error(theirs, true), CHANCE[dtype])
        assert error(mine, true) <= min(bound, TOLERANCE[dtype]), name


def tokens(random, b, h, n, m, d):
    """Views of linear projections "b n (k h d)" of one sequence, or of two if n and m differ."""

    def project(length, parts):
        return random(b, length, parts * h * d).view(b, length, parts, h, d).permute(2, 0, 3, 1, 4)

    return (*project(n, 3),) if n == m else (*project(n, 1), *project(m, 2))


def image(random, b, h, n, m, d):
    """Views of 1x1 convolutions of NCHW images: neighbours in memory are pixels, not channels."""

    def project(length, parts):
        return random(b, parts * h * d, length).view(b, parts, h, d, length).permute(1, 0, 2, 4, 3)

    return (*project(n, 3),) if n == m else (*project(n, 1), *project(m, 2))


def separate(random, b, h, n, m, d):
    """Three contiguous tensors."""
    return random(b, h, n, d), random(b, h, m, d), random(b, h, m, d)


def backwards(random, b, h, n, m, d):
    """Memory in the order D, N, H, B: the stride of the batch is 1."""
    return tuple(random(d, length, h, b).permute(3, 2, 1, 0) for length in (n, m, m))


def one_head_of_keys(random, b, h, n, m, d):
    """All heads share keys and values (Shazeer 2019): the stride of their heads is 0."""
    k, v = (random(b, 1, m, d).expand(b, h, m, d) for _ in range(2))
    return random(b, h, n, d), k, v


def one_sample_of_keys(random, b, h, n, m, d):
    """All samples share keys and values: the stride of their batch is 0."""
    k, v = (random(1, h, m, d).expand(b, h, m, d) for _ in range(2))
    return random(b, h, n, d), k, v


def all_different(random, b, h, n, m, d):
    """No two of the three alike."""
    q, k, v = random(b, n, h, d), random(b, h, m, d), random(h, b, d, m)
    return q.transpose(1, 2), k, v.permute(1, 0, 3, 2)


def inside_nan(random, b, h, n, m, d):
    """A window in a larger tensor, not aligned to anything, with NaN all around."""

    def window(length):
        room = torch.full((b + 2, h + 1, length + 4, d + 5), torch.nan, dtype=random(1).dtype)
        room[1:-1, 1:, 2:-2, 3:-2] = random(b, h, length, d)
        return room[1:-1, 1:, 2:-2, 3:-2]

    return window(n), window(m), window(m)


def between_nan(random, b, h, n, m, d):
    """Every other row and every third column of a larger tensor, with NaN in the others."""

    def comb(length):
        room = torch.full((b, h, 2 * length, 3 * d), torch.nan, dtype=random(1).dtype)
        room[:, :, ::2, 1::3] = random(b, h, length, d)
        return room[:, :, ::2, 1::3]

    return comb(n), comb(m), comb(m)


LAYOUTS = (
    tokens,
    image,
    separate,
    all_different,
    backwards,
    one_head_of_keys,
    one_sample_of_keys,
    inside_nan,
    between_nan,
)


def inputs(layout, b, h, n, m, d, dtype, seed=0):
    """q, k, v in a layout, and do contiguous: standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return *layout(random, b, h, n, m, d), random(b, h, n, d)
