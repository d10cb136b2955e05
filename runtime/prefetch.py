"""What a step needs from the host reaches the GPU in one copy, made ready a step ahead.

    ahead = Ahead(world, parts)            parts(step) are all parts of a step, as of Run.parts
    t = ahead(part, draw, "t", 1000)       draw(part, "t", 1000), a numpy array, on world's device

A copy from ordinary memory makes the host wait until the GPU has done all that was queued before.
What one step asks for, the next asks for, too, and an array is a function of its part and arguments
alone. So while a step runs, a thread makes all arrays of the next one and lays them side by side in
pinned memory, from where one copy takes them to the GPU while nobody waits. The first two steps
bring their arrays one by one.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ALIGNED = 16  # bytes: an array begins at a multiple, so that its bytes can be seen as any type


class Ahead:
    """ahead(part, make, *arguments): the array make(part, *arguments) as a tensor on the device.

    world   a World, whose device is a GPU
    parts   function of a step that gives all parts of this process, each with .step and .where

    make runs in a thread, a step early: it must not depend on what a step changes. What it raises
    comes out of the step that wanted the array. Nobody writes into the tensor.
    """

    def __init__(self, world, parts):
        self.world, self.parts = world, parts
        # A thread begins on GPU 0: without this, that of every process would take memory there.
        on_it = torch.get_device_module(world.device).set_device
        self.thread = ThreadPoolExecutor(1, "prefetch", on_it, (world.device,))
        self.step = self.coming = None  # the step whose arrays are `ready`; the block of the next
        self.asked, self.ready = {}, {}  # (place, make, *arguments): None; the tensor

    def __call__(self, part, make, *arguments):
        if part.step != self.step:
            self._turn_to(part.step)
        wanted = (part.where.start, make, *arguments)
        self.asked[wanted] = None
        if wanted not in self.ready:
            self.ready[wanted] = self.world.upload(make(part, *arguments))
        return self.ready[wanted]

    def _turn_to(self, step):
        """Bring the block of this step, if it was foreseen, and have that of the next one made."""
        foreseen = self.coming is not None and self.step == step - 1
        block, arrays = self.coming.result() if foreseen else (None, {})
        asked, self.asked, self.ready, self.step = self.asked, {}, {}, step
        self.coming = self.thread.submit(self._make, step + 1, asked) if asked else None
        if arrays:
            block = block.to(self.world.device, non_blocking=True)
        for wanted, (start, array) in arrays.items():
            bytes_of_it = block[start : start + array.nbytes]
            dtype = torch.from_numpy(array).dtype
            self.ready[wanted] = bytes_of_it.view(dtype).view(array.shape)

    def _make(self, step, asked):
        """(one pinned block of all arrays that were asked for, {which: (first byte, array)})."""
        parts, arrays, end = {part.where.start: part for part in self.parts(step)}, {}, 0
        for wanted in asked:
            place, make, *arguments = wanted
            array = np.asarray(make(parts[place], *arguments), order="C")
            arrays[wanted] = end, array
            end += -(-array.nbytes // ALIGNED) * ALIGNED
        block = np.empty(end, np.uint8)
        for start, array in arrays.values():
            block[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        return torch.from_numpy(block).pin_memory(), arrays
