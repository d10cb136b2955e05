"""The last stages of a run, done once: its samples, and eval_fid.py's figures of them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from support.commandline import BadInput
from support.pictures import atomic_write


def drawn_by(cfg, names, n):
    """What decides n samples of the checkpoint cfg.sample: it, and these settings."""
    names = (*names, "seeds", "classes", "sample")
    return json.loads(json.dumps({name: getattr(cfg, name) for name in names} | {"n": n}))


def note_samples(folder, cfg, names, n):
    """Write down beside samples.npz in `folder` what it was drawn by: see drawn_by."""
    with atomic_write(Path(folder) / "samples.json") as path:
        path.write_text(json.dumps(drawn_by(cfg, names, n), indent=2) + "\n")


def drawn_before(cfg, names, n):
    """Whether samples.npz in cfg.out was drawn by just these settings, after the checkpoint."""
    note, samples = Path(cfg.out) / "samples.json", Path(cfg.out) / "samples.npz"
    if not note.is_file() or not samples.is_file() or older(samples, cfg.sample):
        return False
    return json.loads(note.read_text()) == drawn_by(cfg, names, n)


def older(one, other):
    """Whether the file `one` was written before the file `other`."""
    return Path(one).stat().st_mtime_ns < Path(other).stat().st_mtime_ns


def score(cfg, script):
    """Compare what a run drew with the test split of cfg.data, by eval_fid.py in its own process.

    reconstructions.npz in autoencoder/ tells what the autoencoder alone costs, samples.npz the
    rest. What is found lies beside each as eval.json and is told in a line; of samples eval_fid.py
    prints its table, too. script: the path of eval_fid.py. A figure that is newer than its images
    is not computed again. Raises BadInput with the command when it fails.
    """
    folder = Path(cfg.out)
    for images in (folder / "autoencoder" / "reconstructions.npz", folder / "samples.npz"):
        told = images.with_name("eval.json")
        if not images.is_file():
            continue
        if not told.is_file() or older(told, images):
            command = [
                sys.executable, str(script), str(images), f"{cfg.data}:test",
                "--data-root", cfg.data_root, "--json", str(told), "--gpus", str(min(cfg.gpus, 1)),
            ]  # fmt: skip
            if cfg.size:
                command += ["--size", str(cfg.size)]
            if cfg.classes:
                command += ["--classes", cfg.classes]
            quiet = subprocess.DEVNULL if images.stem == "reconstructions" else None
            if subprocess.run(command, stdout=quiet).returncode:
                raise BadInput(f"the evaluation failed; its command was {shlex.join(command)}")
        found = json.loads(told.read_text())
        print(
            f"{images.with_suffix('.png')}: class accuracy {100 * found['class_accuracy']:.1f} %, "
            f"Fréchet distance {found['frechet']:.2f} (N = {found['n_generated']}, {cfg.data} "
            "features)",
            flush=True,  # the table of the next one comes from another process
        )
