"""A small classifier of the data set itself: the network by which two sets of images are compared.

A network made for photographs of objects has little to say about gray digits. This one is trained
here, once, with a fixed recipe and seed, kept beside the data, and named by a hash of its weights.
It reads classes as well: how many samples look like what was asked for.
"""

from runtime.checkpoints import WrongSums, check_machine, check_sums, load_copied
from runtime.commandline import BadInput
from runtime.files import Unwritable, atomic_write, locked
from runtime.processes import exact, progress
from runtime.run import indices

import hashlib
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from evaluation.features import extract, share_right
from evaluation.words import shape_text, warn
from image_data import datasets
from image_data.augment import shift

BATCH = 128  # images in a training step


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


@exact()
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
        x, y = ds.batch(indices(len(ds), BATCH, seed, step))
        by = torch.randint(-2, 3, (2, len(x)), generator=generator).mT.to(device)
        loss = F.cross_entropy(net(shift(x.to(device), by)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


class ClassifierFeatures:
    """A Classifier as an extractor; `facts` as `classifier` returns them, names of its classes.

    channels: of the images that it takes. network: two words, such as "mnist classifier".
    """

    def __init__(self, net, facts, class_names=(), name="data set's"):
        self.net, self.facts, self.dim, self.class_names = net, facts, net.dim, class_names
        self.network = f"{name} classifier"
        self.protocol, self.feature_hash = facts.get("protocol"), facts.get("feature_hash")
        self.device, self.channels = net.head.weight.device, net.convs[0].in_channels // 4

    def __call__(self, images):
        """uint8 (B, H, W, C) -> features (B, 128), logits (B, num_classes)."""
        x = images.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1  # (B, C, H, W)
        feats = self.net.features(x)
        return feats, self.net.head(feats)


def weights_hash(net):
    """Eight hex digits that differ when any weight does: features of two hashes do not compare.

    Kept features and statistics bear it. runtime.checkpoints.weights_hash sorts the names first and
    would call the same weights otherwise, so that these were refused.
    """
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def classifier(ds_train, ds_test, root, seed=0, *, steps=1500, device="cpu", flag="--data"):
    """The feature network of a data set, and what is known of it: (net, facts).

    Kept in root/classifier-<key of the data set>-<steps>-<seed>.pt; trained when that file is
    missing, made otherwise, or broken (with a warning). The weights depend a little on the machine
    and its number of threads, and so do figures: compare those of one hash. facts: `protocol` (one
    line for people), `feature_hash`, `test_accuracy` in 0..1. Raises BadInput for a data set
    without classes, with the flag by which another one is named, or below 8 pixels.
    """
    if ds_train.num_classes < 2:
        why = "has no classes to train the feature classifier on; name a labelled data set"
        raise BadInput(f"{ds_train.name} {why} of such images with {flag}")
    if min(ds_train.height, ds_train.width) < 8:
        raise BadInput(f"{ds_train.name}: images are {shape_text(ds_train.images)}, need 8 pixels")
    path = Path(root) / f"classifier-{ds_train.key}-{steps}-{seed}.pt"
    recipe = {"steps": steps, "seed": seed, "tested_on": ds_test.key}
    try:
        with locked(path.with_suffix(".lock")):  # one process trains it, the others wait and read
            found = _read(path, recipe, ds_train)
            found = found or _make(path, recipe, ds_train, ds_test, device)
    except Unwritable:
        if not (found := _read(path, recipe, ds_train)):
            raise
    net, facts = found
    return net.to(device, memory_format=torch.channels_last).eval(), facts


def classifier_of(name, root, *, size=0, seed=0, steps=1500, device="cpu", flag="--data"):
    """(ClassifierFeatures, training images) of the data set, folder or zip `name`.

    Of all its classes, also where images of a few are looked at: of one class alone it could tell
    nothing apart, and figures of all subsets are of one network. Raises as `classifier` does.
    """
    train, test = (datasets.load(name, root, split=s, size=size or None) for s in ("train", "test"))
    net, facts = classifier(train, test, root, seed, steps=steps, device=device, flag=flag)
    return ClassifierFeatures(net, facts, train.class_names, train.name), train


def _read(path, recipe, ds):
    """(net, facts) from the file, or None where it is missing, of other settings, or broken."""
    if not path.exists():
        return None
    net = Classifier(*ds.images.shape[1:], ds.num_classes)
    try:
        check_sums(path)
        saved = load_copied(path)
        if saved["recipe"] != recipe:
            return None
        net.load_state_dict(saved["net"])
        if (found := weights_hash(net)) != saved["facts"]["feature_hash"]:
            raise ValueError(f"its weights have the hash {found}, not the one that it says")
        return net, saved["facts"]
    except Exception as error:  # a torn file raises nearly anything
        if isinstance(error, BadInput) and not isinstance(error, WrongSums):
            raise
        check_machine(error, path)
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
