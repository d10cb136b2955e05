"""Chapter 1: denoising diffusion in pixel space.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239): DDPM.
Nichol, Dhariwal, "Improved DDPM", 2021 (arXiv:2102.09672), the cosine schedule: IDDPM.

A fixed Markov chain turns an image x_0 into noise x_T in T small steps (in code t is 1 less),

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              DDPM eq. 4

A network eps_hat(x_t, t) learns to tell which noise was mixed in,

    L_simple = E || eps - eps_hat(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2  eq. 14

and with it the chain is walked backwards, from noise to an image (Algorithm 2).

    python ddpm_pixel.py --data mnist                     train; grids appear in runs/pixel-mnist
    python ddpm_pixel.py --sample runs/pixel-mnist/ckpt.pt --n 100 --classes 3,7
    torchrun --nproc-per-node 8 ddpm_pixel.py --config configs/cifar10_pixel.yaml

The first takes about 15 minutes on two CPU cores (figures: README); `--smoke` takes seconds.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import AveragedModel

import data
import runtime
from kernels import attention, gaussian, group_norm_silu, sampling_table, sampling_update


@dataclass
class Config:
    config: str = ""  # YAML of these settings, under the flags (default configs/DATA_pixel.yaml)
    out: str = ""  # run directory (default runs/pixel-DATA)
    smoke: bool = False  # a few tiny steps, to see that everything works

    data: str = "glyphs"
    """glyphs, mnist, fashion_mnist, cifar10, afhq, imagenet100, or a folder or zip of images"""
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    size: int = 0
    """resize the shorter side to this and crop the centre; 0 keeps the images' own size"""
    flip: bool = False  # flip half of the training images left to right
    classes: str = ""
    """comma-separated names or numbers: train on these classes; with --sample, draw these"""

    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "cosine"] = "cosine"
    """noise schedule: linear in beta (DDPM), or cosine in alpha_bar (IDDPM eq. 17)"""

    width: int = 32  # channels at full resolution
    mult: tuple[int, ...] = (1, 2, 4)
    """channels at each resolution, in units of width; each but the first halves the image"""
    blocks: int = 1  # residual blocks per resolution (DDPM: 2)
    attention: tuple[int, ...] = (7, 8)  # image heights at which blocks attend (DDPM: 16)
    heads: int = 1  # attention heads (DDPM: 1)
    dropout: float = 0.0  # dropout in residual blocks (DDPM: 0.1 on CIFAR-10)
    conditional: bool = True  # give the network the class label, where the data has classes
    label_dropout: float = 0.1
    """how often training hides the label, so that guidance has its unconditional half"""

    steps: int = 3000  # optimizer steps
    batch_size: int = 64  # images per step over all processes
    lr: float = 1e-3  # peak learning rate
    lr_decay: Literal["cosine", "none"] = "cosine"
    """times half a cosine from 1 at step 0 to 0 at --steps, or constant after warm-up (DDPM)"""
    warmup: int = 200  # steps over which the learning rate rises from zero
    clip_grad: float = 1.0  # largest gradient norm
    ema: float = 0.998
    """decay of the running mean of the weights, which is what gets sampled (DDPM: 0.9999)"""
    seed: int = 0  # everything random in training is a function of this and the step

    gpus: int = field(default_factory=runtime.default_gpus)
    """number of GPUs; 0 is the CPU; more than one starts that many processes"""
    resume: str = "auto"  # auto (go on where the run stopped), never, or a checkpoint
    compile: bool = False  # torch.compile the network
    tensorboard: bool = False  # write TensorBoard files too
    log_every: int = 50  # steps between two lines of log.jsonl
    save_every: int = 500  # steps between two checkpoints, a multiple of --log-every
    sample_every: int = 1000  # steps between two sample grids; 0 for none but the last

    sample: str = ""  # do not train: sample from this checkpoint, by its settings where not given
    n: int = 100  # how many samples
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ancestral sampling (DDPM Algorithm 2; of fewer than T steps, IDDPM eq. 19), or chapter 2's"""
    variance: Literal["small", "large"] = "small"
    """of an ancestral step: beta_tilde_t or beta_t (DDPM section 3.2)"""
    sample_steps: int = 100  # how many of the T timesteps the sampler visits, evenly spaced
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm with small variance
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""


