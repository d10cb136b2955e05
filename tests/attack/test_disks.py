"""Disks that are full, read-only, or set nothing aside: one line each, and nobody is killed."""

from runtime import files
from runtime.commandline import BadInput
from runtime.files import Unwritable, atomic_write, check_writable, locked, reserve
from runtime.locks import Lock

import errno
import multiprocessing
import os
from pathlib import Path

import disk_cases
import numpy as np
import pytest
from data_files import write_images

from evaluation import sides
from evaluation.sides import keep_for_later, scratch

SPAWN = multiprocessing.get_context("forkserver")


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "closed"])
def test_everything_that_writes(tmp_path, kind):
    write_images(tmp_path / "images", 200)
    disk, queue = tmp_path / "disk", SPAWN.Queue()
    disk.mkdir()
    process = SPAWN.Process(target=disk_cases.try_all, args=(disk, kind, queue))
    process.start()
    ends = queue.get(timeout=100)
    process.join()
    if ends is None:
        pytest.skip("no disk can be mounted here")
    why = "no space left" if kind == "full" else "read-only file system"
    enough = {f"{case}, 20000" for case in ("json", "row", "lock", "folder", "curves")}
    enough |= {"map, 0"} if kind == "closed" else set()  # it lies elsewhere
    for case, error, line in ends:
        if case in enough:
            assert (error, line) == ("", ""), case
        else:
            assert error == "BadInput" and "\n" not in line, (case, error, line)
            assert why in line.lower() and str(disk) in line, (case, line)


def no_room(*given):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_that_did_not_fit_on_the_disk_is_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Lock, "_beat", no_room)
        with pytest.raises(Unwritable, match="No space left"), locked(tmp_path / ".lock"):
            pass
    lock = Lock(tmp_path / ".lock")
    assert lock.take() == ""  # nobody has it
    lock.release()


def nothing_set_aside(*given):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_room_is_there_before_a_map_is_written_to(tmp_path, monkeypatch):
    rows = scratch(tmp_path, (100, 10), np.float32)
    rows[:] = 1
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(Unwritable, match="MiB are needed in .*No space left.*another --data-root"):
        scratch(tmp_path, (100, 10), np.float32)


def test_zeros_where_a_file_system_sets_nothing_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", nothing_set_aside)
    with open(tmp_path / "a", "w+b") as file:
        reserve(file, 5 << 20, tmp_path)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 5 << 20
    assert scratch(tmp_path, (3, 4), np.float32).sum() == 0


def test_figures_are_made_where_nothing_can_be_kept(tmp_path, monkeypatch, capsys):
    def closed(**how):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    real = sides.tempfile.TemporaryFile
    monkeypatch.setattr(
        sides.tempfile, "TemporaryFile", lambda dir=None: closed() if dir else real()
    )
    scratch(tmp_path, (3, 4), np.float32)[:] = 1
    keep_for_later(tmp_path / "a.npy", lambda path: no_room())
    assert "not kept for the next time: cannot write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(tmp_path):
    """Only what a disk refuses is a line, and only of the file that is written."""
    for bug in (ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "no")):
        with pytest.raises(type(bug)), atomic_write(tmp_path / "a.txt"):
            raise bug
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/b.txt")
    assert not list(tmp_path.iterdir())


def test_a_name_that_a_file_system_does_not_take(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, why in (("x" * 250, "File name too long"), ("folder", "Is a directory")):
        with pytest.raises(Unwritable, match=why), atomic_write(tmp_path / name) as path:
            path.write_text("a")
    below = atomic_write(Path(__file__, "below", "a.txt"))
    with pytest.raises(BadInput, match="cannot make the folder"), below:
        pass


def test_a_folder_is_looked_at_before_long_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--out .*file/run: .*file: it is no folder"):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(files.os, "access", lambda *given: False)
    with pytest.raises(BadInput, match="it may not be written to; type another --out"):
        check_writable(tmp_path / "new")
