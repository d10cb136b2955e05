"""Curves over t: how well a classifier reads noisy images, and what schedules leave of an image."""

from runtime.finite import WEIGHTS, NotFinite
from runtime.plots import plot_lines

import math

import numpy as np
import torch

from image_data.batches import spaced
from kernels import gaussian

TIMES = 20  # timesteps of a curve, five in each quarter


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


def save_schedules(path, tables):
    """Draw {name: alpha_bar (T,)} and their log SNR over t / T into the PNG `path`."""
    left, ratio = {}, {}
    for name, a in tables.items():
        part = torch.arange(1, len(a) + 1) / len(a)
        left[name], ratio[name] = (part, a), (part, a.log() - torch.log1p(-a))
    plot_lines(path, {"alpha_bar": left, "log SNR": ratio}, xlabel=f"t / T, T = {len(a)}")
    print(f"schedules: {path}")
