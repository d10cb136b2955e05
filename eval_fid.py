"""Numbers people can trust: how far are samples from real images, and are they what was asked for?

Two sets of images are compared by the distributions of their features under one fixed network. Each
set is summarised by the mean m and covariance C of its features, and two Gaussians with these
moments lie apart by the Fréchet distance (Heusel et al. 2017, eq. 6; Dowson and Landau 1982)

    d²((m, C), (m_w, C_w)) = ‖m − m_w‖² + tr(C + C_w − 2 (C C_w)^½).

The features come from a small classifier trained here, once, on the data set itself (a network made
for photographs of objects has little to say about gray digits). The same classifier tells how many
samples it reads as the class they were asked for. Such a figure can be compared only with figures
of the same features, the same N and the same reference, so all three are printed with it.

    python eval_fid.py runs/ldm-glyphs/samples.npz glyphs:test     # a minute at first, then seconds
    python eval_fid.py mnist:train mnist:test --n 10000      # real against real: 0.03, the floor
    python eval_fid.py stats glyphs:test --out glyphs.npz    # keep the statistics of a reference

A and B are each a data set (NAME, NAME:train or NAME:test), a folder or zip of images, an .npz of
images (arr_0: uint8 N,H,W,C; arr_1: labels, if any), or an .npz of statistics (mu, sigma).
The last line printed is one JSON object that holds the same.
"""

import itertools
import json
import shlex
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import scipy.linalg
import torch
import tyro

import data
import runtime
from features import accuracy, classifier, features, shape_text, warn
from runtime import BadInput


@dataclass
class Config:
    a: Annotated[str, tyro.conf.Positional]
    """generated images; or the word `stats`, to write the statistics of B to --out"""
    b: Annotated[str, tyro.conf.Positional]
    """reference images; of a data set the test split, unless its name ends in :train"""
    data: str = ""  # labelled data set that the classifier is trained on; empty: B
    data_root: str = "data"  # where data sets and trained classifiers are kept
    size: int = 0  # resize data sets and folders as in training; 0 keeps their size
    classes: str = ""  # comma-separated: keep these classes of the data sets, as in training
    n: int = 0  # images of each side, drawn without replacement; 0: all
    seed: int = 0  # of the classifier's training, and of the draw of --n images
    classifier_steps: int = 1500  # its training steps, of 128 images each
    batch_size: int = 256  # images at a time when features are computed
    gpus: int = runtime.default_gpus()  # 1: compute on the GPU, 0: on the CPU
    out: str = ""  # the .npz that `stats` writes
    json: str = ""  # also write the JSON object into this file


# -------------------------------------------------------------- statistics and the Fréchet distance


