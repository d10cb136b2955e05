"""CIFAR-10 in as many minutes as there are: chapter 1's 35.7 M parameter U-Net on one GPU.

    python bench/gpu_train.py --data cifar10-jpeg.zip --minutes 9 --out gpu-train
    python bench/gpu_train.py --join gpu-train --out ckpt.pt        what it left, as a checkpoint
    python bench/gpu_train.py --rehearse --out DIR                  all of it on a CPU, tiny

All work is done by the commands that anybody would type: a short ddpm_pixel.py tells the rate, a
long one trains for the steps that fit, ddim.py draws 1,000 images in 50 steps, eval_fid.py scores
them by a classifier of the data set. Every row is in OUT/results.jsonl once it is known. Once a
minute the running mean of the weights is in OUT, in fp16, in parts below 16 MB: it may be killed at
any moment. Started again with the same --out and --work it goes on.

OUT then holds results.jsonl, gpu_train.md, loss.png, samples.png (all images, two rows a class) and
the parts; --work, which may be large, the run itself.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where files would hide modules of their names

from bench import wheels  # noqa: E402

wheels.unpack()

from runtime.commandline import BadInput, at_home, entry  # noqa: E402
from runtime.files import read_log  # noqa: E402

import json  # noqa: E402
import zipfile  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from bench import gpu_parts  # noqa: E402
from bench.gpu_rows import Job, append, failures, is_done, latest, narrow, read, tail  # noqa: E402

CONFIG = REPO / "configs" / "cifar10_ddpm.yaml"
# Beyond the paper's settings: labels, and what suits minutes in place of days.
SETTINGS = "--class-cond --lr-decay cosine --warmup 500 --lr 4e-4 --ema 0.9995 --sample-every 0"
TINY = (
    "--class-cond --model-channels 16 --channel-mult 1 2 --num-res-blocks 1 --warmup 2 "
    "--attention-resolutions 8 --sample-every 0 --ema 0.9"
)
STAGES = ("data", "trial", "train", "samples", "scores", "joined")
TRIALS = {
    "eager": ["--no-graph"],
    "graph": ["--graph"],
}  # ways to train, of which the faster one is taken
LEAST = 60.0  # seconds that sampling and scoring take beside what is estimated for them


class Plan:
    """What is run: on a GPU, or tiny in a rehearsal."""

    def __init__(self, args):
        self.args, small = args, args.rehearse
        self.data, self.work = args.data or toy(args.work / "toy.zip"), args.work
        self.settings = TINY.split() if small else ["--config", str(CONFIG), *SETTINGS.split()]
        self.batch = 8 if small else args.batch_size
        self.trial_steps, self.log_every = (6, 2) if small else (200, 20)
        self.images, self.sample_steps = (24, 3) if small else (1000, 50)
        self.least, self.most = (1.0, 24) if small else (LEAST, 10**9)
        self.end = time.monotonic() + 60 * args.minutes

    @property
    def left(self):
        return self.end - time.monotonic()

    def train(self, folder, steps, log_every, save_every, *more):
        """The command line of a training."""
        flags = ["--data", self.data, "--data-root", self.work / "data", "--out", folder]
        flags += ["--steps", steps, "--batch-size", self.batch, "--n", 10, "--sample-steps", 10]
        flags += ["--log-every", log_every, "--save-every", save_every]
        return command("ddpm_pixel.py", *self.settings, *flags, *more)


def toy(path, classes=4, train=12, test=10, side=16):
    """A zip as that of CIFAR-10, of noise in a colour for each class, for a rehearsal."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train), ("test", test)):
            for label in range(classes):
                for i in range(count):
                    pixels = rng.integers(60, size=(side, side, 3)) + 40 * np.array([label, 2, 1])
                    with archive.open(f"{split}/{label}/{i:04d}.jpg", "w") as file:
                        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return path


def command(script, *flags):
    return [sys.executable, str(REPO / script), *map(str, flags)]


