"""Trainings that are killed at random moments, in any stage, end as those that never were.

`make test` kills two chapters once; `make test-all` KILLS times in all (140 unless that is in the
environment), prints how many were tried and lost, and where they came.
"""

from runtime.sums import NOTE

import collections
import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import write_images
from launching import Started
from run_folders import assert_same_tree, saved_step
from tiny_runs import TRAININGS, flags

# What a resumed run must find again, where a chapter has it.
SETTINGS = {
    "dropout": 0.1,
    "ema": (0.9, 0.99),
    "flip": True,
    "steps": 30,
    "save_every": 2,
    "keep_every": 10,
    "sample_every": 5,
    "timesteps": 5,
    "schedule": "cosine",
    "schedule_sampler": "loss-second-moment",
    "model_channels": 8,
    "channel_mult": (1,),
    "ema_lengths": (0.05, 0.1),
    "snapshot_every": 3,
    "ae_steps": 20,
    "prediction": "v",
}
FEW = {"steps": 8, "ae_steps": 4, "keep_every": 4, "sample_every": 0}
EVALUATED = ("ddpm_pixel", "ldm_cfg")
MOST, OF = 15, (0.3, 0.6, 1.0)  # kills of a run, and the part of a whole run before one comes
SCORED = {"metric_every": 10, "metric_n": 20, "n_eval": 20}  # a classifier is trained for these
STEP = 0.002  # seconds between two looks at a process


def start(script, given, folder):
    given = [*given, "--data-root", folder / "prepared", "--out", folder / "run"]
    return Started(script, *given)


def finished(started):
    done = started.wait(300)
    assert done.code == 0, done.err
    return done


def children(process):
    """Of a process, and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            for child in path.read_text().split():
                found += [int(child), *children(int(child))]
    return found


def killed(started, seconds, with_children):
    """Whether it was killed so many seconds after its start; else it had ended by itself."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not started.process.is_alive():
            finished(started)
            return False
        time.sleep(STEP)
    others = children(started.process.pid)
    started.process.kill()
    for other in others if with_children else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    started.process.join()
    started.folder.cleanup()
    for other in others:  # those that go on alone are waited for: the test ends with none
        wait_for(other)
    return started.process.exitcode == -signal.SIGKILL


def wait_for(process, limit=120):
    end = time.monotonic() + limit
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        status = Path(f"/proc/{process}/stat")
        with contextlib.suppress(OSError):
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(STEP)


def stage_of(folder):
    """What a kill has hit, as the files say."""
    run = folder / "run"
    if not list((folder / "prepared").glob("*/manifest.json")):
        return "preparation"
    if (run / "autoencoder").is_dir() and not (run / "latents" / "manifest.json").exists():
        made = (run / "autoencoder" / "reconstructions.json").exists()
        return "latents" if made else "autoencoder"
    if saved_step(run) < SETTINGS["steps"]:
        return "steps" if (run / "ckpt.pt").exists() else "first steps"
    return "samples and scores"


def assert_as_unbroken(whole, broken):
    assert_same_tree(whole / "run", broken / "run")
    for path in (whole / "prepared").rglob("*.npy"):
        other = broken / path.relative_to(whole)
        if path.name in ("images.npy", "labels.npy"):
            assert np.array_equal(np.load(path), np.load(other)), path
    left = [p for p in broken.rglob(".*") if p.suffix != ".lock" or p.parent.name == "run"]
    left = [p for p in left if p.name != NOTE]
    assert not left, left


def chain(script, given, folder, chance, seconds, most):
    """Kill and start again until it has ended by itself, at most so often; the stages that were
    hit."""
    hit = []
    while len(hit) < most:
        moment = chance.uniform(0, seconds)
        if not killed(start(script, given, folder), moment, chance.random() < 0.5):
            return hit
        hit.append(stage_of(folder))
    finished(start(script, given, folder))
    return hit


def unbroken(script, given, folder):
    """How many seconds it takes."""
    began = time.monotonic()
    finished(start(script, given, folder))
    return time.monotonic() - began


QUICK = ("ddpm_pixel", "ldm_cfg")  # in `make test`; one with stages
ALL = [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in TRAININGS]


@pytest.mark.parametrize("script", ALL)
def test_killed_once(script, tiny, tmp_path):
    images = write_images(tmp_path / "images", 64)
    given = [*tiny[script], "--data", images, *flags(script, **SETTINGS | FEW)]
    seconds = unbroken(script, given, tmp_path / "whole")
    chance, broken, hit = random.Random(script), tmp_path, []
    while not hit and seconds > 0.1:  # it may have been slower when its time was taken
        broken, seconds = broken / "broken", 0.6 * seconds
        hit = chain(script, given, broken, chance, seconds, 1)
        assert_as_unbroken(tmp_path / "whole", broken)
    assert hit


@pytest.mark.slow
def test_killed_many_times(tiny, tmp_path, capsys):
    total = int(os.environ.get("KILLS", 140))
    seed = int(os.environ.get("KILLS_SEED", 1))
    chance, hit, lost = random.Random(seed), collections.Counter(), []
    images, whole = write_images(tmp_path / "images", 300), {}
    for script, more in [*((s, {}) for s in TRAININGS), *((s, SCORED) for s in EVALUATED)]:
        given = [*tiny[script], "--data", images, *flags(script, **SETTINGS, **more)]
        folder = tmp_path / f"{script}{'-scored' * bool(more)}"
        whole[folder] = script, given, unbroken(script, given, folder)
    while (tried := sum(hit.values())) < total:
        for folder, (script, given, seconds) in whole.items():
            broken = folder.with_name(f"{folder.name}-{tried}")
            if not (most := min(MOST, total - sum(hit.values()))):
                break
            try:
                found = chain(script, given, broken, chance, chance.choice(OF) * seconds, most)
                hit.update((script, stage) for stage in found)
                assert_as_unbroken(folder, broken)
            except AssertionError as error:
                lost.append(f"{script}, {broken}: {error}")
            else:
                shutil.rmtree(broken)
            with capsys.disabled():
                print(f"\nkills: {sum(hit.values())} tried, {len(lost)} lost; {script}", flush=True)
    by_stage = collections.Counter()
    for (_, stage), count in hit.items():
        by_stage[stage] += count
    by_script = collections.Counter()
    for (script, _), count in hit.items():
        by_script[script] += count
    with capsys.disabled():
        print(f"\nkills: {sum(hit.values())} tried, {len(lost)} lost; {dict(by_script)}")
        print(f"where: {dict(by_stage)}")
    assert not lost, "\n".join(lost)
