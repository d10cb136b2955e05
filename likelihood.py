"""Likelihood of chapter 1: how many bits per dimension an image costs under the model.

Sohl-Dickstein et al. 2015 (arXiv:1503.03585): the variational bound of a diffusion.
Ho, Jain, Abbeel 2020 (arXiv:2006.11239), DDPM: its terms for Gaussians, and a decoder for pixels.
Nichol, Dhariwal 2021 (arXiv:2102.09672), IDDPM: learned variances, L_hybrid, importance sampling.

The chain is a latent variable model. What it codes an image with is bounded from above by

    -log p(x_0) <= L_0 + L_1 + ... + L_T                                         IDDPM eq. 4
    L_0   = -log p(x_0 | x_1)                the last step, to pixels of 256 levels    eq. 5
    L_t-1 = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                              eq. 6
    L_T   = KL(q(x_T | x_0) || N(0, I))      nothing here is learned                   eq. 7

divided by the number of pixels times channels and by log 2: bits per dimension. In code t is 1 less
than in the papers: row t of a chain is the step that leaves x_t, row 0 the decoder's.

Both sides of the KL are Gaussians with the mean A x_0 + B x_t, q with the true x_0 and p with the
network's guess of it. Thousands of small terms are summed: all but the network is float64.

Chapter 3 learns the variances of latents from the same terms, by `hybrid`. They have no levels: row
0 is then a density, and the sum no code length of an image.
"""

from runtime.files import atomic_write
from runtime.plots import plot_lines

import json
import math
from typing import NamedTuple

import numpy as np
import torch

from image_data import datasets
from kernels import gaussian

# ------------------------------------------------------------------------------------- the chain


class Chain(NamedTuple):
    """The steps of a chain, S rows upward in t; float64 (S,) but `timesteps`."""

    timesteps: torch.Tensor  # int64 (S,), the t that the network is told in each row
    alpha_bar: torch.Tensor
    A: torch.Tensor  # weight of x_0 in the mean of q(x_prev | x_t, x_0), DDPM eq. 7
    B: torch.Tensor  # weight of x_t
    log_beta: torch.Tensor
    log_beta_tilde: torch.Tensor  # row 0, where beta_tilde is 0, holds row 1's, as in IDDPM's code


def make_chain(alpha_bar, timesteps=None):
    """The whole chain of alpha_bar float64 (T,), or the shorter one that visits `timesteps`.

    timesteps: different ints of 0..T-1, in any order. Between neighbours t_prev < t the step has
    beta = 1 - alpha_bar_t / alpha_bar_prev (IDDPM eq. 19); alpha_bar at -1 is 1. The tables lie on
    alpha_bar's device. Raises ValueError for another dtype, and where alpha_bar does not fall
    strictly within [0, 1), as when a timestep is repeated.
    """
    if alpha_bar.dtype != torch.float64:
        raise ValueError(f"alpha_bar must be float64, got {alpha_bar.dtype}")
    ts = torch.arange(len(alpha_bar)) if timesteps is None else torch.as_tensor(timesteps).sort()[0]
    ts = ts.to(alpha_bar.device)
    a = alpha_bar[ts]  # (S,)
    a_prev = torch.cat([a.new_ones(1), a[:-1]])
    if not ((a >= 0) & (a < a_prev)).all():
        raise ValueError("alpha_bar must fall strictly with t and lie in 0 .. 1")
    beta = 1 - a / a_prev
    beta_tilde = beta * (1 - a_prev) / (1 - a)
    beta_tilde[0] = beta_tilde[1] if len(ts) > 1 else beta[0]
    A = a_prev.sqrt() * beta / (1 - a)
    B = (a / a_prev).sqrt() * (1 - a_prev) / (1 - a)
    return Chain(ts, a, A, B, beta.log(), beta_tilde.log())


def _at(table, t):
    """Rows t (B,) of a table (S,), to multiply images with: (B,1,1,1)."""
    return table[t].view(-1, 1, 1, 1)


