"""Which sampler, how many steps, how much guidance? The study of one checkpoint.

A sampler is worth what its images are worth, so each is scored by eval_fid.py: how far N samples
lie from held-out images (the Fréchet distance of a classifier's features, lower is better), and how
many of them the classifier reads as the class that was asked for. What it costs is counted in
evaluations of the network, which depend on no machine, and in seconds, which do. All draw the same
seeds, and so start at the same x_T.

    ddim           ddim.py, with --eta
    dpmpp, heun    dpm_solver.py
    ddpm           the ancestral step of ddpm_pixel.py; of improved_ddpm.py for learned variances

    python compare_samplers.py runs/pixel-mnist/ckpt.pt --n 1000 --compare-steps 5,10,20,50
    python compare_samplers.py runs/pixel-mnist/ckpt.pt --sampler dpmpp --sample-steps 10
    python compare_samplers.py runs/pixel-mnist/ckpt.pt --smoke

The first draws 16,000 images for a table of samplers and 6,000 for one of guidance, with the
network of configs/mnist_pixel.yaml in about an hour on one CPU core. All leave beside the
checkpoint, or in --out,

    compare.md, compare.json    two tables: sampler x steps, and guidance; with all that made them
    compare.png                 the first as curves over network evaluations
    compare-grids.png           the same few seeds in each of its cells
    guidance.png                the second: curves, and the same few seeds
    compare.jsonl               a line for each finished row, so that a later call goes on there;
                                its images are in compare-cells/
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.files import atomic_write, read_log
from runtime.pictures import save_grid
from runtime.plots import draw_cells, plot_lines
from runtime.processes import launch

import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

import ddim
import ddpm_pixel
import dpm_solver
from ddim import numbers_of, subsequence
from improved_ddpm import rows_of, variance_of

SAMPLERS = ("ddim", "dpmpp", "heun", "ddpm")
SHOWN = 16  # images in a cell of the grids


@dataclass
class Config(cli.NetworkCommand):
    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """a checkpoint of ddpm_pixel.py or improved_ddpm.py, or a published network"""
    n: int = 1000  # images of each row of the tables
    seeds: str = ""  # of the samples, such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    compare_steps: str = "5,10,20,50,100,250,1000"  # numbers of steps to compare; T at most
    compare_guidance: str = "-1,0,0.5,1,2,4"
    """values of w to compare at --sample-steps of --sampler, where there are labels"""
    sampler: Literal["ddim", "dpmpp", "heun", "ddpm"] = "ddim"  # of the table over guidance
    sample_steps: int = 50  # of the table over guidance
    guidance: float = 0.0
    """of the table over samplers and steps: w in (1+w) eps(x,y) - w eps(x)"""
    spacing: Literal["linear", "quadratic", "leading", "trailing"] = "linear"
    """where the timesteps lie: see ddim.py; if it is not typed, as the network's settings say"""
    clip_denoised: bool = True  # keep x0_hat in [-1, 1]; not typed, as its settings say
    eta: float = 0.0  # fresh noise of a ddim step: 0 none, 1 as much as ddpm
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of a ddpm step: beta_tilde, beta, or learned; auto is learned where it was, else small"""
    data: str = ""  # what to compare with, if not the data that the network was trained on
    data_root: str = ""  # where data sets are looked for (default: where the training found them)

    IDLE = cli.names("seed")


def trajectory_of(cfg, net, trained, alpha_bar, shape, sampler, steps, w):
    """The function (seeds, labels) -> (x, x0_hat), (B,C,H,W), of each step of this sampler."""
    pairs = subsequence(trained.timesteps, steps, trained.spacing)
    where = (net, alpha_bar, pairs, shape)
    if sampler == "ddpm":
        make_row = rows_of(trained, alpha_bar, pairs)
        clip = trained.clip_denoised
        return partial(ddpm_pixel.sample, *where, w=w, make_row=make_row, clip=clip)
    how = {"w": w, "prediction": trained.prediction, "clip": trained.clip_denoised}
    if sampler == "ddim":
        return partial(ddim.sample, *where, eta=cfg.eta, **how)
    return partial(dpm_solver.sample, sampler, *where, **how)


# -------------------------------------------------------------------------------------- the study


class Store:
    """Finished rows in a file of JSON lines, and a picture of each in a folder beside it.

    A row is {"made_by": all that decides its figures, "figures": ..., "cell": name of the picture}.
    """

    def __init__(self, path, cells):
        self.path, self.cells = path, cells
        self.rows = [row for row in read_log(path) if (cells / row["cell"]).exists()]

    def find(self, made_by):
        """The row that was made by just this, or None."""
        return next((row for row in self.rows if row["made_by"] == made_by), None)

    def add(self, made_by, figures, images, write=True):
        """Keep a row, its images uint8 (N,H,W,C) first; returns it. write: False on other ranks."""
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{made_by['sampler']}-{made_by['steps']}-w{made_by['guidance']:g}-{digest}.png"
        row = {"made_by": made_by, "figures": figures, "cell": name}
        self.rows.append(row)
        if write:
            save_grid(images, self.cells / name)
            with open(self.path, "a") as f:
                # A kill may have torn the line before this one: start on a new line.
                f.write(("\n" if f.tell() else "") + json.dumps(row))
                f.flush()
                os.fsync(f.fileno())
        return row


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def evaluator_of(cfg, trained, shape, names, device):
    """The Evaluator of samples, against held-out images of the classes that are drawn."""
    from eval_fid import Evaluator

    drawn = cli.parse_classes(cfg.classes, names) if cfg.classes else []
    return Evaluator(
        cfg.data or trained.data,
        cfg.data_root or trained.data_root,
        shape=shape,
        size=trained.size,
        class_names=names,
        device=device,
        classes=[names[i] for i in drawn] or trained.classes,
    )


def compare(cfg, world):
    """Both tables, their figures, and the lines they are made from."""
    opened = ddim.opened(cfg, cfg.checkpoint, world, "compare_samplers")
    net, trained, shape, names, alpha_bar = opened
    seeds, labels = cli.seeds_and_labels(cfg, net, names, cfg.guidance)
    trained = checkpoints.overlaid(trained, cfg, ("variance",))
    trained = replace(trained, variance=variance_of(trained))
    evaluator = evaluator_of(cfg, trained, shape, names, world.device)
    folder, T = cli.folder_of(cfg, cfg.checkpoint), trained.timesteps
    store = Store(folder / "compare.jsonl", folder / "compare-cells")
    world.barrier()  # every rank has read the store before one adds to it
    common = {
        "weights": checkpoints.weights_hash(net),
        "n": len(seeds),
        "seeds": cfg.seeds,
        "classes": cfg.classes,
        "spacing": trained.spacing,
        "clip_denoised": trained.clip_denoised,
        "protocol": evaluator.protocol,
        "reference": evaluator.reference,
        "n_reference": evaluator.n_reference,
        "device": f"{world.size} x {device_name(world.device)}",
        "batch_size": cfg.batch_size,
    }

    quick = world.for_sampling(net)

    def draw(sampler, steps, w, n, desc):
        trajectory = trajectory_of(cfg, quick, trained, alpha_bar, shape, sampler, steps, w)
        y = None if labels is None else labels[:n]
        return world.draw(trajectory, seeds[:n], y, cfg.batch_size, steps, desc)

    def row(sampler, steps, w):
        """What this sampler is worth: computed, unless the store has it."""
        about = {"sampler": sampler, "steps": steps, "guidance": w}
        about |= {"eta": cfg.eta} if sampler == "ddim" else {}
        about |= {"variance": trained.variance} if sampler == "ddpm" else {}
        found = store.find(common | about)
        if found:
            return found
        start = time.perf_counter()
        images = draw(sampler, steps, w, len(seeds), f"{sampler}, {steps} steps, w = {w:g}")
        seconds = time.perf_counter() - start
        figures = evaluator(images.numpy(), None if labels is None else labels.numpy(), world)
        figures |= {
            "evaluations": dpm_solver.calls_of(sampler, steps) * ddim.passes(labels, w),
            "seconds_per_image": seconds / len(seeds),
        }
        return store.add(common | about, figures, images[:SHOWN].numpy(), write=world.is_main)

    # One step first, not timed: a GPU compiles kernels when they are first used, and records the
    # network when it first sees a batch of this size.
    draw("ddim", 1, cfg.guidance, min(len(seeds), cfg.batch_size), "warm-up")
    wanted = sorted({min(k, T) for k in numbers_of(cfg.compare_steps, "--compare-steps")})
    by_steps = [row(sampler, k, cfg.guidance) for sampler in SAMPLERS for k in wanted]
    by_guidance, steps = [], min(cfg.sample_steps, T)
    if labels is not None and net.null_label:
        values = numbers_of(cfg.compare_guidance, "--compare-guidance", float)
        by_guidance = [row(cfg.sampler, steps, w) for w in sorted(set(values))]
    if world.is_main:
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        facts = common | {"checkpoint": cfg.checkpoint, "command": command}
        write(folder, facts, by_steps, by_guidance, store)
        print((folder / "compare.md").read_text())
        pictures = "compare.png, compare-grids.png" + (", guidance.png" if by_guidance else "")
        print(f"kept in {folder}: compare.md, compare.json, {pictures}")


# ---------------------------------------------------------------------------- tables and figures


def write(folder, facts, by_steps, by_guidance, store):
    """compare.md, compare.json, compare.png, compare-grids.png and guidance.png in `folder`.

    facts: what holds for all rows; by_steps: a row for each sampler and number of steps;
    by_guidance: a row for each w, none where there are no labels.
    """
    plain = [row["made_by"] | row["figures"] for row in by_steps]
    guided = [row["made_by"] | row["figures"] for row in by_guidance]
    with atomic_write(folder / "compare.md") as path:
        path.write_text(report(facts, plain, guided))
    with atomic_write(folder / "compare.json") as path:
        everything = {"facts": facts, "samplers": plain, "guidance": guided}
        path.write_text(json.dumps(everything, indent=1) + "\n")

    lines = {}
    for name in unique(row["sampler"] for row in plain):
        lines[name] = [row for row in plain if row["sampler"] == name]
    panels = curves(lines, "evaluations")
    logy = tuple(panels)[:1]
    xlabel = "network evaluations per image"
    plot_lines(folder / "compare.png", panels, xlabel=xlabel, logx=True, logy=logy)
    titles = [(row["sampler"], f"{row['steps']} steps") for row in plain]
    cells = [cell(store, row) for row in by_steps]
    draw_cells(folder / "compare-grids.png", dict(zip(titles, cells, strict=True)))
    if guided:
        panels = curves({guided[0]["sampler"]: guided}, "guidance")
        titles = [("", f"w = {row['guidance']:g}") for row in guided]
        cells = [cell(store, row) for row in by_guidance]
        draw_cells(folder / "guidance.png", dict(zip(titles, cells, strict=True)), panels)


def unique(names):
    """The different names, in the order of their first appearance."""
    return list(dict.fromkeys(names))


def report(facts, plain, guided):
    """compare.md: both tables, and above them what is needed to make them again."""
    seeds = facts["seeds"] or f"0-{facts['n'] - 1}"
    lines = [
        f"# Samplers compared: {facts['checkpoint']}",
        "",
        f"    {facts['command']}",
        "",
        f"N = {facts['n']} samples, seeds {seeds}, classes {facts['classes'] or 'all'}, "
        f"{facts['spacing']} spacing, on {facts['device']}. Fréchet distance to "
        f"{facts['n_reference']} images of {facts['reference']}; {facts['protocol']}",
        "",
        "## Samplers and steps",
        "",
        *table(plain, "sampler", "steps"),
    ]
    if plain:
        lines[-1:] += ["", f"Guidance w = {plain[0]['guidance']:g}."]
    if guided:
        first = guided[0]
        lines += ["", "## Guidance", "", f"{first['sampler']}, {first['steps']} steps.", ""]
        lines += table(guided, "guidance")
    return "\n".join(lines) + "\n"


def table(rows, *keys):
    """Markdown lines: the columns `keys` and the figures."""
    titles = [*keys, "network evaluations", "s per image", "Fréchet distance", "class accuracy"]
    lines = [" | ".join(titles), " | ".join("---" for _ in titles)]
    for row in rows:
        right = "-" if row["class_accuracy"] is None else f"{100 * row['class_accuracy']:.1f} %"
        lines.append(
            " | ".join(
                [
                    *(format(row[key], "s" if key == "sampler" else "g") for key in keys),
                    str(row["evaluations"]),
                    f"{row['seconds_per_image']:.4f}",
                    f"{row['frechet']:.3f}",
                    right,
                ]
            )
        )
    return [f"| {line} |" for line in lines]


def curves(lines, x):
    """Panels of plot_lines: each figure of merit over column x, from {name: rows}."""
    panels = {"Fréchet distance": "frechet", "class accuracy": "class_accuracy"}
    return {
        title: {
            name: ([row[x] for row in rows], [row[key] for row in rows])
            for name, rows in lines.items()
        }
        for title, key in panels.items()
        if all(row[key] is not None for rows in lines.values() for row in rows)
    }


def cell(store, row):
    """The picture of a row: uint8 (H,W,3) or (H,W)."""
    with Image.open(store.cells / row["cell"]) as picture:
        return np.asarray(picture)


# ------------------------------------------------------------------------------------------ main


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    if not cfg.checkpoint:
        raise cli.BadInput(
            "a checkpoint is missing; type python compare_samplers.py runs/pixel-mnist/ckpt.pt"
        )
    cli.check_ranges(cfg, positive="n sample_steps batch_size", fraction="eta")
    if len(cli.parse_seeds(cfg.seeds, cfg.n)) < 2:
        raise cli.BadInput("--n, --seeds: at least 2 images, a covariance is compared")
    numbers_of(cfg.compare_steps, "--compare-steps")
    numbers_of(cfg.compare_guidance, "--compare-guidance", float)
    cli.check_processes(cfg.gpus, cfg.batch_size, precision=cfg.precision)


def main():
    cfg = cli.parse(Config, __doc__)
    if cfg.smoke:
        tiny = {"n": 8, "sample_steps": 4, "compare_steps": "2,4", "compare_guidance": "0,1"}
        cfg = cli.smaller(cfg, **tiny)
    check(cfg)
    launch(compare, cfg)


if __name__ == "__main__":
    cli.entry(main)
