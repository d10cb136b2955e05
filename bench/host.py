"""Host time: how long Python needs to queue an operation, without a GPU.

    python bench/host.py [--only group_norm attention] [--rounds 7] [--no-networks]

A GPU is done with a small tensor before Python has launched the next kernel; then the host is what
one waits for. Here all that a launch costs in Python is run on CPU tensors of a few numbers, and
only the launch itself is left out (tests/cases/stubbed.py). PyTorch's own operations, which compute
these few numbers, stand beside it: "times" is ours divided by theirs. One thread, in turns, least
processor time of several rounds, so that other work on the machine disturbs little.

Printed are microseconds of single calls beside their goal, and milliseconds of whole networks,
forward and backward, where PyTorch's operations take the place of ours in the same network. On a
GPU the launches of both come on top: about as many on either side.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide modules of its name

from runtime.commandline import BadInput, entry  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402

from kernels import Row, attention, group_norm_silu, sampling_update  # noqa: E402

GOALS = {  # microseconds of a call
    "group_norm forward": 12,
    "group_norm backward": 40,
    "attention forward": 20,
    "attention backward": 50,
    "sampling_update": 15,
}
GOAL_NETWORKS = 1.1  # times PyTorch's own operations


# ------------------------------------------------------------------------------ single operations


def plain_norm(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """group_norm_silu of PyTorch's operations, as one would write it without this project."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        per_channel = (*scale.shape, *[1] * (x.ndim - 2))
        y = y * (1 + scale).view(per_channel) + shift.view(per_channel)
    return F.silu(y) if silu else y


def plain_attention(q, k, v, *, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def plain_update(x, out, row):
    x0_hat = (row.p * x - row.q * out.float()).clamp(-1, 1)
    return row.A * x0_hat + row.B * x + row.S * torch.randn_like(x), x0_hat


def norm_calls(norm, conditioned):
    """{part: function of nothing}, as a training step calls it under autocast."""
    x = torch.randn(2, 4, 4, 128).bfloat16().permute(0, 3, 1, 2).requires_grad_()
    weight, bias = (torch.nn.Parameter(torch.randn(128)) for _ in range(2))
    how, leaves = {}, [x, weight, bias]
    if conditioned:
        leaves.append(torch.randn(2, 256).bfloat16().requires_grad_())
        how["scale"], how["shift"] = leaves[-1].chunk(2, dim=1)

    def forward():
        return norm(x, 32, weight, bias, **how)

    y = forward()
    dy = torch.randn_like(y)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
    }


def attention_calls(attend):
    packed = torch.randn(1, 16, 3, 1, 64).bfloat16()
    q, k, v = (t.detach().requires_grad_() for t in packed.permute(2, 0, 3, 1, 4))
    o = attend(q, k, v)
    do = torch.randn_like(o)
    return {
        "forward": lambda: attend(q, k, v),
        "backward": lambda: torch.autograd.grad(o, [q, k, v], do, retain_graph=True),
    }


def update_calls():
    x, out = (torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2) for _ in range(2))
    out, seeds, row = out.bfloat16(), torch.arange(2), Row(1.4, 1.0, 0.9, 0.1, S=0.3)
    return (
        lambda: sampling_update(x, out, row, step=3, seeds=seeds),
        lambda: plain_update(x, out, row),
    )


def operations():
    """(name, goal, ours, PyTorch's) of every call, functions of nothing."""
    for title, conditioned in (("", False), (", scale and shift", True)):
        ours, plain = (norm_calls(norm, conditioned) for norm in (group_norm_silu, plain_norm))
        for part in ours:
            name = f"group_norm {part}"
            yield name + title, None if conditioned else GOALS[name], ours[part], plain[part]
    ours, plain = attention_calls(attention), attention_calls(plain_attention)
    for part in ours:
        yield f"attention {part}", GOALS[f"attention {part}"], ours[part], plain[part]
    yield "sampling_update", GOALS["sampling_update"], *update_calls()


# --------------------------------------------------------------------------------------- networks


def config(name):
    return yaml.safe_load((REPO / "configs" / f"{name}.yaml").read_text())


