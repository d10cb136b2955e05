"""bench/dit.py on a small network: it runs to its end, and times only what computes the same."""

from runtime.commandline import BadInput

import importlib
import json
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def speed():
    """bench/dit.py; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        return importlib.import_module("bench.dit")
    finally:
        sys.path[:] = path


def test_quick_prints_a_table_and_one_line_of_json(speed, capsys):
    speed.main(["--quick", "--threads", "1", "--batch", "2", "3"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["rounds"] == 2 and found["model"] == "quick" and found["shape"] == [4, 16, 16]
    names = [(row["threads"], row["batch"], row["name"]) for row in found["rows"]]
    assert names == [(1, n, name) for n in (2, 3) for name in ("diffusers", "here")]
    assert all(row["ms"] > 0 and row["cpu_ratio"] > 0 for row in found["rows"])
    assert sum(line.startswith(("batch 2, ", "batch 3, ")) for line in lines) == 4


def test_only_what_computes_the_same_is_timed(speed):
    ours = speed.random_network(speed.QUICK)
    theirs, inputs = speed.twin(ours), speed.batch(2)
    assert list(speed.forwards(ours, theirs, inputs)) == ["diffusers", "here"]
    with torch.no_grad():
        ours.blocks[1].mlp.fc2.weight[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="forward of 2: the two differ by"):
        speed.forwards(ours, theirs, inputs)


def test_without_diffusers_one_line_names_what_to_install(speed, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r'diffusers.*pip install -e "\.\[test\]"$'):
        speed.main(["--quick"])


@pytest.mark.parametrize("flags", ["--threads 0", "--batch 8 0", "--rounds -1", "--model dit-q/2"])
def test_numbers_out_of_range_and_unknown_models_are_refused(speed, flags):
    with pytest.raises(BadInput, match="must be positive|is no diffusion transformer"):
        speed.main(flags.split())
