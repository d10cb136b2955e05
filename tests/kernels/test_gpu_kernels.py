"""The kernels as a GPU runs them, where there is one: right at every shape of the chapters.

Without a GPU the interpreter (tests/kernels/interpreter) and the compiler (test_offline_*) stand in
for it.
"""

import pytest
import torch

from kernels.dispatch import INTERPRET, use_kernels

if INTERPRET or not torch.cuda.is_available() or not use_kernels(torch.empty(0, device="cuda")):
    pytest.skip("no GPU that takes the kernels", allow_module_level=True)

from kernels import gaussian
from tests.cases.kernel_cases import CASES
from tests.cases.verify import runs_kernel, verify


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.name}")
def test_against_float64(case, backward):
    if backward not in case.directions:
        pytest.skip("this operation has no backward")
    torch.manual_seed(0)
    inputs = case.inputs("cuda")
    dy = torch.randn_like(case.reference(inputs)[0]) if backward else None
    assert runs_kernel(case, inputs, dy) == case.has_kernel(backward)
    wrong = [error for error in verify(case, inputs, dy) if not error.right]
    assert not wrong, wrong


def test_noise_is_that_of_a_cpu():
    seeds = torch.tensor([17, -3, 2**62])
    there, here = (gaussian((3, 3, 9, 7), seeds, 5, device) for device in ("cuda", "cpu"))
    assert (there.cpu() - here).abs().max() < 4e-6
