"""A run's report.html: one file with its command, settings, curves, pictures and scores.

    python -m runtime.report runs/pixel-mnist        writes its report.html anew
    python -m runtime.report runs/a runs/b           compares runs: settings that differ, curves
                                                     over each other, last grids, scores

Every training leaves one, and whatever adds to a run afterwards (--sample, --nll, eval_fid.py)
writes it anew. It needs nothing but itself: pictures are inside, scaled down or left out where all
of them would take more than 8 MB; links to checkpoints lead to the files beside it.
"""

from runtime.commandline import BadInput, entry, parse
from runtime.files import Unwritable, check_folder
from runtime.plots import against, by_whom, quarters
from runtime.scores import LABELS, compared_scores, curve_of, score_tables
from runtime.seen import is_run, names_of, read_run
from runtime.webpage import (
    Pictures,
    chart,
    command,
    folded,
    is_ours,
    joined,
    link,
    number,
    page,
    section,
    table,
    tag,
)

import hashlib
import math
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

GRIDS = 6  # of those made in training that are shown, evenly spaced
OTHERS = 24  # further pictures
ROWS = 400  # of the log in its table
FILES = 80
DRAWN = {"loss.png", "metric.png", "curve.png"}  # the page has these as curves
LINEAR = {"lr", "images_per_s"}  # are not drawn on log axes
# Settings that name the run to which a command adds something.
ADD_TO = ("sample", "nll", "encode", "interpolate", "study", "checkpoint", "a")
OF_LOSS = ("prediction", "loss", "objective")  # what decides of what kind a loss is
QUIET = {"step", "peak_memory_mb", "metric_n", "n_reference", "stopped"}  # are no curves


# ------------------------------------------------------------------------------- parts of a page


def shown(value):
    """A setting's value."""
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in ("", None) else str(value)


