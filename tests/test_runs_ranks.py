"""Several processes when something happens: one is killed, or the run goes on alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ALONE, free_port, start_ranks, succeed

import runtime


def children(pid):
    """Process numbers of the children of `pid`, oldest first."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_killed_rank_ends_the_others_and_says_which(repo, toy, tiny, tmp_path):
    flags = [*tiny["ldm_cfg"], *toy, "--steps", "100000", "--ae-steps", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(repo / "ldm_cfg.py"), *flags]
    job = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=repo, env=os.environ | ALONE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 90
        while len(runtime.read_log(tmp_path / "log.jsonl")) < 3:
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


@pytest.mark.parametrize("script", ["ddpm_pixel", "ldm_cfg"])
def test_a_run_of_two_goes_on_alone_with_the_same_images(script, toy, tiny, tmp_path):
    flags = [*tiny[script], *toy, "--sample-every", "0", "--steps", "9", "--out"]
    succeed(script, *flags, tmp_path / "alone")
    ranks = start_ranks(script, *flags, tmp_path / "both")
    assert [rank.wait().code for rank in ranks] == [0, 0]
    (tmp_path / "both" / "ckpt-previous.pt").replace(tmp_path / "both" / "ckpt.pt")  # of step 6
    succeed(script, *flags, tmp_path / "both")
    logs = [runtime.read_log(tmp_path / name / "log.jsonl") for name in ("alone", "both")]
    assert [row["step"] for row in logs[1]] == list(range(1, 10))
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), (a, b)
