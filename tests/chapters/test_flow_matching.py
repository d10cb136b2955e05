"""Flow matching: how t is drawn, the loss, and the ODE on data whose paths are known."""

from runtime.commandline import BadInput

import inspect
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from flow_math import (
    BELL_MEAN,
    BELL_RAY,
    BELL_SHARE,
    BELL_STD,
    MEAN,
    RAY,
    SHAPE,
    STD,
    TIGHT,
    bells,
    best,
    end_of,
    on_path,
    random,
    spread,
    upwards,
)
from scipy.integrate import quad
from torch.autograd.functional import hessian

import flow_matching as flow

getcontext().prec = 50
HIGHEST = 2 / (math.pi - 2)  # the largest scale of Esser et al. eq. 20


# --------------------------------------------------------------------------------- how t is drawn


def t_of_quantile(q, *how):
    """What draw_t makes of the normal number below which a part q of them lies."""
    return flow.draw_t(torch.special.ndtri(torch.as_tensor(q, dtype=torch.float64)), *how)


def test_uniform_t_has_uniform_quantiles():
    q = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    torch.testing.assert_close(t_of_quantile(q), q, **TIGHT)
    torch.testing.assert_close(t_of_quantile(q, "uniform", 3.0, 2.0, -1.0), q, **TIGHT)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (0.8, 1.5)])
def test_quantiles_of_the_logit_normal_density(mean, std):
    def density(t):  # eq. 19
        distance = math.log(t / (1 - t)) - mean
        scale = std * math.sqrt(2 * math.pi) * t * (1 - t)
        return math.exp(-(distance**2) / (2 * std**2)) / scale

    for q in (0.01, 0.2, 0.5, 0.77, 0.99):
        t = t_of_quantile(q, "logit_normal", mean, std).item()
        below, _ = quad(density, 0, t, epsabs=1e-11, epsrel=1e-11)
        assert below == pytest.approx(q, abs=1e-9)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 0.81, 1.29, HIGHEST])
