"""The latent U-Net by itself: what reaches what, any sides, labels and contexts, bad settings."""

from runtime.commandline import BadInput

import math

import pytest
import torch
from recording import Copies

from networks.sd_unet import (
    CrossAttention,
    FeedForward,
    LatentUNet,
    SelfAttention,
    timestep_embedding,
)

SMALL = dict(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=4,
    context_dim=12,
)


def build(classes=5, **changes):
    torch.manual_seed(0)
    return LatentUNet(3, classes, **SMALL | changes).to(memory_format=torch.channels_last)


def opened(net):
    """The network with its zero layers opened: they would hide what lies behind them."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def batch(sides=(8, 8), n=3):
    z = torch.randn(n, 3, *sides, generator=torch.Generator().manual_seed(1))
    z = z.to(memory_format=torch.channels_last)
    return z, torch.tensor([0, 10, 999, 4])[:n], torch.tensor([0, 4, 5, 2])[:n]


def text(n=3, tokens=4, width=12):
    return torch.randn(n, tokens, width, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------- parts


def test_timestep_embedding_is_cosines_and_sines():
    e = timestep_embedding(torch.tensor([0, 7]), 8, "adm")
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    expected = [f(7 * w) for f in (math.cos, math.sin) for w in frequencies]
    assert e[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert e[0].tolist() == [1] * 4 + [0] * 4


def heads_of(weight, x, heads):
    """(B,N,C_in) -> a list of (B,N,C/heads), one for each head, whose channels are neighbours."""
    return (x @ weight.T).chunk(heads, dim=-1)


def by_hand(q, k, v, part):
    """Softmax attention, a head at a time, and the projection of the joined heads."""
    out = []
    for q_i, k_i, v_i in zip(q, k, v, strict=True):
        score = (q_i @ k_i.transpose(1, 2) / math.sqrt(q_i.shape[-1])).exp()
        out.append(score / score.sum(2, keepdim=True) @ v_i)
    return torch.cat(out, dim=2) @ part.proj.weight.T + part.proj.bias


def test_self_and_cross_attention_are_softmax_attention_of_every_head():
    torch.manual_seed(0)
    x, y = torch.randn(2, 7, 8).double(), torch.randn(2, 3, 5).double()
    part = SelfAttention(8, 2).double()
    q, k, v = (heads_of(w, x, 2) for w in part.qkv.weight.chunk(3))
    torch.testing.assert_close(part(x), by_hand(q, k, v, part), rtol=0, atol=1e-12)
    part = CrossAttention(8, 2, 5).double()
    q, (k, v) = heads_of(part.q.weight, x, 2), (heads_of(w, y, 2) for w in part.kv.weight.chunk(2))
    torch.testing.assert_close(part(x, y), by_hand(q, k, v, part), rtol=0, atol=1e-12)


def test_one_token_of_context_adds_the_same_vector_everywhere():
    torch.manual_seed(0)
    part, x, token = CrossAttention(8, 2, 5), torch.randn(2, 7, 8), torch.randn(2, 1, 5)
    value = token @ part.kv.weight[8:].T
    expected = (value @ part.proj.weight.T + part.proj.bias).expand(2, 7, 8)
    torch.testing.assert_close(part(x, token), expected, rtol=0, atol=1e-6)


def test_feed_forward_is_gated_by_an_exact_gelu():
    torch.manual_seed(0)
    part, x = FeedForward(6).double(), torch.randn(2, 5, 6).double()
    a, b = (x @ part.widen.weight.T + part.widen.bias).split(24, dim=-1)
    hidden = a * b * (1 + torch.erf(b / math.sqrt(2))) / 2
    expected = hidden @ part.narrow.weight.T + part.narrow.bias
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------- whole network


@pytest.mark.parametrize("sides", [(8, 8), (7, 7), (5, 12), (1, 3)])
@pytest.mark.parametrize("attention", [(), (0, 1)])
def test_network_keeps_any_sides_and_starts_at_zero(sides, attention):
    z, t, y = batch(sides)
    net = build(attention_levels=attention, channel_mult=(1, 2, 2))
    assert net(z, t, y).shape == z.shape and (net(z, t, y) == 0).all()
    assert opened(net)(z, t, y).shape == z.shape


def test_a_learned_variance_doubles_the_output_and_leaves_the_first_half_as_it_was():
    z, t, y = batch((5, 6))
    plain, learned = opened(build()), build(learn_sigma=True)
    assert learned(z, t, y).shape == (3, 6, 5, 6) and not learned(z, t, y).any()
    state, last = plain.state_dict(), opened(learned).conv_out
    for name in ("weight", "bias"):
        v = getattr(last, name)[3:]
        state[f"conv_out.{name}"] = torch.cat([state[f"conv_out.{name}"], v])
    learned.load_state_dict(state)
    mean, v = learned(z, t, y).chunk(2, dim=1)
    torch.testing.assert_close(mean, plain(z, t, y), rtol=0, atol=1e-5)
    assert (v - mean).std() > 0.1 * mean.std()
    only_v = torch.autograd.grad(v.sum(), last.parameters())
    assert all(not g[:3].any() and g[3:].any() for g in only_v)


def silent(net, z, t, **told):
    """The parameters that three steps of descent leave without any gradient to speak of."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # zero layers open one after the other
        optimizer.zero_grad()
        (net(z, t, **told) - z).square().mean().backward()
        optimizer.step()
    tell = [(name, p.grad) for name, p in net.named_parameters()]
    return {name for name, grad in tell if grad is None or grad.abs().max() < 1e-12}


