"""group_norm_silu's kernels as machine code for GPUs that are not here, at the chapters' shapes."""

import functools
import importlib.util
import math
import re

import pytest
import torch

from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs triton, not interpreting", allow_module_level=True)

from kernels.group_norm_silu import (
    WIDEST,
    Plan,
    _backward,
    _forward,
    _parameter_gradients,
    plan_tiles,
)
from tests.cases.kernel_cases import PUBLIC
from tests.cases.offline import compiled_for, inspect_kernel

GROUPS = 32
# (batch, channels, side, scale and shift?): configs/cifar10_ddpm.yaml, behind skips too;
CIFAR = [
    (128, channels, side, False)
    for side, widths in {32: (128, 256, 384), 16: (256, 512), 8: (256, 512), 4: (256, 512)}.items()
    for channels in widths
]
# the latent U-Net of configs/imagenet100.yaml, width 192 times 1, 2, 4, on latents of 16 and 32;
LATENTS = [
    (64, channels, side, True)
    for side in (32, 16, 8, 4)
    for channels in (192, 384, 576, 768, 1152, 1536)
]
# its autoencoder, without and with the first folding of the image.
AUTOENCODER = [(8, 128, 128, False), (8, 128, 64, False), (8, 256, 64, False), (8, 512, 32, False)]

# Where these networks norm most, one shape for each kind of tile; the rest is slow.
CHOSEN = [
    (128, 128, 32, False),
    (128, 256, 16, False),
    (128, 512, 4, False),
    (64, 192, 16, True),
    (64, 576, 16, True),
    (64, 768, 4, True),
    (64, 192, 32, True),
    (8, 128, 128, False),
]
REST = [shape for shape in CIFAR + LATENTS + AUTOENCODER if shape not in CHOSEN]
HALF = (torch.bfloat16, True)
FULL = (torch.float32, True)
PLANAR = (torch.bfloat16, False)  # not channels_last


def name_of(shape):
    batch, channels, side, film = shape
    return f"{batch}x{channels}x{side}x{side}{'_film' if film else ''}"


@functools.cache
def launched(target, shape, dtype, innermost):
    """What `_forward` and `_backward` launch for x of `shape`, compiled for `target`.

    The memory of the tensors is never touched: they may be as large as the chapters'. A kernel
    whose constants have been met before is not compiled again.
    """
    batch, channels, side, film = shape
    memory = torch.channels_last if innermost else torch.contiguous_format
    size = (batch, channels, side, side)
    x, dy = (torch.empty(size, dtype=dtype, memory_format=memory) for _ in range(2))
    weight, bias = torch.empty(2, channels)
    scale = shift = None
    if film:
        scale, shift = torch.empty(batch, 2 * channels, dtype=dtype).chunk(2, dim=1)
    statistics = torch.empty(batch, GROUPS, 2)
    with compiled_for(target) as forward:
        _forward(x, weight, bias, scale, shift, GROUPS, 1e-5, True)
    with compiled_for(target) as backward:
        _backward(dy, x, weight, bias, scale, shift, statistics, GROUPS, True)
    return forward, backward


def assert_no_spills(launches):
    for launch in launches:
        report = inspect_kernel(launch.kernel)
        assert report.spill_bytes == 0, report


def wide_instructions(launch, tensors, itemsize):
    """(bits, instructions): those that a thread needs for its share of the tiles, 1 at least.

    16 bytes at a time, or as many as a row of a tile is a multiple of.
    """
    constants = launch.constants
    together = constants["GROUPS"] * constants["SIZE"]
    row = together if constants["INNERMOST"] else constants["P"]
    width = math.gcd(16, row * itemsize)
    share = together * constants["ROWS"] * itemsize / width / (32 * constants["num_warps"])
    return 8 * width, max(1, tensors * math.floor(share))


def assert_fit_for_hopper(forward, backward, itemsize):
    """Memory is what they wait for: each lane asks for as much at a time as may be, and where two
    passes are taken, a multiprocessor has 12 warps in flight. A single pass has all in registers.

    What is not wide are parameters, statistics and partial results, a few numbers for each tile.
    """
    assert_no_spills([*forward, *backward])
    for launches, read in ((forward, 1), (backward, 2)):  # x, and dy
        for launch in launches:
            report = inspect_kernel(launch.kernel)
            assert 64 * report.occupancy >= 12 or launch.constants["CHUNKS"] == 0, report
            bits, wide = wide_instructions(launch, read, itemsize)
            assert report.load_widths.get(bits, 0) >= wide, report
        bits, wide = wide_instructions(launch, 1, itemsize)  # the last one writes y or dx
        assert report.store_widths.get(bits, 0) >= wide, report


