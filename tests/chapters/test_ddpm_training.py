"""Chapter 1's training: objectives, accumulation, running means, and what a run leaves behind."""

from runtime.commandline import BadInput, parse
from runtime.processes import World

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import run, succeed
from PIL import Image

import ddpm_pixel as ch1
import likelihood
from kernels import gaussian


def small(**changes):
    return ch1.Config(width=16, mult=(1, 2), attention=(4,), **changes)


class Fixed(torch.nn.Module):
    """A network whose output does not depend on its input; keeps what it was given."""

    def __init__(self, out):
        super().__init__()
        self.out = torch.nn.Parameter(out)

    def forward(self, x, t, y=None):
        self.seen = x, t, y
        return self.out


def batch(channels=1):
    g = torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 4, channels, 2, 2, generator=g)
    return x0, eps, out, torch.tensor([0, 10, 50, 98]), ch1.make_alpha_bar("cosine", 100)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_the_loss_is_the_mean_distance_to_what_is_predicted(prediction, loss):
    x0, eps, out, t, alpha_bar = batch()
    found = ch1.simple_loss(
        Fixed(out), x0, None, t, eps, alpha_bar, prediction=prediction, loss=loss
    )
    a = alpha_bar[t].view(-1, 1, 1, 1).numpy()
    x, e, m = (v.double().numpy() for v in (x0, eps, out))
    target = {"eps": e, "x0": x, "v": np.sqrt(a) * e - np.sqrt(1 - a) * x}[prediction]
    d = np.abs(m - target)
    each = {"l2": d**2, "l1": d, "huber": np.where(d < 1, d**2 / 2, d - 0.5)}[loss]
    np.testing.assert_allclose(found.detach(), each.mean((1, 2, 3)), rtol=2e-6)


def test_min_snr_weighs_the_same_loss_down_where_the_task_is_easy():
    x0, eps, out, t, alpha_bar = batch()
    plain, weighted = (
        ch1.simple_loss(Fixed(out), x0, None, t, eps, alpha_bar, min_snr=gamma)
        for gamma in (0.0, 5.0)
    )
    snr = (alpha_bar / (1 - alpha_bar))[t]
    assert snr[0] > 5 > snr[2]
    torch.testing.assert_close(weighted, plain * (snr.clamp(max=5) / snr).float())


def test_learned_variance_adds_a_thousandth_of_the_bound_and_the_mean_does_not_feel_it():
    x0, eps, out, t, alpha_bar = batch()
    v = torch.full_like(out, 0.2)
    net, chain = Fixed(torch.cat([out, v], dim=1)), likelihood.make_chain(alpha_bar)
    simple = ch1.simple_loss(net, x0, None, t, eps, alpha_bar)
    (mean_only,) = torch.autograd.grad(simple.sum(), net.out)
    both = ch1.simple_loss(net, x0, None, t, eps, alpha_bar, chain=chain)
    (grad,) = torch.autograd.grad(both.sum(), net.out)
    x_t = ch1.q_sample(x0, t, eps, alpha_bar)
    terms = likelihood.vlb_terms(
        net.out, x0, x_t, t, chain, prediction="eps", variance="learned", clip=False
    )
    torch.testing.assert_close(both - simple, (0.1 * terms).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad[:, :1], mean_only[:, :1])  # T = 100: 0.001 T = 0.1
    assert (mean_only[:, 1:] == 0).all() and (grad[:, 1:] != 0).all()


@pytest.fixture(scope="module")
def trained(toy, tiny, tmp_path_factory):
    """A run of 6 steps with a little of everything."""
    out = tmp_path_factory.mktemp("trained")
    flags = "--steps 6 --learned-variance --timesteps 20 --ema 0.1 0.9 --dropout 0.5 --sampler ddpm"
    succeed("ddpm_pixel", *tiny["ddpm_pixel"], *toy, *flags.split(), "--out", out)
    return out


def test_a_run_leaves_curves_and_the_pictures_of_both_processes(trained):
    for name, rows in (("forward", 5), ("reverse", 10)):
        with Image.open(trained / f"{name}.png") as strip, Image.open(trained / f"{name}.gif") as g:
            assert strip.height == rows * 18 + 2 and g.n_frames > 3
    row = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 6 and row["peak_memory_mb"] > 50


