"""Classifier guidance: a second network says which way an image of the asked class lies.

Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (arXiv:2105.05233).

By Bayes, the score of the images of class y is that of all images plus a classifier's gradient,

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)          grad: with respect to x_t

The first term is a diffusion network that was never told a class: its noise is eps_hat =
-sqrt(1 - alpha_bar_t) grad log p(x_t). The second is a classifier of noisy images, trained here on
x_t of all t. A scale s on it sharpens: p(x_t) p(y | x_t)^s has fewer and surer images. In theory
s = 1 is the class; learned networks need more (section 4.3). In a step x_t -> x_{t-1},

    x_{t-1} ~ N(mu + s Sigma grad log p(y | x_t), Sigma)                           algorithm 1, DDPM
    eps_hat <- eps_hat - sqrt(1 - alpha_bar_t) s grad log p(y | x_t)               algorithm 2, DDIM

Section 4.1 expands log p at mu, and takes its gradient at x_t, because the steps are small. The
networks of ddpm_pixel.py and improved_ddpm.py can be guided, also conditional ones, and together
with classifier-free guidance, which needs no second network but asks the first one twice.

    python classifier_guidance.py --data mnist           6 minutes of one core; the classifier
    python classifier_guidance.py --sample runs/iddpm-mnist/ckpt.pt --guidance -1
        --classifier runs/classifier-mnist/ckpt.pt --classes 3,7 --classifier-scale 2
    python classifier_guidance.py --study runs/iddpm-mnist/ckpt.pt --n 300 --sample-steps 50
        --classifier runs/classifier-mnist/ckpt.pt    half an hour: s beside w, a table and a figure
    torchrun --nproc-per-node 8 classifier_guidance.py --config configs/imagenet100_classifier.yaml
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.pictures import save_drawn, save_grid, to_uint8
from runtime.processes import exact, launch, say_once
from runtime.run import Run
from runtime.typed_flags import check_idle

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import improved_ddpm
from compare_samplers import Store, cell, device_name
from ddim import at, ddim_row, guided, noise, numbers_of
from ddpm_pixel import alpha_bar_of, ancestral_row, q_sample
from eval_fid import scored
from evaluation import guidance_report
from evaluation.against import class_accuracy
from evaluation.classifier import classifier_of
from evaluation.image_sets import Images
from evaluation.over_time import accuracy, by_quarter, evenly, save_curves
from evaluation.sides import look
from image_data import datasets
from image_data.augment import shift
from kernels import gaussian, sampling_update, step_variance
from networks.noisy_classifier import NoisyClassifier
from networks.published.classifier import read_classifier

NETWORK = "data data_root size batch_size clip_denoised variance sample_steps guidance"
SHOWN = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # t / T in a picture of the gradient


@dataclass
class Config(cli.RunConfig):
    timesteps: int = 1000  # T of the chain; it and the next four are the guided network's
    schedule: Literal["linear", "cosine", "sigmoid", "sigmoid-beta"] = "cosine"  # of its noise
    alpha_min: float = 0.001  # smallest alpha_t
    beta_start: float = 0.0  # first beta_t of linear and sigmoid-beta; 0: 1e-4 times 1000/T
    beta_end: float = 0.0  # their last; 0: 0.02 times 1000/T
    weight_decay: float = 0.05  # of AdamW
    shift: int = 2  # moves training images by up to so many pixels (paper: random crops)

    model_channels: int = 32  # channels at full resolution (paper: 128)
    channel_mult: tuple[int, ...] = (1, 2, 2)  # times these at each resolution
    num_res_blocks: int = 1  # residual blocks per resolution (paper: 2; 4 at 64x64)
    attention_resolutions: tuple[int, ...] = (7, 8)  # heights that attend (paper: 32 16 8)
    num_heads: int = 1  # attention heads, also of the pooling
    num_head_channels: int = 0  # channels of a head (paper: 64), instead of --num-heads
    norm_groups: int = 0  # groups of the norms (paper: 32); 0 chooses fewer for a narrow network
    use_scale_shift_norm: bool = True  # the timestep scales and shifts the second norm
    resblock_updown: bool = True  # residual blocks halve the image, not convolutions
    dropout: float = 0.0  # dropout in residual blocks
    use_checkpoint: bool = False
    """compute activations twice instead of keeping them; with --sample, too, for the gradient"""
    metric_every: int = 500  # steps between two logged looks at held-out images; 0: none is logged
    metric_n: int = 250  # held-out images that are looked at, each at 20 timesteps

    sample: str = ""
    """do not train: guide this network, of ddpm_pixel.py, improved_ddpm.py, or published, by its
    settings of sampling where none are typed"""
    study: str = ""  # do not train: guide this one by all --study-scales and --study-guidance
    classifier: str = ""
    """what guides: a checkpoint of this script, or OpenAI's, such as 64x64_classifier.pt"""
    classifier_scale: float = 1.0  # s, the factor on the gradient
    classifier_batch: int = 0  # images at a time for the gradient, to save memory; 0: all
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # algorithm 1 or 2
    eta: float = 0.0  # fresh noise of a ddim step: 0 none, 1 as much as ddpm
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of a ddpm step: beta_tilde_t, beta_t, or learned; auto is learned where it was, else small"""
    clip_denoised: bool = True  # keep x0_hat in [-1, 1], where images lie
    sample_steps: int = 100  # how many of the T timesteps to visit, evenly spaced
    guidance: float = 0.0
    """w in (1+w) eps(x,y) - w eps(x): -1 does not tell the network the class, 0 does; other values
    are classifier-free guidance on top"""
    n: int = 100  # how many samples; with --study, in each row
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    study_scales: str = "0,0.5,1,2,5,10"  # values of s
    study_guidance: str = "-1,0,0.5,1,2,4"  # values of w, where the network knows labels

    GUIDED = cli.names("classifier_batch sampler eta variance clip_denoised sample_steps")
    ASKED = cli.names("classifier use_checkpoint") | {*checkpoints.NOISE}
    STUDY = cli.names("study_scales study_guidance")
    USES = {
        "sample": cli.DRAWS | GUIDED | ASKED | cli.names("classifier_scale guidance"),
        "study": cli.DRAWS | GUIDED | ASKED | STUDY | cli.names("data data_root size"),
    }
    NEEDS = cli.RunConfig.NEEDS | {"num_heads": "!num_head_channels"}
    NEEDS |= {"eta": "sampler=ddim", "variance": "sampler=ddpm"}
    NEEDS |= dict.fromkeys(("beta_start", "beta_end"), "schedule=linear,sigmoid-beta")
    IDLE = GUIDED | STUDY | cli.names("classifier_scale guidance n seeds")
    FREE = cli.names("use_checkpoint metric_every metric_n sample study classifier")
    FREE |= cli.RunConfig.FREE | IDLE


# -------------------------------------------------------------------- the gradient: section 4


def log_prob_gradient(classifier, x, t, y, batch=0):
    """The gradient of log p(y | x_t) with respect to x_t, like x (B,C,H,W), but in fp32.

    classifier(x, t) gives logits (B,K) of images and timesteps (B,); t is an int, y (B,) labels.
    batch: images at a time, 0 all. float64 x stay so; autocast and TF32 are kept away, for where
    the classifier is sure the gradient is a small difference.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def gradient(x, y):
        x = x.detach().to(dtype).requires_grad_()
        logits = classifier(x, torch.full((len(x),), t, device=x.device))  # (b,K)
        log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None])  # (b,1)
        return torch.autograd.grad(log_p.sum(), x)[0]  # an image's log p knows no other image

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), exact():
        return torch.cat(list(map(gradient, x.split(batch or len(x)), y.split(batch or len(x)))))


