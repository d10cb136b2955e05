"""bench/candidates.py: tiles to choose from are compiled, and taken where they are said to be."""

import importlib.util

import pytest
import torch

from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("compiling needs triton, not interpreting", allow_module_level=True)

from bench.candidates import ATTENTION_TILES, candidates
from tests.cases.kernel_cases import CASES, PUBLIC, Attention, GroupNorm, Sampling
from tests.cases.offline import compiled_for, inspect_kernel

CIFAR = GroupNorm("here", 4, 128, 32)
TWO_PASSES = GroupNorm("here", 4, 128, 64)


def compiled(case, backward, candidate):
    inputs = case.inputs("cpu", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    with candidate.taken(), compiled_for("sm_90") as launches:
        case.launch(inputs, backward)
    return launches


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "case", [*CASES, *PUBLIC], ids=lambda case: f"{case.operation} {case.name}"
)
def test_the_first_is_the_plans_own(case, backward):
    found = candidates(case, backward, 90)
    if isinstance(case, Sampling) or not case.has_kernel(backward, 90):
        assert found == []
        return
    assert len(set(found)) == len(found)
    kernels = ["dq", "dkdv"] if isinstance(case, Attention) and backward else [found[0].kernel]
    assert list(dict.fromkeys(candidate.kernel for candidate in found)) == kernels
    for candidate in found:
        assert all(str(number) in candidate.name for number in candidate.tile)


@pytest.mark.parametrize("case", [CIFAR, TWO_PASSES], ids=lambda case: case.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_plan_of_group_norm_is_taken(case, backward):
    own, *others = candidates(case, backward, 90)
    assert others
    for candidate in (own, *others):
        last = compiled(case, backward, candidate)[-1]
        plan = candidate.tile
        assert last.constants["num_warps"] == plan.warps and last.constants["ROWS"] == plan.rows
        assert last.constants["GROUPS"] == plan.groups and last.constants["WIDTH"] == plan.width
        assert plan.width >= plan.groups * last.constants["SIZE"]
        assert last.constants["CHUNKS"] == plan.chunks
        assert plan.chunks == 0 or (plan.chunk % plan.rows == 0 and plan.chunks <= 32)
    first = compiled(case, backward, own)
    again = case.inputs("cpu", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    with compiled_for("sm_90") as launches:  # outside, the plan's own is back
        case.launch(again, backward)
    assert [launch.constants for launch in launches] == [launch.constants for launch in first]


@pytest.mark.parametrize("kernel, dim", [("forward", 32), ("dq", 64), ("dkdv", 128)])
def test_a_tile_of_attention_is_taken_and_spills_nothing(kernel, dim):
    check(kernel, dim, [1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel, dim", ATTENTION_TILES)
def test_every_tile_of_attention(kernel, dim):
    check(kernel, dim, range(len(ATTENTION_TILES[kernel, dim])))


def check(kernel, dim, which):
    case, backward = Attention("here", 2, 2, 256, dim), kernel != "forward"
    mine = [found for found in candidates(case, backward, 90) if found.kernel == kernel]
    for candidate in (mine[1 + number] for number in which):
        (launch,) = (
            found
            for found in compiled(case, backward, candidate)
            if found.name == f"_{kernel}_kernel"
        )
        constants = launch.constants
        tile = (constants["BLOCK_N"], constants["BLOCK_M"], constants["num_warps"])
        assert (*tile, constants["num_stages"]) == candidate.tile
        report = inspect_kernel(launch.kernel)
        assert report.spill_bytes == 0 and report.shared <= 227 * 1024, report
