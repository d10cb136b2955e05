"""networks/drawing.py: what is faster or smaller without gradients gives the same numbers."""

from runtime.plan import LiveBytes

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.drawing import STRIPE, Linear, doubled, drawing, norm_in_stripes
from networks.kl_autoencoder import KLVAE
from networks.sd_unet import TOKENS, FeedForward

LAST = torch.channels_last


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(found, expected, of=1e-5):
    """Whether float32 numbers are those of float64, up to a share of the largest."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return (found - expected).abs().max() <= of * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 0, 7), (0, 7), (2, 3, 4, 7)])
def test_a_linear_layer_is_the_product_of_matrices(shape, bias):
    torch.manual_seed(0)
    layer, apart = Linear(7, 11, bias=bias), normal(*shape[:-1], 14)[..., ::2]
    for x in (normal(*shape), apart):  # every second number
        expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        with torch.no_grad():
            y = layer(x)
        assert y.shape == expected.shape and y.is_contiguous()
        assert torch.allclose(y.double(), expected, rtol=0, atol=1e-5)


def test_a_linear_layer_convolves_only_where_it_draws(monkeypatch):
    calls, layer, x = [], Linear(7, 11), normal(5, 7)
    monkeypatch.setattr(F, "conv2d", lambda *given: calls.append(given) or torch.zeros(1, 11, 1, 5))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and not calls
    with torch.no_grad():
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert not calls
        layer(x)
    assert len(calls) == 1
    assert not drawing(x)
    with torch.inference_mode():
        assert drawing(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(1, 1), (1, 6), (5, 4)])
def test_a_convolution_of_doubled_pixels_is_that_of_the_doubled_image(sides, bias):
    torch.manual_seed(1)
    conv, x = nn.Conv2d(6, 5, 3, padding=1, bias=bias), normal(2, 6, *sides)
    with torch.no_grad():
        found = doubled(conv, x.to(memory_format=LAST))
        large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
        assert near(found, conv.double()(large))
    assert found.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])  # of a stripe; the image has 8
def test_a_norm_in_stripes_is_group_norm(monkeypatch, rows, silu):
    x = normal(2, 12, 8, 5) * torch.arange(1, 13)[:, None, None] + 1000
    weight, bias = normal(12, seed=1), normal(12, seed=2)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
    expected = F.silu(expected) if silu else expected
    monkeypatch.setattr("networks.drawing.STRIPE", rows * 2 * 12 * 5)
    kept = x.to(memory_format=LAST)
    found = norm_in_stripes(kept, 4, weight, bias, 1e-6, silu)
    assert near(found, expected, of=1e-4)  # 1000 has lost three digits of what lies beside it
    assert found.is_contiguous(memory_format=LAST) and torch.equal(kept, x)


def test_a_norm_in_stripes_is_exact_in_large_images():
    x = (normal(1, 4, 600, 1100) + normal(4, 1, 1, seed=1)).to(memory_format=LAST)
    assert x.numel() > 2 * STRIPE
    ones = torch.ones(4), torch.zeros(4)
    expected = F.group_norm(x.double(), 2, *(each.double() for each in ones), 1e-6)
    assert near(norm_in_stripes(x, 2, *ones, 1e-6, False), expected, of=1e-6)


def test_a_norm_in_stripes_takes_the_memory_of_its_result():
    x, ones = normal(1, 32, 512, 256).to(memory_format=LAST), torch.ones(32)
    with LiveBytes([x]) as live:
        norm_in_stripes(x, 8, ones, ones, 1e-6, True)
    assert live.peak < 2 * x.nbytes + 3 * 4 * STRIPE < 3 * x.nbytes


def test_feed_forward_takes_tokens_in_parts(monkeypatch):
    torch.manual_seed(0)
    net, x = FeedForward(4), normal(2, TOKENS // 2 + 100, 4)
    whole = net(x)  # with gradients, at once
    seen = []
    net.widen.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    with torch.no_grad():
        assert near(net(x), whole.double())
    assert seen == [(TOKENS, 4), (200, 4)]


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_an_autoencoder_computes_the_same_with_gradients_and_without(name):
    torch.manual_seed(0)
    ae = KLVAE(model_channels=8, num_res_blocks=1).to(memory_format=LAST)
    x = normal(*((2, 3, 24, 16) if name == "encode" else (2, 4, 3, 2))).to(memory_format=LAST)
    expected = getattr(ae, name)(x)
    with torch.no_grad():
        found = getattr(ae, name)(x)
    pairs = zip(expected, found, strict=True) if name == "encode" else [(expected, found)]
    for a, b in pairs:
        assert a.requires_grad and not b.requires_grad and near(b, a.double())


def test_decoding_keeps_two_and_a_half_of_its_largest_images(monkeypatch):
    monkeypatch.setattr("networks.drawing.STRIPE", 2**14)
    ae = KLVAE(model_channels=16, num_res_blocks=1).to(memory_format=LAST).requires_grad_(False)
    z = normal(1, 4, 32, 32).to(memory_format=LAST)
    weights = sum(p.nbytes for p in ae.parameters())
    with torch.no_grad(), LiveBytes(list(ae.parameters())) as live:
        ae.decode(z)
    # 2.54; 2.78 with the doubled image before its convolution, 3.03 with a norm of the whole image.
    assert live.peak - weights < 2.6 * 4 * 32 * 256 * 256
