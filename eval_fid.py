"""Numbers people can trust: how far are samples from real images, and are they what was asked for?

Two sets of images are compared by the distributions of their features under one fixed network
(the mathematics: `evaluation/`): the Fréchet distance, which with the Inception network is the
FID; the inception score; the kernel distance (KID); precision and recall, density and coverage; how
many samples are read as the class they were asked for; and whether they are copies.

Such a figure can be compared only with figures of the same features, the same N and the same
reference, so all three are printed with it, and with an estimate of its error where there is one.

    python eval_fid.py runs/ldm-glyphs/samples.npz glyphs:test     # a minute at first, then seconds
    python eval_fid.py mnist:train mnist:test --n 10000      # real against real: 0.03, the floor
    python eval_fid.py samples.npz cifar10:train --features inception --resize clean
    python eval_fid.py runs/pixel-mnist/ckpt.pt --metrics all      # draws 1,000 samples itself
    python eval_fid.py runs/pixel-mnist mnist:test --curve   # its checkpoints, one after the other
    python eval_fid.py stats glyphs:test --out glyphs.npz    # keep the statistics of a reference

What A and B may be is told in `image_sets.py`. Features are those of the Inception network
(`inception.py`), or of a small classifier of the data set itself (`features.py`): a network made
for photographs has little to say about gray digits. `evaluation.evaluate` takes any function.
The last line printed is one JSON object that holds the same.
"""

import json
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from evaluation import image_sets
from evaluation.features import ClassifierFeatures, classifier_of, share_right, warn
from evaluation.image_sets import Images, Statistics, check_same_size
from evaluation.metrics import statistics
from evaluation.scores import METRICS, Asked, check_same_features, look, scores, scratch
from networks import inception
from runtime.commandline import (
    BadInput,
    check_not_negative,
    check_positive,
    check_processes,
    default_gpus,
    entry,
    not_given,
    parse,
    parse_classes,
    split_list,
)
from runtime.files import atomic_write
from runtime.plots import plot_lines
from runtime.processes import launch
from runtime.run import load_checkpoint


@dataclass
class Config:
    a: Annotated[str, tyro.conf.Positional]
    """generated images or a checkpoint; or the word `stats`, to write B's statistics to --out"""
    b: Annotated[str, tyro.conf.Positional] = ""
    """reference images; of a data set the test split, unless its name ends in :train; of a
    checkpoint that is A, by default, what it was trained on"""
    metrics: str = "frechet,is,kid,prdc"  # of frechet is kid prdc classes memorisation; or all
    features: Literal["classifier", "inception"] = "classifier"  # whose features are compared
    weights: str = ""  # file of Inception's weights; empty: downloaded to --data-root once
    resize: Literal["pytorch-fid", "tf1", "clean"] = "pytorch-fid"  # how images become 299x299
    data: str = ""  # labelled data set that the classifier is trained on; empty: B
    data_root: str = "data"  # where data sets, trained classifiers and features are kept
    size: int = 0  # resize data sets and folders as in training; 0 keeps their size
    classes: str = ""  # comma-separated: keep these classes of the data sets, as in training
    n: int = 0
    """images of each side, drawn without replacement; 0: all. Of a checkpoint: how many samples
    (0: 1,000), scored against all of B"""
    seed: int = 0  # of the classifier's training, of the draw of --n images, of KID's subsets
    classifier_steps: int = 1500  # its training steps, of 128 images each
    sqrtm: bool = False  # the distance through scipy's sqrtm, slow: a check of the eigenvalue form
    curve: bool = False  # A is a run: score each of its checkpoints; draws curve.png there
    sample_args: str = ""  # flags for sampling a checkpoint: --sample-args="--sampler ddim"
    batch_size: int = 256  # images at a time when features are computed
    gpus: int = default_gpus()  # 0: compute on the CPU
    layout: Literal["pytorch-fid", "adm"] = "pytorch-fid"  # of the file that `stats` writes
    out: str = ""  # the .npz that `stats` writes
    json: str = ""  # also write the JSON object into this file


# ------------------------------------------------------------------------ what A and B are


def is_checkpoint(name):
    return name.endswith(".pt")


def generated(cfg, name):
    """Images or Statistics of A; of a checkpoint its samples, drawn here if need be."""
    if not is_checkpoint(name):
        return image_sets.read(name, cfg, cfg.n)
    script, _ = image_sets.checkpoint_settings(name)
    found = image_sets.sampled(name, script, cfg.n or 1000, cfg.gpus, cfg.sample_args)
    return replace(image_sets.read_file(str(found)), name=name)


