"""Bits per dimension of images under a chain: of a batch, of a data set, nll.json and nll.png.

The terms of the bound are those of a chapter, improved_ddpm.py, which come in as functions.
"""

from runtime.files import atomic_write
from runtime.finite import WEIGHTS, check_finite
from runtime.plots import plot_lines
from runtime.processes import exact

import json
import math
from typing import NamedTuple

import torch

from image_data import datasets
from image_data.batches import spaced
from kernels import gaussian


class Bound(NamedTuple):
    """The bound of B images over a chain of S rows; float64, bits per dimension."""

    prior: torch.Tensor  # L_T (B,)
    terms: torch.Tensor  # (B,S), row 0 the decoder's
    eps_mse: torch.Tensor  # (B,S), mean squared error of eps_hat
    x0_mse: torch.Tensor  # (B,S), of x0_hat

    @property
    def total(self):
        """The bound itself, (B,): IDDPM eq. 4."""
        return self.prior + self.terms.sum(1)


@torch.no_grad()
def bits_per_dim(net, images, y, seeds, chain, terms, guess, prior, tick=None):
    """The Bound of B images under a network: every term of the chain, one draw of x_t for each.

    images  uint8 (B,H,W,C), or float (B,C,H,W) made of levels k / 127.5 - 1
    y       int64 (B,) or None; with labels it is the likelihood of an image given its class
    seeds   int64 (B,), one per image; eps is a function of the seed and the timestep alone, so that
            a term depends neither on the batch nor on which other timesteps are visited
    chain   `timesteps` int64 (S,) and `alpha_bar` float64 (S,) of its rows; a shorter chain is
            cheaper and looser
    terms   function (out, x0, x_t, t) -> bits per dimension (B,) of rows t (B,)
    guess   function (out, x_t, t) -> x0_hat (B,C,H,W), and more
    prior   function (x0, alpha_bar) -> bits per dimension (B,)
    tick    called after each of the chain's rows, to move a progress bar

    All on the network's device, the network in eval mode.
    """
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).double() / 127.5 - 1  # (B,C,H,W)
    x0, columns = images.double(), []
    for row, timestep in enumerate(chain.timesteps.tolist()):
        a, t = chain.alpha_bar[row], torch.full_like(seeds, row)
        eps = gaussian(x0.shape, seeds, timestep, x0.device)
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).float()  # (B,C,H,W), DDPM eq. 4
        out = net(x_t, torch.full_like(seeds, timestep), y)
        x0_hat = guess(out, x_t, t)[0]
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        errors = [(e**2).mean(dim=(1, 2, 3)) for e in (eps_hat - eps, x0_hat - x0)]
        columns.append(torch.stack([terms(out, x0, x_t, t), *errors]))  # (3,B)
        if tick is not None:
            tick()
    return Bound(prior(x0, chain.alpha_bar), *torch.stack(columns, dim=2))


class BoundMean:
    """The mean of Bounds over batches and processes. Its size does not depend on the images."""

    def __init__(self, rows, device):
        self.rows = torch.zeros(3, rows, dtype=torch.float64, device=device)
        # images, prior, total, total squared
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, bound):
        total = bound.total
        self.rows += torch.stack([bound.terms, bound.eps_mse, bound.x0_mse]).sum(1)
        self.sums += torch.stack([torch.ones_like(total), bound.prior, total, total**2]).sum(1)

    def read(self, world):
        """A dictionary of numbers, over all processes, with lists of S for what has rows.

        The standard error is that of the mean over images, nan for a single one.
        """
        images, prior, total, squares = world.sum(self.sums.clone()).tolist()
        terms, eps_mse, x0_mse = (world.sum(self.rows.clone()) / images).tolist()
        mean = total / images
        variance = max(squares / images - mean**2, 0.0) / (images - 1) if images > 1 else math.nan
        return {
            "bits_per_dim": mean,
            "standard_error": math.sqrt(variance),
            "prior": prior / images,
            "images": int(images),
            "terms": terms,
            "eps_mse": eps_mse,
            "x0_mse": x0_mse,
        }


@exact()
def evaluate(bound_of, ds, timesteps, world, folder, *, n, batch_size, labels, about="", T=None):
    """Bits per dimension of n images of the Dataset `ds`, evenly spaced in it (or all).

    bound_of(images, y, seeds, tick=...) gives the Bound of uint8 images (B,H,W,C), labels (B,) or
    None, and seeds (B,), and calls tick() after each of the chain's timesteps. An image's seed is
    its number in the data set. labels: whether the network sees the class. batch_size: over all
    processes. about: a word on how, for nll.json and the printed line. T: the length of the whole
    chain, if not that of timesteps.

    Prints the mean, leaves nll.json and nll.png in `folder` (a Path), and returns what BoundMean
    reads, on every rank. The network runs in float32, without autocast. NotFinite, with its number,
    for an image whose bound is not finite.
    """
    numbers = spaced(len(ds), n)
    mine = numbers[world.share(len(numbers))]
    each = max(1, batch_size // world.size)
    mean = BoundMean(len(timesteps), world.device)
    batches = [mine[i : i + each] for i in range(0, len(mine), each)]
    with world.progress(len(batches) * len(timesteps), desc="bits/dim") as bar, world.as_one():
        for batch in batches:
            images = torch.from_numpy(ds.images[batch]).to(world.device)  # uint8 (B,H,W,C)
            y = torch.from_numpy(ds.labels[batch]).to(world.device) if labels else None
            seeds = torch.from_numpy(batch).to(world.device)
            bound = bound_of(images, y, seeds, tick=bar.update)
            check_finite(bound.total[:, None], batch, "the bound of image", WEIGHTS)
            mean.add(bound)
    values = mean.read(world)
    if world.is_main:
        with atomic_write(folder / "nll.json") as temporary:
            facts = {"timesteps": timesteps, "T": T or len(timesteps), "data": ds.name}
            temporary.write_text(json.dumps({**values, **facts, "about": about}))
        plot_terms(folder / "nll.png", values["terms"], timesteps)
        print(
            f"{ds.name}: {values['bits_per_dim']:.4f} bits/dim, standard error "
            f"{values['standard_error']:.4f} over {values['images']} images; {len(timesteps)} "
            f"terms, {about}: {folder / 'nll.json'}, {folder / 'nll.png'}"
        )
    return values


def evaluate_held_out(bound_of, chain, trained, shape, names, world, folder, *, n, about=""):
    """evaluate() on the test split of the data that the settings `trained` name.

    shape (C,H,W) and class names: the network's. Raises BadInput for images of another shape.
    """
    options = {"size": trained.size, "classes": trained.classes}
    ds, known = datasets.held_out(trained.data, trained.data_root, shape, names, **options)
    labels, timesteps = known and trained.class_cond, chain.timesteps.tolist()
    options = {"n": n, "batch_size": trained.batch_size, "labels": labels, "about": about}
    return evaluate(bound_of, ds, timesteps, world, folder, T=trained.timesteps, **options)


def plot_terms(path, terms, timesteps):
    """Draw the terms (S,) in bits per dimension over the steps timesteps + 1 (IDDPM figure 2)."""
    ylabel, steps = "term, bits/dim", [t + 1 for t in timesteps]
    title = f"{sum(terms):.3f} bits/dim in {len(terms)} terms"
    plot_lines(
        path,
        {ylabel: {"": (steps, terms)}},
        xlabel="diffusion step t + 1",
        title=title,
        logx=True,
        logy=(ylabel,),
    )