def networks():
    """(name, network, inputs): the chapters' networks with all their layers and few channels."""
    from dataclasses import fields

    import ddpm_pixel
    import ldm_cfg
    from dit import DiT, parse_size

    def small(chapter, name, **sizes):
        known = {field.name for field in fields(chapter.Config)}
        settings = {key: value for key, value in config(name).items() if key in known}
        return chapter.Config(**(settings | sizes))

    torch.manual_seed(0)
    t = torch.tensor([3, 500])
    cfg = small(ddpm_pixel, "cifar10_ddpm", model_channels=32, attention_resolutions=(4,))
    x = torch.randn(2, 3, 8, 8)
    yield "CIFAR-10 U-Net (ddpm_pixel)", ddpm_pixel.UNet(x.shape[1:], 0, cfg), (x, t)
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    sizes = {"model_channels": 96, "context_dim": 64, "attention_resolutions": (8, 4, 2)}
    cfg = small(ldm_cfg, "imagenet100", **sizes)
    yield "latent U-Net (ldm_cfg)", ldm_cfg.make_net(cfg, z.shape[1:], 100), (z, t, y)
    size = parse_size("dit-b/2") | {"hidden_size": 96}
    yield "DiT-B/2", DiT(z.shape[1:], 100, **size), (z, t, y)


@contextlib.contextmanager
def plain_operations():
    """Inside, the networks' modules have PyTorch's operations in place of ours."""
    changed, plain_for = [], {group_norm_silu: plain_norm, attention: plain_attention}
    for module in list(sys.modules.values()):
        if module.__name__.split(".")[0] in ("kernels", __name__.split(".")[0]):
            continue  # the operations themselves, and this file
        for name in ("group_norm_silu", "attention"):
            ours = getattr(module, name, None)
            if ours in (group_norm_silu, attention):
                changed.append((module, name, ours))
                setattr(module, name, plain_for[ours])
    try:
        yield
    finally:
        for module, name, ours in changed:
            setattr(module, name, ours)


def training(net, inputs):
    """A function of nothing: forward and backward under autocast."""
    net = net.to(memory_format=torch.channels_last).train()
    x, *rest = inputs

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x.to(memory_format=torch.channels_last), *rest)
        out.float().square().mean().backward()
        net.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------------------------------ clock


def seconds(call, calls):
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def in_turns(first, second, calls, rounds):
    """The least seconds of either call over rounds in which they take turns."""
    for _ in range(3):
        first()
        second()
    found = [(seconds(first, calls), seconds(second, calls)) for _ in range(rounds)]
    return tuple(min(times) for times in zip(*found, strict=True))


def rows(only, rounds, with_networks, calls=400, passes=8):
    """(name, ours, PyTorch's, goal or None, unit) of all that is asked for."""
    from tests.cases.stubbed import stubbed_launches

    with stubbed_launches():
        for name, goal, ours, plain in operations():
            if any(name.startswith(each) for each in only):
                a, b = in_turns(ours, plain, calls, rounds)
                yield name, 1e6 * a, 1e6 * b, goal, "us"
        if with_networks:
            for name, net, inputs in networks():
                step = training(net, inputs)

                def plain(step=step):
                    with plain_operations():
                        step()

                a, b = in_turns(step, plain, passes, rounds)
                yield name, 1e3 * a, 1e3 * b, GOAL_NETWORKS * 1e3 * b, "ms"


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=["group_norm", "attention", "sampling"], help="operations"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of either side")
    parser.add_argument("--no-networks", action="store_true", help="single calls alone")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise BadInput(f"--rounds must be at least 1, got {args.rounds}")
    return args


def main(arguments=None):
    args = parse(arguments)
    torch.set_num_threads(1)
    print(f"{'':34}{'ours':>9}{'PyTorch':>10}{'times':>8}{'goal':>9}")
    for name, ours, plain, goal, unit in rows(args.only, args.rounds, not args.no_networks):
        limit = "" if goal is None else f"{goal:7.1f}{'' if ours <= goal else ' NO'}"
        print(f"{name:34}{ours:7.1f} {unit}{plain:8.1f}{ours / plain:9.2f}  {limit}", flush=True)


if __name__ == "__main__":
    entry(main)
