"""classifier_guidance.py's commands over two checkpoints: --sample, --study, what is refused."""

from runtime.files import read_log
from runtime.processes import World

import json
from dataclasses import replace
from functools import partial

import numpy as np
import openai_unet
import pytest
import torch
from data_files import write_images
from launching import refused, run, start_ranks, succeed
from PIL import Image
from tiny_runs import flags

import classifier_guidance as guide
import improved_ddpm
from ddpm_pixel import alpha_bar_of, timestep_pairs
from evaluation import guidance_report
from image_data import datasets


@pytest.fixture(scope="module")
def trained(toy, tiny, tmp_path_factory):
    """{name: checkpoint}: a classifier, a network that knows no classes, one that does."""
    folder = tmp_path_factory.mktemp("guided")
    made = {
        "classifier": ("classifier_guidance", {"metric_every": 4, "metric_n": 20}),
        "plain": ("improved_ddpm", {"class_cond": False}),
        "told": ("ddpm_pixel", {"schedule": "cosine"}),
    }
    for name, (script, how) in made.items():
        succeed(script, *tiny[script], *toy, *flags(script, **how), "--out", folder / name)
    return {name: folder / name / "ckpt.pt" for name in made}


def asked(trained, name, *more, task="--sample"):
    return [task, trained[name], "--classifier", trained["classifier"], "--gpus", 0, *more]


# -------------------------------------------------------------------------------------- sampling


