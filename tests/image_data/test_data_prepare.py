"""Preparing happens once, whole or not at all, whatever ends it; a warm load reads little."""

from runtime.commandline import BadInput, entry

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from data_files import noise, write_image, write_mnist, write_tree

from image_data import datasets, prepare


def visible(folder):
    """Everything but lock files, which are empty and may stay."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.fixture
def many(tmp_path):
    """A folder of 300 images, more than one worker's share, and what is in it."""
    names = [f"{i % 3}/{i:03d}.png" for i in range(300)]
    return tmp_path / "many", write_tree(tmp_path / "many", names, side=4)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_does_not_matter(many, tmp_path, workers):
    folder, pixels = many
    ds = datasets.load(folder, tmp_path / "d", workers=workers)
    assert (np.asarray(ds.images) == np.stack([pixels[n] for n in sorted(pixels)])).all()
    assert ds.labels.tolist() == [0] * 100 + [1] * 100 + [2] * 100


def test_chunks_shrink_for_large_images(tmp_path, monkeypatch):
    write_tree(tmp_path / "set", [f"{i}.png" for i in range(9)], side=8)
    whole = datasets.load(tmp_path / "set", tmp_path / "a")
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2 * 8 * 8 * 3)  # two images
    parts = []
    real = prepare.decode.decode
    monkeypatch.setattr(prepare.decode, "decode", lambda *a: parts.append(a[1]) or real(*a))
    assert datasets.load(tmp_path / "set", tmp_path / "b").key == whole.key
    assert [len(p) for p in parts] == [2, 2, 2, 2, 1]


def test_manifest_tells_what_made_it(tmp_path):
    write_mnist(tmp_path / "mnist", train=30)
    ds = datasets.load("mnist", tmp_path, size=16, classes=["3", "5"])
    folder = tmp_path / os.path.basename(ds.manifest["folder"])
    manifest = json.loads((folder / "manifest.json").read_text())
    content = hashlib.sha256(ds.labels.tobytes() + np.asarray(ds.images).tobytes()).hexdigest()
    assert manifest["key"] == ds.key == content[:12]
    assert manifest["source"] == str(tmp_path / "mnist") and manifest["name"] == "mnist"
    assert manifest["class_names"] == ["3", "5"] and manifest["shape"] == [16, 16, 1]
    assert manifest["count"] == len(ds) and manifest["size"] == 16 and manifest["split"] == "train"
    assert "Lanczos" in manifest["protocol"] and "pillow" in manifest["made_with"]
    written = [".checked.json", "images.npy", "labels.npy", "manifest.json"]
    assert visible(folder) == written
    assert folder.stat().st_mode & 0o777 == (tmp_path / "mnist").stat().st_mode & 0o777


def test_a_second_load_only_maps(many, tmp_path, monkeypatch):
    folder, _ = many
    first = datasets.load(folder, tmp_path / "d")

    def never(*args):
        raise AssertionError("prepared again")

    monkeypatch.setattr(prepare, "prepare", never)
    again = datasets.load(str(folder), tmp_path / "d")
    assert isinstance(again.images, np.memmap) and not again.images.flags.writeable
    assert again.key == first.key and again.manifest == first.manifest


def test_a_warm_load_of_many_files_opens_none_of_them(tmp_path, monkeypatch):
    """20,000 files are looked at by name, size and time, in far less than decoding takes."""
    (tmp_path / "set" / "a").mkdir(parents=True)
    write_image(tmp_path / "set" / "a" / "0.png", noise((4, 4)))
    for i in range(1, 20_000):
        os.link(tmp_path / "set" / "a" / "0.png", tmp_path / "set" / "a" / f"{i}.png")
    rows = np.zeros((20_000, 4, 4, 1), np.uint8)
    monkeypatch.setattr(
        prepare.decode, "inspect", lambda c, items, t: [(4, 4, True, None, 1)] * len(items)
    )
    monkeypatch.setattr(prepare.decode, "decode", lambda c, items, *rest: rows[: len(items)])
    datasets.load(tmp_path / "set", tmp_path / "d", workers=1)
    monkeypatch.setattr(prepare, "prepare", None)
    started = time.process_time()
    assert len(datasets.load(tmp_path / "set", tmp_path / "d")) == 20_000
    assert time.process_time() - started < 1.0


def test_changed_files_are_prepared_anew_and_equal_ones_keep_their_key(many, tmp_path):
    folder, pixels = many
    first = datasets.load(folder, tmp_path / "d")
    os.utime(folder / "0" / "000.png", (1, 1))
    touched = datasets.load(folder, tmp_path / "d")
    assert touched.manifest["folder"] != first.manifest["folder"] and touched.key == first.key
    shutil.move(folder, tmp_path / "elsewhere" / "many")
    moved = datasets.load(tmp_path / "elsewhere" / "many", tmp_path / "e")
    assert moved.key == first.key
    write_image(tmp_path / "elsewhere" / "many" / "0" / "000.png", noise((4, 4, 3), 777))
    assert datasets.load(tmp_path / "elsewhere" / "many", tmp_path / "e").key != first.key


def test_two_folders_of_one_name_are_not_confused(tmp_path):
    for parent, seed in (("x", 1), ("y", 2)):
        path = tmp_path / parent / "set" / "1.bmp"  # same name, same size, same time
        write_image(path, noise((4, 4, 3), seed))
        os.utime(path, (1_000_000, 1_000_000))
    first, second = (datasets.load(tmp_path / p / "set", tmp_path / "d") for p in "xy")
    assert first.key != second.key


