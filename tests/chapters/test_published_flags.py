"""What a published network's files leave to the command line, and what they do not."""

import json

import numpy as np
import openai_unet
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from launching import refused, succeed
from test_published_sampling import BETAS, PUBLISH, drawn, trained


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """OpenAI's names, two levels, 8x8: neither heads nor size nor schedule are told."""
    shapes = openai_unet.published(64, (1, 2), 1, [2], classes=3)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        state[name] = value / max(value[0].numel(), 1) ** 0.5 if len(shape) > 1 else 0.1 * value
        state[name] += name.endswith(("0.weight", "norm.weight")) and len(shape) == 1
    path = tmp_path_factory.mktemp("openai") / "model.pt"
    torch.save(state, path)
    return path


def test_flags_say_what_a_file_of_openai_does_not(openai, tmp_path):
    base = ["--size", 8, "--sample-steps", 3]
    plain, said = drawn("improved_ddpm", openai, tmp_path / "a", *base)
    assert "taken as num_heads 4, num_head_channels 0, norm_groups 32, new_order False" in said
    assert "for others type --num-heads, --num-head-channels, --norm-groups\n" in said
    assert "no scheduler: taken as linear, T = 1000, predicting eps" in said
    for flags in (
        ["--num-heads", 1],
        ["--num-head-channels", 16],
        ["--norm-groups", 8],
        ["--timesteps", 400],
        ["--prediction", "v"],
        ["--trained-betas", *BETAS],
        ["--schedule", "cosine", "--alpha-min", 0.3],
    ):
        other, said = drawn("improved_ddpm", openai, tmp_path / "b", *base, *flags)
        assert other.shape == plain.shape and not np.array_equal(other, plain), flags
        # Written with the same flags, it is the same network without them.
        out = tmp_path / "-".join(map(str, flags[:2])).strip("-")
        rescaled = flags[0] in ("--timesteps", "--trained-betas")  # which no pipeline expresses
        more = ["--no-rescale-timesteps"] * rescaled
        succeed(PUBLISH, openai, "--out", out, "--size", 8, *flags, *more)
        again, _ = drawn("improved_ddpm", out, tmp_path / "c", "--sample-steps", 3)
        assert np.array_equal(again, other) != rescaled, flags
        told = refused("improved_ddpm", "--sample", out, "--gpus", 0, *flags)
        assert f": {out}" in told and "has its own; leave it out" in told
        assert told.removeprefix("error: ").split(":")[0] in flags
    succeed(PUBLISH, openai, "--out", tmp_path / "new", "--size", 8, "--new-order")
    other, _ = drawn("improved_ddpm", tmp_path / "new", tmp_path / "d", "--sample-steps", 3)
    assert not np.array_equal(other, plain)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--num-heads", 3, "--size", 8], "num_heads 3 does not divide the 128 channels"),
        (["--num-heads", 0, "--size", 8], "--num-heads 0: expected a number from 1"),
        (["--norm-groups", 7, "--size", 8], "--norm-groups 7 must divide"),
        (["--size", 9], "images of 9x9 cannot be halved"),
        ([], "does not tell its image size: type --size 32 or another"),
    ],
)
def test_forms_that_cannot_be_are_refused(openai, flags, told):
    assert told in refused("improved_ddpm", "--sample", openai, "--gpus", 0, *flags)


@pytest.mark.parametrize("script", ["ddim", "classifier_guidance"])
def test_scripts_without_these_flags_say_how_to_write_them_down(script, openai, tmp_path):
    more = ["--classifier", openai] if script == "classifier_guidance" else []
    told = refused(script, "--sample", openai, "--gpus", 0, *more)
    hint = f"python -m networks.published {openai} --out FOLDER with --size 32 or another, and use"
    assert hint in told
    told = succeed(PUBLISH, openai, "--out", tmp_path / "a", "--size", 8).out  # as it says
    *_, hint = told.partition("where it has another, type ")
    assert hint.startswith("--schedule, --timesteps, --prediction\n")
    *_, hint = told.partition("for others type ")
    assert hint.startswith("--num-heads, --num-head-channels, --norm-groups, --new-order\n")
    typed = ["--schedule", "cosine", "--timesteps", 8, "--prediction", "v", "--new-order"]
    typed += ["--num-heads", 2, "--norm-groups", 16, "--no-rescale-timesteps"]
    succeed(PUBLISH, openai, "--out", tmp_path / "b", "--size", 8, *typed)
    if not more:
        drawn("ddim", tmp_path / "b", tmp_path / "c")  # of 8 timesteps, all


def test_hints_name_flags_that_the_script_takes(openai, tmp_path):
    lines = drawn("improved_ddpm", openai, tmp_path / "a", "--size", 8, "--sample-steps", 2)[1]
    *_, hint = lines.partition("where it has another, type ")
    *_, form = lines.partition("for others type ")
    flags = [flag for line in (hint, form) for flag in line.split("\n")[0].split(", ")]
    values = {"--schedule": "cosine", "--timesteps": 20, "--prediction": "v", "--num-heads": 2}
    values |= {"--num-head-channels": 32, "--norm-groups": 16}
    assert flags == list(values)
    for flag in flags:
        typed = ["--size", 8, "--sample-steps", 2, flag, values[flag]]
        drawn("improved_ddpm", openai, tmp_path / "b", *typed)


