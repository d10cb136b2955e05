"""The diffusion transformer: equal to two other forms of it, and how it starts and learns."""

from runtime.commandline import BadInput

import math

import pytest
import torch
from reference_dit import SHAPE, SMALL, batch, bench_dit, by_definition, opened, relative

import dit


@pytest.fixture(scope="module")
def speed():
    return bench_dit()


# ----------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "shape, settings",
    [
        ((4, 8, 8), {}),
        ((3, 4, 12), dict(learned_variance=True)),
        ((4, 16, 8), dict(patch=4, heads=4, depth=1)),
        ((1, 3, 5), dict(patch=1, mlp_ratio=2.5)),
        ((32, 6, 4), dict(width=24, heads=1)),
    ],
)
def test_forward_is_the_published_one_from_the_weights_names_alone(shape, settings):
    """Non-square latents, all patches; float32 differs by the sums of some hundred numbers."""
    net, (z, t, y) = opened(shape, **settings), batch(shape)
    expected = by_definition(
        net.state_dict(), net.settings["heads"], z, t, y, net.settings["patch"]
    )
    with torch.no_grad():
        found = net(z, t, y)
        assert found.shape == expected.shape and relative(found, expected) < 1e-6
        # In float64 what is left are the timestep's angles, which are always float32.
        small = torch.tensor([0, 1, 2, 3])
        exact = by_definition(
            net.state_dict(), net.settings["heads"], z, small, y, net.settings["patch"]
        )
        assert relative(net.double()(z.double(), small, y), exact) < 1e-9


@pytest.mark.parametrize(
    "shape, settings",
    [
        ((4, 8, 8), {}),
        ((4, 16, 16), dict(patch=4, heads=4, learned_variance=True)),
        ((3, 6, 6), dict(patch=1, width=48, heads=3, depth=3)),
    ],
)
def test_forward_equals_diffusers_with_the_same_weights(speed, shape, settings):
    net, (z, t, y) = opened(shape, **settings), batch(shape)
    theirs = speed.twin(net)
    with torch.no_grad():
        expected = theirs(z, t, y).sample
        assert expected.std() > 0.1  # and says something
        assert relative(net(z, t, y), expected) < 1e-5
        net, theirs = net.double(), theirs.double()
        exact = theirs(z.double(), t, y).sample
        assert relative(net(z.double(), t, y), exact) < 1e-14  # angles of t are float32 in both


def test_tokens_of_a_small_batch_are_those_of_a_large_one():
    """Below 16 images an image's tokens are cut up for the convolution, if 8 divides them."""
    for shape in ((4, 8, 8), (4, 6, 10)):
        net = opened(shape)
        z, t, y = (torch.cat([part] * 5) for part in batch(shape))
        with torch.no_grad():
            assert relative(net(z[:3], t[:3], y[:3]), net(z, t, y)[:3]) < 2e-6


def test_a_linear_layer_of_tokens_is_that_layer_with_its_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 20).double()
    for b, n in ((2, 16), (3, 5), (17, 8)):
        x = torch.randn(b, n, 12, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(b, n, 20, dtype=torch.float64)
        wanted = [x, layer.weight, layer.bias]
        found = torch.autograd.grad(dit.linear(layer, x), wanted, dy)
        expected = torch.autograd.grad(layer(x), wanted, dy)
        torch.testing.assert_close(dit.linear(layer, x), layer(x), rtol=0, atol=1e-14)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


def test_positions_are_sines_and_cosines_of_the_column_and_then_of_the_row():
    found = dit.positions(16, 3, 5)
    assert found.shape == (1, 15, 16) and found.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            e = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 4) for i in range(4)]
                e += [*map(math.sin, angles), *map(math.cos, angles)]
            assert found[0, 5 * row + column].tolist() == pytest.approx(e, abs=6e-8)


def test_timesteps_are_cosines_and_then_sines():
    e = dit.timestep_embedding(torch.tensor([0, 7]), dit.FREQUENCIES, "adm")
    angles = [7 * 10000 ** (-i / 128) for i in range(128)]
    assert e.shape == (2, 256) and e[0].tolist() == [1] * 128 + [0] * 128
    assert e[1, :128].tolist() == pytest.approx(list(map(math.cos, angles)), abs=2e-6)
    assert e[1, 128:].tolist() == pytest.approx(list(map(math.sin, angles)), abs=2e-6)


# ------------------------------------------------------------------------------- how it starts


