"""A ~ in front of a path is the home folder in the arguments of every program in bench/."""

from runtime.commandline import BadInput

import argparse
import importlib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PATHS = {"out", "data", "data_root", "work", "join", "weights", "other", "samples", "reference"}
PATHS |= {"checkpoint"}
PROGRAMS = [path.stem for path in sorted((REPO / "bench").glob("*.py"))]
PROGRAMS = [stem for stem in PROGRAMS if "argparse" in (REPO / "bench" / f"{stem}.py").read_text()]


class Seen(Exception):
    pass


def arguments(parser):
    """All of a parser's arguments, also those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from arguments(below)
        yield action


@pytest.mark.parametrize("program", PROGRAMS)
def test_home_in_arguments(program, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []

    def seen(parser, *_, **__):
        found.append(parser)
        raise Seen

    module = importlib.import_module(f"bench.{program}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", seen)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", seen)
    monkeypatch.setattr("sys.argv", [program])
    entry = getattr(module, "parse", None) or module.main
    with pytest.raises(Seen):
        entry([]) if entry.__code__.co_argcount else entry()
    for action in arguments(found[0]):
        if action.dest in PATHS and action.nargs != 0:
            assert str(action.type("~/x")) == f"{tmp_path}/x", action.dest
            assert str(action.type("x~/y")) == "x~/y"
            with pytest.raises(BadInput, match=r"~nobody-of-this-name/x: no home folder"):
                action.type("~nobody-of-this-name/x")
