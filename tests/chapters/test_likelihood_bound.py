"""The bound of images against likelihoods that are known exactly; importance sampling."""

from runtime.processes import World

import io
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm

import ddpm_pixel as ch1
import improved_ddpm as ch2
from evaluation.likelihood import evaluate
from image_data.batches import Dataset

M, S = 0.1, 0.3  # Gaussian data: pixels N(M, S^2), rounded to levels


def variances(alpha_bar, t):
    """(beta_tilde, beta) of step t as numbers; beta_tilde of step 1 for step 0."""
    a = [1.0, *alpha_bar.tolist()]  # a[t] is alpha_bar_{t-1}
    beta = [1 - after / before for before, after in zip(a, a[1:], strict=False)]
    s = max(t, 1)
    tilde = 1 / (1 / (1 - a[s]) + (1 - beta[s]) / beta[s]) if len(beta) > 1 else beta[0]
    return tilde, beta[t]


def best_variance(alpha_bar, t):
    """Of x_{t-1} given x_t for Gaussian data: Var(x_0 | x_t) seen through the posterior."""
    a, a_prev = alpha_bar[t].item(), alpha_bar[t - 1].item() if t else 1.0
    left = S**2 * (1 - a) / (a * S**2 + 1 - a)
    A = math.sqrt(a_prev) * (1 - a / a_prev) / (1 - a)
    return (1 - a / a_prev) * (1 - a_prev) / (1 - a) + A**2 * left


class Perfect:
    """The best network for Gaussian data: E[x_0 | x_t] as eps_hat, and best_variance as v."""

    def __init__(self, alpha_bar, learned=True):
        self.alpha_bar, self.learned = alpha_bar, learned

    def __call__(self, x, t, y=None):
        assert x.dtype == torch.float32 and (t == t[0]).all()
        t = int(t[0])
        a = self.alpha_bar[t].item()
        eps_hat = (1 - a) ** 0.5 * (x - a**0.5 * M) / (a * S**2 + 1 - a)  # (B,C,H,W)
        if not self.learned:
            return eps_hat
        tilde, beta = variances(self.alpha_bar, t)
        f = math.log(best_variance(self.alpha_bar, t) / tilde) / math.log(beta / tilde)
        return torch.cat([eps_hat, torch.full_like(eps_hat, 2 * f - 1)], 1)  # (B,2C,H,W)


def gaussian_images(n):
    """n uint8 images (n,8,8,1)."""
    x = np.random.default_rng(0).normal(M, S, (n, 8, 8, 1))
    return torch.from_numpy(((x + 1) * 127.5).round().clip(0, 255)).to(torch.uint8)


def true_bits(images, mean, std):
    """What each image costs, in bits per dimension, if pixels are rounded N(mean, std^2)."""
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    bits = -np.log2(np.diff(norm.cdf(edges, mean, std)))[images.numpy()]
    return torch.from_numpy(bits.mean(axis=(1, 2, 3)))


def mean_and_error(x):
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


@pytest.fixture(scope="module")
def cosine():
    """(alpha_bar of 1000 steps, 192 Gaussian images, their Bound under the perfect network)."""
    alpha_bar, images = ch1.make_alpha_bar("cosine", 1000), gaussian_images(192)
    bound = ch2.bits_per_dim(
        Perfect(alpha_bar),
        images,
        None,
        torch.arange(192),
        ch2.make_chain(alpha_bar),
        variance="learned",
        clip=False,
    )
    return alpha_bar, images, bound


def test_the_bound_of_a_perfect_network_is_the_true_likelihood(cosine):
    """Within 1 %, and not below it by more than the sampling error of one draw of x_t."""
    _, images, bound = cosine
    truth = true_bits(images, M, S)
    excess, error = mean_and_error(bound.total - truth)
    assert 4 * error < 0.01 * truth.mean()  # else the next line could be luck
    assert bound.total.mean().item() == pytest.approx(truth.mean().item(), rel=0.01)
    assert excess > -4 * error


