"""DDIM against equation 12 written out, against Gaussian data, and against ddpm_pixel.py."""

from runtime.commandline import BadInput
from runtime.pictures import to_uint8
from runtime.processes import World

import math
from dataclasses import asdict
from decimal import Context, Decimal, localcontext
from functools import partial

import numpy as np
import pytest
import torch
from gaussian_data import COV, MEAN, Gaussian, flow

import ddim
import ddpm_pixel as ch1
import improved_ddpm
from kernels import gaussian

SHAPE = (1, 8, 8)
SIZES = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,)}


def small(**changes):
    return ch1.Config(**SIZES, **changes)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ch1.UNet(SHAPE, 3, small())
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    return net.eval()


def walk(trajectory):
    return [(x.clone(), x0_hat.clone()) for x, x0_hat in trajectory]


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


# ------------------------------------------------------------------------------------- the rows


def linear():
    return ch1.make_alpha_bar("linear", 1000)


def cosine():
    """It falls to about 2e-9."""
    return ch1.make_alpha_bar("cosine", 1000)


def chain(*ts):
    return list(zip(ts, (*ts[1:], -1), strict=True))


FULL = chain(*range(999, -1, -1))
SUBSEQUENCE = chain(999, 998, 700, 699, 330, 41, 3, 0)
LATE_END = chain(999, 600, 30)  # the last row jumps from 30 to -1


def rows_of(alpha_bar, pairs, **how):
    return [ddim.ddim_row(ddim.at(alpha_bar, t), ddim.at(alpha_bar, u), **how) for t, u in pairs]


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_rows_are_equations_12_and_16_in_50_digits(schedule, pairs, eta):
    rows, alpha_bar = rows_of(schedule(), pairs, eta=eta), schedule()
    with localcontext(Context(prec=50)):
        for row, (t, t_prev) in zip(rows[:-1], pairs, strict=False):
            at, ap = Decimal(alpha_bar[t].item()), Decimal(alpha_bar[t_prev].item())
            sigma = Decimal(eta) * ((1 - ap) / (1 - at)).sqrt() * (1 - at / ap).sqrt()
            direction = (1 - ap - sigma**2).sqrt()
            expected = {
                "p": 1 / at.sqrt(),
                "q": (1 / at - 1).sqrt(),
                # eps = (x - sqrt(a) x0) / sqrt(1 - a) put into sqrt(a_prev) x0 + direction * eps
                "A": ap.sqrt() - direction * at.sqrt() / (1 - at).sqrt(),
                "B": direction / (1 - at).sqrt(),
                "S": sigma,
                "H": Decimal(0),
                "log_var_min": Decimal(0),
                "log_var_max": Decimal(0),
            }
            for name, value in expected.items():  # two units in the last place of float32
                got = getattr(row, name)
                assert abs(got - float(value)) <= 2.4e-7 * abs(float(value)), (name, got, value)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_row_returns_x0_hat_without_noise(schedule, eta):
    for pairs in (FULL, LATE_END, chain(999)):
        rows = rows_of(schedule(), pairs, eta=eta)
        last = rows[-1]
        assert (last.A, last.B, last.H, last.S) == (1, 0, 0, 0)
        assert all(math.isfinite(number) for row in rows for number in row)


def test_eta_1_over_all_timesteps_has_the_rows_of_the_ancestral_chain():
    for alpha_bar in (linear(), cosine()):
        for ddim_row, (t, t_prev) in zip(rows_of(alpha_bar, FULL, eta=1.0), FULL, strict=True):
            ddpm_row = ch1.ancestral_row(ddim.at(alpha_bar, t), ddim.at(alpha_bar, t_prev))
            for ours, theirs in zip(ddim_row, ddpm_row, strict=True):
                assert abs(ours - theirs) <= 2.4e-7 * abs(theirs)


def test_zero_terminal_snr_is_exact_for_v():
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    for eta in (0.0, 1.0):
        rows = rows_of(alpha_bar, chain(3, 2, 1, 0), eta=eta, prediction="v")
        assert all(math.isfinite(number) for row in rows for number in row)
        assert rows[0][:2] == (0, 1)
        assert abs(rows[0].A - 0.1**0.5) < 1e-7


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_is_equation_12(net, eta):
    alpha_bar = ch1.make_alpha_bar("linear", 100)
    pairs, seeds = ddim.subsequence(100, 6), torch.tensor([3, 9])
    y = torch.tensor([0, 2])
    x = gaussian((2, *SHAPE), seeds, -1, "cpu").double()
    steps = walk(ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, y, eta=eta))
    for k, ((t, t_prev), (x_prev, x0_hat)) in enumerate(zip(pairs, steps, strict=True)):
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
    ours = walk(ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, eta=1.0))
    chapter1 = walk(ch1.sample(net, alpha_bar, ch1.timestep_pairs(20, 20), SHAPE, seeds))
    assert pairs == ch1.timestep_pairs(20, 20)
    for a, b in zip(ours, chapter1, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)


