"""Several machines without a disk that all see: who writes where, and files sent to the others.

A run is written by the first process alone; latents lie on every machine. Where the machines do see
one disk, or there is one machine, all of this is found out and nothing is sent.
"""

from runtime.files import check_folder

import contextlib
import hashlib
import os
import secrets
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

CHUNK = 1 << 26  # bytes that are sent, or hashed, at a time


class Disks:
    """Which ranks see the same disk at `folder`.

    of      for each rank the one that writes on its disk
    writes  whether that is this process
    many    whether there are several
    """

    def __init__(self, folder, world):
        self.world, self.of = world, [0] * world.size
        if world.nodes > 1:
            check_folder(folder)
            token = Path(folder, f".seen-{secrets.token_hex(8)}")
            if world.local_rank == 0:
                token.touch()
            try:
                names = world.gather(token.name if world.local_rank == 0 else "")
                seen = [r for r, name in enumerate(names) if name and Path(folder, name).exists()]
                self.of = world.gather(min(seen, default=world.rank))
            finally:
                token.unlink(missing_ok=True)
        self.writes, self.many = self.of[world.rank] == world.rank, len(set(self.of)) > 1

    def fill(self, array, parts, lacking=None):
        """Write rows of `array`, a memory map on every disk, on those that have them not.

        parts: (rank that has them on its disk, slice of rows), the same on all ranks. lacking: the
        writing ranks of disks that have them not; by default all but the one that has them.
        """
        if not self.many:
            return
        world, most = self.world, max(1, CHUNK // max(1, array[:1].nbytes))
        own = self.of[world.rank]
        for rank, rows in parts:
            takes = self.writes and self.of[rank] != own and (lacking is None or own in lacking)
            for start in range(rows.start, rows.stop, most):
                some = slice(start, min(start + most, rows.stop))
                sent = torch.from_numpy(np.array(array[some])).to(world.device)
                dist.broadcast(sent, rank)
                if takes:
                    array[some] = sent.cpu().numpy()
        if self.writes and isinstance(array, np.memmap):
            array.flush()
        world.barrier()


def fingerprint(array):
    """A hash of all of an array, or tensor, which is read as fast as the machine's cores hash."""
    most = max(1, CHUNK // max(1, array[:1].nbytes))

    def rows(start, end):
        some = array[start:end]
        return some.cpu().numpy() if isinstance(some, torch.Tensor) else np.ascontiguousarray(some)

    def hashed(start):
        return hashlib.sha256(rows(start, start + most).reshape(-1).view(np.uint8)).digest()

    whole = hashlib.sha256(f"{tuple(array.shape)} {rows(0, 0).dtype}".encode())
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for part in pool.map(hashed, range(0, len(array), most)):
            whole.update(part)
    return whole.hexdigest()[:12]


def agree_on_data(ds, world):
    """BadInput where machines hold different copies of a data set: its key may be the same.

    The first rank of each reads its copy. Latents have been compared when they were opened.
    """
    arrays = [ds.labels] if hasattr(ds, "moments") else [ds.images, ds.labels]
    mine = "-".join(map(fingerprint, arrays)) if world.local_rank == 0 else ""
    world.agree({"copy of the data": world.gather(mine)[world.rank - world.local_rank]})


@contextlib.contextmanager
def from_first(path, world):
    """A Path of what rank 0 has at `path`: that, or on a machine without it a copy for this long.

    Where rank 0 has no file, there is none at the Path that others get.
    """
    path = Path(path)
    if world.nodes == 1:
        yield path
        return
    host = world.rank - world.local_rank  # the first rank of this machine, which reads and copies
    found = world.gather(_identity(path) if world.rank == host else "")
    if all(other in ("", found[0]) for other in found):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(world.gather(str(Path(folder, path.name)))[host])
        if found[0]:
            takes = world.rank == host and found[host] != found[0]
            _send(path if world.rank == 0 else None, found[0][0], copy if takes else None, world)
        yield path if found[host] == found[0] else copy
        world.barrier()  # all have read the copy before it goes


def _identity(path):
    """(bytes, hash) of a file; None where there is none."""
    from runtime.download import file_hash

    try:
        return Path(path).stat().st_size, file_hash(path)
    except OSError:
        return None


def _send(path, size, copy, world):
    """The file `path` of rank 0, of `size` bytes, to ranks that have the path `copy` for it."""
    with contextlib.ExitStack() as files:
        source = files.enter_context(open(path, "rb")) if path else None
        target = files.enter_context(open(copy, "wb")) if copy else None
        for start in range(0, size, CHUNK):
            part = np.zeros(min(CHUNK, size - start), np.uint8)
            if source:
                source.readinto(part.data)
            sent = torch.from_numpy(part).to(world.device)
            dist.broadcast(sent, 0)
            if target:
                target.write(sent.cpu().numpy().data)
    world.barrier()
