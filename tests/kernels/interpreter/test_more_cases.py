"""The further cases of tests/cases/more_cases.py, small, through the kernels.

What a GPU's sanitizer will look at is right in the interpreter.
"""

import pytest
import torch

from tests.cases.more_cases import RAGGED
from tests.cases.verify import runs_kernel, verify

PASSES = [(case, backward) for case in RAGGED for backward in case.directions]
NAMES = [f"{case.operation}-{case.name}-{'backward' if b else 'forward'}" for case, b in PASSES]


@pytest.mark.parametrize("case, backward", PASSES, ids=NAMES)
def test_against_float64(case, backward):
    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    dy = torch.randn_like(case.reference(inputs)[0]) if backward else None
    wrong = [error for error in verify(case, inputs, dy) if not error.right]
    assert not wrong, wrong
    assert runs_kernel(case, inputs, dy) == case.has_kernel(backward)
