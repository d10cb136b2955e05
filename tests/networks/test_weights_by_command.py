"""A training run's file of weights is sampled by command as the network's own file is."""

import re

import pytest
import torch
from launching import refusal, run, succeed
from openai_unet import published, weights

SMALL = dict(model_channels=64, channel_mult=(1, 1), num_res_blocks=1, attention=(), out=3)
HOW = ("--size", 8, "--timesteps", 60, "--num-heads", 1, "--sample-steps", 20, "--seeds", "3,4")


def test_the_running_mean_of_a_wrapped_file_is_sampled(tmp_path):
    state = weights(published(**SMALL, use_scale_shift_norm=False))
    others = {name: value + 0.1 for name, value in state.items()}
    longer = ({f"module.{name}": v for name, v in part.items()} for part in (others, state))
    wrapped = dict(zip(("model", "ema"), longer, strict=True)) | {"optimizer": {}, "step": 5}
    pictures = {}
    for name, content in (("plain", state), ("wrapped", wrapped), ("others", others)):
        path, out = tmp_path / f"{name}.pt", tmp_path / name
        torch.save(content, path)
        done = succeed("improved_ddpm", "--sample", path, *HOW, "--out", out)
        told = f"{path}: takes 'ema', drops 'module.' from the names, leaves out 'model', 'opt"
        assert (told in done.out) == (name == "wrapped")
        files = sorted(out.glob("*.png"))
        assert files
        pictures[name] = [file.read_bytes() for file in files]
    assert pictures["wrapped"] == pictures["plain"] != pictures["others"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (torch.nn.Linear(2, 2), "is no file of plain tensors, .*Linear was not .*net.state_dict"),
        ({"net": torch.nn.Linear(2, 2), "epoch": 3}, "is no file of plain tensors, .*Linear was "),
        ({"ema": [torch.ones(2), torch.ones(3)]}, "holds 2 tensors without names in ema"),
        ({"model": {"a.weight": torch.ones(2)}}, "was written by none of these scripts"),
    ],
    ids=["module", "module beside", "no names", "another network"],
)
def test_what_is_no_network_is_one_line_that_says_what_it_is(content, expected, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(content, path)
    told = refusal(run("improved_ddpm", "--sample", path, "--out", tmp_path / "out"))
    assert re.search(f"{path} {expected}", told)