# ----------------------------------------------------------------- sampling: algorithms 1 and 2


def step_sigma(row, out):
    """Sigma of algorithm 1, the variance of the step: a float, or (B,C,H,W) where it is learned.

    The last step adds no noise. Ours is 0 there where Sigma is fixed; a learned one, as in the
    published code, is what the network says.
    """
    fixed = row.log_var_min == row.log_var_max == 0  # then S has it
    return row.S**2 if fixed else step_variance(row, out)


def less_noise(row, out, a, push):
    """Algorithm 2: eps_hat - sqrt(1 - a) push, as what the network gives, (B,C,H,W) or (B,2C,H,W).

    push (B,C,H,W) is s grad log p, a is alpha_bar_t. A network of eps gives eps_hat. Of others
    x0_hat = p x_t - q out, so it takes the same step, (1 - a) / sqrt(a) push. Where a is near 0
    that is far: x0_hat is clipped after it, not before it as in the published code.
    """
    out, v = out.tensor_split([push.shape[1]], dim=1)  # v: of a learned variance, or nothing
    return torch.cat([out - (1 - a) / (math.sqrt(a) * row.q) * push, v.to(push.dtype)], dim=1)


@torch.no_grad()
def sample(
    net,
    classifier,
    alpha_bar,
    pairs,
    shape,
    seeds,
    y,
    *,
    scale=1.0,
    w=0.0,
    algorithm=1,
    make_row=ancestral_row,
    clip=True,
    batch=0,
):
    """From noise to images of the seeds (B,) and labels y (B,); yields x_{t-1} and x0_hat.

    net, alpha_bar (T,) on the CPU, pairs, shape (C,H,W), make_row, clip: as in ddpm_pixel.sample. A
    net of no labels (net.null 0) gets none; w guides without a classifier. scale is s; batch: of
    log_prob_gradient.
    """
    x = noise(seeds, shape)  # x_T, (B,C,H,W)
    for step, (t, t_prev) in enumerate(pairs):
        a, a_prev = at(alpha_bar, t), at(alpha_bar, t_prev)
        row, out = make_row(a, a_prev), guided(net, x, t, y if net.null else None, w)
        if scale:
            push = scale * log_prob_gradient(classifier, x, t, y, batch)  # (B,C,H,W)
            if algorithm == 2:  # both terms of (1+w) eps(x,y) - w eps(x), so their sum, too
                both = {name: v for name, v in out.items() if torch.is_tensor(v)}
                out |= {name: less_noise(row, v, a, push) for name, v in both.items()}
        x, x0_hat = sampling_update(x, row=row, step=step, seeds=seeds, clip=clip, **out)
        if scale and algorithm == 1:
            x = x + step_sigma(row, out["out"]) * push
        yield x, x0_hat


