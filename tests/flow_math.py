"""Flows whose mean slope, paths and density are known in closed form; all is float64.

Of pixels x_0 ~ N(m, s^2), each for itself, x_t ~ N((1-t) m, sigma_t^2), where sigma_t^2 is
(1-t)^2 s^2 + t^2. The mean slope E[eps - x_0 | x_t] is a line in x_t, and the paths of its ODE are
x_t = (1-t) m + sigma_t z with a z that stays.
"""

import torch

import flow_matching as flow

SHAPE = (2, 2, 3)
MEAN = torch.tensor([0.3, -0.6], dtype=torch.float64).view(2, 1, 1)
STD = torch.tensor([0.4, 1.7], dtype=torch.float64).view(2, 1, 1)
RAY = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def spread(t):
    """sigma_t."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def on_path(z, t):
    """x_t of the path z."""
    return (1 - t) * MEAN + spread(t) * z


def best(x, t):
    """E[eps - x_0 | x_t = x]: the mean of the slopes, and their covariance with x_t."""
    return -MEAN + (t - (1 - t) * STD**2) / spread(t) ** 2 * (x - (1 - t) * MEAN)


# Two bells in one dimension: share, mean and standard deviation of each.
BELLS = torch.tensor([[0.3, -0.7, 0.4], [0.7, 0.5, 0.5]], dtype=torch.float64)
BELL_SHARE, BELL_MEAN, BELL_STD = BELLS.T
BELL_RAY = torch.linspace(-1.4, 1.4, 15, dtype=torch.float64).view(15, 1, 1, 1)


def bells(x, t):
    """E[eps - x_0 | x_t = x] of them: each one's, as likely as x is of it."""
    variance = (1 - t) ** 2 * BELL_STD**2 + t**2
    off = x[..., None] - (1 - t) * BELL_MEAN  # (B,1,1,1,2)
    odds = BELL_SHARE.log() - 0.5 * variance.log() - off**2 / (2 * variance)
    slopes = (t - (1 - t) * BELL_STD**2) / variance * off - BELL_MEAN
    return (odds.softmax(-1) * slopes).sum(-1)


def upwards(steps, shift=1.0):
    """times_of, from 0 to 1."""
    return flow.times_of(steps, shift)[::-1]


def end_of(way):
    *_, (x, _) = way
    return x
