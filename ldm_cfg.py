"""Chapter 3: latent diffusion with classifier-free guidance.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022
(arXiv:2112.10752): LDM below. Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022
(arXiv:2207.12598): CFG. Song, Meng, Ermon, "DDIM", 2021 (arXiv:2010.02502).

Most of an image's bits are detail that no one asks a generator to imagine. So an autoencoder first
learns to pack an image into a small latent z = E(x) with x = D(z) nearly, and diffusion then runs
on z, where a step costs a fraction (LDM section 3). The network sees the class label y, and now and
then the label "none"; a sample is steered by exaggerating the difference,

    eps_hat = (1 + w) eps_hat(z_t, y) - w eps_hat(z_t, none)                      CFG eq. 6

(At a given z_t, v is affine in eps and the weights sum to 1: the same holds for v.)

    python ldm_cfg.py                                     digits on two CPU cores, six minutes
    python ldm_cfg.py --data imagenet100 --gpus 8         ImageNet-100 at 128x128
    python ldm_cfg.py --sample runs/ldm-glyphs/ckpt.pt --n 100 --guidance 3 --classes 3,7

Stages: data, autoencoder, latents, diffusion, samples and evaluation; each goes on where it stopped
and is skipped when done. `--smoke` walks through all but the evaluation with tiny networks.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

import autoencoder
import likelihood
from dit import DiT, parse_size
from evaluation.score import drawn_before, drawn_by, note_samples, score
from image_data import batches, datasets, latents
from kernels import gaussian, sampling_table, sampling_update
from networks.sd_unet import LatentUNet
from runtime import plan, sharding
from runtime.commandline import (
    BadInput,
    check_fraction,
    check_not_negative,
    check_positive,
    check_run,
    default_gpus,
    entry,
    parse,
    parse_classes,
    parse_seeds,
    smaller,
    split_list,
)
from runtime.pictures import save_grid, save_samples, to_uint8
from runtime.processes import is_first_process, launch
from runtime.run import Run, as_trained, load_checkpoint
from runtime.training import LossMeter, ema_update, learning_rate, plot_loss, weights_hash
from schedules import make_alpha_bar

HERE = Path(__file__).parent


@dataclass
class Config:
    config: str = ""  # YAML of these settings, under the flags (default configs/DATA.yaml, if any)
    out: str = ""  # run directory (default runs/ldm-DATA; with --sample, that of the checkpoint)
    stage: Literal["all", "autoencoder", "latents", "diffusion"] = "all"  # stop after this one
    smoke: bool = False  # a few tiny steps, to see that everything works

    data: str = "glyphs"
    """glyphs, mnist, fashion_mnist, cifar10, afhq, imagenet100, or a folder or zip of images"""
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    size: int = 0
    """resize the shorter side to this and crop the centre; 0 keeps the images' own size"""
    flip: bool = False  # flip half of the training images left to right
    classes: str = ""
    """comma-separated names or numbers: train on these classes; with --sample, draw these"""

    ae: str = "kl"
    """kl, vq (small ones) or ldm (Stable Diffusion's), trained here; or a published one's path"""
    patch: int = 4  # kl and vq first fold patches of this side into channels
    ae_width: int = 64  # the autoencoder's channels after that
    ae_mult: tuple[int, ...] = (1,)
    """the same at each resolution, in units of ae_width; each but the first halves the image"""
    ae_blocks: int = 2  # the autoencoder's residual blocks per resolution
    z_channels: int = 4  # channels of the latent
    kl_weight: float = 3e-3  # weight of the KL term beside the reconstruction error
    codebook: int = 512  # vq: how many vectors latents are rounded to
    commitment: float = 0.25  # vq: weight of the pull of latents towards their vectors
    perceptual: str = ""  # file of VGG16 or LPIPS weights: compare their features of images, too
    perceptual_weight: float = 1.0  # weight of that beside |x - x_hat|
    discriminator: float = 0.0  # weight of a patch discriminator; 0 for none
    disc_start: int = 1000  # step of the autoencoder at which it starts
    ae_steps: int = 1000  # optimizer steps of the autoencoder
    ae_lr: float = 2e-3  # the autoencoder's peak learning rate

    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"
    """noise schedule: of DDPM, of Stable Diffusion, or of IDDPM"""
    prediction: Literal["eps", "v"] = "v"
    """what the network predicts: noise, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0"""
    model: str = "unet"
    """unet (Stable Diffusion's structure), or a transformer: dit-s/2, dit-b/4, ... (size/patch)"""
    width: int = 64  # channels of the latent U-Net at full latent resolution
    mult: tuple[int, ...] = (1, 2)
    """the U-Net's at each resolution, in units of width; each but the first halves the latent"""
    blocks: int = 1  # the U-Net's residual blocks per resolution
    attention: tuple[int, ...] = (1,)  # levels of mult, from 0, that have transformers
    heads: int = 4  # attention heads of these transformers
    context_width: int = 64  # channels of the class token that they look at
    add_label: bool = True  # the U-Net adds the class token to the timestep embedding, too
    checkpointing: bool = False  # compute activations twice instead of keeping them
    learned_variance: bool = False  # learn that of --sampler ddpm, too: IDDPM's L_hybrid
    label_dropout: float = 0.1  # how often training replaces the label by "none"

    steps: int = 1250  # optimizer steps of the diffusion
    batch_size: int = 64  # images per step over all processes, in both trainings
    lr: float = 2e-3  # peak learning rate
    warmup: int = 100  # steps over which a learning rate rises; half a cosine lowers it all along
    clip_grad: float = 1.0  # largest gradient norm
    ema: float = 0.995  # decay of the running mean of the weights, which is what gets sampled
    seed: int = 0  # everything random in training is a function of this and the step

    gpus: int = field(default_factory=default_gpus)  # 0: CPU; N > 1 starts N processes
    resume: str = "auto"  # auto (go on where the run stopped), never, or a checkpoint
    shard: bool = False  # with several GPUs: each holds its part of the denoiser only (FSDP2)
    compile: bool = False  # torch.compile the networks
    tensorboard: bool = False  # write TensorBoard files too
    log_every: int = 50  # steps between two lines of log.jsonl
    save_every: int = 250  # steps between two checkpoints, a multiple of --log-every
    keep_every: int = 0  # steps between checkpoints kept as ckpt-STEP.pt, for eval_fid.py --curve
    sample_every: int = 500  # steps between two grids; 0 for none but the last
    dry_run: bool = False  # prepare the data, say what would be done, and how much that needs

    sample: str = ""
    """do not train: sample from this checkpoint, with its sampler's settings where not given"""
    n: int = 100  # how many samples
    n_eval: int = 1000  # after training, so many samples (at least n) are scored; 0: none are
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddim"
    """chapter 2's DDIM or DPM-Solver++(2M), or chapter 1's ancestral steps"""
    sample_steps: int = 25  # how many of the T timesteps the sampler visits, evenly spaced
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm
    guidance: float = 1.0
    """w in (1+w) eps(z,y) - w eps(z): -1 unconditional, 0 conditional; others write s = 1+w"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """guide only while t/T lies in it (Kynkäänniemi et al. 2024); elsewhere w = 0"""
    guidance_rescale: float = 0.0
    """0..1: how far the guided estimate gets back the conditional one's spread (Lin et al. 2024)"""


