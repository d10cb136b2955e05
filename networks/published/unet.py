"""Networks that others published, read and written: diffusers' UNet2DModel, OpenAI's .pt files.

    load_published("google-ddpm-cifar10-32")     a folder of diffusers, whole pipeline or U-Net
    load_published("cifar10_uncond_50M_500K.pt")  of improved-diffusion or guided-diffusion
    read_network(path, "improved_ddpm")           one of these, or a checkpoint, as a checkpoint
    save_diffusers(folder, net.settings, ...)     DDPMPipeline.from_pretrained(folder) reads it

    python -m networks.published CKPT --out FOLDER     writes a checkpoint as such a pipeline

Weights are read as plain tensors only: nothing in such a file is ever executed.
"""

from runtime.checkpoints import ARCHITECTURE, FORWARD, load_checkpoint
from runtime.commandline import BadInput, flag, typed
from runtime.files import atomic_write
from runtime.processes import say_once

from pathlib import Path

import torch
from safetensors.torch import save_file

from networks.published.files import (
    U_NET,
    WEIGHTS,
    find_files,
    is_published,
    read_json,
    read_weights,
    write_json,
)
from networks.published.samplers import (
    check_drawn,
    config_of,
    does_threshold,
    publishing,
    read_scheduler,
)
from networks.published.schedule import name_of, scheduler_config
from networks.published.unet_config import STYLES, of_config
from networks.published.unet_names import (
    Structure,
    from_published,
    is_classifier,
    split_heads_last,
    structure,
    to_diffusers,
    with_present_names,
)
from networks.sizes import groups_for

CLASSIFIERS = "classifier_guidance"  # stem of the script that trains classifiers of noisy images

# Image sizes of the published networks, by their levels: DDPM, improved and guided diffusion.
SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}


def load_published(
    path,
    *,
    size=None,
    style=None,
    num_heads=None,
    num_head_channels=None,
    norm_groups=None,
    dropout=None,
    new_order=None,
    rescale_timesteps=None,
    null_label=None,
    given=None,
    flags=(),
):
    """A published network, dict(settings, shape, num_classes, state, facts, null_label, taken,
    rescale_timesteps).

    path     a diffusers folder (of a UNet2DModel, or of a pipeline with unet/ and scheduler/), one
             .safetensors or .bin in its names (config.json beside it is read), or OpenAI's .pt
    settings keywords of adm_unet.UNet; shape (C,H,W); state its float32 state_dict
    facts    what the folder's scheduler tells, as read_schedule has it; {} if there is none
    taken    what nothing told of ARCHITECTURE, by name, and was taken as below
    null_label  False if the network never learned a "no label": that row of its embedding is zero,
             and guidance with it means nothing

    The architecture comes from names and shapes of the tensors. They do not tell the keywords; a
    keyword that is given wins over config.json, and without either the published value is taken:
    size     height, or (height, width): by the levels, such as 32 for channel_mult (1, 2, 2, 2)
    style    "ddpm" for UNet2DModel's names, "adm" for OpenAI's
    num_heads   1 for UNet2DModel's names. OpenAI's: with resblock_updown num_head_channels 64, but
             4 heads at 128 pixels (guided-diffusion); else 4 heads with use_scale_shift_norm, 1
             without (improved-diffusion)
    norm_groups   32.     dropout  0
    new_order   OpenAI's use_new_attention_order: true for resblock_updown at 64 pixels only
    rescale_timesteps   OpenAI's: of T timesteps the network sees t * 1000 / T. True for the names
             of improved-diffusion, where the published T is 4000; false with resblock_updown
    null_label  true for folders of save_diffusers: that the last row of labels means "no label"
    given    the same by name, of ARCHITECTURE, from a command line that has flags for it: a typed
             one is refused where config.json tells it, too, and no zero is a size or a group
    flags    names of the settings that this command line has, for hints

    BadInput, with the first names, for tensors or settings that are not those of such a network.
    """
    path = Path(path)
    weights, config, scheduler = find_files(path)
    state = with_present_names(read_weights(weights, U_NET))
    if is_classifier(state):
        raise BadInput(told_classifier(path))
    layout, s = structure(state, weights)
    of_file = of_config(read_json(config), s, config) if config and layout == "diffusers" else {}
    told = published_defaults(layout, s) | of_file
    keywords = dict(
        size=size,
        style=style,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        norm_groups=norm_groups,
        dropout=dropout,
        new_order=new_order,
        rescale_timesteps=rescale_timesteps,
        null_label=null_label,
    )
    keywords = {name: value for name, value in keywords.items() if value is not None}
    keywords = _typed(given, of_file, layout, config or weights) | keywords
    if keywords.get("num_heads") and not keywords.get("num_head_channels"):
        keywords["num_head_channels"] = 0
    told |= keywords
    height, width = _image_size(told["size"], s, path, flags)
    if s.out not in (s.channels, 2 * s.channels):
        raise BadInput(
            f"{weights} makes {s.out} channels of {s.channels}: "
            "only as many, or twice as many with learned variance, can be sampled from"
        )

    ours = from_published(state, layout, s, weights)
    if layout == "openai" and not told["new_order"]:
        split_heads_last(ours, told["num_heads"], told["num_head_channels"], weights)
    if s.labels and not told["null_label"]:
        label = ours["label.weight"]
        ours["label.weight"] = torch.cat([label, label.new_zeros(1, label.shape[1])])
    by_name = ("num_heads", "num_head_channels", "dropout", "style", "norm_groups")
    settings = dict(
        model_channels=s.width,
        channel_mult=channel_mult(s),
        num_res_blocks=s.blocks,
        attention_resolutions=tuple(height >> i for i in s.attention),
        use_scale_shift_norm=s.use_scale_shift_norm,
        resblock_updown=s.resblock_updown,
        learn_sigma=s.out != s.channels,
        **{name: told[name] for name in by_name},
    )
    return dict(
        settings=settings,
        shape=(s.channels, height, width),
        num_classes=max(s.labels - bool(told["null_label"]), 0),
        state=ours,
        facts=read_scheduler(path, scheduler),
        null_label=bool(told["null_label"]),
        rescale_timesteps=told["rescale_timesteps"],
        taken={k: told[k] for k in _of_layout(layout) if k not in of_file and k not in keywords},
    )