# ----------------------------------------------------------------- schedule and forward process


def make_alpha_bar(schedule, T):
    """alpha_bar_t for t = 0..T-1, float64: the share of the image's variance left after step t.

    linear  beta_t from 1e-4 to 0.02 for T = 1000, scaled by 1000/T for others (DDPM section 4)
    cosine  alpha_bar_t = f(t+1) / f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta_t <= 0.999
            (IDDPM eq. 17)
    """
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    else:
        s, t = 0.008, torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def q_sample(x0, t, eps, alpha_bar):
    """x_t for images x0 (B,C,H,W), timesteps t (B,) and noise eps (B,C,H,W): DDPM eq. 4."""
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B,1,1,1)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


# -------------------------------------------------------------------------------------- network


def timestep_embedding(t, width):
    """(B,) timesteps -> (B, width) sines and cosines, frequencies 1 ... 10000^(2/width - 1)."""
    half = torch.arange(width // 2, device=t.device) / (width // 2)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * half)  # (B, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm and, with silu, the SiLU after it, in one operation."""

    def __init__(self, channels, silu=True):
        # 32 groups, or fewer: a group of one channel would erase the embedding added to it.
        super().__init__(max(1, math.gcd(128, channels) // 4), channels)
        self.silu = silu

    def forward(self, x):
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.silu
        )


def zero(layer):
    """Start a layer at zero: the residual branch that it ends at first adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.drop = Norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(self.norm1(x))  # (B,c_out,H,W)
        h = h + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(self.drop(self.norm2(h)))


class SelfAttention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, Norm(channels, silu=False)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x):
        h, w = x.shape[2:]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")  # a view of channels_last memory
        qkv = rearrange(self.qkv(tokens), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        out = rearrange(attention(*qkv), "b h n d -> b n (h d)")  # (B,HW,C)
        return x + rearrange(self.proj(out), "b (h w) c -> b c h w", h=h, w=w)


class UNet(nn.Module):
    """The U-Net of DDPM appendix B: net(x, t, y) -> eps_hat, of the shape of x.

    x (B,C,H,W) in [-1,1] plus noise, t (B,) int timesteps, y (B,) int labels or None;
    the label num_classes means "no label". H and W must halve len(mult)-1 times.
    """

    def __init__(self, shape, num_classes, width, mult, blocks, attention_at, heads, dropout):
        super().__init__()
        channels, height, _ = shape
        self.width, c_emb = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(num_classes + 1, c_emb) if num_classes else None

        def layer(c_in, c_out, height):
            parts = [ResBlock(c_in, c_out, c_emb, dropout)]
            return nn.ModuleList(parts + [SelfAttention(c_out, heads)] * (height in attention_at))

        c, skips = width, [width]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(layer(c, width * m, height))
                c = width * m
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                height //= 2
                skips.append(c)
        self.middle = nn.ModuleList(
            [*layer(c, c, None), SelfAttention(c, heads), ResBlock(c, c, c_emb, dropout)]
        )
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(layer(c + skips.pop(), width * m, height))
                c = width * m
            if level > 0:
                self.up.append(nn.ModuleList([nn.Conv2d(c, c, 3, padding=1)]))
                height *= 2
        self.norm_out, self.conv_out = Norm(c), zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x, t, y=None):
        emb = self.time(timestep_embedding(t, self.width))  # (B,4*width)
        if self.label is not None:
            null = torch.full_like(t, self.label.num_embeddings - 1)
            emb = emb + self.label(null if y is None else y)
        emb = F.silu(emb)

        def run(parts, h):
            for part in parts:
                h = part(h, emb) if isinstance(part, ResBlock) else part(h)
            return h

        h = self.conv_in(x)  # (B,width,H,W)
        skips = [h]
        for parts in self.down:
            h = run(parts, h)
            skips.append(h)
        h = run(self.middle, h)  # (B,width*mult[-1],H/2^k,W/2^k)
        for parts in self.up:
            if isinstance(parts[0], ResBlock):
                h = run(parts, torch.cat([h, skips.pop()], dim=1))
            else:
                h = run(parts, F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(self.norm_out(h))


def make_net(cfg, shape, num_classes):
    """The network for images of `shape` (C,H,W); BadInput for sizes that it cannot halve."""
    factor = 2 ** (len(cfg.mult) - 1)
    if shape[1] % factor or shape[2] % factor:
        near = max(factor, round(min(shape[1:]) / factor) * factor)
        raise runtime.BadInput(
            f"images of {shape[1]}x{shape[2]} cannot be halved {len(cfg.mult) - 1} times; "
            f"sizes must be multiples of {factor}: type --size {near}"
        )
    net = UNet(
        shape, num_classes, cfg.width, cfg.mult, cfg.blocks,
        cfg.attention, cfg.heads, cfg.dropout,
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------- loss


def simple_loss(net, x0, y, t, eps, alpha_bar):
    """L_simple of each image, (B,): DDPM eq. 14, the mean over its pixels."""
    eps_hat = net(q_sample(x0, t, eps, alpha_bar), t, y)
    return (eps - eps_hat.float()).square().mean(dim=(1, 2, 3))


# ------------------------------------------------------------------------------------- sampling


def timestep_pairs(T, steps):
    """[(t, t_prev), ...]: `steps` evenly spaced timesteps down from T-1, the last t_prev is -1."""
    if steps > T:
        raise runtime.BadInput(f"--sample-steps {steps} exceeds the chain's --timesteps {T}")
    ts = torch.linspace(T - 1, 0, steps).round().long().unique().flip(0).tolist()
    return list(zip(ts, [*ts[1:], -1], strict=True))


@torch.inference_mode()
def sampler(
    net, alpha_bar, pairs, shape, seeds, y=None, *, eta=None, variance="small", guidance=0.0
):
    """Walk from noise to images; yields (t_prev, x, x0_hat) after every step (DDPM Algorithm 2).

        x0_hat = clamp((x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t), -1, 1)      eq. 15
        x_prev = A x0_hat + B x_t + sigma z         mean and variance of q(x_prev | x_t, x0_hat),
        A = sqrt(alpha_bar_prev) beta / (1 - alpha_bar_t),                                    eq. 7
        B = sqrt(1 - beta) (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    where beta = 1 - alpha_bar_t / alpha_bar_prev (IDDPM eq. 19). Without the clamp it is eq. 11.
    seeds (B,) int64, one per image: the image is a function of its seed and label alone.
    y (B,) labels or None; eta None is the ancestral step, a number is DDIM's.
    With guidance w != 0 the conditional and unconditional passes are one batch of 2B.
    """
    device, null = seeds.device, getattr(net.label, "num_embeddings", 1) - 1
    table = sampling_table(alpha_bar, pairs, eta=eta, variance=variance)
    x = gaussian((len(seeds), *shape), seeds, -1, device).to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        t = torch.full((len(seeds),), t, device=device)
        if y is None or guidance == 0:
            out, out_uncond = net(x, t, y), None
        else:
            both = torch.cat([y, torch.full_like(y, null)])
            out, out_uncond = net(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        x, x0_hat = sampling_update(
            x, out, table, step, out_uncond=out_uncond, guidance=guidance, seeds=seeds
        )
        yield t_prev, x, x0_hat


def draw(net, cfg, world, shape, labels, seeds, desc="sampling"):
    """uint8 images (N,H,W,C), the same on every rank: each draws its share of the N seeds.

    seeds (N,) int64; labels (N,) int64 or None; shape (C,H,W).
    """
    alpha_bar = make_alpha_bar(cfg.schedule, cfg.timesteps)
    pairs = timestep_pairs(cfg.timesteps, cfg.sample_steps)
    parts = torch.arange(len(seeds))[world.share(len(seeds))].split(cfg.batch_size)
    images = [torch.empty(0, *shape[1:], shape[0], dtype=torch.uint8)]
    with world.progress(len(parts) * len(pairs), desc=desc) as bar, world.autocast():
        for part in parts:
            y = None if labels is None else labels[part].to(world.device)
            for _, x, _ in sampler(  # noqa: B007
                net, alpha_bar, pairs, shape, seeds[part].to(world.device), y,
                eta=cfg.eta if cfg.sampler == "ddim" else None,
                variance=cfg.variance, guidance=cfg.guidance,
            ):  # fmt: skip
                bar.update()
            images.append(runtime.to_uint8(x))
    return world.collect(torch.cat(images).to(world.device), len(seeds)).cpu()


# ------------------------------------------------------------------------------------- training


def load_data(cfg):
    classes = runtime.split_list(cfg.classes)
    return data.load(cfg.data, cfg.data_root, size=cfg.size or None, classes=classes)


def train(cfg, world):
    ds = load_data(cfg)
    shape, k = (ds.channels, ds.height, ds.width), ds.num_classes * cfg.conditional
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, shape, k).to(world.device)
    ema = AveragedModel(net, multi_avg_fn=runtime.ema_update(cfg.ema))
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    run = runtime.Run(
        cfg.out, "ddpm_pixel", asdict(cfg), world, made_of={"data_key": ds.key},
        resume=cfg.resume, tensorboard=cfg.tensorboard,
    )  # fmt: skip
    state, start = run.restore(), 0
    if state:
        net.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        ema.n_averaged.fill_(start)
    model = world.wrap(torch.compile(net) if cfg.compile else net)
    alpha_bar = make_alpha_bar(cfg.schedule, cfg.timesteps).to(world.device)
    mine, meter = world.share(cfg.batch_size), runtime.LossMeter(world.device)
    seeds = runtime.parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, range(k), cfg.guidance)
    if world.is_main:
        size = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{ds.name}: {len(ds)} images {shape}, {k} classes; network {size:.2f} M parameters")

    bar = world.progress(cfg.steps, start, "training")
    for step in range(start, cfg.steps):
        # All that is random is drawn for the global batch from (seed, step), then shared out.
        rng, batch = np.random.default_rng([cfg.seed, step]), cfg.batch_size
        t = torch.from_numpy(rng.integers(cfg.timesteps, size=batch))[mine].to(world.device)
        hide = torch.from_numpy(rng.random(batch) < cfg.label_dropout)[mine]
        noise_seeds = torch.from_numpy(rng.integers(2**62, size=batch))[mine].to(world.device)
        torch.manual_seed(int(rng.integers(2**31)) + world.rank)  # what dropout draws from

        idx = data.indices(len(ds), batch, cfg.seed, step, world.rank, world.size)
        flips = data.flips(batch, cfg.seed, step, world.rank, world.size) if cfg.flip else None
        x0, y = data.batch(ds, idx, flip=flips)  # (B,C,H,W), (B,)
        y = torch.where(hide, k, y).to(world.device) if k else None
        x0 = x0.to(world.device, non_blocking=True)
        eps = gaussian(x0.shape, noise_seeds, step, world.device)

        lr = runtime.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with world.autocast():
            losses = simple_loss(model, x0, y, t, eps, alpha_bar)  # (B,)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(net)

        meter.add(step, losses, t * 4 // cfg.timesteps)
        step, last = step + 1, step + 1 == cfg.steps
        bar.update()
        if step % cfg.log_every == 0 or last:
            values = meter.read(world, run)
            run.log(step, **values, lr=lr, images_per_s=run.rate((step - start) * batch))
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if step % cfg.save_every == 0 or last:
            run.save(
                step, model=net.state_dict(), ema=ema.module.state_dict(),
                optimizer=optimizer.state_dict(), shape=list(shape),
                class_names=list(ds.class_names),
            )  # fmt: skip
        if cfg.sample_every and step % cfg.sample_every == 0 and not last:
            images = draw(ema.module, cfg, world, shape, labels, seeds)
            if world.is_main:
                runtime.save_grid(images[:100], run.folder / f"samples-{step:06d}.png", 10)
                runtime.plot_loss(run)
    bar.close()
    images = draw(ema.module, cfg, world, shape, labels, seeds)
    if world.is_main:
        runtime.plot_loss(run)
        runtime.save_samples(run.folder, images, labels, 10)
        print(f"samples: {run.folder / 'samples.png'}")


# ----------------------------------------------------------------------------------------- main


def labels_for(seeds, chosen, guidance=0.0):
    """The label of each sample, a function of its seed: chosen[seed mod len(chosen)], or None."""
    if guidance and not chosen:
        raise runtime.BadInput("this network knows no labels; leave out --guidance")
    return torch.tensor(chosen)[seeds % len(chosen)] if chosen else None


def load_net(path, device):
    """(network with the EMA weights, its Config, image shape, class names) from a checkpoint."""
    state = runtime.load_checkpoint(path, "ddpm_pixel")
    known = {f.name for f in fields(Config)}
    cfg = Config(**{k: v for k, v in state["config"].items() if k in known})
    net = make_net(cfg, state["shape"], len(state["class_names"]) * cfg.conditional)
    net.load_state_dict(state["ema"])
    return net.to(device).eval(), cfg, state["shape"], state["class_names"]


SAMPLING = ("sampler", "variance", "sample_steps", "eta", "guidance", "batch_size")


def sample(cfg, world):
    net, trained, shape, names = load_net(cfg.sample, world.device)
    trained = replace(trained, **{name: getattr(cfg, name) for name in SAMPLING})
    chosen = runtime.parse_classes(cfg.classes, names if trained.conditional else ())
    seeds = runtime.parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, chosen, trained.guidance)
    images = draw(net, trained, world, shape, labels, seeds)
    if world.is_main:
        folder = Path(cfg.out or Path(cfg.sample).parent)
        runtime.save_samples(folder, images, labels, 10)
        print(f"samples: {folder / 'samples.png'}")


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    runtime.check_run(cfg)
    runtime.check_positive(cfg, "timesteps", "width", "mult", "blocks", "heads", "sample_steps")
    runtime.check_fraction(cfg, "dropout", "label_dropout", "ema", "eta")
    if cfg.width % 2 or any(cfg.width * m % cfg.heads for m in cfg.mult):
        raise runtime.BadInput(
            f"--width {cfg.width} must be even, and times --mult a multiple of --heads {cfg.heads}"
        )
    if not cfg.sample:  # else the checkpoint's own --timesteps decide
        timestep_pairs(cfg.timesteps, cfg.sample_steps)


def main():
    preset = str(Path(__file__).parent / "configs/{data}_pixel.yaml")
    cfg = runtime.parse(Config, __doc__, preset=preset)
    if cfg.smoke:
        cfg = replace(
            cfg, steps=4, batch_size=8, width=16, n=8, sample_steps=4, warmup=1, log_every=1,
            save_every=2, sample_every=2, resume="never", out=cfg.out or "runs/smoke-pixel",
        )  # fmt: skip
    check(cfg)
    if cfg.sample:
        runtime.launch(sample, runtime.as_trained(cfg, SAMPLING, "ddpm_pixel"))
    else:
        load_data(cfg)  # prepared once, before there are several processes
        runtime.launch(train, replace(cfg, out=cfg.out or f"runs/pixel-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    runtime.entry(main)
