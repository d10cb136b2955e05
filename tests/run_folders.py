"""What a run leaves, compared with what another one left."""

from runtime.files import read_log

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

NOISY = {"images_per_s", "peak_memory_mb"}  # tell of the machine and not of the run


def rows(folder):
    """The log without what is NOISY."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in NOISY} for row in found]


def saved(folder, name="ckpt.pt"):
    """The checkpoint in a folder."""
    return torch.load(Path(folder) / name, weights_only=True)


def saved_step(folder):
    """The step of the checkpoint in a folder, 0 without one."""
    return saved(folder)["step"] if (Path(folder) / "ckpt.pt").exists() else 0


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


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "ckpt-previous.link")


def assert_same_run(whole, broken):
    """Checkpoint and log are equal, and nothing half-written is left."""
    a, b = saved(whole), saved(broken)
    for state in (a, b):
        for place in ("out", "data_root"):
            state["config"].pop(place, None)
    assert {"model", "optimizer"} <= set(a)
    assert_same(a, b)
    assert rows(whole) == rows(broken)
    assert names(whole) == names(broken)


def assert_same_tree(whole, broken):
    """assert_same_run of every run in a folder, and all that was drawn or cached is equal, too."""
    runs = sorted(path.parent.relative_to(whole) for path in whole.rglob("ckpt.pt"))
    assert runs
    for run in runs:
        assert_same_run(whole / run, broken / run)
    for path in (p.relative_to(whole) for p in whole.rglob("*.np[yz]")):
        a, b = (np.load(folder / path) for folder in (whole, broken))
        pairs = [(a[name], b[name]) for name in a] if path.suffix == ".npz" else [(a, b)]
        assert all(np.array_equal(*pair) for pair in pairs), path
    for path in (p.relative_to(whole) for p in whole.rglob("snapshot-*.pt")):
        a, b = (torch.load(folder / path, weights_only=True) for folder in (whole, broken))
        assert_same(a, b, str(path))
    assert {*whole.rglob("snapshot-*.pt")} == {
        whole / p.relative_to(broken) for p in broken.rglob("snapshot-*.pt")
    }


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
    first, *others = start()
    first.kill_when(partial(log_passes, folder, before, step), delay, others=others)
    (folder / "held").unlink(missing_ok=True)
    assert not (folder / "samples.npz").exists()
