"""A network's running mean in half precision, as a few small files, and back to a checkpoint.

    python bench/gpu_train.py --join FOLDER --out ckpt.pt

A GPU that was rented for an hour is gone after it. What is worth carrying home of a checkpoint are
the weights that get sampled: a quarter of its bytes, an eighth in fp16. Of each number one byte
holds the sign, the exponent and the first bits, which are alike among weights: zlib makes it a
third smaller. The other byte is noise and stays as it is.

    8 bytes         length of the header
    header          JSON: what the checkpoint says of itself, names and shapes of the tensors
    upper bytes     of all numbers, one after the other, by zlib
    lower bytes
    32 bytes        SHA-256 of all before it
"""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput
from runtime.files import atomic_write

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

NAME = re.compile(r"ema-(\d+)-(\d+)-of-(\d+)\.bin")  # step, number, how many
LARGEST = 15_990_000  # bytes of a part: four hold chapter 1's 36 M weights, be they heavy-tailed
KEPT = ("script", "config", "step", "shape", "class_names", "settings")  # of a checkpoint


def to_bytes(state):
    """The running mean of a checkpoint `state` and what must be known to sample it.

    Raises BadInput where a weight is too large for fp16.
    """
    tensors = {name: t.to(torch.float16).contiguous() for name, t in state["ema"].items()}
    if wrong := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise BadInput(f"the running mean of {wrong[0]} does not fit into fp16")
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    about = {name: state[name] for name in KEPT if name in state} | {"tensors": shapes}
    header = json.dumps(about).encode()
    numbers = np.concatenate([t.numpy().reshape(-1) for t in tensors.values()])
    lower, upper = numbers.astype("<f2").view(np.uint8).reshape(-1, 2).T
    body = len(header).to_bytes(8, "little") + header
    body += zlib.compress(upper.tobytes()) + lower.tobytes()
    return body + hashlib.sha256(body).digest()


def from_bytes(data):
    """A checkpoint with these weights, in fp32, as the network's and as its running mean."""
    body, digest = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise BadInput("the parts do not belong together, or a byte of them is wrong")
    start = 8 + int.from_bytes(body[:8], "little")
    about = json.loads(body[8:start])
    shapes = about.pop("tensors")
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    upper = np.frombuffer(zlib.decompress(body[start : len(body) - count]), np.uint8)
    lower = np.frombuffer(body, np.uint8, count, len(body) - count)
    numbers = np.stack([lower, upper], axis=1).reshape(-1).view("<f2").astype(np.float32)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    arrays = zip(shapes.items(), np.split(numbers, ends), strict=True)
    weights = {name: torch.from_numpy(a.reshape(shape).copy()) for (name, shape), a in arrays}
    about["config"]["ema"] = about["config"]["ema"][:1]
    return about | {"model": weights, "ema": weights, "more_emas": []}


def parts_in(folder):
    """{step: {number: path}} of the parts in a folder, and how many there must be of each step."""
    found, counts = {}, {}
    for path in sorted(Path(folder).glob("ema-*.bin")):
        if match := NAME.fullmatch(path.name):
            step, number, count = map(int, match.groups())
            found.setdefault(step, {})[number] = path
            counts[step] = count
    return found, counts


def split(checkpoint, folder, largest=LARGEST):
    """Write the running mean of a checkpoint into FOLDER in parts of at most `largest` bytes.

    Those of an earlier step are removed when these are whole. Returns their paths.
    """
    state = load_checkpoint(checkpoint, mapped=True)
    data = to_bytes(state)
    pieces = [data[i : i + largest] for i in range(0, len(data), largest)]
    paths = []
    for number, piece in enumerate(pieces):
        paths.append(Path(folder) / f"ema-{state['step']}-{number}-of-{len(pieces)}.bin")
        with atomic_write(paths[-1]) as temporary:
            temporary.write_bytes(piece)
    for path in Path(folder).glob("ema-*.bin"):
        if path not in paths:
            path.unlink()
    return paths


def join(folder):
    """The checkpoint of the latest step whose parts in FOLDER are all there; BadInput without."""
    found, counts = parts_in(folder)
    whole = [step for step, parts in found.items() if len(parts) == counts[step]]
    if not whole:
        had = ", ".join(path.name for parts in found.values() for path in parts.values()) or "none"
        raise BadInput(f"--join {folder}: expected all of ema-STEP-0-of-N.bin to N-1; found {had}")
    parts = found[max(whole)]
    return from_bytes(b"".join(parts[number].read_bytes() for number in sorted(parts)))


def join_into(folder, path):
    """Write join(folder) as a checkpoint, for --sample of ddpm_pixel.py and ddim.py."""
    state = join(folder)
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return state
