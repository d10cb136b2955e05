"""Random command lines of every command: work begins, or one line says why not; no traceback.

Nothing is trained or drawn: what a command would do ends where it begins. Values are hostile ones
of a setting's own type more often than of none, else all would end at the first.
"""

from runtime import edges, processes

import contextlib
import importlib
import io
import re
import resource
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_data import datasets

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [path.stem for path in sorted(ROOT.glob("*.py"))]
COMMANDS += ["image_data.__main__", "networks.published.__main__", "runtime.report"]
BEGINS = {"launch", "convert", "save_schedules", "write_tiny", "plan", "held_out_of", "run_stages"}
BEGINS |= {"load"}

WHOLE = ["0", "1", "-1", "2", "3", "7", "8", "64", "2147483647", "-2147483648"]
WHOLE += ["2147483648", "9223372036854775808", "1" * 30, "9" * 5000, "-" + "9" * 5000, "1_0", "+3"]
NUMBERS = ["0", "-0.0", "1", "-1", "0.5", "0.999", "1e-3", "1e-45", "1e30", "1e39", "1e400", "nan"]
NUMBERS += ["inf", "-inf", "-1e308", "2", "1000", "1e", "0,5"]
TEXTS = ["", " ", ",", "-", "--", "0", "3,7", "0-3", "0:2", "5-1", "1e-3,nan", "-inf", "0x10", "³"]
TEXTS += ["9" * 400, "0-" + "9" * 30, "true", "None", "[]", "[1, --out]", "{}", "{data}", "{0}"]
TEXTS += ["a" * 300, "a/" * 3000, "ü", "猫", "\x1b[2J\x07", "\n", "\t", "\u202e", "\udcff", "~"]
TEXTS += ["~nobody", "~/x", "/", "/dev/null", "/dev/full", "/proc/x", "..", ".", "%s", "%(x)d"]
TEXTS += ["$HOME", "a b", "'", '"', "mnist", "glyphs", "none.pt", "x.yaml", "x.json", "x.npz"]
TEXTS += ["http://127.0.0.1:9/x", "a/b:train", "a=b", "=", "--steps=3", "*", "[", "(", "\\"]
FALSE = ["--", "-", "---", "--=", "--=3", "--no-", "-x", "--ü", "—steps", "--\x1b[2J", "--steps\n"]
FALSE += ["-1", "--resum", "--no-steps", "--" + "a" * 5000, "--a.b", "--steps.x", "@x", "-h"]


UNTRIED = {"gpus", "wandb", "tensorboard"}


class Begun(BaseException):
    """Work would begin here."""


def begin(*args, **kwargs):
    raise Begun


def values(kind):
    """Texts that may stand behind a flag of this type: right ones, hostile ones, wrong ones."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        return values(parts[0])
    if kind is bool:
        return st.just([])
    of = {int: WHOLE, float: NUMBERS}.get(parts[0] if parts else kind, TEXTS)
    if typing.get_origin(kind) is typing.Literal:
        of = [str(part) for part in parts]
    several = 4 if typing.get_origin(kind) is tuple else 1
    right = st.lists(st.sampled_from(of), min_size=1, max_size=several)
    wrong = st.lists(st.sampled_from(WHOLE + NUMBERS + TEXTS), max_size=3)
    return st.one_of(right, right, right, right, wrong)


@st.composite
def command_lines(draw):
    """(command, [argument])."""
    command = draw(st.sampled_from(COMMANDS))
    kinds = {f.name: f.type for f in fields(importlib.import_module(command).Config)}
    line = ["--smoke"] * (draw(st.integers(0, 9)) == 0 and "smoke" in kinds)
    names = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True))
    line += arguments(draw, {name: kinds[name] for name in names})
    return command, line + draw(st.lists(st.sampled_from(FALSE), max_size=1)) * draw(st.booleans())


def arguments(draw, kinds):
    """[argument] of settings {name: type}."""
    line = []
    for name in kinds:
        flag, given = f"--{name.replace('_', '-')}", draw(values(kinds[name]))
        if typing.get_origin(kinds[name]) is typing.Annotated:
            line += given
        elif kinds[name] is bool:
            line.append(draw(st.sampled_from([flag, flag.replace("--", "--no-", 1)])))
        elif len(given) == 1 and draw(st.booleans()):
            line.append(f"{flag}={given[0]}")
        else:
            line += [flag, *given]
    return line


def fault(command, line):
    """ "" for a command line that begins work or is refused in a line; else what went wrong."""
    sys.argv, out, err = [f"{command}.py", *line], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            edges.run(importlib.import_module(command).main)
    except Begun:
        return ""
    except SystemExit as stop:
        said = err.getvalue()
        if not stop.code:
            return ""
        clear = re.fullmatch(r"error: [^\x00-\x1f\x7f-\x9f\u202e]{1,1600}\n", said)
        return "" if stop.code == 2 and clear else f"exit code {stop.code}: {said}"
    return ""


@pytest.fixture
def still(monkeypatch, tmp_path):
    """Nothing begins; files are made in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for command in COMMANDS:
        module = importlib.import_module(command)
        for name in BEGINS & vars(module).keys():
            monkeypatch.setattr(module, name, begin)
    for name in ("of", "prepared", "load"):
        monkeypatch.setattr(datasets, name, begin)


def try_many(count, lines):
    """Try that many of these command lines, the same ones each time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(lines)
    def each(found):
        assert not fault(*found)

    each()


def test_some_command_lines(still):
    try_many(80, command_lines())


@pytest.mark.slow
def test_many_command_lines(still):
    try_many(5000, command_lines())


@st.composite
def changed(draw, cases):
    """(command, [argument]) of a right command of flag_cases, with one setting or two changed."""
    case = cases[draw(st.sampled_from(sorted(cases)))]
    kinds = {name: field.type for name, field in case.fields.items() if name not in UNTRIED}
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=2, unique=True))
    beside = {k: v for name in names for k, v in case.beside.get(name, {}).items()}
    base = {k: v for k, v in (case.base | beside).items() if k not in names}
    kinds = {name: kinds[name] for name in names}
    line = importlib.import_module("flag_cases").arguments(case, base)
    return case.script, line + arguments(draw, kinds)


@pytest.mark.slow
def test_right_command_lines_with_a_hostile_value(monkeypatch, tmp_path):
    """Checkpoints are read, data are there and networks are built; work ends at its first bar."""
    import flag_cases
    import flag_more

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    cases = {name: make(folder=tmp_path) for name, make in flag_more.CASES.items()}
    for function in (processes.progress, processes.run_alone):
        flag_cases.everywhere(monkeypatch, function, begin)
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))  # for networks too large
    try:
        try_many(500, changed(cases))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
