"""How much guidance? The same seeds at rising w, and what eval_fid.py says of each.

    python bench/guidance.py runs/ldm-mnist/ckpt.pt [--w=-1,0,1,3] [--n 1000] [--out FOLDER]

A checkpoint of any chapter with --guidance draws n samples at each w, of the same seeds, and
eval_fid.py compares them with the held-out images of its data set: class accuracy should rise with
w, the Fréchet distance fall first and rise again when all samples of a class become alike. Written
into --out (default: beside the checkpoint): guidance.png, one grid for each w and the curves under
them, and guidance.json. Samples and figures that are there already are taken as they are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime.commandline import BadInput, at_home, default_gpus, entry, split_list  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.pictures import tile  # noqa: E402

import numpy as np  # noqa: E402

from evaluation import checkpoint_samples  # noqa: E402

SHOWN = 50  # samples in a grid, in rows of ten
CURVES = {
    "Fréchet distance": ("frechet",),
    "class accuracy": ("class_accuracy",),
    "precision, recall": ("precision", "recall"),
}


def score(args, w):
    """(figures of eval_fid.py as a dictionary, the samples uint8 (N,H,W,C)) at guidance w."""
    how = f"--guidance {w:g} {args.sample_args}".strip()
    script, trained = checkpoint_samples.checkpoint_settings(args.checkpoint)
    command = [
        sys.executable,
        str(REPO / "eval_fid.py"),
        args.checkpoint,
        args.reference,
        "--n",
        str(args.n),
        "--data-root",
        args.data_root or trained["data_root"],
        "--gpus",
        str(args.gpus),
        "--features",
        "classifier",  # it reads the classes that guidance is about
        f"--sample-args={how}",
        *args.eval_args.split(),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BadInput(f"eval_fid.py failed at w = {w:g}; see above")
    samples = checkpoint_samples.sampled(args.checkpoint, script, args.n, args.gpus, how)
    with np.load(samples) as held:
        return json.loads(done.stdout.splitlines()[-1]) | {"w": w}, held["arr_0"][:SHOWN]


def draw(path, rows, grids, title):
    """One figure: a grid of samples for each row, and below them the curves over w."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(3.2 * len(rows), 4.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for axis, row, grid in zip(
        above.subplots(1, len(rows), squeeze=False)[0], rows, grids, strict=True
    ):
        sheet = tile(grid, 10)
        axis.imshow(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet, cmap="gray")
        axis.set_title(f"w = {row['w']:g}", fontsize=10)
        axis.axis("off")
    for axis, (label, keys) in zip(below.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for key in keys:
            points = [(row["w"], row[key]) for row in rows if row.get(key) is not None]
            error = [row.get(f"{key}_error", 0) for row in rows if row.get(key) is not None]
            if points:
                axis.errorbar(*zip(*points, strict=True), error, marker="o", ms=4, label=key)
        axis.set(xlabel="guidance w", title=label)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=at_home)
    parser.add_argument("--w", default="-1,0,1,3", help="values of w, in the order of the grids")
    parser.add_argument("--n", type=int, default=1000, help="samples at each w")
    parser.add_argument(
        "--reference", type=at_home, default="", help="default: test split of its data set"
    )
    parser.add_argument(
        "--data-root", type=at_home, default="", help="default: that of the training"
    )
    parser.add_argument("--gpus", type=int, default=default_gpus())
    parser.add_argument("--sample-args", default="", help="more flags, such as '--sampler dpmpp'")
    parser.add_argument("--eval-args", default="", help="more flags of eval_fid.py")
    parser.add_argument("--out", type=at_home, default="", help="folder; default: the checkpoint's")
    args = parser.parse_args()
    try:
        values = [float(w) for w in split_list(args.w)]
    except ValueError:
        raise BadInput(f"--w={args.w}: expected numbers such as -1,0,1,3") from None
    rows, grids = zip(*(score(args, w) for w in values), strict=True)
    folder = Path(args.out or Path(args.checkpoint).parent)
    title = f"{rows[0]['b']}, N = {args.n} at each w, the same seeds"
    draw(folder / "guidance.png", rows, grids, title)
    with atomic_write(folder / "guidance.json") as temporary:
        temporary.write_text(json.dumps(rows) + "\n")
    for row in rows:
        accuracy = "-" if row["class_accuracy"] is None else f"{row['class_accuracy']:.1%}"
        print(f"w = {row['w']:4g}  Fréchet {row['frechet']:.3f}  class accuracy {accuracy}")
    print(json.dumps({"figure": str(folder / "guidance.png"), "rows": rows}))


if __name__ == "__main__":
    entry(main)
