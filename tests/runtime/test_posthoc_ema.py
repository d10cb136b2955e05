"""Running means of a length that is chosen afterwards: formulas, precision, files."""

from runtime import posthoc_ema
from runtime.commandline import BadInput
from runtime.posthoc_ema import (
    LONGEST,
    PowerEMA,
    coefficients,
    gamma_of,
    overlap,
    profile,
    sigma_rel_of,
)
from runtime.processes import SAID

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy_run
from run_folders import assert_same, saved
from scipy import integrate
from torch import nn

LENGTHS = (0.05, 0.10)


class Net(nn.Module):
    """Weights to be set, a buffer of floats and one of integers."""

    def __init__(self, size=50, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def at(self, step, theta):
        """This network after `step` steps with the weights theta."""
        with torch.no_grad():
            self.w.copy_(torch.from_numpy(theta))
            self.mean.fill_(step)
            self.count.fill_(step)
        return self


def trajectory(steps, size=50, seed=0):
    """Weights theta(1), ..., theta(steps), float64 (steps, size): they settle, and jitter."""
    rng, tau = np.random.default_rng(seed), np.arange(1, steps + 1)[:, None] / steps
    settling = rng.standard_normal(size) * np.exp(-5 * tau * rng.random(size))
    jitter = np.cumsum(rng.standard_normal((steps, size)), axis=0) / np.sqrt(steps)
    return settling + 0.2 * jitter


def reconstruct(folder, length, step=10**9):
    """posthoc_ema.reconstruct with all snapshots in the folder, of at most `step` steps."""
    steps = [int(path.stem.split("-")[1]) for path in folder.glob("snapshot-*.pt")]
    return posthoc_ema.reconstruct(folder, length, [s for s in steps if s <= step])


def tracked(theta, lengths, folder=None, every=0, dtype=torch.float32):
    """The PowerEMA of a trajectory, with snapshots every so many steps."""
    net = Net(theta.shape[1], dtype)
    power = PowerEMA(net, lengths)
    for step, weights in enumerate(theta, 1):
        power.update(net.at(step, weights), step)
        if every and step % every == 0:
            power.save_snapshot(folder, step)
    return power


def direct(theta, gamma):
    """The mean of theta(1), ..., theta(t), constant over each step, under the power function."""
    edges = (np.arange(len(theta) + 1) / len(theta)) ** (gamma + 1)
    return np.diff(edges) @ theta


# ---------------------------------------------------------------------------------------- formulas


def test_published_pairs():
    assert f"{gamma_of(0.10):.2f} {gamma_of(0.05):.2f}" == "6.94 16.97"
    assert f"{sigma_rel_of(6.94):.4f} {sigma_rel_of(16.97):.4f}" == "0.1000 0.0500"
    assert gamma_of(LONGEST) == pytest.approx(0, abs=1e-12) and gamma_of(12**-0.5) >= 0
    assert sigma_rel_of(0) == pytest.approx(LONGEST, abs=1e-16)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0, 6.94, 16.97, 100.0, 1e4])
def test_length_is_the_standard_deviation_of_the_profile(gamma):
    """And the two functions undo each other."""
    how = {"epsabs": 1e-13, "limit": 200}
    how |= {"points": [1 - 100 / (gamma + 1), 1 - 10 / (gamma + 1)]} if gamma > 99 else {}
    moments = [
        integrate.quad(lambda x, k=k: x**k * float(profile(gamma, 1.0, x)), 0, 1, **how)[0]
        for k in range(3)
    ]
    assert moments[0] == pytest.approx(1, abs=1e-10)
    assert sigma_rel_of(gamma) ** 2 == pytest.approx(moments[2] - moments[1] ** 2, abs=1e-10)
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


def test_profile_ends_at_its_step():
    assert profile(2.0, 10.0, [-1, 0, 5, 10, 10.1]).tolist() == pytest.approx(
        [0, 0, 0.3 * 0.25, 0.3, 0]
    )


@pytest.mark.parametrize("a", [(6.9, 400.0), (17.0, 1000.0)], ids=str)
@pytest.mark.parametrize("b", [(0.0, 700.0), (17.0, 400.0), (40.0, 1000.0)], ids=str)
def test_overlap_is_the_integral(a, b):
    def product(tau):
        return float(profile(*a, tau) * profile(*b, tau))

    expected = integrate.quad(product, 0, min(a[1], b[1]), epsrel=1e-11, limit=200)[0]
    assert overlap(*a, *b) == pytest.approx(expected, rel=1e-8)
    assert overlap(*b, *a) == pytest.approx(expected, rel=1e-8)


