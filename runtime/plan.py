"""What a training would need, said before it starts: memory, FLOPs, hours, dollars.

Nothing here computes with numbers: a network is counted on tensors that have only shapes.
"""

from runtime.checkpoints import differing, load_mapped, plain

import copy
import dataclasses
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAST = torch.channels_last
SMALL = "16 GB (T4, V100)"  # the GPU that courses have
GPU_BYTES = 16e9  # of it
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA itself, work spaces and gaps
SUSTAINED = 300e12  # FLOP/s of a GPU that is not here: 30 % of an H100's bf16 peak, an assumption


# --------------------------------------------------------------------------- what a network takes


def kept_for_backward(net, *inputs):
    """Bytes of activations that autograd keeps when net(*inputs) is called, but for its weights.

    Views of one tensor are counted once. What is recomputed instead of kept is not counted.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call of a network takes, without the way back.

    fixed  bytes that autograd keeps however many images there are: weights that autocast converts
    each   bytes that it keeps of every image
    flops  of one image, in products alone; a multiplication and an addition count two
    """

    fixed: int
    each: int
    flops: int


def forms_of(inputs):
    """What of_form needs to make such inputs for another number of images.

    inputs: tensors (b,...), or None.
    """
    return [
        None if x is None else (x.shape[1:], x.dtype, x.ndim == 4 and x.stride(1) == 1)
        for x in inputs
    ]


def of_form(form, images, device="cpu"):
    """Zeros (images,...) of one of forms_of's."""
    if form is None:
        return None
    shape, dtype, last = form
    x = torch.zeros(images, *shape, dtype=dtype, device=device)
    return x.to(memory_format=LAST) if last else x


def without_memory(net):
    """A copy of net whose weights have shapes, but no memory; within FakeTensorMode."""
    tensors = [*net.parameters(), *net.buffers()]
    fakes = {id(p): torch.empty_like(p, device="cpu") for p in tensors}
    for p in net.parameters():
        fakes[id(p)] = torch.nn.Parameter(fakes[id(p)], p.requires_grad)
    return copy.deepcopy(net, fakes)


class LiveBytes(TorchDispatchMode):
    """Follows the memory of `held` tensors, and of all that operators give within, until it is
    freed: `now` and `peak` are bytes. Views of one memory count once.

    Memory is freed when its storage ends, whoever held it last, Python or the graph of autograd.
    """

    def __init__(self, held=()):
        super().__init__()
        self.sizes, self.peak = WeakKeyDictionary(), 0
        self.follow(held)

    @property
    def now(self):
        return sum(self.sizes.values())

    def follow(self, tree):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.follow(result)
        return result


