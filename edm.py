"""EDM: what a diffusion model consists of, taken apart and chosen piece by piece.

Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models",
2022 (arXiv:2206.00364).

Noise is added and nothing is scaled: x = y + sigma n, for an image y and n ~ N(0, I). A denoiser
D(x; sigma) learns the mean of all images that x may have been (eq. 2), and the ODE

    dx = (x - D(x; sigma)) / sigma dsigma               sigma(t) = t and s(t) = 1 in eq. 4

leads from noise of 80 to an image. Around the network F stand factors by which all that it reads
and all that it should give has variance 1, whatever sigma is (eq. 7; table 1, last column):

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)
    loss = E lambda(sigma) ||D(y + sigma n; sigma) - y||^2      (in terms of F it is eq. 8)
    ln sigma ~ N(P_mean, P_std^2)

The sampler is Heun's method on the steps of eq. 5 (algorithm 1), and with --S-churn it adds fresh
noise on its way (algorithm 2). It takes the networks of ddpm_pixel.py and improved_ddpm.py, too:
what they give is a denoiser by the columns VP and iDDPM of table 1.

    python edm.py --data mnist                     25 minutes of one CPU core; runs/edm-mnist
    python edm.py --sample runs/edm-mnist/ckpt.pt --sample-steps 40 --S-churn 0 2 4 8 16
    python edm.py --sample runs/pixel-mnist/ckpt.pt --column vp           a network of chapter 1
    python edm.py --sample edm-cifar10-32x32-cond-vp.pkl --n 64 --out runs/edm-published
    python edm.py --data cifar10 --gpus 8                the paper's: DDPM++, 200 million images

--ema-lengths keeps averages of the weights, from which --sample makes one of any --ema-length
(Karras et al. 2024, arXiv:2312.02696; runtime/posthoc_ema.py).
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.pictures import save_drawn, save_grid
from runtime.plots import plot_lines
from runtime.posthoc_ema import PowerEMA, gamma_of, reconstruct
from runtime.processes import launch
from runtime.run import Run
from runtime.typed_flags import check_within

import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import improved_ddpm
from ddim import guided
from ddpm_pixel import x0_coefficients
from eval_fid import Evaluator
from evaluation import over_sigma
from image_data import datasets
from image_data.augment import AUGMENT_DIM, augment, draw_augmentation
from image_data.batches import spaced
from kernels import Row, gaussian, sampling_update
from networks.adm_unet import UNet
from networks.edm_unet import DDPMpp

SAMPLING = "sampler sample_steps sigma_min sigma_max rho S_churn S_tmin S_tmax S_noise "
SAMPLING += "clip_denoised guidance"
SHARED = ("data", "data_root", "size", "classes", "batch_size", "clip_denoised")


@dataclass
class Config(cli.ScoredConfig):
    P_mean: float = -1.2  # training draws ln sigma from N(P_mean, P_std^2)
    P_std: float = 1.2  # standard deviation of ln sigma
    sigma_data: float = 0.0  # standard deviation of the pixels in [-1, 1]; 0 measures it
    augment: float = 0.0
    """how often an image is turned, scaled, stretched, moved, each by itself (paper: 0.12); above 0
    half of the images are mirrored, too"""

    model: Literal["unet", "ddpmpp"] = "unet"  # chapter 1's U-Net, or the paper's DDPM++
    model_channels: int = 32  # channels at full resolution (paper: 128)
    channel_mult: tuple[int, ...] = (1, 2, 4)  # times these at each resolution (paper: 2 2 2)
    num_res_blocks: int = 1  # residual blocks per resolution (paper: 4)
    attention_resolutions: tuple[int, ...] = (7, 8)  # heights at which blocks attend (paper: 16)
    dropout: float = 0.0  # dropout in residual blocks (paper: 0.13)
    use_checkpoint: bool = False  # compute activations twice instead of keeping them
    class_cond: bool = True  # give the network the class label, where the data has classes
    label_dropout: float = 0.1  # how often training replaces it by "no label", for guidance

    ema_lengths: tuple[float, ...] = ()
    """relative lengths, such as 0.05 0.1, of power-function averages to keep for --ema-length"""
    snapshot_every: int = 500  # steps between two snapshots of them

    sample: str = ""
    """do not train: sample this checkpoint, of this script, ddpm_pixel.py or improved_ddpm.py, or
    a published network: NVIDIA's .pkl of DDPM++, or what improved_ddpm.py takes"""
    n: int = 100  # how many samples
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["heun", "euler"] = "heun"  # second order, two evaluations a step; or first
    column: Literal["vp", "iddpm"] = "vp"
    """table 1, for networks of other chapters: any sigma, or the nearest that training had"""
    sample_steps: int = 18  # N of eq. 5
    sigma_min: float = 0.002  # the last sigma before 0
    sigma_max: float = 80.0  # the first
    rho: float = 7.0  # the larger, the more steps are near sigma_min
    S_churn: tuple[float, ...] = (0.0,)
    """how much noise all steps of algorithm 2 renew, at most 0.41 times their number; several: a
    row of images for each"""
    S_tmin: float = 0.0  # no fresh noise below this sigma
    S_tmax: float = 1e9  # nor above this one
    S_noise: float = 1.0  # factor on that noise: 1 is exact (paper: up to 1.007)
    clip_denoised: bool = False  # keep D in [-1, 1], where images lie
    guidance: float = 0.0
    """w in (1+w) D(x,y) - w D(x): -1 unconditional, 0 conditional; others write s = 1+w"""
    ema_length: tuple[float, ...] = ()
    """--sample: the running mean of this relative length; several: a curve of quality over it"""

    CURVE = ("data", "data_root", *cli.ScoredConfig.METRICS[1:])  # of a curve over --ema-length
    USES = {"sample": cli.DRAWS | {"column", "ema_length", *CURVE, *SAMPLING.split()}}
    IDLE = cli.names("column ema_length")
    CHURN = dict.fromkeys(("S_tmin", "S_tmax", "S_noise"), "S_churn")
    NEEDS = cli.ScoredConfig.NEEDS | CHURN | {"snapshot_every": "ema_lengths"}
    NEEDS |= {f"sample:{name}": "ema_length" for name in CURVE}
    FREE = cli.ScoredConfig.FREE | cli.names("use_checkpoint snapshot_every sample n seeds")
    FREE |= IDLE | cli.names(SAMPLING)


