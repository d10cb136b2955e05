"""Chapter 2: variances that are learned, and what an image costs in bits.

Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021 (arXiv:2102.09672).

The chain of chapter 1 bounds the code length of an image (derived below; in code t is 1 less),

    -log p(x_0) <= L_0 + L_1 + ... + L_T = L_vlb      divided by dimensions and log 2      eq. 4
    L_0     = -log p(x_0 | x_1)                   the last step, to pixels of 256 levels   eq. 5
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))       of two Gaussians         eq. 6
    L_T     = KL(q(x_T | x_0) || N(0, I))         nothing here is learned                  eq. 7

L_vlb teaches the network the variance of p, too, by a second half v of its channels:

    Sigma = exp(f log beta_t + (1 - f) log beta_tilde_t),  f = (v + 1) / 2                 eq. 15
    L_hybrid = L_simple + 0.001 L_vlb             the mean learns from L_simple alone      eq. 16

    python improved_ddpm.py --data mnist --steps 200 --warmup 20     4.5 minutes: rough digits
    python improved_ddpm.py --nll runs/iddpm-mnist/ckpt.pt --n 16 --sample-steps 100
                                                       40 seconds: 2.61 bits/dim in 100 terms
    torchrun --nproc-per-node 8 improved_ddpm.py --config configs/cifar10_iddpm_cosine.yaml
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.finite import clamped, dynamic_threshold
from runtime.normal import discretized_gaussian_log_likelihood, normal_kl
from runtime.pictures import save_drawn
from runtime.processes import launch
from runtime.run import Run

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import ddpm_pixel
from ddpm_pixel import alpha_bar_of, ancestral_row, guided_pass, q_sample, target_of, timestep_pairs
from evaluation.over_time import save_schedules
from image_data import datasets
from kernels import gaussian, sampling_update
from networks.adm_unet import UNet
from networks.published.unet import read_network


@dataclass
class Config(ddpm_pixel.Config):
    schedule: Literal["linear", "cosine", "sigmoid", "sigmoid-beta"] = "cosine"  # eq. 17
    learn_sigma: bool = True  # the network gives the variance, too: eq. 15
    objective: Literal["simple", "hybrid", "vlb"] = "hybrid"  # L_simple, L_hybrid or L_vlb
    min_snr: float = 0.0  # gamma of L_simple's min-SNR weights (Hang et al.: 5); 0: none
    schedule_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """how training draws t: alike, or by the size of their losses (section 3.3, for L_vlb)"""

    style: Literal["ddpm", "adm"] = "adm"  # details of the U-Net: DDPM's, or Improved DDPM's
    num_head_channels: int = 0  # channels of a head (ADM: 64), instead of --num-heads
    use_scale_shift_norm: bool = True  # the timestep scales and shifts the second norm
    resblock_updown: bool = False  # residual blocks resize the image (ADM), not convolutions

    sample: str = ""
    """do not train: sample this checkpoint, or ddpm_pixel.py's, or a published U-Net"""
    nll: str = ""  # do not train: bits per dimension of --n held-out images under such a checkpoint
    plot_schedule: bool = False  # do not train: draw all schedules, and an image under each
    variance: Literal["auto", "small", "large", "learned"] = "auto"
    """of a step: beta_tilde_t, beta_t, or learned; auto is learned where it was, else small"""
    dynamic_threshold: bool = False  # no clamp: divide x0_hat by its 99.5th percentile (Imagen)
    timestep_respacing: str = ""  # the timesteps to visit, such as 0-9,49,99, not --sample-steps

    FREE = ddpm_pixel.Config.FREE | cli.names("nll dynamic_threshold timestep_respacing")
    STEPS = ("sample_steps", "timestep_respacing", "spacing")
    CHAIN = cli.names("variance batch_size n ema") | {*STEPS}
    ASKED = CHAIN | checkpoints.UNSAID
    SCHEDULES = "timesteps alpha_min beta_start beta_end data data_root size classes"
    USES = {
        "sample": cli.DRAWS | ASKED | cli.names("clip_denoised dynamic_threshold guidance"),
        "nll": ASKED | cli.names("data data_root clip_denoised"),
        "plot_schedule": cli.names(SCHEDULES),
    }
    NEEDS = ddpm_pixel.Config.NEEDS | {"num_heads": "!num_head_channels"}
    NEEDS |= dict.fromkeys(("loss", "min_snr"), "objective=simple,hybrid")
    NEEDS |= dict.fromkeys(("sample_steps", "spacing"), "!timestep_respacing")
    NEEDS |= {"clip_denoised": "!dynamic_threshold"}


