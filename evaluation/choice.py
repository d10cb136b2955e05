"""Which features compare two sets of images: Inception's, or those of a classifier of the data set.

inception     FID and IS as papers have them; made for colour photographs
classifier    a network trained here on the data set itself: it says something about gray
              digits, and reads whether a sample is what was asked for
auto          Inception where all images have three channels and its weights are there or can be
              downloaded; else the classifier. Where statistics are compared with, what they are of.
"""

from runtime.commandline import BadInput, parse_classes, split_list

import torch

from evaluation import image_sets, inception_features
from evaluation.channels import channels_of, in_channels
from evaluation.classifier import classifier_of
from evaluation.image_sets import Images, Statistics, check_same_size, split_name
from evaluation.words import warn
from image_data import datasets
from networks.inception import Inception

PATIENCE = 5.0  # seconds that `auto` waits for a download of Inception's weights to begin
NOT_HAD = {}  # (weights, folder): why they cannot be had; `auto` asks once in a process


def labelled_set(cfg):
    """The data set that the classifier learns, and whose training images A may be copies of; or
    the name of a file."""
    return cfg.data or split_name(cfg.b)[0]


def is_file(name):
    return name.endswith((".npz", ".npy"))


def choose(cfg, sides, world):
    """(extractor, class names, what else is known, sides) for `sides`; of --features.

    The sides come back with as many channels as each other and as the extractor takes. It is None
    where both are Statistics. Class names are known where a figure needs labels: any by a
    classifier, by Inception the distance within classes. Raises BadInput where sizes differ, where
    Inception is asked for and cannot be had, for colours where there are none in the data set, and
    where nothing labelled is there to train the classifier on.
    """
    pictures = [side for side in sides if isinstance(side, Images)]
    if not pictures:
        return None, (), {}, sides
    check_same_size(pictures)
    device = "cuda" if cfg.gpus else "cpu"
    kind, extractor = kind_of_features(cfg.features, sides), None
    if kind == "inception":
        extractor = inception_features.load(cfg.weights, cfg.data_root, cfg.resize, device)
    elif kind == "either":
        extractor = inception_if_there(cfg, device, world)
    if extractor is not None:
        named = (side for side in pictures if side.labels is not None and side.class_names)
        names = [side.class_names for side in named if "classes" in split_list(cfg.metrics)]
        unknown = 3 * (len(pictures) < len(sides))  # those that statistics are of
        channels = max(channels_of(extractor, sides), unknown)
        return extractor, next(iter(names), ()), {}, [in_channels(s, channels) for s in sides]
    source = labelled_set(cfg)
    if is_file(source):
        why = "is no data set to train the feature classifier on"
        raise BadInput(f"{source} {why}; name a labelled data set of such images with --data")
    learned = image_sets.load(source, "train", cfg, ())
    check_same_size([*pictures, Images(source, learned.images)])
    sides = [in_channels(side, learned.channels) for side in sides]
    numbers = dict.fromkeys(parse_classes(cfg.classes, learned.class_names))
    extractor, train = classifier_of(
        source,
        cfg.data_root,
        size=cfg.size,
        seed=cfg.seed,
        steps=cfg.classifier_steps,
        device=device,
    )
    names = tuple(train.class_names[i] for i in numbers)
    known = {"classifier_test_accuracy": extractor.facts["test_accuracy"]}
    return extractor, names, known, sides


def kind_of_features(asked, sides):
    """ "inception", "classifier", or "either" where Inception is tried first; asked: --features."""
    if asked != "auto":
        return asked
    for side in sides:
        if isinstance(side, Statistics):  # what is compared with them must be of their features
            return "inception" if side.mu.size == Inception.dim else "classifier"
    colour = all(side.images.shape[3] == 3 for side in sides)
    return "either" if colour else "classifier"


def inception_if_there(cfg, device, world):
    """Inception's extractor; None, with a line on stderr, where its weights cannot be had.

    All processes get the same: none where one of them cannot read the weights.
    """
    key, extractor, why = (cfg.weights, cfg.data_root), None, ""
    try:
        if key in NOT_HAD:
            raise BadInput(NOT_HAD[key])
        extractor = inception_features.load(*key, cfg.resize, device, patience=PATIENCE)
    except BadInput as error:
        why = NOT_HAD[key] = str(error)
    has = torch.tensor(float(extractor is not None), device=world.device)
    if world.sum(has) == world.size:
        return extractor
    if world.is_main:
        why = why or "another process could not read its weights"
        warn(f"features of a classifier of the data set in place of Inception's: {why}")
    return None


# ---------------------------------------------------------------------------- within a training


def of_training(cfg, ds, world, steps=1500):
    """The extractor by which a training (ScoredConfig) on the Dataset ds scores its samples.

    Of cfg.metric_features: auto is a classifier of cfg.metric_data, or of the training's data where
    these have classes; else Inception. steps: of the classifier. Raises BadInput, in the words of a
    training, where Inception's weights cannot be had, and where no classifier takes such images.
    """
    source, kind = cfg.metric_data or cfg.data, cfg.metric_features
    has_classes = bool(cfg.metric_data or ds.num_classes > 1 or cfg.classes)
    patience = PATIENCE if kind == "auto" else None
    if cfg.metric_data and kind == "inception":
        why = "is for a classifier's features; leave it out, or --metric-features inception"
        raise BadInput(f"--metric-data {source} {why}")
    if kind == "inception" or kind == "auto" and not has_classes:
        where = ("", cfg.data_root, cfg.metric_resize, world.device)
        try:
            return inception_features.load(*where, patience=patience)
        except BadInput as error:
            if kind == "inception":
                raise
            why = f"no scores: {ds.name} has no classes to train a classifier on"
            why += f", and Inception's weights are not there: {error}"
            wanted = "a labelled data set of such images"
            raise BadInput(f"{why}; or type --metric-data NAME, {wanted}") from None
    size = cfg.size
    if cfg.metric_data:
        learned = datasets.load(source, cfg.data_root, size=size)
        if learned.shape[1:] != ds.shape[1:] and ds.height == ds.width:
            learned, size = datasets.load(source, cfg.data_root, size=ds.height), ds.height
        if learned.shape[1:] != ds.shape[1:] or learned.channels < ds.channels:
            shapes = f"{learned.shape}, those of {ds.name} are {ds.shape}"
            raise BadInput(f"--metric-data {source}: images are {shapes}; name a data set like it")
    how = {"size": size, "steps": steps, "device": world.device, "flag": "--metric-data NAME"}
    return classifier_of(source, cfg.data_root, **how)[0]