def test_samples_of_a_run_are_those_of_its_checkpoint_without_dropout(trained, tmp_path):
    succeed("ddpm_pixel", "--sample", trained / "ckpt.pt", "--seeds", "0-3", "--out", tmp_path)
    ours, theirs = (np.load(f / "samples.npz")["arr_0"] for f in (trained, tmp_path))
    assert np.array_equal(ours, theirs)


def test_each_running_mean_can_be_sampled(trained):
    path = trained / "ckpt.pt"
    state = torch.load(path, weights_only=True)
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
    flags = [*tiny["ddpm_pixel"], *toy, "--ema", 0.2, 0.9, "--save-every", 1, "--sample-every", 0]
    for step in (1, 2, 3):
        succeed("ddpm_pixel", *flags, "--lr-decay", "none", "--steps", step, "--out", tmp_path)
        weights.append(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    name = "conv_out.weight"
    for averages, decay in ((lambda s: s["ema"], 0.2), (lambda s: s["more_emas"][0], 0.9)):
        mean = weights[0]["model"][name].double()
        for n, state in enumerate(weights[1:], start=1):
            d = min(decay, (1 + n) / (10 + n))
            mean = d * mean + (1 - d) * state["model"][name].double()
            torch.testing.assert_close(averages(state)[name].double(), mean, rtol=0, atol=1e-6)


def test_accumulation_and_checkpointing_change_memory_not_the_weights(toy, tiny, tmp_path):
    flags = [*tiny["ddpm_pixel"], *toy, "--steps", 3, "--sample-every", 0]
    found = []
    for i, extra in enumerate(([], ["--accumulate", 4], ["--checkpointing"])):
        succeed("ddpm_pixel", *flags, *extra, "--out", tmp_path / str(i))
        found.append(torch.load(tmp_path / str(i) / "ckpt.pt", weights_only=True)["optimizer"])
    for other in found[1:]:
        for a, b in zip(found[0]["state"].values(), other["state"].values(), strict=True):
            scale = a["exp_avg"].abs().max()
            torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=0, atol=2e-4 * float(scale))


def test_bits_per_dimension_of_a_checkpoint(trained, toy, tmp_path):
    done = succeed("ddpm_pixel", "--nll", trained / "ckpt.pt", *toy, "--n", 5, "--out", tmp_path)
    found = json.loads((tmp_path / "nll.json").read_text())
    assert len(found["terms"]) == 20 and found["images"] == 5
    assert found["bits_per_dim"] == pytest.approx(found["prior"] + sum(found["terms"]), rel=1e-9)
    assert "variance learned" in done.out and (tmp_path / "nll.png").exists()


def test_the_data_of_a_likelihood_must_be_the_network_s(trained, tmp_path):
    folder = write_images(tmp_path / "large", 8, height=24, width=24)
    flags = ["--data", folder, "--data-root", tmp_path / "root", "--n", 2]
    done = run("ddpm_pixel", "--nll", trained / "ckpt.pt", *flags)
    assert done.code == 2 and "(1, 24, 24)" in done.err and "Traceback" not in done.err


def test_schedules_of_a_short_chain_can_be_drawn(tmp_path):
    succeed("ddpm_pixel", "--plot-schedule", "--timesteps", 50, "--out", tmp_path)
    assert (tmp_path / "schedules.png").exists()


