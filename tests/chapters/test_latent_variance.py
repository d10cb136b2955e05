"""Learned variances of latents: row 0 as a density, the optimum in closed form, sane magnitudes."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import improved_ddpm
from ddpm_pixel import target_of
from ldm_cfg import Config, alpha_bar_of

M, S = 0.4, 0.7  # Gaussian latents: numbers N(M, S^2), of which [-1, 1] does not hold a fifth
PREDICTIONS, SCHEDULES = ("eps", "v", "x0"), ("linear", "scaled_linear", "cosine")


def make_alpha_bar(schedule, T):
    return alpha_bar_of(Config(schedule=schedule, timesteps=T))


def latents(alpha_bar, n=24, seed=0):
    """Latents z0 (T,2,3,n), noise and z_t, one sample for each row of the chain; float64."""
    generator = torch.Generator().manual_seed(seed)
    z0, eps = torch.randn(2, len(alpha_bar), 2, 3, n, generator=generator, dtype=torch.float64)
    z0, a = M + S * z0, alpha_bar.view(-1, 1, 1, 1)
    return z0, eps, a.sqrt() * z0 + (1 - a).sqrt() * eps


def given(alpha_bar):
    """Of Gaussian latents given z_t, by Bayes: the weight of z_t's noisy estimate of z_0 against
    M, and the variance that is left, (T,1,1,1) each."""
    a = alpha_bar.view(-1, 1, 1, 1)
    precision = 1 / S**2 + a / (1 - a)
    return a / (1 - a) / precision, 1 / precision


def answer(prediction, x0_hat, z_t, alpha_bar):
    """What a network says that means x0_hat (T,C,h,w)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    eps_hat = (z_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
    return target_of(prediction, x0_hat, eps_hat, alpha_bar)


def variances(alpha_bar):
    """(beta_tilde, beta) of every row, (T,) each; beta_tilde of row 1 for row 0."""
    a_prev = torch.cat([torch.ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / a_prev
    tilde = 1 / (1 / (1 - a_prev[1:]) + (1 - beta[1:]) / beta[1:])  # precisions add
    return torch.cat([tilde[:1], tilde]), beta


def step_means(z0, z_t, alpha_bar):
    """The mean of q(z_{t-1} | z_t, z_0) of rows above 0, by Bayes: (T-1,C,h,w)."""
    a, a_prev = (x.view(-1, 1, 1, 1) for x in (alpha_bar[1:], alpha_bar[:-1]))
    kept, z_t, z0 = a / a_prev, z_t[1:], z0[1:]
    pull = a_prev.sqrt() / (1 - a_prev) * z0 + kept.sqrt() / (1 - kept) * z_t
    return pull / (1 / (1 - a_prev) + kept / (1 - kept))


def bits(nats):
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_terms_of_latents_are_a_density_and_gaussians_divergences(prediction, variance):
    alpha_bar = make_alpha_bar("scaled_linear", 20)
    z0, _, z_t = latents(alpha_bar)
    wrong = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).double()
    tilde, beta = (x.view(-1, 1, 1, 1) for x in variances(alpha_bar))
    x0_hat = z0 + 0.3 * tilde.sqrt() * wrong
    v = 1.2 * torch.sin(5 * wrong)
    out = answer(prediction, x0_hat, z_t, alpha_bar)
    std = {
        "small": tilde.sqrt().expand_as(z0),
        "large": torch.cat([tilde[:1], beta[1:]]).sqrt().expand_as(z0),
        "learned": beta ** ((1 + v) / 4) * tilde ** ((1 - v) / 4),
    }[variance]
    q = Normal(step_means(z0, z_t, alpha_bar), tilde[1:].sqrt())
    p = Normal(step_means(x0_hat, z_t, alpha_bar), std[1:])
    density = -Normal(x0_hat, std).log_prob(z0)[:1]
    expected = torch.cat([bits(density), bits(kl_divergence(q, p))])
    ours = improved_ddpm.vlb_terms(
        torch.cat([out, v], 1) if variance == "learned" else out,
        z0,
        z_t,
        torch.arange(20),
        improved_ddpm.make_chain(alpha_bar),
        prediction=prediction,
        variance=variance,
        clip=False,
        discrete=False,
    )
    assert ours.dtype == torch.float64 and ours[0] < 0 < ours[1:].min()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_only_row_0_tells_latents_from_images_which_are_the_default():
    alpha_bar = make_alpha_bar("cosine", 6)
    chain, t = improved_ddpm.make_chain(alpha_bar), torch.arange(6)
    level = torch.randint(256, (6, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    x0 = level / 127.5 - 1
    x_t = x0.flip(0)
    out = torch.cat([x0 + 0.01, x0], 1)
    for loss, options in (
        (improved_ddpm.hybrid, {}),
        (improved_ddpm.vlb_terms, {"variance": "learned"}),
    ):
        default, pixels, density = (
            loss(out, x0, x_t, t, chain, prediction="x0", **options, **discrete)
            for discrete in ({}, {"discrete": True}, {"discrete": False})
        )
        assert torch.equal(default, pixels) and torch.equal(default[1:], density[1:])
        assert abs(default[0] - density[0]) > 1


def test_a_density_costs_less_than_a_code_by_the_width_of_a_level():
    """Where the Gaussian is much wider than a level, its mass there is the density times the width.

    What is left is half a width^2 / 12, the spread within a level, times the density's curvature.
    """
    width, std, z = 2 / 255, 0.2, 0.5
    x0 = torch.arange(40, 215).double().div(127.5).sub(1).view(1, 1, 5, 35)
    log_var = torch.tensor([std], dtype=torch.float64).log() * 2
    one, row = torch.ones_like(log_var), torch.zeros(1, dtype=torch.int64)
    chain = improved_ddpm.Chain(row, one / 2, one, 0 * one, log_var, log_var)  # its last step only
    code, density = (
        improved_ddpm.vlb_terms(
            x0 + z * std, x0, x0, row, chain, prediction="x0", clip=False, discrete=discrete
        )
        for discrete in (True, False)
    )
    curvature = (z**2 - 1) / std**2  # of the density, relative to it
    left = -(width**2) / 24 * curvature / math.log(2)
    assert (code - density + math.log2(width)).item() == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_finds_the_best_variance_of_gaussian_latents(schedule, prediction):
    """E[z_0 | z_t] as the mean; z_0 lies one standard deviation above or below it, in turns.

    The terms see only the square of that, so that these two stand for all of N(., left) exactly,
    and the optimum is known to rounding: beta_tilde + A^2 Var(z_0 | z_t), in row 0 the variance.
    """
    alpha_bar, ts = make_alpha_bar(schedule, 1000), torch.tensor([0, 1, 2, 10, 100, 400, 800])
    chain = improved_ddpm.make_chain(alpha_bar)
    _, _, z_t = latents(alpha_bar)
    share, left = given(alpha_bar)
    x0_hat = M + share * (z_t / alpha_bar.view(-1, 1, 1, 1).sqrt() - M)
    turns = torch.ones(24, dtype=torch.float64)
    turns[::2] = -1
    z0, out = x0_hat + left.sqrt() * turns, answer(prediction, x0_hat, z_t, alpha_bar)
    z0, z_t, out = (x[ts] for x in (z0, z_t, out))
    v = torch.zeros(len(ts), 1, 1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(30):  # Newton's steps; no row sees another's v
        both = torch.cat([out, v.expand_as(out)], 1)
        loss = improved_ddpm.hybrid(
            both, z0, z_t, ts, chain, prediction=prediction, discrete=False
        ).sum()
        (slope,) = torch.autograd.grad(loss, v, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), v)
        v = (v - slope / curve).detach().requires_grad_()
    tilde, beta = variances(alpha_bar)
    found = beta[ts].log() * (1 + v.flatten()) / 2 + tilde[ts].log() * (1 - v.flatten()) / 2
    a, a_prev = alpha_bar[1:], alpha_bar[:-1]
    A = torch.cat([torch.ones(1), a_prev.sqrt() * beta[1:] / (1 - a)])
    floor = torch.cat([torch.zeros(1), tilde[1:]])
    truth = (floor + A**2 * left.flatten())[ts].log()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-8)
    assert v.abs().max() < 1 and v.max() - v.min() > 0.5  # it has to look between the two


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_network_learns_its_variance_with_small_gradients_at_every_timestep(
    schedule, prediction
):
    """Its output is 0, so v starts midway from log beta_tilde to log beta. Of what L_hybrid adds to
    the loss, 0.001 L_vlb, the slope in v is (log beta - log beta_tilde) / (4 log 2) * (1 - square),
    square the mean of what the KL or the density divides by the variance.

    The first rows lie widest, at 0.6 to 0.8, with squares of 0.4 to 1.6. From row 50 on little is
    between the two; what the last rows of "cosine" make of an eps of 0, a loss of hundreds, has no
    slope either.
    """
    alpha_bar, t = make_alpha_bar(schedule, 1000), torch.arange(1000)
    z0, _, z_t = latents(alpha_bar)
    out = torch.zeros(1000, 4, 3, 24, requires_grad=True)
    added = 0.001 * improved_ddpm.hybrid(
        out,
        z0.float(),
        z_t.float(),
        t,
        improved_ddpm.make_chain(alpha_bar),
        prediction=prediction,
        discrete=False,
    )
    (gradient,) = torch.autograd.grad(added.sum(), out)
    mean, slope = gradient[:, :2], gradient[:, 2:].sum(dim=(1, 2, 3)).abs()
    assert not mean.any() and gradient.isfinite().all() and added.isfinite().all()
    assert slope[:2].min() > 0.05 and slope.max() < 0.8 / (4 * math.log(2)) * 0.6
    assert slope[50:].max() < 2e-3
    assert -6 < added[0] < -2  # log2(std sqrt(2 pi e)) is -5.1 for 0.7 % and -3.0 for 3 %
    if prediction == "v":
        assert added.abs().max() < 6
