"""What a command draws beside a checkpoint replaces nothing of another command or setting."""

from runtime import commandline as cli
from runtime.result_folders import LONGEST, suffix_of

import importlib
import sys
from pathlib import Path

import pytest
from launching import succeed
from tiny_runs import flags

COMMANDS_OF = {  # what is typed after the checkpoint -> where below its folder
    "ddpm_pixel --sample": "ddpm_pixel",
    "ddpm_pixel --sample --classes 3": "ddpm_pixel_classes=3",
    "ddpm_pixel --sample --no-clip-denoised --n=5": "ddpm_pixel_n=5_no-clip-denoised",
    "ddim --sample": "ddim",
    "ddim --sample --gif --batch-size 4": "ddim",  # the same images, and how they came
    "ddim --sample --sample-steps 10 --eta 0.5": "ddim_sample-steps=10_eta=0.5",
    "ddim --encode": "ddim-encode",
    "ddim --interpolate --seeds 3,9": "ddim-interpolate_seeds=3,9",
    "dpm_solver --encode": "dpm_solver-encode",
    "dpm_solver --sample": "dpm_solver",
    "improved_ddpm --sample --timestep-respacing 0-9,49": (
        "improved_ddpm_timestep-respacing=0-9,49"
    ),
    "improved_ddpm --nll": ".",
    "improved_ddpm --nll --n 8": "improved_ddpm-nll_n=8",
    "edm --sample --S-churn 0 2 4": "edm_S-churn=0.0,2.0,4.0",
    "ldm_cfg --sample --guidance 3 --smoke": "ldm_cfg_smoke_guidance=3.0",
    "dit --sample --guidance 3": "dit_guidance=3.0",
    "classifier_guidance --sample --classifier-scale 5": "classifier_guidance_classifier-scale=5.0",
    "classifier_guidance --study --study-scales 0,1": ".",  # its files are named so
    "autoencoder --sample --n 8": "autoencoder_n=8",
}


def folder_of(line, checkpoint, monkeypatch):
    """Where the command writes; a checkpoint follows the first flag of the line."""
    script, task, *typed = line.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", task, str(checkpoint), *typed])
    cfg = cli.parse(importlib.import_module(script).Config, "")
    return cli.folder_of(cfg, getattr(cfg, cfg.task()))


@pytest.mark.parametrize("line, below", COMMANDS_OF.items())
def test_every_command_and_setting_has_a_folder_of_its_own(line, below, tmp_path, monkeypatch):
    assert folder_of(line, tmp_path / "ckpt.pt", monkeypatch) == tmp_path / below
    assert folder_of(f"{line} --out here", tmp_path / "ckpt.pt", monkeypatch) == Path("here")


def test_other_checkpoints_and_published_folders(tmp_path, monkeypatch):
    kept = tmp_path / "ckpt-000500.pt"
    assert folder_of("ddim --sample", kept, monkeypatch) == tmp_path / "ddim_of=ckpt-000500"
    (tmp_path / "published").mkdir()
    assert folder_of("ddim --sample", tmp_path / "published", monkeypatch) == (
        tmp_path / "published" / "ddim"
    )


def test_long_settings_are_a_digest():
    long = suffix_of({"seeds": ",".join(map(str, range(100)))})
    assert len(long) < 10 < LONGEST and long != suffix_of({"seeds": "0-98"})
    assert "/" not in suffix_of({"data": "../some where/of mine"})


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_samples_of_a_run_stay_what_its_training_drew(toy, tiny, tmp_path):
    run = tmp_path / "run"
    sizes = [*tiny["ddpm_pixel"], *toy, *flags("ddpm_pixel", steps=2, save_every=1)]
    succeed("ddpm_pixel", *sizes, "--out", run)
    before = files_of(run)
    for line in ("ddpm_pixel --sample --classes 1", "ddim --sample", "ddim --encode --n 3"):
        script, task, *typed = line.split()
        done = succeed(script, task, run, *typed, "--smoke", "--gpus", 0)
        made = {path for path in files_of(run).keys() - before.keys()}
        assert len({path.parts[0] for path in made}) == 1
        assert all(str(run / path.parent) in done.out for path in made)
        now = files_of(run)
        assert all(now[path] == raw for path, raw in before.items() if path.name != "report.html")
        before = now


def test_values_that_names_cannot_hold_are_told_apart(tmp_path, monkeypatch):
    """Sentences that differ in such letters alone, folders of one name, a checkpoint's own."""
    sentences = [suffix_of({"prompt": (text,)}) for text in ("a fox", "a-fox", "a/fox")]
    assert len({*sentences}) == 3 and sentences[1] == "_prompt=a-fox"
    for parent in "ab":
        (tmp_path / parent / "photos").mkdir(parents=True)
    lines = [f"ddim --encode --data {tmp_path / parent / 'photos'}" for parent in "ab"]
    a, b = (folder_of(line, tmp_path / "ckpt.pt", monkeypatch) for line in lines)
    assert a != b and a.name.startswith("ddim-encode_data=photos-") and a.parent == tmp_path


def test_pictures_of_another_sentence_go_elsewhere(tmp_path, monkeypatch):
    stable_diffusion = importlib.import_module("stable_diffusion")
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(stable_diffusion, "launch", lambda draw, cfg: drawn.append(cfg.out))
    monkeypatch.setattr(stable_diffusion, "check", lambda cfg: None)
    for prompt in ("a fox", "a dog", "a fox"):
        given = ["--weights", "none", "--prompt", prompt, "--gpus", "0"]
        monkeypatch.setattr(sys, "argv", ["stable_diffusion.py", *given])
        stable_diffusion.main()
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0].startswith("runs/stable-diffusion_weights=none_prompt=a-fox-")
