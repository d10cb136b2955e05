"""Published layouts: our network and diffusers' UNet2DModel compute the same, both ways."""

from runtime.commandline import BadInput

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file, save_file

import ddpm_pixel
import improved_ddpm
from kernels import gaussian, sampling_update
from networks.adm_unet import UNet
from networks.published.unet import load_published, save_diffusers
from networks.published.unet_names import from_published, structure, to_diffusers

EARLIER = ("query", "key", "value", "proj_attn")
DDPM = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0)

# UNet2DModel's settings; the first is google/ddpm-cifar10-32 (Ho et al.), an eighth as wide.
THEIRS = {
    "ddpm": dict(
        DDPM,
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    ),
    "adm": dict(
        sample_size=(8, 12),
        block_out_channels=(16, 16, 32),
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        attn_norm_num_groups=4,
        out_channels=6,
        layers_per_block=1,
        num_class_embeds=5,
    ),
    "defaults": dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24),
        norm_num_groups=8,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ),
}

STYLE = {"ddpm": "ddpm", "adm": "adm", "defaults": "adm"}

# Settings of ours, with image shape and number of classes.
DDPM_OURS = dict(
    style="ddpm",
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
OURS = {
    "ddpm": (DDPM_OURS, (3, 8, 8), 0),
    "labels, heads, v": (
        dict(
            DDPM_OURS,
            attention_resolutions=(8, 4),
            channel_mult=(1, 1),
            num_heads=2,
            learn_sigma=True,
        ),
        (1, 8, 12),
        4,
    ),
    "scale and shift": (
        dict(DDPM_OURS, use_scale_shift_norm=True, dropout=0.1, norm_groups=8),
        (3, 8, 8),
        0,
    ),
    "up and down": (
        dict(DDPM_OURS, resblock_updown=True, num_head_channels=4, num_res_blocks=2),
        (3, 8, 8),
        0,
    ),
    "adm": (
        dict(
            model_channels=16,
            channel_mult=(1, 2, 3),
            num_res_blocks=1,
            attention_resolutions=(8, 4),
            num_head_channels=8,
            style="adm",
            use_scale_shift_norm=True,
            resblock_updown=True,
            learn_sigma=True,
        ),
        (3, 16, 8),
        3,
    ),
    "learned": (dict(DDPM_OURS, learn_sigma=True), (3, 8, 8), 0),
    "adm, convolutions": (dict(DDPM_OURS, style="adm", channel_mult=(1, 1.5, 2)), (3, 8, 8), 0),
}


def randomise(net, seed=0):
    """Every parameter away from its start: zero layers and unit norms would hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        scale = 0.3 if p.ndim == 1 else (p[0].numel() ** -0.5 if "emb" not in name else 0.1)
        p.data = scale * torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return net.eval()


def difference(ours, theirs, shape, labels, dtype):
    """Largest difference of the outputs, in units of their spread."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, *shape, generator=generator).to(dtype), torch.tensor([0, 17, 999])
    y = torch.tensor([0, 2, labels]) if labels else None
    with torch.no_grad():
        expected = theirs.to(dtype)(x, t, class_labels=y).sample
        got = ours.to(dtype)(x.to(memory_format=torch.channels_last), t, y)
    assert expected.std() > 0.1 and got.shape == expected.shape
    return ((got - expected).abs().max() / expected.std()).item()


def assert_same(ours, theirs, shape, labels):
    assert difference(ours, theirs, shape, labels, torch.float32) < 1e-5
    assert difference(ours, theirs, shape, labels, torch.float64) < 1e-12


def rebuilt(found):
    net = UNet(found["shape"], found["num_classes"], **found["settings"])
    net.load_state_dict(found["state"])
    return net.eval()


def facts(T=10, **changes):
    alpha_bar = torch.linspace(0.98, 0.05, T, dtype=torch.float64)
    return dict(alpha_bar=alpha_bar, **changes)


def keep(function, results):
    """function, with every result kept."""

    def run(*args, **kwargs):
        results.append(function(*args, **{**kwargs, "return_dict": True}))
        return results[-1]

    return run


def export(folder, name, **changes):
    """(network, shape, classes), written to `folder`."""
    settings, shape, classes = OURS[name]
    net = randomise(UNet(shape, classes, **settings))
    save_diffusers(folder, net.settings, net.state_dict(), shape, classes, facts(**changes))
    return net, shape, classes


@pytest.mark.parametrize("name", THEIRS)
def test_a_network_of_diffusers_computes_the_same_here(name, tmp_path):
    theirs = randomise(UNet2DModel(**THEIRS[name]))
    theirs.save_pretrained(tmp_path)
    found = load_published(tmp_path, null_label=True)
    assert found["facts"] == {} and found["settings"]["style"] == STYLE[name]
    assert_same(rebuilt(found), theirs, found["shape"], found["num_classes"])


@pytest.mark.parametrize("name", OURS)
def test_a_network_from_here_computes_the_same_in_diffusers(name, tmp_path):
    net, shape, classes = export(tmp_path, name, schedule="cosine", prediction="v")
    theirs, told = UNet2DModel.from_pretrained(
        tmp_path, subfolder="unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(told.values())
    assert_same(net, theirs, shape, classes)

    again = load_published(tmp_path)
    assert (again["shape"], again["num_classes"]) == (shape, classes)
    net.float()
    assert {k: torch.equal(v, again["state"][k]) for k, v in net.state_dict().items()} == (
        dict.fromkeys(again["state"], True)
    )
    heads = ("num_heads", "num_head_channels")  # heads of equal size are written as their size
    assert {k: v for k, v in again["settings"].items() if k not in heads} == (
        {k: v for k, v in net.settings.items() if k not in heads}
    )
    found = again["facts"]
    torch.testing.assert_close(found["alpha_bar"], facts()["alpha_bar"], rtol=1e-12, atol=0)
    variance = "learned" if net.settings["learn_sigma"] else "small"
    assert [found[k] for k in ("timesteps", "schedule", "prediction", "variance")] == [
        10,
        "other",  # whatever its name: no schedule has this table
        "v",
        variance,
    ]


def test_the_published_ddpm_network_has_our_keys_and_shapes_and_35_746_307_parameters():
    with torch.device("meta"):
        theirs = UNet2DModel(
            **dict(THEIRS["ddpm"], sample_size=32, block_out_channels=(128, 256, 256, 256))
            | dict(norm_num_groups=32)
        )
        ours = UNet(
            (3, 32, 32),
            0,
            style="ddpm",
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(16,),
        )
    assert theirs.num_parameters() == 35_746_307
    layout, s = structure(theirs.state_dict(), "memory")
    shapes = {k: v.shape for k, v in from_published(theirs.state_dict(), layout, s, "").items()}
    assert shapes == {k: v.shape for k, v in ours.state_dict().items()}
    assert {k: v.shape for k, v in to_diffusers(ours.state_dict(), s).items()} == (
        {k: v.shape for k, v in theirs.state_dict().items()}
    )


@pytest.mark.parametrize(
    "prediction, variance",
    [("eps", "small"), ("eps", "large"), ("eps", "learned"), ("v", "small"), ("x0", "learned")],
)
def test_an_exported_pipeline_walks_the_same_chain(prediction, variance, tmp_path, monkeypatch):
    name = "learned" if variance == "learned" else "ddpm"
    net, shape, _ = export(tmp_path, name, prediction=prediction, variance=variance)
    pipeline = DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    seeds, pairs = torch.tensor([5, -7]), [(t, t - 1) for t in reversed(range(10))]
    noise = {step: gaussian((2, *shape), seeds, step, "cpu") for step in range(-1, 10)}
    drawn = iter(range(-1, 10))
    for module in (pipeline_ddpm, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise[next(drawn)])
    seen = []
    monkeypatch.setattr(
        pipeline.scheduler, "step", keep(pipeline.scheduler.step, seen), raising=True
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=10, output_type="pt").images

    found = load_published(tmp_path)["facts"]
    alpha_bar, x = found["alpha_bar"], noise[-1]
    chain = improved_ddpm.make_chain(alpha_bar)
    for step, (t, t_prev) in enumerate(pairs):
        a, a_prev = alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        if found["variance"] == "learned":
            floor = chain.log_beta_tilde[0].item()
            row = improved_ddpm.learned_row(a, a_prev, found["prediction"], floor)
        else:
            row = ddpm_pixel.ancestral_row(a, a_prev, found["prediction"], found["variance"])
        with torch.no_grad():
            out = net(x, torch.full((2,), t))
        x, x0_hat = sampling_update(x, out, row, step=step, seeds=seeds)
        assert (x - seen[step].prev_sample).abs().max() < 1e-4
        assert (x0_hat - seen[step].pred_original_sample).abs().max() < 1e-4
    assert len(seen) == 10 and x.std() > 0.1
    assert (images - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def test_the_earlier_names_of_attention_are_read(tmp_path):
    net, _, _ = export(tmp_path, "ddpm")
    state = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    for new, old in zip(("to_q", "to_k", "to_v", "to_out.0"), EARLIER, strict=True):
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert any(".proj_attn." in k for k in state) and not any(".to_" in k for k in state)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    found = load_published(tmp_path)["state"]
    assert all(torch.equal(v, found[k]) for k, v in net.state_dict().items())


def test_a_single_file_is_enough_and_keywords_tell_the_rest(tmp_path):
    net, _, _ = export(tmp_path, "ddpm")
    single = tmp_path / "alone" / "net.safetensors"
    single.parent.mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(single)
    found = load_published(single, size=8, norm_groups=4)
    assert found["settings"] == net.settings and found["facts"] == {}
    (tmp_path / "unet" / "config.json").rename(single.with_name("config.json"))
    assert load_published(single)["settings"] == net.settings


@pytest.mark.parametrize(
    "config, schedule",
    [
        ({}, "linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "cosine"),
        ({"beta_end": 0.01}, "linear"),
        ({"beta_schedule": "sigmoid"}, "sigmoid-beta"),
        ({"beta_schedule": "sigmoid", "beta_start": 0.001, "beta_end": 0.01}, "sigmoid-beta"),
        ({"beta_schedule": "scaled_linear"}, "other"),
    ],
)
def test_schedules_of_diffusers_are_read_in_float64(config, schedule, tmp_path):
    theirs = DDPMScheduler(**config, variance_type="fixed_large", prediction_type="sample")
    export(tmp_path, "ddpm")
    theirs.save_pretrained(tmp_path / "scheduler")
    found = load_published(tmp_path)["facts"]
    alpha_bar = found["alpha_bar"]
    told = dict(timesteps=1000, schedule=schedule, alpha_min=0.001, prediction="x0")
    told |= dict(variance="large", sampler="DDPMScheduler", clip="clamp", spacing="leading")
    assert {name: found[name] for name in told} == told and not found["cannot"]
    assert alpha_bar.dtype == torch.float64
    torch.testing.assert_close(  # theirs is a product of 1000 float32 numbers
        alpha_bar.log(), theirs.alphas_cumprod.double().log(), rtol=2e-4, atol=1e-6
    )
    if schedule != "other":
        ends = found["beta_start"], found["beta_end"]
        typed = [config.get("beta_start", 1e-4), config["beta_end"]] if "beta_end" in config else 0
        assert list(ends) == (typed or [0, 0])
        expected = ddpm_pixel.make_alpha_bar(schedule, 1000, 0.001, *ends)
        torch.testing.assert_close(alpha_bar, expected, rtol=1e-11, atol=0)


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FILE = "diffusion_pytorch_model.safetensors"
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
REFUSED = {
    "activation": (lambda f: edit(f, UNET, act_fn="gelu"), "act_fn 'gelu' is not supported"),
    "blocks": (lambda f: edit(f, UNET, up_block_types=["SkipUpBlock2D"]), "SkipUpBlock2D"),
    "mixture": (lambda f: edit(f, UNET, freq_shift=0), "neither style"),
    "levels": (lambda f: edit(f, UNET, block_out_channels=[16, 48]), "block_out_channels"),
    "norm": (lambda f: edit(f, UNET, attn_norm_num_groups=2), "attn_norm_num_groups 2"),
    "betas": (lambda f: edit(f, SCHEDULER, trained_betas=None, beta_schedule="exp"), "'exp'"),
    "snr": (lambda f: edit(f, SCHEDULER, rescale_betas_zero_snr=True), "zero_snr"),
    "variance": (lambda f: edit(f, SCHEDULER, variance_type="learned"), "'learned'"),
    "prediction": (lambda f: edit(f, SCHEDULER, prediction_type="flow"), "'flow'"),
    "no json": (lambda f: (f / UNET).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / UNET).write_text("[]"), "settings by name"),
    "torn": (lambda f: truncate(f / "unet" / FILE), "no safetensors file"),
    "no weights": (lambda f: (f / "unet" / FILE).unlink(), "holds no weights"),
    "no folder": (lambda f: f.rename(f.with_name("moved")), "no such file or folder"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_such_network_is_refused(name, tmp_path):
    folder = tmp_path / "net"
    export(folder, "ddpm")
    load_published(folder)
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(BadInput, match=message):
        load_published(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    export(tmp_path, "ddpm")
    path = tmp_path / "unet" / FILE
    state = load_file(path)
    save_file({**state, "up_blocks.0.gate": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match="no place for: up_blocks.0.gate"):
        load_published(tmp_path)
    save_file({k: v for k, v in state.items() if "mid_block.attentions" not in k}, path)
    with pytest.raises(
        BadInput, match="lacks .* mid_block.attentions.0.group_norm.weight, .* more"
    ):
        load_published(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(channel_mult=(2, 2)), "first level of 32 channels"),
        (dict(num_heads=2, attention_resolutions=(8,)), "2 heads at levels of different channels"),
    ],
)
def test_what_unet2dmodel_cannot_express_is_refused(changes, message, tmp_path):
    net = UNet((3, 8, 8), 0, **{**DDPM_OURS, **changes})
    with pytest.raises(BadInput, match=message):
        save_diffusers(tmp_path, net.settings, net.state_dict(), (3, 8, 8), 0, facts())
    assert not list(tmp_path.iterdir())


def test_weights_of_other_settings_are_an_error(tmp_path):
    net = UNet((3, 8, 8), 0, **DDPM_OURS)
    with pytest.raises(ValueError, match="not those of a network"):
        save_diffusers(tmp_path, net.settings, net.state_dict(), (3, 8, 8), 5, facts())
