"""neighbours.py and manifold.py: the nearest, precision and recall, against float64 and papers."""

from runtime.commandline import BadInput

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.spatial
import torch

from evaluation.manifold import manifold
from evaluation.neighbours import block, neighbours, squares_between


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide no number of rows used here."""
    for module in ("neighbours", "manifold"):
        monkeypatch.setattr(f"evaluation.{module}.CHUNK", 37)


def squares(x, y):
    """Squared distances (N, M) in float64, without a matrix product."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([((row - y) ** 2).sum(1) for row in x])


def definitions(real, fake, k=3, k_dense=5):
    """The four figures as the papers define them; balls closed, then open."""

    def radii(points, k):
        own = squares(points, points)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    between, dense = squares(real, fake), radii(real, k_dense)[:, None]
    return {
        "precision": (between <= radii(real, k)[:, None]).any(0).mean(),
        "recall": (between <= radii(fake, k)[None]).any(1).mean(),
        "density": (between < dense).sum() / (k_dense * len(fake)),
        "coverage": (between < dense).any(1).mean(),
    }


# ------------------------------------------------------------------------------ nearest neighbours


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_neighbours_equal_a_tree_search(small_blocks, dtype):
    rng = np.random.default_rng(0)
    queries, points = (rng.normal(7, 1, (n, 6)).astype(dtype) for n in (101, 230))
    found, number = neighbours(queries, points, k=4)
    expected, which = scipy.spatial.cKDTree(points.astype(np.float64)).query(queries, 4)
    np.testing.assert_allclose(found, expected**2, rtol=1e-12)
    if dtype != np.float16:  # which has ties
        np.testing.assert_array_equal(number, which)


def test_among_themselves_none_is_its_own_neighbour_but_a_duplicate_is(small_blocks):
    rng = np.random.default_rng(1)
    points = rng.normal(3, 1, (150, 5)).astype(np.float32)
    points[[40, 90, 149]] = points[2]  # in other blocks, and in the same one
    points[7] = points[8]
    found, number = neighbours(points, k=3)
    own = squares(points, points)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_allclose(found, np.sort(own, axis=1)[:, :3], rtol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(own, number, 1), found, rtol=1e-12)
    assert (number != np.arange(150)[:, None]).all()
    assert found[2].tolist() == [0, 0, 0] and sorted(number[2]) == [40, 90, 149]


def test_far_from_the_origin_float32_alone_would_be_wrong(small_blocks):
    """Rows of length 10⁴ a distance of 1 apart: the squares agree in the first 8 digits."""
    rng = np.random.default_rng(2)
    x, y = (1000 + 0.1 * rng.normal(size=(n, 100)).astype(np.float32) for n in (90, 140))
    expected, which = scipy.spatial.cKDTree(y.astype(np.float64)).query(x)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    lengths = tensors[0].square().sum(1)[:, None] + tensors[1].square().sum(1)
    naive = (lengths - 2 * tensors[0] @ tensors[1].T).argmin(1).numpy()
    assert (naive != which).mean() > 0.5
    found, number = neighbours(x, y)
    np.testing.assert_array_equal(number[:, 0], which)
    np.testing.assert_allclose(found[:, 0], expected**2, rtol=1e-12)


def test_float64_sorts_what_float32_cannot_tell_apart():
    """Around each query 3 points, 10⁻⁶ of their distance apart, 100 from the centre of all."""
    rng = np.random.default_rng(14)
    queries = 100 * rng.choice([-1.0, 1.0], (50, 4)) + rng.normal(size=(50, 4))
    directions = rng.normal(size=(3, 50, 4))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    points = np.concatenate([queries + (1 + 1e-6 * i) * directions[i] for i in range(3)])
    expected, which = scipy.spatial.cKDTree(points).query(queries)
    found, number = neighbours(queries, points)
    np.testing.assert_array_equal(number[:, 0], which)
    np.testing.assert_allclose(found[:, 0], expected**2, rtol=1e-12)


def test_the_bound_on_rounding_holds():
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(60, 300)) * 10.0 ** rng.integers(-2, 3, 60)[:, None] for _ in "xy")
    x[:20] = y[:20]  # where nothing is left of the digits
    centre = np.zeros(300, np.float32)
    blocks = block(x, 0, centre, "cpu"), block(y, 0, centre, "cpu")
    slack = (2 * 300 + 16) * 2.0**-24
    exact, lengths = squares(x, y), (x**2).sum(1)[:, None] + (y**2).sum(1)
    plain = squares_between(*blocks).double().numpy()
    assert (plain < exact).any() and (plain > exact).any()
    lower = squares_between(*blocks, slack).double().numpy()
    assert (lower <= exact).all() and (exact <= lower + 2 * slack * lengths).all()


# ------------------------------------------------------------- precision, recall, density, coverage


