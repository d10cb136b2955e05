"""OpenAI's classifiers of noisy images: what their files hold, and what they compute."""

from runtime.commandline import BadInput

import pytest
import torch
from openai_unet import classify, published, weights

from networks.adm_unet import UNet
from networks.noisy_classifier import NoisyClassifier
from networks.published.classifier import read_classifier, rows, structure
from networks.published.unet import channel_mult, read_network, save_diffusers
from networks.published.unet_names import converted

# By the flags in their README: levels and depth, and the parameters of what their constructor
# makes. All attend at heights 32, 16 and 8, and pool 8 x 8 positions.
PUBLISHED = {
    64: ((1, 2, 3, 4), 4, 65_438_568),
    128: ((1, 1, 2, 3, 4), 2, 42_568_040),
    256: ((1, 1, 2, 2, 4, 4), 2, 54_096_360),
    512: ((0.5, 1, 1, 2, 2, 4, 4), 2, 54_448_360),
}


def layout(size, width=128, pool=8, **changes):
    """{name: shape} of a published classifier for images of this size."""
    mult, depth, _ = PUBLISHED[size]
    settings = dict(attention=[size // r for r in (32, 16, 8)], resblock_updown=True, out=1000)
    return published(width, mult, depth, pool=pool, **{**settings, **changes})


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_classifiers_are_recognised_and_have_our_shapes(size):
    mult, depth, parameters = PUBLISHED[size]
    state = {k: torch.empty(v, device="meta") for k, v in layout(size).items()}
    assert sum(value.numel() for value in state.values()) == parameters
    s, side = structure(state, "memory")
    assert (s.width, channel_mult(s), s.blocks, side) == (128, mult, depth, 8)
    assert [size >> level for level in s.attention] == [32, 16, 8]
    assert (s.out, s.use_scale_shift_norm, s.resblock_updown) == (1000, True, True)
    with torch.device("meta"):
        net = NoisyClassifier(
            (3, size, size),
            1000,
            model_channels=128,
            channel_mult=mult,
            num_res_blocks=depth,
            attention_resolutions=(32, 16, 8),
            num_head_channels=64,
            norm_groups=32,
        )
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = converted(state, "openai", list(rows(s, side)), "memory")
    ours = {name: value.shape for name, value in net.state_dict().items()}
    assert {name: value.shape for name, value in found.items()} == ours


def test_names_and_shapes_of_the_64x64_classifier():
    """A few of the tensors of 64x64_classifier.pt, spelled out."""
    shapes = layout(64)
    for name, shape in {
        "time_embed.0.weight": (512, 128),
        "input_blocks.0.0.weight": (128, 3, 3, 3),
        "input_blocks.5.0.out_layers.3.weight": (128, 128, 3, 3),
        "input_blocks.6.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.6.1.qkv.weight": (768, 256, 1),
        "input_blocks.19.1.proj_out.bias": (512,),
        "middle_block.1.qkv.weight": (1536, 512, 1),
        "out.0.weight": (512,),
        "out.2.positional_embedding": (512, 65),
        "out.2.qkv_proj.weight": (1536, 512, 1),
        "out.2.c_proj.weight": (1000, 512, 1),
    }.items():
        assert shapes[name] == shape
    assert "input_blocks.5.1.qkv.weight" not in shapes and "input_blocks.20.0.op.bias" not in shapes


SMALL = dict(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), out=10)
NARROW = {  # {name: (shapes, image size, residual blocks of a level, images)}
    "64": (layout(64, 64, 2, out=10), 16, 4, 2),
    "128": (layout(128, 64, 2, out=10), 32, 2, 1),
    "256": (layout(256, 64, 1, out=10), 32, 2, 1),
    "512": (layout(512, 128, 1, out=10), 64, 2, 1),
    "convolutions, added": (published(**SMALL, use_scale_shift_norm=False, pool=3), 6, 1, 2),
}


@pytest.mark.parametrize("name", NARROW)
def test_published_weights_compute_the_same_here(name, tmp_path):
    """Logits, and the gradient with respect to the image, beside those of the independent one."""
    shapes, size, blocks, n = NARROW[name]
    state = weights(shapes)
    torch.save(state, tmp_path / "classifier.pt")
    found = read_classifier(tmp_path / "classifier.pt")
    assert found["shape"] == (3, size, size) and found["class_names"] == list("0123456789")
    assert found["settings"]["resblock_updown"] == found["settings"]["use_scale_shift_norm"]
    assert found["settings"]["use_scale_shift_norm"] == (name != "convolutions, added")
    net = NoisyClassifier(found["shape"], 10, **found["settings"]).eval()
    net.load_state_dict(found["ema"])
    assert net.settings == found["settings"]

    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
    t, y = torch.tensor([3, 999])[:n], torch.tensor([9, 2])[:n]
    doubled = {k: v.double() for k, v in state.items()}

    def gradient(logits, image):
        return torch.autograd.grad(logits.log_softmax(1)[range(n), y].sum(), image)[0]

    x.requires_grad_()
    expected = classify(doubled, x, t, blocks)
    ours = net.double()(x, t)
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-11 * expected.std()
    slope = gradient(expected, x)
    assert (gradient(ours, x) - slope).abs().max() < 1e-11 * slope.std()
    single = net.float()(x.detach().float(), t)
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-5 * expected.std()
    with torch.no_grad():
        other = classify(doubled, x, t, blocks, new_order=True)
    assert (other - expected).abs().max() > 1e-3  # the order of the heads would be noticed


def test_the_file_is_read_in_the_form_of_a_checkpoint(tmp_path):
    path = tmp_path / "classifier.pt"
    torch.save(weights(published(**SMALL, pool=2)), path)
    state = read_classifier(path)
    assert state["script"] == "classifier_guidance" and state["named"] is False
    assert state["config"] == {**state["settings"], "data": "", "ema": []}
    assert state["settings"]["attention_resolutions"] == (2,)  # a height, not a factor
    assert all(value.dtype == torch.float32 for value in state["ema"].values())
    torch.save(state, tmp_path / "ckpt.pt")  # plain enough to be one
    again = read_classifier(tmp_path / "ckpt.pt")
    assert again.keys() == state.keys() and again["settings"] == state["settings"]
    assert all(torch.equal(again["ema"][name], value) for name, value in state["ema"].items())


def bare(levels, depth, attention=(), pool=8, resblock_updown=True):
    """The state of a classifier without weights."""
    shapes = published(
        64, levels, depth, attention, resblock_updown=resblock_updown, out=10, pool=pool
    )
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_levels_that_names_leave_open_are_the_published_ones():
    """18 input blocks in pairs of equal width: 6 levels of 2 blocks, 3 of 5, or 9 of 1."""
    s, side = structure(bare((1, 1, 2, 2, 4, 4), 2), "memory")
    assert (len(s.levels), s.blocks, s.attention, side) == (6, 2, (), 8)
    with pytest.raises(BadInput, match="memory: its 18 input_blocks are not the levels of a known"):
        structure(bare((1, 1, 2, 2, 4, 4), 2, pool=4), "memory")
    s, _ = structure(bare((1, 1, 2, 2, 4, 4), 2, attention=(1, 8), pool=4), "memory")
    assert (len(s.levels), s.blocks, s.attention) == (6, 2, (0, 3))  # attention tells


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_convolution_that_halves_tells_the_levels(depth):
    """Widths and attention do not: of 12 blocks, 2 levels of 5 could be 4 of 2."""
    s, _ = structure(bare((1, 1), depth, resblock_updown=False), "memory")
    assert (len(s.levels), s.blocks, s.resblock_updown) == (2, depth, False)


def test_a_level_of_two_widths_is_none():
    state = bare((1, 2), 2)
    name = "input_blocks.2.0.in_layers.2.weight"
    state[name] = torch.empty(128, *state[name].shape[1:], device="meta")
    with pytest.raises(BadInput, match="its 6 input_blocks are not the levels"):
        structure(state, "memory")


def without(*prefixes):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def adaptive(state):
    """The pool of classifier_pool="adaptive"."""
    return without("out.2")(state) | {"out.3.weight": torch.ones(10, 128, 1, 1)}


REFUSED = {
    "lacks": (without("middle_block.1.qkv.bias"), r"lacks .* middle_block\.1\.qkv\.bias"),
    "adds": (lambda s: s | {"extra": torch.ones(1)}, "no place for: extra"),
    "shape": (lambda s: s | {"out.0.bias": torch.ones(9)}, r"out\.0\.bias is \(9,\)"),
    "no square": (
        lambda s: s | {"out.2.positional_embedding": torch.ones(128, 6)},
        "a column more than a square has pixels",
    ),
    "no columns": (
        lambda s: s | {"out.2.positional_embedding": torch.ones(128, 0)},
        "a column more than a square has pixels",
    ),
    "another pool": (adaptive, "without attention pooling"),
    "no blocks": (
        without("input_blocks.1", "input_blocks.2", "input_blocks.3"),
        r"no classifier .* no input_blocks\.1\.0",
    ),
    "something else": (lambda s: {"input_blocks.0.0.weight": torch.ones(1)}, "no classifier of"),
    "heads": (
        lambda s: weights(published(**{**SMALL, "model_channels": 96}, pool=2)),
        r"\(96, 192\), have no heads of 64 channels",
    ),
    "diffusion": (
        lambda s: weights(published(**{**SMALL, "out": 6})),
        "is a diffusion network, no classifier: name it with --sample",
    ),
    "half": (
        lambda s: {f"a.{k}": v for k, v in s.items()} | {"b": torch.ones(2)},
        "beside it .*'b'",
    ),
    "of another script": (lambda s: {"script": "ddpm_pixel"}, r"by ddpm_pixel\.py, .* --sample"),
    "of no script": (lambda s: {"step": 3}, "written by none of these scripts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_classifier_is_refused_by_name(name, tmp_path):
    change, message = REFUSED[name]
    path = tmp_path / "classifier.pt"
    torch.save(change(weights(published(**SMALL, pool=2))), path)
    with pytest.raises(BadInput, match=message) as refused:
        read_classifier(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_of_diffusers_and_a_missing_file_are_refused(tmp_path):
    settings = dict(model_channels=16, channel_mult=(1,), num_res_blocks=1)
    net = UNet((3, 4, 4), 0, **settings, attention_resolutions=())
    facts = {"alpha_bar": torch.tensor([0.9, 0.5]), "schedule": "other"}
    save_diffusers(tmp_path, net.settings, net.state_dict(), (3, 4, 4), 0, facts)
    with pytest.raises(BadInput, match="is a folder, .* with --sample"):
        read_classifier(tmp_path)
    with pytest.raises(BadInput, match="is a diffusion network, no classifier: .* --sample"):
        read_classifier(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadInput, match="no such file"):
        read_classifier(tmp_path / "absent.pt")


@pytest.mark.parametrize("kind", ["published", "adaptive", "ours"])
def test_a_classifier_is_no_diffusion_network(kind, tmp_path):
    path, state = tmp_path / "classifier.pt", weights(published(**SMALL, pool=2))
    if kind == "ours":
        state = {"script": "classifier_guidance", "config": {}, "ema": {}}
    torch.save(adaptive(state) if kind == "adaptive" else state, path)
    told = (
        rf"classifier of noisy images, .* type python classifier_guidance\.py --classifier {path}"
    )
    for scripts in ((), "ddpm_pixel", ("improved_ddpm", "ddpm_pixel")):
        with pytest.raises(BadInput, match=told):
            read_network(path, scripts)