@pytest.mark.parametrize("asked", ["clamp", "none", "dynamic"])
def test_an_export_is_sampled_alike_after_it_is_read_back(toy, tiny, tmp_path, asked):
    """Through the command line, with settings that the exported scheduler must carry."""
    flags = ["--steps", 2, "--sample-every", 0, "--variance", "large", "--alpha-min", 0.01]
    flags += ["--threshold", asked, "--out", tmp_path / "run"]
    succeed("ddpm_pixel", *tiny["ddpm_pixel"], *toy, *flags)
    succeed("ddpm_pixel", "--export", tmp_path / "run" / "ckpt.pt", "--out", tmp_path / "theirs")
    scheduler = json.loads((tmp_path / "theirs/scheduler/scheduler_config.json").read_text())
    assert scheduler["clip_sample"] == (asked == "clamp")
    assert scheduler["thresholding"] == (asked == "dynamic")
    walk = ["--sample-steps", 5, "--seeds", "0-3", "--threshold", asked]
    images = []
    for i, path in enumerate((tmp_path / "run" / "ckpt.pt", tmp_path / "theirs")):
        succeed("ddpm_pixel", "--sample", path, *walk, "--out", tmp_path / str(i))
        images.append(np.load(tmp_path / str(i) / "samples.npz")["arr_0"])
    assert np.array_equal(*images) and images[0].std() > 1
    done = run("ddpm_pixel", "--nll", tmp_path / "theirs")
    assert done.code == 2 and "type --data NAME" in done.err


def test_export_opens_in_diffusers(trained, tmp_path):
    from diffusers import UNet2DModel

    succeed("ddpm_pixel", "--export", trained / "ckpt.pt", "--out", tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    ours, cfg, shape, names = ch1.load_net(trained / "ckpt.pt", "cpu")
    x, t = gaussian((2, *shape), torch.tensor([3, 4]), 0, "cpu"), torch.tensor([3, 19])
    y = torch.tensor([1, len(names)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y).sample, ours(x, t, y), rtol=0, atol=1e-5)
    again, known, _, _ = ch1.load_net(tmp_path, "cpu")
    assert torch.equal(ch1.alpha_bar_of(known), ch1.alpha_bar_of(cfg)) and known.learned_variance
    with torch.no_grad():
        assert torch.equal(again(x, t, y), ours(x, t, y))


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
    ).save_pretrained(tmp_path)
    flags = ["--sample", tmp_path, "--seeds", "0-1", "--sample-steps", 2]
    for script in ("ddpm_pixel", "ddim"):
        done = run(script, *flags, "--guidance", 1)
        assert done.code == 2 and "leave out --guidance" in done.err
        done = succeed(script, *flags, "--classes", "2")
        assert "no scheduler: taken as linear, T = 1000" in done.err
        assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [2, 2]


def test_scores_on_the_way_are_logged_and_drawn(toy, tiny, tmp_path, monkeypatch):
    class Judge:
        def __init__(self, *args, **options):
            self.calls = 0

        def __call__(self, images, labels, world):
            assert images.shape == (6, 16, 16, 1) and labels.tolist() == [0, 1, 0, 1, 0, 1]
            self.calls += 1
            return {"frechet": 10.0 / self.calls, "class_accuracy": 0.1 * self.calls}

    monkeypatch.setattr(ch1, "Judge", Judge)
    flags = [*tiny["ddpm_pixel"], *toy, "--steps", 4, "--metric-every", 2, "--metric-n", 6]
    cfg = parse(ch1.Config, "", list(map(str, flags)))
    ch1.train(replace(cfg, out=str(tmp_path)), World())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["frechet"]) for r in rows if "frechet" in r] == [(2, 10.0), (4, 5.0)]
    for at in ("ckpt.pt", "ckpt-previous.pt"):  # what was saved had been scored: a kill loses none
        step = torch.load(tmp_path / at, weights_only=True)["step"]
        assert step == 4 or [r["step"] for r in rows if "frechet" in r and r["step"] <= step]
    with Image.open(tmp_path / "metric.png") as picture:
        assert picture.width == 1200  # two panels


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--alpha-min", "0"], "--prediction v or x0"),
        (["--variance", "learned"], "--learned-variance"),
        (["--export", "x.pt"], "--out"),
        (["--visit", "0-1000"], "0 to 999"),
        (["--ema", "0.9", "1.5"], "--ema"),
        (["--accumulate", "0"], "--accumulate"),
        (["--alpha-min", "1"], "must fall"),
        (["--eta", "0.5"], "--sampler ddim"),
        (["--metric-every", "5", "--metric-n", "1"], "--metric-n"),
        (["--plot-schedule", "--out", __file__], "cannot make the folder"),
    ],
)
def test_settings_out_of_range_are_named(flags, told, tmp_path):
    done = run("ddpm_pixel", *flags)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
