"""What stable_diffusion.py does with its settings: masks, tiles, precision, plans, files."""

import gc

import numpy as np
import pytest
import tiny_stable_diffusion as tiny
import torch
from tiny_stable_diffusion import (
    PROMPTS,
    asked,
    call,
    images_in,
    pixels,
    refusal,
    saved_picture,
    texts_in,
)

import stable_diffusion as sd
from networks.kl_autoencoder import KLVAE
from networks.sd_unet import LatentUNet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.getbasetemp())


def drawn(folder, out, *more, **how):
    """The images that a command leaves, run in this process."""
    call(*asked(folder, "--out", out, *more, **how))
    return images_in(out)


# ----------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize(
    "part, name, what",
    [
        ("unet", "conv_out.bias", "sampling: seed 17 leaves the finite numbers in step 1 of 4, at"),
        ("vae", "decoder.conv_out.bias", "the image of seed 17 is not finite: "),
    ],
)
def test_weights_that_are_not_numbers_give_no_image(part, name, what, folder, tmp_path):
    bad = tiny.spoiled(folder, tmp_path / "bad", part, name)
    line = refusal(*asked(bad, "--seeds", 17, "--out", tmp_path / "out"))
    assert what in line and "--precision fp32" in line
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------ a part of it


def test_a_latent_is_painted_if_one_of_its_pixels_is(folder, tmp_path):
    """A mask that cuts latents, and the one that takes them whole, have the same painted pixels."""
    image = saved_picture(tmp_path / "from.png", pixels())
    cut, whole = np.zeros((2, 48, 64), np.uint8)
    cut[11:30, 17:18], cut[39, 63] = 255, 255
    whole[8:32, 16:24], whole[32:40, 56:64] = 255, 255
    found = []
    for name, mask in (("cut", cut), ("whole", whole)):
        given = ["--image", image, "--mask", saved_picture(tmp_path / f"{name}.png", mask)]
        found += list(drawn(folder, tmp_path / name, *given))
    assert np.array_equal(found[0][cut > 0], found[1][cut > 0])
    assert np.abs(found[0] - pixels())[cut > 0].mean() > 20
    assert np.array_equal(found[0][cut == 0], pixels()[cut == 0])


