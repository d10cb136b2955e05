"""Data sets that come as image files, in folders or zips.

Folders and zips are read by one rule, whatever system made them (image_data/listing.py), and one
printed line tells what was understood:

Around everything   Folders that hold all images say nothing: photos/photos/train/ is train/; but
                    cat/1.png beside an empty dog/ is of class cat.
Splits              Folders named train or training; test, testing, eval or evaluation; val, valid,
                    validation or dev, in any case of letters. Other words and digits may stand
                    around both names of a pair: seg_train and seg_test, train and test1, and words
                    for images around either: trainset, test_images. Of test
                    and val, test is the test split, unless only val has class folders, as in
                    ImageNet. Where one is missing, train and test are the same images.
Classes             The first folders below a split, or of all where there are no splits. Numbers
                    are sorted by value, other names by their letters. Both splits have the same
                    classes, those of train and test together. Cat/ in train and cat/ in test are
                    one class. Images without class folders have no classes. The labels in a
                    dataset.json that StyleGAN's or EDM's dataset_tool.py wrote are the classes.
Both                A split's name among two or more other folders of images is a class: car, bus
                    and train are three classes, for a train is a thing. Where there are train/cat
                    and test/cat, other folders beside them, and loose images, are not used.

Refused with a word of what to do: anything between those; train beside training; class folders
Cat and cat in one split; splits inside of class folders (cat/train); loose images among class
folders; val and test without train; a train folder without images.

torchvision's ImageFolder differs on purpose: it knows no splits, so that it takes train and test
for classes, or numbers the classes of each split by itself; it sorts 10 before 2; it refuses class
folders without images, which a line tells of here. So does imagefolder of Hugging Face's datasets:
it takes train among car and bus for a split and leaves the others out, knows no Train, takes a
split's name in a file's name for a split, calls the last folder the class, knows no class where
depths differ or there is but one, and reads labels from metadata.csv. Neither reads dataset.json.
"""

from runtime.commandline import BadInput
from runtime.files import read_json

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from image_data.label_table import Table, stamps, table_of
from image_data.listing import files, listing, ours, shortened, told_of
from image_data.source import Contents, Source, stamp

RULE = 4  # of what is said above: what an earlier one understood is prepared anew
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
}
FILLERS = ("set", "dataset", "data", "images", "image", "imgs", "img", "pictures", "photos")
JOINED = re.compile(f"({'|'.join(sum(WORDS.values(), ()))})(?:{'|'.join(FILLERS)})")
PARTS = re.compile(r"0\d{3,}|\d{5,}")  # 00000, 01000, 02000: as FFHQ comes, in parts of a thousand
MORE = frozenset(["extra", "unlabeled", "unlabelled", "unsup", "pred", "other", "others", "rest"])
PICTURES = frozenset(["image", "images", "img", "imgs"])
MASKS = frozenset(["label", "labels", "mask", "masks", "annotations", "gt", "segmentation"])
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")


def tree_source(path, split, walked=None):
    """A folder or zip of images: flat, in class folders, or in train/ and test|val/ of either.

    walked: files() of a folder and what it left out, where that is known. BadInput for a folder
    that this program wrote, which says what to type.
    """
    where, told = str(Path(path).resolve()), ""
    if Path(path).is_dir():
        found, left_out = walked or walk_of(path)
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        _refuse_ours(Path(path))
        wanted = [where, digest, split, RULE, *stamps(path, [name for name, *_ in found])]
        told = told_of(left_out)
    else:
        wanted = [where, *stamp(path), split, RULE]
    return Source(where, wanted, lambda: tree_contents(path, listing(path), split), told)


def walk_of(folder):
    """(files() of a folder, what it left out)."""
    left_out = []
    return files(folder, left_out=left_out), left_out


def _refuse_ours(folder):
    """BadInput for a folder that this program wrote; it says what to type."""
    kind = ours({found.name for found in folder.iterdir()})
    if kind == "a prepared set":
        known = read_json(folder / "manifest.json").get("source", "see its manifest.json")
        hint = f"type what it was made from: {known}"
    else:
        readable = (folder / name for name in ("samples.npz", "reconstructions.npz", "ckpt.pt"))
        found = [str(path) for path in readable if path.is_file()]
        hint = f"eval_fid.py takes {' or '.join(found)}; " * bool(found)
        hint += "if there are images of yours in it, move them to a folder of their own"
    if kind:
        raise BadInput(f"{folder} is no data set, but {kind} of this program; {hint}")