# ------------------------------------------------------------------- the denoiser: section 5

Coefficients = namedtuple("Coefficients", "c_skip c_out c_in c_noise")


def precondition(sigma, sigma_data):
    """Table 1, last column, of sigma, a tensor of any shape; derived in appendix B.6.

    c_in gives the network inputs of variance 1 and c_out targets of variance 1; of all c_skip this
    one makes c_out, which enlarges the errors of F, the smallest.
    """
    total = sigma**2 + sigma_data**2  # variance of x = y + sigma n
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    return Coefficients(c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4)


def loss_weight(sigma, sigma_data):
    """lambda = 1 / c_out^2: the errors of F count alike at every sigma.

    A network that still gives 0 then has a loss of 1 at each of them (figure 5a) if the pixels'
    mean is 0; with another mean it rises with sigma, to 1 + (mean / sigma_data)^2.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoise(net, x, sigma, sigma_data, y=None, *more):
    """D (B,C,H,W) of x (B,C,H,W) with noise sigma (B,1,1,1), labels y (B,) or None; eq. 7.

    more: what else the network takes, the vectors of the augmentation.
    """
    c = precondition(sigma, sigma_data)
    return c.c_skip * x + c.c_out * net(c.c_in * x, c.c_noise.flatten(), y, *more)


def edm_loss(net, y, sigma, eps, sigma_data, labels=None, *more):
    """The weighted squared error of each image, (B,), the mean over its pixels: eq. 2 and 8.

    Images y and noise eps ~ N(0, I) (B,C,H,W), sigma (B,1,1,1).
    """
    error = denoise(net, y + sigma * eps, sigma, sigma_data, labels, *more) - y
    return (loss_weight(sigma, sigma_data) * error**2).mean(dim=(1, 2, 3))


def measured_sigma_data(ds, most=10000):
    """Standard deviation of the pixels in [-1, 1] of at most so many images, evenly spaced."""
    rows = (ds.images[row].ravel() for row in spaced(len(ds), most))
    counts = sum(np.bincount(row, minlength=256) for row in rows)
    return float(np.cov(np.arange(256) / 127.5, fweights=counts, ddof=0) ** 0.5)


@dataclass
class Edm:
    """A network of this chapter, as the sampler sees it: called with sigma, it gives floats."""

    sigma_data: float
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    round = staticmethod(float)  # any sigma can be asked for

    def __call__(self, sigma):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        return Coefficients(*(c.item() for c in precondition(sigma, self.sigma_data)))


class Chain:
    """A network trained on a chain of timesteps: the columns VP and iDDPM of table 1.

    x_t = sqrt(a) (y + sigma n) with sigma = sqrt((1 - a) / a) at alpha_bar_t = a, so c_in is
    sqrt(a) = 1 / sqrt(sigma^2 + 1), and c_noise is the timestep of sigma: in "vp" a real one, on a
    straight line in ln sigma between its neighbours, in "iddpm" the nearest. Of a network that
    gives eps, c_skip is 1 and c_out is -sigma. alpha_bar float64 (T,).
    """

    def __init__(self, alpha_bar, prediction="eps", column="vp"):
        a = alpha_bar[alpha_bar > 0].numpy()
        self.sigmas, self.prediction, self.column = np.sqrt((1 - a) / a), prediction, column
        self.sigma_min, self.sigma_max = map(float, self.sigmas[[0, -1]])

    def round(self, sigma):
        """The sigma at which the network can be asked: in "iddpm" the nearest of the chain."""
        return sigma if self.column == "vp" else float(self.sigmas[self._nearest(sigma)])

    def _nearest(self, sigma):
        return int(np.abs(self.sigmas - sigma).argmin())

    def __call__(self, sigma):
        t = self._nearest(sigma)
        if self.column == "vp":
            t = float(np.interp(math.log(sigma), np.log(self.sigmas), range(len(self.sigmas))))
        a = 1 / (sigma**2 + 1)
        p, q = x0_coefficients(a, self.prediction)  # D = p x_t - q F, x_t = sqrt(a) x
        return Coefficients(p * math.sqrt(a), -q, math.sqrt(a), t)


# ------------------------------------------------------------- sampling: sections 3 and 4


class Churn(NamedTuple):
    """How much noise algorithm 2 renews, and where: S_tmin <= sigma <= S_tmax."""

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = math.inf
    S_noise: float = 1.0


def sigma_steps(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """sigma_0 > ... > sigma_n = 0, n + 1 floats: eq. 5."""
    low = (sigma_min / sigma_max) ** (1 / rho)  # and sigma_max is 1: no rho is too small for that
    part = [i / max(n - 1, 1) for i in range(n)]
    return [sigma_max * (1 + p * (low - 1)) ** rho for p in part] + [0.0]


def euler_row(c, sigma, sigma_next):
    """x + (sigma_next - sigma) d, with the slope d = (x - D) / sigma: algorithm 1, lines 4 and 5.

    c: Coefficients at sigma. A Row means D = p x - q F, and x_next = A D + B x + H history.
    """
    ratio = sigma_next / sigma
    return Row(p=c.c_skip, q=-c.c_out, A=1 - ratio, B=ratio)


def heun_row(c, sigma, sigma_next):
    """x + (sigma_next - sigma) (d + d') / 2, from Euler's x' and with x as history: lines 7 and 8.

    x' = x + (sigma_next - sigma) d, so this is (x + x' + (sigma_next - sigma) d') / 2, where d' =
    (x' - D') / sigma_next is the slope at x'. c: Coefficients at sigma_next.
    """
    h = (sigma_next - sigma) / sigma_next
    return Row(p=c.c_skip, q=-c.c_out, A=-h / 2, B=(1 + h) / 2, H=0.5)


@torch.no_grad()
def sample(net, column, sigmas, shape, seeds, y=None, w=0.0, *, order=2, churn=None, clip=False):
    """Algorithm 2, which without churn is algorithm 1; yields x and D, (B,C,H,W), at each step.

    net and its column, an Edm or a Chain; sigmas of sigma_steps; shape (C,H,W), seeds (B,), labels
    y (B,) or None, w guides. order 2 is Heun's method, 1 is Euler's. clip keeps D in [-1, 1].
    """
    churn = churn or Churn()
    x = sigmas[0] * gaussian((len(seeds), *shape), seeds, -1, seeds.device)  # (B,C,H,W)
    x = x.to(memory_format=torch.channels_last)
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if churn.S_churn and churn.S_tmin <= sigma <= churn.S_tmax:
            gamma = min(churn.S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
            sigma_hat = column.round(sigma + gamma * sigma)
            added = churn.S_noise * math.sqrt(max(sigma_hat**2 - sigma**2, 0))
            x = x + added * gaussian(x.shape, seeds, step, x.device)  # line 6
            sigma = sigma_hat
        c = column(sigma)
        how = {"step": step, "clip": clip}
        row = euler_row(c, sigma, sigma_next)
        x_next, D = sampling_update(x, row=row, **how, **guided(net, c.c_in * x, c.c_noise, y, w))
        if order == 2 and sigma_next > 0:
            c = column(sigma_next)
            out = guided(net, c.c_in * x_next, c.c_noise, y, w)
            row = heun_row(c, sigma, sigma_next)
            x_next, _ = sampling_update(x_next, row=row, history=x, **how, **out)
        x = x_next
        yield x, D


def steps_of(cfg, column):
    """The sigmas of the settings, within the network's, rounded to what it knows; else BadInput."""
    knows = column.sigma_min, column.sigma_max, "the network knows sigmas from"
    check_within(cfg, cli.typed(("sigma_min", "sigma_max")), *knows)
    low, high = max(cfg.sigma_min, column.sigma_min), min(cfg.sigma_max, column.sigma_max)
    if low >= high:
        told = f"the network knows no sigmas from {cfg.sigma_min:g} to {cfg.sigma_max:g}"
        raise cli.BadInput(f"--sigma-min, --sigma-max: {told}")
    return [*map(column.round, sigma_steps(cfg.sample_steps, low, high, cfg.rho)[:-1]), 0.0]


def trajectory(net, column, cfg, shape, seeds, y=None):
    """sample() as the settings say."""
    churn = Churn(cfg.S_churn[0], cfg.S_tmin, cfg.S_tmax, cfg.S_noise)
    how = {"order": 2 if cfg.sampler == "heun" else 1, "churn": churn, "clip": cfg.clip_denoised}
    return sample(net, column, steps_of(cfg, column), shape, seeds, y, cfg.guidance, **how)


def draw(net, column, cfg, world, shape, seeds, labels, desc="sampling"):
    """uint8 images (N,H,W,C) of the seeds (N,), the same on every rank: each draws its share."""
    walk = partial(trajectory, world.for_sampling(net), column, cfg, shape)
    return world.draw(walk, seeds, labels, cfg.batch_size, cfg.sample_steps, desc)


# -------------------------------------------------------------------------------------- training


def make_net(cfg, shape, num_classes):
    """The network of the settings."""
    kind, more = UNet, {"style": "ddpm"}
    if cfg.model == "ddpmpp":
        kind, more = DDPMpp, {"augment_dim": AUGMENT_DIM if cfg.augment else 0}
    net = kind(shape, num_classes, **cli.taken_by(kind, cfg), **more)
    return net.to(memory_format=torch.channels_last)


def train(cfg, world):
    ds = datasets.of(cfg)
    sigma_data = cfg.sigma_data or measured_sigma_data(ds)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, ds.shape, ds.num_classes * cfg.class_cond).to(world.device)
    power = PowerEMA(net, cfg.ema_lengths)
    keep, facts = {"power": power}, {"sigma_data": sigma_data}
    evaluator = Evaluator.of_run(cfg, ds, world) if cfg.metric_every else None
    run = Run(cfg, world, ds, net=net, optimizer=world.adam(cfg.lr), keep=keep, facts=facts)
    column, snapshots = Edm(sigma_data), run.folder / "power"
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    labels = cli.labels_for(seeds, range(net.null), cfg.guidance)
    run.say(f"{ds.name}: {len(ds)} images {ds.shape}, sigma_data {sigma_data:.4f}")

    def draws(part):  # how to turn, scale, move: drawn for the whole batch
        rng = run.rng(part.step, "augment")
        return draw_augmentation(rng, cfg.batch_size, cfg.augment)[part.where]

    for step in run.steps():  # goes on where it stopped; saves between two steps
        for part in run.parts(step):  # this process's share, in --accumulate parts
            y, label = run.images(part)  # (b,C,H,W), (b,)
            label = run.hide(part, label, cfg.label_dropout) if cfg.class_cond else None
            more = ()
            if cfg.augment:
                y, what = augment(y, run.bring(part, draws))  # (b,C,H,W), (b,9)
                more = (what,)
            u = run.noise(part, (len(y), 1, 1, 1), "sigma")  # N(0, 1)
            sigma, eps = (cfg.P_mean + cfg.P_std * u).exp(), run.noise(part, y.shape)
            losses = edm_loss(run.model, y, sigma, eps, sigma_data, label, *more)
            level = torch.special.ndtr(u.flatten())  # the log splits losses by quarter of sigma
            run.backward(losses, level)
        run.descend()  # clip the gradient, Adam, running means, log
        power.update(net, run.step)
        if cfg.ema_lengths and (run.step % cfg.snapshot_every == 0 or run.done) and world.is_main:
            power.save_snapshot(snapshots, run.step)
        if evaluator and (run.due(cfg.metric_every) or run.done):
            draw_some = partial(draw, run.ema, column, cfg, world, ds.shape)
            run.log_metrics(partial(evaluator.score, draw_some, cfg.metric_n, net.null))
        if run.due(cfg.sample_every):
            run.save_grid(partial(draw, run.ema, column, cfg, world, ds.shape, seeds, labels))
    how = cfg, world, ds.shape, seeds, labels, run.folder, ds.class_names
    save_images(run.ema.eval(), column, *how)
    torch.manual_seed(cfg.seed)
    fresh = make_net(cfg, ds.shape, net.null).to(world.device).eval()  # the first weights
    nets = {"before training": fresh, "after": run.ema}
    how = {"loss": partial(edm_loss, sigma_data=sigma_data), "nets": nets}
    over_sigma.save_figures(
        run.folder, ds, world, denoise=partial(denoise, sigma_data=sigma_data), **how
    )


