"""Ranks that differ, die, never come, or are none: one line each, and nobody waits in vain."""

from runtime import links, ranks
from runtime.commandline import BadInput

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from launching import Started, free_port, refusal, refused, run, start_ranks

RANKED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def ended(*arguments, **how):
    """(Done of each of two ranks, seconds that this took)."""
    started, start = start_ranks("rank_together", *arguments, **how), time.monotonic()
    return [rank.wait(30) for rank in started], time.monotonic() - start


@pytest.mark.parametrize("where", ["", "alone"])
def test_a_rank_that_is_killed_ends_the_other(where):
    (survivor, killed), seconds = ended("killed", where)
    assert killed.code == -9 and survivor.code == 1 and seconds < 10
    assert survivor.err.splitlines() == [
        "error: rank 1 of 2 died or is out of reach; type the same again to go on from the last "
        "checkpoint"
    ]


@pytest.mark.parametrize("where", ["", "alone"])
def test_what_one_rank_refuses_ends_the_other(where):
    (survivor, other), seconds = ended("refuses", where)
    assert refusal(other) == "error: --here is wrong: type --there" and seconds < 10
    assert refusal(survivor) == "error: rank 1 of 2 stopped: --here is wrong: type --there"


def test_a_bug_of_one_rank_is_told_there():
    (survivor, other), seconds = ended("fails")
    assert other.code == 1 and other.err.count("Traceback") == 1 and seconds < 10
    assert survivor.err.splitlines() == ["error: rank 1 of 2 failed, as is said there"]
    assert survivor.code == 1


def test_a_rank_that_is_done_ends_no_other():
    done, _ = ended("done", "alone")
    assert [(d.code, d.err) for d in done] == [(0, "")] * 2


