"""Folders with a scheduler of diffusers are drawn as diffusers draws them, or refused by the field.

Both start at the same x_T and get the same noise. The network is diffusers' own, with random
weights large enough that x0_hat leaves [-1, 1].
"""

from runtime.pictures import to_uint8

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete

import ddim
import ddpm_pixel
import dpm_solver
import improved_ddpm
from kernels import gaussian
from networks.published.schedule import SPACINGS

SEEDS = torch.tensor([3, 9])
SHAPE = (1, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """{output channels: folder of a UNet2DModel}."""
    found = {}
    for outputs in (1, 2):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=outputs,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
        torch.nn.init.normal_(unet.conv_out.weight, std=0.2)
        found[outputs] = tmp_path_factory.mktemp(f"unet{outputs}")
        unet.save_pretrained(found[outputs] / "unet")
    return found


def folder(unets, where, name, outputs=1, **config):
    """A pipeline's folder with this scheduler: its path."""
    (where / "unet").symlink_to(unets[outputs] / "unet")
    base = {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.2}
    getattr(diffusers, name)(**{**base, **config}).save_pretrained(where / "scheduler")
    return where


def z(step):
    return gaussian((len(SEEDS), *SHAPE), SEEDS, step, "cpu")


@torch.no_grad()
def theirs(path, monkeypatch, steps, timesteps=None, **how):
    """x_0 by diffusers, from our noise."""
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    scheduler = kind.from_pretrained(path, subfolder="scheduler")
    unet = UNet2DModel.from_pretrained(path / "unet").eval()
    scheduler.set_timesteps(
        **({"timesteps": timesteps} if timesteps else {"num_inference_steps": steps})
    )
    x, step = z(-1), [0]
    for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z(step[0]))
    if hasattr(scheduler, "sigmas") and "Euler" in config["_class_name"]:
        x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()  # it calls x / sqrt(alpha_bar) x
    for i, t in enumerate(scheduler.timesteps):
        step[0] = i
        out = unet(scheduler.scale_model_input(x, t), t).sample
        more = {"variance_noise": z(i)} if how.get("eta") else {}
        x = scheduler.step(out, t, x, **how, **more).prev_sample
    return x


def same(x, ours, scale=None):
    """Whether two x_0 are the same: within 1e-4 of their size, and one level of 255."""
    assert x.std() > 0.05
    if (x - ours).abs().max() >= 1e-4 * max(1, x.abs().max().item()):
        return False
    return (to_uint8(x).int() - to_uint8(ours).int()).abs().max() <= 1


def end(walk):
    *_, (x, _) = walk
    return x


def ancestral(path, steps, script="improved_ddpm"):
    chapter = {"ddpm_pixel": ddpm_pixel, "improved_ddpm": improved_ddpm}[script]
    net, cfg, *_ = chapter.load_net(path, "cpu", script=script)
    return end(chapter.trajectory(net, replace(cfg, sample_steps=steps), SHAPE, SEEDS))


def walked(path, steps, script, sample, **how):
    net, cfg, shape, _, alpha_bar = improved_ddpm.load_net(path, "cpu", script=script)
    pairs = ddim.subsequence(cfg.timesteps, steps, cfg.spacing)
    how |= {"prediction": cfg.prediction, "clip": cfg.clip_denoised}
    return end(sample(net, alpha_bar, pairs, shape, SEEDS, **how))


@pytest.mark.parametrize("T", [1000, 50])
@pytest.mark.parametrize("kind", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(kind, T):
    for theirs, ours in SPACINGS.items():
        scheduler, more = kind(num_train_timesteps=T, timestep_spacing=theirs), 0
        for n in range(1, T + 1):
            scheduler.set_timesteps(n)
            expected = scheduler.timesteps.tolist()
            if (theirs, n) == ("linspace", 1):
                expected = [T - 1]  # where linspace has its start alone
            more += len(expected) > n  # rounded numbers of numpy.arange
            pairs = ddpm_pixel.timestep_pairs(T, n, ours)
            assert [t for t, _ in pairs] == expected[:n] and len(pairs) == n, (theirs, n)
            assert [t for _, t in pairs] == [*expected[1:n], -1]
        assert not more or ours == "trailing" and more < T / 10


DDPM = [
    dict(),
    dict(clip_sample=False),
    dict(thresholding=True),  # with sample_max_value 1, which clamps
    dict(thresholding=True, sample_max_value=1e4),
    dict(thresholding=True, sample_max_value=1e4, clip_sample=False),
    dict(timestep_spacing="linspace"),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="trailing", clip_sample=False, steps_offset=1),
    dict(prediction_type="v_prediction"),
    dict(prediction_type="sample"),
    dict(variance_type="fixed_large"),
    dict(variance_type="fixed_small_log"),
    dict(variance_type="learned_range", outputs=2),
    dict(variance_type="learned_range", outputs=2, clip_sample=False, timestep_spacing="linspace"),
    dict(beta_schedule="scaled_linear"),
    dict(beta_schedule="squaredcos_cap_v2"),
    dict(beta_schedule="sigmoid"),
    dict(beta_schedule="laplace"),
    dict(trained_betas=[0.01, 0.3, 0.02, *[0.05] * 20], num_train_timesteps=23),
    dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
]


