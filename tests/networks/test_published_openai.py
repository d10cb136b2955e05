"""OpenAI's .pt files: names and shapes of the published networks, and what they compute."""

from runtime.commandline import BadInput

import pytest
import torch
from openai_unet import forward, published, weights

from networks.adm_unet import UNet
from networks.published.unet import load_published, published_defaults
from networks.published.unet_names import from_published, structure

# By the flags in their READMEs: image size, heads, order, and millions of parameters where stated
# (the third's name says 270; the others in the hyperparameters of Dhariwal & Nichol 2021).
PUBLISHED = {
    "cifar10_uncond_50M": (
        dict(model_channels=128, channel_mult=(1, 2, 2, 2), attention=(2, 4)),
        32,
        4,
        False,
        0,
    ),
    "imagenet64_uncond": (
        dict(model_channels=128, channel_mult=(1, 2, 3, 4), attention=(4, 8)),
        64,
        4,
        False,
        0,
    ),
    "imagenet64_cond_270M": (
        dict(model_channels=192, channel_mult=(1, 2, 3, 4), attention=(4, 8), classes=1000),
        64,
        4,
        False,
        273,
    ),
    "lsun_uncond_100M": (
        dict(
            model_channels=128,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention=(16,),
            use_scale_shift_norm=False,
        ),
        256,
        1,
        False,
        0,
    ),
    "64x64_diffusion": (
        dict(
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            attention=(2, 4, 8),
            classes=1000,
            resblock_updown=True,
        ),
        64,
        "64 channels",
        True,
        296,
    ),
    "128x128_diffusion": (
        dict(
            model_channels=256,
            channel_mult=(1, 1, 2, 3, 4),
            num_res_blocks=2,
            attention=(4, 8, 16),
            classes=1000,
            resblock_updown=True,
        ),
        128,
        4,
        False,
        422,
    ),
    "256x256_diffusion": (
        dict(
            model_channels=256,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention=(8, 16, 32),
            classes=1000,
            resblock_updown=True,
        ),
        256,
        "64 channels",
        False,
        554,
    ),
    "512x512_diffusion": (
        dict(
            model_channels=256,
            channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention=(16, 32, 64),
            classes=1000,
            resblock_updown=True,
        ),
        512,
        "64 channels",
        False,
        559,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_are_recognised_and_have_our_shapes(name):
    config, size, heads, new_order, millions = PUBLISHED[name]
    config = {"num_res_blocks": 3, **config}
    state = {k: torch.empty(v, device="meta") for k, v in published(**config).items()}
    if millions:
        assert round(sum(v.numel() for v in state.values()) / 1e6) == millions
    layout, s = structure(state, name)
    told = published_defaults(layout, s)
    assert (told["size"], told["new_order"], told["norm_groups"]) == (size, new_order, 32)
    assert told["num_head_channels"] == 64 if heads == "64 channels" else told["num_heads"] == heads

    settings = {k: config[k] for k in ("model_channels", "channel_mult", "num_res_blocks")}
    settings |= {k: told[k] for k in ("style", "norm_groups", "num_heads", "num_head_channels")}
    with torch.device("meta"):
        net = UNet(
            (3, size, size),
            config.get("classes", 0),
            learn_sigma=True,
            **settings,
            attention_resolutions=[size // ds for ds in config["attention"]],
            use_scale_shift_norm=config.get("use_scale_shift_norm", True),
            resblock_updown=config.get("resblock_updown", False),
        )
    expected = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    if net.label is not None:  # theirs have no row for "no label"
        expected["label.weight"] = (1000, 4 * config["model_channels"])
    found = from_published(state, layout, s, name)
    assert {k: tuple(v.shape) for k, v in found.items()} == expected


def test_names_and_shapes_of_the_64x64_network():
    """A few of the tensors of 64x64_diffusion.pt, spelled out."""
    shapes = published(**{"num_res_blocks": 3, **PUBLISHED["64x64_diffusion"][0]})
    for name, shape in {
        "time_embed.0.weight": (768, 192),
        "label_emb.weight": (1000, 768),
        "input_blocks.0.0.weight": (192, 3, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (384, 768),
        "input_blocks.4.0.in_layers.2.weight": (192, 192, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (384, 192, 1, 1),
        "input_blocks.5.1.qkv.weight": (1152, 384, 1),
        "middle_block.1.qkv.weight": (2304, 768, 1),
        "output_blocks.0.0.in_layers.0.weight": (1536,),
        "output_blocks.3.2.out_layers.3.weight": (768, 768, 3, 3),
        "output_blocks.15.0.in_layers.2.weight": (192, 384, 3, 3),
        "out.2.weight": (6, 192, 3, 3),
    }.items():
        assert shapes[name] == shape
    assert "input_blocks.1.1.qkv.weight" not in shapes and "input_blocks.16.0.op.bias" not in shapes


SMALL = dict(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
CASES = {
    "improved": (SMALL, dict(num_heads=4)),
    "improved, no scale and shift": (
        dict(SMALL, use_scale_shift_norm=False, out=3, num_res_blocks=2),
        dict(num_heads=2),
    ),
    "guided": (
        dict(SMALL, attention=(1, 2), resblock_updown=True, classes=3),
        dict(num_head_channels=32, new_order=True),
    ),
    "guided, first order": (
        dict(SMALL, resblock_updown=True, channel_mult=(1, 1, 2), attention=(4,)),
        dict(num_head_channels=32),
    ),
    "a narrow first level": (
        dict(SMALL, model_channels=128, channel_mult=(0.5, 1), resblock_updown=True),
        dict(num_heads=4, num_head_channels=0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_openai_weights_compute_the_same_here(name, tmp_path):
    config, keywords = CASES[name]
    state = weights(published(**config))
    torch.save(state, tmp_path / "model.pt")
    found = load_published(tmp_path / "model.pt", size=(8, 12), **keywords)
    net = UNet(found["shape"], found["num_classes"], **found["settings"]).eval()
    net.load_state_dict(found["state"])
    assert net.settings["learn_sigma"] == (config.get("out", 6) == 6)
    assert not found["null_label"]

    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)).double()
    t, y = torch.tensor([3, 999]), torch.tensor([0, 2]) if net.label is not None else None

    def heads_of(channels):
        per = keywords.get("num_head_channels")
        return channels // per if per else keywords["num_heads"]

    doubled = {k: v.double() for k, v in state.items()}
    expected = forward(doubled, x, t, y, heads_of, keywords.get("new_order", False))
    assert expected.std() > 0.1
    with torch.no_grad():
        assert (net.double()(x, t, y) - expected).abs().max() < 1e-11 * expected.std()
        single = net.float()(x.float(), t, y)
        assert (single - expected).abs().max() < 1e-5 * expected.std()
        other = forward(doubled, x, t, y, heads_of, not keywords.get("new_order", False))
    assert (other - expected).abs().max() > 1e-3  # the order of the heads would be noticed


def test_a_network_that_never_learned_no_label_has_a_zero_row_for_it(tmp_path):
    state = weights(published(**SMALL, classes=3))
    torch.save(state, tmp_path / "model.pt")
    found = load_published(tmp_path / "model.pt", size=8)
    assert found["num_classes"] == 3 and not found["null_label"]
    assert torch.equal(found["state"]["label.weight"][:3], state["label_emb.weight"])
    assert not found["state"]["label.weight"][3].any()
    learned = load_published(tmp_path / "model.pt", size=8, null_label=True)
    assert learned["num_classes"] == 2 and learned["null_label"]


def damaged(change):
    state = weights(published(**SMALL))
    change(state)
    return state


REFUSED = {
    "lacks": (lambda s: s.pop("middle_block.1.qkv.bias"), {}, "middle_block.1.qkv.bias"),
    "adds": (lambda s: s.update(extra=torch.zeros(1)), {}, "no place for: extra"),
    "shape": (lambda s: s.update({"out.0.bias": torch.zeros(9)}), {}, "out.0.bias is"),
    "channels": (lambda s: s.update({"out.2.weight": torch.zeros(4, 64, 3, 3)}), {}, "4 channels"),
    "encoder": (lambda s: [s.pop(k) for k in list(s) if k.startswith("out")], {}, "no U-Net"),
    "size": (lambda s: None, {"size": None}, "--size 32"),
    "odd size": (lambda s: None, {"size": (8, 9)}, "8x9"),
    "heads": (lambda s: None, {"num_heads": 3}, "heads 3"),
    "no tensors": (lambda s: (s.clear(), s.update(step=3)), {}, "not a state_dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_network_is_refused_by_name(name, tmp_path):
    change, keywords, message = REFUSED[name]
    torch.save(damaged(change), tmp_path / "model.pt")
    with pytest.raises(BadInput, match=message):
        load_published(tmp_path / "model.pt", **{"size": 8, **keywords})


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"x": Code()}, tmp_path / "model.pt")
    with pytest.raises(BadInput, match="no file of plain tensors"):
        load_published(tmp_path / "model.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:100])
    with pytest.raises(BadInput, match="torn"):
        load_published(tmp_path / "torn.pt")
