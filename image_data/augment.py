"""Augmentation that does not leak: images turned, scaled and moved, and a vector that says how.

Karras et al. 2022 (arXiv:2206.00364), appendix F.2; the transformations and the filter are those of
Karras et al. 2020 (arXiv:2006.06676), appendix B.

A network that sees a small data set only transformed draws such images, too. One that also gets a
vector of what was done learns what it does; given zeros, it draws images as they are.

    draws = draw_augmentation(rng, len(images), p)       (B, 8), a row for each image
    images, labels = augment(images, draws)              (B,C,H,W) and (B, 9), for the network

A classifier only has its images moved by whole pixels: shift(images, by). What follows is of
augment.

All but the mirroring is one affine map, so an image is resampled once. That happens at twice its
resolution: the wavelet sym6 fills in the points between, they are read bilinearly where each point
of the result comes from, and sym6, now a low-pass filter, halves that. So details that shrink fade
and leave no moire, and the identity gives the image back. sym6 is not quite symmetric: a half turn
lands 0.1 pixel beside its place.

Beyond its borders an image goes on as its reflection, without end. So what becomes of it depends on
no other image of the batch. (In the published code it does, by up to 5e-4, and what lies further
outside than the image is long is zero.)
"""

from runtime.processes import exact

import functools

import numpy as np
import torch
import torch.nn.functional as F

AUGMENT_DIM = 9  # numbers in a label
SCALE, STRETCH = 0.2, 0.2  # standard deviations in octaves
SHIFT = 0.125  # standard deviation in widths and heights of the image

# The low-pass filter of sym6: 12 numbers, orthonormal to their own shifts by 2, six vanishing
# moments (Daubechies, "Ten Lectures on Wavelets", 1992, section 8.1; the digits of PyWavelets).
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
FIRST = -5  # the place of its first number, where a pixel is at 0


