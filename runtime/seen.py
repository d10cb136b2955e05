"""What lies in the folder of a run, read back for those who show it."""

from runtime.files import read_run_log
from runtime.folder import DEFAULTS

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass
class Seen:
    """What lies in the folder of a run.

    told      comments at the head of its config.yaml: command, versions, machine, what of
    settings  by name; others: names of those that are not as by default, None if nobody knows
    rows      of its log
    notes     what could not be read
    """

    folder: Path
    told: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    others: list | None = None
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    name: str = ""

    def line(self, place, default=""):
        """A comment by its place."""
        return self.told[place] if place < len(self.told) else default

    @property
    def script(self):
        found = re.search(r"[\w-]+\.py", self.line(0))
        return found[0] if found else ""

    @property
    def step(self):
        return self.rows[-1]["step"] if self.rows else 0


def is_run(folder):
    """Whether a training has written this folder."""
    return all(Path(folder, name).is_file() for name in ("config.yaml", "log.jsonl"))


def read_run(folder):
    """The Seen of a folder."""
    seen = Seen(Path(folder), name=Path(folder).resolve().name)
    try:
        seen.rows = read_run_log(seen.folder / "log.jsonl")
    except (OSError, ValueError) as error:
        seen.notes.append(f"log.jsonl cannot be read: {error}")
    try:
        config = (seen.folder / "config.yaml").read_text()
        own, split, _ = config.partition(DEFAULTS)
        seen.settings = dict(yaml.safe_load(config) or {})
        seen.others = list(yaml.safe_load(own) or {}) if split else None
        head = re.match(r"(#.*\n)*", own)[0].splitlines()
        seen.told = [line.removeprefix("#").strip() for line in head]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        seen.notes.append(f"config.yaml cannot be read: {error}")
    return seen


def names_of(folders):
    """The shortest ends of paths that tell the folders apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    most = max(map(len, parts))
    ends = ([Path(*p[-n:]).as_posix() for p in parts] for n in range(1, most + 1))
    return next(found for found in ends if len(set(found)) == len(found))
