"""The comparison of samplers: rows that survive a kill, tables of them, and their figures."""

from runtime.files import atomic_write
from runtime.pictures import save_grid
from runtime.plots import plot_lines
from runtime.training import read_log

import hashlib
import json
import os

import numpy as np
from PIL import Image


def fingerprint(tensors):
    """Sixteen hex digits that name the values of a dictionary of tensors.

    Rows of a Store bear it: by another digest all samplers of kept comparisons would run again.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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


def draw_cells(path, cells, panels=None):
    """A sheet of pictures {(row title, column title): picture}, and below it curves over w."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = (unique(key[i] for key in cells) for i in (0, 1))
    extra = 2 if panels else 0  # the curves are as high as two rows
    figure = plt.figure(figsize=(2.2 * len(columns), 2.3 * (len(rows) + extra)))
    outer = figure.add_gridspec(len(rows) + extra, 1)
    for i, row in enumerate(rows):
        strip = outer[i].subgridspec(1, len(columns), wspace=0.05)
        for j, column in enumerate(columns):
            axes = figure.add_subplot(strip[j])
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(column, fontsize=9)
            if j == 0:
                axes.set_ylabel(row)
            if (row, column) in cells:
                axes.imshow(cells[row, column], cmap="gray", vmin=0, vmax=255)
    if panels:
        strip = outer[len(rows) :].subgridspec(1, len(panels), wspace=0.3)
        for j, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(strip[j])
            for name, (xs, ys) in lines.items():
                axes.plot(xs, ys, marker=".", label=name)
            axes.set(xlabel="guidance w", ylabel=title)
            axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    plt.close(figure)