def trajectory(net, classifier, cfg, trained, shape, seeds, y):
    """sample() as the settings say; `trained` are those of the network."""
    alpha_bar, pairs = alpha_bar_of(trained), improved_ddpm.pairs_of(trained)
    if cfg.sampler == "ddim":
        how = {"algorithm": 2}
        how["make_row"] = partial(ddim_row, eta=cfg.eta, prediction=trained.prediction)
    else:
        how = {"algorithm": 1, "make_row": improved_ddpm.rows_of(trained, alpha_bar, pairs)}
    how |= {"scale": cfg.classifier_scale, "w": trained.guidance, "clip": trained.clip_denoised}
    how["batch"] = cfg.classifier_batch
    return sample(net, classifier, alpha_bar, pairs, shape, seeds, y, **how)


# -------------------------------------------------------------------------- training: section 4


def make_net(cfg, shape, num_classes):
    """The classifier of the settings."""
    net = NoisyClassifier(shape, num_classes, **cli.taken_by(NoisyClassifier, cfg))
    return net.to(memory_format=torch.channels_last)


def train(cfg, world):
    ds = datasets.of(cfg)
    alpha_bar = alpha_bar_of(cfg).to(world.device)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, ds.shape, ds.num_classes).to(world.device)
    make = world.adam(cfg.lr, weight_decay=cfg.weight_decay)
    run = Run(cfg, world, ds, net=net, optimizer=make)
    noisy, held_out = partial(q_sample, alpha_bar=alpha_bar), held_out_of(cfg, ds)
    run.say(f"{ds.name}: {len(ds)} images {ds.shape}, {ds.num_classes} classes; classifier")
    if held_out.key == ds.key and not cfg.dry_run:
        say_once(f"note: {ds.name} has no test images; what is called held-out is trained on")

    def read(ds):  # the share that is read right at some timesteps
        how = cfg.timesteps, cfg.metric_n, cfg.batch_size, world
        return accuracy(run.ema, noisy, ds, *how)

    def moves(part):  # drawn for the whole batch
        rng, size = run.rng(part.step, "shift"), (cfg.batch_size, 2)
        return rng.integers(-cfg.shift, cfg.shift + 1, size)[part.where]

    for step in run.steps():  # goes on where it stopped; saves between two steps
        for part in run.parts(step):  # this process's share, in --accumulate parts
            x0, y = run.images(part)  # (b,C,H,W), (b,)
            x0 = shift(x0, run.bring(part, moves)) if cfg.shift else x0
            t, eps = run.uniform(part, cfg.timesteps), run.noise(part, x0.shape)
            logits = run.model(q_sample(x0, t, eps, alpha_bar), t)  # (b,K)
            losses = F.cross_entropy(logits, y, reduction="none")
            right = (logits.argmax(1) == y).float()
            run.backward(losses, t / cfg.timesteps, accuracy=right)
        run.descend()  # clip the gradient, AdamW, running means, log
        due = cfg.metric_every and (run.due(cfg.metric_every) or run.done)
        if due and (shares := world.drawn(partial(read, held_out), run.step)):
            run.log(**by_quarter(shares, "test_accuracy"))
        if run.due(cfg.sample_every):
            run.save_grid(partial(gradients, run.ema, held_out, alpha_bar), len(SHOWN))
    curves = {"training images": read(ds), "held-out images": read(held_out)}
    if world.is_main:
        save_curves(run.folder / "accuracy.png", curves, cfg.timesteps, 1 / ds.num_classes)
        save_grid(gradients(run.ema, held_out, alpha_bar), run.folder / "gradient.png", len(SHOWN))
        found = by_quarter(curves["held-out images"], "all").values()
        told = ", ".join(f"{100 * share:.1f} %" for share in found)
        print(f"accuracy on held-out images, and by quarter of t: {told}")
        print(f"over t: {run.folder / 'accuracy.png'}; the gradient: {run.folder / 'gradient.png'}")


