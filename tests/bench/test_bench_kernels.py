"""bench/kernels.py where there is no GPU: what it prints, and how its bytes are counted."""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("the table needs triton, not interpreting", allow_module_level=True)

from bench import measure
from tests.cases.kernel_cases import OPERATIONS, GroupNorm, Sampling
from tests.cases.offline import TARGETS

SHAPES = ("128x256x4x4", "32x6x16x128", "32x4x16x16")  # one for each operation


def run(repo, script, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(repo / "bench" / script), *arguments],
        capture_output=True,
        text=True,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
    )


# ----------------------------------------------------------------------------- the offline table


def test_the_offline_table(repo):
    done = run(repo, "kernels.py", "--targets", "sm_90", "--shape", *SHAPES)
    assert done.returncode == 0, done.stderr
    first, about, *lines = done.stdout.splitlines()
    assert "no GPU" in first and "no time" in first
    assert "torch 2" in about and "triton 3" in about
    kernels = [line for line in lines if " sm_90 " in line]
    assert len(kernels) == 2 + 3 + 1  # forward and backward; attention's backward is two
    for line in kernels:
        registers, spilled = map(int, re.search(r" sm_90 +(\d+) +(\d+) ", line).groups())
        assert 16 <= registers <= 255 and spilled == 0
        assert ("wg" in line) == line[34:].startswith(("_forward", "_dq", "_dkdv"))
        assert re.search(r"\d×128 .*\d×128\b", line)  # wide loads and stores
    norm, _, attention, backward, _, sampling = kernels
    assert re.search(r" 1\.00 +1\.\d\d +2\.0 / 9\.\d$", norm)
    assert re.search(r" 1\.00 +1\.\d\d +1\.0 / 1\.0$", attention)
    assert re.search(r" 1\.[45]\d +1\.[45]\d +1\.0 / 1\.0$", backward)
    assert re.search(r" 1\.00 +1\.0\d +6\.0 / 5\.0$", sampling)
    assert "fwd" in sampling and "32x4x16x16 DDIM(0) CFG" in sampling


def test_counted_floors_are_those_of_the_cases(repo):
    done = run(repo, "traffic_table.py", "--shape", *SHAPES, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    chosen = measure.chosen(argparse.Namespace(only=OPERATIONS, shape=SHAPES))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    passes = [(case, backward) for case in chosen for backward in case.directions]
    for line, (case, backward) in zip(lines, passes, strict=True):
        assert line["case"] == [case.operation, case.where, case.name] and line["faults"] == 0
        one = {"batch": 1, "heads": 1} if case.operation == "attention" else {"batch": 1}
        one = dataclasses.replace(case, **one)
        mine = one.floor(one.inputs("cpu"), backward) * case.independent
        assert line["floor"] == pytest.approx(mine, rel=0.03)
        assert all(programs % case.independent == 0 for _, programs in line["programs"])


def test_a_fault_in_the_counting_shows(bench, capsys):
    case = Sampling("anywhere", 2, (3, 4, 4))
    count = {
        "case": [case.operation, case.where, case.name],
        "backward": False,
        "ratio": 1.0,
        "sectors": 1.0,
        "programs": [["_update_kernel", 2]],
    }
    right = []
    for faults, programs in ((0, 2), (1, 2), (0, 3)):
        line = count | {"faults": faults, "programs": [["_update_kernel", programs]]}
        ((_, cells, fine),) = bench.offline_rows([case], ["sm_90"], iter([line]))
        right.append((fine, cells["bytes÷floor"]))
    assert right == [(True, "1.00"), (False, "FAULT"), (False, "FAULT")]


def test_targets_are_those_that_can_be_compiled_for(bench):
    assert tuple(TARGETS) == bench.TARGETS


def test_counting_that_ends_early_is_an_error(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "REPO", tmp_path)  # where there is no such program
    with pytest.raises(RuntimeError, match="traffic_table.py .*ended early"):
        list(bench.counted(argparse.Namespace(only=["sampling"], shape=["x"], targets=["sm_80"])))


def test_a_large_sample_is_counted_in_a_quarter_with_the_same_tiles():
    large = GroupNorm("here", 16, 128, 128)
    counted = large.counted
    assert counted.batch * counted.groups == large.batch * large.groups
    assert counted.channels // counted.groups == large.channels // large.groups
    small = GroupNorm("here", 128, 128, 32)
    assert small.counted is small


def test_operators_are_counted_once_for_each_tensor():
    with measure.CountTensors() as count:
        x = torch.zeros(10)  # written
        x.view(2, 5).t()  # nothing
        x.add_(torch.empty(1).expand(10))  # ten numbers read, ten written, one expanded
        torch.empty(10).copy_(x)
    assert count.bytes == 4 * (10 + (10 + 10 + 1) + (10 + 10))


def test_passes_of_plain_pytorch():
    norm = GroupNorm("here", 4, 128, 32)
    assert measure.tensor_passes(norm, "plain", False) == pytest.approx(2.0, abs=0.02)
    assert measure.tensor_passes(norm, "plain", True) == pytest.approx(2.0, abs=0.02)
    adagn = dataclasses.replace(norm, adagn=True)
    assert measure.tensor_passes(adagn, "plain", False) == pytest.approx(4.0, abs=0.02)
    assert measure.tensor_passes(adagn, "plain", True) == pytest.approx(4.3, abs=0.05)


@pytest.mark.parametrize(
    "arguments, interpret, complaint",
    [
        (["--only", "convolution"], "", "invalid choice"),
        (["--targets", "sm_1"], "", "invalid choice"),
        (["--shape", "7x7"], "", "no shape has any of these in its name: 7x7"),
        ([], "1", "unset TRITON_INTERPRET"),
    ],
)
def test_bad_arguments(bench, monkeypatch, capsys, arguments, interpret, complaint):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_the_table_titles_each_group_once(bench):
    for markdown in (False, True):
        out = io.StringIO()
        table = bench.Table({"shape": 5, "regs": 4}, markdown, out)
        table.row("one", {"shape": "a", "regs": "1"})
        table.row("one", {"regs": "22"})
        table.row("two", {"shape": "b"})
        head = ["| shape | regs |", "|---|--:|"] if markdown else ["shape  regs"]
        one = ["| a | 1 |", "|  | 22 |"] if markdown else ["a         1", "         22"]
        two = ["| b |  |"] if markdown else ["b"]
        gap = [""] if markdown else []
        titles = ["**one**", "**two**"] if markdown else ["one", "two"]
        assert out.getvalue().splitlines() == [
            "",
            titles[0],
            *gap,
            *head,
            *one,
            "",
            titles[1],
            *gap,
            *head,
            *two,
        ]
