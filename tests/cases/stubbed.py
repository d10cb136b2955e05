"""The host's side of a launch without a GPU: all that Python does, but for the launch itself.

    with stubbed_launches() as seen:
        group_norm_silu(x, ...)  # CPU tensors stand in for those of a GPU; nothing is computed
    print(seen.launches, seen.asked)

Kernels are compiled for the target, remembered and called as on a GPU. In place of the launcher in
C stands Python that asks each tensor for its address, as the launcher does; what it costs is a part
of every time that is taken here. TRITON_INTERPRET must not be set.
"""

import contextlib
import types

import triton
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import dispatch
from tests.cases.offline import _NoGPU, planned_for


@contextlib.contextmanager
def stubbed_launches(target="sm_90", keep=False):
    """Operations on CPU tensors inside go the way of CUDA tensors.

    Gives an object with three lists: `launches`, names of kernels in the order of their launches;
    with `keep`, `given`, what each got, (grid, ...) and its arguments; and `asked`, the names of
    those launches that Triton was asked to look at.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches are stubbed only where TRITON_INTERPRET is not set")
    seen = types.SimpleNamespace(launches=[], given=[], asked=[])
    ask, load = JITFunction.run, CompiledKernel._init_handles

    def noted(self, *args, **kwargs):
        seen.asked.append(self.__name__)
        return ask(self, *args, **kwargs)

    def stub(self):
        if self.module is None:
            name = self.name

            def run(grid0, grid1, grid2, stream, function, metadata, launch, enter, leave, *args):
                for arg in args:
                    if hasattr(arg, "data_ptr"):
                        arg.data_ptr()
                seen.launches.append(name)
                if keep:  # tensors that live on cost the time of fetching memory for others
                    seen.given.append(((grid0, grid1, grid2, stream, function, metadata), args))

            self.module, self.function, self._run = 1, 0, run

    interpret, active = dispatch.INTERPRET, driver._active
    JITFunction.run, CompiledKernel._init_handles, dispatch.INTERPRET = noted, stub, True
    driver.set_active(_Stub(target))
    try:
        with planned_for(int(target[3:])):
            yield seen
    finally:
        JITFunction.run, CompiledKernel._init_handles, dispatch.INTERPRET = ask, load, interpret
        driver._active = active


class _Stub(_NoGPU):
    """A driver whose kernels are compiled and stubbed, apart from those that are only compiled."""

    numbers = iter(range(1000, 10**9))

    def __init__(self, name):
        super().__init__(name)
        self.device = next(self.numbers)
