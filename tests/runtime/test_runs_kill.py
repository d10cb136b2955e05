"""A run killed at any moment and resumed ends exactly as the unbroken run."""

from runtime.processes import World
from runtime.checkpoints import load_checkpoint
from runtime.run import Run
from runtime.files import read_log

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import Started, start_ranks, succeed

NOISY = {"images_per_s", "peak_memory_mb"}  # tell of the machine and not of the run


def rows(folder):
    """The log without what is NOISY."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in NOISY} for row in found]


def assert_same(a, b, where=""):
    """The same nesting, types, numbers and, bit for bit, tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i in range(len(a)):
            assert_same(a[i], b[i], f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(whole, broken):
    """Checkpoint and log are equal, and nothing half-written is left."""
    a, b = (torch.load(f / "ckpt.pt", weights_only=True) for f in (whole, broken))
    for state in (a, b):
        state["config"].pop("out", None)
    assert {"model", "optimizer"} <= set(a)
    assert_same(a, b)
    assert rows(whole) == rows(broken)
    assert sorted(p.name for p in whole.iterdir() if p.name != "ckpt-previous.link") == sorted(
        p.name for p in broken.iterdir() if p.name != "ckpt-previous.link"
    )


def assert_same_samples(whole, broken):
    a, b = (np.load(f / "samples.npz") for f in (whole, broken))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])


def saved_step(folder):
    path = folder / "ckpt.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def log_passes(folder, log_before, step):
    """Whether a process that started after `log_before` was read has logged `step`."""
    path = folder / "log.jsonl"
    if not path.exists() or os.stat(path).st_ino == log_before:
        return False
    found = read_log(path)
    return bool(found) and found[-1]["step"] >= step


def kill_while_training(start, folder, gap, delay):
    """Start, let it log `gap` steps beyond the checkpoint that it resumes from, kill it."""
    log = folder / "log.jsonl"
    before = os.stat(log).st_ino if log.exists() else None
    if before:  # hold the old file, so that its inode number cannot be given to the new one
        os.link(log, folder / "held")
    step = saved_step(folder) + gap
    processes = start()
    for i, process in enumerate(processes):
        moment = partial(log_passes, folder, before, step) if i == 0 else lambda: True
        process.kill_when(moment, delay if i == 0 else 0)
    (folder / "held").unlink(missing_ok=True)
    assert not (folder / "samples.npz").exists()


@pytest.mark.parametrize("size", [1, 2], ids=["one process", "two processes"])
def test_pixel_killed_ten_times_equals_unbroken(size, toy, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *toy, "--mult", 1, "--width", 8, "--dropout", 0.1]
    flags += ["--timesteps", 5, "--timestep-sampling", "loss_second_moment", "--ema", 0.9, 0.99]
    steps = 100 if size == 1 else 45
    flags += ["--steps", steps, "--save-every", 4, "--sample-every", 40]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(out):
        if size == 1:
            return [Started("ddpm_pixel", *flags, "--out", out)]
        return start_ranks("ddpm_pixel", *flags, "--out", out, size=size)

    chance = random.Random(17)
    broken.mkdir()
    for _ in range(10 if size == 1 else 3):
        gap, delay = chance.randint(1, 6), chance.uniform(0, 0.02)
        kill_while_training(lambda: start(broken), broken, gap, delay)
    assert 0 < saved_step(broken) < steps
    for folder in (whole, broken):
        assert [p.wait().code for p in start(folder)] == [0] * size
    assert_same_run(whole, broken)
    assert_same_samples(whole, broken)


def test_latent_killed_in_every_stage_equals_unbroken(tiny, tmp_path):
    images = write_images(tmp_path / "images", 1500)
    flags = [*tiny["ldm_cfg"], "--data", images, "--data-root", tmp_path / "prepared", "--flip"]
    flags += ["--ae-steps", 50, "--steps", 50, "--seeds", "0-299", "--sample-steps", 10]
    flags += ["--sample-every", 0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("ldm_cfg", *flags, "--out", whole)
    chance = random.Random(3)

    def start():
        return [Started("ldm_cfg", *flags, "--out", broken)]

    ae, latents = broken / "autoencoder", broken / "latents"
    ae.mkdir(parents=True)
    for _ in range(4):
        kill_while_training(start, ae, chance.randint(1, 6), chance.uniform(0, 0.02))
    assert 0 < saved_step(ae) < 50 and not latents.exists()

    moments, manifest = latents / "moments.npy", latents / "manifest.json"
    caught = 0
    while caught < 2:  # as long as it takes until two kills have hit a cache half written
        moments.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
        start()[0].kill_when(moments.exists, chance.uniform(0, 0.02))
        caught += not manifest.exists()
    assert saved_step(ae) == 50 and not (broken / "ckpt.pt").exists()

    for _ in range(3):
        kill_while_training(start, broken, chance.randint(1, 6), chance.uniform(0, 0.02))
    start()[0].kill_when(lambda: saved_step(broken) == 50, 0.1)
    assert not (broken / "samples.npz").exists()

    succeed("ldm_cfg", *flags, "--out", broken)
    assert_same_run(whole, broken)
    assert_same_run(whole / "autoencoder", broken / "autoencoder")
    assert_same_samples(whole, broken)
    assert json.loads(manifest.read_text()) == json.loads(
        (whole / "latents" / "manifest.json").read_text()
    )
    assert np.array_equal(np.load(moments), np.load(whole / "latents" / "moments.npy"))


def test_killed_from_a_shell_and_resumed(repo, toy, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *toy, "--steps", "400", "--sample-every", "0", "--gpus", "0"]
    command = [sys.executable, str(repo / "ddpm_pixel.py"), *flags, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=repo, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ckpt-previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = saved_step(tmp_path)
    assert 0 < killed_at < 400
    # Shorten what is left: --steps may change, it is no part of what a run is.
    succeed("ddpm_pixel", *flags, "--steps", killed_at + 3, "--out", tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, killed_at + 4))


def _save_and_die(folder, at):
    """Save steps 1, 2, 3; die at the at-th call that changes a file or a folder."""
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

    run = Run(folder, "toy", {"width": 1}, World())
    state = run.restore()
    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, counted(name))
    for step in range((state["step"] if state else 0) + 1, 4):
        run.log(step, loss=1 / step)
        run.save(step, weights=torch.full((1000,), float(step)))


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
        _resume(folder)
    assert ends[-1] == 0 and len(ends) > 8 and set(ends[:-1]) == {-signal.SIGKILL}


def _resume(folder: Path):
    run = Run(folder, "toy", {"width": 1}, World())
    state = run.restore()
    for step in range((state["step"] if state else 0) + 1, 4):
        run.log(step, loss=1 / step)
        run.save(step, weights=torch.full((1000,), float(step)))
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    weights = load_checkpoint(folder / "ckpt.pt")["weights"]
    assert torch.equal(weights, torch.full((1000,), 3.0))
    assert not list(folder.glob(".*"))
