"""rectified_flow.py: reflow of Gaussians in closed form, its pairs, and its command."""

from runtime.checkpoints import load_checkpoint
from runtime.commandline import BadInput
from runtime.files import read_json
from runtime.processes import World
from runtime.run import Part

import shutil

import numpy as np
import pytest
import torch
from flow_math import MEAN, STD, TIGHT, best, end_of, on_path, random, spread
from launching import refused, succeed

import flow_matching
import rectified_flow
from image_data import pairs
from kernels import gaussian

DOWN = flow_matching.times_of


def first_ends(noise):
    """Where the exact paths of the first flow from this noise end."""
    return on_path(noise / spread(1), 0)


# ------------------------------------------------------------------------- Gaussians in closed form


def test_straightness_of_the_first_flow_is_the_integral_of_its_bend():
    """x_t = (1-t) m + sigma_t z has the slope -m + sigma_t' z, and the line -m + (1 - s) z."""
    z = random(5, 2, 2, 3)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5).view(-1, 1, 1, 1) / 100_000
    slope = (t - (1 - t) * STD**2) / spread(t)  # sigma_t'
    wanted = (z**2 * (slope - (1 - STD)).square().mean(0)).flatten(1).mean(1)
    found = [rectified_flow.straightness(best, z, steps) for steps in (500, 1000)]
    assert (found[1] / wanted - 1).abs().max() < 2e-3
    # Euler's error falls as 1 / steps.
    assert torch.allclose(
        (found[0] - wanted) / (found[1] - wanted), torch.tensor(2.0).double(), 0.1
    )


def test_reflow_of_gaussians_is_straight_to_machine_precision():
    """Slopes between ends of paths are a linear function of x_t: least squares find it exactly."""
    noise = random(400, 2, 2, 3, seed=1)
    x0 = first_ends(noise)

    def second(x, t):
        """The flow that fits the pairs best among all a x + b, for each number by itself."""
        x_t, slope = (v.flatten(1) for v in (flow_matching.line(x0, t, noise), noise - x0))
        ones = torch.ones_like(x_t)
        a, b = (
            torch.linalg.lstsq(torch.stack([x_t, ones], -1).permute(1, 0, 2), slope.T[..., None])
            .solution.squeeze(-1)
            .T
        )  # (D,) each
        return (a * x.flatten(1) + b).view_as(x)

    fresh = random(6, 2, 2, 3, seed=2)
    assert rectified_flow.straightness(second, fresh, 20).max() < 1e-26
    assert rectified_flow.straightness(best, fresh, 20).min() > 1e-3  # before
    one_step = end_of(flow_matching.follow(second, fresh, DOWN(1), "euler"))
    torch.testing.assert_close(one_step, first_ends(fresh), **TIGHT)
    assert not torch.allclose(end_of(flow_matching.follow(best, fresh, DOWN(1), "euler")), one_step)


def test_straightness_of_lines_is_zero_and_of_a_known_bend_not():
    noise = random(3, 2, 2, 3)
    assert rectified_flow.straightness(lambda x, t: MEAN.expand_as(x), noise).max() < 1e-28
    # A slope of 2t: from noise the path falls by 1, whatever the steps, and S is 1/3.
    bent = rectified_flow.straightness(lambda x, t: torch.full_like(x, 2 * t), noise, 4000)
    torch.testing.assert_close(bent, torch.full_like(bent, 1 / 3), atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------- pairs on the disk


def drawn(some):
    return torch.arange(some.start, some.stop).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 3)


def test_pairs_are_drawn_once_and_killed_they_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "TOGETHER", 4)
    asked = []

    def make(some, most=99):
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append((some.start, some.stop))
        return drawn(some)

    how = (tmp_path, World(), (10, 1, 2, 3))
    with pytest.raises(KeyboardInterrupt):
        pairs.kept_pairs(*how, lambda some: make(some, 1), made_of={"a": 1})
    found = pairs.kept_pairs(*how, make, made_of={"a": 1})
    assert asked == [(0, 4), (4, 8), (8, 10)]
    assert np.array_equal(found, drawn(slice(0, 10)).numpy())
    assert np.array_equal(pairs.kept_pairs(*how, make, made_of={"a": 1}), found)
    assert len(asked) == 3
    pairs.kept_pairs(*how, make, made_of={"a": 2})  # of something else: in another place
    assert len(asked) == 6
    path = tmp_path / f"pairs-{pairs.key_of({'a': 1})}" / "pairs.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert np.array_equal(pairs.kept_pairs(*how, make, made_of={"a": 1}), drawn(slice(0, 10)))
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(pairs.kept_pairs(*how, make, made_of={"a": 1}), drawn(slice(0, 10)))


def test_pairs_are_a_data_set_and_name_their_seeds():
    images = np.arange(24, dtype=np.float32).reshape(4, 1, 2, 3)
    found = pairs.Pairs.of(images, torch.tensor([0, 1, 0, 1]), ["a", "b"], (1, 2, 3), {"a": 1})
    assert len(found) == 4 and found.num_classes == 2 and found.key == pairs.key_of({"a": 1})
    rows = np.array([2, 0])
    assert found.seeds(Part(0, slice(0, 2), rows, None)) is rows
    assert np.array_equal(found.floats(torch.from_numpy(found.stored(rows))), images[rows])


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def second(tiny_flow, tmp_path_factory):
    """A reflow of the first one: its folder, and what was printed."""
    out = tmp_path_factory.mktemp("reflow") / "run"
    asked = ["--smoke", "--gpus", 0, "--flow", tiny_flow, "--pairs", 6, "--out", out]
    return out, succeed("rectified_flow", *asked, "--guidance", 0.5).out


