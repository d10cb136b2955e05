"""Curves in PNG files."""

from runtime.files import atomic_write, read_log

from pathlib import Path


def plot_lines(path, panels, *, xlabel, title="", logx=False, logy=()):
    """Draw panels side by side: {ylabel: {name: (xs, ys)}}; those of `logy` have a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (ylabel, lines) in zip(axes[0], panels.items(), strict=True):
        for name, (xs, ys) in lines.items():
            axis.plot(xs, ys, marker="." if len(xs) < 40 else "", label=name)
        axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logx else "linear")
        axis.set_yscale("log" if ylabel in logy else "linear")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def draw_cells(path, cells, panels=None, xlabel="guidance w", titles=None):
    """A sheet of pictures {(row title, column title): picture}, and below it curves over w.

    panels: those of plot_lines; titles: a title of each cell, in place of those of columns.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    extra = 2 if panels else 0  # the curves are as high as two rows
    figure = plt.figure(figsize=(2.2 * len(columns), 2.3 * (len(rows) + extra)))
    outer = figure.add_gridspec(len(rows) + extra, 1)
    for i, row in enumerate(rows):
        strip = outer[i].subgridspec(1, len(columns), wspace=0.05)
        for j, column in enumerate(columns):
            axes = figure.add_subplot(strip[j])
            axes.set(xticks=[], yticks=[])
            if titles or i == 0:
                axes.set_title(titles.get((row, column), "") if titles else column, fontsize=9)
            if j == 0 and row.strip():
                axes.set_ylabel(row)
            if (row, column) in cells:
                axes.imshow(cells[row, column], cmap="gray", vmin=0, vmax=255)
            elif titles:  # no table: the last row is shorter
                axes.set_axis_off()
    if panels:
        strip = outer[len(rows) :].subgridspec(1, len(panels), wspace=0.3)
        for j, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(strip[j])
            for name, (xs, ys) in lines.items():
                axes.plot(xs, ys, marker=".", label=name)
            axes.set_title(title, fontsize=9)
            axes.set(xlabel=xlabel)
            axes.grid(alpha=0.3)
        if len(lines) > 1:  # one for all panels, below them
            names = figure.axes[-1].get_legend_handles_labels()
            where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.04)}
            figure.legend(*names, ncols=len(lines), fontsize=9, **where)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_shaded(path, image, titles, maps, columns=6):
    """A sheet: an image uint8 (H,W,3), and under each of the titles the same, bright where its map
    is 1 and dark where it is 0; maps: float tensor (K,h,w) of any size."""
    from torch.nn.functional import interpolate

    shades = interpolate(maps[None], image.shape[:2], mode="bilinear")[0, ..., None].numpy()
    pictures = [image, *((image * (0.2 + 0.8 * shade)).astype("uint8") for shade in shades)]
    keys = [(" " * (i // columns), i % columns) for i in range(len(pictures))]
    titles = dict(zip(keys, ["the image", *titles], strict=True))
    draw_cells(path, dict(zip(keys, pictures, strict=True)), titles=titles)


def plot_metrics(folder, names=("frechet", "class_accuracy")):
    """Draw metric.png of a run: each metric that was logged, over the steps of training."""
    panels, folder = {}, Path(folder)
    for name in names:
        rows = [row for row in read_log(folder / "log.jsonl") if row.get(name) is not None]
        if rows:
            curve = [row["step"] for row in rows], [row[name] for row in rows]
            panels[name.replace("_", " ")] = {name: curve}
    if panels:
        plot_lines(folder / "metric.png", panels, xlabel="step", title=str(folder))


def plot_loss(folder):
    """Draw loss.png of a run: the loss, and its quarters of the timestep range if logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    rows = [row for row in read_log(folder / "log.jsonl") if "loss" in row]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, width in [("loss", 2.0), *((f"loss_q{i}", 0.7) for i in range(1, 5))]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), linewidth=width, label=name.replace("_q", ", quarter ")
            )
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=str(folder))
    axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_write(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
