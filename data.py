"""Every data set as one uint8 memory map (N,H,W,C), int64 labels, class names and a manifest.

    ds = data.load("mnist")                                    downloaded and prepared once
    idx = data.indices(len(ds), batch_size, seed, step)        which images step `step` sees
    x, y = data.batch(ds, idx)                                 (B,C,H,W) in [-1,1], (B,)

    python data.py cifar10 --size 64        prepares it and draws preview.png beside it

Names: glyphs (drawn here, needs no file), mnist, fashion_mnist, cifar10, afhq, imagenet100, or a
folder or zip of images. Where raw files are looked for is told in support/sources.py.
"""

import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import runtime
from support import sources
from support.lock import locked
from support.prepare import PROTOCOL, prepare


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
    classes = runtime.split_list(classes) if isinstance(classes, str) else list(classes)
    source = sources.find(str(name), root, split)
    wanted = json.dumps([source.stamp, split, size, classes, PROTOCOL])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:10]
    path = Path(name).resolve()
    name = path.stem if path.is_file() else path.name
    folder = Path(root) / f"{name}-{split}-{size or 'native'}-{digest}"
    if not (folder / "manifest.json").exists():
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "manifest.json").exists():  # another process may have been faster
                prepare(source, folder, split, size, classes, workers or _cores(), name)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Dataset(
        name,
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "labels.npy"),
        tuple(manifest["class_names"]),
        manifest | {"folder": str(folder)},
    )


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def held_out(name, root, shape, class_names, *, size=0, classes=""):
    """The test split of a data set, for a network of images `shape` (C,H,W): (Dataset, known).

    known: whether its classes are the network's `class_names`, so that its labels mean something
    there. Raises BadInput where no data set is named or its images are of another shape.
    """
    if not name:
        raise runtime.BadInput("this network does not say what it was trained on; type --data NAME")
    ds = load(name, root, split="test", size=size or None, classes=runtime.split_list(classes))
    found = (ds.channels, ds.height, ds.width)
    if found != tuple(shape):
        raise runtime.BadInput(
            f"--data {ds.name}: images {found}, but the network takes {tuple(shape)}; "
            "choose the data it was trained on"
        )
    return ds, list(ds.class_names) == list(class_names)


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
