"""OpenAI's classifiers of noisy images, read into networks.noisy_classifier.NoisyClassifier.

    read_classifier("64x64_classifier.pt")      of guided-diffusion; also 128, 256 and 512
    read_classifier("runs/classifier/ckpt.pt")  a checkpoint of classifier_guidance.py

Weights are read as plain tensors only: nothing in such a file is ever executed.
"""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput

import math
from pathlib import Path

from networks.published.files import U_NET, is_published, read_weights
from networks.published.unet import CLASSIFIERS, SIZES, channel_mult
from networks.published.unet_names import (
    ENDS,
    Row,
    Structure,
    converted,
    down_modules,
    end_rows,
    is_classifier,
    part_rows,
    size_of,
    split_heads_last,
    weight_and_bias,
)

POSITION = "out.2.positional_embedding"
HEAD, GROUPS = 64, 32  # channels of every head and groups of every norm, which no tensor tells


def read_classifier(path):
    """A classifier of noisy images as the state of a checkpoint of classifier_guidance.py.

    path     such a checkpoint, which is returned as it is, or a published classifier, of which this
             is made: script, config (settings by name; data is "" and ema empty, for there is no
             running mean), shape (C,H,W), class_names ("0", "1", ...), ema (a float32 state_dict of
             NoisyClassifier), settings (its keywords), and named, False: the file names neither
             the classes nor the schedule of the noise that it was trained on

    The architecture comes from names and shapes of the tensors, and from what all published
    classifiers share: heads of 64 channels, 32 groups, and in the attention blocks (not in the
    pool) OpenAI's first order of the channels of qkv.
    BadInput, naming the file, for everything else, a diffusion network first.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(
            f"{path} is a folder, but a classifier is one file: name a run's ckpt.pt or a "
            "published .pt; a diffusion network is named with --sample"
        )
    if not is_published(path):
        state = load_checkpoint(path)
        if state["script"] != CLASSIFIERS:
            raise BadInput(
                f"{path} was written by {state['script']}.py, expected a classifier of "
                f"{CLASSIFIERS}.py; a diffusion network is named with --sample"
            )
        return state
    state = read_weights(path, U_NET)
    s, side = structure(state, path)
    ours = converted(state, "openai", list(rows(s, side)), path)
    blocks = {name: value for name, value in ours.items() if not name.startswith("pool.")}
    split_heads_last(blocks, 1, HEAD, path)
    size = side << (len(s.levels) - 1)
    settings = dict(
        model_channels=s.width,
        channel_mult=channel_mult(s),
        num_res_blocks=s.blocks,
        attention_resolutions=tuple(size >> i for i in s.attention),
        num_heads=1,
        num_head_channels=HEAD,
        dropout=0.0,
        use_scale_shift_norm=s.use_scale_shift_norm,
        resblock_updown=s.resblock_updown,
        norm_groups=GROUPS,
    )
    return dict(
        script=CLASSIFIERS,
        config={**settings, "data": "", "ema": []},
        shape=(s.channels, size, size),
        class_names=[str(i) for i in range(s.out)],
        ema={**ours, **blocks},
        settings=settings,
        named=False,
    )


def rows(s, side):
    """A Row for every tensor of a classifier whose pool sees side x side positions."""
    c = s.levels[-1]
    yield from end_rows(s, ENDS[:-1], c)  # it has no conv_out
    for part in down_modules(s):
        yield from part_rows(s, *part)
    yield Row("pool.position", (), (POSITION,), (c, 1 + side**2))
    yield from weight_and_bias("pool.qkv", (), "out.2.qkv_proj", (3 * c, c))
    yield from weight_and_bias("pool.proj", (), "out.2.c_proj", (s.out, c))


def structure(state, path):
    """(Structure, side of the images that the pool sees) of a state_dict; out counts the classes.

    BadInput if it is none of a classifier.
    """
    if any(key.startswith(("output_blocks.", "down_blocks.")) for key in state):
        raise BadInput(f"{path} is a diffusion network, no classifier: name it with --sample")
    if is_classifier(state) and POSITION not in state:
        raise BadInput(f"{path} is a classifier without attention pooling: it has no {POSITION}")

    def size(key, axis):
        return size_of(state, key, axis, path, "classifier")

    side = math.isqrt(max(size(POSITION, 1) - 1, 0))
    if side < 1 or size(POSITION, 1) != side**2 + 1:
        raise BadInput(f"{path}: {POSITION} must have a column more than a square has pixels")
    count = len({key.split(".")[1] for key in state if key.startswith("input_blocks.")})
    at = [f"input_blocks.{n}" for n in range(1, count)]
    halves = [f"{name}.0.op.weight" in state for name in at]
    convs = [
        f"{name}.0.{'op' if half else 'in_layers.2'}.weight"
        for name, half in zip(at, halves, strict=True)
    ]
    channels = [size(conv, 0) for conv in convs]
    attends = [f"{name}.1.qkv.weight" in state for name in at]
    emb = size("input_blocks.1.0.emb_layers.1.weight", 0)
    found = [
        Structure(
            width=size("time_embed.0.weight", 1),
            levels=tuple(channels[::per]),
            blocks=per - 1,
            attention=tuple(i for i, attend in enumerate(attends[::per]) if attend),
            use_scale_shift_norm=emb == 2 * channels[0],
            resblock_updown=not any(halves),
            channels=size("input_blocks.0.0.weight", 1),
            out=size("out.2.c_proj.weight", 0),
            labels=0,
        )
        for per in range(2, count + 1)
        if count % per == 0 and are_levels(per, channels, attends, halves)
    ]
    if len(found) > 1:  # then of the published levels at their size
        found = [s for s in found if SIZES.get(channel_mult(s)) == side << (len(s.levels) - 1)]
    if len(found) != 1:
        raise BadInput(f"{path}: its {count} input_blocks are not the levels of a known classifier")
    if any(c % HEAD for c in found[0].levels):
        raise BadInput(f"{path}: its levels, {found[0].levels}, have no heads of {HEAD} channels")
    return found[0], side


def are_levels(per, channels, attends, halves):
    """Whether input blocks, from the second on, can be levels of `per` that each end by halving.

    channels, attends, halves: what each block gives, and whether it has attention or a convolution
    of stride 2. No name tells which residual block halves. But a level has one number of channels,
    attention after all of its residual blocks or none, and never after what halves.
    """
    for start in range(0, len(channels), per):
        body, last = slice(start, start + per - 1), slice(start + per - 1, start + per)
        alike = len({*channels[body], *channels[last]}) == len({*attends[body]}) == 1
        if not alike or any(halves[body]) or any(attends[last]):
            return False
        if any(halves) and not all(halves[last]):
            return False
    return True
