"""Files that are made of others, damaged or of another version: made again with one line."""

from runtime.commandline import BadInput
from runtime.plots import plot_loss, plot_metrics
from runtime.processes import SAID, World
from runtime.report import refresh

import json
import os
import shutil

import numpy as np
import pytest
import torch.nn.functional as F
from data_files import write_images
from run_folders import assert_same, saved
from toy_run import IMAGES as NOISE
from toy_run import make, train

from compare_samplers import Store
from evaluation import score, table
from image_data import datasets, prepare
from image_data.latents import cache_latents


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("raw") / "images", 30)


def change(path, what):
    """Damage a file in one of many ways."""
    raw = path.read_bytes()
    if what in ("folder", "gone"):
        path.unlink()
        if what == "folder":
            path.mkdir()
    elif isinstance(what, bytes):
        path.write_bytes(what)
    elif isinstance(what, float):
        path.write_bytes(raw[: int(what * len(raw))])
    elif callable(what):
        what(path)


def edited(**changes):
    """A change of what a JSON file says; None: it no longer says that."""

    def edit(path):
        said = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))

    return edit


def array(make):
    return lambda path: np.save(path, make(np.load(path)))


def zipped(path):
    with open(path, "wb") as file:
        np.savez(file, np.load(path) if path.stat().st_size else 0)


ANY = ["gone", "folder", b"", b"\x00" * 99, bytes(range(256)), 0.5, 0.99, b"\x80" + b"a" * 500]
MANIFEST = [edited(key=None), edited(key=3), edited(count="many"), edited(class_names=None)]
MANIFEST += [edited(shape=[1, 2]), edited(count=10**9), edited(stamp=None), b"[]", b"3", b"{}"]
MANIFEST += [b"[" * 10**5, b'{"key": ' + b"9" * 5000 + b"}", edited(class_names=["bars"])]
IMAGES = [array(lambda a: a[:-1]), array(lambda a: a.astype(np.float32)), zipped]
IMAGES += [array(lambda a: a[..., 0]), lambda p: np.save(p, np.array([{}]), allow_pickle=True)]
LABELS = [array(lambda a: a - 1), array(lambda a: a + 5), array(lambda a: a[1:])]
LABELS += [array(lambda a: a.astype(float)), array(lambda a: a[:, None]), zipped]
DAMAGES = [("manifest.json", how) for how in ANY + MANIFEST]
DAMAGES += [("images.npy", how) for how in ANY + IMAGES]
DAMAGES += [("labels.npy", how) for how in ANY + LABELS]


