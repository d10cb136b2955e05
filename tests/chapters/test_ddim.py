"""Chapter 2 against equation 12 written out, against Gaussian data, and against chapter 1."""

from runtime.commandline import BadInput
from runtime.processes import World

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from gaussian_data import COV, MEAN, Gaussian, flow

import ddim
import ddpm_pixel as ch1
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
        with pytest.raises(BadInput, match="1 to 1000"):
            ddim.subsequence(1000, steps)


def test_subsequence_is_the_one_that_chapter_1_walks():
    for T in (*range(1, 41), 1000):
        for steps in range(1, min(T, 60) + 1):
            assert ddim.subsequence(T, steps) == ch1.timestep_pairs(T, steps)


def test_other_spacings_are_these_by_hand():
    def tau(T, steps, spacing):
        pairs = ddim.subsequence(T, steps, spacing)
        assert [t_prev for _, t_prev in pairs] == [*[t for t, _ in pairs[1:]], -1]
        return [t for t, _ in pairs]

    assert tau(1000, 4, "quadratic") == [999, 444, 111, 0]  # 999 / 9 = 111 times 0, 1, 4, 9
    assert tau(10, 7, "quadratic") == [9, 6, 4, 3, 2, 1, 0]  # i^2 / 4: 0.25 is moved up to 1
    assert tau(1000, 4, "leading") == [750, 500, 250, 0]
    assert tau(10, 3, "leading") == [6, 3, 0]
    assert tau(1000, 4, "trailing") == [999, 749, 499, 249]
    assert tau(10, 3, "trailing") == [9, 6, 2]  # 10, 6.67, 3.33 rounded, less 1
    assert [tau(100, 1, s) for s in ("quadratic", "leading", "trailing")] == [[99], [0], [99]]


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "leading", "trailing"])
def test_every_spacing_has_as_many_timesteps_as_asked_and_all_differ(spacing):
    for T in (*range(1, 30), 1000):
        for steps in {*range(1, min(T, 60) + 1), T}:
            ts = [t for t, _ in ddim.subsequence(T, steps, spacing)]
            assert len(ts) == steps and ts == sorted(set(ts), reverse=True)
            assert ts[-1] >= 0 and ts[0] < T


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


# ------------------------------------------------------------------------------ Gaussian data


def law(alpha_bar, pairs, step_of):
    """Mean and covariance with which the sampler must arrive, from its textbook step.

    step_of(a, a_prev) -> (weight of x0_hat, weight of x_t, variance of the fresh noise).
    """
    mean, cov, eye = torch.zeros(2).double(), torch.eye(2).double(), torch.eye(2).double()
    for t, t_prev in pairs:
        a = alpha_bar[t].item()
        a_prev = alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        K = a**0.5 * COV @ torch.linalg.inv(a * COV + (1 - a) * eye)  # of E[x0 | x_t], Bayes
        to_x0, to_x, variance = step_of(a, a_prev)
        M = to_x0 * K + to_x * eye
        mean = M @ mean + to_x0 * (MEAN - a**0.5 * K @ MEAN)
        cov = M @ cov @ M.T + variance * eye
    return mean, cov


def ancestral(a, a_prev):
    """q(x_prev | x_t, x0) as a product of two Gaussians: their precisions add."""
    if a_prev == 1:
        return 1.0, 0.0, 0.0
    kept = a / a_prev
    precision = 1 / (1 - a_prev) + kept / (1 - kept)
    return a_prev**0.5 / (1 - a_prev) / precision, kept**0.5 / (1 - kept) / precision, 1 / precision


def implicit(eta):
    def step(a, a_prev):
        """Equation 12, the noise eliminated by equation 9."""
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        direction = (1 - a_prev - sigma**2) ** 0.5 / (1 - a) ** 0.5
        return a_prev**0.5 - direction * a**0.5, direction, sigma**2

    return step


@pytest.mark.parametrize("steps", [150, 20])
@pytest.mark.parametrize(
    "walker, step_of",
    [
        (ch1.sampler, ancestral),
        (lambda *args: ddim.sampler(*args, eta=0.0), implicit(0.0)),
        (lambda *args: ddim.sampler(*args, eta=0.6), implicit(0.6)),
        (lambda *args: ddim.sampler(*args, eta=1.0), implicit(1.0)),
    ],
    ids=["ancestral", "ddim-0", "ddim-0.6", "ddim-1"],
)
def test_gaussian_samples_obey_the_law_of_the_textbook_step(walker, step_of, steps):
    alpha_bar = ch1.make_alpha_bar("linear", 400)
    pairs = ddim.subsequence(400, steps)
    net, n = Gaussian(alpha_bar), 1000 * 32
    *_, (_, x, _) = walker(net, alpha_bar, pairs, (2, 4, 8), torch.arange(1000))
    points = x.double().permute(0, 2, 3, 1).reshape(n, 2)
    mean, cov = law(alpha_bar, pairs, step_of)
    assert ((points.mean(0) - mean).abs() < 4.5 * (cov.diag() / n).sqrt()).all()
    spread = (cov.diag()[:, None] * cov.diag() + cov**2).sqrt() / n**0.5  # of a sample covariance
    assert ((points.T.cov() - cov).abs() < 4.5 * spread).all(), (points.T.cov(), cov)


