"""What bench/kernels.py would do on a GPU, rehearsed: verify, then time.

It runs on CPU tensors, whose operations are the references, with a timer for the CPU.
"""

import importlib.util
import re
from functools import partial

import pytest
import torch

from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("the program needs triton, not interpreting", allow_module_level=True)

from bench import measure
from tests.cases import kernel_cases as cases
from tests.cases import verify
from tests.cases.kernel_cases import Attention, GroupNorm, Sampling

TINY = [
    GroupNorm("here", 3, 8, 4, groups=4),
    GroupNorm("here", 3, 8, 4, adagn=True, groups=4),
    GroupNorm("here", 3, 8, 4, adagn=True, groups=4, dtype=torch.float32),
    Attention("here", 2, 2, 9, 16),
    Attention("here", 2, 2, 9, 16, torch.float32),
    Sampling("there", 2, (3, 4, 4)),
    Sampling("there", 2, (4, 4, 4), guidance=1.5, eta=1.0),
    Sampling("there", 2, (4, 4, 4), guidance=1.5, eta=0.0),
]
PASSES = [(case, backward) for case in TINY for backward in case.directions]
NAMES = [f"{case.operation} {case.name} {'backward' if b else 'forward'}" for case, b in PASSES]
every_pass = pytest.mark.parametrize("case, backward", PASSES, ids=NAMES)


def made(case, backward):
    """Inputs and the gradient of the result."""
    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    return inputs, torch.randn_like(case.reference(inputs)[0]) if backward else None


# ------------------------------------------------------------------- verification before any time


@every_pass
def test_what_is_right_is_accepted(case, backward):
    inputs, dy = made(case, backward)
    errors = verify.verify(case, inputs, dy)
    names = [n for n, t in inputs.items() if t.is_floating_point()] if backward else ["result 0"]
    assert {error.name for error in errors} >= {*names, *(f"norm of {name}" for name in names)}
    assert all(error.right for error in errors) and max(error.value for error in errors) > 0


def spoiled(how):
    """`how` applied to the first result of a function, forwards and so backwards."""

    def spoil(function, inputs):
        first, *others = function(inputs)
        return how(first), *others

    return spoil


def one_number(y):
    there = torch.zeros_like(y)
    there[1, 2, 3, 1] = 0.1
    return y + there


