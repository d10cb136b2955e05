"""moments.py: parts of rows, joined and taken away again, are as the whole in NumPy."""

import numpy as np
import pytest

from eval_fid import frechet_distance, statistics
from evaluation.moments import Moments, joined, moments


def test_merged_parts_equal_the_whole_in_any_order():
    rng = np.random.default_rng(6)
    rows = rng.normal(5, 2, size=(300, 4))
    parts = [Moments(4) for _ in range(4)]  # the last one stays empty
    for part, piece in zip(parts, np.split(rows, [11, 200]), strict=False):
        part.update(piece)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        whole = joined([parts[i] for i in order])
        assert whole.n == 300
        np.testing.assert_allclose(whole.mu_sigma()[0], rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(whole.mu_sigma()[1], np.cov(rows, rowvar=False), rtol=1e-10)


def test_what_was_added_can_be_taken_away():
    rng = np.random.default_rng(7)
    rows = rng.normal(50, 1, size=(300, 4))
    rest = moments(rows).without(moments(rows, which=np.arange(40, 90)))
    kept = np.delete(rows, np.arange(40, 90), axis=0)
    assert rest.n == 250
    np.testing.assert_allclose(rest.mu_sigma()[0], kept.mean(0), rtol=1e-13)
    np.testing.assert_allclose(rest.mu_sigma()[1], np.cov(kept, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_distance_does_not_depend_on_how_many_processes_share_the_images(parts):
    rng = np.random.default_rng(8)
    rows, real = rng.normal(size=(2, 400, 30))
    shares = [moments(rows[rank::parts]) for rank in range(parts)]
    got = frechet_distance(*joined(shares).mu_sigma(), *statistics(real))
    whole = frechet_distance(rows.mean(0), np.cov(rows, rowvar=False), *statistics(real))
    assert got == pytest.approx(whole, rel=1e-11)
