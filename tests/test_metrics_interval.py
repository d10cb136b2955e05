"""metrics.py: how sure a distance is, and what endless images would give, against known truths."""

import numpy as np
import pytest

import metrics
from metrics import frechet_distance, frechet_infinity, frechet_interval, statistics
from runtime import BadInput

D = 8
SCALE = np.arange(1, D + 1) ** -0.5
REFERENCE = np.zeros(D), np.diag(SCALE**2)
SHIFT, STRETCH = 0.3, 1.2
TRUTH = D * SHIFT**2 + ((STRETCH - 1) ** 2 * SCALE**2).sum()  # between diagonal covariances


def draws(count, n, seed=0):
    rng = np.random.default_rng(seed)
    return SHIFT + STRETCH * SCALE * rng.normal(size=(count, n, D))


def parts_of(n, groups, seed):
    return np.array_split(np.random.default_rng(seed).permutation(n), groups)


def plain(rows):
    return frechet_distance(rows.mean(0), np.cov(rows, rowvar=False), *REFERENCE)


@pytest.fixture(scope="module")
def intervals():
    return [frechet_interval(rows, *REFERENCE) for rows in draws(200, 1000)]


@pytest.fixture(scope="module")
def extrapolations():
    return [frechet_infinity(rows, *REFERENCE) for rows in draws(150, 400)]


def test_the_standard_error_is_the_spread_over_new_images(intervals):
    spread = np.std([found["frechet"] for found in intervals], ddof=1)
    errors = [found["standard_error"] for found in intervals]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)  # the spread is known to 5 %
    assert np.std(errors) < 0.3 * spread  # so is a single one: 20 groups give 16 %


def test_the_interval_holds_what_such_sets_give_on_average(intervals):
    mean = np.mean([found["frechet"] for found in intervals])
    held = np.mean([low <= mean <= high for low, high in (f["interval"] for f in intervals)])
    assert 0.90 <= held <= 0.99  # 0.95, known to 0.016


def test_left_out_groups_are_as_if_they_had_never_been():
    rows, (groups, seed) = draws(1, 203)[0], (20, 5)
    found = frechet_interval(rows, *REFERENCE, groups=groups, seed=seed)
    left = [plain(np.delete(rows, part, axis=0)) for part in parts_of(203, groups, seed)]
    error = np.sqrt((groups - 1) / groups * ((left - np.mean(left)) ** 2).sum())
    assert found["frechet"] == pytest.approx(plain(rows), rel=1e-10)
    assert found["standard_error"] == pytest.approx(error, rel=1e-9)
    reach = 2.093 * error  # Student's t with 19 degrees of freedom, from a table
    assert found["interval"] == pytest.approx([plain(rows) - reach, plain(rows) + reach], rel=1e-4)


def test_the_extrapolation_lies_far_nearer_to_the_truth_than_the_plain_distance(extrapolations):
    biased = np.mean([plain(rows) for rows in draws(150, 400)]) - TRUTH
    values = np.array([found["frechet_infinity"] for found in extrapolations])
    left = values.mean() - TRUTH
    assert biased > 0.02 and abs(left) < biased / 5
    assert abs(left) < 3 * values.std() / np.sqrt(len(values))


def test_the_extrapolation_knows_its_error(extrapolations):
    spread = np.std([found["frechet_infinity"] for found in extrapolations], ddof=1)
    errors = [found["standard_error"] for found in extrapolations]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)
    held = np.mean([low <= TRUTH <= high for low, high in (f["interval"] for f in extrapolations)])
    assert 0.90 <= held <= 0.99


def test_the_line_goes_through_all_halves_and_quarters():
    rows, groups = draws(1, 240)[0], 8
    parts = parts_of(240, groups, 3)

    def intercept(parts):
        points = []
        for k in (1, 2, 4):
            chosen = [np.concatenate(parts[i : i + 8 // k]) for i in range(0, 8, 8 // k)]
            numbers = np.mean([1 / len(c) for c in chosen])
            points.append((numbers, np.mean([plain(rows[c]) for c in chosen])))
        return np.polyfit(*np.transpose(points), 1)[1]

    none = np.array([], np.int64)
    left = [intercept([none if g == h else parts[h] for h in range(groups)]) for g in range(groups)]
    found = frechet_infinity(rows, *REFERENCE, groups=groups, seed=3)
    assert found["frechet_infinity"] == pytest.approx(intercept(parts), rel=1e-8)
    error = np.sqrt((groups - 1) / groups * ((left - np.mean(left)) ** 2).sum())
    assert found["standard_error"] == pytest.approx(error, rel=1e-6)


def test_equal_distributions_extrapolate_to_zero_on_average():
    rng = np.random.default_rng(2)
    rows = SCALE * rng.normal(size=(60, 400, D))
    values = [frechet_infinity(r, *REFERENCE)["frechet_infinity"] for r in rows]
    assert min(values) < 0 and abs(np.mean(values)) < np.mean([plain(r) for r in rows]) / 5


def test_fewer_images_than_features_are_no_obstacle():
    rng = np.random.default_rng(3)
    rows, real = rng.normal(size=(90, 64)), rng.normal(0.5, 1, size=(500, 64))
    reference = statistics(real)
    found = frechet_interval(rows, *reference)
    direct = frechet_distance(*statistics(rows), *reference)
    assert found["frechet"] == pytest.approx(direct, rel=1e-4)
    assert 0 < found["standard_error"] < 0.1 * direct
    assert np.isfinite(frechet_infinity(rows, *reference)["frechet_infinity"])


def test_rows_may_stay_on_disk_in_float32(tmp_path):
    rows = draws(1, 300)[0].astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    on_disk = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert frechet_interval(on_disk, *REFERENCE) == frechet_interval(rows, *REFERENCE)


@pytest.mark.parametrize("estimate", [frechet_interval, frechet_infinity])
def test_what_cannot_be_estimated_is_refused(estimate):
    rows = draws(1, 100)[0]
    with pytest.raises(BadInput, match="at least .* got 30"):
        estimate(rows[:30], *REFERENCE)
    with pytest.raises(BadInput, match="one d"):
        estimate(rows[:, :3], *REFERENCE)
    with pytest.raises(BadInput, match="finite"):
        estimate(np.where(rows > 2, np.nan, rows), *REFERENCE)
    with pytest.raises(BadInput, match="covariance"):
        estimate(rows, REFERENCE[0], -REFERENCE[1])


def test_halves_and_quarters_need_whole_groups():
    with pytest.raises(ValueError, match="multiple of 4"):
        metrics.frechet_infinity(draws(1, 100)[0], *REFERENCE, groups=10)
