"""The first stage of chapter 3: an autoencoder.

Kingma, Welling, "Auto-Encoding Variational Bayes", 2014 (arXiv:1312.6114).
Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1: LDM.
Esser et al., "Taming Transformers", 2021 (arXiv:2012.09841): the loss of sharp images.

The encoder gives the mean and variance of a Gaussian q(z|x), the decoder an image for any z drawn
from it. A weak pull of q towards N(0, I) keeps latents near each other without blurring the images;
`image_data/latents.py` measures afterwards what is left of their scale.

    python ldm_cfg.py --stage autoencoder       trains only this; look at
    runs/ldm-glyphs/autoencoder/reconstructions.png
    python eval_fid.py runs/ldm-glyphs/autoencoder/reconstructions.npz glyphs:test

`--ae` chooses which: kl (this), vq (this with the codebook of `networks/vq.py`), ldm (the network
of `networks/kl_autoencoder.py`), or a published one by its path, which is not trained.
`networks/perceptual.py` has the further terms of the loss and the figures. `ldm_cfg.py` holds the
settings and calls train().
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from image_data import batches, datasets
from kernels import gaussian
from networks import adm_unet as unet
from networks.kl_autoencoder import KLVAE, build, load_pretrained
from networks.perceptual import Adversary, load_perceptual, psnr, ssim
from networks.vq import Codebook, VQAutoencoder
from runtime.commandline import (
    BadInput,
    check_fraction,
    check_not_negative,
    check_positive,
    split_list,
)
from runtime.files import atomic_write
from runtime.pictures import save_grid, to_uint8
from runtime.run import Run, load_checkpoint
from runtime.training import LossMeter, learning_rate, plot_loss, weights_hash


class Norm(unet.Norm):
    """Chapter 1's, of at most 32 groups, and never of one channel: that would lose what is added to
    the channel."""

    def __init__(self, channels):
        super().__init__(1 if channels % 2 else math.gcd(32, channels // 2), channels)


def conv(c_in, c_out, kernel=3, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


class ResBlock(nn.Module):
    """Two convolutions on a residual branch."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), conv(channels, channels)
        self.norm2, self.conv2 = Norm(channels), unet.zero(conv(channels, channels))

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))  # (B,C,H,W)


class Autoencoder(nn.Module):
    """KL-regularised autoencoder (LDM section 3.1): images (B,C,H,W) <-> latents (B,z,H/f,W/f).

    f = patch * 2^(len(mult)-1). The image is folded by `patch` at once (space to depth), because
    convolutions at full resolution would cost most and see least. Without `variance` the latents
    are no distribution: encode gives log-variances of -30.
    """

    def __init__(self, channels, patch, width, mult, blocks, z_channels, variance=True):
        super().__init__()
        widths = [width * m for m in mult]
        self.factor, self.z_channels = patch * 2 ** (len(mult) - 1), z_channels
        self.variance = variance
        encoder = [nn.PixelUnshuffle(patch), conv(channels * patch**2, widths[0])]
        decoder = [conv(z_channels, widths[-1])]
        for level, c in enumerate(widths):
            if level:
                encoder.append(conv(widths[level - 1], c, stride=2))
            encoder += [ResBlock(c) for _ in range(blocks)]
        for level, c in reversed(list(enumerate(widths))):
            decoder += [ResBlock(c) for _ in range(blocks)]
            if level:
                decoder += [nn.Upsample(scale_factor=2.0), conv(c, widths[level - 1])]
        numbers = 2 * z_channels if variance else z_channels
        self.encoder = nn.Sequential(*encoder, Norm(widths[-1]), conv(widths[-1], numbers))
        self.decoder = nn.Sequential(
            *decoder, Norm(widths[0]), conv(widths[0], channels * patch**2), nn.PixelShuffle(patch)
        )

    def encode(self, x):
        """(mean, log-variance) of q(z|x), both (B,z,H/f,W/f), float32 under autocast, too."""
        if not self.variance:
            mean = self.encoder(x).float()
            return mean, torch.full_like(mean, -30.0)
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def decode(self, z):
        """(B,C,H,W), not clamped."""
        return self.decoder(z)

    def forward(self, x, noise):
        mean, log_var = self.encode(x)
        return self.decode(mean + (0.5 * log_var).exp() * noise), mean, log_var


def kl_divergence(mean, log_var):
    """Of each image, (B,): KL(q(z|x) || N(0, 1)), a mean over the numbers of z."""
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))


TRAINED = ("kl", "vq", "ldm")  # kinds of autoencoders; other names are paths


