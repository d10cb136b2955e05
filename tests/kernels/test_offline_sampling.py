"""The machine code of sampling_update's kernel at the chapters' shapes, with no GPU."""

import importlib.util
import re

import pytest
import torch

from kernels import philox
from kernels.dispatch import INTERPRET
from kernels.sampling_update import _launch

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs triton, not interpreting", allow_module_level=True)

from tests.cases.offline import compiled_for, disassembled, inspect_kernel
from tests.cases.rows import make_rows

ALPHA_BAR = torch.linspace(0.99, 0.01, 9, dtype=torch.float64)
PAIRS = [(8, 4), (4, 2), (2, -1)]
SHAPES = [(64, 3, 32, 32), (64, 4, 16, 16), (64, 4, 32, 32), (64, 1, 28, 28)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16]
# rows, and whether the call has guidance: chapter 1's two, chapter 2's and 3's, and a solver
CALLS = {
    "ddpm": ({}, False),
    "everything": ({"variance": "learned"}, True),
    "ddim, guided": ({"eta": 0.0}, True),
    "dpm-solver++": ({"multistep": True}, False),
}


def compiled(target, call, shape, layout, out_dtype, want_x0=True):
    """The Launch of one step."""
    sampler, guided = CALLS[call]
    learned = sampler.get("variance") == "learned"
    x = torch.zeros(shape).to(memory_format=LAYOUTS[layout])
    out = torch.zeros(shape[0], (1 + learned) * shape[1], *shape[2:], dtype=out_dtype)
    out = out.to(memory_format=LAYOUTS[layout])
    row, seeds = make_rows(ALPHA_BAR, PAIRS, **sampler)[1], torch.arange(shape[0])
    with compiled_for(target) as launches:
        _launch(x, out, row, 1, out if guided else None, 1.5, x, seeds, True, want_x0)
    assert len(launches) == 1
    return launches[0]


def noisy(call):
    return call in ("ddpm", "everything")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_small_and_wide_on_hopper(call, shape, layout, out_dtype):
    report = inspect_kernel(compiled("sm_90", call, shape, layout, out_dtype).kernel)
    assert report.spill_bytes == 0
    assert report.registers <= 40
    assert report.instructions <= (650 if noisy(call) else 250)
    assert report.occupancy >= 0.75
    if layout == "nchw":
        # Each of x, history and an fp32 out takes 128 bits at a time; four values of a bf16 out 64.
        # One more load of 64 bits is that of the seed.
        outs = {"ddpm": 1, "everything": 3, "ddim, guided": 2, "dpm-solver++": 1}[call]
        wide = 2 if call == "dpm-solver++" else 1
        fp32 = out_dtype == torch.float32
        narrow = (0 if fp32 else outs) + noisy(call)
        expected = {64: narrow, 128: wide + outs * fp32}
        assert report.load_widths == {bits: n for bits, n in expected.items() if n}
        assert report.store_widths == {128: 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_compiles_without_spills_elsewhere(target, shape, layout):
    report = inspect_kernel(compiled(target, "everything", shape, layout, torch.bfloat16).kernel)
    assert report.spill_bytes == 0
    assert report.registers <= 48


@pytest.mark.parametrize("out_dtype", [*DTYPES, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("call", ["everything", "ddim, guided"])
def test_small_on_turing(call, shape, layout, out_dtype):
    report = inspect_kernel(compiled("sm_75", call, shape, layout, out_dtype).kernel)
    assert report.spill_bytes == 0
    assert report.shared <= 64 * 1024
    assert report.occupancy == 1  # which allows 64 registers there


@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (2, 70, 6, 6)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_shapes_compile_within_the_same_bounds(shape, layout):
    report = inspect_kernel(compiled("sm_90", "everything", shape, layout, torch.float32).kernel)
    assert report.spill_bytes == 0
    assert report.registers <= 40 and report.instructions <= 650


def test_what_a_call_does_not_use_is_not_compiled():
    """Loads and stores of each call, for one tile of NCHW."""
    counts = {}
    for call in CALLS:
        for want_x0 in (True, False):
            launch = compiled("sm_90", call, SHAPES[0], "nchw", torch.float32, want_x0)
            report = inspect_kernel(launch.kernel)
            counts[call, want_x0] = report.load_widths[128], report.store_widths[128]
    assert counts == {
        ("ddpm", True): (2, 2),
        ("ddpm", False): (2, 1),
        ("everything", True): (4, 2),
        ("everything", False): (4, 1),
        ("ddim, guided", True): (3, 2),
        ("ddim, guided", False): (3, 1),
        ("dpm-solver++", True): (3, 2),
        ("dpm-solver++", False): (3, 1),
    }


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_no_compiler_takes_x0_minus_x0_for_zero(target):
    """That difference makes NaN of what a clamp hides: one for each of a thread's four numbers."""
    kernel = compiled(target, "ddim, guided", SHAPES[0], "nchw", torch.float32).kernel
    in_ptx = re.findall(r"\bsub\.rn\.f32\s+%\w+, (%\w+), \1;", kernel.asm["ptx"])
    in_code = re.findall(r"\bFADD R\d+, (R\d+)(?:\.reuse)?, -\1\b", disassembled(kernel))
    assert len(in_ptx) == len(in_code) == 4


def test_nor_does_that_for_amd():
    kernel = compiled("gfx942", "ddim, guided", SHAPES[0], "nchw", torch.float32).kernel
    differences = r"\bv_pk_add_f32 v\S+, (v\S+), \1 neg_lo:\[0,1\] neg_hi:\[0,1\]"
    assert 2 * len(re.findall(differences, kernel.asm["amdgcn"])) == 2  # of a thread's two numbers


def test_every_step_of_a_sampler_is_the_same_code():
    """Rows 0 and 1 differ in numbers only: nothing is compiled again while sampling."""
    x, seeds = torch.zeros(4, 3, 8, 8), torch.arange(4)
    with compiled_for("sm_90") as launches:
        for step, row in enumerate(make_rows(ALPHA_BAR, PAIRS)[:2]):
            _launch(x, x, row, step, None, 0.0, None, seeds, True, True)
    assert launches[0].kernel is launches[1].kernel


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_batch_fits_the_grid(layout):
    """All programs are on the grid's first axis, which goes to 2³¹ - 1; others stop at 65535."""
    launch = compiled("sm_90", "ddpm", (70_000, 2, 4, 4), layout, torch.float32)
    assert launch.grid == (70_000,)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (3, 5, 7)], ids=str)
def test_the_kernel_of_gaussian(target, shape):
    """No spills, and whole samples leave four numbers at a time where their size is a multiple."""
    with compiled_for(target) as launches:
        for step in (-1, 3):
            philox._launch(torch.Size(shape), torch.arange(shape[0]), step)
    first, second = launches
    programs = {4: 3, 3: 1}[shape[0]]  # of a sample, for 3072 and 35 numbers, 1024 at a time
    assert first.kernel is second.kernel and first.grid == (shape[0] * programs,)
    report = inspect_kernel(first.kernel)
    assert report.spill_bytes == 0 and report.registers <= 40
    if shape[0] == 4:
        assert set(report.store_widths) == {128}
