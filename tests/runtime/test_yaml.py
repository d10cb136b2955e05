"""What a --config file says reaches the setting as it is written there; what cannot is refused."""

from runtime import commandline
from runtime.commandline import BadInput

import dataclasses
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro
import yaml


@dataclass
class Config(commandline.Script):
    """A setting of every type that chapters have."""

    checkpoint: Annotated[str, tyro.conf.Positional] = ""  # no flag
    negative: str = ""  # text
    batch_size: int = 1  # a whole number
    classes: str = ""  # text
    seeds: str = ""  # text
    prompt: tuple[str, ...] = ()  # texts
    steps: int = 10  # a whole number
    lr: float = 0.5  # a number
    mult: tuple[int, ...] = (1, 2)  # whole numbers
    ema: tuple[float, ...] = (0.9,)  # numbers
    interval: tuple[float, float] = (0.0, 1.0)  # two numbers
    flip: bool = False  # off
    cond: bool = True  # on
    decay: Literal["cosine", "none", "off"] = "cosine"  # a choice


@pytest.fixture
def parsed(tmp_path):
    """Config of a file with this text, under these flags, without the file's own name."""

    def parse(text, *flags):
        path = tmp_path / "some.yaml"
        path.write_text(text, "utf-8")
        cfg = commandline.parse(Config, "", ["--config", str(path), *flags])
        assert cfg.config == str(path)
        return dataclasses.replace(cfg, config="")

    return parse


WORDS = ["yes", "0123", "1_000", "12:30:00", "2024-01-02", "1e3", "0x1f", ".5", "-1", "<<", "True"]
WORDS += ["2024-13-45", "-blurry", "--steps", "--no-flip", "a: b", "é ☃", "~", "null", "", " a "]
PLAIN = [w for w in WORDS if w not in ("a: b", "~", "null", "", " a ")]


@pytest.mark.parametrize("word", WORDS)
def test_text_in_quotes_is_the_text(word, parsed):
    texts = f'negative: "{word}"\nclasses: \'{word}\'\nprompt: ["{word}", a cat]\n'
    assert parsed(texts) == Config(negative=word, classes=word, prompt=(word, "a cat"))


@pytest.mark.parametrize("word", PLAIN)
def test_text_without_quotes_is_the_text(word, parsed):
    expected = Config(negative=word, seeds=word, prompt=(word, word))
    assert parsed(f"negative: {word}\nseeds: {word}\nprompt: [{word}, {word}]\n") == expected
    assert parsed(f"prompt: {word}\n") == Config(prompt=(word,))
    assert parsed(f"prompt:\n  - {word}\n  - a cat\n") == Config(prompt=(word, "a cat"))


def test_a_list_of_one_is_its_value(parsed):
    text = "steps: [3]\nlr: [2]\nflip: [yes]\ndecay: [none]\nout: [010]\nprompt: [a, b]\n"
    expected = Config(steps=3, lr=2.0, flip=True, decay="none", out="010", prompt=("a", "b"))
    assert parsed(text) == expected


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "some.yaml"

    def told():
        with pytest.raises(BadInput) as error:
            commandline.parse(Config, "", ["--config", str(path)])
        return str(error.value)

    assert told() == f"--config {path}: no such file; configs/ holds examples"
    path.mkdir()
    assert told() == f"--config {path}: is a folder; configs/ holds examples"
    path.rmdir()
    path.write_text("steps: 3\n", "utf-16")  # as PowerShell's > writes it
    assert told() == f"--config {path} is not UTF-8 text (at byte 0): save it as UTF-8"

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_text", forbidden)
    assert told() == f"--config {path}: Permission denied"


@pytest.mark.parametrize("number", ["1e400", "9" * 400, ".inf", "-.INF", ".nan", "nan", "1e39"])
def test_numbers_that_float32_cannot_hold_are_refused(number, parsed):
    for key in ("lr", "ema"):
        for text in (f"{key}: {number}\n", f"{key}: [{number}]\n"):
            with pytest.raises(BadInput, match=f"--config .*some.yaml: {key} is .*, finite and"):
                parsed(text)
    with pytest.raises(BadInput, match=r"some.yaml: ema is \[0.5, .*, finite and below 3e\+38"):
        parsed(f"ema: [0.5, {number}]\n")


def test_longer_texts(parsed):
    text = "negative: >\n  much\n  fog\nprompt:\n  - |\n    one\n    two\n  - three\n"
    assert parsed(text) == Config(negative="much fog\n", prompt=("one\ntwo\n", "three"))
    assert parsed("negative: !!str 010\n") == Config(negative="010")
    windows = "\ufeffnegative: no\r\nclasses: 07\r\n"  # as its editors save it
    assert parsed(windows) == Config(negative="no", classes="07")


