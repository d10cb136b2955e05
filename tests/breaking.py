"""A network that goes bad for one seed at one step of its walk, and commands that are run with it.

broken(monkeypatch, first_x, 3, math.inf)               what World.for_sampling gives
refused_in(monkeypatch, script, folder, *arguments)     the line by which the command ends
"""

from runtime.commandline import BadInput
from runtime.processes import World

import importlib
import sys

import pytest
import torch
from launching import Started
from tiny_runs import flags, tiny

STALE = b"of an earlier call"


class Breaking:
    """net(x, t, ...), but in the `call`-th call from that on which sees key, one number is bad.

    key (C,H,W): about what x of that sample is in its first call, but for a factor. All else is
    net's.
    """

    def __init__(self, net, key, call, value):
        self.net, self.key, self.call, self.value = net, key, call, value
        self.row, self.calls = None, 0

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, x, *inputs):
        out = self.net(x, *inputs)
        near = torch.cosine_similarity(x.flatten(1), self.key.flatten()[None])  # (B,)
        if self.row is None and len(x) and near.max() > 0.8:
            self.row = near.argmax().item()
        if self.row is not None:
            self.calls += 1
            if self.calls == self.call:
                out = out.clone()
                out[self.row, 0, 1, 2] = self.value
        return out


def broken(monkeypatch, *how, **more):
    """Have every World's networks for sampling be Breaking(net, *how, **more)."""
    monkeypatch.setattr(World, "for_sampling", lambda world, net: Breaking(net, *how, **more))


def trained_a_step(scripts, root, given, **settings):
    """{script: the checkpoint in `root` that a step of training leaves}; given: its data, as flags.

    settings: of those scripts that have them in a training.
    """
    few = {"steps": 1, "save_every": 1, "sample_every": 0, "ae_steps": 1, "n_eval": 0}
    few |= {"n": 1, "seeds": "0", "sample_steps": 1, **settings}
    runs = {}
    for script in scripts:
        idle = importlib.import_module(script).Config.IDLE
        more = flags(script, **{name: few[name] for name in few.keys() - idle})
        runs[script] = Started(script, *tiny(script), *given, *more, "--out", root / script)
    for run in runs.values():
        done = run.wait()
        assert done.code == 0, done.err
    return {script: root / script / "ckpt.pt" for script in scripts}


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused_in(monkeypatch, script, folder, *arguments):
    """The BadInput of a command, run here, that leaves its folder `--out` as it was.

    There lie the files of an earlier call.
    """
    for name in ("samples.png", "samples.npz", "reverse.gif", "0000.png", "compare.md"):
        (folder / name).write_bytes(STALE)
    before = files_in(folder)
    argv = [f"{script}.py", *map(str, arguments), "--gpus", "0", "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(BadInput) as error:
        importlib.import_module(script).main()
    assert files_in(folder) == before
    return str(error.value)
