"""What stable_diffusion.py's command line refuses: one line that says why, exit code 2."""

import shutil

import pytest
import tiny_stable_diffusion as tiny
import torch
from launching import refused, succeed
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import PROMPTS, asked, pixels, refusal, saved_picture, spot

import stable_diffusion as sd


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
        assert wanted in refusal(*given), given
    for given, wanted in cases[::12]:  # exit code and all
        assert wanted in refused("stable_diffusion", *given), given


A, B = PROMPTS
VAIN = {  # what would do nothing, or not what it says, and what is said of it
    "--guidance -1 --prompt A B": "--guidance -1 looks at no prompt",
    "--guidance -1 --attention --prompt A": "--attention: no word",
    "--attention --prompt EMPTY": "--attention: no word",
    "--attention --prompt EMPTY A": "--attention: no word",
    "--attention --compile --prompt A": "--attention looks into layers: leave out --compile",
    "--negative blue --guidance 0 --prompt A": "--negative does nothing with --guidance 0",
    "--n 1 --interpolate 5 --prompt A B": "--n: --interpolate has a number of its own",
    "--interpolate 1 --prompt A B": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A B A": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A B --seeds 1-3": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A A": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A A --seeds 3,3": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A --seeds 3,3": "expected 2 images or more between two prompts",
    "--interpolate 5 --prompt A --sampler euler_a": "--interpolate of seeds takes no fresh noise",
    "--interpolate 5 --prompt A B --seeds 1,2 --sampler euler_a": "takes no fresh noise",
    "--mask SPOT --prompt A": "--mask says where to draw in --image",
    "--strength 0.75 --prompt A": "--strength is of --image",
    "--image IMAGE --strength 0.24 --prompt A": "--strength 0.24 of --steps 4 leaves no step",
    "--image IMAGE --mask BLACK --prompt A": "is nowhere white",
    "--image IMAGE --mask GRAY --prompt A": "is nowhere white",
    "--size 60 --prompt A": "multiples of 8: type --size 64",
    "--size 3 --prompt A": "multiples of 8: type --size 8",
    "--size 64 99 --prompt A": "multiples of 8: type --size 64 96",
    "--size 64 64 64 --prompt A": "expected one side, or height and width",
    "": "no prompt",
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry-run"])
def test_what_would_do_nothing_is_refused_before_the_files_are_read(dry, tmp_path, monkeypatch):
    """Also of a plan."""
    words = {"A": A, "B": B, "EMPTY": "  "}
    words["IMAGE"] = saved_picture(tmp_path / "from.png", pixels())
    words["SPOT"] = saved_picture(tmp_path / "spot.png", spot())
    words["BLACK"] = saved_picture(tmp_path / "black.png", 0 * spot())
    words["GRAY"] = saved_picture(tmp_path / "gray.png", spot() // 255 * 127)
    monkeypatch.setattr(sd, "read_pipeline", None)
    monkeypatch.chdir(tmp_path)
    for given, why in VAIN.items():
        more = [words.get(word, word) for word in given.split()]
        first = asked("weights", *dry, prompt=None)
        assert why in refusal(*first, *more), given
    assert "--weights is missing" in refusal("--prompt", "a", *dry)
    assert not (tmp_path / "runs").exists()


def test_what_is_next_to_it_is_drawn(folder, tmp_path):
    """Neighbours of what is refused."""
    image = ["--image", saved_picture(tmp_path / "from.png", pixels())]
    gray = ["--mask", saved_picture(tmp_path / "gray.png", spot() // 255 * 128)]
    for given, prompts, count in (
        (["--guidance", -1], [A], 1),
        (["--guidance", -1, "--negative", "blue"], [A], 1),
        (["--attention"], [A, " "], 2),
        ([*image, "--strength", 0.25], [A], 1),
        ([*image, *gray, "--strength", 1], [A], 1),
        (["--interpolate", 2], [A], 2),
        (["--interpolate", 2, "--sampler", "euler_a"], [A, B], 2),
    ):
        tiny.call(*asked(folder, *given, "--out", tmp_path / "out", prompt=prompts))
        assert len(tiny.images_in(tmp_path / "out")) == count


def test_a_folder_that_cannot_be_written_is_refused_before_the_walk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "denoise", None)
    monkeypatch.setattr(sd, "images_wanted", None)
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--out {out} cannot be written to" in refusal(*asked(folder, "--out", out))
    assert (tmp_path / "file").read_text() == "a file"


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def copied(folder, path):
    shutil.copytree(folder, path)
    return path


def test_weights_that_are_not_stable_diffusion_1_are_refused(folder, tmp_path):
    half, safety = copied(folder, tmp_path / "half"), tmp_path / "safety.safetensors"
    shutil.rmtree(half / "text_encoder")
    v = tiny.changed(
        folder, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction"
    )
    gelu = tiny.changed(folder, tmp_path / "gelu", "text_encoder/config.json", hidden_act="gelu")
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
