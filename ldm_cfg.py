"""Chapter 3: latent diffusion with classifier-free guidance.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022
(arXiv:2112.10752): LDM. Ho, Salimans, "Classifier-Free Diffusion Guidance" (arXiv:2207.12598): CFG.

Most of an image's bits are detail that no one asks a generator to imagine. So an autoencoder first
learns to pack an image into a small latent z = E(x) with x = D(z) nearly, and diffusion then runs
on z, where a step costs a fraction (LDM section 3). The network sees the class label y, and now and
then the label "none"; a sample is steered by exaggerating the difference,

    eps_hat = (1 + w) eps_hat(z_t, y) - w eps_hat(z_t, none)                           CFG eq. 6

(At a given z_t, v is affine in eps and the weights sum to 1: the same holds for v.)

    python ldm_cfg.py                                     digits on two CPU cores, three minutes
    python ldm_cfg.py --data imagenet100 --gpus 8         ImageNet-100 at 128x128
    python ldm_cfg.py --sample runs/ldm-glyphs/ckpt.pt --n 100 --guidance 3 --classes 3,7

Stages: data, autoencoder, latents, diffusion, samples and evaluation; each goes on where it stopped
and is skipped when done.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.finite import end_of
from runtime.pictures import save_samples, to_uint8
from runtime.processes import exact, is_first_process, launch
from runtime.run import Run

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoencoder
import ddpm_pixel
from ddim import ddim_row
from ddpm_pixel import Layer, ResBlock, SelfAttention, norm_silu, timestep_embedding, zero
from dpm_solver import dpmpp_row
from evaluation.score import drawn_by, last_samples, note_samples, score
from image_data import datasets
from image_data.latents import cache_latents
from kernels import gaussian, sampling_update
from networks.autoencoders import autoencoder_of, latent_shape, load_autoencoder
from networks.sizes import check_latent_unet, groups_for
from networks.small_autoencoder import Autoencoder

HERE = Path(__file__).resolve().parent
SAMPLING = ("sampler", "sample_steps", "eta", "guidance", "guidance_interval", "guidance_rescale")
OF_AE = "patch ae_channels ae_mult ae_blocks z_channels kl_weight ae_steps ae_lr"  # the small one


@dataclass
class Config(cli.RunConfig):
    stage: Literal["all", "autoencoder", "latents", "diffusion"] = "all"  # stop after this one

    ae: str = "kl"
    """kl: train a small one here; or the path of one, published or trained by autoencoder.py"""
    patch: int = 4  # the autoencoder first folds patches of this side into channels
    ae_channels: int = 64  # channels of the autoencoder after folding
    ae_mult: tuple[int, ...] = (1,)  # ae_channels times these at each resolution; all but one halve
    ae_blocks: int = 2  # its residual blocks per resolution
    z_channels: int = 4  # channels of the latent
    kl_weight: float = 3e-3  # weight of the KL term beside the reconstruction error
    ae_steps: int = 1000  # optimizer steps of the autoencoder
    ae_lr: float = 2e-3  # its peak learning rate

    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # scaled: Stable Diffusion's
    prediction: Literal["eps", "v"] = "v"
    """what the network predicts: noise, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0"""
    model: Literal["unet", "sd", "sd-label"] = "unet"  # sd: class token by cross-attention, LDM 3.3
    model_channels: int = 48  # channels of the U-Net at full latent resolution
    channel_mult: tuple[int, ...] = (1, 2)  # times model_channels: channels at each resolution
    num_res_blocks: int = 1  # residual blocks per resolution
    attention_resolutions: tuple[int, ...] = (4,)  # latent heights at which blocks attend
    num_heads: int = 4  # attention heads
    context_dim: int = 64  # sd: channels of the class token that its transformers look at
    use_checkpoint: bool = False  # compute activations twice instead of keeping them
    label_dropout: float = 0.1  # how often training replaces the label by "none"

    steps: int = 1500  # optimizer steps of the diffusion
    lr: float = 2e-3  # peak learning rate
    warmup: int = 100  # steps over which a learning rate rises from zero, in both trainings
    ema: tuple[float, ...] = (0.995,)
    save_every: int = 250  # steps between two checkpoints, a multiple of --log-every
    sample_every: int = 750  # steps between two sample grids; 0 for none but the last

    sample: str = ""  # do not train: sample this checkpoint, by its settings where none are typed
    n: int = 100  # how many samples
    n_eval: int = 1000  # after training, so many samples (at least n) are scored; 0: none are
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddim"  # ddpm: ancestral; dpmpp: DPM-Solver++(2M)
    sample_steps: int = 25  # how many of the T timesteps the sampler visits, evenly spaced
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm
    guidance: float = 1.0
    """w in (1+w) eps(z,y) - w eps(z): -1 unconditional, 0 conditional; others write s = 1+w"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """guide only while t/T lies in it (Kynkäänniemi et al. 2024 take sigma); elsewhere w = 0"""
    guidance_rescale: float = 0.0
    """0..1: how far the guided estimate gets back the conditional one's spread (Lin et al. 2024)"""

    USES = {"sample": cli.DRAWS.union(SAMPLING)}
    NEEDS = cli.RunConfig.NEEDS | dict.fromkeys(OF_AE.split(), "ae=kl")
    NEEDS |= {"context_dim": "model=sd"} | dict.fromkeys(SAMPLING[-2:], "guidance")
    FREE = cli.RunConfig.FREE.union(
        SAMPLING, cli.names("stage use_checkpoint sample n n_eval seeds")
    )


