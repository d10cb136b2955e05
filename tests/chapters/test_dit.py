"""The diffusion transformer: equal to two other forms of it, and how it starts and learns."""

from runtime.commandline import BadInput

import math

import pytest
import torch
from reference_dit import SHAPE, SMALL, batch, by_definition, opened, relative
from training_step import training_step

import ddpm_pixel
import dit
import improved_ddpm
import ldm_cfg
from kernels import gaussian
from networks.adm_unet import timestep_embedding
from tests.cases.dit_of_diffusers import twin

# ----------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "shape, settings",
    [
        ((4, 8, 8), {}),
        ((3, 4, 12), dict(learn_sigma=True)),
        ((4, 16, 8), dict(patch_size=4, num_heads=4, depth=1)),
        ((1, 3, 5), dict(patch_size=1, mlp_ratio=2.5)),
        ((32, 6, 4), dict(hidden_size=24, num_heads=1)),
    ],
)
def test_forward_is_the_published_one_from_the_weights_names_alone(shape, settings):
    """Non-square latents, all patches; float32 differs by the sums of some hundred numbers."""
    net, (z, t, y) = opened(shape, **settings), batch(shape)
    expected = by_definition(
        net.state_dict(), net.settings["num_heads"], z, t, y, net.settings["patch_size"]
    )
    with torch.no_grad():
        found = net(z, t, y)
        assert found.shape == expected.shape and relative(found, expected) < 1e-6
        # In float64 what is left are the timestep's angles, which are always float32.
        small = torch.tensor([0, 1, 2, 3])
        exact = by_definition(
            net.state_dict(), net.settings["num_heads"], z, small, y, net.settings["patch_size"]
        )
        assert relative(net.double()(z.double(), small, y), exact) < 1e-9


@pytest.mark.parametrize(
    "shape, settings",
    [
        ((4, 8, 8), {}),
        ((4, 16, 16), dict(patch_size=4, num_heads=4, learn_sigma=True)),
        ((3, 6, 6), dict(patch_size=1, hidden_size=48, num_heads=3, depth=3)),
    ],
)
def test_forward_equals_diffusers_with_the_same_weights(shape, settings):
    net, (z, t, y) = opened(shape, **settings), batch(shape)
    theirs = twin(net)
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
    e = timestep_embedding(torch.tensor([0, 7]), dit.FREQUENCIES, "adm")
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
        net = dit.DiT((4, 32, 32), 1000, learn_sigma=True, **dit.parse_size(name))
    assert sum(value.numel() for value in net.state_dict().values()) == count
    trained = sum(p.numel() for p in net.parameters())
    assert trained == count - net.pos_embed.numel()


@pytest.mark.parametrize("learned", [False, True])
def test_output_starts_at_zero_and_every_block_as_the_identity(learned):
    torch.manual_seed(0)
    net, (z, t, y) = dit.DiT(SHAPE, 5, learn_sigma=learned, **SMALL), batch()
    out = net(z, t, y)
    assert out.shape == (4, 8 if learned else 4, 8, 8) and not out.any()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert all(torch.equal(block(x, c), x) for block in net.blocks)


def test_weights_are_drawn_from_the_published_distributions():
    torch.manual_seed(0)
    net = dit.DiT((4, 8, 8), 300, hidden_size=256, depth=1, num_heads=4)
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


def test_computing_activations_twice_gives_the_same_gradients_and_keeps_less():
    def step(use_checkpoint):
        return training_step(opened(depth=4, use_checkpoint=use_checkpoint), batch())

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


# ------------------------------------------------------------------------------ loss and sampler