@pytest.mark.parametrize("step_of", [ancestral, implicit(0.0), implicit(0.6), implicit(1.0)])
def test_that_law_converges_to_the_data_at_first_order(step_of):
    errors = []
    for T in (1000, 2000, 4000):
        mean, cov = law(ch1.make_alpha_bar("linear", T), ddim.subsequence(T, T), step_of)
        errors.append([(mean - MEAN).norm().item(), (cov - COV).norm().item()])
    assert errors[0][0] < 0.01 * MEAN.norm() and errors[0][1] < 0.06 * COV.norm(), errors
    for before, after in zip(errors, errors[1:], strict=False):
        assert after[1] / before[1] == pytest.approx(0.5, abs=0.05), errors


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp", 2), ("heun", 2)])
def test_global_error_falls_with_the_order(sampler, order):
    """Against the ODE's solution, over a chain of even log SNR, before the last, denoising step."""
    alpha_bar = torch.sigmoid(2 * torch.linspace(3, -3, 481, dtype=torch.float64))
    generator, errors = torch.Generator().manual_seed(0), []
    x = torch.randn(20, 2, 2, 2, dtype=torch.float64, generator=generator)
    for steps in (61, 121, 241):
        way = ddim.walk(
            Gaussian(alpha_bar),
            alpha_bar,
            ddim.subsequence(481, steps),
            x,
            sampler=sampler,
            clip=False,
        )
        *_, (t_prev, end, _), _ = way
        assert t_prev == 0
        errors.append((end - flow(x, alpha_bar[-1], alpha_bar[0])).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([order] * 2, abs=0.12), (orders, errors)


def test_heun_is_the_textbook_step_for_u_over_s(net):
    """u = x / sqrt(1 - a), du/ds = x0_hat, s = sqrt(a / (1 - a)): Heun's method, in float64."""
    alpha_bar, seeds = ch1.make_alpha_bar("cosine", 100), torch.tensor([3, 9])
    pairs, y = ddim.subsequence(100, 6), torch.tensor([0, 2])

    def slope(x, t):
        a = alpha_bar[t]
        with torch.no_grad():
            eps_hat = net(x.float(), torch.full((2,), t), y).double()
        return ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)

    x = gaussian((2, *SHAPE), seeds, -1, "cpu").double()
    steps = walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, y, sampler="heun"))
    for (t, t_prev), (_, x_prev, x0_hat) in zip(pairs[:-1], steps, strict=False):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        h = (a_prev / (1 - a_prev)).sqrt() - (a / (1 - a)).sqrt()
        first, u = slope(x, t), x / (1 - a).sqrt()
        second = slope((u + h * first) * (1 - a_prev).sqrt(), t_prev)
        expected = (u + h * (first + second) / 2) * (1 - a_prev).sqrt()
        torch.testing.assert_close(x_prev.double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(x0_hat.double(), (first + second) / 2, atol=1e-3, rtol=0)
        x = x_prev.double()
    torch.testing.assert_close(steps[-1][1].double(), slope(x, 0), atol=1e-4, rtol=0)


# --------------------------------------------------------------- guidance, seeds, whole pictures


@pytest.mark.parametrize("sampler", ddim.SAMPLERS)
def test_all_samplers_start_at_the_same_noise_and_count_their_evaluations(net, sampler):
    seen, shown = [], []

    def look(module, inputs, output):
        seen.append(inputs[0][:3].clone())
        shown.append(len(inputs[0]))

    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 4)
    seeds, y = torch.tensor([7, 8, 10**12]), torch.tensor([0, 1, 2])
    with net.register_forward_hook(look):
        for w in (0.0, 1.5):
            seen.clear(), shown.clear()
            walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, y, sampler=sampler, guidance=w))
            assert torch.equal(seen[0], gaussian((3, *SHAPE), seeds, -1, "cpu"))
            assert sum(shown) == 3 * ddim.evaluations(sampler, 4, w != 0)
    with pytest.raises(ValueError, match="must be one of ddim, dpmpp, heun, ddpm"):
        next(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, sampler="euler"))


