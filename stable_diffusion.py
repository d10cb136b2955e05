"""Stable Diffusion 1.x: an image from a sentence, by weights that others published.

Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion
Models", 2022 (arXiv:2112.10752): LDM, whose text-to-image model this is. Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021 (arXiv:2103.00020): CLIP.

It is chapter 3 (ldm_cfg.py) with a sentence in place of the label, and larger. Nothing is trained
here; four published parts work together:

    tokens  = tokenizer(prompt)             (B,77) numbers        networks/clip_tokens.py
    context = text(tokens)                  (B,77,768)            networks/clip_text.py
    eps_hat = unet(z_t, t, context)         (B,4,H/8,W/8)         networks/sd_unet.py
    x       = D(z_0 / 0.18215)              (B,3,H,W)             networks/kl_autoencoder.py

The text encoder is CLIP's, frozen. In the U-Net every position of the latent asks the 77 tokens
what to become (cross-attention, LDM section 3.3). How much the sentence counts is guidance, with
the empty sentence, or the one of --negative, in place of "no label" (CFG eq. 6):

    eps_hat = (1 + w) eps_hat(z_t, context) - w eps_hat(z_t, context of "")

Others write s = 1 + w: their 7.5 is --guidance 6.5. Weights are read as plain tensors, never
executed. Download a diffusers folder, or one file of CompVis's with CLIP's vocabulary:

    python stable_diffusion.py --smoke                        a tiny random model, ten seconds
    python stable_diffusion.py --weights stable-diffusion-v1-5/ --prompt "a red fox in the snow"
    python stable_diffusion.py --weights v1-5-pruned-emaonly.safetensors \\
        --vocabulary bpe_simple_vocab_16e6.txt.gz --prompt "a red fox in the snow" --n 4
    python stable_diffusion.py --weights stable-diffusion-v1-5/ --prompt "a fox" --image dog.jpg
    python stable_diffusion.py --weights stable-diffusion-v1-5/ --prompt "a hat" --image dog.jpg \\
        --mask white-where-the-hat-goes.png

A 512x512 image in 25 steps takes five minutes of two CPU cores and 6 GB; --dry-run says what memory
is needed, and stops. An image is a function of its prompt and seed alone.
"""

from runtime import commandline as cli
from runtime.files import check_folder, read_lines
from runtime.finite import WEIGHTS, check_finite, end_of
from runtime.pictures import save_told, to_uint8
from runtime.plan import Method, memory_lines, peak_bytes
from runtime.plots import draw_shaded
from runtime.precision import dtype_of
from runtime.processes import exact, launch, process_count, say_once
from runtime.result_folders import decided, suffix_of

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ddim import at, ddim_row, slerp
from dpm_solver import dpmpp_row
from image_data.decode import read_picture
from kernels import gaussian, sampling_update
from networks.autoencoders import build, decode_in_tiles, encode_in_tiles, latent_shape
from networks.clip_text import CLIPText
from networks.clip_tokens import Tokenizer
from networks.kl_autoencoder import check_state
from networks.published.stable_diffusion import read_pipeline, write_tiny
from networks.sd_unet import AttentionMaps, LatentUNet

TILE = 96  # side of the largest latent that is decoded at once: an image of 768 pixels
UNTOLD = cli.names("config out smoke gpus prompt prompt_file n seeds batch_size interpolate")


