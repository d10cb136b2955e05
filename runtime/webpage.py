"""The parts of a page that is one file: text, tables, curves as SVG, pictures as data: URIs.

A page loads nothing: its Content-Security-Policy has the browser refuse whatever is not inside.
Text is escaped, unless it is Html.
"""

from runtime.files import atomic_write

import base64
import html
import io
import math
import os
from pathlib import Path
from urllib.parse import quote

from PIL import Image

MOST = 8_000_000  # bytes of all pictures in a page, as they are encoded
LARGE = 600_000  # bytes of a picture, from which on it is scaled down
WIDE = 1400  # pixels, too
PIXELS = 64_000_000  # pixels that a file may declare
POINTS, MARKED = 600, 25  # of a line of a curve at most, and with dots
COLORS = ("#1f5fa8", "#d1662a", "#2a8f5b", "#9a4fb0", "#a8841f", "#5a6b7b", "#c23b5a", "#2b97a0")
OURS = '<meta name="generator" content="runtime.report">'
CSS = """
:root { --ink: #1d2733; --soft: #5c6b7a; --line: #dde3e9; --ground: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 10px; padding-bottom: 4px;
  border-bottom: 2px solid var(--line); }
p { margin: 6px 0 10px; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0; }
.card { flex: 1 1 150px; padding: 10px 14px; background: var(--ground); border-radius: 8px; }
.card b { display: block; font-size: 19px; line-height: 1.3; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.stop { padding: 10px 14px; border-left: 4px solid #c0392b; background: #fdf0ee; }
pre { margin: 8px 0; padding: 10px 14px; background: var(--ground); border-radius: 8px;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; max-width: 100%; }
.row { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: 13px; margin-top: 4px; max-width: 540px; overflow-wrap: anywhere; }
.chart { flex: 0 1 344px; }
.chart b { font-size: 14px; }
.chart svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
.wide { overflow-x: auto; margin-bottom: 14px; }
details .wide { max-height: 640px; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.short { white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
a { color: #1f5fa8; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print { h2 { break-after: avoid; } figure, .chart, tr { break-inside: avoid; }
  .wide { max-height: none; overflow: visible; } }
"""


class Html(str):
    """Text that is HTML already."""


def text(value):
    """A value as HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name, *inside, **attributes):
    """<name ...>inside</name>; class_ is the attribute class."""
    told = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items())
    return Html(f"<{name}{told}>{''.join(map(text, inside))}</{name}>")


def joined(*parts):
    """HTML of several parts."""
    return Html("\n".join(map(text, filter(None, parts))))


def command(line):
    """A command line, which is broken between its options."""
    parts = line.split(" --")
    spans = [tag("span", part) for part in (parts[0], *(f"--{part}" for part in parts[1:]))]
    return tag("pre", Html(" ".join(spans)))


def link(path, base, words=""):
    """A link to a file, by its place relative to the folder of the page."""
    place = os.path.relpath(path, base)
    return tag("a", words or place, href=quote(place))


def section(title, *parts):
    """A heading and what stands below it; nothing where that is nothing."""
    inside = joined(*parts)
    return Html(f"<section>{tag('h2', title)}\n{inside}</section>") if inside else Html()


def folded(title, *parts):
    """What is shown when its title is clicked."""
    return tag("details", tag("summary", title), joined(*parts))


def number(value, digits=4):
    """A number with so many significant digits; whole ones, and thousands, in full."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.1f}"


def table(header, rows):
    """A table of texts; header may be empty."""
    head = tag("thead", tag("tr", *(tag("th", name) for name in header))) if header else ""

    def cell(value):
        return tag("td", value, **({"class_": "short"} if len(str(value)) <= 16 else {}))

    body = tag("tbody", *(tag("tr", *map(cell, row)) for row in rows))
    return tag("div", tag("table", head, body), class_="wide")


# ---------------------------------------------------------------------------------------- curves

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 344, 232, 46, 10, 10, 36


