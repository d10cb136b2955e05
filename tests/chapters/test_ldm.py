"""Chapter 3 in process: autoencoder, latent cache, denoiser, guidance."""

from runtime.commandline import BadInput

from dataclasses import replace

import pytest
import torch

import autoencoder
import ldm_cfg
import likelihood

CFG = ldm_cfg.Config(
    patch=2,
    ae_width=16,
    ae_blocks=1,
    z_channels=2,
    width=16,
    mult=(1, 2),
    heads=2,
    batch_size=8,
    context_width=8,
)
Z = (2, 4, 4)  # latents


def make(cfg=CFG, shape=(1, 8, 8), seed=0):
    torch.manual_seed(seed)
    ae = autoencoder.make_autoencoder(cfg, shape).eval()
    for p in ae.parameters():
        p.requires_grad_(False)
    return ae


@pytest.mark.parametrize("patch, mult, factor", [(4, (1,), 4), (2, (1, 2), 4), (2, (1, 2, 4), 8)])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 24)])
def test_autoencoder_shapes(patch, mult, factor, shape):
    cfg = replace(CFG, patch=patch, ae_mult=mult)
    ae, x = make(cfg, shape), torch.randn(2, *shape)
    mean, log_var = ae.encode(x)
    assert ae.factor == factor
    assert mean.shape == log_var.shape == (2, 2, shape[1] // factor, shape[2] // factor)
    assert ae.decode(mean).shape == x.shape


def test_autoencoder_refuses_sizes_it_cannot_fold():
    with pytest.raises(BadInput, match="30x30.*multiples of 4.*--size 32"):
        autoencoder.make_autoencoder(replace(CFG, patch=4), (1, 30, 30))


def test_loss_is_absolute_error_and_the_kl_of_torch_distributions():
    ae, x = make(), torch.randn(3, 1, 8, 8)
    noise = torch.randn(3, 2, 4, 4)
    mean, log_var = ae.encode(x)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    z = mean + q.stddev * noise
    expected = (x - ae.decode(z)).abs().flatten(1).mean(1) + 0.5 * kl.flatten(1).mean(1)
    terms, _, _ = autoencoder.loss_terms(replace(CFG, kl_weight=0.5), ae, ae, x, noise, None)
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize(
    "model, size",
    [("unet", (8, 8)), ("unet", (7, 7)), ("unet", (5, 6)), ("unet", (1, 3)), ("tiny", (4, 6))],
)
def test_denoiser_takes_any_latent_size_and_knows_no_label(model, size, monkeypatch):
    small = dict(width=16, depth=2, heads=2, patch=2)
    monkeypatch.setattr(ldm_cfg, "parse_size", {"tiny": small}.get)
    torch.manual_seed(0)
    net = ldm_cfg.make_net(replace(CFG, model=model), (2, *size), 3)
    for p in net.parameters():  # open the layers that start at zero
        torch.nn.init.normal_(p, std=0.1)
    z, t = torch.randn(2, 2, *size), torch.tensor([0, 999])
    assert net(z, t).shape == z.shape
    assert torch.equal(net(z, t), net(z, t, torch.tensor([3, 3])))
    assert not torch.equal(net(z, t), net(z, t, torch.tensor([0, 1])))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_zero_for_the_true_target(prediction):
    alpha_bar = ldm_cfg.make_alpha_bar("cosine", 100)
    z0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 20, 60, 99])
    a = alpha_bar[t].view(-1, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * z0

    def oracle(z_t, t, y):
        torch.testing.assert_close(z_t.double(), a.sqrt() * z0 + (1 - a).sqrt() * eps)
        return eps if prediction == "eps" else v

    loss = ldm_cfg.simple_loss(oracle, z0, None, t, eps, alpha_bar, prediction)
    assert loss.shape == (4,) and loss.max() < 1e-10


def test_a_learned_variance_is_weighed_by_a_thousandth_of_the_bound():
    alpha_bar = ldm_cfg.make_alpha_bar("linear", 100)
    chain = likelihood.make_chain(alpha_bar)
    z0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 20, 60, 99])
    out = torch.randn(4, 4, 3, 3, requires_grad=True)
    a = alpha_bar[t].view(-1, 1, 1, 1)

    def loss(prediction, chain):
        return ldm_cfg.simple_loss(lambda *_: out, z0, None, t, eps, alpha_bar, prediction, chain)

    for prediction in ("eps", "v"):
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
        bound = 100 * likelihood.vlb_terms(
            out,
            z0,
            z_t,
            t,
            chain,
            prediction=prediction,
            variance="learned",
            clip=False,
            discrete=False,
        )
        expected = loss(prediction, None) + 0.001 * bound.float()
        torch.testing.assert_close(loss(prediction, chain), expected, rtol=1e-4, atol=1e-5)
        (plain,) = torch.autograd.grad(loss(prediction, None).sum(), out)
        (both,) = torch.autograd.grad(loss(prediction, chain).sum(), out)
        torch.testing.assert_close(both[:, :2], plain[:, :2])  # the mean is left to L_simple
        assert not plain[:, 2:].any() and (both[:, 2:] != 0).all()


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_ancestral_steps_have_the_variance_that_the_network_tells(v):
    """One step from given noise: the spread over seeds is between beta_tilde and beta."""
    alpha_bar, t, t_prev = ldm_cfg.make_alpha_bar("linear", 100), 60, 40
    a, before = alpha_bar[t], alpha_bar[t_prev]
    beta = 1 - a / before
    small = beta * (1 - before) / (1 - a)
    std = (0.5 * ((v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log())).exp().item()

    def net(z, t, y):
        return torch.cat([z / (1 - a).sqrt().item(), torch.full_like(z, v)], 1)  # z0_hat 0

    net.null, seeds = 0, torch.arange(20000)
    walk = ldm_cfg.sampler(
        net,
        alpha_bar,
        [(t, t_prev), (t_prev, -1)],
        (1, 1, 1),
        seeds,
        0 * seeds,
        kind="ddpm",
        variance="learned",
        guidance=2.0,
    )
    z = next(walk)[1] - (a / before).sqrt() * (1 - before) / (1 - a) * ldm_cfg.gaussian(
        (20000, 1, 1, 1), seeds, -1, "cpu"
    )
    assert z.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("kind, eta", [("ddpm", 0), ("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0)])
def test_sampler_with_the_true_score_gives_the_data(prediction, kind, eta):
    alpha_bar, mean, s = ldm_cfg.make_alpha_bar("cosine", 200), 1.5, 0.5

    def net(z, t, y):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (z - a.sqrt() * mean) / (a * s**2 + 1 - a)
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        return (eps if prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0).float()

    net.null = 0
    pairs = list(zip(range(199, -1, -1), range(198, -2, -1), strict=True))
    for _, z, _ in ldm_cfg.sampler(  # noqa: B007
        net,
        alpha_bar,
        pairs,
        (1, 1, 1),
        torch.arange(4000),
        torch.zeros(4000, dtype=torch.long),
        kind=kind,
        eta=eta,
        prediction=prediction,
    ):
        pass
    assert z.mean().item() == pytest.approx(mean, abs=0.04)
    assert z.std().item() == pytest.approx(s, rel=0.06)


@pytest.mark.parametrize("w, calls", [(0.0, [4] * 3), (1.0, [8] * 3), (-1.0, [4] * 3)])
def test_guidance_costs_one_forward_and_is_the_formula(w, calls):
    torch.manual_seed(0)
    net, seen = ldm_cfg.make_net(CFG, Z, 3).eval(), []
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    alpha_bar, pairs = ldm_cfg.make_alpha_bar("linear", 50), [(49, 25), (25, 5), (5, -1)]
    y, seeds = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    steps = list(ldm_cfg.sampler(net, alpha_bar, pairs, Z, seeds, y, guidance=w))
    assert seen == calls
    z = ldm_cfg.gaussian((4, 2, 4, 4), seeds, -1, "cpu")
    with torch.no_grad():
        t = torch.full((4,), 49)
        eps_hat = (1 + w) * net(z, t, y) - w * net(z, t)
    a = alpha_bar[49]
    torch.testing.assert_close(
        steps[0][2], ((z - (1 - a).sqrt() * eps_hat) / a.sqrt()).float(), atol=2e-3, rtol=1e-3
    )


def test_scaled_linear_schedule_is_that_of_stable_diffusion():
    alpha_bar = ldm_cfg.make_alpha_bar("scaled_linear", 1000)
    assert alpha_bar[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
    assert alpha_bar[-1].item() == pytest.approx(0.0047, abs=5e-5)  # published as 0.00466


def test_guidance_only_within_its_interval():
    """t/T of the steps is 0.98, 0.5 and 0.1: only the middle one is guided."""
    torch.manual_seed(0)
    net, seen = ldm_cfg.make_net(CFG, Z, 3).eval(), []
    net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    alpha_bar, pairs = ldm_cfg.make_alpha_bar("linear", 50), [(49, 25), (25, 5), (5, -1)]
    y, seeds = torch.tensor([0, 1]), torch.arange(2)
    list(ldm_cfg.sampler(net, alpha_bar, pairs, Z, seeds, y, guidance=2.0, interval=(0.2, 0.8)))
    assert seen == [2, 4, 2]


def test_rescaled_guidance_has_the_spread_of_the_conditional_estimate():
    torch.manual_seed(0)
    out, none = torch.randn(2, 3, 2, 5, 5)
    plain = ldm_cfg.rescaled(out, none, 3.0, 0.0, 2)
    torch.testing.assert_close(plain, 4 * out - 3 * none)
    full, half = (ldm_cfg.rescaled(out, none, 3.0, share, 2) for share in (1.0, 0.5))
    torch.testing.assert_close(full.flatten(1).std(1), out.flatten(1).std(1))
    torch.testing.assert_close(half, (plain + full) / 2)
    cosine = torch.cosine_similarity(full.flatten(1), plain.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))  # only its length is another


def test_the_sampler_takes_the_rescaled_estimate():
    torch.manual_seed(0)
    net = ldm_cfg.make_net(CFG, Z, 3).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    alpha_bar, pairs = ldm_cfg.make_alpha_bar("cosine", 50), [(40, 25), (25, 5), (5, -1)]
    y, seeds = torch.arange(4) % 3, torch.arange(4)

    def first(**how):
        return next(ldm_cfg.sampler(net, alpha_bar, pairs, Z, seeds, y, **how))[2]  # z0_hat

    z, t = ldm_cfg.gaussian((4, *Z), seeds, -1, "cpu"), torch.full((4,), 40)
    with torch.no_grad():
        eps_hat = ldm_cfg.rescaled(net(z, t, y), net(z, t), 6.0, 0.7, 2)
    a = alpha_bar[40]
    expected = ((z - (1 - a).sqrt() * eps_hat) / a.sqrt()).float()
    torch.testing.assert_close(first(guidance=6.0, rescale=0.7), expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(first(guidance=0.0, rescale=1.0), first(guidance=0.0))


def test_rescaling_leaves_a_learned_variance_to_the_conditional_estimate():
    torch.manual_seed(0)
    out, none = torch.randn(2, 3, 4, 5, 5)
    found = ldm_cfg.rescaled(out, none, 3.0, 0.7, 2)
    assert torch.equal(found[:, :2], ldm_cfg.rescaled(out[:, :2], none[:, :2], 3.0, 0.7, 2))
    assert torch.equal(found[:, 2:], out[:, 2:])


@pytest.mark.parametrize("kind, eta", [("ddpm", 0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp", 0)])
def test_a_sample_does_not_depend_on_its_batch(kind, eta):
    torch.manual_seed(0)
    net = ldm_cfg.make_net(CFG, Z, 3).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    alpha_bar, pairs = ldm_cfg.make_alpha_bar("linear", 50), [(49, 25), (25, 5), (5, -1)]
    seeds, y = torch.arange(20), torch.arange(20) % 3

    def last(rows):
        *_, (_, z, _) = ldm_cfg.sampler(
            net, alpha_bar, pairs, Z, seeds[rows], y[rows], kind=kind, eta=eta, guidance=1.0
        )
        return z

    many = last(slice(None))
    torch.testing.assert_close(last(slice(17, 18))[0], many[17], atol=1e-4, rtol=1e-4)
    assert (many[1:] - many[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