@pytest.mark.parametrize(("n", "m", "d", "offset"), [(200, 150, 2, 0), (90, 210, 64, 1000)])
def test_the_four_figures_equal_their_definitions(small_blocks, n, m, d, offset):
    rng = np.random.default_rng(d)
    real, fake = (offset + rng.normal(size=(size, d)).astype(np.float32) for size in (n, m))
    for k, k_dense in ((3, 5), (5, 3), (1, 1)):
        assert manifold(real, fake * 1.0, k=k, k_dense=k_dense) == pytest.approx(
            definitions(real, fake, k, k_dense), rel=1e-12
        )


@pytest.mark.parametrize("seed", range(4))
def test_ties_and_duplicates_are_decided_as_in_exact_arithmetic(small_blocks, seed):
    """On a grid most points lie on the surface of some ball, and many upon each other."""
    rng = np.random.default_rng(seed)
    real, fake = (rng.integers(0, 6, (n, 3)) / np.float32(4) for n in (120, 90))
    assert manifold(real, fake) == pytest.approx(definitions(real, fake), rel=1e-12)


def test_copies_of_the_real_rows_are_perfect():
    rng = np.random.default_rng(4)
    real = rng.normal(size=(300, 20)).astype(np.float32)
    # In its ball of 5 a row finds its own copy and those of 4 nearer neighbours.
    expected = {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert manifold(real, real[::-1].copy()) == expected


def test_a_lost_mode_costs_recall_and_not_precision():
    rng = np.random.default_rng(5)
    real, fake = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    real[:100] += 50  # a quarter of the real rows are of a kind that is never made
    found = manifold(real, fake)
    whole = manifold(real[100:], fake)
    assert found["precision"] == whole["precision"] > 0.7  # these balls reach none of the fakes
    assert found["recall"] == pytest.approx(0.75 * whole["recall"])
    assert found["coverage"] == pytest.approx(0.75 * whole["coverage"])


def test_outliers_cost_precision_and_not_recall():
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    before, none = manifold(real, fake), np.arange(400) < 120
    fake[none] = rng.normal(size=(120, 8)) * 0.01 + 100  # a tight cluster far from all
    found, inside = manifold(real, fake), manifold(real, fake[~none])
    assert found["precision"] == pytest.approx(0.7 * inside["precision"])
    assert found["density"] == pytest.approx(0.7 * inside["density"])
    assert found["recall"] == inside["recall"] > 0.9 * before["recall"]


def test_density_exceeds_one_where_all_fakes_are_alike():
    rng = np.random.default_rng(7)
    real = rng.normal(size=(500, 4))
    found = manifold(real, 0.05 * rng.normal(size=(500, 4)))  # the most likely point, over and over
    assert found["density"] > 1.5 and found["precision"] == 1
    assert found["coverage"] < 0.2 and found["recall"] < 0.05


def test_equal_distributions_have_density_one_and_the_coverage_of_chance():
    """E[coverage] = 1 − (N − 1)⋯(N − k) / (M + N − 1)⋯(M + N − k): Naeem et al. 2020, section 3."""
    rng, n, m, k = np.random.default_rng(8), 60, 90, 5
    found = [manifold(x[:n], x[n:], k_dense=k) for x in rng.normal(size=(150, n + m, 3))]
    steps = np.arange(1, k + 1)
    expected = 1 - np.prod((n - steps) / (n + m - steps))
    for name, value in (("coverage", expected), ("density", 1.0)):
        got = np.array([f[name] for f in found])
        assert abs(got.mean() - value) < 3 * got.std() / np.sqrt(len(got)), name


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path, repo):
    """All distances of 6,000 to 6,000 rows are 144 MB in float32."""
    rng = np.random.default_rng(9)
    for name in ("real", "fake"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(6_000, 8)).astype(np.float32))
    program = (
        "import resource, numpy as np\nfrom evaluation.manifold import manifold\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "real, fake = (np.load(name, mmap_mode='r') for name in ('real.npy', 'fake.npy'))\n"
        "manifold(real[:2100], fake[:2100])\n"
        "before = peak()\n"
        "print(manifold(real, fake)['density'], peak() - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(repo)}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    density, growth = map(float, run.stdout.split())
    assert density == pytest.approx(1, abs=0.05) and growth < 80


@pytest.mark.parametrize(
    ("real", "fake", "words"),
    [
        (np.zeros((5, 2)), np.zeros((9, 2)), "at least 6 images, got 5"),
        (np.zeros((9, 2)), np.zeros((3, 2)), "at least 4 images, got 3"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "one d"),
        (np.zeros((9, 2)), np.zeros(9), "one d"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "finite"),
        (np.zeros((9, 2)), np.full((9, 2), -np.inf), "finite"),
    ],
)
def test_rows_without_neighbours_are_refused(real, fake, words):
    with pytest.raises(BadInput, match=words):
        manifold(real, fake)