WAYS = {  # network, w, more settings
    "algorithm 1": ("plain", 0, {}),
    "of a network that is not told": ("told", -1, {}),
    "algorithm 2": ("plain", 0, {"sampler": "ddim"}),
    "with noise, and without a classifier, too": ("told", 2, {"sampler": "ddim", "eta": 0.5}),
    "in parts": ("told", 0, {"classifier_batch": 2, "use_checkpoint": True}),
    "not clipped": ("plain", 0, {"clip_denoised": False}),
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_are_those_of_the_walk(way, trained, tmp_path):
    name, w, more = WAYS[way]
    how = {"n": 5, "sample_steps": 3, "guidance": w, "classifier_scale": 3, **more}
    given = asked(trained, name, *flags("classifier_guidance", **how), "--classes", "dots,0")
    succeed("classifier_guidance", *given, "--out", tmp_path)
    net, cfg, shape, *_ = improved_ddpm.load_net(trained[name], "cpu")
    classifier, _, _, names, alpha_bar = guide.load_classifier(trained["classifier"], "cpu")
    assert names == ["bars", "dots"] and torch.equal(alpha_bar, alpha_bar_of(cfg))
    seeds, labels = torch.arange(5), torch.tensor([1, 0, 1, 0, 1])
    pairs = timestep_pairs(1000, 3)
    how = {"scale": 3.0, "w": w, "algorithm": 1, "clip": more.get("clip_denoised", True)}
    how["make_row"] = improved_ddpm.rows_of(cfg, alpha_bar, pairs)
    if "sampler" in more:
        eta = more.get("eta", 0.0)
        how |= {"algorithm": 2, "make_row": partial(guide.ddim_row, eta=eta)}
    where = (net, classifier, alpha_bar, pairs, shape, seeds, labels)
    *_, (x, _) = guide.sample(*where, **how)
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(int)
    held = np.load(tmp_path / "samples.npz")
    assert np.abs(held["arr_0"].astype(int) - wanted).max() <= (way == "in parts")
    assert np.array_equal(held["arr_1"], labels)
    assert (tmp_path / "samples.png").exists() and (tmp_path / "reverse.gif").exists()


def test_the_settings_reach_classifier_and_walk(trained, monkeypatch):
    args = ["classifier_guidance", *map(str, asked(trained, "plain", "--use-checkpoint"))]
    monkeypatch.setattr("sys.argv", args)
    cfg = guide.Config(classifier=str(trained["classifier"]), use_checkpoint=True, n=3)
    net, theirs, classifier, shape, _ = guide.load_pair(cfg, trained["plain"], World())
    assert classifier.use_checkpoint and not any(p.requires_grad for p in classifier.parameters())
    sizes, forward = [], type(classifier).forward

    def look(self, x, t):
        sizes.append(len(x))
        return forward(self, x, t)

    monkeypatch.setattr(type(classifier), "forward", look)
    walk = replace(cfg, classifier_batch=2), replace(theirs, sample_steps=2)
    list(guide.trajectory(net, classifier, *walk, shape, torch.arange(3), torch.zeros(3).long()))
    assert sizes == [2, 1, 2, 1]


def test_the_mean_that_is_named_is_sampled(trained, tiny, toy, tmp_path):
    given = [*tiny["improved_ddpm"], *toy, "--ema", 0.5, 0.99, "--no-class-cond"]
    succeed("improved_ddpm", *given, "--sample-every", 0, "--out", tmp_path / "two")
    pair = {"two": tmp_path / "two" / "ckpt.pt", "classifier": trained["classifier"]}
    drawn = []
    for more in ([], ["--ema", 0.5], ["--ema", 0.99]):
        how = ["--n", 2, "--sample-steps", 2, "--out", tmp_path / "out", *more]
        succeed("classifier_guidance", *asked(pair, "two", *how))
        drawn.append(np.load(tmp_path / "out" / "samples.npz")["arr_0"])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert "--ema 0.7" in refused("classifier_guidance", *asked(pair, "two", "--ema", 0.7))


def test_a_sample_is_a_function_of_its_seed(trained, tmp_path):
    """Sample 17 alone, in a batch, and of two processes."""

    def draw(name, *extra, size=1):
        how = ["--sample-steps", 6, "--classifier-scale", 4, "--out", tmp_path / name, *extra]
        for process in start_ranks(
            "classifier_guidance", *asked(trained, "plain", *how), size=size
        ):
            done = process.wait()
            assert done.code == 0, done.err
        found = np.load(tmp_path / name / "samples.npz")
        return found["arr_0"].astype(int), found["arr_1"]

    alone, label = draw("alone", "--seeds", 17)
    many, labels = draw("many", "--seeds", "0-23", "--batch-size", 24)
    split, split_labels = draw("split", "--seeds", "0-23", "--batch-size", 8, size=2)
    assert label[0] == labels[17] == 1 and np.array_equal(labels, split_labels)
    assert np.abs(many[17] - alone[0]).max() <= 1 and np.abs(many - split).max() <= 1
    others = np.delete(many, 17, axis=0)
    assert np.abs(others - alone[0]).max(axis=(1, 2, 3)).min() > 1


def random_weights(shapes):
    """Published tensors of these shapes, small enough that a walk stays finite."""
    generator = torch.Generator().manual_seed(3)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_published_pair(trained, tmp_path):
    """Neither file names a schedule: it is typed; and 64 channels make one head."""
    small = {"resblock_updown": True, "use_scale_shift_norm": True}
    unet = openai_unet.published(64, (1, 2, 3, 4), 1, [4], classes=3, **small)
    reads = openai_unet.published(64, (1, 2, 3, 4), 1, [4], pool=8, **small | {"out": 3})
    for name, shapes in (("diffusion", unet), ("classifier", reads)):
        torch.save(random_weights(shapes), tmp_path / f"{name}.pt")
    pair = ["--sample", tmp_path / "diffusion.pt", "--classifier", tmp_path / "classifier.pt"]
    how = ["--schedule", "cosine", "--sample-steps", 2, "--n", 2, "--gpus", 0, "--classes", 2]
    succeed("classifier_guidance", *pair, *how, "--out", tmp_path / "out")
    net, cfg, shape, *_ = improved_ddpm.load_net(tmp_path / "diffusion.pt", "cpu")
    classifier, *_, none = guide.load_classifier(tmp_path / "classifier.pt", "cpu")
    assert none is None and shape == (3, 64, 64)
    cfg.schedule, cfg.sample_steps = "cosine", 2
    walk = guide.trajectory(
        net, classifier, guide.Config(), cfg, shape, *torch.tensor([[0, 1], [2, 2]])
    )
    *_, (x, _) = walk
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    held = np.load(tmp_path / "out" / "samples.npz")
    assert np.array_equal(held["arr_0"], wanted) and held["arr_1"].tolist() == [2, 2]
    again = [*pair[:3], trained["classifier"], *how]
    for given, wanted in (
        ([*pair, *how, "--guidance", 1], "never learned to do without a label"),
        (again, "images (C, H, W) (1, 16, 16) and (3, 64, 64)"),
    ):
        done = run("classifier_guidance", *given)
        (error,) = done.err.splitlines()
        assert done.code == 2 and "has no scheduler" in done.out and wanted in error


# ------------------------------------------------------------------------------------- the study


def study(trained, name, out, *more):
    how = ["--n", 6, "--sample-steps", 2, "--study-scales", "2,0,2", "--study-guidance=-1,0,3"]
    return asked(trained, name, *how, "--out", out, *more, task="--study")


def test_a_study_of_a_network_that_knows_classes(trained, tmp_path):
    done = succeed("classifier_guidance", *study(trained, "told", tmp_path))
    text = (tmp_path / "classifier-guidance.md").read_text()
    assert text.strip() in done.out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| classifier")]
    told = [(row[0][2:], row[1], row[2]) for row in rows]
    assert told == [
        ("classifier", "0", "-1"),
        ("classifier", "2", "-1"),
        ("classifier, told y", "0", "0"),
        ("classifier, told y", "2", "0"),
        ("classifier-free", "0", "-1"),
        ("classifier-free", "0", "0"),
        ("classifier-free", "0", "3"),
    ]
    figures = [row[3:] for row in rows]
    assert figures[0] == figures[4] and figures[2] == figures[5]  # the same samples, drawn once
    accuracy = [
        row[list(guidance_report.FIGURES.values()).index("class_accuracy") + 3] for row in rows
    ]
    assert [figure == "-" for figure in accuracy] == [True, *[False] * 3, True, *[False] * 2]
    assert len(read_log(tmp_path / "classifier-guidance.jsonl")) == 5
    with Image.open(tmp_path / "classifier-guidance.png") as picture:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 5

    # A second call draws only what is new, and its table is the same.
    before = (tmp_path / "classifier-guidance.jsonl").read_text()
    succeed("classifier_guidance", *study(trained, "told", tmp_path))
    assert (tmp_path / "classifier-guidance.md").read_text() == text
    assert (tmp_path / "classifier-guidance.jsonl").read_text() == before
    succeed("classifier_guidance", *study(trained, "told", tmp_path, "--study-scales", "0,2,5"))
    assert len(read_log(tmp_path / "classifier-guidance.jsonl")) == 7

    # Each row's samples are those that --sample draws.
    row = json.loads((tmp_path / "classifier-guidance.json").read_text())["ways"]["classifier"][1]
    assert (row["scale"], row["guidance"]) == (2, -1) and 0 <= row["class_accuracy"] <= 1
    how = ["--n", 6, "--sample-steps", 2, "--classifier-scale", 2, "--guidance", -1]
    succeed("classifier_guidance", *asked(trained, "told", *how, "--out", tmp_path / "one"))
    drawn = np.load(tmp_path / "one" / "samples.npz")["arr_0"][..., 0]
    (cell,) = (
        row["cell"]
        for row in read_log(tmp_path / "classifier-guidance.jsonl")
        if (row["made_by"]["scale"], row["made_by"]["guidance"]) == (2, -1)
    )
    with Image.open(tmp_path / "classifier-guidance-cells" / cell) as picture:
        assert np.array_equal(np.asarray(picture)[2:18, 2:18], drawn[0])


def test_a_study_of_a_network_that_knows_none(trained, tmp_path):
    succeed("classifier_guidance", *study(trained, "plain", tmp_path, "--sampler", "ddim"))
    text = (tmp_path / "classifier-guidance.md").read_text()
    assert text.count("| classifier |") == 2 and "classifier-free" not in text
    assert "told y" not in text and "ddim, eta 0, 2 steps, N = 6" in text


def test_no_class_is_read_where_none_was_asked_for():
    def row(scale, guidance):
        return {
            "made_by": {"scale": scale, "guidance": guidance},
            "figures": {"class_accuracy": 0.5},
        }

    asked = {
        "classifier": [row(s, -1) for s in (0, 2)],
        "classifier-free": [row(0, w) for w in (-1, 1)],
    }
    ways = {way: [guidance_report.figures_of(row) for row in rows] for way, rows in asked.items()}
    expected = {"classifier": ([-1], [0.5]), "classifier-free": ([1], [0.5])}
    assert guidance_report.curves(ways, "guidance") == {"class accuracy": expected}


def test_the_cells_of_the_sheet_are_named_by_their_own_strength():
    rows = [{"scale": s, "guidance": -1} for s in (0, 0.5, 10)]
    free = [{"scale": 0, "guidance": w} for w in (-1, 4)]
    pictures = {"classifier": ["a", "b", "c"], "classifier-free": ["d", "e"]}
    found = guidance_report.sheet({"classifier": rows, "classifier-free": free}, pictures)
    told = {key: (picture, found[1][key]) for key, picture in found[0].items()}
    assert told == {
        ("classifier", 0): ("a", "s = 0"),
        ("classifier", 1): ("b", "s = 0.5"),
        ("classifier", 2): ("c", "s = 10"),
        ("classifier-free", 0): ("d", "w = -1"),
        ("classifier-free", 1): ("e", "w = 4"),
    }


def test_the_judge_reads_held_out_images_of_the_drawn_classes(trained):
    """Its class accuracy is that of the evaluation's classifier, whatever the order of classes."""
    _, cfg, shape, *_ = improved_ddpm.load_net(trained["plain"], "cpu")
    ds, _ = datasets.held_out(cfg.data, cfg.data_root, shape, ())
    names = ["dots", "bars"]  # of a network that numbers them otherwise
    labels = np.array([names.index(ds.class_names[i]) for i in ds.labels])
    judge, facts = guide.judge_of(guide.Config(), cfg, shape, names, World())
    assert facts["reference"].endswith(f"N = {len(ds)}")
    found = judge(ds.images, labels)
    assert found["frechet"] == pytest.approx(0, abs=1e-3)
    right = found["class_accuracy"]
    assert right > 0.5 and judge(ds.images, 1 - labels)["class_accuracy"] == pytest.approx(
        1 - right
    )
    _, few = guide.judge_of(guide.Config(classes="bars"), cfg, shape, names, World())
    some = (ds.labels == ds.class_names.index("bars")).sum()
    assert few["reference"].endswith(f"N = {some}") and 0 < some < len(ds)
    _, known = guide.judge_of(guide.Config(), cfg, shape, ["dots"], World())  # it knows no others
    assert known["reference"].endswith(f"N = {len(ds) - some}")


def test_another_classifier_makes_other_rows_of_a_study(trained, toy, tiny, tmp_path):
    other = tmp_path / "other"
    given = [*tiny["classifier_guidance"], *toy, "--steps", 3, "--sample-every", 0]
    succeed("classifier_guidance", *given, "--out", other)
    pairs = [trained, trained | {"classifier": other / "ckpt.pt"}]
    for pair in pairs:
        how = ["--n", 2, "--sample-steps", 2, "--study-scales", "2", "--out", tmp_path / "study"]
        succeed("classifier_guidance", *asked(pair, "plain", *how, task="--study"))
    rows = read_log(tmp_path / "study" / "classifier-guidance.jsonl")
    assert len(rows) == 2 and rows[0]["made_by"]["weights"] != rows[1]["made_by"]["weights"]
    # Seconds are of one image: less than the whole command took for two.
    assert 0 < rows[0]["figures"]["seconds_per_image"] < 5


# --------------------------------------------------------------------------------- what is refused


def test_a_pair_that_does_not_fit(trained, toy, tiny, tmp_path):
    """Classes, sizes, T and schedules that differ, each in a line that says what to type."""
    others = write_images(tmp_path / "others", 12, classes=("bars", "rings"))
    larger = write_images(tmp_path / "larger", 12, height=24, width=24)
    made = {
        "classes": (["--data", others], ["have other classes", "dots is rings", "--classes"]),
        "sizes": (["--data", larger], ["(1, 16, 16) and (1, 24, 24)"]),
        "chain": ([*toy[:2], "--timesteps", 500], ["T = 1000 and 500", "--timesteps 500"]),
        "schedule": (
            [*toy[:2], "--schedule", "linear"],
            ["cosine and linear", "--schedule linear"],
        ),
    }
    few = [*tiny["ddpm_pixel"], "--steps", 1, "--schedule", "cosine", "--data-root", tmp_path]
    for name, (how, wanted) in made.items():
        succeed("ddpm_pixel", *few, *how, "--out", tmp_path / name)
        pair = ["--sample", tmp_path / name / "ckpt.pt", "--classifier", trained["classifier"]]
        line = refused("classifier_guidance", *pair, "--gpus", 0, "--out", tmp_path / "out")
        assert all(text in line for text in [str(tmp_path / name), *wanted]), line
    assert not (tmp_path / "out").exists()


def test_a_chain_that_ends_without_an_image_cannot_take_algorithm_2(trained, toy, tiny, tmp_path):
    none = ["--schedule", "sigmoid", "--alpha-min", 0, "--prediction", "v", "--steps", 1]
    for script in ("ddpm_pixel", "classifier_guidance"):
        how = none[:4] + none[6:] if script == "classifier_guidance" else none
        succeed(script, *tiny[script], *toy, *how, "--out", tmp_path / script)
    pair = ["--sample", tmp_path / "ddpm_pixel" / "ckpt.pt"]
    pair += ["--classifier", tmp_path / "classifier_guidance" / "ckpt.pt", "--gpus", 0]
    line = refused("classifier_guidance", *pair, "--sampler", "ddim")
    assert "is 0 at T: type --sampler ddpm" in line
    succeed("classifier_guidance", *pair, "--n", 2, "--sample-steps", 3, "--out", tmp_path / "out")


def test_what_means_nothing_is_refused(trained, toy):
    plain, classifier = trained["plain"], trained["classifier"]
    cases = [
        (["--sample", plain], "--classifier"),
        (["--study", plain], "--classifier"),
        (["--sample", plain, "--study", plain, "--classifier", classifier], "one at a time"),
        (["--classifier", classifier, *toy], "--sample or --study"),
        (["--sample", classifier, "--classifier", classifier], "is a classifier of noisy images"),
        (["--sample", plain, "--classifier", plain], "expected a classifier"),
        (asked(trained, "plain", "--guidance", 1), "knows no labels"),
        (asked(trained, "plain", "--variance", "large", "--classes", "cat"), "0 bars, 1 dots"),
        (asked(trained, "told", "--variance", "learned"), "--variance learned"),
        (asked(trained, "plain", "--sample-steps", 1001), "--sample-steps 1001"),
        (asked(trained, "plain", "--classifier-scale", "nan"), "--classifier-scale nan"),
        (asked(trained, "plain", "--classifier-batch", -1), "--classifier-batch"),
        (asked(trained, "plain", "--eta", 1.5), "--eta"),
        (asked(trained, "plain", "--study-scales", "1,x", task="--study"), "--study-scales 1,x"),
        (asked(trained, "plain", "--study-scales", "nan", task="--study"), "--study-scales nan"),
        (asked(trained, "plain", "--sample-steps", 1001, task="--study"), "--sample-steps 1001"),
        (asked(trained, "plain", "--n", 1, task="--study"), "at least 2 images"),
        (["--dry-run", *asked(trained, "plain", task="--study")], "--dry-run has no part"),
    ]
    for given, wanted in cases:
        assert wanted in refused("classifier_guidance", *given, "--gpus", 0), given
