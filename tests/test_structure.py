"""The form of the project: who imports whom, how long a file may be, and what a chapter holds."""

from runtime.commandline import RunConfig

import ast
import dataclasses
import fnmatch
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "image_data", "networks", "evaluation")
# Nothing imports upward or sideways: what stands here may import what stands before it. It is the
# only list of chapters: all else finds them in the root, by their Config.
ORDER = (
    *ROOMS,
    "eval_fid",
    "ddpm_pixel",
    "improved_ddpm",
    "ddim",
    "dpm_solver",
    "compare_samplers",
    "classifier_guidance",
    "edm",
    "autoencoder",
    "ldm_cfg",
    "dit",
    "flow_matching",
    "rectified_flow",
    "stable_diffusion",
    "bench",
)
CHAPTERS = sorted(REPO.glob("*.py"))
ALL = (
    sorted(path for part in (*ROOMS, "bench", "tests") for path in (REPO / part).rglob("*.py"))
    + CHAPTERS
)


def imported(path):
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(node.module.split(".")[0])
    return names


def name_of(path):
    return str(path.relative_to(REPO))


def place_of(path):
    """The room or chapter that a file belongs to."""
    return Path(name_of(path)).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in ALL if place_of(p) != "tests"], ids=name_of)
def test_nothing_imports_upward_or_sideways(path):
    place = place_of(path)
    allowed = set(ORDER[: ORDER.index(place)]) | ({place} if path not in CHAPTERS else set())
    allowed |= {"tests"} if place == "bench" else set()
    assert imported(path) & {*ORDER, "tests"} <= allowed


def modules(room):
    return [
        ".".join(p.relative_to(REPO).with_suffix("").parts) for p in (REPO / room).rglob("*.py")
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_in_a_room(room):
    """Imports at the top of the files of a room form no circle."""
    edges = {}
    for name in modules(room):
        path = REPO / Path(*name.split(".")).with_suffix(".py")
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        edges[name] = found
    left = dict(edges)
    while left:
        free = [name for name, found in left.items() if not found & left.keys() - {name}]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", sorted((REPO / "kernels").glob("*.py")), ids=name_of)
def test_kernels_import_only_torch_and_triton(path):
    assert imported(path) <= {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)


def test_only_the_promised_packages():
    """Nothing beyond what pyproject.toml installs, and nothing of torch's neighbours."""
    promised = {"torch", "triton", "einops", "numpy", "PIL", "scipy", "tqdm", "tyro", "yaml"}
    promised |= {"safetensors", "matplotlib", "wandb"} | set(ORDER) | set(sys.stdlib_module_names)
    for path in ALL:
        if place_of(path) not in ("tests", "bench"):
            assert imported(path) <= promised, path.name


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_file_is_short_and_finished(path):
    text = path.read_text()
    lines = text.splitlines()
    if place_of(path) != "kernels":
        assert len(lines) <= (500 if path in CHAPTERS else 450)
        assert "fmt" + ": skip" not in text and "fmt" + ": off" not in text
    wide = [sum(not unicodedata.combining(c) for c in line) for line in lines]
    assert max(wide, default=0) <= 100
    assert "raise NotImplemented" + "Error" not in text
    for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
        assert not [line for line in lines if mark in line]


def test_the_root_holds_chapters_and_nothing_else():
    assert {place_of(path) for path in CHAPTERS} <= set(ORDER) - {*ROOMS, "bench"}


def config_of(path):
    """(statements, source lines) of a chapter's class Config."""
    text = path.read_text()
    (config,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    return config.body, text.splitlines()


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_every_setting_of_a_chapter_is_documented(path):
    """By a comment on its line or a string below it, its line of --help; or it has RunConfig's."""
    body, lines = config_of(path)
    inherited = {field.name for field in dataclasses.fields(RunConfig)}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            told |= any("  # " in line for line in lines[node.lineno - 1 : node.end_lineno])
            assert told or node.target.id in inherited, node.target.id


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_begins_with_three_commands(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    commands = [
        line for line in text.splitlines() if line.startswith(("    python ", "    torchrun "))
    ]
    assert len(commands) >= 3 and any(f" {path.name}" in line for line in commands)


@pytest.mark.parametrize(
    "path", [p for p in ALL if p.name == "__init__.py" and p.parent.name != "kernels"], ids=name_of
)
def test_a_package_imports_nothing_of_ours(path):
    assert not imported(path) & set(ORDER)


@pytest.mark.parametrize("path", [p for p in ALL if place_of(p) != "tests"], ids=name_of)
def test_no_statement_runs_for_its_exception_alone(path):
    """A bare expression is a call, a yield or a docstring."""
    wanted = (ast.Call, ast.Yield, ast.YieldFrom, ast.Constant)
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Expr) or isinstance(node.value, wanted), node.lineno


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_what_is_said_to_be_slow_is_there():
    for line in (REPO / "tests" / "slow.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            path, name = line.split("::")
            tree = ast.parse((REPO / path).read_text())
            tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert fnmatch.filter(tests, name.split("?")[0]), line
