"""What a script draws of a published pixel network, and what is said of it, once, in one line.

    check_drawn(path, facts, "ddim")    facts: what schedule.read_schedule says of its scheduler

A file names a class of diffusers' schedulers; a script here is one sampler, or a few. Where the
two are not the same, a line says what is drawn, or BadInput what to type. Differences that are
meant, and are said in the line:

- DDIMScheduler steps from t to t - T // n, wherever its next timestep lies; ours to that one. The
  two are the same under "leading", and under "trailing" where n divides T.
- Where x0_hat is clipped, our DDIM takes the eps_hat of the clipped one, as OpenAI's code does;
  diffusers' where use_clipped_model_output is typed.
- The solvers of diffusers leave out timestep 0 under "linspace" and "leading" and divide the rest
  by n + 1; the Euler schedulers do not round under "linspace", and start at noise of variance
  1 - alpha_bar_T. Ours visit timestep 0, round, and start at variance 1.
- The last ancestral step adds no noise, also under "trailing" with fixed_large.
"""

from runtime.commandline import BadInput, typed
from runtime.processes import say_once

from pathlib import Path

from networks.published.files import read_json
from networks.published.schedule import CLASSES, config_alpha_bar, read_schedule

# What a script draws by, and the commands of schedule.CLASSES that name it.
DRAWS = {
    "ddpm_pixel": "ancestral steps",
    "improved_ddpm": "ancestral steps",
    "ddim": "DDIM, --eta of fresh noise",
    "dpm_solver": "DPM-Solver++(2M), or --sampler heun",
    "compare_samplers": "all its samplers",
    "classifier_guidance": "guided steps of DDPM, or --sampler ddim",
    "edm": "Heun's method of EDM",
    "publish": "",
}
ANCESTRAL = ("ddpm_pixel", "improved_ddpm")
# Settings of DPM-Solver's steps, and those of dpm_solver.py: the first is what diffusers writes,
# others are what it takes for the same.
SOLVER = {
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "lambda_min_clipped": (float("-inf"),),
}
# What is typed beside a flag that decides what a file asks for in vain.
AND = {"clip_denoised": " or --no-clip-denoised", "spacing": " leading to leave it out"}
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
CLIPS = {
    "clamp": "x0_hat clamped to [-1, 1]",
    "none": "x0_hat not clipped",
    "dynamic": "x0_hat divided by its percentile (dynamic threshold)",
}


def read_index(folder):
    """The class of scheduler that a folder's model_index.json names, which is what counts, or "".

    BadInput for pipelines of other networks than pixel U-Nets.
    """
    file = Path(folder) / "model_index.json"
    if not file.is_file():
        return ""
    index = read_json(file)
    name = index.get("_class_name")
    parts = sorted(k for k, v in index.items() if isinstance(v, list) and v[:1] != [None])
    parts = [part for part in parts if not part.startswith("_")]
    if name is not None and name not in list(PIPELINES):
        raise BadInput(
            f"{file}: its pipeline is {name!r}, expected {', '.join(PIPELINES)}; to take its U-Net "
            f"alone, name {file.parent / 'unet'}"
        )
    if other := sorted({*parts} - {"unet", "scheduler"}):
        raise BadInput(f"{file}: its pipeline has {', '.join(other)}, expected unet and scheduler")
    scheduler = index.get("scheduler")
    named = isinstance(scheduler, list) and len(scheduler) == 2 and scheduler[1]
    return named if isinstance(named, str) else ""


def read_scheduler(path, file):
    """What the scheduler in a folder says, {} where it has none; file: the scheduler_config.json.

    BadInput for a folder whose scheduler/ is empty, and for two files that differ.
    """
    path = Path(path)
    sampler, beside = read_index(path), path / "scheduler_config.json"
    if file is None:
        if (path / "scheduler").is_dir():
            raise BadInput(f"{path / 'scheduler'} has no scheduler_config.json: fetch it again")
        return {}
    if file != beside and beside.is_file() and read_json(beside) != read_json(file):
        raise BadInput(f"{path} has two schedulers, {file} and {beside}: remove one")
    return read_schedule(file, sampler=sampler)