def test_eta_0_starts_where_chapter_1_starts_and_ends_in_its_guess(net):
    alpha_bar, seeds = ch1.make_alpha_bar("cosine", 100), torch.tensor([17])
    way = walk(ddim.sample(net, alpha_bar, ddim.subsequence(100, 5), SHAPE, seeds))
    again = walk(ddim.sample(net, alpha_bar, ddim.subsequence(100, 5), SHAPE, seeds))
    assert torch.equal(way[-1][0], again[-1][0])
    assert len(way) == 5  # and the last t_prev is -1
    torch.testing.assert_close(way[-1][0], way[-1][1])


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
        (ch1.sample, ancestral),
        (lambda *args: ddim.sample(*args, eta=0.0), implicit(0.0)),
        (lambda *args: ddim.sample(*args, eta=0.6), implicit(0.6)),
        (lambda *args: ddim.sample(*args, eta=1.0), implicit(1.0)),
    ],
    ids=["ancestral", "ddim-0", "ddim-0.6", "ddim-1"],
)
def test_gaussian_samples_obey_the_law_of_the_textbook_step(walker, step_of, steps):
    alpha_bar = ch1.make_alpha_bar("linear", 400)
    pairs = ddim.subsequence(400, steps)
    net, n = Gaussian(alpha_bar), 1000 * 32
    *_, (x, _) = walker(net, alpha_bar, pairs, (2, 4, 8), torch.arange(1000))
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


def test_global_error_falls_with_the_order():
    """Against the ODE's solution, over a chain of even log SNR, before the last, denoising step."""
    alpha_bar = torch.sigmoid(2 * torch.linspace(3, -3, 481, dtype=torch.float64))
    generator, errors = torch.Generator().manual_seed(0), []
    x = torch.randn(20, 2, 2, 2, dtype=torch.float64, generator=generator)
    for steps in (61, 121, 241):
        pairs = ddim.subsequence(481, steps)
        assert pairs[-2][1] == 0
        *_, (end, _), _ = ddim.decode(Gaussian(alpha_bar), alpha_bar, pairs, x, clip=False)
        errors.append((end - flow(x, alpha_bar[-1], alpha_bar[0])).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([1] * 2, abs=0.12), (orders, errors)


# --------------------------------------------------------------- guidance, seeds, whole pictures


@pytest.mark.parametrize("w, batch", [(0.0, 4), (1.5, 8), (-1.0, 4)])
def test_guidance_costs_one_forward_and_is_the_formula(w, batch):
    torch.manual_seed(0)
    net = ch1.UNet(SHAPE, 3, small()).eval()
    for p in net.parameters():  # open the layers that start at zero, and let labels matter
        torch.nn.init.normal_(p, std=0.15)
    torch.nn.init.normal_(net.label.weight, std=5.0)
    seen = []
    hook = net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), [(12, 6), (6, 2), (2, -1)]
    seeds, y = torch.arange(4), torch.tensor([0, 1, 2, 0])
    steps = walk(ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, y, w))
    hook.remove()
    assert seen == [batch] * 3

    x, t, a = gaussian((4, *SHAPE), seeds, -1, "cpu"), torch.full((4,), 12), alpha_bar[12]
    with torch.no_grad():
        with_label, without = net(x, t, y), net(x, t, torch.full((4,), 3))
    assert (with_label - without).abs().mean() > 0.005  # 50 times the tolerance below
    eps_hat = (1 + w) * with_label - w * without
    guess = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).float().clamp(-1, 1)
    assert (guess.abs() < 1).float().mean() > 0.2  # clipping does not hide all
    torch.testing.assert_close(steps[0][1], guess, atol=1e-4, rtol=0)
    if w == -1:
        unconditional = walk(ddim.sample(net, alpha_bar, pairs, SHAPE, seeds))
        torch.testing.assert_close(steps[-1][0], unconditional[-1][0], atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(net):
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)
    seeds, y = torch.arange(20), torch.arange(20) % 3
    *_, (many, _) = ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, y, eta=0.7)
    *_, (one, _) = ddim.sample(net, alpha_bar, pairs, SHAPE, seeds[17:18], y[17:18], eta=0.7)
    torch.testing.assert_close(one[0], many[17], atol=1e-5, rtol=0)
    assert (many[1:] - many[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_fresh_noise_is_used_only_with_eta(net):
    """Other seeds for the steps than for x_T change the way if and only if eta is not 0."""
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)

    def end(eta, step_seeds):
        seeds = torch.arange(2)
        way = ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, eta=eta)
        next(way)
        seeds += step_seeds  # in place: the sampler holds this tensor
        *_, (x, _) = way
        return x

    assert torch.equal(end(0.0, 0), end(0.0, 100))
    assert (end(0.5, 0) - end(0.5, 100)).abs().max() > 0.01


