"""Stable Diffusion 1 as published: a folder of diffusers and one file are read alike, all else not.

tests/tiny_stable_diffusion.py makes the folder; write_tiny's file is read by diffusers' conversions
from CompVis's names.
"""

from runtime import processes
from runtime.commandline import BadInput

import json
import math
import shutil

import pytest
import tiny_stable_diffusion as tiny
import torch
from compvis_unet import compvis
from reference_metrics import import_references
from safetensors.torch import load_file

from networks.clip_text import CLIPText
from networks.clip_tokens import Tokenizer
from networks.kl_autoencoder import KLVAE
from networks.published.stable_diffusion import published_alpha_bar, read_pipeline, write_tiny
from networks.sd_unet import LatentUNet

PROMPTS = ["a red cat of the house", "Tree!"]
TEXT = "cond_stage_model.transformer.text_model."
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."


def rebuilt(found):
    """(U-Net, text encoder, autoencoder) of a Published."""
    settings = found.unet["settings"]
    nets = (
        LatentUNet(found.unet["channels"], found.unet["num_classes"], **settings),
        CLIPText(**found.text[0]),
        KLVAE(**found.autoencoder[0]),
    )
    states = found.unet["state"], found.text[1], found.autoencoder[1]
    for net, state in zip(nets, states, strict=True):
        net.load_state_dict(state)
        net.eval().requires_grad_(False)
    return nets


@torch.no_grad()
def assert_same(found, unet, text_encoder, vae, tokens):
    """The three networks compute what diffusers' and transformers' do of the same tokens."""
    ours = rebuilt(found)
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([7, 980])
    x = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    context = text_encoder(tokens).last_hidden_state
    pairs = (
        (ours[1](tokens), context),
        (ours[0](z, t, context=context), unet(z, t, context).sample),
        (ours[2].encode(x)[0], vae.encode(x).latent_dist.mean),
        (ours[2].decode(z), vae.decode(z).sample),
    )
    for got, expected in pairs:
        assert expected.std() > 0.1 and got.shape == expected.shape
        assert (got - expected).abs().max() < 2e-5 * expected.std()


# ---------------------------------------------------------------------------- a folder of diffusers


def test_a_folder_of_diffusers_computes_the_same(folder):
    found, theirs = read_pipeline(folder), tiny.loaded(folder)
    told = dict(padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    tokens = theirs["tokenizer"](PROMPTS, **told).input_ids
    assert torch.equal(found.tokenizer(PROMPTS), tokens)
    assert_same(found, theirs["unet"], theirs["text_encoder"], theirs["vae"], tokens)
    assert (found.alpha_bar - tiny.alpha_bar()).abs().max() < 1e-15
    assert found.alpha_bar.dtype == torch.float64
    assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == ("", 1, False)
    assert found.autoencoder[2]["scaling"] == 0.18215 and found.autoencoder[2]["shift"] == 0


def test_half_precision_variants_are_read_as_float32(folder, tmp_path):
    theirs = tiny.loaded(folder)
    for name in ("unet", "vae", "text_encoder"):
        theirs[name].half().save_pretrained(tmp_path / name, variant="fp16")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    whole, half = read_pipeline(folder), read_pipeline(tmp_path)
    for a, b in (
        (whole.unet["state"], half.unet["state"]),
        (whole.text[1], half.text[1]),
        (whole.autoencoder[1], half.autoencoder[1]),
    ):
        assert a.keys() == b.keys() and {v.dtype for v in b.values()} == {torch.float32}
        assert all(torch.equal(value.half().float(), b[name]) for name, value in a.items())


def test_a_vocabulary_that_is_named_wins(folder, copy):
    names, merges = tiny.vocabulary()
    shutil.rmtree(copy / "tokenizer")
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])
    (copy / "merges.txt").write_text(text)
    own = read_pipeline(folder).tokenizer
    assert read_pipeline(copy, folder / "tokenizer").tokenizer.vocabulary == own.vocabulary == names
    # A list alone numbers the bytes in OpenAI's order, printed ones first.
    for where in (copy, folder):
        named = read_pipeline(where, copy / "merges.txt").tokenizer.vocabulary
        assert named == Tokenizer.of_file(copy / "merges.txt").vocabulary != names