@dataclass
class Config(cli.Script):
    weights: str = ""
    """a diffusers folder (unet/, vae/, text_encoder/, tokenizer/, scheduler/), or one .safetensors
    or .ckpt of CompVis"""
    vocabulary: str = ""
    """of one file: CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder of vocab.json and merges.txt"""
    prompt: tuple[str, ...] = ()  # what to draw; of several sentences each with every seed
    prompt_file: str = ""  # text file of further prompts, one a line
    negative: str = ""  # what the image is pushed away from, in place of the empty sentence
    n: int = 1  # images of each prompt
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    steps: int = 25  # how many of the T timesteps the sampler visits
    sampler: Literal["ddim", "dpmpp", "euler_a"] = "ddim"
    """DDIM without noise, DPM-Solver++(2M), or Euler's method with fresh noise (ancestral)"""
    guidance: float = 6.5
    """w in (1+w) eps(z,prompt) - w eps(z,""): 0 the prompt alone; others write s = 1+w"""
    size: tuple[int, ...] = (512,)  # side of the images in pixels, or height and width
    image: str = ""  # start from this picture instead of noise
    strength: float = 0.75  # --image: the share of the way down to walk; 1 nearly forgets it
    mask: str = ""  # --image: draw only where this picture of the same size is white
    interpolate: int = 0
    """so many images on the way from one prompt to another, or of one prompt from seed to seed"""
    attention: bool = False  # also draw which word was looked at where in the first image
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """of the U-Net and its weights; all else is fp32. auto: bf16 on GPUs that have it, fp16 on V100
    and T4, else fp32"""
    compile: bool = False  # torch.compile the U-Net
    batch_size: int = 1  # images at a time, over all processes
    dry_run: bool = False  # say what memory is needed and what is there, and stop


# ---------------------------------------------------------------------------------- the four parts


class Model(NamedTuple):
    """Published parts, frozen, and how they are used together."""

    unet: LatentUNet
    text: CLIPText
    ae: torch.nn.Module
    scale: float  # z of the diffusion is this times the latent of the autoencoder
    tokenizer: Tokenizer
    alpha_bar: torch.Tensor  # float64 (T,) on the CPU
    spacing: str  # of the timesteps; "": the sampler's own
    steps_offset: int
    set_alpha_to_one: bool  # whether the last step of DDIM ends at alpha_bar = 1, or at alpha_bar_0


def load(weights, vocabulary="", device="cpu", dtype=torch.float32):
    """The Model in a folder or file, with the U-Net in `dtype`; BadInput for what is none."""
    found = read_pipeline(weights, vocabulary)
    unet_of = partial(LatentUNet, found.unet["channels"], found.unet["num_classes"])
    ae_settings, ae_state, facts = found.autoencoder

    def part(make, settings, state, dtype=torch.float32):
        with torch.device("meta"):
            net = make(**settings)
        check_state(net.state_dict(), state, weights)
        net.load_state_dict(state, assign=True)
        state.clear()  # else the weights would be kept twice, as they were and as they will be
        net.eval().requires_grad_(False)
        return net.to(device, dtype, memory_format=torch.channels_last)

    return Model(
        part(unet_of, found.unet["settings"], found.unet["state"], dtype),
        part(CLIPText, *found.text),
        part(build, {"kind": facts["kind"], **ae_settings}, ae_state),
        facts["scaling"],  # 0.18215, LDM appendix G
        *found[3:],  # the tokenizer and what follows it
    )


@torch.no_grad()
def encode_prompts(model, texts):
    """The context (B,77,C) of sentences, float32: what the U-Net's positions look at."""
    tokens = model.tokenizer(texts, model.text.settings["length"])  # (B,77)
    with exact():
        return model.text(tokens.to(next(model.text.parameters()).device))


@torch.no_grad()
def encode_image(model, x):
    """z_0 (B,4,H/8,W/8) of images x (B,3,H,W) in [-1,1]: the mean of q(z|x), scaled; in tiles."""
    return model.scale * encode_in_tiles(model.ae, x, TILE)


@torch.no_grad()
def decode(model, z):
    """Images (B,3,8h,8w) in about [-1,1] of latents z (B,4,h,w), in fp32: half precision overflows.

    Larger ones than TILE are decoded tile by tile, in the memory that one takes.
    """
    return decode_in_tiles(model.ae, z.float() / model.scale, TILE)


# ------------------------------------------------------------------------------- the way down