def points(rows, name):
    """[(step, value)] of a name in the rows of a log that have a number there."""
    found = ((row["step"], row.get(name)) for row in rows)
    return [(step, v) for step, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def keys(rows):
    """Names of all that the rows log, but for what is QUIET."""
    return [name for name in dict.fromkeys(k for row in rows for k in row) if name not in QUIET]


def title_of(name):
    """What a logged name is called."""
    known = {"lr": "learning rate", "images_per_s": "images per second"} | LABELS
    return known.get(name, name.replace("_", " "))


def curves(seen):
    """A panel of each thing that is logged, with its quarters of the noise, and of curve.json."""
    names, panels, words = keys(seen.rows), {}, quarters(seen.settings)
    for name in names:
        base, part = re.fullmatch(r"(.+?)(?:_(q[1-4]))?", name).groups()
        base = base if part and base in names else name
        label = words[f"loss_{part}"] if base != name else "all" if f"{name}_q1" in names else name
        panels.setdefault(base, {})[label] = points(seen.rows, name)
    charts = [
        chart(title_of(name) + by_whom(name, seen.rows), lines, linear=name in LINEAR)
        for name, lines in panels.items()
    ]
    kept = curve_of(seen.folder)
    for name in dict.fromkeys(key for row in kept for key in row if key in LABELS):
        charts.append(chart(f"{title_of(name)}, of checkpoints", {name: points(kept, name)}))
    note = against(seen.rows)
    return joined(
        tag("div", *charts, class_="row") if any(charts) else "",
        tag("p", f"Scores in training: {note}", class_="soft") if note else "",
    )


def last_grid(seen):
    """The newest grid of samples, or None."""
    grids = sorted(seen.folder.glob("samples-[0-9]*.png"))
    last = seen.folder / "samples.png"
    return last if last.is_file() else grids[-1] if grids else None


def pictures_of(seen, pictures):
    """Sections with the pictures of a run, the most important ones first: they fill a page."""
    files = sorted(p for p in seen.folder.glob("*.*") if p.suffix in (".png", ".gif"))
    files = [p for p in files if p.name not in DRAWN and not p.name.startswith(".")]
    grids = [p for p in files if re.fullmatch(r"samples-\d+\.png", p.name)]
    strips = [p for p in files if re.match(r"forward|reverse", p.name)]
    first = [p for p in files if p.name == "samples.png"]
    further = [p for p in files if p not in grids and p not in strips and p not in first]
    further = [*further, *sorted(seen.folder.glob("autoencoder*/reconstructions.png"))]
    if len(grids) > GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    kinds = {"Samples": first, "The walks": [p for p in strips if p.suffix == ".png"]}
    kinds |= {"Over training": grids, "Further pictures": further[:OTHERS]}
    kinds["Films"] = [p for p in strips if p.suffix == ".gif"]
    told = {"Over training": lambda p: f"step {int(p.stem.split('-')[1]):,}"}
    words = {"samples.png": "Samples of the trained network"}
    words |= {"forward": "The forward process", "reverse": "The backward process"}
    made = {}
    for title, some in kinds.items():
        caption = told.get(title, lambda p: words.get(p.name, words.get(p.stem, p.stem)))
        side = {"Over training": 250, "Further pictures": 1080}.get(title, 720)
        figures = [pictures.figure(path, caption(path), side) for path in some]
        if title == "Further pictures" and len(further) > OTHERS:
            figures.append(tag("p", f"and {len(further) - OTHERS} more", class_="soft"))
        made[title] = section(title, tag("div", *figures, class_="row")) if figures else ""
    return made


def cards(seen):
    """The state of a run in a few numbers."""
    rows, steps, found = seen.rows, seen.settings.get("steps"), {}
    of = f"of {number(steps)} steps" if isinstance(steps, int) else "steps"
    found[of] = number(seen.step)
    for name, low in (("loss", None), ("frechet", True), ("inception_score", False)):
        if known := points(rows, name):
            best = min if low else max
            value = known[-1][1] if low is None else best(v for _, v in known)
            where = "last " if low is None else "lowest " if low else "highest "
            found[f"{where}{title_of(name)} in training"] = number(value)
    seconds = seconds_of(rows, seen.settings.get("batch_size"))
    if seconds:
        hours, minutes = divmod(round(seconds / 60), 60)
        found["of training steps"] = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    if known := points(rows, "peak_memory_mb"):
        found["MB at most in memory"] = number(max(v for _, v in known))
    boxes = [tag("div", tag("b", v), tag("span", k), class_="card") for k, v in found.items()]
    return tag("div", *boxes, class_="cards")


def seconds_of(rows, batch_size):
    """Seconds of all training steps, by the images per second of each row; None if not known."""
    total, before = 0.0, 0
    for step, rate in points(rows, "images_per_s"):
        if rate > 0 and isinstance(batch_size, int):
            total += (step - before) * batch_size / rate
        before = step
    return total or None


def log_table(seen):
    """The log, every row of it, or ROWS of them and what has scores."""
    rows, names = seen.rows, list(dict.fromkeys(k for row in seen.rows for k in row))
    if len(rows) > ROWS:
        every = {round(i * (len(rows) - 1) / (ROWS - 1)) for i in range(ROWS)}
        rows = [row for i, row in enumerate(rows) if i in every or LABELS.keys() & row.keys()]
    cells = [[exact(row.get(name)) for name in names] for row in rows[-4 * ROWS :]]
    note = f", {len(cells)} of {len(seen.rows)} rows" if len(cells) < len(seen.rows) else ""
    return folded(f"log.jsonl{note}", table(names, cells)) if rows else ""


def exact(value):
    """A number of the log to six digits."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def files_of(seen, base):
    """Links to the checkpoints, and to all else in the folder; base: the page's folder."""
    paths = sorted(p for p in seen.folder.iterdir() if p.name[0] != "." and p.name != "report.html")
    paths = [p for p in paths if p.is_file()]
    paths += sorted(p for p in seen.folder.glob("*/report.html"))

    def row(path):
        about = path.stat()
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(about.st_mtime))
        return link(path, base), f"{about.st_size / 1e6:.2f} MB", day

    kept = [row(p) for p in paths if p.suffix == ".pt"]
    rest = [row(p) for p in paths if p.suffix != ".pt"]
    note = f" ({FILES} of {len(rest)})" if len(rest) > FILES else ""
    return joined(
        table([], kept[:FILES]) if kept else tag("p", "no checkpoint yet", class_="soft"),
        folded(f"all other files{note}", table([], rest[:FILES])) if rest else "",
    )


