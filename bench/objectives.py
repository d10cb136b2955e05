"""Noise, v, EDM or flow? One network, trained by each in turn, and what its samples are worth.

    python bench/objectives.py                  MNIST and CIFAR-10: some four hours of one CPU core
    python bench/objectives.py --data mnist --steps 200 --n 100 --evaluations 2 10

For each data set the same U-Net (chapter 1's, with labels) is trained four times for the same
number of steps, which cost the same: by ddpm_pixel.py to give eps, and v, by edm.py, and by
flow_matching.py. Data, batches, learning rate, running mean and seeds are alike. Then each draws
the same N seeds at rising numbers of evaluations of the network, by a solver of first order (Euler
in the coordinates of each: of the first two that is DDIM) and by one of second order
(DPM-Solver++(2M); Heun's, and of the last one midpoint); of the first two also by chapter 1's own
ancestral steps. A classifier of the data scores all against held-out images, as compare_samplers.py
does: Fréchet distance, with its 95 % interval, inception score, precision and recall. x0_hat of the
first two is clipped to [-1, 1], as their chapter does it, that of the others is not.

In --out: objectives.md, objectives.png, and objectives.jsonl with a line for each finished row. The
same command goes on where it stopped, in a training as well.
"""

import argparse
import resource
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/

from runtime import commandline as cli  # noqa: E402
from runtime.checkpoints import load_checkpoint, weights_hash  # noqa: E402
from runtime.commandline import BadInput, at_home, default_gpus, entry  # noqa: E402
from runtime.files import append_row, read_json, read_log, save_json, save_text  # noqa: E402
from runtime.processes import World  # noqa: E402

import torch  # noqa: E402

import edm  # noqa: E402
import flow_matching  # noqa: E402
from bench.evaluations import steps_for, walk_of  # noqa: E402
from eval_fid import Evaluator  # noqa: E402
from evaluation.intervals import frechet_interval  # noqa: E402
from evaluation.manifold import manifold  # noqa: E402
from evaluation.samplers_report import draw_panels, unique  # noqa: E402
from evaluation.sides import look  # noqa: E402
from evaluation.words import markdown  # noqa: E402

PIXEL = {"mnist": "mnist_pixel", "cifar10": "cifar10_cosine"}
EDM = {"mnist": "mnist_edm", "cifar10": "cifar10_edm_small"}
FLOW = {"mnist": "mnist_flow", "cifar10": "cifar10_flow_small"}
STEPS = {"mnist": 1000, "cifar10": 800}
# What is trained: its script, the settings of each data set, more flags.
OBJECTIVES = {
    "eps": ("ddpm_pixel", PIXEL, ["--prediction", "eps", "--metric-every", "0"]),
    "v": ("ddpm_pixel", PIXEL, ["--prediction", "v", "--metric-every", "0"]),
    "edm": ("edm", EDM, []),
    "flow": ("flow_matching", FLOW, []),
}
# By whom it is sampled, at first and second order, and the calls of the network in n steps.
CHAIN = {"Euler": ("DDIM", int), "second order": ("DPM-Solver++", int)}
CHAIN |= {"fresh noise": ("ancestral", int)}
LEAST = {"Euler": 1, "midpoint": 2, "second order": 3, "fresh noise": 10}  # evaluations, from here
SIGMA = {"Euler": ("Euler", int), "second order": ("Heun", lambda n: 2 * n - 1)}
LINE = {"Euler": ("Euler", int), "second order": ("Heun", lambda n: 2 * n)}  # asked at t = 0, too
LINE |= {"midpoint": ("midpoint", lambda n: 2 * n)}
FIGURES = {"Fréchet distance": "frechet", "inception score": "inception_score"}
FIGURES |= {"precision": "precision", "recall": "recall"}


