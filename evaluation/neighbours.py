"""The nearest neighbours of rows, in blocks: memory does not grow with the number of pairs.

A distance is searched for in float32, and made exact in float64 wherever something depends on its
last digits.
"""

from runtime.commandline import BadInput
from runtime.processes import exact, progress

import numpy as np
import torch

from evaluation.moments import check_rows

CHUNK = 2048  # rows at a time: a block of distances is then 16 MB


def squared_distances(x, y, i, j, most=2**22):
    """‖x_i − y_j‖² of the rows numbered i and j (P,), float64 (P,): exact, 0 for a copy."""
    found, step = np.empty(len(i)), max(1, most // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = np.asarray(x[i[part]], np.float64) - y[j[part]]
        found[part] = (difference**2).sum(1)
    return found


def block(side, start, centre, device):
    """CHUNK rows less the centre, float32 (n, d), and their squared lengths (n,).

    Differences of long rows would lose the digits that the lengths have more than they.
    """
    rows = np.asarray(side[start : start + CHUNK]) - centre
    rows = torch.from_numpy(rows.astype(np.float32, copy=False)).to(device)
    return rows, rows.square().sum(1)


def squares_between(x, y, lower=0.0):
    """‖x_i‖² + ‖y_j‖² − 2 x_i·y_j of two blocks, less lower (‖x_i‖² + ‖y_j‖²): float32 (n, m)."""
    lengths = (x[1] * (1 - lower))[:, None] + y[1] * (1 - lower)  # (n, m)
    return lengths.addmm_(x[0], y[0].T, alpha=-2)


@exact()
def neighbours(queries, points=None, k=1, *, device="cpu"):
    """The k points (M, d) nearest to each query (Q, d): squared distances and numbers, (Q, k).

    Without points, among the queries, and none is its own neighbour; a duplicate is. float32 finds
    k + 4 candidates, float64 measures and sorts them; of many more that are as near to 7 digits,
    another may be the k-th. Memory does not grow with Q × M. Raises BadInput as check_rows does.
    """
    alone = points is None
    points = queries if alone else points
    centre = check_rows(queries, points)
    if len(points) < k + alone:
        raise BadInput(f"{k} neighbours need at least {k + alone} images, got {len(points)}")
    keep, starts = min(k + 4, len(points) - alone), range(0, len(queries), CHUNK)
    near = torch.full((len(queries), keep), torch.inf, device=device)
    number = torch.zeros((len(queries), keep), dtype=torch.int64, device=device)

    def offer(i, j, squares):
        """Keep of each query from i on the nearest, of those known and the points from j on."""
        mine = slice(i, i + len(squares))
        best, which = squares.topk(min(keep, squares.shape[1]), largest=False)
        best, which = torch.cat([near[mine], best], 1), torch.cat([number[mine], which + j], 1)
        near[mine], order = best.topk(keep, largest=False)
        number[mine] = which.gather(1, order)

    for i in progress(None, "neighbours", over=starts, quiet=len(starts) < 3):
        x = block(queries, i, centre, device)
        for j in range(i if alone else 0, len(points), CHUNK):
            squares = squares_between(x, block(points, j, centre, device))  # (n, m)
            if alone and i == j:
                squares.fill_diagonal_(torch.inf)
            offer(i, j, squares)
            if alone and i < j:
                offer(j, i, squares.T)
    number = number.cpu().numpy()
    exact = squared_distances(queries, points, np.arange(len(queries)).repeat(keep), number.ravel())
    exact = exact.reshape(number.shape)
    order = exact.argsort(1)[:, :k]
    return np.take_along_axis(exact, order, 1), np.take_along_axis(number, order, 1)
