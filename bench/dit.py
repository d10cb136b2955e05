"""Speed of the diffusion transformer on a CPU, against diffusers' DiTTransformer2DModel.

    python bench/dit.py [--model dit-s/2] [--batch 8 32] [--threads 1 2] [--rounds 9] [--quick]

Both have the same weights and the same latents: 4x16x16, those of a 128x128 image. One call is
timed, fp32, without gradients. Before that, both must give the same numbers; for that diffusers is
given the timestep's frequencies and the epsilon of the published network (see dit.py).

Contenders take turns, so that whatever else the machine does falls on both. A ratio is the median
over the rounds of diffusers' time over ours in the same round: once by the clock on the wall, and
once of the processor time of all threads, which says more on a machine that does other work (set
OMP_WAIT_POLICY=PASSIVE, or waiting counts as work).

--quick takes a network so small that nothing but the working of this file is seen.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the module of its name

from runtime.commandline import BadInput, entry  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench import unet as instruments  # noqa: E402
from dit import DiT, parse_size  # noqa: E402
from tests.cases.dit_of_diffusers import twin  # noqa: E402

SHAPE, CLASSES = (4, 16, 16), 1000
QUICK = dict(hidden_size=32, depth=2, num_heads=2, patch_size=2)
OURS, THEIRS = instruments.OURS, instruments.THEIRS


# --------------------------------------------------------------------------------- the contenders


def random_network(settings, shape=SHAPE, classes=CLASSES, seed=0):
    """A DiT with random weights, none of them zero: those would hide what lies behind them."""
    torch.manual_seed(seed)
    net = DiT(shape, classes, **settings)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


def batch(n, shape=SHAPE, classes=CLASSES):
    """z (n,C,h,w) normal, timesteps (n,), labels (n,), "no label" among them."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, *shape, generator=generator)
    t = torch.randint(1000, (n,), generator=generator)
    return z, t, torch.randint(classes + 1, (n,), generator=generator)


def forwards(ours, theirs, inputs):
    """{name: function of nothing}, after it was seen that both give the same numbers."""
    z, t, y = inputs
    calls = {THEIRS: lambda: theirs(z, t, y).sample, OURS: lambda: ours(z, t, y)}
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    instruments.check_same(f"forward of {len(z)}", calls[OURS](), calls[THEIRS]())
    return calls


# ------------------------------------------------------------------------------------------ main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small network, two rounds")
    parser.add_argument("--model", default="dit-s/2", help="a size of the paper")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="latents in a call")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=0, help="0 is 9, and 2 with --quick")
    args = parser.parse_args(arguments)
    if min(*args.batch, *args.threads) < 1 or args.rounds < 0:
        raise BadInput("--batch and --threads must be positive, --rounds not negative")
    args.rounds = args.rounds or (2 if args.quick else 9)
    return args


def main(arguments=None):
    args = parse(arguments)
    ours = random_network(QUICK if args.quick else parse_size(args.model))
    theirs, before, rows = twin(ours), torch.get_num_threads(), []
    about = {
        "cpu": instruments.cpu_name(),
        "torch": str(torch.__version__),
        "diffusers": importlib.metadata.version("diffusers"),
        "rounds": args.rounds,
        "model": "quick" if args.quick else args.model,
        "shape": SHAPE,
        "parameters": sum(p.numel() for p in ours.parameters()),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{'threads ' + str(threads):26}{instruments.HEADING[26:]}", flush=True)
        for n in args.batch:
            calls = forwards(ours, theirs, batch(n))
            with tqdm(total=2 * args.rounds, leave=False, disable=None) as bar:
                times = instruments.take_turns(calls, args.rounds, bar)
            for name in calls:
                found = instruments.row(f"batch {n}", name, times)
                print(instruments.line(found), flush=True)
                rows.append({"threads": threads, "batch": n, **found})
    torch.set_num_threads(before)
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    entry(main)
