"""Checkpoints that are damaged, foreign, hostile or of another configuration."""

from runtime.checkpoints import DamagedCheckpoint, load_checkpoint
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.folder import RunFolder
from runtime.processes import World

import os
import pickle
import shutil

import pytest
import torch
from launching import refused, succeed
from run_folders import assert_same, saved
from tiny_runs import TRAININGS, fields, flags

SETTINGS = {"model_channels": 1}


def open_run(folder, settings=SETTINGS, script="toy", **options):
    return RunFolder(folder, script, settings, World(), **options)


@pytest.fixture
def two_steps(tmp_path):
    """A run directory with checkpoints of steps 1 and 2."""
    run = open_run(tmp_path)
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
def test_damaged_is_refused_by_name(two_steps, how):
    damage(two_steps / "ckpt.pt", how)
    with pytest.raises(DamagedCheckpoint) as error:
        load_checkpoint(two_steps / "ckpt.pt", "toy")
    assert str(two_steps / "ckpt.pt") in str(error.value) and "\n" not in str(error.value)
    run = open_run(two_steps, resume=str(two_steps / "ckpt.pt"))
    with pytest.raises(BadInput, match="ckpt.pt is truncated"):
        run.restore()


@pytest.mark.parametrize("how", DAMAGES)
def test_auto_goes_back_to_the_one_before_and_warns(two_steps, how, capsys):
    damage(two_steps / "ckpt.pt", how)
    state = open_run(two_steps).restore()
    assert state["step"] == 1 and torch.equal(state["weights"], torch.full((1000,), 1.0))
    assert [row["step"] for row in read_log(two_steps / "log.jsonl")] == [1]
    warning = capsys.readouterr().err.splitlines()
    assert len(warning) == 1 and warning[0].startswith("warning: checkpoint")
    assert "ckpt.pt" in warning[0] and "ckpt-previous.pt" in warning[0]


def test_auto_never_starts_over_where_checkpoints_are_damaged(two_steps):
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        damage(two_steps / name, "cut in half")
    with pytest.raises(BadInput, match="--resume never"):
        open_run(two_steps).restore()
    assert len(read_log(two_steps / "log.jsonl")) == 2  # nothing was touched
    fresh = open_run(two_steps, resume="never")
    assert fresh.restore() is None and read_log(two_steps / "log.jsonl") == []


def test_of_another_script_or_configuration(two_steps):
    with pytest.raises(BadInput, match="written by toy.py, expected one of other.py"):
        open_run(two_steps, script="other").restore()
    with pytest.raises(BadInput, match="model_channels 1 there, 2 here"):
        open_run(two_steps, {"model_channels": 2}).restore()
    with pytest.raises(BadInput, match="data_key None there, abc here"):
        open_run(two_steps, made_of={"data_key": "abc"}).restore()
    free = open_run(two_steps, SETTINGS | {"steps": 9, "n": 3}, free={"steps", "n"})
    assert free.restore()["step"] == 2
    with pytest.raises(BadInput, match="n None there, 3 here"):
        open_run(two_steps, SETTINGS | {"steps": 9, "n": 3}, free={"steps"}).restore()


def test_torch_file_that_no_run_wrote(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="by none of these scripts"):
        open_run(tmp_path).restore()
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


@pytest.fixture(scope="module", params=TRAININGS)
def trained(request, toy, tiny, tmp_path_factory):
    """(script, its flags, the folder of a whole run)."""
    script, out = request.param, tmp_path_factory.mktemp(request.param) / "whole"
    given = [*tiny[script], *toy, "--sample-every", "0"]
    succeed(script, *given, "--out", out)
    return script, given, out


def test_a_chapter_goes_on_from_the_checkpoint_before_a_damaged_one(trained, tmp_path):
    """And ends bit for bit as the whole run did; a damaged one that is named is refused."""
    script, given, whole = trained
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    damage(broken / "ckpt.pt", "cut in half")
    path = broken / "ckpt.pt"
    told = refused(script, "--gpus", 0, "--sample", path, *flags(script, classifier=path))
    assert str(broken / "ckpt.pt") in told  # autoencoder.py reads files of others, too
    assert "truncated" in told or "no file of plain tensors" in told
    resumed = [*given, "--out", broken, "--resume", broken / "ckpt.pt"]
    assert "truncated" in refused(script, *resumed)
    done = succeed(script, *given, "--out", broken)
    assert "warning: checkpoint" in done.err and "ckpt-previous.pt" in done.err
    a, b = saved(whole), saved(broken)
    assert a["step"] == b["step"] == 20
    for part in ("model", "ema", "more_emas", "optimizer"):
        assert_same(a[part], b[part])


def test_a_chapter_refuses_what_another_configuration_or_script_wrote(trained, tmp_path):
    script, given, whole = trained
    other = refused(script, *given, "--out", whole, "--lr", "0.5")
    rate = fields(script)["lr"].default
    assert f"lr {rate} there, 0.5 here" in other and str(whole) in other
    foreign = tmp_path / "foreign.pt"
    torch.save({"script": "another", "config": {}, "step": 1, "model": {}}, foreign)
    assert "foreign.pt" in refused(script, "--gpus", 0, "--sample", foreign)
    told = refused(script, *given, "--resume", foreign, "--out", tmp_path / "new")
    wanted = saved(whole)["script"]
    assert f"foreign.pt was written by another.py, expected one of {wanted}.py" in told
    assert not (tmp_path / "new" / "ckpt.pt").exists()
    assert "no such file" in refused(script, *given, "--resume", "always", "--out", tmp_path)
    longer = flags(script, timesteps=500)
    if longer:
        assert "timesteps 1000 there, 500 here" in refused(script, *given, *longer, "--out", whole)
