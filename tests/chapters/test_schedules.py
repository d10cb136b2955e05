"""The forward process against closed forms, the papers' formulas in numbers, and diffusers."""

from runtime.commandline import BadInput

import pytest
import torch

import ddpm_pixel as ch1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("T", [50, 500, 1000, 2000])
def test_any_length_goes_from_image_to_noise(schedule, T):
    alpha_bar = ch1.make_alpha_bar(schedule, T)
    assert len(alpha_bar) == T and (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.99 - 5 / T and 0 < alpha_bar[-1] < 1e-3


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (10, 1), (2, 2)])
def test_timestep_pairs_walk_down_to_the_image(T, steps):
    pairs = ch1.timestep_pairs(T, steps)
    assert len(pairs) == steps and pairs[0][0] == T - 1 and pairs[-1][1] == -1
    assert all(t > t_prev for t, t_prev in pairs)
    assert all(a[1] == b[0] for a, b in zip(pairs, pairs[1:], strict=False))


def test_the_clip_of_alpha_is_an_option():
    for schedule in ("cosine", "sigmoid"):
        free = ch1.make_alpha_bar(schedule, 50, alpha_min=0.0)
        clipped = ch1.make_alpha_bar(schedule, 50, alpha_min=0.1)
        assert abs(free[-1]) < 1e-15  # all is noise
        alphas = clipped / torch.cat([torch.ones(1).double(), clipped[:-1]])
        assert alphas.min().item() == pytest.approx(0.1)
        torch.testing.assert_close(free[:40], clipped[:40], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear", dict(beta_schedule="linear")),
        ("cosine", dict(beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_schedules_are_those_of_diffusers(name, options):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, **options).alphas_cumprod
    ours = ch1.make_alpha_bar(name, 1000)
    torch.testing.assert_close(ours.log(), theirs.double().log(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_targets_give_back_image_and_noise(prediction):
    """x0 and eps follow from x_t and the target: Salimans, Ho 2022, appendix D."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=g)
    alpha_bar, t = ch1.make_alpha_bar("cosine", 100), torch.tensor([0, 3, 50, 90, 98])
    x_t = ch1.q_sample(x0, t, eps, alpha_bar)
    m = ch1.target_of(prediction, x0, eps, alpha_bar[t])
    alpha, sigma = (s.view(-1, 1, 1, 1) for s in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    found = {
        "eps": lambda: ((x_t - sigma * m) / alpha, m),
        "x0": lambda: (m, (x_t - alpha * m) / sigma),
        "v": lambda: (alpha * x_t - sigma * m, sigma * x_t + alpha * m),
    }[prediction]()
    torch.testing.assert_close(found[0], x0)
    torch.testing.assert_close(found[1], eps)


@pytest.mark.parametrize(
    "schedule, T, alpha_min, prediction, told",
    [
        ("cosine", 100, 1.0, "v", "must fall"),
        ("linear", 10, 0.0, "v", "must fall"),
        ("cosine", 100, 0.0, "eps", "type --prediction v"),
    ],
)
def test_a_schedule_that_makes_no_chain_is_refused(schedule, T, alpha_min, prediction, told):
    settings = dict(schedule=schedule, prediction=prediction, sample_steps=5, gpus=0)
    with pytest.raises(BadInput, match=told):
        ch1.check(ch1.Config(timesteps=T, alpha_min=alpha_min, **settings))
    ch1.check(ch1.Config(timesteps=100, **settings))