# ------------------------------------------------------------ the autoencoder: LDM section 3.1


def first_stage(cfg):
    """What autoencoder.py would be asked for: a run of its own, in a folder of its own."""
    shared = {field.name: getattr(cfg, field.name) for field in fields(cli.RunConfig)}
    shared |= {"out": str(Path(cfg.out, "autoencoder")), "steps": cfg.ae_steps, "lr": cfg.ae_lr}
    shared |= {"ema": (), "resume": "never" if cfg.resume == "never" else "auto", "keep_every": 0}
    own = {"patch": cfg.patch, "model_channels": cfg.ae_channels, "channel_mult": cfg.ae_mult}
    own |= {"num_res_blocks": cfg.ae_blocks, "z_channels": cfg.z_channels, "ae": "kl"}
    return autoencoder.Config(**shared, **own, kl_weight=cfg.kl_weight, n=8 if cfg.smoke else 1000)


def kl_divergence(mean, log_var):
    """KL(q(z|x) || N(0, 1)) of each image, (B,), a mean over the numbers of z."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))


def make_autoencoder(cfg, shape):
    """The autoencoder cfg.ae for images of shape (C,H,W), to be trained if it is "kl"."""
    if cfg.ae != "kl":
        return load_autoencoder(cfg.ae)
    sizes = (cfg.patch, cfg.ae_channels, cfg.ae_mult, cfg.ae_blocks, cfg.z_channels)
    return Autoencoder(shape[0], *sizes).to(memory_format=torch.channels_last)


def train_autoencoder(cfg, world, ds):
    """The frozen autoencoder, on every rank: trained, or going on where it stopped, or read.

    L1 and a weak pull of q(z|x) to N(0, I), which keeps latents near each other. LDM's perceptual
    and adversarial terms are in autoencoder.py.
    """
    first = first_stage(cfg)
    torch.manual_seed(cfg.seed)
    ae = make_autoencoder(cfg, ds.shape).to(world.device)
    z_shape = latent_shape(ae, ds.shape)
    if cfg.ae == "kl":
        make = partial(torch.optim.Adam, lr=first.lr, fused=True)
        run = Run(first, world, ds, net=ae, optimizer=make, script="autoencoder")
        run.say(f"autoencoder from step {run.first} of {first.steps}")
        for step in run.steps():
            for part in run.parts(step):
                x, _ = run.images(part)  # (b,C,H,W)
                noise = run.noise(part, (len(x), *z_shape), "posterior")
                x_hat, mean, log_var = run.model(x, noise)  # D(z), and q(z|x), z = mean + std noise
                l1 = (x - x_hat).abs().mean(dim=(1, 2, 3))  # (b,)
                kl = kl_divergence(mean, log_var)
                run.backward(l1 + cfg.kl_weight * kl, l1=l1, kl=kl)
            run.descend()
    ae.eval().requires_grad_(False)
    autoencoder.report(ae, first, world, Path(first.out))
    return ae


# -------------------------------------------------------------------------- the denoising U-Net


class UNet(nn.Module):
    """net(z, t, y=None) -> like z: the estimate of eps or v.

    z (B,C,h,w) noisy latents of any sides, t (B,) timesteps from 0, y (B,) int labels; the label
    net.null, which is num_classes, means "no label", and so does None. z_shape is (C,h,w), cfg a
    Config. The residual blocks and the self-attention are chapter 1's. On the way down a
    convolution halves the latent; on the way up it takes the nearest position.
    """

    def __init__(self, z_shape, num_classes, cfg):
        super().__init__()
        (channels, height, _), c_emb = z_shape, 4 * cfg.model_channels
        levels = [cfg.model_channels * m for m in cfg.channel_mult]
        groups = groups_for(cfg.model_channels, levels)
        check_latent_unet(z_shape, levels, cfg)
        self.cfg, self.null = cfg, num_classes
        first, second = nn.Linear(cfg.model_channels, c_emb), nn.Linear(c_emb, c_emb)
        self.time = nn.Sequential(first, nn.SiLU(), second)
        self.label = nn.Embedding(num_classes + 1, c_emb)

        def layer(c_in, c_out, height):
            attend = height in cfg.attention_resolutions
            parts = [SelfAttention(c_out, cfg.num_heads, groups)] if attend else []
            return Layer(ResBlock(c_in, c_out, c_emb, groups, 0.0), *parts)

        c, skips = levels[0], [(levels[0], height)]  # channels and heights
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, c_out in enumerate(levels):
            if level:  # (B,c,h,w) -> (B,c,ceil(h/2),ceil(w/2))
                self.down.append(Layer(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                height = -(-height // 2)
                skips.append((c, height))
            for _ in range(cfg.num_res_blocks):
                self.down.append(layer(c, c_out, height))
                c = c_out
                skips.append((c, height))
        attend = SelfAttention(c, cfg.num_heads, groups)
        blocks = [ResBlock(c, c, c_emb, groups, 0.0) for _ in range(2)]
        self.middle = Layer(blocks[0], attend, blocks[1])
        for c_out in reversed(levels):
            for _ in range(cfg.num_res_blocks + 1):
                c_skip, height = skips.pop()
                self.up.append(layer(c + c_skip, c_out, height))
                c = c_out
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, z, t, y=None):
        y = torch.full_like(t, self.null) if y is None else y
        emb = self.time(timestep_embedding(t, self.cfg.model_channels).to(z.dtype))
        emb = F.silu(emb + self.label(y))  # (B,4*model_channels)

        def run(layer, *inputs):
            if self.cfg.use_checkpoint and self.training and torch.is_grad_enabled():
                return checkpoint(layer, *inputs, use_reentrant=False)
            return layer(*inputs)

        h = self.conv_in(z)  # (B,C0,h,w)
        skips = [h]
        for layer in self.down:
            h = run(layer, h, emb)
            skips.append(h)
        h = run(self.middle, h, emb)  # (B,C_last,h/2^k,w/2^k) rounded up, k = len(channel_mult) - 1
        for layer in self.up:
            skip = skips.pop()
            if h.shape != skip.shape:  # (B,C,ceil(h/2),ceil(w/2)) -> (B,C,h,w)
                h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = run(layer, h, emb, skip)
        return self.conv_out(norm_silu(self.norm_out, h))  # (B,C,h,w)


def make_net(cfg, z_shape, num_classes):
    """cfg.model for z_shape (C,h,w); sd, sd-label (which adds the label to t, too): sd_unet.py."""
    if cfg.model != "unet":
        from networks.sd_unet import denoiser

        return denoiser(cfg, z_shape, num_classes)
    return UNet(z_shape, num_classes, cfg).to(memory_format=torch.channels_last)


# ----------------------------------------------------------------- the loss: LDM eq. 3, CFG alg. 1


def alpha_bar_of(cfg):
    """alpha_bar_t, float64 (T,); Stable Diffusion's sqrt(beta) rises linearly at T = 1000."""
    if cfg.schedule != "scaled_linear":
        return ddpm_pixel.make_alpha_bar(cfg.schedule, cfg.timesteps)
    ends = math.sqrt(0.00085), math.sqrt(0.012)
    beta = torch.linspace(*ends, cfg.timesteps, dtype=torch.float64).square()
    return (1 - beta * (1000 / cfg.timesteps)).cumprod(0)


