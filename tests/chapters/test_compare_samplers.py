"""`compare_samplers.py` from end to end on a tiny checkpoint, scored by a formula."""

from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.pictures import tile, to_uint8
from runtime.processes import World

import json
import re
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import compare_samplers
import ddim
import ddpm_pixel as ch1
import dpm_solver
import eval_fid
import improved_ddpm
from evaluation import samplers_report
from evaluation.image_sets import Images
from kernels import gaussian

SHAPE, T = (1, 4, 6), 6
WAYS = ("ddim", "dpmpp", "heun", "ddpm", "ddpm")  # the last with either variance
REAL = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 1), np.uint8)


def pixels(images):
    """uint8 tensor (N,H,W,C) -> its pixels in [0, 1] as features (N,d)."""
    return torch.as_tensor(images).flatten(1).float() / 255


class Evaluator:
    """Says how bright the images are, and how bright those of label 1 are among them."""

    protocol, reference, n_reference = "brightness", "nothing:test", 7
    real, root, extractor = Images("nothing:test", REAL), "", staticmethod(pixels)
    made = []

    def __init__(self, name, root, *, shape, class_names, size, classes, device, steps):
        assert tuple(shape) == SHAPE and class_names in (["a", "b", "c"], []) and steps == 1500
        self.made.append((name, root, size, classes, str(device)))

    def __call__(self, images, labels=None, world=None, also=None):
        ones = None if labels is None else float(images[labels == 1].mean() / 255)
        figures = {"frechet": float(images.mean()), "inception_score": float(images.std())}
        more = also(pixels(images).numpy()) if also else {}
        return figures | more | {"class_accuracy": ones}


SIZES = {"model_channels": 16, "channel_mult": (1, 2), "attention_resolutions": ()}
DATA = {"data": "this", "data_root": "there", "classes": "a,b,c"}


def checkpoint(folder, class_cond=True, seed=0):
    how = {"schedule": "cosine", "timesteps": T, "prediction": "v", "class_cond": class_cond}
    cfg = ch1.Config(**SIZES, **DATA, **how)
    torch.manual_seed(seed)
    net = ch1.UNet(SHAPE, 3 * class_cond, cfg)
    return saved(folder, "ddpm_pixel", cfg, net)