default_and_slow = [
    *[pytest.param(shape, *HALF, id=f"{name_of(shape)}-bf16") for shape in CHOSEN],
    *[pytest.param(shape, *FULL, id=f"{name_of(shape)}-fp32") for shape in CHOSEN[:2]],
    *[pytest.param(shape, *PLANAR, id=f"{name_of(shape)}-nchw") for shape in CHOSEN[:1]],
    *[
        pytest.param(shape, *kind, id=f"{name_of(shape)}-{label}", marks=pytest.mark.slow)
        for kind, label, shapes in (
            (HALF, "bf16", REST),
            (FULL, "fp32", CHOSEN[2:] + REST),
            (PLANAR, "nchw", CHOSEN[1:] + REST),
        )
        for shape in shapes
    ],
]


@pytest.mark.parametrize("shape, dtype, innermost", default_and_slow)
def test_on_hopper(shape, dtype, innermost):
    assert_fit_for_hopper(*launched("sm_90", shape, dtype, innermost), dtype.itemsize)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("shape", [CHOSEN[0], CHOSEN[3], CHOSEN[-1]], ids=name_of)
def test_elsewhere(target, shape):
    forward, backward = launched(target, shape, *HALF)
    assert_no_spills([*forward, *backward])


def assert_fit_for_turing(launches, itemsize):
    """A multiprocessor of sm_75 has room for 1024 threads, and a block for 64 KiB."""
    assert_no_spills(launches)
    for launch in launches:
        report = inspect_kernel(launch.kernel)
        assert report.shared <= 64 * 1024 and report.warps <= 32, report
        bits, _ = wide_instructions(launch, 1, itemsize)
        assert report.load_widths.get(bits, 0) > 0, report


TURING = {"fp16": (torch.float16, True), "fp32": FULL, "nchw": (torch.float16, False)}


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
@pytest.mark.parametrize("shape", [CHOSEN[0], CHOSEN[3], CHOSEN[-1]], ids=name_of)
def test_on_turing(shape, kind):
    forward, backward = launched("sm_75", shape, *TURING[kind])
    assert_fit_for_turing([*forward, *backward], TURING[kind][0].itemsize)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TURING)
@pytest.mark.parametrize("shape", CIFAR + LATENTS + AUTOENCODER, ids=name_of)
def test_everything_on_turing(shape, kind):
    forward, backward = launched("sm_75", shape, *TURING[kind])
    assert_fit_for_turing([*forward, *backward], TURING[kind][0].itemsize)


