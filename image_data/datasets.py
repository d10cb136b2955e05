"""Every data set as one uint8 memory map (N,H,W,C), int64 labels, class names and a manifest.

    ds = datasets.load("mnist")                downloaded and prepared once
    x, y = ds.batch(rows, flip)                (b,C,H,W) in [-1,1], (b,), of image numbers (b,)

    python -m image_data cifar10 --size 64        prepares it and draws preview.png beside it

Names: glyphs (drawn here, needs no file), mnist, fashion_mnist, cifar10, afhq, imagenet100, or a
folder or zip of images. Where raw files are looked for is told in image_data/sources.py.
"""

from runtime.commandline import BadInput, class_list, split_list
from runtime.files import check_writable, locked, read_json
from runtime.processes import is_first_process, meet, say_once

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from image_data.batches import Dataset, spaced

SMOKE = 200  # images, of --smoke


def load(name, root="data", *, split="train", size=0, classes=(), workers=None):
    """The prepared data set; prepares it first, in parallel, if that was not done before.

    name     see above; a folder may also hold the raw files of MNIST, CIFAR-10 or ImageNet-100
    root     where named sets are looked for or downloaded (root/name) and prepared sets are kept
    split    'train' or 'test' (a folder's test, val or valid; without one, the same images)
    size     shorter side resized to this, centre cropped; 0 keeps the size, if there is one
    classes  names or numbers of the classes to keep, renumbered from 0; empty keeps all
    workers  processes that prepare, by default one per core

    A line tells what was found in a folder or zip, another if its values use little of their range,
    and one what earlier states of these files have left; each is printed once, by the first
    process. Raises BadInput for an unknown name, class or split, missing or broken files, images of
    mixed sizes without `size`, a full disk, and the path of a checkpoint (TrainedOn) where its
    images are not; nothing half-prepared stays.
    """
    # What reads archives and image files is needed only where images are not prepared yet.
    from image_data import prepare

    if split not in ("train", "test"):
        raise BadInput(f"split {split}: there are train and test")
    classes = class_list(classes) if isinstance(classes, str) else list(classes)
    like_training = split == "train" and _settings_of(name) == (size, classes)
    if like_training:
        _check_there(name)  # these images are compared below
    else:
        check_trained_on(name, root)
    trained_on, size = name, size or None
    if size is not None and size < 1:
        raise BadInput(f"--size {size} must be at least 1, or 0 for the images' own")
    source, name, folder = _place(str(name), root, split, size, classes)
    if not (found := _kept(folder)):
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (found := _kept(folder)):  # another process may have been faster
                prepare.prepare(source, folder, split, size, classes, workers or _cores(), name)
                found = prepare.read(folder)
    images, labels, manifest = found
    if like_training:
        _compare(trained_on, manifest["key"], f"--data {trained_on}")
    told = prepare.told_of(source, manifest.get("told"))
    for line in (told, *map(manifest.get, ("range", "pages"))):
        if line:
            say_once(line)
    return Dataset(
        name,
        images,
        labels,
        tuple(manifest["class_names"]),
        manifest | {"folder": str(folder)},
    )


def _kept(folder):
    """What prepare.read gives; None, and a line, where it is damaged."""
    from image_data import prepare

    try:
        return prepare.read(folder)
    except prepare.Damaged as error:
        say_once(f"note: the prepared data in {folder} are damaged, and made again ({error})")
        return None


def _place(name, root, split, size, classes):
    """(Source, short name, folder of the prepared set) of a data set; the folder may not exist."""
    from image_data import prepare, sources

    source = sources.find(name, root, split)
    wanted = json.dumps([source.stamp, split, size, classes, prepare.PROTOCOL])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:10]
    path = Path(name).resolve()
    name = path.stem if path.is_file() else path.name
    return source, name, Path(root) / f"{name}-{split}-{size or 'native'}-{digest}"


def _settings_of(name):
    """(size, classes) that the network was trained on, of a TrainedOn that has a key; or None."""
    if getattr(name, "data_key", None) is None or name in KNOWN or name == "glyphs":
        return None
    return name.size, class_list(name.classes)


def _check_there(name):
    """BadInput where `name` is the path of TrainedOn, and nothing is there."""
    from image_data import sources

    if hasattr(name, "data_key") and name and name not in sources.NAMES and not Path(name).exists():
        by = getattr(name, "checkpoint", "") or "the checkpoint"
        raise BadInput(
            f"{sources.unknown(name)}; {by} was trained on it, and names it so: type --data PATH, "
            "where it is now"
        )


