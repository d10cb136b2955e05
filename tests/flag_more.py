"""The rest of the tables: published networks, scores, Stable Diffusion; and all cases.

CASES               {"ddim sample of ddpm_pixel": function of a folder -> Case, ...}
LET_PASS, SLOW      flags and cases that are seen in another way
"""

from runtime import commandline as cli

import dataclasses
import functools
import json

import numpy as np
import openai_unet
import torch
from data_files import write_image
from flag_cases import Case, run
from flag_tables import (
    CHURNED,
    COMPARED,
    FEW_TERMS,
    SIDE,
    SMALL,
    VALUES,
    WALK,
    checkpoint,
    compares,
    goes_on,
    guides,
    pictures,
    plots_schedules,
    task,
    trains,
    yaml,
)

from networks.clip_tokens import Tokenizer
from networks.published import stable_diffusion

# ------------------------------------------------------------------------ what others published


@functools.cache
def exported(folder, source):
    """A folder of diffusers, of a network that `source` trained."""
    path, _ = checkpoint(folder, source)
    where = folder / f"exported-{source}"
    case = Case("networks.published.__main__", "", {"checkpoint": path, "out": "pipeline"})
    assert not run(case, case.base, where).refused
    return str(where / "pipeline")


@functools.cache
def openai(folder, seed=0):
    """A .pt of improved-diffusion: 3 channels, attention at half the size, of 1, 2 or 4 heads."""
    shapes = openai_unet.published(64, (1, 2), 1, (2,), use_scale_shift_norm=False, out=3)
    torch.save(openai_unet.weights(shapes, seed), folder / f"openai{seed}.pt")
    return str(folder / f"openai{seed}.pt")


def published(script, name, source, *, folder, **base):
    """The task `name` over such a network; source: of exported(), or "openai"."""
    path, other = exported(folder, "ddpm_pixel"), exported(folder, "improved_ddpm")
    typed = VALUES | {"data": pictures(folder, SIDE, 3), "batch_size": 2, "norm_groups": 16}
    typed |= {"num_head_channels": 16, "config": yaml(folder, "clip_denoised: false")}
    own = {"schedule": "linear", "variance": "small", "clip_denoised": True}
    beside = {
        "smoke": {"sample_steps": None},
        "timestep_respacing": {"sample_steps": None},
    } | CHURNED
    if source == "openai":
        path, other, base = openai(folder), openai(folder, 1), base | {"size": SIDE}
        typed |= {"schedule": "cosine", "variance": "large"}
        beside |= {"alpha_min": {"schedule": "cosine"}, "trained_betas": {"timesteps": None}}
    else:
        typed["classes"] = "0,2"
    typed |= dict.fromkeys(("sample", "nll", "encode", "interpolate", "resume"), other)
    base = {name: path, "gpus": 0, "out": "out"} | WALK | base
    return Case(script, name, base, beside, typed, own)


def exports(source, folder):
    """`python -m networks.published` of a checkpoint, or of an OpenAI file."""
    path = openai(folder) if source == "openai" else checkpoint(folder, source)[0]
    other = openai(folder, 1) if source == "openai" else checkpoint(folder, source, 1)[0]
    base = {"checkpoint": path, "out": "out"}
    base |= {"size": SIDE} if source == "openai" else {}
    values = {"checkpoint": other, "num_head_channels": 16, "norm_groups": 16}
    values |= {"config": yaml(folder, "dynamic_threshold: true")}
    values["variance"] = "large"
    beside = {"alpha_min": {"schedule": "cosine"}} if source == "openai" else {}
    return Case("networks.published.__main__", "", base, beside, VALUES | values)


