"""What ran: PyTorch's operators inside a block, kernels launched in Triton's interpreter; reads."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.image_sets import Chosen


class Watched(Chosen):
    """Images of which `most` were read at a time."""

    most = 0

    def __getitem__(self, which):
        part = super().__getitem__(which)
        self.most = max(self.most, len(part))
        return part


class Operators(TorchDispatchMode):
    """Notes the operators of PyTorch that run inside, in order: "aten::clone"."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def interpreted_launches(run=True):
    """(kernel's name, grid) of each launch inside, in order; kernels do not run if not `run`."""
    from triton.runtime import interpreter

    launches, call = [], interpreter.GridExecutor.__call__

    def noted(self, *args, **kwargs):
        launches.append((self.fn.__name__, self.grid))
        return call(self, *args, **kwargs) if run else None

    interpreter.GridExecutor.__call__ = noted
    try:
        yield launches
    finally:
        interpreter.GridExecutor.__call__ = call


class Copies(TorchDispatchMode):
    """Keeps the shapes of copies of at least `size` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        aten = torch.ops.aten
        copies = (aten.clone, aten.copy_, aten._to_copy, aten._reshape_copy)
        if op.overloadpacket in copies and out.numel() >= self.size:
            self.found.append((op, tuple(out.shape)))
        return out
