"""Runs that go on, from checkpoints that are damaged, replaced meanwhile, or odd."""

from runtime import checkpoints, folder, kept, locks
from runtime.commandline import BadInput

import atexit
import errno
import functools
import os
from pathlib import Path

import pytest
import torch
from run_folders import saved_step
from toy_run import Counter, make, train


def kept_run(folder, **given):
    """A run of 9 steps that keeps a checkpoint at each third; its folder."""
    run = train(make(folder, keep_every=3, steps=9, **given))
    locks.leave(folder)
    return run.folder


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_path_typed_again_goes_back_to_the_one_before_a_damaged_one(tmp_path, capsys):
    start = kept_run(tmp_path / "start") / "ckpt-000003.pt"
    run = train(make(tmp_path / "run", resume=str(start), steps=9)).folder
    locks.leave(run)
    before = torch.load(run / "ckpt-previous.pt", weights_only=True)["step"]
    damage(run / "ckpt.pt")
    capsys.readouterr()
    again = make(run, resume=str(start), steps=12)
    assert "warning: checkpoint" in capsys.readouterr().err and again.first == before
    assert saved_step(run) == before  # the next save names a whole one as the one before
    locks.leave(run)


def test_where_both_are_damaged_the_newest_kept_one_is_named(tmp_path):
    run = kept_run(tmp_path)
    for name in ("ckpt.pt", "ckpt-previous.pt", "ckpt-000009.pt"):
        with open(run / name, "r+b") as file:  # each its own: some are one file by two names
            whole = file.read()
        (run / name).unlink()
        (run / name).write_bytes(whole[:-100])
    with pytest.raises(
        BadInput, match=f"to go on from an older one: --resume {run}/ckpt-000006.pt"
    ):
        make(run, keep_every=3, steps=9)
    assert make(run, resume=f"{run}/ckpt-000006.pt", keep_every=3, steps=9).first == 6
    locks.leave(run)


def test_the_file_that_resume_names_stays(tmp_path):
    """Its name may say a later step than it holds."""
    run = kept_run(tmp_path)
    (run / "ckpt-000009.pt").unlink()
    (run / "ckpt-000003.pt").rename(run / "ckpt-000009.pt")
    made = make(run, resume=f"{run}/ckpt-000009.pt", keep_every=3, steps=9)
    assert made.first == 3 and saved_step(run) == 3 and (run / "ckpt-000009.pt").exists()
    assert not (run / "ckpt-000006.pt").exists()
    locks.leave(run)


def test_a_path_that_another_training_replaces_is_read_once(tmp_path, monkeypatch):
    other = kept_run(tmp_path / "other")
    whole, copy = folder.load_checkpoint, other / "ckpt.pt"

    def replaced_after(path, *given, **how):
        state = whole(path, *given, **how)
        if Path(path) == copy:
            os.replace(other / "ckpt-000003.pt", copy)
        return state

    monkeypatch.setattr(folder, "load_checkpoint", replaced_after)
    run = make(tmp_path / "run", resume=str(copy), steps=12)
    assert run.first == saved_step(tmp_path / "run") == 3
    assert not list((tmp_path / "run").glob(".ckpt*"))
    locks.leave(run.folder)


def test_what_others_wrote_is_set_aside_by_free_names(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("framework: pytorch\n")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "mine": 2}\n')
    (tmp_path / "before-config.yaml").write_text("of long ago")
    make(tmp_path)
    assert (tmp_path / "before-config.yaml").read_text() == "of long ago"
    assert (tmp_path / "before-config-2.yaml").read_text() == "framework: pytorch\n"
    assert (tmp_path / "before-log.jsonl").read_text() == '{"step": 1, "mine": 2}\n'
    locks.leave(tmp_path)


@pytest.mark.parametrize("resume", ["never", "PATH"])
def test_a_folder_of_others_loses_nothing(tmp_path, resume, capsys):
    start, there = kept_run(tmp_path / "start") / "ckpt-000003.pt", tmp_path / "there"
    names = ["config.yaml", "log.jsonl", "ckpt.pt", "ckpt-000009.pt", "samples-000009.png"]
    there.mkdir()
    for name in names:
        (there / name).write_text(f'{{"step": 1, "name": "{name}"}}\n')
    make(there, resume=str(start) if resume == "PATH" else resume, keep_every=3, steps=12)
    for name in names:
        assert name in (there / f"before-{name}").read_text()
    assert not (there / "log.jsonl").read_text() and "is of no run here" in capsys.readouterr().out
    locks.leave(there)