def altered(tmp_path, unet=None, **scheduler):
    """A folder of diffusers' UNet2DModel of 20 timesteps with these settings."""
    how = {"block_out_channels": (16, 32), "norm_num_groups": 4} | (unet or {})
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        **how,
    )
    DDPMPipeline(net, DDPMScheduler(20, 0.01, 0.3)).save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return tmp_path / "folder"


def test_a_short_chain_is_visited_whole_where_nobody_typed_a_number(tmp_path):
    path = altered(tmp_path)
    few = ["--sample-steps", 20]
    for script in ("improved_ddpm", "ddim", "dpm_solver"):
        typed = ["--variance", "small"] if script == "improved_ddpm" else []
        images, _ = drawn(script, path, tmp_path / "a", *typed)
        assert np.array_equal(images, drawn(script, path, tmp_path / "b", *typed, *few)[0])
        told = refused(script, "--sample", path, "--sample-steps", 21, "--gpus", 0)
        assert "--sample-steps 21" in told


def test_a_variance_that_the_network_does_not_give(tmp_path):
    path = altered(tmp_path, variance_type="learned_range")
    told = refused("improved_ddpm", "--sample", path, "--gpus", 0)
    assert "variance_type 'learned_range' is not supported" in told
    assert "; or type --variance small" in told
    drawn("improved_ddpm", path, tmp_path / "a", "--variance", "small")
    succeed(PUBLISH, path, "--out", tmp_path / "b", "--variance", "small")
    drawn("improved_ddpm", tmp_path / "b", tmp_path / "c")
    drawn("ddim", path, tmp_path / "d")  # where it has no part


def test_norms_of_one_channel_a_group_are_named_as_the_file_has_them(tmp_path):
    path = altered(tmp_path, {"block_out_channels": (32, 64), "norm_num_groups": 32})
    for script in ("improved_ddpm", "ddim"):
        told = refused(script, "--sample", path, "--gpus", 0)
        assert f"{path / 'unet' / 'config.json'}: norm_num_groups 32: one channel a group" in told
        assert "--norm-groups" not in told


def test_settings_of_a_file_count_as_typed(tmp_path):
    path, file = altered(tmp_path, _class_name="DDIMScheduler"), tmp_path / "how.yaml"
    (path / "model_index.json").unlink()
    file.write_text("variance: small\nclip_denoised: false\nspacing: trailing\n")
    assert "add --variance small" in refused("improved_ddpm", "--sample", path, "--gpus", 0)
    told = drawn("improved_ddpm", path, tmp_path / "a", "--config", file)[1]
    assert "x0_hat not clipped; trailing timesteps; DDIMScheduler; drawn by ancestral" in told
    scheduler = path / "scheduler" / "scheduler_config.json"
    more = dict(thresholding=True, sample_max_value=1e4)
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | more))
    file.write_text("clip_denoised: true\nspacing: trailing\n")
    assert "add --clip-denoised" in refused("ddim", "--sample", path, "--gpus", 0)
    told = drawn("ddim", path, tmp_path / "b", "--config", file)[1]
    assert "x0_hat clamped to [-1, 1]; trailing timesteps; DDIMScheduler; drawn by DDIM" in told
    typed = drawn("ddim", path, tmp_path / "c", "--config", file, "--no-clip-denoised")[1]
    assert "x0_hat not clipped; trailing timesteps" in typed
    told = drawn("dpm_solver", path, tmp_path / "d", "--no-clip-denoised", "--sampler", "heun")[1]
    assert "drawn by Heun's method" in told and "x0_hat not clipped" in told


@pytest.mark.parametrize(
    "flags",
    [
        ["--schedule", "linear"],
        ["--timesteps", 20],
        ["--alpha-min", 0.5],
        ["--trained-betas", 0.1],
        ["--prediction", "v"],
        ["--num-heads", 1],
        ["--norm-groups", 8],
        ["--size", 16],
    ],
    ids=lambda flags: flags[0],
)
def test_checkpoints_and_told_files_refuse_what_they_have(flags, toy, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "has-its-own"
    if not base.exists():
        trained(toy, base, "ddpm_pixel", "--timesteps", 20)
        succeed(PUBLISH, base / "ckpt.pt", "--out", base / "theirs")
    for path, script in ((base / "ckpt.pt", "ddpm_pixel"), (base / "theirs", "improved_ddpm")):
        if path.is_dir() and flags[0] == "--size":
            continue  # it is the size that the file says
        told = refused(script, "--sample", path, "--gpus", 0, *flags)
        assert flags[0] in told and "has its own; leave it out" in told
    if flags[0] != "--size":  # there of the data
        assert "has its own" in refused("improved_ddpm", "--nll", path, "--gpus", 0, *flags)
    told = refused(PUBLISH, base / "ckpt.pt", "--out", base / "new", *flags)
    assert flags[0] in told and "has its own; leave it out" in told
    assert "--size: " in refused(
        "ddpm_pixel", "--sample", base / "theirs", "--size", 32, "--gpus", 0
    )
