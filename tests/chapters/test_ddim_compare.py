"""`ddim.py --compare` from end to end on a tiny checkpoint, scored by a judge that is a formula."""

from runtime.pictures import tile
from runtime.processes import World
from runtime.files import read_log

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import ddim
import ddpm_pixel as ch1

SHAPE, T = (1, 4, 6), 6


class Judge:
    """Says how bright the images are, and how bright those of label 1 are among them."""

    protocol, reference, n_reference = "brightness", "nothing:test", 7
    made = []

    def __init__(self, name, root, *, shape, class_names, size=0, classes="", device="cpu"):
        assert tuple(shape) == SHAPE and class_names == ["a", "b", "c"]
        self.made.append((name, root, size, classes, str(device)))

    def __call__(self, images, labels=None, world=None):
        ones = None if labels is None else float(images[labels == 1].mean() / 255)
        return {"frechet": float(images.mean()), "class_accuracy": ones}


def checkpoint(folder, conditional=True, seed=0):
    cfg = ch1.Config(
        width=16,
        mult=(1, 2),
        attention=(),
        timesteps=T,
        conditional=conditional,
        data="this",
        data_root="there",
        classes="a,b,c",
    )
    torch.manual_seed(seed)
    net = ch1.make_net(cfg, SHAPE, 3 * conditional)
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    folder.mkdir(exist_ok=True)
    state = {
        "script": "ddpm_pixel",
        "config": asdict(cfg),
        "step": 1,
        "ema": net.state_dict(),
        "shape": list(SHAPE),
        "class_names": ["a", "b", "c"],
    }
    torch.save(state, folder / "ckpt.pt")
    return str(folder / "ckpt.pt"), net.eval()


@pytest.fixture
def drawn(monkeypatch):
    """The judge in place, and [(sampler, steps, w)] of what is drawn, but for the warm-up."""
    monkeypatch.setattr(compare.evaluation, "Judge", Judge)
    calls, draw = [], ddim.draw

    def counted(net, alpha_bar, pairs, cfg, *rest):
        if rest[-1] != "warm-up":
            calls.append((cfg.sampler, len(pairs), cfg.guidance))
        return draw(net, alpha_bar, pairs, cfg, *rest)

    monkeypatch.setattr(compare, "draw", counted)
    return calls


def settings(path, **changes):
    common = {"n": 3, "compare_steps": "2,99", "compare_guidance": "1,-1", "gpus": 0}
    return ddim.Config(**({"compare": path, "sample_steps": 3, "batch_size": 2} | common | changes))


def test_samples_of_some_classes_are_compared_with_those_classes(drawn, tmp_path):
    path, _ = checkpoint(tmp_path / "run")
    cfg = settings(path, classes="2,a", compare_steps="2", compare_guidance="0")
    Judge.made.clear()
    compare.compare(cfg, World())
    assert [classes for *_, classes, _ in Judge.made] == ["c,a"]


def test_every_cell_is_what_its_sampler_draws(drawn, tmp_path):
    path, net = checkpoint(tmp_path / "run")
    cfg = settings(path, eta=0.4, sampler="dpmpp", spacing="quadratic", out=str(tmp_path / "out"))
    Judge.made.clear()
    compare.compare(cfg, World())
    assert Judge.made == [("this", "there", 0, "a,b,c", "cpu")]
    expected = [(s, k, 0.0) for s in ddim.SAMPLERS for k in (2, T)]  # 99 steps are more than T
    assert drawn == expected + [("dpmpp", 3, -1.0), ("dpmpp", 3, 1.0)]

    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    alpha_bar, seeds, labels = ch1.make_alpha_bar("cosine", T), torch.arange(3), torch.arange(3)
    for row in found["samplers"] + found["guidance"]:
        own = replace(cfg, sampler=row["sampler"], guidance=row["guidance"], variance="small")
        pairs = ddim.subsequence(T, row["steps"], "quadratic")
        images = ddim.draw(net, alpha_bar, pairs, own, World(), SHAPE, labels, seeds).numpy()
        assert row["frechet"] == pytest.approx(images.mean(), abs=0.01)
        assert row["class_accuracy"] == pytest.approx(images[labels == 1].mean() / 255, abs=1e-3)
        passes = (2 * len(pairs) - 1 if row["sampler"] == "heun" else len(pairs)) * (
            1 if row["guidance"] == 0 else 2
        )
        assert row["evaluations"] == passes and row["seconds_per_image"] > 0
        assert ("eta" in row) == (row["sampler"] == "ddim")
        assert row.get("variance") == ("small" if row["sampler"] == "ddpm" else None)
    brightness = [row["frechet"] for row in found["samplers"]]
    assert len({round(b, 3) for b in brightness}) == 8  # no two cells are the same

    lines = read_log(tmp_path / "out" / "compare.jsonl")
    cell = np.asarray(Image.open(tmp_path / "out" / "compare-cells" / lines[0]["cell"]))
    own = replace(cfg, sampler="ddim", variance="small")
    images = ddim.draw(
        net,
        alpha_bar,
        ddim.subsequence(T, 2, "quadratic"),
        own,
        World(),
        SHAPE,
        labels,
        seeds,
    )
    assert np.abs(cell.astype(int) - tile(images)[:, :, 0]).max() <= 1


