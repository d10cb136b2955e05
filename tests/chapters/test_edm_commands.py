"""edm.py's commands: DDPM++ with augmentation, averages afterwards, churn, published weights."""

from runtime.checkpoints import load_checkpoint, trained_config
from runtime.commandline import BadInput
from runtime.posthoc_ema import reconstruct

import re

import edm_pickles as files
import numpy as np
import pytest
import torch
from launching import refused, succeed
from PIL import Image
from reference_edm import published, spread
from tiny_runs import flags

import edm
from ddpm_pixel import make_alpha_bar
from networks.edm_unet import DDPMpp
from networks.published.edm import read_edm

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": (8,)}


@pytest.fixture(scope="module")
def run(toy, tiny, tmp_path_factory):
    """A run of DDPM++ with augmentation and two averages, 20 steps, a snapshot at every second."""
    out = tmp_path_factory.mktemp("edm") / "run"
    how = {"model": "ddpmpp", "augment": 0.5, "ema_lengths": (0.05, 0.1), "snapshot_every": 2}
    succeed("edm", *tiny["edm"], *toy, *flags("edm", **SMALL, **how), "--out", out)
    return out


def test_ddpmpp_is_trained_with_augmentation(run):
    state = load_checkpoint(run / "ckpt.pt", "edm")
    start = edm.make_net(trained_config(edm.Config, state), tuple(state["shape"]), 2).state_dict()
    assert "map_augment.weight" in start
    torch.manual_seed(0)  # the seed of the run
    fresh = edm.make_net(trained_config(edm.Config, state), tuple(state["shape"]), 2).state_dict()
    moved = {name for name in fresh if not torch.equal(fresh[name], state["model"][name])}
    assert "map_augment.weight" in moved  # it was told what was done
    for picture in ("loss-sigma.png", "denoiser.png", "samples.png", "reverse.gif"):
        assert (run / picture).exists()


def test_one_length_is_sampled_from_its_average(run, tmp_path):
    asked = ["--sample", run / "ckpt.pt", "--gpus", 0, "--n", 3, "--sample-steps", 3]
    succeed("edm", *asked, "--ema-length", 0.07, "--out", tmp_path)
    net, _, shape, _, column = edm.load_net(run / "ckpt.pt", "cpu")
    net.load_state_dict(reconstruct(run / "power", 0.07, [*range(2, 21, 2)]))
    seeds, labels = torch.arange(3), torch.arange(3) % 2
    cfg = edm.Config(sample_steps=3)
    *_, (x, _) = edm.trajectory(net, column, cfg, shape, seeds, labels)
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], wanted)


def test_several_lengths_are_a_curve(run, tmp_path):
    asked = ["--sample", run / "ckpt.pt", "--gpus", 0, "--n", 8, "--sample-steps", 2]
    done = succeed("edm", *asked, "--ema-length", 0.05, 0.28, "--out", tmp_path)
    told = [line.split()[-1] for line in done.out.splitlines() if "Fréchet distance" in line]
    assert len(set(told)) == 2 and (tmp_path / "ema-length.png").exists()
    line = refused("edm", *asked, "--ema-length", 0.05, "--metric-data", "glyphs")
    assert "--metric-data is for a curve over --ema-length: leave it out" in line
    of_another = ["--metric-data", tmp_path / "none"]  # of which the distance would be
    assert "none" in refused("edm", *asked, "--ema-length", 0.05, 0.28, *of_another)


def test_the_checkpoint_says_which_snapshots_count(run, tmp_path):
    earlier = tmp_path / "ckpt-000006.pt"
    state = load_checkpoint(run / "ckpt.pt")
    state["power"]["snapshots"] = [2, 4, 6]
    torch.save(state, earlier)
    (tmp_path / "power").mkdir()
    for step in (2, 4, 6, 8):
        name = f"snapshot-{step:07d}.pt"
        (tmp_path / "power" / name).write_bytes((run / "power" / name).read_bytes())
    asked = ["--gpus", 0, "--n", 2, "--sample-steps", 2, "--ema-length", 0.07]
    succeed("edm", "--sample", earlier, *asked, "--out", tmp_path / "a")
    (tmp_path / "power" / "snapshot-0000008.pt").unlink()
    succeed("edm", "--sample", earlier, *asked, "--out", tmp_path / "b")
    one, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert np.array_equal(one, other)
    (tmp_path / "power" / "snapshot-0000004.pt").unlink()
    line = refused("edm", "--sample", earlier, *asked)
    assert "snapshot-0000004.pt is missing" in line


