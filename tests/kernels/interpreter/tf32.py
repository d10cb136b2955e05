"""float32 matrix products as a GPU's tensor cores compute them, for Triton's interpreter.

A tensor core reads float32 operands as tf32: 8 bits of exponent, 10 of mantissa, the other 13
ignored. With input_precision="tf32" Triton hands it the operands as they are. With "tf32x3" Triton
cuts each in two, a = big + small with big the nearest tf32 and small = a - big, and adds three
products

    a · b  ~  small_a · big_b + big_a · small_b + big_a · big_b

where a NaN in the first two counts as zero, so that an infinite big (whose small is inf - inf) does
no harm; what is lost is small_a · small_b, and the bits of a small beyond its own ten. The
interpreter knows nothing of this and multiplies in full float32 whatever it is told.

Not emulated: a tensor core also drops bits when it aligns the terms of a sum.
"""

import contextlib

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TF32, TF32X3 = ir.INPUT_PRECISION.TF32, ir.INPUT_PRECISION.TF32x3
KEPT = np.uint32(0xFFFFE000)  # sign, exponent, 10 bits of mantissa


def truncated(values):
    """float32 -> what a tensor core reads of it."""
    return _keep(values, np.uint32(0))


def nearest(values):
    """float32 -> the nearest tf32, ties away from zero (PTX's cvt.rna.tf32.f32)."""
    return _keep(values, np.uint32(0x1000))


def _keep(values, half):
    values = np.ascontiguousarray(values, dtype=np.float32)
    kept = ((values.view(np.uint32) + half) & KEPT).view(np.float32)
    return np.where(np.isfinite(values), kept, values)


def multiply(a, b):
    """The product of float32 matrices for "tf32"."""
    return np.matmul(truncated(a), truncated(b), dtype=np.float32)


def multiply_x3(a, b):
    """The product of float32 matrices for "tf32x3"."""
    big_a, big_b = nearest(a), nearest(b)
    corrections = multiply(a - big_a, big_b) + multiply(big_a, b - big_b)
    return np.where(np.isnan(corrections), np.float32(0), corrections) + multiply(big_a, big_b)


@contextlib.contextmanager
def tensor_cores(instead=None):
    """Inside, float32 tl.dot computes what its input_precision says.

    instead: {precision: precision} to compute another one than the kernel asks for. Gives a list
    to which the precision of every float32 product is added.
    """
    plain, seen = InterpreterBuilder.create_dot, []

    def dot(self, a, b, accumulator, precision, *rest):
        if a.dtype.scalar != tl.float32:
            return plain(self, a, b, accumulator, precision, *rest)
        seen.append(precision)
        precision = (instead or {}).get(precision, precision)
        if precision not in (TF32, TF32X3):
            return plain(self, a, b, accumulator, precision, *rest)
        with np.errstate(invalid="ignore"):  # inf - inf
            product = (multiply if precision == TF32 else multiply_x3)(a.data, b.data)
            return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    try:
        yield seen
    finally:
        InterpreterBuilder.create_dot = plain
