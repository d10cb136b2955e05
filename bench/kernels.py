"""One table of the kernels at the shapes that the chapters use.

    python bench/kernels.py [--only group_norm] [--shape 16x16] [--markdown]
    python bench/kernels.py --offline [--targets sm_90]

On a GPU: verifies each kernel against float64, then times it in turns with its PyTorch reference,
with PyTorch's own operations ("plain"), and with torch.compile of those. A result further from
float64 than its bound has its error printed in place of a time, and the exit status is 1. Times are
of a call from Python with the L2 cache emptied before it: the smallest shapes measure how fast work
is launched. Bandwidth counts every input read once and every output written once, as a share of
what copying a gigabyte reaches on the same GPU.

Without a GPU (or with --offline) nothing is timed. The kernels are compiled through their real
launch code, and the table tells what came out: registers, spilled bytes, shared memory, the share
of a multiprocessor's warps that fit, matrix instructions, widths of loads and stores in bits. Bytes
are counted in Triton's interpreter, by `bench/traffic_table.py`.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the package of its name

import runtime  # noqa: E402, F401  sets how threads wait, before torch loads them

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench import measure  # noqa: E402
from bench.measure import add_filters, chosen  # noqa: E402
from tests.cases import verify  # noqa: E402

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
OFFLINE = {  # heading: width
    "shape": 26,
    "pass": 4,
    "kernel": 21,
    "target": 6,
    "regs": 4,
    "spill B": 7,
    "KiB": 5,
    "occ %": 5,
    "mma": 6,
    "loads": 16,
    "stores": 10,
    "bytes÷floor": 11,
    "sectors": 7,
    "eager ops÷floor": 15,
}
TIMED = {
    "shape": 26,
    "pass": 4,
    "kernel µs": 9,
    "reference": 9,
    "plain": 9,
    "compiled": 9,
    "×plain": 6,
    "×compiled": 9,
    "MB": 7,
    "GB/s": 6,
    "copy %": 6,
    "TFLOP/s": 7,
    "error÷bound": 11,
}
LEFT = ("shape", "pass", "kernel", "target", "loads", "stores")


class Table:
    """Prints rows as they come, under a title for each operation and chapter."""

    def __init__(self, widths, markdown, out):
        self.widths, self.markdown, self.out, self.title = widths, markdown, out, None

    def line(self, text):
        tqdm.write(text.rstrip(), file=self.out)
        self.out.flush()

    def row(self, title, cells):
        """cells: {heading: text}; those left out are empty."""
        if title != self.title:
            self.title = title
            self.line(f"\n**{title}**" if self.markdown else f"\n{title}")
            if self.markdown:
                self.line("")
            self._print({name: name for name in self.widths})
            if self.markdown:
                self.line("|".join(["", *("---" if n in LEFT else "--:" for n in self.widths), ""]))
        self._print(cells)

    def _print(self, cells):
        texts = [
            f"{cells.get(name, ''):{'<' if name in LEFT else '>'}{width}}"
            for name, width in self.widths.items()
        ]
        if self.markdown:
            self.line(f"| {' | '.join(text.strip() for text in texts)} |")
        else:
            self.line("  ".join(texts))


def title_of(case):
    return case.operation, case.where


def say(text):
    tqdm.write(text, file=sys.stderr)


def about():
    """Versions, date and commit."""
    import triton

    def output(*command):
        try:
            done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    parts = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if torch.cuda.is_available():
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver.splitlines()[0] if driver else "unknown"
        parts = [torch.cuda.get_device_name(), *parts, f"driver {driver}"]
    parts.append(datetime.date.today().isoformat())
    commit = output("git", "rev-parse", "--short", "HEAD")
    if commit:
        changed = output("git", "status", "--porcelain")
        parts.append(f"commit {commit}{' and uncommitted changes' if changed else ''}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------ with a GPU


def timed_rows(cases, device, timer, compile=measure.compiled, copied=10**9, progress=iter):
    """(case, cells, right) for each case and direction; `right` is false where no time is given."""
    bandwidth = measure.copy_bandwidth(timer, device, copied)
    yield None, f"copying reaches {bandwidth / 1e9:,.0f} GB/s", True
    for case, backward in progress([(c, b) for c in cases for b in c.directions]):
        cells = {"shape": case.name, "pass": "bwd" if backward else "fwd"}
        try:
            found, right = timed_cells(case, backward, device, timer, compile, bandwidth)
        except Exception as error:  # one case that fails must not hide the others
            traceback.print_exc()
            found, right = {"kernel µs": "failed: " + type(error).__name__}, False
        yield case, cells | found, right


def timed_cells(case, backward, device, timer, compile, bandwidth):
    """What the table says of one case, and whether its results are right."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    dy = torch.randn_like(case.reference(inputs)[0]) if backward else None
    errors = verify.verify(case, inputs, dy)
    worst = max(errors, key=lambda error: error.share)
    if not worst.right:
        text = f"WRONG: error {worst.value:.1e} of {worst.name}, bound {worst.bound:.0e}"
        return {"kernel µs": text}, False

    functions, failed = measure.contenders(case, inputs, dy, compile)
    for name, error in failed.items():
        say(f"{case.name}: {name} failed: {error}")
    if not verify.runs_kernel(case, inputs, dy):
        del functions["kernel"]  # it is the reference
    times = measure.take_turns(timer, functions)
    cells = {name: f"{1e3 * t:.1f}" for name, t in times.items()} | dict.fromkeys(failed, "failed")
    cells |= {"kernel µs": cells.pop("kernel", "none"), "error÷bound": f"{worst.share:.2f}"}
    cells["MB"] = f"{case.floor(inputs, backward) / 1e6:.2f}"
    if "kernel" in times:
        seconds, flops = times["kernel"] / 1e3, case.flops(backward)
        rate = case.floor(inputs, backward) / seconds
        cells |= {"GB/s": f"{rate / 1e9:.0f}", "copy %": f"{100 * rate / bandwidth:.0f}"}
        cells |= {"TFLOP/s": f"{flops / seconds / 1e12:.1f}"} if flops else {}
        for name in times.keys() & {"plain", "compiled"}:
            cells[f"×{name}"] = f"{times[name] / times['kernel']:.2f}"
    return cells, True


