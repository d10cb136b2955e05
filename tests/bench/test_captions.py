"""bench/captions.py: its pictures, what is read off them, and a run of a few steps."""

from runtime.commandline import BadInput
from runtime.files import read_log
from runtime.scores import wilson

import importlib
import sys
import zipfile
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench import caption_pictures as pictures
from stable_diffusion import load

KNOWN = pictures.captions()


@pytest.fixture
def bench(monkeypatch):
    """The module; as a program it puts the project's folder in place of its own on the path."""
    monkeypatch.setattr(sys, "path", ["replaced", *sys.path])
    return importlib.import_module("bench.captions")


def test_each_two_words_are_seen_together_and_twenty_sentences_are_not():
    seen = [meaning for meaning in KNOWN.values() if not pictures.is_held_out(meaning)]
    assert len(KNOWN) == 120 and len(seen) == 100
    for pair in combinations(range(3), 2):
        both = [{(m[pair[0]], m[pair[1]]) for m in some} for some in (KNOWN.values(), seen)]
        assert both[0] == both[1]


def test_a_picture_is_of_its_number_and_shows_its_caption():
    images = np.stack([pictures.draw(m, 1, i) for i, m in enumerate(KNOWN.values())])
    again = pictures.draw(list(KNOWN.values())[7], 1, 7)
    assert (again == images[7]).all() and (pictures.draw((0, 0, 1), 0, 0) != images[0]).any()
    colour, ground, places = pictures.read(images)
    assert [*zip(colour, ground, strict=True)] == [(c, g) for c, _, g in KNOWN.values()]
    assert images.shape == (120, 64, 64, 3) and places.shape == (120, 16, 16, 1)
    ring = np.ones((64, 64), bool)
    ring[pictures.BORDER : -pictures.BORDER, pictures.BORDER : -pictures.BORDER] = False
    assert np.ptp(images[:, ring].astype(int), axis=1).max() == 0  # shapes are whole
    full = (places / 255).mean((1, 2, 3))  # the share of a picture that its shape takes
    assert full.min() > 0.04 and full.max() < np.pi * 24**2 / 64**2  # a circle of 24 pixels


def test_what_is_read_of_a_picture_without_a_shape_is_one_colour():
    colour, ground, _ = pictures.read(np.full((1, 64, 64, 3), (45, 75, 215), np.uint8))
    assert ground[0] == list(pictures.COLOURS).index("blue") and colour[0] != ground[0]


def test_training_pictures_show_no_held_out_caption(tmp_path):
    pictures.draw_all(tmp_path / "all.zip", 240)
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        names = [name.split("/")[:2] for name in archive.namelist()]
    train, test = ([c for split, c in names if split == s] for s in ("train", "test"))
    assert len(train) == 240 and len(test) == 120 == len(set(test))
    assert not any(pictures.is_held_out(KNOWN[caption]) for caption in train)


def test_wilsons_interval(bench):
    assert np.allclose(wilson(0 / 10, 10), (0, 1.96**2 / (10 + 1.96**2)))
    low, high = wilson(30 / 40, 40)  # (p - share)^2 = z^2 p (1 - p) / n at both ends
    for p in (low, high):
        assert np.isclose((p - 0.75) ** 2, 1.96**2 * p * (1 - p) / 40)


def test_a_short_run_trains_writes_and_scores_and_is_not_done_twice(
    bench, monkeypatch, tmp_path, capsys
):
    drawn = []

    def draw(folder, model, w, prompts, n, gpus):
        drawn.append((w, prompts))
        return np.stack([pictures.draw(KNOWN[p], 0, i) for p in prompts for i in range(n)])

    monkeypatch.setattr(bench, "drawn_by_chapter", draw)
    flags = ["captions.py", "--smoke", "--resume", "auto", "--gpus", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", flags)
    bench.main()
    table = (tmp_path / "captions.md").read_text().splitlines()
    assert "\n".join(table) in capsys.readouterr().out
    assert len(table) == 2 + 2 + len(drawn) and [w for w, _ in drawn] == 2 * ["0", "2", "6.5"]
    for line, (w, prompts) in zip(table[4:], drawn, strict=True):
        name, scale, count, colour, _, ground, _, _ = (c.strip() for c in line.split("|")[1:-1])
        assert (scale, count) == (w, str(len(prompts))) and (colour, ground) == ("100.0%",) * 2
        held = {pictures.is_held_out(KNOWN[prompt]) for prompt in prompts}
        assert held == {name == "captions held out"}

    with Image.open(tmp_path / "captions.png") as sheet:
        assert sheet.size == (2 + 7 * 66, 2 + len(drawn) * 66)

    weights, words = tmp_path / "captions.safetensors", tmp_path / "vocabulary.txt.gz"
    model = load(str(weights), str(words))
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for part, net in (("unet", model.unet), ("text", model.text)):
        for name, value in net.state_dict().items():
            assert torch.equal(value, state["ema"][f"{part}.{name}"].half().float())
    assert np.isclose(model.scale, state["scale"])
    caption = next(iter(KNOWN))
    assert len(model.tokenizer.encode(caption)) == 7  # a token for each word
    assert (model.tokenizer([caption]) == state["ema"]["tokens"]).all(1).any()

    log, file = read_log(tmp_path / "log.jsonl"), load_file(weights)
    bench.main()
    assert read_log(tmp_path / "log.jsonl") == log
    assert all(torch.equal(value, file[name]) for name, value in load_file(weights).items())


def test_the_chapter_draws_with_what_was_written(bench, tmp_path):
    from networks.published.stable_diffusion import write_tiny

    weights, words = write_tiny(tmp_path)
    model = ["--weights", str(weights), "--vocabulary", str(words)]
    images = bench.drawn_by_chapter(tmp_path / "drawn", model, "2", ["a cat", "a dog"], 2, 0)
    assert images.shape == (4, 64, 64, 3) and (images[0] != images[2]).any()


def test_settings_of_other_data_are_refused(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["captions.py", "--data", "mnist", "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="^--data: this command draws its own"):
        bench.main()
    assert not list(tmp_path.iterdir())
