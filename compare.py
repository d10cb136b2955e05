"""Chapter 2, concluded: which sampler, how many steps, how much guidance?

A sampler is worth what its images are worth, so each is scored by eval_fid.py: how far N samples
lie from held-out images (the Fréchet distance of a classifier's features, lower is better), and how
many of them the classifier reads as the class that was asked for. What it costs is counted in
evaluations of the network, which depend on no machine, and in seconds, which do.

    python ddim.py --compare runs/pixel-mnist/ckpt.pt --n 1000 --compare-steps 5,10,20,50

It leaves beside the checkpoint, or in --out,
    compare.md, compare.json    two tables: sampler x steps, and guidance; with all that made them
    compare.png                 the first as curves over network evaluations
    compare-grids.png           the same few seeds in each of its cells
    guidance.png                the second: curves, and the same few seeds
    compare.jsonl               a line for each finished row, so that a later call goes on there;
                                its images are in compare-cells/
"""

from runtime.commandline import folder_of, parse_classes, parse_seeds

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ddim import (
    SAMPLERS,
    draw,
    evaluations,
    labels_of,
    numbers_of,
    open_net,
    subsequence,
)
from evaluation import comparison
from evaluation import scores as evaluation

SHOWN = 16  # images in a cell of the grids


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def compare(cfg, world):
    """--compare: both tables, their figures, and the lines they are made from."""
    net, trained, shape, names, alpha_bar, cfg = open_net(cfg.compare, cfg, world)
    drawn = parse_classes(cfg.classes, names) if cfg.classes else range(len(names))
    judge = evaluation.Judge(
        cfg.data or trained.data,
        cfg.data_root or trained.data_root,
        shape=shape,
        size=trained.size,
        class_names=names,
        device=world.device,
        classes=",".join(names[i] for i in drawn) if cfg.classes else trained.classes,
    )
    seeds, T = parse_seeds(cfg.seeds, cfg.n), trained.timesteps
    labels = labels_of(net, cfg, names, seeds)
    folder = folder_of(cfg, cfg.compare)
    store = comparison.Store(folder / "compare.jsonl", folder / "compare-cells")
    world.barrier()  # every rank has read the store before one adds to it
    common = {
        "weights": comparison.fingerprint(net.state_dict()),
        "n": len(seeds),
        "seeds": cfg.seeds,
        "classes": cfg.classes,
        "spacing": cfg.spacing,
        "protocol": judge.protocol,
        "reference": judge.reference,
        "n_reference": judge.n_reference,
        "device": f"{world.size} x {device_name(world.device)}",
        "batch_size": cfg.batch_size,
    }

    def row(sampler, steps, w):
        """What this sampler is worth: computed, unless the store has it."""
        own = replace(cfg, sampler=sampler, guidance=w)
        about = {"sampler": sampler, "steps": steps, "guidance": w}
        about |= {"eta": cfg.eta} if sampler == "ddim" else {}
        about |= {"variance": cfg.variance} if sampler == "ddpm" else {}
        found = store.find(common | about)
        if found:
            return found
        pairs, desc = subsequence(T, steps, cfg.spacing), f"{sampler}, {steps} steps, w = {w:g}"
        start = time.perf_counter()
        images = draw(
            net, alpha_bar, pairs, own, world, shape, labels, seeds, trained.prediction, desc
        )
        seconds = time.perf_counter() - start
        figures = judge(images.numpy(), None if labels is None else labels.numpy(), world)
        figures |= {
            "evaluations": evaluations(sampler, steps, labels is not None and w != 0),
            "seconds_per_image": seconds / len(seeds),
        }
        return store.add(common | about, figures, images[:SHOWN].numpy(), write=world.is_main)

    # One step first, not timed: a GPU compiles its kernels when they are first used.
    few = slice(0, world.size)
    few_labels = None if labels is None else labels[few]
    draw(
        net,
        alpha_bar,
        subsequence(T, 1),
        cfg,
        world,
        shape,
        few_labels,
        seeds[few],
        trained.prediction,
        "warm-up",
    )
    wanted = sorted({min(k, T) for k in numbers_of(cfg.compare_steps, "--compare-steps")})
    by_steps = [row(sampler, k, cfg.guidance) for sampler in SAMPLERS for k in wanted]
    by_guidance, steps = [], min(cfg.sample_steps, T)
    if labels is not None and net.without_label:
        values = numbers_of(cfg.compare_guidance, "--compare-guidance", float)
        by_guidance = [row(cfg.sampler, steps, w) for w in sorted(set(values))]
    if world.is_main:
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        facts = common | {"checkpoint": cfg.compare, "command": command}
        comparison.write(folder, facts, by_steps, by_guidance, store)
        print((folder / "compare.md").read_text())
        print(f"kept in {folder}: compare.md, .json and .png, compare-grids.png, guidance.png")
