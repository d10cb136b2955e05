"""The diffusion transformer: a plain transformer in the place of the U-Net.

Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023 (arXiv:2212.09748).

The latents of ldm_cfg.py are cut into patches, each patch becomes a token, and a transformer works
on the tokens. Nothing is halved or joined on the way: width, depth and patch say all of a network.

The timestep and the label reach every block in one way (section 3.2, "adaLN-Zero"): c is the sum
of their embeddings; a linear layer of c gives each of two branches a shift, a scale and a gate:

    x = x + gate_1 * attention((1 + scale_1) * norm(x) + shift_1)
    x = x + gate_2 *       mlp((1 + scale_2) * norm(x) + shift_2)

That layer starts at zero, so at first every gate is 0 and every block is the identity. The last
layer starts at zero, too. With --learn-sigma the network also gives the variance, which L_hybrid
teaches it (improved_ddpm.py; latents have no levels, so L_0 is of a density).

    python dit.py --data mnist --model dit-s/2       20 minutes on two CPU cores (an estimate)
    python dit.py --config configs/imagenet100_dit_b2.yaml --model dit-xl/2 --gpus 8 --shard
    python dit.py --published DiT-XL-2-256x256.pt --ae sd-vae-ft-ema --out runs/dit-xl

The last one makes a checkpoint of published weights, for --sample and eval_fid.py. The paper's
scale of guidance is s = 1 + w. Its code guides three of the four latent channels, this all of them.
"""

from runtime import checkpoints, sharding
from runtime import commandline as cli
from runtime.files import atomic_write
from runtime.processes import launch

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

import ldm_cfg
from ddpm_pixel import q_sample, target_of
from evaluation.score import last_samples
from image_data import datasets
from improved_ddpm import hybrid, learned_row, make_chain
from kernels import attention
from ldm_cfg import SAMPLING, alpha_bar_of
from networks.adm_unet import timestep_embedding


@dataclass
class Config(cli.RunConfig):
    stage: Literal["all", "autoencoder", "latents", "diffusion"] = "all"  # stop after this one

    ae: str = "kl"  # kl: train a small one; or the path of one, published or of autoencoder.py
    patch: int = 4  # the autoencoder first folds patches of this side into channels
    ae_channels: int = 64  # its channels after that
    ae_mult: tuple[int, ...] = (1,)  # times these at each resolution; each but the first halves
    ae_blocks: int = 2  # its residual blocks per resolution
    z_channels: int = 4  # channels of the latent
    kl_weight: float = 3e-3  # weight of the KL term beside the reconstruction error
    ae_steps: int = 1000  # optimizer steps of the autoencoder
    ae_lr: float = 2e-3  # its peak learning rate

    timesteps: int = 1000  # T, the length of the chain
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # linear is the paper's
    prediction: Literal["eps", "v"] = "v"  # what the network predicts; eps is the paper's
    model: str = "dit-s/2"  # dit-SIZE/PATCH: xs, s, b, l, xl; 1, 2, 4, 8 latents; xs by --smoke
    learn_sigma: bool = False  # the network gives the variance of --sampler ddpm, too
    use_checkpoint: bool = False  # compute activations twice instead of keeping them
    shard: bool = False  # with several processes, each keeps its part of the network only (FSDP2)
    label_dropout: float = 0.1  # how often training replaces the label by "none"

    steps: int = 1250  # optimizer steps of the diffusion
    lr: float = 5e-4  # peak learning rate
    warmup: int = 100  # steps over which a learning rate rises from zero, in both trainings
    ema: tuple[float, ...] = (0.995,)  # decays of running means; the first is what gets sampled
    save_every: int = 250  # steps between two checkpoints, a multiple of --log-every
    sample_every: int = 500  # steps between two sample grids; 0 for none but the last

    published: str = ""
    """do not train: write this published network, a file or folder of diffusers, and --ae as a
    checkpoint into --out; --data then says what it was trained on (default imagenet)"""
    sample: str = ""  # do not train: sample this checkpoint, by its settings where none are typed
    n: int = 100  # how many samples
    n_eval: int = 1000  # after training, so many samples (at least n) are scored; 0: none are
    seeds: str = ""  # sample seeds such as 17 or 0-63,100; overrides --n (default 0 .. n-1)
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddim"  # ddpm: ancestral; dpmpp: DPM-Solver++(2M)
    sample_steps: int = 25  # how many of the T timesteps the sampler visits, evenly spaced
    eta: float = 0.0  # noise of a ddim step: 0 deterministic, 1 like ddpm
    guidance: float = 1.0  # w in (1+w) eps(z,y) - w eps(z): -1 unconditional, 0 conditional
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guide only while t/T lies in it
    guidance_rescale: float = 0.0  # 0..1: how far it gets back the conditional estimate's spread

    USES = ldm_cfg.Config.USES | {"published": cli.names("ae data")}
    NEEDS = ldm_cfg.Config.NEEDS
    FREE = ldm_cfg.Config.FREE | cli.names("shard published")


