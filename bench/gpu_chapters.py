"""The stage `chapters` of bench/gpu.py: every command of the book once, as small as --smoke."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LIMIT = 150  # seconds of a command
TOGETHER = 4  # commands at a time, for nothing is timed here

FIRST = ("ddpm_pixel",)  # by itself: it prepares the data that all share
TRAININGS = (
    "improved_ddpm",
    "edm",
    "classifier_guidance",
    "autoencoder --discriminator 0.5 --disc-start 1",
    "ldm_cfg",
    "ldm_cfg --model sd",
    "dit",
    "flow_matching",
)
OTHERS = (  # {CHAPTER} is the checkpoint of the line above that has only this name
    "ddim --sample {ddpm_pixel}",
    "ddim --encode {ddpm_pixel}",
    "dpm_solver --sample {ddpm_pixel}",
    "improved_ddpm --nll {improved_ddpm}",
    "edm --sample {ddpm_pixel}",
    "classifier_guidance --sample {improved_ddpm} --classifier {classifier_guidance}",
    "ldm_cfg --sample {ldm_cfg} --guidance 2",
    "dit --sample {dit} --guidance 2",
    "flow_matching --sample {ddpm_pixel}",
    "flow_matching --nll {flow_matching}",
    "flow_matching --interpolate {flow_matching}",
    "flow_matching --latents {ldm_cfg}",
    "rectified_flow --flow {flow_matching}",
    "compare_samplers {ddpm_pixel}",
    "eval_fid {ddpm_pixel}",
    "stable_diffusion",
)


def arguments(line, folder, rehearse):
    """The command line of one of those above, in `folder`: words."""
    script, *flags = line.split()
    runs = {name: folder / name / "ckpt.pt" for name in (*FIRST, *TRAININGS)}
    flags = [flag.format(**runs) for flag in flags]
    out = folder / "-".join(word.strip("{}-") for word in line.split())
    flags += ["--smoke", "--gpus", "0" if rehearse else "1", "--out", str(out)]
    return [sys.executable, str(REPO / f"{script}.py"), *flags]


def run(job, folder, line):
    """The row of a command: whether it came to its end, and if not, what it said last."""
    began = time.monotonic()
    with job.row(line) as row:
        command = arguments(line, folder, job.rehearse)
        how = {"cwd": folder, "text": True, "capture_output": True, "timeout": LIMIT}
        done = subprocess.run(command, **how)
        print(line, done.stdout, done.stderr, sep="\n", flush=True)
        row |= {"right": done.returncode == 0, "seconds": time.monotonic() - began}
        if done.returncode:
            row["last"] = (done.stderr.strip().splitlines() or [""])[-1][:200]


def chapters(job):
    """Does every chapter run on this device, in 16 bits and in graphs, as they do by themselves?"""
    together = min(TOGETHER, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(together) as pool:
        for lines in (FIRST, TRAININGS, OTHERS):
            list(pool.map(lambda line: run(job, Path(name), line), lines))
