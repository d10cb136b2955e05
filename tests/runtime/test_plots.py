"""Figures by what is drawn: names, numbers at ticks, where legends and texts stand."""

from runtime import plots
from runtime.run import LossMeter

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import norm

STEPS = [5, 10, 20, 50, 100, 250, 1000]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be written, with their texts in place: a list."""
    seen = []

    def save(figure, path, dpi):
        figure.draw_without_rendering()
        for axes in figure.axes:
            plots._part_labels(axes)
        figure.draw_without_rendering()
        seen.append(figure)

    monkeypatch.setattr(plots, "_save", save)
    yield seen
    for figure in seen:
        plots._pyplot().close(figure)


def panels(figure):
    """The axes that have curves."""
    return [axes for axes in figure.axes if axes.lines]


def numbers(axis):
    """What is written at the ticks of an axis, in its range."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high]


def boxes(labels):
    return [label.get_window_extent() for label in labels if label.get_text()]


def lines(n, length=7, scale=1.0):
    """n curves over STEPS."""
    xs = STEPS[:length]
    return {f"sampler {i}": (xs, [scale * (i + 1) / x for x in xs]) for i in range(n)}


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (4, 1300, [5, 10, 20, 50, 100, 200, 500, 1000]),
        (0.005, 50, [0.01, 0.1, 1, 10]),
        (3, 7, [3, 4, 5, 6, 7]),
        (9.5, 10.5, [9.5, 10, 10.5]),
        (1e-6, 1e9, [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6, 1e8]),
    ],
)
def test_ticks_of_a_log_axis_are_round_numbers(low, high, expected):
    assert plots.log_ticks(low, high) == expected


@pytest.mark.parametrize("low", [1e-9, 0.0237, 0.9, 1.0, 7.3, 4e5])
@pytest.mark.parametrize("ratio", [1.01, 1.2, 1.9, 4, 30, 1e4, 1e11])
def test_a_log_axis_has_three_to_ten_ticks_within_it(low, ratio):
    found = plots.log_ticks(low, low * ratio)
    assert 2 <= len(found) <= 10 and found == sorted(set(found))
    assert all(low <= tick <= low * ratio for tick in found)


@pytest.mark.parametrize("logx", [True, False])
def test_xticks_are_written_as_numbers(figures, tmp_path, logx):
    how = {"xlabel": "evaluations", "xticks": STEPS, "logx": logx, "logy": ("distance",)}
    plots.plot_lines(tmp_path / "a.png", {"distance": lines(2)}, **how)
    (axes,) = panels(figures[0])
    assert axes.xaxis.get_majorticklocs().tolist() == STEPS
    found = [text for text in numbers(axes.xaxis) if text]
    written = [str(x) for x in STEPS]
    assert {"5", "1000"} <= {*found} <= {*written}  # what touches is left out
    assert found == written or not logx
    for a, b in combinations(boxes(axes.get_xticklabels()), 2):
        assert not a.overlaps(b)
    assert axes.yaxis.get_scale() == "log" and all(float(text) > 0 for text in numbers(axes.yaxis))


def test_no_name_covers_a_curve_and_no_text_is_cut(figures, tmp_path):
    path = "/a/folder/" + "with_a_long_name/" * 9
    drawn = {"Fréchet distance": lines(7), "class accuracy of a classifier " * 4: lines(7)}
    plots.plot_lines(tmp_path / "a.png", drawn, xlabel="evaluations of it " * 9, title=path)
    (figure,) = figures
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert len(legends) == 2
    for legend in legends:
        assert [text.get_text() for text in legend.get_texts()] == [*lines(7)]
        for axes in panels(figure):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    texts = [figure._suptitle, *(label for axes in panels(figure) for label in labels(axes))]
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    for a, b in combinations(texts, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent())


def test_numbers_of_a_sheet_lie_beside_no_other_panel_and_a_title_says_what_of(figures, tmp_path):
    cells = {("", f"w = {w}"): np.zeros((4, 4), np.uint8) for w in range(2)}
    near = {"": ([0, 1], [0.80001, 0.80002])}
    plots.draw_cells(tmp_path / "a.png", cells, {str(i): near for i in range(5)}, title="N = 7")
    (figure,) = figures
    assert figure._suptitle.get_text() == "N = 7"
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for axes in panels(figure):  # whole numbers, without an offset elsewhere
        assert axes.yaxis.get_offset_text().get_text() == ""


def test_the_names_below_a_sheet_cover_nothing(figures, tmp_path):
    cells = {("", f"w = {w}"): np.zeros((4, 4), np.uint8) for w in range(4)}
    plots.draw_cells(tmp_path / "a.png", cells, {"distance": lines(3), "accuracy": lines(3)})
    (figure,) = figures
    legend = figure.legends[0].get_window_extent()
    for axes in panels(figure):
        assert not legend.overlaps(axes.get_tightbbox())


def labels(axes):
    return [axes.xaxis.label, axes.yaxis.label]


def test_a_name_has_one_colour_and_stands_below_the_panels_that_have_it(figures, tmp_path):
    one, two = {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6])}, {"b": ([2], [7])}
    plots.plot_lines(tmp_path / "a.png", {"loss": one, "score": two}, xlabel="step")
    first, second = panels(figures[0])
    colour = {line.get_label(): line.get_color() for line in first.lines}
    assert second.lines[0].get_color() == colour["b"] != colour["a"]
    assert first.get_xlim() == second.get_xlim()  # one axis is written below both
    assert second.lines[0].get_marker() == "o"  # one point is no curve
    names = [
        [t.get_text() for t in a.get_legend().get_texts()]
        for a in figures[0].axes
        if a.get_legend()
    ]
    assert names == [["a", "b"], ["b"]]