def check_trained_on(name, root, otherwise=""):
    """BadInput where `name` is the path TrainedOn, and other images lie there than it was.

    A relative path may mean another folder, and what a folder holds changes. A typed path is a
    plain str, and on purpose. Nothing is prepared for this: where root holds neither these images
    nor those of the training, a line says that they are not compared. otherwise: what to type to
    take those images.
    """
    from image_data.prepare import is_manifest

    _check_there(name)
    if (settings := _settings_of(name)) is None:
        return
    size, classes = settings
    source, _, folder = _place(str(name), root, "train", size or None, classes)
    otherwise = otherwise or f"--data {name}"
    if is_manifest(manifest := read_json(folder / "manifest.json")):
        _compare(name, manifest["key"], otherwise)
    elif changed := _has_changed(name, root, source):
        _compare(name, "unknown", otherwise)
    elif changed is None:
        say_once(
            f"note: whether {Path(name).resolve()} still holds what the network was trained on is "
            f"not known: those images are not prepared in {root}"
        )


def _has_changed(name, root, source):
    """Whether files changed since TrainedOn was prepared; None where no such set is in root."""

    def files_of(stamp):  # without the version of the rule by which they are read
        return [part for part in json.loads(json.dumps(stamp)) if not isinstance(part, int)]

    from image_data.prepare import is_manifest

    changed = None
    for path in sorted(Path(root).glob("*-train-*/manifest.json")):
        known = read_json(path)
        if not is_manifest(known):
            continue
        if (known["key"], known["source"]) == (name.data_key, source.origin):
            if files_of(known["stamp"]) == files_of(source.stamp):
                return False
            changed = True
    return changed


def _compare(name, found, otherwise):
    """BadInput where the images of key `found` are not those of TrainedOn."""
    if found != name.data_key:
        raise BadInput(
            f"{Path(name).resolve()} holds other images than the network was trained on, though it "
            f"has the name {name} (data_key {name.data_key} there, {found} here), or they were "
            f"read otherwise by an earlier version: type the path of those, or {otherwise} if "
            "these are meant"
        )


# Of training sets that are known: images, side, channels, classes.
KNOWN = {"mnist": (60_000, 28, 1, 10), "fashion_mnist": (60_000, 28, 1, 10)}
KNOWN |= {"cifar10": (50_000, 32, 3, 10), "afhq": (14_630, 512, 3, 3)}
KNOWN |= {"imagenet100": (130_000, 0, 3, 100)}


def of(cfg):
    """The training images that a command's settings name.

    With --smoke a few of them, of which latents are soon made. With --dry-run, where a known set is
    neither here nor to be had: gray images of its form. Raises BadInput as load does.
    """
    from runtime.download import Unavailable

    _check_out(cfg)
    meet(cfg)
    try:
        ds = load(cfg.data, cfg.data_root, size=cfg.size, classes=cfg.classes)
        return some_of(ds, SMOKE) if cfg.smoke and not cfg.dry_run else ds
    except Unavailable as error:
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


def some_of(ds, most):
    """The Dataset ds, or `most` of its images, evenly spaced, in memory."""
    rows = spaced(len(ds), most)
    return replace(ds, images=ds.images[rows], labels=ds.labels[rows]) if most < len(ds) else ds


def in_steps(cfg, ds):
    """cfg for training on the Dataset ds: --epochs become --steps, of whole batches."""
    steps = max(1, round(cfg.epochs * len(ds) / cfg.batch_size)) if cfg.epochs else cfg.steps
    return replace(cfg, steps=steps, epochs=0.0)


def prepared(cfg):
    """in_steps(cfg), once the data of `of` are prepared: by one process, before there are more."""
    return in_steps(cfg, of(cfg))


def _check_out(cfg):
    """BadInput where the folder --out holds images of --data: a run there would be left out.

    And where nobody can write to it: what is prepared first takes long.
    """
    from image_data.listing import ours, walk

    if cfg.out and is_first_process() and not getattr(cfg, "dry_run", False):
        check_writable(cfg.out)
    if cfg.out and Path(cfg.out).is_dir() and Path(cfg.data).is_dir() and cfg.data not in KNOWN:
        out, data = Path(cfg.out).resolve(), Path(cfg.data).resolve()
        inside = data in (out, *out.parents) and not ours({found.name for found in out.iterdir()})
        if inside and any(name for name, *_ in walk(out)):
            raise BadInput(f"--out {cfg.out} holds images of --data {cfg.data}; name a new folder")


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def held_out(name, root, shape, class_names, *, size=0, classes="", split="test"):
    """The test split of a data set, for a network of images `shape` (C,H,W): (Dataset, known).

    known: whether its classes are the network's `class_names`, so that its labels mean something
    there. Raises BadInput where no data set is named or its images are of another shape.
    """
    if not name:
        raise BadInput("this network does not say what it was trained on; type --data NAME")
    ds = load(name, root, split=split, size=size, classes=classes)
    if ds.shape != tuple(shape):
        asked = f"--data {ds.name}" + f", --size {size}" * bool(size)
        raise BadInput(
            f"{asked}: images {ds.shape}, but the network takes {tuple(shape)}; "
            "choose the data it was trained on"
        )
    return ds, list(ds.class_names) == list(class_names)
