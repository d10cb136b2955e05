"""Running means of the weights whose length is chosen after training.

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C. Instead of an exponential, a power
function weighs the weights theta(tau) of the past, so that a mean is as long, relative to the
training so far, at any step t:

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)     its profile, 0 <= tau <= t         eq. 121
    mean(t) = beta mean(t - 1) + (1 - beta) theta(t),  beta = (1 - 1/t)^(gamma + 1)       eq. 127
    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))                           eq. 123

sigma_rel is its length: the standard deviation of p, divided by t. Training keeps two means and
writes snapshots of both. The profile of a weighted sum of snapshots is that sum of their profiles,
and the sum whose profile comes nearest to that of another length is nearly the mean of that length,
though nobody has tracked it.

    power = PowerEMA(net, (0.05, 0.10))
    power.update(net, step); power.save_snapshot(folder, step)     in training
    net.load_state_dict(reconstruct(folder, 0.07, power.snapshots))    afterwards

Means and snapshots are fp32. After 50,000 steps its rounding error is 5e-6 of a weight. fp16
snapshots would be half as large and round by 1.4e-4, each on its own. Between the two lengths that
would do, but a shorter mean is a difference of snapshots: for 0.02 it has 20 times their error.
"""

from runtime.checkpoints import load_mapped
from runtime.commandline import BadInput
from runtime.files import atomic_write, left_over
from runtime.processes import say_once

import copy
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

LONGEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all weights
ROUGH = 0.1  # the part of a profile that may be missed before it is said


# -------------------------------------------------------------------------- profiles: appendix C


def sigma_rel_of(gamma):
    """The length of the mean with this exponent, eq. 123. gamma >= 0."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(sigma_rel, flag="the length of a running mean"):
    """The exponent of the mean with this length: the largest root of a cubic, algorithm 2.

    Raises BadInput, naming `flag`, for a length that is not above 0 and at most 12^-0.5 = 0.2886.
    """
    if not 0 < sigma_rel <= LONGEST + 1e-12:
        limits = f"above 0 and at most {math.floor(1e4 * LONGEST) / 1e4}, that of the plain mean"
        raise BadInput(f"{flag} {sigma_rel:g}: expected a number {limits}")
    a = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - a, 12 - a]).real.max()), 0.0)


def profile(gamma, t, tau):
    """p(tau), eq. 121: the weight per step that the mean at step t gives to steps tau (...).

    float64, zeros outside 0 .. t.
    """
    tau = np.asarray(tau, np.float64)
    inside = (tau >= 0) & (tau <= t)
    return np.where(inside, (gamma + 1) / t * (np.clip(tau, 0, t) / t) ** gamma, 0.0)


def overlap(gamma_a, t_a, gamma_b, t_b):
    """The integral of the product of two profiles over tau, eq. 151; arrays broadcast."""
    ratio, later = np.minimum(t_a, t_b) / np.maximum(t_a, t_b), np.maximum(t_a, t_b)
    of_later = np.where(np.less(t_a, t_b), gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**of_later / later


def coefficients(gammas, steps, gamma, t):
    """The sum of profiles (gammas, steps), each (k,), that is nearest to the profile (gamma, t).

    Returns x float64 (k,), which sum to 1, and how much of the profile is missed: the norm of the
    difference over its own. Algorithm 3.
    """
    gammas, steps = np.asarray(gammas, np.float64), np.asarray(steps, np.float64)
    size = np.sqrt(overlap(gammas, steps, gammas, steps))  # makes all profiles equally large
    A = overlap(gammas[:, None], steps[:, None], gammas, steps) / (size[:, None] * size)
    b, whole = overlap(gammas, steps, gamma, t) / size, overlap(gamma, t, gamma, t)
    x = np.linalg.lstsq(A, b, rcond=None)[0] / size
    x /= x.sum()  # weights that never change stay what they are
    y = x * size
    return x, math.sqrt(max((y @ A @ y - 2 * y @ b + whole) / whole, 0.0))


# ------------------------------------------------------------------------------ during training


class PowerEMA:
    """Running means of the weights of `net`, of these lengths (sigma_rel).

    `nets` are modules of their own, in eval mode, as `net` was until the first update. Raises
    BadInput for a length that gamma_of refuses, and for one that is there twice.
    """

    def __init__(self, net, lengths=(0.05, 0.10)):
        self.lengths, self.gammas = list(lengths), [gamma_of(length) for length in lengths]
        if len(set(self.lengths)) < len(self.lengths):
            raise BadInput(f"running means of lengths {self.lengths}: expected different ones")
        self.nets = [copy.deepcopy(net).eval() for _ in lengths]
        self.snapshots = []  # the steps that were saved

    @torch.no_grad()
    def update(self, net, step):
        """Take in the weights after `step` steps; once for each step, from 1."""
        for mean, gamma in zip(self.nets, self.gammas, strict=True):
            beta = (1 - 1 / step) ** (gamma + 1)  # eq. 127; 0 at step 1
            torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - beta)
            if buffers := list(net.buffers()):
                torch._foreach_copy_(list(mean.buffers()), buffers)

    def state_dict(self):
        """Plain tensors and numbers, for a checkpoint."""
        means = [mean.state_dict() for mean in self.nets]
        return {"lengths": self.lengths, "snapshots": self.snapshots, "means": means}

    def load_state_dict(self, state):
        """Raises BadInput for the state of other lengths."""
        if state["lengths"] != self.lengths:
            found = f"the checkpoint has running means of lengths {state['lengths']}"
            raise BadInput(f"{found}, expected {self.lengths}")
        self.snapshots = list(state["snapshots"])
        for mean, saved in zip(self.nets, state["means"], strict=True):
            mean.load_state_dict(saved)

    def save_snapshot(self, folder, step):
        """Write the means after `step` steps to `folder`, whole or not at all.

        Snapshots there that are not of this run's past go, as after it went on from an earlier
        checkpoint. One process does this.
        """
        folder = Path(folder)
        self.snapshots = sorted({*self.snapshots, step})
        means, buffers = [], {}
        for mean in self.nets:
            averaged = {name for name, _ in mean.named_parameters(remove_duplicate=False)}
            state = mean.state_dict()
            means.append({name: value for name, value in state.items() if name in averaged})
            buffers = {name: value for name, value in state.items() if name not in averaged}
        with atomic_write(_snapshot(folder, step)) as path:
            about = {"step": step, "lengths": self.lengths}
            torch.save({**about, "means": means, "buffers": buffers}, path)
        kept = {_snapshot(folder, s) for s in self.snapshots}
        ours = [p for p in folder.glob("snapshot-*.pt") if re.fullmatch(r"\w+-\d{7,}", p.stem)]
        for path in (*ours, *left_over(folder)):
            if path not in kept:
                path.unlink(missing_ok=True)


def _snapshot(folder, step):
    return folder / f"snapshot-{step:07d}.pt"


# -------------------------------------------------------------------------------- and afterwards


def _read(path):
    """The snapshot in a file, its tensors mapped; BadInput, naming it, for anything else there."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # by its sums, which torch.load does not look at
        found = load_mapped(path)
        means = list(zip(found["lengths"], found["means"], strict=True))
        tensors = [*found["buffers"].values(), *(v for _, mean in means for v in mean.values())]
        whole = all(0 < length <= LONGEST + 1e-12 for length, _ in means) and found["step"] > 0
        whole = whole and all(isinstance(v, torch.Tensor) for v in tensors)
    except Exception as error:  # a torn file makes torch.load raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise BadInput(f"{path} is truncated or no snapshot of running means ({reason})") from None
    if damaged:
        raise BadInput(f"{path} is damaged: its sums are wrong; remove it")
    if not (means and whole):
        raise BadInput(f"{path} is no snapshot of running means: its lengths or tensors are none")
    return found


