"""A DiT split over ranks, trained in fp16 with a scaled loss; each rank writes what it saw."""

from runtime.precision import LossScaler
from runtime.processes import launch
from runtime.sharding import shard, whole

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from rank_sharded import BATCH, CLIP, batch, make


def see(world):
    """[weights, factor of the loss, steps skipped so far] after each of three steps.

    In the second one the loss of the first image, which rank 0 has, is too large.
    """
    net, rows, seen = make("dit"), world.share(BATCH), []
    shard(net, world)
    # With eps = 1 a step is proportional to the gradient, and rounding stays as small as it is.
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0, eps=1.0, fused=True)
    scaler = LossScaler(world)
    for step in range(3):
        inputs, target = batch(step, rows, dtype=torch.float32)
        with world.autocast():
            out = net(*inputs).float()
        losses = (out - target).square().mean(dim=(1, 2, 3))
        if step == 1 and rows.start == 0:
            losses = torch.cat([1e30 * losses[:1], losses[1:]])
        scaler.scale(losses.mean()).backward()
        scaler.descend(optimizer, net.parameters(), CLIP)
        optimizer.zero_grad(set_to_none=True)
        weights = copy.deepcopy(whole(net.state_dict()))
        seen.append([weights, scaler.get_scale(), float(scaler.skipped)])
    return seen


def main():
    def report(cfg, world):
        torch.set_num_threads(1)
        torch.save(see(world), Path(sys.argv[1]) / f"rank{world.rank}.pt")

    launch(report, SimpleNamespace(gpus=0, precision="fp16"))
