"""Several runs, checkpoints, folders and files against one reference: a table, a figure, one JSON.

    python eval_fid.py table runs/a runs/b mnist:train --against mnist:test --n 1000

A row for each, all by the same features. They lie in a folder of runs/tables that is named after
the rows, the reference and a digest of all that decides the figures, or in --out:

    table.md, table.json    the figures, with what made them
    table.png               a bar for each row, a panel for each figure of merit
    rows.jsonl              in runs/tables or --out: a line for each finished row of any table, so
                            that a later call does not compute it again

Where another table lies in --out, this one's files are named table-DIGEST instead.
"""

from runtime.checkpoints import identity
from runtime.commandline import BadInput
from runtime.files import (
    append_row,
    atomic_write,
    check_folder,
    read_log,
    save_json,
    save_text,
)
from runtime.result_folders import digest_of

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluation import checkpoint_samples, report
from evaluation.against import Reference, form_of, generated, reference
from evaluation.checkpoint_samples import is_checkpoint
from evaluation.image_sets import Images, check_same_size
from evaluation.words import images_of, warn, whose

METRICS = "frechet,is,prdc"  # where none are typed
ROOT = Path("runs", "tables")
# Settings that decide the figures of a row, beside what is compared.
DECIDE = ("metrics", "n", "seed", "sqrtm")
SHARES = ("precision", "recall", "class_accuracy")
BAR = 0.38  # inches of a row of the figure


def prepared(cfg):
    """cfg with all rows in `more`, their names in `names`, and the reference in `b`.

    What is not typed is as the first checkpoint was trained. Raises BadInput without rows, and for
    names that are not one for each row, or twice the same.
    """
    rows = tuple(filter(None, (cfg.b, *cfg.more)))
    if not rows:
        raise BadInput("a table of nothing: type python eval_fid.py table A1 A2 --against B")
    names = cfg.names or tuple(short_names(rows))
    if len(names) != len(rows):
        raise BadInput(f"--names: {len(names)} names for {len(rows)} rows; type one for each")
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"--names: two rows are called {twice[0]}; type other --names")
    cfg = replace(cfg, b=cfg.against)
    if drawn := [row for row in rows if is_checkpoint(row)]:
        cfg = checkpoint_samples.as_trained(cfg, drawn[0])
    if not cfg.b:
        raise BadInput("a table needs a reference: eval_fid.py table A1 A2 --against B")
    return replace(cfg, more=rows, names=names)


def short_names(rows):
    """A name for each row: of a checkpoint its run's, of a file its own; where that is not enough
    to tell them apart, as they were typed."""

    def of(row):
        path = Path(row)
        if is_checkpoint(row):
            run = path.resolve().parent.name
            return run if path.name == "ckpt.pt" else f"{run}, {path.stem}"
        return path.name if path.exists() else row

    found = [of(row) for row in rows]
    return [row if found.count(name) > 1 else name for row, name in zip(rows, found, strict=True)]


# ------------------------------------------------------------------------------------------ rows


class Store:
    """Finished rows in a file of JSON lines: {"made_by": all that decides one, "figures": ...}."""

    def __init__(self, path):
        self.path = path
        rows = [row for row in read_log(path) if {"made_by", "figures"} <= row.keys()]
        self.rows = {digest_of(row["made_by"]): row["figures"] for row in rows}

    def __contains__(self, made_by):
        return digest_of(made_by) in self.rows

    def get(self, made_by):
        return self.rows[digest_of(made_by)]

    def add(self, made_by, figures):
        """figures: None on other processes than the first, which writes them."""
        self.rows[digest_of(made_by)] = figures
        if figures is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_row(self.path, {"made_by": made_by, "figures": figures})


def content_of(name, source):
    """What tells the images at `name` from others: a data set's key, a checkpoint's, or a file."""
    if getattr(source, "key", None):
        return source.key
    if is_checkpoint(name):
        return identity(name)
    file = Path(name).stat()
    return [str(Path(name).resolve()), file.st_size, file.st_mtime_ns]


def made_by_of(cfg, name, source, seen):
    """All that decides the figures of a row: name, its form as above, and the Reference."""
    made = {setting: getattr(cfg, setting) for setting in DECIDE}
    made |= {"a": content_of(name, source), "b": content_of(cfg.b, seen.seen.source)}
    made["features"] = getattr(seen.extractor, "feature_hash", None)
    made["classes"] = list(seen.class_names)
    if is_checkpoint(name):
        made |= {"sample_args": cfg.sample_args, "n": cfg.n or 1000}
    if seen.train is not None:
        made["train"] = seen.train.key
    return made


