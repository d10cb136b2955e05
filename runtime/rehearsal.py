"""--dry-run: a training begins as ever, some steps of each stage are timed, and nothing is left.

    launch(train, cfg)      with cfg.dry_run calls train(cfg, world), where world is a Rehearsal

So what is timed is the chapter's own loop. A Rehearsal is one of the processes that there would be,
with its share of a batch, and not the main one, which alone writes and prints. The loop over
Run.steps() ends when enough is known, and the last one with the exception Enough.
"""

from runtime import commandline as cli
from runtime import plan
from runtime.commandline import BadInput
from runtime.processes import World, is_first_process, prefer_speed, process_count

import dataclasses
import gc
import math
import statistics
import time
from pathlib import Path

import torch

WARM_UP = 4  # calls of what is timed, before
TIMED = 10  # calls that count
LONG = 20.0  # seconds: after a first call that takes longer no others warm up,
MOST = LONG * TIMED  # and no more calls count when all have taken so long
NEVER = 10**9  # steps
QUIET = {"log_every": NEVER, "save_every": NEVER, "keep_every": 0, "sample_every": 0}
QUIET |= {"metric_every": 0, "tensorboard": False, "wandb": False, "resume": "never"}


class Enough(Exception):
    """All that can be timed has been."""


def counted(times):
    """Of the seconds of all calls those of the calls that count."""
    return times[1:] if times and times[0] > LONG else times[WARM_UP:]


