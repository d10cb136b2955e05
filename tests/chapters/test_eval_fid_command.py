"""eval_fid.py as a program, on a small folder of drawn digits; its mathematics: test_eval_fid."""

from runtime.commandline import entry

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from reference_metrics import random_weights

import eval_fid
from eval_fid import statistics
from evaluation import choice, inception_features
from image_data import datasets

ROOT = Path(__file__).parents[2]
STEPS, INCEPTION = "60", {"inception", "--weights", "--resize", "adm"}

# -------------------------------------------------------------- a small data set, and the program


def drawn_digits(n, seed, size=16):
    """Digits 0..3 at random places, with noise: uint8 (n, size, size, 1), labels i % 4."""
    rng, font, images = np.random.default_rng(seed), ImageFont.load_default(size=14), []
    for i in range(n):
        image = Image.new("L", (size, size))
        place = tuple(rng.integers(2, 6, 2) - (0, 3))
        ImageDraw.Draw(image).text(place, str(i % 4), fill=int(rng.integers(150, 256)), font=font)
        images.append(np.clip(np.asarray(image) + rng.normal(0, 8, (size, size)), 0, 255))
    return np.stack(images).astype(np.uint8)[..., None], np.arange(n) % 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data set `digits` (train, test), a flat folder, and samples as .npz."""
    home = tmp_path_factory.mktemp("eval")
    for split, n, seed in (("train", 400, 0), ("test", 200, 1)):
        for i, (image, label) in enumerate(zip(*drawn_digits(n, seed), strict=True)):
            path = home / "digits" / split / str(label) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(path)
    images, labels = drawn_digits(300, 2)
    np.savez(home / "samples.npz", images, labels)
    np.savez(home / "unlabelled.npz", images)
    np.savez(home / "large.npz", drawn_digits(20, 3, size=20)[0])
    np.savez(home / "colour.npz", images.repeat(3, axis=3))
    np.savez(home / "red.npz", images * np.array([1, 0, 0], np.uint8))
    np.savez(home / "float.npz", images / 255)
    np.savez(home / "labels.npz", images, labels + 7)
    np.savez(home / "other.npz", x=images)
    (home / "torn.npz").write_bytes((home / "samples.npz").read_bytes()[:5000])
    (home / "flat").mkdir()
    for i, image in enumerate(images[:40]):
        Image.fromarray(image[:, :, 0]).save(home / "flat" / f"{i}.png")
    return home


@pytest.fixture
def evaluate(home, monkeypatch, capsys):
    """evaluate(*args) runs the program in this process: its JSON object and its stderr."""

    def run(*args, steps=STEPS):
        few = [] if INCEPTION & {*map(str, args)} else ["--classifier-steps", steps]
        command = [*args, "--data-root", home / "root", *few]
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", *map(str, command)])
        monkeypatch.chdir(home)
        entry(eval_fid.main)
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return run


def test_samples_against_a_data_set(evaluate):
    result, err = evaluate("samples.npz", "digits")
    assert result["n_generated"] == 300 and result["n_reference"] == 200
    assert result["class_accuracy"] > 0.97 and result["classifier_test_accuracy"] > 0.97
    assert result["feature_hash"] in result["features"] and "digits" in result["features"]
    assert 0 < result["frechet"] < 1
    assert "samples.npz has N = 300 images, fewer than 2,048" in err
    assert "biased upward with few samples" in err and "does not exceed" not in err


def test_a_set_is_at_distance_zero_from_itself(evaluate):
    result, _ = evaluate("digits:train", "digits:train")
    assert result["frechet"] == pytest.approx(0, abs=1e-6)
    assert result["n_generated"] == 400


def test_distance_grows_with_noise(evaluate, home):
    images, _ = drawn_digits(300, 4)
    distances = []
    for level in (0, 20, 60, 150):
        noise = np.random.default_rng(5).normal(0, level, images.shape)
        np.savez(home / "noisy.npz", np.clip(images + noise, 0, 255).astype(np.uint8))
        distances.append(evaluate("noisy.npz", "digits")[0]["frechet"])
    assert all(3 * less < more for less, more in zip(distances, distances[1:], strict=False))


def test_wrong_labels_are_found_wrong(evaluate, home):
    images, labels = drawn_digits(300, 6)
    np.savez(home / "asked.npz", images, np.random.default_rng(0).permutation(labels))
    assert evaluate("asked.npz", "digits")[0]["class_accuracy"] == pytest.approx(0.25, abs=0.1)
    np.savez(home / "asked.npz", images, (labels + 1) % 4)
    assert evaluate("asked.npz", "digits")[0]["class_accuracy"] < 0.03


def test_no_labels_no_accuracy(evaluate, home):
    result, err = evaluate("flat", "unlabelled.npz", "--data", "digits")
    assert result["class_accuracy"] is None and result["n_generated"] == 40
    assert "flat: N = 40 does not exceed the 128 features" in err


def test_saved_statistics_give_the_distance_of_their_images(evaluate):
    direct, _ = evaluate("samples.npz", "digits")
    saved, _ = evaluate("stats", "digits", "--out", "digits.npz")
    assert saved["n"] == 200 and saved["feature_hash"] == direct["feature_hash"]
    result, _ = evaluate("samples.npz", "digits.npz", "--data", "digits", "--json", "eval.json")
    for key in ("frechet", "n_generated", "n_reference", "features", "class_accuracy"):
        assert result[key] == direct[key]
    assert json.loads(Path("eval.json").read_text()) == result


def test_foreign_statistics_are_used_with_a_warning(evaluate, home):
    np.savez(home / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(home / "b.npz", mu=np.full(3, 2.0), sigma=4 * np.eye(3))
    result, err = evaluate("a.npz", "b.npz")
    assert result["frechet"] == pytest.approx(3 * 4 + 3 * 1)
    assert result["n_generated"] is None and "does not say which features" in err


def test_every_figure_by_command_and_the_closest_pairs_drawn(evaluate, home):
    result, _ = evaluate("samples.npz", "digits", "--metrics", "all")
    low, high = result["frechet_interval"]
    assert low < result["frechet"] < high and 0 < result["frechet_error"] < result["frechet"]
    assert 3 < result["inception_score"] < 4 and result["kid_error"] > 0
    assert min(result[key] for key in ("precision", "recall", "density", "coverage")) > 0.2
    assert result["class_frechet_each"].keys() == set("0123")
    assert result["memorisation_copies"] == 0 and 0.3 < result["memorisation_share"] < 0.7
    assert (home / "samples-nearest.png").stat().st_size > 5000
    np.savez(
        home / "copies.npz", np.asarray(datasets.load(str(home / "digits"), home / "root").images)
    )
    caught, _ = evaluate("copies.npz", "digits", "--metrics", "all")
    assert caught["memorisation_copies"] == 400 and caught["memorisation_p"] < 1e-9


def test_images_sorted_by_class_have_the_same_inception_score(evaluate, home):
    with np.load(home / "samples.npz") as held:
        images, labels = held["arr_0"], held["arr_1"]
    order = np.argsort(labels, kind="stable")
    np.savez(home / "sorted.npz", images[order], labels[order])
    mixed, sorted_ = (evaluate(f, "digits")[0] for f in ("samples.npz", "sorted.npz"))
    assert sorted_["inception_score"] == pytest.approx(mixed["inception_score"], rel=0.03)
    assert sorted_["class_accuracy"] == mixed["class_accuracy"]


def test_training_images_are_no_held_out_ones_also_where_some_are_drawn(evaluate):
    flags = ["--metrics", "memorisation"]
    for n in ([], ["--n", "100"]):
        result, err = evaluate("samples.npz", "digits:train", *flags, *n)
        assert "no held-out images" in err and "memorisation_p" not in result


def test_one_class_is_compared_with_that_class_by_the_network_of_all(evaluate, home):
    with np.load(home / "samples.npz") as held:
        threes = held["arr_0"][held["arr_1"] == 3]
    np.savez(home / "threes.npz", threes, np.zeros(len(threes), np.int64))
    result, _ = evaluate("threes.npz", "digits", "--classes", "3")
    whole, _ = evaluate("samples.npz", "digits")
    assert result["feature_hash"] == whole["feature_hash"] and result["n_reference"] == 50
    assert result["class_accuracy"] > 0.9 and result["frechet"] < 1
    wrong, _ = evaluate("threes.npz", "digits", "--classes", "1")
    assert wrong["class_accuracy"] < 0.1 and wrong["frechet"] > 3 * result["frechet"]


def test_the_slow_square_root_gives_the_same_distance(evaluate):
    fast, _ = evaluate("samples.npz", "digits", "--metrics", "frechet")
    slow, _ = evaluate("samples.npz", "digits", "--metrics", "frechet", "--sqrtm")
    assert slow["frechet"] == pytest.approx(fast["frechet"], rel=1e-6)
    assert "kid" not in fast


@pytest.fixture(scope="module")
def weights(home):
    """A file of Inception weights in the published layout."""
    torch.save(random_weights(0), home / "weights.pth")
    return home / "weights.pth"


def test_inception_by_command_and_the_adm_layout(evaluate, home, weights):
    np.savez(home / "five.npz", drawn_digits(3, 7)[0])
    np.savez(home / "real.npz", *drawn_digits(3, 8))
    features = ["--features", "inception", "--weights", weights]
    flags = ["--metrics", "frechet", *features, "--resize"]
    result, err = evaluate("five.npz", "real.npz", *flags, "tf1")
    assert "resize tf1" in result["features"] and result["class_accuracy"] is None
    assert "N = 3 does not exceed the 2048 features" in err
    adm = ["--resize", "tf1", "--layout", "adm", "--out", "adm.npz"]
    evaluate("stats", "real.npz", *features, *adm)
    extractor = inception_features.load(str(weights), resize="tf1")
    with np.load(home / "adm.npz") as saved:
        feats, _, spatial = extractor(torch.from_numpy(saved["arr_0"]), spatial=True)
        for suffix, rows in (("", feats.numpy()), ("_s", spatial.numpy())):
            mu, sigma = statistics(rows)
            np.testing.assert_allclose(saved[f"mu{suffix}"], mu, atol=1e-5)
            np.testing.assert_allclose(saved[f"sigma{suffix}"], sigma, atol=1e-5)
        assert list(saved["arr_1"]) == [0, 1, 2]
    again, _ = evaluate("five.npz", "adm.npz", *flags, "tf1")
    assert again["frechet"] == pytest.approx(result["frechet"], rel=1e-6)
    with pytest.raises(SystemExit) as stop:  # statistics of another protocol
        evaluate("five.npz", "adm.npz", *flags, "clean")
    assert stop.value.code == 2


# ------------------------------------------------------------------------------ --features auto


@pytest.fixture
def refused(monkeypatch):
    """Downloads go to an address of this machine where nobody answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("DIFFUSION_MIRROR", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(choice, "NOT_HAD", {})
    return f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def coloured(home):
    """The digits in colour: a data set, and labelled samples in tinted.npz."""
    images, labels = drawn_digits(300, 2)
    np.savez(home / "tinted.npz", images.repeat(3, axis=3), labels)
    for path in sorted((home / "digits").rglob("*.png")):
        copy = home / "coloured" / path.relative_to(home / "digits")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(copy)
    return "coloured"


def told(err):
    """The lines of stderr but for the bars of training, preparing and computing."""
    return [line for line in err.splitlines() if line.startswith(("warning", "error"))]


def test_auto_takes_the_classifier_for_gray_images_and_says_nothing(evaluate, refused):
    found, err = evaluate("samples.npz", "digits")
    assert "classifier features" in found["features"] and "Inception" not in err


def test_auto_takes_the_classifier_for_colour_where_no_weights_are_and_says_why_once(
    evaluate, refused, coloured
):
    asked = []
    unpatched = inception_features.find_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            inception_features,
            "find_weights",
            lambda *args: asked.append(args) or unpatched(*args),
        )
        for _ in range(2):
            found, err = evaluate("tinted.npz", coloured, "--metrics", "frechet", "--n", "150")
            lines = [line for line in told(err) if "Inception" in line]
            assert len(lines) == 1 and refused in lines[0] and "refused" in lines[0]
            assert lines[0].startswith("warning: ") and "classifier" in lines[0]
            assert "classifier features" in found["features"]
            assert found["class_accuracy"] > 0.9
    assert len(asked) == 1  # a failure is remembered


