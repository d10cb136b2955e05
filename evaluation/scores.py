"""What each figure needs of two sides, and all that was asked for as one dictionary: `scores`.

The figures besides FID and IS stand here; those two are eval_fid.py's, which gives them to `scores`
in the same form: a function of two Sides and what is Asked, and the names of what it needs.
"""

from runtime.commandline import BadInput

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.class_distance import intra_class
from evaluation.image_sets import Images
from evaluation.kid import kernel_distance
from evaluation.manifold import manifold
from evaluation.memorisation import Pixels, memorisation
from evaluation.memory_figure import save_pairs
from evaluation.words import warn


@dataclass
class Asked:
    """How the metrics are computed; train: what samples may be copies of."""

    metrics: tuple[str, ...] = ("frechet", "is", "kid", "prdc")
    method: str = "eigen"  # of the Fréchet distance
    distance: Callable | None = None  # of two sets of rows, for the distance within classes
    seed: int = 0
    device: str | torch.device = "cpu"
    class_names: tuple[str, ...] = ()
    train: Images | None = None
    figure: str = ""  # of the closest pairs
    told: set | None = None  # reasons of warnings that were given: see words.warn


def kid(a, b, asked):
    mean, error = kernel_distance(a.feats, b.feats, seed=asked.seed)
    return {"kid": mean, "kid_error": error}


def prdc(a, b, asked):
    return manifold(b.feats, a.feats, device=asked.device)


def per_class(a, b, asked):
    """Distances within each class, by its name, and their mean."""
    names = asked.class_names
    each, mean = intra_class(a.feats, a.labels, b.feats, b.labels, len(names), asked.distance)
    each = {name: float(d) for name, d in zip(names, each, strict=True) if np.isfinite(d)}
    return {"class_frechet": mean, "class_frechet_each": each}


def copies(a, b, asked):
    """Are samples copies of training images? Draws the closest pairs."""
    rows = [Pixels(source.images) for source in (a.source, asked.train, b.source)]
    found = memorisation(*rows, device=asked.device)
    if asked.figure:
        save_pairs(
            asked.figure,
            a.source.images,
            asked.train.images,
            found["ratio"],
            found["index"],
            found["held_out"],
            unit="distance to the nearest / second nearest",
        )
    return {f"memorisation_{key}": v for key, v in found.items() if np.isscalar(v)}


# Of each figure here: what computes it, and what it needs besides the features of A.
FURTHER = {
    "kid": (kid, ("reference",)),
    "prdc": (prdc, ("reference",)),
    "classes": (per_class, ("reference", "labels")),
    "memorisation": (copies, ("reference", "train")),
}
WORDS = {
    "logits": "logits",
    "reference": "images on both sides",
    "labels": "labels of the same classes on both sides",
    "train": "training images that are not the reference",
}


def scores(a, b, asked, figures):
    """All that `asked.metrics` name of the Sides a (generated) and b (reference), as a dictionary.

    figures: as FURTHER. One that these sides do not allow is left out with a warning; the distance,
    "frechet", never is.
    """
    have = {
        "logits": a.logits is not None,
        "reference": a.feats is not None and b.feats is not None,
        "labels": a.labels is not None and b.labels is not None and len(asked.class_names) > 1,
        "train": asked.train is not None,
    }
    found = {}
    for name in asked.metrics:
        compute, needs = figures[name]
        missing = [WORDS[what] for what in needs if not have[what]]
        try:
            if missing:
                raise BadInput(f"there are no {' and no '.join(missing)}")
            found |= compute(a, b, asked)
        except BadInput as error:
            if name == "frechet":
                raise
            warn(text := f"{name} is left out: {error}", text, asked.told)
    return found
