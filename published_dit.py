"""A published diffusion transformer as a checkpoint of chapter 3, to sample and to score.

Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023 (arXiv:2212.09748).

    python published_dit.py DiT-XL-2-256x256.pt --ae sd-vae-ft-ema --out runs/dit-xl
    python ldm_cfg.py --sample runs/dit-xl/ckpt.pt --n 16 --classes 207,360 --guidance 3
    python eval_fid.py runs/dit-xl/ckpt.pt IMAGES --features inception --n 5000

`dit.py` reads the denoiser, `networks/` the autoencoder. Here their weights go into one file, with
what those files do not tell, which is how the network was trained (the paper's section 4):

    z_0 = 0.18215 E(x)                           latents of Stable Diffusion's autoencoder
    beta_t linear from 1e-4 to 0.02, T = 1000    the network predicts eps, and log-variances
    1,000 labels in ImageNet's order             and one more for "no label", a tenth of the time

A folder of diffusers' DiTPipeline tells the schedule and the names of its labels, and brings its
autoencoder. The paper's scale of guidance is s = 1 + w. The published code guides three of the four
latent channels, chapter 3 all of them: their images at one s are not the same.
"""

from runtime.commandline import BadInput, entry, parse
from runtime.files import atomic_write

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import dit
import ldm_cfg
from networks.kl_autoencoder import load_pretrained
from networks.published.files import read_json, read_schedule

SCALING = 0.18215  # of Stable Diffusion's latents, whose autoencoder has 4 channels and factor 8
BATCH = 8  # samples at a time by default: decoding 256x256 images takes 0.2 GB for each


@dataclass
class Config:
    dit: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIT")]
    """the denoiser: DiT-XL-2-256x256.pt, or a file or folder like it (see dit.load_published)"""
    ae: str = ""
    """its autoencoder's file or folder (see vae.load_pretrained); empty: vae/ in the folder DIT"""
    out: str = ""  # folder of the checkpoint (default runs/DIT, by its name)
    data: str = "imagenet"
    """name of what it was trained on. Where that is a data set, folder or zip, eval_fid.py compares
    with it; with `imagenet` eval_fid.py must be given images"""


# ------------------------------------------------------------------- what the weights do not tell


def model_name(settings, path):
    """The name, such as "dit-xl/2", that `dit.parse_size` turns into these settings of a DiT.

    BadInput where there is none: chapter 3 builds the sizes of the paper's table 1 only.
    """
    sizes = {numbers: name for name, numbers in dit.SIZES.items()}
    size = sizes.get(tuple(settings[key] for key in ("width", "depth", "heads")))
    if size is None or settings["patch"] not in dit.PATCHES or settings["mlp_ratio"] != 4:
        found = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        raise BadInput(
            f"{path} is a DiT of no published size ({found}): expected one of "
            f"{', '.join(f'dit-{name}' for name in dit.SIZES)}, of patch "
            f"{', '.join(map(str, dit.PATCHES))} and mlp_ratio 4"
        )
    return f"dit-{size}/{settings['patch']}"


