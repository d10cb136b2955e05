"""--reverse-from data: test images to x_T and back, against the formula, and what it says."""

from runtime.commandline import BadInput
from runtime.pictures import to_uint8

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from data_files import write_images

import ddim
import ddpm_pixel as ch1
import dpm_solver
from evaluation import there_and_back
from image_data import datasets
from kernels import gaussian


def test_distances_are_of_each_from_its_own_image_and_from_the_others_of_its_class():
    rng = np.random.default_rng(0)
    x0, ends = rng.uniform(-1, 1, (2, 5, 3, 4, 4))
    ends[0] *= 3  # what lies beyond an image's range counts as its end
    labels = np.array([0, 1, 0, 1, 1])
    pixels, at = (x0 + 1) / 2, (np.clip(ends, -1, 1) + 1) / 2
    apart = np.array([[((a - b) ** 2).mean() ** 0.5 for b in pixels] for a in at])
    same = [apart[i, j] for i in range(5) for j in range(5) if i != j and labels[i] == labels[j]]
    given = torch.from_numpy(x0), torch.from_numpy(ends)
    own, mean, others = there_and_back.distances(*given, torch.from_numpy(labels))
    np.testing.assert_allclose(own, apart.diagonal())
    np.testing.assert_allclose([mean, others], [apart.diagonal().mean(), np.mean(same)])
    _, _, others = there_and_back.distances(*given)
    np.testing.assert_allclose(others, apart[~np.eye(5, dtype=bool)].mean())
    assert there_and_back.distances(x0=given[0][:1], ends=given[1][:1])[2] is None


