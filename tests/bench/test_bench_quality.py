"""bench/quality.py without training: what it computes, prints and refuses; the peer it builds."""

from runtime.commandline import BadInput, parse

import importlib
import importlib.util
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import ddim
import ddpm_pixel

PEER = importlib.util.find_spec("denoising_diffusion_pytorch") is not None


@pytest.fixture
def quality(monkeypatch):
    """The module; as a program it puts the project's folder in place of its own on the path."""
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    return importlib.import_module("bench.quality")


@pytest.fixture
def peers(quality):
    if not PEER:
        pytest.skip("denoising-diffusion-pytorch is not installed")
    return quality.peers


def row(network, frechet, **more):
    return {"network": network, "frechet": frechet, "n": 500, "samples": f"{frechet}", **more}


# ---------------------------------------------------------------------------------------- budget


def test_steps_fill_the_budget_and_no_more(quality):
    start, each = 7.0, 0.5
    short, long = ((n, start + each * n) for n in (8, 60))
    for budget in (8.0, 60.0, 720.25):
        steps = quality.steps_within(budget, short, long)
        assert start + each * steps <= budget < start + each * (steps + 1)


def test_a_budget_without_a_step_is_refused_with_one_that_has_twenty(quality):
    short, long = (8, 11.0), (60, 37.0)  # 7 s and 0.5 s each
    with pytest.raises(BadInput, match=r"0.1 minutes are too few: 7 s .* --minutes 0.3$"):
        quality.steps_within(6.0, short, long)
    assert quality.steps_within(0.3 * 60, short, long) >= 20


def test_longer_runs_that_cost_nothing_are_an_error(quality):
    with pytest.raises(RuntimeError, match="took no longer"):
        quality.steps_within(60.0, (8, 11.0), (60, 11.0))


# ------------------------------------------------------------------------------------- processes


def test_processes_are_charged_their_own_cpu_time(quality, tmp_path):
    busy = "import time\nwhile time.process_time() < {}: pass\nprint('done', flush=True)"
    code = {"a/b": busy.format(0.5), "c": busy.format(0.1), "idle": "import time; time.sleep(1)"}
    seconds = quality.run_beside({name: ["-c", text] for name, text in code.items()}, tmp_path)
    assert 0.5 <= seconds["a/b"] < 0.9 and 0.1 <= seconds["c"] < 0.5 and seconds["idle"] < 0.4
    assert (tmp_path / "a" / "b" / "log.txt").read_text() == "done\n"


def test_a_process_that_fails_ends_the_others_and_shows_its_log(quality, tmp_path):
    left = tmp_path / "left"
    sleeper = f"import time, pathlib; time.sleep(5); pathlib.Path({str(left)!r}).touch()"
    broken = "import sys; sys.exit('no such luck')"
    commands = {"sleeper": ["-c", sleeper], "broken": ["-c", broken]}
    with pytest.raises(RuntimeError, match=r"broken ended with status 1: no such luck"):
        quality.run_beside(commands, tmp_path)
    assert not left.exists()
    assert quality.run_beside({}, tmp_path) == {}


def test_a_peer_that_had_less_time_than_chapter_1_goes_on(quality, tmp_path, monkeypatch):
    args = quality.parse(["--out", str(tmp_path / "new"), "--minutes", "1"])
    cfg = parse(ddpm_pixel.Config, "", args.ours)
    calls = []

    def ran(commands, out):
        calls.append(commands)
        if "8 steps" in commands:
            return {"8 steps": 14.0, "60 steps": 40.0, "peer": 10.0}  # 10 s and 0.5 s each
        for name, command in commands.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            if name != "chapter-1":
                limit = float(command[command.index("--cpu-seconds") + 1])
                torch.save({"step": round(limit)}, out / name / "state.pt")
        if "chapter-1" in commands:
            return {"chapter-1": 64.0, "peer-lr-0.0001": 61.0, "peer-lr-0.001": 64.5}
        return dict.fromkeys(commands, 3.5)

    monkeypatch.setattr(quality, "run_beside", ran)
    told = quality.train_all(args, cfg, 28, [1e-4, 1e-3])
    ours = calls[1]["chapter-1"]
    assert ours[ours.index("--steps") + 1] == 100
    assert [list(commands) for commands in calls[1:]] == [
        ["chapter-1", "peer-lr-0.0001", "peer-lr-0.001"],
        ["peer-lr-0.0001"],
    ]
    assert told["chapter-1"] == {
        "cpu_minutes": 64 / 60,
        "steps": 100,
        "images": 100 * cfg.batch_size,
    }
    assert told["peer-lr-0.0001"]["cpu_minutes"] == pytest.approx(64.5 / 60)
    assert (told["peer-lr-0.0001"]["steps"], told["peer-lr-0.001"]["steps"]) == (64, 60)


