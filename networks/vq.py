"""Vector quantisation: an autoencoder whose latents are words of a learned vocabulary.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017
(arXiv:1711.00937): VQ-VAE.

The encoder gives a vector z_e at every place of a small grid, and the decoder is shown instead the
nearest of K learned vectors, the codebook:

    k = argmin_j ||z_e - e_j||^2,   z_q = e_k                                    VQ-VAE eq. 1-2

So an image is a grid of integers. How the encoder learns through this rounding, and the codebook
from what is rounded, is said and done in autoencoder.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 4096  # vectors at a time: a table of their distances to 16,384 codes takes 256 MB


def rows(z):
    """(B,C,h,w) -> (B*h*w, C) in float32, a view where that can be."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()


class Codebook(nn.Module):
    """`size` codes of `dim` numbers; all state is in buffers, as they learn by running means.

    vectors (K,dim) are the codes. counts (K,) and sums (K,dim) are the running means of how often
    each was chosen in a step, N_k, and of the sum of the vectors that chose it, m_k; hits (K,) is
    how often since someone set it to zero.
    """

    def __init__(self, size, dim):
        super().__init__()
        self.size = size
        self.register_buffer("vectors", torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("hits", torch.zeros(size), persistent=False)

    def nearest(self, z):
        """Numbers of the nearest codes, int64 (B,h,w), for vectors z (B,dim,h,w): eq. 1."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            norms = self.vectors.square().sum(1)  # (K,); ||z||^2 is the same for all codes
            codes = [
                torch.addmm(norms, part, self.vectors.t(), alpha=-2).argmin(1)
                for part in rows(z).split(CHUNK)
            ]
        return torch.cat(codes).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes):
        """The vectors (B,dim,h,w) of codes (B,h,w), channels_last in memory: eq. 2."""
        return F.embedding(codes, self.vectors).permute(0, 3, 1, 2)

    def forward(self, z):
        """(z_q, codes): z_q (B,dim,h,w), whose gradient goes straight to z; codes (B,h,w)."""
        codes = self.nearest(z)
        return z + (self.lookup(codes) - z).detach(), codes


class VQAutoencoder(nn.Module):
    """Any autoencoder with a codebook in front of its decoder.

    ae         encode(x) -> (z (B,z,h,w), what is ignored), decode(z), .encoder, .decoder, .factor
    codebook   a Codebook of ae.z_channels numbers

    The interface is that of small_autoencoder.Autoencoder, with latents z_e without noise. The
    quantiser is the first layer of the decoder (LDM section 3.1): latent diffusion runs on z_e,
    and small errors of a sample are corrected.
    """

    def __init__(self, ae, codebook):
        super().__init__()
        self.settings = ae.settings | {"kind": "vq", "codebook": codebook.size}
        self.ae, self.codebook = ae, codebook
        self.channels, self.factor, self.z_channels = ae.channels, ae.factor, ae.z_channels

    @property
    def decoder(self):
        return self.ae.decoder

    def encode(self, x):
        """(z_e, log-variance), both (B,z,h,w): not yet quantised, and -30 everywhere."""
        z, _ = self.ae.encode(x)
        return z, torch.full_like(z, -30.0)

    def codes(self, x):
        """The images (B,C,H,W) as integers 0 ... K-1: int64 (B,h,w)."""
        return self.codebook.nearest(self.encode(x)[0])

    def decode(self, z):
        """(B,C,H,W), not clamped: z (B,z,h,w) is quantised first."""
        return self.ae.decode(self.codebook(z)[0])

    def decode_codes(self, codes):
        """(B,C,H,W) of codes (B,h,w)."""
        return self.ae.decode(self.codebook.lookup(codes))

    def forward(self, x, noise=None):
        """(x_hat, z_e, codes), what training needs; noise is ignored."""
        z, _ = self.encode(x)
        z_q, codes = self.codebook(z)
        return self.ae.decode(z_q), z, codes