def test_mode_scheme_favours_the_middle_as_its_scale_says(scale):
    """t - 1/2 = -(1+s)(u - 1/2) - s/2 cos(pi u): its slopes, mean and variance, by hand."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = t_of_quantile(q, "mode", 0.0, 1.0, scale)
    assert (t[0], t[500], t[-1]) == pytest.approx((1, 0.5, 0), abs=1e-15)
    torch.testing.assert_close(t + t.flip(0), torch.ones_like(t), **TIGHT)
    wanted = 0.5 - (1 + scale) * (q - 0.5) - scale / 2 * (math.pi * q).cos()
    torch.testing.assert_close(t, wanted, **TIGHT)
    assert (t.diff() < 0).all()  # never twice the same t: it has a density

    nodes, weights = np.polynomial.legendre.leggauss(40)
    off = t_of_quantile((nodes + 1) / 2, "mode", 0.0, 1.0, scale).numpy() - 0.5
    variance = (1 + scale) ** 2 / 12 + scale**2 / 8 - 2 * scale * (1 + scale) / math.pi**2
    assert weights @ off / 2 == pytest.approx(0, abs=1e-13)
    assert weights @ off**2 / 2 == pytest.approx(variance, rel=1e-10)

    near = 1e-4  # a density is 1 / |dt/du|; the slope of a cubic is off by near^2 at most
    ends = t_of_quantile([near, 0.5 - near, 0.5 + near], "mode", 0.0, 1.0, scale)
    assert (1 - ends[0]) / near == pytest.approx(1 + scale, abs=10 * near)
    middle = 1 + scale - scale * math.pi / 2
    assert (ends[1] - ends[2]) / (2 * near) == pytest.approx(middle, abs=10 * near**2)


def test_mode_scales_that_are_refused_are_those_that_fold():
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for scale, folds in ((-1.0, False), (-1.01, True), (HIGHEST, False), (HIGHEST + 0.01, True)):
        assert (t_of_quantile(q, "mode", 0.0, 1.0, scale).diff() > 1e-12).any().item() is folds
        cfg = flow.Config(gpus=0, model="unet", n=1, mode_scale=scale)
        if folds:
            with pytest.raises(BadInput, match="--mode-scale"):
                flow.check(cfg)
        else:
            flow.check(cfg)


def test_settings_of_t_are_what_draw_t_takes():
    """OF_T names them in its order, and both have the same defaults."""
    _, *takes = inspect.signature(flow.draw_t).parameters.values()
    assert [p.default for p in takes] == [getattr(flow.Config, name) for name in flow.OF_T]
    assert [name.split("_")[-1] for name in flow.OF_T] == [p.name for p in takes]


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_t_stays_in_its_range_and_form(scheme):
    u = torch.tensor([-40.0, -3.0, 0.0, 3.0, 40.0]).view(5, 1, 1, 1)
    t = flow.draw_t(u, scheme)
    assert t.shape == u.shape and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1 and len(t.unique()) == 5


@pytest.mark.parametrize("m, n", [(1, 1), (1024, 256), (64, 4096), (9, 1)])
def test_shift_hides_an_image_of_m_pixels_as_well_as_one_of_n(m, n):
    """The mean of n equal pixels shows through noise with an error t / (1-t) / sqrt(n)."""
    shift = math.sqrt(m / n)
    ts = [0.001, 0.1, 0.5, 0.9, 0.999]
    for t in ts:
        there = flow.shifted(t, shift)
        hidden = there / (1 - there) / math.sqrt(m)
        assert hidden == pytest.approx(t / (1 - t) / math.sqrt(n), rel=1e-12)
        assert flow.shifted(there, 1 / shift) == pytest.approx(t, rel=1e-12)
    assert (flow.shifted(0.0, shift), flow.shifted(1.0, shift)) == (0, 1)
    many = flow.shifted(torch.tensor(ts, dtype=torch.float64), shift)
    assert many.tolist() == pytest.approx([flow.shifted(t, shift) for t in ts], rel=1e-15)


@pytest.mark.parametrize("steps, shift, last", [(1, 1, 1), (7, 1, 1), (10, 3, 1), (4, 0.5, 0.97)])
def test_times(steps, shift, last):
    times = flow.times_of(steps, shift, last)
    assert len(times) == steps + 1 and all(type(t) is float for t in times)
    assert times[0] == last and times[-1] == 0
    for i, t in enumerate(times[1:-1], start=1):
        even, part = 1 - Decimal(i) / steps, Decimal(t) / Decimal(last)
        assert float(part / (1 - part)) == pytest.approx(float(Decimal(shift) * even / (1 - even)))


# --------------------------------------------------------------------------------------- the loss


class Asked:
    """A network that bends x by its time and label, and remembers what it was asked."""

    def __call__(self, x, time, y=None):
        self.x, self.time, self.y = x, time, y
        bend = (time / 300 + (0 if y is None else y)).view(-1, 1, 1, 1)
        return torch.sin(2 * x + bend) - 0.3 * x


@pytest.mark.parametrize("labelled", [False, True])
def test_the_loss_written_out(labelled):
    x0, eps = random(3, *SHAPE, seed=1), random(3, *SHAPE, seed=2)
    ts, y = [0.07, 0.5, 0.96], torch.tensor([0, 3, 1]) if labelled else None
    net, t = Asked(), torch.tensor(ts, dtype=torch.float64).view(3, 1, 1, 1)
    losses = flow.flow_loss(net, x0, t, eps, y)
    assert losses.shape == net.time.shape == (3,) and net.y is y
    for i, part in enumerate(ts):
        total, label = 0.0, y[i].item() if labelled else 0
        for image, noise in zip(x0[i].flatten().tolist(), eps[i].flatten().tolist(), strict=True):
            x = (1 - part) * image + part * noise
            v = math.sin(2 * x + 1000 * part / 300 + label) - 0.3 * x
            total += (v - (noise - image)) ** 2
        assert losses[i].item() == pytest.approx(total / math.prod(SHAPE), rel=1e-12)


def test_errors_of_v_of_the_image_and_of_the_noise():
    x0, eps = random(4, *SHAPE, seed=3), random(4, *SHAPE, seed=4)
    t = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64).view(4, 1, 1, 1)
    net = Asked()
    losses = flow.flow_loss(net, x0, t, eps)
    v, x_t = net(net.x, 1000 * t.flatten()), (1 - t) * x0 + t * eps
    of_image = ((x_t - t * v - x0) ** 2).mean((1, 2, 3))
    of_noise = ((x_t + (1 - t) * v - eps) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(of_image / t.flatten() ** 2, losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(of_noise / (1 - t.flatten()) ** 2, losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_the_least_loss_is_that_of_the_mean_slope(t):
    """Over all lines v = gain x + bias. Four nodes of Gauss and Hermite give E of it exactly."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(4))
    shares = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    x0 = MEAN + STD * nodes.repeat_interleave(4).view(16, 1, 1, 1)
    eps = nodes.repeat(4).view(16, 1, 1, 1).expand_as(x0)
    times = torch.full((16, 1, 1, 1), t, dtype=torch.float64)

    def loss(theta):
        gain, bias = theta.view(2, 2, 1, 1)
        return shares @ flow.flow_loss(lambda x, time, y: gain * x + bias, x0, times, eps)

    start = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (slope,), curvature = torch.autograd.grad(loss(start), start), hessian(loss, start)
    assert torch.linalg.eigvalsh(curvature).min() > 0.01  # one least loss, found in one step
    gain, bias = (-torch.linalg.solve(curvature, slope)).view(2, 2, 1, 1)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1, 1, 1)
    torch.testing.assert_close(gain * x + bias, best(x, t), rtol=1e-10, atol=1e-10)
    least = loss(torch.cat([gain, bias]).flatten()).item()
    assert least == pytest.approx((STD**2 / spread(t) ** 2).mean().item(), rel=1e-10)


