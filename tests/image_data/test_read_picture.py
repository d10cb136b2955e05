"""A picture that a flag names: read at the size that is asked for, a mask without mixed grays."""

from runtime.commandline import BadInput

import numpy as np
import pytest
from PIL import Image

from image_data.decode import read_picture


def saved(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def colours():
    """uint8 (24,40,3), each pixel of its own."""
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_a_picture_of_that_size_is_read_as_it_is(tmp_path, colours):
    path = saved(tmp_path / "a.png", colours)
    array, full = read_picture(path, (24, 40), 3, "--image")
    assert array.dtype == np.uint8 and np.array_equal(array, colours) and full == (40, 24)
    gray, _ = read_picture(saved(tmp_path / "g.png", colours[..., 0]), (24, 40), 1, "--mask")
    assert gray.shape == (24, 40, 1) and np.array_equal(gray[..., 0], colours[..., 0])
    array[0] = 0  # what is read may be written to


def test_gray_becomes_colour_and_colour_gray(tmp_path, colours):
    gray = saved(tmp_path / "g.png", colours[..., 0])
    array, _ = read_picture(gray, (24, 40), 3, "--image")
    assert np.array_equal(array, colours[..., :1].repeat(3, axis=2))
    array, _ = read_picture(saved(tmp_path / "a.png", colours), (24, 40), 1, "--mask")
    luma = colours @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(array[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("side, seen", [(24, 0), (18, 3), (48, 6)])
def test_of_a_wider_picture_the_centre_is_taken(tmp_path, colours, side, seen):
    """As large as it goes: a fifth is cut away left and right. seen: pixels from either edge in
    which the filter, of three pixels of the larger side, sees beyond it."""
    wide = colours.copy()
    wide[:, :8], wide[:, 8:32], wide[:, 32:] = 0, 100, 255
    inside = slice(seen, side - seen)
    array, full = read_picture(saved(tmp_path / "a.png", wide), (side, side), 3, "--image")
    assert array.shape == (side, side, 3) and full == (40, 24)
    assert np.all(array[:, inside] == 100)
    tall = saved(tmp_path / "b.png", np.ascontiguousarray(wide.transpose(1, 0, 2)))
    array, full = read_picture(tall, (side, side), 3, "--image")
    assert array.shape == (side, side, 3) and full == (24, 40)
    assert np.all(array[inside] == 100)


def test_height_comes_first(tmp_path, colours):
    path = saved(tmp_path / "a.png", colours)
    assert read_picture(path, (12, 20), 3, "--image")[0].shape == (12, 20, 3)
    assert read_picture(path, (20, 12), 3, "--image")[0].shape == (20, 12, 3)


def test_a_smaller_picture_shows_means_and_a_smaller_mask_does_not(tmp_path):
    """Columns of 0 and 255 by turns: a picture becomes gray, a mask stays black and white."""
    stripes = np.zeros((32, 64), np.uint8)
    stripes[:, ::2] = 255
    path = saved(tmp_path / "stripes.png", stripes)
    array, _ = read_picture(path, (16, 32), 3, "--image")
    assert np.abs(array[:, 4:-4].astype(int) - 127.5).max() < 20
    mask, full = read_picture(path, (16, 32), 1, "--mask")
    assert set(np.unique(mask)) <= {0, 255} and full == (64, 32)


@pytest.mark.parametrize("scale", [3, 0.5])
def test_the_border_of_a_mask_stays_sharp(tmp_path, scale):
    mask = np.zeros((16, 32), np.uint8)
    mask[4:8, 10:20] = 255
    size = int(16 * scale), int(32 * scale)
    array, _ = read_picture(saved(tmp_path / "m.png", mask), size, 1, "--mask")
    expected = np.zeros(size, np.uint8)
    expected[int(4 * scale) : int(8 * scale), int(10 * scale) : int(20 * scale)] = 255
    assert np.array_equal(array[..., 0], expected)


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path, colours):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    array, full = read_picture(tmp_path / "a.png", (40, 24), 3, "--image")
    assert full == (24, 40) and np.array_equal(array, np.rot90(colours, -1))


def test_what_is_clear_is_white(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, 4:, 3] = 255  # the right half is black, the left half nothing
    array, _ = read_picture(saved(tmp_path / "a.png", clear), (8, 8), 1, "--mask")
    assert np.all(array[:, :4] == 255) and np.all(array[:, 4:] == 0)


def test_a_picture_must_be_as_large_as_the_other(tmp_path, colours):
    path = saved(tmp_path / "mask.png", colours[..., 0])
    array, _ = read_picture(path, (24, 40), 1, "--mask", like=("--image", (40, 24)))
    assert array.shape == (24, 40, 1)
    with pytest.raises(BadInput, match="--mask .*mask.png is 40x24, expected 24x40, as --image is"):
        read_picture(path, (24, 40), 1, "--mask", like=("--image", (24, 40)))


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path, colours):
    (tmp_path / "text.png").write_text("a fox")
    saved(tmp_path / "torn.png", colours)
    whole = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "torn.png"):
        with pytest.raises(BadInput, match=f"{name} is not a readable image") as told:
            read_picture(tmp_path / name, (24, 40), 3, "--image")
        assert "\n" not in str(told.value)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadInput, match="--image .*: no such file"):
            read_picture(path, (24, 40), 3, "--image")
