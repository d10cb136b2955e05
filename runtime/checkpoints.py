"""Checkpoints: plain tensors and numbers, read without running any code."""

from runtime.commandline import BadInput, not_given, typed

import dataclasses
import hashlib
import json
import os
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

# Settings that some published networks leave to the command line; the others, and checkpoints, have
# their own and refuse them.
ARCHITECTURE = ("size", "num_heads", "num_head_channels", "norm_groups")
ARCHITECTURE += ("new_order", "rescale_timesteps")  # of OpenAI's networks alone
NOISE = ("schedule", "timesteps", "alpha_min", "beta_start", "beta_end")
FORWARD = (*NOISE, "trained_betas", "prediction")
UNSAID = frozenset(ARCHITECTURE + FORWARD)
# Settings of a walk, which decide where a published network's files say something else.
WALK = ("variance", "clip_denoised", "dynamic_threshold", "spacing", "sample_steps", "eta")
WALK += ("timestep_respacing", "sampler")
UNBUILDABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
UNBUILDABLE += (RuntimeError, TypeError, ValueError)  # what networks raise for numbers that lie
EXPANDED = 4  # times as many bytes as its file has may be in a checkpoint's tensors


class DamagedCheckpoint(BadInput):
    """The file is truncated or garbage; the checkpoint before it may be whole."""


class NotRead(BadInput):
    """The machine did not read the file, which may be whole."""


class Kept(dict):
    """What a checkpoint at `path` keeps; BadInput for what is not there."""

    path = ""

    def __missing__(self, name):
        raise BadInput(f"checkpoint {self.path} has no {name}: it is no whole checkpoint of a run")

    def __reduce__(self):  # saved again, it is a plain dictionary
        return OrderedDict, (), None, None, iter(self.items())


class WrongSums(DamagedCheckpoint):
    """Bytes of the file are others than those that were written."""


def load_copied(path):
    """What torch.save wrote at `path`, on the CPU, in memory."""
    return torch.load(path, "cpu", weights_only=True)


def load_mapped(path, allowed=()):
    """What torch.save wrote at `path`, on the CPU; tensors are mapped, but not of the old form."""
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def check_machine(error, path):
    """NotRead where the machine, not what the file at `path` holds, is why it was not read.

    So nobody takes a whole file for a damaged one, and writes over it.
    """
    from runtime.edges import OUTSIDE

    told = ""
    if isinstance(error, OSError) and error.errno in OUTSIDE:  # a zip that is cut has another
        told = os.strerror(error.errno)
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        told = "memory has ended"
    if told:
        raise NotRead(f"{path} could not be read ({told}); it may be whole: try again") from None


