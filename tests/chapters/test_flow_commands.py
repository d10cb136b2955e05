"""flow_matching.py's commands: likelihood, codes, other chapters' networks, latents, bad input."""

from runtime.checkpoints import load_checkpoint
from runtime.files import read_json

import math

import numpy as np
import pytest
import torch
from launching import refused, succeed
from run_folders import rows

import ddim
import ddpm_pixel
import flow_matching
from image_data import datasets
from kernels import gaussian

FEW = ["--gpus", 0, "--sample-steps", 3]


@pytest.fixture(scope="module")
def still(tiny_flow, tmp_path_factory):
    """The same with weights of 0: nothing flows."""
    path = tmp_path_factory.mktemp("still") / "ckpt.pt"
    state = load_checkpoint(tiny_flow / "ckpt.pt")
    state["ema"] = {name: torch.zeros_like(value) for name, value in state["ema"].items()}
    torch.save(dict(state), path)
    return path


def samples(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_likelihood_where_nothing_flows_is_that_of_the_noise(still, tmp_path):
    succeed("flow_matching", "--nll", still, "--gpus", 0, "--n", 5, "--out", tmp_path)
    trained = load_checkpoint(still)["config"]
    ds, _ = datasets.held_out(trained["data"], trained["data_root"], (1, 16, 16), ())
    x, _ = ds.batch(np.linspace(0, len(ds) - 1, 5).round().astype(int))
    u = torch.special.ndtr(gaussian(x.shape, torch.arange(5), 0, "cpu"))
    x = (x + (u - 0.5) / 127.5).double()
    log_p = -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=(1, 2, 3))
    wanted = -log_p / (x[0].numel() * math.log(2)) + math.log2(127.5)
    found = read_json(tmp_path / "nll.json")
    assert found["each"] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert found["bits_per_dim"] == pytest.approx(wanted.mean().item(), abs=1e-6)
    assert found["standard_error"] == pytest.approx(wanted.std().item() / 5**0.5, abs=1e-6)
    assert (tmp_path / "nll.png").exists()


def test_codes_are_those_of_ddim_over_the_bridge(tiny_flow, tmp_path):
    succeed("flow_matching", "--interpolate", tiny_flow, *FEW, "--n", 2, "--out", tmp_path)
    succeed(
        "flow_matching",
        "--encode",
        tiny_flow,
        "--gpus",
        0,
        "--n",
        2,
        "--encode-steps",
        "2,3",
        "--out",
        tmp_path,
    )
    for file in ("interpolation.png", "reconstruction.png", "reconstruction-error.png"):
        assert (tmp_path / file).exists()
    still_refused = refused(
        "flow_matching", "--encode", tiny_flow, "--gpus", 0, "--sampler", "euler"
    )
    assert "--sampler has no part in --encode" in still_refused


def test_a_flow_by_rk45_and_by_algorithm_2(tiny_flow, tmp_path):
    """With rk45 a sample is a function of its seed, bit by bit; ddpm asks chapter 1's eps_hat."""
    asked = ["--sample", tiny_flow / "ckpt.pt", *FEW]
    for name, seeds in {"all": "0-4", "one": "3"}.items():
        more = ["--sampler", "rk45", "--tolerance", 1e-3, "--seeds", seeds]
        succeed("flow_matching", *asked, *more, "--out", tmp_path / name)
    assert np.array_equal(samples(tmp_path / "all")[3:4], samples(tmp_path / "one"))
    succeed("flow_matching", *asked, "--sampler", "ddpm", "--n", 2, "--out", tmp_path / "ddpm")
    flow, _ = flow_matching.load_flow(tiny_flow / "ckpt.pt", "cpu")
    alpha_bar = ddpm_pixel.make_alpha_bar("cosine", 1000)
    pairs, seeds = ddpm_pixel.timestep_pairs(1000, 3), torch.arange(2)
    net = flow_matching.AsChain(flow.net, alpha_bar)
    how = net, alpha_bar, pairs, flow.space.shape, seeds, seeds % 2
    *_, (x, _) = ddpm_pixel.sample(*how, clip=False)
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(samples(tmp_path / "ddpm"), wanted)