def steps_for(seconds, rate, batch, every):
    """How many steps, a multiple of `every`, `seconds` are enough for; rate: images a second.

    A twentieth is kept for checkpoints.
    """
    return max(1, int(0.95 * seconds * rate / batch) // every) * every


class OutOfTime(RuntimeError):
    """A command was stopped because there was no time for more."""


def run(plan, line, watch=lambda: None, kept=0.0):
    """The seconds that a command takes. RuntimeError if it fails, OutOfTime if it is stopped.

    It is stopped when only `kept` seconds are left. watch() is called once a second. What the
    command prints goes to WORK/log.txt.
    """
    with open(plan.work / "log.txt", "a") as log:
        print("==", *line[1:], file=log, flush=True)
        start = time.monotonic()
        process = subprocess.Popen(line, stdout=log, stderr=log, cwd=REPO, preexec_fn=os.setpgrp)
        code = None
        try:
            while code is None and plan.left > kept:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(1)
                watch()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None:
        raise OutOfTime(f"{Path(line[1]).name}: no time was left for more")
    if code != 0:
        tail(plan.work / "log.txt")
        raise RuntimeError(f"{Path(line[1]).name}: exit code {code}")
    return time.monotonic() - start


# -------------------------------------------------------------------------------------- the stages


def data(job, plan):
    """The training images as a memory map, apart from the trial, whose start is timed."""
    with job.row("prepared", "train") as row:
        flags = ["--data", plan.data, "--data-root", plan.work / "data"]
        row["seconds"] = run(plan, [sys.executable, "-m", "image_data", *map(str, flags)])


def trial(job, plan):
    """The rate of each way to train: images a second, all that a step has included."""
    for name, flags in TRIALS.items():
        with job.row("rate", name) as row:
            folder = plan.work / f"trial-{name}"
            steps, flags = plan.trial_steps, ["--resume", "never", *flags]
            seconds = run(plan, plan.train(folder, steps, plan.log_every, steps, *flags))
            rows = [r for r in read_log(folder / "log.jsonl") if "images_per_s" in r]
            rates = [r["images_per_s"] for r in rows[len(rows) // 2 :]]
            row |= {"images_s": statistics.median(rates), "batch": plan.batch}
            row |= {"peak_mb": rows[-1]["peak_memory_mb"], "seconds": seconds}
            row["start_s"] = max(0.0, seconds - steps * plan.batch / row["images_s"])


def planned(job, plan):
    """(flags of the faster way, its steps, steps between checkpoints, seconds that are kept for
    what comes after the training). A run that goes on has the steps that it began with."""
    found = latest(read(job.out), "trial")
    if not (known := {of[1]: row for of, row in found.items() if "images_s" in row}):
        raise RuntimeError("no trial gave a rate")
    name = max(known, key=lambda name: known[name]["images_s"])
    rate, start = known[name]["images_s"], known[name]["start_s"]
    minute = steps_for(60, rate, plan.batch, plan.log_every)
    before = latest(read(job.out), "train").get(("plan",))
    # Three commands start after it; a network evaluated is about a third of a training step.
    after = plan.least + 3 * start + plan.images * plan.sample_steps / (3 * rate)
    if before:
        return TRIALS[before["way"]], before["steps"], minute, after
    steps = steps_for(plan.left - after - start, rate, plan.batch, plan.log_every)
    steps = min(steps, plan.most)
    job.say("plan", way=name, steps=steps, images_s=rate, kept_s=after)
    return TRIALS[name], steps, minute, after


class Watch:
    """Of a training: its log as rows, and at each checkpoint the parts and the loss curve."""

    def __init__(self, job, folder):
        self.job, self.folder, self.told, self.seen = job, folder, 0, None
        self.step = 0  # of the checkpoint whose parts are written

    def __call__(self):
        rows = [r for r in read_log(self.folder / "log.jsonl") if "loss" in r]
        known = {int(of[1]) for of in latest(read(self.job.out), "train") if of[0] == "step"}
        for row in rows[self.told :]:
            if row["step"] not in known:
                names = {"loss": "loss", "images_per_s": "images_s", "peak_memory_mb": "peak_mb"}
                values = {new: row[old] for old, new in names.items()}
                self.job.say("step", row["step"], **values, time=time.time())
        self.told = len(rows)
        path = self.folder / "ckpt.pt"
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns != self.seen:
                self.seen = path.stat().st_mtime_ns
                parts = gpu_parts.split(path, self.job.out)
                self.step = int(parts[0].name.split("-")[1])
                size = sum(part.stat().st_size for part in parts)
                self.job.say("weights", of_step=self.step, bytes=size, parts=len(parts))
                draw_loss(self.job.out, rows)


def draw_loss(out, rows):
    from runtime.plots import plot_lines

    names = [name for name in ("loss", *(f"loss_q{i}" for i in range(1, 5))) if name in rows[-1]]
    steps = [row["step"] for row in rows]
    lines = {name: (steps, [row.get(name) for row in rows]) for name in names}
    plot_lines(out / "loss.png", {"loss": lines}, xlabel="step", logy=("loss",))


def train(job, plan):
    """The long run. Where it is stopped for the time, its last checkpoint counts."""
    flags, steps, minute, after = planned(job, plan)
    folder = plan.work / "run"
    watch, line = Watch(job, folder), plan.train(folder, steps, plan.log_every, minute, *flags)
    with job.row("whole") as row:
        start = time.monotonic()
        try:
            run(plan, line, watch, 0.8 * after)
        except OutOfTime:
            if not (folder / "ckpt.pt").exists():
                raise
            row["stopped"] = True
        watch()
        row |= {"seconds": time.monotonic() - start, "of_step": watch.step}
        row |= {"steps": steps, "images": watch.step * plan.batch}


def samples(job, plan):
    """Images of the running mean, by DDIM; samples.png shows all, two rows a class."""
    with job.row("DDIM", f"{plan.sample_steps} steps") as row:
        flags = ["--sample", plan.work / "run" / "ckpt.pt", "--n", plan.images, "--out", plan.work]
        flags += ["--sample-steps", plan.sample_steps, "--batch-size", min(500, plan.images)]
        row["seconds"] = run(plan, command("ddim.py", *flags))
        row["images"] = plan.images
        sheet(plan.work / "samples.npz", job.out / "samples.png")


def sheet(path, picture):
    """All samples of an .npz, sorted by label, two rows a class."""
    from runtime.pictures import save_grid

    with np.load(path) as file:
        images, labels = file["arr_0"], file.get("arr_1")
    if labels is not None:
        images = images[np.argsort(labels, kind="stable")]
    rows = 2 * len(np.unique(labels)) if labels is not None else 20
    save_grid(images, picture, columns=-(-len(images) // rows))


def scores(job, plan):
    """By a classifier of the data set: of the samples, then as many training images, the floor."""
    metrics, steps = ("frechet,is,kid,prdc,classes", 1500)
    if plan.args.rehearse:
        metrics, steps = "frechet,classes", 4
    n = plan.images
    reference = f"{plan.data}:test"
    sides = {
        "samples": [plan.work / "samples.npz", reference],
        "training images": [f"{plan.data}:train", reference, "--n", n],
    }
    for name, side in sides.items():
        with job.row(name) as row:
            found = plan.work / f"scores-{name.split()[0]}.json"
            flags = ["--features", "classifier", "--classifier-steps", steps, "--json", found]
            flags += ["--metrics", metrics, "--data-root", plan.work / "data"]
            row["seconds"] = run(plan, command("eval_fid.py", *side, *flags))
            figures = json.loads(found.read_text())
            row |= {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            row["features"] = figures.get("features", "")


def joined(job, plan):
    """The parts once more as a checkpoint: are they its running mean, and does a CPU sample it?"""
    from runtime.checkpoints import load_checkpoint

    with job.row("parts, apart from the mean") as row:
        state = gpu_parts.join_into(job.out, plan.work / "joined.pt")
        mean = load_checkpoint(plan.work / "run" / "ckpt.pt", mapped=True)["ema"]
        rounded = {name: t.half().float() for name, t in mean.items()}
        row["apart"] = max((state["ema"][n] - rounded[n]).abs().max().item() for n in rounded)
        row["right"] = row["apart"] == 0
    with job.row("two images on the CPU") as row:
        flags = ["--sample", plan.work / "joined.pt", "--n", 2, "--sample-steps", 4, "--gpus", 0]
        row["seconds"] = run(plan, command("ddim.py", *flags, "--out", plan.work / "joined"))


# ------------------------------------------------------------------------------------------- main


def markdown(rows):
    lines = ["# Chapter 1 on CIFAR-10, as far as a GPU gets in minutes", ""]
    if any(row.get("rehearsed") for row in rows):
        lines += ["**A rehearsal on a CPU: no number here means anything.**", ""]
    if failed := failures(rows, STAGES):
        lines += ["## What failed", "", *failed, ""]
    for stage in STAGES:
        found = latest(rows, stage)
        steps = [of for of in found if of[0] == "step"]
        for of in steps[:-1]:
            if steps.index(of) % max(1, len(steps) // 20):
                del found[of]
        if found:
            lines += [f"## {stage}", "", *narrow(found, ("what", "of")), ""]
    return "\n".join(lines)


def folder_at_home(text):
    return Path(at_home(text))


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=folder_at_home, required=True, help="folder of what is kept")
    parser.add_argument(
        "--data", type=at_home, default="", help="a zip of train/CLASS/*.jpg and test/CLASS/"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in which it ends")
    parser.add_argument(
        "--work", type=folder_at_home, default=REPO / "runs" / "gpu-train", help="the run"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="of training")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny network")
    parser.add_argument(
        "--join", type=at_home, default="", help="folder with parts, to write as --out, a .pt"
    )
    args = parser.parse_args(arguments)
    if not args.minutes > 0 or args.batch_size < 1:
        raise BadInput("--minutes and --batch-size must be greater than 0")
    if args.join and args.out.suffix != ".pt":
        raise BadInput(f"--join writes a checkpoint: expected --out to end in .pt, got {args.out}")
    if not (args.join or args.rehearse or Path(args.data or "-").exists()):
        raise BadInput(f"--data {args.data or 'is missing'}: expected a zip of images in classes")
    return args


def main(arguments=None):
    args = parse(arguments)
    if args.join:
        state = gpu_parts.join_into(args.join, args.out)
        return print(f"{args.out}: step {state['step']}; python ddim.py --sample {args.out}")
    import torch

    if not (args.rehearse or torch.cuda.is_available()):
        raise BadInput("there is no GPU here; type --rehearse to walk through all on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no command outlives it
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(args)
    if args.rehearse and not read(args.out):
        append(args.out, stage="", rehearsed=True)
    for name in STAGES:
        work_on(Job(name, args.out, args.rehearse), plan)
        (args.out / "gpu_train.md").write_text(markdown(read(args.out)))
    rows = read(args.out)
    print(f"{args.out / 'gpu_train.md'}\n\n{markdown(rows)}")
    whole = all(is_done(rows, name) for name in STAGES)
    return sys.exit(0 if whole and not failures(rows, STAGES) else 1)


def work_on(job, plan):
    """A stage, unless it is finished; what fails in it leaves its row, and the next one begins."""
    if is_done(read(job.out), job.stage):
        return print(f"{job.stage}: finished before", flush=True)
    start = time.monotonic()
    try:
        globals()[job.stage](job, plan)
    except Exception as error:
        append(job.out, stage=job.stage, ended=f"{type(error).__name__}: {error}"[:200])
    seconds = time.monotonic() - start
    rows = read(job.out)
    if not any(r["stage"] == job.stage and "ended" in r for r in rows[-1:]):
        failed = any("failed" in row for row in latest(rows, job.stage).values())
        append(job.out, stage=job.stage, **({} if failed else {"done": True}), seconds=seconds)
    print(f"{job.stage}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    entry(main)
