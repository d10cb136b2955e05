"""How a published network is drawn, from the command line: its files, and the flags beside them."""

import json

import numpy as np
import pytest
import torch
from launching import refused, succeed

import ddpm_pixel
import improved_ddpm

STEPS = "--sample-steps 6 "
RUN = "--gpus 0 --batch-size 8 --warmup 1 --log-every 1 --save-every 2 --model-channels 16 "
RUN += f"--channel-mult 1 2 --attention-resolutions 8 --sample-every 0 --steps 2 {STEPS}"
BETAS = [0.01, 0.3, *[0.05] * 18]
PUBLISH = "networks.published.__main__"


def trained(toy, out, script, *flags):
    """The checkpoint of two steps, its weights made to vary more."""
    run = RUN.split() if "--timestep-respacing" not in flags else RUN.replace(STEPS, "").split()
    succeed(script, *toy, *run, *flags, "--out", out)
    state = torch.load(out / "ckpt.pt", weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for value in state["ema"].values():
        if value.is_floating_point():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    torch.save(state, out / "ckpt.pt")
    return out / "ckpt.pt"


def drawn(script, path, out, *flags):
    done = succeed(script, "--sample", path, "--seeds", "0-3", "--gpus", 0, "--out", out, *flags)
    return np.load(out / "samples.npz")["arr_0"], done.out


WAYS = {
    "clamp": ("ddpm_pixel", ["--timesteps", 20, "--schedule", "sigmoid"]),
    "none": ("ddpm_pixel", ["--timesteps", 20, "--no-clip-denoised", "--spacing", "trailing"]),
    "betas": ("ddpm_pixel", ["--trained-betas", *BETAS, "--variance", "large", "--guidance", 1]),
    "dynamic": ("improved_ddpm", ["--trained-betas", *BETAS, "--dynamic-threshold"]),
    "small": ("improved_ddpm", ["--timesteps", 20, "--alpha-min", 0.2, "--variance", "small"]),
}
WAYS["dynamic"][1].extend(["--prediction", "v", "--spacing", "leading"])
WAYS["small"][1].extend(["--timestep-respacing", "0-2,9,19"])


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_exported_draws_itself_byte_for_byte(way, toy, tmp_path):
    script, flags = WAYS[way]
    path = trained(toy, tmp_path / "run", script, *flags)
    succeed(PUBLISH, path, "--out", tmp_path / "theirs")
    for chapter in {script, "improved_ddpm", "ddim"}:
        typed = ["--clip-denoised"] if (way, chapter) == ("dynamic", "ddim") else []
        typed += ["--sample-steps", 6] if chapter == "ddim" else []
        own, _ = drawn(chapter, path, tmp_path / f"own-{chapter}", *typed)
        theirs, said = drawn(chapter, tmp_path / "theirs", tmp_path / f"theirs-{chapter}", *typed)
        assert np.array_equal(own, theirs) and own.std() > 1
        table = {"clamp": "sigmoid", "none": "linear", "small": "cosine"}.get(way, "its own table")
        assert f"{tmp_path / 'theirs'}: {table}" in said and ", T = 20, predicts " in said
    if way == "dynamic":
        for file in (path, tmp_path / "theirs"):
            assert "dynamic threshold" in refused("ddim", "--sample", file, "--gpus", 0)


def test_own_settings_of_clipping_and_spacing_hold_in_every_script(toy, tmp_path):
    flags = ["--no-clip-denoised", "--spacing", "trailing", "--timesteps", 20, "--sample-steps", 6]
    flags += ["--prediction", "v"]
    path = trained(toy, tmp_path / "run", "ddpm_pixel", *flags)
    for i, script in enumerate(("ddim", "dpm_solver")):
        steps = ["--sample-steps", 6]
        own, _ = drawn(script, path, tmp_path / f"{i}", *steps)
        typed, _ = drawn(
            script, path, tmp_path / f"{i}t", *steps, "--no-clip-denoised", "--spacing", "trailing"
        )
        other, _ = drawn(script, path, tmp_path / f"{i}o", *steps, "--clip-denoised")
        linear, _ = drawn(script, path, tmp_path / f"{i}l", *steps, "--spacing", "linear")
        assert np.array_equal(own, typed)
        assert not np.array_equal(own, other) and not np.array_equal(own, linear)


def test_betas_of_a_settings_file_train_sample_and_score(toy, tmp_path):
    file = tmp_path / "betas.yaml"
    file.write_text("trained_betas: [" + ", ".join(map(str, BETAS)) + "]\nsample_steps: 5\n")
    path = trained(toy, tmp_path / "run", "improved_ddpm", "--config", file)
    cfg = improved_ddpm.load_net(path, "cpu")[1]
    table = (1 - torch.tensor(BETAS, dtype=torch.float64)).cumprod(0)
    assert cfg.timesteps == 20 and torch.equal(ddpm_pixel.alpha_bar_of(cfg), table)
    succeed("improved_ddpm", "--nll", path, "--n", 2, "--gpus", 0, *toy)
    again = tmp_path / "run" / "config.yaml"  # the same settings once more
    assert "own schedule, T = 20" in succeed("improved_ddpm", "--config", again, "--steps", 2).out
    file.write_text("trained_betas: [0.1, 0.2]\ntimesteps: 5\n")
    assert "--timesteps 5 and 2 --trained-betas" in refused("ddpm_pixel", "--config", file)
    for flag, value in (("--timesteps", 20), ("--schedule", "cosine"), ("--alpha-min", 0.1)):
        told = refused("ddpm_pixel", "--trained-betas", *BETAS, flag, value)
        assert f"{flag} does nothing beside --trained-betas" in told
    for betas, told in (
        ([0.1, 0], "must fall"),
        ([0.1, 1], "type --prediction v"),
        ([2], "0 to 1"),
    ):
        assert told in refused("ddpm_pixel", "--sample-steps", 1, "--trained-betas", *betas)


def test_a_pipeline_of_ddim_is_not_drawn_as_another(toy, tmp_path):
    path = trained(toy, tmp_path / "run", "ddpm_pixel", "--timesteps", 20)
    succeed(PUBLISH, path, "--out", tmp_path / "ddim")
    for file, key in (("model_index.json", "scheduler"), ("scheduler/scheduler_config.json", "")):
        content = json.loads((tmp_path / "ddim" / file).read_text())
        content[key or "_class_name"] = ["diffusers", "DDIMScheduler"] if key else "DDIMScheduler"
        (tmp_path / "ddim" / file).write_text(json.dumps(content))
    for script in ("ddpm_pixel", "improved_ddpm"):
        told = refused(script, "--sample", tmp_path / "ddim", "--gpus", 0)
        assert f"asks for DDIMScheduler: type python ddim.py --sample {tmp_path / 'ddim'}" in told
        few = ["--sample-steps", 5]
        own, _ = drawn(script, path, tmp_path / "own", *few, "--variance", "large")
        ancestral, said = drawn(
            script, tmp_path / "ddim", tmp_path / "a", *few, "--variance", "large"
        )
        assert (
            np.array_equal(own, ancestral)
            and "diffusers' DDIMScheduler: it takes other steps" in said
        )
    images, said = drawn("ddim", tmp_path / "ddim", tmp_path / "d", "--sample-steps", 5)
    assert "DDIMScheduler; drawn by DDIM" in said and "images differ from DDIMPipeline's" in said
    assert np.array_equal(images, drawn("ddim", path, tmp_path / "e", "--sample-steps", 5)[0])
    file = tmp_path / "ddim" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample_range": 2}))
    assert "clip_sample_range 2" in refused("ddim", "--sample", tmp_path / "ddim", "--gpus", 0)
    drawn("ddim", tmp_path / "ddim", tmp_path / "f", "--sample-steps", 5, "--clip-denoised")
    succeed("improved_ddpm", "--nll", tmp_path / "ddim", "--n", 2, "--gpus", 0, *toy)
