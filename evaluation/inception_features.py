"""Images to the features of the Inception network, and the three ways to make them 299×299 pixels.

A figure depends on how images come to the size that the network takes. Parmar et al. 2022, "On
Aliased Resizing and Surprising Subtleties in GAN Evaluation", show by how much. Three ways are in
use; features of one are never compared with another's.

    pytorch-fid     bilinear between pixel centres, without smoothing, of the package of that name
    tf1             bilinear as TensorFlow 1 does, half a pixel off: the original, torch-fidelity
    clean           bicubic, smoothed where images shrink, as Pillow does: clean-fid

    extractor = load(resize="clean")  # downloads the weights (95 MB) the first time
    features, logits = extractor(images)  # uint8 (B, H, W, C) -> (B, 2048), (B, 1008)

The batch norms are folded into the convolutions and pixels lie channels last: on a CPU this is 2.0
times as fast as the same network as pytorch-fid runs it (bench/inception.py, RESULTS.md).
"""

from runtime.commandline import BadInput
from runtime.processes import exact

import hashlib

import torch

from networks.inception import Inception, find_weights, read_weights, unused

SIZE = 299  # pixels, of the network's input
PROTOCOLS = ("pytorch-fid", "tf1", "clean")
AT_ONCE = 32  # images that go through the network together: about 1 GB


# ------------------------------------------------------------------------------------- resizing
#
# Each protocol is linear and separable: an image X becomes A X Bᵀ, with one matrix for its rows and
# one for its columns. Two matrix products do on any device what each reference does.


def resize_matrix(n_in, n_out, protocol):
    """The float64 matrix (n_out, n_in) that resizes a line of n_in pixels; its rows add up to 1.

    In the two bilinear protocols the ratio of sizes and then each coordinate are rounded to
    float32, where the references do it: at 1024 pixels this alone moves a pixel by 5e-5 of the
    range. Raises BadInput for an unknown protocol.
    """
    check_protocol(protocol)
    if protocol == "clean":
        return _bicubic_matrix(n_in, n_out)
    ratio = torch.tensor(n_in / n_out, dtype=torch.float32).double()
    centre = 0.5 if protocol == "pytorch-fid" else 0.0  # of pixel 0; tf1 forgot that it is ½
    place = (torch.arange(n_out, dtype=torch.float64) + centre) * ratio - centre
    place = place.float().clamp(min=0)  # before the first centre there is nothing to blend with
    low = place.long().clamp(max=n_in - 1)  # (n_out,)
    high = (low + 1).clamp(max=n_in - 1)
    share = place.double() - low
    rows, matrix = torch.arange(n_out), torch.zeros(n_out, n_in, dtype=torch.float64)
    matrix[rows, low] = 1 - share
    matrix[rows, high] += share  # at the border both are the same pixel
    return matrix


def _bicubic_matrix(n_in, n_out):
    """Keys' cubic with a = -1/2, as wide as the pixels that become one where images shrink."""
    ratio = n_in / n_out
    width = max(ratio, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * ratio
    pixels = torch.arange(n_in, dtype=torch.float64)
    d = ((pixels + 0.5 - centre) / width).abs()  # (n_out, n_in)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)  # at the border fewer pixels share the sum of 1


def resize(images, matrices, protocol):
    """Float images (B, 3, H, W) in 0..255 -> (B, 3, 299, 299) in the range of the network.

    matrices: those of the height and of the width, float32, None where nothing is to be done.
    """
    rows, columns = matrices
    if rows is not None:
        images = rows @ images  # (B, 3, 299, W)
    if columns is not None:
        images = images @ columns.T  # (B, 3, 299, 299)
    if protocol == "pytorch-fid":
        return images / 127.5 - 1
    if protocol == "clean":  # a cubic overshoots at edges
        images = images.clamp(0, 255)
    return (images - 128) / 128


def check_protocol(protocol):
    if protocol not in PROTOCOLS:
        raise BadInput(f"no resize protocol {protocol!r}: name one of {', '.join(PROTOCOLS)}")


# --------------------------------------------------------------------------------- the extractor


class Extractor:
    """Features of images under given weights and a resize protocol.

    protocol      one line for people
    feature_hash  eight hex digits of weights, variant and resize protocol together: features, and
                  statistics of features, of two hashes do not compare
    dim, device   2048, and where the network is
    network       "Inception"
    """

    dim, network = Inception.dim, "Inception"

    def __init__(self, state, variant="fid", *, resize="pytorch-fid", device="cpu", name="given"):
        """state: what `read_weights` gives; name: of the weights, for the line `protocol`."""
        check_protocol(resize)
        digest = hashlib.sha256(f"{variant} {resize}".encode())
        for key in sorted(key for key in state if not unused(key)):
            digest.update(key.encode() + state[key].cpu().contiguous().numpy().tobytes())
        self.feature_hash, self.resize = digest.hexdigest()[:8], resize
        self.device = torch.device(device)
        graph = {"fid": "Inception 2015-12-05", "torchvision": "Inception v3 of torchvision"}
        self.protocol = (
            f"{graph[variant]}, {self.dim}-d, resize {resize}, weights {name}, "
            f"feature hash {self.feature_hash}"
        )
        with torch.device("meta"):  # without the time that random weights would take
            net = Inception(variant)
        net.load_state_dict(state, strict=False, assign=True)
        net = net.requires_grad_(False).eval().fold()
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.matrices = {}

    @torch.inference_mode()
    def __call__(self, images, spatial=False):
        """uint8 (B, H, W, C), C 1 or 3 -> float32 features (B, 2048), logits (B, K) on the device.

        With `spatial` also (B, 2023), for sFID. An image's features do not depend on the batch it
        is in, up to rounding. Raises BadInput for images of another form.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            form = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise BadInput(f"expected images uint8 (B, H, W, C) with C 1 or 3, got {form}")
        matrices = [self._matrix(side) for side in images.shape[1:3]]
        with exact(), torch.autocast(self.device.type, enabled=False):
            parts = [self._part(part, matrices) for part in images.split(AT_ONCE)]
        found = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        return tuple(found if spatial else found[:2])

    def _part(self, images, matrices):
        x = images.to(self.device).permute(0, 3, 1, 2).float()  # (B, C, H, W) in 0..255
        x = resize(x.expand(-1, 3, -1, -1), matrices, self.resize)  # (B, 3, 299, 299) in [-1, 1]
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def _matrix(self, side):
        if side == SIZE:  # of all three protocols the identity
            return None
        if side not in self.matrices:
            matrix = resize_matrix(side, SIZE, self.resize)
            self.matrices[side] = matrix.to(self.device, torch.float32)
        return self.matrices[side]


def load(weights="", root="data", resize="pytorch-fid", device="cpu", patience=None):
    """An Extractor.

    weights   a .pth in the layout of pytorch-fid (torch-fidelity's is the same) or of torchvision's
              inception_v3; "fid" (or nothing) and "torchvision" name the published files, which are
              kept in root/inception and downloaded when missing, their SHA-256 checked
    resize    one of PROTOCOLS
    patience  seconds within which a download must begin; None waits as long as others do

    Raises BadInput where the weights cannot be had or are others.
    """
    check_protocol(resize)
    path = find_weights(weights, root, patience)
    variant, state = read_weights(path)
    return Extractor(state, variant, resize=resize, device=device, name=path.name)


class WithSpatial:
    """The Inception extractor, with its spatial features in the place of the logits."""

    def __init__(self, extractor):
        self.extractor, self.device = extractor, extractor.device

    def __call__(self, images):
        feats, _, spatial = self.extractor(images, spatial=True)
        return feats, spatial
