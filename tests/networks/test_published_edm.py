"""NVIDIA's EDM pickles: what is read of them, and that nothing in any file is ever executed."""

from runtime.commandline import BadInput

import io
import os
import pickle
import random
import re
import struct
import sys
import tracemalloc
import types

import edm_pickles as files
import numpy as np
import pytest
import torch
from reference_edm import forward, published, spread

from networks.edm_unet import DDPMpp
from networks.published.edm import read_edm

SETTINGS = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,))
OURS = dict(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.13,
)
LINE = "; expected a DDPM++, such as edm-cifar10-32x32-cond-vp.pkl"


def weights(classes=3, augment_dim=2, **changes):
    return spread(published((8, 8), classes, augment_dim, **{**SETTINGS, **changes}), torch.float32)


def network(classes=3, change=None, **about):
    """EDMPrecond around a SongUNet of 8x8 pixels; change(model) is made to it before."""
    model = files.tree(weights(classes))
    if change:
        change(model)
    return files.precond(model, 8, classes, **about)


def written(path, **about):
    return files.written(path, lambda: {"ema": network(**about)})


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    "classes, augment_dim, changes",
    [(3, 2, {}), (0, 9, {}), (0, 0, {}), (2, 0, dict(channel_mult=(2, 1, 2), num_blocks=2))],
    ids=["cond", "uncond", "no augmentation", "three levels"],
)
def test_a_file_in_the_published_layout_gives_the_network_that_was_written(
    tmp_path, classes, augment_dim, changes
):
    tensors = weights(classes, augment_dim, **changes)

    def snapshot():
        loss = files.Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5)
        data = files.easy_dict(class_name="training.dataset.ImageFolderDataset", xflip=False)
        ema = files.precond(files.tree(tensors), 8, classes, sigma_data=0.25, sigma_max=80)
        return {"ema": ema, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": data}

    found = read_edm(files.written(tmp_path / "a.pkl", snapshot))
    state = found.pop("state")
    levels = changes.get("channel_mult", (1, 2))
    settings = dict(OURS, augment_dim=augment_dim, channel_mult=levels)
    assert found == dict(
        settings=settings | dict(num_res_blocks=changes.get("num_blocks", 1)),
        shape=(3, 8, 8),
        num_classes=classes,
        sigma_data=0.25,
        sigma_min=0.0,
        sigma_max=80.0,
    )
    assert list(state) == list(tensors)
    assert all(torch.equal(state[name], value) for name, value in tensors.items())

    net = DDPMpp(found["shape"], classes, **found["settings"]).eval().double()
    net.load_state_dict(state)
    x, c_noise = torch.sin(torch.arange(384.0)).view(2, 3, 8, 8).double(), torch.tensor([-1.5, 0.7])
    one_hot = torch.eye(classes, dtype=torch.float64)[[0, -1]] if classes else None
    y = torch.tensor([0, classes - 1]) if classes else None
    augment = torch.ones(2, augment_dim).double() if augment_dim else None
    exact = {name: value.double() for name, value in tensors.items()}
    expected = forward(exact, x, c_noise, one_hot, augment)
    torch.testing.assert_close(net(x, c_noise, y, augment), expected, rtol=1e-10, atol=1e-10)


def test_numbers_are_read_as_numpy_1_and_2_write_them(tmp_path, monkeypatch):
    """Numpy 2, which runs here, names another module than numpy 1, with which they were written."""
    old = types.ModuleType("numpy.core.multiarray")
    old.scalar = files.function("numpy.core.multiarray", "scalar")
    number = files.Calls(old.scalar, np.dtype("f8"), np.float64(0.5**0.5).tobytes())

    def change(model):
        for block in (*model.enc.values(), *model.dec.values()):
            if block.kind == "UNetBlock":
                block.skip_scale = number

    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old)
    path = written(tmp_path / "old.pkl", change=change)
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert b"multiarray" in written(tmp_path / "new.pkl").read_bytes()
    states = [read_edm(tmp_path / name)["state"] for name in ("old.pkl", "new.pkl")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_was_read_needs_the_file_no_longer(tmp_path):
    path = written(tmp_path / "a.pkl")
    state = read_edm(path)["state"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(state[name], value) for name, value in weights().items())
    state["map_layer0.bias"] += 1  # its own memory, and writable


# -------------------------------------------------------------------------------- what is refused


def refused(path, message, memory=3e6):
    """Reading is refused in one line with `message`, and takes no more memory than promised."""
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=message) as raised:
            read_edm(path)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = str(raised.value)
    assert told.startswith(str(path)) and told.isprintable() and len(told) < len(str(path)) + 300
    assert used < 5 * path.stat().st_size + memory