def checkpoint(net, folder, class_cond=True):
    cfg = small(schedule="cosine", timesteps=50, class_cond=class_cond)
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
    """The loop of ddpm_pixel.py with the row of this chapter draws what --sample draws."""
    path = checkpoint(net, tmp_path / "run")
    common = {"n": 10, "sample_steps": 7, "eta": 0.3, "guidance": 0.5, "batch_size": 4, "gpus": 0}
    ours = ddim.Config(sample=path, out=str(tmp_path / "2"), classes="b,c", gif=True, **common)
    ddim.sample_checkpoint(ours, World())
    two, labels = np.load(tmp_path / "2" / "samples.npz"), torch.tensor([1, 2] * 5)
    assert two["arr_1"].tolist() == labels.tolist()
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", 50), ddim.subsequence(50, 7)
    how = {"w": 0.5, "make_row": partial(ddim.ddim_row, eta=0.3)}
    chapter1 = partial(ch1.sample, net, alpha_bar, pairs, SHAPE, **how)
    one = World().draw(chapter1, torch.arange(10), labels, 4, 7)
    assert np.abs(one.numpy().astype(int) - two["arr_0"]).max() <= 1
    assert (tmp_path / "2" / "reverse.gif").exists() and (tmp_path / "2" / "reverse.png").exists()

    seeds = torch.arange(8)
    way, guesses = World().frames(chapter1, seeds, labels[:8], ddim.noise(seeds, SHAPE))
    assert len(way) == len(guesses) == 8 and way[0].shape == (8, 8, 8, 1)
    for last in (way[7], guesses[7], guesses[6]):  # the last step returns its guess
        assert np.abs(last.numpy().astype(int) - two["arr_0"][:8]).max() <= 1


def test_labels_cannot_be_asked_of_a_network_without(tmp_path):
    path = checkpoint(ch1.UNet(SHAPE, 0, small()), tmp_path / "run", class_cond=False)
    for asked, told in (({"classes": "a"}, "no class"), ({"guidance": 1.0}, "knows no labels")):
        with pytest.raises(BadInput, match=told):
            ddim.sample_checkpoint(ddim.Config(sample=path, n=2, gpus=0, **asked), World())
    out = str(tmp_path / "drawn")
    ddim.sample_checkpoint(ddim.Config(sample=path, gpus=0, n=2, sample_steps=2, out=out), World())
    assert np.load(tmp_path / "drawn" / "samples.npz").files == ["arr_0"]


def test_networks_of_improved_ddpm_are_sampled_whatever_their_variance(tmp_path):
    """The second half of their channels has no say in x0_hat: without it, the same images."""
    cfg = improved_ddpm.Config(**SIZES, schedule="linear", timesteps=50, num_heads=1)
    torch.manual_seed(0)
    net = improved_ddpm.make_net(cfg, SHAPE, 3).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    state = {
        "script": "improved_ddpm",
        "config": asdict(cfg),
        "step": 1,
        "ema": net.state_dict(),
        "shape": list(SHAPE),
        "class_names": ["a", "b", "c"],
    }
    torch.save(state, tmp_path / "ckpt.pt")
    asked = {"n": 4, "sample_steps": 5, "guidance": 0.5, "gpus": 0, "out": str(tmp_path)}
    ddim.sample_checkpoint(ddim.Config(sample=str(tmp_path / "ckpt.pt"), **asked), World())

    class Half(torch.nn.Module):
        null = net.null

        def forward(self, x, t, y=None):
            return net(x, t, y)[:, : x.shape[1]]

    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)
    seeds, y = torch.arange(4), torch.tensor([0, 1, 2, 0])
    *_, (x, _) = ddim.sample(Half(), alpha_bar, pairs, SHAPE, seeds, y, 0.5)
    found = np.load(tmp_path / "samples.npz")["arr_0"].astype(int)
    assert np.abs(to_uint8(x).numpy() - found).max() <= 1 and found.std() > 20
