"""Decoding and encoding tile by tile: the same image or latent, in the memory of a tile."""

from runtime.plan import LiveBytes

import pytest
import torch
import torch.nn.functional as F

from networks.autoencoders import build, decode_in_tiles, encode_in_tiles


class Local:
    """An autoencoder whose pixels and latents depend on what lies at their place, nothing else."""

    factor = 4

    def __init__(self):
        self.seen = []

    def decode(self, z):
        self.seen.append(tuple(z.shape[2:]))
        return F.interpolate(z[:, :3], scale_factor=4.0) ** 2

    def encode(self, x):
        self.seen.append(tuple(x.shape[2:]))
        mean = F.max_pool2d(x, 4) ** 2
        return mean, mean + 1  # log_var, which is not asked for


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 40), (40, 23), (64, 5)])
def test_tiles_of_a_local_decoder_make_the_whole_image(size):
    z, ae = torch.randn(2, 4, *size, dtype=torch.float64), Local()
    assert torch.allclose(decode_in_tiles(ae, z, 16), ae.decode(z), rtol=1e-12, atol=1e-12)
    *tiles, _ = ae.seen
    assert max(max(tile) for tile in tiles) <= 16
    if max(size) <= 16:
        assert len(tiles) == 1


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 40), (40, 23), (64, 5)])
def test_tiles_of_a_local_encoder_make_the_whole_latent(size):
    """Tiles of at most 16 latents, of a picture four times as high and wide."""
    x, ae = torch.randn(2, 3, *(4 * side for side in size), dtype=torch.float64), Local()
    found, (expected, _) = encode_in_tiles(ae, x, 16), ae.encode(x)
    assert found.shape == (2, 3, *size)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    *tiles, _ = ae.seen
    assert max(max(tile) for tile in tiles) <= 64
    if max(size) <= 16:
        assert len(tiles) == 1


def test_neighbours_share_a_quarter_and_fade_on_a_straight_line():
    """Tiles of ones and of threes: where two meet, the image rises in even steps."""

    class Numbered(Local):
        def decode(self, z):
            self.seen.append(z)
            return torch.full((1, 3, 64, 64), 1.0 if len(self.seen) == 1 else 3.0)

    x = decode_in_tiles(Numbered(), torch.zeros(1, 4, 16, 28), 16)
    row = x[0, 0, 5]
    assert torch.equal(row[:48], torch.ones(48)) and torch.equal(row[64:], torch.full((48,), 3.0))
    rise = row[48:64].diff()
    assert torch.allclose(rise, torch.full_like(rise, 2 / 16), atol=1e-6)
    assert torch.equal(x[0, 0, 5], x[0, 2, 60])


@pytest.fixture(scope="module")
def ae():
    torch.manual_seed(0)
    sizes = {"model_channels": 32, "channel_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    return build("ldm", **sizes).eval().requires_grad_(False)


def test_a_real_decoder_differs_little_and_takes_the_memory_of_a_tile(ae):
    z = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), LiveBytes() as live:
        whole = ae.decode(z)
    with torch.no_grad(), LiveBytes() as less:
        tiled = decode_in_tiles(ae, z, 16)
    assert tiled.shape == whole.shape == (1, 3, 256, 256)
    assert (tiled - whole).std() < 0.3 * whole.std()  # each norm sees a tile alone
    assert less.peak < 0.5 * live.peak
    assert torch.equal(decode_in_tiles(ae, z[:, :, :16, :16], 16), ae.decode(z[:, :, :16, :16]))


def test_means_of_a_real_encoder_differ_little(ae):
    spots = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(spots, scale_factor=16.0, mode="bicubic").clamp(-1, 1)
    with torch.no_grad(), LiveBytes() as live:
        whole, _ = ae.encode(x)
    with torch.no_grad(), LiveBytes() as less:
        tiled = encode_in_tiles(ae, x, 16)
    assert tiled.shape == whole.shape == (1, 4, 32, 32)
    assert (tiled - whole).std() < 0.3 * whole.std()
    assert less.peak < 0.5 * live.peak
    part = x[:, :, :128, :128]
    assert torch.equal(encode_in_tiles(ae, part, 16), ae.encode(part)[0])
