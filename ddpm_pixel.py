"""Chapter 1: denoising diffusion in pixel space.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239).

A fixed Markov chain turns an image x_0 into noise x_T in T small steps (in code t runs from 0),

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                      eq. 4

A network eps_hat(x_t, t) learns which noise was mixed in (Algorithm 1),

    L_simple = E || eps - eps_hat(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2  eq. 14

and with it the chain is walked backwards, from noise to an image (Algorithm 2).

    python ddpm_pixel.py --data mnist          half an hour of one CPU core; see runs/pixel-mnist
    python ddpm_pixel.py --sample runs/pixel-mnist/ckpt.pt --n 100 --classes 3,7      one minute
    torchrun --nproc-per-node 8 ddpm_pixel.py --config configs/cifar10_ddpm.yaml      8 GPUs

Beyond the paper: other schedules, targets and losses; labels and guidance (arXiv:2207.12598). From
noised test images Algorithm 2 is walked by ddim.py --sample CKPT --reverse-from data --eta 1.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.pictures import save_drawn
from runtime.processes import launch
from runtime.run import Run

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from image_data import datasets
from kernels import Row, attention, gaussian, group_norm_silu, sampling_update
from networks.sizes import check_alpha_bar, check_unet, groups_for


@dataclass
class Config(cli.ScoredConfig):
    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "cosine", "sigmoid", "sigmoid-beta"] = "linear"  # DDPM: linear
    alpha_min: float = 0.001  # smallest alpha_t: no step erases all that is left of the image
    beta_start: float = 0.0  # first beta_t of linear and sigmoid-beta; 0: 1e-4 (DDPM) times 1000/T
    beta_end: float = 0.0  # their last; 0: 0.02 times 1000/T
    trained_betas: tuple[float, ...] = ()  # beta_t of each step, instead of the five above
    prediction: Literal["eps", "x0", "v"] = "eps"  # what the network gives: noise, image or v
    loss: Literal["l2", "l1", "huber"] = "l2"  # distance of prediction and target

    model_channels: int = 32  # channels at full resolution
    channel_mult: tuple[int, ...] = (1, 2, 4)  # times model_channels: channels at each resolution
    num_res_blocks: int = 1  # residual blocks per resolution (DDPM: 2)
    attention_resolutions: tuple[int, ...] = (7, 8)  # heights at which blocks attend (DDPM: 16)
    num_heads: int = 1  # attention heads
    norm_groups: int = 0  # groups of the norms (DDPM: 32); 0 chooses fewer for a narrow network
    dropout: float = 0.0  # dropout in residual blocks (DDPM: 0.1 on CIFAR-10)
    use_checkpoint: bool = False  # compute activations twice instead of keeping them
    class_cond: bool = True  # give the network the class label, where the data has classes
    label_dropout: float = 0.1  # how often training replaces it by "no label", for guidance

    sample: str = ""
    """do not train: sample this checkpoint by its settings, or a published UNet2DModel like it"""
    n: int = 100  # how many samples
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    variance: Literal["small", "large"] = "small"  # of a step: beta_tilde_t or beta_t (section 3.2)
    clip_denoised: bool = True  # keep x0_hat in [-1, 1], as DDPM's code does (not its eq. 15)
    sample_steps: int = 100  # how many of the T timesteps the sampler visits
    spacing: Literal["linear", "leading", "trailing"] = "linear"  # where: see timestep_pairs
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""

    SAMPLING = cli.names("variance clip_denoised sample_steps spacing guidance n seeds")
    USES = {"sample": cli.DRAWS | SAMPLING | checkpoints.UNSAID}
    FREE = cli.ScoredConfig.FREE | SAMPLING | cli.names("use_checkpoint sample")
    NEEDS = cli.ScoredConfig.NEEDS | dict.fromkeys(checkpoints.NOISE, "!trained_betas")
    NEEDS |= dict.fromkeys(("beta_start", "beta_end"), "schedule=linear,sigmoid-beta")

    def __post_init__(self):
        if (T := len(self.trained_betas)) and self.timesteps not in (1000, T):
            raise cli.BadInput(f"--timesteps {self.timesteps} and {T} --trained-betas: type one")
        self.timesteps = T or self.timesteps


# -------------------------------------------------------------------------- the forward process


def make_alpha_bar(schedule, T, alpha_min=0.001, beta_start=0.0, beta_end=0.0):
    """alpha_bar_t = alpha_0 ... alpha_t, alpha_t = 1 - beta_t, for t = 0..T-1: float64 (T,).

    linear   beta_t from 1e-4 to 0.02 at T = 1000, times 1000/T for others (section 4)
    sigmoid-beta  between the same ends by S(u) = 1/(1 + e^-u), u from -6 to 6
    cosine   f(t+1) / f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008 (2102.09672, eq. 17)
    sigmoid  the same, f(t) = S(3) - S(6t/T - 3) (2212.11972, tau = 1)
    alpha_t stays above alpha_min, so that no last step erases all that is left.
    """
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    if schedule == "sigmoid":
        f = torch.sigmoid(t.new_tensor(3.0)) - torch.sigmoid(6 * t - 3)
    alpha = f[1:] / f[:-1]
    if schedule in ("linear", "sigmoid-beta"):
        first, last = beta_start or 0.1 / T, beta_end or 20 / T
        rise = torch.linspace(0, 1, T, dtype=torch.float64)
        rise = rise if schedule == "linear" else torch.sigmoid(12 * rise - 6)
        alpha = 1 - (first + (last - first) * rise)
    return alpha.clamp(min=alpha_min).cumprod(0)


def alpha_bar_of(cfg):
    """alpha_bar_t, float64 (T,), of the settings."""
    if getattr(cfg, "trained_betas", ()):
        return (1 - torch.tensor(cfg.trained_betas, dtype=torch.float64)).cumprod(0)
    return make_alpha_bar(T=cfg.timesteps, **cli.taken_by(make_alpha_bar, cfg))


def q_sample(x0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) for images x0 and noise eps (B,C,H,W), timesteps t (B,): eq. 4."""
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B,1,1,1)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


