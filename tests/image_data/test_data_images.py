"""Image files of every kind become the right pixels, or are refused by name."""

from runtime.commandline import BadInput

import shutil
import zipfile

import numpy as np
import pytest
from data_files import noise, png_bytes, write_image, write_tree
from PIL import Image

from image_data import datasets
from image_data.decode import resize

GRAY = noise((6, 5))
COLOR = noise((6, 5, 3))


def load_one(tmp_path, name, **options):
    ds = datasets.load(tmp_path / "set", tmp_path / "d", **options)
    assert len(ds) == 1, name
    return np.asarray(ds.images[0])


def save(tmp_path, image, name, **options):
    (tmp_path / "set").mkdir(exist_ok=True)
    image.save(tmp_path / "set" / name, **options)


def test_gray_and_rgb_are_kept_as_they_are(tmp_path):
    save(tmp_path, Image.fromarray(GRAY), "a.png")
    assert (load_one(tmp_path, "gray")[..., 0] == GRAY).all()
    save(tmp_path, Image.fromarray(COLOR), "b.bmp")
    ds = datasets.load(tmp_path / "set", tmp_path / "d")  # one of them is in colour: all are
    assert ds.channels == 3
    assert (ds.images[0] == GRAY[..., None]).all() and (ds.images[1] == COLOR).all()


def test_one_bit(tmp_path):
    save(tmp_path, Image.fromarray(GRAY > 127), "a.png")
    assert (load_one(tmp_path, "1")[..., 0] == np.where(GRAY > 127, 255, 0)).all()


def test_palette(tmp_path):
    image = Image.new("P", (5, 6))
    image.putdata((GRAY % 7).ravel().tolist())
    colors = noise((7, 3), 5)
    image.putpalette(colors.ravel().tolist())
    save(tmp_path, image, "a.gif")
    assert (load_one(tmp_path, "P") == colors[GRAY % 7]).all()


def on_white(values, alpha):
    alpha = alpha.astype(np.float64)[..., None] / 255
    return values * alpha + 255 * (1 - alpha)


def test_alpha_lies_on_white(tmp_path):
    alpha = noise((6, 5), 3)
    alpha[0, :2] = 0, 255
    save(tmp_path, Image.fromarray(np.dstack([COLOR, alpha])), "a.png")
    found = load_one(tmp_path, "RGBA")
    assert np.abs(found - on_white(COLOR, alpha)).max() <= 1
    assert (found[0, 0] == 255).all() and (found[0, 1] == COLOR[0, 1]).all()


def test_gray_with_alpha_stays_gray(tmp_path):
    alpha = noise((6, 5), 3)
    save(tmp_path, Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(alpha)]), "a.png")
    found = load_one(tmp_path, "LA")
    assert found.shape == (6, 5, 1)
    assert np.abs(found - on_white(GRAY[..., None], alpha)).max() <= 1


def test_transparent_palette_color_is_white(tmp_path):
    image = Image.new("P", (5, 6))
    image.putdata((GRAY % 2).ravel().tolist())
    image.putpalette([10, 20, 30, 40, 50, 60])
    save(tmp_path, image, "a.png", transparency=1)
    expected = np.where((GRAY % 2)[..., None] == 1, 255, [10, 20, 30])
    assert (load_one(tmp_path, "P") == expected).all()


@pytest.mark.parametrize("dark", [False, True], ids=["full_range", "all_below_256"])
def test_16_bit_gray_keeps_the_high_byte(tmp_path, dark):
    deep = np.random.default_rng(0).integers(0, 256 if dark else 65536, (6, 5), np.uint16)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(png_bytes(deep[..., None], color_type=0))
    assert (load_one(tmp_path, "I;16")[..., 0] == deep >> 8).all()
    (tmp_path / "set" / "a.png").unlink()
    save(tmp_path, Image.fromarray(deep), "a.tif")
    assert (load_one(tmp_path, "I;16")[..., 0] == deep >> 8).all()


def test_16_bit_color_keeps_the_high_byte(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), np.uint16)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(png_bytes(deep, color_type=2))
    assert (load_one(tmp_path, "RGB") == deep >> 8).all()


