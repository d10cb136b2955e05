"""A against B by command: both sides are read, their features computed, the figures asked for."""

from runtime.commandline import BadInput, split_list

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from evaluation import checkpoint_samples, image_sets, report
from evaluation.channels import channels_of, in_channels
from evaluation.checkpoint_samples import is_checkpoint
from evaluation.choice import choose, is_file, labelled_set
from evaluation.classifier import ClassifierFeatures
from evaluation.features import share_right
from evaluation.image_sets import Images, Statistics, check_same_size
from evaluation.inception_features import WithSpatial
from evaluation.sides import (
    Side,
    channels_text,
    check_same_features,
    labelled,
    look,
    scratch,
    warn_of,
)
from evaluation.words import warn


def generated(cfg, name):
    """Images or Statistics of A; of a checkpoint its samples, drawn here if need be."""
    if not is_checkpoint(name):
        return image_sets.read(name, cfg, cfg.n)
    script, _ = checkpoint_samples.checkpoint_settings(name)
    how = cfg.n or 1000, cfg.gpus, cfg.sample_args, cfg.out
    found = checkpoint_samples.sampled(name, script, *how)
    names = checkpoint_samples.class_names(name)
    return replace(image_sets.read_file(str(found)), name=name, class_names=names)


def form_of(name, cfg):
    """Images or Statistics of A before any work: of a checkpoint one black image, of its size.

    Raises BadInput for what cannot be read or drawn.
    """
    if not is_checkpoint(name):
        return image_sets.read(name, cfg, cfg.n)
    checkpoint_samples.checkpoint_settings(name)
    channels, height, width = checkpoint_samples.shape(name)
    return Images(name, np.zeros((1, height, width, channels), np.uint8))


def reference(cfg):
    """Images or Statistics of B: all of it beside samples, and for a table."""
    drawn = is_checkpoint(cfg.a) or cfg.curve or cfg.a == "table"
    return image_sets.read(cfg.b, cfg, 0 if drawn else cfg.n)


def training_images(cfg, b, metrics):
    """The Images that A may be copies of; None where nobody asks or they are unknown."""
    source = labelled_set(cfg)
    if "memorisation" not in metrics or is_file(source):
        return None
    train = image_sets.read(f"{source}:train", cfg)
    if train.set_key == getattr(b, "set_key", None):
        warn(f"{source} has no held-out images that could tell copies from good samples")
        return None
    return train


def class_accuracy(side, extractor, names):
    """The share of A (0..1) that the data set's classifier reads as labelled, or None."""
    if not isinstance(extractor, ClassifierFeatures) or side.labels is None:
        return None
    numbers = np.array([extractor.class_names.index(name) for name in names])  # among all classes
    return share_right(side.logits, numbers[side.labels])


def labels_text(side, names, most=10):
    """'0 is cat, 1 is dog', of the labels of A; None where its file names them, or there are none.

    Also where each number is its own name, as of digits. Its numbers are taken for places among the
    classes that are compared.
    """
    plain = [str(i) for i in range(len(names))]
    if side.labels is None or side.source.class_names or list(names) == plain or not names:
        return None
    found = [f"{i} is {names[i]}" for i in np.unique(side.labels)]
    return ", ".join(found[:most]) + ", ..." * (len(found) > most)


def pairs_path(name, out=""):
    """Where the closest pairs of A are drawn: in `out`, beside its file, or else here."""
    path = Path(name)
    near = path.with_name(f"{path.stem}-nearest.png") if path.is_file() else Path("nearest.png")
    return str(Path(out, near.name) if out else near)