def settings_of(seen):
    """The settings, those first that are not as by default."""
    rows = {name: (name, shown(value)) for name, value in seen.settings.items()}
    if seen.others is None:
        return folded("all settings", table([], rows.values())) if rows else ""
    own = [rows.pop(name) for name in seen.others if name in rows]
    return joined(
        tag("p", "Other than by default:", class_="soft"),
        table([], own) if own else tag("p", "none"),
        folded(f"as by default: {len(rows)} settings", table([], rows.values())) if rows else "",
    )


def warnings_of(seen):
    """Why a run stopped, if it did, and what could not be read."""
    told = [f"{seen.name}: {note}" for note in seen.notes]
    if seen.rows and (why := seen.rows[-1].get("stopped")):
        told.append(f"{seen.name} stopped: {why}")
    return joined(*(tag("p", line, class_="stop") for line in told))


# ------------------------------------------------------------------------------------- two pages


def write_run(folder, out=""):
    """The page of a run, report.html in its folder or the file `out`; its path."""
    out = Path(out or Path(folder, "report.html"))
    seen, base = read_run(folder), out.parent
    pictures = pictures_of(seen, Pictures(base))
    about = [seen.script, *seen.told[3:4]]
    page(
        out,
        f"{seen.name}: report of a run",
        tag("h1", seen.name),
        tag("p", " · ".join(filter(None, about)), class_="soft"),
        warnings_of(seen),
        command(seen.line(0)) if seen.told else "",
        cards(seen),
        pictures["Samples"],
        section("Scores", score_tables(seen)),
        section("Curves", curves(seen)),
        *(html for title, html in pictures.items() if title != "Samples"),
        section("Settings", settings_of(seen)),
        section("Versions and machine", joined(*(tag("p", line) for line in seen.told[1:3]))),
        section("Checkpoints and files", files_of(seen, base)),
        section("Log", log_table(seen)),
        footer(),
    )
    return out


def write_comparison(folders, out):
    """A page in the file `out` that compares runs; its path."""
    runs, base = [read_run(folder) for folder in folders], out.parent
    for seen, name in zip(runs, names_of(folders), strict=True):
        seen.name = name
    differ = [
        n for n in dict.fromkeys(k for seen in runs for k in seen.settings) if differs(n, runs)
    ]
    rows = [(n, *(shown(seen.settings.get(n)) for seen in runs)) for n in differ]
    pictures = Pictures(base)
    grids = [(seen, last_grid(seen)) for seen in runs]
    figures = [pictures.figure(path, seen.name, 340) for seen, path in grids if path]
    commands = [joined(tag("b", link(s.folder, base, s.name)), command(s.line(0))) for s in runs]
    page(
        out,
        f"{', '.join(seen.name for seen in runs)}: comparison of runs",
        tag("h1", " · ".join(seen.name for seen in runs)),
        tag("p", f"{len(runs)} runs compared", class_="soft"),
        joined(*map(warnings_of, runs)),
        section("Last samples", tag("div", *figures, class_="row") if figures else ""),
        section("Scores", compared_scores(runs)),
        section("Curves", curves_over_each_other(runs)),
        section(
            "Settings that differ",
            table(["setting", *(seen.name for seen in runs)], rows) if rows else tag("p", "none"),
        ),
        section("Commands", *commands),
        footer(),
    )
    return out


def differs(name, runs):
    """Whether runs differ in a setting; one from before there was the setting had the default."""
    known = [seen for seen in runs if name in seen.settings]
    usual = all(seen.others is not None and name not in seen.others for seen in known)
    values = {repr(seen.settings[name]) for seen in known}
    return name != "out" and (len(values) > 1 or len(known) < len(runs) and not usual)