def config_of(path, facts, given, learned):
    """The settings of a schedule and its sampling by the names of improved_ddpm.Config, alpha_bar.

    facts    of read_schedule, {} where no file says them: then Ho et al.'s, but for those given
    learned  whether the network gives variances
    """
    config = dict(schedule="linear", timesteps=1000, alpha_min=0.001, prediction="eps")
    config |= {"trained_betas": (), **given}
    if facts:
        other = facts["schedule"] == "other"
        config |= {name: facts[name] for name in ("timesteps", "alpha_min", "prediction")}
        config |= {"schedule": "linear" if other else facts["schedule"]}
        config |= {"trained_betas": facts["betas"] if other else ()}
        config |= {"spacing": facts["spacing"], "clip_denoised": facts["clip"] != "none"}
        config |= {"dynamic_threshold": facts["clip"] == "dynamic"}
    said = facts.get("variance", "")
    if said == "learned" and not learned:
        raise BadInput(f"{path}: its scheduler asks for a variance that its network does not give")
    config["variance"] = ("auto" if learned else "small") if said in ("", "learned") else said
    config |= facts.get("notes", {})
    if config["trained_betas"]:
        config["timesteps"] = len(config["trained_betas"])
    return config, config_alpha_bar(config, path)


def check_drawn(path, facts, script):
    """BadInput where this script does not draw what the scheduler says, unless a flag decides it.

    script: stem of the script, "publish" for `python -m networks.published`, or "", where nothing
    is drawn. Else one line says what the files are understood as.
    """
    name, clip, cannot = facts["sampler"], facts["clip"], facts["cannot"]
    kind = CLASSES.get(name or "DDPMScheduler")
    if kind is None:
        known = ", ".join(known.removesuffix("Scheduler") for known in CLASSES)
        raise BadInput(f"{path}: scheduler {name} is not supported, expected one of {known}")
    if script:
        for flag, why in cannot.items():
            if not typed((flag,)):
                raise BadInput(f"{why}; or type --{flag.replace('_', '-')}{AND[flag]}")
    if script in ANCESTRAL and not kind.command.startswith("improved") and not typed(("variance",)):
        raise BadInput(
            f"{path} asks for {name}: type python {_with(kind.command, path)}; or add --variance "
            "small for ancestral steps"
        )
    if clip == "dynamic":
        does_threshold(path, script)
    if kind.set_alpha_to_one and facts["fields"]["set_alpha_to_one"] is not True and script:
        raise BadInput(
            f"{path}: set_alpha_to_one false is not supported: the last step ends at alpha_bar 1; "
            "expected true"
        )
    if script == "dpm_solver" and name.startswith("DPMSolver") and not typed(("sampler",)):
        for field, values in SOLVER.items():
            if facts["fields"][field] not in (*values, None):
                raise BadInput(
                    f"{path}: {field} {facts['fields'][field]!r} is not supported, expected "
                    f"{values[0]!r}; or type --sampler dpmpp to draw by that"
                )
    say_once(f"{path}: {_told(facts, kind, script)}")


def does_threshold(path, script):
    """Whether a script divides x0_hat by a percentile, which `path` asks for.

    BadInput for one that does not, where no typed flag says whether it clamps instead.
    """
    if script in ("", "improved_ddpm", "publish"):
        return True
    if not typed(("clip_denoised",)):
        raise BadInput(
            f"{path} asks for a dynamic threshold (thresholding), which improved_ddpm.py does: "
            f"type python improved_ddpm.py --sample {path}; or add --clip-denoised for a clamp, "
            "--no-clip-denoised for none"
        )
    return False


def _with(command, path):
    """'ddim.py --eta 1' -> 'ddim.py --sample PATH --eta 1'."""
    script, *flags = command.split(" ", 1)
    return " ".join([script, f"--sample {path}", *flags])


def _told(facts, kind, script):
    """What is understood, in one line."""
    name, T, clip = facts["sampler"], facts["timesteps"], facts["clip"]
    table = "its own table of betas" if facts["schedule"] == "other" else facts["schedule"]
    words = [f"{table}, T = {T}, predicts {facts['prediction']}", CLIPS[clip]]
    words += [f"{facts['spacing']} timesteps", name or "of no named class, taken as DDPMScheduler"]
    if script == "publish":
        words += [] if name in ("", "DDPMScheduler") else ["which becomes DDPMScheduler"]
        return "; ".join(words)
    if script:
        words.append(f"drawn by {DRAWS[script]}")
    own = kind.command.split(".")[0]
    if script and (script != own or not kind.same) and not {script, own} <= {*ANCESTRAL}:
        words[-1] += f", not as {name or 'DDPMScheduler'} does"
    elif "--" in kind.command and script:
        words[-1] += f"; {name} is {kind.command.split(' ', 1)[1]}"
    if script == "ddim" and name.startswith("DDIM"):
        if clip != "none":
            words.append("eps_hat is that of the clipped x0_hat (use_clipped_model_output)")
        if facts["spacing"] != "leading":
            words.append("t_prev is the next timestep, not t - T // n")
    if script and kind.spacing == "linspace" and facts["spacing"] != "trailing":
        words.append("timesteps are whole and include 0")
    return "; ".join(words)
