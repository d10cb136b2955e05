"""group_norm_silu against the formula written out in float64."""

import pytest
import torch

from kernels import group_norm_silu
from tests.cases.kernel_cases import GroupNorm
from tests.cases.verify import gradients, verify

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def naive(x, groups, weight, bias, eps=1e-5, scale=None, shift=None, silu=True):
    """Group by group, channel by channel, in float64."""
    x = x.double()
    y = torch.empty_like(x)
    size = x.shape[1] // groups
    for c in range(x.shape[1]):
        run = x[:, c // size * size : (c // size + 1) * size].flatten(1)
        mean = run.mean(1)
        var = ((run - mean[:, None]) ** 2).mean(1)
        column = (x[:, c].reshape(len(x), -1) - mean[:, None]) / (var[:, None] + eps).sqrt()
        column = column * weight[c].double() + bias[c].double()
        if scale is not None:
            column = column * (1 + scale[:, c, None].double()) + shift[:, c, None].double()
        y[:, c] = column.view(x[:, c].shape)
    return y / (1 + (-y).exp()) if silu else y


def inputs(shape, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(shape, generator=g)
    weight, bias = (torch.randn(shape[1], generator=g) for _ in range(2))
    scale, shift = (torch.randn(shape[:2], generator=g) for _ in range(2))
    return x, weight, bias, scale, shift


def worst(y, reference):
    return ((y - reference).abs() / reference.abs().clamp(min=1)).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 8, 4, 4), 4),
        ((3, 6, 7, 5), 2),
        ((2, 5, 3, 3), 1),
        ((2, 5, 9, 1), 5),
        ((1, 64, 8, 8), 32),
    ],
)
def test_equals_float64_formula(shape, groups, film, silu, layout):
    x, weight, bias, scale, shift = inputs(shape)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    film = {"scale": scale, "shift": shift} if film else {}
    y = group_norm_silu(x, groups, weight, bias, silu=silu, **film)
    assert y.dtype == torch.float32
    assert y.stride() == x.stride()
    assert worst(y, naive(x, groups, weight, bias, silu=silu, **film)) < 3e-6


@pytest.mark.parametrize("shape", [(3, 18), (3, 6, 11), (2, 6, 3, 2, 5)])
def test_any_number_of_dimensions(shape):
    x, weight, bias, scale, shift = inputs(shape)
    reference = naive(x, 3, weight, bias, 1e-3, scale, shift)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    for each in (x, strided):
        y = group_norm_silu(each, 3, weight, bias, eps=1e-3, scale=scale, shift=shift)
        assert worst(y, reference) < 3e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-4), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_precise_at_mean_1000(dtype, tolerance, layout):
    x, weight, bias, scale, shift = inputs((2, 8, 16, 16), mean=1000.0)
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    y = group_norm_silu(x, 4, weight, bias, scale=scale, shift=shift)
    assert y.dtype == dtype and y.stride() == x.stride()
    assert worst(y, naive(x, 4, weight, bias, scale=scale, shift=shift)) < tolerance


