"""Zips and folders of StyleGAN's and EDM's dataset_tool.py: labels are in dataset.json."""

from runtime import processes
from runtime.commandline import BadInput

import io
import json
import os
import zipfile

import numpy as np
import pytest
from data_files import noise
from PIL import Image

from image_data import datasets
from image_data.trees import tree_source

IMAGES = [
    f"{i // 4:05d}/img{i:08d}.png" for i in range(12)
]  # three folders, as the tool fills them
LABELS = {name: (7, 0, 10)[i % 3] for i, name in enumerate(IMAGES)}


def write(path, images, files):
    """A folder, or a zip, of images {name: pixels} and of files {name: text or object of JSON}."""
    contents = {}
    for name, pixels in images.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        contents[name] = buffer.getvalue()
    for name, value in files.items():
        contents[name] = (value if isinstance(value, str) else json.dumps(value)).encode()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def table(labels):
    return {"labels": [[name, label] for name, label in labels.items()]}


@pytest.fixture(params=["set", "set.zip"])
def made(request, tmp_path):
    """A function: the Contents of such a set, of images (or all of one colour) and files."""

    def make(files, images=IMAGES, split="train"):
        path = write(tmp_path / request.param, dict.fromkeys(images, noise((2, 2))), files)
        return tree_source(path, split).contents()

    return make


def named(contents):
    """{image: class name} of a Contents."""
    names = [contents.class_names[i] for i in contents.labels] if contents.class_names else []
    return dict(
        zip([name.replace("\\", "/") for name in contents.items], names, strict=bool(names))
    )


@pytest.mark.parametrize("packed", ["set", "set.zip"])
def test_images_have_the_labels_of_the_table(tmp_path, packed, capsys):
    pixels = {name: noise((4, 4, 3), i) for i, name in enumerate(IMAGES)}
    path = write(tmp_path / packed, pixels, {"dataset.json": table(LABELS)})
    ds = datasets.load(path, tmp_path / "d")
    assert ds.class_names == ("0", "7", "10")
    assert (ds.images == np.stack(list(pixels.values()))).all()
    assert [ds.class_names[i] for i in ds.labels] == [str(LABELS[name]) for name in IMAGES]
    said = capsys.readouterr().out
    assert f"{path}: 12 images of 3 classes (0 4, 7 4, 10 4); " in said
    assert said.endswith("; classes are the labels in dataset.json\n")
    only = datasets.load(path, tmp_path / "d", classes="10")
    assert (only.images == np.stack(list(pixels.values()))[2::3]).all()


@pytest.mark.parametrize("around", ["afhq/", "00000/", "a/b/", ".//x/../"])
def test_the_table_is_found_in_folders_around(around, made):
    if around.startswith("."):  # as some programs pack them
        files = {f"{around}dataset.json": table(LABELS)}
        contents = made(files, [f"{around}{name}" for name in IMAGES])
    else:
        files = {f"{around}dataset.json": table(LABELS), f"{around}LICENSE": "", "README": ""}
        contents = made(files, [f"{around}{name}" for name in IMAGES])
    found = {name.rpartition("/")[2]: label for name, label in named(contents).items()}
    assert found == {name.rpartition("/")[2]: str(label) for name, label in LABELS.items()}
    assert contents.told.count("classes are the labels in") == 1


def test_fewer_than_a_thousand_images_lie_in_one_folder(made):
    images = [f"00000/img{i:08d}.png" for i in range(3)]
    files = {"dataset.json": table({name: i for i, name in enumerate(images)})}
    assert list(named(made(files, images)).values()) == ["0", "1", "2"]


def test_each_split_may_have_its_own(made):
    images = [f"{split}/00000/img{i:08d}.png" for split in ("train", "test") for i in range(2)]
    labels = {name.partition("/")[2]: i % 2 for i, name in enumerate(images)}
    files = {"train/dataset.json": table(labels)}
    files["test/dataset.json"] = table({name: label + 1 for name, label in labels.items()})
    train, test = made(files, images), made(files, images, "test")
    assert train.class_names == test.class_names == ("0", "1", "2")
    assert list(named(train).values()) == ["0", "1"] and list(named(test).values()) == ["1", "2"]
    assert "classes are the labels in train/dataset.json; classes are the labels in test/" in (
        train.told
    )


