"""How much memory does a step guided by a classifier take, beside a plain step of the same batch?

    python bench/guided_memory.py [--only mnist cifar10] [--batch N] [--threads 1] [--rounds 5]

classifier_guidance.py needs activations of its classifier, which ddpm_pixel.py's step does not
have. The classifier can compute them twice instead (use_checkpoint), or see a half or a quarter of
the images at a time (batch); here are all of these ways. Two pairs of networks of random weights:

    mnist      those of configs/mnist_pixel.yaml and of classifier_guidance.py's defaults, batch 64
    cifar10    that of configs/cifar10_ddpm.yaml (35.7 M parameters) and a classifier of 64
               channels, batch 16

Each row has a process of its own, which draws a batch in --steps steps. Columns, in MB:

    tensors     the most bytes that tensors held at once, weights included; exact, but for what an
                operator takes and gives back while it runs, such as the scratch of a convolution
    activations the same without the weights of the row's networks
    RSS         the most memory that the process ever had, PyTorch's own included
    added RSS   how much more that is than after its imports, that of PyTorch's compiler included,
                some 70 MB, which the first checkpoint of a process makes
    s           seconds of a step, medians over rounds in which all rows take turns; the ratio is
                the median of the ratios in the same round. On a CPU of all threads' processor
                time, which other work on the machine disturbs less

On a GPU, tensors are what the allocator gave away, scratch included, and RSS is what it reserved. A
row meets the goal if each of its ratios of memory does.

--quick takes networks so small that nothing but the working of this file is seen.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide modules of its name

from runtime.commandline import BadInput, default_gpus, entry  # noqa: E402
from runtime.plan import LiveBytes  # noqa: E402
from runtime.processes import World, progress  # noqa: E402

import torch  # noqa: E402
import yaml  # noqa: E402

import classifier_guidance  # noqa: E402
import ddpm_pixel  # noqa: E402

GOAL = 1.6  # times a plain step
PLAIN = "plain"
WAYS = {  # {row: (use_checkpoint, in how many parts the classifier sees a batch)}
    PLAIN: None,
    "guided": (False, 1),
    "guided, checkpoint": (True, 1),
    "guided, half batches": (False, 2),
    "guided, quarter batches": (False, 4),
    "guided, checkpoint, half batches": (True, 2),
    "guided, checkpoint, quarter batches": (True, 4),
}
MEMORY = ("tensors", "activations", "RSS", "added RSS")


@dataclass(frozen=True)
class Setting:
    """A pair of networks: that of configs/{config}.yaml and a classifier."""

    shape: tuple  # (C,H,W)
    batch: int  # images of a step
    config: str
    classifier: dict  # its settings, where they are not classifier_guidance.py's defaults


SETTINGS = {
    "mnist": Setting((1, 28, 28), 64, "mnist_pixel", {}),
    "cifar10": Setting(
        (3, 32, 32),
        16,
        "cifar10_ddpm",
        {
            "model_channels": 64,
            "channel_mult": (1, 2, 2, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (16, 8),
        },
    ),
}
QUICK = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
CLASSES = 10


# ------------------------------------------------------------------------- bytes of live tensors


def check_live_bytes():
    """RuntimeError unless LiveBytes is right about known allocations, those of a graph included."""
    n, held = 4000, torch.zeros(500)  # bytes of 1000 numbers; 2000 bytes

    def steps(live):
        x = torch.ones(1000, requires_grad=True)
        yield "a tensor", n
        view = x.detach()[10:20]
        yield "its view", n
        y = x.exp().exp().sum()  # the graph keeps both exponentials, Python neither
        yield "the graph", 3 * n + 4
        y.backward()
        yield "its end", 2 * n + 4  # x and its gradient
        del x, y
        yield "the view alone", n
        del view
        yield "nothing", 0

    with LiveBytes([held, held[:3]]) as live:
        for what, expected in steps(live):
            if live.now != expected + 2000:
                raise RuntimeError(f"{what}: {live.now} live bytes, not {expected + 2000}")
    peak = 2000 + 4 * n + 8  # in backward(): x, both exponentials, a gradient, y and its gradient
    if live.peak != peak:
        raise RuntimeError(f"a peak of {live.peak} bytes, not {peak}")


# ---------------------------------------------------------------------------------------- a step


def networks(setting, way, device, quick=False):
    """The network of a row and, unless it is the plain step, its classifier."""
    pair, small = SETTINGS[setting], QUICK if quick else {}
    typed = yaml.safe_load((REPO / "configs" / f"{pair.config}.yaml").read_text()) | small
    known = {field.name for field in fields(ddpm_pixel.Config)}
    cfg = ddpm_pixel.Config(**{key: value for key, value in typed.items() if key in known})
    torch.manual_seed(0)
    made = [ddpm_pixel.UNet(pair.shape, 0, cfg)]
    if way != PLAIN:
        typed = pair.classifier | small | {"use_checkpoint": WAYS[way][0]}
        cfg = classifier_guidance.Config(**typed)
        made.append(classifier_guidance.make_net(cfg, pair.shape, CLASSES))
    made = [net.to(device, memory_format=torch.channels_last).eval() for net in made]
    return tuple(net.requires_grad_(False) for net in made)  # as load_classifier() does


def walk_of(setting, way, nets, batch, steps, device):
    """A function of nothing that draws a batch of images, by algorithm 1 where it is guided."""
    shape, seeds = SETTINGS[setting].shape, torch.arange(batch, device=device)
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 1000)
    pairs = ddpm_pixel.timestep_pairs(len(alpha_bar), steps)
    chain = (alpha_bar, pairs, shape, seeds)

    def images():
        if way == PLAIN:
            return ddpm_pixel.sample(*nets, *chain)
        part = -(-batch // WAYS[way][1])
        return classifier_guidance.sample(*nets, *chain, seeds % CLASSES, batch=part)

    def walk():
        with World(device=torch.device(device)).autocast():
            for _ in images():
                pass

    return walk


# ---------------------------------------------------------------------------------------- memory


def status(name):
    """VmRSS (memory of this process now) or VmHWM (the most it ever had), in bytes."""
    # getrusage's ru_maxrss would be at least what the process that started this one had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(setting, way, batch, steps, device, quick=False):
    """{column: bytes} of a row, in a process that did nothing before."""
    if WAYS[way] and WAYS[way][0]:
        importlib.import_module("torch._dynamo")  # or the first checkpoint would import it
    imported = status("VmRSS") if device == "cpu" else 0
    nets = networks(setting, way, device, quick)
    walk = walk_of(setting, way, nets, batch, steps, device)
    weights = [each for net in nets for each in net.state_dict().values()]
    walk()  # before anything is followed
    if device == "cpu":
        rss = status("VmHWM")
        live = LiveBytes(weights)
        held = live.now
        with live:
            walk()
        tensors = live.peak
    else:
        tensors, rss = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        held = sum(each.nbytes for each in weights)
    return dict(zip(MEMORY, (tensors, tensors - held, rss, rss - imported), strict=True))


def apart(*given, threads):
    """measure(*given) in a process of its own."""
    program = "import runtime, json, torch, bench.guided_memory as bench; "
    program += f"torch.set_num_threads({threads}); print(json.dumps(bench.measure(*{given!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{given[0]}, {given[1]}: the process failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------ time


def clock():
    """Seconds: on a GPU by the clock when all is done, else the processor time of all threads."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def take_turns(walks, rounds, steps, tick):
    """{name: [seconds of a step in each round]}; within a round, all walks have one turn."""
    found = {name: [] for name in walks}
    for name in walks:  # what is made once is made before the clock runs
        walks[name]()
        tick()
    for i in range(rounds):
        for name in list(walks)[:: 1 if i % 2 == 0 else -1]:
            start = clock()
            walks[name]()
            found[name].append((clock() - start) / steps)
            tick()
    return found


