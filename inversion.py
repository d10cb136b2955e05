"""Chapter 2, continued: an image's own noise.

Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021 (arXiv:2010.02502), section 5.3
and 5.4.

With eta = 0 the walk of ddim.py solves an ODE, and an ODE can be walked either way. Upwards it
turns an image x_0 into the x_T that gives it back, its code. Codes are Gaussian noise, and between
two of them lie the codes of images that change smoothly from the one into the other.

    python ddim.py --encode runs/pixel-mnist/ckpt.pt --n 8             test images to codes and back
    python ddim.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 3,9          between two samples
    python ddim.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 0,1 --data mnist   two test images
"""

from runtime.commandline import BadInput, folder_of, parse_seeds
from runtime.pictures import save_grid, to_uint8
from runtime.plots import plot_lines

import torch

from ddim import (
    evaluate,
    finish,
    in_parts,
    labels_of,
    numbers_of,
    open_net,
    part_of,
    settings,
    subsequence,
    walk,
)
from image_data import batches, datasets
from kernels import gaussian, sampling_table, sampling_update

# --------------------------------------------------------------------------------- up and between


def encoding_table(alpha_bar, pairs, prediction="eps"):
    """Rows of sampling_update that climb `pairs` from their end: row k of (len(pairs), 8) float32.

    Climbing from alpha_bar = a to b < a with the eps_hat found at a is eq. 12 with sigma = 0,
        x_next = A x0_hat + B x,  B = sqrt((1 - b) / (1 - a)),  A = sqrt(b) - B sqrt(a).
    The first row leaves the image itself, where a = 1 and no network was trained: eps_hat is asked
    for at the lowest timestep, b, and in x_next = sqrt(b) x + sqrt(1 - b) eps_hat it is written as
    sqrt(1 - b) eps_hat = x - sqrt(b) x0_hat. That is eq. 9 at b, so A = -sqrt(b), B = 1 + sqrt(b).
    """
    p_q = sampling_table(alpha_bar, pairs, eta=0.0, prediction=prediction)[:, :2].flip(0)
    b = alpha_bar.cpu()[[t for t, _ in reversed(pairs)]]  # (S,), falling
    a = b[:-1]
    B = torch.cat([1 + b[:1].sqrt(), ((1 - b[1:]) / (1 - a)).sqrt()])
    A = torch.cat([-b[:1].sqrt(), b[1:].sqrt() - B[1:] * a.sqrt()])
    table = torch.zeros(len(pairs), 8)
    table[:, :2] = torch.cat([p_q[:1], p_q[:-1]])
    table[:, 2], table[:, 3] = A.float(), B.float()
    return table


@torch.inference_mode()
def encode(net, alpha_bar, pairs, x0, y=None, *, guidance=0.0, prediction="eps", clip=True):
    """The ODE of DDIM section 4.3 upwards (eq. 14 reversed): yields (t, x) after every step.

    x0 (B,C,H,W) in [-1,1]; `pairs` as for walk(). The last x is the code of x0: from it walk()
    returns to x0, the closer the more steps there are (section 5.4). `clip` must be the same there:
    a clipped x0_hat makes another ODE.
    """
    table, x = encoding_table(alpha_bar, pairs, prediction), x0
    ts = [t for t, _ in reversed(pairs)]
    for step, t in enumerate(ts):
        out, out_uncond = evaluate(net, x, ts[max(step - 1, 0)], y, guidance)
        x, _ = sampling_update(
            x, out, table, step, out_uncond=out_uncond, guidance=guidance, clip=clip
        )
        yield t, x


def slerp(a, b, weights):
    """Spherical interpolation (DDIM appendix D.5) of codes a, b (B,C,H,W): (B,K,C,H,W).

    sin((1-w) theta) / sin(theta) a + sin(w theta) / sin(theta) b for each weight w of (K,), theta
    being the angle between a and b. Between Gaussians this stays as far out as Gaussians lie; on
    the straight line the middle would be too near the origin. Parallel codes, where the formula is
    0 / 0, take the straight line.
    """
    cosine = torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())  # (B,)
    theta = cosine.clamp(-1, 1).acos()[:, None]  # (B,1)
    w = weights.double().to(a.device)[None]  # (1,K)
    straight = theta.sin() < 1e-6
    safe = torch.where(straight, 1.0, theta)
    to_a = torch.where(straight, 1 - w, ((1 - w) * safe).sin() / safe.sin())  # (B,K)
    to_b = torch.where(straight, w, (w * safe).sin() / safe.sin())
    to_a, to_b = (k.to(a.dtype)[:, :, None, None, None] for k in (to_a, to_b))
    return to_a * a[:, None] + to_b * b[:, None]  # (B,K,C,H,W)


# ----------------------------------------------------------------------------------- commands


