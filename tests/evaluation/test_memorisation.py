"""Who returns training images is caught, who returns new ones is not: glyphs and real MNIST."""

from runtime.commandline import BadInput

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from evaluation import memory_figure
from evaluation.memorisation import Pixels, memorisation, nearness
from evaluation.memory_figure import save_pairs, side_by_side
from image_data import datasets, glyphs

N = 1000  # images of a generator


def draw(images, n, seed):
    return images[np.random.default_rng(seed).permutation(len(images))[:n]]


@pytest.fixture(scope="module", params=["glyphs", "mnist"])
def sets(request, tmp_path_factory):
    """Images `train`, N `new` ones and N `held_out`; their rows; judge(images) -> memorisation."""
    if request.param == "glyphs":
        train = glyphs.draw("train", range(4000))
        rest = draw(glyphs.draw("test", range(2 * N)), 2 * N, 1)  # else digits alternate
    else:
        source = request.getfixturevalue("shared_data") / "mnist"
        root = tmp_path_factory.mktemp("mnist")
        train = draw(datasets.load(source, root).images, 20_000, 0)
        rest = draw(datasets.load(source, root, split="test").images, 2 * N, 1)
    new, held_out = rest[:N], rest[N:]
    train_rows, held_rows = Pixels(train)[:], Pixels(held_out)[:]
    return SimpleNamespace(
        train=train,
        new=new,
        held_out=held_out,
        judge=lambda images: memorisation(Pixels(images)[:], train_rows, held_rows),
    )


def noisy(images, sigma, seed=2):
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_training_images_are_caught(sets):
    chosen = np.random.default_rng(3).permutation(len(sets.train))[:N]
    found = sets.judge(sets.train[chosen])
    assert found["share"] == 1 and found["near_share"] == 1 and found["copies"] == N
    assert found["z"] > 30 and found["p"] < 1e-100
    assert (sets.train[found["index"]] == sets.train[chosen]).all()


def test_held_out_images_are_not_caught(sets):
    """Three standard errors: the share of two sets of 1000 that do not differ has 0.0129."""
    found = sets.judge(sets.new)
    assert found["copies"] == 0
    assert abs(found["share"] - 0.5) < 3 * 0.0129 and found["p"] > 0.01
    assert found["near_p"] > 0.01


@pytest.mark.parametrize("sigma", [0.03, 0.1])
def test_training_images_with_noise_are_caught(sets, sigma):
    found = sets.judge(noisy(draw(sets.train, N, 4), sigma))
    assert found["share"] > 0.8 and found["p"] < 1e-100
    assert found["copies"] == 0  # none is exact: it is the distances that tell
    honest = sets.judge(noisy(sets.new, sigma))
    assert honest["p"] > 0.01  # noise alone brings no image nearer


