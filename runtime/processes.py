"""One process, --gpus N of them, or a place under torchrun: World, launch, progress bars."""

from runtime.commandline import entry

import contextlib
import ctypes
import dataclasses
import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class World:
    """This process among `size` of them, and the device that is its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, n):
        """This rank's contiguous part of 0..n-1, as a slice; the parts of all ranks cover it."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def wrap(self, net):
        """`net` for training: its gradients are the mean over all processes after backward()."""
        if self.size == 1:
            return net
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)

    def sum(self, tensor):
        """The sum of `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, part, n):
        """All n rows on every rank, from each rank's part = rows[self.share(n)]."""
        rows = part.new_zeros((n, *part.shape[1:]))
        rows[self.share(n)] = part
        return self.sum(rows)

    def in_parts(self, make, n, batch_size, steps, desc):
        """The n rows that make(part, tick) gives, on every rank: each makes its share.

        A part is some of the numbers 0..n-1, int64 (b,), at most batch_size over all ranks; make
        calls tick() for each of the `steps` of its progress.
        """
        parts = torch.arange(n)[self.share(n)].split(max(1, -(-batch_size // self.size)))
        with self.progress(len(parts) * steps, desc=desc) as bar:
            rows = [make(part, bar.update) for part in parts]
        return self.collect(torch.cat(rows).to(self.device), n).cpu()

    def draw(self, walk, seeds, labels, batch_size, steps, desc="sampling"):
        """uint8 images (N,H,W,C) of seeds and labels (N,) or None, the same on every rank.

        walk(seeds, labels) yields, at each of `steps`, a tuple that begins with images (b,C,H,W).
        """
        from runtime.pictures import to_uint8

        def images(part, tick):
            y = None if labels is None else labels[part].to(self.device)
            for x, *_ in walk(seeds[part].to(self.device), y):  # noqa: B007
                tick()
            return to_uint8(x)

        with self.autocast():
            return self.in_parts(images, len(seeds), batch_size, steps, desc)

    def frames(self, walk, seeds, labels):
        """The way of the images of seeds (n,): uint8 (2n,H,W,C) each, all x and then all x0_hat."""
        from runtime.pictures import to_uint8

        y = None if labels is None else labels[: len(seeds)].to(self.device)
        with self.autocast():
            return [to_uint8(torch.cat(pair)) for pair in walk(seeds.to(self.device), y)]

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def autocast(self):
        """bf16 autocast where the GPU has bf16, else nothing."""
        on = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def progress(self, total, initial=0, desc=""):
        """A progress bar on rank 0, quiet elsewhere."""
        return progress(total, desc, initial=initial, quiet=not self.is_main)


def is_first_process():
    """Whether this is the process that does, after launch(), what must be done once."""
    return os.environ.get("RANK", "0") == "0"


def launch(fn, cfg):
    """Call fn(cfg, world) in every process.

    Under torchrun this process joins the others (RANK, WORLD_SIZE, LOCAL_RANK in the environment);
    otherwise cfg.gpus > 1 starts that many processes here; otherwise fn runs in this one.
    """
    keep_memory()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _run_rank(int(os.environ.get("LOCAL_RANK", rank)), fn, cfg, rank, size)
    elif cfg.gpus > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
        try:
            torch.multiprocessing.spawn(_run_rank, (fn, cfg, None, cfg.gpus), nprocs=cfg.gpus)
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code == 2:  # the rank has already said what was wrong
                sys.exit(2)
            raise
    else:
        fn(cfg, World(device=torch.device("cuda:0" if cfg.gpus else "cpu")))


def _run_rank(local_rank, fn, cfg, rank, size):
    keep_memory()
    rank = local_rank if rank is None else rank
    on_gpu = cfg.gpus > 0
    device = torch.device(f"cuda:{local_rank}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size)
    try:
        entry(lambda: fn(cfg, World(rank, size, device)))
    finally:
        dist.destroy_process_group()


def keep_memory():
    """Have glibc keep the memory that tensors leave, instead of fetching it anew at every step.

    On a CPU the kernel otherwise zeroes those pages again and again: 17 % of a training step of
    chapter 1 on MNIST. Where there is no glibc, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below it come from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def progress(total, desc, *, over=None, initial=0, unit="it", quiet=False):
    """A tqdm line, an iterator over `over` if given; seldom redrawn where it goes into a file."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        over,
        total=total,
        desc=desc,
        initial=initial,
        unit=unit,
        unit_scale=unit != "it",
        disable=quiet,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


def run_alone(command, stdout=None):
    """The exit code of a command that is no rank of ours, though torchrun started this process."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    own = {key: value for key, value in os.environ.items() if key not in ranks}
    return subprocess.run(command, env=own, stdout=stdout).returncode
