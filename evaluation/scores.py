"""Two sets of images and a feature extractor in, all figures out: `scores`, `evaluate`, `Judge`.

The figures are those of `metrics.py`. This chapter says what each of them needs, computes features
once on one process or several, keeps those of data sets, and never holds all images in memory.

    found = evaluate(samples, held_out, extractor, metrics=("frechet", "kid"))    from Python
    judge = Judge("mnist", root, shape=(1, 28, 28)); judge(samples, labels)       within training
    python eval_fid.py A B                                                        by command
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.processes import World

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evaluation import metrics
from evaluation.features import classifier_of, extract, share_right, warn
from evaluation.image_sets import Images, Statistics, as_images, check_same_size
from evaluation.memorisation import Pixels, memorisation
from evaluation.memory_figure import save_pairs
from evaluation.metrics import frechet_distance, statistics
from image_data import datasets

METRICS = ("frechet", "is", "kid", "prdc", "classes", "memorisation")
ENOUGH = 100  # images, for an interval of the distance: five in each group


# ------------------------------------------------------------------------------------ a side


@dataclass
class Side:
    """What is known of A or B: features (N, d), logits (N, K), labels; and (mu, sigma), or None."""

    source: Images | Statistics
    feats: np.ndarray | None = None
    logits: np.ndarray | None = None
    known: Statistics | None = None

    name = property(lambda self: self.source.name)
    labels = property(lambda self: getattr(self.source, "labels", None))
    n = property(lambda self: self.known.n if self.known else len(self.feats))

    def moments(self):
        """mu (d,) and sigma (d, d)."""
        if self.known is None:
            self.known = Statistics(self.name, *statistics(self.feats), n=len(self.feats))
        return self.known.mu, self.known.sigma


def scratch(folder, shape, dtype):
    """An array in a file without a name: gone with the process, however that ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the map keeps it open)
    return np.memmap(file, dtype, "w+", shape=shape)


def look(
    source, extractor, *, batch_size=256, world=None, store=np.empty, keep="", reference=False
):
    """A Side of Images or Statistics. The features of a data set are kept in the folder `keep`.

    A reference whose file tells the moments of the whole set that its images are of has these.
    """
    world = world or World()
    if isinstance(source, Statistics):
        return Side(source, known=source)
    name = f"features-{source.key}-{getattr(extractor, 'feature_hash', None)}.npy"
    path = Path(keep) / name if keep and source.key and "None" not in name else None
    # Every process takes the same way, whatever appears in the folder meanwhile.
    if path and world.sum(torch.tensor(int(path.is_file()), device=world.device)) == world.size:
        try:
            feats = np.load(path, mmap_mode="r")
            if feats.shape == (len(source.images), extractor.dim):
                return Side(source, feats)
        except (OSError, EOFError, ValueError):
            warn(f"{path} is damaged; its features are computed again")
    feats, logits = extract(
        extractor, source.images, batch_size, world, store=store, name=source.name
    )
    if path and world.is_main:
        with atomic_write(path) as temporary:
            np.save(temporary, feats)
    told = source.statistics if reference else None
    return Side(source, feats, logits, told if told and len(told.mu) == feats.shape[1] else None)


# ------------------------------------------------------------------------- what is asked of two


@dataclass
class Asked:
    """How the metrics of `scores` are computed; train: what samples may be copies of."""

    metrics: tuple[str, ...] = METRICS[:4]
    method: str = "eigen"
    seed: int = 0
    device: str | torch.device = "cpu"
    class_names: tuple[str, ...] = ()
    train: Images | None = None
    figure: str = ""  # of the closest pairs


def frechet(a, b, asked):
    """The distance; of images A also how sure it is, and what it would be with endless images."""
    reference = b.moments()
    found = {"frechet": frechet_distance(*a.moments(), *reference, method=asked.method)}
    if a.feats is not None and len(a.feats) < max(ENOUGH, 2 * a.feats.shape[1] + 1):
        few = f"{a.name} has N = {len(a.feats)}, of {a.feats.shape[1]} features"
        warn(f"no interval of the Fréchet distance: {few}; it wants more than twice as many images")
    elif a.feats is not None:
        sure = metrics.frechet_interval(a.feats, *reference, seed=asked.seed)
        found |= {
            "frechet_error": sure["standard_error"],
            "frechet_interval": sure["interval"],
            "frechet_infinity": sure["frechet_infinity"],
        }
    return found


def inception_score(a, b, asked):
    """In ten parts, drawn by asked.seed: images may be sorted by class."""
    order = np.random.default_rng(asked.seed).permutation(len(a.logits))
    mean, std = metrics.inception_score(a.logits[order])
    return {"inception_score": mean, "inception_score_std": std}


def kernel_distance(a, b, asked):
    mean, error = metrics.kernel_distance(a.feats, b.feats, seed=asked.seed)
    return {"kid": mean, "kid_error": error}


def manifold(a, b, asked):
    return metrics.manifold(b.feats, a.feats, device=asked.device)


