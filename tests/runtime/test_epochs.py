"""Passes over the data in place of steps, and the folder of a run in place of its checkpoint."""

from runtime.commandline import CHECKPOINTS, BadInput, parse

import importlib
from dataclasses import replace

import numpy as np
import pytest
from launching import succeed
from run_folders import saved
from tiny_runs import COMMANDS, TINY, TRAININGS, fields, flags

from image_data import datasets
from image_data.batches import Dataset

SHORT = {**TINY, "sample_every": 0, "seeds": "0,1"}


@pytest.mark.parametrize(
    "epochs, batch_size, steps", [(1, 8, 8), (2.5, 8, 20), (30, 128, 15), (0.001, 8, 1), (0, 8, 77)]
)
def test_epochs_are_passes_over_the_images(epochs, batch_size, steps):
    """64 images: an epoch of batches of 8 is 8 steps; 0 leaves --steps."""
    ds = Dataset("gray", np.zeros((64, 4, 4, 1), np.uint8), np.zeros(64, np.int64), (), {})
    cfg = importlib.import_module("ddpm_pixel").Config(steps=77)
    found = datasets.in_steps(replace(cfg, epochs=float(epochs), batch_size=batch_size), ds)
    assert (found.steps, found.epochs) == (steps, 0.0)


def test_epochs_beside_steps_and_below_zero_are_refused():
    config = importlib.import_module("ddpm_pixel").Config
    with pytest.raises(BadInput, match="--steps does nothing beside --epochs"):
        parse(config, "", ["--epochs", "2", "--steps", "10"])
    with pytest.raises(BadInput, match="--epochs must be at least 0"):
        importlib.import_module("ddpm_pixel").check(replace(config(), epochs=-1.0))


@pytest.mark.parametrize("script", TRAININGS)
def test_every_training_takes_epochs(script, toy, tiny, tmp_path):
    """Half a pass over 64 images in batches of 8, after which the run knows its steps alone."""
    short = flags(script, epochs=0.5, warmup=0, save_every=2, sample_every=0)
    given = [word for word in tiny[script] if word]
    at = given.index("--steps")
    succeed(script, *toy, *given[:at], *given[at + 2 :], *short, "--out", tmp_path)
    state = saved(tmp_path)
    assert (state["step"], state["config"]["steps"], state["config"]["epochs"]) == (4, 4, 0.0)


@pytest.mark.parametrize("script", COMMANDS)
def test_a_run_s_folder_is_its_checkpoint(script, tmp_path):
    config = importlib.import_module(script).Config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"")
    (tmp_path / "pipeline").mkdir()
    texts = [name for name, field in fields(script).items() if "str" in str(field.type)]
    names = [name for name in CHECKPOINTS if name in {*texts} - config.IDLE]
    for name in names:
        for folder, expected in (("run", "run/ckpt.pt"), ("pipeline", "pipeline")):
            word = f"--{name}" if name != "checkpoint" else ""
            cfg = parse(config, "", [*filter(None, [word]), str(tmp_path / folder)])
            assert getattr(cfg, name) == str(tmp_path / expected), name