@dataclasses.dataclass(frozen=True)
class Rehearsal(World):
    """One of the `processes` that there would be.

    cfg      the settings as they were typed
    timed    False where GPUs are asked for and none is here: then each stage does a step of one
             image, and says what it takes, but for its time
    stages   a plan.Stage of each that was seen
    memory   lines about it
    disk     bytes of what the stages would write
    figures  how many calls counted in each time
    """

    cfg: cli.RunConfig | None = None
    processes: int = 1
    timed: bool = True
    stages: list = dataclasses.field(default_factory=list)
    memory: list = dataclasses.field(default_factory=list)
    disk: list = dataclasses.field(default_factory=list)
    figures: list = dataclasses.field(default_factory=list)

    is_main = False

    def share(self, n):
        return slice(0, n // self.processes if self.timed else min(n, 1))

    # ---- the clock

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def is_enough(self, times):
        """Whether so many calls, of so many seconds, suffice."""
        count = len(counted(times))
        return not self.timed or count >= TIMED or count > 0 and sum(times) > MOST

    def times_of(self, call):
        """Seconds of calls, the first of which warm up."""
        times = []
        while self.timed and not self.is_enough(times):
            began = self.now()
            call()
            times.append(self.now() - began)
        return times

    def add(self, name, steps, images, flops, times):
        """A stage of so many steps, each of so many images and FLOPs in all processes together.

        Its time is the median of the times that count; or what a GPU that is not here may need.
        """
        seconds = flops / (plan.SUSTAINED * self.processes)
        if self.timed:
            seconds = statistics.median(counted(times))
            self.figures.append(len(counted(times)))
        self.stages.append(plan.Stage(name, steps, seconds, images, flops, not self.timed))

    # ---- training

    def watch(self, run, steps):
        """In place of `steps`, a Run's: its last ones, in which all takes part that ever does."""
        cfg, inputs, times = run.cfg, [], []
        self.say_data(run.ds)
        run.step = max(0, cfg.steps - WARM_UP - TIMED)
        run.cfg = dataclasses.replace(cfg, steps=NEVER)  # none of them is the last
        last = type(cfg) is type(self.cfg)
        cfg = self.cfg if last else cfg

        def model(*given, call=run.model):
            if not inputs:
                inputs.extend(plan.forms_of(given))
                if last and not self.timed:
                    self.know(run, cfg, inputs, [])
                    raise Enough
            return call(*given)

        run.model = model
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = self.now()
        for step in range(run.step, NEVER):
            yield step
            times.append(self.now() - began)
            if self.is_enough(times):
                break
            began = self.now()
        self.know(run, cfg, inputs, times)
        if last:
            raise Enough

    def know(self, run, cfg, inputs, times):
        """Print and keep what a stage takes whose settings are cfg."""
        last = cfg is self.cfg
        name = "training" if last else run.disk.script
        words, done = plan.state(run.folder / "ckpt.pt", cfg)
        n, epochs = plan.parameters(run.net), cfg.steps * cfg.batch_size / len(run.ds)
        model = f"{cfg.model}, " if isinstance(getattr(cfg, "model", None), str) else ""
        how = f"{cfg.steps} steps of {cfg.batch_size} images, {epochs:.1f} epochs"
        say(name, f"{model}{n / 1e6:.2f} M parameters, {how}: {words}")
        here = self.dtype is not torch.float32 if self.timed else cfg.precision != "fp32"
        costs = {half: plan.cost_of(run.net, inputs, half) for half in {here, small_half(cfg)}}
        flops = (4 if getattr(cfg, "use_checkpoint", False) else 3) * costs[here].flops
        left = max(0, cfg.steps - done)
        self.add(name, left, cfg.batch_size, flops * cfg.batch_size, times)
        self.know_memory(run, cfg, name, costs, here)
        kept = 2 + (cfg.steps // cfg.keep_every if cfg.keep_every else 0)
        lengths = len(
            getattr(cfg, "ema_lengths", ())
        )  # further running means, and snapshots of them
        each = 4 * n * (3 + len(cfg.ema) + lengths) + bytes_of(run.facts)
        self.disk.append((f"{kept} checkpoints of {name}", kept * each))
        if lengths:
            snapshots = cfg.steps // cfg.snapshot_every + 1
            self.disk.append(
                (f"{snapshots} snapshots of running means", snapshots * lengths * 4 * n)
            )
        if last and hasattr(cfg, "sample_steps"):
            self.know_drawing(run, cfg, inputs, done, costs[here].flops)

    def know_memory(self, run, cfg, name, costs, here):
        """Lines about memory: what a device holds, and whether it fits GPUs, or how it would."""
        split = self.processes if getattr(cfg, "shard", False) else 1
        n = plan.parameters(run.net)
        # Weights, gradients, Adam's two moments, and the running means.
        means = len(cfg.ema) + len(getattr(cfg, "ema_lengths", ()))
        state = 4 * n * (4 + means) / split + bytes_of(run.facts)
        state += 4 * n if split > 1 else 0  # whole again while grids are drawn
        share = cfg.batch_size // self.processes
        part = -(-share // cfg.accumulate)
        total = state + costs[here].fixed + part * costs[here].each
        text = f"about {plan.size_text(total)}, {plan.size_text(state)} of it without the images"
        gpus = [(plan.SMALL, plan.GPU_BYTES, costs[small_half(cfg)])]
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            text = f"{plan.size_text(peak)} measured, {text} estimated"
            about = torch.cuda.get_device_properties(self.device)
            gpus.append((about.name, about.total_memory, costs[here]))
        self.memory.append(f"{name}: {text}")
        for gpu, size, cost in gpus:
            fixed = state + cost.fixed
            self.memory.append(f"{name}: {plan.fit(gpu, size, fixed, cost.each, share, cfg)}")

    def know_drawing(self, run, cfg, inputs, done, flops):
        """The time of all samples, by passes through the network: without decoding or scoring."""
        twice = getattr(cfg, "sampler", "") in ("heun", "midpoint")
        passes = cfg.sample_steps * (2 if twice else 1)
        if run.net.null and getattr(cfg, "guidance", 0) not in (0, -1):
            passes *= 2
        images = cfg.batch_size // self.processes
        net, given = None, [plan.of_form(form, images, self.device) for form in inputs]
        if self.timed:
            net = self.for_sampling(run.ema.eval())
        with torch.no_grad(), self.autocast():
            times = self.times_of(lambda: net(*given))
        everywhere = images * self.processes
        steps = samples_of(cfg, done) * passes / everywhere
        self.add("drawing", steps, everywhere / passes, flops * everywhere, times)

    # ---- encoding

    def know_latents(self, folder, ds, call, images, views, flops, nbytes):
        """Print and keep what encoding the data set takes; call() encodes `images` of them."""
        self.say_data(ds)
        there = (Path(folder) / "manifest.json").is_file()
        say("latents", f"{plan.size_text(nbytes)}: {'there' if there else 'to do'}")
        everywhere = images * self.processes
        steps = 0 if there else math.ceil(len(ds) * views / everywhere)
        self.add("latents", steps, everywhere, flops * everywhere, self.times_of(call))
        self.disk.append(("latents", nbytes))

    # ---- what is said

    def say_data(self, ds):
        if self.stages:
            return
        classes = f"{ds.num_classes} classes" if ds.num_classes else "no classes"
        (channels, height, width), found = ds.shape, getattr(ds, "manifest", {}).get("folder", "")
        where = f": in {found}" if found else ""
        shape = f"{height}x{width}x{channels}"
        say("data", f"{ds.name}, {len(ds)} images {shape}, {classes}{where}")

    def say_all(self, parts):
        """What is known when all stages have been seen; parts: --accumulate as it was timed."""
        cfg, where = self.cfg, "GPUs" if self.cfg.gpus else "the CPU"
        images = cfg.batch_size // self.processes
        say("processes", f"{self.processes} with {images} images each, on {where}")
        for i, line in enumerate(self.memory):
            say("" if i else "memory each", line)
        sizes = ", ".join(f"{plan.size_text(size)} of {what}" for what, size in self.disk)
        say("disk", f"{plan.size_text(sum(size for _, size in self.disk))}: {sizes}")
        print()
        for line in plan.table(self.stages, cfg.price_per_gpu_hour * self.processes):
            print(line)
        print()
        for line in self.caveats(parts):
            print(line)

    def caveats(self, parts):
        """Lines that say how the figures came, and what is not in them."""
        if self.figures:
            device = "this CPU"
            if self.device.type == "cuda":
                device = torch.cuda.get_device_name(self.device)
            counts = sorted(set(self.figures))
            count = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            yield f"Times: medians of {count} steps on {device}, after some that warmed up."
        if not self.timed:
            yield (
                "No GPU is here: nothing was timed. The hours are what the products alone would "
                f"take GPUs that sustain {plan.SUSTAINED / 1e12:.0f} TFLOP/s each, 30 % of an "
                "H100's bf16 peak: an assumption. Optimizers, small layers and Python take longer."
            )
        if parts != self.cfg.accumulate:
            yield f"Out of memory with --accumulate {self.cfg.accumulate}: timed with {parts}."
        if self.processes > 1:
            yield (
                f"One process with its share of the images stands for all {self.processes}: what "
                "they share, the gradients, takes longer than this."
            )
        yield "FLOPs and estimated memory are the trained network's, without a discriminator's."
        yield "Not in the hours: preparing data, checkpoints, decoding of samples, scoring."


def say(name, text):
    print(f"{name:<12} {text}", flush=True)


def small_half(cfg):
    """Whether a T4 or V100 would compute in 16 bits."""
    return cfg.precision != "fp32"


def bytes_of(facts):
    """Of the tensors in a dictionary, also in those in it."""
    found = [v for v in facts.values() if isinstance(v, torch.Tensor)]
    within = [bytes_of(v) for v in facts.values() if isinstance(v, dict)]
    return sum(v.nbytes for v in found) + sum(within)


def samples_of(cfg, done):
    """How many images a run draws that has `done` so many steps."""

    def times(every):
        return cfg.steps // every - done // every if every else 0

    n, last = len(cli.parse_seeds(cfg.seeds, cfg.n)), cfg.steps
    grids = times(cfg.sample_every) - bool(cfg.sample_every and last % cfg.sample_every == 0)
    end = 0 if getattr(cfg, "stage", "all") != "all" else max(n, getattr(cfg, "n_eval", 0))
    scores = times(getattr(cfg, "metric_every", 0)) * getattr(cfg, "metric_n", 0)
    return max(0, grids) * n + scores + end + getattr(cfg, "pairs", 0)


def rehearse(train, cfg):
    """Call train(cfg, world) with a Rehearsal, and print what it found.

    With more parts of a batch (--accumulate) where the GPU's memory does not suffice; BadInput
    where it does not suffice for one image.
    """
    if not is_first_process():
        return
    processes = process_count(cfg.gpus)
    timed = cfg.gpus == 0 or torch.cuda.is_available()
    device = torch.device("cuda:0" if cfg.gpus and timed else "cpu")
    if device.type == "cuda":
        prefer_speed()
    share, parts = cfg.batch_size // processes, cfg.accumulate
    while True:
        how = {"precision": cfg.precision, "compile": cfg.compile}
        world = Rehearsal(device=device, cfg=cfg, processes=processes, timed=timed, **how)
        quiet = {name: value for name, value in QUIET.items() if hasattr(cfg, name)}
        try:
            train(dataclasses.replace(cfg, **quiet, accumulate=parts), world)
            break
        except Enough:
            break
        except torch.OutOfMemoryError:
            parts *= 2
        if parts > share or cfg.graph:
            hint = "leave out --graph" if cfg.graph else "one image at a time, too, is too much"
            raise BadInput(f"out of the GPU's memory with --batch-size {cfg.batch_size}: {hint}")
        gc.collect()
        torch.cuda.empty_cache()
    world.say_all(parts)
