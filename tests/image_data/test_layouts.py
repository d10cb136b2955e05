"""One table of layouts: what is understood here, by ImageFolder, and by datasets' imagefolder."""

from runtime.commandline import BadInput

import importlib.metadata
import importlib.util
import re
import sys
import types
import zipfile
from typing import NamedTuple

import pytest

from image_data.trees import tree_source


class Case(NamedTuple):
    """A layout. "cat:1 dog:2,3 | cat: dog:4": classes in their order, with numbers of images.

    Before '|' is the training split, behind it the test split, where that is another; images
    without classes are ":1,2". An image n lies at <folder>/<n>.png; other files have endings.
    """

    files: str
    ours: str  # or the regular expression of a refusal, behind '!'
    torchvision: str  # ImageFolder of each of `folders`; '!' where it refuses
    imagefolder: str  # of datasets 5.2.0, as it was seen
    folders: str = ""  # those of train and test, if ImageFolder is to know them


SPLITS = "cat:1 dog:2 | cat:3 dog:4"
CASES = {
    "flat": Case("1 2", ":1,2", "!", ":1,2"),
    "classes": Case("cat/1 dog/2 dog/3", *["cat:1 dog:2,3"] * 3),
    "one_class": Case("cat/1 cat/2", ":1,2", "cat:1,2", ":1,2"),
    "splits": Case(
        "train/cat/1 train/dog/2 test/cat/3 test/dog/4", *[SPLITS] * 3, folders="train test"
    ),
    "training_and_testing": Case(
        "training/cat/1 training/dog/2 testing/cat/3 testing/dog/4",
        *[SPLITS] * 3,
        folders="training testing",
    ),
    "capitals": Case(
        "Train/cat/1 Train/dog/2 Test/cat/3 Test/dog/4",
        SPLITS,
        SPLITS,
        "cat:1,3 dog:2,4",
        folders="Train Test",
    ),
    "all_capitals": Case(
        "TRAIN/cat/1 TRAIN/dog/2 Validation/cat/3 Validation/dog/4",
        SPLITS,
        SPLITS,
        "cat:1,3 dog:2,4",
        folders="TRAIN Validation",
    ),
    "val_lacks_a_class": Case(
        "train/ant/1 train/bee/2 val/bee/3",
        "ant:1 bee:2 | ant: bee:3",
        "ant:1 bee:2 | bee:3",  # bee is 1 in train, 0 in val
        "ant:1 bee:2 | ant: bee:3",
        folders="train val",
    ),
    "test_has_a_class_more": Case(
        "train/ant/1 train/cow/2 test/bee/3 test/cow/4",
        "ant:1 bee: cow:2 | ant: bee:3 cow:4",
        "ant:1 cow:2 | bee:3 cow:4",
        "ant:1 bee: cow:2 | ant: bee:3 cow:4",
        folders="train test",
    ),
    "train_val_test": Case(
        "train/ant/1 train/bee/2 val/ant/5 val/bee/6 test/ant/3 test/bee/4",
        *["ant:1 bee:2 | ant:3 bee:4"] * 3,
        folders="train test",
    ),
    "a_train_is_a_thing": Case(
        "car/1 bus/2 train/3 train/4", "bus:2 car:1 train:3,4", "bus:2 car:1 train:3,4", ":3,4"
    ),
    "things_named_like_splits": Case(
        "bus/1 test_tube/2 train_station/3",
        *["bus:1 test_tube:2 train_station:3"] * 2,
        "?:3 | test_tube:2 train_station:",
    ),
    "numbers": Case("10/1 9/2 2/3", "2:3 9:2 10:1", "10:1 2:3 9:2", "10:1 2:3 9:2"),
    "inner_folders": Case(
        "cat/persian/1 cat/siamese/2 dog/pug/3",
        *["cat:1,2 dog:3"] * 2,
        "persian:1 pug:3 siamese:2",
    ),
    "depths_differ": Case("cat/persian/1 cat/2 dog/3", *["cat:1,2 dog:3"] * 2, ":1,2,3"),
    "wrapped_twice": Case(
        "my/photos/train/cat/1 my/photos/train/dog/2 my/photos/test/cat/3 my/photos/test/dog/4",
        *[SPLITS] * 3,
        folders="my/photos/train my/photos/test",
    ),
    "imagenet": Case(
        "I/Data/C/train/n01/1 I/Data/C/train/n02/2 I/Data/C/val/3 I/Data/C/val/4",
        "n01:1 n02:2 | :3,4",
        "n01:1 n02:2 | !",
        ":1,2 | :3,4",
        folders="I/Data/C/train I/Data/C/val",
    ),
    "imagenet_with_val_in_classes": Case(
        "train/n01/1 train/n02/2 val/n01/3 val/n02/4 test/5",
        *["n01:1 n02:2 | n01:3 n02:4"] * 2,
        ":1,2 | :5",
        folders="train val",
    ),
    "tiny_imagenet": Case(
        "train/n01/images/1 train/n02/images/2 val/images/3 val/val_annotations.txt",
        "n01:1 n02:2 | :3",
        "n01:1 n02:2 | images:3",
        ":1,2 | :3",
        folders="train val",
    ),
    "seg_train_as_intel_has_it": Case(
        "seg_train/seg_train/sea/1 seg_train/seg_train/sky/2 seg_test/seg_test/sea/3 "
        "seg_test/seg_test/sky/4 seg_pred/seg_pred/5",
        *["sea:1 sky:2 | sea:3 sky:4"] * 3,
        folders="seg_train/seg_train seg_test/seg_test",
    ),
    "training_set": Case(
        "training_set/cat/1 training_set/dog/2 test_set/cat/3 test_set/dog/4",
        *[SPLITS] * 3,
        folders="training_set test_set",
    ),
    "train_and_test1": Case(
        "train/1 train/2 test1/3", ":1,2 | :3", "test1:3 train:1,2", "?:1,2 | test1:3 train:"
    ),
    "only_val": Case(
        "val/cat/1 val/dog/2", "cat:1 dog:2", "cat:1 dog:2", "- | cat:1 dog:2", folders="val"
    ),
    "only_train": Case("train/cat/1 train/dog/2", *["cat:1 dog:2"] * 3, folders="train"),
    "another_folder_beside_splits": Case(
        "train/cat/1 train/dog/2 test/cat/3 test/dog/4 extra/5",
        *[SPLITS] * 3,
        folders="train test",
    ),
    "Cat_and_cat_in_two_splits": Case(
        "train/Cat/1 train/dog/2 test/cat/3 test/dog/4",
        "Cat:1 dog:2 | Cat:3 dog:4",
        "Cat:1 dog:2 | cat:3 dog:4",
        "Cat:1 cat: dog:2 | Cat: cat:3 dog:4",
        folders="train test",
    ),
    "capital_endings": Case("cat/1.PNG dog/2.JPG dog/3.WebP dog/4.tiff", *["cat:1 dog:2,3,4"] * 3),
    "commas_and_spaces": Case("b,c/1 ä_ö/2", *["b,c:1 ä_ö:2"] * 3),
    "left_behind": Case(
        "__MACOSX/cat/._1.png cat/.DS_Store cat/1 dog/2 dog/Thumbs.db .trash/3 @eaDir/1/4",
        "cat:1 dog:2",
        ".trash:3 @eaDir:4 __MACOSX: cat:1 dog:2",  # ._1.png is an image to it
        ":1,2,4",
    ),
    "yolo": Case(
        "images/train/1 images/val/2 labels/train/1.txt labels/val/2.txt",
        ":1 | :2",
        "!",
        "?:1 | train: val:2",
    ),
    "split_in_the_names_of_files": Case("train_1 test_2", ":1,2", "!", ":1 | :2"),
    "metadata": Case("metadata.csv cat/1 dog/2", "cat:1 dog:2", "cat:1 dog:2", ":1,2"),
    "parts_of_dataset_tool": Case(  # without its dataset.json
        "00000/img00000000 00000/img00000001 00001/img00000002",
        *["00000:img00000000,img00000001 00001:img00000002"] * 3,
    ),
    "train_and_training": Case(
        "train/a/1 training/a/2",
        "!train/ and training/ both name the train split; join them",
        "",
        "",
    ),
    "splits_in_two_cases": Case(
        "train/a/1 Train/b/2", "!Train/ and train/ both name the train split", "", ""
    ),
    "test_and_val_without_train": Case(
        "test/a/1 val/a/2", "!has test/, val/, but there is no train/: rename", "", ""
    ),
    "one_more_folder_than_flat_splits": Case(
        "train/1 test/2 extra/3",
        "!has extra/ beside test/, train/, which by name are splits",
        "",
        "",
    ),
    "train_of_classes_beside_a_class": Case(
        "train/cat/1 train/dog/2 car/3", "!has car/ beside train/, which by name is a split", "", ""
    ),
    "splits_inside_of_classes": Case(
        "cat/train/1 cat/test/2 dog/train/3 dog/test/4",
        "!has splits inside of cat/, expected .*train/cat/1.png",
        "",
        "",
    ),
    "Cat_and_cat": Case("Cat/1 cat/2", "!Cat/ and cat/ differ only by case", "", ""),
    "a_dot_at_the_end": Case(
        "cat/1 cat./2", "!cat/ and cat./ differ only by .* a space or dot", "", ""
    ),
    "loose_beside_classes": Case(
        "a/1 b/2 3", r"!mixes class folders and loose images \(3.png\)", "", ""
    ),
    "loose_in_a_split": Case(
        "train/a/1 train/b/2 test/a/3 test/4", "!mixes .*loose images .4.png", "", ""
    ),
}
READ = {name: case for name, case in CASES.items() if case.ours[0] != "!"}


