"""bench/distortions.py: each distortion does what it says, and the distance rises with each."""

from runtime.commandline import BadInput

import importlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from image_data import glyphs

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), np.uint8)
OTHERS = 255 - IMAGES
NAMES = ("noise", "blur", "rectangles", "swirl", "salt and pepper", "contamination")


@pytest.fixture(scope="module")
def bench():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["replaced", *sys.path])
        yield importlib.import_module("bench.distortions")


@pytest.fixture
def distort(bench):
    """distort(name, images, alpha): from the same seed each time."""

    def distort(name, images, alpha, seed=0):
        rng = np.random.default_rng(seed)
        others = OTHERS if images is IMAGES else images
        return bench.STUDY[name][0](images, alpha, rng, others)

    return distort


class Filters:
    """An extractor: eight random filters of 5×5 pixels, rectified, and the mean of each quarter."""

    device, protocol, feature_hash = torch.device("cpu"), "random filters", "00000000"

    def __call__(self, images):
        x = images.permute(0, 3, 1, 2) / 127.5 - 1  # (B, C, H, W)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(8, x.shape[1], 5, 5, generator=generator) / (25 * x.shape[1]) ** 0.5
        x = F.relu(F.conv2d(x, weights, padding=2))  # (B, 8, H, W)
        return F.adaptive_avg_pool2d(x, 2).flatten(1), None  # (B, 32)


# ------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_new_images_of_the_same_form_and_the_given_ones_untouched(distort, bench, name, channels):
    assert tuple(bench.STUDY) == NAMES
    images = IMAGES[..., :channels].copy()
    before, got = images.copy(), distort(name, images, bench.STUDY[name][1][-1])
    assert got.dtype == np.uint8 and got.shape == images.shape
    assert (images == before).all() and not np.shares_memory(got, images)


@pytest.mark.parametrize("name", NAMES)
def test_level_zero_changes_nothing(distort, bench, name):
    assert bench.STUDY[name][1][0] == 0
    assert (distort(name, IMAGES, 0) == IMAGES).all()


@pytest.mark.parametrize("name", NAMES)
def test_four_rising_levels_and_each_changes_more_than_the_one_before(distort, bench, name):
    _, alphas, _ = bench.STUDY[name]
    assert len(alphas) == 5 and sorted(alphas) == list(alphas)
    smooth = np.array(glyphs.draw("test", range(40)))
    others = smooth[::-1]
    change = [
        abs(bench.STUDY[name][0](smooth, alpha, np.random.default_rng(0), others) - 1.0 * smooth)
        for alpha in alphas
    ]
    means = [c.mean() for c in change]
    assert all(less < more for less, more in zip(means, means[1:], strict=False)), means


@pytest.mark.parametrize("name", ["noise", "rectangles", "salt and pepper", "contamination"])
def test_the_same_seed_gives_the_same_and_another_seed_another(distort, name):
    first, again, other = (distort(name, IMAGES, 0.25, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


# ---------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_noise_has_the_mean_and_variance_of_the_mixture(distort, alpha):
    gray = np.full((30, 32, 32, 3), 60, np.uint8)
    got = distort("noise", gray, alpha).astype(np.float64)
    n = gray.size
    # Rounding to whole numbers adds a variance of 1/12. Five standard errors on either side.
    variance = (alpha * 31.875) ** 2 + 1 / 12
    assert got.mean() == pytest.approx(
        (1 - alpha) * 60 + alpha * 127.5, abs=5 * (variance / n) ** 0.5
    )
    assert got.var() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)
    neighbours = (got[:, 1:] - got.mean()) * (got[:, :-1] - got.mean())
    assert abs(neighbours.mean()) < 5 * variance / neighbours.size**0.5


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4])
def test_blur_equals_a_sum_with_gaussian_weights_in_double_precision(distort, sigma):
    image = IMAGES[:1].astype(np.float64)
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (1, 2):  # "symmetric": d c b a | a b c d, the edge pixel itself is repeated
        pads = [(reach, reach) if axis == a else (0, 0) for a in range(4)]
        padded, size = np.pad(image, pads, mode="symmetric"), image.shape[axis]
        image = sum(w * padded.take(range(i, i + size), axis) for i, w in enumerate(weights))
    got = distort("blur", IMAGES[:1], sigma).astype(np.float64)
    assert abs(got - image).max() <= 0.5 + 1e-3  # half a gray level is what rounding may change