def trained(args, data, name):
    """The checkpoint of a training, done now as far as it is not; CPU seconds are in cpu.json."""
    script, configs, flags = OBJECTIVES[name]
    folder, steps = Path(args.out, data, name), args.steps or STEPS[data]
    path, cost = folder / "ckpt.pt", folder / "cpu.json"
    if path.is_file() and load_checkpoint(path, facts=True)["step"] == steps and cost.is_file():
        return path
    command = [sys.executable, str(REPO / f"{script}.py"), *flags]
    command += ["--config", str(REPO / "configs" / f"{configs[data]}.yaml"), "--out", str(folder)]
    command += ["--data-root", args.data_root, "--steps", str(steps), "--save-every", "50"]
    command += ["--sample-every", "0", "--n", "8", "--sample-steps", "4", "--gpus", str(args.gpus)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))
    spent = read_json(cost) if cost.is_file() else {}
    save_json(cost, {"cpu_s": spent.get("cpu_s", 0) + seconds})
    if done.returncode:
        raise BadInput(f"{script}.py failed, see above; the same command goes on from there")
    return path


class Judge:
    """What scores samples of a data set, and the network that drew them."""

    def __init__(self, args, data, world):
        self.args, self.data, self.world, self.evaluator = args, data, world, None

    def open(self, path):
        """The network of a checkpoint, and what walks it: see walk()."""
        flow, cfg = flow_matching.load_flow(path, self.world.device)
        if not self.evaluator:
            how = {"shape": flow.space.shape, "class_names": flow.names, "size": cfg.size}
            how |= {"steps": self.args.classifier_steps, "device": self.world.device}
            judge = self.evaluator = Evaluator(self.data, self.args.data_root, **how)
            self.real = look(judge.real, judge.extractor, world=self.world, keep=judge.root).feats
        return flow

    def walk(self, flow, solver, steps):
        """The function (seeds, labels) -> (x, x0_hat), (B,C,H,W), of each of `steps` steps."""
        net, shape = flow.net, flow.space.shape
        if flow.column is flow_matching.straight:
            cfg = flow_matching.Config(sampler=solver.lower(), sample_steps=steps)
            return partial(flow_matching.sample, net, flow.column, cfg, shape)
        sampler = "EDM Heun" if solver == "Heun" else solver
        return walk_of(sampler, net, flow.column.column, shape, steps)

    def also(self, feats):
        """Of features (N,d) of samples: the interval of the distance, precision and recall."""
        found = frechet_interval(feats, self.evaluator.distance)
        near = manifold(self.real, feats, device=self.world.device)
        return {"interval": found["interval"], **{k: near[k] for k in ("precision", "recall")}}

    def score(self, flow, solver, steps, desc):
        args, world = self.args, self.world
        seeds = torch.arange(args.n[self.data])
        labels = cli.labels_for(seeds, range(len(flow.names)))
        walk = self.walk(flow, solver, steps)
        images = world.draw(walk, seeds, labels, args.batch_size, steps, desc)
        return self.evaluator(images.numpy(), labels.numpy(), world, self.also)


def ways_of(flow):
    """How a network is sampled: {order: (solver, its calls in n steps)}."""
    if flow.column is flow_matching.straight:
        return LINE
    return CHAIN if isinstance(flow.column.column, edm.Chain) else SIGMA


def rows_of(args, data):
    """The rows of a data set: those in --out, and the others, which are made."""
    store = Path(args.out, "objectives.jsonl")
    world = World(device=torch.device("cuda:0" if args.gpus else "cpu"))
    judge, kept = Judge(args, data, world), read_log(store)
    for name in OBJECTIVES:
        path = trained(args, data, name)
        flow = judge.open(path)
        about = {"data": data, "objective": name, "n": args.n[data]}
        about |= {"weights": weights_hash(flow.net), "classifier_steps": args.classifier_steps}
        flow = flow._replace(net=world.for_sampling(flow.net))
        cost = read_json(path.with_name("cpu.json"))
        for order, (solver, calls) in ways_of(flow).items():
            for most in (m for m in args.evaluations if m >= LEAST[order]):
                steps = steps_for(calls, most)
                row = about | {"order": order, "solver": solver, "most": most, "steps": steps}
                done = next((r for r in kept if row.items() <= r.items()), None)
                if done is None:
                    desc = f"{data}, {name}, {solver}, {calls(steps)} evaluations"
                    figures = judge.score(flow, solver, steps, desc)
                    done = row | {"evaluations": calls(steps)} | figures
                    append_row(store, done | {"protocol": judge.evaluator.protocol})
                yield {"protocol": judge.evaluator.protocol} | done | cost


