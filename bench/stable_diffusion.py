"""Stable Diffusion 1 on a CPU, against diffusers' StableDiffusionPipeline with the same weights.

    python bench/stable_diffusion.py [--quick] [--threads 2] [--rounds 3] [--steps 2] [--size 512]

The networks have the published sizes (859,520,964 + 123,060,480 + 83,653,863 parameters) and random
weights, which are written once into a temporary folder in diffusers' layout (4.3 GB) and read from
there by both. Each contender has a process of its own, which draws one guided image by DDIM in fp32
from the same noise and prompt. First the latents must agree to 1e-4 of the largest, and the images
to one level of 255. Then the two take turns.

    loading     the weights, once each. Diffusers only maps the files here, and reads them later
    text        both sentences to their contexts
    a step      of the sampler: the U-Net on two latents, guidance, the update
    decoding    a latent to an image
    an image    the last three
    the first   loading and the first image

A ratio is diffusers' number over ours, so that more than 1 is better here; of times the median over
the rounds of the ratio in the same round, by the clock on the wall and of the processor time of all
threads, which says more on a machine that does other work. Memory, in MB:

    RSS         the most that the process had, its code and what it read of mapped files included:
                after imports, while loading, while drawing, and at any time
    tensors     the most bytes that tensors held at once while drawing, weights included

24 GB of memory are enough. --quick takes networks so small that nothing but the working of this
file is seen.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the chapter of its name

from runtime.commandline import BadInput, entry  # noqa: E402
from runtime.plan import LiveBytes  # noqa: E402
from runtime.processes import progress  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.guided_memory import status  # noqa: E402
from bench.unet import cpu_name  # noqa: E402
from kernels import gaussian  # noqa: E402
from tests.cases.reference_networks import needing_diffusers  # noqa: E402

OURS, THEIRS = "here", "diffusers"
PROMPT, NEGATIVE, GUIDANCE = "a photograph of a red fox in the snow", "", 6.5
PACKAGES = ("torch", "diffusers", "transformers")
SAME = 1e-4  # of the largest number of a latent: how far the two may be apart
GOALS = {"a step": 1.1, "an image": 1.1, "RSS": 1.0, "tensors": 1.0}
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SCHEDULE |= dict(clip_sample=False, set_alpha_to_one=False)
FULL = {
    "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12),
    "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
}
QUICK = {
    "unet": dict(
        sample_size=8,
        cross_attention_dim=64,
        attention_head_dim=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "text_encoder": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2),
    "vae": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1, sample_size=64),
}
SIDES = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
MERGES = 48894  # of CLIP's tokenizer


# ------------------------------------------------------------------------------------ the weights


def vocabulary():
    """({symbol: id}, [(left, right)]) as large as CLIP's: bytes, those that end a word, pairs."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(i) for i in (*shown, *range(0x100, 0x100 + 256 - len(shown)))]
    ends = [f"{letter}</w>" for letter in letters]
    merges = [(a, b) for a in letters for b in (*letters, *ends)][:MERGES]
    names = [*letters, *ends, *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}, merges


