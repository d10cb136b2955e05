"""Curves and sheets of pictures in PNG files."""

from runtime.files import atomic_write, read_run_log

import math
import textwrap
from pathlib import Path
from statistics import NormalDist

import yaml

WIDTH, HEIGHT = 6.0, 4.0  # of a panel, in inches
LETTER, ROW = 0.1, 0.22  # of a letter of a title, of a row of a legend
METRICS = {
    "frechet": "Fréchet distance",
    "inception_score": "inception score",
    "class_accuracy": "class accuracy",
}


def plot_lines(path, panels, *, xlabel, title="", logx=False, logy=(), xticks=None, thin=()):
    """Draw panels, three side by side: {ylabel: {name: (xs, ys)}}; those of `logy` have a log axis.

    xs are numbers, or texts, which no line joins. xticks: the values of x that are written below
    the axis, instead of round ones. Log axes have numbers, too, not powers of ten. thin: names of
    lines that are drawn thinner. The names of lines stand below each panel, where they cover no
    curve; long texts are wrapped.
    """
    plt = _pyplot()
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    across = min(len(panels), 3)
    down, wide = math.ceil(len(panels) / across), WIDTH * across
    rows = max(math.ceil(len(lines) / _columns(lines)) for lines in panels.values())
    ratios = [HEIGHT, ROW * rows * (len(names) > 1) + 0.05] * down
    figure = plt.figure(figsize=(wide, sum(ratios)), layout="constrained")
    grid = figure.add_gridspec(2 * down, across, height_ratios=ratios)
    axes = None
    for i, (ylabel, lines) in enumerate(panels.items()):
        row, column = divmod(i, across)
        axes = figure.add_subplot(grid[2 * row, column], sharex=axes)
        below = figure.add_subplot(grid[2 * row + 1, column])
        how = {"logx": logx, "logy": ylabel in logy, "xticks": xticks, "thin": thin}
        draw_lines(axes, lines, order=names, **how)
        axes.set_xlabel(wrapped(xlabel, WIDTH))
        axes.set_ylabel(wrapped(ylabel, HEIGHT))
        below.set_axis_off()
        if len(names) > 1 and any(lines):
            handles, told = axes.get_legend_handles_labels()
            told = [wrapped(name, WIDTH) for name in told]
            how = {"loc": "upper center", "borderaxespad": 0, "fontsize": 8}
            below.legend(handles, told, ncols=_columns(lines), **how)
    figure.suptitle(wrapped(title, wide))
    _save(figure, path, 100)


