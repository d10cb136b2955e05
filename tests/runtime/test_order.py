"""The order of the data is a function of (seed, step), whatever the number of processes."""

from runtime.commandline import BadInput, check_processes
from runtime.run import _permutation, flips, indices

import math

import numpy as np
import pytest
from data_files import noise
from toy_run import Alone, make

from image_data.batches import Dataset


def sequence(n, batch, seed, steps):
    return np.concatenate([indices(n, batch, seed, step) for step in range(steps)])


@pytest.mark.parametrize("n, batch", [(64, 16), (50, 16), (7, 7), (5, 16), (1, 3), (10, 64)])
def test_every_epoch_sees_every_image_once(n, batch):
    steps = math.lcm(n, batch) // batch * 2  # whole epochs, at least two
    epochs = sequence(n, batch, 3, steps).reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    if n >= 7:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(n)).any()


def test_order_is_uniform():
    """Over many seeds, the first image is each of ten equally often (chi-squared, 9 dof)."""
    firsts = [int(indices(10, 1, seed, 0)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # p = 1e-4


def parts_of(n, step, folder, *, rank=0, size=1, accumulate=1):
    """What Run.parts gives process `rank` of `size`, of batches of 24 of n images, mirrored."""
    ds = Dataset("noise", noise((n, 4, 4, 1)), np.zeros(n, np.int64), (), {"key": "noise"})
    settings = {"batch_size": 24, "seed": 9, "flip": True, "accumulate": accumulate}
    run = make(folder, ds=ds, world=Alone(rank, size), resume="never", **settings)
    return list(run.parts(step))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("n", [5, 100])
def test_any_number_of_processes_shares_the_same_batches(n, size, tmp_path):
    for step in (0, 1, 8, 1000):
        whole, coins = indices(n, 24, 9, step), flips(24, 9, step)
        parts = [parts_of(n, step, tmp_path, rank=rank, size=size) for rank in range(size)]
        assert all(len(mine) == 1 and len(mine[0].rows) == 24 // size for mine in parts)
        assert (np.concatenate([mine[0].rows for mine in parts]) == whole).all()
        assert (np.concatenate([mine[0].flip for mine in parts]) == coins).all()
        assert (np.concatenate([np.arange(24)[mine[0].where] for mine in parts]) == range(24)).all()


@pytest.mark.parametrize(
    "size, accumulate, lengths",
    [(2, 1, [12]), (2, 5, [3, 3, 3, 3]), (2, 12, [1] * 12), (3, 3, [3, 3, 2])],
)
def test_the_share_of_a_process_comes_in_parts(size, accumulate, lengths, tmp_path):
    whole, coins = indices(100, 24, 9, 3), flips(24, 9, 3)
    for rank in range(size):
        parts = parts_of(100, 3, tmp_path, rank=rank, size=size, accumulate=accumulate)
        share = slice(24 // size * rank, 24 // size * (rank + 1))
        assert [len(part.rows) for part in parts] == lengths
        assert (np.concatenate([part.rows for part in parts]) == whole[share]).all()
        assert (np.concatenate([part.flip for part in parts]) == coins[share]).all()


def test_order_depends_on_seed_and_step_alone():
    forward = [indices(40, 16, 5, step) for step in range(20)]
    backward = [indices(40, 16, 5, step) for step in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
    forward[0][:] = -1  # a caller may write into what it got
    assert (indices(40, 16, 5, 0) == backward[0]).all()
    assert (sequence(40, 16, 6, 20) != np.concatenate(backward)).any()


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(BadInput, match="batch-size 10 cannot be divided among 4 processes"):
        check_processes(0, 10)
    check_processes(0, 12)


def test_flips_are_fair_coins_unlike_in_every_step():
    coins = np.stack([flips(64, 1, step) for step in range(500)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    assert len(np.unique(coins, axis=0)) == 500
    assert (flips(64, 1, 7) == coins[7]).all() and (flips(64, 2, 7) != coins[7]).any()


def test_a_step_of_a_large_set_is_cheap():
    """The permutation is drawn once an epoch, not once a step."""
    _permutation.cache_clear()
    for step in range(50):
        indices(1_300_000, 256, 0, step)
    assert _permutation.cache_info().misses == 1
