"""Diffusion transformers that others published: their tensors in the names of dit.py's network.

    read_dit("DiT-XL-2-256x256.pt", ...)    the published names, which dit.py's modules bear
    read_dit("DiT-XL-2-256", ...)           a folder of diffusers' DiTPipeline or transformer

and what a pipeline's other files say: as_checkpoint. Weights are read as plain tensors
only: nothing in such a file is ever executed.
"""

from runtime.commandline import BadInput

import re
from collections import Counter
from pathlib import Path

import torch

from networks.published.files import (
    check_floats,
    find_weights,
    folder_of,
    read_json,
    read_weights,
    whole_number,
)
from networks.published.schedule import name_of, read_schedule
from networks.published.unet_names import joined, size_of

# diffusers' names of our parts: of a block, which keeps q, k and v apart,
BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.proj": ["attn1.to_out.0"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
# and of the rest. The embedders lie in every block once more, all the same.
EMBEDDERS = "transformer_blocks.0.norm1.emb"
REST = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": [f"{EMBEDDERS}.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": [f"{EMBEDDERS}.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": [f"{EMBEDDERS}.class_embedder.embedding_table"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}
# Tensors that each transformer has, in the published names and in diffusers'.
MARKS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
# Settings of diffusers that must have these values; they also are what a config.json leaves out.
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
PATCHES = (1, 2, 4, 8)  # sides of the published patches
SCALING = 0.18215  # of Stable Diffusion's latents: its autoencoder has 4 channels and factor 8


# --------------------------------------------------------------------------------- the transformer


def read_dit(path, sizes, positions, num_heads=None):
    """A published transformer: dict(shape, num_classes, settings, state).

    path       .pt or .safetensors in the published names; a checkpoint of the published training
               script, of which the mean of the weights ("ema") is taken; or a folder of diffusers'
               DiTTransformer2DModel, or of a DiTPipeline with transformer/ in it
    sizes      the published ones: (hidden_size, depth, num_heads) each
    positions  function of (hidden_size, rows, columns) -> the fixed position embeddings (1,N,D)
    num_heads  which no tensor shows: None takes config.json's, or the published number at this size
    shape      (C,h,w) of the latents; settings are keywords of dit.DiT; state is its state_dict in
               float32, as far as the file has it, with the position embeddings
    BadInput for files of anything else.

    The timestep's frequencies, 10000^-(i/128), and the epsilon of norms, 1e-6, are no part of a
    file. They are those of the published training, for a folder of diffusers too. diffusers itself
    computes with 10000^-(i/127), which moves its answers by some percent, and with 1e-5 in half of
    the norms, which is nothing.
    """
    path, config = Path(path), {}
    if path.is_dir():
        path = folder_of(path, "transformer_ema", "transformer")
        config = read_json(path / "config.json")
        path = find_weights(path)
    state, beside = read_weights(path, MARKS), path.with_name("config.json")
    if MARKS[1] in state:
        config = read_json(beside) if beside.is_file() else {}
        state = _from_diffusers(state, config, path)
    else:  # copied: the file, which is mapped, may change while the network lives
        check_floats(state, path)
        state = {name: value.to(torch.float32, copy=True) for name, value in state.items()}

    def size(key, axis):
        if key not in state or state[key].ndim <= axis:
            raise BadInput(f"{path} is no DiT in the published names: it has no {key}")
        return state[key].shape[axis]

    hidden_size, channels, patch_size = (size("x_embedder.proj.weight", i) for i in range(3))
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    known = {(width, blocks): heads for width, blocks, heads in sizes}
    told = whole_number(config, "num_attention_heads", beside)
    num_heads = num_heads or told or known.get((hidden_size, depth))
    if not num_heads:
        raise BadInput(
            f"{path} has hidden size {hidden_size} and depth {depth}, none of the published sizes: "
            "give the number of its attention heads, load_published(path, num_heads=...)"
        )
    if "pos_embed" in state:
        rows, columns = _grid(state["pos_embed"], hidden_size, positions, path)
    else:
        rows = columns = whole_number(config, "sample_size", beside, 32) // patch_size
    outputs = size("final_layer.linear.weight", 0)
    settings = dict(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        mlp_ratio=size("blocks.0.mlp.fc1.weight", 0) / hidden_size,
        learn_sigma=outputs == 2 * channels * patch_size**2,
    )
    return dict(
        shape=(channels, rows * patch_size, columns * patch_size),
        num_classes=size("y_embedder.embedding_table.weight", 0) - 1,
        settings=settings,
        state=state | {"pos_embed": positions(hidden_size, rows, columns)},
    )


