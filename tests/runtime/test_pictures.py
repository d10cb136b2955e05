"""Pictures in files of their own, with words in them, and sheets of one picture in many lights."""

from runtime.commandline import BadInput
from runtime.files import read_lines
from runtime.finite import check_finite
from runtime.pictures import save_told
from runtime.plots import draw_shaded

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_kept_whole_and_tells_what_it_is_of(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, channels), dtype=np.uint8)
    told = [{"prompt": f"a café, {i} of 狐", "seed": str(i), "settings": "a; b"} for i in range(3)]
    save_told(tmp_path / "new", images, told)
    for i, (image, texts) in enumerate(zip(images, told, strict=True)):
        with Image.open(tmp_path / "new" / f"000{i}.png") as picture:
            assert np.array_equal(np.asarray(picture).reshape(8, 12, channels), image)
            assert picture.text == texts
    names = {"0000.png", "0001.png", "0002.png", "samples.png", "samples.npz"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    assert np.array_equal(np.load(tmp_path / "new" / "samples.npz")["arr_0"], images)


def test_words_for_each_image_are_asked_for(tmp_path):
    with pytest.raises(ValueError):
        save_told(tmp_path, np.zeros((2, 4, 4, 3), np.uint8), [{}])


def test_files_of_an_earlier_call_are_removed_and_foreign_ones_stay(tmp_path):
    """The first has more images, a film, and a picture of attention."""
    foreign = (
        "fox.png",
        "7.png",
        "0007.png",
        "10000.png",
        "2024-holiday.png",
        "notes.txt",
        "0000.txt",
        "attention.txt",
        "tiny.safetensors",
    )
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / "attention.png").write_text("of an earlier call")
    told = {"prompt": "a fox"}
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    save_told(tmp_path, images, [told] * 4, film=True)
    film = {"interpolation.gif", "interpolation.png"}
    samples = {"samples.png", "samples.npz"}
    each = {f"000{i}.png" for i in range(4)}
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, *film, *samples, *each}
    save_told(tmp_path, images[2:], [told] * 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*foreign, *samples, "0000.png", "0001.png"}
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], images[2:])


def test_a_film_shows_every_image_in_order(tmp_path):
    images = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 90, 250)])
    save_told(tmp_path, images, [{}] * 3, film=True)
    with Image.open(tmp_path / "interpolation.gif") as film:
        assert film.n_frames == 3
        for i, level in enumerate((0, 90, 250)):
            film.seek(i)
            middle = np.asarray(film.convert("RGB"))[4:8, 4:8].astype(int)
            assert np.abs(middle - level).max() <= 4
    with Image.open(tmp_path / "interpolation.png") as strip:
        levels = np.asarray(strip)[6, [6, 16, 26], 0].tolist()
    assert levels == [0, 90, 250]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_with_its_seed(value):
    x, seeds = torch.zeros(3, 4, 5, 6), torch.tensor([8, 17, 3])
    assert check_finite(x, seeds) is x
    x[1, 3, 4, 5] = value
    with pytest.raises(BadInput, match="^the image of seed 17 is not finite: type --precision"):
        check_finite(x, seeds)


def test_a_map_lights_its_part_of_the_image(tmp_path):
    """The left half under one word, the right half under another: the sheet shows it."""
    image = np.full((40, 40, 3), 200, np.uint8)
    left = torch.zeros(10, 10)
    left[:, :5] = 1
    draw_shaded(tmp_path / "sheet.png", image, ["left", "right"], torch.stack([left, 1 - left]))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(int)
    row = sheet[sheet.shape[0] * 2 // 3]  # below titles, through all three pictures
    inside = row[row < 250]
    third = len(inside) // 3
    whole, first, second = (inside[i * third : (i + 1) * third] for i in range(3))
    quarter, last = slice(third // 8, third // 3), slice(-third // 3, -third // 8)
    assert np.all(np.abs(whole[third // 8 : -third // 8] - 200) <= 2)
    for part, bright, dark in ((first, quarter, last), (second, last, quarter)):
        assert np.all(np.abs(part[bright] - 200) <= 2) and np.all(np.abs(part[dark] - 40) <= 2)


def test_many_maps_make_rows(tmp_path):
    image, maps = np.zeros((8, 8, 3), np.uint8), torch.ones(8, 2, 2)
    draw_shaded(tmp_path / "one.png", image, list("abcde"), maps[:5])
    draw_shaded(tmp_path / "two.png", image, list("abcdefgh"), maps)
    one, two = (Image.open(tmp_path / name).size for name in ("one.png", "two.png"))
    # Six columns both times: one more or fewer would change the width by a sixth.
    assert abs(one[0] - two[0]) < one[0] / 12 and two[1] > 1.7 * one[1]


def test_lines_of_a_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa fox\r\n\n  ein Füchslein \n狐".encode())
    assert read_lines(file, "--prompt-file") == ["a fox", "ein Füchslein", "狐"]


@pytest.mark.parametrize("content", [b"a f\xf6x", "a fox".encode("utf-16")])
def test_a_file_that_is_not_utf_8_is_refused(tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"--prompt-file .*prompts.txt is not UTF-8 text.*save it"):
        read_lines(file, "--prompt-file")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadInput, match="--prompt-file"):
            read_lines(path, "--prompt-file")
