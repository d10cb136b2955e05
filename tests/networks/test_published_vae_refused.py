"""Files that hold no published autoencoder, or a part of one, are refused in one line."""

from runtime.commandline import BadInput

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks.kl_autoencoder import KLVAE, TinyAutoencoder, load_pretrained
from networks.published.autoencoder import read_autoencoder


class Trap:
    """Unpickled by anything but weights_only, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"state_dict": {"x": Trap(tmp_path / "made")}}, tmp_path / "vae.ckpt")
    with pytest.raises(BadInput, match="no file of plain tensors"):
        load_pretrained(tmp_path / "vae.ckpt")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def halves(tmp_path):
    """A folder of the two files of a tiny autoencoder."""
    ae = TinyAutoencoder(4, model_channels=8, num_blocks=(1, 1))
    for half in ("encoder", "decoder"):
        state = {k[8:]: v for k, v in ae.state_dict().items() if k.startswith(half)}
        torch.save(state, tmp_path / f"tae_{half}.pth")
    return tmp_path


def change(path, **changes):
    """Tensors of a file replaced, or with None removed."""
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    state.update({name.replace("__", "."): value for name, value in changes.items()})
    state = {name: value for name, value in state.items() if value is not None}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def test_half_a_pair_is_refused_and_the_missing_file_named(halves):
    (halves / "tae_decoder.pth").unlink()
    for path in (halves, halves / "tae_encoder.pth"):
        with pytest.raises(BadInput, match="tae_decoder.pth is not beside it"):
            load_pretrained(path)


def test_a_folder_of_several_pairs_asks_for_one(halves):
    shutil.copy(halves / "tae_encoder.pth", halves / "other_encoder.pth")
    with pytest.raises(BadInput, match="holds 2 encoders: name the file of one"):
        load_pretrained(halves)


def test_halves_of_two_networks_are_refused(halves):
    change(halves / "tae_decoder.pth", **{"1__weight": torch.zeros(8, 16, 3, 3)})
    with pytest.raises(BadInput, match=r"decoder.1.weight is \(8, 16, 3, 3\), expected \(8, 4, 3"):
        load_pretrained(halves)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    path = tmp_path / "kl.safetensors"
    save_file(KLVAE(model_channels=32, channel_mult=(1,), num_res_blocks=1).state_dict(), path)
    change(path, decoder__mid__attn_1__k__bias=None)
    with pytest.raises(BadInput, match="lacks 1 tensors .* decoder.mid.attn_1.k.bias"):
        load_pretrained(path)
    change(path, decoder__mid__attn_1__k__bias=torch.zeros(32), bn__mean=torch.zeros(4))
    with pytest.raises(BadInput, match="1 tensors that this .* no place for, first bn.mean"):
        load_pretrained(path)
    change(path, bn__mean=None, encoder__conv_in__weight=None)
    with pytest.raises(BadInput, match="first encoder.conv_in.weight"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "holds no autoencoder: the first .* lora_unet"),
        ("input_blocks.0.0.weight", "holds no autoencoder: .* input_blocks.0.0.weight"),
        ("quantize.embedding.weight", r"has a codebook \(a VQ autoencoder\)"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, name, expected):
    torch.save({name: torch.zeros(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=expected):
        load_pretrained(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"<html>not found</html>",
            ["no file of plain tensors but text, '<html>not found.*again"] * 2,
        ),
        (b"", ["no file of plain tensors, or a torn one", "no safetensors file, or a torn one"]),
    ],
)
def test_torn_files_are_refused(tmp_path, content, expected):
    for name, words in zip(("x.ckpt", "x.safetensors"), expected, strict=True):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=words):
            load_pretrained(tmp_path / name)


def test_missing_and_empty_paths_are_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere: no such file or folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no autoencoder: expected diffusion_pytorch_model"):
        load_pretrained(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "x.pt")
    with pytest.raises(BadInput, match="is not a state_dict"):
        load_pretrained(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("_class_name", "AutoencoderKLFlux2", "config.json is of AutoencoderKLFlux2"),
        ("_class_name", "AutoencoderTiny", "config.json is of AutoencoderTiny"),
        ("act_fn", "relu", "act_fn 'relu' is not supported, only 'silu' is"),
        ("norm_num_groups", 5, r"5 norm groups do not divide .* \[16, 32\]"),
        ("norm_num_groups", "a", "norm_num_groups 'a' must be a whole number above 0"),
        ("norm_num_groups", 0, "norm_num_groups 0 must be a whole number above 0"),
        ("norm_num_groups", 8.0, "norm_num_groups 8.0 must be a whole number above 0"),
        ("norm_num_groups", None, "norm_num_groups None must be a whole number above 0"),
        *(
            ("scaling_factor", value, f"scaling_factor {value!r} must be a number above 0")
            for value in ("big", float("nan"), float("inf"), -1, 0, 0.0, True, [0.1])
        ),
        *(
            ("shift_factor", value, f"shift_factor {value!r} must be a number")
            for value in ("big", float("nan"), float("-inf"), False)
        ),
    ],
)
def test_settings_of_another_network_are_refused(tmp_path, setting, value, expected):
    state = KLVAE(model_channels=16, channel_mult=(1, 2), num_res_blocks=1).state_dict()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(BadInput, match=r"config\.json") as refused:
        load_pretrained(tmp_path)
    assert re.search(expected.replace("[0.1]", r"\[0.1\]"), str(refused.value))


def test_groups_that_nothing_tells_are_refused(tmp_path):
    """A file alone has 32, as all that is published has."""
    state = KLVAE(model_channels=16, channel_mult=(1, 3), num_res_blocks=1).state_dict()
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(BadInput, match=r"vae.safetensors: 32 norm groups do not .* \[16, 48\]"):
        load_pretrained(tmp_path / "vae.safetensors")


def whole(scale):
    """A checkpoint of LDM's code with this scale_factor."""
    state = KLVAE(model_channels=32, channel_mult=(1,), num_res_blocks=1).state_dict()
    return {f"first_stage_model.{k}": v for k, v in state.items()} | {"scale_factor": scale}


