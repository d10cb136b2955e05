"""A network whose weights are split over processes: each keeps its part of every tensor.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020
(arXiv:1910.02054), stage 3, as torch.distributed.fsdp.fully_shard does it (FSDP2). Weights,
gradients, Adam's moments and the running mean are 20 bytes for each number; of N processes, each
keeps 20/N. Just before one part of the network runs, forward and backward, its weights are gathered
whole, and dropped after it. (What bf16 autocast makes of them, 2 bytes for each number, autograd
keeps from the forward of a part to its backward, unless that part is computed again.)

    ema = AveragedModel(net)                 copies net, which must be whole
    net.load_state_dict(...)                 so must be what a checkpoint is loaded into
    shard(net, world), shard(ema.module, world)
    optimizer = Adam(net.parameters())       of the new, split parameters
    load_optimizer(optimizer, ...)
    whole(net.state_dict()), whole(optimizer.state_dict())

A split tensor is a DTensor: operations between two of them, such as those of the optimizer and of
the running mean, are done by each process on its own part. Checkpoints hold plain tensors and do
not tell whether the run was split.
"""

import contextlib
import copy
from collections import OrderedDict

import torch
from torch import nn

# Settings of an optimizer that say how it is computed, not what.
WAYS = ("foreach", "fused", "capturable")

# torch.distributed.tensor takes a second to import. Runs that split nothing go without it, so
# what belongs to it is recognised below by what it alone has: full_tensor and unshard.


def units(net):
    """Parts of `net` that are gathered one at a time: the parts of its lists, and its layers.

    A Sequential with a forward of its own is a layer. This is how the networks here cut themselves
    up for `use_checkpoint`, too: what is computed again is then gathered just once more.
    """
    found = []
    for part in net.children():
        if isinstance(part, nn.ModuleList):
            found += part
        elif isinstance(part, nn.Sequential) and type(part) is not nn.Sequential:
            found.append(part)
    return found


def shard(net, world):
    """Split the parameters of `net` over all processes of `world`, in place; one alone keeps all.

    net(...) works as before, on every rank's share of the batch; every forward and backward is a
    collective. After backward(), p.grad is this rank's part of the mean over ranks. Buffers stay
    whole. All ranks must bring the same weights. net.parameters() are new tensors: make optimizers
    after this, and copies of net before it.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for p in net.parameters():
        p.data = p.data.contiguous()  # FSDP2 cannot split the memory of channels_last
    # No MixedPrecisionPolicy: weights are gathered and gradients summed in fp32, and autocast
    # rounds to bf16 what it rounds without splitting, so that both trainings are the same one.
    # Gathering bf16 would move half the bytes, but also round embeddings and norms' weights.
    for part in units(net):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # By default what belongs to no part would stay whole from a forward on until a backward, which
    # the running mean never has.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def whole(state):
    """`state`, dicts and lists of tensors, with every split tensor as a plain one on the CPU.

    A collective: every rank calls it with the same state. Tensors are gathered one at a time; rank
    0 gets them, the others get None in their place, for only rank 0 writes. Where nothing is split
    this is `state` itself.
    """
    if hasattr(state, "full_tensor"):
        found = state.detach().full_tensor()
        return found.cpu() if torch.distributed.get_rank() == 0 else None
    if not isinstance(state, (dict, list)):
        return state
    places = list(state) if isinstance(state, dict) else range(len(state))
    parts = [whole(state[place]) for place in places]
    if all(part is state[place] for part, place in zip(parts, places, strict=True)):
        return state
    found = copy.copy(state)  # keeps its type and, of a state_dict, the _metadata
    for place, part in zip(places, parts, strict=True):
        found[place] = part
    return found


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state) of plain, whole tensors, where parameters may be split.

    The settings become those of `state`, but not the WAYS: a run may go on where another is the
    fastest. Each moment is laid out as its parameter: split if that is, in its memory format if
    not, which a split run does not keep and fused optimizers insist on. No collective: every rank
    has `state`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    moments = {
        i: {name: value if name == "step" else _like(value, p) for name, value in held.items()}
        for i, p in zip(numbers, parameters, strict=True)
        if (held := state["state"].get(i)) is not None
    }
    groups = [
        {**theirs, **{name: value for name, value in ours.items() if name in WAYS}}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"param_groups": groups, "state": moments})


def _like(value, p):
    """The tensor `value` in the layout of the parameter `p` of its shape; itself if it is.

    ValueError for one of another shape.
    """
    if value.shape != p.shape:
        raise ValueError(f"a moment is {tuple(value.shape)}, its parameter {tuple(p.shape)}")
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every rank cuts its part out of its own copy.
        value = value.to(p.device).contiguous()
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    if value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)


@contextlib.contextmanager
def unsharded(net):
    """Inside, a split `net` has whole weights on every rank: net(...) is no collective.

    Ranks may call it different numbers of times, or not at all. It is for sampling: without
    gradients, also under inference_mode, and nobody may change the weights meanwhile. Entering is
    a collective; leaving splits net again, and training or averaging into it goes on. A net that
    is not split is left alone.
    """
    if not hasattr(net, "unshard"):
        yield
        return
    parts = [part for part in net.modules() if hasattr(part, "unshard")]
    # What inference_mode gathers, backward() could never use again.
    with torch.inference_mode(False):
        for part in parts:
            part.unshard()
    # Hooks would split a part after its forward, and put that on record for a backward that never
    # comes.
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
        for part in parts:
            part.reshard()
