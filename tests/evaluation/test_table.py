"""evaluation/table.py: `eval_fid.py table`, whose figures are those of single comparisons."""

from runtime import processes
from runtime.commandline import entry

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import refused, start_ranks, succeed
from PIL import Image

import eval_fid
from evaluation import table
from image_data import datasets

FEW = ["--gpus", "0", "--classifier-steps", "5"]


@pytest.fixture(scope="module")
def home(toy, tiny, tmp_path_factory):
    """A folder with images as one.npz and two.npz, and a run of ddpm_pixel.py."""
    home = tmp_path_factory.mktemp("table")
    ds = datasets.load(toy[1], toy[3], split="train")
    images, labels = np.array(ds.images), np.array(ds.labels)
    rng = np.random.default_rng(0)
    some = np.tile(np.arange(64), 6)  # 384 images: enough for an interval
    noise = rng.normal(0, 12, (len(some), 16, 16, 1))
    bright = np.clip(images[some].astype(int) + noise, 0, 255).astype(np.uint8)
    np.savez(home / "one.npz", bright, labels[some])
    np.savez(home / "two.npz", 255 - bright[:90])
    np.savez(home / "large.npz", np.zeros((5, 20, 20, 1), np.uint8))
    np.savez(home / "other.npz", mu=np.zeros(128), sigma=np.eye(128), feature_hash="another")
    flags = [*tiny["ddpm_pixel"], "--steps", "2", "--sample-every", "0"]
    succeed("ddpm_pixel", *toy, *flags, "--out", home / "run")
    return home


