"""Every data set as one uint8 memory map (N,H,W,C), int64 labels, class names and a manifest.

    ds = data.load("mnist")                                    downloaded and prepared once
    idx = data.indices(len(ds), batch_size, seed, step)        which images step `step` sees
    x, y = data.batch(ds, idx)                                 (B,C,H,W) in [-1,1], (B,)

    python data.py cifar10 --size 64        prepares it and draws preview.png beside it

Names: glyphs (drawn here, needs no file), mnist, fashion_mnist, cifar10, afhq, imagenet100, or a
folder or zip of images. Where raw files are looked for is told in support/sources.py.
"""

import errno
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runtime
from support import decode, glyphs, sources

PROTOCOL = "shorter side to size with Lanczos, centre crop; 16-bit high byte; alpha on white; v1"
CHUNK = 128  # images a worker prepares at a time


@dataclass(frozen=True)
class Dataset:
    """A prepared split. images uint8 (N,H,W,C), read from disk as needed; labels int64 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray  # zeros where there are no classes
    class_names: tuple[str, ...]  # () where there are no classes
    manifest: dict

    def __len__(self):
        return len(self.images)

    height = property(lambda self: self.images.shape[1])
    width = property(lambda self: self.images.shape[2])
    channels = property(lambda self: self.images.shape[3])
    num_classes = property(lambda self: len(self.class_names))
    key = property(lambda self: self.manifest["key"], doc="names the pixels and labels themselves")


# --------------------------------------------------------------------------------------- loading


def load(name, root="data", *, split="train", size=None, classes=(), workers=None):
    """The prepared data set; prepares it first, in parallel, if that was not done before.

    name     see above; a folder may also hold the raw files of MNIST, CIFAR-10 or ImageNet-100
    root     where named sets are looked for or downloaded (root/name) and prepared sets are kept
    split    'train' or 'test' (a folder's test, val or valid; without one, the same images)
    size     shorter side resized to this, centre cropped; None keeps the size, if there is one
    classes  names or numbers of the classes to keep, renumbered from 0; empty keeps all
    workers  processes that prepare, by default one per core

    Raises BadInput for an unknown name, class or split, missing or broken files, images of mixed
    sizes without `size`, and a full disk; nothing half-prepared stays.
    """
    if split not in ("train", "test"):
        raise runtime.BadInput(f"split {split}: there are train and test")
    if size is not None and size < 1:
        raise runtime.BadInput(f"--size {size} must be at least 1")
    source = sources.find(str(name), root, split)
    wanted = json.dumps([source.stamp, split, size, list(classes), PROTOCOL])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:10]
    name = Path(name).stem
    folder = Path(root) / f"{name}-{split}-{size or 'native'}-{digest}"
    if not (folder / "manifest.json").exists():
        Path(root).mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "manifest.json").exists():  # another process may have been faster
                _prepare(source, folder, name, split, size, classes, workers or os.cpu_count())
    manifest = json.loads((folder / "manifest.json").read_text())
    return Dataset(
        name,
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "labels.npy"),
        tuple(manifest["class_names"]),
        manifest | {"folder": str(folder)},
    )


@contextmanager
def _lock(path):
    """Only one process at a time is inside; the others wait."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _prepare(source, folder, name, split, size, classes, workers):
    contents = source.contents()
    keep, labels, class_names = _choose(contents, classes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _pool(workers, len(keep)) as run:
            shape = _shape(run, contents, keep, size)
            images = _allocate(temporary / "images.npy", shape)
            jobs = [keep[i : i + CHUNK] for i in range(0, len(keep), CHUNK)]
            bar = runtime.progress(len(keep), f"preparing {name} {split}")
            content = hashlib.sha256(labels.tobytes())
            with bar:
                done = run(_read, (_job(contents, rows, size, shape[3]) for rows in jobs))
                for rows, part in zip(jobs, done, strict=True):
                    start = bar.n
                    images[start : start + len(rows)] = part
                    content.update(part.tobytes())
                    bar.update(len(rows))
            images.flush()
        np.save(temporary / "labels.npy", labels)
        manifest = {
            "name": name, "split": split, "source": source.origin, "stamp": source.stamp,
            "count": len(keep), "shape": list(shape[1:]), "protocol": PROTOCOL, "size": size,
            "class_names": list(class_names), "key": content.hexdigest()[:12],
        }  # fmt: skip
        if contents.note:
            manifest["note"] = contents.note
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise runtime.BadInput(
                f"no space left in {folder.parent} for {name}: free some or change --data-root"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _choose(contents, classes):
    """(rows to keep, their labels, class names) for the asked-for classes, or for all."""
    if not classes:
        return np.arange(len(contents.labels)), contents.labels, contents.class_names
    chosen = runtime.parse_classes(classes, contents.class_names, contents.aliases)
    new = np.full(len(contents.class_names), -1)
    new[chosen] = np.arange(len(chosen))
    keep = np.flatnonzero(new[contents.labels] >= 0)
    if len(keep) == 0:
        raise runtime.BadInput(f"--classes {','.join(classes)}: no image of this split has them")
    return keep, new[contents.labels[keep]], tuple(contents.class_names[c] for c in chosen)


@contextmanager
def _pool(workers, n):
    """A function like map() that runs in worker processes, a bounded number of jobs ahead."""
    if workers == 1 or n <= CHUNK:
        yield lambda fn, jobs: (fn(*job) for job in jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:

        def run(fn, jobs):
            waiting = []
            for job in jobs:
                waiting.append(pool.submit(fn, *job))
                if len(waiting) > 4 * workers:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _shape(run, contents, keep, size):
    """(N,H,W,C) of what will be prepared; C is 1 if all images are gray. BadInput if sizes mix."""
    if contents.drawn:
        found = [(glyphs.SIZE, glyphs.SIZE, True)]
    elif contents.arrays is not None:
        h, w, c = contents.arrays.shape[1:]
        found = [(w, h, c == 1)]
    else:
        items = [contents.items[i] for i in keep]
        jobs = [(contents.container, items[i : i + CHUNK]) for i in range(0, len(items), CHUNK)]
        found = [row for part in run(decode.inspect, jobs) for row in part]
    channels = 1 if all(gray for _, _, gray in found) else 3
    if size:
        return len(keep), size, size, channels
    for i, (w, h, _) in enumerate(found):
        if (w, h) != found[0][:2]:
            first = "x".join(map(str, found[0][:2]))
            raise runtime.BadInput(
                f"{contents.container} mixes sizes: {contents.items[keep[0]]} is {first}, "
                f"{contents.items[keep[i]]} is {w}x{h}; type --size to resize, such as --size 64"
            )
    return len(keep), found[0][1], found[0][0], channels


def _allocate(path, shape):
    """A writable memory map whose space on disk is taken already; OSError where there is none."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with open(path, "r+b") as f:
        if shutil.disk_usage(path.parent).free < images.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return images


def _job(contents, rows, size, channels):
    """The arguments of _read for images `rows`: no more than these images need."""
    if contents.drawn:
        return contents.drawn, rows, None, size, channels
    if contents.arrays is not None:
        return "", contents.arrays[rows], None, size, channels
    return contents.container, [contents.items[i] for i in rows], decode.decode, size, channels


def _read(where, what, decoder, size, channels):
    """uint8 (len(what),H,W,channels): files `what` of `where`, glyphs, or arrays; in a worker."""
    if decoder:
        return decoder(where, what, size, channels)
    arrays = glyphs.draw(where, what) if where else what
    if size is None or arrays.shape[1:3] == (size, size):
        return np.ascontiguousarray(arrays)
    pictures = (Image.fromarray(a[:, :, 0] if channels == 1 else a) for a in arrays)
    return np.stack([decode.to_array(p, size, channels) for p in pictures])


# --------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(n, batch_size, seed, step, rank=0, world=1):
    """Which of n images this rank sees in training step `step`: int64 (batch_size / world,).

    The images of all epochs form one endless sequence, each epoch a permutation of its own; step s
    takes the batch_size images from s * batch_size on, and rank r the r-th part of those. So the
    order is a function of (seed, step), the same for any number of processes and after a resume.
    Raises BadInput if the processes cannot share the batch equally.
    """
    positions = step * batch_size + np.arange(batch_size)[_share(batch_size, rank, world)]
    epochs = positions // n
    chosen = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(n, seed, int(epoch))[positions[here] % n]
    return chosen


def flips(batch_size, seed, step, rank=0, world=1):
    """Which images of indices(...) to mirror left to right, half of them: bool (B / world,)."""
    coins = np.random.default_rng([seed, step, 2]).random(batch_size) < 0.5
    return coins[_share(batch_size, rank, world)]


def _share(batch_size, rank, world):
    if batch_size % world:
        raise runtime.BadInput(f"a batch of {batch_size} cannot be divided among {world} processes")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def batch(ds, idx, *, flip=None):
    """x float32 (B,C,H,W) in [-1,1], channels_last in memory, and y int64 (B,), for image numbers.

    flip: bool (B,), images to mirror left to right, or None.
    """
    images = ds.images[idx]  # (B,H,W,C)
    if flip is not None:
        images[flip] = images[flip, :, ::-1]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x, torch.from_numpy(ds.labels[idx])


# ------------------------------------------------------------------------------------------ main


@dataclass
class Config:
    """Which data set to prepare and look at."""

    data: str = "glyphs"  # a name, or a folder or zip of images
    config: str = ""  # YAML file of these settings
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    split: str = "train"  # train or test
    size: int = 0  # shorter side resized to this, centre cropped; 0 keeps the size
    classes: str = ""  # comma-separated classes to keep


def main():
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data", *arguments]
    cfg = runtime.parse(Config, __doc__, arguments)
    classes = runtime.split_list(cfg.classes)
    ds = load(cfg.data, cfg.data_root, split=cfg.split, size=cfg.size or None, classes=classes)
    shown = np.linspace(0, len(ds) - 1, min(100, len(ds))).astype(int)
    preview = Path(ds.manifest["folder"]) / "preview.png"
    runtime.save_grid(ds.images[shown], preview, columns=10)
    counts = np.bincount(ds.labels, minlength=max(1, ds.num_classes))
    print(f"{ds.name} {cfg.split}: {len(ds)} images {ds.height}x{ds.width}x{ds.channels}")
    for i, name in enumerate(ds.class_names[:20]):
        print(f"  {i:3d} {name}: {counts[i]}")
    print(f"key {ds.key}, {preview}")


if __name__ == "__main__":
    runtime.entry(main)
