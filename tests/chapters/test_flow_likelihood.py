"""The likelihood of flows, on data whose density is known: change of variables and its probes."""

from runtime.finite import NotFinite

import math

import pytest
import torch
from flow_math import (
    BELL_MEAN,
    BELL_RAY,
    BELL_SHARE,
    BELL_STD,
    MEAN,
    SHAPE,
    STD,
    TIGHT,
    bells,
    best,
    end_of,
    random,
    upwards,
)
from gaussian_data import power

import flow_matching as flow


def log_normal(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


def signs(*shape):
    return random(*shape, seed=7).sign()


@torch.no_grad()
def likelihood(v, x, probe, steps=1, *how):
    return flow.log_likelihood(v, x, probe, upwards(steps), *how)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_likelihood_of_gaussian_data_at_the_samplers_order(sampler, order):
    """Each pixel for itself: signs then give the divergence exactly."""
    x = MEAN + STD * random(4, *SHAPE, seed=8)
    wanted, probe = log_normal(x, MEAN, STD), signs(4, *SHAPE)
    errors = [
        (likelihood(best, x, probe, steps, sampler) - wanted).abs().max() for steps in (80, 160)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1, errors


def test_likelihood_of_gaussian_data_by_rk45():
    x = MEAN + STD * random(4, *SHAPE, seed=8)
    wanted, probe = log_normal(x, MEAN, STD), signs(4, *SHAPE)
    for tolerance in (1e-4, 1e-6, 1e-9):
        found = likelihood(best, x, probe, 1, "rk45", tolerance)
        assert found.shape == (4,) and found.dtype == torch.float64
        # Some thirty steps, each of which may err by that much of numbers up to 3.
        assert (found - wanted).abs().max() < 100 * tolerance
    standard = likelihood(best, x, probe)  # rk45 and 1e-4 are the default
    assert torch.equal(standard, likelihood(best, x, probe, 1, "rk45", 1e-4))
    torch.testing.assert_close(likelihood(best, x, probe, 5), standard, **TIGHT)  # steps of its own


def test_likelihood_of_an_image_is_its_own():
    x, how = MEAN + STD * random(3, *SHAPE, seed=9), (upwards(10), "heun", 1e-4)
    together = flow.log_likelihood(best, x, signs(3, *SHAPE), *how)
    alone = flow.log_likelihood(best, x[1:2], signs(1, *SHAPE), *how)
    torch.testing.assert_close(alone, together[1:2], **TIGHT)


def test_likelihood_of_two_bells():
    """Data that are no Gaussian, so that the divergence differs from place to place."""
    z = (BELL_RAY.view(15, 1) - BELL_MEAN) / BELL_STD
    wanted = ((BELL_SHARE / BELL_STD * (-0.5 * z**2).exp()).sum(1) / math.sqrt(2 * math.pi)).log()
    found = likelihood(bells, BELL_RAY, torch.ones_like(BELL_RAY), 1, "rk45", 1e-9)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def correlated():
    """(mean (8,), covariance (8,8), velocity) of eight pixels that depend on each other."""
    mixed = random(8, 8, seed=10) / 8**0.5
    one, mean = torch.eye(8, dtype=torch.float64), random(8, seed=11)
    covariance = mixed @ mixed.T + 0.1 * one

    def v(x, t):
        variance = (1 - t) ** 2 * covariance + t**2 * one
        gain = torch.linalg.solve(variance, t * one - (1 - t) * covariance)
        return ((x.flatten(1) - (1 - t) * mean) @ gain - mean).view_as(x)

    return mean, covariance, v


def test_likelihood_of_dependent_pixels_by_every_probe():
    """A probe p gives log N(z) + p^T log(C^-1/2) p; all signs together have the trace as mean."""
    mean, covariance, v = correlated()
    probe = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)  # (256,8)
    x = (mean + power(covariance, 0.5) @ random(8, seed=12)).view(1, 2, 2, 2)
    how = probe.view(256, 2, 2, 2), 1, "rk45", 1e-9
    found = likelihood(v, x.expand(256, 2, 2, 2), *how)

    bell = torch.distributions.MultivariateNormal(mean, covariance)
    z = power(covariance, -0.5) @ (x.flatten() - mean)
    values, vectors = torch.linalg.eigh(covariance)
    half_log = vectors @ (-0.5 * values.log()).diag() @ vectors.T
    each = torch.einsum("bi,ij,bj->b", probe, half_log, probe)
    wanted = each - 0.5 * (z @ z) - 4 * math.log(2 * math.pi)
    assert found.std() > 1  # a single probe tells little
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.mean() == pytest.approx(bell.log_prob(x.flatten()).item(), abs=1e-6)


def test_likelihood_of_dependent_pixels_by_random_probes():
    mean, covariance, v = correlated()
    x = (mean + power(covariance, 0.5) @ random(8, seed=13)).view(1, 2, 2, 2)
    found = likelihood(v, x.expand(1000, 2, 2, 2), signs(1000, 2, 2, 2), 100, "heun")
    wanted = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.flatten())
    error = (found.std() / 1000**0.5).item()
    assert abs(found.mean() - wanted) < 4 * error and error < 0.2


@pytest.mark.parametrize("levels", [256, 128, 2, 1])
def test_bits_of_pixels_that_take_so_many_levels_alike(levels):
    """A level is 2/255 of the way from -1 to 1, and with its noise so wide: log2(levels) bits."""
    log_p = -math.log(levels * 2 / 255) * math.prod(SHAPE)
    bits = flow.bits_per_dim(torch.tensor([log_p, 2 * log_p], dtype=torch.float64), SHAPE)
    assert bits[0].item() == pytest.approx(math.log2(levels), abs=1e-12)
    assert (bits[1] - bits[0]).item() == pytest.approx(math.log2(levels * 2 / 255), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [1.0, 0.5])
def test_a_slope_that_is_not_finite_ends_rk45(bad, where):
    """A NaN would have scipy's solver choose a step of NaN, for ever."""

    def slope(x, t):
        return torch.full_like(x, bad) if t <= where else torch.ones_like(x)

    with pytest.raises(NotFinite, match="slope of the flow at t = .* is not finite"):
        end_of(flow.follow(slope, random(2, *SHAPE), [1.0, 0.0], "rk45"))


def test_a_slope_that_no_step_can_follow_ends_rk45():
    with pytest.raises(NotFinite, match="RK45 stopped|not finite"):
        end_of(
            flow.follow(
                lambda x, t: -(x**2), torch.full((1, 1, 1, 1), 2.0).double(), [1.0, 0.0], "rk45"
            )
        )
