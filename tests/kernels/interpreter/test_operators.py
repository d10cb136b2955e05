"""The kernels as PyTorch operators: opcheck, torch.compile, autocast, checkpointing, inference."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kernels import attention, group_norm_silu, sampling_update
from tests.cases.kernel_cases import ATTENTION, NORM
from tests.cases.rows import make_rows

ops = torch.ops.diffusion_book
ROWS = make_rows(torch.linspace(0.99, 0.01, 9, dtype=torch.float64), [(6, 3), (3, -1)])


def images(*shape, dtype=torch.float32, channels_last=True):
    x = torch.randn(*shape, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def norm_arguments(dtype=torch.float32, channels_last=True):
    """x, weight, bias, scale, shift."""
    torch.manual_seed(1)
    x = images(2, 6, 5, 3, dtype=dtype, channels_last=channels_last)
    return [x, torch.randn(6), torch.randn(6), torch.randn(2, 6), torch.randn(2, 6)]


def packed_qkv(dtype=torch.float32):
    """Three (2, 2, 9, 16) views of one (2, 9, 96) projection."""
    torch.manual_seed(2)
    qkv = torch.randn(2, 9, 96, dtype=dtype)
    return qkv, list(qkv.view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0))


def norm(x, weight, bias, scale, shift):
    return group_norm_silu(x, 3, weight, bias, scale=scale, shift=shift)


def attend(qkv):
    """The chapters' use of attention: packed projection in, merged heads out."""
    b, n, width = qkv.shape
    q, k, v = qkv.view(b, n, 3, 2, width // 6).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v).transpose(1, 2).reshape(b, n, width // 3)


def require_grad(tensors):
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
def test_opcheck_group_norm(channels_last, conditioned):
    x, weight, bias, scale, shift = require_grad(norm_arguments(channels_last=channels_last))
    if not conditioned:
        scale = shift = None
    torch.library.opcheck(ops.group_norm_silu, (x, weight, bias, scale, shift, 3, 1e-5, True))
    with torch.no_grad():
        y, statistics = ops.group_norm_silu(x, weight, bias, scale, shift, 3, 1e-5, True)
        arguments = (y, x, weight, bias, scale, shift, statistics, 3, True)
    torch.library.opcheck(
        ops.group_norm_silu_backward, [a.detach() if torch.is_tensor(a) else a for a in arguments]
    )


def test_opcheck_attention():
    _, (q, k, v) = packed_qkv()
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    torch.library.opcheck(ops.attention, (q, k, v, 0.3))
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    o, lse = ops.attention(q, k, v, 0.3)
    torch.library.opcheck(ops.attention_backward, (o, q, k, v, o, lse, 0.3))


@pytest.mark.parametrize("want_x0", [True, False], ids=["x0", "no-x0"])
def test_opcheck_sampling_update(want_x0):
    x, out, uncond = (images(2, 3, 5, 4) for _ in range(3))
    seeds = torch.tensor([3, -5])
    arguments = (x, out, list(ROWS[0]), 0, uncond, 1.5, None, seeds, True, want_x0)
    torch.library.opcheck(ops.sampling_update, arguments)


compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=compiler)]