# ------------------------------------------------------------------------- two laws of a Gaussian


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) of each element, in nats.

    The four tensors broadcast. Written with expm1, so that nearly equal variances keep their digits
    and equal Gaussians give exactly 0.
    """
    d = log_var1 - log_var2
    return 0.5 * (torch.expm1(d) - d + (mean1 - mean2) ** 2 * torch.exp(-log_var2))


def log_cdf(z):
    """log Phi(z) of float64 z, exact on both sides, with an exact gradient.

    torch.special.log_ndtr has these values, but its gradient is 1e-4 off at z = -1e6 and inf at
    z = -1e10, where erfcx(x) = exp(x^2) erfc(x) keeps its digits.
    """
    left, right = z.clamp(max=0), z.clamp(min=0)
    far = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left**2 / 2
    near = torch.log1p(-torch.special.erfc(right / math.sqrt(2)) / 2)
    return torch.where(z < 0, far, near)


def discretized_gaussian_log_likelihood(x0, mean, log_scale):
    """log of the mass that N(mean, exp(log_scale)^2) gives to the bin of x0, in nats: DDPM eq. 13.

    x0 is k / 127.5 - 1 for a level k = 0..255, up to rounding. Its bin reaches 1/255 to both sides,
    that of level 0 to -inf and that of level 255 to +inf. x0, mean and log_scale broadcast.
    Returns float64 of that shape.

    log(Phi(above) - Phi(below)) is taken in logarithms, and on the left side of the Gaussian, where
    Phi keeps its digits: right, with finite gradients, even where both Phi round to 0 or to 1.
    """
    level = ((x0.double() + 1) * 127.5).round()  # exact, so that neighbouring bins share an edge
    scale = torch.exp(log_scale.double())
    below = ((level - 0.5) / 127.5 - 1 - mean.double()) / scale
    above = ((level + 0.5) / 127.5 - 1 - mean.double()) / scale
    mirror = below + above > 0
    low = log_cdf(torch.where(mirror, -above, below))
    high = log_cdf(torch.where(mirror, -below, above))
    inner = high + torch.log(-torch.expm1(low - high))
    outer = log_cdf(torch.where(level == 0, above, -below))
    return torch.where((level == 0) | (level == 255), outer, inner)


# ------------------------------------------------------------------------------ terms of the bound


def mean_bits(nats):
    """nats of each element (B,C,H,W) -> bits per dimension (B,)."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def reverse_step(out, x_t, t, chain, prediction, variance, clip):
    """x0_hat (B,C,H,W) and the log variance of p(x_{t-1} | x_t), which broadcasts to it; float64.

    The arguments, and the ValueErrors, are those of vlb_terms.
    """
    channels, learned = x_t.shape[1], variance == "learned"
    needed = channels * (1 + learned)
    if out.shape[1] != needed:
        raise ValueError(f"variance {variance!r} needs {needed} channels, got {out.shape[1]}")
    m, v = out.double()[:, :channels], out.double()[:, channels:]  # v (B,C,H,W), or no channel
    a, x_t = _at(chain.alpha_bar, t), x_t.double()
    if prediction == "eps":
        x0_hat = (x_t - (1 - a).sqrt() * m) / a.sqrt()
    elif prediction == "v":
        x0_hat = a.sqrt() * x_t - (1 - a).sqrt() * m
    elif prediction == "x0":
        x0_hat = m
    else:
        raise ValueError(f'prediction must be "eps", "v" or "x0", got {prediction!r}')

    if variance == "small":
        f = 0.0
    elif variance == "large":
        f = (t > 0).double().view(-1, 1, 1, 1)  # beta_0 would blur the decoder's pixels
    elif learned:
        f = (v + 1) / 2
    else:
        raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')
    log_var = f * _at(chain.log_beta, t) + (1 - f) * _at(chain.log_beta_tilde, t)
    return x0_hat.clamp(-1, 1) if clip else x0_hat, log_var


def kl_bits(x0, x0_hat, log_var, x_t, t, chain):
    """The KL of eq. 6 in bits per dimension, float64 (B,): a row above 0."""
    A, B = _at(chain.A, t), _at(chain.B, t)
    mean_q = A * x0.double() + B * x_t.double()
    mean_p = A * x0_hat + B * x_t.double()  # DDPM eq. 7 with the guess in the place of x_0
    return mean_bits(normal_kl(mean_q, _at(chain.log_beta_tilde, t), mean_p, log_var))


def decoder_bits(x0, x0_hat, log_var):
    """The code of eq. 5 in bits per dimension, float64 (B,): row 0, where A = 1 and B = 0."""
    return mean_bits(-discretized_gaussian_log_likelihood(x0, x0_hat, 0.5 * log_var))