# ----------------------------------------------------------------------------- denoising network


def make_net(cfg, z_shape, num_classes):
    """The denoiser cfg.model for latents z_shape (C,h,w): net(z, t, y) -> eps or v, like z, with
    C more channels that tell the variance where it is learned."""
    if cfg.model == "unet":
        net = LatentUNet(
            z_shape[0],
            num_classes,
            width=cfg.width,
            mult=cfg.mult,
            blocks=cfg.blocks,
            attention=cfg.attention,
            heads=cfg.heads,
            context_width=cfg.context_width,
            add_label=cfg.add_label,
            learned_variance=cfg.learned_variance,
            checkpointing=cfg.checkpointing,
        )
    else:
        net = DiT(
            z_shape,
            num_classes,
            **parse_size(cfg.model),
            learned_variance=cfg.learned_variance,
            checkpointing=cfg.checkpointing,
        )
    return net.to(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- loss and sampling


def simple_loss(net, z0, y, t, eps, alpha_bar, prediction="eps", chain=None):
    """||target - net(z_t, t, y)||^2 of each latent, (B,), a mean over its numbers (LDM eq. 3).

    The target is eps, or v, whose error does not explode into z0_hat where alpha_bar is nearly 0
    (Salimans, Ho, "Progressive Distillation", 2022, section 4). chain: likelihood.make_chain's,
    for a network that learns the variance, from 0.001 L_vlb beside that (IDDPM eq. 16).
    """
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B,1,1,1)
    signal, noise = a.sqrt().to(z0.dtype), (1 - a).sqrt().to(z0.dtype)
    z_t = signal * z0 + noise * eps  # (B,C,h,w)
    target = eps if prediction == "eps" else signal * eps - noise * z0
    out = net(z_t, t, y).float()  # (B,C,h,w), or (B,2C,h,w) with the variance
    losses = (target - out[:, : z0.shape[1]]).square().mean(dim=(1, 2, 3))
    if chain is not None:
        vlb = likelihood.hybrid(out, z0, z_t, t, chain, prediction=prediction, discrete=False)
        losses = losses + 0.001 * vlb.float()
    return losses


