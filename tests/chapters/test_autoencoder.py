"""What autoencoders learn by: losses, codebook and adversary against formulas written out."""

from runtime.commandline import BadInput
from runtime.processes import World
from runtime.run import flips, indices, learning_rate

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_files import write_images

import autoencoder as ch
from image_data import datasets
from kernels import gaussian
from networks.autoencoders import build
from networks.perceptual import Discriminator
from networks.vq import Codebook

WORLD = World()
SIZES = {"patch": 2, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1}
SIZES |= {"z_channels": 3}  # 24x24 -> 6x6x3


def make(kind="kl", **changes):
    """(settings, autoencoder of gray images)."""
    torch.manual_seed(0)
    cfg = ch.Config(ae=kind, **SIZES | changes)
    return cfg, ch.make_autoencoder(cfg, (1, 24, 24))


def codebook(size=6, dim=3, seed=0):
    """A Codebook with codes drawn from N(0, 1)."""
    torch.manual_seed(seed)
    book = Codebook(size, dim)
    book.vectors.normal_()
    return book


def latents(seed, shape=(4, 3, 5, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors_of(z):
    """(B*h*w, C) float64, by numpy."""
    return np.moveaxis(z.double().numpy(), 1, -1).reshape(-1, z.shape[1])


def update(book, z, codes, seed, **options):
    ch.update_codebook(book, z, codes, WORLD, np.random.default_rng(seed), **options)


# ------------------------------------------------------------------------------------- the loss


def test_the_pull_is_the_kl_of_torch_distributions():
    torch.manual_seed(0)
    mean, log_var = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    q = torch.distributions.Normal(mean.double(), (0.5 * log_var.double()).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    ours = ch.kl_divergence(mean, log_var).double()
    torch.testing.assert_close(ours, kl.flatten(1).mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_loss_is_the_sum_of_its_terms(kind):
    cfg, ae = make(kind, codebook=20, commitment=0.7, kl_weight=0.3, perceptual_weight=2.0)
    x, noise = torch.randn(3, 1, 24, 24), torch.randn(3, 3, 6, 6)

    def distance(a, b):
        return (a - b).square().sum((1, 2, 3))

    terms, reconstruction, (x_hat, z, rest) = ch.loss_terms(cfg, ae, ae, x, noise, distance)
    mean, log_var = ae.encode(x)
    if kind == "kl":
        pull = 0.3 * ch.kl_divergence(mean, log_var)
        expected = ae.decode(mean + (0.5 * log_var).exp() * noise)
    else:
        pull = 0.7 * ch.commitment(mean, ae.codebook.lookup(ae.codes(x)))
        expected = ae.decode(mean)
    torch.testing.assert_close(x_hat, expected)
    error = (x - x_hat).abs().flatten(1).mean(1)
    torch.testing.assert_close(reconstruction, error + 2 * distance(x, x_hat))
    torch.testing.assert_close(terms["loss"], reconstruction + pull)
    torch.testing.assert_close(terms["l1"], error)


def test_by_default_training_is_the_plain_loop(tmp_path):
    """Adam on |x - x_hat| + kl_weight KL, step by step, to the last bit: nothing else came in."""
    photos = write_images(tmp_path / "photos", 32, height=24, width=24)
    where = {"data": str(photos), "data_root": str(tmp_path / "root"), "out": str(tmp_path / "run")}
    how = {"steps": 12, "lr": 1e-3, "warmup": 2, "batch_size": 8, "flip": True, "n": 8, "gpus": 0}
    torch.manual_seed(99)  # training must not depend on what was drawn before
    ch.train(ch.Config(**where, **how, **SIZES), WORLD)
    found = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"]

    ds = datasets.load(str(photos), str(tmp_path / "root"))
    torch.manual_seed(0)
    plain = build("kl", channels=1, **SIZES)
    optimizer = torch.optim.Adam(plain.parameters())
    for step in range(12):
        rng = np.random.default_rng([0, step, zlib.crc32(b"posterior")])
        noise = gaussian((8, 3, 6, 6), torch.from_numpy(rng.integers(2**62, size=8)), step, "cpu")
        x, _ = ds.batch(indices(32, 8, 0, step), flips(8, 0, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 12, 1e-3, 2)
        x_hat, mean, log_var = plain(x, noise)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))
        ((x - x_hat).abs().mean(dim=(1, 2, 3)) + 3e-3 * kl).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, found[name]), name


# ------------------------------------------------------------------------------------- the codebook


def test_commitment_is_the_mean_square_to_the_code_and_pulls_only_the_encoder():
    book, z = codebook(), latents(4).requires_grad_()
    codes = book.nearest(z)
    rows = vectors_of(z.detach())
    error = (rows - book.vectors.double().numpy()[codes.flatten()]) ** 2
    losses = ch.commitment(z, book.lookup(codes))
    np.testing.assert_allclose(losses.detach(), error.reshape(4, -1).mean(1), rtol=1e-6)
    losses.sum().backward()
    expected = 2 * (z.detach() - book.lookup(codes)) / z[0].numel()
    torch.testing.assert_close(z.grad, expected)
    assert not list(book.parameters())


def update_by_loops(state, rows, codes, decay, dead, seed):
    """VQ-VAE eq. 6-8 in float64, code by code; dead ones become rows drawn with `seed`."""
    counts, sums, _ = state
    size, n = len(counts), len(rows)
    picks = np.random.default_rng(seed).choice(n, size, replace=n < size)
    for k in range(size):
        mine = rows[codes == k]
        counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        sums[k] = decay * sums[k] + (1 - decay) * mine.sum(0)
        if seed[1] == 0 or counts[k] < dead * n / size:
            counts[k], sums[k] = n / size, rows[picks[k]] * n / size
    total = counts.sum()
    smoothed = (counts + 1e-5) / (total + size * 1e-5) * total
    return counts, sums, sums / smoothed[:, None]


def test_codes_are_running_means_of_what_chose_them():
    book = codebook(size=8)
    state = np.zeros(8), np.zeros((8, 3)), None
    revived = 0
    for step in range(12):
        z = latents(step) + 1
        codes = book.nearest(z)
        before = book.counts.clone()
        update(book, z, codes, [5, step], decay=0.7, dead=0.5)
        state = update_by_loops(state, vectors_of(z), codes.flatten().numpy(), 0.7, 0.5, [5, step])
        np.testing.assert_allclose(book.counts, state[0], rtol=1e-5)
        np.testing.assert_allclose(book.vectors, state[2], rtol=1e-4, atol=1e-6)
        revived += int((before > 0).all() and (book.counts == 5.0).any())
    assert 0 < revived < 11  # some codes die on the way, and at some steps none does


def test_the_first_update_makes_every_code_a_vector_of_the_batch():
    book, z = Codebook(16, 3), latents(6)
    update(book, z, book.nearest(z), [0, 0])
    rows = torch.from_numpy(vectors_of(z))
    distance = torch.cdist(book.vectors.double(), rows).min(1)
    assert distance.values.max() < 1e-5 and len(distance.indices.unique()) == 16


def test_a_batch_smaller_than_the_codebook_gives_codes_too():
    book, z = Codebook(50, 3), latents(7, (1, 3, 2, 2))
    update(book, z, book.nearest(z), [0, 0])
    rows = torch.from_numpy(vectors_of(z))
    assert torch.cdist(book.vectors.double(), rows).min(1).values.max() < 1e-5


def test_an_unused_code_lives_on_for_a_while_and_then_starts_anew():
    book, z = Codebook(2, 1), torch.ones(1, 1, 10, 1)
    update(book, z, book.nearest(z), [0, 0], decay=0.9, dead=0.1)
    book.vectors[1] = -50.0  # nothing is near it
    book.sums[1] = -50.0 * book.counts[1]
    lived = 0
    while book.vectors[1, 0] < -40:
        lived += 1
        update(book, z, book.nearest(z), [0, lived], decay=0.9, dead=0.1)
    assert lived == 22  # the first n with 0.9^n < 0.1
    assert book.vectors[1, 0].item() == pytest.approx(1)


def test_another_seed_revives_other_vectors():
    def vectors(seed):
        book, z = Codebook(8, 3), latents(8)
        update(book, z, torch.zeros(4, 5, 2, dtype=torch.long), seed)
        return book.vectors

    assert torch.equal(vectors([1, 2]), vectors([1, 2]))
    assert not torch.equal(vectors([1, 2]), vectors([1, 3]))


def test_restored_from_its_state_it_goes_on_as_before():
    book = codebook(8)
    for step in range(3):
        update(book, latents(step), book.nearest(latents(step)), [0, step])
    other = codebook(8, seed=1)
    other.load_state_dict(book.state_dict())
    for step in range(3, 6):
        for b in (book, other):
            update(b, latents(step), b.nearest(latents(step)), [0, step])
    for name, value in book.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_codes_find_the_clusters_of_what_they_see():
    centres, rng = torch.tensor([[-3.0, 0], [3, 0], [0, 3], [0, -3]]), np.random.default_rng(0)
    book = Codebook(16, 2)
    for step in range(60):
        rows = centres[rng.integers(4, size=64)] + 0.1 * latents(step, (64, 2))
        z = rows.t().reshape(1, 2, 8, 8)
        update(book, z, book.nearest(z), [0, step], decay=0.8)
    distance = torch.cdist(centres, book.vectors)  # (4,16)
    assert distance.min(1).values.max() < 0.1 and distance.min(0).values.max() < 0.4


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.25] * 4, [0.5, 0.25, 0.125, 0.125]])
def test_usage_and_perplexity(shares):
    book, n = Codebook(4, 3), 64
    chosen = torch.tensor(np.repeat(np.arange(len(shares)), (np.array(shares) * n).astype(int)))
    z = latents(9, (1, 3, 8, 8))
    for step in range(2):
        update(book, z, chosen.view(1, 8, 8), [0, step])
    found = ch.read_hits(book)
    assert found["usage"] == len(shares) / 4
    entropy = -sum(p * np.log(p) for p in shares)
    assert found["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-6)
    assert ch.read_hits(book) == {"usage": 0.0, "perplexity": 1.0}


# ------------------------------------------------------------------------------------ the adversary


def pair(shape, seed=0):
    """Two images in [-1,1], the second a blurred and noisy version of the first."""
    rng = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(shape, generator=rng) * 2 - 1, scale_factor=3.0)
    y = F.avg_pool2d(x, 3, 1, 1) + 0.1 * torch.randn(x.shape, generator=rng)
    return x, y.clamp(-1, 1)


