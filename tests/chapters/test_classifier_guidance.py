"""Guidance by a classifier: algorithms 1 and 2 written out, and classes that are Gaussians.

Dhariwal & Nichol 2021 (arXiv:2105.05233). Walks are compared in float64; the transcriptions share
no line with the chapters.
"""

import importlib
import itertools
import math
from functools import partial

import pytest
import torch
from scipy.integrate import solve_ivp
from torch.nn.functional import linear, one_hot

import classifier_guidance as guide
import ddim
import ddpm_pixel
import improved_ddpm
from kernels import Row, gaussian

SHAPE, LABELS = (2, 3, 4), torch.tensor([0, 2, 1])
ALPHA_BAR = torch.sigmoid(2 * torch.linspace(3, -2, 50, dtype=torch.float64))
PAIRS = ddim.subsequence(50, 7)
WAY = ALPHA_BAR, PAIRS, SHAPE, torch.tensor([5, 6, 1000])  # the last are seeds


@pytest.fixture
def double(monkeypatch):
    """Walks begin in float64, and S z is not rounded to float32 on the way."""
    for module in (guide, ddim, importlib.import_module("kernels.sampling_update")):
        monkeypatch.setattr(module, "gaussian", lambda *a: gaussian(*a).double(), raising=False)


def noise(seeds, step, shape=SHAPE):
    return gaussian((len(seeds), *shape), seeds, step, "cpu").double()


def at(alpha_bar, t):
    return alpha_bar[t] if t >= 0 else alpha_bar.new_ones(())


def walk(*args, **how):
    """[(x_prev, x0_hat), ...] of the chapter."""
    steps = list(guide.sample(*args, **how))
    assert {x.dtype for pair in steps for x in pair} == {torch.float64}
    assert not any(x.requires_grad for pair in steps for x in pair)
    return steps


def close(ours, theirs, tolerance=1e-12):
    """Both are x_prev and x0_hat of each step, the same within an error, relative above 1."""
    torch.testing.assert_close(list(ours), list(theirs), atol=tolerance, rtol=tolerance)


# ----------------------------------------------------------------------- networks that bend x


class Wavy:
    """A network that bends x by t and label, and must be given none where null is 0. learned: it
    has a second half v, some of it beyond -1 and 1.
    """

    def __init__(self, null=3, learned=False):
        self.null, self.learned, self.asked = null, learned, []

    def __call__(self, x, t, y=None):
        assert t.shape == (len(x),) and t.dtype == torch.int64 and (y is None) == (self.null == 0)
        self.asked.append((t.tolist(), None if y is None else y.tolist()))
        y = torch.zeros_like(t) if y is None else y
        shift = (0.02 * t + 0.4 * y).to(x.dtype).view(-1, 1, 1, 1)
        out = 1.4 * torch.sin(1.3 * x + shift) + 0.1 * x
        return torch.cat([out, 1.2 * torch.cos(2 * x + shift)], dim=1) if self.learned else out


class Curved(torch.nn.Module):
    """logits = W2 tanh(W1 x + t / 50) of four classes; its gradient by hand."""

    def __init__(self, strength=1.0):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        first = 0.05 * torch.randn(8, math.prod(SHAPE), generator=g, dtype=torch.float64)
        second = strength * torch.randn(4, 8, generator=g, dtype=torch.float64)
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)
        self.asked = []

    def forward(self, x, t):
        assert t.shape == (len(x),) and t.dtype == torch.int64
        self.asked.append((x.detach().clone(), t.tolist()))
        hidden = linear(x.flatten(1), self.first) + t[:, None].to(x.dtype) / 50
        return linear(hidden.tanh(), self.second)

    @torch.no_grad()
    def gradient(self, x, t, y):
        hidden = (x.flatten(1) @ self.first.T + t / 50).tanh()  # (B,8)
        p = (hidden @ self.second.T).softmax(1)  # (B,4)
        rows = one_hot(y, 4) - p  # of log p(y) with respect to the logits
        return ((rows @ self.second) * (1 - hidden**2) @ self.first).view_as(x)


