"""Checkpoints that are damaged, foreign, hostile or of another configuration."""

from runtime.checkpoints import DamagedCheckpoint, load_checkpoint
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.processes import World
from runtime.run import Run

import os
import pickle
import shutil

import pytest
import torch
from launching import run as run_script
from launching import succeed

SETTINGS = {"width": 1}


@pytest.fixture
def saved(tmp_path):
    """A run directory with checkpoints of steps 1 and 2."""
    run = Run(tmp_path, "toy", SETTINGS, World())
    assert run.restore() is None
    for step in (1, 2):
        run.log(step, loss=1.0)
        run.save(step, weights=torch.full((1000,), float(step)))
    return tmp_path


def damage(path, how):
    raw = path.read_bytes()
    if how == "cut in half":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(bytes(range(256)) * 40)
    elif how == "cut by one byte":
        path.write_bytes(raw[:-1])


DAMAGES = ["cut in half", "cut by one byte", "empty", "garbage"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_is_refused_by_name(saved, how):
    damage(saved / "ckpt.pt", how)
    with pytest.raises(DamagedCheckpoint) as error:
        load_checkpoint(saved / "ckpt.pt", "toy")
    assert str(saved / "ckpt.pt") in str(error.value) and "\n" not in str(error.value)
    run = Run(saved, "toy", SETTINGS, World(), resume=str(saved / "ckpt.pt"))
    with pytest.raises(BadInput, match="ckpt.pt is truncated"):
        run.restore()


@pytest.mark.parametrize("how", DAMAGES)
def test_auto_goes_back_to_the_one_before_and_warns(saved, how, capsys):
    damage(saved / "ckpt.pt", how)
    state = Run(saved, "toy", SETTINGS, World()).restore()
    assert state["step"] == 1 and torch.equal(state["weights"], torch.full((1000,), 1.0))
    assert [row["step"] for row in read_log(saved / "log.jsonl")] == [1]
    warning = capsys.readouterr().err.splitlines()
    assert len(warning) == 1 and warning[0].startswith("warning: checkpoint")
    assert "ckpt.pt" in warning[0] and "ckpt-previous.pt" in warning[0]


def test_auto_never_starts_over_where_checkpoints_are_damaged(saved):
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        damage(saved / name, "cut in half")
    with pytest.raises(BadInput, match="--resume never"):
        Run(saved, "toy", SETTINGS, World()).restore()
    assert len(read_log(saved / "log.jsonl")) == 2  # nothing was touched
    fresh = Run(saved, "toy", SETTINGS, World(), resume="never")
    assert fresh.restore() is None and read_log(saved / "log.jsonl") == []


def test_of_another_script_or_configuration(saved):
    with pytest.raises(BadInput, match="written by toy, expected one that other wrote"):
        Run(saved, "other", SETTINGS, World()).restore()
    with pytest.raises(BadInput, match="width 1 there, 2 here"):
        Run(saved, "toy", {"width": 2}, World()).restore()
    data = {"made_of": {"data_key": "abc"}}
    with pytest.raises(BadInput, match="data_key None there, abc here"):
        Run(saved, "toy", SETTINGS, World(), **data).restore()
    free = Run(saved, "toy", SETTINGS | {"steps": 9, "n": 3}, World())
    assert free.restore()["step"] == 2


def test_torch_file_that_no_run_wrote(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="by none of these scripts"):
        Run(tmp_path, "toy", SETTINGS, World()).restore()
    with pytest.raises(BadInput, match="no such file"):
        load_checkpoint(tmp_path / "elsewhere.pt")


class Hostile:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["torch zip", "plain pickle"])
def test_checkpoint_cannot_run_code(tmp_path, form):
    trap, path = tmp_path / "trap", tmp_path / "ckpt.pt"
    state = {"script": "toy", "config": {}, "step": 1, "weights": Hostile(trap)}
    if form == "torch zip":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(BadInput, match="ckpt.pt"):
        load_checkpoint(path, "toy")
    assert not trap.exists()
    torch.load(path, weights_only=False) if form == "torch zip" else pickle.loads(path.read_bytes())
    assert trap.exists()  # the trap does work


def test_command_line(toy, tiny, tmp_path):
    """What the scripts say of each, and that a run goes on from the previous one bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*tiny["ddpm_pixel"], *toy, "--sample-every", 0]
    succeed("ddpm_pixel", *flags, "--out", whole)

    def refused(*args, script="ddpm_pixel"):
        done = run_script(script, *args)
        assert done.code == 2 and "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if "%|" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), done.err
        return lines[0]

    other = refused(*flags, "--out", whole, "--lr", "0.5")
    assert "lr 0.001 there, 0.5 here" in other and str(whole) in other
    foreign = refused(*tiny["ldm_cfg"], "--sample", whole / "ckpt.pt", script="ldm_cfg")
    assert "written by ddpm_pixel, expected one that ldm_cfg wrote" in foreign

    shutil.copytree(whole, broken)
    damage(broken / "ckpt.pt", "cut in half")
    assert "truncated" in refused("--gpus", 0, "--sample", broken / "ckpt.pt")
    assert "truncated" in refused(*flags, "--out", broken, "--resume", broken / "ckpt.pt")
    done = succeed("ddpm_pixel", *flags, "--out", broken)
    assert "warning: checkpoint" in done.err and "ckpt-previous.pt" in done.err
    a, b = (torch.load(f / "ckpt.pt", weights_only=True) for f in (whole, broken))
    assert all(torch.equal(a["ema"][name], b["ema"][name]) for name in a["ema"])
    assert a["step"] == b["step"] == 20
