"""The tests of this folder run kernels in Triton's interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter

The variable is read where a kernel is defined, so these tests need a process of their own; in one
without it they are left out, and `make test` runs both.
"""

import importlib.util
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poison():
    """Whatever is allocated without a value is NaN: a lane that a kernel forgets to write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
