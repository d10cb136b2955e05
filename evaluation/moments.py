"""Sums over rows of features: count, mean and scatter that can be joined, and taken away again.

Rows may be an np.memmap, or anything that slices to arrays: nothing here copies all of them.
"""

from runtime.commandline import BadInput

import numpy as np

CHUNK = 4096  # rows at a time


class Moments:
    """Count, mean and scatter matrix Σ (f − m)(f − m)ᵀ of rows that arrive in parts, in float64.

    Parts are joined exactly (Chan, Golub and LeVeque 1979), so their sizes and order do not matter.
    """

    def __init__(self, dim):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, rows):
        """Add rows (N, dim), N ≥ 1."""
        part, rows = Moments(0), np.asarray(rows, np.float64)
        part.n, part.mean = len(rows), rows.mean(0)
        rows = rows - part.mean
        part.scatter = rows.T @ rows
        self.merge(part)

    def merge(self, other):
        """Add what another Moments has seen."""
        share, delta = other.n / max(1, self.n + other.n), other.mean - self.mean
        self.scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * share)
        self.mean = self.mean + delta * share
        self.n += other.n

    def without(self, other):
        """The Moments of the rows seen here but for those of `other`, a proper part of them."""
        rest = Moments(0)
        rest.n = self.n - other.n
        rest.mean = self.mean + (self.mean - other.mean) * (other.n / rest.n)
        delta = other.mean - rest.mean
        between = np.outer(delta, delta) * (other.n * rest.n / self.n)
        rest.scatter = self.scatter - other.scatter - between
        return rest

    def mu_sigma(self):
        """The mean (dim,) and the unbiased covariance (dim, dim), divided by n − 1."""
        if self.n < 2:
            raise BadInput(f"a covariance needs at least 2 images, got {self.n}")
        return self.mean, self.scatter / (self.n - 1)


def moments(feats, chunk=CHUNK, which=None):
    """The Moments of features (N, d), or of the rows numbered in `which`."""
    found, n = Moments(feats.shape[1]), len(feats) if which is None else len(which)
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        found.update(feats[part if which is None else which[part]])
    return found


def joined(parts):
    """The Moments of all rows that the Moments `parts` have seen."""
    whole = Moments(len(parts[0].mean))
    for part in parts:
        whole.merge(part)
    return whole


def check_rows(*sides, least=1):
    """The mean (d,) of the rows of all sides, each (N, d), as float32.

    Raises BadInput for shapes that differ in d, N below `least`, and values that are not finite.
    """
    shapes = [tuple(side.shape) for side in sides]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise BadInput(f"features must be (N, d) with one d, got {shapes}")
    if min(shape[0] for shape in shapes) < least:
        raise BadInput(f"this figure needs at least {least} images of each kind, got {shapes}")
    total = np.zeros(shapes[0][1])
    for side in sides:
        for start in range(0, len(side), CHUNK):
            total += np.asarray(side[start : start + CHUNK], np.float64).sum(0)
    if not np.isfinite(total).all():
        raise BadInput("features must be finite numbers: the network or the images are broken")
    return (total / sum(shape[0] for shape in shapes)).astype(np.float32)
