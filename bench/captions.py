"""A tiny Stable Diffusion, trained here on pictures with captions: is what a prompt says drawn?

    python bench/captions.py                 20 minutes of two CPU cores
    python stable_diffusion.py --weights runs/captions/captions.safetensors --size 64 \\
        --vocabulary runs/captions/vocabulary.txt.gz --prompt "a red star on a blue field"

Pictures of 64x64 show one of four shapes in one of six colours on a ground of another colour, at
random places and sizes: 120 captions such as "a red star on a blue field". Twenty of them are held
out, so that a network draws them only if it has understood their words one by one: each two of the
three words are seen together, never all three. All parts of Stable Diffusion are trained, smaller:
its autoencoder (autoencoder.py), then the U-Net together with the text encoder, by L_simple on its
schedule, one caption in ten replaced by the empty sentence. They are written as CompVis's files
are, read again as stable_diffusion.py reads them, and scored: the colour of the ground is that of
the picture's border, the shape is where the picture differs most from it, and which shape that is
says a classifier of such places, a quarter as large, trained on the same pictures, half of them
through the autoencoder.

In --out: the data, both runs, captions.safetensors, vocabulary.txt.gz, captions.md, the table that
is printed, and captions.png, seven pictures of each of its rows of prompts. Killed and started
again it goes on where it stopped.
"""

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime import commandline as cli  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.pictures import save_grid, to_uint8  # noqa: E402
from runtime.processes import launch  # noqa: E402
from runtime.run import Run  # noqa: E402
from runtime.scores import wilson  # noqa: E402

import subprocess  # noqa: E402
from dataclasses import dataclass, fields, replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import autoencoder  # noqa: E402
import ldm_cfg  # noqa: E402
from bench import caption_pictures as pictures  # noqa: E402
from evaluation.classifier import train_classifier  # noqa: E402
from image_data import datasets  # noqa: E402
from image_data.batches import Dataset, spaced  # noqa: E402
from networks.clip_text import CLIPText  # noqa: E402
from networks.clip_tokens import Tokenizer  # noqa: E402
from networks.published import stable_diffusion as published  # noqa: E402
from networks.sd_unet import LatentUNet  # noqa: E402

CROP = 32  # side of what the autoencoder is shown


@dataclass
class Config(cli.RunConfig):
    out: str = "runs/captions"  # folder for all that is made
    images: int = 10_000  # training pictures; half as many more are drawn for tests
    steps: int = 2000  # optimizer steps of U-Net and text encoder
    ema: tuple[float, ...] = (0.995,)
    warmup: int = 100  # steps over which a learning rate rises from zero
    ae_steps: int = 3000  # optimizer steps of the autoencoder, on 8 crops each
    n: int = 200  # pictures of each row of the table

    FREE = cli.RunConfig.FREE | {"n"}


OWN = ("data", "data_root", "size", "classes", "dry_run")  # settings that are not the user's here


class TextToImage(nn.Module):
    """net(z, t, y) -> like z: a U-Net that sees sentence y of tokens (K+1,77), of which the last is
    empty; y (B,) int64."""

    def __init__(self, tokens, vocab_size):
        super().__init__()
        self.null = len(tokens) - 1
        self.register_buffer("tokens", tokens)
        self.text = CLIPText(vocab_size, width=64, layers=2, heads=1, hidden=256)
        sizes = {"model_channels": 64, "channel_mult": (1, 2), "num_res_blocks": 1}
        sizes |= {"attention_levels": (0, 1), "context_dim": 64, "norm_groups": 32}
        self.unet = LatentUNet(4, None, num_heads=8, **sizes)

    def forward(self, z, t, y):
        return self.unet(z, t, None, self.text(self.tokens[y]))


