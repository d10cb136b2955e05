"""From image files of any kind to uint8 arrays of one size; what worker processes run."""

import functools
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.commandline import BadInput

EXTENSIONS = frozenset(Image.registered_extensions()) - {".pdf", ".ps", ".eps", ".mpg", ".mpeg"}
GRAY_MODES = frozenset(["1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"])


@functools.lru_cache(maxsize=2)
def _archive(path):
    return zipfile.ZipFile(path)


def _bytes(container, item):
    """A file's contents: `item` is a path below the folder `container`, or a zip's entry."""
    if Path(container).is_file():
        return _archive(container).read(item)
    return (Path(container) / item).read_bytes()


def _opened(container, item):
    try:
        return Image.open(io.BytesIO(_bytes(container, item)))
    except Exception as error:
        raise BadInput(_broken(container, item, error)) from None


def _broken(container, item, error):
    return f"{container}/{item} is not a readable image ({error}); repair or remove it"


def inspect(container, items):
    """[(width, height, is gray)] of image files, after EXIF rotation, from their headers."""
    found = []
    for item in items:
        image = _opened(container, item)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        w, h = image.size[::-1] if turned else image.size
        found.append((w, h, image.mode in GRAY_MODES))
    return found


def resize(image, size):
    """Shorter side to `size` (Lanczos, antialiased), then the central size x size pixels."""
    w, h = image.size
    scale = size / min(w, h)
    w, h = max(size, round(w * scale)), max(size, round(h * scale))
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.LANCZOS)
    left, top = (w - size) // 2, (h - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image, size, channels):
    """A PIL image of any mode -> uint8 (H, W, channels).

    EXIF rotation is applied, 16-bit values keep their high byte, transparency lies on white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        deep = np.asarray(image, np.float64)
        image = Image.fromarray((deep / (256 if deep.max() > 255 else 1)).clip(0, 255).astype("u1"))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size:
        image = resize(image, size)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def decode(container, items, size, channels):
    """Image files -> uint8 (len(items), H, W, channels); BadInput names the one that is broken."""
    arrays = []
    for item in items:
        image = _opened(container, item)
        try:
            arrays.append(to_array(image, size, channels))
        except Exception as error:
            raise BadInput(_broken(container, item, error)) from None
    return np.stack(arrays)
