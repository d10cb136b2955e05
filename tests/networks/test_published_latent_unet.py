"""Published latent U-Nets: diffusers' UNet2DConditionModel computes the same, in both layouts."""

from runtime.commandline import BadInput

import json
import math

import pytest
import torch
from compvis_unet import compvis
from reference_metrics import import_references
from safetensors.torch import load_file, save_file

from networks.published.sd_unet import load_latent_unet, rows
from networks.published.unet_names import structure
from networks.sd_unet import LatentUNet

# UNet2DConditionModel's settings: Stable Diffusion 1 and 2, small. attention_head_dim counts heads.
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
THEIRS = {
    "SD 1": dict(
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP),
        cross_attention_dim=12,
    ),
    "SD 2": dict(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        down_block_types=(CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP),
        cross_attention_dim=20,
        use_linear_projection=True,
        layers_per_block=1,
    ),
    "two deep, below the first level": dict(
        block_out_channels=(16, 24),
        norm_num_groups=8,
        attention_head_dim=2,
        down_block_types=(DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, UP),
        cross_attention_dim=8,
        transformer_layers_per_block=2,
        layers_per_block=1,
    ),
}
HEADS = {
    "SD 1": dict(num_heads=4, num_head_channels=0),
    "SD 2": dict(num_heads=2, num_head_channels=8),
    "two deep, below the first level": dict(num_heads=2, num_head_channels=0),
}


@pytest.fixture(scope="module")
def published_unet():
    """diffusers' class."""
    import_references()
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


def random(shapes, seed=0):
    """Tensors of these shapes, none at its start: unit norms would hide what is wrong."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        one = len(shape) == 1
        scale = 0.3 if one else math.prod(shape[1:]) ** -0.5
        state[name] = scale * torch.randn(shape, generator=generator)
        if one and name.endswith("weight"):
            state[name] += 1
    return state


def randomised(net):
    net.load_state_dict(random({k: v.shape for k, v in net.state_dict().items()}))
    return net.eval()


def rebuilt(found):
    net = LatentUNet(found["channels"], found["num_classes"], **found["settings"])
    net.load_state_dict(found["state"])
    return net.eval()


def assert_same(ours, theirs, sides, context, **told):
    """Outputs are equal to rounding, in units of their spread. ours sees the context, or `told`."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, ours.conv_in.in_channels, *sides, generator=generator)
    t = torch.tensor([0, 7, 999])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, seen = z.to(dtype), context.to(dtype)
        with torch.no_grad():
            expected = theirs.to(dtype)(x, t, seen).sample
            x = x.to(memory_format=torch.channels_last)
            got = ours.to(dtype)(x, t, **(told or dict(context=seen)))
        assert got.shape == expected.shape == z.shape and expected.std() > 0.1
        assert (got - expected).abs().max() < tolerance * expected.std()


def text(width):
    """Five tokens for each of three samples."""
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("sides", [(8, 8), (7, 7), (6, 9)])
@pytest.mark.parametrize("name", THEIRS)
def test_a_network_of_diffusers_computes_the_same_here(name, sides, tmp_path, published_unet):
    theirs = randomised(published_unet(**THEIRS[name]))
    theirs.save_pretrained(tmp_path)
    found = load_latent_unet(tmp_path)
    assert {k: found["settings"][k] for k in ("num_heads", "num_head_channels")} == HEADS[name]
    assert_same(rebuilt(found), theirs, sides, text(THEIRS[name]["cross_attention_dim"]))


def test_the_published_networks_have_our_shapes_and_parameters(published_unet):
    """Stable Diffusion 1.5's and 2.1's, by their config.json."""
    sd2 = dict(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )
    for config, mine, count in (
        (dict(cross_attention_dim=768), dict(num_heads=8, context_dim=768), 859_520_964),
        (sd2, dict(num_head_channels=64, context_dim=1024), 865_910_724),
    ):
        with torch.device("meta"):
            theirs = published_unet(**config)
            ours = LatentUNet(
                4,
                None,
                model_channels=320,
                channel_mult=(1, 2, 4, 4),
                num_res_blocks=2,
                attention_levels=(0, 1, 2),
                **mine,
            )
        assert theirs.num_parameters() == sum(p.numel() for p in ours.parameters()) == count
        layout, s = structure(theirs.state_dict(), "memory")
        table = list(rows(s._replace(attention=(0, 1, 2)), layout, 1, mine["context_dim"]))
        assert {key for _, keys, _ in table for key in keys} == set(theirs.state_dict())
        assert {name: shape for name, _, shape in table} == (
            {k: tuple(v.shape) for k, v in ours.state_dict().items()}
        )


