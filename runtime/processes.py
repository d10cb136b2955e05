"""One process, --gpus N of them, or a place under torchrun: World, launch, progress bars."""

from runtime.commandline import BadInput, entry

import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class World:
    """This process among `size` of them, the device that is its own, and how that computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "auto"  # of networks: --precision
    compile: bool = False  # also networks that draw samples: --compile
    ends: list = dataclasses.field(default_factory=list, compare=False)  # called when all is done
    local_rank: int = 0  # this process's number on its machine
    nodes: int = 1  # how many machines there are

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, n):
        """This rank's contiguous part of 0..n-1, as a slice; the parts of all ranks cover it."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def wrap(self, net, static=False):
        """`net` for training: its gradients are the mean over all processes after backward().

        static: each backward shares, and takes the way of the first one; no torch.autograd.grad may
        come before that. Gradients lie where they are sent from.
        """
        if self.size == 1:
            return net
        ids = [self.device.index] if self.device.type == "cuda" else None
        how = {"device_ids": ids, "static_graph": static, "gradient_as_bucket_view": True}
        return torch.nn.parallel.DistributedDataParallel(net, **how)

    def adam(self, lr, **settings):
        """Adam, with weight_decay AdamW, as a function of the parameters.

        On a GPU a step of all of them is one kernel. On a CPU it is not, for that rounds otherwise,
        and runs there shall stay what they were.
        """
        kind = torch.optim.AdamW if settings.get("weight_decay") else torch.optim.Adam
        fused = self.device.type == "cuda" or None
        return functools.partial(kind, lr=lr, fused=fused, **settings)

    def for_sampling(self, net):
        """`net` for calls without gradients: a CUDA graph on a GPU, and compiled with --compile.

        Its weights may change in place only. A network that is split (--shard) stays as it is.
        """
        if hasattr(net, "unshard"):
            return net
        net = torch.compile(net) if self.compile else net
        if self.device.type != "cuda":
            return net
        from runtime.graphs import Sampled

        return Sampled(net)

    def watch(self, run, steps):
        """The numbers `steps` of a Run's steps, which end with them; --dry-run times these."""
        return steps

    def upload(self, array):
        """A numpy array as a tensor on the device; to a GPU by a copy that nobody waits for."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

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

    @contextlib.contextmanager
    def as_one(self):
        """NotFinite that any process raises inside is raised by all: none waits for it in vain."""
        from runtime.finite import NotFinite

        mine = ""
        try:
            yield
        except NotFinite as error:
            mine = str(error)
        if any(told := self.gather(mine)):
            raise NotFinite(next(filter(None, told)))

    def in_parts(self, make, n, batch_size, steps, desc):
        """The n rows that make(part, tick) gives, on every rank: each makes its share.

        A part is some of the numbers 0..n-1, int64 (b,), at most batch_size over all ranks; make
        calls tick() for each of the `steps` of its progress, a number or a list of them. NotFinite
        is raised as in as_one().
        """
        steps = steps if isinstance(steps, int) else len(steps)
        parts = torch.arange(n)[self.share(n)].split(max(1, -(-batch_size // self.size)))
        with self.progress(len(parts) * steps, desc=desc) as bar, self.as_one():
            rows = [make(part, bar.update) for part in parts]
        return self.collect(torch.cat(rows).to(self.device), n).cpu()

    def draw(self, walk, seeds, labels, batch_size, steps, desc="sampling"):
        """uint8 images (N,H,W,C) of seeds and labels (N,) or None, the same on every rank.

        walk(seeds, labels) yields, at each of `steps`, a tuple that begins with images (b,C,H,W).
        steps: a number, or the (t, t_prev) of each. NotFinite names the step where images are not
        finite, and the seed.
        """
        from runtime.finite import end_of
        from runtime.pictures import to_uint8

        def images(part, tick):
            y = None if labels is None else labels[part].to(self.device)
            way = walk(seeds[part].to(self.device), y)
            return to_uint8(end_of(way, tick, seeds[part], steps, desc), seeds[part])

        with self.autocast():
            return self.in_parts(images, len(seeds), batch_size, steps, desc)

    def frames(self, walk, seeds, labels, x_T, kept=None):
        """The way of the images of seeds (n,) from x_T (n,C,H,W), where walk(seeds, labels) starts.

        ({i: x}, {i: x0_hat}), uint8 (n,H,W,C), at the numbers `kept` of frames, None for all. Frame
        0 is x_T, the others come after each step, and x0_hat is what the network takes x for: of
        the last one, the image, itself.
        """
        from runtime.finite import watched
        from runtime.pictures import to_uint8

        y, xs, guesses = None if labels is None else labels.to(self.device), {}, {}
        x = x_T
        with self.autocast():
            way = watched(walk(seeds.to(self.device), y), seeds)
            for i, (x_next, x0_hat) in enumerate(way):
                if kept is None or i in kept:
                    xs[i], guesses[i] = to_uint8(x), to_uint8(x0_hat)
                x = x_next
        xs[i + 1] = guesses[i + 1] = to_uint8(x)
        return xs, guesses

    def drawn(self, make, step):
        """make(), in a training after `step` steps; None, and a line, where that is not finite."""
        from runtime.finite import NotFinite

        try:
            return make()
        except NotFinite as error:
            if self.is_main:
                print(f"note: no picture or score at step {step}: {error}", flush=True)
            return None

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def from_first(self, path):
        """with world.from_first(path) as path: what rank 0 has there, which this machine may not"""
        if self.nodes == 1:
            return contextlib.nullcontext(Path(path))
        from runtime.nodes import from_first

        return from_first(path, self)

    def gather(self, thing):
        """[thing of each rank], of plain values, on every rank."""
        if self.size == 1:
            return [thing]
        found = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def agree(self, what):
        """BadInput, on every rank, where values of the dictionary `what` differ among them."""
        found = self.gather(what)
        for rank, other in enumerate(found):
            if names := [name for name in what if other.get(name) != found[0].get(name)]:
                told = f"{names[0]}, {other.get(names[0])} (rank 0: {found[0].get(names[0])})"
                told = f"rank {rank} of {self.size} has another {told}"
                raise BadInput(f"{told}: give all the same data and files")

    @functools.cached_property
    def dtype(self):
        """What networks compute in: bfloat16, float16, or float32."""
        from runtime.precision import dtype_of

        return dtype_of(self.precision, self.device)

    def autocast(self):
        """Autocast to the world's dtype; with float32 nothing."""
        on = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if on else None, enabled=on)

    def loss_scaler(self):
        """What multiplies a loss in fp16, a LossScaler; None in other precisions."""
        if self.dtype is not torch.float16:
            return None
        from runtime.precision import LossScaler

        return LossScaler(self)

    def progress(self, total, initial=0, desc=""):
        """A progress bar on rank 0, quiet elsewhere."""
        return progress(total, desc, initial=initial, quiet=not self.is_main)


