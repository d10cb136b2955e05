"""Stages of bench/gpu.py about single operations: what the GPU can, which kernels are right, and
how fast they are beside PyTorch's own ways.

    python -m bench.gpu_kernels [--cpu]     verifies small ragged cases; what a sanitizer looks at
"""

import runtime  # noqa: F401  sets how threads wait, before torch loads them

import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import candidates as tiles
from bench import measure
from bench.gpu_clock import device_us, host_us, on_gpu
from bench.gpu_rows import latest, read
from kernels import gaussian, philox
from kernels.dispatch import arch_of
from tests.cases.kernel_cases import ATTENTION, CASES, NORM, PUBLIC, SHORT, UPDATE
from tests.cases.more_cases import MORE_CASES, RAGGED
from tests.cases.verify import runs_kernel
from tests.cases.verify import verify as compare

REPO = Path(__file__).resolve().parent.parent
PUBLISHED = dict(zip((case.name for case in PUBLIC), (260.0, 70.0), strict=True))  # µs, an H200
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REFUSED = "No available kernel", "No viable backend"  # what SDPA says of a shape it cannot take
PASSES = {False: "forward", True: "backward"}


def shrunk(cases):
    """One small case of each operation, for a rehearsal."""
    first = {case.operation: case for case in reversed(cases)}
    return [dataclasses.replace(case, batch=1) for case in first.values()]


def passes(cases):
    return [(case, backward) for case in cases for backward in case.directions]


