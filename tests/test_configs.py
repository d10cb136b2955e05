"""Every file of configs/ is a valid configuration, and is found by the name of its data set."""

from pathlib import Path

import pytest

import ddpm_pixel
import ldm_cfg
import runtime

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def script_of(path):
    return ddpm_pixel if path.stem.endswith("_pixel") else ldm_cfg


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_parses_and_passes_the_checks(path):
    script = script_of(path)
    cfg = runtime.parse(script.Config, "", ["--config", str(path)])
    script.check(cfg)
    assert cfg.data == path.stem.removesuffix("_pixel")
    assert path.read_text().startswith("#"), "a header says what it reproduces"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_name_of_the_data_set_finds_its_file(path):
    script, pattern = script_of(path), str(path.with_name("{data}.yaml"))
    if script is ddpm_pixel:
        pattern = str(path.with_name("{data}_pixel.yaml"))
    data = path.stem.removesuffix("_pixel")
    found = runtime.parse(script.Config, "", ["--data", data], preset=pattern)
    named = runtime.parse(script.Config, "", ["--config", str(path)])
    assert found == named
    over = runtime.parse(script.Config, "", ["--data", data, "--steps", "7"], preset=pattern)
    assert over.steps == 7 and over.width == named.width


def test_the_glyphs_file_repeats_the_defaults():
    path = next(p for p in FILES if p.stem == "glyphs")
    cfg = runtime.parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg == ldm_cfg.Config(config=cfg.config)


def test_imagenet100_is_128_pixels_through_f8_latents():
    path = next(p for p in FILES if p.stem == "imagenet100")
    cfg = runtime.parse(ldm_cfg.Config, "", ["--config", str(path)])
    assert cfg.size == 128 and cfg.patch * 2 ** (len(cfg.ae_mult) - 1) == 8 and cfg.z_channels == 4