def test_autocast_keeps_fp32():
    x, weight, bias, scale, shift = inputs((2, 8, 5, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(x, 4, weight, bias, scale=scale, shift=shift)
    assert worst(y, naive(x, 4, weight, bias, scale=scale, shift=shift)) < 3e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("film", [True, False])
def test_gradients(film, silu, layout):
    x, *rest = (t.double().requires_grad_() for t in inputs((2, 4, 3, 2)))
    rest = rest if film else rest[:2]

    def function(x, weight, bias, scale=None, shift=None):
        x = x.contiguous(memory_format=LAYOUTS[layout])
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, silu=silu)

    assert torch.autograd.gradcheck(function, (x, *rest))


def conditioned(case):
    """Inputs of a case and a gradient of its result, in float64."""
    torch.manual_seed(0)
    inputs = {name: t.double() for name, t in case.inputs("cpu").items()}
    return inputs, torch.randn_like(case.reference(inputs)[0])


@pytest.mark.parametrize("moved", ["weight", "bias", "shift"])
def test_a_rounding_moves_the_gradient_of_x_by_its_sensitivity(moved):
    """What cases allow for. The gradient's two means over a group move by theirs at most."""
    case = GroupNorm("here", 4, 160, 7, adagn=True, dtype=torch.float32)
    inputs, dy = conditioned(case)
    step = 1e-7
    nudged = inputs | {moved: inputs[moved] * (1 + step)}
    change = gradients(case, case.reference, nudged, dy)["x"]
    change = (change - gradients(case, case.reference, inputs, dy)["x"]).abs() / step
    sensitivity = case.sensitivity(inputs, dy)["x"]
    runs = inputs["x"].reshape(4, case.groups, -1)
    xhat = ((runs - runs.mean(2, keepdim=True)) / runs.std(2, keepdim=True, correction=0)).abs()
    of_group = sensitivity.reshape(runs.shape)
    means = of_group.mean(2, keepdim=True) + xhat * (of_group * xhat).mean(2, keepdim=True)
    assert (change <= 1.001 * (sensitivity + means.view(change.shape)) + 1e-6).all()
    assert (change > 0.5 * sensitivity).double().mean() > 0.05  # it is no larger than it must be


def test_a_wrong_gradient_is_found_beside_that_sensitivity():
    case = GroupNorm("here", 4, 160, 7, adagn=True, dtype=torch.float32)
    inputs, dy = conditioned(case)
    inputs = {name: t.float() for name, t in inputs.items()}

    def nudged(inputs):
        return case.reference(inputs | {"weight": inputs["weight"] * (1 + 1e-5)})

    right, wrong = (
        {error.name: error for error in verify(case, inputs, dy.float(), run)}["x"]
        for run in (case.reference, nudged)
    )
    assert right.right and wrong.share > 2, (right, wrong)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "scale", "shift"])
def test_gradient_of_one_input_alone(wanted):
    """What a frozen network or an input gradient needs; the SiLU is in place only without grad."""
    values = dict(zip(("x", "weight", "bias", "scale", "shift"), inputs((2, 4, 3, 3)), strict=True))
    values[wanted].requires_grad_()

    def gradient(function):
        return torch.autograd.grad(function(groups=2, **values).square().sum(), values[wanted])[0]

    assert worst(gradient(group_norm_silu), gradient(naive)) < 1e-4


def test_inputs_are_left_alone():
    values = inputs((2, 4, 3, 3))
    before = [value.clone() for value in values]
    x, weight, bias, scale, shift = values
    group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_one_value_per_group_gives_the_bias():
    x, weight, bias, *_ = inputs((1, 4, 1, 1))
    y = group_norm_silu(x, 4, weight, bias, silu=False)
    assert (y.flatten() - bias).abs().max() < 1e-4  # rounding of x · 1/√eps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch_in_both_passes(layout):
    x, weight, bias, scale, shift = inputs((0, 4, 3, 3))
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = group_norm_silu(x, 2, weight.requires_grad_(), bias, scale=scale, shift=shift)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4))


def test_bad_arguments_are_named():
    x, weight, bias, scale, shift = inputs((2, 6, 3, 3))
    for match, call in {
        "groups must divide": lambda: group_norm_silu(x, 4, weight, bias),
        "groups must": lambda: group_norm_silu(x, 0, weight, bias),
        "weight must": lambda: group_norm_silu(x, 2, weight[:5], bias),
        "bias must": lambda: group_norm_silu(x, 2, weight, bias[None]),
        "shift is missing": lambda: group_norm_silu(x, 2, weight, bias, scale=scale),
        "scale is missing": lambda: group_norm_silu(x, 2, weight, bias, shift=shift),
        "scale must": lambda: group_norm_silu(x, 2, weight, bias, scale=scale[:1], shift=shift),
        "shift must": lambda: group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift[0]),
        "x must": lambda: group_norm_silu(x.flatten(), 2, weight, bias),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
