"""The U-Net by itself: its parts, and that nothing is lost or copied on the way through it."""

from runtime.commandline import BadInput

import math

import pytest
import torch
from recording import Copies
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import compiled, training_step

from networks import adm_unet as unet
from networks.sizes import groups_for

SMALL = dict(
    style="ddpm",
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
ADM = dict(
    style="adm",
    use_scale_shift_norm=True,
    resblock_updown=True,
    num_head_channels=8,
    learn_sigma=True,
)
STYLES = {"ddpm": SMALL, "adm": {**SMALL, **ADM}}
each_style = pytest.mark.parametrize("settings", STYLES.values(), ids=STYLES)


def build(shape=(3, 8, 8), classes=5, **settings):
    torch.manual_seed(0)
    return unet.UNet(shape, classes, **settings).to(memory_format=torch.channels_last)


def opened(net):
    """The network with its zero layers opened: they would hide what lies behind them."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def batch(shape=(3, 8, 8), n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)
    return x, torch.tensor([0, 10, 999, 4])[:n], torch.tensor([0, 4, 5, 2])[:n]


@pytest.mark.parametrize("style, last, sines", [("ddpm", 3, slice(0, 4)), ("adm", 4, slice(4, 8))])
def test_timestep_embedding_is_sines_and_cosines(style, last, sines):
    e = unet.timestep_embedding(torch.tensor([0, 7]), 8, style)
    frequencies = [10000 ** (-i / last) for i in range(4)]
    assert e[1, sines].tolist() == pytest.approx([math.sin(7 * f) for f in frequencies], abs=1e-6)
    cosines = e[1].tolist()[4:] if style == "ddpm" else e[1].tolist()[:4]
    assert cosines == pytest.approx([math.cos(7 * f) for f in frequencies], abs=1e-6)
    assert e[0, sines].tolist() == [0] * 4 and e[0].sum() == 4


def test_the_cifar10_configuration_has_the_35_7_million_parameters_of_the_paper():
    with torch.device("meta"):
        net = unet.UNet(
            (3, 32, 32),
            0,
            style="ddpm",
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(16,),
        )
    # The published checkpoint google/ddpm-cifar10-32 has exactly this many.
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert {m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


@each_style
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (2, 16, 8)])
def test_network_keeps_shape_starts_at_zero_and_reaches_every_parameter(shape, settings):
    net, (x, t, y) = build(shape, **settings), batch(shape, 4)
    out = net(x, t, y)
    channels = shape[0] * (1 + net.settings["learn_sigma"])
    assert out.shape == (4, channels, *shape[1:]) and (out == 0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # zero layers open one after the other
        optimizer.zero_grad()
        (net(x, t, y) - x.repeat(1, channels // shape[0], 1, 1)).square().mean().backward()
        optimizer.step()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@each_style
def test_channels_last_goes_through_the_whole_network(settings):
    net, seen = build(**settings), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 1:
            module.register_forward_hook(
                lambda m, i, o: seen.append(
                    i[0].is_contiguous(memory_format=torch.channels_last)
                    and o.is_contiguous(memory_format=torch.channels_last)
                )
            )
    net(*batch())
    assert len(seen) > 10 and all(seen)


@each_style
def test_no_activation_is_copied_on_the_way(settings):
    net, (x, t, y) = build(**settings), batch(n=2)
    with torch.no_grad(), Copies(size=2 * 32 * 4 * 4) as copies:  # the smallest activation
        net(x, t, y)
    assert not copies.found
    with Copies(size=1) as copies:
        x.contiguous()
    assert copies.found  # it would be seen


def joined(net, inputs):
    """Shapes that torch.cat made in a forward pass, but for the timestep's embedding."""

    class Joined(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op.overloadpacket is torch.ops.aten.cat and out.ndim == 4:
                shapes.append(tuple(out.shape[1:]))
            return out

    shapes = []
    with torch.no_grad(), Joined():
        net(*inputs)
    return shapes


@each_style
def test_every_output_on_the_way_down_is_joined_once_on_the_way_up(settings):
    net = build(**settings)
    assert joined(net, batch()) == [(64, 4, 4), (48, 4, 4), (48, 8, 8), (32, 8, 8)]


@pytest.mark.parametrize("width", [16, 32, 48, 128])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_every_residual_block_sees_the_timestep(width, scale_shift):
    """A group of one channel would normalise away the embedding added to that channel."""
    torch.manual_seed(0)
    block = unet.ResBlock(
        width, width, 8, groups=groups_for(width, [width]), use_scale_shift_norm=scale_shift
    )
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(1, width, 4, 4), torch.randn(2, 8)
    first, second = block(x.repeat(2, 1, 1, 1), emb)
    assert (first - second).std() > 0.05 * first.std()


@pytest.mark.parametrize(
    "width, groups", [(2, 1), (6, 1), (10, 2), (16, 4), (32, 8), (36, 9), (100, 25), (224, 32)]
)
def test_groups_are_a_quarter_of_width_or_the_next_divisor(width, groups):
    assert groups_for(width, [width, 2 * width]) == groups


def test_with_scale_shift_a_resized_block_is_that_of_the_paper():
    """ADM eq. 1 with 1 + scale, and both branches resized before the convolution, by hand."""
    torch.manual_seed(0)
    block = unet.ResBlock(4, 6, 8, groups=2, use_scale_shift_norm=True, resample=unet.halve)
    block = opened(block).double()
    x, emb = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 8).double()
    F, (n1, c1, n2, c2) = torch.nn.functional, (block.norm1, block.conv1, block.norm2, block.conv2)
    h = F.silu(F.group_norm(x, 2, n1.weight, n1.bias, 1e-6))
    h = F.conv2d(h.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), c1.weight, c1.bias, padding=1)
    scale, shift = block.emb(emb)[:, :6, None, None], block.emb(emb)[:, 6:, None, None]
    h = F.silu(F.group_norm(h, 2, n2.weight, n2.bias, 1e-6) * (1 + scale) + shift)
    skip = F.conv2d(x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), block.skip.weight)
    expected = F.conv2d(h, c2.weight, c2.bias, padding=1) + skip + block.skip.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(x, emb), expected, rtol=0, atol=1e-13)


