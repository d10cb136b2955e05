"""DPM-Solver++ and Heun's method: the ODE of ddim.py, solved with second order.

Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models", 2022 (arXiv:2211.01095). Karras, Aittala, Aila, Laine, "Elucidating the
Design Space of Diffusion-Based Generative Models", 2022 (arXiv:2206.00364), for Heun's method.

Put alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma). The exact
step of the ODE integrates x0_hat over the whole way from lambda_t to lambda_prev (proposition 4.1),

    x_prev = sigma_prev / sigma_t x_t + sigma_prev integral of e^lambda x0_hat(lambda) dlambda

DDIM takes x0_hat as if it stayed what it is at t: steps of half the length halve the error. Both
methods here follow a straight line instead, which quarters it.

dpmpp   DPM-Solver++(2M), algorithm 2: the line through this x0_hat and the one of the step before,
        which is known already. Second order at no cost. The first and the last step are DDIM's.

            h = lambda_prev - lambda_t,   r = h_before / h
            D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_before
            x_prev = sigma_prev / sigma_t x_t - alpha_prev (e^-h - 1) D

heun    Take DDIM's step, ask the network there too, and take the step again with the mean of the
        two x0_hat: second order, at twice the cost. This is algorithm 1 of Karras et al. 2022
        for u = x / sigma, in which the ODE reads du/ds = x0_hat with s = alpha / sigma. They count
        in 1/s, where the slope is eps_hat (DDIM eq. 14). But the cosine schedule starts at 1/s =
        20000; the first of 50 steps, to 32, would enlarge an error of eps_hat 630 times. An error
        of x0_hat is never enlarged. The last step, to s = infinity, is DDIM's.

    python dpm_solver.py --sample runs/pixel-mnist/ckpt.pt --sample-steps 10        100 images
    python dpm_solver.py --sample runs/pixel-mnist/ckpt.pt --sampler heun --sample-steps 10
    python dpm_solver.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 3,9 --sample-steps 10

The settings are those of ddim.py, and so are x_T and the files that are left. One CPU core draws
100 digits of the network of configs/mnist_pixel.yaml in 10 steps of dpmpp in 5 seconds.
"""

from runtime import commandline as cli
from runtime.processes import launch

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

import ddim
from ddim import at, ddim_row, guided, noise, subsequence
from ddpm_pixel import x0_coefficients
from kernels import Row, sampling_update


@dataclass
class Config(cli.NetworkCommand):
    sample: str = ""
    """draw from this network: a checkpoint of ddpm_pixel.py or improved_ddpm.py, or published"""
    encode: str = ""
    """of this network: held-out images to their x_T by DDIM, and back by --sampler"""
    interpolate: str = ""
    """of this network: eleven images from one x_T to another, a row for each two seeds"""
    sampler: Literal["dpmpp", "heun"] = "dpmpp"
    """DPM-Solver++(2M), or Heun's method, which calls the network twice a step"""

    n: int = 0  # how many; 0 is 100 samples, 8 images or x_T with the others
    seeds: str = ""
    """sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1); with --encode, and
    with --interpolate and --data, the numbers of the test images"""
    classes: str = ""
    """comma-separated names or numbers: draw these (default all in turn; --interpolate: none)"""
    sample_steps: int = 20  # how many of the T timesteps to visit
    spacing: Literal["linear", "quadratic", "leading", "trailing"] = "linear"
    """where they lie: even from end to end; denser near the image; even from 0 up; from T-1 down.
    If it is not typed, as the network's settings say"""
    clip_denoised: bool = True  # keep x0_hat in [-1, 1]; not typed, as its settings say
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""
    gif: bool = False
    """also draw reverse.gif and reverse.png: x_t and x0_hat of an image of each class"""
    reverse_from: Literal["noise", "data"] = "noise"
    """x_T of --sample. data: test images, noised; where they end is reverse-from-data.png"""

    data: str = ""
    """--encode, --reverse-from data: data other than the network was trained on; --interpolate:
    take images from it"""
    data_root: str = ""  # where data sets are looked for (default: where the training found them)
    encode_steps: str = "10,20,50,100,200"  # numbers of steps to encode in; T at most

    USES = {task: used - {"eta"} | {"sampler"} for task, used in ddim.Config.USES.items()}
    NEEDS = ddim.Config.NEEDS


# ------------------------------------------------------------------------------ DPM-Solver++(2M)


def half_log_snr(a):
    """lambda = log(alpha / sigma) at alpha_bar = a in 0..1; at the ends it is infinite."""
    if a in (0, 1):
        return math.inf if a else -math.inf
    return 0.5 * (math.log(a) - math.log1p(-a))


