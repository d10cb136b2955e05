"""attention's kernels where numbers overflow, are not finite or do not exist; and who runs."""

import sys

import pytest
import torch
from attention_math import (
    DTYPES,
    NAMES,
    TOLERANCE,
    by_kernel,
    by_pytorch,
    check,
    error,
    exact,
    inputs,
    separate,
    tokens,
)
from tf32 import tensor_cores

from kernels import attention
from tests.cases.traffic import count_traffic

INF, NAN = torch.inf, torch.nan
# numpy, which computes for the interpreter, warns of each inf - inf and 0 / 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_pick_one_key(sign, dtype):
    """exp would overflow; less the row's maximum, P is the identity to the last bit."""
    generator = torch.Generator().manual_seed(0)
    v, do = (torch.randn(1, 1, 70, 80, generator=generator).to(dtype) for _ in range(2))
    k = 100 * torch.eye(70, 80, dtype=dtype).expand(1, 1, 70, 80)
    o, dq, dk, dv = by_kernel(sign * k, k, v, do, float(sign))
    assert torch.equal(o, v) and torch.equal(dv, do)
    # dS = 1 · (do · v - do · o) is the rounding of two equal sums, and then times 100
    assert dq.abs().max() < 2e-2 and dk.abs().max() < 2e-2


@DTYPES
@pytest.mark.parametrize("shift", [0, 8], ids=["around-zero", "far-from-zero"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_large_scores(scale, shift, dtype):
    """Some hundreds around zero, or all near ∓4096, where exp2 of minus the log-sum-exp overflows.

    The padding of a partial tile, whose scores would be 0, must not come in with that.
    """
    q, k, v, do = inputs(separate, 1, 2, 35, 70, 64, dtype)
    q, k = 4 * q + shift, 4 * k - shift
    truth = exact(q, k, v, do, scale)
    kernel, pytorch = by_kernel(q, k, v, do, scale), by_pytorch(q, k, v, do, scale)
    s = scale * q.double() @ k.double().mT
    # what float32 loses of scores and log-sum-exps, in forward and, in another order, in backward
    lost = 16 * s.abs().max().item() * 2**-23
    for name, mine, theirs, true in zip(NAMES, kernel, pytorch, truth, strict=True):
        assert mine.isfinite().all(), name
        assert error(mine, true) <= max(2 * error(theirs, true), lost), name


@DTYPES
def test_equal_scores_average_all_values(dtype):
    q, k, v, do = inputs(tokens, 1, 2, 33, 77, 32, dtype)
    check(q, k[:, :, :1].expand_as(k), v, do)  # each query scores all keys alike
    assert error(attention(0 * q, k, v), v.double().mean(2, True)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)], ids=["B=0", "H=0", "N=0"])
@DTYPES
def test_nothing_to_attend(shape, dtype):
    q, k, v, do = inputs(separate, *shape, 9, 16, dtype)
    with count_traffic() as traffic:
        o, dq, dk, dv = by_kernel(q, k, v, do)
    assert traffic.launches == []
    assert o.shape == dq.shape == q.shape and o.dtype == dtype
    assert torch.equal(dk, torch.zeros_like(k)) and torch.equal(dv, torch.zeros_like(v))


def _one(name, index, value):
    def damage(**inputs):
        inputs[name][index] = value

    return damage


def _row(sign):
    """Keys 0 .. 129 score -inf (or +inf) for queries whose first number is positive."""

    def damage(q, k, v):
        k[:, :, :130, 0] = sign * INF

    return damage


def _all_minus_inf(q, k, v):
    q[0, 0, 3, 0], k[0, 0, :, 0] = 1.0, -INF


DAMAGE = {
    "nan in a query": _one("q", (0, 1, 5, 3), NAN),
    "nan in a key": _one("k", (0, 1, 70, 3), NAN),
    "nan in a value": _one("v", (0, 1, 139, 2), NAN),
    "inf in a query": _one("q", (0, 1, 5, 3), INF),
    "inf in a key": _one("k", (0, 1, 139, 3), INF),
    "-inf in a key": _one("k", (0, 1, 0, 3), -INF),
    "inf in a value": _one("v", (0, 1, 0, 2), INF),
    "-inf in a value": _one("v", (0, 1, 139, 2), -INF),
    "-inf in the first 130 keys": _row(-1),
    "+inf in the first 130 keys": _row(1),
    "only scores of -inf": _all_minus_inf,
}


