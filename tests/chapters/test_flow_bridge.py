"""One network as a chain, as EDM's denoiser and as a flow: the same images by the same steps.

Where sqrt(a) = alpha_bar^1/2, x_t = sqrt(a) x_0 + sqrt(1-a) eps of a chain is so many times that of
the flow with t / (1-t) = sqrt(1-a) / sqrt(a) as these two numbers add up to.
"""

import math

import pytest
import torch
from flow_math import MEAN, SHAPE, STD, best, on_path, random
from gaussian_data import in_float64

import ddim
import ddpm_pixel
import edm
import flow_matching as flow
from kernels import gaussian

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LABELS = torch.tensor([0, 2, 1])
SEEDS = torch.tensor([5, 6, 1000])
CHAINS = {
    "short": torch.sigmoid(2 * torch.linspace(3, -3, 40, dtype=torch.float64)),
    "linear": ddpm_pixel.make_alpha_bar("linear", 1000),
}
GUIDED = [(None, 0.0), (LABELS, 0.0), (LABELS, 2.0), (LABELS, -1.0)]
PREDICTIONS = ["eps", "x0", "v"]


@pytest.fixture(autouse=True)
def double():
    """Everything in float64, the numbers of the noise included."""
    with in_float64(ddim, ddpm_pixel):
        yield


class Small(torch.nn.Module):
    """A random network of x, time and label; `more` channels beyond those of x, as of variances."""

    null = 3

    def __init__(self, seed=0, more=0):
        super().__init__()
        channels = SHAPE[0] + more
        self.mix = torch.nn.Parameter(random(channels, SHAPE[0], seed=seed))
        self.of_t = torch.nn.Parameter(random(channels, 1, 1, seed=seed + 1))
        self.of_y = torch.nn.Parameter(random(4, channels, seed=seed + 2))

    def forward(self, x, t, y=None):
        assert t.shape == (len(x),)
        y = torch.full((len(x),), self.null) if y is None else y
        bend = torch.sin(self.of_t * t.to(x.dtype).view(-1, 1, 1, 1) / 100)
        h = torch.einsum("ij,bjhw->bihw", self.mix, x) + bend
        return torch.tanh(h + self.of_y[y][:, :, None, None])


def told(net, x, t, y, w):
    """The guided output, written out."""
    t = torch.full((len(x),), t)
    out = net(x, t, y)[:, : x.shape[1]]
    none = None if y is None else torch.full_like(y, net.null)
    return out if y is None else (1 + w) * out - w * net(x, t, none)[:, : x.shape[1]]


def guess(prediction, x, out, a):
    """x0_hat of x = sqrt(a) x_0 + sqrt(1-a) eps, where v is sqrt(a) eps - sqrt(1-a) x_0."""
    image, noise = math.sqrt(a), math.sqrt(1 - a)
    return {"eps": (x - noise * out) / image, "x0": out, "v": image * x - noise * out}[prediction]


def place_of(a):
    """(t of the flow, how many times its x the chain's is) of alpha_bar = a."""
    size = math.sqrt(a) + math.sqrt(1 - a)
    return math.sqrt(1 - a) / size, size


def places(alpha_bar, pairs):
    """place_of of each timestep of the pairs, and of the image, where they end."""
    return [place_of(ddim.at(alpha_bar, t)) for t in (pairs[0][0], *(t for _, t in pairs))]


# ------------------------------------------------------------------------- a network of a flow


@pytest.mark.parametrize("y, w", GUIDED, ids=["no labels", "0", "2", "-1"])
def test_velocity_of_a_flow_is_what_its_network_gives(y, w):
    net, x = Small(), 2 * random(3, *SHAPE, seed=9)
    for t in (0.0, 0.01, 0.6, 1.0):
        slope = told(net, x, 1000 * t, y, w)
        torch.testing.assert_close(flow.velocity(net, y=y, w=w)(x, t), slope, **CLOSE)
        if t:
            slope = (x - (x - t * slope).clamp(-1, 1)) / t  # at 0 the image is x itself
        torch.testing.assert_close(flow.velocity(net, y=y, w=w, clip=True)(x, t), slope, **CLOSE)


