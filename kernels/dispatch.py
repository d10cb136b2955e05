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


@torch.compiler.assume_constant_result
def _kernels_run_on(device):
    if not hasattr(triton, "knobs") or torch.version.hip:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def use_kernels(x):
    """Whether an operation on tensor x runs as a Triton kernel."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return _kernels_run_on(x.device) if x.is_cuda else INTERPRET and x.device.type == "cpu"
