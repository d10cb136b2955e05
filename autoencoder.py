"""The first stage of chapter 3: an autoencoder, and the latents of a whole data set.

Kingma, Welling, "Auto-Encoding Variational Bayes", 2014 (arXiv:1312.6114).
Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1: LDM.

The encoder gives the mean and variance of a Gaussian q(z|x), the decoder an image for any z drawn
from it. A weak pull of q towards N(0, I) keeps latents near each other without blurring the images;
what is left of their scale is measured afterwards and multiplied away (by 1 / their standard
deviation), because diffusion expects data of unit variance.

    python ldm_cfg.py --stage autoencoder       trains only this; look at
    runs/ldm-glyphs/autoencoder/reconstructions.png

`ldm_cfg.py` holds the settings and calls train() and cache_latents().
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import runtime
from kernels import gaussian, group_norm_silu


class Norm(nn.GroupNorm):
    """GroupNorm, optionally a scale and shift (B,C) per sample, and SiLU, in one operation.

    At most 32 groups, and never of one channel, which would lose what is added to the channel.
    """

    def __init__(self, channels, silu=True):
        super().__init__(1 if channels % 2 else math.gcd(32, channels // 2), channels)
        self.silu = silu

    def forward(self, x, scale=None, shift=None):
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias,
            eps=self.eps, scale=scale, shift=shift, silu=self.silu,
        )  # fmt: skip


def conv(c_in, c_out, kernel=3, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


def zero(layer):
    """Start a layer at zero: the residual branch that it ends at first adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two convolutions on a residual branch; an embedding, if any, modulates the second norm."""

    def __init__(self, c_in, c_out, c_emb=0):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in), conv(c_in, c_out)
        self.emb = zero(nn.Linear(c_emb, 2 * c_out)) if c_emb else None
        self.norm2, self.conv2 = Norm(c_out), zero(conv(c_out, c_out))
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(self.norm1(x))  # (B,c_out,H,W)
        scale, shift = self.emb(emb).chunk(2, dim=1) if self.emb else (None, None)  # (B,c_out)
        return self.skip(x) + self.conv2(self.norm2(h, scale, shift))


class Autoencoder(nn.Module):
    """KL-regularised autoencoder (LDM section 3.1): images (B,C,H,W) <-> latents (B,z,H/f,W/f).

    f = patch * 2^(len(mult)-1). The image is folded by `patch` at once (space to depth), because
    convolutions at full resolution would cost most and see least.
    """

    def __init__(self, channels, patch, width, mult, blocks, z_channels):
        super().__init__()
        widths = [width * m for m in mult]
        self.factor = patch * 2 ** (len(mult) - 1)
        encoder = [nn.PixelUnshuffle(patch), conv(channels * patch**2, widths[0])]
        decoder = [conv(z_channels, widths[-1])]
        for level, c in enumerate(widths):
            if level:
                encoder.append(conv(widths[level - 1], c, stride=2))
            encoder += [ResBlock(c, c) for _ in range(blocks)]
        for level, c in reversed(list(enumerate(widths))):
            decoder += [ResBlock(c, c) for _ in range(blocks)]
            if level:
                decoder += [nn.Upsample(scale_factor=2.0), conv(c, widths[level - 1])]
        self.encoder = nn.Sequential(*encoder, Norm(widths[-1]), conv(widths[-1], 2 * z_channels))
        self.decoder = nn.Sequential(
            *decoder, Norm(widths[0]), conv(widths[0], channels * patch**2), nn.PixelShuffle(patch)
        )

    def encode(self, x):
        """(mean, log-variance) of q(z|x), both (B,z,H/f,W/f)."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def decode(self, z):
        """(B,C,H,W), not clamped."""
        return self.decoder(z)

    def forward(self, x, noise):
        mean, log_var = self.encode(x)
        return self.decode(mean + (0.5 * log_var).exp() * noise), mean, log_var


def autoencoder_loss(ae, x, noise, kl_weight):
    """Of each image, (B,): mean |x - x_hat| + kl_weight * mean over z of KL(q(z|x) || N(0, 1))."""
    x_hat, mean, log_var = ae(x, noise)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))
    return (x - x_hat.float()).abs().mean(dim=(1, 2, 3)) + kl_weight * kl