def timesteps(sampler, T, steps, spacing="", offset=1, set_alpha_to_one=False):
    """[(t, t_prev), ...] downwards, as the published samplers visit the T timesteps.

    leading   multiples of floor(T / steps), and offset: what Stable Diffusion was shown with
    trailing  T / steps apart, from T - 1 down
    linear    even from T - 1 down; dpmpp leaves out the last, which would be 0
    ""        leading, but for dpmpp linear

    The last t_prev is -1, where alpha_bar is 1; of ddim, unless set_alpha_to_one, it is 0: LDM's
    code ends at alpha_bar_0. dpmpp counts a step more but in trailing. BadInput for too many steps.
    """
    spacing = spacing or ("linear" if sampler == "dpmpp" else "leading")
    points = steps + (sampler == "dpmpp" and spacing != "trailing")  # the lowest is left out
    if steps < 1 or points > T:
        raise cli.BadInput(f"--steps {steps}: the chain has {T} timesteps; type fewer")
    if spacing == "leading":
        stride = T // points
        lowest = min(offset, T - 1 - (points - 1) * stride)
        ts = [lowest + i * stride for i in reversed(range(points))]
    elif spacing == "trailing":
        ts = (np.arange(T, 0, -T / steps)[:steps].round().astype(int) - 1).tolist()
    else:
        ts = np.linspace(0, T - 1, points).round().astype(int).tolist()[::-1]
    last = 0 if sampler == "ddim" and not set_alpha_to_one else -1
    return list(zip(ts[:steps], [*ts[1:steps], last], strict=True))


def row_of(sampler, a_before, a, a_prev):
    """The step from alpha_bar_t = a to a_prev, as numbers of sampling_update; a_before: the last a.

    ddim: x_prev = sqrt(a_prev) x0_hat + sqrt(1 - a_prev) eps_hat, where x0_hat is
    (x - sqrt(1 - a) eps_hat) / sqrt(a): DDIM eq. 12 and 9. dpmpp: see dpm_solver.py.

    euler_a: with sigma = sqrt((1 - a) / a), the noise beside a signal of 1, Euler's method goes to
    sigma_down and adds noise of sigma_up, so that both together are the sigma of a_prev:

        sigma_up^2 = sigma_prev^2 (sigma^2 - sigma_prev^2) / sigma^2
        sigma_down^2 = sigma_prev^2 - sigma_up^2 = sigma_prev^4 / sigma^2

    Put into x_prev / sqrt(a_prev) = x0_hat + sigma_down eps_hat + sigma_up z, this is DDIM's eq. 12
    with the sigma of DDIM eq. 16 and eta = 1, which is the ancestral step of DDPM.
    """
    if sampler == "dpmpp":
        return dpmpp_row(a_before, a, a_prev)
    return ddim_row(a, a_prev, eta=1.0 if sampler == "euler_a" else 0.0)


def guided(unet, z, t, context, uncond, w):
    """(out, out_uncond): sampling_update combines them as (1+w) out - w out_uncond, CFG eq. 6.

    z (B,4,h,w), context (B,77,C), uncond (1,77,C): of the empty sentence, or the negative one.
    w = 0 and w = -1 need one pass only, and out_uncond is None; other w one batch of 2B.
    """
    uncond = uncond.expand_as(context)
    z, t = z.to(context.dtype), torch.full((len(z),), t, device=z.device)
    if w in (0, -1):
        return unet(z, t, None, uncond if w else context), None
    both = torch.cat([context, uncond])  # (2B,77,C)
    return unet(z.repeat(2, 1, 1, 1), t.repeat(2), None, both).chunk(2)


def noised(z0, eps, a):
    """z_t ~ q(z_t | z_0) at alpha_bar_t = a: DDPM eq. 4."""
    return math.sqrt(a) * z0 + math.sqrt(1 - a) * eps


@torch.no_grad()
def denoise(unet, alpha_bar, pairs, z, seeds, context, uncond, w, sampler, known=None):
    """From z (B,4,h,w) at pairs[0][0] down to a latent; yields z and z0_hat, like z.

    alpha_bar float64 (T,) on the CPU; pairs of timesteps(); seeds (B,) of the fresh noise; context,
    uncond and w as in guided(). known, to paint a part anew, is (z0, mask, eps): where the mask
    (1,1,h,w) is 0, z is z0 with noise eps (B,4,h,w) as belongs to its timestep, and in the end z0.
    """
    a_before = z0_hat = None
    for step, (t, t_prev) in enumerate(pairs):
        a, a_prev = at(alpha_bar, t), at(alpha_bar, t_prev)
        row = row_of(sampler, a_before, a, a_prev)
        out, out_uncond = guided(unet, z, t, context, uncond, w)
        how = {"out_uncond": out_uncond, "guidance": 0.0 if out_uncond is None else w}
        how |= {"history": z0_hat if row.H else None, "seeds": seeds, "clip": False}
        z, z0_hat = sampling_update(z, out, row, step=step, **how)
        if known is not None:
            z0, mask, eps = known
            z = mask * z + (1 - mask) * noised(z0, eps, a_prev if step < len(pairs) - 1 else 1.0)
        yield z, z0_hat
        a_before = a


