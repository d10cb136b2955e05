"""--tensorboard and --wandb: what a run logs, and its grids, for those who watch runs there.

    trackers = opened({"wandb"}, folder, settings, step)     a run that goes on at `step`
    tell(trackers, "log", step, values), "show", step, name, picture or "close"

The first process alone opens them. The packages are extras: check() says so before any work. One
that fails later, as by its server or a full disk, ends no training: it is told nothing more.
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.processes import is_first_process

import math
import os
import secrets
import sys
import traceback
from pathlib import Path

NAMES = ("tensorboard", "wandb")


def asked(cfg):
    """Those of NAMES that the settings ask for."""
    return {name for name in NAMES if getattr(cfg, name, False)}


def check(cfg):
    """Raise BadInput where a package that the settings ask for is missing, or nobody logged in."""
    if getattr(cfg, "dry_run", False) or not is_first_process():
        return
    for name in sorted(asked(cfg)):
        try:
            if name == "wandb":
                import wandb
            else:
                import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            hint = f"pip install {name}, or pip install -e '.[{name}]' here"
            raise BadInput(f"--{name} needs its package: {hint}") from None
    if "wandb" in asked(cfg) and wandb.setup().settings.mode == "online":
        try:
            wandb.login()
        except wandb.Error as error:
            told = f"--wandb: {' '.join(str(error).split()).rstrip('.')}"
            raise BadInput(
                f"{told}; or set WANDB_MODE=offline, and later type wandb sync"
            ) from None


def opened(names, folder, settings, step):
    """Trackers of a run in `folder` that has made `step` steps, one for each of the names."""
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](Path(folder), settings, step) for name in sorted(names)]


def tell(trackers, what, *about):
    """Call the method `what` of each of the list; one that fails leaves the list, with a note.

    What the machine says is a line, a bug has its traceback above it.
    """
    for tracker in [*trackers]:
        try:
            getattr(tracker, what)(*about)
        except Exception as error:
            trackers.remove(tracker)
            if not isinstance(error, OSError):
                traceback.print_exc()
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            told = f"note: {tracker.flag} failed ({why}) and is told nothing more; all else goes on"
            print(told, file=sys.stderr)


def numbers(values):
    """Those of the values that are finite numbers."""
    known = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name: value for name, value in known.items() if math.isfinite(value)}


class TensorBoard:
    """Its files in the run's folder."""

    flag = "--tensorboard"

    def __init__(self, folder, settings, step):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged beyond the checkpoint that a run goes on from is logged again, and a run
        # that starts over in a folder has nothing to do with the one before it.
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, step, values):
        for name, value in numbers(values).items():
            self.writer.add_scalar(name, value, step)

    def show(self, step, name, picture):
        """The PNG file `picture`."""
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(picture).convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same one when training goes on: its id lies in the folder.

    Its project is $WANDB_PROJECT, or else diffusion-book. With $WANDB_MODE=offline nothing leaves
    this machine, and `wandb sync FOLDER/wandb/offline-*` uploads it later.
    """

    flag = "--wandb"

    def __init__(self, folder, settings, step):
        import wandb

        known = folder / "wandb-id.txt"
        if not step or not known.is_file():  # a run that begins is another run
            with atomic_write(known) as temporary:
                temporary.write_text(secrets.token_hex(4))
        (folder / "wandb").mkdir(exist_ok=True)  # where it cannot write it would take /tmp
        where = {"project": os.environ.get("WANDB_PROJECT", "diffusion-book"), "dir": str(folder)}
        name = "/".join(folder.resolve().parts[-2:]).removeprefix("runs/")
        about = {"id": known.read_text(), "name": name, "config": settings}
        try:  # an autoencoder's run is open still when that of its latents begins
            self.run = wandb.init(**where, **about, resume="allow", reinit="create_new")
        except wandb.Error as error:
            raise BadInput(f"--wandb: {' '.join(str(error).split())}") from None
        # Its own counter refuses steps that are logged again after a kill.
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        self.run.log({"step": step, **numbers(values)})

    def show(self, step, name, picture):
        """The PNG file `picture`."""
        import wandb

        self.run.log({"step": step, name: wandb.Image(str(picture))})

    def close(self):
        self.run.finish()