def test_gradients_reach_every_parameter_through_a_text():
    z, t, _ = batch(n=4)
    assert not silent(build(classes=None, transformer_depth=2), z, t, context=text(4))


def test_gradients_reach_all_but_the_weights_that_one_class_token_cannot_use():
    """A softmax over one token is 1: queries, and the norm before them, have nothing to say."""
    z, t, y = batch(n=4)
    net = build(add_label=True)
    found = silent(net, z, t, y=y)
    no_use = ("norm2.weight", "norm2.bias", "cross_attention.q.weight")
    expected = {n for n, _ in net.named_parameters() if ".blocks." in n and n.endswith(no_use)}
    assert len(expected) == 3 * 4 and found <= expected
    label = net.label.weight.grad.abs().sum(1)
    assert (label[[0, 4, 5, 2]] > 0).all() and (label[[1, 3]] == 0).all()


def test_no_label_is_the_last_class_and_none():
    net, (z, t, y) = opened(build()), batch()
    assert net.null == 5
    null = net(z, t, torch.full_like(y, 5))
    assert torch.equal(net(z, t), null)
    assert (net(z, t, y) - null)[:2].abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(net(z, t, y)[2], null[2])  # its label is 5
    only_null = opened(build(classes=0))  # data without classes
    assert torch.equal(only_null(z, t), only_null(z, t, torch.zeros_like(y)))


def test_a_context_is_seen_instead_of_the_label():
    net, (z, t, y) = opened(build()), batch()
    token = net.label(y)[:, None]
    assert torch.equal(net(z, t, context=token), net(z, t, y))
    assert torch.equal(net(z, t, y, context=text()), net(z, t, context=text()))
    # The order of tokens is the encoder's to tell; here they are a set.
    swapped, straight = net(z, t, context=text().flip(1)), net(z, t, context=text())
    assert (swapped - straight).abs().max() < 1e-5 * straight.std()
    assert (net(z, t, context=text()[:, :3]) - straight).abs().max() > 1e-3 * straight.std()
    with pytest.raises(ValueError, match="needs a context"):
        build(classes=None)(z, t)


