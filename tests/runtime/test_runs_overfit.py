"""One batch can be learned by heart in each chapter, and what conditions a network reaches it."""

import re

import pytest
import torch

import autoencoder
import classifier_guidance
import ddpm_pixel
import ldm_cfg
from kernels import gaussian


def toy_batch(shape, count=8):
    """`count` smooth images (count,*shape) in [-1, 1], all different."""
    noise = gaussian((count, *shape), torch.arange(count), 5, "cpu")
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return (1.5 * smooth).clamp(-1, 1).to(memory_format=torch.channels_last)


def fit(parameters, loss, steps, lr):
    """Adam; the losses of all steps."""
    optimizer, seen = torch.optim.Adam(parameters, lr=lr), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, (steps - step) / (steps / 2))
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    return seen


def pixel_net(num_classes=2):
    torch.manual_seed(0)
    cfg = ddpm_pixel.Config(model_channels=16, channel_mult=(1, 2), attention_resolutions=(4,))
    return ddpm_pixel.UNet((1, 8, 8), num_classes, cfg).to(memory_format=torch.channels_last)


def latent_net(num_classes=2):
    torch.manual_seed(0)
    cfg = ldm_cfg.Config(model_channels=16, attention_resolutions=(2,), num_heads=2)
    return ldm_cfg.make_net(cfg, (4, 4, 4), num_classes)


def sd_net(num_classes=2):
    torch.manual_seed(0)
    cfg = ldm_cfg.Config(model="sd-label", model_channels=16, num_heads=2, context_dim=16)
    cfg.attention_resolutions = (2,)
    return ldm_cfg.make_net(cfg, (4, 4, 4), num_classes)


def latent_v_loss(*args):
    return ldm_cfg.simple_loss(*args, prediction="v")


CHAPTERS = [
    pytest.param(ddpm_pixel.simple_loss, pixel_net, (1, 8, 8), id="pixel"),
    pytest.param(ldm_cfg.simple_loss, latent_net, (4, 4, 4), id="latent eps"),
    pytest.param(latent_v_loss, latent_net, (4, 4, 4), id="latent v"),
    pytest.param(latent_v_loss, sd_net, (4, 4, 4), id="latent v, Stable Diffusion's structure"),
]


@pytest.mark.parametrize("simple_loss, make, shape", CHAPTERS)
def test_denoiser_learns_one_batch(simple_loss, make, shape):
    net, x0 = make(), toy_batch(shape)
    t, y = torch.arange(8) * 125 + 60, torch.arange(8) % 2
    eps = gaussian(x0.shape, torch.arange(8), 0, "cpu")
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 1000)

    def loss():
        return simple_loss(net, x0, t, eps, alpha_bar, y).mean()

    losses = fit(net.parameters(), loss, 220, 5e-3)
    silent = simple_loss(lambda x, t, y: torch.zeros_like(x), x0, t, eps, alpha_bar, y).mean()
    assert losses[0] == pytest.approx(silent.item(), abs=1e-6) and silent > 0.3
    assert losses[-1] < 0.02


def test_autoencoder_learns_one_batch():
    torch.manual_seed(0)
    cfg = autoencoder.Config(patch=2, model_channels=32, num_res_blocks=1, kl_weight=1e-6)
    ae, x = autoencoder.make_autoencoder(cfg, (1, 8, 8)), toy_batch((1, 8, 8))
    noise = gaussian((8, 4, 4, 4), torch.arange(8), 0, "cpu")

    def loss():
        return autoencoder.loss_terms(cfg, ae, ae, x, noise, None)[0]["loss"].mean()

    losses = fit(ae.parameters(), loss, 250, 5e-3)
    assert losses[0] > 0.2 and losses[-1] < 0.03


def test_classifier_learns_one_batch_at_all_timesteps():
    """Little noise at the end: else a label could not be read."""
    torch.manual_seed(0)
    cfg = classifier_guidance.Config(
        model_channels=16, channel_mult=(1, 2), attention_resolutions=(4,)
    )
    net, x0 = classifier_guidance.make_net(cfg, (1, 8, 8), 3), toy_batch((1, 8, 8))
    t, y = torch.arange(8) * 120, torch.arange(8) % 3
    eps = gaussian(x0.shape, torch.arange(8), 0, "cpu")
    x_t = ddpm_pixel.q_sample(x0, t, eps, ddpm_pixel.alpha_bar_of(cfg))
    losses = fit(
        net.parameters(), lambda: torch.nn.functional.cross_entropy(net(x_t, t), y), 120, 3e-3
    )
    assert losses[0] > 0.8 and losses[-1] < 0.02
    assert (net(x_t, t).argmax(1) == y).all()
    with torch.no_grad():
        assert (net(x_t, t + 60) - net(x_t, t)).abs().amax(1).min() > 1e-3  # it sees the time


@pytest.mark.parametrize("simple_loss, make, shape", CHAPTERS)
def test_labels_and_time_are_learned_from(simple_loss, make, shape):
    """Every parameter gets a gradient once the layers that start at zero have moved, and the
    answer depends on the label, the timestep and nothing else than the sample's own."""
    net, x0 = make(), toy_batch(shape)
    t, y = torch.arange(8) * 100, torch.arange(8) % 2
    eps = gaussian(x0.shape, torch.arange(8), 0, "cpu")
    alpha_bar = ddpm_pixel.make_alpha_bar("cosine", 1000)

    def loss():
        return simple_loss(net, x0, t, eps, alpha_bar, y).mean()

    fit(net.parameters(), loss, 5, 1e-2)
    net.zero_grad()
    loss().backward()
    for name, parameter in net.named_parameters():
        if name == "label.weight":
            rows = parameter.grad.abs().amax(dim=1)
            assert (rows[:2] > 0).all() and rows[2] == 0  # no label was hidden
        elif re.search(r"cross_attention\.q|blocks\.\d\.norm2", name):
            assert parameter.grad.abs().max() < 1e-9  # the softmax over a single token is 1
        else:
            assert parameter.grad.abs().max() > 0, name

    with torch.no_grad():
        out = net(x0, t, y)
        assert (net(x0, t, 1 - y) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
        assert (net(x0, t + 50, y) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
        null = torch.full_like(y, 2)
        assert torch.equal(net(x0, t, null), net(x0, t))
        assert (net(x0, t) - out).abs().amax() > 1e-4
        changed = x0.clone()
        changed[1:] = 0
        assert torch.allclose(net(changed, t, y)[0], out[0], atol=1e-5)
