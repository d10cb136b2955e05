"""Small networks trained with their weights split over ranks; each rank writes what it saw."""

from runtime.processes import World, launch
from runtime.run import EMA
from runtime.sharding import load_optimizer, shard, unsharded, whole

import contextlib
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from dit import DiT
from networks.sd_unet import LatentUNet

SHAPE, CLASSES, BATCH, CLIP = (3, 4, 4), 5, 8, 0.1
KINDS = ("dit", "unet")


def make(kind, checkpointing=False):
    """A network of 2 blocks without a zero among its weights, which would hide what is behind."""
    torch.manual_seed(0)
    if kind == "dit":
        net = DiT(
            SHAPE,
            CLASSES,
            hidden_size=32,
            depth=2,
            num_heads=2,
            patch_size=2,
            use_checkpoint=checkpointing,
        )
    else:
        net = LatentUNet(
            SHAPE[0],
            CLASSES,
            model_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(1,),
            num_heads=2,
            context_dim=12,
            add_label=True,
            use_checkpoint=checkpointing,
        )
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.to(memory_format=torch.channels_last)


def batch(step, rows=slice(None), dtype=torch.float64):
    """((z, t, y), target) of a step: `rows` of the 8 that all processes have together."""
    rng = torch.Generator().manual_seed(step)
    z, target = torch.randn(2, BATCH, *SHAPE, generator=rng, dtype=dtype)
    t = torch.randint(1000, (BATCH,), generator=rng)
    y = torch.randint(CLASSES + 1, (BATCH,), generator=rng)
    return (z[rows], t[rows], y[rows]), target[rows]


class Training:
    """A network in float64, its running mean and Adam, from scratch or from a whole state."""

    def __init__(self, kind, world=None, state=None, checkpointing=False):
        self.world = world or World()
        self.net = make(kind, checkpointing).double()
        self.ema, self.updates = EMA(self.net, 0.9), 0
        if state:
            self.net.load_state_dict(state["model"])
            self.ema.net.load_state_dict(state["ema"])
            self.updates = state["step"]
        shard(self.net, self.world)
        shard(self.ema.net, self.world)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2, fused=True)
        if state:
            load_optimizer(self.optimizer, state["optimizer"])

    def run(self, steps):
        """[(loss, norm of the gradient)] of the whole batch at each step."""
        seen = []
        for step in steps:
            inputs, target = batch(step, self.world.share(BATCH))
            loss = (self.net(*inputs) - target).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update(self.net, self.updates)
            self.updates += 1
            seen.append((float(self.world.sum(loss.detach())) / self.world.size, float(norm)))
        return seen

    def state(self, step):
        parts = dict(model=self.net, ema=self.ema.net, optimizer=self.optimizer)
        state = {name: whole(part.state_dict()) for name, part in parts.items()}
        return copy.deepcopy({"step": step, **state})  # what is not split goes on changing

    def held(self):
        """Bytes of memory behind this process's weights, moments and running mean."""
        moments = [s[m] for s in self.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
        lists = list(self.net.parameters()), moments, list(self.ema.net.parameters())
        return [
            sum(getattr(x, "_local_tensor", x).untyped_storage().nbytes() for x in tensors)
            for tensors in lists
        ]


def sampled(net, times):
    """Answers of a split `net` to `times` batches, made by this rank alone."""
    with torch.inference_mode(), unsharded(net):
        return [net(*batch(step)[0]).clone() for step in range(times)]


def under_autocast(world):
    """(output, gradients) of a float32 DiT in bf16 autocast, on the same batch on every rank."""
    net = make("dit")
    shard(net, world)
    inputs, target = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(*inputs)
    (found.float() - target).square().mean().backward()
    return found.detach(), whole([p.grad for p in net.parameters()])


def see(kind, world, folder):
    """What the tests compare, of one network."""
    rank, saw = world.rank, {}
    training = Training(kind, world)
    saw["first"] = training.run(range(3))
    saw["held"], saw["state 3"] = training.held(), training.state(3)
    saw["ema samples"] = sampled(training.ema.net, 3 if rank == 0 else 0)
    saw["samples"] = sampled(training.net, 0 if rank == 0 else 3)
    with contextlib.suppress(IndexError), unsharded(training.net):
        if rank == 0:  # breaks off in the middle
            training.net(*batch(0)[0][:2], y=torch.full((BATCH,), 99))
    saw["then"], saw["state 6"] = training.run(range(3, 6)), training.state(6)
    state = torch.load(folder / f"{kind}.pt", weights_only=True)
    resumed = Training(kind, world, state, checkpointing=True)
    with torch.no_grad():  # forwards that no backward follows
        saw["answers"] = [t(*batch(0)[0]) for t in (training.net, resumed.ema.net)]
    saw["held after"], saw["resumed held"] = training.held(), resumed.held()
    saw["resumed samples"] = sampled(resumed.net, rank)
    saw["resumed"], saw["resumed state 6"] = resumed.run(range(3, 6)), resumed.state(6)
    return saw


def main():
    folder = Path(sys.argv[1])

    def report(cfg, world):
        torch.set_num_threads(1)
        saw = {kind: see(kind, world, folder) for kind in KINDS}
        saw["autocast"] = under_autocast(world)
        torch.save(saw, folder / f"rank{world.rank}.pt")

    launch(report, SimpleNamespace(gpus=0))
