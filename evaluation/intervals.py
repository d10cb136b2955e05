"""How sure is a distance that was measured with N images, and what would endless images give?

N images put the Fréchet distance about a / N too high, and by chance higher or lower. Both can be
read off the distances of parts of the images: the jackknife (Efron 1982), and FID∞ of Chong and
Forsyth 2020, "Effectively Unbiased FID and Inception Score".
"""

from runtime.commandline import BadInput
from runtime.processes import progress

import numpy as np
import scipy.stats

from evaluation.moments import joined, moments


def frechet_interval(feats, distance, *, groups=20, seed=0):
    """How sure the distance of features (N, d) to a reference is. A dictionary:

    frechet           the distance
    standard_error    of it by chance, and of frechet_infinity
    interval          [low, high]: with 95 % confidence, what N such images give on average
    frechet_infinity  what endless images would give

    distance: a function of mu (d,) and sigma (d, d), such as eval_fid.distance_from(mu_w, sigma_w).
    From the distances of all images but one of the groups, drawn at random. Their spread gives the
    error (the jackknife; the reference is taken as given). A line over 1 / N through their mean
    and the distance of all is read off at 0: FID∞ of Chong and Forsyth, from sizes so near to
    N that it hardly bends (Quenouille's correction of a bias). By chance it may lie below 0. Raises
    BadInput for fewer than 4 images a group, and as `distance` does.
    """
    if len(feats) < 4 * groups:
        raise BadInput(f"the interval needs at least {4 * groups} images, got {len(feats)}")
    order = np.random.default_rng(seed).permutation(len(feats))
    parts = [moments(feats, which=np.sort(part)) for part in np.array_split(order, groups)]
    whole = joined(parts)
    value, left = distance(*whole.mu_sigma()), []
    for part in progress(None, "interval", over=parts, quiet=feats.shape[1] < 1024):
        left.append(distance(*whole.without(part).mu_sigma()))
    error = float(np.sqrt((groups - 1) * np.var(left)))
    reach = float(scipy.stats.t.ppf(0.975, groups - 1)) * error
    return {
        "frechet": value,
        "standard_error": error,
        "interval": [max(0.0, value - reach), value + reach],
        "frechet_infinity": float(groups * value - (groups - 1) * np.mean(left)),
    }