def by_softmax(q, k, v, do):
    """o, dq, dk, dv of the formula as PyTorch computes it; its SDPA calls 0 / 0 a zero."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = torch.softmax(q.shape[-1] ** -0.5 * q @ k.mT, dim=-1) @ v
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("n", [18, 64])
def test_nan_and_inf_spread_as_in_pytorch(n, damage):
    """The same places are NaN and infinite, and all others hold the same numbers."""
    q, k, v, do = inputs(separate, 1, 2, n, 140, 16, torch.float32)
    DAMAGE[damage](q=q, k=k, v=v)
    pytorch = by_softmax(q, k, v, do)
    assert any(not t.isfinite().all() for t in pytorch)
    with tensor_cores():  # tf32x3 makes NaN of inf on its way
        kernel = by_kernel(q, k, v, do)
    for name, mine, theirs in zip(NAMES, kernel, pytorch, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_nan_and_inf_in_the_upstream_gradient(value):
    """The same places are not finite: rowsum(do ∘ o) is inf where rowsum(dP ∘ P) is inf - inf."""
    q, k, v, do = inputs(separate, 2, 2, 18, 40, 16, torch.float32)
    do[0, 1, 5, 3] = value
    kernel, pytorch = by_kernel(q, k, v, do), by_softmax(q, k, v, do)
    for name, mine, theirs in zip(NAMES, kernel, pytorch, strict=True):
        finite = theirs.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        assert torch.allclose(mine[finite], theirs[finite], rtol=1e-5, atol=1e-5), name


def test_offsets_beyond_32_bits(tmp_path):
    """The third sample lies 2³¹ elements after the first; 32 bits take it for 2³¹ before, zeros."""
    b, h, n, d, step = 3, 1, 18, 16, 2**30
    room = torch.from_file(  # 8 GiB, but all holes: the file takes neither disk nor memory
        str(tmp_path / "holes"), shared=True, size=4 * step + 3 * n * d, dtype=torch.float16
    )
    far = room.as_strided((b, h, n, 3, d), (step, 3 * n * d, 3 * d, d, 1), 2 * step)
    small = torch.randn(b, h, n, 3, d, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(small)
    do = torch.ones(b, h, n, d, dtype=torch.float16)
    expected = by_kernel(*small.unbind(3), do)
    for name, mine, right in zip(NAMES, by_kernel(*far.unbind(3), do), expected, strict=True):
        assert torch.equal(mine, right), name


def launched(q, k, v, do=None):
    """Names of the kernels that ran, for o alone or with its gradients."""
    with count_traffic() as traffic:
        attention(q, k, v) if do is None else by_kernel(q, k, v, do)
    return [name for name, _ in traffic.launches]


@DTYPES
@pytest.mark.parametrize("dim", [1, 5, 16, 40, 64, 80, 96, 128])
def test_kernels_run_for_the_dimensions_of_heads(dim, dtype):
    case = inputs(separate, 1, 1, 3, 3, dim, dtype)
    assert launched(*case[:3]) == ["_forward_kernel"]
    assert launched(*case) == ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"]


@pytest.mark.parametrize("dim", [136, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_kernels_run_for_wide_heads_in_half_precision(dim, dtype):
    case = inputs(separate, 1, 1, 3, 3, dim, dtype)
    assert launched(*case) == ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"]


@pytest.mark.parametrize(
    "dim, dtype",
    [
        pytest.param(136, torch.float32, id="136-float32"),
        pytest.param(256, torch.float32, id="256-float32"),
        pytest.param(264, torch.float16, id="264-float16"),
        pytest.param(264, torch.bfloat16, id="264-bfloat16"),
        pytest.param(64, torch.float64, id="64-float64"),
    ],
)
def test_the_reference_runs_where_no_kernel_fits(dim, dtype):
    q, k, v, do = inputs(separate, 2, 2, 5, 9, dim, dtype)
    assert launched(q, k, v) == launched(q, k, v, do) == []
    tolerance = TOLERANCE.get(dtype, 1e-12)
    truth = exact(q, k, v, do, dim**-0.5)
    for name, mine, true in zip(NAMES, by_kernel(q, k, v, do), truth, strict=True):
        assert mine.dtype == dtype and error(mine, true) < tolerance, name
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


def test_a_missing_backward_kernel_is_no_obstacle_without_a_gradient(monkeypatch):
    """The plan is asked for the kernels that will run, and the reference takes the others."""
    module = sys.modules[attention.__module__]
    whole = module.plan

    def forward_only(kernel, *of):
        return whole(kernel, *of) if kernel == "forward" else None

    monkeypatch.setattr(module, "plan", forward_only)
    q, k, v, do = inputs(separate, 1, 2, 5, 9, 16, torch.float32)
    assert launched(q, k, v) == ["_forward_kernel"] and launched(q, k, v, do) == []
    check(q, k, v, do)
    q.requires_grad_()
    with torch.no_grad():
        assert launched(q, k, v) == ["_forward_kernel"]
    with torch.inference_mode():
        assert launched(q, k, v) == ["_forward_kernel"]


def test_autocast_computes_in_its_dtype():
    q, k, v, do = inputs(tokens, 1, 2, 20, 20, 16, torch.float32)
    half = [t.bfloat16() for t in (q, k, v, do)]
    expected = by_kernel(*half)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(q, k, v)
        mixed = attention(half[0], k, v)  # made one dtype by autocast
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected[0]) and torch.equal(mixed, o)
    grads = torch.autograd.grad(o, (q, k, v), half[3])
    for mine, right in zip(grads, expected[1:], strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, right.float())


@pytest.mark.parametrize("position", range(3))
def test_two_dtypes_are_refused(position):
    qkv = [torch.zeros(1, 1, 4, 16) for _ in range(3)]
    qkv[position] = qkv[position].half()
    with pytest.raises(ValueError, match="dtype"):
        attention(*qkv)
