"""Command line, pictures, learning rate, running mean, loss meter: each against its definition."""

from runtime import commandline
from runtime.commandline import BadInput, parse_classes, parse_seeds, split_list
from runtime.files import append_row, atomic_write, read_log
from runtime.folder import RunFolder
from runtime.pictures import save_gif, save_grid, tile, to_uint8
from runtime.plots import plot_loss
from runtime.processes import World
from runtime.run import EMA, LossMeter, learning_rate

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@dataclass
class Config(commandline.Script):
    """A little of everything."""

    data: str = "glyphs"  # text
    steps: int = 10  # an integer
    lr: float = 0.5  # a number
    guidance: float = 0.0  # may be negative
    flip: bool = False  # off
    conditional: bool = True  # on
    mult: tuple[int, ...] = (1, 2)  # several
    schedule: Literal["linear", "cosine"] = "linear"  # a choice


def parse(*args, **kwargs):
    return commandline.parse(Config, "", [str(a) for a in args], **kwargs)


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "data: mnist\nsteps: 20\nlr: 1e-3\nguidance: -1.0\nflip: true\nconditional: false\n"
        "mult: [1, 2, 2]\nschedule: cosine\n"
    )
    return path


def test_parse_defaults_and_flags():
    assert parse() == Config()
    flags = "--steps 3 --lr 2e-4 --guidance -1 --flip --no-conditional --mult 1 --schedule cosine"
    expected = Config(
        steps=3, lr=2e-4, guidance=-1.0, flip=True, conditional=False, mult=(1,), schedule="cosine"
    )
    assert parse(*flags.split()) == expected


def test_flags_override_yaml_wherever_they_stand(yaml_file):
    settings = dict(
        data="mnist",
        steps=20,
        lr=1e-3,
        guidance=-1.0,
        flip=True,
        conditional=False,
        mult=(1, 2, 2),
        schedule="cosine",
        config=str(yaml_file),
    )
    assert parse("--config", yaml_file) == Config(**settings)
    assert parse(f"--config={yaml_file}") == Config(**settings)
    for flags in (
        ["--config", yaml_file, "--no-flip", "--steps", 5, "--mult", 4],
        ["--no-flip", "--steps", 5, "--mult", 4, "--config", yaml_file],
    ):
        assert parse(*flags) == Config(**settings | {"flip": False, "steps": 5, "mult": (4,)})
    assert parse("--config", yaml_file, "--guidance", "-0.5", "--conditional") == Config(
        **settings | {"guidance": -0.5, "conditional": True}
    )


def test_preset_lies_under_the_flags_unless_a_config_is_named(yaml_file, tmp_path):
    yaml_file.rename(tmp_path / "mnist.yaml")
    preset = str(tmp_path / "{data}.yaml")
    assert parse("--data", "mnist", preset=preset).steps == 20
    assert parse("--data", "mnist", "--steps", 7, preset=preset).steps == 7
    assert parse("--data", "other", preset=preset) == Config(data="other")
    (tmp_path / "own.yaml").write_text("lr: 9.0\n")
    found = parse("--data", "mnist", "--config", tmp_path / "own.yaml", preset=preset)
    assert (found.steps, found.lr) == (10, 9.0)


@pytest.mark.parametrize("task", ["sample", "plot_schedule"])
def test_a_preset_is_for_training_alone(task, tmp_path):
    """What a checkpoint is asked is not changed by the file of the data that are named with it."""
    (tmp_path / "mnist.yaml").write_text("steps: 3\n")
    config = dataclasses.make_dataclass("Asking", [(task, str, "")], bases=(Config,))
    config.USES = {task: frozenset({"data"})}
    preset = str(tmp_path / "{data}.yaml")
    given = ["--data", "mnist", f"--{task.replace('_', '-')}", "ckpt.pt"]
    assert commandline.parse(config, "", given, preset=preset).steps == 10
    assert commandline.parse(config, "", given[:2], preset=preset).steps == 3


REFUSED = {
    "--stepz 3": "did you mean --steps?",
    "--steps x": "--steps x: expected a whole number",
    "--mult 1.5": "1.5",
    "--schedule round": "round",
    "more": "more",
}


@pytest.mark.parametrize("flags, named", REFUSED.items())
def test_parse_refuses_in_one_line(flags, named):
    with pytest.raises(BadInput) as error:
        parse(*flags.split())
    assert "\n" not in str(error.value) and named in str(error.value)


