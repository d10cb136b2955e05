"""What makes numbers that are not finite: flags, weights, scales. None of it becomes a picture."""

from runtime.commandline import BadInput
from runtime.finite import NotFinite
from runtime.processes import World

import math

import numpy as np
import pytest
import torch
from breaking import files_in, refused_in, trained_a_step
from toy_run import IMAGES

import autoencoder
import ddim
import ddpm_pixel
import improved_ddpm
import ldm_cfg
from evaluation import features, likelihood
from image_data import latents
from networks.small_autoencoder import Autoencoder
from networks.vq import Codebook, VQAutoencoder

# --------------------------------------------------------------------------------------- flags

SAMPLE = "--sample runs/nothing.pt"
FLAGS = [
    ("compare_samplers", "nothing.pt --compare-guidance 0,nan", "--compare-guidance 0,nan"),
    ("compare_samplers", "nothing.pt --compare-guidance=-inf,1", "--compare-guidance -inf,1"),
    ("compare_samplers", "nothing.pt --compare-guidance 1e39", "--compare-guidance 1e39"),
    ("compare_samplers", "nothing.pt --compare-steps inf", "--compare-steps inf"),
    ("classifier_guidance", "--classifier c --study n --study-scales inf", "--study-scales inf"),
    ("classifier_guidance", "--classifier c --study n --study-guidance nan", "--study-guidance n"),
    ("classifier_guidance", f"--classifier c {SAMPLE} --classifier-scale inf", "--classifier-sc"),
    ("ddim", "--encode nothing.pt --encode-steps nan", "--encode-steps nan"),
    ("ddim", f"{SAMPLE} --guidance nan", "--guidance nan"),
    ("dpm_solver", f"{SAMPLE} --guidance=-inf", "--guidance -inf"),
    ("ddpm_pixel", f"{SAMPLE} --guidance 1e39", "--guidance 1e+39"),
    ("improved_ddpm", f"{SAMPLE} --guidance=-1e39", "--guidance -1e+39"),
    ("edm", f"{SAMPLE} --S-churn nan", "--S-churn nan"),
    ("edm", f"{SAMPLE} --S-churn 1 --S-noise inf", "--S-noise inf"),
    ("edm", f"{SAMPLE} --sigma-max 1e39", "--sigma-max 1e+39"),
    ("edm", f"{SAMPLE} --ema-length nan", "--ema-length nan"),
    ("edm", "--ema-lengths 0.1 inf", "--ema-lengths inf"),
    ("ldm_cfg", f"{SAMPLE} --guidance-interval nan 1", "--guidance-interval nan"),
    ("ldm_cfg", f"{SAMPLE} --guidance-interval 0 inf", "--guidance-interval inf"),
    ("dit", f"{SAMPLE} --guidance-rescale nan", "--guidance-rescale nan"),
    ("dit", "--ema nan", "--ema nan"),
    ("stable_diffusion", "--weights w --prompt a --guidance 1e39", "--guidance 1e+39"),
    ("stable_diffusion", "--weights w --prompt a --strength nan --image i", "--strength nan"),
]


@pytest.mark.parametrize("script, given, told", FLAGS, ids=lambda text: text.replace("/", ""))
def test_flags_are_refused_by_name(script, given, told, tmp_path, monkeypatch):
    line = refused_in(monkeypatch, script, tmp_path, *given.split())
    assert told in line, line


def test_numbers_in_a_text():
    most = "3.4028234e38"
    assert ddim.numbers_of(f"-{most},{most},0", "--w", float) == [-3.4028234e38, 3.4028234e38, 0]
    for text in ("3.5e38", "-1e39", "nan", "inf", "1,-inf", "1e400"):
        with pytest.raises(BadInput, match=f"^--w {text}: expected numbers"):
            ddim.numbers_of(text, "--w", float)


