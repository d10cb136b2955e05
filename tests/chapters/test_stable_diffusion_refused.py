"""What stable_diffusion.py's command line refuses: one line that says why, exit code 2."""

import json
import shutil

import pytest
import tiny_stable_diffusion as tiny
import torch
from launching import refused, succeed
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import PROMPTS, asked, pixels, saved_picture, spot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.getbasetemp())


def test_settings_that_mean_nothing_are_refused(folder, tmp_path):
    picture = saved_picture(tmp_path / "from.png", pixels())
    other = saved_picture(tmp_path / "other.png", spot()[:40])
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    empty.write_text("\n\n")
    two = PROMPTS * 2
    cases = [
        (["--prompt", "a", "--gpus", 0], "--weights"),
        (["--prompt", "a", "--weights", tmp_path / "none"], f"{tmp_path / 'none'}"),
        (asked(folder, prompt=None), "--prompt"),
        (asked(folder, "--prompt-file", latin), f"{latin} is not UTF-8"),
        (asked(folder, "--prompt-file", tmp_path / "none.txt"), "none.txt"),
        (asked(folder, "--prompt-file", empty, prompt=None), "--prompt"),
        (asked(folder, size=(500,)), "--size 500"),
        (asked(folder, size=(512, 100)), "--size 512 100"),
        (asked(folder, size=(64, 64, 64)), "--size 64 64 64"),
        (asked(folder, size=(0,)), "--size"),
        (asked(folder, steps=0), "--steps"),
        (asked(folder, steps=1001), "--steps 1001"),
        (asked(folder, "--dry-run", steps=1001), "--steps 1001"),
        (asked(folder, "--dry-run", "--interpolate", 5, prompt=two), "--interpolate"),
        (asked(folder, "--dry-run", "--mask", picture), "--image"),
        (asked(folder, "--sampler", "dpmpp", steps=1000), "--steps 1000"),
        (asked(folder, "--sampler", "euler"), "--sampler"),
        (asked(folder, "--guidance", "nan"), "--guidance nan"),
        (asked(folder, "--guidance", "inf"), "--guidance inf"),
        (asked(folder, "--n", 0), "--n"),
        (asked(folder, "--seeds", "x"), "--seeds x"),
        (asked(folder, "--batch-size", 0), "--batch-size"),
        (asked(folder, "--gpus", 64), "--gpus 64"),
        (asked(folder, "--image", tmp_path / "none.png"), "--image"),
        (asked(folder, "--image", empty), "empty.txt"),
        (asked(folder, "--image", picture, "--strength", 1.5), "--strength"),
        (asked(folder, "--image", picture, "--strength", 0), "--strength"),
        (asked(folder, "--image", picture, "--strength", 0.1), "--strength 0.1"),
        (asked(folder, "--strength", 0.5), "--image"),
        (asked(folder, "--mask", picture), "--image"),
        (asked(folder, "--image", picture, "--mask", other), "is 64x40, expected 64x48"),
        (asked(folder, "--image", picture, "--mask", empty), "empty.txt"),
        (asked(folder, "--interpolate", 1, prompt=PROMPTS), "--interpolate"),
        (asked(folder, "--interpolate", 5, prompt=two), "--interpolate"),
        (asked(folder, "--interpolate", 5, "--seeds", "1-3"), "--interpolate"),
        (asked(folder, "--interpolate", 5, "--seeds", "4"), "--interpolate"),
        (asked(folder, "--interpolates", 5), "did you mean --interpolate?"),
    ]
    for given, wanted in cases:
        assert wanted in refused("stable_diffusion", *given), given


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def copied(folder, path):
    shutil.copytree(folder, path)
    return path


def changed(folder, path, file, **settings):
    """A copy of the folder, with settings in one of its .json files."""
    told = json.loads((folder / file).read_text()) | settings
    (copied(folder, path) / file).write_text(json.dumps(told))
    return path


def test_weights_that_are_not_stable_diffusion_1_are_refused(folder, tmp_path):
    half, safety = copied(folder, tmp_path / "half"), tmp_path / "safety.safetensors"
    shutil.rmtree(half / "text_encoder")
    v = changed(
        folder, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction"
    )
    gelu = changed(folder, tmp_path / "gelu", "text_encoder/config.json", hidden_act="gelu")
    save_file({"special_care_embeds": torch.ones(3, 768)}, safety)
    code, alone, second = (tmp_path / f"{name}.ckpt" for name in ("code", "alone", "second"))
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Harmful()}, code)
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"state_dict": state}, alone)
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    torch.save({"state_dict": {name: torch.ones(3, 1024)}}, second)
    torn = copied(folder, tmp_path / "torn")
    file = torn / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    painting = copied(folder, tmp_path / "painting")
    tiny.networks(unet_channels=9)["unet"].save_pretrained(painting / "unet")
    cases = [
        (half, "text_encoder"),
        (half / "unet", "expected"),
        (v, "Stable Diffusion 2"),
        (gelu, "gelu"),
        (safety, "safety checker"),
        (code, str(code)),
        (alone, "U-Net"),
        (second, "Stable Diffusion 2"),
        (torn, "torn"),
        (painting, "9"),
    ]
    words = tmp_path / "words.txt.gz"
    for weights, wanted in cases:
        line = refused("stable_diffusion", *asked(weights, "--out", tmp_path / "out"))
        assert wanted in line and "executed" not in line, weights
    assert not (tmp_path / "out").exists()
    assert "words.txt.gz" in refused("stable_diffusion", *asked(folder, "--vocabulary", words))


def test_a_single_file_needs_a_vocabulary_of_its_own_size(folder, tmp_path):
    succeed("stable_diffusion", "--smoke", "--gpus", 0, "--out", tmp_path)
    weights = tmp_path / "tiny.safetensors"
    assert "--vocabulary" in refused("stable_diffusion", *asked(weights))
    other = ["--vocabulary", folder / "tokenizer"]  # of the other tiny model
    assert "tokens" in refused("stable_diffusion", *asked(weights, *other))
    own = ["--vocabulary", tmp_path / "tiny-vocabulary.txt.gz"]
    succeed("stable_diffusion", *asked(weights, *own, "--out", tmp_path / "out"))
    assert (tmp_path / "out" / "0000.png").exists()