def read_known(cfg, size):
    """(picture, mask) of --image and --mask: (1,3,H,W) in [-1,1], and (1,1,H,W), 1 where to paint.

    None where there is none. BadInput for files that are no pictures or do not fit each other.
    """
    if not cfg.image:
        return None, None
    pixels, full = read_picture(cfg.image, size, 3, "--image")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    if not cfg.mask:
        return x, None
    white, _ = read_picture(cfg.mask, size, 1, "--mask", like=("--image", full))
    if (white <= 127).all():
        raise cli.BadInput(f"--mask {cfg.mask} is nowhere white: nothing would be painted")
    return x, torch.from_numpy(white > 127).permute(2, 0, 1)[None].float()


# ---------------------------------------------------------------------------------------- commands


def images_wanted(cfg, model, prompts, seeds, shape):
    """N images in order: contexts (K,77,C), whose (N,) each has, seeds (N,), z_T (N,*shape), told.

    Every prompt with every seed; or with --interpolate the frames from the first to the last, on a
    straight line between contexts and an arc between noises (DDIM appendix D.5). told: in words.
    """
    contexts = encode_prompts(model, prompts).cpu()
    z = gaussian((len(seeds), *shape), seeds, -1, "cpu")
    if not cfg.interpolate:
        n, whose = len(prompts), torch.arange(len(prompts)).repeat_interleave(len(seeds))
        told = [{"prompt": p, "seed": str(s)} for p in prompts for s in seeds.tolist()]
        return contexts, whose, seeds.repeat(n), z.repeat(n, 1, 1, 1), told
    n, share = cfg.interpolate, torch.linspace(0, 1, cfg.interpolate)
    contexts = torch.lerp(contexts[:1], contexts[-1:], share[:, None, None])
    way = {"prompt": " -> ".join(prompts), "seed": " -> ".join(map(str, seeds.tolist()))}
    told = [way | {"frame": f"{i} of 0 ... {n - 1}"} for i in range(n)]
    return contexts, torch.arange(n), seeds[:1].repeat(n), slerp(z[:1], z[-1:], share)[0], told


def draw(cfg, world, size, prompts, seeds, picture, mask):
    """All images of a command, and their files."""
    model = load(cfg.weights, cfg.vocabulary, world.device, world.dtype)
    check_folder(cfg.out)  # before the long work
    shape = latent_shape(model.ae, (3, *size), "--weights")  # (4,h,w)
    pairs, how = pairs_of(cfg, model), (cfg.guidance, cfg.sampler)
    contexts, whose, seeds, z_T, told = images_wanted(cfg, model, prompts, seeds, shape)
    uncond = encode_prompts(model, [cfg.negative]).to(world.dtype)  # (1,77,C)
    unet = model.unet if cfg.attention else world.for_sampling(model.unet)
    if picture is not None:
        picture = picture.to(world.device)
        z0 = encode_image(model, picture)  # (1,4,h,w)
        check_finite(z0, [cfg.image], "the latent of --image", WEIGHTS)
    if mask is not None:  # a latent is painted if one of its pixels is
        mask = mask.to(world.device)
        small = F.max_pool2d(mask, model.ae.factor)  # (1,1,h,w)
    words = model.tokenizer.words(prompts[0], contexts.shape[1])
    seen = torch.zeros(len(words), *shape[1:], device=world.device)  # of the first image

    def images(part, tick):
        seed = seeds[part].to(world.device)  # (b,)
        context = contexts[whose[part]].to(world.device, world.dtype)  # (b,77,C)
        noise = z_T[part].to(world.device, memory_format=torch.channels_last)  # (b,4,h,w)
        z = noise if picture is None else noised(z0, noise, at(model.alpha_bar, pairs[0][0]))
        known = None if mask is None else (z0, small, noise)
        maps = AttentionMaps(unet, shape[1:]) if cfg.attention and 0 in part else None
        given = (z, seed, context, uncond, *how, known)
        z = end_of(denoise(unet, model.alpha_bar, pairs, *given), tick, seeds[part], pairs)
        if maps:
            seen.copy_(maps.of([places for _, places in words]))
        x = decode(model, z)  # (b,3,H,W)
        x = x if mask is None else mask * x + (1 - mask) * picture
        return to_uint8(x, seeds[part])

    found = world.in_parts(images, len(seeds), cfg.batch_size, pairs, "sampling")
    seen = world.sum(seen).cpu()  # one process drew that image
    if world.is_main:
        save(cfg, found, told, [word for word, _ in words], seen)


