"""Every raw layout comes out as the pixels and labels that were written into it."""

from runtime.commandline import BadInput

import gzip
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from data_files import (
    CIFAR_TRAIN,
    idx_bytes,
    noise,
    python2_pickle,
    write_cifar,
    write_image,
    write_mnist,
    write_tree,
)

from image_data import datasets


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_files(tmp_path, name, split, zipped):
    images, labels = write_mnist(tmp_path / name, zipped=zipped)[split]
    ds = datasets.load(name, tmp_path, split=split)
    assert (np.asarray(ds.images)[..., 0] == images).all()
    assert (ds.labels == labels).all() and ds.labels.dtype == np.int64
    assert ds.num_classes == 10 and ds.class_names[9] == ("9" if name == "mnist" else "boot")
    assert ds.images.shape == (len(labels), 28, 28, 1) and isinstance(ds.images, np.memmap)


def test_idx_files_in_any_folder_and_with_a_dot(tmp_path):
    folder = tmp_path / "mine"
    images, _ = write_mnist(folder, zipped=False)["train"]
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("-idx", ".idx"))
    ds = datasets.load(folder, tmp_path / "out")
    assert ds.name == "mine" and (np.asarray(ds.images)[..., 0] == images).all()


def damage_deflate(raw):
    return raw[: len(raw) // 2] + b"\xff" * 40 + raw[len(raw) // 2 + 40 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-500],
        damage_deflate,
        lambda raw: b"<html>not found</html>",
        lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
        lambda raw: gzip.compress(b"\0\0\x0d\3" + gzip.decompress(raw)[4:]),
    ],
    ids=["cut", "overwritten", "html", "one_byte_short", "float_type"],
)
def test_damaged_idx_file_is_named(tmp_path, damage):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match="train-images-idx3-ubyte.gz is not a whole idx file"):
        datasets.load("mnist", tmp_path)


def test_idx_labels_must_fit(tmp_path):
    write_mnist(tmp_path / "mnist", train=5, zipped=False)
    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.arange(4)))
    with pytest.raises(BadInput, match="5 images, .* 4 labels"):
        datasets.load("mnist", tmp_path)
    labels.write_bytes(idx_bytes(np.array([1, 2, 26, 3, 4])))
    with pytest.raises(BadInput, match="has the label 26"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "unpacked"])
@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10(tmp_path, kind, packed, split):
    planes, labels = write_cifar(tmp_path / "cifar10", kind, packed)[split]
    ds = datasets.load("cifar10", tmp_path, split=split)
    assert len(ds) == (20 if split == "train" else 4) and ds.class_names[3] == "cat"
    for channel in range(3):  # red plane first
        assert (np.asarray(ds.images)[..., channel] == planes[:, channel]).all()
    assert (ds.labels == labels).all()


def test_cifar10_pickle_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    write_cifar(tmp_path / "cifar10", "python", packed=False)
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").write_bytes(
        pickle.dumps({b"data": Attack(), b"labels": [0]}, 4)
    )
    with pytest.raises(BadInput, match="damaged .*holds .*open"):
        datasets.load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x80\x02", b"\x80\x02N.", python2_pickle(noise((2, 10)), [1, 2]), b"garbage" * 9],
    ids=["empty", "cut", "none", "wrong_width", "garbage"],
)
def test_damaged_cifar10_batch(tmp_path, raw):
    write_cifar(tmp_path / "cifar10", "python", packed=False)
    (tmp_path / "cifar10" / "cifar-10-batches-py" / CIFAR_TRAIN[2]).write_bytes(raw)
    with pytest.raises(BadInput, match="CIFAR-10 files in .* are damaged"):
        datasets.load("cifar10", tmp_path)


def test_damaged_cifar10_archive(tmp_path):
    write_cifar(tmp_path / "cifar10", "binary", packed=True)
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    for raw in (path.read_bytes()[:-9000], damage_deflate(path.read_bytes()), b"no"):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match="CIFAR-10 files in .* are damaged"):
            datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["folders", "zip"])