def curves_over_each_other(runs):
    """A panel of each thing that is logged, with a line of each run that logs it."""
    names = dict.fromkeys(name for seen in runs for name in keys(seen.rows))
    words = [quarters(seen.settings) for seen in runs]
    agreed = words[0] if all(word == words[0] for word in words) else {}
    charts = []
    for name in names:
        title = title_of(name) + by_whom(name, [row for seen in runs for row in seen.rows])
        title = f"loss, {agreed[name]}" if name in agreed else title
        lines = {seen.name: points(seen.rows, name) for seen in runs}
        if len(runs) == 1 or len({repr(line) for line in lines.values()}) > 1:
            charts.append(chart(title, lines, linear=name in LINEAR))
    kept = {seen.name: curve_of(seen.folder) for seen in runs}
    for name in LABELS:
        lines = {run: points(rows, name) for run, rows in kept.items()}
        charts.append(chart(f"{title_of(name)}, of checkpoints", lines))
    other = [n for n in OF_LOSS if len({repr(seen.settings.get(n)) for seen in runs}) > 1]
    note = f"Losses of another {' and '.join(other)} are not to be compared." if other else ""
    return joined(note and tag("p", note, class_="soft"), tag("div", *charts, class_="row"))


def footer():
    return tag("footer", time.strftime("written %Y-%m-%d %H:%M by runtime.report"))


# --------------------------------------------------------------------------- after other commands


def refresh(folder):
    """Write the report of a run anew, if `folder` is one. No training fails by it.

    A disk that is full takes a line, a bug its traceback: what was trained is whole.
    """
    if not is_run(folder):
        return
    if (page := Path(folder, "report.html")).exists() and not is_ours(page):
        print(f"note: {page} is no report of a run, and stays; delete it to have one")
        return
    try:
        write_run(folder)
    except (OSError, Unwritable) as error:
        why = getattr(error, "strerror", None) or error
        print(f"note: {Path(folder, 'report.html')} was not written ({why})", file=sys.stderr)
    except Exception:
        traceback.print_exc()
        told = f"note: a bug: {Path(folder, 'report.html')} was not written; all else is done"
        print(told, file=sys.stderr)


def refresh_after(cfg):
    """The same of the run to which a command with these settings has added something."""
    settings = {k: v for k, v in vars(cfg).items() if isinstance(v, str) and v}
    out, result = settings.get("out"), settings.get("json")
    given = [settings[name] for name in ADD_TO if name in settings]
    for path in [out] if out else [result] if result else given[:1]:
        refresh(path if Path(path).is_dir() else Path(path).parent)


# ---------------------------------------------------------------------------------- the command


@dataclass
class Config:
    """Which runs, and where to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """folders of runs, or checkpoints in them"""
    config: str = ""  # YAML file of these settings
    out: str = ""
    """the page; by default report.html of a run, or report-NAMES.html beside several"""


def main():
    cfg = parse(Config, __doc__)
    folders = [Path(run).parent if Path(run).is_file() else Path(run) for run in cfg.runs]
    if not folders:
        raise BadInput("no run is named: python -m runtime.report RUN, or several of them")
    for folder in folders:
        if not is_run(folder):
            missing = "there is no such folder" if not folder.is_dir() else "it is no run"
            raise BadInput(f"{folder}: {missing}, with config.yaml and log.jsonl in it")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("a run is named twice")
    print(f"report: {written(folders, cfg.out)}")


def written(folders, out=""):
    """Write the page of one run or of several, by default as main() says; its path."""
    if len(folders) == 1 and not out:
        check_folder(folders[0], "the run")
        return write_run(folders[0])
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = re.sub(r"[^\w.]+", "-", "-".join(names_of(folders)))[:60]
    known = hashlib.sha256("\n".join(str(f.resolve()) for f in folders).encode()).hexdigest()[:6]
    path = Path(out) if out else above / f"report-{names}-{known}.html"
    if path.is_dir() or path.exists() and not is_ours(path):
        raise BadInput(f"--out {path} is there already, and no report; name another file")
    check_folder(path.parent)
    return write_run(folders[0], path) if len(folders) == 1 else write_comparison(folders, path)


if __name__ == "__main__":
    entry(main)
