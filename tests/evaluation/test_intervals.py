"""intervals.py: how sure a distance is, what endless images would give, against known truths."""

from runtime.commandline import BadInput

import numpy as np
import pytest

from eval_fid import distance_from, frechet_distance, statistics
from evaluation.intervals import frechet_interval as interval_of

D = 8
SCALE = np.arange(1, D + 1) ** -0.5
REFERENCE = np.zeros(D), np.diag(SCALE**2)
SHIFT, STRETCH = 0.3, 1.2
TRUTH = D * SHIFT**2 + ((STRETCH - 1) ** 2 * SCALE**2).sum()  # between diagonal covariances


def frechet_interval(feats, mu_w, sigma_w, **options):
    return interval_of(feats, distance_from(mu_w, sigma_w), **options)


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


def test_endless_images_are_foreseen_without_bias(intervals):
    values = np.array([found["frechet_infinity"] for found in intervals])
    bias = np.mean([found["frechet"] for found in intervals]) - TRUTH
    chance = values.std(ddof=1) / np.sqrt(len(values))
    assert bias > 3 * chance and abs(values.mean() - TRUTH) < 2 * chance
    errors = [found["standard_error"] for found in intervals]
    assert np.mean(errors) == pytest.approx(values.std(ddof=1), rel=0.15)


@pytest.mark.parametrize("per_feature", [2.5, 10])
def test_with_few_images_the_foreseen_distance_is_far_nearer_to_the_truth(per_feature):
    rng, d = np.random.default_rng(1), 64
    scale = np.arange(1, d + 1) ** -0.5
    truth = ((0.1**2 + 0.1**2) * scale**2).sum()  # the shift, and the stretch
    rows = scale * (0.1 + 1.1 * rng.normal(size=(40, int(per_feature * d), d)))
    found = [frechet_interval(r, np.zeros(d), np.diag(scale**2)) for r in rows]
    plain, foreseen = (np.mean([f[k] for f in found]) for k in ("frechet", "frechet_infinity"))
    assert plain > 1.5 * truth and abs(foreseen - truth) < (plain - truth) / 8


def test_the_line_over_one_over_n_is_read_off_at_zero():
    rows, groups, seed = draws(1, 200)[0], 10, 5
    found = frechet_interval(rows, *REFERENCE, groups=groups, seed=seed)
    left = [plain(np.delete(rows, part, axis=0)) for part in parts_of(200, groups, seed)]
    line = np.polyfit([1 / 200, 1 / 180], [plain(rows), np.mean(left)], 1)
    assert found["frechet_infinity"] == pytest.approx(line[1], rel=1e-9)


def test_equal_distributions_are_foreseen_at_zero_on_average():
    rng = np.random.default_rng(2)
    rows = SCALE * rng.normal(size=(60, 400, D))
    found = [frechet_interval(r, *REFERENCE) for r in rows]
    plain, foreseen = (np.array([f[k] for f in found]) for k in ("frechet", "frechet_infinity"))
    assert foreseen.min() < 0 and abs(foreseen.mean()) < plain.mean() / 5


def test_fewer_images_than_features_are_no_obstacle():
    rng = np.random.default_rng(3)
    rows, real = rng.normal(size=(90, 64)), rng.normal(0.5, 1, size=(500, 64))
    reference = statistics(real)
    found = frechet_interval(rows, *reference)
    direct = frechet_distance(*statistics(rows), *reference)
    assert found["frechet"] == pytest.approx(direct, rel=1e-4)
    assert 0 < found["standard_error"] < 0.1 * direct


def test_rows_may_stay_on_disk_in_float32(tmp_path):
    rows = draws(1, 300)[0].astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    on_disk = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert frechet_interval(on_disk, *REFERENCE) == frechet_interval(rows, *REFERENCE)


def test_what_cannot_be_estimated_is_refused():
    estimate, rows = frechet_interval, draws(1, 100)[0]
    with pytest.raises(BadInput, match="at least 80 images, got 79"):
        estimate(rows[:79], *REFERENCE)
    with pytest.raises(BadInput, match="one d"):
        estimate(rows[:, :3], *REFERENCE)
    with pytest.raises(BadInput, match="finite"):
        estimate(np.where(rows > 2, np.nan, rows), *REFERENCE)
    with pytest.raises(BadInput, match="covariance"):
        estimate(rows, REFERENCE[0], -REFERENCE[1])