def estimate(net, z, t, y, guidance):
    """(out, out_uncond) of what guidance w needs: one pass for w = 0 and -1, else one batch of 2B.

    At w = -1 only the pass without labels counts: it is given as `out`, to be used as it is.
    """
    none = torch.full_like(y, net.null)  # the label after the last class
    if guidance in (0, -1):
        return net(z, t, none if guidance else y), None
    out = net(z.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, none]))  # (2B,C,h,w)
    return out.chunk(2)


def rescaled(out, out_uncond, w, share, channels):
    """The guided estimate, `share` of it with the standard deviation of the conditional one.

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024, eq. 14-16:
    much guidance enlarges all numbers of a sample, which makes overexposed images. What follows
    the first `channels` is the variance's, and stays the conditional one.
    """
    plain, variance = out.float().tensor_split([channels], dim=1)  # (B,C,h,w) and the rest
    guided = (1 + w) * plain - w * out_uncond[:, :channels].float()
    spread = [x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (plain, guided)]  # (B,1,1,1)
    return torch.cat([guided * (share * spread[0] / spread[1] + 1 - share), variance], dim=1)


@torch.inference_mode()
def sampler(
    net,
    alpha_bar,
    pairs,
    shape,
    seeds,
    y,
    *,
    kind="ddim",
    eta=0.0,
    variance="small",
    guidance=0.0,
    interval=(0.0, 1.0),
    rescale=0.0,
    prediction="eps",
):
    """Walk from noise to latents; yields (t_prev, z, z0_hat) after every step.

    pairs [(t, t_prev), ...] downwards, the last t_prev is -1. seeds (B,) int64: a sample is a
    function of its seed and label alone. y (B,) labels. kind: "ddpm" with a variance, small or
    learned, "ddim" with eta, or "dpmpp", whose second order needs the step before. guidance,
    interval and rescale: see Config.
    """
    multistep, history = kind == "dpmpp", None
    table = sampling_table(
        alpha_bar,
        pairs,
        eta=eta if kind == "ddim" else None,
        variance=variance,
        prediction=prediction,
        multistep=multistep,
    )
    z = gaussian((len(seeds), *shape), seeds, -1, seeds.device)
    z = z.to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        w = guidance if interval[0] <= t / len(alpha_bar) <= interval[1] else 0.0
        out, out_uncond = estimate(net, z, torch.full_like(seeds, t), y, w)
        if rescale and out_uncond is not None:
            out, out_uncond = rescaled(out, out_uncond, w, rescale, shape[0]), None
        z, history = sampling_update(  # history: z0_hat, which only dpmpp looks back at
            z,
            out,
            table,
            step,
            out_uncond=out_uncond,
            history=history if multistep else None,
            guidance=0.0 if out_uncond is None else w,
            seeds=seeds,
            clip=False,
        )
        yield t_prev, z, history


