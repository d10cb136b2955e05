"""bench/evaluations.py: what it counts, draws and keeps, on tiny runs of two chapters."""

from runtime.commandline import BadInput
from runtime.files import read_log

import importlib
import sys

import pytest
from launching import succeed
from tiny_runs import flags


@pytest.fixture
def bench(monkeypatch):
    """The module; as a program it puts the project's folder in place of its own on the path."""
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    return importlib.import_module("bench.evaluations")


def test_steps_are_as_many_as_the_evaluations_allow(bench):
    heun = bench.ways_of(bench.edm.Edm(0.5))["EDM Heun"]
    assert [bench.steps_for(heun, most) for most in (1, 2, 5, 10, 80)] == [1, 1, 3, 5, 40]
    assert heun(40) == 79
    assert bench.steps_for(int, 10) == 10


def test_two_chapters_side_by_side(bench, toy, tiny, tmp_path):
    given = [*toy, "--steps", 2, "--sample-every", 0, "--save-every", 2]
    for script in ("ddpm_pixel", "edm"):
        more = flags(script, ema_lengths=())
        succeed(script, *tiny[script], *more, *given, "--out", tmp_path / script)
    asked = [f"{name}={tmp_path / name / 'ckpt.pt'}" for name in ("ddpm_pixel", "edm")]
    asked += ["--n", "6", "--evaluations", "3", "6", "--gpus", "0", "--out", str(tmp_path)]
    bench.main([*asked, "--classifier-steps", "3"])
    rows = read_log(tmp_path / "evaluations.jsonl")
    told = [(row["network"], row["sampler"], row["evaluations"]) for row in rows]
    assert told == [
        *(("ddpm_pixel", "EDM Heun", calls) for calls in (3, 5)),
        *(("ddpm_pixel", name, calls) for name in ("DDIM", "DPM-Solver++") for calls in (3, 6)),
        *(("edm", "EDM Heun", calls) for calls in (3, 5)),
        *(("edm", "Euler", calls) for calls in (3, 6)),
    ]
    assert all(row["frechet"] > 0 and 0 <= row["class_accuracy"] <= 1 for row in rows)
    text = (tmp_path / "evaluations.md").read_text()
    assert "| ddpm_pixel, DDIM |" in text and "N = 6" in text
    assert (tmp_path / "evaluations.png").exists()
    bench.main([*asked, "--classifier-steps", "3"])  # all rows are there
    assert read_log(tmp_path / "evaluations.jsonl") == rows


@pytest.mark.parametrize(
    "arguments, named",
    [(["runs/x.pt"], "NAME=CHECKPOINT"), (["a=x.pt", "--n", "1"], "--n"), (["a=/no/x.pt"], "/no")],
)
def test_bad_input_in_one_line(bench, arguments, named, tmp_path):
    with pytest.raises(BadInput, match=named):
        bench.main([*arguments, "--gpus", "0", "--out", str(tmp_path)])
