"""Archives that hold more than they declare, or declare much where nobody looks."""

from runtime import download
from runtime.commandline import BadInput
from runtime.limits import open_member, read_member

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from data_files import noise, python2_pickle
from PIL import Image

from evaluation.image_sets import read_file
from image_data import arrays, decode
from image_data.listing import listing

METHODS = {"stored": 0, "deflate": 8, "bzip2": 12, "lzma": 14}
MUCH = 30 << 20  # bytes of zeros, which take kilobytes but for "stored"


def packed(method):
    """MUCH zeros as a zip keeps them."""
    piece = bytes(1 << 20)
    if method == 8:
        packer = zlib.compressobj(9, wbits=-15)
    elif method == 12:
        packer = bz2.BZ2Compressor()
    else:
        filters = [{"id": lzma.FILTER_LZMA1, "preset": 0}]
        packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    parts = [packer.compress(piece) for _ in range(0, MUCH, len(piece))]
    head = b"\x09\x04\x05\x00\x5d" + (1 << 18).to_bytes(4, "little") if method == 14 else b""
    return b"".join([head, *parts, packer.flush()])


def lying(path, method, name):
    """A zip of which one member declares 100 bytes."""
    raw = packed(method)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, raw)
        member = archive.getinfo(name)
        member.compress_type, member.file_size = method, 100
        member.flag_bits |= 2 * (method == 14)


def peak_of(read):
    """Bytes of memory that read() takes beyond what it began with."""
    tracemalloc.start()
    try:
        read()
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return used


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_members_are_read_as_zipfile_reads_them(method):
    whole, rng = io.BytesIO(), np.random.default_rng(0)
    content = rng.integers(4, size=150_000, dtype=np.uint8).tobytes() + bytes(400_000)
    with zipfile.ZipFile(whole, "w", METHODS[method]) as archive:
        for name, part in {"a": content, "none": b"", "one": b"1"}.items():
            archive.writestr(name, part)
    archive = zipfile.ZipFile(whole)
    assert read_member(archive, "a") == content
    assert (read_member(archive, "none"), read_member(archive, "one")) == (b"", b"1")
    with open_member(archive, "a") as stream:
        for place, n in rng.integers((len(content), 5000), size=(60, 2)).tolist():
            assert stream.seek(place) == place and stream.read(n) == content[place : place + n]
        assert stream.seek(0, 2) == len(content) and not stream.read()


@pytest.mark.parametrize("method", ["deflate", "bzip2", "lzma"])
def test_a_member_that_holds_more_than_it_declares(tmp_path, method):
    """2 kB of bzip2 that declared 100 bytes took 6 GB."""
    lying(tmp_path / "a.zip", METHODS[method], "1.png")
    lying(tmp_path / "a.npz", METHODS[method], "arr_1.npy")
    for read, told in (
        (lambda: decode.inspect(tmp_path / "a.zip", ["1.png"]), "1.png is not a readable image"),
        (lambda: decode.decode(tmp_path / "a.zip", ["1.png"], 8, 3), "more than the 100 bytes"),
        (lambda: read_file(str(tmp_path / "a.npz")), "more than the 100 bytes"),
    ):

        def refused(read=read, told=told):
            with pytest.raises(BadInput, match=told):
                read()

        assert peak_of(refused) < 4e6


@pytest.mark.parametrize("declared, told", [(10**6, "it ends at byte 9 of"), (9, "its CRC")])
def test_members_that_hold_less_or_others(tmp_path, declared, told):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"123456789", zipfile.ZIP_DEFLATED)
        archive.getinfo("a").file_size = declared
        archive.getinfo("a").CRC += 1
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, pytest.raises(BadInput, match=told):
        read_member(archive, "a")


@pytest.mark.parametrize("key", ["notes", "arr_1", "arr_0"])
def test_an_array_whose_header_is_long(tmp_path, key):
    """A header says how long it is, and numpy reads all of it."""
    header = b"\x93NUMPY\x02\x00" + MUCH.to_bytes(4, "little") + bytes(MUCH)
    images = io.BytesIO()
    np.save(images, noise((2, 8, 8, 3)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", header)
    del header

    def refused():
        with pytest.raises(BadInput, match="a.npz is not a readable .npz|a.npz/arr_1 takes"):
            read_file(str(tmp_path / "a.npz"))

    assert peak_of(refused) < (8e6 if key != "arr_1" else 3 * MUCH)


def cifar_tar(path, kind, n):
    """CIFAR-10's tar, after a header of n bytes."""
    with gzip.open(path, "wb", 1) as file:
        info = tarfile.TarInfo("././@LongLink" if kind == b"L" else "pax")
        info.size, info.type = n, kind
        file.write(info.tobuf(tarfile.GNU_FORMAT) if n else b"")
        for _ in range(n >> 20):
            file.write(bytes(1 << 20))
        batches = io.BytesIO()
        with tarfile.open(fileobj=batches, mode="w") as tar:
            for i in range(1, 6):
                raw = python2_pickle(noise((2, 3072), i), [1, 2])
                info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        file.write(batches.getvalue())


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["name", "pax"])
def test_a_tar_whose_headers_are_long(tmp_path, kind):
    """11 MB took 2.7 GB: the name of a file is read at once, and is none of the sizes declared."""
    path = tmp_path / "cifar-10-python.tar.gz"
    cifar_tar(path, kind, 40 << 20)

    def refused():
        with pytest.raises(BadInput, match="tar.gz has headers of 41,943,"):
            arrays.cifar_source(tmp_path, "train").contents()

    assert peak_of(refused) < 4e6


def test_a_tar_that_somebody_has_gunzipped(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    cifar_tar(path, tarfile.GNUTYPE_LONGNAME, 0)
    packed = arrays.cifar_source(tmp_path, "train").contents()
    path.write_bytes(gzip.decompress(path.read_bytes()))
    again = arrays.cifar_source(tmp_path, "train").contents()
    assert packed.arrays.shape == (10, 32, 32, 3) and (packed.arrays == again.arrays).all()


def test_images_in_a_zip_of_each_method(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(noise((8, 8, 3))).save(whole, "PNG")
    for method in METHODS.values():
        with zipfile.ZipFile(tmp_path / f"{method}.zip", "w", method) as archive:
            archive.writestr("1.png", whole.getvalue())
        found = decode.decode(tmp_path / f"{method}.zip", ["1.png"], 8, 3)
        assert (found[0] == noise((8, 8, 3))).all()
        assert decode.inspect(tmp_path / f"{method}.zip", ["1.png"])[0][:2] == (8, 8)


def test_a_name_beside_the_bytes_that_is_no_text(tmp_path):
    """A zip says each name twice; the second says that it is UTF-8, and is not."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\u00e9.png", b"1")
    raw = path.read_bytes()
    path.write_bytes(raw.replace("\u00e9".encode(), b"\xff\xff", 1))
    with pytest.raises(BadInput, match="a.zip is not a readable zip .*utf-8"):
        listing(path)
    path.rename(part := tmp_path / "a.zip.part")
    assert download._fault(part, {}) == "what arrived is not a zip"