def draw(net, ae, scale, cfg, world, shape, labels, seeds, desc="sampling"):
    """uint8 images (N,H,W,C) of `shape` (C,H,W), the same on every rank: each draws its share.

    labels, seeds (N,) int64; scale is what latents are divided by before they are decoded.
    """
    alpha_bar = make_alpha_bar(cfg.schedule, cfg.timesteps)
    ts = torch.linspace(cfg.timesteps - 1, 0, cfg.sample_steps).round().long().unique().flip(0)
    pairs = list(zip(ts.tolist(), [*ts[1:].tolist(), -1], strict=True))
    z_shape = latent_shape(ae, shape)
    mine = torch.arange(len(seeds))[world.share(len(seeds))]
    parts = mine.split(-(-cfg.batch_size // world.size))
    images = [torch.empty(0, *shape[1:], shape[0], dtype=torch.uint8)]
    with world.progress(len(parts) * len(pairs), desc=desc) as bar:
        for part in parts:
            with world.autocast():
                for _, z, _ in sampler(  # noqa: B007
                    net,
                    alpha_bar,
                    pairs,
                    z_shape,
                    seeds[part].to(world.device),
                    labels[part].to(world.device),
                    kind=cfg.sampler,
                    eta=cfg.eta,
                    guidance=cfg.guidance if net.null else 0.0,
                    interval=cfg.guidance_interval,
                    rescale=cfg.guidance_rescale,
                    prediction=cfg.prediction,
                    variance="learned" if cfg.learned_variance else "small",
                ):
                    bar.update()
            with torch.inference_mode():
                images.append(to_uint8(ae.decode(z.float() / scale)))
    return world.collect(torch.cat(images).to(world.device), len(seeds)).cpu()


def latent_shape(ae, shape):
    """(C,h,w) of the latents of images of `shape` (C,H,W)."""
    return ae.z_channels, shape[1] // ae.factor, shape[2] // ae.factor


# ------------------------------------------------------------------------------------- training


def load_data(cfg):
    classes = split_list(cfg.classes)
    return datasets.load(cfg.data, cfg.data_root, size=cfg.size or None, classes=classes)


def train(cfg, world):
    """All stages but the evaluation."""
    ds = load_data(cfg)
    shape, k = (ds.channels, ds.height, ds.width), ds.num_classes
    if world.is_main:
        print(f"{ds.name}: {len(ds)} images {shape[1]}x{shape[2]}x{shape[0]}, {k} classes")
    ae = autoencoder.train(cfg, world, ds)
    if cfg.stage == "autoencoder":
        return
    moments, scale = latents.cache_latents(cfg, world, ds, ae)
    if cfg.stage == "latents":
        return
    moments = latents.moments_on(moments, world.device)

    torch.manual_seed(cfg.seed)
    z_shape = latent_shape(ae, shape)
    net = make_net(cfg, z_shape, k).to(world.device)
    ema = AveragedModel(net, multi_avg_fn=ema_update(cfg.ema))
    run = Run(
        cfg.out,
        "ldm_cfg",
        asdict(cfg),
        world,
        resume=cfg.resume,
        tensorboard=cfg.tensorboard,
        made_of={"data_key": ds.key, "autoencoder": weights_hash(ae)},
        defaults=asdict(Config()),
    )
    state, start = run.restore(), 0
    if state:
        net.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        start = state["step"]
        ema.n_averaged.fill_(start)
    if cfg.shard:
        sharding.shard(net, world)
        sharding.shard(ema.module, world)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, fused=world.device.type == "cuda")
    if state:
        sharding.load_optimizer(optimizer, state["optimizer"])
    del state  # 16 bytes a parameter, which nobody needs any more
    model = torch.compile(net) if cfg.compile else net
    model = model if cfg.shard else world.wrap(model)  # sharded, it shares its gradients itself
    alpha_bar = make_alpha_bar(cfg.schedule, cfg.timesteps).to(world.device)
    chain = likelihood.make_chain(alpha_bar) if cfg.learned_variance else None
    mine, meter = world.share(cfg.batch_size), LossMeter(world.device)
    seeds = parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, range(k))
    if world.is_main:
        count = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"diffusion: {count:.2f} M parameters, {cfg.steps} steps from {start}")

    bar = world.progress(cfg.steps, start, "diffusion")
    for step in range(start, cfg.steps):
        # All that is random is drawn for the global batch from (seed, step), then shared out.
        rng, batch = np.random.default_rng([cfg.seed, step]), cfg.batch_size
        t = torch.from_numpy(rng.integers(cfg.timesteps, size=batch))[mine].to(world.device)
        hide = torch.from_numpy(rng.random(batch) < cfg.label_dropout)[mine]
        noise_seeds = torch.from_numpy(rng.integers(2**62, size=(2, batch)))[:, mine]

        idx = batches.indices(len(ds), batch, cfg.seed, step, world.rank, world.size)
        y = torch.where(hide, k, torch.from_numpy(ds.labels[idx])).to(world.device)  # (B,)
        if cfg.flip:
            idx = idx + len(ds) * batches.flips(batch, cfg.seed, step, world.rank, world.size)
        noise, eps = (
            gaussian((len(idx), *z_shape), which, step, world.device)
            for which in noise_seeds.to(world.device)
        )
        z0 = scale * latents.latent_batch(moments, idx, noise)  # (B,C,h,w)

        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with world.autocast():
            losses = simple_loss(model, z0, y, t, eps, alpha_bar, cfg.prediction, chain)
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
            parts = {"model": net, "ema": ema.module, "optimizer": optimizer}
            weights = {name: sharding.whole(part.state_dict()) for name, part in parts.items()}
            run.save(
                step,
                **weights,
                scale=scale,
                autoencoder=ae.state_dict(),
                shape=list(shape),
                class_names=list(ds.class_names),
                ae_made_of=ae.made_of,
            )
        if cfg.sample_every and step % cfg.sample_every == 0 and not last:
            with sharding.unsharded(ema.module):  # ranks may draw different numbers of batches
                images = draw(ema.module, ae, scale, cfg, world, shape, labels, seeds)
            if world.is_main:
                save_grid(images[:100], run.folder / f"samples-{step:06d}.png", 10)
                plot_loss(run)
    bar.close()
    if world.is_main:
        plot_loss(run)
    world.barrier()  # the checkpoint is whole before any rank reads it
    if cfg.stage == "all":
        end = replace(cfg, sample=str(run.folder / "ckpt.pt"), classes="")
        end, n = replace(end, seeds="") if cfg.n_eval else end, max(cfg.n, cfg.n_eval)
        if not drawn_before(end, SAMPLING, n, world):
            sample(end, world, n)


