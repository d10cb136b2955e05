"""Data sets that come as arrays: the drawn glyphs, MNIST's idx files, CIFAR-10's batches."""

from runtime.commandline import BadInput
from runtime.limits import check_unpacked

import gzip
import math
import tarfile
import zlib
from pathlib import Path

import numpy as np

from image_data import glyphs
from image_data.cifar_pickle import read_batch
from image_data.source import Contents, Source, stamp


def glyph_source(split):
    def contents():
        labels = glyphs.labels(glyphs.COUNTS[split])
        return Contents(labels, glyphs.CLASS_NAMES, drawn=split)

    return Source("drawn with Pillow's font", ["glyphs", glyphs.VERSION, split], contents)


FASHION = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


def idx_path(folders, stem):
    """The first file of that name in one of the folders, gzipped or not; None without one.

    Some programs unpack a file into a folder of its name.
    """
    names = [*_spellings(stem), *(f"{stem}/{name}" for name in _spellings(stem))]
    paths = (Path(folder) / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def _spellings(stem):
    return stem + ".gz", stem, stem.replace("-idx", ".idx")


def idx_names():
    """The names of all of MNIST's files, gzipped or not."""
    kinds = ("images-idx3", "labels-idx1")
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]
    return [name for stem in stems for name in _spellings(stem)]


def _read_idx(path, ndim):
    """An idx file (LeCun's format): magic 0 0 8 ndim, big-endian sizes, bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4 + 4 * ndim)
            if head[:4] != bytes([0, 0, 8, ndim]):
                raise ValueError(f"it does not start as an idx file of {ndim} dimensions does")
            sizes = np.frombuffer(head, ">i4", ndim, 4).tolist()
            if min(sizes) < 1:
                raise ValueError(f"it says that it holds {'x'.join(map(str, sizes))} numbers")
            check_unpacked(path, math.prod(sizes))
            raw = file.read(math.prod(sizes) + 1)  # a zipped file may go on for terabytes
        return np.frombuffer(raw, np.uint8).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BadInput(f"{path} is not a whole idx file ({error}); replace it") from None


DIGITS = tuple("0123456789")


def idx_source(folders, split, class_names=DIGITS, quiet=None):
    """MNIST's four files, gzipped or not, or None if this split's are not in `folders`.

    Each is looked for in one folder after the other, and a line says which files were taken,
    unless all are in the folder `quiet`.
    """
    part = "train" if split == "train" else "t10k"
    kinds = ("images-idx3", "labels-idx1")
    paths = [idx_path(folders, f"{part}-{kind}-ubyte") for kind in kinds]
    if None in paths:
        return None
    told = ""
    if {path.parent for path in paths} != {quiet}:
        told = f"{split} images and labels are read from {' and '.join(map(str, paths))}"

    def contents():
        images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
        if len(images) != len(labels):
            raise BadInput(f"{paths[0]} has {len(images)} images, {paths[1]} {len(labels)} labels")
        if len(labels) and labels.max() >= len(class_names):
            raise BadInput(f"{paths[1]} has the label {labels.max()}, expected 0 to 9")
        return Contents(labels.astype(np.int64), class_names, arrays=images[..., None])

    return Source(str(paths[0].parent), stamp(*paths), contents, told)


# What reading, unpacking and unpickling raise for files that are cut or overwritten.
DAMAGED = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    zlib.error,
    tarfile.TarError,
    BadInput,
)
CIFAR_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR_FILES += (*(f"{name}.bin" for name in CIFAR_FILES), "cifar-10-python.tar.gz")
CIFAR_FILES += ("cifar-10-binary.tar.gz",)
HEADERS = 1 << 20  # bytes of its tar beside the batches, at most


def cifar_source(folder, split, told=False):
    """CIFAR-10's python or binary files, unpacked or still in their .tar.gz; None without them.

    told: whether a line says which were taken.
    """
    folder = Path(folder)
    python = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for kind, names in (("py", python), ("bin", [f"{n}.bin" for n in python])):
        unpacked = [f for f in (folder / f"cifar-10-batches-{kind}", folder) if _has(f, names)]
        archives = [folder / f"cifar-10-{'python' if kind == 'py' else 'binary'}.tar.gz"]
        if unpacked:
            paths = [unpacked[0] / n for n in names]
            read = lambda paths=paths: [p.read_bytes() for p in paths]  # noqa: E731
        elif archives[0].is_file():
            paths = archives
            read = lambda path=archives[0], names=names: _tar_members(path, names)  # noqa: E731
        else:
            continue

        def contents(read=read, kind=kind, where=paths[0].parent):
            try:
                parts = [(_cifar_python if kind == "py" else _cifar_binary)(raw) for raw in read()]
            except DAMAGED as error:
                raise BadInput(f"CIFAR-10 files in {where} are damaged ({error})") from None
            images, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return Contents(labels.astype(np.int64), CIFAR_NAMES, arrays=images)

        where = paths[0].parent if unpacked else paths[0]
        told = (
            f"{split} images and labels are read from CIFAR-10's files in {where}" if told else ""
        )
        return Source(str(folder), stamp(*paths), contents, told)
    return None


def _has(folder, names):
    return all((folder / name).is_file() for name in names)


def _tar_members(path, names):
    """The bytes of some members of a tar, gzipped or not; BadInput where they are too many.

    Names, headers and lists of gaps may be of any length, too, and are read whole: of CIFAR-10's
    tar they are a few kilobytes.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if zipped else open)(path, "rb") as file:
        counted = Counted(file, path, HEADERS)
        with tarfile.open(fileobj=counted, mode="r:") as tar:
            members = {Path(m.name).name: m for m in tar if m.isfile()}
            for name in names:
                check_unpacked(f"{path}/{name}", members[name].size)
            counted.left += sum(members[name].size for name in names)
            return [tar.extractfile(members[name]).read() for name in names]


class Counted:
    """A file of which `left` bytes are read at most; what is passed over does not count."""

    def __init__(self, file, path, left):
        self.file, self.path, self.left = file, path, left
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size):
        if size > self.left:
            raise BadInput(f"{self.path} has headers of {size:,} bytes, CIFAR-10's few")
        found = self.file.read(size)
        self.left -= len(found)
        return found


def _cifar_python(raw):
    return _checked(*read_batch(raw))


def _cifar_binary(raw):
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return _checked(rows[:, 1:], rows[:, 0])


def _checked(rows, labels):
    right = rows.dtype == np.uint8 and rows.shape == (len(labels), 3 * 32 * 32) and len(labels)
    if not right or labels.min() < 0 or labels.max() > 9:
        raise ValueError("not rows of 3072 bytes and labels of 0 to 9")
    return rows, labels
