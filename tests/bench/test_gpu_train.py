"""bench/gpu_train.py: rehearsed on a CPU with a tiny network; the parts that carry its weights."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput

import argparse
import importlib
import sys
import time
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
from PIL import Image

from bench import gpu_parts, gpu_rows
from bench.gpu_rows import Job, latest, read
from ddpm_pixel import load_net


@pytest.fixture(scope="module")
def program():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.gpu_train")
    finally:
        sys.path[:] = path


# -------------------------------------------------------------------------------- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(program, tmp_path_factory):
    """(exit code, OUT, WORK) of the whole program with a tiny network.

    The commands that it runs are started by the tests' fork server, which saves their imports.
    """
    out = tmp_path_factory.mktemp("train") / "kept"
    work = out.parent / "work"

    def run(plan, line, watch=lambda: None, kept=0.0):
        start, (_, script, *flags) = time.monotonic(), line
        module = Path(script).stem
        if script == "-m":
            module, *flags = f"{flags[0]}.__main__", *flags[1:]
        else:
            assert Path(script).parent == program.REPO and Path(script).is_file()
        command = launching.Started(module, *flags)
        while command.process.is_alive():
            time.sleep(0.2)
            watch()
        done = command.wait()
        assert done.code == 0, f"{line}: {done.err[-2000:]}"
        return time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(program, "run", run)
        patch.setattr(program.signal, "signal", lambda *_: None)
        flags = ["--out", str(out), "--work", str(work), "--minutes", "10"]
        program.main(["--rehearse", *flags])
    return ended.value.code, out, work


def test_it_trains_draws_and_scores(program, rehearsal):
    code, out, _ = rehearsal
    rows = read(out)
    assert gpu_rows.failures(rows, program.STAGES) == []
    assert code == 0 and all(gpu_rows.is_done(rows, name) for name in program.STAGES)
    rates = latest(rows, "trial")
    assert {of[1] for of in rates} == {"eager", "graph"}
    assert all(row["images_s"] > 0 and row["start_s"] > 0 for row in rates.values())
    training = latest(rows, "train")
    assert training["plan",]["steps"] == 24 == training["whole",]["of_step"]
    assert [of[1] for of in training if of[0] == "step"] == [str(i) for i in range(2, 25, 2)]
    assert all(row["loss"] > 0 for of, row in training.items() if of[0] == "step")
    found = latest(rows, "scores")
    assert found["samples",]["n_generated"] == 24 and found["samples",]["frechet"] > 0
    assert "training images" in {of[0] for of in found}
    assert Image.open(out / "samples.png").size == (3 * 18 + 2, 8 * 18 + 2)  # 8 rows of 3
    assert (out / "loss.png").stat().st_size > 1000
    assert "A rehearsal on a CPU" in (out / "gpu_train.md").read_text()
    assert len(list(out.iterdir())) <= 8  # as many as some machines give back


def test_what_is_kept_is_the_running_mean_and_a_cpu_goes_on_with_it(program, rehearsal, tmp_path):
    *_, out, work = rehearsal
    assert latest(read(out), "joined")["parts, apart from the mean",]["right"]
    program.main(["--join", str(out), "--out", str(tmp_path / "ckpt.pt")])
    net, cfg, shape, names, _ = load_net(tmp_path / "ckpt.pt", "cpu")
    mean = load_checkpoint(work / "run" / "ckpt.pt")["ema"]
    assert shape == (3, 16, 16) and len(names) == 4 and cfg.class_cond
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, mean[name].half().float()), name
    assert (work / "joined" / "samples.png").exists()  # by ddim.py, from the parts alone


def test_started_again_nothing_is_run_again(program, rehearsal, monkeypatch, capsys):
    *_, out, work = rehearsal
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    before = read(out)
    with pytest.raises(SystemExit) as ended:
        program.main(["--rehearse", "--out", str(out), "--work", str(work)])
    assert ended.value.code == 0 and read(out) == before
    assert capsys.readouterr().out.count("finished before") == len(program.STAGES)


# ------------------------------------------------------------------------------- time that is left


def test_steps_are_as_many_as_fit(program):
    assert program.steps_for(100, 1280, 128, 20) == 940  # 0.95 of 1000, a multiple of 20
    assert program.steps_for(1, 10, 128, 20) == 20  # no less than one line of the log
    assert program.steps_for(-5, 1000, 128, 20) == 20


@pytest.fixture
def plan(program, tmp_path):
    """A plan of half a minute."""
    args = argparse.Namespace(
        rehearse=False, minutes=0.5, batch_size=128, data="x.zip", work=tmp_path / "work"
    )
    args.work.mkdir()
    return program.Plan(args)


def test_the_faster_way_is_taken_and_a_run_that_goes_on_keeps_its_steps(program, plan, tmp_path):
    job = Job("trial", tmp_path)
    job.say("rate", "eager", images_s=6400.0, start_s=10.0)
    job.say("rate", "graph", images_s=12800.0, start_s=20.0)
    plan.end += 600
    flags, steps, minute, after = program.planned(Job("train", tmp_path), plan)
    assert flags == ["--graph"] and minute == 5700
    assert after == pytest.approx(60 + 3 * 20 + 1000 * 50 / (3 * 12800))
    seconds = plan.left - after - 20
    assert 0.93 < steps * 128 / 12800 / seconds <= 0.951
    job.say("rate", "eager", images_s=99999.0, start_s=10.0)
    assert program.planned(Job("train", tmp_path), plan)[:2] == (["--graph"], steps)


def test_without_a_rate_nothing_is_trained(program, plan, tmp_path):
    Job("trial", tmp_path).say("rate", "eager", failed="why")
    with pytest.raises(RuntimeError, match="no trial gave a rate"):
        program.planned(Job("train", tmp_path), plan)


def test_a_command_is_stopped_in_time_and_one_that_fails_is_told(program, plan, capsys):
    seen = []
    plan.end -= 30 - 1.5
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(program.OutOfTime, match="no time was left"):
        program.run(plan, sleeper, lambda: seen.append(1))
    assert seen
    plan.end += 60
    with pytest.raises(program.OutOfTime):  # as much is kept for others
        program.run(plan, sleeper, kept=59.0)
    with pytest.raises(RuntimeError, match="exit code 3"):
        program.run(plan, [sys.executable, "-c", "print('because'); raise SystemExit(3)"])
    assert "because" in capsys.readouterr().err


def test_a_stage_that_fails_leaves_its_row_and_is_tried_again(program, plan, tmp_path, monkeypatch):
    def broken(job, plan):
        raise KeyError("nothing there")

    monkeypatch.setattr(program, "samples", broken)
    job = Job("samples", tmp_path)
    program.work_on(job, plan)
    assert read(tmp_path)[-1]["ended"] == "KeyError: 'nothing there'"
    monkeypatch.setattr(program, "samples", lambda job, plan: job.say("a", ms=1.0))
    program.work_on(job, plan)
    assert gpu_rows.is_done(read(tmp_path), "samples")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--minutes", "0", "--data", "."], "--minutes and --batch-size must be greater than 0"),
        ([], "--data is missing"),
        (["--data", "no.zip"], "--data no.zip"),
        (["--join", "."], "expected --out to end in .pt"),
    ],
)
def test_bad_input_is_one_line(program, flags, named):
    with pytest.raises(BadInput, match=named):
        program.parse([*flags, "--out", "x"])


# -------------------------------------------------------------------------------------- the parts


@pytest.fixture
def checkpoint(tmp_path):
    """A function of a step: the path of a checkpoint of that step, and its weights."""

    def make(step):
        generator = torch.Generator().manual_seed(step)
        shapes = {"a.weight": (3, 5, 2), "a.bias": (3,), "one": ()}
        weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        state = {"script": "ddpm_pixel", "config": {"ema": [0.9, 0.99]}, "step": step}
        state |= {"shape": [3, 4, 4], "class_names": ["x"], "settings": {}, "optimizer": {"b": 1}}
        path = tmp_path / f"ckpt-{step}.pt"
        torch.save(state | {"model": {}, "ema": weights, "more_emas": [weights]}, path)
        return path, weights

    return make


def test_parts_joined_are_the_running_mean_in_half_precision(checkpoint, tmp_path):
    path, weights = checkpoint(7)
    parts = gpu_parts.split(path, tmp_path, largest=100)
    assert len(parts) > 2 and all(part.stat().st_size <= 100 for part in parts)
    state = gpu_parts.join(tmp_path)
    assert state["step"] == 7 and state["config"]["ema"] == [0.9] and state["more_emas"] == []
    assert "optimizer" not in state and state["class_names"] == ["x"]
    assert state["ema"].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(state["ema"][name], weight.half().float())
    assert np.prod(state["ema"]["one"].shape) == 1


def test_a_later_step_takes_the_place_of_an_earlier_one_when_it_is_whole(checkpoint, tmp_path):
    gpu_parts.split(checkpoint(7)[0], tmp_path, largest=100)
    path, weights = checkpoint(8)
    later = gpu_parts.split(path, tmp_path, largest=100)
    assert sorted(tmp_path.glob("ema-*")) == sorted(later)
    earlier = gpu_parts.split(checkpoint(7)[0], tmp_path / "other", largest=100)
    for part in earlier:
        part.rename(tmp_path / part.name)
    assert gpu_parts.join(tmp_path)["step"] == 8
    later[0].unlink()  # as if it had been killed while it wrote those of step 8
    assert gpu_parts.join(tmp_path)["step"] == 7


def test_what_is_missing_or_damaged_is_refused(checkpoint, tmp_path):
    with pytest.raises(BadInput, match="expected all of ema-STEP-0-of-N.bin to N-1; found none"):
        gpu_parts.join(tmp_path)
    parts = gpu_parts.split(checkpoint(7)[0], tmp_path, largest=100)
    data = bytearray(parts[1].read_bytes())
    data[50] ^= 1
    parts[1].write_bytes(data)
    with pytest.raises(BadInput, match="do not belong together"):
        gpu_parts.join(tmp_path)
    parts[1].unlink()
    with pytest.raises(BadInput, match="found ema-7-0-of"):
        gpu_parts.join(tmp_path)


def test_a_weight_beyond_half_precision_is_refused(checkpoint, tmp_path):
    path, weights = checkpoint(7)
    state = load_checkpoint(path)
    state["ema"]["a.bias"][1] = 1e6
    with pytest.raises(BadInput, match="a.bias does not fit into fp16"):
        gpu_parts.to_bytes(state)
