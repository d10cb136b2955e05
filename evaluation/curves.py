"""Curves of several runs in one figure: loss and scores over training, or over a setting.

    python -m evaluation.curves runs/pixel-mnist runs/pixel-mnist-v
    python -m evaluation.curves runs/T50 runs/T200 runs/T1000 --over timesteps --best

It draws what lies in the runs: the loss and the scores in log.jsonl, those of
`eval_fid.py RUN B --curve`, or `--json FILE` into a run's folder, and bits per dimension of
`improved_ddpm.py --nll`. A table says at which step and how each figure was computed.
"""

from runtime.commandline import BadInput, entry, parse, split_list
from runtime.files import save_json, save_text
from runtime.plots import METRICS, against, by_whom, plot_lines
from runtime.result_folders import digest_of
from runtime.scores import curve_of, known, read
from runtime.seen import names_of, read_run
from runtime.typed_flags import closest

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from evaluation.study_names import name_for

FIGURES = {"loss": "loss", **METRICS, "bits_per_dim": "bits per dimension"}
RISING = ("inception_score", "class_accuracy")  # the best is the largest
# What decides a score, in the words of log.jsonl, and bits per dimension.
HOW = ("metric_n", "metric_features", "metric_reference", "n_reference", "images", "terms")
# Settings that say where and how often, not what a run is.
ABOUT = frozenset({"config", "out", "smoke", "data_root", "gpus", "resume", "compile", "graph"})
ABOUT |= {"tensorboard", "wandb", "log_every", "save_every", "keep_every", "sample_every"}
MOST = 5  # columns of the table for settings that differ


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """folders of runs"""
    over: str = "steps"
    """steps of training, or a setting in their config.yaml, such as timesteps or schedule: then a
    point for each run"""
    best: bool = False  # of each run its best figures, not the last ones
    names: str = ""  # comma-separated, of the runs in their order; by default their folders'
    out: str = ""  # folder for figure, table and JSON; by default one in runs/ named by the runs


# --------------------------------------------------------------------------- what lies in a run


@dataclass
class Found:
    """A run: its folder, its settings by name, and rows in the words of log.jsonl, by step."""

    folder: Path
    settings: dict
    rows: list

    @classmethod
    def of(cls, path):
        """That of a folder, or of a checkpoint in it. BadInput where there is nothing to draw."""
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        if not (folder / "log.jsonl").is_file():
            raise BadInput(f"{path} is no run: it has no log.jsonl; name the folder of a training")
        seen = read_run(folder)
        last = max((row["step"] for row in seen.rows), default=0)
        rows = [*seen.rows, *_scores(folder, last), *_bits(folder, last)]
        if not any(_number(row.get(figure)) for figure in FIGURES for row in rows):
            raise BadInput(f"{path} has nothing to draw: no loss and no score was logged yet")
        return cls(folder, seen.settings, sorted(rows, key=lambda row: row["step"]))


def _number(value):
    """Whether it is a finite number."""
    return known(value) is not None


def _scores(folder, last):
    """Rows of eval_fid.py's files in a run's folder: of --curve, and one of every other file."""
    found = map(read, (path for path in sorted(folder.glob("*.json")) if path.name != "curve.json"))
    for row in (*curve_of(folder), *found):
        if isinstance(row, dict) and {"frechet", "n_generated", "features"} <= row.keys():
            yield {
                **{name: row.get(name) for name in METRICS},
                "step": known(row.get("step"), _step_of(str(row.get("a")), last)),
                "metric_n": known(row["n_generated"]),
                "metric_features": str(row.get("network") or row["features"]).split(":")[0],
                "metric_reference": str(row["b"]) if row.get("b") else None,
                "n_reference": known(row.get("n_reference")),
            }


def _bits(folder, last):
    """Rows of bits per dimension: of ckpt-STEP.pt, which the folder names, or of the last step."""
    for path in [folder / "nll.json", *sorted(folder.glob("*nll*/nll.json"))]:
        found = read(path)
        told = isinstance(found, dict) and known(found.get("images")) is not None
        if told and "bits_per_dim" in found and isinstance(found.get("terms"), list):
            yield {
                "step": last if path.parent == folder else _step_of(path.parent.name, last),
                "bits_per_dim": found["bits_per_dim"],
                "images": found["images"],
                "terms": len(found["terms"]),
            }


