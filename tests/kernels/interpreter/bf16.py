"""bfloat16 as a GPU computes it, for Triton's interpreter. Importing this repairs the interpreter.

The interpreter of triton 3.7 keeps bfloat16 as the 16 bits of a numpy integer. Left alone it adds,
multiplies and compares those integers, feeds them to matrix products, and drops the low bits of a
float32 where a GPU rounds to nearest even. Here such values are widened to float32 before any
arithmetic and rounded back after it.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits):
    """uint16 bits of bfloat16 -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """float32 -> uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _like(result, dtype):
    """`result` in bfloat16 if it is a float32, and as it is if it is a comparison's boolean."""
    if result.data.dtype == np.float32:
        return TensorHandle(narrow(result.data), tl.bfloat16)
    return TensorHandle(result.data, dtype)


def _repair(name, make):
    setattr(InterpreterBuilder, name, make(getattr(InterpreterBuilder, name)))


def _cast(plain):
    def cast(self, source, to, *rounding):
        if to.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        if to.scalar == tl.float32 and _is_bf16(source):
            return _wide(source)
        return plain(self, _wide(source), to, *rounding) if to.scalar != tl.bfloat16 else source

    return cast


def _binary(plain):
    def binary(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return plain(self, left, right, operation)
        return _like(plain(self, _wide(left), _wide(right), operation), left.dtype.scalar)

    return binary


def _unary(plain):
    def unary(self, value, operation):
        if not _is_bf16(value):
            return plain(self, value, operation)
        return _like(plain(self, _wide(value), operation), value.dtype.scalar)

    return unary


def _ternary(plain):
    def ternary(self, first, second, third, operation):
        if operation is np.where or not _is_bf16(third):  # where() only picks: bits are as good
            return plain(self, first, second, third, operation)
        wide = plain(self, _wide(first), _wide(second), _wide(third), operation)
        return _like(wide, third.dtype.scalar)

    return ternary


def _dot(plain):
    def dot(self, left, right, accumulator, *precision):
        return plain(self, _wide(left), _wide(right), accumulator, *precision)

    return dot


def _fma(plain):
    def fma(self, x, y, z):
        if not _is_bf16(z):
            return plain(self, x, y, z)
        return _like(plain(self, _wide(x), _wide(y), _wide(z)), z.dtype.scalar)

    return fma


def _sum(plain):
    def total(self, value):
        if value.dtype.scalar != tl.bfloat16:
            return plain(self, value)
        wide = np.sum(widen(value.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(wide), value.dtype)

    return total


_repair("cast_impl", _cast)
_repair("create_fp_to_fp", _cast)
_repair("binary_op", _binary)
_repair("unary_op", _unary)
_repair("ternary_op", _ternary)
_repair("create_dot", _dot)
_repair("create_fma", _fma)
interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