# --------------------------------------------------------------------- the network: appendix B


def timestep_embedding(t, channels):
    """(B,) timesteps -> (B,channels) sines, then cosines, of t times 1, ..., 1/10000.

    Vaswani et al. 2017, section 3.5, in float32 and the published order of operations.
    """
    i = torch.arange(half := channels // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / max(half - 1, 1))
    angles = t[:, None].float() * frequencies  # (B,channels/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B,channels)


def norm_silu(norm, x, silu=True):
    """GroupNorm and, unless silu is False, SiLU in one operation; x (B,C,H,W)."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu)


def zero(layer):
    """Start a layer at zero: the residual branch that it ends at first adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x (B,c_in,H,W), emb (B,c_emb) after its SiLU -> (B,c_out,H,W)."""

    def __init__(self, c_in, c_out, c_emb, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.drop = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        # A convolution's output is needed by nothing else, its own gradient included: add in place.
        shift = self.emb(emb)[:, :, None, None]  # (B,c_out,1,1)
        h = self.conv1(norm_silu(self.norm1, x)).add_(shift)  # (B,c_out,H,W)
        return self.conv2(self.drop(norm_silu(self.norm2, h))).add_(self.skip(x))


class SelfAttention(nn.Module):
    """All positions of (B,C,H,W) attend to each other; q, k, v are (B,heads,HW,C/heads)."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        qkv = self.qkv(norm_silu(self.norm, x, silu=False))  # (B,3C,H,W)
        q, k, v = rearrange(qkv, "b (k n d) h w -> k b n (h w) d", k=3, n=self.heads)
        out = rearrange(attention(q, k, v), "b n (h w) d -> b (n d) h w", h=x.shape[2])  # (B,C,H,W)
        return self.proj(out).add_(x)


class Downsample(nn.Conv2d):
    """(B,C,H,W) -> (B,C,H/2,W/2): a convolution of stride 2, padded below and to the right."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B,C,H,W) -> (B,C,2H,2W): every pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Layer(nn.Sequential):
    """Parts in a row; only residual blocks see the embedding. skip is joined to the channels."""

    def forward(self, h, emb, skip=None):
        if skip is not None:
            h = torch.cat([h, skip], dim=1)  # (B,C+C_skip,H,W)
        for part in self:
            h = part(h, emb) if isinstance(part, ResBlock) else part(h)
        return h


class UNet(nn.Module):
    """net(x, t, y=None) -> (B,C,H,W): the noise in x, or what else it learned to predict.

    x (B,C,H,W) in [-1,1] plus noise, t (B,) int timesteps from 0, y (B,) int labels or None; the
    label net.null, which is num_classes, means "no label", and so does None. On the way down the
    image is halved from level to level; every output is kept, and joined to the input of one layer
    on the way up. shape is (C,H,W), cfg a Config.
    """

    def __init__(self, shape, num_classes, cfg):
        super().__init__()
        (channels, height, _), c_emb = shape, 4 * cfg.model_channels
        levels = [cfg.model_channels * m for m in cfg.channel_mult]
        groups = groups_for(cfg.model_channels, levels, cfg.norm_groups)
        check_unet(shape, cfg.model_channels, levels, cfg.num_heads, 0, cfg.attention_resolutions)
        self.cfg, self.null = cfg, num_classes
        first, second = nn.Linear(cfg.model_channels, c_emb), nn.Linear(c_emb, c_emb)
        self.time = nn.Sequential(first, nn.SiLU(), second)
        self.label = nn.Embedding(num_classes + 1, c_emb) if num_classes else None

        def block(c_in, c_out):
            return ResBlock(c_in, c_out, c_emb, groups, cfg.dropout)

        def attend(c):
            here = height in cfg.attention_resolutions
            return [SelfAttention(c, cfg.num_heads, groups)] if here else []

        c, skips = levels[0], [levels[0]]
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, c_out in enumerate(levels):
            for _ in range(cfg.num_res_blocks):
                self.down.append(Layer(block(c, c_out), *attend(c_out)))
                c = c_out
                skips.append(c)
            if level < len(levels) - 1:
                self.down.append(Layer(Downsample(c)))
                height //= 2
                skips.append(c)
        self.middle = Layer(block(c, c), SelfAttention(c, cfg.num_heads, groups), block(c, c))
        for level, c_out in reversed(list(enumerate(levels))):
            for i in range(cfg.num_res_blocks + 1):
                parts = [block(c + skips.pop(), c_out), *attend(c_out)]
                if level > 0 and i == cfg.num_res_blocks:
                    parts.append(Upsample(c_out))
                    height *= 2
                self.up.append(Layer(*parts))
                c = c_out
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x, t, y=None):
        emb = self.time(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        if self.label is not None:
            if y is None:
                y = torch.full_like(t, self.null, dtype=torch.int64)
            emb = emb + self.label(y)
        emb = F.silu(emb)  # every residual block begins with it

        def run(layer, *inputs):
            if self.cfg.use_checkpoint and self.training and torch.is_grad_enabled():
                return checkpoint(layer, *inputs, use_reentrant=False)
            return layer(*inputs)

        h = self.conv_in(x)  # (B,C0,H,W)
        skips = [h]
        for layer in self.down:
            h = run(layer, h, emb)
            skips.append(h)
        h = run(self.middle, h, emb)  # (B,C_last,H/2^k,W/2^k), k = len(channel_mult) - 1
        for layer in self.up:
            h = run(layer, h, emb, skips.pop())
        return self.conv_out(norm_silu(self.norm_out, h))  # (B,C,H,W)


# ------------------------------------------------------------------------ the loss: Algorithm 1


def target_of(prediction, x0, eps, a):
    """What the network should give for x0, eps (B,C,H,W) and a = alpha_bar_t (B,), like x0.

    eps, x0, or v = sqrt(a) eps - sqrt(1-a) x0 (Salimans, Ho 2022, arXiv:2202.00512): the noise
    at a = 1, minus the image at a = 0.
    """
    a = a.view(-1, 1, 1, 1)
    v = a.sqrt().to(x0.dtype) * eps - (1 - a).sqrt().to(x0.dtype) * x0
    return {"eps": eps, "x0": x0, "v": v}[prediction]


def simple_loss(net, x0, t, eps, alpha_bar, y=None, prediction="eps", loss="l2"):
    """L_simple of each image, (B,), the mean over its pixels: eq. 14."""
    out = net(q_sample(x0, t, eps, alpha_bar), t, y)  # (B,C,H,W)
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[loss]
    target = target_of(prediction, x0, eps, alpha_bar[t])
    return distance(out, target, reduction="none").mean(dim=(1, 2, 3))


# ------------------------------------------------------------------------ sampling: Algorithm 2


def x0_coefficients(a, prediction="eps"):
    """(p, q): x0_hat = p x_t - q out at alpha_bar_t = a. Of eps it is eq. 15."""
    if prediction == "eps":
        return 1 / math.sqrt(a), math.sqrt((1 - a) / a)
    return (math.sqrt(a), math.sqrt(1 - a)) if prediction == "v" else (0.0, -1.0)


def ancestral_row(a, a_prev, prediction="eps", variance="small"):
    """The step from alpha_bar_t = a to a_prev: x_{t-1} = A x0_hat + B x_t + S z, eq. 7.

    Where x0_hat is not clipped, this is line 4 of Algorithm 2 (eq. 11). beta spans the whole step.
    """
    p, q = x0_coefficients(a, prediction)
    beta = 1 - a / a_prev
    A = math.sqrt(a_prev) * beta / (1 - a)  # the mean of q(x_{t-1} | x_t, x0_hat): eq. 7
    B = math.sqrt(a / a_prev) * (1 - a_prev) / (1 - a)
    beta_tilde = (1 - a_prev) / (1 - a) * beta  # its variance: eq. 7
    sigma = math.sqrt(beta_tilde if variance == "small" else beta)  # section 3.2
    return Row(p, q, A, B, S=sigma if a_prev < 1 else 0.0)  # the last step gives x0_hat itself


def guided_pass(net, x, t, y, w):
    """(out, out_uncond), like x; the step takes (1+w) out - w out_uncond (2207.12598, eq. 6)."""
    t = torch.full((len(x),), t, device=x.device)  # (B,)
    if y is None or w == 0:
        return net(x, t, y), None
    none = torch.full_like(y, net.null)
    if w == -1:
        return net(x, t, none), None
    return net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, none])).chunk(2)


def timestep_pairs(T, steps, spacing="linear"):
    """[(t, t_prev), ...] down the chain, the last t_prev is -1: `steps` of its T timesteps.

    linear    both ends included; one step is T-1 alone
    leading   multiples of T // steps, from 0 up
    trailing  T / steps apart, from T-1 down (Lin et al. 2024, arXiv:2305.08891, table 2)
    BadInput where steps exceed T.
    """
    if steps > T:
        raise cli.BadInput(f"--sample-steps {steps} exceeds the chain's {T} timesteps")
    linear = np.linspace(0, T - 1, steps).round()[::-1] if steps > 1 else np.array([T - 1])
    leading = np.arange(steps)[::-1] * (T // steps)
    trailing = np.arange(T, 0, -T / steps)[:steps].round() - 1
    ts = dict(linear=linear, leading=leading, trailing=trailing)[spacing].astype(int).tolist()
    return list(zip(ts, [*ts[1:], -1], strict=True))


@torch.no_grad()
def sample(net, alpha_bar, pairs, shape, seeds, y=None, w=0.0, make_row=ancestral_row, clip=True):
    """Walk from noise to images of the seeds (B,); yields x_{t-1} and x0_hat, (B,C,H,W) each.

    An image is a function of its seed and label y alone. make_row(a, a_prev) makes a step; clip
    keeps x0_hat in [-1, 1]. alpha_bar (T,) lies on the CPU: reading it never waits for a GPU.
    """
    x = gaussian((len(seeds), *shape), seeds, -1, seeds.device)  # x_T (B,C,H,W), as step -1
    x = x.to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        out, out_uncond = guided_pass(net, x, t, y, w)
        row = make_row(alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0)
        how = {"out_uncond": out_uncond, "guidance": 0.0 if out_uncond is None else w}
        x, x0_hat = sampling_update(x, out, row, step=step, seeds=seeds, clip=clip, **how)
        yield x, x0_hat


def trajectory(net, cfg, shape, seeds, y=None):
    """sample() as the settings say."""
    pairs = timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.spacing)
    make_row = partial(ancestral_row, prediction=cfg.prediction, variance=cfg.variance)
    alpha_bar = alpha_bar_of(cfg)
    return sample(net, alpha_bar, pairs, shape, seeds, y, cfg.guidance, make_row, cfg.clip_denoised)


def draw(net, cfg, world, shape, seeds, labels, desc="sampling"):
    """uint8 images (N,H,W,C) of the seeds (N,), the same on every rank: each draws its share."""
    walk = partial(trajectory, world.for_sampling(net), cfg, shape)
    return world.draw(walk, seeds, labels, cfg.batch_size, cfg.sample_steps, desc)


# ------------------------------------------------------------------------ training: Algorithm 1


def train(cfg, world):
    ds = datasets.of(cfg)
    alpha_bar = alpha_bar_of(cfg).to(world.device)
    torch.manual_seed(cfg.seed)
    net = UNet(ds.shape, ds.num_classes * cfg.class_cond, cfg)
    net = net.to(world.device, memory_format=torch.channels_last)
    if cfg.metric_every:
        from eval_fid import Evaluator

        evaluator = Evaluator.of_run(cfg, ds, world)
    run = Run(cfg, world, ds, net=net, optimizer=world.adam(cfg.lr))
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    labels = cli.labels_for(seeds, range(net.null), cfg.guidance)
    if world.is_main:
        print(f"{ds.name}: {len(ds)} images {ds.shape}, {net.null} classes")
        noise = "own" if cfg.trained_betas else cfg.schedule
        print(f"{noise} schedule, T = {cfg.timesteps}; step {run.first} of {cfg.steps}")
        save_forward(ds, alpha_bar.cpu(), run.folder / "forward")
    run.say(f"U-Net predicts {cfg.prediction}, loss {cfg.loss}")

    for step in run.steps():  # goes on where it stopped; saves between two steps
        for part in run.parts(step):  # this process's share, in --accumulate parts
            x0, y = run.images(part)  # (b,C,H,W), (b,); Algorithm 1, lines 2 to 5
            y = run.hide(part, y, cfg.label_dropout) if cfg.class_cond else None
            t, eps = run.uniform(part, cfg.timesteps), run.noise(part, x0.shape)
            losses = simple_loss(run.model, x0, t, eps, alpha_bar, y, cfg.prediction, cfg.loss)
            run.backward(losses, t / cfg.timesteps)  # the log splits losses by quarter of t / T
        run.descend()  # clip the gradient, Adam, running means, log
        if cfg.metric_every and (run.due(cfg.metric_every) or run.done):
            drawn = partial(draw, run.ema, cfg, world, ds.shape)
            run.log_metrics(partial(evaluator.score, drawn, cfg.metric_n, net.null))
        if run.due(cfg.sample_every):
            run.save_grid(partial(draw, run.ema, cfg, world, ds.shape, seeds, labels))
    save_images(run.ema, cfg, world, ds.shape, seeds, labels, run.folder, ds.class_names)


def save_forward(ds, alpha_bar, path):
    """PATH.gif and .png: an image of each class on its way to x_T."""
    from runtime.films import save_noised

    save_noised(path, ds, partial(q_sample, alpha_bar=alpha_bar), len(alpha_bar))


def save_images(net, cfg, world, shape, seeds, labels, folder, names=()):
    """samples.png and .npz; reverse.gif and .png: x_t and x0_hat of an image of each class."""
    images = draw(net, cfg, world, shape, seeds, labels)
    pairs = timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.spacing)
    walk = partial(trajectory, net, cfg, shape)
    save_drawn(folder, images, labels, walk, seeds, world, pairs, names, w=cfg.guidance)


# ----------------------------------------------------------------------------------- commands


def load_net(path, device, ema=None, **how):
    """(network, its Config, shape (C,H,W), class names, alpha_bar) of a checkpoint, EMA weights.
    ema: which decay, of several; how: of read_network. BadInput for files of other networks."""
    from networks.published.unet import read_network

    state = read_network(path, "ddpm_pixel", **how)
    net, cfg, *rest = checkpoints.restored(Config, UNet, state, path, device, ema)
    return net, cfg, *rest, alpha_bar_of(cfg)


def sample_checkpoint(cfg, world):
    asked = checkpoints.asked(cfg, "ddpm_pixel")
    net, trained, shape, names, _ = load_net(cfg.sample, world.device, **asked)
    trained = checkpoints.overlaid(trained, cfg, cfg.SAMPLING | {"batch_size"})
    seeds, labels = cli.seeds_and_labels(cfg, net, names, trained.guidance)
    save_images(net, trained, world, shape, seeds, labels, cli.folder_of(cfg, cfg.sample), names)


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    cli.check_run(cfg)
    positive = "timesteps model_channels channel_mult num_res_blocks num_heads sample_steps n"
    parts = "dropout label_dropout alpha_min trained_betas beta_start beta_end"
    cli.check_ranges(cfg, positive, "norm_groups", parts)
    cli.check_sampling(cfg)
    check_alpha_bar(alpha_bar_of(cfg), vars(cfg))


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_pixel.yaml")
    small = {"model_channels": 16, "num_heads": 1, "norm_groups": 0, "n": 8, "sample_steps": 4}
    cfg = cli.smoke(cfg, **small, metric_every=0, out="runs/smoke-pixel")
    check(cfg)
    if cfg.sample:
        launch(sample_checkpoint, cfg)
    else:
        cfg = datasets.prepared(cfg)  # by one process
        launch(train, replace(cfg, out=cfg.out or f"runs/pixel-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    cli.entry(main)
