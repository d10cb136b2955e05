"""group_norm_silu's Triton kernels against float64: output and every gradient."""

import itertools

import pytest
import torch
from group_norm_math import (
    CASES,
    DENSE,
    DTYPES,
    LARGE,
    SMALL,
    STRIDED,
    channels_innermost,
    check,
    contiguous,
    errors,
    exact_outcome,
    expanded,
    formula,
    inputs,
    kernel_outcome,
    outcome,
    permuted,
    pytorch,
    sliced,
    sums_in_pairs,
)
from recording import interpreted_launches

from kernels.group_norm_silu import (
    _backward,
    _forward,
    _parameter_gradients,
    group_norm_silu,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and inf
every_dense_order = pytest.mark.parametrize("order", DENSE, ids=lambda order: order.__name__)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
with_and_without_film = pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
with_and_without_silu = pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
one_pass_and_two = pytest.mark.parametrize("case", ["7x5", "101x67"])


@pytest.fixture(autouse=True)
def tree_of_sums():
    with sums_in_pairs():
        yield


# ---- right numbers


@every_dtype
@every_dense_order
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case, order, dtype):
    values, dy = inputs(case, dtype=dtype, order=order)
    found = check(case, values, dy)
    assert found["y"].stride() == found["dx"].stride() == values["x"].stride()


@with_and_without_silu
@with_and_without_film
@every_dense_order
@pytest.mark.parametrize("case", ["28x28", "a_group_for_each_channel", "1d", "101x67"])
def test_without_scale_and_shift_or_without_silu(case, order, film, silu):
    check(case, *inputs(case, order=order, film=film, seed=1), silu=silu)


@every_dtype
@pytest.mark.parametrize("order", STRIDED, ids=lambda order: order.__name__)
@pytest.mark.parametrize("case", ["7x5", "1d", "3d", "no_positions"])
def test_any_strides(case, order, dtype):
    values, dy = inputs(case, dtype=dtype, order=order, seed=2)
    check(case, values, dy)


@pytest.mark.slow
@with_and_without_silu
@with_and_without_film
@every_dtype
@pytest.mark.parametrize("order", [*DENSE, *STRIDED], ids=lambda order: order.__name__)
@pytest.mark.parametrize("case", CASES)
def test_everything_with_everything(case, order, dtype, film, silu):
    check(case, *inputs(case, dtype=dtype, order=order, film=film, seed=3), silu=silu)


@pytest.mark.parametrize(
    "dtype, parameters",
    [pair for pair in itertools.product(DTYPES, repeat=2) if pair[1] != "fp32"],
)
def test_parameters_in_half_precision(dtype, parameters):
    values, dy = inputs("7x5", dtype=DTYPES[dtype], parameters=DTYPES[parameters])
    found = check("7x5", values, dy)
    assert found["y"].dtype == DTYPES[dtype] and found["dweight"].dtype == DTYPES[parameters]


@one_pass_and_two
def test_scale_and_shift_as_parts_of_one_projection(case):
    values, dy = inputs(case)
    (batch, channels), g = values["scale"].shape, torch.Generator().manual_seed(5)
    projection = 0.3 * torch.randn(batch, 3 * channels, generator=g)
    _, values["scale"], values["shift"] = projection.chunk(3, dim=1)
    check(case, values, dy)
    values["shift"] = values["shift"].t().contiguous().t()
    values["weight"] = torch.stack([values["weight"]] * 2, dim=1)[:, 0]
    check(case, values, dy)


@every_dense_order
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps(eps, order):
    values, dy = inputs("28x28", order=order)
    check("28x28", values, dy, eps=eps)


@pytest.mark.parametrize("case", ["7x5", "128x128"])
def test_gradients_are_slopes_of_the_formula(case):
    """No autograd on the other side: the formula's change along a line through all inputs."""
    values, dy = inputs(case)
    found = kernel_outcome(case, values, dy)
    g, step = torch.Generator().manual_seed(6), 1e-5
    line = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in values.items()}

    def height(t):
        moved = {name: value.double() + t * line[name] for name, value in values.items()}
        return (formula(groups=CASES[case][1], **moved) * dy).sum()

    slope = (height(step) - height(-step)) / (2 * step)
    parts = {name: (found[f"d{name}"].double() * line[name]).sum() for name in values}
    for part in parts.values():
        assert part.abs() > 1e-3 * slope.abs()  # none is too small to be missed
    assert (sum(parts.values()) - slope).abs() < 2e-6 * sum(part.abs() for part in parts.values())


