"""What a run of latent diffusion would do, said before it starts: sizes, memory, disk, stages."""

from runtime.checkpoints import differing, load_mapped

import dataclasses
import json
import math
from pathlib import Path

import torch


def kept_for_backward(net, *inputs):
    """Bytes of activations that autograd keeps when net(*inputs) is called, but for its weights.

    Views of one tensor are counted once. What is recomputed instead of kept is not counted.
    """
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


def size_text(nbytes):
    """'12.3 GiB' of 13207024435."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def state(path, cfg):
    """How far the run got whose checkpoint is at `path`, and whether a run of cfg can go on."""
    if not Path(path).is_file():
        return "to do"
    try:
        found = load_mapped(path)
        step, config = found["step"], found["config"]
    except Exception:  # whatever torch.load makes of a file that is cut
        return f"{path} is damaged, the checkpoint before it may be whole"
    ours = json.loads(json.dumps(dataclasses.asdict(cfg)))
    theirs = {key: value for key, value in config.items() if key in ours}
    if others := differing(theirs, ours, cfg.FREE):
        return f"REFUSED, {path}: {'; '.join(others)}: name another --out"
    return f"at step {step}"


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def show(cfg, ds, ae, net, z_shape, first):
    """Print the plan for the settings cfg of a chapter on latents.

    ds: the prepared data set; ae, net: the autoencoder and the denoiser, on the CPU; z_shape
    (C,h,w); first: settings of the autoencoder's run, None if it is not trained here. Memory is
    that of the diffusion's training step on one process: what autograd keeps is counted over one
    image, and grows with the images; the rest is exact.
    """
    folder, images = Path(cfg.out), cfg.batch_size // max(1, cfg.gpus)
    one, zero = torch.zeros(1, *z_shape), torch.zeros(1, dtype=torch.int64)
    each = kept_for_backward(net.train(), one, zero, zero)
    n, n_ae = parameters(net), parameters(ae)
    latents = 8 * math.prod(z_shape) * len(ds) * (1 + cfg.flip)
    checkpoint = 16 * n + 4 * n_ae  # weights, their mean and Adam's two moments; the autoencoder
    kept = 2 + (cfg.steps // cfg.keep_every if cfg.keep_every else 0)
    split = max(1, cfg.gpus) if getattr(cfg, "shard", False) else 1
    epochs = cfg.batch_size / len(ds)  # of a step
    stage = "read, not trained"
    if first:
        done = state(Path(first.out, "ckpt.pt"), first)
        stage = f"{first.steps} steps, {first.steps * epochs:.1f} epochs: {done}"
    diffusion = state(folder / "ckpt.pt", cfg)
    there = "there" if (folder / "latents" / "manifest.json").is_file() else "to do"
    classes = f"{ds.num_classes} classes" if ds.num_classes else "no classes"
    rows = {
        "data": f"{ds.name}, {len(ds)} images {ds.height}x{ds.width}x{ds.channels}, {classes}: "
        f"in {ds.manifest['folder']}",
        "autoencoder": f"{cfg.ae}, {n_ae / 1e6:.2f} M parameters, {stage}",
        "latents": f"{z_shape[1]}x{z_shape[2]}x{z_shape[0]}, {size_text(latents)}: {there}",
        "diffusion": f"{cfg.model}, {n / 1e6:.2f} M parameters, {cfg.steps} steps of "
        f"{cfg.batch_size} images, {cfg.steps * epochs:.1f} epochs: {diffusion}",
        "processes": f"{max(1, cfg.gpus)} with {images} images each, on "
        + ("the CPU" if not cfg.gpus else "GPUs"),
        "memory each": f"{size_text(20 * n / split)} of weights, gradients, Adam and EMA, "
        + (f"{size_text(4 * n)} more while grids are drawn, " if split > 1 else "")
        + f"and about {size_text(images * each)} of activations in fp32",
        "disk": f"{size_text(latents + kept * checkpoint)}: latents and {kept} checkpoints",
        "samples": f"{max(cfg.n, cfg.n_eval)} in {cfg.sample_steps} {cfg.sampler} steps, "
        + ("scored" if cfg.n_eval and ds.num_classes > 1 else "not scored"),
    }
    for name, text in rows.items():
        print(f"{name:<12} {text}")
