"""CUDA graphs on the CPU: the operations inside torch.cuda.graph are recorded, and replayed.

As on a GPU, recording computes nothing: what it gives is not a number until the first replay. A
replay runs the operations on the same memory and writes into the same memory; no Python of the
network is called. So a scalar that Python had computed stays as it was recorded.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def raw(tensor):
    """The same memory as a tensor that autograd knows nothing of, for a GPU does not, either."""
    where = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), *where)


class Graph:
    """In place of torch.cuda.CUDAGraph. made: all there are; replays: how often each was."""

    made = []

    def __init__(self):
        self.operations, self.replays = [], 0
        Graph.made.append(self)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, written in self.operations:
            found = tree_leaves(operation(*args, **kwargs))
            for i, tensor in written:
                raw(tensor).copy_(found[i])


class Recorder(TorchDispatchMode):
    """Records into a Graph, while `with` it."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = operation(*args, **kwargs)
        given = {memory_of(v) for v in tree_leaves((args, kwargs)) if torch.is_tensor(v)}
        written = [
            (i, v)
            for i, v in enumerate(tree_leaves(found))
            if torch.is_tensor(v) and memory_of(v) not in given  # neither a view nor in place
        ]
        self.graph.operations.append((operation, args, kwargs, written))
        return found


@contextlib.contextmanager
def graph(recorded, pool=None, capture_error_mode="global"):
    """In place of torch.cuda.graph."""
    if torch.is_autocast_enabled("cpu"):
        assert not torch.is_autocast_cache_enabled(), "a cached cast is not in the graph"
    with Recorder(recorded):
        yield
    for *_, written in recorded.operations:
        for _, tensor in written:
            if tensor.is_floating_point():
                raw(tensor).fill_(torch.nan)


class Stream:
    def wait_stream(self, other):
        """What comes now waits for what was queued on the other."""


def install(monkeypatch, graph=graph):
    """Put these in place of CUDA's; Graph.made is then empty."""
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
