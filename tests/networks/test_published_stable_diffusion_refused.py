"""What is no whole Stable Diffusion 1, published, is refused in one line that says what it is."""

from runtime.commandline import BadInput

import json

import pytest
import tiny_stable_diffusion as tiny
import torch

from networks.clip_text import CLIPText
from networks.kl_autoencoder import KLVAE
from networks.published.stable_diffusion import read_pipeline, write_weights
from networks.sd_unet import LatentUNet

TEXT = "cond_stage_model.transformer.text_model."
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."


def altered(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path, expected, vocabulary=""):
    with pytest.raises(BadInput, match=expected) as told:
        read_pipeline(path, vocabulary)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_folder_without_a_part_or_its_files_is_refused(copy, part):
    for file in (copy / part).iterdir():
        file.unlink()
    refused(copy, f"{part}.*(holds no|cannot be read)")
    (copy / part).rmdir()
    refused(copy, f"sd has no {part}/: expected a pipeline of diffusers, a folder with unet/, vae/")


def test_folders_of_something_else_are_refused_with_what_they_are(copy, single):
    refused(copy / "unet", r"has no unet/ and no vae/ and .*config.json is of UNet2DConditionModel")
    refused(single[0].parent, f"has no unet/.*name the file {single[0]}")
    refused(copy / "nowhere", "nowhere: no such file or folder")
    (copy / "text_encoder_2").mkdir()
    refused(copy, "sd is Stable Diffusion XL or later: expected all of Stable Diffusion 1.x")


def test_parts_of_stable_diffusion_2_and_xl_are_refused_by_name(copy):
    altered(copy / "tokenizer" / "tokenizer_config.json", pad_token="!")
    refused(copy, "padded with '!', expected .*endoftext.*Stable Diffusion 2.x")
    altered(copy / "tokenizer" / "tokenizer_config.json", pad_token={"content": "<|endoftext|>"})
    altered(copy / "text_encoder" / "config.json", hidden_act="gelu")
    refused(copy, "OpenCLIP text encoder of Stable Diffusion 2.x")
    altered(copy / "text_encoder" / "config.json", hidden_act="quick_gelu")
    altered(copy / "unet" / "config.json", addition_embed_type="text_time")
    refused(copy, "unet/config.json: addition_embed_type 'text_time' is not supported")


@pytest.mark.parametrize(
    "channels, expected",
    [
        (9, "makes 4 channels of 9, expected as many: it is an inpainting U-Net"),
        (5, "makes 4 channels of 5, expected as many: it is a depth U-Net"),
        (8, "makes 4 channels of 8, expected as many: it is a U-Net that edits an image"),
        (7, "makes 4 channels of 7, expected as many: it is a U-Net that sees more than the lat"),
    ],
)
def test_u_nets_that_see_more_than_the_latent_are_refused(
    tensors, single, tmp_path, channels, expected
):
    wide = {f"{UNET}input_blocks.0.0.weight": torch.ones(64, channels, 3, 3)}
    path = tiny.saved_state(tmp_path / "sd.safetensors", tensors | wide)
    refused(path, f"sd.safetensors {expected}", single[1])


