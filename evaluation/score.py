"""The last stages of a latent run, done once: its samples, and eval_fid.py's figures of them.

For every chapter that leaves samples.npz in its folder, and reconstructions.npz in a folder of its
autoencoder. Which of its settings decide a sample is said by the chapter.
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write, is_number, read_json
from runtime.processes import run_alone

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.choice import PATIENCE
from evaluation.words import whose
from networks.inception import find_weights

SAID = {"frechet", "n_generated", "class_accuracy"}  # by figures that are kept
ALWAYS = ("seeds", "classes")  # settings of every chapter that draws samples


def drawn_by(cfg, names, n):
    """What decides n samples of the checkpoint cfg.sample: its file as it is now, and settings.

    names: the chapter's settings that do, besides ALWAYS.
    """
    file = Path(cfg.sample).stat()
    found = {name: getattr(cfg, name) for name in (*names, *ALWAYS)} | {"n": n}
    return json.loads(json.dumps(found | {"checkpoint": [file.st_size, file.st_mtime_ns]}))


def note_samples(folder, made_of):
    """Write down beside samples.npz in `folder` what drawn_by said before the checkpoint was read.

    runtime.pictures.save_samples removes the note of the samples before these.
    """
    with atomic_write(Path(folder) / "samples.json") as path:
        path.write_text(json.dumps(made_of, indent=2) + "\n")


def drawn_before(cfg, names, n, world):
    """Whether samples.npz in cfg.out is what would be drawn now; rank 0 decides for all."""
    note, known = Path(cfg.out) / "samples.json", False
    if world.is_main and note.is_file() and note.with_name("samples.npz").is_file():
        known = read_json(note) == drawn_by(cfg, names, n)
    return world.sum(torch.tensor(float(known), device=world.device)).item() > 0


def last_samples(cfg, world, names, draw):
    """The samples of a finished run, unless just these lie there: max(n, n_eval) of them.

    draw(settings, world, n) draws them from settings.sample; names: settings that decide them.
    Where samples are scored, --seeds does not choose them.
    """
    if cfg.stage != "all":
        return
    end = replace(cfg, sample=str(Path(cfg.out, "ckpt.pt")), classes="")
    end, n = replace(end, seeds="") if cfg.n_eval else end, max(cfg.n, cfg.n_eval)
    if not drawn_before(end, names, n, world):
        with world.from_first(end.sample) as path:
            draw(replace(end, sample=str(path)), world, n)


def score(cfg, ds, script):
    """Compare what a run drew with the test split of cfg.data, by eval_fid.py in its own process.

    reconstructions.npz says what the autoencoder alone costs, samples.npz the rest. The figures lie
    beside each as eval.json, and a line prints two of them; of samples eval_fid.py prints its
    table, too. They are of the data set's classifier, which reads classes, and to which the
    thousand samples of a run are enough; of data without classes they are Inception's, or where its
    weights cannot be had there are none, and a line says what to type. script: the path of
    eval_fid.py. A figure that is newer than its images is not computed again. Raises BadInput with
    the command when it fails.
    """
    folder, features = Path(cfg.out), features_of(cfg, ds)
    if not features:
        return
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what sampling has left is the other process's to use
    for images in (*sorted(folder.glob("*/reconstructions.npz")), folder / "samples.npz"):
        result = images.with_name("eval.json")
        if not images.is_file():
            continue
        found = known_figures(result, images, features)
        if found is None:
            command = command_of(cfg, script, images, result, features)
            quiet = subprocess.DEVNULL if images.stem == "reconstructions" else None
            if failed := run_alone(command, quiet):
                told = f"the evaluation failed: {failed}"
                raise BadInput(f"{told}; its command was {shlex.join(command)}")
            found = json.loads(result.read_text())
        right = found["class_accuracy"]
        right = "" if right is None else f"class accuracy {100 * right:.1f} %, "
        network = found.get("network") or f"{cfg.data} classifier"
        print(
            f"{images.with_suffix('.png')}: {right}Fréchet distance {found['frechet']:.2f} "
            f"(N = {found['n_generated']}, {whose(network)} features)",
            flush=True,  # the table of the next one comes from another process
        )


def features_of(cfg, ds):
    """--features by which samples of a run on the Dataset ds are scored; "" and a line for none."""
    if ds.num_classes > 1 or cfg.classes:
        return "classifier"
    try:
        find_weights("", cfg.data_root, PATIENCE)
        return "inception"
    except BadInput as error:
        samples = Path(cfg.out, "samples.npz")
        command = f"python eval_fid.py {samples} {cfg.data}:test --data-root {cfg.data_root}"
        print(
            f"no evaluation: {ds.name} has no classes to train a classifier on, and Inception's "
            f"weights are not there ({error}); with NAME, a labelled data set of such images, "
            f"type {command} --data NAME"
        )
        return ""


def command_of(cfg, script, images, result, features):
    """The command that scores the file `images` and writes the figures into the file `result`."""
    command = [
        sys.executable,
        str(script),
        str(images),
        f"{cfg.data}:test",
        "--data-root",
        cfg.data_root,
        "--json",
        str(result),
        "--gpus",
        str(min(cfg.gpus, 1)),
        "--features",
        features,
    ]
    if cfg.size:
        command += ["--size", str(cfg.size)]
    if cfg.classes:
        command += ["--classes", cfg.classes]
    return command


def known_figures(result, images, features):
    """Those in the file `result`, if of these images by these `features`, else None."""
    if not result.is_file() or result.stat().st_mtime_ns < images.stat().st_mtime_ns:
        return None
    found = read_json(result)
    accuracy = found.get("class_accuracy", "")  # None where the data set has no classes
    if not all(is_number(found.get(name)) for name in SAID - {"class_accuracy"}):
        return None
    if not (accuracy is None or is_number(accuracy)):
        return None
    unknown = "Inception" if found.get("class_accuracy") is None else ""
    network = found.get("network", unknown)
    by = "inception" if network == "Inception" else "classifier"
    return found if by == features and isinstance(network, str | None) else None