@dataclass(frozen=True)
class _Part:
    """The images of one split: `names` below `folder`, which ends with '/' or is ''.

    table: that of their labels, in which names have `around` in front, or None for class folders.
    """

    folder: str
    names: list[str]
    table: Table | None = None
    around: str = ""

    def class_of(self, name):
        """The class of one of the images, '' for none."""
        if self.table:
            return self.table.class_of(f"{self.around}{self.folder}{name}")
        return _class_of(name)

    @cached_property
    def counts(self):
        """{class: number of its images}; {} where there are no classes."""
        found = Counter(map(self.class_of, self.names))
        return {} if "" in found else found

    def told(self, class_names):
        """What is printed of it."""
        images = f"{self.folder} with " * bool(self.folder) + _images(len(self.names))
        if not self.counts:
            return f"{images} without classes"
        counts = {_same(name): count for name, count in self.counts.items()}
        listed = [f"{name} {counts[_same(name)]}" for name in class_names if _same(name) in counts]
        classes = "1 class" if len(listed) == 1 else f"{len(listed)} classes"
        return f"{images} of {classes} ({shortened(listed)})"


def tree_contents(path, found, split):
    """The Contents of a split, from the Listing of all files."""
    if not found.images:
        raise BadInput(_no_images(path, found))
    prefix, names = _unwrap("", list(found.images), lambda at: _is_around(at, found))
    folders, notes = _splits(path, prefix, names, found.folders)
    train, test = (_part(path, found, prefix, folder, _below(folder, names)) for folder in folders)
    is_other = len(test.counts) == 1 and not _same_names(train) & _same_names(test)
    if train.counts and is_other and not test.table:
        folder, below = _unwrap(test.folder, test.names, lambda at: True)  # val/images/1.png
        notes.append(f"{folder} is no class of {train.folder}: its images have no classes")
        test = _Part(folder, below)
    class_names = _class_names(path, train, test, notes)
    notes += _not_used(prefix, found, names, train, test)
    if found.left_out and not Path(path).is_dir():  # of a folder a line tells at every load
        notes.append(found.left_out)

    wanted = train if split == "train" else test
    number = {_same(name): i for i, name in enumerate(class_names)} if wanted.counts else {}
    labels = [number.get(_same(wanted.class_of(name)), 0) for name in wanted.names]
    told = [f"{path}: {train.told(class_names)}"]
    told += [f"test split {test.told(class_names)}"] if test.folder != train.folder else []
    return Contents(
        np.array(labels, np.int64),
        class_names if wanted.counts else (),
        container=str(path),
        items=tuple(found.images[prefix + wanted.folder + name] for name in wanted.names),
        note="; ".join(notes),
        told="; ".join(told + notes),
    )


def _no_images(path, found):
    """What to say of a folder or zip without images."""
    packed = [name for name in found.others if name.lower().endswith(PACKED) and "/" not in name]
    if packed:
        where = Path(path) / packed[0]
        hint = f"unpack {where} first"
        if Path(path).is_dir() and where.suffix == ".zip":
            hint = f"did you mean {where}?"
    elif found.others:
        hint = f"files such as {next(iter(found.others))} are of other kinds"
    else:
        hint = found.left_out or "it is empty"
    return f"{path} holds no images, expected files such as cat/1.png or 1.jpg in it; {hint}"


def _images(count):
    return f"{count:,} image" + "s" * (count != 1)


def _unwrap(prefix, names, goes):
    """(prefix, names below it) without the folders around everything, as long as goes(path)."""
    while True:
        top, slash, _ = names[0].partition("/")
        if (
            not slash
            or not goes(prefix + top)
            or any(not name.startswith(f"{top}/") for name in names)
        ):
            return prefix, names
        prefix, names = f"{prefix}{top}/", _below(f"{top}/", names)


def _is_around(folder, found):
    """Whether the one folder that holds all images is no split, nor the only class with images."""
    parent, slash, name = folder.rpartition("/")
    if _exact(name):
        return False
    loose = any("/" not in image for image in _below(f"{folder}/", found.images))
    if not loose or name.casefold() in PICTURES:
        return True
    beside = {f[:-1] for f in found.folders if f[:-1].rpartition("/")[0] == parent} - {folder}
    return all(f.rpartition("/")[2].casefold() in MASKS for f in beside)


def _below(folder, names):
    return [name[len(folder) :] for name in names if name.startswith(folder)]


# ----------------------------------------------------------------------------------- which splits


