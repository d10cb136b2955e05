"""Training of the autoencoders: losses, resuming, several processes, reports."""

from runtime.commandline import BadInput
from runtime.pictures import to_uint8
from runtime.processes import World
from runtime.training import learning_rate, read_log, weights_hash

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import start_ranks
from rank_autoencoder import Config

import autoencoder
from image_data import batches, datasets
from networks import kl_autoencoder as vae

WORLD = World()


@pytest.fixture(scope="session")
def cfg(tmp_path_factory):
    """Settings of a run that takes a second: 48 gray images of 24x24, 16 of them held out."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "photos" / "train", 32, height=24, width=24)
    write_images(folder / "photos" / "test", 48, height=24, width=24)
    for path in sorted((folder / "photos" / "test").rglob("*.png"))[::3]:
        path.unlink()
    return Config(data=str(folder / "photos"), data_root=str(folder / "root"))


def load(cfg):
    return datasets.load(cfg.data, cfg.data_root)


def train(cfg):
    torch.manual_seed(99)  # training must not depend on what was drawn before
    return autoencoder.train(cfg, WORLD, load(cfg))


def log(folder):
    rows = read_log(folder / "autoencoder" / "log.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """A file of VGG16's weights, small: four channels in every convolution."""
    torch.manual_seed(0)
    places, state, c_in = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), {}, 3
    for place in places:
        layer = torch.nn.Conv2d(c_in, 4, 3)
        state |= {f"features.{place}.{k}": v.detach() for k, v in layer.state_dict().items()}
        c_in = 4
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


EVERYTHING = {"ae": "vq", "discriminator": 0.5, "disc_start": 5}

# ----------------------------------------------------------------------------------- the losses


