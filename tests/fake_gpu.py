"""A GPU that is not there: tensors without values on "cuda:0", and whoever would wait for it fails.

    with fake_gpu(monkeypatch) as watch:        ordinary code, on torch.device("cuda:0")
        with watch:                             here it must not wait
            ...

Fake tensors have a shape, a dtype and a device, so that code runs on a machine without a GPU as it
would with one, but for the numbers.
"""

import collections
import contextlib
import ctypes
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels import dispatch

DEVICE = torch.device("cuda:0")
# Operations of which the host wants to know a value, or a size that depends on values.
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "argwhere",
    "masked_select",
    "equal",
}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"}
READS |= {"allclose", "histogram", "_linalg_check_errors"}


class Waits(AssertionError):
    """The host would wait for the device."""


class Watch(TorchDispatchMode):
    """Raises Waits where an operation would make the host wait for the GPU.

    pinned      {address: tensor} of pinned memory
    uploads     how many copies went to the GPU
    names       how often each operation came on it, a Counter
    casts       how often tensors of each storage went to a type of 16 bits, a Counter
    """

    def __init__(self):
        super().__init__()
        self.pinned, self.uploads = {}, 0
        self.names, self.casts = collections.Counter(), collections.Counter()
        self.entered, self.truth = 0, torch.Tensor.__bool__

    def __enter__(self):
        self.entered += 1
        return super().__enter__()

    def __exit__(self, *error):
        self.entered -= 1
        return super().__exit__(*error)

    def bool_of(self, tensor):
        """In the place of Tensor.__bool__: before and after the steps, what is checked is true."""
        return self.truth(tensor) if self.entered else True

    def pin(self, tensor):
        """In the place of Tensor.pin_memory."""
        with _disable_current_modes():
            copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(tensors_of((args, kwargs)))
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        elsewhere = [tensor for tensor in tensors if not tensor.is_cuda]
        name = function._schema.name.partition("::")[2]
        self.names[name] += bool(on_gpu)
        if name == "_to_copy" and getattr(kwargs.get("dtype"), "itemsize", 0) == 2:
            self.casts[storage_of(args[0])] += 1
        if name in ("_to_copy", "copy_", "_copy_from", "_foreach_copy_"):
            self.check_copy(name, args, kwargs)
        elif on_gpu:
            if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
                raise Waits(f"{function} reads a value")
            if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1:
                masks = [i for i in tensors_of(args[1]) if i.dtype in (torch.bool, torch.uint8)]
                if masks and isinstance(args[1], (list, tuple)):
                    raise Waits(f"{function} counts the places of a mask")
            number = torch.Tag.pointwise in function.tags and name != "where"
            if any(tensor.ndim or not number for tensor in elsewhere):
                raise Waits(f"{function} takes a tensor on the CPU to the GPU")
        return function(*args, **kwargs)

    def check_copy(self, name, args, kwargs):
        """Raise Waits for a copy between host and device that the host waits for."""
        if name == "_to_copy":
            pairs = [(kwargs.get("device") or args[0].device, args[0])]
            later = kwargs.get("non_blocking", False)
        else:
            first, second = (list(tensors_of(side)) for side in args[:2])
            pairs = [(a.device, b) for a, b in zip(first, second, strict=True)]
            later = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for to, source in pairs:
            if torch.device(to).type == source.device.type:
                continue
            if source.is_cuda:
                raise Waits("a copy to the CPU")
            if not later or source.untyped_storage().data_ptr() not in self.pinned:
                raise Waits(f"a copy of {tuple(source.shape)} to the GPU, from ordinary memory")
            self.uploads += 1


def storage_of(tensor):
    """A number that tensors share which are views of one another, as long as they live."""
    return tensor.untyped_storage()._cdata


def tensors_of(value):
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def moved(net, device=None, memory_format=None):
    """In the place of nn.Module.to, which swaps tensors: fake ones cannot be."""
    for module in net.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    new = value.detach().to(device or value.device)
                    if memory_format is not None and new.ndim == 4:
                        new = new.clone(memory_format=memory_format)
                    grad = value.requires_grad
                    kept[name] = nn.Parameter(new, grad) if kept is module._parameters else new
    return net


@contextlib.contextmanager
def guarded():
    """Inside, a PyTorch for CPUs alone has a device guard for CUDA: the CPU's, which does nothing.

    A PyTorch for CUDA has one, and FakeTensorMode sees to it where there is no GPU.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]  # of DeviceType::CUDA; 0 is the CPU
    guards[1] = before or guards[0]
    try:
        yield
    finally:
        guards[1] = before


def gradients(outputs, grads):
    """{leaf: its gradient}: what PyTorch's engine does, which asks for streams of a real GPU."""
    waiting, found, seen = {}, {}, [output.grad_fn for output in outputs]
    for node in seen:  # grows
        for later, _ in node.next_functions:
            if later is not None:
                if later not in waiting:
                    seen.append(later)
                waiting[later] = waiting.get(later, 0) + 1
    given = {node: {} for node in seen}
    for output, grad in zip(outputs, grads, strict=True):
        given[output.grad_fn][output.output_nr] = grad
    ready = [node for node in seen if node not in waiting]
    while ready:
        node = ready.pop()
        about = node._input_metadata
        into = [given[node].get(i) for i in range(len(about))]
        if hasattr(node, "variable"):
            found[node.variable] = into[0]
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            new = torch.zeros
            into = [
                new(a.shape, dtype=a.dtype, device=a.device) if grad is None else grad
                for grad, a in zip(into, about, strict=True)
            ]
        made = node.apply(*into) if hasattr(node, "apply") else node(*into)
        made = made if isinstance(made, tuple) else (made,)
        # Of a Function's inputs, also those that are no tensors have a place in `made`.
        wanted = getattr(node, "needs_input_grad", [later for later, _ in node.next_functions])
        made = [grad for grad, one in zip(made, wanted, strict=True) if one]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        for (later, place), grad in zip(edges, made, strict=True):
            if grad is not None:
                meta = later._input_metadata[place]
                grad = grad.sum_to_size(meta.shape).to(meta.dtype)
                others = given[later].get(place)
                given[later][place] = grad if others is None else others + grad
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
    return found


@torch.no_grad()
def backward(loss):
    """In the place of Tensor.backward."""
    for leaf, grad in gradients([loss], [torch.ones_like(loss)]).items():
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


@torch.no_grad()
def grad_of(output, leaf, retain_graph=True):
    """In the place of torch.autograd.grad."""
    return (gradients([output], [torch.ones_like(output)])[leaf],)


def must_not(*args, **kwargs):
    raise Waits("synchronize")


@contextlib.contextmanager
def fake_gpu(monkeypatch, arch=(9, 0)):
    """Inside, torch.device("cuda:0") can be used, and kernels run on it; gives a Watch to enter."""
    watch = Watch()
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", grad_of)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: watch.pin(tensor))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: watch.bool_of(tensor))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: arch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU of tests")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", must_not)
    monkeypatch.setitem(dispatch._archs, DEVICE, 10 * arch[0] + arch[1])
    with guarded(), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield watch
