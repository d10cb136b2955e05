"""Every field of diffusers' schedulers and of its UNet2DModel: obeyed, or refused by its name."""

from runtime import processes
from runtime.commandline import BadInput

import inspect
import json
import re

import pytest
import torch
from reference_metrics import import_references

import_references()
import diffusers  # noqa: E402
from test_published_command import edit, export  # noqa: E402

from networks.published import unet_config  # noqa: E402
from networks.published.samplers import DRAWS, SOLVER, check_drawn  # noqa: E402
from networks.published.schedule import (  # noqa: E402
    CLASSES,
    NOT_USED,
    OBEYED,
    OF_CLASS,
    read_schedule,
)
from networks.published.unet import load_published, read_network  # noqa: E402
from networks.published.unet_names import Structure  # noqa: E402

NAN = float("nan")
S = Structure(16, (16, 32), 1, (1,), False, False, 1, 1, 0)


def parameters(kind):
    found = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in found if p.name not in ("self", "kwargs")}


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_names_all_fields_of_the_schedulers_and_their_defaults(name):
    fields, kind = parameters(getattr(diffusers, name)), CLASSES[name]
    for field in fields:
        assert sum(field in table for table in (OBEYED, OF_CLASS, NOT_USED)) == 1, field
    assert (fields["beta_start"], fields["beta_end"]) == kind.betas
    assert fields.get("timestep_spacing", "linspace") == kind.spacing
    for field in ("clip_sample", "thresholding", "set_alpha_to_one"):
        assert fields.get(field) == getattr(kind, field), field
    for field in fields.keys() & NOT_USED.keys():
        assert fields[field] == NOT_USED[field]
    for field in fields.keys() & SOLVER.keys():
        # Of a class whose steps no script takes, the line says that they are others.
        assert fields[field] in SOLVER[field] or not kind.same, field


def write(tmp_path, **config):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return path


WRONG = {bool: ["false", 0, []], float: [NAN, float("inf"), "1", True, [1]], int: ["1", 1.5]}
WRONG |= {str: [1, True], list: [1, "a"]}
USED = [
    (name, value) for name, kind in (OBEYED | OF_CLASS).items() for value in WRONG.get(kind, ())
]
USED = [case for case in USED if not case[0].startswith("beta_")]  # of test_published_files.py
USED += [(name, "other") for name in NOT_USED]
USED += [("timestep_spacing", NAN), ("steps_offset", NAN), ("prediction_type", NAN)]
USED += [("variance_type", 3), ("beta_schedule", NAN), ("num_train_timesteps", NAN), ("eta", 0.5)]
USED += [("num_train_timesteps", 7), ("timesteps", 7), ("_guidance", NAN), ("_sample_steps", 0)]
USED += [("_class_name", 3)]


@pytest.mark.parametrize("name, value", USED, ids=str)
def test_a_value_that_is_none_is_refused_by_the_name_of_its_field(name, value, tmp_path):
    config = dict(trained_betas=[0.1, 0.2]) if name == "num_train_timesteps" and value == 7 else {}
    with pytest.raises(BadInput, match=rf"scheduler_config\.json: .*{name} ") as told:
        read_schedule(write(tmp_path, **config, **{name: value}))
    assert "\n" not in str(told.value)


def test_what_means_nothing_is_passed_over(tmp_path):
    plain = read_schedule(write(tmp_path, _class_name="DDPMScheduler"))
    idle = dict.fromkeys((*OF_CLASS, *NOT_USED, "later", "_note"))
    idle |= {"another": False, "_diffusers_version": "9", "tensor_format": "pt", "timesteps": 1000}
    found = read_schedule(write(tmp_path, _class_name="DDPMScheduler", **idle))
    fields = found.pop("fields"), plain.pop("fields")
    assert torch.equal(found.pop("alpha_bar"), plain.pop("alpha_bar")) and found == plain
    assert fields[0] == fields[1] | {"tensor_format": "pt"}


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(), "clamp"),
        (dict(_class_name="DDIMScheduler"), "clamp"),
        (dict(_class_name="PNDMScheduler", clip_sample=True), "none"),  # which it has not
        (dict(_class_name="EulerDiscreteScheduler", thresholding=True), "none"),
        (dict(_class_name="HeunDiscreteScheduler"), "none"),
        (dict(_class_name="HeunDiscreteScheduler", clip_sample=True), "clamp"),
        (dict(_class_name="DPMSolverMultistepScheduler"), "none"),
        (dict(_class_name="DPMSolverMultistepScheduler", thresholding=True), "clamp"),
        (dict(clip_sample=None), "none"),
        (dict(clip_sample=False, clip_sample_range=3), "none"),
        (dict(thresholding=True, clip_sample_range=3), "clamp"),
        (dict(thresholding=True, sample_max_value=None), "dynamic"),
    ],
)
def test_what_keeps_x0_in_its_range(config, expected, tmp_path):
    found = read_schedule(write(tmp_path, **config))
    assert found["clip"] == expected and not found["cannot"]


