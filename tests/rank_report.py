"""A chapter as it is, but every rank also writes the weights that it has when it saves.

Started as `rank_report SCRIPT ARGUMENTS`; leaves rank0.pt, rank1.pt, ... beside the checkpoint.
"""

from runtime.run import Run

import importlib
import sys
from pathlib import Path

import torch


def main():
    script = sys.argv.pop(1)
    save = Run.save

    def report_and_save(self):
        weights = {"model": self.net.state_dict(), "ema": self.ema.state_dict()}
        torch.save(weights, Path(self.cfg.out) / f"rank{self.world.rank}.pt")
        save(self)

    Run.save = report_and_save
    importlib.import_module(script).main()
