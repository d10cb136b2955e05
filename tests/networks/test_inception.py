"""Inception and its features against the networks and resizers that pytorch-fid and others ship.

The published weights are not needed: all networks get the same random ones, in their layout.
"""

from runtime.commandline import BadInput

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_metrics import import_references, pytorch_fid_network, random_weights

from evaluation import inception_features
from evaluation.inception_features import PROTOCOLS, Extractor, load, resize, resize_matrix
from networks.inception import Conv, Inception

import_references()


@pytest.fixture(scope="module")
def state():
    return random_weights(0)


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """The state as a file, and as old files are: without the counts of batches."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def reference(state):
    """pytorch-fid's network on (B, 3, H, W) in [-1, 1]."""
    return pytorch_fid_network(state, resize_input=False, normalize_input=False)


@pytest.fixture(scope="module")
def net(state):
    """Ours, as the paper has it: batch norms and all."""
    net = Inception()
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def pictures(n, height=40, width=52, seed=0):
    """uint8 (n, height, width, 3): smooth shapes in colour, and grain; 0 and 255 occur."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 5, generator=generator)
    grain = torch.randn(n, 3, height, width, generator=generator)
    x = 128 + 90 * F.interpolate(coarse, (height, width), mode="bicubic") + 20 * grain
    return x.clamp(0, 255).byte().permute(0, 2, 3, 1)


def planes(images):
    return images.permute(0, 3, 1, 2).float()  # (B, C, H, W) in 0..255


def error(found, expected):
    """‖found − expected‖ ÷ ‖expected‖ of the image where it is largest."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# ------------------------------------------------------------------------------------- resizing


def reference_resize(images, protocol):
    if protocol == "pytorch-fid":
        return F.interpolate(planes(images), (299, 299), mode="bilinear", align_corners=False)
    if protocol == "tf1":
        from torch_fidelity import interpolate_compat_tensorflow as tf1

        return tf1.interpolate_bilinear_2d_like_tensorflow1x(
            planes(images), (299, 299), align_corners=False
        )
    from cleanfid.resize import build_resizer

    resizer = build_resizer("clean")
    return planes(torch.from_numpy(np.stack([resizer(image.numpy()) for image in images])))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "size", [(32, 32), (28, 31), (64, 300), (298, 1), (512, 299), (1024, 401)], ids=str
)
def test_resizing_is_that_of_the_reference(size, protocol):
    # Noise of the full range is the hardest. 5e-7 was seen; where a compiler rounds a product
    # before it adds, as it need not, pytorch-fid's coordinates make 1.4e-5 of it at 1024 pixels.
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)
    matrices = [resize_matrix(n, 299, protocol).float() for n in size]
    found = resize(planes(images), matrices, protocol)  # in [-1, 1]
    expected = reference_resize(images, protocol)
    expected = expected / 127.5 - 1 if protocol == "pytorch-fid" else (expected - 128) / 128
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_plain_image_stays_plain_and_one_of_full_size_as_it_is(protocol):
    for n in (1, 5, 150, 700):
        sums = resize_matrix(n, 299, protocol).sum(1)
        torch.testing.assert_close(sums, torch.ones(299, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(resize_matrix(299, 299, protocol), torch.eye(299, dtype=torch.float64))


# ----------------------------------------------------------------------------------- the network
#
# 3e-6 to 2e-5 was seen. Both networks are as far from float64: a norm of random weights often
# divides by a small deviation, which amplifies rounding.
CLOSE = 5e-5


def test_features_are_those_of_pytorch_fid_as_it_ships(state, weights):
    images = pictures(2)
    theirs = pytorch_fid_network(state)
    with torch.no_grad():
        expected = theirs(planes(images) / 255)[0][:, :, 0, 0]
    features, logits = load(weights, resize="pytorch-fid")(images)
    assert error(features, expected) < CLOSE
    assert error(logits, expected @ state["fc.weight"].T) < CLOSE


def test_features_and_logits_are_those_of_torch_fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(weights))
    images = pictures(2)
    found = load(weights, resize="tf1")(images)
    for mine, expected in zip(found, theirs(images.permute(0, 3, 1, 2)), strict=True):
        assert error(mine, expected) < CLOSE


def test_features_are_those_of_clean_fid(state, reference):
    images = pictures(2, 310, 32)
    with torch.no_grad():
        x = (reference_resize(images, "clean") - 128) / 128
        expected = reference(x)[0][:, :, 0, 0]
    features, _ = Extractor(state, resize="clean")(images)
    assert error(features, expected) < CLOSE


def test_the_network_of_torchvision_has_none_of_the_quirks(tmp_path):
    import torchvision

    state = random_weights(1, "torchvision")
    torch.save(state, tmp_path / "theirs.pth")
    theirs = torchvision.models.inception_v3(weights=None, init_weights=False).eval()
    theirs.load_state_dict(state)
    pooled = []
    theirs.avgpool.register_forward_hook(lambda module, args, y: pooled.append(y.flatten(1)))
    images = pictures(2, 299, 299)
    with torch.no_grad():
        classes = theirs(planes(images) / 127.5 - 1)
    extractor = load(tmp_path / "theirs.pth")
    features, logits = extractor(images)
    assert "torchvision" in extractor.protocol and logits.shape == (2, 1000)
    assert error(features, pooled[0]) < CLOSE
    assert error(logits, classes) < CLOSE


def test_every_quirk_is_there_and_matters(net, reference):
    """At 107 pixels, which the network also takes, to be quick."""
    x = planes(pictures(2, 107, 107)) / 127.5 - 1
    with torch.no_grad():
        expected = reference(x)[0][:, :, 0, 0]
    assert error(net(x)[0], expected) < CLOSE
    blocks = {name: m for name, m in net.named_children() if name.startswith("Mixed")}
    changed = [name for name, block in blocks.items() if block.pool != "halve"]
    assert len(changed) == 9 and blocks["Mixed_7c"].pool == "maximum"
    for name in changed:
        pool, blocks[name].pool = blocks[name].pool, "average"
        assert error(net(x)[0], expected) > 2000 * CLOSE, name
        blocks[name].pool = pool


def test_names_and_shapes_are_those_of_pytorch_fid(net, state):
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in state.items()}