# ---------------------------------------------------------------------------------------- the ODE


def orders_of(v, points, sampler, times_of, shift):
    """From one end of the paths to the other: points are theirs at t = 0 and 1."""
    errors = []
    for steps in (80, 160, 320):
        times = times_of(steps, shift)
        x = end_of(flow.follow(v, points[int(times[0])], times, sampler))
        errors.append((x - points[int(times[-1])]).abs().max().item())
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize("times_of", [flow.times_of, upwards])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("midpoint", 3), ("heun", 2)])
def test_orders_on_gaussian_data(sampler, order, shift, times_of):
    """dx/dt = q' / 2q (x - mean), q = sigma_t^2: as q is a quadratic, midpoint gains an order.

    With q = 1, q' = b and q'' = 2c in the middle of a step of 2d, both it and the exact
    (q(t+2d) / q(t))^1/2 are 1 + b d + b^2 d^2 / 2 + (b^3 / 2 - b c) d^3 + ...
    """
    points = on_path(RAY, 0.0), on_path(RAY, 1.0)
    orders = orders_of(best, points, sampler, times_of, shift)
    assert all(abs(found - order) < 0.1 for found in orders), orders


@pytest.mark.parametrize("times_of", [flow.times_of, upwards])
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_orders_on_two_bells(sampler, order, times_of):
    """Paths in one dimension never cross: they keep the part of the data that lies below them."""
    z = (BELL_RAY[..., None] - BELL_MEAN) / BELL_STD
    code = torch.special.ndtri((BELL_SHARE * torch.special.ndtr(z)).sum(-1))
    orders = orders_of(bells, (BELL_RAY, code), sampler, times_of, 1.0)
    assert all(abs(found - order) < 0.1 for found in orders), orders


