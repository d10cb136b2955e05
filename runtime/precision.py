"""In which precision networks compute: bf16, fp16 with a scaled loss, or fp32.

fp16 has 5 bits of exponent: what lies below 6e-8 is 0 and what lies above 65504 is infinite. The
gradients of a mean over many pixels are smaller than that, so the loss is multiplied by a number
first, and the gradients are divided by it before they are used (Micikevicius et al., "Mixed
Precision Training", 2018, arXiv:1710.03740, section 3.2). bf16 has fp32's range and needs none.
"""

from runtime.commandline import BadInput

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(precision, device):
    """What autocast computes in on a torch.device where --precision says so; fp32: no autocast.

    auto is bf16 where the GPU has it, from sm_80 on; fp16 where it has tensor cores for that alone
    (sm_70: V100, sm_75: T4); else fp32. torch.cuda.is_bf16_supported() would be true on a T4, too,
    where bf16 is emulated and many times slower.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.float32
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) else torch.float32


class LossScaler(torch.amp.GradScaler):
    """The factor of a loss in fp16, which follows the gradients; in other precisions there is none.

    It doubles after 2000 good steps. Where a gradient is not finite, the weights stay as they are,
    and it is halved. Nothing of that waits for the device if the optimizer is a fused one.
    """

    def __init__(self, world):
        super().__init__(world.device.type, enabled=world.dtype is torch.float16)
        self.skipped = torch.zeros((), device=world.device)

    def descend(self, optimizer, parameters, clip):
        """Step along the gradient of scale(loss), whose norm is clipped; `parameters` have it."""
        self.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.step(optimizer)
        self.update()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of --shard
        self.skipped += ~norm.isfinite()

    def read(self, step):
        """{'skipped_steps': how many since the last call}; BadInput where no factor helps."""
        if self.get_scale() < 1e-4:
            why = f"the gradient overflows in fp16 whatever the loss is divided by, at step {step}"
            raise BadInput(f"{why}; type --precision fp32, or bf16 where the GPU has it")
        count = int(self.skipped)
        self.skipped.zero_()
        return {"skipped_steps": count}

    def load_state_dict(self, state):
        """Of a checkpoint; one of a run in another precision has no factor."""
        if state:
            super().load_state_dict(state)