def reference(cfg):
    """Images or Statistics of B."""
    drawn = is_checkpoint(cfg.a) or cfg.curve
    return image_sets.read(cfg.b, cfg, 0 if drawn else cfg.n)


def as_trained(cfg, checkpoint):
    """cfg, but what is not typed is as the checkpoint was trained: B, its size and classes."""
    _, trained = image_sets.checkpoint_settings(checkpoint)
    names = not_given(cfg, ("size", "classes", "data_root"))
    names = [name for name in names if name in trained]
    b = cfg.b or f"{trained['data']}:test"
    return replace(cfg, b=b, **{name: trained[name] for name in names})


# ---------------------------------------------------------------------------- which features


def asked_labels(side, class_names):
    """The labels (N,) of `side`; None where it has none, or names other classes."""
    labels, last = side.labels, len(class_names) - 1
    if labels is None or last < 0 or side.class_names not in (None, class_names):
        return None
    if labels.min() < 0 or labels.max() > last:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise BadInput(f"{side.name} has {found}; there are classes 0 to {last}")
    return labels


def labelled_set(cfg):
    """The data set that the classifier learns, and whose training images A may be copies of; or
    the name of a file."""
    return cfg.data or image_sets.split_name(cfg.b)[0]


def is_file(name):
    return name.endswith((".npz", ".npy"))


def choose(cfg, pictures):
    """(extractor, class names, what else is known) for the Images `pictures`.

    Raises BadInput where sizes differ or nothing labelled is there to train the classifier on.
    """
    device = "cuda" if cfg.gpus else "cpu"
    if cfg.features == "inception":
        check_same_size(pictures)
        names = [side.class_names for side in pictures if side.class_names]
        extractor = inception.load(cfg.weights, cfg.data_root, cfg.resize, device)
        return extractor, next(iter(names), ()), {}
    source = labelled_set(cfg)
    if is_file(source):
        why = "is no data set to train the feature classifier on"
        raise BadInput(f"{source} {why}; name a labelled data set of such images with --data")
    extractor, train = classifier_of(
        source,
        cfg.data_root,
        size=cfg.size,
        seed=cfg.seed,
        steps=cfg.classifier_steps,
        device=device,
    )
    check_same_size([*pictures, Images(source, train.images)])
    numbers = parse_classes(cfg.classes, train.class_names)
    names = tuple(train.class_names[i] for i in numbers)
    return extractor, names, {"classifier_test_accuracy": extractor.facts["test_accuracy"]}


# ------------------------------------------------------------------------------- comparing


def figures(cfg, world, names):
    """The figures of each A of `names` against B, in turn, as dictionaries that become JSON.

    All processes compute features, the first one alone the figures: to the others none are given.
    """
    b, seen = reference(cfg), None  # first: what is wrong with it is known before A is drawn
    for name in names:
        a = generated(cfg, name)
        pictures = [side for side in (a, b) if isinstance(side, Images)]
        if seen is None:  # the features, and those of B, are the same for all
            extractor, class_names, known = choose(cfg, pictures) if pictures else NOTHING
            see = partial(
                look,
                extractor=extractor,
                batch_size=cfg.batch_size,
                world=world,
                store=partial(scratch, cfg.data_root),
            )
            seen = see(labelled(b, class_names), keep=cfg.data_root, reference=True)
            train = training_images(cfg, b)
        check_same_size(pictures)
        side = see(labelled(a, class_names))
        check_same_features(side, seen, extractor)
        if side.n == 1:  # on every process, before one of them goes on alone
            raise BadInput(f"a covariance needs at least 2 images, {name} has 1")
        if not world.is_main:
            continue
        side.moments()
        warn_of(side)
        warn_of(seen)
        asked = Asked(
            metrics=chosen_metrics(cfg),
            method="sqrtm" if cfg.sqrtm else "eigen",
            seed=cfg.seed,
            device="cuda" if cfg.gpus else "cpu",
            class_names=class_names,
            train=train,
            figure=pairs_path(name),
        )
        origin = extractor or next((s.known for s in (side, seen) if s.known.protocol), side.known)
        yield scores(side, seen, asked) | {
            "class_accuracy": class_accuracy(side, extractor, class_names),
            "n_generated": side.n,
            "n_reference": seen.n,
            "features": origin.protocol,
            "feature_hash": origin.feature_hash,
            **known,
            "a": name,
            "b": cfg.b,
            "seed": cfg.seed,
        }


def class_accuracy(side, extractor, names):
    """The share of A (0..1) that the data set's classifier reads as labelled, or None."""
    if not isinstance(extractor, ClassifierFeatures) or side.labels is None:
        return None
    numbers = np.array([extractor.class_names.index(name) for name in names])  # among all classes
    return share_right(side.logits, numbers[side.labels])


