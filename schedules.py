"""The forward process of chapter 1: how much of the image is left at each timestep.

Nothing here is learned. A schedule is its table alpha_bar_t, and all else follows from that: what
x_t looks like, what a network may be asked to predict from it, and how hard that is, which the
signal-to-noise ratio SNR_t = alpha_bar_t / (1 - alpha_bar_t) tells.

    python ddpm_pixel.py --plot-schedule          draws alpha_bar and log SNR of all of them
"""

from runtime.commandline import BadInput, parse_seeds
from runtime.pictures import to_uint8
from runtime.plots import plot_lines

import math

import torch

from kernels import gaussian

SCHEDULES = ("linear", "cosine", "sigmoid")  # of chapter 1; chapter 3 has scaled_linear, too


def make_alpha_bar(schedule, T, alpha_min=0.001):
    """alpha_bar_t for t = 0..T-1, float64: the share of the image's variance left after step t.

    linear   beta_t from 1e-4 to 0.02 for T = 1000, scaled by 1000/T for others (Ho et al. 2020,
             section 4)
    scaled_linear  sqrt(beta_t) linear, from 0.00085 to 0.012 likewise (Stable Diffusion)
    cosine   alpha_bar_t = f(t+1) / f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008
             (Nichol, Dhariwal 2021, eq. 17)
    sigmoid  the same with f(t) = S(3) - S(6t/T - 3), S(u) = 1/(1 + e^-u)
             (Jabri et al. 2022, arXiv:2212.11972: start -3, end 3, tau 1)
    alpha_t = alpha_bar_t / alpha_bar_(t-1) is kept from falling below alpha_min, in 0..1: the last
    steps of cosine and sigmoid would erase all that is left (Nichol, Dhariwal: beta_t <= 0.999).
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear":
        alphas = 1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    elif schedule == "scaled_linear":
        ends = math.sqrt(0.00085), math.sqrt(0.012)
        alphas = 1 - torch.linspace(*ends, T, dtype=torch.float64).square() * (1000 / T)
    elif schedule == "cosine":
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        alphas = f[1:] / f[:-1]
    elif schedule == "sigmoid":
        f = torch.sigmoid(t.new_tensor(3.0)) - torch.sigmoid(6 * t / T - 3)
        alphas = f[1:] / f[:-1]
    else:
        names = ", ".join((*SCHEDULES, "scaled_linear"))
        raise ValueError(f"schedule must be one of {names}, got {schedule!r}")
    return alphas.clamp(min=alpha_min).cumprod(0)


def q_sample(x0, t, eps, alpha_bar):
    """x_t for images x0 (B,C,H,W), timesteps t (B,) and noise eps (B,C,H,W): DDPM eq. 4."""
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B,1,1,1)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


def target_of(prediction, x0, eps, a):
    """What the network should give for images x0, noise eps (B,C,H,W) and a = alpha_bar_t (B,).

    "eps", "x0", or "v" = sqrt(a) eps - sqrt(1-a) x0 (Salimans, Ho 2022, arXiv:2202.00512), which
    is the noise where there is little of it, and minus the image where there is little else.
    """
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    a = a.view(-1, 1, 1, 1)
    return a.sqrt().to(x0.dtype) * eps - (1 - a).sqrt().to(x0.dtype) * x0


def min_snr_weight(prediction, a, gamma):
    """The weight of a squared error of the prediction: Hang et al. 2023, section 3.4 (2303.09556).

    Of x0_hat it is min(SNR, gamma). An error of eps_hat is sqrt(SNR), of v_hat sqrt(SNR + 1) times
    that of x0_hat, which makes it min(SNR, gamma) / SNR and / (SNR + 1). a (B,) is alpha_bar_t.
    """
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]


def timestep_pairs(T, steps, visit=""):
    """A walk down the chain, [(t, t_prev), ...]: `steps` of its timesteps, the last t_prev is -1.

    They are evenly spaced, both ends included. visit, such as "0-9,49,99", names them instead.
    Raises BadInput for what exceeds the chain.
    """
    if visit:
        ts = sorted(set(parse_seeds(visit, 0, flag="--visit").tolist()), reverse=True)
        if ts[0] >= T:
            raise BadInput(f"--visit {visit}: the chain's timesteps are 0 to {T - 1}")
    elif steps > T:
        raise BadInput(f"--sample-steps {steps} exceeds the chain's --timesteps {T}")
    else:
        ts = torch.linspace(T - 1, 0, steps).round().long().unique().flip(0).tolist()
    return list(zip(ts, [*ts[1:], -1], strict=True))


def dynamic_threshold(x0_hat, percentile=0.995):
    """x0_hat (B,C,H,W) within [-1, 1]: Imagen (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Each image is clamped to the percentile of its own |x0_hat| and divided by it, where it exceeds
    1. A clamp to [-1, 1] would saturate the images that strong guidance drives beyond.
    """
    s = x0_hat.float().abs().flatten(1).quantile(percentile, dim=1).clamp(min=1)  # (B,)
    s = s.view(-1, 1, 1, 1).to(x0_hat.dtype)
    return x0_hat.clamp(-s, s) / s


def check_schedule(alpha_bar, prediction):
    """Raise BadInput for a schedule that does not fall, or leaves an eps prediction no image."""
    if not (alpha_bar.diff() < 0).all() or not 0 <= alpha_bar[-1] <= alpha_bar[0] < 1:
        raise BadInput("--alpha-min, --timesteps: alpha_bar must fall from one step to the next")
    if prediction == "eps" and alpha_bar[-1] < 1e-12:
        raise BadInput("--alpha-min leaves nothing of the image at T; type --prediction v or x0")


def forward_film(x0, alpha_bar, frames=50):
    """x0 and then `frames` of its x_t, evenly spaced: a list of uint8 (B,H,W,C)."""
    T, eps = len(alpha_bar), gaussian(x0.shape, torch.arange(len(x0)), 0, "cpu")
    ts = torch.linspace(0, T - 1, min(frames, T)).round().long()
    way = [q_sample(x0, t.repeat(len(x0)), eps, alpha_bar) for t in ts]
    return [to_uint8(x) for x in (x0, *way)]


def plot_schedules(path, T, alpha_min):
    """Draw alpha_bar and log SNR of every schedule of T steps into the PNG `path`."""
    left, ratio = {}, {}
    for name in SCHEDULES:
        a = make_alpha_bar(name, T, alpha_min)
        part = torch.arange(1, T + 1) / T
        left[name] = (part, a)
        ratio[name] = (part, a.log() - torch.log1p(-a))
    plot_lines(path, {"alpha_bar": left, "log SNR": ratio}, xlabel=f"t / T, T = {T}")