def make_autoencoder(cfg, shape, made_of=None):
    """The autoencoder `cfg.ae` for images of `shape` (C,H,W).

    A path is that of a published one, or of a checkpoint of one trained here. ae.made_of are plain
    settings that tell its network; with them nothing is read, and weights are to be loaded. Raises
    BadInput for sizes that it cannot halve, other channels than the images', and unknown names.
    """
    if made_of and made_of["kind"] == "here":
        known = {k: v for k, v in (LATER | made_of["settings"]).items() if hasattr(cfg, k)}
        ae = make_autoencoder(replace(cfg, **known), shape)
        ae.made_of = made_of
        return ae
    sizes = (cfg.ae_width, cfg.ae_mult, cfg.ae_blocks, cfg.z_channels)
    if cfg.ae == "kl":
        ae = Autoencoder(shape[0], cfg.patch, *sizes)
    elif cfg.ae == "vq":
        ae = Autoencoder(shape[0], cfg.patch, *sizes, variance=False)
        ae = VQAutoencoder(ae, Codebook(cfg.codebook, cfg.z_channels))
    elif cfg.ae == "ldm":
        ae = KLVAE(shape[0], *sizes)
        if ae.factor == 1:
            raise BadInput("--ae ldm halves at every level: type --ae-mult 1 2 4 4")
    elif made_of:
        ae = build(**made_of)
    elif own := own_checkpoint(cfg.ae):
        ae = make_autoencoder(cfg, shape, {"kind": "here", "settings": own["config"]})
        ae.load_state_dict(own["model"])
        return ae
    elif cfg.ae and Path(cfg.ae).exists():
        ae, _ = load_pretrained(cfg.ae)
        if ae.channels != shape[0]:
            raise BadInput(
                f"--ae {cfg.ae} takes images of {ae.channels} channels, these have {shape[0]}; "
                "leave it out to train one"
            )
    else:
        raise BadInput(
            f"--ae {cfg.ae}: expected {', '.join(TRAINED)}, or the file or folder of a published "
            "autoencoder, which is not there"
        )
    if shape[1] % ae.factor or shape[2] % ae.factor:
        near = -(-min(shape[1:]) // ae.factor) * ae.factor
        raise BadInput(
            f"images of {shape[1]}x{shape[2]} cannot be made {ae.factor} times smaller by the "
            f"autoencoder; sizes must be multiples of {ae.factor}: type --size {near}"
        )
    ae.made_of = getattr(ae, "made_of", None)
    return ae.to(memory_format=torch.channels_last)


def own_checkpoint(path):
    """The checkpoint of an autoencoder trained here, or None where `path` is something else."""
    if not path.endswith(".pt"):
        return None
    try:
        return load_checkpoint(path, "autoencoder")
    except BadInput:
        return None


def check(cfg):
    """Raise BadInput for a setting of the autoencoder out of its range."""
    check_positive(
        cfg,
        "patch",
        "ae_width",
        "ae_mult",
        "ae_blocks",
        "z_channels",
        "ae_steps",
        "ae_lr",
        "codebook",
        "commitment",
        "perceptual_weight",
    )
    check_not_negative(cfg, "discriminator", "disc_start")
    check_fraction(cfg, "kl_weight")
    if cfg.discriminator and cfg.disc_start >= cfg.ae_steps:
        told = f"--disc-start {cfg.disc_start} is not before --ae-steps {cfg.ae_steps}"
        raise BadInput(f"{told}: the discriminator would never start")


# ------------------------------------------------------------------------------------- training

LATER = {  # settings that came later, and what they were before: see settings()
    "ae": "kl",
    "codebook": 512,
    "commitment": 0.25,
    "perceptual_weight": 1.0,
    "discriminator": 0.0,
    "disc_start": 1000,
}


def settings(cfg):
    """The part of the configuration that decides what the autoencoder's weights are.

    Those of LATER stand in it only where they are not as before, so that older runs go on.
    """
    names = (
        "data",
        "size",
        "classes",
        "flip",
        "patch",
        "ae_width",
        "ae_mult",
        "ae_blocks",
        "z_channels",
        "kl_weight",
        "ae_steps",
        "ae_lr",
        "batch_size",
        "warmup",
        "clip_grad",
        "seed",
    )
    later = {name: getattr(cfg, name) for name in LATER}
    return {name: getattr(cfg, name) for name in names} | {
        name: value for name, value in later.items() if value != LATER[name]
    }


def loss_terms(cfg, ae, model, x, noise, perceptual):
    """(losses by name, the reconstruction loss, what the network gave); losses of each image, (B,).

    The reconstruction loss is mean |x - x_hat|, by name "l1", and the perceptual distance, if any.
    "loss" is that and the pull on the latents: KL for a Gaussian q(z|x), commitment for a codebook.
    model is ae, or what wraps it for training; it gives x_hat (B,C,H,W), the latents' means
    (B,z,h,w), and their log-variances, or the codes (B,h,w).
    """
    x_hat, z, rest = model(x, noise)
    terms = {"l1": (x - x_hat.float()).abs().mean(dim=(1, 2, 3))}
    reconstruction = terms["l1"]
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_hat)
        reconstruction = reconstruction + cfg.perceptual_weight * terms["perceptual"]
    if isinstance(ae, VQAutoencoder):
        terms["commitment"] = ae.codebook.commitment(z, rest)
        pull = cfg.commitment * terms["commitment"]
    else:
        terms["kl"] = kl_divergence(z, rest)
        pull = cfg.kl_weight * terms["kl"]
    return {"loss": reconstruction + pull, **terms}, reconstruction, (x_hat, z, rest)