# --------------------------------------------------------------------------------------- samples


def labels_for(seeds, chosen):
    """The label of each sample, a function of its seed; 0, which is net.null, without classes."""
    return torch.tensor(list(chosen) or [0])[seeds % max(1, len(chosen))]


def load_net(path, device):
    """(denoiser with the EMA weights, autoencoder, checkpoint, Config it was trained with)."""
    state = load_checkpoint(path, "ldm_cfg", mapped=True)
    known = {f.name for f in fields(Config)}
    cfg = Config(**{key: v for key, v in state["config"].items() if key in known})
    ae = autoencoder.make_autoencoder(cfg, state["shape"], state.get("ae_made_of"))
    net = make_net(cfg, latent_shape(ae, state["shape"]), len(state["class_names"]))
    try:
        net.load_state_dict(state["ema"])
        ae.load_state_dict(state["autoencoder"])
    except RuntimeError:
        why = "holds another network than this version's; sample it with the one that wrote it"
        raise BadInput(f"checkpoint {path} {why}") from None
    return net.to(device).eval(), ae.to(device).eval(), state, cfg


SAMPLING = (
    "sampler",
    "sample_steps",
    "eta",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "batch_size",
)


def sample(cfg, world, n):
    """n samples from the checkpoint cfg.sample: samples.png and .npz, in cfg.out or beside it."""
    made_of = drawn_by(cfg, SAMPLING, n)
    net, ae, state, trained = load_net(cfg.sample, world.device)
    trained = replace(trained, **{name: getattr(cfg, name) for name in SAMPLING})
    chosen = parse_classes(cfg.classes, state["class_names"])
    seeds = parse_seeds(cfg.seeds, n)
    labels = labels_for(seeds, chosen)
    images = draw(net, ae, state["scale"], trained, world, state["shape"], labels, seeds)
    if world.is_main:
        folder = Path(cfg.out or Path(cfg.sample).parent)
        save_samples(folder, images, labels if chosen else None, 10)
        note_samples(folder, made_of)
        how = f", guidance w = {trained.guidance:g}" if chosen else ""
        print(f"samples: {folder / 'samples.png'}{how}")


