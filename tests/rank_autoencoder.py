"""Train the autoencoder alone, in one process or as one rank of several: settings come as JSON."""

from runtime.processes import launch

import json
import sys
from dataclasses import dataclass

import autoencoder
from image_data import datasets


@dataclass
class Config:
    """What autoencoder.py asks of the settings of chapter 3, small; 24x24 -> 6x6 latents."""

    data: str
    data_root: str
    out: str = ""
    size: int = 0
    flip: bool = True
    classes: str = ""
    ae: str = "kl"
    patch: int = 2
    ae_width: int = 16
    ae_mult: tuple[int, ...] = (1, 2)
    ae_blocks: int = 1
    z_channels: int = 3
    kl_weight: float = 3e-3
    codebook: int = 20
    commitment: float = 0.25
    perceptual: str = ""
    perceptual_weight: float = 1.0
    discriminator: float = 0.0
    disc_start: int = 1000
    ae_steps: int = 12
    ae_lr: float = 1e-3
    batch_size: int = 8
    warmup: int = 2
    clip_grad: float = 1.0
    seed: int = 0
    gpus: int = 0
    resume: str = "auto"
    compile: bool = False
    tensorboard: bool = False
    log_every: int = 2
    save_every: int = 4
    n_eval: int = 0


def train(cfg, world):
    autoencoder.train(cfg, world, datasets.load(cfg.data, cfg.data_root))


def main():
    given = json.loads(sys.argv[1])
    launch(train, Config(**given | {"ae_mult": tuple(given["ae_mult"])}))