def saved(folder, script, cfg, net):
    """(path of a checkpoint of this network, with something to say, and the network)."""
    for name, weights in net.named_parameters():
        if name.endswith("weight") and not weights.any():  # so that labels make a difference
            torch.nn.init.normal_(weights, std=0.05)
    folder.mkdir(exist_ok=True)
    state = {
        "script": script,
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
    """The evaluator in place, and [(sampler, steps, w)] of what is drawn, but for the warm-up."""
    monkeypatch.setattr(eval_fid, "Evaluator", Evaluator)
    calls, trajectory_of = [], compare_samplers.trajectory_of
    monkeypatch.setattr(compare_samplers, "guidance_film", lambda *args: [])

    def counted(*where):
        calls.append(where[-3:])
        return trajectory_of(*where)

    monkeypatch.setattr(compare_samplers, "trajectory_of", counted)
    return calls


def settings(path, **changes):
    common = {"n": 3, "compare_steps": "2,99", "compare_guidance": "1,-1", "gpus": 0}
    common |= {"checkpoint": path, "sample_steps": 3, "batch_size": 2}
    return compare_samplers.Config(**(common | changes))


def left(folder, kind, ending):
    """The only file of this kind that a study left in a folder, whatever its settings."""
    (path,) = (p for p in folder.glob(f"{kind}*.{ending}") if re.split("[_.]", p.name)[0] == kind)
    return path


def reference(net, alpha_bar, pairs, sampler, w, labels, eta=0.0, variance="small", n=3):
    """uint8 images (n,H,W,C) of seeds 0, 1, ... by the chapters' own functions."""
    where = (net, alpha_bar, pairs, SHAPE, torch.arange(n), labels, w)
    if sampler == "ddpm":
        make_row = partial(ch1.ancestral_row, prediction="v", variance=variance)
        *_, (x, _) = ch1.sample(*where, make_row)
    elif sampler == "ddim":
        *_, (x, _) = ddim.sample(*where, eta=eta, prediction="v")
    else:
        *_, (x, _) = dpm_solver.sample(sampler, *where, prediction="v")
    return to_uint8(x).numpy()


def test_a_figure_that_some_rows_lack_is_drawn_of_the_others():
    rows = [{"guidance": w, "frechet": w + 5.0, "class_accuracy": w / 9} for w in (-1, 0, 2)]
    rows[0]["class_accuracy"] = None
    panels = samplers_report.curves({"ddim": rows}, "guidance")
    assert panels == {
        "Fréchet distance": {"ddim": ([-1, 0, 2], [4.0, 5.0, 7.0])},
        "class accuracy": {"ddim": ([0, 2], [0.0, 2 / 9])},
    }


def test_samples_of_some_classes_are_compared_with_those_classes(drawn, tmp_path):
    path, _ = checkpoint(tmp_path / "run")
    cfg = settings(path, classes="2,a", compare_steps="2", compare_guidance="0")
    Evaluator.made.clear()
    compare_samplers.compare(cfg, World())
    assert [classes for *_, classes, _ in Evaluator.made] == [["c", "a"]]


def test_every_cell_is_what_its_sampler_draws(drawn, tmp_path):
    path, net = checkpoint(tmp_path / "run")
    cfg = settings(path, eta=0.4, sampler="dpmpp", spacing="quadratic", out=str(tmp_path / "out"))
    Evaluator.made.clear()
    compare_samplers.compare(cfg, World())
    assert Evaluator.made == [("this", "there", 0, "a,b,c", "cpu")]
    expected = [(s, k, 0.0) for s in WAYS for k in (2, T)]  # 99 steps are more than T
    assert drawn[1:] == expected + [("dpmpp", 3, -1.0), ("dpmpp", 3, 1.0)]

    found = json.loads(left(tmp_path / "out", "compare", "json").read_text())
    alpha_bar, labels = ch1.make_alpha_bar("cosine", T), torch.arange(3)
    for row in found["samplers"] + found["guidance"]:
        sampler, w = row["sampler"], row["guidance"]
        pairs = ddim.subsequence(T, row["steps"], "quadratic")
        variance = row.get("variance", "small")
        images = reference(net, alpha_bar, pairs, sampler, w, labels, 0.4, variance)
        assert row["frechet"] == pytest.approx(images.mean(), abs=0.01)
        right = images[labels == 1].mean() / 255 if w != -1 else None  # no class was asked for
        assert row["class_accuracy"] == pytest.approx(right, abs=1e-3)
        passes = (2 * len(pairs) - 1 if sampler == "heun" else len(pairs)) * (
            1 if w in (0, -1) else 2
        )
        assert row["evaluations"] == passes and row["seconds_per_image"] > 0
        assert ("eta" in row, "variance" in row) == (sampler == "ddim", sampler == "ddpm")
        assert row["precision"] is row["recall"] is None  # three images have no fourth neighbour
    assert [r["variance"] for r in found["samplers"][6:]] == ["small", "small", "large", "large"]
    brightness = [row["frechet"] for row in found["samplers"]]
    assert len({round(b, 3) for b in brightness}) == 10  # no two cells are the same

    lines = read_log(tmp_path / "out" / "compare.jsonl")
    cell = np.asarray(Image.open(tmp_path / "out" / "compare-cells" / lines[0]["cell"]))
    pairs = ddim.subsequence(T, 2, "quadratic")
    images = reference(net, alpha_bar, pairs, "ddim", 0.0, labels, eta=0.4)
    assert np.abs(cell.astype(int) - tile(images)[:, :, 0]).max() <= 1


@pytest.mark.parametrize("sampler", compare_samplers.SAMPLERS)
def test_all_samplers_start_at_the_same_noise_and_count_their_evaluations(tmp_path, sampler):
    _, net = checkpoint(tmp_path / "run")
    seen, shown = [], []

    def look(module, inputs, output):
        seen.append(inputs[0][:3].clone())
        shown.append(len(inputs[0]))

    trained = improved_ddpm.Config(timesteps=50, schedule="linear", learn_sigma=False)
    alpha_bar = ch1.alpha_bar_of(trained)
    seeds, y = torch.tensor([7, 8, 10**12]), torch.tensor([0, 1, 2])
    with net.register_forward_hook(look):
        for w in (0.0, 1.5, -1.0):
            seen.clear()
            shown.clear()
            where = (compare_samplers.Config(), net, trained, alpha_bar, SHAPE)
            list(compare_samplers.trajectory_of(*where, sampler, 4, w)(seeds, y))
            assert torch.equal(seen[0], gaussian((3, *SHAPE), seeds, -1, "cpu"))
            assert sum(shown) == 3 * dpm_solver.calls_of(sampler, 4) * ddim.passes(y, w)


def test_a_variance_that_was_learned_is_that_of_the_ancestral_rows(drawn, tmp_path):
    cfg = improved_ddpm.Config(**SIZES, **DATA, timesteps=T, num_heads=1)
    torch.manual_seed(0)
    path, net = saved(tmp_path / "run", "improved_ddpm", cfg, improved_ddpm.make_net(cfg, SHAPE, 3))
    asked = {"compare_steps": "4", "compare_guidance": "0", "sampler": "ddpm"}
    images = {}
    for variance in ("auto", "small"):
        out = tmp_path / variance
        compare_samplers.compare(settings(path, variance=variance, out=str(out), **asked), World())
        rows = read_log(out / "compare.jsonl")
        found = [r["made_by"].get("variance") for r in rows if r["made_by"]["steps"] == 4]
        assert found == [None, None, None, "small", "large", "learned"]
        (row,) = (row for row in rows if row["made_by"]["steps"] == 3)
        assert row["made_by"]["variance"] == {"auto": "learned", "small": "small"}[variance]
        images[variance] = np.asarray(Image.open(out / "compare-cells" / row["cell"])).astype(int)
    alpha_bar, pairs = ch1.make_alpha_bar("cosine", T), ddim.subsequence(T, 3)
    seeds, row = torch.arange(3), improved_ddpm.learned_row
    *_, (x, _) = ch1.sample(net, alpha_bar, pairs, SHAPE, seeds, torch.arange(3), make_row=row)
    assert np.abs(tile(to_uint8(x).numpy())[:, :, 0] - images["auto"]).max() <= 1
    assert np.abs(images["small"] - images["auto"]).max() > 5


def test_the_report_says_what_made_it_and_the_figures_are_there(drawn, tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path / "run")
    flags = [path, "--n", "3", "--compare-steps", "2", "--compare-guidance", "0,2"]
    monkeypatch.setattr("sys.argv", ["/some/where/compare_samplers.py", *flags, "--gpus", "0"])
    compare_samplers.main()
    folder = tmp_path / "run"
    text = left(folder, "compare", "md").read_text()
    assert f"python compare_samplers.py {' '.join(flags)} --gpus 0" in text
    assert "N = 3 samples, seeds 0-2, classes all" in text
    assert "7 images of nothing:test; brightness" in text
    found = json.loads(left(folder, "compare", "json").read_text())
    ways = [("ddim", "-", "0"), ("dpmpp", "-", "-"), ("heun", "-", "-")]
    ways += [("ddpm", "beta_tilde", "-"), ("ddpm", "beta", "-")]
    for row, way in zip(found["samplers"], ways, strict=True):
        figures = f"{row['frechet']:.3f} | {row['inception_score']:.3f} | - | - |"
        line = [*way, "2", str(row["evaluations"]), f"{row['seconds_per_image']:.4f}", figures]
        assert f"| {' | '.join(line)} {100 * row['class_accuracy']:.1f} % |" in text
    assert "ddim, eta 0, 6 steps." in text  # --sample-steps 50, but T is 6
    assert "| ddim | - | 0 | 2 | 12 |" in text
    alpha_bar = ch1.make_alpha_bar("cosine", T)
    last, wanted = (1 - alpha_bar[0] / 1) ** 0.5, (1 - alpha_bar[5] / alpha_bar[0]) ** 0.5
    assert "from t = 5 to 0" in text  # the two steps are 5 -> 0 -> the image
    assert f"x_t has noise of {last:.3g}: beta adds {wanted:.3g}, beta_tilde" in text
    for name in ("compare", "compare-grids", "guidance"):
        picture = np.asarray(Image.open(left(folder, name, "png")).convert("L"))
        assert min(picture.shape) > 100 and picture.std() > 5


def test_figures_say_what_their_numbers_are_of(drawn, tmp_path, monkeypatch):
    titles = {}
    for name, place in (("draw_panels", 2), ("draw_cells", 5)):

        def seen(path, *args, title="", place=place, **how):
            titles[re.split("[_.]", path.name)[0]] = title or args[place - 1]

        monkeypatch.setattr(samplers_report, name, seen)
    monkeypatch.setattr(Evaluator, "network", "toy classifier", raising=False)
    path, _ = checkpoint(tmp_path / "run")
    compare_samplers.compare(settings(path, compare_steps="2"), World())
    of = "N = 3, against 7 images of nothing:test, by the toy classifier's features and logits"
    assert titles["guidance"] == of and titles["compare"] == f"{of}, guidance w = 0"
    assert titles["compare-grids"] == "the same seeds in each, w = 0"


def test_a_second_call_computes_only_what_is_missing(drawn, tmp_path, monkeypatch):
    for figure in ("draw_panels", "draw_cells"):
        monkeypatch.setattr(samplers_report, figure, lambda *args, **kwargs: None)
    path, _ = checkpoint(tmp_path / "run")
    rows = tmp_path / "run" / "compare.jsonl"

    def call(**changes):
        drawn.clear()
        compare_samplers.compare(settings(path, **changes), World())
        return drawn[1:]  # the first warms up

    assert len(call()) == 12
    found = left(tmp_path / "run", "compare", "json")
    before = found.read_text()
    assert call() == []
    assert found.read_text() == before
    assert call(compare_steps="2,5") == [(s, 5, 0.0) for s in WAYS]
    # A kill in the middle of a line loses that row alone, and what is added later is whole.
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:7], lines[7][:40]]))
    assert call()[:1] == [("ddpm", 6, 0.0)] and call() == []
    # Without its picture a row is not finished.
    (tmp_path / "run" / "compare-cells" / json.loads(lines[2])["cell"]).unlink()
    assert call() == [("dpmpp", 2, 0.0)]
    # Other seeds, eta or weights make other rows; eta only those of ddim.
    before = found.read_text()
    assert len(call(n=2)) == 12
    assert {name for name, _, _ in call(eta=0.5)} == {"ddim"}
    checkpoint(tmp_path / "run", seed=1)
    assert len(call()) == 12
    assert found.read_text() == before  # each of these has files of its own
    assert len(list(found.parent.glob("compare*.json"))) == 5


