"""What every training loop here uses: learning rate, running mean of weights, log of the loss."""

import contextlib
import hashlib
import json
import math
import resource
import sys
import zipfile
from pathlib import Path

import torch

from runtime.commandline import BadInput
from runtime.files import atomic_write


def learning_rate(step, steps, peak, warmup, decay="cosine"):
    """Rises linearly over `warmup` steps; falls to zero at `steps` as a half cosine, or stays."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if decay == "cosine" else 1.0
    return peak * rise * fall


def ema_update(decay):
    """For AveragedModel: w_ema += (1 - d) (w - w_ema), d = min(decay, (1 + n) / (10 + n)).

    n counts the updates so far: an average over few steps should not remember the first weights.
    """

    def update(averaged, current, updates):
        d = min(decay, (1 + float(updates)) / (10 + float(updates)))
        torch._foreach_lerp_(averaged, current, 1 - d)

    return update


def peak_memory(device):
    """The most memory this process has held so far, in MB: on its GPU, or on the CPU in all."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def read_log(path):
    """The rows of a log.jsonl; a line torn by a kill is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


class LossMeter:
    """Mean loss between two log lines, whole and by quarter of the timestep range.

    Stays on the device, so that a training step never waits for the GPU.
    """

    def __init__(self, device):
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        self.first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def add(self, step, losses, quarter=None):
        """losses (B,), one per sample; quarter (B,) int64 in 0..3 where there are timesteps."""
        losses, self.split = losses.detach().double(), quarter is not None
        quarter = quarter if self.split else torch.zeros_like(losses, dtype=torch.int64)
        self.sums[0].index_add_(0, quarter, losses)
        self.sums[1].index_add_(0, quarter, torch.ones_like(losses))
        bad = torch.where(losses.isfinite().all(), torch.inf, float(step))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self, world, run):
        """{'loss': ..., 'loss_q1': ...}, over all processes, and start again.

        Raises BadInput if a loss since the last call was not finite: the step and the checkpoint.
        """
        bad = -world.sum(torch.where(self.first_bad.isfinite(), 1.0, 0.0))
        if bad < 0:
            at = "" if self.first_bad.isinf() else f" at step {int(self.first_bad)}"
            path = run.folder / "ckpt.pt"
            last = (
                f"the last good checkpoint is {path}"
                if path.exists()
                else "no checkpoint exists yet"
            )
            raise BadInput(f"the loss is not finite{at}; {last}; try a smaller --lr")
        total, count = world.sum(self.sums.clone()).cpu()
        self.sums.zero_()
        quarters = {f"loss_q{i + 1}": float(total[i] / count[i]) for i in range(4) if count[i] > 0}
        return {"loss": float(total.sum() / count.sum()), **quarters}


def plot_loss(run):
    """Draw loss.png from log.jsonl: the loss, and its quarters of the timestep range if logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_log(run.log_path) if "loss" in row]
    if not run.world.is_main or not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, width in [("loss", 2.0), *((f"loss_q{i}", 0.7) for i in range(1, 5))]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), linewidth=width, label=name.replace("_q", ", quarter ")
            )
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=str(run.folder))
    axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_write(run.folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def differing(theirs, ours, free):
    """ "key A there, B here" for each setting that is not the same in both; those of `free` may."""
    return [
        f"{key} {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted({*theirs, *ours} - free)
        if theirs.get(key) != ours.get(key)
    ]


def summary_writer(folder):
    """TensorBoard's writer of files into `folder`. Raises BadInput where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs its package: pip install tensorboard") from None
    return SummaryWriter(folder)


def weights_hash(net):
    """Twelve hex digits that name these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_mapped(path, allowed=()):
    """What torch.save wrote at `path`, on the CPU; tensors are mapped, but not of the old form."""
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
