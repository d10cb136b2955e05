"""Every autoencoder that can be a first stage, built by its kind or read from files.

    kl      small_autoencoder.Autoencoder           vq      the same with vq.Codebook
    ldm     kl_autoencoder.KLVAE                    tiny    kl_autoencoder.TinyAutoencoder

    ae = load_autoencoder(path)                 a checkpoint of one trained here, or a published one
    mean, log_var = ae.encode(x)                x (B,C,H,W) in [-1,1] -> (B,z,H/f,W/f) each
    x_hat = ae.decode(mean)
    ae.channels, ae.z_channels, ae.factor       C, z, f
    build(**ae.settings)                        the same network, without its weights

ae.settings are plain values: a checkpoint that keeps them beside the weights needs no other file.
"""

from runtime import checkpoints
from runtime.commandline import BadInput
from runtime.processes import exact

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from networks.kl_autoencoder import KLVAE, TinyAutoencoder, load_pretrained
from networks.small_autoencoder import Autoencoder
from networks.vq import Codebook, VQAutoencoder


def build(kind, **settings):
    """The autoencoder of this kind with these settings, in training mode, of random weights.

    settings are the keywords of the class, of vq those of Autoencoder and codebook, the number of
    its codes. BadInput for a kind that there is not.
    """
    classes = {"kl": Autoencoder, "ldm": KLVAE, "tiny": TinyAutoencoder}
    if kind == "vq":
        size = settings.pop("codebook")
        ae = Autoencoder(**settings, variance=False)
        ae = VQAutoencoder(ae, Codebook(size, ae.z_channels))
    elif kind in classes:
        ae = classes[kind](**settings)
    else:
        raise BadInput(f"autoencoder {kind}: there are kl, vq, ldm and tiny")
    return ae.to(memory_format=torch.channels_last)


def load_autoencoder(path, device="cpu", ema=None, flag="--ae"):
    """The autoencoder at `path`, frozen and in eval mode.

    path    a checkpoint of autoencoder.py, or of a latent chapter, which holds its first stage;
            or what networks.published.autoencoder.read_autoencoder takes
    ema     of a checkpoint the running mean of this decay; without it, or 0, the weights as such
    flag    named in BadInput, which is raised for a path that is not there and for other files
    """
    if not path or not Path(path).exists():
        raise BadInput(
            f"{flag} {path}: expected the file or folder of an autoencoder, published or trained "
            "here, which is not there"
        )
    state = own_checkpoint(path)
    if ema and (state is None or "ae" in state or not state["config"]["ema"]):
        raise BadInput(f"--ema {ema:g}: {path} holds no running means of it; leave it out")
    if state is None:
        return load_pretrained(path, device)[0]
    if "ae" in state:  # of a latent chapter
        settings, weights = state["ae"], state["autoencoder"]
    else:
        settings, weights = state.get("settings", {}), state.get("model")
    if "kind" not in settings:
        raise BadInput(
            f"{flag} {path} is a checkpoint of {state['script']}.py, which holds no autoencoder"
        )
    if ema:
        weights = checkpoints.chosen_ema(state, path, ema)
    return frozen(settings, weights, path, device)


def frozen(settings, weights, path, device):
    """The autoencoder of these settings and weights, of the file `path`, in eval mode."""
    ae = checkpoints.built(lambda: build(**settings), weights, path)
    return ae.to(device).eval().requires_grad_(False)


def autoencoder_of(state, path, device):
    """The frozen autoencoder of a checkpoint `state`, at path, of what draws latents.

    BadInput for latents of no finite scale.
    """
    if not 0 < abs(state["scale"]) < math.inf:
        raise BadInput(f"{path}: latents of scale {state['scale']}; expected a finite number")
    return frozen(state["ae"], state["autoencoder"], path, device)


