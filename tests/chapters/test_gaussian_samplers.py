"""Whole samplers on Gaussian data x0 ~ N(μ, s²), where the best network is known in closed form.

x_t ~ N(√ᾱ μ, ᾱ s² + 1 - ᾱ), so E[ε | x_t] = √(1-ᾱ) (x_t - √ᾱ μ) / (ᾱ s² + 1 - ᾱ), and the
probability-flow ODE keeps (x_t - √ᾱ μ) / √(ᾱ s² + 1 - ᾱ) constant.
"""

import math

import pytest
import torch

import ddim
import ddpm_pixel
import dpm_solver
import improved_ddpm
from kernels import gaussian, sampling_update

MU = 0.6


def evenly_spaced_log_snr(steps):
    """ᾱ with λ = log(α/σ) from 3 down to -3 in `steps` equal intervals."""
    return torch.sigmoid(2 * torch.linspace(3, -3, steps + 1, dtype=torch.float64))


def mean_and_std(ab, s):
    return MU * ab**0.5, (ab * s**2 + 1 - ab) ** 0.5


def network(x, ab, s, prediction="eps"):
    mean, std = mean_and_std(ab, s)
    eps = (1 - ab) ** 0.5 * (x - mean) / std**2
    x0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
    return {"eps": eps, "x0": x0, "v": ab**0.5 * eps - (1 - ab) ** 0.5 * x0}[prediction]


def chain(first, stride):
    ts = list(range(first, -1, -stride))
    return list(zip(ts, (*ts[1:], -1), strict=True))


# ---------------------------------------------------------------------------------- the rows
#
# (ᾱ of the step before or None, ᾱ_t, ᾱ_prev, prediction) -> Row


def ancestral(variance):
    def row(before, a, a_prev, prediction):
        return ddpm_pixel.ancestral_row(a, a_prev, prediction, variance)

    return row


def learned(before, a, a_prev, prediction):
    return improved_ddpm.learned_row(a, a_prev, prediction)


def implicit(eta):
    def row(before, a, a_prev, prediction):
        return ddim.ddim_row(a, a_prev, eta, prediction)

    return row


def rows_of(make_row, alpha_bar, pairs, prediction="eps"):
    numbers = [1.0 if t < 0 else alpha_bar[t].item() for t in (pairs[0][0], *(u for _, u in pairs))]
    before = [None, *numbers]
    steps = zip(before, numbers, numbers[1:], strict=False)
    return [make_row(*step, prediction) for step in steps]


# ------------------------------------------------------------------------------------ the ODE


def ode_error(steps, make_row, prediction="eps", s=0.5):
    """Largest error at t = 0 (before the last row, whose x0_hat is a denoising, not the ODE)."""
    alpha_bar = evenly_spaced_log_snr(240)
    pairs = chain(240, 240 // steps)
    rows = rows_of(make_row, alpha_bar, pairs, prediction)
    mean, std = mean_and_std(alpha_bar[-1].item(), s)
    ray = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1)
    x, history = mean + std * ray, None
    for step, (t, _) in enumerate(pairs[:-1]):
        out = network(x, alpha_bar[t].item(), s, prediction)
        x, history = sampling_update(x, out, rows[step], step=step, history=history, clip=False)
    mean, std = mean_and_std(alpha_bar[0].item(), s)
    return (x - mean - std * ray).abs().max().item()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    "make_row, order", [(implicit(0.0), 1), (dpm_solver.dpmpp_row, 2)], ids=["ddim", "dpmpp"]
)
def test_converges_to_the_ode_at_its_order(make_row, order, prediction):
    errors = [ode_error(steps, make_row, prediction) for steps in (30, 60, 120)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(measured - order) < 0.12 for measured in orders), (errors, orders)


def test_ddim_without_eta_is_deterministic_and_takes_no_seeds():
    first, second = ode_error(10, implicit(0.0)), ode_error(10, implicit(0.0))
    assert first == second


# -------------------------------------------------------------------------------- the moments


def moments_at_zero(s, make_row, stride=1, v_of_pair=None):
    """Mean and variance of 300,000 samples when they reach t = 0, with what they should be."""
    alpha_bar = evenly_spaced_log_snr(40)
    pairs = chain(40, stride)
    rows = rows_of(make_row, alpha_bar, pairs)
    seeds = torch.arange(300)
    mean, std = mean_and_std(alpha_bar[-1].item(), s)
    x = mean + std * gaussian((300, 1, 1000), seeds, -1, "cpu")
    for step, (t, t_prev) in enumerate(pairs[:-1]):
        out = network(x, alpha_bar[t].item(), s)
        if v_of_pair is not None:
            v = v_of_pair(alpha_bar[t].item(), alpha_bar[t_prev].item(), s)
            assert -1 <= v <= 1
            out = torch.cat([out, torch.full_like(out, v)], dim=1)
        x, _ = sampling_update(x, out, rows[step], step=step, seeds=seeds, clip=False)
    mean, std = mean_and_std(alpha_bar[0].item(), s)
    return x.double().mean(), x.double().var(), mean, std**2


def exact_v(at, ap, s):
    """The v that gives IDDPM eq. 15 the true variance of x_prev given x_t.

    It is Var(x_prev | x_t, x0) plus A² Var(x0 | x_t), A the weight of x0 in the posterior's mean.
    """
    beta = 1 - at / ap
    tilde = beta * (1 - ap) / (1 - at)
    spread = (ap**0.5 * beta / (1 - at)) ** 2 * s**2 * (1 - at) / (at * s**2 + 1 - at)
    return 2 * (math.log(tilde + spread) - math.log(tilde)) / (math.log(beta / tilde)) - 1


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize(
    "s, make_row, v_of_pair",
    [
        (1.0, ancestral("large"), None),  # β is the exact reverse variance of N(μ, 1) data
        (1e-6, ancestral("small"), None),  # β̃ that of a single point,
        (1e-6, implicit(0.5), None),  # where every DDIM(η) is exact too
        (0.5, learned, exact_v),  # in between the network has to say
    ],
    ids=["large", "small", "ddim", "learned"],
)
def test_ancestral_sampling_has_the_right_moments(s, make_row, v_of_pair, stride):
    mean, variance, true_mean, true_variance = moments_at_zero(s, make_row, stride, v_of_pair)
    assert abs(mean - true_mean) < 4 * (true_variance / 300_000) ** 0.5
    assert abs(variance / true_variance - 1) < 4 * (2 / 300_000) ** 0.5


def test_noise_of_each_step_is_its_own():
    alpha_bar, seeds = evenly_spaced_log_snr(40), torch.arange(4)
    rows = rows_of(ancestral("small"), alpha_bar, chain(40, 1))[:-1]
    x = torch.zeros(4, 1, 500)
    noise = torch.stack(
        [
            sampling_update(x, x, row, step=step, seeds=seeds)[0].flatten() / row.S
            for step, row in enumerate(rows)
        ]
    )
    expected = torch.stack([gaussian(x.shape, seeds, step, "cpu").flatten() for step in range(40)])
    assert (noise - expected).abs().max() < 1e-5
    assert (torch.corrcoef(noise) - torch.eye(40)).abs().max() < 4.5 / 2000**0.5
