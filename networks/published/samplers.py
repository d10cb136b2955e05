"""What a script draws of a published pixel network, and what is said of it, once, in one line.

    check_drawn(path, facts, "ddim")    facts: what schedule.read_schedule says of its scheduler

A file names a class of diffusers' schedulers; a script here is one sampler, or a few. Where the
two are not the same, a line says what is drawn, or BadInput what to type. What differs in the steps
of a class stands in schedule.CLASSES; besides, and said in the line,

- where x0_hat is clipped, our DDIM takes the eps_hat of the clipped one, as OpenAI's code does, and
  diffusers' where use_clipped_model_output is typed;
- the last ancestral step adds no noise, also under "trailing" with a variance that is not 0 there.

Under "trailing" diffusers visits one timestep more for some n, 61 of 1000 for one, because its
numbers are rounded; ours are always n.
"""

from runtime.commandline import BadInput
from runtime.processes import say_once

from pathlib import Path

from networks.published.files import read_json
from networks.published.schedule import CLASSES, config_alpha_bar, name_of, read_schedule

# What a script draws by, and the commands of schedule.CLASSES that name it.
DRAWS = {
    "ddpm_pixel": "ancestral steps",
    "improved_ddpm": "ancestral steps",
    "ddim": "DDIM",
    "dpm_solver": "DPM-Solver++(2M)",
    "compare_samplers": "all its samplers",
    "classifier_guidance": "guided steps of DDPM, or --sampler ddim",
    "edm": "Heun's method of EDM",
    "publish": "",
}
MOST_VISITED = 100  # the --sample-steps of the chapters, where nothing says another number
ANCESTRAL = ("ddpm_pixel", "improved_ddpm")
# Settings of DPM-Solver's steps, and those of dpm_solver.py: the first is what diffusers writes,
# others are what it takes for the same.
SOLVER = {
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "lambda_min_clipped": (float("-inf"),),
}
# What is typed where a flag decides what a file asks for in vain.
INSTEAD = {
    "clip_denoised": "--clip-denoised or --no-clip-denoised",
    "spacing": "--spacing leading to leave it out",
}
NO_VARIANCE = ("ddim", "dpm_solver", "edm")  # in whose steps it has no part
# Pipelines, and the class that they make of any scheduler; "": they take it as it is.
PIPELINES = {"DDPMPipeline": "", "DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
CLIPS = {
    "clamp": "x0_hat clamped to [-1, 1]",
    "none": "x0_hat not clipped",
    "dynamic": "x0_hat divided by its percentile (dynamic threshold)",
}


def read_index(folder):
    """The class of scheduler that a folder's model_index.json asks for, which counts, or "".

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
    if PIPELINES.get(name):
        return PIPELINES[name]
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


def config_of(path, facts, given, learned, script="", walk=None):
    """The settings of a schedule and its sampling by the names of improved_ddpm.Config, alpha_bar.

    facts    of read_schedule, {} where no file says them: then Ho et al.'s, but for those given
    learned  whether the network gives variances
    walk     as check_drawn has it: a variance there decides where the file's cannot be drawn
    """
    config = dict(schedule="linear", timesteps=1000, alpha_min=0.001, prediction="eps")
    config |= {"beta_start": 0.0, "beta_end": 0.0, "trained_betas": (), **given}
    if facts:
        other = facts["schedule"] == "other"
        own = ("timesteps", "alpha_min", "beta_start", "beta_end", "prediction")
        config |= {name: facts[name] for name in own}
        config |= {"schedule": "linear" if other else facts["schedule"]}
        config |= {"trained_betas": facts["betas"] if other else ()}
        config |= {"spacing": facts["spacing"], "clip_denoised": facts["clip"] != "none"}
        config |= {"dynamic_threshold": facts["clip"] == "dynamic"}
    said = facts.get("variance", "")
    if said == "learned" and not learned:
        if script not in NO_VARIANCE and (walk or {}).get("variance") not in ("small", "large"):
            raise BadInput(
                f"{path}: variance_type 'learned_range' is not supported, its network gives no "
                "variance: expected fixed_small or fixed_large; or type --variance small"
            )
        said = "small"
    config["variance"] = ("auto" if learned else "small") if said in ("", "learned") else said
    config |= facts.get("notes", {})
    if config["trained_betas"]:
        config["timesteps"] = len(config["trained_betas"])
    if config["timesteps"] < MOST_VISITED:
        config.setdefault("sample_steps", config["timesteps"])
    return config, config_alpha_bar(config, path)


def check_drawn(path, facts, script, walk=None):
    """BadInput where this script does not draw what the scheduler says, unless `walk` decides it.

    script: stem of the script, "publish" for `python -m networks.published`, or "", where nothing
    is drawn; walk: {name: value} of checkpoints.WALK that flags or --config give. Else one line
    says what is drawn.
    """
    name, clip, walk = facts["sampler"], facts["clip"], walk or {}
    kind = CLASSES.get(name or "DDPMScheduler")
    if kind is None:
        known = ", ".join(known.removesuffix("Scheduler") for known in CLASSES)
        raise BadInput(f"{path}: scheduler {name} is not supported, expected one of {known}")
    for setting, why in facts["cannot"].items() if script else ():
        if setting not in walk and (setting, script) != ("spacing", "edm"):
            instead = f"type {INSTEAD[setting]}"
            if (setting, script) == ("spacing", "classifier_guidance"):
                instead = publishing(path, "--spacing leading")
            raise BadInput(f"{why}; or {instead}")
    if script in ANCESTRAL and not kind.command.startswith("improved") and "variance" not in walk:
        raise BadInput(
            f"{path} asks for {name}: type python {_with(kind.command, path)}; or add --variance "
            "small for ancestral steps"
        )
    if clip == "dynamic":
        does_threshold(path, script, walk)
    ddim = script in ("ddim", "compare_samplers") or walk.get("sampler") == "ddim"
    if kind.set_alpha_to_one and facts["fields"]["set_alpha_to_one"] is not True and ddim:
        raise BadInput(
            f"{path}: set_alpha_to_one false is not supported: the last step ends at alpha_bar 1, "
            f"expected true; for that, type python -m networks.published {path} --out FOLDER, and "
            "use FOLDER"
        )
    if script == "dpm_solver" and name.startswith("DPMSolver") and "sampler" not in walk:
        for field, values in SOLVER.items():
            if facts["fields"][field] not in (*values, None):
                raise BadInput(
                    f"{path}: {field} {facts['fields'][field]!r} is not supported, expected "
                    f"{values[0]!r}; or type --sampler dpmpp to draw by that"
                )
    say_once(f"{path}: {_told(facts, kind, script, walk)}")


def does_threshold(path, script, walk=None):
    """Whether a script divides x0_hat by a percentile, which `path` asks for.

    BadInput for one that does not, where `walk`, of check_drawn, does not say if it clamps instead.
    """
    if script in ("", "improved_ddpm", "publish"):
        return True
    if "clip_denoised" not in (walk or {}):
        raise BadInput(
            f"{path} asks for a dynamic threshold (thresholding), which improved_ddpm.py does: "
            f"type python improved_ddpm.py --sample {path}; or add --clip-denoised for a clamp, "
            "--no-clip-denoised for none"
        )
    return False


def publishing(path, flags):
    """What to type where a script has not these flags."""
    return f"type python -m networks.published {path} --out FOLDER with {flags}, and use FOLDER"


def _with(command, path):
    """'ddim.py --eta 1' -> 'ddim.py --sample PATH --eta 1'."""
    script, *flags = command.split(" ", 1)
    return " ".join([script, f"--sample {path}", *flags])


def _told(facts, kind, script, walk):
    """What is understood and drawn, in one line: what `walk` says goes before the file's facts."""
    name, T = facts["sampler"] or "DDPMScheduler", facts["timesteps"]
    clip, spacing, drawn_by = _clip_of(facts, script, walk), facts["spacing"], DRAWS.get(script)
    table = "its own table of betas" if facts["schedule"] == "other" else name_of(facts)
    words = [f"{table}, T = {T}, predicts {facts['prediction']}", CLIPS[clip]]
    spacing = walk.get("spacing", spacing)
    respacing = facts["notes"].get("timestep_respacing", "")
    respacing = "" if {"spacing", "sample_steps"} & walk.keys() else respacing
    respaces = script in ("improved_ddpm", "classifier_guidance")
    respacing = walk.get("timestep_respacing", respacing) if respaces else ""
    if script != "edm":
        words += [f"timesteps {respacing}" if respacing else f"{spacing} timesteps"]
    words += [facts["sampler"] or "of no named class, taken as DDPMScheduler"]
    if script == "publish":
        words += [] if name == "DDPMScheduler" else ["which becomes DDPMScheduler"]
    if script in ("", "publish"):
        return "; ".join(words)
    if script == "ddim":
        drawn_by += f", eta {walk.get('eta', 0.0):g}"
    if script == "dpm_solver" and walk.get("sampler") == "heun":
        drawn_by = "Heun's method"
    differs = list(_differences(facts, kind, script, walk, clip, "" if respacing else spacing))
    words.append(f"drawn by {drawn_by}")
    if differs:
        words.append(f"differs from diffusers' {name}: {'; '.join(differs)}")
    return "; ".join(words)


def _clip_of(facts, script, walk):
    """The name in CLIPS of what is drawn."""
    clip = facts["clip"]
    if "clip_denoised" in walk and (clip != "dynamic" or script not in ("", "improved_ddpm")):
        clip = "clamp" if walk["clip_denoised"] else "none"
    if "dynamic_threshold" in walk:
        plain = "clamp" if walk.get("clip_denoised", facts["clip"] != "none") else "none"
        clip = "dynamic" if walk["dynamic_threshold"] else plain
    return clip


def _differences(facts, kind, script, walk, clip, spacing):
    """What differs in the images from those of the class; spacing "" of steps by their numbers."""
    own, *flags = kind.command.split(".py")
    steps = ANCESTRAL if own in ANCESTRAL else (own,)
    eta = walk.get("eta", 0.0) if script == "ddim" else 0.0
    asked = eta if facts["sampler"].startswith("DDIM") else 1.0 if "--eta" in flags[0] else 0.0
    heun = script == "dpm_solver" and walk.get("sampler") == "heun"
    if script not in steps or not kind.same or eta != asked or heun:
        yield "it takes other steps"
        return
    if spacing in kind.unlike:
        yield kind.unlike[spacing]
    elif spacing == "quadratic":
        yield "it has no quadratic timesteps"
    if own == "ddim" and kind.clip_sample is not None and clip != "none":
        yield (
            "images differ from DDIMPipeline's, which keeps eps_hat of the unclipped x0_hat; with "
            "--no-clip-denoised both are the same"
        )
    variance = walk.get("variance", facts["variance"])
    if own in ANCESTRAL and spacing == "trailing" and variance in ("large", "learned"):
        yield "its last step adds noise"