def test_a_list_is_one_text_with_commas(parsed):
    assert parsed("classes: [3, 07, cat]\nseeds: [0-3, 1_7]\n") == Config(
        classes="3,07,cat", seeds="0-3,1_7"
    )
    assert parsed("classes: []\nprompt: []\nmult: []\n") == Config(mult=())
    assert parsed('negative: ["fog, mist"]\nclasses: "a, b"\n') == Config(
        negative="fog, mist", classes="a, b"
    )


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize(
    "written", ["7", "-3", "+5", "1_000", "0", "-0", "0x1f", "0b11", '"12"', "'1_2'"]
)
def test_whole_numbers_are_as_yaml_1_1_knows_them(kind, written, parsed):
    name, several = {int: ("steps", "mult"), float: ("lr", "ema")}[kind]
    number = kind(str(yaml.safe_load(written)))
    expected = Config(**{name: number, several: (number, 2)})
    assert parsed(f"{name}: {written}\n{several}: [{written}, 2]\n") == expected
    assert parsed(f"{several}: {written}\n") == Config(**{several: (number,)})


def test_numbers(parsed):
    text = "lr: 1e-3\nema: [1.0e-4, 1_0.5, 3, -1e2]\ninterval: [-1e-1, 2]\nmult: [-1, 2]\n"
    ema = (1e-4, 10.5, 3.0, -100.0)
    assert parsed(text) == Config(lr=1e-3, ema=ema, interval=(-0.1, 2.0), mult=(-1, 2))
    assert type(parsed("lr: 3\n").lr) is float


@pytest.mark.parametrize("on, off", [("true", "false"), ("yes", "No"), ("ON", "off")])
def test_truth_values(on, off, parsed):
    assert parsed(f"flip: {on}\ncond: {off}\n") == Config(flip=True, cond=False)
    assert parsed(f"flip: {off}\ncond: {on}\n") == Config(flip=False, cond=True)
    assert parsed(f"flip: {on}\ncond: {off}\n", "--no-flip", "--cond") == Config()


def test_choices_anchors_and_merge_keys(parsed):
    assert parsed("decay: none\n").decay == "none" and parsed("decay: off\n").decay == "off"
    assert parsed("prompt: &p [no, 010]\nclasses: *p\n") == Config(
        prompt=("no", "010"), classes="no,010"
    )
    assert parsed("<<: {steps: 3, lr: 2, negative: no}\nsteps: 4\n") == Config(
        steps=4, lr=2.0, negative="no"
    )
    assert parsed("") == Config() and parsed("# nothing\n") == Config()


