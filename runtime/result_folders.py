"""Where the results of a command over a checkpoint go, so that none replaces another's.

Without --out that is a folder beside the checkpoint, named by the script and the settings that were
typed: runs/a/ddim_sample-steps=25_guidance=3/samples.png. The training's own samples.png stays what
it was, and the same command draws into the same folder again.
"""

from runtime.commandline import flag, typed
from runtime.files import check_writable
from runtime.processes import is_first_process

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

LONGEST = 100  # letters of the settings in a name
OWN_NAMES = frozenset({"", "study", "along"})  # tasks whose files say themselves what they are of
# They change no result, or by rounding; and the tasks themselves.
SAME = frozenset(
    {"out", "gpus", "data_root", "batch_size", "classifier_batch", "compile", "use_checkpoint"}
    | {"precision", "gif", "json", "tensorboard"}
)


def beside(cfg, path):
    """The folder for what the task of cfg makes of the checkpoint (or published folder) `path`.

    That is --out, or lies beside it. BadInput where nobody can write there.
    """
    folder = Path(cfg.out) if cfg.out else _beside(cfg, path)
    if is_first_process():
        check_writable(folder)
    return folder


def _beside(cfg, path):
    path, task = Path(path), cfg.task()
    folder = path if path.is_dir() else path.parent
    if task in OWN_NAMES:
        return folder
    settings = {} if path.is_dir() or path.name == "ckpt.pt" else {"of": path.stem}
    settings |= decided(cfg)
    if task == "nll" and not settings:
        return folder  # nll.json is nobody else's
    script = Path(sys.modules[type(cfg).__module__].__file__).stem
    return folder / f"{script}{f'-{task}' * (task != 'sample')}{suffix_of(settings)}"


def decided(cfg):
    """{name: value} of the settings that were typed and change results; of a path its last part."""
    names = [field.name for field in dataclasses.fields(cfg)]
    found = {}
    for name in typed([name for name in names if name not in SAME and name not in cfg.USES]):
        value = getattr(cfg, name)
        if isinstance(value, str) and "/" in value and (path := Path(value).resolve()).exists():
            value = f"{path.name}-{digest_of(str(path))[:4]}"
        found[name] = value
    return found


def suffix_of(settings):
    """ "_n=100_eta=0.5" of {name: value}, for names of files and folders; of many a digest.

    Of a switch it is "_clip-denoised" or "_no-clip-denoised". Letters that names of files should
    not have are replaced, and then a digest tells the values apart.
    """
    parts = []
    for name, value in settings.items():
        name = flag(name).removeprefix("--")
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        plain = re.sub(r"[^\w.,+-]", "-", str(value))
        plain += f"-{digest_of(value)[:4]}" * (plain != str(value))
        switch = name if value is True else f"no-{name}" if value is False else ""
        parts.append(f"_{switch or f'{name}={plain}'}")
    text = "".join(parts)
    return text if len(text) <= LONGEST else f"_{digest_of(settings)}"


def digest_of(what):
    """Eight letters that stand for what JSON can say."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
