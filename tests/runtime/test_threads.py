"""Threads do not spin each other to a halt: the variable is set before torch loads them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
TURNS = 3000  # what runtime sets
SCRIPTS = sorted(REPO.glob("*.py")) + [
    path for path in sorted((REPO / "bench").glob("*.py")) if "__main__" in path.read_text()
]
# Runs a script's imports until the first one of torch, and prints the variable at that moment.
UNTIL_TORCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
runpy.run_path(sys.argv[1])
print("it never imports torch")
"""


def python(*arguments, **variables):
    """The finished process of `python ARGUMENTS` with those of VARIABLES that are given."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=env | variables,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_script_sets_it_before_torch_is_imported(path):
    done = python("-c", UNTIL_TORCH, path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert said.isdecimal() or said == "it never imports torch"


def seen_by_openmp(program, **variables):
    """The number of turns that GNU's OpenMP prints when it is loaded, by a program that uses it."""
    done = python("-c", program, OMP_DISPLAY_ENV="verbose", **variables)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if not found:
        pytest.skip("this PyTorch has another OpenMP")
    return int(found[0])


def test_openmp_takes_it():
    assert seen_by_openmp("import runtime, torch") == TURNS
    assert seen_by_openmp("import torch") == 300_000


@pytest.mark.parametrize(
    ("variable", "value", "turns"),
    [("GOMP_SPINCOUNT", "77", 77), ("OMP_WAIT_POLICY", "PASSIVE", 0)],
)
def test_what_the_user_sets_stays(variable, value, turns):
    program = f"import runtime, torch, os; assert os.environ['{variable}'] == '{value}'"
    assert seen_by_openmp(program, **{variable: value}) == turns


def test_processes_that_a_script_starts_have_it():
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    program = "import os; print(os.environ['GOMP_SPINCOUNT'])"
    assert python("-c", f"import runtime; {start}", program).stdout == f"{TURNS}\n"