def save_images(net, column, cfg, world, shape, seeds, labels, folder, names=()):
    """samples.png and .npz; reverse.gif and .png: x and D of an image of each class."""
    images = draw(net, column, cfg, world, shape, seeds, labels)
    walk, sigmas = partial(trajectory, net, column, cfg, shape), steps_of(cfg, column)
    save_drawn(folder, images, labels, walk, seeds, world, sigmas, names, sigmas[0], cfg.guidance)


def save_churn(net, column, cfg, world, shape, seeds, labels, folder):
    """churn.png: a row for each --S-churn, of the same seeds."""
    some = seeds[:10], labels if labels is None else labels[:10]
    each = [replace(cfg, S_churn=(churn,)) for churn in cfg.S_churn]
    rows = [draw(net, column, one, world, shape, *some, f"churn {one.S_churn[0]}") for one in each]
    if world.is_main:
        save_grid(torch.cat(rows), folder / "churn.png", len(some[0]))
        print(f"a row for each S_churn: {folder / 'churn.png'}")


def save_ema_curve(net, column, cfg, world, shape, mean_of, asked, folder):
    """ema-length.png: the Fréchet distance of --n samples over the length of the running mean."""
    score, found = Evaluator.of_run(cfg, datasets.of(cfg), world).score, {}
    for s in asked.ema_length:
        net.load_state_dict(mean_of(s))
        found[s] = score(partial(draw, net, column, cfg, world, shape), cfg.n, net.null)["frechet"]
    if world.is_main:
        panel = {f"Fréchet distance, N = {cfg.n}": {"": (list(found), list(found.values()))}}
        plot_lines(folder / "ema-length.png", panel, xlabel="relative length of the running mean")
        lines = [f"length {k:g}: Fréchet distance {v:.3f}" for k, v in found.items()]
        print(*lines, f"the curve: {folder / 'ema-length.png'}", sep="\n")