def held_out_of(cfg, ds):
    """Images that training does not see. BadInput where there are no two classes to tell apart."""
    if ds.num_classes < 2:
        raise cli.BadInput(f"{ds.name} has no two classes to tell apart: name labelled --data")
    if cfg.dry_run:  # it reads none, and needs no data
        return ds
    how = {"size": cfg.size, "classes": cfg.classes}
    found, known = datasets.held_out(cfg.data, cfg.data_root, ds.shape, ds.class_names, **how)
    if not known:
        told = "give both splits the same, or name some that both have with --classes"
        raise cli.BadInput(f"{ds.name}: its test images have other classes; {told}")
    return found


def gradients(classifier, ds, alpha_bar):
    """uint8 images (N,H,W,C): x_t of four images in a row, t rising, and below it the gradient.

    It points to another class than theirs, and is scaled to fill the range of gray.
    """
    x0, y = (v.to(alpha_bar.device) for v in evenly(ds, 4))
    sheet = []
    for i, asked in enumerate((y + 1) % ds.num_classes):
        noisy, found = [], []
        eps = gaussian(x0[:1].shape, torch.tensor([i]), 0, x0.device)
        for t in (int(part * len(alpha_bar)) for part in SHOWN):
            x_t = q_sample(x0[i : i + 1], torch.tensor([t]), eps, alpha_bar)  # (1,C,H,W)
            g = log_prob_gradient(classifier, x_t, t, asked[None])
            noisy.append(x_t)
            found.append(g / g.abs().max().clamp(min=1e-30))
        sheet += noisy + found
    return to_uint8(torch.cat(sheet))


# ------------------------------------------------------------------------------------- commands


def load_classifier(path, device):
    """(classifier, its Config, shape (C,H,W), class names, alpha_bar) of a checkpoint.

    Its weights are the running mean, of several the first. Also a published one, whose file names
    no schedule: then alpha_bar is None. BadInput for other files.
    """
    state = read_classifier(path)
    cfg, shape = checkpoints.trained_config(Config, state, path), tuple(state["shape"])
    classes, weights = len(state["class_names"]), checkpoints.chosen_ema(state, path)
    net = checkpoints.built(lambda: make_net(cfg, shape, classes), weights, path).to(device)
    alpha_bar = alpha_bar_of(cfg) if state.get("named", True) else None
    return net.eval().requires_grad_(False), cfg, shape, state["class_names"], alpha_bar


