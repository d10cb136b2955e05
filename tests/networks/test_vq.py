"""Rounding to a codebook against plain loops in float64, and the autoencoder around it."""

import numpy as np
import pytest
import torch

from networks import vq
from networks.small_autoencoder import Autoencoder
from networks.vq import Codebook, VQAutoencoder


def codebook(size=6, dim=3, seed=0):
    """A Codebook with codes drawn from N(0, 1)."""
    torch.manual_seed(seed)
    book = Codebook(size, dim)
    book.vectors.normal_()
    return book


def latents(seed, shape=(4, 3, 5, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors_of(z):
    """(B*h*w, C) float64, by numpy."""
    return np.moveaxis(z.double().numpy(), 1, -1).reshape(-1, z.shape[1])


def nearest_by_loops(rows, codes):
    return np.array([np.argmin([np.sum((r - c) ** 2) for c in codes]) for r in rows])


@pytest.mark.parametrize("chunk", [4096, 7])
def test_the_code_is_the_nearest_one(chunk, monkeypatch):
    monkeypatch.setattr(vq, "CHUNK", chunk)
    book, z = codebook(40), latents(1)
    expected = nearest_by_loops(vectors_of(z), book.vectors.double().numpy())
    assert np.array_equal(book.nearest(z).numpy(), expected.reshape(4, 5, 2))
    assert torch.equal(
        book.nearest(z.contiguous(memory_format=torch.channels_last)), book.nearest(z)
    )


def test_nearness_is_measured_in_float32_under_autocast():
    """In bfloat16, of eight bits, every other one of these codes would be its neighbour."""
    book = Codebook(256, 1)
    book.vectors.copy_(1 + torch.arange(256)[:, None] / 256)
    z = book.vectors.clone().view(256, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = book.nearest(z)
    assert torch.equal(codes.flatten(), torch.arange(256))


def test_gradient_goes_straight_through():
    book, z = codebook(), latents(2).requires_grad_()
    weight = latents(3)
    z_q, codes = book(z)
    torch.testing.assert_close(z_q, book.lookup(codes), atol=1e-6, rtol=1e-6)
    (z_q.square() * weight).sum().backward()
    torch.testing.assert_close(z.grad, 2 * weight * z_q.detach())  # the gradient at z_q


# ------------------------------------------------------------------------------ the autoencoder


def make(channels=1):
    torch.manual_seed(0)
    ae = Autoencoder(channels, 2, 16, (1, 2), 1, 3, variance=False)
    for p in ae.parameters():  # open the layers that start at zero
        torch.nn.init.normal_(p, std=0.1)
    return VQAutoencoder(ae, codebook(10, 3)).eval()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24)])
def test_it_has_the_interface_of_every_autoencoder(shape):
    ae, x = make(shape[0]), torch.randn(2, *shape)
    z, log_var = ae.encode(x)
    small = (shape[1] // 4, shape[2] // 4)
    assert ae.factor == 4 and ae.z_channels == 3
    assert z.shape == log_var.shape == (2, 3, *small) and (log_var == -30).all()
    assert ae.codes(x).shape == (2, *small) and ae.codes(x).dtype == torch.int64
    x_hat, z_e, codes = ae(x)
    assert torch.equal(z_e, z) and torch.equal(codes, ae.codes(x)) and x_hat.shape == x.shape
    torch.testing.assert_close(ae.decode(z), x_hat)
    torch.testing.assert_close(ae.decode_codes(codes), x_hat)


def test_decoding_mends_small_errors():
    """All of a code's cell decodes to the same image: the codes themselves are in it."""
    ae, x = make(), torch.randn(2, 1, 16, 16)
    z, _ = ae.encode(x)
    nearly = torch.lerp(z, ae.codebook.lookup(ae.codes(x)), 0.9)
    assert not torch.equal(z, nearly)
    torch.testing.assert_close(ae.decode(nearly), ae.decode(z))


def test_every_parameter_learns_through_the_quantiser():
    ae, x = make(), torch.randn(2, 1, 16, 16)
    x_hat, z, codes = ae(x)
    pull = (z - ae.codebook.lookup(codes)).square()
    (x_hat.square().mean() + pull.mean()).backward()
    silent = [n for n, p in ae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
