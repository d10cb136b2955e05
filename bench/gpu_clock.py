"""How long does it take on a GPU? Device and host apart; on a CPU, whatever runs, without meaning.

device_us   microseconds of the GPU's work alone: the queue is filled while the GPU naps
host_us     microseconds that Python needs to queue a call, the GPU's work not waited for
wall_ms     milliseconds of a call in a row of calls, host and GPU together, as a user waits
graphed     a call captured in a CUDA graph: what remains of it where the host costs nothing
"""

import contextlib
import statistics
import time

import torch

CYCLES = 2000  # of the nap's clock in a microsecond, rounded up


def on_gpu():
    return torch.cuda.is_available()


def synchronize():
    if on_gpu():
        torch.cuda.synchronize()


def host_us(call, calls=20, rounds=5):
    """The least of a few rounds: what else the machine does only ever adds."""
    least = float("inf")
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - start) / calls)
    synchronize()
    return 1e6 * least


def spans(call, repeats, flush=None, nap=0):
    """Milliseconds between two events, one before and one after each of `repeats` calls on a GPU.

    Before the first of them `flush`, if given, is zeroed, and the GPU naps for so many cycles.
    """
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        if flush is not None:
            flush.zero_()
        if nap:
            torch.cuda._sleep(nap)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def device_us(call, flush=None, repeats=30, rounds=3):
    """Median over rounds of medians.

    flush: a tensor larger than the L2 cache, zeroed before each call, so that inputs come from
    memory. Then the GPU naps for as long as the host needs to queue the call: else the time between
    the two events would be the host's.
    """
    for _ in range(3):
        call()
    if not on_gpu():
        return wall_ms(call, 1, 1) * 1e3
    nap = int(CYCLES * min(max(3 * host_us(call, rounds=2), 100), 5000))
    medians = [statistics.median(spans(call, repeats, flush, nap)) for _ in range(rounds)]
    return 1e3 * statistics.median(medians)


def wall_ms(call, calls=20, rounds=3):
    """Median over rounds; a round ends when the GPU has done all its calls."""
    for _ in range(2):
        call()
    found = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        found.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(found)


def graphed(call):
    """A function that replays `call` as it was captured; `call` itself where there is no GPU."""
    if not on_gpu():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated or chosen once is so before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def peak_memory(values):
    """Puts the most memory that PyTorch held within into values["peak_mb"]."""
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if on_gpu():
        values["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
