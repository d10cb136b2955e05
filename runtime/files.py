"""Files that are written whole or not at all, and by one process at a time."""

from runtime.commandline import BadInput

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary Path beside `path`; on success it is flushed to disk and takes its name.

    Raises BadInput where the folder cannot be made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path.parent} ({error.strerror})") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder, flag="--out"):
    """Make a folder, if it is not there; BadInput where nobody can write to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{flag} {folder} cannot be written to ({error.strerror})") from None


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
    """Give the file `path` a second name in its folder, at once, whatever had that name before."""
    link = name.with_suffix(".link")
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, name)


@contextlib.contextmanager
def locked(path):
    """Only one process is inside for a given `path`, a file made for this; the others wait.

    The lock is gone when its process is, however it ended. Raises BadInput where it cannot write.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise BadInput(
            f"cannot write in {path.parent} ({error.strerror}); choose another --data-root"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def append_row(path, row):
    """Add an object to a file of JSON lines, and see it onto the disk; read_log reads it."""
    with open(path, "a") as f:
        # A kill may have torn the line before this one: start on a new line.
        f.write(("\n" if f.tell() else "") + json.dumps(row))
        f.flush()
        os.fsync(f.fileno())


def save_text(path, lines):
    """Write a text file of these lines."""
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def save_json(path, told):
    """Write a JSON file, with a line for each thing that it says."""
    save_text(path, [json.dumps(told, indent=1)])


def read_log(path):
    """The rows of a log.jsonl; a line torn by a kill, or damaged, is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