def test_each_term_of_a_perfect_network_is_what_its_step_must_cost(cosine):
    """Given x_t, x_{t-1} has variance best_variance; given x_0 too, beta_tilde: log of the ratio.

    From step 20 on, where the rounding to levels lies far below the noise.
    """
    alpha_bar, _, bound = cosine
    expected = torch.tensor(
        [
            0.5 * math.log2(best_variance(alpha_bar, t) / variances(alpha_bar, t)[0])
            for t in range(20, 1000)
        ]
    )
    terms = bound.terms[:, 20:]
    z = (terms.mean(0) - expected) / (terms.std(0) / len(terms) ** 0.5)
    assert z.abs().max() < 5  # of 980 normals: exceeded once in 1700; each resolves 1.3 %
    a = alpha_bar[20:]
    left = S**2 * (1 - a) / (a * S**2 + 1 - a)  # Var(x_0 | x_t)
    torch.testing.assert_close(bound.x0_mse[:, 20:].mean(0), left, rtol=0.06, atol=0)
    snr = alpha_bar / (1 - alpha_bar)  # up to the rounding of x_t to float32
    torch.testing.assert_close(bound.eps_mse, bound.x0_mse * snr, rtol=1e-5, atol=1e-9)
    assert bound.prior.min() > 0 and bound.prior.max() < 1e-8


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("timesteps", [[700], [800, 30, 3, 300], list(range(0, 1000, 50))])
def test_a_linear_network_costs_what_its_gaussians_say(variance, timesteps):
    """Every x_t of its reverse chain is Gaussian, so that the likelihood of what it draws is known.

    The expected KL of a step with variance var: 1/2 (log var/tilde + best_variance/var - 1).
    """
    whole = ch1.make_alpha_bar("linear", 1000)
    chain, images = ch2.make_chain(whole, timesteps), gaussian_images(128)
    bound = ch2.bits_per_dim(
        Perfect(whole, learned=False),
        images,
        None,
        torch.arange(128),
        chain,
        variance=variance,
        clip=False,
    )
    mean, spread = 0.0, 1.0  # of x_T, then of each x_t on the way down
    for t in reversed(range(len(timesteps))):
        a, a_prev = chain.alpha_bar[t].item(), chain.alpha_bar[t - 1].item() if t else 1.0
        gain = a**0.5 * S**2 / (a * S**2 + 1 - a)  # x0_hat = M + gain (x_t - sqrt(a) M)
        to_x0 = a_prev**0.5 * (1 - a / a_prev) / (1 - a)
        slope = to_x0 * gain + (a / a_prev) ** 0.5 * (1 - a_prev) / (1 - a)
        tilde, beta = variances(chain.alpha_bar, t)
        var = beta if variance == "large" and t > 0 else tilde
        mean = slope * mean + to_x0 * M * (1 - gain * a**0.5)
        spread = slope**2 * spread + var
        if t > 0:
            nats = 0.5 * (math.log(var / tilde) + best_variance(chain.alpha_bar, t) / var - 1)
            term, error = mean_and_error(bound.terms[:, t])
            assert abs(term - nats / math.log(2)) < 5 * error
    excess, error = mean_and_error(bound.total - true_bits(images, mean, spread**0.5))
    assert excess > -4 * error


