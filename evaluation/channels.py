"""Gray images beside colour ones: both with as many channels, and nothing copied.

Gray pixels become three equal channels, which to Inception are the same. Three channels that are
equal in every pixel become one, for a network that knows gray images alone.
"""

from runtime.commandline import BadInput

from dataclasses import replace

import numpy as np

from evaluation.image_sets import Images

AT_ONCE = 2**24  # bytes of images that are looked at together


class InChannels:
    """Images (N, H, W, C) as (N, H, W, channels), made only where they are looked at."""

    def __init__(self, images, channels):
        self.images, self.channels, self.dtype = images, channels, images.dtype
        self.shape = (*images.shape[:3], channels)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, which):
        some = np.asarray(self.images[which])[..., :1]
        return some if self.channels == 1 else some.repeat(self.channels, axis=-1)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def parts(images):
    """Arrays of a few images (n, H, W, C) each, in turn."""
    rows = max(1, AT_ONCE // int(np.prod(images.shape[1:])))
    for start in range(0, len(images), rows):
        yield np.asarray(images[start : start + rows])


def coloured(images):
    """The numbers of those of images (N, H, W, 3) whose channels differ in any pixel."""
    found = [(some != some[..., :1]).any((1, 2, 3)) for some in parts(images)]
    return np.flatnonzero(np.concatenate(found))


def only_zero_and_one(images):
    """Whether no pixel of images (N, H, W, C) is above 1: all of them are as good as black."""
    return all(some.max() <= 1 for some in parts(images))


def in_channels(side, channels):
    """Images with 1 or 3 channels, which `told` says; what is no Images, and None, as it is.

    Raises BadInput for colours that one channel cannot hold, and for a file of other channels.
    """
    if not isinstance(side, Images) or (have := side.images.shape[3]) == channels:
        return side
    if {have, channels} != {1, 3}:
        raise BadInput(f"{side.name} has {have} channels, expected {channels}")
    told = "" if side.told else f"{side.name} is gray, "
    told += "repeated in three channels"
    if channels == 1:
        colours, n = coloured(side.images), len(side.images)
        if len(colours):
            found = f"{len(colours)} of its {n} images have colours, number {colours[0]} first"
            raise BadInput(f"{side.name}: {found}; expected gray ones, or --features inception")
        told = f"{side.name} is gray in three equal channels, taken as one"
    told = ", ".join(filter(None, [side.told, told]))
    return replace(side, images=InChannels(side.images, channels), told=told)


def channels_of(extractor, sides):
    """How many channels the images of all sides get: the network's, or enough for all of them."""
    have = [side.images.shape[3] for side in sides if isinstance(side, Images)]
    return getattr(extractor, "channels", None) or max(have, default=1)
