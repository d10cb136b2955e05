"""The tensors of CompVis's latent U-Net once more, without the project's table of names.

Listed as the constructors of latent-diffusion and stable-diffusion make them.
"""


def compvis(
    model_channels, channel_mult, num_res_blocks, attention, context_dim, *, channels=4, classes=0
):
    """{name: shape} of a checkpoint of LatentDiffusion, its autoencoder and text encoder left out.

    attention: the factors of downsampling that attend. classes: the rows of its ClassEmbedder.
    """
    shapes, emb = {}, 4 * model_channels

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def block(name, c_in, c):
        layer(f"{name}.in_layers.0", c_in)
        layer(f"{name}.in_layers.2", c, c_in, 3, 3)
        layer(f"{name}.emb_layers.1", c, emb)
        layer(f"{name}.out_layers.0", c)
        layer(f"{name}.out_layers.3", c, c, 3, 3)
        if c_in != c:
            layer(f"{name}.skip_connection", c, c_in, 1, 1)

    def transformer(name, c):
        layer(f"{name}.norm", c)
        layer(f"{name}.proj_in", c, c, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for which, width in (("attn1", c), ("attn2", context_dim)):
            layer(f"{inner}.{which}.to_q", c, c, bias=False)
            layer(f"{inner}.{which}.to_k", c, width, bias=False)
            layer(f"{inner}.{which}.to_v", c, width, bias=False)
            layer(f"{inner}.{which}.to_out.0", c, c)
        layer(f"{inner}.ff.net.0.proj", 8 * c, c)
        layer(f"{inner}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            layer(f"{inner}.norm{i}", c)
        layer(f"{name}.proj_out", c, c, 1, 1)

    top = "model.diffusion_model"
    layer(f"{top}.time_embed.0", emb, model_channels)
    layer(f"{top}.time_embed.2", emb, emb)
    layer(f"{top}.input_blocks.0.0", model_channels, channels, 3, 3)
    c, n, ds, kept = model_channels, 1, 1, [model_channels]
    for level, m in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            block(f"{top}.input_blocks.{n}.0", c, m * model_channels)
            c = m * model_channels
            if ds in attention:
                transformer(f"{top}.input_blocks.{n}.1", c)
            kept.append(c)
            n += 1
        if level < len(channel_mult) - 1:
            layer(f"{top}.input_blocks.{n}.0.op", c, c, 3, 3)
            kept.append(c)
            n, ds = n + 1, 2 * ds
    block(f"{top}.middle_block.0", c, c)
    transformer(f"{top}.middle_block.1", c)
    block(f"{top}.middle_block.2", c, c)
    n = 0
    for level, m in reversed(list(enumerate(channel_mult))):
        for i in range(num_res_blocks + 1):
            block(f"{top}.output_blocks.{n}.0", c + kept.pop(), m * model_channels)
            c, last = m * model_channels, 1
            if ds in attention:
                transformer(f"{top}.output_blocks.{n}.1", c)
                last = 2
            if level and i == num_res_blocks:
                layer(f"{top}.output_blocks.{n}.{last}.conv", c, c, 3, 3)
                ds //= 2
            n += 1
    layer(f"{top}.out.0", c)
    layer(f"{top}.out.2", channels, c, 3, 3)
    if classes:
        layer("cond_stage_model.embedding", classes, context_dim, bias=False)
    return shapes
