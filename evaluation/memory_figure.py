"""The picture of a test for memorisation: the closest pairs, and all distances in a histogram."""

from runtime.files import atomic_write

import numpy as np

COLUMNS = 6  # pairs beside one another


def side_by_side(left, right, gap=1):
    """Two images uint8 (H, W, C) as one RGB picture (H, 2 W + gap, 3), a white line between."""
    left, right = (np.broadcast_to(image, (*image.shape[:2], 3)) for image in (left, right))
    line = np.full((len(left), gap, 3), 255, np.uint8)
    return np.concatenate([left, line, right], axis=1)


def save_pairs(path, generated, train, distances, indices, held_out, *, count=24, unit="distance"):
    """Write a PNG: the `count` samples that lie nearest to a training image, each beside it.

    generated, train  uint8 (N, H, W, C) and (M, H, W, C), C 1 or 3; train may be a memory map
    distances         (N,), of each sample to its nearest training image; `unit` says what they are
    indices           (N,) integers: which training image that is
    held_out          (K,), the same distances of real images that were not trained on

    The pairs are in rising order, each with its distance above. Beside them the distribution of
    the samples' distances and of the held-out images': of a generator that does not copy, the two
    agree; copies stand out on the left.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nearest = np.argsort(distances, kind="stable")[:count]
    rows = -(-len(nearest) // COLUMNS)
    h, w = generated.shape[1:3]
    height = max(3.0, rows * (1.05 * h / (2 * w + 1) + 0.22) + 0.5)
    figure = plt.figure(figsize=(10.5, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    axes = left.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, i in zip(axes, nearest, strict=False):
        axis.imshow(side_by_side(generated[i], train[indices[i]]))
        axis.set_title(f"{distances[i]:#.3g}", fontsize=9, pad=2)
    for axis in axes:
        axis.axis("off")
    left.suptitle("sample | nearest training image, the closest pairs", fontsize=10)

    axis = right.subplots()
    edges = np.histogram_bin_edges(np.concatenate([distances, held_out]), bins=40)
    for values, name, look in (
        (held_out, "held-out", dict(fill=True, color="C0", alpha=0.4)),
        (distances, "samples", dict(color="C3", linewidth=1.5)),
    ):
        shares = np.histogram(values, edges)[0] / len(values)
        axis.stairs(shares, edges, label=f"{len(values):,} {name}", **look)
    axis.set_xlabel(f"{unit} to the nearest")
    axis.set_ylabel("share of images")
    axis.set(ylim=(0, None))
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
