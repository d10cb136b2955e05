"""Chapter 3: the autoencoder's loss, the latent cache, the U-Net, guidance, and its sampler."""

from runtime.commandline import BadInput
from runtime.processes import World

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference_metrics import import_references

import autoencoder
import ddpm_pixel
import ldm_cfg
from kernels import gaussian
from networks.autoencoders import latent_shape

CFG = ldm_cfg.Config(
    patch=2,
    ae_channels=16,
    ae_blocks=1,
    z_channels=2,
    model_channels=16,
    channel_mult=(1, 2),
    attention_resolutions=(2,),
    num_heads=2,
    batch_size=8,
    context_dim=8,
)
Z = (2, 4, 4)  # latents
WALK = replace(CFG, schedule="linear", prediction="eps", timesteps=50, sample_steps=3)
SAMPLERS = [("ddpm", 0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpmpp", 0)]


def make(cfg=CFG, shape=(1, 8, 8), seed=0):
    torch.manual_seed(seed)
    return ldm_cfg.make_autoencoder(cfg, shape).eval().requires_grad_(False)


def opened(cfg=CFG, z_shape=Z, classes=3, std=0.1):
    """The denoiser with its zero layers opened: they would hide what lies behind them."""
    torch.manual_seed(0)
    net = ldm_cfg.make_net(cfg, z_shape, classes).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def walk(net, cfg, seeds, y=None, shape=Z, **settings):
    """[(z, z0_hat)] of every step."""
    y = torch.zeros_like(seeds) if y is None else y
    return list(ldm_cfg.sample(net, replace(cfg, **settings), shape, seeds, y))


# ------------------------------------------------------------------------------ the autoencoder


@pytest.mark.parametrize("patch, mult, factor", [(4, (1,), 4), (2, (1, 2), 4), (2, (1, 2, 4), 8)])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 24)])
def test_autoencoder_shapes(patch, mult, factor, shape):
    cfg = replace(CFG, patch=patch, ae_mult=mult)
    ae, x = make(cfg, shape), torch.randn(2, *shape)
    mean, log_var = ae.encode(x)
    assert ae.factor == factor
    assert mean.shape == log_var.shape == (2, 2, shape[1] // factor, shape[2] // factor)
    assert ae.decode(mean).shape == x.shape
    assert latent_shape(ae, shape) == mean.shape[1:]


def test_autoencoder_refuses_sizes_it_cannot_fold():
    ae = ldm_cfg.make_autoencoder(replace(CFG, patch=4), (1, 30, 30))
    with pytest.raises(BadInput, match="30x30.*multiples of 4.*--size 32"):
        latent_shape(ae, (1, 30, 30))


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    kl = torch.distributions.kl_divergence(q, standard).flatten(1).mean(1)
    torch.testing.assert_close(ldm_cfg.kl_divergence(mean, log_var), kl)


def test_loss_is_absolute_error_and_the_kl_of_torch_distributions(monkeypatch):
    x, noise, seen = torch.randn(3, 1, 8, 8), torch.randn(3, 2, 4, 4), {}

    class Step:
        """A run of one step."""

        first = 0

        def __init__(self, cfg, world, ds, *, net, **rest):
            self.model = net

        def say(self, text):
            assert text == "autoencoder from step 0 of 1000"

        def steps(self):
            return [0]

        def parts(self, step):
            return [step]

        def images(self, part):
            return x, None

        def noise(self, part, shape, name):
            assert shape == noise.shape
            return noise

        def backward(self, losses, **terms):
            seen.update(terms, loss=losses)

        def descend(self):
            pass

    monkeypatch.setattr(ldm_cfg, "Run", Step)
    monkeypatch.setattr(autoencoder, "report", lambda *arguments: None)
    cfg, ds = replace(CFG, kl_weight=0.5), SimpleNamespace(shape=(1, 8, 8))
    ae = ldm_cfg.train_autoencoder(cfg, World(), ds)
    mean, log_var = ae.encode(x)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    z = mean + q.stddev * noise
    l1, kl = (x - ae.decode(z)).abs().flatten(1).mean(1), kl.flatten(1).mean(1)
    for name, expected in {"loss": l1 + 0.5 * kl, "l1": l1, "kl": kl}.items():
        torch.testing.assert_close(seen[name].detach(), expected, msg=name)


class Images:
    """A data set of ten gray images."""

    name, key, shape, class_names = "ten", "pixels", (1, 8, 8), ("a", "b", "c")
    num_classes, labels = 3, np.arange(10) % 3
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return 10

    def batch(self, rows, flip):
        flipped = torch.from_numpy(np.asarray(flip)).view(-1, 1, 1, 1)
        x = self.x[torch.from_numpy(rows)]
        return torch.where(flipped, x.flip(3), x), torch.from_numpy(self.labels[rows])


def test_a_latent_from_the_cache_is_that_of_its_image_encoded_now(tmp_path):
    ae, images = make(), Images()
    cfg = replace(CFG, out=str(tmp_path), flip=True)
    latents = ldm_cfg.encode(cfg, World(), images, ae)
    assert latents.z_shape == Z and len(latents) == 10 and latents.class_names == ("a", "b", "c")
    rows, flip = np.array([7, 0, 9]), np.array([True, False, True])
    noise = torch.randn(3, *Z)
    run = SimpleNamespace(
        ds=latents, images=lambda part: latents.batch(*part), noise=lambda *arguments: noise
    )
    z0, y = ldm_cfg.draw_latents(run, (rows, flip))
    x, labels = images.batch(rows, flip)
    mean, log_var = ae.encode(x)
    expected = latents.scale * (mean + (0.5 * log_var).exp() * noise)
    torch.testing.assert_close(z0, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, labels)
    # The scale makes the variance 1: that of means over images, and that of q(z|x).
    both = [ae.encode(images.batch(np.arange(10), np.full(10, f))[0]) for f in (False, True)]
    mean, log_var = (torch.cat(parts).double() for parts in zip(*both, strict=True))
    variance = mean.var(correction=0) + log_var.exp().mean()
    assert latents.scale**2 * variance.item() == pytest.approx(1, rel=1e-6)


# ------------------------------------------------------------------------------------ the U-Net


@pytest.mark.parametrize("model", ["unet", "sd", "sd-label"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 6), (1, 3)])
def test_denoiser_takes_any_latent_size_and_knows_no_label(model, size):
    net = opened(replace(CFG, model=model), (2, *size))
    z, t = torch.randn(2, 2, *size), torch.tensor([0, 999])
    assert net(z, t).shape == z.shape
    assert torch.equal(net(z, t), net(z, t, torch.tensor([3, 3])))
    assert not torch.equal(net(z, t), net(z, t, torch.tensor([0, 1])))


