"""Improved DDPM: its losses and walks, its commands over checkpoints, and what it refuses."""

from runtime.commandline import BadInput, parse
from runtime.processes import World

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import run, start_ranks, succeed
from PIL import Image

import ddpm_pixel as ch1
import improved_ddpm as ch2
from kernels import gaussian

# ------------------------------------------------------------------------------------ the losses


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


def losses_of(net, objective, **settings):
    x0, eps, _, t, alpha_bar = batch()
    cfg = ch2.Config(objective=objective, learn_sigma=net.out.shape[1] > 1, **settings)
    return ch2.training_losses(net, x0, t, eps, ch2.make_chain(alpha_bar), None, cfg)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_the_simple_loss_is_that_of_chapter_1(prediction, loss):
    x0, eps, out, t, alpha_bar = batch()
    ours = losses_of(Fixed(out), "simple", prediction=prediction, loss=loss)
    theirs = ch1.simple_loss(Fixed(out), x0, t, eps, alpha_bar, None, prediction, loss)
    assert torch.equal(ours, theirs)


def test_min_snr_weighs_the_same_loss_down_where_the_task_is_easy():
    _, _, out, t, alpha_bar = batch()
    plain, weighted = (losses_of(Fixed(out), "simple", min_snr=gamma) for gamma in (0.0, 5.0))
    snr = (alpha_bar / (1 - alpha_bar))[t]
    assert snr[0] > 5 > snr[2]
    torch.testing.assert_close(weighted, plain * (snr.clamp(max=5) / snr).float())


def test_learned_variance_adds_a_thousandth_of_the_bound_and_the_mean_does_not_feel_it():
    x0, eps, out, t, alpha_bar = batch()
    v = torch.full_like(out, 0.2)
    net, chain = Fixed(torch.cat([out, v], dim=1)), ch2.make_chain(alpha_bar)
    simple = losses_of(net, "simple")
    (mean_only,) = torch.autograd.grad(simple.sum(), net.out)
    both = losses_of(net, "hybrid")
    (grad,) = torch.autograd.grad(both.sum(), net.out)
    x_t = ch1.q_sample(x0, t, eps, alpha_bar)
    terms = ch2.vlb_terms(
        net.out, x0, x_t, t, chain, prediction="eps", variance="learned", clip=False
    )
    torch.testing.assert_close(both - simple, (0.1 * terms).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad[:, :1], mean_only[:, :1])  # T = 100: 0.001 T = 0.1
    assert (mean_only[:, 1:] == 0).all() and (grad[:, 1:] != 0).all()


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_alone_teaches_the_mean_too(learned):
    x0, eps, out, t, alpha_bar = batch()
    net = Fixed(torch.cat([out, torch.full_like(out, 0.2)], dim=1) if learned else out)
    losses = losses_of(net, "vlb")
    (grad,) = torch.autograd.grad(losses.sum(), net.out)
    x_t, variance = ch1.q_sample(x0, t, eps, alpha_bar), "learned" if learned else "small"
    chain = ch2.make_chain(alpha_bar)
    terms = ch2.vlb_terms(net.out, x0, x_t, t, chain, variance=variance, clip=False)
    torch.testing.assert_close(losses, (100 * terms).float())  # the sum over T = 100 terms
    assert (grad != 0).all()


def test_min_snr_weights_are_the_same_loss_of_x0_whatever_is_predicted():
    """weight(prediction) error(prediction)^2 = min(SNR, gamma) error(x0)^2 for one and the same
    guess of the image."""
    alpha_bar = ch1.make_alpha_bar("cosine", 100)
    x0, x0_hat = torch.tensor(0.3).double(), torch.tensor(0.1).double()
    x_t = torch.tensor(0.7).double()
    for t in (0, 20, 50, 98):
        a = alpha_bar[t]
        wanted = min(float(a / (1 - a)), 5.0) * float(x0 - x0_hat) ** 2
        noise = [(x_t - a.sqrt() * x) / (1 - a).sqrt() for x in (x0, x0_hat)]
        for prediction in ("eps", "x0", "v"):
            target, guess = (
                ch1.target_of(prediction, x.view(1, 1, 1, 1), e.view(1, 1, 1, 1), a[None])
                for x, e in zip((x0, x0_hat), noise, strict=True)
            )
            weight = ch2.min_snr_weight(prediction, a, 5.0)
            assert float(weight * (target - guess) ** 2) == pytest.approx(wanted, rel=1e-9)


