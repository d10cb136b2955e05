"""Pictures in files of their own, with words in them, and sheets of one picture in many lights."""

from runtime.commandline import BadInput, read_lines
from runtime.pictures import save_each
from runtime.plots import draw_shaded

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_kept_whole_and_tells_what_it_is_of(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, channels), dtype=np.uint8)
    told = [{"prompt": f"a café, {i} of 狐", "seed": i} for i in range(3)]
    save_each(tmp_path / "new", images, told)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "new" / f"000{i}.png") as picture:
            assert np.array_equal(np.asarray(picture).reshape(8, 12, channels), image)
            assert picture.text == {"prompt": f"a café, {i} of 狐", "seed": str(i)}
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_a_title_for_each_image_is_asked_for(tmp_path):
    with pytest.raises(ValueError):
        save_each(tmp_path, np.zeros((2, 4, 4, 3), np.uint8), [{}])


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
    assert abs(one[0] - two[0]) < 20 and two[1] > 1.7 * one[1]


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