@every_dense_order
@one_pass_and_two
def test_statistics_and_sums(case, order):
    """What the kernels hand to the code around them, in float32 whatever x is."""
    values, dy = inputs(case, dtype=torch.float16, order=order)
    shape, groups = CASES[case]
    affine = [values[name] for name in ("weight", "bias", "scale", "shift")]
    _, statistics = _forward(values["x"], *affine, groups, 1e-5, True)
    mean, rstd = statistics.unbind(2)
    runs = values["x"].double().reshape(shape[0], groups, -1)
    variance = runs.var(2, correction=0)
    assert mean.dtype == rstd.dtype == torch.float32
    assert errors(mean, runs.mean(2)).max() < 2e-6
    assert errors(rstd, (variance + 1e-5).rsqrt()).max() < 2e-6

    _, sums = _backward(dy, values["x"], *affine, statistics, groups, True)
    sum_dz, sum_dz_xhat = sums.unbind(1)
    exact = exact_outcome(case, values, dy)
    w, b = values["weight"].double(), values["bias"].double()
    assert sum_dz.dtype == sum_dz_xhat.dtype == torch.float32
    assert errors(sum_dz, exact["dshift"]).max() < 5e-6
    assert errors(w * sum_dz_xhat + b * sum_dz, exact["dscale"]).max() < 5e-6

    gradients = _parameter_gradients(sums, *affine, {})
    for name, gradient in zip(("weight", "bias", "scale", "shift"), gradients, strict=True):
        assert gradient.dtype == values[name].dtype
        assert errors(gradient, exact[f"d{name}"]).max() < 5e-6


# ---- which kernels run


@every_dense_order
@pytest.mark.parametrize("case", CASES)
def test_a_group_that_fits_takes_one_launch_and_others_two(case, order):
    values, dy = inputs(case, order=order)
    values = {name: value.requires_grad_() for name, value in values.items()}
    with interpreted_launches(run=False) as forward:
        y = group_norm_silu(groups=CASES[case][1], **values)
    with interpreted_launches(run=False) as backward:
        y.backward(dy)
    assert len(forward) == (1 if case in SMALL else 2)
    assert [name for name, _ in backward[len(forward) :]] == ["group_norm_parameters"]
    assert set(LARGE) | set(SMALL) == set(CASES)


@pytest.mark.parametrize("order", [*DENSE, *STRIDED], ids=lambda order: order.__name__)
def test_an_empty_batch_launches_nothing(order):
    values, dy = inputs("28x28", order=order)
    for name in ("x", "scale", "shift"):
        values[name] = values[name][:0]
    with interpreted_launches() as launches:
        found = outcome(group_norm_silu, "28x28", values, dy[:0])
    assert launches == []
    assert found["y"].shape == found["dx"].shape == (0, 6, 28, 28)
    assert found["dscale"].shape == found["dshift"].shape == (0, 6)
    assert torch.equal(found["dweight"], torch.zeros(6))
    assert torch.equal(found["dbias"], torch.zeros(6))


@pytest.mark.parametrize("dy_order", [contiguous, channels_innermost, sliced, permuted, expanded])
@every_dense_order
@pytest.mark.parametrize("case", ["7x5", "1d"])
def test_the_strides_of_dy_change_nothing(case, order, dy_order):
    values, dy = inputs(case, order=order)
    dy = expanded(dy)
    found = kernel_outcome(case, values, dy_order(dy))
    plain = kernel_outcome(case, values, order(dy))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@one_pass_and_two
def test_dy_of_a_sum_is_one_number_without_strides(case):
    values, _ = inputs(case)
    ones = torch.ones(()).expand_as(values["x"])
    found, exact = kernel_outcome(case, values, ones), exact_outcome(case, values, ones)
    assert errors(found["dx"], exact["dx"]).max() < 2e-6
    assert errors(found["dbias"], exact["dbias"]).max() < 5e-6


@every_dense_order
@one_pass_and_two
def test_inputs_are_left_alone(case, order):
    values, dy = inputs(case, order=order)
    before = {name: value.clone() for name, value in values.items()}
    given = dy.clone()
    kernel_outcome(case, values, dy)
    assert torch.equal(dy, given)
    assert all(torch.equal(values[name], before[name]) for name in values)


# ---- extreme numbers


@every_dense_order
@pytest.mark.parametrize("case", ["28x28", "128x128"])
@pytest.mark.parametrize(
    "dtype, mean, target", [("fp32", 1000.0, 2e-4), ("fp16", 30.0, 1e-3)], ids=["1000", "30"]
)
def test_a_mean_far_from_zero(dtype, mean, target, case, order):
    """No sum of raw squares, and no sum that loses the digits of what is small beside the mean."""
    values, dy = inputs(case, dtype=DTYPES[dtype], order=order, mean=mean)
    check(case, values, dy, target=target)


