"""Every script and task, with what is typed in tests of their flags; see flag_cases.py.

    cases(folder)       {"ddim --sample": Case, ...}; tiny checkpoints and pictures lie in `folder`

A table says, of settings for which the general rule finds no value, what is typed: one that is
valid and makes a difference. Where a setting has a part only beside others, `beside` says which.
"""

import functools
import shutil
from pathlib import Path

import torch
from data_files import write_images
from flag_cases import Case, run

SIDE = 8  # pixels
WALK = {"n": 4, "sample_steps": 3}
CHURNED = {f"S_{name}": {"S_churn": (8.0,)} for name in ("tmin", "tmax", "noise")}
COMPARED = {name: {"ema_length": (0.1, 0.2)} for name in ("data", "data_root")}
FEW_TERMS = "spacing: leading"
CLASSES = ("bars", "dots", "more")


@functools.cache
def pictures(folder, side=SIDE, first=0):
    """A folder of 18 and 12 gray pictures in three classes; first: how many others to leave out."""
    found = folder / f"pictures{side}-{first}"
    for split, count in (("train", 18), ("test", 12)):
        write_images(found / split, count + first, height=side, width=side, classes=CLASSES)
        for path in (p for i in range(first) for p in (found / split).rglob(f"{i:05d}.png")):
            path.unlink()
    return str(found)


@functools.cache
def yaml(folder, line):
    """A YAML file of this line."""
    path = folder / f"{line.replace(': ', '-')}.yaml"
    path.write_text(line + "\n")
    return str(path)


# --------------------------------------------------------------------------------------- training

UNET = {"model_channels": 16, "channel_mult": (1, 2)}
DRAWN = {"n": 4, "sample_steps": 3}
FIRST = {"patch": 2, "ae_channels": 8, "ae_blocks": 1, "ae_steps": 2, "n_eval": 0}
SMALL = {
    "ddpm_pixel": UNET | DRAWN | {"timesteps": 50},
    "improved_ddpm": UNET | DRAWN | {"timesteps": 50},
    "edm": UNET | DRAWN | {"ema_lengths": (0.1,), "snapshot_every": 1},
    "classifier_guidance": UNET | {"timesteps": 50, "metric_every": 0},
    "autoencoder": {"patch": 2, "model_channels": 8, "num_res_blocks": 1, "n": 4},
    "ldm_cfg": FIRST | DRAWN | {"model_channels": 16, "timesteps": 50},
    "dit": FIRST | DRAWN | {"model": "dit-xs/2", "timesteps": 50, "lr": 0.05},
    "flow_matching": UNET | DRAWN,
    "rectified_flow": UNET | DRAWN | {"pairs": 6},
}


def training(folder, script, **more):
    """Settings of a few steps."""
    few = {"data": pictures(folder), "data_root": str(folder / "prepared"), "gpus": 0}
    few |= {"out": "out", "steps": 3, "batch_size": 4, "warmup": 2, "log_every": 1}
    few |= {"save_every": 3, "sample_every": 0}
    return few | SMALL[script] | more


@functools.cache
def checkpoint(folder, script, seed=0, **more):
    """(path, settings) of a network that `script` trained a little, made to vary more.

    It lies in the folder "out" as the run has left it, in "used" without what training needs.
    """
    where = folder / "-".join([script, *map(str, [seed, *more.values()])])
    more = {"seed": seed, "ema": (0.99, 0.05)} | more
    case = Case(script, "", training(folder, script, **more))
    found = run(case, case.base, where)
    assert not found.refused, found.refused
    path = where / "out" / "ckpt.pt"
    state, generator = torch.load(path, weights_only=True), torch.Generator().manual_seed(seed)
    for weights in (state["model"], state["ema"], *state["more_emas"]):
        for key, value in weights.items():
            if value.is_floating_point() and key != "pos_embed":
                value += 0.1 * torch.randn(value.shape, generator=generator)
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()}
    state["optimizer"] = {}
    used = where / "used" / "ckpt.pt"
    used.parent.mkdir()
    torch.save(state, used)
    if (averages := path.with_name("power")).exists():
        shutil.copytree(averages, used.with_name("power"))
    return str(used), own


def trained(folder, script):
    """The checkpoint of such a run as it was left, to go on from."""
    path = Path(checkpoint(folder, script)[0])
    return str(path.parent.with_name("out") / path.name)