# -------------------------------------------------------------------------------- CompVis's names


def test_the_list_of_compvis_names_is_that_of_stable_diffusion():
    shapes = compvis(320, (1, 2, 4, 4), 2, (1, 2, 4), 768)
    assert len(shapes) == 686 and sum(map(math.prod, shapes.values())) == 859_520_964


SMALL = dict(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, context_dim=12)
OF_DIFFUSERS = dict(
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    cross_attention_dim=12,
    down_block_types=(DOWN, CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP, UP),
)


def by_diffusers(published_unet, state, heads, **changes):
    """The same weights in diffusers' network, renamed by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    settings = dict(OF_DIFFUSERS, attention_head_dim=heads) | changes
    net = published_unet(**settings)
    net.load_state_dict(convert_ldm_unet_checkpoint(dict(state), dict(net.config)))
    return net.eval()


@pytest.mark.parametrize("form", ["net.safetensors", "net.ckpt", "alone.safetensors"])
def test_compvis_weights_of_text_compute_the_same(form, tmp_path, published_unet):
    state = random(compvis(**SMALL, attention=(2,)))
    other = {"first_stage_model.quant_conv.weight": torch.ones(3), "betas": torch.ones(9)}
    path = tmp_path / form
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state | other, "global_step": 7}, path)
    elif form == "alone.safetensors":  # the U-Net and nothing else
        save_file({k.removeprefix("model.diffusion_model."): v for k, v in state.items()}, path)
    else:
        save_file(state | other, path)
    found = load_latent_unet(path)
    assert found["num_classes"] is None and found["settings"] == dict(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        num_heads=8,
        num_head_channels=0,
        transformer_depth=1,
        context_dim=12,
        norm_groups=32,
    )
    found = load_latent_unet(path, num_heads=2, norm_groups=16)
    theirs = by_diffusers(published_unet, state, 2, norm_num_groups=16)
    assert_same(rebuilt(found), theirs, (8, 8), text(12))


def test_compvis_weights_of_classes_compute_the_same(tmp_path, published_unet):
    """As LDM's network for ImageNet: a class is one token, the last row means "no label"."""
    state = random(compvis(**SMALL, attention=(2,), channels=3, classes=11))
    save_file(state, tmp_path / "net.safetensors")
    found = load_latent_unet(tmp_path / "net.safetensors")
    assert (found["num_classes"], found["channels"], found["settings"]["num_heads"]) == (10, 3, 1)
    unet = {k: v for k, v in state.items() if k.startswith("model.")}
    theirs = by_diffusers(published_unet, unet, 1, in_channels=3, out_channels=3)
    table = state["cond_stage_model.embedding.weight"]
    for y, same in ((torch.tensor([4, 0, 10]), [4, 0, 10]), (None, [10, 10, 10])):
        tokens = table[same][:, None]  # (3,1,12)
        assert_same(rebuilt(found), theirs, (8, 8), tokens, y=y)


def test_the_running_mean_is_taken_where_a_checkpoint_has_one(tmp_path):
    shapes = compvis(**SMALL, attention=(2,))
    now, mean = random(shapes), random(shapes, seed=1)
    names = {k: k.removeprefix("model.").replace(".", "") for k in shapes}
    both = now | {f"model_ema.{names[k]}": v for k, v in mean.items()}
    both |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    save_file(both, tmp_path / "both.safetensors")
    save_file(mean, tmp_path / "mean.safetensors")
    got = load_latent_unet(tmp_path / "both.safetensors")["state"]
    expected = load_latent_unet(tmp_path / "mean.safetensors")["state"]
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert load_latent_unet(tmp_path / "both.safetensors")["averaged"] is True
    assert load_latent_unet(tmp_path / "mean.safetensors")["averaged"] is False


@pytest.mark.parametrize("kept", [1, -1], ids=["one is there", "one is not"])
def test_a_part_of_the_running_means_is_refused(tmp_path, kept):
    now = random(compvis(**SMALL, attention=(2,)))
    names = {k: f"model_ema.{k.removeprefix('model.').replace('.', '')}" for k in now}
    means = [(names[k], value + 1) for k, value in now.items()]
    save_file(now | dict(means[:kept]), tmp_path / "sd.safetensors")
    lacking = [name for name, _ in means[kept:]]
    words = f"lacks {len(lacking)} of {len(now)} running means, first {min(lacking)}: expected all"
    with pytest.raises(BadInput, match=words):
        load_latent_unet(tmp_path / "sd.safetensors")


