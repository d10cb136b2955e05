"""Images noised to x_T by the forward process, and where the backward process leads them."""

from runtime.files import save_json, save_text
from runtime.films import marks_of, one_each, save_beside, shown
from runtime.pictures import to_uint8

import shlex
import sys

import torch

from evaluation.study_names import name_for
from evaluation.words import markdown


def rms(a, b):
    """The root of the mean square of a - b over pixels in [0, 1], (B,), of (B,C,H,W) in [-1, 1]."""
    return ((a - b) / 2).square().flatten(1).mean(1).sqrt()


def distances(x0, ends, labels=None):
    """RMS distances (B,) of `ends` from the images x0 (B,C,H,W) that each came from, and the means.

    Of these, and of ends from other images of x0, of the same class if labels (B,) are given: None
    where there are none. ends are clamped to [-1, 1].
    """
    ends, x0 = ends.clamp(-1, 1).flatten(1), x0.flatten(1)
    own = rms(x0, ends)
    other = torch.ones(len(x0), len(x0), dtype=torch.bool).fill_diagonal_(False)
    if labels is not None:
        other &= labels[:, None] == labels[None]
    apart = torch.cdist(ends.double(), x0.double()) / (2 * x0.shape[1] ** 0.5)  # (B,B)
    return own, own.mean().item(), apart[other].mean().item() if other.any() else None


def by_class(own, labels, names):
    """Rows of texts: a class, how many images, the mean, least and largest distance; all last."""
    groups = {} if labels is None else {int(y): own[labels == y] for y in labels.unique()}
    named = {names[y] if y < len(names) else f"class {y}": found for y, found in groups.items()}
    return [
        [name, str(len(found)), *(f"{v:.3f}" for v in (found.mean(), found.min(), found.max()))]
        for name, found in (*named.items(), ("all", own))
    ]


def save(path, world, x0, ends, labels, names, noised, walk, pairs, left):
    """PATH.png and .gif: an image of each class, or eight, on its way to x_T and on the way back.

    PATH.md and .json: how far all ends are from their images. Where such files are of other walks,
    the names have a digest. x0, ends (B,C,H,W); labels (B,) or None, names of the classes;
    noised(numbers, t) gives x_t (b,C,H,W) of some images; walk(numbers) yields x and x0_hat on
    their way back by `pairs`; left is sqrt(alpha_bar) at the first t. Prints the distances, on rank
    0.
    """
    numbers, rows, note = one_each(labels, len(x0), names)
    numbers = torch.from_numpy(numbers)
    own, mean, others = distances(x0, ends, labels)
    ts = [pairs[0][0], *(t_prev for _, t_prev in pairs)]  # down to -1, the image
    marks = {"forward": marks_of(ts[::-1]), "backward": marks_of(ts)}
    kept = shown(len(ts))
    forward = {i: to_uint8(noised(numbers, ts[-1 - i])) for i in kept}
    x_T = noised(numbers, ts[0])
    back, _ = world.frames(lambda seeds, y: walk(seeds), numbers, None, x_T, kept)
    ended = [f"{d:.2f} away" for d in own[numbers].tolist()]
    rows = [f"{name}\n{end}" for name, end in zip(rows or [""] * len(ended), ended, strict=True)]
    told = f"RMS distance from its own image, pixels in [0, 1]: {mean:.3f}, mean of {len(x0)}"
    if others is not None:
        told += f"; from other test images{' of its class' * (labels is not None)}: {others:.3f}"
    told += f". x_T holds {left:.2g} times the image"
    if others is not None:
        told += ": some of it comes back" if mean < 0.8 * others else ": the way back finds another"
    facts = {"t": ts, "from_its_own": [round(d, 6) for d in own.tolist()]}
    path = path.with_name(path.name + name_for(path.parent, path.name, "", facts)[0])
    films = dict(zip(marks, (forward, back), strict=True))
    save_beside(path, films, marks, rows, f"{note}. {told}.".removeprefix(". "))
    command = shlex.join(["python", *sys.argv])
    columns = ["class", "images", "RMS from its own image, mean", "least", "largest"]
    lines = ["# To x_T and back", "", f"    {command}", "", f"{told}.", ""]
    save_text(f"{path}.md", [*lines, *markdown(columns, by_class(own, labels, names))])
    found = {"facts": facts, "command": command, "mean": mean, "from_others": others}
    found["labels"] = None if labels is None else labels.tolist()
    save_json(f"{path}.json", found | {"image_in_x_T": left})
    print(f"{told}.", f"both ways: {path}.png, {path}.gif; .md, .json", sep="\n")
