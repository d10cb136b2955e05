"""Gray images beside colour ones: the same features and figures, and colours are never dropped."""

from runtime.commandline import BadInput

import numpy as np
import pytest
import torch
from recording import Watched
from reference_metrics import random_weights

import eval_fid
from evaluation import channels, image_sets
from evaluation.channels import in_channels
from evaluation.classifier import Classifier, ClassifierFeatures
from evaluation.image_sets import Chosen, Images, Statistics
from evaluation.inception_features import PROTOCOLS, Extractor
from evaluation.sides import Side, channels_text

ALL = ("frechet", "is", "kid", "prdc", "memorisation")


def noise(n, seed, side=8):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 1), np.uint8)


@pytest.mark.parametrize("resize", PROTOCOLS)
@pytest.mark.parametrize("side", [1, 7, 299])
def test_inception_gives_gray_images_the_features_of_three_equal_channels(resize, side, weights):
    extractor, gray = Extractor(weights, resize=resize), torch.from_numpy(noise(2, side, side))
    for one, three in zip(extractor(gray), extractor(gray.repeat(1, 1, 1, 3)), strict=True):
        assert torch.equal(one, three) and torch.isfinite(one).all()
    assert not torch.equal(extractor(255 - gray)[0], one)


@pytest.fixture(scope="module")
def weights():
    return random_weights(0)


def test_views_in_other_channels_are_the_images():
    gray = noise(20, 0)
    colour = gray.repeat(3, 3)
    for images, other, n in ((gray, colour, 3), (colour, gray, 1)):
        for chosen in (images, Chosen(images, np.arange(20))):
            view = in_channels(Images("x", chosen), n).images
            assert view.shape == other.shape and len(view) == 20 and view.dtype == np.uint8
            for which in (slice(3, 9), np.array([4, 2]), 5):
                np.testing.assert_array_equal(view[which], other[which])
            np.testing.assert_array_equal(np.asarray(view), other)
    same = Images("x", gray)
    assert in_channels(same, 1) is same and in_channels(None, 3) is None
    known = Statistics("s", np.zeros(1), np.eye(1))
    assert in_channels(known, 3) is known


def test_every_pixel_of_every_image_is_looked_at_and_few_at_a_time(monkeypatch):
    monkeypatch.setattr(channels, "AT_ONCE", 5 * 8 * 8 * 3)
    images = noise(52, 0).repeat(3, 3)
    images[51, 7, 7, 2] ^= 1  # the last channel of the last pixel
    watched = Watched(images, np.arange(52))
    with pytest.raises(BadInput, match=r"a\.npz: 1 of its 52 images have colours, number 51 first"):
        in_channels(Images("a.npz", watched), 1)
    assert watched.most == 5
    images[7, 0, 0, 1] ^= 1
    with pytest.raises(BadInput, match="2 of its 52 .* number 7 first"):
        in_channels(Images("a.npz", images), 1)
    for n in (2, 4):
        with pytest.raises(BadInput, match=f"a has {n} channels, expected 3"):
            in_channels(Images("a", noise(3, 0).repeat(n, 3)), 3)


def test_all_figures_of_the_classifier_are_those_of_gray_images():
    torch.manual_seed(0)
    extractor = ClassifierFeatures(Classifier(8, 8, 1, 3).eval(), {})
    assert extractor.channels == 1
    a, b, train = noise(300, 0), noise(300, 1), noise(300, 2)
    figures = dict(metrics=ALL)
    expected = eval_fid.evaluate(a, b, extractor, train=train, **figures)
    assert expected.pop("channels") is None and expected["memorisation_copies"] == 0
    for colour in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        sides = [x.repeat(3, 3) if c else x for x, c in zip((a, b, train), colour, strict=True)]
        found = eval_fid.evaluate(sides[0], sides[1], extractor, train=sides[2], **figures)
        told = found.pop("channels") or ""
        assert found == expected
        for name, c in zip(("generated", "reference"), colour, strict=False):
            assert (f"{name} is gray in three equal channels, taken as one" in told) == bool(c)
    with pytest.raises(BadInput, match="generated: 300 of its 300 images have colours"):
        eval_fid.evaluate(np.concatenate([a, b, train], 3), b, extractor)


def test_gray_images_are_repeated_for_a_classifier_of_colours():
    torch.manual_seed(0)
    extractor = ClassifierFeatures(Classifier(8, 8, 3, 3).eval(), {})
    a, b = noise(300, 0), np.random.default_rng(1).integers(0, 256, (300, 8, 8, 3), np.uint8)
    found, expected = (eval_fid.evaluate(x, b, extractor) for x in (a, a.repeat(3, 3)))
    assert expected.pop("channels") is None
    assert found.pop("channels") == "generated is gray, repeated in three channels"
    assert found == expected


