"""bench/reading.py: how it counts; and that chapters, and steps of chapter 1, are short enough."""

from runtime.commandline import BadInput, RunConfig

import ast
import importlib
import sys
import types
from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro


def load():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        return importlib.import_module("bench.reading")
    finally:
        sys.path[:] = path


reading = load()


# --------------------------------------------------------------------------- what is promised


@pytest.mark.parametrize("chapter", reading.chapters())
def test_a_chapter_is_short(chapter):
    counts = reading.of_file(reading.REPO / f"{chapter}.py")
    beyond = {what: counts[what] for what, limit in reading.LIMITS.items() if counts[what] > limit}
    assert not beyond, f"{beyond} beyond {reading.LIMITS}"


def test_the_limits_are_those_of_the_design():
    assert reading.LIMITS == {"lines": 500, "fields": 40, "train": 60, "skips": 0}
    assert reading.FIRST_LOADS == 20 and reading.FIRST_LINES == 200
    assert reading.FIRST_STEPS == {"training": 8, "sampling": 7}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What was seen of chapter 1."""
    return reading.driven(reading.FIRST, tmp_path_factory.mktemp("reading"))


def test_a_step_of_chapter_1_is_read_in_a_few_files(first):
    counts = reading.of_file(reading.REPO / f"{reading.FIRST}.py")
    assert not list(reading.broken(reading.FIRST, counts, first))


def test_what_a_step_of_chapter_1_surely_executes_is_seen(first):
    assert not first["error"]
    (training,), (sampling,) = (first[kind].values() for kind in ("training", "sampling"))
    networks = {"kernels/attention.py", "kernels/group_norm_silu.py", "ddpm_pixel.py"}
    assert networks | {"runtime/run.py", "image_data/batches.py"} <= training.keys()
    assert networks | {"kernels/sampling_update.py", "kernels/philox.py"} <= sampling.keys()
    assert training.keys() | sampling.keys() <= set(first["loads"])
    for step, function in ((training, "simple_loss"), (sampling, "ancestral_row")):
        source = (reading.REPO / "ddpm_pixel.py").read_text()
        (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == function]
        last = node.body[-1]
        assert set(range(last.lineno, last.end_lineno + 1)) <= set(step["ddpm_pixel.py"])
    assert not {"runtime/folder.py", "runtime/pictures.py"} & training.keys()  # an ordinary step


# ------------------------------------------------------------------------------ how it counts


SOURCE = '''"""A docstring
of two lines."""

import torch  # a comment beside a statement counts as the statement


def train(x):
    """Not counted."""
    # nor this

    if x and (
        x > 1
    ):
        x = [
            x,

            # a comment within
            2,
        ]
    else:
        x = 3
    return x


def train_more():
    return """a string
    over two lines"""


@dataclass
class Config(RunConfig):
    one: int = 1  # documented
    two: tuple[int, ...] = (1,)
    """documented"""
    FREE: ClassVar[frozenset] = frozenset()

    def three(self):
        four: int = 1
'''


def test_code_lines_are_neither_comments_nor_docstrings_nor_blank():
    counted = reading.code_lines(SOURCE)
    kept = [line.strip() for i, line in enumerate(SOURCE.splitlines(), 1) if i in counted]
    assert "import torch  # a comment beside a statement counts as the statement" in kept
    assert {'over two lines"""', "else:", "],"[:1], "2,"} <= set(kept)
    assert not {"", "# nor this", "# a comment within", '"""Not counted."""'} & set(kept)
    assert 'of two lines."""' not in kept


def test_statements_have_all_their_lines_and_blocks_only_their_head():
    starts, lines = reading.statements(SOURCE), [""] + SOURCE.splitlines()
    head, inner = lines.index("    if x and ("), lines.index("        x = [")
    assert [starts[i] for i in range(head, head + 3)] == [head] * 3
    assert {starts[i] for i in range(inner, inner + 6)} == {inner}
    assert lines.index("    else:") not in starts