# ------------------------------------------------------------------------------------- the schedule


def scheduled(copy, scheduler, **changes):
    """What the folder tells with this scheduler of diffusers, its file changed."""
    shutil.rmtree(copy / "scheduler")
    scheduler.save_pretrained(copy / "scheduler")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return read_pipeline(copy)


@pytest.mark.parametrize(
    "name, told, expected",
    [
        ("DDIMScheduler", dict(steps_offset=1, set_alpha_to_one=False), ("leading", 1, False)),
        ("DDIMScheduler", dict(timestep_spacing="trailing"), ("trailing", 1, True)),
        ("DDIMScheduler", dict(steps_offset=3), ("leading", 3, True)),
        ("PNDMScheduler", dict(skip_prk_steps=True, steps_offset=1), ("leading", 1, False)),
        ("DPMSolverMultistepScheduler", {}, ("linear", 1, False)),
        ("EulerAncestralDiscreteScheduler", {}, ("linear", 1, False)),
        ("EulerDiscreteScheduler", dict(timestep_spacing="leading"), ("leading", 1, False)),
        ("UniPCMultistepScheduler", {}, ("linear", 1, False)),
        ("DDPMScheduler", dict(timestep_spacing="trailing"), ("trailing", 1, False)),
    ],
)
@pytest.mark.parametrize(
    "beta",
    [
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="linear", beta_start=0.001, beta_end=0.01, num_train_timesteps=300),
    ],
    ids=["scaled_linear", "linear"],
)
def test_the_schedules_of_diffusers_are_obeyed(copy, name, told, expected, beta):
    import_references()
    import diffusers

    kind = getattr(diffusers, name)
    no_clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    scheduler = kind(**beta, **told, **no_clip)
    found = scheduled(copy, scheduler)
    assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == expected
    assert found.alpha_bar.shape == scheduler.alphas_cumprod.shape
    difference = (found.alpha_bar / scheduler.alphas_cumprod - 1).abs().max()
    assert difference < 1e-4  # theirs is a product of float32 numbers


@pytest.mark.parametrize("betas", ["squaredcos_cap_v2", [0.1, 0.2, 0.4]], ids=["cosine", "trained"])
def test_other_noise_is_obeyed_too(copy, betas):
    import_references()
    from diffusers import DDIMScheduler

    told = dict(trained_betas=betas, num_train_timesteps=3)
    told = dict(beta_schedule=betas) if isinstance(betas, str) else told
    scheduler = DDIMScheduler(**told, clip_sample=False)
    found = scheduled(copy, scheduler)
    assert (found.alpha_bar - scheduler.alphas_cumprod).abs().max() < 1e-6


def test_what_a_scheduler_leaves_out_is_what_its_class_means(copy):
    file = copy / "scheduler" / "scheduler_config.json"
    for name, to_one in (("DDIMScheduler", True), ("PNDMScheduler", False)):
        file.write_text(json.dumps({"_class_name": name} | tiny.SCHEDULE))
        found = read_pipeline(copy)
        assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == ("", 1, to_one)


@pytest.mark.parametrize(
    "field, value",
    [
        ("clip_sample", True),  # which diffusers' pipeline sets to false
        ("noise_sampler_seed", None),
        ("original_inference_steps", None),
        ("rescale_betas_zero_snr", None),
        ("thresholding", None),
        ("timestep_spacing", None),
        ("steps_offset", 999),
    ],
)
def test_fields_that_mean_nothing_here_are_accepted(copy, field, value):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    offset = value if field == "steps_offset" else 1
    assert read_pipeline(copy)[-3:] == ("", offset, False)


