"""image_sets.py: files of images stay on the disk, broken ones are named, layouts are others'."""

from runtime.commandline import BadInput

import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
from reference_metrics import import_references

from evaluation import image_sets
from evaluation.image_sets import Images, Statistics, read


@dataclass
class Settings:
    """Those of eval_fid.py that `read` looks at."""

    data_root: str = "unused"
    size: int = 0
    classes: str = ""
    seed: int = 0


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_of_an_npz_are_mapped_not_read(pictures, tmp_path, save, order):
    path, labels = tmp_path / "a.npz", np.arange(50) % 3
    save(path, np.asarray(pictures, order=order), labels)
    found = read(str(path), Settings())
    assert isinstance(found.images, np.memmap)
    np.testing.assert_array_equal(found.images, pictures)
    np.testing.assert_array_equal(found.labels, labels)
    assert not found.images.flags.writeable


def test_images_of_an_npy_are_mapped_not_read(pictures, tmp_path):
    np.save(tmp_path / "a.npy", pictures)
    found = read(str(tmp_path / "a.npy"), Settings())
    assert isinstance(found.images, np.memmap) and found.labels is None
    np.testing.assert_array_equal(found.images, pictures)


def test_drawn_images_are_views_of_the_file_in_its_order(pictures, tmp_path):
    np.savez(tmp_path / "a.npz", pictures, np.arange(50))
    found = read(str(tmp_path / "a.npz"), Settings(seed=3), n=20)
    assert found.images.shape == (20, 6, 5, 3) and len(found.images) == 20
    assert list(found.labels) == sorted(set(found.labels)) != list(range(20))
    np.testing.assert_array_equal(found.images[5:9], pictures[found.labels[5:9]])
    np.testing.assert_array_equal(np.asarray(found.images), pictures[found.labels])
    again, other = (read(str(tmp_path / "a.npz"), Settings(seed=s), n=20) for s in (3, 4))
    assert list(again.labels) == list(found.labels) != list(other.labels)
    with pytest.raises(BadInput, match="--n 51: .*a.npz has only 50 images"):
        read(str(tmp_path / "a.npz"), Settings(), n=51)


def flip_a_byte(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_wrong_bit_is_noticed_and_the_file_named(pictures, tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, pictures)
    flip_a_byte(path, 2000)  # amid the pixels
    with pytest.raises(BadInput, match=r"a\.npz is not a readable \.npz file \(.*(CRC|invalid)"):
        read(str(path), Settings())


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda f: f.write_bytes(b"not a zip"), "not a readable"),
        (lambda f: f.write_bytes(b""), "not a readable"),
        (lambda f: np.savez(f, np.zeros((0, 4, 4, 3), np.uint8)), r"\(0, 4, 4, 3\); expected"),
        (lambda f: np.savez(f, np.zeros((4, 4, 3), np.uint8)), r"uint8 \(4, 4, 3\); expected"),
        (lambda f: np.savez(f, np.full((3, 4, 4, 1), np.nan)), "float64 .*expected arr_0 uint8"),
        (lambda f: np.savez(f, np.zeros((3, 4, 4, 1), np.uint8), np.zeros(2, int)), "expected"),
        (lambda f: np.savez(f, np.array([{}], object)), "not a readable"),
        (lambda f: zipfile.ZipFile(f, "w").close(), "holds nothing; expected"),
    ],
    ids=["text", "empty", "no-images", "one-image", "nan", "labels", "objects", "empty-zip"],
)
def test_what_is_no_file_of_images_is_refused(save, words, tmp_path):
    path = tmp_path / "a.npz"
    save(path)
    with pytest.raises(BadInput, match=words) as error:
        read(str(path), Settings())
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_header_that_promises_more_than_there_is_is_refused(pictures, tmp_path):
    import io

    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "|u1", "fortran_order": False, "shape": (100, 6, 5, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue() + pictures.tobytes())
        archive.writestr("arr_2.npy", bytes(10_000))  # what lies behind
    with pytest.raises(BadInput, match="not a readable .npz file .*as long as its header"):
        read(str(tmp_path / "a.npz"), Settings())


@pytest.mark.parametrize(
    "facts",
    [
        {"n": -3},
        {"n": "many"},
        {"feature_hash": 7},
        {"mu": np.array(["a"])},
        {"mu": np.ones(1) * 1j},
    ],
    ids=["negative", "text", "hash", "strings", "complex"],
)
def test_statistics_that_lie_are_refused(facts, tmp_path):
    np.savez(tmp_path / "a.npz", **({"mu": np.zeros(1), "sigma": np.eye(1)} | facts))
    with pytest.raises(BadInput, match="not a readable"):
        read(str(tmp_path / "a.npz"), Settings())


def test_an_array_of_other_than_images_is_refused():
    with pytest.raises(BadInput, match=r"mine holds float64 \(2, 4, 4, 3\); expected"):
        image_sets.as_images(np.zeros((2, 4, 4, 3)), "mine")
    with pytest.raises(BadInput, match="mine holds list; expected"):
        image_sets.as_images([1], "mine")
    with pytest.raises(BadInput, match="mine holds no images"):
        image_sets.as_images(np.zeros((0, 4, 4, 3), np.uint8), "mine")


# ------------------------------------------------------------------------------- statistics


def test_pytorch_fid_reads_the_statistics_and_we_read_its_own(tmp_path):
    import_references()
    from pytorch_fid.fid_score import compute_statistics_of_path

    mu, sigma = np.arange(3.0), np.eye(3)
    ours, theirs = str(tmp_path / "ours.npz"), str(tmp_path / "theirs.npz")
    side = Statistics("x", mu, sigma, n=10, protocol="p", feature_hash="abc")
    image_sets.save_statistics(ours, side)
    for got, expected in zip(
        compute_statistics_of_path(ours, None, 1, 3, "cpu"), (mu, sigma), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert vars(read(ours, Settings())) | {"name": "x", "mu": 0, "sigma": 0} == vars(side) | {
        "mu": 0,
        "sigma": 0,
    }
    np.savez_compressed(theirs, mu=mu, sigma=sigma)  # as its own --save-stats does
    found = read(theirs, Settings())
    assert isinstance(found, Statistics) and found.n is None and found.feature_hash is None


def test_a_reference_file_of_the_adm_suite_is_images_with_statistics(pictures, tmp_path):
    path = str(tmp_path / "adm.npz")
    mu, sigma = np.zeros(4), np.eye(4)
    np.savez(path, arr_0=pictures, mu=mu, sigma=sigma, mu_s=np.zeros(2), sigma_s=np.eye(2))
    found = read(path, Settings())
    assert isinstance(found, Images) and len(found.images) == 50
    np.testing.assert_array_equal(found.statistics.sigma, sigma)
    assert found.statistics.n is None  # of how many images they are is not told
