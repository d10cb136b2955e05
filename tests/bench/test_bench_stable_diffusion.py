"""bench/stable_diffusion.py on small networks: it times only what draws the same, in turns."""

from runtime.commandline import BadInput

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from reference_metrics import import_references

STAGES = ("loading", "text", "a step", "decoding", "an image", "the first")


@pytest.fixture(scope="module")
def bench():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.stable_diffusion")
    finally:
        sys.path[:] = path


def test_quick_prints_a_table_the_goals_and_one_line_of_json(bench, capfd):
    bench.main(["--quick", "--threads", "1"])
    lines = capfd.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["threads"] == found["rounds"] == 1 and found["size"] == 64
    assert found["latent error"] < 1e-4 and found["image levels"] <= 1
    rows = {row["what"]: row for row in found["rows"]}
    for clock in ("s", "CPU s"):
        each = {stage: rows[f"{stage}, {clock}"] for stage in STAGES}
        for name in ("here", "diffusers"):
            parts = 2 * each["a step"][name] + each["text"][name] + each["decoding"][name]
            assert parts == pytest.approx(each["an image"][name])
            assert each["the first"][name] > each["loading"][name] > 0
    for name in ("here", "diffusers"):
        most = [rows[f"RSS, {when}"][name] for when in ("imports", "loading", "drawing")]
        assert rows["RSS"][name] == max(most) and most[0] > 1e8
        weights = 4 * sum(int(n.replace(",", "")) for n in found["parameters"].split(" + "))
        assert weights < rows["tensors"][name] < 2 * weights
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["diffusers"] / row["here"])
    assert lines[0] == "| | here | diffusers | diffusers / here |"
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 1
    judged = [line.partition(":")[0] for line in lines if "at least" in line]
    assert judged == [
        "a step, s",
        "an image, s",
        "a step, CPU s",
        "an image, CPU s",
        "RSS",
        "tensors",
    ]


def test_networks_of_full_size_have_the_published_parameters(bench):
    import_references()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    names, merges = bench.vocabulary()
    assert len(names) == len(set(names)) == 49408 and len(set(merges)) == 48894
    assert all("".join(pair) in names for pair in merges)
    sides = bench.SIDES
    with torch.device("meta"):
        nets = (
            UNet2DConditionModel(**bench.FULL["unet"]),
            CLIPTextModel(CLIPTextConfig(**bench.text_config(bench.FULL, names))),
            AutoencoderKL(**bench.FULL["vae"], **sides),
        )
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [859_520_964, 123_060_480, 83_653_863]


def test_stages_are_told_apart(bench):
    stamps = [("", (10.0, 1.0)), ("text", (11.0, 1.5)), ("a step", (14.0, 3.5))]
    stamps += [("a step", (19.0, 6.5)), ("an image", (19.0, 6.5))]
    found = bench.seconds_of(stamps)
    assert found == {"text": [1.0, 0.5], "a step": [4.0, 2.5], "an image": [9.0, 5.5]}


@pytest.mark.parametrize("what", ["same", "latent", "image", "flat"])
def test_only_what_draws_the_same_is_timed(bench, tmp_path, what):
    latent = np.linspace(-2, 2, 64, dtype=np.float32)
    image = np.arange(64, dtype=np.uint8) * (0 if what == "flat" else 2)
    np.savez(tmp_path / "diffusers.npz", latent=latent, image=image)
    moved = {"latent": 3e-4, "same": 1e-4}.get(what, 0.0)  # of at most 2
    latent = latent + np.float32(moved)
    np.savez(tmp_path / "here.npz", latent=latent, image=image + (2 if what == "image" else 1))
    if what == "same":
        error, levels = bench.check_same(tmp_path)
        assert error == pytest.approx(5e-5, rel=1e-2) and levels == 1
    else:
        with pytest.raises(RuntimeError, match="latents differ by"):
            bench.check_same(tmp_path)


class Asked:
    """A worker that says how often it was asked."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def ask(self, what):
        self.order.append(self.name)
        return {"stages": {"a step": [len(self.order), 0.5]}}


def test_contenders_take_turns(bench):
    order, ticks = [], []
    workers = [Asked("here", order), Asked("diffusers", order)]
    found = bench.take_turns(workers, 3, lambda: ticks.append(1))
    assert order == ["here", "diffusers", "diffusers", "here", "here", "diffusers"]
    assert [took[0] for took in found["here"]["a step"]] == [1, 4, 5]
    assert len(ticks) == 6


def test_a_ratio_is_the_median_of_those_of_the_rounds(bench):
    seconds = {"here": [[1, 2], [2, 2], [4, 2]], "diffusers": [[2, 2], [2, 3], [12, 1]]}
    seconds = {name: {"a step": turns} for name, turns in seconds.items()}
    told = {"RSS, imports": 1, "RSS, loading": 9, "RSS, drawing": 4, "tensors": 2}
    more = {"RSS, imports": 2, "RSS, loading": 3, "RSS, drawing": 6, "tensors": 4}
    rows = bench.rows_of(seconds, {"here": told, "diffusers": more})
    ratios = {row["what"]: row["ratio"] for row in rows}
    assert ratios["a step, s"] == 2 and ratios["a step, CPU s"] == 1
    assert ratios["RSS"] == pytest.approx(6 / 9) and ratios["tensors"] == 2
    assert rows[0]["here"] == 2 and rows[0]["diffusers"] == 2
    verdicts = dict(line.split(": ", 1) for line in bench.goals(rows))
    assert verdicts["RSS"] == "0.667, at least 1.0: MISSED"
    assert verdicts["a step, s"] == "2.000, at least 1.1: reached"


def test_a_process_that_fails_is_an_error(bench, tmp_path, capfd):
    with (
        pytest.raises(RuntimeError, match="here: the process failed"),
        bench.Worker("here", str(tmp_path), 64, 1, 1),
    ):
        pass
    assert "has no unet/" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--size", "500"], "--size 500 must be a multiple of 8"),
    ],
)
def test_bad_input_is_refused_by_name(bench, typed, said):
    with pytest.raises(BadInput, match=said):
        bench.parse(typed)
