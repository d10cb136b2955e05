"""DDPM's mathematics: schedules, q(x_t | x_0), the U-Net, L_simple, Algorithm 2, guidance.

Each against the paper's formulas in plain numbers, against data of which all is known, or against
the code of others.
"""

from runtime.commandline import BadInput

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from training_step import training_step

import ddpm_pixel as ch1
from kernels import gaussian, sampling_update

SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTIONS = ("eps", "x0", "v")


# -------------------------------------------------------------------------------- the schedules


def test_linear_schedule_is_that_of_the_paper():
    alpha_bar = ch1.make_alpha_bar("linear", 1000)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    expected = [math.exp(sum(math.log1p(-b) for b in betas[: t + 1])) for t in (0, 1, 500, 999)]
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar[[0, 1, 500, 999]].tolist() == pytest.approx(expected, rel=1e-12)
    assert alpha_bar[-1] == pytest.approx(4.036e-5, rel=1e-3)  # the figure of the public code


def test_cosine_schedule_follows_equation_17_until_beta_is_clipped():
    T = 400
    alpha_bar = ch1.make_alpha_bar("cosine", T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    for t in (0, 1, 100, 390):
        assert alpha_bar[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-10)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3)  # beta_T clipped to 0.999


def test_sigmoid_schedule_is_that_of_its_paper_until_it_is_clipped():
    """gamma(t) of Jabri et al. 2022 with start -3, end 3, tau 1, written in numbers."""
    T = 500
    alpha_bar = ch1.make_alpha_bar("sigmoid", T)

    def gamma(t):
        def s(u):
            return 1 / (1 + math.exp(-u))

        return (s(3) - s(t * 6 - 3)) / (s(3) - s(-3))

    for t in (0, 1, 250, 480):
        assert alpha_bar[t].item() == pytest.approx(gamma((t + 1) / T), rel=1e-9)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [50, 500, 1000, 2000])
