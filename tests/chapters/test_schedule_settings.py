"""sigmoid-beta, --beta-start, --beta-end: closed forms, diffusers, checkpoints, exports."""

from runtime.commandline import BadInput
from runtime.pictures import to_uint8

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import refused, succeed
from PIL import Image

import classifier_guidance
import ddpm_pixel as ch1
import improved_ddpm as ch2
from evaluation import over_time
from image_data import glyphs
from image_data.batches import Dataset
from kernels import gaussian
from networks.published.schedule import read_schedule

ENDS = {"--beta-start": 0.003, "--beta-end": 0.3}
TYPED = [str(word) for pair in ENDS.items() for word in pair]


# ------------------------------------------------------------------------------ the mathematics


def betas(schedule, T, start, end):
    """beta_t of the two schedules in Python's own float64."""
    if schedule == "linear":
        return [start + (end - start) * t / (T - 1) for t in range(T)]
    sigmoid = [1 / (1 + math.exp(6 - 12 * t / (T - 1))) for t in range(T)]
    return [s * (end - start) + start for s in sigmoid]


@pytest.mark.parametrize("schedule", ["linear", "sigmoid-beta"])
@pytest.mark.parametrize("T, start, end", [(1000, 1e-4, 0.02), (100, 1e-4, 0.02), (7, 0.1, 0.9)])
def test_beta_goes_from_its_start_to_its_end_without_the_factor(schedule, T, start, end):
    alpha_bar = ch1.make_alpha_bar(schedule, T, 0.001, start, end)
    expected = np.cumprod([1 - b for b in betas(schedule, T, start, end)])
    np.testing.assert_allclose(alpha_bar.numpy(), expected, rtol=1e-12)
    assert alpha_bar.dtype == torch.float64


@pytest.mark.parametrize("T", [1000, 200])
def test_the_default_ends_are_ddpms_times_1000_over_T(T):
    for schedule in ("linear", "sigmoid-beta"):
        expected = np.cumprod([1 - b for b in betas(schedule, T, 0.1 / T, 20 / T)])
        np.testing.assert_allclose(ch1.make_alpha_bar(schedule, T).numpy(), expected, rtol=1e-12)
    one = ch1.make_alpha_bar("linear", T, beta_end=0.5)  # each end is typed alone
    assert one[0].item() == pytest.approx(1 - 0.1 / T, rel=1e-12)
    assert 1 - (one[-1] / one[-2]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("sigmoid-beta", "sigmoid")])
@pytest.mark.parametrize("T, start, end", [(1000, 1e-4, 0.02), (100, 0.001, 0.05)])
def test_betas_are_those_of_diffusers(ours, theirs, T, start, end):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(T, beta_start=start, beta_end=end, beta_schedule=theirs)
    alpha_bar = ch1.make_alpha_bar(ours, T, 0.001, start, end)
    own = 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    torch.testing.assert_close(own.float(), scheduler.betas, rtol=1e-5, atol=1e-8)


