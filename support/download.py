"""Files from the internet: several mirrors, checksum, resume, progress, never half a file."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from support.commandline import BadInput, progress

TIMEOUT = 30  # seconds without an answer before the next mirror is tried


def file_hash(path, algorithm="sha256"):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch(name, mirrors, folder, md5=None):
    """folder/name, downloaded from the first of `mirrors` (addresses without the name) that works.

    What has arrived is kept in folder/name.part, and a later call asks for the rest only. With
    `md5` a file of another content is thrown away. The environment variable DIFFUSION_MIRROR, an
    address, replaces all mirrors. Raises BadInput, telling what to put where by hand.
    """
    path, part = Path(folder) / name, Path(folder) / f"{name}.part"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if "DIFFUSION_MIRROR" in os.environ:
        mirrors = [os.environ["DIFFUSION_MIRROR"]]
    failures = []
    for mirror in mirrors:
        address = mirror.rstrip("/") + "/" + name
        try:
            _append(address, part)
            if md5 and file_hash(part, "md5") != md5:
                part.unlink()  # perhaps the part of an earlier file: once more from the start
                _append(address, part)
            if md5 and (found := file_hash(part, "md5")) != md5:
                part.unlink()
                raise OSError(f"md5 {found}, expected {md5}")
            os.replace(part, path)
            return path
        except (OSError, urllib.error.URLError) as error:
            failures.append(f"{address}: {getattr(error, 'reason', None) or error}")
    raise BadInput(
        f"could not download {name} ({'; '.join(failures)}); get it by other means and put it "
        f"at {path}"
    )


def _append(address, part):
    """Download `address` onto the end of `part`; raises OSError if less arrives than promised."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the checksum will tell
            return
        raise
    with answer:
        if answer.status != 206:  # a server that cannot resume sends everything
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = progress(total, part.stem, initial=have, unit="B")
        with bar, open(part, "ab" if have else "wb") as f:
            while piece := answer.read(1 << 16):
                f.write(piece)
                bar.update(len(piece))
            f.flush()
            os.fsync(f.fileno())
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
