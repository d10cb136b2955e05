"""What a refusal names: every flag in it was typed, or the task that refuses takes it.

    check_named("edm", ["--sample", "ckpt.pt", ...], "no scores: ...; or type --metric-data NAME")

A flag that stands behind the name of a script, as in "type python ddim.py --sample CKPT", is one of
that script's, in whatever task, up to a semicolon. Flags of other programs are in OTHERS.
"""

from runtime.typed_flags import EVERYWHERE

import dataclasses
import importlib
import re

NAMED = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)|\b(\w+)\.py\b|python -m ([\w.]+)|(;)")
OTHERS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "local_dir"}
OTHERS |= {"help", "upgrade"}


def flag_of(name):
    return "--" + name.replace("_", "-")


def names(line, name):
    """Whether a line names this setting's flag, or its --no- form."""
    return re.search(rf"{flag_of(name)}(?![\w-])", line.replace("--no-", "--"))


def setting_of(flag):
    """'metric_n' of 'metric-n', 'no-metric-n' or 'metric-n='."""
    return flag.replace("-", "_").removeprefix("no_")


def taken(config, args):
    """Names of the settings that were typed, and of those that have a part in the task asked for.

    config: a class of settings, whose tests elsewhere show that USES and IDLE are true.
    """
    known = {field.name for field in dataclasses.fields(config)}
    typed = {setting_of(arg[2:].split("=")[0]) for arg in args if arg.startswith("--")}
    uses = getattr(config, "USES", {})
    if task := next((name for name in uses if name in typed), ""):
        return typed | uses[task] | {*uses} | EVERYWHERE
    return typed | known - getattr(config, "IDLE", frozenset())


def foreign(script, args, line):
    """The flags in a line that neither were typed nor have a part in the task of this command."""
    own, found = taken(importlib.import_module(script).Config, args), []
    mine = own
    for flag, other, module, end in NAMED.findall(line):
        if end:
            mine = own
        elif other or module:
            mine = settings_of(other or module) or own
        elif setting_of(flag) not in mine | OTHERS:
            found.append(f"--{flag}")
    return found


def settings_of(script):
    """Names of all settings of a script, a module or a package; nothing for what has none."""
    for name in (script, f"{script}.__main__"):
        try:
            config = importlib.import_module(name).Config
        except (ImportError, AttributeError):
            continue
        return {field.name for field in dataclasses.fields(config)}
    return set()


def check_named(script, args, line):
    """Demand it of the refusal of a command; a line without one names nothing."""
    wrong = foreign(script, list(map(str, args)), line)
    assert not wrong, f"{script}.py {' '.join(map(str, args))}: has no {', '.join(wrong)}: {line}"
