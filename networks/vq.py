"""Vector quantisation: an autoencoder whose latents are words of a learned vocabulary.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017
(arXiv:1711.00937): VQ-VAE. Razavi et al., "VQ-VAE-2", 2019 (arXiv:1906.00446). Esser et al.,
"Taming Transformers", 2021 (arXiv:2012.09841). Dhariwal et al., "Jukebox", 2020 (arXiv:2005.00341).

The encoder gives a vector z_e at every place of a small grid, and the decoder is shown instead the
nearest of K learned vectors, the codebook:

    k = argmin_j ||z_e - e_j||^2,   z_q = e_k                                    VQ-VAE eq. 1-2

So an image is a grid of integers, and nothing has to pull the latents towards a Gaussian. Rounding
has no gradient, which leaves three questions:

    how the encoder learns    the decoder's gradient at z_q is taken for that at z_e, straight
                              through; and beta ||z_e - sg(z_q)||^2 commits z_e to its code
                              (VQ-VAE eq. 3; sg: no gradient)
    how the codebook learns   each code is a running mean of the vectors that chose it
                              (VQ-VAE appendix A.1; VQ-VAE-2 section 3.1): k-means, batch by batch
    what of unused codes      nothing moves a code that none chooses, so it starts anew as one of
                              the vectors of this batch (Jukebox section 3.2)

    python ldm_cfg.py --ae vq --codebook 512 --stage autoencoder

Latent diffusion runs on z_e: the quantiser is the first layer of the decoder (LDM section 3.1), and
corrects small errors of a sample.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 4096  # vectors at a time: a table of their distances to 16,384 codes takes 256 MB


def rows(z):
    """(B,C,h,w) -> (B*h*w, C) in float32, a view where that can be."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()


class Codebook(nn.Module):
    """`size` codes of `dim` numbers, learned by running means; all state is in buffers.

    decay  of the running means, gamma in VQ-VAE eq. 6-8
    dead   a code starts anew when it is chosen less often than `dead` times the average code

    New codes count as chosen as often as the average one, which gives them log(dead) / log(decay)
    steps, here 229, to attract something. The first update makes every code a vector of its batch.
    """

    def __init__(self, size, dim, decay=0.99, dead=0.1):
        super().__init__()
        self.size, self.decay, self.dead = size, decay, dead
        self.register_buffer("vectors", torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("counts", torch.zeros(size))  # N, how often chosen in a step
        self.register_buffer("sums", torch.zeros(size, dim))  # m, of the vectors that chose it
        self.register_buffer("hits", torch.zeros(size), persistent=False)  # since report()

    def nearest(self, z):
        """Numbers of the nearest codes, int64 (B,h,w), for vectors z (B,dim,h,w)."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            norms = self.vectors.square().sum(1)  # (K,); ||z||^2 is the same for all codes
            codes = [
                torch.addmm(norms, part, self.vectors.t(), alpha=-2).argmin(1)
                for part in rows(z).split(CHUNK)
            ]
        return torch.cat(codes).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes):
        """The vectors (B,dim,h,w) of codes (B,h,w), channels_last in memory."""
        return F.embedding(codes, self.vectors).permute(0, 3, 1, 2)

    def forward(self, z):
        """(z_q, codes): z_q (B,dim,h,w), whose gradient goes straight to z; codes (B,h,w)."""
        codes = self.nearest(z)
        return z + (self.lookup(codes) - z).detach(), codes

    def commitment(self, z, codes):
        """Of each image, (B,): mean square of z (B,dim,h,w) - sg(its codes) (VQ-VAE eq. 3)."""
        return (z.float() - self.lookup(codes)).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def update(self, z, codes, world, seed):
        """One step of the running means, over all processes (VQ-VAE eq. 6-8).

        z (B,dim,h,w) and its codes (B,h,w) are this process's equal share of the batch. seed, a
        list of integers that is new at every step, decides which vectors may become codes: the
        same on every process and after a resume.
        """
        z, codes = rows(z), codes.flatten()  # (n,dim), (n,)
        here, everywhere = len(z), len(z) * world.size
        found = z.new_zeros(self.size, 1 + z.shape[1])  # how often each was chosen, by what in sum
        for part, chosen in zip(z.split(CHUNK), codes.split(CHUNK), strict=True):
            # a matrix product, because adding rows one by one has no fixed order on a GPU
            one_hot = z.new_zeros(len(part), self.size).scatter_(1, chosen[:, None], 1.0)
            found += one_hot.t() @ F.pad(part, (1, 0), value=1.0)

        picks = np.random.default_rng(seed).choice(everywhere, self.size, everywhere < self.size)
        picks = torch.from_numpy(picks).to(z.device) - world.rank * here  # (K,)
        mine = ((picks >= 0) & (picks < here))[:, None]
        fresh = torch.where(mine, z[picks.clamp(0, here - 1)], 0.0)  # (K,dim), one process adds it
        found = world.sum(torch.cat([found, fresh], dim=1))
        counts, sums, fresh = found.split([1, z.shape[1], z.shape[1]], dim=1)

        average, first = everywhere / self.size, self.counts.sum() == 0
        self.counts.lerp_(counts[:, 0], 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = first | (self.counts < self.dead * average)
        self.counts.masked_fill_(dead, average)
        self.sums.copy_(torch.where(dead[:, None], average * fresh, self.sums))
        # Laplace smoothing: as if each code had been chosen a little more often (Razavi et al.)
        total, eps = self.counts.sum(), 1e-5
        smoothed = (self.counts + eps) / (total + self.size * eps) * total  # (K,)
        self.vectors.copy_(self.sums / smoothed[:, None])
        self.hits += counts[:, 0]

    def report(self):
        """{'usage', 'perplexity'} of all choices since the last call, and start again.

        usage       share of the codes that were chosen at all, 0 ... 1
        perplexity  e^entropy of the choices, 1 ... size: as many equally likely codes say as much
        """
        share = (self.hits / self.hits.sum().clamp(min=1)).double()  # (K,)
        entropy = torch.special.entr(share).sum()
        usage = (self.hits > 0).double().mean()
        self.hits.zero_()
        return {"usage": float(usage), "perplexity": float(entropy.exp())}


class VQAutoencoder(nn.Module):
    """Any autoencoder with a codebook in front of its decoder.

    ae         encode(x) -> (z (B,z,h,w), what is ignored), decode(z), .encoder, .decoder, .factor
    codebook   a Codebook of ae.z_channels numbers

    The interface is that of autoencoder.Autoencoder, with latents z_e without noise.
    """

    def __init__(self, ae, codebook):
        super().__init__()
        self.ae, self.codebook = ae, codebook
        self.factor, self.z_channels = ae.factor, ae.z_channels

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
