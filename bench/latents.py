"""What is the latent cache worth? Training steps from it, and from images encoded on the fly.

    python bench/latents.py [--model dit-s/2] [--batch 16] [--rounds 5] [--threads 2]

Stable Diffusion's autoencoder (f8, 84 M parameters, random weights) and a denoiser on its latents
of 128x128 images, 16x16x4. Both steps do what ldm_cfg.py and dit.py do: latents from mean and
log-variance, loss, backward pass, Adam. The one reads mean and log-variance from a memory map, the
other encodes the images, both after they are seen to give the same loss. Interleaved, medians of
paired ratios.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where a file would hide the module `data`

from runtime.commandline import entry  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import ldm_cfg  # noqa: E402
from bench import unet as instruments  # noqa: E402
from image_data.latents import Latents  # noqa: E402
from kernels import gaussian  # noqa: E402
from networks.kl_autoencoder import KLVAE  # noqa: E402

CACHED, FLY = instruments.OURS, instruments.THEIRS  # the ratio is that of the first to the second
NAMES = {CACHED: "from the cache", FLY: "encoded on the fly"}


def make_net(model, z_shape, classes):
    """The denoiser of ldm_cfg.py or dit.py that has this name there."""
    if model.startswith("dit"):
        from dit import DiT, parse_size

        return DiT(z_shape, classes, **parse_size(model))
    return ldm_cfg.make_net(ldm_cfg.Config(model=model), z_shape, classes)


def make_steps(model, ae, images, kept):
    """{name: a training step on these images as a function of nothing, which gives its loss}."""
    alpha_bar = ldm_cfg.alpha_bar_of(ldm_cfg.Config())
    count, shape = len(images), (len(images), *kept.z_shape)
    seeds, rows, t = torch.arange(count), np.arange(count), torch.arange(count) * 900 // count
    noise, eps = (gaussian(shape, seeds, step, "cpu") for step in (0, 1))

    def draw(mean, log_var):
        return mean + (0.5 * log_var).exp() * noise

    def read():
        return draw(*kept.batch(rows)[0].chunk(2, dim=1))

    @torch.no_grad()
    def encode():
        return draw(*ae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1))

    def step_of(latents):
        torch.manual_seed(0)
        net = make_net(model, kept.z_shape, 100)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

        def step():
            loss = ldm_cfg.simple_loss(net, latents(), t, eps, alpha_bar, t % 100).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    return {CACHED: step_of(read), FLY: step_of(encode)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-s/2", help="dit-s/2, ..., or ldm_cfg.py's")
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--ae-width", type=int, default=128, help="128: Stable Diffusion's")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ae = KLVAE(model_channels=args.ae_width).eval().requires_grad_(False)
    ae = ae.to(memory_format=torch.channels_last)
    shape = (args.batch, args.size, args.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        mean, log_var = ae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        np.save(f"{folder}/moments.npy", torch.cat([mean, log_var], 1).permute(0, 2, 3, 1))
        kept = Latents(
            name="random",
            moments=np.load(f"{folder}/moments.npy", mmap_mode="r"),
            labels=np.zeros(args.batch, np.int64),
            class_names=(),
            shape=(3, args.size, args.size),
            z_shape=tuple(mean.shape[1:]),
            scale=1.0,
            key="random",
        )
        with torch.enable_grad():
            steps = make_steps(args.model, ae, images, kept)
            losses = {name: step() for name, step in steps.items()}
            if abs(losses[CACHED] - losses[FLY]) > 1e-4 * losses[FLY]:
                raise RuntimeError(f"the two do not train alike: {losses}")
            with tqdm(total=2 * args.rounds, leave=False, disable=None) as bar:
                times = instruments.take_turns(steps, args.rounds, bar)
    about = {"cpu": instruments.cpu_name(), "torch": str(torch.__version__), **vars(args)}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = [instruments.row("step", name, times) for name in steps]
    for row in rows:
        rate = 1e3 * args.batch / row["ms"]
        print(f"{NAMES[row['name']]:20}{rate:8.2f} images/s, ratio {row['ratio']:.2f}")
        row |= {"name": NAMES[row["name"]], "images_per_s": rate}
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    entry(main)