def test_a_network_of_chapter_1_is_sampled_as_a_flow(toy, tiny, tmp_path):
    """Its own clipping; by Euler over DDIM's times the samples are DDIM's."""
    given = [*tiny["ddpm_pixel"], *toy, "--steps", 4, "--schedule", "cosine"]
    succeed("ddpm_pixel", *given, "--out", tmp_path / "run")
    path = tmp_path / "run" / "ckpt.pt"
    asked = ["--sample", path, *FEW, "--n", 2, "--out", tmp_path / "flow"]
    succeed("flow_matching", *asked, "--sampler", "euler")
    flow, cfg = flow_matching.load_flow(path, "cpu")
    assert cfg.clip_denoised and samples(tmp_path / "flow").shape[0] == 2
    net, trained, shape, _, alpha_bar = ddpm_pixel.load_net(path, "cpu")
    pairs, seeds = ddim.subsequence(trained.timesteps, 4), torch.arange(2)
    *_, (wanted, _) = ddim.sample(net, alpha_bar, pairs, shape, seeds, seeds)
    sigmas = [((1 - alpha_bar[t]) / alpha_bar[t]).sqrt().item() for t, _ in pairs]
    times = [*(sigma / (1 + sigma) for sigma in sigmas), 0.0]
    x = math.hypot(times[0], 1 - times[0]) * ddim.noise(seeds, shape)
    with torch.no_grad():
        v = flow_matching.velocity(flow.net, flow.column, seeds, clip=True)
        *_, (found, _) = flow_matching.follow(v, x, times, "euler")
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    line = refused("flow_matching", "--sample", path, "--gpus", 0, "--sampler", "ddpm")
    assert "--sampler ddpm is for networks of this script" in line
    assert "expected one of flow_matching.py" in refused(
        "flow_matching", "--nll", path, "--gpus", 0
    )


def test_latents_of_a_run_are_trained_on_and_left_as_they_are(toy, tiny, tmp_path):
    first, out = tmp_path / "ldm", tmp_path / "flow"
    succeed("ldm_cfg", *tiny["ldm_cfg"], *toy, "--steps", 3, "--seed", 5, "--out", first)
    before = {path: path.stat().st_mtime_ns for path in (first / "latents").iterdir()}
    asked = ["--smoke", "--gpus", 0, "--latents", first, "--out", out]
    succeed("flow_matching", *asked)
    assert {path: path.stat().st_mtime_ns for path in (first / "latents").iterdir()} == before
    theirs, state = load_checkpoint(first / "ckpt.pt"), load_checkpoint(out / "ckpt.pt")
    assert state["config"]["data"] == theirs["config"]["data"]
    assert state["scale"] == theirs["scale"] and len(rows(out)) == 4
    weights = state["autoencoder"]
    assert all(torch.equal(value, weights[key]) for key, value in theirs["autoencoder"].items())
    succeed("flow_matching", "--sample", out, *FEW, "--n", 2, "--out", tmp_path / "drawn")
    assert samples(tmp_path / "drawn").shape[1:] == samples(first).shape[1:]
    (tmp_path / "c.yaml").write_text("data: mnist\nflip: true\n")
    again = ["--config", tmp_path / "c.yaml", "--out", tmp_path / "again"]
    succeed("flow_matching", *asked[:5], *again)
    assert {path: path.stat().st_mtime_ns for path in (first / "latents").iterdir()} == before
    line = refused("flow_matching", *asked, "--data", "mnist")
    assert "--data has no part in --latents" in line
    assert "--nll is for pixels, within bounds" in refused(
        "flow_matching", "--nll", out, "--gpus", 0
    )


@pytest.mark.parametrize(
    "words, told",
    [
        ("--mode-scale 2 --weighting-scheme mode", "--mode-scale 2: expected a number from -1"),
        ("--shift 0", "--shift must be greater than 0"),
        ("--logit-mean 1", "--logit-mean does nothing without --weighting-scheme logit_normal"),
        ("--model dit-s/3", "a patch of 1, 2, 4, 8"),
        ("--model dit-s/2 --channel-mult 1", "--channel-mult does nothing without --model"),
        ("--latents nowhere", "nowhere: no such file"),
        ("--tolerance 1e-20 --sampler rk45", "--tolerance 1e-20: expected at least 1e-7"),
        ("--guidance 1 --label-dropout 0", "--guidance needs a network that learns without labels"),
    ],
)
def test_bad_input_in_one_line(words, told):
    assert told in refused("flow_matching", "--gpus", 0, *words.split())
