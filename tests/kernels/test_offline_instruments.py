"""tests/cases/offline.py itself: compiling without a GPU, and reading the machine code."""

import importlib.util

import pytest
import torch

from kernels.dispatch import INTERPRET, tl, triton, use_kernels

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs triton, not interpreting", allow_module_level=True)

from tests.cases.offline import CUDA, TARGETS, compiled_for, inspect_kernel


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=(i < n) | (not MASK)), mask=(i < n) | (not MASK))


@triton.jit
def outer_products(x, y, N: tl.constexpr):
    """Holds N x N sums in registers over a loop."""
    i = tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for _ in range(8):
        row = tl.load(x + i)
        total += row[:, None] * row[None, :]
        x += N
    tl.store(y + i[:, None] * N + i[None, :], total)


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


def test_cpu_tensors_take_the_reference_here():
    assert not use_kernels(torch.ones(1))


@pytest.mark.parametrize("target", TARGETS)
def test_an_aligned_copy_is_wide_and_spills_nothing(target):
    x, y = torch.zeros(4096), torch.zeros(4096)
    with compiled_for(target) as launches:
        copy[(4,)](x, y, 4096, BLOCK=1024, MASK=True)
    assert [(launch.name, launch.grid) for launch in launches] == [("copy", (4,))]
    assert launches[0].constants["BLOCK"] == 1024
    report = inspect_kernel(launches[0].kernel)
    assert report.target == target and report.warps == 4 and report.spill_bytes == 0
    assert set(report.load_widths) == {128} == set(report.store_widths)
    assert report.mma == 0 and 10 < report.instructions < 300 and 4 <= report.registers <= 40
    assert not y.any()  # compiled, not launched


def test_an_unaligned_length_narrows_masked_loads():
    x = torch.zeros(4099)
    with compiled_for("sm_90") as launches:
        copy[(5,)](x, x, 4099, BLOCK=1024, MASK=True)
    assert set(inspect_kernel(launches[0].kernel).load_widths) == {32}


def test_spills_are_seen():
    x, y = torch.zeros(8 * 128), torch.zeros(128 * 128)
    with compiled_for("sm_90") as launches:
        outer_products[(1,)](x, y, N=128, num_warps=2)  # 256 sums for each of 64 threads
        outer_products[(1,)](x, y, N=64, num_warps=4)
    spilling, fitting = (inspect_kernel(launch.kernel) for launch in launches)
    assert spilling.spill_bytes > 1000
    assert fitting.spill_bytes == 0 and 32 < fitting.registers < 128
    assert fitting.occupancy == pytest.approx(65536 // (fitting.registers * 32) / 64, abs=0.1)


@pytest.mark.parametrize("target", [*CUDA, "gfx942"])
def test_matrix_instructions_are_seen(target):
    x, out = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64)
    with compiled_for(target) as launches:
        product[(1,)](x, x, out, N=64)
    report = inspect_kernel(launches[0].kernel)
    assert (report.mma > 0) == (target != "sm_75")  # which is why attention has no kernel there
    assert (report.hgmma > 0) == (target == "sm_90")
    assert report.hgmma_columns == ({64: report.hgmma} if target == "sm_90" else {})
    assert report.shared > 0


def test_unknown_target():
    with pytest.raises(KeyError), compiled_for("sm_91"):
        pass
