"""What a flag does, seen from outside: a command is run without it and with it, and compared.

    case = Case("ddim", "sample", {"sample": checkpoint, "n": 4})
    verdict(case, "eta", folder)      "" where the flag is used or refused by name, else why not

A command runs in this process and in a folder of its own. What it leaves is compared as bytes, but
for times and the settings that checkpoints repeat; curves, which are slow to draw, as the numbers
that are drawn. What must not change a result is seen by spies: torch.compile, the parts of a batch.
"""

from runtime import commandline as cli
from runtime import films, plots, processes, rehearsal
from runtime import folder as folder_of_run
from runtime import run as run_loop
from runtime.sums import NOTE

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import sys
import types
import typing
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from told_flags import check_named, flag_of, names
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import eval_fid
from evaluation import classifier, features, inception_features, over_sigma, samplers_report
from networks.noisy_classifier import NoisyClassifier

ROOMS = ("runtime", "image_data", "networks", "evaluation")
REPO = Path(__file__).resolve().parent.parent
# All of them now: one that is first imported while a spy stands somewhere would keep it.
for path in [*REPO.glob("*.py"), *(p for room in ROOMS for p in (REPO / room).rglob("[!_]*.py"))]:
    importlib.import_module(".".join(path.relative_to(REPO).with_suffix("").parts))
OURS = [m for m in sys.modules.values() if REPO in Path(getattr(m, "__file__", "") or "/").parents]

REPEAT = re.compile(r"config\.yaml|report\.html|(compare|along|classifier-guidance|curves)\.md")
NAMED = re.compile(r"-[0-9a-f]{8}\b|_[\w-]+=\S+(?=\.\w)")  # settings in names of files
TIMES = re.compile(NAMED.pattern + r"|\d+\.\d+ s\b|\b\d+\.\d{4}(?= \|)|(?m:\d+\.\d+(?= \|$))")


@dataclasses.dataclass
class Case:
    """A task of a script, and what is typed in its tests.

    base    {setting: value} of the command without the flag
    beside  {setting: {setting: value}}: what else is typed, in both commands, where one is tried
    values  {setting: value} where the general rule finds none that is valid and makes a difference
    own     settings of the checkpoint that the task reads: a flag is tried with another value
    place   {path below the folder of the run: file that is copied there first}
    settings    whether those in a checkpoint are what the command is about
    also    {setting: {setting: value}}: what else is typed in the second command alone
    """

    script: str
    task: str
    base: dict
    beside: dict = dataclasses.field(default_factory=dict)
    values: dict = dataclasses.field(default_factory=dict)
    own: dict = dataclasses.field(default_factory=dict)
    place: dict = dataclasses.field(default_factory=dict)
    also: dict = dataclasses.field(default_factory=dict)
    settings: bool = False
    known: dict = dataclasses.field(default_factory=dict, repr=False)  # outcomes of bases

    @property
    def module(self):
        return importlib.import_module(self.script)

    @property
    def fields(self):
        """{name: field} of all settings that have a flag, and of those in a place of their own."""
        return {f.name: f for f in dataclasses.fields(self.module.Config)}

    @property
    def tried(self):
        """Names of those that are tried: a switch that asks for the task itself is not."""
        return [name for name, f in self.fields.items() if name != self.task or f.type is not bool]


@dataclasses.dataclass
class Outcome:
    """refused: the line of an exit with code 2, or ""; made: {what can be seen: its digest}."""

    refused: str
    made: dict
    files: set
    rows: list


# ------------------------------------------------------------------------------- the command line


def is_positional(field):
    return typing.get_origin(field.type) is typing.Annotated