class Doubled(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.1 * dy


@every_pass
@pytest.mark.parametrize("how", [lambda y: 1.05 * y, lambda y: y * float("nan")], ids=["5%", "nan"])
def test_a_wrong_kernel_is_refused(case, backward, how):
    inputs, dy = made(case, backward)
    errors = verify.verify(case, inputs, dy, partial(spoiled(how), case.run))
    assert not all(error.right for error in errors)


def test_one_wrong_number_is_refused():
    inputs, _ = made(TINY[0], False)
    errors = verify.verify(TINY[0], inputs, None, partial(spoiled(one_number), TINY[0].run))
    assert [error.right for error in errors if error.name == "result 0"] == [False]


@pytest.mark.parametrize("case", TINY[:5], ids=lambda case: case.name)
def test_a_wrong_gradient_is_refused(case):
    inputs, dy = made(case, True)
    wrong = partial(spoiled(Doubled.apply), case.run)
    assert all(e.right for e in verify.verify(case, inputs, None, wrong))
    assert not all(e.right for e in verify.verify(case, inputs, dy, wrong))
    # A gradient far below 1 is within every bound on single numbers, but not in its norm.
    errors = verify.verify(case, inputs, 1e-6 * dy, wrong)
    assert {error.name for error in errors if not error.right} >= {"norm of " + next(iter(inputs))}


def test_a_case_that_is_wrong_or_fails_has_no_time(bench, monkeypatch, capsys):
    """The others keep theirs; what failed is told on stderr."""
    right = cases.group_norm_silu

    def wrong(x, **rest):
        if x.dtype == torch.float32:
            raise torch.OutOfMemoryError("no room")
        return right(x, **rest) * (1.05 if "scale" in rest else 1)

    monkeypatch.setattr(cases, "group_norm_silu", wrong)
    rows = rehearse(bench, TINY[:3])
    found = {(case.name, cells["pass"]): (cells, fine) for case, cells, fine in rows}
    for way in ("fwd", "bwd"):
        cells, fine = found[TINY[0].name, way]
        assert fine and float(cells["reference"]) > 0
        cells, fine = found[TINY[1].name, way]
        assert not fine and re.match(r"WRONG: error \d\.\de-0\d of ", cells["kernel µs"])
        assert cells.keys() == {"shape", "pass", "kernel µs"}
        cells, fine = found[TINY[2].name, way]
        assert not fine and cells["kernel µs"] == "failed: OutOfMemoryError"
    assert "no room" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ times


def rehearse(bench, chosen, compile=lambda function: function):
    """The rows that a GPU would give, of CPU tensors."""
    (_, copying, _), *rows = bench.timed_rows(
        chosen, "cpu", measure.cpu_timer, compile=compile, copied=1000
    )
    assert re.fullmatch(r"copying reaches [\d,]+ GB/s", copying)
    return rows


def test_the_timed_table_rehearsed(bench, monkeypatch, capsys):
    """main() from beginning to end, on CPU tensors whose operations count as kernels."""
    real = bench.timed_rows

    def on_cpu(chosen, device, timer, progress):
        assert device == "cuda"
        return real(chosen, "cpu", timer, lambda f: f, 1000, progress)

    monkeypatch.setattr(bench, "timed_rows", on_cpu)
    monkeypatch.setattr(bench, "chosen", lambda args: TINY)
    monkeypatch.setattr(measure, "CudaTimer", lambda: measure.cpu_timer)
    monkeypatch.setattr(verify, "runs_kernel", lambda *_: True)
    monkeypatch.setattr(measure, "REPEATS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 9000")
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Imaginary 9000, torch 2") and "driver unknown" in out
    rows = [line for line in out.splitlines() if re.search(r" (fwd|bwd) ", line)]
    assert len(rows) == len(PASSES)
    for line, (case, backward) in zip(rows, PASSES, strict=True):
        assert line.startswith(case.name) and (" bwd " in line) == backward
        assert len(line[32:].split()) == 10 + (case.operation == "attention")
    assert bench.main(["--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.count("| shape | pass | kernel µs |") == 3 == out.count("|---|---|--:|")

    monkeypatch.setattr(cases, "sampling_update", lambda x, out, **rest: (x, out.float()))
    assert bench.main([]) == 1
    assert capsys.readouterr().out.count("WRONG") == 3


def test_a_case_without_a_kernel_says_none(bench):
    ((_, cells, right),) = rehearse(bench, TINY[5:6])
    assert right and cells["kernel µs"] == "none" and "GB/s" not in cells and "×plain" not in cells


def test_a_failed_compilation_is_shown(bench, capsys):
    def fails(function):
        raise RuntimeError("no compiler")

    ((_, cells, right),) = rehearse(bench, TINY[5:6], fails)
    assert right and cells["compiled"] == "failed" and float(cells["plain"]) > 0
    assert "compiled failed: RuntimeError: no compiler" in capsys.readouterr().err


@every_pass
def test_plain_pytorch_can_be_compiled_and_computes_the_same(case, backward, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    inputs, dy = made(case, backward)
    function = measure.compiled(case.plain)
    once = measure.prepared(case, function, inputs, dy)
    once(), once()  # a backward pass twice over one graph
    if case.operation == "sampling" and case.noisy:
        return  # its noise is another
    expected = verify.results(case, case.reference, inputs, dy)
    for name, found in verify.results(case, function, inputs, dy).items():
        tolerance = 1e-5 if found.dtype == case.dtype == torch.float32 else 0.1
        torch.testing.assert_close(found.float(), expected[name].float(), rtol=0, atol=tolerance)


def test_whether_a_kernel_ran_is_seen():
    inputs, dy = made(TINY[0], True)
    assert not verify.runs_kernel(TINY[0], inputs) and not verify.runs_kernel(TINY[0], inputs, dy)

    @torch.library.custom_op(f"{verify.NAMESPACE}::rehearsal", mutates_args=())
    def operation(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    class Other(GroupNorm):
        def run(self, inputs):
            return (operation(inputs["x"]),)

    assert verify.runs_kernel(Other("here", 3, 8, 4, groups=4), inputs)


def test_functions_take_turns():
    calls, cost = [], {"a": [9, 1, 2], "b": [7, 5, 6], "c": [0, 0, 0]}

    def timer(function, repeats):
        name = function()
        calls.append((name, repeats))
        turn = len([n for n, r in calls if (n, r) == (name, 4)]) - 1
        return [100, *[cost[name][max(turn, 0)]] * 3]

    functions = {name: (lambda name=name: name) for name in cost}
    times = measure.take_turns(timer, functions, rounds=3, repeats=4)
    assert times == {"a": 2, "b": 6, "c": 0}  # medians of rounds, of medians of calls
    assert [name for name, repeats in calls if repeats == 4] == ["a", "b", "c"] * 3


def test_the_gpu_timer_on_an_imaginary_clock(monkeypatch):
    """What happens between the two events of a call is that call, and the flush is before."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    def work():
        assert not timer.flush.any()
        timer.flush.fill_(1)
        clock[0] += 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = measure.CudaTimer("cpu", size=100)
    assert timer(work, 4) == [2.5] * 4


def test_bandwidth_counts_reading_and_writing():
    assert measure.copy_bandwidth(lambda function, repeats: [2.0], "cpu", 1000) == 1e6