def load_pair(cfg, path, world):
    """(network, its settings, classifier, shape, class names); BadInput where they do not fit."""
    asked = checkpoints.asked(cfg, "classifier_guidance", checkpoints.NOISE)
    net, trained, shape, net_names, alpha_bar = improved_ddpm.load_net(path, world.device, **asked)
    if not cli.not_given(cfg, ("sample_steps",)):
        trained = replace(trained, timestep_respacing="")
    trained = checkpoints.overlaid(trained, cfg, NETWORK.split())
    trained = replace(trained, variance=improved_ddpm.variance_of(trained))
    if cfg.sampler == "ddim" and alpha_bar[-1] < 1e-12:
        told = "divides by sqrt(alpha_bar), which is 0 at T: type --sampler ddpm"
        raise cli.BadInput(f"--sampler ddim {told} for {path}")
    found = load_classifier(cfg.classifier, world.device)
    classifier, its_cfg, its_shape, names, its_alpha_bar = found
    classifier.use_checkpoint = cfg.use_checkpoint
    pair, named = f"{cfg.classifier} and {path}", its_alpha_bar is not None
    if its_shape != shape:
        told = "train one on the other's data and size"
        raise cli.BadInput(f"{pair}: images (C, H, W) {its_shape} and {shape}; {told}")
    differ = [two for two in zip(names, net_names, strict=False) if len({*two}) > 1]
    differ = differ if named and trained.data else []  # the published know numbers only
    if net_names and (differ or len(names) != len(net_names)):
        first = "".join(f", {a} is {b}" for a, b in differ[:1])
        told = f"{len(names)} and {len(net_names)}{first}"
        raise cli.BadInput(f"{pair} have other classes: {told}; train both on the same --classes")
    same = named and its_alpha_bar.shape == alpha_bar.shape
    if named and not (same and torch.allclose(its_alpha_bar, alpha_bar, rtol=1e-6)):
        noise = " ".join(f"{cli.flag(k)} {getattr(trained, k)}" for k in checkpoints.NOISE)
        told = "none is trained on its betas" if trained.trained_betas else f"type {noise} for one"
        chains = f"schedules {its_cfg.schedule} and {trained.schedule}"
        chains += f", T = {its_cfg.timesteps} and {trained.timesteps}"
        raise cli.BadInput(f"{pair}: {chains}; {told}")
    return net, trained, classifier, shape, names


def seeds_and_labels(cfg, net, names, w):
    """int64 seeds (N,), and the class (N,) asked of each; BadInput for w that net cannot do."""
    if not net.null and w not in (0, -1):
        raise cli.BadInput("this network knows no labels; leave out --guidance")
    return cli.seeds_and_labels(cfg, net, names, w if net.null else 0)


def sample_checkpoint(cfg, world):
    net, trained, classifier, shape, names = load_pair(cfg, cfg.sample, world)
    seeds, labels = seeds_and_labels(cfg, net, names, trained.guidance)
    walk = partial(trajectory, world.for_sampling(net), classifier, cfg, trained, shape)
    pairs, folder = improved_ddpm.pairs_of(trained), cli.folder_of(cfg, cfg.sample)
    images = world.draw(walk, seeds, labels, trained.batch_size, pairs)
    walk = partial(trajectory, net, classifier, cfg, trained, shape)
    save_drawn(folder, images, labels, walk, seeds, world, pairs, names)


# ------------------------------------------------------------------- the study: s beside w


def judge_of(cfg, trained, shape, names, world):
    """(function (images, labels) -> figures of eval_fid.py, on rank 0; facts).

    Against held-out images of the classes that are drawn. Features, and the classes that are read,
    are of a classifier of clean images that guides nobody.
    """
    name, root, size = trained.data, trained.data_root, trained.size
    steps = 20 if cfg.smoke else 1500  # of its training
    extractor, _ = classifier_of(name, root, size=size, steps=steps, device=world.device)
    drawn = [names[i] for i in cli.parse_classes(cfg.classes, names)]
    known = set(names) <= set(extractor.class_names)
    classes = drawn if known and len(drawn) < len(extractor.class_names) else trained.classes
    ds, _ = datasets.held_out(name, root, shape, (), size=size, classes=classes)
    see = partial(look, extractor=extractor, world=world)
    reference = see(Images(f"{name}:test", ds.images, key=ds.key), keep=root, reference=True)

    def figures(images, labels):
        side = see(Images("samples", images, labels))
        if not world.is_main:
            return {}
        found = scored(side, reference, metrics=("frechet", "is", "prdc"), device=world.device)
        return found | {"class_accuracy": class_accuracy(side, extractor, names) if known else None}

    return figures, {"protocol": extractor.protocol, "reference": f"{name}:test, N = {len(ds)}"}


