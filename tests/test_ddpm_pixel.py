"""Chapter 1 against closed forms: schedules, forward process, network, ancestral sampling."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_pixel as ch1
from kernels import gaussian


def small(**changes):
    return ch1.Config(width=16, mult=(1, 2), attention=(4,), **changes)


def test_linear_schedule_is_that_of_the_paper():
    alpha_bar = ch1.make_alpha_bar("linear", 1000)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    expected = [math.exp(sum(math.log1p(-b) for b in betas[: t + 1])) for t in (0, 1, 500, 999)]
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar[[0, 1, 500, 999]].tolist() == pytest.approx(expected, rel=1e-12)
    assert alpha_bar[-1] == pytest.approx(4.036e-5, rel=1e-3)  # the figure of the public code


def test_cosine_schedule_follows_equation_17_until_beta_is_clipped():
    T = 400
    alpha_bar = ch1.make_alpha_bar("cosine", T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    for t in (0, 1, 100, 390):
        assert alpha_bar[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-10)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3)  # beta_T clipped to 0.999


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [50, 500, 1000, 2000])
def test_any_length_goes_from_image_to_noise(schedule, T):
    alpha_bar = ch1.make_alpha_bar(schedule, T)
    assert len(alpha_bar) == T and (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.99 - 5 / T and 0 < alpha_bar[-1] < 1e-3


def test_a_chain_of_another_length_keeps_the_noise_at_each_part_of_the_way():
    thousand = ch1.make_alpha_bar("linear", 1000)
    for T in (250, 500, 4000):
        other = ch1.make_alpha_bar("linear", T)
        for part in (0.25, 0.5, 0.75):
            here, there = other[int(part * T) - 1].item(), thousand[int(part * 1000) - 1].item()
            assert math.log(here) == pytest.approx(math.log(there), rel=0.03)


def test_the_marginals_are_those_of_the_chain_of_single_steps():
    """Mean and variance carried through x_t = sqrt(1-b) x_(t-1) + sqrt(b) z, eq. 2."""
    mean, variance = 1.0, 0.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        if t in (0, 300, 999):
            a = ch1.make_alpha_bar("linear", 1000)[t].item()
            assert (a**0.5, 1 - a) == pytest.approx((mean, variance), rel=1e-9)


def test_q_sample_has_the_mean_and_variance_of_equation_4():
    alpha_bar = ch1.make_alpha_bar("linear", 1000)
    x0 = torch.full((20000, 1, 1, 1), 0.5)
    for t in (0, 300, 999):
        ts = torch.full((20000,), t)
        eps = gaussian(x0.shape, torch.arange(20000), t, "cpu")
        x_t = ch1.q_sample(x0, ts, eps, alpha_bar)
        a = alpha_bar[t].item()
        assert x_t.mean().item() == pytest.approx(0.5 * a**0.5, abs=4 * ((1 - a) / 20000) ** 0.5)
        assert x_t.var().item() == pytest.approx(1 - a, rel=0.05)
        torch.testing.assert_close(x_t, a**0.5 * x0 + (1 - a) ** 0.5 * eps)


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (10, 1), (2, 2)])
def test_timestep_pairs_walk_down_to_the_image(T, steps):
    pairs = ch1.timestep_pairs(T, steps)
    assert len(pairs) == steps and pairs[0][0] == T - 1 and pairs[-1][1] == -1
    assert all(t > t_prev for t, t_prev in pairs)
    assert all(a[1] == b[0] for a, b in zip(pairs, pairs[1:], strict=False))


def test_timestep_embedding_is_sines_and_cosines():
    e = ch1.timestep_embedding(torch.tensor([0, 7]), 8)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    assert e[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert e[0].tolist() == [0] * 4 + [1] * 4


def test_the_cifar10_configuration_has_the_35_7_million_parameters_of_the_paper():
    cfg = ch1.Config(
        width=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, conditional=False
    )
    with torch.device("meta"):
        net = ch1.UNet((3, 32, 32), 0, cfg.width, cfg.mult, 2, cfg.attention, 1, 0.1)
    # The published checkpoint google/ddpm-cifar10-32 has exactly this many.
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (2, 16, 8)])
def test_network_keeps_shape_starts_at_zero_and_reaches_every_parameter(shape):
    torch.manual_seed(0)
    net = ch1.make_net(small(), shape, 5)
    x = torch.randn(4, *shape).to(memory_format=torch.channels_last)
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 4, 5, 2])
    assert net(x, t, y).shape == x.shape and (net(x, t, y) == 0).all()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # zero layers open one after the other
        optimizer.zero_grad()
        (net(x, t, y) - x).square().mean().backward()
        optimizer.step()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_channels_last_goes_through_the_whole_network():
    net, seen = ch1.make_net(small(), (3, 8, 8), 5), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 1:
            module.register_forward_hook(
                lambda m, i, o: seen.append(
                    i[0].is_contiguous(memory_format=torch.channels_last)
                    and o.is_contiguous(memory_format=torch.channels_last)
                )
            )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    net(x, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert len(seen) > 10 and all(seen)


class Copies(TorchDispatchMode):
    """Counts copies of at least `size` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        aten = torch.ops.aten
        copies = (aten.clone, aten.copy_, aten._to_copy, aten._reshape_copy)
        if op.overloadpacket in copies and out.numel() >= self.size:
            self.found.append((op, tuple(out.shape)))
        return out