def train_autoencoder(cfg, world, ds):
    """Stable Diffusion's autoencoder, narrower, frozen: trained on crops.

    Residual branches and noise begin small, so that it sees colours long before shapes.
    """
    shared = {field.name: getattr(cfg, field.name) for field in fields(cli.RunConfig)}
    shared |= {"out": str(Path(cfg.out, "autoencoder")), "steps": cfg.ae_steps, "lr": 2e-3}
    shared |= {"batch_size": 8, "ema": (), "sample_every": 0}
    sizes = {"ae": "ldm", "model_channels": 64, "channel_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    first = autoencoder.Config(**shared, **sizes, kl_weight=1e-3)
    ae = autoencoder.make_autoencoder(first, ds.shape)
    for name, p in ae.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            nn.init.zeros_(p)
    nn.init.constant_(ae.quant_conv.bias[ae.z_channels :], -4.0)  # log-variance
    ae = ae.to(world.device, memory_format=torch.channels_last)
    run = Run(first, world, ds, net=ae, optimizer=world.adam(first.lr))
    run.say(f"autoencoder from step {run.first} of {first.steps}")
    for step in run.steps():
        for part in run.parts(step):
            i, j = run.rng(step, "crop").integers(pictures.SIDE - CROP + 1, size=2)
            x = run.images(part)[0][:, :, i : i + CROP, j : j + CROP]  # (b,3,32,32)
            noise = run.noise(part, (len(x), ae.z_channels, CROP // 8, CROP // 8), "posterior")
            terms, *_ = autoencoder.loss_terms(first, ae, run.model, x, noise, None)
            run.backward(terms.pop("loss"), **terms)
        run.descend()
    ae.eval().requires_grad_(False)
    autoencoder.report(ae, first, world, run.folder)  # of whole pictures
    return ae


def train(cfg, world):
    """All parts, trained and written; then the first process scores them."""
    ds = datasets.of(cfg)
    torch.manual_seed(cfg.seed)
    ae = train_autoencoder(cfg, world, ds)
    latents = ldm_cfg.encode(cfg, world, ds, ae)
    weights, vocabulary = Path(cfg.out, "captions.safetensors"), Path(cfg.out, "vocabulary.txt.gz")
    if world.is_main:
        published.write_vocabulary(vocabulary, pictures.WORDS)
    world.barrier()
    tokenizer = Tokenizer.of_file(vocabulary)
    torch.manual_seed(cfg.seed)
    net = TextToImage(tokenizer([*ds.class_names, ""]), len(tokenizer))
    net = net.to(world.device, memory_format=torch.channels_last)
    run = ldm_cfg.latent_run(cfg, world, latents, net, ae)
    run.say(f"U-Net and text encoder from step {run.first} of {cfg.steps}")
    alpha_bar = published.published_alpha_bar().to(world.device)
    for step in run.steps():
        for part in run.parts(step):
            z0, y = ldm_cfg.draw_latents(run, part)  # (b,4,8,8), (b,)
            y = run.hide(part, y, 0.1)
            t, eps = run.uniform(part, len(alpha_bar)), run.noise(part, z0.shape)
            losses = ldm_cfg.simple_loss(run.model, z0, t, eps, alpha_bar, y)
            run.backward(losses, t / len(alpha_bar))
        run.descend()
    if world.is_main:
        published.write_weights(weights, run.ema.unet, run.ema.text, ae, latents.scale)
        model = ["--weights", str(weights), "--vocabulary", str(vocabulary)]
        scores(cfg, ds, ae, model)


def row_of(name, w, images, meanings, classifier):
    """A row of the table: how many of the pictures (N,64,64,3) show what meanings (N,3) say."""
    colour, ground, places = pictures.read(images)
    x = torch.from_numpy(places).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        shape = classifier(x.to(classifier.head.weight.device)).argmax(1).cpu().numpy()
    right = np.stack([colour, shape, ground], axis=1) == meanings  # (N,3)
    low, high = wilson(right.all(1).mean(), len(right))
    told = [f"{share:.1%}" for share in [*right.mean(0), right.all(1).mean()]]
    return [name, w, str(len(right)), *told, f"{low:.1%} ... {high:.1%}"]


def drawn_by_chapter(folder, model, w, prompts, n, gpus):
    """(N,64,64,3) uint8 that stable_diffusion.py draws, n of each prompt, kept in the folder."""
    command = [sys.executable, REPO / "stable_diffusion.py", *model, "--out", folder, "--n", n]
    command += ["--prompt", *prompts, "--guidance", w, "--sampler", "dpmpp", "--steps", 15]
    command += ["--size", pictures.SIDE, "--batch-size", 50, "--gpus", gpus]
    if subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL).returncode:
        raise cli.BadInput("stable_diffusion.py failed; see above")
    return np.load(folder / "samples.npz")["arr_0"]


def train_shapes(cfg, ds, ae, shapes):
    """A classifier of what read() makes of pictures, half of them through the autoencoder.

    shapes (N,): of the pictures of ds. A decoder rounds edges off: who has seen only sharp ones
    calls its stars squares, now and then.
    """
    chosen, device = spaced(len(ds), 2000), ae.quant_conv.weight.device
    found = [ds.images[chosen]]
    for rows in np.array_split(chosen, -(-len(chosen) // 100)):
        found += [to_uint8(autoencoder.reconstruct(ae, ds, rows, device)[1]).numpy()]
    places, labels = pictures.read(np.concatenate(found))[2], np.tile(shapes[chosen], 2)
    places = Dataset("shape", places, labels, tuple(pictures.SHAPES), {})
    return train_classifier(places, min(400, cfg.steps), cfg.seed, device)


def scores(cfg, ds, ae, model):
    """captions.md, which is printed, too, and captions.png, seven of what was drawn for each row.

    model: flags of stable_diffusion.py that name it.
    """
    known, test = pictures.captions(), datasets.load(cfg.data, cfg.data_root, split="test")
    meanings = np.array([known[name] for name in ds.class_names])  # (120,3)
    classifier = train_shapes(cfg, ds, ae, meanings[ds.labels, 1])
    packed = np.load(Path(cfg.out, "autoencoder", "reconstructions.npz"))
    rows = [row_of("drawn for tests", "", test.images[:], meanings[test.labels], classifier)]
    pair = packed["arr_0"], meanings[packed["arr_1"]]
    rows += [row_of("the same through the autoencoder", "", *pair, classifier)]
    shown = []
    for name, held in (("seen", False), ("held out", True)):
        chosen = {caption: m for caption, m in known.items() if pictures.is_held_out(m) == held}
        n = max(1, cfg.n // len(chosen))
        for w in ("0", "2", "6.5"):
            folder = Path(cfg.out, f"{name} {w}".replace(" ", "-"))
            images = drawn_by_chapter(folder, model, w, list(chosen), n, cfg.gpus)
            asked = np.repeat(list(chosen.values()), n, axis=0)
            rows += [row_of(f"captions {name}", w, images, asked, classifier)]
            shown += [images[np.linspace(0, len(images) - 1, 7).astype(int)]]
    save_grid(np.concatenate(shown), Path(cfg.out, "captions.png"), 7)
    head = ["pictures", "w", "N", "colour", "shape", "ground", "all three", "95 %"]
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] + 7 * ["--:"], *rows]]
    with atomic_write(Path(cfg.out, "captions.md")) as path:
        path.write_text("\n".join(lines) + "\n")
    print(*lines, "", f"to draw: python stable_diffusion.py {' '.join(model)} --size 64", sep="\n")


def main():
    cfg = cli.parse(Config, __doc__)
    cfg = cli.smoke(cfg, images=240, ae_steps=2, n=20, out="runs/smoke-captions")
    if typed := set(OWN).difference(cli.not_given(cfg, OWN)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(typed))
        raise cli.BadInput(f"{flags}: this command draws its own pictures; leave it out")
    cli.check_run(cfg)
    cli.check_ranges(cfg, positive="images ae_steps n")
    data = Path(cfg.out, f"captions-{cfg.images}.zip")
    if not data.exists():
        pictures.draw_all(data, cfg.images)
    cfg = replace(cfg, data=str(data), data_root=str(Path(cfg.out, "data")))
    launch(train, cfg)


if __name__ == "__main__":
    cli.entry(main)
