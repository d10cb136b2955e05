"""Autoencoders: the first stage of latent diffusion.

Kingma, Welling, "Auto-Encoding Variational Bayes", 2014 (arXiv:1312.6114): VAE.
van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017
(arXiv:1711.00937): VQ-VAE. Esser, Rombach, Ommer, "Taming Transformers", 2021 (arXiv:2012.09841):
VQGAN. Rombach et al., "Latent Diffusion Models", 2022 (arXiv:2112.10752), section 3.1: LDM.

An encoder makes an image x small, and a decoder D makes the image again. What lies between them
should be small, and smooth enough that a diffusion model can learn it. Two ways lead there:

    kl, ldm   the encoder gives a Gaussian q(z|x) = N(mean, sigma^2), the decoder sees a draw from
              it, and a weak pull towards N(0, 1) keeps all latents near each other (LDM):

              |x - D(z)| + kl_weight KL(q(z|x) || N(0, 1)),  z = mean + sigma eps      VAE eq. 10

    vq        the encoder gives a vector z_e at each place, the decoder sees the nearest of K
              learned vectors, z_q = e_k, through which gradients pass as if it were z_e:

              |x - D(z_q)| + beta ||z_e - sg(z_q)||^2,  sg: no gradient                VQ-VAE eq. 3

|x - x_hat| alone prefers a blur to a sharp guess. Two further terms ask for what eyes look at: the
distance of what VGG16 sees in both images, and a discriminator of patches, weighted so that it
pulls at the decoder's last layer as hard as the other errors of x_hat (VQGAN eq. 7).

    python autoencoder.py --data mnist             a minute of one CPU core: 25.4 dB, SSIM 0.93
    python autoencoder.py --data mnist --ae vq     as long: 23.6 dB, SSIM 0.88, all codes in use
    python autoencoder.py --sample taef2 --data photos --size 128     what a published one keeps

Each leaves reconstructions.png. ldm_cfg.py --ae runs/ae-vq-mnist/ckpt.pt trains on the latents.
"""

from runtime import checkpoints
from runtime import commandline as cli
from runtime.files import atomic_write, read_json, remove
from runtime.finite import WEIGHTS, check_finite
from runtime.pictures import save_grid, to_uint8
from runtime.precision import LossScaler
from runtime.processes import exact, launch
from runtime.run import Run

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from image_data import datasets
from networks.autoencoders import build, latent_shape, load_autoencoder, own_checkpoint
from networks.perceptual import Discriminator, load_perceptual, psnr, ssim
from networks.vq import CHUNK, rows


@dataclass
class Config(cli.RunConfig):
    steps: int = 1000  # optimizer steps
    lr: float = 2e-3  # peak learning rate
    warmup: int = 100  # steps over which the learning rate rises from zero
    ema: tuple[float, ...] = (0.998,)
    """decays of running means of the weights, which are kept beside them. Later chapters take the
    weights themselves, to which a codebook belongs; and so does --sample, unless --ema is typed"""
    sample_every: int = 500  # steps between two grids of reconstructions; 0 for none but the last

    ae: Literal["kl", "vq", "ldm"] = "kl"
    """kl and vq: small networks with a Gaussian or a codebook; ldm: Stable Diffusion's structure"""
    patch: int = 4  # kl and vq first fold patches of this side into channels
    model_channels: int = 64  # channels at the first resolution, after folding
    channel_mult: tuple[int, ...] = (1,)
    """channels at each resolution, in model_channels; each but the first halves the image"""
    num_res_blocks: int = 2  # residual blocks per resolution
    z_channels: int = 4  # channels of the latent
    kl_weight: float = 3e-3  # kl, ldm: weight of the pull towards N(0, 1)
    codebook: int = 512  # vq: K, how many vectors there are to choose from
    commitment: float = 0.25  # vq: beta, weight of the pull of latents towards their vectors

    perceptual: str = ""  # file of VGG16 or LPIPS weights: compare their features of images, too
    perceptual_weight: float = 1.0  # weight of that beside |x - x_hat|
    discriminator: float = 0.0  # weight of a patch discriminator; 0 for none
    disc_start: int = 1000  # step at which it starts

    sample: str = ""
    """do not train: reconstruct held-out images of --data with this checkpoint, or with a published
    AutoencoderKL, AutoencoderTiny or TAESD, a file or a folder"""
    n: int = 1000  # held-out images that are reconstructed and measured at the end

    USES = {"sample": cli.names("n data data_root size classes ema batch_size")}
    NEEDS = cli.RunConfig.NEEDS | {
        "patch": "ae=kl,vq",
        "kl_weight": "ae=kl,ldm",
        "codebook": "ae=vq",
        "commitment": "ae=vq",
        "perceptual_weight": "perceptual",
        "disc_start": "discriminator",
    }
    # Not `accumulate`: VQGAN's lambda is a number of each part.
    FREE = (cli.RunConfig.FREE | cli.names("sample n")) - cli.names("accumulate")


