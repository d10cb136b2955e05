"""DDPM's rows, of fixed and of learned variance, in 50 digits and against Bayes' rule on a grid.

Those of DDIM and DPM-Solver++ are compared in test_ddim.py and test_dpm_solver.py.
"""

import math
from decimal import Context, Decimal, localcontext

import pytest
import torch

import ddpm_pixel
import improved_ddpm


def linear(steps=1000):
    return (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)


def cosine(steps=1000):
    """Nichol & Dhariwal eq. 17, its betas clipped at 0.999: alpha_bar falls to about 2e-9."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = (0.5 * math.pi * (t + 0.008) / 1.008).cos() ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001).cumprod(0)


def chain(*ts):
    return list(zip(ts, (*ts[1:], -1), strict=True))


FULL = chain(*range(999, -1, -1))
SUBSEQUENCE = chain(999, 998, 700, 699, 330, 41, 3, 0)
LATE_END = chain(999, 600, 30)  # the last row jumps from 30 to -1
SCHEDULES = {"linear": linear(), "cosine": cosine()}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_variance = pytest.mark.parametrize("variance", ["small", "large", "learned"])


def rows_of(alpha_bar, pairs, variance="small", prediction="eps"):
    """The rows that the chapters walk along `pairs`, the last of which ends at -1."""
    numbers = [(alpha_bar[t].item(), alpha_bar[u].item() if u >= 0 else 1.0) for t, u in pairs]
    if variance != "learned":
        return [ddpm_pixel.ancestral_row(*a, prediction, variance) for a in numbers]
    floor = improved_ddpm.make_chain(alpha_bar, [t for t, _ in pairs]).log_beta_tilde[0].item()
    return [improved_ddpm.learned_row(*a, prediction, floor) for a in numbers]


def decimals(alpha_bar, pairs):
    """(alpha_bar_t, alpha_bar_prev) of each pair, the float64 numbers taken as exact."""
    for t, t_prev in pairs:
        yield (
            Decimal(alpha_bar[t].item()),
            Decimal(alpha_bar[t_prev].item()) if t_prev >= 0 else Decimal(1),
        )


@every_schedule
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
@every_variance
def test_ddpm_rows(schedule, pairs, variance):
    alpha_bar = SCHEDULES[schedule]
    rows = rows_of(alpha_bar, pairs, variance)
    assert len(rows) == len(pairs) and all(len(row) == 8 for row in rows)
    with localcontext(Context(prec=50)):
        for row, (at, ap) in zip(rows[:-1], decimals(alpha_bar, pairs), strict=False):
            beta = 1 - at / ap
            tilde = (1 - ap) / (1 - at) * beta
            expected = {
                "p": 1 / at.sqrt(),
                "q": (1 / at - 1).sqrt(),
                "A": ap.sqrt() * beta / (1 - at),
                "B": (1 - beta).sqrt() * (1 - ap) / (1 - at),
                "S": {"small": tilde.sqrt(), "large": beta.sqrt(), "learned": 1}[variance],
                "log_var_min": tilde.ln() if variance == "learned" else 0,
                "log_var_max": beta.ln() if variance == "learned" else 0,
                "H": 0,
            }
            for name, value in expected.items():
                got, value = getattr(row, name), float(value)
                assert isinstance(got, float)
                lost = 2**-53 if value else 0.0  # of 1 - a / a_prev where that is nearly 1
                assert abs(got - value) <= 1e-11 * abs(value) + lost, (name, got, value)


@every_schedule
@every_variance
def test_last_row_returns_x0_hat_without_noise(schedule, variance):
    for pairs in (FULL, LATE_END, chain(999)):
        rows = rows_of(SCHEDULES[schedule], pairs, variance)
        last = rows[-1]
        assert (last.A, last.B, last.H, last.S) == (1, 0, 0, 0)
        assert all(math.isfinite(number) for row in rows for number in row)


def test_learned_log_variance_of_the_last_row_is_clipped():
    rows = rows_of(linear(), SUBSEQUENCE, "learned")
    assert rows[-1].log_var_min == pytest.approx(rows[-2].log_var_min, rel=1e-12)
    assert rows[-1].log_var_max == pytest.approx(math.log(1e-4), rel=1e-11)
    (alone,) = rows_of(linear(), chain(5), "learned")
    assert alone.log_var_min == alone.log_var_max


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_predictions_recover_x0(prediction):
    alpha_bar = cosine(100)
    rows = rows_of(alpha_bar, chain(*range(99, -1, -1)), prediction=prediction)
    table = torch.tensor(rows, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 50, generator=g, dtype=torch.float64)
    ab = alpha_bar.flip(0)[:, None]
    x = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
    out = {"eps": eps.expand_as(x), "v": v, "x0": x0.expand_as(x)}[prediction]
    p, q = table[:, 0, None], table[:, 1, None]
    error = p * x - q * out - x0
    assert (error.abs() / (1 + p)).max() < 1e-13


@pytest.mark.parametrize("t, t_prev", [(9, 8), (9, 2), (3, 0)])
def test_ddpm_row_is_bayes_rule(t, t_prev):
    """q(x_prev | x_t, x0) ∝ q(x_t | x_prev) q(x_prev | x0), integrated on a grid."""
    alpha_bar = (1 - torch.linspace(0.05, 0.4, 10, dtype=torch.float64)).cumprod(0)
    row = rows_of(alpha_bar, chain(t, t_prev))[0]
    at, ap, x0, x_t = alpha_bar[t], alpha_bar[t_prev], 0.8, -1.3
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    log_prior = -((grid - ap.sqrt() * x0) ** 2) / (2 * (1 - ap))
    log_likelihood = -((x_t - (at / ap).sqrt() * grid) ** 2) / (2 * (1 - at / ap))
    weight = (log_prior + log_likelihood).softmax(0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    assert abs(row.A * x0 + row.B * x_t - mean) < 1e-9
    assert abs(row.S**2 - variance) < 1e-9


@every_variance
def test_zero_terminal_snr_is_exact_for_v(variance):
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    rows = rows_of(alpha_bar, chain(3, 2, 1, 0), variance, "v")
    assert all(math.isfinite(number) for row in rows for number in row)
    assert rows[0][:2] == (0, 1)
    assert abs(rows[0].A - 0.1**0.5) < 1e-15


def test_noise_of_the_learned_variance_lies_between_the_two_fixed_ones():
    small, large, learned = (rows_of(linear(), FULL, v) for v in ("small", "large", "learned"))
    for least, most, between in zip(small[:-1], large[:-1], learned[:-1], strict=True):
        assert math.exp(between.log_var_min / 2) == pytest.approx(least.S, rel=1e-12)
        assert math.exp(between.log_var_max / 2) == pytest.approx(most.S, rel=1e-12)
        assert between[:4] == least[:4] == most[:4]


def test_what_makes_no_chain_is_refused():
    ab = linear(10)
    for match, call in {
        "alpha_bar must be float64": lambda: improved_ddpm.make_chain(ab.float()),
        "fall strictly": lambda: improved_ddpm.make_chain(ab.flip(0)),
        "lie in 0 .. 1": lambda: improved_ddpm.make_chain(ab + 1),
        "fall strictly with t": lambda: improved_ddpm.make_chain(ab, [4, 4, 0]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
