"""A dataclass becomes a command line (tyro) with a YAML file underneath; errors are one line.

`Script`, `Command` and `RunConfig` hold what chapters share; a chapter's Config adds its own.
"""

import contextlib
import dataclasses
import inspect
import io
import math
import os
import re
import sys
from pathlib import Path
from typing import ClassVar, Literal

import torch

# Settings that name a checkpoint: the folder of a run means its ckpt.pt.
CHECKPOINTS = ("sample", "nll", "encode", "interpolate", "study", "classifier", "checkpoint")
CHECKPOINTS += ("resume", "ae", "latents", "flow")
TEXTS = frozenset({"negative", "classes", "seeds", "metrics", "sample_args"})  # are no paths


class BadInput(Exception):
    """The user can mend this; one line: what was wrong, what was expected, what to type."""

    def __init__(self, told):
        super().__init__(" ".join(filter(None, map(str.strip, str(told).splitlines()))))


# What drawing samples takes in every chapter, beside what the chapter names.
DRAWS = frozenset({"n", "seeds", "classes", "batch_size", "precision", "compile", "ema"})


def default_gpus():
    """One GPU where there is one, else the CPU."""
    return min(torch.cuda.device_count(), 1)


@dataclasses.dataclass
class Script:
    """The settings that every script has."""

    config: str = ""  # YAML file of settings, under the flags
    out: str = ""  # folder for what is made
    smoke: bool = False  # a few tiny steps, to see that everything works
    gpus: int = dataclasses.field(default_factory=default_gpus)
    """number of GPUs: 0 is the CPU, N > 1 starts N processes"""

    # A flag that is typed does something or is refused. A script says which settings have a part in
    # each of its tasks, which have none in training, and which do nothing unless another setting is
    # on ("metric_every"), is off ("!timestep_respacing") or is one of some ("sampler=ddim,ddpm").
    USES: ClassVar[dict[str, frozenset]] = {}
    IDLE: ClassVar[frozenset] = frozenset()
    NEEDS: ClassVar[dict[str, str]] = {}

    def task(self):
        """The setting that asks for something else than the script's training, or ""."""
        return next((name for name in self.USES if getattr(self, name)), "")


@dataclasses.dataclass
class Command(Script):
    """The settings that every command has that knows data sets."""

    config: str = ""  # YAML file of settings, under the flags; if empty, that of --data in configs/
    data: str = "glyphs"
    """glyphs, mnist, fashion_mnist, cifar10, afhq, imagenet100, or a folder or zip of images"""
    data_root: str = "data"  # where data sets are looked for, downloaded to and prepared
    classes: str = ""  # comma-separated names, or numbers where no name is one; empty: all of them
    batch_size: int = 64  # images at a time, over all processes
    seed: int = 0  # everything random in training is a function of this and the step


@dataclasses.dataclass
class NetworkCommand(Command):
    """The settings that every command has that runs a network of ours."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what networks compute in. auto: bf16 on GPUs that have it (A100, L4 and later), fp16 with a
    scaled loss on V100 and T4, fp32 on others and on the CPU"""


@dataclasses.dataclass
class RunConfig(NetworkCommand):
    """The settings that every training has."""

    size: int = 0  # resize the shorter side to this and crop the centre; 0 keeps the images' size
    flip: bool = False  # flip half of the training images left to right
    steps: int = 3000  # optimizer steps
    epochs: float = 0.0  # passes over the training images, in place of --steps
    lr: float = 1e-3  # peak learning rate
    warmup: int = 200  # steps over which the learning rate rises from zero
    lr_decay: Literal["cosine", "none"] = "cosine"
    """times half a cosine from 1 at step 0 to 0 at --steps, or constant after warm-up"""
    clip_grad: float = 1.0  # largest gradient norm
    ema: tuple[float, ...] = (0.998,)
    """decays of running means of the weights, all kept; the first is what gets sampled. After n
    steps a decay is at most (1+n)/(10+n). With --sample: the one to use; 0: the weights as such"""
    accumulate: int = 1  # parts in which a process handles its share of the batch, to save memory
    resume: str = "auto"  # auto (go on where the run stopped), never, or a checkpoint
    compile: bool = False  # torch.compile the network, for training and for sampling
    graph: bool = False
    """record forward and backward of the network as CUDA graphs, which start its many kernels by
    one call; not with --accumulate, --shard or --discriminator. Where one GPU trains, that is so
    unless --no-graph is typed; sampling always does it"""
    tensorboard: bool = False  # write TensorBoard files too
    wandb: bool = False  # tell Weights & Biases too; offline with WANDB_MODE=offline
    log_every: int = 50  # steps between two lines of log.jsonl
    save_every: int = 500  # steps between two checkpoints, a multiple of --log-every
    keep_every: int = 0  # steps between checkpoints kept as ckpt-STEP.pt, for eval_fid.py --curve
    sample_every: int = 1000  # steps between two sample grids; 0 for none but the last
    dry_run: bool = False
    """time some steps of each stage, say hours, memory and the rest that is needed; keep nothing"""
    price_per_gpu_hour: float = 0.0  # --dry-run: dollars, to say what the run costs; 0: not said

    NEEDS: ClassVar[dict[str, str]] = {
        "steps": "!epochs",
        "metric_n": "metric_every",
        "label_dropout": "class_cond",
        "price_per_gpu_hour": "dry_run",
    }

    # What a resumed run may change. All but `steps` leave the weights at a given step as they are,
    # but for rounding; where the learning rate falls, other `steps` bend it from there on. A
    # chapter adds its own.
    FREE: ClassVar[frozenset] = frozenset(
        {"config", "out", "smoke", "data_root", "gpus", "steps", "accumulate", "resume", "compile"}
        | {"graph", "precision", "tensorboard", "log_every", "save_every", "keep_every"}
        | {"sample_every", "dry_run", "price_per_gpu_hour", "wandb"}
    )


