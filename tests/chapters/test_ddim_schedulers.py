"""DDPM, DDIM and DPM-Solver++, step by step, against the schedulers of diffusers.

Both are given the same x_t and the same network output at every timestep. Their schedulers compute
in float64 here, from our alpha_bar (their own table is multiplied up in float32), where they allow.
"""

from functools import partial

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

import ddim
import ddpm_pixel as ch1
import dpm_solver
import improved_ddpm
from kernels import gaussian

T, SHAPE = 1000, (2, 3, 5)
ALPHA_BAR = ch1.make_alpha_bar("linear", T)
THEIR_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs
ENTIRE = range(11, -1, -1)
CLOSE = {"atol": 1e-5, "rtol": 0}


def made(kind, prediction, **config):
    theirs = kind(
        num_train_timesteps=T,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=THEIR_NAMES[prediction],
        **config,
    )
    theirs.alphas_cumprod = ALPHA_BAR
    return theirs


class Scripted(torch.nn.Module):
    """A network that thinks of a fixed image at every timestep; remembers what it was asked."""

    label = None

    def __init__(self, prediction, learned=False):
        super().__init__()
        self.prediction, self.learned, self.asked = prediction, learned, []

    def forward(self, x, t, y=None):
        t = int(t[0])
        a, generator = ALPHA_BAR[t], torch.Generator().manual_seed(t)
        # Half of the values lie outside [-1, 1], so that clipping matters.
        x0 = 1.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        eps = (x.double() - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        out = {"eps": eps, "x0": x0, "v": v}[self.prediction]
        if self.learned:
            out = torch.cat([out, 2 * torch.rand(x.shape, generator=generator) - 1], dim=1)
        self.asked.append((t, x.double(), out.float().double()))
        return out.float()


def pairs_of(timesteps):
    ts = [int(t) for t in timesteps]
    return list(zip(ts, [*ts[1:], -1], strict=True))


def check(net, pairs, their_step, sample, **how):
    """Walk by `sample`; their_step(step, t, x, out, z) -> (x_prev, x0_hat) must say the same."""
    seeds = torch.tensor([5, 6])
    way = sample(net, ALPHA_BAR, pairs, SHAPE, seeds, **how)
    for step, ((t, _), (x_prev, x0_hat)) in enumerate(zip(pairs, way, strict=True)):
        asked, x, out = net.asked[-1]
        assert asked == t
        z = gaussian(x.shape, seeds, step, "cpu").double()
        theirs, their_guess = their_step(step, t, x, out, z)
        torch.testing.assert_close(x_prev.double(), theirs.double(), **CLOSE)
        # p x_t - q eps_hat loses as many digits as p and q are large, up to 157 at T - 1.
        guess_close = CLOSE if net.prediction != "eps" else {"atol": 1e-4, "rtol": 0}
        torch.testing.assert_close(x0_hat.double(), their_guess.double(), **guess_close)


# ------------------------------------------------------------------------------------ timesteps


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 333, 999, 1000])
@pytest.mark.parametrize("ours, theirs", [("leading", "leading"), ("trailing", "trailing")])
def test_spacings_are_those_of_the_same_name(ours, theirs, steps):
    scheduler = made(DDIMScheduler, "eps", timestep_spacing=theirs, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert ddim.subsequence(T, steps, ours) == pairs_of(scheduler.timesteps)


@pytest.mark.parametrize("steps", [2, 7, 50, 1000])
def test_linear_spacing_is_their_linspace(steps):
    scheduler = made(DDIMScheduler, "eps", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert ddim.subsequence(T, steps) == pairs_of(scheduler.timesteps)


# ------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral_steps(variance, prediction, clip, monkeypatch):
    theirs = made(
        DDPMScheduler,
        prediction,
        clip_sample=clip,
        timestep_spacing="leading",
        variance_type={"learned": "learned_range"}.get(variance, f"fixed_{variance}"),
    )
    net, noise = Scripted(prediction, learned=variance == "learned"), {}
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise["z"])

    def their_step(step, t, x, out, z):
        noise["z"] = z
        done = theirs.step(out, t, x)
        return done.prev_sample, done.pred_original_sample

    make_row = partial(ch1.ancestral_row, variance=variance)
    if variance == "learned":
        make_row = improved_ddpm.learned_row
    # Evenly, unevenly, and without leaving any out: the end of the whole chain.
    for ts in ({"num_inference_steps": 10}, {"timesteps": quadratic(12)}, {"timesteps": [*ENTIRE]}):
        theirs.set_timesteps(**ts)
        check(
            net,
            pairs_of(theirs.timesteps),
            their_step,
            ch1.sample,
            make_row=partial(make_row, prediction=prediction),
            clip=clip,
        )


def quadratic(steps):
    return [t for t, _ in ddim.subsequence(T, steps, "quadratic")]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps(eta, prediction, clip):
    for spacing in ("leading", "trailing"):  # they step by T // steps, so steps must divide T
        theirs = made(
            DDIMScheduler,
            prediction,
            clip_sample=clip,
            timestep_spacing=spacing,
            set_alpha_to_one=True,
        )
        theirs.set_timesteps(20)

        def their_step(step, t, x, out, z, theirs=theirs):
            done = theirs.step(out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z)
            return done.prev_sample, done.pred_original_sample

        net = Scripted(prediction)
        how = {"eta": eta, "prediction": prediction, "clip": clip}
        check(net, pairs_of(theirs.timesteps), their_step, ddim.sample, **how)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", ["linear", "quadratic", "leading", "trailing"])
def test_dpm_solver_steps(spacing, prediction):
    """Of second order between a first and a last step of first order; final sigma 0 is our -1."""
    # In 2 or 3 steps the first is so long that the digits lost to q = 157 reach x_prev.
    for steps in (8, 20) if prediction == "eps" else (2, 3, 20):
        theirs = made(
            DPMSolverMultistepScheduler,
            prediction,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=False,
            final_sigmas_type="zero",
        )
        pairs = ddim.subsequence(T, steps, spacing)
        theirs.set_timesteps(timesteps=[t for t, _ in pairs])
        a = ALPHA_BAR[[t for t, _ in pairs]]
        theirs.sigmas = torch.cat([((1 - a) / a).sqrt(), a.new_zeros(1)])  # float64, as elsewhere

        def their_step(step, t, x, out, z, theirs=theirs):
            x_prev = theirs.step(out, t, x).prev_sample
            return x_prev, theirs.model_outputs[-1]

        sample = partial(dpm_solver.sample, "dpmpp", prediction=prediction)
        check(Scripted(prediction), pairs, their_step, sample, clip=False)


@pytest.mark.parametrize(
    "sample",
    [ddim.sample, partial(dpm_solver.sample, "dpmpp"), partial(dpm_solver.sample, "heun")],
    ids=["ddim", "dpmpp", "heun"],
)
def test_a_learned_variance_does_not_reach_samplers_that_have_none(sample):
    pairs, seeds = ddim.subsequence(T, 8), torch.arange(2)
    ends = []
    for learned in (False, True):
        net = Scripted("v", learned)
        way = sample(net, ALPHA_BAR, pairs, SHAPE, seeds, prediction="v")
        ends.append([x.clone() for x, _ in way])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
