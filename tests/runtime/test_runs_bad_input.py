"""Bad input: exit code 2 and one line that says what was wrong; never a traceback."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput, entry

import os
import subprocess
import sys

import numpy as np
import pytest
from data_files import write_images
from launching import run, succeed
from PIL import Image

BOTH = ("ddpm_pixel", "ldm_cfg")


def refusal(done):
    """The one line on standard error, without progress bars."""
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    return lines[0]


SETTINGS = [  # flags, what the one line must name
    (["--daat", "mnist"], ["--daat", "did you mean --data?"]),
    (["--learning-rate-of-the-moon", 1], ["unknown flag --learning-rate-of-the-moon"]),
    (["--data", "mnits"], ["mnits", "did you mean mnist?"]),
    (["--data", "/no/such/folder"], ["/no/such/folder"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "1.5"], ["--steps", "1.5"]),
    (["--steps", 0], ["--steps", "got 0"]),
    (["--lr", "-0.001"], ["--lr", "-0.001"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--schedule", "square"], ["--schedule", "square"]),
    (["--mult", "1", "0"], ["--mult", "(1, 0)"]),
    (["--ema", "1.5"], ["--ema", "1.5"]),
    (["--label-dropout", "-0.1"], ["--label-dropout", "-0.1"]),
    (["--heads", 3], ["--heads 3"]),
    (["--width", 33, "--heads", 1], ["--width 33 must be even"]),
    (["--seed", "-1"], ["--seed", "-1"]),
    (["--warmup", "-1"], ["--warmup", "-1"]),
    (["--sample-every", "-5"], ["--sample-every", "-5"]),
    (["--save-every", 7, "--log-every", 2], ["--save-every 7", "--log-every 2"]),
    (["--seeds", "abc"], ["--seeds abc", "17 or 0-63,100"]),
    (["--seeds", "9-3"], ["--seeds 9-3"]),
    (["--seeds", ","], ["--seeds ,"]),
    (["--seeds", "99999999999999999999"], ["--seeds 99999999999999999999"]),
    (["--sample-steps", 2000], ["--sample-steps 2000", "--timesteps 1000"]),
    (["--gpus", 8], ["--gpus 8", "this machine has"]),
    (["--gpus", "-1"], ["--gpus -1"]),
    (["--sample", "/no/such/ckpt.pt"], ["/no/such/ckpt.pt", "no such file"]),
    (["--config", "/no/such.yaml"], ["/no/such.yaml", "no such file"]),
    (["--size", "-4"], ["--size -4"]),
]


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("flags, named", SETTINGS, ids=[" ".join(map(str, f)) for f, _ in SETTINGS])
def test_setting(script, flags, named, tmp_path):
    line = refusal(run(script, "--gpus", 0, "--data-root", tmp_path, "--out", tmp_path, *flags))
    for text in named:
        assert text in line
    assert not list(tmp_path.glob("*.pt"))


YAMLS = {
    "unknown key": ("batchsize: 8\n", ["batchsize", "did you mean batch_size?"]),
    "wrong type": ("steps: many\n", ["--steps", "many"]),
    "no value": ("data:\n", ["data has no value"]),
    "a list": ("- 1\n- 2\n", ["key: value"]),
    "not YAML": ("data: [1, 2\n", ["is not YAML"]),
    "not text": (b"\xff\xfe\x00", ["is not YAML"]),
    "config in config": ("config: other.yaml\n", ["config"]),
    "list for a number": ("steps: [1, 2]\n", ["2"]),
}


@pytest.mark.parametrize("text, named", YAMLS.values(), ids=YAMLS)
def test_yaml(text, named, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(run("ldm_cfg", "--config", path, "--gpus", 0, "--data-root", tmp_path))
    for part in named:
        assert part in line


def images_of(height, width, tmp_path):
    folder = write_images(tmp_path / f"{height}x{width}", 8, height=height, width=width)
    return ["--data", folder, "--data-root", tmp_path, "--out", tmp_path / "out", "--gpus", 0]


def test_size_that_the_network_cannot_halve(tmp_path):
    flags = images_of(30, 30, tmp_path)
    line = refusal(run("ddpm_pixel", *flags, "--mult", 1, 2, 2))
    assert "30x30" in line and "multiples of 4" in line
    assert "multiples of 4" in refusal(run("ldm_cfg", *flags, "--patch", 4))
    line = refusal(run("ldm_cfg", *flags, "--patch", 2, "--ae-mult", 1, 1, 1))
    assert "multiples of 8" in line and "--size 32" in line


def test_batch_that_processes_cannot_share(toy, tiny):
    for script in BOTH:
        flags = [*tiny[script], *toy, "--batch-size", 7]
        line = refusal(run(script, *flags, env={"WORLD_SIZE": "2", "RANK": "0"}))
        assert "--batch-size 7" in line and "2 processes" in line and "6" in line and "8" in line


def test_classes_out_of_range(toy, tiny, tmp_path):
    for script in BOTH:
        flags = [*tiny[script], *toy, "--out", tmp_path / script, "--steps", 1]
        flags += ["--sample-every", 0]
        line = refusal(run(script, *flags, "--classes", "2"))
        assert "--classes 2" in line and "0 bars, 1 dots" in line
        succeed(script, *flags)
        asked = ["--gpus", 0, "--sample", tmp_path / script / "ckpt.pt", "--sample-steps", 1]
        for classes in ("2", "bars,cat", "-1", "²"):
            line = refusal(run(script, *asked, "--classes", classes))
            assert "0 bars, 1 dots" in line
        line = refusal(run(script, *asked[:-1], 1001))
        assert "--sample-steps 1001" in line and "1000" in line
        line = refusal(run(script, *flags, "--timesteps", 500))
        assert "another configuration" in line and "timesteps 1000 there, 500 here" in line
        assert "no such file" in refusal(run(script, *flags, "--resume", "always"))


def test_classes_where_there_are_none(tiny, tmp_path):
    flat = write_images(tmp_path / "flat", 8, classes=())
    flags = [*tiny["ddpm_pixel"], "--data", flat, "--data-root", tmp_path, "--out", tmp_path]
    succeed("ddpm_pixel", *flags, "--steps", 1)
    asked = ["--gpus", 0, "--sample", tmp_path / "ckpt.pt", "--sample-steps", 1, "--classes", "0"]
    assert "no class" in refusal(run("ddpm_pixel", *asked))


def test_images(tmp_path):
    flags = ["--data-root", tmp_path / "root", "--out", tmp_path / "out", "--gpus", 0]
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refusal(run("ddpm_pixel", "--data", empty, *flags))
    assert str(empty) in line and "no images" in line

    mixed = write_images(tmp_path / "mixed", 4)
    write_images(mixed / "more", 2, height=20)
    line = refusal(run("ddpm_pixel", "--data", mixed, *flags))
    assert "16x16" in line and "16x20" in line and "--size" in line

    for name, content in {"cut.png": None, "words.jpg": b"not an image"}.items():
        folder = write_images(tmp_path / name.split(".")[0], 4)
        noise = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
        path = folder / "bars" / name
        Image.fromarray(noise).save(path, "PNG")
        path.write_bytes(content or path.read_bytes()[:150])
        line = refusal(run("ddpm_pixel", "--data", folder, *flags))
        assert name in line
    assert not [p for p in (tmp_path / "root").iterdir() if p.is_dir()]  # nothing half-prepared


def test_out_that_cannot_be_a_folder(toy, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for script in BOTH:
        flags = [*tiny[script], *toy, "--out", tmp_path / "file" / "run"]
        assert "--out" in refusal(run(script, *flags))


def test_loss_that_is_not_finite(toy, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *toy, "--out", tmp_path, "--lr", "1e30", "--clip-grad", "1e30"]
    line = refusal(run("ddpm_pixel", *flags, "--warmup", 0, "--log-every", 1, "--save-every", 1))
    assert "not finite at step" in line and "smaller --lr" in line and "checkpoint" in line
    state = load_checkpoint(tmp_path / "ckpt.pt")
    assert f"at step {state['step']};" in line  # counted from 0: the first step after it


@pytest.mark.parametrize(
    "script, flags, named",
    [
        ("ddpm_pixel.py", ["--dta", "x"], "--data"),
        ("ldm_cfg.py", ["--gpus", "8"], "--gpus 8"),
        ("ldm_cfg.py", ["--data", "/no/such/zip.zip"], "/no/such/zip.zip"),
        ("-m", ["image_data", "mnits"], "did you mean mnist?"),
    ],
)
def test_from_a_shell(repo, script, flags, named):
    command = [sys.executable, script if script == "-m" else str(repo / script), *flags]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert named in done.stderr


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        entry(lambda: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        entry(lambda: (_ for _ in ()).throw(BadInput("mend this")))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: mend this\n"