def test_the_u_net_starts_at_zero_and_its_attention_sees_the_other_side():
    torch.manual_seed(0)
    cfg = replace(CFG, channel_mult=(1,), attention_resolutions=(8,))
    net, z, t = ldm_cfg.make_net(cfg, (2, 8, 32), 3), torch.randn(1, 2, 8, 32), torch.tensor([500])
    assert not net(z, t).any()
    net, far = opened(cfg, (2, 8, 32)), z.clone()
    far[..., -1] += 1
    assert (net(far, t) - net(z, t))[..., 0].abs().max() > 1e-5


@pytest.mark.parametrize("heights", [(), (4,), (8, 4), (7,)])
def test_the_u_net_attends_at_the_heights_that_are_named_and_in_the_middle(heights):
    net = ldm_cfg.make_net(replace(CFG, attention_resolutions=heights), (2, 8, 8), 3)
    layers = [type(part) for layer in (*net.down, *net.up) for part in layer]
    each = layers.count(ddpm_pixel.SelfAttention) / 3  # one on the way down, two on the way up
    assert each == len({8, 4}.intersection(heights))
    assert [type(part) for part in net.middle].count(ddpm_pixel.SelfAttention) == 1


def test_computing_activations_twice_changes_no_gradient():
    z, t, y = torch.randn(3, *Z), torch.tensor([0, 10, 999]), torch.tensor([0, 2, 3])
    gradients = []
    for use_checkpoint in (False, True):
        net = opened(replace(CFG, use_checkpoint=use_checkpoint)).train()
        net(z, t, y).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -------------------------------------------------------------------------- schedule and loss