def make_autoencoder(cfg, shape):
    """The autoencoder for images of `shape` (C,H,W); BadInput for sizes that it cannot halve."""
    ae = Autoencoder(shape[0], cfg.patch, cfg.ae_width, cfg.ae_mult, cfg.ae_blocks, cfg.z_channels)
    if shape[1] % ae.factor or shape[2] % ae.factor:
        near = -(-min(shape[1:]) // ae.factor) * ae.factor
        raise runtime.BadInput(
            f"images of {shape[1]}x{shape[2]} cannot be made {ae.factor} times smaller by the "
            f"autoencoder; sizes must be multiples of {ae.factor}: type --size {near}"
        )
    return ae.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- training


def settings(cfg):
    """The part of the configuration that decides what the autoencoder's weights are."""
    names = (
        "data", "size", "classes", "flip", "patch", "ae_width", "ae_mult", "ae_blocks",
        "z_channels", "kl_weight", "ae_steps", "ae_lr", "batch_size", "warmup", "clip_grad", "seed",
    )  # fmt: skip
    return {name: getattr(cfg, name) for name in names}


def train(cfg, world, ds):
    """The trained autoencoder, on every rank: resumed where it stopped, at once if it is done."""
    torch.manual_seed(cfg.seed)
    ae = make_autoencoder(cfg, (ds.channels, ds.height, ds.width)).to(world.device)
    optimizer = torch.optim.Adam(ae.parameters(), lr=cfg.ae_lr)
    run = runtime.Run(
        Path(cfg.out) / "autoencoder", "autoencoder", settings(cfg), world,
        made_of={"data_key": ds.key}, tensorboard=cfg.tensorboard,
        resume=cfg.resume if cfg.resume == "never" else "auto",
    )  # fmt: skip
    state, start = run.restore(), 0
    if state:
        ae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if world.is_main:
        count = sum(p.numel() for p in ae.parameters()) / 1e6
        done = ", done before" if start == cfg.ae_steps else ""
        print(f"autoencoder: {count:.2f} M parameters, {cfg.ae_steps} steps{done}")
    picture = run.folder / "reconstructions.png"
    if start == cfg.ae_steps:
        ae.eval().requires_grad_(False)
        if world.is_main and not picture.exists():  # killed just before it was drawn
            show_reconstructions(ae, ds, world.device, picture)
        return ae

    model = world.wrap(torch.compile(ae) if cfg.compile else ae)
    mine, meter = world.share(cfg.batch_size), runtime.LossMeter(world.device)
    z_shape = (cfg.z_channels, ds.height // ae.factor, ds.width // ae.factor)
    bar = world.progress(cfg.ae_steps, start, "autoencoder")
    for step in range(start, cfg.ae_steps):
        rng, batch = np.random.default_rng([cfg.seed, step, 1]), cfg.batch_size
        noise_seeds = torch.from_numpy(rng.integers(2**62, size=batch))[mine].to(world.device)
        noise = gaussian((len(noise_seeds), *z_shape), noise_seeds, step, world.device)
        idx = data.indices(len(ds), batch, cfg.seed, step, world.rank, world.size)
        flips = data.flips(batch, cfg.seed, step, world.rank, world.size) if cfg.flip else None
        x, _ = data.batch(ds, idx, flip=flips)  # (B,C,H,W)

        lr = runtime.learning_rate(step, cfg.ae_steps, cfg.ae_lr, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with world.autocast():
            losses = autoencoder_loss(model, x.to(world.device), noise, cfg.kl_weight)  # (B,)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(ae.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        meter.add(step, losses)
        step, last = step + 1, step + 1 == cfg.ae_steps
        bar.update()
        if step % cfg.log_every == 0 or last:
            values = meter.read(world, run)
            run.log(step, **values, lr=lr, images_per_s=run.rate((step - start) * batch))
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if step % cfg.save_every == 0 or last:
            run.save(step, model=ae.state_dict(), optimizer=optimizer.state_dict())
    bar.close()
    ae.eval().requires_grad_(False)
    if world.is_main:
        runtime.plot_loss(run)
        show_reconstructions(ae, ds, world.device, picture)
    return ae


@torch.inference_mode()
def show_reconstructions(ae, ds, device, path, n=50):
    """A grid of images, each row of ten above the row of their reconstructions; prints the PSNR."""
    x, _ = data.batch(ds, np.arange(min(n, len(ds))))
    x_hat = ae.decode(ae.encode(x.to(device))[0]).clamp(-1, 1).cpu()
    psnr = 10 * torch.log10(4 / (x - x_hat).square().mean(dim=(1, 2, 3))).mean()
    rows = zip(runtime.to_uint8(x).split(10), runtime.to_uint8(x_hat).split(10), strict=True)
    runtime.save_grid(torch.cat([half for row in rows for half in row]), path, columns=10)
    print(f"reconstructions: PSNR {psnr:.1f} dB over {len(x)} training images, {path}")


# -------------------------------------------------------------------------------------- latents


def weights_hash(net):
    """Twelve hex digits that name these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.inference_mode()
def cache_latents(cfg, world, ds, ae, batch=256):
    """(moments, scale): what the encoder says of every image, and what makes latents unit variance.

    moments  memory map (N, h, w, 2z) float32: mean and log-variance; with cfg.flip N doubles and
             row len(ds) + i is image i flipped
    scale    1 / the standard deviation of all numbers of all latents, about their mean
             (LDM appendix G)

    Kept in out/latents with a manifest of the data and weights that it came from; made anew when
    either is another.
    """
    folder = Path(cfg.out) / "latents"
    made_of = {"data_key": ds.key, "autoencoder": weights_hash(ae), "flip": cfg.flip}
    manifest, path = folder / "manifest.json", folder / "moments.npy"
    if manifest.exists():
        kept = json.loads(manifest.read_text())
        if kept["made_of"] == made_of:
            return np.load(path, mmap_mode="r"), kept["scale"]
    world.barrier()  # every rank has read the old manifest before it goes

    n, views = len(ds), 2 if cfg.flip else 1
    shape = (n * views, ds.height // ae.factor, ds.width // ae.factor, 2 * cfg.z_channels)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        need, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
        if free < need:  # asked first, because a full disk kills whoever writes a memory map
            raise runtime.BadInput(
                f"{folder} needs {need >> 20} MiB for latents and has {free >> 20}: free some, or "
                "type another --out"
            )
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
    world.barrier()
    moments, mine = np.load(path, mmap_mode="r+"), np.arange(n)[world.share(n)]
    sums = torch.zeros(3, dtype=torch.float64)  # of 1, z and z^2
    with world.progress(len(mine) * views, desc="latents") as bar:
        for view in range(views):
            for idx in np.array_split(mine, max(1, len(mine) // batch)):
                flips = np.full(len(idx), bool(view))
                x, _ = data.batch(ds, idx, flip=flips)
                mean, log_var = ae.encode(x.to(world.device))
                rows = torch.cat([mean, log_var], dim=1).permute(0, 2, 3, 1)  # (B,h,w,2z)
                moments[view * n + idx] = rows.cpu().numpy()
                mean, var = mean.double(), log_var.double().exp()
                sums += torch.stack([
                    torch.tensor(float(mean.numel())), mean.sum().cpu(), (mean**2 + var).sum().cpu()
                ])  # fmt: skip
                bar.update(len(idx))
    moments.flush()
    count, total, square = world.sum(sums.to(world.device)).tolist()
    scale = (square / count - (total / count) ** 2) ** -0.5
    world.barrier()
    if world.is_main:
        with runtime.atomic_write(manifest) as temporary:
            temporary.write_text(json.dumps({"made_of": made_of, "scale": scale}))
        print(f"latents: {shape[0]} of {shape[1]}x{shape[2]}x{cfg.z_channels}, scale {scale:.4f}")
    world.barrier()
    return np.load(path, mmap_mode="r"), scale


def latent_batch(moments, rows, noise):
    """Latents z ~ q(z|x), (B,z,h,w) float32 channels_last, for rows of the cache and noise."""
    part = torch.from_numpy(moments[rows]).permute(0, 3, 1, 2)  # (B,2z,h,w), channels_last memory
    mean, log_var = part.chunk(2, dim=1)
    return mean + (0.5 * log_var).exp() * noise
