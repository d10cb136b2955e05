"""Precision, recall, density and coverage: are samples likely, and are all kinds there?

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
eq. 1-2. Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
eq. 4-5.
"""

from runtime.processes import exact, progress

import numpy as np
import torch

from evaluation.moments import check_rows
from evaluation.neighbours import CHUNK, block, neighbours, squared_distances, squares_between


@exact()
def manifold(real, fake, *, k=3, k_dense=5, device="cpu"):
    """Precision, recall, density and coverage of fake rows (M, d) beside real ones (N, d).

    A ball around each row reaches to its k-th nearest of its own kind. Kynkäänniemi et al. 2019,
    eq. 1-2: precision is the share of fakes within some real ball, recall of the real ones within
    some fake ball. Naeem et al. 2020, eq. 4-5: density is in how many real balls of k_dense a fake
    lies, over k_dense (1 for equal distributions, and it may exceed 1), coverage the share of such
    balls with a fake in them. As in the published code, a ball holds its surface for the first
    two, and does not for the last two: where float32 leaves that in doubt, float64 decides. Raises
    BadInput for N or M ≤ k, and as check_rows does.
    """
    centre, n, m = check_rows(real, fake), len(real), len(fake)
    # What rounding does to squares_between is at most this times the lengths: Higham 2002, 3.1.
    slack = (2 * len(centre) + 16) * 2.0**-24
    of_real = neighbours(real, k=max(k, k_dense), device=device)[0]
    of_fake = neighbours(fake, k=k, device=device)[0]

    def pairs(lower, radius, closed):
        """Numbers of real and fake rows of this block, where one lies in the ball of the other.

        lower (rows, columns) is at most the squared distance; radius (rows, 1) or (1, columns) is
        that of the balls, squared.
        """
        limit = torch.from_numpy(radius.astype(np.float32)).to(device).expand_as(lower)
        i, j = (lower <= limit).nonzero(as_tuple=True)
        sure = lower[i, j] + 2 * slack * (x[1][i] + y[1][j]) < limit[i, j]
        i, j, sure = (v.cpu().numpy() for v in (i + a, j + b, sure))
        doubt = ~sure
        exact = squared_distances(real, fake, i[doubt], j[doubt])
        radius = np.broadcast_to(radius, lower.shape)[i[doubt] - a, j[doubt] - b]
        sure[doubt] = exact <= radius if closed else exact < radius
        return i[sure], j[sure]

    likely, found, dense = np.zeros(m, bool), np.zeros(n, bool), np.zeros(n)
    for a in progress(None, "manifold", over=range(0, n, CHUNK), quiet=n < 3 * CHUNK):
        x, rows = block(real, a, centre, device), slice(a, a + CHUNK)
        for b in range(0, m, CHUNK):
            y, columns = block(fake, b, centre, device), slice(b, b + CHUNK)
            lower = squares_between(x, y, slack)  # (rows, columns)
            likely[pairs(lower, of_real[rows, k - 1 : k], closed=True)[1]] = True
            found[pairs(lower, of_fake[None, columns, k - 1], closed=True)[0]] = True
            inside = pairs(lower, of_real[rows, k_dense - 1 : k_dense], closed=False)[0]
            dense += np.bincount(inside, minlength=n)
    return dict(
        precision=float(likely.mean()),
        recall=float(found.mean()),
        density=float(dense.sum() / (k_dense * m)),
        coverage=float((dense > 0).mean()),
    )