def ticks(low, high, log, most=5):
    """At most about `most` round values from low to high."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in parts if low <= m * 10.0**d <= high]
            if len(found) <= most + 1:
                break
        every = -(-len(found) // (most + 1)) or 1
        if len(found) > 1:
            return found[::every]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value, digits=4):
    """A tick's label: 2500 is 2.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def chart(title, lines, xlabel="step", linear=False):
    """Curves {name: [(x, y), ...]} over each other; unless linear, on a log axis if they span much.

    Of more than POINTS points some are drawn, evenly spaced, and the last.
    """
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Html()
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    log = not linear and min(ys) > 0 and max(ys) / min(ys) > 20
    (x0, x1), (y0, y1) = ranged(xs, False), ranged(ys, log)
    flat = (lambda y: math.log10(y)) if log else (lambda y: y)

    def place(x, y):
        right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        part = (flat(y) - flat(y0)) / (flat(y1) - flat(y0))
        return right, HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    drawn, small = [], {"font_size": 11, "fill": "#5c6b7a"}
    marks = ticks(y0, y1, log)
    digits = 4 if len({short(y) for y in marks}) == len(marks) else 7
    for y in marks:
        _, at = place(x0, y)
        grid = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{at:.1f}", "y2": f"{at:.1f}"}
        drawn.append(shape("line", **grid, stroke="#e3e8ed"))
        where = {"x": LEFT - 5, "y": f"{at + 4:.1f}", "text_anchor": "end"}
        drawn.append(shape("text", short(y, digits), **where, **small))
    for x in ticks(x0, x1, False, 4):
        at, _ = place(x, y0)
        where = {"x": f"{at:.1f}", "y": HEIGHT - BOTTOM + 15, "text_anchor": "middle"}
        drawn.append(shape("text", short(x), **where, **small))
    foot = {"x": (LEFT + WIDTH - RIGHT) / 2, "y": HEIGHT - 4, "text_anchor": "middle"}
    drawn.append(shape("text", xlabel, **foot, **small))
    names = []
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        dash = {"stroke_dasharray": "5 3"} if i >= len(COLORS) else {}
        shown = points[:: -(-len(points) // POINTS)]
        shown += [points[-1]] * (shown[-1] != points[-1])
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in shown)
        how = {"fill": "none", "stroke": color, "stroke_width": 1.6}
        drawn.append(shape("polyline", points=path, **how, **dash))
        for x, y in shown if len(shown) <= MARKED else ():
            at = dict(zip(("cx", "cy"), (f"{v:.1f}" for v in place(x, y)), strict=True))
            told = tag("title", f"{name}, {xlabel} {number(x)}: {number(y)}")
            drawn.append(shape("circle", told, **at, r=2.4, fill=color))
        names.append(tag("span", tag("i", style=f"background:{color}"), name))
    box = {
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "role": "img",
        "aria_label": f"{title} over {xlabel}",
    }
    legend = tag("div", *names, class_="legend") if len(names) > 1 else ""
    title = tag("b", title + " (log axis)" * log)
    return tag("div", title, shape("svg", *drawn, **box), legend, class_="chart")


def shape(name, *inside, **attributes):
    """An element of SVG; font_size is the attribute font-size."""
    kept = {"viewBox"}
    named = {k if k in kept else k.replace("_", "-"): v for k, v in attributes.items()}
    return tag(name, *inside, **named)


def ranged(values, log):
    """Where an axis begins and ends; values that are all but the same lie in its middle."""
    low, high = min(values), max(values)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    half = abs(high) / 2 or 0.5
    return (low / 2, high * 2) if log else (low - half, high + half)


# -------------------------------------------------------------------------------------- pictures


class Pictures:
    """Pictures of a page in the folder `base`: all that are shown take at most MOST bytes."""

    def __init__(self, base):
        self.base, self.left = base, MOST

    def figure(self, path, caption, side=0):
        """A picture file and its caption; what is too large, torn or no picture is only linked.

        side: the width to show it at, if it has one that is larger.
        """
        told, where = f"{caption} ", link(path, self.base)
        try:
            data, kind, size, note = encoded(Path(path))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return tag("figure", tag("figcaption", told, where, f" cannot be read: {error}"))
        if data and len(data) * 4 // 3 > self.left:
            data, note = b"", "left out: the page would be too large"
        if not data:
            return tag("figure", tag("figcaption", told, where, f" ({note})"))
        self.left -= len(data) * 4 // 3
        times = 1 if size[0] > 160 else 320 // size[0]
        width = min(side or size[0], size[0]) * times
        height = round(size[1] * width / size[0])
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        size = f'width="{width}" height="{height}"' + ' class="small"' * (times > 1)
        img = f'<img alt="{html.escape(caption)}" {size} src="{source}">'
        note = f" ({note})" if note else ""
        return tag("figure", Html(img), tag("figcaption", told, where, note))


def encoded(path):
    """(bytes, 'png' or such, (width, height), note) of a picture; b"" where it is too large."""
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        size, frames = image.size, getattr(image, "n_frames", 1)
        told = f"{size[0]} x {size[1]}, {len(raw) / 1e6:.1f} MB"
        if size[0] * size[1] * frames > PIXELS:
            return b"", "", size, f"left out: {told}"
        for frame in range(frames):  # a torn file raises here
            image.seek(frame)
            image.load()
        image.seek(0)
        if len(raw) <= LARGE and size[0] <= WIDE or frames > 1 and len(raw) <= 2 * LARGE:
            return raw, image.format.lower(), size, ""
        if frames > 1:
            return b"", "", size, f"left out: {told}"
        small = image.convert("RGB")
        small.thumbnail((WIDE // 2 * 2, 4 * WIDE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=88)
        if len(out.getvalue()) > 2 * LARGE:
            return b"", "", size, f"left out: {told}"
        return out.getvalue(), "jpeg", small.size, f"scaled down from {told}"


# ------------------------------------------------------------------------------------------ page


def page(path, title, *parts):
    """Write the page."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        OURS,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        '<link rel="icon" href="data:,">',
        tag("title", title),
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>",
    )
    whole = "\n".join([*head, joined(*parts), "</main>\n</body>\n</html>\n"])
    with atomic_write(path) as temporary:
        temporary.write_text(whole, encoding="utf-8", errors="xmlcharrefreplace")


def is_ours(path):
    """Whether a file is such a page."""
    try:
        if not Path(path).is_file():  # one may wait at a pipe for ever
            return False
        with open(path, encoding="utf-8", errors="replace") as f:
            return OURS in f.read(1000)
    except OSError:
        return False
