"""FID and IS by hand: how far are generated images from real ones, how sure and how varied?

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
2017 (arXiv:1706.08500). Salimans et al., "Improved Techniques for Training GANs", 2016
(arXiv:1606.03498).

A network turns each image into a vector f of d features, so a set of N images is a cloud of points.
A Gaussian stands for the cloud, with mean m and covariance C; m_w and C_w are of the real images.

    m = 1/N Σ f_i,   C = 1/(N - 1) Σ (f_i - m)(f_i - m)ᵀ

FID is the Fréchet distance of the two Gaussians, where the features are Inception's,

    d² = ‖m - m_w‖² + tr(C + C_w - 2 (C C_w)^½)                     Heusel et al. 2017, eq. 6

The inception score is high where the network is sure of each image, p(y|x), and all classes occur
equally often, p(y),

    IS = exp(E_x KL(p(y|x) ‖ p(y)))                                 Salimans et al. 2016, section 4

    python eval_fid.py glyphs:train glyphs:test --n 10000   # 0.023; a minute at first, then 10 s
    python eval_fid.py mnist:train mnist:test --n 10000     # real against real, the floor: 0.027
    python eval_fid.py samples.npz cifar10:train --features inception   # 0.07 s an image: FID

A figure can be compared only with figures of the same features, the same N and the same reference.
So all three are printed with it, with an estimate of its error, and with what `evaluation/` adds:
kernel distance, precision and recall, density and coverage, the share of samples that are read as
the class they were asked for, and whether they are copies. The last line is one JSON object.

    python eval_fid.py runs/pixel-mnist/ckpt.pt --metrics all   # draws 1,000 samples itself
    python eval_fid.py runs/pixel-mnist mnist:test --curve      # of each that --keep-every kept
    python eval_fid.py table runs/a runs/b mnist:train --against mnist:test --n 1000
    python eval_fid.py stats glyphs:test --out glyphs.npz       # keeps m and C of a reference

What A and B may be: evaluation/image_sets.py. Which features: evaluation/choice.py; the network of
Inception: networks/inception.py. From Python: `evaluate`; within training: `Evaluator`.
"""

from runtime import commandline as cli
from runtime.commandline import BadInput
from runtime.processes import World, launch

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
import torch
import tyro

from evaluation import against, table
from evaluation.channels import channels_of, in_channels
from evaluation.choice import of_training
from evaluation.classifier import classifier_of
from evaluation.command import settled
from evaluation.features import extract, share_right
from evaluation.image_sets import Images, Statistics, as_images, check_same_size
from evaluation.intervals import frechet_interval
from evaluation.scores import FURTHER, Asked, scores
from evaluation.sides import channels_text, check_same_features, kept_statistics, look
from evaluation.words import warn, warn_of_few
from image_data import datasets

EPS = np.finfo(np.float64).eps
ENOUGH = 100  # images, for an interval of the distance: five in each of its groups


@dataclass
class Config(cli.Command):
    a: Annotated[str, tyro.conf.Positional] = ""
    """generated images, a checkpoint, or the folder of a run, which means its ckpt.pt; or a word:
    `stats` writes B's statistics to --out, `table` compares all that follow"""
    b: Annotated[str, tyro.conf.Positional] = ""
    """reference images; of a data set its test split, unless the name ends in :train. Empty, where
    A is a checkpoint: the test split of the data it was trained on"""
    more: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # `table`: the second row and on
    against: str = ""
    """`table`: its reference; empty: of the first checkpoint, the test split of its data"""
    names: tuple[str, ...] = ()  # `table`: of its rows, in the order of these
    metrics: str = "frechet,is,kid,prdc"  # of frechet is kid prdc classes memorisation; or all
    features: Literal["auto", "inception", "classifier"] = "auto"
    """whose features are compared; auto: Inception's where all images have three channels and its
    weights are there or can be downloaded, else those of a classifier of the data set"""
    weights: str = ""  # file of Inception's weights; empty: downloaded to --data-root once
    resize: Literal["pytorch-fid", "tf1", "clean"] = "pytorch-fid"  # how images become 299x299
    data: str = ""
    """labelled data set that the classifier learns; empty: B"""
    size: int = 0  # resize data sets and folders as in training; 0 keeps their size
    n: int = 0
    """images of each side, drawn without replacement; 0: all. Of a checkpoint: how many samples
    (0: 1,000), scored against all of B, as the rows of a table are"""
    seed: int = 0  # of the classifier's training, of the draw of --n images, of KID's subsets
    classifier_steps: int = 1500  # its training steps, of 128 images each
    sqrtm: bool = False  # the distance through scipy's sqrtm, slow: a check of the eigenvalue form
    curve: bool = False  # A is a run: score each of its checkpoints; curve.png there, or in --out
    sample_args: str = ""  # flags for sampling a checkpoint: --sample-args="--sampler ddim"
    batch_size: int = 256  # images at a time when features are computed
    layout: Literal["pytorch-fid", "adm"] = "pytorch-fid"  # of the file that `stats` writes
    out: str = ""
    """the .npz that `stats` writes; the folder of a table or curve, and of checkpoints' samples,
    which else lie beside them"""
    json: str = ""  # also write the JSON object into this file


