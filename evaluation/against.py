"""A against B by command: both sides are read, their features computed, the figures asked for."""

from runtime.commandline import BadInput, split_list

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from evaluation import checkpoint_samples, image_sets
from evaluation.channels import channels_of, in_channels
from evaluation.checkpoint_samples import is_checkpoint
from evaluation.choice import choose, is_file, labelled_set
from evaluation.classifier import ClassifierFeatures
from evaluation.features import share_right
from evaluation.image_sets import Images, Statistics, check_same_size
from evaluation.inception_features import WithSpatial
from evaluation.sides import channels_text, check_same_features, labelled, look, scratch, warn_of
from evaluation.words import warn


def generated(cfg, name):
    """Images or Statistics of A; of a checkpoint its samples, drawn here if need be."""
    if not is_checkpoint(name):
        return image_sets.read(name, cfg, cfg.n)
    script, _ = checkpoint_samples.checkpoint_settings(name)
    found = checkpoint_samples.sampled(name, script, cfg.n or 1000, cfg.gpus, cfg.sample_args)
    names = checkpoint_samples.class_names(name)
    return replace(image_sets.read_file(str(found)), name=name, class_names=names)


def reference(cfg):
    """Images or Statistics of B."""
    drawn = is_checkpoint(cfg.a) or cfg.curve
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


def pairs_path(name):
    """Where the closest pairs of A are drawn: beside its file, else here."""
    path = Path(name)
    return str(path.with_name(f"{path.stem}-nearest.png")) if path.is_file() else "nearest.png"


def against(cfg, world, names, scored):
    """The figures of each A of `names` against B, in turn, as dictionaries that become JSON.

    scored: a function of two Sides and the fields of `Asked`, which gives a dictionary of figures.
    cfg.metrics names those that are asked for.
    All processes compute features, the first one alone the figures: to the others none are given.
    """
    metrics = split_list(cfg.metrics)
    b, seen = reference(cfg), None  # first: what is wrong with it is known before A is drawn
    for name in names:
        a = generated(cfg, name)
        if seen is None:  # the features, and those of B, are the same for all
            extractor, class_names, known, (a, b) = choose(cfg, (a, b), world)
            channels = channels_of(extractor, (a, b))
            see = partial(
                look,
                extractor=extractor,
                batch_size=cfg.batch_size,
                world=world,
                store=partial(scratch, cfg.data_root),
            )
            seen = see(labelled(b, class_names), keep=cfg.data_root, reference=True)
            train = in_channels(training_images(cfg, b, metrics), channels)
        check_same_size([side for side in (a, b) if isinstance(side, Images)])
        side = see(labelled(in_channels(a, channels), class_names))
        check_same_features(side, seen, extractor)
        if side.n == 1:  # on every process, before one of them goes on alone
            raise BadInput(f"a covariance needs at least 2 images, {name} has 1")
        if not world.is_main:
            continue
        warn_of(side)
        warn_of(seen)
        figures = scored(
            side,
            seen,
            metrics=metrics,
            method="sqrtm" if cfg.sqrtm else "eigen",
            seed=cfg.seed,
            device="cuda" if cfg.gpus else "cpu",
            class_names=class_names,
            train=train,
            figure=pairs_path(name),
        )
        with_protocol = (s.known for s in (side, seen) if s.known and s.known.protocol)
        origin = extractor or next(with_protocol, side.known)
        yield figures | {
            "class_accuracy": class_accuracy(side, extractor, class_names),
            "n_generated": side.n,
            "n_reference": seen.n,
            "labels": labels_text(side, class_names),
            "channels": channels_text(side, seen),
            "features": origin.protocol,
            "feature_hash": origin.feature_hash,
            **known,
            "a": name,
            "b": cfg.b,
            "seed": cfg.seed,
        }


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
