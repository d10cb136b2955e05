"""Noise and the image that a flow makes of it, kept: reflow trains on such pairs.

The noise of pair i is that of seed i, and its label is a function of i: so only the image is kept.

    pairs = kept_pairs(folder, world, n, make, ...)      drawn once; the next time they are found
    run = Run(cfg, world, pairs, net=net, ...)           a data set like any other
    x0, y = run.images(part)                             (b,C,h,w), (b,)
    eps = gaussian(x0.shape, seeds, -1, device)          seeds: part.rows
"""

from runtime.files import atomic_write, read_json
from runtime.locks import alone
from runtime.nodes import Disks
from runtime.sums import mapped

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_data.latents import make_room

TOGETHER = 1024  # pairs that are kept at a time: a killed run loses at most so many


@dataclass(frozen=True)
class Pairs:
    """What a flow makes of the noise of seeds 0..N-1, in the place of a data set.

    images  memory map float32 (N,C,h,w): in [-1, 1] but not clipped, or latents
    shape   (C,H,W) of the images; key names what they were made of
    """

    name: str
    images: np.ndarray
    labels: np.ndarray  # zeros where there are no classes
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    key: str

    def __len__(self):
        return len(self.images)

    num_classes = property(lambda self: len(self.class_names))

    def stored(self, rows, flip=None):
        """What of a batch comes from the host: float32 (b,C,h,w)."""
        return np.array(self.images[rows])

    @staticmethod
    def floats(stored):
        """The images of a batch, of what `stored` gives."""
        return stored


def kept_pairs(folder, world, shape, make, *, made_of):
    """A memory map float32 of `shape` (N,C,h,w), the same on every rank, kept in `folder`.

    make     function of the numbers start, stop -> float32 (stop-start,C,h,w), on every rank
    made_of  {name: plain value} of all that decides them; pairs of something else are drawn anew

    Where a run was killed the next one goes on. BadInput for a disk without room for them.
    """
    folder = Path(folder)
    path, manifest = folder / "pairs.npy", folder / "manifest.json"
    with alone(folder, world):
        disks = Disks(folder, world)
        done = _kept(path, manifest, made_of, shape)
        done = min(world.gather(done))  # of all machines
        if not done and disks.writes:
            make_room(folder, manifest, path, shape, "pairs")
        world.barrier()
        while done < shape[0]:
            stop = min(done + TOGETHER, shape[0])
            found = make(done, stop)
            if disks.writes:
                pairs = np.load(path, mmap_mode="r+")
                pairs[done:stop] = found.numpy()
                pairs.flush()
                with atomic_write(manifest) as temporary:
                    temporary.write_text(json.dumps({"made_of": made_of, "done": stop}))
            done = stop
        world.barrier()
    return np.load(path, mmap_mode="r")


def key_of(made_of):
    """A word that names such pairs."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


def _kept(path, manifest, made_of, shape):
    """How many pairs of just this lie there."""
    if not (path.exists() and manifest.exists()):
        return 0
    kept = read_json(manifest)
    done = kept.get("done")
    if kept.get("made_of") != json.loads(json.dumps(made_of)) or type(done) is not int:
        return 0
    try:
        found = mapped(path)
    except ValueError:
        return 0
    return done if found.shape == shape and found.dtype == np.float32 else 0
