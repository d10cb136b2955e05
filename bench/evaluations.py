"""Which training and which sampler give the best images for so many evaluations of the network?

    python bench/evaluations.py v=runs/pixel-mnist/ckpt.pt edm=runs/edm-mnist/ckpt.pt --n 1000

Each NAME=CHECKPOINT, of ddpm_pixel.py, improved_ddpm.py or edm.py, draws the same N seeds in at
most 5, 10, 20, 40 and 80 evaluations an image (--evaluations): those of the first two by DDIM,
DPM-Solver++(2M) and EDM's Heun (column VP of table 1), edm.py's by Heun and by Euler. All are
scored against held-out images by a classifier of the data, as compare_samplers.py does. x0_hat of
the first two's networks is clipped to [-1, 1] by all samplers alike, that of edm.py's by none.

In --out (default: beside the first checkpoint) evaluations.md and evaluations.png, and
evaluations.jsonl with a line for each finished row: the same command goes on where it stopped.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime import commandline as cli  # noqa: E402
from runtime.checkpoints import weights_hash  # noqa: E402
from runtime.commandline import BadInput, at_home, default_gpus, entry  # noqa: E402
from runtime.files import append_row, atomic_write, read_log  # noqa: E402
from runtime.plots import plot_lines  # noqa: E402
from runtime.processes import World  # noqa: E402

import torch  # noqa: E402

import ddim  # noqa: E402
import ddpm_pixel  # noqa: E402
import dpm_solver  # noqa: E402
import edm  # noqa: E402
from eval_fid import Evaluator  # noqa: E402


def ways_of(column):
    """{sampler: calls of the network in n steps} for a network with this column of table 1."""
    heun = {"EDM Heun": lambda n: 2 * n - 1}
    once = ("Euler",) if isinstance(column, edm.Edm) else ("DDIM", "DPM-Solver++")
    return heun | {name: int for name in once}


def steps_for(calls, most):
    """The most steps that need at most `most` evaluations."""
    return max(n for n in range(1, most + 1) if calls(n) <= most)


def walk_of(sampler, net, column, shape, steps):
    """The function (seeds, labels) -> (x, x0_hat), (B,C,H,W), of each of `steps` steps.

    x0_hat of a chain's network is clipped to [-1, 1] by every sampler, as its chapter does it; that
    of edm.py's never, as in its paper.
    """
    clip = isinstance(column, edm.Chain)
    if sampler in ("EDM Heun", "Euler"):
        how = {"sampler": "heun" if sampler == "EDM Heun" else "euler", "clip_denoised": clip}
        return partial(edm.trajectory, net, column, edm.Config(sample_steps=steps, **how), shape)
    alpha_bar = torch.from_numpy(1 / (1 + column.sigmas**2))
    where = (alpha_bar, ddim.subsequence(len(alpha_bar), steps), shape)
    how = {"prediction": column.prediction, "clip": clip}
    if sampler == "DDIM":
        return partial(ddim.sample, net, *where, **how)
    if sampler == "ancestral":
        make_row = partial(ddpm_pixel.ancestral_row, prediction=column.prediction)
        return partial(ddpm_pixel.sample, net, *where, make_row=make_row, clip=clip)
    return partial(dpm_solver.sample, "dpmpp", net, *where, **how)


def rows_of(args, store):
    """The rows of all networks and samplers; those of the store are not made again."""
    world, evaluators = World(device=torch.device("cuda:0" if args.gpus else "cpu")), {}
    for name, path in args.networks.items():
        net, trained, shape, names, column = edm.load_net(path, world.device)
        data = args.data or trained.data
        if not data:
            raise BadInput(f"{path} names no data set: type --data, such as --data cifar10")
        key = (data, trained.size, tuple(names))
        made_of = {"weights": weights_hash(net), "n": args.n, "data": data, "size": trained.size}
        made_of |= {"classifier_steps": args.classifier_steps}
        if key not in evaluators:
            how = {"shape": shape, "class_names": names, "size": trained.size}
            how |= {"steps": args.classifier_steps}
            root = args.data_root or trained.data_root
            evaluators[key] = Evaluator(data, root, device=world.device, **how)
        seeds = torch.arange(args.n)
        labels = cli.labels_for(seeds, range(len(names)))
        quick = world.for_sampling(net)
        for sampler, calls in ways_of(column).items():
            for most in args.evaluations:
                steps = steps_for(calls, most)
                about = made_of | {"network": name, "sampler": sampler, "evaluations": calls(steps)}
                found = next((row for row in read_log(store) if about.items() <= row.items()), None)
                if found is None:
                    walk = walk_of(sampler, quick, column, shape, steps)
                    desc = f"{name}, {sampler}, {calls(steps)} evaluations"
                    images = world.draw(walk, seeds, labels, args.batch_size, steps, desc)
                    numbers = None if labels is None else labels.numpy()
                    figures = evaluators[key](images.numpy(), numbers, world)
                    found = about | figures | {"protocol": evaluators[key].protocol}
                    append_row(store, found)
                yield found


def table(rows, key, form):
    """Markdown: a line for each network and sampler, a column for each number of evaluations."""
    columns = sorted({row["evaluations"] for row in rows})
    lines = [["network, sampler", *map(str, columns)], ["---", *["--:"] * len(columns)]]
    for who in dict.fromkeys((row["network"], row["sampler"]) for row in rows):
        mine = {r["evaluations"]: r[key] for r in rows if (r["network"], r["sampler"]) == who}
        lines.append([", ".join(who), *(form(mine[c]) if c in mine else "" for c in columns)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def write(folder, rows, title):
    """evaluations.md and evaluations.png of the rows."""
    text = [f"# {title}", "", f"Fréchet distance, N = {rows[0]['n']}; {rows[0]['protocol']}", ""]
    text += table(rows, "frechet", "{:.2f}".format)
    panels = {"Fréchet distance": "frechet"}
    if all(row["class_accuracy"] is not None for row in rows):
        panels["class accuracy"] = "class_accuracy"
        text += ["", "Class accuracy", "", *table(rows, "class_accuracy", "{:.1%}".format)]
    with atomic_write(folder / "evaluations.md") as path:
        path.write_text("\n".join(text) + "\n")
    drawn = {}
    for title, key in panels.items():
        for row in rows:
            name = f"{row['network']}, {row['sampler']}"
            xs, ys = drawn.setdefault(title, {}).setdefault(name, ([], []))
            xs.append(row["evaluations"])
            ys.append(row[key])
    how = {"logx": True, "logy": ("Fréchet distance",)}
    plot_lines(folder / "evaluations.png", drawn, xlabel="evaluations of the network", **how)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--n", type=int, default=1000, help="images of each row")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 40, 80])
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--data", type=at_home, default="", help="to compare with, if not what was trained on"
    )
    parser.add_argument("--data-root", type=at_home, default="")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="of the features")
    parser.add_argument("--gpus", type=int, default=default_gpus())
    parser.add_argument("--out", type=at_home, default="")
    args = parser.parse_args(arguments)
    if wrong := [text for text in args.networks if "=" not in text]:
        raise BadInput(f"{wrong[0]}: expected NAME=CHECKPOINT, such as edm=runs/edm-mnist/ckpt.pt")
    pairs = (text.split("=", 1) for text in args.networks)
    args.networks = {name: at_home(path) for name, path in pairs}
    if args.n < 2 or args.batch_size < 1 or min(args.evaluations) < 1:
        raise BadInput("--n must be at least 2, --batch-size and --evaluations at least 1")
    return args


def main(arguments=None):
    args = parse(arguments)
    folder = Path(args.out or Path(next(iter(args.networks.values()))).parent)
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows_of(args, folder / "evaluations.jsonl"))
    write(folder, rows, "Evaluations of the network, and what they give")
    print((folder / "evaluations.md").read_text())
    print(f"kept: {folder / 'evaluations.md'}, {folder / 'evaluations.png'}")


if __name__ == "__main__":
    entry(main)
