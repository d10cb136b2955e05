"""The terms of the bound against the papers written out in numpy, and the laws they are made of.

The reference below takes the posterior from Bayes' rule (precisions add), not from DDPM eq. 7.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import norm

import ddpm_pixel as ch1
import improved_ddpm as ch2

PREDICTIONS, VARIANCES = ("eps", "v", "x0"), ("small", "large", "learned")


def reference_variances(alpha_bar, t):
    """(beta_tilde, beta) of step t as numbers; beta_tilde of step 1 for step 0."""
    a = np.concatenate([[1.0], alpha_bar])  # a[t] is alpha_bar_{t-1}
    beta = 1 - a[1:] / a[:-1]
    s = max(t, 1) if len(beta) > 1 else 0
    tilde = 1 / (1 / (1 - a[s]) + (1 - beta[s]) / beta[s]) if s else beta[0]
    return tilde, beta[t]


def reference_term(out, level, x_t, t, alpha_bar, prediction, variance, clip):
    """One term in bits per dimension for one image; all float64 numpy, image (C,H,W)."""
    C, a = level.shape[0], alpha_bar[t]
    x0, m, v = level / 127.5 - 1, out[:C], out[C:]
    x0_hat = {
        "eps": (x_t - np.sqrt(1 - a) * m) / np.sqrt(a),
        "v": np.sqrt(a) * x_t - np.sqrt(1 - a) * m,
        "x0": m,
    }[prediction]
    x0_hat = np.clip(x0_hat, -1, 1) if clip else x0_hat
    tilde, beta = reference_variances(alpha_bar, t)
    if variance == "learned":
        var = np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(tilde))
    else:
        var = np.full_like(m, beta if variance == "large" and t > 0 else tilde)
    if t == 0:
        above = np.where(level == 255, np.inf, (x0 + 1 / 255 - x0_hat) / np.sqrt(var))
        below = np.where(level == 0, -np.inf, (x0 - 1 / 255 - x0_hat) / np.sqrt(var))
        left, right = norm.cdf(above) - norm.cdf(below), norm.sf(below) - norm.sf(above)
        return -np.log2(np.where(below > 0, right, left)).mean()
    a_prev, kept = alpha_bar[t - 1], a / alpha_bar[t - 1]

    def posterior_mean(x):
        pull = np.sqrt(a_prev) / (1 - a_prev) * x + np.sqrt(kept) / (1 - kept) * x_t
        return pull / (1 / (1 - a_prev) + kept / (1 - kept))

    gap = posterior_mean(x0) - posterior_mean(x0_hat)
    kl = np.log(np.sqrt(var / tilde)) + (tilde + gap**2) / (2 * var) - 0.5
    return kl.mean() / np.log(2)


def batch(T, C=2, seed=0):
    """Levels, x0, x_t and a rough network's output with v, one image (C,3,5) for each row of T."""
    rng, alpha_bar = np.random.default_rng(seed), ch1.make_alpha_bar("cosine", T).numpy()
    level = rng.integers(0, 256, (T, C, 3, 5))
    level[:, :, 0, 0], level[:, :, 0, 1] = 0, 255
    a, eps = alpha_bar[:, None, None, None], rng.standard_normal(level.shape)
    x_t = np.sqrt(a) * (level / 127.5 - 1) + np.sqrt(1 - a) * eps
    v = rng.uniform(-1.2, 1.2, level.shape)
    return alpha_bar, level, x_t, eps, v


def rough(prediction, alpha_bar, level, x_t, eps):
    """What the network says: right up to an error that leaves the decoder's mass above 0."""
    a, rng = alpha_bar[:, None, None, None], np.random.default_rng(1)
    x0 = level / 127.5 - 1
    eps = eps + 0.3 * rng.standard_normal(eps.shape)
    x0_hat = (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)
    if prediction == "x0":
        return x0 + 0.01 * rng.standard_normal(x0.shape)
    return {"eps": eps, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0_hat}[prediction]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("T", [1, 2, 12])
def test_every_term_is_the_papers(T, prediction, variance, clip):
    alpha_bar, level, x_t, eps, v = batch(T)
    out = rough(prediction, alpha_bar, level, x_t, eps)
    out = np.concatenate([out, v], 1) if variance == "learned" else out
    chain = ch2.make_chain(torch.from_numpy(alpha_bar))
    ours = ch2.vlb_terms(
        torch.from_numpy(out),
        torch.from_numpy(level / 127.5 - 1).float(),
        torch.from_numpy(x_t),
        torch.arange(T),
        chain,
        prediction=prediction,
        variance=variance,
        clip=clip,
    )
    # x0 in float32, as the data gives it, moves a mean by 3e-8: of the KL that is the error left
    expected = [
        reference_term(out[t], level[t], x_t[t], t, alpha_bar, prediction, variance, clip)
        for t in range(T)
    ]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-9)