def draw_augmentation(rng, n, p):
    """What is done to n images, each kind of it with probability p: float32 (n, 8).

    rng: a numpy Generator; what is drawn from it does not depend on p.

    column 0    1 mirrors left to right, at 1/2 whatever p is: such images look like others
    column 1    1 mirrors top to bottom, at p/2
    column 2    w ~ N(0, 1) enlarges by 2^(0.2 w)
    column 3    turns counter-clockwise by an angle in -pi .. pi
    columns 4, 5    v ~ N(0, 1) stretches along an axis by 2^(0.2 v), and shrinks across it as much;
                half of the axes are at an angle in -pi .. pi, counter-clockwise, the others level
    columns 6, 7    N(0, 1) each: moves right and down by 0.125 of width and height times these

    Columns of what is not done are 0. Raises ValueError for p outside 0 .. 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in 0 .. 1, got {p}")
    flip_y, scale, turn, stretch, move = rng.random((5, n)) < p
    left, top, oblique = rng.random((3, n)) < 0.5
    angle, axis = rng.uniform(-np.pi, np.pi, (2, n))
    w, v, tx, ty = rng.standard_normal((4, n))
    columns = [left, flip_y & top, scale * w, turn * angle]
    columns += [stretch * v, (stretch & oblique) * axis, move * tx, move * ty]
    return np.stack(columns, axis=1).astype(np.float32)


def labels_of(draws):
    """What the network is told of draws (B, 8): (B, 9), zeros where nothing is done.

    An angle goes in as sine and cosine, so that -pi and pi are alike.
    """
    flip_x, flip_y, w, angle, v, axis, tx, ty = draws.unbind(1)
    labels = [flip_x, flip_y, w, angle.cos() - 1, angle.sin(), v * axis.cos(), v * axis.sin()]
    return torch.stack([*labels, tx, ty], dim=1)


def _turned(angle):
    """Matrices (B,2,2) that turn (x, y), y downward, clockwise by angle (B,)."""
    rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return torch.stack(rows, dim=1).view(-1, 2, 2)


def _sources(draws, height, width):
    """Where point o of a result comes from: M (B,2,2) and t (B,2) of the image's point M (o - t).

    Points are (x, y) in pixels from the centre, y downward. Enlarging, turning, stretching and
    moving undo what they say, the last of them first.
    """
    w, angle, v, axis, tx, ty = draws[:, 2:].unbind(1)
    along = torch.exp2(STRETCH * v)
    unstretch = torch.diag_embed(torch.stack([1 / along, along], dim=1))
    M = _turned(angle) @ _turned(-axis) @ unstretch @ _turned(axis)
    t = torch.stack([SHIFT * width * tx, SHIFT * height * ty], dim=1)
    return torch.exp2(-SCALE * w)[:, None, None] * M, t


@functools.lru_cache
def _filters(n, dtype, device):
    """(up, down) for a side of n pixels, pixel i of which is point 2 i of the finer grid.

    up (2 fold + 1, n) makes points 0 .. 2 fold of a line of pixels that is reflected at its first
    and last without end: it repeats itself after `fold` pixels, so its last point is its first.
    down (n, 2 n + 10) makes pixels of points -5 .. 2 n + 4.
    """
    fold = max(2 * n - 2, 1)
    up = torch.zeros(2 * fold + 1, n, dtype=torch.float64)
    down = torch.zeros(n, 2 * n + len(SYM6) - 2, dtype=torch.float64)
    for k, weight in enumerate(SYM6):
        down[range(n), range(k, k + 2 * n, 2)] = weight
        for point in range(len(up)):
            pixel, between = divmod(point - FIRST - k, 2)
            if not between:
                up[point, min(pixel % fold, fold - pixel % fold)] += weight
    return up.to(device, dtype), down.to(device, dtype)


def _resample(images, M, t):
    """The images (B,C,H,W), each point o of a result from the point that `_sources` says."""
    H, W = images.shape[2:]
    (up_y, down_y), (up_x, down_x) = (_filters(n, images.dtype, images.device) for n in (H, W))
    fine = up_y @ (images @ up_x.mT)  # (B,C,4H-3,4W-3)
    x, y = (
        torch.arange(FIRST, 2 * n - FIRST, dtype=t.dtype, device=t.device) / 2 - (n - 1) / 2 - shift
        for n, shift in ((W, t[:, :1]), (H, t[:, 1:]))
    )  # (B,2W+10), (B,2H+10): o - t
    grid = []
    for row, n, fold in ((M[:, 0], W, (len(up_x) - 1) / 2), (M[:, 1], H, (len(up_y) - 1) / 2)):
        pixel = row[:, 0, None, None] * x[:, None] + row[:, 1, None, None] * y[:, :, None]
        pixel = (pixel + (n - 1) / 2).remainder(fold)
        grid.append(pixel * (2 / fold) - 1)  # (B,2H+10,2W+10), in -1 .. 1 as grid_sample has it
    how = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    fine = F.grid_sample(fine, torch.stack(grid, dim=3), **how)  # (B,C,2H+10,2W+10)
    return down_y @ (fine @ down_x.mT)  # (B,C,H,W)


@exact()
def augment(images, draws):
    """The images transformed, and what the network is told of it.

    images    float32 or float64 (B,C,H,W) on any device; beside edges results overshoot a bit
    draws     (B, 8), as draw_augmentation has them
    Returns images (B,C,H,W) and labels float32 (B, 9). An image that is only mirrored, or left as
    it is, keeps its numbers bit for bit. On a GPU nothing waits for it where draws are there, too.
    Raises ValueError for draws of another shape.
    """
    draws = torch.as_tensor(draws, device=images.device)
    if draws.shape != (len(images), 8):
        got = tuple(draws.shape)
        raise ValueError(f"draws must be ({len(images)}, 8) for these images, got {got}")
    labels, draws = labels_of(draws.float()), draws.to(images.dtype)
    flip_x, flip_y, w, angle, v, _, tx, ty = draws.view(-1, 8, 1, 1, 1).unbind(1)
    images = torch.where(flip_x == 1, images.flip(3), images)
    images = torch.where(flip_y == 1, images.flip(2), images)
    moved = _resample(images, *_sources(draws, *images.shape[2:]))
    stays = (w == 0) & (angle == 0) & (v == 0) & (tx == 0) & (ty == 0)
    return torch.where(stays, images, moved), labels


def shift(images, by):
    """Each image of (B,C,H,W) moved up and left by its own pixels; its edge is repeated.

    by: int64 (B,2), on the same device.
    """
    b, _, h, w = images.shape
    up, left = by.unsqueeze(-1).unbind(1)  # (B,1) each
    rows = (torch.arange(h, device=by.device) + up).clamp(0, h - 1)  # (B,H)
    cols = (torch.arange(w, device=by.device) + left).clamp(0, w - 1)  # (B,W)
    each = torch.arange(b, device=by.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[each, rows[:, :, None], cols[:, None, :]]  # (B,H,W,C)
    return moved.permute(0, 3, 1, 2)