# --------------------------------------------------------------------------------------- the walk


def test_timesteps_may_be_named():
    def pairs(named):
        return ch2.pairs_of(ch2.Config(timesteps=100, sample_steps=7, timestep_respacing=named))

    assert pairs("0-2,50,99,50") == [(99, 50), (50, 2), (2, 1), (1, 0), (0, -1)]
    assert pairs("") == ch1.timestep_pairs(100, 7)
    for named, told in (("0-100", "0 to 99"), ("x", "--timestep-respacing x")):
        with pytest.raises(BadInput, match=told):
            pairs(named)


def test_dynamic_thresholding_brings_each_image_back_by_its_own_percentile():
    calm, wild = torch.linspace(-0.5, 0.5, 64), torch.linspace(-4, 4, 64)
    found = ch2.dynamic_threshold(torch.stack([calm, wild]).view(2, 1, 8, 8))
    torch.testing.assert_close(found[0].flatten(), calm)
    s = torch.quantile(wild.abs(), 0.995)
    torch.testing.assert_close(found[1].flatten(), wild.clamp(-s, s) / s)
    assert found[1].abs().max() == 1


class Perfect(torch.nn.Module):
    """The best network for pixels N(0.1, 0.3^2): eps_hat, and v from the best variance."""

    null = 0

    def __init__(self, alpha_bar):
        super().__init__()
        self.alpha_bar, self.chain = alpha_bar, ch2.make_chain(alpha_bar)

    def forward(self, x, t, y=None):
        row = self.chain.at(t)
        a, spread = row.alpha_bar, row.alpha_bar * 0.09 + 1 - row.alpha_bar
        eps_hat = (1 - a).sqrt() * (x - a.sqrt() * 0.1) / spread
        best = torch.exp(row.log_beta_tilde) + row.A**2 * 0.09 * (1 - a) / spread
        f = (best.log() - row.log_beta_tilde) / (row.log_beta - row.log_beta_tilde)
        return torch.cat([eps_hat, (2 * f - 1).expand_as(eps_hat)], 1).float()


@pytest.mark.parametrize("steps", [200, 25])
def test_with_the_true_score_and_variance_samples_have_the_spread_of_the_data(steps):
    """Few steps are enough only where the variance is right: then all of them keep the spread.

    v is that of the whole chain, so with 25 steps of 200 it is only between the two bounds.
    """
    cfg = ch2.Config(timesteps=200, sample_steps=steps, clip_denoised=False)
    net, seeds = Perfect(ch1.alpha_bar_of(cfg)), torch.arange(4000)
    *_, (x, _) = ch2.trajectory(net, cfg, (1, 1, 1), seeds)
    assert x.mean().item() == pytest.approx(0.1, abs=0.02)
    assert x.std().item() == pytest.approx(0.3, rel=0.06)


