"""A known set is read from the one zip in its folder, and a line says what it was taken for."""

from runtime.commandline import BadInput

import json
import shutil
import zipfile

import numpy as np
import pytest
from data_files import write_cifar, write_mnist, write_tree

from image_data import datasets, sources

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    def fetch(name, *rest):
        raise AssertionError(f"{name} is asked for")

    monkeypatch.setattr(sources, "fetch", fetch)


def pack(folder, path):
    """A zip of what is in the folder, at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(path.with_suffix("")), "zip", folder)
    return path


@pytest.mark.parametrize("around", ["", "cifar10-jpeg/"])
def test_cifar10_of_image_files(around, tmp_path, capsys):
    names = [f"{around}{s}/{c}/{i}.png" for s in ("train", "test") for c in CIFAR for i in range(2)]
    pixels = write_tree(tmp_path / "raw", names)
    path = pack(tmp_path / "raw", tmp_path / "data" / "cifar10" / "cifar10-jpeg.zip")
    for split in ("train", "test"):
        ds = datasets.load("cifar10", tmp_path / "data", split=split)
        assert ds.name == "cifar10" and ds.class_names == CIFAR
        assert ds.labels.tolist() == [i // 2 for i in range(20)]
        assert (ds.images[7] == pixels[f"{around}{split}/cat/1.png"]).all()
    said = capsys.readouterr().out
    assert (
        f"{path}: train/ with 20 images of 10 classes" in said and "classes are there" not in said
    )


@pytest.mark.parametrize("name", ["afhq.zip", "afhq_v2.ZIP"])
def test_afhq(name, tmp_path, capsys):
    names = [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in ("cat", "dog") for i in "12"]
    write_tree(tmp_path / "raw" / "afhq", names)
    (tmp_path / "afhq").mkdir()
    pack(tmp_path / "raw", tmp_path / "a.zip").rename(tmp_path / "afhq" / name)
    (tmp_path / "afhq" / "._hidden.zip").write_bytes(b"")  # as macOS leaves them
    ds = datasets.load("afhq", tmp_path)
    assert ds.class_names == ("cat", "dog") and f"{name} has sha256" in ds.manifest["note"]
    assert "2 of afhq's 3 classes are there" in capsys.readouterr().out


def write_kaggle(folder):
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    parts = [*(f"train.X{i}" for i in range(1, 5)), "val.X"]
    pixels = write_tree(folder, [f"{part}/{wnids[i % 4]}/{i}.JPEG" for i, part in enumerate(parts)])
    titles = ["tench, Tinca tinca", "goldfish", "great white shark", "tiger shark"]
    (folder / "Labels.json").write_text(json.dumps(dict(zip(wnids, titles, strict=True))))
    return pixels


def test_imagenet100_as_kaggle_packs_it(tmp_path, capsys):
    """The same images, labels and names as from the unpacked folder, also by the zip's own path."""
    write_kaggle(tmp_path / "raw")
    path = pack(tmp_path / "raw", tmp_path / "data" / "imagenet100" / "archive.zip")
    for split, count in (("train", 4), ("test", 1)):
        plain = datasets.load(tmp_path / "raw", tmp_path, split=split)
        for name, root in (("imagenet100", tmp_path / "data"), (path, tmp_path / "other")):
            ds = datasets.load(name, root, split=split)
            assert ds.class_names == plain.class_names == tuple(plain.manifest["class_names"])
            assert len(ds) == count and np.array_equal(ds.images, plain.images)
            assert np.array_equal(ds.labels, plain.labels)
    assert "archive.zip: train.X1, train.X2, train.X3, train.X4 with 4 images" in (
        capsys.readouterr().out
    )
    chosen = datasets.load("imagenet100", tmp_path / "data", classes="n01443537")
    assert chosen.class_names == ("goldfish",)


def test_imagenet100_in_a_zip_that_lacks_a_part(tmp_path):
    write_kaggle(tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "train.X3")
    pack(tmp_path / "raw", tmp_path / "imagenet100" / "archive.zip")
    with pytest.raises(BadInput, match=r"archive\.zip lacks train\.X3; ImageNet-100 has them"):
        datasets.load("imagenet100", tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files(name, zipped, tmp_path, capsys):
    made = write_mnist(tmp_path / "raw" / "some" / "folder", zipped=zipped)
    pack(tmp_path / "raw", tmp_path / name / "archive.zip")
    for split, (images, labels) in made.items():
        ds = datasets.load(name, tmp_path, split=split)
        assert np.array_equal(ds.images[..., 0], images) and np.array_equal(ds.labels, labels)
    assert ds.class_names[-1] == {"mnist": "9", "fashion_mnist": "boot"}[name]
    assert "train images and labels are read from" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10_batches(kind, packed, tmp_path):
    made = write_cifar(tmp_path / "raw", kind, packed)
    pack(tmp_path / "raw", tmp_path / "cifar10" / "archive.zip")
    for split, (rows, labels) in made.items():
        ds = datasets.load("cifar10", tmp_path, split=split)
        assert np.array_equal(ds.images, rows.transpose(0, 2, 3, 1))
        assert np.array_equal(ds.labels, labels) and ds.class_names == CIFAR


def test_what_is_unpacked_comes_first(tmp_path):
    made = write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "other.zip").write_bytes(b"not even a zip")
    assert np.array_equal(datasets.load("mnist", tmp_path).labels, made["train"][1])


@pytest.mark.parametrize("name", ["mnist", "cifar10", "afhq", "imagenet100"])
def test_two_zips_are_refused_by_their_names(name, tmp_path):
    (tmp_path / name).mkdir()
    for zipped in ("b.zip", "a.zip"):
        zipfile.ZipFile(tmp_path / name / zipped, "w").close()
    with pytest.raises(BadInput, match=rf"holds a\.zip and b\.zip: .*--data .*{name}/a\.zip"):
        datasets.load(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "afhq"])
def test_a_zip_without_classes_is_refused(name, tmp_path):
    write_tree(tmp_path / "raw", ["a.png", "b.png"])
    pack(tmp_path / "raw", tmp_path / name / "x.zip")
    with pytest.raises(BadInput, match=rf"images without classes, but {name} .*--data .*x\.zip"):
        datasets.load(name, tmp_path)


def test_a_zip_that_lacks_a_split(tmp_path):
    write_mnist(tmp_path / "raw")
    for path in (tmp_path / "raw").glob("t10k*"):
        path.unlink()
    pack(tmp_path / "raw", tmp_path / "mnist" / "archive.zip")
    assert len(datasets.load("mnist", tmp_path)) == 30
    with pytest.raises(BadInput, match=r"archive\.zip lacks files of the test split"):
        datasets.load("mnist", tmp_path, split="test")
