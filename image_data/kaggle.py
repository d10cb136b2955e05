"""ImageNet-100 as Kaggle has it: train.X1 to train.X4, val.X, Labels.json, in a folder or a zip."""

from runtime.commandline import BadInput
from runtime.limits import read_member

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from image_data.listing import files
from image_data.source import Contents, Source, stamp

TRAIN_PARTS = ("train.X1", "train.X2", "train.X3", "train.X4")


def kaggle_source(folder, split):
    """ImageNet-100 as Kaggle has it: train.X1 ... train.X4, val.X, Labels.json; None without."""
    folder = Path(folder)
    if not (folder / "Labels.json").is_file() or not any(
        (folder / part).is_dir() for part in (*TRAIN_PARTS, "val.X")
    ):
        return None
    there = {part for part in (*TRAIN_PARTS, "val.X") if (folder / part).is_dir()}
    parts = _parts(folder, there, split)
    found = [(f"{part}/{name}", *rest) for part in parts for name, *rest in files(folder / part)]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    where, path = str(folder.resolve()), folder / "Labels.json"
    wanted = [where, digest, *stamp(path), split]
    items = {name: name for name, *_ in found}
    return Source(where, wanted, lambda: _kaggle(folder, path.read_bytes(), parts, items))


def kaggle_zip(path, split, found):
    """The Contents of a zip so, whose Listing is `found`; None for a zip of something else."""
    there = {name.split("/")[0] for name in found.images} & {*TRAIN_PARTS, "val.X"}
    if "Labels.json" not in found.others or not there:
        return None
    parts = _parts(path, there, split)
    items = [name for part in parts for name in found.images if name.startswith(f"{part}/")]
    with zipfile.ZipFile(path) as archive:
        text = read_member(archive, "Labels.json")
    return _kaggle(path, text, parts, {name: found.images[name] for name in items})


def _parts(path, there, split):
    """The folders of a split; BadInput where one is not among those that are `there`."""
    parts = TRAIN_PARTS if split == "train" else ("val.X",)
    if missing := [part for part in parts if part not in there]:
        raise BadInput(
            f"{path} lacks {', '.join(missing)}; ImageNet-100 has them beside Labels.json"
        )
    return parts


def _kaggle(where, text, parts, items):
    """Contents of these image files {name: the name to open it by}; text: of Labels.json."""
    try:
        titles = {wnid: str(title) for wnid, title in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        wrong = f"{where}/Labels.json is not an object of 'wnid: name' ({error})"
        raise BadInput(wrong) from None
    if not items:
        raise BadInput(f"{where}: no images in {', '.join(parts)}")
    wnids = sorted(titles)
    number = {wnid: i for i, wnid in enumerate(wnids)}
    names = tuple(titles[w].split(",")[0].strip() for w in wnids)
    if len(set(names)) < len(names):  # two classes of one name, such as crane
        names = tuple(wnids)
    folders = [item.split("/")[1] for item in items]
    if unknown := sorted(set(folders) - set(wnids)):
        raise BadInput(f"{where}: {unknown[0]} is not named in Labels.json")
    labels = np.array([number[wnid] for wnid in folders], np.int64)
    told = f"{where}: {', '.join(parts)} with {len(items)} images of {len(names)} classes, as"
    return Contents(
        labels,
        names,
        aliases=number,
        container=str(where),
        items=tuple(items.values()),
        told=f"{told} Kaggle has ImageNet-100",
    )