def compare(cfg, world, scored):
    """The table cfg.more against cfg.b; scored: see Reference. Rows are judged before long work."""
    root = Path(cfg.out) if cfg.out else ROOT
    b, forms = reference(cfg), [form_of(name, cfg) for name in cfg.more]
    check_same_size([side for side in (b, *forms) if isinstance(side, Images)])
    check_folder(root)
    seen, store = Reference(cfg, world, b, forms, scored), Store(root / "rows.jsonl")
    made = [made_by_of(cfg, *pair, seen) for pair in zip(cfg.more, forms, strict=True)]
    study = {"rows": made, "names": cfg.names}
    path = place(cfg, study, world)
    store.rows = world.gather(store.rows)[0]  # of rank 0, whose disk it is
    for i, (name, made_by) in enumerate(zip(cfg.more, made, strict=True)):
        if made_by not in store:
            pairs = path.with_name(f"{path.name}-nearest-{i + 1}.png")
            store.add(made_by, seen.figures(name, generated(cfg, name), str(pairs)))
    if world.is_main:
        rows = [
            {"name": name, **store.get(made_by), "a": a, "b": cfg.b}
            for name, a, made_by in zip(cfg.names, cfg.more, made, strict=True)
        ]
        write(cfg, path, study, rows)


def place(cfg, study, world):
    """The path of the files of this table, without an ending; none of another table lies there."""
    digest = digest_of(study)
    folder = Path(cfg.out)
    if not cfg.out:
        words = "-".join([*cfg.names[:2], *["more"] * (len(cfg.names) > 2), "against", cfg.b])
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in words)
        folder = ROOT / f"{plain[:80]}-{digest}"
    other = study_of(folder / "table.json") not in ("", digest)
    world.barrier()  # all have looked before one writes
    return folder / (f"table-{digest}" if other else "table")


def study_of(path):
    """The digest in a table.json; "" where no file is, "?" where it is something else."""
    if not path.is_file():
        return ""
    try:
        return json.loads(path.read_text())["study"]
    except (ValueError, LookupError, TypeError):
        return "?"


# ---------------------------------------------------------------------------- table and figure


def distance_name(row):
    return "FID" if row.get("network") == "Inception" else "Fréchet distance"


def columns_of(rows):
    """{title: text of a row} of the columns that any of the rows fills."""

    def spread(name, form, error):
        """name ± error; an error that is not known is left out."""

        def text(row):
            more = "" if row.get(error) is None else f" ± {row[error]:{form}}"
            return f"{row[name]:{form}}{more}"

        return text

    parted = any(row.get("inception_score_std") is not None for row in rows)
    columns = {
        "N": ("n_generated", "{n_generated:,}".format_map),
        distance_name(rows[0]): ("frechet", "{frechet:.3f}".format_map),
        "95 % interval": (
            "frechet_interval",
            lambda row: "{:.3f} to {:.3f}".format(*row["frechet_interval"]),
        ),
        "per class": ("class_frechet", "{class_frechet:.3f}".format_map),
        "IS" + " ± std" * parted: (
            "inception_score",
            spread("inception_score", ".3f", "inception_score_std"),
        ),
        "KID ± error": ("kid", spread("kid", ".5f", "kid_error")),
        "precision": ("precision", "{precision:.3f}".format_map),
        "recall": ("recall", "{recall:.3f}".format_map),
        "class accuracy": ("class_accuracy", "{class_accuracy:.1%}".format_map),
        "copies": ("memorisation_copies", "{memorisation_copies}".format_map),
    }

    def told(name, text):
        return lambda row: "–" if row.get(name) is None else text(row)

    filled = {t: c for t, c in columns.items() if any(row.get(c[0]) is not None for row in rows)}
    return {title: told(*column) for title, column in filled.items()}


