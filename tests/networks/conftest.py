"""Stable Diffusion's tiny files, of diffusers and of one file; and no line said before."""

from runtime import processes

import shutil

import pytest
import tiny_stable_diffusion as tiny
from safetensors.torch import load_file

from networks.published.stable_diffusion import write_tiny


@pytest.fixture(autouse=True)
def nothing_said():
    """Each test hears its lines, whatever was printed before it."""
    processes.SAID.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of diffusers' folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "sd")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(tiny.safetensors, its vocabulary) of write_tiny."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tensors(single):
    return load_file(single[0])
