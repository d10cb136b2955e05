"""The mathematics of comparing two sets of images by their features, from the papers' equations.

A network turns each image into a feature vector, a row of an array (N, d). What is asked of two
sets of rows, the generated and the real ones:

    frechet_distance    how far apart, as two Gaussians        Heusel et al. 2017, eq. 6
    frechet_interval    how sure that is, with N images        the jackknife, Efron 1982;
                        what endless images would give         Chong and Forsyth 2020
    inception_score     sure of each, and varied over all      Salimans et al. 2016, section 4
    kernel_distance     how far apart, in any respect          Bińkowski et al. 2018, section 4
    manifold            are they likely, are all kinds there   Kynkäänniemi et al. 2019, eq. 1-2;
                                                               Naeem et al. 2020, eq. 4-5

Rows may be an np.memmap, or anything that slices to arrays: no function copies all of them. Sums
are kept in float64. A distance between rows is searched for in float32, and made exact in float64
wherever something depends on its last digits.
"""

from runtime.commandline import BadInput
from runtime.processes import progress

import warnings
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
import scipy.stats
import torch

CHUNK = 2048  # rows at a time: a block of distances is then 16 MB
EPS = np.finfo(np.float64).eps

# ------------------------------------------------------------------------------------- the moments


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


def moments(feats, chunk=4096, which=None):
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


def statistics(feats, chunk=4096):
    """mu (d,) and sigma (d, d), float64, of features (N, d). Raises BadInput when N < 2."""
    return moments(feats, chunk).mu_sigma()


# ---------------------------------------------------------------------------- the Fréchet distance


def frechet_distance(mu, sigma, mu_w, sigma_w, *, method="eigen"):
    """d² = ‖m − m_w‖² + tr(C + C_w − 2 (C C_w)^½), Heusel et al. 2017, eq. 6; 0 for equal ones.

    mu (d,), sigma (d, d); in float64. The trace of a root is the sum of the roots of the
    eigenvalues, and no root of a matrix is needed: method "eigen". "sqrtm" is the reference:
    scipy's square root of a matrix, the same figure ten times as slowly. Raises BadInput for other
    shapes, values that are not finite, and negative eigenvalues, which no covariance has.
    """
    own, real = gaussian(mu, sigma), gaussian(mu_w, sigma_w)
    if method == "eigen":
        return gaussian_distance(own, real)
    if method != "sqrtm":
        raise ValueError(f'method must be "eigen" or "sqrtm", got {method!r}')
    # tr (C^½ C_w C^½)^½: the eigenvalues of (C C_w)^½, but of a symmetric matrix.
    apart, root = apart_without_cross(own, real), sqrt_covariance(own.sigma)
    cross = np.trace(sqrt_covariance(root @ real.sigma @ root))
    return max(0.0, float(apart - 2 * cross))  # rounding can leave -1e-12 where the truth is 0


class Gaussian(NamedTuple):
    """A mean (d,), a covariance (d, d), and its factor F (d, r): F Fᵀ = sigma, of rank r."""

    mu: np.ndarray
    sigma: np.ndarray
    factor: np.ndarray


def gaussian(mu, sigma):
    """The Gaussian of these statistics; BadInput where they cannot be of any features.

    F is Cholesky's lower triangle, or where sigma is singular V Λ^½ from its eigenvalues, without
    those that rounding made of zeros (where float32 kept sigma: down to −1e-6 of the largest).
    """
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if (mu.shape, sigma.shape) != ((mu.size,), (mu.size, mu.size)):
        raise BadInput(f"mu and sigma must be (d,) and (d, d), got {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput("mu and sigma must be finite numbers")
    if abs(sigma - sigma.T).max(initial=0) > 1e-5 * abs(sigma).max(initial=0):
        raise BadInput("sigma is not symmetric: it is not the covariance of any features")
    try:  # what LAPACK reads by columns is sigma.T: no copies
        return Gaussian(mu, sigma, scipy.linalg.cholesky(sigma.T, check_finite=False).T)
    except scipy.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)  # ascending
    if values[0] < -1e-6 * abs(values[-1]):
        found = f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}"
        raise BadInput(f"sigma has {found}: it is not the covariance of any features")
    keep = values > max(values[0], len(mu) * EPS * values[-1])
    return Gaussian(mu, sigma, vectors[:, keep] * np.sqrt(values[keep]))


def apart_without_cross(own, real):
    """‖m − m_w‖² + tr C + tr C_w of two Gaussians; BadInput where their d differ."""
    if own.mu.shape != real.mu.shape:
        raise BadInput(f"mu must be (d,) with one d, got {own.mu.shape} and {real.mu.shape}")
    traces = (np.vdot(side.factor, side.factor) for side in (own, real))
    return ((own.mu - real.mu) ** 2).sum() + sum(traces)


def gaussian_distance(own, real, rtol=1e-7):
    """d² of two Gaussians, to a relative rtol or much better."""
    apart = apart_without_cross(own, real)
    if own.factor.shape == real.factor.shape == own.sigma.shape:
        # C C_w = L (Lᵀ C_w) has the eigenvalues of Lᵀ C_w L, which LAPACK makes from triangles.
        product = scipy.linalg.lapack.dsygst(real.sigma.T, own.factor.T, itype=2, lower=0)[0]
        values = scipy.linalg.eigvalsh(
            product, lower=False, overwrite_a=True, check_finite=False, driver="evd"
        )
        roots = np.sqrt(values.clip(0))
        # Rounding moves a value by about `noise`, its root doubled by noise / root.
        noise, distance = EPS * values[-1], apart - 2 * roots.sum()
        if np.linalg.norm(noise / np.sqrt(roots**2 + noise)) <= rtol * distance:
            return float(distance)
    # The roots without squares, at up to four times the cost: the singular values of Fᵀ F_w.
    roots = np.linalg.svd(own.factor.T @ real.factor, compute_uv=False)
    return max(0.0, float(apart - 2 * roots.sum()))


