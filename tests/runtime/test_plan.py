"""--dry-run: what is counted, timed and recommended, and that nothing is left of it."""

from runtime import plan, processes, rehearsal
from runtime.commandline import BadInput, RunConfig, check_run

import dataclasses
import importlib
import math

import pytest
import tiny_runs
import torch
import toy_run
from launching import refused, succeed
from torch import nn

from image_data import datasets

GIB = 2**30


# ------------------------------------------------------------------------------------- counting


class Two(nn.Module):
    """Two linear layers, 8 -> 16 -> 4 channels, with tanh between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    "half, fixed, each",
    [
        (False, 0, 4 * (8 + 16)),  # the input, and the output of tanh, which the next layer shares
        # In 16 bits: of the second layer its weight, too, converted from one that is kept anyway.
        (True, 2 * 16 * 4, 2 * (8 + 16)),
    ],
)
def test_what_a_small_network_keeps_is_known(half, fixed, each):
    cost = plan.cost_of(Two(), plan.forms_of([torch.zeros(5, 8)]), half)
    assert cost == plan.Cost(fixed, each, 2 * (8 * 16 + 16 * 4))


def kept_in_fact(net, *inputs):
    """Bytes of all that autograd saves, each address once, without the weights."""
    weights, seen = {p.data_ptr() for p in net.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(*inputs)
    assert out is not None
    return sum(storage.nbytes() for storage in seen.values())


def network(script):
    """(a small network of a chapter, in training, its inputs for 5 images)."""
    module = importlib.import_module({"rectified_flow": "flow_matching"}.get(script, script))
    cfg = module.Config()
    shape, labels = (1, 16, 16), torch.zeros(5, dtype=torch.int64)
    x = torch.randn(5, *shape).to(memory_format=torch.channels_last)
    if script == "autoencoder":
        net = module.make_autoencoder(dataclasses.replace(cfg, model_channels=32), shape)
        return net.train(), (x, torch.randn(5, 4, 4, 4))
    if script == "classifier_guidance":
        return module.make_net(cfg, shape, 10).train(), (x, labels)
    if script == "ddpm_pixel":
        net = module.UNet(shape, 10, dataclasses.replace(cfg, attention_resolutions=(4, 8)))
        net = net.to(memory_format=torch.channels_last)
    else:
        x = torch.randn(5, 4, 16, 16).to(memory_format=torch.channels_last)
        net = module.make_net(cfg, (4, 16, 16), 10)
    return net.train(), (x, labels, labels)


@pytest.mark.parametrize("script", tiny_runs.TRAININGS)
def test_what_a_chapters_network_keeps_is_what_autograd_keeps(script):
    net, inputs = network(script)
    cost = plan.cost_of(net, plan.forms_of(inputs), half=False)
    assert cost.each > 10_000
    assert cost.fixed + 5 * cost.each == pytest.approx(kept_in_fact(net, *inputs), rel=1e-3)
    assert all(p.device.type == "cpu" and type(p) is nn.Parameter for p in net.parameters())


@pytest.mark.parametrize("script", tiny_runs.TRAININGS)
def test_in_16_bits_a_network_keeps_less_of_each_image(script):
    net, inputs = network(script)
    whole, half = (plan.cost_of(net, plan.forms_of(inputs), h) for h in (False, True))
    assert 0.45 * whole.each < half.each < 0.95 * whole.each
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_in_fact(net, *inputs)
    assert half.fixed + 5 * half.each == pytest.approx(kept, rel=1e-3)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, x):
        h = self.conv(x).flatten(2).mT[:, None]  # (b,1,64,8)
        return nn.functional.scaled_dot_product_attention(h, h, h)


def test_flops_are_those_of_products_and_of_attention():
    conv, attention = 2 * 64 * 8 * 3 * 9, 2 * 2 * 64 * 64 * 8
    cost = plan.cost_of(Attends(), plan.forms_of([torch.zeros(2, 3, 8, 8)]), half=False)
    assert cost.flops == conv + attention


# -------------------------------------------------------------------------------- memory that fits


@pytest.mark.parametrize("images", [1, 7, 32])
@pytest.mark.parametrize("limit", [99, 100, 101, 107, 200, 330, 420, 421])
def test_the_recommended_accumulate_is_the_smallest_that_fits(images, limit):
    def fits(parts):
        return 100 + 10 * max(map(len, torch.arange(images).chunk(parts))) <= limit

    found = plan.fewest_parts(100, 10, images, limit)
    # What Run.parts makes of a share: parts of ceil(images / k), the last one less.
    fitting = [k for k in range(1, images + 1) if fits(k)]
    assert found == (fitting[0] if fitting else None)


def test_a_recommended_accumulate_then_fits():
    def said(accumulate):
        cfg = RunConfig(accumulate=accumulate)
        return plan.fit("a GPU", 10 * GIB, 3 * GIB, GIB, 16, cfg)

    assert "does NOT fit a GPU: about 19.0 GiB of 9.0 GiB" in said(1)
    assert said(1).endswith("--accumulate 3 makes it fit, with about 9.0 GiB")
    assert "does NOT fit" in said(2)
    assert said(3).startswith("fits a GPU: about 9.0 GiB")


def test_where_one_image_is_too_much_nothing_is_recommended():
    @dataclasses.dataclass
    class Config(RunConfig):
        use_checkpoint: bool = False

    line = plan.fit("a GPU", GIB, GIB, GIB, 16, Config())
    assert line.endswith("not even one image at a time does; try --use-checkpoint")
    line = plan.fit("a GPU", GIB, GIB, GIB, 16, Config(use_checkpoint=True))
    assert line.endswith("does") and "--accumulate" not in line


# ------------------------------------------------------------------------------------- the table


def numbers(line):
    """The numbers of a row; None where a dash stands."""
    return [None if part == "-" else float(part) for part in line.split()[1:] if part != ">"]


def test_hours_and_dollars_of_a_table():
    stages = [
        plan.Stage("first", 1000, 3.6, 64, 2e12),
        plan.Stage("second", 500, 7.2, 32, 1e12),
    ]
    head, first, second, total = plan.table(stages, price=8 * 2.5)
    assert head.split() == ["steps", "s/step", "images/s", "TFLOP/step", "hours", "dollars"]
    assert numbers(first) == pytest.approx([1000, 3.6, 64 / 3.6, 2, 1, 20], rel=1e-3)
    assert numbers(second) == pytest.approx([500, 7.2, 32 / 7.2, 1, 1, 20], rel=1e-3)
    assert numbers(total) == [2, 40]
    assert all("dollars" not in line for line in plan.table(stages, price=0))
    stages[1].bound = True
    *_, first, second, total = plan.table(stages, price=0)
    assert numbers(second) == [500, None, None, 1, 1] and ">" in second and ">" in total
    assert ">" not in first


# ------------------------------------------------------------------------------------ rehearsing


class Clock:
    """A clock that stands, but for what a step takes."""

    def __init__(self, monkeypatch, first, rest):
        self.time, self.steps, self.seconds = 0.0, 0, (first, rest)
        monkeypatch.setattr(rehearsal.Rehearsal, "now", lambda _: self.time)

    def tick(self, run):
        self.time += self.seconds[bool(self.steps)] + 5 * (self.steps == 7)  # no median sees it
        self.steps += 1


def rehearse(tmp_path, clock, capsys, **settings):
    """(the Rehearsal's Run, what was printed) of the toy training."""
    settings = {**toy_run.SETTINGS, "gpus": 0, "dry_run": True, **settings}
    cfg, found = RunConfig(out=str(tmp_path / "run"), **settings), []

    def train(cfg, world):
        run = toy_run.make(world=world, **{f: getattr(cfg, f) for f in vars(cfg)})
        found.append(run)
        toy_run.train(run, each=clock.tick)

    rehearsal.rehearse(train, cfg)
    return found[0], capsys.readouterr().out


def row(name, out):
    """The numbers of a stage in the printed table."""
    table = out.split("s/step")[1].splitlines()
    (line,) = [line for line in table if line.startswith(f"{name} ")]
    return numbers(line)


@pytest.mark.parametrize(
    "first, rest, steps",
    [
        (9.0, 2.0, rehearsal.WARM_UP + rehearsal.TIMED),
        (rehearsal.LONG + 1, 21.0, 10),  # the tenth passes MOST
        (300.0, 70.0, 2),  # at least one counts
    ],
)
def test_a_stage_takes_the_median_of_its_steps(first, rest, steps, tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, first, rest)
    run, out = rehearse(tmp_path, clock, capsys, steps=1800, price_per_gpu_hour=0.5)
    assert clock.steps == steps
    hours = 1800 * rest / 3600
    found = row("training", out)
    assert found[0] == 1800 and found[-2:] == pytest.approx([hours, 0.5 * hours], rel=1e-2)
    assert found[1:3] == pytest.approx([rest, 8 / rest], rel=1e-3)
    counted = steps - (rehearsal.WARM_UP if first < rehearsal.LONG else 1)
    assert f"medians of {counted} steps" in out
    assert not run.folder.exists() and not list(tmp_path.iterdir())


def test_the_steps_are_the_last_ones(tmp_path, monkeypatch, capsys):
    """So that what starts late, such as a discriminator, takes part."""
    clock = Clock(monkeypatch, 1, 1)
    run, _ = rehearse(tmp_path, clock, capsys, steps=1800, log_every=1, save_every=1)
    assert run.step == 1800 and not run.done


def test_a_process_handles_its_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    clock = Clock(monkeypatch, 1, 1)
    run, out = rehearse(tmp_path, clock, capsys, steps=1800, price_per_gpu_hour=1.0)
    assert run.share == slice(0, 2) and "4 with 2 images each" in out
    assert row("training", out)[-2:] == pytest.approx([0.5, 2.0])  # of all four
    assert "stands for all 4" in out
    monkeypatch.setenv("RANK", "1")
    rehearsal.rehearse(None, run.cfg)  # only the first process does anything


def test_no_time_is_said_of_gpus_that_are_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = Clock(monkeypatch, 1, 1)
    run, out = rehearse(tmp_path, clock, capsys, gpus=8, steps=10**6)
    assert "nothing was timed" in out and "assumption" in out and "medians" not in out
    _, seconds, rate, flops, hours = row("training", out)
    assert seconds is None and rate is None and flops > 0
    assert hours == pytest.approx(10**6 * flops * 1e12 / (8 * plan.SUSTAINED) / 3600, rel=2e-2)
    assert run.step == 0 or clock.steps == 0  # not even a step


def test_a_batch_that_a_gpu_cannot_hold_is_cut(tmp_path, monkeypatch, capsys):
    clock, tried = Clock(monkeypatch, 1, 1), []

    def too_large(run):
        tried.append(run.cfg.accumulate)
        if run.cfg.accumulate < limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        Clock.tick(clock, run)

    monkeypatch.setattr(clock, "tick", too_large)
    limit = 4
    _, out = rehearse(tmp_path, clock, capsys)
    assert sorted(set(tried)) == [1, 2, 4]
    assert "Out of memory with --accumulate 1: timed with 4." in out
    limit = 16
    with pytest.raises(BadInput, match="out of the GPU's memory"):
        rehearse(tmp_path, clock, capsys)


def test_on_a_gpu_the_memory_is_measured(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, 1, 1)
    run, _ = rehearse(tmp_path, clock, capsys)
    world = dataclasses.replace(run.world, device=torch.device("cuda:0"), memory=[])
    about = type("About", (), {"name": "Some GPU", "total_memory": 2 * 10**3})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    cost = plan.Cost(0, 100, 1)
    world.know_memory(run, world.cfg, "training", {True: cost, False: cost}, True)
    measured, small, there = world.memory
    assert measured.startswith("training: 5.0 GiB measured, about ")
    assert "training: fits 16 GB (T4, V100)" in small
    assert "training: does NOT fit Some GPU" in there


# -------------------------------------------------------------------------------------- commands


STAGES = {"ldm_cfg": ["autoencoder", "latents"], "dit": ["autoencoder", "latents"]}


@pytest.mark.parametrize("script", tiny_runs.TRAININGS)
def test_every_chapter_says_its_hours_and_leaves_nothing(script, tiny, toy, tmp_path):
    flags = [*tiny[script], *toy, "--out", tmp_path / "run", "--dry-run"]
    out = succeed(script, *flags, "--price-per-gpu-hour", "36000").out
    stages = [*STAGES.get(script, []), "training"]
    stages += ["drawing"] if "sample_steps" in tiny_runs.fields(script) else []
    total = 0.0
    for stage in stages:
        steps, seconds, rate, _, hours, dollars = row(stage, out)
        assert hours == pytest.approx(steps * seconds / 3600, rel=0.1)  # of rounded numbers
        assert dollars == pytest.approx(36000 * hours, rel=0.02, abs=0.006)
        assert seconds > 0 and rate > 0
        total += hours
    assert row("total", out) == pytest.approx([total, 36000 * total], rel=0.02, abs=0.02)
    assert row("training", out)[0] == 20
    for words in ("data ", "64 images 16x16x1, 2 classes", "memory each", "fits 16 GB", "disk"):
        assert words in out
    assert not (tmp_path / "run").exists() and not list(tmp_path.iterdir())


def test_what_is_done_takes_no_more_hours(tiny, toy, tmp_path):
    flags = [*tiny["ldm_cfg"], *toy, "--out", tmp_path / "run", "--ae-steps", "3", "--steps", "9"]
    succeed("ldm_cfg", *flags, "--stage", "latents")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = succeed("ldm_cfg", *flags, "--dry-run").out
    assert [row(name, out)[0] for name in ("autoencoder", "latents", "training")] == [0, 0, 9]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_autoencoder_alone_is_a_whole_plan(tiny, toy, tmp_path):
    flags = [*tiny["ldm_cfg"], *toy, "--out", tmp_path / "run", "--dry-run"]
    out = succeed("ldm_cfg", *flags, "--stage", "autoencoder").out
    assert row("autoencoder", out)[0] > 0 and "training  " not in out and "\ntotal" in out


def test_a_plan_without_its_data_is_of_the_published_form(tiny, tmp_path):
    flags = [*tiny["ldm_cfg"], "--data", "imagenet100", "--data-root", tmp_path / "nothing"]
    flags += ["--size", "16", "--out", tmp_path / "run", "--gpus", "8", "--dry-run"]
    out = succeed("ldm_cfg", *flags).out
    assert out.count("note: the plan is of gray images in place of imagenet100's") == 1
    assert "kaggle.com/datasets" in out and "130000 images 16x16x3, 100 classes" in out
    assert row("training", out)[-1] > 0
    line = refused("ldm_cfg", *[flag for flag in flags if flag != "--dry-run"], "--gpus", "0")
    assert "cannot be downloaded" in line


def test_a_data_set_that_nobody_knows_has_no_plan(tiny, tmp_path):
    line = refused("ddpm_pixel", *tiny["ddpm_pixel"], "--data", "nowhere", "--dry-run")
    assert "no data set, folder or zip is named nowhere" in line


def test_gray_images_have_the_chosen_classes(tmp_path):
    cfg = RunConfig(data="imagenet100", data_root=str(tmp_path), size=8, classes="3,4")
    with pytest.raises(BadInput):
        datasets.of(cfg)
    ds = datasets.of(dataclasses.replace(cfg, dry_run=True))
    assert len(ds) == 2600 and ds.num_classes == 2 and ds.shape == (3, 8, 8)
    x, y = ds.batch(torch.arange(5).numpy(), torch.ones(5, dtype=torch.bool).numpy())
    assert x.shape == (5, 3, 8, 8) and y.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("price", [-1.0, math.nan])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(BadInput, match="--price-per-gpu-hour"):
        check_run(RunConfig(price_per_gpu_hour=price, gpus=0))


def test_a_plan_of_no_training_is_refused(tmp_path):
    for script, task in (("ddpm_pixel", "sample"), ("improved_ddpm", "nll")):
        module = importlib.import_module(script)
        cfg = module.Config(**{task: "some.pt"}, dry_run=True, gpus=0, out=str(tmp_path))
        with pytest.raises(BadInput, match=f"--dry-run is for training: leave it out, or --{task}"):
            module.check(cfg)


def test_a_run_without_dry_run_is_not_rehearsed():
    world = processes.World()
    assert world.watch(None, range(3)) == range(3)