def test_any_length_goes_from_image_to_noise(schedule, T):
    alpha_bar = ch1.make_alpha_bar(schedule, T)
    assert len(alpha_bar) == T and (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.99 - 5 / T and 0 < alpha_bar[-1] < 1e-3


def test_a_chain_of_another_length_keeps_the_noise_at_each_part_of_the_way():
    thousand = ch1.make_alpha_bar("linear", 1000)
    for T in (250, 500, 4000):
        other = ch1.make_alpha_bar("linear", T)
        for part in (0.25, 0.5, 0.75):
            here, there = other[int(part * T) - 1].item(), thousand[int(part * 1000) - 1].item()
            assert math.log(here) == pytest.approx(math.log(there), rel=0.03)


def test_the_clip_of_alpha_is_an_option():
    for schedule in ("cosine", "sigmoid"):
        free = ch1.make_alpha_bar(schedule, 50, alpha_min=0.0)
        clipped = ch1.make_alpha_bar(schedule, 50, alpha_min=0.1)
        assert abs(free[-1]) < 1e-15  # all is noise
        alphas = clipped / torch.cat([torch.ones(1).double(), clipped[:-1]])
        assert alphas.min().item() == pytest.approx(0.1)
        torch.testing.assert_close(free[:40], clipped[:40], rtol=1e-12, atol=0)
    short = ch1.make_alpha_bar("linear", 15)  # beta_t would reach 0.02 1000 / 15 = 4/3
    assert short[-1] / short[-2] == pytest.approx(0.001)


@pytest.mark.parametrize("name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_those_of_diffusers(name, theirs):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    ours, theirs = ch1.make_alpha_bar(name, 1000), scheduler.alphas_cumprod.double()
    torch.testing.assert_close(ours.log(), theirs.log(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "schedule, T, alpha_min, prediction, told",
    [
        ("cosine", 100, 1.0, "v", "must fall"),
        ("linear", 10, 0.0, "v", "must fall"),
        ("cosine", 100, 0.0, "eps", "type --prediction v"),
    ],
)
def test_a_schedule_that_makes_no_chain_is_refused(schedule, T, alpha_min, prediction, told):
    chain = {"schedule": schedule, "timesteps": T, "alpha_min": alpha_min}
    cfg = ch1.Config(gpus=0, sample_steps=5, prediction=prediction, **chain)
    with pytest.raises(BadInput, match=told):
        ch1.check(cfg)
    ch1.check(dataclasses.replace(cfg, timesteps=100, alpha_min=0.001))


# -------------------------------------------------------------------------- the forward process


def test_the_marginals_are_those_of_the_chain_of_single_steps():
    """Mean and variance carried through x_t = sqrt(1-b) x_(t-1) + sqrt(b) z, eq. 2."""
    mean, variance = 1.0, 0.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        if t in (0, 300, 999):
            a = ch1.make_alpha_bar("linear", 1000)[t].item()
            assert (a**0.5, 1 - a) == pytest.approx((mean, variance), rel=1e-9)


def test_q_sample_has_the_mean_and_variance_of_equation_4():
    alpha_bar = ch1.make_alpha_bar("linear", 1000)
    x0 = torch.full((20000, 1, 1, 1), 0.5)
    for t in (0, 300, 999):
        ts = torch.full((20000,), t)
        eps = gaussian(x0.shape, torch.arange(20000), t, "cpu")
        x_t = ch1.q_sample(x0, ts, eps, alpha_bar)
        a = alpha_bar[t].item()
        assert x_t.mean().item() == pytest.approx(0.5 * a**0.5, abs=4 * ((1 - a) / 20000) ** 0.5)
        assert x_t.var().item() == pytest.approx(1 - a, rel=0.05)
        torch.testing.assert_close(x_t, a**0.5 * x0 + (1 - a) ** 0.5 * eps)


# ------------------------------------------------------------------------------------ the U-Net

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,)}


def build(shape=(3, 8, 8), classes=5, **settings):
    torch.manual_seed(0)
    net = ch1.UNet(shape, classes, ch1.Config(**{**SMALL, **settings}))
    return net.to(memory_format=torch.channels_last)


def opened(net):
    """The network with its zero layers opened: they would hide what lies behind them."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(shape=(3, 8, 8), n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)
    return x, torch.tensor([0, 10, 999, 4])[:n], torch.tensor([0, 4, 5, 2])[:n]


def test_timestep_embedding_is_sines_and_cosines():
    e = ch1.timestep_embedding(torch.tensor([0, 7]), 8)
    frequencies = [10000 ** (-i / 3) for i in range(4)]
    assert e[1].tolist()[:4] == pytest.approx([math.sin(7 * f) for f in frequencies], abs=1e-6)
    assert e[1].tolist()[4:] == pytest.approx([math.cos(7 * f) for f in frequencies], abs=1e-6)
    assert e[0].tolist() == [0] * 4 + [1] * 4


def test_the_settings_for_cifar10_make_the_35_7_million_parameters_of_the_paper():
    paper = {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2}
    with torch.device("meta"):
        net = ch1.UNet((3, 32, 32), 0, ch1.Config(**paper, attention_resolutions=(16,)))
    # The published checkpoint google/ddpm-cifar10-32 has exactly this many.
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert {m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (2, 16, 8)])
def test_the_network_keeps_shape_starts_at_zero_and_reaches_every_parameter(shape):
    net, (x, t, y) = build(shape), inputs(shape, 4)
    out = net(x, t, y)
    assert out.shape == x.shape and (out == 0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # zero layers open one after the other
        optimizer.zero_grad()
        (net(x, t, y) - x).square().mean().backward()
        optimizer.step()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_no_label_is_the_label_num_classes():
    net, (x, t, _) = opened(build()), inputs()
    assert net.null == 5 and torch.equal(net(x, t), net(x, t, torch.full((3,), 5)))
    assert not torch.equal(net(x, t), net(x, t, torch.zeros(3, dtype=torch.long)))
    unlabelled = opened(build(classes=0))
    assert unlabelled.null == 0 and torch.equal(unlabelled(x, t), unlabelled(x, t, None))


def gradients(net, use_checkpoint):
    """(output, gradients, bytes kept for backward) of a training step with dropout."""
    net.cfg.use_checkpoint = use_checkpoint
    return training_step(net, inputs())


def test_use_checkpoint_keeps_less_and_gives_the_same_gradients():
    net = opened(build(dropout=0.2, num_res_blocks=2))
    out, grads, size = gradients(net, use_checkpoint=False)
    again, grads_again, smaller = gradients(net, use_checkpoint=True)
    assert torch.equal(out, again)
    for name in grads:
        torch.testing.assert_close(grads_again[name], grads[name], rtol=1e-6, atol=1e-6, msg=name)
    assert smaller < 0.5 * size


# ------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_the_loss_is_the_mean_distance_to_what_is_predicted(prediction, loss):
    x0, eps, out = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, alpha_bar, y = torch.tensor([0, 10, 50, 98]), ch1.make_alpha_bar("cosine", 100), object()
    seen = []

    def net(*given):
        seen.extend(given)
        return out

    found = ch1.simple_loss(net, x0, t, eps, alpha_bar, y, prediction=prediction, loss=loss)
    a = alpha_bar[t].view(-1, 1, 1, 1).numpy()
    x, e, m = (v.double().numpy() for v in (x0, eps, out))
    target = {"eps": e, "x0": x, "v": np.sqrt(a) * e - np.sqrt(1 - a) * x}[prediction]
    d = np.abs(m - target)
    each = {"l2": d**2, "l1": d, "huber": np.where(d < 1, d**2 / 2, d - 0.5)}[loss]
    np.testing.assert_allclose(found.detach(), each.mean((1, 2, 3)), rtol=2e-6)
    np.testing.assert_allclose(seen[0], np.sqrt(a) * x + np.sqrt(1 - a) * e, rtol=0, atol=1e-6)
    assert seen[1] is t and seen[2] is y


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_give_back_image_and_noise(prediction):
    """x0 and eps follow from x_t and the target: Salimans, Ho 2022, appendix D."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=g)
    alpha_bar, t = ch1.make_alpha_bar("cosine", 100), torch.tensor([0, 3, 50, 90, 98])
    x_t = ch1.q_sample(x0, t, eps, alpha_bar)
    m = ch1.target_of(prediction, x0, eps, alpha_bar[t])
    alpha, sigma = (s.view(-1, 1, 1, 1) for s in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    found = {
        "eps": lambda: ((x_t - sigma * m) / alpha, m),
        "x0": lambda: (m, (x_t - alpha * m) / sigma),
        "v": lambda: (alpha * x_t - sigma * m, sigma * x_t + alpha * m),
    }[prediction]()
    torch.testing.assert_close(found[0], x0)
    torch.testing.assert_close(found[1], eps)
    for i, a in enumerate(alpha_bar[t].tolist()):
        p, q = ch1.x0_coefficients(a, prediction)
        torch.testing.assert_close(p * x_t[i] - q * m[i], x0[i])  # eq. 15, and its like


# ---------------------------------------------------------------------------- one step of a walk

ALPHA_BAR = ch1.make_alpha_bar("linear", 1000)
STEPS = [(999, 998), (500, 499), (1, 0), (999, 799), (300, 7)]  # of one and of many timesteps


def step_of(row, x_t, out, **how):
    """x_{t-1} and x0_hat of a row, in float64."""
    return sampling_update(x_t, out, row, step=0, clip=False, **how)


@pytest.mark.parametrize("t, t_prev", STEPS)
def test_a_step_is_the_posterior_of_bayes_rule(t, t_prev):
    """q(x_prev | x_t, x_0) is proportional to q(x_t | x_prev) q(x_prev | x_0): eq. 6 and 7.

    The precisions of the two Gaussians in x_prev add up, and so do precision times mean.
    """
    a, a_prev = ALPHA_BAR[t].item(), ALPHA_BAR[t_prev].item()
    x_t, x0 = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    alpha = a / a_prev  # x_t = sqrt(alpha) x_prev + sqrt(1 - alpha) z
    precision = alpha / (1 - alpha) + 1 / (1 - a_prev)
    mean = alpha**0.5 * x_t / (1 - alpha) + a_prev**0.5 * x0 / (1 - a_prev)
    row = ch1.ancestral_row(a, a_prev, "x0")
    assert pytest.approx(precision**-0.5, rel=1e-9) == row.S
    found, x0_hat = step_of(row._replace(S=0.0), x_t, x0)
    torch.testing.assert_close(found, mean / precision, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x0_hat, x0)


@pytest.mark.parametrize("t", [999, 500, 1])
def test_of_the_noise_it_is_equation_11_with_either_variance(t):
    """1/sqrt(alpha_t) (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_hat) + sigma_t z."""
    beta = 1e-4 + (0.02 - 1e-4) * t / 999
    a, a_prev = ALPHA_BAR[t].item(), ALPHA_BAR[t - 1].item()
    x_t, eps_hat = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    mean = (x_t - beta / (1 - a) ** 0.5 * eps_hat) / (1 - beta) ** 0.5
    seeds = torch.arange(4)
    z = gaussian(x_t.shape, seeds, 0, "cpu").double()
    for variance, square in (("large", beta), ("small", (1 - a_prev) / (1 - a) * beta)):
        row = ch1.ancestral_row(a, a_prev, variance=variance)
        found, _ = step_of(row._replace(S=0.0), x_t, eps_hat)
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-9)
        assert pytest.approx(square**0.5, rel=1e-9) == row.S
        found, _ = step_of(row, x_t, eps_hat, seeds=seeds)
        torch.testing.assert_close(found, mean + square**0.5 * z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_last_step_is_the_estimate_of_the_image(prediction):
    a = ALPHA_BAR[0].item()
    x_t, out = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    for variance in ("small", "large"):
        row = ch1.ancestral_row(a, 1.0, prediction, variance)
        found, x0_hat = step_of(row, x_t, out, seeds=torch.arange(4))
        assert row.S == 0
        torch.testing.assert_close(found, x0_hat, rtol=0, atol=1e-14)


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (10, 1), (2, 2)])
def test_timestep_pairs_walk_down_to_the_image(T, steps):
    pairs = ch1.timestep_pairs(T, steps)
    assert len(pairs) == steps and pairs[0][0] == T - 1 and pairs[-1][1] == -1
    assert all(t > t_prev for t, t_prev in pairs)
    assert all(a[1] == b[0] for a, b in zip(pairs, pairs[1:], strict=False))
    with pytest.raises(BadInput, match=f"--sample-steps {T + 1} exceeds"):
        ch1.timestep_pairs(T, T + 1)


