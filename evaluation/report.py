"""What eval_fid.py prints and draws: a table for people, one JSON object, curves over training."""

from runtime.files import atomic_write
from runtime.plots import plot_lines

import json
import shlex
import sys

from evaluation.words import whose

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


def draw_curve(folder, rows):
    """curve.png and curve.json in `folder`: rows of figures, each with the "step" it is of."""
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
    title = f"{folder}, N = {rows[-1]['n_generated']}, against {rows[-1]['b']}"
    title += f"\n{whose(rows[-1].get('network'))} features"
    ticks = steps if len(steps) <= 12 else None
    plot_lines(folder / "curve.png", panels, xlabel="step", title=title, xticks=ticks)
    with atomic_write(folder / "curve.json") as temporary:
        temporary.write_text(json.dumps(rows) + "\n")


def finish(cfg, found):
    """The last lines: the command, and one JSON object, which goes into cfg.json too."""
    print(f"command            {shlex.join(['python', *sys.argv])}, seed {cfg.seed}")
    line = json.dumps(found)
    print(line, flush=True)  # first: the file may find no room
    if cfg.json:
        with atomic_write(cfg.json) as temporary:
            temporary.write_text(line + "\n")