def make_autoencoder(cfg, shape):
    """The autoencoder cfg.ae for images of `shape` (C,H,W); BadInput for sizes that do not fit."""
    names = ["model_channels", "channel_mult", "num_res_blocks", "z_channels"]
    names += {"kl": ["patch"], "vq": ["patch", "codebook"], "ldm": []}[cfg.ae]
    ae = build(cfg.ae, channels=shape[0], **{name: getattr(cfg, name) for name in names})
    if ae.factor == 1 and cfg.ae == "ldm":
        raise cli.BadInput("--ae ldm halves at every level: type --channel-mult 1 2 4 4")
    latent_shape(ae, shape)
    return ae


# ----------------------------------------------------------------------- what pulls at the latents


def kl_divergence(mean, log_var):
    """KL(q(z|x) || N(0, 1)) of each image, (B,), a mean over the numbers of z: VAE appendix B."""
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(dim=(1, 2, 3))


def commitment(z, z_q):
    """Mean square of z - sg(z_q), both (B,C,h,w), of each image, (B,): VQ-VAE eq. 3."""
    return (z.float() - z_q.detach()).square().mean(dim=(1, 2, 3))


# ----------------------------------------------------------------------- how the codebook learns


@torch.no_grad()
def update_codebook(book, z, codes, world, rng, decay=0.99, dead=0.1):
    """One step of the codebook's running means, over all processes: VQ-VAE appendix A.1.

        N_k = decay N_k + (1 - decay) n_k                                  VQ-VAE eq. 6
        m_k = decay m_k + (1 - decay) sum of the n_k vectors that chose k  VQ-VAE eq. 7
        e_k = m_k / N_k                                                    VQ-VAE eq. 8

    It is k-means, batch by batch. Nothing moves a code that none chooses: chosen less often than
    `dead` times the average code, it starts anew as a vector of this batch, chosen
    as often as the average (the restarts of Dhariwal et al., "Jukebox", 2020, arXiv:2005.00341).
    That gives it log(dead) / log(decay) steps, here 229, to attract something. The first update
    makes every code such a vector.

    z (b,C,h,w) and its codes (b,h,w) are this process's equal share of the batch. rng, the same on
    every process, decides which vectors may become codes.
    """
    z, codes = rows(z), codes.flatten()  # (n,C), (n,)
    here, everywhere = len(z), len(z) * world.size
    found = z.new_zeros(book.size, 1 + z.shape[1])  # (K,1+C): n_k, and the sum of its vectors
    for part, chosen in zip(z.split(CHUNK), codes.split(CHUNK), strict=True):
        # A matrix product, because adding rows one by one has no fixed order on a GPU.
        one_hot = z.new_zeros(len(part), book.size).scatter_(1, chosen[:, None], 1.0)
        found += one_hot.t() @ F.pad(part, (1, 0), value=1.0)

    picks = rng.choice(everywhere, book.size, everywhere < book.size)
    picks = world.upload(picks) - world.rank * here  # (K,)
    mine = ((picks >= 0) & (picks < here))[:, None]
    fresh = torch.where(mine, z[picks.clamp(0, here - 1)], 0.0)  # (K,C), one process adds it
    found = world.sum(torch.cat([found, fresh], dim=1))
    counts, sums, fresh = found.split([1, z.shape[1], z.shape[1]], dim=1)

    average, first = everywhere / book.size, book.counts.sum() == 0
    book.counts.lerp_(counts[:, 0], 1 - decay)
    book.sums.lerp_(sums, 1 - decay)
    anew = first | (book.counts < dead * average)  # (K,)
    book.counts.masked_fill_(anew, average)
    book.sums.copy_(torch.where(anew[:, None], average * fresh, book.sums))
    # Laplace smoothing: as if each code had been chosen a little more often (DeepMind's Sonnet).
    total, eps = book.counts.sum(), 1e-5
    smoothed = (book.counts + eps) / (total + book.size * eps) * total  # (K,)
    book.vectors.copy_(book.sums / smoothed[:, None])
    book.hits += counts[:, 0]


