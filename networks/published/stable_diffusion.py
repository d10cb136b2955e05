"""Stable Diffusion 1 in the files that others published: all its parts, and what draws a tiny one.

    read_pipeline("stable-diffusion-v1-5")      a folder of diffusers: unet/, vae/, text_encoder/,
                                                tokenizer/ and scheduler/
    read_pipeline("v1-5-pruned-emaonly.safetensors", "bpe_simple_vocab_16e6.txt.gz")
                                                one file in CompVis's names, .safetensors or .ckpt,
                                                which has no tokenizer
    write_weights("m.safetensors", unet, text, ae), write_vocabulary("m.txt.gz", words)
                                                writes such files
    write_tiny("folder")                        does that with random weights

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022
(arXiv:2112.10752). Its parts are read by sd_unet.py, clip_text.py and autoencoder.py beside this.
Weights are read as plain tensors only: nothing in such a file is ever executed.
"""

from runtime.commandline import BadInput
from runtime.files import atomic_write
from runtime.processes import say_once

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from networks.clip_text import CLIPText
from networks.clip_tokens import SPECIAL, Tokenizer
from networks.kl_autoencoder import KLVAE
from networks.published.autoencoder import FIRST_STAGE, SCALING, read_autoencoder
from networks.published.clip_text import COMPVIS as TEXT
from networks.published.clip_text import MARKS as TEXT_MARKS
from networks.published.clip_text import read_clip_text
from networks.published.clip_text import rows as text_rows
from networks.published.files import U_NET, find_files, folder_of, read_json, read_weights
from networks.published.schedule import read_schedule
from networks.published.sd_unet import COMPVIS as UNET
from networks.published.sd_unet import load_latent_unet, rows
from networks.published.unet_names import Structure
from networks.sd_unet import LatentUNet

FOLDERS = ("unet", "vae", "text_encoder", "tokenizer")
PARTS = {UNET: "U-Net", TEXT: "text encoder", FIRST_STAGE: "autoencoder"}
MARKS = (UNET + U_NET[0], *(mark for mark in TEXT_MARKS if mark.startswith(TEXT)))
MARKS += tuple(f"{FIRST_STAGE}{half}.conv_in.weight" for half in ("encoder", "decoder"))
EXPECTED = "expected all of Stable Diffusion 1.x: U-Net, text encoder and autoencoder"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz, or a folder of vocab.json and merges.txt"
OTHER_MODELS = {  # how tensors of other models begin
    "conditioner.embedders.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX.1",
}
ALONE = {  # how the tensors of a file begin that holds something else
    "special_care_embeds": "a safety checker",
    "vision_model.": "an image encoder",
    "lora_": "a LoRA",
    "control": "a ControlNet",
    "input_blocks.": "a U-Net",
    "down_blocks.": "a U-Net",
    "text_model.": "a text encoder",
    "encoder.layers.": "a text encoder",
    "encoder.": "an autoencoder",
    "decoder.": "an autoencoder",
}


class Published(NamedTuple):
    """The parts of Stable Diffusion, and where its timesteps lie."""

    unet: dict  # as load_latent_unet returns it
    text: tuple[dict, dict]  # keywords of CLIPText and its float32 state_dict
    autoencoder: tuple[dict, dict, dict]  # as read_autoencoder returns it, always with a scaling
    tokenizer: Tokenizer
    alpha_bar: torch.Tensor  # float64 (T,)
    spacing: str  # "leading", "trailing", "linear", or "" where the files do not say
    steps_offset: int  # added to the timesteps of "leading"
    set_alpha_to_one: bool  # the last step ends at alpha_bar = 1, not at alpha_bar_0


