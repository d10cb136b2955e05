"""How much guidance? The same seeds at rising w, and what eval_fid.py says of each.

    python bench/guidance.py runs/ldm-mnist/ckpt.pt [--w=-1,0,1,3] [--n 1000] [--out FOLDER]

A checkpoint of any chapter with --guidance draws n samples at each w, of the same seeds, and
eval_fid.py compares them with the held-out images of its data set: class accuracy should rise with
w, the Fréchet distance fall first and rise again when all samples of a class become alike. At -1
nobody asks for a class, and there is no accuracy. Written into --out (default: beside the
checkpoint), as the samples are: guidance.png, one grid for each w and the curves under them,
guidance.json, and of ldm_cfg.py's and dit.py's checkpoints guidance-film.gif and .png: a sample of
each class on its way, decoded, all w side by side. (Of networks of pixels compare_samplers.py makes
such a film, and its own guidance.png: here it is guidance-scores.png.) Settings other than the
default ones are in the names. Samples and figures that are there already are taken as they are.
"""

import argparse
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime import checkpoints  # noqa: E402
from runtime import commandline as cli  # noqa: E402
from runtime.commandline import BadInput, at_home, default_gpus, entry, split_list  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.films import marks_of, one_each, save_beside  # noqa: E402
from runtime.pictures import tile, to_uint8  # noqa: E402
from runtime.processes import World, exact  # noqa: E402
from runtime.result_folders import suffix_of  # noqa: E402

from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import ddpm_pixel  # noqa: E402
import ldm_cfg  # noqa: E402
from evaluation import checkpoint_samples  # noqa: E402
from evaluation.study_names import name_for  # noqa: E402
from kernels import gaussian  # noqa: E402
from networks.autoencoders import latent_shape  # noqa: E402

SHOWN = 50  # samples in a grid, in rows of ten
FRAMES = 21  # of a film, each decoded
LATENT = ("ldm_cfg", "dit")
CURVES = {
    "Fréchet distance": ("frechet",),
    "inception score": ("inception_score",),
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
        *(["--out", args.out] if args.out else []),
        *shlex.split(args.eval_args),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BadInput(f"eval_fid.py failed at w = {w:g}; see above")
    where = args.checkpoint, script, args.n, args.gpus, how, args.out
    samples = checkpoint_samples.sampled(*where)
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
        axis.set(xlabel="guidance w", title=label, xticks=sorted({row["w"] for row in rows}))
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def settings_of(args, script):
    """(the script's module, its settings, decay of --ema or None) as its own command line has them:
    what is not typed is as in the checkpoint."""
    module, typed = importlib.import_module(script), shlex.split(args.sample_args)
    flags = ["--sample", args.checkpoint, "--gpus", str(args.gpus), *typed]
    with mock.patch.object(sys, "argv", [f"{script}.py", *flags]):
        cfg = cli.parse(module.Config, "")
        names = (*ldm_cfg.SAMPLING, "batch_size", "timesteps")
        cfg = checkpoints.as_trained(cfg, names, cfg.sample, script)
        return module, cfg, checkpoints.typed_ema(cfg)


def film(args, script, values, path):
    """PATH.gif and .png: latents of one seed of each class on their way, decoded, at each w.

    Nothing for a network without classes; says whether there are such files.
    """
    module, cfg, ema = settings_of(args, script)
    world = World(device=torch.device("cuda:0" if args.gpus else "cpu"), precision=cfg.precision)
    net, trained, state, ae = module.load_net(cfg.sample, world.device, ema)
    names = state["class_names"]
    if not names:
        return False
    trained = replace(trained, **{name: getattr(cfg, name) for name in ldm_cfg.SAMPLING})
    seeds = cli.parse_seeds(cfg.seeds, len(names))
    labels = cli.labels_for(seeds, cli.parse_classes(cfg.classes, names))
    chosen, rows, note = one_each(labels, len(seeds), names)
    seeds, y = (v[torch.as_tensor(chosen)].to(world.device) for v in (seeds, labels))
    pairs = ddpm_pixel.timestep_pairs(trained.timesteps, trained.sample_steps)
    kept = np.linspace(0, len(pairs), min(FRAMES, len(pairs) + 1)).round().astype(int)
    shape, films = latent_shape(ae, state["shape"]), {}
    for w in values:
        settings = replace(trained, guidance=w)
        with world.autocast():
            way = ldm_cfg.sample(net, settings, shape, seeds, y, make_rows=module.rows_of)
            noise = gaussian((len(seeds), *shape), seeds, -1, seeds.device)
            zs = [noise, *(z for z, _ in way)]
        with torch.no_grad(), exact():  # in fp32, as ldm_cfg.draw decodes
            decoded = (ae.decode(zs[i].float() / state["scale"]) for i in kept)
            films[f"w = {w:g}"] = [to_uint8(x, seeds).numpy() for x in decoded]
    marks = marks_of(pairs)
    save_beside(path, films, [marks[i] for i in kept], rows, note)
    return True


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
    if not values or len(set(values)) < len(values):
        raise BadInput(f"--w={args.w}: expected different numbers such as -1,0,1,3")
    if args.n < 2:
        raise BadInput(f"--n {args.n}: at least 2 samples, a covariance is compared")
    script, _ = checkpoint_samples.checkpoint_settings(args.checkpoint)
    rows, grids = zip(*(score(args, w) for w in values), strict=True)
    folder = Path(args.out or Path(args.checkpoint).parent)
    title = f"{rows[0]['b']}, N = {args.n} at each w, the same seeds"
    title += f", {args.sample_args}" if args.sample_args else ""
    names = ("w", "n", "reference", "sample_args", "eval_args")
    told = {k: v for k in names if (v := getattr(args, k)) != parser.get_default(k)}
    told |= {k: told[k].strip("- ") for k in names[3:] if k in told}
    told |= {"of": stem} if (stem := Path(args.checkpoint).stem) != "ckpt" else {}
    kind = "guidance" if script in LATENT else "guidance-scores"
    stat = Path(args.checkpoint).stat()
    facts = {k: v for k, v in vars(args).items() if k not in ("out", "gpus")}
    facts["file"] = [stat.st_size, stat.st_mtime_ns]  # of the checkpoint
    suffix, known = name_for(folder, kind, suffix_of(told), facts)
    path = folder / f"{kind}{suffix}.png"
    draw(path, rows, grids, title)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"facts": facts, "rows": rows}) + "\n")
    for row in rows:
        accuracy = "-" if row["class_accuracy"] is None else f"{row['class_accuracy']:.1%}"
        print(f"w = {row['w']:4g}  Fréchet {row['frechet']:.3f}  class accuracy {accuracy}")
    made = [path.name, path.with_suffix(".json").name]
    if script in LATENT:
        name = folder / f"guidance-film{suffix}"
        films = [Path(f"{name}.{kind}") for kind in ("gif", "png")]
        there = known and all(map(Path.exists, films))
        if there or film(args, script, values, name):
            made += [found.name for found in films]
    print(f"kept in {folder}: {', '.join(made)}")
    print(json.dumps({"figure": str(path), "rows": rows}))


if __name__ == "__main__":
    entry(main)