@pytest.mark.parametrize("config", DDPM, ids=str)
def test_ddpm(unets, config, tmp_path, monkeypatch):
    path = folder(unets, tmp_path, "DDPMScheduler", **config)
    for steps in (7, 23):  # neither divides T
        expected = theirs(path, monkeypatch, steps)
        assert same(expected, ancestral(path, steps))


def test_ddpm_pixel_draws_the_same(unets, tmp_path, monkeypatch):
    """Of a network of its own form: what improved_ddpm.py does above."""
    config = dict(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    path = folder(unets, tmp_path, "DDPMScheduler", **config)
    form = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0)
    file = path / "unet" / "config.json"
    changed = json.loads(file.read_text()) | form | {"attention_head_dim": None}
    weights = file.with_name("diffusion_pytorch_model.safetensors").read_bytes()
    (path / "unet").unlink()
    (path / "unet").mkdir()
    file.write_text(json.dumps(changed))
    file.with_name("diffusion_pytorch_model.safetensors").write_bytes(weights)
    assert same(theirs(path, monkeypatch, 7), ancestral(path, 7, "ddpm_pixel"))


DDIM = [
    dict(),
    dict(clip_sample=False),
    dict(thresholding=True),
    dict(timestep_spacing="trailing"),
    dict(prediction_type="v_prediction", clip_sample=False),
    dict(prediction_type="sample"),
    dict(beta_schedule="scaled_linear"),
    dict(trained_betas=[0.01, 0.3, *[0.05] * 48]),
    dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
]


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("config", DDIM, ids=str)
def test_ddim(unets, config, eta, tmp_path, monkeypatch):
    path = folder(unets, tmp_path, "DDIMScheduler", **config)
    how = {"eta": eta, "use_clipped_model_output": True}
    expected = theirs(path, monkeypatch, 10, **how)
    assert same(expected, walked(path, 10, "ddim", ddim.sample, eta=eta))


@pytest.mark.parametrize("clip", [True, False])
def test_the_line_of_ddim_says_what_its_pipeline_draws(unets, clip, tmp_path, monkeypatch, capsys):
    path = folder(unets, tmp_path, "DDIMScheduler", clip_sample=clip)
    ours = walked(path, 10, "ddim", ddim.sample)
    said = capsys.readouterr().out
    with_clipped = theirs(path, monkeypatch, 10, use_clipped_model_output=True)
    default = theirs(path, monkeypatch, 10)
    assert same(with_clipped, ours)
    assert same(default, ours) == (not clip)
    told = "images differ from DDIMPipeline's, which keeps eps_hat of the unclipped x0_hat; with "
    assert (told + "--no-clip-denoised both are the same" in said) == clip
    assert ("differs from diffusers' DDIMScheduler" in said) == clip


def test_ddim_of_timesteps_that_do_not_divide(unets, tmp_path, monkeypatch):
    path = folder(unets, tmp_path, "DDIMScheduler", clip_sample=False)
    assert same(theirs(path, monkeypatch, 7), walked(path, 7, "ddim", ddim.sample))


SOLVER = [
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="trailing", thresholding=True),
    dict(timestep_spacing="trailing", prediction_type="v_prediction", euler_at_final=True),
    dict(timestep_spacing="trailing", prediction_type="sample", lower_order_final=False),
    dict(timestep_spacing="trailing", trained_betas=[0.01, 0.3, *[0.05] * 48]),
]


