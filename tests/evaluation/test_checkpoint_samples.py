"""checkpoint_samples.py, and eval_fid.py on checkpoints: which script draws their samples, once."""

from runtime.checkpoints import DamagedCheckpoint, load_checkpoint
from runtime.commandline import BadInput

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_images
from launching import run as start
from launching import start_ranks, succeed

import eval_fid
from evaluation import against, checkpoint_samples, report


@pytest.fixture(scope="module")
def checkpoint(toy, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    flags = [*tiny["ddpm_pixel"], "--steps", "3", "--sample-every", "0"]
    succeed("ddpm_pixel", *toy, *flags, "--out", run)
    return run / "ckpt.pt"


def test_a_checkpoint_is_its_samples_drawn_once(checkpoint):
    script, settings = checkpoint_samples.checkpoint_settings(str(checkpoint))
    assert script == "ddpm_pixel" and settings["steps"] == 3
    flags = "--seeds '5-8' --sample-steps 2"
    path = checkpoint_samples.sampled(checkpoint, script, 4, 0, flags)
    with np.load(path) as samples:
        assert samples["arr_0"].shape == (4, 16, 16, 1)
    written = path.stat().st_mtime_ns
    assert checkpoint_samples.sampled(checkpoint, script, 4, 0, flags) == path
    assert path.stat().st_mtime_ns == written


def test_two_processes_draw_samples_once_and_agree(checkpoint, toy, tmp_path):
    flags = ["--n", "8", "--sample-args=--sample-steps 2", "--classifier-steps", "5"]
    out = tmp_path / "found.json"
    ranks = start_ranks("eval_fid", checkpoint, "--gpus", "0", *flags, "--json", out)
    done = [rank.wait() for rank in ranks]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    assert done[1].out == ""
    both = json.loads(out.read_text())
    alone = json.loads(succeed("eval_fid", checkpoint, "--gpus", "0", *flags).out.splitlines()[-1])
    assert both["n_generated"] == 8 and both["b"] == f"{toy[1]}:test"
    assert both["frechet"] == pytest.approx(alone["frechet"], rel=1e-5)


def test_a_checkpoint_that_draws_nothing_is_refused(tmp_path, checkpoint):
    torch.save({"script": "eval_fid", "config": {}}, tmp_path / "ae.pt")
    with pytest.raises(BadInput, match=r"written by eval_fid.*ddpm_pixel\.py or .*ldm_cfg\.py"):
        checkpoint_samples.checkpoint_settings(str(tmp_path / "ae.pt"))
    with pytest.raises(BadInput, match="no samples of .*: unknown flag .*; the command was "):
        checkpoint_samples.sampled(checkpoint, "ddpm_pixel", 4, 0, "--no-such-flag 1")
    with pytest.raises(BadInput, match="no such file"):
        checkpoint_samples.checkpoint_settings(str(tmp_path / "none.pt"))


@pytest.mark.parametrize("script", ["eval_fid", "tests", "no_such_chapter", "os", "évaluer"])
def test_only_a_script_of_the_root_that_takes_a_sample_flag_is_believed(tmp_path, script):
    torch.save({"script": script, "config": {"data": "glyphs"}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"a\.pt was written by "):
        checkpoint_samples.checkpoint_settings(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("script", ["../ddpm_pixel", "ddpm_pixel.py", "/tmp/x", "", 7, None])
def test_a_name_that_is_no_plain_word_is_refused(tmp_path, script):
    torch.save({"script": script, "config": {"data": "glyphs"}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"a\.pt was written by "):
        checkpoint_samples.checkpoint_settings(str(tmp_path / "a.pt"))


def test_a_new_script_that_takes_a_sample_flag_needs_no_list(tmp_path, monkeypatch):
    field = "@dataclass\nclass Config(Command):\n    {}: str = ''\n"
    (tmp_path / "flow.py").write_text("raise SystemExit('it was run')\n" + field.format("sample"))
    (tmp_path / "table.py").write_text(field.format("samples"))
    (tmp_path / "other.py").write_text("sample: str = ''\n")
    monkeypatch.setattr(checkpoint_samples, "ROOT", tmp_path)
    assert checkpoint_samples.samplers() == ["flow"]
    torch.save({"script": "flow", "config": {"data": "glyphs"}}, tmp_path / "a.pt")
    assert checkpoint_samples.checkpoint_settings(str(tmp_path / "a.pt"))[0] == "flow"
    torch.save({"script": "flow", "config": {}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=r"names no data set; draw samples with flow\.py --sample"):
        checkpoint_samples.checkpoint_settings(str(tmp_path / "a.pt"))


def test_of_a_mapped_checkpoint_only_what_is_asked_for_is_read(checkpoint, tmp_path):
    expected = load_checkpoint(checkpoint)
    found = load_checkpoint(checkpoint, mapped=True)
    assert found.keys() == expected.keys() and found["config"] == expected["config"]
    assert all(torch.equal(found["ema"][name], value) for name, value in expected["ema"].items())
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(checkpoint) in maps.read_text()
    torn = tmp_path / "torn.pt"
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(DamagedCheckpoint, match=r"torn\.pt is truncated"):
        load_checkpoint(torn, mapped=True)


# ------------------------------------------------------------------------ the checkpoints of a run


@pytest.fixture(scope="module")
def run(toy, tiny, tmp_path_factory):
    """A run of 4 steps that keeps its checkpoint 3."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*tiny["ddpm_pixel"], "--steps", "4", "--sample-every", "0", "--keep-every", "3"]
    succeed("ddpm_pixel", *toy, *flags, "--out", folder)
    return folder


def test_a_run_keeps_the_checkpoints_it_is_asked_to(run, toy, tiny):
    names = ["ckpt-000003.pt", "ckpt-previous.pt", "ckpt.pt"]
    assert sorted(p.name for p in run.glob("ckpt*.pt")) == names
    assert load_checkpoint(run / "ckpt-000003.pt")["step"] == 3
    done = run / "again"
    flags = [*tiny["ddpm_pixel"], "--steps", "4", "--sample-every", "0", "--out", done]
    succeed("ddpm_pixel", *toy, *flags, "--keep-every", "3")
    (done / "ckpt.pt").unlink()
    (done / "ckpt-previous.pt").rename(done / "earlier.pt")  # of step 3: one that is kept stays
    succeed("ddpm_pixel", *toy, *flags, "--resume", done / "earlier.pt", "--steps", "3")
    assert [p.name for p in done.glob("ckpt-0*.pt")] == ["ckpt-000003.pt"]
    succeed("ddpm_pixel", *toy, *flags, "--resume", "never")
    assert list(done.glob("ckpt-0*.pt")) == []  # it was of the run before


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for step in (900_000, 1_000_000):
        torch.save({"script": "x", "step": step}, tmp_path / f"ckpt-{step:06d}.pt")
    torch.save({"script": "x", "step": 1_000_000}, tmp_path / "ckpt.pt")  # a copy, not a link
    assert list(checkpoint_samples.of_run(tmp_path)) == [900_000, 1_000_000]
    torch.save({"script": "x", "step": 1_000_500}, tmp_path / "ckpt.pt")
    assert list(checkpoint_samples.of_run(tmp_path)) == [900_000, 1_000_000, 1_000_500]


def test_a_curve_over_the_checkpoints_of_a_run(run, toy):
    flags = ["--n", "16", "--classifier-steps", "5", "--sample-args=--sample-steps 2"]
    done = succeed("eval_fid", run, "--curve", "--gpus", "0", *flags)
    printed = json.loads(done.out.splitlines()[-1])
    rows = json.loads((run / "curve.json").read_text())
    assert printed["curve"] == rows and [row["step"] for row in rows] == [3, 4]
    assert all(row["n_generated"] == 16 and row["frechet"] > 0 for row in rows)
    assert {row["b"] for row in rows} == {f"{toy[1]}:test"}
    assert len({row["frechet"] for row in rows}) == 2
    assert (run / "curve.png").stat().st_size > 5000


def test_a_curve_lies_in_out_and_replaces_none_of_other_settings(monkeypatch, tmp_path):
    row = {"n_generated": 4, "n_reference": 9, "frechet": 2.0, "network": "toy", "b": "toy:test"}
    kept = {5: "run/ckpt-000005.pt", 9: "run/ckpt.pt"}
    monkeypatch.setattr(checkpoint_samples, "of_run", lambda folder: kept)
    monkeypatch.setattr(report, "finish", lambda cfg, found: None)

    def call(**changes):
        rows = [row | {"a": path} | changes for path in kept.values()]
        monkeypatch.setattr(against, "against", lambda *args: iter(rows))
        against.curve(eval_fid.Config(a="run", curve=True, out=str(tmp_path)), None, None)
        return {path.name: path.read_text() for path in tmp_path.glob("curve*.json")}

    first = call()
    assert first.keys() == {"curve.json"} and (tmp_path / "curve.png").exists()
    assert [r["step"] for r in json.loads(first["curve.json"])] == [5, 9]
    kept[12] = "run/ckpt-000012.pt"  # the training went on: the same curve, longer
    assert call().keys() == first.keys() and len(json.loads(call()["curve.json"])) == 3
    assert len(call(b="toy:train")) == 2 and len(call(n_generated=5)) == 3
    kept[5] = "other/ckpt-000005.pt"
    assert len(call()) == 4 and len(json.loads(call()["curve.json"])) == 3


def test_the_folder_of_a_curve_must_be_a_run(tmp_path):
    done = start("eval_fid", tmp_path, "--curve")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"--curve: {tmp_path} holds no ckpt.pt" in done.err


@pytest.mark.parametrize("how", [["--n", "4"], ["--curve"]])
def test_what_cannot_be_scored_is_refused_before_samples_are_drawn(how, tmp_path, monkeypatch):
    """Of data without classes no classifier gives features, and Inception is not for gray ones."""
    write_images(tmp_path / "plain", 6, height=8, width=8, classes=())
    config = {"data": str(tmp_path / "plain"), "data_root": str(tmp_path / "prepared")}
    state = {"script": "ddpm_pixel", "config": config, "step": 3, "shape": [1, 8, 8]}
    torch.save(state | {"class_names": []}, tmp_path / "ckpt.pt")
    monkeypatch.setattr(checkpoint_samples, "sampled", None)
    a = tmp_path if how == ["--curve"] else tmp_path / "ckpt.pt"
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", str(a), "--gpus", "0", *how])
    with pytest.raises(BadInput, match="plain has no classes to train the feature classifier on"):
        eval_fid.main()
