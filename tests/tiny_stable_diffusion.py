"""A tiny Stable Diffusion 1 by diffusers and transformers, and what their pipelines draw with it.

    folder = saved(tmp_path_factory.getbasetemp())       unet/, vae/, text_encoder/, ...
    pipe = pipeline(folder, "ddim")                      of diffusers, with that scheduler
    z = latents(pipe, prompts, noise, steps, w)          where its walk ends
    call(*asked(folder, "--out", out))                   our command, in this process

The weights are random, and no tensor is left at its start: a zero projection would hide what is
wrong before it. Latents have an eighth of an image's sides, as the published ones have.
"""

from runtime.commandline import BadInput

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reference_metrics import import_references
from safetensors.torch import load_file, save_file

from kernels import gaussian

WORDS = ("a", "cat", "dog", "red", "blue", "of", "the", "and", "house", "tree", "painting")
# Stable Diffusion 1's; what a published scheduler_config.json leaves out, diffusers fills in.
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
DDIM = SCHEDULE | dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
NEGATIVE = "blue, blurry dog"
PROMPTS = ["a red cat", "The painting of a house, and a dog"]


def alpha_bar():
    """alpha_bar_t float64 (1000,) of Stable Diffusion, written out: sqrt(beta) rises linearly."""
    ends = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
    return (1 - torch.linspace(*ends, 1000, dtype=torch.float64) ** 2).cumprod(0)


# ------------------------------------------------------------------------------------ the tokenizer


def byte_symbols():
    """The 256 characters that stand for bytes in GPT-2's and CLIP's vocabularies, byte 0 first."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte if byte in shown else 256 + others.index(byte)) for byte in range(256)}


def vocabulary():
    """({symbol: id}, [(left, right)]): bytes, bytes that end a word, merges, start, end."""
    symbols = list(byte_symbols().values())
    names, merges = [*symbols, *(s + "</w>" for s in symbols)], []
    for word in WORDS:  # joined from the left, the last letter bearing the end of the word
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            pair = letters[0], letters[1]
            letters[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                names.append(letters[0])
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}, merges


def write_tokenizer(folder):
    """vocab.json and merges.txt, as published, and what today's transformers reads beside them."""
    from transformers import CLIPTokenizer

    names, merges = vocabulary()
    CLIPTokenizer(vocab=names, merges=merges, model_max_length=77).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(names))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------- the networks


def randomised(net, seed, **gains):
    """Each matrix keeps the variance of what it is given, each norm and bias is away from 1 and 0.

    gains: of the layers with these names.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * math.prod(p.shape[1:]) ** -0.5)
            else:
                p.copy_(0.3 * noise + ("bias" not in name))
            for layer, gain in gains.items():
                if layer in name.split("."):
                    p.mul_(gain)
    return net.eval()


def fitted(unet):
    """The U-Net, its last convolution changed so that eps_hat is about the noise in z.

    A random one would leave the noise where it is, and x0_hat = z / sqrt(a) is 15 times as large.
    """
    generator, channels = torch.Generator().manual_seed(3), unet.config.in_channels
    z = torch.randn(32, channels, 8, 8, generator=generator)
    context = torch.randn(32, 9, unet.config.cross_attention_dim, generator=generator)
    seen = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        unet(z, torch.randint(1000, (32,), generator=generator), context)
        patches = torch.nn.functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
        noise = z[:, :4].permute(0, 2, 3, 1).flatten(0, 2)  # (32*64,4)
        solved = torch.linalg.lstsq(patches.double(), noise.double()).solution  # (9C,4)
        unet.conv_out.weight.copy_(solved.T.reshape(unet.conv_out.weight.shape))
    hook.remove()
    return unet


def networks(unet_channels=4):
    """{name of a pipeline's part: network of diffusers or transformers}."""
    import_references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    names, _ = vocabulary()
    text = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=names["<|startoftext|>"],
        eos_token_id=names["<|endoftext|>"],
        pad_token_id=names["<|endoftext|>"],
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=unet_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )
    return {
        "unet": fitted(randomised(unet, 0, conv2=0.3, proj_out=0.3)),
        "vae": randomised(vae, 1, conv_out=0.7),
        "text_encoder": randomised(CLIPTextModel(text), 2),
    }


@functools.cache
def saved(where):
    """The folder of the tiny model, made once below the folder `where`.

    Its scheduler_config.json says what Stable Diffusion 1.5's says, and no spacing of timesteps.
    """
    folder = where / "tiny-stable-diffusion"
    for name, net in networks().items():
        net.save_pretrained(folder / name)
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    published = SCHEDULE | dict(
        _class_name="PNDMScheduler",
        _diffusers_version="0.6.0",
        clip_sample=False,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        trained_betas=None,
    )
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    return folder


def changed(folder, path, file, **settings):
    """A copy of the folder, with settings in one of its .json files."""
    shutil.copytree(folder, path)
    told = json.loads((folder / file).read_text()) | settings
    (path / file).write_text(json.dumps(told))
    return path