def schedule_of(path):
    """dict(schedule, timesteps, prediction) that the network `path` was trained with.

    Those of scheduler/ in a folder of diffusers; else the published ones. BadInput for other
    schedules than DDPM's linear and IDDPM's cosine, and other predictions than eps and v.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return dict(schedule="linear", timesteps=1000, prediction="eps")
    facts = read_schedule(file)
    if facts["schedule"] not in ("linear", "cosine") or facts["prediction"] not in ("eps", "v"):
        raise BadInput(
            f"{file}: schedule {facts['schedule']} and prediction {facts['prediction']}: expected "
            "DDPM's linear or IDDPM's cosine schedule, and eps or v"
        )
    return {name: facts[name] for name in ("schedule", "timesteps", "prediction")}


def label_names(path, count):
    """Names of the labels 0..count-1, all different; those without a name have their number.

    A folder of diffusers may have id2label in its model_index.json, where what follows a comma
    are other names of the same. A name of two labels gets the number behind it, and so does one
    that is a number itself: --classes takes both.
    """
    file = path / "model_index.json"
    told = read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(told, dict | None):
        raise BadInput(f"{file}: id2label must hold names by label, got a {type(told).__name__}")
    first = [str((told or {}).get(str(i), "")).split(",")[0].strip() for i in range(count)]
    shared = Counter(first)
    names = [
        f"{name} {i}".strip() if not name or shared[name] > 1 or name.isdecimal() else name
        for i, name in enumerate(first)
    ]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise BadInput(f"{file}: id2label tells {twice[0]!r} of two labels, once with its number")
    return names


def scaling_of(ae, facts):
    """(what latents of the autoencoder are multiplied by, whether its files tell it).

    BadInput where they do not and it is not like Stable Diffusion's, and for a shift.
    """
    source, like_sd = facts["source"], (ae.z_channels, ae.factor) == (4, 8)
    if facts["shift"]:
        raise BadInput(
            f"{source} has latents shifted by {facts['shift']:g}, which chapter 3 does not do; "
            "expected an autoencoder without a shift, such as sd-vae-ft-ema"
        )
    if facts["scaling"] is not None:
        return facts["scaling"], True
    if not like_sd:
        raise BadInput(
            f"{source} does not tell what its latents are multiplied by: expected a config.json "
            "beside it with scaling_factor, as in a folder of diffusers"
        )
    return SCALING, False


# ----------------------------------------------------------------------------------- conversion


def convert(cfg):
    """Write OUT/ckpt.pt, whole or not at all, and print what is in it.

    It is as ldm_cfg.train writes it, but for the optimizer: to be sampled, not trained on.
    BadInput for files that hold something else, and parts that do not fit each other.
    """
    path, out = Path(cfg.dit), Path(cfg.out or Path("runs", Path(cfg.dit).stem))
    check_paths(path, out)
    if not cfg.ae and not (path / "vae").is_dir():
        raise BadInput(
            f"{path} brings no autoencoder: add --ae with its file or folder, such as sd-vae-ft-ema"
        )
    ae, facts = load_pretrained(cfg.ae or path)
    scale, told = scaling_of(ae, facts)
    net, of = dit.load_published(path), schedule_of(path)
    channels, height, width = net.shape
    if channels != ae.z_channels:
        raise BadInput(
            f"{path} has latents of {channels} channels, {facts['source']} of {ae.z_channels}: "
            "name the autoencoder that it was trained with by --ae"
        )
    shape = [ae.channels, height * ae.factor, width * ae.factor]
    names, learned = label_names(path, net.null), net.settings["learned_variance"]
    # An absolute path is never taken for one of the kinds that chapter 3 trains.
    settings = ldm_cfg.Config(
        out=str(out),
        data=cfg.data,
        size=min(shape[1:]),
        ae=str(Path(facts["source"]).resolve()),
        model=model_name(net.settings, path),
        learned_variance=learned,
        label_dropout=0.1,
        batch_size=BATCH,
        **of,
    )
    weights = net.state_dict()  # one set of tensors, which the file holds once
    with atomic_write(out / "ckpt.pt") as temporary:
        torch.save(
            {
                "script": "ldm_cfg",
                "config": json.loads(json.dumps(asdict(settings))),
                "step": 0,
                "model": weights,
                "ema": weights,
                "autoencoder": ae.state_dict(),
                "scale": scale,
                "shape": shape,
                "class_names": names,
                "ae_made_of": ae.made_of,
            },
            temporary,
        )
    count = sum(p.numel() for p in net.parameters()) / 1e6
    print(
        f"{path}: {settings.model}, {count:.1f} M parameters, latents {channels}x{height}x{width}, "
        f"{net.null} labels, variance {'learned' if learned else 'fixed'}, {of['prediction']}, "
        f"{of['schedule']} schedule of {of['timesteps']} timesteps"
    )
    why = "" if told else ", Stable Diffusion's, because its files do not tell it"
    print(f"{facts['source']}: images {'x'.join(map(str, shape))}, scaling {scale:g}{why}")
    print(f"checkpoint: {out / 'ckpt.pt'}")


def check_paths(path, out):
    """BadInput where there is no `path`, and for an `out` that is a file or a run trained here."""
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder: name a published DiT's")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file: name a folder")
    if (out / "log.jsonl").exists():
        raise BadInput(f"--out {out} holds a run trained here, which would be lost: name another")


def main():
    convert(parse(Config, __doc__))


if __name__ == "__main__":
    entry(main)