def test_learning_finds_the_variance_of_gaussian_data():
    ts, pixels = [1, 6, 13, 18], 40000
    alpha_bar = ch1.make_alpha_bar("cosine", 20)
    chain, t = ch2.make_chain(alpha_bar), torch.tensor(ts)
    generator = torch.Generator().manual_seed(0)
    x0 = M + S * torch.randn(4, 1, 1, pixels, generator=generator).double()
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn(x0.shape, generator=generator)
    x0_hat = M + a.sqrt() * S**2 / (a * S**2 + 1 - a) * (x_t - a.sqrt() * M)
    v = torch.zeros(4, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        out = torch.cat([x0_hat, v.expand_as(x0)], 1)
        loss = ch2.hybrid(out, x0, x_t, t, chain, prediction="x0").mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for found_v, step in zip(v.flatten().tolist(), ts, strict=True):
        tilde, beta = variances(alpha_bar, step)
        found = tilde * (beta / tilde) ** ((found_v + 1) / 2)
        truth = best_variance(alpha_bar, step)
        assert tilde < truth < beta
        # four standard errors of the pixels' squared errors, which make up truth - tilde
        assert abs(found - truth) < 4 * math.sqrt(2 / pixels) * (truth - tilde)


# --------------------------------------------------------------------- batches, chains, data sets


class Labelled:
    """Some smooth network that looks at the label; remembers the timesteps that it was told."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, y):
        self.seen.append(int(t[0]))
        out = torch.sin(x + 0.1 * y.view(-1, 1, 1, 1)) * 0.9 + 1e-3 * t.view(-1, 1, 1, 1)
        return torch.cat([out, torch.cos(x)], 1)  # (B,2C,H,W)


@pytest.fixture
def coloured():
    """(uint8 images (6,4,3,2), labels, seeds, the chain of 10 steps)."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (6, 4, 3, 2), dtype=np.uint8))
    chain = ch2.make_chain(ch1.make_alpha_bar("cosine", 10))
    return images, torch.arange(6) % 3, torch.arange(100, 106), chain


def test_the_bound_does_not_depend_on_the_batch(coloured):
    images, y, seeds, chain = coloured
    ticks = []
    whole = ch2.bits_per_dim(
        Labelled(), images, y, seeds, chain, variance="learned", tick=lambda: ticks.append(1)
    )
    assert len(ticks) == 10 and whole.terms.shape == (6, 10)
    as_floats = images.permute(0, 3, 1, 2) / 127.5 - 1
    for part in (slice(4, 5), slice(1, 4)):
        ours = ch2.bits_per_dim(
            Labelled(), as_floats[part], y[part], seeds[part], chain, variance="learned"
        )
        # the float32 network rounds as its vectors fall, and so do floats of levels
        for one, all_ in zip((*ours, ours.total), (*whole, whole.total), strict=True):
            torch.testing.assert_close(one, all_[part], rtol=1e-4, atol=1e-6)
    assert whole.total.std() > 1e-3 * whole.total.mean()


def test_a_shorter_chain_sees_the_same_noise(coloured):
    images, y, seeds, chain = coloured
    net, alpha_bar = Labelled(), chain.alpha_bar
    whole = ch2.bits_per_dim(net, images, y, seeds, chain, variance="learned")
    short = ch2.bits_per_dim(
        net, images, y, seeds, ch2.make_chain(alpha_bar, [9, 0, 4]), variance="learned"
    )
    assert net.seen == [*range(10), 0, 4, 9]
    assert torch.equal(short.x0_mse, whole.x0_mse[:, [0, 4, 9]])
    assert torch.equal(short.prior, whole.prior)


def test_eps_cannot_be_predicted_where_nothing_is_left_of_the_image(coloured):
    images, y, seeds, chain = coloured
    ends_in_zero = ch2.make_chain(torch.tensor([0.9, 0.0]).double())
    with pytest.raises(ValueError, match="alpha_bar > 0"):
        ch2.bits_per_dim(Labelled(), images, y, seeds, ends_in_zero, variance="learned")
    for prediction in ("v", "x0"):
        bound = ch2.bits_per_dim(
            Labelled(), images, y, seeds, ends_in_zero, prediction=prediction, variance="learned"
        )
        assert bound.total.isfinite().all() and (bound.prior == 0).all()


def test_a_data_set_is_averaged_the_same_in_any_batches(coloured, tmp_path, capsys):
    images, y, _, chain = coloured
    ds = Dataset("tiny", images.numpy(), y.numpy(), ("a", "b", "c"), {})
    bound_of = partial(ch2.bits_per_dim, Labelled(), chain=chain, variance="learned")
    where = (ds, chain.timesteps.tolist(), World(), tmp_path)
    values = evaluate(bound_of, *where, n=4, batch_size=3, labels=True)
    again = evaluate(bound_of, *where, n=4, batch_size=100, labels=True)
    chosen = torch.tensor([0, 2, 3, 5])  # evenly spaced
    bound = ch2.bits_per_dim(
        Labelled(), images[chosen], y[chosen], chosen, chain, variance="learned"
    )
    mean, error = mean_and_error(bound.total)
    for result in (values, again, json.loads((tmp_path / "nll.json").read_text())):
        assert result["images"] == 4
        assert result["bits_per_dim"] == pytest.approx(mean, rel=1e-5)
        assert result["standard_error"] == pytest.approx(error, rel=1e-3)
        assert result["prior"] + sum(result["terms"]) == pytest.approx(mean, rel=1e-5)
        np.testing.assert_allclose(result["eps_mse"], bound.eps_mse.mean(0), rtol=1e-5)
    assert f"tiny: {mean:.4f} bits/dim" in capsys.readouterr().out
    assert (tmp_path / "nll.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------- importance sampling


def filled(T=5, times=10):
    """A LossSecondMoment that has seen `times` losses of each timestep, and those (T,times)."""
    picker = ch2.LossSecondMoment(T)
    losses = np.random.default_rng(3).gamma(2, size=(T, times)) * np.arange(1, T + 1)[:, None]
    for column in losses.T:
        picker.update(torch.arange(T), torch.from_numpy(column))
    return picker, losses


def test_timesteps_are_uniform_until_each_has_ten_losses():
    picker, _ = filled(times=9)
    picker.update(torch.zeros(50, dtype=torch.int64), torch.full((50,), 7.0))
    assert (picker.probabilities() == 1 / 5).all()
    picker.update(torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, math.nan, 1.0, 1.0]))
    assert (picker.probabilities() == 1 / 5).all()  # a loss that is no number does not count
    picker.update(torch.tensor([2]), torch.tensor([1.0]))
    assert picker.probabilities().std() > 0.01