def peak_bytes(net, *inputs):
    """Bytes of tensors that live at most at one time in net(*inputs), without gradients.

    Its weights do not count, inputs and result do. inputs: tensors of which only the form counts,
    such as those of the meta device, or None. What an operator takes only inside is not seen.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin = without_memory(net)
        given = [None if x is None else torch.empty_like(x, device="cpu") for x in inputs]
        with LiveBytes([*twin.parameters(), *twin.buffers()]) as live:
            weights = live.now
            live.follow(given)
            twin(*given)
    return live.peak - weights


def memory_lines(nets, takes, device):
    """What nets {name: net} need on a torch.device and what is there, as lines of text.

    takes: {what: bytes that it needs beside the weights}, one after the other.
    """
    weights = sum(p.nbytes for net in nets.values() for p in net.parameters())
    counts = [f"{name} {parameters(net):,}" for name, net in nets.items()]
    yield f"parameters: {', '.join(counts)}: {size_text(weights)}"
    yield "beside them: " + ", ".join(f"{k} {size_text(n)}" for k, n in takes.items() if n)
    need, free = weights + max(takes.values()), free_memory(device)
    there = "" if free is None else f"; free here: {size_text(free)}"
    yield f"memory ({device.type}): {size_text(need)} and what PyTorch itself takes{there}"
    if free is not None and need > free:
        yield "note: that is too little; try smaller images, fewer at a time, or --precision bf16"


def free_memory(device):
    """Bytes that a process can still have on a torch.device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def cost_of(net, forms, half):
    """The Cost of net for inputs of these forms_of; half: with autocast to 16 bits.

    The autocast is the CPU's, which leaves some operations in bf16 that a GPU's does in fp32.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(
        display=False, custom_mapping={on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin, kept = without_memory(net), []
        for images in (2, 3):  # one alone lies in memory in more ways than one
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                kept.append(kept_for_backward(twin, *(of_form(form, images) for form in forms)))
        with torch.no_grad(), counter:
            twin(*(of_form(form, 1) for form in forms))
    each = kept[1] - kept[0]
    return Cost(kept[0] - 2 * each, each, counter.get_total_flops())


class Method(torch.nn.Module):
    """A method of a module, as a module of its own."""

    def __init__(self, method):
        super().__init__()
        self.owner, self.name = method.__self__, method.__name__

    def forward(self, *inputs):
        return getattr(self.owner, self.name)(*inputs)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def fewest_parts(fixed, each, images, limit):
    """The smallest --accumulate with which memory suffices, None if none does.

    A part of the `images` takes `each` bytes for each of its own, beside the fixed ones; all
    together at most `limit`.
    """
    parts = range(1, images + 1)
    return next((k for k in parts if fixed + each * -(-images // k) <= limit), None)


# ------------------------------------------------------------------------------- what it is called


def size_text(nbytes):
    """'12.3 GiB' of 13207024435."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def state(path, cfg):
    """(words, step): how far the run got whose checkpoint is at `path`; 0 if cfg cannot go on."""
    if not Path(path).is_file():
        return "to do", 0
    try:
        found = load_mapped(path)
        step, config = found["step"], found["config"]
    except Exception:  # whatever torch.load makes of a file that is cut
        return f"{path} is damaged, the checkpoint before it may be whole", 0
    ours = plain(cfg)
    theirs = {key: value for key, value in config.items() if key in ours}
    if others := differing(theirs, ours, cfg.FREE, type(cfg)):
        return f"REFUSED, {path}: {'; '.join(others)}: name another --out", 0
    return f"at step {step}", step


# ----------------------------------------------------------------------------------- what it costs


@dataclasses.dataclass
class Stage:
    """A part of a run that does the same `steps` times.

    steps    that are left
    seconds  of one, measured; or where `bound`, what its FLOPs alone would take
    images   that all processes together finish in one
    flops    of one, in all processes together
    """

    name: str
    steps: float
    seconds: float
    images: float
    flops: float
    bound: bool = False

    @property
    def hours(self):
        return self.steps * self.seconds / 3600


HEAD = f"{'':<12} {'steps':>9} {'s/step':>9} {'images/s':>9} {'TFLOP/step':>10} {'hours':>11}"


def table(stages, price):
    """Lines of a table of the Stages and their sum; price: dollars of an hour of all processes."""

    def end(hours, bound):
        more = "> " * bound
        dollars = f" {f'{more}{hours * price:.2f}':>11}" if price else ""
        return f" {f'{more}{hours:.3g}':>11}{dollars}"

    yield HEAD + " dollars".rjust(12) * bool(price)
    for s in stages:
        pace = f"{s.seconds:>9.4g} {s.images / s.seconds:>9.4g}"
        pace = f"{'-':>9} {'-':>9}" if s.bound else pace
        line = f"{s.name:<12} {s.steps:>9.0f} {pace} {s.flops / 1e12:>10.3g}"
        yield line + end(s.hours, s.bound)
    total = sum(s.hours for s in stages)
    yield f"{'total':<12} {'':>40}" + end(total, any(s.bound for s in stages))


def fit(gpu, size, fixed, each, images, cfg):
    """Whether a process fits a GPU of `size` bytes, and if not, which --accumulate makes it.

    Its `images` take `each` bytes, beside the `fixed` ones.
    """
    limit = USABLE * size
    need = fixed + each * -(-images // cfg.accumulate)
    words = f"{size_text(need)} of {size_text(limit)} that can be used"
    if need <= limit:
        return f"fits {gpu}: about {words}"
    parts = fewest_parts(fixed, each, images, limit)
    hint = "not even one image at a time does"
    if parts:
        less = size_text(fixed + each * -(-images // parts))
        hint = f"--accumulate {parts} makes it fit, with about {less}"
    elif not getattr(cfg, "use_checkpoint", True):
        hint += "; try --use-checkpoint"
    return f"does NOT fit {gpu}: about {words}; {hint}"
