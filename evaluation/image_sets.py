"""What can be compared: images wherever they lie, and statistics of images.

    mnist   mnist:train         a data set's test split, or the one that is named
    photos/   photos.zip        images in a folder or zip
    samples.npz   samples.npy   uint8 (N, H, W, C); in the .npz arr_0, with labels arr_1 if any.
                                (N, H, W) is gray
    stats.npz                   mu and sigma: of this program, pytorch-fid or the ADM suite

A checkpoint's samples: checkpoint_samples.py. Images stay on the disk and are mapped into memory,
so that N does not matter.
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.limits import open_member, read_member

import io
import itertools
import math
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, replace

import numpy as np

from evaluation.words import shape_text
from image_data import datasets

USED = frozenset(["arr_1", "mu", "sigma", "n", "protocol", "feature_hash"])  # and arr_0
LONGEST_HEADER = 1 << 14  # bytes of an array's description: numpy reads no more than 10,000


@dataclass
class Images:
    """Images uint8 (N, H, W, C) read from `name`; labels (N,) and class names, or None.

    key names the pixels where a data set knows them; set_key those of the whole set that they were
    drawn from. statistics: of the set that these images are a part of, where the file tells (ADM's
    reference files). told: how its channels are understood, if that is not plain.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    key: str | None = None
    set_key: str | None = None
    statistics: "Statistics | None" = None
    told: str = ""


@dataclass
class Statistics:
    """What the distance needs of a set: mu (d,) and sigma (d, d) of n images, and of what kind."""

    name: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    protocol: str | None = None
    feature_hash: str | None = None


class Chosen:
    """Some images of an array (N, H, W, C), as an array that is read only where it is looked at."""

    def __init__(self, images, numbers):
        self.images, self.numbers = images, numbers
        self.shape, self.dtype = (len(numbers), *images.shape[1:]), images.dtype

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, which):
        return self.images[self.numbers[which]]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.images[self.numbers], dtype)


def as_images(found, name):
    """Images of an array uint8 (N, H, W, C), or `found` itself where it is some. Else BadInput."""
    if isinstance(found, Images | Statistics):
        return found
    hint = mend(found) if isinstance(found, np.ndarray) else ""
    if hint or getattr(found, "dtype", None) != np.uint8 or found.ndim != 4:
        held = f"{found.dtype} {found.shape}" if hasattr(found, "shape") else type(found).__name__
        raise BadInput(f"{name} holds {held}; expected images uint8 (N, H, W, C){hint}")
    if not len(found):
        raise BadInput(f"{name} holds no images")
    return Images(name, found)


def mend(images):
    """What makes images uint8 (N, H, W, C) of an array, '; save ...', or '' where nobody knows."""
    some = np.asarray(images[:64]) if images.ndim in (3, 4) else np.empty(0)
    if not some.size or some.dtype.kind not in "biuf":
        return ""
    if some.ndim == 3 and min(some.shape[1:]) <= 4:
        return "; save images[None]" if some.shape[2] in (1, 3) else ""
    turned = some.ndim == 4 and some.shape[1] in (1, 3) and some.shape[3] > 4
    if some.ndim == 4 and not turned and some.shape[3] not in (1, 3):
        return "; save images[..., :3], the fourth is alpha" if some.shape[3] == 4 else ""
    axes = "images.transpose(0, 2, 3, 1)" if turned else "images"
    low, high = float(some.min()), float(some.max())
    if some.dtype == np.uint8:
        return f"; save {axes}" if turned else ""
    if 0 <= low <= high <= 1:
        return f"; save ({axes} * 255.0).round().astype('uint8')"
    if -1 <= low <= high <= 1:
        return f"; save ({axes} * 127.5 + 127.5).round().astype('uint8')"
    whole = ".round()" * (some.dtype.kind == "f")
    return f"; save {axes}{whole}.astype('uint8')" if 0 <= low <= high <= 255 else ""


def check_same_size(sides):
    """Raise BadInput where two sides hold images of different (H, W): none is resized here.

    How many channels they have is evaluation/channels.py's.
    """
    for side, other in itertools.pairwise(sides):
        if side.images.shape[1:3] != other.images.shape[1:3]:
            first, second = (f"{s.name} has {shape_text(s.images)}" for s in (side, other))
            raise BadInput(f"{first}, {second} (HxWxC); make them alike: --size resizes data sets")


# ---------------------------------------------------------------------------------- reading


def split_name(name):
    """'mnist:train' -> ('mnist', 'train'); the test split where none is named."""
    source, _, split = name.rpartition(":")
    return (source, split) if split in ("train", "test") and source else (name, "test")


def load(name, split, cfg, classes=None):
    """The data set `name` as cfg.data_root, cfg.size and cfg.classes, or `classes`, say."""
    classes = cfg.classes if classes is None else classes
    return datasets.load(name, cfg.data_root, split=split, size=cfg.size or None, classes=classes)


def read(name, cfg, n=0):
    """Images or Statistics of `name`; with n > 0, n of its images, drawn by cfg.seed."""
    if name.endswith((".npz", ".npy")):
        found = read_file(name)
    else:
        source, split = split_name(name)
        ds = load(source, split, cfg)
        classes = (ds.labels, ds.class_names) if ds.class_names else (None, None)
        found = Images(name, ds.images, *classes, key=ds.key, set_key=ds.key)
    return draw(found, n, cfg.seed) if n and isinstance(found, Images) else found


def draw(side, n, seed):
    """n of the images of `side`, in the order of the file. Raises BadInput if there are fewer."""
    numbers = drawn(n, len(side.images), seed, side.name)
    return replace(
        side,
        images=Chosen(side.images, numbers),
        labels=None if side.labels is None else side.labels[numbers],
        key=side.key and f"{side.key}-{n}-{seed}",
        statistics=None,
    )