def study(cfg, world):
    """Each way of guidance over its scale, of the same seeds: tables, curves, grids."""
    net, trained, classifier, shape, names = load_pair(cfg, cfg.study, world)
    seeds, labels = seeds_and_labels(cfg, net, names, 0)
    judge, facts = judge_of(cfg, trained, shape, names, world)
    folder, quick = cli.folder_of(cfg, cfg.study), world.for_sampling(net)
    store = Store(folder / "classifier-guidance.jsonl", folder / "classifier-guidance-cells")
    store.rows = world.gather(store.rows)[0]  # of rank 0, whose disk it is
    walked = ("prediction", "variance", "clip_denoised", "batch_size", "timestep_respacing")
    facts |= {name: getattr(trained, name) for name in (*checkpoints.NOISE, *walked)}
    facts |= {name: getattr(cfg, name) for name in ("sampler", "eta", "seeds", "classes")}
    facts |= {"n": len(seeds), "steps": len(improved_ddpm.pairs_of(trained))}
    facts |= {"dtype": str(world.dtype), "device": f"{world.size} x {device_name(world.device)}"}
    facts["weights"] = [checkpoints.weights_hash(v) for v in (net, classifier)]

    def draw(s, w, n, settings, desc):
        how = replace(cfg, classifier_scale=s), replace(settings, guidance=w)
        walk = partial(trajectory, quick, classifier, *how, shape)
        pairs = improved_ddpm.pairs_of(settings)
        return world.draw(walk, seeds[:n], labels[:n], settings.batch_size, pairs, desc)

    def row(s, w):
        made_by = facts | {"scale": s, "guidance": w}
        if found := store.find(made_by):
            return found
        start = time.perf_counter()
        images = draw(s, w, len(seeds), trained, f"s = {s:g}, w = {w:g}").numpy()
        seconds = (time.perf_counter() - start) / len(seeds)
        figures = judge(images, labels.numpy()) | {"seconds_per_image": seconds}
        return store.add(made_by, figures, images[:16], write=world.is_main)

    # One step first, not timed: a GPU compiles kernels when they are first used.
    once = replace(trained, sample_steps=1, timestep_respacing="")
    draw(1.0, 0.0, min(len(seeds), trained.batch_size), once, "warm-up")
    scales = sorted({*numbers_of(cfg.study_scales, "--study-scales", float)})
    values = sorted({*numbers_of(cfg.study_guidance, "--study-guidance", float)})
    ways = {}
    if not net.null or net.null_label:
        ways["classifier"] = [row(s, -1.0) for s in scales]
    if net.null:
        ways["classifier, told y"] = [row(s, 0.0) for s in scales]
    if net.null and net.null_label:
        ways["classifier-free"] = [row(0.0, w) for w in values]
    if world.is_main:
        guidance_report.save(folder, facts, ways, partial(cell, store))


# ------------------------------------------------------------------------------------------ main


def check(cfg):
    """Raise BadInput for a setting out of its range, and for settings that contradict others."""
    cli.check_run(cfg)
    positive = "timesteps sample_steps n metric_n model_channels channel_mult num_res_blocks "
    not_negative = "shift metric_every weight_decay num_head_channels norm_groups classifier_batch"
    parts = "alpha_min beta_start beta_end dropout eta"
    cli.check_ranges(cfg, f"{positive} num_heads", not_negative, parts)
    # Whether the network that is sampled has so many timesteps, and labels, is its own affair.
    cli.check_sampling(replace(cfg, sample="another's", metric_every=0))
    if cfg.sample or cfg.study:
        if not cfg.classifier:
            told = f"what guides {cfg.sample or cfg.study} is missing: type --classifier CKPT"
            raise cli.BadInput(f"{told}, of this script, such as runs/classifier-mnist/ckpt.pt")
        check_idle(cfg, cli.typed(("eta", "variance")))
        numbers_of(cfg.study_scales, "--study-scales", float)
        numbers_of(cfg.study_guidance, "--study-guidance", float)
        if cfg.study and len(cli.parse_seeds(cfg.seeds, cfg.n)) < 2:
            raise cli.BadInput("--n, --seeds: at least 2 images, a covariance is compared")
    elif cfg.classifier:
        raise cli.BadInput("--classifier guides: type --sample or --study CKPT, too")
    elif not (alpha_bar_of(cfg).diff() < 0).all():
        raise cli.BadInput("--alpha-min, --timesteps: alpha_bar must fall at every step")


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_classifier.yaml")
    small = {"model_channels": 16, "num_heads": 1, "num_head_channels": 0, "norm_groups": 0}
    small |= {"channel_mult": (1, 2), "metric_every": 0, "metric_n": 8}
    small |= {"n": 8, "sample_steps": 4, "study_scales": "0,1", "study_guidance": "-1,1"}
    cfg = cli.smoke(cfg, **small, out="runs/smoke-classifier")
    check(cfg)
    if cfg.sample or cfg.study:
        launch(sample_checkpoint if cfg.sample else study, cfg)
    else:
        held_out_of(cfg, datasets.of(cfg))  # by one process
        cfg = datasets.prepared(cfg)
        launch(train, replace(cfg, out=cfg.out or f"runs/classifier-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    cli.entry(main)