def simple_loss(net, z0, t, eps, alpha_bar, y, prediction="eps"):
    """||target - net(z_t, t, y)||^2 of each latent, (B,), a mean over its numbers.

    The target is eps or v. At alpha_bar near 0 an error of eps_hat becomes a large one of z0_hat;
    an error of v does not (Salimans, Ho, "Progressive Distillation", 2022, section 4).
    """
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B,1,1,1)
    signal, noise = a.sqrt().to(z0.dtype), (1 - a).sqrt().to(z0.dtype)
    target = eps if prediction == "eps" else signal * eps - noise * z0
    out = net(signal * z0 + noise * eps, t, y)  # (B,C,h,w)
    return (target - out).square().mean(dim=(1, 2, 3))


# ------------------------------------------------------------------- guidance, sampling: CFG


def guided(net, z, t, y, w, rescale=0.0):
    """(out, out_uncond): the kernel combines them as (1+w) out - w out_uncond, CFG eq. 6.

    w = 0 and w = -1 need one pass only, other w one batch of 2B. With rescale in 0..1 the guided
    estimate comes whole; that share of it has the spread of the conditional one, for much guidance
    overexposes images (Lin et al. 2024, arXiv:2305.08891, eq. 14-16). A learned variance, in the
    channels after z's, stays the conditional one.
    """
    t = torch.full((len(z),), t, device=z.device)  # (B,)
    none = torch.full_like(y, net.null)
    if w in (0, -1):
        return net(z, t, none if w else y), None
    out, out_uncond = net(z.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, none])).chunk(2)
    if not rescale:
        return out, out_uncond
    plain, variance = out.float().tensor_split([z.shape[1]], dim=1)  # (B,C,h,w) and the rest
    both = (1 + w) * plain - w * out_uncond[:, : z.shape[1]].float()
    # (B,1,1,1), in float64, where no square overflows. A network that gives 0 has none.
    spread = [x.double().std((1, 2, 3), keepdim=True).clamp(min=1e-30) for x in (plain, both)]
    both = both * (rescale * spread[0] / spread[1] + (1 - rescale)).float()
    return torch.cat([both, variance], dim=1), None


