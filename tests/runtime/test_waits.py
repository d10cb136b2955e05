"""On a GPU a training step waits for nothing: each chapter's own loop, on fake CUDA tensors.

What the host wants to know of the device it waits for until all is done that was queued before. So
nothing of a step may: no value is read, no copy comes from ordinary memory. Log lines may, and what
comes after the loop.
"""

from runtime import checkpoints
from runtime.processes import World
from runtime.run import Run

import collections
import importlib
import sys

import numpy as np
import pytest
import torch
from fake_gpu import DEVICE, Waits, fake_gpu, storage_of
from tiny_runs import COMMANDS, TRAININGS, fields, flags

import ddpm_pixel
import dit
from image_data.latents import Latents
from networks.adm_unet import UNet
from networks.kl_autoencoder import KLVAE
from networks.perceptual import Perceptual
from networks.sd_unet import LatentUNet

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # deepcopy does
STEPS = 3
QUIET = ("save_grid", "save_forward", "report")  # what looks at values before a loop


class Finished(Exception):
    """The last loop of a chapter has made its steps."""


def watched(monkeypatch, watch, script, found):
    """Have every Run make STEPS steps under `watch`; found: {class of its settings: uploads}."""
    steps, config = Run.steps, importlib.import_module(script).Config

    def few(run):
        numbers, uploads = steps(run), found.setdefault(type(run.cfg), [])
        for _ in range(STEPS):
            before = watch.uploads
            with watch:
                yield next(numbers)
            uploads.append(watch.uploads - before)
        if type(run.cfg) is config:
            raise Finished

    monkeypatch.setattr(Run, "steps", few)


