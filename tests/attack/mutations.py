"""Files a little wrong: bytes of any file, and values of JSON and of checkpoints."""

import copy
import json

import numpy as np
import torch

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e300, float("nan")),
    *("", "x", "linear", "\x1b[31m", "ü" * 300, [], [1], [None], [[]], ["a", "b"], {}, {"a": 1}),
    *([2**40], [0, 0], [-1], [1e9] * 3),
    *(10**400, {"1" * 5000: 1}, {"facts": 3}),  # more than a float holds, or int() reads
)


def of_bytes(raw, rng):
    """raw with one to four changes: bits, bytes, sizes, parts left out, doubled or moved."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 5)):
        if not raw:
            break
        a, b = sorted(rng.integers(len(raw) + 1, size=2).tolist())
        place, length = min(a, len(raw) - 1), int(rng.integers(1, 9))
        match rng.integers(9):
            case 0 | 1:
                raw[place] ^= 1 << int(rng.integers(8))
            case 2 | 3:
                raw[place] = int(rng.choice(INTERESTING))
            case 4:
                number = int(rng.choice([0, 1, -1, 2**31 - 1, -(2**31)]))
                raw[place : place + 4] = number.to_bytes(
                    4, str(rng.choice(["little", "big"])), signed=True
                )
            case 5:
                raw[place : place + length] = rng.bytes(length)
            case 6:
                del raw[place : place + length]
            case 7:
                raw[place:place] = raw[a : min(b, a + 64)]
            case 8:
                del raw[a:]
    return bytes(raw)


def of_value(value, rng):
    """A copy of nested dictionaries and lists with one to three values, keys or lengths changed."""
    made = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        made = _changed(made, rng)
    return made


def _changed(value, rng, depth=0):
    inner = isinstance(value, dict | list | tuple) and len(value)
    if not inner or rng.random() < 0.1 * (depth > 0):
        return _other(value, rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[int(rng.integers(len(keys)))]
    kind, value = type(value), value if isinstance(value, dict) else list(value)
    match rng.integers(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[str(rng.choice(["x", "", "_class_name", f"{key}x"]))] = value[key]
        case 1:
            value.append(value[key])
        case _:
            value[key] = _changed(value[key], rng, depth + 1)
    return tuple(value) if kind is tuple else value


def _other(value, rng):
    """Another value: of VALUES, near this one, or a tensor of another shape, type or content."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        match rng.integers(6):
            case 0:
                return value.reshape(-1)
            case 1:
                return value[None]
            case 2:
                return value[:0] if value.ndim else value
            case 3:
                return value.double() if value.is_floating_point() else value.float()
            case 4:
                return value * float("nan") if value.is_floating_point() else -value
            case 5:
                return value.repeat([2] + [1] * (value.ndim - 1)) if value.ndim else value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        near = [-value, value + 1, value - 1, 2 * value, value // 2, str(value)]
        near += [value / 2, float(value)] if abs(value) < 2**1000 else []
        return near[int(rng.integers(len(near)))]
    return copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])


def of_json(raw, rng):
    """The bytes of a JSON file, changed as values, or in a third of the cases as bytes."""
    if rng.random() < 1 / 3:
        return of_bytes(raw, rng)
    return json.dumps(of_value(json.loads(raw), rng)).encode()


def generator(name, seed):
    """numpy's Generator for a reader's name and a number."""
    return np.random.default_rng([seed, *name.encode()])