def line_of(rows, **chosen):
    """The rows with these values, by rising evaluations."""
    found = [row for row in rows if chosen.items() <= row.items()]
    return sorted(found, key=lambda row: row["evaluations"])


def text_of(rows, args):
    """objectives.md as lines: the distance over evaluations, the other figures at two of them."""
    keys, budgets = ("data", "objective", "solver"), sorted(args.evaluations)
    kinds = unique(tuple(row[key] for key in keys) for row in rows)
    each = {kind: line_of(rows, **dict(zip(keys, kind, strict=True))) for kind in kinds}
    lines = ["# One network, four objectives", "", f"    {args.command}", ""]
    for data in unique(row["data"] for row in rows):
        told = next(row["protocol"] for row in rows if row["data"] == data)
        lines += [f"{data}: N = {args.n[data]} samples of the same seeds. {told}", ""]
    lines += ["Fréchet distance (95 % interval) in at most so many evaluations of the network", ""]
    table = []
    for kind, found in each.items():
        told = {
            r["most"]: "{:.2f} ({:.2f} to {:.2f})".format(r["frechet"], *r["interval"])
            for r in found
        }
        minutes = f"{found[0]['cpu_s'] / 60:.1f}"
        table.append([*kind, minutes, *(told.get(most, "") for most in budgets)])
    lines += markdown([*keys, "CPU minutes of training", *map(str, budgets)], table)
    for most in budgets[-3::2]:
        lines += ["", f"In at most {most} evaluations", ""]
        figures = {"inception score": "inception_score", "precision": "precision"}
        figures |= {"recall": "recall", "class accuracy": "class_accuracy"}
        table = [
            [*kind, *(f"{row[key]:.2f}" for key in figures.values())]
            for kind, found in each.items()
            for row in found
            if row["most"] == most
        ]
        lines += markdown([*keys, *figures], table)
    return lines


def draw(path, rows, args):
    """objectives.png: a row of panels for each data set, a line for each objective and order."""
    panels = []
    for data in unique(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        lines = {}
        for name, solver in unique((row["objective"], row["solver"]) for row in mine):
            lines[f"{name}, {solver}"] = line_of(mine, objective=name, solver=solver)
        panels.append(
            [
                (
                    f"{label}, {data}, N = {args.n[data]}",
                    {
                        who: ([r["evaluations"] for r in found], [r[key] for r in found])
                        for who, found in lines.items()
                    },
                )
                for label, key in FIGURES.items()
            ]
        )
    title = "one network, four objectives, as many steps of training each"
    how = {"xlabel": "evaluations of the network", "xticks": args.evaluations, "logx": True}
    draw_panels(path, panels, title, **how)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    how = {"choices": list(STEPS), "default": list(STEPS), "type": at_home}
    parser.add_argument("--data", nargs="+", **how)
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0: 1000, 800")
    parser.add_argument(
        "--n",
        type=int,
        nargs="+",
        default=[1000],
        help="samples of a row, or of one of each --data",
    )
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1, 2, 3, 5, 10, 20, 50])
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--classifier-steps", type=int, default=1500, help="of the features")
    parser.add_argument("--data-root", type=at_home, default="data")
    parser.add_argument("--gpus", type=int, default=default_gpus())
    parser.add_argument("--out", type=at_home, default="runs/objectives")
    args = parser.parse_args(arguments)
    if len(args.n) not in (1, len(args.data)):
        raise BadInput(f"--n takes one number, or one for each --data: {' '.join(args.data)}")
    args.n = dict(zip(args.data, args.n * len(args.data), strict=False))
    if (
        min(args.n.values()) < 80
        or args.batch_size < 1
        or args.steps < 0
        or min(args.evaluations) < 1
    ):
        told = "--n must be at least 80, for an interval; the other numbers at least 1"
        raise BadInput(told)
    args.command = shlex.join(["python", *sys.argv])
    return args


def main(arguments=None):
    args = parse(arguments)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for data in args.data for row in rows_of(args, data)]
    save_text(folder / "objectives.md", text_of(rows, args))
    draw(folder / "objectives.png", rows, args)
    print((folder / "objectives.md").read_text())
    print(f"kept: {folder / 'objectives.md'}, {folder / 'objectives.png'}")


if __name__ == "__main__":
    entry(main)
