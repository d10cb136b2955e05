"""Two machines, each with a folder of its own: `rank_disks FOLDER`, FOLDER/RANK being its disk.

Each encodes a data set, again after the latents of rank 1 are gone or one number of them is
another, and reads a file that rank 0 has alone, one that begins differently, and one that it has
not; a pixel of its copy of the data is another. What it saw goes to FOLDER/RANK.json.
"""

from runtime.commandline import BadInput
from runtime.nodes import Disks, agree_on_data
from runtime.processes import launch

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from data_files import noise

from image_data.batches import Dataset
from image_data.latents import cache_latents

IMAGES = Dataset("noise", noise((200, 4, 4, 1)), np.zeros(200, np.int64), ("a",), {"key": "these"})
SEEN = []  # how many images were encoded


def encode(x):
    SEEN.append(len(x))
    z = torch.nn.functional.avg_pool2d(x, 2)
    return z, z - 9


def see(cfg, world):
    disk = Path(sys.argv[1], str(world.rank))
    disks, common = Disks(disk, world), Disks(disk.parent, world)
    saw = {"of": disks.of, "writes": disks.writes, "common": common.of, "nodes": world.nodes}

    def latents():
        SEEN.clear()
        made = {"made_of": {"autoencoder": "toy"}, "flip": True, "batch": 4}
        found = cache_latents(
            disk / "latents", world, IMAGES, encode, z_channels=1, factor=2, **made
        )
        return [sum(SEEN), found.scale, float(np.abs(found.moments).sum())]

    saw["first"], saw["again"] = latents(), latents()
    path = disk / "latents" / "moments.npy"
    if world.rank == 1:
        (path.parent / "manifest.json").unlink()
    saw["gone"] = latents()
    if world.rank == 1:
        np.load(path, mmap_mode="r+")[37, 1, 0, 1] += 1  # one number of one image
    saw["changed"] = latents()
    (disk / "other").write_bytes(bytes([world.rank]) + bytes(2 << 20))
    with world.from_first(disk / "other") as path:
        saw["other"] = path.read_bytes()[0]
    (disk / "other").unlink()
    copy = replace(IMAGES, images=IMAGES.images.copy())
    copy.images[65, 2, 1, 0] ^= world.rank
    try:
        agree_on_data(copy, world)
    except BadInput as error:
        saw["copy"] = str(error)
    if world.rank == 0:
        (disk / "ckpt.pt").write_bytes(bytes(range(256)) * 1000)
    else:
        (disk / "none").write_text("only here")
    with world.from_first(disk / "ckpt.pt") as path:
        saw["file"] = [path.parent == disk, path.read_bytes() == bytes(range(256)) * 1000]
    with world.from_first(disk / "none") as path:
        saw["none"] = path.exists()
    saw["left"] = sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file())
    (disk.parent / f"{world.rank}.json").write_text(json.dumps(saw))


def main():
    launch(see, SimpleNamespace(gpus=0, out=sys.argv[1]))