# ----------------------------------------------------------------- the Gaussian of a set of images


def statistics(feats, chunk=4096):
    """m (d,) and C (d, d), float64, of features (N, d). Raises BadInput when N < 2.

    In two passes over `chunk` rows at a time: the features may lie on the disk.
    """
    if len(feats) < 2:
        raise BadInput(f"a covariance needs at least 2 images, got {len(feats)}")
    parts = [slice(start, start + chunk) for start in range(0, len(feats), chunk)]
    m = sum(np.asarray(feats[part], np.float64).sum(0) for part in parts) / len(feats)  # (d,)
    C = np.zeros((len(m), len(m)))  # (d, d)
    for part in parts:
        centred = feats[part] - m  # f_i - m, (chunk, d)
        C += centred.T @ centred
    return m, C / (len(feats) - 1)


class Gaussian(NamedTuple):
    """A mean (d,), a covariance (d, d), and its factor F (d, r): F Fᵀ = C, of rank r."""

    m: np.ndarray
    C: np.ndarray
    factor: np.ndarray


def gaussian(mu, sigma):
    """The Gaussian of these statistics; BadInput where they cannot be of any features.

    F is Cholesky's lower triangle, or where C is singular V Λ^½ from its eigenvalues, without
    those that rounding made of zeros (where float32 kept C: down to -1e-6 of the largest).
    """
    m, C = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if (m.shape, C.shape) != ((m.size,), (m.size, m.size)):
        raise BadInput(f"mu and sigma must be (d,) and (d, d), got {m.shape} and {C.shape}")
    if not (np.isfinite(m).all() and np.isfinite(C).all()):
        raise BadInput("mu and sigma must be finite numbers")
    if abs(C - C.T).max(initial=0) > 1e-5 * abs(C).max(initial=0):
        raise BadInput("sigma is not symmetric: it is not the covariance of any features")
    try:  # what LAPACK reads by columns is C.T: no copies
        return Gaussian(m, C, scipy.linalg.cholesky(C.T, check_finite=False).T)
    except scipy.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(C)  # ascending
    if values[0] < -1e-6 * abs(values[-1]):
        found = f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}"
        raise BadInput(f"sigma has {found}: it is not the covariance of any features")
    keep = values > max(values[0], len(m) * EPS * values[-1])
    return Gaussian(m, C, vectors[:, keep] * np.sqrt(values[keep]))


# ---------------------------------------------------------------------------- the Fréchet distance


def frechet_distance(mu, sigma, mu_w, sigma_w, *, method="eigen"):
    """d² = ‖m - m_w‖² + tr(C + C_w - 2 (C C_w)^½), eq. 6; 0 for equal ones.

    mu (d,) and sigma (d, d) are m and C; in float64. method "sqrtm" takes roots of matrices by
    scipy (see by_sqrtm), "eigen" gives the same figure ten times as fast. Raises BadInput for other
    shapes, values that are not finite, and negative eigenvalues, which no covariance has.
    """
    if method not in ("eigen", "sqrtm"):
        raise ValueError(f'method must be "eigen" or "sqrtm", got {method!r}')
    own, real = gaussian(mu, sigma), gaussian(mu_w, sigma_w)
    return by_sqrtm(own, real) if method == "sqrtm" else by_eigenvalues(own, real)


