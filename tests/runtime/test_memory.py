"""What a call needs in memory is counted on tensors that have none, and said before it runs."""

from runtime import plan
from runtime.plan import LiveBytes, free_memory, memory_lines, peak_bytes

import pytest
import torch
from torch import nn

MIB = 2**20


class Wide(nn.Module):
    """x (B,n) -> (B,n) through 4n numbers: at most 1 + 4 + 4 of x are there at a time."""

    def __init__(self, n):
        super().__init__()
        self.widen, self.narrow = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x, unused=None):
        h = self.widen(x)
        h = h.tanh()
        return self.narrow(h)


def test_the_most_that_lives_at_a_time_is_counted():
    """x, then x and 4x, then x, 4x and its tanh: 9 parts; then the tanh and the result are less."""
    with torch.device("meta"):
        net, x = Wide(64).requires_grad_(False), torch.empty(1024, 64)
    assert peak_bytes(net, x, None) == 9 * 1024 * 64 * 4
    assert all(p.device.type == "meta" for p in net.parameters())


def test_it_is_what_tensors_with_memory_take():
    net, x = Wide(32).requires_grad_(False), torch.randn(100, 32)
    with torch.no_grad(), LiveBytes([x, *net.parameters()]) as live:
        net(x)
    weights = sum(p.nbytes for p in net.parameters())
    assert peak_bytes(net, x) == live.peak - weights


def test_a_plan_says_weights_the_larger_need_and_what_is_free(monkeypatch):
    net = nn.Linear(1023, 1024)  # 2^20 parameters, 4 MiB
    monkeypatch.setattr(plan, "free_memory", lambda device: 20 * MIB)
    takes = {"one": 5 * MIB, "the other": 15 * MIB}
    lines = list(memory_lines({"net": net}, takes, torch.device("cpu")))
    assert lines == [
        "parameters: net 1,048,576: 4.0 MiB",
        "beside them: one 5.0 MiB, the other 15.0 MiB",
        "memory (cpu): 19.0 MiB and what PyTorch itself takes; free here: 20.0 MiB",
    ]
    monkeypatch.setattr(plan, "free_memory", lambda device: 18 * MIB)
    *_, last = memory_lines({"net": net}, takes, torch.device("cpu"))
    assert last.startswith("note: that is too little") and "--precision bf16" in last
    monkeypatch.setattr(plan, "free_memory", lambda device: None)
    *_, last = memory_lines({"net": net}, takes, torch.device("cpu"))
    assert last.endswith("what PyTorch itself takes")


def test_free_memory_is_what_the_kernel_says(monkeypatch, tmp_path):
    found = free_memory(torch.device("cpu"))
    assert found is None or MIB < found < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 7))
    assert free_memory(torch.device("cuda:0")) == 5
    file = tmp_path / "meminfo"
    monkeypatch.setattr(plan, "Path", lambda name: file)
    assert free_memory(torch.device("cpu")) is None  # no such file on other systems
    file.write_text("MemTotal: 100 kB\nMemAvailable:      12 kB\n")
    assert free_memory(torch.device("cpu")) == 12 * 1024
    file.write_text("MemTotal: 100 kB\n")
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_the_bytes_of_a_number_are_half_the_memory(dtype):
    with torch.device("meta"):
        net = Wide(8).requires_grad_(False).to(dtype)
        x = torch.empty(16, 8, dtype=dtype)
    assert peak_bytes(net, x) == 9 * 16 * 8 * dtype.itemsize