def test_the_last_ten_finite_losses_of_each_timestep_are_kept_in_their_order():
    """Whatever comes at once: one timestep often, in any order, with losses that do not count."""
    picker, rng = ch2.LossSecondMoment(4), np.random.default_rng(5)
    expected = [[math.nan] * 10 for _ in range(4)]
    for n in (1, 7, 60, 3, 25):
        t, losses = rng.integers(4, size=n), rng.random(n).astype(np.float32)
        losses[rng.random(n) < 0.2] = math.inf
        losses[rng.random(n) < 0.2] = math.nan
        picker.update(torch.from_numpy(t), torch.from_numpy(losses))
        for i, loss in zip(t, losses, strict=True):
            if math.isfinite(loss):
                expected[i] = [*expected[i][1:], loss]
        np.testing.assert_array_equal(picker.last, expected)


@pytest.mark.parametrize("times", [10, 23])
def test_probability_is_the_root_of_the_second_moment_of_the_last_ten(times):
    picker, losses = filled(times=times)
    root = np.sqrt((losses[:, -10:] ** 2).mean(1))
    expected = 0.999 * root / root.sum() + 0.001 / 5
    np.testing.assert_allclose(picker.probabilities(), expected, rtol=1e-12)


def test_weights_undo_the_probabilities_and_the_noise_is_less():
    picker, losses = filled()
    p, n, now = picker.probabilities().numpy(), 100_000, losses.mean(1)
    t, weights = picker.sample(torch.from_numpy(np.random.default_rng(0).random(n)))
    t, weights = t.numpy(), weights.numpy()
    assert t.dtype == np.int64 and weights.dtype == np.float64
    assert (t == np.random.default_rng(0).choice(5, size=n, p=p)).all()
    frequency = np.bincount(t, minlength=5) / n
    assert (np.abs(frequency - p) < 4.5 * np.sqrt(p * (1 - p) / n)).all()
    estimates = weights * now[t]
    assert abs(estimates.mean() - now.mean()) < 4.5 * estimates.std() / math.sqrt(n)
    assert estimates.std() < 0.5 * now.std()
    np.testing.assert_allclose(np.sum(p * (1 / (5 * p)) * now), now.mean())
    np.testing.assert_allclose(weights, 1 / (5 * p[t]))


def test_a_restored_state_goes_on_bit_for_bit():
    picker, _ = filled(times=13)
    file = io.BytesIO()
    torch.save(picker.state_dict(), file)
    file.seek(0)
    other = ch2.LossSecondMoment(5)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(12):
        u = torch.from_numpy(np.random.default_rng([0, step]).random(8))
        draws = [one.sample(u) for one in (picker, other)]
        for one, two in zip(*draws, strict=True):
            assert torch.equal(one, two)
        for one in (picker, other):
            one.update(draws[0][0], torch.arange(8) * 0.3 + step)
    assert torch.equal(picker.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match="5 timesteps, expected 6"):
        ch2.LossSecondMoment(6).load_state_dict(picker.state_dict())
