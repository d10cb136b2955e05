"""Published text encoders: every layout is read as transformers' CLIPTextModel; others refused."""

from runtime.commandline import BadInput

import json
import pickle
import shutil

import pytest
import torch
from reference_metrics import import_references
from safetensors.torch import load_file, save_file
from vae_math import randomise

from networks.clip_text import CLIPText
from networks.published.clip_text import read_clip_text, rows

# Heads of 64 channels, which a single file cannot tell.
CONFIG = dict(
    vocab_size=40,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=11,
    bos_token_id=38,
    eos_token_id=39,
)
SETTINGS = dict(vocab_size=40, width=128, layers=2, heads=2, hidden=96, length=11, eps=1e-5)
COMPVIS = "cond_stage_model.transformer."
POSITIONS = {"embeddings.position_ids": torch.arange(11)[None]}
FC1 = "encoder.layers.0.mlp.fc1.weight"
UNET = {"model.diffusion_model.out.2.bias": torch.ones(4)}
WIDE = {
    "embeddings.token_embedding.weight": torch.ones(40, 1024),
    "embeddings.position_embedding.weight": torch.ones(11, 1024),
    FC1: torch.ones(96, 1024),
}
WIDER = {name: torch.ones(len(value), 1280) for name, value in WIDE.items()}


@pytest.fixture(scope="module")
def transformers():
    import_references()
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def published(transformers):
    """transformers' model, random."""
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG)))


@pytest.fixture(scope="module")
def saved(published, tmp_path_factory):
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("text")
    published.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(saved, tmp_path / "text_encoder")


@pytest.fixture(scope="module")
def weights(saved):
    """Its tensors, without "text_model." before their names."""
    state = load_file(saved / "model.safetensors")
    return {name.removeprefix("text_model."): value for name, value in state.items()}


def named(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def altered(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def assert_same(path, theirs, **changes):
    """What is read at path computes what transformers' model does."""
    settings, state = read_clip_text(path)
    assert settings == SETTINGS | changes
    assert all(value.dtype == torch.float32 for value in state.values())
    ours = CLIPText(**settings)
    ours.load_state_dict(state)
    tokens = torch.randint(40, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = ours(tokens), theirs(tokens).last_hidden_state
    assert (got - expected).abs().max() < 1e-5 < 0.1 < expected.std()


# --------------------------------------------------------------------------------- what is read


def test_a_folder_of_transformers_computes_the_same(saved, published):
    assert_same(saved, published)
    assert_same(saved / "model.safetensors", published)


def test_a_whole_pipeline_computes_the_same(folder, published):
    (folder.parent / "unet").mkdir()
    (folder.parent / "model_index.json").write_text("{}")
    assert_same(folder.parent, published)


def test_a_folder_of_the_other_names_computes_the_same(transformers, published, weights, tmp_path):
    """A model with a projection is saved with "text_model." before its names, as all once were."""
    projected = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CONFIG))
    projected.text_model.load_state_dict(published.state_dict())
    projected.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == named(weights, "text_model.").keys() | {"text_projection.weight"}
    assert_same(tmp_path, published)


def test_config_tells_heads_and_eps(transformers, tmp_path):
    changes = dict(num_attention_heads=8, layer_norm_eps=1e-3)
    theirs = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG | changes)))
    theirs.save_pretrained(tmp_path)
    assert_same(tmp_path, theirs, heads=8, eps=1e-3)


def test_weights_saved_by_torch_compute_the_same(folder, published, weights):
    (folder / "model.safetensors").unlink()
    torch.save(named(weights | POSITIONS, "text_model."), folder / "pytorch_model.bin")
    assert_same(folder, published)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_weights_in_half_precision_become_float32(name, transformers, published, tmp_path):
    half = transformers.CLIPTextModel(published.config)
    half.load_state_dict(published.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16")
    if name.endswith("bin"):
        (tmp_path / "model.fp16.safetensors").unlink()
        torch.save(half.state_dict(), tmp_path / name)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != ".json"] == [name]
    assert_same(tmp_path, half.float())


