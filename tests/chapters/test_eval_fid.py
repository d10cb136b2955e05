"""eval_fid.py: statistics, Fréchet distance and inception score, where the answer is known.

Against published programs: tests/evaluation/test_references.py. The command:
test_eval_fid_command.py; within training: test_evaluator.py.
"""

from runtime.commandline import BadInput

import math

import numpy as np
import pytest
import scipy.linalg

from eval_fid import frechet_distance, inception_score, mixed_score, statistics
from tests.cases.frechet import of_features

# ----------------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_streamed_moments_equal_numpy(chunk):
    rng = np.random.default_rng(5)
    rows = (100 + rng.normal(size=(501, 9)) @ rng.normal(size=(9, 9))).astype(np.float32)
    mu, sigma = statistics(rows, chunk)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(mu, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------- the Fréchet distance


METHODS = pytest.mark.parametrize("method", ["eigen", "sqrtm"])


def random_covariance(rng, d, rank=None):
    a = rng.normal(size=(d, rank or 2 * d))
    return a @ a.T / a.shape[1]


@METHODS
@pytest.mark.parametrize("rank", [None, 40])
def test_equal_statistics_are_at_distance_zero(method, rank):
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=128), random_covariance(rng, 128, rank)
    bound = (1e-9 if method == "sqrtm" and rank is None else 1e-5) * np.trace(sigma)
    bound = 1e-13 * np.trace(sigma) if method == "eigen" else bound  # no square root of rounding
    assert 0 <= frechet_distance(mu, sigma, mu, sigma, method=method) <= bound


@METHODS
def test_a_shifted_mean_costs_its_squared_length(method):
    rng = np.random.default_rng(1)
    sigma, shift = random_covariance(rng, 20), rng.normal(size=20)
    got = frechet_distance(np.zeros(20), sigma, shift, sigma, method=method)
    assert got == pytest.approx((shift**2).sum(), rel=1e-9)


@METHODS
def test_one_dimension(method):
    # Two normal distributions on a line: (m1 - m2)² + (s1 - s2)².
    got = frechet_distance([1.0], [[4.0]], [-2.0], [[0.25]], method=method)
    assert got == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2, rel=1e-12)


@METHODS
def test_diagonal_covariances(method):
    rng = np.random.default_rng(2)
    s1, s2 = rng.uniform(0.1, 3, (2, 50))
    zero = np.zeros(50)
    got = frechet_distance(zero, np.diag(s1**2), zero, np.diag(s2**2), method=method)
    assert got == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("digits", [2, 6, 10, 14])
def test_covariances_that_commute_however_badly_conditioned(digits):
    # With one set of eigenvectors the distance is Σ (√λ − √λ_w)².
    rng, d = np.random.default_rng(3), 200
    axes, _ = np.linalg.qr(rng.normal(size=(d, d)))
    values = 10 * np.logspace(0, -digits, d)
    others = 1.05 * values
    sigma, sigma_w = ((axes * v) @ axes.T for v in (values, others))
    got = frechet_distance(np.zeros(d), sigma, np.zeros(d), sigma_w)
    assert got == pytest.approx(((values**0.5 - others**0.5) ** 2).sum(), rel=1e-7)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(300, 400, 2), (300, 400, 17), (500, 300, 128), (40, 300, 128), (40, 50, 128)]
)
def test_features_fewer_and_more_than_their_number(n, m, d):
    rng = np.random.default_rng(d)
    scale = np.arange(1, d + 1) ** -0.7
    x, y = rng.normal(size=(n, d)) * scale, 0.1 + 0.9 * rng.normal(size=(m, d)) * scale[::-1]
    sides = [*statistics(x), *statistics(y)]
    expected = of_features(x, y)
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*sides[2:], *sides[:2]) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*sides, method="sqrtm") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_nearly_equal_sets_of_fewer_images_than_features(seed):
    """A distance so small that squared singular values would be off by 0.01 to 2 %."""
    rng, d = np.random.default_rng(seed), 300
    scale = np.arange(1, d + 1) ** -2.0
    x = rng.normal(size=(150, d)) * scale
    y = x + 0.01 * rng.normal(size=(150, d)) * scale
    got = frechet_distance(*statistics(x), *statistics(y))
    assert got == pytest.approx(of_features(x, y), rel=1e-6)


def test_statistics_kept_in_float32():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 60, 100))
    sides = [v.astype(np.float32) for v in (*statistics(x), *statistics(y))]
    assert np.linalg.eigvalsh(sides[1].astype(np.float64)).min() < -1e-9  # of rank 59
    assert frechet_distance(*sides) == pytest.approx(of_features(x, y), rel=1e-4)


@METHODS
@pytest.mark.parametrize("zeros", [1, 2])
def test_a_covariance_of_zeros(method, zeros):
    rng = np.random.default_rng(4)
    sigma = random_covariance(rng, 8) * (zeros == 1)
    zero = np.zeros(8)
    got = frechet_distance(zero, np.zeros((8, 8)), zero, sigma, method=method)
    assert got == pytest.approx(np.trace(sigma), rel=1e-9)


