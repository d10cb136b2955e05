"""The codebook against plain loops in float64, and the autoencoder around it."""

from runtime.processes import World

import numpy as np
import pytest
import torch

from autoencoder import Autoencoder
from networks import vq
from networks.vq import Codebook, VQAutoencoder

WORLD = World()


def codebook(size=6, dim=3, seed=0, **options):
    """A Codebook with codes drawn from N(0, 1)."""
    torch.manual_seed(seed)
    book = Codebook(size, dim, **options)
    book.vectors.normal_()
    return book


def latents(seed, shape=(4, 3, 5, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors_of(z):
    """(B*h*w, C) float64, by numpy."""
    return np.moveaxis(z.double().numpy(), 1, -1).reshape(-1, z.shape[1])


def nearest_by_loops(rows, codes):
    return np.array([np.argmin([np.sum((r - c) ** 2) for c in codes]) for r in rows])


@pytest.mark.parametrize("chunk", [4096, 7])
def test_the_code_is_the_nearest_one(chunk, monkeypatch):
    monkeypatch.setattr(vq, "CHUNK", chunk)
    book, z = codebook(40), latents(1)
    expected = nearest_by_loops(vectors_of(z), book.vectors.double().numpy())
    assert np.array_equal(book.nearest(z).numpy(), expected.reshape(4, 5, 2))
    assert torch.equal(
        book.nearest(z.contiguous(memory_format=torch.channels_last)), book.nearest(z)
    )


def test_nearness_is_measured_in_float32_under_autocast():
    """In bfloat16, of eight bits, every other one of these codes would be its neighbour."""
    book = Codebook(256, 1)
    book.vectors.copy_(1 + torch.arange(256)[:, None] / 256)
    z = book.vectors.clone().view(256, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = book.nearest(z)
    assert torch.equal(codes.flatten(), torch.arange(256))


def test_gradient_goes_straight_through():
    book, z = codebook(), latents(2).requires_grad_()
    weight = latents(3)
    z_q, codes = book(z)
    torch.testing.assert_close(z_q, book.lookup(codes), atol=1e-6, rtol=1e-6)
    (z_q.square() * weight).sum().backward()
    torch.testing.assert_close(z.grad, 2 * weight * z_q.detach())  # the gradient at z_q


def test_commitment_is_the_mean_square_to_the_code_and_pulls_only_the_encoder():
    book, z = codebook(), latents(4).requires_grad_()
    codes = book.nearest(z)
    rows = vectors_of(z.detach())
    error = (rows - book.vectors.double().numpy()[codes.flatten()]) ** 2
    losses = book.commitment(z, codes)
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
    book = codebook(size=8, decay=0.7, dead=0.5)
    state = np.zeros(8), np.zeros((8, 3)), None
    revived = 0
    for step in range(12):
        z = latents(step) + 1
        codes = book.nearest(z)
        before = book.counts.clone()
        book.update(z, codes, WORLD, [5, step])
        state = update_by_loops(state, vectors_of(z), codes.flatten().numpy(), 0.7, 0.5, [5, step])
        np.testing.assert_allclose(book.counts, state[0], rtol=1e-5)
        np.testing.assert_allclose(book.vectors, state[2], rtol=1e-4, atol=1e-6)
        revived += int((before > 0).all() and (book.counts == 5.0).any())
    assert 0 < revived < 11  # some codes die on the way, and at some steps none does


def test_the_first_update_makes_every_code_a_vector_of_the_batch():
    book, z = Codebook(16, 3), latents(6)
    book.update(z, book.nearest(z), WORLD, [0, 0])
    rows = torch.from_numpy(vectors_of(z))
    distance = torch.cdist(book.vectors.double(), rows).min(1)
    assert distance.values.max() < 1e-5 and len(distance.indices.unique()) == 16


def test_a_batch_smaller_than_the_codebook_gives_codes_too():
    book, z = Codebook(50, 3), latents(7, (1, 3, 2, 2))
    book.update(z, book.nearest(z), WORLD, [0, 0])
    rows = torch.from_numpy(vectors_of(z))
    assert torch.cdist(book.vectors.double(), rows).min(1).values.max() < 1e-5


def test_an_unused_code_lives_on_for_a_while_and_then_starts_anew():
    book, z = Codebook(2, 1, decay=0.9, dead=0.1), torch.ones(1, 1, 10, 1)
    book.update(z, book.nearest(z), WORLD, [0, 0])
    book.vectors[1] = -50.0  # nothing is near it
    book.sums[1] = -50.0 * book.counts[1]
    lived = 0
    while book.vectors[1, 0] < -40:
        lived += 1
        book.update(z, book.nearest(z), WORLD, [0, lived])
    assert lived == 22  # the first n with 0.9^n < 0.1
    assert book.vectors[1, 0].item() == pytest.approx(1)


def test_another_seed_revives_other_vectors():
    def vectors(seed):
        book, z = Codebook(8, 3), latents(8)
        book.update(z, torch.zeros(4, 5, 2, dtype=torch.long), WORLD, seed)
        return book.vectors

    assert torch.equal(vectors([1, 2]), vectors([1, 2]))
    assert not torch.equal(vectors([1, 2]), vectors([1, 3]))


def test_restored_from_its_state_it_goes_on_as_before():
    book = codebook(8)
    for step in range(3):
        book.update(latents(step), book.nearest(latents(step)), WORLD, [0, step])
    other = codebook(8, seed=1)
    other.load_state_dict(book.state_dict())
    for step in range(3, 6):
        for b in (book, other):
            b.update(latents(step), b.nearest(latents(step)), WORLD, [0, step])
    for name, value in book.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_codes_find_the_clusters_of_what_they_see():
    centres, rng = torch.tensor([[-3.0, 0], [3, 0], [0, 3], [0, -3]]), np.random.default_rng(0)
    book = Codebook(16, 2, decay=0.8)
    for step in range(60):
        rows = centres[rng.integers(4, size=64)] + 0.1 * latents(step, (64, 2))
        z = rows.t().reshape(1, 2, 8, 8)
        book.update(z, book.nearest(z), WORLD, [0, step])
    distance = torch.cdist(centres, book.vectors)  # (4,16)
    assert distance.min(1).values.max() < 0.1 and distance.min(0).values.max() < 0.4


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.25] * 4, [0.5, 0.25, 0.125, 0.125]])
def test_usage_and_perplexity(shares):
    book, n = Codebook(4, 3), 64
    chosen = torch.tensor(np.repeat(np.arange(len(shares)), (np.array(shares) * n).astype(int)))
    z = latents(9, (1, 3, 8, 8))
    for step in range(2):
        book.update(z, chosen.view(1, 8, 8), WORLD, [0, step])
    found = book.report()
    assert found["usage"] == len(shares) / 4
    entropy = -sum(p * np.log(p) for p in shares)
    assert found["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-6)
    assert book.report() == {"usage": 0.0, "perplexity": 1.0}


# ------------------------------------------------------------------------------ the autoencoder


def make(channels=1):
    torch.manual_seed(0)
    ae = Autoencoder(channels, 2, 16, (1, 2), 1, 3, variance=False)
    for p in ae.parameters():  # open the layers that start at zero
        torch.nn.init.normal_(p, std=0.1)
    return VQAutoencoder(ae, codebook(10, 3)).eval()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24)])
