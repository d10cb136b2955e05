"""EDM's training: table 1 and the loss on real pixels, eq. 5, what training draws, bad input."""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.commandline import BadInput, entry
from runtime.pictures import to_uint8
from runtime.processes import World

import sys
from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from data_files import noise
from launching import Done, refusal, succeed
from run_folders import saved
from scipy.optimize import minimize_scalar
from tiny_runs import flags

import ddpm_pixel
import edm
import improved_ddpm
from image_data import datasets, glyphs
from image_data.batches import Dataset
from kernels import gaussian

getcontext().prec = 50
SIGMAS = (0.01, 0.05, 0.2, 0.5, 1.0, 4.0, 20.0, 80.0)


def as_dataset(images):
    """uint8 (N,H,W,C) as a data set without classes."""
    return Dataset("made", images, np.zeros(len(images), np.int64), (), {})


@pytest.fixture(scope="module")
def digits():
    """1,000 images of the embedded default data set: (Dataset, pixels float64 (1000,1,32,32))."""
    ds = as_dataset(glyphs.draw("train", range(1000)))
    return ds, ds.batch(np.arange(1000))[0].double()


# ----------------------------------------------------------------------------- preconditioning


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("sigma_data", [0.5, 0.25, 1.3])
def test_last_column_of_table_1(sigma_data, dtype, close):
    sigmas = torch.tensor([0.002, *SIGMAS], dtype=dtype)
    found = edm.precondition(sigmas.view(3, 1, 3), sigma_data)
    weights = edm.loss_weight(sigmas, sigma_data)
    for i, sigma in enumerate(sigmas.tolist()):
        s, d = Decimal(sigma), Decimal(sigma_data)
        total = (s * s + d * d).sqrt()
        wanted = (d * d / total**2, s * d / total, 1 / total, s.ln() / 4)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == (3, 1, 3) and one.dtype == dtype
            assert one.flatten()[i].item() == pytest.approx(float(other), rel=close)
        assert weights[i].item() == pytest.approx(float(total**2 / (s * d) ** 2), rel=close)
        numbers = edm.Edm(sigma_data)(sigma)
        assert all(type(number) is float for number in numbers)
        assert numbers == pytest.approx([float(number) for number in wanted], rel=1e-14)