@every_dense_order
@pytest.mark.parametrize(
    "case, constant", [("7x5", 0.0), ("7x5", 3.0), ("28x28", -1000.0), ("128x128", 3.0)]
)
def test_constant_input_has_no_variance(constant, case, order):
    """xhat is 0, so that y is silu of B and dx is A dz less its mean, times 1/√eps."""
    values, dy = inputs(case, order=order)
    values["x"] = torch.full_like(values["x"], constant)
    found, exact = kernel_outcome(case, values, dy), exact_outcome(case, values, dy)
    assert errors(found["y"], exact["y"]).max() < 2e-6
    assert errors(found["dx"], exact["dx"]).max() < 2e-6 * 1e-5**-0.5
    assert errors(found["dweight"], torch.zeros(1)).max() == 0
    assert errors(found["dbias"], exact["dbias"]).max() < 5e-6


@every_dense_order
@pytest.mark.parametrize("case", ["7x5", "128x128"])
@pytest.mark.parametrize("dtype, size", [("fp32", 1e15), ("fp32", 1e-20), ("fp16", 1.2e4)])
def test_large_and_small_numbers(dtype, size, case, order):
    values, dy = inputs(case, dtype=DTYPES[dtype], order=order)
    values["x"] = order((size * values["x"].double()).to(DTYPES[dtype]))
    found, exact = kernel_outcome(case, values, dy), exact_outcome(case, values, dy)
    tolerance = 2e-6 if dtype == "fp32" else 1e-3
    rstd = (size**2 + 1e-5) ** -0.5  # dx is so large or small
    assert errors(found["y"], exact["y"]).max() < tolerance
    assert errors(found["dx"].double() / rstd, exact["dx"] / rstd).max() < 2 * tolerance
    assert errors(found["dbias"], exact["dbias"]).max() < 5e-6


@every_dtype
@pytest.mark.parametrize("far", [100.0, -100.0, 3e4, -3e4])
def test_far_out_on_the_silu(far, dtype):
    """There the sigmoid is 1 or 0 and exp overflows on the way."""
    values, dy = inputs("7x5", dtype=dtype)
    values["bias"] = values["bias"] + far
    check("7x5", values, dy)


def extremes(value):
    """Where a tensor is NaN, where inf, where -inf."""
    return torch.stack([value.isnan(), value == torch.inf, value == -torch.inf])


BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
BAD_NUMBERS = [
    *itertools.product(["7x5"], ["x", "dy", "weight", "bias", "scale", "shift"], BAD),
    *itertools.product(["8x8_in_32_groups"], ["x", "dy"], ["nan"]),
    *itertools.product(["128x128"], ["x", "dy"], ["nan"]),
]


@every_dense_order
@pytest.mark.parametrize("case, where, bad", BAD_NUMBERS)
def test_nan_and_inf_spread_as_in_pytorch_and_no_further(case, order, where, bad):
    """One bad number. Whatever it does not reach is bit for bit what it was without it.

    Whether what it reaches is NaN or inf is compared where it does not depend on the order of the
    multiplications: PyTorch first makes weight · rstd and weight · rstd · mean, and with a weight
    of inf takes inf from inf where the formula as it is written has inf times a finite number.
    """
    values, dy = inputs(case, order=order)
    clean = kernel_outcome(case, values, dy)
    target = dy if where == "dy" else values[where]
    target[(-1,) * (target.ndim > 1) + (3,) + (2,) * (target.ndim - 2)] = BAD[bad]  # channel 3
    found = kernel_outcome(case, values, dy)
    expected = outcome(pytorch, case, values, dy)
    assert not expected["y" if where != "dy" else "dx"].isfinite().all()
    for name, value in found.items():
        finite = expected[name].isfinite()
        assert torch.equal(value.isfinite(), finite), name
        assert torch.equal(value[finite], clean[name][finite]), name
        if bad == "nan" or where in ("x", "bias", "shift"):
            assert torch.equal(extremes(value), extremes(expected[name])), name


@every_dense_order
def test_overflow_of_half_precision(order):
    """What is beyond float16's largest number becomes inf, as in PyTorch, and not NaN."""
    values, dy = inputs("7x5", dtype=torch.float16, order=order)
    values["weight"] = values["weight"] * 3e4
    found = kernel_outcome("7x5", values, dy)
    expected = outcome(pytorch, "7x5", values, dy)
    assert found["y"].isinf().any() and found["y"].isfinite().any()
    for name in ("y", "dx"):
        assert torch.equal(extremes(found[name]), extremes(expected[name])), name


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "scale and shift"])
def test_parameters_have_the_gradients_of_all_samples(conditioned):
    """More samples than a tile holds, and more channels, neither a multiple of it."""
    batch, channels = 75, 70
    sums = torch.randn(batch, 2, channels)
    weight, bias = torch.randn(2, channels)
    scale, shift = torch.randn(batch, 2 * channels).chunk(2, 1) if conditioned else (None, None)
    found = _parameter_gradients(sums, weight, bias, scale, shift, {})
    S1, S2 = sums.double().unbind(1)
    gain = 1 + scale.double() if conditioned else 1
    right = [(gain * S2).sum(0), (gain * S1).sum(0)]
    right += [weight * S2 + bias * S1, S1] if conditioned else [None, None]
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)
