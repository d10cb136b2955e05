"""Folders of runs: one training in each, nothing of others touched, going on where it was."""

from runtime import files, folder, locks
from runtime.commandline import BadInput
from runtime.files import also_named, atomic_write, left_over, locked
from runtime.folder import RunFolder
from runtime.processes import World

import fcntl
import multiprocessing
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
from launching import Started, refused, succeed
from run_folders import assert_same, rows, saved, saved_step
from toy_run import make, train

SPAWN = multiprocessing.get_context("forkserver")


def refuse(*given, **named):
    raise OSError("not on this mount")


@pytest.fixture(params=["links and flock", "neither"])
def mount(request, monkeypatch):
    """A file system with hard links and flock, and one without."""
    if request.param == "neither":
        without(monkeypatch.setattr)
    return request.param


def without(setattr):
    setattr(os, "link", refuse)
    setattr(fcntl, "flock", refuse)
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 0.5, "POLL": 0.02}.items():
        setattr(locks, name, seconds)


def hold(path, mount, said, stop):
    if mount == "neither":
        without(setattr)
    try:
        locks.hold(path)
    except BadInput as error:
        said.put(str(error))
        return
    said.put("")
    stop.wait(30)


def start(path, mount):
    """(a process that holds the folder, what it said, what ends it)."""
    said, stop = SPAWN.Queue(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(path, mount, said, stop))
    process.start()
    return process, said.get(timeout=30), stop


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path, mount):
    first, told, _ = start(tmp_path, mount)
    assert told == ""
    with pytest.raises(BadInput) as error:
        make(tmp_path)
    line = str(error.value)
    assert f"{tmp_path} is written by process {first.pid} on " in line and "--out" in line
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    train(make(tmp_path))  # whatever a killed process leaves
    assert saved_step(tmp_path) == 10
    second, told, _ = start(tmp_path, mount)
    assert f"process {os.getpid()} on " in told
    second.join()
    locks.leave(tmp_path)
    assert not list(tmp_path.glob(".*"))
    third, told, stop = start(tmp_path, mount)
    assert told == ""
    stop.set()
    third.join()


def test_only_one_of_many_gets_a_lock_that_was_left(tmp_path, monkeypatch):
    """At the same moment, without flock."""
    without(monkeypatch.setattr)
    (tmp_path / ".lock").write_text("left by a killed process, damaged")
    found = [locks.Lock(tmp_path / ".lock") for _ in range(6)]
    told = {}
    threads = [
        threading.Thread(target=lambda lock=lock: told.update({lock: lock.take()}))
        for lock in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bool(who) for who in told.values()) == [False] + [True] * 5
    for lock, who in told.items():
        if not who:
            lock.release()


def test_others_wait_for_what_is_locked(tmp_path, mount):
    inside, most, order = [], [], []

    def work(i):
        with locked(tmp_path / "a.lock"):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(i)
        order.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(order) == [0, 1, 2, 3] and set(most) == {1}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("here, there", [(True, False), (False, True), (True, True)])
def test_machines_see_each_other_whichever_has_flock(here, there, tmp_path, monkeypatch):
    """One mount of a folder may have flock and another none, or one of its own machine alone."""
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 0.5, "POLL": 0.02}.items():
        monkeypatch.setattr(locks, name, seconds)
    flock = {True: lambda file, how: None, False: refuse}
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock[there])
        patch.setattr(locks, "HOST", "0ther0")
        theirs = locks.Lock(tmp_path / ".lock")
        assert theirs.take() == ""
    monkeypatch.setattr(fcntl, "flock", flock[here])
    ours = locks.Lock(tmp_path / ".lock")
    assert ours.take().startswith(f"process {os.getpid()} on ")
    theirs.beating.set()  # it is killed
    theirs.thread.join()
    assert ours.take() == "" and ours.is_ours() and not theirs.is_ours()
    ours.release()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_file_that_another_has_just_made_stays(tmp_path, mount):
    """Ours was removed, and nothing is yet written into the other."""
    ours = locks.Lock(tmp_path / ".lock")
    assert ours.take() == ""
    ours.beating.set()
    ours.thread.join()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").touch()
    assert not ours.is_ours() and not ours.is_lost()
    ours.release()
    assert (tmp_path / ".lock").exists()


def test_a_holder_that_slept_too_long_stops(tmp_path, monkeypatch):
    without(monkeypatch.setattr)
    ours = locks.hold(tmp_path)
    locks.check_held(tmp_path)
    ours.beating.set()  # the machine sleeps
    ours.thread.join()
    other = locks.Lock(tmp_path / ".lock")
    assert other.take() == ""
    with pytest.raises(BadInput, match=f"{tmp_path} was taken over by process {os.getpid()} on"):
        locks.check_held(tmp_path)
    locks.leave(tmp_path)
    assert other.is_ours() and (tmp_path / ".lock").exists()
    other.release()


