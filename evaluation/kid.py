"""The kernel distance, KID: are two sets of features alike in any respect, not as Gaussians only?

Bińkowski, Sutherland, Arbel, Gretton 2018, "Demystifying MMD GANs", section 4; the estimator is
equation 3 of Gretton et al. 2012, "A Kernel Two-Sample Test".
"""

from runtime.processes import progress

import numpy as np

from evaluation.moments import check_rows


def kernel_distance(feats, feats_w, *, subsets=100, subset_size=1000, seed=0):
    """The unbiased squared MMD with kernel (x·y / d + 1)³, and its standard error.

    Of rows (N, d) and (M, d), its mean over subsets drawn without replacement, of subset_size, or
    of the smaller of N and M if that is less; and the mean's standard error, as an estimate of
    what endless images of both kinds would give. Its expectation is 0 for equal distributions, so
    it may be negative. Raises BadInput for fewer than 2 rows, other dims, values not finite.
    """
    check_rows(feats, feats_w, least=2)
    m, d = min(subset_size, len(feats), len(feats_w)), feats.shape[1]
    rng, found, spread = np.random.default_rng(seed), [], []
    for _ in progress(None, "kernel distance", over=range(subsets), quiet=m * d < 10**6):
        drawn = [f[np.sort(rng.choice(len(f), m, replace=False))] for f in (feats, feats_w)]
        both = np.concatenate(drawn).astype(np.float64)  # (2m, d)
        kernel = both @ both.T / d + 1  # (2m, 2m)
        kernel *= kernel * kernel
        kernel[np.diag_indices(2 * m)] = 0  # a row is not compared with itself
        to_x, to_y = kernel[:, :m].sum(1), kernel[:, m:].sum(1)  # (2m,)
        # What each row adds to Gretton et al. 2012, eq. 3: (m,) of either side.
        of_x = to_x[:m] / (m - 1) - to_y[:m] / m
        of_y = to_y[m:] / (m - 1) - to_x[m:] / m
        found.append(of_x.mean() + of_y.mean())
        spread.append(4 * (of_x.var(ddof=1) / len(feats) + of_y.var(ddof=1) / len(feats_w)))
    # Variance: of the images that there are (Hoeffding's projection), of the draw of the subsets.
    error = np.sqrt(np.mean(spread) + np.var(found) / subsets)
    return float(np.mean(found)), float(error)
