"""How PyTorch's threads wait: speed of a training step on a machine that does other work, too.

    python bench/busy.py [--quick] [--rounds 5] [--seconds 10] [--spins 100 1000 3000 10000 30000]

Processes that never rest are started beside a training step: none, one, two and four, on as many
processors as the step has threads. Printed are its steps a second, medians over rounds, for each
way in which threads may wait at the end of a parallel loop:

    default             as PyTorch alone: 300,000 turns, then asleep
    OMP_WAIT_POLICY=PASSIVE      asleep at once
    GOMP_SPINCOUNT=N    N turns, then asleep
    as our scripts      what runtime/__init__.py sets

Each way has a process of its own, which lives as long as the bench and sleeps while others have
their turn. In a round, all ways have one turn beside each number of busy processes, so that
whatever else the machine does falls on all of them.

The step is of the size of the demo's (`python ldm_cfg.py`) and as it is built: a U-Net with labels
on latents 4x8x8, batch 64, forward, backward, Adam and the mean of weights. Whatever the demo will
be, its threads wait as often. Linux only: elsewhere PyTorch has another OpenMP.

--quick takes one short round, in which nothing but the working of this file is seen.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the module of its name

from runtime.commandline import BadInput, entry  # noqa: E402
from runtime.processes import progress  # noqa: E402

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
DEFAULT, OURS = "default", "as our scripts"
GOAL_QUIET, GOAL_BUSY = 0.03, 10  # at most so much below the best; at least so many times default
# Ends with the process that started it, however that ends.
NEVER_RESTS = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


# ------------------------------------------------------------------------------ the training step


def training_step():
    """A function of nothing that trains a network of the demo's size by one step."""
    import torch

    from networks.adm_unet import UNet

    torch.manual_seed(0)
    net = UNet(
        (4, 8, 8),
        10,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=4,
    )
    mean = [p.detach().clone() for p in net.parameters()]
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step():
        x, eps = torch.randn(2, 64, 4, 8, 8)
        t, y = torch.randint(1000, (64,)), torch.randint(10, (64,))
        (net(x, t, y) - eps).square().mean().backward()
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(mean, [p.detach() for p in net.parameters()], 0.005)

    return step


def work(threads):
    """For each number of seconds on standard input: train so long, print steps and seconds."""
    import torch

    torch.set_num_threads(threads)
    step = training_step()
    for _ in range(3):  # what is made once is made before the clock runs
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < float(line):
            step()
            steps += 1
        print(steps, time.perf_counter() - start, flush=True)


# ------------------------------------------------------------------------------------- processes


def ways_to_wait(spins):
    """{name: (variables, what the process imports first)} of all that is compared."""
    ways = {DEFAULT: ({}, "torch"), "OMP_WAIT_POLICY=PASSIVE": ({VARIABLES[1]: "PASSIVE"}, "torch")}
    ways |= {f"GOMP_SPINCOUNT={n}": ({VARIABLES[0]: str(n)}, "torch") for n in spins}
    return ways | {OURS: ({}, "runtime")}


@contextmanager
def worker(variables, first, threads):
    """A process in which work() waits for its turns."""
    # torch loads its threads when it is imported, which bench.busy would do after runtime.
    program = f"import {first}, torch; from bench.busy import work; work({threads})"
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=env | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the training step failed: see above")
        yield process
    finally:
        process.kill()
        process.communicate()


def turn(process, seconds):
    """Steps a second of a worker's process."""
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    steps, took = process.stdout.readline().split()
    return int(steps) / float(took)


@contextmanager
def busy(n):
    """n processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", NEVER_RESTS]) for _ in range(n)]
    try:
        time.sleep(0.3 if n else 0)  # until they have started
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


@contextmanager
def few_processors(n):
    """What starts within has n of this process's processors, or BadInput if there are fewer."""
    if not hasattr(os, "sched_setaffinity"):
        raise BadInput("threads can be kept on chosen processors on Linux only")
    have = os.sched_getaffinity(0)
    if len(have) < n:
        raise BadInput(f"--threads {n}: there are {len(have)} processors; type that or fewer")
    os.sched_setaffinity(0, sorted(have)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, have)


