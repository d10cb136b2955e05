"""Prepare a data set and draw a preview of it.

    python -m image_data cifar10 --size 64        leaves preview.png beside the prepared images

Names: glyphs (drawn here, needs no file), mnist, fashion_mnist, cifar10, afhq, imagenet100, or a
folder or zip of images.
"""

from runtime.commandline import entry, parse
from runtime.pictures import save_grid

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_data.datasets import load


@dataclass
class Config:
    """Which data set to prepare and look at."""

    data: str = "glyphs"  # a name, or a folder or zip of images
    config: str = ""  # YAML file of these settings
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    split: str = "train"  # train or test
    size: int = 0  # shorter side resized to this, centre cropped; 0 keeps the size
    classes: str = ""  # comma-separated classes to keep


def main():
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data", *arguments]
    cfg = parse(Config, __doc__, arguments)
    ds = load(cfg.data, cfg.data_root, split=cfg.split, size=cfg.size or None, classes=cfg.classes)
    shown = np.linspace(0, len(ds) - 1, min(100, len(ds))).astype(int)
    preview = Path(ds.manifest["folder"]) / "preview.png"
    save_grid(ds.images[shown], preview, columns=10)
    counts = np.bincount(ds.labels, minlength=max(1, ds.num_classes))
    print(f"{ds.name} {cfg.split}: {len(ds)} images {ds.height}x{ds.width}x{ds.channels}")
    for i, name in enumerate(ds.class_names[:20]):
        print(f"  {i:3d} {name}: {counts[i]}")
    print(f"key {ds.key}, {preview}")


if __name__ == "__main__":
    entry(main)
