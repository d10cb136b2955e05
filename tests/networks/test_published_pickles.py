"""Checkpoints of 2022: what PyTorch Lightning kept beside the weights is read, and never run."""

from runtime.commandline import BadInput

import builtins
import os
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from state_dicts import same

from networks.published.files import read_weights

STATE = {"model.weight": torch.arange(6.0).reshape(2, 3), "betas": torch.ones(4).half()}
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
FORMS = pytest.mark.parametrize("form", ["zip", "old"])


def stub(monkeypatch, module, name, **members):
    """A class of a module that is not installed; both are gone when monkeypatch is undone."""
    kind, parts = type(name, (), {"__module__": module, **members}), module.split(".")
    for i in range(1, len(parts) + 1):
        package = ".".join(parts[:i])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, kind)
    return kind


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def save(path, content, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def beside(callback, scalar):
    """What Stable Diffusion's own checkpoints have; scalar: one of numpy's numbers."""
    told = {"monitor": "val/loss_simple_ema", "best_model_score": scalar, "dirpath": "logs"}
    return {
        "epoch": 0,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {callback: told},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": scalar, "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": np.array([1e-4, 2e-4]), "dtype": np.dtype("float32")}],
    }


@FORMS
def test_what_lies_beside_the_weights_is_read_without_its_packages(tmp_path, monkeypatch, form):
    with monkeypatch.context() as installed:
        callback = stub(installed, LIGHTNING, "ModelCheckpoint")
        content = {"state_dict": STATE} | beside(callback, np.float32(0.25))
        path = save(tmp_path / "sd.ckpt", content, form)
    assert "pytorch_lightning" not in sys.modules
    assert same(read_weights(path), STATE)
    assert "pytorch_lightning" not in sys.modules


@FORMS
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("scalar", (np.dtype("float64"), b"\0" * 8)),
        ("_reconstruct", (np.ndarray, (0,), b"b")),
    ],
)
def test_numbers_of_the_numpy_of_2022_are_read(tmp_path, monkeypatch, name, arguments, form):
    """numpy 2 has renamed the module, so the old name is written with a stub in its place."""
    old = "numpy.core.multiarray"
    with monkeypatch.context() as installed:
        there = sys.modules["numpy"]
        function = stub(installed, old, name)
        installed.setitem(sys.modules, "numpy", there)
        found = Call(function, *arguments)
        path = save(tmp_path / "sd.ckpt", {"state_dict": STATE, "lr": found}, form)
    if form == "old":
        assert f"c{old}\n{name}\n".encode() in path.read_bytes()
    assert same(read_weights(path), STATE)


@FORMS
def test_an_installed_class_of_that_name_is_not_run_either(tmp_path, monkeypatch, form):
    """Not its constructor, nor what would take its state, when the file has an object of it."""
    calls = []

    def trap(self, *state):
        calls.append(state)

    callback = stub(monkeypatch, LIGHTNING, "ModelCheckpoint", __init__=trap, __setstate__=trap)
    item = callback.__new__(callback)
    item.monitor = "loss"
    content = {"state_dict": STATE, "made": Call(callback, 1, 2), "item": item, callback: {}}
    path = save(tmp_path / "sd.ckpt", content, form)
    torch.load(path, weights_only=False)
    assert len(calls) == 2  # the traps work
    assert same(read_weights(path), STATE)
    assert len(calls) == 2


def test_one_file_leaves_nothing_allowed_for_the_next(tmp_path, monkeypatch):
    callback = stub(monkeypatch, LIGHTNING, "ModelCheckpoint")
    path = save(tmp_path / "sd.ckpt", {"state_dict": STATE, "callbacks": {callback: {}}}, "zip")
    read_weights(path)
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint was not an allowed global"):
        torch.load(path, weights_only=True)


HARMFUL = {
    "os.system": lambda made: Call(os.system, f"touch {made}"),
    "open": lambda made: Call(open, str(made), "w"),
    "eval": lambda made: Call(eval, f"open({str(made)!r}, 'w')"),
    "exec": lambda made: Call(builtins.exec, f"open({str(made)!r}, 'w')"),
    "numpy.save": lambda made: Call(np.save, str(made), np.ones(1)),
    "os.system as an argument": lambda made: Call(np.dtype, Call(os.system, f"touch {made}")),
    "getattr": lambda made: Call(getattr, Call(__import__, "os"), "system"),
}


@FORMS
@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_other_name_is_refused_and_nothing_is_run(tmp_path, monkeypatch, name, form):
    made = tmp_path / "made.npy"
    with monkeypatch.context() as installed:
        callback = stub(installed, LIGHTNING, "ModelCheckpoint")
        told = {"callbacks": {callback: {"best_model_score": HARMFUL[name](made)}}}
        path = save(tmp_path / "sd.ckpt", {"state_dict": STATE} | told, form)
    with pytest.raises(BadInput, match="sd.ckpt is no file of plain tensors") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value) and not made.exists()


@FORMS
@pytest.mark.parametrize(
    "module, name",
    [
        ("pytorch_lightning.trainer.trainer", "Trainer"),
        ("pytorch_lightning.callbacks", "model_checkpoint"),
        ("ldm.models.autoencoder", "AutoencoderKL"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, monkeypatch, module, name, form):
    with monkeypatch.context() as installed:
        kind = stub(installed, module, name)
        path = save(tmp_path / "sd.ckpt", {"state_dict": STATE, "made": Call(kind)}, form)
    with pytest.raises(BadInput, match=rf"{module}\.{name} was not an allowed global"):
        read_weights(path)


def test_a_stand_in_is_no_tensor(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as installed:
        callback = stub(installed, LIGHTNING, "ModelCheckpoint")
        weights = {"state_dict": STATE | {"callback": Call(callback)}}
        path = save(tmp_path / "sd.ckpt", weights, "zip")
    assert same(read_weights(path), STATE)
    assert capsys.readouterr().out.endswith("takes 'state_dict', leaves out 'callback'\n")