@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.name)
def test_published_shapes(case):
    """Samples of up to 168 million numbers, whose offsets have 32 bits."""
    assert math.prod(case.shape[1:]) < 2**31
    inputs = case.inputs("cpu", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    with compiled_for("sm_90") as forward:
        case.launch(inputs, backward=False)
    with compiled_for("sm_90") as backward:
        case.launch(inputs, backward=True)
    assert_fit_for_hopper(forward, backward, case.dtype.itemsize)
    for launch in (*forward, *backward):
        assert launch.grid[0] >= 3 * 132  # work for each multiprocessor of an H100


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("kind", [HALF, FULL, PLANAR], ids=["bf16", "fp32", "nchw"])
@pytest.mark.parametrize("shape", CIFAR + LATENTS + AUTOENCODER, ids=name_of)
def test_everything_elsewhere(target, shape, kind):
    forward, backward = launched(target, shape, *kind)
    assert_no_spills([*forward, *backward])


# bf16, channels_last, 32 groups: the fastest that an H200 was asked for, or near to it.
PLANS = {  # (batch, channels, side): the plan of the forward pass, and of the gradient
    (128, 128, 32): (Plan(4, 16, 1024, 4, 0, 0), Plan(4, 16, 1024, 16, 0, 0)),
    (128, 256, 16): (Plan(4, 32, 256, 4, 0, 0), Plan(4, 32, 256, 4, 0, 0)),
    (128, 512, 16): (Plan(2, 32, 256, 4, 0, 0), Plan(2, 32, 256, 4, 0, 0)),
    (128, 256, 8): (Plan(4, 32, 64, 1, 0, 0), Plan(4, 32, 64, 1, 0, 0)),
    (32, 192, 16): (Plan(4, 32, 256, 4, 0, 0), Plan(4, 32, 256, 4, 0, 0)),
    (32, 576, 16): (Plan(1, 32, 256, 4, 0, 0), Plan(1, 32, 256, 4, 0, 0)),
    (32, 192, 32): (Plan(2, 16, 1024, 8, 0, 0), Plan(2, 16, 1024, 16, 0, 0)),
    (32, 576, 32): (Plan(1, 32, 1024, 8, 0, 0), Plan(2, 64, 64, 8, 4, 256)),
    (32, 128, 64): (Plan(8, 32, 256, 8, 4, 1024), Plan(8, 32, 128, 4, 5, 896)),
    (16, 128, 128): (Plan(8, 32, 256, 8, 8, 2048), Plan(8, 32, 128, 4, 8, 2048)),
}


@pytest.mark.parametrize("shape", PLANS, ids=lambda shape: "x".join(map(str, shape)))
def test_plans_at_the_chapters_shapes(shape):
    """All but 32x192x16x16 backward were timed on an H200."""
    batch, channels, side = shape
    for backward, plan in enumerate(PLANS[shape]):
        assert plan == plan_tiles(batch, channels, side**2, GROUPS, 2, True, bool(backward))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("groups, channels", [(4, 16), (1, 8), (2, 24)])
def test_few_channels_are_taken_all_together(groups, channels, backward):
    """No row reaches 64 bytes; that of all groups at least shares no sector."""
    plan = plan_tiles(2, channels, 512**2, groups, 2, True, backward)
    assert plan.groups == groups and plan.chunks > 0


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_widest_group_spills_nothing(target, side):
    size = (8, WIDEST, side, side)
    x = torch.empty(size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight, parts = torch.empty(WIDEST), torch.empty(2, 8, WIDEST)
    with compiled_for(target) as launches:
        _forward(x, weight, weight, *parts, 1, 1e-5, True)
        _backward(x, x, weight, weight, *parts, torch.empty(8, 1, 2), 1, True)
    assert len(launches) == (2 if side == 1 else 4)
    assert_no_spills(launches)


def products_between_lanes(ptx):
    """How many products a lane sends to another as they are, which then adds its own to it."""
    products = set(re.findall(r"mul(?:\.rn)?\.f32\s+(%\w+),", ptx))
    moved = dict(re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx))
    sent = re.findall(r"shfl\.sync\.\w+\.b32\s+%\w+(?:\|%\w+)?, (%\w+),", ptx)
    assert sent
    return sum(source in products or moved.get(source) in products for source in sent)


# Where a thread holds one row of a tile; the last takes two passes.
ONE_ROW = [((2, 192, 5, 5), torch.bfloat16), ((2, 96, 5, 5), FULL[0]), ((2, 512, 101, 67), FULL[0])]


@pytest.mark.parametrize("shape, dtype", ONE_ROW, ids=str)
def test_all_lanes_come_to_the_same_sum(shape, dtype):
    """ptxas fuses x · x + what another lane sent, and so rounds the product of one lane only.

    Lanes then stored copies of a sum that differ in the last bit at one address, which racecheck
    found on an H200.
    """
    x, weight = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
    parts, statistics = torch.empty(2, *shape[:2]), torch.empty(shape[0], GROUPS, 2)
    with compiled_for("sm_90") as launches:
        _forward(x, weight, weight, *parts, GROUPS, 1e-5, True)
        _backward(x, x, weight, weight, *parts, statistics, GROUPS, True)
    assert len(launches) == (2 if shape[2] == 5 else 4)
    assert not any(products_between_lanes(launch.kernel.asm["ptx"]) for launch in launches)


def test_large_batches_stay_within_the_grid_and_32_bits():
    """Axes 1 and 2 of a grid end at 65,535, and offsets of samples go beyond 2³¹."""
    forward, backward = launched("sm_90", (70_000, 64, 1, False), *HALF)
    for launch in (*forward, *backward):
        assert launch.grid[0] >= 70_000 and set(launch.grid[1:]) <= {1}
        assert "arith.muli" in launch.kernel.asm["ttir"]
        assert any(
            "arith.muli" in line and "i64" in line
            for line in launch.kernel.asm["ttir"].splitlines()
        )


def test_one_launch_where_a_group_fits_and_two_elsewhere():
    for shape, launches in ((CHOSEN[0], 1), (CHOSEN[1], 1), (CHOSEN[-1], 2)):
        forward, backward = launched("sm_90", shape, *HALF)
        assert len(forward) == len(backward) == launches


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("batch, channels", [(128, 256), (64, 192), (1, 1536), (3, 33)])
def test_gradients_of_the_parameters(batch, channels, film, target):
    """No spills; bf16 scale and shift as under autocast, fp16 on sm_75, which has no bf16."""
    half = torch.float16 if target == "sm_75" else torch.bfloat16
    sums, (weight, bias) = torch.empty(batch, 2, channels), torch.empty(2, channels)
    scale = shift = None
    if film:
        scale, shift = torch.empty(batch, 2 * channels, dtype=half).chunk(2, dim=1)
    with compiled_for(target) as launches:
        _parameter_gradients(sums, weight, bias, scale, shift, {})
    assert [launch.name for launch in launches] == ["group_norm_parameters"]
    assert_no_spills(launches)
