"""Which settings make a U-Net, of images that are halved, and which make a schedule that falls."""

from runtime.commandline import BadInput


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


def check_unet(shape, model_channels, levels, heads=1, head_channels=0):
    """BadInput for images of shape (C,H,W), channels or heads that make no U-Net."""
    if model_channels % 2:
        raise BadInput(f"--model-channels {model_channels} must be even: half sines, half cosines")
    name, parts = (
        ("--num-head-channels", head_channels) if head_channels else ("--num-heads", heads)
    )
    if any(c % parts for c in levels):
        raise BadInput(f"{name} {parts} must divide the channels {sorted(set(levels))}")
    check_halving(shape, len(levels) - 1)


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
    message begins with `whose` it is, by default with the flags.
    """
    flags = "--trained-betas" if config.get("trained_betas") else "--alpha-min, --timesteps"
    if not (alpha_bar.diff() < 0).all() or not 0 <= alpha_bar[-1] <= alpha_bar[0] < 1:
        raise BadInput(f"{whose or flags}: alpha_bar must fall at every step, from below 1")
    if config["prediction"] == "eps" and alpha_bar[-1] < 1e-12:
        told = "leaves no image at T; type --prediction v or x0"
        raise BadInput(f"{whose or flags.split(',')[0]} {told}")
