"""What ran: PyTorch's operators inside a block, or kernels launched in Triton's interpreter."""

import contextlib

from torch.utils._python_dispatch import TorchDispatchMode


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
