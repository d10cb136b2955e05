"""Numbers that are not finite never become pictures: whoever makes some names step and seed."""

from runtime.commandline import BadInput

import torch

WEIGHTS = "weights are bad"
MEND = f"type --precision fp32 or less --guidance; or {WEIGHTS}"


class NotFinite(BadInput):
    """Samples that cannot be drawn. A training whose loss is finite goes on without them."""


def lengths(x):
    """The Euclidean length of each of x (B,...), (B,) in fp32 or x's own, if larger, dtype.

    Not finite where a number of x is not: one pass finds it. Squares overflow beyond 1e19, too,
    where no image lies.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=dtype)


def clamped(x, low, high):
    """x.clamp(low, high), in which infinity, too, becomes NaN, as NaN stays NaN."""
    return x.clamp(low, high) - (x - x)


def dynamic_threshold(x0_hat, percentile=0.995):
    """x0_hat (B,C,H,W) within [-1, 1]: Imagen (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Where the percentile of an image's own |x0_hat| exceeds 1, the image is clamped to it and
    divided by it. A clamp to [-1, 1] would saturate what strong guidance drives beyond.
    """
    s = x0_hat.float().abs().flatten(1).quantile(percentile, dim=1).clamp(min=1)  # (B,)
    s = s.view(-1, 1, 1, 1).to(x0_hat.dtype)
    return clamped(x0_hat, -s, s) / s


def check_finite(x, names, what="the image of seed", mend=MEND):
    """x (B,...), each of one of `names`; NotFinite where it holds NaN or infinity."""
    finite = lengths(x).isfinite()  # (B,)
    if not finite.all():
        name = names[finite.logical_not().nonzero()[0].item()]
        raise NotFinite(f"{what} {name} is not finite: {mend}")
    return x


def watched(walk, names, steps=0, what="sampling", of="seed"):
    """What a walk yields, tuples that begin with x (B,...): each x is of one of `names`, its seed.

    steps: how many there are, or the (t, t_prev) of each, 0 if unknown. NotFinite names the first
    step after which some x was not finite. On a CPU that is at once. Nothing waits for a GPU, which
    is asked after the last step.
    """
    seen = []
    for x, *rest in walk:
        seen.append(lengths(x))
        if x.device.type == "cpu":
            check_steps(seen[-1:], len(seen), names, steps, what, of)
        yield x, *rest
    if seen and seen[-1].device.type != "cpu":
        check_steps(seen, 1, names, steps, what, of)


def end_of(walk, tick, *about):
    """The last x of a walk, watched() with what it is `about`; tick() is called at each step."""
    for x, *_ in watched(walk, *about):  # noqa: B007
        tick()
    return x


def check_steps(seen, first, names, steps, what, of):
    """NotFinite where one of `seen`, lengths (B,) of each step from number `first` on, is bad."""
    finite = torch.stack(seen).isfinite()  # (S,B)
    if finite.all():
        return
    step, which = finite.logical_not().nonzero()[0].tolist()  # the first step, there the first
    step += first
    many = steps if isinstance(steps, int) else len(steps)
    where = f"step {step}" + f" of {many}" * bool(many)
    if not isinstance(steps, int) and step <= many:
        where += f", at t = {steps[step - 1][0]}"
    raise NotFinite(f"{what}: {of} {names[which]} leaves the finite numbers in {where}: {MEND}")
