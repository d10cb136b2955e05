"""Names in folders and zips: of any system, odd, damaged or hostile, they are read or refused."""

from runtime.commandline import BadInput

import os
import struct
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
from data_files import noise, write_image, write_mnist, write_tree

from image_data import datasets, trees
from image_data.listing import files, listing
from image_data.trees import tree_source

CAFE = unicodedata.normalize("NFC", "café")
APART = unicodedata.normalize("NFD", CAFE)  # as macOS stores it


def zipped(path, pixels, **options):
    """A zip of PNGs under any names, {name: uint8 (h,w,3)}."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for i, (name, values) in enumerate(pixels.items()):
            image = path.with_name(f"{i}.png")
            write_image(image, values)
            archive.writestr(name, image.read_bytes())
            image.unlink()
    return path


def test_a_zip_made_on_windows_is_read_by_its_folders(tmp_path):
    """The issue's own: it was four images without labels, those of test among them."""
    names = [r"train\cat\1.png", r"train\dog\2.png", r"train\dog\3.png", r"test\dog\4.png"]
    pixels = {name: noise((4, 4, 3), i) for i, name in enumerate(names)}
    path = zipped(tmp_path / "set.zip", pixels)
    train, test = (datasets.load(path, tmp_path / "d", split=s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [1]
    assert (np.asarray(train.images) == [pixels[name] for name in names[:3]]).all()
    assert (test.images[0] == pixels[names[3]]).all()


@pytest.mark.parametrize(
    "name", ["../1.png", "cat/../../1.png", "/cat/1.png", r"C:\cat\1.png", r"\\server\cat\1.png"]
)
def test_names_that_lead_out_of_a_zip_are_refused_and_nothing_is_written(tmp_path, name):
    path = zipped(tmp_path / "set.zip", {"cat/0.png": noise((4, 4, 3)), name: noise((4, 4, 3))})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="set.zip holds the name .*1.png, which leads out of it"):
        listing(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_images_of_one_name_are_refused(tmp_path):
    pixels = {"cat/1.png": noise((4, 4, 3)), "./cat//1.png": noise((4, 4, 3))}
    with pytest.raises(BadInput, match="holds cat/1.png twice"):
        listing(zipped(tmp_path / "a.zip", pixels))
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "b.zip", "w") as f,
    ):
        f.writestr("1.png", b"")
        f.writestr("1.png", b"")
    with pytest.raises(BadInput, match="holds 1.png twice"):
        listing(tmp_path / "b.zip")


def test_accents_are_one_letter_however_they_are_stored(tmp_path):
    names = [f"train/{CAFE}/1.png", "train/thé/2.png", f"test/{APART}/3.png"]
    for path in (
        tmp_path / "set",
        zipped(tmp_path / "set.zip", dict.fromkeys(names, noise((4, 4, 3)))),
    ):
        if path.suffix != ".zip":
            write_tree(path, names)
        test = tree_source(path, "test").contents()
        assert test.class_names == (CAFE, "thé") and test.labels.tolist() == [0]
        assert test.items == (names[2],)  # by which it can be opened
    ds = datasets.load(tmp_path / "set.zip", tmp_path / "d", split="test")
    assert (ds.images[0] == noise((4, 4, 3))).all()


def without_the_bit_of_utf8(path):
    """The zip's entries as macOS packs them: UTF-8, but the flag that says so is not set."""
    raw = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = raw.find(signature)
        while start >= 0:
            flags = struct.unpack_from("<H", raw, start + place)[0]
            struct.pack_into("<H", raw, start + place, flags & ~0x800)
            start = raw.find(signature, start + 4)
    path.write_bytes(raw)
    return path


def test_names_in_a_zip_are_utf8_said_or_not_and_cp437_otherwise(tmp_path):
    names = {f"{CAFE}/1.png": noise((4, 4, 3), 1), "日本/2.png": noise((4, 4, 3), 2)}
    path = without_the_bit_of_utf8(zipped(tmp_path / "mac.zip", names))
    with zipfile.ZipFile(path) as archive:
        assert CAFE not in archive.namelist()[0]  # it is not what Python reads
    ds = datasets.load(path, tmp_path / "d")
    assert ds.class_names == (CAFE, "日本") and (ds.images[1] == noise((4, 4, 3), 2)).all()

    old = zipped(
        tmp_path / "dos.zip", {"caf_/1.png": noise((4, 4, 3)), "the/2.png": noise((4, 4, 3))}
    )
    old.write_bytes(old.read_bytes().replace(b"caf_", b"caf\x82"))  # é in code page 437
    assert datasets.load(old, tmp_path / "d").class_names == (CAFE, "the")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_spelled_out(tmp_path):
    for name in (b"caf\xe9", b"caf\xe8"):
        folder = os.path.join(os.fsencode(tmp_path), b"set", name)
        os.makedirs(folder)
        write_image(tmp_path / "1.png", noise((4, 4, 3)))
        os.rename(tmp_path / "1.png", os.path.join(folder, b"1.png"))
    ds = datasets.load(tmp_path / "set", tmp_path / "d")
    assert ds.class_names == (r"caf\xe8", r"caf\xe9") and ds.labels.tolist() == [0, 1]


