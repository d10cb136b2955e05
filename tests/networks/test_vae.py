"""kl_autoencoder.py against its formulas in float64, written out over the weights' names."""

from runtime.commandline import BadInput

import pytest
import torch
import torch.nn.functional as F
from vae_math import ldm_decode, ldm_encode, randomise, taesd_decode, taesd_encode

from networks.kl_autoencoder import KLVAE, TinyAutoencoder

SMALL = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def images(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1


def test_the_default_is_the_size_of_stable_diffusions_autoencoder():
    with torch.device("meta"):
        assert parameters(KLVAE()) == 83_653_863  # AutoencoderKL of Stable Diffusion 1.x
        tiny = TinyAutoencoder()
    assert parameters(tiny.encoder) == 1_222_532  # TAESD
    assert parameters(tiny.decoder) == 1_222_531


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (SMALL, (2, 3, 8, 12)),
        (dict(SMALL, channels=1, num_res_blocks=2, norm_groups=8, quant=False), (1, 1, 4, 6)),
        (
            dict(model_channels=24, channel_mult=(1, 1, 1.5), num_res_blocks=1, z_channels=3),
            (1, 3, 16, 8),
        ),
    ],
)
def test_klvae_is_the_published_network_written_out_in_float64(settings, shape):
    ae = randomise(KLVAE(**settings)).double()
    state, groups = ae.state_dict(), ae.encoder.norm_out.num_groups
    x = images(*shape, dtype=torch.float64)
    mean, log_var = ae.encode(x)
    small = (shape[0], ae.z_channels, shape[2] // ae.factor, shape[3] // ae.factor)
    assert mean.shape == log_var.shape == small
    # The same operations, up to the order of float64 sums: 3e-15 is seen.
    torch.testing.assert_close((mean, log_var), ldm_encode(state, x, groups), rtol=0, atol=1e-13)
    expected = ldm_decode(state, mean, groups)
    assert expected.shape == x.shape
    torch.testing.assert_close(ae.decode(mean), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_tiny_autoencoder_is_taesd_written_out_in_float64(channels, pooled):
    ae = randomise(TinyAutoencoder(5, channels, 8, (1, 2, 1), pooled=pooled)).double()
    state, x = ae.state_dict(), images(2, channels, 8, 12, dtype=torch.float64)
    mean, log_var = ae.encode(x)
    assert mean.shape == (2, 5, 2, 3)
    assert (log_var == -30).all()
    torch.testing.assert_close(mean, taesd_encode(state, x), rtol=0, atol=1e-12)
    z = 4 * mean  # beyond 3, where the decoder clamps
    torch.testing.assert_close(ae.decode(z), taesd_decode(state, z), rtol=0, atol=1e-12)


def test_groups_are_the_published_32_and_never_of_single_channels():
    def groups(**settings):
        with torch.device("meta"):
            return KLVAE(**settings).decoder.norm_out.num_groups

    assert groups() == groups(model_channels=64, channel_mult=(1,)) == 32
    assert groups(model_channels=32, channel_mult=(1, 2)) == 16
    assert groups(model_channels=24, channel_mult=(1, 2)) == 4
    published = {"model_channels": 32, "channel_mult": (1, 2), "norm_groups": 32}
    assert groups(**published) == 32  # what a published file says
    assert groups(model_channels=7, channel_mult=(1,)) == 1


@pytest.mark.parametrize(
    "net", [KLVAE(**SMALL), TinyAutoencoder(model_channels=8, num_blocks=(1, 1))]
)
def test_autocast_does_not_reach_encode_and_decode(net):
    x = images(1, 3, 8, 8)
    z = net.encode(x)[0]
    x_hat = net.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.encode(x)[0], z)
        assert torch.equal(net.decode(z), x_hat)
        assert torch.equal(net.decode(z.bfloat16()), net.decode(z.bfloat16().float()))


def test_training_in_bfloat16_keeps_the_moments_in_float32():
    ae, x = KLVAE(**SMALL), images(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, mean, log_var = ae(x, torch.zeros(1, 4, 4, 4))
    assert mean.dtype == log_var.dtype == torch.float32
    assert x_hat.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, so a hundredth is what a dozen layers leave.
    torch.testing.assert_close(mean, ae.encode(x)[0], rtol=0.02, atol=0.02)


def test_the_log_variance_is_clamped():
    ae = KLVAE(**SMALL)
    for bias, expected in ((1e3, 20), (-1e3, -30)):
        torch.nn.init.constant_(ae.quant_conv.bias, bias)
        assert (ae.encode(images(1, 3, 4, 4))[1] == expected).all()


@pytest.mark.parametrize(
    "net", [KLVAE(**SMALL), TinyAutoencoder(model_channels=8, num_blocks=(1, 1))]
)
def test_forward_decodes_a_draw_from_q(net):
    x, noise = images(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    x_hat, mean, log_var = net(x, noise)
    torch.testing.assert_close((mean, log_var), net.encode(x))
    std = log_var.double().exp().sqrt()
    torch.testing.assert_close(x_hat, net.decode(mean + std.float() * noise), rtol=0, atol=1e-5)


def test_the_loss_of_training_reaches_every_parameter_and_falls():
    torch.manual_seed(0)
    ae, noise = KLVAE(**SMALL), torch.zeros(4, 4, 8, 8)
    x = F.interpolate(images(4, 3, 4, 4), scale_factor=4.0)  # (4,3,16,16), 4x4 squares of colour
    optimizer, losses = torch.optim.Adam(ae.parameters(), lr=3e-3), []
    for step in range(40):
        x_hat, mean, log_var = ae(x, noise)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
        loss = (x - x_hat).abs().mean() + 1e-4 * kl.mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            dead = [n for n, p in ae.named_parameters() if not p.grad.abs().sum() > 0]
            # A constant added to every key changes no softmax: its gradient is rounding.
            assert set(dead) <= {f"{half}.mid.attn_1.k.bias" for half in ("encoder", "decoder")}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2  # 0.25 to 0.34 of it is seen, with five seeds


def test_bad_images_and_settings_are_refused_in_one_line():
    ae = KLVAE(**SMALL)
    with pytest.raises(BadInput, match="images of 8x9 cannot be made 2 times smaller.*8x8"):
        ae.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(BadInput, match="wants images of 3 channels, not of 1"):
        ae.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(BadInput, match="multiples of 8.*128x64"):
        TinyAutoencoder(model_channels=4).encode(torch.zeros(1, 3, 130, 65))
    with pytest.raises(BadInput, match="5 norm groups do not divide"):
        KLVAE(**SMALL, norm_groups=5)