def spoiled(folder, path, part, name):
    """A copy of the folder, with NaN in a tensor of the U-Net or of the autoencoder."""
    shutil.copytree(folder, path)
    file = path / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state[name].fill_(math.nan)
    save_file(state, file)
    return path


# ------------------------------------------------------------------------------- their pipelines


def scheduler(sampler, **changes):
    """diffusers' scheduler of one of our samplers, for Stable Diffusion 1's alpha_bar."""
    import_references()
    import diffusers

    if sampler == "ddim":
        return diffusers.DDIMScheduler(**DDIM | changes)
    if sampler == "dpmpp":
        return diffusers.DPMSolverMultistepScheduler(**SCHEDULE | changes)
    leading = SCHEDULE | dict(timestep_spacing="leading", steps_offset=1)
    return diffusers.EulerAncestralDiscreteScheduler(**leading | changes)


@functools.cache
def loaded(folder):
    """{name of a pipeline's part: what they read of it}."""
    import_references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextModel, CLIPTokenizer

    logging.set_verbosity_error()
    kinds = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    parts = {name: kind.from_pretrained(folder / name).eval() for name, kind in kinds.items()}
    return parts | {"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer")}


def pipeline(folder, sampler, kind="StableDiffusionPipeline", **changes):
    """A pipeline of diffusers over the folder's weights, silent and without a safety checker.

    It sets an offset of 1 whatever `changes` say of its scheduler: put another in afterwards.
    """
    import_references()
    import diffusers

    pipe = getattr(diffusers, kind)(
        **loaded(folder),
        scheduler=scheduler(sampler, **changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def patch_noise(monkeypatch, module, values):
    """Have randn_tensor of a module of diffusers return these tensors in turn."""
    left = iter(values)
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: next(left))


def latents(pipe, prompts, noise, steps, w, negative="", **more):
    """Where the pipeline's walk from noise (B,4,h,w) ends, like noise; guidance_scale is 1 + w.

    Below 1 their pipelines do not guide; so w = -1, no prompt at all, is asked for in its own way.
    """
    prompts, scale = ([negative] * len(prompts), 1.0) if w == -1 else (prompts, 1 + w)
    height, width = (8 * side for side in noise.shape[2:])
    how = dict(height=height, width=width, output_type="latent", latents=noise.clone())
    how |= dict(num_inference_steps=steps, guidance_scale=scale)
    with torch.no_grad():
        return pipe(prompts, negative_prompt=[negative] * len(prompts), **how | more).images


# ------------------------------------------------------------------------------- command lines


def asked(folder, *more, prompt=PROMPTS[:1], size=(48, 64), steps=4):
    """Arguments of a command of a few steps."""
    how = ["--weights", folder, "--size", *size, "--steps", steps, "--gpus", 0]
    return [*how, *(["--prompt", *prompt] if prompt else []), *more]


def call(*given):
    """stable_diffusion.py's main(), told these arguments, in this process."""
    import stable_diffusion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["stable_diffusion", *map(str, given)])
        stable_diffusion.main()


def refusal(*given):
    """The one line that main() refuses these arguments with."""
    with pytest.raises(BadInput) as error:
        call(*given)
    assert "\n" not in str(error.value)
    return str(error.value)


def images_in(out):
    """(N,H,W,3) of samples.npz, as whole numbers; every image has a file of its own, too."""
    drawn = np.load(out / "samples.npz")["arr_0"]
    assert drawn.dtype == np.uint8 and (out / "samples.png").exists()
    files = sorted(out.glob("[0-9]*.png"))
    assert [file.name for file in files] == [f"{i:04d}.png" for i in range(len(drawn))]
    for file, image in zip(files, drawn, strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), image)
    return drawn.astype(int)


def texts_in(file):
    """{name: text} that a PNG keeps."""
    with Image.open(file) as picture:
        return picture.text


def noise_of(seeds, step=-1):
    """The noise (N,4,6,8) of an image of 48x64, or of a step of euler_a."""
    return gaussian((len(seeds), 4, 6, 8), torch.tensor(seeds), step, "cpu")


def levels(images):
    """Pictures of a pipeline, 0..1, as whole numbers up to 255."""
    return np.round(np.asarray(images) * 255).astype(int)


def same(found, expected):
    """To one level of 255; and there is something to see."""
    assert found.shape == expected.shape and expected.std() > 15
    assert np.abs(found - expected).max() <= 1


def pixels(height=48, width=64, seed=0):
    """uint8 (H,W,3): coarse spots."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def saved_picture(path, array):
    Image.fromarray(array).save(path)
    return path


def spot():
    """uint8 (48,64), white where to paint: places of the latent."""
    mask = np.zeros((48, 64), np.uint8)
    mask[8:32, 16:56] = 255
    return mask


def saved_state(path, state):
    """The file `path` of a changed state_dict, whose tensors None are left out."""
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path
