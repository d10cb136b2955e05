"""stable_diffusion.py beside the pipelines of diffusers: the same weights, the same noise.

Latents are compared at the end of a whole guided walk, to 1e-4 of their spread; images to one level
of 255.
"""

import shutil

import pytest
import tiny_stable_diffusion as tiny
import torch

import stable_diffusion as sd
from kernels import gaussian

T, STEPS, SHAPE = 1000, 10, (2, 4, 6, 8)  # images of 48 x 64
PROMPTS = ["a red cat", "The painting of a house, and a dog; naïve 犬 ☂"]
SEEDS = torch.tensor([3, 17])
WAYS = [
    (6.5, ""),
    (6.5, tiny.NEGATIVE),
    (1.5, tiny.NEGATIVE),
    (0, ""),
    (-1, ""),
    (-1, tiny.NEGATIVE),
]
SAMPLERS = ["ddim", "dpmpp", "euler_a"]
EULER = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
IMG2IMG, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
MODULES = {
    IMG2IMG: "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img",
    INPAINT: "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint",
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(folder):
    return sd.load(folder)


def noise_of(step=-1, seeds=SEEDS):
    return gaussian((len(seeds), *SHAPE[1:]), seeds, step, "cpu")


def ours(model, sampler, pairs, z, w, prompts=PROMPTS, negative="", seeds=SEEDS, known=None):
    """The latents at the end of our walk."""
    told = sd.encode_prompts(model, prompts), sd.encode_prompts(model, [negative])
    how = dict(w=w, sampler=sampler, known=known)
    *_, (z, _) = sd.denoise(model.unet, model.alpha_bar, pairs, z, seeds, *told, **how)
    return z


def pairs_of(model, sampler, steps=STEPS):
    how = model.spacing, model.steps_offset, model.set_alpha_to_one
    return sd.timesteps(sampler, T, steps, *how)


def same_noise(monkeypatch, sampler, steps):
    """Has their Euler method draw, at each of its steps, what ours draws at its own."""
    if sampler == "euler_a":
        tiny.patch_noise(monkeypatch, EULER, [noise_of(step) for step in range(steps)])


def assert_same(found, expected):
    """Equal to 1e-4 of their spread."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert 0.2 < expected.std() < 20
    assert (found - expected).abs().max() < 1e-4 * expected.std()


# ----------------------------------------------------------------------------------------- parts


def test_a_folder_is_read_as_it_says(model):
    assert torch.equal(model.alpha_bar, tiny.alpha_bar())
    assert (model.spacing, model.steps_offset, model.set_alpha_to_one) == ("", 1, False)
    assert model.scale == 0.18215
    for part in (model.unet, model.text, model.ae):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_prompts_are_encoded_as_their_pipeline_does(folder, model):
    pipe = tiny.pipeline(folder, "ddim")
    told = [*PROMPTS, "", tiny.NEGATIVE]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(told, "cpu", 1, False)
    found = sd.encode_prompts(model, told)
    assert found.shape == (4, 77, 64) and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    assert (expected[1] - expected[0]).abs().max() > 0.1  # they do not say the same


def test_latents_are_decoded_to_the_same_image(folder, model):
    pipe = tiny.pipeline(folder, "ddim")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SHAPE, generator=generator)
    with torch.no_grad():
        expected = pipe.vae.decode(z / 0.18215).sample
    found = sd.decode(model, z)
    assert found.shape == (2, 3, 48, 64) and expected.std() > 0.2
    assert (found - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------------ whole walks


@pytest.mark.parametrize("w, negative", WAYS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_walk_ends_where_that_of_their_pipeline_ends(
    sampler, w, negative, folder, model, monkeypatch
):
    pipe = tiny.pipeline(folder, sampler)
    same_noise(monkeypatch, sampler, STEPS)
    expected = tiny.latents(pipe, PROMPTS, noise_of(), STEPS, w, negative)
    found = ours(model, sampler, pairs_of(model, sampler), noise_of(), w, negative=negative)
    assert_same(found, expected)
    if negative:  # it counts
        other = ours(model, sampler, pairs_of(model, sampler), noise_of(), w)
        assert (other - found).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_walks_of_other_lengths_end_there_too(sampler, steps, folder, model, monkeypatch):
    """Their solver of second order takes a first-order step at the end, as the last of ours is."""
    same_noise(monkeypatch, sampler, steps)
    expected = tiny.latents(tiny.pipeline(folder, sampler), PROMPTS, noise_of(), steps, 6.5)
    found = ours(model, sampler, pairs_of(model, sampler, steps), noise_of(), 6.5)
    assert_same(found, expected)


SETTINGS = {  # sampler, what its scheduler is told; how ours reads it: spacing, offset, to_one
    "ddim, trailing": ("ddim", dict(timestep_spacing="trailing"), ("trailing", 1, False)),
    "ddim, to one": ("ddim", dict(set_alpha_to_one=True), ("leading", 1, True)),
    "dpmpp, linear": ("dpmpp", dict(steps_offset=1), ("linear", 1, False)),
    "dpmpp, trailing": ("dpmpp", dict(timestep_spacing="trailing"), ("trailing", 1, False)),
    "dpmpp, leading": ("dpmpp", dict(timestep_spacing="leading"), ("leading", 1, False)),
    "euler_a": ("euler_a", dict(), ("leading", 1, False)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_schedulers_that_they_saved_are_obeyed(name, folder, tmp_path, monkeypatch):
    """Their pipelines, too, make an offset of 0 one of 1."""
    sampler, changes, read = SETTINGS[name]
    same_noise(monkeypatch, sampler, STEPS)
    path = tmp_path / "changed"
    shutil.copytree(folder, path, ignore=lambda *_: ["scheduler"])
    tiny.scheduler(sampler, **changes).save_pretrained(path / "scheduler")
    expected = tiny.latents(
        tiny.pipeline(folder, sampler, **changes), PROMPTS, noise_of(), STEPS, 6.5
    )
    model = sd.load(path)
    assert (model.spacing, model.steps_offset, model.set_alpha_to_one) == read
    assert_same(ours(model, sampler, pairs_of(model, sampler), noise_of(), 6.5), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_differ_by_one_level_at_most(sampler, folder, model, monkeypatch):
    same_noise(monkeypatch, sampler, STEPS)
    pipe = tiny.pipeline(folder, sampler)
    expected = tiny.latents(pipe, PROMPTS, noise_of(), STEPS, 6.5, output_type="np")
    x = sd.decode(model, ours(model, sampler, pairs_of(model, sampler), noise_of(), 6.5))
    found = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    levels = torch.from_numpy(expected * 255).round()
    assert found.shape == levels.shape == (2, 48, 64, 3) and levels.std() > 20
    assert (found - levels).abs().max() <= 1


# --------------------------------------------------------------------- from an image, and in a part


def picture():
    """(1,3,48,64) in [-1,1]: coarse spots."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3, 6, 8, generator=generator)
    return torch.nn.functional.interpolate(x, scale_factor=8, mode="bicubic").clamp(-1, 1)


def take_the_mean(monkeypatch):
    """Has their pipelines start from the mean of q(z|x), as ours does, not from a sample."""
    kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{kind}.sample", lambda self, generator=None: self.mode())


def started(monkeypatch, folder, sampler, kind, strength, steps=STEPS):
    """(their pipeline, whose noise is ours; how many steps it goes)."""
    pipe = tiny.pipeline(folder, sampler, kind)
    walked = int(steps * strength)
    take_the_mean(monkeypatch)
    tiny.patch_noise(monkeypatch, MODULES[kind], [noise_of()])
    same_noise(monkeypatch, sampler, walked)
    return pipe, walked


@pytest.mark.parametrize("strength", [0.31, 0.75, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_ends_where_theirs_ends(sampler, strength, folder, model, monkeypatch):
    pipe, walked = started(monkeypatch, folder, sampler, IMG2IMG, strength)
    how = dict(image=picture().expand(2, 3, 48, 64) / 2 + 0.5, strength=strength)  # theirs 0..1
    how |= dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent")
    with torch.no_grad():
        expected = pipe(PROMPTS, **how).images

    pairs = pairs_of(model, sampler)[STEPS - walked :]
    a = model.alpha_bar[pairs[0][0]].item()
    z0 = sd.encode_image(model, picture())
    assert z0.std() > 0.02
    z = a**0.5 * z0 + (1 - a) ** 0.5 * noise_of()
    assert_same(ours(model, sampler, pairs, z, 6.5), expected)


def part():
    """(1,1,48,64): ones where to paint, aligned to the latent's places; and (1,1,6,8) of them."""
    small = torch.zeros(1, 1, 6, 8)
    small[..., 1:4, 2:7] = 1
    small[..., 5, 0] = 1
    return small.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3), small


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_painting_a_part_ends_where_theirs_ends(sampler, strength, folder, model, monkeypatch):
    """With a plain U-Net. At strength 1 theirs starts from noise alone, and keeps no image."""
    pipe, walked = started(monkeypatch, folder, sampler, INPAINT, strength)
    mask, small = part()
    how = dict(image=picture() / 2 + 0.5, mask_image=mask, strength=strength, height=48, width=64)
    how |= dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent")
    with torch.no_grad():
        expected = pipe(PROMPTS, **how).images

    pairs = pairs_of(model, sampler)[STEPS - walked :]
    a = model.alpha_bar[pairs[0][0]].item()
    z0, noise = sd.encode_image(model, picture()), noise_of()
    z = noise if strength == 1 else a**0.5 * z0 + (1 - a) ** 0.5 * noise
    found = ours(model, sampler, pairs, z, 6.5, known=(z0, small, noise))
    assert_same(found, expected)
    kept = small.expand(SHAPE) == 0
    assert (found - z0)[kept].abs().max() < 1e-6
    assert (found - z0)[~kept].abs().max() > 0.1


# ---------------------------------------------------------------------- a function of seed and text


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_walk_does_not_depend_on_its_batch(sampler, model):
    seeds, prompts = torch.tensor([5, 17, 3, 8]), ["a cat", PROMPTS[1], "a cat", "the dog"]
    pairs = pairs_of(model, sampler)
    together = ours(model, sampler, pairs, noise_of(seeds=seeds), 6.5, prompts, seeds=seeds)
    for i in range(4):
        some = seeds[i : i + 1]
        alone = ours(
            model, sampler, pairs, noise_of(seeds=some), 6.5, prompts[i : i + 1], seeds=some
        )
        assert (alone - together[i]).abs().max() < 1e-4 * together[i].std()
    assert (together[0] - together[2]).abs().max() > 0.1
