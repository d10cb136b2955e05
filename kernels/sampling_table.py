"""The table whose rows make `sampling_update` one sampler or another."""

import torch


def sampling_table(
    alpha_bar, pairs, *, eta=None, variance="small", prediction="eps", multistep=False
):
    """The rows that make `sampling_update` a sampler, one per step.

    alpha_bar: float64 (T,), strictly falling within [0, 1]; ᾱ of timestep -1 is 1.
    pairs: list of (t, t_prev), each t_prev the next pair's t, the last -1: any sub-sequence.
    eta: None for DDPM's ancestral sampling, else DDIM(eta) with 0 <= eta <= 1.
    variance, for DDPM: "small" (β̃_t), "large" (β_t), or "learned": between the two, by the network.
    prediction: what the network gives: "eps", "v" = √ᾱ ε - √(1-ᾱ) x0, or "x0".
    multistep: DPM-Solver++(2M), deterministic; eta must be None or 0.

    Returns a CPU float32 (len(pairs), 8) table with columns p, q, A, B, H, S, log_var_min,
    log_var_max, computed in float64. The row that ends at -1 returns x0_hat: A = 1, B = H = S = 0.
    Its log β̃ would be -inf; like IDDPM it takes that of the row before (log β if it is alone).
    Raises ValueError for pairs, schedules and choices that make no sampler.
    """
    a_t, a_prev = _alpha_bar_pairs(alpha_bar, pairs)  # ᾱ at t and at t_prev, (S,) each
    if prediction == "eps":
        if (a_t == 0).any():
            raise ValueError('prediction "eps" needs alpha_bar > 0; "v" and "x0" allow zero')
        p, q = a_t.rsqrt(), ((1 - a_t) / a_t).sqrt()
    elif prediction == "v":
        p, q = a_t.sqrt(), (1 - a_t).sqrt()
    elif prediction == "x0":
        p, q = torch.zeros_like(a_t), -torch.ones_like(a_t)
    else:
        raise ValueError(f'prediction must be "eps", "v" or "x0", got {prediction!r}')

    zero = torch.zeros_like(a_t)
    if multistep:
        if eta:
            raise ValueError(f"multistep is deterministic: eta must be None or 0, got {eta}")
        A, B, H = _multistep_rows(a_t, a_prev)
        S = log_var_min = log_var_max = zero
    elif eta is not None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in 0 .. 1, got {eta}")
        A, B, S = _ddim_rows(a_t, a_prev, eta)
        H = log_var_min = log_var_max = zero
    else:
        A, B, S, log_var_min, log_var_max = _ancestral_rows(a_t, a_prev, variance)
        H = zero
    return torch.stack([p, q, A, B, H, S, log_var_min, log_var_max], dim=1).float()


def _alpha_bar_pairs(alpha_bar, pairs):
    if alpha_bar.dtype != torch.float64 or alpha_bar.ndim != 1:
        raise ValueError(
            f"alpha_bar must be float64 (T,), got {alpha_bar.dtype} {tuple(alpha_bar.shape)}"
        )
    if len(pairs) == 0:
        raise ValueError("pairs is empty: it must hold at least one (t, t_prev)")
    ts, prevs = zip(*pairs, strict=True)
    if not all(0 <= t < len(alpha_bar) for t in ts):
        raise ValueError(f"pairs must keep t in 0 .. {len(alpha_bar) - 1}, got {pairs}")
    if prevs != (*ts[1:], -1) or not all(t > t_prev for t, t_prev in pairs):
        raise ValueError(
            f"pairs must step downward, each t_prev the next t, the last -1, got {pairs}"
        )
    a_t = alpha_bar.detach().cpu()[list(ts)]
    a_prev = torch.cat([a_t[1:], a_t.new_ones(1)])
    if not ((a_t >= 0) & (a_t < a_prev)).all() or not (a_prev <= 1).all():
        raise ValueError("alpha_bar must fall strictly with t and lie in 0 .. 1")
    return a_t, a_prev


def _ancestral_rows(a_t, a_prev, variance):
    """DDPM (Ho et al. 2020 eq. 6-7), β of the step being 1 - ᾱ_t/ᾱ_prev (IDDPM eq. 19)."""
    beta = 1 - a_t / a_prev
    A = a_prev.sqrt() * beta / (1 - a_t)
    B = (a_t / a_prev).sqrt() * (1 - a_prev) / (1 - a_t)
    beta_tilde = beta * (1 - a_prev) / (1 - a_t)
    noisy = (a_prev < 1).double()  # no noise on the step that ends at t_prev = -1
    zero = torch.zeros_like(a_t)
    if variance == "small":
        return A, B, noisy * beta_tilde.sqrt(), zero, zero
    if variance == "large":
        return A, B, noisy * beta.sqrt(), zero, zero
    if variance == "learned":
        log_var_min, log_var_max = beta_tilde.log(), beta.log()
        log_var_min[-1] = log_var_min[-2] if len(a_t) > 1 else log_var_max[-1]
        return A, B, noisy, log_var_min, log_var_max
    raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')


def _ddim_rows(a_t, a_prev, eta):
    """DDIM (Song et al. 2021): eq. 12 with ε = (x - √ᾱ_t x0_hat) / √(1-ᾱ_t), σ of eq. 16.

    1 - ᾱ_prev - σ² is written as a product, which keeps its digits where it is small.
    """
    ratio = (1 - a_t / a_prev) / (1 - a_t)  # β / (1 - ᾱ_t)
    sigma = eta * ((1 - a_prev) * ratio).sqrt()
    B = ((1 - a_prev) * (1 - eta**2 * ratio) / (1 - a_t)).sqrt()
    A = a_prev.sqrt() - B * a_t.sqrt()
    return A, B, sigma


def _multistep_rows(a_t, a_prev):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with α = √ᾱ, σ = √(1-ᾱ), λ = log(α/σ).

    h = λ_prev - λ_t, and the x0_hat of the step before corrects this one's by the slope
    (x0_hat - x0_hist) · h / (2 h_before). The first step has no step before; the last has
    h = inf, where first order is exact: it returns x0_hat.
    """
    lambda_t = 0.5 * (a_t.log() - torch.log1p(-a_t))
    lambda_prev = 0.5 * (a_prev.log() - torch.log1p(-a_prev))
    h = lambda_prev - lambda_t
    slope = torch.zeros_like(h)  # 1 / (2r) of the paper, r = h_before / h
    slope[1:-1] = h[1:-1] / (2 * h[:-2])
    gain = -a_prev.sqrt() * torch.expm1(-h)
    return gain * (1 + slope), ((1 - a_prev) / (1 - a_t)).sqrt(), -gain * slope