def test_parts_of_two_models_are_refused(folder, tensors, single, tmp_path):
    path = tmp_path / "sd.safetensors"
    for width, word in ((1024, "1024 wide, as Stable Diffusion 2's, but"), (96, "96 wide, but")):
        other = {
            name: torch.ones(64, width)
            for name in tensors
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        refused(tiny.saved_state(path, tensors | other), f"U-Net reads a context {word}", single[1])
    ae = KLVAE(3, 32, (1, 1), 1, z_channels=3, norm_groups=32).state_dict()
    rest = {name: value for name, value in tensors.items() if not name.startswith(FIRST_STAGE)}
    other = {FIRST_STAGE + name: value for name, value in ae.items()}
    refused(
        tiny.saved_state(path, rest | other), "latents of 3 channels, its U-Net of 4", single[1]
    )
    refused(
        single[0], "its text encoder knows 557 tokens, the vocabulary has", folder / "tokenizer"
    )


@pytest.mark.parametrize("groups", ["a", 7, 0])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_groups_that_do_not_divide_are_refused_with_their_file(copy, part, groups):
    altered(copy / part / "config.json", norm_num_groups=groups)
    refused(copy, f"{part}/config.json: .*{groups}.* (must be a whole number|do not divide)")


def test_channels_that_the_published_groups_do_not_divide_are_refused(copy, single, tmp_path):
    (copy / "vae" / "config.json").unlink()
    refused(copy, r"vae/diffusion.*safetensors: 32 norm groups do not divide .*\[8, 16\]")
    unet = LatentUNet(
        4,
        None,
        model_channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        num_heads=8,
        context_dim=64,
    )
    text, ae = CLIPText(557, width=64, layers=1, heads=1, hidden=8), KLVAE(norm_groups=32)
    write_weights(tmp_path / "x.safetensors", unet, text, ae)
    words = r"its U-Net's channels \[48, 96\] are no multiples of 32"
    refused(tmp_path / "x.safetensors", f"x.safetensors: {words}", single[1])


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "a"])
def test_a_scaling_that_is_none_is_refused(copy, value):
    altered(copy / "vae" / "config.json", scaling_factor=value)
    refused(copy, f"vae/config.json: scaling_factor {value!r} must be a number above 0")


def test_latents_with_a_shift_are_refused(copy):
    altered(copy / "vae" / "config.json", shift_factor=0.5)
    refused(copy, "autoencoder shifts latents by 0.5")


def test_one_file_needs_a_vocabulary(single, tmp_path):
    refused(single[0], "has no tokenizer.* add --vocabulary bpe_simple_vocab_16e6.txt.gz, or a fol")
    refused(single[0], "nowhere.txt cannot be read", tmp_path / "nowhere.txt")
    refused(single[0], "cannot be read", tmp_path)


FIRST, SECOND = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    "state, expected",
    [
        ({"special_care_embeds": FIRST, "vision_model.x": SECOND}, "holds only a safety checker"),
        ({"vision_model.embeddings.x": FIRST}, "holds only an image encoder"),
        ({"input_blocks.0.0.weight": FIRST, "out.0.weight": SECOND}, "holds only a U-Net"),
        ({"down_blocks.0.x": FIRST}, "holds only a U-Net"),
        ({"encoder.conv_in.weight": FIRST, "decoder.x": SECOND}, "holds only an autoencoder"),
        ({"text_model.embeddings.x": FIRST}, "holds only a text encoder"),
        ({"encoder.layers.0.x": FIRST, "embeddings.x": SECOND}, "holds only a text encoder"),
        ({"lora_unet_down.alpha": FIRST}, "holds only a LoRA"),
        ({"control_model.input_blocks.x": FIRST}, "holds only a ControlNet"),
        ({"controlnet_cond.x": FIRST, "down_blocks.0.x": SECOND}, "holds only a ControlNet"),
        ({"any": FIRST}, "holds only any and others"),
        ({}, "holds no tensors: expected all of Stable Diffusion 1.x"),
        ({f"{UNET}x": FIRST, f"{FIRST_STAGE}x": SECOND}, "holds no text encoder: expected all"),
        ({f"{UNET}x": FIRST}, "holds no text encoder and no autoencoder: expected all of Stable"),
        ({"conditioner.embedders.0.x": FIRST, f"{UNET}x": SECOND}, "is Stable Diffusion XL"),
        ({"cond_stage_model.model.x": FIRST, f"{UNET}x": SECOND}, "is Stable Diffusion 2.x"),
        ({f"{UNET}joint_blocks.0.x": FIRST}, "is Stable Diffusion 3"),
        ({f"{UNET}double_blocks.0.x": FIRST}, "is FLUX.1"),
        ({f"{UNET}x": FIRST, "v_pred": SECOND}, "predicts v, not the noise"),
    ],
)
def test_files_of_something_else_are_refused_with_what_they_are(tmp_path, state, expected):
    for name in ("x.safetensors", "x.ckpt"):
        refused(tiny.saved_state(tmp_path / name, state), f"{name} {expected}")


