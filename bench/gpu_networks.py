"""Stages of bench/gpu.py about whole networks: a forward pass, and a training step with all that
belongs to it, here and in diffusers.

The ways:  "here"           as the chapters run it
           "here, graph"    with the CUDA graphs of runtime/graphs.py
           "one graph"      the whole step captured at once: the GPU's work, and nothing of the host
           "compiled"       torch.compile with its defaults
           "channels_last"  diffusers in the memory format that convolutions like best
All compute in bf16 under autocast; a step is forward, backward, clipping, fused Adam and the
running mean of the weights.
"""

from runtime.commandline import parse
from runtime.graphs import Recorded, Sampled, for_training, kind_of
from runtime.processes import World, exact, prefer_speed

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import ddpm_pixel
import ldm_cfg
from bench import dit as dit_instruments
from bench import unet as instruments
from bench.gpu_clock import graphed, on_gpu, peak_memory, wall_ms
from dit import parse_size

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OURS, THEIRS = "here", "diffusers"


class Side(NamedTuple):
    """A network and how it is called: forward(net) -> output, loss(net) -> the mean loss."""

    name: str
    net: torch.nn.Module
    forward: Any
    loss: Any


def half(device):
    return torch.autocast(device, torch.bfloat16)


def compiled(job, side, net):
    if not job.rehearse:
        return torch.compile(net)
    # To trace is slow on a CPU, too: once is enough to see that it works.
    return torch.compile(net, backend="eager") if (job.stage, side.name) == ("unet", OURS) else net


# ----------------------------------------------------------------------------------- what is timed


def forward_of(job, side, net):
    """A function of nothing: the output of `net`, without gradients."""
    side.net.eval()

    @torch.inference_mode()
    def forward():
        with half(job.device):
            return side.forward(net)

    return forward


def step_of(job, side, net):
    """A function of nothing: a training step of side.net, which is called as `net`."""
    parameters = list(side.net.train().parameters())
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True, capturable=on_gpu())
    mean = [p.detach().clone() for p in parameters]

    def step():
        with half(job.device):
            loss = side.loss(net)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(mean, parameters, 1e-4)

    return step


def check_recorded(is_so):
    """RuntimeError on a GPU where a network runs without its graph: its time would be another's."""
    if on_gpu() and not is_so:
        raise RuntimeError("no CUDA graph was recorded; log.txt says why")


def sampled(net):
    """`net` for sampling in the graphs of runtime/graphs.py."""
    graphs = Sampled(net)

    def call(*inputs):
        out = graphs(*inputs)
        check_recorded(is_recorded(graphs))
        return out

    return call


def is_recorded(sampled):
    """Whether what a Sampled made last is a graph."""
    return isinstance([None, *sampled.graphs.values()][-1], Recorded)


def recorded(job, net):
    """`net` for training in the graphs of runtime/graphs.py, recorded at its first call."""
    world, made = World(device=torch.device(job.device)), []

    def call(*inputs):
        if not made:
            made.append(for_training(net, inputs, world))
            check_recorded(getattr(made[0], "graph", None))
            check_recorded(getattr(made[0], "kind", None) == kind_of(inputs))
        return made[0](*inputs)

    return call


def ways_of(job, side):
    """{(what, way): function that makes what is timed}, the most important first."""
    net, make = side.net, {"forward": forward_of, "step": step_of}
    found = {(what, side.name): partial(make[what], job, side, net) for what in make}
    if side.name == OURS:
        found["forward", "here, graph"] = lambda: forward_of(job, side, sampled(net))
        found["step", "here, graph"] = lambda: step_of(job, side, recorded(job, net))
    for what, how in make.items():
        found[what, f"{side.name}, compiled"] = partial(
            lambda how: how(job, side, compiled(job, side, net)), how
        )
    for what, how in make.items():  # last: a capture that fails ends the stage
        found[what, f"{side.name}, one graph"] = partial(
            lambda how: graphed(how(job, side, net)), how
        )
    return found


def time_sides(job, sides, batch):
    """Rows of all ways of all sides, by turns of their importance. What failed is not tried again:
    it would fail before the others have their turn."""
    columns = [list(ways_of(job, side).items()) for side in sides]
    longest = max(map(len, columns))
    for i in range(longest):
        for column in columns:
            if i < len(column) and not job.known(*column[i][0], failed=True):
                of, make = column[i]
                time_way(job, of, make, batch)


def time_way(job, of, make, batch):
    with job.row(*of) as row:
        with peak_memory(row):
            row["ms"] = wall_ms(make(), *((1, 1) if job.rehearse else (20, 3)))
        row |= {"batch": batch, "images_s": 1e3 * batch / row["ms"]}
    torch.compiler.reset()  # what was compiled, and its memory, is not wanted any more


def say_same(job, ours, theirs):
    """How far the outputs of two sides are apart, in fp32 without tf32, before any time."""
    with job.row("fp32 outputs of both, apart", "relative") as row, exact(), torch.inference_mode():
        here, there = (side.forward(side.net.eval()) for side in (ours, theirs))
        row["error"] = ((here - there).abs().max() / there.abs().max()).item()
        row["right"] = row["error"] < 1e-4


def without_diffusers(job, error):
    """Says so. It may be missing, or refuse the versions of what it is built on."""
    print(f"{type(error).__name__}: {error}", flush=True)
    job.say("diffusers", "all", skipped=f"{type(error).__name__}: {error}"[:120])


def settle():
    """What a command settles before it runs a network on a GPU."""
    if on_gpu():
        prefer_speed()


# -------------------------------------------------------------------------------------- the stages