def adversary(batch_size=8):
    torch.manual_seed(0)
    return ch.Adversary((1, 24, 24), 0.5, 8, batch_size, WORLD)


def test_its_term_pulls_the_last_layer_as_hard_as_the_reconstruction():
    """|grad of the term| = weight * |grad of the reconstruction| there: VQGAN eq. 7."""
    judge, last = adversary(), torch.nn.Conv2d(4, 1, 3, padding=1)
    h, x = torch.randn(3, 4, 24, 24), torch.randn(3, 1, 24, 24)
    x_hat = last(h)
    reconstruction = 7 * (x - x_hat).abs().mean((1, 2, 3))
    term = judge.generator_losses(x_hat, reconstruction, last.weight).mean()
    (wanted,) = torch.autograd.grad(reconstruction.mean(), last.weight, retain_graph=True)
    (found,) = torch.autograd.grad(term, last.weight, retain_graph=True)
    # 1e-6 beside a gradient of about 1e-2 in the denominator: four digits
    assert (found.norm() / wanted.norm()).item() == pytest.approx(0.5, rel=2e-3)
    score = judge.net(x_hat).mean()
    (up,) = torch.autograd.grad(score, last.weight)
    assert F.cosine_similarity(found.flatten(), -up.flatten(), dim=0) > 0.9999


