"""Everything that writes, on a tiny disk that is full or read-only: how each ends."""

from runtime import pictures, plots
from runtime.commandline import BadInput
from runtime.files import append_row, atomic_write, check_folder, locked, save_json
from runtime.folder import RunFolder
from runtime.processes import World

import ctypes
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from evaluation import image_sets
from evaluation.image_sets import Statistics
from evaluation.sides import scratch
from image_data import datasets

BIG, WEIGHTS = np.zeros(10**6), {"w": torch.zeros(10**6)}
IMAGES = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)


def fill(folder, left):
    """Leave so many bytes."""
    path = folder / "filler"
    path.unlink(missing_ok=True)
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, max(0, path.stat().st_size - left))


def atomic(path, write):
    with atomic_write(path) as temporary:
        write(temporary)


def trained(folder):
    run = RunFolder(folder, "toy", {"a": 1}, World())
    run.restore()
    for step in range(1, 4):
        run.log(step, text="x" * 5000)
        run.save(step, **WEIGHTS)


def mapped(folder):
    scratch(folder, (10**5, 10), np.float32)[:] = 1


def exclusive(folder):
    with locked(folder / "a.lock"):
        pass


def cases(folder):
    """{name: what writes into the folder}"""
    statistics = Statistics("a", np.zeros(300), np.zeros((300, 300)), n=3)
    plot = partial(plots.plot_lines, panels={"a": {"b": ([1, 2], [1, 2])}}, xlabel="x", title="t")
    return {
        "checkpoint": partial(atomic, folder / "a.pt", partial(torch.save, WEIGHTS)),
        "export": partial(atomic, folder / "a.safetensors", partial(save_file, WEIGHTS)),
        "features": partial(atomic, folder / "a.npy", lambda path: np.save(path, BIG)),
        "statistics": partial(image_sets.save_statistics, folder / "a.npz", statistics),
        "grid": partial(pictures.save_grid, IMAGES, folder / "a.png"),
        "film": partial(pictures.save_gif, [IMAGES, IMAGES], folder / "a.gif"),
        "samples": partial(pictures.save_samples, folder, IMAGES, None),
        "curves": partial(plot, folder / "b.png"),
        "json": partial(save_json, folder / "a.json", ["x" * 9000]),
        "row": partial(append_row, folder / "a.jsonl", {"a": "x" * 9000}),
        "run": partial(trained, folder / "run"),
        "folder": partial(check_folder, folder / "new"),
        "lock": partial(exclusive, folder),
        "map": partial(mapped, folder),
        "data": partial(datasets.load, folder.parent / "images", folder, workers=1),
    }


def mount(folder, flags=0):
    """A disk of 2 MB on a folder, for this process alone; OSError where that is not allowed."""
    libc, user = ctypes.CDLL(None, use_errno=True), os.getuid()
    namespaces = 0x20000 | (0x10000000 if user else 0)  # of mounts, and of users
    if libc.unshare(namespaces):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    private = 1 << 18 | 1 << 14
    if libc.mount(b"none", b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "mount")
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, b"size=2M"):
        raise OSError(ctypes.get_errno(), "mount")


def try_all(folder, kind, found):
    """Put [(case, kind of error, line)] into the queue `found`; None where nothing is mounted."""
    try:
        mount(folder)
        (folder / "run").mkdir()
        if kind == "closed":
            ctypes.CDLL(None).mount(b"none", os.fsencode(folder), None, 32 | 1, None)
    except OSError:
        found.put(None)
        return
    lefts = (0, 20_000) if kind == "full" else (0,)
    found.put([ends(*case, folder, left) for case in cases(folder).items() for left in lefts])


def ends(case, call, folder, left):
    if os.access(folder, os.W_OK):
        fill(folder, left)
    try:
        call()
    except BadInput as error:
        return f"{case}, {left}", "BadInput", str(error)
    except Exception as error:
        return f"{case}, {left}", type(error).__name__, str(error)
    return f"{case}, {left}", "", ""
