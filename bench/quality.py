"""Quality for time: chapter 1 beside `denoising-diffusion-pytorch`, the same CPU minutes for each.

    python bench/quality.py --data mnist --minutes 12 [--n 500] [--out runs/quality] [-- --lr 2e-3]

Both train at the same time, each in a process of one thread, on the same batches in the same order,
unconditionally, with numbers of parameters that agree within 5 %. Chapter 1 is run by its command
line with the settings of configs/DATA_pixel.yaml and whatever follows `--`; the peer as
bench/peers.py tells, once at its own learning rate and once at chapter 1's (--peer-lr).

The budget is the CPU time of the whole process, its start and the saving included. Chapter 1's
learning rate ends with its steps, so how many fit is measured first. The peer's is constant: it
stops on time, and if chapter 1 took longer than that, the peer goes on until it has had as much. So
no peer gets less CPU time than chapter 1. Every process has glibc keep the memory that it frees,
which saves the peer about a quarter of its time and chapter 1 an eighth.

Then each draws N images with as many evaluations of its network, by ancestral sampling and by DDIM,
and eval_fid.py scores them all: the same features, the same N, the same reference. One table, one
JSON line, and in --out the logs, the samples, and comparison.png: chapter 1's beside the peer's.
With the defaults it takes about 40 minutes of two cores and 5 GB of memory. What was trained is
kept: the same command again only samples and scores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where a file would hide the module `data`

from runtime import commandline  # noqa: E402
from runtime.commandline import BadInput, at_home, entry  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.pictures import save_samples, tile  # noqa: E402
from runtime.run import indices  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import ddpm_pixel  # noqa: E402
from bench import peers  # noqa: E402
from image_data import datasets  # noqa: E402
from image_data.sources import NAMES  # noqa: E402

OURS, PEER = "chapter 1", "denoising-diffusion-pytorch"
TRAINED = "trained.json"  # in --out: the settings, and what training came to
SAMPLERS = {"ancestral": 1.0, "ddim": 0.0}  # name: eta
CALIBRATION = (8, 60)  # steps of a short and a long run
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    # What is freed stays with the process: else half a GB a step is asked for and zeroed anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


# ------------------------------------------------------------------------------------ processes


def run_beside(commands, out):
    """Run {name: command} at once; {name: CPU seconds}, user and system, of each process.

    What they print goes to out/NAME/log.txt. Raises RuntimeError, with the end of the log, as soon
    as one fails; none is left running.
    """
    processes, seconds = {}, {}
    try:
        for name, command in commands.items():
            folder = Path(out) / name
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.txt", "a") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    cwd=REPO,
                    env=os.environ | ENVIRONMENT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        while len(seconds) < len(processes):
            for name in processes.keys() - seconds.keys():
                process = processes[name]
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not pid:
                    continue
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    end = (Path(out) / name / "log.txt").read_text()[-2000:]
                    raise RuntimeError(f"{name} ended with status {process.returncode}: {end}")
                seconds[name] = usage.ru_utime + usage.ru_stime
            time.sleep(0.2)
    finally:
        for process in processes.values():
            if process.returncode is None:
                process.kill()
                process.wait()
    return {name: seconds[name] for name in commands}


def steps_within(budget, short, long):
    """How many steps take `budget` CPU seconds, from two runs (steps, CPU seconds) of different
    length: their difference is what steps cost, the rest is what starting and saving cost.

    Raises BadInput where not even one step fits.
    """
    each = (long[1] - short[1]) / (long[0] - short[0])
    start = short[1] - each * short[0]
    if each <= 0:
        raise RuntimeError(f"{long[0]} steps took no longer than {short[0]}: {long}, {short}")
    if budget < start + each:
        raise BadInput(
            f"{budget / 60:g} minutes are too few: {start:.0f} s pass before the first step and "
            f"each takes {each:.2f} s; type --minutes {(start + 20 * each) / 60:.1f}"
        )
    return int((budget - start) / each)


# ------------------------------------------------------------------------------------- commands


def ours_train(args, out, steps):
    """Chapter 1's training of so many steps, as a command; one sample of one step at the end."""
    quick = ["--sample-every", 0, "--n", 1, "--sample-steps", 1, "--resume", "never"]
    return [
        "ddpm_pixel.py",
        *args.ours,
        "--no-class-cond",
        "--gpus",
        0,
        "--steps",
        steps,
        "--out",
        out,
        *quick,
    ]


def ours_sample(args, cfg, run, sampler, out):
    script, how = {"ancestral": ("ddpm_pixel.py", []), "ddim": ("ddim.py", ["--eta", 0])}[sampler]
    return [
        script,
        "--sample",
        run / "ckpt.pt",
        "--n",
        args.n,
        "--gpus",
        0,
        "--sample-steps",
        args.sample_steps,
        *how,
        "--out",
        out,
    ]


def peer_name(lr):
    return f"peer-lr-{lr:g}"