def test_without_labels_there_is_no_guidance_and_no_accuracy(drawn, tmp_path):
    path, _ = checkpoint(tmp_path / "run", class_cond=False)
    compare_samplers.compare(settings(path), World())
    assert drawn[1:] == [(s, k, 0.0) for s in WAYS for k in (2, T)]
    assert not list((tmp_path / "run").glob("guidance*"))
    text = left(tmp_path / "run", "compare", "md").read_text()
    assert "## Guidance" not in text and text.count("| - | - | - |") == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a checkpoint is missing"),
        (["a", "--compare-guidance", "w"], "--compare-guidance w: expected numbers"),
        (["a", "--compare-steps", "0"], "--compare-steps 0: expected numbers"),
        (["a", "--n", "1"], "a covariance is compared"),
        (["a", "--eta", "2"], "--eta must be from 0 to 1"),
        (["a", "--sampler", "euler"], "euler"),
        (["a"], "checkpoint a"),
        (["CKPT", "--sampler", "ddpm", "--variance", "learned"], "--variance learned: "),
        (["CKPT", "--variance", "large"], "--variance does nothing without --sampler ddpm"),
        (["CKPT", "--classes", "d"], "--classes d"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, arguments, message, tmp_path):
    path, _ = checkpoint(tmp_path / "run")
    arguments = [{"CKPT": path}.get(a, a) for a in arguments]
    monkeypatch.setattr("sys.argv", ["compare_samplers.py", *arguments, "--gpus", "0"])
    with pytest.raises(BadInput, match=message) as caught:
        compare_samplers.main()
    assert "\n" not in str(caught.value)