def test_without_a_learned_variance_the_walk_is_that_of_chapter_1():
    shape, seeds, y = (3, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 4])
    small = dict(model_channels=16, channel_mult=(1, 2), attention_resolutions=(4,))
    small |= dict(sample_steps=8)
    torch.manual_seed(0)
    net = ch1.UNet(shape, 5, ch1.Config(**small)).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    for how in (dict(), dict(guidance=1.5, variance="large"), dict(clip_denoised=False)):
        both = [
            list(chapter.trajectory(net, chapter.Config(**small, **how, **more), shape, seeds, y))
            for chapter, more in ((ch1, {"schedule": "cosine"}), (ch2, {"learn_sigma": False}))
        ]
        for ours, theirs in zip(*both, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# -------------------------------------------------------------------------------- runs, commands

SMALL = "--gpus 0 --batch-size 8 --warmup 5 --log-every 1 --save-every 3 --sample-steps 4 "
SMALL += "--model-channels 16 --channel-mult 1 2 --attention-resolutions 8 --seeds 0-3 "
SMALL = [*SMALL.split(), "--sample-every", 8]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run of 6 steps with a little of everything."""
    out = tmp_path_factory.mktemp("trained")
    flags = "--steps 6 --timesteps 20 --ema 0.1 0.9 --dropout 0.5"
    succeed("improved_ddpm", *SMALL, *toy, *flags.split(), "--out", out)
    return out


def test_a_run_leaves_curves_and_the_pictures_of_both_processes(trained):
    for name, blocks in (("forward", 1), ("reverse", 2)):
        with Image.open(trained / f"{name}.png") as strip, Image.open(trained / f"{name}.gif") as g:
            assert strip.height > 2 * 64 and strip.width > blocks * 5 * 64 and g.n_frames > 3
    row = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 6 and row["peak_memory_mb"] > 50


def test_samples_of_a_run_are_those_of_its_checkpoint_without_dropout(trained, tmp_path):
    succeed("improved_ddpm", "--sample", trained / "ckpt.pt", "--seeds", "0-3", "--out", tmp_path)
    ours, theirs = (np.load(f / "samples.npz")["arr_0"] for f in (trained, tmp_path))
    assert np.array_equal(ours, theirs)


def test_steps_that_are_typed_overrule_the_timesteps_of_the_run(toy, tmp_path):
    flags = [*SMALL, *toy, "--steps", 2, "--timesteps", 20, "--timestep-respacing", "0-2,19"]
    at = flags.index("--sample-steps")  # which would do nothing beside them
    succeed("improved_ddpm", *flags[:at], *flags[at + 2 :], "--out", tmp_path)
    cfg = ch2.load_net(tmp_path / "ckpt.pt", "cpu")[1]
    assert ch2.pairs_of(cfg) == [(19, 2), (2, 1), (1, 0), (0, -1)]
    for typed, frames in ((["--sample-steps", 10], 11), ([], 5)):
        out = tmp_path / str(frames)
        succeed("improved_ddpm", "--sample", tmp_path / "ckpt.pt", *typed, "--out", out)
        with Image.open(out / "reverse.gif") as film:
            assert film.n_frames == frames


def test_importance_sampling_is_kept_in_the_checkpoint(toy, tmp_path):
    flags = [*SMALL, *toy, "--timesteps", 5, "--schedule-sampler", "loss-second-moment"]
    flags += ["--objective", "vlb", "--sample-every", 0, "--accumulate", 2]
    for steps in (6, 12):
        succeed("improved_ddpm", *flags, "--lr-decay", "none", "--steps", steps, "--out", tmp_path)
        picker = ch2.LossSecondMoment(5)
        state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        picker.load_state_dict(state["picker"])
        seen = picker.last.isfinite().sum()
        assert seen == min(steps * 8, 50) or steps * 8 > seen > 40
    assert picker.probabilities().std() > 0.001
    whole = tmp_path / "whole"
    succeed("improved_ddpm", *flags, "--lr-decay", "none", "--steps", 12, "--out", whole)
    unbroken = torch.load(whole / "ckpt.pt", weights_only=True)
    again = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert torch.equal(unbroken["picker"]["last"], again["picker"]["last"])
    for name, value in unbroken["model"].items():
        assert torch.equal(value, again["model"][name]), name


def test_two_processes_remember_the_losses_of_the_whole_batch(toy, tmp_path):
    flags = [*SMALL, *toy, "--timesteps", 5, "--schedule-sampler", "loss-second-moment"]
    flags += ["--objective", "vlb", "--sample-every", 0, "--steps", 3]
    succeed("improved_ddpm", *flags, "--out", tmp_path / "one")
    for rank in start_ranks("improved_ddpm", *flags, "--out", tmp_path / "two"):
        done = rank.wait()
        assert done.code == 0, done.err
    one, two = (
        torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["picker"]["last"]
        for name in ("one", "two")
    )
    assert torch.equal(one.isfinite(), two.isfinite()) and one.isfinite().sum() > 20
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0, equal_nan=True)


def test_bits_per_dimension_of_a_checkpoint(trained, toy, tmp_path):
    done = succeed("improved_ddpm", "--nll", trained / "ckpt.pt", *toy, "--n", 5, "--out", tmp_path)
    found = json.loads((tmp_path / "nll.json").read_text())
    assert len(found["terms"]) == 20 and found["images"] == 5
    assert found["bits_per_dim"] == pytest.approx(found["prior"] + sum(found["terms"]), rel=1e-9)
    assert "variance learned" in done.out and (tmp_path / "nll.png").exists()


def test_a_checkpoint_of_chapter_1_is_sampled_and_measured(toy, tmp_path):
    flags = [*SMALL, *toy, "--steps", 2, "--timesteps", 20, "--sample-every", 0]
    succeed("ddpm_pixel", *flags, "--schedule", "cosine", "--out", tmp_path)
    path, out = tmp_path / "ckpt.pt", tmp_path / "again"
    succeed("improved_ddpm", "--sample", path, "--seeds", "0-3", "--out", out)
    ours, theirs = (np.load(f / "samples.npz")["arr_0"] for f in (tmp_path, out))
    assert np.array_equal(ours, theirs)
    done = succeed("improved_ddpm", "--nll", path, *toy, "--n", 5, "--out", out)
    found = json.loads((out / "nll.json").read_text())
    assert len(found["terms"]) == 20 and "variance small" in done.out
    done = run("improved_ddpm", "--sample", path, "--variance", "learned", "--out", out)
    assert done.code == 2 and "--variance learned" in done.err


def test_the_data_of_a_likelihood_must_be_the_network_s(trained, tmp_path):
    folder = write_images(tmp_path / "large", 8, height=24, width=24)
    flags = ["--data", folder, "--data-root", tmp_path / "root", "--n", 2]
    done = run("improved_ddpm", "--nll", trained / "ckpt.pt", *flags)
    assert done.code == 2 and "(1, 24, 24)" in done.err and "Traceback" not in done.err


def test_scores_on_the_way_are_logged_and_drawn(toy, tmp_path, monkeypatch):
    class Evaluator:
        calls = 0

        @classmethod
        def of_run(cls, cfg, ds, world):
            return cls()

        def score(self, draw, n, num_classes):
            seeds = torch.arange(n)
            images = draw(seeds, seeds % num_classes, "scoring")
            assert images.shape == (6, 16, 16, 1)
            self.calls += 1
            return {"frechet": 10.0 / self.calls, "class_accuracy": 0.1 * self.calls}

    monkeypatch.setattr("eval_fid.Evaluator", Evaluator)
    flags = [*SMALL, *toy, "--steps", 4, "--metric-every", 2, "--metric-n", 6]
    cfg = parse(ch2.Config, "", list(map(str, flags)))
    ch2.train(replace(cfg, out=str(tmp_path)), World())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["frechet"]) for r in rows if "frechet" in r] == [(2, 10.0), (4, 5.0)]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--alpha-min", "0"], "--prediction v or x0"),
        (["--variance", "learned", "--no-learn-sigma", "--objective", "simple"], "gives none"),
        (["--no-learn-sigma"], "--objective hybrid"),
        (["--objective", "simple"], "--no-learn-sigma"),
        (["--timestep-respacing", "0-1000"], "0 to 999"),
        (["--ema", "0.9", "1.5"], "--ema"),
        (["--min-snr", "-1"], "--min-snr"),
        (["--num-heads", "3"], "--num-heads 3 must divide"),
        (["--sample", "a.pt", "--nll", "b.pt"], "one at a time"),
        (["--nll", "b.pt", "--plot-schedule"], "--nll and --plot-schedule"),
        (["--plot-schedule", "--out", __file__], "(File exists): choose another name"),
    ],
)
def test_settings_out_of_range_are_named(flags, told, tmp_path):
    done = run("improved_ddpm", *flags)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err


# ------------------------------------------------------------------------------ published networks


def exported(checkpoint, out, *flags):
    succeed("networks.published.__main__", checkpoint, "--out", out, *flags)
    return json.loads((out / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize("script", ["ddpm_pixel", "improved_ddpm"])
@pytest.mark.parametrize("asked", ["clamp", "none", "dynamic"])
def test_an_export_is_sampled_alike_after_it_is_read_back(toy, tmp_path, asked, script):
    """Through the command line, with settings that the exported scheduler must carry."""
    how = {"clamp": [], "none": ["--no-clip-denoised"], "dynamic": ["--dynamic-threshold"]}[asked]
    flags = ["--steps", 2, "--sample-every", 0, "--variance", "large", "--alpha-min", 0.01]
    trained = how if script == "improved_ddpm" or asked == "none" else []
    succeed(script, *SMALL, *toy, *flags, *trained, "--out", tmp_path / "run")
    typed = [] if trained else how
    scheduler = exported(tmp_path / "run" / "ckpt.pt", tmp_path / "theirs", *typed)
    assert scheduler["clip_sample"] == (asked == "clamp")
    assert scheduler["thresholding"] == (asked == "dynamic")
    walk = ["--sample-steps", 5, "--seeds", "0-3", "--variance", "large", *how]
    images = []
    for i, path in enumerate((tmp_path / "run" / "ckpt.pt", tmp_path / "theirs")):
        succeed("improved_ddpm", "--sample", path, *walk, "--out", tmp_path / str(i))
        images.append(np.load(tmp_path / str(i) / "samples.npz")["arr_0"])
    assert np.array_equal(*images) and images[0].std() > 1
    clip = ["--clip-denoised"] if asked == "dynamic" else []
    done = run("improved_ddpm", "--nll", tmp_path / "theirs", *clip)
    assert done.code == 2 and "type --data NAME" in done.err


@pytest.mark.parametrize("script", ["ddpm_pixel", "improved_ddpm"])
def test_export_opens_in_diffusers(toy, tmp_path, script):
    from diffusers import DDPMScheduler, UNet2DModel

    flags = ["--steps", 6, "--timesteps", 20, "--ema", 0.1, 0.9, "--schedule", "cosine"]
    succeed(script, *SMALL, *toy, *flags, "--out", tmp_path / "run")
    for ema in (0.1, 0.9):
        chapter = {"ddpm_pixel": ch1, "improved_ddpm": ch2}[script]
        out = tmp_path / str(ema)
        exported(tmp_path / "run" / "ckpt.pt", out, "--ema", ema)
        theirs = UNet2DModel.from_pretrained(out, subfolder="unet").eval()
        ours, cfg, shape, names, alpha_bar = chapter.load_net(tmp_path / "run/ckpt.pt", "cpu", ema)
        x, t = gaussian((2, *shape), torch.tensor([3, 4]), 0, "cpu"), torch.tensor([3, 19])
        y = torch.tensor([1, len(names)])
        with torch.no_grad():
            torch.testing.assert_close(theirs(x, t, y).sample, ours(x, t, y), rtol=0, atol=1e-5)
        scheduler = DDPMScheduler.from_pretrained(out, subfolder="scheduler")
        walked = scheduler.alphas_cumprod.double()  # a product of 20 float32 numbers
        torch.testing.assert_close(walked, alpha_bar, rtol=1e-4, atol=0)
        again, known, _, _, _ = chapter.load_net(out, "cpu")
        assert torch.equal(ch1.alpha_bar_of(known), ch1.alpha_bar_of(cfg))
        assert getattr(known, "learn_sigma", False) == (script == "improved_ddpm")
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
    flags = ["--sample", tmp_path, "--seeds", "0-1", "--sample-steps", 2, "--out", tmp_path]
    done = run("improved_ddpm", *flags, "--guidance", 1)
    assert done.code == 2 and "leave out --guidance" in done.err
    done = succeed("improved_ddpm", *flags, "--classes", "2")
    assert "no scheduler: taken as linear, T = 1000" in done.out
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [2, 2]
    done = run("ddpm_pixel", *flags)
    assert done.code == 2 and "python improved_ddpm.py --sample" in done.err