def per_class(a, b, asked):
    """Fréchet distances within each class, by its name, and their mean."""
    names = asked.class_names
    each, mean = metrics.intra_class(a.feats, a.labels, b.feats, b.labels, len(names))
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


# Of each metric: what computes it, and what it needs besides the features of A.
NEEDS = {
    "frechet": (frechet, ()),
    "is": (inception_score, ("logits",)),
    "kid": (kernel_distance, ("reference",)),
    "prdc": (manifold, ("reference",)),
    "classes": (per_class, ("reference", "labels")),
    "memorisation": (copies, ("reference", "train")),
}
WORDS = {
    "logits": "logits",
    "reference": "images on both sides",
    "labels": "labels of the same classes on both sides",
    "train": "training images that are not the reference",
}


def scores(a, b, asked):
    """All that `asked.metrics` name of the Sides a (generated) and b (reference), as a dictionary.

    A metric that these sides do not allow is left out with a warning; the distance never is.
    """
    have = {
        "logits": a.logits is not None,
        "reference": a.feats is not None and b.feats is not None,
        "labels": a.labels is not None and b.labels is not None and len(asked.class_names) > 1,
        "train": asked.train is not None,
    }
    found = {}
    for name in asked.metrics:
        compute, needs = NEEDS[name]
        missing = [WORDS[what] for what in needs if not have[what]]
        try:
            if missing:
                raise BadInput(f"there are no {' and no '.join(missing)}")
            found |= compute(a, b, asked)
        except BadInput as error:
            if name == "frechet":
                raise
            warn(f"{name} is left out: {error}")
    return found


def evaluate(generated, reference, extractor, *, batch_size=256, world=None, train=None, **asked):
    """All figures of two sets of images, as a dictionary.

    generated, reference   arrays uint8 (N, H, W, C), `Images` (with labels), or `Statistics`
    extractor              any callable: see `features.py`; a plain function from a uint8 tensor
                           (B, H, W, C) to features (B, d), or features and logits, will do
    train                  the images that the generator was trained on, for "memorisation"
    asked                  fields of `Asked`, such as metrics=("frechet", "kid")

    Raises BadInput for images of another form, for fewer than two, and for statistics of other
    features.
    """
    held = zip((generated, reference), ("generated", "reference"), strict=True)
    sources = [as_images(source, name) for source, name in held]
    check_same_size([source for source in sources if isinstance(source, Images)])
    see = partial(look, extractor=extractor, batch_size=batch_size, world=world)
    a, b = see(sources[0]), see(sources[1], reference=True)
    check_same_features(a, b, extractor)
    asked = Asked(train=None if train is None else as_images(train, "train"), **asked)
    return scores(a, b, asked) | {"n_generated": a.n, "n_reference": b.n}


def check_same_features(a, b, extractor=None):
    """Raise BadInput where the statistics of a side are known to be of other features."""
    ours = getattr(extractor, "feature_hash", None)
    hashes = [side.known.feature_hash if side.known else ours for side in (a, b)]
    hashes = [found for found in [*hashes, ours] if found]
    if len(set(hashes)) > 1:
        why = f"are of different features ({', '.join(sorted(set(hashes)))}); make both with"
        raise BadInput(f"{a.name} and {b.name} {why} the same --features and their settings")


# --------------------------------------------------------------------------- within training


class Judge:
    """Scores sets of samples against the test split of a data set, many in one process.

    name: a labelled data set, folder or zip; root: where it and its classifier are kept. shape
    (C,H,W) and class_names (in the order of its labels): of the network that makes the samples;
    size and classes: as it was trained; steps: of the classifier. `protocol` is one line for
    people, `reference` and `n_reference` say what is compared with.
    Raises BadInput for data without classes, or of another shape.
    """

    def __init__(
        self,
        name,
        root,
        *,
        shape,
        class_names=(),
        size=0,
        classes="",
        device="cpu",
        batch_size=256,
        steps=1500,
    ):
        held_out, _ = datasets.held_out(name, root, shape, (), size=size, classes=classes)
        self.extractor, train = classifier_of(name, root, size=size, steps=steps, device=device)
        self.protocol, self.batch_size = self.extractor.protocol, batch_size
        known = [n for n in class_names if n in train.class_names]
        self.classes = np.array([train.class_names.index(n) for n in known], np.int64)
        self.labelled = len(known) == len(class_names) > 0
        self.reference, self.n_reference = f"{name}:test", len(held_out)
        feats, _ = extract(self.extractor, held_out.images, batch_size, name=self.reference)
        self.moments = statistics(feats)

    def __call__(self, images, labels=None, world=None):
        """{'frechet', 'class_accuracy'} of uint8 images (N, H, W, C) asked for by labels (N,).

        With a World of several processes, each of them holds all images and looks at its share.
        The accuracy (0..1) is None without labels, or where they are of other classes. Raises
        BadInput when N < 2.
        """
        feats, logits = extract(self.extractor, images, self.batch_size, world, name="samples")
        right = None
        if labels is not None and self.labelled:
            right = share_right(logits, self.classes[np.asarray(labels)])
        return {
            "frechet": frechet_distance(*statistics(feats), *self.moments),
            "class_accuracy": right,
        }
