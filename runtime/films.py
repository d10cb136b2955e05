"""Strips and films of images on their way, with captions: PNG and GIF.

Images are uint8 (K,H,W,C), C 1 or 3; they are enlarged by a whole factor until both sides have
SIDE pixels. Of more than ROWS images K so many are shown, evenly spaced, and a line says so.
"""

from runtime.files import atomic_write
from runtime.processes import say_once

import contextlib
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels that each side of an image has at least
ROWS = 12  # images of a column, at most
FRAMES = 33  # frames of a film, at most
LARGEST = 128  # pixels: films shrink larger images, strips do not
COLOURS = 48  # of a film: with more, noise takes more bytes and looks the same
PARTS = (0, 0.25, 0.5, 0.75, 0.99, 1)  # of the way: the columns of a film's strip
GAP = 4  # pixels between cells
TEXT, TITLE = 12, 14  # sizes of letters, in pixels
NAME = 110  # pixels: longer names of rows are broken between words


# ----------------------------------------------------------------------------------- what is shown


def one_each(labels, n, names=()):
    """(numbers, names of rows, note): which of n images of labels (n,) or None stand for all.

    The first of each class; of more than ROWS classes, of some that are evenly spaced. The first
    eight where there are no labels, or one. names: of the classes, else they are numbers.
    """
    if labels is None:
        return np.arange(min(n, 8)), [], ""
    labels = np.asarray(labels)
    classes, first = np.unique(labels, return_index=True)
    if len(classes) < 2:
        first = np.arange(min(n, 8))
    kept = first[_evenly(len(first), ROWS)]
    note = f"{len(kept)} of {len(first)} classes" if len(kept) < len(first) else ""
    return kept, [_named(names, i) for i in labels[kept]], note


def marks_of(steps):
    """What stands over x before the first of the steps and after each: ["t = 999, 0 %", ...].

    steps: the (t, t_prev) of each; or t, or sigma, a float, or a text, before the first and after
    each. x_0, t = -1, is the image.
    """
    if isinstance(steps[0], tuple):
        steps = [steps[0][0], *(t_prev for _, t_prev in steps)]
    names = [f"sigma = {v:.3g}" if isinstance(v, float) else f"t = {v}" for v in steps]
    where = ["x_0" if v == -1 else name for v, name in zip(steps, names, strict=True)]
    last = len(where) - 1
    parts = [min(round(100 * i / last), 99) for i in range(last)]
    return [f"{at}, {part} %" for at, part in zip(where, [*parts, 100], strict=True)]


def way_of(walk, seeds, labels, world, shape, steps, names=(), scale=1.0):
    """What save_beside() takes, of one image of each class, or eight: films of x and of x0_hat.

    walk(seeds, labels) begins at scale times the noise of the seeds (N,); labels (N,) or None;
    shape (H,W,C) of an image; steps: of marks_of(); names: of the classes.
    """
    from kernels import gaussian

    marks = marks_of(steps)
    numbers, rows, note = one_each(labels, len(seeds), names)
    some, y = seeds[numbers], None if labels is None else labels[numbers]
    height, width, channels = shape
    x_T = scale * gaussian((len(some), channels, height, width), some, -1, "cpu")
    titles = ("x", "D") if isinstance(steps[0], float) else ("x_t", "x0_hat")
    found = world.frames(walk, some, y, x_T, shown(len(marks)))
    return dict(zip(titles, found, strict=True)), marks, rows, note


def save_noised(path, ds, q_sample, T):
    """PATH.gif and .png: an image of each class of ds, or eight, and its x_t at 0 to 100 % of T.

    q_sample(x0, t, eps) gives x_t of images and their noise (B,C,H,W) at timesteps t (B,).
    """
    from runtime.pictures import to_uint8

    import torch

    from kernels import gaussian

    labels = ds.labels if ds.num_classes else None
    numbers, rows, note = one_each(labels, len(ds), ds.class_names)
    x0, _ = ds.batch(numbers)
    eps = gaussian(x0.shape, torch.arange(len(x0)), 0, "cpu")
    N = min(T, 100)
    ts = [-1, *(round(i * T / N) - 1 for i in range(1, N + 1))]
    film = {0: to_uint8(x0)}
    for i in shown(len(ts))[1:]:
        film[i] = to_uint8(q_sample(x0, torch.full((len(x0),), ts[i]), eps))
    save_beside(path, {"": film}, marks_of(ts), rows, note)


def shown(n):
    """The numbers of those of n frames that save_beside() shows."""
    return sorted({*_evenly(n, FRAMES).tolist(), *_columns(n)})


def _columns(n):
    """Which of n frames stand in the strip: those nearest to PARTS, and before the end but one."""
    last = n - 1
    return sorted({last, *(min(round(part * last), max(last - 1, 0)) for part in PARTS[:-1])})


