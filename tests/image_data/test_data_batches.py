"""The order of the data is a function of (seed, step); batches are the stored pixels."""

from runtime.commandline import BadInput

import math

import numpy as np
import pytest
import torch
from data_files import noise

from image_data import batches, datasets


def sequence(n, batch, seed, steps):
    return np.concatenate([batches.indices(n, batch, seed, step) for step in range(steps)])


@pytest.mark.parametrize("n, batch", [(64, 16), (50, 16), (7, 7), (5, 16), (1, 3), (10, 64)])
def test_every_epoch_sees_every_image_once(n, batch):
    steps = math.lcm(n, batch) // batch * 2  # whole epochs, at least two
    epochs = sequence(n, batch, 3, steps).reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    if n >= 7:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(n)).any()


def test_order_is_uniform():
    """Over many seeds, the first image is each of ten equally often (chi-squared, 9 dof)."""
    firsts = [int(batches.indices(10, 1, seed, 0)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # p = 1e-4


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("n", [5, 100])
def test_any_number_of_processes_shares_the_same_batches(n, world):
    for step in (0, 1, 8, 1000):
        whole = batches.indices(n, 24, 9, step)
        parts = [batches.indices(n, 24, 9, step, rank, world) for rank in range(world)]
        assert all(len(part) == 24 // world for part in parts)
        assert (np.concatenate(parts) == whole).all()
        coins = batches.flips(24, 9, step)
        parts = [batches.flips(24, 9, step, rank, world) for rank in range(world)]
        assert (np.concatenate(parts) == coins).all()


def test_order_depends_on_seed_and_step_alone():
    forward = [batches.indices(40, 16, 5, step) for step in range(20)]
    backward = [batches.indices(40, 16, 5, step) for step in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
    forward[0][:] = -1  # a caller may write into what it got
    assert (batches.indices(40, 16, 5, 0) == backward[0]).all()
    assert (sequence(40, 16, 6, 20) != np.concatenate(backward)).any()


def test_a_batch_that_cannot_be_shared_is_refused():
    for function in (
        lambda: batches.indices(100, 10, 0, 0, 0, 4),
        lambda: batches.flips(10, 0, 0, 0, 4),
    ):
        with pytest.raises(BadInput, match="batch of 10 cannot be divided among 4 processes"):
            function()


def test_flips_are_fair_coins_unlike_in_every_step():
    coins = np.stack([batches.flips(64, 1, step) for step in range(500)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    assert len(np.unique(coins, axis=0)) == 500
    assert (batches.flips(64, 1, 7) == coins[7]).all() and (
        batches.flips(64, 2, 7) != coins[7]
    ).any()


@pytest.fixture(params=[(6, 5, 3), (4, 7, 1)], ids=["color", "gray"])
def dataset(request):
    labels = np.arange(20, dtype=np.int64) % 3
    return datasets.Dataset("noise", noise((20, *request.param)), labels, ("a", "b", "c"), {})


def test_batch_is_the_pixels_in_minus_one_to_one(dataset):
    idx = np.array([19, 0, 7, 7, 3])
    x, y = batches.batch(dataset, idx)
    expected = dataset.images[idx].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    assert x.dtype == torch.float32 and x.shape == expected.shape
    assert np.abs(x.numpy() - expected).max() < 2e-7
    assert x.min() >= -1 and x.max() <= 1
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64 and y.tolist() == (idx % 3).tolist()


def test_white_and_black_are_exact():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    ds = datasets.Dataset("two", images, np.zeros(2, np.int64), (), {})
    assert batches.batch(ds, np.arange(2))[0].flatten().tolist() == [-1.0, 1.0]


def test_batch_mirrors_only_what_is_flipped(dataset):
    before = dataset.images.copy()
    idx, flip = np.array([4, 9, 2]), np.array([True, False, True])
    x, _ = batches.batch(dataset, idx, flip=flip)
    plain, _ = batches.batch(dataset, idx)
    assert torch.equal(x[flip], plain[flip].flip(3)) and torch.equal(x[1], plain[1])
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (dataset.images == before).all()


def test_a_step_of_a_large_set_is_cheap():
    """The permutation is drawn once an epoch, not once a step."""
    batches._permutation.cache_clear()
    for step in range(50):
        batches.indices(1_300_000, 256, 0, step)
    assert batches._permutation.cache_info().misses == 1
