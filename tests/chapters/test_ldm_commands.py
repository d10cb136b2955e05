"""Latent chapters by command: what does not fit says so first, plans, autoencoders used again."""

from runtime.checkpoints import load_checkpoint
from runtime.files import read_log

import shutil

import numpy as np
import pytest
import torch
from launching import run, succeed

from image_data import datasets
from networks.autoencoders import load_autoencoder
from networks.kl_autoencoder import TinyAutoencoder

SHORT = ["--steps", "3", "--sample-every", "0"]


@pytest.fixture
def flags(toy, tiny):
    return [*tiny["ldm_cfg"], *toy, *SHORT, "--ae-steps", "3"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--model", "unett"], ["unett", "sd-label"]),
        (["--num-heads", "3"], ["--num-heads 3 must divide"]),
        (["--model", "sd", "--model-channels", "31"], ["--model-channels 31 must be even"]),
        (["--prediction", "eps"], ["--schedule cosine", "--prediction v"]),
        (["--guidance", "nan"], ["--guidance nan", "finite"]),
        (["--guidance-interval", "0.9", "0.1"], ["--guidance-interval", "rise"]),
        (["--guidance-rescale", "2"], ["--guidance-rescale", "0 to 1"]),
        (["--n", "1", "--n-eval", "1"], ["--n-eval", "at least 2"]),
        (["--ae", "some.pt"], ["--ae-steps does nothing without --ae kl"]),
        (["--keep-every", "2"], ["--keep-every 2", "--save-every 3"]),
        (["--eta", "0.5", "--sampler", "dpmpp"], ["--eta 0.5", "ddim, not dpmpp"]),
        (["--sample-steps", "2000"], ["--sample-steps 2000", "1000 timesteps"]),
        (["--resume", "nowhere.pt"], ["nowhere.pt: no such file"]),
        (["--dry-run", "--gpus", "3"], ["--batch-size 8", "3 processes"]),
        (["--dry-run", "--gpus", "-3"], ["--gpus -3"]),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_trained(wrong, words, flags, tmp_path):
    done = run("ldm_cfg", *flags, *wrong, "--out", tmp_path / "run")
    assert_refused(done, words, tmp_path / "run")


def test_an_autoencoder_that_is_not_there(toy, tiny, tmp_path):
    done = run("ldm_cfg", *tiny["ldm_cfg"], *toy, "--ae", "nowhere", "--out", tmp_path / "run")
    assert_refused(done, ["--ae nowhere", "published or trained here"], tmp_path / "run")


def assert_refused(done, words, folder):
    assert done.code == 2 and not folder.exists(), done.out
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.err and all(word in line for word in words), line


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--model", "dit-s/8", "--patch", "4"], ["4x4", "8"]),
        (["--model", "unett"], ["unett", "dit-"]),
        (["--prediction", "eps"], ["--schedule cosine", "--prediction v"]),
        (["--label-dropout", "2"], ["--label-dropout", "0 to 1"]),
        (["--model-channels", "32"], ["unknown flag --model-channels"]),
        (["--resume", "nowhere.pt"], ["nowhere.pt: no such file"]),
    ],
)
def test_what_does_not_fit_a_transformer_is_one_line_too(wrong, words, toy, tiny, tmp_path):
    done = run("dit", *tiny["dit"], *toy, *SHORT, *wrong, "--out", tmp_path / "run")
    assert_refused(done, words, tmp_path / "run")