def train(cfg, world, ds):
    """The autoencoder, on every rank, frozen: trained, or going on where it stopped, or read.

    Beside its checkpoints lie pictures and figures of images that it has not seen: see report().
    """
    torch.manual_seed(cfg.seed)
    shape, folder = (ds.channels, ds.height, ds.width), Path(cfg.out) / "autoencoder"
    ae = make_autoencoder(cfg, shape).to(world.device)
    count = sum(p.numel() for p in ae.parameters()) / 1e6
    if cfg.ae not in TRAINED:
        if world.is_main:
            print(f"autoencoder: {count:.2f} M parameters, read from {cfg.ae}")
        report(cfg, world, ae, ds, folder)
        return ae
    optimizer = torch.optim.Adam(ae.parameters(), cfg.ae_lr, fused=world.device.type == "cuda")
    made_of, perceptual, adversary = {"data_key": ds.key}, None, None
    if cfg.perceptual:
        perceptual = load_perceptual(cfg.perceptual, shape).to(world.device)
        made_of["perceptual"] = weights_hash(perceptual)
    if cfg.discriminator:
        width = min(64, cfg.ae_width)
        adversary = Adversary(shape, cfg.discriminator, width, cfg.ae_lr, world)
    run = Run(
        folder,
        "autoencoder",
        settings(cfg),
        world,
        made_of=made_of,
        tensorboard=cfg.tensorboard,
        resume=cfg.resume if cfg.resume == "never" else "auto",
        defaults=LATER,
    )
    state, start = run.restore(), 0
    if state:
        ae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if adversary:
            adversary.load_state_dict(state["adversary"])
        start = state["step"]
    if world.is_main:
        done = ", done before" if start == cfg.ae_steps else ""
        print(f"autoencoder: {count:.2f} M parameters, {cfg.ae_steps} steps{done}")
    if start < cfg.ae_steps:
        fit(cfg, world, ds, run, start, ae, optimizer, perceptual, adversary)
    ae.eval().requires_grad_(False)
    report(cfg, world, ae, ds, folder)
    return ae


