"""A network that goes bad for one seed at one step: every sampler of every chapter names both."""

import math
import types

import numpy as np
import pytest
import torch
from breaking import Breaking, broken, refused_in, trained_a_step
from PIL import Image

import classifier_guidance
import compare_samplers
import improved_ddpm
from image_data import datasets
from kernels import gaussian
from networks.published.stable_diffusion import write_tiny

SHAPE, LATENT, SEEDS, BAD = (1, 16, 16), (4, 4, 4), "3,17,8,4", 8
STEPS, STEP = 5, 3
MEND = "type --precision fp32 or less --guidance; or weights are bad"
CHECKPOINTS = ("ddpm_pixel", "improved_ddpm", "edm", "ldm_cfg", "dit", "classifier_guidance")


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """{script: checkpoint}."""
    how = {"timesteps": 50, "sampler": "ddpm", "learn_sigma": True}
    return trained_a_step(CHECKPOINTS, tmp_path_factory.mktemp("trained"), toy, **how)


def first_x(shape, seed=BAD):
    """x_T (C,H,W) of a seed, from which every sampler starts, but for a factor."""
    return gaussian((1, *shape), torch.tensor([seed]), -1, "cpu")[0]


# name: script, whose checkpoint, flags, calls of the network in a step
PLAIN = {
    "ddpm": ("ddpm_pixel", "ddpm_pixel", "", 1),
    "ddpm, guided, not clipped": ("ddpm_pixel", "ddpm_pixel", "--guidance 2 --no-clip-denoised", 1),
    "ddpm, large variance": ("ddpm_pixel", "ddpm_pixel", "--variance large", 1),
    "improved, learned variance": ("improved_ddpm", "improved_ddpm", "", 1),
    "improved, dynamic threshold": ("improved_ddpm", "improved_ddpm", "--dynamic-threshold", 1),
    "improved, guided": ("improved_ddpm", "improved_ddpm", "--variance small --guidance 1", 1),
    "ddim": ("ddim", "improved_ddpm", "", 1),
    "ddim, eta, guided": ("ddim", "ddpm_pixel", "--eta 0.5 --guidance 1.5 --gif", 1),
    "dpmpp": ("dpm_solver", "ddpm_pixel", "--sampler dpmpp", 1),
    "heun": ("dpm_solver", "improved_ddpm", "--sampler heun --guidance 1", 2),
    "edm": ("edm", "edm", "--sampler heun", 2),
    "edm, euler, guided": ("edm", "edm", "--sampler euler --guidance 1", 1),
    "edm, churn": ("edm", "edm", "--S-churn 1 --clip-denoised", 2),
    "edm of a chain": ("edm", "ddpm_pixel", "--sampler heun", 2),
    "edm of a learned variance": ("edm", "improved_ddpm", "--sampler euler --column iddpm", 1),
    "ldm, ddim": ("ldm_cfg", "ldm_cfg", "--sampler ddim --eta 0.3", 1),
    "ldm, ddpm": ("ldm_cfg", "ldm_cfg", "--sampler ddpm --guidance 0", 1),
    "ldm, dpmpp": ("ldm_cfg", "ldm_cfg", "--sampler dpmpp --guidance-interval 0.1 0.9", 1),
    "ldm, rescaled": ("ldm_cfg", "ldm_cfg", "--sampler ddim --guidance-rescale 1", 1),
    "dit, ddim": ("dit", "dit", "--sampler ddim", 1),
    "dit, ddpm": ("dit", "dit", "--sampler ddpm --guidance-rescale 0.7", 1),
    "dit, dpmpp": ("dit", "dit", "--sampler dpmpp --guidance -1", 1),
    "algorithm 1": ("classifier_guidance", "improved_ddpm", "--sampler ddpm", 1),
    "algorithm 2": ("classifier_guidance", "improved_ddpm", "--sampler ddim --guidance 1", 1),
}


def sampling_of(trained, script, whose, more):
    """The arguments of a command that draws SEEDS, two at a time."""
    given = ["--sample", trained[whose], "--seeds", SEEDS, "--sample-steps", STEPS]
    if script == "classifier_guidance":
        given += ["--classifier", trained[script]]
    return [*given, "--batch-size", 2, *more.split()]


def told_of(line, step=STEP, seed=BAD, what="sampling", of="seed"):
    """Whether a line names the step and the seed, and says what to do."""
    first = f"{what}: {of} {seed} leaves the finite numbers in step {step} of {STEPS}"
    return line.startswith((first + ":", first + ", at t = ")) and line.endswith(": " + MEND)


@pytest.mark.parametrize("name", PLAIN)
def test_every_sampler_names_step_and_seed(name, trained, tmp_path, monkeypatch):
    script, whose, more, calls = PLAIN[name]
    key = first_x(LATENT if script in ("ldm_cfg", "dit") else SHAPE)
    for value in (math.inf, -math.inf, math.nan)[: 3 if name in ("ddpm", "edm") else 1]:
        broken(monkeypatch, key, calls * (STEP - 1) + 1, value)
        given = sampling_of(trained, script, whose, more)
        line = refused_in(monkeypatch, script, tmp_path, *given)
        assert told_of(line), line
        if script in ("ddim", "dpm_solver", "improved_ddpm", "ldm_cfg", "dit"):
            assert ", at t = " in line  # the middle of five of 0 .. 49