def _step_of(name, last):
    """That of a checkpoint which the name tells, ckpt-STEP; else the last."""
    of = re.search(r"ckpt-(\d+)", name)
    return int(of[1]) if of else last


# ----------------------------------------------------------------------------- what is comparable


def chosen(runs, figure, points):
    """{name: rows} of a figure, of each run those that were computed in one way, by HOW.

    That is the way which most runs share. Curves are before all of more than one step, points
    (True) of many samples.
    """
    ways = {name: {} for name in runs}
    for name, run in runs.items():
        for row in (row for row in run.rows if _number(row.get(figure))):
            ways[name].setdefault(tuple(row.get(key) for key in HOW), []).append(row)

    def weight(item):
        way, rows = item
        shared, n = sum(way in other for other in ways.values()), way[0] or way[-2] or 0
        steps = len({row["step"] for row in rows})
        return (shared, n, steps) if points else (steps > 1, shared, steps, n)

    return {name: max(found.items(), key=weight)[1] for name, found in ways.items() if found}


def end(rows, figure, best):
    """The last of rows, or the one with the best figure."""
    if not best:
        return rows[-1]
    return (max if figure in RISING else min)(rows, key=lambda row: row[figure])


def differing(runs, over):
    """Names of the settings that all runs have, and not all alike: `over` and at most MOST more."""
    first, *more = [run.settings for run in runs.values()]
    apart = ABOUT if over == "steps" else {*ABOUT, over}
    names = [n for n in first if n not in apart and all(n in s for s in more)]
    names = [n for n in names if any(s[n] != first[n] for s in more)][:MOST]
    return names if over == "steps" else [over, *names]


# ------------------------------------------------------------------------------------ the results


def draw(path, runs, found, over, best):
    """The figure: a panel of each figure in `found`, {figure: {name: rows}}.

    What scores are of stands above all panels where it is the same, else beside each.
    """
    drawn = {figure: [row for rows in found[figure].values() for row in rows] for figure in found}
    said = {against(rows) for figure, rows in drawn.items() if figure in METRICS}
    panels, words = {}, {"xlabel": "step", "logy": ("loss",)}
    for figure, lines in found.items():
        label = label_of(figure, drawn[figure], each=len(said) > 1)
        if over == "steps":
            panels[label] = {
                name: ([row["step"] for row in rows], [row[figure] for row in rows])
                for name, rows in lines.items()
            }
        else:
            ends = [(runs[n].settings[over], end(rows, figure, best)) for n, rows in lines.items()]
            points = in_order([(x, row[figure]) for x, row in ends])
            panels[label] = {"": tuple(zip(*points, strict=True))}
    if over != "steps":
        xs = {run.settings[over] for run in runs.values()}
        words["xlabel"] = f"{over} ({'the best' if best else 'the last'} of each run)"
        if all(map(_number, xs)):
            words |= {"xticks": sorted(xs), "logx": min(xs) > 0 and max(xs) > 20 * min(xs)}
    plot_lines(path, panels, title="".join(said) if len(said) == 1 else "", **words)


def label_of(figure, rows, each):
    """What stands beside the axis of a figure of these rows; each: with what scores are of."""
    if figure == "bits_per_dim":
        told = [sorted({row[key] for row in rows}) for key in ("images", "terms")]
        return "{} ({} images, {} terms)".format(
            FIGURES[figure], *(", ".join(map(str, some)) for some in told)
        )
    of = f", {against(rows)}" if each and figure in METRICS else ""
    return FIGURES[figure] + by_whom(figure, rows) + of


def in_order(points):
    """Points (x, y) by x where all of these are numbers; else with texts for x, as they come."""
    if all(_number(x) for x, _ in points):
        return sorted(points)
    return [(str(x), y) for x, y in points]


def how(figure, row):
    """In words, how a figure of a row was computed; nothing for a loss.

    Runs of before there was an inception score have logged no more than the scores.
    """
    if figure == "bits_per_dim":
        return f"{row['images']} images, {row['terms']} terms"
    told = ", ".join(filter(None, [row.get("metric_features"), against([row])]))
    return (told or "N and reference were not logged") * (figure in METRICS)


