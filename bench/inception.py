"""Speed of the Inception features against pytorch-fid's network, and of the Fréchet distance.

    python bench/inception.py [--images 50] [--size 32] [--threads 1 2] [--rounds 5] [--quick]

Features of uint8 images, resizing included: here, and by `pytorch_fid.inception.InceptionV3` as its
own program runs it (fp32, NCHW, eval, no_grad; 50 images at a time is its default), with the same
seeded random weights. Here the same call also computes the logits. Before that, both must give the
same features. Contenders take turns. Rates and ratios are medians over the rounds, by the clock on
the wall and by processor time, which says more on a machine that does other work.

The distance of two Gaussians in 2048 dimensions: `eval_fid.frechet_distance` against the way of the
first implementations, scipy's square root of the product of the covariances, once (half a minute
on an idle machine).

--quick takes 2 images, one round and 64 dimensions: only the working of this file is seen.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime.commandline import BadInput, entry  # noqa: E402

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench.unet import cpu_name, take_turns  # noqa: E402
from eval_fid import frechet_distance  # noqa: E402
from evaluation.inception_features import Extractor  # noqa: E402
from tests.cases.reference_networks import pytorch_fid_network, random_weights  # noqa: E402

SAME = 1e-4  # relative: how far the features may be apart
OURS, THEIRS = "here", "pytorch-fid"


def contenders(images):
    """{name: function of nothing that gives features (N, 2048)} of uint8 images (N, H, W, 3)."""
    try:
        state = random_weights(0)
        network = pytorch_fid_network(state)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"pytorch-fid, which this compares with, cannot be loaded (no module {error.name}): "
            'type pip install -e ".[test]"'
        ) from None
    extractor = Extractor(state, resize="pytorch-fid")
    pixels = images.permute(0, 3, 1, 2).contiguous().float() / 255  # as its data loader has them

    @torch.no_grad()
    def theirs():
        return network(pixels)[0][:, :, 0, 0]

    calls = {THEIRS: theirs, OURS: lambda: extractor(images)[0]}
    apart = ((calls[OURS]() - calls[THEIRS]()).norm() / calls[THEIRS]().norm()).item()
    if not apart < SAME:
        raise RuntimeError(f"features differ by {apart:.1e}, more than {SAME:.0e}: nothing timed")
    return calls, apart


def measured(calls, rounds):
    """{name: (seconds on the wall, seconds of processors)}, two lists with a number a round."""
    with tqdm(total=rounds * len(calls), leave=False, disable=None) as bar:
        return take_turns(calls, rounds, bar)


def features_table(n, size, threads, rounds):
    """Rows of what was measured, one a number of threads."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, size, size, 3), generator=generator, dtype=torch.uint8)
    calls, apart = contenders(images)
    print(f"features of {n} images {size}x{size}; the two differ by {apart:.1e}")
    print(f"{'threads':>7}{'pytorch-fid':>17}{'here':>17}{'ratio':>8}{'ratio, CPU time':>18}")
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        times = measured(calls, rounds)
        row = {name: n / statistics.median(wall) for name, (wall, _) in times.items()}
        for i, key in enumerate(("ratio", "cpu_ratio")):
            pairs = zip(times[THEIRS][i], times[OURS][i], strict=True)
            row[key] = statistics.median(slow / fast for slow, fast in pairs)
        rates = "".join(f"{row[name]:10.2f} im/s  " for name in (THEIRS, OURS))
        print(f"{count:7}{rates}{row['ratio']:8.2f}{row['cpu_ratio']:18.2f}", flush=True)
        rows.append({"threads": count, **row})
    return {"images": n, "size": size, "differ": apart, "rows": rows}


def gaussians(dim, n=10_000):
    """mu, sigma of two sets of n features whose deviations fall off as those of images do."""
    found = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        mix = rng.normal(size=(dim, dim)) * np.arange(1, dim + 1) ** -0.7
        feats = rng.normal(size=(n, dim)) @ mix.T
        found += [feats.mean(0), np.cov(feats, rowvar=False)]
    return found


def by_square_root(mu, sigma, mu_w, sigma_w):
    """Heusel et al. 2017, eq. 6, as their program computes it."""
    root = scipy.linalg.sqrtm(sigma @ sigma_w)
    return ((mu - mu_w) ** 2).sum() + np.trace(sigma + sigma_w - 2 * root.real)


def distance_table(dim, rounds):
    """The agreement of the two ways, and the seconds that each took."""
    moments, found = gaussians(dim), {}

    def slow():
        found[THEIRS] = by_square_root(*moments)

    def fast():
        found[OURS] = frechet_distance(*moments, method="eigen")

    wall, cpu = time.perf_counter(), time.process_time()
    slow()
    theirs = time.perf_counter() - wall, time.process_time() - cpu
    ours = [statistics.median(seconds) for seconds in measured({OURS: fast}, rounds)[OURS]]
    ratio, cpu_ratio = (slow / fast for slow, fast in zip(theirs, ours, strict=True))
    apart = abs(found[OURS] / found[THEIRS] - 1)
    print(
        f"Fréchet distance in {dim} dimensions: sqrtm(S1 @ S2) {theirs[0]:.2f} s, eigenvalues "
        f"{ours[0]:.2f} s,\nratio {ratio:.1f}, of CPU time {cpu_ratio:.1f}, relative difference "
        f"{apart:.1e}"
    )
    return {
        "dim": dim,
        "sqrtm_s": theirs[0],
        "eigen_s": ours[0],
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "differ": apart,
    }


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50, help="of a call")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, and all there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="see above")
    args = parser.parse_args(arguments)
    args.threads = args.threads or sorted({1, torch.get_num_threads()})
    for name in ("images", "size", "rounds"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.threads) < 1:
        raise BadInput(f"--threads must be at least 1, got {min(args.threads)}")
    return args


def main(arguments=None):
    args = parse(arguments)
    n, rounds, dim = (2, 1, 64) if args.quick else (args.images, args.rounds, 2048)
    about = {"cpu": cpu_name(), "torch": str(torch.__version__), "rounds": rounds}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    found = features_table(n, args.size, args.threads, rounds)
    distance = distance_table(dim, min(rounds, 3))
    print(json.dumps(about | {"features": found, "distance": distance}))


if __name__ == "__main__":
    entry(main)
