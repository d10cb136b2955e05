"""One process and two: the same data, the same losses, the same samples."""

from runtime.files import read_log
from runtime.processes import World

import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import free_port, start_ranks, succeed
from run_folders import saved
from tiny_runs import DRAWING, TRAININGS, flags


def run_two(script, *arguments):
    """Two processes as under torchrun, to their end."""
    done = [process.wait() for process in start_ranks(script, *arguments)]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err


def run_torchrun(script, *arguments):
    """The same from a shell, by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), f"{script}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def same_losses(one, two, tolerance=1e-5):
    """Every run in the folder `two` logged, at the same steps, the losses of that in `one`."""
    logs = sorted(path.relative_to(one) for path in one.rglob("log.jsonl"))
    assert logs
    for name in logs:
        first, second = (read_log(folder / name) for folder in (one, two))
        assert [row["step"] for row in first] == [row["step"] for row in second]
        for a, b in zip(first, second, strict=True):
            assert set(a) == set(b) and a["lr"] == b["lr"]
            for key in [key for key in a if key.startswith("loss")]:
                assert a[key] == pytest.approx(b[key], abs=tolerance), (name, a, b)
        # the losses differ from step to step far more than that, so the order was the same
        assert np.ptp([row["loss"] for row in first]) > 100 * tolerance, name


@pytest.mark.parametrize("script", TRAININGS)
def test_two_processes_log_the_losses_of_one(script, toy, tiny, tmp_path):
    more = flags(script, ae_steps=20, accumulate=2, ema=(0.9,), sample_every=0)
    given = [*tiny[script], *toy, *more, "--flip"]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(script, *given, "--out", one)
    run_two(script, *given, "--out", two)
    assert len(read_log(one / "log.jsonl")) == 20
    same_losses(one, two)


def test_torchrun_logs_the_losses_of_one_process(repo, toy, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(repo)
    given = [*tiny["ddpm_pixel"], *toy, "--sample-every", "0", "--flip"]
    succeed("ddpm_pixel", *given, "--out", tmp_path / "one")
    run_torchrun("ddpm_pixel", *given, "--out", tmp_path / "two")
    same_losses(tmp_path / "one", tmp_path / "two")


def samples(folder):
    return np.load(folder / "samples.npz")


@pytest.mark.parametrize("script", DRAWING)
def test_a_sample_is_a_function_of_its_seed(script, toy, tiny, tmp_path):
    given = [*tiny[script], *toy, "--steps", 6, "--sample-every", 0, "--seeds", "1-2"]
    succeed(script, *given, "--out", tmp_path / "run")

    def draw(name, *extra, size=1):
        args = ["--sample", tmp_path / "run" / "ckpt.pt", "--out", tmp_path / name, "--gpus", 0]
        args += ["--sample-steps", 10, "--guidance", 1, *extra]
        for process in start_ranks(script, *args, size=size):
            done = process.wait()
            assert done.code == 0, done.err
        found = samples(tmp_path / name)
        return found["arr_0"].astype(int), found["arr_1"]

    noisy = flags(script, sampler="ddpm")
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


@pytest.mark.parametrize("script", TRAININGS)
def test_ema_moves_and_the_ranks_agree(script, toy, tiny, tmp_path):
    """Each rank reports what it has at the end; the checkpoint is rank 0's."""
    given = [*tiny[script], *toy, "--steps", 12, *flags(script, sample_every=0, accumulate=2)]
    run_two("rank_report", script, *given, "--out", tmp_path)
    reports = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    state = saved(tmp_path)
    moved = 0
    for name, ema in state["ema"].items():
        assert torch.equal(reports[0]["ema"][name], reports[1]["ema"][name])
        assert torch.equal(reports[0]["ema"][name], ema)
        assert torch.equal(reports[0]["model"][name], reports[1]["model"][name])
        moved += not torch.equal(ema, state["model"][name])
    assert moved > len(state["ema"]) * 0.8
