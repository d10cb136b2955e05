"""Rectified flow: a second training straightens the paths of a flow, for samples in few steps.

Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified
Flow", 2023 (arXiv:2209.03003). Their t is 1 - t here: 0 is the image, as in flow_matching.py.

flow_matching.py draws lines between images and noise that have nothing to do with each other. The
lines cross. The paths of an ODE never do: where lines cross, paths turn off, and so they bend, and
a solver needs many steps. But each path connects one noise with one image. Train on the lines
between the two ends of paths (reflow, section 2.2),

    eps ~ N(0, I),   x_0 = where the path from eps ends
    min E || v(x_t, t) - (eps - x_0) ||^2,   x_t = (1 - t) x_0 + t eps                       eq. 1

and these lines cross less. Images stay as they are distributed, and paths become straighter, by

    S = integral of E || (eps - x_0) - v(x_t, t) ||^2 dt                                     eq. 3

along the paths: 0 if all are straight, and then a single step of Euler's method is exact. What the
first flow did wrong the second one learns, and adds its own mistakes.

    python rectified_flow.py --data mnist        trains a flow first; 75 minutes of one CPU core
    python rectified_flow.py --flow runs/flow-mnist/ckpt.pt --pairs 5000              35 minutes
    python flow_matching.py --sample runs/reflow-mnist/ckpt.pt --sampler euler --sample-steps 1

What it leaves is sampled by flow_matching.py, and can be the --flow of a third training.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.locks import leave
from runtime.processes import launch
from runtime.run import Run

import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

import ddim
import flow_matching
from eval_fid import Evaluator
from evaluation import flows
from flow_matching import (
    OF_T,
    SAMPLING,
    draw,
    draw_t,
    flow_loss,
    follow,
    sample_checkpoint,
    shifted,
    times_of,
)
from image_data import datasets
from image_data.pairs import Pairs, check_kept, kept_pairs
from kernels import gaussian

OF_FLOW = (*flow_matching.OF_DATA, *flow_matching.OF_UNET, "model", "class_cond", "latents")


@dataclass
class Config(flow_matching.Config):
    flow: str = ""
    """straighten the paths of this checkpoint of flow_matching.py, trained as it was; without it
    one is trained first, in OUT/flow"""
    pairs: int = 10000  # of noise and image, drawn by --sampler with --guidance

    TRAINING = flow_matching.Config.TRAINING | {"pairs"}
    USES = {
        "flow": TRAINING,
        "latents": TRAINING | {"model"},
        "sample": flow_matching.Config.USES["sample"],
    }
    IDLE = cli.names("nll encode interpolate encode_steps")
    FREE = flow_matching.Config.FREE | {"flow"}


# ------------------------------------------------------------------------------- both ends of paths


def draw_pairs(flow, cfg, world):
    """Pairs of the noise of seeds 0, 1, ... and what the flow makes of it, kept in OUT."""
    made_of = {name: getattr(cfg, name) for name in (*SAMPLING, "pairs")}
    made_of["weights"] = checkpoints.weights_hash(flow.net)
    check_kept(cfg, made_of)
    seeds = torch.arange(cfg.pairs)
    labels = cli.labels_for(seeds, range(flow.net.null), cfg.guidance)
    labels = None if cfg.guidance == -1 else labels

    def make(some):
        y = None if labels is None else labels[some]
        how = f"pairs to {some.stop}", lambda z, seeds: z.float()
        return draw(flow, cfg, world, seeds[some], y, *how)

    images = kept_pairs(cfg.out, world, (cfg.pairs, *flow.space.z_shape), make, made_of=made_of)
    return Pairs.of(images, labels, flow.names, flow.space.shape, made_of)


def straightness(v, x, steps=50):
    """S of the path of v(x, t) from each noise x (B,...), (B,), a mean over its numbers: eq. 3."""
    start, slopes = x, []
    for x_next, _ in follow(v, x, times_of(steps), "euler"):
        slopes.append((x - x_next) * steps)
        x = x_next
    S = sum((start - x - slope).square() for slope in slopes) / steps
    return S.flatten(1).mean(1)


# -------------------------------------------------------------------------------------- training


def first_flow(cfg, world):
    """The flow that is straightened: of --flow, or trained, or the one that was trained before."""
    path, out = cfg.flow, Path(cfg.out, "flow")
    if cfg.resume != "never" and Path(cfg.out, "ckpt.pt").is_file():
        path = path or str(out / "ckpt.pt")  # whole, if there is a reflow of it
    if path := world.gather(path)[0]:
        with world.from_first(path) as path:
            return flow_matching.load_flow(path, world.device)[0]
    shared = {field.name: getattr(cfg, field.name) for field in fields(flow_matching.Config)}
    shared |= {"out": str(out), "guidance": 0.0}
    shared |= {"resume": "never" if cfg.resume == "never" else "auto"}
    flow = flow_matching.train(flow_matching.Config(**shared), world)
    leave(out)  # for nothing more is written there
    return flow


def train(cfg, world):
    before = first_flow(cfg, world)
    before = before._replace(net=before.net.eval().requires_grad_(False))
    ds = draw_pairs(before, cfg, world)
    net = copy.deepcopy(before.net).train().requires_grad_(True)
    net.use_checkpoint = cfg.use_checkpoint
    guided, cfg = cfg, replace(cfg, guidance=0.0)  # the pairs are guided already
    evaluator = Evaluator.of_run(cfg, datasets.of(cfg), world) if cfg.metric_every else None
    facts, script = before.space.facts, "flow_matching"  # which samples it
    how = {"optimizer": world.adam(cfg.lr), "facts": facts, "script": script}
    run = Run(cfg, world, ds, net=net, **how)
    after = before._replace(net=run.ema)
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    labels = cli.labels_for(seeds, range(net.null))
    run.say(f"{len(ds)} pairs of noise and images {ds.shape}, t {cfg.weighting_scheme}")

    for step in run.steps():  # goes on where it stopped; saves between two steps
        for part in run.parts(step):  # this process's share, in --accumulate parts
            x0, y = run.images(part)  # (b,C,h,w), (b,): where paths end
            eps = gaussian(x0.shape, run.bring(part, Pairs.seeds), -1, run.device)  # their noise
            y = run.hide(part, y, cfg.label_dropout)
            u = run.noise(part, (len(x0), 1, 1, 1), "t")  # N(0, 1)
            t = shifted(draw_t(u, *(getattr(cfg, name) for name in OF_T)), cfg.shift)  # (b,1,1,1)
            run.backward(flow_loss(run.model, x0, t, eps, y), t.flatten())
        run.descend()  # clip the gradient, Adam, running means, log
        if evaluator and (run.due(cfg.metric_every) or run.done):
            drawn = partial(draw, after, cfg, world)
            run.log_metrics(partial(evaluator.score, drawn, cfg.metric_n, net.null))
        if run.due(cfg.sample_every):
            run.save_grid(partial(draw, after, cfg, world, seeds, labels))
    flow_matching.save_images(after, cfg, world, seeds, labels, run.folder)
    both = {"before": (before, guided), "after": (after, cfg)}
    flows.save_reflow(run.folder, world, {k: compared(*v, world) for k, v in both.items()})


@torch.no_grad()
def compared(flow, cfg, world):
    """({number of Euler's steps: uint8 images}, S (N,)) of the noise of seeds 0, 1, ..."""
    seeds = torch.arange(4 if cfg.smoke else min(64, cfg.batch_size))
    y = cli.labels_for(seeds, range(flow.net.null))
    grids = {}
    for steps in sorted({1, 2, 4, cfg.sample_steps}):
        few = replace(cfg, sampler="euler", sample_steps=steps)
        grids[steps] = draw(flow, few, world, seeds, y, f"{steps} steps")
    seeds, y = ddim.on(world.device, seeds), ddim.on(world.device, y)
    x, how = ddim.noise(seeds, flow.space.z_shape), (cfg.guidance, cfg.clip_denoised)
    v = flow_matching.velocity(flow.net, flow_matching.straight, y, *how)
    with world.autocast():
        return grids, straightness(v, x).cpu()


def check(cfg):
    """Raise BadInput for a setting out of its range, and for settings that contradict others."""
    flow_matching.check(cfg)
    cli.check_ranges(cfg, "pairs")
    if cfg.sampler == "ddpm" and not cfg.sample:
        raise cli.BadInput("--sampler ddpm: a path has no fresh noise; type another, such as heun")


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_flow.yaml")
    cfg = flow_matching.settled(cfg, pairs=16, out="runs/smoke-reflow")
    if cfg.flow:
        names = flow_matching.OF_RUN[: 1 if cfg.smoke else None]
        cfg = checkpoints.as_trained(cfg, (*names, *OF_T), cfg.flow, "flow_matching", OF_FLOW)
    if cfg.resume not in ("auto", "never"):  # known now, not after an hour's work
        checkpoints.load_checkpoint(cfg.resume, "flow_matching", facts=True)
    check(cfg)
    if cfg.sample:
        return launch(sample_checkpoint, cfg)
    cfg = datasets.prepared(cfg)  # by one process
    name = f"runs/reflow-{Path(cfg.data).stem}" + "-latent" * bool(cfg.latents)
    launch(train, replace(cfg, out=cfg.out or name))


if __name__ == "__main__":
    cli.entry(main)
