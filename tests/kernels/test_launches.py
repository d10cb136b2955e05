"""Calls that cost little: what Triton was asked once is remembered, and nothing else is.

The launches are stubbed (tests/cases/stubbed.py): nothing is computed. That the values are right on
this path is seen in the interpreter, where every test of a public function takes it.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Row, attention, dispatch, group_norm_silu, philox, sampling_update
from kernels.dispatch import INTERPRET, nobody_traces, signature

if INTERPRET:
    pytest.skip("Triton was told to interpret", allow_module_level=True)
pytest.importorskip("triton")

from tests.cases.kernel_cases import ATTENTION, NORM, UPDATE
from tests.cases.stubbed import stubbed_launches

ROW = Row(1.4, 1.0, 0.9, 0.1, S=0.3)


def norm_inputs(channels=64, dtype=torch.bfloat16, side=4):
    x = torch.randn(2, side, side, channels).to(dtype).permute(0, 3, 1, 2)
    weight, bias = (torch.nn.Parameter(torch.randn(channels)) for _ in range(2))
    return x.requires_grad_(), weight, bias


def run_norm(x, weight, bias, **how):
    y = group_norm_silu(x, 32, weight, bias, **how)
    torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))


def run_attention(tokens=16, dim=32, scale=None):
    q, k, v = torch.randn(3, 2, tokens, 2, dim).bfloat16().transpose(2, 3).requires_grad_()
    o = attention(q, k, v, scale=scale)
    torch.autograd.grad(o, [q], torch.ones_like(o))


def run_update(channels=3, row=ROW, dtype=torch.float32, seeds=2, **how):
    x, *both = torch.randn(3, 2, channels, 8, 8).to(dtype)  # out also has what a variance is of
    sampling_update(x, torch.cat(both, 1), row, step=3, seeds=torch.arange(seeds), **how)


@pytest.fixture
def seen():
    with stubbed_launches(keep=True) as seen:
        yield seen


def conditioned(x, weight, bias):
    scale, shift = torch.randn(2, 128).requires_grad_().chunk(2, dim=1)
    group_norm_silu(x, 32, weight, bias, scale=scale, shift=shift).sum().backward()


every_kernel = pytest.mark.parametrize(
    "call, kernels",
    [
        (lambda: run_norm(*norm_inputs()), 3),
        (lambda: run_norm(*norm_inputs(32, side=128)), 5),
        (lambda: conditioned(*norm_inputs()), 3),
        (run_attention, 3),
        (run_update, 1),
        (lambda: philox._launch(torch.Size((2, 50)), torch.arange(2), 7), 1),
    ],
    ids=["norm in one pass", "norm in two", "conditioned", "attention", "update", "gaussian"],
)


@every_kernel
def test_triton_is_asked_once_for_each_kernel(seen, call, kernels):
    for _ in range(3):
        call()
    assert len(seen.launches) == 3 * kernels
    assert len(seen.asked) == kernels and set(seen.asked) <= set(seen.launches)


@every_kernel
def test_what_is_remembered_is_launched_as_triton_itself_does(seen, call, kernels):
    """The same arguments in the same places; those that are compiled in are not looked at."""
    params = {
        name: [p.is_constexpr for p in kernel.params]
        for module in (NORM, ATTENTION, UPDATE, philox)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "params")
    }
    call()
    call()
    for i in range(kernels):
        (how, first), (again, later) = seen.given[i], seen.given[kernels + i]
        compiled_in = params[seen.launches[i]]
        assert how == again and len(first) == len(later) == len(compiled_in)
        for a, b, constant in zip(first, later, compiled_in, strict=True):
            assert constant or looks(a) == looks(b)


def looks(argument):
    if not isinstance(argument, torch.Tensor):
        return type(argument), argument
    return argument.dtype, argument.numel(), argument.data_ptr() % 16


@pytest.mark.parametrize(
    "first, other",
    [
        (lambda: run_norm(*norm_inputs()), lambda: run_norm(*norm_inputs(side=8))),
        (lambda: run_norm(*norm_inputs()), lambda: run_norm(*norm_inputs(dtype=torch.float16))),
        (lambda: run_norm(*norm_inputs()), lambda: run_norm(*norm_inputs(), silu=False)),
        (run_attention, lambda: run_attention(tokens=24)),
        (run_attention, lambda: run_attention(scale=-1.0)),
        (run_update, lambda: run_update(row=ROW._replace(S=0.0))),
        (run_update, lambda: run_update(row=ROW._replace(H=0.2), history=torch.ones(2, 3, 8, 8))),
        (run_update, lambda: run_update(row=ROW._replace(log_var_min=-1.0))),
        (run_update, lambda: run_update(clip=False)),
        (run_update, lambda: run_update(want_x0=False)),
        (run_update, lambda: run_update(dtype=torch.float16)),
        (run_update, lambda: run_update(out_uncond=torch.ones(2, 6, 8, 8), guidance=1.0)),
    ],
)
def test_what_differs_is_another_launch(seen, first, other):
    first()
    before = len(seen.asked)
    other()
    assert len(seen.asked) > before
    after = len(seen.asked)
    first()
    other()
    assert len(seen.asked) == after


def test_the_numbers_of_a_row_are_no_part_of_it(seen):
    for step in range(5):
        run_update(row=ROW._replace(A=0.1 * step, S=0.2 + step))
    assert len(seen.launches) == 5 and len(seen.asked) == 1


def test_any_step_of_the_noise_is_an_int32(seen):
    for step in (-1, 5, 2**31, 2**32 - 2):
        philox._launch(torch.Size((2, 50)), torch.arange(2), step)
    assert len(seen.asked) == 1
    assert [args[2] for _, args in seen.given] == [-1, 5, -(2**31), -2]


def test_triton_looks_at_addresses_that_are_no_multiples_of_16(seen):
    memory = torch.randn(2 * 64 * 16 + 1)
    even, odd = (memory[start:][: 2 * 64 * 16].view(2, 64, 4, 4) for start in (0, 1))
    _, weight, bias = norm_inputs()
    weight, bias = weight.detach(), bias.detach()
    for _ in range(2):
        group_norm_silu(even, 32, weight, bias)
    assert len(seen.asked) == 1
    for _ in range(2):
        group_norm_silu(odd, 32, weight, bias)
    assert len(seen.asked) == 3


def test_a_gradient_that_lies_elsewhere_is_looked_at(seen):
    q, k, v = torch.randn(3, 2, 16, 2, 32).bfloat16().transpose(2, 3).requires_grad_()
    o = attention(q, k, v)
    flat = torch.ones(2, 2, 16, 32).bfloat16()  # contiguous; o's memory runs (B, N, H, D)
    for _ in range(2):
        torch.autograd.grad(o, [q, k, v], flat, retain_graph=True)
    assert seen.asked.count("_dq_kernel") == 2
    for _ in range(2):
        torch.autograd.grad(o, [q, k, v], torch.ones_like(o), retain_graph=True)
    assert seen.asked.count("_dq_kernel") == 3


def test_errors_are_found_beside_what_is_remembered(seen):
    run_norm(*norm_inputs())
    x, weight, bias = norm_inputs()
    with pytest.raises(ValueError, match=r"weight must be \(64,\)"):
        group_norm_silu(x, 32, weight[:-1], bias)
    with pytest.raises(ValueError, match="shift is missing"):
        group_norm_silu(x, 32, weight, bias, scale=torch.ones(2, 64))
    with pytest.raises(ValueError, match="scale is missing"):
        group_norm_silu(x, 32, weight, bias, shift=torch.ones(2, 64))
    run_update()
    x, out = torch.randn(2, 2, 3, 8, 8)
    for wrong, words in (
        ({"step": -1}, "step must be"),
        ({"step": 3, "guidance": 1.0}, "out_uncond is needed"),
        ({"step": 3, "seeds": None}, "seeds are needed: step 3"),
        ({"step": 3, "seeds": torch.arange(3)}, "seeds must be int64"),
        ({"step": 3, "row": tuple(ROW)}, "row must be a Row, got tuple"),
        ({"step": 3, "row": ROW._replace(A=float("nan"))}, "A of the row must be a finite"),
    ):
        how = {"row": ROW, "seeds": torch.arange(2)} | wrong
        with pytest.raises(ValueError, match=words):
            sampling_update(x, out, **how)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Special(torch.Tensor):
    """A subclass, which may want to see every operator."""


def test_tracers_are_noticed():
    x = torch.randn(2, 3)
    assert nobody_traces((x, torch.nn.Parameter(x)))
    assert not nobody_traces((x, x.as_subclass(Special)))
    with Nothing():
        assert not nobody_traces((x,))
    with FakeTensorMode() as mode:
        assert not nobody_traces((mode.from_tensor(x),))
    found = []
    torch.func.vmap(lambda row: (found.append(nobody_traces((row,))), row)[1])(x)
    torch.jit.trace(
        lambda x: (found.append(nobody_traces((x,))), x + 1)[1], (x,), check_trace=False
    )
    with forward_ad.dual_level():
        found.append(nobody_traces((x,)))
    assert found == [False, False, False] and nobody_traces((x,))

    def asks(x):
        return x + 1 if nobody_traces((x,)) else x + 2

    assert torch.equal(torch.compile(asks, backend="eager", fullgraph=True)(x), x + 2)


def test_a_signature_is_all_but_the_numbers():
    x = torch.randn(4, 6)
    assert signature((x,)) == signature((torch.zeros(4, 6),))
    others = [x.double(), x.T, torch.zeros(6, 4), torch.zeros(4, 12)[:, ::2]]
    keys = {signature((x,)), *(signature((other,)) for other in others)}
    assert len(keys) == 5 and None not in keys
    assert signature((torch.randn(25)[1:].view(4, 6),)) is None


def test_a_tensor_of_another_gpu_has_no_signature(monkeypatch):
    """Triton launches on the current device: the operator, which changes to x's, has to do it."""

    class There:
        device, dtype, shape = torch.device("cuda", 1), torch.float32, (4,)

        def data_ptr(self):
            return 0

        def stride(self):
            return (1,)

    monkeypatch.setattr(dispatch, "current_device", lambda: 0)
    assert signature((There(),)) is None
    monkeypatch.setattr(dispatch, "current_device", lambda: 1)
    assert signature((There(),)) is not None


def test_operators_change_to_the_gpu_of_their_tensors(seen, monkeypatch):
    """They launch what has no signature, as tensors of a GPU that is not the current one."""
    inside = []

    @contextlib.contextmanager
    def device_of(tensor):
        before = len(seen.launches)
        yield
        inside.append(len(seen.launches) - before)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (NORM, ATTENTION, UPDATE):
        monkeypatch.setattr(module, "signature", lambda _: None)
    run_norm(*norm_inputs())
    run_attention()
    run_update()
    assert sum(inside) == len(seen.launches) == 2 + 3 + 1
