"""Data sets that come as image files: folders, zips, and ImageNet-100 as Kaggle lays it out."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from support.commandline import BadInput
from support.decode import EXTENSIONS
from support.source import Contents, Source, stamp

TEST_NAMES = ("test", "val", "valid", "validation")


def walk(folder, prefix=""):
    """(path below folder, size, mtime) of every image file, sorted, without hidden ones."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix.lower() in EXTENSIONS:
            stat = entry.stat()
            yield f"{prefix}{entry.name}", stat.st_size, stat.st_mtime_ns


def _zip_items(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(i.filename for i in archive.infolist() if not i.is_dir())
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is not a readable zip ({error})") from None
    hidden = lambda name: any(p.startswith(".") or p == "__MACOSX" for p in name.split("/"))  # noqa: E731
    return [n for n in names if Path(n).suffix.lower() in EXTENSIONS and not hidden(n)]


def tree_source(path, split):
    """A folder or zip of images: flat, in class folders, or in train/ and test|val/ of either."""
    if Path(path).is_dir():
        found = list(walk(path))
        names = [name for name, _, _ in found]
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        return Source(str(path), [digest, split], lambda: _tree(path, names, split))
    return Source(str(path), [*stamp(path), split], lambda: _tree(path, _zip_items(path), split))


def _tree(path, names, split):
    if not names:
        raise BadInput(f"{path} holds no images; expected files such as cat/1.png or 1.jpg in it")
    prefix = ""
    while len(tops := {n[len(prefix) :].split("/")[0] for n in names}) == 1 and not any(
        t in ("train", *TEST_NAMES) or f"{prefix}{t}" in names for t in tops
    ):
        prefix += tops.pop() + "/"  # folders around everything say nothing
    splits = {
        s: [n for n in names if n.startswith(f"{prefix}{s}/")] for s in ("train", *TEST_NAMES)
    }
    wanted = ["train"] if split == "train" else TEST_NAMES
    note = ""
    chosen = next(((f"{prefix}{s}/", splits[s]) for s in wanted if splits[s]), None)
    if chosen is None:
        left = splits["train"] or names
        chosen = (f"{prefix}train/" if splits["train"] else prefix), left
        note = f"no {' or '.join(wanted)} folder: these are the images of the whole set"
    below, items = chosen
    folders = [n[len(below) :].split("/")[0] if "/" in n[len(below) :] else "" for n in items]
    class_names = tuple(sorted(set(folders)))
    if "" in class_names and len(class_names) > 1:
        stray = items[folders.index("")]
        raise BadInput(f"{path} mixes class folders and loose images ({stray}); move one of them")
    if class_names == ("",):
        labels, class_names = np.zeros(len(items), np.int64), ()
    else:
        labels = np.array([class_names.index(f) for f in folders], np.int64)
    return Contents(labels, class_names, container=str(path), items=tuple(items), note=note)


def kaggle_source(folder, split):
    """ImageNet-100 as Kaggle has it: train.X1 ... train.X4, val.X, Labels.json; None without."""
    folder = Path(folder)
    parts = (
        [folder / f"train.X{i}" for i in range(1, 5)] if split == "train" else [folder / "val.X"]
    )
    if not (folder / "Labels.json").is_file() or not any(p.is_dir() for p in parts):
        return None
    missing = [p.name for p in parts if not p.is_dir()]
    if missing:
        raise BadInput(
            f"{folder} lacks {', '.join(missing)}; ImageNet-100 has them beside Labels.json"
        )
    found = [(f"{p.name}/{name}", *rest) for p in parts for name, *rest in walk(p)]

    def contents():
        titles = json.loads((folder / "Labels.json").read_text())
        wnids = sorted(titles)
        names = tuple(titles[w].split(",")[0].strip() for w in wnids)
        names = names if len(set(names)) == len(names) else tuple(wnids)
        items = tuple(name for name, *_ in found)
        if not items:
            raise BadInput(f"{folder}: {', '.join(p.name for p in parts)} hold no images")
        unknown = {i.split("/")[1] for i in items} - set(wnids)
        if unknown:
            raise BadInput(f"{folder}: folder {sorted(unknown)[0]} is not named in Labels.json")
        order = {w: i for i, w in enumerate(wnids)}
        labels = np.array([order[i.split("/")[1]] for i in items], np.int64)
        return Contents(labels, names, aliases=order, container=str(folder), items=items)

    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return Source(str(folder), [digest, split], contents)
