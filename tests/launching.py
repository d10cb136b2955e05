"""Command lines run in processes of their own, started in a tenth of a second each.

A fork server imports torch and the scripts once. What it forks is a process like any other: it has
its own command line, environment, standard streams and exit code, joins others as under torchrun,
and can be killed.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PATHS = [str(REPO), str(REPO / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
MODULES = ["launching", *sorted(path.stem for path in REPO.glob("*.py"))]
MODULES += ["pytest", "tyro", "torch._dynamo"]
MODULES += ["matplotlib.pyplot", "matplotlib.backends.backend_agg"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(MODULES)


def unsynced(descriptor):
    """In place of os.fsync: a killed process loses nothing that the kernel has, a machine may."""


@dataclass
class Done:
    """How a command line ended: its exit code (negative: the signal) and what it wrote."""

    code: int
    out: str
    err: str


def _child(script, argv, env, out, err):
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    os.fsync = unsynced
    sys.argv = [str(REPO / f"{script}.py"), *argv]
    main = importlib.import_module(script).main
    importlib.import_module("runtime.commandline").entry(main)


class Started:
    """A running command line: `python SCRIPT.py ARGUMENTS`."""

    def __init__(self, script, *arguments, env=None):
        self.folder = tempfile.TemporaryDirectory()
        self.env = env or {}
        self.streams = [str(Path(self.folder.name) / name) for name in ("out", "err")]
        argv = [str(a) for a in arguments]
        self.process = context.Process(
            target=_child, args=(script, argv, self.env, *self.streams), daemon=False
        )
        before = {name: os.environ.get(name) for name in ALONE}
        os.environ.update(ALONE)
        try:
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.process.start()

    def wait(self, limit=120):
        """Done, once it has ended by itself; AssertionError if that takes `limit` seconds."""
        self.process.join(limit)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        read = [Path(p).read_text() if Path(p).exists() else "" for p in self.streams]
        assert not late, f"still running after {limit} s:\n{read[0]}{read[1]}"
        self.folder.cleanup()
        return Done(self.process.exitcode, *read)

    def kill_when(self, condition, delay=0.0, limit=60, others=()):
        """SIGKILL, `delay` seconds after condition() became true; it must be alive until then.

        others: further Started, killed at the same moment.
        """
        end = time.monotonic() + limit
        while not condition():
            alive = self.process.is_alive()
            if not alive or time.monotonic() > end:
                raise AssertionError(f"the moment to kill never came: {self.wait(1)}")
            time.sleep(0.0005)
        time.sleep(delay)
        assert self.process.is_alive(), f"ended before it was killed: {self.wait(1)}"
        for started in (*others, self):
            started.process.kill()
        for started in (*others, self):
            started.process.join()
            started.folder.cleanup()
        assert self.process.exitcode == -9


def run(script, *arguments, env=None, limit=120):
    """The command line run to its end: Done."""
    return Started(script, *arguments, env=env).wait(limit)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script, *arguments, size=2):
    """[Started], one for each of `size` processes that find each other as under torchrun."""
    together = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    together["MASTER_PORT"] = str(free_port())
    ranks = [together | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
    return [Started(script, *arguments, env=env) for env in ranks]


def succeed(script, *arguments, env=None, limit=120):
    """As run(), and it must end well."""
    done = run(script, *arguments, env=env, limit=limit)
    assert done.code == 0, done.err
    return done


def refusal(done):
    """The one line on standard error of a command that refused its input, without progress bars."""
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    return lines[0]


def refused(script, *arguments, env=None):
    """As run(), and it must refuse its input: the one line that says why.

    It names no flag that this command would refuse, too.
    """
    from told_flags import check_named

    line = refusal(run(script, *arguments, env=env))
    check_named(script, arguments, line)
    return line
