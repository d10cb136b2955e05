"""A dataclass becomes a command line (tyro) with a YAML file underneath; errors are one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm


class BadInput(Exception):
    """The user can mend this; one line: what was wrong, what was expected, what to type."""


def entry(main):
    """Run main(); BadInput becomes one line and exit code 2, a bug keeps its traceback."""
    try:
        main()
    except BadInput as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _stop(message, code):
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message would stand at the end of its line
    print(message, file=sys.stderr)
    sys.exit(code)


def parse(config_class, doc, args=None, preset=""):
    """The command line as an instance of `config_class`, a dataclass whose fields are documented.

    `--config F.yaml` names a file of the same fields; it lies under the flags, which override it.
    Without it, `preset` (such as 'configs/{data}.yaml') is that file, if it exists for --data.
    Raises BadInput for an unknown flag or key and for a value of the wrong type.
    """
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    names = [field.name for field in dataclasses.fields(config_class)]
    if preset and not any(a.split("=")[0] == "--config" for a in args):
        path = Path(preset.format(data=parse(config_class, doc, args).data))
        args = ["--config", str(path), *args] if path.is_file() else args
    error_text = io.StringIO()
    try:
        with contextlib.redirect_stderr(error_text):
            return tyro.cli(
                config_class,
                description=doc,
                args=_yaml_flags(args, names) + args,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BadInput(_one_line(error_text.getvalue(), names)) from None


def not_given(cfg, names):
    """Those of the settings `names` that the command line gives neither itself nor by --config."""
    args = sys.argv[1:]
    given = _names(_yaml_flags(args, [field.name for field in dataclasses.fields(cfg)]) + args)
    return [name for name in names if name not in given]


def smaller(cfg, **values):
    """cfg with these values for --smoke, but for the settings that were typed."""
    typed = _names(sys.argv[1:])
    return dataclasses.replace(cfg, **{k: v for k, v in values.items() if k not in typed})


def _names(args):
    """The settings that these arguments give."""
    return {arg.split("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}


def _yaml_flags(args, names):
    """The file that --config names, as flags, so that one parser checks both."""
    places = [i for i, a in enumerate(args) if a == "--config" or a.startswith("--config=")]
    if not places:
        return []
    last = args[places[-1]]
    path = Path(last.split("=", 1)[1] if "=" in last else "".join(args[places[-1] + 1 :][:1]))
    if not path.is_file():
        raise BadInput(f"--config {path}: no such file; configs/ holds examples")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"--config {path}: expected lines of 'key: value'")
    flags = []
    for key, value in settings.items():
        if key not in names or key == "config":
            close = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help for the keys"
            raise BadInput(f"--config {path}: unknown key {key!r}{hint}")
        flag = key.replace("_", "-")
        if value is None:
            raise BadInput(f"--config {path}: {key} has no value; type '' for an empty one")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{flag}", *map(str, values)]
    return flags


def _one_line(box, names):
    """tyro explains in a box of many lines; keep what was wrong and add the closest flag."""
    lines = [re.sub(r"^\s*│\s?|\s*│\s*$", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    end = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    text = " ".join(lines[:end])
    unknown = re.match(r"Unrecognized options: (--[\w-]+)", text)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in names]
        close = difflib.get_close_matches(unknown[1], flags, 1)
        return f"unknown flag {unknown[1]}" + (
            f"; did you mean {close[0]}?" if close else "; see --help"
        )
    return f"{text}; see --help"


def split_list(text):
    """'a, b,c' -> ['a', 'b', 'c']; '' -> []."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_seeds(text, n, flag="--seeds"):
    """int64 seeds from '17' or '0-63,100', below 10^18; for '' 0..n-1. Else BadInput."""
    if not text:
        return torch.arange(n)
    seeds = []
    for part in split_list(text):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= 10**6:
            seeds = []
            break
        seeds += range(first, last + 1)
    if not seeds:
        raise BadInput(
            f"{flag} {text}: expected numbers and ranges such as 17 or 0-63,100, "
            "of at most 18 digits and a million in all"
        )
    return torch.tensor(seeds)


