"""What several files say in the same words."""

import sys


def warn(text, why="", told=None):
    """A line on stderr. told: a set of reasons that were given before; `why` is given once."""
    if told is None or why not in told:
        print(f"warning: {text}", file=sys.stderr)
    if told is not None:
        told.add(why)


def warn_of_few(name, n, dim=0, told=None):
    """What makes figures of n images misleading, whose number `name` says; dim: of the features.

    told: as warn() has it.
    """
    if n < 5000:
        why = "the inception score is biased downward below 5,000 images"
        why += " and the Fréchet distance upward below 10,000" * bool(dim)
        warn(f"{name}: {why}; compare figures of the same N alone", f"scores of {n}", told)
    if n <= dim:
        warn(f"{name}: N = {n} does not exceed the {dim} features", f"dim {n}", told)


def images_of(name, n):
    """'10,000 images of mnist:test'; the name alone where their number n is not known."""
    return f"{n:,} images of {name}" if n else name


def markdown(columns, rows):
    """Lines of a table with these columns, and rows of texts."""
    return [f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows]]


def shape_text(images):
    """'28x28x1' of images (N, H, W, C)."""
    return "x".join(map(str, images.shape[1:]))


def whose(network):
    """ "Inception's", or "the mnist classifier's": figures say whose features they are of.

    network: that of an extractor, or None.
    """
    return f"{network}'s" if network == "Inception" else f"the {network or 'network'}'s"