def test_one_copy_among_ten_new_images_is_caught(sets):
    images = np.concatenate([draw(sets.train, N // 10, 5), sets.new[N // 10 :]])
    found, honest = sets.judge(images), sets.judge(sets.new)
    assert found["copies"] == N // 10 and found["near_share"] >= 0.1
    assert found["near_p"] < 1e-9 < 0.01 < honest["near_p"]
    # A tenth wins all of its comparisons instead of half: 0.05 more, give or take the images lost.
    assert found["share"] - honest["share"] == pytest.approx(0.05, abs=3 * 0.1**0.5 * 0.0129)


@pytest.mark.parametrize("spoil", ["blur", "darken"])
def test_new_images_of_less_contrast_are_not_accused(sets, spoil):
    """They lie nearer to all images, which plain distances would take for copying."""
    spoilt = sets.new * 0.8
    if spoil == "blur":
        spoilt = scipy.ndimage.gaussian_filter(sets.new.astype(np.float32), (0, 0.7, 0.7, 0))
    found = sets.judge(spoilt.astype(np.uint8))
    assert found["p"] > 0.01 and found["near_p"] > 0.01 and found["copies"] == 0


def test_the_writers_of_mnists_test_set_lie_as_far_as_those_of_its_training_set(
    shared_data, tmp_path
):
    """Other people wrote it, yet it serves as the held-out set of a thousand images."""
    real = datasets.load(shared_data / "mnist", tmp_path).images
    order = np.random.default_rng(6).permutation(len(real))
    test = datasets.load(shared_data / "mnist", tmp_path, split="test").images
    train, kept = real[order[:20_000]], real[order[-N:]]
    found = memorisation(*(Pixels(side) for side in (kept, train, draw(test, N, 7))))
    assert abs(found["share"] - 0.5) < 3 * 0.0129


def test_the_p_value_of_an_honest_generator_is_uniform():
    """400 independent repetitions; Kolmogorov's distance stays below 1.95 / √400 in 999 of 1000."""
    rng = np.random.default_rng(8)
    p = [memorisation(*(rng.normal(size=(n, 3)) for n in (40, 60, 50)))["p"] for _ in range(400)]
    found = scipy.stats.kstest(p, "uniform")
    assert found.statistic < 1.95 / 20


# --------------------------------------------------------------------------------- statistics


def squares(x, y):
    return ((x[:, None] - y) ** 2).sum(2)


def test_the_share_and_its_test_equal_scipy_and_all_pairs():
    rng = np.random.default_rng(10)
    generated, train, held_out = (rng.integers(0, 9, (n, 2)) / 4 for n in (80, 150, 110))
    found = memorisation(generated, train, held_out)

    def ratios(x):
        two = np.sqrt(np.sort(squares(x, train), 1)[:, :2])
        return np.where(two[:, 1] > 0, two[:, 0] / np.maximum(two[:, 1], 1e-300), 0)

    d, h = ratios(generated), ratios(held_out)
    np.testing.assert_allclose(found["ratio"], d, atol=1e-12)
    np.testing.assert_allclose(found["held_out"], h, atol=1e-12)
    nearer, equal = d[:, None] < h, d[:, None] == h
    assert equal.sum() > 500
    assert found["copies"] == (squares(generated, train).min(1) == 0).sum() > 10
    assert found["share"] == pytest.approx((nearer + 0.5 * equal).mean(), rel=1e-12)
    test = scipy.stats.mannwhitneyu(
        d, h, alternative="less", method="asymptotic", use_continuity=False
    )
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-9)
    assert scipy.stats.norm.sf(found["z"]) == pytest.approx(test.pvalue, rel=1e-9)
    nearest = squares(generated, train)[np.arange(80), found["index"]]
    np.testing.assert_allclose(nearest, squares(generated, train).min(1), atol=1e-12)


def test_the_chance_of_near_samples_is_exact():
    """All orders of 5 generated and 7 held-out ones counted: how many come before the second."""
    counts = np.zeros(6)
    for places in itertools.combinations(range(12), 5):
        held_out = [i for i in range(12) if i not in places]
        counts[sum(p < held_out[0] for p in places)] += 1
    tail = counts[::-1].cumsum()[::-1] / counts.sum()
    for near in range(6):
        rows = np.r_[np.full(near, 0.1), np.full(5 - near, 0.6)][:, None]
        found = memorisation(rows, np.array([[0.0], [1.0]]), np.full((7, 1), 0.3))
        assert found["near_p"] == pytest.approx(tail[near]) and found["near_share"] == near / 5


def test_a_copy_is_at_zero_also_of_a_row_that_is_there_twice():
    train = np.array([[0.0, 0], [0, 0], [1, 0], [4, 0]])
    ratio, distance, index = nearness(np.array([[0.0, 0], [1, 0], [3, 0]]), train)
    np.testing.assert_allclose(ratio, [0, 0, 0.5])
    np.testing.assert_allclose(distance, [0, 0, 1])
    assert index[0] in (0, 1) and list(index[1:]) == [2, 3]


def test_where_all_rows_are_equal_nothing_is_nearer():
    found = memorisation(np.ones((5, 2)), np.ones((9, 2)), np.ones((7, 2)))
    assert (found["share"], found["z"], found["p"], found["near_share"]) == (0.5, 0, 0.5, 0)
    assert found["copies"] == 5 and found["near_p"] == 1


def test_no_rows_or_other_rows_are_refused():
    rows = np.zeros((4, 3))
    for wrong, words in ((rows[:0], "at least"), (rows[:, :2], "one d"), (rows + np.nan, "finite")):
        for sides in ((wrong, rows, rows), (rows, wrong, rows), (rows, rows, wrong)):
            with pytest.raises(BadInput, match=words):
                memorisation(*sides)
    with pytest.raises(BadInput, match="at least 2"):
        memorisation(rows, rows[:1], rows)


def test_pixels_are_averaged_where_there_are_many():
    images = np.random.default_rng(14).integers(0, 256, (5, 32, 48, 3), np.uint8)
    rows, small = Pixels(images), Pixels(images[:, :8, :12])
    expected = images.reshape(5, 16, 2, 16, 3, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(rows[1:3], expected[1:3].reshape(2, -1), atol=1e-6)
    assert rows.shape == (5, 768) and small.shape == (5, 8 * 12 * 3) and len(small) == 5


# ------------------------------------------------------------------------------------- figure


def test_side_by_side_is_both_images_in_colour():
    gray, colour = np.full((4, 3, 1), 7, np.uint8), np.arange(36, dtype=np.uint8).reshape(4, 3, 3)
    both = side_by_side(gray, colour)
    assert both.shape == (4, 7, 3)
    assert (both[:, :3] == 7).all() and (both[:, 3] == 255).all() and (both[:, 4:] == colour).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_figure_shows_the_closest_pairs_nearest_first(tmp_path, monkeypatch, channels):
    rng, shown = np.random.default_rng(9), []
    generated = rng.integers(0, 256, (30, 8, 8, channels), np.uint8)
    train = rng.integers(0, 256, (50, 8, 8, channels), np.uint8)
    distances, indices = rng.uniform(1, 5, 30), rng.integers(0, 50, 30)

    def record(left, right):
        shown.append((left, right))
        return side_by_side(left, right)

    monkeypatch.setattr(memory_figure, "side_by_side", record)
    path = tmp_path / "new" / "pairs.png"
    save_pairs(path, generated, train, distances, indices, rng.uniform(2, 6, 40), count=11)
    order = np.argsort(distances)[:11]
    assert len(shown) == 11
    for (left, right), i in zip(shown, order, strict=True):
        assert (left == generated[i]).all() and (right == train[indices[i]]).all()
    with Image.open(path) as picture:
        assert picture.width == 1050 and np.asarray(picture.convert("L")).std() > 10


def test_the_figure_of_few_samples_that_are_all_copies(tmp_path):
    images = np.random.default_rng(10).integers(0, 256, (3, 8, 8, 1), np.uint8)
    save_pairs(tmp_path / "p.png", images, images, np.zeros(3), np.arange(3), np.zeros(2))
    assert (tmp_path / "p.png").stat().st_size > 1000
