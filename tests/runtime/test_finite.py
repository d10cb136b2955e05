"""What is not finite is seen, in any place of any walk, and never drawn."""

from runtime import finite
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.finite import NotFinite, check_finite, end_of, watched
from runtime.pictures import save_drawn, to_uint8
from runtime.processes import World

import math
import sys

import numpy as np
import pytest
import torch
from breaking import files_in
from fake_gpu import DEVICE, Waits, fake_gpu
from launching import refusal, run, start_ranks
from toy_run import make, train

VALUES = [math.nan, math.inf, -math.inf]
FORMATS = [torch.contiguous_format, torch.channels_last]
PAIRS = [(90, 60), (60, 30), (30, 0), (0, -1)]
SEEDS = torch.tensor([7, 12, 5])


def walk(bad, shape=(3, 2, 4, 4), value=math.inf):
    """x and x0_hat of four steps; bad: {step from 1: row whose x has one bad number from there}."""
    x = torch.linspace(-1, 1, math.prod(shape)).view(shape)
    for step in range(1, 5):
        if step in bad:
            x = x.clone()
            x[bad[step], 1, 2, 3] = value
        yield x, x


# ----------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", VALUES)
def test_one_number_in_any_place_is_seen(value, memory_format):
    for place in range(3 * 5 * 7):
        x = torch.zeros(2, 3 * 5 * 7)
        x[1, place] = value
        x = x.view(2, 3, 5, 7).to(memory_format=memory_format)
        assert finite.lengths(x).isfinite().tolist() == [True, False]
        with pytest.raises(NotFinite, match="^the image of seed 12 is not finite: type --prec"):
            check_finite(x, SEEDS[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_finite_numbers_are_left_alone(dtype):
    """In half precision the squares alone would overflow."""
    x = torch.full((2, 3, 64, 64), 6e4, dtype=dtype)
    assert check_finite(x, SEEDS) is x
    assert check_finite(x.float() * 1e10, SEEDS).max() > 1e14
    assert check_finite(torch.zeros(0, 3, 4, 4, dtype=dtype), SEEDS[:0]).shape[0] == 0


@pytest.mark.parametrize("value", VALUES)
def test_the_first_step_and_its_first_seed_are_named(value):
    for bad, told in (
        ({3: 1}, "seed 12 leaves the finite numbers in step 3 of 4, at t = 30: type --precision"),
        ({4: 0, 2: 2}, "seed 5 leaves the finite numbers in step 2 of 4, at t = 60: "),
        ({1: [1, 2]}, "seed 12 leaves the finite numbers in step 1 of 4, at t = 90: "),
    ):
        with pytest.raises(NotFinite, match=f"^sampling: {told}"):
            list(watched(walk(bad, value=value), SEEDS, PAIRS))
    for steps, told in ((4, "step 3 of 4: type"), (0, "step 3: type")):
        with pytest.raises(NotFinite, match=f"^w = 2: image 7 leaves the finite numbers in {told}"):
            list(watched(walk({3: 0}, value=value), SEEDS, steps, "w = 2", "image"))


def test_on_a_cpu_a_walk_stops_at_once_and_a_good_one_is_as_it_was():
    ticks, kept = [], list(walk({}))
    with pytest.raises(NotFinite):
        end_of(walk({2: 1}), lambda: ticks.append(1), SEEDS, PAIRS)
    assert len(ticks) == 1
    for (a, b), (x, x0_hat) in zip(watched(walk({}), SEEDS, 4), kept, strict=True):
        assert torch.equal(a, x) and torch.equal(b, x0_hat)
    assert torch.equal(end_of(walk({}), lambda: None, SEEDS, 4), kept[-1][0])


# ------------------------------------------------------------------------------------- on a GPU


def test_nothing_waits_for_a_gpu_before_the_last_step(monkeypatch):
    with fake_gpu(monkeypatch) as watch:
        x = torch.zeros(3, 2, 4, 4, device=DEVICE)
        walked = watched(((x, x) for _ in range(4)), SEEDS, PAIRS)
        with watch:
            for _ in range(4):
                next(walked)
            assert watch.names["linalg_vector_norm"] == 4
            assert sum(watch.names.values()) == 4  # one reduction a step, and nothing else
            with pytest.raises(Waits):
                next(walked)


def test_after_the_last_step_the_first_bad_one_is_named(monkeypatch):
    """As on a GPU, with numbers: the lengths of all steps at once."""
    seen = [finite.lengths(x) for x, _ in walk({3: 1, 4: 0})]
    with pytest.raises(NotFinite, match="sampling: seed 12 .* in step 3 of 4, at t = 30: "):
        finite.check_steps(seen, 1, SEEDS, PAIRS, "sampling", "seed")
    finite.check_steps(seen[:2], 1, SEEDS, PAIRS, "sampling", "seed")


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("value", VALUES)
def test_what_is_not_finite_is_not_drawn(value):
    x = torch.zeros(4, 3, 6, 5)
    x[2, 1, 0, 4] = value
    with pytest.raises(NotFinite, match="^image number 2 is not finite: "):
        to_uint8(x)
    with pytest.raises(NotFinite, match="^the image of seed 9 is not finite: "):
        to_uint8(x.to(memory_format=torch.channels_last), torch.tensor([1, 4, 9, 3]))
    views = x[:2], x[2:3, :, 1:], x[:, :1], x.flip(0)[2:], x[..., :4], x[3].expand(2, 3, 6, 5)
    for view in views:  # of what is finite
        assert (to_uint8(view) == 128).all() and len(to_uint8(view)) == len(view)


@pytest.mark.parametrize("where", ["x", "x0_hat"])
def test_files_of_an_earlier_call_stay(where, tmp_path):
    """The film has x0_hat, too, and comes before any file is written."""

    def way(seeds, y):
        for x, _ in walk({}):
            x0_hat = x.clone()
            (x if where == "x" else x0_hat)[1, 0, 0, 0] = math.nan
            yield x, x0_hat

    images = torch.zeros(3, 4, 4, 2, dtype=torch.uint8)
    (tmp_path / "samples.png").write_text("earlier")
    with pytest.raises(NotFinite):
        save_drawn(tmp_path, images, None, way, SEEDS, World(), PAIRS)
    assert files_in(tmp_path) == {tmp_path / "samples.png": b"earlier"}
    if where == "x":
        with pytest.raises(NotFinite, match="^scoring: seed 12 .* in step 1 of 4: "):
            World().draw(way, SEEDS, None, 3, 4, "scoring")


# ------------------------------------------------------------------------------------- training


def test_training_goes_on_without_a_grid(tmp_path, capsys):
    """And without its scores: a line says so, which names step and seed."""

    def grid():
        end_of(walk({2: 1}), lambda: None, SEEDS, PAIRS)

    def each(run):
        if run.step == 4:
            run.save_grid(grid)
            run.log_metrics(grid)
        if run.step == 6:
            run.save_grid(lambda: torch.zeros(3, 4, 4, 1, dtype=torch.uint8))
            run.log_metrics(lambda: {"frechet": 2.0})

    made = make(tmp_path, resume="never")
    train(made, each=each)
    lines = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    told = "sampling: seed 12 leaves the finite numbers in step 2 of 4, at t = 60: "
    start = f"note: no picture or score at step 4: {told}"
    assert len(lines) == 2 and all(line.startswith(start) for line in lines)
    assert not (tmp_path / "samples-000004.png").exists()
    assert (tmp_path / "samples-000006.png").is_file() and (tmp_path / "ckpt.pt").is_file()
    scores = [row for row in read_log(tmp_path / "log.jsonl") if "frechet" in row]
    assert [row["step"] for row in scores] == [6] and made.step == made.cfg.steps


def test_a_chapter_ends_with_its_samples(toy, tiny, tmp_path, monkeypatch, capsys):
    """Its network draws infinity from step 3 of 4 on; the loss knows nothing of that."""
    import ddpm_pixel

    guided, calls = ddpm_pixel.guided_pass, []

    def broken(net, x, t, y, w):
        calls.append(t)
        out, uncond = guided(net, x, t, y, w)
        return (out * math.inf if len(calls) % 3 == 0 else out), uncond

    monkeypatch.setattr(ddpm_pixel, "guided_pass", broken)
    given = ["--steps", "4", "--sample-every", "2", "--save-every", "2", "--resume", "never"]
    argv = ["ddpm_pixel.py", *tiny["ddpm_pixel"], *toy, *given, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    told = r"sampling: seed 0 leaves the finite numbers in step 3 of 4"
    with pytest.raises(BadInput, match=told):
        ddpm_pixel.main()
    assert f"note: no picture or score at step 2: {told}" in capsys.readouterr().out
    assert len(read_log(tmp_path / "log.jsonl")) == 4 and (tmp_path / "ckpt.pt").is_file()
    assert not list(tmp_path.glob("samples*")) and not list(tmp_path.glob("reverse*"))


# ------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def half_bad(toy, tiny, tmp_path_factory):
    """A checkpoint whose embedding of class 1 is not finite: odd seeds leave the numbers."""
    out = tmp_path_factory.mktemp("half")
    done = run("ddpm_pixel", *tiny["ddpm_pixel"], *toy, "--steps", 3, "--out", out)
    assert done.code == 0, done.err
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for weights in (state["ema"], state["model"]):
        weights["label.weight"][1] = math.inf
    torch.save(state, out / "ckpt.pt")
    return out / "ckpt.pt"


@pytest.mark.parametrize("seeds", ["0,2,4,1,3,5", "1,3,5,0,2,4", "5,3", "1"])
def test_every_process_ends_and_says_the_same(seeds, half_bad, tmp_path):
    """One of them, or both, or the one that has anything to draw; and nothing is written."""
    (tmp_path / "samples.png").write_text("earlier")
    given = ["--sample", half_bad, "--gpus", 0, "--seeds", seeds, "--batch-size", 4]
    given += ["--sample-steps", 5, "--out", tmp_path]
    lines = [refusal(rank.wait(30)) for rank in start_ranks("ddpm_pixel", *given)]
    first = [seed for seed in seeds.split(",") if int(seed) % 2][0]
    told = f"error: sampling: seed {first} leaves the finite numbers in step 1 of 5"
    assert lines[0] == lines[1] and lines[0].startswith(told)
    assert files_in(tmp_path) == {tmp_path / "samples.png": b"earlier"}


def test_the_good_seeds_of_that_checkpoint_are_drawn(half_bad, tmp_path):
    given = ["--sample", half_bad, "--gpus", 0, "--seeds", "0,2,4", "--out", tmp_path]
    assert [rank.wait(30).code for rank in start_ranks("ddpm_pixel", *given)] == [0, 0]
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 3
