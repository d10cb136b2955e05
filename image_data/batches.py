"""A prepared data set, and batches of it: uint8 on the disk, floats in [-1, 1] in a batch."""

from dataclasses import dataclass

import numpy as np
import torch


def spaced(n, most):
    """Numbers of at most `most` of n images, evenly spaced from the first to the last: int64."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(np.int64)


@dataclass(frozen=True)
class Dataset:
    """A prepared split. images uint8 (N,H,W,C), read from disk as needed; labels int64 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray  # zeros where there are no classes
    class_names: tuple[str, ...]  # () where there are no classes
    manifest: dict

    def __len__(self):
        return len(self.images)

    height = property(lambda self: self.images.shape[1])
    width = property(lambda self: self.images.shape[2])
    channels = property(lambda self: self.images.shape[3])
    shape = property(lambda self: (self.channels, self.height, self.width))
    num_classes = property(lambda self: len(self.class_names))
    key = property(lambda self: self.manifest["key"], doc="names the pixels and labels themselves")

    def batch(self, rows, flip=None):
        """x float32 (b,C,H,W) in [-1,1], channels_last in memory, and y int64 (b,), on the CPU.

        rows: int64 (b,), numbers of images. flip: bool (b,), which to mirror left to right.
        """
        x = self.floats(torch.from_numpy(self.stored(rows, flip)))
        return x, torch.from_numpy(self.labels[rows])

    def stored(self, rows, flip=None):
        """The images of a batch as they lie on the disk: an array uint8 (b,H,W,C)."""
        images = self.images[rows]  # a copy
        if flip is not None:
            images[flip] = images[flip, :, ::-1]
        return images

    @staticmethod
    def floats(images):
        """x of a batch, of what `stored` gives, on the device where that has been brought."""
        return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
