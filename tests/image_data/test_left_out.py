"""What lies in a folder of images but is none of it: this program's own files, and systems'."""

from runtime import processes
from runtime.checkpoints import TrainedOn, trained_config
from runtime.commandline import BadInput

import os
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import noise, write_image, write_tree
from launching import run as start
from launching import succeed
from PIL import Image

from image_data import datasets, sources

NAMES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
A_RUN = ("config.yaml", "log.jsonl")


@pytest.fixture
def told(tmp_path, capsys):
    """A function: load a set as in a process of its own; what it prints, path cut."""

    def load(path, root="prepared", **options):
        processes.SAID.clear()
        capsys.readouterr()
        load.found = datasets.load(path, tmp_path / root, **options)
        return capsys.readouterr().out.replace(f"{tmp_path}/", "")

    return load


def write_results(folder, marks, pictures=("loss.png", "samples-000002.png", "forward.gif")):
    folder.mkdir(parents=True, exist_ok=True)
    for name in marks:
        (folder / name).write_text("{}")
    for name in pictures:
        write_image(folder / name, noise((8, 8, 3)))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "marks, kind",
    [
        (A_RUN, "a run"),
        (("config.yaml", "ckpt.pt"), "a run"),
        (("manifest.json", "images.npy"), "a prepared set"),
        (("samples.npz", "samples.png"), "samples"),
        (("reconstructions.npz", "reconstructions.png"), "reconstructions"),
        (("reconstruction.png", "reconstruction-error.png"), "reconstructions"),
        (("compare.jsonl", "compare-cells"), "a comparison"),
    ],
)
def test_folders_of_this_program_are_no_classes(tmp_path, told, marks, kind, packed):
    """The issue's own, and its siblings; runs/ around them is no class without images either."""
    path = tmp_path / "set"
    pixels = write_tree(path, NAMES)
    before = told(path)
    key = told.found.key
    write_results(path / "runs" / "a", marks)
    if packed:
        path = shutil.make_archive(str(path), "zip", path)
    after = told(path)
    assert told.found.class_names == ("cat", "dog") and told.found.key == key
    assert (np.asarray(told.found.images) == list(pixels.values())).all()
    said = f"left out: 1 folder of this program: runs/a/ ({kind})"
    assert after.count(said) == 1 and "without images" not in after
    assert packed or after == f"{before[:-1]}; {said}\n" == told(path)  # prepared once


def test_a_folder_of_that_kind_of_names_alone_is_a_class(tmp_path, told):
    """One mark is not enough: people have a samples.png, and a config.yaml, too."""
    write_tree(tmp_path / "set", [*NAMES, "runs/samples.png"])
    (tmp_path / "set" / "runs" / "config.yaml").write_text("{}")
    assert "left out" not in told(tmp_path / "set")
    assert told.found.class_names == ("cat", "dog", "runs")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_what_systems_leave_behind_is_left_out_and_said(tmp_path, told, packed):
    names = [f"{name}/1.png" for name in ("#recycle", "$RECYCLE.BIN", "cat/@eaDir", "dog/@eaDir")]
    names += ["lost+found/1.png", "System Volume Information/1.png", "__pycache__/1.png"]
    write_tree(tmp_path / "set", [*NAMES, *names, "cat/.ipynb_checkpoints/1.png"])
    for name in ("cat/Thumbs.db", "dog/desktop.ini"):  # which deserve no word
        (tmp_path / "set" / name).write_text("")
    write_tree(tmp_path / "set", ["__MACOSX/cat/1.png"])
    path = tmp_path / "set"
    if packed:
        path = shutil.make_archive(str(path), "zip", path)
    said = "left out: 1 named #recycle, 1 named $RECYCLE.BIN, 2 named @eaDir, 1 named System Volume"
    said += " Information, 1 named __pycache__, 1 named lost+found\n"
    line = told(path)
    assert line.endswith(f"; {said}") and line.count("\n") == 1 and "without" not in line
    assert told(path) == line
    assert told.found.class_names == ("cat", "dog") and len(told.found) == 8


@pytest.mark.parametrize(
    "marks, said",
    [
        ((*A_RUN, "ckpt.pt"), "a run of this program; eval_fid.py takes .*own/ckpt.pt; if"),
        (A_RUN, "a run of this program; if there are images of yours in it, move them"),
        (("samples.npz", "samples.png", "0000.png"), "samples .* takes .*own/samples.npz; if"),
        (
            ("reconstructions.npz", "reconstructions.png"),
            "reconstructions .* takes .*own/rec.*npz; if",
        ),
    ],
)
def test_such_a_folder_itself_is_refused_with_what_to_type(tmp_path, marks, said):
    write_results(tmp_path / "own", marks)
    with pytest.raises(BadInput, match=f"own is no data set, but {said}"):
        datasets.load(tmp_path / "own", tmp_path / "d")
    failed = start("eval_fid", tmp_path / "a.npz", tmp_path / "own", "--size", 16)
    assert failed.code == 2 and "own is no data set, but" in failed.err


