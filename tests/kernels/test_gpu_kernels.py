"""The kernels as a GPU runs them, where there is one: right at every shape of the chapters, at
further ones, and whoever calls them.

Without a GPU the interpreter (tests/kernels/interpreter) and the compiler (test_offline_*) stand in
for it.
"""

import dataclasses

import pytest
import torch

from kernels.dispatch import INTERPRET, use_kernels

if INTERPRET or not torch.cuda.is_available() or not use_kernels(torch.empty(0, device="cuda")):
    pytest.skip("no GPU that takes the kernels", allow_module_level=True)

from kernels import Row, gaussian, sampling_update
from tests.cases.kernel_cases import CASES
from tests.cases.more_cases import MORE_CASES
from tests.cases.verify import gradients, runs_kernel, verify

CAPABILITY = torch.cuda.get_device_capability()
ARCH = 10 * CAPABILITY[0] + CAPABILITY[1]
ROW = Row(p=1.0, q=0.0, A=1.0, B=0.0)  # x0_hat is x
ONE_OF_EACH = [
    dataclasses.replace(case, batch=4)
    for case in {case.operation: case for case in reversed(CASES)}.values()
]


def named(case):
    return f"{case.operation}-{case.name}"


def made(case, backward=True):
    """Inputs, and the gradient of the result."""
    torch.manual_seed(0)
    inputs = case.inputs("cuda")
    return inputs, torch.randn_like(case.reference(inputs)[0]) if backward else None


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=named)
def test_against_float64(case, backward):
    if backward not in case.directions:
        pytest.skip("this operation has no backward")
    inputs, dy = made(case, backward)
    assert runs_kernel(case, inputs, dy) == case.has_kernel(backward, ARCH)
    wrong = [error for error in verify(case, inputs, dy) if not error.right]
    assert not wrong, wrong


def test_a_clamp_hides_nothing():
    """What is not finite is NaN after it, and all else has the bits that a CPU gives it."""
    ends = [0.0, 1e-38, 0.25, 1.0, 1 + 2**-23, 1e19, 3.4e38, torch.inf, torch.nan]
    x = torch.tensor([*ends, *(-end for end in ends)]).view(1, 1, 3, 6)
    found, right = (
        sampling_update(x.to(device), torch.zeros_like(x, device=device), ROW, step=0)[1]
        for device in ("cuda", "cpu")
    )
    assert found.isnan().sum() == 4 and not found.isinf().any()
    bits = [t.cpu().nan_to_num(nan=7.0).view(torch.int32) for t in (found, right)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
def test_a_captured_call_computes_with_what_its_inputs_now_hold(case):
    inputs, _ = made(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            case.run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        (replayed, *_) = case.run(inputs)
    for t in (t for t in inputs.values() if t.is_floating_point()):
        t.mul_(0.5)
    graph.replay()
    assert torch.equal(replayed, case.run(inputs)[0])


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if True in c.directions], ids=named)
def test_compiled_it_is_the_same_operation(case):
    torch._dynamo.reset()
    inputs, dy = made(case)
    run = torch.compile(case.run, fullgraph=True, dynamic=False)
    assert torch.equal(run(inputs)[0], case.run(inputs)[0])
    there, here = (gradients(case, way, inputs, dy) for way in (run, case.run))
    for name, gradient in there.items():
        assert torch.allclose(gradient.float(), here[name].float(), rtol=1e-2, atol=1e-2), name


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=named)
def test_on_another_stream_it_waits_for_what_was_queued_there(case):
    inputs = {name: t.clone() for name, t in made(case)[0].items()}
    (right, *_), side = case.run(inputs), torch.cuda.Stream()
    late = {name: torch.zeros_like(t) for name, t in inputs.items()}
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(side):
        torch.cuda._sleep(10**8)
        for name, t in late.items():
            t.copy_(inputs[name])
        (found, *_) = case.run(late)
    torch.cuda.synchronize()
    assert torch.equal(found, right)


def test_noise_is_that_of_a_cpu():
    seeds = torch.tensor([17, -3, 2**62])
    there, here = (gaussian((3, 3, 9, 7), seeds, 5, device) for device in ("cuda", "cpu"))
    assert (there.cpu() - here).abs().max() < 4e-6
