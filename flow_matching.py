"""Flow matching: straight lines from noise to images, and a network that learns their slopes.

Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", 2023
(arXiv:2210.02747). Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", 2024 (arXiv:2403.03206): Stable Diffusion 3, whose t is ours.

There is no chain and no schedule. Between an image x_0 at t = 0 and noise eps at t = 1 lies a line,

    x_t = (1 - t) x_0 + t eps                                               Esser et al. eq. 13

and a network learns its slope, eps - x_0, from a point on it (conditional flow matching):

    L_CFM = E || v(x_t, t) - (eps - x_0) ||^2                               Lipman et al. eq. 23

Many lines go through one x_t, and the best v is the mean of their slopes. So the paths of the ODE
dx = v(x, t) dt are curved, but at every t they lie as the lines do: from noise they lead to images.
The divergence of v says how dense images are there. rectified_flow.py straightens the paths.

    python flow_matching.py --data mnist             25 minutes of one CPU core; runs/flow-mnist
    python flow_matching.py --nll runs/flow-mnist/ckpt.pt --n 100            bits per dimension
    python flow_matching.py --latents runs/ldm-mnist             on the latents of ldm_cfg.py
    python flow_matching.py --sample runs/pixel-mnist/ckpt.pt    chapter 1's network as a flow

There eps becomes v (Kingma, Gao 2023, arXiv:2303.00848); with --sampler ddpm v becomes eps.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.finite import clamped, end_of
from runtime.pictures import save_drawn, save_samples, to_uint8
from runtime.processes import exact, launch
from runtime.run import Run

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

import ddim
import ddpm_pixel
import dit
import edm
import ldm_cfg
from eval_fid import Evaluator
from evaluation import flows
from image_data import datasets
from networks.adm_unet import UNet
from networks.autoencoders import Space, load_autoencoder

SAMPLING = ("sampler", "sample_steps", "tolerance", "shift", "clip_denoised", "guidance")
OF_T = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
OF_DATA = ("data", "size", "flip", "classes")
OF_UNET = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "dropout")
NOT_ALONE = "sampler=euler,midpoint,heun,ddpm"  # with rk45 each image is drawn by itself
OF_RUN = ("data_root", "steps", "batch_size", "lr", "warmup", "ema", "label_dropout")


@dataclass
class Config(cli.ScoredConfig):
    weighting_scheme: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """how training draws t: alike, or more often from the middle (Esser et al. section 3.1)"""
    logit_mean: float = 0.0  # logit_normal: of logit t; above 0 there is more noise
    logit_std: float = 1.0  # logit_normal: its standard deviation
    mode_scale: float = 1.29  # mode: how much the middle is favoured, from -1 to 1.75
    shift: float = 1.0  # sqrt(m/n) of eq. 23: 3 gives 1024x1024 images the noise of 341x341

    model: str = "auto"
    """unet: chapter 1's; dit-SIZE/PATCH: dit.py's; auto: unet of pixels, dit-xs/1 of latents"""
    model_channels: int = 32  # unet: channels at full resolution
    channel_mult: tuple[int, ...] = (1, 2, 4)  # times these at each resolution
    num_res_blocks: int = 1  # residual blocks per resolution
    attention_resolutions: tuple[int, ...] = (7, 8)  # heights at which blocks attend
    dropout: float = 0.0  # dropout in residual blocks
    use_checkpoint: bool = False  # compute activations twice instead of keeping them
    class_cond: bool = True  # give the network the class label, where the data has classes
    label_dropout: float = 0.1  # how often training replaces it by "no label", for guidance

    latents: str = ""
    """train on the latents of this run of ldm_cfg.py or dit.py, on its data and as long"""
    sample: str = ""
    """do not train: sample this checkpoint, of this script or as edm.py --sample takes it"""
    nll: str = ""  # of this checkpoint: bits per dimension of held-out images
    encode: str = ""  # of this one: held-out images to their noise and back, in ever more steps
    interpolate: str = ""  # of this one: from one noise to another, a row for each two seeds
    n: int = 0  # how many; 0 is 100, or 8 images of --encode and noises of --interpolate
    seeds: str = ""
    """such as 17 or 0-63,100; overrides --n (default 0 .. n-1); of --nll, --encode: test images"""
    sampler: Literal["euler", "midpoint", "heun", "rk45", "ddpm"] = "midpoint"
    """first order; second, with twice the evaluations; scipy's; or chapter 1's, with noise"""
    sample_steps: int = 25  # from t = 1 to 0; rk45 takes more between, where it needs them
    tolerance: float = 1e-4  # rk45: of the error of a step
    encode_steps: str = "5,10,20,50,100"  # numbers of Euler's steps to encode in
    clip_denoised: bool = False  # keep x0_hat in [-1, 1]; other chapters' networks: as there
    guidance: float = 0.0
    """w in (1+w) v(x,y) - w v(x): -1 unconditional, 0 conditional; others write s = 1+w"""

    WALK = frozenset(SAMPLING) | cli.names("n seeds batch_size precision ema")
    TRAINING = WALK.union(cli.ScoredConfig.__dataclass_fields__, OF_T) - {*OF_DATA}
    TRAINING |= cli.names("use_checkpoint label_dropout")
    CODES = cli.names("n seeds batch_size ema clip_denoised guidance")
    USES = {
        "latents": TRAINING | {"model"},
        "sample": WALK | cli.DRAWS,
        "nll": cli.names("n seeds ema tolerance data_root"),
        "encode": CODES | {"encode_steps", "data_root"},
        "interpolate": CODES | {"sample_steps", "classes"},
    }
    NEEDS = cli.ScoredConfig.NEEDS | dict.fromkeys(OF_UNET, "model=auto,unet")
    NEEDS |= {"mode_scale": "weighting_scheme=mode", "tolerance": "sampler=rk45"}
    NEEDS |= dict.fromkeys(("logit_mean", "logit_std"), "weighting_scheme=logit_normal")
    NEEDS |= {"sample:batch_size": NOT_ALONE, "nll:tolerance": "", "encode_steps": "encode"}
    NEEDS |= {"sample:shift": "sampler=euler,midpoint,heun,rk45"}
    FREE = cli.ScoredConfig.FREE.union(SAMPLING, ("use_checkpoint", "n", "seeds")) - {"shift"}


# ---------------------------------------------------------------------------- the path, the loss


def shifted(t, shift):
    """t of n pixels as that of m, which it hides less; shift = sqrt(m/n). Esser et al. eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def draw_t(u, scheme="uniform", mean=0.0, std=1.0, scale=1.29):
    """t in [0, 1] of standard normal numbers u, like u: Esser et al. section 3.1."""
    if scheme == "logit_normal":
        return (mean + std * u).sigmoid()  # eq. 19
    u = torch.special.ndtr(u)  # uniform in [0, 1]
    if scheme == "mode":
        return 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)  # eq. 20
    return u


