"""CIFAR's pickles, read without numpy's own unpickling.

A batch is a dictionary of a uint8 array "data", a list "labels" and names. numpy rebuilds arrays
from a state that the file gives, and a state that lies makes it read memory at any address; here
only bytes, a shape and a type of whole numbers are taken from the file and compared.
"""

from runtime.commandline import BadInput
from runtime.pickle_steps import Kind, read_steps, shown

import io
import math
from dataclasses import dataclass

import numpy as np

BUILDS = {f"{numpy}.multiarray._reconstruct" for numpy in ("numpy.core", "numpy._core")}
FROM_BYTES = {f"{numpy}.numeric._frombuffer" for numpy in ("numpy.core", "numpy._core")}
ENCODE = "_codecs.encode"  # how Python 3 writes bytes for Python 2
INTEGERS = {f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)}
# 50 000 images in one file have three instructions for each of their names and labels, or fewer.
LONGEST = 500_000


@dataclass(slots=True)
class Dtype:
    """A type of whole numbers, as "u1"."""

    code: str


@dataclass(slots=True)
class Array:
    """An array that the file describes; `made` once its state is read."""

    made: np.ndarray | None = None


def described(name, arguments):
    """What stands for a call; BadInput for those that no batch has."""
    if name in BUILDS:
        return Array()
    match name, arguments:
        case "numpy.dtype", (str(code), _, _) if code in INTEGERS:
            return Dtype(code)
        case "numpy.dtype", (code, *_):
            raise BadInput(f"holds numbers of the type {shown(code)}, expected whole numbers")
        case "_codecs.encode", (str(text), "latin1"):
            return text.encode("latin1")
        case _ if name in FROM_BYTES:
            match arguments:
                case (bytes() | bytearray() as content, Dtype() as dtype, tuple(shape), order):
                    return Array(array_of(content, dtype, shape, order))
    raise BadInput(f"calls {shown(name)} in another way than CIFAR's files do")


def completed(value, state):
    """The state of an array or a type; BadInput for others."""
    match value, state:
        case Dtype(), (_, "|" | "<", None, None, None, -1, -1, 0):
            pass
        case Array(made=None), (_, tuple(shape), Dtype() as dtype, bool(fortran), content):
            content = content.encode("latin1") if isinstance(content, str) else content
            value.made = array_of(content, dtype, shape, "F" if fortran else "C")
        case _:
            raise BadInput(f"gives a {type(value).__name__} a state that CIFAR's files do not")


def array_of(content, dtype, shape, order):
    """These bytes as an array; BadInput unless they are as many as the shape says."""
    whole = all(type(n) is int and 0 <= n < 2**31 for n in shape) and len(shape) <= 4
    if not whole or not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise BadInput("has an array whose shape or content is none")
    if len(content) != math.prod(shape) * int(dtype.code[1]):
        raise BadInput(f"has {len(content)} bytes for an array of {shape} numbers: torn")
    return np.frombuffer(content, f"<{dtype.code}").reshape(shape, order=order)


NAMES = frozenset({*BUILDS, *FROM_BYTES, ENCODE, "numpy.ndarray", "numpy.dtype"})
BATCH = Kind("CIFAR-10 batch", NAMES, described, completed, LONGEST)


def read_batch(raw):
    """(data, labels), both arrays of whole numbers, of a batch's bytes.

    BadInput for what a batch does not hold, and for torn ones.
    """
    try:
        return _arrays(read_steps(io.BytesIO(raw), BATCH))
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # a torn pickle raises nearly anything
        raise BadInput(f"torn: {type(error).__name__}: {str(error)[:100]}") from None


def _arrays(batch):
    known = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    data, labels = (
        value.made if isinstance(value := known[name], Array) else value
        for name in ("data", "labels")
    )
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = np.array(labels, np.int64)
    if not all(isinstance(numbers, np.ndarray) for numbers in (data, labels)):
        raise BadInput('has no array "data" or no whole numbers as "labels"')
    return data, labels