@pytest.mark.parametrize("inner", ["text_model.", ""])
@pytest.mark.parametrize("form", ["sd.safetensors", "sd.ckpt", "bare.ckpt"])
def test_a_checkpoint_in_compvis_names_computes_the_same(form, inner, tmp_path, published, weights):
    projection = {"text_projection.weight": torch.ones(7, 128)}
    state = named(named(weights | POSITIONS | projection, inner), COMPVIS)
    state |= UNET | {"cond_stage_model.logit_scale": torch.ones(()), "betas": torch.ones(9)}
    path = tmp_path / form
    (tmp_path / "config.json").write_text('{"_class_name": "Another"}')  # not of this file
    if form == "sd.ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert_same(path, published)


@pytest.mark.parametrize("inner", ["text_model.", ""])
@pytest.mark.parametrize("form", ["text.safetensors", "text.pt"])
def test_a_file_of_the_encoder_alone_computes_the_same(form, inner, tmp_path, published, weights):
    path, state = tmp_path / form, named(weights | POSITIONS, inner)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert_same(path, published)


def test_the_state_does_not_lie_in_the_file(tmp_path, weights):
    """What overwrites the file later changes nothing."""
    torch.save(weights, tmp_path / "text.pt")
    _, state = read_clip_text(tmp_path / "text.pt")
    before = {name: value.clone() for name, value in state.items()}
    with open(tmp_path / "text.pt", "r+b") as file:
        file.write(bytes((tmp_path / "text.pt").stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "state, words",
    [
        (named(WIDE, "cond_stage_model.model."), "OpenCLIP text encoder of Stable Diffusion 2"),
        (named(WIDE, "conditioner.embedders.0."), "of Stable Diffusion XL"),
        (WIDE, "OpenCLIP text encoder .* 1024 wide"),
        (named(WIDE, COMPVIS), "OpenCLIP text encoder .* 1024 wide"),
        (WIDER, "OpenCLIP text encoder .* 1280 wide"),
        (UNET, "no text encoder: the first of its 1 tensors is model.diffusion_model.out.2.bias"),
        ({"encoder.conv_in.weight": torch.ones(2)}, "no text encoder"),
        ({"cond_stage_model.embedding.weight": torch.ones(3, 4)}, "no text encoder"),
        ({}, "no text encoder: it is empty"),
    ],
)
def test_files_of_other_models_are_refused(state, words, tmp_path):
    torch.save(state, tmp_path / "net.ckpt")
    with pytest.raises(BadInput, match=f"net.ckpt holds .*{words}.*expected"):
        read_clip_text(tmp_path / "net.ckpt")


def without(name):
    return lambda state: {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("embeddings.token_embedding.weight"), "lacks .*embeddings.token_embedding.weight"),
        (without(FC1), f"lacks .*{FC1}"),
        (without("encoder.layers.1.self_attn.k_proj.bias"), "lacks .*layers.1.self_attn.k_proj.b"),
        (lambda s: s | {FC1: torch.ones(96)}, f"lacks a matrix .*{FC1}"),
        (lambda s: s | {FC1: torch.ones(96, 127)}, rf"{FC1} is \(96, 127\), expected \(96, 128\)"),
        (
            lambda s: s | {"encoder.layers.1.self_attn.v_proj.weight": torch.ones(128, 5)},
            r"layers.1.self_attn.v_proj.weight is \(128, 5\), expected \(128, 128\)",
        ),
        (lambda s: s | {"final_layer_norm.bias": torch.ones(3)}, r"bias is \(3,\), .* \(128,\)"),
        (lambda s: s | {"pooler.weight": torch.ones(3)}, "no place for: pooler.weight"),
    ],
)
def test_tensors_that_make_no_encoder_are_refused(change, words, folder, weights):
    (folder / "config.json").unlink()
    save_file(change(weights), folder / "model.safetensors")
    with pytest.raises(BadInput, match=f"model.safetensors.*{words}"):
        read_clip_text(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_act="gelu"), "OpenCLIP text encoder of Stable Diffusion 2.*'gelu'"),
        (dict(hidden_act="relu"), "hidden_act 'relu' is not supported, only 'quick_gelu'"),
        (dict(model_type="clip"), "model_type is 'clip', expected 'clip_text_model'"),
        (dict(num_hidden_layers=1), "num_hidden_layers 1 is not that of the tensors .* 2$"),
        (dict(vocab_size=41), "vocab_size 41 is not"),
        (dict(hidden_size=64), "hidden_size 64 is not"),
        (dict(intermediate_size=97), "intermediate_size 97 is not"),
        (dict(max_position_embeddings=77), "max_position_embeddings 77 is not"),
        (dict(num_attention_heads=3), "num_attention_heads 3 must be a divisor of 128"),
        (dict(num_attention_heads="2"), "num_attention_heads '2' must"),
        (dict(num_attention_heads=0), "num_attention_heads 0 must"),
        (dict(layer_norm_eps=None), "layer_norm_eps None must be a number"),
        (dict(layer_norm_eps=-1e-5), "layer_norm_eps -1e-05 must be a number"),
    ],
)
def test_settings_without_a_counterpart_are_refused(changes, words, folder):
    altered(folder, **changes)
    with pytest.raises(BadInput, match=f"config.json.*{words}"):
        read_clip_text(folder)


