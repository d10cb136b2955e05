"""What eval_fid.py is asked for: its settings judged together, and what is not typed filled in."""

from runtime import commandline as cli
from runtime.commandline import BadInput
from runtime.files import check_folder

from dataclasses import replace
from pathlib import Path

from evaluation import checkpoint_samples, table
from evaluation.checkpoint_samples import is_checkpoint


def settled(cfg, figures):
    """The settings as the command works by them; figures: all that there are, by their names.

    The folder of a run becomes its checkpoint, what is not typed is as that was trained. Raises
    BadInput for settings that are out of range or mean nothing together.
    """
    if cfg.smoke:
        cfg = cli.smaller(cfg, n=100, classifier_steps=20)
        cfg = cfg if cfg.a else replace(cfg, a="glyphs:train", b="glyphs:test")
    if not cfg.a:
        some = "runs/pixel-mnist, or samples.npz mnist:test, or mnist:train mnist:test"
        raise BadInput(f"nothing to compare: type python eval_fid.py A B, such as {some}; --help")
    of_inception = cfg.layout == "adm" or len(cli.not_given(cfg, ("weights", "resize"))) < 2
    if cfg.features == "auto" and of_inception:
        cfg = replace(cfg, features="inception")
    if not (cfg.curve or cfg.a == "stats"):
        cfg = checkpoint_samples.of_runs(cfg)
    check(cfg)
    if cfg.a == "table" and cli.not_given(cfg, ("metrics",)):
        cfg = replace(cfg, metrics=table.METRICS)
    cfg = replace(cfg, metrics=chosen_metrics(cfg, figures))
    if cfg.curve:
        last = list(checkpoint_samples.of_run(Path(cfg.a)).values())[-1]
        cfg = checkpoint_samples.as_trained(cfg, last)
    elif cfg.a == "table":
        cfg = table.prepared(cfg)
    elif is_checkpoint(cfg.a):
        cfg = checkpoint_samples.as_trained(cfg, cfg.a)
    if not cfg.b:
        raise BadInput(f"nothing to compare {cfg.a} with: eval_fid.py A B")
    return cfg


def chosen_metrics(cfg, figures):
    """The names in --metrics as one string, the distance first. Raises BadInput for others."""
    names = figures if cfg.metrics == "all" else cli.split_list(cfg.metrics)
    if wrong := [name for name in names if name not in figures]:
        raise BadInput(f"--metrics {wrong[0]}: there are {', '.join(figures)}, or all")
    return ",".join(dict.fromkeys(["frechet", *names]))


def check(cfg):
    """Raise BadInput for settings that are out of range or mean nothing together."""
    cli.check_positive(cfg, "batch_size", "classifier_steps")
    cli.check_processes(cfg.gpus, 0)
    cli.check_not_negative(cfg, "seed")
    if cfg.n < 0 or cfg.n == 1:
        wanted = "0 (all images) or a number of images from 2, a covariance is compared"
        raise BadInput(f"--n must be {wanted}; got {cfg.n}")
    stats, tabled = cfg.a == "stats", cfg.a == "table"
    if stats and cfg.out[-4:] != ".npz":
        raise BadInput("`stats` needs the name of a file: eval_fid.py stats B --out F.npz")
    if cfg.out and not (stats or tabled or cfg.curve or is_checkpoint(cfg.a)):
        raise BadInput("--out means nothing without `stats`, `table`, or a checkpoint or run as A")
    if cfg.out and not stats:
        check_folder(cfg.out)
    if cfg.more and not tabled:
        raise BadInput(f"{cfg.more[0]} is one too many: eval_fid.py table A1 A2 --against B")
    by_inception = cfg.features == "inception"
    labelled = not by_inception or {"memorisation", "all"} & {*cli.split_list(cfg.metrics)}
    drawn = cfg.curve or any(map(is_checkpoint, (cfg.a, cfg.b, *cfg.more)))
    for flag, used, needs in (
        ("weights", by_inception, "--features inception"),
        ("resize", by_inception, "--features inception"),
        ("classifier_steps", not by_inception, "--features classifier"),
        ("data", labelled, "--features classifier, or --metrics memorisation"),
        ("metrics", not stats, "two sides: `stats` compares nothing"),
        ("sqrtm", not stats, "two sides: `stats` compares nothing"),
        ("layout", stats, "`stats`"),
        ("against", tabled, "`table`"),
        ("names", tabled, "`table`"),
        ("sample_args", drawn, "a checkpoint, or a run and --curve"),
    ):
        if not used and not cli.not_given(cfg, (flag,)):
            raise BadInput(f"{cli.flag(flag)} means nothing without {needs}")
    if cfg.layout == "adm" and not by_inception:
        raise BadInput("--layout adm holds Inception's features: add --features inception")
    if Path(cfg.json or ".json").is_dir() or stats and Path(cfg.out).is_dir():
        raise BadInput(f"{cfg.json or cfg.out} is a folder; expected the name of a file")