@dataclasses.dataclass
class ScoredConfig(RunConfig):
    """The settings of a training that eval_fid.py's Evaluator scores on the way."""

    metric_every: int = 0  # steps between two scores of --metric-n samples by eval_fid.py; 0: never
    metric_n: int = 500  # samples that are scored
    metric_features: Literal["auto", "classifier", "inception"] = "auto"
    """whose, as for eval_fid.py; auto: a classifier's, or for data without classes Inception's"""
    metric_resize: Literal["pytorch-fid", "tf1", "clean"] = "pytorch-fid"
    """how images become Inception's 299x299"""
    metric_data: str = ""  # labelled data set that the classifier learns; empty: --data
    metric_split: Literal["test", "train"] = "test"  # of --data, what samples are compared with

    METRICS: ClassVar = ("metric_n", "metric_features", "metric_resize", "metric_data")
    METRICS += ("metric_split",)
    NEEDS = RunConfig.NEEDS | dict.fromkeys(METRICS, "metric_every")
    NEEDS["metric_resize"] = "metric_features=inception"
    FREE = RunConfig.FREE | {"metric_every", *METRICS}


def entry(main):
    """Run main(); BadInput becomes one line and exit code 2, a bug keeps its traceback.

    What else may happen at the edges of a program, edges.py knows.
    """
    from runtime.edges import run

    run(main)


def parse(config_class, doc, args=None, preset=""):
    """The command line as an instance of `config_class`, a dataclass whose fields are documented.

    `--config F.yaml` names a file of the same fields; it lies under the flags, which override it.
    Without it, `preset` (such as 'configs/{data}.yaml', beside the script) is that file, if it
    exists for --data and a training is asked for. A ~ at the beginning of a path is the home
    folder. Raises BadInput for an unknown flag or key, for a value of the wrong type, for a flag
    that does nothing (see Script), and for the ~ of nobody. A run's folder becomes its ckpt.pt
    where a checkpoint is named.
    """
    from runtime.typed_flags import check_finite, check_texts, check_typed, check_words, one_line
    from runtime.yaml_settings import yaml_settings

    import tyro

    args = list(sys.argv[1:] if args is None else args)
    check_words(args, config_class)
    typed, error_text = _names(args), io.StringIO()
    try:
        bare = getattr(sys.stdout, "bare", sys.stdout)  # --help has colours
        with contextlib.redirect_stderr(error_text), contextlib.redirect_stdout(bare):
            cfg = tyro.cli(config_class, description=doc, args=args)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BadInput(one_line(error_text.getvalue(), config_class)) from None
    if preset and "config" not in typed and not cfg.task():
        beside = Path(sys.modules[config_class.__module__].__file__).resolve().parent
        path = beside / preset.format(data=cfg.data)
        cfg.config = str(path) if os.path.isfile(path) else ""
    lower = yaml_settings(getattr(cfg, "config", ""), config_class)
    cfg = dataclasses.replace(cfg, **{name: lower[name] for name in lower.keys() - typed})
    check_finite(cfg)
    check_texts(cfg)
    if isinstance(cfg, Script):
        check_typed(cfg, typed)
    paths = {k: v for k, v in vars(cfg).items() if isinstance(v, str) and k not in TEXTS}
    paths = {k: at_home(v, flag(k)) for k, v in paths.items()}
    for name in CHECKPOINTS:
        if (run := paths.get(name)) and os.path.isfile(Path(run, "ckpt.pt")):
            paths[name] = str(Path(run, "ckpt.pt"))
    return dataclasses.replace(cfg, **paths)