def paths(case):
    return [name if "." in name.split("/")[-1] else f"{name}.png" for name in case.files.split()]


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")  # what is understood are the names
    return folder


def write_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


def line(class_names, images):
    """ "cat:1 dog:2,3" of class names and {path: label}."""
    numbers = {}
    for path, label in images.items():
        numbers.setdefault(label, []).append(
            re.split(r"[/\\]", path)[-1].split(".")[0].split("_")[-1]
        )
    if not class_names:
        return ":" + ",".join(sorted(sum(numbers.values(), [])))
    listed = [
        f"{name}:{','.join(sorted(numbers.get(i, [])))}" for i, name in enumerate(class_names)
    ]
    unknown = [f"?:{','.join(sorted(numbers[None]))}"] if None in numbers else listed
    return " ".join(unknown)


def understood(path):
    """What a Case calls `ours`."""
    found = []
    for split in ("train", "test"):
        contents = tree_source(path, split).contents()
        pairs = zip(contents.items, contents.labels.tolist(), strict=True)
        found.append((line(contents.class_names, dict(pairs)), contents.told))
    assert found[0][1] == found[1][1]  # whichever split is loaded, one line tells of both
    same = "train and test are the same images" in found[0][1]
    assert same == (found[0][0] == found[1][0])
    return found[0][0] if same else f"{found[0][0]} | {found[1][0]}"