def test_the_networks_errors_count_alike_at_every_sigma():
    sigmas = torch.logspace(-4, 3, 200, dtype=torch.float64)
    product = edm.loss_weight(sigmas, 0.37) * edm.precondition(sigmas, 0.37).c_out ** 2
    torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_c_skip_makes_c_out_the_smallest(sigma):
    """Targets of variance 1 need c_out^2 = (1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2."""
    c = edm.Edm(0.5)(sigma)
    needed = lambda c_skip: (1 - c_skip) ** 2 * 0.5**2 + c_skip**2 * sigma**2  # noqa: E731
    least = minimize_scalar(needed, bracket=(0, 1), tol=1e-12)
    assert c.c_skip == pytest.approx(least.x, abs=1e-7)
    assert c.c_out**2 == pytest.approx(least.fun, rel=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_inputs_and_targets_of_real_pixels_have_variance_1(sigma, digits):
    """Up to the sampling error of n in x = y + sigma n, of y's million pixels.

    With a y + b n of variance 1, the error of its variance is at most sqrt(2 / pixels).
    """
    ds, y = digits
    x = y + sigma * gaussian(y.shape, torch.arange(len(y)), int(1000 * sigma), "cpu").double()
    c = edm.precondition(torch.tensor(sigma).double(), edm.measured_sigma_data(ds))
    error = (2 / y.numel()) ** 0.5  # 0.14 %
    assert abs((c.c_in * x).var().item() - 1) < 4 * error
    assert abs(((y - c.c_skip * x) / c.c_out).var().item() - 1) < 4 * error


# ------------------------------------------------------------------------------------- the loss


def test_loss_is_the_weighted_error_of_eq_7():
    """The mean over pixels of lambda (c_skip x + c_out F(c_in x, c_noise, labels, more) - y)^2."""
    y, eps = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, generator=torch.Generator())
    sigma, labels = torch.tensor([0.01, 0.3, 1, 7, 80]).double(), torch.arange(5)
    told = torch.linspace(-1, 1, 45).double().view(5, 9)

    def net(x, c_noise, labels, *more):
        assert c_noise.shape == (5,)
        shift = c_noise if labels is None else c_noise + labels
        shift = shift + more[0].sum(1) if more else shift
        return torch.sin(2 * x + shift.view(5, 1, 1, 1))

    for given in ((), (None,), (labels,), (labels, told)):
        losses = edm.edm_loss(net, y, sigma.view(5, 1, 1, 1), eps, 0.6, *given)
        assert losses.shape == (5,)
        for i, s in enumerate(sigma.tolist()):
            x, total = y[i] + s * eps[i], s**2 + 0.6**2
            shift = np.log(s) / 4
            shift += i if given and given[0] is not None else 0
            shift += told[i].sum() if len(given) > 1 else 0
            F = torch.sin(2 * x / total**0.5 + shift)
            D = 0.36 / total * x + s * 0.6 / total**0.5 * F
            wanted = (total / (s * 0.6) ** 2 * (D - y[i]) ** 2).mean()
            torch.testing.assert_close(losses[i], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("model, close", [("unet", 1e-5), ("ddpmpp", 1e-4)])
def test_a_fresh_networks_loss_is_its_targets_square(model, close, digits):
    """(y - c_skip x) / c_out of a network that gives 0; DDPM++ gives 1e-5 of its input."""
    ds, pixels = digits
    small = {"model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": ()}
    net = edm.make_net(edm.Config(model=model, **small), ds.shape, 10).eval()
    y, d = pixels[:10].float(), edm.measured_sigma_data(ds)
    eps = gaussian(y.shape, torch.arange(10), 0, "cpu")
    for sigma in SIGMAS:
        with torch.no_grad():
            losses = edm.edm_loss(net, y, torch.full((10, 1, 1, 1), sigma), eps, d)
        target = (sigma * y.double() / d - d * eps.double()) / (sigma**2 + d**2) ** 0.5
        torch.testing.assert_close(losses.double(), (target**2).mean((1, 2, 3)), rtol=close, atol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_loss_of_a_network_that_gives_zero(sigma, digits):
    """E[target^2]: its variance, 1 at every sigma, and the square of its mean.

    The mean is (1 - c_skip) mean(y) / c_out. These targets are of one sign: digits on black.
    """
    ds, y = digits
    d, eps = edm.measured_sigma_data(ds), gaussian(y.shape, torch.arange(len(y)), 9, "cpu").double()
    given = torch.full((len(y), 1, 1, 1), sigma, dtype=torch.float64), eps, d
    loss = edm.edm_loss(lambda x, *_: torch.zeros_like(x), y, *given).mean().item()
    wanted = 1 + (sigma * y.mean().item() / d) ** 2 / (sigma**2 + d**2)
    # With targets a y + b n: the error is (4 a^2 b^2 E[y^2] + 2 b^4)^1/2 / pixels^1/2, or less.
    assert abs(loss - wanted) < 4 * 2 * (wanted / y.numel()) ** 0.5


def test_a_perfect_network_has_no_loss(digits):
    y, eps = digits[1][:4], torch.ones(4, 1, 32, 32)
    sigma = torch.tensor([0.01, 0.5, 3, 80]).double().view(4, 1, 1, 1)
    root = (sigma**2 + 0.5**2).sqrt()
    perfect = lambda x, c_noise, labels: (sigma * y / 0.5 - 0.5 * eps) / root  # noqa: E731
    assert edm.edm_loss(perfect, y, sigma, eps, 0.5).max() < 1e-20


# ----------------------------------------------------------------------------------- sigma_data


@pytest.mark.parametrize("channels", [1, 3])
def test_sigma_data_of_all_pixels(channels):
    ds = as_dataset(noise((50, 6, 9, channels)) // 3 + 40)
    pixels = torch.from_numpy(ds.images).double() / 127.5 - 1
    found = edm.measured_sigma_data(ds, most=50)
    assert type(found) is float
    assert found == pytest.approx(pixels.std(correction=0).item(), rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_sigma_data_of_a_part_that_is_evenly_spaced(channels):
    """Images grow brighter from the first to the last: no part of them but an even one will do."""
    images = (noise((3000, 4, 4, channels)) // 4).astype(int)
    images += np.arange(3000).reshape(-1, 1, 1, 1) // 16
    ds = as_dataset(images.astype(np.uint8))
    everything = (torch.from_numpy(images).double() / 127.5 - 1).std().item()
    assert edm.measured_sigma_data(ds, most=400) == pytest.approx(everything, rel=0.02)
    start = as_dataset(ds.images[:400])
    assert abs(edm.measured_sigma_data(start) / everything - 1) > 0.5
    one = edm.measured_sigma_data(ds, most=1)
    assert one == pytest.approx((torch.from_numpy(images[0]) / 127.5).std(correction=0).item())


# ---------------------------------------------------------------------------------------- eq. 5


@pytest.mark.parametrize("n", [2, 3, 18, 40, 256])
@pytest.mark.parametrize("low, high, rho", [(0.002, 80, 7), (0.01, 157.4, 1), (0.3, 4, 2.5)])
def test_sigmas_of_eq_5(low, high, rho, n):
    found, part = edm.sigma_steps(n, low, high, rho), 1 / Decimal(rho)
    first, last = Decimal(high) ** part, Decimal(low) ** part
    steps = [first + Decimal(i) / (n - 1) * (last - first) for i in range(n)]
    assert all(type(sigma) is float for sigma in found)
    assert found[:-1] == pytest.approx([float(s ** Decimal(rho)) for s in steps], rel=2e-14)
    assert (np.diff(found) < 0).all() and found[-1] == 0
    assert (found[0], found[-2]) == pytest.approx((high, low), rel=2e-14)


def test_sigmas_of_one_step_and_of_the_paper():
    assert edm.sigma_steps(1) == pytest.approx([80, 0], rel=1e-14)
    assert edm.sigma_steps(18) == edm.sigma_steps(18, 0.002, 80.0, 7.0)


# ------------------------------------------------------------------------- what training draws


def test_training_draws_sigma_noise_and_labels(toy, tmp_path, monkeypatch):
    real, seen = edm.edm_loss, []

    def watched(net, y, sigma, eps, sigma_data, labels=None, *more):
        if torch.is_grad_enabled():
            seen.append((y, sigma, eps, labels))
            assert sigma_data == wanted and not more
        return real(net, y, sigma, eps, sigma_data, labels, *more)

    monkeypatch.setattr(edm, "edm_loss", watched)
    small = {"model_channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "sample_steps": 1}
    few = {"steps": 20, "save_every": 20, "log_every": 10, "sample_every": 0, "n": 1}
    cfg = edm.Config(data=toy[1], data_root=toy[3], gpus=0, out=str(tmp_path), **small, **few)
    cfg = replace(cfg, P_mean=-0.4, P_std=1.7, label_dropout=0.3, batch_size=64)
    ds = datasets.of(cfg)
    wanted = edm.measured_sigma_data(ds)
    edm.train(cfg, World())
    assert saved(tmp_path)["sigma_data"] == wanted
    y, sigma, eps, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    count = 20 * 64
    assert y.shape == eps.shape == (count, 1, 16, 16) and sigma.shape == (count, 1, 1, 1)
    level = sigma.flatten().double().log()
    assert len(level.unique()) > 0.99 * count
    assert abs(level.mean() + 0.4) < 4 * 1.7 / count**0.5
    assert abs(level.std() / 1.7 - 1) < 4 / (2 * count) ** 0.5
    assert abs(eps.double().var() - 1) < 4 * (2 / eps.numel()) ** 0.5
    together = torch.corrcoef(torch.cat([level[None], eps.double().flatten(1).T]))[0, 1:]
    assert together.abs().max() < 5 / count**0.5  # sigma has noise of its own
    share = (labels == 2).double().mean()  # no label
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5 and labels.max() == 2
    known = torch.from_numpy(np.unique(ds.images)).float() / 127.5 - 1
    assert torch.isclose(y.unique()[:, None], known, atol=1e-6).any(1).all()


# ------------------------------------------------------------- networks of the chapters before it


@pytest.fixture(scope="module", params=["ddpm_pixel", "improved_ddpm"])
def earlier(request, toy, tiny, tmp_path_factory):
    """A checkpoint of another chapter; the second learns variances, too."""
    out = tmp_path_factory.mktemp(request.param)
    how = {"prediction": "v", "schedule": "cosine", "learn_sigma": True, "timesteps": 50}
    more = ["--steps", 2, "--sample-every", 0, "--save-every", 2, "--out", out]
    succeed(request.param, *tiny[request.param], *toy, *flags(request.param, **how), *more)
    return out / "ckpt.pt"


@pytest.mark.parametrize("column", ["vp", "iddpm"])
def test_samples_of_another_chapters_network(column, earlier, tmp_path):
    asked = {"column": column, "sample_steps": 6, "S_churn": 3.0, "sigma_max": 30, "seeds": "3-5"}
    succeed("edm", "--sample", earlier, "--gpus", 0, "--out", tmp_path, *flags("edm", **asked))
    net, cfg, shape, _, alpha_bar = improved_ddpm.load_net(earlier, "cpu")
    chain = edm.Chain(alpha_bar, cfg.prediction, column)
    assert cfg.prediction == "v" and len(alpha_bar) == 50
    sigmas = edm.steps_of(edm.Config(sample_steps=6, sigma_max=30.0), chain)
    seeds = torch.arange(3, 6)
    how = {"order": 2, "churn": edm.Churn(3.0), "clip": True}  # as that chapter clips
    *_, (x, _) = edm.sample(net, chain, sigmas, shape, seeds, seeds % 2, **how)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], to_uint8(x))


def test_clipping_is_that_of_the_checkpoint_unless_it_is_typed(earlier, monkeypatch):
    for typed, wanted in ((), True), (("--no-clip-denoised",), False):
        monkeypatch.setattr(sys, "argv", ["edm.py", "--sample", str(earlier), *typed])
        cfg = cli.parse(edm.Config, "")
        _, trained, *_ = edm.load_net(earlier, "cpu")
        assert checkpoints.overlaid(trained, cfg, edm.SAMPLING.split()).clip_denoised is wanted


def test_sigmas_that_a_chain_does_not_have():
    chain = edm.Chain(ddpm_pixel.make_alpha_bar("linear", 1000))  # 0.01 .. 157.4
    for low, high in ((200.0, 300.0), (0.002, 0.005)):
        with pytest.raises(BadInput, match="--sigma-m"):
            edm.steps_of(edm.Config(sigma_min=low, sigma_max=high), chain)


# ------------------------------------------------------------------------------------ bad input

NOT_FINITE = [
    (["--" + name, value], [f"--{name} ", value])
    for name in ("P-mean", "P-std", "sigma-data", "sigma-min", "sigma-max", "rho", "S-churn")
    for value in ("nan", "inf")
]
REFUSED = [  # flags, what the one line must name
    *NOT_FINITE,
    (["--S-tmax", "nan"], ["--S-tmax", "nan"]),
    (["--S-noise", "nan"], ["--S-noise", "nan"]),
    (["--guidance", "nan"], ["--guidance", "nan"]),
    (["--S-churn", 0, "nan", "--sample", "x.pt"], ["--S-churn", "nan"]),
    (["--sigma-min", 0], ["--sigma-min", "greater than 0"]),
    (["--sigma-min", "-1"], ["--sigma-min", "-1"]),
    (["--sigma-min", 80], ["--sigma-min 80", "below --sigma-max"]),
    (["--sigma-max", "0.001"], ["--sigma-min 0.002", "below --sigma-max"]),
    (["--sigma-max", "-1"], ["below --sigma-max"]),
    (["--rho", 0], ["--rho", "greater than 0"]),
    (["--P-std", 0], ["--P-std", "greater than 0"]),
    (["--sigma-data", "-0.5"], ["--sigma-data", "-0.5"]),
    (["--sample-steps", 0], ["--sample-steps", "got 0"]),
    (["--S-churn", "-1"], ["--S-churn", "-1"]),
    (["--S-churn", 0, "-5", "--sample", "x.pt"], ["--S-churn", "-5"]),
    (["--S-churn", 0, 10], ["--S-churn", "--sample", "takes one"]),
    (["--S-churn", 1, "--S-tmin", "-1"], ["--S-tmin", "-1"]),
    (["--S-churn", 1, "--S-tmin", 5, "--S-tmax", 1], ["--S-tmin 5", "below --S-tmax 1"]),
    (["--S-churn", 1, "--S-noise", "-1"], ["--S-noise", "-1"]),
    (["--S-noise", 1.003], ["--S-noise does nothing without --S-churn"]),
    (["--augment", 0.12], ["--augment", "--model ddpmpp"]),
    (["--guidance", 1, "--label-dropout", 0], ["--guidance", "--label-dropout"]),
    (["--sample", "x.pt", "--ema-length", 0.1, 0.2, "--seeds", "1-5"], ["--ema-length", "--seeds"]),
    (["--augment", 1.5, "--model", "ddpmpp"], ["--augment", "1.5"]),
    (["--ema-lengths", 0.9], ["--ema-length", "0.9"]),
    (["--ema-lengths", 0], ["--ema-lengths 0"]),
    (["--ema-lengths", 0.1, "--snapshot-every", 0], ["--snapshot-every", "got 0"]),
    (["--snapshot-every", 100], ["--snapshot-every does nothing without --ema-lengths"]),
    (["--ema-length", 0.1], ["--ema-length is for --sample"]),
    (["--sampler", "huen"], ["--sampler", "huen"]),
    (["--column", "ve"], ["--column", "ve"]),
    (["--model", "dit"], ["--model", "dit"]),
    (["--sample", "/no/such.pt"], ["/no/such.pt"]),
    (["--sample", "/no/such.pkl"], ["/no/such.pkl"]),
]


def spelled(given):
    return " ".join(map(str, given))


@pytest.mark.parametrize("given, named", REFUSED, ids=[spelled(given) for given, _ in REFUSED])
def test_setting_that_cannot_be(given, named, toy, tmp_path, monkeypatch, capfd):
    data = [] if any("/no/such" in str(word) for word in given) else toy
    argv = ["edm.py", "--smoke", "--gpus", "0", *data, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, *map(str, given)])
    with pytest.raises(SystemExit) as stop:
        entry(edm.main)
    line = refusal(Done(stop.value.code, *capfd.readouterr()))
    assert all(text in line for text in named), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma_min": 1.0, "sigma_max": 1.0},
        {"S_churn": ()},
        {"S_churn": (0.0, 5.0)},
        {"augment": 0.1},
        {"ema_length": (0.1,)},
        {"sigma_data": float("nan")},
    ],
    ids=str,
)
def test_check_refuses_in_one_line(changes):
    with pytest.raises(BadInput) as refused:
        edm.check(edm.Config(gpus=0, **changes))
    assert str(refused.value).count("\n") == 0


def test_check_lets_the_papers_settings_pass():
    edm.check(edm.Config(gpus=0))
    edm.check(edm.Config(gpus=0, model="ddpmpp", augment=0.12, S_churn=(40.0,), S_noise=1.003))
    edm.check(edm.Config(gpus=0, sample="x.pt", S_churn=(0.0, 10.0, 40.0), ema_length=(0.05,)))
    edm.check(edm.Config(gpus=0, sample="x.pt", S_churn=(5.0,), ema_length=(0.05, 0.1)))