def _exact(folder):
    """The split that a folder's whole name tells, or None."""
    return next((s for s, words in WORDS.items() if folder.casefold() in words), None)


def is_split(folder):
    """Whether a word in a folder's name tells a split, and no other word is in it."""
    return bool(told := _split_of(folder)) and not told[1]


def _split_of(folder):
    """(the split that a word in a folder's name tells, its other words), or None.

    Words that say that it holds images say nothing: trainset and train_images are train.
    """
    apart = re.sub("(?<=[a-z])(?=[A-Z])", " ", folder).casefold()  # trainA is train a
    words = re.findall(r"[^-_. 0-9]+", apart)
    words = [JOINED.fullmatch(word)[1] if JOINED.fullmatch(word) else word for word in words]
    words = [word for word in words if word not in FILLERS]
    told = [(s, w) for s, known in WORDS.items() for w in words if w in known]
    return (told[0][0], [w for w in words if w != told[0][1]]) if len(told) == 1 else None


def _split_folders(tops):
    """{folder: split} of the folders that are named so."""
    found = {top: _exact(top) for top in tops if _exact(top)}
    groups = {}
    for top in tops:
        if told := _split_of(top):
            groups.setdefault(tuple(told[1]), {})[top] = told[0]
    for group in groups.values():
        if "train" in group.values() and len(set(group.values())) > 1:
            found |= group
    return found


def _splits(path, prefix, names, folders):
    """((folder of train, folder of test), notes); the folders are '' where there are no splits."""
    tops = sorted({_class_of(name) for name in names} - {""})
    found = _split_folders(tops)
    others = [top for top in tops if top not in found]
    inside = {}  # class folders
    for top in found:
        _, below = _inside(f"{top}/", _below(f"{top}/", names))
        inside[top] = {_same(_class_of(name)) for name in below} - {""}
    trains = [top for top in found if found[top] == "train"]
    held_out = [top for top in found if found[top] != "train"]
    flat = {_class_of(name) for name in names if name.count("/") == 1} == {*tops}
    alike = flat and len(others) > 1 and not MORE & set(map(str.casefold, others))
    if len(found) == 1 and alike and not any(inside.values()):
        found = {}  # car, bus and train
    if not trains and any("/" not in name for name in names):
        found = {}
    if not found:
        return ("", ""), ["there is no train or test folder: train and test are the same images"]

    if others and not any(inside[t] & inside[h] for t in trains for h in held_out):
        raise BadInput(
            f"{path} has {_folders(others)} beside {_folders(found)}, which by name "
            f"{'are splits' if len(found) > 1 else 'is a split'}: move the one away, or rename the "
            "other if it is a class"
        )
    of = {}
    for top, split in found.items():
        if split in of:
            one = f"{path}: {of[split]}/ and {top}/ both name the {split} split; join them"
            this = f", or type --data {Path(path) / prefix / of[split]}" if split == "train" else ""
            raise BadInput(one + this * Path(path).is_dir())
        of[split] = top
    bare = [f[len(prefix) : -1] for f in folders if f.startswith(prefix)]
    bare = {split: top for top in bare if top not in tops and (split := _exact(top))}
    if "train" not in of and ("train" in bare or len(of) > 1):
        why = f"{bare['train']}/ holds no images" if "train" in bare else "there is no train/"
        raise BadInput(
            f"{path} has {_folders(found)}, but {why}: rename the folder to train on to train/, or "
            f"type it as --data"
        )
    test = of.get("test", of.get("val"))
    if {"train", "test", "val"} <= of.keys() and not inside[test]:
        test = of["val"] if inside[of["train"]] and inside[of["val"]] else test
    notes = []
    if len(of) == 1:
        lacks = "test" if "train" in of else "train"
        empty = bare.get(lacks, bare.get("val"))
        why = f"{empty}/ holds no images" if empty else f"there is no {lacks} folder"
        notes.append(f"{why}: train and test are the same images")
    return (f"{of.get('train', test)}/", f"{test or of['train']}/"), notes


def _folders(names):
    return shortened([f"{name}/" for name in names])


# ------------------------------------------------------------------------------------ which classes


def _inside(folder, names):
    """_unwrap() of a split: training_set/training_set/ is training_set/."""
    mine = _split_of(folder[:-1])
    return _unwrap(folder, names, lambda at: _split_of(at.rpartition("/")[2]) == mine)


