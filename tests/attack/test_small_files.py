"""Small files that ask for much: pixels, zeros and members that are declared, not there."""

from runtime.commandline import BadInput
from runtime.limits import most_unpacked

import concurrent.futures
import contextlib
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib

import numpy as np
import pytest
from data_files import noise, python2_pickle
from PIL import Image

from evaluation.image_sets import read_file
from image_data import datasets, decode
from image_data.prepare import _pool
from networks.clip_tokens import read_text


def png(width, height):
    """A gray PNG of zeros, a thousandth of its pixels or less."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer, packed = zlib.compressobj(9), b""
    for _ in range(height):
        packed += packer.compress(bytes(width + 1))
    packed += packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def test_a_long_picture_takes_no_more_memory_than_its_centre(tmp_path):
    """60,000 x 1 pixels in 254 bytes took 4.6 GB: the whole was scaled before it was cropped."""
    (tmp_path / "long.png").write_bytes(png(60_000, 1))
    code = "import resource, sys; from image_data import decode; "
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    code += "decode.decode(sys.argv[1], ['long.png'], 256, 3); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) < 20_000  # kB


@pytest.mark.parametrize("shape", [(9, 100), (100, 9), (7, 64), (640, 11), (6, 6000)])
def test_the_centre_of_a_long_picture_is_that_of_the_scaled_one(shape):
    # Of noise so weak that nothing is clipped: Pillow's two passes clip in an order of its own.
    picture, size = Image.fromarray(noise(shape) // 8 + 112), 10
    scaled = [max(size, round(side * size / min(shape))) for side in picture.size]
    whole = picture.resize(scaled, Image.Resampling.LANCZOS)
    left, top = ((side - size) // 2 for side in scaled)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), int)
    assert max(scaled) > decode.LONG * size
    assert abs(np.asarray(decode.resize(picture, size), int) - expected).max() <= 1


def refused(monkeypatch, limit, read, *told):
    """read() is refused with one line that names the limit, and not where that is lifted."""
    monkeypatch.setenv("DIFFUSION_UNPACKED_GB", str(limit))
    with pytest.raises(BadInput) as raised:
        read()
    line = str(raised.value)
    assert all(word in line for word in (*told, "set DIFFUSION_UNPACKED_GB=")) and "\n" not in line
    monkeypatch.delenv("DIFFUSION_UNPACKED_GB")
    read()


def test_pictures_of_too_many_pixels(tmp_path, monkeypatch):
    (tmp_path / "wide.png").write_bytes(png(2000, 1000))
    for read in (decode.inspect, lambda *which: decode.decode(*which, 8, 3)):
        refused(monkeypatch, 0.03, lambda read=read: read(tmp_path, ["wide.png"]), "2000x1000")


@pytest.mark.parametrize("share, most", [(0.005, 1), (0.05, 2)])
def test_large_pictures_are_read_one_at_a_time(tmp_path, monkeypatch, share, most):
    """By processes that prepare together: 16 of them took 16 times as much as one may."""
    names = [f"{i}.png" for i in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(png(1000, 500))  # 8 MB, as is reckoned
    inside, at_once, met = [], [], threading.Barrier(2)

    def slow(*_):
        inside.append(1)
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(0.2)  # where two are inside they meet
        at_once.append(len(inside))
        inside.pop()
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setenv("DIFFUSION_UNPACKED_GB", str(16 * share))
    monkeypatch.setattr(decode, "to_array", slow)
    monkeypatch.setattr(decode.Turns, "lock", threading.RLock())
    monkeypatch.setattr(decode.Turns, "processes", 16)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: decode.decode(tmp_path, [name], 8, 3), names))
    assert max(at_once) == most


def test_processes_that_prepare_share_turns():
    with _pool(3) as run:
        found = list(run([(shares,)] * 4))
    assert found == [(3, "RLock")] * 4 and decode.Turns.processes == 1


def shares():
    return decode.Turns.processes, type(decode.Turns.lock).__name__


def test_entries_of_a_zip_that_declare_much(tmp_path, monkeypatch):
    whole = io.BytesIO()
    Image.fromarray(noise((8, 8))).save(whole, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", whole.getvalue() + bytes(3_000_000))
    assert (tmp_path / "a.zip").stat().st_size < 5000
    refused(monkeypatch, 0.002, lambda: decode.decode(tmp_path / "a.zip", ["1.png"], 8, 3), "1.png")


def test_idx_files_that_unpack_to_much(tmp_path, monkeypatch):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, n in (("train", 2000), ("t10k", 1)):
        images = struct.pack(">I3I", 0x803, n, 28, 28) + bytes(n * 784)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">II", 0x801, n) + bytes(n)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    refused(
        monkeypatch, 0.001, lambda: datasets.load("mnist", tmp_path), "train-images-idx3-ubyte.gz"
    )


@pytest.mark.parametrize("n", [0, -1, 2**31 - 1, -(2**31)])
def test_idx_files_of_no_images(tmp_path, n):
    """numpy takes -1 as 'as many as there are'."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part in ("train", "t10k"):
        images = struct.pack(">Ii2I", 0x803, n, 28, 28) + bytes(784)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">Ii", 0x801, n) + bytes(1))
    with pytest.raises(BadInput, match="ubyte (is not a whole idx file|takes 1.68e.03 GB)"):
        datasets.load("mnist", tmp_path)


