"""Are samples copies of training images?

A copy lies nearer to its training image than a new image of the same kind lies to any. How near new
images lie, those tell that were held out from training; so the samples' distances to the training
set are compared with the held-out images' (Meehan, Chaudhuri, Dasgupta 2020, "A Non-Parametric Test
to Detect Data-Copying in Generative Models", section 3.1, in one cell).

Plain distances would accuse everything that is blurred or of low contrast: it lies nearer to all
images. So each distance is divided by that to the second nearest training image (Yoon et al. 2023,
"Diffusion Probabilistic Models Generalize when They Fail to Memorize"): of a copy, the nearest is
far nearer than the next, of a new image hardly. Distances are between pixels in 0..1, averaged down
to at most 16x16, which forgives noise. What it does not see: copies of images that are twice in the
training set, unless they are exact, and copies that are moved by a pixel.

    python eval_fid.py runs/pixel-mnist/samples.npz mnist:test --metrics memorisation
"""

import numpy as np
import scipy.stats
import torch

from evaluation.neighbours import neighbours

SIDE = 16  # pixels, at most, of the images that are compared


class Pixels:
    """Images uint8 (N, H, W, C) as rows (N, d) in 0..1, computed where they are looked at."""

    def __init__(self, images):
        self.images, (h, w, c) = images, images.shape[1:]
        self.size = (min(SIDE, h), min(SIDE, w))
        self.shape = (len(images), self.size[0] * self.size[1] * c)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, which):
        x = torch.from_numpy(np.array(self.images[which])).permute(0, 3, 1, 2) / 255  # (n, C, H, W)
        return torch.nn.functional.interpolate(x, size=self.size, mode="area").flatten(1).numpy()


def nearness(queries, train, *, device="cpu"):
    """(d1 / d2, d1, number), each (Q,), of rows `queries` (Q, d) and `train` (N, d), N ≥ 2.

    d1 and d2 are the distances to the nearest and second nearest rows of `train`, number names the
    nearest. The ratio lies in 0..1; a copy has 0, also of a row that is there twice.
    """
    squares, numbers = neighbours(queries, train, 2, device=device)
    d1, d2 = np.sqrt(squares).T
    return np.divide(d1, d2, out=np.zeros_like(d1), where=d2 > 0), d1, numbers[:, 0]


def memorisation(generated, train, held_out, *, device="cpu"):
    """Do rows `generated` (G, d) copy `train` (N, d), as `held_out` (H, d) cannot? A dictionary:

    copies         how many are at distance 0 of a training row
    near_share     how many are nearer than the nearest 1 % of held-out rows
    near_expected  what share that would be without copying: r / (H + 1), r = H // 100 + 1
    near_p         the chance of so many or more without copying, exact: beta-binomial
    share          P(nearer than a held-out row) + half of P(as near): 0.5 expected, 1 for copies
    z, p           the same as Mann and Whitney's normal deviate (ties corrected), above 0 for
                   copies, and the chance of as high a one without copying
    ratio, index   of each generated row its nearness and the number of its nearest training row
    held_out       the nearness of the held-out rows

    near_share finds a few copies among many new images, share all images that lean towards the
    training set. Raises BadInput as check_rows does, and for fewer than 2 training rows.
    """
    ratio, distance, index = nearness(generated, train, device=device)
    reference, _, _ = nearness(held_out, train, device=device)
    g, h = len(ratio), len(reference)

    # Without copying, all G + H come in random order: how many generated ones come before the r-th
    # held-out one is a Pólya urn's number.
    r = h // 100 + 1
    near = int((ratio < np.sort(reference)[r - 1]).sum())

    both = np.concatenate([ratio, reference])
    ranks = scipy.stats.rankdata(both)
    won = g * h + g * (g + 1) / 2 - ranks[:g].sum()  # pairs in which the generated one is nearer
    _, ties = np.unique(both, return_counts=True)
    ties = (ties.astype(np.float64) ** 3 - ties).sum() / ((g + h) * (g + h - 1.0))
    deviation = np.sqrt(g * h / 12 * (g + h + 1 - ties))
    z = (won - g * h / 2) / deviation if deviation > 0 else 0.0
    return dict(
        copies=int((distance == 0).sum()),
        near_share=near / g,
        near_expected=r / (h + 1),
        near_p=float(scipy.stats.betabinom.sf(near - 1, g, r, h - r + 1)),
        share=float(won / (g * h)),
        z=float(z),
        p=float(scipy.stats.norm.sf(z)),
        ratio=ratio,
        index=index,
        held_out=reference,
    )