def held_out(cfg, trained, shape, names, numbers):
    """Test images `numbers` (N,): x (N,C,H,W), and y (N,) if their classes are the network's."""
    ds, known = datasets.held_out(
        cfg.data or trained.data,
        cfg.data_root or trained.data_root,
        shape,
        names,
        size=trained.size,
        classes=trained.classes,
    )
    if numbers.max() >= len(ds):
        raise BadInput(
            f"--seeds {int(numbers.max())}: {ds.name} has test images 0 to {len(ds) - 1}"
        )
    x, y = batches.batch(ds, numbers.numpy())
    return x, y if known else None


def reconstruct(cfg, world):
    """--encode: test images to codes and back (DDIM section 5.4, table 2)."""
    net, trained, shape, names, alpha_bar, cfg = open_net(cfg.encode, cfg, world)
    x0, y = held_out(cfg, trained, shape, names, parse_seeds(cfg.seeds, cfg.n))
    how, T = settings(cfg, trained.prediction), trained.timesteps
    up = {name: how[name] for name in ("guidance", "prediction")}
    y = None if net.label is None else y
    if cfg.guidance and y is None:
        raise BadInput("--guidance needs images of the network's own classes")
    rows, errors = [to_uint8(x0)], {}
    for steps in sorted({min(k, T) for k in numbers_of(cfg.encode_steps, "--encode-steps")}):
        pairs = subsequence(T, steps, cfg.spacing)

        def there_and_back(part, bar, pairs=pairs):  # in fp32: bf16 would be the larger error
            x, label = (part_of(rows, part, world.device) for rows in (x0, y))
            _, code = finish(encode(net, alpha_bar, pairs, x, label, **up), bar)
            return finish(walk(net, alpha_bar, pairs, code, label, **how), bar)[1]

        desc = f"{steps} steps"
        back = in_parts(there_and_back, len(x0), 2 * steps, cfg.batch_size, world, desc)
        errors[steps] = ((back - x0) / 2).square().mean().item()
        rows.append(to_uint8(back))
    if world.is_main:
        folder = folder_of(cfg, cfg.encode)
        picture, curve = folder / "reconstruction.png", folder / "reconstruction-error.png"
        save_grid(torch.cat([row[:16] for row in rows]), picture, min(len(x0), 16))
        panel = {"mean squared error": {"": (list(errors), list(errors.values()))}}
        plot_lines(curve, panel, xlabel="steps each way", logx=True, logy=tuple(panel))
        print(f"{len(x0)} test images; mean squared error per dimension, images in [0, 1]")
        print("\n".join(f"{steps:5d} steps  {error:.6f}" for steps, error in errors.items()))
        print(f"the images, and below them what came back: {picture}; {curve}")


def interpolate(cfg, world):
    """--interpolate: eleven images between each two codes (DDIM section 5.3)."""
    net, trained, shape, names, alpha_bar, cfg = open_net(cfg.interpolate, cfg, world)
    if cfg.guidance and not cfg.classes:
        raise BadInput("--interpolate draws without labels; give --guidance some --classes")
    seeds = parse_seeds(cfg.seeds, cfg.n)
    if len(seeds) % 2:
        raise BadInput(f"--seeds: two make a row, so not {len(seeds)}; type 3,9 or 0-7")
    ends = held_out(cfg, trained, shape, names, seeds)[0] if cfg.data else None
    pairs = subsequence(trained.timesteps, cfg.sample_steps, cfg.spacing)
    n, how = len(seeds) // 2, settings(cfg, trained.prediction)
    up = {name: how[name] for name in ("guidance", "prediction")}
    labels = labels_of(net, cfg, names, torch.arange(n)) if cfg.classes else None  # one for a row

    def between(part, bar):
        two = torch.stack([2 * part, 2 * part + 1], dim=1).flatten()  # (2B,)
        y = part_of(labels, part, world.device)
        if ends is None:
            own = part_of(seeds, two, world.device)
            codes = gaussian((len(two), *shape), own, -1, world.device)  # (2B,C,H,W)
        else:
            label = None if y is None else y.repeat_interleave(2)
            x = part_of(ends, two, world.device)
            _, codes = finish(encode(net, alpha_bar, pairs, x, label, **up), bar)
        x = slerp(codes[0::2], codes[1::2], torch.linspace(0, 1, 11)).flatten(0, 1)  # (11B,C,H,W)
        label = None if y is None else y.repeat_interleave(11)
        way = walk(net, alpha_bar, pairs, x, label, **how)
        return to_uint8(finish(way, bar)[1]).unflatten(0, (len(part), 11))

    steps, rows_at_once = len(pairs) * (1 if ends is None else 2), cfg.batch_size // 11
    images = in_parts(between, n, steps, rows_at_once, world, "interpolating")  # (n,11,H,W,C)
    if world.is_main:
        path = folder_of(cfg, cfg.interpolate) / "interpolation.png"
        save_grid(images.flatten(0, 1), path, 11)
        print(f"{n} rows of eleven: {path}")
