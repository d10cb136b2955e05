"""stable_diffusion.py's command line over the tiny model: files, pictures, and what is refused."""

import contextlib
import io
import math

import numpy as np
import pytest
import tiny_stable_diffusion as tiny
import torch
from launching import refused, start_ranks, succeed
from PIL import Image
from tiny_stable_diffusion import (
    PROMPTS,
    asked,
    call,
    images_in,
    levels,
    noise_of,
    pixels,
    same,
    saved_picture,
    spot,
    texts_in,
)

import stable_diffusion as sd
from networks.sd_unet import AttentionMaps

EULER = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
IMG2IMG, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
PIPELINES = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.getbasetemp())


def drawn(folder, out, *more, **how):
    """The images that a command leaves, and what it prints; in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        call(*asked(folder, "--out", out, *more, **how))
    return images_in(out), said.getvalue()


# ------------------------------------------------------------------------------------------- text


def test_smoke_draws_with_a_model_of_its_own(tmp_path):
    done = succeed("stable_diffusion", "--smoke", "--gpus", 0, "--out", tmp_path)
    (image,) = images_in(tmp_path)
    assert image.shape == (64, 64, 3) and image.std(axis=(0, 1)).min() > 10
    assert str(tmp_path / "samples.png") in done.out


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler_a"])
def test_a_command_draws_what_their_pipeline_draws(sampler, folder, tmp_path, monkeypatch):
    """Two prompts, each with both seeds, in parts of three."""
    more = ["--seeds", "3,17", "--sampler", sampler, "--guidance", 2.5, "--batch-size", 3]
    found, said = drawn(folder, tmp_path, *more, "--negative", tiny.NEGATIVE, prompt=PROMPTS)
    assert "2.5" in said and "3.5" in said  # w and s
    seeds = [3, 17, 3, 17]
    prompts = [prompt for prompt in PROMPTS for _ in (3, 17)]
    if sampler == "euler_a":
        tiny.patch_noise(monkeypatch, EULER, [noise_of(seeds, step) for step in range(4)])
    how = dict(negative=tiny.NEGATIVE, output_type="np")
    pipe = tiny.pipeline(folder, sampler)
    same(found, levels(tiny.latents(pipe, prompts, noise_of(seeds), 4, 2.5, **how)))
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        told = texts_in(tmp_path / f"{i:04d}.png")
        assert (told["prompt"], told["seed"]) == (prompt, str(seed))
        assert f"negative {tiny.NEGATIVE}" in told["settings"].split("; ")


def test_without_flags_it_draws_seed_0_with_the_settings_that_help_names(folder, tmp_path):
    """25 steps of DDIM, w = 6.5."""
    given = ["--weights", folder, "--prompt", PROMPTS[0], "--size", 48, 64, "--gpus", 0]
    succeed("stable_diffusion", *given, "--out", tmp_path)
    pipe, noise = tiny.pipeline(folder, "ddim"), noise_of([0])
    theirs = tiny.latents(pipe, PROMPTS[:1], noise, 25, 6.5, output_type="np")
    same(images_in(tmp_path), levels(theirs))


def test_prompts_of_a_file_come_after_those_typed(folder, tmp_path):
    typed, _ = drawn(folder, tmp_path / "typed", prompt=[*PROMPTS, "naïve 犬"])
    text = tmp_path / "prompts.txt"
    text.write_bytes(f"\ufeff{PROMPTS[1]}\r\n\r\n  naïve 犬  \n".encode())
    read, _ = drawn(folder, tmp_path / "read", "--prompt-file", text)
    assert np.array_equal(typed, read)
    only, _ = drawn(folder, tmp_path / "only", "--prompt-file", text, prompt=None)
    assert np.array_equal(only, read[1:])
    assert len({image.tobytes() for image in typed}) == 3


def test_one_number_is_the_side_of_a_square(folder, tmp_path):
    images, _ = drawn(folder, tmp_path, "--n", 2, size=(40,), steps=1)
    assert images.shape == (2, 40, 40, 3)


# ------------------------------------------------------------------------- from an image, in a part


def theirs_from(folder, kind, monkeypatch, **how):
    """What a pipeline of theirs draws from pixels(), seed 3, 8 steps, w = 2."""
    mean = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(mean, lambda self, generator=None: self.mode())
    tail = {IMG2IMG: "img2img", INPAINT: "inpaint"}[kind]
    tiny.patch_noise(monkeypatch, f"{PIPELINES}_{tail}", [noise_of([3])])
    how |= dict(num_inference_steps=8, guidance_scale=3, output_type="np")
    with torch.no_grad():
        pipe = tiny.pipeline(folder, "ddim", kind)
        return levels(pipe(PROMPTS[:1], image=Image.fromarray(pixels()), **how).images)


def test_image_to_image_is_that_of_their_pipeline(folder, tmp_path, monkeypatch):
    given = ["--image", saved_picture(tmp_path / "from.png", pixels()), "--strength", 0.7]
    given += ["--seeds", 3, "--guidance", 2]
    found, _ = drawn(folder, tmp_path / "out", *given, steps=8)
    same(found, theirs_from(folder, IMG2IMG, monkeypatch, strength=0.7))
    less, _ = drawn(folder, tmp_path / "less", *given, "--strength", 0.2, steps=8)
    assert np.abs(less - found).mean() > 5


def test_the_scaling_of_the_files_counts_in_both_directions(folder, tmp_path, monkeypatch):
    """0.3 in place of 0.18215: the image is encoded by it, and the latent decoded."""
    other = tiny.changed(folder, tmp_path / "other", "vae/config.json", scaling_factor=0.3)
    given = ["--image", saved_picture(tmp_path / "from.png", pixels()), "--seeds", 3]
    call(*asked(other, *given, "--guidance", 2, "--out", tmp_path / "out", steps=8))
    same(images_in(tmp_path / "out"), theirs_from(other, IMG2IMG, monkeypatch, strength=0.75))


def test_of_a_wider_picture_the_centre_is_taken(folder, tmp_path):
    wide = pixels(48, 96)
    made = []
    for name, array in (("wide", wide), ("centre", wide[:, 16:80])):
        path = saved_picture(tmp_path / f"{name}.png", np.ascontiguousarray(array))
        made.append(drawn(folder, tmp_path / name, "--image", path)[0])
    assert np.array_equal(*made)


def test_painting_a_part_is_that_of_their_pipeline(folder, tmp_path, monkeypatch):
    """And outside of the part it is the image itself."""
    picture, mask = (
        saved_picture(tmp_path / "from.png", pixels()),
        saved_picture(tmp_path / "mask.png", spot()),
    )
    given = ["--image", picture, "--mask", mask, "--seeds", 3, "--guidance", 2]
    (found,), _ = drawn(folder, tmp_path / "out", *given, "--strength", 0.7, steps=8)
    how = dict(mask_image=Image.fromarray(spot()), strength=0.7, height=48, width=64)
    (theirs,) = theirs_from(folder, INPAINT, monkeypatch, **how)
    painted = spot() > 0
    same(found[painted], theirs[painted])
    assert np.array_equal(found[~painted], pixels()[~painted])
    assert np.abs(found - pixels())[painted].mean() > 20


def test_a_mask_may_lie_anywhere(folder, tmp_path):
    """Also where it covers a place of the latent in part: then its pixels decide."""
    mask = np.zeros((48, 64), np.uint8)
    mask[3:21, 13:14] = 255
    picture = saved_picture(tmp_path / "from.png", pixels())
    given = ["--image", picture, "--mask", saved_picture(tmp_path / "mask.png", mask), "--n", 2]
    found, _ = drawn(folder, tmp_path / "out", *given, "--batch-size", 2)
    for image in found:
        assert np.array_equal(image[mask == 0], pixels()[mask == 0])
        assert np.abs(image - pixels())[mask > 0].max() > 20
    assert np.abs(found[0] - found[1]).max() > 1


# ----------------------------------------------------------------------------------- between images


def frames(path):
    with Image.open(path) as film:
        return [film.seek(i) or np.asarray(film.convert("RGB")) for i in range(film.n_frames)]


WAYS = {  # prompts, seeds, sampler; those of the ends
    "two prompts": (PROMPTS, "17", "ddim", [(0, 17), (1, 17)]),
    "two prompts, one noise": (PROMPTS, "17", "euler_a", [(0, 17), (1, 17)]),
    "two seeds": (PROMPTS[:1], "3,17", "ddim", [(0, 3), (0, 17)]),
    "both": (PROMPTS, "3,17", "ddim", [(0, 3), (1, 17)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_way_between_two_images(way, folder, tmp_path):
    prompts, seeds, sampler, ends = WAYS[way]
    given = ["--interpolate", 5, "--seeds", seeds, "--batch-size", 2, "--sampler", sampler]
    found, _ = drawn(folder, tmp_path / "way", *given, prompt=prompts)
    assert len(found) == len(frames(tmp_path / "way" / "interpolation.gif")) == 5
    assert (tmp_path / "way" / "interpolation.png").exists()
    for i, (prompt, seed) in ((0, ends[0]), (-1, ends[1])):
        how = ["--seeds", seed, "--sampler", sampler]
        alone, _ = drawn(folder, tmp_path / f"{i}", *how, prompt=[PROMPTS[prompt]])
        same(found[i], alone[0])
    moved = [np.abs(found[i + 1] - found[i]).mean() for i in range(4)]
    assert min(moved) > 0.5 and max(moved) < np.abs(found[-1] - found[0]).mean() + 1

    # The second frame, a quarter of the way: texts on a line, noises on an arc.
    model = sd.load(folder)
    first, last = (sd.encode_prompts(model, [PROMPTS[prompt]]) for prompt, _ in ends)
    u, v = (noise_of([seed]) for _, seed in ends)
    angle = math.acos(min(1.0, torch.cosine_similarity(u.flatten(), v.flatten(), dim=0).item()))
    if ends[0][1] != ends[1][1]:
        u = (math.sin(0.75 * angle) * u + math.sin(0.25 * angle) * v) / math.sin(angle)
    told = 0.75 * first + 0.25 * last, sd.encode_prompts(model, [""])
    pairs = sd.timesteps(sampler, 1000, 4)
    where = model.unet, model.alpha_bar, pairs, u, torch.tensor([ends[0][1]]), *told
    *_, (z, _) = sd.denoise(*where, 6.5, sampler)
    x = sd.decode(model, z).clamp(-1, 1)[0].permute(1, 2, 0)
    same(found[1], ((x + 1) * 127.5).round().numpy().astype(int))


# ---------------------------------------------------------------------------- which word was seen


def test_a_sheet_shows_where_each_word_was_looked_at(folder, tmp_path):
    plain, _ = drawn(folder, tmp_path / "plain", "--n", 2, prompt=PROMPTS[1:])
    given = ["--n", 2, "--attention"]
    looked, said = drawn(folder, tmp_path / "looked", *given, prompt=PROMPTS[1:])
    assert np.array_equal(plain, looked)  # it changes nothing
    sheet = tmp_path / "looked" / "attention.png"
    assert str(sheet) in said and not (tmp_path / "plain" / "attention.png").exists()
    with Image.open(sheet) as picture:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 5


class Probabilities:
    """diffusers' attention, which writes down the softmax of each cross-attention."""

    def __init__(self):
        self.seen = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = map(attn.head_to_batch_dim, (q, k, v))
        p = attn.get_attention_scores(q, k)  # (B*heads,N,L)
        if encoder_hidden_states is not None:
            self.seen.append(p.unflatten(0, (len(hidden_states), -1))[0])  # (heads,N,L)
        return attn.to_out[0](attn.batch_to_head_dim(p @ v))