def unet(job):
    """Chapter 1's U-Net of configs/cifar10_ddpm.yaml, 32x32, batch 128."""
    settle()
    theirs, n = None, 4 if job.rehearse else 128
    try:
        model = instruments.load_diffusers()[0]
        ours, theirs, shape = instruments.networks(job.rehearse, model)
    except Exception as error:
        without_diffusers(job, error)
        ours, _, shape = instruments.our_network(job.rehearse)
    x, eps, t = (v.to(job.device) for v in instruments.batch(n, shape))
    last = x.to(memory_format=torch.channels_last)
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 1000).to(job.device)

    def our_loss(net):
        return ddpm_pixel.simple_loss(net, last, t, eps, alpha_bar).mean()

    def their_loss(image, net):
        noisy = ddpm_pixel.q_sample(image, t, eps, alpha_bar)
        return F.mse_loss(net(noisy, t).sample.float(), eps)

    sides = [Side(OURS, ours.to(job.device), lambda net: net(last, t), our_loss)]
    if theirs is not None:
        theirs = theirs.to(job.device)
        sides.append(Side(THEIRS, theirs, lambda net: net(x, t).sample, partial(their_loss, x)))
        say_same(job, *sides)
    time_sides(job, sides, n)
    if theirs is not None:
        theirs.to(memory_format=torch.channels_last)
        name = "diffusers, channels_last"
        forward = lambda net: net(last, t).sample  # noqa: E731
        side = Side(name, theirs, forward, partial(their_loss, last))
        for what, how in (("forward", forward_of), ("step", step_of)):
            time_way(job, (what, name), partial(how, job, side, theirs), n)


def latent(job):
    """The latent U-Net of configs/imagenet100.yaml on 4x16x16, batch 32: a GPU's share of 256.

    diffusers' network has the same form and weights of its own.
    """
    settle()
    cfg = parse(ldm_cfg.Config, "", ["--config", str(CONFIGS / "imagenet100.yaml")])
    n, shape, classes = 32, (4, 16, 16), 100
    if job.rehearse:
        n, shape = 2, (4, 8, 8)
        small = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_heads=2)
        cfg = replace(cfg, **small, attention_resolutions=(8, 4), context_dim=16)
    torch.manual_seed(0)
    ours = ldm_cfg.make_net(cfg, shape, classes).to(job.device)
    z, eps = torch.randn(2, n, *shape, device=job.device)
    last, alpha_bar = z.to(memory_format=torch.channels_last), ldm_cfg.alpha_bar_of(cfg)
    t, y = (torch.arange(n, device=job.device) * 900 // n, torch.arange(n, device=job.device))
    alpha_bar = alpha_bar.to(job.device)

    def our_loss(net):
        return ldm_cfg.simple_loss(net, last, t, eps, alpha_bar, y).mean()

    sides = [Side(OURS, ours, lambda net: net(last, t, y), our_loss)]
    with job.row("parameters", OURS) as row:
        row["parameters"] = sum(p.numel() for p in ours.parameters())
    try:
        theirs = latent_of_diffusers(cfg, shape).to(job.device)
    except Exception as error:
        without_diffusers(job, error)
    else:
        token = torch.randn(n, 1, cfg.context_dim, device=job.device)

        def their_loss(net):
            noisy = ddpm_pixel.q_sample(z, t, eps, alpha_bar)
            return F.mse_loss(net(noisy, t, token).sample.float(), eps)

        sides.append(Side(THEIRS, theirs, lambda net: net(z, t, token).sample, their_loss))
        with job.row("parameters", THEIRS) as row:
            row["parameters"] = sum(p.numel() for p in theirs.parameters())
    time_sides(job, sides, n)


def latent_of_diffusers(cfg, shape):
    """UNet2DConditionModel of the same form. BadInput where diffusers is not installed."""
    from tests.cases.reference_networks import needing_diffusers

    with needing_diffusers():
        from diffusers import UNet2DConditionModel
    levels = len(cfg.channel_mult)
    return UNet2DConditionModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=[m * cfg.model_channels for m in cfg.channel_mult],
        down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels,
        layers_per_block=cfg.num_res_blocks,
        attention_head_dim=cfg.num_heads,  # how many heads, whatever it is called
        cross_attention_dim=cfg.context_dim,
    )


def dit(job):
    """DiT-B/2 on 4x16x16, batch 256."""
    settle()
    n, shape = (2, (4, 8, 8)) if job.rehearse else (256, (4, 16, 16))
    size = dit_instruments.QUICK if job.rehearse else parse_size("dit-b/2")
    ours = dit_instruments.random_network(size, shape, classes=100)
    z, t, y = (v.to(job.device) for v in dit_instruments.batch(n, shape, classes=100))
    eps = torch.randn_like(z)
    alpha_bar = ddpm_pixel.make_alpha_bar("linear", 1000).to(job.device)

    def our_loss(net):
        return ldm_cfg.simple_loss(net, z, t, eps, alpha_bar, y).mean()

    def their_loss(net):
        noisy = ddpm_pixel.q_sample(z, t, eps, alpha_bar)
        return F.mse_loss(net(noisy, t, y).sample.float(), eps)

    theirs = None
    try:
        theirs = dit_instruments.twin(ours).to(job.device)
    except Exception as error:
        without_diffusers(job, error)
    sides = [Side(OURS, ours.to(job.device), lambda net: net(z, t, y), our_loss)]
    if theirs is not None:
        sides.append(Side(THEIRS, theirs, lambda net: net(z, t, y).sample, their_loss))
        say_same(job, *sides)
    time_sides(job, sides, n)