@pytest.mark.parametrize("before", range(0, 40, 3))
def test_a_long_command_is_told_up_to_a_whole_flag(before, monkeypatch):
    flags = ["--batch-size", "8", "--sample-every", "0", "--num-res-blocks", "1", "--steps", "9"]
    monkeypatch.setattr(sys, "argv", ["x" * (60 + before), *flags])
    told = re.search(r"\(\S+ x+ (.*)\)$", locks.me()).group(1).split()
    whole = told[:-1] if told[-1] == "..." else told
    assert whole == flags[: len(whole)]


def test_a_command_in_a_folder_that_is_taken_is_one_line(toy, tiny, tmp_path):
    given = [*tiny["ddpm_pixel"], *toy, "--out", tmp_path, "--sample-every", 0]
    first = Started("ddpm_pixel", *given, "--steps", 2000)
    while not (tmp_path / "log.jsonl").exists():
        assert first.process.is_alive()
        time.sleep(0.01)
    told = refused("ddpm_pixel", *given, "--resume", "never")
    assert f"written by process {first.process.pid} on" in told
    first.process.kill()
    first.process.join()
    step = saved_step(tmp_path)
    succeed("ddpm_pixel", *given, "--steps", max(step, 1) + 1)


# ---------------------------------------------------------------------- what --resume says


def test_never_forgets_the_old_run_before_its_first_step(tmp_path):
    train(make(tmp_path, keep_every=3, lr=1e-2))
    (tmp_path / "samples-000008.png").write_text("of the old run")
    make(tmp_path, resume="never", lr=1e-3)  # and is killed before its first step
    assert not list(tmp_path.glob("ckpt*")) and not list(tmp_path.glob("samples-*"))
    assert make(tmp_path, lr=1e-3).first == 0  # whose settings are others: it is not the old one


def test_a_path_that_is_typed_again_after_a_kill_does_not_start_again(tmp_path, capsys, mount):
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    train(make(first, steps=3, lr_decay="none"))
    given = {"resume": str(first / "ckpt.pt"), "lr_decay": "none"}
    train(make(whole, **given))
    for stop, step in ((None, 3), (8, 3), (9, 6)):
        run = make(second, **given)
        assert run.first == step
        if stop:
            train(run, stop)
    assert make(second, **given).first == 6
    assert "went on from" in capsys.readouterr().out
    assert make(second, lr_decay="none").first == 6  # auto
    train(make(second, **given))
    assert make(second, **given).first == 10
    assert_same(saved(whole)["model"], saved(second)["model"])
    assert rows(whole) == rows(second)
    other = train(make(tmp_path / "other", steps=4, lr_decay="none", seed=1)).folder
    with pytest.raises(BadInput, match="seed"):
        make(second, **given | {"resume": str(other / "ckpt.pt")})
    other = train(make(tmp_path / "another", steps=4, lr_decay="none")).folder
    assert make(second, **given | {"resume": str(other / "ckpt.pt")}).first == 4  # another path
    assert make(second, **given).first == 3  # and the first one once more


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    train(make(tmp_path))
    path, whole = tmp_path / "ckpt.pt", (tmp_path / "ckpt-previous.pt").read_bytes()
    path.write_bytes(path.read_bytes()[:1000])
    run = make(tmp_path)
    assert run.first == 9 and path.read_bytes() == whole
    monkeypatch.setattr(os, "replace", refuse)  # killed at any place in the next save
    with pytest.raises(OSError):
        train(run)
    monkeypatch.undo()
    assert make(tmp_path).first == 9


def test_a_kill_between_a_checkpoint_and_its_second_name(tmp_path, monkeypatch):
    run = make(tmp_path, keep_every=3)
    monkeypatch.setattr(run.disk, "_keep", lambda step: None)
    train(run, stop=4)
    assert saved_step(tmp_path) == 3 and not (tmp_path / "ckpt-000003.pt").exists()
    monkeypatch.undo()
    make(tmp_path, keep_every=3)
    assert saved(tmp_path, "ckpt-000003.pt")["step"] == 3