def read_pipeline(path, vocabulary=""):
    """Stable Diffusion 1.x from `path`, a folder or a file as above: a Published.

    vocabulary   a file or folder that the tokenizer is read from. One file needs it, and it wins
                 over a folder's own

    A folder without a scheduler, and one file, have CompVis's: sqrt(beta) from sqrt(0.00085) to
    sqrt(0.012) in 1000 steps, timesteps 1, 1 + c, ..., and the last step ends at alpha_bar_0. One
    file may bring other alpha_bar, as alphas_cumprod. Of a scheduler_config.json the noise and the
    places of the timesteps are obeyed. The class it names is not: the sampler is the caller's.
    As in diffusers' StableDiffusionPipeline, steps_offset 0 (what a class has when nobody set it)
    means 1.

    One printed line says what the schedule is understood as, and whether running means are taken.

    BadInput, one line, for parts that are missing, torn or do not fit each other, for other models
    (Stable Diffusion 2, XL, 3, FLUX.1, inpainting, depth), and for v-prediction.
    """
    path, steps, scheduler = Path(path), ("leading", 1, False), None
    with torch.device("cpu"):  # a plan on "meta" has shapes for weights, but the schedule itself
        if path.is_dir():
            _check_folder(folder_of(path), vocabulary)
            scheduler = find_files(path)[2]
            alpha_bar = published_alpha_bar()
            if scheduler:
                alpha_bar, *steps = _steps_of(scheduler)
        else:
            alpha_bar = _alpha_bar_of(path)
    if not vocabulary and path.is_file():
        raise BadInput(
            f"{path} has no tokenizer, as no single file has: add --vocabulary {VOCABULARY}"
        )
    tokenizer = _tokenizer_of(path, vocabulary)
    text, unet = read_clip_text(path), load_latent_unet(path)
    settings, state, facts = read_autoencoder(path)
    _check_fit(path, unet, text[0], settings, facts, tokenizer)
    # One file need not say its scaling.
    facts |= dict(scaling=SCALING if facts["scaling"] is None else facts["scaling"], shift=0.0)
    means = "; the U-Net's running means are taken" if unet["averaged"] else ""
    if torch.get_default_device().type != "meta":
        say_once(f"schedule: {_told(alpha_bar, *steps, scheduler)}{means}")
    return Published(unet, text, (settings, state, facts), tokenizer, alpha_bar, *steps)