@dataclass
class Space:
    """What a network draws: images of shape (C,H,W), or latents of them times `scale`."""

    shape: tuple[int, int, int]
    ae: nn.Module | None = None
    scale: float = 1.0

    @classmethod
    def of_checkpoint(cls, state, path, device):
        """That of a checkpoint `state`, at path, which holds `facts` where they are latents."""
        shape = tuple(state["shape"])
        if "ae" not in state:
            return cls(shape)
        return cls(shape, autoencoder_of(state, path, device), state["scale"])

    @property
    def z_shape(self):
        """(C,h,w) of what is drawn."""
        return latent_shape(self.ae, self.shape) if self.ae else self.shape

    @property
    def facts(self):
        """What a checkpoint holds of latents."""
        if not self.ae:
            return {}
        facts = {"scale": self.scale, "ae": self.ae.settings}
        return facts | {"autoencoder": self.ae.state_dict()}

    @torch.no_grad()
    def decode(self, z):
        """Images (B,C,H,W) of what was drawn, in fp32: half precision overflows in decoders."""
        with exact():
            return self.ae.decode(z.float() / self.scale) if self.ae else z


def own_checkpoint(path):
    """The checkpoint of a script of ours, or None where `path` is something else."""
    if not str(path).endswith(".pt"):
        return None
    try:
        return checkpoints.load_checkpoint(path, mapped=True)
    except checkpoints.WrongSums:
        raise
    except BadInput:  # of others, or damaged: who reads published files says so
        return None


def decode_in_tiles(ae, z, tile):
    """ae.decode(z), (B,C,f*h,f*w), of latents z (B,z,h,w), in the memory of tile x tile of them.

    Neighbours share a quarter of a tile or more, where the one fades into the other on a straight
    line. A norm sees its tile alone, so that tints may differ a little from those of one call,
    which latents of at most tile x tile get.
    """
    return _in_tiles(ae.decode, z, tile, 1, ae.factor)


def encode_in_tiles(ae, x, tile):
    """The mean ae.encode(x)[0], (B,z,H/f,W/f), of images x (B,C,H,W), tile by tile in that way."""
    return _in_tiles(lambda part: ae.encode(part)[0], x, tile, ae.factor, 1)


def _in_tiles(make, x, tile, of_x, of_y, overlap=0.25):
    """make(x): a latent is of_x of x high and wide, and of_y of what make gives."""
    height, width = (side // of_x for side in x.shape[2:])
    if max(height, width) <= tile:
        return make(x)

    def starts(length):
        count = 1 + math.ceil(max(0, length - tile) / (tile * (1 - overlap)))
        return torch.linspace(0, max(0, length - tile), count).round().int().tolist()

    def ramp(length):  # 1 in the middle, falling to nearly 0 at both ends
        place = torch.arange(length, dtype=x.dtype, device=x.device) + 0.5
        return (torch.minimum(place, length - place) / (overlap * length)).clamp(max=1)

    total = weights = 0
    for top in starts(height):
        for left in starts(width):
            down, right = (slice(of_x * at, of_x * (at + tile)) for at in (top, left))
            part = make(x[:, :, down, right])  # (B,C,of_y*tile,of_y*tile)
            weight = ramp(part.shape[2])[:, None] * ramp(part.shape[3])
            before, above = of_y * left, of_y * top
            rest = (before, of_y * width - before - part.shape[3])
            rest += (above, of_y * height - above - part.shape[2])
            total, weights = total + F.pad(part * weight, rest), weights + F.pad(weight, rest)
    return total / weights


def latent_shape(ae, shape, flag="--ae"):
    """(z,h,w) of the latents of images of `shape` (C,H,W).

    BadInput for images of other channels, or of a size that cannot be made ae.factor times smaller.
    """
    channels, height, width = shape
    if ae.channels != channels:
        raise BadInput(
            f"{flag}: the autoencoder takes images of {ae.channels} channels, these have {channels}"
            ": choose others, or another autoencoder"
        )
    if height % ae.factor or width % ae.factor:
        near = -(-min(height, width) // ae.factor) * ae.factor
        raise BadInput(
            f"images of {height}x{width} cannot be made {ae.factor} times smaller by the "
            f"autoencoder; sizes must be multiples of {ae.factor}: type --size {near}"
        )
    return ae.z_channels, height // ae.factor, width // ae.factor