NOTHING = None, (), {}  # the extractor, class names and facts where both sides are statistics


def labelled(source, class_names):
    """`source` without labels that do not mean `class_names`."""
    if not isinstance(source, Images):
        return source
    return replace(source, labels=asked_labels(source, class_names))


def training_images(cfg, b):
    """The Images that A may be copies of; None where nobody asks or they are unknown."""
    source = labelled_set(cfg)
    if "memorisation" not in chosen_metrics(cfg) or is_file(source):
        return None
    train = image_sets.read(f"{source}:train", cfg)
    if train.set_key == getattr(b, "set_key", None):
        warn(f"{source} has no held-out images that could tell copies from good samples")
        return None
    return train


def pairs_path(name):
    """Where the closest pairs of A are drawn: beside its file, else here."""
    path = Path(name)
    return str(path.with_name(f"{path.stem}-nearest.png")) if path.is_file() else "nearest.png"


def chosen_metrics(cfg):
    """The names in --metrics, the distance first. Raises BadInput for others."""
    names = METRICS if cfg.metrics == "all" else split_list(cfg.metrics)
    if wrong := [name for name in names if name not in METRICS]:
        raise BadInput(f"--metrics {wrong[0]}: there are {', '.join(METRICS)}, or all")
    return tuple(dict.fromkeys(["frechet", *names]))


def warn_of(side):
    """A line on stderr for what makes the figure of this side misleading."""
    least = 2048 if side.n and side.n < 2048 else 10_000
    if side.n and side.n < least:
        why = "the Fréchet distance is biased upward with few samples"
        warn(f"{side.name} has N = {side.n:,} images, fewer than {least:,}: {why}")
    dim = len(side.moments()[0])
    if side.n and side.n <= dim:
        warn(f"{side.name}: N = {side.n} does not exceed the {dim} features")
    if side.known.protocol is None and (side.feats is None or side.known.n is None):
        warn(f"{side.name} does not say which features its statistics were made with")


# -------------------------------------------------------------------------------- the output

# Label, format of a line for people; it is left out where one of its figures is missing.
LINES = (
    ("Fréchet distance", "{frechet:.4f}"),
    ("  95 % interval", "{frechet_interval[0]:.4f} to {frechet_interval[1]:.4f} at this N"),
    ("  endless samples", "{frechet_infinity:.4f}, extrapolated"),
    ("Fréchet per class", "{class_frechet:.4f} in the mean"),
    ("inception score", "{inception_score:.3f} ± {inception_score_std:.3f} over 10 parts"),
    ("kernel distance", "{kid:.5f} ± {kid_error:.5f}, standard error"),
    ("precision, recall", "{precision:.3f}, {recall:.3f}"),
    ("density, coverage", "{density:.3f}, {coverage:.3f}"),
    ("class accuracy", "{class_accuracy:.2%}"),
    ("copies of training", "{memorisation_copies}"),
    (
        "  very near",
        "{memorisation_near_share:.1%}, by chance {memorisation_near_expected:.1%} "
        "(p = {memorisation_near_p:.2g})",
    ),
    ("  nearer than B", "{memorisation_share:.1%}, by chance 50 % (p = {memorisation_p:.2g})"),
    ("generated  A", "{a}, N = {n_generated}"),
    ("reference  B", "{b}, N = {n_reference}"),
    ("features", "{features}"),
)


def show(found):
    """The figures `found` as a table for people."""
    for label, form in LINES:
        try:
            print(f"{label:<18} {form.format(**found)}")
        except (KeyError, TypeError):
            continue


def compare(cfg, world):
    """Print the figures of A against B; the first process does."""
    for found in figures(cfg, world, [cfg.a]):
        show(found)
        finish(cfg, found)


def curve(cfg, world):
    """Every kept checkpoint of the run A against B: curve.png and curve.json in its folder."""
    folder, rows = Path(cfg.a), []
    kept = checkpoints(folder)
    for step, found in zip(kept, figures(cfg, world, kept.values()), strict=False):
        rows.append({"step": step, **found})
        print(f"step {step}")
        show(found)
        panels = {
            title: {
                label: ([row["step"] for row in rows], [row[key] for row in rows])
                for label, key in lines.items()
                if found.get(key) is not None
            }
            for title, lines in CURVES.items()
        }
        panels = {title: lines for title, lines in panels.items() if lines}
        title = f"{folder}, N = {found['n_generated']}"
        plot_lines(folder / "curve.png", panels, xlabel="step", title=title)
        with atomic_write(folder / "curve.json") as temporary:
            temporary.write_text(json.dumps(rows) + "\n")
    if rows:
        finish(cfg, {"curve": rows, "figure": str(folder / "curve.png")})


