"""One sampling step x_t -> x_{t_prev}, and the noise it adds.

Every sampler here is one affine update; samplers differ only in the rows of a small table:

    m      = (1 + w) · out - w · out_uncond        classifier-free guidance (Ho & Salimans, eq. 6)
    x0_hat = clamp(p · x - q · m, -1, 1)
    x_prev = A · x0_hat + B · x + H · x0_hist + S · exp(½ logvar) · z,    z ~ N(0, I)
    logvar = f · log_var_max + (1 - f) · log_var_min,    f = (v + 1) / 2   (IDDPM eq. 15)

p and q turn the network's output into x0_hat (Ho et al. 2020 eq. 15; v of Salimans & Ho 2022).
A, B and S are the Gaussian posterior q(x_prev | x, x0_hat) of Ho et al. 2020 eq. 6-7, or the
non-Markovian one of DDIM (Song et al. 2021 eq. 12 and 16). H weighs the x0_hat of the step before:
only DPM-Solver++(2M) uses it (Lu et al. 2022, algorithm 2). Fixed variances live in S alone, with
both log-variances 0; learned ones have S = 1 and out carries v in its second C channels.

z is counter-based: number e of sample b is a function of (seed_b, step, e) only, so a sample does
not depend on its batch, process or device. Philox4x32-10 (Salmon et al. 2011) under the key seed_b
turns the counter (e // 4, step, 0, 0) into four 32-bit words, Box-Muller those into four normals.
"""

import math

import torch

WORD = 0xFFFFFFFF  # 32 bits; words are kept in int64 tensors, or are plain Python ints


def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32: counter words c0..c3, key words k0, k1 -> four words.

    The multipliers are written minus 2³² to keep every product within int64: the low 32 bits are
    the same, and the high word of the true product is (product >> 32) + c.
    """
    for _ in range(10):
        product0, product2 = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        high0, high2 = (product0 >> 32) + c0, (product2 >> 32) + c2
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, product2 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _uniform(word):
    """Words to float32 in [0, 1), rounded as triton's uint_to_uniform_float rounds them."""
    return torch.minimum(word, WORD - word).float().mul_(4.6566127342e-10)


def _box_muller(u1, u2):
    """Two uniforms to two normals, as triton's pair_uniform_to_normal."""
    radius = u1.clamp_(min=1e-7).log_().mul_(-2).sqrt_()
    angle = u2.mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def gaussian(shape, seeds, step, device):
    """Standard normal noise that depends on nothing but (seed, step, place in the sample).

    shape: (B, ...). seeds: (B,) int64, any 64-bit values. step: int from -1 (the start noise x_T)
    to 2³² - 2. device: where the noise is made. Returns contiguous float32 of `shape`, numbered
    in the order of the sample's own C, H, W, whatever memory format it is added to.
    Raises ValueError for seeds that do not fit and steps out of range.
    """
    shape = torch.Size(shape)
    if len(shape) == 0:
        raise ValueError("shape must be (B, ...), got ()")
    if seeds.dtype != torch.int64 or seeds.shape != shape[:1]:
        raise ValueError(
            f"seeds must be int64 ({shape[0]},), got {seeds.dtype} {tuple(seeds.shape)}"
        )
    if not -1 <= step < WORD:
        raise ValueError(f"step must be in -1 .. 2**32 - 2, got {step}")
    per_sample = math.prod(shape[1:])
    seeds = seeds.to(device)[:, None]  # (B, 1)
    # + 0 made from data: torch.compile multiplies a bare arange in 32 bits (pytorch issue 175966)
    counter = torch.arange(math.ceil(per_sample / 4), device=device) + (seeds[:1] & 0)  # (1, n)
    words = _philox(counter, step & WORD, 0, 0, seeds & WORD, (seeds >> 32) & WORD)  # 4 x (B, n)
    u = [_uniform(word) for word in words]
    z = torch.stack((*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])), dim=-1)  # (B, n, 4)
    return z.flatten(1)[:, :per_sample].contiguous().view(shape)


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


def sampling_update(
    x, out, table, step, *, out_uncond=None, guidance=0.0, history=None, seeds=None, clip=True
):
    """One row of the table applied: x at t -> (x at t_prev, x0_hat).

    x: (B, C, ...). out: (B, C, ...), or (B, 2C, ...) from a network that also gives the variance's
    v. table: of `sampling_table`; it stays on the CPU so that reading a row never waits for a GPU.
    step: the row, from 0. out_uncond: out under the null label, same shape as out; the guided
    output is (1 + guidance) · out - guidance · out_uncond on the first C channels, v comes from
    out. history: the x0_hat of the step before, for rows with H != 0. seeds: (B,) int64, for rows
    with S > 0; the noise is gaussian(x.shape, seeds, step). clip: clamp x0_hat to [-1, 1].
    Arithmetic is fp32 (float64 for float64 x). Returns x_prev and x0_hat in x's shape, dtype and
    memory format. Raises ValueError for what does not fit or is missing.
    """
    _check_update(x, out, table, step, out_uncond, guidance, history)
    p, q, A, B, H, S, log_var_min, log_var_max = table[step].tolist()
    if H != 0 and history is None:
        raise ValueError(f"history is needed: row {step} uses the x0_hat of the step before")
    if S != 0 and seeds is None:
        raise ValueError(f"seeds are needed: row {step} adds noise")
    channels = x.shape[1]
    learned = S != 0 and log_var_min != log_var_max
    if learned and out.shape[1] == channels:
        raise ValueError(f"out must have {2 * channels} channels: row {step} learns its variance")

    dtype = torch.promote_types(x.dtype, torch.float32)
    x_t, m = x.to(dtype), out[:, :channels].to(dtype)
    if out_uncond is not None:
        m = (1 + guidance) * m - guidance * out_uncond[:, :channels].to(dtype)
    x0_hat = p * x_t - q * m
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    x_prev = A * x0_hat + B * x_t
    if H != 0:
        x_prev = x_prev + H * history.to(dtype)
    if S != 0:
        std = S * math.exp(0.5 * log_var_min)
        if learned:
            f = (out[:, channels:].to(dtype) + 1) / 2
            std = std * torch.exp(0.5 * (log_var_max - log_var_min) * f)
        x_prev = x_prev + std * gaussian(x.shape, seeds, step, x.device)
    return x_prev.to(x.dtype), x0_hat.to(x.dtype)


def _check_update(x, out, table, step, out_uncond, guidance, history):
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got {tuple(x.shape)}")
    batch, channels, *size = x.shape
    if out.shape not in ((batch, channels, *size), (batch, 2 * channels, *size)):
        raise ValueError(
            f"out must be {tuple(x.shape)} like x, or with twice the channels, "
            f"got {tuple(out.shape)}"
        )
    if table.device.type != "cpu" or table.ndim != 2 or table.shape[1] != 8:
        raise ValueError(f"table must be (S, 8) on the CPU, got {tuple(table.shape)}")
    if not 0 <= step < len(table):
        raise ValueError(f"step must be a row of the table, 0 .. {len(table) - 1}, got {step}")
    if out_uncond is None and guidance != 0:
        raise ValueError(f"out_uncond is needed for guidance {guidance}")
    if out_uncond is not None and out_uncond.shape != out.shape:
        raise ValueError(
            f"out_uncond must have out's shape {tuple(out.shape)}, got {tuple(out_uncond.shape)}"
        )
    if history is not None and history.shape != x.shape:
        raise ValueError(
            f"history must have x's shape {tuple(x.shape)}, got {tuple(history.shape)}"
        )
