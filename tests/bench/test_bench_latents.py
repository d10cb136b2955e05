"""bench/latents.py and bench/guidance.py run, on small things."""

from runtime.commandline import BadInput

import importlib.util
import json

import pytest
from launching import succeed


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
    arguments += ["--eval-args=--classifier-steps 5"]
    monkeypatch.setattr("sys.argv", ["guidance.py", *arguments])
    script("guidance").main()
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["w"] for row in rows] == [0, 2] and rows[0]["frechet"] != rows[1]["frechet"]
    assert json.loads((tmp_path / "guidance.json").read_text()) == rows
    assert (tmp_path / "guidance.png").stat().st_size > 5000
    assert out.count("class accuracy") == 2


def test_values_of_w_that_are_no_numbers_are_refused(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guidance.py", "x.pt", "--w=a,2"])
    with pytest.raises(BadInput, match="--w=a,2: expected numbers"):
        script("guidance").main()
