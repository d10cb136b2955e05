"""Figures and studies that are kept, and edited: others than they are of, never a traceback."""

from runtime.scores import curve_of, read

import json
import os

import pytest

from evaluation.curves import Found
from evaluation.report import curve_path
from evaluation.score import known_figures
from evaluation.study_names import name_for

CURVES = ['[{"step": 1}]', '[{"step": 1, "a": [3], "b": {}}]', '[{"a": 3}]', "[1]", '{"x": 1}', ""]
CURVES += ["[" * 100_000, '[{"step": ' + "9" * 400 + "}]", '[{"step": true}]']


@pytest.mark.parametrize("text", CURVES, ids=range(len(CURVES)))
def test_curves_that_are_none(tmp_path, text):
    (tmp_path / "curve.json").write_text(text)
    path = curve_path(tmp_path, {"a": "runs/x/ckpt.pt", "frechet": 1})
    other = text.startswith('[{"step": 1')  # a row, of nobody knows what: it stays
    assert path.name.startswith("curve-") == other and len(curve_of(tmp_path)) == other


@pytest.mark.parametrize("text", ["[1]", '{"facts": 3}', '{"facts": [1]}', "", '{"a": {}}'])
def test_studies_whose_facts_are_none(tmp_path, text):
    (tmp_path / "curves.json").write_text(text)
    suffix, known = name_for(tmp_path, "curves", "", {"runs": ["a"]})
    assert suffix.startswith("-") and not known


GOOD = {"frechet": 1.5, "n_generated": 10, "class_accuracy": 0.5, "network": "x classifier"}
BAD = [{"frechet": "z"}, {"n_generated": None}, {"class_accuracy": "z"}, {"frechet": 10**400}]
BAD += [{"network": 3}, {"class_accuracy": [1]}, {"frechet": float("nan")}]


@pytest.mark.parametrize("change", [{}, {"class_accuracy": None}, *BAD])
def test_kept_figures_are_numbers(tmp_path, change):
    (tmp_path / "samples.npz").touch()
    (tmp_path / "eval.json").write_text(json.dumps(GOOD | change))
    found = known_figures(tmp_path / "eval.json", tmp_path / "samples.npz", "classifier")
    assert found == (None if change in BAD else GOOD | change)


def test_scores_and_bits_of_a_run_that_are_none(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 5, "loss": 1}\n')
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    row = {"frechet": 1, "n_generated": [1], "features": 3, "b": {}, "step": "x", "network": [3]}
    (tmp_path / "eval.json").write_text(json.dumps(row))
    (tmp_path / "nll.json").write_text('{"bits_per_dim": 1, "images": 1, "terms": 5}')
    rows = Found.of(tmp_path).rows
    assert [row["step"] for row in rows] == [5, 5] and rows[1]["frechet"] == 1
    assert {tuple(row.values()) for row in rows}  # they are looked up


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "curve.json")
    assert read(tmp_path / "curve.json") is None