def test_help_names_every_flag_and_what_it_is(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for text in ("--steps", "an integer", "--mult", "several", "--no-conditional", "10"):
        assert text in shown


def test_seeds_and_lists():
    assert parse_seeds("", 3).tolist() == [0, 1, 2]
    assert parse_seeds("17", 3).tolist() == [17]
    assert parse_seeds("0-3, 100,7-7", 3).tolist() == [0, 1, 2, 3, 100, 7]
    assert parse_seeds("5", 1).dtype == torch.int64
    for bad in ("abc", "3-1", "-4", "1.5", ",", "0-", "1" * 19, "0-1000000"):
        with pytest.raises(BadInput, match="--seeds"):
            parse_seeds(bad, 3)
    names = ("cat", "dog", "2")
    assert parse_classes("dog,0", names) == [1, 0]
    assert parse_classes("", names) == [0, 1, 2] and parse_classes("", ()) == []
    assert parse_classes("n02", names, {"n02": 1}) == [1]
    assert split_list(" a, b,,c ") == ["a", "b", "c"]


# ------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_image_in_its_place(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), np.uint8)
    save_grid(torch.from_numpy(images), tmp_path / "deep" / "grid.png", columns=3)
    sheet = np.array(Image.open(tmp_path / "deep" / "grid.png")).reshape(18, 20, channels)
    for i in range(5):
        y, x = 2 + i // 3 * 8, 2 + i % 3 * 6
        assert np.array_equal(sheet[y : y + 6, x : x + 4], images[i])
        sheet[y : y + 6, x : x + 4] = 32
    assert (sheet == 32).all()  # the rest is ground
    assert tile(images).shape == (18, 20, channels)  # 5 images: 3 columns
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_gif_holds_every_frame(tmp_path):
    frames = [torch.full((4, 8, 8, 1), 60 * i, dtype=torch.uint8) for i in range(4)]
    save_gif(frames, tmp_path / "way.gif", columns=2, seconds=2.0)
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (22, 22)
        for i in range(4):
            gif.seek(i)
            assert gif.convert("L").getpixel((5, 5)) == 60 * i
            assert gif.info["duration"] == (2000 if i == 3 else 500)


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-1.5, -1.0, -1 / 255, 0.1, 1.0, 7.0]).view(1, 1, 2, 3)
    assert to_uint8(x).flatten().tolist() == [0, 0, 127, 140, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    back = to_uint8(every.float() / 127.5 - 1)
    assert torch.equal(back, every.permute(0, 2, 3, 1))


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ValueError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise ValueError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"


# ------------------------------------------------------------------------------------ training


def test_learning_rate():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[50] == pytest.approx(1.0)  # the middle of a half cosine
    for step in (3, 9, 30, 77):
        cosine = 2 * math.cos(math.pi * step / 200) ** 2  # (1 + cos 2a) / 2 = cos^2 a
        assert rates[step] == pytest.approx(cosine * min(1, (step + 1) / 10))
    flat = [learning_rate(step, 100, 2.0, 4, "none") for step in range(100)]
    assert flat[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and set(flat[4:]) == {2.0}
    assert learning_rate(0, 100, 2.0, 0, "none") == 2.0


def test_ema_is_the_plain_loop():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average = EMA(net, 0.5)
    mean = None
    for n in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        average.update(net, n)
        now = [p.detach().double() for p in net.parameters()]
        d = min(0.5, (1 + n) / (10 + n))  # the first call only copies
        mean = now if n == 0 else [d * m + (1 - d) * p for m, p in zip(mean, now, strict=True)]
        for p, m in zip(average.net.parameters(), mean, strict=True):
            assert torch.allclose(p.double(), m, atol=1e-6)
    assert d == 0.5  # both halves of the rule were reached


def test_loss_meter_means(tmp_path):
    world, checkpoint, meter = World(), tmp_path / "ckpt.pt", LossMeter("cpu")
    meter.add(0, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0.24, 0.99]))
    meter.add(1, torch.tensor([6.0]), torch.tensor([0.75]))
    assert meter.read(world, checkpoint) == {"loss": 3.0, "loss_q1": 1.5, "loss_q4": 4.5}
    meter.add(2, torch.tensor([5.0]), torch.tensor([0.25]))
    assert meter.read(world, checkpoint) == {"loss": 5.0, "loss_q2": 5.0}  # it starts again
    whole = LossMeter("cpu")
    whole.add(0, torch.tensor([1.0, 3.0], requires_grad=True))
    assert whole.read(world, checkpoint) == {"loss": 2.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_meter_names_the_first_bad_step(bad, tmp_path):
    meter = LossMeter("cpu")
    for step, loss in [(4, 1.0), (5, bad), (6, 1.0), (7, bad)]:
        meter.add(step, torch.tensor([1.0, loss]), torch.tensor([0, 0.25]))
    with pytest.raises(BadInput, match="not finite at step 5; no checkpoint exists yet"):
        meter.read(World(), tmp_path / "ckpt.pt")


def test_loss_meter_names_the_step_at_which_another_process_met_a_bad_loss(tmp_path):
    class First(World):
        """The first of two; the second met its first bad loss at step 5."""

        def sum(self, tensor):
            return tensor + torch.tensor([0.0, 5.0], dtype=tensor.dtype)

    meter = LossMeter("cpu")
    meter.add(7, torch.tensor([1.0]))
    with pytest.raises(BadInput, match="not finite at step 5;"):
        meter.read(First(0, 2), tmp_path / "ckpt.pt")


def test_rows_are_lines_of_their_own(tmp_path, monkeypatch):
    path, dumps = tmp_path / "rows.jsonl", json.dumps

    def meanwhile(row):  # another process adds a row between the first one's look and its write
        monkeypatch.setattr(json, "dumps", dumps)
        append_row(path, {"a": 2})
        return dumps(row)

    monkeypatch.setattr(json, "dumps", meanwhile)
    append_row(path, {"a": 1})
    with open(path, "a") as f:
        f.write('{"torn": ')  # by a kill
    append_row(path, {"a": 3})
    append_row(path, {"a": "x" * 100_000})
    assert [row["a"] for row in read_log(path)] == [2, 1, 3, "x" * 100_000]
    assert path.read_bytes().endswith(b"\n") and len(path.read_text().splitlines()) == 5


def test_loss_curve_and_log(tmp_path):
    folder = RunFolder(tmp_path, "toy", {}, World())
    plot_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()  # nothing to draw yet
    for step in range(1, 30):
        folder.log(step, loss=1 / step, loss_q1=2 / step)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 30, "lo')  # torn by a kill
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 30)) and rows[4]["loss"] == 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 50  # axes, two lines, letters
