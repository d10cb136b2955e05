"""Several processes when something happens: one is killed, or the run goes on alone."""

from runtime.files import read_log

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ALONE, free_port, start_ranks, succeed
from run_folders import saved
from tiny_runs import TRAININGS, fields, flags


def children(pid):
    """Process numbers of the children of `pid`, oldest first."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_killed_rank_ends_the_others_and_says_which(repo, toy, tiny, tmp_path):
    given = [*tiny["ldm_cfg"], *toy, "--steps", "100000", "--ae-steps", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(repo / "ldm_cfg.py"), *given]
    job = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=repo,
        env=os.environ | ALONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 90
        while len(read_log(tmp_path / "log.jsonl")) < 3:
            assert job.poll() is None and time.monotonic() < end, job.communicate()[1]
            time.sleep(0.1)
        ranks = children(job.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, err = job.communicate(timeout=30)
        assert job.returncode != 0
        assert "SIGKILL" in err or "-9" in err
        deadline = time.monotonic() + 5
        while any(os.path.exists(f"/proc/{pid}") for pid in ranks):
            assert time.monotonic() < deadline, "a rank lives on"
            time.sleep(0.1)
    finally:
        job.kill()


@pytest.mark.parametrize("script", TRAININGS)
def test_a_run_of_two_goes_on_alone_with_the_same_images(script, toy, tiny, tmp_path):
    given = [*tiny[script], *toy, "--sample-every", "0", "--steps", "9", "--out"]
    succeed(script, *given, tmp_path / "alone")
    ranks = start_ranks(script, *given, tmp_path / "both")
    assert [rank.wait().code for rank in ranks] == [0, 0]
    (tmp_path / "both" / "ckpt-previous.pt").replace(tmp_path / "both" / "ckpt.pt")  # of step 6
    succeed(script, *given, tmp_path / "both")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("alone", "both")]
    assert [row["step"] for row in logs[1]] == list(range(1, 10))
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), (a, b)


@pytest.mark.parametrize("script", [s for s in TRAININGS if "shard" in fields(s)])
def test_a_sharded_run_is_that_of_one_process_and_goes_on_without_shards(
    script, toy, tiny, tmp_path
):
    given = [*tiny[script], *toy, "--steps", "9", "--sample-every", "3", "--ema", "0.9"]
    given += flags(script, learn_sigma=True, sampler="ddpm", n_eval=0, seeds="0-4")
    alone, both, on = (tmp_path / name for name in ("alone", "both", "on"))
    succeed(script, *given, "--out", alone)
    ranks = start_ranks(script, *given, "--shard", "--out", both)
    done = [rank.wait() for rank in ranks]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    shutil.copytree(both, on)
    (on / "ckpt-previous.pt").replace(on / "ckpt.pt")  # of step 6
    succeed(script, *given, "--out", on)
    states = [saved(run) for run in (alone, both, on)]
    images = [np.load(run / "samples.npz")["arr_0"].astype(int) for run in (alone, both, on)]
    first, *others = [read_log(run / "log.jsonl") for run in (alone, both, on)]
    for log, state, drawn in zip(others, states[1:], images[1:], strict=True):
        assert [row["step"] for row in log] == list(range(1, 10))
        for a, b in zip(first, log, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), (a, b)
        assert state["ema"].keys() == states[0]["ema"].keys()
        for name, value in states[0]["ema"].items():
            torch.testing.assert_close(state["ema"][name], value, atol=1e-4, rtol=1e-3)
        assert abs(drawn - images[0]).max() <= 2
    assert (both / "samples-000003.png").is_file()
