"""Curves over t: how well a classifier reads noisy images, and what schedules leave of an image."""

from runtime.files import save_json, save_text
from runtime.films import save_strip
from runtime.finite import WEIGHTS, NotFinite
from runtime.pictures import to_uint8
from runtime.plots import plot_lines
from runtime.result_folders import suffix_of

import math
from pathlib import Path

import numpy as np
import torch

from evaluation.words import markdown
from image_data import datasets, glyphs
from image_data.batches import Dataset, spaced
from kernels import gaussian

TIMES = 20  # timesteps of a curve, five in each quarter
QUARTERS = (0, 0.25, 0.5, 0.75, 1)  # ticks of t / T
PARTS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # t / T of a noised image


def evenly(ds, n):
    """At most n images of a Dataset, evenly spaced: (B,C,H,W) in [-1, 1], and labels (B,)."""
    return ds.batch(spaced(len(ds), n))


def timesteps(T):
    """TIMES of the timesteps 0..T-1, each in the middle of its part: a list."""
    return [int((i + 0.5) * T / TIMES) for i in range(TIMES)]


@torch.no_grad()
def accuracy(classifier, noisy, ds, T, n, batch_size, world):
    """The share (0..1) of n images of the Dataset ds that is read right at each of timesteps(T).

    classifier(x, t) gives logits (B,K), noisy(x0, t, eps) gives x_t (B,C,H,W); t (B,). Each rank
    computes its share of the timesteps, batch_size images at a time, and all return the whole: a
    list of floats. NotFinite, on all, where logits are not finite.
    """
    x0, y = (v.to(world.device) for v in evenly(ds, n))
    eps = gaussian(x0.shape, torch.arange(len(x0)), 0, x0.device)

    def right(t):
        t = torch.full((len(x0),), t, device=x0.device)
        parts = zip(noisy(x0, t, eps).split(batch_size), t.split(batch_size), strict=True)
        logits = torch.cat([classifier(*part) for part in parts])  # (n,K)
        share = (logits.argmax(1) == y).double().mean().item()
        return share if logits.isfinite().all() else math.nan

    def of(part, tick):  # one timestep, or none where ranks are many
        found = torch.tensor([right(timesteps(T)[i]) for i in part], dtype=torch.float64)
        tick()
        return found

    with world.autocast():
        curve = world.in_parts(of, TIMES, world.size, 1, f"accuracy on {ds.name}").tolist()
    for t, share in zip(timesteps(T), curve, strict=True):
        if math.isnan(share):
            raise NotFinite(f"the logits of {ds.name} at t = {t} are not finite: {WEIGHTS}")
    return curve


def by_quarter(curve, name):
    """{name: mean, name_q1: ..., name_q4: ...} of accuracies at timesteps(T)."""
    quarters = np.reshape(curve, (4, -1)).mean(1).tolist()
    named = {f"{name}_q{i}": value for i, value in enumerate(quarters, 1)}
    return {name: float(np.mean(curve)), **named}


def save_curves(path, curves, T, chance):
    """Draw {name: accuracies} over t into the PNG `path`, with the accuracy of guessing."""
    lines = {name: (timesteps(T), curve) for name, curve in curves.items()}
    lines["chance"] = ([0, T - 1], [chance, chance])
    plot_lines(path, {"accuracy": lines}, xlabel=f"t, of T = {T}")


def schedules(cfg, make_alpha_bar):
    """{name: alpha_bar float64 (T,)} of all schedules, for the T and alpha_min of the settings.

    With --beta-start or --beta-end also of those two that they are for, beside the defaults.
    """
    T, least = cfg.timesteps, cfg.alpha_min
    names = ("linear", "cosine", "sigmoid", "sigmoid-beta")
    tables = {name: make_alpha_bar(name, T, least) for name in names}
    if cfg.beta_start or cfg.beta_end:
        ends = cfg.beta_start or 0.1 / T, cfg.beta_end or 20 / T
        told = "beta {:.3g} to {:.3g}".format(*ends)
        for name in ("linear", "sigmoid-beta"):
            tables[f"{name}, {told}"] = make_alpha_bar(name, T, least, *ends)
    return tables