@pytest.mark.parametrize(
    "value",
    [[0.1, 0.2, 0.3], [], 0.0, -1.0, float("nan"), float("inf"), True, 1j],
    ids=str,
)
def test_a_scale_that_is_not_one_number_above_zero_is_refused(tmp_path, value):
    torch.save(whole(torch.tensor(value)), tmp_path / "x.ckpt")
    with pytest.raises(BadInput, match="x.ckpt: scale_factor .* must be one number above 0"):
        load_pretrained(tmp_path / "x.ckpt")


@pytest.mark.parametrize("value", [0.5, [0.5]], ids=str)
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_the_scale_is_read_where_tensors_have_shapes_only(tmp_path, name, value):
    (save_file if name == "x.safetensors" else torch.save)(
        whole(torch.tensor(value)), tmp_path / name
    )
    with torch.device("meta"):
        _, state, facts = read_autoencoder(tmp_path / name)
    assert facts["scaling"] == 0.5 and all(value.is_meta for value in state.values())
    assert read_autoencoder(tmp_path / name)[2]["scaling"] == 0.5


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_quantised_weights_are_refused(tmp_path, dtype):
    state = whole(torch.tensor(0.5))
    name = "first_stage_model.decoder.mid.attn_1.k.weight"
    torch.save(state | {name: state[name].to(dtype)}, tmp_path / "x.ckpt")
    kind, what = str(dtype).removeprefix("torch."), "complex" if dtype.is_complex else "quantised"
    with pytest.raises(BadInput, match=f"x.ckpt is {what}, decoder.mid.*k.weight is {kind}: exp"):
        load_pretrained(tmp_path / "x.ckpt")
