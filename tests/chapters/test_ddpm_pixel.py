"""Chapter 1 against closed forms: schedules, forward process, network, ancestral sampling."""

import pytest
import torch

import ddpm_pixel as ch1


def small(**changes):
    return ch1.Config(width=16, mult=(1, 2), attention=(4,), **changes)


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
