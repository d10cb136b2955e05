"""stable_diffusion.py's walk without its networks: timesteps, rows, guidance, exact Gaussians.

A text c of these networks is a mean: data are N(c, s^2), and the best eps_hat is known, so
    eps_hat = sqrt(1 - a) (z - sqrt(a) c) / (a s^2 + 1 - a)
and guidance by w gives the walk of N((1 + w) c - w c_0, s^2).
"""

from runtime.commandline import BadInput
from runtime.finite import watched

import math
from itertools import pairwise

import pytest
import tiny_stable_diffusion as tiny
import torch

import stable_diffusion as sd
from kernels import gaussian

T = 1000
ALPHA_BAR = tiny.alpha_bar()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs


def at(t):
    return ALPHA_BAR[t].item() if t >= 0 else 1.0


def log_snr(a):
    return 0.5 * math.log(a / (1 - a))


# ------------------------------------------------------------------------------------- timesteps


def theirs(sampler, steps, **changes):
    found = tiny.scheduler(sampler, **changes)
    found.set_timesteps(steps)
    return found


def check_timesteps(pairs, timesteps):
    ts = [t for t, _ in pairs]
    assert ts == [int(t) for t in timesteps]
    assert [t_prev for _, t_prev in pairs[:-1]] == ts[1:]


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_visits_the_timesteps_of_ddimscheduler(spacing, offset, set_alpha_to_one):
    """Its step always goes T // steps down, which is the next timestep of `trailing` only where
    steps divides T. In over 500 steps its last, from 1, reaches 0 and needs no final alpha."""
    for steps in (*range(1, 101), 125, 200, 250, 333, 499, 500, 501, 777, 998, 999):
        if spacing == "trailing" and T % steps or set_alpha_to_one and offset and steps > 500:
            continue
        how = dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=set_alpha_to_one)
        expected = theirs("ddim", steps, **how)
        pairs = sd.timesteps("ddim", T, steps, spacing, offset, set_alpha_to_one)
        check_timesteps(pairs, expected.timesteps)
        after = int(expected.timesteps[-1]) - T // steps
        last = expected.alphas_cumprod[after] if after >= 0 else expected.final_alpha_cumprod
        assert at(pairs[-1][1]) == pytest.approx(last.item(), rel=1e-6)


def has_tie(steps):
    """Whether T - i T / steps, i = 0 ..., is ever halfway between two whole numbers."""
    return any(2 * i * T % (2 * steps) == steps for i in range(steps))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_dpmpp_visits_the_timesteps_of_dpmsolvermultistepscheduler(spacing, offset):
    """Left out are those that their floating point decides: at a tie, `trailing` rounds up or down
    as its sum happens to come out, and for 61 steps and others it gives one timestep too many."""
    compared = 0
    for steps in (*range(1, 101), 125, 200, 250, 333, 499, 500, 501, 777, 998):
        expected = theirs("dpmpp", steps, timestep_spacing=spacing, steps_offset=offset)
        if spacing == "trailing" and (has_tie(steps) or len(expected.timesteps) > steps):
            continue
        ours = {"linspace": "linear"}.get(spacing, spacing)
        pairs = sd.timesteps("dpmpp", T, steps, ours, offset)
        check_timesteps(pairs, expected.timesteps)
        assert expected.sigmas[-1] == 0 and pairs[-1][1] == -1
        compared += 1
    assert compared > 80


@pytest.mark.parametrize("offset", [0, 1])
def test_euler_a_visits_the_timesteps_of_eulerancestraldiscretescheduler(offset):
    for steps in (*range(1, 101), 125, 200, 333, 500, 777, 999):
        expected = theirs("euler_a", steps, steps_offset=offset)
        pairs = sd.timesteps("euler_a", T, steps, "leading", offset)
        check_timesteps(pairs, expected.timesteps)
        assert expected.sigmas[-1] == 0 and pairs[-1][1] == -1


def test_files_that_name_no_spacing_get_that_of_the_published_samplers():
    how = dict(offset=1, set_alpha_to_one=False)
    for steps in (1, 2, 7, 25, 50):
        for sampler, spacing in (("ddim", "leading"), ("euler_a", "leading"), ("dpmpp", "linear")):
            named = sd.timesteps(sampler, T, steps, spacing, **how)
            assert sd.timesteps(sampler, T, steps) == named
    ts = [t for t, _ in sd.timesteps("ddim", T, 50)]
    assert ts == list(range(981, 0, -20))  # the 50 of Stable Diffusion's own command
    assert sd.timesteps("ddim", 10, 2) == [(6, 1), (1, 0)]
    assert sd.timesteps("dpmpp", 10, 3) == [(9, 6), (6, 3), (3, -1)]


