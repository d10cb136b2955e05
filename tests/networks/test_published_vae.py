"""Published autoencoders: the same latents and images as diffusers and the written-out networks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from reference_metrics import import_references
from safetensors.torch import save_file
from vae_math import ldm_decode, ldm_encode, randomise, taesd_decode, taesd_encode

from networks.kl_autoencoder import KLVAE, TinyAutoencoder, load_pretrained

# AutoencoderKL's settings; the first two are Stable Diffusion's and SD3's, an eighth as wide.
KL = {
    "f8": dict(block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=4),
    "without quant": dict(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
    "f4, gray": dict(
        block_out_channels=(32, 32, 64),
        in_channels=1,
        out_channels=1,
        latent_channels=3,
        scaling_factor=0.5,
    ),
}


def kl(name="without quant"):
    import_references()  # diffusers imports torchvision where it is installed
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(KL[name]["block_out_channels"])
    types = dict(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    return randomise(AutoencoderKL(**types, **KL[name]))


def tiny(z_channels=4):
    import_references()
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    widths = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    return randomise(AutoencoderTiny(latent_channels=z_channels, **widths))


def images(channels=3, height=16, width=24):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, channels, height, width, generator=generator) * 2 - 1


def assert_same(ae, theirs):
    """encode and decode equal diffusers' to 1e-4; 1e-5 is seen."""
    x = images(theirs.config.in_channels)
    with torch.no_grad():
        if type(theirs).__name__ == "AutoencoderKL":
            q = theirs.encode(x).latent_dist
            expected = (q.mean, q.logvar)
        else:
            latents = theirs.encode(x).latents
            expected = (latents, torch.full_like(latents, -30))
        torch.testing.assert_close(ae.encode(x), expected, rtol=0, atol=1e-4)
        x_hat = theirs.decode(expected[0]).sample
    assert x_hat.std() > 0.01  # the comparison is of something
    torch.testing.assert_close(ae.decode(expected[0]), x_hat, rtol=0, atol=1e-4)


def ldm_state(net, levels, layers):
    """AutoencoderKL's weights in the LDM code's names, spelled out level by level."""
    theirs, state = net.state_dict(), {}

    def move(ours, name):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in theirs:
                state[f"{ours}.{kind}"] = theirs.pop(f"{name}.{kind}").clone()

    def block(ours, name):
        for part in ("norm1", "conv1", "norm2", "conv2"):
            move(f"{ours}.{part}", f"{name}.{part}")
        move(f"{ours}.nin_shortcut", f"{name}.conv_shortcut")

    for half, direction, blocks, samplers, count in (
        ("encoder", "down", "down_blocks", "downsample", layers),
        ("decoder", "up", "up_blocks", "upsample", layers + 1),
    ):
        for i in range(levels):
            at = f"{half}.{direction}.{i if direction == 'down' else levels - 1 - i}"
            for j in range(count):
                block(f"{at}.block.{j}", f"{half}.{blocks}.{i}.resnets.{j}")
            move(f"{at}.{samplers}.conv", f"{half}.{blocks}.{i}.{samplers}rs.0.conv")
        block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = f"{half}.mid_block.attentions.0"
        move(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        for ours, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            move(f"{half}.mid.attn_1.{ours}", f"{attention}.{part}")
            state[f"{half}.mid.attn_1.{ours}.weight"].unsqueeze_(2).unsqueeze_(3)
        move(f"{half}.norm_out", f"{half}.conv_norm_out")
        for name in ("conv_in", "conv_out"):
            move(f"{half}.{name}", f"{half}.{name}")
    move("quant_conv", "quant_conv")
    move("post_quant_conv", "post_quant_conv")
    assert not theirs
    return state


# ------------------------------------------------------------------------------------ AutoencoderKL


@pytest.mark.parametrize("name", KL)
def test_a_folder_of_autoencoderkl_encodes_and_decodes_as_diffusers_does(tmp_path, name):
    theirs = kl(name)
    theirs.save_pretrained(tmp_path)
    ae, facts = load_pretrained(tmp_path)
    assert_same(ae, theirs)
    assert facts == dict(
        kind="ldm",
        source=str(tmp_path),
        scaling=KL[name].get("scaling_factor", 0.18215),
        shift=KL[name].get("shift_factor", 0.0),
    )
    assert not ae.training
    assert not any(p.requires_grad for p in ae.parameters())
    assert ae.factor == 2 ** (len(KL[name]["block_out_channels"]) - 1)


def test_the_vae_of_a_pipeline_and_the_attention_names_of_2022_are_read(tmp_path):
    theirs = kl()
    theirs.save_pretrained(tmp_path / "vae", safe_serialization=False)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in state
    torch.save(state, weights)
    (tmp_path / "model_index.json").write_text("{}")
    assert_same(load_pretrained(tmp_path)[0], theirs)


def test_half_precision_weights_become_float32(tmp_path):
    theirs = kl().half()
    theirs.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    ae, _ = load_pretrained(tmp_path)
    assert {p.dtype for p in ae.parameters()} == {torch.float32}
    assert_same(ae, theirs.float())


def test_a_config_without_a_scale_means_stable_diffusions(tmp_path):
    kl("f4, gray").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = load_pretrained(tmp_path)[1]
    assert (facts["scaling"], facts["shift"]) == (0.18215, 0.0)


# ------------------------------------------------------------------------------------- the LDM code


def test_a_whole_checkpoint_of_ldm_gives_its_first_stage(tmp_path):
    theirs = kl("f4, gray")
    state = ldm_state(theirs, levels=3, layers=1)
    ae = randomise(KLVAE(1, 32, (1, 1, 2), 1, 3, norm_groups=32))
    assert state.keys() == ae.state_dict().keys()
    whole = {f"first_stage_model.{name}": value for name, value in state.items()}
    whole["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(3)
    whole["first_stage_model_ema.decay"] = torch.zeros(())
    whole["scale_factor"] = torch.tensor(0.25)
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "model.ckpt")
    ae, facts = load_pretrained(tmp_path / "model.ckpt")
    assert_same(ae, theirs)
    assert (facts["kind"], facts["scaling"], facts["shift"]) == ("ldm", 0.25, 0.0)


def test_a_file_of_ldms_autoencoder_is_its_network_written_out(tmp_path):
    ae = randomise(KLVAE(3, 64, (1, 1), 1))  # 32 groups, as all that is published
    state = ae.state_dict()
    save_file({**state, "loss.logvar": torch.zeros(())}, tmp_path / "autoencoder_kl.safetensors")
    loaded, facts = load_pretrained(tmp_path / "autoencoder_kl.safetensors")
    assert facts["scaling"] is facts["shift"] is None
    state, x = {name: value.double() for name, value in state.items()}, images()
    mean, log_var = ldm_encode(state, x.double(), groups=32)
    torch.testing.assert_close(loaded.encode(x), (mean.float(), log_var.float()), rtol=0, atol=2e-5)
    x_hat = ldm_decode(state, mean, groups=32).float()
    torch.testing.assert_close(loaded.decode(mean), x_hat, rtol=0, atol=2e-5)


# --------------------------------------------------------------------------- the tiny autoencoders


@pytest.mark.parametrize("z_channels", [4, 16])
def test_tiny_autoencoders_encode_and_decode_as_diffusers_does(tmp_path, z_channels):
    theirs = tiny(z_channels)
    theirs.save_pretrained(tmp_path)
    ae, facts = load_pretrained(tmp_path)
    assert_same(ae, theirs)
    assert (facts["kind"], facts["scaling"], facts["shift"]) == ("tiny", 1.0, 0.0)
    assert (ae.factor, ae.z_channels, ae.channels) == (8, z_channels, 3)


@pytest.mark.parametrize("named", ["", "taex_encoder.pth", "taex_decoder.pth"])
def test_the_pair_of_files_is_read_from_its_folder_or_either_name(tmp_path, named):
    theirs = tiny()
    for half in ("encoder", "decoder"):
        layers, shift = getattr(theirs, half).layers, int(half == "decoder")  # after the clamp
        state = {}
        for name, value in layers.state_dict().items():
            i, rest = name.split(".", 1)
            state[f"{int(i) + shift}.{rest}"] = value
        torch.save(state, tmp_path / f"taex_{half}.pth")
    assert_same(load_pretrained(tmp_path / named)[0], theirs)


def test_one_file_of_32_channels_in_diffusers_names_is_read(tmp_path):
    ae = randomise(TinyAutoencoder(32, model_channels=8, pooled=True))
    state = {}
    for name, value in ae.state_dict().items():
        half, i, rest = name.split(".", 2)
        state[f"{half}.layers.{int(i) - (half == 'decoder')}.{rest}"] = value
    save_file(state, tmp_path / "taex.safetensors")
    loaded = load_pretrained(tmp_path)[0]
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ae.state_dict().items())


