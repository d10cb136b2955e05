"""What a denoiser does at each level of noise: its loss as curves, its guesses as a picture."""

from runtime.pictures import save_grid, to_uint8
from runtime.plots import plot_lines

import numpy as np
import torch

from image_data.batches import spaced
from kernels import gaussian

SIGMAS = np.geomspace(0.005, 50, 25).tolist()  # of the curves
SHOWN = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50)  # in the picture
IMAGES, ROWS = 64, 4  # of the curves and of the picture


def loss_over_sigma(loss, net, y, labels, world):
    """The mean loss of images y (B,C,H,W), labels (B,) or None, at each of SIGMAS: a list.

    loss(net, y, sigma, eps, labels=...) gives (B,), sigma (B,1,1,1) and eps like y. Each rank
    computes its share of them, and all return the whole.
    """
    eps = gaussian(y.shape, torch.arange(len(y)), 0, y.device)

    @torch.no_grad()
    def losses(part, tick):
        each = (torch.full((len(y), 1, 1, 1), SIGMAS[i], device=y.device) for i in part)
        found = [loss(net, y, sigma, eps, labels=labels).mean() for sigma in each]
        tick(len(found))
        return torch.stack(found)

    n = len(SIGMAS)
    with world.autocast():
        return world.in_parts(losses, n, n, n, "loss over sigma").tolist()


def save_figures(folder, ds, world, *, loss, denoise, nets):
    """loss-sigma.png of networks {name: network} in eval mode; denoiser.png of the last of them.

    loss is that of loss_over_sigma; denoise(net, x, sigma, y=labels) gives D (B,C,H,W). Images are
    of the Dataset ds, evenly spaced. The picture has x in a row and D in the next, sigma rising.
    """
    y, labels = (v.to(world.device) for v in ds.batch(spaced(len(ds), IMAGES)))
    *_, net = nets.values()
    labels = labels if net.null else None
    found = {
        name: (SIGMAS, loss_over_sigma(loss, other, y, labels, world))
        for name, other in nets.items()
    }
    if not world.is_main:
        return
    plot_lines(folder / "loss-sigma.png", {"loss": found}, xlabel="sigma", logx=True)
    sigma, pictures = torch.tensor(SHOWN, device=y.device).view(-1, 1, 1, 1), []
    for i in range(min(ROWS, len(y))):
        eps = gaussian((len(SHOWN), *ds.shape), torch.arange(len(SHOWN)), i, y.device)
        x, label = y[i] + sigma * eps, None if labels is None else labels[i].expand(len(SHOWN))
        with torch.no_grad(), world.autocast():
            pictures += [x, denoise(net, x, sigma, y=label)]
    save_grid(to_uint8(torch.cat(pictures)), folder / "denoiser.png", len(SHOWN))