def panels_of(tables):
    """Panels of plot_lines over t / T: beta_t, alpha_bar_t and log SNR of {name: alpha_bar (T,)}.

    log SNR is log alpha_bar / (1 - alpha_bar); what is infinite is left out.
    """
    panels = {"beta": {}, "alpha_bar": {}, "log SNR": {}}
    for name, a in tables.items():
        part, before = torch.arange(1, len(a) + 1) / len(a), torch.cat([a.new_ones(1), a[:-1]])
        panels["beta"][name] = part, 1 - a / before
        panels["alpha_bar"][name] = part, a
        panels["log SNR"][name] = part[a > 0], a[a > 0].log() - torch.log1p(-a[a > 0])
    return panels


def noised(x0, tables, q_sample):
    """{"10 %": uint8 (K,H,W,C)}: an image x0 (1,C,H,W) at PARTS of T under each of K schedules.

    The noise is the same everywhere; at 0 % it is the image itself.
    """
    eps, columns = gaussian(x0.shape, torch.tensor([0]), 0, x0.device), {}
    for part in PARTS:
        rows = []
        for alpha_bar in tables.values():
            t = round(part * len(alpha_bar)) - 1
            rows.append(x0 if t < 0 else q_sample(x0, torch.tensor([t]), eps, alpha_bar))
        columns[f"{100 * part:.0f} %"] = to_uint8(torch.cat(rows)).numpy()
    return columns


def first_image(cfg):
    """The first of the training images that the settings name, (1,C,H,W) in [-1, 1].

    What is drawn here is not prepared for it.
    """
    if cfg.data == "glyphs" and not (cfg.size or cfg.classes):
        return Dataset.floats(torch.from_numpy(glyphs.draw("train", [0])))
    return datasets.of(cfg).batch(np.arange(1))[0]


def rows_of(tables):
    """[{"schedule", "share", "t", "beta", "alpha_bar", "log SNR"}] at PARTS of T, but for 0."""
    found = []
    for name, alpha_bar in tables.items():
        curves = {title: lines[name][1] for title, lines in panels_of({name: alpha_bar}).items()}
        for part in PARTS[1:]:
            t = max(round(part * len(alpha_bar)) - 1, 0)
            told = {title: float(ys[t]) for title, ys in curves.items() if t < len(ys)}
            found.append({"schedule": name, "share": part, "t": t} | told)
    return found


def save_schedules(cfg, make_alpha_bar, q_sample):
    """schedules.png: curves of all schedules, some of their values in .md and .json;
    schedules-noised.png: an image under each of them.

    The image is the first of --data. In --out, or runs; where settings are not the defaults, they
    are in the names of the files. make_alpha_bar and q_sample are ddpm_pixel's.
    """
    x0, tables = first_image(cfg), schedules(cfg, make_alpha_bar)
    folder = Path(cfg.out or "runs")
    chain = _changed(cfg, "timesteps alpha_min beta_start beta_end")
    curves = folder / f"schedules{suffix_of(chain)}.png"
    image = suffix_of(chain | _changed(cfg, "data size classes"))
    pictures = folder / f"schedules-noised{image}.png"
    xlabel = f"t / T, T = {cfg.timesteps}"
    plot_lines(curves, panels_of(tables), xlabel=xlabel, logy=("beta",), xticks=QUARTERS)
    note = f"the first image of {Path(cfg.data).name}; columns: t / T, T = {cfg.timesteps}"
    save_strip(pictures, noised(x0, tables, q_sample), list(tables), note)
    rows, titles = rows_of(tables), ("beta", "alpha_bar", "log SNR")
    cells = [
        [row["schedule"], f"{100 * row['share']:.0f} %", str(row["t"])]
        + [f"{row[title]:.4g}" if title in row else "-" for title in titles]
        for row in rows
    ]
    lines = [f"# Schedules, T = {cfg.timesteps}", ""]
    lines += markdown(["schedule", "t / T", "t", *titles], cells)
    save_text(curves.with_suffix(".md"), lines)
    save_json(curves.with_suffix(".json"), {"timesteps": cfg.timesteps, "schedules": rows})
    print(f"schedules: {curves}, with .md and .json; an image under each: {pictures}")


def _changed(cfg, names):
    """{name: value} of those settings that are not the defaults."""
    found = {name: getattr(cfg, name) for name in names.split()}
    return {name: value for name, value in found.items() if value != getattr(type(cfg), name)}
