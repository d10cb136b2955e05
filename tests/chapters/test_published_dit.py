"""A published DiT becomes a checkpoint of dit.py: the same images, or one line that says why."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput, parse_classes

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run, succeed
from reference_dit import opened
from reference_metrics import import_references
from safetensors.torch import save_file
from vae_math import randomise

import dit
from kernels import gaussian
from networks.kl_autoencoder import KLVAE, TinyAutoencoder, load_pretrained
from networks.published.dit import label_names, model_name
from tests.cases.dit_of_diffusers import twin

SMALL_AE = dict(model_channels=32, num_res_blocks=1, norm_groups=32)


def ddim(forward, alpha_bar, steps, seeds, y, null, w, shape):
    """Latents of DDIM with eta 0 (DDIM eq. 12), guided (CFG eq. 6), one plain step after another.

    forward(z, t, y) gives eps (B,C,h,w), with or without more channels; alpha_bar (T,) float64.
    """
    z = gaussian((len(seeds), *shape), seeds, -1, "cpu")
    ts = np.linspace(len(alpha_bar) - 1, 0, steps).round().astype(int)
    with torch.no_grad():
        for t, t_prev in zip(ts, [*ts[1:], -1], strict=True):
            a, a_prev = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else torch.tensor(1.0)
            time = torch.full((len(seeds),), int(t))
            with_label, without = (
                forward(z, time, labels)[:, : shape[0]] for labels in (y, torch.full_like(y, null))
            )
            eps = (1 + w) * with_label - w * without
            z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
            z = (a_prev.sqrt() * z0 + (1 - a_prev).sqrt() * eps).float()
    return z


def gray_levels(x):
    """What images (B,C,H,W) in [-1,1] are in uint8, (B,H,W,C), before they are rounded."""
    return (127.5 * (x.clamp(-1, 1) + 1)).permute(0, 2, 3, 1).numpy()


def assert_images(path, expected):
    """The samples.npz at `path` holds `expected`, up to the rounding of uint8 and of float32."""
    found = np.load(path)["arr_0"].astype(float)
    assert expected.std() > 20  # they show something
    assert np.abs(found - expected).max() <= 0.6


# ------------------------------------------------------------------------------- the same images


def test_a_published_file_is_sampled_by_command():
    """DiT-S/8 and an autoencoder in the LDM code's names, against the two networks themselves."""
    net = opened((4, 16, 16), 10, learn_sigma=True, **dit.parse_size("dit-s/8"))
    ae = randomise(KLVAE(**SMALL_AE, channel_mult=(1, 1, 1, 1)))
    ae.post_quant_conv.weight.data /= 500  # else the norms to come would hide the latents' scale
    with tempfile.TemporaryDirectory() as folder:  # 0.3 GB
        folder = Path(folder)
        torch.save(net.state_dict(), folder / "DiT-S-8.pt")
        save_file(ae.state_dict(), folder / "ae.safetensors")
        convert = ["--published", folder / "DiT-S-8.pt", "--ae", folder / "ae.safetensors", "--out"]
        told = succeed("dit", *convert, folder / "run").out
        assert "dit-s/8" in told and "10 labels, variance learned" in told
        assert "scaling 0.18215, Stable Diffusion's, because its files do not say it" in told
        size = (folder / "run" / "ckpt.pt").stat().st_size
        assert size < 1.02 * (folder / "DiT-S-8.pt").stat().st_size + 2e6  # no weight twice
        sample = ["--n", 3, "--classes", "7,2", "--guidance", 2, "--sample-steps", 4, "--gpus", 0]
        sample += ["--out", folder / "run"]
        succeed("dit", "--sample", folder / "run" / "ckpt.pt", *sample)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM section 4
        net = dit.load_published(folder / "DiT-S-8.pt")
        ae, _ = load_pretrained(folder / "ae.safetensors")
        seeds, y = torch.arange(3), torch.tensor([7, 2, 7])
        z = ddim(net, (1 - betas).cumprod(0), 4, seeds, y, 10, 2.0, (4, 16, 16))
        expected, unscaled = (gray_levels(ae.decode(z / by)) for by in (0.18215, 1.0))
        assert np.abs(expected - unscaled).mean() > 5
        assert_images(folder / "run" / "samples.npz", expected)
        assert np.load(folder / "run" / "samples.npz")["arr_1"].tolist() == [7, 2, 7]


# ------------------------------------------------------------------------- small ones, in process


@pytest.fixture
def small(monkeypatch):
    """dit.py takes "dit-s" for the small network of `opened`."""
    monkeypatch.setitem(dit.SIZES, "s", (32, 2, 2))


def autoencoderkl(**settings):
    """diffusers' AutoencoderKL of factor 8 and 4 channels, small, with random weights."""
    import_references()  # diffusers imports torchvision where it is installed
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    types = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    )
    return randomise(AutoencoderKL(**types | settings))


