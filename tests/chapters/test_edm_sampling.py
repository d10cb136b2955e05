"""EDM's sampler against a literal algorithm 2, against diffusers, and on Gaussian data.

Here, too, stands how a network of a chain becomes a denoiser: table 1's columns VP and iDDPM.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_edm_euler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from gaussian_data import COV, MEAN, Gaussian, in_float64, power

import ddpm_pixel
import edm
from kernels import gaussian

SIGMA_DATA, SHAPE = 0.5, (2, 4, 5)
SEEDS, LABELS = torch.tensor([5, 6, 1000]), torch.tensor([0, 2, 1])
SIGMAS = edm.sigma_steps(9)


@pytest.fixture
def double():
    """Everything in float64, the numbers of the noise included."""
    with in_float64(edm):
        yield


class Wavy(torch.nn.Module):
    """A network that bends its input by c_noise and the label; remembers what it was asked."""

    null = 3

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, c_noise, y=None):
        assert c_noise.shape == (len(x),)
        shift = c_noise.view(-1, 1, 1, 1)
        if y is not None:
            shift = shift + torch.where(y == self.null, 0.0, 0.3 * y - 0.5).view(-1, 1, 1, 1)
        out = torch.sin(1.3 * x + 0.2 * shift) + 0.1 * x
        self.asked.append((x, c_noise, out))
        return out


def noise_of(seeds, shape=SHAPE):
    return lambda step: gaussian((len(seeds), *shape), seeds, step, "cpu")


# ---------------------------------------------------------------------------------- algorithm 2


def denoiser(net, y=None, w=0.0, clip=False):
    """D(x, sigma) of eq. 7 with the last column of table 1, guided."""

    def one(x, sigma, y):
        total = sigma**2 + SIGMA_DATA**2
        c_noise = torch.full((len(x),), math.log(sigma) / 4, dtype=x.dtype)
        F = net(x / math.sqrt(total), c_noise, y)
        return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / math.sqrt(total) * F

    def D(x, sigma):
        found = one(x, sigma, y)
        if w:
            found = (1 + w) * found - w * one(x, sigma, torch.full_like(y, net.null))
        return found.clamp(-1, 1) if clip else found

    return D


STILL = edm.Churn()  # no noise


def algorithm2(D, t, noise, order=2, churn=STILL, nearest=float):
    """Algorithm 2, line by line, in float64: x_i+1 and D(x_hat) of each step.

    noise(i): that of step i, the start's at -1. nearest: the sigma that the network knows.
    """
    N = len(t) - 1
    x = t[0] * noise(-1).double()
    for i in range(N):
        inside = churn.S_tmin <= t[i] <= churn.S_tmax
        gamma = min(churn.S_churn / N, math.sqrt(2) - 1) if inside else 0
        eps = churn.S_noise * noise(i).double()
        t_hat = nearest(t[i] + gamma * t[i])
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * eps
        guess = D(x_hat, t_hat)
        d = (x_hat - guess) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0 and order == 2:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
        yield x, guess


def agree(ours, theirs, sigmas, close):
    """Both are x and D of each step; in units of sigma where that is above 1, as x then is."""
    for sigma, *both in zip(sigmas[:-1], ours, theirs, strict=True):
        for one, other in zip(*both, strict=True):
            scaled = [v.double() / max(1, sigma) for v in (one, other)]
            torch.testing.assert_close(*scaled, atol=close, rtol=0)


# Bounds that are sigmas of the walk belong to it.
WINDOWS = {
    "no churn": edm.Churn(),
    "all steps": edm.Churn(3.0),
    "at most half": edm.Churn(1e3, S_noise=1.007),
    "first step": edm.Churn(2.0, S_tmin=SIGMAS[0]),
    "window": edm.Churn(2.0, S_tmin=SIGMAS[6], S_tmax=SIGMAS[2], S_noise=1.003),
    "last step": edm.Churn(2.0, S_tmax=SIGMAS[-2], S_noise=0.9),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("churn", WINDOWS.values(), ids=WINDOWS)
def test_steps_are_those_of_algorithm_2(churn, order, double):
    column, how = edm.Edm(SIGMA_DATA), {"order": order, "churn": churn}
    for sigmas in (SIGMAS, edm.sigma_steps(1), edm.sigma_steps(4, 0.1, 5, 3)):
        net = Wavy()
        ours = list(edm.sample(net, column, sigmas, SHAPE, SEEDS, **how))
        assert len(net.asked) == (2 * len(ours) - 1 if order == 2 else len(ours))
        agree(ours, algorithm2(denoiser(Wavy()), sigmas, noise_of(SEEDS), **how), sigmas, 1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("churn", WINDOWS.values(), ids=WINDOWS)
def test_steps_in_single_precision(churn, order):
    column, how = edm.Edm(SIGMA_DATA), {"order": order, "churn": churn}
    for sigmas in (SIGMAS, edm.sigma_steps(18)):
        ours = edm.sample(Wavy(), column, sigmas, SHAPE, SEEDS, **how)
        agree(ours, algorithm2(denoiser(Wavy()), sigmas, noise_of(SEEDS), **how), sigmas, 1e-5)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("w", [0.0, 1.5, -1.0])
def test_steps_with_guidance_and_clipping(w, clip, double):
    for order, churn in itertools.product((1, 2), (STILL, WINDOWS["window"])):
        how = {"order": order, "churn": churn}
        column = edm.Edm(SIGMA_DATA)
        ours = list(edm.sample(Wavy(), column, SIGMAS, SHAPE, SEEDS, LABELS, w, clip=clip, **how))
        D = denoiser(Wavy(), LABELS, w, clip)
        agree(ours, algorithm2(D, SIGMAS, noise_of(SEEDS), **how), SIGMAS, 1e-12)
    if clip:
        assert torch.cat([guess for _, guess in ours]).abs().max() == 1


def test_a_sample_does_not_depend_on_its_batch():
    class Pointwise(Wavy):
        def forward(self, x, c_noise, y=None):
            return 0.7 * x / (1 + x * x) + 0.1 * c_noise.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)

    def walk(seeds, order):
        how = {"order": order, "churn": edm.Churn(20, S_noise=1.003)}
        rest = SIGMAS, SHAPE, seeds, seeds % 3, 0.5
        return edm.sample(Pointwise(), edm.Edm(SIGMA_DATA), *rest, **how)

    for order in (1, 2):
        together = walk(torch.arange(20), order)
        for all_of_them, alone in zip(together, walk(torch.tensor([17]), order), strict=True):
            for one, other in zip(all_of_them, alone, strict=True):
                assert torch.equal(one[17:18], other)


@pytest.mark.parametrize("seeds", [torch.arange(3.0), torch.arange(3).int(), torch.ones(3, 1)])
def test_seeds_that_are_none(seeds):
    with pytest.raises(ValueError, match="seeds must be int64"):
        next(edm.sample(Wavy(), edm.Edm(SIGMA_DATA), SIGMAS, SHAPE, seeds))


# ------------------------------------------------------------------------------------ diffusers


@pytest.mark.parametrize("n", [2, 5, 18, 50])
@pytest.mark.parametrize("span", [(0.002, 80.0, 7.0), (0.05, 20.0, 3.0)])
def test_sigmas_are_those_of_diffusers(n, span):
    low, high, rho = span
    theirs = EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=rho)
    theirs.set_timesteps(n)  # in float32
    ours = torch.tensor(edm.sigma_steps(n, *span))
    torch.testing.assert_close(ours, theirs.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("churn", WINDOWS.values(), ids=WINDOWS)
def test_euler_steps_are_those_of_diffusers(churn, monkeypatch):
    """They are given x_i of our walk, the same noise, and what the network says about x_hat."""
    theirs = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    theirs.set_timesteps(len(SIGMAS) - 1)
    theirs.sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    noise, net = noise_of(SEEDS), Wavy()
    x = SIGMAS[0] * noise(-1)
    walk = edm.sample(net, edm.Edm(SIGMA_DATA), SIGMAS, SHAPE, SEEDS, order=1, churn=churn)
    for i, (x_next, guess) in enumerate(walk):
        monkeypatch.setattr(scheduling_edm_euler, "randn_tensor", lambda *_, i=i, **__: noise(i))
        seen, _, out = net.asked[-1]
        scaled = theirs.scale_model_input(x, theirs.timesteps[i])
        if not churn.S_churn:  # else they scale x_i and not x_hat
            torch.testing.assert_close(seen.double(), scaled.double(), atol=1e-6, rtol=0)
        done = theirs.step(
            out,
            theirs.timesteps[i],
            x,
            s_churn=churn.S_churn,
            s_tmin=churn.S_tmin,
            s_tmax=churn.S_tmax,
            s_noise=churn.S_noise,
        )
        unit = max(1, SIGMAS[i])
        for one, other in ((x_next, done.prev_sample), (guess, done.pred_original_sample)):
            one, other = one.double() / unit, other.double() / unit
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        x = x_next


# -------------------------------------------------------------------------------- Gaussian data


def gauss_denoiser(x, sigma):
    """E[y | y + sigma n = x] for y ~ N(MEAN, COV)."""
    gain = COV @ torch.linalg.inv(COV + sigma**2 * torch.eye(2, dtype=torch.float64))
    mean = MEAN.view(1, 2, 1, 1)
    return mean + torch.einsum("ij,bjhw->bihw", gain, x.double() - mean)


class Best(torch.nn.Module):
    """The best F for y ~ N(MEAN, COV): eq. 7 solved for it."""

    null = 0

    def forward(self, x, c_noise, y=None):
        sigma = math.exp(4 * c_noise[0].item())
        total = sigma**2 + SIGMA_DATA**2
        noisy = x.double() * math.sqrt(total)
        rest = gauss_denoiser(noisy, sigma) - SIGMA_DATA**2 / total * noisy
        return (rest * math.sqrt(total) / (sigma * SIGMA_DATA)).to(x.dtype)


def ode(x, sigma, to):
    """Where the ODE of eq. 4 takes x: it keeps (COV + sigma^2 I)^-1/2 (x - MEAN)."""
    way = power(COV + to**2 * torch.eye(2), 0.5) @ power(COV + sigma**2 * torch.eye(2), -0.5)
    mean = MEAN.view(1, 2, 1, 1)
    return mean + torch.einsum("ij,bjhw->bihw", way, x.double() - mean)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(order, double):
    errors, start = [], SIGMAS[0] * noise_of(SEEDS)(-1).double()
    for n in (64, 128, 256):
        sigmas = edm.sigma_steps(n)
        *_, (x, _), (last, guess) = edm.sample(
            Best(), edm.Edm(SIGMA_DATA), sigmas, SHAPE, SEEDS, order=order
        )
        errors.append((x - ode(start, sigmas[0], sigmas[-2])).abs().max().item())
        # The last step is a denoising: Euler's to 0 is D.
        for found in (last, guess):
            torch.testing.assert_close(found, gauss_denoiser(x, sigmas[-2]), atol=1e-12, rtol=0)
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(found - order) < 0.1 for found in orders), (errors, orders)


def deviations(S_noise):
    """How far mean and covariance of samples with churn are off, in their standard errors."""
    shape, seeds, churn = (2, 25, 40), torch.arange(50), edm.Churn(20.0, S_noise=S_noise)
    *_, (x, _) = edm.sample(
        Best(), edm.Edm(SIGMA_DATA), edm.sigma_steps(128), shape, seeds, churn=churn
    )
    pairs = x.double().transpose(0, 1).flatten(1)  # (2, samples)
    n, spread = pairs.shape[1], COV.diag()
    of_mean = (pairs.mean(1) - MEAN) / (spread / n).sqrt()
    error = ((spread[:, None] * spread + COV**2) / n).sqrt()  # of a Gaussian's sample covariance
    return of_mean.abs().max().item(), ((pairs.cov() - COV) / error).abs().max().item()


def test_churn_keeps_mean_and_covariance():
    of_mean, of_cov = deviations(S_noise=1.0)
    assert of_mean < 4 and of_cov < 4
    # The test would see 2 % too much noise, or too little.
    assert deviations(S_noise=1.02)[1] > 5 and deviations(S_noise=0.98)[1] > 5


# ---------------------------------------------------------------- a chain's network: VP and iDDPM


def zero_at_the_end(alpha_bar):
    """Lin et al. 2024 (arXiv:2305.08891), algorithm 1: no signal is left at T - 1."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


