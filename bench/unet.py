"""Speed of the U-Net on a CPU, against diffusers' UNet2DModel with the same weights.

    python bench/unet.py [--compile] [--quick] [--threads 1] [--rounds 9]

The network is that of configs/cifar10_ddpm.yaml (35.7 M parameters, 32x32). Four things are timed:

    forward     one call of the network, batch 8, fp32, no gradients; with --compile also by
                torch.compile, whose own time (minutes) is not counted
    step        a training step, batch 32: noise added, forward, backward, Adam, the mean of weights
    update      a DDIM step of the sampler given the network's output, batch 8
    noise       the same with eta = 1: noise from a counter here, from one generator there

Before that, both must give the same numbers. Contenders take turns, so that whatever else the
machine does falls on all. A ratio is the median over the rounds of diffusers' time over ours in the
same round, once by the clock on the wall and once of the processor time of all threads, which says
more on a machine that does other work (set OMP_WAIT_POLICY=PASSIVE, or waiting counts as work). The
rate of the machine is that of a large product of matrices in the same rounds, by torch.mm and as a
convolution of size 1: another library, and here and there the faster. Shares are of processor time.

--quick takes a network so small that nothing but the working of this file is seen.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the module of its name

from runtime.commandline import BadInput, entry  # noqa: E402
from runtime.run import EMA  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ddim import ddim_row  # noqa: E402
from ddpm_pixel import Config, UNet, alpha_bar_of, simple_loss  # noqa: E402
from kernels import sampling_update  # noqa: E402
from networks.published.unet import save_diffusers, settings_of  # noqa: E402
from tests.cases.reference_networks import needing_diffusers  # noqa: E402

CONFIG = REPO / "configs" / "cifar10_ddpm.yaml"
SETTINGS = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions")
SETTINGS += ("num_heads", "dropout")
QUICK = dict(
    model_channels=16,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_resolutions=[8],
    num_heads=1,
    dropout=0.1,
)
SAME = 1e-5  # of the largest number: how far the two may be apart
CALLS = 100  # of an update, timed together
OURS, THEIRS, COMPILED, MM, CONV = "here", "diffusers", "here, compiled", "torch.mm", "1x1 conv2d"


# --------------------------------------------------------------------------------- the contenders
#
# Each function gives {name: function of nothing}, after it saw that all give the same numbers.


def load_diffusers():
    """What is used of diffusers; BadInput if it is not installed."""
    with needing_diffusers():
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel
    return UNet2DModel, DDPMScheduler, DDIMScheduler, EMAModel


def our_network(quick):
    """Our network, its Config, and the image shape (C,H,W)."""
    config, size = (QUICK, 16) if quick else (yaml.safe_load(CONFIG.read_text()), 32)
    cfg, shape = Config(**{name: config[name] for name in SETTINGS}), (3, size, size)
    torch.manual_seed(0)
    ours = UNet(shape, 0, cfg)
    for p in ours.parameters():  # layers that start at zero would hide what lies behind them
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return ours.to(memory_format=torch.channels_last), cfg, shape


def networks(quick, UNet2DModel):
    """Our network, diffusers' with the same weights, and the image shape (C,H,W)."""
    ours, cfg, shape = our_network(quick)
    facts = dict(
        alpha_bar=alpha_bar_of(cfg),
        prediction="eps",
        variance="large",
        schedule="linear",
    )
    settings = settings_of({"config": vars(cfg)})
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(folder, settings, ours.state_dict(), shape, 0, facts)
        theirs = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    return ours, theirs, shape


def batch(n, shape):
    """x (n,C,H,W) in [-1,1], normal noise of its shape, timesteps (n,)."""
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, *shape, generator=generator).mul(2).sub(1)
    return x, torch.randn(x.shape, generator=generator), torch.arange(n) * 900 // n


def check_same(what, ours, theirs):
    """RuntimeError unless two tensors agree to SAME of their largest number."""
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= SAME:
        raise RuntimeError(f"{what}: the two differ by {error:.1e}, {SAME:.0e} is allowed")


