"""Write a U-Net as a pipeline of diffusers: unet/, scheduler/ and model_index.json.

    python -m networks.published runs/pixel-mnist/ckpt.pt --out FOLDER
    python -m networks.published cifar10_uncond_50M_500K.pt --out FOLDER --schedule cosine \\
        --timesteps 4000

Takes checkpoints of ddpm_pixel.py and improved_ddpm.py and published U-Nets.
diffusers.DDPMPipeline.from_pretrained(FOLDER) samples it if it has no labels.
"""

from runtime import checkpoints
from runtime import commandline as cli

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from networks.published.schedule import betas_of, config_alpha_bar
from networks.published.unet import read_network, save_diffusers, settings_of

SCRIPTS = ("ddpm_pixel", "improved_ddpm")
SAMPLING = ("variance", "clip_denoised", "dynamic_threshold", "spacing")
NOTED = ("sample_steps", "guidance", "timestep_respacing")


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
    spacing: Literal["linear", "leading", "trailing"] = "linear"  # of its timesteps; the same
    schedule: Literal["linear", "cosine", "sigmoid", "sigmoid-beta"] = "linear"
    """noise schedule of a published network that comes without a scheduler"""
    timesteps: int = 1000  # its length
    alpha_min: float = 0.001  # its smallest alpha_t
    beta_start: float = 0.0  # first beta_t of linear and sigmoid-beta; 0: 1e-4 times 1000/T
    beta_end: float = 0.0  # their last; 0: 0.02 times 1000/T
    trained_betas: tuple[float, ...] = ()  # beta_t of each step, instead of these five
    prediction: Literal["eps", "x0", "v"] = "eps"  # what such a network predicts
    size: int = 0  # height and width of its images, where its files do not say them
    num_heads: int = 1  # its attention heads, the same
    num_head_channels: int = 0  # channels of a head, instead of --num-heads
    norm_groups: int = 32  # groups of its norms, the same
    new_order: bool = False  # OpenAI's use_new_attention_order, the same
    rescale_timesteps: bool = True
    """OpenAI's, the same: of T timesteps the network sees t * 1000 / T. By default where its blocks
    do not change the image's size, as in improved-diffusion"""


def facts_of(state, config, path):
    """What save_diffusers needs of the schedule, and how it should be sampled.

    A UNet2DModel sees t as it is: of T timesteps of which a network sees t * 1000 / T, those are
    kept where that is 0, 1, ... 999. BadInput where there are none.
    """
    alpha_bar, T = config_alpha_bar(config, path), 1000
    if state.get("time_scale", 1.0) != 1:
        if len(alpha_bar) % T:
            raise cli.BadInput(
                f"UNet2DModel cannot express t * {T} / {len(alpha_bar)}: expected --timesteps {T} "
                "or a multiple, as many --trained-betas, or --no-rescale-timesteps"
            )
        every = len(alpha_bar) // T
        config = config | {"trained_betas": betas_of(alpha_bar[::every]).tolist()}
        alpha_bar = config_alpha_bar(config, path)
        print(f"{path}: written as its {T} timesteps 0, {every}, ..., {every * (T - 1)}")
    clip = "clamp" if config.get("clip_denoised", True) else "none"
    notes = {name: config[name] for name in NOTED if name in config}
    if settings_of(state)["learn_sigma"] and config["variance"] in ("small", "large"):
        notes["variance"] = config["variance"]  # which DDPMScheduler draws of no such network
    return {
        "alpha_bar": alpha_bar,
        "betas": config.get("trained_betas"),
        "schedule": "other" if config.get("trained_betas") else config["schedule"],
        "alpha_min": config.get("alpha_min", 0.001),
        "beta_start": config.get("beta_start", 0.0),
        "beta_end": config.get("beta_end", 0.0),
        "prediction": config["prediction"],
        "variance": "large" if config["variance"] == "large" else "small",
        "clip": "dynamic" if config.get("dynamic_threshold") else clip,
        "spacing": config.get("spacing", "linear"),
        "notes": notes,
    }


def main():
    cfg = cli.parse(Config, __doc__)
    if not cfg.checkpoint or not cfg.out:
        raise cli.BadInput("name a checkpoint and --out, the folder to write")
    cli.check_positive(cfg, "timesteps")
    cli.check_fraction(cfg, "alpha_min", "beta_start", "beta_end", "trained_betas")
    if cfg.trained_betas and (other := cli.typed(checkpoints.NOISE)):
        raise cli.BadInput(f"{cli.flag(other[0])} does nothing beside --trained-betas")
    if cfg.schedule not in ("linear", "sigmoid-beta") and (cfg.beta_start or cfg.beta_end):
        raise cli.BadInput("--beta-start and --beta-end need --schedule linear or sigmoid-beta")
    asked = checkpoints.asked(cfg, "publish")
    ema = asked.pop("ema")
    state = read_network(cfg.checkpoint, SCRIPTS, **asked)
    typed = cli.typed(SAMPLING)
    how = {name: getattr(cfg, name) for name in typed}
    if "clip_denoised" in typed:
        how.setdefault("dynamic_threshold", False)
    config = state["config"] | how
    weights = checkpoints.chosen_ema(state, cfg.checkpoint, ema)
    for name, value in weights.items():
        if not value.isfinite().all():
            raise cli.BadInput(f"{cfg.checkpoint}: {name} holds numbers that are not finite")
    classes = len(state["class_names"]) if config["class_cond"] else 0
    facts = facts_of(state, config, cfg.checkpoint)
    save_diffusers(cfg.out, settings_of(state), weights, state["shape"], classes, facts)
    print(f"{cfg.out}: open it with diffusers.DDPMPipeline.from_pretrained")


if __name__ == "__main__":
    cli.entry(main)