def test_what_was_trained_is_only_sampled_again(quality, peers, toy, tmp_path, monkeypatch, capsys):
    trainings, black = [], np.zeros((4, 8, 8, 1), np.uint8)

    def trained(args, cfg, dim, rates):
        trainings.append(rates)
        names = ["chapter-1", *map(quality.peer_name, rates)]
        return {name: {"cpu_minutes": 1.0, "steps": 7, "images": 56} for name in names}

    def sampled(args, cfg, runs):
        rows = []
        for distance, (name, figures) in enumerate(runs.items()):
            (args.out / name).mkdir(exist_ok=True)
            np.savez(args.out / name / "samples.npz", black)
            rows.append(figures | {"n": 4, "frechet": float(distance), "samples": name})
        return rows, "some features"

    monkeypatch.setattr(quality, "train_all", trained)
    monkeypatch.setattr(quality, "sample_all", sampled)
    monkeypatch.setattr(quality.peers, "matched_dim", lambda *_: (8, 100))
    out = tmp_path / "new"
    out.mkdir()
    command = [*toy, "--out", str(out), "--peer-lr", "1e-3", "3e-4"]
    chapter = ["--", "--model-channels", "16", "--channel-mult", "1", "2"]
    chapter += ["--attention-resolutions", "8"]
    for _ in range(2):
        quality.main([*command, *chapter])
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert trainings == [[3e-4, 1e-3]] and (out / "comparison.png").exists()
        assert (line["best_chapter_1"], line["best_peer"], line["no_worse"]) == (0.0, 1.0, True)
        assert line["peer"]["dim"] == 8 and "--model-channels" in line["chapter_1"]
        assert [row["lr"] for row in line["rows"][1:]] == [3e-4, 1e-3]
        assert line["rows"][1]["steps"] == 7 and line["features"] == "some features"
        assert line == json.loads((out / "result.json").read_text())
    with pytest.raises(BadInput, match="was trained with other settings"):
        quality.main([*command, "--minutes", "5", *chapter])


# ---------------------------------------------------------------------------------------- output


def test_the_table_aligns_and_leaves_out_what_a_row_lacks(quality):
    full = row(
        quality.OURS,
        0.2345,
        lr=1e-3,
        parameters=1112801,
        cpu_minutes=12.0,
        steps=1300,
        images=83200,
        sampler="ddim",
        evaluations=100,
        cpu_seconds_per_sample=0.1234,
    )
    head, first, second = quality.table([full, row("real images", 0.05)])
    assert " ".join(head.split()) == (
        "network lr parameters CPU min steps images sampler evaluations N CPU s/sample Fréchet"
    )
    assert " ".join(first.split()) == (
        "chapter 1 0.001 1,112,801 12.00 1,300 83,200 ddim 100 500 0.123 0.234"
    )
    assert " ".join(second.split()) == "real images - - - - - - - 500 - 0.050"
    assert len(head) == len(first) == len(second)


def test_the_best_of_each_side_decides(quality):
    ours, peer = quality.OURS, quality.PEER
    rows = [row(ours, 0.3), row(peer, 0.5), row(peer, 0.25), row(ours, 0.2), row("real", 0.01)]
    assert quality.verdict(rows) == {"best_chapter_1": 0.2, "best_peer": 0.25, "no_worse": True}
    assert quality.best(rows, peer) is rows[2]
    assert quality.verdict([*rows, row(peer, 0.2)])["no_worse"]
    worse = quality.verdict([*rows, row(peer, 0.19)])
    assert not worse["no_worse"] and json.loads(json.dumps(worse)) == worse