# ----------------------------------------------------------------------------------------- main


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    check_run(cfg)
    autoencoder.check(cfg)
    sizes = ("timesteps", "width", "mult", "blocks", "heads", "context_width", "sample_steps")
    check_positive(cfg, *sizes)
    check_not_negative(cfg, "n_eval")
    fractions = ("label_dropout", "ema", "eta", "guidance_interval", "guidance_rescale")
    check_fraction(cfg, *fractions)
    if cfg.sample_steps > cfg.timesteps:
        told = f"--sample-steps {cfg.sample_steps} exceeds the chain's --timesteps"
        raise BadInput(f"{told} {cfg.timesteps}")
    if not math.isfinite(cfg.guidance) or cfg.guidance_interval[0] > cfg.guidance_interval[1]:
        told = f"--guidance {cfg.guidance} --guidance-interval {cfg.guidance_interval}"
        raise BadInput(f"{told}: expected a finite w, and an interval that rises")
    if cfg.eta and cfg.sampler != "ddim":
        raise BadInput(f"--eta {cfg.eta:g} is for --sampler ddim, not {cfg.sampler}")
    if cfg.n_eval and max(cfg.n, cfg.n_eval) < 2:
        raise BadInput("--n-eval must be 0, or at least 2: a covariance is compared")
    if cfg.prediction == "eps" and cfg.schedule == "cosine" and not cfg.sample:
        why = "divides the error of eps_hat by 5e-5 where it starts, and latents are not clamped"
        raise BadInput(f"--schedule cosine {why}: add --prediction v or another schedule")


def networks(cfg, ds):
    """(autoencoder, denoiser, latents' shape); BadInput for settings that do not fit the images."""
    ae = autoencoder.make_autoencoder(cfg, (ds.channels, ds.height, ds.width))
    z_shape = latent_shape(ae, (ds.channels, ds.height, ds.width))
    with torch.device("cpu" if cfg.dry_run else "meta"):  # only a plan runs it
        return ae, make_net(cfg, z_shape, ds.num_classes), z_shape


def main():
    cfg = parse(Config, __doc__, preset=str(HERE / "configs/{data}.yaml"))
    if cfg.sample:
        cfg = as_trained(cfg, (*SAMPLING, "timesteps"), "ldm_cfg")
    if cfg.smoke:
        cfg = smaller(
            cfg,
            ae_steps=4,
            disc_start=1,
            steps=4,
            batch_size=8,
            ae_width=32,
            width=32,
            heads=4,
            n=8,
            n_eval=0,
            sample_steps=4,
            warmup=1,
            log_every=1,
            save_every=2,
            sample_every=2,
            keep_every=0,
            resume="never",
            out="runs/smoke-ldm",
        )
    check(cfg)
    if cfg.sample:
        launch(partial(sample, n=cfg.n), cfg)
        return
    if cfg.resume not in ("auto", "never"):
        load_checkpoint(cfg.resume, "ldm_cfg", mapped=True)  # an hour before it is needed
    cfg = replace(cfg, out=cfg.out or f"runs/ldm-{Path(cfg.data).stem}")
    ds = load_data(cfg)  # prepared once, before there are several processes
    fitting = networks(cfg, ds)  # what does not fit says so now, not after an hour
    if cfg.dry_run:
        ae = (autoencoder.settings(cfg), autoencoder.LATER) if cfg.ae in autoencoder.TRAINED else ()
        plan.show(cfg, ds, *fitting, ae, asdict(Config()), Run.FREE)
        return
    launch(train, cfg)
    if cfg.stage == "all" and cfg.n_eval and is_first_process():
        if ds.num_classes > 1:
            score(cfg, HERE / "eval_fid.py")
        else:
            print(f"no evaluation: {ds.name} has no classes to train its classifier on")


if __name__ == "__main__":
    entry(main)
