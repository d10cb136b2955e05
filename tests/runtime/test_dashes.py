"""Flags as they are pasted from texts: a long dash for two hyphens, a value behind a switch."""

from runtime.commandline import BadInput, Script, parse

import importlib
from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro


@dataclass
class Config(Script):
    """What swallows words that are no flags."""

    prompt: tuple[str, ...] = ()  # texts
    batch_size: int = 1  # a number
    guidance: float = 0.0  # a number
    flip: bool = False  # a switch
    no_cond: str = ""  # a text whose name begins so


@dataclass
class Places(Script):
    """What is a value may be an argument without a flag."""

    a: Annotated[str, tyro.conf.Positional] = ""  # no flag
    flip: bool = False  # a switch


LONG = [
    "\u2013",
    "\u2014",
    "\u2212",
    "\u2013-",
    "-\u2013",
    "\u2010\u2010",
    "\u2014\u2014",
    "-",
    "---",
]


@pytest.mark.parametrize("dash", LONG)
@pytest.mark.parametrize("name", ["batch-size", "batch_size", "batch\u2010size", "flip", "no-flip"])
def test_other_dashes_than_two_hyphens_are_refused(dash, name):
    right = name.replace("_", "-").replace("\u2010", "-")
    for args in (["--prompt", "a", f"{dash}{name}", "2"], [f"{dash}{name}=2"]):
        with pytest.raises(BadInput) as error:
            parse(Config, "", args)
        line = f"{dash}{name}: two hyphens are in front of a setting: type --{right}"
        assert str(error.value) == line


def test_a_misspelt_setting_is_no_text_either():
    wrong = "{}: two hyphens are in front of a setting; {}"
    for typed, hint in (
        ("\u2013batch-sise", "did you mean --batch-size?"),
        ("\u2013batch_sise=3", "did you mean --batch-size?"),
        ("\u2014sigma-min", "a setting of edm.py: see --help"),
    ):
        with pytest.raises(BadInput) as error:
            parse(Config, "", ["--prompt", "a", typed, "2"])
        assert str(error.value) == wrong.format(typed.partition("=")[0], hint)


def test_texts_and_numbers_may_begin_with_a_dash():
    args = [
        "--prompt",
        "\u2013 a fox",
        "\u2014other",
        "\u2013",
        "--guidance",
        "-1",
        "--no-cond=-flip",
    ]
    found = parse(Config, "", args)
    assert found.prompt == ("\u2013 a fox", "\u2014other", "\u2013")
    assert (found.guidance, found.no_cond) == (-1.0, "-flip")
    assert parse(Config, "", ["--batch_size", "3", "--no-flip"]).batch_size == 3


@pytest.mark.parametrize("typed", ["--flip", "--no-flip"])
@pytest.mark.parametrize("value", ["False", "true", "0", "no"])
def test_a_switch_takes_no_value(typed, value):
    for args in ([typed, value], [f"{typed}={value}"]):
        with pytest.raises(BadInput) as error:
            parse(Config, "", args)
        told = "a switch takes no value, type --flip or --no-flip"
        assert str(error.value) == f"{typed} {value}: {told}"


def test_what_stands_behind_a_switch_may_be_no_value():
    assert parse(Places, "", ["--flip", "0"]) == Places(a="0", flip=True)
    with pytest.raises(BadInput, match="a switch takes no value"):
        parse(Places, "", ["--flip=0"])


@pytest.mark.parametrize("script", ["stable_diffusion", "eval_fid", "ddpm_pixel"])
def test_scripts_refuse_them(script):
    with pytest.raises(BadInput, match="type --smoke$"):
        parse(importlib.import_module(script).Config, "", ["\u2013smoke"])
    with pytest.raises(BadInput, match="type --size$"):  # no prompt, and no data set
        args = ["--prompt", "a fox"] if script == "stable_diffusion" else []
        parse(importlib.import_module(script).Config, "", [*args, "\u2013size", "8"])