def markdown(rows):
    """The lines of the table: a row for each of `rows`, which are dictionaries of figures."""
    columns = {"": lambda row: row["name"].replace("|", "\\|"), **columns_of(rows)}
    lines = [list(columns), [":--", *["--:"] * (len(columns) - 1)]]
    lines += [[text(row) for text in columns.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def notes(rows):
    """Sentences that the figures need: whose, of what, and what cannot be compared."""
    first, counts = rows[0], sorted({row["n_generated"] for row in rows if row["n_generated"]})
    b = images_of(first["b"], first["n_reference"])
    found = [f"Against {b}. Features: {first['features']}."]
    if parts := [row["inception_score_parts"] for row in rows if row.get("inception_score_parts")]:
        numbers = " to ".join(map(str, sorted({min(parts), max(parts)})))
        how = f"{numbers} part{'s' * (max(parts) > 1)}"
        found.append(f"IS: of {whose(first['network'])} logits, the mean over {how}.")
    if len(counts) > 1:
        less = f"N differs, from {counts[0]:,} to {counts[-1]:,}"
        found.append(f"{less}: with fewer images the distance is larger by bias; type --n.")
    return found


def write(cfg, path, study, rows):
    """PATH.md, .json and .png; what is printed."""
    command, lines = shlex.join(["python", *sys.argv]), markdown(rows)
    told = notes(rows)
    if told[-1].startswith("N differs"):
        warn(told[-1])
    count = f"{len(rows)} row{'s' * (len(rows) > 1)}"
    text = [f"# {count} against {cfg.b}", "", f"    {command}", ""]
    save_text(path.with_suffix(".md"), [*text, *lines, "", *told])
    found = {"study": digest_of(study), "command": command, "against": cfg.b}
    found |= {setting: getattr(cfg, setting) for setting in DECIDE} | {"rows": rows}
    save_json(path.with_suffix(".json"), found)
    draw(path.with_suffix(".png"), rows)
    print(*lines, "", *told, sep="\n")
    names = ", ".join(f"{path.name}{end}" for end in (".md", ".json", ".png"))
    print(f"kept in {path.parent}: {names}")
    report.finish(cfg, found)


def panels_of(rows):
    """{title: (name of the figure, (low, high) of a row or None)} of what is drawn."""

    def interval(row):
        return row.get("frechet_interval")

    def deviation(row):
        mean, std = row["inception_score"], row.get("inception_score_std")
        return None if std is None else (mean - std, mean + std)

    def nothing(row):
        return None

    title = f"{distance_name(rows[0])}, lower is better"
    title += "\nwith its 95 % interval" * any(map(interval, rows))
    shown = f"inception score\nby {whose(rows[0].get('network'))} logits"
    panels = {title: ("frechet", interval), shown: ("inception_score", deviation)}
    for name in SHARES:
        panels[name.replace("_", " ")] = (name, nothing)
    return {t: p for t, p in panels.items() if any(row.get(p[0]) is not None for row in rows)}


def draw(path, rows):
    """A bar for each row in a panel for each figure, with its value, into the PNG `path`."""
    from runtime.plots import short, wrapped

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = panels_of(rows)
    counts = [f", N = {row['n_generated']:,}" if row["n_generated"] else "" for row in rows]
    names = [wrapped(row["name"] + n, 3) for row, n in zip(rows, counts, strict=True)]
    tall = 1.2 + BAR * sum(max(1.5, 0.6 + name.count("\n")) for name in names)
    size = (2.6 * len(panels) + 2, tall)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(wspace=0.06)
    places = np.arange(len(rows))
    for axis, (title, (name, around)) in zip(axes[0], panels.items(), strict=True):
        values = [row.get(name) for row in rows]
        heights = [value or 0.0 for value in values]
        axis.barh(places, heights, height=0.6, color=[f"C{i % 10}" for i in places])
        ends = [around(row) or (value, value) for row, value in zip(rows, heights, strict=True)]
        for place, value, end in zip(places, heights, ends, strict=True):
            if end[0] != end[1]:
                both = [[value - end[0]], [end[1] - value]]
                axis.errorbar(value, place, xerr=both, color="black", capsize=3)
        most = max(high for _, high in ends) or 1.0
        for place, value, end in zip(places, values, ends, strict=True):
            text = "not known" if value is None else f"{value:.{1 if value >= 100 else 3}f}"
            axis.text(end[1] + 0.03 * most, place, text, va="center", fontsize=9)
        axis.set_xlim(0, 1.32 * most)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.set_title(title, fontsize=9)
        axis.set_yticks(places, names, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    about = f"against {images_of(short(rows[0]['b']), rows[0]['n_reference'])}"
    about += f", by {whose(rows[0].get('network'))} features"
    figure.suptitle(wrapped(about, size[0]), fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
