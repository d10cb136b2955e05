"""CLIP text encoders that others published, read into networks.clip_text.CLIPText.

    a folder of transformers   config.json and weights of CLIPTextModel; of a whole pipeline of
                               diffusers its text_encoder/ is taken
    one file                   .safetensors, .ckpt or .pt: a whole Stable Diffusion 1 checkpoint in
                               CompVis's names (cond_stage_model.transformer...), or the encoder
                               alone, whose config.json beside it is read

transformers before 5 put "text_model." before its names, with or without which they are read.
Weights are read as plain tensors only: nothing in such a file is ever executed.
"""

from runtime.commandline import BadInput

from pathlib import Path

from networks.published.files import folder_of, read_json, read_weights, weights_in
from networks.published.unet_names import joined

COMPVIS = "cond_stage_model.transformer."  # before the encoder's names in a whole checkpoint
XL = "conditioner.embedders.0."
LAYER = "encoder.layers."
OUTER = (  # ours, theirs
    ("token", "embeddings.token_embedding"),
    ("position", "embeddings.position_embedding"),
    ("norm", "final_layer_norm"),
)
MARKS = tuple(  # of what is read, and of what is told from it
    f"{start}embeddings.token_embedding.weight"
    for known in ("", COMPVIS, XL, f"{XL}transformer.")
    for start in (known, f"{known}text_model.")
)
INNER = (  # ours, theirs of a layer (several are joined along their first axis)
    ("norm1", ("layer_norm1",)),
    ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attention.proj", ("self_attn.out_proj",)),
    ("norm2", ("layer_norm2",)),
    ("mlp.widen", ("mlp.fc1",)),
    ("mlp.narrow", ("mlp.fc2",)),
)
# The numbers 0, 1, 2 ..., which need no file, and what follows the last hidden state.
IGNORED = ("embeddings.position_ids", "text_projection.weight")
SIZES = {  # what config.json calls the sizes that the tensors show
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "intermediate_size": "hidden",
    "max_position_embeddings": "length",
}
# Encoders that look like this one. OpenCLIP's have gelu, which no tensor shows, and other widths.
OPENCLIP = "OpenCLIP text encoder of Stable Diffusion 2.x or XL"
OTHERS = (
    ("cond_stage_model.model.", OPENCLIP),
    ("conditioner.embedders.", "pair of text encoders of Stable Diffusion XL"),
)
OPENCLIP_WIDTHS = (1024, 1280)
EXPECTED = "expected that of Stable Diffusion 1.x, CLIP ViT-L/14"


def read_clip_text(path):
    """A published text encoder: (settings, state).

    path      a folder or a file, as above
    settings  keywords of CLIPText, read off the tensors and config.json; what no tensor shows and
              no config.json says is heads of 64 channels and an eps of 1e-5
    state     its state_dict, float32
    BadInput for what is missing, damaged, another text encoder or no text encoder.
    """
    weights, config = find_text_encoder(Path(path))
    state = read_weights(weights, MARKS)
    for prefix, name in OTHERS:
        if any(key.startswith(prefix) for key in state):
            raise BadInput(f"{weights} holds the {name}: {EXPECTED}")
    if any(key.startswith(COMPVIS) for key in state):
        config = None  # what lies beside a whole checkpoint is of something else
    state = part(part(state, COMPVIS), "text_model.")
    state = {name: value for name, value in state.items() if name not in IGNORED}
    settings = sizes(state, weights)
    if config:
        settings |= told(read_json(config), settings, config)
    elif settings["width"] in OPENCLIP_WIDTHS:
        raise BadInput(f"{weights} holds the {OPENCLIP}, {settings['width']} wide: {EXPECTED}")
    elif settings["width"] % 64:
        raise BadInput(
            f"{weights} is {settings['width']} wide, which heads of 64 channels do not divide: "
            "expected a config.json beside it that says num_attention_heads"
        )
    return settings, joined(state, rows(settings), weights)