def peer_train(args, cfg, dim, lr, seconds, out):
    return [
        "-m",
        "bench.peers",
        "train",
        "--data",
        cfg.data,
        "--data-root",
        cfg.data_root,
        "--size",
        cfg.size,
        "--dim",
        dim,
        "--mult",
        *cfg.channel_mult,
        "--batch-size",
        cfg.batch_size,
        "--seed",
        cfg.seed,
        "--lr",
        lr,
        "--cpu-seconds",
        seconds,
        "--out",
        out,
    ]


def peer_sample(args, cfg, run, sampler, out):
    return [
        "-m",
        "bench.peers",
        "sample",
        "--out",
        run,
        "--n",
        args.n,
        "--batch-size",
        cfg.batch_size,
        "--sample-steps",
        args.sample_steps,
        "--eta",
        SAMPLERS[sampler],
        "--samples",
        out,
    ]


def score(cfg, samples):
    """eval_fid.py's JSON object for an .npz of images, against the data set's test split."""
    done = subprocess.run(
        [
            sys.executable,
            "eval_fid.py",
            str(samples),
            f"{cfg.data}:test",
            "--gpus",
            "0",
            "--data-root",
            cfg.data_root,
            "--size",
            str(cfg.size),
        ],
        cwd=REPO,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"eval_fid.py {samples}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------- output


COLUMNS = (  # head, key of a row, format
    ("network", "network", "<"),
    ("lr", "lr", ">g"),
    ("parameters", "parameters", ">,"),
    ("CPU min", "cpu_minutes", ">.2f"),
    ("steps", "steps", ">,"),
    ("images", "images", ">,"),
    ("sampler", "sampler", "<"),
    ("evaluations", "evaluations", ">"),
    ("N", "n", ">,"),
    ("CPU s/sample", "cpu_seconds_per_sample", ">.3f"),
    ("Fréchet", "frechet", ">.3f"),
)


def table(rows):
    """Lines of text: a head, and a line for each row (a dict); - where it has no such figure."""
    lines = [[head for head, _, _ in COLUMNS]]
    for row in rows:
        lines.append([f"{row[key]:{how[1:]}}" if key in row else "-" for _, key, how in COLUMNS])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    places = [f"{how[0]}{width}" for (_, _, how), width in zip(COLUMNS, widths, strict=True)]
    return [
        "  ".join(f"{cell:{place}}" for cell, place in zip(line, places, strict=True)).rstrip()
        for line in lines
    ]


def best(rows, network):
    """The row of `network` with the least Fréchet distance."""
    return min((row for row in rows if row["network"] == network), key=lambda row: row["frechet"])


def verdict(rows):
    """The least Fréchet distance of each side, and whether chapter 1's is no worse."""
    ours, peer = (best(rows, network)["frechet"] for network in (OURS, PEER))
    return {"best_chapter_1": ours, "best_peer": peer, "no_worse": ours <= peer}


def write_comparison(left, right, path, columns=10):
    """One PNG of two .npz of images, the first 100 of each as a grid, side by side."""
    grids = [tile(np.load(npz)["arr_0"][:100], columns) for npz in (left, right)]
    gap = np.full((grids[0].shape[0], 16, grids[0].shape[2]), 255, np.uint8)
    sheet = np.concatenate([grids[0], gap, grids[1]], axis=1)
    with atomic_write(path) as temporary:
        Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet).save(temporary)


# ----------------------------------------------------------------------------------------- main


