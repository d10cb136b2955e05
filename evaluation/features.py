"""Features of images by any extractor, on one process or several.

An extractor is a callable: uint8 tensor (B, H, W, C) -> features (B, d) and logits (B, K), or None
for these; with a `protocol` (one line for people), a `feature_hash`, `dim` and `device`. There are
inception_features.Extractor and classifier.ClassifierFeatures; a plain function will do.
"""

from runtime.commandline import BadInput
from runtime.processes import World, exact, progress

import numpy as np
import torch


@torch.inference_mode()
@exact()
def extract(extractor, images, batch_size=256, world=None, store=np.empty, name="images"):
    """Features (N, d) and logits (N, K) or None, float32, of `images` uint8 (N, H, W, C).

    images may be a tensor or a memory map. In every round each process of `world` takes
    `batch_size` images and all exchange their rows, so that memory does not grow with N.
    store(shape, np.float32) makes the arrays that keep the rows. Raises BadInput without images and
    for features that are not finite.
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
        some = images[first : first + max(own, 1)]
        some = some if isinstance(some, torch.Tensor) else torch.from_numpy(np.array(some))
        rows = [r if r is None else r[:own] for r in _pair(extractor(some.to(device)))]
        rows = [r if r is None else world.collect(r.float(), count).cpu().numpy() for r in rows]
        if not all(r is None or np.isfinite(r).all() for r in rows):
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
