"""A GPU's day: proves every kernel and times everything, from one operation to whole networks.

    python bench/gpu.py --out gpu-day                     about half an hour of one H200
    python bench/gpu.py --out gpu-day --minutes 9         stops in time; the same command goes on
    python bench/gpu.py --out gpu-day --only kernels      these stages
    python bench/gpu.py --out DIR --rehearse              all of it on a CPU, without meaning

Each stage is a process of its own with a limit of its own, in the order of what must not be lost.
Every row is in OUT/results.jsonl once it is known. A stage that fails or takes too long leaves a
row that says so, and the others run. Started again, the command goes on: stages that are finished
are skipped. OUT/gpu.md and gpu.json are made of the rows, OUT/log.txt holds what the stages print.

bench/GPU.md says how to come by a GPU, and what to type there.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where files would hide modules of their names

from bench import wheels  # noqa: E402

wheels.unpack()

from runtime.commandline import BadInput, at_home, entry  # noqa: E402

from bench.gpu_goals import goals  # noqa: E402
from bench.gpu_rows import (  # noqa: E402
    Job,
    append,
    failures,
    finish,
    is_done,
    latest,
    narrow,
    pivoted,
    read,
    tail,
)


class Stage(NamedTuple):
    """Where its function is, the most seconds it may take, and what its rows are about."""

    module: str
    seconds: int
    heads: tuple
    value: str = ""  # in a column for each of the last of heads, beside that of "here"
    joins: str = ""  # the stage in whose table its rows are shown


STAGES = {
    "facts": Stage("gpu_kernels", 60, ("what",)),
    "verify": Stage("gpu_kernels", 150, ("operation", "shape", "pass")),
    "sanitize": Stage("gpu_kernels", 150, ("tool", "whose")),
    "kernels": Stage("gpu_kernels", 120, ("operation", "shape", "pass", "way"), "us"),
    "chapters": Stage("gpu_chapters", 300, ("command",)),
    "unet": Stage("gpu_networks", 400, ("what", "way")),
    "sampling": Stage("gpu_sampling", 60, ("what", "way")),
    "candidates": Stage("gpu_kernels", 300, ("operation", "shape", "candidate")),
    "latent": Stage("gpu_networks", 400, ("what", "way")),
    "dit": Stage("gpu_networks", 300, ("what", "way")),
    "tests": Stage("gpu_kernels", 90, ("what",)),
    "traces": Stage("gpu_sampling", 45, ("what", "kernel")),
    "features": Stage("gpu_sampling", 45, ("what", "way")),
    "ddp": Stage("gpu_sampling", 60, ("what",)),
    "compiled": Stage("gpu_kernels", 240, ("operation", "shape", "pass", "way"), "us", "kernels"),
}
ENOUGH = 15  # seconds that must be left for a stage to begin


# --------------------------------------------------------------------------------- the driver


def command_of(name, out, rehearse):
    """The command line of a stage's process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(out)]
    return command + ["--rehearse"] * rehearse


def run_stage(name, out, rehearse, limit):
    """How a stage ended, in words; "" if well. After `limit` seconds all it started is gone."""
    with open(out / "log.txt", "a") as log:
        print(f"== {name}", file=log, flush=True)
        how = dict(stdout=log, stderr=log, cwd=REPO, preexec_fn=os.setpgrp)
        process = subprocess.Popen(command_of(name, out, rehearse), **how)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"out of time after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "" if code == 0 else f"ended with exit code {code}"


def run_stages(names, out, rehearse, minutes):
    """Runs the stages that are not finished, as far as the minutes go."""
    end = time.monotonic() + 60 * minutes
    for name in names:
        if is_done(read(out), name):
            print(f"{name}: finished before", flush=True)
            continue
        left = end - time.monotonic()
        if left < ENOUGH:
            print(f"{name}: no time is left; the same command goes on with it", flush=True)
            continue
        start = time.monotonic()
        ended = run_stage(name, out, rehearse, min(STAGES[name].seconds, left))
        seconds = round(time.monotonic() - start, 1)
        if ended:
            tail(out / "log.txt")
        append(out, stage=name, **({"ended": ended} if ended else {"done": True}), seconds=seconds)
        print(f"{name}: {ended or 'done'}, {seconds:.0f} s", flush=True)
        write(out)


def work(job):
    """In the process of a stage: its function."""
    import runtime  # noqa: F401  sets how threads wait, before torch loads them

    module = importlib.import_module(f"bench.{STAGES[job.stage].module}")
    getattr(module, job.stage)(job)


# ------------------------------------------------------------------------------------ what is read


def markdown(rows):
    """gpu.md: whether the goals are met, what failed, a table of each stage."""
    lines = ["# What a GPU measured", ""]
    if any(row.get("rehearsed") for row in rows):
        lines += ["**A rehearsal on a CPU: no number here means anything.**", ""]
    lines += ["## Goals", "", *goals(rows), ""]
    if failed := failures(rows, STAGES):
        lines += ["## What failed", "", *failed, ""]
    for name, stage in STAGES.items():
        joined = [latest(rows, other) for other, s in STAGES.items() if name in (other, s.joins)]
        found = {of: row for part in joined for of, row in part.items()}
        if not found or stage.joins:
            continue
        took = [f", {r['seconds']:.0f} s" for r in rows if r["stage"] == name and r.get("done")]
        lines += [f"## {name}{''.join(took[-1:])}", ""]
        if stage.value:
            lines += pivoted(found, stage.heads[:-1], stage.value)
        else:
            lines += narrow(found, stage.heads)
        lines.append("")
    return "\n".join(lines)


def write(out):
    rows = read(out)
    finish(out, markdown(rows), rows, "gpu")


# ------------------------------------------------------------------------------------------- main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=lambda text: Path(at_home(text)), required=True, help="folder of the results"
    )
    parser.add_argument("--minutes", type=float, default=60, help="after which it ends")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small shapes")
    parser.add_argument("--stage", choices=STAGES, help="in this process, whatever was finished")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        raise BadInput(f"--minutes must be greater than 0, got {args.minutes:g}")
    return args


def main(arguments=None):
    args = parse(arguments)
    import torch

    if not (args.rehearse or torch.cuda.is_available()):
        raise BadInput("there is no GPU here; type --rehearse to walk through all on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        return work(Job(args.stage, args.out, args.rehearse))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stage outlives it
    if args.rehearse and not read(args.out):
        append(args.out, stage="", rehearsed=True)
    run_stages([n for n in STAGES if n in args.only], args.out, args.rehearse, args.minutes)
    write(args.out)
    print(f"{args.out / 'gpu.md'}\n\n{markdown(read(args.out))}"[:11000])
    rows = read(args.out)
    whole = all(is_done(rows, name) for name in args.only)
    return sys.exit(0 if whole and not failures(rows, args.only) else 1)


if __name__ == "__main__":
    entry(main)
