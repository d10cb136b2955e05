"""A run directory: config.yaml, log.jsonl and checkpoints that survive a kill."""

import dataclasses
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from runtime.commandline import BadInput, not_given
from runtime.files import also_named, atomic_write
from runtime.training import differing, load_mapped, read_log, summary_writer


class DamagedCheckpoint(BadInput):
    """The file is truncated or garbage; the checkpoint before it may be whole."""


def load_checkpoint(path, script=None, mapped=False):
    """The dictionary that Run.save wrote at `path`, on the CPU.

    Raises BadInput, naming the file, when it is missing or not of `script`, DamagedCheckpoint when
    it cannot be read. It cannot run code. mapped: tensors are read when used, sums not checked.
    """
    if not Path(path).is_file():
        why = "a folder; name its ckpt.pt" if Path(path).is_dir() else "no such file"
        raise BadInput(f"checkpoint {path}: {why}")
    try:
        state = load_mapped(path) if mapped else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or "unreadable").splitlines()[0][:120]
        told = f"checkpoint {path} is truncated or not a checkpoint ({reason})"
        raise DamagedCheckpoint(told) from None
    made_by = state.get("script") if isinstance(state, dict) else None
    if made_by is None or (script is not None and made_by != script):
        whose = f"by {made_by}" if made_by else "by none of these scripts"
        wanted = f"one that {script or 'these scripts'} wrote"
        raise BadInput(f"checkpoint {path} was written {whose}, expected {wanted}")
    return state


def as_trained(cfg, names, script):
    """cfg, but settings `names` that were not given are those that cfg.sample was trained with."""
    trained = load_checkpoint(cfg.sample, script, mapped=True)["config"]
    known = [(name, trained[name]) for name in not_given(cfg, names) if name in trained]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in known}
    return dataclasses.replace(cfg, **given)


class Run:
    """A run directory: config.yaml, log.jsonl, loss.png, ckpt.pt and the checkpoint before it.

    folder   where it is
    script   name of what trains here; a checkpoint of another name is refused
    config   dict of all settings, kept in config.yaml, which --config reads again
    defaults of these: what a checkpoint that knows a setting not yet was trained with
    made_of  dict of what else decides the weights, such as the data's key; resuming compares both
             with those of the checkpoint, but for what is in `FREE`
    resume   'auto' (continue if there is something to continue), 'never', or a checkpoint's path

    Raises BadInput when the folder cannot be made.
    """

    # Settings that a resumed run may change. All but "steps" leave the weights at a given step as
    # they are; where the learning rate falls, other "steps" bend it from there on.
    FREE = frozenset(
        {
            "config",
            "out",
            "stage",
            "resume",
            "gpus",
            "steps",
            "data_root",
            "compile",
            "tensorboard",
            "log_every",
            "save_every",
            "keep_every",
            "sample_every",
            "sample",
            "n",
            "sampler",
            "sample_steps",
            "eta",
            "variance",
            "guidance",
            "guidance_interval",
            "guidance_rescale",
            "seeds",
            "n_eval",
            "accumulate",
            "checkpointing",
            "dry_run",
            "threshold",
            "visit",
            "metric_every",
            "metric_n",
            "nll",
            "export",
            "plot_schedule",
            "shard",
        }
    )

    def __init__(
        self,
        folder,
        script,
        config,
        world,
        *,
        made_of=None,
        resume="auto",
        tensorboard=False,
        defaults=None,
    ):
        self.folder, self.script, self.world = Path(folder), script, world
        plain = json.loads(json.dumps(config))  # lists and numbers, as YAML gives back
        self.defaults = json.loads(json.dumps(defaults or {}))
        self.settings, self.config = plain, plain | (made_of or {})
        self.resume, self.board = resume, None
        self.log_path = self.folder / "log.jsonl"
        self.started, self.seen = time.perf_counter(), None
        if world.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--out {self.folder}: {error.strerror}; name a folder") from None
            if tensorboard:
                self.board = summary_writer(self.folder)

    def restore(self):
        """The state to continue from, or None for a fresh start; cuts the log back to its step.

        'auto' takes ckpt.pt, or with a warning the one before it when that is damaged. Raises
        BadInput for a checkpoint of another script or configuration, naming what differs, and
        when there are checkpoints but none is whole.
        """
        state = self._choose()
        if state is not None:
            theirs, ours = (self.defaults | config for config in (state["config"], self.config))
            others = differing(theirs, ours, self.FREE)
            if others:
                where = self.folder if self.resume == "auto" else self.resume
                raise BadInput(
                    f"{where} holds a run of another configuration ({'; '.join(others)}); "
                    "type another --out, or --resume never to start over"
                )
        step = state["step"] if state else 0
        if self.world.is_main:
            rows = [row for row in read_log(self.log_path) if row["step"] <= step] if state else []
            for left_over in self.folder.glob(".*.tmp*"):
                left_over.unlink()
            for kept in self.folder.glob("ckpt-[0-9]*.pt"):  # of a future that is now another
                if int(kept.stem.split("-")[1]) > step and (state or self.resume == "never"):
                    kept.unlink()
            if self.resume not in ("auto", "never"):  # this is where the run is now
                with atomic_write(self.folder / "ckpt.pt") as path:
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
            path = self.folder / name
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
        with atomic_write(self.folder / "config.yaml") as path:
            settings = {key: v for key, v in self.settings.items() if key != "config"}
            header = f"# {shlex.join([Path(sys.executable).name, *sys.argv])}\n# {versions}\n"
            path.write_text(header + yaml.safe_dump(settings, sort_keys=False))

    def save(self, step, **state):
        """Write ckpt.pt whole or not at all; the one it replaces stays as ckpt-previous.pt, and
        one at a multiple of the setting keep_every as ckpt-STEP.pt."""
        if not self.world.is_main:
            return
        path, previous = self.folder / "ckpt.pt", self.folder / "ckpt-previous.pt"
        with atomic_write(path) as temporary:
            told = {"script": self.script, "config": self.config, "step": step}
            torch.save(told | state, temporary)
            if path.exists():  # a second name for the old file, so that ckpt.pt never is missing
                also_named(path, previous)
        every = self.settings.get("keep_every")
        if every and step % every == 0:
            also_named(path, self.folder / f"ckpt-{step:06d}.pt")

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
        now, (then, before) = time.perf_counter(), self.seen or (self.started, 0)
        self.seen = (now, images)
        return round((images - before) / max(now - then, 1e-9), 1)
