"""Pictures with captions, for bench/captions.py: one of four shapes in a colour, on a ground.

draw((0, 3, 2), split=0, i=7)     "a red star on a blue field", (64,64,3) uint8
read(images)                      the colours that pictures show, and where the shape is
"""

from runtime.files import atomic_write
from runtime.processes import progress

import io
import math
import zipfile

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw

SIDE, FINE = 64, 4  # pixels of a side; pictures are drawn FINE times as large, then averaged
COLOURS = {"red": (220, 45, 40), "green": (40, 160, 65), "blue": (45, 75, 215)}
COLOURS |= {"yellow": (240, 210, 50), "white": (238, 238, 238), "black": (25, 25, 25)}
SHAPES = {"circle": 64, "square": 4, "triangle": 3, "star": 10}  # and their corners
BORDER = 3  # pixels around a picture where no shape is
WORDS = ("a", "on", "field", *COLOURS, *SHAPES)  # of all captions


def captions():
    """{caption: (colour, shape, ground)}, the last three numbers of COLOURS and SHAPES."""
    return {
        f"a {colour} {shape} on a {ground} field": (c, s, g)
        for c, colour in enumerate(COLOURS)
        for s, shape in enumerate(SHAPES)
        for g, ground in enumerate(COLOURS)
        if c != g
    }


def is_held_out(meaning):
    """Whether no training picture shows this colour, shape and ground; each two of them some do."""
    return sum(meaning) % len(COLOURS) == 0


def draw(meaning, split, i):
    """Picture i of a split, (64,64,3) uint8: a function of the two, and of what it shows."""
    u = np.random.Generator(np.random.Philox(key=[split, i])).random(10)
    colour, ground = (np.array(list(COLOURS.values()))[meaning[k]] for k in (0, 2))
    colour, ground = colour + 24 * (u[:3] - 0.5), ground + 24 * (u[3:6] - 0.5)
    radius = FINE * (12 + 12 * u[6])
    middle = radius + FINE * BORDER + u[7:9] * (FINE * (SIDE - 2 * BORDER) - 2 * radius)
    shape, corners = list(SHAPES.items())[meaning[1]]
    angle = np.arange(corners) * 2 * math.pi / corners - math.pi / 2
    angle += math.pi / 4 * (shape == "square") + math.radians(30) * (u[9] - 0.5)
    reach = radius * np.where((np.arange(corners) % 2) & (shape == "star"), 0.45, 1.0)
    points = middle[:, None] + reach * np.stack([np.cos(angle), np.sin(angle)])  # (2,corners)
    mask = Image.new("L", (FINE * SIDE, FINE * SIDE))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points.T], 255)
    share = np.asarray(mask.reduce(FINE), np.float64)[..., None] / 255
    return np.clip(np.rint(share * colour + (1 - share) * ground), 0, 255).astype(np.uint8)


def draw_all(path, count):
    """A zip of `count` pictures in train/CAPTION/ and, of all captions, half as many in test/."""
    known = captions()
    splits = {"train": [c for c in known if not is_held_out(known[c])], "test": list(known)}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for split, (name, chosen) in enumerate(splits.items()):
            for i in progress(None, "drawing", over=range(count // (1 + split))):
                caption, file = chosen[i % len(chosen)], io.BytesIO()
                Image.fromarray(draw(known[caption], split, i)).save(file, "png")
                archive.writestr(f"{name}/{caption}/{i:05d}.png", file.getvalue())


def read(images):
    """What pictures (N,64,64,3) uint8 show: colours (N,) of shape and ground, as numbers of
    COLOURS, and where the shape is, (N,16,16,1) uint8: without its edges, which decoders blur."""
    x, palette = images.astype(np.float64), np.array(list(COLOURS.values()))
    edge = np.ones((SIDE, SIDE), bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(x[:, edge], axis=1)  # (N,3)
    far = np.linalg.norm(x - ground[:, None, None], axis=3)  # (N,64,64)
    share = (far / np.quantile(far, 0.99, axis=(1, 2), keepdims=True).clip(1)).clip(0, 1)
    inside = share[..., None] > 0.5
    colour = (x * inside).sum((1, 2)) / inside.sum((1, 2)).clip(1)  # (N,3)
    nearest = [np.linalg.norm(c[:, None] - palette, axis=2).argmin(1) for c in (colour, ground)]
    places = rearrange(share, "n (h i) (w j) -> n h w (i j)", i=4, j=4).mean(3, keepdims=True)
    return *nearest, np.rint(255 * places).astype(np.uint8)
