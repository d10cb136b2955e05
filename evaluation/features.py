"""The network whose features compare two sets of images: a small classifier of the data set itself.

A network made for photographs of objects has little to say about gray digits. This one is trained
here, once, with a fixed recipe and seed, kept beside the data, and named by a hash of its weights.
It reads classes as well: how many samples look like what was asked for.

`extract` runs this or any other extractor over a set of images, on one process or several. An
extractor is a callable: uint8 tensor (B, H, W, C) -> features (B, d) and logits (B, K), or None for
these; with a `protocol` (one line for people), a `feature_hash`, `dim` and `device`.
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write, locked
from runtime.processes import World, progress

import contextlib
import hashlib
import itertools
import sys
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from image_data import batches, datasets

BATCH = 128  # images in a training step of the classifier


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def shape_text(images):
    return "x".join(map(str, images.shape[1:]))


class Classifier(nn.Module):
    """A small convolutional network; its features are what the Fréchet distance compares.

    Takes (B, C, H, W) in [-1, 1], H and W at least 8. Space-to-depth halves the image at once, then
    each 3×3 convolution but the first halves it again until a side is at most 7 pixels.
    """

    dim = 128

    def __init__(self, height, width, channels, num_classes):
        super().__init__()
        widths, side = [4 * channels, 32, 64, self.dim], min(height, width) / 8
        while side > 7:
            widths, side = [*widths, self.dim], side / 2
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1 if layer == 0 else 2, 1, bias=False)
            for layer, (i, o) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.head = nn.Linear(self.dim, num_classes)

    def features(self, x):
        """(B, C, H, W) -> (B, 128), none of them negative."""
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
        x = rearrange(x, "b c (h i) (w j) -> b (c i j) h w", i=2, j=2)  # (B, 4C, H/2, W/2)
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))  # (B, 32, H/2, W/2), (B, 64, H/4, W/4), (B, 128, H/8, W/8)
        return x.mean((2, 3))  # (B, 128)

    def forward(self, x):
        return self.head(self.features(x))  # (B, num_classes)


def shifted(x, most, generator):
    """Each image of (B, C, H, W) moved by its own -most..most pixels; the edge is repeated."""
    b, _, h, w = x.shape
    dy, dx = torch.randint(-most, most + 1, (2, b, 1), generator=generator).to(x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1)  # (B, H)
    cols = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)  # (B, W)
    image = torch.arange(b, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
    return x.permute(0, 3, 1, 2)


@contextlib.contextmanager
def exact_convolutions():
    """On a GPU too, fp32 without TF32's short products: features are the same as on the CPU."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@exact_convolutions()
