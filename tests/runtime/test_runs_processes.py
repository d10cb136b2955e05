"""One process and two: the same data, the same losses, the same samples."""

from runtime.files import read_log
from runtime.processes import World

import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import free_port, start_ranks, succeed

from image_data import batches

CHAPTERS = ["ddpm_pixel", "ldm_cfg"]


def test_processes_split_each_batch_of_one():
    for world in (2, 4):
        for step in range(20):  # 20 steps of 8 over 50 images: the fourth epoch begins in them
            whole = batches.indices(50, 8, 3, step)
            parts = [batches.indices(50, 8, 3, step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), whole)
            flips = [batches.flips(8, 3, step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(flips), batches.flips(8, 3, step))


@pytest.mark.parametrize("script", CHAPTERS)
def test_torchrun_of_two_logs_the_same_losses(script, repo, toy, tiny, tmp_path):
    flags = [*tiny[script], *toy, "--sample-every", "0", "--flip"]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(script, *flags, "--out", one)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(repo / f"{script}.py"), *flags]
    done = subprocess.run([*command, "--out", str(two)], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in [".", "autoencoder"] if script == "ldm_cfg" else ["."]:
        logs = [read_log(folder / stage / "log.jsonl") for folder in (one, two)]
        assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
        assert len(logs[0]) == 20
        for a, b in zip(*logs, strict=True):
            assert set(a) == set(b) and a["lr"] == b["lr"]
            for name in [n for n in a if n.startswith("loss")]:
                assert a[name] == pytest.approx(b[name], abs=1e-5), (stage, a, b)
        # the losses differ from step to step far more than that, so the order was the same
        assert np.ptp([row["loss"] for row in logs[0]]) > 0.01


def samples(folder):
    return np.load(folder / "samples.npz")


@pytest.mark.parametrize("script", CHAPTERS)
def test_a_sample_is_a_function_of_its_seed(script, toy, tiny, tmp_path):
    flags = [*tiny[script], *toy, "--steps", 6, "--sample-every", 0, "--seeds", "1-2"]
    if script == "ldm_cfg":
        flags += ["--ae-steps", 6]
    succeed(script, *flags, "--out", tmp_path / "run")

    def draw(name, *extra, size=1):
        args = ["--sample", tmp_path / "run" / "ckpt.pt", "--out", tmp_path / name, "--gpus", 0]
        args += ["--sample-steps", 10, "--guidance", 1, *extra]
        for process in start_ranks(script, *args, size=size):
            done = process.wait()
            assert done.code == 0, done.err
        found = samples(tmp_path / name)
        return found["arr_0"].astype(int), found["arr_1"]

    noisy = ["--sampler", "ddpm"]
    alone, label = draw("alone", "--seeds", 17, *noisy)
    many, labels = draw("many", "--seeds", "0-63", "--batch-size", 64, *noisy)
    split, split_labels = draw("split", "--seeds", "0-63", "--batch-size", 8, *noisy, size=2)
    pair, _ = draw("pair", "--seeds", 17, *noisy, size=2)  # one of the two has nothing to do
    assert alone.shape == (1, 16, 16, 1) and many.shape == split.shape == (64, 16, 16, 1)
    assert np.array_equal(labels, np.arange(64) % 2) and np.array_equal(labels, split_labels)
    assert label[0] == labels[17]
    for other in (many[17], split[17], pair[0]):
        assert np.abs(other - alone[0]).max() <= 1
    assert np.abs(many - split).max() <= 1
    others = np.delete(many, 17, axis=0)
    assert np.abs(others - alone[0]).max(axis=(1, 2, 3)).min() > 1  # no other seed gives it


def test_shares_cover():
    for n in (0, 1, 7, 64):
        ranks = [World(rank, 3) for rank in range(3)]
        rows = torch.cat([torch.arange(n)[world.share(n)] for world in ranks])
        assert torch.equal(rows, torch.arange(n))


def test_ema_moves_and_the_ranks_agree(toy, tiny, tmp_path):
    """Each rank reports what it has at the end; the checkpoint is rank 0's."""
    flags = [*tiny["ddpm_pixel"], *toy, "--steps", 12, "--sample-every", 0, "--accumulate", 2]
    for process in start_ranks("rank_report", *flags, "--out", tmp_path):
        done = process.wait()
        assert done.code == 0, done.err
    reports = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    moved = 0
    for name, ema in saved["ema"].items():
        assert torch.equal(reports[0][name], reports[1][name])
        assert torch.equal(reports[0][name], ema)
        moved += not torch.equal(ema, saved["model"][name])
    assert moved > len(saved["ema"]) * 0.9
