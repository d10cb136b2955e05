"""What bench/gpu.py and bench/gpu_train.py found: rows that are on the disk once they are known.

A row is one line of OUT/results.jsonl, a dictionary of numbers and words, with

    stage   which stage found it
    of      what it is about: a list of words, or nothing where it is about the stage itself
    failed  in place of numbers, why there are none

Where two rows are about the same, the later one counts. A row {"stage": S, "done": true} says that
S need not run again.
"""

from runtime.files import append_row, read_log

import contextlib
import dataclasses
import json
import sys
import traceback
from pathlib import Path

FILE = "results.jsonl"
SPOILED = "CUDA error", "Error [CUDA]", "BrokenProcessPool"  # after these a process is of no use


def read(out):
    """All rows so far; a line torn by a kill is left out."""
    return read_log(Path(out) / FILE)


def append(out, **row):
    """One row, written at once: several processes may write to one file."""
    append_row(Path(out) / FILE, row)


def latest(rows, stage):
    """{of: row} of a stage: the last row of each, in the order in which they first came."""
    return {tuple(row["of"]): row for row in rows if row["stage"] == stage and row.get("of")}


def is_done(rows, stage):
    return any(row["stage"] == stage and row.get("done") for row in rows)


def is_whole(rows, stage):
    """Whether a stage came to its end, and none of its rows failed."""
    return is_done(rows, stage) and not any("failed" in row for row in latest(rows, stage).values())


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage at work: where its rows go, and on what it runs.

    rehearse: on a CPU, with shapes so small that only the working of the program is seen.
    """

    stage: str
    out: Path
    rehearse: bool = False

    @property
    def device(self):
        return "cpu" if self.rehearse else "cuda"

    def say(self, *of, **values):
        append(self.out, stage=self.stage, of=list(map(str, of)), **values)

    def known(self, *of, failed=False):
        """Whether an earlier attempt at this stage has said this, or with `failed` has failed."""
        row = latest(read(self.out), self.stage).get(tuple(map(str, of)))
        return row is not None and (failed or "failed" not in row)

    @contextlib.contextmanager
    def row(self, *of, **values):
        """Yield a dictionary, which is said at the end; an exception is said in its place.

        An error of CUDA, or a process that died, is raised again: nothing works there after it.
        """
        try:
            yield values
        except Exception as error:
            traceback.print_exc()
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.say(*of, failed=why)
            if any(word in why for word in SPOILED):
                raise
        else:
            self.say(*of, **values)


# ------------------------------------------------------------------------------------ what is read


def cell(value):
    """A value as a table shows it: four digits of a number."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "/")


def table(heads, lines):
    """A table in markdown of lists of cells."""
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in (heads, rule, *lines)]


def narrow(found, heads):
    """A stage's rows {of: row} one by one: what they are about, and all values any of them has."""
    hidden = ("stage", "of", "texts")
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    names = [name for name in names if name not in hidden]
    depth = max(map(len, found))
    heads = [*heads[:depth], *[""] * (depth - len(heads))]
    lines = [
        [*of, *[""] * (depth - len(of)), *(row.get(name) for name in names)]
        for of, row in found.items()
    ]
    return table([*heads, *names], lines)


def pivoted(found, heads, value, first="here"):
    """Rows {(..., way): row} with a column of `value` for each way, and its ratio to that of the
    way `first`, of which all else is shown, too."""
    ways = list(dict.fromkeys(of[-1] for of in found))
    others = [way for way in ways if way != first]
    of_first = [row for of, row in found.items() if of[-1] == first]
    more = list(dict.fromkeys(name for row in of_first for name in row))
    more = [name for name in more if name not in ("stage", "of", value)]
    titles = [*heads, f"{first}, {value}", *more]
    titles += [title for way in others for title in (way, "×")]
    lines = []
    for key in dict.fromkeys(of[:-1] for of in found):
        mine = found.get((*key, first), {})
        line = [*key, mine.get(value), *(mine.get(name) for name in more)]
        for way in others:
            theirs = found.get((*key, way), {})
            both = theirs.get(value) and mine.get(value)
            line += [theirs.get(value, "failed" if "failed" in theirs else None)]
            line += [f"{theirs[value] / mine[value]:.2f}" if both else None]
        lines.append(line)
    return table(titles, lines)


def is_wrong(row):
    """Whether a row says that something is not as it must be."""
    return any(row.get(name) is False for name in ("right", "clean"))


def failures(rows, stages):
    """A line for each row that failed or found a fault, and each stage that did not end well."""
    lines = []
    for stage in stages:
        for of, row in latest(rows, stage).items():
            if "failed" in row or is_wrong(row):
                lines.append(f"- {stage}, {', '.join(of)}: {row.get('failed', 'WRONG')}")
        ended = [row["ended"] for row in rows if row["stage"] == stage and "ended" in row]
        if ended and not is_done(rows, stage):
            lines.append(f"- {stage}: {ended[-1]}")
    return lines


def finish(out, markdown, rows, name):
    """OUT/NAME.md and OUT/NAME.json of the rows."""
    (Path(out) / f"{name}.md").write_text(markdown)
    (Path(out) / f"{name}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def tail(path, lines=15):
    """The last lines of a log, for people."""
    with contextlib.suppress(FileNotFoundError):
        text = Path(path).read_text(errors="replace").splitlines()[-lines:]
        print("\n".join(f"    {line[:160]}" for line in text), file=sys.stderr, flush=True)