def drawn(n, count, seed, name):
    """The numbers (n,) of n of the `count` images of `name`, rising; of all for n = 0.

    Drawn without replacement, each set of n with the same chance. BadInput if there are fewer.
    """
    if n > count:
        raise BadInput(f"--n {n}: {name} has only {count} images")
    return np.sort(np.random.default_rng(seed).permutation(count)[: n or None])


def read_file(name):
    """Images or Statistics of an .npz or .npy file; BadInput if it holds neither."""
    try:
        if name.endswith(".npy"):
            arrays = {"arr_0": np.load(name, mmap_mode="r", allow_pickle=False)}
        else:
            arrays = _read_npz(name)
        if not isinstance(arrays.get("arr_0", np.empty(0)), np.ndarray):
            raise ValueError("it is no array")
        facts = {k: arrays[k].item() for k in ("n", "protocol", "feature_hash") if k in arrays}
        for key, kind in (("n", int), ("protocol", str), ("feature_hash", str)):
            if key in facts and not isinstance(facts[key], kind):
                raise ValueError(f"{key} is {facts[key]!r}")
        if facts.get("n", 2) < 2:
            raise ValueError(f"n is {facts['n']}")
        if any(arrays[k].dtype.kind not in "fiu" for k in ("mu", "sigma") if k in arrays):
            raise ValueError("mu and sigma are not real numbers")
    except FileNotFoundError:
        raise BadInput(f"{name}: no such file") from None
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # a torn, foreign or lying file raises nearly anything
        raise BadInput(f"{name} is not a readable {name[-4:]} file ({error})") from None
    statistics = None
    if "mu" in arrays and "sigma" in arrays:
        statistics = Statistics(name, arrays["mu"], arrays["sigma"], **facts)
        if "arr_0" not in arrays:
            return statistics
    images, labels, told = arrays.get("arr_0", np.empty(0)), arrays.get("arr_1"), ""
    if images.dtype == np.uint8 and images.ndim == 3 and min(images.shape[1:]) > 4:
        told, images = f"{name} holds {images.shape}, taken as gray images", images[..., None]
    good = images.dtype == np.uint8 and images.ndim == 4 and len(images)
    good = good and images.shape[3] in (1, 3)
    if labels is not None:
        good = good and labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not good:
        held = ", ".join(f"{key} {v.dtype} {v.shape}" for key, v in arrays.items()) or "nothing"
        wanted = "expected arr_0 uint8 (N, H, W, C), arr_1 integers (N,) if any; or mu and sigma"
        raise BadInput(f"{name} holds {held}; {wanted}{mend(images)}")
    return Images(name, images, labels, statistics=statistics, told=told)


def _read_npz(name):
    """{key: array} of an .npz file: arr_0 as a memory map, of what is not used only the shape."""
    arrays = {}
    with zipfile.ZipFile(name) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for member in members.values():
            key = member.filename.removesuffix(".npy")
            if key == member.filename:  # some other file
                continue
            if key == "arr_0":
                arrays[key] = _mapped(name, member, archive)
            elif key in USED:
                arrays[key] = _in_memory(read_member(archive, member.filename, f"{name}/{key}"))
            else:
                with open_member(archive, member.filename, limited=False) as file:
                    shape, _, dtype = _header(file)
                arrays[key] = np.broadcast_to(np.empty((), dtype), shape)  # one number in memory
    return arrays


def _header(file):
    """(shape, whether in Fortran's order, dtype) of the array that a file holds from here on.

    A header says how long it is, which may be gigabytes.
    """
    start, first = file.tell(), io.BytesIO(file.read(LONGEST_HEADER))
    formats = np.lib.format
    old = formats.read_magic(first) == (1, 0)
    found = (formats.read_array_header_1_0 if old else formats.read_array_header_2_0)(first)
    file.seek(start + first.tell())
    return found


def _in_memory(raw):
    """The array in the bytes of an .npy file; ValueError where they are not as many as it says."""
    shape, fortran, dtype = _header(file := io.BytesIO(raw))
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError("an array in it holds objects, or is not as long as its header says")
    return np.ndarray(shape, dtype, raw, file.tell(), order="F" if fortran else "C").copy()


def _mapped(path, member, archive):
    """The array in a member of a zip, mapped: in place, or unpacked to a file that has no name.

    It is read once in any case: its CRC is checked at the end.
    """
    with open_member(archive, member.filename, limited=False) as stream:
        if member.compress_type == zipfile.ZIP_STORED:
            with open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(stream, nowhere, 1 << 20)
            file = open(path, "rb")  # noqa: SIM115 (the map keeps it open)
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")  # of name and extra field, which follow
            file.seek(int(lengths.sum()), os.SEEK_CUR)
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (gone when the map is)
            shutil.copyfileobj(stream, file, 1 << 20)
            file.seek(0)
    start = file.tell()
    shape, fortran, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if file.tell() - start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} is not as long as its header says")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(file, dtype, "r", offset=file.tell(), shape=shape, order=order)


# ----------------------------------------------------------------------- what can be written


def save_statistics(path, side, **more):
    """Write Statistics as an .npz: mu and sigma, which pytorch-fid reads, and what they are of.

    more: further arrays, such as ADM's mu_s, sigma_s and arr_0.
    """
    with atomic_write(path) as temporary:
        write_statistics(temporary, side, **more)


def write_statistics(path, side, **more):
    facts = {"n": side.n, "protocol": side.protocol, "feature_hash": side.feature_hash}
    facts = {key: value for key, value in facts.items() if value is not None}
    np.savez(path, mu=side.mu, sigma=side.sigma, **more, **facts)