def gradients(function, inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.manual_seed(3)
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad((y * torch.randn_like(y)).sum(), inputs)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_group_norm(backend):
    inputs = norm_arguments()
    compiled = torch.compile(lambda *a: norm(*a) * 2, fullgraph=True, backend=backend)
    for got, expected in zip(
        gradients(compiled, inputs), gradients(lambda *a: norm(*a) * 2, inputs), strict=True
    ):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_attention(backend):
    qkv, _ = packed_qkv()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for got, expected in zip(gradients(compiled, [qkv]), gradients(attend, [qkv]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_sampling(backend):
    x, out, seeds = images(2, 3, 5, 4), images(2, 3, 5, 4), torch.tensor([3, -5])

    def update(x, out, row, step):
        return sampling_update(x * 0.5, out, row, step=step, seeds=seeds)[0] * 2

    compiled = torch.compile(update, fullgraph=True, backend=backend)
    for step, row in enumerate(ROWS):
        got, expected = (function(x, out, row, step) for function in (compiled, update))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_fake_tensors_have_the_shape_type_and_memory_of_real_ones():
    x, weight, bias, scale, shift = norm_arguments(torch.bfloat16)
    _, qkv = packed_qkv(torch.float16)
    out, seeds = torch.randn_like(x), torch.tensor([1, 2])

    def all_three(x, weight, bias, scale, shift, out, seeds, *qkv):
        step = sampling_update(x, out, ROWS[0], step=0, seeds=seeds)
        return [norm(x, weight, bias, scale, shift), attention(*qkv), *step]

    inputs = [x, weight, bias, scale, shift, out, seeds, *qkv]
    real = all_three(*inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = all_three(*[mode.from_tensor(tensor) for tensor in inputs])
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_keeps_fp32_statistics_and_gives_each_gradient_its_own_type():
    x, *rest = norm_arguments()
    x = (x + 300).bfloat16()  # bf16 sums of these would be off by whole units
    inputs = require_grad([x, *rest])
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(*inputs)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert [t.grad.dtype for t in inputs] == [torch.bfloat16] + [torch.float32] * 4
    plain = norm(*[t.detach() for t in inputs])
    assert torch.equal(y, plain)


def test_autocast_runs_attention_in_half_precision():
    qkv, _ = packed_qkv()
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(qkv)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, attend(qkv.bfloat16()))


def test_checkpointing_changes_nothing():
    qkv, _ = packed_qkv()

    def block(x, weight, bias, scale, shift):
        h = norm(x, weight, bias, scale, shift)
        return attend(h.flatten(1).view(2, 5, 18)[..., :12].contiguous())

    inputs = norm_arguments()
    plain = gradients(block, inputs)
    again = gradients(lambda *a: checkpoint(block, *a, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_operators_are_the_functions(batch, monkeypatch):
    """Whoever is launched by them: tracers, tensors at odd addresses or on another GPU."""
    x, weight, bias, *pair = norm_arguments()
    inputs = [x[:batch], weight, bias, *(t[:batch] for t in pair)]
    qkv = [t[:batch] for t in packed_qkv()[1]]
    for module, function, tensors in ((NORM, norm, inputs), (ATTENTION, attention, qkv)):
        here = gradients(function, tensors)
        monkeypatch.setattr(module, "nobody_traces", lambda _: False)
        for a, b in zip(here, gradients(function, tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True], ids=["function", "operator"])
def test_saved_tensors_may_come_back_in_another_order_of_memory(traced, monkeypatch):
    """As torch.autograd.graph.save_on_cpu gives them back from pinned memory."""
    inputs, (_, qkv) = norm_arguments(), packed_qkv()
    for module, function, tensors in ((NORM, norm, inputs), (ATTENTION, attention, qkv)):
        monkeypatch.setattr(module, "nobody_traces", lambda _: not traced)
        tensors = require_grad([tensor.detach() for tensor in tensors])
        plain = torch.autograd.grad(function(*tensors).square().sum(), tensors)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
            y = function(*tensors)
        moved = torch.autograd.grad(y.square().sum(), tensors)
        for a, b in zip(plain, moved, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    inputs, (_, qkv) = norm_arguments(), packed_qkv()
    expected = [norm(*inputs), attention(*qkv)]
    with mode():
        got = [norm(*inputs), attention(*qkv)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias, scale, shift = norm_arguments()
    scale.requires_grad_()
    norm(x, weight, bias, scale, shift).sum().backward()
    assert scale.grad is not None and x.grad is None and weight.grad is None


def test_sampling_stays_differentiable():
    x, out = images(2, 3, 5, 4), images(2, 3, 5, 4).requires_grad_()
    x_prev, x0_hat = sampling_update(x, out, ROWS[1], step=1, clip=False)
    x_prev.sum().backward()
    assert out.grad.abs().sum() > 0


@pytest.mark.parametrize("operation", ["norm", "attention"])
def test_a_second_derivative_is_refused_where_it_is_taken(operation):
    """Not silently zero; and the first one is right where somebody only asks for a graph."""
    if operation == "norm":
        inputs = require_grad(norm_arguments())
        y = norm(*inputs)
    else:
        inputs = require_grad([t.contiguous() for t in packed_qkv()[1]])
        y = attention(*inputs)
    plain = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    for a, b in zip(plain, first, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first[0].square().sum(), inputs[0])