def rows_of(cfg, alpha_bar, pairs):
    """The steps of cfg.sampler: ddim.py's, dpm_solver.py's or chapter 1's ancestral ones."""
    a = [alpha_bar[t].item() for t, _ in pairs] + [1.0]
    steps = range(len(pairs))
    if cfg.sampler == "ddim":
        return [ddim_row(a[i], a[i + 1], cfg.eta, cfg.prediction) for i in steps]
    if cfg.sampler == "dpmpp":
        return [dpmpp_row(a[i - 1] if i else None, a[i], a[i + 1], cfg.prediction) for i in steps]
    return [ddpm_pixel.ancestral_row(a[i], a[i + 1], cfg.prediction) for i in steps]


@torch.no_grad()
def sample(net, cfg, z_shape, seeds, y, make_rows=rows_of):
    """Walk from noise to latents of the seeds (B,) and labels y (B,); yields z, z0_hat (B,C,h,w).

    A latent is a function of its seed and label alone. make_rows gives the numbers of every step.
    """
    alpha_bar = alpha_bar_of(cfg)
    pairs = ddpm_pixel.timestep_pairs(cfg.timesteps, cfg.sample_steps)
    z = gaussian((len(seeds), *z_shape), seeds, -1, seeds.device)  # z_T (B,C,h,w), as step -1
    z, z0_hat = z.to(memory_format=torch.channels_last), None
    for step, ((t, _), row) in enumerate(zip(pairs, make_rows(cfg, alpha_bar, pairs), strict=True)):
        low, high = cfg.guidance_interval
        w = cfg.guidance if net.null and low <= t / cfg.timesteps <= high else 0.0
        out, out_uncond = guided(net, z, t, y, w, cfg.guidance_rescale)
        how = {"out_uncond": out_uncond, "guidance": 0.0 if out_uncond is None else w}
        how |= {"history": z0_hat if row.H else None, "seeds": seeds, "clip": False}
        z, z0_hat = sampling_update(z, out, row, step=step, **how)
        yield z, z0_hat


