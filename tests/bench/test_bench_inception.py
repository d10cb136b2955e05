"""bench/inception.py in its quick form: it runs, and times only what computes the same."""

from runtime.commandline import BadInput

import importlib
import json
import sys

import pytest
import torch
from reference_metrics import import_references

import_references()


@pytest.fixture(scope="module")
def speed():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.inception")
    finally:
        sys.path[:] = path


def test_quick_prints_a_table_and_one_line_of_json(speed, capsys):
    speed.main(["--quick", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    (row,) = found["features"]["rows"]
    assert row["threads"] == 1 and found["features"]["images"] == 2
    assert row["ratio"] == pytest.approx(row["here"] / row["pytorch-fid"])  # of a single round
    assert found["features"]["differ"] < 1e-4 and found["distance"]["differ"] < 1e-6
    assert found["distance"]["dim"] == 64 and found["distance"]["ratio"] > 0
    assert any(f"{row['ratio']:.2f}" in line for line in lines[:-1])


def test_other_features_are_not_timed(speed, monkeypatch):
    network = speed.pytorch_fid_network
    options = {"resize_input": False}
    monkeypatch.setattr(speed, "pytorch_fid_network", lambda state: network(state, **options))
    with pytest.raises(RuntimeError, match="features differ by .*nothing timed"):
        speed.contenders(torch.zeros(1, 90, 90, 3, dtype=torch.uint8))


@pytest.mark.parametrize("flag", ["--images", "--size", "--threads", "--rounds"])
def test_counts_below_one_are_refused(speed, flag):
    with pytest.raises(BadInput, match=f"{flag} must be at least 1, got 0"):
        speed.parse([flag, "0"])
