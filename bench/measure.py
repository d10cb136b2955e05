"""How long does a kernel take? The half of `bench/kernels.py` that runs things.

Nothing here asks for a GPU: what differs is the timer and the device of a case's inputs.
"""

import dataclasses
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_clock import spans
from tests.cases.kernel_cases import CASES, OPERATIONS, size
from tests.cases.verify import leaves

ROUNDS, REPEATS = 5, 20  # turns that contenders take, and calls that are timed in each


def add_filters(parser):
    """The arguments of a program that choose cases."""
    parser.add_argument(
        "--only", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="these operations"
    )
    parser.add_argument("--shape", nargs="+", default=[""], help="names that contain one of these")


def chosen(args):
    """The cases that such arguments leave."""
    return [
        case
        for case in CASES
        if case.operation in args.only and any(part in case.name for part in args.shape)
    ]


class CudaTimer:
    """Milliseconds of each of `repeats` calls on a GPU, its L2 cache emptied before each."""

    def __init__(self, device="cuda", size=2**28):
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, function, repeats):
        return spans(function, repeats, self.flush)


def cpu_timer(function, repeats):
    """The same of calls that end when they return."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def take_turns(timer, functions, rounds=ROUNDS, repeats=REPEATS):
    """{name: milliseconds}, the median of each function's rounds, which alternate.

    A clock that falls or a neighbour that wakes then falls on all functions alike.
    """
    medians = {name: [] for name in functions}
    for function in functions.values():  # allocations and compilations before the clock runs
        timer(function, 3)
    for _ in range(rounds):
        for name, function in functions.items():
            medians[name].append(statistics.median(timer(function, repeats)))
    return {name: statistics.median(found) for name, found in medians.items()}


def prepared(case, function, inputs, dy=None):
    """A function of nothing that runs forwards without gradients, or only backwards."""
    if dy is None:

        def forward():
            with torch.no_grad():
                return function(inputs)

        return forward

    mine, names = leaves(case, inputs)
    y, wanted = function(mine)[0], [mine[name] for name in names]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def compiled(function):
    """torch.compile of a case's function for its one shape."""
    torch._dynamo.reset()  # or it would generalise over the shapes of the cases before
    # The backward pass is run many times on the same graph, so it may not reuse its buffers.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def contenders(case, inputs, dy=None, compile=compiled):
    """({name: function of nothing}, {name: why it failed}): all that is to be timed."""
    ways = {
        "kernel": lambda: case.run,
        "reference": lambda: case.reference,
        "plain": lambda: case.plain,
        "compiled": lambda: compile(case.plain),
    }
    ready, failed = {}, {}
    for name, way in ways.items():
        try:
            function = prepared(case, way(), inputs, dy)
            function()
        except Exception as error:
            if name == "kernel":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            ready[name] = function
    return ready, failed


def copy_bandwidth(timer, device, count=10**9):
    """Bytes a second that copying moves, read and written, on tensors of `count` bytes."""
    x = torch.zeros(count, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    return 2 * size(x) / take_turns(timer, {"copy": lambda: y.copy_(x)})["copy"] * 1e3


class CountTensors(TorchDispatchMode):
    """The bytes that PyTorch's operators read and write if each moves its tensors just once."""

    ONLY_WRITE = ("copy_", "zero_", "fill_")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        writes = [r.alias_info for r in function._schema.returns]
        views = bool(writes) and all(info and not info.is_write for info in writes)
        if not views and not name.startswith(("empty", "new_empty")):
            read = args[1:] if name in self.ONLY_WRITE else args
            self.bytes += _distinct(read) + _distinct(kwargs) + _distinct(result)
        return result


def _distinct(tree):
    """Bytes of the tensors in nested arguments; an expanded dimension is one element long."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
    total = 0
    for tensor in tensors:
        elements = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= length if stride else min(1, length)
        total += elements * tensor.element_size()
    return total


def tensor_passes(case, function, backward):
    """Bytes that the operators of a case's `function` move on one sample, ÷ the case's floor."""
    case = dataclasses.replace(case, batch=1)
    inputs = case.inputs("cpu")
    dy = torch.ones_like(case.run(inputs)[0]) if backward else None
    once = prepared(case, getattr(case, function), inputs, dy)
    once()  # what is made once is made now
    with CountTensors() as count:
        once()
    return count.bytes / case.floor(inputs, backward)
