"""A run of --timestep-respacing, in scripts that read it and that do not; --nll's clamp."""

from runtime.processes import World

import importlib
import json

import numpy as np
import pytest
import torch
from launching import refused, succeed
from tiny_runs import flags

import classifier_guidance as guide
import ddim
import improved_ddpm
from evaluation import over_time
from image_data import datasets

RUN = "--gpus 0 --batch-size 8 --warmup 1 --log-every 1 --save-every 2 --steps 2 "
RUN += "--sample-every 0 --timesteps 20 "
RUN += "--model-channels 16 --channel-mult 1 2 --attention-resolutions 8 --variance small"
SEEN = [0, 1, 2, 19]


def trained(toy, out, *more, script="improved_ddpm"):
    steps = [] if "--timestep-respacing" in more else ["--sample-steps", 4]
    succeed(script, *toy, *RUN.split(), *steps, *more, "--out", out)
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def respaced(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("respaced")
    return trained(toy, out, "--timestep-respacing", "0-2,19", "--no-class-cond")


@pytest.fixture(scope="module")
def classifier(toy, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    how = flags("classifier_guidance", timesteps=20, metric_every=0)
    succeed("classifier_guidance", *tiny["classifier_guidance"], *toy, *how, "--out", out)
    return out / "ckpt.pt"


@pytest.mark.parametrize("script", ["ddim", "dpm_solver", "improved_ddpm"])
def test_typed_steps_are_taken(script, respaced, tmp_path):
    typed = ["--sample-steps", 5, "--spacing", "trailing", "--n", 2, "--gpus", 0]
    done = succeed(script, "--sample", respaced, *typed, "--out", tmp_path)
    assert "5 steps" in done.out or "/5 [" in done.err
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 2


@pytest.mark.parametrize("script", ["ddim", "dpm_solver", "compare_samplers"])
def test_a_typed_spacing_is_taken_where_respacing_is_not_read(script, respaced, monkeypatch):
    config, argv = importlib.import_module(script).Config, [script, "--spacing", "trailing"]
    for more, wanted in (([], "trailing"), (["--no-clip-denoised"], "trailing")):
        monkeypatch.setattr("sys.argv", argv + more)
        cfg = config(spacing="trailing", clip_denoised=not more)
        settings = ddim.opened(cfg, respaced, World(), script)[1]
        assert settings.spacing == wanted and settings.clip_denoised is not bool(more)


def walk_of(monkeypatch, respaced, classifier, *more):
    """The timesteps at which a guided walk asks the classifier."""
    seen, forward = [], guide.NoisyClassifier.forward

    def look(self, x, t):
        seen.append(t[0].item())
        return forward(self, x, t)

    monkeypatch.setattr(guide.NoisyClassifier, "forward", look)
    asked = ["--sample", respaced, "--classifier", classifier, "--n", 1, "--gpus", 0, *more]
    monkeypatch.setattr("sys.argv", ["classifier_guidance.py", *map(str, asked)])
    guide.main()
    return seen


def test_a_guided_walk_visits_the_timesteps_of_the_run(monkeypatch, respaced, classifier, tmp_path):
    seen = walk_of(monkeypatch, respaced, classifier, "--out", tmp_path)
    assert sorted({*seen}) == SEEN


def test_typed_steps_overrule_them_in_a_guided_walk(monkeypatch, respaced, classifier, tmp_path):
    more = ["--sample-steps", 5, "--out", tmp_path]
    seen = walk_of(monkeypatch, respaced, classifier, *more)
    wanted = [t for t, _ in improved_ddpm.timestep_pairs(20, 5)]
    assert sorted({*seen}, reverse=True) == wanted


def test_a_study_visits_them_too(respaced, classifier, tmp_path):
    study = ["--study-scales", "0,1", "--n", "4", "--gpus", "0"]
    how = [*study, "--classifier", classifier, "--out", tmp_path]
    succeed("classifier_guidance", "--study", respaced, *how)
    rows = (tmp_path / "classifier-guidance.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in rows]
    assert made and '"steps": 4' in rows[0] and '"timestep_respacing": "0-2,19"' in rows[0]


# ------------------------------------------------------------------------- --nll, and its clamp


def wide(path):
    """Weights so large that x0_hat leaves [-1, 1]."""
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for value in state["ema"].values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    torch.save(state, path)
    return path


def measured(path, toy, out, *more):
    done = succeed("improved_ddpm", "--nll", path, *toy, "--n", 4, "--gpus", 0, "--out", out, *more)
    return json.loads((out / "nll.json").read_text()), done.out


def test_the_bound_clips_as_the_settings_say(toy, tmp_path):
    path = wide(trained(toy, tmp_path / "run", "--no-class-cond"))
    net, cfg, shape, names, alpha_bar = improved_ddpm.load_net(path, "cpu")
    ds, _ = datasets.held_out(cfg.data, cfg.data_root, shape, names)
    numbers = over_time.spaced(len(ds), 4)
    images, chain = torch.from_numpy(ds.images[numbers]), improved_ddpm.make_chain(alpha_bar)
    how = {"prediction": "eps", "variance": "small"}
    values = {}
    for clip, typed in ((True, []), (True, ["--clip-denoised"]), (False, ["--no-clip-denoised"])):
        seeds = torch.from_numpy(numbers)
        bound = improved_ddpm.bits_per_dim(net, images, None, seeds, chain, clip=clip, **how)
        found, said = measured(path, toy, tmp_path / "nll", *typed)
        assert found["bits_per_dim"] == pytest.approx(bound.total.mean().item(), rel=1e-5)
        told = "x0_hat clipped" if clip else "x0_hat not clipped"
        assert told in said and found["about"].endswith(told)
        values[clip] = found["bits_per_dim"]
    assert abs(values[True] - values[False]) > 0.01
    own = wide(trained(toy, tmp_path / "own", "--no-class-cond", "--no-clip-denoised"))
    assert "x0_hat not clipped" in measured(own, toy, tmp_path / "nll")[1]


def test_a_dynamic_threshold_has_no_bound(toy, tmp_path):
    path = trained(toy, tmp_path / "run", "--dynamic-threshold")
    for more in ([], ["--config", tmp_path / "run" / "config.yaml"]):
        line = refused("improved_ddpm", "--nll", path, *toy, "--gpus", 0, *more)
        assert "thresholds dynamically" in line and "type --clip-denoised" in line
        for clip in ("--clip-denoised", "--no-clip-denoised"):
            told = "x0_hat not clipped" if "no" in clip[:4] else "x0_hat clipped"
            assert told in measured(path, toy, tmp_path / "nll", clip, *more)[1]


# ------------------------------------------------------------------ a run's config.yaml beside it


def test_the_mean_of_a_run_is_not_asked_of_a_published_network(toy, tmp_path):
    run = trained(toy, tmp_path / "run", "--ema", 0.5, "--no-class-cond", script="ddpm_pixel")
    succeed("networks.published.__main__", run, "--out", tmp_path / "theirs")
    asked = ["--sample", tmp_path / "theirs", "--n", 1, "--gpus", 0, "--out", tmp_path / "drawn"]
    config = tmp_path / "config.yaml"
    config.write_text("ema: [0.5]\n")
    succeed("improved_ddpm", *asked, "--config", config)
    assert "--ema 0.5" in refused("improved_ddpm", *asked, "--ema", 0.5)
    config.write_text("ema: [0.7]\n")  # of an own checkpoint it is asked
    line = refused("improved_ddpm", "--sample", run, "--gpus", 0, "--config", config)
    assert "--ema 0.7" in line