def parse(arguments=None):
    """The command line; `ours` becomes all of chapter 1's training flags that it decides."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--data", type=at_home, default="mnist", help="labelled data set, or a folder or zip of one"
    )
    p.add_argument("--data-root", type=at_home, default="data", help="where data sets are kept")
    p.add_argument("--minutes", type=float, default=12.0, help="CPU minutes of training, each")
    p.add_argument("--n", type=int, default=500, help="samples of each network and sampler")
    p.add_argument("--sample-steps", type=int, default=100, help="network evaluations a sample")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    p.add_argument(
        "--peer-lr", type=float, nargs="+", help="default: its own 1e-4, and chapter 1's peak"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out",
        type=at_home,
        default="runs/quality",
        help="new, or of a run that got past training",
    )
    p.add_argument("ours", nargs="*", metavar="-- FLAG", help="more flags of chapter 1's training")
    args = p.parse_args(arguments)
    for name in ("minutes", "n", "sample_steps"):
        if getattr(args, name) <= 0:
            p.error(f"--{name.replace('_', '-')} must be greater than 0")
    args.out = Path(args.out).resolve()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / TRAINED).exists():
        p.error(f"--out {args.out} is not empty; name a new folder")
    if args.data not in NAMES:
        args.data = str(Path(args.data).resolve())  # the processes run in the project's folder
    preset = REPO / f"configs/{Path(args.data).stem}_pixel.yaml"
    given = ["--config", str(preset)] * preset.is_file() + ["--data", args.data]
    given += ["--data-root", str(Path(args.data_root).resolve()), "--seed", str(args.seed)]
    args.ours = given + args.ours
    return args


def train_all(args, cfg, dim, rates):
    """Train chapter 1, and the peer at each of `rates`; {name of run: what its row tells of it}."""
    budget = 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        runs = {f"{n} steps": ours_train(args, Path(scratch) / str(n), n) for n in CALIBRATION}
        peer = peer_train(args, cfg, dim, rates[0], min(40, budget / 4), Path(scratch) / "peer")
        spent = run_beside(runs | {"peer": peer}, Path(scratch) / "logs")
    steps = steps_within(budget, *((n, spent[f"{n} steps"]) for n in CALIBRATION))
    print(f"chapter 1 has time for {steps} steps; training all, logs in {args.out}/*/log.txt")

    def peers_for(seconds, rates):
        names = {peer_name(lr): lr for lr in rates}
        return {
            name: peer_train(args, cfg, dim, lr, seconds, args.out / name)
            for name, lr in names.items()
        }

    ours = {"chapter-1": ours_train(args, args.out / "chapter-1", steps)}
    spent = run_beside(ours | peers_for(budget, rates), args.out)
    behind = [lr for lr in rates if spent[peer_name(lr)] < spent["chapter-1"]]
    for name, more in run_beside(peers_for(spent["chapter-1"], behind), args.out).items():
        spent[name] += more
    done = {"chapter-1": steps}
    for name in map(peer_name, rates):
        done[name] = torch.load(args.out / name / "state.pt", weights_only=True)["step"]
    return {
        name: {
            "cpu_minutes": seconds / 60,
            "steps": done[name],
            "images": done[name] * cfg.batch_size,
        }
        for name, seconds in spent.items()
    }


def sample_all(args, cfg, runs):
    """Draw from each of `runs` {name: row so far} by each sampler, and score; (rows, features).

    The last row is of as many real images of the training split: what N alone does to the figure.
    """
    rows = []
    for sampler in args.samplers:
        commands = {}
        for name in runs:
            command = ours_sample if name == "chapter-1" else peer_sample
            out = args.out / name / sampler
            commands[f"{name}/{sampler}"] = command(args, cfg, args.out / name, sampler, out)
        for place, seconds in run_beside(commands, args.out).items():
            result = score(cfg, args.out / place / "samples.npz")
            rows.append(
                runs[place.split("/")[0]]
                | {
                    "sampler": sampler,
                    "evaluations": args.sample_steps,
                    "n": args.n,
                    "cpu_seconds_per_sample": seconds / args.n,
                    "frechet": result["frechet"],
                    "samples": place,
                }
            )
    ds = datasets.load(cfg.data, cfg.data_root, size=cfg.size)
    real = ds.images[indices(len(ds), args.n, cfg.seed, 0)]
    save_samples(args.out / "real", torch.from_numpy(real), None, 10)
    result = score(cfg, args.out / "real" / "samples.npz")
    rows.append({"network": "real images", "n": args.n, "frechet": result["frechet"]})
    return rows, result["features"]


def main(arguments=None):
    args = parse(arguments)
    cfg = commandline.parse(ddpm_pixel.Config, "", args.ours)
    ds = datasets.load(cfg.data, cfg.data_root, size=cfg.size)  # before there are processes
    ours = peers.parameters(ddpm_pixel.UNet(ds.shape, 0, cfg))
    dim, theirs = peers.matched_dim(ours, cfg.channel_mult, ds.channels)
    rates = sorted(set(args.peer_lr or (1e-4, cfg.lr)))
    about = {
        "data": ds.name,
        "data_key": ds.key,
        "minutes": args.minutes,
        "threads": 1,
        "chapter_1": args.ours,
        "peer": {"dim": dim, "dim_mults": list(cfg.channel_mult), "lr": rates},
        "torch": str(torch.__version__),
        **peers.versions(),
    }
    print(
        f"{OURS}: {' '.join(args.ours)}\n{PEER}: dim {dim}, dim_mults {cfg.channel_mult}",
        flush=True,
    )

    runs = {"chapter-1": {"network": OURS, "lr": cfg.lr, "parameters": ours}}
    for lr in rates:
        runs[peer_name(lr)] = {"network": PEER, "lr": lr, "parameters": theirs}
    if not (args.out / TRAINED).exists():
        trained = train_all(args, cfg, dim, rates)
        (args.out / TRAINED).write_text(json.dumps([about, trained]))
    settings, trained = json.loads((args.out / TRAINED).read_text())
    if settings != about:
        raise BadInput(f"{args.out} was trained with other settings; name another --out")
    for name, figures in trained.items():
        runs[name] |= figures
    rows, features = sample_all(args, cfg, runs)
    files = [args.out / best(rows, network)["samples"] / "samples.npz" for network in (OURS, PEER)]
    write_comparison(*files, args.out / "comparison.png")
    outcome = verdict(rows)
    print("\n".join(["", *table(rows), "", features]))
    print(f"chapter 1 is no worse: {'yes' if outcome['no_worse'] else 'no'}")
    print(f"left chapter 1, right the peer: {args.out / 'comparison.png'}")
    line = json.dumps(about | {"rows": rows, "features": features} | outcome)
    (args.out / "result.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    entry(main)