def test_a_config_of_diffusers_is_refused(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(BadInput, match="config.json: model_type is 'UNet2DConditionModel'"):
        read_clip_text(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="config.json cannot be read"):
        read_clip_text(folder)


@pytest.mark.parametrize("width, state", [(1024, WIDE), (1280, WIDER)], ids=["1024", "1280"])
def test_openclips_width_is_refused_in_a_folder(folder, width, state):
    altered(folder, hidden_size=width)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadInput, match=f"config.json is of the OpenCLIP .*, {width} wide"):
        read_clip_text(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool], ids=str)
def test_quantised_weights_are_refused(folder, weights, dtype):
    save_file(weights | {FC1: weights[FC1].to(dtype)}, folder / "model.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        BadInput, match=f"model.safetensors is quantised, {FC1} is {kind}: expected"
    ):
        read_clip_text(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_of_every_float_are_read(folder, weights, dtype):
    state = {name: value.to(dtype) for name, value in weights.items()}
    save_file(state, folder / "model.safetensors")
    found = read_clip_text(folder)[1]
    table = rows(SETTINGS)
    for name, keys, _ in table:
        assert torch.equal(found[name], torch.cat([state[key].float() for key in keys]))


def test_heads_that_nothing_tells_are_refused(transformers, tmp_path):
    """Transformers' model with 3 heads of 32 channels."""
    small = CONFIG | dict(hidden_size=96, num_attention_heads=3)
    theirs = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**small)))
    theirs.save_pretrained(tmp_path)
    assert_same(tmp_path, theirs, width=96, heads=3)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match="96 wide.* expected a config.json .*num_attention_heads"):
        read_clip_text(tmp_path)


def test_folders_without_a_text_encoder_are_refused(folder):
    with pytest.raises(BadInput, match="none: no such file or folder"):
        read_clip_text(folder / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="text_encoder holds no text encoder: expected model.safet"):
        read_clip_text(folder.parent)
    shutil.rmtree(folder)
    with pytest.raises(BadInput, match="no text encoder: .* in it or in its text_encoder/"):
        read_clip_text(folder.parent)


def test_a_pipeline_of_several_text_encoders_is_refused(folder):
    shutil.copytree(folder, folder.parent / "text_encoder_2")
    with pytest.raises(BadInput, match="several text encoders, as Stable Diffusion XL"):
        read_clip_text(folder.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "text.ckpt"])
def test_torn_files_are_refused(name, tmp_path, weights):
    path = tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=f"{name} is no .*torn"):
            read_clip_text(path)


class Trap:
    """Unpickled by anything but weights_only, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(tmp_path, weights):
    state = named(weights, COMPVIS) | {"x": Trap(tmp_path / "made")}
    torch.save({"state_dict": state}, tmp_path / "text.ckpt")
    with pytest.raises(BadInput, match="text.ckpt is no file of plain tensors"):
        read_clip_text(tmp_path / "text.ckpt")
    (tmp_path / "text.pt").write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(BadInput, match="text.pt is no file of plain tensors"):
        read_clip_text(tmp_path / "text.pt")
    assert not (tmp_path / "made").exists()
