"""A run killed at any moment and resumed ends exactly as the unbroken run."""

from runtime.checkpoints import load_checkpoint
from runtime.files import read_log
from runtime.folder import RunFolder
from runtime.processes import World

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from launching import Started, start_ranks, succeed
from run_folders import assert_same_tree, kill_while_training, rows, saved_step
from tiny_runs import TRAININGS, flags

# What a resumed run must find again, where a chapter has it: dropout's masks, means, what picks t.
HARD = {
    "dropout": 0.1,
    "ema": (0.9, 0.99),
    "flip": True,
    "timesteps": 5,
    "schedule": "cosine",
    "schedule_sampler": "loss-second-moment",
    "save_every": 4,
    "sample_every": 40,
    "model_channels": 8,
    "channel_mult": (1,),
    "ema_lengths": (0.05, 0.1),
    "snapshot_every": 3,
}


@pytest.mark.parametrize("size", [1, 2], ids=["one process", "two processes"])
@pytest.mark.parametrize("script", TRAININGS)
def test_killed_again_and_again_equals_unbroken(script, size, toy, tiny, tmp_path):
    """Five times, or twice where two processes train."""
    steps, kills = (60, 5) if size == 1 else (36, 2)
    given = [*tiny[script], *toy, *flags(script, **HARD, steps=steps)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(out):
        if size == 1:
            return [Started(script, *given, "--out", out)]
        return start_ranks(script, *given, "--out", out, size=size)

    chance = random.Random(17)
    broken.mkdir()
    for _ in range(kills):
        gap, delay = chance.randint(1, 6), chance.uniform(0, 0.02)
        kill_while_training(lambda: start(broken), broken, gap, delay)
    assert 0 < saved_step(broken) < steps
    for folder in (whole, broken):
        done = [process.wait() for process in start(folder)]
        assert [d.code for d in done] == [0] * size, done[0].err
    assert_same_tree(whole, broken)


def test_killed_from_a_shell_and_resumed(repo, toy, tiny, tmp_path):
    given = [*tiny["ddpm_pixel"], *toy, "--steps", "400", "--sample-every", "0"]
    command = [sys.executable, str(repo / "ddpm_pixel.py"), *given, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=repo, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ckpt-previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = saved_step(tmp_path)
    assert 0 < killed_at < 400
    # Shorten what is left: --steps may change, it is no part of what a run is.
    succeed("ddpm_pixel", *given, "--steps", killed_at + 3, "--out", tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, killed_at + 4))


# ------------------------------------------------------------------------------------- every file


def save_rest(folder):
    """Go on where the run in `folder` stopped, and save what is left of steps 1, 2 and 3."""
    run = RunFolder(folder, "toy", {"model_channels": 1}, World())
    state = run.restore()
    for step in range((state["step"] if state else 0) + 1, 4):
        run.log(step, loss=1 / step)
        run.save(step, weights=torch.full((1000,), float(step)))
    run.leave()


def _save_and_die(folder, at):
    """save_rest(), but die at the at-th call that changes a file or a folder, once restored."""
    calls = 0

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    restore = RunFolder.restore

    def restore_and_count(run):
        state = restore(run)
        for name in ("fsync", "link", "replace", "unlink"):
            setattr(os, name, counted(name))
        return state

    RunFolder.restore = restore_and_count
    save_rest(folder)


def test_killed_between_any_two_file_operations(tmp_path):
    """However far a save has come, a whole checkpoint is there, and it is the last or the one
    before; and going on from it ends as if nothing had happened."""
    spawn = multiprocessing.get_context("forkserver")
    ends = []
    for at in range(1, 40):
        folder = tmp_path / str(at)
        process = spawn.Process(target=_save_and_die, args=(folder, at))
        process.start()
        process.join()
        ends.append(process.exitcode)
        if ends[-1] == 0:
            break
        logged = [row["step"] for row in read_log(folder / "log.jsonl")]
        assert logged[-1] - 1 <= saved_step(folder) <= logged[-1]
        save_rest(folder)
        assert [row["step"] for row in rows(folder)] == [1, 2, 3]
        weights = load_checkpoint(folder / "ckpt.pt")["weights"]
        assert torch.equal(weights, torch.full((1000,), 3.0))
        assert not list(folder.glob(".*"))
    assert ends[-1] == 0 and len(ends) > 8 and set(ends[:-1]) == {-signal.SIGKILL}
