"""Raw data sets of the published layouts, written small and byte by byte; and images to learn."""

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_image(path, pixels, **options):
    """uint8 (H,W), (H,W,3) or (H,W,4) as an image file; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_images(folder, count, *, height=16, width=16, channels=1, classes=("bars", "dots")):
    """`count` PNGs with bars or a disc in them, in a folder for each class, or in one for ()."""
    rng, y, x = np.random.default_rng(7), *np.mgrid[:height, :width]
    for i in range(count):
        shade, phase, period = rng.uniform(80, 250, 3), rng.integers(4), rng.integers(3, 6)
        bars = (x + phase) // period % 2
        disc = (y - height / 2) ** 2 + (x - width / 2 + phase) ** 2 < (period + 1) ** 2
        picture = ((disc if i % 2 else bars)[:, :, None] * shade[:channels]).astype(np.uint8)
        below = Path(folder) / (classes[i % len(classes)] if classes else "")
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:, :, 0] if channels == 1 else picture).save(below / f"{i:05d}.png")
    return Path(folder)


def write_tree(folder, names, side=8):
    """One RGB noise image per name; returns {name: pixels}."""
    pixels = {name: noise((side, side, 3), i) for i, name in enumerate(names)}
    for name, values in pixels.items():
        write_image(folder / name, values)
    return pixels


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, train=30, test=10, zipped=True):
    """The four idx files; returns {split: (images (n,28,28), labels (n,))}."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, part, n in (("train", "train", train), ("test", "t10k", test)):
        images, labels = noise((n, 28, 28), n), noise(n, n) % 10
        made[split] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = idx_bytes(array)
            name = f"{part}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)
    return made


def python2_pickle(rows, labels):
    """{'data': uint8 (n,3072), 'labels': list} as Python 2 and its numpy pickled CIFAR-10."""

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731  BININT
    raw = rows.tobytes()
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
    dtype += b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85"
    array += text(b"b") + b"tR"
    array += b"(K\x01" + number(rows.shape[0]) + number(rows.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"  # BINSTRING
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def write_cifar(folder, kind, packed, each=4):
    """CIFAR-10's 'python' or 'binary' files, loose or in their .tar.gz; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    files, made = {}, {"train": [], "test": []}
    for i, name in enumerate([*CIFAR_TRAIN, "test_batch"]):
        rows, labels = noise((each, 3072), i), noise(each, 99 + i) % 10
        made["test" if name == "test_batch" else "train"].append((rows, labels))
        if kind == "python":
            files[f"cifar-10-batches-py/{name}"] = python2_pickle(rows, labels)
        else:
            records = np.concatenate([labels[:, None], rows], 1)
            files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    if packed:
        with tarfile.open(folder / f"cifar-10-{kind}.tar.gz", "w:gz") as tar:
            for name, raw in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    else:
        for name, raw in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(raw)
    return {
        split: (
            np.concatenate([r for r, _ in parts]).reshape(-1, 3, 32, 32),
            np.concatenate([labels for _, labels in parts]),
        )
        for split, parts in made.items()
    }


def png_bytes(rows, color_type, depth=16):
    """A PNG of raw rows (H, W, samples), written without an image library."""
    height, width = rows.shape[:2]

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    big = rows.astype(">u2" if depth == 16 else np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in big)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
