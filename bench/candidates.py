"""Tiles that a GPU may find better than those of the launch plans.

    for candidate in candidates(case, backward, arch):
        with candidate.taken():
            case.run(inputs)  # or its gradients: to be verified and timed

The first is always what the plan takes itself: what the others are measured against. Where another
one wins, its `name` says what to write into the table of kernels/attention.py ({(bytes, D up to):
{kernel: tile}}, HOPPER for sm_90) or what plan_tiles of kernels/group_norm_silu.py should give. All
of attention's candidates were compiled for sm_90 without spills.
"""

import contextlib
import dataclasses
import math

from kernels.group_norm_silu import Plan
from tests.cases.kernel_cases import ATTENTION, NORM, forget_launches

# {(kernel, D up to): (BLOCK_N queries, BLOCK_M keys, warps, stages)}, in 16 bits on sm_90, where
# an H200 found none of them faster than the table's by more than 3 %
ATTENTION_TILES = {
    ("forward", 32): [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
    ("dq", 32): [(128, 64, 8, 2), (128, 128, 8, 2)],
    ("dkdv", 32): [(64, 128, 8, 2)],
    ("forward", 64): [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2)],
    ("dq", 64): [(128, 64, 8, 2), (128, 128, 8, 2)],
    ("dkdv", 64): [(32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
    ("forward", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2)],
    ("dq", 128): [(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
    ("dkdv", 128): [(32, 64, 8, 2), (32, 128, 8, 2)],
    ("forward", 256): [(128, 64, 8, 2), (128, 64, 8, 1), (64, 32, 8, 2)],
    ("dq", 256): [(64, 32, 4, 2), (64, 16, 8, 2)],
    ("dkdv", 256): [(16, 64, 8, 2)],
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tile for one kernel of attention, or for one direction of group norm.

    kernel: "forward", "dq" or "dkdv"; of group norm "forward" or "backward".
    tile: as attention's `plan` gives it, or a Plan of group norm.
    """

    kernel: str
    tile: tuple

    @property
    def name(self):
        if isinstance(self.tile, Plan):
            found = ", ".join(f"{name}={n}" for name, n in self.tile._asdict().items())
            return f"{self.kernel}: {found}"
        return f'"{self.kernel}": {self.tile}'

    @contextlib.contextmanager
    def taken(self):
        """Inside, launches are planned anew, and this kernel has this tile at any shape."""
        name = "plan_tiles" if isinstance(self.tile, Plan) else "plan"
        module = NORM if name == "plan_tiles" else ATTENTION
        plan = getattr(module, name)

        def instead(*of):
            kernel = ("forward", "backward")[of[-1]] if name == "plan_tiles" else of[0]
            return self.tile if kernel == self.kernel else plan(*of)

        setattr(module, name, instead)
        forget_launches()
        try:
            yield
        finally:
            setattr(module, name, plan)
            forget_launches()


def candidates(case, backward, arch):
    """The Candidates for a case (of tests/cases/kernel_cases.py), kernel by kernel.

    Those of the plan come first. None where the case runs no kernel, or there is nothing to choose.
    backward: whether for its gradients. arch: as dispatch.arch_of tells it, 90 of sm_90.
    """
    if case.operation not in ("attention", "group_norm") or not case.has_kernel(backward, arch):
        return []
    if case.operation == "group_norm":
        kernel = "backward" if backward else "forward"
        return [Candidate(kernel, plan) for plan in _plans(case, backward)]
    found, itemsize = [], case.dtype.itemsize
    for kernel in ("dq", "dkdv") if backward else ("forward",):
        tiles = [ATTENTION.plan(kernel, case.dim, itemsize, arch)]
        if arch == 90 and itemsize == 2:
            row = min(largest for _, largest in ATTENTION_TILES if case.dim <= largest)
            tiles += ATTENTION_TILES[kernel, row]
        found += [Candidate(kernel, tile) for tile in dict.fromkeys(tiles)]
    return found


def _plans(case, backward):
    """The plan's own Plan for a group norm; fewer and more warps, smaller tiles, and two passes."""
    shape = case.inputs("meta")["x"].shape
    positions, size = math.prod(shape[2:]), case.channels // case.groups
    innermost = case.inputs("meta")["x"].stride(1) == 1
    itemsize = case.dtype.itemsize
    plan = NORM.plan_tiles(
        shape[0], case.channels, positions, case.groups, itemsize, innermost, backward
    )

    def power_of_2(n):
        return 1 << (n - 1).bit_length()

    def groups_of(channels):
        """Neighbouring groups that have at least so many channels together."""
        groups = plan.groups
        while groups * size < channels and case.groups % (2 * groups) == 0:
            groups *= 2
        return groups

    def two_passes(numbers, warps, channels=32):
        groups = groups_of(channels)
        width = power_of_2(groups * size)
        rows = max(1, numbers // width)
        tiles = -(-positions // rows)
        chunks = min(tiles, 32, max(1, -(-4 * 132 // (shape[0] * (case.groups // groups)))))
        chunk = -(-tiles // chunks) * rows
        return Plan(groups, width, rows, warps, -(-positions // chunk), chunk)

    def one_pass(channels):
        groups = groups_of(channels)
        width, rows = power_of_2(groups * size), power_of_2(positions)
        return Plan(groups, width, rows, max(1, min(16, width * rows // 1024)), 0, 0)

    plans = [plan, plan._replace(warps=max(1, plan.warps // 2))]
    plans += [plan._replace(warps=min(16, 2 * plan.warps))]
    if plan.chunks == 0 and plan.groups % 2 == 0:  # two programs in place of one
        half = {"groups": plan.groups // 2, "width": plan.width // 2}
        plans += [plan._replace(**half, warps=max(1, plan.warps // 2))]
    largest = 16384 if backward else 32768
    wider = [one_pass(channels) for channels in (32, 64, 128)]
    plans += [p for p in wider if p.width * p.rows <= largest]
    if plan.width * positions >= 8192:
        plans += [two_passes(4096, 8), two_passes(8192, 16)]
        plans += [two_passes(4096, 8, 64), two_passes(8192, 16, 128), two_passes(4096, 4, 128)]
        plans += [two_passes(4096, 8, 128)]
    return list(dict.fromkeys(plans))
