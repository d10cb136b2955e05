"""The classifier of noisy images by itself: its pool, its gradients, and what it keeps for them.

test_published_classifier.py compares the whole of it with OpenAI's.
"""

from runtime.commandline import BadInput

import pytest
import torch
from training_step import compiled, training_step

from networks import adm_unet
from networks.noisy_classifier import AttentionPool, NoisyClassifier

SMALL = dict(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(4,),
    num_head_channels=8,
)


def build(shape=(3, 8, 8), classes=5, **changes):
    """A classifier, its zero layers opened: they would hide what lies behind them."""
    torch.manual_seed(0)
    net = NoisyClassifier(shape, classes, **{**SMALL, **changes})
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.to(memory_format=torch.channels_last)


def batch(shape=(3, 8, 8), n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last), torch.tensor([0, 10, 999])[:n]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (2, 16, 8)])
@pytest.mark.parametrize("plain", [False, True])
def test_logits_reach_every_parameter_of_any_image(shape, plain):
    changes = dict(use_scale_shift_norm=False, resblock_updown=False) if plain else {}
    net, (x, t) = build(shape, **changes), batch(shape)
    out = net(x, t)
    assert out.shape == (3, 5) and net.null == 5
    torch.nn.functional.cross_entropy(out, torch.tensor([0, 4, 2])).backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    other = net(x, t.roll(1))
    assert (other - out).abs().min() > 0  # it sees how noisy the image is


def test_settings_build_the_network_again():
    net = build()
    again = NoisyClassifier((3, 8, 8), 5, **net.settings)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*batch()), net(*batch()))
    assert net.settings["norm_groups"] == 4 and "use_checkpoint" not in net.settings


def test_the_way_down_is_that_of_the_unet():
    """Weights of the U-Net's own down half and middle, and what it computes up to there."""
    net = build()
    settings = dict(SMALL, use_scale_shift_norm=True, resblock_updown=True)
    unet = adm_unet.UNet((3, 8, 8), 0, **settings)
    parts = ("time", "conv_in", "down", "middle")
    of_net = {k: v for k, v in net.state_dict().items() if k.split(".")[0] in parts}
    left = unet.load_state_dict(of_net, strict=False)
    assert not left.unexpected_keys
    assert {key.split(".")[0] for key in left.missing_keys} == {"up", "norm_out", "conv_out"}
    seen = []
    for part in (net.middle, unet.middle):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(*batch())
    unet(*batch())
    assert torch.equal(*seen)


@pytest.mark.parametrize("height, width, heads", [(1, 1, 1), (2, 3, 4), (4, 4, 2)])
def test_pooling_is_attention_of_the_mean_to_all(height, width, heads):
    """All tokens' attention in float64, by the formula; only the first of them is asked."""
    torch.manual_seed(0)
    pool = AttentionPool(16, height, width, heads, 7).double()
    x = torch.randn(3, 16, height, width, dtype=torch.float64, requires_grad=True)
    tokens = torch.stack([x.mean((2, 3)), *x.flatten(2).unbind(2)], 2) + pool.position
    qkv = pool.qkv.weight @ tokens + pool.qkv.bias[:, None]  # (3,48,1+HW)
    q, k, v = (part.view(3, heads, 16 // heads, -1) for part in qkv.split(16, dim=1))
    weight = (torch.einsum("bndi,bndj->bnij", q, k) / (16 // heads) ** 0.5).softmax(-1)
    mixed = torch.einsum("bnij,bndj->bndi", weight, v).reshape(3, 16, -1)
    expected = mixed[:, :, 0] @ pool.proj.weight.T + pool.proj.bias
    out = pool(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    inputs = [x, *pool.parameters()]
    weights = torch.randn(out.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((o * weights).sum(), inputs) for o in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_frozen_it_still_has_a_gradient_of_the_image():
    net, (x, t) = build().eval(), batch()
    y = torch.tensor([0, 4, 2])

    def gradient():
        image = x.clone().requires_grad_()
        chosen = net(image, t).log_softmax(1)[range(3), y].sum()
        return torch.autograd.grad(chosen, image)[0]

    free = gradient()
    net.requires_grad_(False)
    torch.testing.assert_close(gradient(), free, rtol=1e-5, atol=1e-7)
    assert (free.flatten(1).norm(dim=1) > 0).all() and not net(x, t).requires_grad


def test_the_gradient_of_the_image_is_the_slope():
    """Central differences in float64, along one direction for each image."""
    net, (x, t) = build().double().eval().requires_grad_(False), batch()
    image, y = x.double().requires_grad_(), torch.tensor([0, 4, 2])

    def log_prob(image):
        return net(image, t).log_softmax(1)[range(3), y]

    (gradient,) = torch.autograd.grad(log_prob(image).sum(), image)
    direction = torch.randn_like(image)
    step = 1e-5 * direction
    slope = (log_prob(image + step) - log_prob(image - step)) / 2e-5
    torch.testing.assert_close(
        (gradient * direction).sum((1, 2, 3)), slope.detach(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("train", [True, False])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(train):
    """Also in eval mode with frozen weights, where only the image has a gradient."""
    found = []
    for use_checkpoint in (False, True):
        net, (x, t) = build(dropout=0.2, use_checkpoint=use_checkpoint), batch()
        net.requires_grad_(train)
        x.requires_grad_()
        out, grads, size = training_step(net, (x, t), train=train)
        assert set(grads) == ({name for name, _ in net.named_parameters()} if train else set())
        found.append((out, {"x": x.grad, **grads}, size))
    (out, grads, size), (again, grads_again, smaller) = found
    assert torch.equal(out, again)
    for name in grads:
        torch.testing.assert_close(grads_again[name], grads[name], rtol=1e-6, atol=1e-6, msg=name)
    assert smaller < 0.5 * size


def test_logits_have_the_dtype_of_the_image_under_autocast():
    net, (x, t) = build(), batch()
    expected = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t)
    assert out.dtype == torch.float32 and net.double()(x.double(), t).dtype == torch.float64
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_network_compiles_as_one_graph():
    net = build(attention_resolutions=(), num_res_blocks=1, use_checkpoint=True)
    whole, graphs = compiled(net)
    torch.testing.assert_close(whole(*batch()), net(*batch()), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm_groups=3), "--norm-groups 3 must divide"),
        (dict(num_head_channels=5), "--num-head-channels 5 must divide"),
        (dict(num_head_channels=0, num_heads=3), "--num-heads 3 must divide"),
        (dict(model_channels=15), "--model-channels 15 must be even"),
        (dict(channel_mult=(1, 1, 1, 1, 1)), "8x8 cannot be halved 4 times"),
    ],
)
def test_settings_that_fit_no_network_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        build(**changes)
