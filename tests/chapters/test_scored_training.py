"""Scores within training: whose features, against what, and what is refused before it begins."""

from runtime.commandline import BadInput, ScoredConfig
from runtime.processes import World

import json

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import refused, succeed

import ddpm_pixel
import eval_fid
from eval_fid import Evaluator, frechet_distance, statistics
from evaluation import choice
from image_data import datasets

PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
NOBODY = {"DIFFUSION_MIRROR": "http://127.0.0.1:1"}  # an address where nobody answers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of 16x16 pictures: `photos` of no class in colour, `gray` of none, `tall` of two."""
    home = tmp_path_factory.mktemp("scored")
    for split in ("train", "test"):
        write_images(home / "photos" / split, 7, channels=3, classes=())
        write_images(home / "gray" / split, 7, classes=())
        write_images(home / "tall" / split, 8, height=20)
    (home / "photos" / "train" / "00000.png").unlink()  # so the splits differ
    return home


def evaluator(home, data, steps=20, **settings):
    """That of a training on `data`, and its settings."""
    cfg = ScoredConfig(data=str(data), data_root=str(home / "root"), metric_every=1, **settings)
    return Evaluator.of_run(cfg, datasets.of(cfg), World(), steps=steps), cfg


def drawn(n, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, channels), np.uint8)


def test_the_score_is_of_the_classifier_s_own_probabilities(toy, home):
    scored, _ = evaluator(home, toy[1])
    images = drawn(40)
    logits = scored.extractor(torch.from_numpy(images))[1].detach().double()
    p = logits.softmax(1)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert scored(images)["inception_score"] == pytest.approx(kl.exp().item(), rel=1e-6)


@pytest.mark.parametrize("w", [0, -1])
def test_samples_that_were_asked_for_no_class_have_no_accuracy(w, toy, home):
    cfg = ddpm_pixel.Config(data=str(toy[1]), data_root=str(home / "root"), guidance=w)
    scored = Evaluator.of_run(cfg, datasets.of(cfg), World(), steps=20)
    right = scored(drawn(8), np.arange(8) % 2)["class_accuracy"]
    assert right is None if w == -1 else 0 <= right <= 1


def test_statistics_of_the_reference_are_kept_and_a_broken_file_is_not_believed(
    toy, home, monkeypatch, capsys
):
    first, cfg = evaluator(home, toy[1], metric_split="train")
    (path,) = (home / "root").glob(f"statistics-{datasets.of(cfg).key}-*.npz")
    expected, before = first(drawn(40)), path.read_bytes()
    looked = []
    look = eval_fid.kept_statistics.__globals__["look"]
    monkeypatch.setitem(
        eval_fid.kept_statistics.__globals__,
        "look",
        lambda *args, **how: looked.append(1) or look(*args, **how),
    )
    again, _ = evaluator(home, toy[1], metric_split="train")
    assert again(drawn(40)) == expected and not looked
    path.write_bytes(before[:500])
    capsys.readouterr()
    mended, _ = evaluator(home, toy[1], metric_split="train")
    assert mended(drawn(40)) == expected and looked == [1]
    assert f"{path} is damaged" in capsys.readouterr().err
    with np.load(path) as kept:
        assert kept["n"] == 64


class Means:
    """Few features in the place of Inception's: sums over parts of an image, under a resize."""

    network, dim, device = "Inception", 12, torch.device("cpu")

    def __init__(self, weights, root, resize, device, patience):
        self.resize, self.feature_hash, self.protocol = resize, f"means-{resize}", resize
        self.asked = weights, root, patience

    def __call__(self, images):
        x = images.double().reshape(len(images), 4, -1, 3).sum(2).flatten(1) / 1000  # (B, 12)
        return x.float(), x.float()


