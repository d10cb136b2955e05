"""Which of several weights in a file or a folder of others are taken for the running mean."""

import pytest
import torch
from safetensors.torch import save_file

from networks.published import files
from networks.published.contents import rank_of

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}
MEAN = {name: value + 1 for name, value in STATE.items()}
HINT = "; of several running means save the one you want in a file of its own\n"


def read(content, path):
    torch.save(content, path)
    found = files.read_weights(path, ["a.weight"])
    assert found.keys() == STATE.keys()
    return found["b.bias"].tolist()


NAMES = ["non_ema", "non-ema", "nonema", "NonEMA", "no_ema", "without_ema", "pre_ema", "ema_raw"]
NAMES += ["model_non_ema"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_to_be_no_mean_is_taken_last(name, tmp_path, capsys):
    path = tmp_path / "x.pt"
    for other in ("ema", "model"):
        assert read({name: STATE, other: MEAN}, path) == [2, 2]
        assert f"takes {other!r}, leaves out {name!r}\n" in capsys.readouterr().out
    beside = {f"{name}.{k}": v for k, v in STATE.items()}
    assert read(beside | {f"ema.{k}": v for k, v in MEAN.items()}, path) == [2, 2]
    capsys.readouterr()
    assert read({name: STATE}, path) == [1, 1]
    assert capsys.readouterr().out == f"{path}: takes {name!r}, these are no running means\n"


def test_lists_without_names_that_are_no_means_are_not_taken(tmp_path):
    content = {"model": STATE, "non_ema": [v + 5 for v in STATE.values()]}
    assert read(content, tmp_path / "x.pt") == [1, 1]


def test_names_that_only_look_so_are_ranked_as_before():
    for name in ("ema", "params_ema", "netGEMA", "piano_ema", "domino.ema", "ema.draw"):
        assert rank_of(name) == 0, name
    for name in ("model", "schema", "nonlinear", "drawing", "ema.online_model"):
        assert rank_of(name) == 1, name


def test_of_several_means_the_line_says_how_to_have_another(tmp_path, capsys):
    path = tmp_path / "x.pt"
    assert read({"ema_0.999": MEAN, "ema_0.9999": STATE}, path) == [2, 2]
    told = f"{path}: takes 'ema_0.999', leaves out 'ema_0.9999'{HINT}"
    assert capsys.readouterr().out == told
    read({"model": STATE, "ema": MEAN}, path)
    assert "of several" not in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["non_ema", "no-ema", "nonema", "without_ema", "raw"])
def test_names_of_files_are_ranked_by_the_same_rule(variant, tmp_path, capsys):
    stem = "diffusion_pytorch_model"
    learns = tmp_path / f"{stem}.{variant}.safetensors"
    save_file(STATE, learns)
    assert files.find_weights(tmp_path) == learns
    assert "these are no running means" in capsys.readouterr().out
    for name in (f"{stem}.other.bin", f"{stem}.bin", f"{stem}.ema.bin"):
        torch.save(MEAN, tmp_path / name)
        assert files.find_weights(tmp_path) == tmp_path / name