def code_use(hits):
    """{'usage', 'perplexity'} of codes that were chosen so often, (K,).

    usage       share of the codes that were chosen at all, 0 ... 1
    perplexity  e^entropy of the choices, 1 ... K: as many equally likely codes say as much
    """
    share = (hits / hits.sum().clamp(min=1)).double()  # (K,)
    perplexity = torch.special.entr(share).sum().exp()
    return {"usage": (hits > 0).double().mean().item(), "perplexity": perplexity.item()}


def read_hits(book):
    """code_use of all choices since the last call, or {} without a codebook."""
    if book is None:
        return {}
    values = code_use(book.hits)
    book.hits.zero_()
    return values


# ------------------------------------------------------------------------------------- the loss


class Adversary:
    """A discriminator D that learns beside an autoencoder, and its term of the loss: VQGAN.

    shape (C,H,W) of the images; BadInput for sides below 24. weight multiplies the term, on top of
    the adaptive lambda; width are the discriminator's channels.
    """

    def __init__(self, shape, weight, width, batch_size, world):
        if min(shape[1:]) < 24:
            raise cli.BadInput(
                f"--discriminator: its patches need images of at least 24x24, not {shape[1]}x"
                f"{shape[2]}; leave it out"
            )
        self.weight, self.batch_size, self.world = weight, batch_size, world
        net = Discriminator(shape[0], width)
        self.net = net.to(world.device, memory_format=torch.channels_last)
        self.optimizer = world.adam(1e-3, betas=(0.5, 0.9))(net.parameters())
        self.scaler = LossScaler(world)  # in fp16 its gradients are not as long as the other's

    def generator_losses(self, x_hat, reconstruction, last):
        """What is added to the loss of each image, (b,): weight lambda (-mean D(x_hat)).

        lambda = |grad L_rec| / (|grad -D| + 1e-6), gradients by `last`, the weight of the decoder's
        last layer (VQGAN eq. 7): there both terms pull equally, whatever their units.
        reconstruction (b,): the loss of x_hat (b,C,H,W) without this term.
        """
        self.net.requires_grad_(False)
        losses = -self.net(x_hat).float().mean(dim=(1, 2))
        self.net.requires_grad_(True)
        lengths, scale = [], 2.0**10  # else in fp16 the gradient of a pixel is 0
        for term in (reconstruction, losses):
            (gradient,) = torch.autograd.grad(scale * term.mean(), last, retain_graph=True)
            lengths.append((self.world.sum(gradient.float()) / self.world.size / scale).norm())
        lambda_ = (lengths[0] / (lengths[1] + 1e-6)).clamp(max=1e4)
        finite = torch.stack(lengths).isfinite().all()  # else the batch has overflowed in fp16
        return self.weight * torch.where(finite, lambda_, 0.0) * losses

    def learn(self, x, x_hat):
        """The hinge loss, (b,), of D above 1 for x and below -1 for x_hat; keeps its gradient."""
        with self.world.autocast():
            real, fake = self.net(torch.cat([x, x_hat.detach()])).float().chunk(2)  # (b,h,w)
        losses = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2))
        self.scaler.scale(losses.sum() / self.batch_size).backward()
        return losses.detach()

    def step(self, lr):
        """Descend along the gradients of all learn() since the last step, on all processes."""
        for p in self.net.parameters():
            self.world.sum(p.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        parts = ("net", "optimizer", "scaler")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler"))


def loss_terms(cfg, ae, model, x, noise, perceptual):
    """(losses by name, the reconstruction loss, what the network gave); losses of each image, (b,).

    The reconstruction loss is mean |x - x_hat|, by name "l1", and the perceptual distance, if any.
    "loss" is that and the pull on the latents: KL for a Gaussian q(z|x), commitment for a codebook.
    model is ae, or what wraps it for training; it gives x_hat (b,C,H,W), the latents' means
    (b,z,h,w), and their log-variances, or the codes (b,h,w).
    """
    x_hat, z, rest = model(x, noise)
    terms = {"l1": (x - x_hat.float()).abs().mean(dim=(1, 2, 3))}
    reconstruction = terms["l1"]
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_hat)
        reconstruction = reconstruction + cfg.perceptual_weight * terms["perceptual"]
    if cfg.ae == "vq":
        terms["commitment"] = commitment(z, ae.codebook.lookup(rest))
        pull = cfg.commitment * terms["commitment"]
    else:
        terms["kl"] = kl_divergence(z, rest)
        pull = cfg.kl_weight * terms["kl"]
    return {"loss": reconstruction + pull, **terms}, reconstruction, (x_hat, z, rest)


