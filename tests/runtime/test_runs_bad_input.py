"""Bad input: exit code 2 and one line that says what was wrong; never a traceback.

Over every command and every training of the root. What only parses and checks its settings runs in
this process; what would go on, in one of its own.
"""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput, RunConfig, entry, flag
from runtime.processes import launch
from runtime.typed_flags import check_finite

import importlib
import math
import os
import subprocess
import sys
import typing
from dataclasses import replace

import numpy as np
import pytest
from data_files import write_images
from launching import Done, refusal, refused, succeed
from PIL import Image
from tiny_runs import COMMANDS, DRAWING, TRAININGS, fields, flags


@pytest.fixture
def refuses(monkeypatch, capfd):
    """refused(), but in this process."""

    def refuse(script, *arguments):
        argv = [f"{script}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            entry(importlib.import_module(script).main)
        return refusal(Done(stop.value.code, *capfd.readouterr()))

    return refuse


# ------------------------------------------------------------------------------- every command


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize(
    "given, named",
    [
        (["--daat", "mnist"], ["--daat", "did you mean --data?"]),
        (["--learning-rate-of-the-moon", 1], ["unknown flag --learning-rate-of-the-moon"]),
        (["--seed", "many"], ["--seed", "many"]),
        (["--seed", "1.5"], ["--seed", "1.5"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml", "no such file"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_flag_that_is_unknown_or_of_another_type(script, given, named, refuses):
    line = refuses(script, *given)
    assert all(text in line for text in named), line


YAMLS = {
    "unknown key": ("batchsize: 8\n", ["batchsize", "did you mean batch_size?"]),
    "wrong type": ("seed: many\n", ["--seed", "many"]),
    "no value": ("data:\n", ["data has no value"]),
    "a list": ("- 1\n- 2\n", ["key: value"]),
    "not YAML": ("data: [1, 2\n", ["is not YAML"]),
    "not text": (b"\xff\xfe\x00", ["is not UTF-8"]),
    "config in config": ("config: other.yaml\n", ["config"]),
    "list for a number": ("seed: [1, 2]\n", ["2"]),
}


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("text, named", YAMLS.values(), ids=YAMLS)
def test_yaml(script, text, named, tmp_path, refuses):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refuses(script, "--config", path, "--gpus", 0, "--data-root", tmp_path)
    assert all(part in line for part in named), line


@pytest.mark.parametrize("script", ["ddpm_pixel", "eval_fid"])
def test_from_a_shell(script, repo):
    command = [sys.executable, str(repo / f"{script}.py"), "--dta", "x"]
    check_shell(command, "--data", repo)


def test_the_command_of_the_data_from_a_shell(repo):
    check_shell([sys.executable, "-m", "image_data", "mnits"], "did you mean mnist?", repo)


def check_shell(command, named, repo):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert named in done.stderr


def test_what_the_terminal_cannot_print_ends_no_work(repo, tmp_path):
    """Fréchet and ² under an ASCII locale; a class whose name is not ASCII in an error."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "GOMP_SPINCOUNT": "1000"}
    text = "import runtime.commandline as c, sys; c.entry(lambda: print('Fr\\u00e9chet'))"
    done = subprocess.run([sys.executable, "-c", text], cwd=repo, capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (0, b"Fr\\xe9chet\n"), done.stderr
    command = [sys.executable, "ddpm_pixel.py", "--data", "no/K\u00e4fer"]
    done = subprocess.run(command, cwd=repo, capture_output=True, env=env)
    assert done.returncode == 2 and b"no/K\\xe4fer" in done.stderr


def test_no_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    for gpus, name in ((0, r"no g\+\+"), (1, "no gcc")):
        with pytest.raises(BadInput, match=f"--compile needs a compiler, .*{name}"):
            launch(None, RunConfig(compile=True, gpus=gpus))
    monkeypatch.setenv("CXX", "own++")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "own++" else None)
    seen = []
    launch(lambda cfg, world: seen.append(cfg.compile), RunConfig(compile=True, gpus=0))
    assert seen == [True]


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        entry(lambda: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        entry(lambda: (_ for _ in ()).throw(BadInput("mend this")))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: mend this\n"


# ------------------------------------------------------------------------------ every training

SETTINGS = [  # flags, what the one line must name
    (["--data", "mnits"], ["mnits", "did you mean mnist?"]),
    (["--data", "/no/such/folder"], ["/no/such/folder"]),
    (["--data", "/no/such/zip.zip"], ["/no/such/zip.zip"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", 0], ["--steps", "got 0"]),
    (["--lr", "-0.001"], ["--lr", "-0.001"]),
    (["--lr-decay", "line"], ["--lr-decay", "line"]),
    (["--schedule", "square"], ["--schedule", "square"]),
    (["--channel-mult", "1", "0"], ["--channel-mult", "(1, 0)"]),
    (["--ema", "1.5"], ["--ema", "1.5"]),
    (["--label-dropout", "-0.1"], ["--label-dropout", "-0.1"]),
    (["--num-heads", 3], ["--num-heads 3"]),
    (["--model-channels", 33, "--num-heads", 1], ["--model-channels 33 must be even"]),
    (["--warmup", "-1"], ["--warmup", "-1"]),
    (["--sample-every", "-5"], ["--sample-every", "-5"]),
    (["--save-every", 7, "--log-every", 2], ["--save-every 7", "--log-every 2"]),
    (["--keep-every", 7, "--save-every", 2, "--log-every", 1], ["--keep-every 7", "--save-every"]),
    (["--seeds", "abc"], ["--seeds abc", "17 or 0-63,100"]),
    (["--seeds", "9-3"], ["--seeds 9-3"]),
    (["--seeds", ","], ["--seeds ,"]),
    (["--seeds", "99999999999999999999"], ["--seeds 99999999999999999999"]),
    (["--sample-steps", 2000], ["--sample-steps 2000", "1000 timesteps"]),
    (["--gpus", 8], ["--gpus 8", "this machine has"]),
    (["--gpus", "-1"], ["--gpus -1"]),
    (["--sample", "/no/such/ckpt.pt"], ["/no/such/ckpt.pt"]),
    (["--size", "-4"], ["--size -4"]),
]
# Of a network that has no such flag, or where it means something else.
SKIPPED = {("autoencoder", "--model-channels")}


def has(script, given):
    """Whether the chapter has all the settings that are given, for training."""
    names = [flag[2:].replace("-", "_") for flag in given if str(flag).startswith("--")]
    names += ["timesteps"] * ("sample_steps" in names)  # a chain, which has so many
    has_part = set(fields(script)) - importlib.import_module(script).Config.IDLE
    return set(names) <= has_part and (script, given[0]) not in SKIPPED


CASES = [
    pytest.param(script, given, named, id=f"{script} {' '.join(map(str, given))}")
    for script in TRAININGS
    for given, named in SETTINGS
    if has(script, given)
]


@pytest.mark.parametrize("script, given, named", CASES)
def test_setting(script, given, named, toy, tmp_path, refuses):
    data = [] if given[0] == "--sample" else toy
    line = refuses(script, "--smoke", "--gpus", 0, *data, "--out", tmp_path / "out", *given)
    assert all(text in line for text in named), line
    assert not list(tmp_path.rglob("*.pt"))


def numbers(script, kind):
    """{name: how many numbers} of every setting of a training that is a number of this kind."""
    found = {}
    for name, field in fields(script).items():
        inner = [part for part in typing.get_args(field.type) if part is not Ellipsis]
        if kind in (field.type, *inner):
            found[name] = max(1, len(inner)) if typing.get_origin(field.type) is tuple else 0
    return found


@pytest.mark.parametrize("script", TRAININGS)
def test_no_count_is_negative(script):
    chapter, found = importlib.import_module(script), numbers(script, int)
    assert "steps" in found and len(found) > 5
    for name, many in found.items():
        cfg = chapter.Config(gpus=0)
        with pytest.raises(BadInput) as refusal:
            chapter.check(replace(cfg, **{name: (-1,) * many if many else -1}))
        assert f"{flag(name)} " in str(refusal.value)


@pytest.mark.parametrize("script", [*COMMANDS, "stable_diffusion"])
def test_every_number_is_finite(script):
    """What float32 does not hold is refused by parse, whatever the setting is for."""
    config, found = importlib.import_module(script).Config, numbers(script, float)
    for name, many in found.items():
        for bad in (math.nan, math.inf, -math.inf, 1e39):
            with pytest.raises(BadInput, match=f"^{flag(name)} .* finite"):
                check_finite(config(gpus=0, **{name: (bad,) * many if many else bad}))
    check_finite(config(gpus=0))
    if "guidance" in found:  # where 1 + w is w, a clamp turns both into saturated pictures
        with pytest.raises(
            BadInput, match="^--guidance -1e\\+30: expected a number up to 1.7e\\+07"
        ):
            check_finite(config(gpus=0, guidance=-1e30))


@pytest.mark.parametrize("bad", ["nan", "inf", "-1e39"])
def test_numbers_that_are_typed_are_finite(bad, refuses):
    for script in ("ddpm_pixel", "ddim", "compare_samplers", "edm", "stable_diffusion"):
        assert refuses(script, "--guidance", bad).startswith("error: --guidance ")
    assert refuses("edm", "--S-churn", "0", bad).startswith("error: --S-churn ")


@pytest.mark.parametrize("script", TRAININGS)
def test_batch_that_processes_cannot_share(script, toy, tiny, monkeypatch, refuses):
    where = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    line = refuses(script, *tiny[script], *toy, "--batch-size", 7)
    assert "--batch-size 7" in line and "2 processes" in line and "6" in line and "8" in line


@pytest.mark.parametrize("script", TRAININGS)
def test_out_that_cannot_be_a_folder(script, toy, tiny, tmp_path, refuses):
    (tmp_path / "file").write_text("")
    assert "--out" in refuses(script, *tiny[script], *toy, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize("script", TRAININGS)
def test_loss_that_is_not_finite(script, toy, tiny, tmp_path):
    given = [*tiny[script], *toy, "--out", tmp_path, "--lr", "1e30", "--clip-grad", "1e30"]
    line = refused(script, *given, "--warmup", 0, "--log-every", 1, "--save-every", 1)
    assert "not finite at step" in line and "smaller --lr" in line and "checkpoint" in line
    first = tmp_path / "flow"  # of rectified_flow.py, which trains one first
    state = load_checkpoint((first if first.exists() else tmp_path) / "ckpt.pt")
    assert f"at step {state['step']};" in line  # counted from 0: the first step after it


@pytest.mark.parametrize("script", DRAWING)
def test_classes_out_of_range(script, toy, tiny, tmp_path):
    given = [*tiny[script], *toy, "--out", tmp_path, "--steps", 1, "--sample-every", 0]
    line = refused(script, *given, "--classes", "2")
    assert "--classes 2" in line and "0 bars, 1 dots" in line
    succeed(script, *given)
    asked = ["--gpus", 0, "--sample", tmp_path / "ckpt.pt", "--sample-steps", 1]
    for classes in ("2", "bars,cat", "-1", "²"):
        assert "0 bars, 1 dots" in refused(script, *asked, "--classes", classes)
    if "timesteps" in fields(script):
        line = refused(script, *asked[:-1], 1001)
        assert "--sample-steps 1001" in line and "1000" in line


@pytest.mark.parametrize("script", [s for s in TRAININGS if "class_cond" in fields(s)])
def test_classes_and_guidance_where_there_are_none(script, tiny, tmp_path):
    flat = write_images(tmp_path / "flat", 8, classes=())
    given = [*tiny[script], "--data", flat, "--data-root", tmp_path, "--out", tmp_path]
    succeed(script, *given, "--steps", 1)
    asked = ["--gpus", 0, "--sample", tmp_path / "ckpt.pt", "--sample-steps", 1]
    assert "no class" in refused(script, *asked, "--classes", "0")
    assert "knows no labels" in refused(script, *asked, "--guidance", 1)


@pytest.mark.parametrize("script", [s for s in TRAININGS if "class_cond" in fields(s)])
def test_guidance_without_labels_is_refused_before_training(script, tmp_path, toy, tiny):
    given = [*tiny[script], *toy, *flags(script, class_cond=False, guidance=1), "--out", tmp_path]
    assert "knows no labels" in refused(script, *given)
    assert not (tmp_path / "ckpt.pt").exists()


# -------------------------------------------------------------------------------------- images


def images_of(height, width, tmp_path):
    folder = write_images(tmp_path / f"{height}x{width}", 8, height=height, width=width)
    return ["--data", folder, "--data-root", tmp_path, "--out", tmp_path / "out", "--gpus", 0]


def test_size_that_the_network_cannot_halve(tmp_path, refuses):
    given = images_of(30, 30, tmp_path)
    line = refuses("ddpm_pixel", *given, "--channel-mult", 1, 2, 2)
    assert "30x30" in line and "multiples of 4" in line
    assert "multiples of 4" in refuses("ldm_cfg", *given, "--patch", 4)
    line = refuses("ldm_cfg", *given, "--patch", 2, "--ae-mult", 1, 1, 1)
    assert "multiples of 8" in line and "--size 32" in line


def test_images(tmp_path, refuses):
    given = ["--data-root", tmp_path / "root", "--out", tmp_path / "out", "--gpus", 0]
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refuses("ddpm_pixel", "--data", empty, *given)
    assert str(empty) in line and "no images" in line

    mixed = write_images(tmp_path / "mixed", 4)
    write_images(mixed / "more", 2, height=20)
    line = refuses("ddpm_pixel", "--data", mixed, *given)
    assert "16x16" in line and "16x20" in line and "--size" in line

    for name, content in {"cut.png": None, "words.jpg": b"not an image"}.items():
        folder = write_images(tmp_path / name.split(".")[0], 4)
        noise = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
        path = folder / "bars" / name
        Image.fromarray(noise).save(path, "PNG")
        path.write_bytes(content or path.read_bytes()[:150])
        assert name in refuses("ddpm_pixel", "--data", folder, *given)
    assert not [p for p in (tmp_path / "root").iterdir() if p.is_dir()]  # nothing half-prepared
