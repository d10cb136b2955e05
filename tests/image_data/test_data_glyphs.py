"""The drawn digits, real data sets where they are at hand, and the command line of image_data."""

from runtime.commandline import BadInput, entry

import sys

import numpy as np
import pytest
from data_files import write_tree
from PIL import Image, features

from image_data import datasets, glyphs
from image_data.__main__ import main


def test_a_glyph_depends_on_split_and_number_alone():
    together = glyphs.draw("train", range(40, 60))
    assert (glyphs.draw("train", [57, 41])[:, :] == together[[17, 1]]).all()
    assert (glyphs.draw("test", range(40, 60)) != together).any((1, 2, 3)).all()
    assert len(np.unique(glyphs.draw("train", range(500)).reshape(500, -1), axis=0)) == 500


def test_glyphs_are_whole_on_an_even_ground_and_readable():
    images = glyphs.draw("train", range(1000))[..., 0].astype(int)
    edge = np.ones((32, 32), bool)
    edge[1:-1, 1:-1] = False
    ground = images[:, 0, 0][:, None]
    assert (images[:, edge] == ground).all()  # nothing touches the border
    contrast = images.reshape(1000, -1).max(1) - ground[:, 0]
    assert contrast.min() >= 80
    ink = images > (ground[:, 0] + contrast // 2)[:, None, None]
    heights = ink.any(2).sum(1)
    assert heights.min() >= 10 and heights.max() <= 28


def test_glyphs_as_a_data_set(tmp_path):
    ds = datasets.load("glyphs", tmp_path, split="test")
    assert ds.images.shape == (10_000, 32, 32, 1) and ds.class_names == tuple("0123456789")
    assert (np.bincount(ds.labels) == 1000).all()
    for i in (0, 4567, 9999):
        assert (ds.images[i] == glyphs.draw("test", [i])[0]).all() and ds.labels[i] == i % 10


def test_train_and_test_digits_look_alike_but_classes_do_not():
    """Nearest mean image, fitted on train digits, reads most test digits: labels fit the ink."""
    train = glyphs.draw("train", range(3000)).reshape(3000, -1).astype(np.float64)
    test = glyphs.draw("test", range(500)).reshape(500, -1).astype(np.float64)
    means = np.stack([train[digit::10].mean(0) for digit in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    read = (test @ means.T).argmax(1)
    assert (read == np.arange(500) % 10).mean() > 0.5  # chance is 0.1


def test_without_freetype_it_says_what_to_type(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    glyphs._masters.cache_clear()
    with pytest.raises(BadInput, match="FreeType.*pip install"):
        glyphs.draw("train", [0])


def test_real_mnist(shared_data, tmp_path):
    """Class counts, mean and deviation as the literature has them."""
    ds = datasets.load(shared_data / "mnist", tmp_path)
    assert ds.images.shape == (60_000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(ds.labels).tolist() == counts
    share = np.bincount(ds.images.ravel(), minlength=256) / ds.images.size
    mean = share @ np.arange(256) / 255
    deviation = np.sqrt(share @ (np.arange(256) / 255 - mean) ** 2)
    assert round(mean, 4) == 0.1307 and round(deviation, 4) == 0.3081
    assert len(datasets.load(shared_data / "mnist", tmp_path, split="test")) == 10_000


def test_real_photographs(shared_data, tmp_path):
    """Two hundred ImageNet photographs of all sizes, one class folder each."""
    ds = datasets.load(shared_data / "imagenet-samples", tmp_path, size=32)
    assert ds.images.shape == (200, 32, 32, 3) and ds.num_classes == 200
    assert ds.class_names[0] == "n01440764" and (ds.labels == np.arange(200)).all()
    spread = np.asarray(ds.images, np.float64).reshape(200, -1).std(1)
    assert spread.min() > 5  # no blank pictures
    with pytest.raises(BadInput, match="mixes sizes"):
        datasets.load(shared_data / "imagenet-samples", tmp_path)


def test_command_line(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "pets", ["cat/1.png", "cat/2.png", "dog/1.png"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["image_data", "pets", "--data-root", "d", "--size", "6"])
    main()
    shown = capsys.readouterr().out
    assert "pets train: 3 images 6x6x3" in shown and "0 cat: 2" in shown
    (preview,) = (tmp_path / "d").glob("pets-train-6-*/preview.png")
    assert str(preview.relative_to(tmp_path)) in shown
    assert Image.open(preview).size == (10 * 8 + 2, 8 + 2)
    monkeypatch.setattr(sys, "argv", ["image_data", "petz"])
    with pytest.raises(SystemExit) as stopped:
        entry(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: no data set, folder or zip is named petz")
