"""A run directory: config.yaml, log.jsonl, ckpt.pt and the one before it, whole at any time; and
pictures, and report.html, which shows them."""

from runtime.checkpoints import (
    DamagedCheckpoint,
    NotRead,
    differing,
    identity,
    load_checkpoint,
    plain,
)
from runtime.commandline import BadInput
from runtime.files import (
    Unwritable,
    also_named,
    atomic_write,
    flush,
    left_over,
    read_run_log,
    temporary_of,
    writing,
)

import atexit
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

STEP = r"(\d{6,})"  # in names of what is of a step
OF_STEPS = ("ckpt-{}.pt", "samples-{}.png")
DEFAULTS = "# The rest is as by default."  # in config.yaml, between what is not and what is


class RunFolder:
    """What a run leaves on the disk.

    folder   where it is; BadInput when it cannot be made
    script   name of what trains here; a checkpoint of another name is refused
    config   dataclass or dict of all settings, kept in config.yaml, which --config reads again
    free     names of settings that a run which goes on may change
    made_of  dict of what else decides the weights, such as the data's key; going on compares both
             with those of the checkpoint
    resume   'auto' (continue if there is something to continue), 'never', or a checkpoint's path
    track    names of the trackers that are told what is logged: see runtime/trackers.py
    about    a line on what is trained, of what, for config.yaml and report.html
    """

    def __init__(
        self,
        folder,
        script,
        config,
        world,
        *,
        free=frozenset(),
        made_of=None,
        resume="auto",
        keep_every=0,
        track=(),
        about="",
    ):
        self.path, self.script, self.world = Path(folder), script, world
        self.kind, self.settings = type(config), plain(config)
        self.config = self.settings | (made_of or {})
        self.free, self.resume, self.keep_every = frozenset(free), resume, keep_every
        self.log_path = self.path / "log.jsonl"
        self.track, self.trackers, self.about, self.logged = track, [], about, 0
        self.started, self.seen = time.perf_counter(), None
        self.origin, self.fallen_back, self.pin = None, False, None
        if world.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--out {self.path}: {error.strerror}; name a folder") from None
            world.ends.append(self.finish)

    def restore(self):
        """The state to continue from, or None for a fresh start; cuts the log back to its step.

        'auto' takes ckpt.pt, or with a warning the one before it when that is damaged. So does a
        path from which the run here went on before. Raises BadInput while another process trains
        here, for a checkpoint of another script or configuration, naming what differs, for one
        beyond --steps, and when there are checkpoints but none is whole.
        """
        if self.world.is_main:
            from runtime import foreign
            from runtime.locks import hold

            foreign.check_names(self.path)
            hold(self.path)
        state, named = self._choose()
        self.world.barrier()  # all have read it before there is another
        step = state["step"] if state else 0
        self._check_settings(state, step)
        if self.world.is_main:
            ours = foreign.is_of_run(self.path) or bool(state and not named)
            rows = read_run_log(self.log_path) if state and ours else []
            rows = [row for row in rows if row["step"] <= step]
            if not ours:
                foreign.set_aside(self.path, self._is_asked_for)
            self._write_config()  # at once: from now on the folder is of a run
            if named:  # this is where the run is now
                with writing(self.path / "ckpt.pt"):
                    flush(self.pin)
                    os.replace(self.pin, self.path / "ckpt.pt")
            elif self.pin:
                self.pin.unlink(missing_ok=True)
            for path in left_over(self.path):
                path.unlink(missing_ok=True)
            if state or self.resume == "never":  # of a future that is now another
                for kind in OF_STEPS:
                    for at, path in of_steps(self.path, kind).items():
                        if at > step and not self._is_asked_for(path):
                            path.unlink()
            if self.resume == "never":  # the last one goes last: until then it is the old run
                for name in ("ckpt-previous.pt", "ckpt.pt"):
                    (self.path / name).unlink(missing_ok=True)
            if self.fallen_back:  # else the next save would name the damaged one as the one before
                also_named(self.path / "ckpt-previous.pt", self.path / "ckpt.pt")
            if state and step not in of_steps(self.path, "ckpt-{}.pt"):
                self._keep(step)  # a kill came before it had its second name
            with atomic_write(self.log_path) as path:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.logged = step
            if self.track:
                from runtime.trackers import opened

                self.trackers = opened(self.track, self.path, self.settings, step)
        self.world.barrier()
        return state

    def _check_settings(self, state, step):
        """BadInput where a run of these settings does not go on from this state, of this step."""
        others = differing(state["config"], self.config, self.free, self.kind) if state else ()
        if others:
            where = self.path if self.resume == "auto" else self.resume
            raise BadInput(
                f"{where} holds a run of another configuration ({'; '.join(others)}); "
                "type another --out, or --resume never to start over"
            )
        if step > (most := self.settings.get("steps", math.inf)):
            told = f"--steps {most}: the run in {self.path} is at step {step} already"
            raise BadInput(f"{told}; type at least that, or --resume never to start over")

    def _is_asked_for(self, path):
        return path.resolve() == Path(self.resume).resolve()

    def _choose(self):
        """(the state to continue from or None, whether that is in the checkpoint --resume names)"""
        if self.resume == "never":
            return None, False
        if self.resume == "auto":
            return self._gone_on(*self._last()), False
        own = None, None
        try:
            own = self._last()
        except NotRead:
            raise
        except BadInput:  # whatever lies here, PATH is asked for
            pass
        with self._pinned() as path:
            self.origin = identity(path)
            if not own[0] or own[0].get("resumed") != self.origin:
                state = load_checkpoint(path, self.script)
                state.path = self.resume
                return state, True
        if self.world.is_main:
            told = f"this run went on from {self.resume} before, to step {own[0]['step']}: it goes"
            print(f"note: {told} on there; to start there again, remove {self.path}/ckpt*.pt")
        return self._gone_on(*own), False

    @contextlib.contextmanager
    def _pinned(self):
        """A copy, here, of the file that --resume names: a training that still runs replaces it."""
        with self.world.from_first(self.resume) as path:
            load_checkpoint(path, self.script, facts=True)
        self.pin = temporary_of(self.path / "ckpt.pt", ".pinned")
        if self.world.is_main:
            atexit.register(self.pin.unlink, missing_ok=True)  # also where this run is refused
            with writing(self.pin):
                shutil.copyfile(self.resume, self.pin)
        self.pin = Path(self.world.gather(str(self.pin))[0])
        try:
            with self.world.from_first(self.pin) as path:
                yield path
        except BadInput as error:
            raise type(error)(str(error).replace(str(path), str(self.resume))) from None

    def _last(self):
        """(the last whole state here, None without any; the fault of the one after it, or None)"""
        damaged = None
        for name in ("ckpt.pt", "ckpt-previous.pt"):
            with self.world.from_first(self.path / name) as path:
                if path.exists():
                    try:
                        return load_checkpoint(path, self.script), damaged
                    except DamagedCheckpoint as error:
                        damaged = error
        if not damaged:
            return None, None
        for path in reversed(of_steps(self.path, "ckpt-{}.pt").values()):
            try:
                load_checkpoint(path, self.script, mapped=True)
            except DamagedCheckpoint:
                continue
            raise BadInput(f"{damaged}; to go on from an older one: --resume {path}")
        raise BadInput(f"{damaged}, and none before it is whole; --resume never starts over")

    def _gone_on(self, state, damaged):
        """The state, from which this run goes on though the checkpoint after it is damaged."""
        if state:
            self.origin, self.fallen_back = state.get("resumed"), bool(damaged)
        if damaged and self.world.is_main:
            print(f"warning: {damaged}; going on from {state.path}", file=sys.stderr)
        return state

    def _write_config(self):
        """config.yaml: how it was made, as comments, and the settings, those first that differ from
        the defaults of their dataclass."""
        versions = f"python {platform.python_version()}, torch {torch.__version__}, "
        versions += f"numpy {np.__version__}"
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        told = [command, versions, machine(self.world), *filter(None, [self.about])]
        header = "".join(f"# {' '.join(line.splitlines())}\n" for line in told)
        settings = {key: v for key, v in self.settings.items() if key != "config"}
        usual = usual_settings(self.kind)
        others = {k: v for k, v in settings.items() if k not in usual or usual[k] != v}
        rest = {k: v for k, v in settings.items() if k not in others}
        parts = [yaml.safe_dump(part, sort_keys=False) for part in (others, rest) if part]
        with atomic_write(self.path / "config.yaml") as path:
            path.write_text(header + f"{DEFAULTS}\n".join(parts if others else ["", *parts]))

    def save(self, step, **state):
        """Write ckpt.pt whole or not at all; the one it replaces stays as ckpt-previous.pt, and
        one at a multiple of keep_every as ckpt-STEP.pt."""
        if not self.world.is_main:
            return
        from runtime.locks import check_held

        check_held(self.path)
        path, previous = self.path / "ckpt.pt", self.path / "ckpt-previous.pt"
        with atomic_write(path) as temporary:
            made_by = {"script": self.script, "config": self.config, "step": step}
            made_by |= {"resumed": self.origin} if self.origin else {}
            torch.save(made_by | state, temporary)
            if path.exists():  # a second name for the old file, so that ckpt.pt never is missing
                also_named(path, previous)
        self._keep(step)

    def _keep(self, step):
        """Give the checkpoint of this step its name that stays, where it shall have one."""
        if self.keep_every and step % self.keep_every == 0:
            also_named(self.path / "ckpt.pt", self.path / f"ckpt-{step:06d}.pt")

    def log(self, step, **values):
        """Append one object to log.jsonl, and tell the trackers."""
        if not self.world.is_main:
            return
        with writing(self.log_path), open(self.log_path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        self.logged = step
        self._tell("log", step, values)

    def _tell(self, what, *about):
        if self.trackers:
            from runtime.trackers import tell

            tell(self.trackers, what, *about)

    @contextlib.contextmanager
    def last_words(self, step):
        """BadInput raised inside ends the run: the log and report.html say why."""
        try:
            yield
        except BadInput as error:
            with contextlib.suppress(Unwritable):
                self.log(step, stopped=str(error))
            self.report()
            raise

    def show(self, step, images, columns):
        """samples-STEP.png of images uint8 (N,H,W,C), for trackers, too."""
        if self.world.is_main:
            from runtime.pictures import save_grid

            path = self.path / f"samples-{step:06d}.png"
            save_grid(images, path, columns)
            self._tell("show", step, "samples", path)

    def report(self):
        """report.html of what lies here now."""
        if self.world.is_main:
            from runtime.report import refresh

            refresh(self.path)

    def finish(self):
        """What is due when all of the run is done: report.html, its last grid for the trackers."""
        self.report()
        last = self.path / "samples.png"
        if last.is_file():
            self._tell("show", self.logged, "samples", last)
        self._tell("close")
        self.trackers = []
        self.leave()

    def leave(self):
        """Let another process train here."""
        from runtime.locks import leave

        leave(self.path)

    def rate(self, images):
        """Images per second since the last call, from the count so far in this process."""
        now = time.perf_counter()
        then, before = self.seen or (self.started, 0)
        self.seen = (now, images)
        return round((images - before) / max(now - then, 1e-9), 1)


def of_steps(folder, kind):
    """{step: path} of the files in `folder` that a run names so, of kind "ckpt-{}.pt"."""
    return {step: path for step, path in matching(folder, kind).items() if path.is_file()}


def matching(folder, kind):
    """As of_steps, of all that has such a name; {} where there is no folder."""
    kind, folder = re.compile(kind.replace(".", r"\.").format(STEP)), Path(folder)
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    found = {path: kind.fullmatch(path.name) for path in paths}
    return {int(name[1]): path for path, name in found.items() if name}


def usual_settings(kind):
    """{name: default} of a dataclass, as YAML gives them; {} for another class."""
    if not dataclasses.is_dataclass(kind):
        return {}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    made = {n: f.default_factory() for n, f in fields.items() if callable(f.default_factory)}
    given = {n: f.default for n, f in fields.items() if f.default is not dataclasses.MISSING}
    return plain(given | made)


def about(ds, net):
    """A line on the images of a data set, and on a network."""
    shape, classes = "x".join(map(str, ds.shape)), ds.num_classes
    count = sum(p.numel() for p in net.parameters()) / 1e6
    told = f"{len(ds)} images {shape}" + f", {classes} classes" * bool(classes)
    return f"{ds.name}: {told}; {count:.2f} M parameters"


def machine(world):
    """A line on what computes: processors, and GPUs where the run has some."""
    lines = []
    with contextlib.suppress(OSError):  # there is no such file on a Mac
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = next(filter(None, models), platform.processor() or platform.machine())
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    told = f"{model}, {cores} core{'s' * (cores != 1)}, {platform.system()}"
    if world.device.type == "cuda":
        told = f"{world.size} x {torch.cuda.get_device_name(world.device)}; {told}"
    return told + f"; {world.size} process{'es' * (world.size > 1)}"


def peak_memory(device):
    """The most memory this process has held so far, in MB: on its GPU, or on the CPU in all."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