# --------------------------------------------------------------------------------- without a GPU


def offline_rows(cases, targets, counts, progress=iter):
    """(case, cells, right) for each launch and target; counts: lines of bench/traffic_table.py.

    `right` is false where the counting found a fault, or counted other launches than these.
    """
    from tests.cases.offline import arch_of_target, compiled_for, inspect_kernel

    for case, backward in progress([(c, b) for c in cases for b in c.directions]):
        first = {"shape": case.name, "pass": "bwd" if backward else "fwd"}
        eager = [measure.tensor_passes(case, way, backward) for way in ("plain", "reference")]
        first["eager ops÷floor"] = " / ".join(f"{passes:.1f}" for passes in eager)
        count = next(counts)
        assert count["case"] == [*title_of(case), case.name] and count["backward"] == backward
        if not all(case.has_kernel(backward, arch_of_target(target)) for target in targets):
            yield case, first | {"kernel": "none: reference"}, True
            continue
        inputs, launches = case.inputs("cpu", empty), {}
        for target in targets:
            with compiled_for(target) as launches[target]:
                case.launch(inputs, backward)
        programs = [[launch.name, launch.grid[0]] for launch in launches[targets[0]]]
        right = count["faults"] == 0 and count["programs"] == programs
        if not right:
            say(f"{case.name}: {count['faults']} faults, {count['programs']} are not {programs}")
        first["bytes÷floor"] = f"{count['ratio']:.2f}" if right else "FAULT"
        first["sectors"] = f"{count['sectors']:.2f}"
        for same in zip(*launches.values(), strict=True):
            for target, launch in zip(targets, same, strict=True):
                name = {"kernel": launch.name} if target == targets[0] else {}
                yield case, first | name | code_cells(target, inspect_kernel(launch.kernel)), right
                first = {}