def line(x0, t, eps):
    """x_t of images x0 and noise eps (B,C,H,W), t (B,1,1,1); its slope is eps - x0."""
    return (1 - t) * x0 + t * eps


CHAIN = ddpm_pixel.Config(schedule="cosine")  # that a flow is sampled as, with --sampler ddpm
TIMES = 1000.0  # the network is told 1000 t, in the range that its embedding was made for


def flow_loss(net, x0, t, eps, y=None):
    """L_CFM of each image, (B,), the mean over its pixels; x0, eps (B,C,H,W), t (B,1,1,1), y (B,).

    With x0_hat = x - t v and eps_hat = x + (1 - t) v an error of v is 1/t times one of x0_hat, and
    1/(1-t) times one of eps_hat: what differs from L_simple is how much each t counts.
    """
    v = net(line(x0, t, eps), TIMES * t.flatten(), y)  # (B,C,H,W)
    return (v - (eps - x0)).square().mean(dim=(1, 2, 3))


# ------------------------------------------------- the bridge: one network in all chapters' words


def straight(t):
    """(a, b, c_in, c_noise), v = a x + b net(c_in x, c_noise): of this chapter's it is v itself."""
    return 0.0, 1.0, 1.0, TIMES * t


straight.last = 1.0  # the largest t that the network knows


