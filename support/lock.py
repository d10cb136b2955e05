"""One process at a time: several ranks ask for the same file, one makes it."""

import fcntl
from contextlib import contextmanager
from pathlib import Path

from support.commandline import BadInput


@contextmanager
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