def scheduler(**settings):
    """diffusers' DDIMScheduler; the default chain is DDPM's linear one of half the length."""
    from diffusers import DDIMScheduler

    default = dict(num_train_timesteps=500, beta_start=2e-4, beta_end=0.04, beta_schedule="linear")
    return DDIMScheduler(**default | {"clip_sample": False} | settings)


LABELS = {"0": "tench, Tinca tinca", "1": "crane", "2": "7", "3": "crane, machine"}


def pipeline(folder, net, ae=None, chain=None, labels=LABELS):
    """The folder of a DiTPipeline: (diffusers' transformer, its autoencoder, its scheduler)."""
    ae, chain = ae or autoencoderkl(scaling_factor=0.5), chain or scheduler()
    theirs = twin(net)
    for part, name in ((theirs, "transformer"), (ae, "vae"), (chain, "scheduler")):
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"id2label": labels}))
    return theirs, ae, chain


def convert(path, **settings):
    dit.convert(dit.Config(published=str(path), **settings))


def test_a_folder_of_diffusers_is_sampled_as_diffusers_computes(tmp_path, small, monkeypatch):
    """Its chain, scale and labels are those of its files, without a flag."""
    net = opened((4, 8, 8), patch_size=4, learn_sigma=True)
    theirs, vae, chain = pipeline(tmp_path / "DiT", net)
    vae.post_quant_conv.weight.data /= 100  # as above
    vae.save_pretrained(tmp_path / "DiT" / "vae")
    convert(tmp_path / "DiT", out=str(tmp_path / "run"))
    argv = ["--sample", tmp_path / "run" / "ckpt.pt", "--seeds", "5-8", "--classes", "tench,3"]
    argv += ["--guidance", 1, "--sample-steps", 3, "--gpus", 0, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["dit.py", *map(str, argv)])
    dit.main()
    seeds, y = torch.arange(5, 9), torch.tensor([3, 0, 3, 0])
    alpha_bar = chain.alphas_cumprod.double()
    z = ddim(lambda *a: theirs(*a).sample, alpha_bar, 3, seeds, y, 5, 1.0, (4, 8, 8))
    with torch.no_grad():
        expected, unscaled = (gray_levels(vae.decode(z / by).sample) for by in (0.5, 0.18215))
    assert np.abs(expected - unscaled).mean() > 5
    assert_images(tmp_path / "run" / "samples.npz", expected)


def test_names_of_labels_are_the_first_ones_and_all_different(tmp_path):
    pipeline_json = tmp_path / "model_index.json"
    pipeline_json.write_text(json.dumps({"id2label": LABELS}))
    names = label_names(tmp_path, 5)
    assert names == ["tench", "crane 1", "7 2", "crane 3", "4"]
    assert parse_classes("tench,crane 3,2,4", names) == [0, 3, 2, 4]
    pipeline_json.write_text("{}")
    numbers = [str(i) for i in range(1000)]
    assert label_names(tmp_path, 1000) == numbers
    assert label_names(tmp_path / "DiT.pt", 1000) == numbers


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_every_size_of_the_paper_is_known_by_its_numbers(size, patch):
    name = f"dit-{size}/{patch}"
    settings = dit.parse_size(name)
    assert model_name(settings | {"mlp_ratio": 4.0}, dit.SIZES, "file") == name
    with pytest.raises(BadInput, match="no published size .*mlp_ratio 3"):
        model_name(settings | {"mlp_ratio": 3.0}, dit.SIZES, "file")


@pytest.mark.parametrize("kind, scale", [("kl", 0.18215), ("folder", 0.5), ("tiny", 1.0)])
def test_latents_are_scaled_as_the_autoencoder_was_published(tmp_path, small, kind, scale, capsys):
    torch.save(opened((4, 8, 8)).state_dict(), tmp_path / "net.pt")
    named = tmp_path / {"kl": "ae.safetensors", "folder": "ae", "tiny": "tiny_encoder.pth"}[kind]
    if kind == "kl":
        ae = KLVAE(**SMALL_AE, channel_mult=(1, 1, 1, 1))
        save_file(ae.state_dict(), named)
    elif kind == "folder":
        autoencoderkl(scaling_factor=0.5).save_pretrained(named)
    else:
        ae = TinyAutoencoder(model_channels=8)
        for part in ("encoder", "decoder"):
            torch.save(getattr(ae, part).state_dict(), tmp_path / f"tiny_{part}.pth")
    convert(tmp_path / "net.pt", ae=str(named), out=str(tmp_path / "run"), data="photos")
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt", "dit")
    assert state["scale"] == scale and state["shape"] == [3, 64, 64]
    assert ("its files do not say" in capsys.readouterr().out) == (kind == "kl")
    told = dict(data="photos", size=64, model="dit-s/2", learn_sigma=False)
    told |= dict(schedule="linear", timesteps=1000, prediction="eps", label_dropout=0.1)
    assert told.items() <= state["config"].items()
    assert state["config"] == json.loads(json.dumps(state["config"]))  # as a run's: no tuples
    net, _, _, loaded = dit.load_net(tmp_path / "run" / "ckpt.pt", "cpu")
    original = dit.load_published(tmp_path / "net.pt").state_dict()
    assert all(torch.equal(value, original[name]) for name, value in net.state_dict().items())
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded.decode(z), load_pretrained(named)[0].decode(z))


