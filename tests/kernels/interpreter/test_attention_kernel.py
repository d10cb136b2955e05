"""attention's kernels in the interpreter: output and gradients against float64, and PyTorch's."""

import math

import pytest
import torch
from attention_math import (
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    by_kernel,
    check,
    check_sums,
    error,
    exact,
    inputs,
    separate,
    tokens,
)
from tf32 import TF32, TF32X3, nearest, tensor_cores, truncated

from kernels import attention
from kernels.attention import _forward
from tests.cases.offline import planned_for
from tests.cases.traffic import count_traffic

LENGTHS = [(1, 1), (1, 16), (7, 1), (16, 7), (64, 64), (65, 65), (77, 130), (130, 77), (16, 257)]
DIMS = [16, 24, 32, 40, 64, 80, 96, 128, 160, 256]
SLOW_LENGTHS = [(n, m) for n in (1, 7, 65, 130) for m in (1, 7, 65, 130)]
SLOW_DIMS = [16, 40, 64, 96, 256]


def by_name(case):
    return case.__name__ if callable(case) else None


@DTYPES
@pytest.mark.parametrize("n, m", LENGTHS)
def test_any_lengths(n, m, dtype):
    check(*inputs(tokens, 1, 2, n, m, 32, dtype))


@DTYPES
@pytest.mark.parametrize("dim", DIMS)
def test_any_head_dimension(dim, dtype):
    check(*inputs(tokens, 1, 2, 19, 19, dim, dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
@pytest.mark.parametrize(
    "n, m, dim, dtype",
    [
        pytest.param(33, 33, 16, torch.float32, id="33-33-16-float32"),
        pytest.param(19, 70, 40, torch.bfloat16, id="19-70-40-bfloat16"),
    ],
)
def test_any_strides(n, m, dim, dtype, layout):
    check(*inputs(layout, 2, 2, n, m, dim, dtype))


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.3, 1e-60, 0, -1e-60, -0.3])
def test_any_scale(scale, dtype):
    """The largest product of a row is its largest score only where the scale is positive."""
    check(*inputs(tokens, 1, 1, 35, 67, 16, dtype), scale)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n, m", [(130, 67), (128, 128)])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_the_tiles_of_hopper(dim, n, m, sign):
    """Others are planned for a CPU."""
    with planned_for(90):
        check(*inputs(tokens, 1, 1, n, m, dim, torch.bfloat16), sign * dim**-0.5)


@DTYPES
@pytest.mark.parametrize("n", [1, 37])
def test_one_key_is_copied(n, dtype):
    """Its weight is 1, which no query and no key can change."""
    q, k, v, do = inputs(tokens, 2, 2, n, 1, 24, dtype)
    with count_traffic() as traffic:
        o, dq, dk, dv = by_kernel(q, k, v, do, 0.3)
    assert traffic.launches == []
    assert torch.equal(o, v.expand_as(o)) and o.transpose(1, 2).is_contiguous()
    assert not dq.any() and not dk.any()
    assert error(dv, do.double().sum(2, keepdim=True)) <= TOLERANCE[dtype]
    assert o.data_ptr() != v.data_ptr()


def test_the_gradient_of_one_key_is_a_sum_of_many_rows_rounded_once():
    q, k, v, do = inputs(tokens, 4, 2, 1000, 1, 64, torch.float32)
    dv = by_kernel(q, k, v, do)[3]
    assert error(dv, do.double().sum(2, keepdim=True)) <= 2.0**-24


@pytest.mark.parametrize("scale", [1, 1.0, -1], ids=repr)
def test_a_scale_of_one(scale):  # which Triton would take for a constant, were it an integer
    q, k, v, do = inputs(tokens, 2, 1, 35, 67, 16, torch.float32)
    check(q / 4, k, v, do, scale)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
@pytest.mark.parametrize("dim", SLOW_DIMS)
@pytest.mark.parametrize("n, m", SLOW_LENGTHS)
def test_everything(n, m, dim, layout, dtype):
    check_sums(*inputs(layout, 1, 2, n, m, dim, dtype))


def upstream(case, b, h, n, d):
    """Gradients of o as autograd may hand them over."""
    if case == "of a sum":  # o.sum().backward(): all strides 0
        return torch.ones(()).expand(b, h, n, d)
    if case == "of the first column":
        return torch.ones(b, h, n, 1).expand(b, h, n, d)
    if case == "heads merged":
        return torch.randn(b, n, h, d).transpose(1, 2)
    return torch.randn(b, h, d, n).mT  # "columns"


@pytest.mark.parametrize("case", ["of a sum", "of the first column", "heads merged", "columns"])
@pytest.mark.parametrize("n, m", [(37, 70), (64, 64)])
def test_any_strides_of_the_upstream_gradient(n, m, case):
    torch.manual_seed(0)
    q, k, v, do = inputs(separate, 2, 2, n, m, 24, torch.float32)
    check(q, k, v, upstream(case, *do.shape))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_gradients_of_some_inputs_only(wanted):
    q, k, v, do = inputs(separate, 1, 2, 20, 35, 16, torch.float32)
    all_of_them = dict(zip("qkv", by_kernel(q, k, v, do)[1:], strict=True))
    leaves = dict(zip("qkv", (q, k, v), strict=True))
    wanted_leaves = [leaves[name].requires_grad_() for name in wanted]
    grads = torch.autograd.grad(attention(q, k, v), wanted_leaves, do)
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, all_of_them[name])


@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_heads_merge_without_a_copy(layout):
    q, k, v, _ = inputs(layout, 2, 3, 18, 21, 16, torch.float16)
    o = attention(q, k, v)
    merged = o.transpose(1, 2).reshape(2, 18, 48)
    assert merged.is_contiguous() and merged.data_ptr() == o.data_ptr()


@pytest.mark.parametrize("scale", [0.25, -1.0])
@DTYPES
def test_log_sum_exp(scale, dtype):
    q, k, v, _ = inputs(tokens, 1, 2, 66, 35, 40, dtype)
    lse = _forward(q, k, v, scale)[1]
    assert lse.dtype == torch.float32 and lse.shape == (1, 2, 66)
    natural = torch.logsumexp(scale * q.double() @ k.double().mT, dim=-1)
    assert error(lse, natural * math.log2(math.e)) < 5e-6


@pytest.mark.parametrize("n, m", [(35, 35), (18, 140)])
def test_tf32x3_is_accurate_enough_and_tf32_would_not_be(n, m):
    """The bounds of float32 hold with products as a GPU computes them, not only exact ones."""
    case = inputs(tokens, 1, 2, n, m, 64, torch.float32)
    truth = exact(*case, 64**-0.5)
    with tensor_cores() as seen:
        check(*case)
    assert len(seen) > 0 and set(seen) == {TF32X3}  # every product of every kernel
    with tensor_cores({TF32X3: TF32}):
        worse = by_kernel(*case)
    assert all(error(t, true) > 10 * 5e-6 for t, true in zip(worse, truth, strict=True))


def test_rounding_to_tf32():
    ulp = 2.0**-10
    x = torch.tensor([1 + 0.5 * ulp, 1 + 0.49 * ulp, -1 - 0.5 * ulp, 1.75, torch.inf, 2.0**-100])
    assert nearest(x.numpy()).tolist() == [1 + ulp, 1, -1 - ulp, 1.75, math.inf, 2.0**-100]
    assert truncated(x.numpy()).tolist() == [1, 1, -1, 1.75, math.inf, 2.0**-100]
