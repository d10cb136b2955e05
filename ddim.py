"""Chapter 2: the same network, few steps, and no noise on the way.

Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021 (arXiv:2010.02502), whose alpha_t is
our alpha_bar_t.

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
leaves specks, try --eta 1.

    python ddim.py --sample runs/pixel-mnist/ckpt.pt                  100 images in 50 steps
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --sample-steps 10 --classes 3,7 --guidance 1
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --seeds 0-7 --gif       watch eight of them

All need a checkpoint of ddpm_pixel.py and leave samples.png and samples.npz beside it. With the
network of configs/mnist_pixel.yaml one CPU core takes 30, 15 and 10 seconds.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import runtime
from ddpm_pixel import labels_for, load_net, make_alpha_bar
from kernels import gaussian, sampling_table, sampling_update


@dataclass
class Config:
    config: str = ""  # YAML file of these settings; flags override it
    sample: str = ""  # the checkpoint of ddpm_pixel.py to sample from
    out: str = ""  # folder for the samples (default: beside the checkpoint)
    smoke: bool = False  # eight images in four steps, to see that everything works

    n: int = 100  # how many samples
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    classes: str = ""  # comma-separated names or numbers: draw these (default all, in turn)
    sample_steps: int = 50  # how many of the T timesteps to visit, evenly spaced
    eta: float = 0.0  # noise of a step: 0 deterministic, 1 like ddpm
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""
    gif: bool = False
    """also draw reverse.gif and reverse.png: x_t and x0_hat of the first eight on their way"""

    batch_size: int = 64  # images drawn at a time, over all processes
    gpus: int = field(default_factory=runtime.default_gpus)
    """number of GPUs; 0 is the CPU; more than one starts that many processes"""


# ------------------------------------------------------------------------------------- sampling


def subsequence(T, steps):
    """tau of DDIM section 4.2: `steps` of the timesteps 0..T-1, evenly spaced, both ends included.

    Returns the walk over them as [(t, t_prev), ...], downwards from T-1; the last t_prev is -1,
    where alpha_bar is 1. One step is T-1 alone. Raises BadInput unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise runtime.BadInput(
            f"--sample-steps {steps}: the network was trained on a chain of {T} timesteps; "
            f"type a number from 1 to {T}"
        )
    tau = torch.linspace(T - 1, 0, steps).round().long().tolist()
    return list(zip(tau, [*tau[1:], -1], strict=True))


@torch.inference_mode()
def sampler(net, alpha_bar, pairs, shape, seeds, y=None, *, eta=0.0, guidance=0.0):
    """Walk from noise to images; yields (t_prev, x, x0_hat) after every step.

    alpha_bar (T,) float64; pairs from subsequence(); shape (C,H,W); seeds (B,) int64, one per
    image, on the net's device: x_T, and the z of every step, are functions of the seed alone, the
    same as in chapter 1. y (B,) int64 labels or None; eta in 0..1.
    With guidance w != 0 the conditional and unconditional passes are one batch of 2B.

    Step k is row k of the sampling table. Put eps_hat = (x_t - sqrt(alpha_bar_t) x0_hat) /
    sqrt(1 - alpha_bar_t), which is eq. 9 turned around, into eq. 12, and it reads

        x_prev = A x0_hat + B x_t + sigma z
        B = sqrt((1 - alpha_bar_prev - sigma^2) / (1 - alpha_bar_t))
        A = sqrt(alpha_bar_prev) - B sqrt(alpha_bar_t)

    so that eps_hat stays consistent with an x0_hat that was clipped to [-1, 1].
    """
    table = sampling_table(alpha_bar, pairs, eta=eta)  # (steps,8): eq. 9's factors, A, B, sigma
    x = gaussian((len(seeds), *shape), seeds, -1, seeds.device)  # x_T (B,C,H,W)
    x = x.to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        t = torch.full_like(seeds, t)  # (B,)
        if y is None or guidance == 0:
            eps_hat, eps_uncond = net(x, t, y), None
        else:
            null = torch.full_like(y, net.label.num_embeddings - 1)
            both = net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null]))  # (2B,C,H,W)
            eps_hat, eps_uncond = both.chunk(2)
        x, x0_hat = sampling_update(
            x, eps_hat, table, step, out_uncond=eps_uncond, guidance=guidance, seeds=seeds
        )
        yield t_prev, x, x0_hat