def test_a_checkpoint_is_replaced_when_the_new_one_is_whole(tmp_path, small, monkeypatch):
    pipeline(tmp_path / "DiT", opened((4, 8, 8)))
    out = tmp_path / "run"
    convert(tmp_path / "DiT", out=str(out))
    before, save = (out / "ckpt.pt").read_bytes(), torch.save

    def full_disk(state, path):
        Path(path).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(BadInput, match="No space left on device"):
        convert(tmp_path / "DiT", out=str(out))
    assert [path.name for path in out.iterdir()] == ["ckpt.pt"]
    assert (out / "ckpt.pt").read_bytes() == before
    monkeypatch.setattr(torch, "save", save)
    convert(tmp_path / "DiT", out=str(out), data="photos")
    assert load_checkpoint(out / "ckpt.pt")["config"]["data"] == "photos"


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "kind, message",
    [
        ("size", "no published size .*hidden_size 16, depth 2.*dit-s, dit-b, dit-l, dit-xl"),
        ("heads", "no published size .*num_heads 4"),
        ("shift", r"latents shifted by 0\.1, which latent chapters do not do"),
        ("channels", "latents of 3 channels, .* of 4: .*--ae"),
        ("schedule", "scheduler_config.json: schedule linear from beta 0.0002 to 0.05"),
        ("prediction", "schedule linear and prediction x0: expected"),
        ("labels", "id2label must hold names by label, got a list"),
        ("alike", "id2label gives 'crane 1' to two labels"),
        ("no vae", "brings no autoencoder: add --ae"),
    ],
)
def test_folders_that_cannot_be_sampled_are_refused(tmp_path, small, kind, message):
    sizes = {"hidden_size": 16 if kind == "size" else 32, "num_heads": 4 if kind == "heads" else 2}
    net = opened((3 if kind == "channels" else 4, 8, 8), **sizes)
    ae = autoencoderkl(shift_factor=0.1) if kind == "shift" else None
    chain = {"schedule": dict(beta_end=0.05), "prediction": dict(prediction_type="sample")}
    labels = {"labels": ["crane"], "alike": LABELS | {"0": "crane 1"}}.get(kind, LABELS)
    pipeline(tmp_path / "DiT", net, ae, scheduler(**chain.get(kind, {})), labels)
    if kind == "no vae":
        (tmp_path / "DiT" / "vae").rename(tmp_path / "vae")
    with pytest.raises(BadInput, match=message) as refused:
        convert(tmp_path / "DiT", out=str(tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_an_autoencoder_whose_scale_nobody_tells_is_refused(tmp_path, small):
    torch.save(opened((4, 8, 8)).state_dict(), tmp_path / "net.pt")
    ae = KLVAE(**SMALL_AE, channel_mult=(1, 1, 1))  # f4, not Stable Diffusion's f8
    save_file(ae.state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(BadInput, match="does not say what its latents are multiplied by"):
        convert(tmp_path / "net.pt", ae=str(tmp_path / "ae.safetensors"), out=str(tmp_path / "run"))


def test_what_is_in_the_way_is_one_line_before_anything_is_read(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no weights")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "log.jsonl").touch()
    for flags, message in (
        ([tmp_path / "absent.pt", "--ae", "ae"], "absent.pt: no such file or folder"),
        ([tmp_path / "net.pt"], "net.pt brings no autoencoder: add --ae"),
        ([tmp_path / "net.pt", "--ae", "ae", "--out", tmp_path / "net.pt"], "net.pt is a file"),
        ([tmp_path / "net.pt", "--ae", "ae", "--out", tmp_path / "trained"], "a run trained here"),
        ([tmp_path / "net.pt", "--ae", tmp_path / "ae"], "ae: no such file or folder"),
        ([tmp_path / "net.pt", "--scale", 1], "unknown flag --scale"),
        ([tmp_path / "net.pt", "--sample", "ckpt.pt"], "--sample and --published: one at a time"),
    ):
        done = run("dit", "--published", *flags)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert done.err.startswith("error: ") and message in done.err
