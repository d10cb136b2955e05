"""Every data set as one uint8 memory map (N,H,W,C), int64 labels, class names and a manifest.

    ds = datasets.load("mnist")                downloaded and prepared once
    x, y = ds.batch(rows, flip)                (b,C,H,W) in [-1,1], (b,), of image numbers (b,)

    python -m image_data cifar10 --size 64        prepares it and draws preview.png beside it

Names: glyphs (drawn here, needs no file), mnist, fashion_mnist, cifar10, afhq, imagenet100, or a
folder or zip of images. Where raw files are looked for is told in image_data/sources.py.
"""

from runtime.commandline import BadInput, split_list
from runtime.files import locked
from runtime.processes import say_once

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from image_data.batches import Dataset


def load(name, root="data", *, split="train", size=0, classes=(), workers=None):
    """The prepared data set; prepares it first, in parallel, if that was not done before.

    name     see above; a folder may also hold the raw files of MNIST, CIFAR-10 or ImageNet-100
    root     where named sets are looked for or downloaded (root/name) and prepared sets are kept
    split    'train' or 'test' (a folder's test, val or valid; without one, the same images)
    size     shorter side resized to this, centre cropped; 0 keeps the size, if there is one
    classes  names or numbers of the classes to keep, renumbered from 0; empty keeps all
    workers  processes that prepare, by default one per core

    Raises BadInput for an unknown name, class or split, missing or broken files, images of mixed
    sizes without `size`, and a full disk; nothing half-prepared stays.
    """
    # What reads archives and image files is needed only where images are not prepared yet.
    from image_data import prepare, sources

    if split not in ("train", "test"):
        raise BadInput(f"split {split}: there are train and test")
    size = size or None
    if size is not None and size < 1:
        raise BadInput(f"--size {size} must be at least 1, or 0 for the images' own")
    classes = split_list(classes) if isinstance(classes, str) else list(classes)
    source = sources.find(str(name), root, split)
    wanted = json.dumps([source.stamp, split, size, classes, prepare.PROTOCOL])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:10]
    path = Path(name).resolve()
    name = path.stem if path.is_file() else path.name
    folder = Path(root) / f"{name}-{split}-{size or 'native'}-{digest}"
    if not (folder / "manifest.json").exists():
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "manifest.json").exists():  # another process may have been faster
                prepare.prepare(source, folder, split, size, classes, workers or _cores(), name)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Dataset(
        name,
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "labels.npy"),
        tuple(manifest["class_names"]),
        manifest | {"folder": str(folder)},
    )


# Of training sets that are known: images, side, channels, classes.
KNOWN = {"mnist": (60_000, 28, 1, 10), "fashion_mnist": (60_000, 28, 1, 10)}
KNOWN |= {"cifar10": (50_000, 32, 3, 10), "afhq": (14_630, 512, 3, 3)}
KNOWN |= {"imagenet100": (130_000, 0, 3, 100)}


def of(cfg):
    """The training images that a command's settings name.

    With --dry-run, where a known set is neither here nor to be had: gray images of its form.
    Raises BadInput as load does.
    """
    try:
        return load(cfg.data, cfg.data_root, size=cfg.size, classes=cfg.classes)
    except BadInput as error:
        count, side, channels, classes = KNOWN.get(cfg.data, (0, 0, 0, 0))
        side = cfg.size or side
        if not cfg.dry_run or not side:
            raise
        chosen = len(split_list(cfg.classes)) or classes
        say_once(f"note: the plan is of gray images in place of {cfg.data}'s ({error})")
    shape, labels = (count * chosen // classes, side, side, channels), np.arange(chosen)
    names = tuple(str(label) for label in labels)
    images = np.broadcast_to(np.full(1, 127, np.uint8), shape)
    return Dataset(cfg.data, images, np.resize(labels, shape[0]), names, {"key": "gray"})


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def held_out(name, root, shape, class_names, *, size=0, classes=""):
    """The test split of a data set, for a network of images `shape` (C,H,W): (Dataset, known).

    known: whether its classes are the network's `class_names`, so that its labels mean something
    there. Raises BadInput where no data set is named or its images are of another shape.
    """
    if not name:
        raise BadInput("this network does not say what it was trained on; type --data NAME")
    ds = load(name, root, split="test", size=size, classes=classes)
    if ds.shape != tuple(shape):
        raise BadInput(
            f"--data {ds.name}: images {ds.shape}, but the network takes {tuple(shape)}; "
            "choose the data it was trained on"
        )
    return ds, list(ds.class_names) == list(class_names)