def test_several_churns_are_a_picture(run, tmp_path):
    asked = ["--sample", run / "ckpt.pt", "--gpus", 0, "--n", 4, "--sample-steps", 4]
    succeed("edm", *asked, "--S-churn", 0, 0.4, 1.6, "--out", tmp_path)
    _, height, width = load_checkpoint(run / "ckpt.pt")["shape"]
    with Image.open(tmp_path / "churn.png") as picture:  # rows of churn, columns of seeds
        assert picture.size == (4 * (width + 2) + 2, 3 * (height + 2) + 2)
        rows = np.asarray(picture)[2:].reshape(3, height + 2, -1)
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])


def test_a_run_without_averages_has_no_other_length(toy, tiny, tmp_path):
    out = tmp_path / "plain"
    succeed("edm", *tiny["edm"], *toy, *flags("edm", ema_lengths=()), "--steps", 3, "--out", out)
    assert not (out / "power").exists()
    line = refused("edm", "--sample", out / "ckpt.pt", "--gpus", 0, "--ema-length", 0.1)
    assert "--ema-length 0.1: " in line and "edm.py --ema-lengths" in line


def test_a_published_pickle_is_sampled(tmp_path):
    small = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,))
    tensors = spread(published((8, 8), 3, 9, **small), torch.float32)
    path = tmp_path / "edm.pkl"
    files.written(path, lambda: {"ema": files.precond(files.tree(tensors), 8, 3)})
    asked = ["--sample", path, "--gpus", 0, "--n", 4, "--classes", 2, "--sample-steps", 3]
    succeed("edm", *asked, "--out", tmp_path)
    found = read_edm(path)
    net = DDPMpp(found["shape"], 3, **found["settings"]).eval()
    net.load_state_dict(found["state"])
    seeds = torch.arange(4)
    walk = edm.sample(net, edm.Edm(0.5), edm.sigma_steps(3), (3, 8, 8), seeds, 0 * seeds + 2)
    *_, (x, _) = walk
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    held = np.load(tmp_path / "samples.npz")
    assert np.array_equal(held["arr_0"], wanted) and (held["arr_1"] == 2).all()
    assert "guidance" in refused("edm", *asked, "--guidance", 1)  # it always saw a label


def test_other_vectors_of_augmentation_are_refused(tmp_path):
    small = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,))
    tensors = spread(published((8, 8), 3, 4, **small), torch.float32)
    path = tmp_path / "edm.pkl"
    files.written(path, lambda: {"ema": files.precond(files.tree(tensors), 8, 3)})
    line = refused("edm", "--sample", path, "--gpus", 0)
    assert "edm.pkl" in line and "4 numbers" in line and "expected 9" in line


def test_a_run_s_own_config_may_stand_beside_it(run, tmp_path):
    asked = ["--sample", run / "ckpt.pt", "--gpus", 0, "--n", 1, "--sample-steps", 3]
    succeed("edm", *asked, "--config", run / "config.yaml", "--out", tmp_path)
    assert "--column: " in refused("edm", *asked, "--column", "iddpm")


def test_sigmas_that_a_network_does_not_know_are_refused_by_their_flag(monkeypatch):
    column = edm.Chain(make_alpha_bar("linear", 1000))  # from 0.0100005 to 157.407
    assert column.sigma_min > 0.01 and column.sigma_max > 157

    def steps(*typed, **more):
        monkeypatch.setattr("sys.argv", ["edm.py", "--sample", "x", *typed])
        values = dict(zip(typed[::2], map(float, typed[1::2]), strict=True))
        named = {name[2:].replace("-", "_"): value for name, value in values.items()}
        return edm.steps_of(edm.Config(**named, **more), column)

    with pytest.raises(BadInput) as error:
        steps("--sigma-min", "0.002")
    assert str(error.value).startswith("--sigma-min 0.002: ") and "sigma-max" not in str(error)
    low, high = re.search(r"from (\S+) to ([\d.]+);", str(error.value)).groups()
    found = steps("--sigma-min", low, "--sigma-max", high)  # what the line says can be typed
    assert [found[0], found[-2]] == pytest.approx([float(high), float(low)])
    with pytest.raises(BadInput, match="--sigma-max 500: .* to 157; type"):
        steps("--sigma-min", "1", "--sigma-max", "500")
    assert steps()[-2] == pytest.approx(column.sigma_min)  # a default is moved to its end
    with pytest.raises(BadInput, match="no sigmas from 200 to 300"):
        steps(sigma_min=200.0, sigma_max=300.0)