def save(cfg, images, told, words, seen):
    """Write images (N,H,W,3), what each is told to be of, and where words were looked at."""
    folder, unsaid = Path(cfg.out), UNTOLD | (set() if cfg.image else {"strength"})
    values = {k: v for k, v in vars(cfg).items() if k not in unsaid and v != "" and v is not False}
    settings = "; ".join(f"{name} {value}" for name, value in values.items())
    save_told(folder, images, [texts | {"settings": settings} for texts in told], cfg.interpolate)
    guidance = f"guidance w = {cfg.guidance:g} (s = {1 + cfg.guidance:g})"
    print(f"images: {len(images)}, {cfg.sampler}, {cfg.steps} steps, {guidance}")
    film = f"{folder / 'interpolation.gif'}, " * bool(cfg.interpolate)
    print(f"{folder / 'samples.png'}, {film}each in {folder / '0000.png'} ...")
    if cfg.attention:
        draw_shaded(folder / "attention.png", images[0].numpy(), words, seen)
        print(f"which word was looked at where: {folder / 'attention.png'}")


def plan(cfg, size, n):
    """Say how much memory a process needs and how much there is, from names and shapes alone."""
    device, processes = torch.device("cuda:0" if cfg.gpus else "cpu"), process_count(cfg.gpus)
    dtype = dtype_of(cfg.precision, device)
    with torch.device("meta"):
        model = load(cfg.weights, cfg.vocabulary, "meta", dtype)
        b = -(-min(cfg.batch_size, n) // processes)
        channels, h, w = latent_shape(model.ae, (3, *size), "--weights")
        z = torch.empty(b if cfg.guidance in (0, -1) else 2 * b, channels, h, w, dtype=dtype)
        t, text = torch.empty(len(z), dtype=torch.int64), model.text.settings
        context = torch.empty(len(z), text["length"], text["width"], dtype=dtype)
        tile = torch.empty(b, channels, min(h, TILE), min(w, TILE))
        x = torch.empty(1, 3, *(model.ae.factor * side for side in tile.shape[2:]))
    step = f"a step (of {len(pairs_of(cfg, model))}) of {b} x {size[0]}x{size[1]} pixels"
    takes = {step: peak_bytes(model.unet, z, t, None, context)}
    takes["decoding"] = peak_bytes(Method(model.ae.decode), tile)
    takes |= {"encoding": peak_bytes(Method(model.ae.encode), x)} if cfg.image else {}
    takes["loading in fp32"] = sum(4 * p.numel() - p.nbytes for p in model.unet.parameters())
    nets = {"U-Net": model.unet, "text encoder": model.text, "autoencoder": model.ae}
    say_once("\n".join(memory_lines(nets, takes, device)))


def prompts_of(cfg):
    """The sentences of --prompt and --prompt-file; BadInput where there are none, or in vain."""
    lines = read_lines(cfg.prompt_file, "--prompt-file") if cfg.prompt_file else []
    if not (prompts := [*cfg.prompt, *lines]):
        raise cli.BadInput('no prompt: type --prompt "a red fox in the snow", or --prompt-file F')
    if cfg.guidance == -1 and len(prompts) > 1:
        raise cli.BadInput("--guidance -1 looks at no prompt: type one alone")
    if cfg.attention and (cfg.guidance == -1 or not prompts[0].strip()):
        raise cli.BadInput("--attention: no word of the prompt is looked at: type one, and no -1")
    return prompts


def seeds_of(cfg, prompts):
    """int64 seeds; with --interpolate one or two. BadInput for what makes no way between two."""
    if not cfg.interpolate:
        return cli.parse_seeds(cfg.seeds, cfg.n)
    seeds = cli.parse_seeds(cfg.seeds, 1 if len(prompts) == 2 else 2)
    still = len({*prompts}) == 1 and len({*seeds.tolist()}) == 1
    if len(prompts) > 2 or len(seeds) > 2 or cfg.interpolate < 2 or still:
        way = "between two prompts, --prompt A B, or two seeds, --prompt A --seeds 3,9"
        raise cli.BadInput(f"--interpolate {cfg.interpolate}: expected 2 images or more {way}")
    if len(seeds) == 2 and cfg.sampler == "euler_a":
        raise cli.BadInput("--interpolate of seeds takes no fresh noise: type --sampler ddim")
    return seeds


def pairs_of(cfg, model):
    """The timesteps of --steps; with --image the last of them, as many as --strength says."""
    how = model.spacing, model.steps_offset, model.set_alpha_to_one
    pairs = timesteps(cfg.sampler, len(model.alpha_bar), cfg.steps, *how)
    return pairs[len(pairs) - int(cfg.steps * cfg.strength) :] if cfg.image else pairs


def check(cfg):
    """Raise BadInput for a setting out of its range, or one that would do nothing."""
    cli.check_numbers(cfg)
    cli.check_ranges(cfg, positive="n steps size batch_size strength", fraction="strength")
    cli.check_processes(cfg.gpus, 0, precision=cfg.precision)  # any number of images is shared
    if not cfg.weights:
        raise cli.BadInput("--weights is missing: name a folder or file of Stable Diffusion 1.x")
    if len(cfg.size) > 2 or any(side % 8 for side in cfg.size):
        near = " ".join(str(max(8, round(side / 8) * 8)) for side in cfg.size[:2])
        wrong = f"--size {' '.join(map(str, cfg.size))}: expected one side, or height and width"
        raise cli.BadInput(f"{wrong}, multiples of 8: type --size {near}")
    typed = {"strength", "n"}.difference(cli.not_given(cfg, ("strength", "n")))
    part = f"--strength {cfg.strength:g} of --steps {cfg.steps}"
    for wrong, why in (
        (cfg.mask and not cfg.image, "--mask says where to draw in --image: name that, too"),
        ("strength" in typed and not cfg.image, "--strength is of --image: name that, too"),
        ("n" in typed and cfg.interpolate, "--n: --interpolate has a number of its own"),
        (cfg.negative and cfg.guidance == 0, "--negative does nothing with --guidance 0"),
        (cfg.attention and cfg.compile, "--attention looks into layers: leave out --compile"),
        (cfg.image and int(cfg.steps * cfg.strength) < 1, f"{part} leaves no step: type more"),
    ):
        if wrong:
            raise cli.BadInput(why)


def main():
    cfg = cli.parse(Config, __doc__)
    if cfg.smoke:
        prompt = () if cfg.prompt_file else ("a red fox",)
        cfg = cli.smaller(cfg, out="runs/smoke-sd", steps=4, size=(64,), prompt=prompt)
        if not cfg.weights:
            weights, vocabulary = map(str, write_tiny(cfg.out))
            cfg = replace(cfg, weights=weights, vocabulary=cfg.vocabulary or vocabulary)
    check(cfg)
    out = cfg.out or f"runs/stable-diffusion{suffix_of(decided(cfg))}"
    cfg, size = replace(cfg, out=out), (cfg.size * 2)[:2]
    prompts = prompts_of(cfg)
    seeds = seeds_of(cfg, prompts)
    picture, mask = read_known(cfg, size)
    if cfg.dry_run:
        return plan(cfg, size, n=cfg.interpolate or len(prompts) * len(seeds))
    what = {"prompts": prompts, "seeds": seeds, "picture": picture, "mask": mask}
    launch(partial(draw, size=size, **what), cfg)


if __name__ == "__main__":
    cli.entry(main)
