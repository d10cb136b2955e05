"""--precision: which one a GPU gets, and training in fp16 with a scaled loss, on the CPU."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput, check_processes
from runtime.precision import dtype_of
from runtime.processes import World

import functools
import math

import numpy as np
import pytest
import rank_precision
import torch
from launching import start_ranks, succeed
from run_folders import assert_same, assert_same_run, rows, saved, saved_step
from tiny_runs import TRAININGS, flags
from toy_run import losses_of, make, weights

FP16, CUDA = World(precision="fp16"), torch.device("cuda")
START = 2.0**16  # the first factor of a loss


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((10, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),  # T4
        ((7, 0), torch.float16),  # V100
        ((6, 1), torch.float32),
    ],
)
def test_a_gpu_gets_the_precision_that_it_has(capability, expected, monkeypatch):
    """Also where bf16 is there by emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert dtype_of("auto", CUDA) is expected
    assert dtype_of("fp32", CUDA) is torch.float32 and dtype_of("fp16", CUDA) is torch.float16


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_networks_compute_in_what_is_asked_for_and_on_a_cpu_in_fp32(precision):
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    layer = torch.nn.Conv2d(1, 1, 1)
    with World(precision=precision).autocast():
        assert layer(torch.zeros(1, 1, 2, 2)).dtype is expected
    assert layer(torch.zeros(1, 1, 2, 2)).dtype is torch.float32


def test_bf16_is_refused_where_a_gpu_would_emulate_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(BadInput, match="--precision bf16: Tesla T4 would emulate it .* type fp16"):
        check_processes(1, 8, precision="bf16")
    for gpus, precision in ((1, "fp16"), (1, "auto"), (0, "bf16")):
        check_processes(gpus, 8, precision=precision)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    check_processes(1, 8, precision="bf16")


# --------------------------------------------------------------------------------- the scaled loss


def train(run, stop=None, worse=(), factor=1e30):
    """As toy_run.train; at the steps `worse` the loss is `factor` times as large, but finite."""
    for step in run.steps():
        for part in run.parts(step):
            losses, level = losses_of(run, part)
            run.backward(losses * (factor if step in worse else 1), level)
        run.descend()
        if run.step == stop:
            break
    return run


def gradients(run, factor):
    """Of the first step, whose loss is `factor` times as large, divided by that, in float64."""
    (part,) = run.parts(0)
    run.backward(losses_of(run, part)[0] * factor)
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    return torch.cat([p.grad.double().flatten() for p in run.net.parameters()]) / factor


def test_gradients_too_small_for_fp16_are_those_of_fp32(tmp_path, monkeypatch):
    """They are about 1e-9 here; fp16 ends at 6e-8."""
    exact = gradients(make(tmp_path / "exact"), 2.0**-20)
    scaled = gradients(make(tmp_path / "scaled", world=FP16), 2.0**-20)
    assert (scaled - exact).norm() < 3e-3 * exact.norm()
    plain = make(tmp_path / "plain", world=FP16)
    monkeypatch.setattr(plain.scaler, "scale", lambda loss: loss)
    monkeypatch.setattr(plain.scaler, "unscale_", lambda optimizer: None)
    assert (gradients(plain, 2.0**-20) - exact).norm() > 0.1 * exact.norm()


def optimizer(kind):
    return functools.partial(torch.optim.Adam, lr=1e-3, fused=kind == "fused")


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_step_whose_gradient_overflows_is_skipped_and_logged(kind, tmp_path):
    seen = {}
    how = {"world": FP16, "optimizer": optimizer(kind), "log_every": 2, "save_every": 2}
    run = make(tmp_path, **how)
    for step in run.steps():
        for part in run.parts(step):
            losses, level = losses_of(run, part)
            run.backward(losses * (1e30 if step in (3, 5, 6) else 1), level)
        run.descend()
        seen[step] = weights(run.net), weights(run.ema), run.scaler.get_scale()
    for step in range(1, 10):
        (before, mean_before, _), (after, mean, _) = seen[step - 1], seen[step]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert moved == (step not in (3, 5, 6))
        low, high = (torch.cat([v.flatten() for v in vs]) for vs in (mean_before, after))
        between = torch.cat([v.flatten() for v in mean])
        assert ((between - low).abs() <= (high - low).abs() + 1e-6).all()
    assert [math.log2(START / scale) for _, _, scale in seen.values()] == [
        *(0, 0, 0, 1, 1, 2, 3, 3, 3, 3)
    ]
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 1, 1, 0]
    found = saved(tmp_path)["optimizer"]["state"]
    assert all(value["step"] == 7 for value in found.values())


def test_a_loss_that_is_not_finite_still_ends_the_run(tmp_path):
    with pytest.raises(BadInput, match="loss is not finite at step 4; the last good checkpoint"):
        train(make(tmp_path, world=FP16), worse=[4], factor=math.inf)
    assert saved_step(tmp_path) == 3


