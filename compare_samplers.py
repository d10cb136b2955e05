"""Which sampler, how many steps, how much guidance? The study of one checkpoint.

A sampler is worth what its images are worth, so each is scored by eval_fid.py: how far N samples
lie from held-out images (the Fréchet distance of a classifier's features, lower is better), how
sure and varied that classifier reads them (the inception score), precision and recall, and how many
of them it reads as the class that was asked for. What it costs is counted in evaluations of the
network, which depend on no machine, and in seconds, which do. All draw the same seeds, and so start
at the same x_T.

    ddim           ddim.py, with --eta
    dpmpp, heun    dpm_solver.py
    ddpm           the ancestral step of ddpm_pixel.py with both of its variances, beta_tilde and
                   beta; where the network has learned one (improved_ddpm.py), with that, too

    python compare_samplers.py runs/pixel-mnist/ckpt.pt --n 1000 --compare-steps 5,10,20,50
    python compare_samplers.py runs/pixel-mnist/ckpt.pt --sampler dpmpp --sample-steps 10
    python compare_samplers.py runs/pixel-mnist/ckpt.pt --along 10,50,250 --sampler ddpm
    python compare_samplers.py runs/T50 runs/T200 --along 1000 --sampler ddpm    all T steps of each
    python compare_samplers.py runs/pixel-mnist/ckpt.pt --smoke

The first draws 20,000 images for a table of samplers and 6,000 for one of guidance, with the
network of configs/mnist_pixel.yaml in about an hour on one CPU core. One result beforehand: in few
steps beta is far too large a variance (Fréchet distance 6.8, 5.8, 5.1 with beta_tilde in 5, 10, 20
steps of one network, 190.8, 42.7, 11.2 with beta); compare.md says why. All leave beside the
checkpoint, or in --out,

    compare.md, compare.json    two tables: sampler x steps, and guidance; with all that made them
    compare.png                 the first as curves over network evaluations
    compare-grids.png           the same few seeds in each of its cells
    guidance.png                the second: curves, and the same few seeds
    guidance-film.gif, .png     its values of w side by side, a sample of each class on its way
    compare.jsonl               a line for each finished row, so that a later call goes on there;
                                its images are in compare-cells/

--along looks into the walks of one sampler: how good are x_t, and the x0_hat that the network makes
of it, after each tenth of the way, in few steps and in many? along.md, .json, .png (curves) and
along-strip.png, of several checkpoints in one. Settings other than the default ones are in the
names of the files.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.files import append_row, read_log
from runtime.finite import watched
from runtime.pictures import save_grid, to_uint8
from runtime.processes import launch
from runtime.result_folders import digest_of, suffix_of
from runtime.typed_flags import check_idle

import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

import ddim
import ddpm_pixel
import dpm_solver
from ddim import at, noise, numbers_of, subsequence
from evaluation import samplers_report, study_names, table
from evaluation.checkpoint_samples import meant
from evaluation.guidance_report import sampler_name
from evaluation.manifold import manifold
from evaluation.sides import look
from improved_ddpm import rows_of, variance_of

SAMPLERS = ("ddim", "dpmpp", "heun", "ddpm")
SHOWN = 16  # images in a cell of the grids
FEWEST = 6  # images, for precision and recall: they look at fifth neighbours
PAD = 2  # pixels between the images of save_grid
PLACES = 10  # parts of a walk that --along looks at


@dataclass
class Config(cli.NetworkCommand):
    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """a checkpoint of ddpm_pixel.py or improved_ddpm.py, or a published network"""
    more: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """with --along: further ones, such as of other T, in the same figure"""
    along: str = ""
    """numbers of steps, such as 10,50,250: instead of the tables, how good x_t and x0_hat are on
    the way, along a walk of each"""
    n: int = 1000  # images of each row of the tables
    seeds: str = ""  # of the samples, such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    compare_steps: str = "5,10,20,50,100,250,1000"  # numbers of steps to compare; T at most
    compare_guidance: str = "-1,0,0.5,1,2,4"
    """values of w to compare at --sample-steps of --sampler, where there are labels"""
    sampler: Literal["ddim", "dpmpp", "heun", "ddpm"] = "ddim"
    """of the table over guidance, and of --along"""
    sample_steps: int = 50  # of the table over guidance
    guidance: float = 0.0
    """of the table over samplers and steps, and of --along: w in (1+w) eps(x,y) - w eps(x)"""
    spacing: Literal["linear", "quadratic", "leading", "trailing"] = "linear"
    """where the timesteps lie: see ddim.py; if it is not typed, as the network's settings say"""
    clip_denoised: bool = True  # keep x0_hat in [-1, 1]; not typed, as its settings say
    eta: float = 0.0  # fresh noise of a ddim step: 0 none, 1 as much as ddpm
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of --sampler ddpm: beta_tilde, beta, or learned; auto is learned where it was, else small.
    The table over steps has all"""
    data: str = ""  # what to compare with, if not the data that the network was trained on
    data_root: str = ""  # where data sets are looked for (default: where the training found them)

    IDLE = cli.names("seed")
    DECIDE = cli.names("checkpoint n seeds classes batch_size precision sampler guidance spacing")
    DECIDE |= cli.names("clip_denoised eta variance data")
    USES = {"along": DECIDE | cli.names("data_root more")}
    NEEDS = {"variance": "sampler=ddpm"}


def ways_of(trained):
    """[(sampler, variance)] of the table over steps: a variance, for ancestral steps alone."""
    ancestral = ("small", "large", "learned")[: 2 + trained.learn_sigma]
    return [(s, v) for s in SAMPLERS for v in (ancestral if s == "ddpm" else ("",))]


def trajectory_of(cfg, net, trained, alpha_bar, shape, sampler, steps, w):
    """The function (seeds, labels) -> (x, x0_hat), (B,C,H,W), of each step of this sampler.

    trained.variance is that of ancestral steps.
    """
    pairs = subsequence(trained.timesteps, steps, trained.spacing)
    where = (net, alpha_bar, pairs, shape)
    if sampler == "ddpm":
        make_row = rows_of(trained, alpha_bar, pairs)
        clip = trained.clip_denoised
        return partial(ddpm_pixel.sample, *where, w=w, make_row=make_row, clip=clip)
    how = {"w": w, "prediction": trained.prediction, "clip": trained.clip_denoised}
    if sampler == "ddim":
        return partial(ddim.sample, *where, eta=cfg.eta, **how)
    return partial(dpm_solver.sample, sampler, *where, **how)


def last_noise(alpha_bar, pairs):
    """Of the last step that adds noise: t, t_prev, the noise that x_prev should have in all, and
    what an ancestral step adds with either variance, as standard deviations. None for one step."""
    if len(pairs) < 2:
        return None
    (t, t_prev), how = pairs[-2], {"a": at(alpha_bar, pairs[-2][0])}
    how["a_prev"] = at(alpha_bar, t_prev)
    added = {v: ddpm_pixel.ancestral_row(**how, variance=v).S for v in ("small", "large")}
    wanted = (1 - how["a_prev"]) ** 0.5
    return {"steps": len(pairs), "t": t, "t_prev": t_prev, "wanted": wanted, **added}


# -------------------------------------------------------------------------------------- the study


class Store:
    """Finished rows in a file of JSON lines, and a picture of each in a folder beside it.

    A row is {"made_by": all that decides its figures, "figures": ..., "cell": name of the picture}.
    """

    def __init__(self, path, cells):
        self.path, self.cells = path, cells
        rows = [row for row in read_log(path) if {"made_by", "figures", "cell"} <= row.keys()]
        self.rows = [row for row in rows if (cells / str(row["cell"])).exists()]

    def find(self, made_by):
        """The row that was made by just this, or None."""
        return next((row for row in self.rows if row["made_by"] == made_by), None)

    def add(self, made_by, figures, images, columns=None, write=True):
        """Keep a row, its images uint8 (N,H,W,C) first; returns it. write: False on other ranks."""
        name = f"{made_by['sampler']}-{made_by['steps']}-w{made_by['guidance']:g}"
        name += f"-{digest_of(made_by)}.png"
        row = {"made_by": made_by, "figures": figures, "cell": name}
        self.rows.append(row)
        if write:
            save_grid(images, self.cells / name, columns)
            append_row(self.path, row)
        return row


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def cell(store, row):
    """The picture of a row: uint8 (H,W,3) or (H,W)."""
    with Image.open(store.cells / row["cell"]) as picture:
        return np.asarray(picture)


def untiled(sheet, rows, shape):
    """uint8 (rows,K,H,W,C): the images of shape (C,H,W) in a picture that save_grid wrote."""
    c, h, w = shape
    columns = (sheet.shape[1] - PAD) // (w + PAD)
    sheet = sheet.reshape(*sheet.shape[:2], c)[PAD:, PAD:]
    sheet = sheet.reshape(rows, h + PAD, columns, w + PAD, c)[:, :h, :, :w]
    return sheet.swapaxes(1, 2)


def evaluator_of(cfg, trained, shape, names, device):
    """The Evaluator of samples, against held-out images of the classes that are drawn."""
    from eval_fid import Evaluator

    drawn = cli.parse_classes(cfg.classes, names) if cfg.classes else []
    return Evaluator(
        cfg.data or trained.data,
        cfg.data_root or trained.data_root,
        shape=shape,
        size=trained.size,
        class_names=names,
        device=device,
        classes=[names[i] for i in drawn] or trained.classes,
        steps=20 if cfg.smoke else 1500,
    )


class Study:
    """A checkpoint, the seeds that all its rows draw, and the rows that are there already."""

    def __init__(self, cfg, world):
        opened = ddim.opened(cfg, cfg.checkpoint, world, "compare_samplers")
        net, trained, self.shape, self.names, self.alpha_bar = opened
        self.cfg, self.world, self.net = cfg, world, net
        self.seeds, self.labels = cli.seeds_and_labels(cfg, net, self.names, cfg.guidance)
        trained = checkpoints.overlaid(trained, cfg, ("variance",))
        self.trained = trained = replace(trained, variance=variance_of(trained))
        self.evaluator = evaluator_of(cfg, trained, self.shape, self.names, world.device)
        self.real = None  # features (M,d) of what is compared with, when they are needed
        self.folder = cli.folder_of(cfg, cfg.checkpoint)
        self.store = Store(self.folder / "compare.jsonl", self.folder / "compare-cells")
        self.store.rows = world.gather(self.store.rows)[0]  # of rank 0, whose disk it is
        self.quick = world.for_sampling(net)
        self.common = {
            "weights": checkpoints.weights_hash(net),
            "n": len(self.seeds),
            "seeds": cfg.seeds,
            "classes": cfg.classes,
            "spacing": trained.spacing,
            "clip_denoised": trained.clip_denoised,
            "protocol": self.evaluator.protocol,
            "features": getattr(self.evaluator.extractor, "feature_hash", None),
            "reference": self.evaluator.reference,
            "reference_key": self.evaluator.real.key,
            "n_reference": self.evaluator.n_reference,
            "device": f"{world.size} x {device_name(world.device)}",
            "dtype": str(world.dtype),
            "batch_size": cfg.batch_size,
            "figures": list(samplers_report.FIGURES.values()),
        }

    def walk(self, sampler, variance, steps, w):
        """trajectory_of of this sampler; variance: of ancestral steps."""
        trained = replace(self.trained, variance=variance or self.trained.variance)
        where = self.cfg, self.quick, trained, self.alpha_bar, self.shape
        return trajectory_of(*where, sampler, steps, w)

    def about(self, sampler, variance, steps, w, **more):
        """What a row is made by."""
        about = {"sampler": sampler, "steps": steps, "guidance": w}
        about |= {"eta": self.cfg.eta} if sampler == "ddim" else {}
        about |= {"variance": variance} if sampler == "ddpm" else {}
        return self.common | about | more

    def draw(self, sampler, variance, steps, w, n, desc):
        """uint8 images (n,H,W,C) of the first n seeds."""
        y = None if self.labels is None else self.labels[:n]
        walk, cfg = self.walk(sampler, variance, steps, w), self.cfg
        return self.world.draw(walk, self.seeds[:n], y, cfg.batch_size, steps, desc)

    def warm_up(self):
        """One step first, not timed: a GPU compiles kernels when they are first used, and records
        the network when it first sees a batch of this size."""
        n = min(len(self.seeds), self.cfg.batch_size)
        self.draw("ddim", "", 1, self.cfg.guidance, n, "warm-up")

    def score(self, images, w, also=None):
        """The figures of eval_fid.py, {name: number or None}, of images uint8 (N,H,W,C) drawn with
        guidance w: at -1 no class was asked for."""
        labels = None if self.labels is None or w == -1 else self.labels.numpy()
        return self.evaluator(np.ascontiguousarray(images), labels, self.world, also)

    def precision_and_recall(self, feats):
        """Those of features (N,d) of samples; None where there are too few for a neighbourhood."""
        judge = self.evaluator
        if self.real is None:
            side = look(judge.real, judge.extractor, world=self.world, keep=judge.root)
            self.real = side.feats
        if min(len(feats), len(self.real)) < FEWEST:
            return {"precision": None, "recall": None}
        found = manifold(self.real, feats, device=self.world.device)
        return {name: found[name] for name in ("precision", "recall")}

    def costs(self, sampler, steps, w, seconds):
        calls = dpm_solver.calls_of(sampler, steps) * ddim.passes(self.labels, w)
        return {"evaluations": calls, "seconds_per_image": seconds / len(self.seeds)}

    def row(self, sampler, variance, steps, w):
        """What this sampler is worth: computed, unless the store has it."""
        made_by = self.about(sampler, variance, steps, w)
        if found := self.store.find(made_by):
            return found
        start, desc = time.perf_counter(), f"{sampler_name(made_by)}, {steps} steps, w = {w:g}"
        images = self.draw(sampler, variance, steps, w, len(self.seeds), desc).numpy()
        seconds = time.perf_counter() - start
        figures = self.score(images, w, self.precision_and_recall) | self.costs(
            sampler, steps, w, seconds
        )
        return self.store.add(made_by, figures, images[:SHOWN], write=self.world.is_main)

    def facts(self, **more):
        """(what decides all in a report, and what else it says)."""
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        told = {"checkpoint": self.cfg.checkpoint, "command": command}
        return self.common | more, told | {"network": getattr(self.evaluator, "network", None)}


def compare(cfg, world):
    """Both tables, their figures, and the lines they are made from."""
    study = Study(cfg, world)
    study.warm_up()
    trained, T = study.trained, study.trained.timesteps
    wanted = sorted({min(k, T) for k in numbers_of(cfg.compare_steps, "--compare-steps")})
    by_steps = [study.row(*who, k, cfg.guidance) for who in ways_of(trained) for k in wanted]
    by_guidance, steps, values = [], min(cfg.sample_steps, T), []
    variance = trained.variance if cfg.sampler == "ddpm" else ""
    if study.labels is not None and study.net.null_label:
        values = sorted({*numbers_of(cfg.compare_guidance, "--compare-guidance", float)})
        by_guidance = [study.row(cfg.sampler, variance, steps, w) for w in values]
    if not world.is_main:
        return
    lists = {"compare_steps": wanted, "compare_guidance": values}
    decides, told = study.facts(guidance=cfg.guidance, eta=cfg.eta, **lists)
    decides |= {"sampler": cfg.sampler, "sample_steps": steps, "variance": variance}
    walks = [subsequence(T, k, trained.spacing) for k in wanted]
    told["last_noise"] = [*filter(None, (last_noise(study.alpha_bar, pairs) for pairs in walks))]
    decide = [*Config.DECIDE, "compare_steps", "compare_guidance", "sample_steps"]
    suffix = suffix_of(study_names.changed(cfg, decide))
    suffix, known = study_names.name_for(study.folder, "compare", suffix, decides)
    picture = partial(cell, study.store)
    where = study.folder, suffix, decides | told
    names = samplers_report.write(*where, by_steps, by_guidance, picture)
    print((study.folder / names[0]).read_text())
    if values:
        names += guidance_film(study, suffix, known, variance, steps, values)
    samplers_report.last_line(study.folder, names)


def guidance_film(study, suffix, known, variance, steps, values):
    """guidance-film.gif and .png: a sample of each class at each w, on its way; their names.

    known: whether such files are of these settings, if they are there.
    """
    from runtime.films import marks_of, one_each, save_beside

    names = [f"guidance-film{suffix}.{kind}" for kind in ("gif", "png")]
    if known and all((study.folder / name).exists() for name in names):
        return names
    seeds, labels = cli.seeds_and_labels(
        replace(study.cfg, n=len(study.names)), study.net, study.names
    )
    chosen, rows, note = one_each(labels, len(seeds), study.names)
    seeds, y = (v[torch.as_tensor(chosen)].to(study.world.device) for v in (seeds, labels))
    films = {}
    for w in values:
        walk = study.walk(study.cfg.sampler, variance, steps, w)
        with study.world.autocast():
            xs = [x for x, _ in watched(walk(seeds, y), seeds.tolist(), steps, f"w = {w:g}")]
        films[f"w = {w:g}"] = [to_uint8(x).numpy() for x in (noise(seeds, study.shape), *xs)]
    pairs = subsequence(study.trained.timesteps, steps, study.trained.spacing)
    path = str(study.folder / names[0]).removesuffix(".gif")
    save_beside(path, films, marks_of(pairs), rows, note)
    return names


# -------------------------------------------------------------------------------- along one walk


def places_of(steps):
    """After how many steps a walk is looked at: at its beginning, each tenth part, and its end."""
    return sorted({round(i * steps / PLACES) for i in range(PLACES + 1)})


def seen_along(walk, x, places, tick):
    """uint8 (B,2,K,H,W,C): x_t after each of `places` steps, and the x0_hat made of it.

    walk yields x and x0_hat of each step, (B,C,H,W); x: before the first. At the end both are x.
    """
    shown, guessed = [], []
    for k, (x_prev, x0_hat) in enumerate(walk):
        if k in places:
            shown.append(to_uint8(x))
            guessed.append(to_uint8(x0_hat))
        x = x_prev
        tick()
    last = to_uint8(x)
    pair = [torch.stack([*images, last], dim=1) for images in (shown, guessed)]  # (B,K,H,W,C)
    return torch.stack(pair, dim=1)


def walked(study, steps):
    """The row of a walk in so many steps: computed, unless the store has it."""
    cfg, places, w = study.cfg, places_of(steps), study.cfg.guidance
    variance = study.trained.variance if cfg.sampler == "ddpm" else ""
    made_by = study.about(cfg.sampler, variance, steps, w, along=places)
    if found := study.store.find(made_by):
        return found
    walk = study.walk(cfg.sampler, variance, steps, w)
    world, desc = study.world, f"{sampler_name(made_by)}, {steps} steps"

    def images(part, tick):
        seeds = study.seeds[part]
        y = None if study.labels is None else study.labels[part].to(world.device)
        way_down = watched(walk(seeds.to(world.device), y), seeds, steps, desc)
        return seen_along(way_down, noise(seeds.to(world.device), study.shape), places, tick)

    start = time.perf_counter()
    with world.autocast():
        seen = world.in_parts(images, len(study.seeds), cfg.batch_size, steps, desc).numpy()
    figures = study.costs(cfg.sampler, steps, w, time.perf_counter() - start)
    figures["x_t"] = [study.score(seen[:, 0, k], w) for k in range(len(places))]
    figures["x0_hat"] = [study.score(seen[:, 1, k], w) for k in range(len(places) - 1)]
    figures["x0_hat"].append(figures["x_t"][-1])
    shown = seen[0].reshape(-1, *seen.shape[3:])  # of one seed: x_t, and below it x0_hat
    return study.store.add(made_by, figures, shown, len(places), write=world.is_main)


def along(cfg, world):
    """The quality of x_t and of x0_hat over the walk, of each checkpoint and number of steps."""
    paths = (cfg.checkpoint, *cfg.more)
    names = table.short_names(paths) if cfg.more else [""]
    studies = [Study(replace(cfg, checkpoint=path), world) for path in paths]
    first, numbers = studies[0], numbers_of(cfg.along, "--along")
    for path, study in zip(paths, studies, strict=True):
        if any(study.common[key] != first.common[key] for key in ("protocol", "reference_key")):
            told = f"{study.evaluator.reference} and {first.evaluator.reference}"
            raise cli.BadInput(f"{path}, {paths[0]}: scored against {told}; name one with --data")
    wanted = [sorted({min(k, study.trained.timesteps) for k in numbers}) for study in studies]
    found = []
    for name, study, some in zip(names, studies, wanted, strict=True):
        found += [(name, study, walked(study, steps)) for steps in some]
    if not world.is_main:
        return
    decides, told = first.facts(along=wanted[0], sampler=cfg.sampler)
    decides |= {"variance": found[0][2]["made_by"].get("variance", "")}
    decides |= {"guidance": cfg.guidance, "eta": cfg.eta}
    more = {}
    if cfg.more:
        decides |= {"runs": names, "all": [row["made_by"] for *_, row in found]}
        told |= {"checkpoint": ", ".join(paths)}
        more = {"with": ",".join(names[1:])}
    suffix = suffix_of(study_names.changed(cfg, [*Config.DECIDE, "along"]) | more)
    suffix, _ = study_names.name_for(first.folder, "along", suffix, decides)
    strips = [untiled(cell(study.store, row), 2, study.shape) for _, study, row in found]
    rows = [{"run": name} | row["made_by"] | row["figures"] for name, _, row in found]
    names = samplers_report.write_along(first.folder, suffix, decides | told, rows, strips)
    print((first.folder / names[0]).read_text())
    samplers_report.last_line(first.folder, names)


# ------------------------------------------------------------------------------------------ main


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    if not cfg.checkpoint:
        raise cli.BadInput(
            "a checkpoint is missing; type python compare_samplers.py runs/pixel-mnist/ckpt.pt"
        )
    cli.check_ranges(cfg, positive="n sample_steps batch_size", fraction="eta")
    if len(cli.parse_seeds(cfg.seeds, cfg.n)) < 2:
        raise cli.BadInput("--n, --seeds: at least 2 images, a covariance is compared")
    if cfg.more and not cfg.along:
        raise cli.BadInput(f"{cfg.more[0]}: the tables are of one checkpoint; several take --along")
    if len(cfg.more) >= len({cfg.checkpoint, *cfg.more}):
        raise cli.BadInput("--along: the same checkpoint twice; name each once")
    numbers_of(cfg.compare_steps, "--compare-steps")
    numbers_of(cfg.compare_guidance, "--compare-guidance", float)
    if cfg.along:
        numbers_of(cfg.along, "--along")
        check_idle(cfg, cli.typed(("variance",)))
        if cfg.eta and cfg.sampler != "ddim":
            raise cli.BadInput(f"--eta is of ddim, and --along goes by {cfg.sampler}: leave it out")
    cli.check_processes(cfg.gpus, cfg.batch_size, precision=cfg.precision)


def main():
    cfg = cli.parse(Config, __doc__)
    if cfg.smoke:
        tiny = {"n": 8, "sample_steps": 4, "compare_steps": "2,4", "compare_guidance": "0,1"}
        cfg = cli.smaller(cfg, **tiny)
    cfg = replace(cfg, more=tuple(map(meant, cfg.more)))
    check(cfg)
    launch(along if cfg.along else compare, cfg)


if __name__ == "__main__":
    cli.entry(main)