# ------------------------------------------------------------------------------------- training


def train(cfg, world):
    ds = datasets.of(cfg)
    torch.manual_seed(cfg.seed)
    ae = make_autoencoder(cfg, ds.shape).to(world.device)
    z_shape, book = latent_shape(ae, ds.shape), getattr(ae, "codebook", None)
    last_layer = [p for p in ae.decoder.parameters() if p.ndim > 1][-1]  # its weight
    perceptual, adversary, keep, made_of = None, None, {}, {}
    if cfg.perceptual:
        perceptual = load_perceptual(cfg.perceptual, ds.shape).to(world.device)
        made_of["perceptual"] = checkpoints.weights_hash(perceptual)  # wherever the file lies
    if cfg.discriminator:
        width = min(64, cfg.model_channels)
        adversary = Adversary(ds.shape, cfg.discriminator, width, cfg.batch_size, world)
        keep["adversary"] = adversary
        if cfg.compile:  # lambda needs two more passes backwards through one graph
            torch._functorch.config.donated_buffer = False
    how = {"optimizer": world.adam(cfg.lr), "keep": keep, "made_of": made_of}
    run = Run(cfg, world, ds, net=ae, **how)
    run.say(f"{ds.name}: {len(ds)} images {ds.shape}, autoencoder {cfg.ae}, latents {z_shape}")
    shown = np.linspace(0, len(ds) - 1, min(50, len(ds))).astype(np.int64)

    for step in run.steps():  # goes on where it stopped; saves between two steps
        seen = []  # what this process's share of the step gave the codebook
        fooling = adversary is not None and step >= cfg.disc_start
        for part in run.parts(step):
            x, _ = run.images(part)  # (b,C,H,W)
            noise = run.noise(part, (len(x), *z_shape), "posterior")  # of z ~ q(z|x), (b,z,h,w)
            with world.autocast():
                terms, reconstruction, given = loss_terms(cfg, ae, run.model, x, noise, perceptual)
                losses, (x_hat, z, rest) = terms.pop("loss"), given
                if fooling:
                    terms["generator"] = adversary.generator_losses(
                        x_hat, reconstruction, last_layer
                    )
                    terms["disc"] = adversary.learn(x, x_hat)
            if fooling:  # a gradient, but no value: the log's loss stays comparable
                losses = losses + terms["generator"] - terms["generator"].detach()
            run.backward(losses, **terms)
            seen.append((z.detach(), rest))
        if book is not None:
            z, codes = (torch.cat(parts) for parts in zip(*seen, strict=True))
            update_codebook(book, z, codes, world, run.rng(step, "codes"))
        if fooling:
            adversary.step(run.optimizer.param_groups[0]["lr"])
        run.descend(also=partial(read_hits, book))  # clip, Adam, running means, log
        if run.due(cfg.sample_every):
            run.save_grid(lambda: pairs(*reconstruct(ae, ds, shown, world.device)))
    ae.eval().requires_grad_(False)
    report(ae, cfg, world, run.folder)