# ------------------------------------------------------------------ the bound L_vlb: section 2.1
# p(x_0), the integral of p(x_{0:T}) over x_1 ... x_T, is the mean of p(x_{0:T}) / q(x_{1:T} | x_0)
# under q. -log is convex: of a mean it is at most the mean of -log. Hence (DDPM eq. 3)
#     -log p(x_0) <= E_q[-log p(x_{0:T}) / q(x_{1:T} | x_0)]
#                  = E_q[-log p(x_T) - sum over t of log p(x_{t-1} | x_t) / q(x_t | x_{t-1})].
# By Bayes q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0), where t > 1. In
# the sum over t the last two cancel, all but q(x_T | x_0), which joins p(x_T); t = 1 leaves L_0:
#     E_q[log q(x_T | x_0) / p(x_T) + sum over t > 1 of log q(x_{t-1} | x_t, x_0) / p(x_{t-1} | x_t)
#         - log p(x_0 | x_1)] = L_T + sum over t > 1 of L_{t-1} + L_0.
# The mean of log q / p under q is their KL. Both are Gaussians, q given x_0 (DDPM eq. 6 and 7) and
# p by choice: normal_kl has the KL in closed form, and nothing but x_t must be drawn.
# L_0 is the code length of a pixel's level: p is its probability, the integral of the Gaussian over
# the bin 2/255 wide around it (DDPM eq. 13). A density in its place could grow without limit.


class Chain(NamedTuple):
    """The steps of a chain, S rows upward in t; float64 (S,) but `timesteps`."""

    timesteps: torch.Tensor  # int64 (S,), the t that the network sees in each row
    alpha_bar: torch.Tensor
    A: torch.Tensor  # weight of x_0 in the mean of q(x_prev | x_t, x_0), DDPM eq. 7
    B: torch.Tensor  # weight of x_t; 0 in row 0
    log_beta: torch.Tensor
    log_beta_tilde: torch.Tensor  # row 0, where beta_tilde is 0, holds row 1's, as in their code

    def at(self, t):
        """Its rows t (B,), to multiply images with: (B,1,1,1) each."""
        return Chain(*(table[t].view(-1, 1, 1, 1) for table in self))


def make_chain(alpha_bar, timesteps=None):
    """The whole chain of alpha_bar float64 (T,), or the shorter one of these `timesteps`: eq. 19.

    Raises ValueError for another dtype, and where alpha_bar does not fall strictly within [0, 1),
    as when a timestep is repeated.
    """
    if alpha_bar.dtype != torch.float64:
        raise ValueError(f"alpha_bar must be float64, got {alpha_bar.dtype}")
    ts = torch.arange(len(alpha_bar)) if timesteps is None else torch.as_tensor(timesteps).sort()[0]
    ts = ts.to(alpha_bar.device)
    a = alpha_bar[ts]  # (S,)
    a_prev = torch.cat([a.new_ones(1), a[:-1]])
    if not ((a >= 0) & (a < a_prev)).all():
        raise ValueError("alpha_bar must fall strictly with t and lie in 0 .. 1")
    beta = 1 - a / a_prev  # of a step over several t, that of all of them
    beta_tilde = beta * (1 - a_prev) / (1 - a)
    beta_tilde[0] = beta_tilde[1] if len(ts) > 1 else beta[0]
    A = a_prev.sqrt() * beta / (1 - a)
    B = (a / a_prev).sqrt() * (1 - a_prev) / (1 - a)
    return Chain(ts, a, A, B, beta.log(), beta_tilde.log())


