"""Who runs an operation, a Triton kernel or the PyTorch reference, and how kernels are launched.

CUDA tensors take the kernel and CPU tensors the reference. With TRITON_INTERPRET=1 in the
environment when this is imported, CPU tensors take the kernel too, in Triton's interpreter.
Whatever the kernels are not made for takes the reference: float64, GPUs older than sm_80, AMD's.
On sm_75 (T4) group norm and the sampling update have kernels in fp16 and fp32, and attention none:
Triton uses no tensor cores there. What it compiles for sm_70 (V100) no tool that comes with it can
read, so nothing is proved of it, and the references run.

Most tensors of a diffusion model are small: a GPU is done with them before Python has launched the
next kernel. So an operation has two ways to its kernels. Where a tracer looks on (torch.compile,
export, fake tensors, vmap) it is a custom operator, which PyTorch's dispatcher carries. Where
nobody does, it is an autograd.Function, or nothing at all where no gradient is wanted; and what
Triton finds out anew at every launch is remembered for inputs of one `signature`.

Triton exists for Linux alone. Elsewhere the kernels are defined as functions that nobody calls.
"""

import sys

import torch
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl

    INTERPRET = triton.knobs.runtime.interpret
except ImportError:

    class _Absent:
        """What a file of kernels asks of triton while it is imported."""

        constexpr = object

        @staticmethod
        def jit(function=None, **_):
            return function or (lambda function: function)

    triton = tl = _Absent
    INTERPRET = False


# ----------------------------------------------------------------------------- kernel or reference

# {device: its architecture}. To ask the driver takes longer than to launch. What is interpreted on
# a CPU is planned for sm_80.
_archs = {torch.device("cpu"): 80}


def arch_of(device):
    """The architecture of a GPU that runs kernels, 90 of sm_90; 0 of one that does not."""
    if device not in _archs:
        proved = hasattr(triton, "knobs") and not torch.version.hip
        if proved and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            proved = 10 * major + minor
        _archs[device] = int(proved) if proved and (proved == 75 or proved >= 80) else 0
        if _archs[device] == 75:
            print(f"{device}: kernels run for group norm, noise and sampling in fp16 and fp32; "
                  "PyTorch runs attention, and all in bf16", file=sys.stderr)  # fmt: skip
    return _archs[device]


# For torch.compile the answer is a constant. This is all that torch.compiler.assume_constant_result
# does, after it has imported the compiler, for which every script would wait a second.
arch_of._dynamo_marked_constant = True


def use_kernels(x):
    """Whether an operation on tensor x runs as a Triton kernel."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if not x.is_cuda and not (INTERPRET and x.device.type == "cpu"):
        return False
    arch = arch_of(x.device)
    return arch >= 80 or (arch == 75 and x.dtype != torch.bfloat16)


def check_devices(x, **others):
    """ValueError unless all tensors are on x's device: a kernel would read a foreign address."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, it is on {other.device}")


# ---------------------------------------------------------------------- launches that cost little


def nobody_traces(tensors):
    """Whether these are ordinary tensors, in a program that runs as it is written."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def signature(tensors):
    """All that decides how kernels are launched on such tensors; None where that is not enough.

    Triton compiles loads for addresses that are multiples of 16, as all are that PyTorch allocates.
    A view may begin elsewhere: then Triton has to look at it at every launch. So it has where a
    tensor is not on the current GPU.
    """
    device, key, addresses = tensors[0].device, [], 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
        key.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
    if addresses % 16 or (device.type == "cuda" and device.index != current_device()):
        return None
    return tuple(key)


def still(launches, *saved):
    """The dict of launches, if saved tensors have the "signature" of it; else an empty one.

    Hooks on saved tensors may give back others, as those do that keep them in the host's memory.
    """
    found = signature([tensor for tensor in saved if tensor is not None])
    return launches if found == launches["signature"] else {}


def applier(function):
    """function.apply of an autograd.Function, where `nobody_traces`.

    PyTorch's own asks first whether somebody does, which takes longer than the rest of it.
    """
    return super(torch.autograd.Function, function).apply


def current_device():
    return triton.runtime.driver.active.get_current_device()


class Launch:
    """kernel[(grid,)](*args, *numbers, **constants), for the args of one signature.

    The first call is Triton's own. Later ones hand their arguments to the compiled kernel that it
    found, and pay neither for looking at them nor for the search. So the dtypes of args and the
    alignment of their addresses must stay, and floats must be floats. A kernel's parameters are in
    this order: those that change, integers that stay, constants.
    """

    __slots__ = ("compiled", "constants", "device", "grid", "kernel", "numbers", "rest")

    def __init__(self, kernel, grid, *numbers, **constants):
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.compiled = None

    def __call__(self, *args):
        if self.compiled is None:
            compiled = self.kernel[(self.grid,)](*args, *self.numbers, **self.constants)
            # The interpreter returns None; what was compiled and not loaded was not launched.
            if getattr(compiled, "_run", None) is not None:
                self.device = current_device()
                left = len(self.kernel.params) - len(args) - len(self.numbers)
                self.rest = (*self.numbers, *[None] * left)  # constants are compiled in
                self.compiled = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = self.compiled
        stream = triton.runtime.driver.active.get_current_stream(self.device)
        run(self.grid, 1, 1, stream, function, metadata, None, None, None, *args, *self.rest)
