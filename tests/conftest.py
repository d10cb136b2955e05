"""What several tests use: where the project and real data are, a tiny data set, a benchmark."""

import fnmatch
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from data_files import write_images
from launching import unsynced

from tests.cases import reference_networks

if importlib.util.find_spec("torchvision"):  # diffusers, too, imports it where it is installed
    reference_networks.import_references()


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(config, items):
    """Mark what tests/slow.txt names."""
    lines = (config.rootpath / "tests" / "slow.txt").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for item in items:
        if any(fnmatch.fnmatchcase(item.nodeid, pattern) for pattern in patterns):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def repo():
    """The root of the project."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data(repo):
    """Folder of real data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("DIFFUSION_SHARED", repo.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are fastest on one thread, and sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks():
    """Tests kill processes, not machines."""
    os.fsync = unsynced


@pytest.fixture
def bench(repo, monkeypatch):
    """The module bench/kernels.py; under its own name it would hide the package."""
    spec = importlib.util.spec_from_file_location("bench_kernels", repo / "bench" / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """['--data', a folder of 64 gray 16x16 PNGs in two class folders, '--data-root', ...]."""
    folder = write_images(tmp_path_factory.mktemp("toy") / "toy", 64)
    return ["--data", str(folder), "--data-root", str(tmp_path_factory.mktemp("prepared"))]


@pytest.fixture(scope="session")
def tiny():
    """{script: flags} of every chapter that trains: runs whose steps take milliseconds."""
    import tiny_runs  # it imports every chapter

    return {script: tiny_runs.tiny(script) for script in tiny_runs.TRAININGS}


@pytest.fixture(scope="session")
def tiny_flow(toy, tiny, tmp_path_factory):
    """The folder of a run of flow_matching.py, of four steps."""
    from launching import succeed

    out = tmp_path_factory.mktemp("flow") / "run"
    succeed("flow_matching", *tiny["flow_matching"], *toy, "--steps", 4, "--out", out)
    return out
