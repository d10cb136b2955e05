"""The latents of a whole data set, encoded once and kept: chapter 3 trains on these.

Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1 and appendix G.

The autoencoder is frozen when diffusion starts, so encoding an image again in every epoch would be
waste: it costs several times what a step on its latent does. What is kept of an image is the mean
and log-variance of q(z|x), from which each step draws its own z, as if it had encoded the image.
(A codebook has no distribution: its log-variance is -30, and z what the encoder gave.)

    moments, scale = cache_latents(cfg, world, ds, ae)        once; the next time it is found
    z0 = scale * latent_batch(moments, rows, noise)           in every step
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.training import weights_hash

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch

from image_data import batches

MADE_OF = {
    "data_key": "other images",
    "autoencoder": "another autoencoder",
    "flip": "another --flip",
}


@torch.inference_mode()
def cache_latents(cfg, world, ds, ae, batch=64):
    """(moments, scale): what the encoder says of every image, and what makes latents unit variance.

    moments  memory map (N, h, w, 2z) float32: mean and log-variance; with cfg.flip N doubles and
             row len(ds) + i is image i flipped
    scale    1 / the standard deviation of all numbers of all latents, about their mean
             (LDM appendix G)

    Kept in out/latents with a manifest of the data (whose key names the pixels, so their size too)
    and the weights that it came from; made anew, with one line that says why, when they are others.
    """
    folder = Path(cfg.out) / "latents"
    made_of = {"data_key": ds.key, "autoencoder": weights_hash(ae), "flip": cfg.flip}
    manifest, path = folder / "manifest.json", folder / "moments.npy"
    if manifest.exists() and path.exists():
        kept = json.loads(manifest.read_text())
        if kept["made_of"] == made_of:
            return np.load(path, mmap_mode="r"), kept["scale"]
        others = [told for name, told in MADE_OF.items() if kept["made_of"][name] != made_of[name]]
        if world.is_main:
            print(f"latents: made anew, those in {folder} are of {' and of '.join(others)}")
    world.barrier()  # every rank has read the old manifest before it goes

    n, views = len(ds), 2 if cfg.flip else 1
    shape = (n * views, ds.height // ae.factor, ds.width // ae.factor, 2 * ae.z_channels)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        need, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
        if free < need:  # asked first, because a full disk kills whoever writes a memory map
            raise BadInput(
                f"{folder} needs {need >> 20} MiB for latents and has {free >> 20}: free some, or "
                "type another --out"
            )
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
    world.barrier()
    moments, mine = np.load(path, mmap_mode="r+"), np.arange(n)[world.share(n)]
    sums = torch.zeros(3, dtype=torch.float64)  # of 1, z and z^2
    with world.progress(len(mine) * views, desc="latents") as bar:
        for view in range(views):
            for idx in (mine[i : i + batch] for i in range(0, len(mine), batch)):
                flips = np.full(len(idx), bool(view))
                x, _ = batches.batch(ds, idx, flip=flips)
                mean, log_var = ae.encode(x.to(world.device))
                rows = torch.cat([mean, log_var], dim=1).permute(0, 2, 3, 1)  # (B,h,w,2z)
                moments[view * n + idx] = rows.cpu().numpy()
                mean, var = mean.double(), log_var.double().exp()
                sums += torch.stack(
                    [
                        torch.tensor(float(mean.numel())),
                        mean.sum().cpu(),
                        (mean**2 + var).sum().cpu(),
                    ]
                )
                bar.update(len(idx))
    moments.flush()
    count, total, square = world.sum(sums.to(world.device)).tolist()
    scale = (square / count - (total / count) ** 2) ** -0.5
    world.barrier()
    if world.is_main:
        with atomic_write(manifest) as temporary:
            temporary.write_text(json.dumps({"made_of": made_of, "scale": scale}))
        print(f"latents: {shape[0]} of {shape[1]}x{shape[2]}x{ae.z_channels}, scale {scale:.4f}")
    world.barrier()
    return np.load(path, mmap_mode="r"), scale


def moments_on(moments, device, share=1 / 3):
    """The cache as a tensor on a GPU, if it takes at most `share` of the free memory there.

    Else, and on the CPU, the memory map as it is: the operating system keeps what is read often.
    """
    if device.type != "cuda" or moments.nbytes > share * torch.cuda.mem_get_info(device)[0]:
        return moments
    return torch.from_numpy(np.array(moments)).to(device)


def latent_batch(moments, rows, noise):
    """Latents z ~ q(z|x), (B,z,h,w) float32 channels_last, for rows of the cache and noise.

    moments: of cache_latents or moments_on; noise (B,z,h,w) is where the latents are wanted.
    """
    if isinstance(moments, torch.Tensor):
        part = moments[torch.from_numpy(rows).to(moments.device)]  # (B,h,w,2z)
    else:
        part = torch.from_numpy(moments[rows]).to(noise.device)
    mean, log_var = part.permute(0, 3, 1, 2).chunk(2, dim=1)  # (B,z,h,w), channels_last memory
    return mean + (0.5 * log_var).exp() * noise
