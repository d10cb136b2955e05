"""Pickles of NVIDIA's EDM code, read without running anything in them.

Such a file is a pickle of Python objects, each with the source code of its class, which Python's
own reader would execute. Here runtime.pickle_steps goes through its instructions, and nothing that
the file names is looked up, imported or called:

    torch_utils.persistence._reconstruct_persistent_obj    becomes a Module: class name, attributes
    torch._utils._rebuild_tensor_v2                        a Tensor: a shape, and where its numbers
    torch.storage._load_from_bytes                         are; a Storage: the bytes they lie in
    a numpy number of dtype float64                        a float
    a dictionary of any kind                               a dict

Any other name is refused, and so is any instruction, length or shape that a written network does
not have. A file takes a few times its own size in memory, and 100 MB, at most.
"""

from runtime.commandline import BadInput
from runtime.pickle_steps import Kind, Name, read_steps, shown

import enum
import io
import math
import mmap
import struct
from dataclasses import dataclass

import numpy as np
import torch


class Known(str, enum.Enum):
    """The names that the pickle of a network may hold."""

    MODULE = "torch_utils.persistence._reconstruct_persistent_obj"
    MODULES = "torch.nn.modules.container.ModuleDict"
    PARAMETER = "torch._utils._rebuild_parameter"
    TENSOR = "torch._utils._rebuild_tensor_v2"
    STORAGE = "torch.storage._load_from_bytes"
    ORDERED = "collections.OrderedDict"
    EASY = "dnnlib.util.EasyDict"
    DTYPE = "numpy.dtype"
    SCALAR = "numpy.core.multiarray.scalar"
    SCALAR_2 = "numpy._core.multiarray.scalar"  # as numpy 2 writes it


FLOATS = "torch.FloatStorage"  # the only name in the pickle of a storage: all weights are float32
MAGIC, LEGACY = 0x1950A86A20F9469CFC6C, 1001  # torch.save, before it wrote zip files


@dataclass(slots=True)
class Dtype:
    """numpy's float64, the only one that is read."""


@dataclass(slots=True)
class Storage:
    """numel float32 numbers, at `start` of content."""

    content: bytes
    start: int
    numel: int


@dataclass(slots=True)
class Tensor:
    """Consecutive numbers of a storage, from number `offset` on."""

    storage: Storage
    offset: int
    shape: tuple

    def read(self):
        """A copy of them, a float32 torch.Tensor."""
        start, count = self.storage.start + 4 * self.offset, math.prod(self.shape)
        numbers = np.frombuffer(self.storage.content, "<f4", count, start)
        return torch.from_numpy(numbers.reshape(self.shape).astype(np.float32))


@dataclass(slots=True)
class Module:
    """An object that the file describes: the name of its class, and its attributes."""

    kind: str
    state: dict | None = None


def read_pickle(path):
    """What the pickle `path` describes, in plain containers and the above.

    BadInput for names that no network of NVIDIA's has; a torn file raises nearly anything.
    """
    # Mapped, because a length beyond the end of a mapped file reserves no memory.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        return read_steps(stream, NETWORK)


def described(name, arguments):
    """What stands for the result of a function of Known; BadInput for other arguments."""
    match name, arguments:
        case Known.MODULE, ({"type": "class", "class_name": str(kind), "state": dict(state)},):
            return Module(kind, state)
        case Known.MODULES, ():
            return Module("ModuleDict")
        case Known.PARAMETER, (Tensor() as tensor, _, _):
            return tensor
        case Known.TENSOR, (Storage() as storage, offset, tuple(shape), tuple(stride), _, _):
            return tensor_of(storage, offset, shape, stride)
        case Known.STORAGE, (bytes(content),):
            return storage_of(content)
        case ((Known.ORDERED | Known.EASY), ()):
            return {}
        case Known.DTYPE, ("f8", _, _):
            return Dtype()
        case Known.DTYPE, (str(kind), _, _):
            raise BadInput(f"holds numpy data of dtype {shown(kind)}, expected 'f8' only")
        case ((Known.SCALAR | Known.SCALAR_2), (Dtype(), bytes(content))):
            return struct.unpack("<d", content)[0]
    raise BadInput(f"calls {name} in another way than an EDM network does")


def completed(value, state):
    """A value of described() after the state that follows it; BadInput for one that has none."""
    match value, state:
        case Module(kind="ModuleDict", state=None), dict():
            value.state = state
        case dict(), dict() if not state:
            pass  # EasyDict keeps its attributes as items
        case Dtype(), (_, "<", None, None, None, *_):
            pass
        case _:
            raise BadInput(f"gives a {type(value).__name__} a state, which no EDM network does")


def storage_of(content):
    """The Storage in what torch.save wrote of one: five pickles, a length, the numbers."""
    stream = io.BytesIO(content)
    parts = [read_steps(stream, STORAGE) for _ in range(5)]
    match parts:
        case [
            mark,
            version,
            {"little_endian": True},
            ("storage", Name(), str(key), str(), int(numel), None),
            [listed],
        ] if (mark, version, listed) == (MAGIC, LEGACY, key):
            start = stream.tell() + 8
        case _:
            raise BadInput("has a storage that torch.save did not write")
    (written,) = struct.unpack_from("<q", content, start - 8)
    if not 4 * numel == 4 * written == len(content) - start:
        raise BadInput(
            f"has a storage that says {shown(str(numel))} and {written} numbers and holds "
            f"{len(content) - start} bytes: torn"
        )
    return Storage(content, start, numel)


def tensor_of(storage, offset, shape, stride):
    """A Tensor in a Storage; BadInput unless it lies in it, its numbers one after the other."""
    numbers = (offset, *shape[:5], *stride[:5])
    small = all(type(n) is int and 0 <= n < 2**31 for n in numbers)
    if not small or not len(shape) == len(stride) <= 4:
        raise BadInput("has a tensor of negative or too large shape, strides or offset")
    step = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != step:
            raise BadInput(f"has a tensor of shape {shape} with strides {stride}: not contiguous")
        step *= n
    if offset + step > storage.numel:
        raise BadInput(
            f"has a tensor of {step} numbers from number {offset} on in a storage of "
            f"{storage.numel}"
        )
    return Tensor(storage, offset, shape)


# The published networks have 50 000 to 70 000 instructions, a storage has about 60.
NAMES = frozenset(known.value for known in Known)
NETWORK = Kind("EDM network", NAMES, described, completed, longest=300_000)
STORAGE = Kind("EDM network", frozenset({FLOATS}), described, completed, longest=100)