@pytest.mark.parametrize("name", READ)
def test_folders_and_zips_of_any_system_are_understood_as_one(tmp_path, name):
    case = CASES[name]
    assert understood(write(tmp_path / "set", paths(case))) == case.ours
    assert understood(write_zip(tmp_path / "a.zip", paths(case))) == case.ours
    windows = [f"set\\{path}".replace("/", "\\") for path in reversed(paths(case))]
    assert understood(write_zip(tmp_path / "b.zip", windows)) == case.ours
    assert understood(write(tmp_path / "unpacked", windows)) == case.ours  # as Python unpacks it
    dots = [f"./x/../set/./{path}" for path in paths(case)]
    assert understood(write_zip(tmp_path / "c.zip", dots)) == case.ours


@pytest.mark.parametrize("name", CASES.keys() - READ.keys())
def test_what_has_no_one_meaning_is_refused(tmp_path, name):
    case = CASES[name]
    for path in (
        write(tmp_path / "set", paths(case)),
        write_zip(tmp_path / "a.zip", paths(case)),
        write_zip(tmp_path / "b.zip", [path.replace("/", "\\") for path in paths(case)]),
    ):
        for split in ("train", "test"):
            with pytest.raises(BadInput, match=case.ours[1:]) as told:
                tree_source(path, split).contents()
            assert "\n" not in str(told.value) and str(path) in str(told.value)


