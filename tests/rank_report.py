"""Chapter 1 as it is, but every rank also writes the EMA weights that it samples with."""

from runtime.processes import World

from pathlib import Path

import torch

import ddpm_pixel


def main():
    draw = ddpm_pixel.draw

    def report_and_draw(net, cfg, world: World, *args, **kwargs):
        torch.save(net.state_dict(), Path(cfg.out) / f"rank{world.rank}.pt")
        return draw(net, cfg, world, *args, **kwargs)

    ddpm_pixel.draw = report_and_draw
    ddpm_pixel.main()