SETTINGS = ("precision", "compile")  # of a command, that its World has
SAID = set()  # lines that are printed once


def is_first_process():
    """Whether this is the process that does, after launch(), what must be done once."""
    return (os.environ.get("RANK") or "0") == "0"


def process_count(gpus):
    """How many processes a command with --gpus has, here or under torchrun."""
    if not os.environ.get("WORLD_SIZE"):
        return max(gpus, 1)
    from runtime import ranks

    return ranks.number("WORLD_SIZE", 1, 10**6)


def check_shares(gpus, batch_size):
    """BadInput where the processes of a command cannot share a batch."""
    if batch_size % (size := process_count(gpus)):
        lower, upper = batch_size // size * size, -(-batch_size // size) * size
        told = f"--batch-size {batch_size} cannot be divided among {size} processes; try {upper}"
        raise BadInput(told + (f" or {lower}" if lower else ""))


def meet(cfg):
    """Where others do the same command: wait for them, and see that they do; before long work."""
    if os.environ.get("RANK") and not getattr(cfg, "dry_run", False):
        from runtime import ranks

        ranks.meet(cfg)


def say_once(line):
    """Print a line, unless this process has, and of several processes in the first one only."""
    first = not dist.get_rank() if dist.is_initialized() else is_first_process()
    if line not in SAID and first:
        print(line, flush=True)
    SAID.add(line)