@pytest.mark.parametrize("config", SOLVER, ids=str)
def test_dpm_solver(unets, config, tmp_path, monkeypatch):
    path = folder(unets, tmp_path, "DPMSolverMultistepScheduler", **config)
    sample = lambda *a, **k: dpm_solver.sample("dpmpp", *a, **k)  # noqa: E731
    for steps in (5, 20):
        assert same(theirs(path, monkeypatch, steps), walked(path, steps, "dpm_solver", sample))


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_dpm_solver_visits_timestep_0_where_diffusers_leaves_it_out(
    unets, spacing, tmp_path, monkeypatch, capsys
):
    path = folder(unets, tmp_path, "DPMSolverMultistepScheduler", timestep_spacing=spacing)
    ours = {"linspace": [49, 41, 33, 24, 16, 8, 0], "leading": [42, 35, 28, 21, 14, 7, 0]}[spacing]
    sample = lambda *a, **k: dpm_solver.sample("dpmpp", *a, **k)  # noqa: E731
    expected = theirs(path, monkeypatch, 7, timesteps=ours)
    assert same(expected, walked(path, 7, "dpm_solver", sample))
    told = "differs from diffusers' DPMSolverMultistepScheduler: it leaves out timestep 0"
    assert told in capsys.readouterr().out
    assert not same(theirs(path, monkeypatch, 7), walked(path, 7, "dpm_solver", sample))


@pytest.mark.parametrize(
    "config",
    [
        dict(timestep_spacing="trailing"),
        dict(timestep_spacing="leading"),
        dict(timestep_spacing="leading", prediction_type="v_prediction"),
        dict(timestep_spacing="trailing", beta_schedule="scaled_linear"),
    ],
    ids=str,
)
@pytest.mark.parametrize("ancestral", [False, True])
def test_euler(unets, config, ancestral, tmp_path, monkeypatch):
    name = f"Euler{'Ancestral' * ancestral}DiscreteScheduler"
    path = folder(unets, tmp_path, name, **config)
    expected = theirs(path, monkeypatch, 7)
    assert same(expected, walked(path, 7, "ddim", ddim.sample, eta=float(ancestral)))


@pytest.mark.parametrize("ancestral", [False, True])
def test_euler_under_its_own_linspace_is_said_to_differ(
    unets, ancestral, tmp_path, monkeypatch, capsys
):
    name, eta = f"Euler{'Ancestral' * ancestral}DiscreteScheduler", float(ancestral)
    path = folder(unets, tmp_path, name)
    walk = {"eta": eta}
    net, cfg, *_, alpha_bar = improved_ddpm.load_net(path, "cpu", script="ddim", walk=walk)
    pairs = ddim.subsequence(50, 7, cfg.spacing)
    assert [t for t, _ in pairs] == [49, 41, 33, 24, 16, 8, 0]
    how = dict(eta=eta, clip=cfg.clip_denoised)
    ours = end(ddim.sample(net, alpha_bar, pairs, SHAPE, SEEDS, **how))
    said = capsys.readouterr().out
    told = "it starts at noise of variance 1 - alpha_bar, not 1, and does not round timesteps"
    assert f"differs from diffusers' {name}: {told}" in said
    assert not same(theirs(path, monkeypatch, 7), ours)
    # What is drawn are the steps that ddim.py documents, here in float64.
    x, unet = z(-1).double(), UNet2DModel.from_pretrained(path / "unet").eval().double()
    for i, (t, t_prev) in enumerate(pairs):
        a, b = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else torch.tensor(1.0)
        with torch.no_grad():
            eps = unet(x, t).sample
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x0_hat = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * x0_hat + (1 - b - sigma**2).clamp(min=0).sqrt() * eps
        x += sigma * z(i).double()
    assert same(x.float(), ours)


CASES = [
    dict(),
    dict(clip="none", spacing="trailing"),
    dict(clip="dynamic"),
    dict(betas=[0.02, 0.3, *[0.05] * 20], prediction="v", spacing="leading"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_exported_is_drawn_by_diffusers_pipeline(unets, case, tmp_path, monkeypatch):
    from networks.published.schedule import betas_of, named_alpha_bar
    from networks.published.unet import load_published, save_diffusers

    found = load_published(unets[1] / "unet")
    alpha_bar = named_alpha_bar("cosine", 50)
    facts = {"alpha_bar": alpha_bar, "schedule": "other" if "betas" in case else "cosine"} | case
    where = found["settings"], found["state"], found["shape"], 0
    save_diffusers(tmp_path, *where, facts)
    pipeline = DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    drawn = iter(range(-1, 10))
    for module in (pipeline_ddpm, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z(next(drawn)))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=7, output_type="pt").images
    ours = ancestral(tmp_path, 7)
    assert (images - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4 and images.std() > 0.02
    net, cfg, *_, table = improved_ddpm.load_net(tmp_path, "cpu")
    assert cfg.trained_betas == tuple(case.get("betas", ()))
    if "betas" not in case:
        assert torch.equal(table, alpha_bar) and betas_of(table)[0] < 1