@pytest.fixture
def tabled(home, toy, monkeypatch, capfd):
    """tabled(*args) runs `eval_fid.py table` in this process: its JSON object, stdout, stderr.

    With an empty figure, where not draws=True.
    """

    def run(*args, word="table", draws=False):
        if not draws:
            monkeypatch.setattr(table, "draw", lambda path, rows: path.touch())
        command = [word, *args, *toy[2:], *FEW]
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", *map(str, command)])
        monkeypatch.setattr(processes, "SAID", set())
        monkeypatch.chdir(home)
        entry(eval_fid.main)
        out, err = capfd.readouterr()
        return json.loads(out.splitlines()[-1]), out, err

    return run


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_table_says_what_single_comparisons_say(tabled, home, toy):
    reference = ["--against", f"{toy[1]}:test"]
    names = ["--names", "bright ones", "dark"]
    found, out, err = tabled("one.npz", "two.npz", *reference, *names, "--out", "study", draws=True)
    lines = (home / "study" / "table.md").read_text().splitlines()
    shown = [cells(line) for line in lines if line.startswith("|")]
    titles = ["", "N", "Fréchet distance", "95 % interval", "IS", "precision", "recall"]
    assert shown[0] == [*titles, "class accuracy"] and len(shown) == 4
    for row, name, file in zip(shown[2:], names[1:], ("one.npz", "two.npz"), strict=True):
        alone, _, _ = tabled(f"{toy[1]}:test", "--metrics", "is,prdc", word=file)
        assert row[:3] == [name, str(alone["n_generated"]), f"{alone['frechet']:.3f}"]
        assert row[4:7] == [
            f"{alone[figure]:.3f}" for figure in ("inception_score", "precision", "recall")
        ]
        right = alone["class_accuracy"]
        assert row[7] == ("–" if right is None else f"{right:.1%}")
        low, high = alone.get("frechet_interval") or (None, None)
        assert row[3] == ("–" if low is None else f"{low:.3f} to {high:.3f}")
    assert shown[2][3] != "–" and shown[3][3] == "–"  # ninety are too few
    assert all(line in out for line in lines if line.startswith("|"))
    assert json.loads((home / "study" / "table.json").read_text()) == found
    assert [row["name"] for row in found["rows"]] == names[1:]
    assert "the toy classifier's logits, the mean over 1 part" in "\n".join(lines)
    assert "N differs, from 90 to 384" in err and "N differs" in lines[-1]
    with Image.open(home / "study" / "table.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 20


def test_finished_rows_are_kept_and_other_tables_stay(tabled, home, toy, monkeypatch):
    computed = []
    figures = table.Reference.figures

    def counted(self, name, *args):
        computed.append(name)
        return figures(self, name, *args)

    monkeypatch.setattr(table.Reference, "figures", counted)
    asked = ["one.npz", "two.npz", "--against", toy[1], "--out", "kept", "--metrics", "frechet"]
    first, _, _ = tabled(*asked)
    rows = home / "kept" / "rows.jsonl"
    assert computed == ["one.npz", "two.npz"] and rows.read_text().count("\n") == 2
    again, _, _ = tabled(*asked)
    assert len(computed) == 2 and again["rows"] == first["rows"]
    # A line torn by a kill is computed again, and the next one does not stick to it.
    rows.write_text(rows.read_text()[:-30])
    again, _, _ = tabled(*asked)
    assert computed[2:] == ["two.npz"] and again["rows"] == first["rows"]
    # Another table in the same folder has names of its own; the rows that both have are there.
    kept = {p: p.read_bytes() for p in (home / "kept").glob("table.*")}
    assert len(kept) == 3
    more, _, told = tabled(f"{toy[1]}:train", *asked, "--n", "60")
    assert computed[3:] == [f"{toy[1]}:train", "one.npz", "two.npz"]  # --n makes others of all
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert len(list((home / "kept").glob(f"table-{more['study']}.*"))) == 3
    assert [row["n_generated"] for row in more["rows"]] == [60, 60, 60]
    # Three rows of as many images: why their figures mislead is said of the first.
    assert told.count("fewer than 2,048") == 2 and "one.npz has N" not in told
    # What a file holds now decides.
    with np.load(home / "two.npz") as held:
        np.savez(home / "two.npz", held["arr_0"][:80])
    tabled(*asked)
    assert computed[6:] == ["two.npz"]


def test_without_out_a_table_lies_in_a_folder_of_its_own(tabled, home, toy):
    folders = []
    for more in ([], ["--seed", "1"]):
        found, out, _ = tabled("run", "--metrics", "frechet", "--n", "8", *more)
        assert f"run is the folder of a run: {Path('run', 'ckpt.pt')} is meant" in out
        (folder,) = (home / "runs" / "tables").glob(f"run-against-*-{found['study']}")
        assert sorted(p.name for p in folder.iterdir()) == ["table.json", "table.md", "table.png"]
        folders.append(folder)
        assert found["against"] == f"{toy[1]}:test" and found["rows"][0]["n_generated"] == 8
    assert folders[0] != folders[1]


def test_a_row_that_fails_late_leaves_those_before_it(tabled, home, toy, capfd):
    asked = ["one.npz", "run", "--against", toy[1], "--out", "late", "--metrics", "frechet"]
    with pytest.raises(SystemExit) as stop:
        tabled(*asked, "--sample-args=--no-such-flag 1")
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "no samples of run/ckpt.pt: unknown flag --no-such" in said
    assert said.count("--no-such-flag; see --help") == 1  # the other process's line, in ours
    (row,) = (home / "late" / "rows.jsonl").read_text().splitlines()
    assert json.loads(row)["figures"]["a"] == "one.npz"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["one.npz", "missing.npz"], ["missing.npz", "no such file"]),
        (["one.npz", "large.npz"], ["large.npz has 20x20x1", "16x16x1"]),
        (["one.npz", "other.npz"], ["different features"]),
        (["one.npz", "run/none.pt"], ["run/none.pt", "no such file"]),
        (["one.npz", "two.npz", "--n", "100"], ["--n 100", "two.npz"]),
        (["run", "--n", "1"], ["--n must be 0", "from 2", "got 1"]),
        (["one.npz", "two.npz", "--names", "a"], ["--names", "1 names for 2 rows"]),
        (["one.npz", "two.npz", "--names", "a", "a"], ["--names", "called a"]),
        ([], ["table A1 A2 --against B"]),
    ],
)
def test_bad_input_is_told_before_any_row_is_computed(args, words, tabled, home, toy, capfd):
    with pytest.raises(SystemExit) as stop:
        tabled(*args, "--against", toy[1], "--out", "bad")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words)
    assert not list((home / "bad").glob("*"))


