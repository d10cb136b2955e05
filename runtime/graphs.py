"""CUDA graphs: all kernels of a network, recorded once, are then started by a single call.

A network is some hundred small kernels, and Python needs longer to start one than a GPU to compute
it. A graph is the list of them, with the addresses that they read and write. So shapes are fixed,
inputs are copied to where the graph reads them, and weights count as they are there: changed in
place, but not replaced. Where recording fails, one line says so, and the network runs without.

    net = world.for_sampling(net)      in a sampler: the same numbers, without gradients
    run.model                          in training: forward and backward, a graph each
"""

from runtime.processes import say_once

import sys

import torch
from torch import nn

MOST = 4  # graphs of one network
WARM_UP = 3  # calls before recording, in which cuDNN, Triton and torch.compile choose and compile


def failed(error):
    """Say why there is no graph."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    say_once(f"note: no CUDA graph of the network ({reason}); it runs without")


def same_stream():
    """After this `with`, work goes where it went before; a failed recording would keep it."""
    return torch.cuda.stream(torch.cuda.current_stream())


def kind_of(inputs):
    """What a graph depends on: of tensors, or None, their layout; and the state of autocast."""
    device = inputs[0].device
    layouts = [v if v is None else (v.shape, v.stride(), v.dtype, v.device) for v in inputs]
    on = torch.is_autocast_enabled(device.type)
    return (*layouts, torch.get_autocast_dtype(device.type) if on else None)


def uncached_autocast(device):
    """Autocast as it is now, but casts are part of a graph: a cached one would be freed under it.

    device: a torch.device.
    """
    on, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype if on else None, enabled=on, cache_enabled=False)


# --------------------------------------------------------------------------------------- sampling


class Recorded:
    """net(*inputs), recorded on the inputs' GPU for their layout; call it with such inputs.

    pool: where it has its memory, together with graphs that never run at the same time.
    """

    def __init__(self, net, inputs, pool):
        self.inputs = [v.clone() for v in inputs]
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        with uncached_autocast(inputs[0].device):
            side.wait_stream(now)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    net(*self.inputs)
            now.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, such as NCCL's, is no error.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.out = net(*self.inputs)

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.out.clone()  # the next call writes there


class Sampled:
    """net(x, t, ...) -> a tensor, for calls without gradients: the same numbers, from a graph.

    Inputs are tensors or None. A graph is recorded at the first call with inputs of a layout;
    beyond MOST layouts, and with gradients, net itself runs. All else, such as net.null, is net's.
    """

    def __init__(self, net):
        self.net, self.graphs, self.pool = net, {}, None

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, *inputs):
        kind = kind_of(inputs)
        wanted = kind in self.graphs or len(self.graphs) < MOST
        if torch.is_grad_enabled() or not wanted:
            return self.net(*inputs)
        net, inputs = Tensors(self.net, inputs), [v for v in inputs if v is not None]
        if kind not in self.graphs:
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                with same_stream():
                    self.graphs[kind] = Recorded(net, inputs, self.pool)
            except Exception as error:  # of whatever kind: if net is at fault, it says so below
                failed(error)
                self.graphs[kind], self.pool = net, None
        return self.graphs[kind](*inputs)


# --------------------------------------------------------------------------------------- training


def is_wanted(cfg, world):
    """Whether training takes graphs: where --graph or --no-graph is typed, as that says.

    Else where one GPU trains, unless another setting needs the network itself. Chapter 1 trained
    three times as fast with them on an H200.
    """
    if cfg.graph or "--no-graph" in sys.argv:
        return cfg.graph
    others = ("compile", "shard", "discriminator", "use_checkpoint")
    processes = getattr(world, "processes", world.size)  # of the run that --dry-run is about
    alone = world.device.type == "cuda" and processes == 1 and cfg.accumulate == 1
    return alone and not any(getattr(cfg, name, False) for name in others)


class Tensors(nn.Module):
    """net as a function of tensors alone: where `inputs` have None, it is put in."""

    def __init__(self, net, inputs):
        super().__init__()
        self.net, self.given = net, [v is not None for v in inputs]

    def forward(self, *tensors):
        rest = iter(tensors)
        return self.net(*(next(rest) if given else None for given in self.given))


class Graphed(nn.Module):
    """net(*inputs) for training: its forward is one graph, its backward another.

    inputs: tensors or None, as of the first step; with others net itself runs. A call is followed
    by its one backward before the next call, for both graphs keep their results in one place; so
    are gradients, which must be used and set to None before the next backward. Dropout draws from
    the generator as ever.
    """

    def __init__(self, net, inputs, world):
        super().__init__()
        self.net, self.kind, self.graph = net, None, None
        samples = tuple(v.clone() for v in inputs if v is not None)
        devices = [world.device] if world.device.type == "cuda" else []
        try:
            with (
                same_stream(),
                torch.random.fork_rng(devices),  # recording draws, and must leave no trace
                world.autocast(),
                uncached_autocast(world.device),
            ):
                # Every parameter gets a gradient, or none in any step.
                self.graph = torch.cuda.make_graphed_callables(
                    Tensors(net, inputs), samples, num_warmup_iters=WARM_UP, allow_unused_input=True
                )
        except Exception as error:  # of whatever kind: if net is at fault, it says so in forward()
            failed(error)
        with world.autocast():
            self.kind = kind_of(inputs)

    def forward(self, *inputs):
        if self.graph is None or kind_of(inputs) != self.kind:
            return self.net(*inputs)
        return self.graph(*(v for v in inputs if v is not None))


def for_training(net, inputs, world):
    """net as a Graphed; where there is no GPU, one line says so, and it is net itself."""
    if world.device.type == "cuda":
        return Graphed(net, inputs, world)
    say_once("note: --graph is for a GPU; on the CPU the network runs without")
    return net


class Later:
    """net for training with graphs: its first call shows what is to be recorded.

    Around that comes what shares gradients among the world's processes.
    """

    def __init__(self, net, world):
        self.net, self.world, self.ready = net, world, None

    def __call__(self, *inputs):
        if self.ready is None:
            self.ready = self.world.wrap(for_training(self.net, inputs, self.world), static=True)
        return self.ready(*inputs)