def test_afhq(tmp_path, packed):
    classes = ("cat", "dog", "wild")
    names = [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in classes for i in "12"]
    folder = tmp_path / "afhq"
    pixels = write_tree(tmp_path / "raw" / "afhq" if packed else folder, names)
    if packed:
        folder.mkdir()
        shutil.make_archive(str(folder / "afhq"), "zip", tmp_path / "raw")
    train, test = (datasets.load("afhq", tmp_path, split=s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog", "wild")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (train.images[2] == pixels["train/dog/1.png"]).all()
    assert (test.images[5] == pixels["val/wild/2.png"]).all()
    assert ("sha256" in train.manifest.get("note", "")) == packed
    wild = datasets.load("afhq", tmp_path, classes=["wild", "cat"])
    assert wild.class_names == ("wild", "cat") and wild.labels.tolist() == [1, 1, 0, 0]
    assert (wild.images[2] == pixels["train/wild/1.png"]).all()


def write_kaggle(folder, split_folders=("train.X1", "train.X2", "train.X3", "train.X4", "val.X")):
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    titles = ["tench, Tinca tinca", "goldfish", "great white shark, man-eater", "tiger shark"]
    names = [f"{f}/{wnids[i % 4]}/{i}_{f[-1]}.JPEG" for i, f in enumerate(split_folders)]
    write_tree(folder, names)
    (folder / "Labels.json").write_text(json.dumps(dict(zip(wnids, titles, strict=True))))
    return names


def test_imagenet100_as_kaggle_lays_it_out(tmp_path):
    write_kaggle(tmp_path / "imagenet100")
    train = datasets.load("imagenet100", tmp_path)
    assert train.class_names == ("tench", "goldfish", "great white shark", "tiger shark")
    assert train.labels.tolist() == [0, 1, 2, 3]  # one in each of train.X1 ... train.X4
    assert datasets.load("imagenet100", tmp_path, split="test").labels.tolist() == [0]
    for chosen in (["goldfish", "tiger shark"], ["n01443537", "n01491361"], ["1", "3"], "1,3,1"):
        ds = datasets.load("imagenet100", tmp_path, classes=chosen)
        assert ds.class_names == ("goldfish", "tiger shark") and ds.labels.tolist() == [0, 1]
        assert (ds.images == train.images[[1, 3]]).all()


def test_imagenet100_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match=r"ambityga/imagenet100.*train\.X1.*val\.X.*Labels\.json"):
        datasets.load("imagenet100", tmp_path)
    folder = tmp_path / "imagenet100"
    write_kaggle(folder)
    shutil.rmtree(folder / "val.X")
    with pytest.raises(BadInput, match=r"lacks val\.X"):
        datasets.load("imagenet100", tmp_path, split="test")
    shutil.rmtree(folder / "train.X3")
    with pytest.raises(BadInput, match=r"lacks train\.X3"):
        datasets.load("imagenet100", tmp_path)
    (folder / "Labels.json").write_text("{'n0")
    write_tree(folder, ["train.X3/n01440764/9.png"])
    with pytest.raises(BadInput, match=r"Labels\.json is not an object"):
        datasets.load("imagenet100", tmp_path)
    (folder / "Labels.json").write_text('{"n01440764": "tench"}')
    with pytest.raises(BadInput, match="n01443537 is not named"):
        datasets.load("imagenet100", tmp_path)


def test_imagenet100_with_two_classes_of_one_name_keeps_the_numbers(tmp_path):
    write_kaggle(tmp_path / "i")
    (tmp_path / "i" / "Labels.json").write_text(
        '{"n01440764": "crane", "n01443537": "crane", "n01484850": "a", "n01491361": "b"}'
    )
    assert datasets.load(tmp_path / "i", tmp_path).class_names[:2] == ("n01440764", "n01443537")


def test_a_folder_and_its_zip_are_the_same_data(tmp_path):
    names = ["b/1.png", "b-2/1.png", "b/x/2.png", "a/9.png", "a/10.png"]
    pixels = write_tree(tmp_path / "pets", names)
    write_image(tmp_path / "pets" / "__MACOSX" / "b" / "1.png", noise((3, 3)))
    write_image(tmp_path / "pets" / "a" / "._9.png", noise((3, 3)))
    (tmp_path / "pets" / "a" / "notes.txt").write_text("not an image")
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path, "pets")
    folder, packed = (datasets.load(tmp_path / p, tmp_path / "d") for p in ("pets", "all.zip"))
    assert folder.class_names == packed.class_names == ("a", "b", "b-2")
    assert folder.key == packed.key and (folder.images == packed.images).all()
    assert (folder.images[0] == pixels["a/10.png"]).all()
    assert folder.labels.tolist() == [0, 0, 1, 1, 2]


