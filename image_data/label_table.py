"""Labels in a table beside the images, as dataset_tool.py of StyleGAN and of EDM writes them.

    dataset.json    {"labels": [["00000/img00000000.png", 6], ...]}, with names as seen from where
                    it lies; {"labels": null} where there are no classes

The tool puts a thousand images each into folders 00000, 00001 and so on, which say nothing. Classes
are named by their numbers. A dataset.json of another form is no table of labels, and not read.
"""

from runtime.commandline import BadInput
from runtime.limits import check_unpacked, read_member

import json
import re
from dataclasses import dataclass
from pathlib import Path

from image_data.decode import archive

NAME = "dataset.json"
PART = re.compile(r"(\d{5}/)?img\d{8}\.\w+")  # how the tool names an image


@dataclass(frozen=True)
class Table:
    """The table `name` of the images below its folder. labels: {name there: class}, {} for none."""

    name: str
    labels: dict[str, str]

    def class_of(self, image):
        """The class of an image, named as the table is; '' where there are no classes."""
        return self.labels[image[len(self.folder) :]] if self.labels else ""

    @property
    def told(self):
        """What is said of it."""
        what = "classes are the labels in" if self.labels else "no classes, as is said in"
        return f"{what} {self.name}"

    @property
    def folder(self):
        return self.name.removesuffix(NAME)


def stamps(folder, names):
    """[name, size, mtime] of what may be tables of these images below a folder, found at a load."""
    around = {""}
    for name in names:
        parts = name.split("/")[:-1]
        around |= {"/".join(parts[: i + 1]) + "/" for i in range(len(parts))}
    files = [(where + NAME, Path(folder, where, NAME)) for where in sorted(around)]
    found = [(name, file.stat()) for name, file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def table_of(path, found, images):
    """The Table nearest to some images of the Listing of `path`, or None.

    BadInput for a table without a class for each, with two for one, or with other than numbers.
    """
    tables = [name for name in found.others if name.rpartition("/")[2] == NAME]
    for name in sorted(tables, key=len, reverse=True):
        folder = name.removesuffix(NAME)
        if all(image.startswith(folder) for image in images):
            below = [image[len(folder) :] for image in images]
            labels = _read(path, found.others[name], f"{path}: {name}", below)
            if labels is not None:
                return Table(name, labels)
    return None


def _read(path, stored, whose, images):
    """{image: class} of a table of labels, {} of one that says that there are none; else None."""
    if Path(path).is_dir():
        file = Path(path, stored)
        if not file.is_file():  # a pipe would be waited for
            return None
        check_unpacked(whose, file.stat().st_size)
        try:
            text = file.read_bytes()
        except OSError as error:
            wrong = f"{whose} cannot be read ({error.strerror}); repair or remove it"
            raise BadInput(wrong) from None
    else:
        text = read_member(archive(path), stored)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(table, dict) or "labels" not in table:
        return None
    rows = table["labels"]
    if rows is None:
        return {} if all(map(PART.fullmatch, images)) else None  # else classes are the folders
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        return None
    labels = {}
    for name, label in [(name.replace("\\", "/"), label) for name, label in rows]:
        if type(label) is not int or not 0 <= label < 2**31:
            told = f"the label {str(label)[:60]}, expected a whole number from 0 to {2**31 - 1}"
            raise BadInput(f"{whose} gives {name} {told}; a class is one number here")
        if labels.setdefault(name, str(label)) != str(label):
            told = f"the labels {labels[name]} and {label}, expected one"
            raise BadInput(f"{whose} gives {name} {told}")
    missing = [image for image in images if image not in labels]
    if len(missing) == len(images):
        return None
    if missing:
        more = f" and {len(missing) - 1:,} more" * (len(missing) > 1)
        told = "add them, or take the table away for classes by folders"
        raise BadInput(f"{whose} has no label for {missing[0]}{more}; {told}")
    return labels


def _is_row(row):
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