def test_terms_of_a_float32_network_are_those_of_float64():
    alpha_bar, level, x_t, eps, v = batch(1000)
    out = np.concatenate([rough("eps", alpha_bar, level, x_t, eps), v], 1)
    tensors = [torch.from_numpy(array) for array in (out, level / 127.5 - 1, x_t)]
    chain, t = ch2.make_chain(torch.from_numpy(alpha_bar)), torch.arange(1000)
    exact = ch2.vlb_terms(*tensors, t, chain, variance="learned")
    ours = ch2.vlb_terms(*(x.float() for x in tensors), t, chain, variance="learned")
    torch.testing.assert_close(ours, exact, rtol=2e-4, atol=1e-6)
    assert ours.sum().item() == pytest.approx(exact.sum().item(), rel=1e-5)


@pytest.mark.parametrize("steps", [60, 7, 1])
def test_the_chain_is_the_one_that_is_sampled(steps):
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 60), ch1.timestep_pairs(60, steps)
    chain = ch2.make_chain(alpha_bar, [t for t, _ in pairs])
    floor, rows = chain.log_beta_tilde[0].item(), []
    for t, t_prev in reversed(pairs):  # upward in t
        a, a_prev = alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        rows.append(ch2.learned_row(a, a_prev, "eps", floor))
    table = torch.tensor(rows)
    ours = torch.stack([chain.A, chain.B, chain.log_beta_tilde, chain.log_beta], dim=1).float()
    torch.testing.assert_close(ours, table[:, [2, 3, 6, 7]])
    assert chain.timesteps.tolist() == [t for t, _ in reversed(pairs)]


def test_chains_and_outputs_that_cannot_be_are_refused():
    alpha_bar = ch1.make_alpha_bar("cosine", 8)
    chain, x, t = ch2.make_chain(alpha_bar), torch.zeros(2, 3, 4, 4), torch.zeros(2).long()
    for wrong in (alpha_bar.flip(0), alpha_bar - 0.5, alpha_bar * 2):
        with pytest.raises(ValueError, match="fall strictly"):
            ch2.make_chain(wrong)
    with pytest.raises(ValueError, match="fall strictly"):
        ch2.make_chain(alpha_bar, [3, 3, 7])
    with pytest.raises(ValueError, match="float64"):
        ch2.make_chain(alpha_bar.float())
    with pytest.raises(ValueError, match="needs 6 channels"):
        ch2.vlb_terms(x, x, x, t, chain, variance="learned")
    with pytest.raises(ValueError, match="needs 3 channels"):
        ch2.vlb_terms(torch.cat([x, x, x], 1), x, x, t, chain)
    v = torch.full_like(x, torch.nan)  # learned, but not asked for
    fixed = ch2.vlb_terms(x, x, x, t, chain)
    assert torch.equal(ch2.vlb_terms(torch.cat([x, v], 1), x, x, t, chain), fixed)
    with pytest.raises(ValueError, match="prediction must be"):
        ch2.vlb_terms(x, x, x, t, chain, prediction="score")
    with pytest.raises(ValueError, match="variance must be"):
        ch2.vlb_terms(x, x, x, t, chain, variance="none")


# --------------------------------------------------------------------------- laws of a Gaussian


def test_kl_is_the_integral():
    for m1, v1, m2, v2 in [(0.3, -1.0, 0.1, 0.5), (0, 0, 0, 0), (1, -2, -1, -2.5), (0, 1, 0, -1)]:
        p, q = norm(m1, math.exp(v1 / 2)), norm(m2, math.exp(v2 / 2))
        kl = p.expect(lambda x, p=p, q=q: p.logpdf(x) - q.logpdf(x), epsabs=1e-12)
        ours = ch2.normal_kl(*torch.tensor([m1, v1, m2, v2], dtype=torch.float64))
        assert ours.item() == pytest.approx(kl, rel=1e-9, abs=1e-12)


def test_the_prior_term_is_the_kl_to_noise():
    x0, a = torch.rand(3, 2, 4, 4).double() * 2 - 1, 0.37
    expected = (a * x0**2 + (1 - a) - 1 - math.log(1 - a)).mean(dim=(1, 2, 3)) / (2 * math.log(2))
    ours = ch2.prior_bits(x0, torch.tensor([0.9, a], dtype=torch.float64))
    torch.testing.assert_close(ours, expected)
    assert (ch2.prior_bits(x0, torch.tensor([0.9, 0.0]).double()) == 0).all()