def check_sums(path, tensors=True):
    """WrongSums where a file of torch.save is not as it was written, by the sums in its zip.

    torch.load does not look at them. tensors: also at the numbers of tensors. A file of the form
    that torch.save had before it wrote zips has no sums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # a small file may hold gigabytes
                    raise ValueError(f"{member.filename} is compressed, as torch.save has none")
                if tensors or "/data/" not in member.filename:
                    with archive.open(member) as stream:
                        while stream.read(1 << 20):
                            pass
    except Exception as error:  # a torn zip raises nearly anything
        check_machine(error, path)
        told = str(error) or type(error).__name__
        raise WrongSums(f"{path} is damaged: {told}") from None


def identity(path):
    """A hash that names what a file of torch.save holds, by the sums of its parts."""
    if not zipfile.is_zipfile(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as archive:
        parts = sorted((member.filename, member.CRC) for member in archive.infolist())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check_expanded(state, path):
    """BadInput where tensors in `state` have many times the numbers that their file holds.

    A file of a kilobyte can say that one number fills a tensor of gigabytes.
    """
    total, parts, seen = 0, [state], set()
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            total += part.numel() * part.element_size()
        elif isinstance(part, dict | list | tuple) and id(part) not in seen:
            seen.add(id(part))  # one may hold itself
            parts.extend(part.values() if isinstance(part, dict) else part)
    if total > EXPANDED * Path(path).stat().st_size + 2**28:
        raise BadInput(f"{path} holds tensors of {total / 1e9:.3g} GB in a file of less: not read")


def load_checkpoint(path, scripts=(), mapped=False, facts=False):
    """The dictionary that a run saved at `path`, on the CPU.

    scripts: stem of the script that must have written it, or several; any without. mapped: tensors
    are read when used. facts: so, and no tensor will be: only what else is in the file is checked.
    Nothing in the file can run code. Raises BadInput, naming the file, when it is missing or of
    another script, DamagedCheckpoint when it cannot be read.
    """
    if not Path(path).is_file():
        why = "a folder; name its ckpt.pt" if Path(path).is_dir() else "no such file"
        raise BadInput(f"checkpoint {path}: {why}")
    try:
        check_sums(path, tensors=not facts)
        state = (load_mapped if mapped or facts else load_copied)(path)
        check_expanded(state, path)
    except WrongSums as error:
        raise WrongSums(f"checkpoint {error}") from None
    except BadInput:
        raise
    except Exception as error:
        check_machine(error, f"checkpoint {path}")
        reason = (str(error).strip() or "unreadable").splitlines()[0][:120]
        found = f"checkpoint {path} is truncated or not a checkpoint ({reason})"
        raise DamagedCheckpoint(found) from None
    from runtime.kept import check_state

    if not zipfile.is_zipfile(path):
        told = "has torch.save's old form, without sums, in which no script here writes"
        raise BadInput(f"checkpoint {path} {told}: save it again with torch.save")
    scripts = (scripts,) if isinstance(scripts, str) else tuple(scripts)
    made_by = state.get("script") if isinstance(state, dict) else None
    if not isinstance(made_by, str) or not re.fullmatch(r"[a-z_]\w*", made_by):
        told = f"was written by none of these scripts: it holds {held(state)}"
        raise BadInput(f"checkpoint {path} {told}")
    # A copy of a chapter, under a name of its own, reads what it wrote.
    check_state(state, path)
    if scripts and made_by not in (*scripts, Path(sys.argv[0]).stem):
        wanted = " or ".join(f"{name}.py" for name in scripts)
        raise BadInput(f"checkpoint {path} was written by {made_by}.py, expected one of {wanted}")
    state = Kept(state)
    state.path = path
    return state


def is_of(path, script):
    """Whether the script with this stem wrote the checkpoint at `path`."""
    try:
        return bool(load_checkpoint(path, script, facts=True))
    except WrongSums:
        raise
    except BadInput:  # of others, or damaged: who reads those says so
        return False


def held(content):
    """In a few words, what a file of others holds."""
    if not isinstance(content, dict) or not content:
        return f"a {type(content).__name__}" if content else "nothing"
    if content.keys() >= {"state", "param_groups"}:
        return "the state of an optimizer, no network: name the weights that were saved beside it"
    names = [repr(str(name)[:60]) for name in content]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class TrainedOn(str):
    """The data that a checkpoint names, with what image_data.datasets needs to know it again.

    data_key, size and classes are the run's: whatever is typed beside the name is of other images.
    """

    @classmethod
    def of(cls, settings):
        """Of the settings that a checkpoint keeps; data_key is None where they have none."""
        made = cls(settings.get("data", ""))
        made.data_key = settings.get("data_key")
        made.size, made.classes = settings.get("size", 0), settings.get("classes", "")
        return made


def trained_config(config_class, state, path="a checkpoint"):
    """The Config, of class `config_class`, that the run of a checkpoint `state`, at path, had.

    BadInput for settings that it cannot have had.
    """
    from runtime.kept import check_settings

    check_settings(config_class, state["config"], path)
    known = {f.name: f for f in dataclasses.fields(config_class)}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in state["config"].items()
        if name in known
    }
    values |= {"data": TrainedOn.of(state["config"])} if "data" in values else {}
    return config_class(**values)


def overlaid(trained, cfg, names):
    """The settings `trained` of a checkpoint, with those of `names` that cfg was given.

    Given is what was typed, and what is not as cfg's class has it, such as by --smoke. BadInput for
    a typed one that does nothing, unless that is by a setting which cfg's script does not read.
    """
    from runtime.typed_flags import check_idle, needed

    defaults, own = type(cfg)(), {name: getattr(cfg, name) for name in names}
    changed = {name: v for name, v in own.items() if v != getattr(defaults, name)}
    made = dataclasses.replace(trained, **(changed | given(cfg, names)))
    check_idle(made, [name for name in typed(names) if hasattr(cfg, needed(made, name)[0])])
    return made


def asked(cfg, script="", names=UNSAID):
    """What load_net of a chapter takes from the command line.

    The decay of --ema, which script draws, "" for none, and what read_network takes of the settings
    `names` that flags or --config give.
    """
    flags = sorted(name for name in names if hasattr(cfg, name))
    how = {"given": given(cfg, flags), "flags": flags, "walk": given(cfg, WALK)}
    return {"ema": typed_ema(cfg), "script": script, **how}


def given(cfg, names):
    """{name: value} of those of the settings `names` that cfg has and flags or --config give."""
    names = [name for name in names if hasattr(cfg, name)]
    left = not_given(cfg, names)
    return {name: getattr(cfg, name) for name in names if name not in left}


def restored(config_class, build, state, path, device, ema=None):
    """(network, its Config, shape (C,H,W), class names) of the checkpoint `state`, EMA weights.

    build(shape, number of classes, cfg) makes it. ema: which decay, of several. BadInput for
    weights of other networks, and decays not there.
    """
    cfg, shape = trained_config(config_class, state, path), tuple(state["shape"])
    if isinstance(data := getattr(cfg, "data", ""), TrainedOn):
        data.checkpoint = path
    names = state["class_names"] if cfg.class_cond else []
    net = built(lambda: build(shape, len(names), cfg), chosen_ema(state, path, ema), path)
    net = net.to(device, memory_format=torch.channels_last)
    net.null_label = state.get("null_label", True)  # whether it has learned to do without a label
    net.time_scale = state.get("time_scale", 1.0)
    return net.eval(), cfg, shape, names


def as_trained(cfg, names, path, scripts=(), fixed=()):
    """cfg, but settings `names` that were not typed are those of the run of the checkpoint.

    fixed: and those of these, whatever a file of --config says.
    """
    from runtime.typed_flags import check_idle

    trained = load_checkpoint(path, scripts, facts=True)["config"]
    names = [*not_given(cfg, names), *fixed]
    theirs = [(name, trained[name]) for name in names if name in trained]
    theirs = {name: tuple(v) if isinstance(v, list) else v for name, v in theirs}
    made = dataclasses.replace(cfg, **theirs)
    check_idle(made, typed(names))
    return made


def typed_ema(cfg):
    """The decay that --ema names, or None where neither it nor --config gives one."""
    if not_given(cfg, ("ema",)):
        return None
    if not cfg.ema:
        raise BadInput("--ema names no decay: type one behind it, or 0 for the weights as such")
    return cfg.ema[0]


def chosen_ema(state, path, decay=None):
    """The weights of the running mean with this decay in a checkpoint; of the first without one.

    Those of the network itself, which then stand there, where the run kept no mean, and for decay
    0. A published network has one, whatever a --config says. Raises BadInput where there is no
    such mean.
    """
    decays, kept = state["config"]["ema"], [state["ema"], *state.get("more_emas", ())]
    published = "step" not in state
    if decay is None or published and not typed(("ema",)):
        return kept[0]
    averages = dict(zip(decays, kept, strict=bool(decays)))
    if decay == 0 and "model" in state:
        return state["model"]
    if decay not in averages:
        has = ", ".join(map(str, averages)) or "none"
        raise BadInput(f"--ema {decay:g}: {path} has {has}")
    return averages[decay]


def load_weights(net, state):
    """Load a state_dict into a network of the same numbers, whatever shape its matrices have.

    A convolution of size 1 and a linear layer have the same weights. BadInput where others differ.
    """
    own = net.state_dict()
    try:
        net.load_state_dict(
            {k: v.reshape(own[k].shape) if k in own else v for k, v in state.items()}
        )
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        raise BadInput(f"these weights are of another network: {told}") from None


def built(make, weights, path):
    """make(), a network, with these weights, a state_dict.

    It is made without memory first. BadInput where settings make no network, or another one.
    """
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except UNBUILDABLE as error:
        told = f"{type(error).__name__}: {error}"[:120]
        raise BadInput(f"{path}: its settings make no network ({told})") from None
    sizes = {name: value.numel() for name, value in expected.items()}
    others = {
        name for name, n in sizes.items() if name not in weights or weights[name].numel() != n
    }
    if others := sorted(others | {*weights} - {*sizes}):
        more = ", ..." * (len(others) > 3)
        raise BadInput(
            f"{path}: these weights are of another network than its settings make; "
            f"{', '.join(others[:3])}{more} differ"
        )
    net = make()
    load_weights(net, weights)
    return net


def plain(settings):
    """The settings of a dataclass, or a dictionary of them, as YAML and checkpoints give them."""
    known = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
    return json.loads(json.dumps(known))


def differing(theirs, ours, free, kind=None):
    """A line "key A there, B here" for each setting that differs; those of `free` may.

    kind: the class of our settings. Where theirs are from before there was one, its default counts.
    """
    theirs = (plain(kind()) if dataclasses.is_dataclass(kind) else {}) | theirs
    return [
        f"{key} {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted({*theirs, *ours} - free)
        if theirs.get(key) != ours.get(key)
    ]


def weights_hash(net):
    """Twelve hex digits that name these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
