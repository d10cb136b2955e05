"""Bits that flip on a disk: no checkpoint, snapshot or kept network is read with other numbers."""

from runtime.checkpoints import DamagedCheckpoint, load_checkpoint
from runtime.commandline import BadInput
from runtime.folder import RunFolder
from runtime.processes import World

import errno
import os
import zipfile

import numpy as np
import pytest
import torch
from data_files import write_mnist
from run_folders import assert_same

from evaluation.classifier import classifier_of
from networks.autoencoders import own_checkpoint
from networks.published.files import read_weights

STATE = {
    "script": "toy",
    "config": {"model_channels": 1, "ema": [0.9]},
    "step": 2,
    "model": {f"layer.{i}": torch.randn(40, 10) for i in range(20)},
}


def flip(path, place, bit):
    """One bit of a file, at byte `place`."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("mapped", [False, True])
def test_every_flip_is_noticed_or_changes_nothing(tmp_path, mapped):
    """torch.load looks at no sums: 189 of 200 flips were loaded."""
    path, rng = tmp_path / "ckpt.pt", np.random.default_rng(mapped)
    torch.save(STATE, path)
    whole, noticed = path.read_bytes(), 0
    for place in rng.integers(len(whole), size=200):
        path.write_bytes(whole)
        flip(path, int(place), int(rng.integers(8)))
        try:
            found = load_checkpoint(path, "toy", mapped=mapped)
        except DamagedCheckpoint as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
        else:
            assert_same(dict(found), STATE)  # in what fills the file up between the tensors
    assert noticed > 150


def places(path, tensor):
    """The bytes of a tensor of STATE in the file."""
    return path.read_bytes().index(tensor.numpy().tobytes())


def test_a_look_at_what_is_no_tensor_checks_that_alone(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(STATE, path)
    flip(path, places(path, STATE["model"]["layer.7"]), 3)
    assert load_checkpoint(path, facts=True)["step"] == 2
    with pytest.raises(DamagedCheckpoint, match="ckpt.pt is damaged: Bad CRC-32 for file"):
        load_checkpoint(path)
    with pytest.raises(DamagedCheckpoint, match="ckpt.pt is damaged"):
        own_checkpoint(path)
    torch.save(STATE, path)
    flip(path, path.read_bytes().index(b"model_channels"), 0)
    with pytest.raises(DamagedCheckpoint, match="data.pkl"):
        load_checkpoint(path, facts=True)


def test_a_run_goes_on_from_the_checkpoint_before_the_flipped_one(tmp_path, capsys):
    def run():
        return RunFolder(tmp_path, "toy", {"model_channels": 1}, World())

    first = run()
    assert first.restore() is None
    for step in (1, 2):
        first.save(step, weights=torch.full((1000,), float(step)))
    path = tmp_path / "ckpt.pt"
    flip(path, places(path, torch.full((1000,), 2.0)) + 5, 1)
    assert run().restore()["step"] == 1
    told = capsys.readouterr().err
    assert "ckpt.pt is damaged" in told and "going on from" in told


def test_the_kept_classifier(tmp_path, capsys):
    """A flipped bit moved a distance from 62.52 to 61.83 under the same printed hash."""
    write_mnist(tmp_path / "mnist", train=64, test=16)
    right = classifier_of("mnist", tmp_path, steps=2)[0]
    (kept,) = tmp_path.glob("classifier-*.pt")
    flip(kept, places(kept, right.net.head.weight.detach()) + 7, 2)
    capsys.readouterr()
    again = classifier_of("mnist", tmp_path, steps=2)[0]
    assert "training it again" in capsys.readouterr().err
    assert again.feature_hash == right.feature_hash
    assert torch.equal(again.net.head.weight, right.net.head.weight)
    saved = torch.load(kept, weights_only=True)  # its sums are right, its weights are others
    saved["net"]["head.bias"] += 1
    torch.save(saved, kept)
    assert torch.equal(
        classifier_of("mnist", tmp_path, steps=2)[0].net.head.bias, right.net.head.bias
    )
    assert "its weights have the hash" in capsys.readouterr().err


def test_one_number_that_fills_gigabytes(tmp_path):
    state = STATE | {"model": {"weight": torch.zeros(1).expand(10**6, 10**5)}}
    torch.save(state, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 5000
    for how in ({}, {"mapped": True}, {"facts": True}):
        with pytest.raises(BadInput, match=r"a.pt holds tensors of 400 GB in a file of less"):
            load_checkpoint(tmp_path / "a.pt", **how)


def test_published_weights(tmp_path):
    """Others' files, too: what is read is what was written, and no more than the file holds."""
    path = tmp_path / "model.pt"
    torch.save(STATE["model"], path)
    assert_same(dict(read_weights(path)), STATE["model"])
    flip(path, places(path, STATE["model"]["layer.3"]) + 2, 6)
    with pytest.raises(BadInput, match="model.pt is damaged: Bad CRC-32"):
        read_weights(path)
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**5)}, path)
    with pytest.raises(BadInput, match="model.pt holds tensors of 400 GB"):
        read_weights(path)


@pytest.mark.parametrize("how", [{}, {"mapped": True}])
@pytest.mark.parametrize("where", ["checkpoints.torch.load", "checkpoints.zipfile.ZipFile.open"])
@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (MemoryError(), "memory has ended"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory has ended"),
    ],
)
def test_a_machine_that_fails_is_no_damage(error, told, where, how, tmp_path, monkeypatch):
    """Else a run would go back to the checkpoint before, and write over a whole one."""

    def fail(*given, **named):
        raise error

    torch.save(STATE, tmp_path / "a.pt")
    monkeypatch.setattr(f"runtime.{where}", fail)
    with pytest.raises(BadInput, match=rf"a.pt could not be read \({told}\)") as found:
        load_checkpoint(tmp_path / "a.pt", **how)
    assert not isinstance(found.value, DamagedCheckpoint)


def test_lists_that_hold_themselves_and_each_other(tmp_path):
    inner = itself = []
    itself.append(itself)
    for _ in range(60):
        inner = [inner, inner]
    for number, value in enumerate((itself, inner)):
        torch.save(STATE | {"notes": value}, tmp_path / f"{number}.pt")
        assert load_checkpoint(tmp_path / f"{number}.pt")["step"] == 2


def test_parts_that_are_compressed_and_the_form_without_sums(tmp_path):
    path, packed = tmp_path / "a.pt", tmp_path / "packed.pt"
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in whole.namelist():
            new.writestr(name, whole.read(name))
    with pytest.raises(DamagedCheckpoint, match="packed.pt is damaged: .* is compressed"):
        load_checkpoint(packed)
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="a.pt has torch.save's old form, without sums"):
        load_checkpoint(path)