def test_the_256_values_have_mass_1():
    x0 = torch.arange(256).div(127.5).sub(1)  # float32, as the data gives it
    for log_scale in (-20.0, -8.0, -5.0, -2.0, 0.0, 3.0, 7.0):
        for mean in (-1.5, -1.0, -0.1234, 0.0, 0.5, 1.0, 2.0):
            logs = ch2.discretized_gaussian_log_likelihood(
                x0, torch.tensor(mean), torch.tensor(log_scale)
            )
            assert logs.exp().sum().item() == pytest.approx(1, abs=1e-11), (log_scale, mean)


def test_the_tails_are_right_where_the_cdf_rounds_to_0():
    with mpmath.workdps(60):
        for level, mean, log_scale in [
            (0, 0.9, -6.0),
            (255, -0.9, -6.0),
            (100, 0.9, -6.0),
            (100, -0.9, -6.0),
            (1, 1.0, -9.0),
            (128, 0.0, -12.0),
            (77, 0.3, 6.0),
            (0, 0.3, 6.0),
            (254, 3.0, -1.0),
        ]:
            scale = mpmath.exp(log_scale)
            x, m = mpmath.mpf(level) / 127.5 - 1, mpmath.mpf(mean)
            above = (x + mpmath.mpf(1) / 255 - m) / scale if level < 255 else mpmath.inf
            below = (x - mpmath.mpf(1) / 255 - m) / scale if level > 0 else -mpmath.inf
            if below > 0:
                above, below = -below, -above
            truth = float(mpmath.log(mpmath.ncdf(above) - mpmath.ncdf(below)))
            ours = ch2.discretized_gaussian_log_likelihood(
                torch.tensor(level / 127.5 - 1),
                *torch.tensor([mean, log_scale], dtype=torch.float64),
            )
            assert ours.item() == pytest.approx(truth, rel=1e-10, abs=1e-11), (level, mean)


def test_gradients_are_finite_everywhere_and_right():
    x0 = torch.arange(256).div(127.5).sub(1).view(-1, 1, 1)
    mean = torch.tensor([-1e4, -1.0, -0.2, 0.0, 1.0, 30.0]).view(-1, 1).requires_grad_()
    log_scale = torch.tensor([-12.0, -9.0, -4.0, 0.0, 7.0]).requires_grad_()
    logs = ch2.discretized_gaussian_log_likelihood(x0, mean, log_scale)  # (256,6,5)
    each = torch.autograd.grad(logs.sum(), (mean, log_scale))
    assert logs.isfinite().all() and all(g.dtype == torch.float32 for g in each)
    assert all(g.isfinite().all() for g in each)
    mean, log_scale = torch.tensor([-0.9, 0.1, 1.0]), torch.tensor([[-3.0], [-1.0], [1.0]])
    assert torch.autograd.gradcheck(
        lambda m, s: ch2.discretized_gaussian_log_likelihood(x0[::51], m, s),
        (mean.double().requires_grad_(), log_scale.double().requires_grad_()),
    )


# ----------------------------------------------------------------------------- learned variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_only_v_learns_from_the_hybrid_loss(prediction):
    T, h = 12, 1e-5
    alpha_bar, level, x_t, eps, v = batch(T)
    numbers = np.concatenate([rough(prediction, alpha_bar, level, x_t, eps), v], 1)
    out = torch.from_numpy(numbers).requires_grad_()
    losses = ch2.hybrid(
        out,
        torch.from_numpy(level / 127.5 - 1),
        torch.from_numpy(x_t),
        torch.arange(T),
        ch2.make_chain(torch.from_numpy(alpha_bar)),
        prediction=prediction,
    )
    losses.sum().backward()
    assert (out.grad[:, :2] == 0).all()

    def bits(t, out):
        return reference_term(out, level[t], x_t[t], t, alpha_bar, prediction, "learned", False)

    for t in range(T):
        # whole bits of the bound: T times the term, so that uniform t give the sum
        assert losses[t].item() == pytest.approx(T * bits(t, numbers[t]), rel=1e-9)
        at = (2 + t % 2, t % 3, t % 5)
        up, down = numbers[t].copy(), numbers[t].copy()
        up[at], down[at] = up[at] + h, down[at] - h
        slope = T * (bits(t, up) - bits(t, down)) / (2 * h)
        assert out.grad[t][at].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
