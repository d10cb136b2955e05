"""The last stages of a run: samples and figures are made once, and again when out of date."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
from launching import succeed

from runtime import BadInput
from support.score import score

EVAL = """
import json, sys
images, reference, *flags = sys.argv[1:]
if "broken" in reference:
    sys.exit(2)
out = flags[flags.index("--json") + 1]
open(out, "w").write(json.dumps(
    {"class_accuracy": 0.5, "frechet": 1.25, "n_generated": 7, "flags": [reference, *flags]}
))
print("a table of", images)
"""


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


def test_reconstructions_and_samples_are_scored_and_told_in_a_line_each(run, capfd):
    cfg, script, folder = run
    cfg.size, cfg.classes, cfg.gpus = 16, "3,7", 8
    score(cfg, script)
    out = capfd.readouterr().out.splitlines()
    assert out[0] == (
        f"{folder}/autoencoder/reconstructions.png: class accuracy 50.0 %, Fréchet distance 1.25 "
        "(N = 7, digits features)"
    )
    assert out[1] == f"a table of {folder}/samples.npz" and out[2].startswith(f"{folder}/samples")
    asked = ["digits:test", "--data-root", "root", "--json", str(folder / "eval.json")]
    found = json.loads((folder / "eval.json").read_text())["flags"]
    assert found == [*asked, "--gpus", "1", "--size", "16", "--classes", "3,7"]


def test_a_figure_is_computed_again_only_for_newer_images(run):
    cfg, script, folder = run
    told = [folder / "eval.json", folder / "autoencoder" / "eval.json"]
    score(cfg, script)
    first = [path.stat().st_mtime_ns for path in told]
    score(cfg, script)
    assert [path.stat().st_mtime_ns for path in told] == first
    later = first[0] + 10**9
    os.utime(folder / "samples.npz", ns=(later, later))
    score(cfg, script)
    assert told[0].stat().st_mtime_ns > first[0] and told[1].stat().st_mtime_ns == first[1]


def test_without_reconstructions_samples_are_scored_alone(run, capfd):
    cfg, script, folder = run
    (folder / "autoencoder" / "reconstructions.npz").unlink()
    score(cfg, script)
    assert "reconstructions.png" not in capfd.readouterr().out


def test_an_evaluation_that_fails_tells_its_command(run):
    cfg, script, _ = run
    cfg.data = "broken data"
    with pytest.raises(BadInput, match=r"eval\.py .*reconstructions\.npz 'broken data:test'"):
        score(cfg, script)


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
    succeed("ldm_cfg", "--sample", tmp_path / "ckpt.pt", "--classes", "1", "--n", 4, "--gpus", 0)
    assert draw("--guidance", 2) == (True, True)  # others lay in their place
    assert draw("--guidance", 2, "--steps", 4, "--save-every", 1) == (True, True)
