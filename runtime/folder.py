"""A run directory: config.yaml, log.jsonl, ckpt.pt and the one before it, whole at any time."""

from runtime.checkpoints import DamagedCheckpoint, differing, load_checkpoint, plain
from runtime.commandline import BadInput
from runtime.files import also_named, atomic_write, read_log

import json
import math
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml


class RunFolder:
    """What a run leaves on the disk.

    folder   where it is; BadInput when it cannot be made
    script   name of what trains here; a checkpoint of another name is refused
    config   dataclass or dict of all settings, kept in config.yaml, which --config reads again
    free     names of settings that a run which goes on may change
    made_of  dict of what else decides the weights, such as the data's key; going on compares both
             with those of the checkpoint
    resume   'auto' (continue if there is something to continue), 'never', or a checkpoint's path
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
        tensorboard=False,
    ):
        self.path, self.script, self.world = Path(folder), script, world
        self.kind, self.settings = type(config), plain(config)
        self.config = self.settings | (made_of or {})
        self.free, self.resume, self.keep_every = frozenset(free), resume, keep_every
        self.log_path = self.path / "log.jsonl"
        self.board = None
        self.started, self.seen = time.perf_counter(), None
        if world.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--out {self.path}: {error.strerror}; name a folder") from None
            if tensorboard:
                self.board = summary_writer(self.path)

    def restore(self):
        """The state to continue from, or None for a fresh start; cuts the log back to its step.

        'auto' takes ckpt.pt, or with a warning the one before it when that is damaged. Raises
        BadInput for a checkpoint of another script or configuration, naming what differs, for one
        beyond --steps, and when there are checkpoints but none is whole.
        """
        state = self._choose()
        if state is not None:
            others = differing(state["config"], self.config, self.free, self.kind)
            if others:
                where = self.path if self.resume == "auto" else self.resume
                raise BadInput(
                    f"{where} holds a run of another configuration ({'; '.join(others)}); "
                    "type another --out, or --resume never to start over"
                )
        step, most = state["step"] if state else 0, self.settings.get("steps", math.inf)
        if step > most:
            told = f"--steps {most}: the run in {self.path} is at step {step} already"
            raise BadInput(f"{told}; type at least that, or --resume never to start over")
        if self.world.is_main:
            rows = [row for row in read_log(self.log_path) if row["step"] <= step] if state else []
            for left_over in self.path.glob(".*.tmp*"):
                left_over.unlink()
            for kept in self.path.glob("ckpt-[0-9]*.pt"):  # of a future that is now another
                if int(kept.stem.split("-")[1]) > step and (state or self.resume == "never"):
                    kept.unlink()
            if self.resume not in ("auto", "never"):  # this is where the run is now
                with atomic_write(self.path / "ckpt.pt") as path:
                    shutil.copyfile(self.resume, path)
            with atomic_write(self.log_path) as path:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self._write_config()
        self.world.barrier()
        return state

    def _choose(self):
        if self.resume == "never":
            return None
        if self.resume != "auto":
            return load_checkpoint(self.resume, self.script)
        damaged = None
        for name in ("ckpt.pt", "ckpt-previous.pt"):
            path = self.path / name
            if path.exists():
                try:
                    state = load_checkpoint(path, self.script)
                except DamagedCheckpoint as error:
                    damaged = error
                else:
                    if damaged and self.world.is_main:
                        print(f"warning: {damaged}; going on from {path}", file=sys.stderr)
                    return state
        if damaged:
            raise BadInput(f"{damaged}, and none before it is whole; --resume never starts over")
        return None

    def _write_config(self):
        versions = f"python {platform.python_version()}, torch {torch.__version__}, "
        versions += f"numpy {np.__version__}"
        with atomic_write(self.path / "config.yaml") as path:
            settings = {key: v for key, v in self.settings.items() if key != "config"}
            header = f"# {shlex.join([Path(sys.executable).name, *sys.argv])}\n# {versions}\n"
            path.write_text(header + yaml.safe_dump(settings, sort_keys=False))

    def save(self, step, **state):
        """Write ckpt.pt whole or not at all; the one it replaces stays as ckpt-previous.pt, and
        one at a multiple of keep_every as ckpt-STEP.pt."""
        if not self.world.is_main:
            return
        path, previous = self.path / "ckpt.pt", self.path / "ckpt-previous.pt"
        with atomic_write(path) as temporary:
            made_by = {"script": self.script, "config": self.config, "step": step}
            torch.save(made_by | state, temporary)
            if path.exists():  # a second name for the old file, so that ckpt.pt never is missing
                also_named(path, previous)
        if self.keep_every and step % self.keep_every == 0:
            also_named(path, self.path / f"ckpt-{step:06d}.pt")

    def log(self, step, **values):
        """Append one object to log.jsonl, and to TensorBoard if asked for."""
        if not self.world.is_main:
            return
        with open(self.log_path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in ((n, v) for n, v in values.items() if v is not None):
                self.board.add_scalar(name, value, step)

    def rate(self, images):
        """Images per second since the last call, from the count so far in this process."""
        now = time.perf_counter()
        then, before = self.seen or (self.started, 0)
        self.seen = (now, images)
        return round((images - before) / max(now - then, 1e-9), 1)


def summary_writer(folder):
    """TensorBoard's writer of files into `folder`. Raises BadInput where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs its package: pip install tensorboard") from None
    return SummaryWriter(folder)