EPS = 1e-6  # of every layer norm
FREQUENCIES = 256  # sines and cosines of the timestep, at any width

# Table 1: hidden size, depth and attention heads. Only xs, for small machines, is not the paper's.
SIZES = {"xs": (128, 4, 4), "s": (384, 12, 6), "b": (768, 12, 12)}
SIZES |= {"l": (1024, 24, 16), "xl": (1152, 28, 16)}
PATCHES = (1, 2, 4, 8)


def parse_size(name):
    """DiT's hidden_size, depth, num_heads and patch_size, of a name such as "dit-s/2" (table 1)."""
    found = re.fullmatch(r"dit-([a-z]+)/(\d+)", name.lower())
    if not found or found[1] not in SIZES or int(found[2]) not in PATCHES:
        raise cli.BadInput(
            f"--model {name} is no diffusion transformer: type dit-SIZE/PATCH with a size of "
            f"{', '.join(SIZES)} and a patch of {', '.join(map(str, PATCHES))}, such as dit-s/2"
        )
    names = ("hidden_size", "depth", "num_heads")
    return dict(zip(names, SIZES[found[1]], strict=True), patch_size=int(found[2]))


# ----------------------------------------------------------------------- what the network sees


def positions(dim, rows, columns):
    """Fixed position embeddings (1,N,dim) of a grid of N tokens, row by row.

    Vaswani et al. 2017, section 3.5, for each axis: the first half of the channels is of the column
    and the second of the row (the published order), each as all sines and then all cosines, with
    dim / 4 frequencies from 1 down to nearly 1/10000.
    """
    i = torch.arange(dim // 4, dtype=torch.float64)
    frequencies = 10000 ** (-i / (dim // 4))

    def one_axis(place):
        angles = place[:, None] * frequencies  # (N,dim/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (N,dim/2)

    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)  # (N,)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)  # (N,)
    return torch.cat([one_axis(column), one_axis(row)], dim=1).float()[None]  # (1,N,dim)


class PatchEmbed(nn.Module):
    """z (B,C,h,w) -> tokens (B,N,dim), N = h/patch * w/patch, row by row."""

    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, z):
        x = rearrange(self.proj(z), "b d i j -> b (i j) d")  # (B,N,dim)
        return x.contiguous()  # else every operation to come would walk across the memory


class TimestepEmbed(nn.Module):
    """(B,) timesteps -> (B,dim)."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, FREQUENCIES, "adm").to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    """(B,) labels -> (B,dim); the last row of the table is that of "no label"."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


# ------------------------------------------------------------------------------------- the blocks


def modulate(x, shift, scale):
    """(1 + scale) * norm(x) + shift; x (B,N,D), shift and scale (B,D)."""
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def linear(layer, x):
    """A linear layer on tokens: (B,N,D_in) -> (B,N,D_out).

    On a CPU as a convolution of size 1 over N x 1 pixels, channels last, because its library is up
    to twice as fast there as that of matrix products. Nothing is copied.
    """
    if x.device.type != "cpu":
        return layer(x)
    b, n, _ = x.shape
    # On one thread PyTorch goes to that library from 16 images on: cut a small batch up.
    parts = 8 if b < 16 and n % 8 == 0 else 1
    x = rearrange(x, "b (p n) d -> (b p) d n 1", p=parts)  # (B*parts,D_in,N/parts,1)
    x = F.conv2d(x, layer.weight[:, :, None, None], layer.bias)  # (B*parts,D_out,N/parts,1)
    return rearrange(x, "(b p) d n 1 -> b (p n) d", p=parts)


class Attention(nn.Module):
    """Every token attends to all tokens of its image; the heads split the channels."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        qkv = linear(self.qkv, x)  # (B,N,3*D)
        # Views of it: three times (B,num_heads,N,D/num_heads).
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.num_heads)
        return linear(self.proj, rearrange(attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Each token by itself: (B,N,D) -> (B,N,hidden) -> (B,N,D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return linear(self.fc2, F.gelu(linear(self.fc1, x), approximate="tanh"))


def adaptive(dim, parts):
    """The layer that turns c (B,D) into `parts` shifts, scales and gates: (B,parts*D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Block(nn.Module):
    """x (B,N,D), c (B,D) -> (B,N,D): figure 3, "DiT Block with adaLN-Zero"."""

    def __init__(self, dim, num_heads, hidden):
        super().__init__()
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, hidden)
        self.adaLN_modulation = adaptive(dim, 6)

    def forward(self, x, c):
        # In the type of x, which under autocast is fp32: norms and sums over blocks stay exact.
        parts = self.adaLN_modulation(c).to(x.dtype).chunk(6, dim=1)  # six times (B,D)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x = torch.addcmul(x, gate_1[:, None], self.attn(modulate(x, shift_1, scale_1)))
        return torch.addcmul(x, gate_2[:, None], self.mlp(modulate(x, shift_2, scale_2)))


class FinalLayer(nn.Module):
    """x (B,N,D), c (B,D) -> the pixels of every patch (B,N,patch*patch*C_out)."""

    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = adaptive(dim, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).to(x.dtype).chunk(2, dim=1)
        return linear(self.linear, modulate(x, shift, scale))


class DiT(nn.Module):
    """net(z, t, y=None) -> (B,C,h,w), or (B,2C,h,w) with learn_sigma.

    z (B,C,h,w) latents plus noise, t (B,) timesteps from 0, y (B,) int labels or None; the label
    num_classes (net.null) means "no label", and so does None. num_classes may be 0.

    shape           (C,h,w) of the latents, h and w multiples of patch_size
    hidden_size     channels of a token
    depth           blocks
    num_heads       attention heads, which split the channels
    patch_size      side of the square of latents that becomes one token
    mlp_ratio       hidden channels of a block's MLP, in hidden_size
    learn_sigma     the second C channels are v, about -1 ... 1: log beta_tilde ... log beta
    use_checkpoint  in training, keep only the blocks' inputs and compute the rest again
    BadInput for settings that do not fit each other. net.settings holds all but the last.
    """

    def __init__(
        self,
        shape,
        num_classes,
        *,
        hidden_size,
        depth,
        num_heads,
        patch_size=2,
        mlp_ratio=4,
        learn_sigma=False,
        use_checkpoint=False,
    ):
        super().__init__()
        check_sizes(shape, hidden_size, depth, num_heads, patch_size)
        self.shape, self.null, self.use_checkpoint = tuple(shape), num_classes, use_checkpoint
        self.settings = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
        self.settings |= {"patch_size": patch_size, "mlp_ratio": mlp_ratio}
        self.settings |= {"learn_sigma": learn_sigma}
        channels, rows, columns = shape[0], shape[1] // patch_size, shape[2] // patch_size
        out = patch_size**2 * channels * (2 if learn_sigma else 1)  # numbers of a patch
        self.x_embedder = PatchEmbed(channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbed(hidden_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size)
        self.register_buffer("pos_embed", positions(hidden_size, rows, columns))
        hidden = round(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, out)
        self.initialise()

    def initialise(self):
        """Draw the weights from the published distributions (section 4 and the code of it)."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                # A patch is a vector to the convolution: fan in and out of a linear layer.
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                nn.init.zeros_(layer.bias)
        first, _, last = self.t_embedder.mlp
        for layer in (first, last, self.y_embedder.embedding_table):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, z, t, y=None):
        y = torch.full_like(t, self.null, dtype=torch.int64) if y is None else y
        c = self.t_embedder(t) + self.y_embedder(y)  # (B,D)
        x = self.x_embedder(z) + self.pos_embed  # (B,N,D), N = h/patch_size * w/patch_size
        for block in self.blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        x = self.final_layer(x, c)  # (B,N,patch_size^2*C_out)
        (_, h, _), p = self.shape, self.settings["patch_size"]
        return rearrange(x, "b (i j) (p q c) -> b c (i p) (j q)", i=h // p, p=p, q=p)  # (B,C,h,w)


def check_sizes(shape, hidden_size, depth, num_heads, patch_size):
    """BadInput for latents of shape (C,h,w) that cannot be cut, or channels that do not split."""
    (_, h, w), p = shape, patch_size
    if h % p or w % p:
        fit = " or ".join(str(p) for p in PATCHES if not h % p and not w % p)
        raise cli.BadInput(
            f"latents of {h}x{w} cannot be cut into patches of {p}x{p}: choose a --model with a "
            f"patch of {fit}, or a --size that gives latents with sides that are multiples of {p}"
        )
    if depth < 1 or hidden_size % 4 or hidden_size % num_heads:
        raise cli.BadInput(
            f"a transformer of width {hidden_size}, depth {depth} and {num_heads} heads cannot be "
            "built: the width must be a multiple of 4 and of the heads, the depth at least 1"
        )


# ------------------------------------------------------------- the loss: section 3.1, IDDPM eq. 16


def hybrid_loss(net, z0, t, eps, chain, y, prediction="eps"):
    """L_simple of each latent, (B,), and L_hybrid where the network gives the variance, too.

    z0, eps (B,C,h,w); t, y (B,); chain is improved_ddpm.make_chain's, of all timesteps.
    """
    z_t = q_sample(z0, t, eps, chain.alpha_bar)  # (B,C,h,w)
    out = net(z_t, t, y)  # (B,C,h,w) or (B,2C,h,w)
    target = target_of(prediction, z0, eps, chain.alpha_bar[t])
    losses = (target - out[:, : z0.shape[1]]).square().mean(dim=(1, 2, 3))
    if out.shape[1] > z0.shape[1]:
        vlb = hybrid(out, z0, z_t, t, chain, prediction=prediction, discrete=False)
        losses = losses + 0.001 * vlb.float()
    return losses


# --------------------------------------------------------------------------- sampling, training


def rows_of(cfg, alpha_bar, pairs):
    """The steps of the sampler: ldm_cfg's, or ancestral ones with the variance that was learned."""
    if cfg.sampler != "ddpm" or not cfg.learn_sigma:
        return ldm_cfg.rows_of(cfg, alpha_bar, pairs)
    a = [alpha_bar[t].item() for t, _ in pairs] + [1.0]
    return [learned_row(a[i], a[i + 1], cfg.prediction) for i in range(len(pairs))]


def make_net(cfg, z_shape, num_classes):
    """The transformer cfg.model for latents z_shape (C,h,w)."""
    how = {"learn_sigma": cfg.learn_sigma, "use_checkpoint": cfg.use_checkpoint}
    net = DiT(z_shape, num_classes, **parse_size(cfg.model), **how)
    return net.to(memory_format=torch.channels_last)


def train(cfg, world):
    """All stages but the evaluation."""
    ds = datasets.of(cfg)
    if world.is_main:
        print(f"{ds.name}: {len(ds)} images {ds.shape}, {ds.num_classes} classes")
    ae = ldm_cfg.train_autoencoder(cfg, world, ds)
    if cfg.stage == "autoencoder":
        return
    latents = ldm_cfg.encode(cfg, world, ds, ae)
    if cfg.stage == "latents":
        return
    chain = make_chain(alpha_bar_of(cfg).to(world.device))
    seeds = cli.parse_seeds(cfg.seeds, cfg.n)
    torch.manual_seed(cfg.seed)
    net = make_net(cfg, latents.z_shape, ds.num_classes).to(world.device)
    run = ldm_cfg.latent_run(cfg, world, latents, net, ae)
    labels = cli.labels_for(seeds, range(max(1, net.null)))
    what = cfg.prediction + " and the variance" * cfg.learn_sigma
    how = f"predicts {what}, {cfg.schedule} schedule, T = {cfg.timesteps}"
    run.say(f"{cfg.model} from step {run.first} of {cfg.steps}, {how}")
    for step in run.steps():
        for part in run.parts(step):
            z0, y = ldm_cfg.draw_latents(run, part)  # (b,C,h,w), (b,)
            y = run.hide(part, y, cfg.label_dropout)
            t, eps = run.uniform(part, cfg.timesteps), run.noise(part, z0.shape)
            losses = hybrid_loss(run.model, z0, t, eps, chain, y, cfg.prediction)
            run.backward(losses, t / cfg.timesteps)
        run.descend()
        if run.due(cfg.sample_every):
            walk = partial(ldm_cfg.sample, world.for_sampling(run.ema), make_rows=rows_of)
            walk = partial(walk, cfg, latents.z_shape)
            with sharding.unsharded(run.ema):  # ranks draw different numbers of samples
                make = partial(ldm_cfg.draw, walk, ae, latents.scale, cfg, world, seeds, labels)
                run.save_grid(make)
            del walk  # what it has recorded on a GPU needs memory
    last_samples(cfg, world, SAMPLING, sample_checkpoint)


# ------------------------------------------------------------------------------------- commands


def load_net(path, device, ema=None):
    """As ldm_cfg.load_net, for checkpoints of this script."""
    return ldm_cfg.load_net(path, device, ema, script="dit", config=Config, make=make_net)


sample_checkpoint = partial(ldm_cfg.sample_checkpoint, load=load_net, make_rows=rows_of)


def load_published(path, *, num_heads=None):
    """The DiT, float32, of a file or folder as networks.published.dit.read_dit takes it."""
    from networks.published.dit import check_state, read_dit

    found = read_dit(path, SIZES.values(), positions, num_heads)
    with torch.device("meta"):
        net = DiT(found["shape"], found["num_classes"], **found["settings"])
    check_state(net.state_dict(), found["state"], path)
    net.load_state_dict(found["state"], assign=True)
    return net


def convert(cfg):
    """Write the published network cfg.published and its autoencoder into OUT/ckpt.pt.

    BadInput for files that hold something else, and for parts that do not fit each other.
    """
    from networks.kl_autoencoder import load_pretrained
    from networks.published import dit as published

    path, ae_path = Path(cfg.published), "" if cfg.ae == Config.ae else cfg.ae
    out = Path(cfg.out or Path("runs", path.stem))
    published.check_paths(path, ae_path, out)
    ae, facts = load_pretrained(ae_path or path)
    state, values, words = published.as_checkpoint(path, load_published(path), SIZES, ae, facts)
    values["data"] = "imagenet" if cfg.data == Config.data else cfg.data
    # Decoding 256x256 images takes 0.2 GB for each. 0.9999 is the paper's decay.
    settings = Config(out=str(out), batch_size=8, ema=(0.9999,), **values)
    state |= {"script": "dit", "config": json.loads(json.dumps(asdict(settings)))}
    with atomic_write(out / "ckpt.pt") as temporary:
        torch.save(state, temporary)
    print("\n".join([*words, f"checkpoint: {out / 'ckpt.pt'}"]))


def check(cfg):
    """Raise BadInput for a setting out of its range."""
    ldm_cfg.check(cfg, sizes="")
    parse_size(cfg.model)


def main():
    cfg = cli.parse(Config, __doc__, preset="configs/{data}_dit.yaml")
    if cfg.published:
        return convert(cfg)
    if cfg.sample:
        cfg = checkpoints.as_trained(cfg, (*SAMPLING, "batch_size", "timesteps"), cfg.sample, "dit")
    small = {"ae_steps": 4, "ae_channels": 32, "n": 8, "sample_steps": 4}
    cfg = cli.smoke(cfg, **small, n_eval=0, out="runs/smoke-dit")
    check(cfg)
    if cfg.sample:
        return launch(sample_checkpoint, cfg)
    if cfg.resume not in ("auto", "never"):
        checkpoints.load_checkpoint(cfg.resume, "dit", facts=True)  # before an hour's work
    model = re.sub("-.*/", "-xs/", cfg.model) if cfg.smoke else cfg.model  # of this patch size
    cfg = replace(cfg, model=model, out=cfg.out or f"runs/dit-{Path(cfg.data).stem}")
    ldm_cfg.run_stages(cfg, train, make_net)


if __name__ == "__main__":
    cli.entry(main)