# ------------------------------------------------------------------------------------- commands


def load_net(path, device, ema=None, column="vp", walk=None, also=()):
    """(network, its Config, shape (C,H,W), class names, its column) of a checkpoint, EMA weights.

    Also of other chapters, and published ones; column is theirs in table 1. ema: which decay, of
    several; walk: of read_network. BadInput for other files: `also` are scripts that it names, too.
    """
    from networks.published import edm, unet

    scripts = ("edm", "improved_ddpm", "ddpm_pixel", *also)
    how = {"script": "edm", "walk": walk}
    pickled = str(path).endswith(".pkl")
    state = edm.as_checkpoint(path) if pickled else unet.read_network(path, scripts, **how)
    if state["script"] != "edm":
        net, theirs, shape, names, alpha_bar = improved_ddpm.load_net(path, device, ema, **how)
        cfg = Config(**{name: getattr(theirs, name) for name in SHARED})
        return net, cfg, shape, names, Chain(alpha_bar, theirs.prediction, column)
    cfg, shape = checkpoints.trained_config(Config, state, path), tuple(state["shape"])
    names = state["class_names"] if cfg.class_cond else []
    weights = checkpoints.chosen_ema(state, path, ema)
    net = checkpoints.built(lambda: make_net(cfg, shape, len(names)), weights, path).to(device)
    net.null_label = cfg.label_dropout > 0  # whether it has learned to do without a label
    return net.eval(), cfg, shape, names, Edm(state["sigma_data"], *state.get("sigma_range", ()))


