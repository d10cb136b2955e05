"""Who runs an operation: CPU tensors, interpreted kernels, GPUs that are too old, no Triton."""

import subprocess
import sys

import pytest
import torch

from kernels import Row, attention, dispatch, group_norm_silu, sampling_update
from kernels.dispatch import INTERPRET, use_kernels

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # `import triton` raises ImportError
import torch
from kernels import Row, attention, gaussian, group_norm_silu, sampling_update
x, seeds = torch.randn(2, 4, 3, 3), torch.tensor([1, 2])
y = group_norm_silu(x, 2, torch.ones(4), torch.zeros(4))
q = y.flatten(2).transpose(1, 2)[:, None]
row = Row(p=1.4, q=1.0, A=0.9, B=0.1, S=0.3)
x_prev, x0_hat = sampling_update(x, y, row, step=0, seeds=seeds)
print(attention(q, q, q).isfinite().all() & x_prev.isfinite().all())
"""


def test_without_triton_the_references_run(repo):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tensor(True)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cpu_tensors_take_the_kernels_only_where_they_are_interpreted(dtype):
    assert use_kernels(torch.ones(2, dtype=dtype)) == INTERPRET


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_other_types_take_the_reference(dtype):
    assert not use_kernels(torch.ones(2, dtype=dtype))


def test_other_devices_take_the_reference():
    assert not use_kernels(torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    "capability, hip, expected",
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((9, 4), "6.4", False)],
    ids=["turing", "ampere", "blackwell", "amd"],
)
def test_gpus(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "_runs_on", {})
    for _ in range(2):  # asked, and remembered
        assert dispatch._kernels_run_on(torch.device("cuda", 0)) == expected


def test_tensors_of_other_devices_are_refused():
    x, elsewhere = torch.ones(2, 4, 3, 3), torch.ones(4, device="meta")
    q, k = torch.ones(1, 1, 4, 16), torch.ones(1, 1, 4, 16, device="meta")
    row = Row(p=1.05, q=0.33, A=1.0, B=0.0)
    for call in (
        lambda: group_norm_silu(x, 2, torch.ones(4), elsewhere),
        lambda: attention(q, q, k),
        lambda: sampling_update(x, x.to("meta"), row, step=0),
    ):
        with pytest.raises(ValueError, match="must be on cpu, it is on meta"):
            call()