def test_spatial_features_are_seven_channels_of_a_middle_layer(state, reference):
    seen = []
    layer = reference.blocks[2][6].branch1x1
    hook = layer.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    images = pictures(1, 299, 299)
    with torch.no_grad():
        reference(planes(images) / 127.5 - 1)
    hook.remove()
    spatial = Extractor(state)(images, spatial=True)[2]
    expected = seen[0].permute(0, 2, 3, 1)[..., :7]  # as TensorFlow has it: (B, 17, 17, channels)
    assert error(spatial, expected.reshape(1, 17 * 17 * 7)) < CLOSE


def test_folding_changes_nothing_but_the_rounding(state):
    net = Inception()
    net.load_state_dict(state)
    net = net.double().eval().requires_grad_(False)
    x = planes(pictures(1, 80, 80)).double() / 127.5 - 1
    plain = net(x)
    folded = net.fold()(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert sum(isinstance(m, Conv) for m in net.modules()) == 94
    for mine, expected in zip(folded, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------- the extractor


def test_features_do_not_depend_on_the_batch(state, monkeypatch):
    monkeypatch.setattr(inception_features, "AT_ONCE", 8)
    images, extractor = pictures(20), Extractor(state)
    together, alone = extractor(images), extractor(images[17:18])
    for mine, expected in zip(alone, together, strict=True):
        assert len(expected) == 20
        assert error(mine, expected[17:18]) < CLOSE
    assert error(together[0][16:17], together[0][17:18]) > 1000 * CLOSE  # images do differ


def test_gray_is_colour_with_three_equal_channels(state):
    images = pictures(1)[..., :1]
    features = [Extractor(state, resize="tf1")(x)[0] for x in (images, images.expand(1, 40, 52, 3))]
    assert torch.equal(*features)


def test_features_are_exact_inside_the_autocast_of_training(state):
    images, extractor = pictures(1), Extractor(state)
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(images)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, extractor(images)[0])


def test_the_hash_tells_weights_and_protocols_apart(state, weights):
    hashes = [Extractor(state, resize=protocol).feature_hash for protocol in PROTOCOLS]
    other = {**state, "Mixed_7c.branch_pool.bn.bias": state["Mixed_7c.branch_pool.bn.bias"] + 1e-6}
    hashes.append(Extractor(other).feature_hash)
    assert len(set(hashes)) == 4 and all(len(h) == 8 and int(h, 16) >= 0 for h in hashes)
    loaded = load(weights)
    assert loaded.feature_hash == hashes[0]
    assert loaded.protocol == (
        f"Inception 2015-12-05, 2048-d, resize pytorch-fid, weights random.pth, "
        f"feature hash {hashes[0]}"
    )


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 8, 8, 4, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3),
    ],
    ids=["four-channels", "channels-first", "one-image", "float"],
)
def test_images_of_another_form_are_refused(images, state):
    with pytest.raises(BadInput, match=r"expected images uint8 \(B, H, W, C\) with C 1 or 3, got"):
        Extractor(state)(images)