def facts_of(runs, found, over, best):
    """{name: {"folder", "settings": those that differ, figure: its value, how, and its curve}}."""
    some = differing(runs, over)
    facts = {
        name: {"folder": str(run.folder), "settings": {k: run.settings.get(k) for k in some}}
        for name, run in runs.items()
    }
    for figure, lines in found.items():
        for name, rows in lines.items():
            row = end(rows, figure, best)
            kept = {key: row[key] for key in HOW if row.get(key) is not None}
            curve = {"steps": [r["step"] for r in rows], "values": [r[figure] for r in rows]}
            facts[name][figure] = {"value": row[figure], "step": row["step"], **kept, **curve}
    return facts


def table(facts, found, best):
    """Markdown lines: of each run the settings that differ, its figures with their steps, and how
    they were computed."""
    some = list(next(iter(facts.values()))["settings"])
    lines = [["run", *some, *(FIGURES[figure] for figure in found), "how"]]
    for name, run in facts.items():
        known = [how(figure, run[figure]) for figure in found if figure in run]
        cells = [name, *map(str, run["settings"].values())]
        for figure in found:
            one = run.get(figure)
            cells.append(f"{one['value']:.4g} at {one['step']:,}" if one else "-")
        cells.append("; ".join(dict.fromkeys(filter(None, known))) or "-")
        lines.append([cell.replace("|", "\\|") for cell in cells])
    lines.insert(1, ["---"] * len(lines[0]))
    told = f"{'The best' if best else 'The last'} of each run, and at which step."
    return [told, "", *("| " + " | ".join(line) + " |" for line in lines)]


# --------------------------------------------------------------------------------------- commands


def short_names(runs):
    """The names of folders, with as much of their paths as tells them apart: a list."""
    paths = [Path(run).resolve() for run in runs]
    paths = [path.parent if path.is_file() else path for path in paths]
    if len(set(paths)) < len(paths):
        raise BadInput("the same run twice: name each once")
    return names_of(paths)


def folder_of(cfg, names):
    """--out, or a folder in runs/ that is named by the runs and by what is drawn of them."""
    stem = "-".join(name.replace("/", "-") for name in names)
    stem = stem if len(stem) <= 100 else f"{stem[:80]}-{digest_of(names)}"
    over = "" if cfg.over == "steps" else f"-over-{cfg.over}"
    return Path(cfg.out or f"runs/curves-{stem}{over}{'-best' * cfg.best}")


def main():
    cfg = parse(Config, __doc__)
    if not cfg.runs:
        raise BadInput("name the folders of runs, such as runs/pixel-mnist runs/edm-mnist")
    short = short_names(cfg.runs)
    names = split_list(cfg.names) or short
    if len(names) != len(short) or len(set(names)) < len(names):
        raise BadInput(f"--names {cfg.names}: expected {len(short)} different names")
    runs = {name: Found.of(path) for name, path in zip(names, cfg.runs, strict=True)}
    for name, run in runs.items():
        if cfg.over != "steps" and cfg.over not in run.settings:
            hint = closest(cfg.over, [*run.settings])
            raise BadInput(f"--over {cfg.over}: {name} has no such setting{hint}")
    found = {figure: chosen(runs, figure, cfg.over != "steps") for figure in FIGURES}
    found = {figure: lines for figure, lines in found.items() if lines}
    folder, facts = folder_of(cfg, short), facts_of(runs, found, cfg.over, cfg.best)
    lines = table(facts, found, cfg.best)
    about = {"runs": [str(run.folder) for run in runs.values()], "over": cfg.over, "best": cfg.best}
    path = folder / f"curves{name_for(folder, 'curves', '', about)[0]}"
    draw(f"{path}.png", runs, found, cfg.over, cfg.best)
    command = shlex.join(["python", "-m", "evaluation.curves", *sys.argv[1:]])
    text = ["# Curves of runs", "", f"    {command}", "", *lines, "", f"![curves]({path.name}.png)"]
    save_text(f"{path}.md", text)
    said = {"command": command, "over": cfg.over, "best": cfg.best, "runs": facts}
    save_json(f"{path}.json", said | {"facts": about})
    print(*lines, f"the curves: {path}.png, with .md and .json", sep="\n")


if __name__ == "__main__":
    entry(main)