class Bent:
    """Gives the same of a network of chapter 1 or 2 or of edm.py, by its column of EDM's table 1.

    x_t / (1 - t) = x_0 + sigma eps is EDM's x, where sigma = t / (1 - t), and sqrt(alpha_bar) times
    that is chapter 1's x_t. Each gives an x0_hat, and v = (x - x0_hat) / t is the slope from there.
    """

    def __init__(self, column):
        self.column = column
        self.low = column.sigma_min or 0.002
        self.high = column.sigma_max if column.sigma_max < math.inf else 80.0
        self.last = self.high / (1 + self.high)

    def __call__(self, t):
        sigma = min(max(t / max(1 - t, 1e-12), self.low), self.high)
        t, c = sigma / (1 + sigma), self.column(sigma)
        return (1 - c.c_skip / (1 - t)) / t, -c.c_out / t, c.c_in / (1 - t), c.c_noise


class AsChain(nn.Module):
    """And back: this chapter's network as one of chapter 1, eps_hat = net(x_t, t, y), t in 0..T-1
    of a chain of alpha_bar float64 (T,)."""

    def __init__(self, net, alpha_bar):
        super().__init__()
        self.net, self.alpha_bar = net, alpha_bar
        self.null, self.null_label = net.null, getattr(net, "null_label", True)

    def forward(self, x, t, y=None):
        a = self.alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)  # (B,1,1,1)
        size = a.sqrt() + (1 - a).sqrt()  # x_t of the chain is so many times x_t of the flow
        t, x = ((1 - a).sqrt() / size).to(x.dtype), x / size.to(x.dtype)
        return x + (1 - t) * self.net(x, TIMES * t.flatten(), y)


def velocity(net, column=straight, y=None, w=0.0, clip=False):
    """The function v(x, t) of x (B,C,H,W) and a number t, for labels y (B,) or None; w guides,
    clip keeps x0_hat = x - t v in [-1, 1]."""

    def v(x, t):
        a, b, c_in, c_noise = column(t)
        outs = ddpm_pixel.guided_pass(net, c_in * x, c_noise, y, w)
        out, out_uncond = (o if o is None else o[:, : x.shape[1]].to(x.dtype) for o in outs)
        out = out if out_uncond is None else (1 + w) * out - w * out_uncond
        v = a * x + b * out
        return (x - clamped(x - t * v, -1, 1)) / t if clip and t else v

    return v


# --------------------------------------------------------------------------------- the ODE, solved


def times_of(steps, shift=1.0, last=1.0):
    """steps + 1 numbers from `last`, at most 1, down to 0, evenly spaced but for the shift."""
    return [last * shifted(1 - i / steps, shift) for i in range(steps + 1)]


def step(x, h, slope):
    """x + h slope, which lies in memory as x does: a CUDA graph is of one layout."""
    return x.clone().add_(slope, alpha=h)


def follow(v, x, times, sampler="midpoint", tolerance=1e-4):
    """From x (B,...) at times[0] through the others, up or down; yields x and x0_hat at each.

    v(x, t) is like x. rk45 chooses its own steps between, the same for all of x.
    """
    if sampler == "rk45":
        return (yield from flows.rk45(v, x, times, tolerance))
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        slope = v(x, t)
        if sampler == "midpoint":
            slope = v(step(x, h / 2, slope), t + h / 2)
        if sampler == "heun":
            slope = (slope + v(step(x, h, slope), t_next)) / 2
        x = step(x, h, slope)
        yield x, x - t_next * slope


@torch.no_grad()
def sample(net, column, cfg, shape, seeds, y=None):
    """follow() from the noise of seeds (B,), as the settings say; yields x, x0_hat (B,C,H,W)."""
    w, clip = cfg.guidance, cfg.clip_denoised
    if cfg.sampler == "ddpm":
        alpha_bar = ddpm_pixel.alpha_bar_of(CHAIN)
        pairs = ddpm_pixel.timestep_pairs(CHAIN.timesteps, cfg.sample_steps)
        how = AsChain(net, alpha_bar), alpha_bar, pairs, shape, seeds, y, w
        return (yield from ddpm_pixel.sample(*how, clip=clip))
    v, last = velocity(net, column, y, w, clip), column.last
    x, times = ddim.noise(seeds, shape), times_of(cfg.sample_steps, cfg.shift, last)
    x = math.hypot(1 - last, last) * x
    yield from follow(v, x, times, cfg.sampler, cfg.tolerance)


# ------------------------------------------------------------------------------------- likelihood


