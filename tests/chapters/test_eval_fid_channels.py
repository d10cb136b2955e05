"""eval_fid.py over gray and RGB files of the same images, and what it says of labels by number."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import entry

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from launching import succeed
from PIL import Image

import eval_fid
from evaluation import image_sets, inception_features

FIGURES = ["frechet", "frechet_interval", "inception_score", "kid", "precision", "recall"]
FIGURES += ["density", "coverage", "class_accuracy", "class_frechet", "memorisation_share"]


def stripes(n, seed, names):
    """n images uint8 (n,16,16,1) in turn of as many kinds of stripes, and their labels."""
    rng, images = np.random.default_rng(seed), []
    for i in range(n):
        wide = 2 + i % len(names)
        line = 100 + 100 * (np.arange(16) // wide % 2) + rng.normal(0, 15, (16, 16))
        images.append(line + rng.integers(-40, 40))
    return np.clip(np.stack(images), 0, 255).astype(np.uint8)[..., None], np.arange(n) % len(names)


def save_folder(folder, images, labels, names, mode):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).convert(mode).save(path)


NAMES = ("1", "2", "10")  # numbers that are not their places


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data sets `gray` and `rgb` of the same images, and samples in every form."""
    home = tmp_path_factory.mktemp("channels")
    for split, n, seed in (("train", 300, 0), ("test", 270, 1)):
        found = stripes(n, seed, NAMES)
        for name, mode in (("gray", "L"), ("rgb", "RGB")):
            save_folder(home / name / split, *found, NAMES, mode)
    images, labels = stripes(280, 2, NAMES)
    np.savez(home / "gray.npz", images, labels)
    np.savez(home / "flat.npz", images[..., 0], labels)
    np.savez(home / "rgb.npz", images.repeat(3, 3), labels)
    np.savez(home / "black.npz", (images > 128).astype(np.uint8), labels)
    red = images.repeat(3, 3)
    red[[7, 9], 3, 3, 0] ^= 1
    np.savez(home / "red.npz", red, labels)
    save_folder(home / "samples", images, labels * 0, ("x",), "RGB")
    shutil.make_archive(str(home / "zipped"), "zip", home / "samples" / "x")
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    """run(*args): the JSON object, what was printed before it, and stderr."""

    def run(*args):
        command = [*map(str, args), "--data-root", "root"]
        command += [] if "inception" in command else ["--classifier-steps", "40"]
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", *command, "--gpus", "0"])
        monkeypatch.chdir(home)
        entry(eval_fid.main)
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), out, err

    return run


def test_rgb_files_of_gray_images_get_the_figures_of_gray_ones(run):
    plain, printed, _ = run("gray.npz", "gray", "--metrics", "all")
    assert plain["channels"] is None and "\nchannels" not in printed
    assert plain["class_accuracy"] > 0.9 and plain["memorisation_copies"] == 0
    for name in ("rgb.npz", "flat.npz"):
        found, printed, _ = run(name, "gray", "--metrics", "all")
        assert all(found[key] == plain[key] for key in FIGURES)
        words = "in three equal channels, taken as one" if name == "rgb.npz" else "(280, 16, 16)"
        assert f"\nchannels           {found['channels']}\n" in printed
        assert found["channels"].startswith(name) and words in found["channels"]
    for name in ("samples", "zipped.zip"):  # a folder and a zip of RGB files, in the same order
        found, printed, _ = run(name, "gray")
        shared = [key for key in FIGURES[:8] if key in found]
        assert len(shared) == 8 and [found[k] for k in shared] == [plain[k] for k in shared]
        assert "gray in three equal channels" in printed


def test_gray_samples_against_rgb_files_of_gray_images(run):
    expected, _, _ = run("rgb.npz", "rgb", "--features", "classifier", "--metrics", "all")
    for name in ("gray.npz", "flat.npz"):
        found, printed, _ = run(name, "rgb", "--features", "classifier", "--metrics", "all")
        assert all(found[key] == expected[key] for key in FIGURES)
        assert "repeated in three channels" in printed
    by_default, _, _ = run("gray.npz", "rgb", "--metrics", "frechet")
    assert by_default["frechet"] == expected["frechet"]  # auto: not all are in colour
    told, _, _ = run("gray.npz", "rgb", "--data", "gray", "--metrics", "frechet")
    assert told["channels"].startswith("rgb is gray in three equal channels")