def _of_layout(layout):
    """Those of ARCHITECTURE that mean something for a layout of names."""
    return ARCHITECTURE if layout == "openai" else ARCHITECTURE[:-2]


def _typed(given, of_file, layout, path):
    """Keywords from a command line; BadInput for a typed one that the file tells, or that is 0."""
    found = {name: value for name, value in (given or {}).items() if name in ARCHITECTURE}
    if below := [name for name, value in found.items() if value < 0]:
        raise BadInput(f"{flag(below[0])} {found[below[0]]}: expected a number from 0 for {path}")
    for name in typed(found):
        own = of_file.get(name)
        same = name == "size" and found[name] in (own, min(own) if isinstance(own, tuple) else own)
        if name in of_file and not same or name not in _of_layout(layout):
            raise BadInput(f"{flag(name)}: {path} has its own; leave it out")
        if not found[name] and name in ("size", "norm_groups", "num_heads"):
            raise BadInput(f"{flag(name)} {found[name]}: expected a number from 1 for {path}")
    left = ("size", "norm_groups", "num_heads")  # where 0 of a YAML file means none
    return {k: v for k, v in found.items() if k not in of_file and (v or k not in left)}


def read_network(path, scripts=(), script="", given=None, flags=(), walk=None):
    """The state of a checkpoint, or of a published network in the form of one (see as_checkpoint).

    scripts: stem of the script that samples it, or several; any without. script: which one draws
    now, "" where nothing is drawn; given, flags, walk: as as_checkpoint has them. BadInput, naming
    the file, where another script does, where it is missing, where it is no such file, and for a
    typed setting that the file itself tells.
    """
    if is_published(path):
        state = as_checkpoint(path, script, given, flags, walk)
        scripts = [scripts] if isinstance(scripts, str) else scripts
        if scripts and state["script"] not in scripts:
            command = f"python {state['script']}.py --sample {path}"
            raise BadInput(f"{path} has more than the U-Net of DDPM's paper; type {command}")
    elif load_checkpoint(path, facts=True)["script"] == CLASSIFIERS:
        raise BadInput(told_classifier(path))
    else:
        state = load_checkpoint(path, scripts)
        # Where nothing is drawn, --size is about the data.
        _refuse([name for name in given or () if script or name != "size"], path)
    if state["config"].get("dynamic_threshold"):
        state["config"]["dynamic_threshold"] = does_threshold(path, script, walk)
    return state


def _refuse(names, path):
    """BadInput for those of the settings `names` that were typed."""
    for name in typed(names):
        raise BadInput(f"{flag(name)}: {path} has its own; leave it out")


def told_classifier(path):
    """What somebody hears who names a classifier where a diffusion network belongs."""
    command = f"python {CLASSIFIERS}.py --classifier {path}"
    return f"{path} is a classifier of noisy images, no diffusion network: type {command}"