def test_a_zip_replaced_under_its_name_is_read_anew(tmp_path):
    for seed in (1, 2):
        write_image(tmp_path / "raw" / "1.png", noise((4, 4, 3), seed))
        shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "raw")
        os.utime(tmp_path / "set.zip", (seed, seed))
        ds = datasets.load(tmp_path / "set.zip", tmp_path / "d")
        assert (ds.images[0] == noise((4, 4, 3), seed)).all()


def test_a_zip_open_here_is_not_shared_with_workers(many, tmp_path):
    folder, pixels = many
    packed = shutil.make_archive(str(tmp_path / "many"), "zip", folder)
    datasets.load(packed, tmp_path / "d", workers=1)  # leaves the zip open in this process
    ds = datasets.load(packed, tmp_path / "e", workers=3)
    assert (np.asarray(ds.images) == np.stack([pixels[n] for n in sorted(pixels)])).all()


def test_a_broken_image_in_a_worker_is_named_in_one_line(many, tmp_path):
    folder, _ = many
    good = (folder / "2" / "299.png").read_bytes()
    (folder / "2" / "299.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(BadInput, match="299.png is not a readable image") as caught:
        datasets.load(folder, tmp_path / "d", workers=2, size=4)
    assert "\n" not in str(caught.value) and visible(tmp_path / "d") == []


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Nearly:
    free = 300 * 4 * 4 * 3 - 1


@pytest.mark.parametrize("where", ["before", "images", "labels", "fsync", "quota"])
def test_a_full_disk_leaves_nothing(many, tmp_path, monkeypatch, where):
    if where == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Nearly)
    elif where == "images":
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", no_space)
    elif where == "labels":
        monkeypatch.setattr(np, "save", no_space)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        monkeypatch.setattr(errno, "ENOSPC", -1)
        monkeypatch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(OSError(errno.EDQUOT, "")))
    with pytest.raises(BadInput, match=f"no space left in {tmp_path / 'd'} for many.*--data-root"):
        datasets.load(many[0], tmp_path / "d")
    assert visible(tmp_path / "d") == []
    monkeypatch.undo()
    assert len(datasets.load(many[0], tmp_path / "d")) == 300


def test_a_root_that_cannot_be_written(many, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(BadInput, match="cannot write in .*choose another --data-root"):
            datasets.load(many[0], root)


def test_leftovers_of_a_killed_preparation_go(many, tmp_path):
    made = os.path.basename(datasets.load(many[0], tmp_path / "d").manifest["folder"])
    shutil.rmtree(tmp_path / "d" / made)
    leftover = tmp_path / "d" / f".{made}.partial"
    leftover.mkdir()
    (leftover / "images.npy").write_bytes(b"half")
    (tmp_path / "d" / made).mkdir()  # and a folder that lacks its manifest
    assert len(datasets.load(many[0], tmp_path / "d")) == 300
    assert visible(tmp_path / "d") == [made]


READ = prepare.decode.decode


def _read_slowly(*args):
    print("working")
    time.sleep(0.5)
    return READ(*args)


def _slow_program(folder, root, out):
    """What a process of its own runs: load(), half a second a chunk, and a word when it begins."""
    os.setsid()  # a group of its own, as a terminal gives to a command
    sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
    prepare.decode.decode = _read_slowly
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    entry(lambda: datasets.load(folder, root, workers=2))


@pytest.fixture
def working(many, tmp_path):
    """(a process that is preparing `many` into tmp_path/d, the file it writes to)."""
    out = tmp_path / "out.txt"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_slow_program, args=(many[0], tmp_path / "d", out))
    process.start()
    try:
        until = time.monotonic() + 20
        while not out.exists() or "working" not in out.read_text():
            assert time.monotonic() < until and process.is_alive()
            time.sleep(0.01)
        yield process, out
    finally:
        process.kill()
        process.join()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]


def wait_until_gone(pids):
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}/status") and not zombie(pid) for pid in pids):
        assert time.monotonic() < until, "workers outlived their parent"
        time.sleep(0.02)


def zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "number, to_all, code", [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_interrupted_preparation_leaves_nothing(working, tmp_path, number, to_all, code):
    process, out = working
    workers = children(process.pid)
    assert len(workers) == 2
    (os.killpg if to_all else os.kill)(process.pid, number)  # Ctrl-C reaches workers, too
    process.join(20)
    assert process.exitcode == code and "Traceback" not in out.read_text(), out.read_text()
    assert visible(tmp_path / "d") == []
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_one_clear_line(working, tmp_path):
    process, out = working
    os.kill(children(process.pid)[0], signal.SIGKILL)
    process.join(20)
    assert process.exitcode == 2 and "Traceback" not in out.read_text()
    assert "error: a process that prepared many was killed" in out.read_text()
    assert visible(tmp_path / "d") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_after_sigkill_workers_end_and_the_next_load_succeeds(working, many, tmp_path):
    process, _ = working
    workers = children(process.pid)
    process.kill()
    process.join()
    wait_until_gone(workers)
    assert [name for name in visible(tmp_path / "d") if name.endswith(".partial")]
    ds = datasets.load(many[0], tmp_path / "d")
    assert visible(tmp_path / "d") == [os.path.basename(ds.manifest["folder"])]


def _load_and_tell(folder, root, barrier, queue):
    made = []
    real = prepare.prepare
    prepare.prepare = lambda *args: made.append(1) or time.sleep(0.2) or real(*args)
    barrier.wait()
    queue.put((datasets.load(folder, root, workers=1).key, len(made)))


def test_several_processes_at_once_prepare_once(many, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    arguments = (many[0], tmp_path / "d", barrier, queue)
    started = [context.Process(target=_load_and_tell, args=arguments) for _ in range(4)]
    for process in started:
        process.start()
    told = [queue.get(timeout=30) for _ in started]
    for process in started:
        process.join()
    assert len({key for key, _ in told}) == 1 and sum(made for _, made in told) == 1
