"""DDIM: the same network, few steps, and no noise on the way.

Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021 (arXiv:2010.02502). The paper's
alpha_t is our alpha_bar_t.

The loss of ddpm_pixel.py knows only the marginals q(x_t | x_0), not the chain between them. Every
process with these marginals is therefore served by the same network, and one may visit any
sub-sequence of the timesteps. From x_t and the network's noise, first guess the image,

    x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)                     eq. 9

then go to the earlier timestep t_prev, keeping a part of that noise and replacing the rest,

    x_prev = sqrt(alpha_bar_prev) x0_hat                                   the guess,     eq. 12
           + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat                    the direction to x_t,
           + sigma z,  z ~ N(0, I)                                         fresh noise

    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev))
                                                                                          eq. 16
With eta = 1 this is the ancestral step of DDPM (small variance). With eta = 0 there is no fresh
noise: the image is a function of x_T, and the way there an Euler scheme for an ODE (section 4.3),
smooth enough for few steps. But fresh noise also corrects the network's mistakes: where a short
training leaves specks, try --eta 1. The ODE can be followed upwards, too, from an image to the x_T
that gives it, its code. Between two codes lie the codes of images that change smoothly from the one
into the other:

    python ddim.py --sample runs/pixel-mnist/ckpt.pt                  100 images in 50 steps
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --sample-steps 10 --classes 3,7 --guidance 1
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --seeds 0-7 --gif       watch eight of them
    python ddim.py --sample runs/pixel-mnist/ckpt.pt --reverse-from data     from noised test images
    python ddim.py --encode runs/pixel-mnist/ckpt.pt --n 8            test images to codes and back
    python ddim.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 3,9        from one to the other
    python ddim.py --interpolate runs/pixel-mnist/ckpt.pt --seeds 0,1 --data mnist    test images

All leave their files in a folder beside the checkpoint, named by what was typed, or in --out. One
CPU core draws 100 digits of the network of configs/mnist_pixel.yaml in 50 steps in 20 seconds.
Solvers of second order for the same ODE: dpm_solver.py. All side by side: compare_samplers.py.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.finite import end_of
from runtime.pictures import save_drawn, save_grid, save_samples, to_uint8
from runtime.plots import plot_lines
from runtime.processes import exact, launch
from runtime.typed_flags import MOST

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from ddpm_pixel import guided_pass, q_sample, timestep_pairs, x0_coefficients
from evaluation import there_and_back
from image_data import datasets
from image_data.batches import spaced
from improved_ddpm import load_net
from kernels import Row, gaussian, sampling_update


@dataclass
class Config(cli.NetworkCommand):
    sample: str = ""
    """draw from this network: a checkpoint of ddpm_pixel.py or improved_ddpm.py, or published"""
    encode: str = ""  # of this network: held-out images to their x_T and back, in ever more steps
    interpolate: str = ""
    """of this network: eleven images from one x_T to another, a row for each two seeds"""

    n: int = 0  # how many; 0 is 100 samples, 8 images or x_T with the others
    seeds: str = ""
    """sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1); with --encode, with
    --reverse-from data, and with --interpolate and --data, the numbers of the test images"""
    classes: str = ""
    """comma-separated names or numbers: draw these (default all in turn; --interpolate: none)"""
    sample_steps: int = 50  # how many of the T timesteps to visit
    spacing: Literal["linear", "quadratic", "leading", "trailing"] = "linear"
    """where they lie: even from end to end; denser near the image; even from 0 up; from T-1 down.
    If it is not typed, as the network's settings say"""
    clip_denoised: bool = True  # keep x0_hat in [-1, 1]; not typed, as its settings say
    eta: float = 0.0  # fresh noise of a step: 0 none, 1 as much as DDPM
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 unconditional, 0 conditional; others write s = 1+w"""
    gif: bool = False
    """also draw reverse.gif and reverse.png: x_t and x0_hat of an image of each class"""
    reverse_from: Literal["noise", "data"] = "noise"
    """x_T of --sample. data: test images, noised; where they end is reverse-from-data.png"""

    data: str = ""
    """--encode, --reverse-from data: data other than the network was trained on; --interpolate:
    take images from it"""
    data_root: str = ""  # where data sets are looked for (default: where the training found them)
    encode_steps: str = "10,20,50,100,200,500,1000"  # numbers of steps to encode in; T at most

    WALK = cli.names("n seeds batch_size spacing guidance clip_denoised")
    USES = {
        "sample": WALK
        | cli.names("classes sample_steps eta gif precision reverse_from data data_root"),
        # check() refuses classes and eta where they have no part, in words of its own.
        "encode": WALK | cli.names("data data_root encode_steps classes eta"),
        "interpolate": WALK | cli.names("classes sample_steps data data_root eta"),
    }
    NEEDS = {"gif": "reverse_from=noise", "classes": "reverse_from=noise"}


# ------------------------------------------------------------------------------------ timesteps


def subsequence(T, steps, spacing="linear"):
    """tau of section 4.2: `steps` of the timesteps 0..T-1, all different.

    linear, leading, trailing    evenly spaced: as ddpm_pixel.timestep_pairs has them
    quadratic    floor(c i^2) for i = 0, 1, ... with c such that the last is T-1 (appendix D.2); one
                 that would repeat its neighbour is moved up to the next free timestep

    Returns [(t, t_prev), ...], downwards; the last t_prev is -1, where alpha_bar is 1. One linear
    or quadratic step is T-1 alone. Raises BadInput unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise cli.BadInput(
            f"--sample-steps {steps}: the network was trained on a chain of {T} timesteps; "
            f"type a number from 1 to {T}"
        )
    if spacing != "quadratic" or steps == 1:
        return timestep_pairs(T, steps, "linear" if spacing == "quadratic" else spacing)
    tau = [0]
    for i in range(1, steps):
        tau.append(max((T - 1) * i * i // (steps - 1) ** 2, tau[-1] + 1))
    tau.reverse()
    return list(zip(tau, [*tau[1:], -1], strict=True))


def at(alpha_bar, t):
    """alpha_bar_t of a table float64 (T,) as a number; at t = -1, the image itself, it is 1."""
    return alpha_bar[t].item() if t >= 0 else 1.0


# ------------------------------------------------------------------------ down: from x_T to x_0


def ddim_row(a, a_prev, eta=0.0, prediction="eps"):
    """The step from alpha_bar_t = a to a_prev > a, eta in 0..1: eq. 12 and 16.

    Put eps_hat = (x_t - sqrt(a) x0_hat) / sqrt(1 - a), which is eq. 9 turned around, into eq. 12:
        x_prev = A x0_hat + B x_t + sigma z,
        B = sqrt((1 - a_prev - sigma^2) / (1 - a)),  A = sqrt(a_prev) - B sqrt(a)
    so that eps_hat stays consistent with an x0_hat that was clipped. 1 - a_prev - sigma^2 is
    written as a product, which keeps its digits where it is small. The last step, a_prev = 1, is
    x0_hat.
    """
    ratio = (1 - a / a_prev) / (1 - a)
    sigma = eta * math.sqrt((1 - a_prev) * ratio)  # eq. 16
    B = math.sqrt((1 - a_prev) * (1 - eta**2 * ratio) / (1 - a))  # eq. 12
    A = math.sqrt(a_prev) - B * math.sqrt(a)
    return Row(*x0_coefficients(a, prediction), A, B, S=sigma)


def guided(net, x, t, y, w):
    """The network's output at x (B,C,H,W) and timestep t as arguments of sampling_update."""
    out, out_uncond = guided_pass(net, x, t, y, w)  # (B,C,H,W); 2C channels with learned variance
    return {"out": out, "out_uncond": out_uncond, "guidance": 0.0 if out_uncond is None else w}


@torch.no_grad()
def decode(
    net, alpha_bar, pairs, x, y=None, w=0.0, *, eta=0.0, seeds=None, prediction="eps", clip=True
):
    """From x (B,C,H,W) at pairs[0][0] down to an image; yields x_prev and x0_hat, like x.

    alpha_bar float64 (T,), on the CPU; pairs from subsequence(); y (B,) int64 labels or None; w
    guides; seeds (B,) int64 of the fresh noise, which eta > 0 needs; prediction is what the network
    gives. clip keeps x0_hat in [-1, 1], as images are.
    """
    for step, (t, t_prev) in enumerate(pairs):
        row = ddim_row(at(alpha_bar, t), at(alpha_bar, t_prev), eta, prediction)
        out = guided(net, x, t, y, w)
        x, x0_hat = sampling_update(x, row=row, step=step, seeds=seeds, clip=clip, **out)
        yield x, x0_hat


def noise(seeds, shape):
    """x_T (B,C,H,W) of seeds (B,) for images shape (C,H,W): the same for every sampler."""
    x = gaussian((len(seeds), *shape), seeds, -1, seeds.device)
    return x.to(memory_format=torch.channels_last)


def sample(net, alpha_bar, pairs, shape, seeds, y=None, w=0.0, **how):
    """decode() from noise. An image is a function of its seed (B,) and label alone."""
    return decode(net, alpha_bar, pairs, noise(seeds, shape), y, w, seeds=seeds, **how)


# -------------------------------------------------------------------------- up: from x_0 to x_T


def encode_row(a, b, prediction="eps"):
    """The step up from alpha_bar = a to b < a with the eps_hat found at a: eq. 12, sigma = 0.

        x_next = A x0_hat + B x,  B = sqrt((1 - b) / (1 - a)),  A = sqrt(b) - B sqrt(a)

    The first step leaves the image itself, where a = 1 and no network was trained: eps_hat is asked
    for at the lowest timestep, b, and in x_next = sqrt(b) x + sqrt(1 - b) eps_hat it is written as
    sqrt(1 - b) eps_hat = x - sqrt(b) x0_hat. That is eq. 9 at b, so A = -sqrt(b), B = 1 + sqrt(b).
    """
    if a == 1:
        return Row(*x0_coefficients(b, prediction), A=-math.sqrt(b), B=1 + math.sqrt(b))
    B = math.sqrt((1 - b) / (1 - a))
    return Row(*x0_coefficients(a, prediction), A=math.sqrt(b) - B * math.sqrt(a), B=B)


@torch.no_grad()
def encode(net, alpha_bar, pairs, x0, y=None, w=0.0, *, prediction="eps", clip=True):
    """The ODE of section 4.3 upwards, eq. 14 reversed; yields x and x0_hat, like x0.

    x0 (B,C,H,W) in [-1,1]; the rest as for decode(). The last x is the code of x0: from it decode()
    returns to x0, the closer the more steps there are (section 5.4). `clip` must be the same there:
    a clipped x0_hat makes another ODE.
    """
    x, ts = x0, [t for t, _ in reversed(pairs)]
    for step, (t, t_next) in enumerate(zip([-1, *ts], ts, strict=False)):
        row = encode_row(at(alpha_bar, t), at(alpha_bar, t_next), prediction)
        out = guided(net, x, max(t, ts[0]), y, w)
        x, x0_hat = sampling_update(x, row=row, step=step, clip=clip, **out)
        yield x, x0_hat


def slerp(a, b, weights):
    """Spherical interpolation (appendix D.5) of codes a, b (B,C,H,W): (B,K,C,H,W).

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


def passes(y, w):
    """How often the network sees each image in a step: guidance needs it with and without y."""
    return 1 if y is None or w in (0, -1) else 2


def opened(cfg, path, world, script="ddim"):
    """improved_ddpm.load_net of what this script draws: spacing and clipping as typed, or its own.

    Its settings stand in the second place, with the spacing and clip_denoised that are drawn.
    """
    walk = checkpoints.given(cfg, checkpoints.WALK)
    net, trained, *rest = load_net(path, world.device, script=script, walk=walk)
    return net, checkpoints.overlaid(trained, cfg, ("spacing", "clip_denoised")), *rest


def steps_of(cfg, T):
    """How many timesteps to visit: of a short chain all, where nobody gave a number."""
    return (
        cfg.sample_steps if checkpoints.given(cfg, ("sample_steps",)) else min(cfg.sample_steps, T)
    )


def sample_checkpoint(cfg, world):
    """--sample: images of the seeds, and with --gif their way."""
    net, trained, shape, names, alpha_bar = opened(cfg, cfg.sample, world)
    seeds, labels = cli.seeds_and_labels(cfg, net, names, cfg.guidance)
    T = trained.timesteps
    pairs = subsequence(T, steps_of(cfg, T), trained.spacing)
    how = {"w": cfg.guidance, "eta": cfg.eta, "prediction": trained.prediction}
    how["clip"] = trained.clip_denoised
    trajectory = partial(sample, world.for_sampling(net), alpha_bar, pairs, shape, **how)
    calls = len(pairs) * passes(labels, cfg.guidance)
    draw_samples(cfg, world, trajectory, seeds, labels, pairs, calls, f"eta {cfg.eta:g}", names)


def draw_samples(cfg, world, trajectory, seeds, labels, pairs, calls, name, names):
    """Write what trajectory(seeds, labels) ends in, by these steps, and print what it cost."""
    start = time.perf_counter()
    images = world.draw(trajectory, seeds, labels, cfg.batch_size, pairs)
    seconds = (time.perf_counter() - start) / len(seeds)
    if not world.is_main:
        return
    folder = cli.folder_of(cfg, cfg.sample)
    if cfg.gif:
        save_drawn(folder, images, labels, trajectory, seeds, world, pairs, names, w=cfg.guidance)
    else:
        save_samples(folder, images, labels if cfg.guidance != -1 else None, 10)
        print(f"samples: {folder / 'samples.png'}")
    print(f"{len(seeds)} images, {name}, {len(pairs)} steps, guidance w = {cfg.guidance:g}")
    print(f"{calls} network evaluations and {seconds:.3f} s per image")


def held_out(cfg, trained, shape, names, numbers):
    """Test images `numbers` (N,): x (N,C,H,W), and y (N,) if their classes are the network's.

    A single number: so many, evenly spaced.
    """
    name, root = cfg.data or trained.data, cfg.data_root or trained.data_root
    how = {"size": trained.size, "classes": trained.classes}
    ds, known = datasets.held_out(name, root, shape, names, **how)
    if isinstance(numbers, int):
        numbers = torch.from_numpy(spaced(len(ds), numbers))
    if numbers.max() >= len(ds):
        raise cli.BadInput(
            f"--seeds {int(numbers.max())}: {ds.name} has test images 0 to {len(ds) - 1}"
        )
    x, y = ds.batch(numbers.numpy())
    return x, y if known and names else None


def walk_back(cfg, world, solve=decode, script="ddim"):
    """--reverse-from data: test images to x_T by q(x_T | x_0), and, by `solve`, to images."""
    net, trained, shape, names, alpha_bar = opened(cfg, cfg.sample, world, script)
    if not (cfg.data or trained.data):
        raise cli.BadInput(f"--reverse-from data: {cfg.sample} names none; type --data NAME, too")
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    x0, y = held_out(cfg, trained, shape, names, seeds if cfg.seeds else cfg.n)
    if cfg.guidance and y is None:
        raise cli.BadInput("--guidance needs images of the network's own classes")
    T, seeds, net = trained.timesteps, seeds[: len(x0)], world.for_sampling(net)
    pairs = subsequence(T, steps_of(cfg, T), trained.spacing)
    how = {"w": cfg.guidance, "prediction": trained.prediction, "clip": trained.clip_denoised}
    eps = gaussian(x0.shape, seeds, -1, "cpu")  # steps 0, 1, ... are the walk's

    def noised(numbers, t):  # x_t of these images; at t = -1 themselves
        x, ts = x0[numbers], torch.full((len(numbers),), t)
        return q_sample(x, ts, eps[numbers], alpha_bar) if t >= 0 else x

    def walk(numbers):
        x, label = noised(numbers, pairs[0][0]).to(world.device), on(world.device, y, numbers)
        if solve is decode:
            how.update(eta=cfg.eta, seeds=on(world.device, seeds, numbers))
        return solve(net, alpha_bar, pairs, x, label, **how)

    def end(part, tick):
        return end_of(walk(part), tick, seeds[part], pairs, "walking back", "image")

    with world.autocast():
        ends = world.in_parts(end, len(x0), cfg.batch_size, pairs, "walking back")
    if world.is_main:
        path, left = cli.folder_of(cfg, cfg.sample) / "reverse-from-data", alpha_bar[pairs[0][0]]
        left = math.sqrt(left)
        there_and_back.save(path, world, x0, ends, y, names, noised, walk, pairs, left)


def on(device, rows, part=slice(None)):
    """Rows `part` on the device; None of None."""
    return None if rows is None else rows[part].to(device)


@exact()
def reconstruct(cfg, world, solve=decode, script="ddim", load=opened):
    """--encode: test images to codes and, by `solve`, back (section 5.4, table 2)."""
    net, trained, shape, names, alpha_bar = load(cfg, cfg.encode, world, script)
    seeds, _ = cli.seeds_and_labels(cfg, net, names, cfg.guidance)
    net = world.for_sampling(net)
    x0, y = held_out(cfg, trained, shape, names, seeds)
    if cfg.guidance and y is None:
        raise cli.BadInput("--guidance needs images of the network's own classes")
    T, how = trained.timesteps, {"w": cfg.guidance, "prediction": trained.prediction}
    how["clip"] = trained.clip_denoised
    rows, errors = [to_uint8(x0)], {}
    for steps in sorted({min(k, T) for k in numbers_of(cfg.encode_steps, "--encode-steps")}):
        pairs = subsequence(T, steps, trained.spacing)

        def there_and_back(part, tick, pairs=pairs):  # in fp32: bf16 would be the larger error
            x, label = on(world.device, x0, part), on(world.device, y, part)
            up = encode(net, alpha_bar, pairs, x, label, **how)
            code = end_of(up, tick, seeds[part], len(pairs), "encoding", "image")
            down = solve(net, alpha_bar, pairs, code, label, **how)
            return end_of(down, tick, seeds[part], pairs, "decoding", "image")

        desc = f"{steps} steps"
        back = world.in_parts(there_and_back, len(x0), cfg.batch_size, 2 * steps, desc)
        errors[steps] = ((back - x0) / 2).square().mean().item()
        rows.append(to_uint8(back))
    if world.is_main:
        folder = cli.folder_of(cfg, cfg.encode)
        picture, curve = folder / "reconstruction.png", folder / "reconstruction-error.png"
        save_grid(torch.cat([row[:16] for row in rows]), picture, min(len(x0), 16))
        panel = {"mean squared error": {"": (list(errors), list(errors.values()))}}
        plot_lines(curve, panel, xlabel="steps each way", logx=True, logy=tuple(panel))
        print(f"{len(x0)} test images; mean squared error per dimension, images in [0, 1]")
        print("\n".join(f"{steps:5d} steps  {error:.6f}" for steps, error in errors.items()))
        print(f"the images, and below them what came back: {picture}; {curve}")


@exact()
def interpolate(cfg, world, solve=decode, script="ddim", load=opened):
    """--interpolate: eleven images, by `solve`, between each two codes (section 5.3)."""
    net, trained, shape, names, alpha_bar = load(cfg, cfg.interpolate, world, script)
    if cfg.guidance and not cfg.classes:
        raise cli.BadInput("--interpolate draws without labels; give --guidance some --classes")
    seeds, labels = cli.seeds_and_labels(cfg, net, names, cfg.guidance)
    if len(seeds) % 2:
        raise cli.BadInput(f"--seeds: two make a row, so not {len(seeds)}; type 3,9 or 0-7")
    n = len(seeds) // 2
    if cfg.classes:  # one for a row
        labels = cli.labels_for(torch.arange(n), cli.parse_classes(cfg.classes, names))
    else:
        labels = None
    net = world.for_sampling(net)
    ends = held_out(cfg, trained, shape, names, seeds)[0] if cfg.data else None
    T = trained.timesteps
    pairs = subsequence(T, steps_of(cfg, T), trained.spacing)
    how = {"w": cfg.guidance, "prediction": trained.prediction, "clip": trained.clip_denoised}

    def between(part, tick):
        two = torch.stack([2 * part, 2 * part + 1], dim=1).flatten()  # (2B,)
        y = on(world.device, labels, part)  # (B,)
        if ends is None:
            codes = noise(on(world.device, seeds, two), shape)  # (2B,C,H,W)
        else:
            label = None if y is None else y.repeat_interleave(2)
            x = on(world.device, ends, two)
            up = encode(net, alpha_bar, pairs, x, label, **how)
            codes = end_of(up, tick, seeds[two], len(pairs), "encoding", "image")
        x = slerp(codes[0::2], codes[1::2], torch.linspace(0, 1, 11)).flatten(0, 1)  # (11B,C,H,W)
        label = None if y is None else y.repeat_interleave(11)
        whose = seeds[2 * part].repeat_interleave(11)  # (11B,), the first of each two
        down = solve(net, alpha_bar, pairs, x, label, **how)
        images = to_uint8(end_of(down, tick, whose, pairs, "interpolating"), whose)
        return images.unflatten(0, (len(part), 11))  # (B,11,H,W,C)

    steps, rows_at_once = len(pairs) * (1 if ends is None else 2), cfg.batch_size // 11
    images = world.in_parts(between, n, rows_at_once, steps, "interpolating")  # (n,11,H,W,C)
    if world.is_main:
        path = cli.folder_of(cfg, cfg.interpolate) / "interpolation.png"
        save_grid(images.flatten(0, 1), path, 11)
        print(f"{n} rows of eleven: {path}")


def numbers_of(text, flag, kind=int):
    """'5,10' -> [5, 10], whole numbers from 1; any numbers for kind float. Else BadInput."""
    try:
        numbers = [kind(part) for part in cli.split_list(text)]
    except ValueError:
        numbers = []
    finite = all(abs(number) <= MOST for number in numbers)  # which NaN is not
    if not numbers or not finite or (kind is int and min(numbers) < 1):
        raise cli.BadInput(f"{flag} {text}: expected numbers with commas between, such as 1,4")
    return numbers


TASKS = {"sample": 100, "encode": 8, "interpolate": 8}  # and how many by default


def task_of(cfg, script="ddim.py"):
    """What is asked for, a name of TASKS. Raises BadInput unless it is one."""
    if not cfg.task():
        raise cli.BadInput(
            "--sample is missing, a checkpoint of ddpm_pixel.py or improved_ddpm.py; "
            f"type python {script} --sample runs/pixel-mnist/ckpt.pt"
        )
    return cfg.task()


def check_task(cfg):
    """Raise BadInput for a setting out of its range, of all but eta."""
    cli.check_ranges(cfg, positive="n sample_steps batch_size")
    cli.check_processes(cfg.gpus, cfg.batch_size, precision=cfg.precision)
    numbers_of(cfg.encode_steps, "--encode-steps")
    if cfg.interpolate and not cfg.data and cli.typed(("data_root",)):
        raise cli.BadInput("--data-root does nothing without --data, whose images lie there")
    if cfg.sample and cfg.reverse_from == "noise" and (idle := cli.typed(("data", "data_root"))):
        raise cli.BadInput(f"{cli.flag(idle[0])} is for --reverse-from data: leave it out")
    if cfg.encode and cfg.classes:
        raise cli.BadInput("--classes: --encode takes test images in order: choose by --seeds")


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    check_task(cfg)
    cli.check_ranges(cfg, fraction="eta")
    if cfg.eta and not cfg.sample:
        raise cli.BadInput(f"--{task_of(cfg)} needs a way without fresh noise; leave out --eta")


def main():
    cfg = cli.parse(Config, __doc__)
    if cfg.smoke:
        cfg = cli.smaller(cfg, n=8, sample_steps=4, encode_steps="2,4")
    task = task_of(cfg)
    cfg = replace(cfg, n=cfg.n or TASKS[task])
    check(cfg)
    samples = walk_back if cfg.reverse_from == "data" else sample_checkpoint
    launch({"sample": samples, "encode": reconstruct, "interpolate": interpolate}[task], cfg)


if __name__ == "__main__":
    cli.entry(main)