def published_alpha_bar():
    """alpha_bar_t float64 (1000,) of Stable Diffusion: sqrt(beta_t) rises linearly."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - beta).cumprod(0)


# ------------------------------------------------------------------------------------- the parts


def _check_folder(path, vocabulary):
    """BadInput for a folder that is no whole pipeline, with what it is."""
    missing = [name for name in FOLDERS if not (path / name).is_dir()]
    if vocabulary and "tokenizer" in missing:
        missing.remove("tokenizer")
    if (path / "text_encoder_2").is_dir():
        raise BadInput(f"{path} is Stable Diffusion XL or later: {EXPECTED}")
    if not missing:
        return
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".ckpt")]
    config = path / "config.json"
    hint = f"; or name the file {files[0]}" if files else ""
    if config.is_file():
        hint = f"; its config.json is of {read_json(config).get('_class_name', 'another model')}"
    raise BadInput(
        f"{path} has no {' and no '.join(f'{name}/' for name in missing)}: expected a pipeline of "
        f"diffusers, a folder with {', '.join(f'{name}/' for name in FOLDERS)}{hint}"
    )


def _check_names(state, path):
    """BadInput for a file that is not all of Stable Diffusion 1, with what it is."""
    for prefix, name in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in state):
            raise BadInput(f"{path} is {name}: {EXPECTED}")
    if "v_pred" in state:
        raise BadInput(f"{path} predicts v, not the noise (it holds v_pred): {EXPECTED}")
    lacks = [name for part, name in PARTS.items() if not any(k.startswith(part) for k in state)]
    if len(lacks) == len(PARTS):
        kinds = (kind for start, kind in ALONE.items() if any(k.startswith(start) for k in state))
        if not state:
            raise BadInput(f"{path} holds no tensors: {EXPECTED}")
        first = f"{min(state)} and others"
        raise BadInput(f"{path} holds only {next(kinds, first)}: {EXPECTED}")
    if lacks:
        raise BadInput(f"{path} holds no {' and no '.join(lacks)}: {EXPECTED}")


def _tokenizer_of(path, vocabulary):
    """The Tokenizer of the vocabulary, or of the folder `path` without one."""
    if vocabulary:
        source = Path(vocabulary)
        return Tokenizer.of_folder(source) if source.is_dir() else Tokenizer.of_file(source)
    folder = path / "tokenizer"
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        padding = read_json(file).get("pad_token") if file.is_file() else None
        padding = padding.get("content") if isinstance(padding, dict) else padding
        if padding not in (None, SPECIAL[1]):
            raise BadInput(
                f"{file}: prompts are padded with {padding!r}, expected {SPECIAL[1]!r}: '!' is of "
                "Stable Diffusion 2.x"
            )
    return Tokenizer.of_folder(folder)


def _check_fit(path, unet, text, autoencoder, facts, tokenizer):
    """BadInput for parts, given by their settings, that are not of one model."""
    context, width = unet["settings"]["context_dim"], text["width"]
    if context != width:
        whose = ", as Stable Diffusion 2's" if context == 1024 else ""
        raise BadInput(
            f"{path}: its U-Net reads a context {context} wide{whose}, but its text encoder makes "
            f"one {width} wide: these are parts of two models"
        )
    if autoencoder["z_channels"] != unet["channels"]:
        raise BadInput(
            f"{path}: its autoencoder has latents of {autoencoder['z_channels']} channels, its "
            f"U-Net of {unet['channels']}: these are parts of two models"
        )
    if facts["shift"]:
        raise BadInput(f"{path}: its autoencoder shifts latents by {facts['shift']:g}, expected 0")
    if len(tokenizer) != text["vocab_size"]:
        raise BadInput(
            f"{path}: its text encoder knows {text['vocab_size']} tokens, the vocabulary has "
            f"{len(tokenizer)}: expected {VOCABULARY} of its own model; tokens that were added are "
            "in its added_tokens.json"
        )
    groups, levels = unet["settings"]["norm_groups"], unet["settings"]["channel_mult"]
    levels = sorted({round(unet["settings"]["model_channels"] * mult) for mult in levels})
    if any(c % groups for c in levels):  # of no config.json
        raise BadInput(
            f"{path}: its U-Net's channels {levels} are no multiples of {groups}, the groups of "
            "every published norm"
        )


# ----------------------------------------------------------------------------------- the schedule


def _alpha_bar_of(path):
    """alpha_bar float64 (T,) of one file, which is read for it and all its names, and let go."""
    state = read_weights(path, MARKS)
    _check_names(state, path)
    ours, told = published_alpha_bar(), state.get("alphas_cumprod")
    if told is None:
        return ours
    # Files in half precision have rounded it, too; the network was trained with exact numbers.
    same = told.shape == ours.shape and told.is_floating_point()
    if same and ((told - ours).abs() <= torch.finfo(told.dtype).eps * ours).all():
        return ours
    return _falling(told.double(), f"{path}: alphas_cumprod")


def _falling(alpha_bar, where):
    """alpha_bar; BadInput unless it falls from below 1 to above 0."""
    whole = alpha_bar.ndim == 1 and len(alpha_bar) and 0 < alpha_bar[-1] <= alpha_bar[0] < 1
    if not whole or not (alpha_bar.diff() < 0).all():
        raise BadInput(f"{where} is no schedule: expected a row that falls from below 1 to above 0")
    return alpha_bar


def _steps_of(path):
    """(alpha_bar, spacing, steps_offset, set_alpha_to_one) of a scheduler_config.json."""
    config, facts = read_json(path), read_schedule(path, latents=True)
    if config.get("thresholding"):  # of latents, which have no range
        raise BadInput(f"{path}: thresholding True is not supported, expected False")
    alpha_bar = _falling(facts["alpha_bar"], path)
    if facts["prediction"] != "eps":
        said = config.get("prediction_type")
        whose = ", as networks of Stable Diffusion 2 do" if said == "v_prediction" else ""
        raise BadInput(
            f"{path}: the network predicts {said!r}{whose}, expected 'epsilon', as Stable "
            "Diffusion 1.x does"
        )
    spacing = facts["spacing"] if config.get("timestep_spacing") else ""
    offset = config.get("steps_offset") or 1
    if not 0 < offset < len(alpha_bar):
        raise BadInput(f"{path}: steps_offset {offset!r} must be a small whole number, such as 1")
    # What DDIMScheduler and the others mean where they do not say it.
    to_one = config.get("set_alpha_to_one", config.get("_class_name") == "DDIMScheduler")
    return alpha_bar, spacing, offset, bool(to_one)


def _told(alpha_bar, spacing, offset, to_one, scheduler):
    """The schedule in a few words; scheduler: the file that it is of, if not of the weights'."""
    kind, own = "the weights' own alphas_cumprod", published_alpha_bar()
    if alpha_bar.shape == own.shape and torch.allclose(alpha_bar, own, rtol=1e-9, atol=0):
        kind = "Stable Diffusion's"
    elif scheduler:
        config = read_json(scheduler)
        named = config.get("beta_schedule", "linear")
        kind = named if config.get("trained_betas") is None else "trained_betas"
    where = f"timesteps {spacing or 'as the sampler has them'}, offset {offset}"
    return f"T {len(alpha_bar)}, {kind}, {where}{', to alpha_bar 1' if to_one else ''}"


