"""From image files of any kind to uint8 arrays of one size; what worker processes run."""

from runtime.commandline import BadInput
from runtime.limits import check_unpacked, most_unpacked, open_member

import contextlib
import functools
import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".jp2",
    ]
)
# Only these are opened: Pillow knows some fifty more, for one of which it starts another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "TGA", "JPEG2000")
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit has no flag: _opened has one of its own
BYTES_A_PIXEL = 16  # at most, while a picture is turned into RGB
LONG = 8  # times as long as wide: of such a picture only the centre is scaled
DEEP_MODES = frozenset(["I", "I;16", "I;16B", "I;16L", "I;16N"])  # 16-bit gray
GRAY_MODES = DEEP_MODES | {"1", "L", "LA"}
ALPHA_MODES = frozenset(["RGBA", "RGBa", "LA", "PA"])
UPRIGHT = {  # what turns an image stored in EXIF orientation 2...8 upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Turns:
    """Large pictures of processes that prepare together: one of them at a time.

    Else each of 64 processes could take as much memory as one may.
    """

    lock, processes = contextlib.nullcontext(), 1

    @classmethod
    def share(cls, lock, processes):
        """Have this process be one of some that share an RLock."""
        cls.lock, cls.processes = lock, processes

    @classmethod
    def of(cls, size):
        """What to be in while something takes that many bytes."""
        large = size > most_unpacked() / cls.processes
        return cls.lock if large else contextlib.nullcontext()


def archive(path):
    """The zip at `path`, kept open. Not shared with a parent process, whose file position it would
    move, nor with an earlier file of that name."""
    return _archive(path, os.getpid(), os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _archive(path, process, mtime):
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def _file(container, item):
    """A file to read: `item` is a path below the folder `container`, or a zip's entry."""
    if os.path.isdir(container):
        path = Path(container) / item
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        file, size = open(path, "rb"), path.stat().st_size  # noqa: SIM115 (closed below)
    else:
        packed = archive(container)
        file, size = open_member(packed, item), packed.getinfo(item).file_size
    with file, Turns.of(size):
        yield file


@contextlib.contextmanager
def _opened(file):
    """The picture in a file, before its pixels are read; BadInput for too many of them."""
    with Image.open(file, formats=_formats()) as image:
        told, size = f"a picture of {image.width}x{image.height}", math.prod(image.size)
        check_unpacked(told, BYTES_A_PIXEL * size)
        with Turns.of(BYTES_A_PIXEL * size):
            yield image


@functools.cache
def _formats():
    """FORMATS without those that this Pillow was built without."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _broken(container, item, error):
    """What is raised for an error while an image is read: memory that ends is no fault of it."""
    if isinstance(error, MemoryError):
        return error
    why = f"its format is none of {', '.join(FORMATS)}"
    why = why if isinstance(error, UnidentifiedImageError) else error
    if isinstance(error, BadInput):
        return BadInput(f"{container}/{item}: {error}")
    return BadInput(f"{container}/{item} is not a readable image ({why}); repair or remove it")


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF: the picture itself may be whole
        return 1


def _pages(image):
    try:
        return image.n_frames
    except Exception:  # a damaged list of pages: the first one may be whole
        return 1


def inspect(container, items, turned=True):
    """[(width, height, is gray, largest value if it has 16 bits, pages of a TIFF)] of image files.

    Mostly from their headers. turned: after EXIF rotation, for which a PNG and a TIFF have to be
    read to their end. The value is None for 8 bits; of 16-bit colours Pillow keeps the high byte,
    so that the largest value with this high byte is told. Pages are 1 for all other kinds: those of
    a GIF are only known when it is read to its end.
    """
    found = []
    for item in items:
        try:
            with _file(container, item) as file, _opened(file) as image:
                stored_as = str(image.tile)  # Pillow's names of pixels, such as RGB;16B
                pages = _pages(image) if image.format == "TIFF" else 1
                if turned and image.format == "TIFF":
                    image.load()  # Pillow turns these itself while it reads them
                sideways = turned and _orientation(image) in (5, 6, 7, 8)
                w, h = image.size[::-1] if sideways else image.size
                deep = image.mode in DEEP_MODES or ";16" in stored_as
                largest = _largest(image) if deep else None
                found.append((w, h, image.mode in GRAY_MODES, largest, pages))
        except Exception as error:
            raise _broken(container, item, error) from None
    return found


def _largest(image):
    """The largest value of 16 bits in an image, without its alpha."""
    if image.mode in DEEP_MODES:
        return int(np.asarray(image).max())
    colours = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
    return int(colours.max()) << 8 | 255


def resize(image, size):
    """Shorter side to `size` (Lanczos, antialiased), then the central size x size pixels."""
    own_w, own_h = image.size
    scale = size / min(own_w, own_h)
    w, h = max(size, round(own_w * scale)), max(size, round(own_h * scale))
    left, top = (w - size) // 2, (h - size) // 2
    centre = (left, top, left + size, top + size)
    if max(w, h) > LONG * size:  # scaled as a whole, it could take any memory
        x, y = own_w / w, own_h / h
        box = (centre[0] * x, centre[1] * y, centre[2] * x, centre[3] * y)
        return image.resize((size, size), Image.Resampling.LANCZOS, box)
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.LANCZOS)
    return image.crop(centre)


def to_array(image, size, channels):
    """A PIL image of any mode -> uint8 (H, W, channels).

    EXIF rotation is applied, 16-bit values keep their high byte, transparency lies on white, of an
    animation the first picture counts. Raises ValueError for values without a fixed range.
    """
    image.load()
    orientation = _orientation(image)
    if image.mode == "F":
        raise ValueError("floating-point values have no fixed range; save it as 8 or 16 bit")
    if image.mode in DEEP_MODES:
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its values exceed 16 bits")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if size:
        image = resize(image, size)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def decode(container, items, size, channels):
    """Image files -> uint8 (len(items), H, W, channels); BadInput names the one that is broken."""
    arrays = []
    for item in items:
        try:
            with _file(container, item) as file:
                whole = io.BytesIO(file.read())  # to its end, where a zip's CRC is checked
                with _opened(whole) as image:
                    arrays.append(to_array(image, size, channels))
        except Exception as error:
            raise _broken(container, item, error) from None
    return np.stack(arrays)


def resize_arrays(arrays, size):
    """uint8 (n, h, w, C) -> (n, size, size, C), as resize() does it; size None keeps them."""
    if size is None or arrays.shape[1:3] == (size, size):
        return np.ascontiguousarray(arrays)
    pictures = (Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays)
    return np.stack([to_array(picture, size, arrays.shape[3]) for picture in pictures])


def read_picture(path, size, channels, flag, like=None):
    """The picture that `flag` names: (uint8 (H,W,channels) of `size`, its own (width, height)).

    Where the ratio of the sides differs, its centre. Gray values are not mixed: a mask stays one.
    like: (flag, (width, height)) of a picture that must be as large. BadInput for a file that is
    not there, is no picture, or is not as large.
    """
    if not Path(path).is_file():
        raise BadInput(f"{flag} {path}: no such file")
    array = decode(Path(path).parent, [Path(path).name], None, channels)[0]
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    if like is not None and picture.size != like[1]:
        (w, h), (width, height) = picture.size, like[1]
        raise BadInput(f"{flag} {path} is {w}x{h}, expected {width}x{height}, as {like[0]} is")
    method = Image.Resampling.NEAREST if channels == 1 else Image.Resampling.LANCZOS
    fitted = ImageOps.fit(picture, (size[1], size[0]), method)
    return np.array(fitted).reshape(*size, channels), picture.size