def draw_lines(axes, lines, *, logx=False, logy=False, xticks=None, thin=(), order=()):
    """{name: (xs, ys)} as curves into axes of matplotlib, with numbers at its ticks.

    order: names whose colours are the same wherever they are drawn.
    """
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        i = order.index(name) if name in order else i
        style = ("-", "--", ":")[i // 10 % 3]  # there are ten colours
        axes.plot(
            xs,
            ys,
            label=name,
            color=f"C{i % 10}",
            marker="o" if len(xs) == 1 else "." if len(xs) < 40 else "",
            linestyle="" if len(xs) and isinstance(xs[0], str) else style,
            linewidth=0.8 if name in thin else 1.7,
        )
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")
    whole = all(isinstance(x, int) for xs, _ in lines.values() for x in xs)
    if whole and xticks is None and not logx:  # there is no step 1.5
        axes.xaxis.get_major_locator().set_params(integer=True)
    ys = [float(y) for _, some in lines.values() for y in some if y is not None]  # None: a gap
    if ys and not logy and max(ys) - min(ys) < 1e-6 * abs(ys[0]):  # else rounding is enlarged
        axes.set_ylim(sorted((0.9 * ys[0], 1.1 * ys[0])))
    for axis, log in ((axes.xaxis, logx), (axes.yaxis, logy)):
        low, high = axis.get_view_interval()
        if axis is axes.xaxis and xticks is not None:
            axis.set_ticks([float(x) for x in xticks])
        elif log:
            axis.set_ticks(log_ticks(low, high))
        elif hasattr(form := axis.get_major_formatter(), "set_useOffset"):  # not that of texts
            form.set_useOffset(False)  # 1.00002, not 2 beside "1e-5 + 1"
        if log or axis is axes.xaxis and xticks is not None:
            axis.set_ticks([], minor=True)
            axis.set_major_formatter(lambda value, _: f"{value:.10g}")
    axes.grid(alpha=0.3)


def log_ticks(low, high):
    """Round numbers from low to high, both above 0, for a log axis: three to ten of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,), range(1, 10)):
        ticks = [float(f"{s}e{k}") for k in decades for s in steps]
        ticks = [t for t in ticks if low <= t <= high]
        if 3 <= len(ticks) <= 10:
            return ticks
    if len(ticks) > 10:  # many decades
        ticks = [float(f"1e{k}") for k in decades if low <= float(f"1e{k}") <= high]
        return ticks[:: math.ceil(len(ticks) / 10)]
    most = (high - low) / 2 * (1 + 1e-9)  # a short axis: in even steps
    size = 10.0 ** math.floor(math.log10(most))
    step = size * max(s for s in (1, 2, 5) if s * size <= most or s == 1)
    ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [float(f"{i * step:.10g}") for i in ticks]


def wrapped(text, inches):
    """The text in lines that are at most so many inches long, at 12 points."""
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, max(10, int(inches / LETTER))) for line in lines)


def short(path, most=40):
    """A path of at most about so many letters: where it is longer, its last parts."""
    parts = Path(path).parts
    while len(parts) > 1 and len(str(Path(*parts))) > most:
        parts = parts[1:]
    return str(path) if len(parts) == len(Path(path).parts) else f".../{Path(*parts)}"


def _columns(lines):
    """In how many columns the names of lines fit below a panel."""
    longest = max(map(len, lines), default=0)
    return max(1, min(len(lines), int(WIDTH / (0.065 * longest + 0.5))))


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path, dpi):
    """Write a figure into a file, whole, and without numbers that cover each other."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        _part_labels(axes)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    _pyplot().close(figure)


def _part_labels(axes):
    """Turn the numbers below axes where they touch; leave out those that touch all the same."""

    def apart():
        """Those that touch none of them further left, where they were laid out last."""
        kept, end = [], -math.inf
        for label in axes.get_xticklabels():
            box = label.get_window_extent()
            if box.x0 > end + 2:
                kept, end = [*kept, label.get_text()], box.x1
        return kept

    texts = [label.get_text() for label in axes.get_xticklabels()]
    if any(texts) and len(apart()) < len(texts):
        axes.tick_params(axis="x", rotation=90)
        axes.figure.draw_without_rendering()
        kept = apart()
        axes.set_xticks(axes.get_xticks(), [t if t in kept else "" for t in texts])


def draw_cells(path, cells, panels=None, xlabel="guidance w", titles=None, title=""):
    """A sheet of pictures {(row title, column title): picture}, and below it curves over w.

    panels: those of plot_lines; titles: a title of each cell, in place of those of columns; title:
    of the whole sheet.
    """
    plt = _pyplot()
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    extra = 2 if panels else 0  # the curves are as high as two rows
    wide = max(2.2 * len(columns), 3.2 * len(panels or ()))  # numbers stand between the curves
    title = wrapped(title, wide)
    high = 2.3 * (len(rows) + extra) + ROW * len(title.splitlines())
    figure = plt.figure(figsize=(wide, high), layout="constrained")
    outer = figure.add_gridspec(len(rows) + extra, 1)
    for i, row in enumerate(rows):
        strip = outer[i].subgridspec(1, len(columns))
        for j, column in enumerate(columns):
            axes = figure.add_subplot(strip[j])
            axes.set(xticks=[], yticks=[])
            if titles or i == 0:
                above = titles.get((row, column), "") if titles else column
                axes.set_title(wrapped(above, 3), fontsize=9)
            if j == 0 and row.strip():
                axes.set_ylabel(wrapped(row, 2))
            if (row, column) in cells:
                axes.imshow(cells[row, column], cmap="gray", vmin=0, vmax=255)
            elif titles:  # no table: the last row is shorter
                axes.set_axis_off()
    if panels:
        strip = outer[len(rows) :].subgridspec(1, len(panels))
        for j, (name, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(strip[j])
            values = sorted({x for xs, _ in lines.values() for x in xs})
            draw_lines(axes, lines, xticks=values if len(values) <= 12 else None)
            axes.set_title(name, fontsize=9)
            axes.set(xlabel=xlabel)
        if len(lines) > 1:  # one for all panels, below them
            names = figure.axes[-1].get_legend_handles_labels()
            figure.legend(*names, ncols=len(lines), fontsize=9, loc="outside lower center")
    figure.suptitle(title)
    _save(figure, path, 110)


def draw_shaded(path, image, titles, maps, columns=6):
    """A sheet: an image uint8 (H,W,3), and under each of the titles the same, bright where its map
    is 1 and dark where it is 0; maps: float tensor (K,h,w) of any size."""
    from torch.nn.functional import interpolate

    shades = interpolate(maps[None], image.shape[:2], mode="bilinear")[0, ..., None].numpy()
    pictures = [image, *((image * (0.2 + 0.8 * shade)).astype("uint8") for shade in shades)]
    keys = [(" " * (i // columns), i % columns) for i in range(len(pictures))]
    titles = dict(zip(keys, ["the image", *titles], strict=True))
    draw_cells(path, dict(zip(keys, pictures, strict=True)), titles=titles)


def plot_metrics(folder):
    """Draw metric.png of a run: each metric that was logged, over the steps of training.

    It says whose features and logits they are of, how many samples, and against what, where the
    log does.
    """
    folder, panels = Path(folder), {}
    rows = [row for row in read_run_log(folder / "log.jsonl") if METRICS.keys() & row.keys()]
    for name, label in METRICS.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            panels[label + by_whom(name, rows)] = {"": tuple(zip(*points, strict=True))}
    if panels:
        steps = [row["step"] for row in rows]
        ticks = steps if len(steps) <= 10 else None
        title = "\n".join(filter(None, [short(folder), against(rows)]))
        plot_lines(folder / "metric.png", panels, xlabel="step", title=title, xticks=ticks)


def by_whom(name, rows):
    """Whose features or logits a metric of rows of a log is of, to write behind its name."""
    told = {"frechet": "features", "inception_score": "logits"}.get(name)
    found = _values(rows, "metric_features")
    return f" ({told}: {' and '.join(found)})" if told and found else ""


def against(rows):
    """What rows of a log say of their scores, "N = 500, against mnist:test (10,000 images)"."""
    found = []
    if n := _values(rows, "metric_n"):
        found.append(f"N = {' and '.join(n)}")
    if reference := _values(rows, "metric_reference"):
        count = "".join(f" ({float(n):,.0f} images)" for n in _values(rows, "n_reference")[:1])
        found.append(f"against {' and '.join(reference)}{count}")
    return ", ".join(found)


def _values(rows, name):
    """What rows of a log have under this name, as texts, each once."""
    found = (row[name] for row in rows if row.get(name) is not None)
    return [str(value) for value in dict.fromkeys(found)]


def plot_loss(folder):
    """Draw loss.png of a run: the loss, and its quarters of the timestep range if logged."""
    folder = Path(folder)
    rows = [row for row in read_run_log(folder / "log.jsonl") if row.get("loss") is not None]
    if not rows:
        return
    names = {"loss": "loss", **quarters(settings_of(folder))}
    lines = {}
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            lines[name] = tuple(zip(*points, strict=True))
    how = {"logy": ("loss",), "thin": [name for key, name in names.items() if key != "loss"]}
    plot_lines(folder / "loss.png", {"loss": lines}, xlabel="step", title=short(folder), **how)


def settings_of(folder):
    """The settings of a run by name, of its config.yaml; {} where there is none, or it is torn."""
    try:
        found = yaml.safe_load(Path(folder, "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def quarters(settings):
    """What the loss of each quarter of the noise is of, {loss_q1: ...}, as a run's settings say.

    A chain of T timesteps has T / 4 in each; EDM draws ln sigma ~ N(P_mean, P_std^2), and each
    quarter has as many draws.
    """
    ranges = [f"t = {i}/4 to {i + 1}/4 of T" for i in range(4)]
    if T := settings.get("timesteps"):
        first = [math.ceil(i * T / 4) for i in range(5)]
        ranges = [f"t = {first[i]} to {first[i + 1] - 1}" for i in range(4)]
    elif "P_mean" in settings:
        normal = NormalDist(settings["P_mean"], settings["P_std"])
        a, b, c = (f"{math.exp(normal.inv_cdf(i / 4)):.2g}" for i in (1, 2, 3))
        ranges = [f"sigma < {a}", f"sigma = {a} to {b}", f"sigma = {b} to {c}", f"sigma > {c}"]
    words = zip(ranges, (", little noise", "", "", ", most noise"), strict=True)
    return {f"loss_q{i}": f"quarter {i}: {''.join(word)}" for i, word in enumerate(words, 1)}