CHAINS = {
    "linear": ddpm_pixel.make_alpha_bar("linear", 1000),
    "cosine": ddpm_pixel.make_alpha_bar("cosine", 200),
    "zero terminal": zero_at_the_end(ddpm_pixel.make_alpha_bar("linear", 400)),
}
PREDICTIONS = ("eps", "v", "x0")
chains = pytest.mark.parametrize("alpha_bar", CHAINS.values(), ids=CHAINS)
columns = pytest.mark.parametrize("column", ["vp", "iddpm"])


def table(alpha_bar):
    """[sigma_t], of those t at which there is some signal."""
    return [math.sqrt((1 - a) / a) for a in alpha_bar.tolist() if a > 0]


def sigma_at(sigmas, t):
    """sigma of a real timestep: ln sigma lies on a straight line between the table's."""
    low = min(int(t), len(sigmas) - 2)
    first, second = math.log(sigmas[low]), math.log(sigmas[low + 1])
    return math.exp(first + (t - low) * (second - first))


class OfChain(torch.nn.Module):
    """The best network for y ~ N(MEAN, COV) at a real timestep; gaussian_data's, also v and x0."""

    null = 0

    def __init__(self, alpha_bar, prediction, more=0):
        super().__init__()
        self.sigmas, self.prediction, self.more, self.ts = table(alpha_bar), prediction, more, []

    def forward(self, x, t, y=None):
        self.ts.append(t[0])
        a = torch.tensor(1 / (sigma_at(self.sigmas, t[0].item()) ** 2 + 1))
        eps = Gaussian(a.view(1))(x, torch.zeros(1, dtype=torch.int64))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        out = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.prediction]
        return torch.cat([out, out + 1], 1) if self.more else out


