"""Who runs an operation: CPU tensors, interpreted kernels, GPUs that are too old, no Triton."""

import subprocess
import sys

import pytest
import torch

from kernels import Row, attention, dispatch, group_norm_silu, sampling_update
from kernels.attention import planned
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
    [
        ((7, 0), None, 0),
        ((7, 5), None, 75),
        ((8, 0), None, 80),
        ((12, 0), None, 120),
        ((9, 4), "6.4", 0),
    ],
    ids=["volta", "turing", "ampere", "blackwell", "amd"],
)
def test_gpus(capability, hip, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "_archs", {})
    for _ in range(2):  # asked, and remembered
        assert dispatch.arch_of(torch.device("cuda", 0)) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("PyTorch runs attention") == (expected == 75)


@pytest.mark.parametrize(
    "dtype, runs", [(torch.float16, True), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_turing_has_kernels_for_two_dtypes_and_none_for_attention(dtype, runs, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    monkeypatch.setattr(dispatch, "_archs", {torch.device("cpu"): 75})
    assert use_kernels(torch.ones(2, dtype=dtype)) == runs
    assert not any(planned(64, itemsize, 75, gradient=False) for itemsize in (2, 4))


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


def test_the_compiler_is_imported_only_where_something_is_compiled(repo):
    program = "import sys, kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=repo, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_for_the_compiler_an_architecture_is_a_constant():
    """As torch.compiler.assume_constant_result marks it."""

    def marked():
        return 1

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(dispatch.arch_of).items()