def test_rectangles_are_black_whole_and_of_the_size_asked_for(distort, bench, monkeypatch):
    white = np.full((2000, 24, 32, 1), 255, np.uint8)
    for alpha, (h, w) in {0.25: (6, 8), 0.5: (12, 16)}.items():
        got = distort("rectangles", white, alpha)
        assert set(np.unique(got)) == {0, 255}
        black = (got == 0).sum((1, 2, 3))
        assert black.min() >= h * w and black.max() <= 5 * h * w
        # A pixel stays white if five independent rectangles miss it. Along one side of n pixels,
        # of n - s + 1 places those that cover pixel i.
        sides = []
        for n, s in ((24, h), (32, w)):
            i = np.arange(n)
            first, last = np.maximum(0, i - s + 1), np.minimum(i, n - s)
            sides.append((last - first + 1) / (n - s + 1))
        missed = (1 - np.outer(*sides)) ** 5
        share = (got == 255).mean((0, 3))
        error = np.sqrt(missed * (1 - missed) / len(white))
        assert (abs(share - missed) < 5 * error + 1e-12).all()


def test_larger_rectangles_cover_the_smaller_ones(distort):
    white = np.full((50, 32, 32, 1), 255, np.uint8)
    black = [distort("rectangles", white, alpha) == 0 for alpha in (0.125, 0.25, 0.5, 0.75)]
    for small, large in zip(black, black[1:], strict=False):
        assert (large | ~small).all()


def smooth_picture(side):
    y, x = np.mgrid[:side, :side] / side
    picture = 127 + 60 * np.sin(5 * y + 2 * x) + 50 * np.cos(4 * x - 3 * y)
    return picture[None, :, :, None].round().astype(np.uint8)


def test_swirl_takes_each_point_from_where_the_formula_says(distort):
    side, alpha = 33, 2.0
    picture, centre = smooth_picture(side), (side - 1) / 2
    got = distort("swirl", picture, alpha)[0, :, :, 0]
    assert got[16, 16] == picture[0, 16, 16, 0]  # the centre stays
    for row, column in [(16, 17), (16, 20), (10, 16), (5, 9), (24, 25)]:
        z = complex(column - centre, row - centre)
        z *= np.exp(1j * alpha * np.exp(-5 * abs(z) / (25 * np.log(2))))
        y, x = (centre + z.imag) / side, (centre + z.real) / side
        there = 127 + 60 * np.sin(5 * y + 2 * x) + 50 * np.cos(4 * x - 3 * y)
        # Linear between pixels is off by at most an eighth of the second derivative, about 0.3
        # gray levels here in either direction; the pixels and the answer are rounded.
        assert abs(got[row, column] - there) < 1.8


def test_a_swirl_back_undoes_a_swirl(distort):
    picture = smooth_picture(33)
    turned = distort("swirl", picture, 2.0)
    back = distort("swirl", turned, -2.0)
    inner = (slice(None), slice(4, -4), slice(4, -4))  # outside, the edge was repeated
    assert abs(turned[inner] - 1.0 * picture[inner]).max() > 20
    assert abs(back[inner] - 1.0 * picture[inner]).max() <= 4


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_salt_and_pepper_hits_its_share_half_white_half_black(distort, alpha):
    gray = np.full((30, 32, 32, 3), 90, np.uint8)
    got = distort("salt and pepper", gray, alpha)
    assert (got == got[..., :1]).all()  # all channels of a pixel together
    n = 30 * 32 * 32
    for value, share in ((0, alpha / 2), (255, alpha / 2), (90, 1 - alpha)):
        found = (got[..., 0] == value).mean()
        assert found == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_contamination_replaces_whole_images_in_number_exact(distort):
    for alpha, count in ((0.125, 2), (0.25, 5), (0.75, 15)):  # of 20; 2.5 rounds to even
        got = distort("contamination", IMAGES, alpha)
        other = (got == OTHERS).all((1, 2, 3))
        assert other.sum() == count and (got[~other] == IMAGES[~other]).all()


# --------------------------------------------------------------------------------------- study