def made(case, backward, device):
    """Inputs, and the gradient of the result for backward, else None."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    if not backward:
        return inputs, None
    with torch.no_grad():  # in the memory format of the result, as the next layer gives it
        return inputs, torch.randn_like(case.run(inputs)[0])


# --------------------------------------------------------------------------------- what it can do


def facts(job):
    """Names and versions; the two ceilings that other rows are shares of."""
    from bench.kernels import about

    with job.row("versions") as row:
        row |= {"about": about(), "threads": torch.get_num_threads()}
        if on_gpu():
            found = torch.cuda.get_device_properties(0)
            row |= {
                "capability": f"{found.major}.{found.minor}",
                "processors": found.multi_processor_count,
                "memory_gib": found.total_memory / 2**30,
                "l2_mib": found.L2_cache_size / 2**20,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
    count, side = (10**6, 128) if job.rehearse else (10**9, 8192)
    with job.row("copy") as row:
        x = torch.randint(100, (count,), dtype=torch.int8, device=job.device)
        y = torch.empty_like(x)
        us = device_us(lambda: y.copy_(x), repeats=10)
        row |= {"us": us, "gb_s": 2 * count / us / 1e3}
    for dtype in (torch.bfloat16, torch.float16):
        with job.row(f"product of {side}, {SHORT[dtype]}") as row:
            a, b = torch.randn(2, side, side, device=job.device).to(dtype)
            us = device_us(lambda: a @ b, repeats=10)  # noqa: B023
            row |= {"us": us, "tflop_s": 2 * side**3 / us / 1e6}


def ceilings(out):
    """(GB/s of a copy, TFLOP/s of a bf16 product), NaN where the stage `facts` gave none."""
    found = latest(read(out), "facts")
    copied = found.get(("copy",), {}).get("gb_s", float("nan"))
    products = [row.get("tflop_s") for of, row in found.items() if of[0].endswith("bf16")]
    return copied, (products or [None])[0] or float("nan")


# ------------------------------------------------------------------------------ which are right


def verified(case, backward, device):
    """The values of a row: the worst error, as a share of what is allowed."""
    inputs, dy = made(case, backward, device)
    kernel = runs_kernel(case, inputs, dy)
    worst = max(compare(case, inputs, dy), key=lambda error: error.share)
    values = {"right": worst.right, "share": worst.share, "of": worst.name, "kernel": kernel}
    if device == "cuda":  # another launch of the same kernel, remembered by now, gives the same
        again = [case.run(inputs)[0] for _ in range(2)]
        values["right"] &= torch.equal(*again)
    return values


def verify(job):
    """Every operation against float64, forward and backward, at all shapes; several at a time,
    because compiling takes longest."""
    wanted = passes([*shrunk(CASES), *RAGGED] if job.rehearse else [*CASES, *MORE_CASES, *PUBLIC])
    named = {(c.operation, c.name, PASSES[b]): (c, b, job.device) for c, b in wanted}
    left = {of: task for of, task in named.items() if not job.known(*of)}
    with job.row("gaussian", "3x3x9x7", "forward") as row:
        seeds = torch.tensor([17, -3, 2**62])
        there, here = (gaussian((3, 3, 9, 7), seeds, 5, d) for d in (job.device, "cpu"))
        error = (there.cpu() - here).abs().max().item()
        row |= {"right": error < 4e-6, "share": error / 4e-6}

    def tell(of, values):
        with job.row(*of) as row:
            found = values()
            row |= {"worst" if name == "of" else name: v for name, v in found.items()}

    if job.rehearse:
        for of, task in left.items():
            tell(of, partial(verified, *task))
        return
    while left:  # an error of CUDA spoils its process: the others are asked again in a new pool
        broken = None
        with workers() as pool:
            running = {pool.submit(verified, *task): of for of, task in left.items()}
            for future in as_completed(running):
                try:
                    tell(running[future], future.result)
                except Exception as error:
                    broken = error
                    break
                finally:
                    left.pop(running[future])
            pool.shutdown(cancel_futures=True)
        if broken is None:
            return
        print(f"a new pool for {len(left)} passes after {broken}", flush=True)


def workers():
    """A pool of processes, as many as the GPU has memory for."""
    memory = torch.cuda.get_device_properties(0).total_memory
    count = max(1, min(6, os.cpu_count() // 2, memory // (12 * 2**30)))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def ragged(device):
    """Verifies RAGGED and prints how many were right; SystemExit if one was not."""
    for number, (case, backward) in enumerate(passes(RAGGED), start=1):
        inputs, dy = made(case, backward, device)
        with sdpa_kernel(SDPBackend.MATH):  # racecheck finds races in PyTorch's other kernels
            wrong = [error for error in compare(case, inputs, dy) if not error.right]
        if wrong:
            sys.exit(f"{case.operation} {case.name} {PASSES[backward]}: {wrong}")
        print(f"right: {number}", flush=True)


SHARED_STORE = "write-write of one instruction"  # by threads that should hold one number
# "Write access at f+0x4a00 in group_norm_silu.py:248"; "at void g<float>(int)+0x50 in g.cu:6"
PLACE = re.compile(r"(?:(Read|Write) access )?at (?:void )?(.+)\+0x([0-9a-f]+)(?: |$)")


class Finding(NamedTuple):
    """What a sanitizer says of one place: in which kernel, of what kind, and its words."""

    kernel: str
    kind: str
    text: str


def kind_of(block, places):
    """What the lines of a finding, and the matches of PLACE in them, are about."""
    verbs, kernels, offsets = (
        set(part) for part in zip(*(m.groups() for m in places), strict=True)
    )
    if None in verbs:
        return block[0]
    if verbs != {"Write"}:
        return "read-write"
    return SHARED_STORE if len(kernels) == len(offsets) == 1 else "write-write"


def findings(lines):
    """The Findings in a sanitizer's lines; one that says nothing stands between two of them."""
    titles, found = ("COMPUTE-SANITIZER",), []
    told = [line.partition("=========")[2].strip() for line in lines]
    for _, block in itertools.groupby(("" if text in titles else text for text in told), bool):
        block = list(block)
        if places := [match for match in map(PLACE.search, block) if match]:
            kernel = places[0][2].split("(")[0]
            found.append(Finding(kernel, kind_of(block, places), " ".join(block)))
    return found


def is_ours(finding):
    """Whether it is in a kernel of the project."""
    modules = (NORM, ATTENTION, UPDATE, philox)
    return any(hasattr(getattr(module, finding.kernel, None), "fn") for module in modules)


def say_findings(job, tool, found, more):
    """Two rows of a tool: of the project's kernels, with `more`, and of others'."""
    for whose in ("ours", "others'"):
        mine = [finding for finding in found if is_ours(finding) == (whose == "ours")]
        kinds, kernels = (Counter(getattr(f, part) for f in mine) for part in ("kind", "kernel"))
        with job.row(tool, whose) as row:
            row |= more if whose == "ours" else {}
            row["found"] = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
            row["kernels"] = ", ".join(f"{name} {n}" for name, n in kernels.items())
            row["texts"] = {finding.kind: finding.text for finding in reversed(mine)}
            if whose == "ours":
                row["clean"] &= not mine