class Moments:
    """Count, mean and scatter matrix Σ (f − m)(f − m)ᵀ of rows that arrive in parts, in float64.

    Parts are joined exactly (Chan, Golub and LeVeque 1979), so their sizes and order do not matter.
    """

    def __init__(self, dim):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, rows):
        """Add rows (N, dim), N ≥ 1."""
        part = Moments(len(self.mean))
        rows = np.asarray(rows, np.float64)
        part.n, part.mean = len(rows), rows.mean(0)
        part.scatter = (rows - part.mean).T @ (rows - part.mean)
        self.merge(part)

    def merge(self, other):
        """Add what another Moments has seen."""
        share, delta = other.n / max(1, self.n + other.n), other.mean - self.mean
        self.scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * share)
        self.mean = self.mean + delta * share
        self.n += other.n

    def mu_sigma(self):
        """The mean (dim,) and the unbiased covariance (dim, dim), divided by n − 1."""
        if self.n < 2:
            raise BadInput(f"a covariance needs at least 2 images, got {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def statistics(feats, chunk=4096):
    """mu (d,) and sigma (d, d), float64, of features (N, d). Raises BadInput when N < 2."""
    moments = Moments(feats.shape[1])
    for start in range(0, len(feats), chunk):
        moments.update(feats[start : start + chunk])
    return moments.mu_sigma()


def sqrt_covariance(sigma):
    """The symmetric square root of a positive semi-definite matrix (d, d), singular ones too.

    scipy's sqrtm may leave a small imaginary part where an eigenvalue was rounded below zero, and
    may fail at exactly zero; a large one means that `sigma` is no covariance: BadInput.
    """
    sigma = (sigma + sigma.T) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular matrices are expected, and checked below
        root = scipy.linalg.sqrtm(sigma)
        if not np.isfinite(root).all():
            tiny = 1e-14 * np.trace(sigma) / len(sigma)
            root = scipy.linalg.sqrtm(sigma + tiny * np.eye(len(sigma)))
    if not np.isfinite(root).all() or abs(root.imag).max() > 1e-3 * abs(root.real).max():
        raise BadInput("sigma has no real square root: it is not the covariance of any features")
    return (root.real + root.real.T) / 2


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The d² of Heusel et al. 2017, eq. 6, in float64; 0 for equal statistics.

    mu (d,), sigma (d, d). tr (C C_w)^½ is taken as tr (C^½ C_w C^½)^½: the same eigenvalues, but of
    a symmetric matrix, whose root is real also where C or C_w is singular. Raises BadInput for
    shapes that differ, values that are not finite, and matrices that are no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v, np.float64) for v in (mu1, sigma1, mu2, sigma2))
    shapes = [v.shape for v in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(mu1.size,), (mu1.size, mu1.size)] * 2:
        raise BadInput(f"mu and sigma must be (d,) and (d, d) on both sides, got {shapes}")
    if not all(np.isfinite(v).all() for v in (mu1, sigma1, mu2, sigma2)):
        raise BadInput("mu and sigma must be finite numbers")
    root1 = sqrt_covariance(sigma1)
    cross = sqrt_covariance(root1 @ sigma2 @ root1)
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(cross)
    return max(0.0, float(distance))  # rounding can leave -1e-12 where the truth is 0


# --------------------------------------------------------------------------- what A and B may be


