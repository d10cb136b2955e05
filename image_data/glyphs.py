"""The embedded default data set: the digits 0-9, drawn by Pillow's own scalable font.

Image i of a split is a function of (split, i) alone: its generator is Philox keyed by the two. One
large master of each digit and stroke is drawn with FreeType; every image is an affine map of a
master, evaluated at SUPER times the resolution and averaged down, which antialiases it.
"""

from runtime.commandline import BadInput

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

SIZE = 32  # pixels, both sides
COUNTS = {"train": 50_000, "test": 10_000}
CLASS_NAMES = tuple("0123456789")
VERSION = 1  # part of the prepared data's name: raise it when a pixel changes

SUPER = 2  # samples per pixel and direction
MASTER = 96  # side of a master, pixels
FONT = 64  # its font size, about 46 pixels from the foot of a digit to its head
STROKES = 5  # outlines of 0 to 4 master pixels, on either side of the line
MARGIN = 2.0  # pixels of background around every digit


@functools.lru_cache(maxsize=1)
def _masters():
    """[(digit, stroke)] -> (L-mode picture with the digit in its middle, ink (width, height))."""
    if not features.check("freetype2"):
        raise BadInput(
            "data set glyphs needs Pillow with FreeType, which this one lacks; "
            "type: pip install --force-reinstall pillow"
        )
    font, masters = ImageFont.load_default(size=FONT), {}
    for digit, character in enumerate(CLASS_NAMES):
        for stroke in range(STROKES):
            box = font.getbbox(character, stroke_width=stroke)
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            corner = (round(MASTER / 2 - middle[0]), round(MASTER / 2 - middle[1]))
            picture = Image.new("L", (MASTER, MASTER))
            ImageDraw.Draw(picture).text(corner, character, 255, font, stroke_width=stroke)
            masters[digit, stroke] = picture, (box[2] - box[0], box[3] - box[1])
    return masters


def labels(n):
    """(n,) int64: image i shows the digit i mod 10, so every class is equally frequent."""
    return np.arange(n) % len(CLASS_NAMES)


def draw(split, numbers):
    """Images `numbers` (any integers >= 0) of a split -> (len(numbers), 32, 32, 1) uint8.

    A digit in some gray from 120 to 255 on black: 16 to 25 pixels high, turned by up to 15 degrees,
    sheared by up to 0.25, drawn with five stroke widths, whole, at most 4 pixels off the centre.
    """
    images = np.empty((len(numbers), SIZE, SIZE, 1), np.uint8)
    for row, i in enumerate(numbers):
        key = [list(COUNTS).index(split), int(i)]
        u = np.random.Generator(np.random.Philox(key=key)).random(7)
        picture, ink = _masters()[int(i) % 10, int(u[0] * STROKES)]

        # `forward` maps master pixels to image pixels, both measured from their middles.
        angle, shear = np.radians(15) * (2 * u[1] - 1), 0.25 * (2 * u[2] - 1)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        forward = (16 + 9 * u[3]) / ink[1] * turn @ np.array([[1, shear], [0, 1]])
        half = np.abs(forward) @ ink / 2  # half the width and height of what is drawn
        room = SIZE / 2 - MARGIN
        shrink = min(1.0, room / half.max())
        forward, half = forward * shrink, half * shrink
        place = (2 * u[4:6] - 1) * np.minimum(room - half, 4.0)

        # Pillow wants the way back: from a fine output pixel (centre at +0.5) to the master.
        back = np.linalg.inv(forward * SUPER)
        shift = MASTER / 2 - back @ (SUPER * (SIZE / 2 + place))
        (a, b), (c, d) = back
        fine = picture.transform(
            (SIZE * SUPER, SIZE * SUPER),
            Image.Transform.AFFINE,
            (a, b, shift[0], c, d, shift[1]),
            Image.Resampling.BICUBIC,
        )
        ink_share = np.asarray(fine.reduce(SUPER), np.float32) / 255
        images[row, :, :, 0] = np.rint((120 + 135 * u[6]) * ink_share)
    return images
