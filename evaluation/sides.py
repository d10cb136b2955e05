"""One side of a comparison: where it comes from, and the features of its images, computed once.

Features of data sets are kept, those of samples lie in a file without a name: memory does not grow
with the number of images.
"""

from runtime.commandline import BadInput
from runtime.files import CLOSED, Unwritable, atomic_write, reserve
from runtime.processes import World
from runtime.sums import mapped

import math
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evaluation import image_sets
from evaluation.channels import only_zero_and_one
from evaluation.features import extract
from evaluation.image_sets import Images, Statistics
from evaluation.words import warn


@dataclass
class Side:
    """What is known of A or B: features (N, d), logits (N, K), labels (N,); or else statistics."""

    source: Images | Statistics
    feats: np.ndarray | None = None
    logits: np.ndarray | None = None
    known: Statistics | None = None  # mu and sigma, where they are known or were computed

    name = property(lambda self: self.source.name)
    labels = property(lambda self: getattr(self.source, "labels", None))
    told = property(lambda self: getattr(self.source, "told", ""))
    n = property(lambda self: self.known.n if self.known else len(self.feats))
    dim = property(lambda self: len(self.known.mu) if self.known else self.feats.shape[1])


def scratch(folder, shape, dtype):
    """An array in a file without a name: gone with the process, however that ends.

    Where `folder` may not be written to, it lies where temporary files do.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the map keeps it open)
    except OSError as error:
        if error.errno not in CLOSED:
            raise Unwritable(
                f"--data-root {folder} cannot be written to: {error.strerror}"
            ) from None
        folder, file = tempfile.gettempdir(), tempfile.TemporaryFile()  # noqa: SIM115
    reserve(file, math.prod(shape) * np.dtype(dtype).itemsize, folder)
    return np.memmap(file, dtype, "w+", shape=shape)


def keep_for_later(path, write):
    """write(temporary) makes the file `path`; where nothing can be written, a line says so.

    The figures are the same, and made again the next time.
    """
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except Unwritable as error:
        warn(f"not kept for the next time: {error}")


def look(
    source, extractor, *, batch_size=256, world=None, store=np.empty, keep="", reference=False
):
    """A Side of Images or Statistics. The features of a data set are kept in the folder `keep`.

    A reference whose file holds the moments of the whole set that its images are of has these.
    """
    world = world or World()
    if isinstance(source, Statistics):
        return Side(source, known=source)
    name = f"features-{source.key}-{getattr(extractor, 'feature_hash', None)}.npy"
    path = Path(keep) / name if keep and source.key and "None" not in name else None
    if path and on_every_process(path, world):
        try:
            feats = mapped(path)
            if feats.shape == (len(source.images), extractor.dim):
                return Side(source, feats)
        except ValueError:
            warn(f"{path} is damaged; its features are computed again")
    feats, logits = extract(
        extractor, source.images, batch_size, world, store=store, name=source.name
    )
    if path and world.is_main:
        keep_for_later(path, partial(np.save, arr=feats))
    known = source.statistics if reference else None
    fits = known is not None and len(known.mu) == feats.shape[1]
    return Side(source, feats, logits, known if fits else None)


def kept_statistics(source, extractor, root, statistics, *, batch_size=256, world=None):
    """Statistics of Images that have a key: kept in the folder `root`, computed the first time.

    statistics: the function that makes mu (d,) and sigma (d, d) of features (N, d).
    """
    world = world or World()
    path = Path(root, f"statistics-{source.key}-{extractor.feature_hash}.npz")
    if on_every_process(path, world):
        try:
            found = image_sets.read_file(str(path))
            same = isinstance(found, Statistics) and len(found.mu) == extractor.dim
            if same and found.n == len(source.images):
                return found
        except BadInput:
            warn(f"{path} is damaged; its statistics are computed again")
    rows = path.with_name(f"features-{source.key}-{extractor.feature_hash}.npy")
    keep = str(root) if on_every_process(rows, world) else ""  # those of eval_fid.py, if any
    how = {"batch_size": batch_size, "world": world, "store": partial(scratch, root)}
    side = look(source, extractor, keep=keep, **how)
    facts = {"protocol": extractor.protocol, "feature_hash": extractor.feature_hash}
    made = Statistics(source.name, *statistics(side.feats), n=side.n, **facts)
    if world.is_main:
        keep_for_later(path, partial(image_sets.write_statistics, side=made))
    return made


def on_every_process(path, world):
    """Whether all processes see the file: so they take the same way, whatever appears meanwhile."""
    there = torch.tensor(int(path.is_file()), device=world.device)
    return bool(world.sum(there) == world.size)


def labelled(source, class_names):
    """`source` with labels that mean `class_names`: those of its own names are renumbered.

    None are left where it has a class that is not among them, which a line says. BadInput for
    labels out of range.
    """
    if not isinstance(source, Images) or source.labels is None or not class_names:
        return source if not isinstance(source, Images) else replace(source, labels=None)
    labels, names = source.labels, source.class_names or class_names
    if labels.min() < 0 or labels.max() >= len(names):
        found = f"labels from {labels.min()} to {labels.max()}"
        known = ", ".join(names[:10]) + " ..." * (len(names) > 10)
        raise BadInput(f"{source.name} has {found}; there are 0 to {len(names) - 1}: {known}")
    if strange := [name for name in names if name not in class_names]:
        why = f"{strange[0]} is no class that is compared"
        warn(f"labels of {source.name} are left out: {why} ({', '.join(class_names[:10])})")
        return replace(source, labels=None)
    places = np.array([class_names.index(name) for name in names])
    return replace(source, labels=places[labels])


def channels_text(*sides):
    """How the channels of these Sides are understood; None where that is plain."""
    return "; ".join(dict.fromkeys(side.told for side in sides if side.told)) or None


def check_same_features(a, b, extractor=None):
    """Raise BadInput where the statistics of a side are known to be of other features."""
    ours = getattr(extractor, "feature_hash", None)
    hashes = [side.known.feature_hash if side.known else ours for side in (a, b)]
    hashes = [found for found in [*hashes, ours] if found]
    if len(set(hashes)) > 1:
        why = f"are of different features ({', '.join(sorted(set(hashes)))}); make both with"
        raise BadInput(f"{a.name} and {b.name} {why} the same --features and their settings")


def warn_of(side, letter="", told=None):
    """A line on stderr for what makes the figures of this side misleading.

    letter: A or B, of which `told` keeps what was said of so many images.
    """
    if side.feats is not None and only_zero_and_one(side.source.images):
        warn(f"{side.name}: no pixel is above 1 of 255, so that all is black; save images * 255")
    least = 2048 if side.n and side.n < 2048 else 10_000
    if side.n and side.n < least:
        why = "the Fréchet distance is biased upward with few samples"
        few = f"{side.name} has N = {side.n:,} images, fewer than {least:,}"
        warn(f"{few}: {why}", f"{letter}, {side.n}", told)
    if side.n and side.n <= side.dim:
        few = f"{side.name}: N = {side.n} does not exceed the {side.dim} features"
        warn(few, f"{letter}, {side.n}, dim", told)
    if side.known and side.known.protocol is None and (side.feats is None or side.known.n is None):
        warn(f"{side.name} does not say which features its statistics were made with")