@pytest.mark.parametrize(
    "name, count", [("dit-s/2", 32_963_360), ("dit-b/4", 130_475_648), ("DiT-XL/2", 675_129_632)]
)
def test_published_sizes_have_the_published_numbers_of_weights(name, count):
    """Table 4 rounds them to 33, 130 and 675 million; positions are counted, as in the files."""
    with torch.device("meta"):
        net = dit.DiT((4, 32, 32), 1000, learned_variance=True, **dit.parse_size(name))
    assert sum(value.numel() for value in net.state_dict().values()) == count
    trained = sum(p.numel() for p in net.parameters())
    assert trained == count - net.pos_embed.numel()


@pytest.mark.parametrize("learned", [False, True])
def test_output_starts_at_zero_and_every_block_as_the_identity(learned):
    torch.manual_seed(0)
    net, (z, t, y) = dit.DiT(SHAPE, 5, learned_variance=learned, **SMALL), batch()
    out = net(z, t, y)
    assert out.shape == (4, 8 if learned else 4, 8, 8) and not out.any()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert all(torch.equal(block(x, c), x) for block in net.blocks)


def test_weights_are_drawn_from_the_published_distributions():
    torch.manual_seed(0)
    net = dit.DiT((4, 8, 8), 300, width=256, depth=1, heads=4)
    for layer, fan in (
        (net.x_embedder.proj, 4 * 2 * 2 + 256),
        (net.blocks[0].attn.qkv, 256 + 768),
        (net.blocks[0].mlp.fc2, 1024 + 256),
    ):
        bound = math.sqrt(6 / fan)  # Glorot, Bengio 2010, eq. 16
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for layer in (*net.t_embedder.mlp[::2], net.y_embedder.embedding_table):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    assert len(biases) == 10 and not any(p.any() for p in biases)


def test_gradients_reach_every_parameter_once_the_zeros_are_open():
    torch.manual_seed(0)
    net, (z, t, y) = dit.DiT(SHAPE, 5, **SMALL), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # the last layer opens first, then the gates, then what lies behind them
        optimizer.zero_grad()
        (net(z, t, y) - z).square().mean().backward()
        optimizer.step()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_no_label_is_the_label_num_classes():
    net, (z, t, _) = opened(), batch()
    with torch.no_grad():
        assert net.null == 5
        assert torch.equal(net(z, t), net(z, t, torch.full((4,), 5)))
        assert relative(net(z, t), net(z, t, torch.zeros(4, dtype=torch.long))) > 1e-2
        alone = opened(classes=0)
        assert torch.equal(alone(z, t), alone(z, t, torch.zeros(4, dtype=torch.long)))


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    def step(checkpointing):
        net, kept = opened(depth=4, checkpointing=checkpointing).train(), {}
        mine = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(*batch())
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        return out, gradients, sum(n for place, n in kept.items() if place not in mine)

    (out, whole, much), (again, parts, little) = step(False), step(True)
    assert torch.equal(out, again) and little < much / 4
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_under_autocast_the_sum_over_blocks_stays_in_float32():
    net, inputs, seen = opened(), batch(), []
    net.blocks[1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.no_grad():
        expected = net(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(*inputs)
    assert seen == [torch.float32] * 2 and found.dtype == torch.bfloat16
    assert 0 < relative(found.float(), expected) < 0.03  # bf16 has 8 bits


def test_under_autocast_one_plus_a_small_scale_is_not_one():
    """bf16 has no number between 1 and 1.0078; a scale of 1e-3 must not be lost."""
    block, x, seen = opened().blocks[0], torch.randn(2, 16, 32), []
    torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
    scales = torch.zeros(6, 32).index_fill_(0, torch.tensor([1, 4]), 1e-3)
    block.adaLN_modulation[1].bias.data.copy_(scales.flatten())
    for part in (block.attn, block.mlp):
        part.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        block(x, torch.zeros(2, 32))
    expected = 1.001 * torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    for found in seen:  # 1e-3 itself has bf16's 8 bits
        torch.testing.assert_close(found, expected, rtol=4e-6, atol=1e-6)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["dit", "dit-m/2", "dit-s/3", "dit-s2", "unet", "dit-s/"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(BadInput, match=r"type dit-SIZE/PATCH .* s, b, l, xl .* such as dit-s/2"):
        dit.parse_size(name)


def test_latents_that_cannot_be_cut_are_refused_with_patches_that_can():
    with pytest.raises(BadInput, match=r"6x10 cannot be cut .* 4x4: .* patch of 1 or 2, .* of 4"):
        dit.DiT((4, 6, 10), 5, **SMALL, patch=4)
    with pytest.raises(BadInput, match=r"7x8 .* patch of 1, or"):
        dit.DiT((4, 7, 8), 5, **SMALL)


@pytest.mark.parametrize("wrong", [dict(width=30), dict(heads=3), dict(depth=0)])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(BadInput, match="cannot be built: the width must be"):
        dit.DiT(SHAPE, 5, **{**SMALL, **wrong})
