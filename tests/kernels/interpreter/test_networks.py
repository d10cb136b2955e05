"""Whole networks of the chapters through the kernels: equal to the references, and trainable."""

from runtime.files import read_log

import sys
from functools import partial

import pytest
import torch
from launching import start_ranks, succeed
from recording import interpreted_launches

import ddim
import ddpm_pixel
import dpm_solver
import improved_ddpm
import ldm_cfg
from dit import DiT
from networks import adm_unet
from networks.kl_autoencoder import KLVAE
from networks.noisy_classifier import NoisyClassifier
from networks.sd_unet import LatentUNet
from networks.small_autoencoder import Autoencoder

OPERATIONS = ["attention", "group_norm_silu", "sampling_update"]


@pytest.fixture
def references(monkeypatch):
    """Call it to send every later operation to its PyTorch reference."""

    def use():
        for name in OPERATIONS:
            monkeypatch.setattr(sys.modules[f"kernels.{name}"], "use_kernels", lambda x: False)

    return use


@pytest.fixture
def launched():
    """(name, grid) of the kernels launched so far."""
    with interpreted_launches() as launches:
        yield launches


def waken(net):
    """Zero-initialised layers would hide what lies behind them."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.to(memory_format=torch.channels_last)


SMALL = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (6,)}


def pixel():
    net = ddpm_pixel.UNet((3, 12, 20), 4, ddpm_pixel.Config(**SMALL, num_heads=2))
    return waken(net), torch.randn(2, 3, 12, 20)


def adm():
    net = adm_unet.UNet(
        (3, 12, 20),
        4,
        **SMALL,
        num_res_blocks=1,
        num_head_channels=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
        learn_sigma=True,
    )
    return waken(net), torch.randn(2, 3, 12, 20)


def classifier():
    """Its pool has one query and many keys."""
    net = NoisyClassifier((3, 12, 20), 4, **SMALL, num_res_blocks=1, num_head_channels=8)
    return waken(net), torch.randn(2, 3, 12, 20)


def latent():
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,)}
    net = ldm_cfg.UNet((4, 7, 5), 4, ldm_cfg.Config(**sizes, num_heads=2))
    return waken(net), torch.randn(2, 4, 7, 5)


def stable_diffusion():
    sizes = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    net = LatentUNet(4, 4, **sizes, attention_levels=(1,), num_heads=2, context_dim=16)
    return waken(net), torch.randn(2, 4, 7, 5)


def transformer():
    net = DiT((4, 6, 4), 4, hidden_size=32, depth=1, num_heads=2, patch_size=2)
    return waken(net), torch.randn(2, 4, 6, 4)


NETWORKS = [pixel, adm, classifier, latent, stable_diffusion, transformer]


def run(net, x):
    """Output, and the gradient of every parameter and of the input."""
    x = x.to(memory_format=torch.channels_last).detach().requires_grad_()
    labels = [] if isinstance(net, NoisyClassifier) else [torch.tensor([1, 4])]
    out = net(x, torch.tensor([3, 700]), *labels)
    torch.manual_seed(1)
    (out * torch.randn(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    return {"output": out.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_unet_through_the_kernels_equals_the_references(build, references, launched):
    net, x = build()
    ours = run(net, x)
    count, seen = len(launched), {name for name, _ in launched}
    references()
    expected = run(net, x)
    assert len(launched) == count  # the second run used no kernel
    norms = sum(isinstance(part, torch.nn.GroupNorm) for part in net.modules())
    attentions = sum(hasattr(part, "qkv") for part in net.modules())
    assert count >= 2 * norms + 3 * attentions and len(seen) >= (5 if norms else 3), seen
    for name, value in expected.items():
        worst = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert worst < 1e-5, (name, float(worst))


@pytest.mark.parametrize("kind", ["kl", "ldm"])
def test_autoencoder_through_the_kernels_equals_the_references(kind, references, launched):
    sizes = {"model_channels": 16, "num_res_blocks": 1, "z_channels": 4}
    ae = waken(
        Autoencoder(3, patch=2, channel_mult=(1, 2), **sizes)
        if kind == "kl"
        else KLVAE(3, channel_mult=(1, 1, 2), **sizes)
    )
    torch.manual_seed(2)
    x, noise = torch.randn(2, 3, 12, 20), torch.randn(2, 4, 3, 5)
    ours = [*ae(x, noise)]
    assert launched
    references()
    for a, b in zip(ours, ae(x, noise), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp(min=1)


large = partial(ddpm_pixel.ancestral_row, variance="large")
learned = partial(improved_ddpm.learned_row, floor=-9.0)
SAMPLERS = {
    "ancestral": ddpm_pixel.sample,
    "ddim": ddim.sample,
    "guided": partial(ddpm_pixel.sample, w=1.5),
    "large": partial(ddpm_pixel.sample, make_row=large),
    "learned": partial(ddpm_pixel.sample, make_row=learned),
    "dpmpp": partial(dpm_solver.sample, "dpmpp"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_through_the_kernels_equal_the_references(name, references, launched):
    net, _ = adm() if name == "learned" else pixel()
    net.conv_out.weight.data.mul_(0.1)  # an untrained network's chain would amplify roundings
    alpha_bar = ddpm_pixel.make_alpha_bar("cosine", 100)
    pairs = [(70, 40), (40, 10), (10, -1)]  # nearer to T, eq. 15 divides roundings by 0.001
    seeds, y = torch.tensor([17, -3]), torch.tensor([0, 2])

    def draw():
        trajectory = SAMPLERS[name](net, alpha_bar, pairs, (3, 12, 20), seeds, y)
        return [x for x, _ in trajectory]

    ours = draw()
    assert [kernel for kernel, _ in launched].count("_update_kernel") >= 3
    references()
    for a, b in zip(ours, draw(), strict=True):
        assert a.stride() == b.stride()
        assert (a - b).abs().max() < 2e-5


SHORT = ["--batch-size", "2", "--sample-every", "0", "--sample-steps", "1", "--seeds", "0"]


def losses(folder):
    return [row["loss"] for row in read_log(folder / "log.jsonl")]


def test_two_processes_train_chapter_1_through_the_kernels_as_one(toy, tiny, tmp_path):
    net = ["--model-channels", "16", "--channel-mult", "1", "2", "--attention-resolutions", "8"]
    flags = [*tiny["ddpm_pixel"], *toy, *SHORT, *net, "--steps", "3"]
    succeed("ddpm_pixel", *flags, "--out", tmp_path / "one")
    ranks = start_ranks("ddpm_pixel", *flags, "--out", tmp_path / "two")
    for done in [rank.wait() for rank in ranks]:
        assert done.code == 0, done.err
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-5)


def test_chapter_3_runs_through_the_kernels(toy, tiny, tmp_path):
    first_stage = ["--patch", "2", "--ae-channels", "16", "--ae-blocks", "1", "--ae-steps", "2"]
    net = ["--model-channels", "16", "--num-heads", "2"]
    flags = [*tiny["ldm_cfg"], *toy, *SHORT, *first_stage, *net, "--steps", "2"]
    succeed("ldm_cfg", *flags, "--out", tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "samples.png").exists()
