"""One writer at a time, named to the others; also where a file system knows no flock.

A lock is a file, and its holder writes a new number into it every BEAT seconds. With flock the
kernel ends it with its process. Where there is no flock, or the file is of another machine, whoever
sees no number come for PATIENCE seconds takes it over.
"""

from runtime.commandline import BadInput
from runtime.files import HOST, temporary_of, writing

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
        self.token = {"who": me(), "host": HOST, "token": secrets.token_hex(8)}

    def take(self, wait=False):
        """Take it; who has it, if that is another process. wait: until it is free."""
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                told = self._text()
                self._close()
                return who_of(told)
            except OSError:  # there is no flock here
                self._close()
                return self._take_by_beats(wait)
            with contextlib.suppress(FileNotFoundError):  # its last holder may have removed it
                if os.path.samestat(os.fstat(self.file), os.stat(self.path)):
                    who = self._lives() if self._said("host") != HOST else ""
                    if not who:
                        break
                    if not wait:
                        self._close()
                        return who
            self._close()
        try:
            self._beat(0)
        except OSError:  # of a full disk: held unsaid, it would keep this very process out, too
            self._close()
            raise
        self._begin()
        return ""

    def release(self):
        """Give it back; its file goes."""
        if self.beating:
            self.beating.set()
            self.thread.join()
        if self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def is_ours(self):
        return self._said("token") == self.token["token"]

    def is_lost(self):
        """Whether another has taken it over, as one may where no number came for PATIENCE."""
        return self._said("token") not in (None, self.token["token"])

    def _close(self):
        if self.file is not None:
            os.close(self.file)
            self.file = None

    # ---- numbers

    def _take_by_beats(self, wait):
        while True:
            if who := self._lives():
                if not wait:
                    return who
                continue
            self._beat(0)
            time.sleep(5 * POLL)  # who took it over at the same moment has written by now
            if self.is_ours():
                self._begin()
                return ""

    def _lives(self):
        """Who writes a new number into the file before PATIENCE is over; "" for nobody."""
        seen, end = self._text(), time.monotonic() + PATIENCE
        while seen and time.monotonic() < end:
            time.sleep(POLL)
            if (now := self._text()) != seen:
                return who_of(now) if now else ""
        return ""

    def _begin(self):
        self.beating = threading.Event()
        self.thread = threading.Thread(target=self._go_on, daemon=True)
        self.thread.start()

    def _go_on(self):
        beat = 0
        while not self.beating.wait(BEAT) and not self.is_lost():
            beat += 1
            with contextlib.suppress(OSError):
                self._beat(beat)

    def _beat(self, beat):
        told = json.dumps(self.token | {"beat": f"{beat:09}"}).encode()  # always of one length
        if self.file is not None:  # another file would be another lock
            os.pwrite(self.file, told, 0)
            os.ftruncate(self.file, len(told))
            return
        own = temporary_of(self.path.with_name(f"{self.path.name}-{self.token['token']}.json"))
        own.write_bytes(told)
        os.replace(own, self.path)

    def _text(self):
        try:
            return self.path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _said(self, name):
        """What its file says of its holder; None where nothing is said."""
        try:
            return json.loads(self._text())[name]
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


def check_held(folder):
    """BadInput where this process held `folder` and another one has taken it over.

    So it may be after a sleep of the machine, where there is no flock.
    """
    lock = HELD.get((os.getpid(), Path(folder, ".lock").resolve()))
    if lock and lock.is_lost():
        who = who_of(lock._text())
        raise BadInput(f"{folder} was taken over by {who} while this one slept: it goes on there")


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
