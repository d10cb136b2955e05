"""Networks that others ship, and weights for them where the published files cannot be had."""

from runtime.commandline import BadInput

import contextlib
import importlib
from unittest import mock

import torch

# Operators that torchvision asks for when it is imported; a torchvision of another build of PyTorch
# lacks them. Only their names must exist: no network calls them.
OPERATORS = {"nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"}
OPERATORS["qnms"] = OPERATORS["nms"]
_library = None  # operators are gone when the library that defined them is


def import_references():
    """Make `import torchvision` work, and what imports it: pytorch_fid, torchmetrics, clean-fid."""
    global _library
    if _library is not None:
        return
    with contextlib.suppress(RuntimeError):
        importlib.import_module("torchvision")  # one that fits defines the operators itself
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(name + schema)


@contextlib.contextmanager
def needing_diffusers():
    """In this context diffusers can be imported; BadInput if it, or what it needs, is missing."""
    with contextlib.suppress(ModuleNotFoundError):  # diffusers can do without torchvision
        import_references()
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(
            f"diffusers, which this compares with, cannot be loaded (no module {error.name}): "
            'type pip install -e ".[test]"'
        ) from None


def random_weights(seed, variant="fid"):
    """A seeded state dict in the published layout: 94 convolutions, as many norms, a classifier.

    He's initialisation; scales and shifts of the norms are drawn, their running means and
    variances are those of four images of shapes and grain. So no layer's output grows or dies, and
    what reaches the end depends on the image. variant: "fid" or "torchvision", whose dictionary
    has the auxiliary classifier too.
    """
    import_references()
    import torchvision

    fid = variant == "fid"
    with torch.device("meta"):  # torchvision's own random weights take half a minute
        net = torchvision.models.inception_v3(
            weights=None, num_classes=1008 if fid else 1000, aux_logits=not fid, init_weights=False
        )
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(".bn.weight"):
                tensor.uniform_(0.75, 1.25, generator=generator)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith("weight"):
                gain = 2.0 if tensor.ndim == 4 else 1.0  # a ReLU halves the square
                tensor.normal_(0, (gain / tensor[0].numel()) ** 0.5, generator=generator)
            else:  # running means and variances, and the count of batches
                tensor.fill_("var" in name)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the next batch, and of no other
        coarse, fine = (torch.randn(4, 3, n, n, generator=generator) for n in (8, 299))
        x = 0.7 * torch.nn.functional.interpolate(coarse, 299, mode="bicubic") + 0.2 * fine
        net.train()(x.clamp(-1, 1))
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def pytorch_fid_network(state, **options):
    """pytorch_fid.inception.InceptionV3 with given weights, in place of those it would download."""
    import_references()
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        return inception.InceptionV3(**options).eval()
