"""Data x0 ~ N(MEAN, COV) for the two channels of every pixel: all is known in closed form.

x_t ~ N(sqrt(a) MEAN, V_a) with a = alpha_bar_t and V_a = a COV + (1 - a) I. The best network is
eps_hat = sqrt(1 - a) V_a^-1 (x - sqrt(a) MEAN), and the ODE keeps V_a^-1/2 (x - sqrt(a) MEAN).
"""

import contextlib

import pytest
import torch

from kernels import gaussian

MEAN = torch.tensor([0.2, -0.1], dtype=torch.float64)
COV = torch.tensor([[0.04, 0.018], [0.018, 0.0225]], dtype=torch.float64)


@contextlib.contextmanager
def in_float64(*chapters):
    """Inside, all that is made is float64, the numbers of the noise in these chapters included."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for chapter in chapters:
            patch.setattr(chapter, "gaussian", lambda *args: gaussian(*args).double())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def variance(a):
    return a * COV + (1 - a) * torch.eye(2)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values**exponent).diag() @ vectors.T


def off_mean(x, a):
    return x.double() - (a.sqrt() * MEAN).view(1, 2, 1, 1)


class Gaussian(torch.nn.Module):
    """The best eps_hat, in x's precision; no labels. wrong: adds that much of an odd error."""

    null = 0

    def __init__(self, alpha_bar, wrong=0.0):
        super().__init__()
        self.alpha_bar, self.wrong = alpha_bar, wrong

    def forward(self, x, t, y=None):
        a = self.alpha_bar[t[0]]
        gain = (1 - a).sqrt() * torch.linalg.inv(variance(a))
        eps_hat = torch.einsum("ij,bjhw->bihw", gain, off_mean(x, a)).to(x.dtype)
        return eps_hat + self.wrong * torch.cos(3 * x)


def flow(x, a, b):
    """Where the ODE takes x from alpha_bar = a to b (0-dimensional float64 tensors)."""
    way = power(variance(b), 0.5) @ power(variance(a), -0.5)
    there = torch.einsum("ij,bjhw->bihw", way, off_mean(x, a))
    return there + (b.sqrt() * MEAN).view(1, 2, 1, 1)