def test_coefficients_give_the_nearest_profile():
    """No other sum of the profiles is nearer, but for the last digits that make the sum 1."""
    gammas = [gamma_of(length) for _ in range(4) for length in LENGTHS]
    steps, target = np.repeat([500.0, 1000, 1500, 2000], 2), (gamma_of(0.15), 2000.0)
    x, missed = coefficients(gammas, steps, *target)
    tau = (np.arange(200_000) + 0.5) / 100  # the midpoint rule
    profiles = np.stack([profile(g, t, tau) for g, t in zip(gammas, steps, strict=True)], axis=1)
    wanted = profile(*target, tau)
    best = np.linalg.lstsq(profiles, wanted, rcond=None)[0]
    assert np.abs(best / best.sum() - x).max() < 1e-5
    norm = np.linalg.norm(profiles @ x - wanted) / np.linalg.norm(wanted)
    assert missed == pytest.approx(norm, rel=1e-4) and x.sum() == pytest.approx(1, abs=1e-14)


def test_more_snapshots_miss_less():
    missed = {}
    for length in (0.03, 0.07, 0.15, 0.25):
        for n in (4, 8, 16, 32, 64):
            steps = np.repeat(np.arange(1, n + 1) * 6400.0 / n, 2)
            gammas = [gamma_of(0.05), gamma_of(0.10)] * n
            missed[length, n] = coefficients(gammas, steps, gamma_of(length), 6400.0)[1]
        assert all(missed[length, 2 * n] < 0.65 * missed[length, n] for n in (4, 8, 16, 32))
    assert missed[0.07, 16] < 0.004 and missed[0.15, 16] < 0.01 and missed[0.03, 32] < 0.012


# ---------------------------------------------------------------------------------------- tracking


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("steps", [1, 2, 300])
def test_a_mean_is_the_sum_weighted_by_the_power_function(steps, dtype, error):
    theta = trajectory(steps)
    lengths = (0.03, 0.10, LONGEST)
    for mean, length in zip(tracked(theta, lengths, dtype=dtype).nets, lengths, strict=True):
        expected = direct(theta, gamma_of(length))
        assert np.abs(mean.w.detach().numpy() - expected).max() < error * np.abs(theta).max()
        assert not mean.training and mean.mean.tolist() == [steps] * 3 and mean.count == steps
    assert np.abs(expected - theta.mean(0)).max() < 1e-12  # the longest is the plain mean


def test_fp32_hardly_drifts_in_a_long_training():
    """Late steps change a mean by 1e-4 of what it lacks, where fp32 rounds to 6e-8 of its size."""
    theta = 1 + 0.01 * trajectory(20_000, size=8)
    (mean,) = tracked(theta, (0.10,)).nets
    assert np.abs(mean.w.detach().numpy() - direct(theta, gamma_of(0.10))).max() < 3e-5


def test_a_training_takes_the_first_weights_whole_and_none_from_before():
    net = Net()
    with torch.no_grad():
        net.w.fill_(1e30)
    power = PowerEMA(net, LENGTHS)
    power.update(Net().at(1, np.full(50, 2.0)), 1)
    assert all((mean.w == 2).all() for mean in power.nets)