def reverse_step(out, x_t, t, chain, *, prediction="eps", variance="small", clip=True):
    """x0_hat (B,C,H,W) and log Sigma, which broadcasts to it, float64; more: see vlb_terms."""
    channels = x_t.shape[1] * (2 if variance == "learned" else 1)
    if prediction not in ("eps", "v", "x0"):
        raise ValueError(f'prediction must be "eps", "v" or "x0", got {prediction!r}')
    if variance not in ("small", "large", "learned"):
        raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')
    if out.shape[1] not in (channels, 2 * x_t.shape[1]):  # a v that is not asked for is left
        raise ValueError(f"variance {variance!r} needs {channels} channels, got {out.shape[1]}")
    row, x_t = chain.at(t), x_t.double()
    m, v = out.double().tensor_split([x_t.shape[1]], dim=1)  # v (B,C,H,W), or no channel
    alpha, sigma = row.alpha_bar.sqrt(), (1 - row.alpha_bar).sqrt()  # (B,1,1,1)
    x0_hat = {"eps": (x_t - sigma * m) / alpha, "v": alpha * x_t - sigma * m, "x0": m}[prediction]
    large = (row.B > 0).double()  # beta_0 would blur the decoder's pixels
    f = {"small": torch.zeros_like(large), "large": large, "learned": (v + 1) / 2}[variance]
    log_var = f * row.log_beta + (1 - f) * row.log_beta_tilde  # eq. 15
    return clamped(x0_hat, -1, 1) if clip else x0_hat, log_var


def vlb_terms(out, x0, x_t, t, chain, *, discrete=True, **how):
    """L_{t-1} of each image, L_0 where t is 0, in bits per dimension: float64 (B,).

    out         the network's for x_t: (B,C,H,W), or (B,2C,H,W) with v for variance "learned"
    x0, x_t     the images (B,C,H,W), k / 127.5 - 1 for levels k = 0..255; drawn from q(x_t | x0)
    t           int64 (B,), rows of the chain: in the whole chain, the timesteps
    discrete    False: x0 are latents, without levels or ends at -1 and 1; L_0 is of a density
    how         of reverse_step. clip: keep x0_hat within [-1, 1], as sampling does. variance:
                "small", "large" (in row 0 that of small, as in DDPM's code) or "learned" (eq. 15)
    Raises ValueError for an unknown prediction or variance, or a wrong number of channels.
    """
    x0_hat, log_var = reverse_step(out, x_t, t, chain, **how)
    row, x0, x_t = chain.at(t), x0.double(), x_t.double()
    mean_q = row.A * x0 + row.B * x_t  # DDPM eq. 7
    mean_p = row.A * x0_hat + row.B * x_t  # the same, with the guess in the place of x_0
    nats = normal_kl(mean_q, row.log_beta_tilde, mean_p, log_var)  # (B,C,H,W)           eq. 6
    if discrete:
        first = -discretized_gaussian_log_likelihood(x0, x0_hat, 0.5 * log_var)  # eq. 5
    else:  # a density has a unit, and may exceed 1
        first = 0.5 * ((x0 - x0_hat) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi))
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, first, nats)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def prior_bits(x0, alpha_bar):
    """L_T of each image (B,C,H,W) in bits per dimension: float64 (B,), eq. 7. alpha_bar (S,)."""
    a, zero = alpha_bar[-1], torch.zeros_like(alpha_bar[-1])
    nats = normal_kl(a.sqrt() * x0.double(), torch.log1p(-a), zero, zero)  # (B,C,H,W)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def bits_per_dim(net, images, y, seeds, chain, *, tick=None, **how):
    """The evaluation.likelihood.Bound of B images, with one draw of x_t for each term of eq. 4.

    how: of reverse_step. Raises ValueError as it does, and for "eps" where alpha_bar is 0.
    """
    from evaluation import likelihood

    if chain.alpha_bar[-1] == 0 and how.get("prediction", "eps") == "eps":
        raise ValueError('prediction "eps" needs alpha_bar > 0; "v" and "x0" allow zero')
    terms, guess = partial(vlb_terms, chain=chain, **how), partial(reverse_step, chain=chain, **how)
    return likelihood.bits_per_dim(net, images, y, seeds, chain, terms, guess, prior_bits, tick)


