"""bench/objectives.py: what it trains, draws and tells, on toy images."""

from runtime.commandline import BadInput
from runtime.files import read_log

import argparse
import importlib
import sys

import pytest
import torch
from data_files import write_images

import flow_matching
from networks.adm_unet import UNet


@pytest.fixture
def bench(monkeypatch):
    """The module; as a program it puts the project's folder in place of its own on the path."""
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    return importlib.import_module("bench.objectives")


def test_all_four_train_one_network_alike(bench):
    """The settings of the files that it names: the same U-Net, batches, rate and running mean."""
    from runtime.commandline import parse

    for data in bench.STEPS:
        found = []
        for script, configs, flags in bench.OBJECTIVES.values():
            module, path = importlib.import_module(script), bench.REPO / "configs"
            given = ["--config", str(path / f"{configs[data]}.yaml"), *flags]
            cfg = parse(module.Config, "", given)
            with torch.device("meta"):
                shape = (1, 28, 28) if data == "mnist" else (3, 32, 32)
                if script == "ddpm_pixel":
                    net = module.UNet(shape, 10, cfg)
                else:
                    net = module.make_net(cfg, shape, 10)
            sizes = sorted(p.numel() for p in net.parameters())
            alike = ("batch_size", "lr", "warmup", "lr_decay", "ema", "clip_grad", "flip", "seed")
            found.append((sizes, [getattr(cfg, name) for name in (*alike, "label_dropout")]))
        for other in found:
            assert other == found[0]


def test_walks_cost_what_is_said(bench):
    """Every solver calls the network as often as its row says."""
    judge = bench.Judge(None, "mnist", bench.World())

    class Counted(UNet):
        calls = 0

        def forward(self, x, t, y=None):
            Counted.calls += 1
            return super().forward(x, t, y)

    how = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1}
    net = Counted((1, 4, 4), 2, **how, attention_resolutions=(), style="ddpm", norm_groups=2)
    alpha_bar = flow_matching.ddpm_pixel.make_alpha_bar("linear", 100)
    columns = {
        "flow": flow_matching.straight,
        "edm": flow_matching.Bent(bench.edm.Edm(0.5)),
        "eps": flow_matching.Bent(bench.edm.Chain(alpha_bar)),
    }
    seeds = torch.arange(2)
    for name, column in columns.items():
        flow = flow_matching.Flow(net, flow_matching.Space((1, 4, 4)), ["a", "b"], column)
        for solver, calls in bench.ways_of(flow).values():
            Counted.calls = 0
            *_, (x, _) = judge.walk(flow, solver, 3)(seeds, seeds)
            assert Counted.calls == calls(3) and x.shape == (2, 1, 4, 4), (name, solver)


def row(most, objective="eps", solver="DDIM", **more):
    told = {"data": "mnist", "objective": objective, "solver": solver, "most": most, "n": 80}
    told |= {"evaluations": most, "frechet": 1.5, "interval": [1.25, 1.75], "cpu_s": 90.0}
    told |= {"inception_score": 9.5, "precision": 0.75, "recall": 0.5, "class_accuracy": 0.9}
    return told | {"protocol": "features of a test"} | more


def test_what_it_tells(bench, tmp_path):
    rows = [row(1), row(10, frechet=0.5, interval=[0.4, 0.6]), row(50), row(10, "flow", "Euler")]
    args = argparse.Namespace(command="python x", n={"mnist": 80}, evaluations=[1, 10, 50])
    text = "\n".join(bench.text_of(rows, args))
    assert "| mnist | eps | DDIM | 1.5 | 1.50 (1.25 to 1.75) | 0.50 (0.40 to 0.60) |" in text
    assert "| mnist | flow | Euler | 1.5 |  | 1.50 (1.25 to 1.75) |  |" in text
    assert "In at most 1 evaluations" in text and "| 9.50 | 0.75 | 0.50 | 0.90 |" in text
    assert "features of a test" in text and "N = 80" in text
    bench.draw(tmp_path / "objectives.png", rows, args)
    assert (tmp_path / "objectives.png").stat().st_size > 10_000


def test_four_trainings_are_scored_and_the_same_command_goes_on(bench, monkeypatch, tmp_path):
    images = write_images(tmp_path / "toy", 100, height=8, width=8)
    few = tmp_path / "few.yaml"
    few.write_text("model_channels: 16\nchannel_mult: [1, 2]\nbatch_size: 8\nwarmup: 1\n")
    data, config = str(images), {str(images): str(few.with_suffix(""))}
    monkeypatch.setattr(bench, "STEPS", {data: 2})
    for name, (script, _, flags) in bench.OBJECTIVES.items():
        flags = [*flags, "--data", data]
        monkeypatch.setitem(bench.OBJECTIVES, name, (script, config, flags))
    out = tmp_path / "out"
    asked = ["--data", data, "--data-root", str(tmp_path / "prepared"), "--gpus", "0"]
    asked += ["--n", "80", "--evaluations", "1", "3", "--classifier-steps", "3", "--out", str(out)]
    bench.main(asked)
    rows = read_log(out / "objectives.jsonl")
    told = [(row["objective"], row["solver"], row["evaluations"]) for row in rows]
    chain = [("DDIM", 1), ("DDIM", 3), ("DPM-Solver++", 3)]
    ode = [("Euler", 1), ("Euler", 3), ("Heun", 3)]
    line = [*ode[:2], ("Heun", 2), ("midpoint", 2)]
    assert told == [
        (name, *way)
        for name in ("eps", "v", "edm", "flow")
        for way in {"edm": ode, "flow": line}.get(name, chain)
    ]
    assert (out / "objectives.png").exists() and "CPU minutes" in (
        out / "objectives.md"
    ).read_text()
    bench.main(asked)  # all rows are there
    assert read_log(out / "objectives.jsonl") == rows


def test_a_number_of_samples_for_each_data_set(bench):
    found = bench.parse(["--n", "500", "250", "--data", "cifar10", "mnist"])
    assert found.n == {"cifar10": 500, "mnist": 250}
    assert bench.parse(["--n", "90"]).n == {"mnist": 90, "cifar10": 90}
    with pytest.raises(BadInput, match="one for each --data: mnist"):
        bench.parse(["--n", "90", "91", "--data", "mnist"])


@pytest.mark.parametrize("words", [["--n", "79"], ["--evaluations", "0"], ["--steps", "-1"]])
def test_bad_input_in_one_line(bench, words, tmp_path):
    with pytest.raises(BadInput, match="--n must be at least 80"):
        bench.main([*words, "--gpus", "0", "--out", str(tmp_path)])