def density_bits(x0, x0_hat, log_var):
    """-log2 N(x0; x0_hat, exp(log_var)) per dimension, float64 (B,): row 0 of what has no levels.

    A density has a unit, that of x0, and may exceed 1: the bits can be negative.
    """
    squares = (x0.double() - x0_hat) ** 2 * torch.exp(-log_var)  # (B,C,H,W)
    return mean_bits(0.5 * (squares + log_var + math.log(2 * math.pi)))


def vlb_terms(
    out, x0, x_t, t, chain, *, prediction="eps", variance="small", clip=True, discrete=True
):
    """One term of the bound for each image, in bits per dimension: float64 (B,), IDDPM eq. 5-6.

    out    the network's output for x_t: (B,C,H,W), or (B,2C,H,W) with variance "learned"
    x0     the images (B,C,H,W), k / 127.5 - 1 for levels k = 0..255
    x_t    drawn from q(x_t | x0), (B,C,H,W)
    t      int64 (B,), rows of the chain: in the whole chain these are the timesteps
    chain  make_chain's, on the same device
    clip   keep x0_hat within [-1, 1], as sampling does; training leaves it alone
    prediction  "eps" (DDPM eq. 15), "v" = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0, "x0"
    variance    "small" is beta_tilde; "large" is beta, but in row 0 beta_tilde of row 1, as in
                DDPM's code; "learned" lies between their logarithms, by the network's v: log
                beta_tilde at -1, log beta at 1 (IDDPM eq. 15)
    discrete    False: x0 are latents, any real numbers, and row 0 is their density_bits. A decoder
                has nothing to name: there are no levels, and no ends at -1 and 1, beyond which a
                third of a unit Gaussian lies. The published code of DiT (Peebles, Xie 2023,
                arXiv:2212.09748) does take the pixels' decoder for its latents, so that its v at
                row 0 means something else. The rows above 0 are the same for both.

    Raises ValueError for an unknown prediction or variance, or a wrong number of channels.
    """
    x0_hat, log_var = reverse_step(out, x_t, t, chain, prediction, variance, clip)
    kl = kl_bits(x0, x0_hat, log_var, x_t, t, chain)
    last = decoder_bits if discrete else density_bits
    return torch.where(t == 0, last(x0, x0_hat, log_var), kl)


def hybrid(out, x0, x_t, t, chain, *, prediction="eps", discrete=True):
    """L_vlb of L_hybrid = L_simple + 0.001 L_vlb, float64 (B,): IDDPM eq. 16.

    The arguments are those of vlb_terms; out (B,2C,H,W). Only v learns from it: the mean is held
    fixed, and left to L_simple (IDDPM section 3.1).

    The unit decides what 0.001 means. L_vlb is a sum over the chain, which uniform t estimate by S
    times the term at t, S being the chain's length. That is returned, in bits per dimension. The
    published code adds the term times S / 1000: the same.
    """
    out = torch.cat([out[:, : x0.shape[1]].detach(), out[:, x0.shape[1] :]], 1)  # (B,2C,H,W)
    return len(chain.timesteps) * vlb_terms(
        out,
        x0,
        x_t,
        t,
        chain,
        prediction=prediction,
        variance="learned",
        clip=False,
        discrete=discrete,
    )


def prior_bits(x0, alpha_bar):
    """L_T of each image in bits per dimension: float64 (B,), IDDPM eq. 7.

    x0 (B,C,H,W); alpha_bar (S,) float64, whose last entry is the end of the chain.
    """
    a = alpha_bar[-1]
    zero = torch.zeros_like(a)
    return mean_bits(normal_kl(a.sqrt() * x0.double(), torch.log1p(-a), zero, zero))


# ----------------------------------------------------------------------------- the bound of images


class Bound(NamedTuple):
    """The bound of B images over a chain of S rows; float64, bits per dimension."""

    prior: torch.Tensor  # L_T (B,)
    terms: torch.Tensor  # (B,S), row 0 the decoder's
    eps_mse: torch.Tensor  # (B,S), mean squared error of eps_hat
    x0_mse: torch.Tensor  # (B,S), of x0_hat

    @property
    def total(self):
        """The bound itself, (B,)."""
        return self.prior + self.terms.sum(1)


