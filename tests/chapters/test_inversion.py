"""From an image to its noise and back: against eq. 12 turned around, and against Gaussian data."""

from runtime.commandline import BadInput
from runtime.pictures import to_uint8

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_images
from gaussian_data import Gaussian, flow
from PIL import Image

import ddim
import ddpm_pixel as ch1
from image_data import datasets

SHAPE = (1, 16, 16)
ONE = torch.tensor(1.0, dtype=torch.float64)


def end(way):
    *_, (x, _) = way
    return x


def gaussian_images(n=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 2, 2, dtype=torch.float64, generator=generator)


# -------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_step_up_is_equation_12_without_noise(prediction):
    alpha_bar, x = ch1.make_alpha_bar("cosine", 100), gaussian_images().clamp(-1, 1)
    pairs, asked = ddim.subsequence(100, 6), []

    class Net(torch.nn.Module):
        label = None

        def forward(self, x, t, y=None):
            a, eps = alpha_bar[t[0]], 0.8 * torch.sin(2 * x + t[0])
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            asked.append((int(t[0]), x, eps))
            v = a.sqrt() * eps - (1 - a).sqrt() * x0
            return {"eps": eps, "v": v, "x0": x0}[prediction]

    ts, a = [t for t, _ in reversed(pairs)], ONE
    way = ddim.encode(Net(), alpha_bar, pairs, x, prediction=prediction, clip=False)
    for step, (t, (x_next, _)) in enumerate(zip(ts, way, strict=True)):
        where, x, eps = asked[-1]
        assert where == (ts[step - 1] if step else ts[0])
        b = alpha_bar[t]
        x0_hat = (x - (1 - a).sqrt() * eps) / a.sqrt()  # x itself in the first step
        expected = b.sqrt() * x0_hat + (1 - b).sqrt() * eps
        # In float64; p and q, which reach 20000 at the last timestep, cost four digits.
        torch.testing.assert_close(x_next, expected, atol=1e-9, rtol=1e-9)
        a = b


def test_codes_and_reconstructions_of_gaussian_data_become_exact():
    """Over whole chains of more and more timesteps; with T alone the first noise gets smaller."""
    x_T, off, lost = gaussian_images(), [], []
    for T in (200, 400, 800):
        alpha_bar = ch1.make_alpha_bar("linear", T)
        net, pairs, x0 = Gaussian(alpha_bar), ddim.subsequence(T, T), flow(x_T, alpha_bar[-1], ONE)
        code = end(ddim.encode(net, alpha_bar, pairs, x0, clip=False))
        back = end(ddim.decode(net, alpha_bar, pairs, code, clip=False))
        off.append((code - x_T).abs().max().item())
        lost.append((back - x0).abs().max().item())
    assert off[0] < 0.1 and lost[0] < 0.05, (off, lost)
    for errors in (off, lost):  # first order: half as large each time
        assert errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1], (off, lost)


def test_more_steps_lose_less_even_with_a_wrong_network_and_a_steep_schedule():
    """Unclipped, the first step down a cosine schedule enlarges the network's error by hundreds."""
    alpha_bar = ch1.make_alpha_bar("cosine", 1000)
    net, lost = Gaussian(alpha_bar, wrong=0.02), []
    x0 = flow(gaussian_images(), alpha_bar[-1], ONE).float()
    for steps in (10, 20, 40, 80):
        pairs = ddim.subsequence(1000, steps)
        code = end(ddim.encode(net, alpha_bar, pairs, x0))
        lost.append(
            ((end(ddim.decode(net, alpha_bar, pairs, code)) - x0) / 2).square().mean().item()
        )
    assert lost[0] < 0.004
    assert all(after < 0.5 * before for before, after in zip(lost, lost[1:], strict=False)), lost


# ------------------------------------------------------------------------------------- slerp


def test_slerp_of_right_angles_is_sine_and_cosine():
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    a[:, 0, 0, 0], b[:, 0, 1, 1] = 3.0, 3.0
    weights = torch.linspace(0, 1, 7)
    path = ddim.slerp(a, b, weights)
    assert path.shape == (2, 7, 1, 2, 2)
    angle = weights * torch.pi / 2
    torch.testing.assert_close(path[0, :, 0, 0, 0], 3 * angle.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(path[1, :, 0, 1, 1], 3 * angle.sin(), atol=1e-6, rtol=0)


def test_slerp_keeps_the_norm_the_ends_and_even_angles():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 2, 4, 5, generator=generator) for _ in range(2))
    b *= (
        a.flatten(1).norm(dim=1)[:, None, None, None]
        / b.flatten(1).norm(dim=1)[:, None, None, None]
    )
    path = ddim.slerp(a, b, torch.linspace(0, 1, 11))
    torch.testing.assert_close(path[:, 0], a, atol=1e-6, rtol=0)
    torch.testing.assert_close(path[:, -1], b, atol=1e-6, rtol=0)
    norms = path.flatten(2).norm(dim=2)  # (3,11)
    torch.testing.assert_close(norms, norms[:, :1].expand(3, 11), atol=1e-5, rtol=0)
    cosines = torch.cosine_similarity(path[:, 1:].flatten(2), path[:, :-1].flatten(2), dim=2)
    torch.testing.assert_close(cosines, cosines[:, :1].expand(3, 10), atol=1e-5, rtol=0)


def test_slerp_of_parallel_codes_is_the_straight_line():
    a = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    path = ddim.slerp(a, 2 * a, torch.tensor([0.0, 0.25, 1.0]))
    for image, factor in zip(path[0], (1.0, 1.25, 2.0), strict=True):
        torch.testing.assert_close(image, factor * a[0])


