"""Chapter 1's U-Net: the one of later chapters, nothing copied on the way, what it refuses."""

from runtime.commandline import BadInput

import pytest
import torch
from recording import Copies

import ddpm_pixel as ch1
from networks import adm_unet

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,)}


def build(shape=(3, 8, 8), classes=5, **settings):
    torch.manual_seed(0)
    net = ch1.UNet(shape, classes, ch1.Config(**{**SMALL, **settings}))
    return net.to(memory_format=torch.channels_last)


def opened(net):
    """The network with its zero layers opened: they would hide what lies behind them."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(shape=(3, 8, 8), n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)
    return x, torch.tensor([0, 10, 999, 4])[:n], torch.tensor([0, 4, 5, 2])[:n]


@pytest.mark.parametrize("settings", [{}, {"num_heads": 2, "num_res_blocks": 2}], ids=str)
def test_it_is_the_network_of_later_chapters_in_its_plain_form(settings):
    """networks/adm_unet.py, whose parity with published weights is tested by itself."""
    net = opened(build(**settings))
    names = {"model_channels", "channel_mult", "attention_resolutions", "num_heads"}
    names |= {"num_res_blocks", "dropout", "norm_groups"}
    plain = {"style": "ddpm", **{name: getattr(net.cfg, name) for name in names}}
    other = adm_unet.UNet((3, 8, 8), 5, **plain)
    own = other.state_dict()
    state = {name: value.reshape(own[name].shape) for name, value in net.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(net(*inputs()), other(*inputs()), rtol=1e-5, atol=1e-5)


def test_no_activation_is_copied_on_the_way():
    net, (x, t, y) = build(), inputs(n=2)
    with torch.no_grad(), Copies(size=2 * 32 * 4 * 4) as copies:  # the smallest activation
        net(x, t, y)
    assert not copies.found


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_groups": 3}, "--norm-groups 3 must divide"),
        ({"norm_groups": 16}, "two or more"),
        ({"num_heads": 3}, "--num-heads 3 must divide"),
        ({"model_channels": 15}, "--model-channels 15 must be even"),
        ({"channel_mult": (1, 2, 2, 2, 2)}, "cannot be halved 4 times"),
    ],
)
def test_settings_that_fit_no_network_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        build(**changes)