@torch.inference_mode()
def bits_per_dim(
    net,
    images,
    labels,
    seeds,
    chain,
    *,
    prediction="eps",
    variance="small",
    clip=True,
    tick=None,
):
    """The Bound of these images: every term of the chain, with one draw of x_t for each.

    images  uint8 (B,H,W,C), or float (B,C,H,W) made of levels k / 127.5 - 1
    labels  int64 (B,) or None; with labels it is the likelihood of an image given its class
    seeds   int64 (B,), one per image; eps is a function of the seed and the timestep alone, so that
            a term depends neither on the batch nor on which other timesteps are visited
    chain   make_chain's, of the network's own alpha_bar; a shorter one is cheaper and looser
    tick    called after each of the chain's rows, to move a progress bar

    All on the network's device, the network in eval mode. eps_mse and x0_mse are of the guesses
    that the terms use, after `clip`. Raises ValueError as vlb_terms does, and for an eps prediction
    where alpha_bar is 0.
    """
    if prediction == "eps" and chain.alpha_bar[-1] == 0:
        raise ValueError('prediction "eps" needs alpha_bar > 0; "v" and "x0" allow zero')
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).double() / 127.5 - 1  # (B,C,H,W)
    x0, columns = images.double(), []
    for row, timestep in enumerate(chain.timesteps.tolist()):
        a, t = chain.alpha_bar[row], torch.full_like(seeds, row)
        eps = gaussian(x0.shape, seeds, timestep, x0.device)
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).float()  # (B,C,H,W), DDPM eq. 4
        out = net(x_t, torch.full_like(seeds, timestep), labels)
        x0_hat, log_var = reverse_step(out, x_t, t, chain, prediction, variance, clip)
        if row == 0:
            term = decoder_bits(x0, x0_hat, log_var)
        else:
            term = kl_bits(x0, x0_hat, log_var, x_t, t, chain)
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        errors = [(e**2).mean(dim=(1, 2, 3)) for e in (eps_hat - eps, x0_hat - x0)]
        columns.append(torch.stack([term, *errors]))  # (3,B)
        if tick is not None:
            tick()
    return Bound(prior_bits(x0, chain.alpha_bar), *torch.stack(columns, dim=2))


class BoundMean:
    """The mean of Bounds over batches and processes. Its size does not depend on the images."""

    def __init__(self, chain):
        self.rows = chain.alpha_bar.new_zeros(3, len(chain.alpha_bar))
        self.sums = chain.alpha_bar.new_zeros(4)  # images, prior, total, total squared

    def add(self, bound):
        total = bound.total
        self.rows += torch.stack([bound.terms, bound.eps_mse, bound.x0_mse]).sum(1)
        self.sums += torch.stack([torch.ones_like(total), bound.prior, total, total**2]).sum(1)

    def read(self, world):
        """A dictionary of numbers, over all processes, with lists of S for what has rows.

        The standard error is that of the mean over images, nan for a single one.
        """
        images, prior, total, squares = world.sum(self.sums.clone()).tolist()
        terms, eps_mse, x0_mse = (world.sum(self.rows.clone()) / images).tolist()
        mean = total / images
        variance = max(squares / images - mean**2, 0.0) / (images - 1) if images > 1 else math.nan
        return {
            "bits_per_dim": mean,
            "standard_error": math.sqrt(variance),
            "prior": prior / images,
            "images": int(images),
            "terms": terms,
            "eps_mse": eps_mse,
            "x0_mse": x0_mse,
        }


