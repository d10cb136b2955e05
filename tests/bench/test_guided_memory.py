"""bench/guided_memory.py: its bytes are those of PyTorch's allocator, and of the right row."""

from runtime.commandline import BadInput

import importlib
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile


@pytest.fixture(scope="module")
def bench():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.guided_memory")
    finally:
        sys.path[:] = path


def row(bench, way):
    """(a walk of 8 images in 2 steps, bytes of its weights, live bytes beside them at most)."""
    nets = bench.networks("mnist", way, "cpu", quick=True)
    walk = bench.walk_of("mnist", way, nets, 8, 2, "cpu")
    weights = [each for net in nets for each in net.parameters()]
    held = sum(each.nbytes for each in weights)
    with bench.LiveBytes(weights) as live:
        walk()
    return walk, held, live.peak - held


# ------------------------------------------------------------------------------- live tensors


def test_known_allocations(bench):
    bench.check_live_bytes()


@pytest.mark.parametrize("missed", ["views", "the graph"])
def test_one_that_miscounts_is_found(bench, monkeypatch, missed):
    class Wrong(bench.LiveBytes):
        def follow(self, tree):
            held = torch.utils._pytree.tree_leaves(tree)
            for tensor in held:
                if missed == "views":  # counts each view as memory of its own
                    self.sizes[tensor] = tensor.nbytes
                elif not torch.is_grad_enabled() or not self.sizes:  # forgets what is kept
                    self.sizes[tensor.untyped_storage()] = tensor.nbytes
            self.peak = max(self.peak, self.now)

    monkeypatch.setattr(bench, "LiveBytes", Wrong)
    with pytest.raises(RuntimeError, match="live bytes, not"):
        bench.check_live_bytes()


def test_memory_that_grows_in_place_is_counted(bench):
    with bench.LiveBytes() as live:
        x = torch.zeros(100)
        x.resize_(1000)
        assert live.now == 4000
    del x
    assert (live.now, live.peak) == (0, 4000)


def test_a_graph_of_convolutions_keeps_their_inputs(bench):
    x, weight = torch.randn(4, 8, 16, 16), torch.randn(8, 8, 3, 3, requires_grad=True)
    one = x.nbytes

    def chain():
        h = x
        for _ in range(5):
            h = F.conv2d(h, weight, padding=1)
        return h

    with bench.LiveBytes() as live:
        h = chain()
        assert live.now == 5 * one
        del h
        assert live.now == 0
    with torch.no_grad(), bench.LiveBytes() as live:
        chain()
    assert live.peak == 2 * one  # x is not among them: no operator gave it


@pytest.mark.parametrize("way", ["plain", "guided", "guided, checkpoint, half batches"])
def test_the_peak_is_that_of_pytorchs_allocator(bench, way):
    walk, _, peak = row(bench, way)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        walk()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # what is given, and taken back
        now += event.nbytes()
        most = max(most, now)
    # It alone sees temporaries of an operator, LiveBytes alone what was made before: alpha_bar.
    assert now == 0 and most == pytest.approx(peak, rel=0.01)


# ------------------------------------------------------------------------------------- the rows


