"""Another project's code, run as its own trainer runs it, for `bench/quality.py`.

    python -m bench.peers train --data mnist --dim 28 --mult 1 2 2 --cpu-seconds 600 --out runs/peer
    python -m bench.peers sample --out runs/peer --n 500 --sample-steps 100 --eta 0 --samples S

The peer is `denoising-diffusion-pytorch` from PyPI. Its `Trainer` reads a folder of image files and
counts steps; here a loop with the Trainer's settings reads the same batches as chapter 1 and stops
when its process has used so much CPU time. The settings are those of version 2.3.4: Adam with betas
0.9 and 0.99 at a constant rate (1e-4 unless told), gradients clipped at 1, and ema-pytorch's mean
of the weights with decay 0.995 every 10 steps. `GaussianDiffusion` and `Unet` keep their defaults:
a sigmoid schedule of 1000 steps, the prediction v, self-attention at the lowest resolution and
linear attention at the others. Left out is the Trainer's mirroring of images: no digit is mirrored.
"""

from runtime.commandline import BadInput, at_home, entry
from runtime.files import atomic_write
from runtime.pictures import save_samples, to_uint8
from runtime.processes import progress
from runtime.run import indices

import argparse
import bisect
import contextlib
import functools
import importlib.metadata
import json
import sys
import time
import types
from pathlib import Path

import torch

from image_data import datasets

PACKAGES = ("denoising-diffusion-pytorch", "ema-pytorch")
DIMS = range(8, 130, 2)  # of its Unet; its timestep embedding needs an even number


@contextlib.contextmanager
def torchvision_or_names():
    """Within, `import torchvision` works: the real one, or empty modules of its names.

    The peer imports `torchvision.transforms` and `torchvision.utils` at its top and calls them only
    where its Trainer reads and writes image files, which is not done here. A torchvision that was
    built for another torch fails when it is imported, and none may be installed at all.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    try:
        import torchvision  # noqa: F401

        names = ()
    except (ImportError, RuntimeError):
        modules = [types.ModuleType(name) for name in names]
        modules[0].transforms, modules[0].utils = modules[1:]
        sys.modules.update(zip(names, modules, strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def load():
    """The peer's Unet, GaussianDiffusion and EMA, as attributes. BadInput if not installed."""
    try:
        import accelerate  # noqa: F401  before the names below: it asks where torchvision lies

        with torchvision_or_names():
            from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA
    except ModuleNotFoundError as error:
        raise BadInput(
            f"the peer cannot be loaded (no module {error.name}): "
            "pip install --no-deps denoising-diffusion-pytorch==2.3.4; "
            "pip install ema-pytorch accelerate"
        ) from None
    return types.SimpleNamespace(Unet=Unet, GaussianDiffusion=GaussianDiffusion, EMA=EMA)


def versions():
    """{package: version} of what `load` gives."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def parameters(net):
    """How many numbers a network learns."""
    return sum(p.numel() for p in net.parameters())


def matched_dim(wanted, mult, channels, tolerance=0.05):
    """(dim, parameters) of the peer's Unet nearest to `wanted` parameters, dim even.

    mult: its dim_mults, channels: of the images. Raises BadInput if none is within `tolerance`.
    """
    unet = load().Unet

    @functools.cache
    def size(dim):
        with torch.device("meta"):  # shapes without memory
            return parameters(unet(dim, dim_mults=mult, channels=channels))

    above = bisect.bisect_left(DIMS, wanted, key=size)  # parameters grow with dim
    dim = min(DIMS[max(0, above - 1) : above + 1], key=lambda d: abs(size(d) - wanted))
    if abs(size(dim) / wanted - 1) > tolerance:
        raise BadInput(
            f"no Unet of the peer has {wanted:,} parameters within {tolerance:.0%} (dim {dim} has "
            f"{size(dim):,}); give chapter 1 another --model-channels"
        )
    return dim, size(dim)


def make(dim, mult, shape, **sampling):
    """The peer's GaussianDiffusion around its Unet, for images of `shape` (C,H,W) in [0,1]."""
    peer = load()
    net = peer.Unet(dim, dim_mults=tuple(mult), channels=shape[0])
    return peer.GaussianDiffusion(net, image_size=tuple(shape[1:]), **sampling)


def train(args):
    """Train until this run has used args.cpu_seconds, going on where args.out holds a state.

    Writes state.pt and prints one JSON line: steps done, and CPU seconds used so far.
    """
    ds = datasets.load(args.data, args.data_root, size=args.size)
    shape, path = ds.shape, Path(args.out) / "state.pt"
    torch.manual_seed(args.seed)
    diffusion = make(args.dim, args.mult, shape)
    ema = load().EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=args.lr, betas=(0.9, 0.99))
    step, before = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        ema.load_state_dict(state["ema"])  # holds the trained weights beside their mean
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["cpu_seconds"]
        torch.manual_seed(args.seed + step)
    with progress(None, "training the peer", initial=step) as bar:
        while before + time.process_time() < args.cpu_seconds:
            x, _ = ds.batch(indices(len(ds), args.batch_size, args.seed, step))
            loss = diffusion((x.contiguous() + 1) / 2)  # (B,C,H,W) in [0,1], as its Trainer reads
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    settings = dict(dim=args.dim, mult=list(args.mult), shape=list(shape))
    done = dict(step=step, cpu_seconds=before + time.process_time())
    with atomic_write(path) as temporary:
        state = dict(ema=ema.state_dict(), optimizer=optimizer.state_dict(), settings=settings)
        torch.save(state | done, temporary)
    print(json.dumps(done))


def sample(args):
    """Draw args.n images with the EMA weights of args.out, into the folder args.samples.

    With eta 1 its sampler is the ancestral one of args.sample_steps steps, with 0 DDIM.
    """
    state = torch.load(Path(args.out) / "state.pt", weights_only=True)
    sampling = dict(sampling_timesteps=args.sample_steps, ddim_sampling_eta=args.eta)
    ema = load().EMA(make(**state["settings"], **sampling), beta=0.995, update_every=10)
    ema.load_state_dict(state["ema"])
    ema.ema_model.eval()
    torch.manual_seed(args.seed)
    images = []
    for start in range(0, args.n, args.batch_size):
        x = ema.ema_model.sample(batch_size=min(args.batch_size, args.n - start))
        images.append(to_uint8(x * 2 - 1))  # (B,H,W,C)
    save_samples(args.samples, torch.cat(images), None, 10)


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    for name, run in (("train", train), ("sample", sample)):
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0])
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=at_home, required=True, help="folder of state.pt")
        sub.add_argument("--batch-size", type=int, default=64)
        sub.add_argument("--seed", type=int, default=0)
    training, sampling = commands.choices["train"], commands.choices["sample"]
    training.add_argument("--data", type=at_home, default="mnist", help="data set, folder or zip")
    training.add_argument("--data-root", type=at_home, default="data")
    training.add_argument("--size", type=int, default=0, help="resize images to this; 0 keeps them")
    training.add_argument("--dim", type=int, required=True, help="channels of its Unet")
    training.add_argument("--mult", type=int, nargs="+", required=True, help="its dim_mults")
    training.add_argument("--lr", type=float, default=1e-4)
    training.add_argument("--cpu-seconds", type=float, required=True, help="of this run in all")
    sampling.add_argument("--n", type=int, default=100)
    sampling.add_argument("--sample-steps", type=int, default=100, help="network evaluations")
    sampling.add_argument("--eta", type=float, default=0.0)
    sampling.add_argument(
        "--samples", type=at_home, required=True, help="folder of samples.npz and .png"
    )
    return p


def main():
    args = parser().parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    entry(main)
