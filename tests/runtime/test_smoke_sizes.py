"""--smoke is small for every choice that can be typed and every file of configs/.

Counted are steps, images and weights, which are the same on a busy machine.
"""

from runtime.commandline import BadInput

import importlib
import re
import sys
import typing

import pytest
import torch
from data_files import write_images
from launching import REPO
from tiny_runs import TRAININGS, fields

import dit
import ldm_cfg
from image_data import datasets

MOST = 8_000_000  # weights; configs/afhq.yaml has 7.3 million
LISTS = {"dit": {"model": [f"dit-{size}/{patch}" for size in dit.SIZES for patch in (1, 2)]}}


def choices(script):
    """Flags of every choice, one at a time, and --config of every file that is for the script."""
    found, needing = [[]], importlib.import_module(script).Config.NEEDS
    for name, field in fields(script).items():
        listed = LISTS.get(script, {}).get(name, ())
        if typing.get_origin(field.type) is typing.Literal and name not in needing:
            listed = typing.get_args(field.type)
        found += [[f"--{name.replace('_', '-')}", value] for value in listed]
    found += [["--ae", "ldm", "--channel-mult", "1", "2", "4", "4"]] * (script == "autoencoder")
    files = sorted((REPO / "configs").glob("*.yaml"))
    mine = [path for path in files if re.search(r"python (\w+)\.py", path.read_text())[1] == script]
    return found + [["--config", str(path), "--classes", ""] for path in mine]


def builds(module):
    """The function (cfg, shape, classes) that makes the network of a chapter."""
    module = getattr(module, "flow_matching", module)  # whose network rectified_flow.py trains
    if hasattr(module, "make_net"):
        return module.make_net
    if hasattr(module, "make_autoencoder"):
        return lambda cfg, shape, classes: module.make_autoencoder(cfg, shape)
    return lambda cfg, shape, classes: module.UNet(shape, classes, cfg)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "set", 20, height=32, width=32, channels=3)
    return ["--data", str(folder / "set"), "--data-root", str(folder), "--gpus", "0", "--size", "0"]


@pytest.mark.parametrize("script", TRAININGS)
def test_every_choice_is_small(script, photos, monkeypatch):
    module, begun = importlib.import_module(script), []
    for where in {module, ldm_cfg}:
        monkeypatch.setattr(where, "launch", lambda train, cfg: begun.append(cfg))
    refused = []
    for flags in choices(script):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--smoke", *flags, *photos])
        try:
            module.main()
        except BadInput as error:  # a choice that needs another one
            refused.append(f"{flags}: {error}")
            continue
        cfg = begun.pop()
        assert cfg.steps <= 4 and cfg.batch_size <= 8 and cfg.out.startswith("runs/smoke-"), flags
        for name in ("n", "sample_steps", "ae_steps"):
            assert getattr(cfg, name, 0) <= 8 or name in module.Config.IDLE, (flags, name)
        assert not getattr(cfg, "metric_every", 0) and not getattr(cfg, "n_eval", 0), flags
        shape = (3, 32, 32)
        with torch.device("meta"):
            if hasattr(cfg, "ae_mult"):
                first = ldm_cfg.make_autoencoder(cfg, shape)
                assert sum(p.numel() for p in first.parameters()) < MOST, flags
                shape = (4, 16, 16)
            net = builds(module)(cfg, shape, 10)
        assert sum(p.numel() for p in net.parameters()) < MOST, flags
    assert len(refused) <= 3, refused


def test_a_large_set_is_a_few_images(tmp_path):
    """So that latents of all of them are soon made; they are of all classes."""
    write_images(tmp_path / "set", 260, height=4, width=4)
    given = {"data": str(tmp_path / "set"), "data_root": str(tmp_path), "smoke": True}
    some = datasets.of(ldm_cfg.Config(**given))
    every = datasets.load(given["data"], tmp_path)
    assert len(some) == datasets.SMOKE == 200 and len(every) == 260 and some.key == every.key
    assert (some.images[0] == every.images[0]).all() and (some.images[-1] == every.images[-1]).all()
    assert set(some.labels) == {0, 1}
    assert len(datasets.of(ldm_cfg.Config(**given | {"smoke": False}))) == 260
    assert len(datasets.of(ldm_cfg.Config(**given, dry_run=True))) == 260