def latents_of(resident):
    """In the place of ldm_cfg.encode, which reads what an encoder gave."""

    def encode(cfg, world, ds, ae):
        shape = (ae.z_channels, ds.shape[1] // ae.factor, ds.shape[2] // ae.factor)
        size = (2 * len(ds), *shape[1:], 2 * shape[0])
        moments = torch.zeros(size, device=DEVICE) if resident else np.zeros(size, np.float32)
        about = (ds.labels, ds.class_names, ds.shape, shape, 1.0, ds.key)
        return Latents(ds.name, moments, *about)

    return encode


def train(monkeypatch, script, arguments, precision="bf16", resident=False):
    """Steps of a chapter on the fake GPU: {class of settings: uploads of each}, and operations."""
    found, names = {}, collections.Counter()

    def launch(fn, cfg):
        with fake_gpu(monkeypatch) as watch:
            watched(monkeypatch, watch, script, found)
            watch.names = names
            fn(cfg, World(device=DEVICE, precision=precision))

    stubs = {name: lambda *args, **kwargs: None for name in QUIET} | {"launch": launch}
    for chapter in map(importlib.import_module, COMMANDS):
        for name, stub in stubs.items():
            if hasattr(chapter, name):
                monkeypatch.setattr(chapter, name, stub)
        if hasattr(chapter, "cache_latents"):
            monkeypatch.setattr(chapter, "encode", latents_of(resident))
    monkeypatch.setattr(checkpoints, "weights_hash", lambda net: "0")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(Finished):
        importlib.import_module(script).main()
    return found, names


# Each chapter as it is, and what only some settings bring into a step.
CASES = {script: (script, {}) for script in TRAININGS} | {
    "fp16": ("ddpm_pixel", {"precision": "fp16"}),
    "importance sampling": (
        "improved_ddpm",
        {"objective": "vlb", "schedule_sampler": "loss-second-moment"},
    ),
    "codebook": ("autoencoder", {"ae": "vq"}),
    "discriminator": ("autoencoder", {"size": 32, "discriminator": 0.5, "disc_start": 0}),
    "context": ("ldm_cfg", {"model": "sd"}),
    "learned variance": ("dit", {"learn_sigma": True}),
    "latents on the GPU": ("ldm_cfg", {"resident": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(case, toy, tiny, tmp_path, monkeypatch):
    script, settings = CASES[case]
    settings, resident = dict(settings), settings.get("resident", False)
    precision = settings.pop("precision", "bf16")
    rare = flags(script, log_every=100, save_every=100, ae_steps=20, flip=True, **settings)
    arguments = [*tiny[script], *toy, *rare, "--out", str(tmp_path)]
    runs, names = train(monkeypatch, script, arguments, precision, resident)
    assert len(runs) == 1 + ("ae_steps" in fields(script))
    for uploads in runs.values():
        # One block of all that is a function of the step; and one array of what training decides.
        assert len(uploads) == STEPS and uploads[-1] in (1, 2) and uploads[0] > 2
    assert names["_fused_adam_"] + names["_fused_adamw_"] >= STEPS
    assert names["_foreach_lerp_"] >= STEPS
    assert not names.keys() & {"addcdiv_", "_foreach_addcdiv_"}  # no other way of Adam


def test_parts_of_a_step_come_in_one_block(toy, tiny, tmp_path, monkeypatch):
    rare = flags("ddpm_pixel", log_every=100, save_every=100, accumulate=3)
    arguments = [*tiny["ddpm_pixel"], *toy, *rare, "--out", str(tmp_path)]
    runs, _ = train(monkeypatch, "ddpm_pixel", arguments)
    assert list(runs.values()) == [[15, 15, 1]]  # images, labels, hidden labels, t, noise


# ------------------------------------------------------------------------- whoever waits is caught


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "cpu later": lambda x: x.to("cpu", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned mask": lambda x: x.__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, 2 * x),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "new tensor": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "new number": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
    "upload": lambda x: torch.ones(3).to(x.device),
    "upload, unpinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "upload, blocking": lambda x: torch.ones(3).pin_memory().to(x.device),
    "copy": lambda x: x.copy_(torch.ones(3)),
    "index on the CPU": lambda x: x[torch.arange(2)],
    "synchronize": lambda x: torch.cuda.synchronize(),
}
FREE = {
    "upload": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "mask, in place": lambda x: x.masked_fill_(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, 1.0, x),
    "finite": lambda x: torch.where(x.isfinite().all(), torch.inf, 3.0),
    "index": lambda x: x[torch.arange(3, device=x.device)],
    "number": lambda x: x * torch.tensor(2.0),
    "new": lambda x: torch.full((3,), 2.0, device=x.device) + torch.arange(3, device=x.device),
    "seed": lambda x: (torch.manual_seed(1), x + 1),
}


@pytest.mark.parametrize("waiting", WAITING)
def test_whoever_waits_is_caught(waiting, monkeypatch):
    with fake_gpu(monkeypatch) as watch:
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises(Waits), watch:
            WAITING[waiting](x)


@pytest.mark.parametrize("free", FREE)
def test_whoever_does_not_wait_is_not(free, monkeypatch):
    with fake_gpu(monkeypatch) as watch:
        x = torch.zeros(3, device=DEVICE)
        with watch:
            FREE[free](x)
    assert watch.names


def test_a_chapter_that_reads_a_loss_is_caught(toy, tiny, tmp_path, monkeypatch):
    backward = Run.backward

    def curious(run, losses, *rest, **terms):
        backward(run, losses, *rest, **terms)
        assert losses.mean().item() < 100

    monkeypatch.setattr(Run, "backward", curious)
    with pytest.raises(Waits, match="_local_scalar_dense"):
        train(monkeypatch, "ddpm_pixel", [*tiny["ddpm_pixel"], *toy, "--out", str(tmp_path)])


# ------------------------------------------------------------ weights are cast once, not per call


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def small_networks():
    """{name: (network, inputs)} of those whose layers see weights in another shape or frozen."""
    t = zeros(2, dtype=torch.int64)
    unet = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
    levels = {"attention_resolutions": (8, 4), "num_heads": 2}
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2}
    context = LatentUNet(4, 3, **unet, attention_levels=(0, 1), num_heads=2)
    settings = ddpm_pixel.Config(**unet, attention_resolutions=(8, 4))
    c_in = [3, *[8] * 12]
    vgg = Perceptual([(torch.zeros(8, c, 3, 3), torch.zeros(8)) for c in c_in])
    found = {
        "chapter 1": (ddpm_pixel.UNet((3, 8, 8), 3, settings), (zeros(2, 3, 8, 8), t, t)),
        "adm": (UNet((3, 8, 8), 3, **unet, **levels), (zeros(2, 3, 8, 8), t, t)),
        "context": (context, (zeros(2, 4, 8, 8), t, t)),
        "dit": (dit.DiT((4, 8, 8), 3, **sizes), (zeros(2, 4, 8, 8), t, t)),
        "kl": (KLVAE(3, 8, (1, 2)), (zeros(2, 3, 8, 8), zeros(2, 4, 4, 4))),
        "perceptual": (vgg, (zeros(2, 3, 16, 16), zeros(2, 3, 16, 16))),
    }
    return {name: (net.to(DEVICE), inputs) for name, (net, inputs) in found.items()}


def test_under_autocast_a_weight_is_cast_once_in_many_calls(monkeypatch):
    """Autocast keeps the casts of parameters, but neither of views of them nor of frozen ones."""
    with fake_gpu(monkeypatch) as watch:
        for name, (net, inputs) in small_networks().items():
            own = {storage_of(value) for value in (*net.parameters(), *net.buffers())}
            with torch.autocast("cuda", torch.bfloat16):
                counts = []
                for _ in range(2):
                    watch.casts.clear()
                    with watch:
                        net(*inputs)
                    counts.append(sum(watch.casts[storage] for storage in own))
            frozen = not any(p.requires_grad for p in net.parameters())
            assert counts[1] == 0 and (counts[0] > 10 or frozen), (name, counts)


def test_casts_of_views_are_counted(monkeypatch):
    with fake_gpu(monkeypatch) as watch:
        layer = torch.nn.Linear(4, 4).to(DEVICE)
        with torch.autocast("cuda", torch.bfloat16), watch:
            for _ in range(3):
                layer(zeros(2, 4))
                torch.nn.functional.conv2d(zeros(2, 4, 1, 1), layer.weight[:, :, None, None])
        assert watch.casts[storage_of(layer.weight)] == 1 + 3
