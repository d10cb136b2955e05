"""Flows by scipy's solver; and what they leave: likelihoods, samples before and after reflow."""

from runtime.files import save_json
from runtime.finite import MEND, WEIGHTS, NotFinite, check_finite
from runtime.pictures import save_grid, tile
from runtime.plots import draw_cells

from pathlib import Path

import torch
from scipy.integrate import solve_ivp

from kernels import gaussian

SHOWN = 10  # images of a row


def rk45(v, x, times, tolerance):
    """From x (B,...) at times[0] through the others, by scipy; yields x and x0_hat at each.

    v(x, t) is like x. tolerance: of the error of a step, relative and absolute. The steps are the
    same for all of x. NotFinite where v is not finite, or changes faster than any step can follow.
    """

    def slope(t, flat):
        found = v(x.new_tensor(flat).view_as(x), t)
        check_finite(found, [f"{t:.3g}"] * len(x), "the slope of the flow at t =")  # or it hangs
        return found.flatten().double().cpu().numpy()

    start, ends = x.flatten().double().cpu().numpy(), (times[0], times[-1])
    how = {"rtol": tolerance, "atol": tolerance, "t_eval": times[1:]}
    found = solve_ivp(slope, ends, start, "RK45", **how)
    if found.status:
        raise NotFinite(f"RK45 stopped between t = {ends[0]:g} and {ends[1]:g}: {MEND}")
    for t, flat in zip(times[1:], found.y.T, strict=True):
        x_t = x.new_tensor(flat).view_as(x)
        yield x_t, x_t - t * v(x_t, t)


def standard_error(values):
    """Of the mean of values (N,); None for one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def save_bits(folder, world, bits, x0, y, data, tolerance):
    """nll.json and nll.png of test images x0 (N,C,H,W), labels y (N,) or None.

    bits(x, y, probe) gives the bits per dimension (1,) of an image with noise of one level of its
    pixels, by signs `probe` like x. Both are functions of its place among x0. Each image is by
    itself, so that a solver's steps depend on no other. data names them.
    """
    numbers = torch.arange(len(x0))
    level = torch.special.ndtr(gaussian(x0.shape, numbers, 0, "cpu")) - 0.5  # uniform
    x, probe = x0 + level / 127.5, gaussian(x0.shape, numbers, 1, "cpu").sign()

    def of_part(part, tick):
        label = None if y is None else y[part].to(world.device)
        found = bits(x[part].to(world.device), label, probe[part].to(world.device))
        tick()
        return check_finite(found, part, "the likelihood of image", WEIGHTS)

    found = world.in_parts(of_part, len(x), 1, 1, "likelihood").double()
    if world.is_main:
        error, order = standard_error(found), found.argsort()
        how = {"data": str(data), "images": len(x), "tolerance": tolerance}
        told = {"bits_per_dim": found.mean().item(), "standard_error": error, **how}
        save_json(Path(folder, "nll.json"), told | {"each": found.tolist()})
        ends = torch.cat([order[:SHOWN], order[-SHOWN:]])
        images = ((x0[ends] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        save_grid(images, Path(folder, "nll.png"), min(SHOWN, len(x0)))
        sure = "" if error is None else f", standard error {error:.4f} over {len(x)} images"
        print(f"{data}: {told['bits_per_dim']:.4f} bits/dim{sure}, tolerance {tolerance:g}")
        print(f"the {SHOWN} most likely, then the least: {Path(folder, 'nll.png')}; nll.json")


def save_reflow(folder, world, made):
    """reflow.png and reflow.json. made: {"before": ..., "after": ...}, of each ({number of steps:
    images uint8 (N,H,W,C)}, straightness (N,))."""
    if not world.is_main:
        return
    cells, found = {}, {}
    for name, (grids, S) in made.items():
        for steps, images in grids.items():
            picture = tile(images[:16], 4)
            picture = picture[:, :, 0] if picture.shape[2] == 1 else picture
            cells[name, f"{steps} step{'s' * (steps > 1)} of Euler"] = picture
        found[name] = {"straightness": S.mean().item(), "standard_error": standard_error(S)}
    path = Path(folder, "reflow.png")
    draw_cells(path, cells, title="the same noise, before and after reflow")
    save_json(path.with_suffix(".json"), found | {"paths": len(S)})
    told = ", ".join(f"{name} {row['straightness']:.4f}" for name, row in found.items())
    print(f"straightness S, 0 for lines: {told}; samples in few steps: {path}")
