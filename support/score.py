"""The last stage of a run: its samples against real images, by eval_fid.py in its own process."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from support.commandline import BadInput


def score(cfg, script):
    """Compare samples.npz in cfg.out with the test split of cfg.data; what is found: eval.json.

    script: the path of eval_fid.py, whose table is printed, then one line in short. Raises BadInput
    with the command when it fails.
    """
    folder = Path(cfg.out)
    command = [
        sys.executable, str(script), str(folder / "samples.npz"), f"{cfg.data}:test",
        "--data-root", cfg.data_root, "--json", str(folder / "eval.json"),
        "--gpus", str(min(cfg.gpus, 1)),
    ]  # fmt: skip
    if cfg.size:
        command += ["--size", str(cfg.size)]
    if cfg.classes:
        command += ["--classes", cfg.classes]
    if subprocess.run(command).returncode:
        raise BadInput(f"the evaluation failed; its command was {shlex.join(command)}")
    found = json.loads((folder / "eval.json").read_text())
    print(
        f"{folder / 'samples.png'}: class accuracy {100 * found['class_accuracy']:.1f} %, "
        f"Fréchet distance {found['frechet']:.2f} (N = {found['n_generated']}, {cfg.data} features)"
    )
