"""ldm_cfg.py by command: what does not fit says so first, plans, autoencoders used again."""

from runtime.checkpoints import load_checkpoint
from runtime.files import read_log

import shutil

import numpy as np
import pytest
import torch
from launching import run, succeed

from networks import kl_autoencoder as vae


@pytest.fixture
def flags(toy, tiny):
    short = ["--steps", "3", "--ae-steps", "3", "--sample-every", "0"]
    return [*tiny["ldm_cfg"], *toy, *short]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--model", "dit-s/8", "--patch", "4"], ["4x4", "8"]),
        (["--model", "unett"], ["unett", "dit-"]),
        (["--discriminator", "0.5"], ["--disc-start 1000", "--ae-steps 3", "never"]),
        (["--prediction", "eps"], ["--schedule cosine", "--prediction v"]),
        (["--guidance", "nan"], ["--guidance nan", "finite"]),
        (["--guidance-interval", "0.9", "0.1"], ["--guidance-interval", "rises"]),
        (["--guidance-rescale", "2"], ["--guidance-rescale", "0 to 1"]),
        (["--n", "1", "--n-eval", "1"], ["--n-eval", "at least 2"]),
        (["--ae", "ldm"], ["--ae ldm", "--ae-mult 1 2 4 4"]),
        (["--ae", "nowhere"], ["--ae nowhere", "kl, vq, ldm"]),
        (["--keep-every", "2"], ["--keep-every 2", "--save-every 3"]),
        (["--attention", "0", "5"], ["--attention 0 5", "0 to 1"]),
        (["--eta", "0.5", "--sampler", "dpmpp"], ["--eta 0.5", "ddim, not dpmpp"]),
        (["--sample-steps", "2000"], ["--sample-steps 2000", "--timesteps 1000"]),
        (["--resume", "nowhere.pt"], ["nowhere.pt: no such file"]),
        (["--dry-run", "--gpus", "3"], ["--batch-size 8", "3 processes"]),
        (["--dry-run", "--gpus", "-3"], ["--gpus -3"]),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_trained(wrong, words, flags, tmp_path):
    done = run("ldm_cfg", *flags, *wrong, "--out", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.err and all(word in line for word in words), line


def test_a_plan_tells_sizes_and_what_is_there(flags, tmp_path):
    plan = [*flags, "--out", tmp_path / "run", "--dry-run"]
    before = succeed("ldm_cfg", *plan, "--gpus", "8").out  # of a machine that is not this one
    assert "64 images 16x16x1, 2 classes" in before and "8 with 1 images each, on GPUs" in before
    assert before.count("to do") == 3 and not (tmp_path / "run").exists()
    succeed("ldm_cfg", *flags, "--out", tmp_path / "run", "--stage", "latents")
    after = succeed("ldm_cfg", *plan).out
    assert "0.4 epochs: at step 3" in after and "there" in after and after.count("to do") == 1
    other = succeed("ldm_cfg", *plan, "--ae-lr", "0.5").out
    assert "REFUSED" in other and "ae_lr 0.002 there, 0.5 here: name another --out" in other
    assert "ae kl there, vq here" in succeed("ldm_cfg", *plan, "--ae", "vq").out
    checkpoint = tmp_path / "run" / "autoencoder" / "ckpt.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert "is damaged" in succeed("ldm_cfg", *plan).out


def test_an_autoencoder_trained_before_serves_another_denoiser(flags, toy, tmp_path):
    """Its network is told by the checkpoint, not by the flags, and later not by its path."""
    first, second = tmp_path / "first", tmp_path / "second"
    succeed("ldm_cfg", *flags, "--out", first, "--stage", "latents", "--ae", "vq")
    succeed(
        "ldm_cfg",
        *flags,
        "--out",
        second,
        "--ae",
        first / "autoencoder" / "ckpt.pt",
        "--ae-width",
        "32",
    )
    for name in ("moments.npy",):
        one, two = (np.load(folder / "latents" / name) for folder in (first, second))
        np.testing.assert_array_equal(one, two)
    shutil.rmtree(first)
    sample = ["--sample", second / "ckpt.pt", "--n", "4", "--gpus", "0"]
    succeed("ldm_cfg", *sample, "--out", tmp_path / "samples")
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (4, 16, 16, 1)


def test_a_published_autoencoder_is_not_needed_to_sample(flags, tmp_path):
    torch.manual_seed(0)
    ae, folder = vae.TinyAutoencoder(channels=1, width=16), tmp_path / "tiny"
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(ae, part).state_dict(), folder / f"tiny_{part}.pth")
    succeed("ldm_cfg", *flags, "--ae", folder, "--out", tmp_path / "run")
    folder.rename(tmp_path / "moved")
    sample = ["--sample", tmp_path / "run" / "ckpt.pt", "--n", "3", "--gpus", "0"]
    succeed("ldm_cfg", *sample, "--out", tmp_path / "samples")
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (3, 16, 16, 1)


def test_a_checkpoint_of_another_network_says_so(flags, tmp_path):
    succeed("ldm_cfg", *flags, "--out", tmp_path)
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["ema"] = {"old." + name: value for name, value in state["ema"].items()}
    torch.save(state, tmp_path / "old.pt")
    done = run("ldm_cfg", "--sample", tmp_path / "old.pt", "--n", "2", "--gpus", "0")
    assert done.code == 2 and "old.pt holds another network" in done.err


def test_a_cache_whose_latents_are_gone_is_made_anew(flags, tmp_path):
    succeed("ldm_cfg", *flags, "--out", tmp_path, "--stage", "latents")
    path = tmp_path / "latents" / "moments.npy"
    before = np.load(path)
    path.unlink()
    succeed("ldm_cfg", *flags, "--out", tmp_path)
    np.testing.assert_array_equal(np.load(path), before)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 3


def test_a_checkpoint_named_to_go_on_from_is_what_gets_sampled(flags, tmp_path):
    """Also where it is at the last step already, and in another folder."""
    run, other = tmp_path / "run", tmp_path / "other"
    succeed("ldm_cfg", *flags, "--keep-every", "3", "--steps", "6", "--out", run)
    kept = run / "ckpt-000003.pt"
    for folder in (other, run):
        succeed("ldm_cfg", *flags, "--steps", "3", "--resume", kept, "--out", folder)
        assert load_checkpoint(folder / "ckpt.pt")["step"] == 3
        assert (folder / "samples.npz").stat().st_mtime_ns > kept.stat().st_mtime_ns
    first, second = (np.load(folder / "samples.npz")["arr_0"] for folder in (other, run))
    np.testing.assert_array_equal(first, second)


def test_a_checkpoint_older_than_a_setting_goes_on_with_its_default(flags, tmp_path):
    succeed("ldm_cfg", *flags, "--out", tmp_path)
    path = tmp_path / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["learned_variance"], state["config"]["guidance_rescale"]
    torch.save(state, path)
    done = run("ldm_cfg", *flags, "--out", tmp_path, "--learned-variance")
    assert done.code == 2 and "learned_variance False there, True here" in done.err
    succeed("ldm_cfg", *flags, "--out", tmp_path, "--steps", "4")
    torch.save(state, path)
    succeed("ldm_cfg", "--sample", path, "--n", "2", "--gpus", "0")
