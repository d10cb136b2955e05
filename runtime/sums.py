"""Files that are looked at to their last byte once, and not again before they change.

A disk may flip a bit of what is kept for months. To read gigabytes at each start would take longer
than the start, so a note beside files that were found whole says how they were: size and time.
"""

from runtime.files import Unwritable, atomic_write, read_json

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

NOTE = ".checked.json"


def sum_of(told, *arrays):
    """A SHA-256 of what JSON can say, and of the numbers of arrays, memory maps too."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for array in arrays:
        add(digest, array)
    return digest.hexdigest()


def add(digest, array):
    """Have a digest go on with the numbers of an array (N,...), a few megabytes at a time."""
    rows = max(1, (8 << 20) // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        digest.update(array[start : start + rows].tobytes())


def is_checked(folder, names):
    """Whether files of a folder are as they were at mark_checked."""
    known = read_json(Path(folder, NOTE))
    return known == _states(folder, names)


def mark_checked(folder, names):
    """Note that these files of a folder are whole; nothing where it may not be written to."""
    with contextlib.suppress(Unwritable), atomic_write(Path(folder, NOTE)) as path:
        path.write_text(json.dumps(_states(folder, names)))


def mapped(path):
    """The array in an .npy file as a memory map; ValueError where it is none.

    BadInput where the disk did not give it, which is no fault of what the file holds.
    """
    try:
        found = np.load(path, mmap_mode="r")
        if not isinstance(found, np.memmap) or found.offset + found.nbytes != path.stat().st_size:
            raise ValueError("it is not as long as its header says")
        return found
    except Exception as error:  # numpy reads a header as Python: that raises nearly anything
        if not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            from runtime.checkpoints import check_machine

            check_machine(error, path)
        told = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise ValueError(f"{path.name}: {told}") from None


def _states(folder, names):
    found = {name: Path(folder, name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
