"""autoencoder.py as a command: training, resuming, several processes, reports, files of others."""

from runtime.checkpoints import load_checkpoint, weights_hash
from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.pictures import to_uint8
from runtime.processes import World
from runtime.typed_flags import idle

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import Started, run, start_ranks, succeed

import autoencoder as ch
from image_data import datasets
from networks.autoencoders import build, latent_shape, load_autoencoder
from networks.kl_autoencoder import KLVAE

WORLD = World()


@pytest.fixture(scope="session")
def cfg(tmp_path_factory):
    """Settings of a run that takes a second: 48 gray images of 24x24, 16 of them held out."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "photos" / "train", 32, height=24, width=24)
    write_images(folder / "photos" / "test", 48, height=24, width=24)
    for path in sorted((folder / "photos" / "test").rglob("*.png"))[::3]:
        path.unlink()
    return ch.Config(
        data=str(folder / "photos"),
        data_root=str(folder / "root"),
        flip=True,
        patch=2,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        z_channels=3,
        codebook=20,
        steps=12,
        lr=1e-3,
        batch_size=8,
        warmup=2,
        log_every=2,
        save_every=4,
        sample_every=0,
        n=1000,
        gpus=0,
    )


def flags(cfg, **changes):
    """The same as a command line."""
    given, default = replace(cfg, **changes), ch.Config()
    words = []
    for name, value in vars(given).items():
        if name != "gpus" and (value == getattr(default, name) or idle(given, name)):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def train(cfg):
    """Its autoencoder, by the checkpoint that it leaves."""
    torch.manual_seed(99)  # training must not depend on what was drawn before
    ch.train(cfg, WORLD)
    return load_autoencoder(f"{cfg.out}/ckpt.pt")


def log(folder):
    """The log without what is not the same in each process."""
    noisy = ("images_per_s", "peak_memory_mb")
    rows = read_log(folder / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in noisy} for row in rows]


def tensors(state, where=""):
    """(path, tensor) of all that a checkpoint holds, numbers included."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{where}/{key}")
        elif isinstance(value, (torch.Tensor, int, float)):
            yield f"{where}/{key}", torch.as_tensor(value)


def assert_same_run(whole, broken):
    """Checkpoints and logs are equal bit for bit."""
    states = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, broken)]
    flat = [dict(tensors(state)) for state in states]
    assert list(flat[0]) == list(flat[1]) and len(flat[0]) > 50
    for name, value in flat[0].items():
        assert torch.equal(value, flat[1][name]), name
    assert log(whole) == log(broken)


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

# ------------------------------------------------------------------------------------- training


def test_a_run_of_other_settings_is_refused(cfg, tmp_path):
    train(replace(cfg, out=str(tmp_path), steps=2))
    with pytest.raises(BadInput, match="another configuration .*ae kl there, vq here"):
        train(replace(cfg, out=str(tmp_path), steps=2, ae="vq"))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_resumed_with_every_term_it_equals_the_unbroken_run(kind, cfg, tmp_path, vgg):
    cfg = replace(cfg, **EVERYTHING | {"ae": kind}, perceptual=str(vgg))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(replace(cfg, out=str(whole)))
    shutil.copytree(whole, broken)
    shutil.move(broken / "ckpt-previous.pt", broken / "ckpt.pt")  # as if killed after step 8
    for left in broken.glob("reconstructions.*"):
        left.unlink()
    moved = shutil.copy(vgg, tmp_path / "elsewhere.pth")  # the weights count, not their place
    train(replace(cfg, out=str(broken), perceptual=str(moved)))
    state = load_checkpoint(whole / "ckpt.pt", "autoencoder")
    assert state["step"] == 12 and "adversary" in state
    assert_same_run(whole, broken)
    names = {"loss", "l1", "perceptual", "generator", "disc"}
    names |= {"kl"} if kind == "kl" else {"commitment", "usage", "perplexity"}
    assert names <= set(log(whole)[-1]) and "disc" not in log(whole)[1]