def test_the_report_says_what_made_it_and_the_figures_are_there(drawn, tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path / "run")
    flags = ["--compare", path, "--n", "3", "--compare-steps", "2", "--compare-guidance", "0,2"]
    monkeypatch.setattr("sys.argv", ["/some/where/ddim.py", *flags, "--gpus", "0"])
    ddim.main()
    text = (tmp_path / "run" / "compare.md").read_text()
    assert f"python ddim.py {' '.join(flags)} --gpus 0" in text
    assert "N = 3 samples, seeds 0-2, classes all" in text
    assert "7 images of nothing:test; brightness" in text
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    for row in found["samplers"]:
        assert f"| {row['sampler']} | 2 | {row['evaluations']} |" in text
        assert f"| {row['frechet']:.3f} | {100 * row['class_accuracy']:.1f} % |" in text
    assert "ddim, 6 steps." in text and "| 2 | 12 |" in text  # --sample-steps 50, but T is 6
    for name in ("compare.png", "compare-grids.png", "guidance.png"):
        picture = np.asarray(Image.open(tmp_path / "run" / name).convert("L"))
        assert min(picture.shape) > 100 and picture.std() > 5


def test_a_second_call_computes_only_what_is_missing(drawn, tmp_path, monkeypatch):
    for figure in ("plot_lines", "draw_cells"):
        monkeypatch.setattr(compare.comparison, figure, lambda *args, **kwargs: None)
    path, _ = checkpoint(tmp_path / "run")
    rows = tmp_path / "run" / "compare.jsonl"

    def call(**changes):
        drawn.clear()
        compare.compare(settings(path, **changes), World())
        return drawn.copy()

    assert len(call()) == 10
    before = (tmp_path / "run" / "compare.json").read_text()
    assert call() == []
    assert (tmp_path / "run" / "compare.json").read_text() == before
    assert call(compare_steps="2,5") == [(s, 5, 0.0) for s in ddim.SAMPLERS]
    # A kill in the middle of a line loses that row alone, and what is added later is whole.
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:7], lines[7][:40]]))
    assert call()[:1] == [("ddpm", 6, 0.0)] and call() == []
    # Without its picture a row is not finished.
    (tmp_path / "run" / "compare-cells" / json.loads(lines[2])["cell"]).unlink()
    assert call() == [("dpmpp", 2, 0.0)]
    # Other seeds, eta or weights make other rows; eta only those of ddim.
    assert len(call(n=2)) == 10
    assert {name for name, _, _ in call(eta=0.5)} == {"ddim"}
    checkpoint(tmp_path / "run", seed=1)
    assert len(call()) == 10


def test_without_labels_there_is_no_guidance_and_no_accuracy(drawn, tmp_path):
    path, _ = checkpoint(tmp_path / "run", conditional=False)
    compare.compare(settings(path), World())
    assert drawn == [(s, k, 0.0) for s in ddim.SAMPLERS for k in (2, T)]
    assert not (tmp_path / "run" / "guidance.png").exists()
    text = (tmp_path / "run" / "compare.md").read_text()
    assert "## Guidance" not in text and text.count("| - |") == 8