@pytest.mark.parametrize("w, batch", [(0.0, 4), (1.5, 8), (-1.0, 8)])
def test_guidance_costs_one_forward_and_is_the_formula(w, batch):
    torch.manual_seed(0)
    net = ch1.make_net(ch1.Config(width=16, mult=(1, 2), attention=(4,)), SHAPE, 3).eval()
    for p in net.parameters():  # open the layers that start at zero, and let labels matter
        torch.nn.init.normal_(p, std=0.15)
    torch.nn.init.normal_(net.label.weight, std=5.0)
    seen = []
    hook = net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), [(12, 6), (6, 2), (2, -1)]
    seeds, y = torch.arange(4), torch.tensor([0, 1, 2, 0])
    steps = walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, y, guidance=w))
    hook.remove()
    assert seen == [batch] * 3

    x, t, a = gaussian((4, *SHAPE), seeds, -1, "cpu"), torch.full((4,), 12), alpha_bar[12]
    with torch.no_grad():
        with_label, without = net(x, t, y), net(x, t, torch.full((4,), 3))
    assert (with_label - without).abs().mean() > 0.005  # 50 times the tolerance below
    eps_hat = (1 + w) * with_label - w * without
    guess = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).float().clamp(-1, 1)
    assert (guess.abs() < 1).float().mean() > 0.2  # clipping does not hide all
    torch.testing.assert_close(steps[0][2], guess, atol=1e-4, rtol=0)
    if w == -1:
        unconditional = walk(ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds))
        torch.testing.assert_close(steps[-1][1], unconditional[-1][1], atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(net):
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)
    seeds, y = torch.arange(20), torch.arange(20) % 3
    *_, (_, many, _) = ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, y, eta=0.7)
    *_, (_, one, _) = ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds[17:18], y[17:18], eta=0.7)
    torch.testing.assert_close(one[0], many[17], atol=1e-5, rtol=0)
    assert (many[1:] - many[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_fresh_noise_is_used_only_with_eta(net):
    """Other seeds for the steps than for x_T change the way if and only if eta is not 0."""
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)

    def end(eta, step_seeds):
        seeds = torch.arange(2)
        way = ddim.sampler(net, alpha_bar, pairs, SHAPE, seeds, eta=eta)
        next(way)
        seeds += step_seeds  # in place: the sampler holds this tensor
        *_, (_, x, _) = way
        return x

    assert torch.equal(end(0.0, 0), end(0.0, 100))
    assert (end(0.5, 0) - end(0.5, 100)).abs().max() > 0.01


def checkpoint(net, folder, conditional=True):
    cfg = ch1.Config(width=16, mult=(1, 2), attention=(4,), timesteps=50, conditional=conditional)
    folder.mkdir()
    state = {
        "script": "ddpm_pixel",
        "config": asdict(cfg),
        "step": 1,
        "ema": net.state_dict(),
        "shape": list(SHAPE),
        "class_names": ["a", "b", "c"],
    }
    torch.save(state, folder / "ckpt.pt")
    return str(folder / "ckpt.pt")


def test_files_are_those_of_chapter_1_and_the_film_ends_in_them(net, tmp_path):
    path = checkpoint(net, tmp_path / "run")
    common = {"n": 10, "sample_steps": 7, "eta": 0.3, "guidance": 0.5, "batch_size": 4, "gpus": 0}
    ours = ddim.Config(sample=path, out=str(tmp_path / "2"), classes="b,c", gif=True, **common)
    ddim.sample(ours, World())
    two, labels = np.load(tmp_path / "2" / "samples.npz"), torch.tensor([1, 2] * 5)
    assert two["arr_1"].tolist() == labels.tolist()
    chapter1 = ch1.Config(timesteps=50, sampler="ddim", **common)
    one = ch1.draw(net, chapter1, World(), SHAPE, labels, torch.arange(10))
    assert np.abs(one.numpy().astype(int) - two["arr_0"]).max() <= 1
    assert (tmp_path / "2" / "reverse.gif").exists() and (tmp_path / "2" / "reverse.png").exists()

    pairs, seeds, y = ddim.subsequence(50, 7), torch.arange(8), torch.tensor([1, 2] * 4)
    way = ddim.film(net, ch1.make_alpha_bar("cosine", 50), pairs, ours, SHAPE, y, seeds, frames=4)
    assert len(way) == 4 and way[0].shape == (16, 8, 8, 1)
    guess = way[-1][8:].numpy().astype(int)  # the last step returns its guess
    assert np.abs(guess - two["arr_0"][:8]).max() <= 1


def test_labels_cannot_be_asked_of_a_network_without(tmp_path):
    cfg = ch1.Config(width=16, mult=(1, 2), attention=(4,))
    path = checkpoint(ch1.make_net(cfg, SHAPE, 0), tmp_path / "run", conditional=False)
    for asked in ({"classes": "a"}, {"guidance": 1.0}):
        with pytest.raises(BadInput, match="without labels"):
            ddim.sample(ddim.Config(sample=path, gpus=0, **asked), World())
    ddim.sample(ddim.Config(sample=path, gpus=0, n=2, sample_steps=2), World())
    assert np.load(tmp_path / "run" / "samples.npz").files == ["arr_0"]