# ------------------------------------------------------------------------------- the whole walk


class Known(torch.nn.Module):
    """eps_hat of data N(means[y], s^2) in closed form; keeps the batch size of every call.

    The last of the means is that of all data together, the label net.null.
    """

    def __init__(self, alpha_bar, means, s):
        super().__init__()
        self.alpha_bar, self.s, self.calls, self.null = alpha_bar, s, [], len(means) - 1
        self.means = torch.tensor(means, dtype=torch.float64)

    def forward(self, x, t, y=None):
        self.calls.append(len(x))
        y = torch.full_like(t, self.null) if y is None else y
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        mean = self.means[y].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x - a.sqrt() * mean) / (a * self.s**2 + 1 - a)).float()


def walk(net, steps, n=4000, y=None, seeds=None, **options):
    """The images (n,1,1,1) at the end of a walk down net's chain."""
    seeds = torch.arange(n) if seeds is None else seeds
    pairs = ch1.timestep_pairs(len(net.alpha_bar), steps)
    *_, (x, x0_hat) = ch1.sample(net, net.alpha_bar, pairs, (1, 1, 1), seeds, y, **options)
    assert torch.equal(x, x0_hat)  # the last step is the estimate
    return x


@pytest.mark.parametrize("variance", ["small", "large"])
def test_with_the_true_score_samples_have_the_mean_and_spread_of_the_data(variance):
    net = Known(ch1.make_alpha_bar("cosine", 200), [0.3, 0.0], 0.2)
    make_row = partial(ch1.ancestral_row, variance=variance)
    x = walk(net, 200, y=torch.zeros(4000, dtype=torch.long), make_row=make_row)
    assert x.mean().item() == pytest.approx(0.3, abs=0.015)
    assert x.std().item() == pytest.approx(0.2, rel=0.06)


