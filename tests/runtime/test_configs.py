"""Every file of configs/ is a valid configuration; some are found by the name of the data set."""

from runtime.commandline import parse

import importlib
import re
from pathlib import Path

import pytest
import torch

import ddpm_pixel
import improved_ddpm
import ldm_cfg

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


SUFFIXES = ("", "_pixel", "_iddpm", "_dit")  # of the files that a data set's name finds
SETS = ("glyphs", "mnist", "fashion_mnist", "cifar10", "afhq", "imagenet100")
PRESETS = [path for path in FILES if path.stem in {s + end for s in SETS for end in SUFFIXES}]


def script_of(path):
    """The chapter that the head of the file says to run."""
    named = re.search(r"python (\w+)\.py", path.read_text())
    return importlib.import_module(named[1])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_parses_and_passes_the_checks(path):
    script, text = script_of(path), path.read_text()
    cfg = parse(script.Config, "", ["--config", str(path)])
    script.check(cfg)
    assert cfg.data in path.stem or path.stem == "mnist_cs771"
    assert text.startswith("# ") and ("RESULTS.md" in text or "Nobody" in text or "minutes" in text)


def images_of(cfg):
    """(C, H, W) of the data set's images as the configuration sizes them."""
    channels, side = {"mnist": (1, 28), "fashion_mnist": (1, 28), "cifar10": (3, 32)}.get(
        cfg.data, (3, cfg.size)
    )
    return channels, side, side


PIXEL = [path for path in FILES if script_of(path) in (ddpm_pixel, improved_ddpm)]


@pytest.mark.parametrize("path", PIXEL, ids=lambda p: p.stem)
def test_every_network_in_pixels_can_be_built_and_walked(path):
    script = script_of(path)
    cfg = parse(script.Config, "", ["--config", str(path)])
    with torch.device("meta"):
        if script is ddpm_pixel:
            net = ddpm_pixel.UNet(images_of(cfg), 10 * cfg.class_cond, cfg)
        else:
            net = improved_ddpm.make_net(cfg, images_of(cfg), 10 * cfg.class_cond)
    outputs = 1 + getattr(cfg, "learn_sigma", False)
    assert net.conv_out.out_channels == images_of(cfg)[0] * outputs
    assert ddpm_pixel.timestep_pairs(cfg.timesteps, cfg.sample_steps)
    if path.stem == "cifar10_ddpm":
        assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_the_name_of_the_data_set_finds_its_file(path):
    script = script_of(path)
    data = max((s for s in SETS if path.stem.startswith(s)), key=len)
    pattern = str(path.with_name("{data}" + path.stem.removeprefix(data) + ".yaml"))
    found = parse(script.Config, "", ["--data", data], preset=pattern)
    named = parse(script.Config, "", ["--config", str(path)])
    assert found == named
    over = parse(script.Config, "", ["--data", data, "--steps", "7"], preset=pattern)
    assert over.steps == 7 and over.batch_size == named.batch_size


def test_the_glyphs_file_repeats_the_defaults():
    path = next(p for p in FILES if p.stem == "glyphs")
    cfg = parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg == ldm_cfg.Config(config=cfg.config)


def test_imagenet100_is_128_pixels_through_f8_latents():
    path = next(p for p in FILES if p.stem == "imagenet100")
    cfg = parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg.size == 128 and cfg.patch * 2 ** (len(cfg.ae_mult) - 1) == 8 and cfg.z_channels == 4