def by_sqrtm(own, real):
    """d² of two Gaussians, through scipy's square root of a matrix: the reference.

    C C_w is not symmetric, C^½ C_w C^½ is, and both have the same eigenvalues. So their roots have
    the same trace, and the root of a symmetric matrix is the more exact one.
    """
    apart = squared_distance(own, real)
    root = sqrt_covariance(own.C)  # C^½ (d, d)
    cross = sqrt_covariance(root @ real.C @ root)  # (C^½ C_w C^½)^½ (d, d)
    # Rounding can leave -1e-12 where the truth is 0.
    return max(0.0, float(apart + np.trace(own.C + real.C - 2 * cross)))


def by_eigenvalues(own, real, rtol=1e-7):
    """d² of two Gaussians without the root of a matrix, to a relative rtol or much better.

    tr (C C_w)^½ is the sum of the roots of the eigenvalues of C C_w = F Fᵀ F_w F_wᵀ, and these are
    the squared singular values of Fᵀ F_w: so it is the sum of these singular values.
    """
    traces = (np.vdot(side.factor, side.factor) for side in (own, real))  # tr F Fᵀ = ‖F‖²
    apart = squared_distance(own, real) + sum(traces)
    if own.factor.shape == real.factor.shape == own.C.shape:
        # Of full rank, the eigenvalues of Lᵀ C_w L take a quarter of the time of the SVD below.
        product = scipy.linalg.lapack.dsygst(real.C.T, own.factor.T, itype=2, lower=0)[0]
        values = scipy.linalg.eigvalsh(
            product, lower=False, overwrite_a=True, check_finite=False, driver="evd"
        )
        roots = np.sqrt(values.clip(0))
        # Rounding moves a value by about `noise`, twice its root by noise / root.
        noise, distance = EPS * values[-1], apart - 2 * roots.sum()
        if np.linalg.norm(noise / np.sqrt(roots**2 + noise)) <= rtol * distance:
            return float(distance)
    roots = np.linalg.svd(own.factor.T @ real.factor, compute_uv=False)
    return max(0.0, float(apart - 2 * roots.sum()))


def squared_distance(own, real):
    """‖m - m_w‖² of two Gaussians; BadInput where their d differ."""
    if own.m.shape != real.m.shape:
        raise BadInput(f"mu must be (d,) with one d, got {own.m.shape} and {real.m.shape}")
    return ((own.m - real.m) ** 2).sum()


def sqrt_covariance(sigma):
    """The symmetric square root of a positive semi-definite matrix (d, d), by scipy's sqrtm.

    It may leave a small imaginary part where an eigenvalue was rounded below zero, and some
    versions answer an exactly singular matrix with NaN: then again with 1e-14 of its
    mean eigenvalue added to the diagonal.
    """
    sigma = (sigma + sigma.T) / 2
    beside = 1e-14 * np.trace(sigma) / len(sigma)
    for shift in (0.0, beside):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the matrix is singular
            root = scipy.linalg.sqrtm(sigma + shift * np.eye(len(sigma)))
        if np.isfinite(root).all():
            return (root.real + root.real.T) / 2
    raise BadInput('scipy found no square root of this sigma; method "eigen" needs none')


def distance_from(mu_w, sigma_w, rtol=1e-5):
    """The function (mu, sigma) -> d² from this reference, for `frechet_interval`."""
    real = gaussian(mu_w, sigma_w)
    return lambda mu, sigma: by_eigenvalues(gaussian(mu, sigma), real, rtol)


def rows_distance(feats, feats_w):
    """d² of two sets of features (N, d), (M, d), for the distance within classes."""
    return frechet_distance(*statistics(feats), *statistics(feats_w))


# ----------------------------------------------------------------------------- the inception score


