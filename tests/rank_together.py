"""Ranks that end as they are told: `rank_together HOW [FOLDER]`, HOW being that of rank 1.

Rank 0 waits for it in a sum, or, with `alone`, outside of torch; `here`: both are started by one
process, as by --gpus 2; `forked`: so, fast, and all ignore SIGINT as in a script's background. WAIT
in the environment shortens how long ranks wait for each other.
"""

from runtime import processes, ranks
from runtime.commandline import BadInput
from runtime.processes import launch, start_here

import functools
import os
import signal
import sys
import time
from types import SimpleNamespace

import torch


def end(cfg, world):
    world.barrier()
    print("met", flush=True)
    if world.rank == 1:
        if cfg.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if cfg.how == "refuses":
            raise BadInput("--here is wrong: type --there")
        if cfg.how == "fails":
            raise ZeroDivisionError
        if cfg.how == "data":
            os.environ["DATA"] = "theirs"
        if cfg.how == "waits":
            time.sleep(60)
        if cfg.how == "done":
            return
    if cfg.how == "data":
        world.agree({"data_key": os.environ.get("DATA", "ours")})
    if cfg.where == "alone":
        time.sleep(1 if cfg.how == "done" else 60)
    elif cfg.how != "done":
        world.sum(torch.zeros(1))


def main():
    ranks.PATIENCE = float(os.environ.get("WAIT", ranks.PATIENCE))
    ranks.NOTE, ranks.GRACE = ranks.PATIENCE / 2, 0.5
    how, where = [*sys.argv[1:], "", ""][:2]
    cfg = SimpleNamespace(gpus=0, how=how, where=where, lr=float(os.environ.get("LR", 1)))
    if where == "forked":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        forks = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
        torch.multiprocessing.spawn = forks
    if where in ("here", "forked"):
        start_here(end, cfg, 2)
    else:
        processes.meet(cfg)
        launch(end, cfg)
