"""Which chapter a published U-Net belongs to, and `python -m networks.published`."""

from runtime.commandline import BadInput

import contextlib
import json
import os
import signal

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from launching import run, succeed
from safetensors.torch import load_file, save_file

import ddpm_pixel
import improved_ddpm
from kernels import gaussian
from networks.adm_unet import UNet
from networks.published.schedule import named_alpha_bar
from networks.published.unet import read_network, save_diffusers

COMMAND = "networks.published.__main__"
PLAIN = dict(
    style="ddpm",
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
MORE = {
    "adm": dict(style="adm"),
    "scale and shift": dict(use_scale_shift_norm=True),
    "up and down": dict(resblock_updown=True),
    "variance": dict(learn_sigma=True),
    "head channels": dict(num_head_channels=8),
    "part of a channel": dict(channel_mult=(1, 1.5)),
}


def export(folder, schedule="cosine", T=20, **settings):
    """A network of these settings with random weights, written to `folder`."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 0, **{**PLAIN, **settings}).eval()
    net = net.to(memory_format=torch.channels_last)  # as the chapters have it: the same rounding
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    facts = dict(alpha_bar=named_alpha_bar(schedule, T), schedule=schedule)
    save_diffusers(folder, net.settings, net.state_dict(), (1, 8, 8), 0, facts)
    return net


def output(net):
    x, t = gaussian((2, 1, 8, 8), torch.tensor([3, 4]), 0, "cpu"), torch.tensor([3, 19])
    with torch.no_grad():
        return net(x, t)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "sigmoid-beta"])
@pytest.mark.parametrize(
    "rest", [(1000, 0.001), (50, 0.001), (400, 0.1), (100, 0.001, 1e-4, 0.02), (9, 0.0, 0.0, 0.5)]
)
def test_the_schedules_by_name_are_those_of_chapter_1(schedule, rest):
    ours = named_alpha_bar(schedule, *rest)
    assert torch.equal(ours, ddpm_pixel.make_alpha_bar(schedule, *rest))


def test_the_network_of_ddpm_is_chapter_1s(tmp_path):
    net = export(tmp_path)
    for script in ((), "ddpm_pixel", ("improved_ddpm", "ddpm_pixel")):
        assert read_network(tmp_path, script)["script"] == "ddpm_pixel"
    for chapter in (ddpm_pixel, improved_ddpm):
        found, cfg, shape, names, alpha_bar = chapter.load_net(tmp_path, "cpu")
        assert torch.equal(output(found), output(net)) and (shape, names) == ((1, 8, 8), [])
        assert (cfg.schedule, cfg.timesteps) == ("cosine", 20)
        torch.testing.assert_close(alpha_bar, named_alpha_bar("cosine", 20), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", MORE)
def test_what_has_more_is_of_the_next_chapter(name, tmp_path):
    net = export(tmp_path, **MORE[name])
    assert read_network(tmp_path)["script"] == "improved_ddpm"
    found, cfg, *_ = improved_ddpm.load_net(tmp_path, "cpu")
    assert torch.equal(output(found), output(net))
    assert cfg.learn_sigma == net.settings["learn_sigma"] and cfg.style == net.settings["style"]
    with pytest.raises(BadInput, match=r"type python improved_ddpm\.py --sample "):
        ddpm_pixel.load_net(tmp_path, "cpu")


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            dict(trained_betas=[0.1, 0.0], num_train_timesteps=2),
            "alpha_bar must fall at every step",
        ),
        (dict(trained_betas=[0.1, 1.0], num_train_timesteps=2), "leaves no image at T"),
        (dict(variance_type="learned_range"), "variance_type 'learned_range' is not supp"),
    ],
)
def test_a_scheduler_that_is_not_ours_is_refused(changes, told, tmp_path):
    export(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(BadInput, match=told):
        read_network(tmp_path)


def test_flags_say_the_schedule_of_a_network_that_comes_without(tmp_path):
    net = export(tmp_path / "whole")
    flags = ["--schedule", "sigmoid", "--timesteps", 50, "--prediction", "v", "--variance", "large"]
    bare, out = tmp_path / "whole" / "unet", tmp_path / "again"
    done = succeed(COMMAND, bare, "--out", out, *flags)
    assert f"{bare} has no scheduler: taken as sigmoid, T = 50, predicting v" in done.out
    assert "type --schedule" in done.out and str(out) in done.out
    scheduler = DDPMScheduler.from_pretrained(out, subfolder="scheduler")
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), named_alpha_bar("sigmoid", 50), rtol=1e-4, atol=1e-9
    )
    told = scheduler.config
    assert (told.prediction_type, told.variance_type) == ("v_prediction", "fixed_large")
    found, cfg, _, _, alpha_bar = ddpm_pixel.load_net(out, "cpu")
    assert (cfg.prediction, cfg.variance, cfg.schedule) == ("v", "large", "sigmoid")
    assert torch.equal(output(found), output(net)) and len(alpha_bar) == 50
    theirs = UNet2DModel.from_pretrained(out, subfolder="unet").eval()
    torch.testing.assert_close(output(lambda x, t: theirs(x, t).sample), output(net))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--out", "OUT", "--schedule", "cosine"], "has its own; leave it out"),
        (["--out", "OUT", "--ema", "0.5"], "--ema 0.5"),
        (["--out", "OUT", "--timesteps", "0"], "--timesteps must be greater than 0"),
        ([], "--out, the folder to write"),
        (["--out", "OUT", "--threshold", "none"], "unknown flag --threshold"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, told, tmp_path):
    export(tmp_path / "net")
    out = tmp_path / "out"
    flags = [out if flag == "OUT" else flag for flag in flags]
    done = run(COMMAND, tmp_path / "net", *flags)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
    assert not out.exists()


def test_alpha_bar_must_fall(tmp_path):
    export(tmp_path / "net")
    flags = ["--schedule", "cosine", "--alpha-min", 1]
    done = run(COMMAND, tmp_path / "net" / "unet", "--out", tmp_path / "out", *flags)
    assert done.code == 2 and "alpha_bar must fall" in done.err


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    export(tmp_path / "net")
    weights = tmp_path / "net" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    first = next(name for name in state if "conv" in name)
    state[first].view(-1)[3] = float("nan")
    save_file(state, weights)
    done = run(COMMAND, tmp_path / "net", "--out", tmp_path / "out")
    assert done.code == 2 and "holds numbers that are not finite" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/*.json", "unet/config.json"])
def test_a_pipe_in_a_pipeline_is_not_waited_for(name, tmp_path):
    def too_late(*about):
        raise TimeoutError

    export(tmp_path)
    (path,) = tmp_path.glob(name)
    path.unlink()
    os.mkfifo(path)
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        with contextlib.suppress(BadInput):
            read_network(tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
