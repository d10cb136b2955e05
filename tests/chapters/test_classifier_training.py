"""classifier_guidance.py's training: its log, its figures, what it reads and is trained on."""

from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.finite import NotFinite
from runtime.processes import World

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_files import write_images
from launching import succeed
from PIL import Image
from tiny_runs import flags

import classifier_guidance as guide
from ddpm_pixel import alpha_bar_of
from evaluation import over_time
from image_data import datasets


def test_the_log_has_accuracies_by_quarter_of_t(toy, tiny, tmp_path):
    how = flags("classifier_guidance", metric_every=4, metric_n=20)
    folder = tmp_path / "run"
    succeed("classifier_guidance", *tiny["classifier_guidance"], *toy, *how, "--out", folder)
    log = read_log(folder / "log.jsonl")
    ours = [row for row in log if "loss" in row]
    assert [row["step"] for row in ours] == list(range(1, 21))
    for row in ours:
        quarters = [row[key] for key in row if key.startswith("accuracy_q")]
        assert 0 <= min(quarters) <= row["accuracy"] <= max(quarters) <= 1
        assert {key[-2:] for key in row if "accuracy_q" in key} == {
            key[-2:] for key in row if "loss_q" in key
        }
    looks = [row for row in log if "test_accuracy" in row]
    assert [row["step"] for row in looks] == [4, 8, 12, 16, 20]
    for row in looks:
        quarters = [row[f"test_accuracy_q{i}"] for i in range(1, 5)]
        assert row["test_accuracy"] == pytest.approx(np.mean(quarters))
    for name in ("accuracy.png", "loss.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5
    with Image.open(folder / "gradient.png") as picture:  # x_t and gradient of four images
        assert picture.size == (len(guide.SHOWN) * 18 + 2, 8 * 18 + 2)


class Threshold:
    """Reads an image right where its mean is above 0, else as class 0; and remembers its t."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t):
        self.seen += t.tolist()
        high = (x.mean(dim=(1, 2, 3)) > 0).long()
        return F.one_hot(high, 3).float()


class Five:
    """A data set of five images."""

    name = "five"

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return 5

    def batch(self, rows):
        return self.images[rows], self.labels[rows]


def test_accuracy_over_t_is_counted():
    values = torch.tensor([-0.5, 0.5, 0.5, -0.5, 0.5])
    labels = torch.tensor([0, 1, 0, 2, 1])
    images = values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    ds = Five(images, labels)
    classifier, T = Threshold(), 40

    def noisy(x0, t, eps):  # from t = 20 on, images are the noise's sign of their seed
        return torch.where(t.view(-1, 1, 1, 1) < 20, x0, -x0)

    found = over_time.accuracy(classifier, noisy, ds, T, 100, 2, World())
    assert found == [3 / 5] * 10 + [1 / 5] * 10  # of 0 1 1 0 1, then of 1 0 0 1 0
    times = over_time.timesteps(T)
    assert times == list(range(1, 40, 2)) and sorted(classifier.seen) == sorted(times * 5)
    quarters = over_time.by_quarter([*range(20)], "a")
    assert quarters == {"a": 9.5, "a_q1": 2, "a_q2": 7, "a_q3": 12, "a_q4": 17}


def test_what_is_trained_on_and_how(toy, tiny, tmp_path):
    """Moved images, and decaying weights: each changes a run from the step where it counts."""
    losses = {}
    for name, how in {
        "plain": {"shift": 0, "weight_decay": 0.0},
        "moved": {"shift": 2, "weight_decay": 0.0},
        "decayed": {"shift": 0, "weight_decay": 5.0},
    }.items():
        given = [*tiny["classifier_guidance"], *toy, *flags("classifier_guidance", **how)]
        given += ["--steps", 3, "--sample-every", 0, "--warmup", 0, "--lr", 0.05]
        succeed("classifier_guidance", *given, "--out", tmp_path / name)
        losses[name] = [row["loss"] for row in read_log(tmp_path / name / "log.jsonl")]
    assert losses["moved"][0] != losses["plain"][0] == losses["decayed"][0]
    assert losses["decayed"][1] != losses["plain"][1]


def test_held_out_images_are_those_of_the_test_split(tmp_path):
    for split, count in (("train", 24), ("test", 10)):
        write_images(tmp_path / "set" / split, count)
    cfg = guide.Config(data=str(tmp_path / "set"), data_root=str(tmp_path / "root"))
    ds = datasets.of(cfg)
    found = guide.held_out_of(cfg, ds)
    assert (len(ds), len(found)) == (24, 10)
    assert guide.held_out_of(replace(cfg, dry_run=True, data="/no/such"), ds) is ds
    others = replace(ds, class_names=("bars", "rings"))
    with pytest.raises(BadInput, match="test images have other classes"):
        guide.held_out_of(cfg, others)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_plan_reads_no_test_images_and_says_nothing_of_them(monkeypatch, toy, capsys, dry_run):
    class Stop(Exception):
        pass

    def steps():
        raise Stop

    monkeypatch.setattr(guide, "Run", lambda *_, **__: SimpleNamespace(say=print, steps=steps))
    cfg = guide.Config(data=toy[1], data_root=toy[3], dry_run=dry_run, model_channels=8)
    with pytest.raises(Stop):
        guide.train(cfg, World())
    assert ("has no test images" in capsys.readouterr().out) is not dry_run  # toy has none


def test_the_gradient_is_drawn_towards_the_next_class(monkeypatch, toy):
    cfg = guide.Config(data=toy[1], data_root=toy[3])
    ds, seen = datasets.of(cfg), []

    def look(classifier, x, t, y):
        seen.append((t, *y.tolist()))
        return 3 * x

    monkeypatch.setattr(guide, "log_prob_gradient", look)
    sheet = guide.gradients(None, ds, alpha_bar_of(cfg))
    _, labels = over_time.evenly(ds, 4)
    assert len(sheet) == 4 * 2 * len(guide.SHOWN)
    assert {y for _, y in seen[: len(guide.SHOWN)]} == {1 - labels[0].item()}
    assert [t for t, _ in seen[: len(guide.SHOWN)]] == [int(1000 * part) for part in guide.SHOWN]
    assert sheet[len(guide.SHOWN)].max() in (0, 255) or sheet[len(guide.SHOWN)].min() in (0, 255)


def test_logits_that_are_not_finite_are_no_accuracy():
    ds = Five(torch.zeros(5, 1, 2, 2), torch.zeros(5).long())

    def broken(x, t):
        return torch.full((len(x), 2), torch.nan if t[0] > 500 else 1.0)

    def noisy(x0, t, eps):
        return x0

    with pytest.raises(NotFinite, match="at t = 525 are not finite"):  # the first above 500
        over_time.accuracy(broken, noisy, ds, 1000, 5, 2, World())
