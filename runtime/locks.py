"""One writer at a time, named to the others; also where a file system knows no flock.

A lock is a file. With flock the kernel ends it with its process. Elsewhere its holder writes a new
number into it every BEAT seconds, and whoever sees none come for PATIENCE seconds takes it over.
"""

from runtime.commandline import BadInput
from runtime.files import writing

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path

BEAT, PATIENCE, POLL = 2.0, 10.0, 0.1  # seconds
HELD = {}  # locks on folders, which this process has until it ends


class Lock:
    """The lock that is the file `path`."""

    def __init__(self, path):
        self.path, self.file, self.beating = Path(path), None, None
        self.token = {"who": me(), "token": secrets.token_hex(8)}

    def take(self, wait=False):
        """Take it; who has it, if that is another process. wait: until it is free."""
        while True:
            self.file = open(self.path, "a+")  # noqa: SIM115
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                self.file.seek(0)
                told = self.file.read(2000)
                self.file.close()
                return who_of(told)
            except OSError:  # there is no flock here
                self.file.close()
                return self._take_by_beats(wait)
            with contextlib.suppress(FileNotFoundError):  # its last holder may have removed it
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    break
            self.file.close()
        self.file.truncate(0)
        self.file.write(json.dumps(self.token))
        self.file.flush()
        return ""

    def release(self):
        """Give it back; its file goes."""
        if self.beating:
            self.beating.set()
            self.thread.join()
        if self._read() == self.token["token"]:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.file.close()

    # ---- without flock

    def _take_by_beats(self, wait):
        while True:
            if who := self._lives():
                if not wait:
                    return who
                continue
            self._beat(0)
            time.sleep(5 * POLL)  # who took it over at the same moment has written by now
            if self._read() == self.token["token"]:
                self.beating = threading.Event()
                self.thread = threading.Thread(target=self._go_on, daemon=True)
                self.thread.start()
                return ""

    def _lives(self):
        """Who writes a new number into the file before PATIENCE is over; "" for nobody."""
        seen, end = self._text(), time.monotonic() + PATIENCE
        while seen and time.monotonic() < end:
            time.sleep(POLL)
            if (now := self._text()) != seen:
                return who_of(now) if now else ""
        return ""

    def _go_on(self):
        beat = 0
        while not self.beating.wait(BEAT) and self._read() == self.token["token"]:
            beat += 1
            with contextlib.suppress(OSError):
                self._beat(beat)

    def _beat(self, beat):
        own = self.path.with_name(f"{self.path.name}.json.{os.getpid()}.tmp.json")
        own.write_text(json.dumps(self.token | {"beat": beat}))
        os.replace(own, self.path)

    def _text(self):
        try:
            return self.path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _read(self):
        try:
            return json.loads(self._text())["token"]
        except (OSError, ValueError, LookupError, TypeError):
            return None


def me():
    """This process, for others to read."""
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    whole = {"break_on_hyphens": False, "break_long_words": False}  # no flag is cut in two
    command = textwrap.shorten(command, 120, placeholder=" ...", **whole)
    return f"process {os.getpid()} on {socket.gethostname()} ({command})"


def who_of(text):
    """Whoever has written `text` into a lock; anything may stand there."""
    try:
        who = json.loads(text)["who"]
        if isinstance(who, str) and who.startswith("process "):
            return "".join(letter if letter.isprintable() else "?" for letter in who[:250])
    except (ValueError, LookupError, TypeError):
        pass
    return "another process"


def hold(folder, flag="--out"):
    """Be the only process that writes in `folder`, until this one ends; its Lock.

    BadInput names the process that does already.
    """
    path = Path(folder, ".lock").resolve()
    if (key := (os.getpid(), path)) not in HELD:
        lock = Lock(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            who = lock.take()
        if who:
            raise BadInput(
                f"{folder} is written by {who}: wait until that ends, or type another {flag}"
            )
        HELD[key] = lock
        atexit.register(leave, folder)
    return HELD[key]


def leave(folder):
    """Let others write in a folder that this process holds."""
    if lock := HELD.pop((os.getpid(), Path(folder, ".lock").resolve()), None):
        lock.release()


@contextlib.contextmanager
def alone(folder, world):
    """Inside, the first process of a World holds `folder`."""
    if world.is_main:
        hold(folder)
    try:
        yield
    finally:
        if world.is_main:
            leave(folder)
