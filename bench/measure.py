"""Is a kernel right, and how long does it take? The half of `bench/kernels.py` that runs things.

Nothing here asks for a GPU: what differs is the timer and the device of a case's inputs.
"""

import dataclasses
import math
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import size

NAMESPACE = "diffusion_book"  # of the project's custom operations
# Error ÷ max(1, |reference|) that a result may have, by operation and by the dtype of the result.
BOUNDS = {
    "group_norm": {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "attention": {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2},
    "sampling": {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
}
SUM_BOUND = 5e-6  # of fp32 gradients that sum over all positions of a batch
# ‖error‖ ÷ ‖reference‖: gradients may be so small that wrong ones differ by less than BOUNDS.
NORM_BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
ROUNDS, REPEATS = 5, 20  # turns that contenders take, and calls that are timed in each


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a result is from float64, as a multiple of what is allowed: right if <= 1."""

    name: str
    value: float
    bound: float

    @property
    def share(self):
        return float("inf") if math.isnan(self.value) else self.value / self.bound

    @property
    def right(self):
        return self.share <= 1


def leaves(case, inputs):
    """The inputs with those that may have gradients as leaves of their own, and their names."""
    names = [name for name, t in inputs.items() if t.is_floating_point()]
    return inputs | {name: inputs[name].detach().requires_grad_() for name in names}, names


def gradients(case, function, inputs, dy):
    """{input: gradient} of function's first result, given the gradient dy of that result."""
    inputs, names = leaves(case, inputs)
    found = torch.autograd.grad(function(inputs)[0], [inputs[name] for name in names], dy)
    return dict(zip(names, found, strict=True))


def results(case, function, inputs, dy):
    """{name: tensor}: what function gives forwards, or backwards if dy is not None."""
    if dy is not None:
        return gradients(case, function, inputs, dy)
    with torch.no_grad():
        return {f"result {i}": t for i, t in enumerate(function(inputs))}


def verify(case, inputs, dy=None, run=None):
    """The Errors of a case's operation against its reference in float64.

    dy: the gradient of the result, for the backward direction. run: what is to be verified,
    case.run if None. Gradients that sum over the whole batch are sums of up to 10⁷ terms that
    nearly cancel: their error is measured against the largest of their elements.
    """
    exactly = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = results(case, case.reference, exactly, None if dy is None else dy.double())
    errors = []
    for name, found in results(case, run or case.run, inputs, dy).items():
        right, dtype = truth[name], found.dtype
        assert found.shape == right.shape, f"{name} is {found.shape}, not {right.shape}"
        difference = (found.double() - right).abs()
        summed = dy is not None and name in case.sums
        scale = right.abs().max() if summed else right.abs()
        bound = SUM_BOUND if summed and dtype == torch.float32 else BOUNDS[case.operation][dtype]
        bound += case.slack
        errors.append(Error(name, (difference / scale.clamp(min=1)).max().item(), bound))
        relative = (difference.norm() / right.norm()).item()
        errors.append(Error(f"norm of {name}", relative, NORM_BOUNDS[dtype]))
    return errors


class _Heard(TorchDispatchMode):
    """Whether one of the project's own operations was called."""

    def __init__(self):
        super().__init__()
        self.kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.kernel |= function.namespace == NAMESPACE
        return function(*args, **(kwargs or {}))


def runs_kernel(case, inputs, dy=None):
    """Whether the operation goes to a kernel; it may have none for a shape and take its reference.

    With dy: whether it does where gradients are needed.
    """
    with _Heard() as heard:
        results(case, case.run, inputs, dy)
    return heard.kernel


class CudaTimer:
    """Milliseconds of each of `repeats` calls on a GPU, its L2 cache emptied before each."""

    def __init__(self, device="cuda", size=2**28):
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, function, repeats):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


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
