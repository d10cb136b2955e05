"""Which images a training step sees, and those images as a batch: functions of (seed, step)."""

from runtime.commandline import BadInput

import functools

import numpy as np
import torch


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(n, batch_size, seed, step, rank=0, world=1):
    """Which of n images this rank sees in training step `step`: int64 (batch_size / world,).

    The images of all epochs form one endless sequence, each epoch a permutation of its own; step s
    takes the batch_size images from s * batch_size on, and rank r the r-th part of those. So the
    order is a function of (seed, step), the same for any number of processes and after a resume.
    Raises BadInput if the processes cannot share the batch equally.
    """
    positions = step * batch_size + np.arange(batch_size)[_share(batch_size, rank, world)]
    epochs = positions // n
    chosen = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(n, seed, int(epoch))[positions[here] % n]
    return chosen


def flips(batch_size, seed, step, rank=0, world=1):
    """Which images of indices(...) to mirror left to right, half of them: bool (B / world,)."""
    coins = np.random.default_rng([seed, step, 2]).random(batch_size) < 0.5
    return coins[_share(batch_size, rank, world)]


def _share(batch_size, rank, world):
    if batch_size % world:
        raise BadInput(f"a batch of {batch_size} cannot be divided among {world} processes")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def batch(ds, idx, *, flip=None):
    """x float32 (B,C,H,W) in [-1,1], channels_last in memory, and y int64 (B,), for image numbers.

    flip: bool (B,), images to mirror left to right, or None.
    """
    images = ds.images[idx]  # (B,H,W,C)
    if flip is not None:
        images[flip] = images[flip, :, ::-1]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x, torch.from_numpy(ds.labels[idx])