def sqrt_covariance(sigma):
    """The symmetric square root of a positive semi-definite matrix (d, d), by scipy's sqrtm.

    It may leave a small imaginary part where an eigenvalue was rounded below zero, and some
    versions answer an exactly singular matrix with NaN: then once more beside it.
    """
    sigma, beside = (sigma + sigma.T) / 2, 1e-14 * np.trace(sigma) / len(sigma)
    for shift in (0.0, beside):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the matrix is singular
            root = scipy.linalg.sqrtm(sigma + shift * np.eye(len(sigma)))
        if np.isfinite(root).all():
            return (root.real + root.real.T) / 2
    raise BadInput('scipy found no square root of this sigma; method "eigen" needs none')


def intra_class(feats, labels, feats_w, labels_w, num_classes):
    """The Fréchet distance within each class, float64 (num_classes,), and their mean.

    Generated rows (N, d) with integer labels (N,) in 0..num_classes-1, and real ones (M, d), (M,).
    A class of fewer than 2 images on a side gets NaN, and is left out of the mean. Raises BadInput
    for other labels, and where no class is left.
    """
    labels, labels_w = np.asarray(labels), np.asarray(labels_w)
    for rows, known in ((feats, labels), (feats_w, labels_w)):
        if known.shape != (len(rows),) or not np.isin(known, range(num_classes)).all():
            wanted = f"expected {len(rows)} labels from 0 to {num_classes - 1}"
            raise BadInput(f"{wanted}, got shape {known.shape}, values {np.unique(known)}")
    distances = np.full(num_classes, np.nan)
    for c in range(num_classes):
        own, real = np.flatnonzero(labels == c), np.flatnonzero(labels_w == c)
        if min(len(own), len(real)) >= 2:
            pair = moments(feats, which=own).mu_sigma(), moments(feats_w, which=real).mu_sigma()
            distances[c] = frechet_distance(*pair[0], *pair[1])
    if np.isnan(distances).all():
        raise BadInput("no class has 2 images on both sides, as the distance within classes needs")
    return distances, float(np.nanmean(distances))


# ------------------------------------------------------------------ the uncertainty of the distance


def frechet_interval(feats, mu_w, sigma_w, *, groups=20, seed=0):
    """How sure the distance of features (N, d) to mu_w (d,), sigma_w (d, d) is. A dictionary:

    frechet           the distance
    standard_error    of it by chance, and of frechet_infinity
    interval          [low, high]: with 95 % confidence, what N such images give on average
    frechet_infinity  what endless images would give: N of them give about a / N too much

    From the distances of all images but one of the groups, drawn at random. Their spread gives the
    error (the jackknife; the reference is taken as given). A line over 1 / N through their mean
    and the distance of all is read off at 0: FID∞ of Chong and Forsyth 2020, from sizes so near to
    N that it hardly bends (Quenouille's correction of a bias). By chance it may lie below 0. Raises
    BadInput for fewer than 4 images a group, and as frechet_distance does.
    """
    if len(feats) < 4 * groups:
        raise BadInput(f"the interval needs at least {4 * groups} images, got {len(feats)}")
    real = gaussian(mu_w, sigma_w)
    order = np.random.default_rng(seed).permutation(len(feats))
    parts = [moments(feats, which=np.sort(part)) for part in np.array_split(order, groups)]
    whole = joined(parts)

    def distance(some):
        return gaussian_distance(gaussian(*some.mu_sigma()), real, rtol=1e-5)

    bar = progress(None, "interval", over=parts, quiet=len(mu_w) < 1024)
    value, left = distance(whole), np.array([distance(whole.without(part)) for part in bar])
    error = float(np.sqrt((groups - 1) * left.var()))
    reach = float(scipy.stats.t.ppf(0.975, groups - 1)) * error
    return dict(
        frechet=value,
        standard_error=error,
        interval=[max(0.0, value - reach), value + reach],
        frechet_infinity=float(groups * value - (groups - 1) * left.mean()),
    )


# ----------------------------------------------------------------- inception score, kernel distance


def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) ‖ p(y))) of logits (N, K): Salimans et al. 2016; from 1 to K.

    The mean over `splits` consecutive parts and, as usual, the standard deviation over them
    (divided by their number); p(y) is each part's own. In float64, from logarithms alone, so that
    no class is too unlikely. Raises BadInput for N < splits and logits that are not finite.
    """
    n, scores = len(logits), []
    if n < splits:
        raise BadInput(f"the inception score in {splits} parts needs {splits} images, got {n}")
    for i in range(splits):
        part = np.asarray(logits[i * n // splits : (i + 1) * n // splits], np.float64)
        if not np.isfinite(part).all():
            raise BadInput("logits must be finite numbers")
        log_p = scipy.special.log_softmax(part, axis=1)  # (n, K)
        log_q = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))  # (K,)
        scores.append(np.exp((np.exp(log_p) * (log_p - log_q)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(feats, feats_w, *, subsets=100, subset_size=1000, seed=0):
    """The unbiased squared MMD with kernel (x·y / d + 1)³: KID, Bińkowski et al. 2018.

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


# ------------------------------------------------------------------------------ nearest neighbours


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
        """Numbers of the real and fake rows of this block in whose ball, of radius², the other is.

        lower (rows, columns) is at most the squared distance; radius (rows, 1) or (1, columns).
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
