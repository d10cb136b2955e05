"""gaussian: known answers, an independent Philox, triton's own, and the statistics of a normal."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from noise_math import FULL, KNOWN_ANSWERS, normals_float64

from kernels import gaussian
from kernels.philox import _philox


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    words = [torch.tensor([[word]] * 9) for word in (*counter, *key)]  # vector lanes and a tail
    assert all((a == b).all() for a, b in zip(_philox(*words), answer, strict=True))


@pytest.mark.parametrize("step", [-1, 0, 3, 2**32 - 2])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 2), (1, 3, 7), (4, 4)])
def test_equals_python_int_philox(shape, step):
    seeds = torch.tensor([0, -1, 17, 2**63 - 1, -(2**63), 2**32, -(2**40) + 5])
    z = gaussian((len(seeds), *shape), seeds, step, "cpu")
    assert z.dtype == torch.float32 and z.is_contiguous()
    for seed, sample in zip(seeds.tolist(), z, strict=True):
        expected = normals_float64(seed, step, math.prod(shape)).view(shape)
        assert (sample - expected).abs().max() < 2e-6


TRITON_NOISE = """
import sys
import numpy as np, torch, triton, triton.language as tl

@triton.jit
def kernel(seeds, words, normals, step, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    block = tl.arange(0, BLOCK).to(tl.uint32)
    zero = block * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seeds + b), block, zero + step.to(tl.uint32), zero, zero)
    z0, z1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(r0), tl.uint_to_uniform_float(r1))
    z2, z3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(r2), tl.uint_to_uniform_float(r3))
    at = (b * BLOCK + tl.arange(0, BLOCK)) * 4
    tl.store(words + at, r0.to(tl.int32, bitcast=True))
    tl.store(words + at + 1, r1.to(tl.int32, bitcast=True))
    tl.store(words + at + 2, r2.to(tl.int32, bitcast=True))
    tl.store(words + at + 3, r3.to(tl.int32, bitcast=True))
    tl.store(normals + at, z0)
    tl.store(normals + at + 1, z1)
    tl.store(normals + at + 2, z2)
    tl.store(normals + at + 3, z3)

seeds = torch.tensor([0, -1, 17, 2**63 - 1, -(2**63)])
words = torch.empty(5, 64, 4, dtype=torch.int32)
normals = torch.empty(5, 64, 4)
kernel[(5,)](seeds, words, normals, 12345, BLOCK=64)
np.savez(sys.argv[1], seeds=seeds, words=words, normals=normals)
"""


def test_equals_triton_in_its_interpreter(tmp_path):
    pytest.importorskip("triton")
    script, result = tmp_path / "triton_noise.py", tmp_path / "result.npz"
    script.write_text(TRITON_NOISE)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, script, result], check=True, env=environment, timeout=300)
    triton = np.load(result)
    seeds = torch.from_numpy(triton["seeds"])
    ours = _philox(
        torch.arange(64)[None], 12345, 0, 0, seeds[:, None] & FULL, (seeds[:, None] >> 32) & FULL
    )
    assert np.array_equal(torch.stack(ours, -1), triton["words"].view(np.uint32))  # bit for bit
    z = gaussian((5, 256), seeds, 12345, "cpu").numpy()
    np.testing.assert_allclose(z, triton["normals"].reshape(5, 256), rtol=0, atol=2e-6)


@pytest.mark.parametrize("samples", [1, 1000])
def test_statistics_of_a_million(samples):
    n = 1_000_000
    z = gaussian((samples, n // samples), torch.arange(samples), 5, "cpu").double().flatten()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert all(abs((z[:-lag] * z[lag:]).mean()) < 4 / n**0.5 for lag in (1, 2, 3, 4))
    probability = 0.5 * (1 + torch.erf(z.sort().values / 2**0.5))
    distance = (probability - torch.arange(1, n + 1) / n).abs().max()  # Kolmogorov-Smirnov
    assert distance < 1.95 / n**0.5  # exceeded once in a thousand


def test_streams_of_seeds_and_steps_are_unrelated():
    n = 100_000
    streams = [(seed, step) for seed in (0, 1, 2**32) for step in (-1, 0, 1)]
    z = torch.cat([gaussian((1, n), torch.tensor([seed]), step, "cpu") for seed, step in streams])
    correlation = z.double() @ z.double().T / n - torch.eye(len(streams))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / n**0.5


def test_a_sample_depends_on_its_seed_alone():
    seeds = torch.tensor([5, 17, -3, 17])
    batch = gaussian((4, 3, 5, 7), seeds, 2, "cpu")
    for i in range(4):
        assert torch.equal(gaussian((1, 3, 5, 7), seeds[i : i + 1], 2, "cpu")[0], batch[i])
    assert torch.equal(batch[1], batch[3])
    assert torch.equal(gaussian((4, 105), seeds, 2, "cpu").view(4, 3, 5, 7), batch)
    assert gaussian((0, 3, 5, 7), seeds[:0], 2, "cpu").shape == (0, 3, 5, 7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_noise_is_the_same():
    seeds = torch.tensor([5, 17, -(2**50)])
    compiled = torch.compile(lambda seeds: gaussian((3, 3, 5, 7), seeds, 2, "cpu"), fullgraph=True)
    assert (compiled(seeds) - gaussian((3, 3, 5, 7), seeds, 2, "cpu")).abs().max() < 2e-6


def test_bad_arguments_are_named():
    seeds = torch.arange(2)
    for match, call in {
        "shape must": lambda: gaussian((), seeds, 0, "cpu"),
        "seeds must": lambda: gaussian((3, 4), seeds, 0, "cpu"),
        "seeds must be int64": lambda: gaussian((2, 4), seeds.int(), 0, "cpu"),
        "step must": lambda: gaussian((2, 4), seeds, -2, "cpu"),
        "got 4294967295": lambda: gaussian((2, 4), seeds, 2**32 - 1, "cpu"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