def sanitize(job):
    """compute-sanitizer over small ragged cases, both tools at a time."""
    command = [sys.executable, "-m", "bench.gpu_kernels", *["--cpu"] * job.rehearse]
    prefix = {"none": []}
    if not job.rehearse:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).exists():
            return job.say("compute-sanitizer", skipped="not installed")
        checks = [program, "--error-exitcode", "9", "--tool"]
        # PyTorch asks the driver for functions that it may not have: no error of a kernel.
        more = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
        prefix = {tool: [*checks, tool, *flags] for tool, flags in more.items()}
    # Each tensor then has an allocation of its own, beyond whose end a read is an error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    how = dict(
        cwd=REPO, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wanted = len(passes(RAGGED))
    with contextlib.ExitStack() as stack:
        running = {
            tool: stack.enter_context(subprocess.Popen([*before, *command], **how))
            for tool, before in prefix.items()
        }
        for tool, process in running.items():
            lines = process.communicate()[0].splitlines()
            print(tool, *lines[-30:], sep="\n", flush=True)
            done = [line for line in lines if line.startswith("right: ")]
            summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
            found = findings(lines)
            # One that could not look at the program sums up nothing; one of whose errors some are
            # not understood, more.
            told = [int(n) for n in re.findall(r"SUMMARY: (\d+)", " ".join(summary))]
            looked = told == [len(found)] or job.rehearse
            whole = len(done) == wanted and process.returncode == (9 if found else 0)
            more = {"clean": looked and whole, "code": process.returncode}
            more |= {"passes": f"{len(done)} of {wanted}"}
            more["summary"] = (summary or lines or [""])[-1][:100]
            say_findings(job, tool, found, more)


def tests(job):
    """What else tests/kernels/test_gpu_kernels.py asks of a GPU: graphs, streams, torch.compile."""
    if job.rehearse or importlib.util.find_spec("pytest") is None:
        return job.say("pytest", skipped="no GPU" if job.rehearse else "not installed")
    flags = ["-q", "-k", "not float64", "-p", "no:cacheprovider"]
    line = [sys.executable, "-m", "pytest", *flags, "tests/kernels/test_gpu_kernels.py"]
    done = subprocess.run(line, cwd=REPO, text=True, capture_output=True)
    print(done.stdout, done.stderr, flush=True)
    with job.row("pytest") as row:
        row |= {"right": done.returncode == 0, "code": done.returncode}
        row["last"] = (done.stdout.strip().splitlines() or [""])[-1]


# ----------------------------------------------------------------------------- how fast they are


def autocast(case, device):
    """What eager PyTorch under autocast does for a group norm: norm and SiLU in fp32."""

    def run(inputs):
        x = inputs["x"]
        with torch.autocast(device, torch.bfloat16):
            y = F.group_norm(x, case.groups, inputs["weight"], inputs["bias"])
            if "scale" in inputs:
                places = (..., *[None] * (x.ndim - 2))
                y = y * (1 + inputs["scale"][places]) + inputs["shift"][places]
            return (F.silu(y).to(x.dtype),)

    return run


def ways_of(case, device):
    """{name: (function of inputs, a context to call it in)}: the kernel, then PyTorch's ways."""
    nothing = contextlib.nullcontext
    ways = {"here": (case.run, nothing), "eager": (case.plain, nothing)}
    if case.operation == "group_norm":
        ways["autocast"] = (autocast(case, device), nothing)
    if case.operation == "attention":
        ways |= {name: (case.plain, partial(sdpa_kernel, b)) for name, b in BACKENDS.items()}
    return ways


class Timer:
    """Times ways of cases on the GPU, and says how near they come to what it can do."""

    def __init__(self, job):
        self.job, (self.copied, self.product) = job, ceilings(job.out)
        size = 2**20 if job.rehearse else 2**28
        self.flush = torch.empty(size, dtype=torch.int8, device=job.device)

    def __call__(self, of, case, backward, function, context, inputs, dy):
        with self.job.row(*of) as row, context():
            try:
                call = measure.prepared(case, function, inputs, dy)
                call()
            except RuntimeError as error:
                if not any(word in str(error) for word in REFUSED):
                    raise
                row["refused"] = "no kernel for this shape"
                return
            us = device_us(call, self.flush)
            row |= {"us": us, "host_us": host_us(call)}
            if of[-1] == "here":  # or is it PyTorch's own way, where no kernel was planned?
                row["kernel"] = runs_kernel(case, inputs, dy)
            row["gb_s"] = case.floor(inputs, backward) / us / 1e3
            row["copy_share"] = row["gb_s"] / self.copied
            if case.flops(backward):
                row["tflop_s"] = case.flops(backward) / us / 1e6
                row["product_share"] = row["tflop_s"] / self.product