def train_classifier(ds, steps, seed, device, lr=2e-2):
    """A Classifier of `ds`, the same for the same seed: AdamW, one-cycle rate, shifts of ±2 px."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(*ds.images.shape[1:], ds.num_classes)
    net = net.to(device, memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in progress(steps, f"training the {ds.name} classifier", over=range(steps)):
        x, y = batches.batch(ds, batches.indices(len(ds), BATCH, seed, step))
        loss = F.cross_entropy(net(shifted(x.to(device), 2, generator)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


class ClassifierFeatures:
    """A Classifier as an extractor; `facts` as `classifier` returns them, names of its classes."""

    def __init__(self, net, facts, class_names=()):
        self.net, self.facts, self.dim, self.class_names = net, facts, net.dim, class_names
        self.protocol, self.feature_hash = facts.get("protocol"), facts.get("feature_hash")
        self.device = net.head.weight.device

    def __call__(self, images):
        """uint8 (B, H, W, C) -> features (B, 128), logits (B, num_classes)."""
        x = images.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1  # (B, C, H, W)
        feats = self.net.features(x)
        return feats, self.net.head(feats)


@torch.inference_mode()
@exact_convolutions()
def extract(extractor, images, batch_size=256, world=None, store=np.empty, name="images"):
    """Features (N, d) and logits (N, K) or None, float32, of `images` uint8 (N, H, W, C).

    images may be a memory map. In every round each process of `world` takes `batch_size` images and
    all exchange their rows, so that memory does not grow with N. store(shape, np.float32) makes the
    arrays that keep the rows. Raises BadInput without images and for features that are not finite.
    """
    world, device = world or World(), getattr(extractor, "device", torch.device("cpu"))
    if not len(images):
        raise BadInput(f"{name} holds no images")
    kept, together = None, batch_size * world.size
    rounds = range(0, len(images), together)
    quiet = not world.is_main or len(rounds) < 9
    for start in progress(None, f"features of {name}", over=rounds, quiet=quiet):
        count = min(together, len(images) - start)
        share = world.share(count)
        # A process without a share in the last round computes a row that nobody keeps.
        first, own = start + min(share.start, count - 1), share.stop - share.start
        part = torch.from_numpy(np.array(images[first : first + max(own, 1)])).to(device)
        rows = [r if r is None else r[:own] for r in _pair(extractor(part))]
        rows = [r if r is None else world.collect(r.float(), count).cpu().numpy() for r in rows]
        if not np.isfinite(rows[0]).all():
            which = f"{start} to {start + count - 1}"
            raise BadInput(f"{name}: features of images {which} are not finite")
        if kept is None:
            kept = [r if r is None else store((len(images), r.shape[1]), np.float32) for r in rows]
        for whole, part in zip(kept, rows, strict=True):
            if part is not None:
                whole[start : start + count] = part
    return kept


def _pair(found):
    """(features, logits) of what an extractor returns, arrays or tensors: both, or features."""
    feats, logits = found if isinstance(found, tuple | list) else (found, None)
    return torch.as_tensor(feats), None if logits is None else torch.as_tensor(logits)


def share_right(logits, labels):
    """The share (0..1) of rows of `logits` (N, K) that are largest at their label (N,)."""
    return float((np.asarray(logits).argmax(1) == labels).mean())


def weights_hash(net):
    """Eight hex digits that differ when any weight does: features of two hashes do not compare.

    Kept features and statistics bear it. runtime.training.weights_hash sorts the names first and
    would call the same weights otherwise, so that these were refused.
    """
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def classifier(ds_train, ds_test, root, seed=0, *, steps=1500, device="cpu"):
    """The feature network of a data set, and what is known of it: (net, facts).

    Kept in root/classifier-<key of the data set>-<steps>-<seed>.pt; trained when that file is
    missing, made otherwise, or broken (with a warning). The weights depend a little on the machine
    and its number of threads, and so do figures: compare those of one hash. facts: `protocol` (one
    line for people), `feature_hash`, `test_accuracy` in 0..1. Raises BadInput for a data set
    without classes or below 8 pixels.
    """
    if ds_train.num_classes < 2:
        why = "has no classes to train the feature classifier on; name a labelled data set"
        raise BadInput(f"{ds_train.name} {why} of such images with --data")
    if min(ds_train.height, ds_train.width) < 8:
        raise BadInput(f"{ds_train.name}: images are {shape_text(ds_train.images)}, need 8 pixels")
    path = Path(root) / f"classifier-{ds_train.key}-{steps}-{seed}.pt"
    recipe = {"steps": steps, "seed": seed, "tested_on": ds_test.key}
    with locked(path.with_suffix(".lock")):  # one process trains it, the others wait and read
        net, facts = _read(path, recipe, ds_train) or _make(path, recipe, ds_train, ds_test, device)
    return net.to(device, memory_format=torch.channels_last).eval(), facts


def classifier_of(name, root, *, size=0, seed=0, steps=1500, device="cpu"):
    """(ClassifierFeatures, training images) of the data set, folder or zip `name`.

    Of all its classes, also where images of a few are looked at: of one class alone it could tell
    nothing apart, and figures of all subsets are of one network. Raises as `classifier` does.
    """
    train, test = (datasets.load(name, root, split=s, size=size or None) for s in ("train", "test"))
    net, facts = classifier(train, test, root, seed, steps=steps, device=device)
    return ClassifierFeatures(net, facts, train.class_names), train


def _read(path, recipe, ds):
    """(net, facts) from the file, or None where it is missing, of other settings, or broken."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["recipe"] != recipe:
            return None
        net = Classifier(*ds.images.shape[1:], ds.num_classes)
        net.load_state_dict(saved["net"])
        return net, saved["facts"]
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        warn(f"{path} is not a classifier this program saved ({reason}): training it again")
        return None


def _make(path, recipe, ds_train, ds_test, device):
    steps, seed = recipe["steps"], recipe["seed"]
    net = train_classifier(ds_train, steps, seed, device)
    _, logits = extract(ClassifierFeatures(net, {}), ds_test.images, name=ds_test.name)
    test_accuracy, feature_hash = share_right(logits, ds_test.labels), weights_hash(net)
    protocol = (
        f"classifier features: {len(net.convs) + 1}-layer CNN, {net.dim}-d, trained on "
        f"{ds_train.name} train ({shape_text(ds_train.images)}), {steps} steps of {BATCH}, "
        f"seed {seed}, test accuracy {100 * test_accuracy:.2f} %, feature hash {feature_hash}"
    )
    facts = dict(protocol=protocol, feature_hash=feature_hash, test_accuracy=test_accuracy)
    with atomic_write(path) as temporary:
        torch.save({"recipe": recipe, "facts": facts, "net": net.state_dict()}, temporary)
    return net, facts
