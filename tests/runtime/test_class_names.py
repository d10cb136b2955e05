"""--classes: names, exactly, or their places; but where names are numbers, numbers are names."""

from runtime.commandline import BadInput, class_list, parse_classes

import importlib
import json
import sys

import numpy as np
import pytest
from launching import succeed
from PIL import Image

from image_data import datasets
from networks.published.dit import label_names

DIGITS = tuple("0123456789")
THOUSAND = tuple(map(str, range(1000)))


@pytest.mark.parametrize(
    "typed, names, expected",
    [
        ("1", ("1", "2", "10"), [0]),
        ("10,1", ("1", "2", "10"), [2, 0]),
        ("3", ("3", "7"), [0]),  # of a network that was trained on --classes 3,7
        ("7,0,3", DIGITS, [7, 0, 3]),
        ("7,999", THOUSAND, [7, 999]),
        ("cat,7", ("7", "cat"), [1, 0]),
        ("0", ("1", "0"), [1]),  # of --classes 1,0
        ("007", ("007", "8"), [0]),
        ("1e3,-1", ("-1", "1e3"), [1, 0]),
        ("0", ("\uff10", "cat"), [0]),  # a wide zero is that number, in its place
        ("0-9", ("0-9", "10-19"), [0]),
        ("1", ("0-9", "10-19"), [1]),
        ("1,dog", ("cat", "dog"), [1, 1]),
        ("inf,nan,0", ("inf", "nan"), [0, 1, 0]),  # words, not numbers
        ("train,all,test", ("all", "test", "train"), [2, 0, 1]),
        ("tench,crane 3,2,4", ("tench", "crane 1", "7 2", "crane 3", "4"), [0, 3, 2, 4]),
        ("1", ("crane, bird", "crane, machine"), [1]),
        ("0", (" cat", "dog"), [0]),
        ("2", ("crane", "x", "crane"), [2]),
        ("\u00e9t\u00e9", ("x", "e\u0301te\u0301"), [1]),  # as macOS writes it
        ("", ("a", "b"), [0, 1]),
        ("", (), []),
    ],
)
def test_what_is_meant(typed, names, expected):
    assert parse_classes(typed, names) == parse_classes(class_list(typed), list(names)) == expected


RULE = "; where names are numbers, a number is a name"


@pytest.mark.parametrize(
    "typed, names, told",
    [
        ("0", ("1", "2", "10"), "there is 1, 2, 10" + RULE),
        ("0", ("3", "7"), "there is 3, 7" + RULE),
        ("2", ("0", "1", "7"), "there is 0, 1, 7" + RULE),
        ("0", ("7", "cat"), "there is 7, cat" + RULE),
        ("0", ("-1", "1e3"), "there is -1, 1e3" + RULE),
        ("7", ("007", "8"), "did you mean 007?"),
        ("1.0", ("1", "0"), "did you mean 1?"),
        ("1", ("\uff11", "cat"), "did you mean \uff11?"),
        ("\uff10", ("cat", "dog"), "there is 0 cat, 1 dog"),
        ("01", ("cat", "dog"), "there is 0 cat, 1 dog"),
        ("-1", ("cat", "dog"), "there is 0 cat, 1 dog"),
        ("2", ("cat", "dog"), "there is 0 cat, 1 dog"),
        ("9" * 5000, ("cat",), "there is 0 cat"),
        ("1000", THOUSAND, "18, 19 ..."),
        ("Cat", ("cat", "dog"), "did you mean cat?"),
        ("cat", (" cat", "dog"), "did you mean ' cat'? type 0"),
        ("crane, bird", ("crane, bird", "dog"), "did you mean 'crane, bird'? type 0"),
        ("2, old", ("1", "2, old"), "did you mean '2, old'? that cannot be typed: rename it"),
        ("crane", ("crane", "x", "crane"), "0 and 2 have this name; type the number"),
        ("all", ("cat", "dog"), "leave --classes out for all"),
        ("train", ("cat", "dog"), "there is 0 cat, 1 dog"),
        ("3-7", DIGITS, "type 3,4,5,...,7; a range is not taken"),
        ("0-1", ("cat", "dog"), "type 0,1; a range is not taken"),
        ("0-5", ("cat", "dog"), "1 dog; a range is not taken"),
        ("cat dog", ("cat", "dog"), "type cat,dog"),
        ("a\nb", ("a", "b"), "--classes 'a\\nb': there is 0 a, 1 b"),
        (",", ("cat", "dog"), "--classes ',' names no class; leave it out for all of them"),
        ("0", (), "there is no class"),
    ],
)
def test_what_is_refused_and_told(typed, names, told):
    with pytest.raises(BadInput) as error:
        parse_classes(typed, names)
    line = str(error.value)
    assert line.startswith("--classes ") and told in line and "\n" not in line
    assert len(line) < 300
    if RULE in told:
        assert line.endswith(told)


