"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), without mask or dropout.

    S = scale · q kᵀ          (N, M) for every sample and head
    P = softmax of each row of S
    o = P v                   (N, D)

Queries and keys may have different lengths N and M (cross attention). The three inputs may be
views of one packed qkv projection: only their shapes count, not their strides. The output's memory
runs (B, N, H, D), the layout in which heads are merged, so that
`o.transpose(1, 2).reshape(B, N, H * D)` copies nothing.
"""

import torch.nn.functional as F


def _reference(q, k, v, scale):
    o = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2)  # copies only if o is not (B,N,H,D) yet


def attention(q, k, v, *, scale=None):
    """softmax(scale · q kᵀ) v.

    q: (B, H, N, D); k, v: (B, H, M, D), M >= 1; floating point, one dtype, any strides.
    scale: factor on q kᵀ, 1/√D if None.
    Returns (B, H, N, D) of q's dtype, its memory laid out (B, N, H, D).
    Raises ValueError if the shapes do not fit together.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, N, D), got {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    if k.ndim != 4 or k.shape[:2] != (batch, heads) or k.shape[3] != dim or k.shape[2] == 0:
        raise ValueError(
            f"k must be ({batch}, {heads}, M, {dim}) with M >= 1 to fit q, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    return _reference(q, k, v, scale)
