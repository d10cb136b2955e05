"""The loop that every chapter trains in. A chapter owns the `for`; Run carries what all repeat.

    run = Run(cfg, world, ds, net=net, optimizer=lambda params: Adam(params, lr=cfg.lr))
    for step in run.steps():                 progress, learning rate; saves between two steps
        for part in run.parts(step):         this process's share, in --accumulate parts
            x0, y = run.images(part)
            t, eps = run.uniform(part, T), run.noise(part, x0.shape)
            run.backward(loss(run.model, x0, t, eps), t / T)
        run.descend()                        clip, optimizer, running means, log
        if run.due(cfg.sample_every):
            ...

All that is random is drawn for the global batch from (seed, step, name), then shared out: one
process, several, and a run that goes on after a kill see the same images, t and noise.
"""

from runtime.commandline import BadInput
from runtime.folder import RunFolder, about, peak_memory

import collections
import copy
import functools
import math
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kernels import gaussian

# ------------------------------------------------------------------------- the order of the data


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(n, batch_size, seed, step):
    """Which of n images training step `step` sees: int64 (batch_size,).

    The images of all epochs form one endless sequence, each epoch a permutation of its own; step s
    takes the batch_size images from s * batch_size on. So the order is a function of (seed, step).
    """
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), n)
    orders = {epoch: _permutation(n, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.concatenate([orders[epoch][places[epochs == epoch]] for epoch in orders])


def flips(batch_size, seed, step):
    """Which images of indices(...) to mirror left to right, half of them: bool (batch_size,)."""
    return np.random.default_rng([seed, step, 2]).random(batch_size) < 0.5


class Part(NamedTuple):
    """Some images of a step's global batch, which are handled together."""

    step: int
    where: slice  # their place in the global batch
    rows: np.ndarray  # their numbers in the data set, int64 (b,)
    flip: np.ndarray | None  # which of them to mirror, bool (b,)


# ----------------------------------------------------------------------- the optimizer's companions


def learning_rate(step, steps, peak, warmup, decay="cosine"):
    """Rises linearly over `warmup` steps; falls to zero at `steps` as a half cosine, or stays."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if decay == "cosine" else 1.0
    return peak * rise * fall


class EMA:
    """A running mean of a network's weights: w_ema += (1 - d) (w - w_ema).

    d = min(decay, (1 + n) / (10 + n)) at update n: an average over few steps should not remember
    the first weights. Update 0 copies. `net` is a module of its own, in eval mode.
    """

    def __init__(self, net, decay):
        self.net, self.decay = copy.deepcopy(net).eval(), decay

    @torch.no_grad()
    def update(self, net, n):
        d = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - d)
        if buffers := list(net.buffers()):
            torch._foreach_copy_(list(self.net.buffers()), buffers)


class LossMeter:
    """Mean loss between two log lines, whole and by quarter of the timestep range.

    Stays on the device, so that a training step never waits for the GPU.
    """

    def __init__(self, device):
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        self.first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def add(self, step, losses, level=None):
        """losses (b,), one per sample; level (b,) in [0, 1), t / T where there are timesteps."""
        losses, self.split = losses.detach().double(), level is not None
        level = level if self.split else torch.zeros_like(losses)
        quarter = (level * 4).long().clamp(0, 3)
        self.sums.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        bad = torch.where(losses.isfinite().all(), torch.inf, float(step))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self, world, checkpoint):
        """{'loss': ..., 'loss_q1': ...}, over all processes, and start again.

        Raises BadInput if a loss since the last call was not finite: the step and the checkpoint.
        """
        first_bad = world.collect(self.first_bad.view(1), world.size).min()  # of all processes
        if first_bad.isfinite():
            last = f"the last good checkpoint is {checkpoint}"
            last = last if checkpoint.exists() else "no checkpoint exists yet"
            at = f"at step {int(first_bad)}"
            raise BadInput(f"the loss is not finite {at}; {last}; try a smaller --lr")
        total, count = world.sum(self.sums.clone()).cpu()
        self.sums.zero_()
        parts = range(4) if self.split else ()
        named = ((f"loss_q{i + 1}", i) for i in parts if count[i] > 0)
        quarters = {name: float(total[i] / count[i]) for name, i in named}
        return {"loss": float(total.sum() / count.sum()), **quarters}


# -------------------------------------------------------------------------------------------- Run


class Run:
    """A training run, fresh or going on where it stopped.

    cfg        a RunConfig; cfg.out is its directory, cfg.FREE what may change when it goes on
    world      this process among others
    ds         a data set, as image_data.batches.Dataset is one
    net        the network on its device, with the weights that a fresh run starts from
    optimizer  function of the parameters -> torch optimizer
    keep       {name: object with state_dict and load_state_dict}: further state, saved and restored
    facts      dict of plain tensors and numbers that checkpoints hold, such as the latents' scale
    made_of    dict of what else decides the weights; a run does not go on with others
    script     stem of the script that samples its checkpoints; that of cfg's class by default

    run.model is the network for training: it autocasts, gives fp32, and shares its gradients among
    processes. run.net is the bare network, run.emas are its running means, run.ema the first of
    them, or run.net where there is none.
    """

    def __init__(
        self, cfg, world, ds, *, net, optimizer, keep=None, facts=None, made_of=None, script=""
    ):
        self.cfg, self.world, self.ds, self.net = cfg, world, ds, net
        self.keep, self.facts = keep or {}, facts or {}
        made_of = {"data_key": ds.key} | (made_of or {})
        if world.size > 1:
            world.agree(made_of)
        if world.nodes > 1:
            from runtime.nodes import agree_on_data

            agree_on_data(ds, world)
        self.device, self.share = world.device, world.share(cfg.batch_size)
        self.disk = RunFolder(
            cfg.out,
            script or script_of(cfg),
            cfg,
            world,
            free=cfg.FREE,
            made_of=made_of,
            resume=cfg.resume,
            keep_every=cfg.keep_every,
            track=[name for name in ("tensorboard", "wandb") if getattr(cfg, name)],
            about=about(ds, net),
        )
        self.folder, self.log_path = self.disk.path, self.disk.log_path
        self.averages = [EMA(net, decay) for decay in cfg.ema]
        self.emas = [average.net for average in self.averages]
        self.ema = self.emas[0] if self.emas else net
        self.step = self.first = 0  # steps that are finished, and that were when we started
        self.meters = collections.defaultdict(functools.partial(LossMeter, self.device))
        self.losses, self.scaler = [], world.loss_scaler()
        if self.device.type == "cuda":
            from runtime.prefetch import Ahead

            self.bring = Ahead(world, self._parts)
        self._restore(optimizer)
        self.sharded = getattr(cfg, "shard", False) and world.size > 1
        self.wrapped = self._wrap(torch.compile(net) if cfg.compile else net)

    def _restore(self, optimizer):
        """Weights, running means, optimizer and further state, from the checkpoint if there is one.

        The order matters: a network is loaded whole, then split; an optimizer is made of the split
        parameters.
        """
        from runtime import kept

        state = self.disk.restore()
        if state:
            self.step = self.first = state["step"]
            kept.load_networks(self.net, self.emas, state)
        if getattr(self.cfg, "shard", False):
            from runtime import sharding

            for net in (self.net, *self.emas):
                sharding.shard(net, self.world)
        self.optimizer = optimizer(self.net.parameters())
        if state:
            kept.load_optimizer(self.optimizer, state)
            if self.scaler:
                self.scaler.load_state_dict(state.get("scaler"))
            for name, thing in self.keep.items():
                with kept.fitting(state, name):
                    thing.load_state_dict(state[name])

    def _wrap(self, net):
        """net as model() calls it."""
        if self.cfg.graph or self.device.type == "cuda":
            from runtime.graphs import Later, is_wanted

            if is_wanted(self.cfg, self.world):
                return Later(net, self.world)
        # DDP takes the first gradients asked for as those of a step. With a discriminator they are
        # of one layer, and nothing would be shared from then on.
        static = self.cfg.accumulate == 1 and not getattr(self.cfg, "discriminator", 0)
        # A network that is split shares its gradients itself.
        return net if self.sharded else self.world.wrap(net, static)

    # ---- the steps

    def steps(self):
        """Yields the number of each step that is left; after it, saves where that is due.

        A step is saved when the next one is asked for, after all that the chapter did in it.
        """
        cfg, steps = self.cfg, self.cfg.steps
        self.bar = self.world.progress(steps, self.first, Path(cfg.out).name)
        self.net.train()
        for step in self.world.watch(self, range(self.first, steps)):
            rate = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.lr_decay)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.losses = []
            # What dropout draws from is a function of the seed, the step and the process.
            torch.manual_seed(int(self.rng(step, "dropout").integers(2**31)) + self.world.rank)
            yield step
            self.bar.update()
            if self.step % cfg.save_every == 0 or self.done:
                self.save()
        self.bar.close()
        vars(self).pop("bring", None)  # on a GPU it refers to this run, which would outlive its use
        self.plot_loss()
        self.world.barrier()  # the checkpoint is whole before any rank reads it

    def parts(self, step):
        """This process's share of the step's images, in --accumulate parts."""
        for part in self._parts(step):
            self.share_gradients(part.where.stop == self.share.stop)
            yield part

    def _parts(self, step):
        cfg, share = self.cfg, self.share
        rows = indices(len(self.ds), cfg.batch_size, cfg.seed, step)
        flip = flips(cfg.batch_size, cfg.seed, step) if cfg.flip else None
        each = -(-(share.stop - share.start) // cfg.accumulate)
        for start in range(share.start, share.stop, each):
            where = slice(start, min(start + each, share.stop))
            yield Part(step, where, rows[where], None if flip is None else flip[where])

    def share_gradients(self, on):
        """Whether the next backward shares gradients among processes: in the last part only."""
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(on)
        elif self.world.size > 1 and self.cfg.accumulate > 1:
            self.wrapped.require_backward_grad_sync = on

    # ---- what a part is made of: functions of (seed, step, name)

    def rng(self, step, name):
        """A numpy Generator for the global batch of a step."""
        return np.random.default_rng([self.cfg.seed, step, zlib.crc32(name.encode())])

    def images(self, part):
        """What ds.batch gives of the part, on the device: (b,C,H,W), and labels (b,) or None."""
        x = self.ds.floats(self.bring(part, self._stored))
        return x, self.bring(part, self._labels) if self.ds.num_classes else None

    def uniform(self, part, T, name="t"):
        """int64 (b,) in 0..T-1, each as likely."""
        return self.bring(part, self._ints, T, name)

    def noise(self, part, shape, name="noise"):
        """N(0, I) of `shape` (b, ...), each sample's by a seed of its own."""
        return gaussian(shape, self.bring(part, self._ints, 2**62, name), part.step, self.device)

    def hide(self, part, y, share, name="hide"):
        """Labels y (b,) with a share of them replaced by net.null; None stays None."""
        if y is None:
            return None
        hidden = self.bring(part, self._chances, name) < share
        return torch.where(hidden, self.net.null, y)

    def bring(self, part, make, *arguments):
        """The array make(part, *arguments), which is that at any time, as a tensor on the device.

        On a GPU runtime/prefetch.py does this, a step ahead.
        """
        return torch.from_numpy(make(part, *arguments))

    def _stored(self, part):
        return self.ds.stored(part.rows, part.flip)

    def _labels(self, part):
        return self.ds.labels[part.rows]

    def _ints(self, part, high, name):
        return self.rng(part.step, name).integers(high, size=self.cfg.batch_size)[part.where]

    def _chances(self, part, name):
        return self.rng(part.step, name).random(self.cfg.batch_size)[part.where]

    # ---- the descent

    def model(self, *inputs):
        """The network's output in fp32; where --precision is less, so are most of its products."""
        with self.world.autocast():
            out = self.wrapped(*inputs)
        if isinstance(out, tuple):
            return tuple(v.float() if v.is_floating_point() else v for v in out)
        return out.float()

    def backward(self, losses, level=None, weights=None, **terms):
        """Add the gradient of the mean loss over the global batch.

        losses (b,) of a part; level (b,) in [0, 1) is t / T, by which the log splits all; weights
        (b,) multiply the gradients and not the log; terms (b,) are logged under their names.
        """
        weighted = losses if weights is None else losses * weights
        mean = weighted.sum() / (self.share.stop - self.share.start)
        (self.scaler.scale(mean) if self.scaler else mean).backward()
        self.losses.append(losses.detach())
        for name, values in {"loss": losses, **terms}.items():
            self.meters[name].add(self.step, values, level)

    def descend(self, also=None):
        """Clip the gradient, step the optimizer, update the running means, and log where it is due.

        In fp16 a gradient that overflows moves no weight; the running means go on towards them.
        also: function that gives a dictionary of further values for the line of the log.
        """
        cfg = self.cfg
        if self.scaler:
            self.scaler.descend(self.optimizer, self.net.parameters(), cfg.clip_grad)
        else:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), cfg.clip_grad)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.net, self.step)
        self.step += 1
        if self.step % cfg.log_every and not self.done:
            return
        values, last = {}, self.folder / "ckpt.pt"
        with self.disk.last_words(self.step):
            for name, meter in self.meters.items():
                found = meter.read(self.world, last)
                values |= {key.replace("loss", name): value for key, value in found.items()}
        values |= also() if also else {}
        values |= self.scaler.read(self.step) if self.scaler else {}
        images = (self.step - self.first) * cfg.batch_size
        rate, memory = self.disk.rate(images), peak_memory(self.device)
        lr = self.optimizer.param_groups[0]["lr"]
        self.log(**values, lr=lr, images_per_s=rate, peak_memory_mb=memory)
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    @property
    def done(self):
        """Whether the last step is finished."""
        return self.step == self.cfg.steps

    def due(self, every):
        """Whether what happens every so many steps (0: never) is due; never after the last."""
        return bool(every) and self.step % every == 0 and not self.done

    # ---- what it leaves

    def log(self, **values):
        """Append a line to log.jsonl, of the steps finished so far."""
        self.disk.log(self.step, **values)

    def say(self, what):
        """Print what is trained, and how many parameters it has."""
        if self.world.is_main:
            count = sum(p.numel() for p in self.net.parameters()) / 1e6
            print(f"{what}; {count:.2f} M parameters", flush=True)

    def log_metrics(self, make):
        """Log the scores that make() gives, if samples are finite, and draw metric.png."""
        if not (values := self.world.drawn(make, self.step)):
            return
        self.log(**values)
        if self.world.is_main:
            from runtime.plots import plot_metrics

            plot_metrics(self.folder)

    def save(self):
        """Write the checkpoint of the steps finished so far. All ranks call it."""
        state = {
            "model": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "more_emas": [ema.state_dict() for ema in self.emas[1:]],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }
        if self.sharded:
            from runtime.sharding import whole

            state = {name: whole(value) for name, value in state.items()}
        state |= {name: thing.state_dict() for name, thing in self.keep.items()}
        settings = getattr(self.net, "settings", {})
        about = {"shape": list(self.ds.shape), "class_names": list(self.ds.class_names)}
        self.disk.save(self.step, settings=settings, **state, **about, **self.facts)

    def save_grid(self, make, columns=10):
        """samples-STEP.png of 100 images uint8 (N,H,W,C) that make() gives, if finite; loss.png."""
        images = self.world.drawn(make, self.step)
        if images is not None:
            self.disk.show(self.step, images[:100], columns)
        if not self.done:  # it comes after the last step
            self.plot_loss()

    def plot_loss(self):
        """loss.png and report.html from log.jsonl."""
        if self.world.is_main:
            from runtime.plots import plot_loss

            plot_loss(self.folder)
        self.disk.report()


def script_of(cfg):
    """The stem of the root script whose Config `cfg` is."""
    return Path(sys.modules[type(cfg).__module__].__file__).resolve().stem