def find_text_encoder(path):
    """(weights, config.json or None) of what the user named."""
    if path.is_dir():
        if (path / "text_encoder_2").is_dir():
            raise BadInput(
                f"{path} holds several text encoders, as Stable Diffusion XL: {EXPECTED}"
            )
        folder = folder_of(path, "text_encoder")
        # As transformers does, a whole file is taken before an index.
        weights = weights_in(folder, "model|pytorch_model", index_first=False)
        if weights is None:
            wanted = "model.safetensors or pytorch_model.bin in it"
            wanted += " or in its text_encoder/" if folder == path else ""
            raise BadInput(f"{folder} holds no text encoder: expected {wanted}")
    elif path.is_file():
        weights = path
    else:
        raise BadInput(f"{path}: no such file or folder: name a text encoder's")
    config = weights.with_name("config.json")
    return weights, config if config.is_file() else None


def part(state, prefix):
    """The tensors whose names begin so, without it; all of them where none does."""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return found or state


# -------------------------------------------------------------------------------- names and shapes


def rows(settings):
    """(our name, their names without any prefix, shape) of every tensor of CLIPText(**settings)."""
    width, hidden = settings["width"], settings["hidden"]
    shapes = {
        "token": (settings["vocab_size"], width),
        "position": (settings["length"], width),
        "norm": (width,),
        "norm1": (width,),
        "attention.qkv": (3 * width, width),
        "attention.proj": (width, width),
        "norm2": (width,),
        "mlp.widen": (hidden, width),
        "mlp.narrow": (width, hidden),
    }
    for ours, theirs in OUTER:
        yield f"{ours}.weight", [f"{theirs}.weight"], shapes[ours]
    yield "norm.bias", ["final_layer_norm.bias"], shapes["norm"]
    for i in range(settings["layers"]):
        for ours, theirs in INNER:
            names = [f"{LAYER}{i}.{name}" for name in theirs]
            yield f"blocks.{i}.{ours}.weight", [f"{n}.weight" for n in names], shapes[ours]
            yield f"blocks.{i}.{ours}.bias", [f"{n}.bias" for n in names], shapes[ours][:1]


def sizes(state, path):
    """Keywords of CLIPText that the tensors show; BadInput where they are of something else."""
    names = [f"{theirs}.weight" for _, theirs in OUTER[:2]] + [f"{LAYER}0.mlp.fc1.weight"]
    if not any(name in state for name in names):
        found = f"the first of its {len(state)} tensors is {min(state)}" if state else "it is empty"
        raise BadInput(
            f"{path} holds no text encoder: {found}; expected {COMPVIS}text_model... as in Stable "
            "Diffusion 1.x, or text_model... as in transformers' CLIPTextModel"
        )
    for name in names:
        if name not in state or state[name].ndim != 2:
            raise BadInput(f"{path} lacks a matrix of its text encoder, {name}")
    (vocab_size, width), (length, _), (hidden, _) = (state[name].shape for name in names)
    return dict(
        vocab_size=vocab_size,
        width=width,
        layers=len({name.split(".")[2] for name in state if name.startswith(LAYER)}),
        heads=width // 64,
        hidden=hidden,
        length=length,
        eps=1e-5,
    )


def told(config, settings, path):
    """The keywords that a config.json of CLIPTextModel tells: heads and eps.

    BadInput for that of another network, and where it contradicts what the tensors show.
    """
    kind = config.get("model_type", config.get("_class_name"))
    if kind != "clip_text_model":
        raise BadInput(f"{path}: model_type is {kind!r}, expected 'clip_text_model'")
    activation, width = config.get("hidden_act", "quick_gelu"), settings["width"]
    if activation == "gelu" or width in OPENCLIP_WIDTHS:
        raise BadInput(
            f"{path} is of the {OPENCLIP}, {width} wide with hidden_act {activation!r}: {EXPECTED}"
        )
    if activation != "quick_gelu":
        raise BadInput(f"{path}: hidden_act {activation!r} is not supported, only 'quick_gelu' is")
    for name, ours in SIZES.items():
        if config.get(name, settings[ours]) != settings[ours]:
            raise BadInput(
                f"{path}: {name} {config[name]!r} is not that of the tensors beside it, "
                f"{settings[ours]}"
            )
    heads = config.get("num_attention_heads", width // 64)
    if type(heads) is not int or heads < 1 or width % heads:
        raise BadInput(f"{path}: num_attention_heads {heads!r} must be a divisor of {width}")
    eps = config.get("layer_norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise BadInput(f"{path}: layer_norm_eps {eps!r} must be a number from 0 to 1")
    return dict(heads=heads, eps=eps)
