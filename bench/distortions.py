"""Does the Fréchet distance rise when images get worse? Six distortions, four levels of each.

    python bench/distortions.py --data cifar10 --other mnist [--n 10000] [--out runs/distortions]

The study of Heusel et al. 2017 (figure 3 and the appendix that explains it). Held-out images are
distorted more and more, and compared with the training images, undistorted. The distortions and
their strengths are the paper's, with one gentler level before its three:

    noise          (1 − α) X + α N, with N Gaussian over the whole range of gray
    blur           a Gaussian kernel of standard deviation α pixels
    rectangles     five black ones at random places, each α as high and as wide as the image
    swirl          every point turned around the centre by α exp(−5 r / (ρ ln 2)), ρ = 25 pixels
    salt, pepper   a share α of the pixels white or black, each with probability a half
    contamination  a share α of the images replaced by those of another data set, --other

All levels of a distortion take the same random numbers, so a higher one only goes further: the same
rectangles, larger. Written into --out: distortions.png and distortions.json. Printed: a table with
the kernel distance (KID) beside the Fréchet distance, and the JSON line. The exit status is 1, and
the curve is named, if a level is not farther away than the level before it.

With the default features, those of a classifier trained on the data set itself, this takes about
two minutes of one core. `--features inception --weights F` takes the FID Inception network: some
0.2 s an image and level on one core, so choose --n and --n-reference by that, or a GPU.
"""

import argparse
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime.commandline import at_home, default_gpus, entry  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.pictures import tile  # noqa: E402
from runtime.processes import progress  # noqa: E402

import numpy as np  # noqa: E402
import scipy.ndimage  # noqa: E402

from eval_fid import frechet_distance, statistics  # noqa: E402
from evaluation import features, image_sets, inception_features  # noqa: E402
from evaluation.classifier import classifier_of  # noqa: E402
from evaluation.kid import kernel_distance  # noqa: E402
from image_data import datasets  # noqa: E402

CHUNK = 500  # images distorted at a time
BATCH = 100  # images at a time when features are computed
SHOWN = 1139  # the image that the figure shows: of CIFAR-10 a yellow car
KERNEL_SUBSETS = 20  # of the kernel distance

# -------------------------------------------------------------------------------- distortions
# Each takes images uint8 (N, H, W, C), a level α, a generator, and images of another set (N, H, W,
# C), which only contamination looks at. It returns new uint8 images; at α = 0 they are the same.


def to_uint8(x):
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def noise(images, alpha, rng, others=None):
    """(1 − α) X + α N with N ~ Normal(127.5, 31.875²): four deviations reach 0 and 255."""
    field = 127.5 * (1 + rng.standard_normal(images.shape, np.float32) / 4)
    return to_uint8((1 - alpha) * images + alpha * field)


def blur(images, alpha, rng, others=None):
    """Convolved with a Gaussian of standard deviation α pixels; mirrored at the border."""
    return to_uint8(scipy.ndimage.gaussian_filter(images.astype(np.float32), (0, alpha, alpha, 0)))


def rectangles(images, alpha, rng, others=None):
    """Five black rectangles of α H × α W pixels, each wholly inside, at places of equal chance."""
    (n, height, width, _), places = images.shape, rng.random((len(images), 5, 2))
    images, h, w = images.copy(), round(alpha * height), round(alpha * width)
    tops, lefts = np.floor(places * (height - h + 1, width - w + 1)).astype(int).transpose(2, 0, 1)
    for i in range(n):
        for top, left in zip(tops[i], lefts[i], strict=True):
            images[i, top : top + h, left : left + w] = 0
    return images