def test_the_distance_of_glyphs_rises_at_every_level(bench):
    images, reference = glyphs.draw("test", range(300)), glyphs.draw("train", range(1000))
    feats = bench.features.extract(Filters(), reference)[0]
    curves = bench.measure(images, 255 - images, Filters(), feats)
    assert list(curves) == list(NAMES)
    assert bench.falls(curves) == []
    undisturbed = np.array([curve["frechet"][0] for curve in curves.values()])
    assert np.ptp(undisturbed) < 1e-6 * undisturbed[0]  # it is the same set
    assert all(curve["kid"][-1] > curve["kid"][0] for curve in curves.values())


def test_real_photographs_go_farther_from_themselves_at_every_level(bench, shared_data, tmp_path):
    """Without other images as the reference few are enough: nothing but the distortion counts."""
    source = shared_data / "cifar10" / "cifar10-jpeg.zip"
    if not source.is_file():
        pytest.skip(f"no {source}")
    images = bench.datasets.load(source, tmp_path, split="test", classes="3,8").images[::7]
    others = np.repeat(glyphs.draw("test", range(len(images))), 3, axis=3)
    reference = bench.features.extract(Filters(), images)[0]
    curves = bench.measure(images, others, Filters(), reference)
    assert bench.falls(curves) == []
    assert all(
        curve["frechet"][0] < 1e-9 * np.trace(np.cov(reference.T)) for curve in curves.values()
    )


def test_a_level_that_does_not_rise_is_named(bench):
    fine = {"alpha": [0, 1, 2], "frechet": [0.1, 0.2, 0.3]}
    level = {"alpha": [0, 1, 2], "frechet": [0.1, 0.2, 0.2]}
    broken = {"alpha": [0, 1, 2], "frechet": [0.1, float("nan"), 0.3]}
    lines = bench.falls({"noise": fine, "blur": level, "swirl": broken})
    assert [line.split(":")[0] for line in lines] == ["blur", "swirl", "swirl"]
    assert lines[0] == "blur: 0.2000 at 2 is not above 0.2000 at 1"


# ------------------------------------------------------------------------------------- program


@pytest.fixture
def study(bench, monkeypatch, tmp_path, capsys):
    """study(*flags) runs the program on glyphs, by random filters: exit status, JSON, stderr."""
    monkeypatch.setattr(bench, "extractor", lambda args: Filters())
    sets = {
        split: bench.datasets.Dataset("glyphs", glyphs.draw(split, range(60)), None, (), {})
        for split in ("train", "test")
    }
    monkeypatch.setattr(
        bench.datasets, "load", lambda name, root, split="train", size=0: sets[split]
    )

    def run(*flags):
        rc = bench.main(["--n", "0", "--other", "mnist", "--out", str(tmp_path / "out"), *flags])
        out, err = capsys.readouterr()
        return rc, json.loads(out.splitlines()[-1]), err

    return run


def test_the_program_writes_a_figure_and_what_it_found(study, tmp_path):
    rc, found, _ = study("--n", "50", "--n-reference", "40")
    assert (rc == 0) == found["rises"]
    assert found["n"] == 50 and found["n_reference"] == 40 and found["feature_hash"] == "00000000"
    assert json.loads((tmp_path / "out" / "distortions.json").read_text()) == found
    with Image.open(tmp_path / "out" / "distortions.png") as picture:
        assert picture.size == (1000, 660)
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_program_fails_where_a_curve_does_not_rise(study, bench, monkeypatch):
    function, alphas, what = bench.STUDY["swirl"]
    monkeypatch.setitem(bench.STUDY, "swirl", (function, (0, 2, 2, 3, 4), what))
    rc, found, err = study()
    assert rc == 1 and not found["rises"] and "error: swirl:" in err and "at 2" in err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--n", "1"], "--n must"),
        (["--n-reference", "-3"], "--n-reference must"),
        (["--features", "inception"], "--weights"),
        (["--weights", "w.pth"], "--weights"),
    ],
)
def test_flags_that_make_no_sense_are_refused(bench, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        bench.parse(flags)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_more_images_than_there_are_is_refused(study, bench):
    with pytest.raises(BadInput, match="--n 61: .* has only 60 images"):
        study("--n", "61")


def test_channels_are_matched(bench):
    gray, colour = IMAGES[..., :1], IMAGES
    assert bench.same_channels(colour, 3) is colour
    assert (bench.same_channels(gray, 3) == gray).all()
    got = bench.same_channels(colour, 1)
    assert got.shape == gray.shape and abs(got[..., 0] - colour.mean(3)).max() <= 0.5
