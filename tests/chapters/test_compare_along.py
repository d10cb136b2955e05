"""`compare_samplers.py --along`, its guidance film, precision and recall, and names of files."""

from runtime import films
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.pictures import save_grid, to_uint8
from runtime.processes import World
from runtime.result_folders import suffix_of

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare_samplers import (
    REAL,
    SHAPE,
    Evaluator,
    T,
    checkpoint,
    left,
    pixels,
    reference,
    settings,
)

import compare_samplers
import ddim
import ddpm_pixel as ch1
import eval_fid
from evaluation import samplers_report
from evaluation.study_names import changed, name_for
from kernels import gaussian


@pytest.fixture
def scored(monkeypatch):
    """The evaluator in place, and [number of steps] of each walk that is made."""
    monkeypatch.setattr(eval_fid, "Evaluator", Evaluator)
    walks, trajectory_of = [], compare_samplers.trajectory_of

    def counted(*where):
        walks.append(where[-2])
        return trajectory_of(*where)

    monkeypatch.setattr(compare_samplers, "trajectory_of", counted)
    return walks


def guess(net, x, t, y, alpha_bar):
    """x0_hat of x (B,C,H,W) at t, of a network that gives v: uint8 (B,H,W,C)."""
    a = alpha_bar[t]
    with torch.no_grad():
        v = net(x, torch.full((len(x),), t), y)
    return to_uint8((a.sqrt() * x - (1 - a).sqrt() * v).float().clamp(-1, 1)).numpy()


@pytest.mark.parametrize(
    "sampler, how", [("ddim", {"eta": 0.4}), ("ddpm", {"variance": "large"}), ("ddpm", {})]
)
def test_each_place_of_a_walk_is_scored(scored, tmp_path, sampler, how):
    path, net = checkpoint(tmp_path / "run")
    out = tmp_path / "out"
    cfg = settings(path, along="2,99", sampler=sampler, guidance=0.0, out=str(out), **how)
    compare_samplers.along(cfg, World())
    assert scored == [2, T]  # 99 steps are more than T
    found = json.loads(left(out, "along", "json").read_text())["walks"]
    alpha_bar, y, seeds = ch1.make_alpha_bar("cosine", T), torch.arange(3), torch.arange(3)
    for row, steps in zip(found, (2, T), strict=True):
        pairs = ddim.subsequence(T, steps)
        if sampler == "ddim":
            walk = ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, y, eta=0.4, prediction="v")
        else:

            def make_row(a, a_prev):
                variance = how.get("variance", "small")
                return ch1.ancestral_row(a, a_prev, prediction="v", variance=variance)

            walk = ch1.sample(net, alpha_bar, pairs, SHAPE, seeds, y, make_row=make_row)
        xs = [gaussian((3, *SHAPE), seeds, -1, "cpu"), *(x for x, _ in walk)]
        assert row["along"] == list(range(steps + 1)) and row["evaluations"] == steps
        for place, x in enumerate(xs):
            shown = to_uint8(x).numpy()
            guessed = guess(net, x, pairs[place][0], y, alpha_bar) if place < steps else shown
            for name, images in (("x_t", shown), ("x0_hat", guessed)):
                figures = row[name][place]
                assert figures["frechet"] == pytest.approx(images.mean(), abs=0.1)
                assert figures["inception_score"] == pytest.approx(images.std(), abs=0.1)
                ones = images[1].mean() / 255
                assert figures["class_accuracy"] == pytest.approx(ones, abs=1e-3)
    text = left(out, "along", "md").read_text()
    title = {"ddim": "ddim, eta 0.4", "ddpm": f"ddpm, beta{'' if how else '_tilde'}"}[sampler]
    assert f"\n{title}, guidance w = 0. " in text
    for row in found:
        half = row["steps"] // 2
        shown, guessed = row["x_t"][half], row["x0_hat"][half]
        numbers = [f"{v['frechet']:.3f} | {v['inception_score']:.3f} |" for v in (shown, guessed)]
        shares = [f" {100 * v['class_accuracy']:.1f} % |" for v in (shown, guessed)]
        line = f"| {half} | 50 % | {numbers[0]}{shares[0]} {numbers[1]}{shares[1]}"
        assert line in text
    assert np.asarray(Image.open(left(out, "along", "png")).convert("L")).std() > 5


def test_places_are_tenths_of_long_walks():
    assert compare_samplers.places_of(1000) == list(range(0, 1001, 100))
    assert compare_samplers.places_of(10) == list(range(11))
    assert compare_samplers.places_of(1) == [0, 1]


