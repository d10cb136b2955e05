"""Denoisers of latent diffusion that others published, read into networks.sd_unet.LatentUNet.

    load_latent_unet("stable-diffusion-v1-5")            a folder of diffusers, pipeline or U-Net
    load_latent_unet("v1-5-pruned-emaonly.safetensors")  CompVis's names, .safetensors or .ckpt

Stable Diffusion 1 and 2, and LDM's class-conditional network for ImageNet. The tensors are the same
in both layouts, the names of transformers too; unet_names.py has those of the rest.
Weights are read as plain tensors only: nothing in such a file is ever executed.
"""

from runtime.commandline import BadInput

from pathlib import Path

from networks.published.files import U_NET, find_files, read_json, read_weights, texts
from networks.published.unet_names import BLOCK, ENDS, joined, modules, structure

TRANSFORMER_ENDS = (("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out"))
TRANSFORMER_BLOCK = (  # ours, theirs (several are joined along their first axis), whether biased
    ("norm1", ("norm1",), True),
    ("self_attention.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), False),
    ("self_attention.proj", ("attn1.to_out.0",), True),
    ("norm2", ("norm2",), True),
    ("cross_attention.q", ("attn2.to_q",), False),
    ("cross_attention.kv", ("attn2.to_k", "attn2.to_v"), False),
    ("cross_attention.proj", ("attn2.to_out.0",), True),
    ("norm3", ("norm3",), True),
    ("feed_forward.widen", ("ff.net.0.proj",), True),
    ("feed_forward.narrow", ("ff.net.2",), True),
)
COMPVIS = "model.diffusion_model."  # before the names of the U-Net in a whole CompVis checkpoint
SEES_MORE = {5: "an inpainting U-Net", 1: "a depth U-Net", 4: "a U-Net that edits an image"}
MARKS = (*U_NET, COMPVIS + U_NET[0])
CLASSES = "cond_stage_model.embedding.weight"  # LDM's class tokens, the last of them "no label"

# Settings of UNet2DConditionModel that have no counterpart here, and the values that mean "not
# used" (or, as upcast_attention, change only the rounding and are left out of this table).
FIXED = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
BLOCK_TYPES = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def load_latent_unet(path, *, num_heads=None, num_head_channels=None, norm_groups=None):
    """A published denoiser: dict(channels, num_classes, settings, state, averaged).

    path      a diffusers folder (of a UNet2DConditionModel, or of a pipeline with unet/), one
              .safetensors or .bin in its names (config.json beside it is read), or a .safetensors,
              .ckpt or .pt in CompVis's. Of two sets of weights there, the running mean is taken:
              then it is `averaged`.
    LatentUNet(found["channels"], found["num_classes"], **found["settings"]) takes the float32
    found["state"]. num_classes is None, which needs a context, unless the file has class tokens.

    The architecture comes from names and shapes of the tensors. They do not tell the keywords; one
    that is given wins over config.json, and without either the published value is taken:
    num_heads          8 (Stable Diffusion 1); 1 with class tokens
    num_head_channels  64 with matrices instead of convolutions around the transformers (2), else 0:
                       num_heads holds
    norm_groups        32

    BadInput, with the first names, for tensors or settings that are not those of such a network.
    """
    weights, config, _ = find_files(Path(path))
    state = read_weights(weights, MARKS)
    labels = state.get(CLASSES)
    state, averaged = _unet_of(state, weights)
    layout, s = structure(state, weights)
    down, middle = (
        ("down_blocks.{}.attentions.0", "mid_block.attentions.0")
        if layout == "diffusers"
        else ("input_blocks.{}.1", "middle_block.1")
    )
    first = range(len(s.levels)) if layout == "diffusers" else _firsts(s)
    s = s._replace(
        attention=tuple(
            level for level, i in enumerate(first) if f"{down.format(i)}.proj_in.weight" in state
        )
    )
    tokens = f"{middle}.transformer_blocks.0.attn2.to_k.weight"
    if tokens not in state:
        raise BadInput(f"{weights} is no U-Net of latent diffusion: it has no {tokens}")
    if s.out != s.channels:
        kind = SEES_MORE.get(s.channels - s.out, "a U-Net that sees more than the latent")
        raise BadInput(
            f"{weights} makes {s.out} channels of {s.channels}, expected as many: it is {kind}, "
            "which cannot be used here"
        )
    context_dim = state[tokens].shape[-1]
    depth = sum(key.startswith(f"{middle}.") and key.endswith(".norm1.weight") for key in state)

    if labels is not None and (labels.ndim != 2 or labels.shape[1] != context_dim):
        labels = None  # a text encoder that has a tensor of this name
    matrices = state[f"{middle}.proj_in.weight"].ndim == 2
    told = dict(num_heads=8 if labels is None else 1, norm_groups=32)
    told["num_head_channels"] = 64 if matrices else 0
    if config and layout == "diffusers":
        told.update(_of_config(read_json(config), s, config))
    if num_heads and not num_head_channels:
        told["num_head_channels"] = 0
    given = dict(num_heads=num_heads, num_head_channels=num_head_channels, norm_groups=norm_groups)
    told.update({name: value for name, value in given.items() if value is not None})

    ours = joined(state, rows(s, layout, depth, context_dim), weights)
    if labels is not None:
        ours["label.weight"] = labels.float()
    mult = tuple(c // s.width if c % s.width == 0 else c / s.width for c in s.levels)
    settings = dict(
        model_channels=s.width,
        channel_mult=mult,
        num_res_blocks=s.blocks,
        attention_levels=s.attention,
        transformer_depth=depth,
        context_dim=context_dim,
        **told,
    )
    num_classes = None if labels is None else len(labels) - 1
    return dict(
        channels=s.channels,
        num_classes=num_classes,
        settings=settings,
        state=ours,
        averaged=averaged,
    )


# ------------------------------------------------------------------------------------------ names


def rows(s, layout, depth, context_dim):
    """(our name, their names, shape) of every tensor of a network of this Structure.

    layout is "diffusers" or "openai", whose names CompVis has kept. s.attention are levels.
    """
    column = 1 if layout == "diffusers" else 2
    c_emb = 4 * s.width
    shapes = {
        "time.0": (c_emb, s.width),
        "time.2": (c_emb, c_emb),
        "conv_in": (s.levels[0], s.channels, 3, 3),
        "norm_out": (s.levels[0],),
        "conv_out": (s.out, s.levels[0], 3, 3),
    }
    for names in ENDS:
        yield from _row(names[0], [names[column]], shapes[names[0]])
    for kind, ours, *theirs, c_in, c in modules(s):
        at = theirs[column - 1]
        if kind == "block":
            shapes = {
                "norm1": (c_in,),
                "conv1": (c, c_in, 3, 3),
                "emb": (c, c_emb),
                "norm2": (c,),
                "conv2": (c, c, 3, 3),
                "skip": (c, c_in, 1, 1),
            }
            for names in BLOCK if c_in != c else BLOCK[:-1]:
                yield from _row(f"{ours}.{names[0]}", [f"{at}.{names[column]}"], shapes[names[0]])
        elif kind == "attention":
            yield from _transformer_rows(ours, at, c, depth, context_dim)
        else:  # a convolution that halves or doubles; here it is the part itself
            conv = "conv" if layout == "diffusers" else kind
            yield from _row(ours, [f"{at}.{conv}"], (c, c, 3, 3))


def _transformer_rows(ours, at, c, depth, context_dim):
    shapes = {
        "norm": (c,),
        "proj_in": (c, c),
        "proj_out": (c, c),
        "norm1": (c,),
        "norm2": (c,),
        "norm3": (c,),
        "self_attention.qkv": (3 * c, c),
        "self_attention.proj": (c, c),
        "cross_attention.q": (c, c),
        "cross_attention.kv": (2 * c, context_dim),
        "cross_attention.proj": (c, c),
        "feed_forward.widen": (8 * c, c),
        "feed_forward.narrow": (c, 4 * c),
    }
    for a, b in TRANSFORMER_ENDS:
        yield from _row(f"{ours}.{a}", [f"{at}.{b}"], shapes[a])
    for i in range(depth):
        block = f"{at}.transformer_blocks.{i}"
        for a, b, biased in TRANSFORMER_BLOCK:
            names = [f"{block}.{name}" for name in b]
            yield from _row(f"{ours}.blocks.{i}.{a}", names, shapes[a], biased)


def _row(ours, theirs, shape, biased=True):
    yield f"{ours}.weight", [f"{name}.weight" for name in theirs], shape
    if biased:
        yield f"{ours}.bias", [f"{name}.bias" for name in theirs], shape[:1]


def _firsts(s):
    """The numbers of the input blocks that begin the levels, in CompVis's names."""
    return [level * (s.blocks + 1) + 1 for level in range(len(s.levels))]


# --------------------------------------------------------------------- checkpoints and settings


def _unet_of(state, path):
    """(tensors, whether running means) of a whole CompVis checkpoint's U-Net.

    The means are taken where they are. They lie under "model_ema.", in names without dots. Other
    states come as they are. BadInput for a part of the means.
    """
    unet = {k.removeprefix(COMPVIS): v for k, v in state.items() if k.startswith(COMPVIS)}
    means = {k: "model_ema.diffusion_model" + k.replace(".", "") for k in unet}
    lacking = [mean for mean in means.values() if mean not in state]
    if unet and not lacking:
        return {k: state[mean] for k, mean in means.items()}, True
    if len(lacking) < len(means):
        raise BadInput(
            f"{path} lacks {len(lacking)} of {len(means)} running means, first {min(lacking)}: "
            "expected all of them, or none; fetch it again"
        )
    return unet or state, False


def _of_config(config, s, path):
    """The keywords that a config.json of UNet2DConditionModel tells; BadInput for other kinds."""
    for name, allowed in FIXED.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            raise BadInput(f"{path}: {name} {value!r} is not supported, expected {allowed[0]!r}")
    ways = ("down_block_types", "up_block_types")
    types = {kind for way in ways for kind in texts(config.get(way), way, path)}
    if types - BLOCK_TYPES:
        raise BadInput(f"{path}: {', '.join(sorted(types - BLOCK_TYPES))} is not supported")
    # diffusers calls the number of heads attention_head_dim, as one number or one for each level.
    heads = config.get("attention_head_dim", 8)
    try:
        heads = [heads] * len(s.levels) if isinstance(heads, int) else list(heads)
        attends = [(s.levels[i], heads[i]) for i in sorted({*s.attention, len(s.levels) - 1})]
        sizes = {c // n for c, n in attends}
    except (TypeError, LookupError, ZeroDivisionError):
        raise BadInput(
            f"{path}: attention_head_dim must be one number of heads or one for each level, "
            f"got {config['attention_head_dim']!r}"
        ) from None
    for c, n in attends:
        if type(n) is int and (n < 1 or c % n):
            raise BadInput(f"{path}: attention_head_dim {n} must be a divisor of {c} channels")
    groups = config.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1 or any(c % groups for c in s.levels):
        raise BadInput(
            f"{path}: norm_num_groups {groups!r} must be a whole number that divides the channels "
            f"{sorted(set(s.levels))}"
        )
    told = dict(norm_groups=groups)
    if len({n for _, n in attends}) == 1:
        return told | dict(num_heads=attends[0][1], num_head_channels=0)
    if len(sizes) == 1:
        return told | dict(num_heads=attends[0][1], num_head_channels=sizes.pop())
    raise BadInput(
        f"{path}: attention_head_dim {heads} is neither one number of heads nor one size of them"
    )
