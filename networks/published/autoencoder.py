"""The files of autoencoders that others published, read as plain tensors: nothing is executed.

    a folder of diffusers       config.json and weights of AutoencoderKL or AutoencoderTiny; of a
                                whole pipeline its vae/ is taken
    a file of the LDM code      .ckpt, .pt or .safetensors with encoder.down.0.block.0...; of a
                                whole Stable Diffusion checkpoint its first_stage_model is taken
    the pair of files of TAESD  ..._encoder and ..._decoder, .pth or .safetensors: their folder, or
                                either of them

All are returned in the names of the code that the papers published, which kl_autoencoder.py's
modules carry.
"""

from runtime.commandline import BadInput
from runtime.files import is_number

import re
from pathlib import Path

import torch

from networks.published.files import (
    WEIGHTS,
    check_floats,
    folder_of,
    read_json,
    read_weights,
    weights_in,
)

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
SCALING = 0.18215  # of Stable Diffusion's latents: LDM appendix G
FIRST_STAGE = "first_stage_model."  # before an autoencoder's names in a whole checkpoint
HALF = re.compile("(?<!auto)encoder|decoder")
HALVES = ("0.weight", "1.weight")  # marks of the encoder and the decoder of TAESD's pair
MARKS = ("conv_in.weight", *HALVES, "layers.0.weight")
MARKS = tuple(f"{half}.{name}" for half in ("encoder", "decoder") for name in MARKS)
MARKS += tuple(FIRST_STAGE + name for name in MARKS)

# AutoencoderKL's names -> the LDM code's; both the present names of attention and those of 2022.
RENAMED = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", r".attn_1.norm."),
    (r"\.attn_1\.(?:to_q|query)\.", r".attn_1.q."),
    (r"\.attn_1\.(?:to_k|key)\.", r".attn_1.k."),
    (r"\.attn_1\.(?:to_v|value)\.", r".attn_1.v."),
    (r"\.attn_1\.(?:to_out\.0|proj_attn)\.", r".attn_1.proj_out."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
)