def inception_score(logits, splits=10):
    """exp(E_x KL(p(y|x) ‖ p(y))) of logits (N, K): Salimans et al. 2016; from 1 to K.

    The mean over `splits` consecutive parts and, as usual, the standard deviation over them
    (divided by their number); p(y) is each part's own. In float64, from logarithms alone, so that
    log 0 never occurs. Raises BadInput for N < splits and logits that are not finite.
    """
    n, found = len(logits), []
    if n < splits:
        raise BadInput(f"the inception score in {splits} parts needs {splits} images, got {n}")
    for i in range(splits):
        part = np.asarray(logits[i * n // splits : (i + 1) * n // splits], np.float64)  # (n, K)
        if not np.isfinite(part).all():
            raise BadInput("logits must be finite numbers")
        log_p_yx = scipy.special.log_softmax(part, axis=1)  # log p(y|x) (n, K)
        log_p_y = scipy.special.logsumexp(log_p_yx, axis=0) - np.log(len(part))  # log p(y) (K,)
        kl = (np.exp(log_p_yx) * (log_p_yx - log_p_y)).sum(1)  # KL(p(y|x) ‖ p(y)) (n,)
        found.append(np.exp(kl.mean()))
    return float(np.mean(found)), float(np.std(found))


def mixed_score(logits, seed=0):
    """(inception score, its spread over parts or None, their number) of logits (N, K).

    Ten parts of 500 images or more, as is usual; of fewer than 5,000 images as many parts of 500 as
    there are, at least one, which has no spread. For a part of n images scores at most n, and of
    few images too low. The parts are drawn: images may be sorted by class.
    """
    parts = max(1, min(10, len(logits) // 500))
    order = np.random.default_rng(seed).permutation(len(logits))
    mean, std = inception_score(logits[order], parts)
    return mean, std if parts > 1 else None, parts


# --------------------------------------------------------------------------------- within training


class Evaluator:
    """Scores sets of samples against one split of a data set, many in one process.

    By a classifier of the data set: its features need no download, cost little, say something about
    a few hundred samples, and it reads whether these are what was asked for. Or by `extractor`,
    such as Inception's.

    name: a data set, folder or zip; root: where it, its classifier and the statistics of the split
    are kept. shape (C,H,W) and class_names (in the order of its labels): of the network that makes
    the samples; size and classes: as it was trained; steps: of the classifier. `protocol` is one
    line for people, `network` two words, `reference` and `n_reference` say what is compared with.
    Raises BadInput for data without classes, where no extractor is given, or of another shape.
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
        split="test",
        extractor=None,
        world=None,
    ):
        how = {"size": size, "classes": classes, "split": split}
        images = datasets.held_out(name, root, shape, (), **how)[0]
        own = extractor or classifier_of(name, root, size=size, steps=steps, device=device)[0]
        self.extractor, self.protocol, self.network = own, own.protocol, own.network
        self.batch_size, self.world, self.told = batch_size, world or World(), set()
        self.world.agree({"feature network": getattr(own, "feature_hash", None)})
        theirs = list(getattr(own, "class_names", ()))
        known = [theirs.index(n) for n in class_names if n in theirs]
        self.classes = np.array(known, np.int64)
        self.labelled = len(known) == len(class_names) > 0
        self.reference, self.n_reference = f"{name}:{split}", len(images)
        self.channels = getattr(own, "channels", shape[0])
        real = in_channels(Images(self.reference, images.images, key=images.key), self.channels)
        self.real, self.root, how = real, root, {"batch_size": batch_size, "world": world}
        kept = kept_statistics(real, own, root, statistics, **how)  # m_w, C_w
        self.distance = distance_from(kept.mu, kept.sigma, rtol=1e-7)

    @classmethod
    def of_run(cls, cfg, ds, world, steps=1500):
        """For the network that a training (ScoredConfig) on the Dataset ds makes; steps: as above.

        By the features, and against the split, that cfg.metric_* name.
        """
        options = {"shape": ds.shape, "class_names": ds.class_names, "device": world.device}
        options |= {"size": cfg.size, "classes": cfg.classes, "split": cfg.metric_split}
        extractor = of_training(cfg, ds, world, steps)
        found = cls(cfg.data, cfg.data_root, extractor=extractor, world=world, **options)
        if getattr(cfg, "guidance", 0) == -1:
            found.labelled = False  # such samples were asked for no class
        return found

    def score(self, draw, n, num_labels):
        """The figures of n images: draw(seeds (n,), labels (n,) or None, a word for the bar).

        With all that they can be compared by: a row for the log. What makes figures of so few
        misleading is said once.
        """
        if n not in self.told and self.world.is_main:
            warn_of_few(f"scores of {n} samples", n, self.extractor.dim)
        self.told.add(n)
        seeds = torch.arange(n)
        labels = cli.labels_for(seeds, range(num_labels))
        return self(draw(seeds, labels, "scoring"), labels, self.world) | {
            "metric_n": n,
            "metric_features": self.network,
            "metric_reference": self.reference,
            "n_reference": self.n_reference,
        }

    def __call__(self, images, labels=None, world=None, also=None):
        """{'frechet', 'inception_score', 'class_accuracy'} of uint8 images (N, H, W, C).

        And what the function `also` says of their features (N, d).

        labels (N,): what they were asked for. With a World of several processes, each of them holds
        all images and looks at its share. The accuracy (0..1) is None without labels, or where they
        are of other classes. Raises BadInput when N < 2.
        """
        images = in_channels(Images("samples", images), self.channels).images
        feats, logits = extract(self.extractor, images, self.batch_size, world, name="samples")
        right = None
        if labels is not None and self.labelled:
            right = share_right(logits, self.classes[np.asarray(labels)])
        return {
            "frechet": self.distance(*statistics(feats)),
            "inception_score": mixed_score(logits)[0],
            "class_accuracy": right,
            **(also(feats) if also else {}),
        }


# ------------------------------------------------------------------------------------- all figures


def statistics_of(side):
    """m and C of a Side, computed once."""
    if side.known is None:
        side.known = Statistics(side.name, *statistics(side.feats), n=len(side.feats))
    return side.known.mu, side.known.sigma


def frechet(a, b, asked):
    """The distance; of images A also how sure it is, and what it would be with endless images."""
    reference = statistics_of(b)
    found = {"frechet": frechet_distance(*statistics_of(a), *reference, method=asked.method)}
    if a.feats is not None and len(a.feats) < max(ENOUGH, 2 * a.feats.shape[1] + 1):
        few = f"{a.name} has N = {len(a.feats)}, of {a.feats.shape[1]} features"
        few += "; it wants more than twice as many images"
        warn(f"no interval of the Fréchet distance: {few}", f"interval, {len(a.feats)}", asked.told)
    elif a.feats is not None:
        sure = frechet_interval(a.feats, distance_from(*reference), seed=asked.seed)
        found |= {
            "frechet_error": sure["standard_error"],
            "frechet_interval": sure["interval"],
            "frechet_infinity": sure["frechet_infinity"],
        }
    return found


def sure_and_varied(a, b, asked):
    """The inception score, its spread over the parts, and their number."""
    mean, std, parts = mixed_score(a.logits, asked.seed)
    warn_of_few(a.name, len(a.logits), told=asked.told)
    return {"inception_score": mean, "inception_score_std": std, "inception_score_parts": parts}


# Of each figure: what computes it, and what it needs besides the features of A.
FIGURES = {"frechet": (frechet, ()), "is": (sure_and_varied, ("logits",)), **FURTHER}


def scored(a, b, **asked):
    """All figures of two Sides that the fields of `Asked` ask for, as a dictionary."""
    return scores(a, b, Asked(distance=rows_distance, **asked), FIGURES)


def evaluate(generated, reference, extractor, *, batch_size=256, world=None, train=None, **asked):
    """All figures of two sets of images, as a dictionary.

    generated, reference   arrays uint8 (N, H, W, C), `Images` (with labels), or `Statistics`
    extractor              any callable: see evaluation/features.py; a plain function from a uint8
                           tensor (B, H, W, C) to features (B, d), or features and logits, will do
    train                  the images that the generator was trained on, for "memorisation"
    asked                  fields of `Asked`, such as metrics=("frechet", "kid")

    Gray images beside colour ones are compared as evaluation/channels.py says. Raises BadInput for
    images of another form, for fewer than two, and for statistics of other features.
    """
    sources = as_images(generated, "generated"), as_images(reference, "reference")
    check_same_size([source for source in sources if isinstance(source, Images)])
    channels = channels_of(extractor, sources)
    sources = [in_channels(source, channels) for source in sources]
    see = partial(look, extractor=extractor, batch_size=batch_size, world=world)
    a, b = see(sources[0]), see(sources[1], reference=True)
    check_same_features(a, b, extractor)
    train = None if train is None else in_channels(as_images(train, "train"), channels)
    told = {"n_generated": a.n, "n_reference": b.n, "channels": channels_text(a, b)}
    return scored(a, b, train=train, **asked) | told


# ------------------------------------------------------------------------------------- the command


def main():
    cfg = settled(cli.parse(Config, __doc__), FIGURES)
    tasks = {"stats": partial(against.save, statistics=statistics)}
    tasks["table"] = partial(table.compare, scored=scored)
    compare = against.curve if cfg.curve else against.compare
    launch(tasks.get(cfg.a, partial(compare, scored=scored)), cfg)


if __name__ == "__main__":
    cli.entry(main)
