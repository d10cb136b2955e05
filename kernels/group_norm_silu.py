"""Group normalisation (Wu & He 2018), then an optional scale and shift, then SiLU.

The C channels are cut into `groups` runs of C / groups; mean and (biased) variance are taken over
the channels of a run and all positions of one sample, for x (B, C, ...) with groups g:

    y = (x - mean_g) / √(var_g + eps) · weight_c + bias_c
    y = y · (1 + scale_bc) + shift_bc             where scale and shift are given
    y = y · sigmoid(y)                            where silu is true

The middle line is the conditioning of Dhariwal & Nichol 2021 (AdaGN, eq. 1) with 1 + scale for
their y_s, so that a zero-initialised projection starts as the identity.
"""

import torch
import torch.nn.functional as F


def _centred(x, groups):
    """x minus its group means, taken as constants: no output of the norm depends on them.

    PyTorch's CPU kernel for channels_last computes E[x²] - E[x]², which at a mean of ten standard
    deviations has lost half of fp32's digits and at a thousand all of them.
    """
    mean = x.detach()[..., None].flatten(2).mean(2)  # (B,C)
    mean = mean.unflatten(1, (groups, -1)).mean(2)  # (B,G)
    mean = mean.repeat_interleave(x.shape[1] // groups, dim=1)  # (B,C)
    return x - mean.view(*mean.shape, *[1] * (x.ndim - 2))


def _reference(x, groups, weight, bias, eps, scale, shift, silu):
    dtype = torch.promote_types(x.dtype, torch.float32)  # float64 stays, half precision goes up
    y = x.to(dtype)
    if not x.is_contiguous():
        y = _centred(y, groups)
    y = torch.group_norm(y, groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        per_channel = (*scale.shape, *[1] * (x.ndim - 2))  # (B,C) -> (B,C,1,1)
        y = (y * (1 + scale.to(dtype)).view(per_channel)).add_(shift.to(dtype).view(per_channel))
    if silu:
        y = F.silu(y, inplace=not y.requires_grad)  # backward needs silu's input, sampling does not
    return y.to(x.dtype)


def group_norm_silu(x, groups, weight, bias, *, eps=1e-5, scale=None, shift=None, silu=True):
    """silu(group_norm(x) · weight + bias), with · (1 + scale) + shift before the SiLU if given.

    x: (B, C, ...), B may be 0; contiguous or channels_last. groups divides C.
    weight, bias: (C,). scale, shift: (B, C), both or neither. silu=False leaves out the SiLU.
    Statistics and arithmetic are in fp32 (float64 for float64 x). Returns x's shape, dtype and
    memory format. Raises ValueError for shapes that do not fit.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide x's {channels} channels, got {groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {tuple(value.shape)}")
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"scale and shift come together: {missing} is missing")
    if scale is not None:
        for name, value in (("scale", scale), ("shift", shift)):
            if value.shape != (batch, channels):
                raise ValueError(f"{name} must be ({batch}, {channels}), got {tuple(value.shape)}")
    return _reference(x, groups, weight, bias, eps, scale, shift, silu)