@pytest.mark.parametrize("times", [flow.times_of(5, 2.0), upwards(5), [0.8, 0.3]])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_rk45_keeps_its_tolerance(tolerance, times):
    """A step errs by tolerance (1 + |x|), root mean square; the path then carries it to the end."""
    asked = []

    def v(x, t):
        asked.append(t)
        return best(x, t)

    way = list(flow.follow(v, on_path(RAY, times[0]), times, "rk45", tolerance))
    assert len(way) == len(times) - 1
    steps = len(asked) / 6  # or fewer: six evaluations each
    all_t = torch.linspace(min(times), max(times), 101, dtype=torch.float64).view(-1, 1, 1, 1)
    for t, (x, x0_hat) in zip(times[1:], way, strict=True):
        carried = (spread(t) / spread(all_t)).max() * on_path(RAY, 0.0).numel() ** 0.5
        largest = max(on_path(RAY, t).abs().max() for t in times)
        bound = steps * tolerance * (1 + largest) * carried
        assert (x - on_path(RAY, t)).abs().max() < bound
        torch.testing.assert_close(x0_hat, x - t * best(x, t), **TIGHT)


def test_rk45_takes_the_steps_of_its_order():
    """It errs by h^5 in a step; with h^4 a thousandth of it would take 1000^1/4 times as many."""
    counts = []
    for tolerance in (1e-7, 1e-10):
        asked = []
        v = lambda x, t, asked=asked: asked.append(t) or best(x, t)  # noqa: E731
        end_of(flow.follow(v, on_path(RAY, 1.0), [1.0, 0.0], "rk45", tolerance))
        counts.append(len(asked))
    assert 2 < counts[1] / counts[0] < 1000 ** (1 / 4), counts


def test_and_back_by_rk45():
    x0 = on_path(RAY, 0.0)
    code = end_of(flow.follow(best, x0, upwards(1), "rk45", 1e-9))
    assert (code - RAY).abs().max() < 1e-7  # of unit variance, whatever the data's
    assert (end_of(flow.follow(best, code, flow.times_of(1), "rk45", 1e-9)) - x0).abs().max() < 1e-7


WORKED = [  # dx/dt = t x from x = 1 at t = 1 to 1/2
    ("euler", 0.5),
    ("midpoint", 1 - 0.5 * 0.75 * 0.75),
    ("heun", 1 - 0.5 * (1 + 0.5 * 0.5) / 2),
    ("rk45", math.exp((0.25 - 1) / 2)),
]


@pytest.mark.parametrize("sampler, wanted", WORKED)
def test_one_step_by_hand(sampler, wanted):
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    x = end_of(flow.follow(lambda x, t: t * x, one, [1.0, 0.5], sampler, 1e-12))
    assert x.shape == one.shape and x.flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-11)


def test_eulers_guess_is_that_of_the_point_it_leaves():
    times, x = flow.times_of(6, 2.0), on_path(RAY, 1.0)
    for (t, t_next), found in zip(
        zip(times, times[1:], strict=False), flow.follow(best, x, times, "euler"), strict=True
    ):
        slope = best(x, t)
        torch.testing.assert_close(found[1], x - t * slope, **TIGHT)
        x = x + (t_next - t) * slope
        torch.testing.assert_close(found[0], x, **TIGHT)


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk45"])
def test_all_samplers_reach_the_end_of_a_line(sampler):
    x0, eps = random(2, *SHAPE, seed=5), random(2, *SHAPE, seed=6)
    for times in (flow.times_of(1), flow.times_of(7, 3.0), upwards(3)):
        x = (1 - times[0]) * x0 + times[0] * eps
        for t, (x_t, x0_hat) in zip(
            times[1:], flow.follow(lambda x, t: eps - x0, x, times, sampler), strict=True
        ):
            torch.testing.assert_close(x_t, (1 - t) * x0 + t * eps, **TIGHT)
            torch.testing.assert_close(x0_hat, x0, **TIGHT)
