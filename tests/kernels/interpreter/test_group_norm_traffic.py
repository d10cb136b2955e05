"""The bytes that group_norm_silu's kernels move, lane by lane, and that nothing is copied."""

import pytest
import torch
from group_norm_math import (
    CASES,
    DENSE,
    DTYPES,
    LARGE,
    SMALL,
    channels_innermost,
    inputs,
)
from recording import Operators, interpreted_launches

from kernels.group_norm_silu import _backward, _forward, group_norm_silu
from tests.cases.kernel_cases import PUBLIC
from tests.cases.traffic import count_traffic
from tests.cases.verify import verify

every_dense_order = pytest.mark.parametrize("order", DENSE, ids=lambda order: order.__name__)


def passes(shape, groups, dtype, order, film=True):
    """Traffic of the forward and of the backward kernels over random numbers of `shape`."""
    batch, channels = shape[:2]
    x, dy = (order(torch.randn(shape).to(dtype)) for _ in range(2))
    weight, bias = torch.randn(2, channels)
    # as the chapters have them: halves of one projection, in x's type
    halves = torch.randn(batch, 2 * channels).to(dtype).chunk(2, dim=1)
    scale, shift = halves if film else (None, None)
    with count_traffic(x=x) as forward:
        y, statistics = _forward(x, weight, bias, scale, shift, groups, 1e-5, True)
    with count_traffic(x=x, dy=dy) as backward:
        found = _backward(dy, x, weight, bias, scale, shift, statistics, groups, True)
    assert y.isfinite().all()
    assert all(value.isfinite().all() for value in found if value is not None)
    return forward, backward


def assert_clean(traffic):
    assert traffic.launches
    assert traffic.out_of_bounds == traffic.write_write == traffic.read_write == 0


# Groups of the chapters' sizes: 4 to 48 channels, as in widths of 128 to 1536 in 32 groups, and no
# more groups than one tile or a few need. What a tile moves does not depend on how many there are.
ONE_PASS = {
    "4_channels_of_32x32": (1, 32, 32, 32),
    "8_channels_of_16x16": (1, 64, 16, 16),
    "12_channels_of_8x8": (2, 96, 8, 8),
    "16_channels_of_8x8": (2, 128, 8, 8),
    "48_channels_of_4x4": (1, 192, 4, 4),  # more samples read fp32 weights again, 6 % more here
}
TWO_PASSES = {
    "4_channels_of_128x128": (1, 16, 128, 128),
    "24_channels_of_37x41": (1, 96, 37, 41),
}


def channels_of(case):
    return int(case.split("_")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_dense_order
@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass_reads_everything_once(case, order, dtype):
    shape = ONE_PASS[case]
    for traffic in passes(shape, shape[1] // channels_of(case), dtype, order):
        assert_clean(traffic)
        assert len(traffic.launches) == 1
        x = traffic.of["x"]
        assert x == (shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize, 0)
        assert traffic.of.get("dy", x) == x
        assert traffic.ratio <= 1.05
        assert traffic.sector_ratio <= (1.05 if order is channels_innermost else 1.10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_dense_order
@pytest.mark.parametrize("case", TWO_PASSES)
def test_two_passes_read_inputs_twice(case, order, dtype):
    shape = TWO_PASSES[case]
    forward, backward = passes(shape, shape[1] // channels_of(case), dtype, order)
    for traffic, bound in ((forward, 1.65), (backward, 1.85)):
        assert_clean(traffic)
        assert len(traffic.launches) == 2
        x = traffic.of["x"]
        assert x == (2 * shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize, 0)
        assert traffic.of.get("dy", x) == x
        assert traffic.ratio <= bound
        assert traffic.sector_ratio <= bound * (1.05 if order is channels_innermost else 1.10)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.name)
def test_two_groups_of_published_shapes(case, backward):
    """Right by float64, and in two passes that move no more than two passes have to."""
    torch.manual_seed(0)
    case = case.counted
    inputs = case.inputs("cpu")
    with count_traffic() as traffic:
        case.launch(inputs, backward)
    assert len(traffic.launches) == 2
    assert traffic.ratio <= (1.85 if backward else 1.65)
    assert_clean(traffic)
    dy = torch.randn_like(inputs["x"]) if backward else None
    wrong = [error for error in verify(case, inputs, dy) if not error.right]
    assert not wrong, wrong


@every_dense_order
def test_two_groups_of_36_bytes_are_read_together(order):
    """18 channels in bfloat16, as 576 in 32 groups: rows of 72 bytes, which lie in 3 sectors of 32.

    An H200 was fastest so, although neighbours then read a part of each other's sectors.
    """
    for traffic in passes((1, 576, 8, 8), 32, torch.bfloat16, order):
        assert_clean(traffic)
        assert traffic.launches[0][1] == (16 if order is channels_innermost else 32,)
        assert traffic.ratio <= 1.05
        assert traffic.sector_ratio <= (3 * 32 / 72 + 0.01 if order is channels_innermost else 1.10)


@pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
@every_dense_order
@pytest.mark.parametrize("case", SMALL | {"101x67": LARGE["101x67"]})
def test_no_lane_out_of_bounds_and_no_race_at_odd_sizes(case, order, film):
    shape, groups = CASES[case]
    for traffic in passes(shape, groups, torch.float32, order, film):
        assert_clean(traffic)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@every_dense_order
@pytest.mark.parametrize("case", CASES)
def test_no_lane_out_of_bounds_and_no_race_anywhere(case, order, dtype):
    shape, groups = CASES[case]
    for traffic in passes(shape, groups, dtype, order):
        assert_clean(traffic)


# ---- what else touches memory: nothing


HARMLESS = {  # these allocate, or look at the same memory with other eyes
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::view",
    "aten::as_strided",
    "aten::detach",
    "aten::alias",
    "aten::permute",
    "aten::select",
    "aten::slice",
    "aten::transpose",
    "aten::movedim",
}
OURS = {"diffusion_book::group_norm_silu", "diffusion_book::group_norm_silu_backward"}


@every_dense_order
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_copied_around_the_launches(case, order):
    """x, dy and the parameters go into the kernels as they lie in memory."""
    values, dy = inputs(case, order=order)
    affine = [values[name] for name in ("weight", "bias", "scale", "shift")]
    groups = CASES[case][1]
    statistics = torch.zeros(len(dy), groups, 2)
    with interpreted_launches(run=False) as launches, Operators() as called:
        _forward(values["x"], *affine, groups, 1e-5, True)
        _backward(dy, values["x"], *affine, statistics, groups, True)
    assert launches and set(called.names) <= HARMLESS


@pytest.mark.parametrize("case", ["7x5", "1d", "3d", "101x67"])
@every_dense_order
def test_the_public_function_copies_nothing(case, order):
    values, dy = inputs(case, order=order, film=False)
    values["x"].requires_grad_()
    with interpreted_launches(run=False) as launches, Operators() as called:
        y = group_norm_silu(groups=CASES[case][1], **values)
        (dx,) = torch.autograd.grad(y, values["x"], dy)
    assert launches
    assert set(called.names) <= HARMLESS | OURS and set(called.names) >= OURS
    assert y.stride() == dx.stride() == values["x"].stride()