def at_home(path, name="path"):
    """The path with the home folder for ~ or ~user in front; BadInput, with its name, for none."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        wrong = f"{name} {path}: no home folder is known of {path.split('/')[0]}"
        raise BadInput(f"{wrong}; type ./{path} for a folder of that name")
    return found


def flag(name):
    """'batch_size' -> '--batch-size'."""
    return f"--{name.replace('_', '-')}"


def not_given(cfg, names):
    """Those of the settings `names` that the command line gives neither itself nor by --config."""
    from runtime.yaml_settings import yaml_settings

    args = sys.argv[1:]
    paths = re.findall(r"\0--config[=\0]([^\0]*)", "\0".join(["", *args]))
    given = _names(args).union(yaml_settings("".join(paths[-1:]), type(cfg)))
    return [name for name in names if name not in given]


def typed(names):
    """Those of the settings `names` that are flags on the command line."""
    given = _names(sys.argv[1:])
    return [name for name in names if name in given]


def smaller(cfg, **values):
    """cfg with these values for --smoke, but for the settings that were typed."""
    return dataclasses.replace(cfg, **{k: values[k] for k in values.keys() - typed(values)})


def _names(args):
    """The settings that these arguments give; --no-flip gives flip."""
    given = {arg.split("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}
    return {name.removeprefix("no_") for name in given}


def split_list(text):
    """'a, b,c' -> ['a', 'b', 'c']; '' -> []."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_seeds(text, n, flag="--seeds"):
    """int64 seeds from '17' or '0-63,100', below 10^18; for '' 0..n-1. Else BadInput."""
    if not text:
        return torch.arange(n)
    seeds = []
    for part in split_list(text):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= 10**6:
            seeds = []
            break
        seeds += range(first, last + 1)
    if not seeds:
        wrong = f"{flag} {text}: expected numbers and ranges such as 17 or 0-63,100"
        raise BadInput(f"{wrong}, of at most 18 digits and a million in all")
    return torch.tensor(seeds)


def class_list(text):
    """The parts of --classes, 'cat, 3' -> ['cat', '3']. BadInput for a text that has none."""
    if not (parts := split_list(text)) and text:
        raise BadInput(f"--classes {text!r} names no class; leave it out for all of them")
    return parts


def parse_classes(classes, names, aliases=()):
    """Indices into `names` from 'cat,3' or ['cat', '3']; all of them if empty.

    Each part is a name, exactly, or one of aliases (other names -> index), or else an index; but
    where names are numbers, numbers are names and nothing else. Raises BadInput, with the choice,
    for what does not exist.
    """
    from runtime.class_names import class_index

    parts = class_list(classes) if isinstance(classes, str) else classes
    chosen = [class_index(part, list(names), aliases) for part in parts]
    return chosen or list(range(len(names)))


def labels_for(seeds, chosen, guidance=0.0):
    """The label of each sample, a function of its seed: chosen[seed mod len(chosen)], or None.

    Raises BadInput for guidance where there is nothing to choose from.
    """
    chosen = list(chosen)
    if guidance and not chosen:
        raise BadInput("this network knows no labels; leave out --guidance")
    return torch.tensor(chosen)[seeds % len(chosen)] if chosen else None


def seeds_and_labels(cfg, net, class_names, guidance=0.0):
    """int64 seeds (N,) of --seeds or --n, and a label (N,) for each among --classes.

    class_names: of the network; labels are None where it has none. BadInput for seeds or classes
    that do not exist, and for guidance of a network that knows no labels or nothing else.
    """
    seeds = parse_seeds(cfg.seeds, cfg.n)
    labels = labels_for(seeds, parse_classes(cfg.classes, class_names), guidance)
    if guidance and not net.null_label:
        raise BadInput("this network never learned to do without a label; leave out --guidance")
    return seeds, labels


def folder_of(cfg, path):
    """Where the results of a command over the checkpoint `path` go: --out, or beside it."""
    from runtime.result_folders import beside

    return beside(cfg, path)


def smoke(cfg, **own):
    """cfg; with --smoke four tiny steps and `own`, unless typed. But for training --out stays."""
    if not cfg.smoke:
        return cfg
    few = {"log_every": 1, "save_every": 2, "sample_every": 2, "keep_every": 0}
    few |= {"steps": 4, "epochs": 0.0, "batch_size": 8, "warmup": 1, "resume": "never"}
    few = {k: v for k, v in few.items() if hasattr(cfg, k)} | own
    return smaller(cfg, **few | ({"out": cfg.out} if cfg.task() else {}))