def test_killed_while_it_trains_it_equals_the_unbroken_run(cfg, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = flags(cfg, **EVERYTHING, steps=60, save_every=2)
    succeed("autoencoder", *words, "--out", whole)
    for steps in (5, 23):

        def late_enough(steps=steps):
            rows = read_log(broken / "log.jsonl")
            return bool(rows) and rows[-1]["step"] >= steps

        Started("autoencoder", *words, "--out", broken).kill_when(late_enough)
    assert load_checkpoint(broken / "ckpt.pt")["step"] < 60
    succeed("autoencoder", *words, "--out", broken)
    assert_same_run(whole, broken)


@pytest.mark.parametrize("kind, start", [("kl", 5), ("vq", 5), ("kl", 0)])
def test_two_processes_train_as_one(kind, start, cfg, tmp_path):
    """Also where the first step already asks for gradients before its backward()."""
    words = flags(cfg, **EVERYTHING | {"ae": kind, "disc_start": start}, n=60)
    logs, reports = [], []
    for size in (1, 2):
        out = tmp_path / str(size)
        for process in start_ranks("autoencoder", *words, "--out", out, size=size):
            done = process.wait()
            assert done.code == 0, done.err
        logs.append(log(out))
        reports.append(json.loads((out / "reconstructions.json").read_text()))
        assert len(np.load(out / "reconstructions.npz")["arr_0"]) == 32
    assert len(logs[0]) == 6
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert reports[0]["n"] == reports[1]["n"] == 32
    assert reports[0]["psnr"] == pytest.approx(reports[1]["psnr"], abs=1e-2)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_accumulated_parts_train_as_the_whole(kind, cfg, tmp_path):
    """Without a discriminator, as lambda is a number of each part."""
    logs = []
    for parts in (1, 3):
        train(replace(cfg, ae=kind, accumulate=parts, out=str(tmp_path / str(parts))))
        logs.append(log(tmp_path / str(parts)))
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind, network", [("vq", "VQAutoencoder"), ("ldm", "KLVAE")])
def test_other_autoencoders_are_trained_by_their_name(kind, network, cfg, tmp_path):
    cfg = replace(cfg, ae=kind, channel_mult=(1, 1), steps=2, out=str(tmp_path))
    ae = train(cfg)
    assert type(ae).__name__ == network and not ae.training
    torch.manual_seed(cfg.seed)
    fresh = ch.make_autoencoder(cfg, (1, 24, 24))
    assert weights_hash(ae) != weights_hash(fresh)


# --------------------------------------------------------------------------- files of autoencoders


@pytest.mark.parametrize("kind", ["kl", "vq", "ldm"])
def test_its_checkpoint_alone_gives_the_autoencoder_back(kind, cfg, tmp_path):
    ae = train(replace(cfg, ae=kind, steps=2, out=str(tmp_path)))
    state = load_checkpoint(tmp_path / "ckpt.pt")
    for name, value in state["model"].items():  # the weights, not their running mean
        assert torch.equal(ae.state_dict()[name], value), name
    assert not any(p.requires_grad for p in ae.parameters()) and not ae.training
    again = build(**ae.settings)
    again.load_state_dict(state["model"])
    x = torch.randn(2, 1, 24, 24)
    assert torch.equal(again.eval().encode(x)[0], ae.encode(x)[0])
    mean = load_autoencoder(tmp_path / "ckpt.pt", ema=0.998)
    assert weights_hash(mean) != weights_hash(ae)
    with pytest.raises(BadInput, match="--ema 0.5: .* has 0.998"):
        load_autoencoder(tmp_path / "ckpt.pt", ema=0.5)


def test_a_published_autoencoder_is_read_and_not_trained(cfg, tmp_path):
    torch.manual_seed(0)
    published = KLVAE(1, 32, (1, 1), 1, 3)
    torch.save(published.state_dict(), tmp_path / "vae.pt")
    ae = load_autoencoder(tmp_path / "vae.pt")
    for name, value in published.state_dict().items():
        assert torch.equal(ae.state_dict()[name], value)
    words = ["--sample", tmp_path / "vae.pt", "--data", cfg.data, "--data-root", cfg.data_root]
    done = succeed("autoencoder", *words, "--out", tmp_path / "run", "--gpus", 0)
    assert "autoencoder ldm of 0.22 M parameters, latents of 3 channels, 2 times" in done.out
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {f"reconstructions.{kind}" for kind in ("png", "npz", "json")}
    with pytest.raises(BadInput, match="takes images of 1 channels, these have 3"):
        latent_shape(ae, (3, 24, 24))
    with pytest.raises(BadInput, match="images of 24x25 cannot be made 2 times smaller.*--size 24"):
        latent_shape(ae, (1, 24, 25))


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--ae vqq: expected the file or folder of an autoencoder"):
        load_autoencoder("vqq")
    torch.save({"script": "ddpm_pixel", "settings": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="of ddpm_pixel.py, which holds no autoencoder"):
        load_autoencoder(tmp_path / "ckpt.pt")


def test_a_checkpoint_of_a_latent_chapter_gives_its_first_stage(tmp_path):
    torch.manual_seed(0)
    ae = build("kl", channels=1, patch=2, model_channels=16)
    state = {"script": "ldm_cfg", "config": {"ema": [0.9]}, "settings": {}, "ema": {}, "model": {}}
    state |= {"ae": ae.settings, "autoencoder": ae.state_dict()}
    torch.save(state, tmp_path / "ckpt.pt")
    assert weights_hash(load_autoencoder(tmp_path / "ckpt.pt")) == weights_hash(ae)
    with pytest.raises(BadInput, match="--ema 0.9: .* holds no running means of it"):
        load_autoencoder(tmp_path / "ckpt.pt", ema=0.9)


BAD = {
    "unknown|expected|invalid": ["--ae", "vqq"],
    "--disc-start 12 is not before --steps 12": ["--discriminator", "0.5", "--disc-start", "12"],
    "--kl-weight must be from 0 to 1, got 2.0": ["--kl-weight", "2"],
    "--codebook must be greater than 0": ["--ae", "vq", "--codebook", "0"],
    "--ae ldm halves at every level: type --channel-mult": ["--ae", "ldm", "--channel-mult", "1"],
    "images of 24x24 cannot be made 10 times smaller": ["--patch", "5"],
    "--perceptual nothing.pth: no such file": ["--perceptual", "nothing.pth"],
    "--sample nowhere: expected the file or folder": ["--sample", "nowhere"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, cfg, tmp_path):
    bad = BAD[message]
    kind = bad[1] if bad[0] == "--ae" else cfg.ae
    given = [] if "--sample" in bad else flags(cfg, out=str(tmp_path / "run"), ae=kind)
    done = run("autoencoder", *given, "--gpus", 0, *bad)
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert any(part in done.err for part in message.split("|")), done.err


# ------------------------------------------------------------------------------ reconstructions


def test_report_says_what_is_of_held_out_images_once(cfg, tmp_path, capsys):
    cfg = replace(cfg, out=str(tmp_path), steps=2)
    ae = train(cfg)
    assert "over 32 held-out images" in capsys.readouterr().out
    test = datasets.load(cfg.data, cfg.data_root, split="test")
    told = json.loads((tmp_path / "reconstructions.json").read_text())
    found = np.load(tmp_path / "reconstructions.npz")
    assert np.array_equal(found["arr_1"], test.labels)
    x, _ = test.batch(np.arange(32))
    x_hat = ae.decode(ae.encode(x)[0]).clamp(-1, 1)
    assert np.array_equal(found["arr_0"], to_uint8(x_hat))
    mse = (x - x_hat).double().square().flatten(1).mean(1).numpy()
    assert told["psnr"] == pytest.approx((10 * np.log10(4 / mse)).mean(), rel=1e-6)
    train(cfg)
    assert "reconstructions" not in capsys.readouterr().out
    train(replace(cfg, steps=3, resume="never"))
    assert "reconstructions" in capsys.readouterr().out


def test_report_measures_the_use_of_the_codebook(cfg, tmp_path):
    ae = train(replace(cfg, ae="vq", steps=2, out=str(tmp_path)))
    told = json.loads((tmp_path / "reconstructions.json").read_text())
    test = datasets.load(cfg.data, cfg.data_root, split="test")
    _, counts = np.unique(ae.codes(test.batch(np.arange(32))[0]), return_counts=True)
    share = counts / counts.sum()
    assert told["usage"] == pytest.approx(len(counts) / 20)
    assert told["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_a_checkpoint_is_reported_on_by_the_data_that_it_knows(cfg, tmp_path):
    train(replace(cfg, steps=2, out=str(tmp_path)))
    before = json.loads((tmp_path / "reconstructions.json").read_text())
    words = ["--sample", tmp_path / "ckpt.pt", "--gpus", 0]
    assert "over 10 held-out images" in succeed("autoencoder", *words, "--n", 10).out
    told = json.loads((tmp_path / "autoencoder_n=10" / "reconstructions.json").read_text())
    assert told["n"] == 10 and told["autoencoder"] == before["autoencoder"]
    done = succeed("autoencoder", *words, "--ema", 0.998, "--out", tmp_path / "mean")
    assert "over 32 held-out images" in done.out
    told = json.loads((tmp_path / "mean" / "reconstructions.json").read_text())
    assert told["autoencoder"] != before["autoencoder"]
    assert sorted(os.listdir(tmp_path / "mean")) == sorted(
        f"reconstructions.{kind}" for kind in ("png", "npz", "json")
    )


def test_report_says_when_it_has_only_training_images(cfg, tmp_path, capsys):
    flat = write_images(tmp_path / "flat", 8, height=24, width=24)
    train(replace(cfg, data=str(flat), steps=1, out=str(tmp_path / "run")))
    assert "over 8 training images: there are no others" in capsys.readouterr().out
    path = tmp_path / "run" / "reconstructions.json"
    assert json.loads(path.read_text())["held_out"] is False
