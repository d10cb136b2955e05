"""A set whose values use little of their range says so: 12 bits in 16, labels, black images."""

import gzip
import re

import numpy as np
import pytest
from data_files import idx_bytes, noise, png_bytes, write_image, write_mnist
from PIL import Image

from image_data import datasets

SHAPE = (6, 5)


def write_deep(path, largest, colours=0, seed=0):
    """A 16-bit PNG of values from 0 to `largest`; returns them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, largest + 1, (*SHAPE, colours or 1), np.uint16)
    values.flat[:2] = 0, largest
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png_bytes(values, color_type=2 if colours else 0))
    return values


@pytest.fixture
def said(tmp_path, capsys):
    """A function: load the folder `set`, return its images and the line of their range."""

    def load(**options):
        capsys.readouterr()
        ds = datasets.load(tmp_path / "set", tmp_path / "d", **options)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        lines = [line for line in lines if "of earlier states of" not in line]
        assert lines == [line for line in [ds.manifest.get("range")] if line]
        return np.asarray(ds.images), "".join(lines)

    return load


@pytest.mark.parametrize("size", [0, 3])
def test_12_bits_in_16(tmp_path, said, size):
    """The issue's own: a microscope's PNGs become almost black, with one line that says why."""
    deep = [write_deep(tmp_path / "set" / f"{i}.png", 4095, seed=i) for i in range(3)]
    images, line = said(size=size)
    assert "no 16-bit value exceeds 4,095 of 65,535, and the high byte was kept: 16 of" in line
    assert "multiply the images by 16, if they hold 12 bits" in line
    assert images.max() <= 15
    if not size:
        assert (images == np.stack(deep) >> 8).all()
    for i, values in enumerate(deep):  # what the line says mends it
        raw = png_bytes(values.astype(np.uint16) * 16, color_type=0)
        (tmp_path / "set" / f"{i}.png").write_bytes(raw)
    images, line = said(size=size)
    assert line == "" and (size or images.max() == 255)


@pytest.mark.parametrize(
    "largest, bits", [(16383, 14), (1023, 10), (300, 9), (255, 8), (1, 1), (0, 1), (16384, 0)]
)
def test_the_border_is_a_quarter_of_the_range(tmp_path, said, largest, bits):
    write_deep(tmp_path / "set" / "a.png", largest)
    line = said()[1]
    assert (f"no 16-bit value exceeds {largest:,} of" in line) == bool(bits)
    assert (f"by {2 ** (16 - bits)}, if they hold {bits} bits" in line) == bool(bits)


@pytest.mark.parametrize("kind", ["tif", "big_endian.tif"])
def test_12_bits_in_a_tiff(tmp_path, said, kind):
    values = np.linspace(0, 4095, 30).reshape(SHAPE).astype(np.uint16)
    (tmp_path / "set").mkdir()
    if kind == "tif":
        image = Image.fromarray(values)
    else:
        image = Image.frombytes("I;16B", SHAPE[::-1], values.astype(">u2").tobytes())
    image.save(tmp_path / "set" / f"a.{kind}")
    images, line = said()
    assert "exceeds 4,095 of 65,535" in line and (images[0, ..., 0] == values >> 8).all()


def test_12_bits_in_16_bit_colours(tmp_path, said):
    deep = write_deep(tmp_path / "set" / "a.png", 4095, colours=3)
    images, line = said()
    assert "exceeds 4,095 of 65,535" in line and (images[0] == deep >> 8).all()


def test_one_image_that_uses_the_range_is_enough(tmp_path, said):
    write_deep(tmp_path / "set" / "a.png", 4095)
    write_deep(tmp_path / "set" / "b.png", 65535)
    assert said()[1] == ""


def test_dark_16_bits_among_8_bits_are_told_of(tmp_path, said):
    write_image(tmp_path / "set" / "a.png", noise(SHAPE))
    write_deep(tmp_path / "set" / "b.png", 4095)
    assert "exceeds 4,095 of 65,535" in said()[1]
    write_deep(tmp_path / "set" / "b.png", 65535)
    assert "1 of 2 images have 16 bits, of which the high byte was kept" in said()[1]


def to(largest):
    return np.linspace(0, largest, 30).round().astype(np.uint8).reshape(SHAPE)


@pytest.mark.parametrize(
    "values, line",
    [
        (to(1), "no value exceeds 1 of 255, .*labels or masks"),
        (to(20), "no value exceeds 20 of 255"),
        (to(63), "no value exceeds 63 of 255"),
        (to(64), ""),
        (np.zeros(SHAPE, np.uint8), "every value of every image is 0"),
        (np.full(SHAPE, 255, np.uint8), "every value of every image is 255"),
        (noise(SHAPE) > 127, ""),  # one bit: black and white
        (np.where(noise(SHAPE) > 127, 255, 0).astype(np.uint8), ""),
    ],
    ids=["mask", "labels", "dark", "quarter", "black", "white", "one_bit", "two_levels"],
)
def test_8_bits(tmp_path, said, values, line):
    write_image(tmp_path / "set" / "a.png", values)
    told = said()[1]
    assert re.search(line, told) if line else told == ""


def test_a_palette_is_looked_up(tmp_path, said):
    """Few numbers, but each is a colour."""
    image = Image.new("P", SHAPE[::-1])
    image.putdata((noise(SHAPE) % 3).ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "a.png")
    images, line = said()
    assert line == "" and set(np.unique(images)) == {0, 255}


def test_arrays_are_told_of_as_files_are(tmp_path, capsys):
    write_mnist(tmp_path / "mnist")
    datasets.load("mnist", tmp_path)
    assert capsys.readouterr().out == ""  # all is as it should be
    black = np.zeros((30, 28, 28))
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(black)))
    datasets.load("mnist", tmp_path)
    assert "every value of every image is 0" in capsys.readouterr().out