def as_checkpoint(path, script="", given=None, flags=(), walk=None):
    """A published network in the form of a checkpoint of the chapter that has its U-Net.

    script   stem of the one that draws, "" where nothing is drawn: see samplers.check_drawn
    given    {name: value} of ARCHITECTURE and FORWARD that the command line gives by flags or
             --config, for what the files do not say
    flags    all of these settings that this command line has, by name
    walk     what it gives of checkpoints.WALK: see samplers.check_drawn

    A dictionary: script, config (the settings that the files say of the network, its schedule and
    its sampling, by the names of that chapter's Config; data is ""), shape, class_names, ema,
    settings, alpha_bar float64 (T,), null_label and time_scale, by which t is multiplied. Where
    there is no scheduler, it is Ho et al.'s: linear, T = 1000, eps. Printed lines say what was
    understood. BadInput for what cannot be drawn.
    """
    found = load_published(path, given=given, flags=flags)
    facts, settings = found["facts"], found["settings"]
    _check_groups(settings, path, "norm_groups" not in found["taken"], flags)
    forward = {name: value for name, value in (given or {}).items() if name in FORWARD}
    if facts:
        _refuse(forward, path)
        check_drawn(path, facts, script, walk)
    learned = settings["learn_sigma"]
    config, alpha_bar = config_of(path, facts, forward, learned, script, walk)
    if not facts:
        said = f"{name_of(config)}, T = {len(alpha_bar)}, predicting {config['prediction']}"
        said = said if not config["trained_betas"] else f"--trained-betas, {said}"
        other = _hint(path, ("schedule", "timesteps", "prediction"), flags)
        say_once(f"{path} has no scheduler: taken as {said}; where it has another, {other}")
    taken, rescales = found["taken"], found["rescale_timesteps"]
    if len(alpha_bar) == 1000:  # where t is what it would be
        taken.pop("rescale_timesteps", None)
        if typed(["rescale_timesteps"]):
            raise BadInput("--rescale-timesteps does nothing where --timesteps is 1000")
    if taken:
        size = "x".join(map(str, found["shape"][1:]))
        said = ", ".join(f"{k} {size if k == 'size' else v}" for k, v in taken.items())
        other = _hint(path, taken, flags)
        say_once(f"{path} does not say all of its form: taken as {said}; for others {other}")
    about = {"data": "", "class_cond": found["num_classes"] > 0, "ema": [0.9999]}
    return dict(
        script="ddpm_pixel" if is_plain(settings) else "improved_ddpm",
        config={**settings, **config, **about},
        shape=found["shape"],
        class_names=[str(i) for i in range(found["num_classes"])],
        ema=found["state"],
        settings=settings,
        alpha_bar=alpha_bar,
        null_label=found["null_label"],
        time_scale=1000 / len(alpha_bar) if rescales else 1.0,
    )


def _hint(path, names, flags, value=""):
    """What to type for the settings `names`: those among the flags that a script has, if any."""
    own = [name for name in names if name in flags]
    typed_as = ", ".join(flag(name) + value for name in own or names)
    return f"type {typed_as}" if own else publishing(path, typed_as)


def is_plain(settings):
    """Whether these settings of a U-Net are those of DDPM's paper, as ddpm_pixel.py has it."""
    more = ("use_scale_shift_norm", "resblock_updown", "learn_sigma", "num_head_channels")
    whole = all(m == int(m) for m in settings["channel_mult"])
    return settings["style"] == "ddpm" and whole and not any(settings[name] for name in more)


def settings_of(state):
    """What save_diffusers needs of the network in the state of a checkpoint.

    One of ddpm_pixel.py holds the settings of its run only.
    """
    if state.get("settings"):
        return state["settings"]
    config = state["config"]
    names = "model_channels channel_mult num_res_blocks attention_resolutions num_heads dropout"
    settings = {name: config[name] for name in names.split()}
    width = config["model_channels"]
    levels = [width * m for m in config["channel_mult"]]
    settings |= {"norm_groups": groups_for(width, levels, config["norm_groups"]), "style": "ddpm"}
    more = ("num_head_channels", "use_scale_shift_norm", "resblock_updown", "learn_sigma")
    return settings | dict.fromkeys(more, False)


