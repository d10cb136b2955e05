"""Write a U-Net as a pipeline of diffusers: unet/, scheduler/ and model_index.json.

    python -m networks.published runs/pixel-mnist/ckpt.pt --out FOLDER
    python -m networks.published cifar10_uncond_50M_500K.pt --out FOLDER --schedule cosine

Takes checkpoints of ddpm_pixel.py and improved_ddpm.py and published U-Nets.
diffusers.DDPMPipeline.from_pretrained(FOLDER) samples it if it has no labels.
"""

from runtime import checkpoints
from runtime import commandline as cli

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from networks.published.schedule import named_alpha_bar
from networks.published.unet import read_network, save_diffusers, settings_of

SCRIPTS = ("ddpm_pixel", "improved_ddpm")
SAMPLING = ("variance", "clip_denoised", "dynamic_threshold")
FORWARD = ("schedule", "timesteps", "alpha_min", "prediction")


@dataclass
class Config:
    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """of ddpm_pixel.py or improved_ddpm.py, or a published U-Net: a folder of diffusers,
    .safetensors or OpenAI's .pt"""
    out: str = ""  # the folder to write
    ema: tuple[float, ...] = (0.0,)  # decay of the running mean to write; by default the first
    variance: Literal["auto", "small", "large"] = "auto"
    """that of the scheduler's steps; without it, the checkpoint's. A learned one is kept"""
    clip_denoised: bool = True  # whether the scheduler clamps; without it, as the checkpoint says
    dynamic_threshold: bool = False  # the scheduler's thresholding; the same
    schedule: Literal["linear", "cosine", "sigmoid"] = "linear"
    """noise schedule of a published network that comes without a scheduler"""
    timesteps: int = 1000  # its length
    alpha_min: float = 0.001  # its smallest alpha_t
    prediction: Literal["eps", "x0", "v"] = "eps"  # what such a network predicts


def facts_of(state, config):
    """What save_diffusers needs of the schedule, and how it should be sampled."""
    alpha_bar = state.get("alpha_bar")
    if alpha_bar is None or not state.get("named", True):
        names = ("schedule", "timesteps", "alpha_min")
        alpha_bar = named_alpha_bar(*(config.get(name, 0.001) for name in names))
    if not (alpha_bar.diff() < 0).all() or not 0 < alpha_bar[-1] <= alpha_bar[0] < 1:
        raise cli.BadInput("--alpha-min, --timesteps: alpha_bar must fall at every step")
    threshold = "clamp" if config.get("clip_denoised", True) else "none"
    return {
        "alpha_bar": alpha_bar,
        "schedule": config["schedule"],
        "alpha_min": config.get("alpha_min", 0.001),
        "prediction": config["prediction"],
        "variance": "large" if config["variance"] == "large" else "small",
        "threshold": "dynamic" if config.get("dynamic_threshold") else threshold,
    }


def main():
    cfg = cli.parse(Config, __doc__)
    if not cfg.checkpoint or not cfg.out:
        raise cli.BadInput("name a checkpoint and --out, the folder to write")
    cli.check_positive(cfg, "timesteps")
    cli.check_fraction(cfg, "alpha_min")
    state = read_network(cfg.checkpoint, SCRIPTS)
    typed = set(SAMPLING + FORWARD).difference(cli.not_given(cfg, SAMPLING + FORWARD))
    for name in FORWARD:
        if name in typed and state.get("named", True):
            flag = name.replace("_", "-")
            raise cli.BadInput(
                f"--{flag}: {cfg.checkpoint} has a schedule of its own; leave it out"
            )
    config = state["config"] | {name: getattr(cfg, name) for name in typed}
    weights = checkpoints.chosen_ema(state, cfg.checkpoint, checkpoints.typed_ema(cfg))
    classes = len(state["class_names"]) if config["class_cond"] else 0
    facts = facts_of(state, config)
    save_diffusers(cfg.out, settings_of(state), weights, state["shape"], classes, facts)
    print(f"{cfg.out}: open it with diffusers.DDPMPipeline.from_pretrained")


if __name__ == "__main__":
    cli.entry(main)