def arguments(case, settings):
    """The command line of {name: value}, positional ones first; None is not typed."""
    places, flags = [], []
    for name, value in settings.items():
        if value is None:
            continue
        flag = flag_of(name)
        if is_positional(case.fields[name]):
            places.append(str(value))
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif str(value).startswith("--"):
            flags.append(f"{flag}={value}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return places + flags


def default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def another(case, name):
    """A value that is neither the setting's default, nor the command's, nor the checkpoint's."""
    if name in case.values:
        return case.values[name]
    field, base = case.fields[name], case.base | case.beside.get(name, {})
    now = base.get(name, case.own.get(name, default(field)))
    taken = [now, default(field), case.own.get(name, now)]
    choices = [c for c in candidates(field.type, now) if c != now]
    return next((c for c in choices if c not in taken), choices[0])


def candidates(kind, now):
    if kind is bool:
        return [True, False]
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if kind is int:
        return [now + 1, now + 2, now + 3]
    if kind is float:
        return [now / 2, now / 4, now / 8] if now else [0.5, 0.25, 0.125]
    raise AssertionError(f"say in `values` what is typed for a setting of type {kind}")


# ------------------------------------------------------------------------------------ the command


def run(case, settings, folder, rows=()):
    """The Outcome of the command with these settings, run in the new folder; rows: see watched."""
    folder.mkdir(parents=True)
    for below, source in case.place.items():
        (folder / below).parent.mkdir(parents=True, exist_ok=True)
        (folder / below).write_bytes(Path(source).read_bytes())
    out, seen, refused = io.StringIO(), collections.Counter(), ""
    before = digests(case, folder)
    argv = [case.script, *arguments(case, settings)]
    LOGGED.clear()
    with watched(case.module, seen, folder, argv, rows), contextlib.redirect_stdout(out):
        try:
            case.module.main()
        except cli.BadInput as error:
            refused = str(error)
            check_named(case.script, argv[1:], refused)
        except Differs:
            seen["log"] += 1
    files = {name: d for name, d in digests(case, folder).items() if before.get(name) != d}
    told = printed(case, out.getvalue(), folder)
    return Outcome(refused, files | {"printed": told} | seen, set(files), list(LOGGED))


def digests(case, folder):
    """{path: digest} of all files below the folder; paths without what names settings."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found[NAMED.sub("", str(path.relative_to(folder)))] = digest(case, path)
    return {name: value for name, value in found.items() if value}


def digest(case, path):
    """Of what a file says, without times and repeated settings; "" for one that says only these."""
    if REPEAT.fullmatch(NAMED.sub("", path.name)) or ".lock" in path.name or path.name == NOTE:
        return ""
    if zipfile.is_zipfile(path):  # a checkpoint or arrays: all tensors, but not the settings
        kept = r"/data/\d+$|\.npy$" + r"|/data\.pkl$" * case.settings
        with zipfile.ZipFile(path) as parts:
            return repr([p.CRC for p in parts.infolist() if re.search(kept, p.filename)])
    raw = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = [raw] if path.suffix == ".json" else filter(None, raw.splitlines())
        return repr([list(flat(json.loads(line), {*case.fields})) for line in lines])
    if raw.startswith(b"\x89PNG"):  # without its texts
        raw = Image.open(path).tobytes()
    return hashlib.sha256(raw).hexdigest()


def printed(case, text, folder):
    """The same of what a command prints."""
    kept = []
    for line in TIMES.sub("", text.replace(str(folder), "")).splitlines():
        if line.startswith("{"):
            kept.append(list(flat(json.loads(line), {*case.fields})))
        elif not line.strip().startswith(("command", "python")):
            kept.append(line)
    return repr(kept)


UNSEEN = {"config", "seconds_per_image", "seconds", "images_per_s", "peak_memory_mb", "command"}
UNSEEN |= {"folder", "checkpoint", "cell"}


def flat(value, settings=(), name=""):
    """(name, leaf) of nested dictionaries, without `settings`, and lists; tensors as digests."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in UNSEEN and key not in settings:
                yield from flat(inner, settings, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from flat(inner, settings, f"{name}/{i}")
    elif isinstance(value, np.ndarray):
        yield name, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    elif isinstance(value, torch.Tensor):
        raw = value.contiguous().view(-1).view(torch.uint8) if value.numel() else value
        yield name, str(value.dtype), hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    else:
        yield name, value


# ------------------------------------------------------------------------------------------- spies


@contextlib.contextmanager
def watched(module, seen, folder, argv, rows=()):
    """What main() of a module finds; seen counts what it asks for that leaves no trace.

    rows: of the log of another run; the first one that differs ends this one, with the exception
    Differs.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.chdir(folder)
        patch.setattr(sys, "argv", argv)
        patch.setattr(processes, "SAID", set())
        patch.setattr(torch, "load", remembered)
        patch.setattr(torch, "compile", lambda net: seen.update(["compiled"]) or net)
        board = counted(lambda path, **how: mock.MagicMock(), seen, "tensorboard")
        board = types.SimpleNamespace(SummaryWriter=board)
        patch.setitem(sys.modules, "torch.utils.tensorboard", board)
        begins = counted(lambda **how: mock.MagicMock(), seen, "wandb")
        patch.setitem(sys.modules, "wandb", mock.MagicMock(Error=Exception, init=begins))
        everywhere(patch, torch_checkpoint, counted(torch_checkpoint, seen, "checkpoint"))
        for function in DRAWN:
            everywhere(patch, function, as_text)
        patch.setattr(run_loop.Run, "backward", counted(run_loop.Run.backward, seen, "parts"))
        patch.setattr(run_loop.Run, "save", saved_steps(run_loop.Run.save, seen))
        patch.setattr(folder_of_run.RunFolder, "log", compared(rows))
        patch.setattr(processes, "progress", totals(processes.progress, seen))
        everywhere(patch, features.extract, sizes(features.extract, seen))
        everywhere(patch, processes.run_alone, in_this_process)
        everywhere(patch, classifier.train_classifier, few_steps(classifier.train_classifier))
        guide = counted(NoisyClassifier.forward, seen, "classified")
        patch.setattr(NoisyClassifier, "forward", guide)
        patch.setattr(over_sigma, "save_figures", lambda *args, **how: None)
        if "autoencoder" not in argv[0]:  # there it is fast
            patch.setattr(rehearsal, "rehearse", lambda fn, cfg: print("plan", vars(cfg)))
        patch.setattr(inception_features, "load", FakeInception)
        patch.setattr(eval_fid, "by_sqrtm", counted(eval_fid.by_sqrtm, seen, "sqrtm"))
        yield


# Pictures and films are slow to write.
DRAWN = [getattr(plots, f"plot_{name}") for name in ("lines", "loss", "metrics")]
DRAWN += [plots.draw_cells, plots.draw_shaded, films.save_beside, samplers_report.draw_panels]


@functools.cache
def places(function):
    """[(module, name)] of ours that have this function."""
    return [(m, name) for m in OURS for name, value in vars(m).items() if value is function]


def everywhere(patch, function, other):
    """Put another function in the place of this one in all modules that have it."""
    for module, name in places(function):
        patch.setattr(module, name, other)


class Differs(Exception):
    """A row of the log is another one: there is no need to go on."""


def compared(rows):
    """RunFolder.log, which ends a run at the first row that is not in its place in `rows`."""
    log, left = folder_of_run.RunFolder.log, list(rows)

    def called(self, step, **values):
        log(self, step, **values)
        row = repr(list(flat({"step": step, **values})))
        if rows and (not left or left.pop(0) != row):
            raise Differs
        LOGGED.append(row)

    return called


LOGGED = []  # rows of the command that runs now


KEPT, torch_load = {}, torch.load  # {(path, when it was written): what torch.load gave}


def remembered(path, *args, **how):
    """torch.load, which takes most of the time of a tiny command, once for each file."""
    key = (str(path), os.stat(path).st_mtime_ns) if isinstance(path, (str, Path)) else None
    if key is None:
        return torch_load(path, *args, **how)
    if key not in KEPT:
        KEPT[key] = torch_load(path, *args, **how)
    return copy(KEPT[key])


def copy(value):
    """Of nested dictionaries, lists and tensors."""
    if isinstance(value, dict):
        return type(value)((key, copy(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return [copy(inner) for inner in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def counted(function, seen, word):
    def called(*args, **how):
        seen[word] += 1
        return function(*args, **how)

    return called


def saved_steps(save, seen):
    def called(run):
        seen[f"saved at {run.step}"] += 1
        return save(run)

    return called


def totals(progress, seen):
    def called(total, *args, **how):
        seen[f"progress {total}"] += 1
        return progress(total, *args, **how)

    return called


def sizes(extract, seen):
    def called(extractor, images, batch_size=256, *args, **how):
        seen[f"features of {batch_size}"] += 1
        return extract(extractor, images, batch_size, *args, **how)

    return called


class FakeInception:
    """Features that depend on the weights' name, and on how images are resized."""

    network, protocol, dim, device = "Inception", "fake", 8, torch.device("cpu")

    def __init__(self, weights="", root="", resize="", device="cpu", patience=None):
        self.feature_hash = hashlib.sha256(f"{weights} {resize}".encode()).hexdigest()[:8]
        self.generator = torch.Generator()

    def __call__(self, images, spatial=False):
        pixels = images.flatten(1).float()
        self.generator.manual_seed(int(self.feature_hash, 16))
        feats = pixels @ torch.randn(pixels.shape[1], self.dim, generator=self.generator)
        return (feats, feats, feats) if spatial else (feats, feats)


def few_steps(train):
    def called(ds, steps, *args, **how):
        return train(ds, min(steps, 20), *args, **how)

    return called


def as_text(*args, **how):
    """What would be drawn into a picture, as numbers; those of plot_loss are in the log."""
    path = next((arg for arg in args if isinstance(arg, (str, Path))), "")
    if len(args) > 1:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shown = [arg for arg in args if not isinstance(arg, (str, Path))]
        Path(path).write_text(repr(list(flat([shown, how], {"title"}))))


def in_this_process(command, stdout=None):
    """runtime.processes.run_alone, but without the seconds of a new process."""
    _, script, *argv = command
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [script, *argv])
        importlib.import_module(Path(script).stem).main()
    return 0


# ----------------------------------------------------------------------------------------- verdict


def base_of(case, name, folder):
    """The Outcome of the command without the flag `name`, run once for all that have the same."""
    settings = case.base | case.beside.get(name, {})
    key = repr(settings)
    if key not in case.known:
        case.known[key] = run(case, settings, folder / f"base{len(case.known)}")
        assert not case.known[key].refused, f"{key}: {case.known[key].refused}"
    return case.known[key], settings


def verdict(case, name, folder):
    """What is wrong with a flag: "" where it is refused by its name, or makes a difference."""
    without, settings = base_of(case, name, folder)
    value = another(case, name)
    settings = settings | case.also.get(name, {}) | {name: value}
    found = run(case, settings, folder / name, without.rows)
    shutil.rmtree(folder / name)  # a thousand small checkpoints would fill a disk
    told = f"{flag_of(name)} {value}"
    if not found.refused:
        return "" if found.made != without.made else f"{told}: does nothing"
    if not names(found.refused, name) and not is_positional(case.fields[name]):
        return f"{told}: refused without its name: {found.refused}"
    return f"{told}: refused after {sorted(found.files)}" if found.files else ""
