"""Rows of `sampling_update` for tests of the kernels, which know no chapter.

The papers' formulas in float64, as tensors over all steps of a sampler at once. The chapters have
their own, one step at a time; tests/chapters/test_rows.py compares those with 50 digits.
"""

import torch

from kernels import Row


def make_rows(alpha_bar, pairs, *, eta=None, variance="small", prediction="eps", multistep=False):
    """A list of Rows, one for each (t, t_prev) of `pairs`, the last of which ends at -1.

    alpha_bar: float64 (T,); that of timestep -1 is 1. eta: None for DDPM's ancestral sampling, else
    DDIM(eta). variance, for DDPM: "small" (β̃_t), "large" (β_t), or "learned": between the two.
    prediction: "eps", "v" or "x0". multistep: DPM-Solver++(2M).
    """
    a_t = alpha_bar[[t for t, _ in pairs]]  # (S,)
    a_prev = torch.cat([a_t[1:], a_t.new_ones(1)])
    zero = torch.zeros_like(a_t)
    p, q = {
        "eps": (a_t.rsqrt(), ((1 - a_t) / a_t).sqrt()),
        "v": (a_t.sqrt(), (1 - a_t).sqrt()),
        "x0": (zero, zero - 1),
    }[prediction]
    H = S = low = high = zero
    if multistep:
        A, B, H = _multistep(a_t, a_prev)
    elif eta is not None:
        A, B, S = _ddim(a_t, a_prev, eta)
    else:
        A, B, S, low, high = _ancestral(a_t, a_prev, variance)
    columns = torch.stack([p, q, A, B, H, S, low, high], dim=1)
    return [Row(*numbers) for numbers in columns.tolist()]


def rounded(row):
    """The row's numbers as an update in fp32 takes them: rounded to float32."""
    return Row(*torch.tensor(row, dtype=torch.float64).float().tolist())


def _ancestral(a_t, a_prev, variance):
    """DDPM (Ho et al. 2020 eq. 6-7), β of the step being 1 - ᾱ_t/ᾱ_prev (IDDPM eq. 19)."""
    beta = 1 - a_t / a_prev
    beta_tilde = beta * (1 - a_prev) / (1 - a_t)
    A = a_prev.sqrt() * beta / (1 - a_t)
    B = (a_t / a_prev).sqrt() * (1 - a_prev) / (1 - a_t)
    noisy = (a_prev < 1).double()  # no noise on the step that ends at t_prev = -1
    zero = torch.zeros_like(a_t)
    if variance == "learned":
        low, high = beta_tilde.log(), beta.log()
        low[-1] = low[-2] if len(a_t) > 1 else high[-1]  # log 0 otherwise
        return A, B, noisy, low, high
    return A, B, noisy * {"small": beta_tilde, "large": beta}[variance].sqrt(), zero, zero


def _ddim(a_t, a_prev, eta):
    """DDIM (Song et al. 2021): eq. 12 with ε = (x - √ᾱ_t x0_hat) / √(1-ᾱ_t), σ of eq. 16."""
    ratio = (1 - a_t / a_prev) / (1 - a_t)  # β / (1 - ᾱ_t)
    sigma = eta * ((1 - a_prev) * ratio).sqrt()
    B = ((1 - a_prev) * (1 - eta**2 * ratio) / (1 - a_t)).sqrt()
    return a_prev.sqrt() - B * a_t.sqrt(), B, sigma


def _multistep(a_t, a_prev):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with α = √ᾱ, σ = √(1-ᾱ), λ = log(α/σ)."""
    lambda_t = 0.5 * (a_t.log() - torch.log1p(-a_t))
    lambda_prev = 0.5 * (a_prev.log() - torch.log1p(-a_prev))
    h = lambda_prev - lambda_t
    slope = torch.zeros_like(h)  # 1 / (2r) of the paper, r = h_before / h; first order at both ends
    slope[1:-1] = h[1:-1] / (2 * h[:-2])
    gain = -a_prev.sqrt() * torch.expm1(-h)
    return gain * (1 + slope), ((1 - a_prev) / (1 - a_t)).sqrt(), -gain * slope
