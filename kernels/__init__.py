"""The hot operations of every chapter: attention, group norm with SiLU, and the sampling update.

Each file reads downward: the mathematics, a plain PyTorch reference, the Triton kernels, how they
are launched, the public function.
"""

from kernels.attention import attention
from kernels.group_norm_silu import group_norm_silu
from kernels.philox import gaussian
from kernels.sampling_update import Row, sampling_update, step_variance

__all__ = [
    "Row",
    "attention",
    "gaussian",
    "group_norm_silu",
    "sampling_update",
    "step_variance",
]