# ------------------------------------------------------------------- weights, and much guidance


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """{script: checkpoint}."""
    scripts = ("ddpm_pixel", "improved_ddpm", "edm", "ldm_cfg", "autoencoder")
    return trained_a_step(scripts, tmp_path_factory.mktemp("trained"), toy)


def spoiled(path, folder, value, *place):
    """A copy of a checkpoint, with `value` at the first number of all weights named `place`."""
    state = torch.load(path, weights_only=True)
    part = state[place[0]]
    if len(place) == 1:
        state[place[0]] = value
    else:
        name = next(name for name in part if name.endswith(place[1]))
        part[name][(0,) * part[name].ndim] = value
    torch.save(state, folder / "ckpt.pt")
    return folder / "ckpt.pt"


@pytest.fixture
def out(tmp_path):
    """An empty folder beside the checkpoint of a test."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("script", ["ddpm_pixel", "improved_ddpm", "edm", "ldm_cfg"])
def test_weights_that_are_no_numbers(script, value, trained, out, monkeypatch):
    bad = spoiled(trained[script], out.parent, value, "ema", "conv_in.weight")
    given = ["--sample", bad, "--seeds", "5-6", "--sample-steps", 4]
    line = refused_in(monkeypatch, script, out, *given)
    assert "seed 5 leaves the finite numbers in step 1 of 4" in line and "weights are bad" in line


@pytest.mark.parametrize("guidance", ["1e30", "-3e37", "2e7"])
@pytest.mark.parametrize("script", ["ddpm_pixel", "improved_ddpm", "edm", "ldm_cfg"])
def test_guidance_beyond_all_images(script, guidance, trained, out, monkeypatch):
    """A clamp makes x0_hat of -1 and 1 of any large number: no walk would see it."""
    given = ["--sample", trained[script], f"--guidance={guidance}", "--seeds", "5-6"]
    line = refused_in(monkeypatch, script, out, *given)
    assert line.startswith("--guidance ") and "expected a number up to 1.7e+07" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bounds_of_bad_weights(value, trained, out, monkeypatch):
    bad = spoiled(trained["improved_ddpm"], out.parent, value, "ema", "conv_in.weight")
    given = ["--nll", bad, "--n", 2, "--timestep-respacing", "0,100,900"]
    line = refused_in(monkeypatch, "improved_ddpm", out, *given)
    assert line == "the bound of image 0 is not finite: weights are bad"


def test_the_image_with_a_bad_bound_is_named(tmp_path):
    def bound_of(images, y, seeds, tick):
        rows = torch.ones(len(seeds), 2, dtype=torch.float64)
        rows[seeds == 13, 1] = math.inf
        return likelihood.Bound(rows[:, 0], rows, rows, rows)

    how = {"n": 20, "batch_size": 8, "labels": False}
    with pytest.raises(NotFinite, match="^the bound of image 13 is not finite: weights are bad$"):
        likelihood.evaluate(bound_of, IMAGES, [0, 1], World(), tmp_path, **how)
    assert not files_in(tmp_path)


# --------------------------------------------------------------------------- what hides infinity


def test_a_clipped_x0_hat_hides_nothing():
    """Of the sampler, of the bound, and of the dynamic threshold."""
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 10)
    x, t = torch.zeros(2, 1, 32, 32), torch.tensor([3, 3])
    chain = improved_ddpm.make_chain(alpha_bar)
    for value in (math.nan, math.inf, -math.inf):
        out = torch.zeros(2, 1, 32, 32)  # one of so many is beyond the threshold's percentile
        out[1, 0, 2, 3] = value
        x0_hat, _ = improved_ddpm.reverse_step(out, x, t, chain)
        thresholded = improved_ddpm.dynamic_threshold(out)
        for found in (x0_hat, thresholded):
            assert found[0].eq(0).all() and not found[1, 0, 2, 3].isfinite()


def test_a_spread_that_overflows_in_float32():
    """Lin et al.'s ratio of spreads is one of numbers, whose squares need not be in float32."""
    small, big = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def net(z, t, y):
        return torch.cat([small, small + big])

    net.null = 3
    z, y = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    for w in (2.0, 1e25):
        found, _ = ldm_cfg.guided(net, z, 5, y, w, rescale=1.0)
        both = (1 + w) * small.double() - w * (small + big).double()
        torch.testing.assert_close(found.double(), both * small.double().std() / both.std())
    same = torch.zeros(2, 4, 8, 8)
    net_of_nothing = lambda z, t, y: same  # noqa: E731
    net_of_nothing.null = 3
    assert ldm_cfg.guided(net_of_nothing, z, 5, y, 2.0, rescale=0.7)[0].eq(0).all()


