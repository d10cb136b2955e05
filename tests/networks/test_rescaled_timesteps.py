"""OpenAI's rescale_timesteps: of T timesteps, improved-diffusion's networks see t * 1000 / T."""

from runtime.commandline import BadInput

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from launching import refused, succeed
from openai_unet import forward, published, weights

import improved_ddpm
from networks.published.schedule import named_alpha_bar
from networks.published.unet import read_network

PUBLISH = "networks.published.__main__"
SMALL = dict(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: (path, float64 tensors)}: of improved-diffusion, and with resblock_updown."""
    found, folder = {}, tmp_path_factory.mktemp("openai")
    for name, updown in (("improved", False), ("guided", True)):
        state = weights(published(**SMALL, resblock_updown=updown))
        torch.save(state, folder / f"{name}.pt")
        found[name] = folder / f"{name}.pt", {k: v.double() for k, v in state.items()}
    return found


def opened(path, **given):
    given = dict(size=8, num_heads=4, num_head_channels=0) | given
    return improved_ddpm.load_net(path, "cpu", script="improved_ddpm", given=given)


@pytest.mark.parametrize("name, T, scale", [("improved", 4000, 0.25), ("guided", 4000, 1)])
def test_the_network_sees_the_timesteps_that_it_was_trained_with(name, T, scale, files):
    path, state = files[name]
    net, cfg, *_ = opened(path, timesteps=T, schedule="cosine")
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 1502, 3999])
    expected = forward(state, x.double(), t * scale, None, lambda _: 4, False)
    other = forward(state, x.double(), t * (1.25 - scale), None, lambda _: 4, False)
    with torch.no_grad():
        ours = net(x, t)
    assert cfg.timesteps == T and expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-4 < 1e-2 < (ours - other).abs().max()


def test_where_t_is_what_it_would_be_nothing_is_said_of_it(files, capsys):
    net, *_ = opened(files["improved"][0])
    assert net.time_scale == 1 and "rescale" not in capsys.readouterr().out
    opened(files["improved"][0], timesteps=4000)
    assert "new_order False, rescale_timesteps True; for others" in capsys.readouterr().out


def test_a_pipeline_of_it_has_the_timesteps_of_which_it_sees_whole_numbers(files, tmp_path):
    path, state = files["improved"]
    how = ["--size", 8, "--schedule", "cosine", "--timesteps", 2000]
    done = succeed(PUBLISH, path, "--out", tmp_path / "a", *how)
    assert f"{path}: written as its 1000 timesteps 0, 2, ..., 1998" in done.out
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "a", subfolder="scheduler")
    assert scheduler.config.num_train_timesteps == 1000
    table = named_alpha_bar("cosine", 2000)[::2]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-3, atol=1e-7)
    unet = UNet2DModel.from_pretrained(tmp_path / "a" / "unet").double()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    t = torch.tensor([7, 999])
    with torch.no_grad():
        theirs = unet(x, t).sample
    assert (theirs - forward(state, x, t, None, lambda _: 4, False)).abs().max() < 1e-5
    assert read_network(tmp_path / "a")["time_scale"] == 1


def test_what_no_pipeline_expresses_is_refused_or_typed_otherwise(files, tmp_path):
    how = [files["improved"][0], "--out", tmp_path / "a", "--size", 8]
    told = refused(PUBLISH, *how, "--timesteps", 400)
    assert "cannot express t * 1000 / 400: expected --timesteps 1000 or a multiple, as" in told
    succeed(PUBLISH, *how, "--timesteps", 400, "--no-rescale-timesteps")
    config = json.loads((tmp_path / "a" / "scheduler" / "scheduler_config.json").read_text())
    assert config["num_train_timesteps"] == 400
    told = refused(PUBLISH, *how, "--rescale-timesteps")
    assert "--rescale-timesteps does nothing where --timesteps is 1000" in told
    told = refused(PUBLISH, tmp_path / "a", "--out", tmp_path / "b", "--no-rescale-timesteps")
    assert f"--rescale-timesteps: {tmp_path / 'a'}" in told and "has its own" in told


def test_the_state_of_an_optimizer_is_told_from_weights(tmp_path):
    net = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    adam.step()
    path = tmp_path / "opt160000.pt"
    torch.save(adam.state_dict(), path)
    told = r"holds the state of an optimizer, no network: name the weights .* beside it"
    with pytest.raises(BadInput, match=told):
        read_network(path)
    path = path.rename(tmp_path / "opt.bin")
    with pytest.raises(BadInput, match=told):
        read_network(path)
    names = {"step": 3, "model": net.state_dict(), "opt": {}, "ema": {}, "version": "2", "k": 0}
    torch.save(names, tmp_path / "model-1.pt")
    with pytest.raises(BadInput, match="it holds 'step', 'model', 'opt', 'ema' and 2 more$"):
        read_network(tmp_path / "model-1.pt")