# ------------------------------------------------------------------------------ reconstructions


@torch.no_grad()
@exact()
def reconstruct(ae, ds, chosen, device):
    """(x, x_hat), (b,C,H,W) in [-1,1] on the device, of images `chosen` int64 (b,), without noise.

    x_hat is decoded from the mean of q(z|x), in fp32. NotFinite where it is not finite.
    """
    x = ds.batch(chosen)[0].to(device)
    z = check_finite(ae.encode(x)[0], chosen, "the latent of image", WEIGHTS)
    x_hat = ae.decode(z).float()
    return x, check_finite(x_hat, chosen, "the reconstruction of image", WEIGHTS).clamp(-1, 1)


def pairs(x, x_hat):
    """uint8 (2b,H,W,C): each row of ten images above the row of their reconstructions."""
    parts = zip(to_uint8(x).split(10), to_uint8(x_hat).split(10), strict=True)
    return torch.cat([half for part in parts for half in part])


def held_out(cfg):
    """(images that training does not see, ""); without such images (training images, why)."""
    ds = datasets.of(cfg)
    how = {"split": "test", "size": cfg.size, "classes": cfg.classes}
    try:
        test = datasets.load(cfg.data, cfg.data_root, **how)
    except cli.BadInput as error:
        return ds, f"no test images ({error})"
    if test.shape != ds.shape:
        return ds, "the test images are of another size"
    return test, "" if test.key != ds.key else "there are no others"


@torch.no_grad()
def report(ae, cfg, world, folder, batch=64):
    """Encode and decode cfg.n held-out images of cfg.data, without noise.

    reconstructions.png   fifty images, each row of ten above the row of their reconstructions
    reconstructions.npz   all reconstructions: eval_fid.py measures their distance
    reconstructions.json  mean PSNR (dB) and SSIM, with a codebook its use, of what, and by which
                          weights; one line is printed. Nothing is done where just this has been
                          reported before. BadInput for images that do not fit.
    """
    if cfg.dry_run:
        return
    images, why = held_out(cfg)
    latent_shape(ae, images.shape, flag="--data")
    count, path = min(len(images), cfg.n), Path(folder) / "reconstructions.json"
    made_by = {"autoencoder": checkpoints.weights_hash(ae), "data": images.key, "n": count}
    known = False
    if world.is_main and path.exists() and path.with_suffix(".npz").exists():
        known = made_by.items() <= read_json(path).items()
    if world.sum(torch.tensor(float(known), device=world.device)) > 0:
        return
    chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)  # of all classes
    book, device = getattr(ae, "codebook", None), world.device
    found, hits = [], torch.zeros(book.size if book else 1, device=device)

    def measure(part, tick):
        """What is collected of the images `part`, (b,2): PSNR and SSIM."""
        x, x_hat = reconstruct(ae, images, chosen[part.numpy()], device)
        if book:
            hits.add_(torch.bincount(ae.codes(x).flatten(), minlength=book.size))
        found.append(to_uint8(x_hat))
        tick()
        return torch.stack([psnr(x, x_hat), ssim(x, x_hat)], dim=1)

    figures = world.in_parts(measure, count, batch * world.size, 1, "reconstructions")
    made = world.collect(torch.cat(found).to(device), count).cpu()
    decibels, similar = figures.mean(0).tolist()
    words = code_use(world.sum(hits)) if book else {}
    if not world.is_main:
        return
    # Figures must never be of other images.
    remove(path.parent, "reconstructions.json", "reconstructions.npz", "eval.json")
    shown = np.linspace(0, count - 1, min(50, count)).astype(np.int64)
    x, _ = images.batch(chosen[shown])
    save_grid(pairs(x, made[shown].permute(0, 3, 1, 2) / 127.5 - 1), path.with_suffix(".png"), 10)
    with atomic_write(path.with_suffix(".npz")) as temporary:
        np.savez(temporary, made.numpy(), images.labels[chosen])
    values = made_by | {"held_out": not why, "psnr": decibels, "ssim": similar, **words}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
    which = f"training images: {why}" if why else "held-out images"
    told = f"PSNR {decibels:.1f} dB, SSIM {similar:.3f}"
    if book:
        told += f", {words['usage']:.0%} of the codes in use, perplexity {words['perplexity']:.0f}"
    print(f"reconstructions: {told} over {count} {which}; see {path.with_suffix('.png')}")