# ------------------------------------------------------------------------------- writing such files


def write_weights(path, unet, text, ae, scale=None):
    """One file of a LatentUNet without labels, a CLIPText and a KLVAE, in CompVis's names, float16.

    scale is what the autoencoder's latents are multiplied by, if not by Stable Diffusion's 0.18215.
    Numbers that names and shapes do not tell will be read as the published ones: 32 groups in every
    norm, 8 heads in the U-Net, heads of 64 channels in the text encoder.
    """
    s, channels = unet.settings, unet.conv_in.in_channels
    levels = tuple(round(s["model_channels"] * m) for m in s["channel_mult"])
    told = (s["num_res_blocks"], s["attention_levels"], False, False, channels, channels, 0)
    structure = Structure(s["model_channels"], levels, *told)
    table = rows(structure, "openai", s["transformer_depth"], s["context_dim"])
    found = _renamed(unet, table, UNET) | _renamed(ae, None, FIRST_STAGE)
    found |= _renamed(text, text_rows(text.settings), f"{TEXT}text_model.")
    state = {"alphas_cumprod": published_alpha_bar().float()}
    state |= {} if scale is None else {"scale_factor": torch.tensor(scale)}
    state[f"{TEXT}text_model.embeddings.position_ids"] = torch.arange(text.settings["length"])[None]
    for name, value in found.items():  # around a transformer there are convolutions of size 1
        around = value.ndim == 2 and name.endswith(("proj_in.weight", "proj_out.weight"))
        state[name] = (value[:, :, None, None] if around else value).half().contiguous()
    with atomic_write(path) as temporary:
        save_file(state, temporary)


def _renamed(net, table, prefix):
    """The tensors of net by the names of a table of (our name, their names, shape), if any."""
    state = net.state_dict()
    table = [(name, [name], None) for name in state] if table is None else table
    return {
        prefix + name: part
        for ours, names, _ in table
        for name, part in zip(names, state[ours].chunk(len(names)), strict=True)
    }


