"""An evaluation beside a training: what is drawn is of the checkpoint that the result names."""

import os

import pytest

from evaluation import checkpoint_samples


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch, links):
    path = tmp_path / "ckpt.pt"
    path.write_text("old")
    read = []

    def draw(command, stdout):
        given = command[command.index("--sample") + 1]
        if not read:
            (tmp_path / "new").write_text("new")
            os.replace(tmp_path / "new", path)  # as a training saves
        with open(given) as file:
            read.append(file.read())
        out = tmp_path / command[command.index("--out") + 1]
        out.mkdir()
        (out / "samples.npz").touch()

    def refuse(*names):
        raise OSError("no links here")

    monkeypatch.setattr(checkpoint_samples, "run_alone", draw)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    found = checkpoint_samples.sampled(path, "toy", 4, 0)
    assert read == ["old"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".pt") == ["ckpt.pt"]
    again = checkpoint_samples.sampled(path, "toy", 4, 0)  # of the new one
    assert again != found and read[1:] == ["new"]
    assert checkpoint_samples.sampled(path, "toy", 4, 0) == again and len(read) == 2