def test_source_folders_of_the_tool_have_their_own_names(made):
    """The tool reads such tables, too: images of any name, loose ones among them."""
    images = ["a/x.png", "b/y.png", "z.png", "a/w.png"]
    labels = dict(zip(images, (1, 0, 1, 0), strict=True))
    contents = made({"dataset.json": table(labels | {"gone.png": 5})}, images)
    assert named(contents) == {name: str(label) for name, label in labels.items()}
    windows = table({name.replace("/", "\\"): label for name, label in labels.items()})
    assert named(made({"dataset.json": windows}, images)) == named(contents)


def test_a_table_of_nothing_is_no_classes(made):
    contents = made({"dataset.json": {"labels": None}})
    assert contents.class_names == () and len(contents.items) == 12
    assert "12 images without classes" in contents.told
    assert contents.told.endswith("no classes, as is said in dataset.json")


@pytest.mark.parametrize(
    "value",
    [
        {"labels": None},  # of cat/ and dog/ the tool itself takes the folders
        {"labels": {"background": 0, "cat": 1}},  # another program's
        {"labels": ["cat", "dog"]},
        {"labels": [["other.png", 3]]},
        {"classes": 3},
        [1, 2],
        "{",
        "[" * 20_000,
        "\udcff",
    ],
    ids=["null", "dict", "names", "others", "key", "list", "torn", "deep", "bytes"],
)
def test_another_dataset_json_is_not_read_and_that_is_told(value, tmp_path):
    path = write(tmp_path / "set", dict.fromkeys(["cat/1.png", "dog/2.png"], noise((2, 2))), {})
    text = value if isinstance(value, str) else json.dumps(value)
    (path / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    contents = tree_source(path, "train").contents()
    assert contents.class_names == ("cat", "dog") and "not read: dataset.json (c" in contents.told


@pytest.mark.parametrize(
    "labels, told",
    [
        (dict(list(LABELS.items())[:-1]), f"has no label for {IMAGES[11]}; add them"),
        (dict(list(LABELS.items())[:2]), f"has no label for {IMAGES[2]} and 9 more; add"),
        (LABELS | {IMAGES[3]: 1.5}, f"gives {IMAGES[3]} the label 1.5, expected a whole number"),
        (LABELS | {IMAGES[3]: [0, 1]}, r"the label \[0, 1\], expected a whole number from 0 to"),
        (LABELS | {IMAGES[3]: True}, "the label True"),
        (LABELS | {IMAGES[3]: -1}, "the label -1"),
        (LABELS | {IMAGES[3]: "cat"}, "the label cat"),
        (LABELS | {IMAGES[3].replace("/", "\\"): 3}, f"gives {IMAGES[3]} the labels 7 and 3, exp"),
    ],
)
def test_labels_that_no_image_can_have_are_refused(labels, told, made):
    with pytest.raises(BadInput, match=f"set(.zip)?: dataset.json .*{told}") as error:
        made({"dataset.json": table(labels)})
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_no_table_or_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "set", dict.fromkeys(IMAGES, noise((2, 2))), {})
    os.mkfifo(path / "dataset.json")
    assert "not read: dataset.json" in tree_source(path, "train").contents().told
    (path / "dataset.json").unlink()
    write(path, {}, {"dataset.json": table(LABELS)})
    monkeypatch.setenv("DIFFUSION_UNPACKED_GB", "1e-7")
    with pytest.raises(BadInput, match="set: dataset.json takes .* more than the 1e-07 GB"):
        tree_source(path, "train").contents()
    monkeypatch.delenv("DIFFUSION_UNPACKED_GB")

    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", forbidden)
    with pytest.raises(
        BadInput, match=r"set: dataset.json cannot be read \(Permission denied\); re"
    ):
        tree_source(path, "train").contents()


def test_another_table_of_the_same_images_is_another_set(tmp_path):
    pixels = dict.fromkeys(IMAGES, noise((2, 2)))
    path = write(tmp_path / "set", pixels, {"dataset.json": table(LABELS)})
    first = datasets.load(path, tmp_path / "d").labels
    write(path, {}, {"dataset.json": table(LABELS | {IMAGES[0]: 10})})
    processes.SAID.clear()
    second = datasets.load(path, tmp_path / "d").labels
    assert first[0] == 1 and second[0] == 2 and (first[1:] == second[1:]).all()
    (path / "dataset.json").unlink()
    assert datasets.load(path, tmp_path / "d").class_names == ("00000", "00001", "00002")
