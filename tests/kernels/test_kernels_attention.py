"""attention against softmax written out in float64."""

import pytest
import torch

from kernels import attention
from kernels.attention import plan


def naive(q, k, v, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def packed_tokens(batch, n, heads, dim, generator):
    """q, k, v as views of a (B, N, 3·H·D) linear projection."""
    qkv = torch.randn(batch, n, 3 * heads * dim, generator=generator)
    return qkv.view(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)


def packed_image(batch, n, heads, dim, generator):
    """q, k, v as views of a (B, 3·H·D, n, 1) NCHW convolution: D strides over the pixels."""
    qkv = torch.randn(batch, 3 * heads * dim, n, 1, generator=generator)
    return qkv.view(batch, 3, heads, dim, n).permute(1, 0, 2, 4, 3).unbind(0)


def separate(batch, n, heads, dim, generator):
    return [torch.randn(batch, heads, n, dim, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("make", [packed_tokens, packed_image, separate])
@pytest.mark.parametrize("n, heads, dim", [(1, 1, 8), (17, 3, 5), (64, 4, 16), (67, 2, 33)])
def test_equals_float64_softmax_in_any_strides(make, n, heads, dim):
    q, k, v = make(2, n, heads, dim, torch.Generator().manual_seed(n))
    o = attention(q, k, v)
    assert o.dtype == torch.float32 and o.shape == (2, heads, n, dim)
    assert (o - naive(q, k, v)).abs().max() < 5e-6
    merged = o.transpose(1, 2).reshape(2, n, heads * dim)
    assert merged.data_ptr() == o.data_ptr() and merged.is_contiguous()  # merging heads is free


@pytest.mark.parametrize("n, m", [(5, 77), (77, 5), (9, 1)])
def test_cross_attention(n, m):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, n, 8, generator=g)
    k, v = (torch.randn(3, 2, m, 8, generator=g) for _ in range(2))
    o = attention(q, k, v, scale=0.7)
    assert o.transpose(1, 2).is_contiguous()
    assert (o - naive(q, k, v, 0.7)).abs().max() < 5e-6


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_other_dtypes(dtype, tolerance):
    q, k, v = (t.to(dtype) for t in packed_tokens(2, 19, 2, 8, torch.Generator().manual_seed(0)))
    o = attention(q, k, v)
    assert o.dtype == dtype
    assert (o - naive(q, k, v)).abs().max() < tolerance


def test_large_scores_do_not_overflow():
    q, k, v = separate(1, 11, 2, 8, torch.Generator().manual_seed(0))
    o = attention(300 * q, 300 * k, v)  # scores of order 1e5, whose exp is inf
    assert (o - naive(300 * q, 300 * k, v)).abs().max() < 1e-4


def test_gradients_reach_the_packed_projection():
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 13, 3 * 2 * 7, generator=g, requires_grad=True)
    upstream = torch.randn(2, 2, 13, 7, generator=g)

    def grad(function):
        q, k, v = qkv.view(2, 13, 3, 2, 7).permute(2, 0, 3, 1, 4)
        return torch.autograd.grad((function(q, k, v) * upstream).sum(), qkv)[0]

    assert (grad(attention) - grad(naive)).abs().max() < 5e-6


def test_empty_batch():
    q = torch.zeros(0, 2, 5, 4)
    assert attention(q, q, q).shape == (0, 2, 5, 4)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("dim", [8, 16, 32, 40, 64, 80, 128])
def test_no_tile_of_the_kind_that_failed_on_sm_90(dim, kernel):
    """An H200 ended in an illegal memory access at (64, 16, 8, 2) and (64, 16, 8, 1) in fp32.

    Two warp groups share 64 rows that stay by halving the columns of a product, of scores as many
    as keys pass, of results D: with fewer than 32 each group multiplies 8 at a time. The same with
    4 warps, and 128 queries by 32 keys with 8, were right.
    """
    queries, keys, warps, _ = plan(kernel, dim, 4, 90)
    stay, passing = (keys, queries) if kernel == "dkdv" else (queries, keys)
    assert not (warps == 8 and stay == 64 and min(passing, dim) < 32)


@pytest.mark.parametrize(
    "q, k, v, name",
    [
        ((2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), "q must"),
        ((2, 2, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4), "k must"),
        ((2, 2, 5, 4), (2, 2, 5, 3), (2, 2, 5, 3), "k must"),
        ((2, 2, 5, 4), (2, 2, 0, 4), (2, 2, 0, 4), "M >= 1"),
        ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 5, 4), "v must"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, name):
    with pytest.raises(ValueError, match=name):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
