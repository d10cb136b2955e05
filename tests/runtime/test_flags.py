"""A flag that is typed is used, or refused by its name: every field of every task of every script.

Nothing here reads the lists by which scripts refuse flags: what a flag does is seen from outside.
"""

from runtime.commandline import parse
from runtime.processes import World

import importlib

import openai_unet
import pytest
import torch
from flag_cases import REPO, ROOMS, Case, names, run, verdict
from flag_more import CASES, LET_PASS, SLOW, is_slow, openai
from flag_tables import SIDE, checkpoint, pictures, trained
from tiny_runs import COMMANDS

import improved_ddpm
from kernels import gaussian


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where tiny checkpoints and pictures lie, each made when it is first asked for."""
    return tmp_path_factory.mktemp("flags")


def check(name, folder, tmp_path, slow):
    """Demand it of the flags of a case that are tried now."""
    case, passed = CASES[name](folder=folder), LET_PASS.get(name, {})
    first, second = (run(case, case.base, tmp_path / word) for word in ("first", "second"))
    if first.made != second.made:  # the first has left what is kept beside data
        first, second = second, run(case, case.base, tmp_path / "third")
    assert not first.refused and first.made == second.made  # so a difference means something
    case.known[repr(case.base)] = second
    fields = [field for field in case.tried if is_slow(name, field) is slow]
    told = {field: verdict(case, field, tmp_path) for field in fields}
    for field in passed.keys() & told.keys():
        assert told.pop(field).endswith("does nothing"), f"{field}: take it out of LET_PASS"
    assert not list(filter(None, told.values()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_every_flag_is_used_or_refused_by_its_name(name, folder, tmp_path):
    check(name, folder, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_so_is_every_flag_that_all_commands_have(name, folder, tmp_path):
    check(name, folder, tmp_path, slow=True)


def test_every_task_of_every_script_has_a_case():
    tried = {tuple(name.split()[:2]) for name in CASES}
    assert {script for script, *_ in tried} >= {*COMMANDS}
    for script in COMMANDS:
        for task in Case(script, "", {}).module.Config.USES:
            assert (script, task) in tried
    rooms = (path for room in ROOMS for path in (REPO / room).rglob("*.py"))
    mains = [path.relative_to(REPO) for path in rooms if "entry(main)\n" in path.read_text()]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in mains}
    assert names <= {script for script, *_ in tried}
    assert len(mains) > 3


# ------------------------------------------------------------- what needs another setting to be on

# {script: {flag: (value, what is typed beside it)}}: a flag that does nothing without another one,
# or beside one.
FOLDED = {"ae": "KL"}  # the checkpoint of an autoencoder
NEEDY = {
    "ddpm_pixel": {
        "metric_n": (6, {}),
        "metric_features": ("inception", {}),
        "metric_resize": ("clean", {"metric_every": 1}),
        "metric_data": ("glyphs", {}),
        "metric_split": ("train", {}),
        "price_per_gpu_hour": (2.0, {}),
        "label_dropout": (0.2, {"class_cond": False}),
        "timesteps": (50, {"trained_betas": (0.1,) * 50}),
        "schedule": ("cosine", {"trained_betas": (0.1,) * 50}),
        "alpha_min": (0.1, {"trained_betas": (0.1,) * 50}),
    },
    "improved_ddpm": {
        "metric_n": (6, {}),
        "num_heads": (2, {"num_head_channels": 8}),
        "loss": ("l1", {"objective": "vlb"}),
        "min_snr": (5.0, {"objective": "vlb"}),
        "sample_steps": (5, {"timestep_respacing": "0-4"}),
        "clip_denoised": (False, {"dynamic_threshold": True}),
        "label_dropout": (0.2, {"class_cond": False}),
    },
    "edm": {
        "metric_n": (6, {}),
        "snapshot_every": (2, {}),
        "S_tmin": (1.0, {}),
        "S_tmax": (1.0, {}),
        "S_noise": (1.1, {}),
        "label_dropout": (0.2, {"class_cond": False}),
        "augment": (0.1, {}),
    },
    "classifier_guidance": {
        "num_heads": (2, {"num_head_channels": 8}),
        "classifier": ("ckpt.pt", {}),
    },
    "autoencoder": {
        "kl_weight": (0.1, {"ae": "vq"}),
        "codebook": (16, {}),
        "commitment": (0.5, {"ae": "ldm"}),
        "patch": (2, {"ae": "ldm"}),
        "perceptual_weight": (0.5, {}),
        "disc_start": (2, {}),
    },
    "ldm_cfg": {
        **{name: (2, FOLDED) for name in ("patch", "ae_channels", "ae_blocks", "z_channels")},
        "ae_mult": ((1, 2), FOLDED),
        "kl_weight": (0.1, FOLDED),
        "ae_steps": (5, FOLDED),
        "ae_lr": (0.1, FOLDED),
        "context_dim": (16, {}),
        "eta": (0.5, {"sampler": "ddpm"}),
    },
    "dit": {
        "ae_steps": (5, FOLDED),
        "patch": (2, FOLDED),
        "eta": (0.5, {"sampler": "dpmpp"}),
    },
    "ddim": {
        "classes": ("bars", {"encode": "CKPT"}),
        "eta": (0.5, {"encode": "CKPT"}),
        "data_root": ("elsewhere", {"interpolate": "CKPT"}),
    },
    "dpm_solver": {"data_root": ("elsewhere", {"interpolate": "CKPT"})},
    "eval_fid": {
        "against": ("IMAGES", {"a": "IMAGES", "b": "IMAGES"}),
        "names": (("one",), {"a": "IMAGES", "b": "IMAGES"}),
        "layout": ("adm", {"a": "IMAGES", "b": "IMAGES"}),
        "sample_args": ("--n 4", {"a": "IMAGES", "b": "IMAGES"}),
        "weights": ("w.pt", {"a": "IMAGES", "b": "IMAGES", "features": "classifier"}),
        "resize": ("clean", {"a": "IMAGES", "b": "IMAGES", "features": "classifier"}),
    },
    "stable_diffusion": {
        "strength": (0.5, {"weights": "w", "prompt": ("a",)}),
        "mask": ("mask.png", {"weights": "w", "prompt": ("a",)}),
        "n": (2, {"weights": "w", "prompt": ("a",), "interpolate": 2}),
        "negative": ("blue", {"weights": "w", "prompt": ("a",), "guidance": 0.0}),
    },
}


@pytest.mark.parametrize("script, name", [(s, name) for s in NEEDY for name in NEEDY[s]])
def test_a_flag_is_refused_without_the_setting_that_it_needs(script, name, folder, tmp_path):
    value, beside = NEEDY[script][name]
    words = {"CKPT": lambda: checkpoint(folder, "ddpm_pixel")[0]}
    words |= {"KL": lambda: checkpoint(folder, "autoencoder")[0]}
    words |= {"IMAGES": lambda: pictures(folder)}
    beside = {k: words[v]() if v in words else v for k, v in beside.items()}
    found = run(Case(script, "", {}), beside | {"gpus": 0, name: value}, tmp_path / "run")
    assert names(found.refused, name) and not found.files, found.refused


@pytest.mark.parametrize(
    "script, words",
    [
        ("ldm_cfg", "--guidance 0 --guidance-interval 0.2 0.8 --guidance-rescale 0.7"),
        ("dit", "--sample some.pt --guidance 0 --guidance-rescale 0.7"),
        ("classifier_guidance", "--metric-every 0 --metric-n 6"),
        ("edm", "--S-churn 0 --S-noise 1.003"),
        ("ddpm_pixel", "--no-class-cond --label-dropout 0"),
    ],
)
def test_a_sweep_goes_through_zero(script, words):
    """A number that is typed as 0 turns off what needs it, and so on purpose."""
    config = importlib.import_module(script).Config
    assert isinstance(parse(config, "", words.split()), config)


# ------------------------------------------------------------------------- the cases of the report


@pytest.mark.parametrize("script", ["ddpm_pixel", "improved_ddpm", "ldm_cfg"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 1),
        ("prediction", "v"),
        ("timesteps", 20),
        ("timesteps", 5),  # too few for a training
        ("schedule", "cosine"),
        ("model_channels", 64),
        ("lr", 0.1),
    ],
)
def test_a_setting_of_training_is_refused_with_a_checkpoint(script, name, value, folder, tmp_path):
    path, _ = checkpoint(folder, script)
    settings = {"sample": path, "n": 2, "gpus": 0, "out": "out", name: value}
    found = run(Case(script, "sample", {}), settings, tmp_path / "run")
    assert names(found.refused, name) and not found.files, found.refused


def test_such_settings_in_a_run_s_own_yaml_are_no_flags(folder, tmp_path):
    path = trained(folder, "ddpm_pixel")
    yaml = path.replace("ckpt.pt", "config.yaml")
    settings = {"sample": path, "config": yaml, "n": 2, "gpus": 0, "out": "out"}
    found = run(Case("ddpm_pixel", "sample", {}), settings, tmp_path / "run")
    assert not found.refused and any(name.endswith("samples.npz") for name in found.files)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_and_size_of_an_openai_file_are_those_that_are_typed(heads, folder, monkeypatch):
    """A file says neither how many heads it was trained with nor how large the images were."""
    path, asked = openai(folder), ["--num-heads", heads, "--size", SIDE, "--gpus", 0]
    arguments = ["improved_ddpm.py", "--sample", path, *asked]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    cfg = improved_ddpm.cli.parse(improved_ddpm.Config, "")
    net, _, shape, _ = improved_ddpm.open_checkpoint(cfg, path, World())
    assert shape == (3, SIDE, SIDE)
    x, t = gaussian((2, *shape), torch.tensor([3, 4]), 0, "cpu"), torch.tensor([5, 900])
    w = {name: value.double() for name, value in torch.load(path, weights_only=True).items()}
    expected, other = (
        openai_unet.forward(w, x.double(), t, None, lambda _, n=n: n, new_order=False)
        for n in (heads, 1)
    )
    with torch.no_grad():
        torch.testing.assert_close(net(x, t).double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - other).abs().max() > 0.1 * expected.std()