# ----------------------------------------------------------------------------- files, and refusals


V = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"  # joined to to_k's


@pytest.fixture(scope="module")
def folder(tmp_path_factory, published_unet):
    path = tmp_path_factory.mktemp("published")
    randomised(published_unet(**THEIRS["SD 2"])).save_pretrained(path)
    return path


def altered(folder, tmp_path, config=None, weights=None):
    """A copy of the folder, with config.json updated and `weights` run on its tensors."""
    told = json.loads((folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(told))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state = weights(state) if weights else state
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("form", ["net.safetensors", "net.bin"])
def test_a_single_file_is_enough_and_keywords_tell_the_rest(folder, tmp_path, form):
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    path = tmp_path / form
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    published = load_latent_unet(path)["settings"]  # Stable Diffusion 2's, by the matrices
    assert (published["num_head_channels"], published["norm_groups"]) == (64, 32)
    found, expected = (
        load_latent_unet(path, num_head_channels=8, norm_groups=4),
        load_latent_unet(folder),
    )
    assert found["settings"] | dict(num_heads=2) == expected["settings"]
    assert all(torch.equal(v, expected["state"][k]) for k, v in found["state"].items())


@pytest.mark.parametrize(
    "config, word",
    [
        (dict(_class_name="UNet2DModel"), "UNet2DModel"),
        (dict(addition_embed_type="text_time"), "addition_embed_type 'text_time'"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift 'scale_shift'"),
        (dict(only_cross_attention=True), "only_cross_attention True"),
        (dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]), "AttnDownBlock2D"),
        (dict(attention_head_dim=[3]), "attention_head_dim"),
        (dict(attention_head_dim=[2, 2.5]), "neither one number"),
        (dict(attention_head_dim=[4, 2]), "neither one number"),
        (dict(attention_head_dim=7), "attention_head_dim 7 must be a divisor of"),
        (dict(attention_head_dim=-1), "attention_head_dim -1 must be a divisor of"),
        *(
            (
                dict(norm_num_groups=groups),
                f"norm_num_groups {groups!r} must be a whole number that",
            )
            for groups in ("a", 7, 0, -4, 4.0, None, [4], True)
        ),
    ],
)
def test_settings_without_a_counterpart_are_refused(folder, tmp_path, config, word):
    with pytest.raises(BadInput, match="config.json") as told:
        load_latent_unet(altered(folder, tmp_path, config))
    assert word in str(told.value)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda s: {k: v for k, v in s.items() if "norm3" not in k}, "lacks .*norm3"),
        (lambda s: s | {"class_embedding.weight": torch.ones(3, 64)}, "no place for: class_emb"),
        (lambda s: s | {"conv_in.weight": torch.ones(16, 9, 3, 3)}, "makes 4 channels of 9"),
        (lambda s: s | {"conv_norm_out.weight": torch.ones(17)}, r"conv_norm_out.*\(17,\)"),
        (lambda s: s | {V: torch.ones(16, 3)}, r"to_v.weight is \(16, 3\), expected \(16, 20\)"),
        (lambda s: {k: v for k, v in s.items() if "attn2" not in k}, "no U-Net of latent"),
        (lambda s: {"weight": torch.ones(2)}, "no U-Net"),
        (lambda s: s | {"conv_out.bias": torch.ones(4).to(torch.int8)}, "is quantised, .* is int8"),
        (lambda s: {k: v.to(torch.uint8) for k, v in s.items()}, "is quantised, .* is uint8"),
        (lambda s: {k: v > 0 for k, v in s.items()}, "is quantised, .* is bool"),
    ],
)
def test_weights_of_other_networks_are_refused(folder, tmp_path, change, word):
    with pytest.raises(BadInput, match=f"safetensors.*{word}"):
        load_latent_unet(altered(folder, tmp_path, weights=change))


def test_files_that_hold_no_weights_are_refused(tmp_path):
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(b"not a checkpoint")
    with pytest.raises(BadInput, match=r"torn.ckpt is no file of plain tensors"):
        load_latent_unet(torn)
    torch.save({"state_dict": {"a": 1}}, torn)
    with pytest.raises(BadInput, match="torn.ckpt is not a state_dict"):
        load_latent_unet(torn)
    with pytest.raises(BadInput, match="no such file"):
        load_latent_unet(tmp_path / "none")


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_file_is_never_executed(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callback": Harmful()}, tmp_path / "net.ckpt")
    with pytest.raises(BadInput, match="saved without Python objects"):
        load_latent_unet(tmp_path / "net.ckpt")
    assert "executed" not in capsys.readouterr().out
