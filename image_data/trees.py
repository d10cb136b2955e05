"""Data sets that come as image files: folders, zips, and ImageNet-100 as Kaggle lays it out."""

from runtime.commandline import BadInput

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from image_data.decode import EXTENSIONS
from image_data.source import Contents, Source, stamp

TEST_NAMES = ("test", "val", "valid", "validation")


def _is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def walk(folder, prefix=""):
    """(path below folder, size, mtime) of every image file, sorted, without hidden ones.

    This runs at every load(): system calls are one scandir a folder and one stat an image.
    """
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() and _leads_up(folder, entry.path)):
                yield from walk(entry.path, f"{prefix}{entry.name}/")
        elif _is_image(entry.name):
            stat = entry.stat()
            yield f"{prefix}{entry.name}", stat.st_size, stat.st_mtime_ns


def _leads_up(folder, link):
    """Whether a link points to the folder that it is in or to one around it: an endless walk."""
    target = Path(link).resolve()
    return target in (Path(folder).resolve(), *Path(folder).resolve().parents)


def files(folder):
    """walk() as a list; BadInput for what cannot be read, such as a link that leads nowhere."""
    try:
        return list(walk(folder))
    except OSError as error:
        raise BadInput(
            f"{error.filename} cannot be read ({error.strerror}); repair or remove it"
        ) from None


def _zip_items(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is not a readable zip ({error})") from None
    names = [n for n in names if _is_image(n) and not any(map(_is_hidden, n.split("/")))]
    return sorted(names, key=lambda name: name.split("/"))  # the order in which walk() goes


def tree_source(path, split):
    """A folder or zip of images: flat, in class folders, or in train/ and test|val/ of either."""
    where = str(Path(path).resolve())
    if Path(path).is_dir():
        found = files(path)
        names = [name for name, _, _ in found]
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        return Source(where, [where, digest, split], lambda: _tree(path, names, split))
    return Source(where, [where, *stamp(path), split], lambda: _tree(path, _zip_items(path), split))


def _tree(path, names, split):
    """The Contents of a split, found from the names of all image files."""
    if not names:
        raise BadInput(_no_images(path))
    prefix, names = _unwrap(names)
    parts = {}  # split folder -> names below it
    for name in names:
        top, _, below = name.partition("/")
        if below and top in ("train", *TEST_NAMES):
            parts.setdefault(top, []).append(below)
    if "train" not in parts and sum(map(len, parts.values())) < len(names):
        parts = {}  # a class may be named test, too
    test = next((name for name in TEST_NAMES if name in parts), None)
    train = "train" if "train" in parts else None
    notes = []
    wanted = train if split == "train" else test
    if wanted is None:
        wanted = train or test or ""
        parts.setdefault("", names)
        notes.append(f"there is no {split} folder: train and test are the same images")
    if wanted and (unused := len(names) - sum(len(parts[p]) for p in (train, test) if p)):
        notes.append(f"{unused} images outside of {train or ''} {test or ''} are not used")

    found = {p: {_class_of(n) for n in parts[p]} for p in {train, test, wanted} if p is not None}
    mine = found[wanted]
    if "" in mine and len(mine) > 1:
        stray = next(n for n in parts[wanted] if _class_of(n) == "")
        raise BadInput(f"{path} mixes class folders and loose images ({stray}); move one of them")
    prefix += f"{wanted}/" if wanted else ""
    items = tuple(prefix + n for n in parts[wanted])
    labels, class_names = np.zeros(len(items), np.int64), ()
    if "" not in mine:
        class_names = _sorted_classes(set().union(*found.values()) - {""})  # the same in any split
        number = {name: i for i, name in enumerate(class_names)}
        labels = np.array([number[_class_of(n)] for n in parts[wanted]], np.int64)
    return Contents(labels, class_names, container=str(path), items=items, note="; ".join(notes))


def _no_images(path):
    zips = sorted(p.name for p in Path(path).glob("*.zip")) if Path(path).is_dir() else []
    hint = f"; did you mean {Path(path) / zips[0]}?" if zips else ""
    return f"{path} holds no images, expected files such as cat/1.png or 1.jpg in it{hint}"


def _unwrap(names):
    """(prefix, names below it) without the folders around everything, which say nothing."""
    prefix = ""
    while True:
        top, _, below = names[0].partition("/")
        if not below or top in ("train", *TEST_NAMES):
            return prefix, names
        if any(not name.startswith(f"{top}/") for name in names):
            return prefix, names
        prefix, names = f"{prefix}{top}/", [name[len(top) + 1 :] for name in names]


def _class_of(name):
    """The first folder of a path, '' for a loose image."""
    return name.partition("/")[0] if "/" in name else ""


def _sorted_classes(names):
    """By name, numbers by value."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


TRAIN_PARTS = ("train.X1", "train.X2", "train.X3", "train.X4")


def kaggle_source(folder, split):
    """ImageNet-100 as Kaggle has it: train.X1 ... train.X4, val.X, Labels.json; None without."""
    folder = Path(folder)
    if not (folder / "Labels.json").is_file() or not any(
        (folder / part).is_dir() for part in (*TRAIN_PARTS, "val.X")
    ):
        return None
    parts = TRAIN_PARTS if split == "train" else ("val.X",)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise BadInput(
            f"{folder} lacks {', '.join(missing)}; ImageNet-100 has them beside Labels.json"
        )
    found = [(f"{part}/{name}", *rest) for part in parts for name, *rest in files(folder / part)]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    where = str(folder.resolve())
    wanted = [where, digest, *stamp(folder / "Labels.json"), split]
    return Source(where, wanted, lambda: _kaggle(folder, parts, [name for name, *_ in found]))


def _kaggle(folder, parts, items):
    path = folder / "Labels.json"
    try:
        titles = {wnid: str(title) for wnid, title in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path} is not an object of 'wnid: name' ({error})") from None
    if not items:
        raise BadInput(f"{folder}: no images in {', '.join(parts)}")
    wnids = sorted(titles)
    number = {wnid: i for i, wnid in enumerate(wnids)}
    names = tuple(titles[w].split(",")[0].strip() for w in wnids)
    if len(set(names)) < len(names):  # two classes of one name, such as crane
        names = tuple(wnids)
    folders = [item.split("/")[1] for item in items]
    if unknown := sorted(set(folders) - set(wnids)):
        raise BadInput(f"{folder}: {unknown[0]} is not named in Labels.json")
    labels = np.array([number[wnid] for wnid in folders], np.int64)
    return Contents(labels, names, aliases=number, container=str(folder), items=tuple(items))
