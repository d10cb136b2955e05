"""Every command and every training of the root, as it is found there, and flags for tiny runs.

A chapter says itself what it is: its Config inherits Command or, if it trains, RunConfig; and its
--smoke says how small its network can be. So a new chapter is tested without an edit here.
"""

from runtime.commandline import Command, RunConfig

import dataclasses
import importlib
import typing
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# A run of some seconds, for those chapters that have such settings.
TINY = {
    "gpus": 0,
    "batch_size": 8,
    "warmup": 5,
    "log_every": 1,
    "save_every": 3,
    "steps": 20,
    "sample_every": 8,
    "sample_steps": 4,
    "seeds": "0-3",
}


def chapters(base):
    """Stems of the root scripts that have a Config derived from `base`."""
    stems = sorted(path.stem for path in REPO.glob("*.py"))
    configs = {stem: getattr(importlib.import_module(stem), "Config", None) for stem in stems}
    return [stem for stem, config in configs.items() if config and issubclass(config, base)]


COMMANDS, TRAININGS = chapters(Command), chapters(RunConfig)


def fields(script):
    """{name: field} of a chapter's settings."""
    return {f.name: f for f in dataclasses.fields(importlib.import_module(script).Config)}


# Trainings whose checkpoints draw samples by seed: an autoencoder's do not, and a classifier guides
# the networks of others.
DRAWING = [s for s in TRAININGS if "seeds" in fields(s) and "classifier" not in fields(s)]
# Commands that sample the checkpoints of trainings.
SAMPLERS = [s for s in COMMANDS if s not in TRAININGS and {"sample", "seeds"} <= {*fields(s)}]


def flags(script, **settings):
    """The settings as flags; those that the chapter does not have, or not so, are left out."""
    found = []
    for name, value in settings.items():
        field, flag = fields(script).get(name), name.replace("_", "-")
        choices = typing.get_args(field.type) if field else ()
        literal = field and typing.get_origin(field.type) is typing.Literal
        if field is None or literal and value not in choices:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def tiny(script):
    """Flags of a run in which a step takes milliseconds: --smoke's, but longer and going on."""
    idle = importlib.import_module(script).Config.IDLE
    used = {name: value for name, value in TINY.items() if name not in idle}
    return ["--smoke", "--resume", "auto", *flags(script, **used)]