def test_flat_folder_has_no_classes(tmp_path):
    pixels = write_tree(tmp_path / "v1.0", ["2.png", "1.png"])
    ds = datasets.load(tmp_path / "v1.0", tmp_path / "d")
    assert ds.name == "v1.0" and ds.class_names == () and ds.labels.tolist() == [0, 0]
    assert (ds.images[0] == pixels["1.png"]).all()
    test = datasets.load(tmp_path / "v1.0", tmp_path / "d", split="test")
    assert test.key == ds.key and "train and test are the same images" in test.manifest["note"]


@pytest.mark.parametrize("wrapper", ["", "outer/", "outer/inner/"])
@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_split_folders(tmp_path, wrapper, held_out):
    names = [f"{wrapper}train/a/1.png", f"{wrapper}train/c/2.png", f"{wrapper}{held_out}/c/3.png"]
    pixels = write_tree(tmp_path / "set", names)
    train, test = (datasets.load(tmp_path / "set", tmp_path, split=s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "c")  # though the test split lacks a
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [1]
    assert (test.images[0] == pixels[names[2]]).all()


def test_only_a_test_folder_serves_both_splits(tmp_path):
    write_tree(tmp_path / "set", ["test/a/1.png", "test/b/2.png"])
    ds = datasets.load(tmp_path / "set", tmp_path)
    assert ds.class_names == ("a", "b") and "same images" in ds.manifest["note"]


def test_a_class_may_be_named_test(tmp_path):
    """Among three; of two, one may as well be left over beside a split."""
    write_tree(tmp_path / "set", ["test/1.png", "control/2.png", "placebo/3.png"])
    assert datasets.load(tmp_path / "set", tmp_path).class_names == ("control", "placebo", "test")


def test_images_beside_the_split_folders_are_noted(tmp_path):
    names = [f"{top}/{name}" for top in ("train", "test") for name in ("a/1.png", "b/1.png")]
    write_tree(tmp_path / "set", [*names, "extra/1.png", "logo.png"])
    ds = datasets.load(tmp_path / "set", tmp_path)
    assert len(ds) == 2 and ds.manifest["note"] == "2 images outside of train/ and test/ not used"


def test_numbered_classes_are_in_numerical_order(tmp_path):
    write_tree(tmp_path / "set", ["10/a.png", "9/a.png", "2/a.png"])
    assert datasets.load(tmp_path / "set", tmp_path).class_names == ("2", "9", "10")


def test_class_folders_and_loose_images_do_not_mix(tmp_path):
    write_tree(tmp_path / "set", ["a/1.png", "b/1.png", "stray.png"])
    with pytest.raises(BadInput, match=r"mixes class folders and loose images \(stray.png\)"):
        datasets.load(tmp_path / "set", tmp_path)


def test_links(tmp_path):
    write_tree(tmp_path / "set", ["a/1.png", "b/1.png"])
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")  # would never end
    (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "a")
    assert datasets.load(tmp_path / "set", tmp_path).class_names == ("a", "b", "c")
    (tmp_path / "set" / "b" / "2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadInput, match=r"b/2.png cannot be read"):
        datasets.load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("mnits", "did you mean mnist.*data sets: glyphs, mnist"),
        ("", "no data set"),
        ("no/such/folder", "no data set, folder or zip is named no/such/folder"),
        ("empty", "empty holds no images"),
        ("holds_zip", "holds no images.*did you mean .*holds_zip/images.zip"),
        ("notes.txt", "neither a folder nor a .zip"),
        ("broken.zip", "not a readable zip"),
        ("empty.zip", "holds no images"),
    ],
)
def test_names_that_are_no_data_set(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "holds_zip").mkdir()
    (tmp_path / "holds_zip" / "images.zip").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(BadInput, match=message) as caught:
        datasets.load(name, tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_classes_that_do_not_exist(tmp_path):
    write_mnist(tmp_path / "mnist")
    for wrong in ("10", "-1", "cat"):
        with pytest.raises(BadInput, match=f"--classes {wrong}: there is 0, 1, 2"):
            datasets.load("mnist", tmp_path, classes=[wrong])
    write_tree(tmp_path / "flat", ["1.png"])
    with pytest.raises(BadInput, match="there is no class"):
        datasets.load(tmp_path / "flat", tmp_path, classes=["0"])