def timed_cases(job):
    return passes(shrunk(CASES) if job.rehearse else [*CASES, *PUBLIC])


def kernels(job):
    """Ours, PyTorch's own operations, those under autocast, SDPA by each of its back ends."""
    timer = Timer(job)
    for case, backward in timed_cases(job):
        inputs, dy = made(case, backward, job.device)
        for name, (function, context) in ways_of(case, job.device).items():
            of = case.operation, case.name, PASSES[backward], name
            if not job.known(*of):
                timer(of, case, backward, function, context, inputs, dy)
        if case.name in PUBLISHED and not backward:
            of = case.operation, case.name, PASSES[backward], "sglang's own on an H200"
            job.say(*of, us=PUBLISHED[case.name])


def compiled(job):
    """torch.compile of PyTorch's own operations: last, because compiling takes minutes."""
    timer = Timer(job)
    compile = partial(torch.compile, backend="eager") if job.rehearse else measure.compiled
    for case, backward in timed_cases(job):
        of = case.operation, case.name, PASSES[backward], "compiled"
        if not job.known(*of):
            inputs, dy = made(case, backward, job.device)
            timer(of, case, backward, compile(case.plain), contextlib.nullcontext, inputs, dy)


# -------------------------------------------------------------------------- what may be faster yet


def verified_with(candidate, case, backward, device):
    """Whether the operation is right with another tile."""
    with candidate.taken():
        inputs, dy = made(case, backward, device)
        return all(error.right for error in compare(case, inputs, dy))


def candidates(job):
    """Tiles of bench/candidates.py: verified, which compiles them, several at a time; then timed.

    Where one is faster than the table's, the row "best" has what to write there.
    """
    flush = torch.empty(2**20 if job.rehearse else 2**28, dtype=torch.int8, device=job.device)
    cases = shrunk(CASES) if job.rehearse else [*CASES, *PUBLIC]
    cases.sort(key=lambda case: case.operation == "attention")  # slow to compile
    pool = contextlib.nullcontext() if job.rehearse else workers()
    with pool:
        for case, backward in passes(cases):
            found = tiles.candidates(case, backward, arch_of(torch.device(job.device)))
            shape = f"{case.name} {PASSES[backward]}"
            if len(found) < 2 or job.known(case.operation, shape, "all"):
                continue
            tasks = [(c, case, backward, job.device) for c in found]
            rights = [partial(verified_with, *task) for task in tasks]
            if not job.rehearse:
                submitted = [pool.submit(right) for right in rights]
                futures.wait(submitted)  # else they would slow what is timed
                rights = [future.result for future in submitted]
            times = time_candidates(job, case, backward, flush, zip(found, rights, strict=True))
            for kernel, of_kernel in times.items():
                own = next(candidate for candidate in found if candidate.kernel == kernel)
                best = min(of_kernel, key=of_kernel.get)
                gain = of_kernel.get(own, float("nan")) / of_kernel[best]
                job.say(case.operation, shape, f"best {kernel}", tile=best.name, gain=gain)
            job.say(case.operation, shape, "all", tiles=len(found))


def time_candidates(job, case, backward, flush, found):
    """{kernel: {candidate: microseconds}} of pairs of a candidate and a function: is it right?"""
    times = {}
    inputs, dy = made(case, backward, job.device)
    for candidate, right in found:
        shape = f"{case.name} {PASSES[backward]}"
        with job.row(case.operation, shape, candidate.name) as row, candidate.taken():
            row["right"] = right()
            row["us"] = device_us(measure.prepared(case, case.run, inputs, dy), flush)
            if row["right"]:
                times.setdefault(candidate.kernel, {})[candidate] = row["us"]
    return times


if __name__ == "__main__":
    ragged("cpu" if "--cpu" in sys.argv else "cuda")
