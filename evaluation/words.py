"""What several files say in the same words."""

import sys


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def shape_text(images):
    """'28x28x1' of images (N, H, W, C)."""
    return "x".join(map(str, images.shape[1:]))