# ----------------------------------------------------------------------------------------- table


def ratios(memory, seconds):
    """{row: {column: times the plain step}}, of memory and of "s"."""
    found = {}
    for way in memory:
        found[way] = {key: memory[way][key] / memory[PLAIN][key] for key in MEMORY}
        pairs = zip(seconds[way], seconds[PLAIN], strict=True)
        found[way]["s"] = statistics.median(a / b for a, b in pairs)
    return found


def table(memory, seconds):
    """Markdown: a line for each row, with each figure and what it is in plain steps."""
    yield "| step | " + " | ".join(f"{key} | ratio" for key in (*MEMORY, "s")) + " |"
    yield "|---" + "|--:" * 2 * (len(MEMORY) + 1) + "|"
    for way, times in ratios(memory, seconds).items():
        cells = [f"{memory[way][key] / 1e6:.1f} | {times[key]:.3f}" for key in MEMORY]
        cells.append(f"{statistics.median(seconds[way]):.3f} | {times['s']:.2f}")
        yield f"| {way} | " + " | ".join(cells) + " |"


def reached(memory, seconds):
    """{guided row: (seconds, its largest memory) in plain steps} of those below the goal."""
    found = {}
    for way, times in ratios(memory, seconds).items():
        largest = max(times[key] for key in MEMORY)
        if way != PLAIN and largest < GOAL:
            found[way] = times["s"], largest
    return found


# ------------------------------------------------------------------------------------------ main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--batch", type=int, default=0, help="images of a step; 0: see above")
    parser.add_argument("--steps", type=int, default=2, help="of a walk")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=default_gpus())
    parser.add_argument("--quick", action="store_true", help="tiny networks, one round")
    args = parser.parse_args(arguments)
    for name in ("steps", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.batch < 0:
        raise BadInput(f"--batch must be at least 1, or 0 for the default, got {args.batch}")
    if args.gpus > default_gpus():
        raise BadInput("--gpus 1: PyTorch finds no GPU here; type --gpus 0")
    if not args.gpus and not Path("/proc/self/status").exists():
        raise BadInput("the memory of a process is read from /proc/self/status: Linux only")
    if args.quick:
        args.rounds = 1
    return args


def main(arguments=None):
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    check_live_bytes()
    device = "cuda" if args.gpus else "cpu"
    cheapest = []
    for setting in args.only:
        batch, memory, walks = args.batch or SETTINGS[setting].batch, {}, {}
        how = (batch, args.steps, device)
        with progress((args.rounds + 2) * len(WAYS), setting) as bar:
            for way in WAYS:
                memory[way] = apart(setting, way, *how, args.quick, threads=args.threads)
                bar.update()
            for way in WAYS:
                nets = networks(setting, way, device, args.quick)
                walks[way] = walk_of(setting, way, nets, *how)
            seconds = take_turns(walks, args.rounds, args.steps, bar.update)
        print(f"\n{setting}: batch {batch}, {device}, {args.threads} thread(s)\n")
        print("\n".join([*table(memory, seconds), ""]))
        good = reached(memory, seconds)
        print(f"below {GOAL} times a plain step in all memory: {'; '.join(good) or 'NONE'}")
        best = min(good, key=good.get, default=None)
        told = "{}: {:.2f} times the seconds, {:.3f} times the memory at most"
        cheapest.append(f"{setting}, {told.format(best, *good[best]) if best else 'NONE'}")
    print(f"\ncheapest in time below {GOAL} times: " + "; ".join(cheapest))


if __name__ == "__main__":
    entry(main)