def _part(path, found, prefix, folder, names):
    """The images of a split; BadInput for a layout that has no one meaning."""
    if folder:
        folder, names = _inside(folder, names)
    if table := table_of(path, found, [f"{prefix}{folder}{name}" for name in names]):
        return _Part(folder, names, table, prefix)
    tops = {_class_of(name) for name in names}
    if "" in tops and len(tops) > 1:
        stray = next(name for name in names if "/" not in name)
        raise BadInput(f"{path} mixes class folders and loose images ({stray}); move one of them")
    inner = {}  # class folder -> splits that folders in it name
    for top, below in {tuple(name.split("/")[:2]) for name in names if name.count("/") > 1}:
        inner.setdefault(top, set()).add(below)
    for top, below in sorted(inner.items()):
        splits = set(_split_folders(below).values())
        if "train" in splits and len(splits) > 1:
            raise BadInput(
                f"{path} has splits inside of {folder}{top}/, expected class folders inside of "
                f"train/ and test/, such as train/{top}/1.png; or is {top}/ the data set to name?"
            )
    return _Part(folder, names)


def _class_of(name):
    """The first folder of a path, '' for a loose image."""
    return name.partition("/")[0] if "/" in name else ""


def _same(name):
    """What names have in common that differ only by case, or by spaces and dots at their end."""
    return unicodedata.normalize("NFC", name.casefold()).rstrip(" .") or name


def _same_names(part):
    return set(map(_same, part.counts))


def _class_names(path, train, test, notes):
    """The names of both splits' classes, in their order; what is strange comes to the notes."""
    spelled = {}
    for part in {train.folder: train, test.folder: test}.values():
        mine = {}
        for name in part.counts:
            other = mine.setdefault(_same(name), name)
            if other != name:
                raise BadInput(
                    f"{path}: the class folders {other}/ and {name}/ differ only by case, or by a "
                    "space or dot at the end; join them, or rename one"
                )
            if spelled.setdefault(_same(name), name) != name:
                notes.append(f"{part.folder}{name}/ is the class {spelled[_same(name)]}")
    if train.counts and (more := _same_names(test) - _same_names(train)):
        names = sorted(spelled[name] for name in more)
        notes.append(f"{train.folder} has no images of {shortened(names)}")
    by_folder = [part for part in (train, test) if not part.table]
    deep = next((n for part in by_folder for n in part.names if n.count("/") > 1), "")
    if deep and train.counts:
        notes.append(f"classes are the first folders: {deep} is of class {_class_of(deep)}")
    if len(train.counts) > 1 and not train.table and all(map(PARTS.fullmatch, train.counts)):
        parts = shortened(sorted(train.counts))
        notes.append(f"{parts} become classes by their folders; is that meant?")
    pair = {name.casefold() for name in train.counts}
    if len(pair) == 2 and pair & PICTURES and pair & MASKS:
        notes.append(f"{' and '.join(sorted(train.counts))} become two classes; is that meant?")
    return _sorted_classes(spelled.values())


def _sorted_classes(names):
    """By name, numbers by value, which may have more digits than int() takes."""

    def value(name):
        digits = "".join(str(unicodedata.decimal(letter)) for letter in name).lstrip("0")
        return len(digits), digits, name

    return tuple(sorted(names, key=value if all(map(str.isdecimal, names)) else None))


def _not_used(prefix, found, names, train, test):
    """Notes on images, folders and files that have no part in either split."""
    notes, parts = [], {train.folder: train, test.folder: test}
    if unused := len(names) - sum(len(part.names) for part in parts.values()):
        notes.append(f"{_images(unused)} outside of {' and '.join(parts)} not used")
    for folder, part in parts.items():
        depth = (prefix + folder).count("/") + 1
        below = [
            f for f in found.folders if f.startswith(prefix + folder) and f.count("/") == depth
        ]
        bare = {f[len(prefix + folder) :] for f in below} - {f"{name}/" for name in part.counts}
        if part.counts and bare and not part.table:
            notes.append(f"without images: {shortened([folder + f for f in sorted(bare)])}")
    tables = {part.table.name: part.table for part in parts.values() if part.table}
    notes += [table.told for table in tables.values()]
    others = found.others.keys() - tables.keys()
    if others := sorted(others, key=lambda n: (not n.lower().endswith(TABLES), n)):
        more = f" and {len(others) - 1} more" * (len(others) > 1)
        why = " (classes are the names of folders)" * others[0].lower().endswith(TABLES)
        notes.append(f"not read: {others[0]}{more}{why}")
    return notes