def test_other_names_are_looked_up_after_those_of_classes():
    names, wnids = ("cat", "n01", "dog"), {"n01": 2, "n02": 0}
    assert parse_classes("n01,n02,2,dog", names, wnids) == [1, 0, 2, 2]
    with pytest.raises(BadInput, match="--classes 3"):
        parse_classes("3", names, wnids)


# ------------------------------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Folders 1, 2 and 10 of gray images, each as bright as it is called."""
    home = tmp_path_factory.mktemp("numbered")
    for split in ("train", "test"):
        for name in ("1", "2", "10"):
            folder = home / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((16, 16), int(name), np.uint8)).save(folder / f"{i}.png")
    return home


@pytest.mark.parametrize("classes", ["10,1", ["10", "1"]])
def test_folders_that_are_numbers_are_named_by_them(classes, numbered):
    ds = datasets.load(str(numbered / "data"), numbered / "root", classes=classes)
    assert ds.class_names == ("10", "1") and ds.images.shape[0] == 6
    assert np.array_equal(ds.images[:, 0, 0, 0], np.array([10, 1])[ds.labels])
    with pytest.raises(BadInput, match="--classes 0: there is 1, 2, 10; where names are numbers"):
        datasets.load(str(numbered / "data"), numbered / "root", classes="0")
    with pytest.raises(BadInput, match="--classes ',' names no class"):
        datasets.load(str(numbered / "data"), numbered / "root", classes=",")


def test_every_command_asks_for_them_by_name(numbered, tiny, monkeypatch, capsys):
    data = ["--data", numbered / "data", "--data-root", numbered / "root", "--gpus", "0"]
    flags = [*tiny["ddpm_pixel"], "--steps", "2", "--sample-every", "0", "--n", "4"]
    run = numbered / "run"
    succeed("ddpm_pixel", *data, *flags, "--classes", "2,10", "--out", run)
    drawing = ["--sample", run / "ckpt.pt", "--n", "3", "--out", run / "of"]
    for script in ("ddpm_pixel", "ddim"):
        succeed(script, *drawing, "--gpus", "0", "--classes", "10")
        with np.load(run / "of" / "samples.npz") as drawn:
            assert list(drawn["arr_1"]) == [1, 1, 1]
    for script, args in (
        ("ddpm_pixel", [*drawing, "--classes", "1"]),
        ("ddim", [*drawing, "--classes", "0"]),
        ("compare_samplers", [run / "ckpt.pt", "--classes", "1"]),
        ("image_data.__main__", [numbered / "data", *data[2:4], "--classes", "0"]),
    ):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(BadInput, match="where names are numbers, a number is a name"):
            module.main()


def test_names_of_imagenet_never_are_the_number_of_another(tmp_path):
    labels = {"0": "tench, Tinca tinca", "1": "3", "2": "crane"}
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": labels}))
    names = label_names(tmp_path, 4)
    for i, name in enumerate(names):
        assert parse_classes(name, names) == parse_classes(str(i), names) == [i]
