"""What a published network's files leave to the command line, and what they do not."""

import numpy as np
import openai_unet
import pytest
import torch
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
        succeed(PUBLISH, openai, "--out", out, "--size", 8, *flags)
        again, _ = drawn("improved_ddpm", out, tmp_path / "c", "--sample-steps", 3)
        assert np.array_equal(again, other), flags
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


def test_scripts_without_these_flags_say_how_to_write_them_down(openai, tmp_path):
    told = refused("ddim", "--sample", openai, "--gpus", 0)
    assert f"python -m networks.published {openai} --out FOLDER with --size 32" in told


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