def test_inception_compares_gray_with_rgb_and_statistics_of_either(run, home, monkeypatch):
    """By moments in place of the network, whose features test_channels.py looks at."""

    class Moments:
        protocol, feature_hash, dim = "moments", "abc", 6

        def __call__(self, images):
            x = images.expand(-1, -1, -1, 3).double()
            return torch.cat([x.mean((1, 2)), x.std((1, 2))], 1), None

    monkeypatch.setattr(inception_features, "load", lambda *args: Moments())
    flags = ["--features", "inception", "--metrics"]
    few, of = ["--n", "100"], ["frechet,kid,prdc,memorisation"]
    plain, _, _ = run("gray.npz", "gray", *few, *flags, *of)
    found, printed, _ = run("rgb.npz", "gray", *few, *flags, *of)
    assert plain["channels"] is None
    assert found["channels"] == "gray is gray, repeated in three channels"
    assert f"\nchannels           {found['channels']}\n" in printed
    assert {k: v for k, v in found.items() if k in FIGURES} == {
        k: v for k, v in plain.items() if k in FIGURES
    }
    with np.load(home / "gray.npz") as held:
        np.savez(home / "three.npz", held["arr_0"].repeat(3, 3))
    run("stats", "three.npz", *flags[:2], "--out", "three-stats.npz")
    found, _, _ = run("gray.npz", "three-stats.npz", *flags, "frechet")
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["channels"] == "gray.npz is gray, repeated in three channels"


def refused(run, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    return line


def test_colours_are_never_dropped_and_refused_before_anything_is_trained(run, home, capsys):
    line = refused(run, capsys, "red.npz", "gray", "--seed", "5")
    assert "red.npz: 2 of its 280 images have colours, number 7 first" in line
    assert "--features inception" in line
    assert not list((home / "root").glob("classifier-*-5.pt"))
    line = refused(run, capsys, "gray.npz", "gray", "--classes", "0", "--seed", "5")
    assert "--classes 0: there is 1, 2, 10; where names are numbers" in line


def test_images_as_good_as_black_get_a_warning(run):
    _, _, err = run("black.npz", "gray", "--metrics", "frechet")
    assert "warning: black.npz: no pixel is above 1 of 255, so that all is black" in err
    _, _, err = run("gray.npz", "gray", "--metrics", "frechet")
    assert "black" not in err


# ------------------------------------------------------------------------------ classes and labels


def test_what_the_labels_of_a_file_are_taken_for_is_said(run, home, capsys):
    found, printed, _ = run("gray.npz", "gray", "--metrics", "frechet")
    assert found["labels"] == "0 is 1, 1 is 2, 2 is 10"
    assert "\nlabels of A        0 is 1, 1 is 2, 2 is 10\n" in printed
    with np.load(home / "gray.npz") as held:
        images, labels = held["arr_0"], held["arr_1"]
    np.savez(home / "two.npz", images[labels > 0], labels[labels > 0] - 1)
    for typed in ("2,10", "2,10,2"):  # a class that is named twice is still one
        found, _, _ = run("two.npz", "gray", "--classes", typed, "--metrics", "all")
        assert found["labels"] == "0 is 2, 1 is 10" and found["class_accuracy"] > 0.9
        assert found["class_frechet_each"].keys() == {"2", "10"}
    line = refused(run, capsys, "gray.npz", "gray", "--classes", "2,10")
    assert "gray.npz has labels from 0 to 2; there are 0 to 1: 2, 10" in line


def test_samples_of_a_checkpoint_have_its_classes_whatever_is_compared(run, home, tiny):
    """Of a network that knows 2 and 10: --classes 2 draws a 2, and figures take labels by name."""
    data = ["--data", home / "gray", "--data-root", home / "root", "--gpus", "0"]
    flags = [*tiny["ddpm_pixel"], "--steps", "2", "--sample-every", "0", "--n", "4"]
    folder = home / "run"
    succeed("ddpm_pixel", *data, *flags, "--classes", "2,10", "--out", folder)
    assert load_checkpoint(folder / "ckpt.pt")["class_names"] == ["2", "10"]
    drawn = ["--sample", folder / "ckpt.pt", "--n", "3", "--out", folder / "of"]
    succeed("ddpm_pixel", *drawn, "--gpus", "0", "--classes", "10")
    assert list(image_sets.read_file(str(folder / "of" / "samples.npz")).labels) == [1, 1, 1]

    def scored(*args):
        few = ["--n", "12", "--metrics", "frechet", "--sample-args=--sample-steps 2"]
        few += ["--classifier-steps", "40", "--data-root", home / "root", "--gpus", "0"]
        done = succeed("eval_fid", folder / "ckpt.pt", *args, *few)
        return json.loads(done.out.splitlines()[-1]), done.err

    alone, err = scored()
    assert alone["class_accuracy"] is not None and "left out" not in err
    assert alone["labels"] is None and alone["n_reference"] == 180
    every, err = scored(home / "gray", "--classes", "1,2,10")
    assert every["class_accuracy"] == alone["class_accuracy"] and every["n_reference"] == 270
    assert "left out" not in err
    other, err = scored(home / "gray", "--classes", "1,2")
    assert other["class_accuracy"] is None
    assert "labels of" in err and "are left out: 10 is no class that is compared (1, 2)" in err