def test_a_mask_is_white_from_gray_128_on(tmp_path):
    grays = np.array([[0, 1, 127, 128], [129, 150, 200, 255]], np.uint8)
    image = saved_picture(tmp_path / "from.png", np.zeros((16, 32, 3), np.uint8))
    mask = saved_picture(tmp_path / "mask.png", grays.repeat(8, axis=0).repeat(8, axis=1))
    x, white = sd.read_known(sd.Config(image=str(image), mask=str(mask)), (16, 32))
    assert x.shape == (1, 3, 16, 32) and torch.equal(x, torch.full_like(x, -1))
    assert white.shape == (1, 1, 16, 32) and white.dtype == torch.float32
    assert white[0, 0, ::8, ::8].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    _, half = sd.read_known(sd.Config(image=str(image), mask=str(mask)), (8, 16))  # as --size says
    assert set(half.unique().tolist()) == {0, 1} and half[0, 0, ::4, ::4].tolist()[0] == [
        0,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("strength, walked", [(0.7, 5), (0.99, 7), (0.125, 1), (1, 8)])
def test_strength_walks_as_many_whole_steps_as_it_reaches(strength, walked, folder):
    model, how = sd.load(folder), {"weights": str(folder), "steps": 8, "strength": strength}
    pairs = sd.pairs_of(sd.Config(image="a.png", **how), model)
    assert pairs == sd.timesteps("ddim", 1000, 8)[8 - walked :]
    assert len(sd.pairs_of(sd.Config(**how), model)) == 8  # without an image all


# --------------------------------------------------------------------------------- tile by tile


def watched(monkeypatch, method):
    """[(h,w) of what the autoencoder's method is called with]."""
    seen, real = [], getattr(KLVAE, method)

    def noted(self, x):
        seen.append(tuple(x.shape[2:]))
        return real(self, x)

    monkeypatch.setattr(KLVAE, method, noted)
    return seen


@pytest.mark.parametrize(
    "size, latents",
    [((64, 768), [(8, 96)]), ((64, 832), [(8, 96)] * 2), ((832, 64), [(96, 8)] * 2)],
)
def test_above_768_pixels_the_autoencoder_sees_tiles(size, latents, folder, tmp_path, monkeypatch):
    decoded, encoded = (watched(monkeypatch, method) for method in ("decode", "encode"))
    image = saved_picture(tmp_path / "from.png", pixels())
    given = ["--image", image, "--strength", 0.5]
    (found,) = drawn(folder, tmp_path / "out", *given, size=size, steps=2)
    assert found.shape == (*size, 3)
    assert decoded == latents
    assert encoded == [(8 * h, 8 * w) for h, w in latents]


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision, near", [("bf16", 6), ("fp16", 1.5), ("fp32", 0)])
def test_precision_is_that_of_the_unet_and_what_it_reads(
    precision, near, folder, tmp_path, monkeypatch
):
    expected = drawn(folder, tmp_path / "auto", "--guidance", 1)  # on a CPU: fp32
    seen, guided, tiles = [], sd.guided, sd.decode_in_tiles

    def noted(unet, z, t, context, uncond, w):
        out = guided(unet, z, t, context, uncond, w)
        dtypes = {p.dtype for p in unet.parameters()}
        seen.append((z.dtype, dtypes | {context.dtype, uncond.dtype, out[0].dtype}))
        return out

    def in_fp32(ae, z, tile):
        assert {z.dtype, *(p.dtype for p in ae.parameters())} == {torch.float32}
        return tiles(ae, z, tile)

    monkeypatch.setattr(sd, "guided", noted)
    monkeypatch.setattr(sd, "decode_in_tiles", in_fp32)
    given = ["--guidance", 1, "--precision", precision]
    found = drawn(folder, tmp_path / precision, *given)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert seen == [(torch.float32, {dtype})] * 4
    apart = np.abs(found - expected).mean()
    assert expected.std() > 15 and apart <= near and (apart > 0) == (precision != "fp32")


def test_compile_is_of_the_unet(folder, tmp_path, monkeypatch):
    """PyTorch's compiler itself takes half a minute."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda net: seen.append(type(net)) or net)
    drawn(folder, tmp_path / "out", "--compile", steps=1)
    assert seen == [LatentUNet]
    drawn(folder, tmp_path / "out", "--attention", steps=1)
    assert seen == [LatentUNet]


# ----------------------------------------------------------------------------------------- plans


@pytest.fixture
def planned(folder, monkeypatch, capsys):
    """Function of arguments: ([(h,w,...) and dtype of what a network is asked for], the output).

    They are said to take 1, 2, ... KiB.
    """

    def plan(*given, **how):
        seen = []

        def noted(net, *inputs):
            seen.append([x if x is None else (tuple(x.shape), x.dtype) for x in inputs])
            return 1024 * len(seen)

        monkeypatch.setattr(sd, "peak_bytes", noted)
        call(*asked(folder, "--dry-run", *given, **how))
        return seen, capsys.readouterr().out

    return plan


FLOAT, HALF, WHOLE = torch.float32, torch.bfloat16, torch.int64


def step(n, h, w, dtype=FLOAT):
    """What the U-Net is asked for in a step of n rows."""
    return [((n, 4, h, w), dtype), ((n,), WHOLE), None, ((n, 77, 64), dtype)]


def test_a_plan_is_of_the_largest_batch_of_a_process(planned, monkeypatch):
    seen, said = planned("--batch-size", 3, "--n", 5)
    assert seen == [step(6, 6, 8), [((3, 4, 6, 8), FLOAT)]]  # with and without the prompt
    assert "a step (of 4) of 3 x 48x64 pixels 1.0 KiB, decoding 2.0 KiB\n" in said  # no more
    for guidance in (0, -1):
        seen, _ = planned("--batch-size", 3, "--n", 5, "--guidance", guidance)
        assert seen == [step(3, 6, 8), [((3, 4, 6, 8), FLOAT)]]
    assert planned("--batch-size", 64, "--n", 2)[0][0] == step(4, 6, 8)  # there are no more
    assert planned("--batch-size", 64, "--seeds", "1-3", prompt=PROMPTS)[0][0] == step(12, 6, 8)
    assert planned("--batch-size", 64, "--interpolate", 7, prompt=PROMPTS)[0][0] == step(14, 6, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert planned("--batch-size", 3, "--n", 5)[0][0] == step(4, 6, 8)  # 2 and 1 of two processes


def test_a_plan_decodes_and_encodes_tiles(planned, tmp_path):
    seen, said = planned(size=(64, 832))
    assert seen == [step(2, 8, 104), [((1, 4, 8, 96), FLOAT)]] and "encoding" not in said
    image = ["--image", saved_picture(tmp_path / "from.png", pixels())]
    for size, latent, tile in (
        ((64, 832), (8, 104), (8, 96)),
        ((832, 64), (104, 8), (96, 8)),
        ((48, 64), (6, 8), (6, 8)),
    ):
        seen, said = planned(*image, "--batch-size", 2, "--n", 2, size=size)
        pixels_of = tuple(8 * side for side in tile)
        decoding, encoding = [((2, 4, *tile), FLOAT)], [((1, 3, *pixels_of), FLOAT)]
        assert seen == [step(4, *latent), decoding, encoding]
        assert "a step (of 3) of 2 x" in said and "decoding 2.0 KiB, encoding 3.0 KiB" in said


def test_a_plan_of_half_precision_loads_in_fp32_first(planned):
    """The files are read in fp32: half of that is freed again."""
    seen, said = planned("--precision", "bf16")
    assert seen == [step(2, 6, 8, HALF), [((1, 4, 6, 8), FLOAT)]]
    counts = {k: sum(p.numel() for p in net.parameters()) for k, net in tiny.networks().items()}
    assert f"loading in fp32 {2 * counts['unet'] / 2**20:.1f} MiB\n" in said
    weights = 2 * counts["unet"] + 4 * counts["text_encoder"] + 4 * counts["vae"]
    assert f": {weights / 2**20:.1f} MiB\n" in said


# ---------------------------------------------------------------------------------------- loading


def storages():
    """{address: bytes} of the memory of all tensors that there are."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # not those of plans, which have no memory
    # A sparse one of another test may still be there; it has no storage.
    tensors = [x for x in gc.get_objects() if type(x) in plain and x.layout == torch.strided]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_loading_no_weight_is_there_twice(dtype, folder, monkeypatch):
    """Also not in what was read, though somebody still holds it."""
    found, read = [], sd.read_pipeline
    monkeypatch.setattr(sd, "read_pipeline", lambda *how: found.append(read(*how)) or found[0])
    before = storages()
    model = sd.load(folder, dtype=dtype)
    after = storages()
    ((unet, (_, text), (_, autoencoder, _), *_),) = found
    assert unet["state"] == text == autoencoder == {}
    nets = (model.unet, model.text, model.ae)
    assert {p.dtype for p in model.unet.parameters()} == {dtype}
    weights = [x for net in nets for x in (*net.parameters(), *net.buffers())]
    own = {x.untyped_storage().data_ptr(): x.nbytes for x in (*weights, model.alpha_bar)}
    assert own.items() <= after.items()
    assert not after.keys() - before.keys() - own.keys()


# ------------------------------------------------------------------------------------------ files


def test_what_a_file_tells_draws_it_again(folder, tmp_path):
    """Its prompt, its seed, and its settings."""
    given = ["--seeds", "3,17", "--sampler", "euler_a", "--guidance", 2.5, "--strength", 0.5]
    given += ["--negative", tiny.NEGATIVE, "--image", saved_picture(tmp_path / "a.png", pixels())]
    mask = np.zeros((48, 64), np.uint8)
    mask[:24] = 255
    given += ["--mask", saved_picture(tmp_path / "mask.png", mask)]
    images = drawn(folder, tmp_path / "first", *given, prompt=PROMPTS, steps=6)
    texts = texts_in(tmp_path / "first" / "0003.png")
    assert set(texts) == {"prompt", "seed", "settings"}
    flags = [part.split(" ", 1) for part in texts["settings"].split("; ")]
    again = ["--prompt", texts["prompt"], "--seeds", texts["seed"], "--gpus", 0]
    for name, value in flags:
        again += [f"--{name}", *(value.strip("()").split(", ") if name == "size" else [value])]
    call(*again, "--out", tmp_path / "again")
    assert np.abs(images_in(tmp_path / "again")[0] - images[3]).max() <= 1
    assert np.abs(images[3] - images[1]).max() > 20


def test_frames_tell_both_ends_and_their_place(folder, tmp_path):
    given = ["--interpolate", 3, "--seeds", "3,17"]
    drawn(folder, tmp_path / "out", *given, prompt=PROMPTS, steps=1)
    texts = texts_in(tmp_path / "out" / "0001.png")
    assert texts["prompt"] == " -> ".join(PROMPTS) and texts["seed"] == "3 -> 17"
    assert texts["frame"] == "1 of 0 ... 2" and "image" not in texts["settings"]


# ------------------------------------------------------------------------------------------ smoke


def test_smoke_keeps_what_is_typed(folder, tmp_path):
    """A vocabulary, weights, a file of prompts."""
    given = ["--smoke", "--gpus", 0, "--out", tmp_path / "out"]
    words = tmp_path / "words.txt.gz"
    assert str(words) in refusal(*given, "--vocabulary", words)
    call(*given, "--weights", folder)
    own = drawn(folder, tmp_path / "own", prompt=["a red fox"], size=(64,))
    assert np.array_equal(images_in(tmp_path / "out"), own)
    text = tmp_path / "prompts.txt"
    text.write_text("a red cat\n")
    call(*given, "--weights", folder, "--prompt-file", text, "--size", 48, 64)
    assert np.array_equal(images_in(tmp_path / "out"), drawn(folder, tmp_path / "cat"))
    assert texts_in(tmp_path / "out" / "0000.png")["prompt"] == "a red cat"