def dpmpp_row(a_before, a, a_prev, prediction="eps"):
    """The step from alpha_bar_t = a to a_prev > a; the one before came from a_before < a, or None.

    Lu et al. 2022, algorithm 2: H weighs the x0_hat of the step before. The first step has none
    before it, and the last, a_prev = 1 and h = inf, is x0_hat itself: both have H = 0.
    """
    h = half_log_snr(a_prev) - half_log_snr(a)
    slope = 0.0  # 1 / (2r)
    if a_before is not None and a_prev < 1:
        slope = h / (2 * (half_log_snr(a) - half_log_snr(a_before)))
    gain = -math.sqrt(a_prev) * math.expm1(-h)
    return Row(
        *x0_coefficients(a, prediction),
        A=gain * (1 + slope),
        B=math.sqrt((1 - a_prev) / (1 - a)),
        H=-gain * slope,
    )


@torch.no_grad()
def dpmpp(net, alpha_bar, pairs, x, y=None, w=0.0, *, prediction="eps", clip=True):
    """From x (B,C,H,W) at pairs[0][0] down to an image; yields x_prev and x0_hat, like x.

    alpha_bar float64 (T,), on the CPU; pairs from subsequence(); y (B,) int64 labels or None; w
    guides; prediction is what the network gives. clip keeps x0_hat in [-1, 1], as images are.
    """
    a_before = x0_hat = None
    for step, (t, t_prev) in enumerate(pairs):
        a = at(alpha_bar, t)
        row = dpmpp_row(a_before, a, at(alpha_bar, t_prev), prediction)
        out = guided(net, x, t, y, w)
        x, x0_hat = sampling_update(x, row=row, step=step, history=x0_hat, clip=clip, **out)
        yield x, x0_hat
        a_before = a


# --------------------------------------------------------------------------------- Heun's method


@torch.no_grad()
def heun(net, alpha_bar, pairs, x, y=None, w=0.0, *, prediction="eps", clip=True):
    """As dpmpp(), by Heun's method."""
    for step, (t, t_prev) in enumerate(pairs):
        a, a_prev = at(alpha_bar, t), at(alpha_bar, t_prev)
        row = ddim_row(a, a_prev, prediction=prediction)
        how = {"step": step, "clip": clip}
        x_prev, x0_hat = sampling_update(x, row=row, **how, **guided(net, x, t, y, w))
        if t_prev >= 0:
            there = ddim_row(a_prev, 1.0, prediction=prediction)  # to alpha_bar = 1: x0_hat
            _, x0_there = sampling_update(
                x_prev, row=there, **how, **guided(net, x_prev, t_prev, y, w)
            )
            mean = (x0_hat + x0_there) / 2
            x_prev, x0_hat = sampling_update(x, mean, ddim_row(a, a_prev, prediction="x0"), **how)
        x = x_prev
        yield x, x0_hat


# ----------------------------------------------------------------------------------- commands

SOLVERS = {"dpmpp": dpmpp, "heun": heun}


def sample(solver, net, alpha_bar, pairs, shape, seeds, y=None, w=0.0, **how):
    """From the noise of seeds (B,), the same as of every sampler, to images of shape (C,H,W)."""
    return SOLVERS[solver](net, alpha_bar, pairs, noise(seeds, shape), y, w, **how)


def calls_of(solver, steps):
    """How often `steps` steps ask the network: Heun's method twice, but once in its last."""
    return 2 * steps - 1 if solver == "heun" else steps


def sample_checkpoint(cfg, world):
    """--sample: images of the seeds, and with --gif their way."""
    net, trained, shape, names, alpha_bar = ddim.opened(cfg, cfg.sample, world, "dpm_solver")
    seeds, labels = cli.seeds_and_labels(cfg, net, names, cfg.guidance)
    T = trained.timesteps
    pairs = subsequence(T, ddim.steps_of(cfg, T), trained.spacing)
    how = {"w": cfg.guidance, "prediction": trained.prediction, "clip": trained.clip_denoised}
    net = world.for_sampling(net)
    trajectory = partial(sample, cfg.sampler, net, alpha_bar, pairs, shape, **how)
    calls = calls_of(cfg.sampler, len(pairs)) * ddim.passes(labels, cfg.guidance)
    how = pairs, calls, cfg.sampler, names
    ddim.draw_samples(cfg, world, trajectory, seeds, labels, *how)


def main():
    cfg = cli.parse(Config, __doc__)
    if cfg.smoke:
        cfg = cli.smaller(cfg, n=8, sample_steps=4, encode_steps="2,4")
    task = ddim.task_of(cfg, "dpm_solver.py")
    cfg = replace(cfg, n=cfg.n or ddim.TASKS[task])
    ddim.check_task(cfg)
    tasks = {"encode": ddim.reconstruct, "interpolate": ddim.interpolate, "sample": ddim.walk_back}
    if task == "sample" and cfg.reverse_from == "noise":
        launch(sample_checkpoint, cfg)
    else:
        launch(partial(tasks[task], solve=SOLVERS[cfg.sampler], script="dpm_solver"), cfg)


if __name__ == "__main__":
    cli.entry(main)