def swirl(images, alpha, rng, others=None, rho=25.0):
    """The point at polar (r, θ) around the centre shows what was at (r, θ + α exp(−5r/(ρ ln 2))).

    Bilinear between pixels; the edge is repeated outside.
    """
    height, width = images.shape[1:3]
    cy, cx = (height - 1) / 2, (width - 1) / 2
    dy, dx = np.mgrid[:height, :width] - np.array([cy, cx])[:, None, None]  # each (H, W)
    r, theta = np.hypot(dy, dx), np.arctan2(dy, dx)
    theta = theta + alpha * np.exp(-5 * r / (rho * np.log(2)))
    y = np.clip(cy + r * np.sin(theta), 0, height - 1)
    x = np.clip(cx + r * np.cos(theta), 0, width - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    low, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, along = (y - top)[..., None], (x - left)[..., None]  # (H, W, 1), in 0..1
    above = (1 - along) * images[:, top, left] + along * images[:, top, right]  # (N, H, W, C)
    below = (1 - along) * images[:, low, left] + along * images[:, low, right]
    return to_uint8((1 - down) * above + down * below)


def salt_and_pepper(images, alpha, rng, others=None):
    """Each pixel, in all channels, is hit with probability α: then it is 0 or 255."""
    hit, white = rng.random((2, *images.shape[:3]), np.float32)
    colour = np.where(white < 0.5, 0, 255).astype(np.uint8)
    return np.where((hit < alpha)[..., None], colour[..., None], images)


def contamination(images, alpha, rng, others=None):
    """round(α N) of the images, chosen at random, replaced by those of the other set."""
    replaced = rng.permutation(len(images))[: round(alpha * len(images))]
    images = images.copy()
    images[replaced] = others[replaced]
    return images


STUDY = {  # name: (function, levels, what α is)
    "noise": (noise, (0, 0.1, 0.25, 0.5, 0.75), "share of Gaussian noise"),
    "blur": (blur, (0, 0.5, 1, 2, 4), "Gaussian blur, pixels"),
    "rectangles": (rectangles, (0, 0.125, 0.25, 0.5, 0.75), "side of five black rectangles"),
    "swirl": (swirl, (0, 0.5, 1, 2, 4), "swirl, radians"),
    "salt and pepper": (salt_and_pepper, (0, 0.05, 0.1, 0.2, 0.3), "share of salt and pepper"),
    "contamination": (contamination, (0, 0.125, 0.25, 0.5, 0.75), "share of other images"),
}


# -------------------------------------------------------------------------------------- study


def measure(images, others, extractor, reference, seed=0, names=tuple(STUDY)):
    """{name: {'alpha', 'frechet', 'kid', 'kid_error'}}: a figure for each level, in order.

    images, others: uint8 (N, H, W, C); extractor: as features.extract takes it; reference:
    features (M, d) of the undistorted set that all are compared with.
    """
    goal, curves = statistics(reference), {}
    points = [(name, alpha) for name in names for alpha in STUDY[name][1]]
    for name, alpha in progress(None, "levels", over=points):
        feats = []
        for start in range(0, len(images), CHUNK):
            some = slice(start, start + CHUNK)
            rng = np.random.default_rng([seed, list(STUDY).index(name), start])
            distorted = STUDY[name][0](images[some], alpha, rng, others[some])
            feats.append(features.extract(extractor, distorted, BATCH)[0])
        feats = np.concatenate(feats)
        kid, error = kernel_distance(feats, reference, subsets=KERNEL_SUBSETS, seed=seed)
        curve = curves.setdefault(name, {"alpha": [], "frechet": [], "kid": [], "kid_error": []})
        curve["alpha"].append(alpha)
        curve["frechet"].append(frechet_distance(*statistics(feats), *goal))
        curve["kid"].append(kid)
        curve["kid_error"].append(error)
    return curves


def falls(curves):
    """One line for each level whose Fréchet distance is not above that of the level before."""
    lines = []
    for name, curve in curves.items():
        steps = list(zip(curve["alpha"], curve["frechet"], strict=True))
        for (a, less), (b, more) in zip(steps, steps[1:], strict=False):
            if not more > less:
                lines.append(f"{name}: {more:.4f} at {b} is not above {less:.4f} at {a}")
    return lines


def table(curves):
    """Lines of text: three for each distortion, its levels and both distances."""
    head = ["distortion", "", "level 0", *(f"level {i}" for i in range(1, 5))]
    lines = [head]
    for name, curve in curves.items():
        lines.append([name, "α", *map(str, curve["alpha"])])
        lines.append(["", "Fréchet", *(f"{v:.3f}" for v in curve["frechet"])])
        kids = zip(curve["kid"], curve["kid_error"], strict=True)
        lines.append(["", "KID", *(f"{kid:.4f} ± {error:.4f}" for kid, error in kids)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in lines]


# ------------------------------------------------------------------------------------- figure


def tiles(name, images, others, seed=0):
    """One picture (H, W, C) for each level: the same image distorted, or 16 of them for shares."""
    distort, alphas, _ = STUDY[name]
    mixed = name == "contamination"
    some = np.linspace(0, len(images) - 1, 16).astype(int) if mixed else [SHOWN % len(images)]
    shown = []
    for alpha in alphas:
        rng = np.random.default_rng([seed, 1])
        shown.append(tile(distort(images[some], alpha, rng, others[some]), pad=0))
    return shown


def draw(path, curves, images, others, title):
    """The curves in six panels, and under each what the images look like at its levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    outer = figure.add_gridspec(2, 3, hspace=0.05, wspace=0.04)
    for place, (name, curve) in zip(outer, curves.items(), strict=True):
        levels = range(len(curve["alpha"]))
        upper, lower = place.subgridspec(2, 1, height_ratios=(3.2, 1), hspace=0).subplots()
        upper.plot(levels, curve["frechet"], marker="o", color="C0")
        upper.set_title(STUDY[name][2], fontsize=11)
        upper.set_xticks(levels, [f"{alpha:g}" for alpha in curve["alpha"]])
        upper.set(xlim=(-0.5, len(levels) - 0.5), ylim=(0, None))
        upper.grid(alpha=0.3)
        for level, picture in enumerate(tiles(name, images, others)):
            extent = (level - 0.47, level + 0.47, 0, 0.94)
            lower.imshow(picture.squeeze(), extent=extent, cmap="gray", vmin=0, vmax=255)
        lower.set(xlim=(-0.5, len(levels) - 0.5), ylim=(0, 0.94), anchor="N")
        lower.axis("off")
    figure.supylabel("Fréchet distance to the training images", fontsize=11)
    figure.suptitle(title, fontsize=11)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------------- main


def parse(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--data",
        type=at_home,
        default="cifar10",
        help="labelled data set, or a folder or zip of one",
    )
    p.add_argument(
        "--other", type=at_home, default="mnist", help="data set that contaminates it, likewise"
    )
    p.add_argument("--data-root", type=at_home, default="data", help="where data sets are kept")
    p.add_argument("--size", type=int, default=32, help="side of the images of both")
    p.add_argument("--n", type=int, default=10_000, help="held-out images; 0: all")
    p.add_argument("--n-reference", type=int, default=0, help="training images; 0: all")
    p.add_argument("--features", choices=("classifier", "inception"), default="classifier")
    p.add_argument("--weights", type=at_home, help="the FID Inception network's file")
    p.add_argument("--resize", default="pytorch-fid", help="its protocol of resizing")
    p.add_argument("--gpus", type=int, choices=(0, 1), default=default_gpus())
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=at_home, default="runs/distortions")
    args = p.parse_args(arguments)
    if (args.features == "inception") != bool(args.weights):
        p.error("--features inception and --weights FILE go together")
    for name in ("n", "n_reference"):
        if getattr(args, name) < 0 or getattr(args, name) == 1:
            p.error(f"--{name.replace('_', '-')} must be 0 (all) or at least 2")
    return args


def same_channels(images, channels):
    """Gray images in three channels, or the mean of the channels of coloured ones."""
    if images.shape[3] == channels:
        return images
    return np.repeat(to_uint8(images.mean(3, keepdims=True)), channels, axis=3)


def draw_n(ds, n, seed):
    """n images of a data set, or all for 0, in the order of its file. BadInput for too few."""
    return ds.images[image_sets.drawn(n, len(ds), seed, ds.name)]


def extractor(args):
    """The network whose features are compared: images uint8 (B, H, W, C) -> features, logits."""
    device = "cuda" if args.gpus else "cpu"
    if args.features == "inception":
        return inception_features.load(args.weights, args.data_root, args.resize, device=device)
    return classifier_of(args.data, args.data_root, size=args.size or 0, device=device)[0]


def main(arguments=None):
    args = parse(arguments)
    train, test = (
        datasets.load(args.data, args.data_root, split=split, size=args.size)
        for split in ("train", "test")
    )
    images = draw_n(test, args.n, args.seed)
    others = draw_n(
        datasets.load(args.other, args.data_root, size=args.size), len(images), args.seed
    )
    others = same_channels(others, images.shape[3])
    net = extractor(args)
    reference, _ = features.extract(net, draw_n(train, args.n_reference, args.seed), BATCH)
    curves = measure(images, others, net, reference, args.seed)
    title = f"{train.name}: {len(images):,} held-out images against {len(reference):,} for training"
    out = Path(args.out)
    draw(out / "distortions.png", curves, images, others, title)
    wrong = falls(curves)
    line = json.dumps(
        {
            "data": train.name,
            "other": Path(args.other).stem,
            "n": len(images),
            "n_reference": len(reference),
            "seed": args.seed,
            "features": net.protocol,
            "feature_hash": net.feature_hash,
            "curves": curves,
            "rises": not wrong,
        }
    )
    with atomic_write(out / "distortions.json") as temporary:
        temporary.write_text(line + "\n")
    print("\n".join([*table(curves), title, net.protocol, str(out / "distortions.png"), line]))
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    entry(lambda: sys.exit(main()))