def empty(shape, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)  # costs no memory until it is touched


def code_cells(target, report):
    """What the table says of a compiled kernel."""
    occupancy = "" if report.occupancy is None else f"{100 * report.occupancy:.0f}"
    mma = f"{report.mma}" if report.mma else ""
    return {
        "target": target,
        "regs": f"{report.registers}",
        "spill B": f"{report.spill_bytes}",
        "KiB": f"{report.shared / 1024:.1f}",
        "occ %": occupancy,
        "mma": f"{mma} wg" if report.hgmma else mma,
        "loads": " ".join(f"{n}×{bits}" for bits, n in report.load_widths.items()),
        "stores": " ".join(f"{n}×{bits}" for bits, n in report.store_widths.items()),
    }


def counted(args):
    """The lines of bench/traffic_table.py, run beside this process on the same cases."""
    command = [sys.executable, str(REPO / "bench" / "traffic_table.py")]
    command += ["--only", *args.only, "--shape", *args.shape, "--target", args.targets[0]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.terminate()
    raise RuntimeError(f"{' '.join(command)} ended early")


# ----------------------------------------------------------------------------------------- main


NOTES_OFFLINE = """\
KiB: shared memory of a block. occ %: share of a multiprocessor's warps that fit. mma: matrix
instructions, wg: those of warp groups (HGMMA). loads, stores: on global memory, how many × how many
bits. bytes÷floor: bytes moved by all launches of a pass over those of reading every input once and
writing every output once, counted on one sample or head; sectors: the same of the 32-byte sectors
touched. eager ops÷floor: the same of PyTorch's operators, if each moved its tensors just once: of
plain PyTorch / of the reference."""
NOTES_TIMED = """\
MB: every input read and every output written once. copy %: that rate as a share of copying's.
kernel none: no kernel for this shape, the reference runs. plain: PyTorch's own operations (random
noise in place of the seeds'); compiled: torch.compile of these. ×: their time over the kernel's."""


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_filters(parser)
    parser.add_argument("--markdown", action="store_true", help="print tables in markdown")
    parser.add_argument("--offline", action="store_true", help="compile and count, GPU or not")
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        nargs="+",
        default=["sm_80", "sm_90", "sm_100"],
        help="what to compile for, offline",
    )
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("there are no kernels without triton, which exists for Linux alone")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are neither compiled nor timed")
    if not chosen(args):
        parser.error(f"no shape has any of these in its name: {' '.join(args.shape)}")
    return args


def main(arguments=None):
    args = parse(arguments)
    torch.set_num_threads(1)
    cases = chosen(args)

    def progress(rows):
        return tqdm(rows, "cases", leave=False, disable=None)

    on_gpu = torch.cuda.is_available() and not args.offline
    if on_gpu:
        table = Table(TIMED, args.markdown, sys.stdout)
        rows = timed_rows(cases, "cuda", measure.CudaTimer(), progress=progress)
    else:
        why = "As asked" if torch.cuda.is_available() else "There is no GPU here"
        print(f"{why}: no time is measured. Compiled, and counted in the interpreter:")
        table = Table(OFFLINE, args.markdown, sys.stdout)
        rows = offline_rows(cases, args.targets, counted(args), progress)
    print(about())
    status = 0
    for case, cells, right in rows:
        if case is None:
            table.line(cells)
        else:
            table.row(", ".join(title_of(case)), cells)
        status |= not right
    print(f"\n{NOTES_TIMED if on_gpu else NOTES_OFFLINE}")
    return status


if __name__ == "__main__":
    sys.exit(main())
