"""Chapter 1's training: what a run leaves behind, running means, parts, scores on the way."""

from runtime.commandline import BadInput, parse
from runtime.processes import World

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import run, succeed
from PIL import Image
from run_folders import saved
from tiny_runs import TINY, flags

import ddpm_pixel as ch1
import eval_fid

DDPM_FORM = {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0}
SHORT = {**TINY, "model_channels": 16, "sample_every": 0, "steps": 4}


@pytest.fixture(scope="module")
def trained(toy, tiny, tmp_path_factory):
    """A run of 6 steps with a little of everything."""
    out = tmp_path_factory.mktemp("trained")
    some = {"steps": 6, "timesteps": 20, "ema": (0.1, 0.9), "dropout": 0.5, "schedule": "cosine"}
    more = flags("ddpm_pixel", **some, variance="large", prediction="v", loss="huber")
    done = succeed("ddpm_pixel", *tiny["ddpm_pixel"], *toy, *more, "--out", out)
    (out / "said.txt").write_text(done.out)
    return out


def test_a_run_says_what_it_trains(trained):
    said = (trained / "said.txt").read_text().splitlines()
    found, (data, chain, net, samples) = said[:-4], said[-4:]
    # Of the folder, unless a test before this one has prepared it in this process.
    assert all(": 64 images of 2 classes (bars 32, dots 32); there" in line for line in found)
    assert len(found) < 2
    assert data == "toy: 64 images (1, 16, 16), 2 classes"
    count = sum(p.numel() for p in ch1.load_net(trained / "ckpt.pt", "cpu")[0].parameters())
    assert net == f"U-Net predicts v, loss huber; {count / 1e6:.2f} M parameters"
    assert chain == "cosine schedule, T = 20; step 0 of 6" and str(trained) in samples


def test_a_run_leaves_curves_and_the_pictures_of_both_processes(trained):
    for name, blocks in (("forward", 1), ("reverse", 2)):
        with Image.open(trained / f"{name}.png") as strip, Image.open(trained / f"{name}.gif") as g:
            assert strip.height > 2 * 64 and strip.width > blocks * 5 * 64 and g.n_frames > 3
    row = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 6 and row["peak_memory_mb"] > 50


def test_samples_of_a_run_are_those_of_its_checkpoint_without_dropout(trained, tmp_path):
    succeed("ddpm_pixel", "--sample", trained / "ckpt.pt", "--seeds", "0-3", "--out", tmp_path)
    ours, theirs = (np.load(f / "samples.npz")["arr_0"] for f in (trained, tmp_path))
    assert np.array_equal(ours, theirs)


def test_each_running_mean_can_be_sampled(trained):
    path = trained / "ckpt.pt"
    state = saved(trained)
    assert state["ema"].keys() == state["more_emas"][0].keys() == state["model"].keys()
    name = "conv_out.weight"
    first, second = (ch1.load_net(path, "cpu", d)[0].conv_out.weight for d in (0.1, 0.9))
    assert torch.equal(first, state["ema"][name])
    assert torch.equal(second, state["more_emas"][0][name])
    assert not torch.equal(first, second) and not torch.equal(first, state["model"][name])
    with pytest.raises(BadInput, match=r"--ema 0.7.*0.1, 0.9"):
        ch1.load_net(path, "cpu", 0.7)


def test_the_running_means_follow_their_decays(toy, tiny, tmp_path):
    """w_ema <- d w_ema + (1 - d) w with d = min(decay, (1+n)/(10+n)), n = 1, 2, ..."""
    weights = []
    given = [*tiny["ddpm_pixel"], *toy, "--ema", 0.2, 0.9, "--save-every", 1, "--sample-every", 0]
    for step in (1, 2, 3):
        succeed("ddpm_pixel", *given, "--lr-decay", "none", "--steps", step, "--out", tmp_path)
        weights.append(saved(tmp_path))
    name = "conv_out.weight"
    for averages, decay in ((lambda s: s["ema"], 0.2), (lambda s: s["more_emas"][0], 0.9)):
        mean = weights[0]["model"][name].double()
        for n, state in enumerate(weights[1:], start=1):
            d = min(decay, (1 + n) / (10 + n))
            mean = d * mean + (1 - d) * state["model"][name].double()
            torch.testing.assert_close(averages(state)[name].double(), mean, rtol=0, atol=1e-6)


