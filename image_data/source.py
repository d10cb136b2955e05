"""What every layout of raw data is turned into: a Source, and when needed its Contents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Source:
    """Raw images of one split: where they are, and how to get at them when they are needed.

    stamp     what changes when the raw files change (sizes, times); decides whether to prepare anew
    contents  called only to prepare: returns Contents
    told      a line that is printed at every load, '' for none
    """

    origin: str
    stamp: list
    contents: Callable[[], "Contents"]
    told: str = ""


@dataclass(frozen=True)
class Contents:
    """Labels, and the images as exactly one of: arrays in memory, image files, or glyphs' split."""

    labels: np.ndarray  # int64 (N,)
    class_names: tuple[str, ...]
    aliases: dict = field(default_factory=dict)  # other names of classes -> index
    arrays: np.ndarray | None = None  # uint8 (N,H,W,C)
    container: str = ""  # a folder or a zip
    items: tuple[str, ...] = ()  # image files in it
    drawn: str = ""  # the split that glyphs.draw() draws
    note: str = ""
    told: str = ""  # a line that says what was found


def stamp(*paths):
    found = [Path(p).stat() for p in paths]
    return [[Path(p).name, s.st_size, s.st_mtime_ns] for p, s in zip(paths, found, strict=True)]