# ------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """(path of a tiny checkpoint, its network): random, but with something to say."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": ()}
    how = {"schedule": "cosine", "timesteps": 50, "data": toy[1], "data_root": toy[3]}
    cfg = ch1.Config(**sizes, **how)
    torch.manual_seed(0)
    net = ch1.UNet(SHAPE, 2, cfg)
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
    names = sorted(path.name for path in (Path(toy[1])).iterdir())
    state = {
        "script": "ddpm_pixel",
        "config": asdict(cfg),
        "step": 1,
        "ema": net.state_dict(),
        "shape": list(SHAPE),
        "class_names": names,
    }
    torch.save(state, folder / "ckpt.pt")
    return str(folder / "ckpt.pt"), net.eval()


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["ddim.py", *map(str, arguments), "--gpus", "0"])
    ddim.main()


def test_encode_draws_images_above_their_reconstructions(run, tmp_path, monkeypatch, capsys, toy):
    command(
        monkeypatch, "--encode", run[0], "--n", 3, "--encode-steps", "5,80,15", "--out", tmp_path
    )
    printed = re.findall(r"(\d+) steps +(\d\.\d+)\n", capsys.readouterr().out)
    assert [int(steps) for steps, _ in printed] == [5, 15, 50]  # sorted, and 80 is more than T
    errors = [float(error) for _, error in printed]
    assert errors[0] > errors[1] > errors[2]
    sheet = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    assert sheet.shape == (4 * 18 + 2, 3 * 18 + 2)
    ds = datasets.load(toy[1], toy[3], split="test")
    for i in range(3):
        np.testing.assert_array_equal(sheet[2:18, 2 + 18 * i : 18 + 18 * i], ds.images[i, :, :, 0])
    last = sheet[2 + 3 * 18 : 18 + 3 * 18, 2:18].astype(float)
    drawn = ((last - ds.images[0, :, :, 0]) / 255) ** 2
    assert drawn.mean() < 4 * errors[2] + 1e-5  # the picture shows what the figure says
    assert (tmp_path / "reconstruction-error.png").exists()


def test_interpolation_ends_in_the_samples_of_its_seeds(run, tmp_path, monkeypatch):
    common = ["--classes", "0", "--sample-steps", 5, "--out", tmp_path]
    command(monkeypatch, "--interpolate", run[0], "--seeds", "3,9,4,4", *common)
    sheet = np.asarray(Image.open(tmp_path / "interpolation.png")).astype(int)
    assert sheet.shape == (2 * 18 + 2, 11 * 18 + 2)
    command(monkeypatch, "--sample", run[0], "--seeds", "3,9,4", *common)
    samples = np.load(tmp_path / "samples.npz")["arr_0"][:, :, :, 0].astype(int)
    for row, column, sample in ((0, 0, 0), (0, 10, 1), (1, 0, 2), (1, 5, 2), (1, 10, 2)):
        y, x = 2 + 18 * row, 2 + 18 * column
        assert np.abs(sheet[y : y + 16, x : x + 16] - samples[sample]).max() <= 1
    middle = sheet[2:18, 2 + 18 * 5 : 18 + 18 * 5]
    assert np.abs(middle - samples[0]).max() > 10 and np.abs(middle - samples[1]).max() > 10


def test_interpolation_of_images_ends_in_their_reconstructions(run, tmp_path, monkeypatch, toy):
    common = ["--sample-steps", 8, "--spacing", "quadratic", "--out", tmp_path]
    command(monkeypatch, "--interpolate", run[0], "--data", toy[1], "--seeds", "2,5", *common)
    sheet = np.asarray(Image.open(tmp_path / "interpolation.png")).astype(int)
    ds = datasets.load(toy[1], toy[3], split="test")
    x0, _ = ds.batch(np.array([2, 5]))
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", 50), ddim.subsequence(50, 8, "quadratic")
    code = end(ddim.encode(run[1], alpha_bar, pairs, x0))  # without labels
    back = to_uint8(end(ddim.decode(run[1], alpha_bar, pairs, code))).numpy()[:, :, :, 0]
    assert np.abs(back[0].astype(int) - back[1]).max() > 10
    for column, image in ((0, 0), (10, 1)):
        x = 2 + 18 * column
        assert np.abs(sheet[2:18, x : x + 16] - back[image]).max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--sample is missing"),
        (["--sample", "a", "--encode", "b"], "--sample and --encode: one at a time"),
        (["--encode", "a", "--encode-steps", "5,x"], "--encode-steps 5,x: expected numbers"),
        (["--encode", "a", "--encode-steps", "0"], "--encode-steps 0: expected numbers"),
        (["--encode", "a", "--eta", "0.5"], "--encode needs a way without fresh noise"),
        (["--interpolate", "a", "--eta", "1"], "--interpolate needs a way without fresh"),
        (["--sample", "a", "--eta", "1.5"], "--eta must be from 0 to 1"),
        (["--sample", "CKPT", "--sample-steps", "51"], "type a number from 1 to 50"),
        (["--interpolate", "CKPT", "--seeds", "1"], "two make a row"),
        (["--interpolate", "CKPT", "--guidance", "1"], "give --guidance some --classes"),
        (["--encode", "CKPT", "--seeds", "1000"], "test images 0 to"),
        (["--encode", "CKPT", "--data", "WIDE"], "choose the data it was trained on"),
    ],
)
def test_bad_input_is_one_line(run, monkeypatch, arguments, message, tmp_path):
    wide = str(write_images(tmp_path / "wide", 2, width=24)) if "WIDE" in arguments else ""
    arguments = [{"CKPT": run[0], "WIDE": wide}.get(a, a) for a in arguments]
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        command(monkeypatch, *arguments, "--out", tmp_path)
    assert "\n" not in str(caught.value)
