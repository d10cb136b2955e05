"""Diffusion transformers that others published: their files and folders, and what is refused."""

from runtime.commandline import BadInput

import argparse

import pytest
import torch
from reference_dit import batch, opened, relative
from safetensors.torch import save_file

import dit
from tests.cases.dit_of_diffusers import twin


def same(net, other):
    assert net.settings == other.settings and net.shape == other.shape and net.null == other.null
    a, b = net.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        n for n, p in other.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "nested", "half"])
def test_files_in_the_published_names_are_read(tmp_path, suffix):
    net = opened((4, 4, 12), learn_sigma=True)
    path, state = tmp_path / "net.pt", net.state_dict()
    if suffix == "safetensors":
        path = tmp_path / "net.safetensors"
        save_file(state, path)
    elif suffix == "half":
        state = {name: value.half() for name, value in state.items()}
        torch.save(state, path)
        net.load_state_dict(state | {"pos_embed": net.pos_embed})
    elif suffix == "nested":  # as the published training script saves
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        flags = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
        torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": flags}, path)
    else:
        torch.save(state, path)
    same(dit.load_published(path, num_heads=2), net)


def test_names_are_those_of_the_published_files():
    names = opened(depth=1).state_dict().keys()
    layers = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.0.adaLN_modulation.1",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    both = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == both | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_heads_of_published_sizes_are_known_and_others_asked_for(tmp_path):
    with torch.device("meta"):
        net = dit.DiT((4, 8, 8), 5, **dit.parse_size("dit-s/2"))
    state = {name: torch.zeros(value.shape) for name, value in net.state_dict().items()}
    torch.save(state | {"pos_embed": dit.positions(384, 4, 4)}, tmp_path / "net.pt")
    assert dit.load_published(tmp_path / "net.pt").settings == net.settings
    torch.save(opened().state_dict(), tmp_path / "small.pt")
    with pytest.raises(
        BadInput, match="hidden size 32 and depth 2, none of the published .*num_heads="
    ):
        dit.load_published(tmp_path / "small.pt")


@pytest.mark.parametrize("pipeline", [False, True])
def test_folders_of_diffusers_are_read(tmp_path, pipeline):
    net = opened((4, 8, 8), patch_size=4, learn_sigma=True)
    folder = tmp_path / "transformer" if pipeline else tmp_path
    twin(net).save_pretrained(folder)
    same(dit.load_published(tmp_path), net)


def test_what_diffusers_computes_otherwise_is_as_documented():
    """Its class divides the index of a frequency by 127, and has 1e-5 in half of its norms."""
    net, (z, t, y) = opened(), batch()
    theirs = twin(net)
    with torch.no_grad():
        for block in theirs.transformer_blocks:
            block.norm3.eps = 1e-5
        assert relative(theirs(z, t, y).sample, net(z, t, y)) < 1e-5
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 1
        assert 1e-3 < relative(theirs(z, t, y).sample, net(z, t, y)) < 1e-1


def damaged(state, kind):
    state = dict(state)
    if kind == "lacking":
        del state["blocks.1.mlp.fc1.bias"]
    elif kind == "unknown":
        state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    elif kind == "shape":
        state["blocks.1.attn.proj.weight"] = torch.ones(32, 16)
    elif kind == "positions":
        state["pos_embed"] = state["pos_embed"].flip(1)
    elif kind == "another network":
        state = {"conv_in.weight": torch.ones(3, 3)}
    elif kind == "no tensors":
        state = {"step": 5}
    elif kind == "no dictionary":
        state = [1, 2]
    return state


@pytest.mark.parametrize(
    "kind, message",
    [
        ("lacking", r"lacks a tensor .*: blocks\.1\.mlp\.fc1\.bias"),
        ("unknown", r"no place for: blocks\.0\.attn\.q_norm\.weight"),
        ("shape", r"blocks\.1\.attn\.proj\.weight is \(32, 16\), expected \(32, 32\)"),
        ("positions", "pos_embed is not the fixed one of a DiT of width 32"),
        ("another network", r"no DiT in the published names: it has no x_embedder\.proj\.weight"),
        ("no tensors", "is not a state_dict"),
        ("no dictionary", "is not a state_dict"),
    ],
)
def test_files_that_hold_no_such_network_are_refused(tmp_path, kind, message):
    torch.save(damaged(opened().state_dict(), kind), tmp_path / "net.pt")
    with pytest.raises(BadInput, match=message):
        dit.load_published(tmp_path / "net.pt", num_heads=2)


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_missing_torn_and_executable_files_are_refused(tmp_path, capsys):
    with pytest.raises(BadInput, match="no such file or folder"):
        dit.load_published(tmp_path / "absent.pt")
    torch.save(opened().state_dict(), tmp_path / "net.pt")
    content = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: len(content) // 2])
    torch.save({"ema": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "torn.safetensors").write_bytes(content[:100])
    for name in ("torn.pt", "harmful.pt", "torn.safetensors"):
        with pytest.raises(BadInput, match=f"{name} is no .*file"):
            dit.load_published(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_folders_of_diffusers_that_are_something_else_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json cannot be read"):
        dit.load_published(tmp_path)
    theirs = twin(opened())
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state, config = theirs.state_dict(), (tmp_path / "config.json").read_text()

    (tmp_path / "config.json").write_text(config.replace("gelu-approximate", "geglu"))
    with pytest.raises(BadInput, match="activation_fn 'geglu' is not supported"):
        dit.load_published(tmp_path)
    (tmp_path / "config.json").write_text(config)

    embedder = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(state | {embedder: state[embedder] + 1}, weights)
    with pytest.raises(BadInput, match=f"no place in a DiT for its tensor {embedder}"):
        dit.load_published(tmp_path)
    save_file(state | {"adaln_single.linear.bias": torch.ones(3)}, weights)
    with pytest.raises(BadInput, match=r"no place in a DiT for its tensor adaln_single"):
        dit.load_published(tmp_path)
    del state["transformer_blocks.1.attn1.to_k.weight"]
    save_file(state, weights)
    with pytest.raises(BadInput, match=r"lacks .*attn1\.to_k\.weight"):
        dit.load_published(tmp_path)
    weights.unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        dit.load_published(tmp_path)
