"""bench/latents.py and bench/guidance.py run, on small things."""

from runtime import films
from runtime.commandline import BadInput

import importlib.util
import json

import numpy as np
import pytest
from launching import succeed
from PIL import Image

import ldm_cfg


def load(repo, name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", repo / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(repo, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", sys.path.copy())
    return lambda name: load(repo, name)


def test_the_cache_and_the_encoder_train_alike(script, capsys):
    flags = ["--model", "unet", "--batch", "4", "--rounds", "2", "--threads", "1"]
    flags += ["--size", "32", "--ae-width", "32"]
    script("latents").main(flags)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["from the cache", "encoded on the fly"]
    assert all(row["images_per_s"] > 0 for row in rows) and rows[0]["ratio"] > 1


def test_guidance_is_drawn_and_told(script, toy, tiny, tmp_path, monkeypatch, capsys):
    flags = [*tiny["ldm_cfg"], *toy, "--sample-every", "0", "--steps", "30", "--ae-steps", "3"]
    succeed("ldm_cfg", *flags, "--out", tmp_path)
    arguments = [str(tmp_path / "ckpt.pt"), "--w=0,2", "--n", "8", "--gpus", "0"]
    before = sorted(tmp_path.iterdir())
    arguments += ["--eval-args=--classifier-steps 5", "--out", str(tmp_path / "study")]
    monkeypatch.setattr("sys.argv", ["guidance.py", *arguments])
    seen, save_beside = [], films.save_beside
    monkeypatch.setattr(films, "save_beside", lambda *a: seen.append(a) or save_beside(*a))
    script("guidance").main()
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["w"] for row in rows] == [0, 2] and rows[0]["frechet"] != rows[1]["frechet"]
    (path,) = (tmp_path / "study").glob("guidance_*.json")  # with the settings in its name
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "study"])
    assert path.stem.startswith("guidance_w=0,2_n=8_eval-args=classifier-steps-5")
    assert json.loads(path.read_text())["rows"] == rows
    assert path.with_suffix(".png").stat().st_size > 5000
    assert out.count("class accuracy") == 2
    # The film ends at samples of the chapter: the first two seeds are one of each class.
    ((where, shown, marks, names, _),) = seen
    assert list(shown) == ["w = 0", "w = 2"] and len(names) == 2
    drawn = ["--sample", tmp_path / "ckpt.pt", "--n", "2", "--guidance", "2", "--gpus", "0"]
    drawn = ["ldm_cfg.py", *map(str, drawn), "--out", str(tmp_path / "two")]
    monkeypatch.setattr("sys.argv", drawn)
    ldm_cfg.main()  # in this process: an untrained network enlarges rounding
    with np.load(tmp_path / "two" / "samples.npz") as held:
        assert np.abs(shown["w = 2"][-1] - held["arr_0"].astype(int)).max() <= 1
    ends = [frames[-1].astype(int) for frames in shown.values()]
    assert np.abs(ends[0] - ends[1]).max() > 1
    assert len(shown["w = 0"]) == len(shown["w = 2"]) == len(marks)
    with Image.open(f"{where}.gif") as film:
        assert film.n_frames == len(marks)
    assert "guidance-film_w=0,2_n=8" in out.splitlines()[-2]


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--w=a,2", "--w=a,2: expected numbers"),
        ("--w=", "--w=: expected different numbers"),
        ("--w=1,1.0", "--w=1,1.0: expected different numbers"),
        ("--n=1", "--n 1: at least 2 samples"),
    ],
)
def test_bad_values_are_refused_before_any_sample(flag, why, script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guidance.py", "x.pt", flag])
    with pytest.raises(BadInput, match=why):
        script("guidance").main()