def test_a_disk_that_fails_starts_no_run_over(tmp_path, monkeypatch):
    start = kept_run(tmp_path / "start") / "ckpt-000003.pt"
    run = train(make(tmp_path / "run", resume=str(start), steps=9)).folder
    locks.leave(run)
    whole = (run / "ckpt.pt").read_bytes()

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "load_copied", fail)
    with pytest.raises(BadInput, match=f"{run}/ckpt.pt could not be read"):
        make(run, resume=str(start), steps=12)
    assert (run / "ckpt.pt").read_bytes() == whole
    locks.leave(run)


def test_a_path_that_is_refused_leaves_no_copy(tmp_path, monkeypatch):
    start, due = kept_run(tmp_path / "start") / "ckpt-000003.pt", []
    note = lambda do, *given, **how: due.append(functools.partial(do, *given, **how))  # noqa: E731
    monkeypatch.setattr(atexit, "register", note)
    with pytest.raises(BadInput, match="another configuration"):
        make(tmp_path / "run", resume=str(start), seed=1)
    assert list((tmp_path / "run").glob(".ckpt*"))
    for do in due:  # the process ends
        do()
    assert not list((tmp_path / "run").iterdir())


NAN = float("nan")


def moment(state):
    """What the optimizer in a checkpoint keeps of one parameter."""
    return state["optimizer"]["state"][0]


ODD = {
    "a model of other shapes": (
        lambda s: s["model"].update({"conv_in.weight": torch.zeros(2, 2)}),
        "its network is another one: .*conv_in.weight",
    ),
    "a model that lacks a tensor": (lambda s: s["model"].pop("conv_in.weight"), "another one"),
    "a list as model": (lambda s: s.update(model=[1]), "its model is"),
    "no model": (lambda s: s.pop("model"), "has no model"),
    "NaN": (lambda s: s["model"]["conv_in.weight"].fill_(NAN), "conv_in.weight holds numbers that"),
    "NaN in a mean": (lambda s: s["ema"]["conv_in.weight"].fill_(NAN), "not finite"),
    "NaN in the optimizer": (lambda s: moment(s)["exp_avg"].fill_(NAN), "exp_avg holds numbers"),
    "moments of other shapes": (
        lambda s: moment(s).update(exp_avg=torch.zeros(1)),
        "its optimizer is another one: a moment is",
    ),
    "an odd counter": (lambda s: s.update(counter={"nothing": 1}), "its counter is another one"),
    "an empty optimizer": (lambda s: s.update(optimizer={}), "its optimizer is another one"),
    "a number as optimizer": (lambda s: s.update(optimizer=3), "its optimizer is 3"),
    "a step below 0": (lambda s: s.update(step=-1), "its step is -1"),
    "a tensor among settings": (
        lambda s: s["config"].update(lr=torch.zeros(3)),
        "its config holds a Tensor under 'lr'",
    ),
    "a number as a setting": (lambda s: s["config"].update({3: 4}), "its config holds 4 under 3"),
    "a list of where it comes from": (lambda s: s.update(resumed=[1]), "its resumed is"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_run_does_not_go_on_from_an_odd_checkpoint(what, tmp_path):
    change, told = ODD[what]
    more = {"keep": {"counter": Counter()}}
    run = kept_run(tmp_path, more=more)
    state = torch.load(run / "ckpt.pt", weights_only=True)
    change(state)
    torch.save(state, run / "ckpt.pt")
    with pytest.raises(BadInput, match=rf"{run}/ckpt.pt.*{told}") as found:
        make(run, keep_every=3, steps=12, more=more)
    assert "\n" not in str(found.value)
    locks.leave(run)


def test_memory_that_ends_is_not_told_as_a_misfit():
    with pytest.raises(torch.OutOfMemoryError), kept.fitting(checkpoints.Kept(), "optimizer"):
        raise torch.OutOfMemoryError("CUDA out of memory")