def test_the_strip_begins_at_noise_and_ends_at_the_sample(scored, tmp_path, monkeypatch):
    path, net = checkpoint(tmp_path / "run")
    seen, save_strip = [], films.save_strip
    monkeypatch.setattr(films, "save_strip", lambda *a: seen.append(a) or save_strip(*a))
    compare_samplers.along(settings(path, along="2,6", seeds="1,2"), World())
    ((where, columns, rows, note),) = seen
    assert list(columns) == [f"{i} %" for i in range(0, 101, 10)] and "nearest" in note
    assert rows == [f"{k} steps, {what}" for k in (2, 6) for what in ("x_t", "x0_hat")]
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", T), ddim.subsequence(T, 6)
    images = reference(net, alpha_bar, pairs, "ddim", 0.0, torch.arange(3))  # seed 1 has label 1
    for row in (2, 3):
        assert np.abs(columns["100 %"][row].astype(int) - images[1]).max() <= 1
    x = to_uint8(gaussian((1, *SHAPE), torch.tensor([1]), -1, "cpu")).numpy()[0]
    for row in (0, 2):
        assert np.array_equal(columns["0 %"][row], x)
    assert Image.open(where).width > 11 * films.SIDE


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_out_of_a_grid(channels, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (6, 4, 5, channels), np.uint8)
    save_grid(images, tmp_path / "grid.png", 3)
    with Image.open(tmp_path / "grid.png") as picture:
        found = compare_samplers.untiled(np.asarray(picture), 2, (channels, 4, 5))
    assert np.array_equal(found, images.reshape(2, 3, 4, 5, channels))


def test_a_walk_is_made_once(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(samplers_report, "draw_panels", lambda *args, **kwargs: None)
    path, _ = checkpoint(tmp_path / "run")

    def call(**changes):
        scored.clear()
        compare_samplers.along(settings(path, **({"along": "2,5"} | changes)), World())
        return list(scored)

    assert call() == [2, 5]
    assert call() == [] and call(along="3,5") == [3]
    log = tmp_path / "run" / "compare.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:-9]]))  # a kill in the middle of the second
    assert call() == [5]
    # What was found before is in files of its own.
    assert call(guidance=1.0) == [2, 5] and call(sampler="heun") == [2, 5]
    assert len(list((tmp_path / "run").glob("along_*.json"))) == 4


def test_walks_of_several_checkpoints_lie_in_one_figure(scored, tmp_path, monkeypatch):
    drawn, save_strip = [], []
    draw = lambda path, panels, title, **how: drawn.append((panels, title))  # noqa: E731
    monkeypatch.setattr(samplers_report, "draw_panels", draw)
    monkeypatch.setattr(films, "save_strip", lambda *a: save_strip.append(a))
    paths = [checkpoint(tmp_path / name, seed=i)[0] for i, name in enumerate(("one", "two"))]

    def call(**changes):
        scored.clear()
        compare_samplers.along(settings(paths[0], along="2,99", **changes), World())
        return list(scored)

    assert call() == [2, T] and call(more=(paths[1],)) == [2, T]  # the first is known
    names = [f"{run}, {k} steps" for run in ("one", "two") for k in (2, T)]
    assert list(drawn[-1][0][0][0][1]) == names and list(drawn[0][0][0][0][1]) == [
        "2 steps",
        "6 steps",
    ]
    assert "N = 3, against 7 images of nothing:test" in drawn[-1][1]
    assert save_strip[-1][2] == [f"{n}, {what}" for n in names for what in ("x_t", "x0_hat")]
    (both,) = (tmp_path / "one").glob("along*with=two.json")
    walks = json.loads(both.read_text())["walks"]
    assert [(row["run"], row["steps"]) for row in walks] == [
        (r, k) for r in ("one", "two") for k in (2, T)
    ]
    assert len({row["weights"] for row in walks}) == 2
    assert len([*(tmp_path / "one").glob("along*.json")]) == 2 and call(more=(paths[1],)) == []
    assert not [*(tmp_path / "two").glob("along*")]

    class Other(Evaluator):
        def __init__(self, name, root, **how):
            super().__init__(name, root, **how)
            self.protocol = f"brightness {len(self.made)}"

    monkeypatch.setattr(eval_fid, "Evaluator", Other)
    with pytest.raises(BadInput, match="two/ckpt.pt, .*scored against"):
        call(more=(paths[1],))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("b", "b: the tables are of one checkpoint; several take --along"),
        ("b b --along 2", "the same checkpoint twice"),
        ("--along 0", "--along 0: expected numbers"),
        ("--along ten", "--along ten: expected numbers"),
        ("--along 2 --compare-steps 3", "--compare-steps has no part in --along"),
        ("--along 2 --sample-steps 3", "--sample-steps has no part in --along"),
        ("--along 2 --sampler heun --eta 0.5", "--eta is of ddim, and --along goes by heun"),
        ("--along 2 --variance large", "--variance does nothing without --sampler ddpm"),
    ],
)
def test_what_has_no_part_is_refused(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["compare_samplers.py", "a", "--gpus", "0", *arguments.split()])
    with pytest.raises(BadInput, match=message):
        compare_samplers.main()