def block(model):
    return model.enc["8x8_block0"]


HARM = {
    "os.system": (lambda: files.Calls(os.system, "touch harm"), "holds 'posix.system'"),
    "eval": (lambda: files.Calls(eval, "open('harm', 'w')"), "holds 'builtins.eval'"),
    "exec": (lambda: files.Calls(exec, "open('harm', 'w')"), "holds 'builtins.exec'"),
    "getattr": (lambda: files.Calls(getattr, "text", "upper"), "holds 'builtins.getattr'"),
    "torch.load": (lambda: files.Calls(torch.load, "x.pt"), "holds 'torch.serialization.load'"),
    "objects of numpy": (lambda: np.array([{}], dtype=object), "holds 'numpy.*_reconstruct'"),
    "numbers of numpy": (lambda: np.float32(1), "numpy data of dtype 'f4'"),
    "dtype of objects": (lambda: np.dtype("O"), "numpy data of dtype 'O8'"),
    "big-endian numbers": (lambda: np.dtype(">f8"), "gives a Dtype a state"),
    "arrays of numpy": (lambda: np.zeros(3), "holds 'numpy.*_reconstruct'"),
    "function as data": (lambda: os.system, "holds 'posix.system'"),
}


@pytest.mark.parametrize("make, message", HARM.values(), ids=HARM)
@pytest.mark.parametrize("place", ["alone", "beside", "within"])
def test_what_could_harm_is_refused_by_name_and_not_executed(
    tmp_path, monkeypatch, make, message, place
):
    monkeypatch.chdir(tmp_path)

    def content():
        if place == "alone":
            return make()
        change = (lambda model: setattr(block(model), "x", make())) if place == "within" else None
        return {"ema": network(change=change), "more": make() if place == "beside" else None}

    refused(files.written(tmp_path / "a.pkl", content), message + ".*" + re.escape(LINE))
    assert not (tmp_path / "harm").exists()


