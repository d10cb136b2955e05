"""The stages of latent diffusion: each is done once, wherever a run was killed."""

import json
import random

import numpy as np
import pytest
from data_files import write_images
from launching import Started, succeed
from run_folders import assert_same_tree, kill_while_training, saved, saved_step

SHORT = ["--steps", 50, "--ae-steps", 50, "--sample-every", 0]


def test_killed_in_every_stage_equals_unbroken(tiny, tmp_path):
    images = write_images(tmp_path / "images", 1500)
    given = [*tiny["ldm_cfg"], "--data", images, "--data-root", tmp_path / "prepared", "--flip"]
    given += [*SHORT, "--patch", 2, "--seeds", "0-299", "--sample-steps", 10]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("ldm_cfg", *given, "--out", whole)
    chance = random.Random(3)

    def start():
        return [Started("ldm_cfg", *given, "--out", broken)]

    ae, latents = broken / "autoencoder", broken / "latents"
    ae.mkdir(parents=True)
    for _ in range(4):
        kill_while_training(start, ae, chance.randint(1, 6), chance.uniform(0, 0.02))
    assert 0 < saved_step(ae) < 50 and not latents.exists()

    moments, manifest = latents / "moments.npy", latents / "manifest.json"
    caught = 0
    while caught < 2:  # as long as it takes until two kills have hit a cache half written
        moments.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
        start()[0].kill_when(moments.exists, chance.uniform(0, 0.02))
        caught += not manifest.exists()
    assert saved_step(ae) == 50 and not (broken / "ckpt.pt").exists()

    for _ in range(3):
        kill_while_training(start, broken, chance.randint(1, 6), chance.uniform(0, 0.02))
    start()[0].kill_when(lambda: saved_step(broken) == 50, 0.1)
    assert not (broken / "samples.npz").exists()

    succeed("ldm_cfg", *given, "--out", broken)
    assert_same_tree(whole, broken)  # both runs, the latents, the samples
    assert {p.parent.name for p in whole.rglob("ckpt.pt")} == {"whole", "autoencoder"}
    assert json.loads(manifest.read_text()) == json.loads(
        (whole / "latents" / "manifest.json").read_text()
    )


def test_a_stage_at_a_time_is_the_same_as_all_at_once(toy, tiny, tmp_path):
    given = [*tiny["ldm_cfg"], *toy, "--steps", 6, "--ae-steps", 6, "--sample-every", 0]
    succeed("ldm_cfg", *given, "--out", tmp_path / "all")
    stages = ["autoencoder", "latents", "diffusion", "all"]
    for i, stage in enumerate(stages):
        succeed("ldm_cfg", *given, "--out", tmp_path / "each", "--stage", stage)
        states = ["autoencoder/ckpt.pt", "latents/manifest.json", "ckpt.pt", "samples.npz"]
        done = [(tmp_path / "each" / name).exists() for name in states]
        assert done == [j <= i for j in range(4)]
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("all", "each"))
    assert np.array_equal(a, b)


def test_what_every_stage_leaves(toy, tiny, tmp_path):
    given = [*tiny["ldm_cfg"], *toy, "--steps", 6, "--sample-every", 3, "--patch", 2]
    succeed("ldm_cfg", *given, "--out", tmp_path)
    pictures = sorted(p.name for p in tmp_path.glob("*.png"))
    assert pictures == ["loss.png", "samples-000003.png", "samples.png"]
    first = sorted(p.name for p in (tmp_path / "autoencoder").glob("*.png"))
    assert first == ["loss.png", "reconstructions.png"]
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    moments = np.load(tmp_path / "latents" / "moments.npy")
    assert moments.shape == (64, 8, 8, 8) and moments.dtype == np.float32
    mean, log_var = np.split(moments.astype(np.float64), 2, axis=3)
    variance = (mean**2 + np.exp(log_var)).mean() - mean.mean() ** 2
    scale = saved(tmp_path)["scale"]
    assert manifest["scale"] == pytest.approx(variance**-0.5, rel=1e-6) == scale


def test_smoke_of_the_main_command(tmp_path):
    """ImageNet-100 as Kaggle lays it out, by name, with its configuration of 128x128 and f8."""
    wnids = ("n01440764", "n01443537")
    folder = tmp_path / "root" / "imagenet100"
    for part in ("train.X1", "train.X2", "train.X3", "train.X4", "val.X"):
        write_images(folder / part, 4, height=130, width=140, channels=3, classes=wnids)
    (folder / "Labels.json").write_text(json.dumps({wnids[0]: "tench", wnids[1]: "goldfish"}))
    given = ["--data", "imagenet100", "--data-root", tmp_path / "root", "--gpus", 0]
    succeed("ldm_cfg", "--smoke", *given, "--out", tmp_path / "out")
    found = np.load(tmp_path / "out" / "samples.npz")
    assert found["arr_0"].shape == (8, 128, 128, 3) and found["arr_0"].dtype == np.uint8
    assert np.array_equal(found["arr_1"], np.arange(8) % 2)
    assert (tmp_path / "out" / "samples.png").exists()
    assert np.load(tmp_path / "out" / "latents" / "moments.npy").shape == (32, 16, 16, 8)