def test_members_of_a_tar_that_declare_much(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    with tarfile.open(tmp_path / "cifar10" / "cifar-10-python.tar.gz", "w:gz") as tar:
        for i in range(1, 6):
            raw = python2_pickle(noise((2, 3072), i), [1, 2]) + bytes(3_000_000 * (i == 4))
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    refused(monkeypatch, 0.002, lambda: datasets.load("cifar10", tmp_path), "data_batch_4")


def test_members_of_an_npz(tmp_path, monkeypatch):
    """One that is used is refused; of others only the shape is read."""
    images = noise((2, 8, 8, 3))
    path = str(tmp_path / "a.npz")
    np.savez_compressed(path, arr_0=images, arr_1=np.zeros(400_000, int))
    monkeypatch.setenv("DIFFUSION_UNPACKED_GB", "0.003")
    with pytest.raises(BadInput, match="a.npz/arr_1 takes 0.0032 GB unpacked"):
        read_file(path)
    np.savez_compressed(path, arr_0=images, notes=np.zeros(400_000, int))
    assert (np.asarray(read_file(path).images) == images).all()
    np.savez_compressed(path, notes=np.zeros(400_000, int))
    with pytest.raises(BadInput, match=r"holds notes int64 \(400000,\)"):
        read_file(path)


def test_a_vocabulary_that_unpacks_to_much(tmp_path, monkeypatch):
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"a b\n" * 500_000))
    refused(monkeypatch, 0.0005, lambda: read_text(tmp_path / "bpe.txt.gz"), "bpe.txt.gz")


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("DIFFUSION_UNPACKED_GB", text)
    with pytest.raises(BadInput, match="such as DIFFUSION_UNPACKED_GB=8"):
        most_unpacked()


def test_only_formats_of_images_are_opened(tmp_path, monkeypatch):
    """An EPS that is called .png started Ghostscript."""
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho > {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    for read in (decode.inspect, lambda *which: decode.decode(*which, 8, 3)):
        with pytest.raises(BadInput, match="1.png is not .* .its format is none of JPEG"):
            read(tmp_path, ["1.png"])
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000"]
)
def test_formats_that_are_read(tmp_path, name):
    Image.fromarray(noise((8, 8, 3))).save(tmp_path / "1.img", name)
    assert decode.decode(tmp_path, ["1.img"], 8, 3).shape == (1, 8, 8, 3)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(BadInput, match="1.png is not a readable image .it is no regular file"):
        decode.decode(tmp_path, ["1.png"], 8, 3)
