"""The latents of a whole data set, encoded once and kept: latent diffusion trains on these.

Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1 and appendix G.

The autoencoder is frozen when diffusion starts, so encoding an image again in every epoch would be
waste: it costs several times what a step on its latent does. What is kept of an image is the mean
and log-variance of q(z|x), from which each step draws its own z, as if it had encoded the image.
(A codebook has no distribution: its log-variance is -30, and z what the encoder gave.)

    latents = cache_latents(folder, world, ds, ae.encode, ...)      once; the next time it is found
    run = Run(cfg, world, latents, net=net, ...)                    a data set like any other
    moments, y = run.images(part)                                   (b,2z,h,w), (b,)
    mean, log_var = moments.chunk(2, dim=1)
    z0 = latents.scale * (mean + (0.5 * log_var).exp() * noise)     of unit variance
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write, read_json, reserve, writing
from runtime.locks import alone
from runtime.nodes import Disks
from runtime.plan import Method, cost_of, forms_of
from runtime.processes import exact
from runtime.rehearsal import Rehearsal
from runtime.sums import is_checked, mapped, mark_checked, sum_of

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

FILES = ("moments.npy", "manifest.json")


@dataclass(frozen=True)
class Latents:
    """What an encoder says of every image of a data set, in the place of that data set.

    moments  memory map, or tensor on a GPU, (N * views, h, w, 2z) float32: mean and log-variance.
             There are two views where images are flipped, and row N + i is image i flipped
    scale    1 / the standard deviation of all numbers of all latents, about their mean
             (LDM appendix G)
    z_shape  (z,h,w) of a latent
    shape    (C,H,W) of the images; key names their pixels
    """

    name: str
    moments: np.ndarray | torch.Tensor
    labels: np.ndarray
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    z_shape: tuple[int, int, int]
    scale: float
    key: str

    def __len__(self):
        return len(self.labels)

    num_classes = property(lambda self: len(self.class_names))

    def batch(self, rows, flip=None):
        """Moments float32 (b,2z,h,w), channels_last in memory, where they are kept; y int64 (b,).

        rows: int64 (b,), numbers of images. flip: bool (b,), which of them are flipped.
        """
        found = torch.from_numpy(self.stored(rows, flip))
        if isinstance(self.moments, torch.Tensor):
            found = found.to(self.moments.device)
        return self.floats(found), torch.from_numpy(self.labels[rows])

    def stored(self, rows, flip=None):
        """What of a batch comes from the host: moments (b,h,w,2z), or their numbers int64 (b,)."""
        where = rows if flip is None else rows + len(self) * flip
        return where if isinstance(self.moments, torch.Tensor) else self.moments[where]

    def floats(self, stored):
        """The moments of a batch, of what `stored` gives, on the device where that is by now."""
        found = self.moments[stored] if isinstance(self.moments, torch.Tensor) else stored
        return found.permute(0, 3, 1, 2)


def cache_latents(folder, world, ds, encode, *, z_channels, factor, made_of, flip, batch=64):
    """Latents of the data set ds, on every rank, kept in `folder`.

    encode      function of images (b,C,H,W) on the device -> (mean, log-variance), each
                (b,z_channels,H/factor,W/factor)
    made_of     {name: plain value} of what else decides the latents, such as the encoder's weights
    flip        keep the latents of flipped images, too

    With --dry-run a batch is encoded to time it, and nothing is kept.

    Beside them lies a manifest of the data (its key names the pixels, so their size too), made_of
    and flip. Where these are others the latents are made anew, and one line says why. Raises
    BadInput for a disk without room for them.
    """
    if isinstance(world, Rehearsal):
        return _rehearsed(folder, world, ds, encode, z_channels, factor, flip, batch)
    folder = Path(folder)
    made_of = {"data_key": ds.key, **made_of, "flip": flip}
    shape = (ds.shape[1] // factor, ds.shape[2] // factor, 2 * z_channels)
    shape = (len(ds) * (1 + flip), *shape)
    with alone(folder, world):
        scale = _made(folder, world, ds, encode, made_of, shape, flip, batch)
    moments = np.load(folder / "moments.npy", mmap_mode="r")  # (N * views, h, w, 2z)
    h, w, _ = moments.shape[1:]
    return Latents(
        name=ds.name,
        moments=moments_on(moments, world.device),
        labels=np.asarray(ds.labels),
        class_names=tuple(ds.class_names),
        shape=tuple(ds.shape),
        z_shape=(z_channels, h, w),
        scale=scale,
        key=ds.key,
    )


def _made(folder, world, ds, encode, made_of, shape, flip, batch):
    """The scale of the latents in `folder`, which are made where there are none of just this."""
    manifest, path = folder / "manifest.json", folder / "moments.npy"
    disks = Disks(folder, world)
    scale = _kept_scale(manifest, path, made_of, shape, world)
    # Every rank has read its manifest before one goes.
    whole = scale and disks.writes and _sum_of_whole(folder)
    kept = world.gather((scale, whole) if whole else None)
    first = next(filter(None, kept), None)  # where machines differ, these are for all
    lacking = [rank for rank in set(disks.of) if kept[rank] != first or not first]
    if lacking:
        if world.rank in lacking:
            make_room(folder, manifest, path, shape)
        world.barrier()
        if first:
            scale = first[0]
            parts = [(kept.index(first), slice(0, shape[0]))]
        else:
            scale = _encode_all(path, world, ds, encode, flip, batch)
            shares = [replace(world, rank=rank).share(len(ds)) for rank in range(world.size)]
            views = (0, len(ds)) if flip else (0,)
            parts = [
                (rank, slice(share.start + view, share.stop + view))
                for rank, share in enumerate(shares)
                for view in views
            ]
        mode = "r+" if disks.of[world.rank] in lacking else "r"
        disks.fill(np.load(path, mmap_mode=mode), parts, lacking)
        if world.rank in lacking:
            told = {"made_of": made_of, "scale": scale}
            _write_manifest(folder, told, _sum(told, path))
        world.barrier()
    return scale


@torch.no_grad()
@exact()
def _rehearsed(folder, world, ds, encode, z_channels, factor, flip, batch):
    """What cache_latents returns, all means and log-variances 0: only one batch is encoded."""
    shape = (len(ds) * (1 + flip), ds.shape[1] // factor, ds.shape[2] // factor, 2 * z_channels)
    rows = np.arange(min(batch, max(1, len(ds) // world.processes)))

    def call():
        mean, log_var = encode(ds.batch(rows)[0].to(world.device))
        return torch.cat([mean, log_var], dim=1).permute(0, 2, 3, 1).float().cpu().numpy()

    flops = cost_of(Method(encode), forms_of([ds.batch(rows[:1])[0]]), half=False).flops
    world.know_latents(folder, ds, call, len(rows), 1 + flip, flops, 4 * math.prod(shape))
    return Latents(
        name=ds.name,
        moments=moments_on(np.broadcast_to(np.zeros(1, np.float32), shape), world.device),
        labels=np.asarray(ds.labels),
        class_names=tuple(ds.class_names),
        shape=tuple(ds.shape),
        z_shape=(z_channels, *shape[1:3]),
        scale=1.0,
        key=ds.key,
    )


def _kept_scale(manifest, path, made_of, shape, world):
    """The scale of the latents on the disk, or None where there are none of just this."""
    if not (manifest.exists() and path.exists()):
        return None
    kept, where = read_json(manifest), manifest.parent
    found = _shape(kept, path)
    if not found or kept["made_of"] == made_of and found != shape:
        if world.is_main:
            print(f"latents: made anew, those in {where} are damaged")
        return None
    if kept["made_of"] == made_of:
        return kept["scale"]
    words = {"data_key": "other images", "flip": "another --flip"}
    others = [
        words.get(name, f"another {name}")
        for name, value in made_of.items()
        if kept["made_of"].get(name) != value
    ]
    if world.is_main:
        print(f"latents: made anew, those in {where} are of {' and of '.join(others)}")
    return None


def _sum_of_whole(folder):
    """The sum of the latents in a folder; None, and a line, where they are damaged.

    The manifest of an earlier version says none: it is added.
    """
    manifest, path = folder / "manifest.json", folder / "moments.npy"
    told = read_json(manifest)
    said = told.pop("sum", None)
    if said and is_checked(folder, FILES):
        return said
    found = _sum(told, path)
    if said not in (None, found):
        print(f"latents: made anew, those in {folder} are damaged: their sum is another")
        return None
    _write_manifest(folder, told, found)
    return found


def _sum(told, path):
    return sum_of([told["made_of"], told["scale"]], np.load(path, mmap_mode="r"))


def _write_manifest(folder, told, its_sum):
    """The manifest of latents, which are whole now."""
    with atomic_write(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(told | {"sum": its_sum}))
    mark_checked(folder, FILES)


def _shape(kept, path):
    """The shape of the numbers at `path`; None where they or what a manifest says are damaged."""
    scale = kept.get("scale")
    if not isinstance(scale, float) or not isinstance(kept.get("made_of"), dict):
        return None
    try:
        found = mapped(path)
    except ValueError:
        return None
    return found.shape if found.dtype == np.float32 and 0 < scale < math.inf else None


def make_room(folder, manifest, path, shape, what="latents"):
    """An empty memory map float32 of `shape` at `path`; BadInput where the disk cannot hold it.

    It is asked first, because a full disk kills whoever writes a memory map.
    """
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    need, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
    if free < need:
        raise BadInput(
            f"{folder} needs {need >> 20} MiB for {what} and has {free >> 20}: free some, or type "
            "another --out"
        )
    with writing(path):
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        with open(path, "r+b") as file:
            reserve(file, path.stat().st_size, folder, "--out")


@torch.no_grad()
@exact()
def _encode_all(path, world, ds, encode, flip, batch):
    """Fill the memory map at `path`, each rank its share; the scale of all latents."""
    moments, mine = np.load(path, mmap_mode="r+"), np.arange(len(ds))[world.share(len(ds))]
    views = (False, True) if flip else (False,)
    sums = torch.zeros(3, dtype=torch.float64)  # of 1, z and z^2
    with world.progress(len(mine) * len(views), desc="latents") as bar:
        for view in views:
            for rows in (mine[i : i + batch] for i in range(0, len(mine), batch)):
                x, _ = ds.batch(rows, np.full(len(rows), view))
                mean, log_var = encode(x.to(world.device))
                both = torch.cat([mean, log_var], dim=1).permute(0, 2, 3, 1)  # (b,h,w,2z)
                moments[view * len(ds) + rows] = both.float().cpu().numpy()
                mean, var = mean.double(), log_var.double().exp()
                count = mean.new_tensor(mean.numel())
                sums += torch.stack([count, mean.sum(), (mean**2 + var).sum()]).cpu()
                bar.update(len(rows))
    moments.flush()
    count, total, square = world.sum(sums.to(world.device)).tolist()
    variance = square / count - (total / count) ** 2
    if not 0 < variance < math.inf:
        told = f"the latents of {ds.name} have a variance of {variance:g}"
        raise BadInput(f"{told}: weights of the autoencoder are bad; name another with --ae")
    scale = variance**-0.5
    world.barrier()
    if world.is_main:
        n, h, w, c = moments.shape
        print(f"latents: {n} of {h}x{w}x{c // 2}, scale {scale:.4f}")
    return scale


def moments_on(moments, device, share=1 / 3):
    """The cache as a tensor on a GPU, if it takes at most `share` of the free memory there.

    Else, and on the CPU, the memory map as it is: the operating system keeps what is read often.
    """
    if device.type != "cuda" or moments.nbytes > share * torch.cuda.mem_get_info(device)[0]:
        return moments
    return torch.from_numpy(np.array(moments)).to(device)