# ------------------------------------------------------------------------- the losses: section 3


def hybrid(out, x0, x_t, t, chain, *, prediction="eps", discrete=True):
    """L_vlb of L_hybrid, float64 (B,): only v learns from it, the mean is held fixed.

    As vlb_terms; out (B,2C,H,W). Uniform t estimate the sum over S rows by S times the term at t.
    The published code adds the term times S / 1000: the same.
    """
    out = torch.cat([out[:, : x0.shape[1]].detach(), out[:, x0.shape[1] :]], 1)  # (B,2C,H,W)
    how = {"prediction": prediction, "variance": "learned", "discrete": discrete}
    return len(chain.timesteps) * vlb_terms(out, x0, x_t, t, chain, clip=False, **how)


def min_snr_weight(prediction, a, gamma):
    """The weight of a squared error at alpha_bar_t = a (B,): Hang et al. 2023, section 3.4.

    Of x0_hat it is min(SNR, gamma). Errors of eps_hat are sqrt(SNR), of v_hat sqrt(SNR + 1) as big.
    """
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[prediction]


def training_losses(net, x0, t, eps, chain, y, cfg):
    """L_simple, L_hybrid (eq. 16) or L_vlb of each image, float32 (B,), as the settings say."""
    x_t = q_sample(x0, t, eps, chain.alpha_bar)  # (B,C,H,W)
    out = net(x_t, t, y)  # (B,C,H,W), or (B,2C,H,W) with v
    if cfg.objective == "vlb":
        variance = "learned" if cfg.learn_sigma else "small"
        how = {"prediction": cfg.prediction, "variance": variance, "clip": False}
        return len(chain.timesteps) * vlb_terms(out, x0, x_t, t, chain, **how).float()
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[cfg.loss]
    a, target = chain.alpha_bar[t], target_of(cfg.prediction, x0, eps, chain.alpha_bar[t])
    losses = distance(out[:, : x0.shape[1]], target, reduction="none").mean(dim=(1, 2, 3))
    if cfg.min_snr:
        losses = losses * min_snr_weight(cfg.prediction, a, cfg.min_snr).float()
    if cfg.objective == "hybrid":
        vlb = hybrid(out, x0, x_t, t, chain, prediction=cfg.prediction)
        losses = losses + 0.001 * vlb.float()
    return losses


