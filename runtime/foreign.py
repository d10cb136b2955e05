"""What lies in the folder of a run by a name of a run's files, and is none."""

from runtime.commandline import BadInput
from runtime.folder import OF_STEPS, matching, of_steps

import itertools
import os
import re
from pathlib import Path

NAMES = ("config.yaml", "log.jsonl", "ckpt.pt", "ckpt-previous.pt")
OURS = re.compile(r"^# python \S+, torch \S+, numpy \S+$", re.MULTILINE)  # in config.yaml


def check_names(folder):
    """BadInput where a folder or a pipe has a name that a file of a run in `folder` may have."""
    names = [folder / name for name in (*NAMES, "report.html", ".lock")]
    for kind in ("*.png", "*.gif", "*.npz", "snapshot-*.pt"):
        names += folder.glob(kind)
    for path in [*names, *matching(folder, "ckpt-{}.pt").values()]:
        if os.path.lexists(path) and not path.is_file():
            raise BadInput(f"{path} is no file, and a run writes one here: take it away")


def is_of_run(folder):
    """Whether what is called config.yaml there was written by a run."""
    path = Path(folder, "config.yaml")
    return path.is_file() and bool(OURS.search(path.read_text("utf-8", errors="replace")))


def set_aside(folder, stays):
    """Keep, by names that are free, what a run in `folder` would write over or remove.

    stays(path): whether it is not touched. A report.html of others never is.
    """
    found = [folder / name for name in NAMES]
    found += [path for kind in OF_STEPS for path in of_steps(folder, kind).values()]
    for path in found:
        if not path.is_file() or not path.stat().st_size or stays(path):
            continue
        marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        others = (path.with_name(f"before-{path.stem}{mark}{path.suffix}") for mark in marks)
        kept = next(other for other in others if not os.path.lexists(other))
        os.replace(path, kept)
        print(f"note: {path} is of no run here, and is now called {kept.name}")
