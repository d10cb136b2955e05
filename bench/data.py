"""Images a second: batches out of the memory map against a DataLoader that decodes JPEGs.

    python bench/data.py

Both give shuffled float32 batches (64,3,32,32) in [-1,1] with labels, of the same 5,000 images:
CIFAR-10 JPEGs from ../shared/data (or $DIFFUSION_SHARED) if they are there, else noise made here.
The two take turns, so that whatever else the machine does falls on both; medians are compared.
"""

import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the module of its name

import runtime  # noqa: E402, F401  sets how threads wait, before torch loads them

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from image_data import batches, datasets  # noqa: E402

COUNT, BATCH, TURNS, WORKERS = 5000, 64, 7, 2
STEPS = COUNT // BATCH  # an epoch, but for what does not fill a batch


class JpegFolder(torch.utils.data.Dataset):
    """Class folders of JPEGs, decoded with Pillow when they are asked for."""

    def __init__(self, folder):
        self.paths = sorted(Path(folder).glob("*/*.jpg"))
        self.names = sorted({path.parent.name for path in self.paths})

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            pixels = np.array(image.convert("RGB"))
        x = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1)
        return x, self.names.index(self.paths[i].parent.name)


def write_jpegs(folder):
    """COUNT 32x32 JPEGs in ten class folders; returns what they are."""
    shared = Path(os.environ.get("DIFFUSION_SHARED", REPO.parent / "shared" / "data")).expanduser()
    path = shared / "cifar10" / "cifar10-jpeg.zip"
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if "train/" in n and n.endswith(".jpg")]
            names = names[:: len(names) // COUNT][:COUNT]
            for i, name in enumerate(names):
                target = folder / name.split("/")[-2] / f"{i}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
        return "CIFAR-10 JPEGs"
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        target = folder / str(i % 10) / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(target)
    return "noise as JPEGs"


def rate(batches):
    """Images a second over an iterable of (x, y)."""
    seen, started = 0, time.perf_counter()
    for x, _ in batches:
        seen += len(x)
    return seen / (time.perf_counter() - started)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "jpegs"
        what = write_jpegs(folder)
        ds = datasets.load(folder, temporary)
        # Workers stay between epochs, so that starting them is not what is measured.
        loader = torch.utils.data.DataLoader(
            JpegFolder(folder),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
            persistent_workers=True,
        )
        check(loader.dataset, ds)
        ours, theirs = [], []
        rate(loader)
        for turn in tqdm(range(TURNS), "turns", leave=False):
            theirs.append(rate(loader))
            steps = range(turn * STEPS, (turn + 1) * STEPS)
            ours.append(rate(batches.batch(ds, batches.indices(COUNT, BATCH, 0, s)) for s in steps))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"{COUNT} {what} 32x32, batches of {BATCH}, median of {TURNS} turns of an epoch")
    print(f"{'':36}{'images/s':>12}{'ratio':>8}")
    print(f"{f'DataLoader, Pillow, {WORKERS} workers':36}{theirs:12,.0f}{1:8.1f}")
    print(f"{'data.indices + data.batch':36}{ours:12,.0f}{ours / theirs:8.1f}")


def check(folder, ds):
    """Both are the same images and labels, or no speed is worth telling."""
    for i in range(0, COUNT, COUNT // 10):
        (x, y), (mine, label) = folder[i], batches.batch(ds, np.array([i]))
        assert torch.equal(x, mine[0]) and y == label[0]


if __name__ == "__main__":
    main()