@pytest.mark.parametrize("name", ["heun", "edm", "edm of a chain"])
def test_the_second_call_of_a_step_is_of_that_step(name, trained, tmp_path, monkeypatch):
    script, whose, more, calls = PLAIN[name]
    for call, step in ((2, 1), (calls * STEP, STEP), (calls * (STEPS - 1) + 1, STEPS)):
        broken(monkeypatch, first_x(SHAPE), call, math.inf)
        line = refused_in(monkeypatch, script, tmp_path, *sampling_of(trained, script, whose, more))
        assert told_of(line, step), (call, line)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_classifier_whose_gradient_goes_bad(sampler, value, trained, tmp_path, monkeypatch):
    gradient = classifier_guidance.log_prob_gradient
    bad = Breaking(lambda x, *given: gradient(given[0], x, *given[1:]), first_x(SHAPE), STEP, value)
    monkeypatch.setattr(
        classifier_guidance,
        "log_prob_gradient",
        lambda classifier, x, *given: bad(x, classifier, *given),
    )
    given = sampling_of(trained, "classifier_guidance", "improved_ddpm", f"--sampler {sampler}")
    line = refused_in(monkeypatch, "classifier_guidance", tmp_path, *given)
    assert told_of(line), line


# -------------------------------------------------------------------- ways that begin elsewhere


def held_out_images(path, numbers):
    """Test images (N,C,H,W) as a command over the checkpoint `path` finds them."""
    _, cfg, shape, names, _ = improved_ddpm.load_net(path, "cpu")
    ds, _ = datasets.held_out(cfg.data, cfg.data_root, shape, names)
    return ds.batch(np.array(numbers))[0]


@pytest.mark.parametrize("script", ["ddim", "dpm_solver"])
@pytest.mark.parametrize(
    "call, what, step", [(STEP, "encoding", STEP), (STEPS + 4, "decoding", 4)], ids=["up", "down"]
)
def test_an_image_and_its_code(script, call, what, step, trained, tmp_path, monkeypatch):
    key = held_out_images(trained["ddpm_pixel"], [BAD])[0]
    broken(monkeypatch, key, call, math.inf)
    given = ["--encode", trained["ddpm_pixel"], "--seeds", SEEDS, "--encode-steps", STEPS]
    line = refused_in(monkeypatch, script, tmp_path, *given, "--batch-size", 2)
    assert told_of(line, step, what=what, of="image"), line


def test_the_way_between_two_codes(trained, tmp_path, monkeypatch):
    """A row of eleven is named by the first of its two seeds; images by their own numbers."""
    path = trained["improved_ddpm"]
    given = ["--interpolate", path, "--sample-steps", STEPS, "--batch-size", 11]
    broken(monkeypatch, first_x(SHAPE), STEP, math.inf)
    line = refused_in(monkeypatch, "ddim", tmp_path, *given, "--seeds", "3,17,8,4")
    assert told_of(line, what="interpolating"), line
    data = improved_ddpm.load_net(path, "cpu")[1].data
    broken(monkeypatch, held_out_images(path, [BAD])[0], STEP, math.nan)
    line = refused_in(monkeypatch, "ddim", tmp_path, *given, "--seeds", "3,17,4,8", "--data", data)
    assert told_of(line, what="encoding", of="image"), line


# ---------------------------------------------------------------------------------------- studies


class NoFigures:
    """In the place of an Evaluator."""

    protocol, reference, n_reference, extractor = "", "", 0, None
    real = types.SimpleNamespace(key=None)


@pytest.mark.parametrize("sampler", compare_samplers.SAMPLERS)
def test_a_study_says_which_sampler(sampler, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_samplers, "evaluator_of", lambda *args: NoFigures())
    monkeypatch.setattr(compare_samplers, "SAMPLERS", (sampler,))
    calls = 1 + (2 if sampler == "heun" else 1) * (STEP - 1) + 1  # one more to warm up
    broken(monkeypatch, first_x(SHAPE), calls, math.inf)
    given = [trained["improved_ddpm"], "--seeds", "8,3", "--batch-size", 2, "--n", 2]
    given += ["--compare-steps", STEPS, "--compare-guidance", "1"]
    line = refused_in(monkeypatch, "compare_samplers", tmp_path, *given)
    name = {"ddim": "ddim, eta 0", "ddpm": "ddpm, beta_tilde"}.get(sampler, sampler)
    assert told_of(line, what=f"{name}, {STEPS} steps, w = 0"), line


# ------------------------------------------------------------------------------- Stable Diffusion


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(weights, vocabulary) of a tiny Stable Diffusion."""
    return write_tiny(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler_a"])
def test_stable_diffusion(sampler, pipeline, tmp_path, monkeypatch):
    weights, vocabulary = pipeline
    given = ["--weights", weights, "--vocabulary", vocabulary, "--prompt", "a red fox"]
    given += ["--size", 64, "--steps", STEPS, "--sampler", sampler, "--batch-size", 2]
    key = first_x((4, 8, 8))
    broken(monkeypatch, key, STEP, math.inf)
    line = refused_in(monkeypatch, "stable_diffusion", tmp_path, *given, "--seeds", SEEDS)
    assert told_of(line) and ", at t = " in line, line
    picture = tmp_path / "from.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    more = ["--image", picture, "--strength", 1]
    broken(monkeypatch, key, STEP, math.inf)
    line = refused_in(monkeypatch, "stable_diffusion", tmp_path, *given, "--seeds", SEEDS, *more)
    assert told_of(line), line
    if sampler != "euler_a":  # which takes fresh noise
        broken(monkeypatch, key, STEP, math.inf)
        more = ["--seeds", f"{BAD},3", "--interpolate", 4]
        line = refused_in(monkeypatch, "stable_diffusion", tmp_path, *given, *more)
        assert told_of(line), line
