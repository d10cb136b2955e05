"""Data sets by name or path: where raw files are looked for, and fetched from."""

from runtime.commandline import BadInput
from runtime.download import Unavailable, fetch, file_hash
from runtime.processes import say_once
from runtime.typed_flags import near

from dataclasses import replace
from pathlib import Path

from image_data.arrays import (
    DIGITS,
    FASHION,
    cifar_source,
    glyph_source,
    idx_path,
    idx_source,
)
from image_data.kaggle import kaggle_source
from image_data.listing import is_image
from image_data.packed import known_zip, zip_in, zip_source
from image_data.trees import PACKED, is_split, tree_source, walk_of

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
# Version 1 of StarGAN v2's authors (Choi et al. 2020); version 2, resampled and with fewer images,
# is another file of theirs: in data/afhq/ it is read as well.
AFHQ_MIRROR = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/{}?dl=1"
IDX_SETS = {  # mirrors, class names, torchvision's folder, in which there is raw/
    "mnist": (MNIST_MIRRORS, DIGITS, "MNIST"),
    "fashion_mnist": (FASHION_MIRRORS, FASHION, "FashionMNIST"),
}
IDX_FILES = [f"{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
CLASSES = {"cifar10": 10, "afhq": 3, "imagenet100": 100}  # of sets that may be image files
NAMES = ("glyphs", "mnist", "fashion_mnist", "cifar10", "afhq", "imagenet100")


def find(name, root, split):
    """The Source of a data set's split, downloaded to root/name if it has a public address.

    MNIST and Fashion-MNIST are also found in root/MNIST/raw, root/FashionMNIST/raw and the like,
    CIFAR-10 in root/cifar-10-batches-py, where torchvision keeps them. Where nothing is unpacked
    the one zip in root/name is read (image_data/packed.py). Nothing that is there is downloaded
    again. Raises BadInput for a name or path that is no data set, Unavailable for files that are
    not to be had.
    """
    if name == "glyphs":
        return glyph_source(split)
    folder = Path(root) / name
    if name in IDX_MD5:
        mirrors, names, theirs = IDX_SETS[name]
        folders = _with_raw(folder, folder / theirs, Path(root) / theirs)
        source = idx_source(folders, split, names, quiet=folder)
        source = source or known_zip(name, folder, split, 10, names)
        if source is None:
            for file, md5 in zip(IDX_FILES, IDX_MD5[name], strict=True):
                if idx_path(folders, file.removesuffix(".gz")) is None:
                    fetch(file, mirrors, folder, md5)
        return source or idx_source(folders, split, names, quiet=folder)
    if name == "cifar10":
        source = cifar_source(folder, split) or _known_tree(name, folder, split)
        source = source or cifar_source(root, split, told=True)
        source = source or known_zip(name, folder, split, CLASSES[name])
        if source is None:
            mirrors = ["https://www.cs.toronto.edu/~kriz"]
            fetch("cifar-10-python.tar.gz", mirrors, folder, CIFAR_MD5)
        return source or cifar_source(folder, split)
    if name == "afhq":
        if source := _known_tree(name, folder, split):
            return source
        if (path := zip_in(folder)) is None:
            path = fetch("afhq.zip", [AFHQ_MIRROR], folder)
        return _hashed(known_zip(name, folder, split, CLASSES[name]), path)
    if name == "imagenet100":
        source = kaggle_source(folder, split) or _known_tree(name, folder, split)
        source = source or known_zip(name, folder, split, CLASSES[name])
        if source is None:
            raise Unavailable(
                f"imagenet100 cannot be downloaded without an account: get kaggle.com/datasets/"
                f"ambityga/imagenet100 and put train.X1 train.X2 train.X3 train.X4 val.X and "
                f"Labels.json, or its archive.zip, into {folder}"
            )
        return source
    path = Path(name)
    if name and path.is_dir():
        return (
            _idx_below(path, split)
            or cifar_source(path, split, told=True)
            or kaggle_source(path, split)
            or tree_source(path, split)
        )
    if path.is_file() and path.suffix.lower() == ".zip":
        return zip_source(path, split)
    raise BadInput(unknown(name))


def _idx_below(path, split):
    """MNIST's files in a folder, or below it as torchvision lays them out; None without."""
    fashion = "fashion" in (path.parent if path.name == "raw" else path).name.lower()
    found = []
    for names, folders in (
        (FASHION if fashion else DIGITS, _with_raw(path)),
        (DIGITS, _with_raw(path / "MNIST")),
        (FASHION, _with_raw(path / "FashionMNIST")),
    ):
        if source := idx_source(folders, split, names):
            named = ["fashion"] if names is FASHION else []
            found.append(replace(source, stamp=[*source.stamp, *named]))
    if len(found) > 1:
        origins = " and ".join(source.origin for source in found)
        raise BadInput(f"{path} holds several data sets: {origins}; type one of these as --data")
    return found[0] if found else None


def _with_raw(*folders):
    """Folders, each followed by the one in which torchvision keeps the files."""
    return [path for folder in folders for path in (folder, folder / "raw")]


def _known_tree(name, folder, split):
    """The image files of a known set, if there are class folders, however many; else None.

    A line says how many of its classes are there, or that loose images are not used.
    """
    walked = walk_of(folder) if folder.is_dir() else ([], [])
    images = [path.split("/") for path, *_ in walked[0]]
    classes = {parts[-2] for parts in images if len(parts) > 1}
    classes = {found.casefold() for found in classes if not is_split(found)}
    if classes:
        if len(classes) != CLASSES[name]:
            there = "is" if len(classes) == 1 else "are"
            known = f"{name}'s {CLASSES[name]} classes {there} there"
            say_once(f"note: {len(classes)} of {known}: class folders in {folder}")
        return tree_source(folder, split, walked)
    if images:
        first = folder.joinpath(*images[0])
        more = f" and {len(images) - 1:,} more" * (len(images) > 1)
        told = f"note: {first}{more} not used: {name} is class folders, {CLASSES[name]} of them"
        say_once(told + f"; if they are what you want, type --data {folder}")
    return None


def _hashed(source, path):
    """The same Source, noting the SHA-256 of the file at `path`: no checksum of it is published."""

    def contents():
        found, note = source.contents(), f"{path.name} has sha256 {file_hash(path)}"
        return replace(found, note="; ".join(filter(None, [found.note, note])))

    return replace(source, contents=contents)


def unknown(name):
    if name and Path(name).exists():
        hint = "; unpack it and name the folder" if name.lower().endswith(PACKED) else ""
        hint = f"; name the folder {Path(name).parent}" if is_image(name) else hint
        return f"data set {name} is neither a folder nor a .zip of images{hint}"
    found = near(name, NAMES)
    hint = f"; did you mean {found}?" if found else ""
    return f"no data set, folder or zip is named {name}{hint} (data sets: {', '.join(NAMES)})"
