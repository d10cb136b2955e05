"""The latent cache: what it holds, when it is used again, what training on it is."""

from runtime.commandline import BadInput
from runtime.processes import World

from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_autoencoder import Config

import autoencoder
from image_data import batches, latents
from kernels import gaussian

WORLD = World()
CFG = Config(data="", data_root="", ae_mult=(1,), z_channels=2)  # 8x8 -> 4x4x2


class Pixels:
    """A data set of random gray images of 8x8 in memory."""

    def __init__(self, count=8, key="key"):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        self.labels, self.key, self.name = np.arange(count) % 3, key, "pixels"
        self.channels, self.height, self.width, self.num_classes = 1, 8, 8, 3

    def __len__(self):
        return len(self.images)


def make(cfg=CFG, seed=0):
    torch.manual_seed(seed)
    return autoencoder.make_autoencoder(cfg, (1, 8, 8)).eval().requires_grad_(False)


def test_cached_latents_equal_direct_ones_and_have_unit_variance(tmp_path):
    ds, ae = Pixels(), make()
    cfg = replace(CFG, out=str(tmp_path), flip=True)
    moments, scale = latents.cache_latents(cfg, WORLD, ds, ae, batch=3)
    x = torch.from_numpy(ds.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for rows, images in ((np.arange(8), x), (np.arange(8, 16), x.flip(3))):
        mean, log_var = ae.encode(images)
        noise = torch.randn_like(mean)
        direct = mean + (0.5 * log_var).exp() * noise
        cached = latents.latent_batch(moments, rows, noise)
        torch.testing.assert_close(cached, direct, atol=1e-6, rtol=1e-5)
    z = torch.cat(
        [latents.latent_batch(moments, np.arange(16), torch.randn(16, 2, 4, 4)) for _ in range(400)]
    )
    assert (scale * z).std().item() == pytest.approx(1, abs=0.01)


def test_cache_is_used_again_and_made_anew_for_other_weights_data_or_flips(tmp_path, capsys):
    ds, ae = Pixels(), make()
    cfg = replace(CFG, out=str(tmp_path))

    def made(cfg, ds, ae):
        capsys.readouterr()
        moments, scale = latents.cache_latents(cfg, WORLD, ds, ae)
        return ", scale " in capsys.readouterr().out, np.array(moments), scale

    first = made(cfg, ds, ae)
    again = made(cfg, ds, ae)
    assert first[0] and not again[0] and first[2] == again[2]
    assert made(cfg, ds, make(seed=1))[0]
    assert made(cfg, Pixels(key="other"), make(seed=1))[0]
    assert made(replace(cfg, flip=True), ds, ae)[1].shape[0] == 16
    np.testing.assert_array_equal(made(cfg, ds, ae)[1], first[1])


def test_latents_that_do_not_fit_on_the_disk_are_refused(tmp_path, monkeypatch):
    full = type("usage", (), {"free": 100})
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: full)
    cfg = replace(CFG, out=str(tmp_path))
    with pytest.raises(BadInput, match="needs .* MiB for latents"):
        latents.cache_latents(cfg, WORLD, Pixels(), make())
    assert not list((tmp_path / "latents").iterdir())


def test_training_on_the_cache_is_training_on_the_images_bit_for_bit(tmp_path):
    """Encoded in the batches of the cache, every latent of every step has the same bits."""
    cfg, ds, ae = replace(CFG, out=str(tmp_path), flip=True), Pixels(32), make()
    moments, _ = latents.cache_latents(cfg, WORLD, ds, ae, batch=8)

    def online(idx, flips, noise):
        """The same images in the batch that the cache encoded them in."""
        z = torch.empty(0)
        for row, flip, eps in zip(idx, flips, noise, strict=True):
            first = row // 8 * 8
            x, _ = batches.batch(ds, np.arange(first, first + 8), flip=np.full(8, flip))
            mean, log_var = (part[row % 8] for part in ae.encode(x))
            z = torch.cat([z, (mean + (0.5 * log_var).exp() * eps)[None]])
        return z

    for step in range(4):
        idx, flips = batches.indices(32, 8, 0, step), batches.flips(8, 0, step)
        noise = gaussian((8, 2, 4, 4), torch.arange(8), step, "cpu")
        cached = latents.latent_batch(moments, idx + 32 * flips, noise)
        assert torch.equal(cached, online(idx, flips, noise))


def test_moments_in_memory_give_the_same_latents(tmp_path, monkeypatch):
    moments = np.random.default_rng(0).normal(size=(10, 4, 4, 6)).astype(np.float32)
    rows, noise = np.array([3, 9, 0]), torch.randn(3, 3, 4, 4)
    expected = latents.latent_batch(moments, rows, noise)
    assert torch.equal(latents.latent_batch(torch.from_numpy(moments), rows, noise), expected)
    assert latents.moments_on(moments, torch.device("cpu")) is moments
    free = moments.nbytes * 3 - 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert latents.moments_on(moments, torch.device("cuda")) is moments  # does not fit


def test_a_cache_of_something_else_is_made_anew_with_the_reason(tmp_path, capsys):
    def cache(flip=False, ds=None, seed=0, kind="kl"):
        ae = make(replace(CFG, ae=kind), seed)
        cfg = replace(CFG, out=str(tmp_path), flip=flip)
        capsys.readouterr()
        moments, _ = latents.cache_latents(cfg, WORLD, ds or Pixels(), ae)
        return moments.shape, capsys.readouterr().out

    fewer = Pixels(6, key="fewer")
    assert cache()[0] == (8, 4, 4, 4)
    assert cache()[1] == ""
    assert "are of another autoencoder\n" in cache(seed=1)[1]
    assert "are of another autoencoder and of another --flip\n" in cache(flip=True)[1]
    shape, told = cache(ds=fewer)
    assert shape == (6, 4, 4, 4) and "are of other images and of another --flip\n" in told
    assert cache(ds=fewer, kind="vq")[0] == (6, 4, 4, 4)  # log-variances of -30