def test_what_is_understood_is_said_in_one_line(
    copy, single, tensors, tmp_path, capsys, monkeypatch
):
    def said(*arguments):
        monkeypatch.setattr(processes, "SAID", set())
        read_pipeline(*arguments)
        return capsys.readouterr().out

    where = "timesteps as the sampler has them, offset 1"
    assert said(copy) == f"schedule: T 1000, Stable Diffusion's, {where}\n"
    file = copy / "scheduler" / "scheduler_config.json"
    told = dict(beta_schedule="linear", num_train_timesteps=30, timestep_spacing="trailing")
    file.write_text(json.dumps(told | dict(set_alpha_to_one=True)))
    assert said(copy) == "schedule: T 30, linear, timesteps trailing, offset 1, to alpha_bar 1\n"
    file.write_text(json.dumps(dict(trained_betas=[0.1, 0.2])))
    assert said(copy) == f"schedule: T 2, trained_betas, {where}\n"
    means = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value.clone()
        for name, value in tensors.items()
        if name.startswith(UNET)
    }
    state = tensors | means | {"alphas_cumprod": torch.linspace(0.99, 0.01, 500)}
    path = tiny.saved_state(tmp_path / "means.safetensors", state)
    where = "the weights' own alphas_cumprod, timesteps leading, offset 1"
    means = "the U-Net's running means are taken"
    assert said(path, single[1]) == f"schedule: T 500, {where}; {means}\n"
    with torch.device("meta"):
        assert said(copy) == ""


def test_a_folder_without_a_scheduler_has_that_of_one_file(copy):
    shutil.rmtree(copy / "scheduler")
    found = read_pipeline(copy)
    assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == ("leading", 1, False)
    assert torch.equal(found.alpha_bar, published_alpha_bar())


# ----------------------------------------------------------------------------------------- one file


def test_diffusers_reads_the_tiny_file_as_compviss_and_computes_the_same(single, tensors):
    """Its own conversions rename the tensors, and every name and shape finds its place."""
    import_references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModel

    state, found = {k: v.float() for k, v in tensors.items()}, read_pipeline(*single)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vocab_size, width = tensors[f"{TEXT}embeddings.token_embedding.weight"].shape
    sizes = dict(vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width)
    ids = dict(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    heads = dict(num_hidden_layers=2, num_attention_heads=1)
    text = CLIPTextModel(CLIPTextConfig(**sizes, **ids, **heads))
    unet.load_state_dict(theirs.convert_ldm_unet_checkpoint(dict(state), dict(unet.config)))
    vae.load_state_dict(theirs.convert_ldm_vae_checkpoint(dict(state), dict(vae.config)))
    names = text.state_dict()
    converted = {k.removeprefix(TEXT): v for k, v in state.items() if k.startswith(TEXT)}
    converted.pop("embeddings.position_ids")
    text.load_state_dict({n: converted[n.removeprefix("text_model.")] for n in names})
    assert len(converted) == len(names)
    assert_same(found, unet.eval(), text.eval(), vae.eval(), found.tokenizer(PROMPTS))
    assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == ("leading", 1, False)
    assert (found.alpha_bar - tiny.alpha_bar()).abs().max() < 1e-15


def test_the_tiny_file_has_the_names_and_shapes_of_compvis(tensors):
    listed = compvis(64, (1, 1), 1, (1,), 64)
    found = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith(UNET)}
    assert found == {name: tuple(shape) for name, shape in listed.items()}


def test_the_tiny_file_is_small_and_of_its_seed(single, tensors, tmp_path):
    assert single[0].stat().st_size < 5e6
    for value in tensors.values():
        assert value.isfinite().all() and value.float().std() > 0.01
    again = write_tiny(tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(single, again, strict=True))
    other = load_file(write_tiny(tmp_path / "other", seed=1)[0])
    same = [name for name, value in tensors.items() if torch.equal(value, other[name])]
    assert sorted(same) == ["alphas_cumprod", f"{TEXT}embeddings.position_ids"]


