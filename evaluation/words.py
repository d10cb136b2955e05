"""What several files say in the same words."""

import sys


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def warn_of_few(name, n, dim=0):
    """What makes figures of n images misleading, whose number `name` says; dim: of the features."""
    if n < 5000:
        why = "the inception score is biased downward below 5,000 images"
        why += " and the Fréchet distance upward below 10,000" * bool(dim)
        warn(f"{name}: {why}; compare figures of the same N alone")
    if n <= dim:
        warn(f"{name}: N = {n} does not exceed the {dim} features")


def shape_text(images):
    """'28x28x1' of images (N, H, W, C)."""
    return "x".join(map(str, images.shape[1:]))


def whose(network):
    """ "Inception's", or "the mnist classifier's": figures say whose features they are of.

    network: that of an extractor, or None.
    """
    return f"{network}'s" if network == "Inception" else f"the {network or 'network'}'s"
