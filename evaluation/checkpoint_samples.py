"""Samples of a checkpoint: its own script draws them, once; they are kept beside it."""

from runtime import checkpoints
from runtime.commandline import BadInput
from runtime.files import locked, temporary_of, writing
from runtime.folder import of_steps
from runtime.processes import run_alone, say_once

import ast
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from image_data import datasets

ROOT = Path(__file__).resolve().parent.parent  # where the scripts lie


def is_checkpoint(name):
    return name.endswith(".pt")


def takes_sample(path):
    """Whether the script at `path` samples its own checkpoints. It is not run.

    Its class Config then has a field `sample`, and none for a `classifier`, which draws nothing.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
            names = {field.id for field in fields if isinstance(field, ast.Name)}
            return "sample" in names and "classifier" not in names
    return False


def samplers():
    """The stems of the scripts beside eval_fid.py that draw samples of a checkpoint."""
    return [path.stem for path in sorted(ROOT.glob("*.py")) if takes_sample(path)]


def checkpoint_settings(path):
    """(script, settings) of a checkpoint: the stem of the script that samples it, and its run's.

    Only a script beside eval_fid.py that takes --sample is believed. Raises BadInput for any other
    name, and for a checkpoint that names no data set to compare its samples with.
    """
    state = checkpoints.load_checkpoint(path, facts=True)
    script = state["script"]
    beside = ROOT / f"{script}.py"
    if not (script.isidentifier() and beside.is_file() and takes_sample(beside)):
        wanted = " or ".join(f"{name}.py" for name in samplers())
        raise BadInput(f"{path} was written by {script}, which draws no samples: {wanted}")
    if not state.get("config", {}).get("data"):
        raise BadInput(f"{path} names no data set; draw samples with {script}.py --sample {path}")
    return script, state["config"]


def class_names(path):
    """The names of a checkpoint's classes, in the order of its labels; None where it has none."""
    return tuple(checkpoints.load_checkpoint(path, facts=True).get("class_names", ())) or None


def shape(path):
    """(C, H, W) of the images that a checkpoint draws."""
    return tuple(checkpoints.load_checkpoint(path, facts=True)["shape"])


def as_trained(cfg, checkpoint):
    """cfg, but what is not typed is as the checkpoint was trained: B, its size and classes.

    BadInput where B is not typed, and other images lie at its path than the checkpoint knows; and
    for another --size than its samples', before any is drawn.
    """
    _, trained = checkpoint_settings(checkpoint)
    cfg = checkpoints.as_trained(cfg, ("size", "classes", "data_root"), checkpoint)
    _, *sides = shape(checkpoint)
    if cfg.size and {*sides} != {cfg.size}:
        drawn = "x".join(map(str, sides))
        raise BadInput(f"--size {cfg.size}: {checkpoint} draws images of {drawn}; leave it out")
    if not cfg.b:
        data = checkpoints.TrainedOn.of(trained)
        data.checkpoint = checkpoint
        datasets.check_trained_on(data, cfg.data_root, f"{data}:test as B")
    return replace(cfg, b=cfg.b or f"{trained['data']}:test")


def meant(name):
    """The last checkpoint of a run whose folder this is, and a line; other names as they are."""
    path = Path(name, "ckpt.pt")
    if name and path.is_file():
        say_once(f"{name} is the folder of a run: {path} is meant")
        return str(path)
    return name


def of_runs(cfg):
    """cfg, but a side that is compared is what is meant(); B of one comparison is no run."""
    sides = {"a": cfg.a} if cfg.a != "table" else {"b": cfg.b, "more": cfg.more}
    found = {k: meant(v) if isinstance(v, str) else tuple(map(meant, v)) for k, v in sides.items()}
    return replace(cfg, **found)


def of_run(folder):
    """The checkpoints that a run kept, and its last one, by their steps: {step: path}."""
    if not folder.is_dir():
        raise BadInput(f"--curve: {folder} is no folder; expected that of a run")
    kept = {step: str(path) for step, path in of_steps(folder, "ckpt-{}.pt").items()}
    last = folder / "ckpt.pt"
    if last.is_file():
        kept.setdefault(checkpoints.load_checkpoint(last, facts=True)["step"], str(last))
    if not kept:
        raise BadInput(f"--curve: {folder} holds no ckpt.pt; expected the folder of a run")
    return dict(sorted(kept.items()))


def sampled(checkpoint, script, n, gpus, arguments="", out=""):
    """The file of n images that `script` draws from its checkpoint, made unless it is there.

    samples.npz, or where the script is that of an autoencoder reconstructions.npz. arguments: more
    flags of the script, as one string. Its folder lies in `out`, or beside the checkpoint. Several
    processes may ask; one draws, on `gpus` GPUs. Raises BadInput where it fails.
    """
    checkpoint = Path(checkpoint)
    try:
        arguments = shlex.split(arguments)
    except ValueError as error:
        raise BadInput(f"--sample-args {arguments}: {error}") from None

    def folder_of(path):
        """Where samples of the checkpoint lie, as it is at `path`."""
        place = [str(checkpoint.resolve())] if out else []
        made_of = json.dumps([checkpoints.identity(path), n, shlex.join(arguments), *place])
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:8]
        return Path(out or checkpoint.parent, f"eval-{checkpoint.stem}-{digest}")

    if found := _drawn(folder_of(checkpoint)):
        return found  # without a pin, which may be a copy
    with pinned(checkpoint) as own:
        folder = folder_of(own)

        def command(path):
            drawn = ["--sample", path, "--n", n, "--out", folder, "--gpus", gpus]
            return [sys.executable, str(ROOT / f"{script}.py"), *arguments, *map(str, drawn)]

        with locked(folder.with_name(f".{folder.name}.lock"), "--out"):
            if not _drawn(folder):
                failed = run_alone(command(own), stdout=sys.stderr)
                if failed or not _drawn(folder):
                    typed = shlex.join(command(checkpoint))
                    why = f"no samples of {checkpoint}: {failed or 'it left none'}"
                    raise BadInput(f"{why}; the command was {typed}")
    return _drawn(folder)


def _drawn(folder):
    """The file of images in a folder of samples, None without one."""
    files = (folder / f"{kind}.npz" for kind in ("samples", "reconstructions"))
    return next(filter(Path.exists, files), None)


@contextlib.contextmanager
def pinned(checkpoint):
    """A name for the file that a checkpoint is now, in the same folder, while this is inside.

    A training that goes on gives ckpt.pt to another file; what is drawn is of the one that the
    result names. Where no second name can be made, it is that of a copy.
    """
    own = temporary_of(checkpoint, ".pinned")
    with contextlib.ExitStack() as stack:
        try:
            own.unlink(missing_ok=True)
            os.link(checkpoint, own)
        except OSError:
            own = Path(stack.enter_context(tempfile.TemporaryDirectory())) / checkpoint.name
            with writing(own):
                shutil.copyfile(checkpoint, own)
        stack.callback(own.unlink, missing_ok=True)
        yield own
