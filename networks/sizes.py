"""Which settings make a U-Net, of images that are halved, and which make a schedule that falls."""

from runtime.commandline import BadInput, typed
from runtime.processes import say_once

EITHER = (7, 8)  # the chapters' --attention-resolutions: of 28x28 images, or of 32x32


def groups_for(model_channels, levels, groups=0):
    """GroupNorm groups of a network whose levels have these channels.

    0 chooses: a quarter of model_channels and at most 32, or the largest divisor of all levels
    below that. BadInput for groups that do not divide, or of one channel: such a norm would
    subtract from a channel what the timestep just added to it.
    """
    if not groups:
        groups = max(1, min(32, model_channels // 4))
        while any(c % groups for c in levels):
            groups -= 1
    elif any(c % groups or c == groups for c in levels):
        raise BadInput(
            f"--norm-groups {groups} must divide the channels {sorted(set(levels))} into two or "
            "more each: type --norm-groups 0 to have them chosen"
        )
    return groups


def check_unet(shape, model_channels, levels, heads=1, head_channels=0, attention=()):
    """BadInput for images of shape (C,H,W), channels, heads or attention that make no U-Net."""
    check_attention(attention, shape[1], len(levels))
    if model_channels % 2:
        raise BadInput(f"--model-channels {model_channels} must be even: half sines, half cosines")
    name, parts = (
        ("--num-head-channels", head_channels) if head_channels else ("--num-heads", heads)
    )
    if any(c % parts for c in levels):
        raise BadInput(f"{name} {parts} must divide the channels {sorted(set(levels))}")
    check_halving(shape, len(levels) - 1)


def check_latent_unet(z_shape, levels, cfg):
    """The same for latents (C,h,w), which are halved rounding up, and a chapter's settings."""
    check_unet((0, 0, 0), cfg.model_channels, levels, cfg.num_heads)
    check_attention(cfg.attention_resolutions, z_shape[1], len(levels))


def check_attention(attention, height, levels):
    """Attention at these heights, in a network of so many levels, the first `height` high.

    BadInput for one that no level has, if it was typed; a line tells of it where it is from a file.
    Of EITHER one will do. (Others give the factors by which a level is smaller: 1, 2, 4.)
    """
    heights = [height]
    for _ in range(levels - 1):
        heights.append(-(-heights[-1] // 2))
    missing = [str(wanted) for wanted in attention if wanted not in heights]
    if not missing or len(missing) == 1 and tuple(attention) == EITHER:
        return
    told = f"{' '.join(missing)}: no level has this height; they are {heights} high"
    if typed(("attention_resolutions",)):
        raise BadInput(f"--attention-resolutions {told}")
    say_once(f"note: attention_resolutions {told}")


def check_halving(shape, times):
    """BadInput for images of shape (C,H,W) that cannot be halved so often, with a size that can."""
    factor = 2**times
    if shape[1] % factor or shape[2] % factor:
        near = max(factor, round(min(shape[1:]) / factor) * factor)
        raise BadInput(
            f"images of {shape[1]}x{shape[2]} cannot be halved {times} times; "
            f"sizes must be multiples of {factor}: type --size {near}"
        )


def check_alpha_bar(alpha_bar, config, whose=""):
    """BadInput for a table (T,), of a chapter's settings by name, that is no schedule.

    Also for one that leaves nothing of the image at T, where eps would tell nothing of it. The
    message begins with `whose` it is, by default with the flags, which are none of a checkpoint's.
    """
    if config.get("sample") and not whose:
        return
    ends = config.get("beta_start") or config.get("beta_end")
    flags = "--beta-end, --beta-start" if ends else "--alpha-min, --timesteps"
    if config.get("trained_betas"):
        flags = "--trained-betas"
        if ends:
            raise BadInput("--beta-start and --beta-end do nothing beside --trained-betas")
    if not (alpha_bar.diff() < 0).all() or not 0 <= alpha_bar[-1] <= alpha_bar[0] < 1:
        raise BadInput(f"{whose or flags}: alpha_bar must fall at every step, from below 1")
    if ends and (left := alpha_bar[-1] ** 0.5) > 0.1:
        say_once(f"note: x_T holds {left:.2f} times the image, but samples begin with noise alone")
    if config["prediction"] == "eps" and alpha_bar[-1] < 1e-12:
        told = "leaves no image at T; type --prediction v or x0"
        raise BadInput(f"{whose or flags.split(',')[0]} {told}")