def test_a_learned_variance_is_weighed_by_a_thousandth_of_the_bound():
    alpha_bar = ldm_cfg.alpha_bar_of(dit.Config(schedule="linear", timesteps=100))
    chain = improved_ddpm.make_chain(alpha_bar)
    z0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 20, 60, 99])
    out = torch.randn(4, 4, 3, 3, requires_grad=True)
    a = alpha_bar[t].view(-1, 1, 1, 1)

    def loss(prediction, channels=4):
        told = out[:, :channels]
        return dit.hybrid_loss(lambda *_: told, z0, t, eps, chain, None, prediction)

    for prediction in ("eps", "v"):
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
        bound = 100 * improved_ddpm.vlb_terms(
            out,
            z0,
            z_t,
            t,
            chain,
            prediction=prediction,
            variance="learned",
            clip=False,
            discrete=False,
        )
        simple = ldm_cfg.simple_loss(lambda *_: out[:, :2], z0, t, eps, alpha_bar, None, prediction)
        assert torch.equal(loss(prediction, 2), simple)  # chapter 3's, where none is learned
        expected = simple + 0.001 * bound.float()
        torch.testing.assert_close(loss(prediction), expected, rtol=1e-4, atol=1e-5)
        (plain,) = torch.autograd.grad(simple.sum(), out)
        (both,) = torch.autograd.grad(loss(prediction).sum(), out)
        torch.testing.assert_close(both[:, :2], plain[:, :2])  # the mean is left to L_simple
        assert not plain[:, 2:].any() and (both[:, 2:] != 0).all()


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_ancestral_steps_have_the_variance_that_the_network_tells(v):
    """One step from given noise: the spread over seeds is between beta_tilde and beta."""
    how = {"schedule": "linear", "timesteps": 100, "prediction": "eps", "learn_sigma": True}
    cfg = dit.Config(**how, sampler="ddpm", sample_steps=3, guidance=2.0)
    (t, t_prev), *_ = ddpm_pixel.timestep_pairs(100, 3)
    assert (t, t_prev) == (99, 50)
    alpha_bar = ldm_cfg.alpha_bar_of(cfg)
    a, before = alpha_bar[t], alpha_bar[t_prev]
    beta = 1 - a / before
    small = beta * (1 - before) / (1 - a)
    std = (0.5 * ((v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log())).exp().item()

    def net(z, t, y):
        return torch.cat([z / (1 - a).sqrt().item(), torch.full_like(z, v)], 1)  # z0_hat 0

    net.null, seeds = 0, torch.arange(20000)
    walk = ldm_cfg.sample(net, cfg, (1, 1, 1), seeds, 0 * seeds, make_rows=dit.rows_of)
    z = next(walk)[0] - (a / before).sqrt() * (1 - before) / (1 - a) * gaussian(
        (20000, 1, 1, 1), seeds, -1, "cpu"
    )
    assert z.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ddpm"])
def test_other_samplers_take_the_steps_of_chapter_3(sampler):
    """Only ancestral steps have a variance to learn; where none was, that of chapter 3 is small."""
    cfg = dit.Config(sampler=sampler, timesteps=50, learn_sigma=sampler != "ddpm")
    alpha_bar, pairs = ldm_cfg.alpha_bar_of(cfg), ddpm_pixel.timestep_pairs(50, 4)
    assert dit.rows_of(cfg, alpha_bar, pairs) == ldm_cfg.rows_of(cfg, alpha_bar, pairs)


def test_settings_make_the_network_that_its_name_says():
    cfg = dit.Config(model="dit-xs/2", learn_sigma=True)
    net = dit.make_net(cfg, (2, 4, 6), 3)
    sizes = dict(hidden_size=128, depth=4, num_heads=4, patch_size=2, mlp_ratio=4, learn_sigma=True)
    assert net.settings == sizes and not net.use_checkpoint
    again = dit.DiT((2, 4, 6), 3, **net.settings)
    again.load_state_dict(net.state_dict())
    z, t = torch.randn(2, 2, 4, 6), torch.tensor([0, 999])
    for p in net.parameters():  # open the layers that start at zero
        torch.nn.init.normal_(p, std=0.1)
    assert net(z, t).shape == (2, 4, 4, 6)
    assert torch.equal(net(z, t), net(z, t, torch.tensor([3, 3])))
    assert not torch.equal(net(z, t), net(z, t, torch.tensor([0, 1])))


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", ["dit", "dit-m/2", "dit-s/3", "dit-s2", "unet", "dit-s/"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(BadInput, match=r"type dit-SIZE/PATCH .* s, b, l, xl .* such as dit-s/2"):
        dit.parse_size(name)


def test_latents_that_cannot_be_cut_are_refused_with_patches_that_can():
    with pytest.raises(BadInput, match=r"6x10 cannot be cut .* 4x4: .* patch of 1 or 2, .* of 4"):
        dit.DiT((4, 6, 10), 5, **SMALL, patch_size=4)
    with pytest.raises(BadInput, match=r"7x8 .* patch of 1, or"):
        dit.DiT((4, 7, 8), 5, **SMALL)


@pytest.mark.parametrize("wrong", [dict(hidden_size=30), dict(num_heads=3), dict(depth=0)])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(BadInput, match="cannot be built: the width must be"):
        dit.DiT(SHAPE, 5, **{**SMALL, **wrong})