def test_add_label_starts_without_effect_and_then_tells_every_residual_block():
    z, t, y = batch()
    plain, added = build(), build(add_label=True)
    added.load_state_dict(plain.state_dict(), strict=False)
    opened(plain)
    added.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(added(z, t, y), plain(z, t, y))
    torch.nn.init.normal_(added.label_emb.weight)
    seen = []
    added.down[0][0].register_forward_hook(lambda m, inputs, out: seen.append(out))
    for labels in (y, y.flip(0)):  # level 0 has no transformer
        added(z, t, labels)
    assert (seen[0] - seen[1])[0].abs().max() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other():
    net, (z, t, y) = opened(build(add_label=True)), batch((7, 6))
    together = net(z, t, y)
    alone = torch.cat([net(z[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5 * together.std()


def test_checkpointing_changes_no_gradient():
    z, t, y = batch((7, 7))
    plain, saving = (opened(build(use_checkpoint=c, add_label=True)) for c in (False, True))
    saving.load_state_dict(plain.state_dict())
    kept = []
    for net in (plain, saving):
        count = []
        keep, give = lambda x, count=count: count.append(0) or x, lambda x: x
        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            loss = net(z, t, y).square().mean()
        kept.append(len(count))
        loss.backward()
    assert kept[1] < kept[0] / 2  # it does keep less
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_autocast_computes_nearly_the_same_in_bfloat16():
    net, (z, t, y) = opened(build(attention_levels=(0, 1), add_label=True)), batch((7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(z, t, y)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    exact = net(z, t, y)
    assert 0 < (out - exact).std() < 0.03 * exact.std()  # bfloat16 has eight bits


def test_channels_last_goes_through_the_network_without_a_copy():
    net, (z, t, y) = opened(build(attention_levels=(0, 1))), batch(n=2)
    with torch.no_grad(), Copies(size=2 * 16 * 4 * 4) as copies:  # the smallest activation
        out = net(z, t, y)
    assert not copies.found and out.is_contiguous(memory_format=torch.channels_last)
    with Copies(size=1) as copies:
        z.contiguous()
    assert copies.found  # it would be seen


def test_settings_build_the_same_network_again():
    net = build(num_head_channels=8, transformer_depth=2, add_label=True, learn_sigma=True)
    again = LatentUNet(3, 5, **net.settings)
    again.load_state_dict(net.state_dict())
    assert again.settings == net.settings
    assert [m.heads for m in again.modules() if isinstance(m, SelfAttention)] == [4] * 8


@pytest.mark.parametrize("width, groups", [(6, 1), (16, 8), (48, 8), (320, 32)])
def test_norm_groups_are_at_most_32_and_of_two_channels_or_more(width, groups):
    with torch.device("meta"):
        net = LatentUNet(
            4,
            10,
            model_channels=width,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(),
            num_heads=2,
        )
    assert net.settings["norm_groups"] == groups
    norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {groups}


def test_ldms_network_for_imagenet_has_its_published_size():
    """400.92 million, as its training log says, and an embedding of 1001 rows of 512."""
    with torch.device("meta"):
        net = LatentUNet(
            3,
            1000,
            model_channels=192,
            channel_mult=(1, 2, 3, 5),
            num_res_blocks=2,
            attention_levels=(1, 2, 3),
            num_heads=1,
            context_dim=512,
        )
    assert sum(p.numel() for p in net.parameters()) == 400_920_579 + 1001 * 512


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(model_channels=15), "--model-channels 15 must be even"),
        (
            dict(attention_levels=(0, 2)),
            "attention at 0, 2 must be at levels of --channel-mult, counted from 0 to 1",
        ),
        (dict(attention_levels=(-1,)), "attention at -1 must be at levels"),
        (dict(num_heads=3), r"--num-heads 3 must divide the channels \[32\]"),
        (
            dict(num_heads=32, attention_levels=(0,)),
            r"--num-heads 32 must divide the channels \[16, 32\]",
        ),
        (dict(num_head_channels=5), r"--num-head-channels 5 must divide the channels \[32\]"),
        (dict(norm_groups=5), r"5 norm groups must divide the channels \[16, 32\]"),
    ],
)
def test_settings_that_make_no_network_are_refused(changes, word):
    with pytest.raises(BadInput, match=word):
        build(**changes)
