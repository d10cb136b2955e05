"""A known data set as one zip in its folder: data/afhq/afhq.zip, data/imagenet100/archive.zip.

What is unpacked there comes first (image_data/sources.py). A zip is read as it lies: class folders,
ImageNet-100 as Kaggle packs it, MNIST's idx files or CIFAR-10's batches; a line says which it was.
"""

from runtime.commandline import BadInput
from runtime.limits import read_member

import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from image_data.arrays import CIFAR_FILES, cifar_source, idx_names, idx_source
from image_data.kaggle import kaggle_zip
from image_data.listing import listing
from image_data.trees import tree_contents, tree_source


def zip_in(folder):
    """The one zip in a folder, None without; BadInput with the names where there are several."""
    found = Path(folder).glob("*") if Path(folder).is_dir() else ()
    zips = [path for path in found if path.suffix.lower() == ".zip" and path.is_file()]
    zips = sorted(path for path in zips if not path.name.startswith("."))
    if len(zips) > 1:
        names = " and ".join(path.name for path in zips)
        raise BadInput(f"{folder} holds {names}: keep one there, or type --data {zips[0]}")
    return zips[0] if zips else None


def known_zip(name, folder, split, classes, names=()):
    """The Source of the known set `name` from the one zip in its folder; None without a zip.

    classes: how many it has. names: of the classes, where MNIST's files number them. A line notes
    that there are more or fewer. BadInput for two zips, and for one that holds no classes.
    """
    if (path := zip_in(folder)) is None:
        return None

    def contents():
        found = listing(path)
        files = {Path(other).name: other for other in found.others}
        members = {file: files[file] for file in files.keys() & {*CIFAR_FILES, *idx_names()}}
        if members and not found.images:
            return _arrays(name, path, split, names, members)
        made = _images(path, split, found)
        if not made.class_names:
            wrong = f"{path} has images without classes, but {name} has {classes} class folders"
            raise BadInput(f"{wrong}; if they are what you want, type --data {path}")
        if (have := len(made.class_names)) == classes:
            return made
        there = "is" if have == 1 else "are"
        told = f"{made.told}; {have} of {name}'s {classes} classes {there} there"
        return replace(made, told=told)

    return replace(tree_source(path, split), contents=contents)


def zip_source(path, split):
    """The Source of a zip of images, by name."""
    found = tree_source(path, split)
    return replace(found, contents=lambda: _images(path, split, listing(path)))


def _images(path, split, found):
    return kaggle_zip(path, split, found) or tree_contents(path, found, split)


def _arrays(name, path, split, names, members):
    """Contents of MNIST's or CIFAR-10's own files; members: {file: its name in the zip}."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        for file, member in members.items():
            Path(folder, file).write_bytes(read_member(archive, member))
        cifar = name == "cifar10"
        source = cifar_source(folder, split) if cifar else idx_source([folder], split, names)
        made = source.contents() if source else None
    if made is None:
        raise BadInput(f"{path} lacks files of the {split} split; put all of them into it")
    told = f"{split} images and labels are read from {path}: {', '.join(sorted(members))}"
    return replace(made, told=told)
