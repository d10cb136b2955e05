"""kid.py: the kernel distance in closed form, and its error over new images."""

import math

import numpy as np
import pytest

from evaluation.kid import kernel_distance


def test_two_points_in_closed_form():
    # k(x, y) = (x·y / d + 1)³ of constant features a, b: k(a, a) + k(b, b) - 2 k(a, b).
    a, b = np.full((20, 4), 1.0), np.full((30, 4), 2.0)
    expected = (1 + 1) ** 3 + (4 + 1) ** 3 - 2 * (2 + 1) ** 3
    assert kernel_distance(a, b, subsets=3, subset_size=10) == pytest.approx((expected, 0.0))


def test_normal_distributions_on_a_line_in_closed_form():
    # In one dimension the kernel is Σ C(3, k) xᵏ yᵏ, so the distance Σ C(3, k) (E xᵏ - E yᵏ)².
    rng = np.random.default_rng(11)
    x, y = rng.normal(0.5, 1, (4000, 1)), rng.normal(0, 2, (3000, 1))
    mean, second, third = 0.5, 1.25 - 4, 0.5**3 + 3 * 0.5
    expected = 3 * mean**2 + 3 * second**2 + third**2
    got, error = kernel_distance(x, y, subsets=50, subset_size=500)
    assert abs(got - expected) < 3 * error < expected


def test_all_rows_at_once_equal_the_double_sums_of_the_definition():
    rng = np.random.default_rng(12)
    x, y = rng.normal(size=(12, 3)), rng.normal(0.3, 1, size=(12, 3))

    def mean(a, b, same):
        pairs = [(i, j) for i in range(12) for j in range(12) if not (same and i == j)]
        return np.mean([(a[i] @ b[j] / 3 + 1) ** 3 for i, j in pairs])

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y, subsets=1)[0] == pytest.approx(expected, rel=1e-12)


def test_equal_distributions_are_at_zero_on_average():
    rng = np.random.default_rng(13)
    draws = rng.normal(size=(150, 2, 120, 8))
    got = np.array([kernel_distance(x, y, subsets=4, subset_size=60) for x, y in draws])
    spread = got[:, 0].std(ddof=1)
    assert abs(got[:, 0].mean()) < 3 * spread / math.sqrt(len(got))
    assert (got[:, 0] < 0).any() and got[:, 1].mean() > spread  # on the safe side where alike


def test_the_standard_error_is_the_spread_over_new_images():
    rng = np.random.default_rng(14)
    draws = zip(rng.normal(0.3, 1, (200, 150, 8)), rng.normal(size=(200, 250, 8)), strict=True)
    got = np.array([kernel_distance(x, y, subsets=10, subset_size=150) for x, y in draws])
    assert got[:, 1].mean() == pytest.approx(got[:, 0].std(ddof=1), rel=0.2)


def test_the_same_seed_draws_the_same_subsets():
    rng = np.random.default_rng(15)
    x, y = rng.normal(size=(2, 100, 4))
    one, again, other = (
        kernel_distance(x, y, subsets=3, subset_size=20, seed=s) for s in (1, 1, 2)
    )
    assert one == again != other