def draw(walk, ae, scale, cfg, world, seeds, labels, desc="sampling"):
    """uint8 images (N,H,W,C) of seeds and labels (N,), on every rank: each draws its share.

    walk(seeds, labels) is sample() with all else given; scale is what latents were multiplied by.
    """

    def images(part, tick):
        way = walk(seeds[part].to(world.device), labels[part].to(world.device))
        with world.autocast():
            z = end_of(way, tick, seeds[part], pairs, desc)
        with torch.no_grad(), exact():  # in fp32: half precision overflows in decoders
            return to_uint8(ae.decode(z.float() / scale), seeds[part])

    pairs = ddpm_pixel.timestep_pairs(cfg.timesteps, cfg.sample_steps)
    return world.in_parts(images, len(seeds), cfg.batch_size, pairs, desc)


# ------------------------------------------------------------------------------------- training


def train(cfg, world):
    """All stages but the evaluation."""
    ds = datasets.of(cfg)
    if world.is_main:
        print(f"{ds.name}: {len(ds)} images {ds.shape}, {ds.num_classes} classes")
    ae = train_autoencoder(cfg, world, ds)
    if cfg.stage == "autoencoder":
        return
    latents = encode(cfg, world, ds, ae)
    if cfg.stage == "latents":
        return
    alpha_bar, seeds = alpha_bar_of(cfg).to(world.device), cli.parse_seeds(cfg.seeds, cfg.n)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, latents.z_shape, ds.num_classes).to(world.device)
    run = latent_run(cfg, world, latents, net, ae)
    labels = cli.labels_for(seeds, range(max(1, net.null)))
    how = f"predicts {cfg.prediction}, {cfg.schedule} schedule, T = {cfg.timesteps}"
    run.say(f"{cfg.model} from step {run.first} of {cfg.steps}, {how}")
    for step in run.steps():
        for part in run.parts(step):
            z0, y = draw_latents(run, part)  # (b,C,h,w), (b,)
            y = run.hide(part, y, cfg.label_dropout)
            t, eps = run.uniform(part, cfg.timesteps), run.noise(part, z0.shape)
            losses = simple_loss(run.model, z0, t, eps, alpha_bar, y, cfg.prediction)
            run.backward(losses, t / cfg.timesteps)
        run.descend()
        if run.due(cfg.sample_every):
            walk = partial(sample, world.for_sampling(run.ema), cfg, latents.z_shape)
            run.save_grid(partial(draw, walk, ae, latents.scale, cfg, world, seeds, labels))
            del walk  # what it has recorded on a GPU needs memory
    last_samples(cfg, world, SAMPLING, sample_checkpoint)


def encode(cfg, world, ds, ae):
    """Latents of the data, encoded once; times their scale, variance is 1 (LDM appendix G)."""
    folder, made_of = Path(cfg.out, "latents"), {"autoencoder": checkpoints.weights_hash(ae)}
    shape = {"z_channels": ae.z_channels, "factor": ae.factor}
    return cache_latents(folder, world, ds, ae.encode, made_of=made_of, flip=cfg.flip, **shape)


def latent_run(cfg, world, latents, net, ae):
    """The run of a denoiser; its checkpoints hold the autoencoder, too."""
    make = partial(torch.optim.Adam, lr=cfg.lr, fused=True)
    facts = {"scale": latents.scale, "ae": ae.settings, "autoencoder": ae.state_dict()}
    made_of = {"autoencoder": checkpoints.weights_hash(ae)}
    return Run(cfg, world, latents, net=net, optimizer=make, facts=facts, made_of=made_of)


def draw_latents(run, part):
    """z0 ~ scale * q(z|x) (b,C,h,w) of the images of a part, and their labels (b,) or None."""
    moments, y = run.images(part)  # of the cache: (b,2C,h,w)
    mean, log_var = moments.chunk(2, dim=1)
    noise = run.noise(part, mean.shape, "posterior")
    return run.ds.scale * (mean + (0.5 * log_var).exp() * noise), y


# --------------------------------------------------------------------------------------- samples


def load_net(path, device, ema=None, script="ldm_cfg", config=Config, make=make_net):
    """(denoiser with the EMA weights, its Config, checkpoint, frozen autoencoder); ema: a decay."""
    state = checkpoints.load_checkpoint(path, script, mapped=True)
    cfg = checkpoints.trained_config(config, state, path)
    ae = autoencoder_of(state, path, device)
    z_shape, weights = latent_shape(ae, state["shape"]), checkpoints.chosen_ema(state, path, ema)
    net = checkpoints.built(lambda: make(cfg, z_shape, len(state["class_names"])), weights, path)
    return net.to(device).eval(), cfg, state, ae


