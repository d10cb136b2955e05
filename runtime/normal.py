"""The normal distribution in logarithms, where its numbers are too small or alike for floats."""

import math

import torch


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) of each element, in nats.

    The four tensors broadcast. Written with expm1, so that nearly equal variances keep their digits
    and equal Gaussians give exactly 0.
    """
    d = log_var1 - log_var2
    return 0.5 * (torch.expm1(d) - d + (mean1 - mean2) ** 2 * torch.exp(-log_var2))


def log_cdf(z):
    """log Phi(z) of float64 z, exact on both sides, with an exact gradient.

    torch.special.log_ndtr has these values, but its gradient is 1e-4 off at z = -1e6 and inf at
    z = -1e10, where erfcx(x) = exp(x^2) erfc(x) keeps its digits.
    """
    left, right = z.clamp(max=0), z.clamp(min=0)
    far = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left**2 / 2
    near = torch.log1p(-torch.special.erfc(right / math.sqrt(2)) / 2)
    return torch.where(z < 0, far, near)


def discretized_gaussian_log_likelihood(x0, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) gives to the bin of x0, in nats: DDPM eq. 13.

    x0 is k / 127.5 - 1 for a level k = 0..255, up to rounding. Its bin reaches 1/255 to both sides,
    that of level 0 to -inf and that of level 255 to +inf. x0, mean and log_scale broadcast.
    Returns float64 of that shape.

    log(Phi(above) - Phi(below)) is taken in logarithms, and on the left side of the Gaussian, where
    Phi keeps its digits: right, with finite gradients, even where both Phi round to 0 or to 1.
    """
    level = ((x0.double() + 1) * 127.5).round()  # exact, so that neighbouring bins share an edge
    scale = torch.exp(log_scale.double())
    below = ((level - 0.5) / 127.5 - 1 - mean.double()) / scale
    above = ((level + 0.5) / 127.5 - 1 - mean.double()) / scale
    mirror = below + above > 0
    low = log_cdf(torch.where(mirror, -above, below))
    high = log_cdf(torch.where(mirror, -below, above))
    inner = high + torch.log(-torch.expm1(low - high))
    outer = log_cdf(torch.where(level == 0, above, -below))
    return torch.where((level == 0) | (level == 255), outer, inner)