def forwards(ours, theirs, inputs, compile):
    """A call of each network in evaluation, without gradients."""
    x, _, t = inputs
    ours, theirs, last = ours.eval(), theirs.eval(), x.to(memory_format=torch.channels_last)
    calls = {THEIRS: lambda: theirs(x, t).sample, OURS: lambda: ours(last, t)}
    if compile:
        compiled = torch.compile(ours)
        calls[COMPILED] = lambda: compiled(last, t)
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    for name in list(calls)[1:]:
        check_same(f"forward of {name}", calls[name](), calls[THEIRS]())
    return calls


def steps(ours, theirs, inputs, DDPMScheduler, EMAModel):
    """A whole training step, each in the way of its project; the networks learn as it is called."""
    x, eps, t = inputs
    scheduler = DDPMScheduler()
    alpha_bar = scheduler.alphas_cumprod.double()
    mean, done = EMA(ours, 0.9999), itertools.count()
    their_mean = EMAModel(theirs.parameters())
    adam, their_adam = (torch.optim.Adam(net.parameters(), lr=2e-4) for net in (ours, theirs))

    def our_loss():
        return simple_loss(ours, x, t, eps, alpha_bar).mean()

    def their_loss():
        return F.mse_loss(theirs(scheduler.add_noise(x, eps, t), t).sample, eps)

    def our_step():
        our_loss().backward()
        adam.step()
        adam.zero_grad()
        mean.update(ours, next(done))

    def their_step():
        their_loss().backward()
        their_adam.step()
        their_adam.zero_grad()
        their_mean.step(theirs.parameters())

    found = []
    for net, loss in ((ours, our_loss), (theirs, their_loss)):
        net.eval()  # without dropout, of which no two draws are the same
        ends = [net.conv_in.weight, net.conv_out.weight]  # both projects name these layers so
        found.append([loss(), *torch.autograd.grad(loss(), ends)])
        net.train()
    for what, *both in zip(("loss", "first gradient", "last gradient"), *found, strict=True):
        check_same(what, *both)
    return {THEIRS: their_step, OURS: our_step}


def updates(inputs, eta, DDIMScheduler):
    """CALLS sampler steps in the middle of a walk of 50 steps, given the network's output."""
    x, eps, _ = inputs
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(50)
    walk = scheduler.timesteps.tolist()
    pairs = list(zip(walk, [*walk[1:], -1], strict=True))
    a, a_prev = scheduler.alphas_cumprod.double()[list(pairs[25])].tolist()
    row, seeds = ddim_row(a, a_prev, eta), torch.arange(len(x))
    # Its noise is then, as here, that of the clamped x0_hat: else they are not the same sampler.
    options = dict(eta=eta, use_clipped_model_output=True)

    def ours():
        return sampling_update(x, eps, row, step=25, seeds=seeds)[0]

    def theirs():
        return scheduler.step(eps, walk[25], x, **options).prev_sample

    if eta == 0:  # noise is drawn differently
        check_same("update", ours(), theirs())
    return {THEIRS: repeated(theirs), OURS: repeated(ours)}


def repeated(call):
    def calls():
        for _ in range(CALLS):
            call()

    return torch.no_grad()(calls)