# What is typed in trainings, and beside what.
VALUES = {"out": "other", "data_root": "elsewhere", "gpus": torch.cuda.device_count() + 1}
VALUES |= {"classes": "bars,more", "size": 16, "seeds": "5-8", "ema": (0.05,), "clip_grad": 1e-3}
VALUES |= {
    "log_every": 3,
    "save_every": 1,
    "sample_every": 1,
    "keep_every": 3,
    "metric_every": 1,
    "metric_n": 6,
    "metric_features": "inception",
    "metric_data": "glyphs",
}
VALUES |= {
    "beta_start": 0.003,
    "beta_end": 0.03,
    "alpha_min": 0.9,
    "trained_betas": (0.05,) * 50,
    "timestep_respacing": "0-4,20,49",
}
VALUES |= {"schedule_sampler": "loss-second-moment", "label_dropout": 0.95, "n_eval": 6}
VALUES |= {"channel_mult": (1,), "attention_resolutions": (4,), "model_channels": 32}
VALUES |= {"num_heads": 2, "num_head_channels": 8, "norm_groups": 2, "ae_mult": (1, 2)}
VALUES |= {"P_mean": 0.5, "sigma_min": 0.5, "ema_lengths": (0.2,), "ema_length": (0.1,)}
VALUES |= {"S_churn": (8.0,), "S_tmin": 1.0, "S_tmax": 1.0, "snapshot_every": 2}
VALUES |= {"study_scales": "0,3", "study_guidance": "0,3", "encode_steps": "2,5"}
VALUES |= {"guidance_interval": (0.4, 0.6), "objective": "vlb"}
VALUES |= {"shift": 3.0, "mode_scale": -0.5, "tolerance": 0.3}
BESIDE = {
    "resume": {"ema": (0.99, 0.05)},
    "smoke": {"warmup": None},
    "metric_n": {"metric_every": 1, "metric_n": 4},
    "metric_resize": {"metric_every": 1, "metric_n": 4, "metric_features": "inception"},
    **dict.fromkeys(
        ("metric_features", "metric_data", "metric_split"), {"metric_every": 1, "metric_n": 4}
    ),
    "price_per_gpu_hour": {"dry_run": True},
    "alpha_min": {"schedule": "cosine"},
    "trained_betas": {"timesteps": None},
    "S_tmin": {"S_churn": (8.0,)},
    "S_tmax": {"S_churn": (8.0,)},
    "S_noise": {"S_churn": (8.0,)},
    "augment": {"model": "ddpmpp"},
}
OWN_VALUES = {
    "classifier_guidance": {"classifier": "missing.pt"},
    "autoencoder": {"patch": 4, "channel_mult": (1, 2), "disc_start": 2, "codebook": 16},
    "ldm_cfg": {"patch": 4, "attention_resolutions": (2,), "channel_mult": (1, 3)},
    "dit": {"patch": 4, "model": "dit-xs/1", "published": "missing.pt"},
    "flow_matching": {"model": "dit-xs/2"},
    "rectified_flow": {"model": "dit-xs/2"},
}
T_OF = {"mode_scale": {"weighting_scheme": "mode"}, "tolerance": {"sampler": "rk45"}}
T_OF |= {name: {"weighting_scheme": "logit_normal"} for name in ("logit_mean", "logit_std")}
T_OF |= {"model": {"model": "unet", "model_channels": None, "channel_mult": None}}
OWN_BESIDE = {
    "improved_ddpm": {
        "learn_sigma": {"objective": "vlb"},
        "timestep_respacing": {"sample_steps": None, "timestep_respacing": "0-2"},
    },
    "autoencoder": {"codebook": {"ae": "vq"}, "commitment": {"ae": "vq"}},
    "edm": {"clip_denoised": {"sigma_data": 5.0}},
    "ldm_cfg": {"context_dim": {"model": "sd"}, "guidance_rescale": {"guidance": 2.0}},
    "flow_matching": T_OF,
    "rectified_flow": T_OF,
}


def trains(script, folder):
    """The training of a script."""
    path, _ = checkpoint(folder, script)
    typed = VALUES | {"data": pictures(folder, SIDE, 3), "config": yaml(folder, "seed: 1")}
    typed |= {"resume": trained(folder, script)}
    typed |= dict.fromkeys(("sample", "nll", "study", "encode", "interpolate"), path)
    typed |= dict.fromkeys(("latents", "flow"), path)
    typed["metric_data"] = pictures(folder, SIDE, 3)
    beside = BESIDE | OWN_BESIDE.get(script, {})
    case = Case(script, "", training(folder, script), beside, typed | OWN_VALUES.get(script, {}))
    if "ae_mult" in case.fields:
        case.values["ae"] = checkpoint(folder, "autoencoder")[0]
        other = {"ae": checkpoint(folder, "autoencoder", 1)[0]}
        case.beside["ae"] = other | {k: None for k in FIRST if k != "n_eval"}
        case.beside["prediction"] = {"schedule": "linear"}
    if script == "autoencoder":
        big = {"data": pictures(folder, 24)}
        case.values |= {"perceptual": vgg(folder)}
        case.beside |= {"perceptual": big, "perceptual_weight": big | {"perceptual": vgg(folder)}}
        case.beside |= {"discriminator": big}
        case.beside |= {"disc_start": big | {"discriminator": 0.5, "disc_start": 1}}
        case.also["discriminator"] = {"disc_start": 1}
    elif "metric_n" in case.fields:
        case.also["metric_every"] = {"metric_n": 6}
    return case


