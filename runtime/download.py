"""Files from the internet: several mirrors, checksum, resume, progress, never half a file."""

from runtime.commandline import BadInput
from runtime.files import locked
from runtime.processes import progress

import contextlib
import hashlib
import lzma
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

TIMEOUT = 30  # seconds without an answer before the next mirror is tried
MOST = 50e9  # bytes of a file; the largest that is fetched has half a gigabyte
PATIENCE, SLOWEST = 60, 2000  # seconds after which that many bytes a second must have come
LONGEST = 12 * 3600  # seconds of a download
# What zipfile raises for what is no whole zip, or one with a password.
TORN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


class Unavailable(BadInput):
    """A file that is neither here nor to be had."""


def file_hash(path, algorithm="sha256"):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch(name, mirrors, folder, md5=None, sha256=None):
    """folder/name, downloaded from the first of `mirrors` that works; several processes may ask.

    A mirror is an address that the name is put behind, or in place of '{}'. What has arrived is
    kept in folder/name.part, and a later call asks for the rest only. With `md5` or `sha256`, hex
    digits with which the checksum begins, a file of another content is thrown away. The environment
    variable DIFFUSION_MIRROR, an address, replaces all mirrors. Raises Unavailable, telling what
    to put where by hand.
    """
    path = Path(folder) / name
    checksums = {"md5": md5, "sha256": sha256}
    if path.exists():
        return path
    if "DIFFUSION_MIRROR" in os.environ:
        mirrors = [os.environ["DIFFUSION_MIRROR"]]
    with locked(path.with_name(f".{name}.lock")):
        if not path.exists():  # another process may have been faster
            _fetch(path, path.with_name(f"{name}.part"), mirrors, checksums)
    return path


def _fetch(path, part, mirrors, checksums):
    failures = []
    for mirror in mirrors:
        mirror = mirror if "{}" in mirror else mirror.rstrip("/") + "/{}"
        address = mirror.replace("{}", path.name)
        try:
            resumed = part.exists()
            _append(address, part)
            if (fault := _fault(part, checksums)) and resumed:
                part.unlink()  # perhaps the part of another file: once more from the start
                _append(address, part)
                fault = _fault(part, checksums)
            if fault:
                part.unlink()
                raise OSError(fault)
            os.replace(part, path)
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not an address
            failures.append(f"{address}: {getattr(error, 'reason', None) or error}")
    raise Unavailable(
        f"could not download {path.name} ({'; '.join(failures)}); get it by other means and put "
        f"it at {path}"
    )


def _fault(part, checksums):
    """What is wrong with a file that arrived whole, '' if nothing is."""
    for algorithm, expected in checksums.items():
        if expected and not (found := file_hash(part, algorithm)).startswith(expected):
            return f"{algorithm} {found}, expected {expected}"
    if any(checksums.values()):
        return ""
    if not part.name.endswith(".zip.part"):
        return ""
    try:
        with zipfile.ZipFile(part) as archive:
            damaged = archive.testzip()  # by its own sums: pieces of two files may be joined
        return f"{damaged} in it is damaged" if damaged else ""
    except TORN:
        return "what arrived is not a zip"


def _append(address, part):
    """Download `address` onto the end of `part`.

    OSError where less arrives than promised, or more than MOST; where it is slower than SLOWEST
    after PATIENCE, or takes LONGEST; where the disk has not room for it.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with contextlib.ExitStack() as stack:
        try:
            answer, pieces = stack.enter_context(_arriving(request))
        except urllib.error.HTTPError as error:
            if error.code != 416 or not have:
                raise
            # Nothing is left to send: the checksum will tell, and the length, where it is said.
            if error.headers.get("Content-Range", f"bytes */{have}") != f"bytes */{have}":
                part.unlink()
                _append(address, part)
            return
        if answer.status != 206:  # a server that cannot resume sends everything
            have = 0
        elif not answer.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-"):
            raise OSError(f"it sent another part than the one from byte {have} on")
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        _check_room(total or have, have, part)
        bar = progress(total, part.stem, initial=have, unit="B")
        start, size = time.monotonic(), have
        with bar, open(part, "ab" if have else "wb") as f:
            for piece in pieces:
                f.write(piece)
                bar.update(len(piece))
                size += len(piece)
                _check_room(size, size, part)
                seconds = time.monotonic() - start
                if seconds > PATIENCE and size - have < SLOWEST * seconds:
                    raise OSError(f"slower than {SLOWEST} bytes/s, {size} bytes have come")
                if seconds > LONGEST:
                    raise OSError(f"not done in {LONGEST / 3600:g} hours, {size} bytes have come")
            f.flush()
            os.fsync(f.fileno())
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


@contextlib.contextmanager
def _arriving(request):
    """Yield (the answer, an iterator over what comes); TimeoutError where PATIENCE brings nothing.

    A server may send its headers, or the lengths of its pieces, a byte at a time: the thread that
    waits for it is left to itself then.
    """
    things, ended = queue.Queue(8), threading.Event()

    def bring():
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                things.put(answer)
                while not ended.is_set() and (piece := answer.read1(1 << 16)):
                    things.put(piece)
            things.put(b"")
        except Exception as error:
            things.put(error)

    def next_one():
        try:
            thing = things.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"nothing came for {PATIENCE} s") from None
        if isinstance(thing, Exception):
            raise thing
        return thing

    threading.Thread(target=bring, daemon=True).start()
    try:
        yield next_one(), iter(next_one, b"")
    finally:
        ended.set()
        with contextlib.suppress(queue.Empty):
            while True:  # what is full would keep the thread
                things.get_nowait()


def _check_room(total, have, part):
    """OSError for a file of more than MOST bytes, or more than the disk can hold."""
    if total > MOST:
        raise OSError(f"more than {MOST / 1e9:g} GB, expected less")
    if total - have > (free := shutil.disk_usage(part.parent).free):
        needed = f"{(total - have) / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        raise OSError(f"{part.parent} has no room for {needed}")