@dataclass
class Images:
    """Images uint8 (N, H, W, C) read from `name`; labels (N,) and class names, or None."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


@dataclass
class Statistics:
    """What the distance needs of a set: mu (d,), sigma (d, d), of n images; accuracy in 0..1."""

    name: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    protocol: str | None = None
    feature_hash: str | None = None
    accuracy: float | None = None


def split_name(name):
    """'mnist:train' -> ('mnist', 'train'); the test split where none is named."""
    source, _, split = name.rpartition(":")
    return (source, split) if split in ("train", "test") and source else (name, "test")


def load(name, split, cfg):
    classes = runtime.split_list(cfg.classes)
    return data.load(name, cfg.data_root, split=split, size=cfg.size or None, classes=classes)


def read(name, cfg):
    """Images or Statistics from a data set, a folder, a zip or an .npz file; BadInput if none."""
    if not name.endswith(".npz"):
        source, split = split_name(name)
        ds = load(source, split, cfg)
        found = Images(name, ds.images, *((ds.labels, ds.class_names) if ds.class_names else ()))
    else:
        found = read_npz(name)
    if cfg.n and isinstance(found, Images):
        if cfg.n > len(found.images):
            raise BadInput(f"--n {cfg.n}: {name} has only {len(found.images)} images")
        drawn = np.random.default_rng(cfg.seed).permutation(len(found.images))[: cfg.n]
        found.images = found.images[np.sort(drawn)]  # read in the order of the file
        found.labels = None if found.labels is None else found.labels[np.sort(drawn)]
    return found


def read_npz(name):
    """Images (arr_0, arr_1) or Statistics (mu, sigma) from an .npz file; BadInput if neither."""
    try:
        with np.load(name, allow_pickle=False) as archive:
            arrays = dict(archive)
        meta = {k: arrays[k].item() for k in ("n", "protocol", "feature_hash") if k in arrays}
    except FileNotFoundError:
        raise BadInput(f"{name}: no such file") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise BadInput(f"{name} is not a readable .npz file ({error})") from None
    if "mu" in arrays and "sigma" in arrays:
        return Statistics(name, arrays["mu"], arrays["sigma"], **meta)
    images, labels = arrays.get("arr_0", np.empty(0)), arrays.get("arr_1")
    good = images.dtype == np.uint8 and images.ndim == 4 and len(images)
    if labels is not None:
        good = good and labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not good:
        held = ", ".join(f"{key} {v.dtype} {v.shape}" for key, v in arrays.items()) or "nothing"
        wanted = "expected arr_0 uint8 (N, H, W, C), arr_1 integers (N,) if any; or mu and sigma"
        raise BadInput(f"{name} holds {held}; {wanted}")
    return Images(name, images, labels)


def check_same_size(sides):
    """Raise BadInput where two sides hold images of different (H, W, C): none is resized here."""
    for side, other in itertools.pairwise(sides):
        if side.images.shape[1:] != other.images.shape[1:]:
            first, second = (f"{s.name} has {shape_text(s.images)}" for s in (side, other))
            raise BadInput(f"{first}, {second} (HxWxC); make them alike: --size resizes data sets")


def asked_labels(side, class_names):
    """The labels (N,) of `side`; None where it has none, or names other classes."""
    labels, last = side.labels, len(class_names) - 1
    if labels is None or last < 1 or side.class_names not in (None, class_names):
        return None
    if labels.min() < 0 or labels.max() > last:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise BadInput(f"{side.name} has {found}; the classifier knows classes 0 to {last}")
    return labels


def summarise(side, net, facts, batch_size):
    """Images -> Statistics, and the accuracy where they have labels; Statistics stay."""
    if isinstance(side, Statistics):
        return side
    feats = features(net, side.images, batch_size)
    found = None if side.labels is None else accuracy(net, feats, side.labels)
    origin = (len(feats), facts["protocol"], facts["feature_hash"])
    return Statistics(side.name, *statistics(feats), *origin, found)


def measure(cfg, names):
    """Read and summarise each of `names`, the reference last: ([Statistics], classifier's facts).

    The classifier is loaded or trained only if some side is images. Raises BadInput where sizes
    differ or nothing labelled is there to train on.
    """
    sides = [read(name, cfg) for name in names]
    pictures = [side for side in sides if isinstance(side, Images)]
    if not pictures:
        return sides, {}
    source = cfg.data or split_name(names[-1])[0]
    if source.endswith(".npz"):
        why = "is no data set to train the feature classifier on"
        raise BadInput(f"{source} {why}; name a labelled data set of such images with --data")
    train, test = (load(source, split, cfg) for split in ("train", "test"))
    check_same_size([*pictures, Images(source, train.images), Images(source, test.images)])
    for side in pictures:
        side.labels = asked_labels(side, train.class_names)
    net, facts = classifier(
        train, test, cfg.data_root, cfg.seed,
        steps=cfg.classifier_steps, device="cuda" if cfg.gpus else "cpu",
    )  # fmt: skip
    return [summarise(side, net, facts, cfg.batch_size) for side in sides], facts


class Judge:
    """Scores sets of samples against the test split of a data set, many in one process.

    name: a labelled data set, folder or zip; root: where it and its classifier are kept. shape
    (C,H,W) and class_names (in the order of its labels): of the network that makes the samples;
    size and classes: as it was trained; steps: of the classifier. `protocol` is one line for
    people, `reference` and `n_reference` say what is compared with.
    Raises BadInput for data without classes, or of another shape.
    """

    def __init__(
        self, name, root, *, shape, class_names=(), size=0, classes="", device="cpu",
        batch_size=256, steps=1500,
    ):  # fmt: skip
        def load(split, chosen=()):
            return data.load(name, root, split=split, size=size or None, classes=chosen)

        held_out, _ = data.held_out(name, root, shape, (), size=size, classes=classes)
        train = load("train")
        if train.num_classes < 2:
            why = "has no classes to train the network on whose features are compared"
            raise BadInput(f"{train.name} {why}; leave out --metric-every, or name labelled --data")
        # Of all classes, also where samples are of a single one: it could tell nothing apart.
        self.net, facts = classifier(train, load("test"), root, steps=steps, device=device)
        self.protocol, self.batch_size = facts["protocol"], batch_size
        known = [n for n in class_names if n in train.class_names]
        self.classes = np.array([train.class_names.index(n) for n in known], np.int64)
        self.labelled = len(known) == len(class_names) > 0
        self.reference, self.n_reference = f"{name}:test", len(held_out)
        self.moments = statistics(features(self.net, held_out.images, batch_size))

    def __call__(self, images, labels=None, world=None):
        """{'frechet', 'class_accuracy'} of uint8 images (N, H, W, C) asked for by labels (N,).

        With a World of several processes, each of them holds all images and looks at its share.
        The accuracy (0..1) is None without labels, or where they are of other classes. Raises
        BadInput when N < 2.
        """
        world = world or runtime.World()
        feats = features(self.net, images[world.share(len(images))], self.batch_size)
        feats = world.collect(torch.from_numpy(feats).to(world.device), len(images)).cpu().numpy()
        right = None
        if labels is not None and self.labelled:
            right = accuracy(self.net, feats, self.classes[np.asarray(labels)])
        return {
            "frechet": frechet_distance(*statistics(feats), *self.moments),
            "class_accuracy": right,
        }


# -------------------------------------------------------------------------------------------- main


def warn_of(side):
    """A line on stderr for what makes the figure of this side misleading."""
    least = 2048 if side.n and side.n < 2048 else 10_000
    if side.n and side.n < least:
        why = "the Fréchet distance is biased upward with few samples"
        warn(f"{side.name} has N = {side.n:,} images, fewer than {least:,}: {why}")
    if side.n and side.n <= len(side.mu):
        warn(f"{side.name}: N = {side.n} does not exceed the {len(side.mu)} features")
    if side.feature_hash is None:
        warn(f"{side.name} does not say which features it was made with")


def compare(cfg):
    """Fréchet distance of A to B and class accuracy of A, as the dictionary that becomes JSON."""
    (a, b), facts = measure(cfg, [cfg.a, cfg.b])
    if a.feature_hash and b.feature_hash and a.feature_hash != b.feature_hash:
        why = f"are of different features ({a.feature_hash}, {b.feature_hash}); make both with"
        raise BadInput(f"{cfg.a} and {cfg.b} {why} the same --data, --seed and --classifier-steps")
    result = dict(
        frechet=frechet_distance(a.mu, a.sigma, b.mu, b.sigma),
        class_accuracy=a.accuracy,
        n_generated=a.n,
        n_reference=b.n,
        features=a.protocol or b.protocol,
        feature_hash=a.feature_hash or b.feature_hash,
        classifier_test_accuracy=facts.get("test_accuracy"),
        a=cfg.a, b=cfg.b, seed=cfg.seed,
    )  # fmt: skip
    warn_of(a)
    warn_of(b)
    percent = "-" if a.accuracy is None else f"{100 * a.accuracy:.2f} %"
    print(f"Fréchet distance   {result['frechet']:.4f}")
    print(f"class accuracy     {percent}")
    print(f"generated  A       {a.name}, N = {a.n or '-'}")
    print(f"reference  B       {b.name}, N = {b.n or '-'}")
    print(f"features           {result['features'] or '-'}")
    return result


def save_statistics(cfg):
    """Write mu, sigma and what they are of to cfg.out; the dictionary that becomes JSON."""
    (b,), found = measure(cfg, [cfg.b])
    if not found:
        raise BadInput(f"{cfg.b} already holds statistics; expected images")
    warn_of(b)
    facts = dict(n=b.n, protocol=b.protocol, feature_hash=b.feature_hash)
    with runtime.atomic_write(cfg.out) as temporary:
        np.savez(temporary, mu=b.mu, sigma=b.sigma, **facts)
    print(f"statistics of      {b.name}, N = {b.n}, in {cfg.out}\nfeatures           {b.protocol}")
    return {"out": cfg.out, "b": cfg.b, "seed": cfg.seed, **facts}


def main():
    cfg = runtime.parse(Config, __doc__)
    runtime.check_positive(cfg, "batch_size", "classifier_steps")
    runtime.check_processes(cfg.gpus, cfg.batch_size)
    if cfg.n < 0:
        raise BadInput(f"--n must be 0 (all images) or a number of images, got {cfg.n}")
    if cfg.out[-4:] != (".npz" if cfg.a == "stats" else ""):
        raise BadInput("only `stats` takes --out, and needs it: eval_fid.py stats B --out F.npz")
    result = save_statistics(cfg) if cfg.a == "stats" else compare(cfg)
    print(f"command            {shlex.join(['python', *sys.argv])}, seed {cfg.seed}")
    line = json.dumps(result)
    if cfg.json:
        with runtime.atomic_write(cfg.json) as temporary:
            temporary.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    runtime.entry(main)
