"""sampling_table against the papers' formulas in 50 digits, and against Bayes' rule on a grid."""

import math
from decimal import Context, Decimal, localcontext

import pytest
import torch

from kernels import sampling_table

P, Q, A, B, H, S, LOG_MIN, LOG_MAX = range(8)


def linear(steps=1000):
    return (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)


def cosine(steps=1000):
    """Nichol & Dhariwal eq. 17, its betas clipped at 0.999: ᾱ falls to about 2e-9."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = (0.5 * math.pi * (t + 0.008) / 1.008).cos() ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001).cumprod(0)


def chain(*ts):
    return list(zip(ts, (*ts[1:], -1), strict=True))


FULL = chain(*range(999, -1, -1))
SUBSEQUENCE = chain(999, 998, 700, 699, 330, 41, 3, 0)
LATE_END = chain(999, 600, 30)  # the last row jumps from 30 to -1
SCHEDULES = {"linear": linear(), "cosine": cosine()}


def close(row, expected):
    """Within two units in the last place of float32."""
    for name, value in expected.items():
        got = row[globals()[name]].item()
        assert abs(got - float(value)) <= 2.4e-7 * abs(float(value)), (name, got, float(value))


def decimals(alpha_bar, pairs):
    """(ᾱ_t, ᾱ_prev) of each pair, the float64 ᾱ taken as exact."""
    for t, t_prev in pairs:
        yield (
            Decimal(alpha_bar[t].item()),
            Decimal(alpha_bar[t_prev].item()) if t_prev >= 0 else Decimal(1),
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm_rows(schedule, pairs, variance):
    alpha_bar = SCHEDULES[schedule]
    table = sampling_table(alpha_bar, pairs, variance=variance)
    assert table.shape == (len(pairs), 8) and table.dtype == torch.float32
    with localcontext(Context(prec=50)):
        for row, (at, ap) in zip(table[:-1], decimals(alpha_bar, pairs), strict=False):
            beta = 1 - at / ap
            tilde = (1 - ap) / (1 - at) * beta
            expected = {
                "P": 1 / at.sqrt(),
                "Q": (1 / at - 1).sqrt(),
                "A": ap.sqrt() * beta / (1 - at),
                "B": (1 - beta).sqrt() * (1 - ap) / (1 - at),
                "S": {"small": tilde.sqrt(), "large": beta.sqrt(), "learned": 1}[variance],
                "LOG_MIN": tilde.ln() if variance == "learned" else 0,
                "LOG_MAX": beta.ln() if variance == "learned" else 0,
                "H": 0,
            }
            close(row, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_rows(schedule, pairs, eta):
    alpha_bar = SCHEDULES[schedule]
    table = sampling_table(alpha_bar, pairs, eta=eta)
    with localcontext(Context(prec=50)):
        for row, (at, ap) in zip(table[:-1], decimals(alpha_bar, pairs), strict=False):
            sigma = Decimal(eta) * ((1 - ap) / (1 - at)).sqrt() * (1 - at / ap).sqrt()
            direction = (1 - ap - sigma**2).sqrt()
            # ε = (x - √ᾱ x0)/√(1-ᾱ) put into √ᾱ_prev x0 + direction · ε
            close(
                row,
                {
                    "A": ap.sqrt() - direction * at.sqrt() / (1 - at).sqrt(),
                    "B": direction / (1 - at).sqrt(),
                    "S": sigma,
                    "H": 0,
                    "LOG_MIN": 0,
                    "LOG_MAX": 0,
                },
            )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
def test_multistep_rows(schedule, pairs):
    alpha_bar = SCHEDULES[schedule]
    table = sampling_table(alpha_bar, pairs, multistep=True)
    with localcontext(Context(prec=50)):
        h_before = None
        for row, (at, ap) in zip(table[:-1], decimals(alpha_bar, pairs), strict=False):
            h = ((ap / (1 - ap)).ln() - (at / (1 - at)).ln()) / 2
            gain = ap.sqrt() * (1 - (-h).exp())
            half_over_r = h / h_before / 2 if h_before else Decimal(0)
            expected = {"A": gain * (1 + half_over_r), "H": -gain * half_over_r, "S": 0}
            close(row, {**expected, "B": ((1 - ap) / (1 - at)).sqrt()})
            h_before = h


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "sampler",
    [{}, {"variance": "large"}, {"variance": "learned"}, {"eta": 0.0}, {"eta": 1.0}]
    + [{"multistep": True}],
)
def test_last_row_returns_x0_hat_without_noise(schedule, sampler):
    for pairs in (FULL, LATE_END, chain(999)):
        table = sampling_table(SCHEDULES[schedule], pairs, **sampler)
        assert table[-1, [A, B, H, S]].tolist() == [1, 0, 0, 0]
        assert table.isfinite().all()


def test_learned_log_variance_of_the_last_row_is_clipped():
    table = sampling_table(linear(), SUBSEQUENCE, variance="learned")
    assert table[-1, LOG_MIN] == table[-2, LOG_MIN]
    assert table[-1, LOG_MAX] == torch.tensor(1e-4).log()
    alone = sampling_table(linear(), chain(5), variance="learned")
    assert alone[0, LOG_MIN] == alone[0, LOG_MAX]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_predictions_recover_x0(prediction):
    alpha_bar = cosine(100)
    table = sampling_table(alpha_bar, chain(*range(99, -1, -1)), prediction=prediction).double()
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 50, generator=g, dtype=torch.float64)
    ab = alpha_bar.flip(0)[:, None]
    x = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
    out = {"eps": eps.expand_as(x), "v": v, "x0": x0.expand_as(x)}[prediction]
    error = table[:, P, None] * x - table[:, Q, None] * out - x0
    assert (error.abs() / (1 + table[:, P, None])).max() < 1e-6


@pytest.mark.parametrize("t, t_prev", [(9, 8), (9, 2), (3, 0)])
def test_ddpm_row_is_bayes_rule(t, t_prev):
    """q(x_prev | x_t, x0) ∝ q(x_t | x_prev) q(x_prev | x0), integrated on a grid."""
    alpha_bar = (1 - torch.linspace(0.05, 0.4, 10, dtype=torch.float64)).cumprod(0)
    row = sampling_table(alpha_bar, chain(t, t_prev))[0].double()
    at, ap, x0, x_t = alpha_bar[t], alpha_bar[t_prev], 0.8, -1.3
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    log_prior = -((grid - ap.sqrt() * x0) ** 2) / (2 * (1 - ap))
    log_likelihood = -((x_t - (at / ap).sqrt() * grid) ** 2) / (2 * (1 - at / ap))
    weight = (log_prior + log_likelihood).softmax(0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    assert abs(row[A] * x0 + row[B] * x_t - mean) < 1e-6
    assert abs(row[S] ** 2 - variance) < 1e-6


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    for alpha_bar in SCHEDULES.values():
        ddpm, ddim = sampling_table(alpha_bar, FULL), sampling_table(alpha_bar, FULL, eta=1.0)
        assert ((ddpm - ddim).abs() <= 2.4e-7 * ddpm.abs()).all()


def test_zero_terminal_snr_is_exact_for_v():
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    for sampler in ({}, {"variance": "learned"}, {"eta": 0.0}, {"eta": 1.0}, {"multistep": True}):
        table = sampling_table(alpha_bar, chain(3, 2, 1, 0), prediction="v", **sampler)
        assert table.isfinite().all()
        assert table[0, [P, Q]].tolist() == [0, 1]
        assert abs(table[0, A] - 0.1**0.5) < 1e-7


def test_what_makes_no_sampler_is_refused():
    ab = linear(10)
    good = chain(9, 4, 0)
    for match, call in {
        "pairs is empty": lambda: sampling_table(ab, []),
        "the last -1": lambda: sampling_table(ab, [(9, 4), (4, 0)]),
        "each t_prev the next t": lambda: sampling_table(ab, [(9, 4), (3, -1)]),
        "step downward": lambda: sampling_table(ab, chain(4, 9, 0)),
        "step downward, ": lambda: sampling_table(ab, chain(4, 4, 0)),
        "0 .. 9": lambda: sampling_table(ab, chain(10, 4, 0)),
        "alpha_bar must be float64": lambda: sampling_table(ab.float(), good),
        "fall strictly": lambda: sampling_table(ab.flip(0), good),
        "lie in 0 .. 1": lambda: sampling_table(ab + 1, good),
        "needs alpha_bar > 0": lambda: sampling_table(ab - ab[9], good),
        "eta must be in": lambda: sampling_table(ab, good, eta=1.5),
        "multistep is deterministic": lambda: sampling_table(ab, good, eta=0.5, multistep=True),
        "variance must": lambda: sampling_table(ab, good, variance="medium"),
        "prediction must": lambda: sampling_table(ab, good, prediction="epsilon"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