def sample_checkpoint(cfg, world, n=None, load=load_net, make_rows=rows_of):
    """n samples (default cfg.n) of the checkpoint cfg.sample: samples.png and .npz."""
    n = n or cfg.n
    made_of = drawn_by(cfg, SAMPLING, n)
    net, trained, state, ae = load(cfg.sample, world.device, checkpoints.typed_ema(cfg))
    trained = replace(trained, **{name: getattr(cfg, name) for name in (*SAMPLING, "batch_size")})
    chosen = cli.parse_classes(cfg.classes, state["class_names"])
    seeds = cli.parse_seeds(cfg.seeds, n)
    labels = cli.labels_for(seeds, chosen or [0])
    z_shape, net = latent_shape(ae, state["shape"]), world.for_sampling(net)
    walk = partial(sample, net, trained, z_shape, make_rows=make_rows)
    images = draw(walk, ae, state["scale"], trained, world, seeds, labels)
    if world.is_main:
        folder = cli.folder_of(cfg, cfg.sample)
        save_samples(folder, images, labels if chosen and trained.guidance != -1 else None, 10)
        note_samples(folder, made_of)
        print(f"samples: {folder / 'samples.png'}, guidance w = {trained.guidance:g}")


# ----------------------------------------------------------------------------------------- main


def check(cfg, sizes="model_channels channel_mult num_res_blocks num_heads context_dim "):
    """Raise BadInput for a setting out of its range; sizes: those of the network."""
    cli.check_run(cfg)
    cli.check_ranges(
        cfg,
        positive=sizes + "timesteps sample_steps n patch ae_channels ae_mult ae_blocks z_channels "
        "ae_steps ae_lr",
        not_negative="n_eval",
        fraction="label_dropout eta guidance_interval guidance_rescale kl_weight",
    )
    cli.check_sampling(cfg)
    if cfg.guidance_interval[0] > cfg.guidance_interval[1]:
        raise cli.BadInput(f"--guidance-interval {cfg.guidance_interval}: expected it to rise")
    if cfg.eta and cfg.sampler != "ddim":
        raise cli.BadInput(f"--eta {cfg.eta:g} is for --sampler ddim, not {cfg.sampler}")
    if cfg.prediction == "eps" and cfg.schedule == "cosine" and not cfg.sample:
        why = "divides the error of eps_hat by 5e-5 where it starts, and latents are not clamped"
        raise cli.BadInput(f"--schedule cosine {why}: add --prediction v or another schedule")


def run_stages(cfg, train, make_net):
    """What main() does with settings that were checked: plan, train, score."""
    ds = datasets.of(cfg)
    cfg = datasets.in_steps(cfg, ds)
    ae = make_autoencoder(cfg, ds.shape)  # what does not fit says so now, not after an hour
    z_shape = latent_shape(ae, ds.shape)
    with torch.device("meta"):
        make_net(cfg, z_shape, ds.num_classes)
    launch(train, cfg)
    if cfg.stage == "all" and cfg.n_eval and not cfg.dry_run and is_first_process():
        score(cfg, ds, HERE / "eval_fid.py")


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}.yaml")
    if cfg.sample:
        names = (*SAMPLING, "batch_size", "timesteps")
        cfg = checkpoints.as_trained(cfg, names, cfg.sample, "ldm_cfg")
    small = {"ae_steps": 4, "ae_channels": 32, "model_channels": 32, "num_heads": 4, "n": 8}
    cfg = cli.smoke(cfg, **small, n_eval=0, sample_steps=4, out="runs/smoke-ldm")
    check(cfg)
    if cfg.sample:
        return launch(sample_checkpoint, cfg)
    if cfg.resume not in ("auto", "never"):
        checkpoints.load_checkpoint(cfg.resume, "ldm_cfg", facts=True)  # before an hour's work
    run_stages(replace(cfg, out=cfg.out or f"runs/ldm-{Path(cfg.data).stem}"), train, make_net)


if __name__ == "__main__":
    cli.entry(main)
