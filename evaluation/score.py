"""The last stages of a run, done once: its samples, and eval_fid.py's figures of them."""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.processes import run_alone

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def drawn_by(cfg, names, n):
    """What decides n samples of the checkpoint cfg.sample: its file as it is now, and settings."""
    names, file = (*names, "seeds", "classes"), Path(cfg.sample).stat()
    found = {name: getattr(cfg, name) for name in names} | {"n": n}
    return json.loads(json.dumps(found | {"checkpoint": [file.st_size, file.st_mtime_ns]}))


def note_samples(folder, made_of):
    """Write down beside samples.npz in `folder` what drawn_by told before the checkpoint was read.

    runtime.save_samples removes the note of the samples before these.
    """
    with atomic_write(Path(folder) / "samples.json") as path:
        path.write_text(json.dumps(made_of, indent=2) + "\n")


def drawn_before(cfg, names, n, world):
    """Whether samples.npz in cfg.out is what would be drawn now; rank 0 decides for all."""
    note, known = Path(cfg.out) / "samples.json", False
    if world.is_main and note.is_file() and note.with_name("samples.npz").is_file():
        known = json.loads(note.read_text()) == drawn_by(cfg, names, n)
    return world.sum(torch.tensor(float(known), device=world.device)).item() > 0


def score(cfg, script):
    """Compare what a run drew with the test split of cfg.data, by eval_fid.py in its own process.

    reconstructions.npz in autoencoder/ tells what the autoencoder alone costs, samples.npz the
    rest. What is found lies beside each as eval.json and is told in a line; of samples eval_fid.py
    prints its table, too. script: the path of eval_fid.py. A figure that is newer than its images
    is not computed again. Raises BadInput with the command when it fails.
    """
    folder = Path(cfg.out)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what sampling has left is the other process's to use
    for images in (folder / "autoencoder" / "reconstructions.npz", folder / "samples.npz"):
        told = images.with_name("eval.json")
        if not images.is_file():
            continue
        found = known_figures(told, images)
        if found is None:
            command = [
                sys.executable,
                str(script),
                str(images),
                f"{cfg.data}:test",
                "--data-root",
                cfg.data_root,
                "--json",
                str(told),
                "--gpus",
                str(min(cfg.gpus, 1)),
            ]
            if cfg.size:
                command += ["--size", str(cfg.size)]
            if cfg.classes:
                command += ["--classes", cfg.classes]
            quiet = subprocess.DEVNULL if images.stem == "reconstructions" else None
            if run_alone(command, quiet):
                raise BadInput(f"the evaluation failed; its command was {shlex.join(command)}")
            found = json.loads(told.read_text())
        print(
            f"{images.with_suffix('.png')}: class accuracy {100 * found['class_accuracy']:.1f} %, "
            f"Fréchet distance {found['frechet']:.2f} (N = {found['n_generated']}, {cfg.data} "
            "features)",
            flush=True,  # the table of the next one comes from another process
        )


def known_figures(told, images):
    """Those in the file `told`, if of these images by the data set's classifier, else None."""
    if not told.is_file() or told.stat().st_mtime_ns < images.stat().st_mtime_ns:
        return None
    found = json.loads(told.read_text())
    return None if found.get("class_accuracy") is None else found
