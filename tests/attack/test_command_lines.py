"""Random command lines of every script: work begins, or one line says why not; no traceback.

Nothing is trained or drawn: what a command would do stops where it begins.
"""

from runtime import edges

import importlib
import random
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import pytest

from image_data import datasets

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
BEGINS = ("launch", "convert", "save_schedules", "write_tiny", "plan", "held_out_of", "run_stages")
WORDS = (
    *("", " ", "-", "--", "0", "1", "2", "4", "8", "-1", "3,7", "0-3", "0:2", "1e-3", "nan", "inf"),
    *(
        "-inf",
        "1e400",
        "1" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "³",
        "true",
        "None",
        "[]",
        "{}",
        "{data}",
    ),
    *(
        "a" * 300,
        "ü",
        "\x1b[31m",
        "\n",
        "\x00x",
        "~",
        "~nobody",
        "/",
        "/dev/null",
        "/proc/x",
        "..",
        ".",
    ),
    *(
        "%s",
        "$HOME",
        "a b",
        "'",
        '"',
        "mnist",
        "glyphs",
        "none.pt",
        "config.yaml",
        "ckpt.pt",
        "v",
        "linear",
    ),
    *(
        "l1",
        "ddim",
        "heun",
        "auto",
        "never",
        "cosine",
        "kl",
        "vq",
        "small",
        "train",
        "\udcff",
        "a/b:train",
    ),
)
ENDED = (0, 2)


class Begun(BaseException):
    """Work would begin here."""


def begin(*args, **kwargs):
    raise Begun


def command_line(script, rng):
    """Some flags of a script, often with a value that is none."""
    module = importlib.import_module(script)
    names = [f.name for f in fields(module.Config)]
    line = []
    for name in rng.sample(names, rng.randint(1, min(5, len(names)))):
        spelled = f"--{name.replace('_', '-')}" if rng.random() < 0.9 else f"--{name}x"
        values = rng.choices(WORDS, k=rng.choice((0, 1, 1, 1, 1, 2, 4)))
        if values and rng.random() < 0.2:
            line.append(f"{spelled}={values[0]}")
        else:
            line += [spelled, *values]
    return line + rng.choices(WORDS, k=rng.choice((0, 0, 0, 1, 2)))


@pytest.fixture
def still(monkeypatch, tmp_path):
    """Nothing begins; files are made in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        module = importlib.import_module(script)
        for name in BEGINS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, begin)
    for name in ("of", "prepared", "load"):
        monkeypatch.setattr(datasets, name, begin)


def faults(count, seed, capsys, monkeypatch):
    """(number tried, [(command line, what went wrong)])."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        script = rng.choice(SCRIPTS)
        line = command_line(script, rng)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *line])
        try:
            edges.run(importlib.import_module(script).main)
        except Begun:
            pass
        except SystemExit as stop:
            said = capsys.readouterr().err
            if stop.code not in ENDED and stop.code is not None:
                found.append((script, line, f"exit code {stop.code}"))
            elif stop.code == 2 and (said.count("\n") != 1 or not said.startswith("error: ")):
                found.append((script, line, said))
        except Exception:
            found.append((script, line, traceback.format_exc()))
        capsys.readouterr()
    return found


def check(count, seed, capsys, monkeypatch):
    found = faults(count, seed, capsys, monkeypatch)
    told = "\n".join(f"{script} {line}: {what}" for script, line, what in found[:5])
    assert not found, f"{len(found)} of {count}:\n{told}"


def test_some_command_lines(still, capsys, monkeypatch):
    check(200, 0, capsys, monkeypatch)


@pytest.mark.slow
def test_many_command_lines(still, capsys, monkeypatch):
    check(5000, 1, capsys, monkeypatch)
