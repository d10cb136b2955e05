"""--attention-resolutions are heights in every chapter; one that no level has is told of."""

from runtime.commandline import BadInput

import sys

import pytest
import torch
from launching import refused
from tiny_runs import TRAININGS, fields

import classifier_guidance
import ddpm_pixel
import edm
import flow_matching
import improved_ddpm
import ldm_cfg
from networks import adm_unet, edm_unet, noisy_classifier, sd_unet, sizes

SHAPE = (3, 16, 32)  # levels of 16x32, 8x16 and 4x8: what is not the height makes others attend
SIZES = {"model_channels": 16, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "num_heads": 2}
WITH = [script for script in TRAININGS if "attention_resolutions" in fields(script)]
CHAPTERS = [
    (ddpm_pixel, {}),
    (improved_ddpm, {}),
    (improved_ddpm, {"style": "ddpm"}),
    (edm, {}),
    (edm, {"model": "ddpmpp"}),
    (classifier_guidance, {}),
    (flow_matching, {}),
    (ldm_cfg, {}),
    (ldm_cfg, {"model": "sd", "context_dim": 8}),
    (ldm_cfg, {"model": "sd-label", "context_dim": 8}),
]


def build(chapter, more, heights):
    sizes = {name: value for name, value in SIZES.items() if name in fields(chapter.__name__)}
    cfg = chapter.Config(**sizes, **more, attention_resolutions=heights)
    if chapter is ddpm_pixel:
        return ddpm_pixel.UNet(SHAPE, 2, cfg)
    return chapter.make_net(cfg, SHAPE, 2)


def test_every_chapter_that_has_the_setting_is_here():
    theirs = {"rectified_flow"}  # it trains flow_matching's network
    assert {chapter.__name__ for chapter, _ in CHAPTERS} == {*WITH} - theirs


@pytest.mark.parametrize("heights, pixels", [((8,), {128}), ((16, 4), {512}), ((), set())])
@pytest.mark.parametrize("chapter, more", CHAPTERS)
def test_levels_of_these_heights_attend_and_the_middle(chapter, more, heights, pixels, monkeypatch):
    seen = set()  # numbers of pixels that look at others
    for module in (ddpm_pixel, adm_unet, edm_unet, noisy_classifier, sd_unet):
        name = "attend" if module is sd_unet else "attention"
        attention = getattr(module, name)

        def spy(q, k, v, attention=attention):
            seen.add(q.shape[2])
            return attention(q, k, v)

        monkeypatch.setattr(module, name, spy)
    net = build(chapter, more, heights)
    inputs = torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.long)
    net(*inputs)
    pooled = {1} if chapter is classifier_guidance else set()  # the one that is asked for
    assert seen - pooled == pixels | {4 * 8}


@pytest.mark.parametrize("chapter, more", CHAPTERS)
def test_a_height_of_no_level_is_refused_where_it_is_typed(chapter, more, monkeypatch, capsys):
    """So are factors of 1, 2, 4, as others give them, but for a level of that height."""
    told = "2 1: no level has this height; they are [16, 8, 4] high"
    build(chapter, more, (4, 2, 1))  # as a file says
    assert capsys.readouterr().out.count(f"note: attention_resolutions {told}") == 1
    monkeypatch.setattr(sys, "argv", ["chapter.py", "--attention-resolutions", "4", "2", "1"])
    with pytest.raises(BadInput) as refused:
        build(chapter, more, (4, 2, 1))
    assert str(refused.value) == f"--attention-resolutions {told}"


def test_a_command_that_asks_for_it_ends_before_its_training(toy, tiny, tmp_path):
    given = [*tiny["ddpm_pixel"], *toy, "--out", tmp_path / "out", "--attention-resolutions", 5]
    assert "--attention-resolutions 5: no level has" in refused("ddpm_pixel", *given)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_of_the_default_one_height_will_do(capsys):
    for height, heights in ((28, "28, 14, 7"), (32, "32, 16, 8"), (24, "24, 12, 6")):
        sizes.check_attention((7, 8), height, 3)
        said = capsys.readouterr().out
        wrong = f"note: attention_resolutions 7 8: no level has this height; they are [{heights}]"
        assert said.startswith(wrong) if height == 24 else not said
    sizes.check_attention((4, 3), 13, 3)  # latents: 13, 7, 4
    assert "attention_resolutions 3: no level has this height" in capsys.readouterr().out