def test_the_pull_is_the_kl_of_torch_distributions():
    torch.manual_seed(0)
    mean, log_var = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    q = torch.distributions.Normal(mean.double(), (0.5 * log_var.double()).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(
        autoencoder.kl_divergence(mean, log_var).double(),
        kl.flatten(1).mean(1),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_loss_is_the_sum_of_its_terms(kind, cfg):
    cfg = replace(cfg, ae=kind, commitment=0.7, kl_weight=0.3, perceptual_weight=2.0)
    torch.manual_seed(0)
    ae, x = autoencoder.make_autoencoder(cfg, (1, 24, 24)), torch.randn(3, 1, 24, 24)
    noise = torch.randn(3, 3, 6, 6)

    def distance(a, b):
        return (a - b).square().sum((1, 2, 3))

    terms, reconstruction, (x_hat, z, rest) = autoencoder.loss_terms(
        cfg, ae, ae, x, noise, distance
    )
    mean, log_var = ae.encode(x)
    if kind == "kl":
        pull = 0.3 * autoencoder.kl_divergence(mean, log_var)
        expected = ae.decode(mean + (0.5 * log_var).exp() * noise)
    else:
        pull = 0.7 * ae.codebook.commitment(mean, ae.codes(x))
        expected = ae.decode(mean)
    torch.testing.assert_close(x_hat, expected)
    error = (x - x_hat).abs().flatten(1).mean(1)
    torch.testing.assert_close(reconstruction, error + 2 * distance(x, x_hat))
    torch.testing.assert_close(terms["loss"], reconstruction + pull)
    torch.testing.assert_close(terms["l1"], error)


# ------------------------------------------------------------------------------------- training


def test_by_default_training_is_the_plain_loop(cfg, tmp_path):
    """Adam on |x - x_hat| + kl_weight KL, step by step, to the last bit: nothing else came in."""
    ae, ds = train(replace(cfg, out=str(tmp_path))), load(cfg)
    torch.manual_seed(cfg.seed)
    plain = autoencoder.Autoencoder(1, 2, 16, (1, 2), 1, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(plain.parameters())
    for step in range(12):
        seeds = np.random.default_rng([0, step, 1]).integers(2**62, size=8)
        noise = autoencoder.gaussian((8, 3, 6, 6), torch.from_numpy(seeds), step, "cpu")
        x, _ = batches.batch(ds, batches.indices(32, 8, 0, step), flip=batches.flips(8, 0, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 12, 1e-3, 2)
        x_hat, mean, log_var = plain(x, noise)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))
        ((x - x_hat).abs().mean(dim=(1, 2, 3)) + 3e-3 * kl).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ae.state_dict()[name]), name


def test_older_runs_go_on_and_other_settings_are_refused(cfg, tmp_path):
    older = {
        "data",
        "size",
        "classes",
        "flip",
        "patch",
        "ae_width",
        "ae_mult",
        "ae_blocks",
        "z_channels",
        "kl_weight",
        "ae_steps",
        "ae_lr",
        "batch_size",
        "warmup",
        "clip_grad",
        "seed",
    }
    assert set(autoencoder.settings(replace(cfg, codebook=512))) == older
    changed = {"ae": "vq", "codebook": 7, "commitment": 1.0, "perceptual_weight": 2.0}
    changed |= {"discriminator": 0.5, "disc_start": 3}
    found = autoencoder.settings(replace(cfg, **changed))
    assert set(found) == older | set(changed) and found.items() >= changed.items()
    train(replace(cfg, out=str(tmp_path), ae_steps=2))
    with pytest.raises(BadInput, match="another configuration .*ae kl there, vq here"):
        train(replace(cfg, out=str(tmp_path), ae_steps=2, ae="vq"))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_resumed_with_every_term_it_equals_the_unbroken_run(kind, cfg, tmp_path, vgg):
    cfg = replace(cfg, **EVERYTHING | {"ae": kind}, perceptual=str(vgg))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(replace(cfg, out=str(whole)))
    shutil.copytree(whole, broken)
    folder = broken / "autoencoder"
    shutil.move(folder / "ckpt-previous.pt", folder / "ckpt.pt")  # as if killed after step 8
    for left in folder.glob("reconstructions.*"):
        left.unlink()
    train(replace(cfg, out=str(broken)))

    states = [torch.load(f / "autoencoder" / "ckpt.pt", weights_only=True) for f in (whole, broken)]
    assert states[0]["step"] == 12 and "adversary" in states[0]
    flat = [dict(tensors(state)) for state in states]
    assert list(flat[0]) == list(flat[1]) and len(flat[0]) > 50
    for name, value in flat[0].items():
        assert torch.equal(value, flat[1][name]), name
    assert log(whole) == log(broken)
    names = {"loss", "l1", "perceptual", "disc"}
    names |= {"kl"} if kind == "kl" else {"commitment", "usage", "perplexity"}
    assert names <= set(log(whole)[-1]) and "disc" not in log(whole)[1]


def tensors(state, where=""):
    """(path, tensor) of all that a checkpoint holds, numbers included."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{where}/{key}")
        elif isinstance(value, (torch.Tensor, int, float)):
            yield f"{where}/{key}", torch.as_tensor(value)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_two_processes_train_as_one(kind, cfg, tmp_path):
    cfg = replace(cfg, **EVERYTHING | {"ae": kind}, n_eval=60)
    logs, reports = [], []
    for size in (1, 2):
        out = tmp_path / str(size)
        text = json.dumps(asdict(replace(cfg, out=str(out))))
        for process in start_ranks("rank_autoencoder", text, size=size):
            done = process.wait()
            assert done.code == 0, done.err
        logs.append(log(out))
        reports.append(json.loads((out / "autoencoder" / "reconstructions.json").read_text()))
        assert len(np.load(out / "autoencoder" / "reconstructions.npz")["arr_0"]) == 32
    assert len(logs[0]) == 6
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert reports[0]["n"] == reports[1]["n"] == 32
    assert reports[0]["psnr"] == pytest.approx(reports[1]["psnr"], abs=1e-2)


@pytest.mark.parametrize("kind, network", [("vq", "VQAutoencoder"), ("ldm", "KLVAE")])
def test_other_autoencoders_are_trained_by_their_name(kind, network, cfg, tmp_path):
    cfg = replace(cfg, ae=kind, ae_mult=(1, 1), ae_steps=2, out=str(tmp_path))
    ae = train(cfg)
    assert type(ae).__name__ == network and not ae.training
    torch.manual_seed(cfg.seed)
    fresh = autoencoder.make_autoencoder(cfg, (1, 24, 24))
    assert weights_hash(ae) != weights_hash(fresh)


def test_a_published_autoencoder_is_read_and_not_trained(cfg, tmp_path):
    torch.manual_seed(0)
    published = vae.KLVAE(1, 32, (1, 1), 1, 3)
    torch.save(published.state_dict(), tmp_path / "vae.pt")
    ae = train(replace(cfg, ae=str(tmp_path / "vae.pt"), out=str(tmp_path / "run")))
    for name, value in published.state_dict().items():
        assert torch.equal(ae.state_dict()[name], value)
    files = {path.name for path in (tmp_path / "run" / "autoencoder").iterdir()}
    assert files == {"reconstructions.png", "reconstructions.json"}
    with pytest.raises(BadInput, match="takes images of 1 channels, these have 3"):
        autoencoder.make_autoencoder(replace(cfg, ae=str(tmp_path / "vae.pt")), (3, 24, 24))


def test_an_unknown_autoencoder_is_refused(cfg):
    with pytest.raises(BadInput, match="--ae vqq: expected kl, vq, ldm, or the file"):
        autoencoder.make_autoencoder(replace(cfg, ae="vqq"), (1, 24, 24))


# ------------------------------------------------------------------------------ reconstructions


def test_report_tells_of_held_out_images_once(cfg, tmp_path, capsys):
    cfg = replace(cfg, out=str(tmp_path), ae_steps=2, n_eval=1000)
    ae = train(cfg)
    assert "over 32 held-out images" in capsys.readouterr().out
    folder, test = tmp_path / "autoencoder", datasets.load(cfg.data, cfg.data_root, split="test")
    told = json.loads((folder / "reconstructions.json").read_text())
    found = np.load(folder / "reconstructions.npz")
    assert np.array_equal(found["arr_1"], test.labels)
    x = batches.batch(test, np.arange(32))[0]
    x_hat = ae.decode(ae.encode(x)[0]).clamp(-1, 1)
    assert np.array_equal(found["arr_0"], to_uint8(x_hat))
    mse = (x - x_hat).double().square().flatten(1).mean(1).numpy()
    assert told["psnr"] == pytest.approx((10 * np.log10(4 / mse)).mean(), rel=1e-6)
    train(cfg)
    assert "reconstructions" not in capsys.readouterr().out
    train(replace(cfg, ae_steps=3, resume="never"))
    assert "reconstructions" in capsys.readouterr().out


def test_report_says_when_it_has_only_training_images(cfg, tmp_path, capsys):
    flat = write_images(tmp_path / "flat", 8, height=24, width=24)
    train(replace(cfg, data=str(flat), ae_steps=1, out=str(tmp_path / "run")))
    assert "over 8 training images: there are no others" in capsys.readouterr().out
    path = tmp_path / "run" / "autoencoder" / "reconstructions.json"
    assert json.loads(path.read_text())["held_out"] is False