@pytest.mark.parametrize(
    "config, flag",
    [
        (dict(clip_sample_range=3), "clip_denoised"),
        (dict(clip_sample_range=None), "clip_denoised"),
        (dict(thresholding=True, sample_max_value=1.5), "clip_denoised"),
        (dict(thresholding=True, sample_max_value=1e4, dynamic_thresholding_ratio=0.9), "clip_"),
        (dict(steps_offset=1), "spacing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_unless_a_flag_decides(config, flag, tmp_path):
    found = read_schedule(write(tmp_path, **config))
    field = next(iter({**config, "sample_max_value": 0})) if "max" in flag else [*config][-1]
    check_drawn("F", found, "")  # nothing is drawn
    with pytest.raises(BadInput, match=rf"{field}.* is not supported.*; or type --{flag[:4]}"):
        check_drawn("F", found, "improved_ddpm")
    clip = flag.startswith("clip")
    walk = {"clip_denoised": False} if clip else {"spacing": "leading"}
    check_drawn("F", found, "improved_ddpm", walk)
    if not clip:  # which one script does not have, and one has no such timesteps
        check_drawn("F", found, "edm")
        with pytest.raises(BadInput, match="networks.published F --out FOLDER with --spacing"):
            check_drawn("F", found, "classifier_guidance")


# ------------------------------------------------------------------------------ class and script


@pytest.mark.parametrize(
    "name, script, told",
    [
        ("DDIMScheduler", "ddpm_pixel", r"type python ddim\.py --sample F; or add --variance"),
        ("EulerDiscreteScheduler", "improved_ddpm", r"python ddim\.py --sample F; "),
        ("EulerAncestralDiscreteScheduler", "ddpm_pixel", r"ddim\.py --sample F --eta 1; "),
        ("DPMSolverMultistepScheduler", "ddpm_pixel", r"python dpm_solver\.py --sample F; "),
        ("KarrasVeScheduler", "ddim", "scheduler KarrasVeScheduler is not supported, expected one"),
        ("FlowMatchEulerDiscreteScheduler", "", "is not supported, expected one of DDPM, "),
    ],
)
def test_a_class_of_other_steps_is_refused_with_the_script_that_takes_them(
    name, script, told, tmp_path
):
    facts = read_schedule(write(tmp_path, _class_name=name))
    with pytest.raises(BadInput, match=told):
        check_drawn("F", facts, script)
    if name in CLASSES:
        check_drawn("F", facts, script, {"variance": "small"})


def line_of(facts, script, monkeypatch, capsys, **walk):
    monkeypatch.setattr(processes, "SAID", set())
    check_drawn("F", facts, script, walk)
    said = capsys.readouterr().out
    assert said.startswith("F: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_drawn_by_the_scripts_that_say_so(name, tmp_path, monkeypatch, capsys):
    facts, kind = read_schedule(write(tmp_path, _class_name=name)), CLASSES[name]
    table = "linear" if kind.betas == (1e-4, 0.02) else "its own table of betas"
    for script in DRAWS.keys() - {"ddpm_pixel", "improved_ddpm", "publish"}:
        said = line_of(facts, script, monkeypatch, capsys)
        assert said.startswith(f"F: {table}, T = 1000, predicts eps; ")
        assert name in said and f"drawn by {DRAWS[script]}" in said
        eta = "--eta 1" in kind.command
        same = kind.same and kind.command.startswith(script) and not eta
        assert (f"differs from diffusers' {name}: it takes other steps" in said) == (not same)
        if eta and script == "ddim":
            said = line_of(facts, script, monkeypatch, capsys, eta=1.0)
            assert "drawn by DDIM, eta 1" in said and "other steps" not in said


@pytest.mark.parametrize(
    "script, walk, said, unsaid",
    [
        ("ddim", dict(clip_denoised=False), "x0_hat not clipped", "clamped"),
        ("ddim", dict(spacing="trailing"), "trailing timesteps", "leading"),
        ("ddim", dict(spacing="quadratic"), "it has no quadratic timesteps", "leading"),
        ("ddim", dict(eta=0.5), "drawn by DDIM, eta 0.5", "eta 0;"),
        ("dpm_solver", dict(sampler="heun"), "drawn by Heun's method", "DPM-Solver"),
        ("dpm_solver", dict(clip_denoised=True), "clamped to [-1, 1]", "not clipped"),
        ("improved_ddpm", dict(variance="small", dynamic_threshold=True), "percentile", "clamped"),
        (
            "improved_ddpm",
            dict(variance="small", timestep_respacing="0-2,9"),
            "timesteps 0-2,9;",
            "leading",
        ),
        ("edm", dict(), "Heun's method of EDM", "leading timesteps"),
    ],
)
def test_the_line_says_what_is_drawn(script, walk, said, unsaid, tmp_path, monkeypatch, capsys):
    facts = read_schedule(write(tmp_path, _class_name="DDIMScheduler"))
    told = line_of(facts, script, monkeypatch, capsys, **walk)
    assert said in told and unsaid not in told


def test_the_last_step_of_a_large_variance_is_said_to_differ(tmp_path, monkeypatch, capsys):
    how = dict(variance_type="fixed_large", timestep_spacing="trailing")
    facts = read_schedule(write(tmp_path, **how))
    said = line_of(facts, "improved_ddpm", monkeypatch, capsys)
    assert "differs from diffusers' DDPMScheduler: its last step adds noise" in said
    for walk in (dict(variance="small"), dict(spacing="leading")):
        assert "differs" not in line_of(facts, "improved_ddpm", monkeypatch, capsys, **walk)


@pytest.mark.parametrize(
    "field, value",
    [
        ("solver_order", 3),
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_type", "heun"),
        ("lambda_min_clipped", -5.1),
    ],
)
def test_steps_of_dpm_solver_that_are_not_ours_are_refused(field, value, tmp_path):
    config = {"_class_name": "DPMSolverMultistepScheduler", field: value}
    facts = read_schedule(write(tmp_path, **config))
    check_drawn("F", facts, "ddim")  # whose line says that it draws something else
    told = re.escape(f"{field} {value!r} is not supported, expected ") + ".*; or type --sampler"
    with pytest.raises(BadInput, match=told):
        check_drawn("F", facts, "dpm_solver")
    check_drawn("F", facts, "dpm_solver", {"sampler": "dpmpp"})


def test_what_ends_elsewhere_or_needs_a_percentile_is_refused(tmp_path):
    facts = read_schedule(write(tmp_path, _class_name="DDIMScheduler", set_alpha_to_one=False))
    last = ("ddim", {}), ("compare_samplers", {}), ("classifier_guidance", {"sampler": "ddim"})
    for script, walk in last:
        told = "F: set_alpha_to_one false is not supported.* networks.published F --out FOLDER, and"
        with pytest.raises(BadInput, match=told):
            check_drawn("F", facts, script, walk)
    for script in ("dpm_solver", "edm", "publish", "", "classifier_guidance"):
        check_drawn("F", facts, script)  # no last step of DDIM
    check_drawn("F", facts, "improved_ddpm", {"variance": "small"})
    facts = read_schedule(write(tmp_path, thresholding=True, sample_max_value=1e4))
    check_drawn("F", facts, "improved_ddpm")
    for script in ("ddpm_pixel", "ddim", "dpm_solver", "compare_samplers", "edm"):
        with pytest.raises(BadInput, match=r"\(thresholding\), .*improved_ddpm.py --sample F; or"):
            check_drawn("F", facts, script)
    check_drawn("F", facts, "ddim", {"clip_denoised": True})


@pytest.mark.parametrize("name, prediction", [("v_prediction", "v"), ("sample", "x0")])
def test_no_signal_at_the_end_is_obeyed_where_something_else_than_noise_is_predicted(
    name, prediction, tmp_path
):
    told = dict(rescale_betas_zero_snr=True, prediction_type=name)
    found = read_schedule(write(tmp_path, **told))
    theirs = diffusers.DDPMScheduler(**told).alphas_cumprod.double()
    assert found["alpha_bar"][-1] == 0 == theirs[-1] and found["prediction"] == prediction
    torch.testing.assert_close(found["alpha_bar"], theirs, rtol=1e-3, atol=1e-7)
    with pytest.raises(BadInput, match="rescale_betas_zero_snr .* where prediction_type is 'eps"):
        read_schedule(write(tmp_path, rescale_betas_zero_snr=True))
    older = read_schedule(write(tmp_path, predict_epsilon=False))
    assert older["prediction"] == "x0"


# ------------------------------------------------------------------------------------- the folder


INDEX = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
INDEX |= {"scheduler": ["diffusers", "DDPMScheduler"]}
FOLDERS = {
    "no scheduler": (None, {}, "scheduler has no scheduler_config.json"),
    "two": (INDEX, dict(beta_end=0.3), "has two schedulers"),
    "latents": (INDEX | {"_class_name": "LDMPipeline"}, {}, "its pipeline is 'LDMPipeline'"),
    "sde": (INDEX | {"_class_name": "ScoreSdeVePipeline"}, {}, "its pipeline is 'ScoreSdeVe"),
    "vqvae": (INDEX | {"vqvae": ["diffusers", "VQModel"]}, {}, "its pipeline has vqvae, expected"),
    "class": (INDEX | {"scheduler": ["diffusers", "ScoreSdeVeScheduler"]}, {}, "ScoreSdeVeSch"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_something_else_is_refused(name, tmp_path):
    export(tmp_path)
    read_network(tmp_path)
    index, beside, told = FOLDERS[name]
    if index is None:
        (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    else:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    if beside:
        write(tmp_path, **beside)
    with pytest.raises(BadInput, match=told):
        read_network(tmp_path)


def test_the_index_names_the_class_and_the_class_what_is_left_out(tmp_path):
    export(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "x"}))
    index = INDEX | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    facts = load_published(tmp_path)["facts"]
    assert (facts["sampler"], facts["clip"]) == ("EulerDiscreteScheduler", "none")
    assert facts["spacing"] == "linear"


@pytest.mark.parametrize("pipeline", ["DDIMPipeline", "PNDMPipeline"])
def test_a_pipeline_of_one_sampler_makes_it_of_any_scheduler(pipeline, tmp_path):
    export(tmp_path)
    index, name = INDEX | {"_class_name": pipeline}, pipeline.replace("Pipeline", "Scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # with DDPMScheduler
    theirs = getattr(diffusers, pipeline).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(theirs.scheduler).__name__ == name == load_published(tmp_path)["facts"]["sampler"]
    with pytest.raises(BadInput, match=rf"asks for {name}: type python ddim\.py"):
        read_network(tmp_path, script="ddpm_pixel")


# ----------------------------------------------------------------------------------- UNet2DModel


FREE = {"sample_size", "down_block_types", "up_block_types"}


def test_all_settings_of_unet2dmodel_are_known():
    known = {*unet_config.expected({}, S), *unet_config.DEFAULTS, *unet_config.IDLE, *FREE}
    assert known - {"_class_name"} == parameters(diffusers.UNet2DModel).keys()


@pytest.mark.parametrize(
    "name", sorted(parameters(diffusers.UNet2DModel).keys() - {"num_train_timesteps"})
)
def test_a_setting_of_another_network_is_refused_by_its_name(name, tmp_path):
    export(tmp_path)
    read_network(tmp_path)
    edit(tmp_path / "unet" / "config.json", **{name: ["other"] * 2 if "types" in name else "other"})
    said = "blocks of type other" if "types" in name else name
    with pytest.raises(BadInput, match=rf"config\.json: .*{said}"):
        read_network(tmp_path)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(layers_per_block=2), "layers_per_block 2 is not supported, only 1 is"),
        (dict(num_class_embeds=10), "num_class_embeds 10"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift"),
        (dict(downsample_type="resnet"), "downsample_type 'resnet'"),
        (dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]), "down_block_types"),
        (dict(attention_head_dim=0), "attention_head_dim 0 must be a whole number"),
        (dict(sample_size=[8, 8, 8]), "sample_size"),
        (dict(dropout=NAN), "dropout nan"),
        (dict(_class_name="UNet2DConditionModel"), "_class_name 'UNet2DConditionModel'"),
        (dict(cross_attention_dim=768), "no counterpart here for cross_attention_dim 768"),
    ],
)
def test_settings_that_the_tensors_contradict_are_refused(changes, told, tmp_path):
    export(tmp_path)
    edit(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(BadInput, match=told):
        load_published(tmp_path)