def test_scaled_linear_schedule_is_that_of_stable_diffusion():
    alpha_bar = ldm_cfg.alpha_bar_of(replace(CFG, schedule="scaled_linear"))
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    assert alpha_bar[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
    assert alpha_bar[-1].item() == pytest.approx(0.0047, abs=5e-5)  # published as 0.00466
    import_references()
    from diffusers import DDPMScheduler

    published = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = DDPMScheduler(**published).alphas_cumprod.double()
    torch.testing.assert_close(alpha_bar, theirs, rtol=2e-5, atol=0)  # a float32 product of 1000


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_other_schedules_are_chapter_1s(schedule):
    ours = ldm_cfg.alpha_bar_of(replace(CFG, schedule=schedule, timesteps=70))
    assert torch.equal(ours, ddpm_pixel.make_alpha_bar(schedule, 70))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_zero_for_the_true_target(prediction):
    alpha_bar = ldm_cfg.alpha_bar_of(replace(CFG, timesteps=100))
    z0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 20, 60, 99])
    a = alpha_bar[t].view(-1, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * z0

    def oracle(z_t, t, y):
        torch.testing.assert_close(z_t.double(), a.sqrt() * z0 + (1 - a).sqrt() * eps)
        return eps if prediction == "eps" else v

    loss = ldm_cfg.simple_loss(oracle, z0, t, eps, alpha_bar, None, prediction)
    assert loss.shape == (4,) and loss.max() < 1e-10


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_the_formula_in_numpy(prediction):
    alpha_bar = ldm_cfg.alpha_bar_of(replace(CFG, timesteps=100))
    z0, eps, out = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 20, 60, 99]), torch.tensor([0, 1, 2, 3])
    found = ldm_cfg.simple_loss(lambda z, t, y: out, z0, t, eps, alpha_bar, y, prediction)
    for i in range(4):
        a = alpha_bar[t[i]].item()
        noise, image = eps[i].double().numpy(), z0[i].double().numpy()
        v = np.sqrt(a) * noise - np.sqrt(1 - a) * image  # Salimans, Ho 2022, section 4
        wrong = {"eps": noise, "v": v}[prediction] - out[i].double().numpy()
        assert found[i].item() == pytest.approx(np.mean(wrong**2), rel=1e-5)


# ----------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("w, calls", [(0.0, [4] * 3), (1.0, [8] * 3), (-1.0, [4] * 3)])
def test_guidance_costs_one_forward_and_is_the_formula(w, calls):
    net, seen = opened(), []
    net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    y, seeds = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    steps = walk(net, WALK, seeds, y, guidance=w)
    assert seen == calls
    z = gaussian((4, 2, 4, 4), seeds, -1, "cpu")
    with torch.no_grad():
        t = torch.full((4,), 49)
        eps_hat = (1 + w) * net(z, t, y) - w * net(z, t)
    a = ldm_cfg.alpha_bar_of(WALK)[49]
    torch.testing.assert_close(
        steps[0][1], ((z - (1 - a).sqrt() * eps_hat) / a.sqrt()).float(), atol=2e-3, rtol=1e-3
    )


