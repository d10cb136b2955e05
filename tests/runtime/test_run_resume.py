"""A run goes on where it stopped, bit for bit, and not as another run than it was."""

from runtime.commandline import BadInput, RunConfig
from runtime.processes import World
from runtime.run import Run

import dataclasses
import functools
import shutil

import pytest
import torch
from run_folders import assert_same, assert_same_run, rows, saved, saved_step
from toy_run import IMAGES, SETTINGS, Counter, Net, make, train

# --------------------------------------------------------------------------------------- going on


HARD = {"dropout": 0.5, "ema": (0.5, 0.9), "accumulate": 2, "flip": True}


@pytest.mark.parametrize("stops", [(1,), (2, 3, 4), (5, 8, 9), (9, 9)], ids=str)
def test_a_run_that_was_stopped_ends_with_the_bits_of_the_unbroken_one(stops, tmp_path):
    """With dropout, two running means, parts, flips, and state of the chapter's own."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, halts in ((whole, ()), (broken, stops)):
        for stop in (*halts, None):
            before = saved_step(folder)
            run = make(folder, **HARD, more={"keep": {"counter": Counter()}})
            assert run.first == before
            train(run, stop)
    assert_same_run(whole, broken)
    assert saved(whole)["counter"]["seen"] == 80 and [row["step"] for row in rows(whole)] == [
        *range(1, 11)
    ]
    states = [(saved(f)["model"], saved(f)["more_emas"]) for f in (whole, broken)]
    assert_same(*states)


def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    """Not of what was drawn before."""
    torch.manual_seed(5)
    first = rows(train(make(tmp_path / "a", dropout=0.5)).folder)
    second = train(make(tmp_path / "b", dropout=0.5), each=lambda run: torch.rand(7)).folder
    assert rows(second) == first
    assert rows(train(make(tmp_path / "c", dropout=0.5, seed=1)).folder) != first


CHANGED = {int: lambda v: v + 3, float: lambda v: v / 2 + 0.25, bool: lambda v: not v}


def other_value(field, value):
    """A valid value that is another one."""
    if field.name in ("save_every", "keep_every", "sample_every", "log_every"):
        return 6
    if field.name == "lr_decay":
        return "none"
    if field.name == "accumulate":
        return 2
    if field.name in ("tensorboard", "wandb"):
        return False  # needs a package
    if isinstance(value, (bool, int, float)):
        return CHANGED[type(value)](value)
    return (0.7,) if isinstance(value, tuple) else value + "other"


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The folder of a run of three steps."""
    return train(make(tmp_path_factory.mktemp("runs") / "three", steps=3)).folder


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda field: field.name)
def test_a_run_goes_on_with_other_settings_only_where_they_are_free(
    field, three_steps, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    folder = tmp_path / "copy"  # so --out is another one
    shutil.copytree(three_steps, folder)
    value = other_value(field, getattr(RunConfig(**SETTINGS), field.name))
    settings = {"steps": 3, field.name: value}
    if field.name == "out":
        assert make(folder, steps=3).first == 3
    elif field.name == "resume":
        assert make(folder, steps=3, resume=str(folder / "ckpt.pt")).first == 3
        assert make(folder, steps=3, resume="never").first == 0
    elif field.name in RunConfig.FREE:
        assert make(folder, **settings).first == 3
    else:
        with pytest.raises(BadInput, match=f"of another configuration .*{field.name} .*there,"):
            make(folder, **settings)


def test_a_chapter_says_which_of_its_settings_are_free(tmp_path):
    @dataclasses.dataclass
    class Config(RunConfig):
        heavy: int = 1
        light: int = 1
        FREE = RunConfig.FREE | {"light"}

    def start(**settings):
        cfg = Config(out=str(tmp_path), **{**SETTINGS, **settings})
        how = {"net": Net(), "optimizer": torch.optim.Adam, "script": "toy"}
        return Run(cfg, World(), IMAGES, **how)

    train(start(steps=3))
    assert start(light=2, steps=4).first == 3
    with pytest.raises(BadInput, match=r"\(heavy 1 there, 2 here\)"):
        start(heavy=2)


def test_a_run_does_not_go_on_with_other_data_or_made_of_other_things(tmp_path):
    train(make(tmp_path, more={"made_of": {"autoencoder": "abc"}}))
    other = dataclasses.replace(IMAGES, manifest={"key": "of those"})
    with pytest.raises(BadInput, match="data_key of these there, of those here"):
        make(tmp_path, ds=other, more={"made_of": {"autoencoder": "abc"}})
    with pytest.raises(BadInput, match="autoencoder abc there, abd here"):
        make(tmp_path, more={"made_of": {"autoencoder": "abd"}})


def test_a_run_goes_on_from_the_checkpoint_that_is_named(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(make(first, keep_every=3))
    run = make(second, resume=str(first / "ckpt-000006.pt"))
    assert run.first == saved_step(second) == 6
    train(run)
    assert_same(saved(first)["model"], saved(second)["model"])
    assert [row["step"] for row in rows(second)] == [7, 8, 9, 10]
    back = make(first, resume=str(first / "ckpt-000003.pt"), keep_every=3)  # and in its own folder
    assert back.first == 3 and [row["step"] for row in rows(first)] == [1, 2, 3]
    assert sorted(p.name for p in first.glob("ckpt-[0-9]*")) == ["ckpt-000003.pt"]


def test_a_run_does_not_go_back(tmp_path):
    """Fewer --steps than it has done would leave samples and settings of a run that never was."""
    train(make(tmp_path, steps=6))
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(BadInput, match=r"--steps 5: the run in .* is at step 6 already"):
        make(tmp_path, steps=5)
    assert (tmp_path / "config.yaml").read_text() == config
    assert make(tmp_path, steps=6).first == 6
    assert make(tmp_path, steps=5, resume="never").first == 0


def test_a_run_from_before_there_was_a_setting_goes_on(tmp_path):
    """What its checkpoint does not name was as the setting's default is."""

    @dataclasses.dataclass
    class Config(RunConfig):
        newer: tuple[float, ...] = ()

    def start(config, **settings):
        cfg = config(out=str(tmp_path), **{**SETTINGS, **settings})
        how = {"net": Net(), "optimizer": torch.optim.Adam, "script": "toy"}
        return Run(cfg, World(), IMAGES, **how)

    train(start(RunConfig, steps=3))
    assert start(Config, steps=4).first == 3
    with pytest.raises(BadInput, match=r"\(newer \[\] there, \[0.5\] here\)"):
        start(Config, newer=(0.5,))