def test_a_prepared_set_names_what_it_is_made_of(tmp_path):
    write_tree(tmp_path / "set", NAMES)
    folder = datasets.load(tmp_path / "set", tmp_path / "d").manifest["folder"]
    with pytest.raises(BadInput, match=f"a prepared set .*; type .*made from: {tmp_path}/set$"):
        datasets.load(folder, tmp_path / "d")


def test_data_run_and_prepared_set_in_one_folder(tmp_path, toy, tiny):
    """A run there goes on where it was, and does not learn its own pictures."""
    photos = shutil.copytree(toy[1], tmp_path / "photos")
    flags = [*tiny["ddpm_pixel"], "--data", photos, "--sample-every", 2, "--out", photos / "runs/a"]
    for root, first in ((photos / "data", 2), (photos, 4)):
        for steps in (first, first + 1):
            done = succeed("ddpm_pixel", *flags, "--data-root", root, "--steps", steps)
        assert "64 images of 2 classes (bars 32, dots 32)" in done.out
        assert "folders of this program: " in done.out
    assert list((photos / "runs" / "a").glob("*.png"))


def test_out_among_the_images_is_refused(tmp_path):
    """The folder would be a run from then on, and be left out with the images in it."""
    write_tree(tmp_path / "set", NAMES)
    about = {"data": str(tmp_path / "set"), "data_root": tmp_path / "d", "size": 0, "classes": ""}
    for out in ("set", "set/cat"):
        with pytest.raises(BadInput, match=f"--out .*{out} holds images of --data .*; name a new"):
            datasets.of(
                SimpleNamespace(**about, dry_run=False, smoke=False, out=str(tmp_path / out))
            )
    write_results(tmp_path / "set" / "run", A_RUN)
    for out in ("set/run", "set/new", "other", ""):
        found = datasets.of(
            SimpleNamespace(**about, dry_run=False, smoke=False, out=out and tmp_path / out)
        )
        assert len(found) == 8


# ------------------------------------------------------------------------------- known data sets


@pytest.mark.parametrize("name, count", sources.CLASSES.items())
def test_a_stray_picture_is_no_known_data_set(tmp_path, told, monkeypatch, name, count):
    monkeypatch.setenv("DIFFUSION_MIRROR", "http://127.0.0.1:9")
    write_tree(tmp_path / name, ["sheet.png", "train/1.png"], side=2)
    with pytest.raises(BadInput, match="could not download|cannot be downloaded"):
        told(name, ".")
    processes.SAID.clear()
    names = [f"{split}/{i}/1.png" for split in ("train", "test") for i in range(count)]
    shutil.rmtree(tmp_path / name)
    write_tree(tmp_path / name, names, side=2)
    assert "classes are there" not in told(name, ".")
    assert told.found.num_classes == count == len(told.found)


@pytest.mark.parametrize(
    "name, folders, line",
    [
        ("afhq", ["train/cat"], "1 of afhq's 3 classes is there: class folders in afhq"),
        ("afhq", ["train/cat", "train/dog", "val/cat", "val/dog"], "2 of afhq's 3 classes are"),
        ("imagenet100", ["n01", "n02"], "2 of imagenet100's 100 classes are there"),
        ("cifar10", ["test/frog", "train/frog", "train/ship"], "2 of cifar10's 10 classes are"),
    ],
)
def test_some_classes_of_a_known_set_are_used_and_said(
    tmp_path, told, monkeypatch, name, folders, line
):
    """As configs/imagenet100.yaml promises; nothing is downloaded in their place."""
    monkeypatch.setenv("DIFFUSION_MIRROR", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / name, [f"{folder}/1.png" for folder in folders])
    assert f"note: {line}" in told(name, ".")
    assert told.found.class_names == tuple(sorted({f.split("/")[-1] for f in folders}))
    write_tree(tmp_path / name, ["sheet.png"])
    if name == "imagenet100":
        with pytest.raises(BadInput, match=r"mixes class folders and loose images .sheet.png"):
            told(name, ".")
    else:
        assert "1 image outside of train/" in told(name, ".")


def test_the_stray_picture_is_named(tmp_path, capsys):
    write_tree(tmp_path / "imagenet100", ["b.png", "a.png"])
    with pytest.raises(BadInput, match="imagenet100 cannot be downloaded without an account"):
        datasets.load("imagenet100", tmp_path)
    line = f"note: {tmp_path}/imagenet100/a.png and 1 more not used: imagenet100 is class folders"
    assert capsys.readouterr().out.startswith(f"{line}, 100 of them; if they")


# ------------------------------------------------------------------- copies, pages, checkpoints


def test_copies_of_earlier_states_are_told(tmp_path, told):
    """Not those of other classes, sizes, splits, or of another folder of this name."""
    path = tmp_path / "set"
    write_tree(path, NAMES)
    write_tree(tmp_path / "b" / "set", NAMES)
    for options in ({"size": 4}, {"classes": "cat"}, {"split": "test"}, {}):
        assert "earlier" not in told(path, **options)
    assert "earlier" not in told(tmp_path / "b" / "set")
    first = told.found = datasets.load(path, tmp_path / "prepared")
    write_tree(path, ["cat/9.png"])
    size = sum(f.stat().st_size for f in os.scandir(first.manifest["folder"]) if f.is_file())
    out = told(path, classes="dog")
    assert "note: 2 copies of earlier states of set may be deleted (0.0 MB): prepared/set-" in out
    out, folder = told(path), first.manifest["folder"].replace(f"{tmp_path}/", "")
    assert "note: 2 copies" in out and folder in out and size > 0
    assert "earlier" not in told(path)  # it is told when another one is made
    assert os.path.isdir(first.manifest["folder"])


