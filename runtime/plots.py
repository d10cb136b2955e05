"""Curves in PNG files."""

from runtime.files import atomic_write
from runtime.training import read_log


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


def plot_metrics(run, names=("frechet", "class_accuracy")):
    """Draw metric.png from log.jsonl: each metric that was logged, over the steps of training."""
    panels = {}
    for name in names:
        rows = [row for row in read_log(run.log_path) if row.get(name) is not None]
        if rows:
            curve = [row["step"] for row in rows], [row[name] for row in rows]
            panels[name.replace("_", " ")] = {name: curve}
    if panels:
        plot_lines(run.folder / "metric.png", panels, xlabel="step", title=str(run.folder))
