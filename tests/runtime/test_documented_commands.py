"""Every command of README.md, COURSES.md and the head of every chapter is one that is accepted."""

from runtime.commandline import Script, parse

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAUNCH = r"(?:python|torchrun --nproc-per-node \d+(?: --)?) (\w+)\.py([^`\n]*)"


def documented():
    """(stem of a chapter, its arguments) of each command."""
    pages = [(REPO / name).read_text() for name in ("README.md", "COURSES.md")]
    spans = re.findall(r"`([^`\n]+)`", "\n".join(pages))
    for path in REPO.glob("*.py"):
        head = ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", " ")
        # What stands behind a command, or a comment, is separated by several blanks.
        spans += [re.split(r" {3,}|  #", line.strip())[0] for line in head.splitlines()]
    for span in spans:
        if found := re.match(LAUNCH, span):
            yield found[1], found[2].strip()


COMMANDS = sorted({(stem, words) for stem, words in documented() if (REPO / f"{stem}.py").exists()})


def test_there_are_commands():
    assert len(COMMANDS) > 80 and len({stem for stem, _ in COMMANDS}) >= 12


@pytest.mark.parametrize("stem, words", COMMANDS, ids=lambda value: value[:60])
def test_a_command_is_accepted(stem, words, monkeypatch):
    arguments = shlex.split(words)
    monkeypatch.setattr(sys, "argv", [f"{stem}.py", *arguments])
    assert isinstance(parse(importlib.import_module(stem).Config, "", arguments), Script)
