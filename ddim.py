"""Chapter 2: the same network, few steps, and no noise on the way.

Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021 (arXiv:2010.02502), whose alpha_t is
our alpha_bar_t. Lu et al., "DPM-Solver++", 2022 (arXiv:2211.01095). Karras et al., "Elucidating the
Design Space of Diffusion-Based Generative Models", 2022 (arXiv:2206.00364), for Heun's method.

Chapter 1's loss knows only the marginals q(x_t | x_0), not the chain between them. Every process
with these marginals is therefore served by the same network, and one may visit any sub-sequence of
the timesteps. From x_t and the network's noise, first guess the image,

    x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)                     eq. 9

then go to the earlier timestep t_prev, keeping a part of that noise and replacing the rest,

    x_prev = sqrt(alpha_bar_prev) x0_hat                                   the guess,     eq. 12
           + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat                    the direction to x_t,
           + sigma z,  z ~ N(0, I)                                         fresh noise

    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev))
                                                                                          eq. 16
With eta = 1 this is chapter 1's ancestral step (small variance). With eta = 0 there is no fresh
noise: the image is a function of x_T, and the walk an Euler scheme for an ODE (section 4.3), smooth
enough for few steps. But fresh noise also corrects the network's mistakes: where a short training
leaves specks, try --eta 1. An ODE can also be solved better, and walked upwards, from an image to
the x_T that gives it:

    python ddim.py --sample runs/pixel-mnist/ckpt.pt                  100 images in 50 steps
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --sample-steps 10 --classes 3,7 --guidance 1
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --sample-steps 10 --sampler dpmpp
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --seeds 0-7 --gif       watch eight of them
    python ddim.py --encode runs/pixel-mnist/ckpt.pt --n 8    test images to codes and back
    python ddim.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 3,9        from one to the other
    python ddim.py --compare runs/pixel-mnist/ckpt.pt --n 1000 --compare-steps 5,10,20,50

All need a checkpoint of ddpm_pixel.py and leave their files beside it. With the network of
configs/mnist_pixel.yaml one CPU core draws 100 images in 50 steps in 30 seconds.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ddpm_pixel import alpha_bar_of, labels_for, load_net
from kernels import gaussian, sampling_table, sampling_update
from networks.published.unet import check_guidance
from runtime.commandline import (
    BadInput,
    check_fraction,
    check_positive,
    check_processes,
    default_gpus,
    entry,
    folder_of,
    parse,
    parse_classes,
    parse_seeds,
    smaller,
    split_list,
)
from runtime.pictures import save_film, save_samples, to_uint8
from runtime.processes import launch

SAMPLERS = ("ddim", "dpmpp", "heun", "ddpm")


@dataclass
class Config:
    config: str = ""  # YAML file of these settings; flags override it
    sample: str = ""  # the checkpoint of ddpm_pixel.py to sample from
    encode: str = ""  # a checkpoint: held-out images to their x_T and back, in ever more steps
    interpolate: str = ""
    """a checkpoint: eleven images on the way from one x_T to another, a row for each two seeds"""
    compare: str = ""  # a checkpoint: every sampler, at every number of steps, and every guidance
    out: str = ""  # folder for what is made (default: beside the checkpoint)
    smoke: bool = False  # eight images in four steps, to see that everything works

    n: int = 0  # how many; 0 is 100 samples, 1000 with --compare, 8 images or x_T with the others
    seeds: str = ""
    """sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1); with --encode, and
    with --interpolate and --data, the numbers of the test images"""
    classes: str = ""
    """comma-separated names or numbers: draw these (default all in turn; --interpolate: none)"""
    sampler: Literal["ddim", "dpmpp", "heun", "ddpm"] = "ddim"
    """DDIM; DPM-Solver++(2M) and Heun's method, of second order; chapter 1's ancestral sampling"""
    sample_steps: int = 50  # how many of the T timesteps to visit
    spacing: Literal["linear", "quadratic", "leading", "trailing"] = "linear"
    """where they lie: even from end to end; denser near the image; even from 0 up; from T-1 down"""
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of a ddpm step: beta_tilde, beta, or the network's; auto is what it was trained with"""
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""
    gif: bool = False
    """also draw reverse.gif and reverse.png: x_t and x0_hat of the first eight on their way"""

    data: str = ""
    """--encode, --compare: data other than the checkpoint's; --interpolate: take images from it"""
    data_root: str = ""  # where data sets are looked for (default: where the checkpoint's was)
    encode_steps: str = "10,20,50,100,200,500,1000"  # numbers of steps to encode in; T at most
    compare_steps: str = "5,10,20,50,100,250,1000"  # numbers of steps to compare; T at most
    compare_guidance: str = "-1,0,0.5,1,2,4"
    """values of w to compare at --sample-steps of --sampler, where there are labels"""

    batch_size: int = 64  # images drawn at a time, over all processes
    gpus: int = field(default_factory=default_gpus)
    """number of GPUs; 0 is the CPU; more than one starts that many processes"""


