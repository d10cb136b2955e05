"""What a kernel becomes on a GPU that is not here: registers, spills, shared memory, instructions.

    with compiled_for("sm_90") as launches:
        group_norm_silu(x, ...)  # CPU tensors stand in for those of the GPU
    print(inspect_kernel(launches[0].kernel))

Inside `compiled_for` every `kernel[grid](...)` goes through Triton's real launch code, which
plans for the target, specialises on alignment, divisibility and constants as on the GPU, and
compiles down to machine code; then nothing is launched, so outputs stay as they were allocated. The
disassembler that comes with Triton tells the rest. TRITON_INTERPRET must not be set: it is read
where a kernel is defined.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import dispatch
from tests.cases.kernel_cases import forget_launches

CPU = torch.device("cpu")
CUDA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in CUDA}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Of a multiprocessor: warps that fit, blocks that fit, KiB of shared memory (CUDA C programming
# guide, technical specifications per compute capability). Each has 65,536 registers.
LIMITS = {
    75: (32, 16, 64),
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel[grid](...) as it would have run."""

    name: str
    grid: tuple
    kernel: object  # triton's CompiledKernel
    constants: dict  # what was passed by name: constexpr values, num_warps, num_stages


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled kernel asks of a GPU. Counts of instructions are in its text, not in time.

    registers: of each thread. spill_bytes: stores and loads of registers that did not fit.
    shared: bytes of a block. hgmma: warp-group matrix instructions (sm_90), hgmma_columns: {n:
    instructions} of those, n columns of the result at a time; mma: all matrix instructions (HMMA,
    HGMMA, tcgen05, MFMA). load_widths, store_widths: {bits: instructions} on
    global memory; async_copies: of those loads, which go straight to shared memory.
    occupancy: share of a multiprocessor's warps that can be resident at once; None on AMD.
    """

    name: str
    target: str
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    hgmma: int
    hgmma_columns: dict
    mma: int
    load_widths: dict
    store_widths: dict
    async_copies: int
    instructions: int
    occupancy: float | None


class _NoGPU:
    """A driver that knows its target and nothing else."""

    def __init__(self, name):
        self.target, self.device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device  # triton keeps compiled kernels by device: one number for each target

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")


def arch_of_target(target):
    """90 of "sm_90". AMD's GPUs, which take no kernels yet, are planned for as sm_80."""
    return int(target[3:]) if target in CUDA else 80


@contextlib.contextmanager
def planned_for(arch):
    """Launches of CPU tensors inside are planned as on a GPU of this architecture, 90 for sm_90."""
    planned = dispatch._archs[CPU]
    dispatch._archs[CPU] = arch
    forget_launches()
    try:
        yield
    finally:
        dispatch._archs[CPU] = planned
        forget_launches()