def center(path, size):
    """The middle of a photo, its shorter side resized, (3,size,size) in [-1,1]."""
    with Image.open(path) as image:
        scale = size / min(image.size)
        wide = image.convert("RGB").resize([max(size, round(n * scale)) for n in image.size], 1)
    left, top = (wide.width - size) // 2, (wide.height - size) // 2
    pixels = np.array(wide.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def taef2(shared_data):
    return load_pretrained(shared_data / "taef2")[0]


def test_the_published_taef2_is_its_network_written_out(taef2, shared_data):
    assert (taef2.z_channels, taef2.factor) == (32, 8)
    state, x = {}, images(3, 32, 48)
    for half in ("encoder", "decoder"):
        file = torch.load(shared_data / "taef2" / f"taef2_{half}.pth", weights_only=True)
        state |= {f"{half}.{name}": value.double() for name, value in file.items()}
    with torch.no_grad():
        mean = taesd_encode(state, x.double())
        torch.testing.assert_close(taef2.encode(x)[0], mean.float(), rtol=0, atol=2e-5)
        x_hat = taesd_decode(state, mean).float()
        torch.testing.assert_close(taef2.decode(mean), x_hat, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("size", "bound"), [(128, 28.0), (256, 32.5)])
def test_the_published_taef2_gives_photos_back(taef2, shared_data, size, bound):
    paths = sorted((shared_data / "imagenet-samples").glob("*/*.JPEG"))[::50]
    x = torch.stack([center(path, size) for path in paths[: 512 // size]])  # (4 or 2,3,size,size)
    with torch.inference_mode():
        mean, _ = taef2.encode(x)
        x_hat = taef2.decode(mean).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - x_hat).square().mean(dim=(1, 2, 3))).mean()
    assert psnr > bound  # 28.5 and 33.2 dB are seen
    assert 0.6 < mean.std() < 1.2  # of about unit variance, as published latents are


def test_gradients_reach_latents_and_images_through_frozen_weights(taef2):
    x = images(3, 16, 16).requires_grad_()
    z = taef2.encode(x)[0]
    taef2.decode(z).square().mean().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in taef2.parameters())