def test_a_process_that_dies_of_those_that_one_started():
    start, done = time.monotonic(), run("rank_together", "killed", "here", limit=30)
    assert done.code == 1 and time.monotonic() - start < 20
    assert done.err.splitlines() == [
        "error: a process of 2 was ended by SIGKILL; type the same again to go on from the last "
        "checkpoint"
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_processes_end_with_the_one_that_started_them():
    parent = Started("rank_together", "waits", "forked")
    pid, ranks = parent.process.pid, []

    def both():
        listed = Path(f"/proc/{pid}/task/{pid}/children")
        ranks[:] = listed.read_text().split() if listed.exists() else []
        return len(ranks) == 2

    parent.kill_when(both, delay=0.5)
    until = time.monotonic() + 10
    while left := [rank for rank in ranks if Path("/proc", rank).exists()]:
        if time.monotonic() > until:
            for rank in left:
                os.kill(int(rank), signal.SIGKILL)
            raise AssertionError("ranks live on")
        time.sleep(0.02)


@pytest.mark.slow
def test_what_a_process_refuses_of_those_that_one_started():
    done = run("rank_together", "refuses", "here", limit=30)
    assert refusal(done) == "error: --here is wrong: type --there"


def test_ranks_of_other_settings_are_told_which(toy, tiny, tmp_path):
    given = [*tiny["ddpm_pixel"], *toy, "--out", tmp_path / "run"]
    together = RANKED | {"MASTER_PORT": str(free_port())}
    both = [
        Started("ddpm_pixel", *given, *more, env=together | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r, more in enumerate((["--lr", 0.1], ["--lr", 0.2]))
    ]
    lines = {refusal(rank.wait(30)) for rank in both}
    told = "rank 1 of 2 has --lr 0.2 (rank 0: 0.1): start all with the same settings"
    assert lines == {f"error: {told}"} and not (tmp_path / "run").exists()


def test_what_differs_is_named():
    same = {"settings": {"--lr": "1", "--out": "a"}, "code": {"dit.py": "1"}, "torch": "2.9"}
    members = [same | {"local": r, "machine": "a"} for r in (0, 1)]
    assert ranks.differing(members) == ""
    for change, told in (
        ({"settings": {"--lr": "2", "--out": "a"}}, "rank 1 of 2 has --lr 2 (rank 0: 1): "),
        ({"settings": {"--lr": "1", "--out": "b"}}, "rank 1 of 2 has --out b (rank 0: a): "),
        ({"settings": {"--out": "a"}}, "rank 1 of 2 has --lr None (rank 0: 1): "),
        ({"code": {"dit.py": "2"}}, "rank 1 of 2 runs other code than rank 0: dit.py: copy "),
        ({"torch": "2.8"}, "rank 1 of 2 has torch 2.8, rank 0 torch 2.9: "),
    ):
        assert ranks.differing([members[0], members[1] | change]).startswith(told)
    far = [members[0], members[1] | {"local": 0, "machine": "b"}]
    assert ranks.differing(far) == ""
    far[1] = far[1] | {"settings": {"--lr": "1", "--out": "b"}}  # each machine has a disk
    assert ranks.differing(far) == ""
    far[1]["settings"] = {"--lr": "2"}
    assert ranks.differing(far).startswith("rank 1 of 2 (on b) has --lr 2 (rank 0: 1)")


def on(machine, local, told=None, boot="1"):
    return {"local": local, "machine": machine, "boot": boot, "LOCAL_RANK": told or str(local)}


@pytest.mark.parametrize(
    ("members", "wrong"),
    [
        ([on("a", 0, "unset"), on("b", 1, "unset")], "rank 1 of 2 (on b) has LOCAL_RANK unset, "),
        ([on("a", 0), on("a", 1, boot="2")], "rank 1 of 2 (on a) has LOCAL_RANK 1, "),
        ([on("a", 1), on("b", 0)], "rank 0 of 2 (on a) has LOCAL_RANK 1, "),
        ([on("a", 0), on("b", 0), on("a", 1)], "rank 2 of 3 (on a) has LOCAL_RANK 1, "),
        ([on("a", 0), on("b", 0), on("b", 2)], "rank 2 of 3 (on b) has LOCAL_RANK 2, "),
        ([on("a", 0), on("b", 1), on("b", 2)], "rank 1 of 3 (on b) has LOCAL_RANK 1, "),
        ([on("a", 0), on("a", 1), on("b", 0), on("b", 1)], ""),
        ([on("a", 0, "unset"), on("a", 1, "unset")], ""),
        ([on("a", 0), on("a", 0)], ""),  # as two machines
        ([{"local": 0}, {"local": 1}], ""),  # that one process has started
    ],
)
def test_a_number_on_a_machine_that_is_wrong(members, wrong):
    told = ranks.differing(members)
    assert told.startswith(wrong) and (": it counts the ranks of each from 0" in told) == bool(told)


def test_data_that_differ_are_told():
    done, _ = ended("data")
    assert {refusal(d) for d in done} == {
        "error: rank 1 of 2 has another data_key, theirs (rank 0: ours): give all the same data "
        "and files"
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"WORLD_SIZE": ""}, "RANK set in the environment without WORLD_SIZE, which torchrun"),
        ({"RANK": ""}, "WORLD_SIZE set in the environment without RANK, which torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "without MASTER_ADDR and MASTER_PORT, which"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: expected a number from 1 to"),
        ({"WORLD_SIZE": "9" * 5000}, "expected a number from 1 to 1000000"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: expected a number from 1 to"),
        ({"RANK": "2"}, "RANK=2 in the environment: expected a number from 0 to 1; torchrun"),
        ({"RANK": "-1"}, "RANK=-1 in the environment: expected a number from 0 to 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in the environment: expected a number from 0 to 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment: expected a number"),
    ],
)
def test_a_broken_environment(change, told, monkeypatch):
    for name, value in (RANKED | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as error:
        ranks.place()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_left_over_rank_is_noticed_before_any_work(toy, tiny):
    line = refused("ddpm_pixel", *tiny["ddpm_pixel"], *toy, env={"RANK": "1"})
    assert "RANK set in the environment without WORLD_SIZE" in line and "unset RANK" in line
    line = refused("eval_fid", "a", "b", env={"WORLD_SIZE": "x"})
    assert "WORLD_SIZE set in the environment without RANK" in line


def test_a_rank_waits_for_others_with_a_line_and_not_for_ever():
    at = {"MASTER_PORT": str(free_port()), "WAIT": "0.6"}
    for rank, other in ((0, "ranks 1"), (1, "rank 0")):
        done = run("rank_together", env=RANKED | at | {"RANK": str(rank)}, limit=30)
        note, error = done.err.splitlines()
        waits = f"note: rank {rank} of 2 waits for the others at 127.0.0.1:{at['MASTER_PORT']}"
        assert done.code == 2 and note.startswith(waits) and "RANK and WORLD_SIZE are set" in note
        assert error.startswith(f"error: rank {rank} of 2: {other} did not come to 127.0.0.1:")
        assert "within 0.6 s" in error and error.endswith("type unset RANK WORLD_SIZE")


# ------------------------------------------------------------------------ who comes to the meeting


def refused_parties(*places):
    """The lines that Parties of (rank, size) are refused with, all in this process."""
    port, lines = free_port(), []

    def come(rank, size):
        with pytest.raises(BadInput) as error:
            ranks.Party(ranks.Place(rank, size, 0, "127.0.0.1", port), {"local": 0})
        lines.append(str(error.value))

    threads = [threading.Thread(target=come, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(lines) == len(places)
    return set(lines)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([(2, 3)], "rank 2 has WORLD_SIZE=3, rank 0 WORLD_SIZE=2: start all with the same"),
        ([(1, 3)], "rank 1 has WORLD_SIZE=3, rank 0 WORLD_SIZE=2: start all with the same"),
        ([(0, 3), (1, 3), (1, 3)], "RANK=1 is given to two processes: start each of 0 to 2 once"),
    ],
)
def test_a_rank_of_another_size_and_a_rank_that_is_there(others, told):
    (line,) = refused_parties(*([(0, 2), *others] if len(others) == 1 else others))
    assert line.startswith(told)


def test_one_that_comes_late_is_told_at_once():
    both = start_ranks("rank_together", "waits", "alone")
    met, until = [rank.streams[0] for rank in both], time.monotonic() + 30
    while not all(Path(out).exists() and Path(out).read_text() for out in met):
        assert time.monotonic() < until
        time.sleep(0.01)
    line = refusal(run("rank_together", env=both[0].env | {"RANK": "1"}, limit=10))
    both[0].kill_when(lambda: True, others=both[1:])
    assert line.startswith("error: rank 1 of 2: all ranks have come to 127.0.0.1:")
    assert "is RANK=1 given twice?" in line


def test_a_meeting_at_which_nobody_is(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 0.3)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.PrefixStore("attempt 0", store).set("meeting", f'[{free_port()}, "token"]')
    with pytest.raises(BadInput, match="rank 1 of 2: rank 0 did not come to .* within 0.3 s"):
        ranks.Party(ranks.Place(1, 2, 0, "127.0.0.1", store.port), {"local": 0})


def test_strangers_hold_up_nobody(monkeypatch):
    monkeypatch.setattr(links, "HELLO", 0.2)
    monkeypatch.setattr(links, "LONGEST", 1000)
    hello = {"token": "ours", "rank": 1}
    with socket.create_server(("127.0.0.1", 0)) as server:
        came = links.arrivals(server, "ours", ranks.Wait("waits"))
        said = [b"", b"[" * 900, b"x" * 5000, b"[1]\n", b'{"token": "none"}\n', b"[" * 900 + b"\n"]
        strangers = [socket.create_connection(server.getsockname()) for _ in said]
        for stranger, words in zip(strangers, said, strict=True):
            stranger.sendall(words)
        member = socket.create_connection(server.getsockname())
        links.send(member, hello)
        start = time.monotonic()
        link, told = next(came)
        assert told == hello and time.monotonic() - start < 1
        threading.Timer(0.7, member.close).start()
        assert next(came) == (link, None)
        for stranger in strangers:  # all were let go
            stranger.settimeout(1)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


def test_a_port_in_use_and_a_machine_that_is_none():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = RANKED | {"RANK": "0", "MASTER_PORT": port}
        line = refusal(run("rank_together", env=env, limit=30))
        assert line.startswith(f"error: MASTER_PORT={port} is in use on this machine: ")
    line = refusal(run("rank_together", env=RANKED | {"MASTER_ADDR": "no.such.invalid"}, limit=30))
    assert line.startswith("error: MASTER_ADDR=no.such.invalid: no such machine (")