def fit(cfg, world, ds, run, start, ae, optimizer, perceptual, adversary):
    """Train `ae` in place from step `start` to cfg.ae_steps, with log and checkpoints in `run`."""
    if adversary and cfg.compile:  # its weight needs two more passes backwards through one graph
        torch._functorch.config.donated_buffer = False
    model = world.wrap(torch.compile(ae) if cfg.compile else ae)
    last_layer = [p for p in ae.decoder.parameters() if p.ndim > 1][-1]  # its weight
    codebook = ae.codebook if isinstance(ae, VQAutoencoder) else None
    mine, meters = world.share(cfg.batch_size), {}
    z_shape = (ae.z_channels, ds.height // ae.factor, ds.width // ae.factor)
    bar = world.progress(cfg.ae_steps, start, "autoencoder")
    for step in range(start, cfg.ae_steps):
        rng, batch = np.random.default_rng([cfg.seed, step, 1]), cfg.batch_size
        noise_seeds = torch.from_numpy(rng.integers(2**62, size=batch))[mine].to(world.device)
        noise = gaussian((len(noise_seeds), *z_shape), noise_seeds, step, world.device)
        idx = batches.indices(len(ds), batch, cfg.seed, step, world.rank, world.size)
        flips = batches.flips(batch, cfg.seed, step, world.rank, world.size) if cfg.flip else None
        x = batches.batch(ds, idx, flip=flips)[0].to(world.device)  # (B,C,H,W)

        lr = learning_rate(step, cfg.ae_steps, cfg.ae_lr, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with world.autocast():
            terms, reconstruction, given = loss_terms(cfg, ae, model, x, noise, perceptual)
            loss, (x_hat, z, rest) = terms["loss"].mean(), given
            if adversary and step >= cfg.disc_start:
                loss = loss + adversary.generator_loss(x_hat, reconstruction.mean(), last_layer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ae.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if codebook:
            codebook.update(z.detach(), rest, world, [cfg.seed, step, 3])
        if adversary and step >= cfg.disc_start:
            terms["disc"] = adversary.learn(x, x_hat.float(), lr)

        for name, losses in terms.items():
            meters.setdefault(name, LossMeter(world.device)).add(step, losses)
        step, last = step + 1, step + 1 == cfg.ae_steps
        bar.update()
        if step % cfg.log_every == 0 or last:
            values = {name: meter.read(world, run)["loss"] for name, meter in meters.items()}
            values |= codebook.report() if codebook else {}
            run.log(step, **values, lr=lr, images_per_s=run.rate((step - start) * batch))
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if step % cfg.save_every == 0 or last:
            more = {"adversary": adversary.state_dict()} if adversary else {}
            run.save(step, model=ae.state_dict(), optimizer=optimizer.state_dict(), **more)
    bar.close()
    plot_loss(run)


# ------------------------------------------------------------------------------ reconstructions


def held_out(cfg, ds):
    """(images not trained on, ""); without such images (training images, why)."""
    classes, size = split_list(cfg.classes), cfg.size or None
    try:
        test = datasets.load(cfg.data, cfg.data_root, split="test", size=size, classes=classes)
    except BadInput as error:
        return ds, f"no test images ({error})"
    if (test.channels, test.height, test.width) != (ds.channels, ds.height, ds.width):
        return ds, "the test images are of another size"
    return test, "" if test.key != ds.key else "there are no others"


@torch.inference_mode()
def report(cfg, world, ae, ds, folder, batch=64):
    """Encode and decode held-out images, at least 50 and at most cfg.n_eval, without noise.

    reconstructions.png   fifty images, each row of ten above the row of their reconstructions
    reconstructions.npz   with cfg.n_eval, all reconstructions: eval_fid.py tells their distance
    reconstructions.json  mean PSNR (dB) and SSIM, of what, and by which weights; one line is
                          printed. Nothing is done where just this has been reported before.
    """
    path = folder / "reconstructions.json"
    images, why = held_out(cfg, ds)
    count = min(len(images), max(50, cfg.n_eval))
    made_by, known = {"autoencoder": weights_hash(ae), "data": images.key, "n": count}, False
    if world.is_main and path.exists():
        told = json.loads(path.read_text())
        known = made_by.items() <= told.items()
        known = known and (not cfg.n_eval or (folder / "reconstructions.npz").exists())
    if world.sum(torch.tensor(float(known), device=world.device)) > 0:
        return
    chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)  # of all classes
    found, figures = [], []
    for part in np.split(chosen[world.share(count)], range(batch, count, batch)):
        if len(part):
            x = batches.batch(images, part)[0].to(world.device)  # (B,C,H,W)
            x_hat = ae.decode(ae.encode(x)[0]).clamp(-1, 1)
            found.append(to_uint8(x_hat))
            figures.append(torch.stack([psnr(x, x_hat), ssim(x, x_hat)], dim=1))  # (B,2)
    empty = torch.empty(0, ds.height, ds.width, ds.channels, dtype=torch.uint8)
    found = world.collect(torch.cat([empty, *found]).to(world.device), count).cpu()
    figures = torch.cat([torch.zeros(0, 2, dtype=torch.float64, device=world.device), *figures])
    decibels, similar = world.collect(figures, count).mean(0).tolist()
    if not world.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shown = np.linspace(0, count - 1, min(50, count)).astype(np.int64)
    x = torch.from_numpy(images.images[chosen[shown]])
    rows = zip(x.split(10), found[shown].split(10), strict=True)
    picture = folder / "reconstructions.png"
    for stale in ("reconstructions.json", "reconstructions.npz", "eval.json"):
        (folder / stale).unlink(missing_ok=True)  # what is told must never be of others
    save_grid(torch.cat([half for row in rows for half in row]), picture, columns=10)
    if cfg.n_eval:
        with atomic_write(folder / "reconstructions.npz") as temporary:
            np.savez(temporary, found.numpy(), images.labels[chosen])
    told = made_by | {"held_out": not why, "psnr": decibels, "ssim": similar}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n")
    whose = f"training images: {why}" if why else "held-out images"
    print(f"reconstructions: PSNR {decibels:.1f} dB, SSIM {similar:.3f} over {count} {whose}")
