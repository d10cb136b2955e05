"""What describes published networks, with a known setting changed or a value a little wrong.

As in test_readers.py: a network, or one line. Networks are built without memory, on "meta".
"""

from runtime.commandline import BadInput
from runtime.files import is_number

import copy
import json
import sys

import mutations
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_readers import LEVELS, Reader, check, diffusers_folder, unet

from networks.adm_unet import UNet
from networks.clip_text import CLIPText
from networks.clip_tokens import Tokenizer
from networks.published import schedule, sd_unet, unet_config
from networks.published.autoencoder import published_scaling
from networks.published.clip_text import read_clip_text
from networks.published.samplers import config_of, read_scheduler
from networks.published.stable_diffusion import TEXT, TINY_TEXT, write_tiny
from networks.published.unet import load_published
from networks.sd_unet import LatentUNet

HUGE = 10**400 - 1
WRONG = (*mutations.VALUES, HUGE, -HUGE, [HUGE], "1" * 5000, 10**9, 1e400, [[1]], [{}], ["a", 3])


def known(names):
    """A change of JSON: in most cases one or two of these settings are other values."""
    names = sorted(names)

    def change(raw, rng):
        if rng.random() < 0.4:
            return mutations.of_json(raw, rng)
        content = json.loads(raw)
        for _ in range(rng.integers(1, 3)):
            value = copy.deepcopy(WRONG[int(rng.integers(len(WRONG)))])
            content[names[int(rng.integers(len(names)))]] = value
        return json.dumps(content).encode()

    return change


def scheduler():
    told = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}
    told |= {"beta_schedule": "linear", "prediction_type": "epsilon", "_guidance": 1.0}

    def make(folder):
        path = folder / "scheduler" / "scheduler_config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"_class_name": "DDPMScheduler", **told}))

    def read(folder):
        facts = read_scheduler(folder, folder / "scheduler" / "scheduler_config.json")
        return config_of(folder, facts, {}, False)

    names = {*schedule.OBEYED, *schedule.OF_CLASS, *schedule.NOT_USED, "_class_name", "_schedule"}
    names |= {f"_{name}" for name in schedule.NOTES}
    return Reader(make, read, "**/*.json", known(names))


def pixel_unet():
    def read(folder):
        found = load_published(folder)
        with torch.device("meta"):
            return UNet(found["shape"], found["num_classes"], **found["settings"])

    names = {*unet_config.FIXED, *unet_config.DEFAULTS, *unet_config.IDLE, "block_out_channels"}
    names |= {"down_block_types", "up_block_types", "sample_size", "num_class_embeds"}
    return Reader(unet("x").make, read, "unet/config.json", known(names))


def latent_unet():
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    told = dict(sample_size=8, cross_attention_dim=16, attention_head_dim=2, **LEVELS)
    told |= dict(down_block_types=blocks[0], up_block_types=blocks[1])

    def read(folder):
        found = sd_unet.load_latent_unet(folder)
        with torch.device("meta"):
            return LatentUNet(found["channels"], found["num_classes"], **found["settings"])

    make = diffusers_folder("UNet2DConditionModel", **told)
    return Reader(make, read, "config.json", known({*sd_unet.FIXED, *told}))


def clip_text():
    def make(folder):
        weights, _ = write_tiny(folder)
        state = load_file(weights)
        weights.unlink()
        text = {k.removeprefix(TEXT): v for k, v in state.items() if k.startswith(TEXT)}
        save_file(text, folder / "model.safetensors")
        count = len(text["text_model.embeddings.token_embedding.weight"])
        told = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "vocab_size": count}
        told |= {"hidden_size": TINY_TEXT["width"], "num_hidden_layers": TINY_TEXT["layers"]}
        told |= {"num_attention_heads": 1, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
        (folder / "config.json").write_text(json.dumps(told))

    def read(folder):
        settings, _ = read_clip_text(folder)
        with torch.device("meta"):
            return CLIPText(**settings)

    names = ("model_type", "hidden_act", "vocab_size", "hidden_size", "num_hidden_layers")
    names += ("num_attention_heads", "max_position_embeddings", "layer_norm_eps", "_class_name")
    return Reader(make, read, "config.json", known({*names, "intermediate_size"}))


def tokenizer(file, names=()):
    def make(folder):
        weights, path = write_tiny(folder)
        weights.unlink()
        found = Tokenizer.of_file(path)
        path.unlink()
        pairs, last = list(found.ranks), len(found)
        added = {"content": "<cat>", "normalized": False}
        whole = {"model": {"vocab": found.vocabulary, "merges": [list(p) for p in pairs]}}
        files = {
            "vocab.json": found.vocabulary,
            "added_tokens.json": {"<cat>": last},
            "tokenizer_config.json": {
                "pad_token": "<|endoftext|>",
                "added_tokens_decoder": {str(last): added},
            },
        }
        if file == "tokenizer.json":
            files = {file: whole | {"added_tokens": [added | {"id": last}]}}
        else:
            lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
            (folder / "merges.txt").write_text("\n".join(lines))
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))

    def read(folder):
        return Tokenizer.of_folder(folder)(["a photo of a <cat>"])

    return Reader(make, read, file, known(names) if names else mutations.of_bytes)


READERS = {
    "scheduler": scheduler(),
    "pixel U-Net": pixel_unet(),
    "latent U-Net": latent_unet(),
    "CLIP": clip_text(),
    "vocab.json": tokenizer("vocab.json", ("<|startoftext|>", "a", "<|endoftext|>")),
    "merges.txt": tokenizer("merges.txt"),
    "added_tokens.json": tokenizer("added_tokens.json", ("<cat>", "x", "1" * 5000)),
    "tokenizer_config.json": tokenizer(
        "tokenizer_config.json", ("added_tokens_decoder", "pad_token")
    ),
    "tokenizer.json": tokenizer("tokenizer.json", ("model", "added_tokens")),
}
SLOW = ("latent U-Net", "CLIP")  # to be made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in READERS]
)
def test_some_changed_settings(tmp_path, name):
    check(READERS[name], name, tmp_path / "a", 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_changed_settings(tmp_path, name):
    check(READERS[name], name, tmp_path / "a", 1500)


BLOCKS = [5, True, [[1]], [1], ["DownBlock2D", 3], {"a": 1}, HUGE, "x"]


@pytest.mark.parametrize("value", BLOCKS, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("name", ["pixel U-Net", "latent U-Net"])
def test_types_of_blocks_that_are_no_texts(name, value, tmp_path):
    reader = READERS[name]
    reader.make(tmp_path)
    (path,) = tmp_path.glob(reader.file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"up_block_types": value}))
    with pytest.raises(BadInput, match="up_block_types|not supported"):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    "value, number, scale",
    [
        *[(1.5, True, True), (1e31, True, False), (sys.float_info.max, True, False)],
        *[(10**308, True, False), (HUGE, False, False), (float("nan"), False, False)],
        *[(float("inf"), False, False), (True, False, False), ("1", False, False)],
    ],
    ids=lambda value: repr(value)[:9],
)
def test_what_is_a_number_and_what_a_scale_of_latents(value, number, scale):
    assert is_number(value) is number
    if not scale:
        with pytest.raises(BadInput, match="scaling_factor"):
            published_scaling("kl", {"scaling_factor": value}, None, "a")
    else:
        assert published_scaling("kl", {"scaling_factor": value}, None, "a")[0] == value