def _from_diffusers(state, config, path):
    """The float32 state_dict in the published names of one in diffusers'."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise BadInput(f"{path}: {name} {config[name]!r} is not supported, only {value!r} is")
    depth = len({key.split(".")[1] for key in state if key.startswith("transformer_blocks.")})
    sources = dict(REST)
    for i in range(depth):
        for ours, theirs in BLOCK.items():
            sources[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{i}.{name}" for name in theirs]
    shapes = _shapes(state, path)
    table = [
        (f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs], shape if n else shape[:1])
        for ours, theirs in sources.items()
        for shape in [shapes[re.sub(r"^blocks\.\d+\.", "", ours)]]
        for n, kind in enumerate(("bias", "weight"))
        if n or ours != "y_embedder.embedding_table"
    ]
    known, kept = {name for _, theirs, _ in table for name in theirs}, dict(state)
    for key in state.keys() - known:
        value = kept.pop(key)
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb", EMBEDDERS, key)
        twin = state.get(first) if first != key else None
        same = twin is not None and (twin.shape, twin.dtype) == (value.shape, value.dtype)
        if not same or not (value.is_meta or torch.equal(twin, value)):
            raise BadInput(f"{path}: there is no place in a DiT for its tensor {key}")
    return joined(kept, table, path)


def _shapes(state, path):
    """Shapes of our parts' weights that a state_dict in diffusers' names tells."""

    def size(name, axis=0):
        what = "DiT of diffusers"
        return size_of(state, f"{name}.weight", axis, path, what)

    width, hidden = size("pos_embed.proj"), size("transformer_blocks.0.ff.net.0.proj")
    embedder = f"{EMBEDDERS}.timestep_embedder.linear_1"
    return {
        "adaLN_modulation.1": (6 * width, width),
        "attn.proj": (width, width),
        "attn.qkv": (3 * width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
        "x_embedder.proj": (width, *(size("pos_embed.proj", axis) for axis in (1, 2, 3))),
        "t_embedder.mlp.0": (width, size(embedder, 1)),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.embedding_table": (
            size(f"{EMBEDDERS}.class_embedder.embedding_table"),
            width,
        ),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (size("proj_out_2"), width),
    }


def _grid(pos_embed, hidden_size, positions, path):
    """(rows, columns) of the tokens with these position embeddings, a square grid first."""
    n = pos_embed.shape[1] if pos_embed.ndim == 3 else 0
    rows = [i for i in range(1, n + 1) if n % i == 0]
    for r in sorted(rows, key=lambda r: r * r != n):
        ours = positions(hidden_size, r, n // r)
        # Neighbours are 0.8 apart; what was kept in half precision is 0.004 off.
        if ours.shape == pos_embed.shape and (ours - pos_embed).abs().max() < 0.01:
            return r, n // r
    raise BadInput(f"{path}: its pos_embed is not the fixed one of a DiT of width {hidden_size}")


def check_state(expected, state, path):
    """BadInput where a state_dict lacks, adds or reshapes tensors of the `expected` one."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise BadInput(f"{path} lacks a tensor of a DiT like it: {name}")
        if name not in expected:
            raise BadInput(f"{path} has a tensor that a DiT like it has no place for: {name}")
        there, wanted = tuple(state[name].shape), tuple(expected[name].shape)
        if there != wanted:
            raise BadInput(f"{path}: {name} is {there}, expected {wanted}")


# --------------------------------------------------------------------- what the weights do not say


def as_checkpoint(path, net, sizes, ae, facts):
    """A published transformer and its autoencoder in the form of a checkpoint of dit.py.

    path, net     the published network's, as read; sizes: dit.SIZES, by their names
    ae, facts     its autoencoder, and what networks.kl_autoencoder.load_pretrained says of it
    Gives the checkpoint without script and config, settings of dit.Config for its config, and lines
    to print. BadInput for parts that do not fit each other.
    """
    settings, source, (channels, height, width) = net.settings, facts["source"], net.shape
    (scale, said), of = scaling_of(ae, facts), schedule_of(path)
    if channels != ae.z_channels:
        raise BadInput(
            f"{path} has latents of {channels} channels, {source} of {ae.z_channels}: name the "
            "autoencoder that it was trained with by --ae"
        )
    shape = [ae.channels, height * ae.factor, width * ae.factor]
    weights = net.state_dict()  # one set of tensors, which the file holds once
    state = {"step": 0, "settings": settings, "model": weights, "ema": weights, "shape": shape}
    state |= {"ae": ae.settings, "autoencoder": ae.state_dict(), "scale": scale}
    state |= {"class_names": label_names(path, net.null)}
    model, learned = model_name(settings, sizes, path), settings["learn_sigma"]
    values = of | dict(model=model, learn_sigma=learned, label_dropout=0.1, size=min(shape[1:]))
    values |= dict(ae=str(Path(source).resolve()))  # a path is never taken for one to be trained
    count = sum(p.numel() for p in net.parameters()) / 1e6
    why = "" if said else ", Stable Diffusion's, because its files do not say it"
    words = [
        f"{path}: {model}, {count:.1f} M parameters, latents {channels}x{height}x{width}, "
        f"{net.null} labels, variance {'learned' if learned else 'fixed'}",
        f"{of['schedule']} schedule, T = {of['timesteps']}, predicts {of['prediction']}; steps "
        "are those of --sampler, evenly spaced, whatever scheduler its files name",
        f"{source}: images {'x'.join(map(str, shape))}, scaling {scale:g}{why}",
    ]
    return state, values, words