def sample_checkpoint(cfg, world):
    how = checkpoints.typed_ema(cfg), cfg.column, checkpoints.given(cfg, checkpoints.WALK)
    net, trained, shape, names, column = load_net(cfg.sample, world.device, *how)
    trained = checkpoints.overlaid(trained, cfg, f"{SAMPLING} batch_size data data_root n".split())
    if isinstance(column, Edm) and cli.typed(("column",)):
        raise cli.BadInput(f"--column: {cfg.sample} has its own; leave it out")
    seeds, labels = cli.seeds_and_labels(cfg, net, names, trained.guidance)
    folder = cli.folder_of(cfg, cfg.sample)
    if cfg.ema_length and not isinstance(column, Edm):
        raise cli.BadInput(f"--ema-length: {cfg.sample} is no run of edm.py, which keeps means")
    if cfg.ema_length:
        past = checkpoints.load_checkpoint(cfg.sample, "edm", facts=True)["power"]["snapshots"]
        mean_of = partial(reconstruct, Path(cfg.sample).parent / "power", steps=past)
        if len(cfg.ema_length) > 1:
            trained = replace(trained, **checkpoints.given(cfg, cfg.CURVE))
            return save_ema_curve(net, column, trained, world, shape, mean_of, cfg, folder)
        net.load_state_dict(mean_of(cfg.ema_length[0]))
    make = save_churn if len(trained.S_churn) > 1 else partial(save_images, names=names)
    make(net, column, trained, world, shape, seeds, labels, folder)


