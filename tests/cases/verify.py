"""Is a kernel right? Its results and gradients against its reference in float64.

Nothing here asks for a GPU: what differs is the device of a case's inputs. The cases are those of
`kernel_cases.py`.
"""

import dataclasses
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "diffusion_book"  # of the project's custom operations
# Error ÷ max(1, |reference|) that a result may have, by operation and by the dtype of the result.
BOUNDS = {
    "group_norm": {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "attention": {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2},
    "sampling": {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
}
SUM_BOUND = 5e-6  # of fp32 gradients that sum over all positions of a batch
ROUNDED = 4 * 2.0**-24  # times a case's sensitivity: four roundings of fp32, all in one direction
# ‖error‖ ÷ ‖reference‖: gradients may be so small that wrong ones differ by less than BOUNDS.
NORM_BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


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
    nearly cancel: their error is measured against the largest of their elements. What cancels on
    the way to an fp32 gradient may add its own roundings (Case.sensitivity); half precision's
    bounds are a thousand of them.
    """
    exactly = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = results(case, case.reference, exactly, None if dy is None else dy.double())
    errors = []
    fragile = dy is not None and case.dtype == torch.float32
    sensitivity = case.sensitivity(exactly, dy.double()) if fragile else {}
    for name, found in results(case, run or case.run, inputs, dy).items():
        right, dtype = truth[name], found.dtype
        assert found.shape == right.shape, f"{name} is {found.shape}, not {right.shape}"
        difference = (found.double() - right).abs()
        summed = dy is not None and name in case.sums
        scale = (right.abs().max() if summed else right.abs()).clamp(min=1)
        bound = SUM_BOUND if summed and dtype == torch.float32 else BOUNDS[case.operation][dtype]
        bound += case.slack
        scale = scale + sensitivity.get(name, 0.0) * (ROUNDED / bound)
        errors.append(Error(name, (difference / scale).max().item(), bound))
        # What is zero, such as the gradient of a score that has no rival, has no relative error.
        whole, ones = right.norm(), math.sqrt(max(right.numel(), 1))
        relative = (difference.norm() / (whole if whole > 1e-12 * ones else ones)).item()
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
