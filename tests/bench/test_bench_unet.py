"""bench/unet.py on a small network: it runs to its end, and times only what computes the same."""

from runtime.commandline import BadInput

import importlib
import json
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def speed():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.unet")
    finally:
        sys.path[:] = path


@pytest.fixture(scope="module")
def loaded(speed):
    return speed.load_diffusers()


@pytest.fixture
def small(speed, loaded):
    """(our network, diffusers' with the same weights, a batch)."""
    ours, theirs, shape = speed.networks(True, loaded[0])
    return ours, theirs, speed.batch(2, shape)


def test_quick_prints_a_table_and_one_line_of_json(speed, capsys):
    speed.main(["--quick", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert {"cpu", "torch", "diffusers", "threads", "rounds", "parameters"} <= found.keys()
    assert found["threads"] == 1 and found["rounds"] == 2
    rows = {(row["what"], row["name"]): row for row in found["rows"]}
    for what in ("forward", "update", "noise", "step"):
        assert rows[what, "diffusers"]["ratio"] == rows[what, "diffusers"]["cpu_ratio"] == 1
        assert rows[what, "here"]["ratio"] > 0 and rows[what, "here"]["ms"] > 0
        assert sum(line.startswith(f"{what}, ") for line in lines) >= 2
    seconds = rows["forward", "here"]["cpu_ms"] / 1e3
    assert found["gflop_per_cpu_s"] == pytest.approx(found["gflop"] / seconds)
    rate = 2 * 256**3 / 1e9 / (rows["product", "torch.mm"]["cpu_ms"] / 1e3)
    assert found["share_of_mm"] == pytest.approx(found["gflop_per_cpu_s"] / rate)


def test_only_what_computes_the_same_is_timed(speed, small, loaded):
    ours, theirs, inputs = small
    assert list(speed.forwards(ours, theirs, inputs, False)) == ["diffusers", "here"]
    with torch.no_grad():
        ours.down[0][0].conv1.weight[0, 0, 0, 0] += 0.01
    with pytest.raises(RuntimeError, match="forward of here: the two differ by"):
        speed.forwards(ours, theirs, inputs, False)
    with pytest.raises(RuntimeError, match="loss|gradient"):
        speed.steps(ours, theirs, inputs, loaded[1], loaded[3])


def test_both_training_steps_change_their_weights_alike(speed, small, loaded):
    ours, theirs, inputs = small
    for net in (ours, theirs):
        for part in net.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    before = ours.conv_in.weight.detach().clone()
    for step in speed.steps(ours, theirs, inputs, loaded[1], loaded[3]).values():
        step()
    moved = ours.conv_in.weight - before
    # Adam's first step is lr times the sign of the gradient, where that is not tiny.
    assert moved.abs().max().item() == pytest.approx(2e-4, rel=1e-3)
    assert (moved - (theirs.conv_in.weight - before)).abs().max() < 1e-6


def test_flops_are_those_counted_by_hand(speed):
    """One level without attention below it: every convolution, linear layer and product."""
    from ddpm_pixel import Config, UNet

    small = dict(model_channels=4, channel_mult=(1,), num_res_blocks=1, norm_groups=1)
    net = UNet((1, 4, 4), 0, Config(attention_resolutions=(), **small))
    n, c, pixels = 2, 4, 16
    conv = sum(m.weight[0].numel() * m.out_channels for m in net.modules() if is_conv(m)) * pixels
    tokens = 2 * pixels * pixels * c  # scores, sums; qkv and proj are among the convolutions
    emb = 4 * 16 + 16 * 16 + 5 * 16 * 4  # the timestep's two layers; one of each residual block
    assert speed.flops(net, speed.batch(n, (1, 4, 4))) == 2 * n * (conv + tokens + emb)


def is_conv(module):
    return isinstance(module, torch.nn.Conv2d)


def test_contenders_take_turns_and_ratios_are_of_the_same_round(speed):
    seen, bar = [], type("Bar", (), {"update": lambda self: None})()
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = speed.take_turns(calls, 3, bar)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"  # the first two are not timed
    assert all(len(seconds) == 3 for pair in times.values() for seconds in pair)
    times = {"diffusers": ([2.0, 20.0, 6.0], [1.0] * 3), "here": ([1.0, 5.0, 2.0], [2.0] * 3)}
    row = speed.row("step", "here", times, scale=2)
    assert row["ratio"] == 3 and row["cpu_ratio"] == 0.5  # the median of 2, 4 and 3
    assert row["ms"] == 1000 and row["cpu_ms"] == 1000


def test_without_diffusers_one_line_names_what_to_install(speed, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r'diffusers.*pip install -e "\.\[test\]"$'):
        speed.main(["--quick"])


@pytest.mark.parametrize("flag", ["--threads", "--rounds"])
def test_negative_numbers_are_refused(speed, flag):
    with pytest.raises(BadInput, match=f"{flag} must not be negative"):
        speed.parse([flag, "-1"])
