"""The distance within each class: two sets can be alike as a whole and wrong in every class."""

from runtime.commandline import BadInput

import numpy as np

from evaluation.image_sets import Chosen


def intra_class(feats, labels, feats_w, labels_w, num_classes, distance):
    """The distance within each class, float64 (num_classes,), and their mean.

    Generated rows (N, d) with integer labels (N,) in 0..num_classes-1, and real ones (M, d), (M,).
    distance: a function of two sets of rows. A class of fewer than 2 images on a side gets NaN, and
    is left out of the mean. Raises BadInput for other labels, and where no class is left.
    """
    labels, labels_w = np.asarray(labels), np.asarray(labels_w)
    for rows, known in ((feats, labels), (feats_w, labels_w)):
        if known.shape != (len(rows),) or not np.isin(known, range(num_classes)).all():
            wanted = f"expected {len(rows)} labels from 0 to {num_classes - 1}"
            raise BadInput(f"{wanted}, got shape {known.shape}, values {np.unique(known)}")
    distances = np.full(num_classes, np.nan)
    for c in range(num_classes):
        own, real = np.flatnonzero(labels == c), np.flatnonzero(labels_w == c)
        if min(len(own), len(real)) >= 2:
            distances[c] = distance(Chosen(feats, own), Chosen(feats_w, real))
    if np.isnan(distances).all():
        raise BadInput("no class has 2 images on both sides, as the distance within classes needs")
    return distances, float(np.nanmean(distances))