def _evenly(n, most):
    """At most `most` of the numbers 0..n-1, evenly spaced, with both ends."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(int)


def _fewer(count, rows, note):
    """(numbers of those of `count` rows that are shown, their names, the note)."""
    kept = _evenly(count, ROWS)
    if len(kept) < count:
        note = f"{note}; {len(kept)} of {count} rows".removeprefix("; ")
    return kept, [rows[i] for i in kept] if len(rows) else [], note


# -------------------------------------------------------------------------------------- the files


def save_strip(path, columns, rows=(), note=""):
    """A PNG of columns {caption: images uint8 (K,H,W,C)}, K rows; rows: their K names."""
    kept, rows, note = _fewer(len(next(iter(columns.values()))), rows, note)
    cells = [np.asarray(images)[kept] for images in columns.values()]
    with atomic_write(path) as temporary:
        _sheet([("", list(columns), cells)], rows, note).save(temporary, "PNG")


def save_beside(path, films, marks, rows=(), note=""):
    """Films {title: [images uint8 (K,H,W,C) of each frame]} side by side: PATH.gif, PATH.png.

    The GIF has at most FRAMES frames, each with its mark ("t = 499, 50 %"), and the last stays. A
    film is a column of its K images; one film or two are rows. The PNG has a block for each film,
    with columns of the frames nearest to 0, 25, 50, 75, 99 and 100 % of the way; their captions say
    what they are, which of few steps is something else. rows: the names of the K images. marks:
    one for each frame, or {title: marks} where those of films differ. A film may also be {number of
    a frame: images} of the frames that shown() names.
    """
    named = isinstance(marks, dict)
    marks = marks if named else dict.fromkeys(films, marks)
    n = len(next(iter(marks.values())))
    kept, rows, note = _fewer(len(next(iter(films.values()))[0]), rows, note)
    films = {t: {i: np.asarray(film[i])[kept] for i in shown(n)} for t, film in films.items()}
    blocks = []
    for title, film in films.items():
        heads = [marks[title][i].replace(", ", "\n") for i in _columns(n)]
        blocks.append((title, heads, [film[i] for i in _columns(n)]))
    with atomic_write(f"{path}.png") as temporary:
        _sheet(blocks, rows, note).save(temporary, "PNG")

    frames = []
    for i in _evenly(n, FRAMES).tolist():
        cells = [_smaller(film[i]) for film in films.values()]
        each = [f"{title}: {marks[title][i]}" if named else marks[title][i] for title in films]
        mark = "; ".join(dict.fromkeys(each))
        if len(films) > 2:
            frames.append(_sheet([(mark, list(films), cells)], rows, note))
        else:  # a column for each image, a row for each film
            names = rows or [""] * len(kept)
            frames.append(_sheet([(mark, names, list(zip(*cells, strict=True)))], films, note))
    _save_gif(f"{path}.gif", frames)


def _save_gif(path, frames, seconds=5.0):
    """A GIF of the frames, in COLOURS colours; the first and the last stay longer."""
    size = tuple(max(sides) for sides in zip(*(frame.size for frame in frames), strict=True))
    paper = [Image.new("RGB", size, "white") for _ in frames]
    for page, frame in zip(paper, frames, strict=True):
        page.paste(frame)
    some = [np.asarray(paper[i]) for i in _evenly(len(paper), 8)]
    palette = Image.fromarray(np.concatenate(some)).quantize(COLOURS)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in paper]
    durations = [max(20, int(1000 * seconds / len(pages)))] * len(pages)
    durations[0], durations[-1] = 500, 2000
    with atomic_write(path) as temporary:
        how = {"save_all": True, "append_images": pages[1:], "duration": durations, "loop": 0}
        pages[0].save(temporary, "GIF", **how)


# -------------------------------------------------------------------------------------- one sheet


def _sheet(blocks, rows, note):
    """A picture of blocks [(title, captions, columns of images (K,H,W,C))] with names of rows.

    Two blocks stand side by side; of more so many that the longer side is as short as can be.
    Columns are as wide as the widest word of their captions, rows as high as their names.
    """
    blocks = [
        (title, heads, [list(map(_enlarged, c)) for c in cells]) for title, heads, cells in blocks
    ]
    images = [one for *_, columns in blocks for column in columns for one in column]
    height, width = max(one.height for one in images), max(one.width for one in images)
    names = [_broken(name, TEXT, NAME) for name in rows]
    height = max([height, *(_height(lines, TEXT) for lines in names)])
    left = GAP + (max(_width(lines, TEXT) for lines in names) + 2 * GAP if names else 0)
    heads = [[_broken(text, TEXT, width) for text in block[1]] for block in blocks]
    width = max([width, *(_width(lines, TEXT) + GAP for block in heads for lines in block)]) + GAP
    across = max(len(block) for block in heads) * width  # pixels of a block
    titles = [_broken(block[0], TITLE, max(across, 2 * NAME)) for block in blocks]
    across = max([across, *(_width(lines, TITLE) for lines in titles)])
    high = max(_height(lines, TITLE) for lines in titles)
    head = high + max(_height(lines, TEXT) for block in heads for lines in block)
    down = head + len(blocks[0][2][0]) * (height + GAP) + 2 * GAP
    most = _abreast(len(blocks), across + 4 * GAP, down)

    pieces = []  # (x, y, picture), or (x, y, lines, size of their letters)
    for i, (_, _, columns) in enumerate(blocks):
        x, y = left + i % most * (across + 4 * GAP), GAP + i // most * down
        pieces.append((x, y, titles[i], TITLE))
        for j, column in enumerate(columns):
            pieces.append((x + j * width, y + high, heads[i][j], TEXT))
            for k, one in enumerate(column):
                pieces.append((x + j * width, y + head + k * (height + GAP), one))
        for k, lines in enumerate([] if i % most else names):
            middle = y + head + k * (height + GAP) + (height - _height(lines, TEXT)) // 2
            pieces.append((GAP, middle, lines, TEXT))
    lines = _broken(note, TEXT, left + min(len(blocks), most) * across)
    pieces.append((GAP, GAP + -(-len(blocks) // most) * down, lines, TEXT))
    return _drawn(pieces, "L" if all(one.mode == "L" for one in images) else "RGB")


def _abreast(n, width, height):
    """How many of n blocks of this size stand side by side."""
    if n <= 2:
        return n
    return min(range(1, n + 1), key=lambda most: max(most * width, -(-n // most) * height))


def _drawn(pieces, mode):
    """White paper, as large as needed, with pictures (x, y, picture) and (x, y, lines, letters)."""
    ends = []
    for x, y, what, *letters in pieces:
        wide, high = (_width(what, *letters), _height(what, *letters)) if letters else what.size
        ends.append((x + wide + GAP, y + high + GAP))
    paper = Image.new(mode, tuple(map(max, zip(*ends, strict=True))), "white")
    draw = ImageDraw.Draw(paper)
    for x, y, what, *letters in pieces:
        if not letters:
            paper.paste(what, (x, y))
            continue
        for i, line in enumerate(what):
            draw.text((x, y + _height(what[:i], *letters)), line, "black", _font(line, *letters))
    return paper


def _enlarged(pixels):
    """Pixels uint8 (H,W,C) as a picture, enlarged to SIDE."""
    pixels = np.asarray(pixels)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return picture.resize([side * -(-SIDE // min(picture.size)) for side in picture.size], 0)


def _smaller(images):
    """Images (K,H,W,C) uint8 whose sides are at most LARGEST: means over whole squares."""
    factor = -(-max(images.shape[1:3]) // LARGEST)
    k, h, w, c = images.shape
    images = images[:, : h // factor * factor, : w // factor * factor]
    squares = images.reshape(k, h // factor, factor, w // factor, factor, c)
    return squares.mean((2, 4)).round().astype(np.uint8)


# -------------------------------------------------------------------------------------------- text


def _font(text, size):
    """Letters for the text: Pillow's, which are ASCII, or those of matplotlib's figures."""
    if text.isascii():
        return _own_font(size)
    return ImageFont.truetype(_file_for(frozenset(text)) or _file_for(frozenset()), size)


_own_font = functools.lru_cache(ImageFont.load_default)  # which it reads anew at each call


@functools.lru_cache
def _file_for(letters):
    """A font that has all of these letters: matplotlib's own or one of this machine's, or None."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.ft2font import FT2Font

    own = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    found = sorted(font.fname for font in font_manager.fontManager.ttflist)
    for path in (own, *(name for name in found if "LastResort" not in name)):  # boxes for all
        with contextlib.suppress(OSError, RuntimeError):
            font = FT2Font(path)
            if all(font.get_char_index(ord(letter)) for letter in letters):
                return path
    return None


