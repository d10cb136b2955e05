"""Solvers of second order against their papers' formulas and against the ODE's exact solution."""

from runtime.commandline import BadInput
from runtime.processes import World

import math
from dataclasses import asdict
from decimal import Context, Decimal, localcontext
from functools import partial

import numpy as np
import pytest
import torch
from gaussian_data import Gaussian, flow
from PIL import Image

import ddim
import ddpm_pixel as ch1
import dpm_solver
from kernels import gaussian

SHAPE = (1, 8, 8)
SOLVERS = sorted(dpm_solver.SOLVERS)


def small(**changes):
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,)}
    return ch1.Config(**sizes, **changes)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ch1.UNet(SHAPE, 3, small())
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    return net.eval()


def walk(trajectory):
    return [(x.clone(), x0_hat.clone()) for x, x0_hat in trajectory]


# -------------------------------------------------------------------------------------- the rows


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
    before = [None, *(t for t, _ in pairs)]
    rows = []
    for u, (t, t_prev) in zip(before, pairs, strict=False):
        a_before = None if u is None else ddim.at(alpha_bar, u)
        a, a_prev = ddim.at(alpha_bar, t), ddim.at(alpha_bar, t_prev)
        rows.append(dpm_solver.dpmpp_row(a_before, a, a_prev, **how))
    return rows


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("pairs", [FULL, SUBSEQUENCE, LATE_END], ids=["full", "sub", "late"])
def test_rows_are_algorithm_2_in_50_digits(schedule, pairs):
    rows, alpha_bar = rows_of(schedule(), pairs), schedule()
    with localcontext(Context(prec=50)):
        h_before = None
        for row, (t, t_prev) in zip(rows[:-1], pairs, strict=False):
            at, ap = Decimal(alpha_bar[t].item()), Decimal(alpha_bar[t_prev].item())
            h = ((ap / (1 - ap)).ln() - (at / (1 - at)).ln()) / 2
            gain = ap.sqrt() * (1 - (-h).exp())
            half_over_r = h / h_before / 2 if h_before else Decimal(0)
            expected = {
                "p": 1 / at.sqrt(),
                "q": (1 / at - 1).sqrt(),
                "A": gain * (1 + half_over_r),
                "B": ((1 - ap) / (1 - at)).sqrt(),
                "H": -gain * half_over_r,
                "S": Decimal(0),
            }
            for name, value in expected.items():  # two units in the last place of float32
                got = getattr(row, name)
                assert abs(got - float(value)) <= 2.4e-7 * abs(float(value)), (name, got, value)
            h_before = h


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_the_first_row_is_ddims_and_the_last_returns_x0_hat(schedule):
    for pairs in (FULL, LATE_END, chain(999)):
        rows = rows_of(schedule(), pairs)
        assert rows[0].H == 0 and (rows[-1].A, rows[-1].B, rows[-1].H, rows[-1].S) == (1, 0, 0, 0)
        assert all(math.isfinite(number) for row in rows for number in row)
        first = ddim.ddim_row(*(ddim.at(schedule(), t) for t in pairs[0]))
        assert rows[0] == pytest.approx(first, rel=1e-9)


def test_zero_terminal_snr_is_exact_for_v():
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    rows = rows_of(alpha_bar, chain(3, 2, 1, 0), prediction="v")
    assert all(math.isfinite(number) for row in rows for number in row)
    assert rows[0][:2] == (0, 1)
    assert abs(rows[0].A - 0.1**0.5) < 1e-7


