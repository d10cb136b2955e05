"""The bytes that the kernels move for the cases of `bench/kernels.py`, counted in the interpreter.

    TRITON_INTERPRET=1 python bench/traffic_table.py [--only group_norm] [--shape 4x4]

prints a line of JSON for each case and direction, without figures where there is no kernel.
`bench/kernels.py` runs this beside itself, because kernels are interpreted in one process and
compiled in another.

The interpreter is slow, so each launch is planned for the whole batch and then runs only its first
programs: those of the first sample, and in attention of its first head. Programs are numbered
sample after sample, head after head, and all do the same work: their ratios are those of the first.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # in place of bench/

import runtime  # noqa: E402, F401  sets how threads wait, before torch loads them

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from bench.measure import add_filters, chosen  # noqa: E402
from tests.cases.offline import TARGETS, arch_of_target, planned_for  # noqa: E402
from tests.cases.traffic import count_traffic  # noqa: E402


@contextlib.contextmanager
def first_programs(share):
    """Of each launch inside, run only the first programs: `share` of them."""
    start = interpreter.GridExecutor.__init__

    def shortened(self, function, names, grid, *rest, **more):
        first, *others = grid
        start(self, function, names, (round(first * share), *others), *rest, **more)

    interpreter.GridExecutor.__init__ = shortened
    try:
        yield
    finally:
        interpreter.GridExecutor.__init__ = start


def zeros(shape, dtype, device):
    return torch.zeros(shape, dtype=dtype, device=device)  # no memory until it is written


def count(case, backward):
    """The Traffic of a case's first programs."""
    inputs = case.inputs("cpu", zeros)
    with first_programs(1 / case.independent), count_traffic() as traffic:
        case.launch(inputs, backward)
    return traffic


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_filters(parser)
    parser.add_argument("--target", choices=TARGETS, default="sm_80", help="whose plan is followed")
    args = parser.parse_args()
    if not triton.knobs.runtime.interpret:
        parser.error("set TRITON_INTERPRET=1: bytes are counted in Triton's interpreter")
    torch.set_num_threads(1)
    arch = arch_of_target(args.target)
    with planned_for(arch):
        for case in chosen(args):
            for backward in case.directions:
                print(json.dumps(report(case, backward, arch)), flush=True)


def report(case, backward, arch):
    """What a line says: programs are those of the whole launches, of which a part was run."""
    counted = case.counted
    line = {"case": [case.operation, case.where, case.name], "backward": backward}
    if not case.has_kernel(backward, arch):
        return line
    traffic = count(counted, backward)
    return line | {
        "ratio": traffic.ratio,
        "sectors": traffic.sector_ratio,
        "floor": traffic.floor * counted.independent,
        "programs": [[name, grid[0] * counted.independent] for name, grid in traffic.launches],
        "faults": traffic.out_of_bounds + traffic.write_write + traffic.read_write,
    }


if __name__ == "__main__":
    main()
