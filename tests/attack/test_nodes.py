"""Machines without a common disk: folders of their own, and namespaces of the network."""

from runtime.files import read_log

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from launching import Started, free_port
from tiny_runs import flags


def on_two(script, *arguments, own=()):
    """[Done] of two ranks, each the first one of its machine; own: further arguments of each."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [together | {"RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    more = own or ((), ())
    both = [Started(script, *arguments, *more[r], env=env) for r, env in enumerate(each)]
    done = [rank.wait(60) for rank in both]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    return done


def test_disks_files_and_latents(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    on_two("rank_disks", tmp_path)
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert first["nodes"] == other["nodes"] == 2
    assert first["of"] == other["of"] == [0, 1] and first["writes"] and other["writes"]
    assert first["common"] == other["common"] == [0, 0]
    made = first["first"]
    assert made == other["first"] and made[0] == 200  # half of the images in both views each
    for name in ("again", "gone", "changed"):  # nothing is encoded, all have the same
        assert first[name] == other[name] == [0, *made[1:]]
    assert first["file"] == [True, True] and other["file"] == [False, True]
    assert first["other"] == other["other"] == 0
    assert first["copy"] == other["copy"] and "another copy of the data, " in first["copy"]
    assert not first["none"] and not other["none"]
    latents = [f"latents/{name}" for name in (".checked.json", "manifest.json", "moments.npy")]
    assert first["left"] == ["ckpt.pt", *latents] and other["left"] == [*latents, "none"]


def test_a_run_on_two_machines_is_written_by_one(toy, tiny, tmp_path):
    more = flags("ddpm_pixel", sample_every=0)
    own = [["--out", tmp_path / r / "run", "--data-root", tmp_path / r / "data"] for r in "01"]
    given = [*tiny["ddpm_pixel"], *toy[:2], *more, "--save-every", 2]
    on_two("ddpm_pixel", *given, "--steps", 2, own=own)
    on_two("ddpm_pixel", *given, "--steps", 4, own=own)  # goes on, though one has no checkpoint
    assert [row["step"] for row in read_log(tmp_path / "0" / "run" / "log.jsonl")][-1] == 4
    assert torch.load(tmp_path / "0" / "run" / "ckpt.pt", weights_only=True)["step"] == 4
    assert os.listdir(tmp_path / "1") == ["data"]


# ------------------------------------------------------------------------------ the real thing


@pytest.fixture
def namespaces():
    """Two names of network namespaces, at 10.77.0.1 and 10.77.0.2; skipped where none can be."""
    names, sides = [f"node{i}-{os.getpid()}" for i in (0, 1)], [f"v{os.getpid()}-{i}" for i in "01"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True).returncode

    if not shutil.which("ip") or any(ip("netns", "add", name) for name in names):
        pytest.skip("ip netns cannot be used")
    try:
        pair = ["link", "add", sides[0], "netns", names[0], "type", "veth", "peer", "name"]
        if ip(*pair, sides[1], "netns", names[1]):
            pytest.skip("no pair of interfaces")
        for i, (name, side) in enumerate(zip(names, sides, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", side)
            ip("-n", name, "link", "set", side, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, sides, strict=True))
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            ip("netns", "del", name)


def torchrun(namespaces, repo, tmp_path, script, *given, each=1):
    """Two agents of torchrun, each in a namespace, with a disk of its own; what they say."""
    agents = []
    for i, (name, side) in enumerate(namespaces):
        disk = tmp_path / str(i)
        disk.mkdir(exist_ok=True)
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--nproc-per-node", str(each), "--node-rank", str(i)]
        words += ["--master-addr", "10.77.0.1", "--master-port", "29400", "--", f"{script}.py"]
        words += [*map(str, given), "--out", str(disk / "run"), "--data-root", str(disk / "data")]
        env = os.environ | {"GLOO_SOCKET_IFNAME": side, "OMP_NUM_THREADS": "1"}
        said = open(disk / "said", "w")  # noqa: SIM115
        agents.append(subprocess.Popen(words, cwd=repo, env=env, stdout=said, stderr=said))
    return agents


@pytest.mark.slow
def test_latent_diffusion_in_two_namespaces(namespaces, repo, toy, tiny, tmp_path):
    given = [*tiny["ldm_cfg"], *toy[:2], "--sample-every", 0, "--steps", 4, "--flip"]
    for agent in torchrun(namespaces, repo, tmp_path, "ldm_cfg", *given, each=2):
        assert agent.wait(200) == 0, (tmp_path / "0" / "said").read_text()
    both = [tmp_path / str(i) / "run" / "latents" / "moments.npy" for i in (0, 1)]
    assert both[0].read_bytes() == both[1].read_bytes()
    assert os.listdir(tmp_path / "1" / "run") == ["latents"]
    assert (tmp_path / "0" / "run" / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_machine_that_is_lost_ends_the_others(how, namespaces, repo, toy, tiny, tmp_path):
    more = ["--steps", 10**6, "--log-every", 20, "--save-every", 20, "--sample-every", 0]
    agents = torchrun(
        namespaces, repo, tmp_path, "ddpm_pixel", *tiny["ddpm_pixel"], *toy[:2], *more
    )
    log, until = tmp_path / "0" / "run" / "log.jsonl", time.monotonic() + 120
    while not read_log(log):
        assert time.monotonic() < until and agents[0].poll() is None
        time.sleep(0.05)
    name, side = namespaces[1]
    if how == "killed":
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in found.stdout.split():
            os.kill(int(pid), 9)
    else:
        subprocess.run(["ip", "-n", name, "link", "set", side, "down"], check=True)
    start = time.monotonic()
    while "error: rank 1 of 2 (on " not in (tmp_path / "0" / "said").read_text():
        assert time.monotonic() - start < 10
        time.sleep(0.05)
    assert agents[0].wait(60) != 0  # torchrun itself takes some seconds more