@each_style
def test_no_label_is_the_label_num_classes(settings):
    net, (x, t, _) = opened(build(**settings)), batch()
    assert torch.equal(net(x, t), net(x, t, torch.full((3,), 5)))
    assert not torch.equal(net(x, t), net(x, t, torch.zeros(3, dtype=torch.long)))


def gradients(net, use_checkpoint):
    """(output, gradients, bytes kept for backward) of a training step with dropout."""
    net.use_checkpoint = use_checkpoint
    return training_step(net, batch())


@each_style
def test_checkpointing_keeps_less_and_gives_the_same_gradients(settings):
    net = opened(build(**{**settings, "dropout": 0.2, "num_res_blocks": 2}))
    out, grads, size = gradients(net, use_checkpoint=False)
    again, grads_again, smaller = gradients(net, use_checkpoint=True)
    assert torch.equal(out, again)
    for name in grads:
        torch.testing.assert_close(grads_again[name], grads[name], rtol=1e-6, atol=1e-6, msg=name)
    assert smaller < 0.5 * size


def test_the_network_compiles_as_one_graph():
    settings = dict(SMALL, attention_resolutions=(), use_scale_shift_norm=True, use_checkpoint=True)
    net = opened(build(**settings))
    whole, graphs = compiled(net)
    torch.testing.assert_close(whole(*batch()), net(*batch()), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm_groups=3), "--norm-groups 3 must divide"),
        (dict(norm_groups=16), "two or more"),
        (dict(num_heads=3), "--num-heads 3 must divide"),
        (dict(num_head_channels=5), "--num-head-channels 5 must divide"),
        (dict(model_channels=15), "--model-channels 15 must be even"),
        (dict(style="edm"), "--style 'edm' is not known"),
    ],
)
def test_settings_that_fit_no_network_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        build(**{**SMALL, **changes})
