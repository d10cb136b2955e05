"""Perceptual distance, discriminator and figures against published packages and closed forms."""

from runtime.commandline import BadInput

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_metrics import import_references

from networks import perceptual
from networks.perceptual import Discriminator, load_perceptual, psnr, ssim


def pair(shape, seed=0):
    """Two images in [-1,1], the second a blurred and noisy version of the first."""
    rng = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(shape, generator=rng) * 2 - 1, scale_factor=3.0)
    y = F.avg_pool2d(x, 3, 1, 1) + 0.1 * torch.randn(x.shape, generator=rng)
    return x, y.clamp(-1, 1)


# -------------------------------------------------------------------------------------- figures


def test_psnr_is_its_formula():
    x = torch.zeros(3, 2, 4, 4)
    y = x + torch.tensor([0.02, 0.2, 0.0]).view(3, 1, 1, 1)
    np.testing.assert_allclose(psnr(x, y), [40, 20, 100], rtol=1e-6)


def ssim_by_loops(x, y):
    """Wang et al. eq. 13 of one channel, window by window, weighted moments about their means."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window, values = window / window.sum(), []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (image[i : i + 11, j : j + 11] for image in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.02**2, 0.06**2
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    return np.mean(values)


def test_ssim_is_its_formula_window_by_window():
    x, y = pair((2, 2, 5, 6))
    channels = zip(
        x.double().numpy().reshape(4, 15, 18), y.double().numpy().reshape(4, 15, 18), strict=True
    )
    expected = np.reshape([ssim_by_loops(*channel) for channel in channels], (2, 2)).mean(1)
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    assert 0.1 < expected[0] < 0.9


def test_ssim_equals_torchmetrics():
    import_references()
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    x, y = pair((4, 3, 11, 9), 1)
    _, places = theirs(y, x, data_range=2.0, return_full_image=True)  # (4,3,33,27), padded
    expected = places[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(x, y).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 8, 11])
def test_ssim_of_small_images_uses_a_smaller_window(side):
    x = torch.rand(2, 1, side, side + 3)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-12)
    assert (ssim(x, x.flip(3)) < 0.99).all()


# -------------------------------------------------------------------------- perceptual distance


@pytest.fixture(scope="module")
def lpips():
    """torchmetrics' LPIPS: its learned weights of channels, and a VGG16 of random weights."""
    import_references()
    from torchmetrics.functional.image import lpips as module
    from torchvision.models import vgg

    torch.manual_seed(0)
    layers = vgg.make_layers(vgg.cfgs["D"])
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_tv_model_features", lambda *_: layers)
        return module._LPIPS(net="vgg", pnet_rand=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_distance_equals_torchmetrics_lpips(channels, lpips, tmp_path):
    torch.save(lpips.state_dict(), tmp_path / "lpips.pth")
    ours = load_perceptual(tmp_path / "lpips.pth", (channels, 36, 48))
    x, y = pair((3, channels, 12, 16))
    with torch.no_grad():
        expected = lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)).flatten()
        torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 0.01 and (ours(x, x) == 0).all()


def test_without_learned_weights_each_channel_counts_one(lpips, tmp_path):
    """The same features as torchvision runs them, compared in float64."""
    slices = [getattr(lpips.net, f"slice{i}") for i in range(1, 6)]
    state = {
        f"features.{name}": value for part in slices for name, value in part.state_dict().items()
    }
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    ours = load_perceptual(tmp_path / "vgg16.pth", (3, 18, 21))
    x, y = pair((2, 3, 6, 7))
    a, b = (lpips.scaling_layer(image) for image in (x, y))
    expected = np.zeros(2)
    with torch.no_grad():
        for part in slices:
            a, b = part(a), part(b)
            units = [v.double().numpy() for v in (a, b)]
            units = [v / np.sqrt((v**2).sum(1, keepdims=True) + 1e-8) for v in units]
            expected += ((units[0] - units[1]) ** 2).sum(1).mean((1, 2))
        np.testing.assert_allclose(ours(x, y), expected, rtol=1e-4)


def small_vgg():
    torch.manual_seed(0)
    state, c_in = {}, 3
    for group in perceptual.GROUPS:
        for place in group:
            state[f"features.{place}.weight"] = torch.randn(4, c_in, 3, 3) / 5
            state[f"features.{place}.bias"] = torch.zeros(4)
            c_in = 4
    return state


def test_gradient_goes_to_the_reconstruction_only_and_is_finite(tmp_path):
    """Even where all features are zero, whose length has no derivative."""
    torch.save(small_vgg(), tmp_path / "vgg.pth")
    distance = load_perceptual(tmp_path / "vgg.pth", (3, 16, 16))
    assert not list(distance.parameters())
    for bias in (0.0, -100.0):
        for i in range(13):
            getattr(distance, f"bias{i}").fill_(bias)
        x, y = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(2, 3, 16, 16)
        y.requires_grad_()
        distance(x, y).sum().backward()
        assert x.grad is None and y.grad.isfinite().all()
        assert bool(y.grad.abs().sum() > 0) == (bias == 0)


LINS = {f"lin{i}.model.1.weight": torch.ones(1, 4, 1, 1) for i in range(5)}
BAD = {
    "lacks features.14.weight": lambda s: s.pop("features.14.bias"),
    "features.2.weight is .*expected .channels, 4, 3, 3": lambda s: s.update(
        {"features.2.weight": torch.zeros(4, 5, 3, 3)}
    ),
    "lin2.model.1.weight has 3 numbers, expected 4": lambda s: s.update(
        LINS | {"lin2.model.1.weight": torch.ones(1, 3, 1, 1)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_another_file_is_refused_by_name(message, tmp_path):
    state = small_vgg()
    BAD[message](state)
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(BadInput, match=message):
        load_perceptual(tmp_path / "vgg.pth", (3, 32, 32))


def test_no_file_a_torn_file_and_images_too_small_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file; name the weights of VGG16"):
        load_perceptual(tmp_path / "vgg.pth", (3, 32, 32))
    (tmp_path / "vgg.pth").write_bytes(b"PK\3\4 torn")
    with pytest.raises(BadInput, match="vgg.pth is no file of plain tensors"):
        load_perceptual(tmp_path / "vgg.pth", (3, 32, 32))
    for shape in ((1, 14, 28), (2, 32, 32)):
        with pytest.raises(BadInput, match="at least 16x16, not"):
            load_perceptual(tmp_path / "vgg.pth", shape)


# -------------------------------------------------------------------------------- discriminator


def test_a_score_sees_a_patch_of_70_by_70():
    net = Discriminator(1, 4)
    for i, layer in enumerate(net.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            net.layers[i] = torch.nn.Identity()  # norms see the whole image
        elif isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.weight, 0.1)
    x = torch.randn(1, 1, 160, 176, requires_grad=True)
    scores = net(x)
    assert scores.shape == (1, 18, 20)
    scores[0, 9, 10].backward()
    rows, columns = (x.grad[0, 0].abs().sum(dim).nonzero().flatten() for dim in (1, 0))
    assert len(rows) == len(columns) == 70
    assert rows[-1] - rows[0] == columns[-1] - columns[0] == 69


def test_a_verdict_does_not_depend_on_the_batch():
    net, x = Discriminator(3, 8), torch.randn(4, 3, 24, 32)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-5, atol=1e-6)