# ----------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_reconstructions_name_the_image(kind, place, monkeypatch):
    ae = Autoencoder(1, 4, 32, (1,), 1, 4, kind == "kl")
    ae = ae if kind == "kl" else VQAutoencoder(ae, Codebook(8, 4))
    part = getattr(getattr(ae, "ae", ae), place)
    called = part.forward

    def overflows(x):
        out = called(x).clone()
        out[1, 0, 0, 0] = -math.inf
        return out

    monkeypatch.setattr(part, "forward", overflows)
    what = "latent" if place == "encoder" else "reconstruction"
    told = f"^the {what} of image 4 is not finite: weights are bad$"
    with pytest.raises(NotFinite, match=told):
        autoencoder.reconstruct(ae, IMAGES, np.array([2, 4, 5]), torch.device("cpu"))


def test_an_autoencoder_that_overflows_leaves_no_report(trained, out, monkeypatch):
    bad = spoiled(trained["autoencoder"], out.parent, math.inf, "model", "decoder.0.weight")
    line = refused_in(monkeypatch, "autoencoder", out, "--sample", bad, "--n", 3)
    assert line.startswith("the reconstruction of image 0 is not finite: ")


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0])
def test_a_scale_that_is_none(scale, trained, out, monkeypatch):
    bad = spoiled(trained["ldm_cfg"], out.parent, scale, "scale")
    line = refused_in(monkeypatch, "ldm_cfg", out, "--sample", bad, "--seeds", "5-6")
    assert line == f"{bad}: latents of scale {scale}; expected a finite number"


def test_an_image_that_cannot_be_decoded(trained, out, monkeypatch):
    name = "decoder.0.weight"
    bad = spoiled(trained["ldm_cfg"], out.parent, math.inf, "autoencoder", name)
    line = refused_in(monkeypatch, "ldm_cfg", out, "--sample", bad, "--seeds", "5-6")
    assert line.startswith("the image of seed 5 is not finite: ")


@pytest.mark.parametrize("value, told", [(math.nan, "nan"), (math.inf, "nan"), (0.5, "0")])
def test_latents_without_a_spread(value, told, tmp_path):
    def encode(x):
        mean = torch.full((len(x), 2, 2, 2), value)
        return mean, torch.full_like(mean, -math.inf)

    how = {"z_channels": 2, "factor": 2, "made_of": {}, "flip": False}
    with pytest.raises(BadInput, match=f"^the latents of noise have a variance of {told}: "):
        latents.cache_latents(tmp_path, World(), IMAGES, encode, **how)
    assert not (tmp_path / "latents.json").exists()


# ------------------------------------------------------------------------------------- evaluation


def test_a_classifier_of_bad_logits_reads_no_classes():
    images = np.zeros((5, 4, 4, 1), np.uint8)
    for row, bad in ((0, math.inf), (1, math.nan)):
        pair = [torch.zeros(5, 3), torch.zeros(5, 2)]
        pair[row][4, 1] = bad
        with pytest.raises(BadInput, match="features of images 0 to 4 are not finite"):
            features.extract(lambda x, pair=pair: tuple(pair), images, 5, name="these")