@pytest.mark.parametrize("sides", [(6, 8), (5, 7)])
def test_the_maps_are_the_mean_of_their_attention(sides, folder):
    """Over heads, layers and calls, each layer's at the latent's sides; the largest is 1."""
    unet, probabilities = tiny.networks()["unet"], Probabilities()
    unet.set_attn_processor(probabilities)
    model = sd.load(folder)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, *sides, generator=generator)
    context = sd.encode_prompts(model, PROMPTS)
    looks = AttentionMaps(model.unet, sides)
    with torch.no_grad():
        for t in (900, 20):
            unet(z, t, context)
            model.unet(z, torch.full((2,), t), None, context)
    small = tuple(-(-side // 2) for side in sides)
    maps = []
    for p in probabilities.seen:
        where = sides if p.shape[1] == math.prod(sides) else small
        maps.append(p.mean(0).T.unflatten(1, where)[None])  # (1,L,h,w)
    assert len({m.shape for m in maps}) == 2
    maps = [torch.nn.functional.interpolate(m, sides, mode="bilinear")[0] for m in maps]
    mean = sum(maps) / len(maps)
    groups = [[1], [2, 3], list(range(77))]
    for found, group in zip(looks.of(groups), groups, strict=True):
        expected = mean[group].mean(0)
        torch.testing.assert_close(found, expected / expected.max(), rtol=0, atol=1e-5)
    assert (mean.sum(0) - 1).abs().max() < 1e-5
    assert mean[1].max() > 1.2 * mean[1].min()  # not the same everywhere
    before = looks.total.clone()
    with torch.no_grad():
        model.unet(z, torch.full((2,), 3), None, context)
    assert torch.equal(looks.total, before)  # nobody looks any more


@pytest.mark.parametrize("n", [1, 2])
def test_the_sheet_of_two_processes_is_that_of_one(n, folder, tmp_path):
    """Of one image the second process draws it, of two the first draws the first."""
    given = asked(folder, "--attention", "--n", n, "--seeds", "3,17"[: 1 if n == 1 else None])
    call(*given, "--out", tmp_path / "one")
    for process in start_ranks("stable_diffusion", *given, "--out", tmp_path / "two"):
        done = process.wait()
        assert done.code == 0, done.err
    sheets = []
    for name in ("one", "two"):
        with Image.open(tmp_path / name / "attention.png") as picture:
            sheets.append(np.asarray(picture.convert("RGB")).astype(int))
    assert np.abs(images_in(tmp_path / "one") - images_in(tmp_path / "two")).max() <= 1
    assert sheets[0].std() > 15 and np.abs(sheets[0] - sheets[1]).max() <= 1


def test_an_empty_sentence_has_no_words_to_show(folder, tmp_path):
    given = asked(folder, "--attention", "--out", tmp_path / "out", prompt=[""])
    assert "--attention: no word" in refused("stable_diffusion", *given)
    assert not (tmp_path / "out").exists()


def test_the_words_of_the_sheet_are_those_of_the_first_prompt(folder, monkeypatch, tmp_path):
    """Each with its own tokens: the start is number 0, "the" is 1, "painting" 2 ..."""
    told = []
    monkeypatch.setattr(sd, "draw_shaded", lambda path, image, titles, maps: told.append(titles))
    call(*asked(folder, "--attention", "--out", tmp_path, prompt=PROMPTS[::-1], steps=1))
    words = ["the", "painting", "of", "a", "house", ",", "and", "a", "dog"]
    assert told == [words]


# ---------------------------------------------------------------------------------------- dry run


def test_a_dry_run_says_the_memory_and_draws_nothing(folder, tmp_path):
    given = asked(folder, "--dry-run", "--out", tmp_path / "out", size=(512,))
    done = succeed("stable_diffusion", *given)
    assert not (tmp_path / "out").exists()
    for net in tiny.networks().values():
        assert f"{sum(p.numel() for p in net.parameters()):,}" in done.out
    assert "memory (cpu)" in done.out and "free here" in done.out and "512x512" in done.out


# ---------------------------------------------------------------------- a function of seed and text


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_an_image_is_a_function_of_its_seed_and_prompt(sampler, folder, tmp_path):
    """Alone, in a batch, in other batches, beside another prompt, and of two processes."""

    def draw(name, *extra, size=1, prompt=PROMPTS[:1]):
        given = asked(folder, "--sampler", sampler, "--out", tmp_path / name, *extra, prompt=prompt)
        for process in start_ranks("stable_diffusion", *given, size=size):
            done = process.wait()
            assert done.code == 0, done.err
        return images_in(tmp_path / name)

    (alone,) = draw("alone", "--seeds", 17)
    many = draw("many", "--seeds", "12-18", "--batch-size", 7)
    split = draw("split", "--seeds", "12-18", "--batch-size", 4, size=2)
    (pair,) = draw("pair", "--seeds", 17, "--attention", size=2)  # one has nothing to do
    both = draw("both", "--seeds", "3,17", "--batch-size", 3, prompt=PROMPTS[::-1])
    assert len(many) == 7 and len(both) == 4 and (tmp_path / "pair" / "attention.png").exists()
    for other in (many[5], split[5], pair, both[3]):
        assert np.abs(other - alone).max() <= 1
    assert np.abs(many - split).max() <= 1
    others = [*np.delete(many, 5, axis=0), *both[:3]]  # no other seed or prompt gives it
    assert min(np.abs(other - alone).max() for other in others) > 1
