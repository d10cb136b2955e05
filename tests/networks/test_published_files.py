"""Files of weights: what is read of them, how much, and what is said of damaged ones."""

from runtime.commandline import BadInput

import fractions
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from state_dicts import same

import dit
from networks.published.files import is_published, read_json, read_weights
from networks.published.schedule import read_schedule

MAPS = Path("/proc/self/maps")
STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.half)}


def save(path, content, form="zip"):
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize(
    "form, name",
    [("zip", "x.ckpt"), ("old", "x.pt"), ("zip", "x.bin"), ("safetensors", "x.safetensors")],
)
def test_tensors_come_as_they_were_saved(tmp_path, form, name):
    assert same(read_weights(save(tmp_path / name, STATE, form)), STATE)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x"])
def test_safetensors_are_read_in_any_name(tmp_path, name):
    path = save(tmp_path / name, STATE, "safetensors")
    assert same(read_weights(path), STATE) and is_published(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=f"{name} is no safetensors file, or a torn one"):
        read_weights(path)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_in_the_name_of_safetensors_is_told(tmp_path, form):
    path = save(tmp_path / "x.safetensors", STATE, form)
    with pytest.raises(BadInput, match="x.safetensors is no .* but one of torch.save: rename it"):
        read_weights(path)
    assert same(read_weights(path.rename(tmp_path / "x.ckpt")), STATE)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (LFS, "is only a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "but text, '<!DOCTYPE html>.*'"),
        (b"Entry not found", "but text, 'Entry not found'"),
        (b'{"error": "gated repo"}', "but text, '{\"error\": .*'"),
    ],
    ids=["LFS", "html", "note", "json"],
)
def test_downloads_that_failed_are_told(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name} .*{expected}: a failed download, fetch it again"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "{", "[]", "\x00"])
def test_settings_that_are_no_settings_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"config\.json (cannot be read|must hold)") as told:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(told.value)


NAN = float("nan")


@pytest.mark.parametrize(
    "field, value",
    [
        *(
            ("num_train_timesteps", v)
            for v in (10**12, 10**9, 100_001, 0, -5, "a", 3.5, True, None)
        ),
        *(("beta_start", v) for v in (-1, -1e-9, 1.5, NAN, "a", None, [0.1], False)),
        *(("beta_end", v) for v in (1e-5, 1.5, NAN, float("inf"), "big", None)),
        *(("trained_betas", v) for v in ([], "a", [NAN], [[0.1]], ["a"], {}, 3, [-1], [2] * 1000)),
    ],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_numbers_that_make_no_schedule_are_refused_by_the_field(tmp_path, kind, field, value):
    path = tmp_path / "scheduler_config.json"
    config = dict(beta_schedule=kind, beta_start=0.001, beta_end=0.01, num_train_timesteps=9)
    path.write_text(json.dumps(config))
    assert len(read_schedule(path)["alpha_bar"]) == 9
    path.write_text(json.dumps(config | {field: value}))
    with pytest.raises(BadInput, match=rf"scheduler_config\.json: {field} .* must") as told:
        read_schedule(path)
    assert len(str(told.value)) < len(str(path)) + 150 and "\n" not in str(told.value)


def test_numbers_that_are_not_used_are_not_looked_at(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(dict(beta_start=-1, beta_schedule="squaredcos_cap_v2")))
    assert read_schedule(path)["schedule"] == "cosine"
    path.write_text(json.dumps(dict(beta_start=-1, beta_end="a", trained_betas=[0.5, 0.5])))
    assert read_schedule(path)["alpha_bar"].tolist() == [0.5, 0.25]
    path.write_text(json.dumps(dict(num_train_timesteps=100_000)))
    assert read_schedule(path)["timesteps"] == 100_000


@pytest.mark.parametrize("form", ["zip", "old"])
def test_the_running_mean_is_taken_of_what_is_looked_for(tmp_path, form):
    other = {"other": torch.zeros(1)}
    path = save(tmp_path / "x.pt", {"model": other, "ema": STATE, "step": 5}, form)
    assert same(read_weights(path), STATE)
    assert same(read_weights(path, marks=["b"]), STATE)
    assert same(read_weights(path, marks=["other"]), other)
    with pytest.raises(BadInput, match=r"x\.pt is not a state_dict"):
        read_weights(save(path, {"step": 5, "names": ["a"]}, form))


def test_only_the_classes_that_are_known_may_lie_beside_tensors(tmp_path):
    path = save(tmp_path / "x.pt", {"ema": STATE, "when": fractions.Fraction(1, 3)})
    with pytest.raises(BadInput, match=r"fractions\.Fraction was not .*saved without Python"):
        read_weights(path)


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
@pytest.mark.parametrize("form, name", [("zip", "x.pt"), ("safetensors", "x.safetensors")])
def test_files_are_mapped_not_read(tmp_path, form, name):
    found = read_weights(save(tmp_path / name, STATE, form))
    assert str(tmp_path / name) in MAPS.read_text() and same(found, STATE)


@pytest.mark.parametrize("form, name", [("zip", "x.pt"), ("safetensors", "x.safetensors")])
def test_a_transformer_that_was_read_no_longer_needs_its_file(tmp_path, form, name):
    """A mapped file that is written over, in place, would change the weights with it."""
    torch.manual_seed(0)
    net = dit.DiT((4, 4, 4), 3, hidden_size=32, depth=1, num_heads=2, patch_size=2)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    path = save(tmp_path / name, state, form)
    read = dit.load_published(path, num_heads=2)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same(read.state_dict(), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, form):
    """Without checksums some wrong bytes go unnoticed; none of them ends in a traceback."""
    name = "x.safetensors" if form == "safetensors" else "x.pt"
    path = save(tmp_path / name, STATE, form)
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 2, 5))):
            content[chance.randrange(min(len(content), 800))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice((len(content), chance.randrange(len(content))))])
        try:
            read_weights(path)
        except BadInput as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 50


def test_what_is_missing_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(BadInput, match=f"{path}: no such file"):
            read_weights(path)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_file_in_published_names_is_told_from_a_checkpoint_of_ours(tmp_path, form):
    theirs = {"input_blocks.0.0.weight": torch.ones(1)}
    assert is_published(save(tmp_path / "theirs.pt", theirs, form))
    assert not is_published(save(tmp_path / "ours.pt", {"script": "ddpm_pixel"}, form))
    assert not is_published(tmp_path / "absent.pt")
    (tmp_path / "theirs.pt").write_bytes((tmp_path / "theirs.pt").read_bytes()[:100])
    assert not is_published(tmp_path / "theirs.pt")