def write_vocabulary(path, words):
    """A list of merges, .txt.gz as CLIP's, that makes one token of each of these words."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in _merges(words)), ""]
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def _merges(words):
    """Pairs of symbols, in order, after which each of these words is one token."""
    tokenizer = Tokenizer({token: i for i, token in enumerate(SPECIAL)}, [])
    for word in words:  # what an earlier word has joined, such as the "re" of "red", stays joined
        first, *rest = tokenizer.join(word)
        for symbol in rest:
            tokenizer.ranks[first, symbol] = len(tokenizer.ranks)
            first += symbol
    return list(tokenizer.ranks)


# ---------------------------------------------------------------------------------- random weights

TINY_WORDS = "a photo painting of the red green blue cat dog house tree on in and hill sea sky"
TINY_TEXT = dict(width=64, layers=2, hidden=256, length=77)
TINY_UNET = dict(model_channels=64, channel_mult=(1, 1), num_res_blocks=1, attention_levels=(0,))
TINY_AE = dict(model_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=32)


def write_tiny(folder, seed=0):
    """A Stable Diffusion of random weights in `folder`, as the published files are: two paths.

    tiny.safetensors         4 MB in CompVis's names and float16: a U-Net of two levels, a text
                             encoder of two layers, an autoencoder of factor 8
    tiny-vocabulary.txt.gz   a list of merges that makes whole words of TINY_WORDS and pairs of
                             letters of other words

    What the U-Net makes of noise has unit variance, what the autoencoder makes of latents 0.5 of
    it, so that pictures are not flat; they show nothing.
    """
    weights = Path(folder) / "tiny.safetensors"
    vocabulary = weights.with_name("tiny-vocabulary.txt.gz")
    write_vocabulary(vocabulary, TINY_WORDS.split())
    count = len(Tokenizer.of_file(vocabulary))
    text = _network(CLIPText(count, heads=1, **TINY_TEXT), seed)
    write_weights(weights, _unet(seed + 1), text, _autoencoder(seed + 2))
    return weights, vocabulary


def _random(shapes, seed):
    """{name: tensor} of these shapes: none is zero, and none makes what it sees grow."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            embedding = name in ("token.weight", "position.weight")
            state[name] = value if embedding else value / value[0].numel() ** 0.5
        else:  # a bias, or the weight of a norm
            state[name] = 0.1 * value + name.endswith("weight")
    return state


def _network(net, seed):
    """`net` with random weights, in eval mode."""
    net.load_state_dict(_random({k: v.shape for k, v in net.state_dict().items()}, seed))
    return net.eval().requires_grad_(False)


def _unet(seed):
    context_dim = TINY_TEXT["width"]
    net = LatentUNet(4, None, **TINY_UNET, num_heads=8, context_dim=context_dim, norm_groups=32)
    _network(net, seed)
    # Most of what it makes is its input, as in a trained one: each channel of z goes around the
    # rest through two channels of the last norm, +z and -z, whose SiLUs differ by z.
    for i in range(4):
        net.conv_in.weight[i, i, 1, 1] += 1
        for channel, sign in ((2 * i, 1), (2 * i + 1, -1)):
            net.up[-1][0].skip.weight[channel, -net.conv_in.out_channels + i] += 4 * sign
            net.conv_out.weight[i, channel, 1, 1] += 2 * sign
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 4, 8, 8, generator=generator)
    context = torch.randn(4, 77, context_dim, generator=generator)
    _divide(net.conv_out, net(z, torch.tensor([1, 300, 600, 999]), context=context).std())
    return net


def _autoencoder(seed):
    ae, generator = _network(KLVAE(**TINY_AE), seed), torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(2, 3, 8, 8, generator=generator), scale_factor=8).clamp(-1, 1)
    z = torch.randn(2, 4, 8, 8, generator=generator) / SCALING
    _divide(ae.quant_conv, SCALING * ae.encode(x)[0].std())
    _divide(ae.decoder.conv_out, 2 * ae.decode(z).std())
    return ae


def _divide(conv, by):
    conv.weight /= by
    conv.bias /= by