def evaluate(
    net, ds, chain, world, folder, *, n, batch_size, labels, prediction="eps", variance="small"
):
    """Bits per dimension of n images of the data.Dataset `ds`, evenly spaced in it (or all).

    Prints them, leaves nll.json and nll.png in `folder` (a Path), and returns what BoundMean reads,
    on every rank. labels: whether the network is told the class. batch_size: over all processes.
    An image's seed is its number in the data set. The network runs in float32, without autocast.
    """
    numbers = np.linspace(0, len(ds) - 1, min(n, len(ds))).round().astype(np.int64)
    mine = numbers[world.share(len(numbers))]
    each = max(1, batch_size // world.size)
    chain = Chain(*(table.to(world.device) for table in chain))
    mean, batches = BoundMean(chain), [mine[i : i + each] for i in range(0, len(mine), each)]
    with world.progress(len(batches) * len(chain.timesteps), desc="bits/dim") as bar:
        for batch in batches:
            images = torch.from_numpy(ds.images[batch]).to(world.device)  # uint8 (B,H,W,C)
            y = torch.from_numpy(ds.labels[batch]).to(world.device) if labels else None
            seeds = torch.from_numpy(batch).to(world.device)
            mean.add(
                bits_per_dim(
                    net,
                    images,
                    y,
                    seeds,
                    chain,
                    prediction=prediction,
                    variance=variance,
                    tick=bar.update,
                )
            )
    values, timesteps = mean.read(world), chain.timesteps.tolist()
    if world.is_main:
        with atomic_write(folder / "nll.json") as temporary:
            temporary.write_text(json.dumps({**values, "timesteps": timesteps}))
        plot_terms(folder / "nll.png", values["terms"], timesteps)
        print(
            f"{ds.name}: {values['bits_per_dim']:.4f} bits/dim, standard error "
            f"{values['standard_error']:.4f} over {values['images']} images; {len(timesteps)} "
            f"terms, variance {variance}: {folder / 'nll.json'}, {folder / 'nll.png'}"
        )
    return values


def plot_terms(path, terms, timesteps):
    """Draw the terms (S,) in bits per dimension over the steps timesteps + 1 (IDDPM figure 2)."""
    ylabel, steps = "term, bits/dim", [t + 1 for t in timesteps]
    title = f"{sum(terms):.3f} bits/dim in {len(terms)} terms"
    plot_lines(
        path,
        {ylabel: {"": (steps, terms)}},
        xlabel="diffusion step t + 1",
        title=title,
        logx=True,
        logy=(ylabel,),
    )


def evaluate_held_out(net, trained, shape, names, chain, world, folder, **options):
    """evaluate() on the test split of the data that the settings `trained` name.

    shape (C,H,W) and class names: the network's. Raises BadInput for images of another shape.
    """
    ds, known = datasets.held_out(
        trained.data, trained.data_root, shape, names, size=trained.size, classes=trained.classes
    )
    labels = known and trained.conditional
    size = trained.batch_size
    return evaluate(net, ds, chain, world, folder, batch_size=size, labels=labels, **options)


# ----------------------------------------------------------------------------- importance sampling


class Uniform:
    """Draws all timesteps alike."""

    def __init__(self, T):
        self.T = T

    def sample(self, rng, n):
        """n timesteps, int64 (n,), and weights of 1, float64 (n,)."""
        return rng.integers(self.T, size=n), np.ones(n)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class LossSecondMoment:
    """Draws the timesteps whose term is large more often: IDDPM section 3.3, for L_vlb.

        p_t proportional to sqrt(E[L_t^2]),   weight 1 / (T p_t)             IDDPM eq. 18

    with the mean over the last 10 losses of t. Until every t has 10, p is uniform; a thousandth of
    it stays so, that no timestep be forgotten. Losses times weights have the mean that uniform
    timesteps would give them, and less noise.
    """

    HISTORY, UNIFORM = 10, 0.001

    def __init__(self, T):
        self.losses = torch.zeros(T, self.HISTORY, dtype=torch.float64)  # a ring for each timestep
        self.counts = torch.zeros(T, dtype=torch.int64)

    def probabilities(self):
        """p, float64 (T,)."""
        T, root = len(self.counts), self.losses.square().mean(1).sqrt()
        if self.counts.min() < self.HISTORY or root.sum() == 0:
            return torch.full_like(root, 1 / T)
        return (1 - self.UNIFORM) * root / root.sum() + self.UNIFORM / T

    def sample(self, rng, n):
        """n timesteps, int64 (n,), and their weights, float64 (n,), drawn by a numpy Generator."""
        p = self.probabilities().numpy()
        t = rng.choice(len(p), size=n, p=p)
        return t, 1 / (len(p) * p[t])

    def update(self, t, losses):
        """Remember the terms `losses` (B,) at timesteps t (B,), before any weight is applied.

        Every process must give the whole global batch, in the same order, to have the same state.
        Losses that are not finite are passed over.
        """
        for i, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[i, self.counts[i] % self.HISTORY] = loss
                self.counts[i] += 1

    def state_dict(self):
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state):
        """Go on as the one whose state_dict this was. Raises ValueError if its T was another."""
        if len(state["counts"]) != len(self.counts):
            raise ValueError(f"{len(state['counts'])} timesteps, expected {len(self.counts)}")
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