def publishes(folder):
    """dit.py --published, of a transformer in the published names."""
    for seed in (0, 1):
        path, _ = checkpoint(folder, "dit", seed) if seed else checkpoint(folder, "dit")
        state = torch.load(path, weights_only=True)["ema"]
        torch.save(state, folder / f"dit{seed}.pt")
    base = {"published": str(folder / "dit0.pt"), "ae": tiny(folder)[0], "gpus": 0, "out": "out"}
    values = {"published": str(folder / "dit1.pt"), "ae": tiny(folder, 1)[0], "data": "cifar10"}
    values |= {"sample": str(folder / "dit0.pt"), "resume": "ckpt.pt", "model": "dit-xs/1"}
    values |= {"config": yaml(folder, "data: mnist")}
    return Case("dit", "published", base, {}, VALUES | values, settings=True)


# ----------------------------------------------------------------------- images and their distance


def prepares(folder):
    base = {"data": pictures(folder), "data_root": "prepared"}
    values = {"data": pictures(folder, SIDE, 3), "split": "test", "classes": "dots"}
    return Case(
        "image_data.__main__", "", base, {}, VALUES | values | {"config": yaml(folder, "size: 16")}
    )


def scores(a, folder):
    """eval_fid.py of images, of a checkpoint, of a run, and of statistics."""
    path, _ = checkpoint(folder, "ddpm_pixel")
    real, more = pictures(folder), {"place": {}, "own": {}}
    base = {"a": a, "b": f"{real}:test", "gpus": 0, "metrics": "frechet"}
    base |= {"data_root": str(folder / "prepared")}
    if a in ("images", "inception"):
        base |= {"a": f"{real}:train"}
        base |= {"features": "inception", "metrics": "is"} if a == "inception" else {}
    elif a == "stats":
        base |= {"out": "stats.npz", "metrics": None}
    elif a == "table":
        base |= {"b": f"{real}:train", "more": f"{real}:test", "against": f"{real}:test"}
    else:
        base |= {"a": {"checkpoint": path, "run": "run"}[a], "n": 4, "curve": a == "run"}
        more["place"] = {"run/ckpt.pt": path} if a == "run" else {}
    values = {"a": f"{real}:test", "b": f"{real}:train", "metrics": "frechet,kid", "n": 8}
    values |= {"data": pictures(folder, SIDE, 3), "json": "figures.json", "weights": "weights.pt"}
    values |= {"sample_args": "--guidance 0.5", "config": yaml(folder, "seed: 3"), "batch_size": 2}
    values |= {"out": "other.npz", "classifier_steps": 7, "more": f"{real}:train"}
    values |= {"out": "other"} if a == "checkpoint" else {}
    values |= {"against": f"{real}:train", "names": ("first", "second")}
    if a == "table":
        values |= {"out": "other", "b": f"{pictures(folder, SIDE, 3)}:train"}
    inception = {"features": "inception"}
    beside = {"weights": inception, "resize": inception, "layout": inception}
    beside |= {"smoke": {"n": 8}, "batch_size": {"data_root": "fresh"}}
    beside |= {"seed": {"n": 8}} if a == "inception" else {}  # it chooses the images
    values |= {"config": yaml(folder, "n: 10")} if a == "inception" else {}
    name = "curve" if a == "run" else ""
    return Case("eval_fid", name, base, beside, VALUES | values, **more)


@functools.cache
def logged(folder, name, *losses):
    """The folder of a run of which a log and a setting are left."""
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text("timesteps: 50\n")
    rows = ({"step": step, "loss": loss} for step, loss in enumerate(losses, 1))
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(run)


def shows(script, line, folder):
    """`python -m evaluation.curves` and `python -m runtime.report`; line: of a YAML file."""
    run, other = logged(folder, "one", 3.0, 1.0, 2.0), logged(folder, "two", 4.0, 2.0, 3.0)
    values = {"runs": other, "over": "timesteps", "names": "other", "config": yaml(folder, line)}
    values["out"] = "other" if script == "evaluation.curves" else "other.html"
    return Case(script, "", {"runs": run}, {}, values)


# -------------------------------------------------------------------------------- Stable Diffusion


@functools.cache
def tiny(folder, seed=0):
    """(weights, vocabulary) of a tiny Stable Diffusion."""
    return tuple(map(str, stable_diffusion.write_tiny(folder / f"tiny{seed}", seed)))