# ------------------------------------------------------------------- the algorithms, written out


def posterior(a, a_prev):
    """beta and beta_tilde of a step from a to a_prev."""
    beta = 1 - a / a_prev
    return beta, beta * (1 - a_prev) / (1 - a)


def literal(algorithm, net, classifier, way, y, s, w=0.0, *, prediction="eps", clip=False, **how):
    """Algorithm 1 or 2 line by line; x_{t-1} and x0_hat, which algorithm 2 moves.

    With clip the noise belongs to the clipped x0_hat, as in the published condition_mean; but 2
    clips it after the classifier has moved it, and condition_score before. how: variance of
    algorithm 1, learned by IDDPM eq. 15, or eta of 2.
    """
    (alpha_bar, pairs, shape, seeds), none = way, torch.full_like(y, net.null)
    label = None if net.null == 0 else none if w == -1 else y
    x, C = noise(seeds, -1, shape), shape[0]
    for i, (t, t_prev) in enumerate(pairs):
        a, a_prev, ts = at(alpha_bar, t), at(alpha_bar, t_prev), torch.full((len(x),), t)
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        m, v = net(x, ts, label).tensor_split([C], dim=1)
        if w > 0:
            m = (1 + w) * m - w * net(x, ts, none)[:, :C]
        eps = {"eps": m, "v": alpha * m + sigma * x, "x0": (x - alpha * m) / sigma}[prediction]
        gradient, z = classifier.gradient(x, t, y) if s else 0.0, noise(seeds, i, shape)
        if algorithm == 2:
            eps = eps - sigma * s * gradient
        guess = (x - sigma * eps) / alpha
        if clip:
            guess = guess.clamp(-1, 1)
            eps = (x - alpha * guess) / sigma
        beta, tilde = posterior(a, a_prev)
        if algorithm == 2:
            fresh = how["eta"] * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
            x = a_prev.sqrt() * guess + (1 - a_prev - fresh**2).sqrt() * eps + fresh * z
        else:
            last = t_prev < 0
            Sigma = beta * (not last) if how["variance"] == "large" else tilde
            if how["variance"] == "learned":
                least = posterior(*(at(alpha_bar, u) for u in pairs[-2]))[1] if last else tilde
                Sigma = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * least.log())
            mu = (x - beta / sigma * eps) / (a / a_prev).sqrt()  # DDPM eq. 11
            x = mu + s * Sigma * gradient + (not last) * Sigma.sqrt() * z
        yield x, guess


def of(algorithm, way=WAY, prediction="eps", variance="small", eta=0.0):
    """How guide.sample is asked for it; 1 is its default."""
    if algorithm == 2:
        return {"algorithm": 2, "make_row": partial(ddim.ddim_row, eta=eta, prediction=prediction)}
    row = partial(ddpm_pixel.ancestral_row, prediction=prediction, variance=variance)
    if variance == "learned":
        floor = improved_ddpm.make_chain(way[0], [t for t, _ in way[1]]).log_beta_tilde[0].item()
        row = partial(improved_ddpm.learned_row, prediction=prediction, floor=floor)
    return {"make_row": row}


clipping = pytest.mark.parametrize("clip", [False, True], ids=["free", "clip"])
KINDS = {f"variance {name}": (1, {"variance": name}) for name in ("small", "large", "learned")}
KINDS |= {f"eta {eta}": (2, {"eta": eta}) for eta in (0.0, 0.6)}
NETS = {"unconditional": (0, 0.0), "conditional": (3, 0.0), "both": (3, 1.5), "null": (3, -1.0)}