def check(cfg):
    """Raise BadInput for a setting out of its range, and for settings that contradict others."""
    cli.check_run(cfg)
    positive = "P_std sample_steps sigma_min rho n snapshot_every "
    positive += "model_channels channel_mult num_res_blocks"
    not_negative = "sigma_data S_tmin S_tmax S_noise"
    cli.check_ranges(cfg, positive, not_negative, "dropout label_dropout augment")
    cli.check_sampling(cfg)
    for low, high in (("sigma-min", "sigma-max"), ("S-tmin", "S-tmax")):
        least, most = (getattr(cfg, name.replace("-", "_")) for name in (low, high))
        if least >= most:
            raise cli.BadInput(f"--{low} {least:g} must be below --{high} {most:g}")
    if not cfg.S_churn or min(cfg.S_churn) < 0:
        raise cli.BadInput(f"--S-churn {cfg.S_churn}: expected numbers from 0, such as 0 10 40")
    if cfg.augment and cfg.model != "ddpmpp":
        raise cli.BadInput("--augment tells the network what was done: type --model ddpmpp, too")
    if not cfg.sample and len(cfg.S_churn) > 1:
        raise cli.BadInput("--S-churn: several are for --sample; training takes one")
    if not cfg.sample and cfg.guidance and not cfg.label_dropout:
        raise cli.BadInput("--guidance needs a network that learns without labels: --label-dropout")
    several = len(cfg.ema_length) > 1
    if several and (cfg.n < 2 or cfg.seeds or cfg.classes or len(cfg.S_churn) > 1):
        told = "is a curve over --n samples (2 or more), of one --S-churn"
        raise cli.BadInput(f"--ema-length: of several {told}; leave out --seeds and --classes")
    if cfg.sample and not several and (typed := cli.typed(cfg.CURVE)):
        raise cli.BadInput(f"{cli.flag(typed[0])} is for a curve over --ema-length: leave it out")
    for length in (*cfg.ema_lengths, *cfg.ema_length):
        gamma_of(length, "--ema-lengths" if length in cfg.ema_lengths else "--ema-length")
    if cfg.ema_length and not cfg.sample:
        raise cli.BadInput("--ema-length is for --sample; training keeps --ema-lengths 0.05 0.1")


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_edm.yaml")
    small = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
    small |= {"n": 8, "sample_steps": 4}
    cfg = cli.smoke(cfg, **small, metric_every=0, out="runs/smoke-edm")
    check(cfg)
    if cfg.sample:
        launch(sample_checkpoint, cfg)
    else:
        cfg = datasets.prepared(cfg)  # by one process
        launch(train, replace(cfg, out=cfg.out or f"runs/edm-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    cli.entry(main)