def test_the_file_that_harms_does_so_when_python_reads_it(tmp_path, monkeypatch):
    """Else the test above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(HARM["os.system"][0]()))
    assert (tmp_path / "harm").exists()
    with pytest.raises(SystemExit, match="was executed"), files.their_modules():
        pickle.loads(pickle.dumps(files.Persistent("EDMPrecond")))


def stored(values):
    """What torch.save writes of a storage within a pickle, and where in it the numbers begin."""
    stream = io.BytesIO()
    torch.save(values._typed_storage(), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue(), len(stream.getvalue()) - 4 * values.numel()


def storage_call(content):
    return files.Calls(torch.storage._load_from_bytes, content)


def larger(content, start):
    """The storage says 2^40 numbers, in its pickle and before its numbers."""
    claim = content[: start - 8].replace(
        b"K\x10N", b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"N"
    )
    return claim + struct.pack("<q", 1 << 40) + content[start:]


VALUES = torch.arange(16.0).reshape(4, 4)
CONTENT, START = stored(VALUES)
STORAGES = {
    "larger than the file": (larger(CONTENT, START), "'1099511627776' and 1099511627776 numbers"),
    "shorter than it says": (CONTENT[:-4], "'16' and 16 numbers and holds 60 bytes: torn"),
    "longer than it says": (CONTENT + bytes(4), "'16' and 16 numbers and holds 68 bytes"),
    "of two minds": (CONTENT[: START - 8] + struct.pack("<q", 4) + bytes(16), "'16' and 4 num"),
    "big-endian": (CONTENT.replace(b"endianq\x02\x88", b"endianq\x02\x89"), "did not write"),
    "of another mark": (CONTENT.replace(b"l\xfc\x9cF", b"m\xfc\x9cF"), "did not write"),
    "of half precision": (stored(VALUES.half())[0], "holds 'torch.HalfStorage'"),
    "of integers": (stored(VALUES.long())[0], "holds 'torch.LongStorage'"),
    "without numbers": (CONTENT[: START - 8], "torn one"),
    "empty": (b"", "torn one"),
    "another pickle": (5 * pickle.dumps(1) + bytes(8), "storage that torch.save did not write"),
    "with code": (pickle.dumps(HARM["os.system"][0]()), "holds 'posix.system'"),
    "a storage within": (pickle.dumps(VALUES), "holds 'torch._utils._rebuild_tensor_v2'"),
}
BAD = "negative or too large shape"
TENSORS = {
    "offset beyond": (dict(offset=1), "16 numbers from number 1 on in a storage of 16"),
    "offset negative": (dict(offset=-1), BAD),
    "shape beyond": (dict(size=(5, 4)), "20 numbers from number 0 on in a storage of 16"),
    "shape negative": (dict(size=(-4, -4)), BAD),
    "shape huge": (dict(size=(2**62, 4)), BAD),
    "shape of texts": (dict(size=("4", "4")), BAD),
    "too many sides": (dict(size=(1,) * 100_000, stride=(1,) * 100_000), BAD),
    "strides negative": (dict(stride=(-4, 1)), BAD),
    "strides zero": (dict(size=(30_000, 30_000), stride=(0, 0)), "not contiguous"),
    "strides beyond": (dict(stride=(400, 1)), "not contiguous"),
    "strides missing": (dict(stride=(1,)), BAD),
}


@pytest.mark.parametrize("content, message", STORAGES.values(), ids=STORAGES)
def test_storages_that_are_not_what_they_say_are_refused(tmp_path, content, message):
    def change(model):
        block(model).x = files.tensor_call(VALUES, storage=storage_call(content))

    refused(written(tmp_path / "a.pkl", change=change), message)


@pytest.mark.parametrize("says, message", TENSORS.values(), ids=TENSORS)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, says, message):
    def change(model):
        block(model).x = files.tensor_call(VALUES, **says)

    refused(written(tmp_path / "a.pkl", change=change), message)


def test_weights_that_share_their_memory_are_refused(tmp_path):
    """A small file would become large memory."""
    most = torch.zeros(max(value.numel() for value in weights().values()))
    shared = storage_call(stored(most)[0])

    def change(model):
        for module in model.modules():
            for name, value in module._parameters.items():
                strides = value.stride()
                call = files.tensor_call(most, 0, tuple(value.shape), strides, shared)
                module._parameters[name] = call

    refused(written(tmp_path / "a.pkl", change=change), "some share their memory")


# Instructions of a pickle by hand: each would take gigabytes, or forever, of a careless reader.
BOMBS = {
    "bytes of 2^60": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60), "torn one"),
    "text of 2^31": (b"\x80\x04X" + struct.pack("<I", 1 << 31), "torn one"),
    "place 2^32 of the memory": (b"\x80\x04Nr\xff\xff\xff\xff.", 'no network under the name "ema"'),
    "frame of 2^60": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", "no network"),
    "many dictionaries": (b"\x80\x04" + b"}\x94" * 400_000, "more than 300000 instr"),
    "many texts": (b"\x80\x04" + b"\x8c\x03a\xc3\xa4" * 400_000, "more than 300000 instr"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 100_000 + b".", 'no network under the name "ema"'),
    "deep key": (b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", "has a tuple as a key"),
    "number of 2^31 bytes": (b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1), "torn one"),
    "function with attributes": (b"\x80\x04cnumpy\ndtype\n}b.", "gives a Name a state"),
    "registered by number": (b"\x80\x04\x82\x01.", "it has the instruction EXT1"),
    "persistent by text": (b"Pos.system\n.", "it has the instruction PERSID"),
    "instance": (b"(ios\nsystem\n.", "it has the instruction INST"),
    "nothing on the stack": (b"\x80\x04R.", "torn one"),
    "a call of a number": (b"\x80\x04K\x01)R.", "torn one"),
}


@pytest.mark.parametrize("content, message", BOMBS.values(), ids=BOMBS)
def test_instructions_that_would_not_end_or_fill_memory_are_refused(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    refused(tmp_path / "a.pkl", message, memory=100e6)


def changed(place, name, value):
    """A change of an attribute of the module at a path."""
    return lambda model: setattr(model.get_submodule(place), name, value)


def moved(place, name, value):
    """A change of a tensor, by its name and the function that gives the new one."""

    def change(model):
        module = model.get_submodule(place)
        group = module._parameters if name in module._parameters else module._buffers
        group[name] = value(group[name])

    return change


def twice(model):
    model.enc["8x8_block0"].conv1 = model.enc["8x8_block0"].conv0


def endless(model):
    """Half of 0 is 0."""
    for side in (2, 1, 0):
        added = model.enc[f"{side}x{side}_block0"] = files.Persistent("UNetBlock")
        added.conv1 = files.Persistent("Conv2d")
        added.conv1.weight = torch.nn.Parameter(torch.ones(16))


def long(model):
    for i in range(33):
        model.enc[f"8x8_block{i}"] = block(model) if i == 0 else files.Persistent("UNetBlock")


def ncsnpp(model):
    model.map_noise = files.Persistent("FourierEmbedding")
    model.enc["4x4_aux_residual"] = files.Persistent("Conv2d")


def smooth(model):
    """The filter [1, 3, 3, 1] of NCSN++, in its place."""
    side = torch.tensor([1.0, 3, 3, 1]) / 8
    model.enc["4x4_down"].conv0._buffers["resample_filter"] = side.outer(side)[None, None]


def nested(model):
    inner = model.map_noise
    for _ in range(6):
        inner.part = files.Persistent("SongUNet")
        inner = inner.part


BLOCK, NORM, DOWN = "enc.8x8_block0", "enc.8x8_block0.norm0", "enc.4x4_down.conv0"
OTHERS = {
    "VPPrecond": (dict(kind="VPPrecond"), "holds a network in 'VPPrecond', not in EDMPrecond"),
    "VEPrecond": (dict(kind="VEPrecond"), "holds a network in 'VEPrecond'"),
    "iDDPMPrecond": (dict(kind="iDDPMPrecond"), "holds a network in 'iDDPMPrecond'"),
    "another SongUNet": (dict(kind="SongUNet"), "holds a network in 'SongUNet'"),
    "ADM": (dict(change=changed("", "kind", "DhariwalUNet")), "a 'DhariwalUNet', no SongUNet"),
    "NCSN++": (dict(change=ncsnpp), "by a 'FourierEmbedding', as NCSN.. does"),
    "NCSN++ filter": (dict(change=smooth), r"filter is \(1, 1, 4, 4\), expected \(1, 1, 2, 2\)"),
    "filter": (
        dict(change=moved(DOWN, "resample_filter", lambda t: 2 * t)),
        "4x4_down.conv0.resample_filter is not the mean of 2x2 pixels",
    ),
    "no filter": (dict(change=moved(DOWN, "resample_filter", lambda t: None)), "is no tensor"),
    "no attribute": (dict(change=lambda model: delattr(block(model), "skip_scale")), "a NoneType"),
    "skip_scale": (dict(change=changed(BLOCK, "skip_scale", 1.0)), "skip_scale is '1.0', expected"),
    "adaptive": (dict(change=changed(BLOCK, "adaptive_scale", True)), "adaptive_scale is 'True'"),
    "heads": (dict(change=changed("dec.4x4_in0", "num_heads", 4)), "num_heads is '4', expected 1"),
    "dropout": (dict(change=changed("dec.4x4_in0", "dropout", 0.2)), "'0.2', expected 0.13"),
    "dropout of 2": (dict(change=changed(BLOCK, "dropout", 2)), "no dropout from 0 to 1"),
    "eps": (dict(change=changed(NORM, "eps", 1e-5)), "norm0.eps is '1e-05', expected 1e-06"),
    "groups": (dict(change=changed(NORM, "num_groups", 2)), "num_groups is '2', expected 4"),
    "fused": (dict(change=changed(DOWN, "fused_resample", True)), "fused_resample is 'True'"),
    "up": (dict(change=changed(f"{BLOCK}.conv0", "up", True)), "conv0.up is 'True'"),
    "endpoint": (dict(change=changed("map_noise", "endpoint", False)), "endpoint is 'False'"),
    "class": (dict(change=changed(NORM, "kind", "LayerNorm")), "a 'LayerNorm' at .*norm0"),
    "twice": (dict(change=twice), "conv[01]' a module that lies elsewhere, too"),
    "nested": (dict(change=nested), "no module of a DDPM.* at 'map_noise.part.part"),
    "endless": (dict(change=endless), "has more than 8 levels"),
    "long": (dict(change=long), "has no level of 1 to 32 blocks at 8x8"),
    "odd name": (
        dict(change=lambda model: model.add_module("a" * 41, files.Persistent("Linear"))),
        "has a part of the name 'aaaa",
    ),
    "more": (
        dict(change=lambda model: setattr(block(model), "conv2", files.Persistent("Conv2d"))),
        "it has enc.8x8_block0.conv2",
    ),
    "less": (dict(change=lambda model: delattr(block(model), "affine")), "it lacks enc.*affine"),
    "shape": (
        dict(change=moved("map_layer1", "weight", lambda t: torch.nn.Parameter(t[:32].clone()))),
        r"map_layer1.weight is \(32, 64\), expected \(64, 64\)",
    ),
    "labels": (dict(label_dim=4), r"map_label.weight is \(16, 3\), expected \(16, 4\)"),
    "sides": (dict(img_resolution=16), "lacks a tensor of a DDPM.*: enc.16x16_conv.weight"),
    "sides of text": (dict(img_resolution="8"), "has no whole number img_resolution"),
    "channels": (dict(img_channels=1), r"aux_conv.bias is \(3,\), expected \(1,\)"),
    "sigma_data": (dict(sigma_data=0), "has no sigma_data above 0"),
    "sigma_max": (dict(sigma_max=float("nan")), "or no sigma_min below sigma_max"),
}


@pytest.mark.parametrize("about, message", OTHERS.values(), ids=OTHERS)
def test_other_networks_are_refused_by_name(tmp_path, about, message):
    refused(written(tmp_path / "a.pkl", **about), message)


def test_what_is_no_pickle_of_a_network_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    for content in (b"", b"<html>", b"\x80\x04N.", b"\x80\x04}.", os.urandom(100)):
        path.write_bytes(content)
        refused(path, "no pickle|no network|holds")
    torch.save({"ema": weights()}, path)
    refused(path, "it has the instruction PERSID")
    files.written(path, lambda: {"ema": {"model": 1}})
    refused(path, 'holds no network under the name "ema"')
    for missing in (tmp_path, tmp_path / "b.pkl"):
        with pytest.raises(BadInput, match=f"{missing}: no such file; name a pickle, such as edm-"):
            read_edm(missing)


def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path):
    """Numbers of weights may change unnoticed; nothing ends in a traceback, and nothing runs."""
    path = written(tmp_path / "a.pkl")
    whole, chance, refusals = path.read_bytes(), random.Random(0), 0
    for i in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.randrange(min(len(content), 20_000))] = chance.randrange(256)
        path.write_bytes(content if i % 3 else whole[: chance.randrange(len(whole))])
        try:
            read_edm(path)
        except BadInput as error:
            refusals += 1
            assert str(error).startswith(str(path)) and str(error).isprintable()
    assert refusals > 30