def test_it_has_the_interface_of_every_autoencoder(shape):
    ae, x = make(shape[0]), torch.randn(2, *shape)
    z, log_var = ae.encode(x)
    small = (shape[1] // 4, shape[2] // 4)
    assert ae.factor == 4 and ae.z_channels == 3
    assert z.shape == log_var.shape == (2, 3, *small) and (log_var == -30).all()
    assert ae.codes(x).shape == (2, *small) and ae.codes(x).dtype == torch.int64
    x_hat, z_e, codes = ae(x)
    assert torch.equal(z_e, z) and torch.equal(codes, ae.codes(x)) and x_hat.shape == x.shape
    torch.testing.assert_close(ae.decode(z), x_hat)
    torch.testing.assert_close(ae.decode_codes(codes), x_hat)


def test_decoding_mends_small_errors():
    """All of a code's cell decodes to the same image: the codes themselves are in it."""
    ae, x = make(), torch.randn(2, 1, 16, 16)
    z, _ = ae.encode(x)
    nearly = torch.lerp(z, ae.codebook.lookup(ae.codes(x)), 0.9)
    assert not torch.equal(z, nearly)
    torch.testing.assert_close(ae.decode(nearly), ae.decode(z))


def test_every_parameter_learns_through_the_quantiser():
    ae, x = make(), torch.randn(2, 1, 16, 16)
    x_hat, z, codes = ae(x)
    (x_hat.square().mean() + ae.codebook.commitment(z, codes).mean()).backward()
    silent = [n for n, p in ae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