# ------------------------------------------------------------------------------------- commands


def sample_checkpoint(cfg, world):
    """report() of any autoencoder: of ours on its own data unless --data is typed.

    It goes below the folder of a checkpoint of ours, else below runs/ae-NAME-DATA.
    """
    state, path = own_checkpoint(cfg.sample), Path(cfg.sample)
    # A --config may be of a run; what is published keeps no means.
    ema = checkpoints.typed_ema(cfg) if state or cli.typed(("ema",)) else None
    ae = load_autoencoder(path, world.device, ema, flag="--sample")
    if state:
        names = cli.not_given(cfg, ("data", "data_root", "size", "classes"))
        trained = checkpoints.trained_config(Config, state, path)
        cfg = replace(cfg, **{name: getattr(trained, name) for name in names})
    beside = path if state else Path(f"runs/ae-{path.stem}-{Path(cfg.data).stem}", "ckpt.pt")
    if world.is_main:
        kind, count = ae.settings["kind"], sum(p.numel() for p in ae.parameters()) / 1e6
        small = f"{ae.z_channels} channels, {ae.factor} times smaller"
        print(f"autoencoder {kind} of {count:.2f} M parameters, latents of {small}")
    report(ae, cfg, world, cli.folder_of(cfg, beside), max(1, cfg.batch_size // world.size))


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    cli.check_run(cfg)
    cli.check_ranges(
        cfg,
        positive="patch model_channels channel_mult num_res_blocks z_channels codebook commitment "
        "perceptual_weight n",
        not_negative="discriminator disc_start",
        fraction="kl_weight",
    )
    if cfg.discriminator and cfg.graph:
        raise cli.BadInput("--graph and --discriminator: one at a time, it asks for two gradients")
    if cfg.discriminator and cfg.disc_start >= cfg.steps:
        found = f"--disc-start {cfg.disc_start} is not before --steps {cfg.steps}"
        raise cli.BadInput(f"{found}: the discriminator would never start")


def main():
    cfg = cli.parse(Config, __doc__)
    cfg = cli.smoke(cfg, model_channels=32, disc_start=1, n=8, out="runs/smoke-autoencoder")
    check(cfg)
    if cfg.sample:
        launch(sample_checkpoint, cfg)
        return
    ds = datasets.of(cfg)
    cfg = datasets.in_steps(cfg, ds)
    check(cfg)  # again, for --epochs
    make_autoencoder(cfg, ds.shape)  # what does not fit says so before there are processes
    launch(train, replace(cfg, out=cfg.out or f"runs/ae-{cfg.ae}-{Path(cfg.data).stem}"))


if __name__ == "__main__":
    cli.entry(main)