class LossSecondMoment:
    """Draws the timesteps with large losses more often: section 3.3, for L_vlb.

        p_t proportional to sqrt(E[L_t^2]),   weight 1 / (T p_t)                           eq. 18

    with the mean over the last 10 losses of t; p is uniform until every t has 10, and a thousandth
    of it stays so. Losses times weights have the mean that uniform timesteps give, and less noise.
    """

    def __init__(self, T, device="cpu"):
        self.last = torch.full((T, 10), torch.nan, dtype=torch.float64, device=device)  # old to new

    def probabilities(self):
        """p, float64 (T,)."""
        root = self.last.square().mean(1).sqrt()  # nan where there are fewer than 10
        uniform = torch.full_like(root, 1 / len(root))
        return torch.where(root.sum() > 0, 0.999 * root / root.sum() + 0.001 * uniform, uniform)

    def sample(self, u):
        """Timesteps, int64 (n,), and their weights, of u (n,) in [0, 1): all three float64."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0) / p.cumsum(0)[-1], u, right=True)
        return t, 1 / (len(p) * p[t])

    def update(self, t, losses):
        """Remember the finite ones of the losses (B,) at timesteps t (B,), of all processes."""
        each = torch.arange(len(self.last), device=t.device)  # (T,)
        of = torch.cat([each.repeat_interleave(10), torch.where(losses.isfinite(), t, len(each))])
        of, order = of.sort(stable=True)  # those of one t lie together, the newest last
        values = torch.cat([self.last.flatten(), losses.double()])[order]
        self.last = values.unfold(0, 10, 1)[torch.searchsorted(of, each, right=True) - 10]

    def state_dict(self):
        return {"last": self.last.cpu()}

    def load_state_dict(self, state):
        """Go on as the one that gave this state. Raises ValueError if its T was another."""
        if len(state["last"]) != len(self.last):
            raise ValueError(f"{len(state['last'])} timesteps, expected {len(self.last)}")
        self.last = state["last"].to(self.last.device)


# ----------------------------------------------------------------------- sampling: section 4


def learned_row(a, a_prev, prediction="eps", floor=None):
    """The step from alpha_bar_t = a to a_prev (eq. 19) with the variance of eq. 15.

    At the last step log beta_tilde is -inf. floor stands there, the row before's log_beta_tilde as
    in the published code; None takes log beta.
    """
    beta = 1 - a / a_prev
    log_beta = math.log(beta)
    if a_prev < 1:
        floor = math.log(beta * (1 - a_prev) / (1 - a))
    bounds = {"log_var_min": log_beta if floor is None else floor, "log_var_max": log_beta}
    return ancestral_row(a, a_prev, prediction)._replace(S=float(a_prev < 1), **bounds)


def pairs_of(cfg):
    """The walk down the chain, [(t, t_prev), ...]. BadInput for timesteps that exceed it."""
    if not cfg.timestep_respacing:
        return timestep_pairs(cfg.timesteps, cfg.sample_steps, cfg.spacing)
    ts = cli.parse_seeds(cfg.timestep_respacing, 0, "--timestep-respacing").unique().tolist()
    if ts[-1] >= cfg.timesteps:
        raise cli.BadInput(f"--timestep-respacing {ts[-1]}: there are 0 to {cfg.timesteps - 1}")
    return list(zip(ts[::-1], [*ts[-2::-1], -1], strict=True))


def variance_of(cfg):
    """small, large or learned. BadInput where it should be learned and was not."""
    if cfg.variance == "learned" and not cfg.learn_sigma:
        raise cli.BadInput("--variance learned: this network gives none; type small or large")
    auto = "learned" if cfg.learn_sigma else "small"
    return auto if cfg.variance == "auto" else cfg.variance


def rows_of(cfg, alpha_bar, pairs):
    """The function (a, a_prev) -> Row of an ancestral step in this walk, as the settings say."""
    how = {"prediction": cfg.prediction}
    if variance_of(cfg) != "learned":
        return partial(ancestral_row, variance=variance_of(cfg), **how)
    floor = make_chain(alpha_bar, [t for t, _ in pairs]).log_beta_tilde[0].item()
    return partial(learned_row, floor=floor, **how)


@torch.no_grad()
def trajectory(net, cfg, shape, seeds, y=None):
    """The walk of ddpm_pixel.sample as the settings say; yields x_{t-1} and x0_hat, (B,C,H,W)."""
    alpha_bar, pairs = alpha_bar_of(cfg), pairs_of(cfg)
    make_row = rows_of(cfg, alpha_bar, pairs)
    clip = cfg.clip_denoised and not cfg.dynamic_threshold
    x = gaussian((len(seeds), *shape), seeds, -1, seeds.device)  # x_T ~ N(0, I), (B,C,H,W)
    x = x.to(memory_format=torch.channels_last)
    for step, (t, t_prev) in enumerate(pairs):
        out, out_uncond = guided_pass(net, x, t, y, cfg.guidance)  # (B,C,H,W) or (B,2C,H,W)
        row = make_row(alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0)
        how = {"out_uncond": out_uncond, "guidance": 0.0 if out_uncond is None else cfg.guidance}
        x_prev, x0_hat = sampling_update(x, out, row, step=step, seeds=seeds, clip=clip, **how)
        if cfg.dynamic_threshold:  # the same step, from another x0_hat
            out = torch.cat([dynamic_threshold(x0_hat), out[:, shape[0] :]], dim=1)
            row = row._replace(p=0.0, q=-1.0)
            x_prev, x0_hat = sampling_update(x, out, row, step=step, seeds=seeds, clip=False)
        x = x_prev
        yield x, x0_hat


def draw(net, cfg, world, shape, seeds, labels, desc="sampling"):
    """uint8 images (N,H,W,C) of the seeds (N,), the same on every rank: each draws its share."""
    walk = partial(trajectory, world.for_sampling(net), cfg, shape)
    return world.draw(walk, seeds, labels, cfg.batch_size, pairs_of(cfg), desc)


# -------------------------------------------------------------------------------------- training


def make_net(cfg, shape, num_classes):
    """The U-Net of the settings."""
    net = UNet(shape, num_classes, **cli.taken_by(UNet, cfg))
    return net.to(memory_format=torch.channels_last)


def train(cfg, world):
    ds = datasets.of(cfg)
    alpha_bar = alpha_bar_of(cfg)
    chain = make_chain(alpha_bar.to(world.device))
    picker = LossSecondMoment(cfg.timesteps, world.device)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, ds.shape, ds.num_classes * cfg.class_cond).to(world.device)
    make, facts = world.adam(cfg.lr), {"alpha_bar": alpha_bar}
    if cfg.metric_every:
        from eval_fid import Evaluator

        evaluator = Evaluator.of_run(cfg, ds, world)
    run = Run(cfg, world, ds, net=net, optimizer=make, keep={"picker": picker}, facts=facts)
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    labels = cli.labels_for(seeds, range(net.null), cfg.guidance)
    if world.is_main:
        print(f"{ds.name}: {len(ds)} images {ds.shape}, {net.null} classes")
        noise = "own" if cfg.trained_betas else cfg.schedule
        print(f"{noise} schedule, T = {cfg.timesteps}; step {run.first} of {cfg.steps}")
        ddpm_pixel.save_forward(ds, alpha_bar, run.folder / "forward")
    run.say(f"U-Net predicts {cfg.prediction}, L_{cfg.objective}")

    for step in run.steps():  # goes on where it stopped; saves between two steps
        u = world.upload(run.rng(step, "t").random(cfg.batch_size))
        t_all, weights = picker.sample(u)  # all alike until it is updated
        for part in run.parts(step):  # this process's share, in --accumulate parts
            x0, y = run.images(part)  # (b,C,H,W), (b,)
            y = run.hide(part, y, cfg.label_dropout) if cfg.class_cond else None
            t, eps = t_all[part.where], run.noise(part, x0.shape)
            losses = training_losses(run.model, x0, t, eps, chain, y, cfg)
            run.backward(losses, t / cfg.timesteps, weights[part.where].float())
        run.descend()  # clip the gradient, Adam, running means, log
        if cfg.schedule_sampler == "loss-second-moment":
            picker.update(t_all, world.collect(torch.cat(run.losses), cfg.batch_size))
        if cfg.metric_every and (run.due(cfg.metric_every) or run.done):
            draw_some = partial(draw, run.ema, cfg, world, ds.shape)
            run.log_metrics(partial(evaluator.score, draw_some, cfg.metric_n, net.null))
        if run.due(cfg.sample_every):
            run.save_grid(partial(draw, run.ema, cfg, world, ds.shape, seeds, labels))
    save_images(run.ema, cfg, world, ds.shape, seeds, labels, run.folder, ds.class_names)


def save_images(net, cfg, world, shape, seeds, labels, folder, names=()):
    """samples.png and .npz; reverse.gif and .png: x_t and x0_hat of an image of each class."""
    images, walk = draw(net, cfg, world, shape, seeds, labels), partial(trajectory, net, cfg, shape)
    save_drawn(folder, images, labels, walk, seeds, world, pairs_of(cfg), names, w=cfg.guidance)


# -------------------------------------------------------------------------------------- commands


def load_net(path, device, ema=None, **how):
    """As ddpm_pixel.load_net, whose checkpoints it takes, too, and any published U-Net."""
    state = read_network(path, ("improved_ddpm", "ddpm_pixel"), **how)
    plain = state["script"] == "ddpm_pixel"
    if plain:
        state["config"] |= {"objective": "simple", "learn_sigma": False}
        state["config"] |= {"style": "ddpm", "use_scale_shift_norm": False}
    build = ddpm_pixel.UNet if plain else lambda shape, n, cfg: make_net(cfg, shape, n)
    net, cfg, *rest = checkpoints.restored(Config, build, state, path, device, ema)
    return net, cfg, *rest, alpha_bar_of(cfg)


def open_checkpoint(cfg, path, world):
    """(network, settings, shape, class names): as trained, but for what the command line gives."""
    asked = checkpoints.asked(cfg, "improved_ddpm" if cfg.sample else "")
    net, trained, shape, names, _ = load_net(path, world.device, **asked)
    fewer = {*cfg.STEPS}.difference(cli.not_given(cfg, cfg.STEPS))
    if fewer and "timestep_respacing" not in fewer:
        trained = replace(trained, timestep_respacing="")
    how = cfg.SAMPLING | cfg.CHAIN | cli.names("dynamic_threshold data data_root size")
    if cfg.nll and trained.dynamic_threshold:
        if not cli.typed(("clip_denoised",)):
            told = "type --clip-denoised for a clamp, --no-clip-denoised for none"
            raise cli.BadInput(f"{path} thresholds dynamically, but the bound does not: {told}")
        trained = replace(trained, dynamic_threshold=False)
    trained = checkpoints.overlaid(trained, cfg, how - {"dynamic_threshold"} if cfg.nll else how)
    if cfg.nll and not fewer and not cfg.smoke:  # the whole bound
        trained = replace(trained, sample_steps=trained.timesteps, timestep_respacing="")
    return net, trained, shape, names


def sample_checkpoint(cfg, world):
    net, trained, shape, names = open_checkpoint(cfg, cfg.sample, world)
    seeds, labels = cli.seeds_and_labels(cfg, net, names, trained.guidance)
    folder = cli.folder_of(cfg, cfg.sample)
    save_images(net, trained, world, shape, seeds, labels, folder, names)


def nll(cfg, world):
    """Bits per dimension of --n held-out images, over all T timesteps where no others are typed."""
    from evaluation.likelihood import evaluate_held_out

    net, trained, shape, names = open_checkpoint(cfg, cfg.nll, world)
    chain = make_chain(alpha_bar_of(trained).to(world.device), [t for t, _ in pairs_of(trained)])
    variance, clip = variance_of(trained), trained.clip_denoised
    how = {"prediction": trained.prediction, "variance": variance, "clip": clip}
    bound, folder = partial(bits_per_dim, net, chain=chain, **how), cli.folder_of(cfg, cfg.nll)
    about = f"variance {variance}, x0_hat {'clipped' if clip else 'not clipped'}"
    evaluate_held_out(bound, chain, trained, shape, names, world, folder, n=cfg.n, about=about)


def check(cfg):
    """Raise BadInput for a setting out of its range, and for settings that contradict others."""
    cli.check_run(cfg)
    parts = "alpha_min beta_start beta_end"
    cli.check_ranges(cfg, "timesteps sample_steps n", "min_snr num_head_channels", parts)
    if cfg.task():
        return  # what follows is of training; a checkpoint has settings of its own
    if cfg.objective == "hybrid" and not cfg.learn_sigma:
        raise cli.BadInput("--objective hybrid learns the variance: type --objective simple or vlb")
    if cfg.objective == "simple" and cfg.learn_sigma:
        raise cli.BadInput("--objective simple teaches no variance: type --no-learn-sigma, too")
    steps = len(pairs_of(cfg))
    ddpm_pixel.check(replace(cfg, sample_steps=steps, variance=variance_of(cfg)))


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_iddpm.yaml")
    small = {"model_channels": 16, "num_heads": 1, "num_head_channels": 0, "norm_groups": 0}
    small |= {"n": 8, "sample_steps": 4, "metric_every": 0, "out": "runs/smoke-iddpm"}
    cfg = cli.smoke(cfg, **small)
    check(cfg)
    if cfg.plot_schedule:
        save_schedules(cfg, ddpm_pixel.make_alpha_bar, q_sample)  # figures 3 and 5
    elif cfg.sample or cfg.nll:
        launch(sample_checkpoint if cfg.sample else nll, cfg)
    else:
        cfg = datasets.prepared(cfg)  # by one process
        launch(train, replace(cfg, out=cfg.out or f"runs/iddpm-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    cli.entry(main)