@torch.no_grad()
def test_what_the_tiny_model_draws_is_neither_flat_nor_blank(single):
    found = read_pipeline(*single)
    unet, text, ae = rebuilt(found)
    context = text(found.tokenizer(PROMPTS))
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    for t in (1, 500, 981):
        out = unet(z, torch.tensor([t, t]), context=context)
        assert 0.7 < out.std() < 1.4
        swapped = unet(z, torch.tensor([t, t]), context=context.flip(0))
        assert (out - swapped).std() > 0.02  # it reads the prompt
    scale = found.autoencoder[2]["scaling"]
    x = ae.decode(z / scale)
    assert 0.3 < x.std() < 0.8 and (x.abs() > 1).float().mean() < 0.2
    mean = ae.encode(x.clamp(-1, 1))[0] * scale
    assert 0.5 < mean.std() < 2


def test_the_tiny_vocabulary_joins_its_words(single):
    tokenizer = read_pipeline(*single).tokenizer
    assert tokenizer.encode("the red cat") == [
        tokenizer.vocabulary[f"{word}</w>"] for word in ("the", "red", "cat")
    ]
    assert len(tokenizer.encode("zebra")) == 5


@pytest.mark.parametrize("form", ["sd.ckpt", "sd.safetensors"])
def test_names_of_transformers_before_they_had_text_model(tensors, single, tmp_path, form):
    state = {name.replace("text_model.", ""): value for name, value in tensors.items()}
    found = read_pipeline(tiny.saved_state(tmp_path / form, state), single[1])
    expected = read_pipeline(*single)
    assert all(torch.equal(v, found.text[1][k]) for k, v in expected.text[1].items())


def test_what_lies_beside_a_single_file_is_not_looked_at(tensors, single, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Other", "scaling_factor": 3}')
    found = read_pipeline(tiny.saved_state(tmp_path / "sd.safetensors", tensors), single[1])
    assert found.autoencoder[2]["scaling"] == 0.18215


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_published_noise_is_exact_in_any_precision(tensors, single, tmp_path, dtype):
    state = tensors | {"alphas_cumprod": tiny.alpha_bar().to(dtype)}
    found = read_pipeline(tiny.saved_state(tmp_path / "sd.safetensors", state), single[1])
    assert (found.alpha_bar - tiny.alpha_bar()).abs().max() < 1e-15


def test_other_noise_of_a_file_is_obeyed(tensors, single, tmp_path):
    path = tmp_path / "sd.safetensors"
    own = torch.linspace(0.99, 0.01, 500)
    assert torch.equal(
        read_pipeline(
            tiny.saved_state(path, tensors | {"alphas_cumprod": own}), single[1]
        ).alpha_bar,
        own.double(),
    )
    found = read_pipeline(tiny.saved_state(path, tensors | {"alphas_cumprod": None}), single[1])
    assert torch.equal(found.alpha_bar, published_alpha_bar())
    for wrong in (own.flip(0), own[:, None].contiguous(), torch.ones(4), torch.ones(1000)):
        with pytest.raises(BadInput, match="alphas_cumprod is no schedule"):
            read_pipeline(tiny.saved_state(path, tensors | {"alphas_cumprod": wrong}), single[1])


def test_a_checkpoint_is_read_as_the_same_tensors(tensors, single, tmp_path):
    torch.save({"state_dict": tensors, "global_step": 470_000}, tmp_path / "sd.ckpt")
    found, expected = read_pipeline(tmp_path / "sd.ckpt", single[1]), read_pipeline(*single)
    for a, b in ((found.unet["state"], expected.unet["state"]), (found.text[1], expected.text[1])):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_published_numbers(tensors):
    """Stable Diffusion's alpha_bar ends, as its configuration v1-inference.yaml says."""
    alpha_bar = published_alpha_bar()
    assert math.isclose(alpha_bar[0], 1 - 0.00085, rel_tol=1e-12)
    assert math.isclose(1 - alpha_bar[999] / alpha_bar[998], 0.012, rel_tol=1e-12)
    assert torch.equal(tensors["alphas_cumprod"], alpha_bar.float())