def test_the_panels_are_beta_alpha_bar_and_log_snr():
    """Of a chain by hand: beta 1/2, then 1/3, then all."""
    a = torch.tensor([1 / 2, 1 / 3, 0.0], dtype=torch.float64)
    panels = over_time.panels_of({"own": a})
    assert list(panels) == ["beta", "alpha_bar", "log SNR"]
    beta, left, snr = (panels[name]["own"] for name in panels)
    assert beta[0].tolist() == left[0].tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert beta[1].tolist() == pytest.approx([1 / 2, 1 / 3, 1]) and torch.equal(left[1], a)
    # SNR is 1 and 1/2; where nothing is left of the image it is minus infinity, and left out
    assert snr[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert snr[1].tolist() == pytest.approx([0, -math.log(2)], abs=1e-12)


def test_one_image_is_noised_under_each_schedule_by_the_same_noise():
    x0 = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    tables = {"mine": ch1.make_alpha_bar("cosine", 40), "other": ch1.make_alpha_bar("linear", 10)}
    columns = over_time.noised(x0, tables, ch1.q_sample)
    assert list(columns) == [f"{10 * i} %" for i in range(11)]
    eps = gaussian(x0.shape, torch.tensor([0]), 0, "cpu")
    for i, images in enumerate(columns.values()):
        for image, table in zip(images, tables.values(), strict=True):
            t = round(i * len(table) / 10) - 1  # x_0, ..., x_T, which in code is T - 1
            a = 1.0 if t < 0 else table[t].item()
            x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
            assert np.array_equal(image, to_uint8(x_t)[0])


# ---------------------------------------------------------------------------------- the commands


def drawn(monkeypatch, tmp_path, **settings):
    """What --plot-schedule would draw: [(path, panels or columns, names of rows)]."""
    seen = []
    images = np.full((2, 4, 4, 1), 191, np.uint8)
    ds = Dataset("gray", images, np.zeros(2, np.int64), (), {})
    monkeypatch.setattr(over_time.datasets, "of", lambda cfg: ds)
    monkeypatch.setattr(
        over_time, "plot_lines", lambda path, panels, **how: seen.append((path, panels))
    )
    monkeypatch.setattr(over_time, "save_strip", lambda *args: seen.append(args))
    cfg = ch2.Config(plot_schedule=True, out=str(tmp_path), gpus=0, **settings)
    over_time.save_schedules(cfg, ch1.make_alpha_bar, ch1.q_sample)
    return seen


def test_other_settings_draw_into_other_files(monkeypatch, tmp_path):
    every = [{}, {"timesteps": 50}, {"alpha_min": 0.0}, {"beta_start": 0.01}, {"beta_end": 0.1}]
    found = [drawn(monkeypatch, tmp_path, **settings) for settings in every]
    assert len({str(path) for figures in found for path, *_ in figures}) == 2 * len(every)
    (curves, panels), (strip, columns, rows, note) = found[0]
    assert (curves.name, strip.name) == ("schedules.png", "schedules-noised.png")
    assert rows == list(panels["beta"]) == ["linear", "cosine", "sigmoid", "sigmoid-beta"]
    assert all(len(images) == len(rows) for images in columns.values()) and "glyphs" in note
    both = drawn(monkeypatch, tmp_path, beta_start=1e-4, beta_end=0.02, timesteps=100)[0][1]
    typed = both["alpha_bar"]["linear, beta 0.0001 to 0.02"][1]
    assert typed[-1] > 0.3 and both["alpha_bar"]["linear"][1][-1] < 1e-3  # 1000/T is in the latter


def test_what_is_drawn_here_is_not_prepared_for_one_image(monkeypatch, tmp_path):
    cfg = ch2.Config(plot_schedule=True, data_root=str(tmp_path / "root"), out=str(tmp_path))
    x0 = over_time.first_image(cfg)
    assert not (tmp_path / "root").exists() and x0.shape == (1, 1, 32, 32)
    expected = glyphs.draw("train", [0]).transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.abs(x0.numpy() - expected).max() < 1e-6


def test_a_table_says_what_the_curves_are_at_tenths_of_the_way(monkeypatch, tmp_path):
    drawn(monkeypatch, tmp_path, timesteps=50)
    rows = json.loads((tmp_path / "schedules_timesteps=50.json").read_text())["schedules"]
    alpha_bar = ch1.make_alpha_bar("cosine", 50).tolist()
    (row,) = (row for row in rows if (row["schedule"], row["share"]) == ("cosine", 0.3))
    a, before = alpha_bar[14], alpha_bar[13]
    assert row["t"] == 14 and row["alpha_bar"] == pytest.approx(a)
    assert row["beta"] == pytest.approx(1 - a / before)
    assert row["log SNR"] == pytest.approx(math.log(a / (1 - a)))
    table = (tmp_path / "schedules_timesteps=50.md").read_text()
    assert f"| cosine | 30 % | 14 | {1 - a / before:.4g} | {a:.4g} | " in table
    assert len(rows) == 40 == table.count(" % |")


def test_schedules_are_drawn_of_the_data_that_is_named(toy, tmp_path):
    done = succeed("improved_ddpm", "--plot-schedule", *toy, "--timesteps", 50, "--out", tmp_path)
    curves, noised = sorted(tmp_path.glob("*.png"), key=lambda path: len(path.name))
    assert curves.name == "schedules_timesteps=50.png" and "toy" in noised.name
    assert str(curves) in done.out and str(noised) in done.out
    with Image.open(curves) as figure, Image.open(noised) as strip:
        assert figure.width > 1500 and strip.width > 11 * 64 and strip.height > 4 * 64


def test_a_run_keeps_its_betas_and_its_export_names_them(toy, tiny, tmp_path):
    from diffusers import DDPMScheduler

    how = ["--schedule", "sigmoid-beta", *TYPED, "--timesteps", 20, "--steps", 1]
    succeed("ddpm_pixel", *tiny["ddpm_pixel"], *toy, *how, "--out", tmp_path / "run")
    expected = np.cumprod([1 - b for b in betas("sigmoid-beta", 20, *ENDS.values())])
    for chapter in (ch1, ch2):
        *_, alpha_bar = chapter.load_net(tmp_path / "run" / "ckpt.pt", "cpu")
        np.testing.assert_allclose(alpha_bar.numpy(), expected, rtol=1e-12)
    out = tmp_path / "export"
    succeed("networks.published.__main__", tmp_path / "run" / "ckpt.pt", "--out", out)
    scheduler = DDPMScheduler.from_pretrained(out, subfolder="scheduler")
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=1e-4)
    path = out / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    named = (said["beta_schedule"], said["beta_start"], said["beta_end"])
    assert named == ("sigmoid", *ENDS.values())
    _, cfg, _, _, alpha_bar = ch1.load_net(out, "cpu")
    assert (cfg.schedule, cfg.beta_start, cfg.beta_end) == ("sigmoid-beta", *ENDS.values())
    np.testing.assert_allclose(alpha_bar.numpy(), expected, rtol=1e-9)
    # The same file without our notes, as diffusers writes it.
    said = {k: v for k, v in said.items() if not k.startswith("_") and k != "trained_betas"}
    path.write_text(json.dumps(said))
    facts = read_schedule(path)
    assert (facts["schedule"], facts["beta_end"]) == ("sigmoid-beta", ENDS["--beta-end"])
    np.testing.assert_allclose(facts["alpha_bar"].numpy(), expected, rtol=1e-9)
    # What the command line says is nothing to a checkpoint.
    line = refused("ddpm_pixel", "--sample", tmp_path / "run" / "ckpt.pt", "--beta-end", 0.03)
    assert "--beta-end" in line