def test_whole_steps_and_equal_values_have_plain_numbers(figures, tmp_path):
    plots.plot_lines(tmp_path / "a.png", {"score": {"": ([1, 2], [1.0, 1 + 1e-12])}}, xlabel="step")
    (axes,) = panels(figures[0])
    assert {*numbers(axes.xaxis)} == {"1", "2"}
    assert (
        axes.get_ylim() == pytest.approx((0.9, 1.1)) and not axes.yaxis.get_offset_text().get_text()
    )


@pytest.mark.parametrize("ys", [[0.0, 0.0], [0.0, 2.0]])
def test_a_log_axis_lives_with_zeros(figures, tmp_path, ys):
    drawn = {"error": {"": (list(range(1, len(ys) + 1)), ys)}}
    plots.plot_lines(tmp_path / "a.png", drawn, xlabel="steps", logx=True, logy=("error",))
    (axes,) = panels(figures[0])
    assert axes.yaxis.get_scale() == "log"


def test_texts_on_the_x_axis_are_not_joined(figures, tmp_path):
    plots.plot_lines(
        tmp_path / "a.png", {"loss": {"": (["eps", "v"], [1, 2])}}, xlabel="prediction"
    )
    (axes,) = panels(figures[0])
    assert numbers(axes.xaxis) == ["eps", "v"] and axes.lines[0].get_linestyle() == "None"


# ------------------------------------------------------------------------------ curves of a run


def run(folder, rows, config=""):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.mark.parametrize("T", [1000, 50, 7, 4])
def test_the_quarters_are_those_of_the_log(T):
    """Each timestep that a name gives is counted there by LossMeter, and no other."""
    for i, name in enumerate(plots.quarters({"timesteps": T}).values(), 1):
        first, last = map(int, name.split("t = ")[1].split(",")[0].split(" to "))
        for t in range(T):
            meter = LossMeter("cpu")
            meter.add(1, torch.ones(1), torch.tensor([t]) / T)
            assert (meter.sums[1].argmax().item() == i - 1) == (first <= t <= last)


def test_the_quarters_of_edm_have_as_many_draws_each():
    found = list(plots.quarters({"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}).values())
    edges = [math.exp(norm.ppf(q, -1.2, 1.2)) for q in (0.25, 0.5, 0.75)]
    a, b, c = (f"{edge:.2g}" for edge in edges)
    assert found == [
        f"quarter 1: sigma < {a}, little noise",
        f"quarter 2: sigma = {a} to {b}",
        f"quarter 3: sigma = {b} to {c}",
        f"quarter 4: sigma > {c}, most noise",
    ]


def test_loss_png_explains_its_quarters(figures, tmp_path):
    rows = [{"step": s, "loss": 1 / s, "loss_q1": 2 / s, "loss_q4": 0.5 / s} for s in (50, 100)]
    plots.plot_loss(run(tmp_path, [*rows, {"step": 100, "frechet": 3.0}], "timesteps: 200\n"))
    (axes,) = panels(figures[0])
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "loss": [[50, 1 / 50], [100, 1 / 100]],
        "quarter 1: t = 0 to 49, little noise": [[50, 2 / 50], [100, 2 / 100]],
        "quarter 4: t = 150 to 199, most noise": [[50, 0.5 / 50], [100, 0.5 / 100]],
    }
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()


def test_metric_png_says_whose_how_many_and_against_what(figures, tmp_path):
    how = {"metric_n": 500, "metric_features": "toy classifier", "metric_reference": "toy:test"}
    rows = [
        {"step": s, "frechet": 9.0 / s, "inception_score": s / 50, "class_accuracy": None}
        | how
        | {"n_reference": 10_000}
        for s in (50, 150)
    ]
    plots.plot_metrics(run(tmp_path, [{"step": 50, "loss": 1.0}, *rows]))
    distance, score = panels(figures[0])
    words = [axes.get_ylabel().replace("\n", " ") for axes in (distance, score)]
    assert words == [
        "Fréchet distance (features: toy classifier)",
        "inception score (logits: toy classifier)",
    ]
    assert distance.lines[0].get_xydata().tolist() == [[50, 9 / 50], [150, 9 / 150]]
    assert score.lines[0].get_xydata().tolist() == [[50, 1], [150, 3]]
    title = figures[0]._suptitle.get_text().splitlines()
    assert title[-1] == "N = 500, against toy:test (10,000 images)"
    assert numbers(distance.xaxis) == ["50", "150"]  # the steps that were scored


def test_a_log_from_before_they_were_named_is_drawn_too(figures, tmp_path):
    plots.plot_metrics(run(tmp_path, [{"step": 50, "frechet": 9.0, "class_accuracy": 0.5}]))
    assert [axes.get_ylabel() for axes in panels(figures[0])] == [
        "Fréchet distance",
        "class accuracy",
    ]
    plots.plot_metrics(run(tmp_path, [{"step": 50, "loss": 9.0}]))
    assert len(figures) == 1  # no score, no figure


def test_long_paths_keep_their_ends():
    assert plots.short("runs/pixel-mnist") == "runs/pixel-mnist"
    assert (
        plots.short("/a/very/long/way/through/many/folders/to/runs/x", 20)
        == ".../folders/to/runs/x"
    )