def test_pairs_are_what_the_flow_draws_of_the_seeds(tiny_flow, second):
    out, _ = second
    (folder,) = out.glob("pairs-*")
    flow, cfg = flow_matching.load_flow(tiny_flow / "ckpt.pt", "cpu")
    cfg.guidance, cfg.sample_steps, seeds = 0.5, 4, torch.arange(6)
    way = flow_matching.sample(flow.net, flow.column, cfg, flow.space.shape, seeds, seeds % 2)
    torch.testing.assert_close(torch.from_numpy(np.load(folder / "pairs.npy")), end_of(way))


def test_what_it_leaves_is_sampled_by_flow_matching_without_guidance(tiny_flow, second, tmp_path):
    out, told = second
    state = load_checkpoint(out / "ckpt.pt", "flow_matching")
    assert state["config"]["guidance"] == 0 and "straightness S" in told
    flow, _ = flow_matching.load_flow(tiny_flow / "ckpt.pt", "cpu")
    before = flow.net.state_dict()
    moved = [k for k, v in state["model"].items() if not torch.equal(v, before[k])]
    assert moved and state["model"].keys() == before.keys()
    for file in ("reflow.png", "reflow.json", "samples.png", "reverse.gif", "loss.png"):
        assert (out / file).exists()
    found = read_json(out / "reflow.json")
    assert found["before"]["straightness"] > 0 and found["after"]["straightness"] > 0
    asked = ["--gpus", 0, "--n", 2, "--sampler", "euler", "--sample-steps", 1, "--out", tmp_path]
    succeed("flow_matching", "--sample", out / "ckpt.pt", *asked)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape[0] == 2


def test_training_sees_the_noise_that_each_image_came_from(monkeypatch, tiny_flow, tmp_path):
    seen = []

    def loss(net, x0, t, eps, y):
        seen.append((x0.clone(), eps.clone(), y.clone()))
        return net(x0, t.flatten(), y).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr(rectified_flow, "flow_loss", loss)
    argv = "rectified_flow --smoke --gpus 0 --pairs 5 --batch-size 4 --label-dropout 0 --flow"
    monkeypatch.setattr("sys.argv", [*argv.split(), str(tiny_flow), "--out", str(tmp_path)])
    rectified_flow.main()
    kept = torch.from_numpy(np.load(next(tmp_path.glob("pairs-*/pairs.npy"))))
    for x0, eps, y in seen:
        rows = [int((kept - image).abs().flatten(1).sum(1).argmin()) for image in x0]
        assert torch.equal(x0, kept[rows]) and torch.equal(y, torch.tensor(rows) % 2)
        assert torch.equal(eps, gaussian(eps.shape, torch.tensor(rows), -1, "cpu"))
    assert len({tuple(x0.flatten().tolist()) for x0, *_ in seen}) > 1


def test_bad_input(tiny_flow, second, tmp_path):
    out, _ = second
    asked = ["--gpus", 0, "--smoke", "--flow", tiny_flow]
    assert "--sampler ddpm" in refused("rectified_flow", *asked, "--sampler", "ddpm")
    assert "--pairs must be greater" in refused("rectified_flow", *asked, "--pairs", 0)
    assert "--data has no part in --flow" in refused("rectified_flow", *asked, "--data", "mnist")
    again = refused("rectified_flow", *asked, "--resume", "auto", "--pairs", 7, "--out", out)
    assert "holds a run on other pairs by" in again and "--pairs 6" in again
    assert not list(out.glob("pairs-*/manifest.json"))[1:]  # none were drawn for that
    assert "--nll does nothing here" in refused("rectified_flow", "--nll", tiny_flow)
    bad = refused("rectified_flow", *asked, "--resume", tmp_path / "no.pt", "--out", tmp_path / "x")
    assert "no.pt: no such file" in bad and not (tmp_path / "x").exists()


def test_a_file_of_settings_does_not_change_what_the_first_flow_is(tiny_flow, tmp_path):
    (tmp_path / "c.yaml").write_text("model_channels: 24\ndata: mnist\nlr: 0.01\n")
    asked = ["--gpus", 0, "--smoke", "--config", tmp_path / "c.yaml", "--flow", tiny_flow]
    succeed("rectified_flow", *asked, "--pairs", 4, "--out", tmp_path / "run")
    theirs, ours = (load_checkpoint(p / "ckpt.pt")["config"] for p in (tiny_flow, tmp_path / "run"))
    assert ours["model_channels"] == theirs["model_channels"] and ours["lr"] == 0.01
    assert ours["data"] == theirs["data"]
    flow_matching.load_flow(tmp_path / "run" / "ckpt.pt", "cpu")


def test_more_steps_go_on_with_the_same_first_flow(toy, tiny, tmp_path):
    asked = [*tiny["rectified_flow"], *toy, "--pairs", 4, "--out", tmp_path]
    succeed("rectified_flow", *asked, "--steps", 3)
    before = (tmp_path / "flow" / "ckpt.pt").read_bytes()
    succeed("rectified_flow", *asked, "--steps", 6)
    assert (tmp_path / "flow" / "ckpt.pt").read_bytes() == before
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 6


def test_pairs_do_not_fit_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(BadInput, match="MiB for pairs"):
        pairs.kept_pairs(tmp_path, World(), (9, 1, 2, 3), drawn, made_of={})
