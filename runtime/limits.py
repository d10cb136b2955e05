"""How much memory one file may ask for: what it takes unpacked is known before it is unpacked.

A file of a kilobyte can say that it holds terabytes of zeros. Sizes that a file declares are
compared with a limit, and what has no declared size is read up to the limit. It is 2 GB, or as the
environment variable DIFFUSION_UNPACKED_GB says.
"""

from runtime.commandline import BadInput

import math
import os

VARIABLE, USUAL = "DIFFUSION_UNPACKED_GB", 2.0


def most_unpacked():
    """The limit in bytes; BadInput for a variable that is no positive number."""
    text = os.environ.get(VARIABLE) or str(USUAL)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise BadInput(f"{VARIABLE}={text}: expected gigabytes, such as {VARIABLE}=8")
    return limit * 1e9


def check_unpacked(what, size):
    """BadInput where `what`, a file or a part of one, takes more bytes than the limit."""
    if size > (limit := most_unpacked()):
        raise BadInput(
            f"{what} takes {size / 1e9:.3g} GB unpacked, more than the {limit / 1e9:g} GB that one "
            f"file may: if it is right, set {VARIABLE}={math.ceil(size / 1e9)}"
        )


def read_member(archive, name):
    """The bytes of a member of an open ZipFile; BadInput for a torn one, and for too many."""
    where = f"{archive.filename}/{name}"
    check_unpacked(where, archive.getinfo(name).file_size)
    try:
        return archive.read(name)
    except Exception as error:  # a torn zip raises nearly anything
        raise BadInput(f"{where} cannot be read ({error}); pack it anew") from None


def read_whole(stream, what):
    """All bytes of a stream that is unpacked while it is read; BadInput beyond the limit."""
    parts, size = [], 0
    while part := stream.read(1 << 20):
        size += len(part)
        check_unpacked(f"{what} (at least)", size)
        parts.append(part)
    return b"".join(parts)