@pytest.mark.parametrize("spacing", ["", "leading", "trailing", "linear"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler_a"])
def test_every_number_of_steps_walks_down_inside_the_table(sampler, spacing):
    """Also those beyond their schedulers: 1000 steps from an offset of 1 would begin at 1000."""
    for total in (10, T):
        most = total - (sampler == "dpmpp")
        for steps in (1, 2, total // 3, total - 2, most):
            pairs = sd.timesteps(sampler, total, steps, spacing)
            ts = [t for t, _ in pairs]
            assert len(ts) == steps and min(ts) >= 0 and ts[0] < total
            assert all(t > t_prev for t, t_prev in pairs[:-1])
            assert [t_prev for _, t_prev in pairs[:-1]] == ts[1:]
            assert pairs[-1][1] == (0 if sampler == "ddim" else -1)
        for steps in (0, -1, total + 1):
            with pytest.raises(BadInput, match=f"--steps {steps}"):
                sd.timesteps(sampler, total, steps, spacing)


# ------------------------------------------------------------------------------------------ rows


def check_row(row, **numbers):
    """The row's A, B, H and S are these, and 0 where nothing is said."""
    wanted = dict(A=0.0, B=0.0, H=0.0, S=0.0) | numbers
    found = {name: getattr(row, name) for name in wanted}
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


PLACES = [(951, 851), (500, 499), (999, 1), (40, 0), (1, 0)]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler_a"])
def test_a_row_guesses_z0_by_eps(sampler):
    for t, t_prev in (*PLACES, (20, -1)):
        a = at(t)
        row = sd.row_of(sampler, None, a, at(t_prev))
        assert row.p == pytest.approx(a**-0.5, rel=1e-12)
        assert row.q == pytest.approx(((1 - a) / a) ** 0.5, rel=1e-12)
        assert row.log_var_min == row.log_var_max == 0


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_the_row_of_euler_a_is_sigma_down_and_sigma_up(places):
    """Karras' coordinates: u = z / sqrt(a) = z0 + sigma eps. Euler's method along eps from sigma to
    sigma_down, then noise of sigma_up."""
    a, a_prev = map(at, places)
    sigma, sigma_prev = (((1 - k) / k) ** 0.5 for k in (a, a_prev))
    sigma_up = (sigma_prev**2 * (sigma**2 - sigma_prev**2) / sigma**2) ** 0.5
    sigma_down = (sigma_prev**2 - sigma_up**2) ** 0.5
    row = sd.row_of("euler_a", None, a, a_prev)
    # u_prev = u + (u - z0) / sigma (sigma_down - sigma) + sigma_up noise
    u, z0 = (a_prev / a) ** 0.5 * sigma_down / sigma, a_prev**0.5 * (1 - sigma_down / sigma)
    check_row(row, A=z0, B=u, S=a_prev**0.5 * sigma_up)
    check_row(sd.row_of("euler_a", None, a, 1.0), A=1)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_the_row_of_ddim_keeps_eps(places):
    """z_prev = sqrt(a_prev) z0 + sqrt(1 - a_prev) eps, for any z0 and eps."""
    a, a_prev = map(at, places)
    row = sd.row_of("ddim", None, a, a_prev)
    for z0, eps in ((1, 0), (0, 1), (-0.7, 1.3)):
        z = a**0.5 * z0 + (1 - a) ** 0.5 * eps
        expected = a_prev**0.5 * z0 + (1 - a_prev) ** 0.5 * eps
        assert row.A * z0 + row.B * z == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert row.S == row.H == 0


@pytest.mark.parametrize("places", [(951, 851), (500, 499), (40, 1)], ids=str)
def test_the_row_of_dpmpp_is_algorithm_2(places):
    a, a_prev = map(at, places)
    h = log_snr(a_prev) - log_snr(a)
    gain = -(a_prev**0.5) * math.expm1(-h)
    keeps = ((1 - a_prev) / (1 - a)) ** 0.5
    check_row(sd.row_of("dpmpp", None, a, a_prev), A=gain, B=keeps)
    before = at(places[0] + 40)
    half = h / (2 * (log_snr(a) - log_snr(before)))  # 1 / (2r)
    row = sd.row_of("dpmpp", before, a, a_prev)
    check_row(row, A=gain * (1 + half), B=keeps, H=-gain * half)
    check_row(sd.row_of("dpmpp", before, a, 1.0), A=1)


# -------------------------------------------------------------------------------------- guidance


class Told(torch.nn.Module):
    """Says what it is told: the mean of the context, plus t; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, z, t, y=None, context=None):
        assert y is None and t.shape == (len(z),) == (len(context),)
        self.asked.append((z, t.tolist(), context))
        return z + (context.mean(dim=(1, 2)) + t)[:, None, None, None]


@pytest.mark.parametrize("w", [0, -1, -0.5, 1, 6.5])
def test_guidance_calls_the_network_for_what_counts(w):
    generator = torch.Generator().manual_seed(0)
    z, context = (torch.randn(3, 4, *s, generator=generator) for s in ((5, 2), (6,)))
    nothing, net = torch.randn(1, 4, 6, generator=generator), Told()
    out, out_uncond = sd.guided(net, z, 7, context, nothing, w)
    with_text = Told()(z, torch.full((3,), 7), context=context)
    without = Told()(z, torch.full((3,), 7), context=nothing.expand(3, 4, 6))
    if w in (0, -1):
        assert out_uncond is None and [len(x) for x, *_ in net.asked] == [3]
        assert torch.equal(out, without if w else with_text)
    else:
        assert sum(len(x) for x, *_ in net.asked) == 6
        guided = (1 + w) * out - w * out_uncond
        torch.testing.assert_close(guided, (1 + w) * with_text - w * without)
    assert {t for _, ts, _ in net.asked for t in ts} == {7}


# ------------------------------------------------------------------------------- exact Gaussians


class Exact(torch.nn.Module):
    """The best eps_hat for data N(c, s^2), c the mean of the context (B,77,1), in float64."""

    def __init__(self, alpha_bar, s):
        super().__init__()
        self.alpha_bar, self.s = alpha_bar, s

    def forward(self, z, t, y=None, context=None):
        a = self.alpha_bar[t][:, None, None, None]
        c = context.mean(dim=(1, 2))[:, None, None, None]
        return (1 - a).sqrt() * (z - a.sqrt() * c) / (a * self.s**2 + 1 - a)


def contexts(*means):
    return torch.tensor(means, dtype=torch.float64)[:, None, None].expand(-1, 77, 1)


def spread(a, s):
    """Standard deviation of z_t."""
    return (a * s**2 + 1 - a) ** 0.5


def evenly_spaced_log_snr(steps):
    return torch.sigmoid(2 * torch.linspace(3, -3, steps + 1, dtype=torch.float64))


MEANS, NOTHING, S = (0.4, -0.9), 0.3, 0.5


def guided_means(w):
    return [(1 + w) * c - w * NOTHING for c in MEANS]


def end(sampler, alpha_bar, pairs, w):
    """Mean and standard deviation of where samples of z_t, spread as they should, are led to; and
    what those of z_t_prev of the last pair are."""
    rays = torch.linspace(-2, 2, 2 * 3 * 4, dtype=torch.float64)
    rays = (rays / rays.std(correction=0)).reshape(1, 2, 3, 4)  # of mean 0 and variance 1
    means = torch.tensor(guided_means(w), dtype=torch.float64)[:, None, None, None]
    first, t_prev = pairs[0][0], pairs[-1][1]
    a, a_prev = (alpha_bar[t].item() if t >= 0 else 1.0 for t in (first, t_prev))
    z = a**0.5 * means + spread(a, S) * rays
    how = contexts(*MEANS), contexts(NOTHING), w, sampler
    *_, (z, _) = sd.denoise(Exact(alpha_bar, S), alpha_bar, pairs, z, torch.arange(2), *how)
    assert z.dtype == torch.float64
    found = z.mean(dim=(1, 2, 3)), z.std(dim=(1, 2, 3), correction=0)
    return *found, a_prev**0.5 * means.flatten(), spread(a_prev, S)


@pytest.mark.parametrize("w", [0, -1, 2])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp", 2)])
def test_a_walk_converges_at_its_order(sampler, order, w):
    """The mean is met exactly, the standard deviation in the limit of many steps."""
    alpha_bar, errors = evenly_spaced_log_snr(240), []
    for steps in (30, 60, 120):
        ts = range(240, -1, -240 // steps)
        mean, std, true_mean, true_std = end(sampler, alpha_bar, list(pairwise(ts)), w)
        torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-12)
        errors.append((std - true_std).abs().max().item())
    orders = [math.log2(some / fewer) for some, fewer in pairwise(errors)]
    assert all(abs(measured - order) < 0.12 for measured in orders), (errors, orders)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_the_published_timesteps_lead_to_the_data(sampler):
    errors = []
    for steps in (20, 320):
        pairs = sd.timesteps(sampler, T, steps)
        mean, std, true_mean, true_std = end(sampler, ALPHA_BAR, pairs, 1.5)
        torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-12)
        errors.append((std - true_std).abs().max().item())
    assert errors[1] < errors[0] / 8 and errors[1] < 0.01 * S, errors


@pytest.mark.parametrize("steps", [2, 25])
def test_euler_a_has_the_right_moments_at_every_step(steps):
    """Of a single point: there the ancestral step is exact, however long. 65,536 values a mean."""
    w, seeds = 2, torch.arange(32)
    context = contexts(*MEANS).repeat_interleave(16, dim=0)
    means = torch.tensor(guided_means(w)).repeat_interleave(16)[:, None, None, None]
    pairs = sd.timesteps("euler_a", T, steps)
    a = at(pairs[0][0])
    z = a**0.5 * means + (1 - a) ** 0.5 * gaussian((32, 4, 32, 32), seeds, -1, "cpu").double()
    net = Exact(ALPHA_BAR, 0.0)
    walk = sd.denoise(net, ALPHA_BAR, pairs, z, seeds, context, contexts(NOTHING), w, "euler_a")
    count = 16 * 4 * 32 * 32
    for (_, t_prev), (z, _) in zip(pairs, walk, strict=True):
        a = at(t_prev)
        for half, mean in zip(z.chunk(2), guided_means(w), strict=True):
            assert abs(half.mean() - a**0.5 * mean) <= 4.5 * ((1 - a) / count) ** 0.5 + 1e-6
            if a < 1:
                assert abs(half.var() / (1 - a) - 1) < 4.5 * (2 / count) ** 0.5
    assert (z - means).abs().max() < 1e-6


# -------------------------------------------------------------------------------- a part is known


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler_a"])
def test_what_is_known_is_at_each_step_as_noisy_as_it_should_be(sampler):
    """These networks look at each place alone, so what is painted does not see the rest."""
    generator = torch.Generator().manual_seed(0)
    noise, z0, eps = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64, generator=generator)
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mask[..., 2:5, 1:4] = 1
    painted = mask.expand(2, 4, 6, 5) == 1
    pairs, seeds = sd.timesteps(sampler, T, 6), torch.tensor([4, 9])
    where = Exact(ALPHA_BAR, S), ALPHA_BAR, pairs, noise, seeds
    where += contexts(*MEANS), contexts(NOTHING), 2, sampler
    free = [z.clone() for z, _ in sd.denoise(*where)]
    walk = sd.denoise(*where, known=(z0[:1], mask, eps))
    for (_, t_prev), (z, _), other in zip(pairs, walk, free, strict=True):
        a = 1.0 if t_prev == pairs[-1][1] else at(t_prev)
        wanted = a**0.5 * z0[:1] + (1 - a) ** 0.5 * eps
        torch.testing.assert_close(z[~painted], wanted[~painted], rtol=0, atol=1e-6)
        torch.testing.assert_close(z[painted], other[painted], rtol=0, atol=1e-6)
    assert (z - z0[:1])[~painted].abs().max() < 1e-12


# --------------------------------------------------------------------------- what is not finite


class Breaking(torch.nn.Module):
    """Makes of the row with a context of ones NaN or infinity, from its second call on."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, z, t, y=None, context=None):
        self.calls += 1
        bad = (context.mean(dim=(1, 2)) == 1)[:, None, None, None] & (self.calls > 1)
        return torch.where(bad, self.value, z)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_latent_that_is_not_finite_stops_the_walk_at_its_step(value):
    z, seeds = torch.ones(3, 4, 2, 2), torch.tensor([4, 9, 12])
    how = contexts(0.0, 1.0, 1.0), contexts(0.0), 0, "ddim"
    pairs = sd.timesteps("ddim", T, 3)
    walk = watched(sd.denoise(Breaking(value), ALPHA_BAR, pairs, z, seeds, *how), seeds, pairs)
    assert next(walk)[0].isfinite().all()
    where = f"seed 9 leaves the finite numbers in step 2 of 3, at t = {pairs[1][0]}: "
    with pytest.raises(BadInput, match=where):
        next(walk)
