"""The noise of kernels/philox.py once more, in Python integers and float64: what tests compare to.

The uniforms are float32 by definition; everything after them is float64 here.
"""

import functools
import math

import numpy as np
import torch

FULL = 0xFFFFFFFF

# counter, key, answer: the philox4x32-10 lines of Random123's known-answer vectors
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([FULL] * 4, [FULL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_ints(counter, key):
    """Philox4x32-10 as its paper writes it, on Python ints."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def box_muller_float64(u1, u2):
    """Two uniforms, as Python floats, to two normals."""
    radius = math.sqrt(-2 * math.log(max(u1, float(np.float32(1e-7)))))
    return [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]


@functools.cache
def normals_float64(seed, step, count):
    """Numbers 0 .. count-1 of a sample: float64 (count,)."""
    z = []
    for block in range(-(-count // 4)):
        words = philox_ints([block, step % 2**32, 0, 0], [seed % 2**32, seed // 2**32 % 2**32])
        folded = np.float32([min(word, FULL - word) for word in words])
        u = (folded * np.float32(4.6566127342e-10)).tolist()
        z += box_muller_float64(*u[:2]) + box_muller_float64(*u[2:])
    return torch.tensor(z[:count], dtype=torch.float64)


def gaussian_float64(shape, seeds, step):
    """What `gaussian(shape, seeds, step, ...)` is, in float64."""
    count = math.prod(shape[1:])
    return torch.stack([normals_float64(seed, step, count) for seed in seeds.tolist()]).view(shape)
