"""Chapter 2 against equation 12 written out, and against chapter 1."""

import pytest
import torch

import ddim
import ddpm_pixel as ch1
import runtime
from kernels import gaussian

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ch1.make_net(ch1.Config(width=16, mult=(1, 2), attention=(4,)), SHAPE, 3)
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    return net.eval()


def walk(sampler):
    return [(t_prev, x.clone(), x0_hat.clone()) for t_prev, x, x0_hat in sampler]


def test_subsequence_is_even_and_ends_at_the_image():
    assert ddim.subsequence(1000, 3) == [(999, 500), (500, 0), (0, -1)]
    assert ddim.subsequence(5, 5) == [(4, 3), (3, 2), (2, 1), (1, 0), (0, -1)]
    assert ddim.subsequence(1000, 1) == [(999, -1)]
    for steps in (0, 1001):
        with pytest.raises(runtime.BadInput, match="1 to 1000"):
            ddim.subsequence(1000, steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_is_equation_12(net, eta):
    alpha_bar = ch1.make_alpha_bar("linear", 100)
    pairs, seeds = ddim.subsequence(100, 6), torch.tensor([3, 9])
    y = torch.tensor([0, 2])
    x = gaussian((2, *SHAPE), seeds, -1, "cpu").double()
    steps = walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, y, eta=eta))
    for k, ((t, t_prev), (_, x_prev, x0_hat)) in enumerate(zip(pairs, steps, strict=True)):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else torch.tensor(1.0).double()
        with torch.no_grad():
            eps_hat = net(x.float(), torch.full((2,), t), y).double()
        guess = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)  # eq. 9
        eps_hat = (x - a.sqrt() * guess) / (1 - a).sqrt()
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()  # eq. 16
        z = gaussian((2, *SHAPE), seeds, k, "cpu").double()
        expected = a_prev.sqrt() * guess + (1 - a_prev - sigma**2).sqrt() * eps_hat + sigma * z
        torch.testing.assert_close(x0_hat.double(), guess, atol=1e-4, rtol=0)
        torch.testing.assert_close(x_prev.double(), expected, atol=1e-4, rtol=0)
        x = x_prev.double()


def test_eta_1_over_all_timesteps_is_the_ancestral_chain(net):
    alpha_bar, seeds = ch1.make_alpha_bar("linear", 20), torch.arange(3)
    pairs = ddim.subsequence(20, 20)
    ours = walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, eta=1.0))
    chapter1 = walk(ch1.sampler(net, alpha_bar, ch1.timestep_pairs(20, 20), SHAPE, seeds))
    for a, b in zip(ours, chapter1, strict=True):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=0)


def test_eta_0_starts_where_chapter_1_starts_and_ends_in_its_guess(net):
    alpha_bar, seeds = ch1.make_alpha_bar("cosine", 100), torch.tensor([17])
    way = walk(ddim.sampler(net, alpha_bar, ddim.subsequence(100, 5), SHAPE, seeds))
    again = walk(ddim.sampler(net, alpha_bar, ddim.subsequence(100, 5), SHAPE, seeds))
    assert torch.equal(way[-1][1], again[-1][1])
    assert way[-1][0] == -1
    torch.testing.assert_close(way[-1][1], way[-1][2])