def model_name(settings, sizes, path):
    """The name, such as "dit-xl/2", that dit.parse_size turns into these settings of a DiT.

    sizes: dit.SIZES. BadInput where there is none: only these can be sampled.
    """
    names = {numbers: name for name, numbers in sizes.items()}
    size = names.get(tuple(settings[key] for key in ("hidden_size", "depth", "num_heads")))
    if size is None or settings["patch_size"] not in PATCHES or settings["mlp_ratio"] != 4:
        found = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        raise BadInput(
            f"{path} is a DiT of no published size ({found}): expected one of "
            f"{', '.join(f'dit-{name}' for name in sizes)}, of patch "
            f"{', '.join(map(str, PATCHES))} and mlp_ratio 4"
        )
    return f"dit-{size}/{settings['patch_size']}"


def schedule_of(path):
    """dict(schedule, timesteps, prediction) that the network `path` was trained with.

    Those of scheduler/ in a folder of diffusers; else the published ones. The steps of the class
    named there are not taken: the sampler is dit.py's. BadInput for other schedules than DDPM's
    linear and IDDPM's cosine, other predictions than eps and v, and for clipped latents.
    """
    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return dict(schedule="linear", timesteps=1000, prediction="eps")
    facts, config = read_schedule(file, latents=True), read_json(file)
    prediction = facts["prediction"]
    for name in ("thresholding", "clip_sample"):
        if config.get(name):
            raise BadInput(
                f"{file}: {name} true is not supported: latents have no range; expected false"
            )
    if (noise := name_of(facts)) not in ("linear", "cosine") or prediction not in ("eps", "v"):
        raise BadInput(
            f"{file}: schedule {noise} and prediction {prediction}: expected "
            "DDPM's linear or IDDPM's cosine schedule, and eps or v"
        )
    return {name: facts[name] for name in ("schedule", "timesteps", "prediction")}


def label_names(path, count):
    """Names of the labels 0..count-1, all different; those without a name have their number.

    A folder of diffusers may have id2label in its model_index.json, where what follows a comma
    are other names of the same. A name of two labels gets the number behind it, and so does one
    that is a number itself: --classes takes both.
    """
    file = Path(path) / "model_index.json"
    found = read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(found, dict | None):
        raise BadInput(f"{file}: id2label must hold names by label, got a {type(found).__name__}")
    first = [str((found or {}).get(str(i), "")).split(",")[0].strip() for i in range(count)]
    shared = Counter(first)
    names = [
        f"{name} {i}".strip() if not name or shared[name] > 1 or name.isdecimal() else name
        for i, name in enumerate(first)
    ]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise BadInput(f"{file}: id2label gives {twice[0]!r} to two labels, once with its number")
    return names


def scaling_of(ae, facts):
    """(what latents of the autoencoder are multiplied by, whether its files say it).

    BadInput where they do not and it is not like Stable Diffusion's, and for a shift.
    """
    source, like_sd = facts["source"], (ae.z_channels, ae.factor) == (4, 8)
    if facts["shift"]:
        raise BadInput(
            f"{source} has latents shifted by {facts['shift']:g}, which latent chapters do not do; "
            "expected an autoencoder without a shift, such as sd-vae-ft-ema"
        )
    if facts["scaling"] is not None:
        return facts["scaling"], True
    if not like_sd:
        raise BadInput(
            f"{source} does not say what its latents are multiplied by: expected a config.json "
            "beside it with scaling_factor, as in a folder of diffusers"
        )
    return SCALING, False


def check_paths(path, ae, out):
    """BadInput where there is no `path`, or no autoencoder, and for an `out` that is in use.

    In use is a file, or a run trained here. ae: a path, or "" for vae/ in the folder `path`.
    """
    if not path.exists():
        raise BadInput(f"--published {path}: no such file or folder: name a published DiT's")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file: name a folder")
    if (out / "log.jsonl").exists():
        raise BadInput(f"--out {out} holds a run trained here, which would be lost: name another")
    if not ae and not (path / "vae").is_dir():
        raise BadInput(
            f"{path} brings no autoencoder: add --ae with its file or folder, such as sd-vae-ft-ema"
        )