def test_prepared_data(images, tmp_path, capsys):
    whole = datasets.load(images, tmp_path)
    folder = tmp_path / os.path.basename(whole.manifest["folder"])
    shutil.copytree(folder, tmp_path / "other-train-1")
    for name, how in DAMAGES:
        change(folder / name, how)
        SAID.clear()
        capsys.readouterr()
        found = datasets.load(images, tmp_path)
        assert np.array_equal(found.images, whole.images), (name, how)
        assert np.array_equal(found.labels, whole.labels) and found.key == whole.key
        told = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
        gone = name == "manifest.json" and how == "gone"
        assert len(told) == (not gone) and (gone or str(folder) in told[0]), (name, how, told)
    SAID.clear()
    datasets.load(images, tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_manifests_of_other_sets_stop_nothing(images, tmp_path):
    """One is looked at to say what is old, and to know the data of a checkpoint again."""
    made = datasets.load(images, tmp_path)
    for i, how in enumerate(ANY + MANIFEST):
        shutil.copytree(made.manifest["folder"], tmp_path / f"images-train-{i}")
        change(tmp_path / f"images-train-{i}" / "manifest.json", how)
    os.utime(next(images.rglob("*.png")), (1, 1))
    assert datasets.load(images, tmp_path).key == made.key


def test_prepared_data_that_cannot_be_made_again(images, tmp_path, monkeypatch):
    made = datasets.load(images, tmp_path).manifest["folder"]
    shutil.rmtree(made)
    with open(made, "w") as file:
        file.write("a file in the place of a folder")
    with pytest.raises(BadInput, match=f"cannot write {made} .*: delete {made}"):
        datasets.load(images, tmp_path)
    with pytest.raises(prepare.Damaged):
        os.unlink(made)
        shutil.copytree(images, made)
        (tmp_path / os.path.basename(made) / "manifest.json").write_text("")
        prepare.read(tmp_path / os.path.basename(made))


def cache(folder):
    """Latents of halved images."""

    def encode(x):
        return F.avg_pool2d(x, 2), F.avg_pool2d(x, 2) - 5

    how = {"z_channels": 1, "factor": 2, "made_of": {"a": 1}, "flip": False}
    return cache_latents(folder, World(), NOISE, encode, **how)


def test_latents(tmp_path, capsys):
    whole = cache(tmp_path)
    kept = np.array(whole.moments)
    damages = [("manifest.json", how) for how in [*ANY[2:], b"[]", edited(scale=None)]]
    damages += [("manifest.json", edited(scale=float("nan"))), ("manifest.json", edited(made_of=3))]
    damages += [("moments.npy", how) for how in [*ANY[2:], IMAGES[0], zipped]]
    for name, how in damages:
        change(tmp_path / name, how)
        capsys.readouterr()
        again = cache(tmp_path)
        assert np.array_equal(again.moments, kept) and again.scale == whole.scale, (name, how)
        told = capsys.readouterr().out
        assert f"latents: made anew, those in {tmp_path} are damaged" in told, (name, how)


# ---------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps of ten, with rows of scores."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(make(folder), stop=6, each=lambda run: run.log(frechet=1.0, metric_n=5, n_reference=5))
    return folder


ROWS = [b"\xff\xfe", b"\x00" * 50, b'{"step": ', b"[1]", b'{"step": null, "loss": 1}', b"3"]
ROWS += [b'{"step": "1", "loss": 2}', b'{"step": 1, "loss": "high"}', b'{"step": 1, "lr": [1]}']
ROWS += [b'{"step": 1e999}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 10**5, b'{"step": true}']
ROWS += [b'{"step": -5, "loss": {"a": 1}}', b'{"step": 1, "loss": NaN}', b'{"step": 2}']
ROWS += [b'{"step": 1, "frechet": null}', b'{"step": 1, "frechet": "x", "metric_n": {}}']


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_damaged_log_blocks_no_checkpoint(run, tmp_path, place):
    whole, broken = (shutil.copytree(run, tmp_path / name) for name in ("whole", "broken"))
    train(make(whole))
    log = (broken / "log.jsonl").read_bytes()
    for row in [*ROWS, b"\n".join(ROWS)]:
        (broken / "log.jsonl").write_bytes(row + b"\n" + log if place == "first" else log + row)
        if row not in ROWS:  # it takes longer than the training
            plot_loss(broken)
            plot_metrics(broken)
            refresh(broken)
        assert make(broken).first == 3, row
    train(make(broken))
    assert_same(saved(whole)["model"], saved(broken)["model"])


def test_bytes_of_a_log(run, tmp_path):
    rng = np.random.default_rng(0)
    log = (run / "log.jsonl").read_bytes()
    for i, place in enumerate(rng.integers(len(log), size=20)):
        flipped = bytearray(log)
        flipped[place] ^= 1 << rng.integers(8)
        (run / "log.jsonl").write_bytes(flipped)
        if i < 4:
            plot_loss(run)
            plot_metrics(run)
        assert make(run).first == 3


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "report.html", "samples.png"])
@pytest.mark.parametrize("how", [b"", b"\xff\x00", "gone", b"a: [", b"!!python/none\n"])
def test_other_files_of_a_run(run, tmp_path, name, how, capsys):
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / name).touch()
    change(broken / name, how)
    assert make(broken).first == 3
    refresh(broken)
    assert "Traceback" not in capsys.readouterr().err


NAMES = ["config.yaml", "log.jsonl", "ckpt.pt", "ckpt-previous.pt", "ckpt-000009.pt", ".lock"]
NAMES += ["samples-000006.png", "report.html", "samples.png", "loss.png", "reverse.gif"]
NAMES += ["samples.npz", "snapshot-000006-0.05.pt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_place_of_a_file_is_one_line(run, tmp_path, name):
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / name).touch()
    change(broken / name, "folder")
    with pytest.raises(BadInput, match=f"{name} is no file, and a run writes one here"):
        make(broken)
    (broken / name).rmdir()
    os.mkfifo(broken / name)  # one would wait at it for ever
    with pytest.raises(BadInput, match=f"{name} is no file, and a run writes one here"):
        make(broken)


@pytest.mark.parametrize("how", [*ANY, b"[]", b"{}", b"null", b'{"frechet": 1}'], ids=str)
def test_figures_that_are_kept(tmp_path, how):
    (tmp_path / "samples.npz").touch()
    (tmp_path / "eval.json").write_text("{}")
    change(tmp_path / "eval.json", how)
    assert (
        score.known_figures(tmp_path / "eval.json", tmp_path / "samples.npz", "inception") is None
    )


@pytest.mark.parametrize("kind", [table.Store, lambda path: Store(path, path.parent)])
def test_rows_that_are_kept(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    good = {"made_by": {"a": 1}, "figures": {"b": 2}, "cell": "rows.jsonl"}
    path.write_bytes(b"\n".join([b'{"made_by": 1}', *ROWS, json.dumps(good).encode(), b"{}"]))
    assert len(kind(path).rows) == 1
