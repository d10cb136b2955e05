"""The last stages of a run: samples and figures are made once, and again when out of date."""

from runtime.commandline import BadInput
from runtime.pictures import save_samples

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import succeed

from evaluation import score as score_module
from evaluation.score import score

EVAL = """
import json, os, sys
if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
    sys.exit("as a rank it would wait for others that are gone")
images, reference, *flags = sys.argv[1:]
if "broken" in reference:
    sys.exit(2)
out = flags[flags.index("--json") + 1]
open(out, "w").write(json.dumps(
    {"class_accuracy": 0.5, "frechet": 1.25, "n_generated": 7, "flags": [reference, *flags]}
))
print("a table of", images)
"""


DIGITS = SimpleNamespace(name="digits", num_classes=10)  # as much of a Dataset as is looked at


@dataclass
class Settings:
    out: str
    data: str = "digits"
    data_root: str = "root"
    gpus: int = 0
    size: int = 0
    classes: str = ""


@pytest.fixture
def run(tmp_path):
    """(settings of a run that has drawn, a program in the place of eval_fid.py)."""
    (tmp_path / "eval.py").write_text(EVAL)
    folder = tmp_path / "run"
    (folder / "autoencoder").mkdir(parents=True)
    for name in ("autoencoder/reconstructions.npz", "samples.npz"):
        np.savez(folder / name, np.zeros(1))
    return Settings(str(folder)), tmp_path / "eval.py", folder


def test_reconstructions_and_samples_are_scored_and_told_in_a_line_each(run, capfd, monkeypatch):
    cfg, script, folder = run
    monkeypatch.setenv("RANK", "0")  # under torchrun
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg.size, cfg.classes, cfg.gpus = 16, "3,7", 8
    score(cfg, DIGITS, script)
    out = capfd.readouterr().out.splitlines()
    assert out[0] == (
        f"{folder}/autoencoder/reconstructions.png: class accuracy 50.0 %, Fréchet distance 1.25 "
        "(N = 7, the digits classifier's features)"
    )
    assert out[1] == f"a table of {folder}/samples.npz" and out[2].startswith(f"{folder}/samples")
    asked = ["digits:test", "--data-root", "root", "--json", str(folder / "eval.json")]
    found = json.loads((folder / "eval.json").read_text())["flags"]
    asked += ["--gpus", "1", "--features", "classifier"]
    assert found == [*asked, "--size", "16", "--classes", "3,7"]


def test_a_figure_is_computed_again_only_for_newer_images(run):
    cfg, script, folder = run
    told = [folder / "eval.json", folder / "autoencoder" / "eval.json"]
    score(cfg, DIGITS, script)
    first = [path.stat().st_mtime_ns for path in told]
    score(cfg, DIGITS, script)
    assert [path.stat().st_mtime_ns for path in told] == first
    later = first[0] + 10**9
    os.utime(folder / "samples.npz", ns=(later, later))
    score(cfg, DIGITS, script)
    assert told[0].stat().st_mtime_ns > first[0] and told[1].stat().st_mtime_ns == first[1]


def test_figures_of_other_features_are_not_taken_for_the_classifiers(run):
    cfg, script, folder = run
    (folder / "eval.json").write_text('{"class_accuracy": null, "frechet": 9.0}')
    score(cfg, DIGITS, script)
    assert json.loads((folder / "eval.json").read_text())["frechet"] == 1.25


def test_new_samples_do_away_with_what_was_said_of_the_old(tmp_path):
    for name in ("samples.json", "eval.json"):
        (tmp_path / name).write_text("{}")
    save_samples(tmp_path, torch.zeros(3, 4, 4, 1, dtype=torch.uint8), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.png"]


def test_without_reconstructions_samples_are_scored_alone(run, capfd):
    cfg, script, folder = run
    (folder / "autoencoder" / "reconstructions.npz").unlink()
    score(cfg, DIGITS, script)
    assert "reconstructions.png" not in capfd.readouterr().out


PHOTOS = SimpleNamespace(name="photos", num_classes=0)


def test_data_without_classes_are_scored_by_inception(run, capfd, monkeypatch):
    cfg, script, folder = run
    monkeypatch.setattr(score_module, "find_weights", lambda *args: "weights.pth")
    (folder / "eval.json").write_text('{"class_accuracy": 0.5, "frechet": 9.0}')  # a classifier's
    script.write_text(
        EVAL.replace("0.5", "None").replace('"n_gen', '"network": "Inception", "n_gen')
    )
    score(cfg, PHOTOS, script)
    told = f"{folder}/samples.png: Fréchet distance 1.25 (N = 7, Inception's features)"
    assert capfd.readouterr().out.splitlines()[-1] == told
    found = json.loads((folder / "eval.json").read_text())
    assert found["flags"][-2:] == ["--features", "inception"]
    written = (folder / "eval.json").stat().st_mtime_ns
    score(cfg, PHOTOS, script)
    assert (folder / "eval.json").stat().st_mtime_ns == written


def test_without_classes_and_without_inception_it_says_what_to_type(run, capfd, monkeypatch):
    cfg, script, folder = run
    monkeypatch.setenv("DIFFUSION_MIRROR", "http://127.0.0.1:1")
    score(cfg, PHOTOS, script)
    out = capfd.readouterr().out
    assert out.startswith("no evaluation: photos has no classes") and out.count("\n") == 1
    command = f"python eval_fid.py {folder}/samples.npz digits:test --data-root root --data NAME"
    assert command in out and not (folder / "eval.json").exists()


def test_an_evaluation_that_fails_tells_its_command(run):
    cfg, script, _ = run
    cfg.data = "broken data"
    with pytest.raises(BadInput, match=r"eval\.py .*reconstructions\.npz 'broken data:test'"):
        score(cfg, DIGITS, script)


def test_samples_are_drawn_again_only_when_something_decides_otherwise(toy, tiny, tmp_path):
    flags = [*tiny["ldm_cfg"], *toy, "--steps", 3, "--ae-steps", 2, "--sample-every", 0]

    def draw(*more):
        before = path.stat().st_mtime_ns if path.exists() else None
        done = succeed("ldm_cfg", *flags, "--out", tmp_path, *more)
        return path.stat().st_mtime_ns != before, "samples:" in done.out

    path = tmp_path / "samples.npz"
    assert draw() == (True, True)
    assert draw() == (False, False)
    assert draw("--guidance", 2) == (True, True)
    assert draw("--guidance", 2) == (False, False)
    asked = ["--sample", tmp_path / "ckpt.pt", "--classes", "1", "--n", 4, "--gpus", 0]
    succeed("ldm_cfg", *asked)
    assert draw("--guidance", 2) == (False, False)  # without --out they lie in a folder beside
    succeed("ldm_cfg", *asked, "--out", tmp_path)
    assert draw("--guidance", 2) == (True, True)  # others lay in their place
    assert draw("--guidance", 2, "--steps", 4, "--save-every", 1) == (True, True)
    # Samples of weights that another file has held since, however late they were written.
    checkpoint, shown = tmp_path / "ckpt.pt", path.stat().st_mtime_ns
    os.utime(checkpoint, ns=(shown - 10**12, shown - 10**12))
    assert draw("--guidance", 2, "--steps", 4, "--save-every", 1) == (True, True)