# ------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("solver", SOLVERS)
def test_global_error_falls_with_the_order(solver):
    """Against the ODE's solution, over a chain of even log SNR, before the last, denoising step."""
    alpha_bar = torch.sigmoid(2 * torch.linspace(3, -3, 481, dtype=torch.float64))
    generator, errors = torch.Generator().manual_seed(0), []
    x = torch.randn(20, 2, 2, 2, dtype=torch.float64, generator=generator)
    for steps in (61, 121, 241):
        pairs = ddim.subsequence(481, steps)
        assert pairs[-2][1] == 0
        solve = dpm_solver.SOLVERS[solver]
        *_, (end, _), _ = solve(Gaussian(alpha_bar), alpha_bar, pairs, x, clip=False)
        errors.append((end - flow(x, alpha_bar[-1], alpha_bar[0])).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([2] * 2, abs=0.12), (orders, errors)


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
    steps = walk(dpm_solver.sample("heun", net, alpha_bar, pairs, SHAPE, seeds, y))
    for (t, t_prev), (x_prev, x0_hat) in zip(pairs[:-1], steps, strict=False):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        h = (a_prev / (1 - a_prev)).sqrt() - (a / (1 - a)).sqrt()
        first, u = slope(x, t), x / (1 - a).sqrt()
        second = slope((u + h * first) * (1 - a_prev).sqrt(), t_prev)
        expected = (u + h * (first + second) / 2) * (1 - a_prev).sqrt()
        torch.testing.assert_close(x_prev.double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(x0_hat.double(), (first + second) / 2, atol=1e-3, rtol=0)
        x = x_prev.double()
    torch.testing.assert_close(steps[-1][0].double(), slope(x, 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_is_that_of_the_guided_network(solver):
    torch.manual_seed(0)
    net = ch1.UNet(SHAPE, 3, small()).eval()
    for p in net.parameters():  # open the layers that start at zero, and let labels matter
        torch.nn.init.normal_(p, std=0.1)
    torch.nn.init.normal_(net.label.weight, std=5.0)

    class Guided(torch.nn.Module):
        def forward(self, x, t, y=None):
            none = torch.full_like(t, net.null)
            return 2.5 * net(x, t, torch.tensor([0, 1, 2])) - 1.5 * net(x, t, none)

    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 5)
    where, y = (alpha_bar, pairs, SHAPE, torch.arange(3)), torch.tensor([0, 1, 2])
    ours = walk(dpm_solver.sample(solver, net, *where, y, 1.5, prediction="v"))
    theirs = walk(dpm_solver.sample(solver, Guided(), *where, prediction="v"))
    plain = walk(dpm_solver.sample(solver, net, *where, y, prediction="v"))
    torch.testing.assert_close(ours[-1][0], theirs[-1][0], atol=1e-4, rtol=0)
    assert (ours[-1][0] - plain[-1][0]).abs().max() > 0.1


# -------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    state = {
        "script": "ddpm_pixel",
        "config": asdict(small(timesteps=50)),
        "step": 1,
        "ema": net.state_dict(),
        "shape": list(SHAPE),
        "class_names": ["a", "b", "c"],
    }
    torch.save(state, folder / "ckpt.pt")
    return str(folder / "ckpt.pt")


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["dpm_solver.py", *map(str, arguments), "--gpus", "0"])
    dpm_solver.main()


@pytest.mark.parametrize("solver, calls", [("dpmpp", 14), ("heun", 26)])
def test_sample_draws_what_the_solver_ends_in(
    net, path, tmp_path, monkeypatch, capsys, solver, calls
):
    asked = ["--sampler", solver, "--n", 10, "--sample-steps", 7, "--spacing", "quadratic", "--gif"]
    asked += ["--classes", "b,c", "--guidance", 0.5, "--batch-size", 4, "--out", tmp_path]
    command(monkeypatch, "--sample", path, *asked)
    assert f"{calls} network evaluations" in capsys.readouterr().out
    found, labels = np.load(tmp_path / "samples.npz"), torch.tensor([1, 2] * 5)
    assert found["arr_1"].tolist() == labels.tolist()
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 7, "quadratic")
    trajectory = partial(dpm_solver.sample, solver, net, alpha_bar, pairs, SHAPE, w=0.5)
    images = World().draw(trajectory, torch.arange(10), labels, 10, 7)
    assert np.abs(images.numpy().astype(int) - found["arr_0"]).max() <= 1
    assert (tmp_path / "reverse.gif").exists() and (tmp_path / "reverse.png").exists()


def test_both_start_at_the_noise_of_ddim(net):
    alpha_bar, pairs = ch1.make_alpha_bar("linear", 50), ddim.subsequence(50, 1)
    seeds, y = torch.tensor([7, 8, 10**12]), torch.tensor([0, 1, 2])
    ((end, _),) = walk(ddim.sample(net, alpha_bar, pairs, SHAPE, seeds, y))
    for solver in SOLVERS:  # of one step all are DDIM
        ((other, _),) = walk(dpm_solver.sample(solver, net, alpha_bar, pairs, SHAPE, seeds, y))
        assert torch.equal(other, end)


def test_interpolation_ends_in_the_samples_of_its_seeds(path, tmp_path, monkeypatch):
    common = ["--classes", "a", "--sample-steps", 5, "--sampler", "dpmpp", "--out", tmp_path]
    command(monkeypatch, "--interpolate", path, "--seeds", "3,9,4,4", *common)
    sheet = np.asarray(Image.open(tmp_path / "interpolation.png")).astype(int)
    assert sheet.shape == (2 * 10 + 2, 11 * 10 + 2)
    command(monkeypatch, "--sample", path, "--seeds", "3,9,4", *common)
    samples = np.load(tmp_path / "samples.npz")["arr_0"][:, :, :, 0].astype(int)
    for row, column, sample in ((0, 0, 0), (0, 10, 1), (1, 0, 2), (1, 5, 2), (1, 10, 2)):
        y, x = 2 + 10 * row, 2 + 10 * column
        assert np.abs(sheet[y : y + 8, x : x + 8] - samples[sample]).max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--sample is missing"),
        (["--sample", "a", "--encode", "b"], "--sample and --encode: one at a time"),
        (["--sample", "a", "--sampler", "heun", "--eta", "1"], "unknown flag --eta"),
        (["--sample", "a", "--sampler", "euler"], "euler"),
        (["--sample", "CKPT", "--sample-steps", "51"], "type a number from 1 to 50"),
        (["--sample", "CKPT", "--classes", "d"], "--classes d"),
        (["--encode", "a", "--classes", "a"], "choose by --seeds"),
        (["--sample", "a"], "checkpoint a"),
    ],
)
def test_bad_input_is_one_line(path, monkeypatch, arguments, message, tmp_path):
    arguments = [{"CKPT": path}.get(a, a) for a in arguments]
    with pytest.raises(BadInput, match=message) as caught:
        command(monkeypatch, *arguments, "--out", tmp_path)
    assert "\n" not in str(caught.value)