def measure(ways, loads, rounds, seconds, threads):
    """{name: {load: [steps a second in each round]}}, a load being a number of busy processes."""
    found = {name: {load: [] for load in loads} for name in ways}
    with few_processors(threads), ExitStack() as stack:
        workers = {}
        for name, (variables, first) in ways.items():
            workers[name] = stack.enter_context(worker(variables, first, threads))
        total = rounds * len(loads) * len(ways)
        bar = stack.enter_context(progress(total, "turns"))
        for i in range(rounds):
            for load in loads:
                order = list(ways) if i % 2 == 0 else list(ways)[::-1]
                with busy(load):
                    for name in order:
                        found[name][load].append(turn(workers[name], seconds))
                        bar.update()
    return found


# ----------------------------------------------------------------------------------------- table


def table(found, loads):
    """The lines of the table: a row for each way to wait, a column for each load."""
    width = max(map(len, found)) + 2
    yield f"{'steps a second beside':{width}}" + "".join(f"{load:>4} busy" for load in loads)
    for name, rates in found.items():
        medians = [statistics.median(rates[load]) for load in loads]
        yield f"{name:{width}}" + "".join(f"{median:9.2f}" for median in medians)


def times_as_fast(found, name, load):
    """How many times as fast OURS is as `name` in the same round, the median over rounds."""
    pairs = zip(found[OURS][load], found[name][load], strict=True)
    return statistics.median(ours / other for ours, other in pairs)


def verdict(found, loads):
    """(lines about what is promised of OURS, whether it is kept)."""
    lines, kept = [], True
    for load in loads:
        if load == 0:
            ratios = {name: times_as_fast(found, name, 0) for name in found if name != OURS}
            best = min(ratios, key=ratios.get)
            reached = ratios[best] >= 1 - GOAL_QUIET
            told = f"{ratios[best]:.3f} of the best, {best}; promised is {1 - GOAL_QUIET:.2f}"
        elif load >= 2:
            ratio = times_as_fast(found, DEFAULT, load)
            reached = ratio >= GOAL_BUSY
            told = f"{ratio:.1f} times the default; promised is {GOAL_BUSY}"
        else:
            continue
        kept &= reached
        lines.append(f"{OURS}, beside {load}: {told}: {'yes' if reached else 'NO'}")
    return lines, kept


# ------------------------------------------------------------------------------------------ main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of half a second")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way beside each load")
    parser.add_argument("--seconds", type=float, default=10, help="of a turn; it ends with a step")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="processes")
    parser.add_argument("--threads", type=int, default=2, help="of the step, and its processors")
    parser.add_argument("--spins", type=int, nargs="+", default=[100, 1000, 3000, 10000, 30000])
    args = parser.parse_args(arguments)
    for name in ("rounds", "seconds", "threads"):
        if getattr(args, name) <= 0:
            raise BadInput(f"--{name} must be greater than 0, got {getattr(args, name)}")
    for name in ("busy", "spins"):
        if min(getattr(args, name)) < 0:
            raise BadInput(f"--{name} must be at least 0, got {min(getattr(args, name))}")
    if args.quick:
        args.rounds, args.seconds = 1, 0.5
    return args


def main(arguments=None):
    args = parse(arguments)
    loads = sorted(set(args.busy))
    ways = ways_to_wait(args.spins)
    found = measure(ways, loads, args.rounds, args.seconds, args.threads)
    print(
        f"{args.threads} threads on as many processors, {args.rounds} rounds, "
        f"turns of {args.seconds:g} s"
    )
    lines, _ = verdict(found, loads)
    print("\n".join([*table(found, loads), *lines]))


if __name__ == "__main__":
    entry(main)