def parse_classes(classes, names, aliases=()):
    """Indices into `names` from 'cat,3' or ['cat', '3']; all of them if empty.

    aliases: other names -> index. Raises BadInput, with the choice, for what does not exist.
    """
    chosen = []
    for part in split_list(classes) if isinstance(classes, str) else classes:
        if part in names:
            chosen.append(list(names).index(part))
        elif part in aliases:
            chosen.append(aliases[part])
        elif part.isdecimal() and int(part) < len(names):
            chosen.append(int(part))
        else:
            choice = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20])) or "no class"
            raise BadInput(f"--classes {part}: there is {choice}" + " ..." * (len(names) > 20))
    return chosen or list(range(len(names)))


def labels_for(seeds, chosen, guidance=0.0):
    """The label of each sample, a function of its seed: chosen[seed mod len(chosen)], or None."""
    if guidance and not chosen:
        raise BadInput("this network knows no labels; leave out --guidance")
    return torch.tensor(chosen)[seeds % len(chosen)] if chosen else None


def folder_of(cfg, path):
    """Where the results of a command over the checkpoint `path` go: --out, or beside it."""
    return Path(cfg.out or (path if Path(path).is_dir() else Path(path).parent))


def check_fraction(cfg, *names):
    """Raise BadInput unless every named field of `cfg` (a number or a tuple) lies in 0..1."""
    for name in names:
        value = getattr(cfg, name)
        if not all(0 <= v <= 1 for v in (value if isinstance(value, tuple) else (value,))):
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} must be from 0 to 1, got {value}")


def check_not_negative(cfg, *names):
    """Raise BadInput unless every named field of `cfg` is at least 0."""
    for name in names:
        if not getattr(cfg, name) >= 0:
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} must be at least 0, got {getattr(cfg, name)}")


def check_positive(cfg, *names):
    """Raise BadInput unless every named field of `cfg` (a number or a tuple of numbers) is > 0."""
    for name in names:
        value = getattr(cfg, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(v > 0 for v in values):
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} must be greater than 0, got {value}")


def default_gpus():
    """One GPU where there is one, else the CPU."""
    return min(torch.cuda.device_count(), 1)


def check_processes(gpus, batch_size, planned=False):
    """Raise BadInput if this machine lacks `gpus` GPUs or the processes cannot share a batch.

    planned: it is about another machine, that has as many.
    """
    have = torch.cuda.device_count()
    if gpus < 0 or gpus > have and not planned:
        raise BadInput(
            f"--gpus {gpus}: this machine has {have} GPU{'s' * (have != 1)}; "
            f"type --gpus {have}" + (" to run on the CPU" if have == 0 else " or fewer")
        )
    size = int(os.environ.get("WORLD_SIZE", max(gpus, 1)))
    if batch_size % size:
        lower, upper = batch_size // size * size, -(-batch_size // size) * size
        raise BadInput(
            f"--batch-size {batch_size} cannot be divided among {size} processes; "
            f"try {upper}" + (f" or {lower}" if lower else "")
        )


def check_run(cfg):
    """Raise BadInput for a setting that all training scripts share and that is out of its range."""
    check_positive(cfg, "steps", "batch_size", "lr", "clip_grad", "log_every", "save_every", "n")
    check_not_negative(cfg, "seed", "warmup", "sample_every", "keep_every")
    for often, base in (("save", "log"), ("keep", "save")):
        first, second = (getattr(cfg, f"{name}_every") for name in (often, base))
        if first % second:
            raise BadInput(f"--{often}-every {first} must be a multiple of --{base}-every {second}")
    parse_seeds(cfg.seeds, cfg.n)
    check_processes(cfg.gpus, cfg.batch_size, planned=getattr(cfg, "dry_run", False))
