"""Grids and GIFs of uint8 images."""

from runtime.files import atomic_write, remove

from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin


def to_uint8(x, seeds=None):
    """(B, C, H, W) floats in [-1, 1] -> (B, H, W, C) uint8 on the CPU.

    NotFinite for NaN or infinity, of one of the seeds (B,), or else of an image by its number.
    """
    from runtime.finite import check_finite

    named = (range(len(x)), "image number") if seeds is None else (seeds,)
    x = check_finite(x.float(), *named)
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu()


def tile(images, columns=None, pad=2):
    """(N, H, W, C) uint8 -> one picture (rows·(H+pad)+pad, columns·(W+pad)+pad, C)."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 32, np.uint8)
    for i, image in enumerate(images):
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        sheet[y : y + h, x : x + w] = image
    return sheet


def _picture(images, columns):
    sheet = tile(images, columns)
    return Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet)


def save_grid(images, path, columns=None):
    """Write (N, H, W, C) uint8 images, C 1 or 3, as one PNG."""
    with atomic_write(path) as temporary:
        _picture(images, columns).save(temporary)


def save_gif(frames, path, columns=None, seconds=4.0):
    """Write a list of (N, H, W, C) uint8 image sets as the frames of a GIF; the last one stays."""
    pictures = [_picture(images, columns) for images in frames]
    each = max(20, int(1000 * seconds / len(pictures)))
    with atomic_write(path) as temporary:
        durations = [each] * (len(pictures) - 1) + [2000]
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0
        )


def save_drawn(folder, images, labels, walk, seeds, world, steps, names=(), scale=1.0, w=0.0):
    """samples.png and .npz of images uint8 (N,H,W,C), which walk(seeds, labels) ended in.

    And reverse.gif and .png: x and x0_hat on the way of one image of each class, or of the first
    eight. steps: as films.marks_of() takes them; names: of the classes; scale: times the seeds'
    noise it is x_T; w: guidance. world: on rank 0 of it they are drawn and named.
    """
    from runtime import films

    folder = Path(folder)
    if world.is_main:
        *way, rows, note = films.way_of(
            walk, seeds, labels, world, images.shape[1:], steps, names, scale
        )
        labels, rows = (None, []) if w == -1 else (labels, rows)  # the network saw none
        save_samples(folder, images, labels, 10)  # nothing, if the way is not finite
        films.save_beside(folder / "reverse", *way, rows, note)
        print(f"samples: {folder / 'samples.png'}, how they came: {folder / 'reverse.gif'}")


def save_samples(folder, images, labels, columns=None):
    """samples.png (a grid of the first 100) and samples.npz (arr_0 images, arr_1 labels if any).

    What was written down of the samples that lay there before is removed first.
    """
    folder = Path(folder)
    remove(folder, "samples.json", "eval.json")
    save_grid(images[:100], folder / "samples.png", columns)
    arrays = [np.asarray(images)] + ([] if labels is None else [np.asarray(labels)])
    with atomic_write(folder / "samples.npz") as temporary:
        np.savez(temporary, *arrays)


def _numbered(folder):
    """0000.png, 0001.png, ... in a folder, as far as save_told has written them."""
    i = 0
    while (path := folder / f"{i:04d}.png").is_file():
        try:
            with Image.open(path) as picture:
                ours = bool(getattr(picture, "text", {}))
        except OSError:  # torn
            ours = True
        if ours:
            yield path.name
        i += 1


def save_told(folder, images, told, film=False):
    """samples.png and .npz, and each of images (N,H,W,C) uint8 as 0000.png, 0001.png, ...

    told: a {name: text} of each, which its file keeps. film: also interpolation.gif, of all images
    as frames, and .png. Such files of an earlier call are removed.
    """
    folder = Path(folder)
    stale = ("interpolation.gif", "interpolation.png", "attention.png")
    remove(folder, *_numbered(folder), *stale)
    save_samples(folder, images, None)
    for i, (image, texts) in enumerate(zip(np.asarray(images), told, strict=True)):
        info = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            info.add_itxt(name, text)
        with atomic_write(folder / f"{i:04d}.png") as temporary:
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(
                temporary, pnginfo=info
            )
    if film:
        save_gif([image[None] for image in images], folder / "interpolation.gif", 1)
        save_grid(images, folder / "interpolation.png", len(images))
