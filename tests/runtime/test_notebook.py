"""notebooks/diffusion.ipynb: every cell runs, in order and tiny; it is stored without results."""

from runtime import commandline

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from launching import REPO, Started

NOTEBOOK = REPO / "notebooks" / "diffusion.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def text_of(cell):
    return "".join(cell["source"])


def test_it_is_stored_as_a_notebook_without_results():
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in CELLS}) == len(CELLS) > 15
    for cell in CELLS:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
        assert not cell.get("outputs") and cell.get("execution_count") is None
        lines = text_of(cell).splitlines(keepends=True)
        assert cell["source"] == lines and lines  # as Jupyter writes it
    assert "https://github.com/OWNER/" in text_of(CELLS[1])  # nobody's address


class Process:
    """subprocess.Popen of `python SCRIPT.py ...`: forked from a server that has imported all."""

    made = []

    def __init__(self, command, cwd, **pipes):
        assert command[0] == sys.executable and pipes["text"]
        self.made.append([Path(command[1]).name, *command[2:]])
        os.chdir(cwd)
        done = Started(Path(command[1]).stem, *command[2:]).wait()
        self.returncode = done.code
        self.stdout = (done.out + done.err).splitlines(keepends=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_its_cells_run_in_order(monkeypatch, capsys, tmp_path):
    shown, display = [], types.ModuleType("IPython.display")
    display.display, display.Markdown = shown.append, str
    display.Image = lambda data, width: (data[:4], width)
    package = types.ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("DIFFUSION_SMOKE", "1")
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "made", [])
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile(text_of(cell), f"cell {number}", "exec"), names)
        if names.get("WORK", tmp_path) != tmp_path:
            names["WORK"].rmdir()  # empty yet, and not in the book
            names["WORK"] = tmp_path
    scripts = [command[0] for command in Process.made]
    assert {"ldm_cfg.py", "ddpm_pixel.py", "ddim.py", "eval_fid.py"} <= {*scripts}
    assert all("--smoke" in command for command in Process.made)
    pictures = [picture for picture in shown if isinstance(picture, tuple)]
    assert {kind for kind, _ in pictures} == {b"\x89PNG", b"GIF8"} and len(pictures) > 12
    assert min(width for _, width in pictures) >= 240
    assert "nothing was missing" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mnist" / "samples.png").is_file()


def test_every_command_takes_its_flags(monkeypatch):
    """Those of full size, too, which the test above leaves out; nothing of them is run."""
    asked = []
    names = {"run": lambda command, full="": asked.append(f"{command} {full}"), "SMOKE": False}
    names |= dict.fromkeys(["show", "table"], lambda *given: None) | {"WORK": Path("nowhere")}
    for cell in CELLS:
        text = text_of(cell)
        if cell["cell_type"] == "code" and re.search(r"^ *run\(", text, re.MULTILINE):
            exec(text, names)
    assert len(asked) > 7
    for command in asked:
        script, *flags = shlex.split(command)
        config = importlib.import_module(script.removesuffix(".py")).Config
        monkeypatch.setattr(sys, "argv", [script, *flags])
        commandline.parse(config, "")


def test_what_is_missing_is_installed_and_pytorch_stays(monkeypatch, tmp_path, capsys):
    """pip is asked for the missing ones alone, with PyTorch and Triton pinned to what is there."""
    [cell] = [text_of(c) for c in CELLS if "importlib.metadata" in text_of(c)]
    there = {"torch": "2.4.1+cu121", "triton": "3.0.0", "numpy": "2.1.0", "pillow": "11.0"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    asked = []
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    names = {"BOOK": REPO, "WORK": tmp_path, "subprocess": subprocess, "sys": sys}
    exec(cell, names)
    [command] = asked
    assert command[1:6] == ["-m", "pip", "install", "-q", "-c"]
    assert {"tyro", "einops"} <= {*command[7:]} and not {*there} & {*command[7:]}
    pins = Path(command[6]).read_text().split()
    assert pins == ["torch==2.4.1+cu121", "triton==3.0.0"]
    said = capsys.readouterr().out
    assert "torch 2.4.1+cu121 (asked for: 2." in said and "numpy" not in said


@pytest.mark.parametrize("places, found", [(["book/notebooks", "book"], "book"), (["."], "")])
def test_where_the_book_is_found(places, found, tmp_path, monkeypatch):
    """From its own folder; elsewhere it is cloned from REPO, which must have been typed."""
    [cell] = [text_of(c) for c in CELLS if "def find_book" in text_of(c)]
    (tmp_path / "book" / "notebooks").mkdir(parents=True)
    (tmp_path / "book" / "ldm_cfg.py").write_text("")
    cloned = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: cloned.append(command))
    definition = cell[cell.index("def find_book") : cell.index("BOOK =")]
    names = {"REPO": "https://github.com/me/mine", "subprocess": subprocess, "Path": Path}
    exec(definition, names)
    for place in places:
        monkeypatch.chdir(tmp_path / place)
        book = names["find_book"]()
        assert book == (tmp_path / found if found else tmp_path / "diffusion-book")
        assert bool(cloned) is not bool(found)
    if cloned:
        assert cloned[0][:2] == ["git", "clone"] and names["REPO"] in cloned[0]
        names["REPO"] = "https://github.com/OWNER/diffusion-book"
        with pytest.raises(SystemExit, match="Type in REPO"):
            names["find_book"]()
