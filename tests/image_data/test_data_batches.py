"""Batches are the stored pixels, in [-1, 1], and some of them mirrored."""

import numpy as np
import pytest
import torch
from data_files import noise

from image_data.batches import Dataset


@pytest.fixture(params=[(6, 5, 3), (4, 7, 1)], ids=["color", "gray"])
def dataset(request):
    labels = np.arange(20, dtype=np.int64) % 3
    return Dataset("noise", noise((20, *request.param)), labels, ("a", "b", "c"), {})


def test_batch_is_the_pixels_in_minus_one_to_one(dataset):
    idx = np.array([19, 0, 7, 7, 3])
    x, y = dataset.batch(idx)
    expected = dataset.images[idx].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    assert x.dtype == torch.float32 and x.shape == expected.shape
    assert np.abs(x.numpy() - expected).max() < 2e-7
    assert x.min() >= -1 and x.max() <= 1
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64 and y.tolist() == (idx % 3).tolist()


def test_white_and_black_are_exact():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    ds = Dataset("two", images, np.zeros(2, np.int64), (), {})
    assert ds.batch(np.arange(2))[0].flatten().tolist() == [-1.0, 1.0]


def test_batch_mirrors_only_what_is_flipped(dataset):
    before = dataset.images.copy()
    idx, flip = np.array([4, 9, 2]), np.array([True, False, True])
    x, _ = dataset.batch(idx, flip)
    plain, _ = dataset.batch(idx)
    assert torch.equal(x[flip], plain[flip].flip(3)) and torch.equal(x[1], plain[1])
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (dataset.images == before).all()