def _layout(mean):
    return {name: (value.shape, value.dtype) for name, value in mean.items()}


@torch.no_grad()
def reconstruct(folder, length, steps):
    """The running mean of this length (sigma_rel) at the last snapshot: a state_dict on the CPU.

    folder    where PowerEMA.save_snapshot wrote
    steps     of the snapshots that count: a checkpoint names those of its past, PowerEMA.snapshots

    A line says where the snapshots can make such a mean only roughly. Sums are in float64. Raises
    BadInput for a length out of range, where snapshots are missing, and for files that are damaged
    or of different networks.
    """
    gamma, paths = gamma_of(length), [_snapshot(Path(folder), step) for step in sorted(steps)]
    if not paths:
        told = "this network has no running means: edm.py --ema-lengths 0.05 0.1 trains with some"
        raise BadInput(f"--ema-length {length:g}: {told}")
    if gone := [path for path in paths if not path.is_file()]:
        raise BadInput(f"{gone[0]} is missing, of {len(paths)} snapshots: copy it there")
    found = [(step, path, _read(path)) for step, path in zip(sorted(steps), paths, strict=True)]
    t, newest, last = found[-1]
    layout = _layout(last["means"][0])
    terms = []  # (gamma, step, the mean)
    for at, path, snapshot in found:
        for tracked, mean in zip(snapshot["lengths"], snapshot["means"], strict=True):
            if _layout(mean) != layout or snapshot["step"] != at:
                raise BadInput(f"{path} is of another network or step than {newest}")
            terms.append((gamma_of(tracked), at, mean))
    gammas, steps, means = zip(*terms, strict=True)
    x, missed = coefficients(gammas, steps, gamma, t)
    if missed > ROUGH:
        what = f"note: {len(found)} snapshots make a running mean of length {length:g} only roughly"
        say_once(f"{what}, they miss {missed:.0%} of its profile; --snapshot-every sets how many")
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, (shape, _) in layout.items()}
    for weight, mean in zip(x, means, strict=True):
        for name, value in mean.items():
            total[name].add_(value, alpha=float(weight))
    return {name: total[name].to(dtype) for name, (_, dtype) in layout.items()} | last["buffers"]