def goes_on(script, name, source, *, folder):
    """The training of a flow, on the latents of a run, or of another flow's paths."""
    case, path = trains(script, folder), trained(folder, source)
    left = {"data", "data_root", *UNET}
    base = {k: v for k, v in case.base.items() if k not in left} | {name: path}
    base["lr"] = 0.05  # a transformer begins as the identity
    values = case.values | {"model": "dit-xs/2", name: checkpoint(folder, source, 1)[0]}
    values |= {"resume": trained(folder, "flow_matching"), "data": "glyphs", "data_root": "other"}
    beside = {k: {n: v for n, v in b.items() if n not in left} for k, b in case.beside.items()}
    beside["model"] = {}
    return Case(script, name, base, beside, values, checkpoint(folder, source)[1])


@functools.cache
def vgg(folder):
    """Weights of VGG16 of few channels."""
    state, c_in, generator = {}, 3, torch.Generator().manual_seed(0)
    for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        state[f"features.{place}.weight"] = torch.randn(4, c_in, 3, 3, generator=generator) / 3
        state[f"features.{place}.bias"] = torch.zeros(4)
        c_in = 4
    torch.save(state, folder / "vgg.pth")
    return str(folder / "vgg.pth")


# --------------------------------------------------------------------------- checkpoints of a run


def task(script, name, source, line="guidance: 0.5", values=None, beside=None, *, folder, **base):
    """The task `name` of a script over a checkpoint that `source` trained."""
    path, own = checkpoint(folder, source)
    other, _ = checkpoint(folder, source, 1)
    typed = VALUES | {"data": pictures(folder, SIDE, 3), "config": yaml(folder, line)}
    typed |= dict.fromkeys(("sample", "nll", "study", "encode", "interpolate"), other)
    typed |= dict.fromkeys(("latents", "flow"), other)
    typed |= {"resume": path, "batch_size": 2, "perceptual": vgg(folder)}
    typed |= {"ae": "other.pt"} if script in ("ldm_cfg", "dit") else {}
    typed |= {"model": "dit-xs/1"} if script in ("dit", "flow_matching", "rectified_flow") else {}
    typed |= {"published": path} | (values or {})
    base = {name: path, "gpus": 0, "out": "out"} | base
    steps = {"sample_steps": None, "encode_steps": None} | ({"n": None} if name == "sample" else {})
    beside = {"smoke": {k: None for k in steps if k in base}} | (beside or {})
    between = {"data_root": {"data": pictures(folder)}, "guidance": {"classes": "dots"}}
    between |= {"data_root": {}} if "flow" in script else {}
    beside |= between if name == "interpolate" else {}
    if script in ("ddim", "dpm_solver") and name == "sample":
        beside |= {"data": {"reverse_from": "data"}}
        beside["data_root"] = beside["data"] | {"data": pictures(folder)}
    beside |= {"timestep_respacing": {"sample_steps": None}} if "sample_steps" in base else {}
    return Case(script, name, base, beside, typed, own)


def guides(name, folder):
    """classifier_guidance.py over a network of improved_ddpm.py."""
    more = {"study_scales": "0,1", "study_guidance": "0,1"} if name == "study" else {}
    more |= WALK | {"classifier": checkpoint(folder, "classifier_guidance")[0], "folder": folder}
    line = "clip_denoised: false" if name == "study" else "guidance: 0.5"
    other = {"classifier": checkpoint(folder, "classifier_guidance", 1)[0]}
    of_ddim = {"eta": {"sampler": "ddim"}}
    other["classifier_batch"] = 3
    return task("classifier_guidance", name, "improved_ddpm", line, other, of_ddim, **more)


def plots_schedules(folder):
    base = {"plot_schedule": True, "gpus": 0, "out": "out", "data": pictures(folder)}
    base |= {"data_root": str(folder / "prepared")}
    typed = VALUES | {"data": pictures(folder, SIDE, 3), "config": yaml(folder, "timesteps: 30")}
    typed |= dict.fromkeys(("sample", "nll", "resume"), checkpoint(folder, "improved_ddpm")[0])
    typed["classes"] = "dots,more"  # the first image is drawn, and it is of bars
    return Case("improved_ddpm", "plot_schedule", base, {}, typed)


def compares(task, folder):
    """compare_samplers.py: its tables, or the task "along"."""
    path, own = checkpoint(folder, "ddpm_pixel")
    base = {"checkpoint": path, "gpus": 0, "out": "out", "n": 4}
    tables = {"compare_steps": "2", "compare_guidance": "0,1", "sample_steps": 3}
    base |= {"along": "2"} if task else tables
    values = {"checkpoint": checkpoint(folder, "ddpm_pixel", 1)[0], "compare_steps": "3"}
    values |= {"compare_guidance": "0,2", "config": yaml(folder, "guidance: 0.5"), "batch_size": 2}
    values |= {"data": pictures(folder, SIDE, 3), "along": "3", "more": values["checkpoint"]}
    beside = {"smoke": {"compare_steps": None, "compare_guidance": None}}
    beside = {"smoke": {"n": None}} if task else beside
    beside["variance"] = {"sampler": "ddpm"}
    return Case("compare_samplers", task, base, beside, VALUES | values, own)
