"""How networks draw on a CPU: the same numbers up to rounding, faster or in less memory.

Without gradients no layer must keep what it has seen, and an image of a gigabyte may pass through
in parts that a cache holds. What training computes stays as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn

STRIPE = 2**20  # numbers of an image that a norm takes at a time: 4 MB


def drawing(x):
    """Whether x is fp32 on a CPU and not empty, and nobody wants gradients."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """nn.Linear, (...,c_in) -> (...,c_out); when drawing, a convolution of size 1.

    It is the same product of matrices, but PyTorch has oneDNN compute the one and MKL the other,
    which on AMD's processors is half as fast.
    """

    def forward(self, x):
        if not drawing(x):
            return super().forward(x)
        rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1,c_in,1,n), a view
        y = F.conv2d(rows, self.weight[:, :, None, None], self.bias)  # (1,c_out,1,n)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def doubled(conv, x):
    """conv of x (B,C,H,W) with each pixel four times: (B,c_out,2H,2W) of a 3x3 nn.Conv2d, padded.

    Of three neighbours in the doubled image two are the same pixel. Over the rows, a kernel (a,b,c)
    sees x[i-1], x[i], x[i] at 2i, and x[i], x[i], x[i+1] at 2i+1: it is (a,b+c) on the one and
    (a+b,c) on the other. Columns alike. So 4 products of 9 are left, and no doubled image.
    """
    (height, width), weight = x.shape[2:], conv.weight
    size = len(x), len(weight), 2 * height, 2 * width
    how = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
    y = torch.empty(size, **how)

    def halved(kernel, odd, dim):
        a, b, c = kernel.unbind(dim)
        return torch.stack([a + b, c] if odd else [a, b + c], dim)

    for row in (0, 1):
        for column in (0, 1):
            kernel = halved(halved(weight, row, 2), column, 3)  # (c_out,C,2,2)
            h = F.conv2d(x, kernel, conv.bias, padding=1)  # (B,c_out,H+1,W+1)
            y[:, :, row::2, column::2] = h[:, :, row : row + height, column : column + width]
    return y


def norm_in_stripes(x, groups, weight, bias, eps, silu):
    """kernels.group_norm_silu of channels_last x (B,C,H,W): nothing but x and y has its size.

    A stripe is some rows of the image. In one of 512x512 PyTorch's norm, which adds up all of them
    one by one, is right to 1e-4; sums of stripes are to 1e-6.
    """
    batch, channels, height, width = x.shape
    rows = max(1, STRIPE // (batch * channels * width))
    stripes, y = x.split(rows, dim=2), torch.empty_like(x)

    def of_groups(sums):  # (B,C) sums over the positions -> (B,C,1,1) means of groups
        means = sums.view(batch, groups, -1).mean(2) / (height * width)
        return means.repeat_interleave(channels // groups, dim=1)[..., None, None]

    mean = of_groups(sum(part.sum(dim=(2, 3)) for part in stripes))
    variance = of_groups(sum((part - mean).square_().sum(dim=(2, 3)) for part in stripes))
    scale, shift = weight[:, None, None] * (variance + eps).rsqrt(), bias[:, None, None]
    for part, out in zip(stripes, y.split(rows, dim=2), strict=True):
        torch.addcmul(shift, part - mean, scale, out=out)
        if silu:
            F.silu(out, inplace=True)
    return y
