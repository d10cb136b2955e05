"""Stages of bench/gpu.py about sampling, and what else a run does beside its training steps."""

from runtime.processes import World, exact
from runtime.run import EMA

import os
import socket
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import unet as instruments
from bench.gpu_clock import device_us, graphed, on_gpu, peak_memory, wall_ms
from bench.gpu_networks import OURS, Side, check_recorded, half, is_recorded, settle, step_of
from ddim import at, ddim_row, sample, subsequence
from ddpm_pixel import alpha_bar_of, simple_loss
from kernels import sampling_update

LONGEST = 25  # kernels of a trace that are listed


def traced(call):
    """The profile of a call that was warm; on a GPU it ends when the GPU is done."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu()]
    call()
    with profile(activities=kinds) as found:
        call()
        if on_gpu():
            torch.cuda.synchronize()
    return found


def on_device(event):
    return event.device_type == DeviceType.CUDA


# ----------------------------------------------------------------------------------------- sampling


def sampling(job):
    """Is sample 17 the same image everywhere? How long does a step's update, and a walk, take?"""
    settle()
    net, cfg, shape = instruments.our_network(job.rehearse)
    alpha_bar, net = alpha_bar_of(cfg), net.eval()
    few, many = (2, 3) if job.rehearse else (5, 50)

    def walk(seeds, precision="fp32"):
        world = World(device=seeds.device, precision=precision)
        pairs = subsequence(cfg.timesteps, few)
        return drawn(world, world.for_sampling(net), alpha_bar, pairs, shape, seeds)

    with exact():
        alone = walk(torch.tensor([17]))
    net, device = net.to(job.device), torch.device(job.device)
    others = {
        "alone on the device, fp32": (torch.tensor([17]), "fp32", 1e-3),
        "in a batch of 32, fp32": (torch.arange(32 if on_gpu() else 18), "fp32", 1e-3),
        "alone on the device, bf16": (torch.tensor([17]), "bf16", None),
        "in a batch of 32, bf16": (torch.arange(32 if on_gpu() else 18), "bf16", None),
    }
    for name, (seeds, precision, most) in others.items():
        with job.row("sample 17", name) as row, exact():
            place = seeds.tolist().index(17)
            found = walk(seeds.to(device), precision)[place : place + 1].cpu()
            row["apart"] = (found - alone).abs().max().item()  # from that of the CPU, fp32
            if most is not None:
                row["right"] = row["apart"] < most

    n = 4 if job.rehearse else 128
    seeds = torch.arange(n, device=device)
    pairs = subsequence(cfg.timesteps, many)
    a, a_prev = (at(alpha_bar, t) for t in pairs[many // 2])
    x = torch.randn(n, *shape, device=device).to(memory_format=torch.channels_last)
    t = torch.full((n,), 500, device=device)
    with job.row("update", "of a DDIM step") as row, torch.inference_mode(), half(job.device):
        out = net(x, t)
        update = partial(sampling_update, x, out, ddim_row(a, a_prev), step=0, seeds=seeds)
        row["launches"] = sum(map(on_device, traced(update).events()))
        row["us"] = device_us(update)
        network = wall_ms(graphed(lambda: net(x, t)), 1 if job.rehearse else 10)
        row["share"] = row["us"] / (row["us"] + 1e3 * network)
    world = World(device=device, precision="bf16")
    ways = {"here": net, "here, graph": world.for_sampling(net)}  # the latter in every command
    for batch in (4,) if job.rehearse else (16, 128, 512):
        seeds = torch.arange(batch, device=device)
        for name, way in ways.items():
            with job.row(f"DDIM, {many} steps, batch {batch}", name) as row:
                with peak_memory(row):
                    walk = partial(drawn, world, way, alpha_bar, pairs, shape, seeds)
                    row["ms"] = wall_ms(walk, 1, 2)
                check_recorded(way is net or is_recorded(way))
                row["images_s"] = 1e3 * batch / row["ms"]


def drawn(world, net, alpha_bar, pairs, shape, seeds):
    """Images (B,C,H,W) of the seeds (B,), by DDIM."""
    with world.autocast():
        for x, _ in sample(net, alpha_bar, pairs, shape, seeds):  # noqa: B007
            pass
        return x


# ------------------------------------------------------------------------------------------- traces


def traces(job):
    """Chrome traces of a training step and of sampling steps, and their longest kernels."""
    settle()
    net, cfg, shape = instruments.our_network(job.rehearse)
    net, alpha_bar = net.to(job.device), alpha_bar_of(cfg)
    x, eps, t = (v.to(job.device) for v in instruments.batch(4 if job.rehearse else 128, shape))
    x, table = x.to(memory_format=torch.channels_last), alpha_bar.to(job.device)
    side = Side(OURS, net, None, lambda net: simple_loss(net, x, t, eps, table).mean())
    world = World(device=torch.device(job.device), precision="bf16")
    pairs, seeds = subsequence(cfg.timesteps, 50)[:3], torch.arange(len(x), device=job.device)
    sampler = world.for_sampling(net)

    def walk():
        net.eval()
        with world.autocast():
            return list(sample(sampler, alpha_bar, pairs, shape, seeds))

    for what, call in {"training step": step_of(job, side, net), "sampling, 3 steps": walk}.items():
        if call is not walk:
            net.train()
        found = traced(call)
        name = what.split(",")[0].replace(" ", "-")
        found.export_chrome_trace(str(job.out / f"trace-{name}.json.gz"))
        kernels = [e for e in found.key_averages() if on_device(e) or not on_gpu()]
        kernels = [e for e in kernels if not e.is_user_annotation]
        spent = {e.key: (e.self_device_time_total, e.count) for e in kernels}
        if not on_gpu():
            spent = {e.key: (e.self_cpu_time_total, e.count) for e in kernels}
        whole = sum(us for us, _ in spent.values())
        longest = sorted(spent, key=lambda key: -spent[key][0])[: 3 if job.rehearse else LONGEST]
        job.say(what, "all", us=whole, calls=sum(calls for _, calls in spent.values()))
        for key in longest:
            us, calls = spent[key]
            job.say(what, key[:60], us=us, calls=calls, share=us / max(whole, 1e-9))


# ----------------------------------------------------------------------------------------- the rest


def features(job):
    """Inception's features of 32x32 images in fp32, for the scores; weights are random."""
    from evaluation.inception_features import Extractor
    from tests.cases.reference_networks import random_weights

    n = 2 if job.rehearse else 512
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    with job.row("Inception, fp32", f"batch {n}") as row:
        extractor = Extractor(random_weights(0), device=job.device)
        with peak_memory(row):
            row["ms"] = wall_ms(lambda: extractor(images), 1, 1 if job.rehearse else 3)
        row["images_s"] = 1e3 * n / row["ms"]


def ddp(job):
    """A group of one process, as under torchrun: are the gradients those of the bare network?

    The network is wrapped as World does for several processes; a group of one has the same path.
    """
    settle()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl" if on_gpu() else "gloo", rank=0, world_size=1)
    try:
        device = torch.device("cuda:0" if on_gpu() else "cpu")
        net, cfg, shape = instruments.our_network(job.rehearse)
        net = net.to(device)
        x, eps, t = (v.to(device) for v in instruments.batch(4 if job.rehearse else 128, shape))
        x, table = x.to(memory_format=torch.channels_last), alpha_bar_of(cfg).to(device)
        world = World(0, 2, device)

        def gradients(model):
            net.eval().zero_grad(set_to_none=True)  # without dropout: no two draws are the same
            with half(job.device):
                simple_loss(model, x, t, eps, table).mean().backward()
            return torch.cat([p.grad.flatten() for p in net.parameters()])

        with job.row("gradients, apart") as row:
            bare, shared = gradients(net), gradients(world.wrap(net))
            row["error"] = ((bare - shared).norm() / bare.norm()).item()
            row["right"] = row["error"] < 1e-2 if on_gpu() else row["error"] < 1e-6
        with job.row("sum over a group of one") as row:
            row["right"] = world.sum(torch.ones(3, device=device)).sum().item() == 3
        side = Side(OURS, net, None, lambda model: simple_loss(model, x, t, eps, table).mean())
        rounds = (1, 1) if job.rehearse else (20, 3)
        for name, model in (("step, bare", net), ("step, wrapped", world.wrap(net, static=True))):
            with job.row(name) as row:
                row["ms"] = wall_ms(step_of(job, side, model), *rounds)
        with job.row("running mean") as row:
            mean = EMA(net, 0.999)
            row["ms"] = wall_ms(lambda: mean.update(net, 1), 1 if job.rehearse else 20, 1)
    finally:
        dist.destroy_process_group()