def test_what_belongs_to_a_table_alone_is_refused_elsewhere(home):
    both = [home / "one.npz", home / "two.npz"]
    assert "--against means nothing without `table`" in refused("eval_fid", *both, "--against", "x")
    assert "--names means nothing without `table`" in refused("eval_fid", *both, "--names", "x")
    assert "one too many: eval_fid.py table" in refused("eval_fid", *both, home / "third.npz")
    assert "needs a reference" in refused("eval_fid", "table", *both)


def test_without_arguments_it_says_what_to_type():
    told = refused("eval_fid")
    assert "eval_fid.py A B" in told and "runs/pixel-mnist" in told and "--help" in told


def test_a_run_s_folder_means_its_checkpoint(tabled, home, toy):
    found, out, _ = tabled("--n", "8", "--metrics", "frechet", word="run")
    assert out.startswith("run is the folder of a run: run/ckpt.pt is meant")
    assert found["a"] == "run/ckpt.pt" and found["b"] == f"{toy[1]}:test"


def test_an_inception_score_of_one_part_has_no_spread():
    row = {"name": "a|b", "n_generated": 900, "frechet": 1.0, "inception_score": 2.5}
    several = row | {"inception_score": 3.0, "inception_score_std": 0.25}
    assert cells(table.markdown([row])[0])[-1] == "IS"
    title, _, one, two = (cells(line)[-1] for line in table.markdown([row, several]))
    assert (title, one, two) == ("IS ± std", "2.500", "3.000 ± 0.250")
    assert table.markdown([row])[2].startswith("| a\\|b |")


def test_samples_lie_in_out_and_without_guidance_have_no_classes(tabled, home, toy):
    before = {p: p.stat().st_mtime_ns for p in (home / "run").rglob("*")}
    asked = ["--n", "8", "--metrics", "frechet", "--out", "samples"]
    found, _, _ = tabled(*asked, word="run/ckpt.pt")
    assert 0 <= found["class_accuracy"] <= 1
    found, out, _ = tabled(*asked, "--sample-args=--guidance -1", word="run/ckpt.pt")
    assert found["class_accuracy"] is None and "class accuracy" not in out
    tabled("run", "--n", "8", "--metrics", "frechet", "--out", "samples")  # of the first ones
    assert len(list((home / "samples").glob("eval-ckpt-*/samples.npz"))) == 2
    assert {p: p.stat().st_mtime_ns for p in (home / "run").rglob("*")} == before
    assert "--out means nothing" in refused("eval_fid", home / "one.npz", toy[1], "--out", "x")


def test_two_processes_make_the_table_of_one(home, toy, tabled):
    asked = ["one.npz", "two.npz", "--against", toy[1], "--metrics", "frechet", "--n", "70"]
    alone, _, _ = tabled(*asked, "--out", "alone")
    files = [home / name for name in asked[:2]]
    ranks = start_ranks(
        "eval_fid", "table", *files, *asked[2:], "--out", home / "both", *toy[2:], *FEW
    )
    done = [rank.wait() for rank in ranks]
    assert [d.code for d in done] == [0, 0], done[0].err + done[1].err
    both = json.loads((home / "both" / "table.json").read_text())
    for one, other in zip(alone["rows"], both["rows"], strict=True):
        assert one["frechet"] == pytest.approx(other["frechet"], rel=1e-5)


def test_names_tell_rows_apart(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "samples.npz").touch()
    files = [str(tmp_path / run / "samples.npz") for run in ("a", "b")]
    rows = [*files, str(tmp_path / "a" / "ckpt.pt"), "x/ckpt-000500.pt", "mnist:train"]
    assert table.short_names(rows) == [*files, "a", "x, ckpt-000500", "mnist:train"]