def test_auto_does_not_wait_for_a_host_that_never_answers(evaluate, coloured, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("DIFFUSION_MIRROR", address)
        monkeypatch.setattr(choice, "NOT_HAD", {})
        monkeypatch.setattr(choice, "PATIENCE", 0.3)
        found, err = evaluate("tinted.npz", coloured, "--metrics", "frechet", "--n", "150")
    (line,) = [line for line in told(err) if "Inception" in line]
    assert "no answer within 0.3 s" in line or "timed out" in line
    assert "classifier features" in found["features"]


def test_auto_takes_inception_for_colour_where_its_weights_are(
    evaluate, home, weights, coloured, refused, monkeypatch
):
    flags = ["--metrics", "frechet", "--n", "3"]
    named, _ = evaluate("colour.npz", "colour.npz", "--weights", weights, *flags)
    assert f"weights {weights.name}" in named["features"] and named["frechet"] < 1e-3
    folder = home / "root" / "inception"
    folder.mkdir(exist_ok=True)
    published = "pt_inception-2015-12-05-6726825d.pth"
    shutil.copy(weights, folder / published)  # random ones have another checksum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("networks.inception.file_hash", lambda path: "6726825d")
        found, err = evaluate("colour.npz", coloured, *flags)
    assert f"weights {published}" in found["features"] and found["class_accuracy"] is None
    assert not [line for line in told(err) if "classifier" in line]
    monkeypatch.setattr(choice, "NOT_HAD", {})
    found, err = evaluate("colour.npz", coloured, *flags)  # the file of another checksum
    (folder / published).unlink()
    (line,) = [line for line in told(err) if "Inception" in line]
    assert "SHA-256" in line and "classifier features" in found["features"]


def test_auto_follows_the_statistics_that_are_compared_with(evaluate, home, weights, refused):
    np.savez(home / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(SystemExit) as stop:  # gray, but nothing else can be compared with these
        evaluate("samples.npz", "wide.npz", "--data", "digits")
    assert stop.value.code == 2
    evaluate("stats", "digits", "--out", "narrow.npz")
    found, _ = evaluate("samples.npz", "narrow.npz", "--data", "digits")
    assert "classifier features" in found["features"]


def test_inception_that_is_asked_for_and_not_there_is_an_error(evaluate, refused, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate("samples.npz", "digits", "--features", "inception")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "could not download" in err and refused in err


def test_smoke_looks_at_few_images(evaluate):
    found, _ = evaluate("samples.npz", "digits", "--smoke", steps="5")
    assert found["n_generated"] == found["n_reference"] == 100


# -------------------------------------------------------------------------- seeds, files and flags


def test_n_draws_the_same_images_for_the_same_seed(evaluate):
    one, again, other = (
        evaluate("samples.npz", "digits", "--n", "150", "--batch-size", size)[0]
        for size in ("256", "256", "31")
    )
    assert one["n_generated"] == one["n_reference"] == 150
    assert one == again
    assert other["frechet"] == pytest.approx(one["frechet"], rel=1e-3)


def test_the_classifier_is_kept_and_a_broken_one_is_replaced(evaluate, home):
    train = datasets.load(str(home / "digits"), home / "root", split="train")
    path = home / "root" / f"classifier-{train.key}-5-0.pt"
    first, _ = evaluate("samples.npz", "digits", steps="5")
    written = path.stat().st_mtime_ns
    second, err = evaluate("samples.npz", "digits", steps="5")
    assert path.stat().st_mtime_ns == written and "training" not in err and second == first
    half = path.read_bytes()[: path.stat().st_size // 2]
    for broken in (half, b"", b"not a checkpoint"):
        path.write_bytes(broken)
        again, err = evaluate("samples.npz", "digits", steps="5")
        assert "warning" in err and path.name in err
        assert again["feature_hash"] == first["feature_hash"]  # trained to the same weights
    torch.save({"net": {}}, path)
    assert path.name in evaluate("samples.npz", "digits", steps="5")[1]
    assert list(path.parent.glob("*.tmp*")) == []


def test_other_settings_train_another_classifier(evaluate):
    first, _ = evaluate("stats", "digits", "--out", "first.npz")
    with pytest.raises(SystemExit) as stop:
        evaluate("samples.npz", "first.npz", "--data", "digits", steps="20")
    assert stop.value.code == 2
    other, _ = evaluate("samples.npz", "digits", "--seed", "1", steps="20")
    assert other["feature_hash"] != first["feature_hash"]


BY_CLASSIFIER, ADM = ["--features", "classifier"], ["--out", "x.npz", "--layout", "adm"]
WEIGHTS_NEED = ["--weights", "--features inception"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["large.npz", "digits"], ["large.npz", "20x20x1", "16x16x1", "--size"]),
        (["red.npz", "digits"], ["red.npz: 300 of its 300 images have colours", "number 0 first"]),
        (["missing.npz", "digits"], ["missing.npz", "no such file"]),
        (["torn.npz", "digits"], ["torn.npz", "not a readable"]),
        (["float.npz", "digits"], ["float.npz", "float64", "uint8 (N, H, W, C)"]),
        (["other.npz", "digits"], ["other.npz", "arr_0"]),
        (["labels.npz", "digits"], ["labels.npz", "7 to 10", "0 to 3"]),
        (["samples.npz", "nowhere"], ["nowhere"]),
        (["samples.npz", "flat"], ["flat", "no classes", "--data"]),
        (["samples.npz", "unlabelled.npz"], ["unlabelled.npz", "--data"]),
        (["samples.npz", "digits", "--n", "301"], ["--n 301", "200"]),
        (["samples.npz", "digits", "--n", "-1"], ["--n", "-1"]),
        (["samples.npz", "digits", "--n", "1"], ["--n", "from 2", "got 1"]),
        (["samples.npz", "digits", "--batch-size", "0"], ["--batch-size"]),
        (["samples.npz", "digits", "--gpus", "99"], ["--gpus 99"]),
        (["samples.npz", "digits", "--out", "x.npz"], ["--out", "stats"]),
        (["samples.npz"], ["samples.npz", "A B"]),
        (["samples.npz", "digits", "--seed", "-1"], ["--seed"]),
        (["samples.npz", "digits", *BY_CLASSIFIER, "--weights", "w"], WEIGHTS_NEED),
        (["samples.npz", "digits", *BY_CLASSIFIER, "--resize", "tf1"], ["--resize", "inception"]),
        (["samples.npz", "digits", "--weights", "w"], ["w: no such"]),
        (["samples.npz", "digits", "--sample-args=--n 2"], ["--sample-args", "checkpoint"]),
        (["samples.npz", "digits", "--json", "flat"], ["flat", "folder"]),
        (["samples.npz", "digits", "--metrics", "fid"], ["--metrics fid", "frechet, is"]),
        (["samples.npz", "digits", "--features", "inception", "--weights", "w"], ["w: no such"]),
        (["stats", "digits", *BY_CLASSIFIER, *ADM], ["--features inception"]),
        (["stats", "digits", *ADM, "--weights", "w"], ["w: no such"]),
        (["samples.npz", "digits", "--resize", "nearest"], ["--resize", "tf1"]),
        (["stats", "digits"], ["--out"]),
        (["samples.npz", "digits", "--sise", "16"], ["--sise", "--size"]),
    ],
)
def test_bad_input_is_one_line(args, words, evaluate, home, capsys):
    for split in ("train", "test"):  # prepared before, so that nothing else is said
        datasets.load(str(home / "flat"), home / "root", split=split)
    evaluate("samples.npz", "digits", "--metrics", "frechet")
    with pytest.raises(SystemExit) as stop:
        evaluate(*args)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line]
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in lines[0] for word in words), lines[0]


def test_as_a_program(home):
    """What the chapters do: a subprocess, its last line, its exit code."""
    command = [sys.executable, str(ROOT / "eval_fid.py"), "samples.npz"]
    options = ["--data-root", "root", "--classifier-steps", STEPS]
    run = subprocess.run([*command, "digits:test", *options], cwd=home, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    result = json.loads(run.stdout.decode().splitlines()[-1])
    assert {
        "frechet",
        "class_accuracy",
        "n_generated",
        "n_reference",
        "features",
        "feature_hash",
        "classifier_test_accuracy",
        "a",
        "b",
    } <= result.keys()
    run = subprocess.run([*command, "nowhere.npz", *options], cwd=home, capture_output=True)
    assert run.returncode == 2
    assert run.stderr.decode() == "error: nowhere.npz: no such file\n"