@chains
@columns
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_chains_network_is_a_denoiser(prediction, column, alpha_bar, double):
    chain, net = edm.Chain(alpha_bar, prediction, column), OfChain(alpha_bar, prediction)
    noise = noise_of(SEEDS)(0).double()
    sigmas = table(alpha_bar)
    assert (chain.sigma_min, chain.sigma_max) == pytest.approx((sigmas[0], sigmas[-1]), rel=1e-12)
    for t in (0, 1, 2, len(sigmas) // 2, len(sigmas) - 2, len(sigmas) - 1):
        sigma = sigmas[t]
        c = chain(sigma)
        assert all(isinstance(number, (float, int)) for number in c)
        assert c.c_noise == pytest.approx(t, abs=1e-9)
        x = 0.3 + max(1, sigma) * noise
        D = c.c_skip * x + c.c_out * net(c.c_in * x, torch.tensor([float(t)]))
        torch.testing.assert_close(D, gauss_denoiser(x, sigma), atol=1e-11, rtol=1e-11)


@chains
def test_timesteps_of_the_vp_column(alpha_bar):
    chain, sigmas = edm.Chain(alpha_bar, column="vp"), table(alpha_bar)
    last = len(sigmas) - 1
    for t in (0, 1, 7, last // 3, last - 1):
        between = math.sqrt(sigmas[t] * sigmas[t + 1])
        assert chain(between).c_noise == pytest.approx(t + 0.5, abs=1e-9)
        assert chain.round(between) == between
    walk = np.geomspace(sigmas[0], sigmas[-1], 5000)[1:-1]
    ts = np.array([chain(float(sigma)).c_noise for sigma in walk])
    assert (np.diff(ts) > 0).all() and 0 < ts[0] < ts[-1] < last
    assert [sigma_at(sigmas, t) for t in ts] == pytest.approx(walk.tolist(), rel=1e-9)


def test_the_vp_column_is_that_of_table_1():
    """c_noise = 999 sigma^-1(sigma), beta_d 19.9, beta_min 0.1, up to the sum for an integral."""
    chain = edm.Chain(CHAINS["linear"], column="vp")
    for sigma in (0.02, 0.1, 0.5, 2.0, 10.0, 80.0, 150.0):
        root = math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2))
        assert abs(chain(sigma).c_noise - 999 * (root - 0.1) / 19.9) < 4
        assert chain(sigma)[:3] == pytest.approx((1, -sigma, (sigma**2 + 1) ** -0.5), rel=1e-9)