def _named(names, i):
    """The name of class i, or where there are no letters for it or no names, "class 7"."""
    if i < len(names) and (names[i].isascii() or _file_for(frozenset(names[i]))):
        return names[i]
    if i < len(names):
        say_once("note: no font here has the letters of some classes' names: they are numbers")
    return f"class {i}"


def _broken(text, size, width):
    """The text's lines, broken between words to be `width` pixels wide; a word may be wider.

    But not twice as wide as NAME: so long a word ends in "...". What belongs together, "t = 499"
    and "50 %", is one word. A new line stays one.
    """
    lines = []
    for line in text.splitlines():
        words = line.replace(" = ", "\0=\0").replace(" %", "\0%").split()
        begun = len(lines)
        for word in (_cut(word.replace("\0", " "), size, 2 * NAME) for word in words):
            if len(lines) > begun and _width([f"{lines[-1]} {word}"], size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return lines


def _cut(word, size, width):
    """The word, or what of it fits into `width` pixels, and "..."."""
    if _width([word], size) <= width:
        return word
    fitting = (n for n in range(len(word), 0, -1) if _width([f"{word[:n]}..."], size) <= width)
    return f"{word[: next(fitting, 0)]}..."


def _width(lines, size):
    """Pixels that the widest line takes."""
    return max((_line_width(line, size) for line in lines), default=0)


@functools.lru_cache(1024)  # the same words stand above every column
def _line_width(line, size):
    return int(np.ceil(_font(line, size).getbbox(line)[2]))


def _height(lines, size):
    """Pixels that the lines take, one below another."""
    return len(lines) * (size + 4)