REFUSED = {
    'flip: "false"': ['flip is "false"', "true or false"],
    "flip: nonsense": ["flip is nonsense", "true or false"],
    "flip: 1": ["flip is 1", "true or false"],
    "prompt: {a: 1}": ["prompt is {a: 1}", "text, ..."],
    "prompt: [[a, b]]": ["prompt is [[a, b]]"],
    "prompt: [[]]": ["prompt is [[]]"],
    "prompt: {}": ["prompt is {}"],
    "prompt: &a [*a]": ["prompt is &a [*a]"],
    "negative: {}": ["negative is {}"],
    "steps: =": ["steps is ="],
    "prompt: [!cat a]": ["prompt is [!cat a]"],
    "negative: !ugly blurry": ["negative is !ugly blurry", "takes text"],
    "negative: {a: 1}": ["negative is {a: 1}"],
    "classes: [[3], 7]": ["classes is [[3], 7]"],
    "negative: [fog, mist]": ["negative is [fog, mist]", "takes text, not a list"],
    "out: []": ["out is []", "not a list"],
    'classes: [cat, "dog, big"]': ['classes is [cat, "dog, big"]', "parted at every comma"],
    'seeds: ["0,5"]': ['seeds is ["0,5"]', "parted at every comma"],
    "steps: many": ["steps is many", "--steps takes a whole number"],
    "steps: 1.5": ["steps is 1.5"],
    "steps: yes": ["steps is yes"],
    "steps: [1, 2]": ["steps is [1, 2]"],
    "steps: []": ["steps is []"],
    "steps: --flip": ["steps is --flip"],
    "steps: 010": ["steps is 010", "a whole number, without a zero in front"],
    "steps: 09": ["steps is 09", "without a zero in front"],
    "steps: 1:30": ["steps is 1:30", "a whole number"],
    "steps: 1e3": ["steps is 1e3", "a whole number"],
    "steps: 3.0": ["steps is 3.0"],
    "steps: 1,000": ["steps is 1,000"],
    "steps: 0o10": ["steps is 0o10"],
    f"steps: {'9' * 5000}": ["steps is " + "9" * 60 + ";"],
    "lr: 01.5": ["lr is 01.5", "without a zero in front"],
    "lr: 1:30.5": ["lr is 1:30.5", "a number"],
    "lr: 1,5": ["lr is 1,5"],
    'mult: "1 2 4"': ['mult is "1 2 4"', "--mult takes [a whole number, ...]"],
    "mult: 1,2,4": ["mult is 1,2,4", "[a whole number, ...]"],
    "mult: (1, 2)": ["mult is (1, 2)", "[a whole number, ...]"],
    "mult: [010, 2]": ["mult is [010, 2]"],
    "interval: 0,1": ["interval is 0,1", "[a number, a number]"],
    'decay: "cosine "': ['decay is "cosine "', "cosine, none, off"],
    "steps: 2024-13-45": ["steps is 2024-13-45"],
    "lr: no": ["lr is no", "a number"],
    "mult: [1, x]": ["mult is [1, x]", "a whole number, ..."],
    "mult: [1, true]": ["mult is [1, true]"],
    "mult: {a: 1}": ["mult is {a: 1}"],
    "interval: [1]": ["interval is [1]", "a number, a number"],
    "decay: line": ["decay is line", "cosine, none, off"],
    "decay: [cosine, none]": ["decay is [cosine, none]"],
    "prompt:\n  a: 1\n  b: 2": ["prompt is a: 1 b: 2"],
    "stepz: 3": ["unknown key 'stepz'", "did you mean steps?"],
    "Steps: 3": ["unknown key 'Steps'", "did you mean steps?"],
    "batch-size: 8": ["unknown key 'batch-size'", "did you mean batch_size?"],
    "--batch-size: 8": ["unknown key '--batch-size'", "did you mean batch_size?"],
    "? [a]\n: 3": ["key: value"],
    "steps:3": ["key: value"],
    "steps = 3": ["key: value"],
    "steps:\t3": ["is not YAML", "'\\t'"],
    "steps: 3\n\tlr: 2": ["is not YAML", "'\\t'"],
    "steps: 3\x00": ["is not YAML", "#x0000"],
    "steps: *x": ["is not YAML", "undefined alias 'x'"],
    "steps: 1\nlr: 2\nsteps: 1": ["steps is set twice"],
    "<<: {lr: 1}\nsteps: 1\n'steps': 2": ["steps is set twice"],
    "<<: [{steps: 1}, {steps: 2}]": ["steps is set twice"],
    "<<: {steps: 1, steps: 2}": ["steps is set twice"],
    "prompt: " + "[" * 3000: ["too many lists in each other"],
    "no: 3": ["unknown key 'no'"],
    "config: x": ["unknown key 'config'"],
    "checkpoint: x": ["unknown key 'checkpoint'"],
    "- negative": ["key: value"],
    "<<: 3": ["is not YAML"],
    "steps: 1\n---\nsteps: 2": ["is not YAML"],
}
EMPTY = ["negative:", "negative: null", "negative: ~", "steps:", "flip: Null", "prompt:"]
EMPTY += ["prompt: [a, null]", "prompt: [a, ~]", "prompt:\n  - a\n  -", "classes: [3, null]"]
REFUSED |= {text: [" has no value; type '' for an empty one"] for text in EMPTY}


@pytest.mark.parametrize("text, named", REFUSED.items())
def test_refused_by_key_and_file_in_one_line(text, named, parsed):
    with pytest.raises(BadInput) as error:
        parsed(text + "\n")
    line = str(error.value)
    assert "\n" not in line and line.startswith("--config ") and "some.yaml" in line
    assert all(part in line for part in [*named, text.split(":")[0] * (text in EMPTY)]), line


def test_a_dash_can_be_typed_behind_an_equals_sign():
    def parse(*args):
        return commandline.parse(Config, "", args)

    assert parse("--negative=-blurry", "--steps", "3") == Config(negative="-blurry", steps=3)
    assert parse("--negative=--steps") == Config(negative="--steps")
    assert parse("--prompt=-x", "a cat") == Config(prompt=("-x", "a cat"))