def test_a_run_whose_gradient_always_overflows_ends_with_a_line(tmp_path):
    run = make(tmp_path, world=FP16, steps=50, log_every=1, save_every=50)
    with pytest.raises(BadInput, match="overflows in fp16 .* at step 30; type --precision fp32"):
        train(run, worse=range(50))


@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("stops", [(2, 5), (4, 8)], ids=str)
def test_a_run_in_fp16_goes_on_bit_for_bit(kind, stops, tmp_path):
    """Also how many good steps there were since the factor changed: it doubles after four."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    how = {"world": FP16, "optimizer": optimizer(kind), "dropout": 0.5, "accumulate": 2}
    for folder, halts in ((whole, ()), (broken, stops)):
        for stop in (*halts, None):
            run = make(folder, **how, save_every=2)
            run.scaler.set_growth_interval(4)
            train(run, stop, worse=[1, 6])
    assert_same_run(whole, broken)
    state = saved(whole)["scaler"]
    assert state["scale"] == START / 2 and state["_growth_tracker"] == 3
    assert [row["skipped_steps"] for row in rows(whole)] == [0, 1, 0, 0, 0, 0, 1, 0, 0, 0]


def test_a_run_goes_on_in_another_precision(tmp_path):
    """One in fp16 starts with a factor of its own after one in fp32, whose checkpoint has none."""
    for stop, precision in ((3, "fp32"), (6, "fp16"), (9, "bf16"), (None, "fp16")):
        run = make(tmp_path, world=World(precision=precision), precision=precision)
        assert run.first == saved_step(tmp_path)
        train(run, stop and stop + 1)
    log = rows(tmp_path)
    assert [row["step"] for row in log if "skipped_steps" in row] == [4, 5, 6, 10]
    assert saved(tmp_path)["scaler"]["scale"] == START


def test_a_checkpoint_of_before_there_was_a_precision_goes_on(tmp_path):
    train(make(tmp_path, steps=3))
    state = load_checkpoint(tmp_path / "ckpt.pt")
    del state["scaler"], state["config"]["precision"], state["config"]["graph"]
    torch.save(state, tmp_path / "ckpt.pt")
    assert make(tmp_path, world=FP16).first == 3


def test_without_fp16_nothing_is_multiplied(tmp_path):
    for precision in ("auto", "bf16"):
        run = make(tmp_path / precision, world=World(precision=precision))
        assert run.scaler is None
        train(run)
        assert saved(tmp_path / precision)["scaler"] == {}
        assert all("skipped_steps" not in row for row in rows(tmp_path / precision))


# ------------------------------------------------------------------------ with all that chapters do


def test_split_over_two_ranks_both_skip_what_overflows_on_one(tmp_path):
    """And step as one process does, but for fp16's rounding and another order of sums."""
    done = [rank.wait() for rank in start_ranks("rank_precision", tmp_path)]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    alone = rank_precision.see(FP16)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert [step[1:] for step in first] == [step[1:] for step in second]
    assert [step[1:] for step in first] == [[START, 0], [START / 2, 1], [START / 2, 1]]
    assert_same(dict(first[1][0]), dict(first[0][0]))
    for (found, *_), (expected, *_) in zip(first, alone, strict=True):
        torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-3)
    moved = max((first[2][0][n] - v).abs().max() for n, v in first[1][0].items())
    assert moved > 1e-2


@pytest.mark.parametrize("script", TRAININGS)
def test_every_chapter_trains_and_samples_in_fp16(script, toy, tiny, tmp_path):
    """The losses are those of fp32, but for rounding."""
    few = {} if script == "classifier_guidance" else {"n": 4}  # which draws the networks of others
    few |= {"steps": 6, "save_every": 2, "sample_every": 0}
    given = [*tiny[script], *toy, *flags(script, **few)]
    for precision in ("fp16", "fp32"):
        succeed(script, *given, "--precision", precision, "--out", tmp_path / precision)
    half, full = (rows(tmp_path / precision) for precision in ("fp16", "fp32"))
    assert len(half) == len(full) == 6 and all("skipped_steps" in row for row in half)
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=2e-3)
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.2)


def test_an_adversarial_autoencoder_in_fp16_goes_on_bit_for_bit(tmp_path):
    from data_files import write_images

    folder = write_images(tmp_path / "images", 24, height=32, width=32)
    given = ["--data", folder, "--data-root", tmp_path / "root", "--gpus", 0, "--smoke"]
    given += ["--discriminator", 0.5, "--disc-start", 2, "--save-every", 2, "--sample-every", 0]
    given += ["--precision", "fp16", "--log-every", 1]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("autoencoder", *given, "--steps", 8, "--lr-decay", "none", "--out", whole)
    for steps in (4, 8):
        more = ["--steps", steps, "--resume", "auto", "--lr-decay", "none", "--out", broken]
        succeed("autoencoder", *given, *more)
    states = [saved(folder) for folder in (whole, broken)]
    for state in states:
        state.pop("config")
    assert_same(*states)
    assert rows(whole) == rows(broken)
    assert np.isfinite([row["generator"] for row in rows(whole) if "generator" in row]).all()
    assert states[0]["adversary"]["scaler"]["scale"] > 0
