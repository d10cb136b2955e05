"""Row: what its eight numbers may be and what they make of an update; step_variance."""

import math

import pytest
import torch

from kernels import Row, gaussian, sampling_update, step_variance
from kernels.sampling_update import _rounded
from tests.cases.rows import make_rows, rounded

ALPHA_BAR = (1 - torch.linspace(1e-3, 0.1, 100, dtype=torch.float64)).cumprod(0)
TS = [99, 60, 59, 20, 7, 0]
PAIRS = list(zip(TS, (*TS[1:], -1), strict=True))


def inputs(learned=False):
    """x, out, seeds."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 4, generator=g)
    out = torch.randn(3, (1 + learned) * 2, 5, 4, generator=g)
    return x, out, torch.tensor([3, -9, 2**40])


@pytest.mark.parametrize("name", Row._fields)
@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, None, torch.tensor(1.0)], ids=str
)
def test_numbers_of_a_row_are_finite_and_are_numbers(name, number):
    x, out, seeds = inputs(learned=True)
    row = make_rows(ALPHA_BAR, PAIRS, variance="learned")[0]
    sampling_update(x, out, row, step=0, seeds=seeds)
    with pytest.raises(ValueError, match=f"^{name} of the row must be a finite number"):
        sampling_update(x, out, row._replace(**{name: number}), step=0, history=x, seeds=seeds)
    with pytest.raises(ValueError, match=f"^{name} of the row must be a finite number"):
        step_variance(row._replace(**{name: number}), out)


def test_numbers_are_rounded_to_float32_unless_x_is_float64():
    """As they are in the kernel. In float64 they stay as the chapter computed them."""
    row = Row(*[(-1) ** k / (3 + k) for k in range(8)])
    assert _rounded(row, torch.float32) == rounded(row) != row
    assert _rounded(row, torch.float64) == row
    x, out, *_ = (t.double() for t in inputs())
    row = Row(p=1 / 3, q=-1 / 7, A=1 / 9, B=-1 / 11)
    expected = row.p * x - row.q * out
    x_prev, x0_hat = sampling_update(x, out, row, step=0, clip=False)
    assert (x0_hat - expected).abs().max() < 1e-15
    assert (x_prev - row.A * expected - row.B * x).abs().max() < 1e-15
    coarse = sampling_update(x, out, rounded(row), step=0, clip=False)
    assert all((a - b).abs().max() > 1e-9 for a, b in zip(coarse, (x_prev, x0_hat), strict=True))
    x, out = x.float(), out.float()
    for a, b in zip(
        sampling_update(x, out, row, step=0),
        sampling_update(x, out, rounded(row), step=0),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_small_difference_of_two_large_numbers_is_exact_in_float64():
    """p x - q out near t = T, where ε and x are nearly the same: float32 numbers would lose it."""
    a = 2e-9  # alpha_bar_T of the cosine schedule
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    row = Row(p=a**-0.5, q=(1 / a - 1) ** 0.5, A=1.0, B=0.0)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    _, x0_hat = sampling_update(x, eps, row, step=0, clip=False)
    assert (x0_hat - x0).abs().max() < 1e-10


@pytest.mark.parametrize("sigma, sigma_prev", [(80.0, 60.0), (2.0, 0.5), (0.002, 0.0)])
def test_an_euler_step_of_edm_is_a_row(sigma, sigma_prev):
    """Karras et al. 2022, eq. 7 and algorithm 1: D = c_skip x + c_out F, d = (x - D) / sigma."""
    x, out, *_ = (t.double() for t in inputs())
    x, data = sigma * x, 0.5
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2) ** 0.5
    B = sigma_prev / sigma
    row = Row(p=c_skip, q=-c_out, A=1 - B, B=B)
    x_prev, x0_hat = sampling_update(x, out, row, step=0, clip=False)
    D = c_skip * x + c_out * out
    assert torch.allclose(x0_hat, D, rtol=1e-14, atol=1e-14)
    expected = x + (sigma_prev - sigma) * (x - D) / sigma
    assert torch.allclose(x_prev, expected, rtol=1e-13, atol=1e-13)


def test_an_estimate_that_the_chapter_changed_goes_in_as_out():
    """With p = 0 and q = -1, and v behind it where the variance is learned."""
    x, out, seeds = inputs(learned=True)
    row = make_rows(ALPHA_BAR, PAIRS, variance="learned")[1]
    x_prev, x0_hat = sampling_update(x, out, row, step=1, seeds=seeds)
    again = torch.cat([x0_hat, out[:, 2:]], dim=1)
    changed = row._replace(p=0.0, q=-1.0)
    for got, expected in zip(
        sampling_update(x, again, changed, step=1, seeds=seeds, clip=False),
        (x_prev, x0_hat),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_step_variance_is_iddpm_eq_15(dtype, tolerance):
    _, out, *_ = inputs(learned=True)
    out = out.to(dtype)
    for (t, t_prev), row in zip(
        PAIRS[:-1], make_rows(ALPHA_BAR, PAIRS, variance="learned")[:-1], strict=True
    ):
        at, ap = ALPHA_BAR[t], ALPHA_BAR[t_prev]
        beta = 1 - at / ap
        beta_tilde = (1 - ap) / (1 - at) * beta
        f = (out[:, 2:].double() + 1) / 2
        expected = beta**f * beta_tilde ** (1 - f)
        found = step_variance(row, out)
        assert found.dtype == dtype and found.shape == (3, 2, 5, 4)
        assert ((found - expected).abs() <= 10 * tolerance * expected).all()


def test_step_variance_is_that_of_the_noise_in_the_update():
    x, out, seeds = (t.double() for t in inputs(learned=True))
    row, seeds = make_rows(ALPHA_BAR, PAIRS, variance="learned")[1], seeds.long()
    noisy, _ = sampling_update(x, out, row, step=1, seeds=seeds)
    mean, _ = sampling_update(x, out, row._replace(S=0.0), step=1)
    z = gaussian(x.shape, seeds, 1, "cpu")
    assert torch.allclose(noisy - mean, step_variance(row, out).sqrt() * z, rtol=0, atol=1e-14)


def test_step_variance_where_it_is_not_learned_and_at_the_last_step():
    _, out, *_ = inputs()
    assert step_variance(make_rows(ALPHA_BAR, PAIRS)[0], out) == 1
    assert step_variance(
        Row(1.0, 1.0, 1.0, 1.0, S=1.0, log_var_min=-3.0, log_var_max=-3.0), out
    ) == (pytest.approx(math.exp(-3)))
    _, out, *_ = inputs(learned=True)
    last = make_rows(ALPHA_BAR, PAIRS, variance="learned")[-1]
    assert last.S == 0 and step_variance(last, out).isfinite().all()
    with pytest.raises(ValueError, match="out must have 2C channels"):
        step_variance(last, out[:, :3])
