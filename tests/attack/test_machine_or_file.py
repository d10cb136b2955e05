"""Memory that ends and disks that fail are no faults of a file: it is not made again for them."""

from runtime.commandline import BadInput

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import noise
from PIL import Image

from evaluation import classifier, image_sets
from image_data import cifar_pickle, decode

DS = SimpleNamespace(images=np.zeros((2, 8, 8, 1), np.uint8), num_classes=2)


@pytest.fixture
def kept(tmp_path):
    """The file of a classifier."""
    net = classifier.Classifier(8, 8, 1, 2)
    facts = {"feature_hash": classifier.weights_hash(net)}
    path = tmp_path / "classifier.pt"
    torch.save({"recipe": {"a": 1}, "facts": facts, "net": net.state_dict()}, path)
    assert classifier._read(path, {"a": 1}, DS)[1] == facts
    return path


MACHINE = [MemoryError(), OSError(errno.EACCES, "no"), OSError(errno.EIO, "no")]
MACHINE += [RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes")]


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", MACHINE, ids=repr)
def test_a_classifier_that_could_not_be_read_is_not_trained_again(kept, monkeypatch, error):
    monkeypatch.setattr(classifier, "load_copied", fails(error))
    with pytest.raises(BadInput, match="classifier.pt could not be read .*; it may be whole"):
        classifier._read(kept, {"a": 1}, DS)


def test_a_bug_in_the_network_is_no_torn_file(kept, monkeypatch):
    monkeypatch.setattr(classifier, "Classifier", fails(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        classifier._read(kept, {"a": 1}, DS)


@pytest.mark.parametrize("place", [0.3, 0.7])
def test_a_torn_classifier_is_trained_again(kept, capsys, place):
    raw = bytearray(kept.read_bytes())
    raw[int(place * len(raw))] ^= 0xFF
    kept.write_bytes(raw)
    assert classifier._read(kept, {"a": 1}, DS) is None
    assert "training it again" in capsys.readouterr().err


def test_memory_that_ends_is_no_torn_file(tmp_path, monkeypatch):
    """A command says that memory has ended, and what to do."""
    Image.fromarray(noise((8, 8))).save(tmp_path / "1.png")
    np.savez(tmp_path / "a.npz", noise((2, 8, 8, 3)))
    monkeypatch.setattr(decode, "to_array", fails(MemoryError()))
    monkeypatch.setattr(image_sets, "_mapped", fails(MemoryError()))
    monkeypatch.setattr(cifar_pickle, "read_steps", fails(MemoryError()))
    for read in (
        lambda: decode.decode(tmp_path, ["1.png"], 8, 1),
        lambda: image_sets.read_file(os.fspath(tmp_path / "a.npz")),
        lambda: cifar_pickle.read_batch(b""),
    ):
        with pytest.raises(MemoryError):
            read()