@chains
def test_timesteps_of_the_iddpm_column(alpha_bar):
    chain, sigmas = edm.Chain(alpha_bar, column="iddpm"), table(alpha_bar)
    for t in (0, 5, len(sigmas) // 2, len(sigmas) - 2):
        for part, nearest in ((0.0, t), (0.49, t), (0.51, t + 1), (1.0, t + 1)):
            sigma = sigmas[t] + part * (sigmas[t + 1] - sigmas[t])
            c_noise = chain(sigma).c_noise
            assert type(c_noise) is int and c_noise == nearest
            assert chain.round(sigma) == pytest.approx(sigmas[nearest], rel=1e-12)
    for sigma in (0.5 * sigmas[0], 2 * sigmas[-1]):
        assert chain.round(sigma) in (chain.sigma_min, chain.sigma_max)


def nearest_of(sigmas, column):
    """Which sigma the network is asked for, in the place of another."""
    if column == "vp":
        return float
    return lambda sigma: min(sigmas, key=lambda known: abs(known - sigma))


@chains
@columns
@pytest.mark.parametrize("low, high", [(1e-4, 1e9), (0.1, 20.0)])
def test_sigmas_in_the_range_of_a_chain(low, high, column, alpha_bar):
    sigmas = table(alpha_bar)
    cfg = edm.Config(sample_steps=12, sigma_min=low, sigma_max=high)
    wanted = edm.sigma_steps(12, max(low, sigmas[0]), min(high, sigmas[-1]))[:-1]
    wanted = [*map(nearest_of(sigmas, column), wanted), 0.0]
    assert edm.steps_of(cfg, edm.Chain(alpha_bar, column=column)) == pytest.approx(wanted, rel=1e-9)


@chains
@columns
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_walk_with_a_chains_network(prediction, column, alpha_bar, double):
    """Algorithm 2 with churn is that of the Gaussian's D; iDDPM rounds every sigma of it."""
    chain, nearest = edm.Chain(alpha_bar, prediction, column), nearest_of(table(alpha_bar), column)
    walk = [*map(nearest, edm.sigma_steps(12, chain.sigma_min, 50.0)[:-1]), 0.0]
    churn = edm.Churn(3.0, S_tmax=20.0)
    for order, more in ((1, 0), (2, 0), (2, 1)):
        net = OfChain(alpha_bar, prediction, more)
        ours = edm.sample(net, chain, walk, SHAPE, SEEDS, order=order, churn=churn)
        theirs = algorithm2(gauss_denoiser, walk, noise_of(SEEDS), order, churn, nearest)
        agree(ours, theirs, walk, 1e-9)
        assert {t.is_floating_point() for t in net.ts} == {column == "vp"}
