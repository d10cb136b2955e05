"""What eval_fid.py prints and draws: a table for people, one JSON object, curves over training."""

from runtime.files import atomic_write
from runtime.plots import plot_lines, short
from runtime.result_folders import digest_of
from runtime.scores import curve_of

import json
import shlex
import sys
from pathlib import Path

from evaluation.words import images_of, whose

# Label, format of a line for people; it is left out where one of its figures is missing.
LINES = (
    ("Fréchet distance", "{frechet:.4f}"),
    ("  95 % interval", "{frechet_interval[0]:.4f} to {frechet_interval[1]:.4f} at this N"),
    ("  endless samples", "{frechet_infinity:.4f}, extrapolated"),
    ("Fréchet per class", "{class_frechet:.4f} in the mean"),
    (
        "inception score",
        "{inception_score:.3f} ± {inception_score_std:.3f} over {inception_score_parts} parts, "
        "by {whose} logits",
    ),
    # of fewer than 1,000 images, where nothing is known of its spread
    ("inception score", "{inception_score:.3f} in 1 part, by {whose} logits"),
    ("kernel distance", "{kid:.5f} ± {kid_error:.5f}, standard error"),
    ("precision, recall", "{precision:.3f}, {recall:.3f}"),
    ("density, coverage", "{density:.3f}, {coverage:.3f}"),
    ("class accuracy", "{class_accuracy:.2%}"),
    ("copies of training", "{memorisation_copies}"),
    (
        "  very near",
        "{memorisation_near_share:.1%}, by chance {memorisation_near_expected:.1%} "
        "(p = {memorisation_near_p:.2g})",
    ),
    ("  nearer than B", "{memorisation_share:.1%}, by chance 50 % (p = {memorisation_p:.2g})"),
    ("generated  A", "{a}, N = {n_generated}"),
    ("reference  B", "{b}, N = {n_reference}"),
    ("labels of A", "{labels:s}"),
    ("channels", "{channels:s}"),
    ("features", "{features}"),
)
# Title of a panel of the curves: its lines, and the figure of each.
CURVES = {
    "Fréchet distance": {"at this N": "frechet", "endless samples": "frechet_infinity"},
    "inception score": {"inception score": "inception_score"},
    "share": {"precision": "precision", "recall": "recall"},
    "class accuracy": {"class accuracy": "class_accuracy"},
}
CURVED = {name for lines in CURVES.values() for name in lines.values()}
# What decides the figures of a curve, beside the run.
CURVE_IS_OF = ("b", "n_generated", "n_reference", "feature_hash", "seed", "sample_args")


def show(found):
    """The figures `found` as a table for people; of two lines of one label the first that can be
    filled."""
    shown, found = set(), found | {"whose": whose(found.get("network"))}
    for label, form in LINES:
        try:
            line = f"{label:<18} {form.format(**found)}"
        except (KeyError, TypeError):
            continue
        if label not in shown:
            print(line)
        shown.add(label)


def curve_path(folder, row):
    """Where a curve that begins with this row lies, without an ending: it replaces no other's."""

    def about(row):
        told = {name: row.get(name) or "" for name in CURVE_IS_OF}
        run = str(Path(str(row.get("a"))).parent)
        return told | {"run": run, "figures": sorted(CURVED & row.keys())}

    other = any(about(first) != about(row) for first in curve_of(folder)[:1])
    return folder / (f"curve-{digest_of(about(row))}" if other else "curve")


def draw_curve(path, run, rows):
    """PATH.png and .json of a run: rows of figures, each with the "step" it is of."""
    panels, steps = {}, [row["step"] for row in rows]
    for title, lines in CURVES.items():
        known = {label: key for label, key in lines.items() if rows[-1].get(key) is not None}
        if known:
            whole = title
            if title == "inception score":
                whole += f", by {whose(rows[-1].get('network'))} logits"
            panels[whole] = {
                label: (steps, [row[key] for row in rows]) for label, key in known.items()
            }
    last = rows[-1]
    title = f"{short(run)}, N = {last['n_generated']}, "
    title += f"against {images_of(last['b'], last['n_reference'])}"
    title += f"\n{whose(rows[-1].get('network'))} features"
    ticks = steps if len(steps) <= 12 else None
    plot_lines(f"{path}.png", panels, xlabel="step", title=title, xticks=ticks)
    with atomic_write(f"{path}.json") as temporary:
        temporary.write_text(json.dumps(rows) + "\n")


def finish(cfg, found):
    """The last lines: the command, and one JSON object, which goes into cfg.json too."""
    print(f"command            {shlex.join(['python', *sys.argv])}, seed {cfg.seed}")
    line = json.dumps(found)
    print(line, flush=True)  # first: the file may find no room
    if cfg.json:
        with atomic_write(cfg.json) as temporary:
            temporary.write_text(line + "\n")