def test_the_comparison_has_chapter_1_on_the_left(quality, tmp_path):
    for name, value in (("left", 200), ("right", 90)):
        np.savez(tmp_path / f"{name}.npz", np.full((4, 6, 5, 1), value, np.uint8))
    files = (tmp_path / "left.npz", tmp_path / "right.npz")
    quality.write_comparison(*files, tmp_path / "c.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "c.png"))
    assert sheet.shape == (2 + 2 * 8, 2 * (2 + 2 * 7) + 16)
    assert 200 in sheet[:, :16] and 90 not in sheet[:, :16]
    assert 90 in sheet[:, -16:] and 200 not in sheet[:, -16:]


# -------------------------------------------------------------------------------------- commands


def test_the_command_line_names_chapter_1s_settings(quality, tmp_path, repo):
    out = ["--out", str(tmp_path / "new"), "--data-root", str(tmp_path)]
    args = quality.parse([*out, "--minutes", "3", "--seed", "5", "--", "--lr", "2e-3"])
    cfg = parse(ddpm_pixel.Config, "", args.ours)
    mnist = parse(ddpm_pixel.Config, "", ["--config", f"{repo}/configs/mnist_pixel.yaml"])
    assert (cfg.data, cfg.seed, cfg.lr) == ("mnist", 5, 2e-3)
    assert (cfg.model_channels, cfg.channel_mult, cfg.ema) == (
        mnist.model_channels,
        mnist.channel_mult,
        mnist.ema,
    )
    train = [str(part) for part in quality.ours_train(args, tmp_path, 70)[1:]]
    cfg = parse(ddpm_pixel.Config, "", train)
    ddpm_pixel.check(cfg)
    assert cfg.steps == 70 and not cfg.class_cond and cfg.sample_every == 0 and cfg.gpus == 0


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_both_sides_draw_with_the_same_number_of_evaluations(quality, peers, tmp_path, sampler):
    args = quality.parse(["--out", str(tmp_path / "new"), "--n", "7", "--sample-steps", "30"])
    cfg = parse(ddpm_pixel.Config, "", args.ours)
    ours = quality.ours_sample(args, cfg, tmp_path, sampler, tmp_path / sampler)
    script = {"ancestral": ddpm_pixel, "ddim": ddim}[sampler]
    assert ours[0] == f"{script.__name__}.py"
    ours = parse(script.Config, "", [str(part) for part in ours[1:]])
    assert (ours.n, ours.sample_steps, getattr(ours, "eta", 0)) == (7, 30, 0)
    theirs = quality.peer_sample(args, cfg, tmp_path, sampler, tmp_path / sampler)
    theirs = peers.parser().parse_args([str(part) for part in theirs[2:]])
    assert (theirs.n, theirs.sample_steps) == (7, 30)
    assert theirs.eta == {"ancestral": 1, "ddim": 0}[sampler]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--minutes", "0"], "--minutes must be greater than 0"),
        (["--n", "-1"], "--n must be greater than 0"),
        (["--samplers", "heun"], "invalid choice"),
        (["--out", "."], "is not empty; name a new folder"),
    ],
)
def test_bad_arguments(quality, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        quality.parse(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


# -------------------------------------------------------------------------------------- the peer


def test_both_networks_have_as_many_parameters_within_5_percent(quality, peers, tmp_path):
    args = quality.parse(["--data", "mnist", "--out", str(tmp_path / "new")])
    cfg = parse(ddpm_pixel.Config, "", args.ours)
    ours = sum(p.numel() for p in ddpm_pixel.UNet((1, 28, 28), 0, cfg).parameters())
    dim, count = peers.matched_dim(ours, cfg.channel_mult, 1)
    assert abs(count - ours) <= 0.05 * ours
    net = peers.make(dim, cfg.channel_mult, (1, 28, 28))
    assert sum(p.numel() for p in net.parameters()) == count
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__spec__


def test_a_size_that_the_peer_cannot_have_is_refused(peers):
    with pytest.raises(BadInput, match=r"has 1,000 parameters within 5% \(dim 8 has"):
        peers.matched_dim(1000, (1, 2), 1)


def test_the_peer_keeps_the_defaults_that_the_bench_tells_of(peers):
    peer = peers.make(8, (1, 2), (1, 4, 4))
    assert (peer.objective, peer.num_timesteps, peer.image_size) == ("pred_v", 1000, (4, 4))
    half = peer.alphas_cumprod[499].item()  # the sigmoid schedule passes one half in the middle
    assert half == pytest.approx(0.5, abs=0.01)
    assert peer.alphas_cumprod[249].item() == pytest.approx(0.852, abs=0.005)


def test_the_peer_trains_until_its_cpu_time_and_goes_on_from_there(
    peers, toy, tmp_path, capsys, monkeypatch
):
    train = ["train", *toy, "--dim", "8", "--mult", "1", "2", "--batch-size", "4"]
    done = []
    for limit in (4, 8):
        clock = types.SimpleNamespace(process_time=itertools.count(1).__next__)
        monkeypatch.setattr(peers, "time", clock)  # a second for each look at it
        args = [*train, "--out", str(tmp_path), "--cpu-seconds", str(limit)]
        args = peers.parser().parse_args(args)
        args.run(args)
        done.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    # Looks at 1, 2, 3 precede steps, 4 the end, 5 the saving; then 5 + 1, 5 + 2, and as before.
    assert done == [{"step": 3, "cpu_seconds": 5}, {"step": 5, "cpu_seconds": 9}]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == state["ema"]["step"] == 5

    few = ["--n", "5", "--batch-size", "4", "--sample-steps", "2"]
    places = ["--out", str(tmp_path), "--samples", str(tmp_path / "samples")]
    args = peers.parser().parse_args(["sample", *few, *places])
    args.run(args)
    images = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 1) and images.dtype == np.uint8 and images.std() > 1
