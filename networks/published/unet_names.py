"""What the tensors of a U-Net are called: here, in diffusers' UNet2DModel, in OpenAI's code.

All three are the same network; two rows of names and a shape per tensor say everything. OpenAI's
classifier of noisy images (networks/published/classifier.py) has the names of its down half.
It is written from the state_dict of diffusers' UNet2DModel and of UNetModel in OpenAI's
improved-diffusion and guided-diffusion.
"""

from runtime.commandline import BadInput

import re
from typing import NamedTuple

import torch

from networks.published.contents import listed
from networks.published.files import check_floats

BLOCK = (  # of a residual block: ours, UNet2DModel's, OpenAI's
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("emb", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
)
ATTENTION = (
    ("norm", "group_norm", "norm"),
    ("qkv", ("to_q", "to_k", "to_v"), "qkv"),
    ("proj", "to_out.0", "proj_out"),
)
ENDS = (
    ("time.0", "time_embedding.linear_1", "time_embed.0"),
    ("time.2", "time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    ("norm_out", "conv_norm_out", "out.0"),
    ("conv_out", "conv_out", "out.2"),
)
EARLIER = (  # what UNet2DModel once called the parts of its attention
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)


class Structure(NamedTuple):
    """What names and shapes of tensors tell of a network."""

    width: int  # of the timestep embedding
    levels: tuple[int, ...]  # channels of each
    blocks: int
    attention: tuple[int, ...]  # the levels that attend
    use_scale_shift_norm: bool
    resblock_updown: bool
    channels: int  # of its input
    out: int  # channels of its output
    labels: int  # rows of the label embedding, 0 for none


class Row(NamedTuple):
    """A tensor of ours, and the tensors that it is made of (joined along their first axis)."""

    ours: str
    diffusers: tuple[str, ...]
    openai: tuple[str, ...]
    shape: tuple[int, ...]


def down_modules(s):
    """(kind, our name, UNet2DModel's, OpenAI's, channels in, channels out) of every part on the way
    down and in the middle."""
    per, c = s.blocks + 1, s.levels[0]
    for level, c_out in enumerate(s.levels):
        theirs = f"down_blocks.{level}"
        for r in range(s.blocks):
            n = level * per + r
            at = f"input_blocks.{n + 1}"
            yield "block", f"down.{n}.0", f"{theirs}.resnets.{r}", f"{at}.0", c, c_out
            if level in s.attention:
                name = f"{theirs}.attentions.{r}"
                yield "attention", f"down.{n}.1", name, f"{at}.1", c_out, c_out
            c = c_out
        if level < len(s.levels) - 1:
            n, kind = level * per + s.blocks, "block" if s.resblock_updown else "op"
            at = f"input_blocks.{n + 1}.0"
            yield kind, f"down.{n}.0", f"{theirs}.downsamplers.0", at, c, c
    yield "block", "middle.0", "mid_block.resnets.0", "middle_block.0", c, c
    yield "attention", "middle.1", "mid_block.attentions.0", "middle_block.1", c, c
    yield "block", "middle.2", "mid_block.resnets.1", "middle_block.2", c, c


def modules(s):
    """The same of every part of a U-Net."""
    yield from down_modules(s)
    per, c = s.blocks + 1, s.levels[-1]
    kept = [s.levels[0], *(level for level in s.levels for _ in range(per))][:-1]  # on the way down
    for i, level in enumerate(reversed(range(len(s.levels)))):
        theirs, c_out = f"up_blocks.{i}", s.levels[level]
        for r in range(per):
            n = i * per + r
            at, c_in = f"output_blocks.{n}", c + kept.pop()
            yield "block", f"up.{n}.0", f"{theirs}.resnets.{r}", f"{at}.0", c_in, c_out
            if level in s.attention:
                name = f"{theirs}.attentions.{r}"
                yield "attention", f"up.{n}.1", name, f"{at}.1", c_out, c_out
            c = c_out
        if level > 0:
            j, kind = 2 if level in s.attention else 1, "block" if s.resblock_updown else "conv"
            yield kind, f"up.{n}.{j}", f"{theirs}.upsamplers.0", f"{at}.{j}", c, c


def rows(s):
    """A Row for every tensor of a U-Net of this Structure."""
    yield from end_rows(s, ENDS, s.levels[0])
    if s.labels:
        label = ("class_embedding.weight",), ("label_emb.weight",)
        yield Row("label.weight", *label, (s.labels, 4 * s.width))
    for part in modules(s):
        yield from part_rows(s, *part)


def end_rows(s, ends, c):
    """A Row for every tensor of those of ENDS; c: channels that the last norm sees."""
    shapes = {
        "time.0": (4 * s.width, s.width),
        "time.2": (4 * s.width, 4 * s.width),
        "conv_in": (s.levels[0], s.channels, 3, 3),
        "norm_out": (c,),
        "conv_out": (s.out, c, 3, 3),
    }
    for ours, diffusers, openai in ends:
        yield from weight_and_bias(ours, diffusers, openai, shapes[ours])


def part_rows(s, kind, ours, diffusers, openai, c_in, c):
    """A Row for every tensor of a part, as modules names it."""
    if kind == "block":
        shapes = {
            "norm1": (c_in,),
            "conv1": (c, c_in, 3, 3),
            "emb": (c * (1 + s.use_scale_shift_norm), 4 * s.width),
            "norm2": (c,),
            "conv2": (c, c, 3, 3),
            "skip": (c, c_in, 1, 1),
        }
        parts = BLOCK if c_in != c else BLOCK[:-1]
    elif kind == "attention":
        shapes = {"norm": (c,), "qkv": (3 * c, c), "proj": (c, c)}
        parts = ATTENTION
    else:  # a convolution that halves or doubles; here it is the part itself
        yield from weight_and_bias(ours, f"{diffusers}.conv", f"{openai}.{kind}", (c, c, 3, 3))
        return
    for a, b, d in parts:
        names = f"{diffusers}.{b}" if isinstance(b, str) else [f"{diffusers}.{q}" for q in b]
        yield from weight_and_bias(f"{ours}.{a}", names, f"{openai}.{d}", shapes[a])


def weight_and_bias(ours, diffusers, openai, shape):
    diffusers = [diffusers] if isinstance(diffusers, str) else diffusers
    for kind, size in (("weight", shape), ("bias", shape[:1])):
        theirs = tuple(f"{name}.{kind}" for name in diffusers)
        yield Row(f"{ours}.{kind}", theirs, (f"{openai}.{kind}",), size)


def size_of(state, key, axis, path, what):
    """The length of a tensor along an axis; BadInput where the state_dict from `path` has none."""
    if key not in state or state[key].ndim <= axis:
        found = (
            f"the first of its {len(state)} tensors is {listed([min(state)])}" if state else "empty"
        )
        raise BadInput(f"{path} is no {what} of the published kinds: it has no {key}; {found}")
    return state[key].shape[axis]


def structure(state, path):
    """("diffusers" or "openai", Structure) of a state_dict; BadInput if it is neither's U-Net."""

    def size(key, axis):
        return size_of(state, key, axis, path, "U-Net")

    def count(pattern):
        return len({m.group(1) for m in map(re.compile(pattern).match, state) if m})

    levels = count(r"down_blocks\.(\d+)\.")
    if levels:
        layout, ends = "diffusers", {ours: name for ours, name, _ in ENDS}
        blocks = count(r"down_blocks\.0\.resnets\.(\d+)\.")
        first = [f"down_blocks.{i}.resnets.0" for i in range(levels)]
        attends = [f"down_blocks.{i}.attentions.0.to_q.weight" for i in range(levels)]
        updown = "down_blocks.0.downsamplers.0.conv1.weight" in state
        conv, emb, label = "conv1", "time_emb_proj", "class_embedding.weight"
    else:
        layout, ends = "openai", {ours: name for ours, _, name in ENDS}
        # Each level but the last built ends by doubling: by a second residual block or by conv.
        doubling = r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.2)\.weight"
        levels = count(doubling) + 1
        blocks = count(r"output_blocks\.(\d+)\.") // levels - 1
        at = [f"input_blocks.{i * (blocks + 1) + 1}" for i in range(levels)]
        first, attends = [f"{name}.0" for name in at], [f"{name}.1.qkv.weight" for name in at]
        updown = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", key) for key in state)
        conv, emb, label = "in_layers.2", "emb_layers.1", "label_emb.weight"
    channels = tuple(size(f"{name}.{conv}.weight", 0) for name in first)
    return layout, Structure(
        width=size(f"{ends['time.0']}.weight", 1),
        levels=channels,
        blocks=blocks,
        attention=tuple(i for i, key in enumerate(attends) if key in state),
        use_scale_shift_norm=size(f"{first[0]}.{emb}.weight", 0) == 2 * channels[0],
        resblock_updown=updown,
        channels=size(f"{ends['conv_in']}.weight", 1),
        out=size(f"{ends['conv_out']}.weight", 0),
        labels=size(label, 0) if label in state else 0,
    )


def is_classifier(state):
    """Whether a state_dict has OpenAI's names of a down half and an end, and no way up."""
    ends = {"input_blocks.0.0.weight", "out.0.weight"} <= state.keys()
    return ends and not any(key.startswith("output_blocks.") for key in state)


def check_keys(state, wanted, path):
    """BadInput, naming some, where the state_dict from `path` lacks keys or has others."""
    lacking = [key for key in wanted if key not in state]
    if lacking:
        raise BadInput(f"{path} lacks tensors of a network like it: {_first(lacking)}")
    unknown = sorted(state.keys() - set(wanted))
    if unknown:
        raise BadInput(f"{path} has tensors that this network has no place for: {_first(unknown)}")


def joined(state, table, path):
    """Our state_dict, float32, of a table of (our name, their names, shape); it empties `state`.

    Tensors of several names are joined along their first axis; convolutions of size 1, (c,c,1) or
    (c,c,1,1), become matrices where the shape is one. BadInput, naming the first that does not fit.
    """
    table, ours = list(table), {}
    check_keys(state, [key for _, theirs, _ in table for key in theirs], path)
    check_floats(state, path)
    for name, theirs, shape in table:
        parts, shape = [], (shape[0] // len(theirs), *shape[1:])  # of each part
        for key in theirs:
            value = state.pop(key)  # so that a file's map can end
            pointwise = len(shape) == 2 and set(value.shape[2:]) == {1}
            part = value.flatten(1) if pointwise else value
            if part.shape != shape:
                raise BadInput(f"{path}: {key} is {tuple(value.shape)}, expected {shape}")
            parts.append(part.float())
        ours[name] = torch.cat(parts)
    return ours


def from_published(state, layout, s, path):
    """Our state_dict of a published U-Net, float32; BadInput names keys that do not fit."""
    return converted(state, layout, list(rows(s)), path)


def converted(state, layout, table, path):
    """Our state_dict of the one that `table`, of Rows, has by the names of `layout`, float32."""
    table = [(row.ours, getattr(row, layout), row.shape) for row in table]
    return joined(dict(state), table, path)


def split_heads_last(state, num_heads, num_head_channels, path):
    """OpenAI's first order of qkv's channels, (head, q k v, channel), to ours: q k v first."""
    name, parts = "num_heads", num_heads
    if num_head_channels:
        name, parts = "num_head_channels", num_head_channels
    for key, value in state.items():
        if ".qkv." in key:
            channels = len(value) // 3
            n = channels // num_head_channels if num_head_channels else num_heads
            if channels % parts:
                wrong = f"{name} {parts} does not divide the {channels} channels of {key}"
                raise BadInput(f"{path}: {wrong}")
            split = value.unflatten(0, (n, 3, channels // n))  # (heads,3,channels,...)
            state[key] = split.transpose(0, 1).flatten(0, 2).contiguous()


def to_diffusers(state, s):
    """UNet2DModel's state_dict of ours, float32; ValueError for a state of another network.

    A convolution of size 1 is taken for the linear layer that it is.
    """
    theirs, table = {}, list(rows(s))
    flat = {k: v[..., 0, 0] if _is_pointwise(k, v) else v for k, v in state.items()}
    if {row.ours: row.shape for row in table} != {k: tuple(v.shape) for k, v in flat.items()}:
        raise ValueError("the weights are not those of a network with these settings")
    for row in table:
        parts = flat[row.ours].detach().float().chunk(len(row.diffusers))
        for key, part in zip(row.diffusers, parts, strict=True):
            theirs[key] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def _is_pointwise(name, value):
    """Whether it is the weight of an attention's layer, as ddpm_pixel.py has it."""
    return value.ndim == 4 and name.split(".")[-2] in ("qkv", "proj")


def with_present_names(state):
    """The state_dict with UNet2DModel's earlier names of attention replaced by today's."""

    def renamed(key):
        if ".attentions." in key:
            for old, new in EARLIER:
                key = key.replace(old, new)
        return key

    return {renamed(key): value for key, value in state.items()}


def _first(keys, n=3):
    more = f" and {len(keys) - n} more" if len(keys) > n else ""
    return ", ".join(keys[:n]) + more
