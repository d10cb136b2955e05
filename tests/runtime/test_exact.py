"""Where fp32 is promised, a GPU rounds no product to TF32: decoding, features, likelihoods."""

from runtime import processes, rehearsal
from runtime.commandline import RunConfig
from runtime.processes import World, exact

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import noise

import autoencoder
import ldm_cfg
from evaluation import features, likelihood, neighbours
from image_data.batches import Dataset
from image_data.latents import cache_latents
from networks.kl_autoencoder import KLVAE, TinyAutoencoder

FAST, TRUE = (True, "high"), (False, "highest")


def now():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def fast():
    """As on a GPU, and afterwards as before."""
    before, benchmark = now(), torch.backends.cudnn.benchmark
    processes._world(SimpleNamespace(gpus=1), 0, 1, torch.device("cuda:0"))
    assert now() == FAST and torch.backends.cudnn.benchmark
    yield
    assert now() == FAST  # whoever needed another state put this one back
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[0], benchmark
    torch.set_float32_matmul_precision(before[1])


def test_inside_and_after():
    with exact():
        assert now() == TRUE
        with exact():
            assert now() == TRUE
        assert now() == TRUE
    assert now() == FAST
    with pytest.raises(KeyError), exact():
        raise KeyError
    assert now() == FAST
    assert exact()(now)() == TRUE


def test_a_cpu_computes_as_it_did():
    torch.backends.cudnn.benchmark = False
    with exact():
        processes._world(SimpleNamespace(gpus=0), 0, 1, torch.device("cpu"))
        assert now() == TRUE and not torch.backends.cudnn.benchmark


def test_a_dry_run_on_a_gpu_computes_as_the_run_would(monkeypatch, capsys):
    seen = []

    def train(cfg, world):
        seen.append((*now(), torch.backends.cudnn.benchmark, world.device.type))
        raise rehearsal.Enough

    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rehearsal.rehearse(train, RunConfig(gpus=1, dry_run=True))
    assert seen == [(*FAST, True, "cuda")]


class Noting(torch.nn.Module):
    """An autoencoder that notes the state in which it computes."""

    channels, z_channels, factor, settings = 1, 2, 2, {"kind": "none"}

    def __init__(self):
        super().__init__()
        self.seen = set()

    def encode(self, x):
        self.seen.add(("encode", *now()))
        z = x[:, :, ::2, ::2].expand(-1, 2, -1, -1)
        return z, torch.full_like(z, -30.0)

    def decode(self, z):
        self.seen.add(("decode", *now()))
        return z[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)


DS = Dataset("noise", noise((6, 4, 4, 1)), np.zeros(6, np.int64), (), {"key": "k"})


def test_images_are_decoded_exactly():
    ae, cfg = Noting(), SimpleNamespace(batch_size=4, sample_steps=1, timesteps=9)

    def walk(seeds, labels):
        assert now() == FAST
        yield torch.zeros(len(seeds), 2, 2, 2), None

    seeds = torch.arange(4)
    ldm_cfg.draw(walk, ae, 1.0, cfg, World(), seeds, seeds)
    assert ae.seen == {("decode", *TRUE)}


def test_reconstructions_and_latents_are_exact(tmp_path):
    ae = Noting()
    autoencoder.reconstruct(ae, DS, np.arange(3), "cpu")
    assert ae.seen == {("encode", *TRUE), ("decode", *TRUE)}
    ae = Noting()
    shape = {"z_channels": 2, "factor": 2}
    cache_latents(tmp_path, World(), DS, ae.encode, made_of={}, flip=False, **shape)
    assert ae.seen == {("encode", *TRUE)}


@pytest.mark.parametrize("make", [lambda: KLVAE(1, 8, (1, 2)), lambda: TinyAutoencoder(4, 1, 8)])
def test_published_autoencoders_are_exact_by_themselves(make):
    ae, seen = make().eval(), []
    for part in (ae.encoder, ae.decoder):
        part.register_forward_pre_hook(lambda *args: seen.append(now()))
    with torch.no_grad():
        ae.decode(ae.encode(torch.zeros(1, 1, 16, 16))[0])
    assert seen == [TRUE, TRUE]


def test_features_likelihoods_and_distances_are_exact(tmp_path, monkeypatch):
    seen = []

    def extractor(images):
        seen.append(now())
        return images.flatten(1).float()

    features.extract(extractor, DS.images)
    squares = neighbours.squares_between

    def noted(*blocks, **how):
        seen.append(now())
        return squares(*blocks, **how)

    monkeypatch.setattr(neighbours, "squares_between", noted)
    neighbours.neighbours(np.random.default_rng(0).random((9, 3), np.float32), k=1)

    def bound_of(images, y, seeds, tick):
        seen.append(now())
        values = torch.zeros(len(images), 2, dtype=torch.float64)
        return likelihood.Bound(values[:, 0], values, values, values)

    how = {"n": 4, "batch_size": 4, "labels": False}
    likelihood.evaluate(bound_of, DS, [0, 1], World(), tmp_path, **how)
    assert len(seen) >= 3 and set(itertools.chain(seen)) == {TRUE}
