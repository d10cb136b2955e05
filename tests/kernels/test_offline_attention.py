"""What attention's kernels become on GPUs that are not here, through the code that launches them.

Every tile that the launch plan can choose is compiled: nothing may spill registers to memory, all
must fit each GPU's shared memory (that of sm_89 is sm_86's), and the matrix products and loads must
be those the hardware is fast at. The kernels compiled for tests that are not marked slow are those
of the chapters (heads of 64, one head of 256) and of every head dimension on one GPU.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
from interpreter.attention_math import LAYOUTS, image, separate, tokens  # noqa: E402
from recording import Operators  # noqa: E402

from kernels.attention import _backward, _forward  # noqa: E402
from tests.cases.offline import compiled_for, inspect_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
# KiB of shared memory that a block may have (CUDA C programming guide, compute capabilities)
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIMS = (16, 32, 40, 64, 80, 96, 128, 160, 256)
DIMS_OF = {FP32: DIMS[:-2], FP16: DIMS, BF16: DIMS}  # in fp32 there are kernels up to 128
EVEN, RAGGED, CROSS, WHOLE_KEYS = (256, 256), (77, 77), (1024, 77), (77, 256)


def name(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return getattr(value, "__name__", None)


def empty(layout, dtype, dim, lengths, batch=2, heads=2):
    """q, k, v without values: nothing will be computed."""
    return layout(lambda *shape: torch.empty(shape, dtype=dtype), batch, heads, *lengths, dim)


def launch(target, q, k, v):
    with compiled_for(target) as launches:
        o, lse = _forward(q, k, v, 0.5)
        _backward(torch.empty_like(o), q, k, v, o, lse, 0.5)
    assert [launch.name for launch in launches] == ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"]
    return launches


def check(target, dtype, dim, lengths, layout):
    launches = launch(target, *empty(layout, dtype, dim, lengths))
    reports = [inspect_kernel(launched.kernel) for launched in launches]
    spills = 0 if target in ("sm_80", "sm_90", "sm_100") else 36  # as attention.py says
    assert all(report.spill_bytes <= spills for report in reports), reports
    assert all(report.shared <= SHARED[target] * 1024 for report in reports), reports
    assert all(report.mma > 0 for report in reports), reports
    if target == "sm_90" and dtype != FP32:
        assert all(report.hgmma > 0 for report in reports), reports
    if target == "sm_90":  # the one tile that an H200 could not run had products of 8 columns
        assert all(min(report.hgmma_columns, default=16) >= 16 for report in reports), reports
    assert all(report.load_widths.get(128, 0) > 0 for report in reports), reports
    assert all(min(report.load_widths) >= 32 for report in reports), reports  # no single halves


@pytest.mark.parametrize("dim", DIMS)
def test_half_precision_with_partial_tiles_on_sm_90(dim):
    check("sm_90", BF16, dim, RAGGED, tokens)


@pytest.mark.parametrize("dtype, dim", [(BF16, 128), (BF16, 256), (FP32, 32)], ids=name)
def test_partial_queries_and_whole_keys(dtype, dim):
    """Of all lengths these took the most registers."""
    for target in ("sm_80", "sm_90"):
        check(target, dtype, dim, WHOLE_KEYS, tokens)


@pytest.mark.parametrize("dim", [40, 64, 128])
def test_fp32_with_partial_tiles_on_sm_90(dim):
    check("sm_90", FP32, dim, RAGGED, tokens)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype, dim", [(BF16, 64), (BF16, 256), (FP32, 64)], ids=name)
def test_the_chapters_shapes(dtype, dim, target):
    check(target, dtype, dim, EVEN, tokens)


# The lengths of the chapters' images and latents; 49 are 7x7 patches of 4x4 pixels.
SLOW_LENGTHS = [pytest.param(length, marks=pytest.mark.slow) for length in (16, 64, 1024)]


@pytest.mark.parametrize("length", [49, 256, *SLOW_LENGTHS])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_products_of_warp_groups_are_wide(dim, length):
    """A product of n columns reads its left factor anew every n columns: few are slow ones.

    At D = 256 tiles of 32 keys were the fastest in forward all the same. dk and dv of 64 keys fill
    the registers there, and a second warp group then repeats the scores of the first: that kernel
    has n = 16, and no larger tile was found that fits.
    """
    forward, dq, dkdv = (
        inspect_kernel(launched.kernel)
        for launched in launch("sm_90", *empty(tokens, BF16, dim, (length, length)))
    )
    assert min(forward.hgmma_columns) >= (32 if dim == 256 else 64), forward
    assert min(dq.hgmma_columns) >= 32, dq
    assert min(dkdv.hgmma_columns) >= (16 if dim == 256 else 32), dkdv


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [EVEN, RAGGED, CROSS, WHOLE_KEYS], ids=name)
@pytest.mark.parametrize("dtype, dim", [(t, d) for t in DIMS_OF for d in DIMS_OF[t]], ids=name)
@pytest.mark.parametrize("target", NVIDIA)
def test_everything(target, dtype, dim, lengths):
    check(target, dtype, dim, lengths, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [separate, image], ids=name)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("target", NVIDIA)
def test_other_layouts(target, dim, layout):
    check(target, FP16, dim, RAGGED, layout)


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS_OF[FP32])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=name)
def test_amd_has_matrix_instructions(dtype, dim):
    """Kernels are not launched on AMD's GPUs yet; this says that they could be compiled."""
    for launched in launch("gfx942", *empty(tokens, dtype, dim, RAGGED)):
        assert inspect_kernel(launched.kernel).mma > 0


def test_a_grid_of_one_axis():
    """Axes 1 and 2 stop at 65,535, and samples times heads may be more."""
    q, k, v = empty(separate, BF16, 64, (3, 3), batch=70_000)
    for launched in launch("sm_90", q, k, v):
        assert launched.grid[0] == 140_000 and set(launched.grid[1:]) <= {1}


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_launches_copy_nothing(layout):
    """However the inputs lie, there is nothing but views and memory for the results.

    But for rows whose numbers are not neighbours, which wide loads need: these are copied once.
    """
    q, k, v = empty(layout, BF16, 16, (16, 32))
    do = torch.empty(2, 16, 2, 16, dtype=BF16).transpose(1, 2)
    with compiled_for("sm_90") as launches, Operators() as operators:
        o, lse = _forward(q, k, v, 0.5)
        _backward(do, q, k, v, o, lse, 0.5)
    assert len(launches) == 3
    expected = {"transpose", "permute", "detach", "alias"}
    expected |= {"empty", "new_empty", "empty_like", "empty_strided"}
    if any(x.stride(3) != 1 for x in (q, k, v)):
        expected.add("clone")
    assert {name.removeprefix("aten::") for name in operators.names} <= expected