def test_clean_fid_s_protocol_against_training_images(home, monkeypatch):
    """The distance by a formula for few images.

    Of centred rows X (n, d), Y (m, d) the trace of (C C_w)^½ is the sum of the singular values of
    X Yᵀ, divided by the root of (n - 1)(m - 1).
    """
    monkeypatch.setattr(choice.inception_features, "load", Means)
    how = {"metric_features": "inception", "metric_resize": "clean", "metric_split": "train"}
    scored, cfg = evaluator(home, home / "photos", **how)
    assert scored.protocol == "clean" and scored.extractor.asked == ("", cfg.data_root, None)
    ds, images = datasets.of(cfg), drawn(5, 3)
    row = scored.score(lambda seeds, labels, desc: torch.from_numpy(images[seeds]), 5, 0)
    sides = [scored.extractor(torch.from_numpy(np.array(side)))[0] for side in (images, ds.images)]
    means, rows = zip(*((f.mean(0), f - f.mean(0)) for f in map(np.float64, sides)), strict=True)
    traces = [(r**2).sum() / (len(r) - 1) for r in rows]
    cross = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum() / np.sqrt(4 * 5)
    expected = ((means[0] - means[1]) ** 2).sum() + sum(traces) - 2 * cross
    assert row["frechet"] == pytest.approx(expected, rel=1e-6)
    assert (
        row.items()
        >= {
            "metric_n": 5,
            "metric_features": "Inception",
            "metric_reference": f"{home / 'photos'}:train",
            "n_reference": 6,
            "class_accuracy": None,
        }.items()
    )
    # Of data without classes auto means Inception, if its weights do not take long to come.
    auto, _ = evaluator(home, home / "photos")
    assert auto.protocol == "pytorch-fid" and auto.n_reference == 7
    assert auto.extractor.asked[2] == choice.PATIENCE


TRAIN = ["--steps", 2, "--sample-every", 0, "--metric-every", 1, "--metric-n", 4]


def test_without_classes_it_is_said_what_to_type_before_training(home, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *TRAIN, "--data-root", home / "root", "--out", tmp_path / "run"]
    asked = ["--data", home / "photos", *flags]
    told = refused("ddpm_pixel", *asked, env=NOBODY)
    assert "photos has no classes" in told and "type --metric-data NAME" in told
    assert " --data" not in told and " --weights" not in told
    told = refused("ddpm_pixel", *asked, "--metric-features", "classifier", env=NOBODY)
    assert "photos has no classes" in told and "with --metric-data NAME" in told
    told = refused("ddpm_pixel", *asked, "--metric-features", "inception", env=NOBODY)
    assert PUBLISHED in told
    assert not (tmp_path / "run").exists()


def test_samples_of_such_data_are_read_by_a_classifier_of_others(toy, home, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *TRAIN, *toy[2:], "--out", tmp_path / "run"]
    done = succeed("ddpm_pixel", "--data", home / "gray", *flags, "--metric-data", toy[1])
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, rows) if "frechet" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["metric_features"] == "toy classifier" for row in rows)
    assert all(row["class_accuracy"] is None and row["inception_score"] >= 1 for row in rows)
    assert rows[0]["n_reference"] == 7
    assert done.err.count("scores of 4 samples: the inception score") == 1


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (
            "photos",
            {"metric_data": "tall"},
            r"--metric-data .*tall: .*\(1, 16, 16\).*\(3, 16, 16\)",
        ),
        ("gray", {"metric_data": "photos"}, "photos has no classes .* with --metric-data NAME"),
        ("gray", {"metric_data": "tall", "metric_features": "inception"}, "for a classifier's"),
        ("tall", {"metric_data": "gray"}, r"\(1, 16, 16\), those of tall are \(1, 20, 16\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(home, data, settings, words):
    settings = settings | {"metric_data": str(home / settings["metric_data"])}
    with pytest.raises(BadInput, match=words):
        evaluator(home, home / data, **settings)


def test_a_gray_network_may_be_read_by_a_classifier_of_colours_and_other_sizes(home):
    write_images(home / "colours" / "train", 12, height=20, width=20, channels=3)
    scored, _ = evaluator(home, home / "gray", metric_data=str(home / "colours"))
    images = drawn(9)
    found = scored(images)
    feats = scored.extractor(torch.from_numpy(images.repeat(3, axis=3)))[0].detach().numpy()
    real = np.array(datasets.load(str(home / "gray"), home / "root", split="test").images)
    others = scored.extractor(torch.from_numpy(real.repeat(3, axis=3)))[0].detach().numpy()
    expected = frechet_distance(*statistics(feats), *statistics(others))
    assert found["frechet"] == pytest.approx(expected, rel=1e-5)