# ----------------------------------------------------------------------------------- reconstruction


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(theta, {number of snapshots: the folder of one run}) of 640 steps."""
    theta, folders = trajectory(640), {}
    for n in (4, 8, 16, 32):
        folders[n] = tmp_path_factory.mktemp(f"snapshots{n}") / "power"
        tracked(theta, LENGTHS, folders[n], len(theta) // n, torch.float64)
    return theta, folders


NEAR = {0.03: 3e-3, 0.07: 2e-4, 0.15: 6e-4, 0.25: 0.15}  # with 32 snapshots


@pytest.mark.parametrize("length", NEAR)
def test_a_third_length_against_one_that_was_tracked(runs, length):
    """In parts of the distance between the two means that were kept.

    The bound is Cauchy and Schwarz's: what is missed of the profile, times the trajectory.
    """
    theta, folders = runs
    (mean,) = tracked(theta, (length,), dtype=torch.float64).nets
    expected, gamma = mean.w.detach().numpy(), gamma_of(length)
    apart = np.abs(direct(theta, gamma_of(0.05)) - direct(theta, gamma_of(0.10))).max()
    spread = np.linalg.norm(theta - expected, axis=0)
    error = {}
    for n, folder in folders.items():
        steps = np.repeat(np.arange(1, n + 1) * 640.0 / n, 2)
        missed = coefficients([gamma_of(s) for s in LENGTHS] * n, steps, gamma, 640.0)[1]
        off = np.abs(reconstruct(folder, length)["w"].numpy() - expected)
        assert (off <= missed * np.sqrt(overlap(gamma, 640.0, gamma, 640.0)) * spread).all()
        error[n] = off.max() / apart
    assert all(error[2 * n] < error[n] for n in (4, 8, 16))
    assert error[32] < NEAR[length] and error[32] < error[4] / 8


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_was_tracked_comes_back(tmp_path, length):
    theta = trajectory(200)
    power = tracked(theta, LENGTHS, tmp_path, 25)
    mean, found = power.nets[LENGTHS.index(length)], reconstruct(tmp_path, length)
    assert list(found) == list(mean.state_dict()) and found["w"].dtype == torch.float32
    assert (found["w"] - mean.w).abs().max() <= 1.2e-7 * mean.w.abs().max()
    Net().load_state_dict(found)


def test_buffers_are_those_of_the_last_snapshot_and_later_ones_do_not_count(tmp_path):
    theta = trajectory(200)
    tracked(theta, LENGTHS, tmp_path / "whole", 25)
    tracked(theta[:125], LENGTHS, tmp_path / "short", 25)
    expected = reconstruct(tmp_path / "short", 0.07)
    for step in (125, 149):
        assert_same(reconstruct(tmp_path / "whole", 0.07, step), expected)
    assert expected["count"] == 125 and expected["mean"].tolist() == [125.0] * 3
    assert reconstruct(tmp_path / "whole", 0.07)["count"] == 200


def test_weights_that_never_change_stay_what_they_are(tmp_path):
    theta = np.full((100, 50), 3.25)
    tracked(theta, LENGTHS, tmp_path, 20)
    for length in (0.01, 0.07, 0.28):
        assert (reconstruct(tmp_path, length)["w"] - 3.25).abs().max() < 1e-6


def test_snapshots_are_fp32_and_what_fp16_would_cost(tmp_path):
    """Rounded to fp16, short lengths lose much more than what their snapshots miss."""
    theta = 1 + 0.01 * trajectory(640)
    tracked(theta, LENGTHS, tmp_path, 10)
    expected = direct(theta, gamma_of(0.02))
    assert np.abs(reconstruct(tmp_path, 0.02)["w"].numpy() - expected).max() < 4e-4
    for path in tmp_path.iterdir():
        state = torch.load(path, weights_only=True)
        assert all(mean["w"].dtype == torch.float32 for mean in state["means"])
        for mean in state["means"]:
            mean["w"] = mean["w"].half().float()
        torch.save(state, path)
    half = np.abs(reconstruct(tmp_path, 0.02)["w"].numpy() - expected).max()
    assert half > 4e-3


def test_a_line_says_where_snapshots_are_too_few(tmp_path, capsys):
    tracked(trajectory(40), LENGTHS, tmp_path, 10)
    SAID.clear()
    reconstruct(tmp_path, 0.07)
    assert capsys.readouterr().out == ""
    reconstruct(tmp_path, 0.01)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith(
        "note: 4 snapshots make a running mean of length 0.01 only roughly, they miss 66%"
    )


# ----------------------------------------------------------------------------------------- resuming


def test_a_mean_that_goes_on_is_the_unbroken_one_bit_for_bit(tmp_path):
    theta, net = trajectory(60), Net()
    whole = tracked(theta, LENGTHS, tmp_path / "whole", 20)
    first = tracked(theta[:33], LENGTHS, tmp_path / "broken", 20)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = PowerEMA(net, LENGTHS)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(34, 61):
        second.update(net.at(step, theta[step - 1]), step)
        if step % 20 == 0:
            second.save_snapshot(tmp_path / "broken", step)
    assert_same(second.state_dict(), whole.state_dict())
    names = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("whole", "broken")]
    assert names[0] == names[1] == [f"snapshot-00000{n}0.pt" for n in (2, 4, 6)]
    for name in names[0]:
        files = (torch.load(tmp_path / f / name) for f in ("whole", "broken"))
        assert_same(*files)


def test_a_run_keeps_it(tmp_path):
    """As keep= of Run, through two stops."""

    def start(folder, stop=None):
        torch.manual_seed(1)
        net = toy_run.Net()
        power = PowerEMA(net, LENGTHS)
        run = toy_run.make(folder, more={"net": net, "keep": {"power": power}})
        for step in run.steps():
            for part in run.parts(step):
                run.backward(*toy_run.losses_of(run, part))
            run.descend()
            power.update(net, run.step)
            if run.step == stop:
                break

    start(tmp_path / "whole")
    for stop in (5, 8, None):
        start(tmp_path / "broken", stop)
    assert_same(saved(tmp_path / "whole")["power"], saved(tmp_path / "broken")["power"])


def test_snapshots_of_another_past_go(tmp_path):
    """A run that goes on from step 20 saves every 15: those of 30 and 40 are not its own."""
    theta, net = trajectory(45), Net()
    first = tracked(theta[:20], LENGTHS, tmp_path, 10)
    state = first.state_dict()
    power = PowerEMA(net, LENGTHS)
    power.load_state_dict(state)
    tracked(theta, LENGTHS, tmp_path, 10)
    power.save_snapshot(tmp_path, 45)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        f"snapshot-{step:07d}.pt" for step in (10, 20, 45)
    ]


KILLED = """
from runtime.posthoc_ema import PowerEMA
import os, signal, sys, torch
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
PowerEMA(torch.nn.Linear(3, 3)).save_snapshot(sys.argv[1], 50)
"""


def test_killed_between_the_temporary_file_and_its_name(repo, tmp_path):
    """The snapshots before it are whole and count; what is left over goes with the next one."""
    theta = trajectory(60)
    power = tracked(theta[:40], LENGTHS, tmp_path, 20)
    expected = reconstruct(tmp_path, 0.07)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=repo)
    assert done.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left.stat().st_size > 0
    assert_same(reconstruct(tmp_path, 0.07), expected)
    power.save_snapshot(tmp_path, 60)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"snapshot-{step:07d}.pt" for step in (20, 40, 60)
    ]


# ---------------------------------------------------------------------------------------- bad input


def refused(match, function, *arguments):
    with pytest.raises(BadInput, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0, float("nan"), float("inf")])
def test_a_length_out_of_range(length, tmp_path):
    what = "expected a number above 0 and at most 0.2886, that of the plain mean"
    refused(what, reconstruct, tmp_path, length)
    refused(what, PowerEMA, Net(), (0.05, length))


def test_lengths_that_are_there_twice_or_not_those_of_the_checkpoint():
    refused("expected different ones", PowerEMA, Net(), (0.05, 0.1, 0.05))
    assert PowerEMA(Net(), ()).nets == []
    state = PowerEMA(Net(), (0.05,)).state_dict()
    refused(
        r"of lengths \[0.05\], expected \[0.1\]", PowerEMA(Net(), (0.1,)).load_state_dict, state
    )


def test_missing_snapshots(tmp_path):
    refused("no running means: edm.py --ema-lengths", reconstruct, tmp_path, 0.07)
    tracked(trajectory(20), LENGTHS, tmp_path, 10)
    gone = "snapshot-0000015.pt is missing, of 3 snapshots"
    refused(gone, posthoc_ema.reconstruct, tmp_path, 0.07, [10, 15, 20])
    os.rename(tmp_path / "snapshot-0000010.pt", tmp_path / "snapshot-0000015.pt")
    refused("another network or step", reconstruct, tmp_path, 0.07)


def written(path, how):
    """Spoil a snapshot."""
    raw = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if how == "cut in half":
        return path.write_bytes(raw[: len(raw) // 2])
    if how == "empty":
        return path.write_bytes(b"")
    if how == "a byte of a tensor":
        at = raw.index(state["means"][0]["w"].numpy().tobytes())
        return path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    if how == "a list":
        return torch.save([1, 2], path)
    if how == "a checkpoint":
        return torch.save({"script": "edm", "config": {}, "step": 1, "model": {}}, path)
    changes = {"a length": {"lengths": [0.05, 3.0]}, "a mean less": {"means": state["means"][:1]}}
    changes["numbers"] = {"means": [{"w": 1.0}, {"w": 2.0}]}
    return torch.save(state | changes[how], path)


@pytest.mark.parametrize(
    "how",
    [
        "cut in half",
        "empty",
        "a byte of a tensor",
        "a list",
        "a checkpoint",
        "a length",
        "a mean less",
        "numbers",
    ],
)
def test_damaged_or_foreign_files(how, tmp_path):
    tracked(trajectory(30), LENGTHS, tmp_path, 10)
    path = tmp_path / "snapshot-0000020.pt"
    written(path, how)
    refused(f"{path} is (truncated or no|no|damaged)", reconstruct, tmp_path, 0.07)


def test_a_snapshot_that_is_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    torch.save({"step": 1, "lengths": [0.05], "means": [Trap()]}, tmp_path / "snapshot-0000001.pt")
    refused("truncated or no snapshot", reconstruct, tmp_path, 0.07)
    assert not (tmp_path / "trap").exists()


def test_snapshots_of_another_network(tmp_path):
    tracked(trajectory(30), LENGTHS, tmp_path, 10)
    tracked(trajectory(20, size=7), LENGTHS, tmp_path / "other", 10)
    os.replace(tmp_path / "other" / "snapshot-0000020.pt", tmp_path / "snapshot-0000020.pt")
    refused(
        "0000020.pt is of another network or step than .*0000030.pt", reconstruct, tmp_path, 0.07
    )