def log_likelihood(v, x, probe, times=(0.0, 1.0), sampler="rk45", tolerance=1e-4):
    """log p(x) in nats, (B,), of x (B,C,H,W) under the flow v(x, t); times from 0 up to 1.

    The density of what flows changes by the divergence of v (Chen et al. 2018, arXiv:1806.07366):
    log p(x) = log N(x_1; 0, I) + integral of div v dt. And div v = E probe^T (dv/dx) probe for a
    probe (B,C,H,W) of signs, the same at all t (Grathwohl et al. 2019, arXiv:1810.01367).
    """

    def both(state, t):
        x_t = state[:, :-1].view_as(x)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            slope = v(x_t, t)
            (pulled,) = torch.autograd.grad(slope, x_t, probe)
        divergence = (pulled * probe).flatten(1).sum(1, keepdim=True)  # (B,1)
        return torch.cat([slope.detach().flatten(1), divergence], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)  # (B,D+1)
    *_, (end, _) = follow(both, start, times, sampler, tolerance)
    end = end.double()
    return end[:, -1] - 0.5 * (end[:, :-1].square() + math.log(2 * math.pi)).sum(1)  # of x_1


def bits_per_dim(log_p, shape):
    """Of 8-bit pixels, from log p (B,) of pixels in [-1, 1] with noise of one level: 1/127.5."""
    return -log_p / (math.log(2) * math.prod(shape)) + math.log2(127.5)


# -------------------------------------------------------------------------------------- training


class Flow(NamedTuple):
    """A network, the Space of pixels or latents that flows, and the names of its classes."""

    net: nn.Module
    space: Space
    names: list
    column: object  # straight, or a Bent


def make_net(cfg, shape, num_classes):
    """cfg.model for what flows, (C,h,w)."""
    if cfg.model in ("auto", "unet"):
        net = UNet(shape, num_classes, style="ddpm", **cli.taken_by(UNet, cfg))
    else:
        sizes = dit.parse_size(cfg.model)
        net = dit.DiT(shape, num_classes, **sizes, use_checkpoint=cfg.use_checkpoint)
    return net.to(memory_format=torch.channels_last)


def begin(cfg, world):
    """(Flow, data set) of a training, the network with the weights that it starts from."""
    ds = datasets.of(cfg)
    space = Space(ds.shape)
    if cfg.latents:
        ae = load_autoencoder(cfg.latents, world.device, flag="--latents")
        ds = ldm_cfg.encode(replace(cfg, out=Path(cfg.latents).parent), world, ds, ae)
        space = Space(ds.shape, ae, ds.scale)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, space.z_shape, ds.num_classes * cfg.class_cond)
    return Flow(net.to(world.device), space, ds.class_names * cfg.class_cond, straight), ds


def train(cfg, world):
    flow, ds = begin(cfg, world)
    net = flow.net  # its weights are trained, and its running mean draws
    evaluator = Evaluator.of_run(cfg, datasets.of(cfg), world) if cfg.metric_every else None
    run = Run(cfg, world, ds, net=net, optimizer=world.adam(cfg.lr), facts=flow.space.facts)
    flow = flow._replace(net=run.ema)
    draw_x0 = partial(ldm_cfg.draw_latents, run) if cfg.latents else run.images
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    labels = cli.labels_for(seeds, range(net.null), cfg.guidance)
    run.say(f"{ds.name}: {len(ds)} images {ds.shape}, t {cfg.weighting_scheme}")

    for step in run.steps():  # goes on where it stopped; saves between two steps
        for part in run.parts(step):  # this process's share, in --accumulate parts
            x0, y = draw_x0(part)  # (b,C,h,w), (b,)
            y = run.hide(part, y, cfg.label_dropout) if net.null else None
            eps, u = run.noise(part, x0.shape), run.noise(part, (len(x0), 1, 1, 1), "t")  # N(0, 1)
            t = shifted(draw_t(u, *(getattr(cfg, name) for name in OF_T)), cfg.shift)  # (b,1,1,1)
            run.backward(flow_loss(run.model, x0, t, eps, y), t.flatten())
        run.descend()  # clip the gradient, Adam, running means, log
        if evaluator and (run.due(cfg.metric_every) or run.done):
            drawn = partial(draw, flow, cfg, world)
            run.log_metrics(partial(evaluator.score, drawn, cfg.metric_n, net.null))
        if run.due(cfg.sample_every):
            run.save_grid(partial(draw, flow, cfg, world, seeds, labels))
    save_images(flow, cfg, world, seeds, labels, run.folder)
    return flow