CURVES = {
    "Fréchet distance": {"at this N": "frechet", "endless samples": "frechet_infinity"},
    "share": {"precision": "precision", "recall": "recall"},
    "class accuracy": {"class accuracy": "class_accuracy"},
}


def checkpoints(folder):
    """The checkpoints that a run kept, and its last one, by their steps: {step: path}."""
    kept = {int(path.stem.split("-")[1]): str(path) for path in folder.glob("ckpt-[0-9]*.pt")}
    last = folder / "ckpt.pt"
    if last.is_file():
        kept.setdefault(load_checkpoint(last, mapped=True)["step"], str(last))
    if not kept:
        raise BadInput(f"--curve: {folder} holds no ckpt.pt; expected the folder of a run")
    return dict(sorted(kept.items()))


class WithSpatial:
    """The Inception extractor, with its spatial features in the place of the logits."""

    def __init__(self, extractor):
        self.extractor, self.device = extractor, extractor.device

    def __call__(self, images):
        feats, _, spatial = self.extractor(images, spatial=True)
        return feats, spatial


def save_statistics(cfg, world):
    """Write mu, sigma and what they are of to cfg.out, in the layout that is asked for."""
    b = reference(cfg)
    if not isinstance(b, Images):
        raise BadInput(f"{cfg.b} already holds statistics; expected images")
    extractor, _, _ = choose(cfg, [b])
    store = partial(scratch, cfg.data_root)
    see = partial(look, batch_size=cfg.batch_size, world=world, store=store)
    more = {}
    if cfg.layout == "adm":
        side = see(b, WithSpatial(extractor))
        mu_s, sigma_s = statistics(side.logits)
        more = {"arr_0": b.images, "mu_s": mu_s, "sigma_s": sigma_s}
        more |= {} if b.labels is None else {"arr_1": b.labels}
    else:
        side = see(b, extractor, keep=cfg.data_root)
    if not world.is_main:
        return
    warn_of(side)
    facts = dict(n=side.n, protocol=extractor.protocol, feature_hash=extractor.feature_hash)
    image_sets.save_statistics(cfg.out, Statistics(b.name, *side.moments(), **facts), **more)
    print(f"statistics of      {b.name}, N = {side.n}, in {cfg.out}")
    print(f"features           {extractor.protocol}")
    finish(cfg, {"out": cfg.out, "b": cfg.b, "seed": cfg.seed, **facts})


def finish(cfg, found):
    """The last lines: the command, and one JSON object, which goes into cfg.json too."""
    print(f"command            {shlex.join(['python', *sys.argv])}, seed {cfg.seed}")
    line = json.dumps(found)
    if cfg.json:
        with atomic_write(cfg.json) as temporary:
            temporary.write_text(line + "\n")
    print(line)


def main():
    cfg = parse(Config, __doc__)
    check_positive(cfg, "batch_size", "classifier_steps")
    check_processes(cfg.gpus, 0)
    chosen_metrics(cfg)
    check_not_negative(cfg, "seed")
    if cfg.n < 0:
        raise BadInput(f"--n must be 0 (all images) or a number of images, got {cfg.n}")
    if cfg.out[-4:] != (".npz" if cfg.a == "stats" else ""):
        raise BadInput("only `stats` takes --out, and needs it: eval_fid.py stats B --out F.npz")
    drawn = cfg.curve or is_checkpoint(cfg.a)
    for flag, used, needs in (
        ("weights", cfg.features == "inception", "--features inception"),
        ("resize", cfg.features == "inception", "--features inception"),
        ("layout", cfg.a == "stats", "`stats`"),
        ("sample_args", drawn, "a checkpoint, or a run and --curve"),
    ):
        if not used and not not_given(cfg, (flag,)):
            raise BadInput(f"--{flag.replace('_', '-')} means nothing without {needs}")
    if cfg.layout == "adm" and cfg.features != "inception":
        raise BadInput("--layout adm holds Inception's features: add --features inception")
    if Path(cfg.json or ".json").is_dir() or Path(cfg.out or ".npz").is_dir():
        raise BadInput(f"{cfg.json or cfg.out} is a folder; expected the name of a file")
    if cfg.curve:
        cfg = as_trained(cfg, list(checkpoints(Path(cfg.a)).values())[-1])
    elif is_checkpoint(cfg.a):
        cfg = as_trained(cfg, cfg.a)
    if not cfg.b:
        raise BadInput(f"nothing to compare {cfg.a} with: eval_fid.py A B")
    launch(save_statistics if cfg.a == "stats" else curve if cfg.curve else compare, cfg)


if __name__ == "__main__":
    entry(main)