def test_guidance_only_within_its_interval():
    """t/T of the steps is 0.98, 0.48 and 0: only the middle one is guided."""
    net, seen = opened(), []
    net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    y, seeds = torch.tensor([0, 1]), torch.arange(2)
    walk(net, WALK, seeds, y, guidance=2.0, guidance_interval=(0.2, 0.8))
    assert seen == [2, 4, 2]


def test_data_without_classes_is_never_guided():
    net, seen = opened(classes=0), []
    net.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    walk(net, WALK, torch.arange(2), guidance=2.0)
    assert seen == [2, 2, 2]


def guided(out, none, w, rescale, channels):
    """What ldm_cfg.guided makes of a network's answers with and without labels."""

    def net(z, t, y):
        assert t.tolist() == [7] * 2 * len(out) and y.tolist() == [1] * len(out) + [3] * len(out)
        return torch.cat([out, none])

    net.null = 3
    z, y = torch.zeros(len(out), channels, *out.shape[2:]), torch.ones(len(out), dtype=torch.long)
    return ldm_cfg.guided(net, z, 7, y, w, rescale)


def test_rescaled_guidance_has_the_spread_of_the_conditional_estimate():
    torch.manual_seed(0)
    out, none = torch.randn(2, 3, 2, 5, 5)
    pair = guided(out, none, 3.0, 0.0, 2)
    assert torch.equal(pair[0], out) and torch.equal(pair[1], none)  # the kernel combines them
    plain = 4 * out - 3 * none
    full, half = (guided(out, none, 3.0, share, 2)[0] for share in (1.0, 0.5))
    torch.testing.assert_close(full.flatten(1).std(1), out.flatten(1).std(1))
    torch.testing.assert_close(half, (plain + full) / 2)
    cosine = torch.cosine_similarity(full.flatten(1), plain.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))  # only its length is another