# -------------------------------------------------------------------------------------- commands


def draw(flow, cfg, world, seeds, labels, desc="sampling", finish=None):
    """uint8 images (N,H,W,C) of the seeds (N,), the same on every rank: each draws its share.

    finish(z, seeds) makes something else of what flows. With rk45 each is drawn by itself."""
    finish = finish or (lambda z, seeds: to_uint8(flow.space.decode(z), seeds))
    walk = partial(sample, world.for_sampling(flow.net), flow.column, cfg, flow.space.z_shape)

    def images(part, tick):
        with world.autocast():
            way = walk(*(ddim.on(world.device, rows, part) for rows in (seeds, labels)))
            z = end_of(way, tick, seeds[part], cfg.sample_steps, desc)
        return finish(z, seeds[part])

    batch = 1 if cfg.sampler == "rk45" else cfg.batch_size
    return world.in_parts(images, len(seeds), batch, cfg.sample_steps, desc)


def save_images(flow, cfg, world, seeds, labels, folder):
    """samples.png and .npz; of pixels reverse.gif and .png: x_t and x0_hat on their way."""
    images = draw(flow, cfg, world, seeds, labels)
    if not flow.space.ae:
        last = flow.column.last
        if cfg.sampler == "ddpm":
            marks = ddpm_pixel.timestep_pairs(CHAIN.timesteps, cfg.sample_steps)
        else:
            marks = [f"{t:.3g}" for t in times_of(cfg.sample_steps, cfg.shift, last)]
        walk = partial(sample, flow.net, flow.column, cfg, flow.space.shape)
        how = flow.names, math.hypot(1 - last, last), cfg.guidance
        save_drawn(folder, images, labels, walk, seeds, world, marks, *how)
    elif world.is_main:  # reverse.gif would be of latents
        save_samples(folder, images, labels if cfg.guidance != -1 else None, 10)


def load_flow(path, device, ema=None, walk=None):
    """(Flow, its Config) of a checkpoint, EMA weights: of this script, or what edm.load_net takes.

    ema: which decay, of several; walk: of read_network. BadInput for others."""
    if not checkpoints.is_of(path, "flow_matching"):
        how = {"walk": walk, "also": ("flow_matching",)}
        net, theirs, shape, names, column = edm.load_net(path, device, ema, **how)
        shared = {name: getattr(theirs, name) for name in edm.SHARED}
        return Flow(net, Space(shape), names, Bent(column)), Config(**shared)
    state = checkpoints.load_checkpoint(path, "flow_matching")
    cfg = checkpoints.trained_config(Config, state, path)
    space = Space.of_checkpoint(state, path, device)
    names, weights = state["class_names"] * cfg.class_cond, checkpoints.chosen_ema(state, path, ema)
    net = checkpoints.built(lambda: make_net(cfg, space.z_shape, len(names)), weights, path)
    net.null_label = cfg.label_dropout > 0  # whether it has learned to do without a label
    return Flow(net.to(device).eval().requires_grad_(False), space, names, straight), cfg


def opened(cfg, path, world):
    """(Flow, its Config as the command line has it); but for --sample it is one of pixels."""
    walk = checkpoints.given(cfg, checkpoints.WALK)
    if not cfg.sample:
        checkpoints.load_checkpoint(path, "flow_matching", facts=True)
    flow, trained = load_flow(path, world.device, checkpoints.typed_ema(cfg), walk)
    if cfg.sampler == "ddpm" and flow.column is not straight:
        raise cli.BadInput("--sampler ddpm is for networks of this script: leave it out")
    if flow.space.ae and (cfg.clip_denoised or not cfg.sample):
        what = cli.flag("clip_denoised" if cfg.sample else cfg.task())
        raise cli.BadInput(f"{what} is for pixels, within bounds: {path} is of latents")
    return flow, checkpoints.overlaid(trained, cfg, () if cfg.nll else (*SAMPLING, "batch_size"))