def test_the_bound_and_a_walk_obey_the_betas():
    """T = 2, so that alpha_bar is seen in both: eq. 7's prior, and x_T - x_0 of eq. 15."""
    how = {"schedule": "linear", "timesteps": 2, "beta_start": 0.5, "beta_end": 0.75}
    alpha_bar = ch1.alpha_bar_of(ch2.Config(gpus=0, **how))
    assert alpha_bar.tolist() == [0.5, 0.125]
    x0 = torch.full((1, 1, 2, 2), 0.6, dtype=torch.float64)
    nats = 0.5 * (0.875 + 0.125 * 0.36 - 1 - math.log(0.875))  # KL(N(sqrt(a) x0, 1 - a) || N(0, 1))
    assert ch2.prior_bits(x0, alpha_bar).item() == pytest.approx(nats / math.log(2))

    def net(x, t, y=None):
        return torch.zeros_like(x)

    cfg = ch1.Config(gpus=0, sample_steps=2, clip_denoised=False, **how)
    seeds = torch.tensor([5])
    (_, x0_hat), (x, _) = ch1.trajectory(net, cfg, (1, 2, 2), seeds)
    x_T = gaussian((1, 1, 2, 2), seeds, -1, "cpu")
    torch.testing.assert_close(x0_hat, x_T / math.sqrt(0.125))  # eps_hat is 0
    assert x.isfinite().all()


def test_a_classifier_is_trained_for_such_a_chain(tmp_path):
    how = {"schedule": "sigmoid-beta", "timesteps": 9, "beta_start": 0.01, "beta_end": 0.4}
    ours, theirs = classifier_guidance.Config(gpus=0, **how), ch1.Config(gpus=0, **how)
    assert torch.equal(ch1.alpha_bar_of(ours), ch1.alpha_bar_of(theirs))
    other = replace(ours, beta_end=0.0)
    assert not torch.allclose(ch1.alpha_bar_of(other), ch1.alpha_bar_of(theirs), rtol=1e-3)


@pytest.mark.parametrize(
    "script, flags, told",
    [
        ("ddpm_pixel", ["--schedule", "cosine", "--beta-end", 0.1], "linear or sigmoid-beta"),
        ("improved_ddpm", ["--beta-start", 0.1], "linear or sigmoid-beta"),
        ("ddpm_pixel", ["--beta-end", 1.5], "--beta-end must be from 0 to 1"),
        ("improved_ddpm", ["--plot-schedule", "--beta-end", 1.5], "--beta-end must be from 0 to 1"),
        (
            "ddpm_pixel",
            ["--trained-betas", 0.1, "--sample-steps", 1, "--beta-end", 0.1],
            "beside --trained-betas",
        ),
        (
            "networks.published.__main__",
            ["x.pt", "--out", "o", "--schedule", "cosine", *TYPED],
            "need",
        ),
    ],
)
def test_ends_that_do_nothing_are_refused(script, flags, told, tmp_path):
    assert told in refused(script, *flags)


def test_a_schedule_of_betas_that_stays_is_refused():
    how = {"schedule": "linear", "timesteps": 20, "sample_steps": 5, "alpha_min": 0.0}
    cfg = ch1.Config(gpus=0, beta_start=1.0, beta_end=1.0, **how)
    with pytest.raises(BadInput, match="--beta-end, --beta-start: alpha_bar must fall"):
        ch1.check(replace(cfg, prediction="v"))
    with pytest.raises(BadInput, match="^--beta-end leaves no image at T; type --prediction v"):
        ch1.check(replace(cfg, beta_start=0.0))


def test_a_chain_that_ends_before_noise_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr("runtime.processes.SAID", set())
    for T, said in ((1000, ""), (200, "x_T holds 0.36 times the image")):
        ch1.check(ch1.Config(timesteps=T, gpus=0, beta_start=1e-4, beta_end=0.02))
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
    ch1.check(ch1.Config(timesteps=200, gpus=0))
    assert not capsys.readouterr().out


def test_schedules_of_two_folders_of_one_name_are_two_files(tmp_path):
    names = set()
    for place in "ab":
        (tmp_path / place / "cats").mkdir(parents=True)
        cfg = ch2.Config(plot_schedule=True, data=str(tmp_path / place / "cats"))
        names.add(over_time.suffix_of(over_time._changed(cfg, "data")))
    assert len(names) == 2
