"""Data sets by name or path: where raw files are looked for, and fetched from."""

from runtime.commandline import BadInput
from runtime.download import fetch, file_hash

import difflib
from dataclasses import replace
from pathlib import Path

from image_data.arrays import FASHION, cifar_source, glyph_source, idx_source
from image_data.trees import kaggle_source, tree_source, walk

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
)
IDX_MD5 = {  # as published: train images and labels, test images and labels
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"  # as published, of cifar-10-python.tar.gz
IDX_FILES = [f"{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
NAMES = ("glyphs", "mnist", "fashion_mnist", "cifar10", "afhq", "imagenet100")


def find(name, root, split):
    """The Source of a data set's split, downloaded to root/name if it has a public address."""
    if name == "glyphs":
        return glyph_source(split)
    folder = Path(root) / name
    if name in IDX_MD5:
        names = FASHION if name == "fashion_mnist" else tuple("0123456789")
        source = idx_source(folder, split, names)
        if source is None:
            mirrors = MNIST_MIRRORS if name == "mnist" else FASHION_MIRRORS
            for file, md5 in zip(IDX_FILES, IDX_MD5[name], strict=True):
                fetch(file, mirrors, folder, md5)
        return source or idx_source(folder, split, names)
    if name == "cifar10":
        source = cifar_source(folder, split) or (
            tree_source(folder, split) if any_image(folder) else None
        )
        if source is None:
            mirrors = ["https://www.cs.toronto.edu/~kriz"]
            fetch("cifar-10-python.tar.gz", mirrors, folder, CIFAR_MD5)
        return source or cifar_source(folder, split)
    if name == "afhq":
        if any_image(folder):
            return tree_source(folder, split)
        path = fetch("afhq.zip", ["https://www.dropbox.com/s/t9l9o3vsx2jai3z/{}?dl=1"], folder)
        return _hashed(tree_source(path, split), path)
    if name == "imagenet100":
        source = kaggle_source(folder, split)
        if source is None and any_image(folder):
            return tree_source(folder, split)
        if source is None:
            raise BadInput(
                f"imagenet100 cannot be downloaded without an account: get kaggle.com/datasets/"
                f"ambityga/imagenet100 and put train.X1 train.X2 train.X3 train.X4 val.X and "
                f"Labels.json into {folder}"
            )
        return source
    path = Path(name)
    if name and path.is_dir():
        return (
            idx_source(path, split)
            or cifar_source(path, split)
            or kaggle_source(path, split)
            or tree_source(path, split)
        )
    if path.is_file() and path.suffix.lower() == ".zip":
        return tree_source(path, split)
    raise BadInput(unknown(name))


def any_image(folder):
    return Path(folder).is_dir() and next(walk(folder), None) is not None


def _hashed(source, path):
    """The same Source, noting the SHA-256 of the file at `path`: no checksum of it is published."""

    def contents():
        found, note = source.contents(), f"{path.name} has sha256 {file_hash(path)}"
        return replace(found, note="; ".join(filter(None, [found.note, note])))

    return replace(source, contents=contents)


def unknown(name):
    if name and Path(name).exists():
        return f"data set {name} is neither a folder nor a .zip of images"
    close = difflib.get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no data set, folder or zip is named {name}{hint} (data sets: {', '.join(NAMES)})"