def test_typed_settings_win_and_are_known_from_those_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "some.yaml"
    path.write_text("prompt: [--steps, --lr]\nnegative: --seeds\nmult: 3\nflip: on\n<<: {lr: 2}\n")
    for named in (["--config", str(path)], [f"--config={path}"]):
        args = ["--prompt=--out", "b", *named, "--no-flip", "--classes", "3"]
        monkeypatch.setattr(sys, "argv", ["chapter.py", *args])
        cfg = commandline.parse(Config, "")
        given = {"prompt": ("--out", "b"), "negative": "--seeds", "mult": (3,), "lr": 2.0}
        assert cfg == Config(config=str(path), classes="3", **given)
        names = [field.name for field in dataclasses.fields(Config)]
        left = commandline.not_given(cfg, names)
        others = "out smoke gpus checkpoint batch_size seeds steps ema interval cond decay"
        assert left == others.split()
        small = commandline.smaller(cfg, prompt=("a",), mult=(1,), classes="", flip=True, lr=9.0)
        assert small == dataclasses.replace(cfg, mult=(1,), lr=9.0)


def test_a_preset_is_no_setting_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "3.yaml").write_text("steps: 4\nprompt: no\n")
    data = dataclasses.make_dataclass("WithData", [("data", str, "")], bases=(Config,))
    monkeypatch.setattr(sys, "argv", ["chapter.py", "--data", "3"])
    cfg = commandline.parse(data, "", preset=str(tmp_path / "{data}.yaml"))
    assert (cfg.steps, cfg.prompt, cfg.config) == (4, ("no",), str(tmp_path / "3.yaml"))
    assert commandline.not_given(cfg, ("data", "steps")) == ["steps"]


PATHS = ("out", "weights", "vocabulary", "image", "mask", "prompt_file")


@pytest.mark.parametrize(
    "script, names", [("stable_diffusion", PATHS), ("ldm_cfg", ("out", "data_root", "resume"))]
)
def test_home_in_paths(script, names, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = importlib.import_module(script).Config
    home = {name: str(tmp_path / "x" / name) for name in names}
    (tmp_path / "f.yaml").write_text("".join(f"{name}: ~/x/{name}\n" for name in names))
    typed = [f"--{name.replace('_', '-')}=~/x/{name}" for name in names]
    for args in (["--config=~/f.yaml"], typed):
        cfg = commandline.parse(config, "", args)
        assert {name: getattr(cfg, name) for name in names} == home
    monkeypatch.setattr(sys, "argv", ["chapter.py", "--config=~/f.yaml"])
    assert commandline.not_given(cfg, (*names, "steps")) == ["steps"]


def test_home_is_not_in_what_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = importlib.import_module("stable_diffusion").Config
    typed = commandline.parse(config, "", ["--negative=~/x", "--prompt", "~/y", "--out=a~/b"])
    (tmp_path / "f.yaml").write_text("negative: ~/x\nprompt: ~/y\nout: a~/b\n")
    file = commandline.parse(config, "", ["--config", str(tmp_path / "f.yaml")])
    for cfg in (typed, file):
        assert (cfg.negative, cfg.prompt, cfg.out) == ("~/x", ("~/y",), "a~/b")


def test_home_in_arguments_without_a_flag_and_in_texts_of_every_script(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for script, args, expected in (
        ("compare_samplers", ["~/a.pt"], {"checkpoint": "a.pt"}),
        (
            "eval_fid",
            ["~/a.npz", "~/b:test", "--json=~/c"],
            {"a": "a.npz", "b": "b:test", "json": "c"},
        ),
        ("eval_fid", ["stats", "~", "--out", "~/s.npz"], {"a": None, "b": "", "out": "s.npz"}),
        ("networks.published.__main__", ["~/a", "--out=~/b"], {"checkpoint": "a", "out": "b"}),
        ("image_data.__main__", ["--data", "~/a"], {"data": "a"}),
    ):
        cfg = commandline.parse(importlib.import_module(script).Config, "", args)
        for name, below in expected.items():
            whole = "stats" if below is None else str(tmp_path / below)
            assert getattr(cfg, name) == whole
    words = ["--classes=~x", "--sample-args=~ --out ~/y", "--metrics=~"]
    cfg = commandline.parse(importlib.import_module("eval_fid").Config, "", words)
    assert (cfg.classes, cfg.sample_args, cfg.metrics) == ("~x", "~ --out ~/y", "~")


def test_home_of_others_and_of_nobody(tmp_path, parsed):
    pwd = pytest.importorskip("pwd")
    mine = pwd.getpwuid(os.getuid())
    assert parsed(f"out: ~{mine.pw_name}/x\n").out == f"{mine.pw_dir}/x"
    for text in ("~nobody-of-this-name/x", "~nobody-of-this-name"):
        for args in ((f"out: {text}\n",), ("", f"--out={text}"), ("", "--out", text)):
            with pytest.raises(BadInput) as error:
                parsed(*args)
            told = f"--out {text}: no home folder is known of ~nobody-of-this-name; type ./{text}"
            assert str(error.value).startswith(told)
    assert parsed("out: ./~x\nnegative: ~x\n") == Config(out="./~x", negative="~x")