def test_the_first_tensor_that_is_missing_is_named(tensors, single, tmp_path):
    for name in (
        f"{TEXT}final_layer_norm.bias",
        f"{UNET}out.2.bias",
        f"{UNET}input_blocks.1.1.proj_out.weight",
        f"{FIRST_STAGE}encoder.conv_in.weight",
    ):
        path = tiny.saved_state(tmp_path / "sd.safetensors", tensors | {name: None})
        short = name.removeprefix(TEXT).removeprefix(UNET).removeprefix(FIRST_STAGE)
        refused(path, f"sd.safetensors.* {short}", single[1])


def test_torn_files_are_refused(single, tmp_path):
    whole = single[0].read_bytes()
    for name in ("sd.safetensors", "sd.ckpt"):
        for content in (whole[: len(whole) // 2], whole[:10], b""):
            (tmp_path / name).write_bytes(content)
            refused(tmp_path / name, f"{name} is no .*or a torn one", single[1])
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        refused(tmp_path / name, f"{name} is .*text, '<html>.*fetch it again", single[1])


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_file_is_never_executed(tensors, single, tmp_path, capsys):
    torch.save({"state_dict": tensors, "callbacks": Harmful()}, tmp_path / "sd.ckpt")
    refused(tmp_path / "sd.ckpt", "print was not an allowed global", single[1])
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("prediction_type", "v_prediction", "predicts 'v_prediction', as networks of .* 2 do"),
        ("prediction_type", "sample", "predicts 'sample', expected 'epsilon'"),
        ("prediction_type", ["epsilon"], r"prediction_type \['epsilon'\] is not supported"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr is not supported"),
        ("thresholding", True, "thresholding True is not supported, expected False"),
        ("use_karras_sigmas", True, "use_karras_sigmas True is not supported"),
        ("final_sigmas_type", "sigma_min", "final_sigmas_type 'sigma_min' is not supported"),
        ("original_inference_steps", 50, "no counterpart here for original_inference_steps 50"),
        ("", 1, "no counterpart here for  1"),
        ("beta_schedule", "sigmoid", "beta_schedule 'sigmoid' is not supported"),
        ("beta_start", -0.1, "beta_start -0.1 must be a number from 0 to 1"),
        ("beta_start", 0, "is no schedule: expected a row that falls"),
        ("beta_end", "big", "beta_end 'big' must be a number from 0 to 1"),
        ("beta_end", 0.0008, "beta_end 0.0008 must not be below beta_start 0.00085"),
        ("num_train_timesteps", "1000", "num_train_timesteps '1000' must be a whole number from 1"),
        ("num_train_timesteps", 0, "num_train_timesteps 0 must be a whole number from 1 to 100000"),
        ("trained_betas", [0.1, 0.0], "is no schedule: expected a row that falls"),
        ("trained_betas", [[0.1], [0.2]], "trained_betas .* must be a list of numbers from 0 to 1"),
        ("trained_betas", [0.1, 1.0], "is no schedule: expected a row that falls"),
        ("timestep_spacing", "karras", "timestep_spacing 'karras' is not supported"),
        ("timestep_spacing", ["leading"], "timestep_spacing .* is not supported"),
        ("steps_offset", -1, "steps_offset -1 must be a small whole number"),
        ("steps_offset", 1000, "steps_offset 1000 must be a small whole number"),
        ("steps_offset", 1.5, "steps_offset 1.5 must be a small whole number"),
        ("set_alpha_to_one", "no", "set_alpha_to_one 'no' must be true or false"),
    ],
)
def test_fields_of_a_scheduler_without_a_counterpart_are_refused(copy, field, value, expected):
    file = copy / "scheduler" / "scheduler_config.json"
    length = {"num_train_timesteps": len(value)} if field == "trained_betas" else {}
    altered(file, **{field: value}, **length)
    refused(copy, f"scheduler_config.json.*{expected}")
