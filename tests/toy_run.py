"""A training run of a network of some hundred numbers, on noise, with all that Run can do."""

from runtime.commandline import RunConfig
from runtime.processes import World
from runtime.run import Run

import functools

import numpy as np
import torch
from data_files import noise
from torch import nn

from image_data.batches import Dataset

N, SHAPE, NULL, T = 20, (1, 4, 4), 3, 100
LABELS = np.arange(N, dtype=np.int64) % NULL
IMAGES = Dataset("noise", noise((N, 4, 4, 1)), LABELS, ("a", "b", "c"), {"key": "of these"})
SETTINGS = {"batch_size": 8, "steps": 10, "warmup": 3, "log_every": 1, "save_every": 3}


class Net(nn.Module):
    """net(x, t, y), of some hundred numbers, with dropout."""

    null, settings = NULL, {"width": 4}

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv_in, self.label = nn.Conv2d(1, 4, 3, padding=1), nn.Embedding(NULL + 1, 4)
        self.drop, self.conv_out = nn.Dropout(dropout), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.null) if y is None else y
        h = self.conv_in(x) + self.label(y)[:, :, None, None]  # (b,4,4,4)
        return self.conv_out(self.drop(torch.tanh(h)))


class Alone(World):
    """One of several processes that never meet."""

    def wrap(self, net, static=False):
        return net

    def barrier(self):
        pass

    def gather(self, thing):
        return [thing] * self.size


class Counter:
    """Further state of a run: how many images it has seen."""

    def __init__(self):
        self.seen = torch.zeros((), dtype=torch.int64)

    def state_dict(self):
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state):
        self.seen = state["seen"].clone()


def make(out, *, ds=IMAGES, world=None, dropout=0.0, optimizer=None, more=None, **settings):
    """A Run of the toy network; more: further arguments of Run; settings of its RunConfig."""
    torch.manual_seed(1)
    cfg = RunConfig(out=str(out), **{**SETTINGS, **settings})
    adam = functools.partial(torch.optim.Adam, lr=cfg.lr)
    how = {"net": Net(dropout), "optimizer": optimizer or adam, "script": "toy", **(more or {})}
    run = Run(cfg, world or World(), ds, **how)
    run.plot_loss = lambda: None  # it takes longer than the training
    return run


def losses_of(run, part):
    """(losses (b,), level (b,)) of a part, with all that Run draws."""
    x0, y = run.images(part)
    t, eps = run.uniform(part, T), run.noise(part, x0.shape)
    out = run.model(x0 + eps, t, run.hide(part, y, 0.2))
    return (out - eps).square().mean(dim=(1, 2, 3)), t / T


def train(run, stop=None, each=lambda run: None):
    """Train, as a chapter does; stop: after so many steps, as a kill does, before they are saved.

    each(run) is called after every step.
    """
    for step in run.steps():
        for part in run.parts(step):
            losses, level = losses_of(run, part)
            run.backward(losses, level)
            for counter in run.keep.values():
                counter.seen += len(losses)
        run.descend()
        each(run)
        if run.step == stop:
            break
    return run


def weights(net):
    return [p.detach().double().clone() for p in net.parameters()]