def opened_as_chain(cfg, path, world, script):
    """What ddim.opened gives, of a flow: DDIM's steps down a chain are Euler's of the ODE."""
    flow, trained = opened(cfg, path, world)
    chain = replace(CHAIN, **{name: getattr(trained, name) for name in edm.SHARED})
    net = AsChain(flow.net, ddpm_pixel.alpha_bar_of(chain).to(world.device))
    return net, chain, flow.space.shape, flow.names, net.alpha_bar.cpu()


def sample_checkpoint(cfg, world):
    flow, trained = opened(cfg, cfg.sample, world)
    seeds, labels = cli.seeds_and_labels(cfg, flow.net, flow.names, trained.guidance)
    save_images(flow, trained, world, seeds, labels, cli.folder_of(cfg, cfg.sample))


@exact()
def nll(cfg, world):
    """--nll: bits per dimension of held-out images, with noise of one level of their pixels."""
    flow, trained = opened(cfg, cfg.nll, world)

    def bits(x, y, probe):
        log_p = log_likelihood(velocity(flow.net, y=y), x, probe, tolerance=cfg.tolerance)
        return bits_per_dim(log_p, x.shape[1:])

    some = cli.parse_seeds(cfg.seeds, cfg.n) if cfg.seeds else cfg.n
    x0, y = ddim.held_out(cfg, trained, flow.space.shape, flow.names, some)
    flows.save_bits(cli.folder_of(cfg, cfg.nll), world, bits, x0, y, trained.data, cfg.tolerance)


def check(cfg):
    """Raise BadInput for a setting out of its range, and for settings that contradict others."""
    cli.check_run(cfg)
    positive = "sample_steps shift logit_std model_channels channel_mult "
    cli.check_ranges(cfg, positive + "num_res_blocks", "n", "dropout label_dropout")
    cli.check_sampling(cfg)
    if cfg.tolerance < 1e-7:
        raise cli.BadInput(f"--tolerance {cfg.tolerance:g}: expected at least 1e-7, in float32")
    if cfg.latents and cfg.clip_denoised:
        raise cli.BadInput("--clip-denoised: latents have no bounds; leave it out")
    if not cfg.sample and cfg.guidance and not cfg.label_dropout:
        raise cli.BadInput("--guidance needs a network that learns without labels: --label-dropout")
    if not -1 <= cfg.mode_scale <= 2 / (math.pi - 2):
        raise cli.BadInput(f"--mode-scale {cfg.mode_scale:g}: expected a number from -1 to 1.75")
    if cfg.model != "auto" and (cfg.model != "unet" or cfg.latents):
        dit.parse_size(cfg.model)


def settled(cfg, **small):
    """The settings as --smoke, --latents and the task leave them."""
    small |= {"model_channels": 16, "channel_mult": (1, 2), "n": 8, "sample_steps": 4}
    cfg = cli.smoke(cfg, **small, encode_steps="2,4", metric_every=0)
    if cfg.latents:
        names = OF_RUN[: 1 if cfg.smoke else None]
        cfg = checkpoints.as_trained(cfg, names, cfg.latents, ("ldm_cfg", "dit"), OF_DATA)
    if cfg.nll or cfg.encode or cfg.interpolate:  # what the network was trained on
        cfg = replace(cfg, data="", **{"data_root": ""} | checkpoints.given(cfg, ("data_root",)))
    model = ("dit-xs/1" if cfg.latents else "unet") if cfg.model == "auto" else cfg.model
    return replace(cfg, model=model, n=cfg.n or (8 if cfg.encode or cfg.interpolate else 100))


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_flow.yaml")
    cfg = settled(cfg, out="runs/smoke-flow")
    check(cfg)
    codes = {"encode": ddim.reconstruct, "interpolate": ddim.interpolate}
    codes = {name: partial(task, load=opened_as_chain) for name, task in codes.items()}
    if task := ({"sample": sample_checkpoint, "nll": nll} | codes).get(cfg.task()):
        return launch(task, cfg)
    out = cfg.out or f"runs/flow-{Path(cfg.data).stem}" + "-latent" * bool(cfg.latents)
    launch(train, replace(datasets.prepared(cfg), out=out))  # prepared by one process


if __name__ == "__main__":
    cli.entry(main)
