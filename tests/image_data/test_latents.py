"""The latent cache: what it holds, when it is used again, what training on it is."""

from runtime.checkpoints import weights_hash
from runtime.commandline import BadInput
from runtime.processes import World
from runtime.run import flips, indices

from dataclasses import replace

import numpy as np
import pytest
import torch

from image_data import latents
from image_data.batches import Dataset
from kernels import gaussian
from networks.autoencoders import build

WORLD = World()


def pixels(count=8, key="key"):
    """A data set of random gray images of 8x8 in memory."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    return Dataset("pixels", images, np.arange(count) % 3, ("a", "b", "c"), {"key": key})


def make(seed=0, kind="kl"):
    """8x8 -> 4x4x2."""
    torch.manual_seed(seed)
    more = {"codebook": 20} if kind == "vq" else {}
    sizes = {"patch": 2, "model_channels": 16, "num_res_blocks": 1, "z_channels": 2}
    return build(kind, channels=1, **sizes, **more).eval().requires_grad_(False)


def cache(folder, ds, ae, flip=False, **options):
    return latents.cache_latents(
        folder,
        WORLD,
        ds,
        ae.encode,
        z_channels=ae.z_channels,
        factor=ae.factor,
        made_of={"autoencoder": weights_hash(ae)},
        flip=flip,
        **options,
    )


def draw(kept, rows, flip, noise):
    """z ~ q(z|x), as a chapter draws it."""
    moments, _ = kept.batch(rows, flip)
    mean, log_var = moments.chunk(2, dim=1)
    return mean + (0.5 * log_var).exp() * noise


def test_cached_latents_equal_direct_ones_and_have_unit_variance(tmp_path):
    ds, ae = pixels(), make()
    kept = cache(tmp_path, ds, ae, flip=True, batch=3)
    x = torch.from_numpy(ds.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    rows = np.arange(8)
    for flip, images in ((np.zeros(8, bool), x), (np.ones(8, bool), x.flip(3))):
        mean, log_var = ae.encode(images)
        noise = torch.randn_like(mean)
        direct = mean + (0.5 * log_var).exp() * noise
        torch.testing.assert_close(draw(kept, rows, flip, noise), direct, atol=1e-6, rtol=1e-5)
    both = (np.arange(16) % 8, np.arange(16) >= 8)
    z = torch.cat([draw(kept, *both, torch.randn(16, 2, 4, 4)) for _ in range(400)])
    assert (kept.scale * z).std().item() == pytest.approx(1, abs=0.01)


def test_the_cache_stands_in_the_place_of_its_images(tmp_path):
    ds = pixels()
    kept = cache(tmp_path, ds, make())
    for name in ("name", "key", "shape", "class_names", "num_classes"):
        assert getattr(kept, name) == getattr(ds, name), name
    assert len(kept) == len(ds) and kept.z_shape == (2, 4, 4)
    rows = np.array([5, 0, 7])
    moments, labels = kept.batch(rows)
    assert moments.shape == (3, 4, 4, 4) and moments.dtype == torch.float32
    assert torch.equal(labels, ds.batch(rows)[1])


def test_cache_is_used_again_and_made_anew_for_other_weights_data_or_flips(tmp_path, capsys):
    ds, ae = pixels(), make()

    def made(ds, ae, flip=False):
        capsys.readouterr()
        kept = cache(tmp_path, ds, ae, flip)
        return ", scale " in capsys.readouterr().out, np.array(kept.moments), kept.scale

    first = made(ds, ae)
    again = made(ds, ae)
    assert first[0] and not again[0] and first[2] == again[2]
    assert made(ds, make(seed=1))[0]
    assert made(pixels(key="other"), make(seed=1))[0]
    assert made(ds, ae, flip=True)[1].shape[0] == 16
    np.testing.assert_array_equal(made(ds, ae)[1], first[1])


def test_latents_that_do_not_fit_on_the_disk_are_refused(tmp_path, monkeypatch):
    full = type("usage", (), {"free": 100})
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: full)
    with pytest.raises(BadInput, match="needs .* MiB for latents"):
        cache(tmp_path / "latents", pixels(), make())
    assert not list((tmp_path / "latents").iterdir())


def test_training_on_the_cache_is_training_on_the_images_bit_for_bit(tmp_path):
    """Encoded in the batches of the cache, every latent of every step has the same bits."""
    ds, ae = pixels(32), make()
    kept = cache(tmp_path, ds, ae, flip=True, batch=8)

    def online(rows, flip, noise):
        """The same images in the batch that the cache encoded them in."""
        z = torch.empty(0)
        for row, turned, eps in zip(rows, flip, noise, strict=True):
            first = row // 8 * 8
            x, _ = ds.batch(np.arange(first, first + 8), np.full(8, turned))
            mean, log_var = (part[row % 8] for part in ae.encode(x))
            z = torch.cat([z, (mean + (0.5 * log_var).exp() * eps)[None]])
        return z

    for step in range(4):
        rows, flip = indices(32, 8, 0, step), flips(8, 0, step)
        noise = gaussian((8, 2, 4, 4), torch.arange(8), step, "cpu")
        assert torch.equal(draw(kept, rows, flip, noise), online(rows, flip, noise))


def test_moments_in_memory_give_the_same_latents(tmp_path, monkeypatch):
    kept = cache(tmp_path, pixels(10), make(), flip=True)
    moments, rows, flip = kept.moments, np.array([3, 9, 0]), np.array([True, False, True])
    resident = replace(kept, moments=torch.from_numpy(np.array(moments)))
    for ours, expected in zip(resident.batch(rows, flip), kept.batch(rows, flip), strict=True):
        assert torch.equal(ours, expected)
    assert latents.moments_on(moments, torch.device("cpu")) is moments
    free = moments.nbytes * 3 - 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert latents.moments_on(moments, torch.device("cuda")) is moments  # does not fit


def test_a_cache_of_something_else_is_made_anew_with_the_reason(tmp_path, capsys):
    def made(flip=False, ds=None, seed=0, kind="kl"):
        capsys.readouterr()
        kept = cache(tmp_path, ds or pixels(), make(seed, kind), flip)
        return kept.moments.shape, capsys.readouterr().out

    fewer = pixels(6, key="fewer")
    assert made()[0] == (8, 4, 4, 4)
    assert made()[1] == ""
    assert "are of another autoencoder\n" in made(seed=1)[1]
    assert "are of another autoencoder and of another --flip\n" in made(flip=True)[1]
    shape, told = made(ds=fewer)
    assert shape == (6, 4, 4, 4) and "are of other images and of another --flip\n" in told
    assert made(ds=fewer, kind="vq")[0] == (6, 4, 4, 4)  # log-variances of -30