def products(n):
    """The product of two (n,n) matrices, by torch.mm and as a convolution of size 1."""
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    side = 2 ** (n.bit_length() // 2)
    image = a.view(1, n // side, side, n).permute(0, 3, 1, 2)  # (1,n,n/side,side), channels last
    kernel = b.t().contiguous().view(n, n, 1, 1)
    calls = {MM: lambda: torch.mm(a, b), CONV: lambda: F.conv2d(image, kernel)}
    check_same("product", calls[CONV]().permute(0, 2, 3, 1).reshape(n, n), calls[MM]())
    return calls


def flops(net, inputs):
    """Multiplications and additions of a forward pass."""
    x, _, t = inputs
    # Attention as two products of matrices: the fused operator is not counted on a CPU.
    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net.eval()(x, t)
    return count.get_total_flops()


# ---------------------------------------------------------------------------------------- timing


def take_turns(calls, rounds, bar):
    """{name: (seconds on the wall, seconds of processors)}, two lists with a number a round."""
    times = {name: ([], []) for name in calls}
    for call in calls.values():  # what is made once is made before the clock runs
        call()
    for i in range(rounds):
        order = list(calls) if i % 2 == 0 else list(calls)[::-1]
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            times[name][1].append(time.process_time() - cpu)
            times[name][0].append(time.perf_counter() - wall)
            bar.update()
    return times


def row(what, name, times, scale=1):
    """What is told of one contender: median milliseconds of a call, and THEIRS over them.

    times: of take_turns; scale: calls that were timed together. A product of matrices has no ratio.
    """
    wall, cpu = (1e3 * statistics.median(seconds) / scale for seconds in times[name])
    found = {"what": what, "name": name, "ms": wall, "cpu_ms": cpu}
    if name not in (MM, CONV):
        for key, theirs, mine in zip(
            ("ratio", "cpu_ratio"), times[THEIRS], times[name], strict=True
        ):
            found[key] = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
    return found


HEADING = f"{'':26}{'wall ms':>11}{'ratio':>8}{'CPU ms':>11}{'ratio':>8}"


def line(row):
    """A row as it is printed below HEADING."""
    ratio, cpu_ratio = (f"{row[k]:8.2f}" if k in row else 8 * " " for k in ("ratio", "cpu_ratio"))
    name = f"{row['what']}, {row['name']}"
    return f"{name:26}{row['ms']:11.3f}{ratio}{row['cpu_ms']:11.3f}{cpu_ratio}".rstrip()


def cpu_name():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


# ------------------------------------------------------------------------------------------ main


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small network, two rounds")
    parser.add_argument("--compile", action="store_true", help="also torch.compile; needs gcc")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 is its default")
    parser.add_argument("--rounds", type=int, default=0, help="0 is 9, and 2 with --quick")
    args = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        if getattr(args, name) < 0:
            raise BadInput(f"--{name} must not be negative: leave it out for the default")
    args.rounds = args.rounds or (2 if args.quick else 9)
    return args


def main(arguments=None):
    args = parse(arguments)
    UNet2DModel, DDPMScheduler, DDIMScheduler, EMAModel = load_diffusers()
    if args.threads:
        torch.set_num_threads(args.threads)
    n, n_train, size = (2, 4, 256) if args.quick else (8, 32, 2048)
    ours, theirs, shape = networks(args.quick, UNet2DModel)
    about = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "diffusers": importlib.metadata.version("diffusers"),
        "rounds": args.rounds,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "batch": n,
        "shape": shape,
        "train_batch": n_train,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)

    inputs, rows = batch(n, shape), []
    work = flops(ours, inputs)
    network = forwards(ours, theirs, inputs, args.compile) | products(size)
    with tqdm(total=args.rounds * (len(network) + 6), leave=False, disable=None) as bar:

        def measure(what, calls, scale=1):
            times = take_turns(calls, args.rounds, bar)
            for name in calls:
                kind = "product" if name in (MM, CONV) else what
                rows.append(row(kind, name, times, scale))
                tqdm.write(line(rows[-1]), file=sys.stdout)
                sys.stdout.flush()

        tqdm.write(HEADING, file=sys.stdout)
        measure("forward", network)
        measure("update", updates(inputs, 0.0, DDIMScheduler), CALLS)
        measure("noise", updates(inputs, 1.0, DDIMScheduler), CALLS)
        learning = batch(n_train, shape)
        measure("step", steps(ours, theirs, learning, DDPMScheduler, EMAModel))

    wall, cpu = ({(r["what"], r["name"]): r[k] / 1e3 for r in rows} for k in ("ms", "cpu_ms"))
    rate = work / cpu["forward", OURS]
    shares = {name: rate * cpu["product", name] / (2 * size**3) for name in (MM, CONV)}
    noise = cpu["noise", OURS] / cpu["forward", OURS]
    per_second = work / wall["forward", OURS]
    print(
        f"forward, {OURS}: {work / 1e9:.1f} GFLOP, {per_second / 1e9:.0f} a second, "
        f"{rate / 1e9:.0f} a second of a processor: {100 * shares[MM]:.0f} % of the rate of a "
        f"{size}x{size} product\nby torch.mm, {100 * shares[CONV]:.0f} % of its rate as a "
        f"convolution. Noise: an update takes {100 * noise:.2f} % of the network's time."
    )
    print(
        json.dumps(
            about
            | {
                "rows": rows,
                "gflop": work / 1e9,
                "gflop_per_s": per_second / 1e9,
                "gflop_per_cpu_s": rate / 1e9,
                "share_of_mm": shares[MM],
                "share_of_conv": shares[CONV],
                "noise_share": noise,
            }
        )
    )


if __name__ == "__main__":
    entry(main)
