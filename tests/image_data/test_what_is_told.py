"""One line tells what was found in a folder or zip; torchvision's folders are found, too."""

from runtime import processes
from runtime.commandline import BadInput
from runtime.download import Unavailable

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import write_cifar, write_mnist, write_tree

from image_data import arrays, datasets, sources


@pytest.fixture
def told(tmp_path, capsys):
    """A function: load a set as in a process of its own; what it prints, path and folder cut."""

    def load(path, **options):
        processes.SAID.clear()
        capsys.readouterr()
        datasets.load(path, tmp_path / "prepared", **options)
        return capsys.readouterr().out.replace(f"{tmp_path}/", "")

    return load


def names(counts, folder=""):
    return [f"{folder}{name}/{i}.png" for name, count in counts.items() for i in range(count)]


def test_splits_and_classes_are_told_with_their_counts(tmp_path, told):
    train, test = {"car": 3, "bus": 2, "train": 4}, {"car": 1, "bus": 1}
    write_tree(tmp_path / "set", [*names(train, "train/"), *names(test, "val/")], side=2)
    line = "set: train/ with 9 images of 3 classes (bus 2, car 3, train 4); "
    line += "test split val/ with 2 images of 2 classes (bus 1, car 1)\n"
    for split in ("train", "test", "train"):  # prepared and found again
        assert told(tmp_path / "set", split=split) == line
    assert told(tmp_path / "set", classes="bus") == line  # of what there is, not of what is kept
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    assert told(tmp_path / "set.zip") == line.replace("set:", "set.zip:", 1)


def test_a_line_is_printed_once_whichever_splits_are_loaded(tmp_path, capsys):
    write_tree(tmp_path / "set", ["train/a/1.png", "train/b/2.png", "test/a/3.png"])
    for split in ("train", "test", "train"):
        datasets.load(tmp_path / "set", tmp_path / "d", split=split)
    assert capsys.readouterr().out.count("set: train/ with 2 images") == 1


def test_of_several_processes_the_first_prints(tmp_path, monkeypatch, told):
    write_tree(tmp_path / "set", ["1.png"])
    monkeypatch.setenv("RANK", "1")  # as torchrun tells it, before the processes know each other
    assert told(tmp_path / "set") == ""
    monkeypatch.setenv("RANK", "0")
    assert told(tmp_path / "set").startswith("set: 1 image without classes; there is no train or")


def test_long_lists_are_shortened(tmp_path, told):
    write_tree(tmp_path / "set", names({f"{i}": 1 for i in range(30)}), side=1)
    assert "30 images of 30 classes (0 1, 1 1, 2 1, 3 1, 4 1, ...); " in told(tmp_path / "set")


SPLITS = ["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"]