@clipping
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("null, w", NETS.values(), ids=NETS)
@pytest.mark.parametrize("algorithm, kind", KINDS.values(), ids=KINDS)
def test_walks_are_the_algorithms(algorithm, kind, null, w, prediction, clip, double):
    """With classifier-free guidance, too: the push is added once, to (1+w) out - w out_uncond."""
    learned = kind.get("variance", "learned") == "learned"
    args, s, how = (Wavy(null, learned), Curved()), 3.4 / algorithm, {"w": w, "clip": clip}
    ours = walk(*args, *WAY, LABELS, scale=s, **how, **of(algorithm, WAY, prediction, **kind))
    theirs = literal(algorithm, *args, WAY, LABELS, s, prediction=prediction, **how, **kind)
    close(ours, theirs)
    assert clip == (max(guess.abs().max() for _, guess in ours) == 1)
    # A fixed Sigma is 0 at the last step, and algorithm 2 has moved x0_hat.
    assert ((ours[-1][0] - ours[-1][1]).abs().max() > 1e-5) == (algorithm == 1 and learned)


@pytest.mark.parametrize("null, w", NETS.values(), ids=NETS)
def test_what_the_networks_are_asked(null, w, double):
    net, classifier = Wavy(null), Curved()
    steps = walk(net, classifier, *WAY, LABELS, w=w)
    y = {0: None, 3: [0, 2, 1]}[null] if w == 0 else {-1: [3, 3, 3], 1.5: [0, 2, 1, 3, 3, 3]}[w]
    assert net.asked == [([t] * (6 if w == 1.5 else 3), y) for t, _ in PAIRS]
    assert [t for _, t in classifier.asked] == [[t] * 3 for t, _ in PAIRS]
    seen = [noise(WAY[-1], -1), *(x for x, _ in steps[:-1])]  # x_t, never x_{t-1}
    assert all(torch.equal(x, x_t) for (x, _), x_t in zip(classifier.asked, seen, strict=True))


def test_a_learned_variance_that_has_no_choice():
    """The only step of a walk has log beta at both ends, and S = 0; Sigma is beta all the same."""
    row, out = improved_ddpm.learned_row(0.3, 1.0), torch.zeros(2, 4, 3, 3)
    assert row.log_var_min == row.log_var_max and row.S == 0
    assert guide.step_sigma(row, out) == pytest.approx(0.7, rel=1e-6)
    row = Row(*row[:4], S=1.0, log_var_min=-2.0, log_var_max=-2.0)
    assert guide.step_sigma(row, out) == pytest.approx(math.exp(-2), rel=1e-6)


def test_algorithm_2_keeps_a_learned_variance():
    out, push = noise(WAY[-1], 0, (4, 3, 3)), noise(WAY[-1], 1, (2, 3, 3))
    moved = guide.less_noise(ddim.ddim_row(0.3, 0.5), out, 0.3, push)
    torch.testing.assert_close(moved, torch.cat([out[:, :2] - 0.7**0.5 * push, out[:, 2:]], dim=1))


@clipping
@pytest.mark.parametrize("null, w", NETS.values(), ids=NETS)
def test_scale_0_is_the_chapter_before_bit_for_bit(null, w, clip):
    """Without a classifier, to be sure that none is asked."""
    learned, y = of(1, variance="learned", prediction="v"), LABELS if null else None
    for how, plain in (
        (learned, partial(ddpm_pixel.sample, make_row=learned["make_row"])),
        ({}, ddpm_pixel.sample),
        (of(2, prediction="v", eta=0.6), partial(ddim.sample, prediction="v", eta=0.6)),
        (of(2), ddim.sample),
    ):
        net = Wavy(null, learned=True)
        ours = guide.sample(net, None, *WAY, LABELS, scale=0.0, w=w, clip=clip, **how)
        close(ours, plain(net, *WAY, y, w, clip=clip), 0)