def test_accumulation_and_checkpointing_change_memory_not_the_weights(toy, tiny, tmp_path):
    given = [*tiny["ddpm_pixel"], *toy, "--steps", 3, "--sample-every", 0]
    found = []
    for i, extra in enumerate(([], ["--accumulate", 4], ["--use-checkpoint"])):
        succeed("ddpm_pixel", *given, *extra, "--out", tmp_path / str(i))
        found.append(saved(tmp_path / str(i))["optimizer"])
    for other in found[1:]:
        for a, b in zip(found[0]["state"].values(), other["state"].values(), strict=True):
            scale = a["exp_avg"].abs().max()
            torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=0, atol=2e-4 * float(scale))


def test_a_published_network_of_classes_is_sampled_but_not_guided(tmp_path):
    """Its table of labels has no row that means "no label"."""
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=3,
        attention_head_dim=None,
        **DDPM_FORM,
    ).save_pretrained(tmp_path)
    given = ["--sample", tmp_path, "--seeds", "0-1", "--sample-steps", 2, "--out", tmp_path]
    for script in ("ddpm_pixel", "ddim"):
        done = run(script, *given, "--guidance", 1)
        assert done.code == 2 and "leave out --guidance" in done.err
        done = succeed(script, *given, "--classes", "2")
        assert "no scheduler: taken as linear, T = 1000" in done.out
        assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [2, 2]


def test_scores_on_the_way_are_logged_and_drawn(toy, tmp_path, monkeypatch):
    class Evaluator(eval_fid.Evaluator):
        def __init__(self, *args, **options):
            known = {"network": "a test", "reference": "toy:test", "n_reference": 9}
            vars(self).update(known, calls=0, told={6}, world=World())

        def __call__(self, images, labels, world):
            assert images.shape == (6, 16, 16, 1) and labels.tolist() == [0, 1, 0, 1, 0, 1]
            self.calls += 1
            return {"frechet": 10.0 / self.calls, "class_accuracy": 0.1 * self.calls}

    monkeypatch.setattr(eval_fid, "Evaluator", Evaluator)
    given = [*toy, *flags("ddpm_pixel", **SHORT, metric_every=2, metric_n=6)]
    cfg = parse(ch1.Config, "", given)
    ch1.train(replace(cfg, out=str(tmp_path)), World())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["frechet"]) for r in rows if "frechet" in r] == [(2, 10.0), (4, 5.0)]
    about = [(r["metric_n"], r["metric_features"]) for r in rows if "frechet" in r]
    assert about == [(6, "a test")] * 2
    for at in ("ckpt.pt", "ckpt-previous.pt"):  # what was saved had been scored: a kill loses none
        step = saved(tmp_path, at)["step"]
        assert step == 4 or [r["step"] for r in rows if "frechet" in r and r["step"] <= step]
    with Image.open(tmp_path / "metric.png") as picture:
        assert picture.width > 1100  # two panels


@pytest.mark.parametrize(
    "given, told",
    [
        (["--schedule", "cosine", "--alpha-min", "0"], "--prediction v or x0"),
        (["--schedule", "cosine", "--alpha-min", "1"], "must fall"),
        (["--timesteps", "9", "--sample-steps", "4"], "--alpha-min leaves no image"),
        (["--variance", "learned"], "--variance"),
        (["--ema", "0.9", "1.5"], "--ema"),
        (["--accumulate", "0"], "--accumulate"),
        (["--eta", "0.5"], "unknown flag --eta"),
        (["--metric-every", "5", "--metric-n", "1"], "--metric-n"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--sample", __file__], "is no file of plain tensors but text"),
    ],
)
def test_settings_out_of_range_are_named(given, told):
    done = run("ddpm_pixel", *given)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
