"""Every file of configs/ is a valid configuration; some are found by the name of the data set."""

from runtime.commandline import parse

import re
from pathlib import Path

import pytest
import torch

import ddpm_pixel
import ldm_cfg

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


PRESETS = [path for path in FILES if "_" not in path.stem or path.stem.endswith("_pixel")]


def script_of(path):
    """The chapter that the head of the file says to run."""
    named = re.search(r"python (\w+)\.py", path.read_text())
    return {"ddpm_pixel": ddpm_pixel, "ldm_cfg": ldm_cfg}[named[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_parses_and_passes_the_checks(path):
    script, text = script_of(path), path.read_text()
    cfg = parse(script.Config, "", ["--config", str(path)])
    script.check(cfg)
    assert cfg.data in path.stem or path.stem == "mnist_cs771"
    assert text.startswith("# ") and ("README.md" in text or "Nobody" in text or "minutes" in text)


def images_of(cfg):
    """(C, H, W) of the data set's images as the configuration sizes them."""
    channels, side = {"mnist": (1, 28), "fashion_mnist": (1, 28), "cifar10": (3, 32)}.get(
        cfg.data, (3, cfg.size)
    )
    return channels, side, side


PIXEL = [path for path in FILES if script_of(path) is ddpm_pixel]


@pytest.mark.parametrize("path", PIXEL, ids=lambda p: p.stem)
def test_every_network_of_chapter_1_can_be_built_and_walked(path):
    cfg = parse(ddpm_pixel.Config, "", ["--config", str(path)])
    with torch.device("meta"):
        net = ddpm_pixel.make_net(cfg, images_of(cfg), 10 * cfg.conditional)
    assert net.conv_out.out_channels == images_of(cfg)[0] * (1 + cfg.learned_variance)
    assert ddpm_pixel.timestep_pairs(cfg.timesteps, cfg.sample_steps)
    if path.stem == "cifar10_ddpm":
        assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_the_name_of_the_data_set_finds_its_file(path):
    script, pattern = script_of(path), str(path.with_name("{data}.yaml"))
    if path.stem.endswith("_pixel"):
        pattern = str(path.with_name("{data}_pixel.yaml"))
    data = path.stem.removesuffix("_pixel")
    found = parse(script.Config, "", ["--data", data], preset=pattern)
    named = parse(script.Config, "", ["--config", str(path)])
    assert found == named
    over = parse(script.Config, "", ["--data", data, "--steps", "7"], preset=pattern)
    assert over.steps == 7 and over.width == named.width


def test_the_glyphs_file_repeats_the_defaults():
    path = next(p for p in FILES if p.stem == "glyphs")
    cfg = parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg == ldm_cfg.Config(config=cfg.config)


def test_imagenet100_is_128_pixels_through_f8_latents():
    path = next(p for p in FILES if p.stem == "imagenet100")
    cfg = parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg.size == 128 and cfg.patch * 2 ** (len(cfg.ae_mult) - 1) == 8 and cfg.z_channels == 4
