"""Files that are written whole or not at all, and by one process at a time.

Disks that are full, and folders that may not be written to, are one line.
"""

from runtime.commandline import BadInput

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
FAILED = (*FULL, *CLOSED, errno.EIO, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENXIO)
FAILED += (errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.ENODEV, errno.ELOOP)
WORDS = ("stopped", "metric_features", "metric_reference")  # in a run's log; all else is a number
UNSYNCED = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of mounts without fsync
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
TEMPORARY = re.compile(r"\..+(\.\w+)(?:\.pinned)?\.(\w{6})-(\d+)\.tmp\1")  # of temporary_of


class Unwritable(BadInput):
    """What a disk or a file system did not take."""


@contextlib.contextmanager
def writing(path):
    """Inside, Unwritable is raised where a file `path` cannot be written, in one line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not (number := _failure(error, Path(path).parent)):
            raise
        raise _unwritable(f"write {path}", number) from error


def _unwritable(what, number):
    """The Unwritable for what the system refused with this errno; it says what to do."""
    from runtime.edges import OUTSIDE

    mend = OUTSIDE.get(number, "choose another name")
    return Unwritable(f"cannot {what} ({os.strerror(number)}): {mend}")


def _failure(error, folder):
    """Which errno keeps a file from being written, if that raised `error`; else None.

    torch, numpy, Pillow and safetensors raise errors without one where a disk is full.
    """
    of = getattr(error, "filename", None)
    if of and Path(os.fsdecode(of)).parent != folder:  # it was about another file
        return None
    if getattr(error, "errno", None) in FAILED:
        return error.errno
    if not getattr(error, "errno", None):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < 1 << 16:
                return errno.ENOSPC
    return None


def temporary_of(path, mark=""):
    """A name beside `path` that says which process, of which machine, has this file for a while."""
    return path.with_name(f".{path.name}{mark}.{HOST}-{os.getpid()}.tmp{path.suffix}")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary Path beside `path`; on success it is flushed to disk and takes its name.

    A device or a pipe, such as /dev/stdout, is written to as it is. Raises Unwritable where the
    folder cannot be made, or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(f"make the folder {path.parent}", error.errno) from None
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    temporary = temporary_of(path)
    with writing(path):
        try:
            temporary.touch()  # where that is refused, torch and safetensors would say it oddly
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def flush(path):
    """See a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    finally:
        os.close(descriptor)


def remove(folder, *names):
    """Remove files of these names from a folder, where they are there."""
    for name in names:
        with writing(path := Path(folder, name)):
            path.unlink(missing_ok=True)


def left_over(folder):
    """Temporary files in `folder` of processes of this machine that are gone."""
    for path in Path(folder).glob(".*.tmp*"):
        found = TEMPORARY.fullmatch(path.name)
        if found and found[2] == HOST and path.is_file() and not _runs(int(found[3])):
            yield path


def _runs(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def reserve(file, size, folder, flag="--data-root"):
    """Have the disk set aside `size` bytes for an open file in `folder`, from its start on.

    Whoever writes to a memory map on a full disk is killed; Unwritable comes before that.
    """
    try:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # on a Mac: ask, and hope
            _fill(file, size)
        except OSError as error:
            if error.errno in FULL:
                raise
            _fill(file, size)
    except OSError as error:
        told = f"{size / 2**20:.3g} MiB are needed in {folder} ({error.strerror})"
        raise Unwritable(f"{told}: free some, or type another {flag}") from None


def _fill(file, size):
    """Write zeros, where a file system can set nothing aside."""
    file.seek(0)
    for start in range(0, size, 1 << 24):
        file.write(bytes(min(1 << 24, size - start)))
    file.flush()
    file.seek(0)


def check_file(path):
    """BadInput for a pipe or device, which one may wait at for ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise BadInput(f"{path} is a device or a pipe, expected a file")


def check_folder(folder, flag="--out"):
    """Make a folder, if it is not there; BadInput where nobody can write to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise BadInput(f"{flag} {folder} cannot be written to ({error.strerror})") from None


def check_writable(folder, flag="--out"):
    """BadInput where a folder, or the nearest one above it that is there, takes no files."""
    found = Path(folder).absolute()
    while not os.path.lexists(found):
        found = found.parent
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        why = "it may not be written to" if found.is_dir() else "it is no folder"
        raise BadInput(f"{flag} {folder}: {found}: {why}; type another {flag}")


def read_text(path, flag):
    """What a UTF-8 text file says. BadInput, naming the flag, for others."""
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        wrong = f"{flag} {path} is not UTF-8 text (at byte {error.start})"
        raise BadInput(f"{wrong}: save it as UTF-8") from None


def read_lines(path, flag):
    """The lines of such a file, but for empty ones."""
    lines = map(str.strip, read_text(path, flag).splitlines())
    return [line for line in lines if line]


def also_named(path, name):
    """Give the file `path` a second name in its folder, at once, whatever had that name before.

    Where a file system has no second names, it is a copy.
    """
    link = temporary_of(name)
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        with atomic_write(name) as copy:
            shutil.copyfile(path, copy)
    else:
        with writing(name):
            os.replace(link, name)
            link.unlink(missing_ok=True)  # rename leaves two names of one file as they are


@contextlib.contextmanager
def locked(path, flag="--data-root"):
    """Only one process is inside for a given `path`, a file made for this; the others wait.

    The lock is gone when its process is, however it ended. Raises BadInput where it cannot write.
    """
    from runtime.locks import Lock

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        lock.take(wait=True)
    except OSError as error:
        raise Unwritable(
            f"cannot write in {path.parent} ({error.strerror}); choose another {flag}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def append_row(path, row):
    """Add an object to a file of JSON lines, and see it onto the disk; read_log reads it.

    Several processes may add to one file at the same time: the buffer makes a row one write.
    """
    with writing(path), open(path, "ab+", buffering=1 << 20) as f:
        # A kill may have torn the line before this one: start on a new line.
        f.seek(max(f.tell() - 1, 0))
        torn = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def save_text(path, lines):
    """Write a text file of these lines."""
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def save_json(path, told):
    """Write a JSON file, with a line for each thing that it says."""
    save_text(path, [json.dumps(told, indent=1)])


def is_number(value):
    """Whether what a file says is a finite number that a float holds; a JSON has any integer."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_json(path):
    """The dictionary in a JSON file; {} where there is none, or the file is damaged."""
    if not Path(path).is_file():  # one may wait at a pipe for ever
        return {}
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log(path):
    """The rows of a log.jsonl; a line torn by a kill, or damaged, is left out."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_run_log(path):
    """The rows of a run's log that have a step, and of each what is a number, or one of WORDS."""
    found = [row for row in read_log(path) if type(row.get("step")) is int and row["step"] < 2**53]
    return [{k: v for k, v in row.items() if _is_logged(k, v)} for row in found]


def _is_logged(name, value):
    if type(value) is int:
        return name not in WORDS and is_number(value)
    return type(value) in ((str,) if name in WORDS else (float, type(None)))