def test_no_activation_is_copied_on_the_way():
    net = ch1.make_net(small(), (3, 8, 8), 5)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    with torch.no_grad(), Copies(size=2 * 32 * 4 * 4) as copies:  # the smallest activation
        net(x.to(memory_format=torch.channels_last), t, y)
    assert [shape for _, shape in copies.found] in ([], [(2, 3, 8, 8)])  # at most our own .to()
    with Copies(size=1) as copies:
        x.permute(0, 2, 3, 1).contiguous()
    assert copies.found  # it would be seen


def test_every_residual_block_sees_the_timestep():
    """A group of one channel would normalise away the embedding added to that channel."""
    torch.manual_seed(0)
    for width in (16, 32, 48, 128):
        block = ch1.ResBlock(width, width, 8, dropout=0.0)
        torch.nn.init.normal_(block.conv2.weight)
        x, emb = torch.randn(1, width, 4, 4), torch.randn(2, 8)
        first, second = block(x.repeat(2, 1, 1, 1), emb)
        assert (first - second).std() > 0.05 * first.std()


def test_no_label_is_the_label_num_classes():
    torch.manual_seed(0)
    net = ch1.make_net(small(), (1, 8, 8), 5)
    for p in net.parameters():  # open the layers that start at zero
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    assert torch.equal(net(x, t), net(x, t, torch.full((3,), 5)))
    assert not torch.equal(net(x, t), net(x, t, torch.zeros(3, dtype=torch.long)))


class Counted(torch.nn.Module):
    """eps_hat of data N(mean_y, s^2) in closed form; keeps the batch size of every call."""

    def __init__(self, alpha_bar, means, s):
        super().__init__()
        self.alpha_bar, self.means, self.s, self.calls = alpha_bar, means, s, []
        self.label = torch.nn.Embedding(len(means), 1)

    def forward(self, x, t, y=None):
        self.calls.append(len(x))
        y = torch.full_like(t, len(self.means) - 1) if y is None else y
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        mean = self.means[y].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x - a.sqrt() * mean) / (a * self.s**2 + 1 - a)).float()


def run(net, alpha_bar, pairs, n=4000, y=None, **options):
    for _, x, _ in ch1.sampler(  # noqa: B007
        net, alpha_bar, pairs, (1, 1, 1), torch.arange(n), y, **options
    ):
        pass
    return x


@pytest.mark.parametrize(
    "options", [{}, {"variance": "large"}, {"eta": 0.0}, {"eta": 1.0}], ids=str
)
def test_with_the_true_score_samples_have_the_mean_and_spread_of_the_data(options):
    alpha_bar = ch1.make_alpha_bar("cosine", 200)
    net = Counted(alpha_bar, torch.tensor([0.3, 0.0]).double(), 0.2)
    y = torch.zeros(4000, dtype=torch.long)
    x = run(net, alpha_bar, ch1.timestep_pairs(200, 200), y=y, **options)
    assert x.mean().item() == pytest.approx(0.3, abs=0.015)
    assert x.std().item() == pytest.approx(0.2, rel=0.06)


def test_guidance_costs_one_batch_and_means_what_it_says():
    alpha_bar = ch1.make_alpha_bar("cosine", 50)
    net = Counted(alpha_bar, torch.tensor([0.3, -0.3, 0.0]).double(), 0.1)
    pairs, y = ch1.timestep_pairs(50, 5), torch.zeros(8, dtype=torch.long)
    plain = run(net, alpha_bar, pairs, 8, y)
    assert net.calls == [8] * 5
    net.calls.clear()
    guided = run(net, alpha_bar, pairs, 8, y, guidance=1.0, eta=0.0)
    assert net.calls == [16] * 5
    assert (guided > run(net, alpha_bar, pairs, 8, y, eta=0.0)).all()  # further from "none"
    unconditional = run(net, alpha_bar, pairs, 8, y, guidance=-1.0)
    torch.testing.assert_close(unconditional, run(net, alpha_bar, pairs, 8))
    assert not torch.equal(plain, unconditional)


def test_a_sample_does_not_depend_on_its_batch():
    alpha_bar = ch1.make_alpha_bar("linear", 100)
    net = Counted(alpha_bar, torch.tensor([0.3, 0.0]).double(), 0.1)
    pairs = ch1.timestep_pairs(100, 10)
    many = run(net, alpha_bar, pairs, 64)
    for _, x, _ in ch1.sampler(  # noqa: B007
        net, alpha_bar, pairs, (1, 1, 1), torch.tensor([17])
    ):
        pass
    torch.testing.assert_close(x[0], many[17], rtol=0, atol=1e-6)
    assert len(many.unique()) == 64