def test_pages_of_a_tiff_are_told(tmp_path, told):
    pages = [Image.fromarray(noise((8, 8, 3), i)) for i in range(5)]
    (tmp_path / "set").mkdir()
    for count in (1, 2, 5):
        path = tmp_path / "set" / f"{count}.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:count])
    for _ in range(2):
        assert "note: set: 2 files have several pages, up to 5; the first is taken\n" in told(
            tmp_path / "set"
        )
    assert (np.asarray(told.found.images) == noise((8, 8, 3), 0)).all() and len(told.found) == 3
    write_tree(tmp_path / "plain", NAMES)
    assert "pages" not in told(tmp_path / "plain")


@dataclass
class Settings:
    data: str = ""
    size: int = 0


def test_the_path_of_a_checkpoint_is_of_the_images_it_has_seen(tmp_path, monkeypatch, capsys):
    """They are compared where they are prepared; nothing is prepared for that alone."""
    write_tree(tmp_path / "a" / "set", NAMES)
    write_tree(tmp_path / "b" / "set", [*NAMES, "dog/9.png"])
    monkeypatch.chdir(tmp_path / "a")
    key = datasets.load("set", "d", size=4, classes=["dog"]).key
    kept = {"data": "set", "size": 4, "classes": "dog", "data_key": key}
    name = trained_config(Settings, {"config": kept}).data
    assert name == "set" and isinstance(name, TrainedOn)
    note = "still holds what the network was trained on is not known: those images are not prepared"
    other = rf"b/set holds other images .* \(data_key {key} there, .* or they were read otherwise"
    for i, split in enumerate(("train", "test")):

        def load(name, split=split):
            processes.SAID.clear()
            return datasets.load(name, "d", split=split)

        monkeypatch.chdir(tmp_path / "a")
        assert len(load(name)) == 8  # whatever size and classes are asked for now
        assert note not in capsys.readouterr().out
        monkeypatch.chdir(tmp_path / "b")
        assert len(load("set")) == 9  # typed: on purpose
        if i == 0:
            before = sorted(os.listdir("d"))
            assert len(load(name)) == 9 and note in capsys.readouterr().out
            assert sorted(os.listdir("d")) == before
            with pytest.raises(BadInput, match=other):  # prepared on purpose, and then compared
                datasets.load(name, "d", size=4, classes="dog")
            assert note not in capsys.readouterr().out
        with pytest.raises(BadInput, match=other):
            load(name)
        with pytest.raises(BadInput, match=other):
            datasets.held_out(name, "d", (3, 8, 8), ())


def test_files_that_changed_since_the_training_are_known_without_preparing(tmp_path, told):
    write_tree(tmp_path / "set", NAMES)
    told(tmp_path / "set", size=4)
    kept = {"data": str(tmp_path / "set"), "size": 4, "data_key": told.found.key}
    name = TrainedOn.of(kept)
    assert "not known" not in told(name, split="test") and len(told.found) == 8
    write_tree(tmp_path / "set", ["dog/9.png"])
    before = sorted(os.listdir(tmp_path / "prepared"))
    with pytest.raises(BadInput, match="set holds other images than the network was trained on"):
        told(name, split="test")
    assert sorted(os.listdir(tmp_path / "prepared")) == before


def test_a_path_of_a_checkpoint_that_leads_nowhere_is_said_to_be_the_checkpoints(tmp_path):
    for kept in ({"data": "photos"}, {"data": "photos", "data_key": "x"}):
        name = TrainedOn.of(kept)
        told = "no data set, folder or zip is named photos .*; the checkpoint was trained on it"
        with pytest.raises(BadInput, match=f"{told}, and names it so: type --data PATH"):
            datasets.load(name, tmp_path / "d")
        name.checkpoint = "runs/a/ckpt.pt"
        with pytest.raises(BadInput, match="; runs/a/ckpt.pt was trained on it, .*--data PATH"):
            datasets.load(name, tmp_path / "d", split="test")
    with pytest.raises(BadInput, match=r"named photos \(data sets: [a-z0-9_, ]*\)$"):
        datasets.load("photos", tmp_path / "d")  # typed


def test_known_names_and_checkpoints_without_a_key_are_not_compared(tmp_path):
    write_tree(tmp_path / "set", NAMES)
    for kept in ({"data": "glyphs", "data_key": "x"}, {"data": "mnist", "data_key": "x"}):
        datasets.check_trained_on(TrainedOn.of(kept), tmp_path / "d")
    assert len(datasets.load(TrainedOn.of({"data": str(tmp_path / "set")}), tmp_path / "d")) == 8