# ------------------------------------------------------------------------------- the guidance film


def test_the_film_shows_each_class_at_each_w(scored, tmp_path, monkeypatch):
    path, net = checkpoint(tmp_path / "run")
    seen, save_beside = [], films.save_beside
    monkeypatch.setattr(films, "save_beside", lambda *a: seen.append(a) or save_beside(*a))
    for figure in ("draw_panels", "draw_cells"):
        monkeypatch.setattr(samplers_report, figure, lambda *args, **kwargs: None)
    cfg = settings(path, n=2, compare_steps="2", sample_steps=4, sampler="ddpm")
    compare_samplers.compare(cfg, World())
    ((where, found, marks, rows, _),) = seen
    assert list(found) == ["w = -1", "w = 1"] and rows == ["a", "b", "c"]
    assert [mark.split(", ")[1] for mark in marks] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", T), ddim.subsequence(T, 4)
    x = to_uint8(gaussian((3, *SHAPE), torch.arange(3), -1, "cpu")).numpy()
    for w in (-1, 1):
        frames = found[f"w = {w}"]
        last = reference(net, alpha_bar, pairs, "ddpm", w, torch.arange(3))
        assert len(frames) == 5 and np.array_equal(frames[0], x)
        assert np.abs(frames[-1].astype(int) - last).max() <= 1
    ends = [found[name][-1].astype(int) for name in found]
    assert np.abs(ends[0] - ends[1]).max() > 5
    with Image.open(f"{where}.gif") as film:
        assert film.n_frames == 5
    # It is drawn again for other weights alone, and then under another name.
    compare_samplers.compare(cfg, World())
    assert len(seen) == 1
    checkpoint(tmp_path / "run", seed=1)
    compare_samplers.compare(cfg, World())
    assert len(seen) == 2 and seen[1][0] != where
    assert len(list((tmp_path / "run").glob("guidance-film*.gif"))) == 2


# ---------------------------------------------------------------------- precision, recall, names


def test_precision_and_recall_are_those_of_the_definition(scored, tmp_path, monkeypatch):
    """Kynkäänniemi et al. 2019, eq. 1-2, k = 3, written as loops."""
    path, net = checkpoint(tmp_path / "run", class_cond=False)
    cfg = settings(path, n=9, compare_steps="6", batch_size=9)
    compare_samplers.compare(cfg, World())
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", T), ddim.subsequence(T, 6)
    real = pixels(REAL).double().numpy()

    def share(inside, of):
        """The share of rows in some ball around a row `of`, up to the third neighbour."""
        balls = []
        for row in of:
            near = sorted(np.linalg.norm(of - row, axis=1))
            balls.append((row, near[3]))
        hits = [any(np.linalg.norm(v - c) <= r for c, r in balls) for v in inside]
        return sum(hits) / len(hits)

    rows, seen = read_log(tmp_path / "run" / "compare.jsonl"), set()
    where = net, alpha_bar, pairs
    for row in rows:
        about, figures = row["made_by"], row["figures"]
        variance = about.get("variance", "small")
        images = reference(*where, about["sampler"], 0.0, None, variance=variance, n=9)
        fake = pixels(images).double().numpy()
        assert figures["precision"] == pytest.approx(share(fake, real))
        assert figures["recall"] == pytest.approx(share(real, fake))
        seen |= {figures["precision"], figures["recall"]}
    assert len(rows) == 5 and len(seen) > 1


def test_settings_are_in_the_names_of_files(tmp_path):
    cfg = compare_samplers.Config(checkpoint="runs/a/ckpt.pt")
    names = [*compare_samplers.Config.DECIDE, "compare_steps"]
    assert suffix_of(changed(cfg, names)) == ""
    cfg = settings(str(tmp_path / "ckpt-000100.pt"), eta=0.5, data="/some/photos")
    (tmp_path / "ckpt-000100.pt").touch()
    told = "_data=photos_batch-size=2_of=ckpt-000100_n=3_steps=2,99_eta=0.5"
    assert suffix_of(changed(cfg, names)) == told


def test_files_of_other_facts_are_left_alone(tmp_path):
    facts = {"weights": "abc", "steps": (1, 2)}
    assert name_for(tmp_path, "compare", "_n=3", facts) == ("_n=3", False)
    path = tmp_path / "compare_n=3.json"
    path.write_text(json.dumps({"facts": {**facts, "command": "python"}}))
    assert name_for(tmp_path, "compare", "_n=3", facts) == ("_n=3", True)
    other, known = name_for(tmp_path, "compare", "_n=3", facts | {"weights": "abd"})
    assert other.startswith("_n=3-") and not known
    path.write_text("{}")  # of an earlier version
    assert name_for(tmp_path, "compare", "_n=3", facts)[0] != "_n=3"
