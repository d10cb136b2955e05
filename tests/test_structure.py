"""The form of the project: who imports whom, and how long a file may be."""

import ast
import importlib.util
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "schedules", "unet", "likelihood", "ddpm_pixel", "ddim", "inversion", "compare",
    "vae", "vq", "perceptual", "autoencoder", "latents", "latent_unet", "dit", "ldm_cfg",
    "published_dit",
    "features", "inception", "metrics", "memorisation", "image_sets", "evaluation", "eval_fid",
}  # fmt: skip
ALL = sorted(
    path
    for folder in (".", "kernels", "support", "tests", "tests/interpreter", "bench")
    for path in (REPO / folder).glob("*.py")
)
OURS = {path.stem for path in REPO.glob("*.py")} | {"kernels", "support"}

# Of the project's own modules, what each may import; kernels/ and support/ follow below.
MAY = {
    "runtime": {"support"},
    "data": {"runtime", "support"},
    "unet": {"kernels", "runtime"},
    "schedules": {"kernels", "support"},
    "likelihood": {"kernels", "data", "runtime", "support"},
    "ddpm_pixel": {
        "kernels", "data", "runtime", "support", "schedules", "unet", "likelihood", "evaluation",
    },  # fmt: skip
    "ddim": {"kernels", "runtime", "support", "ddpm_pixel", "inversion", "compare"},
    "inversion": {"kernels", "data", "runtime", "ddim", "support"},
    "compare": {"ddim", "evaluation", "runtime", "support"},
    "vae": {"kernels", "runtime", "support", "unet"},
    "vq": set(),
    "perceptual": {"kernels", "runtime", "support"},
    "autoencoder": {"kernels", "data", "runtime", "support", "unet", "vae", "vq", "perceptual"},
    "latents": {"data", "runtime", "support"},
    "latent_unet": {"kernels", "runtime", "unet"},
    "dit": {"kernels", "runtime", "support", "unet"},
    "ldm_cfg": {
        "kernels", "data", "runtime", "support", "schedules", "likelihood", "autoencoder",
        "latents", "latent_unet", "dit",
    },  # fmt: skip
    "published_dit": {"runtime", "support", "dit", "vae", "ldm_cfg"},
    "features": {"data", "runtime", "support"},
    "inception": {"runtime", "support"},
    "metrics": {"runtime"},
    "memorisation": {"metrics"},
    "image_sets": {"data", "runtime", "support", "features"},
    "evaluation": {
        "data", "runtime", "support", "features", "metrics", "memorisation", "image_sets",
    },  # fmt: skip
    "eval_fid": {
        "runtime", "support", "features", "inception", "metrics", "evaluation", "image_sets",
    },  # fmt: skip
}


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


def test_every_script_has_its_rule():
    assert {path.stem for path in REPO.glob("*.py")} == set(MAY)


@pytest.mark.parametrize("name", MAY)
def test_who_imports_whom(name):
    assert imported(REPO / f"{name}.py") & OURS <= MAY[name]


@pytest.mark.parametrize("path", sorted((REPO / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton(path):
    assert imported(path) <= {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((REPO / "support").glob("*.py")), ids=lambda p: p.name)
def test_support_imports_no_script(path):
    assert imported(path) & OURS <= {"support"}


def test_only_the_promised_packages():
    """Nothing beyond what pyproject.toml installs, and nothing of torch's neighbours."""
    promised = {"torch", "triton", "einops", "numpy", "PIL", "scipy", "tqdm", "tyro", "yaml"}
    promised |= {"safetensors", "matplotlib"} | OURS | set(sys.stdlib_module_names)
    for path in ALL:
        if path.parent.name not in ("tests", "interpreter", "bench"):
            assert imported(path) <= promised, path.name


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(REPO)))
def test_file_is_short_and_finished(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= (500 if path.parent == REPO and path.stem in SCRIPTS else 350)
    wide = [sum(not unicodedata.combining(c) for c in line) for line in lines]
    assert max(wide, default=0) <= 100
    for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
        assert not [line for line in lines if mark in line]


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
