"""class_distance.py: each class is compared with its own, whatever the distance."""

from runtime.commandline import BadInput

import numpy as np
import pytest

from eval_fid import frechet_distance, rows_distance, statistics
from evaluation.class_distance import intra_class
from tests.cases.frechet import of_features


def test_each_class_is_compared_with_its_own():
    rng = np.random.default_rng(9)
    real_labels = rng.integers(0, 3, 900)
    labels = rng.integers(0, 3, 600)
    real = rng.normal(size=(900, 5)) + 10 * real_labels[:, None]
    feats = rng.normal(size=(600, 5)) + 10 * labels[:, None]
    feats[labels == 1] += 2.0
    each, mean = intra_class(feats, labels, real, real_labels, 3, rows_distance)
    for c in range(3):
        assert each[c] == pytest.approx(of_features(feats[labels == c], real[real_labels == c]))
    assert each[1] == pytest.approx(5 * 2.0**2, rel=0.1) and max(each[0], each[2]) < 0.3
    assert mean == pytest.approx(each.mean())
    # Labels that tell nothing: the classes together are alike, and each one is not.
    shuffled, _ = intra_class(feats, rng.permutation(labels), real, real_labels, 3, rows_distance)
    assert min(shuffled) > 10 > frechet_distance(*statistics(feats), *statistics(real))


def test_a_class_that_is_missing_on_a_side_is_nan_and_left_out():
    rng = np.random.default_rng(10)
    feats, real = rng.normal(size=(2, 40, 3))
    labels = np.arange(40) % 2
    labels_w = np.where(np.arange(40) == 0, 2, labels)  # class 2: a single image, class 3: none
    each, mean = intra_class(feats, labels, real, labels_w, 4, rows_distance)
    assert np.isnan(each[2:]).all() and mean == pytest.approx(each[:2].mean())
    for wrong in (labels + 3, labels[:-1], labels - 1, labels + 0.5):
        with pytest.raises(BadInput, match="labels from 0 to 3"):
            intra_class(feats, wrong, real, labels_w, 4, rows_distance)
    with pytest.raises(BadInput, match="no class"):
        intra_class(feats, labels, real, labels + 2, 4, rows_distance)