def test_a_plan_tells_sizes_and_what_is_there(flags, tmp_path):
    plan = [*flags, "--out", tmp_path / "run", "--dry-run"]
    before = succeed("ldm_cfg", *plan, "--gpus", "8").out  # of a machine that is not this one
    assert "64 images 16x16x1, 2 classes" in before and "8 with 1 images each, on GPUs" in before
    assert before.count("to do") == 3 and not (tmp_path / "run").exists()
    succeed("ldm_cfg", *flags, "--out", tmp_path / "run", "--stage", "latents")
    after = succeed("ldm_cfg", *plan).out
    assert "0.4 epochs: at step 3" in after and "there" in after and after.count("to do") == 1
    other = succeed("ldm_cfg", *plan, "--ae-lr", "0.5").out
    assert "REFUSED" in other and "lr 0.002 there, 0.5 here: name another --out" in other
    assert "kl_weight 0.003 there, 1.0 here" in succeed("ldm_cfg", *plan, "--kl-weight", "1").out
    checkpoint = tmp_path / "run" / "autoencoder" / "ckpt.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert "is damaged" in succeed("ldm_cfg", *plan).out


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("script", ["ldm_cfg", "dit"])
def test_an_autoencoder_trained_before_serves_another_denoiser(
    script, kind, flags, toy, tiny, tmp_path
):
    """Its network is told by the checkpoint, not by the flags, and later not by its path."""
    first, second = tmp_path / "first", tmp_path / "second"
    if kind == "kl":
        succeed("ldm_cfg", *flags, "--out", first, "--stage", "latents")
        path = first / "autoencoder" / "ckpt.pt"
    else:
        succeed("autoencoder", *tiny["autoencoder"], *toy, *SHORT, "--ae", "vq", "--out", first)
        path = first / "ckpt.pt"
    again = [script, *tiny[script], *toy, *SHORT, "--ae", path, "--out", second]
    assert "--patch does nothing without --ae kl" in run(*again, "--patch", "2").err
    succeed(*again)
    found = np.load(second / "latents" / "moments.npy")
    if kind == "kl":
        np.testing.assert_array_equal(found, np.load(first / "latents" / "moments.npy"))
    ds = datasets.load(toy[1], toy[3])
    with torch.no_grad():
        mean, _ = load_autoencoder(path).encode(ds.batch(np.arange(len(ds)))[0])
    mean = mean.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found[..., : mean.shape[3]], mean, rtol=1e-4, atol=1e-5)
    shutil.rmtree(first)
    sample = ["--sample", second / "ckpt.pt", "--n", "4", "--gpus", "0"]
    succeed(script, *sample, "--out", tmp_path / "samples")
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (4, 16, 16, 1)


def test_a_published_autoencoder_is_not_needed_to_sample(toy, tiny, tmp_path):
    torch.manual_seed(0)
    ae, folder = TinyAutoencoder(channels=1, model_channels=16), tmp_path / "tiny"
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(ae, part).state_dict(), folder / f"tiny_{part}.pth")
    given = [*tiny["ldm_cfg"], *toy, *SHORT, "--ae", folder]
    succeed("ldm_cfg", *given, "--out", tmp_path / "run")
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
    assert done.code == 2 and "these weights are of another network" in done.err


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


def test_a_run_goes_on_with_more_steps_and_not_with_another_network(toy, tiny, tmp_path):
    flags = [*tiny["dit"], *toy, *SHORT, "--ae-steps", "3", "--out", tmp_path]
    succeed("dit", *flags)
    done = run("dit", *flags, "--learn-sigma")
    assert done.code == 2 and "learn_sigma False there, True here" in done.err
    done = run("ldm_cfg", *tiny["ldm_cfg"], *toy, *SHORT, "--ae-steps", "3", "--out", tmp_path)
    assert done.code == 2 and "written by dit.py, expected one of ldm_cfg.py" in done.err
    succeed("dit", *flags, "--steps", "4")
    assert load_checkpoint(tmp_path / "ckpt.pt", "dit")["step"] == 4


def test_a_learned_variance_is_trained_and_sampled_by_command(toy, tiny, tmp_path):
    flags = [*tiny["dit"], *toy, *SHORT, "--ae-steps", "3", "--out", tmp_path]
    succeed("dit", *flags, "--learn-sigma", "--sampler", "ddpm", "--n", "5", "--seeds", "0-4")
    state = load_checkpoint(tmp_path / "ckpt.pt", "dit")
    assert state["settings"]["learn_sigma"] and state["config"]["sampler"] == "ddpm"
    trained = np.load(tmp_path / "samples.npz")["arr_0"]
    sample = ["--sample", tmp_path / "ckpt.pt", "--seeds", "0-4", "--gpus", "0", "--out"]
    succeed("dit", *sample, tmp_path / "again")
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "samples.npz")["arr_0"], trained)