@pytest.mark.parametrize(
    "images, others, line",
    [
        (["1.png"], [], "there is no train or test folder: train and test are the same images"),
        (["train/a/1.png"], [], "there is no test folder: train and test are the same images"),
        (["test/a/1.png"], [], "there is no train folder: train and test are the same images"),
        (["train/a/1.png"], ["test/"], "test/ holds no images: train and test are the same"),
        (["train/a/1.png"], ["val/x.heic"], "val/ holds no images: train and test are the same"),
        (SPLITS, ["train/c/"], "without images: train/c/$"),
        (["a/1.png", "b/2.png"], ["train/", "c/x.heic"], "without images: c/, train/"),
        (["a/1.png", "b/2.png"], ["a/x.heic", "b/y.heic"], "not read: a/x.heic and 1 more$"),
        (
            SPLITS,
            ["r.txt", "train/metadata.jsonl"],
            r"not read: train/metadata.jsonl and 1 more \(c",
        ),
        (
            ["a/1.png", "b/2.png"],
            ["labels.csv"],
            r"not read: labels.csv \(classes are the names of",
        ),
        (["a/1.png", "b/2.png"], ["b/3"], "not read: b/3$"),
        ([*SPLITS, "x/5.png", "6.png"], [], "2 images outside of train/ and test/ not used"),
        ([*SPLITS, "val/a/5.png"], [], "1 image outside of train/ and test/ not used"),
        (["a/x/1.png", "b/2.png"], [], "classes are the first folders: a/x/1.png is of class a"),
        ([*SPLITS, "test/c/5.png"], [], "train/ has no images of c$"),
        ([*SPLITS[:3], "test/B/4.png"], [], "test/B/ is the class b$"),
        (
            [*SPLITS[:2], "val/images/3.png"],
            [],
            "val/images/ is no class of train/: its images have",
        ),
        (
            ["00000/1.png", "01000/2.png"],
            [],
            "00000, 01000 become classes by their folders; is that meant",
        ),
        (["2019/1.png", "2020/2.png"], [], "train and test are the same images$"),
        (["images/1.png", "masks/1.png"], [], "images and masks become two classes; is that meant"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_what_is_strange_is_told(tmp_path, told, images, others, line, packed):
    write_tree(tmp_path / "set", images)
    for name in others:
        where = tmp_path / "set" / name
        (where if name.endswith("/") else where.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            where.write_text("x")
    path = tmp_path / "set"
    if packed:
        path = shutil.make_archive(str(path), "zip", path)
    found = told(path).splitlines()
    assert len(found) == 1 and re.search(line, found[0]), found


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_empty_train_folder_is_not_replaced_by_test(tmp_path, told, packed):
    write_tree(tmp_path / "set", ["test/a/1.png", "test/b/2.png"])
    (tmp_path / "set" / "Train" / "a").mkdir(parents=True)
    path = tmp_path / "set"
    if packed:
        path = shutil.make_archive(str(path), "zip", path)
    with pytest.raises(BadInput, match="has test/, but Train/ holds no images: rename the folder"):
        datasets.load(path, tmp_path / "d")


@pytest.mark.parametrize("dry_run", [False, True])
def test_commands_that_train_and_their_plans_tell_it(tmp_path, capsys, dry_run):
    write_tree(tmp_path / "set", ["car/1.png", "bus/2.png", "train/3.png"])
    names = {"data": str(tmp_path / "set"), "data_root": tmp_path / "d", "size": 0, "classes": ""}
    names["out"] = ""
    for _ in range(2):  # first in one process, then in each
        assert len(datasets.of(SimpleNamespace(**names, dry_run=dry_run, smoke=False))) == 3
    line = "set: 3 images of 3 classes (bus 1, car 1, train 1); "
    assert capsys.readouterr().out.count(line) == 1


def test_a_plan_without_data_is_for_sets_that_are_not_to_be_had(tmp_path, monkeypatch, capsys):
    """Anything else that is wrong with a known set is an error in a dry run, too."""
    monkeypatch.setenv("DIFFUSION_MIRROR", "http://127.0.0.1:9")
    plan = SimpleNamespace(
        data="mnist", data_root=tmp_path, size=0, classes="", dry_run=True, smoke=False, out=""
    )
    assert datasets.of(plan).images.shape == (60_000, 28, 28, 1)
    assert "note: the plan is of gray images in place of mnist's" in capsys.readouterr().out
    plan.dry_run = False
    with pytest.raises(Unavailable, match="could not download"):
        datasets.of(plan)
    write_mnist(tmp_path / "mnist")
    plan.dry_run, plan.classes = True, "cat"
    with pytest.raises(BadInput, match="--classes cat"):
        datasets.of(plan)


# ------------------------------------------------------------------------- torchvision's folders


MNIST_AT = ["MNIST/raw", "MNIST", "mnist/raw", "mnist/MNIST/raw", "mnist/MNIST"]
FASHION_AT = [path.replace("MNIST", "FashionMNIST") for path in MNIST_AT]
FASHION_AT = [path.replace("mnist/", "fashion_mnist/") for path in FASHION_AT]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("DIFFUSION_MIRROR", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "name, where", [("mnist", w) for w in MNIST_AT] + [("fashion_mnist", w) for w in FASHION_AT]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
def test_torchvisions_mnist_is_found_and_not_downloaded(
    tmp_path, capsys, offline, name, where, zipped
):
    made = write_mnist(tmp_path / where, zipped=zipped)
    for split, (images, labels) in made.items():
        ds = datasets.load(name, tmp_path, split=split)
        assert (ds.images[..., 0] == images).all() and (ds.labels == labels).all()
        assert ds.class_names == (arrays.FASHION if "fashion" in name else arrays.DIGITS)
        part = "train" if split == "train" else "t10k"
        files = [
            tmp_path / where / f"{part}-{kind}-ubyte{'.gz' * zipped}"
            for kind in ("images-idx3", "labels-idx1")
        ]
        line = f"{split} images and labels are read from {files[0]} and {files[1]}\n"
        assert capsys.readouterr().out == line
    assert not list(tmp_path.rglob("*.part"))


def test_our_own_folder_comes_first_and_is_quiet(tmp_path, capsys, offline):
    write_mnist(tmp_path / "MNIST" / "raw", train=7)
    write_mnist(tmp_path / "mnist", train=30)
    assert len(datasets.load("mnist", tmp_path)) == 30 and capsys.readouterr().out == ""


def test_only_files_that_are_missing_are_downloaded(tmp_path, monkeypatch):
    made = write_mnist(tmp_path / "all")
    write_mnist(tmp_path / "MNIST" / "raw", zipped=False)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    asked = []

    def fetch(name, mirrors, folder, md5):
        asked.append(name)
        folder.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "all" / name, folder)

    monkeypatch.setattr(sources, "fetch", fetch)
    ds = datasets.load("mnist", tmp_path, split="test")
    assert asked == ["t10k-labels-idx1-ubyte.gz"] and (ds.labels == made["test"][1]).all()


@pytest.mark.parametrize(
    "where, given", [(w, g) for w in ("MNIST/raw", "FashionMNIST/raw") for g in ("", w, w[:-4])]
)
def test_torchvisions_mnist_as_a_path(tmp_path, where, given):
    images, labels = write_mnist(tmp_path / "data" / where)["train"]
    ds = datasets.load(tmp_path / "data" / given, tmp_path / "d")
    assert (ds.images[..., 0] == images).all() and (ds.labels == labels).all()
    assert ds.class_names == (arrays.FASHION if "Fashion" in where else arrays.DIGITS)


@pytest.mark.parametrize("below", ["{0}/{0}", "{0}/{1}", "{1}"])
@pytest.mark.parametrize("where, given", [("raw", "mnist"), ("mnist", "mnist"), ("any", "{}/any")])
def test_unpacked_mnist_files_in_folders_of_their_names(tmp_path, offline, where, given, below):
    """As some programs unpack them, and with the dot that others write in their names."""
    where = tmp_path / ("MNIST/raw" if where == "raw" else where)
    images, labels = write_mnist(where, zipped=False)["train"]
    for path in list(where.iterdir()):
        other = where / below.format(path.name, path.name.replace("-idx", ".idx"))
        moved = path.rename(where / "moving")
        other.parent.mkdir(exist_ok=True)
        moved.rename(other)
    ds = datasets.load(given.format(tmp_path), tmp_path)
    assert (ds.images[..., 0] == images).all() and (ds.labels == labels).all()


def test_a_path_with_both_is_refused(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(tmp_path / "data" / name / "raw")
    with pytest.raises(
        BadInput, match="several data sets: .*MNIST/raw and .*FashionMNIST/raw; type"
    ):
        datasets.load(tmp_path / "data", tmp_path / "d")


@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "unpacked"])
def test_torchvisions_cifar10_is_found_and_not_downloaded(tmp_path, capsys, offline, kind, packed):
    """It is right below its root, as torchvision leaves it, and not in ROOT/cifar10."""
    for split, (planes, labels) in write_cifar(tmp_path, kind, packed).items():
        ds = datasets.load("cifar10", tmp_path, split=split)
        assert (np.asarray(ds.images) == planes.transpose(0, 2, 3, 1)).all()
        assert (ds.labels == labels).all()
        line = f"{split} images and labels are read from CIFAR-10's files in {tmp_path}/cifar-10-"
        assert capsys.readouterr().out.startswith(line)