def test_a_failed_square_root_is_tried_again_beside_the_singular_point(monkeypatch):
    """Some versions of sqrtm answer an exactly singular matrix with NaN."""
    plain = scipy.linalg.sqrtm

    def fragile(a):
        whole = np.linalg.matrix_rank(a, tol=1e-20) == len(a)
        return plain(a) if whole else np.full_like(a, np.nan)

    monkeypatch.setattr(scipy.linalg, "sqrtm", fragile)
    sigma, zero = np.diag([4.0, 1.0, 0.0]), np.zeros(3)
    got = frechet_distance(zero, sigma, zero, np.eye(3), method="sqrtm")
    assert got == pytest.approx((2 - 1) ** 2 + 0 + 1, rel=1e-5)
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda a: np.full_like(a, np.nan))
    with pytest.raises(BadInput, match="eigen"):
        frechet_distance(zero, sigma, zero, np.eye(3), method="sqrtm")


@METHODS
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("mu", "sigma", "word"),
    [
        (np.zeros(2), np.diag([1.0, -1.0]), "covariance"),
        (np.zeros(2), np.diag([1.0, -1e-5]), "covariance"),
        (np.zeros(2), np.diag([-1.0, -1e-9]), "covariance"),
        (np.zeros(2), np.diag([1.0, np.nan]), "finite"),
        (np.array([0, np.inf]), np.eye(2), "finite"),
        (np.zeros(3), np.eye(3), "\\(d,\\)"),
        (np.zeros(3), np.eye(2), "\\(d,\\)"),
        (np.zeros((1, 2)), np.eye(2), "\\(d,\\)"),
    ],
    ids=["negative", "slightly", "all-negative", "nan", "inf", "other-d", "sigma-d", "mu-2d"],
)
def test_what_is_no_statistics_is_refused(mu, sigma, word, swap, method):
    sides = [(mu, sigma), (np.zeros(2), np.diag([1.0, 0.0]))]
    first, second = sides[::-1] if swap else sides
    with pytest.raises(BadInput, match=word):
        frechet_distance(*first, *second, method=method)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="eigen"):
        frechet_distance([0.0], [[1.0]], [0.0], [[1.0]], method="fast")


# ------------------------------------------------------------------------------ the inception score


def test_logits_that_say_nothing_score_one():
    assert inception_score(np.full((50, 7), 3.0)) == pytest.approx((1.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("sure", [60.0, 1e4])
def test_all_classes_equally_often_score_their_number(sure):
    logits = sure * np.eye(10)[np.arange(200) % 10]  # e⁻⁶⁰ is small, e⁻¹⁰⁰⁰⁰ is zero
    assert inception_score(logits, splits=4) == pytest.approx((10.0, 0.0), abs=1e-9)


def test_one_class_alone_scores_one_however_sure():
    assert inception_score(1e4 * np.eye(10)[np.zeros(40, int)])[0] == pytest.approx(1.0, abs=1e-12)


def test_a_score_in_closed_form_and_its_spread_over_the_parts():
    # A half of the images is sure of class 0, a half of class 1 with odds 3 : 1.
    logits = np.log([[1.0, 1e-300], [0.25, 0.75]])[np.arange(80) % 2]
    p = np.array([0.625, 0.375])
    score = math.exp((-math.log(p[0]) + 0.25 * math.log(0.25 / p[0]) + 0.75 * math.log(2)) / 2)
    assert inception_score(logits, splits=2) == pytest.approx((score, 0.0), abs=1e-12)
    halves = np.concatenate([logits, np.zeros((80, 2))])  # the second part scores 1
    expected = ((score + 1) / 2, (score - 1) / 2)
    assert inception_score(halves, splits=2) == pytest.approx(expected, rel=1e-12)


def test_logits_that_cannot_be_scored_are_refused():
    with pytest.raises(BadInput, match="10 images, got 9"):
        inception_score(np.zeros((9, 3)))
    with pytest.raises(BadInput, match="finite"):
        inception_score(np.full((10, 3), np.nan))


@pytest.mark.parametrize(
    ("n", "parts"),
    [(20, 1), (999, 1), (1000, 2), (4999, 9), (5000, 10), (50_000, 10)],
)
def test_the_parts_of_the_score_fall_with_the_number_of_images(n, parts):
    """Twenty images in ten parts could score 2 at most, however sure and varied."""
    logits = 60 * np.eye(10, dtype=np.float32)[np.arange(n) // 2 % 10]  # sorted in part
    mean, std, found = mixed_score(logits)
    assert found == parts and (std is None) == (parts == 1)
    if n == 20:
        assert mean == pytest.approx(10.0, abs=1e-9)
    else:  # parts are drawn: not all of them have as many of each class
        assert 9.7 < mean <= 10.0
