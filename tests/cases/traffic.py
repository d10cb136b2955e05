"""The bytes that a kernel moves, counted lane by lane in Triton's interpreter.

    with count_traffic(x=x, y=y) as traffic:  # TRITON_INTERPRET=1
        group_norm_silu(x, ...)
    print(traffic.ratio)

Counted is what the lanes of loads, stores and atomics ask of global memory, and whether they stay
within the tensors that the launch was given. Programs run one after another in the interpreter, so
a race between two programs does no harm here; it is found by who touched what.
"""

import contextlib
import dataclasses

import numpy as np
import triton
from triton.runtime import interpreter

SECTOR = 32  # bytes: the least that a GPU's L2 cache or memory moves


@dataclasses.dataclass
class Traffic:
    """What was counted between entering and leaving `count_traffic`.

    loaded, stored: bytes, an address repeated within one load or store counted once (all lanes of
        a program then share one value). floor: distinct bytes loaded plus distinct bytes stored,
        over all launches: every input read once and every output written once.
    sectors: bytes of the 32-byte sectors that each load or store touches, summed.
    of: {name: (bytes loaded, bytes stored)} of the tensors given by name.
    out_of_bounds: lanes outside all tensors that their launch was given.
    write_write: addresses that two programs of one launch store to.
    read_write: loads by one program of what another one of the same launch stores.
    launches: (kernel's name, grid) of each launch.
    """

    loaded: int = 0
    stored: int = 0
    floor: int = 0
    sectors: int = 0
    of: dict = dataclasses.field(default_factory=dict)
    out_of_bounds: int = 0
    write_write: int = 0
    read_write: int = 0
    launches: list = dataclasses.field(default_factory=list)

    @property
    def ratio(self):
        """Bytes moved over the floor: 1 is as good as can be."""
        return (self.loaded + self.stored) / max(1, self.floor)

    @property
    def sector_ratio(self):
        """Bytes of the sectors touched over the floor."""
        return self.sectors / max(1, self.floor)


@dataclasses.dataclass
class _Access:
    """The lanes of one load, store or atomic operation of one program."""

    kind: str
    addresses: np.ndarray  # uint64, of lanes that are not masked off
    size: int  # bytes of an element
    launch: int
    program: int


@contextlib.contextmanager
def count_traffic(**tensors):
    """Count the traffic of all kernels launched inside; the figures are there after the block.

    tensors: inputs and outputs by name, for `of`. Raises RuntimeError where kernels are not
    interpreted.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in the interpreter: set TRITON_INTERPRET=1")
    traffic, accesses, given = Traffic(), [], []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, call = builder.create_atomic_rmw, builder.create_atomic_cas, executor.__call__

    def note(kind, self, pointers, mask):
        addresses = np.asarray(pointers.data)
        lanes = np.broadcast_to(True if mask is None else np.asarray(mask.data), addresses.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        program = np.ravel_multi_index(self.grid_idx, self.grid_dim)
        touched = addresses[lanes.astype(bool)].astype(np.uint64)
        accesses.append(_Access(kind, touched, size, len(traffic.launches), int(program)))

    def counted_load(self, pointers, mask, *rest):
        note("load", self, pointers, mask)
        return masked_load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        note("store", self, pointers, mask)
        return masked_store(self, pointers, value, mask, *rest)

    def counted_rmw(self, operation, pointers, value, mask, *rest):
        note("atomic", self, pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    def counted_cas(self, pointers, *rest):
        note("atomic", self, pointers, None)
        return cas(self, pointers, *rest)

    def counted_call(self, *args, **kwargs):
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        traffic.launches.append((self.fn.__name__, tuple(grid)))
        tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "data_ptr")]
        given.append([_extent(tensor) for tensor in tensors])
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, builder.create_atomic_cas = counted_rmw, counted_cas
    executor.__call__ = counted_call
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
        builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
        executor.__call__ = call
    _sum_up(traffic, accesses, {name: _extent(tensor) for name, tensor in tensors.items()})
    for launch, extents in enumerate(given, start=1):
        of_launch = [access for access in accesses if access.launch == launch]
        _find_races(traffic, of_launch)
        for access in of_launch:
            traffic.out_of_bounds += int((~_inside(access, extents)).sum())


def _extent(tensor):
    """First address of a tensor's elements, and the one after the last."""
    last = sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


def _inside(access, extents):
    inside = np.zeros(access.addresses.shape, bool)
    for start, end in extents:
        inside |= (access.addresses >= start) & (access.addresses + access.size <= end)
    return inside


def _sum_up(traffic, accesses, extents):
    traffic.of = {name: (0, 0) for name in extents}
    distinct = {"load": {}, "store": {}}  # kind -> size -> list of addresses
    for access in accesses:
        unique = np.unique(access.addresses)
        loads = access.size * unique.size * (access.kind in ("load", "atomic"))
        stores = access.size * unique.size * (access.kind in ("store", "atomic"))
        traffic.loaded, traffic.stored = traffic.loaded + loads, traffic.stored + stores
        sectors = SECTOR * np.unique(unique // SECTOR).size
        traffic.sectors += sectors * (bool(loads) + bool(stores))
        for kind, moved in (("load", loads), ("store", stores)):
            if moved:
                distinct[kind].setdefault(access.size, []).append(unique)
        for name, (start, end) in extents.items():
            mine = access.size * int(((unique >= start) & (unique < end)).sum())
            before = traffic.of[name]
            traffic.of[name] = (before[0] + mine * bool(loads), before[1] + mine * bool(stores))
    for by_size in distinct.values():
        for size, addresses in by_size.items():
            traffic.floor += size * np.unique(np.concatenate(addresses)).size


def _find_races(traffic, accesses):
    """Addresses of one launch that two programs store to, or one stores and another loads."""

    def pairs(kinds):
        """(address, program), each once, sorted."""
        found = [
            np.stack([a.addresses, np.full(a.addresses.size, a.program, np.uint64)], axis=1)
            for a in accesses
            if a.kind in kinds
        ]
        return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.uint64)

    stores, loads = pairs(("store",)), pairs(("load", "atomic"))
    address, first, writers = np.unique(stores[:, 0], return_index=True, return_counts=True)
    traffic.write_write += int((writers > 1).sum())
    shared = loads[np.isin(loads[:, 0], address)]
    place = np.searchsorted(address, shared[:, 0])
    other = (stores[first[place], 1] != shared[:, 1]) | (writers[place] > 1)
    traffic.read_write += int(other.sum())
