"""Published implementations of the metrics and of the Inception network, to compare with."""

import importlib.util

import pytest

from tests.cases import reference_networks
from tests.cases.reference_networks import pytorch_fid_network, random_weights

__all__ = ["import_references", "pytorch_fid_network", "random_weights"]

PACKAGES = ("torchvision", "pytorch_fid", "torch_fidelity", "torchmetrics", "cleanfid")


def import_references():
    """After this, each of PACKAGES can be imported.

    Skips the test (or the file, if called at its top) where one of them is not installed.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
    reference_networks.import_references()