def test_cmyk_jpeg(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[...] = 255, 0, 0, 0  # full cyan
    save(tmp_path, Image.fromarray(cmyk, "CMYK"), "a.jpg", quality=95)
    found = load_one(tmp_path, "CMYK").reshape(-1, 3).mean(0)
    assert np.abs(found - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, kind):
    """What EXIF 2.3 says of tag 0x0112: on which side the stored first row and column are seen."""
    stored = {  # how a camera stores COLOR for each value, in numpy's words
        1: COLOR,
        2: COLOR[:, ::-1],
        3: COLOR[::-1, ::-1],
        4: COLOR[::-1],
        5: COLOR.transpose(1, 0, 2),
        6: np.rot90(COLOR, 1),
        7: COLOR.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(COLOR, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), f"a.{kind}", exif=exif)
    assert (load_one(tmp_path, "EXIF") == COLOR).all()
    assert load_one(tmp_path, "EXIF", size=3).shape == (3, 3, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(tmp_path):
    save(tmp_path, Image.fromarray(COLOR), "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (load_one(tmp_path, "EXIF") == COLOR).all()


def test_jpeg_in_a_zip(tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)[..., None].repeat(3, 2) * 4
    write_image(tmp_path / "raw" / "a.JPG", smooth, quality=98)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "raw")
    ds = datasets.load(tmp_path / "set.zip", tmp_path / "d")
    assert ds.name == "set" and np.abs(ds.images[0].astype(int) - smooth).max() <= 3


def test_mixed_sizes_are_named_and_size_mends_it(tmp_path):
    write_image(tmp_path / "set" / "a.png", noise((8, 12, 3)))
    write_image(tmp_path / "set" / "b.png", noise((20, 10, 3)))
    with pytest.raises(BadInput, match=r"a.png is 12x8, b.png is 10x20; type --size"):
        datasets.load(tmp_path / "set", tmp_path / "d")
    ds = datasets.load(tmp_path / "set", tmp_path / "d", size=4)
    assert ds.images.shape == (2, 4, 4, 3) and ds.manifest["size"] == 4


def test_not_square_is_kept(tmp_path):
    pixels = noise((8, 12, 3))
    write_image(tmp_path / "set" / "a.png", pixels)
    ds = datasets.load(tmp_path / "set", tmp_path / "d")
    assert (ds.height, ds.width, ds.channels) == (8, 12, 3) and (ds.images[0] == pixels).all()


def lanczos(signal, n):
    """A 1-D float64 signal resampled to n values with the antialiased 3-lobed Lanczos window."""
    scale = len(signal) / n
    stretch = max(scale, 1.0)
    out = []
    for i in range(n):
        x = (np.arange(len(signal)) + 0.5 - (i + 0.5) * scale) / stretch
        weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        out.append(weights @ signal / weights.sum())
    return np.array(out)


@pytest.mark.parametrize(
    "shape, size", [((24, 40), 8), ((40, 24), 12), ((9, 9), 27), ((16, 17), 16)]
)
def test_resize_is_antialiased_lanczos_and_a_centre_crop(shape, size):
    pixels = np.random.default_rng(1).integers(60, 196, shape, np.uint8)
    scale = size / min(shape)
    h, w = (round(side * scale) for side in shape)
    wide = np.stack([lanczos(row.astype(np.float64), w) for row in pixels])
    full = np.stack([lanczos(column, h) for column in wide.T], 1)
    top, left = (h - size) // 2, (w - size) // 2
    expected = full[top : top + size, left : left + size]
    found = np.asarray(resize(Image.fromarray(pixels), size), np.float64)
    assert np.abs(found - expected).max() <= 1  # Pillow rounds once after each direction


def test_size_applies_to_arrays_too(tmp_path):
    ds = datasets.load("glyphs", tmp_path, split="test", size=16, classes=["7"], workers=1)
    assert ds.images.shape == (1000, 16, 16, 1)
    native = datasets.load("glyphs", tmp_path, split="test", classes=["7"], workers=1)
    means = np.asarray(native.images[:50], np.float64).reshape(50, 16, 2, 16, 2).mean((2, 4))
    assert np.abs(ds.images[:50, :, :, 0] - means).mean() < 4  # the same picture, half as large


BROKEN = {
    "cut.jpg": lambda good: good[: len(good) // 2],
    "empty.jpg": lambda good: b"",
    "text.jpg": lambda good: b"<html></html>",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("size", [None, 8], ids=["native", "resized"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_broken_image_is_named(tmp_path, name, size, packed):
    write_image(tmp_path / "set" / "cat" / "good.jpg", noise((32, 32, 3)))
    good = (tmp_path / "set" / "cat" / "good.jpg").read_bytes()
    (tmp_path / "set" / "cat" / name).write_bytes(BROKEN[name](good))
    where = tmp_path / "set"
    if packed:
        where = shutil.make_archive(str(tmp_path / "set"), "zip", where)
    with pytest.raises(BadInput, match=f"{name} is not a readable image") as caught:
        datasets.load(where, tmp_path / "d", size=size)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert not list((tmp_path / "d").glob("[!.]*"))


def test_cut_png_is_named(tmp_path):
    """Reading a PNG's EXIF reads all of it, so this one breaks while sizes are being looked at."""
    raw = png_bytes(noise((32, 32, 3)), color_type=2, depth=8)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="a.png is not a readable image"):
        datasets.load(tmp_path / "set", tmp_path / "d")


def test_damaged_zip_entry_is_named(tmp_path):
    write_tree(tmp_path / "raw", ["a.bmp", "b.bmp"])
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in ("a.bmp", "b.bmp"):
            archive.write(tmp_path / "raw" / name, name)
        place = archive.getinfo("b.bmp").header_offset + 30 + len("b.bmp") + 100
    raw = bytearray((tmp_path / "set.zip").read_bytes())
    raw[place] ^= 255  # a pixel: only the zip's CRC can tell
    (tmp_path / "set.zip").write_bytes(raw)
    with pytest.raises(BadInput, match="b.bmp is not a readable image .*CRC"):
        datasets.load(tmp_path / "set.zip", tmp_path / "d")


@pytest.mark.parametrize(
    "values, why",
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), 70_000, np.int32), "exceed 16 bits"),
    ],
    ids=["float", "32_bit"],
)
def test_values_without_a_range_are_refused(tmp_path, values, why):
    save(tmp_path, Image.fromarray(values), "a.tif")
    with pytest.raises(BadInput, match=f"a.tif is not a readable image .*{why}"):
        datasets.load(tmp_path / "set", tmp_path / "d")