@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("how", [of(1, variance="learned"), of(2, eta=0.6)], ids=["1", "2"])
def test_sample_17_does_not_depend_on_its_batch(how, w, double):
    seeds = torch.arange(20)

    def end(part, batch=0):
        args = Wavy(learned=True), Curved(), *WAY[:3], seeds[part], seeds[part] % 3
        *_, (x, _) = walk(*args, scale=2.0, w=w, batch=batch, **how)
        assert max(len(t) for _, t in args[1].asked) == (batch or len(x))
        return x

    many, alone, parts = end(slice(20)), end(slice(17, 18)), end(slice(20), batch=6)
    torch.testing.assert_close(many[17:18], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(many, parts, atol=1e-12, rtol=0)
    assert (many[1:] - many[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1


# ---------------------------------------------------------------------------------- the gradient


def images(count=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, *SHAPE, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (count,), generator=g)


def test_the_gradient_is_that_of_the_formula_and_of_autograd():
    (x, y), classifier = images(), Curved()
    found = guide.log_prob_gradient(classifier, x, 31, y)
    torch.testing.assert_close(found, classifier.gradient(x, 31, y), atol=1e-13, rtol=0)
    leaf = x.clone().requires_grad_()
    p = classifier(leaf, torch.full((5,), 31)).softmax(dim=1)
    (expected,) = torch.autograd.grad(sum(p[i, y[i]].log() for i in range(5)), leaf)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


def test_a_sure_classifier_has_a_finite_gradient():
    """Where p(y | x_t) is 0 in float32, the gradient of its logarithm is not."""
    (x, y), classifier = images(dtype=torch.float32), Curved(strength=1e4)
    found = guide.log_prob_gradient(classifier.float(), x, 31, y)
    expected = classifier.double().gradient(x.double(), 31, y)
    assert found.dtype == torch.float32 and expected.abs().max() > 100
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)


def test_autocast_does_not_reach_gradient_and_push():
    (x, y), classifier = images(dtype=torch.float32), Curved().float()
    expected = guide.log_prob_gradient(classifier, x, 31, y)
    args = Wavy(), classifier, *WAY, LABELS
    steps = list(guide.sample(*args))
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(x, torch.full((5,), 31)).dtype == torch.bfloat16
        found = guide.log_prob_gradient(classifier, x, 31, y)
        close(guide.sample(*args), steps, 0)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("batch, parts", [(1, [1] * 7), (3, [3, 3, 1]), (100, [7]), (0, [7])])
def test_in_parts_it_is_the_same(batch, parts):
    (x, y), classifier = images(7), Curved()
    found = guide.log_prob_gradient(classifier, x, 31, y, batch)
    assert [len(seen) for seen, _ in classifier.asked] == parts
    torch.testing.assert_close(found, classifier.gradient(x, 31, y), atol=1e-13, rtol=0)


@pytest.mark.parametrize("learns", [True, False])
def test_it_leaves_nothing_behind(learns):
    (x, y), classifier = images(), Curved().requires_grad_(learns)
    kept, expected = x.clone(), guide.log_prob_gradient(classifier, x, 31, y)
    with torch.no_grad():
        found = guide.log_prob_gradient(classifier, x, 31, y)
    assert torch.equal(found, expected) and torch.equal(x, kept)
    assert not x.requires_grad and x.grad is None and not found.requires_grad
    for parameter in classifier.parameters():
        assert parameter.grad is None and parameter.requires_grad == learns
        parameter.grad = torch.ones_like(parameter)  # as in the middle of a training
    guide.log_prob_gradient(classifier, x, 31, y)
    assert all((parameter.grad == 1).all() for parameter in classifier.parameters())


# ------------------------------------------------------------------------------ Gaussian classes

SMALL = (2, 1, 2)  # four numbers, so that whole covariances fit
PRIOR = torch.tensor([0.5, 0.3, 0.2]).double()
MU = torch.tensor([[0.5, -0.3, 0.2, 0.1], [-0.4, 0.2, 0.3, -0.2], [0.1, 0.5, -0.5, 0.3]]).double()
SPREAD = torch.tensor([[0.5, 0.3, 0.4, 0.3], [0.3, 0.5, 0.35, 0.4], [0.4, 0.25, 0.3, 0.6]]).double()
AXES = torch.linalg.qr(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3)).double())[0]
COV = AXES @ torch.diag_embed(SPREAD**2) @ AXES.mT  # (3,4,4)


