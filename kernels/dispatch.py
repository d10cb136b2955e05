"""Who runs an operation: a Triton kernel, or the PyTorch reference beside it.

CUDA tensors take the kernel and CPU tensors the reference. With TRITON_INTERPRET=1 in the
environment when this is imported, CPU tensors take the kernel too, in Triton's interpreter.
Whatever the kernels are not made for takes the reference: float64, GPUs older than sm_80, AMD's.

Triton exists for Linux alone. Elsewhere the kernels are defined as functions that nobody calls.
"""

import torch

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


_runs_on = {}  # CUDA device: do kernels run there? To ask the driver takes longer than to launch


@torch.compiler.assume_constant_result
def _kernels_run_on(device):
    if device not in _runs_on:
        proved = hasattr(triton, "knobs") and not torch.version.hip
        if proved and torch.cuda.is_available():
            proved = torch.cuda.get_device_capability(device) >= (8, 0)
        _runs_on[device] = proved
    return _runs_on[device]


def use_kernels(x):
    """Whether an operation on tensor x runs as a Triton kernel."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return _kernels_run_on(x.device) if x.is_cuda else INTERPRET and x.device.type == "cpu"


def check_devices(x, **others):
    """ValueError unless all tensors are on x's device: a kernel would read a foreign address."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, it is on {other.device}")