def taken_by(kind, cfg):
    """{name: value} of the settings of cfg that the function or class `kind` takes."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in vars(cfg).items() if name in names}


def names(text):
    """'a b c' -> the set of a, b and c."""
    return frozenset(text.split())


def check_ranges(cfg, positive="", not_negative="", fraction=""):
    """Raise BadInput for a field named in one of these, 'a b c', that is out of its range."""
    check_positive(cfg, *positive.split())
    check_not_negative(cfg, *not_negative.split())
    check_fraction(cfg, *fraction.split())


def check_fraction(cfg, *names):
    """Raise BadInput unless every named field of `cfg` (a number or a tuple) lies in 0..1."""
    _check(cfg, names, lambda values: all(0 <= v <= 1 for v in values), "from 0 to 1")


def check_not_negative(cfg, *names):
    """Raise BadInput unless every named field of `cfg` is at least 0."""
    _check(cfg, names, lambda values: all(v >= 0 for v in values), "at least 0")


def check_positive(cfg, *names):
    """Raise BadInput unless every named field of `cfg` (a number or a tuple of numbers) is > 0."""
    _check(cfg, names, lambda values: values and all(v > 0 for v in values), "greater than 0")


def _check(cfg, names, good, words):
    for name in names:
        value = getattr(cfg, name)
        if not good(value if isinstance(value, tuple) else (value,)):
            raise BadInput(f"{flag(name)} must be {words}, got {value}")


def check_sampling(cfg):
    """Raise BadInput for settings that draw no samples: before training, which they end."""
    parse_seeds(cfg.seeds, cfg.n)
    if not cfg.sample and cfg.guidance and not getattr(cfg, "class_cond", True):
        raise BadInput("--no-class-cond: this network knows no labels; leave out --guidance")
    steps = getattr(cfg, "timesteps", math.inf)  # of the chain, if it is one
    if not cfg.sample and cfg.sample_steps > steps:  # a checkpoint has its own
        raise BadInput(f"--sample-steps {cfg.sample_steps} exceeds the chain's {steps} timesteps")
    if getattr(cfg, "n_eval", 0) and max(cfg.n, cfg.n_eval) < 2:
        raise BadInput("--n-eval must be 0, or at least 2: a covariance is compared")
    if getattr(cfg, "metric_every", 0) and cfg.metric_n < 2:
        raise BadInput("--metric-n must be at least 2: a covariance is compared")


def check_processes(gpus, batch_size, planned=False, precision="auto"):
    """Raise BadInput if this machine lacks `gpus` GPUs or the processes cannot share a batch.

    Also if its GPUs lack bf16 where `precision` asks for that. planned: it is about another
    machine, that has as many.
    """
    have = torch.cuda.device_count()
    if gpus < 0 or gpus > have and not planned:
        raise BadInput(
            f"--gpus {gpus}: this machine has {have} GPU{'s' * (have != 1)}; "
            f"type --gpus {have}" + (" to run on the CPU" if have == 0 else " or fewer")
        )
    if precision == "bf16" and 0 < gpus <= have and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        raise BadInput(f"--precision bf16: {name} would emulate it slowly; type fp16, or auto")
    from runtime.processes import check_shares

    check_shares(gpus, batch_size)


def check_run(cfg):
    """Raise BadInput for a setting of RunConfig that is out of its range."""
    from runtime import trackers

    check_positive(cfg, "steps", "batch_size", "lr", "clip_grad", "accumulate")
    check_positive(cfg, "log_every", "save_every")
    check_not_negative(cfg, "seed", "warmup", "sample_every", "keep_every", "price_per_gpu_hour")
    check_not_negative(cfg, "epochs", *{"metric_every", "metric_n"}.intersection(vars(cfg)))
    if cfg.dry_run and "steps" not in cfg.USES.get(cfg.task(), "steps"):
        raise BadInput(f"--dry-run is for training: leave it out, or {flag(cfg.task())}")
    _check(cfg, ["ema"], lambda values: values and all(0 <= v <= 1 for v in values), "from 0 to 1")
    for often, base in (("save", "log"), ("keep", "save")):
        first, second = (getattr(cfg, f"{name}_every") for name in (often, base))
        if first % second:
            raise BadInput(f"--{often}-every {first} must be a multiple of --{base}-every {second}")
    if cfg.graph and (cfg.accumulate > 1 or getattr(cfg, "shard", False)):
        other = "--accumulate" if cfg.accumulate > 1 else "--shard"
        raise BadInput(f"--graph and {other}: one at a time, the network is called once in a step")
    check_processes(cfg.gpus, cfg.batch_size, cfg.dry_run, cfg.precision)
    check_numbers(cfg)
    trackers.check(cfg)


def check_numbers(cfg):
    """Raise BadInput for a whole number below 0."""
    for name, value in vars(cfg).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, int) and v < 0 for v in numbers):
            raise BadInput(f"{flag(name)} {value}: expected at least 0")