def test_every_row_sees_the_parts_that_it_names(bench):
    for way in bench.WAYS:
        seen, nets = [], bench.networks("mnist", way, "cpu", quick=True)
        for net in nets:

            def look(net, inputs, seen=seen):
                seen.append((type(net).__name__, len(inputs[0])))

            net.register_forward_pre_hook(look)
        bench.walk_of("mnist", way, nets, 8, 1, "cpu")()
        checkpointed, parts = bench.WAYS[way] or (False, 0)
        part = ("NoisyClassifier", 8 // max(parts, 1))
        assert sorted(seen) == [*parts * [part], ("UNet", 8)]
        assert len(nets) == (2 if parts else 1)
        assert all(net.use_checkpoint is checkpointed for net in nets[1:])


def test_a_row_has_a_process_of_its_own_and_its_weights_apart(bench):
    measured = bench.apart("mnist", "guided", 8, 2, "cpu", True, threads=1)
    _, held, peak = row(bench, "guided")
    assert measured["activations"] == peak and measured["tensors"] == held + peak
    assert measured["tensors"] < measured["added RSS"] < measured["RSS"] < 4e9


def test_a_process_that_fails_is_an_error(bench, capfd):
    with pytest.raises(RuntimeError, match="mnist, no such row: the process failed"):
        bench.apart("mnist", "no such row", 8, 1, "cpu", True, threads=1)
    assert "KeyError" in capfd.readouterr().err


def test_rss_is_the_kernels(bench):
    before = bench.status("VmRSS")
    size = 2**26  # of the kernel's own: a tensor may get memory that an earlier one has left
    block = mmap.mmap(-1, size)
    for place in range(0, size, mmap.PAGESIZE):
        block[place] = 1
    assert bench.status("VmRSS") - before == pytest.approx(size, rel=0.1)
    block.close()
    assert bench.status("VmHWM") - bench.status("VmRSS") > 0.9 * size


# ------------------------------------------------------------------------------------ the table


def test_turns_alternate(bench, monkeypatch):
    order, times = [], iter(range(100))
    monkeypatch.setattr(bench, "clock", lambda: next(times))
    walks = {name: lambda name=name: order.append(name) for name in "ab"}
    found = bench.take_turns(walks, rounds=2, steps=4, tick=lambda: None)
    assert order == ["a", "b", "a", "b", "b", "a"] and found == {"a": [0.25] * 2, "b": [0.25] * 2}


def figures(bench, **changed):
    """All memory of a guided row 1.5 times the plain step's, but for what is named."""
    plain = dict.fromkeys(bench.MEMORY, 2e6)
    rows = {"plain": plain} | {way: dict.fromkeys(bench.MEMORY, 3e6) for way in "xyz"}
    for way, columns in changed.items():
        rows[way] |= columns
    seconds = {"plain": [1, 2, 4], "x": [2, 4, 8], "y": [3, 2, 6], "z": [9, 9, 9]}
    return rows, seconds


def test_ratios_of_time_are_those_of_a_round(bench):
    lines = list(bench.table(*figures(bench)))
    assert lines[2] == "| plain " + 4 * "| 2.0 | 1.000 " + "| 2.000 | 1.00 |"
    assert lines[3] == "| x " + 4 * "| 3.0 | 1.500 " + "| 4.000 | 2.00 |"
    assert lines[4] == "| y " + 4 * "| 3.0 | 1.500 " + "| 3.000 | 1.50 |"  # of 3, 1 and 1.5
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("column", range(4))
def test_the_goal_is_missed_by_any_ratio_of_memory(bench, column):
    over = {bench.MEMORY[column]: 3.2e6}  # 1.6 times: not below
    assert bench.reached(*figures(bench, y=over)) == {"x": (2, 1.5), "z": (4.5, 1.5)}


def test_the_program(bench, monkeypatch, capsys):
    """Small networks; a row's own process is spared, which other tests start."""
    ways = {way: bench.WAYS[way] for way in ("plain", "guided", "guided, half batches")}
    monkeypatch.setattr(bench, "WAYS", ways)
    calls = []

    def apart(setting, way, *how, threads):
        calls.append((setting, way, *how, threads))
        return dict.fromkeys(bench.MEMORY, {"plain": 2, "guided": 4}.get(way, 3))

    monkeypatch.setattr(bench, "apart", apart)
    bench.main(["--quick", "--gpus", "0", "--batch", "4", "--steps", "1"])
    out = capsys.readouterr().out.splitlines()
    assert calls == [(s, way, 4, 1, "cpu", True, 1) for s in bench.SETTINGS for way in ways]
    assert out.count("below 1.6 times a plain step in all memory: guided, half batches") == 2
    assert out[-1].startswith("cheapest in time below 1.6 times: mnist, guided, half batches: ")
    assert "; cifar10, guided, half batches: " in out[-1]
    assert out[-1].endswith("times the seconds, 1.500 times the memory at most")
    ways.pop("guided, half batches")
    bench.main(["--quick", "--gpus", "0", "--only", "mnist", "--batch", "1", "--steps", "1"])
    assert capsys.readouterr().out.endswith("cheapest in time below 1.6 times: mnist, NONE\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 1, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--batch", "-2"], "--batch must be at least 1, or 0 for the default, got -2"),
        (["--gpus", "1"], "--gpus 1: PyTorch finds no GPU here; type --gpus 0"),
    ],
)
def test_bad_input_is_named(bench, flags, named, monkeypatch):
    monkeypatch.setattr(bench, "default_gpus", lambda: 0)
    with pytest.raises(BadInput, match=named):
        bench.parse(flags)
