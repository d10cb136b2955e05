"""Noise and the image that a flow makes of it, kept: rectified_flow.py trains on such pairs.

The noise of pair i is that of seed i, and its label is a function of i: so only the image is kept.

    pairs = draw(...)                                    drawn once; the next time they are found
    run = Run(cfg, world, pairs, net=net, ...)           a data set like any other
    x0, y = run.images(part)                             (b,C,h,w), (b,)
    seeds = run.bring(part, Pairs.seeds)                 (b,), of the noise
"""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput, flag
from runtime.files import atomic_write, read_json
from runtime.locks import alone
from runtime.nodes import Disks
from runtime.rehearsal import Rehearsal
from runtime.sums import is_checked, mapped, mark_checked, sum_of

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_data.latents import make_room

FILES = ("pairs.npy", "manifest.json")
TOGETHER = 1024  # pairs that are kept at a time: a killed run loses at most so many


@dataclass(frozen=True)
class Pairs:
    """What a flow makes of the noise of seeds 0..N-1, in the place of a data set.

    images  float32 (N,C,h,w), on the disk: about in [-1, 1], not clipped; or latents
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

    @classmethod
    def of(cls, images, labels, names, shape, made_of):
        """images as kept_pairs() gives them, labels (N,) or None, names of the classes."""
        y = np.zeros(len(images), np.int64) if labels is None else labels.numpy()
        names = () if labels is None else tuple(names)
        return cls("pairs", images, y, names, tuple(shape), key_of(made_of))

    num_classes = property(lambda self: len(self.class_names))

    @staticmethod
    def seeds(part):
        """Of the noise of a run.Part, int64 (b,)."""
        return part.rows

    def stored(self, rows, flip=None):
        """What of a batch comes from the host: float32 (b,C,h,w)."""
        return np.array(self.images[rows])

    @staticmethod
    def floats(stored):
        """The images of a batch, of what `stored` gives."""
        return stored


def kept_pairs(folder, world, shape, make, *, made_of):
    """A memory map float32 of `shape` (N,C,h,w), the same on every rank, kept in `folder`.

    make     function of a slice of 0..N-1 -> float32 (b,C,h,w), on every rank
    made_of  {name: plain value} of all that decides them; they are in a folder of its own

    Where a run was killed the next one goes on. BadInput for a disk without room for them. With
    --dry-run none are drawn.
    """
    if isinstance(world, Rehearsal):
        return np.broadcast_to(np.zeros(1, np.float32), shape)
    folder = Path(folder, f"pairs-{key_of(made_of)}")
    path, manifest = folder / "pairs.npy", folder / "manifest.json"
    with alone(folder, world):
        disks = Disks(folder, world)
        done = _kept(path, manifest, made_of, shape) if disks.writes else shape[0]
        done = min(world.gather(done))  # of all machines
        if not done and disks.writes:
            make_room(folder, manifest, path, shape, "pairs")
        world.barrier()
        while done < shape[0]:
            stop = min(done + TOGETHER, shape[0])
            found = make(slice(done, stop))
            if disks.writes:
                pairs = np.load(path, mmap_mode="r+")
                pairs[done:stop] = found.numpy()
                pairs.flush()
                told = {"made_of": made_of, "done": stop}
                told |= {"sum": sum_of(made_of, pairs)} if stop == shape[0] else {}
                with atomic_write(manifest) as temporary:
                    temporary.write_text(json.dumps(told))
                if "sum" in told:
                    mark_checked(folder, FILES)
            done = stop
        world.barrier()
    return np.load(path, mmap_mode="r")


def check_kept(cfg, made_of):
    """BadInput where a run in cfg.out would go on, and it was on other pairs than of just this."""
    last = Path(cfg.out, "ckpt.pt")
    if cfg.resume != "auto" or not last.is_file():
        return
    try:
        key = load_checkpoint(last, facts=True)["config"].get("data_key")
    except BadInput:  # damaged: who goes on from it says so
        return
    if key in (None, key_of(made_of)):
        return
    known = read_json(Path(cfg.out, f"pairs-{key}", "manifest.json")).get("made_of", {})
    words = {name: f"{flag(name)} {value}" for name, value in known.items()}
    words["weights"] = "another --flow"
    differ = [words[name] for name in known if known[name] != made_of.get(name)]
    told = f" by {', '.join(differ)}: type that" if differ else ": name its --flow"
    raise BadInput(
        f"--out {cfg.out} holds a run on other pairs{told}, or another --out, or --resume never"
    )


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
    if found.shape != shape or found.dtype != np.float32:
        return 0
    if done < shape[0] or is_checked(path.parent, FILES):
        return done
    if kept.get("sum") != sum_of(made_of, found):
        print(f"pairs: drawn anew, those in {path.parent} are damaged: their sum is another")
        return 0
    mark_checked(path.parent, FILES)
    return done