def test_executed_lines_become_whole_statements(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "REPO", tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    lines = [""] + SOURCE.splitlines()
    inner = lines.index("        x = [")
    found = reading.whole_statements({"a.py": {inner + 1}})
    assert found == {"a.py": {inner, inner + 1, inner + 4, inner + 5}}


def test_a_file_is_counted(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE + "x = 1  # fmt" + ": skip\n")
    lines = [""] + SOURCE.splitlines()
    train = lines.index("    return x") - lines.index("def train(x):") + 1
    total = len(SOURCE.splitlines()) + 1
    counts = reading.of_file(tmp_path / "a.py")
    assert counts == {"lines": total, "fields": 2, "train": train, "skips": 1}
    (tmp_path / "b.py").write_text("x = 1\n")
    assert reading.of_file(tmp_path / "b.py") == {"lines": 1, "fields": 0, "train": 0, "skips": 0}


# --------------------------------------------------------------------------- what it records


CHAPTER = """
def helper():
    return 1


def walk(n):
    x = helper()
    for i in range(n):
        x += i
        yield x


def train(run):
    begun = helper()
    for step in run.steps():
        if step == 2:
            rare = helper()
        often = step
    return begun
"""


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """A chapter in a project of its own."""
    monkeypatch.setattr(reading, "REPO", tmp_path)
    (tmp_path / "a.py").write_text(CHAPTER)
    spec = importlib.util.spec_from_file_location("a", tmp_path / "a.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(text):
    return 1 + CHAPTER.splitlines().index(text)


def recorded(function, *arguments):
    before = sys.gettrace()
    recorder = reading.Recorder()
    with recorder:
        function(*arguments)
    sys.settrace(before)
    return {kind: dict(found) for kind, found in recorder.steps.items()}


def test_a_sampling_step_lasts_from_one_yield_to_the_next(chapter):
    found = recorded(list, chapter.walk(4))
    loop = {line("    for i in range(n):"), line("        x += i"), line("        yield x")}
    assert not found["training"]
    (steps,) = found["sampling"].values()
    assert list(found["sampling"]) == ["a.py walk"] and len(steps) == 3
    assert all({"a.py"} == step.keys() and loop >= step["a.py"] for step in steps)
    assert reading.one_of(steps, max)["a.py"] >= loop - {line("        yield x")}
    assert line("    x = helper()") not in steps[0]["a.py"]


def test_a_training_step_lasts_from_one_number_to_the_next(chapter, monkeypatch):
    from runtime.run import Run

    monkeypatch.setattr(Run, "steps", lambda run: iter(range(5)))
    run = types.SimpleNamespace(first=0)
    run.steps = lambda: Run.steps(run)
    found = recorded(chapter.train, run)
    ((name, steps),) = found["training"].items()
    assert name == "a.py train" and len(steps) == 3  # neither the first nor the last
    rare = line("            rare = helper()")
    assert [rare in step["a.py"] for step in steps] == [False, True, False]
    ordinary = reading.one_of(steps, min)["a.py"]
    assert line("        often = step") in ordinary and rare not in ordinary
    assert line("    begun = helper()") not in ordinary


def test_project_files_are_neither_of_packages_nor_this_one(tmp_path):
    assert reading.project_file(reading.__file__) is None
    assert reading.project_file(ast.__file__) is None
    assert reading.project_file(str(reading.REPO / ".venv" / "x.py")) is None
    assert reading.project_file(str(reading.REPO / "runtime" / "run.py")) == "runtime/run.py"


# ------------------------------------------------------------------------------ what it prints


@dataclass
class Training(RunConfig):
    pass


@dataclass
class Comparing:
    checkpoint: Annotated[str, tyro.conf.Positional] = ""


@dataclass
class Sampling:
    sample: str = ""
    n: int = 100


def test_a_chapter_that_trains_runs_as_smoke_and_one_that_samples_gets_a_checkpoint(tmp_path):
    flags = reading.flags(Training, tmp_path, "ckpt.pt")
    assert "--smoke" in flags and "--steps" in flags and "--sample" not in flags
    flags = reading.flags(Sampling, tmp_path, "ckpt.pt")
    assert flags[flags.index("--sample") + 1] == "ckpt.pt" and flags[-2:] == ["--n", "4"]
    assert "--smoke" in flags and "--steps" not in flags and "--batch-size" not in flags
    assert reading.flags(Comparing, tmp_path, "ckpt.pt")[0] == "ckpt.pt"


FOUND = {
    "loads": ["runtime/run.py"],
    "error": "",
    "training": {"a.py train": {"a.py": [1, 2], "b.py": [3]}, "a.py train_ae": {"a.py": [1]}},
    "sampling": {"a.py sample": {"a.py": [1, 2, 3]}},
}
COUNTS = {"lines": 10, "fields": 3, "train": 4, "skips": 0}


def test_the_table_has_a_row_for_each_loop():
    first, second = reading.rows("a", COUNTS, FOUND)
    size = reading.lines_of("runtime/run.py")
    assert first.split()[:8] == ["a", "10", "3", "4", "1", "files", str(size), "2"]
    assert first.split()[8:] == ["files", "3", "train", "1", "files", "3", "sample"]
    assert second.split() == ["1", "files", "1", "train_ae"]
    assert first.index("train") == second.index("train_ae")


def test_what_is_beyond_a_limit_is_named():
    assert not list(reading.broken("a", COUNTS, FOUND))
    assert not list(reading.broken(reading.FIRST, COUNTS, FOUND))
    long = list(reading.broken("a", COUNTS | {"lines": 501, "skips": 1}, FOUND))
    assert long == ["a: lines 501, at most 500", "a: skips 1, at most 0"]
    step = {f"{i}.py": [1] for i in range(8)}
    many = FOUND | {"loads": ["x"] * 21, "training": {"t": step}, "sampling": {"s": step}}
    assert list(reading.broken("a", COUNTS, many)) == []
    loads, sampling = reading.broken(reading.FIRST, COUNTS, many)
    assert loads == f"{reading.FIRST}: loads 21 files, at most 20"
    assert sampling == "s: a sampling step passes 8 files and 8 lines, at most 7 and 200"
    (lines,) = reading.broken(
        reading.FIRST, COUNTS, FOUND | {"training": {"t": {"a.py": list(range(201))}}}
    )
    assert "1 files and 201 lines" in lines
    none = list(reading.broken(reading.FIRST, COUNTS, FOUND | {"sampling": {}, "error": "why"}))
    assert none == [f"{reading.FIRST}: no sampling step was seen; why"]


def test_a_chapter_that_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "REPO", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\nraise ValueError('half written')\n")
    monkeypatch.setattr(reading, "FIRST", "a")
    with pytest.raises(SystemExit) as stop:
        reading.main([])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "\na failed: ValueError: half written\n" in out and "did not run" not in out


def test_an_unknown_chapter_is_named():
    with pytest.raises(BadInput, match="no chapter nothing: there are .*ddpm_pixel"):
        reading.main(["nothing"])