class Classes:
    """x0 of class k is N(MU_k, COV_k), a mixture by PRIOR: x_t | k is N(sqrt(a) MU_k, V_k),
    V_k = a COV_k + (1 - a) I, whose score is -V_k^-1 (x - sqrt(a) MU_k). As a network it is the
    best one, told: of each class alone, else of the mixture. `logits` is the true classifier.
    """

    def __init__(self, alpha_bar, learned=False, told=False):
        self.alpha_bar, self.learned, self.null = alpha_bar, learned, 3 * told

    def laws(self, t):
        a = self.alpha_bar[t[0]]
        return a.sqrt() * MU, a * COV + (1 - a) * torch.eye(4)

    def scores(self, x, t):
        """Of each class, (B,3,4)."""
        mean, V = self.laws(t)
        return -torch.linalg.solve(V, (x.flatten(1)[:, None] - mean)[..., None])[..., 0]

    def logits(self, x, t):
        """log p(x_t, k), (B,3)."""
        law = torch.distributions.MultivariateNormal(*self.laws(t), validate_args=False)
        return law.log_prob(x.flatten(1)[:, None]) + PRIOR.log()

    def score(self, x, t, y=None):
        """Of the mixture, or of class y, (B,4)."""
        p = self.logits(x, t).softmax(1) if y is None else one_hot(y, 3)  # (B,3)
        return (p[..., None] * self.scores(x, t)).sum(1)

    def __call__(self, x, t, y=None):
        assert (y is None) == (self.null == 0)
        eps = -(1 - self.alpha_bar[t[0]]).sqrt() * self.score(x, t, y).view_as(x)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1) if self.learned else eps  # v = 0


def even_log_snr(steps, first=6.0, last=-8.0):
    """alpha_bar float64 (steps,)."""
    return torch.sigmoid(2 * torch.linspace(first, last, steps, dtype=torch.float64))


def guided_by_classes(way, y, **how):
    """The walk of the mixture's network with the true classifier's gradient."""
    classes = Classes(way[0], how.pop("learned", False))
    return walk(classes, classes.logits, *way, y, clip=False, **how)


def test_the_gradient_of_gaussian_classes():
    x, y, t = noise(torch.arange(60), 0, SMALL), torch.arange(60) % 3, torch.full((60,), 20)
    classes = Classes(even_log_snr(41, 3, -3))
    found = guide.log_prob_gradient(classes.logits, x, 20, y)
    expected = (classes.score(x, t, y) - classes.score(x, t)).view_as(x)  # Bayes
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [4, 30])
def test_algorithm_2_is_the_asked_class_alone(steps, eta, double):
    """Each guided step is the affine one of the class's own Gaussian, far from its limit, too."""
    y = torch.arange(30) % 3
    way = even_log_snr(200, 4, -4), ddim.subsequence(200, steps), SMALL, torch.arange(30)
    ours = guided_by_classes(way, y, **of(2, eta=eta))
    theirs = literal(2, Classes(way[0], told=True), None, way, y, 0.0, eta=eta)
    torch.testing.assert_close([x for x, _ in ours], [x for x, _ in theirs], atol=1e-10, rtol=0)