@pytest.fixture(scope="module")
def image_folder():
    """torchvision/datasets/folder.py alone: the package itself cannot be loaded everywhere."""
    try:
        wheel = importlib.metadata.distribution("torchvision")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchvision is not installed")
    vision = types.ModuleType("folder_alone.vision")
    vision.VisionDataset = object
    package = types.ModuleType("folder_alone")
    package.__path__ = []
    where = wheel.locate_file("torchvision/datasets/folder.py")
    spec = importlib.util.spec_from_file_location("folder_alone.folder", where)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "folder_alone", package)
        patch.setitem(sys.modules, "folder_alone.vision", vision)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", READ)
def test_image_folder_reads_the_same_or_differs_as_is_said(image_folder, tmp_path, name):
    case = CASES[name]
    write(tmp_path, paths(case))
    found = []
    for folder in case.folders.split() or [""]:
        try:
            classes, number = image_folder.find_classes(tmp_path / folder)
            pairs = image_folder.make_dataset(
                str(tmp_path / folder), number, image_folder.IMG_EXTENSIONS
            )
            found.append(line(classes, dict(pairs)))
        except FileNotFoundError:  # no class folder, or one without images
            found.append("!")
    assert " | ".join(found) == case.torchvision


def test_hugging_faces_imagefolder_reads_what_the_table_says(tmp_path, monkeypatch):
    """Only where `datasets` is installed; it is not among what the tests install."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hugging_face = pytest.importorskip("datasets")
    for name, case in READ.items():
        folder = write(tmp_path / name, paths(case))
        if name == "metadata":
            (folder / "metadata.csv").write_text("file_name,text\ncat/1.png,a\ndog/2.png,b\n")
        options = {"data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
        found = {}
        for split, images in hugging_face.load_dataset("imagefolder", **options).items():
            images = images.cast_column("image", hugging_face.Image(decode=False))
            classes = images.features["label"].names if "label" in images.features else []
            files = [image["path"] for image in images["image"]]
            labels = images["label"] if classes else [None] * len(files)
            found[split] = line(classes, dict(zip(files, labels, strict=True)))
        test = found.get("test", found.get("validation"))
        train = found.get("train", "-")
        assert (train if test is None else f"{train} | {test}") == case.imagefolder, name


DIFFERS = {  # from imagefolder, and why; all else is read alike
    "capitals": "it knows no Train",
    "all_capitals": "it knows no Train",
    "a_train_is_a_thing": "it takes the class for a split",
    "things_named_like_splits": "it takes the classes for splits",
    "numbers": "it sorts 10 before 2",
    "inner_folders": "it calls the last folder the class",
    "depths_differ": "it knows no class where depths differ",
    "imagenet": "it knows no class where depths differ",
    "imagenet_with_val_in_classes": "it knows no class where depths differ",
    "tiny_imagenet": "it knows no class where depths differ",
    "train_and_test1": "it has labels in one of the splits only",
    "only_val": "it has no training images",
    "Cat_and_cat_in_two_splits": "it takes them for two classes",
    "left_behind": "it reads what a Synology leaves behind",
    "yolo": "it calls the last folder the class, which is the split",
    "split_in_the_names_of_files": "it reads splits from them",
    "metadata": "it reads no classes where there is a table",
}


def test_the_differences_from_imagefolder_are_those_that_are_meant():
    assert {n for n, case in READ.items() if case.ours != case.imagefolder} == DIFFERS.keys()