def test_a_function_of_images_gets_both_sides_with_as_many_channels():
    seen = set()

    def function(images):
        seen.add(images.shape[1:])
        return images.float().mean((1, 2))

    a, b = noise(30, 0), noise(30, 1).repeat(3, 3)
    found = eval_fid.evaluate(a, b, function, metrics=("frechet",))
    assert "generated is gray" in found["channels"] and seen == {(8, 8, 3)}
    known = Statistics("s", np.zeros(1), np.eye(1))
    eval_fid.evaluate(a, known, function, metrics=("frechet",))  # one feature of one channel
    assert seen == {(8, 8, 3), (8, 8, 1)}


# ----------------------------------------------------------------------- arrays of other layouts


def saved(path, images, *labels):
    np.savez(path, images, *labels)
    return str(path)


def test_images_without_an_axis_of_channels_are_gray_and_a_line_says_so(tmp_path):
    images = noise(30, 0)[..., 0]
    for name in ("a.npz", "a.npy"):
        path = str(tmp_path / name)
        (np.save if name.endswith("y") else np.savez)(path, images)
        found = image_sets.read_file(path)
        np.testing.assert_array_equal(found.images, images[..., None])
        assert isinstance(found.images, np.memmap)
        assert found.told == f"{path} holds (30, 8, 8), taken as gray images"
    both = in_channels(found, 3)
    assert both.told == f"{found.told}, repeated in three channels"
    assert channels_text(Side(both), Side(both)) == both.told  # A and B are one file


UNIT = np.linspace(0, 1, 30 * 8 * 8 * 3).reshape(30, 8, 8, 3)
LEVELS = (UNIT * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "images, hint",
    [
        (UNIT, "(images * 255.0).round().astype('uint8')"),
        (UNIT.astype(np.float16), "(images * 255.0).round().astype('uint8')"),
        (UNIT * 2 - 1, "(images * 127.5 + 127.5).round().astype('uint8')"),
        (UNIT * 255, "images.round().astype('uint8')"),
        (LEVELS.astype(np.int64), "images.astype('uint8')"),
        (UNIT > 0.5, "(images * 255.0).round().astype('uint8')"),
        (LEVELS.transpose(0, 3, 1, 2), "images.transpose(0, 2, 3, 1)"),
        (
            UNIT.transpose(0, 3, 1, 2) * 2 - 1,
            "(images.transpose(0, 2, 3, 1) * 127.5 + 127.5).round().astype('uint8')",
        ),
        (LEVELS[0], "images[None]"),
        (UNIT[..., 0], "(images * 255.0).round().astype('uint8')"),
    ],
    ids=[
        "unit",
        "half",
        "signed",
        "levels",
        "int",
        "bool",
        "axes",
        "signed-axes",
        "one",
        "no-axis",
    ],
)
def test_other_layouts_are_refused_with_what_makes_images_of_them(images, hint, tmp_path):
    with pytest.raises(BadInput) as error:
        image_sets.read_file(saved(tmp_path / "a.npz", images))
    line = str(error.value)
    assert line.endswith(f"; save {hint}") and "a.npz holds arr_0 " in line and "\n" not in line
    mended = eval(hint, {"images": images})  # what was advised does what is wanted
    found = image_sets.read_file(saved(tmp_path / "a.npz", mended))
    if images.dtype != bool:
        levels = LEVELS[..., :1] if images.shape == (30, 8, 8) else LEVELS
        wanted = (levels if found.images.shape[0] == 30 else LEVELS[:1]).astype(int)
        assert np.abs(found.images.astype(int) - wanted).max() <= 1
    else:
        assert set(np.unique(found.images)) == {0, 255}
    with pytest.raises(BadInput, match="mine holds"):
        image_sets.as_images(images, "mine")


@pytest.mark.parametrize(
    "images, words",
    [
        (np.concatenate([LEVELS, LEVELS[..., :1]], 3), "images[..., :3], the fourth is alpha"),
        (LEVELS[..., :2], "(30, 8, 8, 2)"),
        (np.full((3, 8, 8, 1), np.nan), "float64"),
        (UNIT * 1000, "float64"),
        (np.zeros((30, 192), np.uint8), "(30, 192)"),
    ],
    ids=["alpha", "two", "nan", "range", "flat"],
)
def test_what_nobody_can_mend_is_refused_without_a_guess(images, words, tmp_path):
    with pytest.raises(BadInput) as error:
        image_sets.read_file(saved(tmp_path / "a.npz", images))
    assert words in str(error.value) and "astype" not in str(error.value)


def test_wrong_labels_of_good_images_bring_no_advice_on_images(tmp_path):
    with pytest.raises(BadInput, match=r"arr_1 float64 \(30,\)") as error:
        image_sets.read_file(saved(tmp_path / "a.npz", LEVELS, np.zeros(30)))
    assert "save" not in str(error.value)