def halves(errors, tolerance=0.04):
    """Twice the steps, half the error."""
    return all(abs(b / a - 0.5) < tolerance for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("k", [0, 2])
def test_moments_of_algorithm_2_converge_to_the_class(k, double):
    """Without sampling error: the walk is x_0 = M x_T + c, so x_0 ~ N(c, M M^T) for normal x_T."""
    errors, seeds = [], torch.arange(9)
    start = torch.cat([noise(seeds, -1, SMALL).flatten(1), torch.ones(9, 1)], dim=1)  # (9,5)
    for steps in (50, 100, 200):
        way = even_log_snr(steps), ddim.subsequence(steps, steps), SMALL, seeds
        end = guided_by_classes(way, torch.full((9,), k), **of(2))[-1][0].flatten(1)
        affine = torch.linalg.lstsq(start, end).solution  # (5,4)
        torch.testing.assert_close(start @ affine, end, atol=1e-10, rtol=0)
        errors.append((affine[:4].T @ affine[:4] - COV[k]).norm().item())
        assert (affine[4] - MU[k]).norm() < 1e-3  # nothing is wrong with it but alpha_bar_T > 0
    assert halves(errors) and errors[-1] < 0.04 * COV[k].norm(), errors


def own_law(k, alpha_bar, pairs, variance):
    """Mean and covariance of the ancestral walk of class k alone; learned: v = 0."""
    mean, cov, eye = torch.zeros(4).double(), torch.eye(4).double(), torch.eye(4).double()
    for t, t_prev in pairs:
        a, a_prev = at(alpha_bar, t), at(alpha_bar, t_prev)
        beta, tilde = posterior(a, a_prev)
        gain = beta / (a / a_prev).sqrt() * torch.linalg.inv(a * COV[k] + (1 - a) * eye)
        M = eye / (a / a_prev).sqrt() - gain
        mean = M @ mean + gain @ (a.sqrt() * MU[k])
        Sigma = {"small": tilde, "large": beta, "learned": (beta * tilde).sqrt()}[variance]
        cov = M @ cov @ M.T + Sigma * eye * (t_prev >= 0)
    return mean, cov


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_moments_of_algorithm_1_converge_to_the_class(variance, double):
    """Guided walks and those of the class alone have the same noise, so their difference in mean
    and covariance has little sampling error; the law of the latter is known.
    """
    seeds, y, apart, of_mean, of_cov = torch.arange(1000), torch.full((1000,), 1), [], [], []
    for steps in (75, 150):
        way = even_log_snr(steps), ddim.subsequence(steps, steps), SMALL, seeds
        learned, how = variance == "learned", of(1, way, variance=variance)
        ours = guided_by_classes(way, y, learned=learned, **how)[-1][0].flatten(1)
        net = Classes(way[0], learned, told=True)
        *_, (alone, _) = literal(1, net, None, way, y, 0.0, variance=variance)
        alone, (mean, cov) = alone.flatten(1), own_law(1, *way[:2], variance)
        apart.append((ours - alone).norm(dim=1).mean().item())
        of_mean.append((mean + ours.mean(0) - alone.mean(0) - MU[1]).norm().item())
        of_cov.append((cov + ours.T.cov() - alone.T.cov() - COV[1]).norm().item())
    assert all(halves(errors, 0.08) for errors in (apart, of_mean, of_cov)), (of_mean, of_cov)


@pytest.mark.parametrize("s", [1.0, 2.5])
def test_algorithm_2_converges_to_the_ode_of_the_guided_score(s, double):
    """dx / d log alpha_bar = (x + score + s grad) / 2, up to the last step, which denoises."""
    seeds, chain, errors = torch.arange(3), even_log_snr(481, 3, -3), []

    def slope(log_a, flat):
        classes = Classes(torch.tensor([math.exp(log_a)], dtype=torch.float64))
        x, t = torch.from_numpy(flat).view(3, 4), torch.zeros(3, dtype=torch.int64)
        of_class, score = classes.score(x, t, seeds), classes.score(x, t)
        return ((x + score + s * (of_class - score)) / 2).flatten().numpy()

    start, span = noise(seeds, -1, SMALL).flatten().numpy(), chain[[-1, 0]].log().tolist()
    exact = solve_ivp(slope, span, start, "DOP853", rtol=1e-7, atol=1e-8).y[:, -1]
    for steps in (61, 121, 241):
        way = chain, ddim.subsequence(481, steps), SMALL, seeds
        end = guided_by_classes(way, seeds, scale=s, **of(2))[-2][0].flatten()
        errors.append((end - torch.from_numpy(exact)).abs().max().item())
    assert halves(errors) and errors[-1] < 0.01, errors
