"""Who returns training images is caught, who returns new ones is not: on glyphs and on real MNIST.

Distances are between pixels in 0..1, averaged over 2×2, which keeps these tests fast.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

import data
from metrics import memorisation
from support import glyphs, memory_figure
from support.memory_figure import save_pairs, side_by_side

N = 1000  # images of a generator


def rows(images):
    """uint8 (N, H, W, 1) -> the means of 2×2 pixels, float32 (N, H W / 4) in 0..1."""
    n, h, w, _ = images.shape
    return images.reshape(n, h // 2, 2, w // 2, 2).mean((2, 4)).reshape(n, -1).astype("f4") / 255


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
        train = draw(data.load(source, root).images, 20_000, 0)
        rest = draw(data.load(source, root, split="test").images, 2 * N, 1)
    new, held_out = rest[:N], rest[N:]
    train_rows, held_rows = rows(train), rows(held_out)
    return SimpleNamespace(
        train=train, new=new, held_out=held_out,
        judge=lambda images: memorisation(rows(images), train_rows, held_rows),
    )  # fmt: skip


def noisy(images, sigma, seed=2):
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def chance_of_near(count):
    """Of as many of N honest images nearer than the 11th nearest of N held-out ones, or more.

    Both are drawn alike, so how many come before that one is a Pólya urn's: beta-binomial.
    """
    return scipy.stats.betabinom.sf(count - 1, N, 11, N - 10)


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
    assert chance_of_near(round(N * found["near_share"])) > 0.01


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
    assert chance_of_near(round(N * found["near_share"])) < 1e-9
    assert chance_of_near(round(N * honest["near_share"])) > 0.01
    # A tenth wins all of its comparisons instead of half: 0.05 more, give or take the images lost.
    assert found["share"] - honest["share"] == pytest.approx(0.05, abs=3 * 0.1**0.5 * 0.0129)


def test_blurred_new_images_raise_the_share_though_few_are_close(sets):
    """Less contrast brings an image nearer to all others: a share above half is no proof."""
    blurred = scipy.ndimage.gaussian_filter(sets.new.astype(np.float32), (0, 0.7, 0.7, 0))
    found, sharp = sets.judge(blurred.astype(np.uint8)), sets.judge(sets.new)
    assert found["share"] > sharp["share"] + 0.02
    assert found["near_share"] < 0.05 and found["copies"] == 0


def test_the_writers_of_mnists_test_set_lie_as_far_as_those_of_its_training_set(
    shared_data, tmp_path
):
    """Other people wrote it, yet it serves as the held-out set of a thousand images."""
    real = data.load(shared_data / "mnist", tmp_path).images
    order = np.random.default_rng(6).permutation(len(real))
    test = data.load(shared_data / "mnist", tmp_path, split="test").images
    train, kept = real[order[:20_000]], real[order[-N:]]
    found = memorisation(rows(kept), rows(train), rows(draw(test, N, 7)))
    assert abs(found["share"] - 0.5) < 3 * 0.0129


def test_the_p_value_of_an_honest_generator_is_uniform():
    """400 independent repetitions; Kolmogorov's distance stays below 1.95 / √400 in 999 of 1000."""
    rng = np.random.default_rng(8)
    p = [memorisation(*(rng.normal(size=(n, 3)) for n in (40, 60, 50)))["p"] for _ in range(400)]
    found = scipy.stats.kstest(p, "uniform")
    assert found.statistic < 1.95 / 20


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