# ------------------------------------------------------------------------------------ timesteps


def subsequence(T, steps, spacing="linear"):
    """tau of DDIM section 4.2: `steps` of the timesteps 0..T-1, all different.

    linear     evenly spaced, both ends included
    quadratic  floor(c i^2) for i = 0, 1, ... with c such that the last is T-1 (appendix D.2); one
               that would repeat its neighbour is moved up to the next free timestep
    leading    multiples of floor(T / steps) from 0 up: the walk starts below T-1, at less noise
    trailing   T / steps apart from T-1 down, rounded: the walk ends above 0
               (both as Lin et al. 2023, arXiv:2305.08891, table 2, with timesteps from 0)

    Returns the walk over them as [(t, t_prev), ...], downwards; the last t_prev is -1, where
    alpha_bar is 1. One linear or quadratic step is T-1 alone. Raises BadInput unless
    1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise BadInput(
            f"--sample-steps {steps}: the network was trained on a chain of {T} timesteps; "
            f"type a number from 1 to {T}"
        )
    if spacing == "leading":
        tau = [i * (T // steps) for i in reversed(range(steps))]
    elif spacing == "trailing":
        tau = [round(T - i * (T / steps)) - 1 for i in range(steps)]
    elif spacing == "linear" or steps == 1:
        tau = torch.linspace(T - 1, 0, steps).round().long().tolist()
    else:
        tau = [0]
        for i in range(1, steps):
            tau.append(max((T - 1) * i * i // (steps - 1) ** 2, tau[-1] + 1))
        tau.reverse()
    return list(zip(tau, [*tau[1:], -1], strict=True))


def evaluations(sampler, steps, guided):
    """How often the network sees an image (NFE): Heun looks twice but in its last step, and
    guidance needs a pass with the label and one without."""
    return (2 * steps - 1 if sampler == "heun" else steps) * (1 + guided)


# ------------------------------------------------------------------------------------- sampling


def evaluate(net, x, t, y, guidance):
    """The network's output at x (B,C,H,W) and the timestep t, a number; and that without labels.

    (B,C,H,W) each, or (B,2C,H,W) where it learned its variance. With y (B,) and guidance w != 0
    the two passes are one batch of 2B; otherwise the second is None.
    """
    t = torch.full((len(x),), t, device=x.device)  # (B,)
    if y is None or guidance == 0:
        return net(x, t, y), None
    null = torch.full_like(y, net.label.num_embeddings - 1)
    return net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).chunk(2)


@torch.inference_mode()
def walk(
    net,
    alpha_bar,
    pairs,
    x,
    y=None,
    *,
    sampler="ddim",
    seeds=None,
    eta=0.0,
    variance="small",
    guidance=0.0,
    prediction="eps",
    clip=True,
):
    """From x at pairs[0][0] down to an image; yields (t_prev, x, x0_hat) after every step.

    alpha_bar (T,) float64; pairs from subsequence(); x (B,C,H,W); y (B,) int64 labels or None;
    seeds (B,) int64 for the samplers that add noise; eta in 0..1 is ddim's and variance ddpm's;
    prediction is what the network gives. clip: keep x0_hat in [-1, 1], as images are. Raises
    ValueError for what makes no sampler.

    ddim   Step k is row k of the sampling table. Put eps_hat = (x_t - sqrt(alpha_bar_t) x0_hat) /
           sqrt(1 - alpha_bar_t), which is eq. 9 turned around, into eq. 12, and it reads
               x_prev = A x0_hat + B x_t + sigma z
               B = sqrt((1 - alpha_bar_prev - sigma^2) / (1 - alpha_bar_t))
               A = sqrt(alpha_bar_prev) - B sqrt(alpha_bar_t)
           so that eps_hat stays consistent with an x0_hat that was clipped.
    dpmpp  The line through this x0_hat and the one before, instead of this one alone (Lu et al.
           algorithm 2), makes it second order at no cost. The first and last step are DDIM's.
    heun   Take DDIM's step, ask the network there too, and take the step again with the mean of the
           two x0_hat: second order, at twice the cost. This is Heun's method (Karras et al.
           algorithm 1) for u = x / sqrt(1 - alpha_bar), in which DDIM's ODE reads du/ds = x0_hat
           with s = sqrt(alpha_bar / (1 - alpha_bar)) = 1/sigma. Karras et al. count in sigma, where
           the slope is eps_hat (DDIM eq. 14). But the cosine schedule starts at sigma = 20000; the
           first of 50 steps, to sigma = 32, would enlarge an error of eps_hat 630 times. An error
           of x0_hat is never enlarged. The last step, to s = infinity, is DDIM's.
    ddpm   The ancestral step of chapter 1, between the timesteps of `pairs`.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddpm":
        table = sampling_table(alpha_bar, pairs, variance=variance, prediction=prediction)
    elif sampler == "dpmpp":
        table = sampling_table(alpha_bar, pairs, prediction=prediction, multistep=True)
    else:
        own = eta if sampler == "ddim" else 0.0
        table = sampling_table(alpha_bar, pairs, eta=own, prediction=prediction)
    if sampler == "heun":  # DDIM's step from a given x0_hat
        from_x0 = sampling_table(alpha_bar, pairs, eta=0.0, prediction="x0")

    def update(x, t, step, history):
        out, out_uncond = evaluate(net, x, t, y, guidance)
        return sampling_update(
            x,
            out,
            table,
            step,
            out_uncond=out_uncond,
            guidance=guidance,
            history=history,
            seeds=seeds,
            clip=clip,
        )

    x0_hat = None
    for step, (t, t_prev) in enumerate(pairs):
        x_prev, x0_hat = update(x, t, step, x0_hat)  # (B,C,H,W) each
        if sampler == "heun" and t_prev >= 0:
            _, x0_there = update(x_prev, t_prev, step + 1, None)
            mean = (x0_hat + x0_there) / 2
            x_prev, x0_hat = sampling_update(x, mean, from_x0, step, clip=clip)
        x = x_prev
        yield t_prev, x, x0_hat