@pytest.mark.parametrize("stop", ["in the grid", "after it", "in the checkpoint"])
def test_a_grid_that_a_kill_swallowed_is_drawn(tmp_path, monkeypatch, stop):
    images = torch.zeros(4, 4, 4, 1, dtype=torch.uint8)

    class Killed(Exception):
        pass

    def kill(*given, **named):
        raise Killed

    def each(run):
        if run.due(2):
            if run.step == 6 and stop == "in the grid":
                monkeypatch.setattr(run.disk, "show", kill)
            run.save_grid(lambda: images)
            if run.step == 6 and stop == "after it":
                kill()
            if run.step == 6:
                monkeypatch.setattr(run.disk, "save", kill)

    with pytest.raises(Killed):
        train(make(tmp_path), each=each)
    monkeypatch.undo()
    stop = ""
    train(make(tmp_path), each=lambda run: run.due(2) and run.save_grid(lambda: images))
    assert sorted(folder.of_steps(tmp_path, "samples-{}.png")) == [2, 4, 6, 8]


# ---------------------------------------------------------------------- files that are not ours

FOREIGN = (
    "ckpt-best.pt",
    "ckpt-1e5.pt",
    "ckpt-2030-final.pt",
    "ckpt-99.pt",
    "samples-best.png",
    "samples-99.png",
    "snapshot-mine.pt",
    ".notes.tmp",
    ".notes.tmp.txt",
    ".a.txt.12.tmp",
    "before.txt",
    "model.safetensors",
)


@pytest.mark.parametrize("resume", ["auto", "never", "PATH"])
def test_what_is_not_ours_stays_and_stops_nothing(tmp_path, resume, capsys):
    run = train(make(tmp_path / "run", keep_every=3, steps=3)).folder
    for name in FOREIGN:
        (run / name).write_text("mine")
    (run / "ckpt-000099.pt.d").mkdir()
    (run / ".x.pt.1.tmp.pt").mkdir()
    dead = SPAWN.Process(target=int)
    dead.start()
    dead.join()
    for mark in ("", ".pinned"):
        (run / f".ckpt.pt{mark}.{files.HOST}-{dead.pid}.tmp.pt").write_text("left by a kill")
    (run / f".eval.json.{files.HOST}-1.tmp.json").write_text("of a process that runs")
    elsewhere = run / f".ckpt.pt.pinned.0ther0-{dead.pid}.tmp.pt"  # it may run, on another machine
    elsewhere.write_text("pinned")
    given = {"resume": str(run / "ckpt-000003.pt") if resume == "PATH" else resume}
    train(make(run, keep_every=3, **given))
    for name in FOREIGN:
        assert (run / name).read_text() == "mine"
    assert not list(left_over(run)) and list(run.glob(".eval.json.*"))
    assert [*run.glob(".ckpt*")] == [elsewhere]
    assert sorted(folder.of_steps(run, "ckpt-{}.pt")) == [3, 6, 9]


def test_settings_and_logs_of_others_keep_their_lines(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("server: mine\n")
    (tmp_path / "log.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "report.html").write_text("<html>mine</html>")
    run = train(make(tmp_path, steps=3))
    run.disk.report()
    assert (tmp_path / "before-config.yaml").read_text() == "server: mine\n"
    assert (tmp_path / "before-log.jsonl").read_text() == '{"mine": 1}\n'
    assert (tmp_path / "report.html").read_text() == "<html>mine</html>"
    assert "report.html is no report" in capsys.readouterr().out
    make(tmp_path, steps=3, resume="never")
    assert (tmp_path / "before-config.yaml").read_text() == "server: mine\n"


# ---------------------------------------------------------- file systems with less than ext4


def test_a_second_name_is_a_copy_where_there_are_no_links(tmp_path, mount):
    (tmp_path / "a.pt").write_text("new")
    (tmp_path / "b.pt").write_text("old")
    also_named(tmp_path / "a.pt", tmp_path / "b.pt")
    with atomic_write(tmp_path / "a.pt") as path:
        path.write_text("newer")
    assert (tmp_path / "b.pt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_a_whole_run_where_there_are_neither_links_nor_flock(tmp_path, monkeypatch):
    whole = train(make(tmp_path / "whole", keep_every=3)).folder
    without(monkeypatch.setattr)
    monkeypatch.setattr(files, "UNSYNCED", (None,))
    monkeypatch.setattr(os, "fsync", refuse)  # nor fsync, whose error has no number here
    broken = tmp_path / "broken"
    for stop in (2, 5, 9, None):
        train(make(broken, keep_every=3), stop)
    assert_same(saved(whole)["model"], saved(broken)["model"])
    names = [sorted(p.name for p in run.glob("ckpt*")) for run in (whole, broken)]
    assert names[0] == names[1] and rows(whole) == rows(broken)


def test_a_run_folder_alone(tmp_path):
    """Whoever has finished lets others in."""
    run = RunFolder(tmp_path, "toy", {"model_channels": 1}, World())
    run.restore()
    assert (tmp_path / ".lock").exists()
    run.finish()
    assert not (tmp_path / ".lock").exists()
