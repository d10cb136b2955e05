"""Chapter 1: denoising diffusion in pixel space.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239): DDPM.
Nichol, Dhariwal, "Improved DDPM", 2021 (arXiv:2102.09672): IDDPM.

A fixed Markov chain turns an image x_0 into noise x_T in T small steps (in code t is 1 less),

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              DDPM eq. 4

A network eps_hat(x_t, t) learns to tell which noise was mixed in,

    L_simple = E || eps - eps_hat(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2  eq. 14

and with it the chain is walked backwards, from noise to an image (Algorithm 2).

    python ddpm_pixel.py --data mnist                     train; grids appear in runs/pixel-mnist
    python ddpm_pixel.py --sample runs/pixel-mnist/ckpt.pt --n 100 --classes 3,7
    python ddpm_pixel.py --nll runs/pixel-mnist/ckpt.pt   bits per dimension of held-out images
    torchrun --nproc-per-node 8 ddpm_pixel.py --config configs/cifar10_ddpm.yaml

The first takes about 15 minutes on two CPU cores (figures: README); `--smoke` takes seconds.
Schedules are in schedules.py, the network in networks/, the variational bound in likelihood.py.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import likelihood
from evaluation.scores import Judge
from image_data import batches, datasets
from kernels import gaussian, sampling_table, sampling_update
from networks.adm_unet import make_net
from networks.published.unet import as_checkpoint, check_guidance, save_diffusers
from runtime.commandline import (
    BadInput,
    check_fraction,
    check_not_negative,
    check_positive,
    check_run,
    default_gpus,
    entry,
    folder_of,
    labels_for,
    not_given,
    parse,
    parse_classes,
    parse_seeds,
    smaller,
    split_list,
)
from runtime.pictures import save_film, save_grid, save_samples, to_uint8
from runtime.plots import plot_metrics
from runtime.processes import launch
from runtime.run import Run, load_checkpoint
from runtime.training import LossMeter, ema_update, learning_rate, peak_memory, plot_loss
from schedules import (
    check_schedule,
    dynamic_threshold,
    forward_film,
    make_alpha_bar,
    min_snr_weight,
    plot_schedules,
    q_sample,
    target_of,
    timestep_pairs,
)


@dataclass
class Config:
    config: str = ""  # YAML of these settings, under the flags (default configs/DATA_pixel.yaml)
    out: str = ""  # run directory (default runs/pixel-DATA)
    smoke: bool = False  # a few tiny steps, to see that everything works

    data: str = "glyphs"
    """glyphs, mnist, fashion_mnist, cifar10, afhq, imagenet100, or a folder or zip of images"""
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    size: int = 0  # resize the shorter side to this and crop the centre; 0 keeps the images' size
    flip: bool = False  # flip half of the training images left to right
    classes: str = ""
    """comma-separated names or numbers: train on these classes; with --sample, draw these"""

    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "cosine", "sigmoid"] = "cosine"
    """noise schedule: linear in beta (DDPM), cosine (IDDPM) or sigmoid (Jabri) in alpha_bar"""
    alpha_min: float = 0.001  # smallest alpha_t, so that no step of cosine or sigmoid erases all
    prediction: Literal["eps", "x0", "v"] = "eps"  # what the network gives: noise, image or v
    loss: Literal["l2", "l1", "huber"] = "l2"  # distance of prediction and target
    min_snr: float = 0.0  # gamma of the min-SNR weights (their paper: 5); 0 weighs all t alike
    learned_variance: bool = False  # the network also gives it, by L_simple + 0.001 L_vlb (IDDPM)
    timestep_sampling: Literal["uniform", "loss_second_moment"] = "uniform"  # IDDPM section 3.3

    style: Literal["ddpm", "adm"] = "ddpm"  # U-Net of DDPM, or of Improved and Guided Diffusion
    width: int = 32  # channels at full resolution
    mult: tuple[int, ...] = (1, 2, 4)
    """channels at each resolution, in units of width; each but the first halves the image"""
    blocks: int = 1  # residual blocks per resolution (DDPM: 2)
    attention: tuple[int, ...] = (7, 8)  # image heights at which blocks attend (DDPM: 16)
    heads: int = 1  # attention heads (DDPM: 1)
    head_channels: int = 0  # channels of a head (ADM: 64), instead of --heads
    scale_shift: bool = False  # the timestep scales and shifts the second norm (IDDPM)
    updown: bool = False  # residual blocks resize the image (BigGAN), not convolutions
    groups: int = 0  # of the norms; 0: 32, or fewer where the network is narrow
    dropout: float = 0.0  # dropout in residual blocks (DDPM: 0.1 on CIFAR-10)
    conditional: bool = True  # give the network the class label, where the data has classes
    label_dropout: float = 0.1  # how often training hides it, for guidance's unconditional half

    steps: int = 3000  # optimizer steps
    batch_size: int = 64  # images per step over all processes
    accumulate: int = 1  # parts in which a process handles its share of the batch, to save memory
    checkpointing: bool = False  # compute activations twice instead of keeping them
    lr: float = 1e-3  # peak learning rate
    lr_decay: Literal["cosine", "none"] = "cosine"
    """times half a cosine from 1 at step 0 to 0 at --steps, or constant after warm-up (DDPM)"""
    warmup: int = 200  # steps over which the learning rate rises from zero
    clip_grad: float = 1.0  # largest gradient norm
    ema: tuple[float, ...] = (0.998,)
    """decays of running means of the weights, all kept; the first is what gets sampled (DDPM:
    0.9999). After n steps a decay is at most (1+n)/(10+n). With --sample: the one to use"""
    seed: int = 0  # everything random in training is a function of this and the step

    gpus: int = field(default_factory=default_gpus)  # 0: CPU; N > 1 starts N processes
    resume: str = "auto"  # auto (go on where the run stopped), never, or a checkpoint
    compile: bool = False  # torch.compile the network
    tensorboard: bool = False  # write TensorBoard files too
    log_every: int = 50  # steps between two lines of log.jsonl
    save_every: int = 500  # steps between two checkpoints, a multiple of --log-every
    keep_every: int = 0  # steps between checkpoints kept as ckpt-STEP.pt, for eval_fid.py --curve
    sample_every: int = 1000  # steps between two sample grids; 0 for none but the last
    metric_every: int = 0  # steps between two scores of --metric-n samples by eval_fid.py; 0: never
    metric_n: int = 500  # samples that are scored

    sample: str = ""
    """do not train: sample from this checkpoint, by its settings where not given; published ones
    too: a diffusers folder or .safetensors of a UNet2DModel, or OpenAI's .pt"""
    nll: str = ""  # do not train: bits per dimension of --n held-out images under this checkpoint
    export: str = ""  # do not train: write this checkpoint as a diffusers pipeline into --out
    plot_schedule: bool = False  # do not train: draw alpha_bar and log-SNR of all schedules
    n: int = 100  # how many samples
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # ancestral (DDPM Algorithm 2), or chapter 2's
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of an ancestral step: beta_tilde_t, beta_t (DDPM section 3.2), or learned; auto: if it was"""
    threshold: Literal["clamp", "dynamic", "none"] = "clamp"
    """x0_hat: clamp to [-1, 1], or divide by its 99.5th percentile (Imagen), or leave"""
    sample_steps: int = 100  # how many of the T timesteps the sampler visits, evenly spaced
    visit: str = ""  # the timesteps that it visits, such as 0-9,49,99; overrides --sample-steps
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm with small variance
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""


# ----------------------------------------------------------------------------------------- loss


def simple_loss(
    net, x0, y, t, eps, alpha_bar, *, prediction="eps", loss="l2", min_snr=0.0, chain=None
):
    """L_simple of each image, (B,): DDPM eq. 14, the mean over its pixels.

    chain: likelihood.make_chain(alpha_bar) for a network with learned variance, which learns from
    L_hybrid = L_simple + 0.001 L_vlb (IDDPM eq. 16).
    """
    x_t = q_sample(x0, t, eps, alpha_bar)
    out = net(x_t, t, y).float()  # (B,C,H,W), or (B,2C,H,W) with the variance
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[loss]
    target = target_of(prediction, x0, eps, alpha_bar[t])
    losses = distance(out[:, : x0.shape[1]], target, reduction="none").mean(dim=(1, 2, 3))
    if min_snr:
        losses = losses * min_snr_weight(prediction, alpha_bar[t], min_snr).float()
    if chain is not None:
        vlb = likelihood.hybrid(out, x0, x_t, t, chain, prediction=prediction)
        losses = losses + 0.001 * vlb.float()
    return losses


# ------------------------------------------------------------------------------------- sampling


@torch.inference_mode()
def sampler(
    net,
    alpha_bar,
    pairs,
    shape,
    seeds,
    y=None,
    *,
    eta=None,
    variance="small",
    guidance=0.0,
    prediction="eps",
    threshold="clamp",
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
    table = sampling_table(alpha_bar, pairs, eta=eta, variance=variance, prediction=prediction)
    if threshold == "dynamic":
        from_x0 = sampling_table(alpha_bar, pairs, eta=eta, variance=variance, prediction="x0")
    x = gaussian((len(seeds), *shape), seeds, -1, device).to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        t = torch.full((len(seeds),), t, device=device)
        if y is None or guidance == 0:
            out, out_uncond = net(x, t, y), None
        else:
            both = torch.cat([y, torch.full_like(y, null)])
            out, out_uncond = net(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        x_prev, x0_hat = sampling_update(
            x,
            out,
            table,
            step,
            out_uncond=out_uncond,
            guidance=guidance,
            seeds=seeds,
            clip=threshold == "clamp",
        )
        if threshold == "dynamic":  # the same step, from another guess
            out = torch.cat([dynamic_threshold(x0_hat), out[:, shape[0] :]], dim=1)
            x_prev, x0_hat = sampling_update(x, out, from_x0, step, seeds=seeds, clip=False)
        x = x_prev
        yield t_prev, x, x0_hat


def alpha_bar_of(cfg):
    return make_alpha_bar(cfg.schedule, cfg.timesteps, cfg.alpha_min)


def walk_options(cfg):
    """The keyword arguments of `sampler`, from the settings."""
    if cfg.eta and cfg.sampler != "ddim":
        raise BadInput(f"--eta {cfg.eta:g} is for --sampler ddim, not {cfg.sampler}")
    auto = "learned" if cfg.learned_variance else "small"
    return dict(
        eta=cfg.eta if cfg.sampler == "ddim" else None,
        variance=auto if cfg.variance == "auto" else cfg.variance,
        guidance=cfg.guidance,
        prediction=cfg.prediction,
        threshold=cfg.threshold,
    )


def draw(net, cfg, world, shape, labels, seeds, desc="sampling"):
    """uint8 images (N,H,W,C), the same on every rank: each draws its share of the N seeds.

    seeds (N,) int64; labels (N,) int64 or None; shape (C,H,W).
    """
    alpha_bar, options = alpha_bar_of(cfg), walk_options(cfg)
    pairs = timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.visit)
    part = -(-cfg.batch_size // world.size)
    parts = torch.arange(len(seeds))[world.share(len(seeds))].split(part)
    images = [torch.empty(0, *shape[1:], shape[0], dtype=torch.uint8)]
    with world.progress(len(parts) * len(pairs), desc=desc) as bar, world.autocast():
        for part in parts:
            y = None if labels is None else labels[part].to(world.device)
            walk = sampler(net, alpha_bar, pairs, shape, seeds[part].to(world.device), y, **options)
            for _, x, _ in walk:  # noqa: B007
                bar.update()
            images.append(to_uint8(x))
    return world.collect(torch.cat(images).to(world.device), len(seeds)).cpu()


def save_reverse(net, cfg, world, shape, labels, seeds, folder):
    """reverse.gif and reverse.png: the first eight samples x_t, and below them their x0_hat."""
    y, seeds = None if labels is None else labels[:8].to(world.device), seeds[:8].to(world.device)
    pairs = timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.visit)
    walk = sampler(net, alpha_bar_of(cfg), pairs, shape, seeds, y, **walk_options(cfg))
    with world.autocast():
        frames = [to_uint8(torch.cat([x, x0_hat])) for _, x, x0_hat in walk]
    save_film(frames, folder / "reverse", len(seeds))


# ------------------------------------------------------------------------------------- training

PICKERS = {"uniform": likelihood.Uniform, "loss_second_moment": likelihood.LossSecondMoment}


def load_data(cfg):
    classes = split_list(cfg.classes)
    return datasets.load(cfg.data, cfg.data_root, size=cfg.size or None, classes=classes)


def train(cfg, world):
    ds = load_data(cfg)
    shape, k = (ds.channels, ds.height, ds.width), ds.num_classes * cfg.conditional
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, shape, k).to(world.device)
    emas = [AveragedModel(net, multi_avg_fn=ema_update(d)).eval() for d in cfg.ema]
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    alpha_bar = alpha_bar_of(cfg).to(world.device)
    picker = PICKERS[cfg.timestep_sampling](cfg.timesteps)
    judge = cfg.metric_every and Judge(
        cfg.data,
        cfg.data_root,
        shape=shape,
        class_names=ds.class_names,
        size=cfg.size,
        classes=cfg.classes,
        device=world.device,
    )
    run = Run(
        cfg.out,
        "ddpm_pixel",
        asdict(cfg),
        world,
        made_of={"data_key": ds.key},
        resume=cfg.resume,
        tensorboard=cfg.tensorboard,
        defaults=asdict(Config()),
    )
    state, start = run.restore(), 0
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        picker.load_state_dict(state["picker"])
        start = state["step"]
        for ema, saved in zip(emas, [state["ema"], *state["more_emas"]], strict=True):
            ema.module.load_state_dict(saved)
            ema.n_averaged.fill_(start)
    sampled, model = emas[0].module, world.wrap(torch.compile(net) if cfg.compile else net)
    options = dict(
        prediction=cfg.prediction,
        loss=cfg.loss,
        min_snr=cfg.min_snr,
        chain=likelihood.make_chain(alpha_bar) if cfg.learned_variance else None,
    )
    mine, meter = world.share(cfg.batch_size), LossMeter(world.device)
    seeds = parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, range(k), cfg.guidance)
    if world.is_main:
        size = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{ds.name}: {len(ds)} images {shape}, {k} classes; network {size:.2f} M parameters")
        x0, _ = batches.batch(ds, np.arange(min(8, len(ds))))
        save_film(forward_film(x0, alpha_bar.cpu()), run.folder / "forward", len(x0))

    bar = world.progress(cfg.steps, start, "training")
    for step in range(start, cfg.steps):
        # All that is random is drawn for the global batch from (seed, step), then shared out.
        rng, batch = np.random.default_rng([cfg.seed, step]), cfg.batch_size
        t_all, weights = picker.sample(rng, batch)
        t = torch.from_numpy(t_all)[mine].to(world.device)
        weights = torch.from_numpy(weights)[mine].to(world.device, torch.float32)
        hide = torch.from_numpy(rng.random(batch) < cfg.label_dropout)[mine]
        noise_seeds = torch.from_numpy(rng.integers(2**62, size=batch))[mine].to(world.device)
        torch.manual_seed(int(rng.integers(2**31)) + world.rank)  # what dropout draws from

        idx = batches.indices(len(ds), batch, cfg.seed, step, world.rank, world.size)
        flips = batches.flips(batch, cfg.seed, step, world.rank, world.size) if cfg.flip else None
        x0, y = batches.batch(ds, idx, flip=flips)  # (B,C,H,W), (B,)
        y = torch.where(hide, k, y).to(world.device) if k else None
        x0 = x0.to(world.device, non_blocking=True)
        eps = gaussian(x0.shape, noise_seeds, step, world.device)

        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts, losses = torch.arange(len(x0)).chunk(cfg.accumulate), []
        for part in parts:
            with world.no_sync(model, part is not parts[-1]), world.autocast():
                y_part = None if y is None else y[part]
                loss = simple_loss(
                    model, x0[part], y_part, t[part], eps[part], alpha_bar, **options
                )  # (b,)
                (loss * weights[part]).sum().div(len(x0)).backward()
            losses.append(loss.detach())
        losses = torch.cat(losses)  # (B,)
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for ema in emas:
            ema.update_parameters(net)
        if cfg.timestep_sampling != "uniform":
            picker.update(t_all, world.collect(losses, batch).cpu())

        meter.add(step, losses, t * 4 // cfg.timesteps)
        step, last = step + 1, step + 1 == cfg.steps
        bar.update()
        if step % cfg.log_every == 0 or last:
            values = meter.read(world, run)
            rate, memory = run.rate((step - start) * batch), peak_memory(world.device)
            run.log(step, **values, lr=lr, images_per_s=rate, peak_memory_mb=memory)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if judge and (step % cfg.metric_every == 0 or last):
            scored = torch.arange(cfg.metric_n)
            asked = labels_for(scored, range(k))
            images = draw(sampled, cfg, world, shape, asked, scored, "scoring")
            run.log(step, **judge(images, asked, world))
            if world.is_main:
                plot_metrics(run)
        if step % cfg.save_every == 0 or last:
            averages = [ema.module.state_dict() for ema in emas]
            run.save(
                step,
                model=net.state_dict(),
                ema=averages[0],
                more_emas=averages[1:],
                optimizer=optimizer.state_dict(),
                picker=picker.state_dict(),
                shape=list(shape),
                class_names=list(ds.class_names),
            )
        if cfg.sample_every and step % cfg.sample_every == 0 and not last:
            images = draw(sampled, cfg, world, shape, labels, seeds)
            if world.is_main:
                save_grid(images[:100], run.folder / f"samples-{step:06d}.png", 10)
                plot_loss(run)
    bar.close()
    images = draw(sampled, cfg, world, shape, labels, seeds)
    if world.is_main:
        plot_loss(run)
        save_samples(run.folder, images, labels, 10)
        save_reverse(sampled, cfg, world, shape, labels, seeds, run.folder)
        print(f"samples: {run.folder / 'samples.png'}")


# ----------------------------------------------------------------------------------------- main


def load_net(path, device, decay=None):
    """(network with the EMA weights, its Config, image shape, class names) from a checkpoint.

    decay chooses among several running means; the first without it. BadInput if it is not there.
    """
    state = as_checkpoint(path) or load_checkpoint(path, "ddpm_pixel")
    known = {f.name for f in fields(Config)}
    cfg = Config(**{k: v for k, v in state["config"].items() if k in known})
    told = state.get("alpha_bar")  # by a published network's scheduler
    if told is not None and not torch.allclose(told, alpha_bar_of(cfg), rtol=1e-3, atol=1e-9):
        raise BadInput(f"{path}: its {cfg.schedule} schedule has other constants than ours")
    averages = dict(zip(cfg.ema, [state["ema"], *state.get("more_emas", ())], strict=True))
    if decay not in (None, *averages):
        raise BadInput(f"--ema {decay:g}: {path} has {', '.join(map(str, averages))}")
    net = make_net(cfg, state["shape"], len(state["class_names"]) * cfg.conditional)
    net.load_state_dict(averages[cfg.ema[0] if decay is None else decay])
    net.without_label = state.get("null_label", True)  # whether it has learned to do without one
    return net.to(device).eval(), cfg, state["shape"], state["class_names"]


# What a command over a checkpoint decides itself; where it is silent, as in training.
SAMPLING = ("sampler", "variance", "threshold", "sample_steps", "visit", "eta", "guidance")
SAMPLING += ("batch_size", "data", "data_root", "size")
FORWARD = ("timesteps", "schedule", "alpha_min", "prediction")  # and of a published network


def open_checkpoint(cfg, path, world):
    """(network, settings, shape, class names), the settings of SAMPLING being those of `cfg`."""
    decay = None if not_given(cfg, ("ema",)) else cfg.ema[0]
    net, trained, shape, classes = load_net(path, world.device, decay)
    names = SAMPLING if trained.data else SAMPLING + FORWARD  # published ones name no data
    given = set(names).difference(not_given(cfg, names))
    given |= {"sample_steps", "batch_size"} if cfg.smoke else set()
    trained = replace(trained, **{name: getattr(cfg, name) for name in given})
    if cfg.nll and not given & {"sample_steps", "visit"}:  # the whole bound
        trained.sample_steps, trained.visit = trained.timesteps, ""
    elif "visit" not in given and "sample_steps" in given:
        trained.visit = ""
    check_guidance(net, trained.guidance, path)
    if trained.variance == "learned" and not trained.learned_variance:
        raise BadInput(f"{path} has no learned variance; type --variance small or large")
    return net, trained, shape, classes


def sample(cfg, world):
    net, trained, shape, names = open_checkpoint(cfg, cfg.sample, world)
    chosen = parse_classes(cfg.classes, names if trained.conditional else ())
    seeds = parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, chosen, trained.guidance)
    images = draw(net, trained, world, shape, labels, seeds)
    if world.is_main:
        folder = folder_of(cfg, cfg.sample)
        save_samples(folder, images, labels, 10)
        save_reverse(net, trained, world, shape, labels, seeds, folder)
        print(f"samples: {folder / 'samples.png'}, their way: {folder / 'reverse.gif'}")


def nll(cfg, world):
    """Bits per dimension of --n held-out images, over all T timesteps where no others are named."""
    net, trained, shape, names = open_checkpoint(cfg, cfg.nll, world)
    pairs = timestep_pairs(trained.timesteps, trained.sample_steps, trained.visit)
    chain = likelihood.make_chain(alpha_bar_of(trained), [t for t, _ in pairs])
    options = {name: walk_options(trained)[name] for name in ("prediction", "variance")}
    where = (chain, world, folder_of(cfg, cfg.nll))
    likelihood.evaluate_held_out(net, trained, shape, names, *where, n=cfg.n, **options)


def export(cfg, world):
    net, trained, shape, names = open_checkpoint(cfg, cfg.export, world)
    save_diffusers(
        cfg.out,
        net.settings,
        net.state_dict(),
        shape,
        len(names) * trained.conditional,
        asdict(trained) | walk_options(trained) | {"alpha_bar": alpha_bar_of(trained)},
    )
    print(f"{cfg.out}: open it with diffusers.DDPMPipeline.from_pretrained")


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    check_run(cfg)
    sizes = ("timesteps", "width", "mult", "blocks", "heads", "accumulate", "sample_steps")
    check_positive(cfg, *sizes, "metric_n", "ema")
    check_not_negative(cfg, "min_snr", "head_channels", "groups", "metric_every")
    check_fraction(cfg, "dropout", "label_dropout", "eta", "alpha_min", "ema")
    if cfg.export and not cfg.out:
        raise BadInput("--export needs --out, the folder to write")
    tasks = [task for task in ("sample", "nll", "export", "plot_schedule") if getattr(cfg, task)]
    if len(tasks) > 1:
        raise BadInput(f"--{tasks[0]} and --{tasks[1]}: one at a time")
    if tasks:
        return  # what follows is of training; those go by what the checkpoint was trained with
    check_schedule(alpha_bar_of(cfg), cfg.prediction)
    if cfg.variance == "learned" and not cfg.learned_variance:
        raise BadInput("--variance learned needs a network with --learned-variance")
    if cfg.metric_every and cfg.metric_n < 2:
        raise BadInput("--metric-n must be at least 2: a covariance is compared")
    walk_options(cfg), timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.visit)


def main():
    preset = str(Path(__file__).parent / "configs/{data}_pixel.yaml")
    cfg = parse(Config, __doc__, preset=preset)
    if cfg.smoke:
        cfg = smaller(
            cfg,
            steps=4,
            batch_size=8,
            width=16,
            n=8,
            sample_steps=4,
            warmup=1,
            log_every=1,
            save_every=2,
            sample_every=2,
            metric_every=0,
            heads=1,
            head_channels=0,
            groups=0,
            resume="never",
            out="runs/smoke-pixel",
        )
    check(cfg)
    if cfg.plot_schedule:
        path = Path(cfg.out or "runs") / "schedules.png"
        plot_schedules(path, cfg.timesteps, cfg.alpha_min)
        print(f"schedules: {path}")
    elif cfg.sample or cfg.nll or cfg.export:
        launch(sample if cfg.sample else nll if cfg.nll else export, cfg)
    else:
        load_data(cfg)  # prepared once, before there are several processes
        launch(train, replace(cfg, out=cfg.out or f"runs/pixel-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    entry(main)