def test_an_encrypted_zip_is_refused_by_name(tmp_path):
    path = zipped(tmp_path / "set.zip", {"1.png": noise((4, 4, 3))})
    raw = bytearray(path.read_bytes())
    for start in (raw.find(b"PK\3\4") + 6, raw.find(b"PK\1\2") + 8):
        raw[start] |= 1
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="set.zip is encrypted; unpack it and name the folder"):
        datasets.load(path, tmp_path / "d")


def test_a_zip_packed_by_a_method_that_python_lacks_is_refused(tmp_path):
    """Windows packs files above 2 GB by Deflate64, method 9."""
    path = zipped(tmp_path / "set.zip", {"1.png": noise((4, 4, 3))})
    raw = bytearray(path.read_bytes())
    for start in (raw.find(b"PK\3\4") + 8, raw.find(b"PK\1\2") + 10):
        raw[start] = 9
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="set.zip: .*compression.*; unpack it and name the folder"):
        datasets.load(path, tmp_path / "d")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip64_and_every_method_that_python_has(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        for i in range(2):
            write_image(tmp_path / "x.png", noise((4, 4, 3), i))
            with archive.open(f"{i}.png", "w", force_zip64=True) as entry:
                entry.write((tmp_path / "x.png").read_bytes())
    ds = datasets.load(tmp_path / "set.zip", tmp_path / "d")
    assert (np.asarray(ds.images) == [noise((4, 4, 3), i) for i in range(2)]).all()


@pytest.mark.parametrize(
    "name, said",
    [
        ("set.tar.gz", "neither a folder nor a .zip of images; unpack it and name the folder"),
        ("set.7z", "unpack it and name the folder"),
        ("cat.png", "neither .* of images; name the folder .*pics$"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, name, said):
    path = tmp_path / "pics" / name
    path.parent.mkdir()
    path.write_bytes(b"x")
    with pytest.raises(BadInput, match=said):
        datasets.load(path, tmp_path / "d")


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    for name, said in (
        ("a/train.tar", "unpack .*a/train.tar first"),
        ("b/cat/1.heic", "files such as cat/1.heic are of other kinds"),
        ("c/.hidden/1.png", "it is empty"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BadInput, match=f"holds no images, .*; {said}"):
            datasets.load(tmp_path / name.split("/")[0], tmp_path / "d")


def test_a_zip_in_a_zip_is_to_be_unpacked_first(tmp_path):
    for path in (tmp_path / "set", tmp_path / "a.zip"):
        if path.suffix:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("data.zip", b"")
        else:
            path.mkdir()
            (path / "data.zip").write_bytes(b"")
        said = "unpack .*a.zip/data.zip first" if path.suffix else r"did you mean .*data.zip\?"
        with pytest.raises(BadInput, match=f"holds no images, .*; {said}"):
            tree_source(path, "train").contents()


def test_links_in_a_circle_end(tmp_path):
    write_tree(tmp_path / "set", ["a/1.png", "b/2.png"])
    (tmp_path / "set" / "a" / "x").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "y").symlink_to(tmp_path / "set" / "a")
    found = ["a/1.png", "a/x/2.png", "b/2.png", "b/y/1.png"]
    assert [name for name, *_ in files(tmp_path / "set")] == found
    assert list(listing(tmp_path / "set").images) == found


def test_class_names_with_commas_are_chosen_by_number(tmp_path):
    pixels = write_tree(
        tmp_path / "set", ["crane, bird/1.png", "crane, machine/2.png", "dog/3.png"]
    )
    ds = datasets.load(tmp_path / "set", tmp_path / "d", classes="1,2")
    assert ds.class_names == ("crane, machine", "dog")
    assert (ds.images[0] == pixels["crane, machine/2.png"]).all()


def test_a_set_that_an_earlier_rule_understood_is_prepared_anew(tmp_path, monkeypatch):
    write_tree(tmp_path / "set", ["a/1.png", "b/2.png"])
    write_mnist(tmp_path / "mnist")
    paths = {"set": tmp_path / "set", "zip": tmp_path / "set.zip", "mnist": "mnist"}
    zipped(paths["zip"], {"1.png": noise((4, 4, 3))})
    before = {name: datasets.load(path, tmp_path) for name, path in paths.items()}
    monkeypatch.setattr(trees, "RULE", trees.RULE - 1)
    for name, path in paths.items():
        again = datasets.load(path, tmp_path)
        assert again.key == before[name].key  # what is made of images, such as features, stays
        same = again.manifest["folder"] == before[name].manifest["folder"]
        assert same == (name == "mnist")