def text_config(sizes, names):
    width = sizes["text_encoder"]["hidden_size"]
    ends = dict(bos_token_id=len(names) - 2, eos_token_id=len(names) - 1)
    how = dict(vocab_size=len(names), num_attention_heads=width // 64, **ends)
    return how | sizes["text_encoder"]


@torch.no_grad()
def randomise(net, seed):
    """Fill a network: each matrix keeps the size of what it sees, no norm or bias is 1 or 0.

    What a residual branch adds is smaller than what it adds to, as in a network that has learnt.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
            branch = {"conv2", "proj_out", "to_out", "net"} & set(name.split("."))
            p.mul_((0.3 if branch else 1.0) * p[0].numel() ** -0.5)
        else:
            p.mul_(0.1).add_("bias" not in name)
    return net.eval()


def write(folder, quick):
    """A pipeline of random weights in diffusers' layout."""
    with needing_diffusers():
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
        from diffusers import UNet2DConditionModel as UNet
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sizes, (names, merges) = QUICK if quick else FULL, vocabulary()
    with torch.device("meta"):
        unet, vae = UNet(**sizes["unet"]), AutoencoderKL(**sizes["vae"], **SIDES)
    # Its buffers are numbers, which would be lost on the meta device.
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(sizes, names)))
    pipe = StableDiffusionPipeline(
        unet=randomise(unet.to_empty(device="cpu"), 0),
        vae=randomise(vae.to_empty(device="cpu"), 1),
        text_encoder=randomise(text_encoder, 2),
        tokenizer=CLIPTokenizer(vocab=names, merges=merges, model_max_length=77),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    # As published, which newer versions of transformers no longer write.
    Path(folder, "tokenizer", "vocab.json").write_text(json.dumps(names))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    Path(folder, "tokenizer", "merges.txt").write_text("\n".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------- the contenders
#
# Each gives its networks by name and draw(z, steps, stamp) -> (latent, image (1,H,W,3) 0..255),
# which calls stamp(what) when a stage is over. The chapter and diffusers are imported before
# anything is measured, and each only where it draws.


def import_ours():
    import stable_diffusion

    return stable_diffusion


def import_theirs():
    with needing_diffusers():
        import diffusers
        import transformers

        # What a pipeline loads by name counts as import, too.
        parts = ("AutoencoderKL", "DDIMScheduler", "StableDiffusionPipeline")
        for name in (*parts, "UNet2DConditionModel"):
            getattr(diffusers, name)
        for name in ("CLIPTextModel", "CLIPTokenizer"):
            getattr(transformers, name)
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def ours(chapter, folder):
    model = chapter.load(folder)
    how = model.spacing, model.steps_offset, model.set_alpha_to_one
    nets = {"unet": model.unet, "text_encoder": model.text, "vae": model.ae}

    def draw(z, steps, stamp):
        contexts = [chapter.encode_prompts(model, [text]) for text in (PROMPT, NEGATIVE)]
        stamp("text")
        pairs = chapter.timesteps("ddim", len(model.alpha_bar), steps, *how)
        z, seeds = z.to(memory_format=torch.channels_last), torch.zeros(1, dtype=torch.int64)
        walk = (model.unet, model.alpha_bar, pairs, z, seeds, *contexts, GUIDANCE, "ddim")
        for each in chapter.denoise(*walk):
            z = each[0]
            stamp("a step")
        image = chapter.to_uint8(chapter.decode(model, z))
        stamp("decoding")
        return z, image.numpy()

    return nets, draw


def theirs(diffusers, folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    nets = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae")}

    def draw(z, steps, stamp):
        seen = []

        def begun(unet, inputs):
            hook.remove()
            stamp("text")

        def ended(pipe, i, t, values):
            seen[:] = [values["latents"]]
            stamp("a step")
            return values

        hook = pipe.unet.register_forward_pre_hook(begun)
        size = dict(zip(("height", "width"), (8 * side for side in z.shape[2:]), strict=True))
        how = dict(num_inference_steps=steps, guidance_scale=1 + GUIDANCE, output_type="np")
        how |= dict(negative_prompt=NEGATIVE, latents=z, callback_on_step_end=ended)
        image = pipe(PROMPT, **size, **how).images
        stamp("decoding")
        return seen[0], (255 * image).round().astype(np.uint8)

    return nets, draw


CONTENDERS = {OURS: (import_ours, ours), THEIRS: (import_theirs, theirs)}


# ---------------------------------------------------------------------- a process of a contender


def work(name, folder, size, steps, threads):
    """Load, then answer lines of stdin by lines of JSON: "draw" by seconds, "live" by bytes.

    The first line told is about loading. Each draw leaves {name}.npz in the folder.
    """
    told, sys.stdout = sys.stdout, sys.stderr  # for what others print

    def tell(**found):
        print(json.dumps(found), file=told, flush=True)

    torch.set_num_threads(threads)
    load, make = CONTENDERS[name]
    module = load()
    imported, start = status("VmRSS"), clocks()
    nets, draw = make(module, folder)
    stages = seconds_of([("", start), ("loading", clocks())])
    counts = {part: sum(p.numel() for p in net.parameters()) for part, net in nets.items()}
    most = {"RSS, imports": imported, "RSS, loading": status("VmHWM")}
    tell(stages=stages, parameters=counts, **most)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the most there was
    z = gaussian((1, 4, size // 8, size // 8), torch.zeros(1, dtype=torch.int64), -1, "cpu")
    for line in sys.stdin:
        if line.strip() == "live":
            with LiveBytes([t for net in nets.values() for t in net.state_dict().values()]) as live:
                draw(z, steps, lambda what: None)
            tell(tensors=live.peak)
        else:
            stamps = [("", clocks())]
            latent, image = draw(z, steps, lambda what, at=stamps: at.append((what, clocks())))
            drawing = status("VmHWM")
            np.savez(Path(folder, f"{name}.npz"), latent=latent.numpy(), image=image)
            stages = seconds_of([*stamps, ("an image", stamps[-1][1])])
            tell(stages=stages, **{"RSS, drawing": drawing})


def clocks():
    """Seconds: on the wall, and of processors."""
    return time.perf_counter(), time.process_time()


def seconds_of(stamps):
    """{stage: [wall, processors]} of [("", clocks), (stage, clocks), ...].

    Of steps the mean. A stage with the clocks of the one before it is all until then.
    """
    found = {}
    for (_, before), (what, after) in zip(stamps, stamps[1:], strict=False):
        since = stamps[0][1] if before == after else before
        found.setdefault(what, []).append(np.subtract(after, since))
    return {what: np.mean(each, axis=0).tolist() for what, each in found.items()}


def calling(function, *given):
    """The command of a process that calls a function of this file."""
    program = f"import runtime, bench.stable_diffusion as bench; bench.{function}(*{given!r})"
    return [sys.executable, "-c", program]


class Worker:
    """The process of a contender, already loaded; a context that ends it."""

    def __init__(self, name, *given):
        self.name, self.found = name, {}  # all that it last told
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(calling("work", name, *given), cwd=REPO, **pipes)

    def __enter__(self):
        self.loading = self.answer()["stages"]
        return self

    def __exit__(self, *_):
        self.process.communicate()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process failed, see above")
        self.found |= json.loads(line)
        return self.found

    def ask(self, what):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.answer()


# --------------------------------------------------------------------------------------- the table


def check_same(folder):
    """(error of the latent, of the image in levels); RuntimeError where the two differ too much."""
    a, b = (np.load(Path(folder, f"{name}.npz")) for name in CONTENDERS)
    error = float(np.abs(a["latent"] - b["latent"]).max() / np.abs(b["latent"]).max())
    levels = int(np.abs(a["image"].astype(int) - b["image"].astype(int)).max())
    spread = b["image"].std()
    if not error <= SAME or levels > 1 or spread < 10:
        raise RuntimeError(
            f"latents differ by {error:.1e} of the largest, expected {SAME:.0e} at most; images by "
            f"{levels} levels, expected 1 at most; these spread {spread:.1f} levels, expected 10"
        )
    return error, levels


def take_turns(workers, rounds, tick):
    """{name: {stage: [(wall, processors) of each round]}}."""
    found = {worker.name: {} for worker in workers}
    for i in range(rounds):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            for stage, took in worker.ask("draw")["stages"].items():
                found[worker.name].setdefault(stage, []).append(took)
            tick()
    return found


def rows_of(seconds, told):
    """[{what, here, diffusers, ratio}] of seconds and bytes; ratio: theirs over ours, a median.

    seconds {name: {stage: [(wall, processors), ...]}}; told {name: Worker.found}.
    """
    rows = []

    def add(what, *each):
        ratio = statistics.median(b / a for a, b in zip(*each, strict=True))
        middle = map(statistics.median, each)
        rows.append({"what": what, **dict(zip(CONTENDERS, middle, strict=True)), "ratio": ratio})

    for i, clock in enumerate(("s", "CPU s")):
        for stage in seconds[OURS]:
            each = ([took[i] for took in seconds[name][stage]] for name in CONTENDERS)
            add(f"{stage}, {clock}", *each)
    for what in ("RSS, imports", "RSS, loading", "RSS, drawing"):
        add(what, *([told[name][what]] for name in CONTENDERS))
    add("RSS", *([max(told[n]["RSS, loading"], told[n]["RSS, drawing"])] for n in CONTENDERS))
    add("tensors", *([told[name]["tensors"]] for name in CONTENDERS))
    return rows


def table(rows):
    """Markdown: seconds and MB."""
    yield f"| | {OURS} | {THEIRS} | {THEIRS} / {OURS} |"
    yield "|---|--:|--:|--:|"
    for row in rows:
        each = [row[name] for name in CONTENDERS]
        timed = row["what"].endswith(" s")
        cells = [f"{n:.2f}" if timed else f"{n / 1e6:,.0f} MB" for n in each]
        yield f"| {row['what']} | {' | '.join(cells)} | {row['ratio']:.2f} |"


def goals(rows):
    """A line for each goal: the ratio, and whether it is reached."""
    for row in rows:
        least = GOALS.get(row["what"].partition(", ")[0])
        if least and row["what"] not in ("RSS, imports", "RSS, loading", "RSS, drawing"):
            verdict = "reached" if row["ratio"] >= least else "MISSED"
            yield f"{row['what']}: {row['ratio']:.3f}, at least {least}: {verdict}"


# -------------------------------------------------------------------------------------------- main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, in each process")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; 1 with --quick")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    parser.add_argument("--size", type=int, default=512, help="of the image; 64 with --quick")
    args = parser.parse_args(arguments)
    for name in ("threads", "rounds", "steps"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.size < 8 or args.size % 8:
        raise BadInput(f"--size {args.size} must be a multiple of 8, such as 512")
    if not Path("/proc/self/clear_refs").exists():
        raise BadInput("the memory of a process is read from /proc/self: Linux only")
    if args.quick:
        args.rounds, args.size = 1, 64
    return args


def main(arguments=None):
    args = parse(arguments)
    import_theirs()  # or one line says what is missing
    about = {"cpu": cpu_name(), "python": platform.python_version(), **vars(args)}
    about |= {name: importlib.metadata.version(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(calling("write", folder, args.quick), cwd=REPO, check=True)
        given = (folder, args.size, args.steps, args.threads)
        bar = progress(2 * (args.rounds + 1), "drawing")
        with bar, Worker(OURS, *given) as a, Worker(THEIRS, *given) as b:
            first = take_turns((a, b), 1, bar.update)
            about["latent error"], about["image levels"] = check_same(folder)
            seconds = {w.name: {"loading": [w.loading["loading"]]} for w in (a, b)}
            for name, turns in take_turns((a, b), args.rounds, bar.update).items():
                whole = np.add(seconds[name]["loading"], first[name]["an image"])
                seconds[name] |= turns | {"the first": whole.tolist()}
            told = {worker.name: worker.ask("live") for worker in (a, b)}
    counts, others = (told[name]["parameters"] for name in CONTENDERS)
    if counts != others:
        raise RuntimeError(f"these are not the same networks: {counts} and {others} parameters")
    about["parameters"] = " + ".join(f"{count:,}" for count in counts.values())
    rows = rows_of(seconds, told)
    print("\n".join([*table(rows), ""]))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n".join(goals(rows)))
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    entry(main)
