"""Small files that ask for much: what each does to a reader, and the memory that it takes.

    python bench/hostile_files.py          two minutes; a Markdown table

Each file is made in a temporary folder and read in a process of its own, as a command would read
it. Memory is the peak above that of a process that has imported the reader.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import runtime  # noqa: E402, F401  sets how threads wait, before torch is imported

import bz2  # noqa: E402
import gzip  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import struct  # noqa: E402
import subprocess  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
import zipfile  # noqa: E402
import zlib  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

GB = 10**9
PICTURE = "from image_data.decode import decode as read; from image_data import listing"
MNIST = "from image_data.arrays import idx_source, cifar_source; import image_data.datasets"
PICKLES = "from image_data.cifar_pickle import read_batch"
SETS = "from evaluation.image_sets import read_file"
CHECKPOINTS = "from runtime.checkpoints import load_checkpoint; from runtime import kept"
WEIGHTS = "from networks.published.files import read_weights"
YAML = "from runtime.yaml_settings import yaml_settings; import ddpm_pixel"


def zeros(write, size):
    """`size` zeros in pieces, for a stream's write."""
    piece = bytes(1 << 24)
    for start in range(0, size, len(piece)):
        write(piece[: size - start])


def png(path, width, height):
    def chunk(kind, body):
        body = kind + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    packer, packed = zlib.compressobj(9), []
    for _ in range(height):
        packed.append(packer.compress(bytes(width + 1)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = b"".join([*packed, packer.flush()])
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", packed), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def zipped(path, member, size):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(member, "w", force_zip64=True) as stream,
    ):
        zeros(stream.write, size)


def npz(path, key, size):
    """An array of `size` zeros under `key`, beside four images."""
    whole = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(whole, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
            stream.write(whole.getvalue())
            zeros(stream.write, size)
        images = io.BytesIO()
        np.save(images, np.zeros((4, 8, 8, 3), np.uint8))
        archive.writestr("arr_0.npy", images.getvalue())


def idx(folder):
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">I3I", 0x803, 3 * GB // 784, 28, 28))
        zeros(file.write, 3 * GB // 784 * 784)
    labels = struct.pack(">II", 0x801, 1) + bytes(1)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


class Zeros(io.RawIOBase):
    """A stream of zeros without end."""

    def read(self, size=-1):
        return bytes(size)


def tar(path):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            info.size = 3 * GB if i == 1 else 1
            archive.addfile(info, Zeros())


def pickle_of_an_address(path):
    """An array of objects whose addresses are the file's bytes."""
    dtype = b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    dtype += b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x01"
    array += b"\x85" + dtype + b"\x89U\x08AAAAAAAAtb"
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x00eu.")


def lying(path):
    """A zip of an entry that declares 100 bytes and holds 3 GB, as bzip2 packs it."""
    packer, packed = bz2.BZ2Compressor(9), []
    zeros(lambda piece: packed.append(packer.compress(piece)), 3 * GB)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", b"".join([*packed, packer.flush()]))
        member = archive.getinfo("1.png")
        member.compress_type, member.file_size = zipfile.ZIP_BZIP2, 100


def long_name(path):
    """A tar whose first file has a name of 2.5 GB."""
    with gzip.open(path, "wb", 1) as file:
        info = tarfile.TarInfo("././@LongLink")
        info.size, info.type = 5 * GB // 2, tarfile.GNUTYPE_LONGNAME
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        zeros(file.write, info.size)


def pickle_of_one_text(path):
    """10 MB that are made bytes of 400 times."""
    text = b"X" + (10_000_000).to_bytes(4, "little") + b"a" * 10_000_000
    raw = b"\x80\x02](c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    path.write_bytes(raw + b"h\x00h\x01h\x02\x86R" * 400 + b"e.")


def pickle_of_nested_tuples(path):
    """A type of numbers that is a tuple of one tuple twice, 32 deep."""
    pairs = b"q\x00h\x00\x86" * 32
    path.write_bytes(b"\x80\x02cnumpy\ndtype\n)" + pairs + b"K\x00K\x01\x87R.")


def laughs(path):
    lists = ["&a0 [x, x]", *(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    path.write_text(f"classes: [{', '.join(lists)}]")


def expanded(path):
    state = {
        "script": "ddpm_pixel",
        "config": {},
        "ema": {"w": torch.zeros(1).expand(10**6, 10**5)},
    }
    torch.save(state, path)


# name: (file, how it is made, what a reader imports, what it calls)
FILES = {
    "PNG of 60,000x1, scaled to 256": (
        "a.png",
        lambda p: png(p, 60_000, 1),
        PICTURE,
        "read({folder!r}, ['a.png'], 256, 3)",
    ),
    "PNG of 30,000x30,000": (
        "a.png",
        lambda p: png(p, 30_000, 30_000),
        PICTURE,
        "read({folder!r}, ['a.png'], 256, 3)",
    ),
    "zip entry of 4 GB of zeros": (
        "a.zip",
        lambda p: zipped(p, "1.png", 4 * GB),
        PICTURE,
        "read({path!r}, ['1.png'], 64, 3)",
    ),
    "zip entry of 3 GB that declares 100 bytes": (
        "a.zip",
        lying,
        PICTURE,
        "read({path!r}, ['1.png'], 64, 3)",
    ),
    "gzipped idx of 3 GB": ("", idx, MNIST, "idx_source([{folder!r}], 'train').contents()"),
    "tar member of 3 GB": (
        "cifar-10-python.tar.gz",
        tar,
        MNIST,
        "cifar_source({folder!r}, 'train').contents()",
    ),
    "CIFAR batch whose array holds objects": (
        "data_batch_1",
        pickle_of_an_address,
        PICKLES,
        "read_batch(open({path!r}, 'rb').read())",
    ),
    "tar with a name of 2.5 GB": (
        "cifar-10-python.tar.gz",
        long_name,
        MNIST,
        "cifar_source({folder!r}, 'train').contents()",
    ),
    "CIFAR batch of one text 400 times": (
        "data_batch_1",
        pickle_of_one_text,
        PICKLES,
        "read_batch(open({path!r}, 'rb').read())",
    ),
    "CIFAR batch of 2^32 tuples": (
        "data_batch_1",
        pickle_of_nested_tuples,
        PICKLES,
        "read_batch(open({path!r}, 'rb').read())",
    ),
    "npz with labels of 3 GB": (
        "a.npz",
        lambda p: npz(p, "arr_1", 3 * GB),
        SETS,
        "read_file({path!r})",
    ),
    "npz with an unused member of 3 GB": (
        "a.npz",
        lambda p: npz(p, "notes", 3 * GB),
        SETS,
        "read_file({path!r})",
    ),
    "checkpoint, one number as 400 GB": (
        "ckpt.pt",
        expanded,
        CHECKPOINTS,
        "load_checkpoint({path!r})",
    ),
    "weights, one number as 400 GB": (
        "a.pt",
        expanded,
        WEIGHTS,
        "read_weights(__import__('pathlib').Path({path!r}))",
    ),
    "YAML of 2^60 words by aliases": (
        "a.yaml",
        laughs,
        YAML,
        "yaml_settings({path!r}, ddpm_pixel.Config)",
    ),
    "JSON of 100,000 lists in each other": (
        "a.json",
        lambda p: p.write_text("[" * 100_000),
        WEIGHTS,
        "__import__('networks.published.files').published.files.read_json("
        "__import__('pathlib').Path({path!r}))",
    ),
}
PROGRAM = """
import json, resource, sys
sys.path.insert(0, {root!r})
import torch, numpy
{imports}
from runtime.commandline import BadInput
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, told = peak(), "read"
try:
    {call}
except BadInput as error:
    told = str(error).replace({folder!r} + "/", "")
print(json.dumps([told, peak() - before]))
"""


def row(name):
    """(size of the file in kB, what was said, MB)."""
    file, make, imports, call = FILES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file)
        make(path)
        size = sum(p.stat().st_size for p in Path(folder).iterdir()) / 1000
        call = call.format(path=str(path), folder=folder)
        program = PROGRAM.format(root=str(ROOT), imports=imports, call=call, folder=folder)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        return size, f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}", None
    told, memory = json.loads(done.stdout.splitlines()[-1])
    return size, told.replace(f"{folder}/", "").replace(folder, "its folder"), memory


def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("| file | its size, kB | what is said | memory, MB |\n| --- | --: | --- | --: |")
    for name in FILES:
        size, told, memory = row(name)
        told = told if len(told) < 110 else told[:107] + "..."
        shown = "-" if memory is None else f"{memory:.0f}"
        print(f"| {name} | {size:,.1f} | {told.replace('|', '/')} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
