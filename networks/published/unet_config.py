"""The config.json of diffusers' UNet2DModel: what it says beyond names and shapes of tensors."""

from runtime.commandline import BadInput

from networks.published.files import texts

# How UNet2DModel spells the two styles of networks/adm_unet.py.
STYLES = {
    "ddpm": dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0),
    "adm": dict(flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5, downsample_padding=1),
}
# What UNet2DModel takes for a setting that config.json leaves out.
DEFAULTS = dict(STYLES["adm"], attention_head_dim=8, norm_num_groups=32, dropout=0.0)
# Settings of UNet2DModel that have no counterpart here, and the values that mean "not used".
FIXED = {
    "_class_name": ("UNet2DModel",),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
IDLE = ("num_train_timesteps",)  # of time_embedding_type learned
BLOCK_TYPES = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
)


def expected(config, s):
    """{name: values} of the settings that the tensors tell as well, s being their Structure."""
    halves = "resnet" if s.resblock_updown else "conv"
    two = (halves,) if len(s.levels) > 1 else ("resnet", "conv")
    return dict(
        FIXED,
        in_channels=(s.channels,),
        out_channels=(s.out,),
        time_embedding_dim=(None, 4 * s.width),
        block_out_channels=(list(s.levels),),
        layers_per_block=(s.blocks,),
        downsample_type=two,
        upsample_type=two,
        resnet_time_scale_shift=("scale_shift" if s.use_scale_shift_norm else "default",),
        num_class_embeds=(s.labels or None,),
        attn_norm_num_groups=(None, config.get("norm_num_groups", 32)),
    )


def of_config(config, s, path):
    """Keywords of load_published from the settings of a config.json; s: Structure of its tensors.

    BadInput names a setting that has no counterpart here, that the tensors contradict, or that is
    none.
    """
    allowed = expected(config, s)
    for name, values in allowed.items():
        if name in config and not any(_same(config[name], value) for value in values):
            raise BadInput(
                f"{path}: {name} {config[name]!r} is not supported, only {values[0]!r} is"
            )
    blocks = {"down": config.get("down_block_types"), "up": config.get("up_block_types")}
    for way, kinds in blocks.items():
        kinds = texts(kinds, f"{way}_block_types", path)
        for kind in kinds:
            if kind.removeprefix("UNetRes") not in BLOCK_TYPES:
                raise BadInput(f"{path}: blocks of type {kind} are not supported")
        order = range(len(s.levels)) if way == "down" else reversed(range(len(s.levels)))
        attend = [i in s.attention for i in order]
        if kinds and ["Attn" in kind for kind in kinds] != attend:
            raise BadInput(f"{path}: {way}_block_types {kinds} are not those of its tensors")
    known = {*allowed, *DEFAULTS, *IDLE, "sample_size", "down_block_types", "up_block_types"}
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise BadInput(f"{path}: there is no counterpart here for {name} {value!r}")
    config = {**DEFAULTS, **config}
    halves = len(s.levels) > 1 and not s.resblock_updown  # else no convolution to pad
    marks = [name for name in DEFAULTS if name in STYLES["adm"]]
    marks = [name for name in marks if halves or name != "downsample_padding"]
    style = [k for k, v in STYLES.items() if all(config[name] == v[name] for name in marks)]
    if not style:
        found = ", ".join(f"{name} {config[name]}" for name in marks)
        raise BadInput(f"{path}: {found}: neither style ddpm nor style adm has these together")
    size, head = config.get("sample_size"), config["attention_head_dim"]
    sizes = size if isinstance(size, list) and len(size) == 2 else [size]
    numbers = {"sample_size": sizes, "attention_head_dim": [head]}
    numbers |= {"norm_num_groups": [config["norm_num_groups"]]}
    for name, values in numbers.items():
        none = values == [None] and name != "norm_num_groups"
        if not none and not all(type(value) is int and value > 0 for value in values):
            raise BadInput(f"{path}: {name} {config[name]!r} must be a whole number from 1")
    dropout = config["dropout"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadInput(f"{path}: dropout {dropout!r} must be a number from 0, below 1")
    return dict(
        style=style[0],
        norm_groups=config["norm_num_groups"],
        dropout=dropout,
        num_heads=1,
        num_head_channels=head or 0,
        null_label=config.get("_null_label", False),
        **({"size": size if isinstance(size, int) else tuple(size)} if size else {}),
    )


def _same(value, other):
    """Whether two values of JSON are the same; true is no 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