@functools.cache
def other_words(folder):
    """As many words in another order: a cat has the number of another word."""
    path, words = folder / "other-vocabulary.txt.gz", stable_diffusion.TINY_WORDS.split()
    count = len(Tokenizer.of_file(tiny(folder)[1]))
    for i in (i for i, word in enumerate(words) if word != "cat"):
        swapped = [{words[i]: "cat", "cat": words[i]}.get(word, word) for word in words]
        stable_diffusion.write_vocabulary(path, swapped)
        if len(Tokenizer.of_file(path)) == count:
            return str(path)
    raise AssertionError("no other word has as many merges")


@functools.cache
def picture(folder, name, white):
    """A PNG of 64x64 pixels whose first `white` rows are white."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:white] = 255
    write_image(folder / name, pixels)
    return str(folder / name)


def from_sentences(kind, folder):
    """stable_diffusion.py from noise, from a picture, of a part of one, and on a way."""
    weights, vocabulary = tiny(folder)
    base = {"weights": weights, "vocabulary": vocabulary, "prompt": ("a cat",), "steps": 2}
    base |= {"size": (64,), "gpus": 0, "out": "out"}
    dog = folder / "dog.txt"
    dog.write_text("a dog\n")
    image, mask = picture(folder, "image.png", 40), picture(folder, "mask.png", 20)
    base |= {"image": image} if kind in ("image", "mask") else {}
    base |= {"mask": mask} if kind == "mask" else {}
    base |= {"interpolate": 2} if kind == "interpolate" else {}
    values = {"weights": tiny(folder, 1)[0], "prompt": ("a dog",), "prompt_file": str(dog)}
    values |= {"vocabulary": other_words(folder), "negative": "blue", "size": (64, 72)}
    values |= {"seeds": "5,6" if kind == "interpolate" else "5", "strength": 1.0, "n": 2}
    values |= {"image": picture(folder, "other.png", 9), "mask": picture(folder, "part.png", 50)}
    values |= {"interpolate": 3, "batch_size": 2, "config": yaml(folder, "guidance: 2.0")}
    two = {} if kind == "interpolate" else {"batch_size": {"n": 2}}
    first = {"strength": {"image": image}, "mask": {"image": image}, "smoke": {"steps": None}}
    return Case("stable_diffusion", "", base, first | two, VALUES | values)


def cases():
    """{name: function of the folder that gives the Case}."""
    found = {f"{script} training": functools.partial(trains, script) for script in SMALL}

    def add(script, name, source, *more, **base):
        made = functools.partial(task, script, name, source, *more, **base)
        found[f"{script} {name} of {source}"] = made

    add("ddpm_pixel", "sample", "ddpm_pixel", n=4)
    for source in ("improved_ddpm", "ddpm_pixel"):
        add("improved_ddpm", "sample", source, n=4)
        add("improved_ddpm", "nll", source, FEW_TERMS, **WALK)
    add("edm", "sample", "edm", "guidance: 0.5", None, CHURNED | COMPARED, **WALK)
    add("edm", "sample", "ddpm_pixel", "guidance: 0.5", None, CHURNED, **WALK)
    rk45 = {"tolerance": {"sampler": "rk45", "sample_steps": 3}}
    for source in ("flow_matching", "ddpm_pixel"):
        add("flow_matching", "sample", source, "guidance: 0.5", None, rk45, **WALK)
    add("flow_matching", "nll", "flow_matching", "seeds: '3'", {"n": 2}, n=1, tolerance=0.9)
    add("flow_matching", "encode", "flow_matching", "guidance: 0.5", None, n=4, encode_steps="3")
    add("flow_matching", "interpolate", "flow_matching", "clip_denoised: true", {"n": 6}, **WALK)
    add("rectified_flow", "sample", "rectified_flow", "guidance: 0.5", None, rk45, **WALK)
    for script, name, source in (
        ("flow_matching", "latents", "ldm_cfg"),
        ("rectified_flow", "latents", "ldm_cfg"),
        ("rectified_flow", "flow", "flow_matching"),
    ):
        made = functools.partial(goes_on, script, name, source)
        found[f"{script} {name} of {source}"] = made
    add("autoencoder", "sample", "autoencoder", "classes: dots", n=4)
    add("ldm_cfg", "sample", "ldm_cfg", n=4)
    add("dit", "sample", "dit", n=4)
    for script in ("ddim", "dpm_solver"):
        add(script, "sample", "ddpm_pixel", **WALK)
        add(script, "encode", "ddpm_pixel", n=4, encode_steps="3")
        add(script, "interpolate", "ddpm_pixel", "clip_denoised: false", {"n": 6}, **WALK)
    for name in ("sample", "study"):
        found[f"classifier_guidance {name}"] = functools.partial(guides, name)
    for script in ("ddpm_pixel", "improved_ddpm", "edm", "ddim", "dpm_solver"):
        made = functools.partial(published, script, "sample", "ddpm_pixel")
        found[f"{script} sample of ddpm_pixel published"] = made
    made = functools.partial(published, "improved_ddpm", "sample", "openai")
    found["improved_ddpm sample of openai published"] = made
    for source in ("ddpm_pixel", "improved_ddpm", "openai"):
        found[f"networks.published {source}"] = functools.partial(exports, source)
    for a in ("images", "inception", "checkpoint", "run", "stats", "table"):
        found[f"eval_fid {a}"] = functools.partial(scores, a)
    for kind in ("noise", "image", "mask", "interpolate"):
        found[f"stable_diffusion {kind}"] = functools.partial(from_sentences, kind)
    found["improved_ddpm plot_schedule"] = plots_schedules
    found["evaluation.curves"] = functools.partial(shows, "evaluation.curves", "best: true")
    found["runtime.report"] = functools.partial(shows, "runtime.report", "out: third.html")
    for name in ("", "along"):
        made = functools.partial(compares, name)
        found[f"compare_samplers {name or 'tables'}"] = made
    return found | {"image_data": prepares, "dit published": publishes}


CASES = cases()


# ------------------------------------------------------------------------------- what is let pass

# Flags that do nothing in a task, and are let pass: {name of the case: {flag: why}}.
LET_PASS = {
    "dit training": {"shard": "one process has nothing to share"},
    "dit published": {"smoke": "a conversion has no steps", "gpus": "and needs no GPU"},
    "improved_ddpm plot_schedule": {"smoke": "curves have no steps"},
    "eval_fid inception": {"smoke": "with --n there is nothing left to make smaller"},
}

# Cases like others, and flags that do the same everywhere, which are tried with the slow tests.
SLOW = {
    "stable_diffusion image",
    "stable_diffusion noise",
    "eval_fid run",
    "eval_fid checkpoint",
    "classifier_guidance study",
}
SLOW |= {"stable_diffusion interpolate", "improved_ddpm sample of ddpm_pixel"}
SLOW |= {"improved_ddpm nll of ddpm_pixel"}
SLOW |= {"compare_samplers tables", "compare_samplers along", "eval_fid table"}
SLOW |= {f"{script} training" for script in ("ldm_cfg", "dit", "edm", "improved_ddpm")}
SLOW |= {"rectified_flow training", "rectified_flow sample of rectified_flow"}
SLOW |= {"flow_matching latents of ldm_cfg", "rectified_flow latents of ldm_cfg"}
SLOW |= {"rectified_flow flow of flow_matching", "flow_matching sample of ddpm_pixel"}
SLOW |= {"edm sample of ddpm_pixel", "dpm_solver encode of ddpm_pixel"}
SLOW |= {
    "improved_ddpm sample of ddpm_pixel published",
    "dpm_solver sample of ddpm_pixel published",
}
SHARED = {f.name for f in dataclasses.fields(cli.RunConfig)}


def is_slow(name, field):
    """Whether a flag of a case waits for the slow tests: those of RunConfig in some trainings."""
    trains = name.endswith("training") or " latents " in name or " flow " in name
    elsewhere = trains and not name.startswith("ddpm_pixel")
    return field == "smoke" or elsewhere and field in SHARED