def draw(net, alpha_bar, pairs, cfg, world, shape, labels, seeds):
    """uint8 images (N,H,W,C), the same on every rank: each draws its share of the N seeds.

    shape (C,H,W); labels (N,) int64 or None; seeds (N,) int64.
    """
    mine = torch.arange(len(seeds))[world.share(len(seeds))]
    parts = mine.split(cfg.batch_size // world.size)
    images = [torch.empty(0, *shape[1:], shape[0], dtype=torch.uint8)]
    with world.progress(len(parts) * len(pairs), desc="sampling") as bar, world.autocast():
        for part in parts:
            y = None if labels is None else labels[part].to(world.device)
            for _, x, _ in sampler(  # noqa: B007
                net, alpha_bar, pairs, shape, seeds[part].to(world.device), y,
                eta=cfg.eta, guidance=cfg.guidance,
            ):  # fmt: skip
                bar.update()
            images.append(runtime.to_uint8(x))
    return world.collect(torch.cat(images).to(world.device), len(seeds)).cpu()


# ----------------------------------------------------------------------------------------- main


def film(net, alpha_bar, pairs, cfg, shape, labels, seeds, frames=50):
    """The way of these samples: a list of uint8 (2N,H,W,C), the N x_t and then the N x0_hat.

    At most `frames` of the steps, evenly spaced; the last is always among them.
    """
    x, way = gaussian((len(seeds), *shape), seeds, -1, seeds.device), []
    kept = {pairs[-1 - i][1] for i in range(0, len(pairs), -(-len(pairs) // frames))}
    for t_prev, x_prev, x0_hat in sampler(
        net, alpha_bar, pairs, shape, seeds, labels, eta=cfg.eta, guidance=cfg.guidance
    ):
        if t_prev in kept:
            way.append(runtime.to_uint8(torch.cat([x, x0_hat])))
        x = x_prev
    return way


def sample(cfg, world):
    net, trained, shape, names = load_net(cfg.sample, world.device)
    if net.label is None and (cfg.classes or cfg.guidance):
        raise runtime.BadInput(
            f"{cfg.sample} was trained without labels; leave out --classes and --guidance"
        )
    chosen = [] if net.label is None else runtime.parse_classes(cfg.classes, names)
    seeds = runtime.parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, chosen)
    alpha_bar = make_alpha_bar(trained.schedule, trained.timesteps)
    pairs = subsequence(trained.timesteps, cfg.sample_steps)

    start = time.perf_counter()
    images = draw(net, alpha_bar, pairs, cfg, world, shape, labels, seeds)
    seconds = time.perf_counter() - start
    if not world.is_main:
        return
    folder = Path(cfg.out or Path(cfg.sample).parent)
    runtime.save_samples(folder, images, labels, 10)
    print(
        f"{len(seeds)} images, {len(pairs)} steps, eta {cfg.eta:g}, guidance w = {cfg.guidance:g}: "
        f"{seconds / len(seeds):.3f} s per image"
    )
    print(f"samples: {folder / 'samples.png'}")
    if cfg.gif:
        y = None if labels is None else labels[:8].to(world.device)
        way = film(net, alpha_bar, pairs, cfg, shape, y, seeds[:8].to(world.device))
        rows = [way[int(part * len(way))] for part in (0, 0.25, 0.5, 0.75, 0.99)]
        runtime.save_gif(way, folder / "reverse.gif", len(seeds[:8]))
        runtime.save_grid(torch.cat(rows), folder / "reverse.png", len(seeds[:8]))
        print(f"their way: {folder / 'reverse.gif'}, {folder / 'reverse.png'}")


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    if not cfg.sample:
        raise runtime.BadInput(
            "--sample is missing, a checkpoint of ddpm_pixel.py; "
            "type python ddim.py --sample runs/pixel-mnist/ckpt.pt"
        )
    runtime.check_positive(cfg, "n", "sample_steps", "batch_size")
    runtime.check_fraction(cfg, "eta")
    runtime.check_processes(cfg.gpus, cfg.batch_size)


def main():
    cfg = runtime.parse(Config, __doc__)
    if cfg.smoke:
        cfg = replace(cfg, n=8, sample_steps=4)
    check(cfg)
    runtime.launch(sample, cfg)


if __name__ == "__main__":
    runtime.entry(main)
