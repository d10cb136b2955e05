"""Names of what a study leaves: of two settings, neither replaces the files of the other."""

from runtime.result_folders import digest_of
from runtime.scores import read

import json
from dataclasses import fields
from pathlib import Path

SHORT = {"compare_steps": "steps", "compare_guidance": "w", "along": "steps"}


def changed(cfg, names):
    """{name: value} of those of cfg's settings `names` that are not the default, in their order.

    A checkpoint counts by its file's name, unless that is ckpt.pt, and data by the last part.
    """
    default, found = type(cfg)(), {}
    for name in (field.name for field in fields(cfg) if field.name in names):
        value = getattr(cfg, name)
        if name == "checkpoint":
            path = Path(value)
            found |= {"of": path.stem} if path.is_file() and path.name != "ckpt.pt" else {}
        elif value != getattr(default, name):
            found[SHORT.get(name, name)] = Path(value).name if name == "data" else value
    return found


def name_for(folder, kind, suffix, facts):
    """(suffix, whether it is known): so that KIND + suffix + .json in `folder` is nobody else's.

    That is `suffix`; where a file of that name has other "facts" (of other weights, say), a digest
    is added. Known are files with just these, whatever else theirs say.
    """
    wanted = json.loads(json.dumps(facts))
    for text in (suffix, f"{suffix}-{digest_of(facts)}"):
        path = folder / f"{kind}{text}.json"
        if not path.exists():
            return text, False
        found = read(path)
        found = found.get("facts") if isinstance(found, dict) else None
        same = isinstance(found, dict)
        if same and all(key in found and found[key] == value for key, value in wanted.items()):
            return text, True
    return text, False