@pytest.fixture
def path(tmp_path):
    """A checkpoint whose network, not trained, finds no noise in any image: eps_hat = 0."""
    data = tmp_path / "data"
    for split, count in (("train", 30), ("test", 12)):
        write_images(data / split, count, height=8, width=8)
    cfg = ch1.Config(
        model_channels=16,
        channel_mult=(1, 2),
        timesteps=40,
        clip_denoised=False,
        gpus=0,
        data=str(data),
        data_root=str(tmp_path / "root"),
        attention_resolutions=(4,),
    )
    state = {"script": "ddpm_pixel", "config": asdict(cfg), "step": 1, "shape": [1, 8, 8]}
    state |= {"ema": ch1.UNet((1, 8, 8), 2, cfg).state_dict(), "class_names": ["bars", "dots"]}
    torch.save(state, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def from_data(path, steps):
    """Flags of a walk back from the last images of the forward process, into the run's folder."""
    asked = ["--sample", path, "--out", path.parent, "--reverse-from", "data"]
    return [*asked, "--sample-steps", steps]


def draw(monkeypatch, module, *arguments):
    """What save_beside() is given by a command."""
    given = []
    monkeypatch.setattr(there_and_back, "save_beside", lambda *args: given.append(args))
    argv = [f"{module.__name__}.py", *map(str, arguments), "--gpus", "0"]
    monkeypatch.setattr("sys.argv", argv)
    module.main()
    return given


@pytest.mark.parametrize("module", [ddim, dpm_solver])
def test_images_go_to_x_T_and_back_by_the_formula(module, path, monkeypatch, capsys, tmp_path):
    """Where eps_hat = 0, each step divides x by what q() multiplies the image with."""
    asked = [*from_data(path, 4), "--seeds", "1,3,8,2"]
    ((where, found, marks, rows, note),) = draw(monkeypatch, module, *asked)
    assert where == tmp_path / "reverse-from-data" and list(found) == ["forward", "backward"]
    cfg = ch1.Config(data=str(tmp_path / "data"), timesteps=40, gpus=0)
    alpha_bar, seeds = ch1.alpha_bar_of(cfg), torch.tensor([1, 3, 8, 2])
    ds = datasets.load(str(tmp_path / "data"), str(tmp_path / "root"), split="test")
    x0, labels = ds.batch(seeds.numpy())
    shown = [labels.tolist().index(k) for k in (0, 1)]
    eps = gaussian(x0.shape, seeds, -1, "cpu")
    ts = [39, 26, 13, 0]
    assert marks["backward"] == [f"t = {t}, {25 * i} %" for i, t in enumerate(ts)] + ["x_0, 100 %"]
    assert marks["forward"][::4] == ["x_0, 0 %", "t = 39, 100 %"]
    noisy = [ch1.q_sample(x0, torch.full((4,), t), eps, alpha_bar) for t in ts]
    x_T = noisy[0]
    for i, x in enumerate([x0, *noisy[::-1]]):
        assert torch.equal(found["forward"][i], to_uint8(x[shown]))
    for i, t in enumerate([*ts, -1]):
        a = alpha_bar[t] if t >= 0 else 1.0
        x = x_T * math.sqrt(a / alpha_bar[39])
        off = found["backward"][i].int() - to_uint8(x[shown].float()).int()
        assert off.abs().max() <= 1
    end = (x_T / alpha_bar[39].sqrt()).clamp(-1, 1)
    own = ((end - x0) / 2).square().mean((1, 2, 3)).sqrt()
    assert rows == [f"{n}\n{own[i]:.2f} away" for n, i in zip(("bars", "dots"), shown, strict=True)]
    said = capsys.readouterr().out
    assert note in said and f"{own.mean():.3f}, mean of 4" in said
    assert f"x_T holds {alpha_bar[39].sqrt():.2g} times the image" in said


@pytest.mark.parametrize("alpha_min, told", [(0.001, "finds another"), (0.9999, "comes back")])
def test_whether_the_way_back_finds_the_image_is_said(path, monkeypatch, capsys, alpha_min, told):
    state = torch.load(path, weights_only=True)
    state["config"]["alpha_min"] = alpha_min  # at 0.9999 x_T is hardly noised
    torch.save(state, path)
    asked = [*from_data(path, 2), "--eta", 0.5]
    ((_, found, _, rows, note),) = draw(monkeypatch, ddim, *asked)
    assert told in note and "mean of 12" in note and len(rows) == 2
    assert found["forward"].keys() == {0, 1, 2} == found["backward"].keys()


def test_pictures_are_drawn_and_nothing_else_is_touched(path, monkeypatch):
    (path.parent / "samples.png").write_text("earlier")
    asked = [*from_data(path, 2), "--n", 5]
    monkeypatch.setattr("sys.argv", ["ddim.py", *map(str, asked), "--gpus", "0"])
    ddim.main()
    kept = {f"reverse-from-data.{kind}" for kind in ("png", "gif", "md", "json")}
    made = {p.name for p in path.parent.glob("*.*")} - {"ckpt.pt"}
    assert kept | {"samples.png"} <= made
    found = json.loads((path.parent / "reverse-from-data.json").read_text())
    own = found["facts"]["from_its_own"]
    assert len(own) == 5 and found["mean"] == pytest.approx(np.mean(own), abs=1e-4)
    table = (path.parent / "reverse-from-data.md").read_text()
    bars = [v for v, label in zip(own, found["labels"], strict=True) if label == 0]
    told = [f"{v:.3f}" for v in (np.mean(bars), min(bars), max(bars))]
    assert f"| bars | {len(bars)} | {' | '.join(told)} |" in table and "| all | 5 |" in table
    ddim.main()
    assert len([*path.parent.glob("reverse-from-data*")]) == 4
    monkeypatch.setattr("sys.argv", ["ddim.py", *map(str, asked), "--gpus", "0", "--eta", "1"])
    ddim.main()  # other ends: other files
    assert len([*path.parent.glob("reverse-from-data*")]) == 8
    assert json.loads((path.parent / "reverse-from-data.json").read_text()) == found
    assert (path.parent / "samples.png").read_text() == "earlier"
    assert not {"reverse.png", "reverse.gif", "samples.npz"} & made


@pytest.mark.parametrize(
    "typed, told",
    [
        (["--data", "mnist"], "--data is for --reverse-from data"),
        (["--reverse-from", "data", "--gif"], "--gif does nothing without --reverse-from noise"),
        (["--reverse-from", "data", "--classes", "1"], "--classes does nothing without"),
        (["--reverse-from", "data", "--seeds", "12"], "test images 0 to 11"),
    ],
)
def test_what_would_do_nothing_is_refused(path, monkeypatch, typed, told):
    with pytest.raises(BadInput, match=told):
        draw(monkeypatch, ddim, "--sample", path, "--sample-steps", 2, *typed)
