"""Noise made inside a kernel: known answers, float64, its PyTorch twin, and statistics."""

import itertools

import numpy as np
import pytest
import torch
from noise_math import KNOWN_ANSWERS, box_muller_float64, normals_float64

from kernels import gaussian, philox
from kernels.dispatch import tl, triton
from kernels.philox import _box_muller_kernel, four_normals, one_normal

SEEDS = [0, -1, 17, 2**63 - 1, -(2**63), 2**32, -(2**40) + 5]
MILLION = 1 << 20


@triton.jit
def words_of(counter, seed, words, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    zero = (lane * 0).to(tl.uint32)
    c0, c1 = zero + tl.load(counter).to(tl.uint32), zero + tl.load(counter + 1).to(tl.uint32)
    c2, c3 = zero + tl.load(counter + 2).to(tl.uint32), zero + tl.load(counter + 3).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(words + lane * 4, w0.to(tl.int64))
    tl.store(words + lane * 4 + 1, w1.to(tl.int64))
    tl.store(words + lane * 4 + 2, w2.to(tl.int64))
    tl.store(words + lane * 4 + 3, w3.to(tl.int64))


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    seed = np.array([key[0] + (key[1] << 32)], np.uint64).view(np.int64)
    words = torch.empty(16, 4, dtype=torch.int64)
    words_of[(1,)](torch.tensor(counter), torch.from_numpy(seed), words, LANES=16)
    assert (words == torch.tensor(answer)).all()


@triton.jit(do_not_specialize=["step"])
def noise_by_fours(seeds, z, step, BLOCKS: tl.constexpr):
    """Sample program_id(0), blocks program_id(1)·BLOCKS onwards; z is (B, blocks, 4)."""
    sample = tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    z0, z1, z2, z3 = four_normals(tl.load(seeds + sample), step, block)
    at = z + (sample * tl.num_programs(1) * BLOCKS + block) * 4
    tl.store(at, z0)
    tl.store(at + 1, z1)
    tl.store(at + 2, z2)
    tl.store(at + 3, z3)


@triton.jit(do_not_specialize=["step"])
def noise_by_ones(seeds, z, step, PLACES: tl.constexpr):
    sample, place = tl.program_id(0), tl.arange(0, PLACES)
    tl.store(z + sample * PLACES + place, one_normal(tl.load(seeds + sample), step, place))


def by_fours(seeds, step, count, programs=1):
    seeds, z = torch.tensor(seeds), torch.empty(len(seeds), count)
    noise_by_fours[(len(seeds), programs)](seeds, z, step, BLOCKS=count // 4 // programs)
    return z


def by_ones(seeds, step, count):
    seeds, z = torch.tensor(seeds), torch.empty(len(seeds), count)
    noise_by_ones[(len(seeds),)](seeds, z, step, PLACES=count)
    return z


@pytest.mark.parametrize("step", [-1, 0, 1, 999, 2**31 - 1])
def test_equals_python_ints_and_float64(step):
    expected = torch.stack([normals_float64(seed, step, 128) for seed in SEEDS])
    z = by_fours(SEEDS, step, 128)
    radius = expected.norm(dim=1, keepdim=True)
    assert ((z - expected).abs() <= 2**-22 * radius).all()  # two units in the last place
    assert torch.equal(by_ones(SEEDS, step, 128), z)  # bit for bit: layouts use one or the other


@pytest.fixture(scope="module")
def million():
    return by_fours([12], 7, MILLION, programs=8)


def test_kernel_and_twin_make_the_same_million_numbers(million):
    assert (million - gaussian((1, MILLION), torch.tensor([12]), 7, "cpu")).abs().max() < 2e-6


def test_statistics_of_a_million(million):
    """Each within five standard errors; the variance of z² is 2, and of z⁴ 96."""
    z, n = million.double().flatten(), MILLION
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert all(abs((z[:-lag] * z[lag:]).mean()) < 5 / n**0.5 for lag in (1, 2, 3, 4))


def test_seeds_and_steps_are_unrelated_streams():
    n = 1 << 14
    z = torch.cat([by_fours([0, 1, 2**32], step, n) for step in (0, 1, 2)]).double()
    correlation = (z @ z.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / n**0.5


@triton.jit
def pairs_of(u1, u2, z, PAIRS: tl.constexpr):
    i = tl.arange(0, PAIRS)
    first, second = _box_muller_kernel(tl.load(u1 + i), tl.load(u2 + i))
    tl.store(z + i * 2, first)
    tl.store(z + i * 2 + 1, second)


def test_box_muller_at_the_edges_of_its_quarter_turns():
    """Angles at and around each eighth of a turn, where the polynomials change places."""
    eighths = np.float32([k / 8 for k in range(9)])
    angles = [np.nextafter(eighths, np.float32(side)) for side in (-1, 2)]
    angles = np.clip(np.concatenate([eighths, *angles, np.linspace(0, 1, 101)]), 0, 1)
    radii = np.float32([0, 1e-8, 1e-7, 2e-7, 1e-3, 0.5, 0.99, 1 - 2**-24, 1])
    pairs = np.float32(list(itertools.product(radii, angles)))
    u = torch.full((2, 2048), 0.5)
    u[:, : len(pairs)] = torch.from_numpy(pairs).T
    z = torch.empty(2048, 2)
    pairs_of[(1,)](u[0], u[1], z, PAIRS=2048)
    expected = torch.tensor([box_muller_float64(*pair) for pair in u.T.tolist()])
    radius = expected.norm(dim=1, keepdim=True)
    assert ((z - expected).abs() <= 2**-22 * radius).all()  # two units in the last place


@pytest.mark.parametrize("step", [-1, 0, 999, 2**31, 2**32 - 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 3, 32, 32), (2, 4097)], ids=str)
def test_the_kernel_of_gaussian_is_its_twin(shape, step):
    """Counts that no block of four and no program divides; a launch that is remembered, too."""
    seeds = torch.tensor(SEEDS[: shape[0]])
    for again in range(2):
        found = philox._launch(torch.Size(shape), seeds + again, step)
        assert found.shape == shape and found.dtype == torch.float32 and found.is_contiguous()
        expected = gaussian(shape, seeds + again, step, "cpu")
        assert (found - expected).abs().max() < 4e-6
