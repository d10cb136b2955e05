"""A checkpoint's data is a path: commands that read it notice when other images lie there."""

import shutil

import pytest
from data_files import noise, write_image
from launching import refusal, succeed
from launching import run as start
from tiny_runs import flags

RUNS = {
    "ddpm_pixel": {"schedule": "cosine"},
    "improved_ddpm": {},
    "edm": {"model": "ddpmpp", "ema_lengths": (0.05, 0.1), "snapshot_every": 1},
    "autoencoder": {},
    "classifier_guidance": {"metric_every": 0},
}
COMMANDS = {  # of the checkpoint of which run
    "eval_fid": ("ddpm_pixel", "eval_fid CKPT --n 4"),
    "curve": ("ddpm_pixel", "eval_fid FOLDER --curve --n 4"),
    "encode": ("ddpm_pixel", "ddim --encode CKPT --n 2 --encode-steps 2"),
    "solver": ("ddpm_pixel", "dpm_solver --encode CKPT --n 2 --encode-steps 2"),
    "compare": ("ddpm_pixel", "compare_samplers CKPT --n 4 --compare-steps 2 --gpus 0"),
    "nll": ("improved_ddpm", "improved_ddpm --nll CKPT --n 2"),
    "lengths": ("edm", "edm --sample CKPT --n 2 --sample-steps 2 --ema-length 0.05 0.1"),
    "report": ("autoencoder", "autoencoder --sample CKPT --n 2"),
    "study": ("ddpm_pixel", "classifier_guidance --study CKPT --classifier OTHER --n 2"),
}
TYPED = {"report", "encode"}  # what is quick is also run on the data that is typed


@pytest.fixture(scope="module")
def moved(toy, tiny, tmp_path_factory):
    """(runs, data): all were trained on the path `data`, where there is one more image by now."""
    folder = tmp_path_factory.mktemp("moved")
    data = shutil.copytree(toy[1], folder / "photos")
    given = ["--data", data, "--data-root", folder / "d"]
    for script, how in RUNS.items():
        how = ["--steps", 2, "--sample-every", 0, *flags(script, **how)]
        succeed(script, *tiny[script], *given, *how, "--out", folder / script)
    write_image(data / "bars" / "new.png", noise((16, 16)))
    return folder, data


@pytest.mark.parametrize("name", COMMANDS)
def test_other_images_at_the_path_of_a_checkpoint_are_refused(moved, tmp_path, name):
    folder, data = moved
    run, line = COMMANDS[name]
    words = {"FOLDER": folder / run, "CKPT": folder / run / "ckpt.pt"}
    words["OTHER"] = folder / "classifier_guidance" / "ckpt.pt"
    script, *given = (words.get(word, word) for word in line.split())
    given += [] if script == "eval_fid" else ["--out", tmp_path]
    told = refusal(start(script, *given))
    assert f"{data} holds other images than the network was trained on" in told
    wanted = f"{data}:test as B" if script == "eval_fid" else f"--data {data}"
    assert f"or {wanted} if these are meant" in told
    assert not list(tmp_path.iterdir())
    if name in TYPED:
        succeed(script, *given, "--data", data)
