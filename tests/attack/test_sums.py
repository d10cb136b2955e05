"""Bits that flip in what is prepared and kept: it is made again with one line."""

from runtime import sums
from runtime.commandline import BadInput
from runtime.processes import SAID, World

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from data_files import write_images
from toy_run import IMAGES

from image_data import datasets, latents


@pytest.fixture
def prepared(tmp_path):
    """(a function that loads a set, the Dataset, its folder)."""
    images = write_images(tmp_path / "images", 20)

    def load():
        SAID.clear()
        return datasets.load(images, tmp_path / "d", workers=1)

    return load, load(), Path(load().manifest["folder"])


def flip(path, place=-5):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def edit(path, drop=(), **changes):
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in drop}))


EDITS = [{"class_names": ["stripes", "bars"]}, {"told": 5}, {"range": [1]}, {"pages": {}}]
EDITS += [{"class_names": [None, {}]}, {"key": "../../../x"}, {"key": "0" * 12}, {"shape": []}]
EDITS += [{"count": 0}, {"note": 1}, {"name": "other"}, {"shape": [8, 8, 3.0]}]


def test_prepared_sets_that_are_not_as_they_were_written(prepared, capsys):
    load, whole, folder = prepared
    damages = [lambda change=change: edit(folder / "manifest.json", **change) for change in EDITS]
    damages += [lambda: flip(folder / "images.npy"), lambda: flip(folder / "labels.npy", -8)]
    for i, damage in enumerate(damages):
        damage()
        capsys.readouterr()
        found = load()
        assert f"data in {folder} are damaged, and made again" in capsys.readouterr().out, i
        assert (found.images == whole.images).all() and found.class_names == whole.class_names
        assert (found.labels == whole.labels).all() and found.key == whole.key


@pytest.mark.parametrize("images", [np.zeros((0, 8, 8, 1)), np.zeros(6), np.zeros((6, 8, 8, 2))])
def test_sets_of_no_images(prepared, capsys, images):
    """The manifest says so too."""
    load, whole, folder = prepared
    kept = np.array(whole.images)
    np.save(folder / "images.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", np.zeros(len(images), np.int64))
    shape = {"count": len(images), "shape": list(images.shape[1:])}
    edit(folder / "manifest.json", ["sum"], **shape)
    assert (load().images == kept).all()
    assert "are damaged, and made again" in capsys.readouterr().out


def test_a_set_is_looked_at_once_for_each_state(prepared, monkeypatch, capsys):
    load, whole, folder = prepared
    looked = []
    monkeypatch.setattr("image_data.prepare.add", lambda *of: looked.append(1) or sums.add(*of))
    load()
    assert not looked  # it was noted when it was prepared
    (folder / sums.NOTE).unlink()
    edit(folder / "manifest.json", ["sum"])  # as an earlier version wrote it
    assert load().key == whole.key and load().key == whole.key and len(looked) == 1
    (folder / sums.NOTE).write_text("[")
    assert load().key == whole.key and len(looked) == 2
    (folder / sums.NOTE).unlink()
    (folder / sums.NOTE).mkdir()  # nothing can be noted
    assert load().key == whole.key and load().key == whole.key and len(looked) == 4
    assert "damaged" not in capsys.readouterr().out


def cache(folder):
    def encode(x):
        return F.avg_pool2d(x, 2), F.avg_pool2d(x, 2) - 5

    how = {"z_channels": 1, "factor": 2, "made_of": {"a": 1}, "flip": False}
    return latents.cache_latents(folder, World(), IMAGES, encode, **how)


def test_latents_that_are_not_as_they_were_written(tmp_path, capsys):
    whole = cache(tmp_path)
    kept, manifest = np.array(whole.moments), tmp_path / "manifest.json"
    for damage in (
        lambda: flip(tmp_path / "moments.npy"),
        lambda: edit(manifest, scale=1000 * whole.scale),
        lambda: edit(manifest, sum="0"),
        lambda: edit(manifest, sum=3),
    ):
        damage()
        capsys.readouterr()
        found = cache(tmp_path)
        told = f"latents: made anew, those in {tmp_path} are damaged"
        assert told in capsys.readouterr().out
        assert (found.moments == kept).all() and found.scale == whole.scale


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_what_a_disk_does_not_give_is_not_made_again(prepared, tmp_path, monkeypatch, number):
    load, _, _ = prepared
    cache(tmp_path / "latents")
    before = (tmp_path / "latents" / "moments.npy").read_bytes()

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "load", fail)
    for read in (load, lambda: cache(tmp_path / "latents")):
        with pytest.raises(BadInput, match="npy could not be read .*; it may be whole"):
            read()
    assert (tmp_path / "latents" / "moments.npy").read_bytes() == before


def test_latents_are_looked_at_once_for_each_state(tmp_path, monkeypatch, capsys):
    whole, looked = cache(tmp_path), []
    monkeypatch.setattr(latents, "sum_of", lambda *of: looked.append(1) or sums.sum_of(*of))
    cache(tmp_path)
    assert not looked
    edit(tmp_path / "manifest.json", ["sum"])  # as an earlier version wrote it
    capsys.readouterr()
    assert cache(tmp_path).scale == cache(tmp_path).scale == whole.scale and len(looked) == 1
    assert not capsys.readouterr().out
