"""Every file of configs/ is a valid configuration; some are found by the name of the data set."""

from runtime import commandline

import importlib
import re
from pathlib import Path

import pytest
import torch

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def script_of(path):
    """The chapter that the head of the file says to run."""
    return importlib.import_module(re.search(r"python (\w+)\.py", path.read_text())[1])


def parse(script, *arguments, **options):
    return commandline.parse(script.Config, "", list(arguments), **options)


def preset_of(script, monkeypatch):
    """The pattern by which a chapter finds the file of a data set, "" where it has none."""
    found = {}

    class Parsed(Exception):
        """What there was to see."""

    def look(*arguments, preset="", **options):
        found["preset"] = preset
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(commandline, "parse", look)
        with pytest.raises(Parsed):
            script.main()
    return found["preset"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_parses_and_passes_the_checks(path):
    script, text = script_of(path), path.read_text()
    cfg = parse(script, "--config", str(path))
    script.check(cfg)
    on = getattr(cfg, "latents", "") or cfg.data  # a run knows its data
    assert Path(on).name.split("-")[-1] in path.stem or path.stem == "mnist_cs771"
    assert text.startswith("# ")
    assert any(word in text for word in ("RESULTS.md", "Nobody", "minutes"))


def images_of(cfg):
    """(C, H, W) of the data set's images as the configuration sizes them."""
    channels, side = {"mnist": (1, 28), "fashion_mnist": (1, 28), "cifar10": (3, 32)}.get(
        cfg.data, (3, cfg.size)
    )
    return channels, side, side


PIXELS = [p for p in FILES if hasattr(script_of(p).Config, "class_cond")]
PIXELS = [p for p in PIXELS if "\nlatents:" not in p.read_text()]


@pytest.mark.parametrize("path", PIXELS, ids=lambda p: p.stem)
def test_every_network_in_pixel_space_can_be_built_and_walked(path):
    script = script_of(path)
    cfg = parse(script, "--config", str(path))
    pixels = images_of(cfg)
    with torch.device("meta"):
        if hasattr(script, "make_net"):
            net = script.make_net(cfg, pixels, 10 * cfg.class_cond)
        else:
            net = script.UNet(pixels, 10 * cfg.class_cond, cfg)
    *_, last = (layer for layer in net.modules() if isinstance(layer, torch.nn.Conv2d))
    assert last.out_channels == pixels[0] * (1 + getattr(cfg, "learn_sigma", False))
    if hasattr(cfg, "timesteps"):
        assert script.timestep_pairs(cfg.timesteps, cfg.sample_steps)
    counts = {"cifar10_ddpm": 35_746_307, "cifar10_edm": 55_735_299}
    counts["cifar10_flow"] = counts["cifar10_ddpm"]
    count = sum(p.numel() for p in net.parameters())
    assert count == counts.get(path.stem, count)


NAMED = {p: re.search(r"python \w+\.py --data (\w+)", p.read_text()) for p in FILES}
PRESETS = [(path, named[1]) for path, named in NAMED.items() if named]


@pytest.mark.parametrize("path, data", PRESETS, ids=lambda value: getattr(value, "stem", ""))
def test_the_name_of_the_data_set_finds_its_file(path, data, monkeypatch):
    """Where the head of the file says to type that name, and not --config."""
    script = script_of(path)
    preset = preset_of(script, monkeypatch)
    assert path.parent.parent / preset.format(data=data) == path
    named = parse(script, "--config", str(path))
    assert parse(script, "--data", data, preset=preset) == named
    over = parse(script, "--data", data, "--steps", "7", preset=preset)
    assert over.steps == 7 and over.lr == named.lr and over.batch_size == named.batch_size


def test_the_glyphs_file_repeats_the_defaults():
    path = next(p for p in FILES if p.stem == "glyphs")
    script = script_of(path)
    cfg = parse(script, "--config", str(path))
    assert cfg == script.Config(config=cfg.config)


def test_imagenet100_is_128_pixels_through_f8_latents():
    path = next(p for p in FILES if p.stem == "imagenet100")
    cfg = parse(script_of(path), "--config", str(path))
    assert cfg.size == 128 and cfg.patch * 2 ** (len(cfg.ae_mult) - 1) == 8 and cfg.z_channels == 4