def sampler(net, alpha_bar, pairs, shape, seeds, y=None, **how):
    """walk() from noise: shape (C,H,W); seeds (B,) int64, one per image, on the net's device.

    x_T, and the z of every step, are functions of the seed alone, the same for every sampler and
    in chapter 1.
    """
    x = gaussian((len(seeds), *shape), seeds, -1, seeds.device)  # x_T (B,C,H,W)
    x = x.to(memory_format=torch.channels_last)
    return walk(net, alpha_bar, pairs, x, y, seeds=seeds, **how)


def settings(cfg, prediction):
    """The arguments of walk() that say how, from a Config."""
    names = ("sampler", "eta", "variance", "guidance")
    return {name: getattr(cfg, name) for name in names} | {"prediction": prediction}


def finish(way, bar):
    """What `way` yields last; the progress bar counts its steps."""
    for state in way:  # noqa: B007
        bar.update()
    return state


def in_parts(work, n, steps, batch_size, world, desc):
    """The n rows that work(part, bar) makes, the same on every rank: each makes its share.

    A part is some numbers of rows (B,) int64, at most `batch_size` over all ranks; the bar counts
    `steps` for each.
    """
    parts = torch.arange(n)[world.share(n)].split(max(1, batch_size // world.size))
    with world.progress(len(parts) * steps, desc=desc) as bar:
        rows = torch.cat([work(part, bar) for part in parts])
    return world.collect(rows.to(world.device), n).cpu()


def part_of(rows, part, device):
    """Rows `part` on the device; None of None."""
    return None if rows is None else rows[part].to(device)


def draw(
    net, alpha_bar, pairs, cfg, world, shape, labels, seeds, prediction="eps", desc="sampling"
):
    """uint8 images (N,H,W,C), on every rank, of the N seeds.

    shape (C,H,W); labels (N,) int64 or None; seeds (N,) int64.
    """

    def images(part, bar):
        y, own = (part_of(rows, part, world.device) for rows in (labels, seeds))
        way = sampler(net, alpha_bar, pairs, shape, own, y, **settings(cfg, prediction))
        return to_uint8(finish(way, bar)[1])

    with world.autocast():
        return in_parts(images, len(seeds), len(pairs), cfg.batch_size, world, desc)


# ----------------------------------------------------------------------------------------- main


def open_net(path, cfg, world):
    """(net, Config of its training, shape (C,H,W), class names, alpha_bar, cfg) of a checkpoint.

    The cfg that comes back has a variance of ddpm decided. Raises BadInput for what the network
    cannot do.
    """
    net, trained, shape, names = load_net(path, world.device)
    check_guidance(net, cfg.guidance, path)
    if net.label is None and (cfg.classes or cfg.guidance):
        raise BadInput(f"{path} was trained without labels; leave out --classes and --guidance")
    if cfg.variance == "learned" and not trained.learned_variance:
        raise BadInput(
            f"--variance learned: {path} did not learn its variance; type small or large"
        )
    if cfg.variance == "auto":
        usual = "learned" if trained.learned_variance else "small"
        cfg = replace(cfg, variance=usual if trained.variance == "auto" else trained.variance)
    return net, trained, shape, names, alpha_bar_of(trained), cfg


def labels_of(net, cfg, names, seeds):
    """The label of each sample (N,), a function of its seed, or None."""
    chosen = [] if net.label is None else parse_classes(cfg.classes, names)
    return labels_for(seeds, chosen)


def film(net, alpha_bar, pairs, cfg, shape, labels, seeds, frames=50, prediction="eps"):
    """The way of these samples: a list of uint8 (2N,H,W,C), the N x_t and then the N x0_hat.

    At most `frames` of the steps, evenly spaced; the last is always among them.
    """
    x, way = gaussian((len(seeds), *shape), seeds, -1, seeds.device), []
    kept = {pairs[-1 - i][1] for i in range(0, len(pairs), -(-len(pairs) // frames))}
    steps = sampler(net, alpha_bar, pairs, shape, seeds, labels, **settings(cfg, prediction))
    for t_prev, x_prev, x0_hat in steps:
        if t_prev in kept:
            way.append(to_uint8(torch.cat([x, x0_hat])))
        x = x_prev
    return way


def sample(cfg, world):
    net, trained, shape, names, alpha_bar, cfg = open_net(cfg.sample, cfg, world)
    seeds = parse_seeds(cfg.seeds, cfg.n)
    labels = labels_of(net, cfg, names, seeds)
    pairs = subsequence(trained.timesteps, cfg.sample_steps, cfg.spacing)
    given = trained.prediction

    start = time.perf_counter()
    images = draw(net, alpha_bar, pairs, cfg, world, shape, labels, seeds, given)
    seconds = time.perf_counter() - start
    if not world.is_main:
        return
    folder = folder_of(cfg, cfg.sample)
    save_samples(folder, images, labels, 10)
    guided = labels is not None and cfg.guidance != 0
    print(
        f"{len(seeds)} images, {cfg.sampler}, {len(pairs)} steps, eta {cfg.eta:g}, "
        f"guidance w = {cfg.guidance:g}: {evaluations(cfg.sampler, len(pairs), guided)} network "
        f"evaluations and {seconds / len(seeds):.3f} s per image"
    )
    print(f"samples: {folder / 'samples.png'}")
    if cfg.gif:
        y = None if labels is None else labels[:8].to(world.device)
        first = seeds[:8].to(world.device)
        with world.autocast():
            way = film(net, alpha_bar, pairs, cfg, shape, y, first, prediction=given)
        save_film(way, folder / "reverse", len(first))
        print(f"their way: {folder / 'reverse.gif'}, {folder / 'reverse.png'}")


def numbers_of(text, flag, kind=int):
    """'5,10' -> [5, 10], whole numbers from 1; any numbers for kind float. Else BadInput."""
    try:
        numbers = [kind(part) for part in split_list(text)]
    except ValueError:
        numbers = []
    if not numbers or (kind is int and min(numbers) < 1):
        raise BadInput(f"{flag} {text}: expected numbers with commas between, such as 1,4")
    return numbers


TASKS = {"sample": 100, "encode": 8, "interpolate": 8, "compare": 1000}  # and how many by default


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    asked = [task for task in TASKS if getattr(cfg, task)]
    if len(asked) != 1:
        raise BadInput(
            "--sample is missing, a checkpoint of ddpm_pixel.py; "
            "type python ddim.py --sample runs/pixel-mnist/ckpt.pt"
            if not asked
            else f"--{asked[0]} and --{asked[1]}: one at a time"
        )
    check_positive(cfg, "n", "sample_steps", "batch_size")
    if cfg.compare and cfg.n < 2:
        raise BadInput("--compare needs --n of at least 2: a covariance is compared")
    if cfg.encode and cfg.classes:
        raise BadInput("--encode takes the test images in order: choose them by --seeds")
    check_fraction(cfg, "eta")
    if cfg.eta and cfg.sampler != "ddim" and asked != ["compare"]:
        raise BadInput(f"--eta {cfg.eta:g} is for --sampler ddim, not {cfg.sampler}")
    if asked[0] in ("encode", "interpolate") and (cfg.eta or cfg.sampler == "ddpm"):
        raise BadInput(
            f"--{asked[0]} needs a walk without fresh noise; leave out --eta and --sampler ddpm"
        )
    numbers_of(cfg.encode_steps, "--encode-steps")
    numbers_of(cfg.compare_steps, "--compare-steps")
    numbers_of(cfg.compare_guidance, "--compare-guidance", float)
    check_processes(cfg.gpus, cfg.batch_size)


def main():
    cfg = parse(Config, __doc__)
    if cfg.smoke:
        cfg = smaller(
            cfg,
            n=8,
            sample_steps=4,
            encode_steps="2,4",
            compare_steps="2,4",
            compare_guidance="0,1",
        )
    task = next((task for task in TASKS if getattr(cfg, task)), "sample")
    cfg = replace(cfg, n=cfg.n or TASKS[task])
    check(cfg)
    if task == "sample":
        launch(sample, cfg)
        return
    from compare import compare  # these two import this file
    from inversion import interpolate, reconstruct

    task = reconstruct if cfg.encode else interpolate if cfg.interpolate else compare
    launch(task, cfg)


if __name__ == "__main__":
    entry(main)