def test_the_generators_term_leaves_the_discriminator_alone():
    judge, last = adversary(), torch.nn.Conv2d(4, 1, 3, padding=1)
    x_hat = last(torch.randn(3, 4, 24, 24))
    judge.generator_losses(x_hat, x_hat.abs().mean((1, 2, 3)), last.weight).mean().backward()
    assert last.weight.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in judge.net.parameters())


def test_it_learns_by_the_hinge_loss_to_tell_the_two_apart():
    judge, (x, y) = adversary(), pair((8, 1, 8, 8))
    with torch.no_grad():
        real, fake = judge.net(x), judge.net(y)
    expected = 0.5 * ((1 - real).clamp(min=0).mean((1, 2)) + (1 + fake).clamp(min=0).mean((1, 2)))
    y.requires_grad_()
    first = judge.learn(x, y)
    judge.step(1e-3)
    torch.testing.assert_close(first.detach(), expected, rtol=1e-4, atol=1e-5)
    for _ in range(30):
        last = judge.learn(x, y)
        judge.step(1e-3)
    assert last.mean() < 0.5 * first.mean() and y.grad is None
    with torch.no_grad():
        assert judge.net(x).mean() > judge.net(y).mean() + 0.5


def test_images_without_a_whole_patch_are_refused():
    with pytest.raises(BadInput, match="at least 24x24, not 16x32"):
        ch.Adversary((1, 16, 32), 0.5, 8, 8, WORLD)
    assert Discriminator(1, 4)(torch.zeros(1, 1, 24, 24)).shape == (1, 1, 1)