class Reference:
    """B, its features computed once, and the network that gives them, for one A after another.

    sides: Images or Statistics of all A, by which the features are chosen; of these only the form
    of the images and their classes are looked at. scored: a function of two Sides and the fields of
    `Asked`, which gives a dictionary of figures.
    """

    def __init__(self, cfg, world, b, sides, scored):
        self.cfg, self.world, self.scored, self.told = cfg, world, scored, set()
        self.metrics = split_list(cfg.metrics)
        self.extractor, self.class_names, self.known, sides = choose(cfg, [*sides, b], world)
        self.channels, b = channels_of(self.extractor, sides), sides[-1]
        known = [Side(side, known=side) for side in sides if isinstance(side, Statistics)]
        for side in known:  # before any features are computed
            check_same_features(side, known[0], self.extractor)
        b = labelled(b, self.class_names)
        self.seen = self.look(b, keep=cfg.data_root, reference=True)
        self.train = in_channels(training_images(cfg, b, self.metrics), self.channels)

    def look(self, source, **how):
        how |= {"batch_size": self.cfg.batch_size, "store": partial(scratch, self.cfg.data_root)}
        return look(source, self.extractor, world=self.world, **how)

    def figures(self, name, a, figure=""):
        """What A is worth, Images or Statistics, as a dictionary that becomes JSON.

        None but on the first process; all compute its features. figure: where the closest pairs are
        drawn.
        """
        cfg, seen, extractor = self.cfg, self.seen, self.extractor
        check_same_size([s for s in (a, seen.source) if isinstance(s, Images)])
        side = self.look(labelled(in_channels(a, self.channels), self.class_names))
        check_same_features(side, seen, extractor)
        if side.n == 1:  # on every process, before one of them goes on alone
            raise BadInput(f"a covariance needs at least 2 images, {name} has 1")
        if not self.world.is_main:
            return None
        warn_of(side, "A", self.told)
        warn_of(seen, "B", self.told)
        figures = self.scored(
            side,
            seen,
            metrics=self.metrics,
            method="sqrtm" if cfg.sqrtm else "eigen",
            seed=cfg.seed,
            device="cuda" if cfg.gpus else "cpu",
            class_names=self.class_names,
            train=self.train,
            figure=figure or pairs_path(name, cfg.out),
            told=self.told,
        )
        with_protocol = (s.known for s in (side, seen) if s.known and s.known.protocol)
        origin = extractor or next(with_protocol, side.known)
        return figures | {
            "class_accuracy": class_accuracy(side, extractor, self.class_names),
            "n_generated": side.n,
            "n_reference": seen.n,
            "labels": labels_text(side, self.class_names),
            "channels": channels_text(side, seen),
            "features": origin.protocol,
            "feature_hash": origin.feature_hash,
            "network": getattr(extractor, "network", None),
            **self.known,
            "a": name,
            "b": cfg.b,
            "seed": cfg.seed,
        }


def against(cfg, world, names, scored):
    """The figures of each A of `names` against B, in turn; scored: see Reference.

    The features are chosen by the first of them. What is wrong with B, or with the features, is
    known before A is drawn. To other processes than the first none are given.
    """
    b, seen = reference(cfg), None
    for name in names:
        form = form_of(name, cfg)
        seen = seen or Reference(cfg, world, b, [form], scored)
        a = generated(cfg, name) if is_checkpoint(name) else form
        if found := seen.figures(name, a):
            yield found


def compare(cfg, world, scored):
    """Print the figures of A against B; the first process does."""
    for found in against(cfg, world, [cfg.a], scored):
        report.show(found)
        report.finish(cfg, found)


def curve(cfg, world, scored):
    """Every kept checkpoint of the run A against B: curve.png and .json in its folder, or --out."""
    folder, rows = Path(cfg.out or cfg.a), []
    kept, path = checkpoint_samples.of_run(Path(cfg.a)), None
    for step, figures in zip(kept, against(cfg, world, kept.values(), scored), strict=False):
        rows.append({"step": step, **figures, "sample_args": cfg.sample_args})
        print(f"step {step}")
        report.show(figures)
        path = path or report.curve_path(folder, rows[0])
        report.draw_curve(path, cfg.a, rows)
    if rows:
        report.finish(cfg, {"curve": rows, "figure": f"{path}.png"})


def save(cfg, world, statistics):
    """Write m, C and what they are of to cfg.out; statistics: as below."""
    facts = save_statistics(cfg, world, statistics)
    if world.is_main:
        report.finish(cfg, facts)


def save_statistics(cfg, world, statistics):
    """Write mu and sigma of B to cfg.out, in the layout of cfg.layout; the facts as a dictionary.

    statistics: the function that makes mu and sigma of features. Raises BadInput where B holds no
    images.
    """
    b = reference(cfg)
    if not isinstance(b, Images):
        raise BadInput(f"{cfg.b} already holds statistics; expected images")
    extractor, *_ = choose(cfg, [b], world)
    store = partial(scratch, cfg.data_root)
    see = partial(look, batch_size=cfg.batch_size, world=world, store=store)
    more = {}
    if cfg.layout == "adm":
        side = see(b, WithSpatial(extractor))
        if world.is_main:
            mu_s, sigma_s = statistics(side.logits)
            more = {"arr_0": b.images, "mu_s": mu_s, "sigma_s": sigma_s}
            more |= {} if b.labels is None else {"arr_1": b.labels}
    else:
        side = see(b, extractor, keep=cfg.data_root)
    facts = dict(n=side.n, protocol=extractor.protocol, feature_hash=extractor.feature_hash)
    if world.is_main:
        warn_of(side)
        made = Statistics(b.name, *statistics(side.feats), **facts)
        image_sets.save_statistics(cfg.out, made, **more)
        print(f"statistics of      {b.name}, N = {side.n}, in {cfg.out}")
        print(f"features           {extractor.protocol}")
    return {"out": cfg.out, "b": cfg.b, "seed": cfg.seed, **facts}