def save_diffusers(folder, settings, state, shape, num_classes, facts):
    """Write a network as a diffusers pipeline: unet/, scheduler/, model_index.json.

    settings   of the network, as net.settings has them (norm_groups a number, not 0)
    facts      dict(alpha_bar float64 (T,), prediction "eps", "x0" or "v", variance "small" or
               "large", which a network with learned variance overrules, schedule: its name)
    DDPMPipeline.from_pretrained(folder) samples it if it has no labels (that pipeline knows none);
    UNet2DModel.from_pretrained(folder, subfolder="unet") reads all, num_classes meaning "no label".
    BadInput for what UNet2DModel cannot express; ValueError for a state of other settings.
    """
    height, mult = shape[1], settings["channel_mult"]
    levels = tuple(round(settings["model_channels"] * m) for m in mult)
    heights = settings["attention_resolutions"]
    attention = tuple(i for i in range(len(mult)) if height >> i in heights)
    if levels[0] != settings["model_channels"]:
        raise BadInput(
            f"UNet2DModel cannot express a first level of {levels[0]} channels beside "
            f"--model-channels {settings['model_channels']}: it takes one for the other"
        )
    head = settings["num_head_channels"] or None
    if not head and settings["num_heads"] > 1:
        heads = {levels[i] // settings["num_heads"] for i in (*attention, -1)}
        if len(heads) > 1:
            raise BadInput(
                f"UNet2DModel cannot express {settings['num_heads']} heads at levels of different "
                f"channels {levels}: it has one number of channels per head, --num-head-channels"
            )
        (head,) = heads
    outputs = shape[0] * (1 + settings["learn_sigma"])
    scale_shift, updown = settings["use_scale_shift_norm"], settings["resblock_updown"]
    labels = num_classes + 1
    s = Structure(
        settings["model_channels"],
        levels,
        settings["num_res_blocks"],
        attention,
        scale_shift,
        updown,
        shape[0],
        outputs,
        labels if num_classes else 0,
    )
    down, up = ("ResnetDownsample", "ResnetUpsample") if updown else ("Down", "Up")
    here = range(len(levels))
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": list(shape[1:]),
        "in_channels": shape[0],
        "out_channels": outputs,
        "time_embedding_type": "positional",
        "down_block_types": [f"{'AttnDown' if i in attention else down}Block2D" for i in here],
        "up_block_types": [f"{'AttnUp' if i in attention else up}Block2D" for i in here][::-1],
        "block_out_channels": levels,
        "layers_per_block": settings["num_res_blocks"],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "dropout": settings["dropout"],
        "act_fn": "silu",
        "attention_head_dim": head,
        "norm_num_groups": settings["norm_groups"],
        "attn_norm_num_groups": settings["norm_groups"],
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": labels if num_classes else None,
        "_null_label": bool(num_classes),
        **STYLES[settings["style"]],
    }
    folder = Path(folder)
    with atomic_write(folder / "unet" / WEIGHTS[0]) as temporary:
        weights = {name: value.cpu() for name, value in to_diffusers(state, s).items()}
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(folder / "unet" / "config.json", config)
    scheduler = scheduler_config(facts, settings["learn_sigma"])
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        name: ["diffusers", config["_class_name"]]
        for name, config in (("scheduler", scheduler), ("unet", config))
    }
    write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **index})


# --------------------------------------------------------------------------------------- settings


def channel_mult(s):
    """Channels of the levels in units of width, whole numbers where they are."""
    return tuple(c // s.width if c % s.width == 0 else c / s.width for c in s.levels)


def _image_size(size, s, path, flags):
    """(height, width); BadInput if unknown, or if the levels cannot halve it."""
    if not size:
        told = _hint(path, ("size",), flags, " 32 or another")
        raise BadInput(f"{path} does not tell its image size: {told}")
    height, width = (size, size) if isinstance(size, int) else size
    factor = 2 ** (len(s.levels) - 1)
    if height % factor or width % factor:
        raise BadInput(f"{path}: images of {height}x{width} cannot be halved to {factor} parts")
    return height, width


def _check_groups(settings, path, told_by_file, flags):
    """BadInput for groups of norms that no network here has."""
    groups, width = settings["norm_groups"], settings["model_channels"]
    levels = [round(width * m) for m in settings["channel_mult"]]
    if all(c % groups == 0 and c > groups for c in levels):
        return
    channels, config = f"the channels {levels} into two or more each", find_files(Path(path))[1]
    if told_by_file and config:
        told = "one channel a group is not supported: expected a number that divides"
        raise BadInput(f"{config}: norm_num_groups {groups}: {told} {channels}")
    told = _hint(path, ("norm_groups",), flags, " of another number")
    raise BadInput(f"{path}: --norm-groups {groups} must divide {channels}: {told}")


def published_defaults(layout, s):
    """What names and shapes do not tell, as it was in the published networks."""
    told = dict(size=SIZES.get(channel_mult(s)), norm_groups=32, dropout=0.0)
    told.update(num_heads=1, num_head_channels=0, style="ddpm", new_order=True, null_label=False)
    told.update(rescale_timesteps=layout == "openai" and not s.resblock_updown)
    if layout == "openai":
        told.update(style="adm", new_order=s.resblock_updown and told["size"] == 64)
        if s.resblock_updown and told["size"] != 128:
            told.update(num_head_channels=64)
        elif s.resblock_updown or s.use_scale_shift_norm:
            told.update(num_heads=4)
    return told
