"""diffusers' DiTTransformer2DModel with the weights of a network of dit.py, to compare with."""

from tests.cases.reference_networks import needing_diffusers


def load_diffusers():
    """The class DiTTransformer2DModel; BadInput if diffusers is not installed."""
    with needing_diffusers():
        from diffusers import DiTTransformer2DModel
    return DiTTransformer2DModel


def twin(net):
    """diffusers' network with the weights of `net`, a DiT of square latents and mlp_ratio 4.

    Where it differs from the published network, it is set right: frequencies of the timestep
    divided by 128, not 127, and an epsilon of 1e-6 in all norms.
    """
    s, (channels, height, _) = net.settings, net.shape
    theirs = load_diffusers()(
        num_attention_heads=s["num_heads"],
        attention_head_dim=s["hidden_size"] // s["num_heads"],
        in_channels=channels,
        out_channels=channels * (1 + s["learn_sigma"]),
        num_layers=s["depth"],
        sample_size=height,
        patch_size=s["patch_size"],
        num_embeds_ada_norm=net.null,
        norm_eps=1e-6,
    )
    layers = [
        (theirs.pos_embed.proj, net.x_embedder.proj),
        (theirs.proj_out_2, net.final_layer.linear),
        (theirs.proj_out_1, net.final_layer.adaLN_modulation[1]),
    ]
    for block, ours in zip(theirs.transformer_blocks, net.blocks, strict=True):
        emb, attn, mlp = block.norm1.emb, block.attn1, block.ff.net
        emb.time_proj.downscale_freq_shift = 0
        layers += [
            (emb.timestep_embedder.linear_1, net.t_embedder.mlp[0]),
            (emb.timestep_embedder.linear_2, net.t_embedder.mlp[2]),
            (emb.class_embedder.embedding_table, net.y_embedder.embedding_table),
            (block.norm1.linear, ours.adaLN_modulation[1]),
            (attn.to_out[0], ours.attn.proj),
            (mlp[0].proj, ours.mlp.fc1),
            (mlp[2], ours.mlp.fc2),
        ]
        for i, part in enumerate((attn.to_q, attn.to_k, attn.to_v)):
            part.weight.data.copy_(ours.attn.qkv.weight.chunk(3)[i])
            part.bias.data.copy_(ours.attn.qkv.bias.chunk(3)[i])
    for to, source in layers:
        to.load_state_dict(source.state_dict())
    return theirs.eval()
