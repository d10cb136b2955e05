"""Weights as training runs keep them: beside others, under names that wrappers have made longer."""

from runtime import processes
from runtime.commandline import BadInput

import argparse
import collections
import copy
import datetime
import pathlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from openai_unet import published, weights
from reference_dit import opened
from safetensors.torch import save_file
from state_dicts import same
from torch import nn

import dit
from networks.inception import Inception
from networks.inception import read_weights as read_inception
from networks.kl_autoencoder import KLVAE, TinyAutoencoder, load_pretrained
from networks.perceptual import GROUPS, load_perceptual
from networks.published.autoencoder import read_autoencoder
from networks.published.classifier import read_classifier
from networks.published.clip_text import read_clip_text
from networks.published.files import is_published, read_weights
from networks.published.sd_unet import load_latent_unet
from networks.published.stable_diffusion import read_pipeline
from networks.published.unet import load_published, read_network
from tests.cases.dit_of_diffusers import twin

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), out=3)
MARKS = ["a.weight"]
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}
MEAN = {name: value + 1 for name, value in STATE.items()}


def longer(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(content, path):
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------ every reader


def random(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def vgg():
    """Tensors of a narrow VGG16, as torchvision names them."""
    shapes, c_in = {}, 3
    for place in (place for group in GROUPS for place in group):
        shapes |= {f"features.{place}.weight": (2, c_in, 3, 3), f"features.{place}.bias": (2,)}
        c_in = 2
    return random(shapes)


def inception():
    """Tensors of Inception that take no room: each is one number of its own."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    return {name: torch.tensor(i + 0.5).expand(shapes[name]) for i, name in enumerate(shapes)}


READERS = {
    "OpenAI's U-Net": (
        lambda: weights(published(**SMALL)),
        lambda path: load_published(path, size=8)["state"],
    ),
    "classifier": (
        lambda: weights(published(**SMALL | dict(model_channels=64, out=5), pool=4)),
        lambda path: read_classifier(path)["ema"],
    ),
    "DiT": (
        lambda: opened().state_dict(),
        lambda path: dit.load_published(path, num_heads=2).state_dict(),
    ),
    "DiT of diffusers": (
        lambda: twin(opened()).state_dict(),
        lambda path: dit.load_published(path, num_heads=2).state_dict(),
    ),
    "autoencoder": (
        lambda: KLVAE(model_channels=32, channel_mult=(1, 2), num_res_blocks=1).state_dict(),
        lambda path: load_pretrained(path)[0].state_dict(),
    ),
    "VGG16": (vgg, lambda path: load_perceptual(path, (3, 16, 16)).state_dict()),
    "Inception": (inception, lambda path: read_inception(path)[1]),
}
PREFIXES = ("module.", "module._orig_mod.model.", "ema_model.")


@pytest.mark.parametrize("name", READERS)
def test_every_reader_drops_what_stands_before_all_names(name, tmp_path, capsys):
    make, read = READERS[name]
    state = make()
    expected = read(saved(state, tmp_path / "plain.pth"))
    assert not capsys.readouterr().out
    for prefix in PREFIXES:
        path = saved({"ema": longer(state, prefix), "step": 5}, tmp_path / "net.pth")
        assert same(read(path), expected)
        told = f"{path}: takes 'ema', drops '{prefix}' from the names, leaves out 'step'\n"
        assert capsys.readouterr().out == told
        processes.SAID.clear()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_stable_diffusion_is_read_so_too(single, tensors, prefix, tmp_path, capsys):
    weights, vocabulary = single
    path = tmp_path / "net.safetensors"
    save_file(longer(tensors, prefix), path)
    expected, found = (read_pipeline(file, str(vocabulary)) for file in (weights, path))
    assert same(found.unet["state"], expected.unet["state"])
    assert same(found.text[1], expected.text[1])
    assert same(found.autoencoder[1], expected.autoencoder[1])
    assert f"{path}: drops '{prefix}' from the names\n" in capsys.readouterr().out
    for read in (read_clip_text, load_latent_unet, read_autoencoder):
        read(path)


def test_both_halves_of_a_tiny_autoencoder_are_read_so(tmp_path):
    state = TinyAutoencoder(model_channels=8).state_dict()
    for prefix, folder in (("", tmp_path / "plain"), ("module.", tmp_path / "wrapped")):
        folder.mkdir()
        for half in ("encoder", "decoder"):
            own = {k.removeprefix(f"{half}."): v for k, v in state.items() if k.startswith(half)}
            saved(longer(own, prefix), folder / f"taesd_{half}.pth")
    assert same(read_autoencoder(tmp_path / "wrapped")[1], read_autoencoder(tmp_path / "plain")[1])


# --------------------------------------------------------------------------- who makes names longer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x))


def wrapped(net):
    """{who: (module around the network, prefix of its names)}."""
    averaged = torch.optim.swa_utils.AveragedModel(net)
    return {
        "DataParallel": (nn.DataParallel(net), "module."),
        "compile": (torch.compile(net), "_orig_mod."),
        "both": (nn.DataParallel(torch.compile(net)), "module."),
        "AveragedModel": (averaged, "module."),
        "three": (nn.ModuleDict({"ema_model": nn.DataParallel(torch.compile(net))}), "ema_model"),
    }


@pytest.mark.parametrize("who", wrapped(Net()))
def test_the_names_that_torch_makes_longer_are_read(who, tmp_path, capsys):
    net = Net()
    outer, prefix = wrapped(net)[who]
    path = saved(outer.state_dict(), tmp_path / "net.pt")
    assert same(read_weights(path, MARKS), net.state_dict())
    assert f"drops '{prefix}" in capsys.readouterr().out


def test_wrappers_around_parts_of_a_network_are_dropped_where_they_stand(tmp_path, capsys):
    state = {"_fsdp_wrapped_module.a._fsdp_wrapped_module.weight": STATE["a.weight"]}
    state["_fsdp_wrapped_module.b._checkpoint_wrapped_module.bias"] = STATE["b.bias"]
    assert same(read_weights(saved(state, tmp_path / "x.pt"), MARKS), STATE)
    assert "drops '_fsdp_wrapped_module.' from the names" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix", ["net.", "unet.", "diffusion_model.", "model.", "my.own.wrapper.of.it."]
)
def test_any_beginning_is_dropped_when_the_rest_is_what_is_looked_for(prefix, tmp_path):
    assert same(read_weights(saved(longer(STATE, prefix), tmp_path / "x.pt"), MARKS), STATE)


def test_a_beginning_that_the_reader_knows_is_kept(tmp_path, capsys):
    state = longer(STATE, "text_model.")
    path = saved(state, tmp_path / "x.pt")
    assert same(read_weights(path, ["text_model.a.weight", "a.weight"]), state)
    assert not capsys.readouterr().out


def test_a_network_among_other_tensors_is_not_taken_out_of_them(tmp_path):
    state = longer(STATE, "denoise_fn.") | {"betas": torch.ones(9)}
    path = saved(state, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"x\.pt: .*begin with 'denoise_fn\.', .* lie 'betas'"):
        read_weights(path, MARKS)
    two = longer(STATE, "first.") | longer({**STATE, "c": torch.ones(1)}, "second.")
    with pytest.raises(BadInput, match=r"beside it lie 'second\.a\.weight'|several networks"):
        read_weights(saved(two, path), MARKS)


# --------------------------------------------------------------------------- what lies beside them


ADAM = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": STATE["a.weight"] * 9}}}
WRAPPERS = {
    "state_dict": ({"state_dict": STATE, "epoch": 3}, STATE),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": ADAM}, STATE),
    "model and mean": ({"model": STATE, "ema": MEAN, "optimizer": ADAM, "step": 5}, MEAN),
    "mean first": ({"ema_state_dict": MEAN, "state_dict": STATE}, MEAN),
    "net": ({"net": STATE, "acc": 0.5, "epoch": 3}, STATE),
    "params": ({"params": STATE}, STATE),
    "params and mean": ({"params": STATE, "params_ema": MEAN}, MEAN),
    "generator": ({"generator": STATE, "discriminator": {"c": torch.ones(9, 9)}}, STATE),
    "g_ema": ({"g": STATE, "d": {"c": torch.ones(9)}, "g_ema": MEAN}, MEAN),
    "camel": ({"netG": STATE, "netGEMA": MEAN}, MEAN),
    "swa": ({"model": STATE, "swa_model": {"n_averaged": torch.tensor(3), **MEAN}}, MEAN),
    "nested": ({"run": {"weights": {"model": STATE, "ema": {"net": MEAN}}}}, MEAN),
    "by decay": ({"model": STATE, "ema": {0.9999: MEAN, 0.99: STATE}}, MEAN),
    "list": ([STATE, MEAN], MEAN),
    "tuple in a list": ({"models": (STATE, MEAN), "step": 3}, MEAN),
    "brackets": ({"[a]": STATE, "b]": [{"step": 3}]}, STATE),
    "schema": ({"model": STATE, "schema": {"a.weight": torch.ones(1)}}, STATE),
    "ema_pytorch": (
        longer(MEAN, "ema_model.")
        | longer(STATE, "online_model.")
        | {"initted": torch.tensor(True), "step": torch.tensor(5)},
        MEAN,
    ),
    "trainer of lucidrains": (
        {
            "step": 5,
            "model": STATE,
            "ema": longer(STATE, "online_model.")
            | longer(MEAN, "ema_model.")
            | {"initted": torch.tensor(True), "step": torch.tensor(5)},
            "scaler": None,
        },
        MEAN,
    ),
    "torch_ema": (
        {
            "model": longer(STATE, "module."),
            "ema": {"decay": 0.9, "shadow_params": [*MEAN.values()]},
        },
        MEAN,
    ),
    "a mean of other tensors": (
        {"model": STATE, "ema": {"shadow_params": [torch.ones(1), torch.ones(2)]}},
        STATE,
    ),
}


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_weights_are_found_and_the_running_mean_wins(name, form, tmp_path, capsys):
    content, expected = WRAPPERS[name]
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert same(read_weights(path, MARKS), expected)
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: ") and said.count("\n") == 1


def test_the_line_says_what_was_taken_and_what_else_there_was(tmp_path, capsys):
    content = {"model": STATE, "ema": MEAN, "opt": ADAM, "step": 5, "epoch": 1, "args": "x"}
    path = saved(content, tmp_path / "x.pt")
    read_weights(path, MARKS)
    told = "takes 'ema', leaves out 'model', 'opt', 'step', 'epoch' and 1 more"
    assert capsys.readouterr().out == f"{path}: {told}\n"
    read_weights(saved(WRAPPERS["torch_ema"][0], path), MARKS)
    told = "takes 'ema.shadow_params', named in the order of 'model.module'"
    assert f"{path}: {told}, leaves out 'model', 'ema.decay'\n" == capsys.readouterr().out
    read_weights(saved([STATE, MEAN], path), MARKS)
    assert capsys.readouterr().out == f"{path}: takes '[1]', leaves out '[0]'\n"
    read_weights(saved(WRAPPERS["ema_pytorch"][0], path), MARKS)
    told = "drops 'ema_model.' from the names, leaves out 'initted', 'step', 'online_model.'"
    assert capsys.readouterr().out == f"{path}: {told}\n"


def test_a_plan_says_nothing(tmp_path, capsys):
    path = saved({"model": STATE, "ema": MEAN}, tmp_path / "x.pt")
    with torch.device("meta"):
        found = read_weights(path, MARKS)
    assert all(value.is_meta for value in found.values()) and not capsys.readouterr().out


def test_means_without_names_are_told(tmp_path):
    for content in ([*MEAN.values()], {"decay": 0.9, "shadow_params": [*MEAN.values()]}):
        with pytest.raises(BadInput, match=r"holds 2 tensors without names.*state_dict\(\)"):
            read_weights(saved(content, tmp_path / "x.pt"), MARKS)


def stubbed(monkeypatch, module, name, base=object):
    kind = type(name, (base,), {"__module__": module})
    for i in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:i])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, kind)
    return kind


@pytest.mark.parametrize("form", ["zip", "old"])
def test_objects_beside_the_weights_are_no_reason_to_refuse_a_file(tmp_path, monkeypatch, form):
    path, zipped = tmp_path / "x.pt", form == "zip"
    with monkeypatch.context() as installed:
        node = stubbed(installed, "omegaconf.dictconfig", "DictConfig")()
        node.content = {"lr": 1e-4}
        easy = stubbed(installed, "easydict", "EasyDict", dict)(lr=1e-4)
        content = {
            "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("runs")),
            "config": node,
            "easy": easy,
            "loss": np.float64(0.5),
            "losses": np.ones(3),
            "when": datetime.datetime(2024, 6, 1),
            "torch": torch.__version__,
            "names": {"cat", "dog"},
            "sums": collections.defaultdict(int, a=1),
            "model": collections.OrderedDict(STATE),
        }
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path, MARKS), STATE)
    outer = collections.defaultdict(dict, model=collections.defaultdict(list, STATE))
    torch.save(outer, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path, MARKS), STATE)


# ------------------------------------------------------------------------------------- odd tensors


def test_parameters_tied_tensors_and_strides_are_read_as_numbers(tmp_path):
    shared = nn.Parameter(torch.randn(4, 6))
    state = {"a.weight": shared, "tied": shared, "turned": shared.T, "part": shared[1:3, ::2]}
    state["number"] = torch.tensor(2.5)
    found = read_weights(saved(state, tmp_path / "x.pt"), MARKS)
    assert same(found, {name: value.detach() for name, value in state.items()})
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in weights(published(**SMALL)).items()}
    path = saved({"module": longer(state, "module.")}, tmp_path / "x.pt")
    found = load_published(path, size=8)["state"]
    expected = load_published(saved({k: v.float() for k, v in state.items()}, path), size=8)
    assert same(found, expected["state"])
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3).to_sparse(),
        torch.empty(2, 3, device="meta"),
        torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_without_plain_numbers_are_refused(value, tmp_path):
    path = saved({"a.weight": value, "b.bias": torch.ones(2)}, tmp_path / "x.pt")
    for where in ("cpu", "meta"):
        message = r"x\.pt.* a\.weight is no plain tensor of numbers"
        with torch.device(where), pytest.raises(BadInput, match=message):
            read_weights(path, MARKS)


@pytest.mark.parametrize("name", READERS)
def test_tensors_of_another_rank_or_kind_are_refused_in_one_line(name, tmp_path):
    make, read = READERS[name]
    state = {k: v.clone() for k, v in make().items()}
    keys = [k for k in state if not k.endswith("num_batches_tracked")]
    for key in keys[:: len(keys) // 4]:
        for value in (torch.tensor(1.0), torch.ones(0), state[key].to(torch.complex64)):
            path = saved(state | {key: value}, tmp_path / "net.pth")
            with pytest.raises(BadInput) as refused:
                read(path)
            assert "\n" not in str(refused.value) and str(path) in str(refused.value)


# ------------------------------------------------------------------------------- whose file it is


def test_a_wrapped_u_net_is_known_for_a_published_one(tmp_path):
    state = weights(published(**SMALL))
    for content in (
        {"model": state, "ema": state, "step": 5},
        longer(state, "module."),
        {"args": argparse.Namespace(), "state_dict": state},
        [state, state],
    ):
        assert is_published(saved(content, tmp_path / "x.pt"))
    for content in ({"a.weight": torch.ones(2)}, {"script": "ddpm_pixel", "ema": state}, [1]):
        assert not is_published(saved(content, tmp_path / "x.pt"))


def test_a_checkpoint_of_ours_is_no_published_file(tmp_path):
    own = {"script": "dit", "config": {}, "ema": opened().state_dict(), "model": {}}
    path = saved(own, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=r"ckpt\.pt is a checkpoint of dit\.py, trained here"):
        dit.load_published(path, num_heads=2)
    theirs = saved({"model": {"a": torch.ones(2)}}, tmp_path / "theirs.pt")
    with pytest.raises(BadInput, match=r"theirs\.pt was written by none of these scripts"):
        read_network(theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_programs_and_whole_objects_are_told_what_to_type(tmp_path):
    net = Net()
    torch.save(net, tmp_path / "whole.pt")
    torch.save({"model": net, "epoch": 3}, tmp_path / "beside.pt")
    torch.jit.script(net).save(str(tmp_path / "script.pt"))
    for name in ("whole.pt", "beside.pt"):
        with pytest.raises(BadInput, match=rf"{name} .*\.Net was .*save\(net\.state_dict\(\)"):
            read_weights(tmp_path / name, MARKS)
    with pytest.raises(BadInput, match=r"is a TorchScript archive.*jit\.load.*state_dict\(\)"):
        read_weights(tmp_path / "script.pt", MARKS)
    assert is_published(tmp_path / "script.pt")


def test_the_weights_are_those_that_were_saved_not_a_view_of_a_later_file(tmp_path):
    state = weights(published(**SMALL))
    path = saved({"ema": longer(state, "module.")}, tmp_path / "x.pt")
    found = load_published(path, size=8)["state"]
    before = copy.deepcopy(found)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(found, before)
