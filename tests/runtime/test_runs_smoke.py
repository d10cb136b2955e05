"""Every chapter runs in seconds on every kind of images, and leaves the run directory it should."""

from runtime.commandline import parse
from runtime.files import read_log
from runtime.sums import NOTE

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from data_files import write_images
from launching import refused, succeed
from PIL import Image
from run_folders import saved
from tiny_runs import DRAWING, SAMPLERS, TRAININGS, fields, flags

# They sample chains of timesteps in pixel space.
CHAINS = [script for script in TRAININGS if {"class_cond", "timesteps"} <= {*fields(script)}]


def pngs(folder):
    return sorted(p.name for p in folder.glob("*.png"))


def check_samples(folder, shape, count, classes):
    """samples.npz in the layout of the ADM evaluation suite, and its grid."""
    found = np.load(folder / "samples.npz")
    assert found["arr_0"].shape == (count, *shape) and found["arr_0"].dtype == np.uint8
    if classes:
        assert np.array_equal(found["arr_1"], np.arange(count) % classes)
    else:
        assert "arr_1" not in found
    grid = np.asarray(Image.open(folder / "samples.png"))
    columns, rows = 10, -(-count // 10)
    assert grid.shape[:2] == (rows * (shape[0] + 2) + 2, columns * (shape[1] + 2) + 2)
    assert grid.ndim == (2 if shape[2] == 1 else 3)
    first = grid[2 : 2 + shape[0], 2 : 2 + shape[1]].reshape(shape)
    assert np.array_equal(first, found["arr_0"][0])


KINDS = {  # height, width, channels, classes
    "gray in classes": (16, 16, 1, ("one", "two", "three")),
    "colour, flat": (16, 16, 3, ()),
    "24x32 colour in classes": (24, 32, 3, ("one", "two")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", TRAININGS)
def test_smoke(script, kind, tmp_path):
    height, width, channels, classes = KINDS[kind]
    size = {"height": height, "width": width, "channels": channels}
    folder = write_images(tmp_path / "images", 20, **size, classes=classes)
    given = ["--data", folder, "--data-root", tmp_path / "root", "--gpus", 0]
    if "classifier" in fields(script) and not classes:
        line = refused(script, "--smoke", *given, "--out", tmp_path / "out")
        assert "no two classes" in line and "--data" in line
        return
    succeed(script, "--smoke", *given, "--out", tmp_path / "out")
    out, shape = tmp_path / "out", (height, width, channels)
    assert {"loss.png", "samples-000002.png"} <= set(pngs(out))
    if script in DRAWING:
        check_samples(out, shape, 8, len(classes))
    if "class_cond" not in fields(script):
        return
    for sampler in SAMPLERS if script in CHAINS else []:
        walk = ["--sample", out / "ckpt.pt", "--out", tmp_path / sampler, "--gif", "--gpus", 0]
        succeed(sampler, "--smoke", *walk)
        check_samples(tmp_path / sampler, shape, 8, len(classes))
    if classes:
        succeed(script, "--smoke", *given, "--out", tmp_path / "b", "--no-class-cond")
        check_samples(tmp_path / "b", shape, 8, 0)


@pytest.mark.parametrize("script", TRAININGS)
def test_smoke_on_photographs(script, shared_data, tmp_path):
    given = ["--data-root", tmp_path / "root", "--gpus", 0]
    sets = {
        "photos": (shared_data / "imagenet-samples", ["--size", 32]),
        "cifar": (shared_data / "cifar10" / "cifar10-jpeg.zip", ["--classes", "0,1"]),
    }
    for name, (data, extra) in sets.items():
        if name == "cifar":
            data = some_of_zip(data, tmp_path / "cifar.zip")
        out = tmp_path / name
        succeed(script, "--smoke", "--data", data, *extra, *given, "--out", out)
        folders = [out] if script in DRAWING else []
        for sampler in SAMPLERS if script in CHAINS else []:
            folders.append(tmp_path / f"{name}-{sampler}")
            walk = ["--sample", out / "ckpt.pt", "--out", folders[-1], "--gpus", 0]
            succeed(sampler, "--smoke", *walk)
        for folder in folders:
            assert np.load(folder / "samples.npz")["arr_0"].shape == (8, 32, 32, 3)


def some_of_zip(path, to, keep=300):
    """A zip of every so many files of a zip, so that preparing it takes no minute."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as part:
        names = [n for n in archive.namelist() if not n.endswith("/")]
        for name in names[:: max(1, len(names) // keep)]:
            part.writestr(name, archive.read(name))
    return to


@pytest.mark.parametrize("script", TRAININGS)
def test_smoke_from_a_shell(script, repo, toy, tmp_path):
    command = [sys.executable, str(repo / f"{script}.py"), "--smoke", *toy, "--gpus", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("smoke-")
    assert saved(out)["step"] == 4
    if script in DRAWING:
        check_samples(out, (16, 16, 1), 8, 2)


@pytest.mark.parametrize("script", TRAININGS)
def test_smoke_keeps_what_is_typed_but_not_what_a_file_says(script, toy, tmp_path):
    settings = tmp_path / "big.yaml"
    settings.write_text("steps: 1000000\nbatch_size: 4\n")
    given = ["--config", settings, *toy, "--gpus", 0, "--steps=5"]
    given += [] if "classifier" in fields(script) else ["--n", 3]
    succeed(script, "--smoke", *given, "--out", tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    if "classifier" in fields(script):
        return  # it draws nothing
    drawn = "samples.npz" if script in DRAWING else "reconstructions.npz"
    assert len(np.load(tmp_path / "run" / drawn)["arr_0"]) == 3


@pytest.mark.parametrize("script", TRAININGS)
def test_run_directory(script, toy, tiny, tmp_path):
    out, config = tmp_path / "a run", importlib.import_module(script).Config
    given = [*tiny[script], *toy, "--steps", 7, "--log-every", 3, "--sample-every", 3]
    given += ["--tensorboard"] if importlib.util.find_spec("tensorboard") else []
    done = succeed(script, *given, "--out", out)

    # config.yaml: the command, the versions, and settings that make the same run again
    header, versions, *rest = (out / "config.yaml").read_text().splitlines()
    words = shlex.split(header.removeprefix("# "))
    assert words[1].endswith(f"{script}.py")
    assert words[2:] == [*map(str, given), "--out", str(out)]
    assert f"torch {torch.__version__}" in versions and f"numpy {np.__version__}" in versions
    written = config(**yaml.safe_load("\n".join(rest)))
    read = parse(config, "", ["--config", str(out / "config.yaml")])
    mine = {k: v for k, v in vars(read).items() if k != "config"}
    assert json.loads(json.dumps(mine)) == {k: v for k, v in vars(written).items() if k != "config"}
    assert read.steps == 7 and read.out == str(out) and read.ema == config().ema

    # log.jsonl: steps 3, 6 and the last, 7
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [3, 6, 7]
    for row in log:
        assert {"step", "loss", "lr", "images_per_s"} <= set(row) and row["images_per_s"] > 0
        quarters = [row[f"loss_q{i}"] for i in range(1, 5) if f"loss_q{i}" in row]
        if "timesteps" in fields(script):
            assert min(quarters) <= row["loss"] <= max(quarters)

    state = saved(out)
    assert state["script"] == script and state["step"] == 7 and state["config"]["steps"] == 7
    assert {"model", "ema", "optimizer", "config", "shape", "class_names"} <= set(state)
    assert state["class_names"] == ["bars", "dots"] and state["shape"] == [1, 16, 16]
    assert saved(out, "ckpt-previous.pt")["step"] == 6

    expected = {"loss.png", "samples-000003.png", "samples-000006.png"}
    assert expected <= set(pngs(out)) and (out / "report.html").is_file()
    if script in DRAWING:
        assert str(out / "samples.png") in done.out
        check_samples(out, (16, 16, 1), 4, 2)
    assert np.asarray(Image.open(out / "loss.png").convert("L")).std() > 5
    assert {p.name for p in out.rglob(".*")} <= {NOTE}


@pytest.mark.parametrize("script", [s for s in DRAWING if "guidance" in fields(s)])
def test_sampling_takes_what_it_is_not_given_from_the_checkpoint(script, tmp_path, toy, tiny):
    """Here a guidance of 2; --guidance 0 and a file with it take its place."""
    out = tmp_path / "out"
    short = [*tiny[script], *flags(script, steps=12, lr=0.01, warmup=0, sample_every=0, guidance=2)]
    succeed(script, *toy, *short, "--out", out)
    trained = np.load(out / "samples.npz")["arr_0"]
    (tmp_path / "none.yaml").write_text("guidance: 0.0\n")
    ask = ["--sample", out / "ckpt.pt", "--seeds", "0-3", "--gpus", 0, "--out", tmp_path / "again"]
    drawn = []
    for more in ([], ["--guidance", 0], ["--config", tmp_path / "none.yaml"], ["--guidance=2"]):
        succeed(script, *ask, *more)
        drawn.append(np.load(tmp_path / "again" / "samples.npz")["arr_0"])
    assert np.array_equal(drawn[0], trained) and np.array_equal(drawn[3], trained)
    assert np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[1], trained)


@pytest.mark.parametrize("kind", ["copied", "linked"])
def test_a_chapter_under_another_name_samples_what_it_trained(kind, repo, tmp_path, monkeypatch):
    """A copy to edit has a name of its own; a link is the chapter itself, with its configs/."""
    path, chapter = tmp_path / "my_ddpm.py", repo / "ddpm_pixel.py"
    (shutil.copyfile if kind == "copied" else os.symlink)(chapter, path)
    spec = importlib.util.spec_from_file_location("my_ddpm", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_ddpm", module)
    spec.loader.exec_module(module)
    folder = write_images(tmp_path / "glyphs", 20)
    given = ["--data", folder, "--data-root", tmp_path, "--out", tmp_path / "run", "--gpus", 0]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        module.main()

    call("--smoke", *given)
    checkpoint = tmp_path / "run" / "ckpt.pt"
    assert saved(checkpoint.parent)["script"] == {"copied": "my_ddpm", "linked": "ddpm_pixel"}[kind]
    call("--sample", checkpoint, "--n", 2, "--sample-steps", 2, "--out", tmp_path / "again")
    assert np.load(tmp_path / "again" / "samples.npz")["arr_0"].shape[0] == 2
    if kind == "copied":  # others do not know what was edited in it
        line = refused("ddim", "--sample", checkpoint)
        assert "was written by my_ddpm.py, expected one of" in line
    else:
        preset = parse(module.Config, "", ["--data", "mnist"], preset="configs/{data}_pixel.yaml")
        assert preset.config == str(repo / "configs" / "mnist_pixel.yaml")