@pytest.mark.parametrize("w", [-1, 0, 1.5])
def test_guidance_moves_the_mean_away_from_that_of_all_data(w):
    """(1+w) eps(x,y) - w eps(x) of two Gaussians of one spread: that of mean (1+w) m_y - w m."""
    net = Known(ch1.make_alpha_bar("cosine", 200), [0.2, -0.3, 0.1], 0.1)
    y = torch.arange(4000) % 2
    x = walk(net, 200, y=y, w=w, clip=False)  # some of it lies beyond -1
    for label in (0, 1):
        mean = (1 + w) * net.means[label].item() - w * 0.1
        assert x[y == label].mean().item() == pytest.approx(mean, abs=0.01)
        assert x[y == label].std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("w, calls", [(0, [8]), (-1, [8]), (1.5, [16])])
def test_guidance_costs_one_batch_of_twice_the_images(w, calls):
    net = Known(ch1.make_alpha_bar("cosine", 50), [0.3, -0.3, 0.0], 0.1)
    x, y = torch.randn(8, 1, 1, 1), torch.arange(8) % 2
    out, out_uncond = ch1.guided_pass(net, x, 7, y, w)
    assert net.calls == calls
    t, none = torch.full((8,), 7), torch.full((8,), 2)
    assert torch.equal(out, net(x, t, none if w == -1 else y))
    assert (out_uncond is None) == (w in (0, -1))
    if w == 1.5:
        assert torch.equal(out_uncond, net(x, t, none))
    assert ch1.guided_pass(net, x, 7, None, w)[1] is None  # without labels there is none