def test_rescaling_is_lin_et_als_formula():
    """Equations 14 to 16 of arXiv:2305.08891 in numpy, with their scale 1 + w."""
    out, none = torch.randn(2, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = guided(out, none, 6.5, 0.7, 2)
    assert found[1] is None
    for i in range(3):
        positive, negative = out[i].double().numpy(), none[i].double().numpy()
        cfg = negative + 7.5 * (positive - negative)
        rescaled = cfg * positive.std() / cfg.std()
        expected = 0.7 * rescaled + 0.3 * cfg
        np.testing.assert_allclose(found[0][i].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_sampler_takes_the_rescaled_estimate():
    net, y, seeds = opened(), torch.arange(4) % 3, torch.arange(4)

    def first(**how):
        return walk(net, WALK, seeds, y, **how)[0][1]  # z0_hat

    z, t = gaussian((4, *Z), seeds, -1, "cpu"), torch.full((4,), 49)
    with torch.no_grad():
        plain, none = net(z, t, y), net(z, t)
        eps_hat = 7 * plain - 6 * none
        spread = [x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (plain, eps_hat)]
        eps_hat = 0.7 * eps_hat * spread[0] / spread[1] + 0.3 * eps_hat
    a = ldm_cfg.alpha_bar_of(WALK)[49]
    expected = ((z - (1 - a).sqrt() * eps_hat) / a.sqrt()).float()
    found = first(guidance=6.0, guidance_rescale=0.7)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(first(guidance=0.0, guidance_rescale=1.0), first(guidance=0.0))


def test_rescaling_leaves_a_learned_variance_to_the_conditional_estimate():
    torch.manual_seed(0)
    out, none = torch.randn(2, 3, 4, 5, 5)
    found, _ = guided(out, none, 3.0, 0.7, 2)
    mean_only, _ = guided(out[:, :2], none[:, :2], 3.0, 0.7, 2)
    assert torch.equal(found[:, :2], mean_only)
    assert torch.equal(found[:, 2:], out[:, 2:])


# ------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("kind, eta", SAMPLERS)
def test_rows_are_the_steps_of_chapters_1_and_2(kind, eta, prediction):
    """A step of each from given z0_hat and z, against DDPM eq. 7 and DDIM eq. 12 in numpy."""
    cfg = replace(WALK, sampler=kind, eta=eta, prediction=prediction, sample_steps=4)
    alpha_bar = ldm_cfg.alpha_bar_of(cfg)
    pairs = ddpm_pixel.timestep_pairs(50, 4)
    rows, z0, z, before = ldm_cfg.rows_of(cfg, alpha_bar, pairs), 0.7, -1.3, 0.5
    assert len(rows) == 4
    for i, ((t, t_prev), row) in enumerate(zip(pairs, rows, strict=True)):
        a, a_prev = alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        eps = (z - np.sqrt(a) * z0) / np.sqrt(1 - a)
        out = eps if prediction == "eps" else np.sqrt(a) * eps - np.sqrt(1 - a) * z0
        assert row.p * z - row.q * out == pytest.approx(z0)
        mean = row.A * z0 + row.B * z + row.H * before
        beta_tilde = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        if kind == "ddpm":
            expected = np.sqrt(a_prev) * (1 - a / a_prev) / (1 - a) * z0
            expected += np.sqrt(a / a_prev) * (1 - a_prev) / (1 - a) * z
            assert np.isclose(row.S, np.sqrt(beta_tilde), rtol=1e-9) and row.H == 0
        elif kind == "ddim":
            sigma = eta * np.sqrt(beta_tilde)  # eq. 16
            expected = np.sqrt(a_prev) * z0 + np.sqrt(1 - a_prev - sigma**2) * eps
            assert np.isclose(row.S, sigma, rtol=1e-9) and row.H == 0
        else:  # DPM-Solver++(2M): a line through z0_hat of this step and the one before
            lam = [0.5 * np.log(b / (1 - b)) if b < 1 else np.inf for b in (a, a_prev)]
            slope = 0.0
            if 0 < i < 3:
                a_before = alpha_bar[pairs[i - 1][0]].item()
                h_before = lam[0] - 0.5 * np.log(a_before / (1 - a_before))
                slope = 0.5 * (lam[1] - lam[0]) / h_before
            guess = (1 + slope) * z0 - slope * before
            expected = np.sqrt((1 - a_prev) / (1 - a)) * z
            expected += np.sqrt(a_prev) * (1 - np.exp(lam[0] - lam[1])) * guess
            assert row.S == 0
        assert mean == pytest.approx(expected, rel=1e-9)
    assert rows[-1].S == 0


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("kind, eta", [("ddpm", 0), ("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0)])
def test_sampler_with_the_true_score_gives_the_data(prediction, kind, eta):
    cfg = replace(CFG, timesteps=200, sample_steps=200, sampler=kind, eta=eta)
    alpha_bar, mean, s = ldm_cfg.alpha_bar_of(cfg), 1.5, 0.5

    def net(z, t, y):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (z - a.sqrt() * mean) / (a * s**2 + 1 - a)
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        return (eps if prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0).float()

    net.null = 0
    z, _ = walk(net, cfg, torch.arange(4000), shape=(1, 1, 1), prediction=prediction)[-1]
    assert z.mean().item() == pytest.approx(mean, abs=0.04)
    assert z.std().item() == pytest.approx(s, rel=0.06)


@pytest.mark.parametrize("kind, eta", [("ddpm", 0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp", 0)])
def test_a_sample_does_not_depend_on_its_batch(kind, eta):
    torch.manual_seed(0)
    net = ldm_cfg.make_net(CFG, Z, 3).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    seeds, y = torch.arange(20), torch.arange(20) % 3

    def last(rows):
        how = {"sampler": kind, "eta": eta, "guidance": 1.0}
        return walk(net, WALK, seeds[rows], y[rows], **how)[-1][0]

    many = last(slice(None))
    torch.testing.assert_close(last(slice(17, 18))[0], many[17], atol=1e-4, rtol=1e-4)
    assert (many[1:] - many[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