@contextlib.contextmanager
def compiled_for(target):
    """Compile what is launched inside for `target`, a key of TARGETS; gives the list of launches.

    Raises RuntimeError where TRITON_INTERPRET was set, KeyError for an unknown target.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled only where TRITON_INTERPRET is not set")
    launches, run, active = [], JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.__name__, tuple(grid), kernel, kwargs))
        return kernel

    driver.set_active(_NoGPU(target))
    JITFunction.run = compile_only
    try:
        with planned_for(arch_of_target(target)):
            yield launches
    finally:
        JITFunction.run = run
        driver._active = active


def inspect_kernel(kernel):
    """The Report of a CompiledKernel."""
    target = kernel.metadata.target
    return (_inspect_amd if target.backend == "hip" else _inspect_nvidia)(kernel.hash, kernel)


def _remember(inspect):
    """Look at each kernel once: a second launch of the same code has the same report."""
    seen = {}

    @functools.wraps(inspect)
    def remembered(key, kernel):
        if key not in seen:
            seen[key] = inspect(kernel)
        return seen[key]

    return remembered


def _cubin(kernel, folder):
    path = os.path.join(folder, "kernel.cubin")
    with open(path, "wb") as file:
        file.write(kernel.asm["cubin"])
    return path


def disassembled(kernel):
    """The machine code of a CompiledKernel for an NVIDIA GPU, as text."""
    with tempfile.TemporaryDirectory() as folder:
        return _output(triton.knobs.nvidia.cuobjdump.path, "-sass", _cubin(kernel, folder))


@_remember
def _inspect_nvidia(kernel):
    arch, ptx = kernel.metadata.target.arch, kernel.asm["ptx"]
    code = disassembled(kernel)
    with tempfile.TemporaryDirectory() as folder:
        cubin = _cubin(kernel, folder)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        # Spilled registers lie on the stack; only ptxas tells them from arrays that lie there too.
        spilled = _spill_bytes(ptx, arch, folder) if stack else 0

    # "        /*0a10*/                   @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;"
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
    count = collections.Counter(re.findall(pattern, code))

    def sum_of(*names):
        return sum(n for op, n in count.items() if op.split(".")[0] in names)

    tcgen05 = sum(n for op, n in count.items() if op.startswith("UTC") and "MMA" in op)
    return Report(
        name=kernel.metadata.name,
        target=f"sm_{arch}",
        warps=kernel.metadata.num_warps,
        registers=registers,
        spill_bytes=spilled,
        shared=kernel.metadata.shared,
        hgmma=sum_of("HGMMA"),
        hgmma_columns=_columns(count),
        mma=sum_of("HMMA", "HGMMA") + tcgen05,
        load_widths=_widths(count, "LDG", "LDGSTS"),
        store_widths=_widths(count, "STG"),
        async_copies=sum_of("LDGSTS"),
        instructions=sum(count.values()),
        occupancy=_occupancy(arch, registers, kernel.metadata.shared, kernel.metadata.num_warps),
    )


def _columns(count):
    """{n: instructions} of warp-group products: HGMMA.64x128x16.F32.BF16 has 128 columns."""
    columns = collections.Counter()
    for op, n in count.items():
        if shape := re.match(r"HGMMA\.64x(\d+)x\d+", op):
            columns[int(shape[1])] += n
    return dict(sorted(columns.items()))


def _widths(count, *names):
    """{bits: instructions} of the memory instructions `names`; no suffix means 32 bits."""
    widths = collections.Counter()
    for op, n in count.items():
        name, *suffixes = op.split(".")
        if name in names:
            sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths[next((sizes[s] for s in reversed(suffixes) if s in sizes), 32)] += n
    return dict(sorted(widths.items()))


def _spill_bytes(ptx, arch, folder):
    source = os.path.join(folder, "kernel.ptx")
    with open(source, "w") as file:
        file.write(ptx)
    flags = ("-v", "-lineinfo", "--regAllocOptLevel=2")  # as triton's own call
    gpu = f"--gpu-name={sm_arch_from_capability(arch)}"
    again = os.path.join(folder, "again.cubin")
    text = _output(get_ptxas(arch).path, *flags, gpu, source, "-o", again)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return int(spills[1]) + int(spills[2])


def _occupancy(arch, registers, shared, warps):
    warps_fit, blocks_fit, shared_kib = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in runs of 256
    blocks = min(
        65536 // (per_warp * warps),
        warps_fit // warps,
        blocks_fit,
        shared_kib * 1024 // (shared + 1024),  # 1 KiB of each block is the system's
    )
    return blocks * warps / warps_fit


@_remember
def _inspect_amd(kernel):
    code = kernel.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    count = collections.Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)\b", code, re.MULTILINE))
    sizes = {
        "ubyte": 8,
        "sbyte": 8,
        "byte": 8,
        "ushort": 16,
        "sshort": 16,
        "short": 16,
        "dword": 32,
        "dwordx2": 64,
        "dwordx3": 96,
        "dwordx4": 128,
    }

    def widths(verb):
        found = collections.Counter()
        for op, n in count.items():
            match = re.match(rf"(?:global|buffer)_{verb}_([a-z]+?(?:x\d)?)$", op)
            if match and match[1] in sizes:
                found[sizes[match[1]]] += n
        return dict(sorted(found.items()))

    return Report(
        name=kernel.metadata.name,
        target=kernel.metadata.target.arch,
        warps=kernel.metadata.num_warps,
        registers=field("vgpr_count"),
        spill_bytes=4 * 64 * field("vgpr_spill_count"),
        shared=kernel.metadata.shared,
        hgmma=0,
        hgmma_columns={},
        mma=sum(n for op, n in count.items() if op.startswith("v_mfma")),
        load_widths=widths("load"),
        store_widths=widths("store"),
        async_copies=0,
        instructions=sum(count.values()),
        occupancy=None,
    )


def _output(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