def test_without_guidance_the_unconditional_walk_is_that_without_labels():
    net = Known(ch1.make_alpha_bar("cosine", 50), [0.3, -0.3, 0.0], 0.1)
    y = torch.zeros(8, dtype=torch.long)
    plain, unconditional = (walk(net, 5, 8, y, w=w) for w in (0.0, -1.0))
    torch.testing.assert_close(unconditional, walk(net, 5, 8))
    assert not torch.equal(plain, unconditional)


def test_a_sample_is_a_function_of_its_seed_and_not_of_its_batch():
    net = Known(ch1.make_alpha_bar("linear", 100), [0.3, 0.0], 0.1)
    many = walk(net, 10, 64)
    alone = walk(net, 10, seeds=torch.tensor([17]))
    torch.testing.assert_close(alone[0], many[17], rtol=0, atol=1e-6)
    assert len(many.unique()) == 64


def test_clipping_keeps_the_estimates_where_images_lie():
    net = Known(ch1.make_alpha_bar("linear", 100), [0.95, 0.0], 0.3)
    pairs, y = ch1.timestep_pairs(100, 20), torch.zeros(200, dtype=torch.long)
    for clip in (True, False):
        steps = ch1.sample(net, net.alpha_bar, pairs, (1, 1, 1), torch.arange(200), y, clip=clip)
        assert (max(x0_hat.abs().max() for _, x0_hat in steps) > 1) == (not clip)
