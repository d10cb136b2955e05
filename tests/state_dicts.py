"""Weights compared."""

import torch


def same(found, expected):
    """Whether two state_dicts hold the same numbers, of the same types, by the same names."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    )