def test_clipping_does_not_hide_an_infinite_number():
    v = flow.velocity(lambda x, t, y: x / 0, clip=True)
    assert v(torch.ones(1, *SHAPE), 0.5).isnan().all()


# ---------------------------------------------------------------- a network of a chain as a flow


@pytest.mark.parametrize("y, w", GUIDED, ids=["no labels", "0", "2", "-1"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CHAINS)
def test_velocity_is_the_slope_from_the_chains_guess(name, prediction, clip, y, w):
    net, alpha_bar = Small(), CHAINS[name]
    v = flow.velocity(net, flow.Bent(edm.Chain(alpha_bar, prediction)), y, w, clip)
    clipped, timesteps = 0, range(0, len(alpha_bar), max(1, len(alpha_bar) // 20))
    for step in timesteps:
        a, x = alpha_bar[step].item(), random(3, *SHAPE, seed=step)
        t, size = place_of(a)
        x0_hat = guess(prediction, size * x, told(net, size * x, step, y, w), a)
        clipped += (x0_hat.abs() > 1).any().item()
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        torch.testing.assert_close(v(x, t), (x - x0_hat) / t, **CLOSE)
    assert clipped > len(timesteps) // 2 or prediction == "x0"


@pytest.mark.parametrize("more", [0, 2], ids=["C channels", "2C channels"])
@pytest.mark.parametrize("y, w", GUIDED, ids=["no labels", "0", "2", "-1"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eulers_steps_are_those_of_ddim(prediction, clip, y, w, more):
    """In other coordinates; with 2C channels the network has learned variances, too."""
    net = Small(more=more)
    for alpha_bar in CHAINS.values():
        pairs = ddim.subsequence(len(alpha_bar), 10)
        how = {"prediction": prediction, "clip": clip}
        x = random(3, *SHAPE, seed=3)
        wanted = ddim.decode(net, alpha_bar, pairs, x, y, w, **how)
        sizes = [size for _, size in places(alpha_bar, pairs)]
        times = [t for t, _ in places(alpha_bar, pairs)]
        v = flow.velocity(net, flow.Bent(edm.Chain(alpha_bar, prediction)), y, w, clip)
        with torch.no_grad():
            found = list(flow.follow(v, x / sizes[0], times, "euler"))
        for size, one, other in zip(sizes[1:], found, wanted, strict=True):
            torch.testing.assert_close(one[0] * size, other[0], **CLOSE)
            torch.testing.assert_close(one[1], other[1], **CLOSE)
        assert times[-1] == 0 and sizes[-1] == 1


@pytest.mark.parametrize("y, w", GUIDED, ids=["no labels", "0", "2", "-1"])
def test_velocity_is_the_slope_from_edms_guess(y, w):
    net, sigma_data = Small(), 0.6
    v = flow.velocity(net, flow.Bent(edm.Edm(sigma_data)), y, w)
    for t in (0.002, 0.01, 0.3, 0.5, 0.9, 80 / 81):
        x, sigma = random(3, *SHAPE, seed=4), t / (1 - t)
        form = torch.full((3, 1, 1, 1), sigma)
        D = edm.denoise(net, x / (1 - t), form, sigma_data, y)
        if w:
            none = torch.full_like(y, net.null)
            D = (1 + w) * D - w * edm.denoise(net, x / (1 - t), form, sigma_data, none)
        torch.testing.assert_close(v(x, t), (x - D) / t, **CLOSE)


RANGES = [  # what a network knows, and the sigmas that are asked of it
    (edm.Edm(0.5), 0.002, 80.0),
    (edm.Edm(0.5, 0.01, 50.0), 0.01, 50.0),
    (edm.Chain(CHAINS["short"]), math.exp(-3), math.exp(3)),
    (edm.Chain(ddpm_pixel.make_alpha_bar("linear", 1000)), 0.01, 157.407),
]


@pytest.mark.parametrize("column, low, high", RANGES)
def test_sigmas_that_a_network_does_not_know_are_not_asked(column, low, high):
    bent, low = flow.Bent(column), low / (1 + low)
    assert bent.last / (1 - bent.last) == pytest.approx(high, rel=1e-4)
    for beyond, end in ((0.0, low), (low / 2, low), (1.0, bent.last), (1 - 1e-3, bent.last)):
        assert bent(beyond) == pytest.approx(bent(end), rel=1e-4)
    for within, end in ((1.1 * low, low), (0.9 * bent.last, bent.last)):
        assert bent(within) != pytest.approx(bent(end), rel=1e-2)


# --------------------------------------------------------------------------- a flow as a chain


@pytest.mark.parametrize("y", [None, LABELS], ids=["no labels", "labels"])
def test_noise_that_a_flow_finds(y):
    net, alpha_bar = Small(), CHAINS["linear"]
    chain = flow.AsChain(net, alpha_bar)
    steps, x = torch.tensor([0, 400, 999]), random(3, *SHAPE, seed=6)
    found = chain(x, steps, y)
    for i, step in enumerate(steps.tolist()):
        t, size = place_of(alpha_bar[step].item())
        one, label = x[i : i + 1] / size, None if y is None else y[i : i + 1]
        wanted = one + (1 - t) * net(one, torch.tensor([1000 * t]), label)
        torch.testing.assert_close(found[i : i + 1], wanted, **CLOSE)
    assert chain.null == 3 and chain.null_label
    net.null_label = False  # has not learned to do without a label
    assert not flow.AsChain(net, alpha_bar).null_label
    assert [*chain.parameters()] == [*net.parameters()]


def test_a_flow_in_float32_stays_there():
    asked = []

    def net(x, t, y):
        asked.append(t)
        return x

    net.null = 0
    chain = flow.AsChain(net, CHAINS["short"])
    x = random(2, *SHAPE, seed=6)
    found, exact = (chain(x.to(dtype), torch.tensor([3, 30])) for dtype in (torch.float32, x.dtype))
    assert [t.dtype for t in asked] == [torch.float32, torch.float64]
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-6)


class Slope(torch.nn.Module):
    """The velocity of a chain's network, as a network that learned it would be called."""

    null = Small.null

    def __init__(self, net, alpha_bar, prediction):
        super().__init__()
        self.net, self.column = net, flow.Bent(edm.Chain(alpha_bar, prediction))

    def forward(self, x, t, y=None):
        labels = [None] * len(x) if y is None else y.split(1)
        each = zip(x.split(1), (t / 1000).tolist(), labels, strict=True)
        return torch.cat([flow.velocity(self.net, self.column, y)(x, t) for x, t, y in each])


@pytest.mark.parametrize("y", [None, LABELS], ids=["no labels", "labels"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CHAINS)
def test_there_and_back_is_the_noise_that_the_network_found(name, prediction, y):
    net, alpha_bar = Small(), CHAINS[name]
    back = flow.AsChain(Slope(net, alpha_bar, prediction), alpha_bar)
    last = len(alpha_bar) - 1
    for steps in ([0, 1, last], [last // 2, last - 1, 7]):
        x, steps = random(3, *SHAPE, seed=7), torch.tensor(steps)
        out = net(x, steps, y)
        a = alpha_bar[steps].view(3, 1, 1, 1)
        image, noise = a.sqrt(), (1 - a).sqrt()
        of_v = noise * x + image * out  # the noise in v = sqrt(a) eps - sqrt(1-a) x_0
        eps_hat = {"eps": out, "x0": (x - image * out) / noise, "v": of_v}[prediction]
        torch.testing.assert_close(back(x, steps, y), eps_hat, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("y, w", GUIDED, ids=["no labels", "0", "2", "-1"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddims_steps_are_eulers_of_the_flow(clip, y, w):
    net = Small()
    for alpha_bar in (*CHAINS.values(), ddpm_pixel.alpha_bar_of(flow.CHAIN)):
        pairs, x = ddim.subsequence(len(alpha_bar), 7), random(3, *SHAPE, seed=8)
        wanted = ddim.decode(flow.AsChain(net, alpha_bar), alpha_bar, pairs, x, y, w, clip=clip)
        times, sizes = zip(*places(alpha_bar, pairs), strict=True)
        with torch.no_grad():
            v = flow.velocity(net, y=y, w=w, clip=clip)
            found = list(flow.follow(v, x / sizes[0], times, "euler"))
        for size, one, other in zip(sizes[1:], found, wanted, strict=True):
            torch.testing.assert_close(one[0] * size, other[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------- samples of seeds


class Gaussian(torch.nn.Module):
    """The best flow of Gaussian data; asks for its time in thousandths, the same for all."""

    null = 0

    def forward(self, x, t, y=None):
        return best(x, t[0] / 1000)


class GaussianChain(torch.nn.Module):
    """The best eps_hat of the same data on the chain that a flow is sampled as."""

    null = 0

    def forward(self, x, t, y=None):
        a = ddpm_pixel.alpha_bar_of(flow.CHAIN)[t[0]]
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)


def test_the_chain_of_a_flow_goes_all_its_way():
    """x_T is noise alone: the flow must be asked where, to three digits, nothing else is left."""
    alpha_bar = ddpm_pixel.alpha_bar_of(flow.CHAIN)
    (first, _), (last, _) = place_of(alpha_bar[0].item()), place_of(alpha_bar[-1].item())
    assert first < 0.01 and last > 0.999


def test_samples_of_gaussian_data_are_the_ends_of_their_paths():
    cfg = flow.Config(sampler="rk45", tolerance=1e-8, sample_steps=3, shift=2.0)
    z = gaussian((3, *SHAPE), SEEDS, -1, "cpu").double()
    way = flow.sample(Gaussian(), flow.straight, cfg, SHAPE, SEEDS)
    for t, (x, _) in zip((0.8, 0.5, 0.0), way, strict=True):
        torch.testing.assert_close(x, on_path(z, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_samples_of_gaussian_data_by_the_ancestral_steps_of_chapter_1(clip):
    cfg = flow.Config(sampler="ddpm", sample_steps=8, clip_denoised=clip)
    found = flow.sample(Gaussian(), flow.straight, cfg, SHAPE, SEEDS)
    alpha_bar, pairs = ddpm_pixel.alpha_bar_of(flow.CHAIN), ddpm_pixel.timestep_pairs(1000, 8)
    wanted = ddpm_pixel.sample(GaussianChain(), alpha_bar, pairs, SHAPE, SEEDS, clip=clip)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("w", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "ddpm"])
def test_samples_follow_the_settings(sampler, w):
    net = Small()
    how = {"sampler": sampler, "sample_steps": 5, "guidance": w, "clip_denoised": True}
    cfg, z = flow.Config(shift=3.0, **how), ddim.noise(SEEDS, SHAPE)
    found = list(flow.sample(net, flow.straight, cfg, SHAPE, SEEDS, LABELS))
    if sampler == "ddpm":
        alpha_bar, pairs = ddpm_pixel.alpha_bar_of(flow.CHAIN), ddpm_pixel.timestep_pairs(1000, 5)
        chain = flow.AsChain(net, alpha_bar)
        wanted = ddpm_pixel.sample(chain, alpha_bar, pairs, SHAPE, SEEDS, LABELS, w)
    else:
        times = [3 * t / (1 + 2 * t) for t in (1, 0.8, 0.6, 0.4, 0.2, 0)]
        with torch.no_grad():
            v = flow.velocity(net, flow.straight, LABELS, w, True)
            wanted = list(flow.follow(v, z, times, sampler))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_sample_in_one_step_is_that_of_ddim_from_the_last_timestep(prediction, clip):
    """They start from the same noise, and the step is x0_hat, of the noisiest x that is known."""
    net, alpha_bar = Small(), CHAINS["short"]
    bent = flow.Bent(edm.Chain(alpha_bar, prediction))
    cfg = flow.Config(sampler="euler", sample_steps=1, clip_denoised=clip)
    (found,) = flow.sample(net, bent, cfg, SHAPE, SEEDS)
    how = {"prediction": prediction, "clip": clip}
    (wanted,) = ddim.sample(net, alpha_bar, [(39, -1)], SHAPE, SEEDS, **how)
    torch.testing.assert_close(found, wanted, **CLOSE)