def launch(fn, cfg):
    """Call fn(cfg, world) in every process.

    Under torchrun this process joins the others (RANK, WORLD_SIZE, LOCAL_RANK in the environment);
    otherwise cfg.gpus > 1 starts that many processes here; otherwise fn runs in this one. With
    cfg.dry_run one process does a little of it.
    """
    keep_memory()
    if getattr(cfg, "compile", False):
        check_compiler(cfg.gpus)
    if getattr(cfg, "dry_run", False):
        from runtime.rehearsal import rehearse

        return rehearse(fn, cfg)
    if os.environ.get("RANK"):
        from runtime import ranks

        _as_rank(fn, cfg, ranks.place())
    elif cfg.gpus > 1:
        start_here(fn, cfg, cfg.gpus)
    else:
        _complete(fn, cfg, _world(cfg, 0, 1, torch.device("cuda:0" if cfg.gpus else "cpu")))


def start_here(fn, cfg, count):
    """Call fn(cfg, world) in `count` new processes; one that is killed ends all, with one line."""
    logging.getLogger(torch.multiprocessing.spawn.__module__).setLevel(logging.ERROR)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        given = fn, cfg, count, store.port, SAID
        torch.multiprocessing.spawn(_started_here, given, nprocs=count)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code in (2, 130):  # the rank has already said what was wrong
            sys.exit(error.exit_code)
        if error.exit_code >= 0:
            raise
        told = f"error: a process of {count} was ended by {error.signal_name}; type the same again"
        print(f"{told} to go on from the last checkpoint", file=sys.stderr)
        sys.exit(1)


def check_compiler(gpus=0):
    """Raise BadInput where torch.compile would find no compiler: of C++, or for a GPU of C."""
    names = ("CC", "gcc", "clang", "cc") if gpus else ("CXX", "g++", "clang++", "c++")
    if not any(shutil.which(name) for name in (os.environ.get(names[0], ""), *names[1:])):
        told = f"--compile needs a compiler, and there is no {names[1]}"
        raise BadInput(f"{told}: install it, or leave out --compile")


def prefer_speed():
    """Have a GPU round fp32 products to TF32, and try which convolution is the fastest.

    What must not be rounded says so: see exact().
    """
    torch.backends.cudnn.benchmark = True  # all steps have one shape
    torch.set_float32_matmul_precision("high")


def _complete(fn, cfg, world):
    """fn(cfg, world), then what a training is ended with, or a new report of a run it wrote to."""
    fn(cfg, world)
    for end in world.ends:
        end()
    if world.is_main and not world.ends:
        from runtime.report import refresh_after

        refresh_after(cfg)


def _world(cfg, *place, **among):
    if cfg.gpus:
        prefer_speed()
    how = {name: getattr(cfg, name, getattr(World, name)) for name in SETTINGS}
    return World(*place, **how, **among)


def _started_here(rank, fn, cfg, size, port, said):
    """The process number `rank` of start_here."""
    from runtime import ranks
    from runtime.parents import end_with_parent

    end_with_parent(ranks.GRACE)
    keep_memory()
    SAID.update(said)
    where = ranks.Place(rank, size, rank, "127.0.0.1", port, parent=True)
    entry(ranks.together(lambda: _as_rank(fn, cfg, where)))


def _as_rank(fn, cfg, where):
    """fn(cfg, world) at the Place `where`, and what is due then."""
    from runtime import ranks

    on_gpu, rank, size = cfg.gpus > 0, where.rank, where.size
    if on_gpu and where.local >= torch.cuda.device_count():
        told = f"LOCAL_RANK={where.local}: this machine has {torch.cuda.device_count()} GPUs"
        raise BadInput(f"{told}; start as many processes, or type --gpus 0")
    party = ranks.meet(cfg, where)
    device = torch.device(f"cuda:{where.local}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    how = {"store": party.store, "rank": rank, "world_size": size}
    dist.init_process_group("nccl" if on_gpu else "gloo", **how)
    try:
        among = {"local_rank": where.local, "nodes": party.nodes}
        _complete(fn, cfg, _world(cfg, rank, size, device, **among))
    except BaseException as error:
        party.leave(error)  # as long as the others wait for this one
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def exact():
    """Inside, also as a decorator, fp32 is fp32 on a GPU, too: no product is rounded to TF32."""
    cudnn, others = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(others)


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
    """Run a command that is no rank of ours, though torchrun started this process.

    "" where it ends well, else its refusal, or its exit code in words.
    """
    from runtime.edges import heard

    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    with heard() as (env, said):
        own = {key: value for key, value in env.items() if key not in ranks}
        code = subprocess.run(command, env=own, stdout=stdout).returncode
        return (said().removeprefix("error: ") or f"exit code {code}") if code else ""