# Settings of a config.json that have no counterpart here, and the values that mean "not used".
FIXED = {
    "ldm": {
        "act_fn": ("silu", "swish"),
        "mid_block_add_attention": (True,),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "tiny": {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
    },
}
CLASSES = {"AutoencoderKL": "ldm", "AutoencoderTiny": "tiny"}


def read_autoencoder(path):
    """A published autoencoder: (settings, state, facts).

    path      a folder or a file, as above
    settings  keywords of KLVAE or TinyAutoencoder, read off names, shapes and config.json
    state     its state_dict, float32
    facts     dict(kind "ldm" or "tiny", source, scaling, shift), as load_pretrained has it
    BadInput for what is missing, damaged, half a pair, or another network.
    """
    path = Path(path)
    files, config = find_autoencoder(path)
    state = {}
    for file, half in files:
        with torch.device("cpu"):  # a plan on "meta" needs the number scale_factor, too
            found = read_weights(file, HALVES if half else MARKS)
        state.update({half + name: value for name, value in found.items()})
    whole = any(name.startswith(FIRST_STAGE) for name in state)
    # What lies beside a whole checkpoint is of something else.
    told = config if config and not whole else None
    config = read_json(told) if told else {}
    told = told or files[0][0]
    state, scale = autoencoder_part(state)
    kind = which(state, path)
    check_config(config, kind, told)
    state = tiny_names(state) if kind == "tiny" else ldm_names(state)
    check_floats(state, path)
    where = torch.get_default_device()
    state = {name: value.to(where, torch.float32, copy=True) for name, value in state.items()}
    try:
        settings = tiny_settings(state) if kind == "tiny" else kl_settings(state, config)
    except KeyError as error:
        raise BadInput(
            f"{path} lacks tensors of an autoencoder, first {error.args[0]} (as the papers' code "
            "names it): expected the whole file of encoder and decoder"
        ) from None
    if kind == "ldm":
        _check_groups(state, settings["norm_groups"], told)
    scaling, shift = published_scaling(kind, config, scale, told)
    return settings, state, dict(kind=kind, source=str(path), scaling=scaling, shift=shift)


# ---------------------------------------------------------------------------------------- the files


def find_autoencoder(path):
    """([(weight file, prefix of its names)], config.json or None) of what the user named."""
    if path.is_file():
        if not HALF.search(path.name):
            return [(path, "")], _config(path.parent)
        return _pair(path), None
    folder = folder_of(path, "vae")
    if whole := weights_in(folder, "diffusion_pytorch_model", index_first=True):
        return [(whole, "")], _config(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    encoders = [file for file in files if HALF.sub("decoder", file.name) != file.name]
    if len(encoders) == 1:
        return _pair(encoders[0]), None
    if len(files) == 1 and not HALF.search(files[0].name):
        return [(files[0], "")], _config(folder)
    if not files or not encoders:
        raise BadInput(
            f"{folder} holds no autoencoder: expected {WEIGHTS[0]}, or the two files of a tiny "
            "autoencoder, ..._encoder.pth and ..._decoder.pth"
        )
    raise BadInput(
        f"{folder} holds {len(encoders)} encoders: name the file of one, such as {encoders[0]}"
    )


def _config(folder):
    config = folder / "config.json"
    return config if config.is_file() else None


def _pair(file):
    """Both files of a tiny autoencoder, given either."""
    files = []
    for half in ("encoder", "decoder"):
        name = HALF.sub(half, file.name)
        if not file.with_name(name).is_file():
            raise BadInput(f"{file} is half of a tiny autoencoder: {name} is not beside it")
        files.append((file.with_name(name), half + "."))
    return files


# ------------------------------------------------------------------------------------- the networks


def autoencoder_part(state):
    """(the autoencoder's tensors, LDM's scale_factor or None) of a whole checkpoint or its own."""
    scale, n = state.get("scale_factor"), len(FIRST_STAGE)
    if any(name.startswith(FIRST_STAGE) for name in state):
        state = {k[n:]: value for k, value in state.items() if k.startswith(FIRST_STAGE)}
    else:  # beside an autoencoder, what LDM trained it with: discriminator and averaged weights
        state = {n: v for n, v in state.items() if not n.startswith(("loss.", "model_ema."))}
    return state, scale


def which(state, path):
    """ "ldm" or "tiny"; BadInput for the tensors of anything else."""
    if "quantize.embedding.weight" in state:
        raise BadInput(f"{path} has a codebook (a VQ autoencoder): only those with a KL are read")
    if any(re.match(r"(encoder|decoder)\.(layers\.)?\d+\.", name) for name in state):
        return "tiny"
    if any(re.match(r"(encoder\.down|decoder\.up)(_blocks)?\.\d+\.", name) for name in state):
        return "ldm"
    found = f"the first of its {len(state)} tensors is {min(state)}" if state else "it is empty"
    raise BadInput(
        f"{path} holds no autoencoder: {found}; expected encoder... and decoder... as in "
        "diffusers' AutoencoderKL, in the LDM code, or in TAESD's pair of files"
    )


def check_config(config, kind, path):
    """BadInput for a config.json of another network, or a setting without a counterpart here."""
    name = config.get("_class_name")
    if name and (not isinstance(name, str) or CLASSES.get(name) != kind):
        raise BadInput(f"{path} is of {name}: expected {' or '.join(CLASSES)}")
    groups = config.get("norm_num_groups", 32)
    if kind == "ldm" and (type(groups) is not int or groups < 1):
        raise BadInput(f"{path}: norm_num_groups {groups!r} must be a whole number above 0")
    for setting, values in FIXED[kind].items():
        if setting in config and config[setting] not in values:
            raise BadInput(
                f"{path}: {setting} {config[setting]!r} is not supported, only {values[0]!r} is"
            )


def tiny_names(state):
    """AutoencoderTiny's names -> TAESD's, where the decoder's first layer is the clamp."""
    names = {}
    for name, value in state.items():
        match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
        if match:
            half, i, rest = match.groups()
            name = f"{half}.{int(i) + (half == 'decoder')}.{rest}"
        names[name] = value
    return names


def ldm_names(state):
    """AutoencoderKL's names -> the LDM code's. Its levels of the decoder count the other way."""
    ups = [re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in state]
    last = max((int(match[1]) for match in ups if match), default=0)
    names = {}
    for name, value in state.items():
        name = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up_blocks.{last - int(m[1])}", name)
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        # Its attention is of linear layers: (c_out, c_in) for a convolution's (c_out, c_in, 1, 1).
        linear = value.ndim == 2 and ".attn_1." in name
        names[name] = value[:, :, None, None] if linear else value
    return names


def tiny_settings(state):
    """Keywords of TinyAutoencoder. A level ends at a convolution that is in no block."""
    layers, (width, channels) = {}, (_length(state, "encoder.0.weight", axis) for axis in (0, 1))
    for name in state:
        match = re.match(r"encoder\.(\d+)\.(conv\.)?", name)
        if match:
            layers[int(match[1])] = bool(match[2]) or layers.get(int(match[1]), False)
    blocks = [0]
    for i in range(1, max(layers)):
        if layers.get(i):
            blocks[-1] += 1
        else:
            blocks.append(0)
    return dict(
        z_channels=_length(state, f"encoder.{max(layers)}.weight", 0),
        channels=channels,
        model_channels=width,
        num_blocks=tuple(blocks),
        pooled=any(".pool." in name for name in state),
    )


def kl_settings(state, config):
    """Keywords of KLVAE. The groups are not seen in a tensor: config.json's, or 32."""
    conv, levels, blocks = "encoder.down.{}.block.{}.conv1.weight", [], 1
    channels, width = (_length(state, "encoder.conv_in.weight", axis) for axis in (1, 0))
    while conv.format(len(levels), 0) in state:
        levels.append(_length(state, conv.format(len(levels), 0), 0))
    while conv.format(0, blocks) in state:
        blocks += 1
    if not levels:
        raise KeyError(conv.format(0, 0))
    return dict(
        channels=channels,
        model_channels=width,
        num_res_blocks=blocks,
        channel_mult=tuple(c / width for c in levels),
        z_channels=_length(state, "decoder.conv_in.weight", 1),
        norm_groups=config.get("norm_num_groups", 32),
        quant="quant_conv.weight" in state,
    )


def _length(state, name, axis):
    """The length of a tensor along an axis, above 0; KeyError where there is none."""
    if name not in state or state[name].ndim <= axis or not state[name].shape[axis]:
        raise KeyError(name)
    return state[name].shape[axis]


def _check_groups(state, groups, path):
    """BadInput for norms whose channels these groups do not divide."""
    norms = (v for name, v in state.items() if re.search(r"norm\w*\.weight$", name))
    wide = {len(value) for value in norms if value.ndim}
    if any(c % groups for c in wide):
        raise BadInput(
            f"{path}: {groups} norm groups do not divide the autoencoder's channels "
            f"{sorted(wide)}: expected norm_num_groups of its config.json to do so, or 32 to do it"
        )


def published_scaling(kind, config, scale, path):
    """(scaling, shift), or (None, None) where nothing says them.

    A config.json that leaves them out means the class's defaults, Stable Diffusion's 0.18215.
    BadInput for what is no finite number, and for a scaling that is not above 0.
    """
    if config:
        scaling, shift = config.get("scaling_factor"), config.get("shift_factor")
        scaling = (1.0 if kind == "tiny" else SCALING) if scaling is None else scaling
        shift = 0.0 if shift is None else shift
        if not _is_scale(scaling) or scaling <= 0:
            raise BadInput(f"{path}: scaling_factor {scaling!r} must be a number above 0")
        if not _is_scale(shift):
            raise BadInput(f"{path}: shift_factor {shift!r} must be a number")
        return scaling, shift
    if kind == "tiny":
        return 1.0, 0.0  # distilled to latents that were scaled before
    if scale is None:
        return None, None
    scaling = scale.item() if scale.numel() == 1 else scale.tolist()
    if not _is_scale(scaling) or scaling <= 0:
        raise BadInput(f"{path}: scale_factor {str(scaling)[:60]} must be one number above 0")
    return float(scaling), 0.0


def _is_scale(value):
    return is_number(value) and abs(value) < 1e30
