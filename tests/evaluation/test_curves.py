"""python -m evaluation.curves: what is drawn of several runs, compared with what lies in them."""

import json
import os
from pathlib import Path

import pytest
import yaml
from launching import refused, succeed

from evaluation import curves

COMMAND = "evaluation.curves"
HOW = {"metric_features": "toy classifier", "metric_reference": "toy:test", "n_reference": 9}


def scores(step, distance, n=500, **more):
    return {"step": step, "frechet": distance, "metric_n": n, **HOW, **more}


def result(distance, n):
    """What eval_fid.py writes with --json."""
    found = {"frechet": distance, "inception_score": 2.0, "class_accuracy": 0.5, "n_generated": n}
    words = {"features": "classifier features: of toy", "network": "toy classifier"}
    return found | words | {"b": "toy:test", "n_reference": 9}


def make(folder, log, files=(), **settings):
    """A run with these rows in its log, JSON files {name: what they say} and settings."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"lr": 0.001, "out": str(folder)} | settings, sort_keys=False)
    )
    for name, said in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(said))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three runs of T = 100, 20 and 1000; the second was scored twice, the last by files alone."""
    losses = [{"step": s, "loss": 1 / s} for s in (10, 20)]
    bits = {"bits_per_dim": 2.5, "images": 4, "terms": [0.1] * 20}
    later = {
        "nll.json": bits,
        "improved_ddpm-nll_of=ckpt-000010/nll.json": bits | {"bits_per_dim": 3},
    }
    last = {"eval.json": result(4.0, 500), "curve.json": [result(6.0, 500) | {"step": 10}]}
    last["study.json"] = {"ways": [result(1.0, 500)]}  # no figures of the run itself
    second = [*losses, scores(10, 8.0), scores(20, 9.0, class_accuracy=0.75)]
    return [
        make(tmp_path / "one", losses, timesteps=100, schedule="linear"),
        make(tmp_path / "two", second, later, timesteps=20, schedule="cosine"),
        make(tmp_path / "three", losses, last, timesteps=1000, schedule="cosine"),
    ]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function: what plot_lines gets for a command line, and the JSON it leaves."""
    seen = []
    monkeypatch.setattr(
        curves, "plot_lines", lambda path, panels, **how: seen.append((panels, how, path))
    )
    monkeypatch.chdir(tmp_path)

    def call(*argv, out=tmp_path / "out"):
        monkeypatch.setattr("sys.argv", ["curves", *map(str, argv), "--out", str(out)])
        curves.main()
        panels, how, path = seen[-1]
        return panels, how, json.loads(Path(path).with_suffix(".json").read_text())

    return call


def by_first_word(panels):
    return {label.split()[0]: lines for label, lines in panels.items()}


def test_curves_over_steps_are_those_of_logs_and_files(runs, drawn):
    panels, how, said = drawn(*runs)
    found = by_first_word(panels)
    assert list(found) == ["loss", "Fréchet", "inception", "class", "bits"]
    assert found["loss"] == dict.fromkeys(("one", "two", "three"), ([10, 20], [1 / 10, 1 / 20]))
    assert found["Fréchet"] == {"two": ([10, 20], [8.0, 9.0]), "three": ([10, 20], [6.0, 4.0])}
    assert found["class"] == {"two": ([20], [0.75]), "three": ([10, 20], [0.5, 0.5])}
    assert found["bits"] == {"two": ([10, 20], [3, 2.5])}
    assert "Fréchet distance (features: toy classifier)" in panels
    assert "bits per dimension (4 images, 20 terms)" in panels
    assert how["title"] == "N = 500, against toy:test (9 images)" and how["xlabel"] == "step"
    assert said["runs"]["two"]["frechet"] == {
        "value": 9.0,
        "step": 20,
        "metric_n": 500,
        **HOW,
        "steps": [10, 20],
        "values": [8.0, 9.0],
    }


def test_over_a_setting_each_run_is_a_point(runs, drawn):
    for best, distance in ((False, 9.0), (True, 8.0)):
        panels, how, said = drawn(*runs, "--over", "timesteps", *["--best"] * best)
        found = by_first_word(panels)
        assert found["loss"] == {"": ((20, 100, 1000), (1 / 20,) * 3)}
        assert found["Fréchet"] == {"": ((20, 1000), (distance, 4.0))}
        assert how["xticks"] == [20, 100, 1000] and how["logx"]
        assert said["runs"]["one"]["settings"]["timesteps"] == 100
    panels, how, _ = drawn(*runs, "--over", "schedule")
    assert by_first_word(panels)["loss"][""][0] == ("linear", "cosine", "cosine")
    assert "xticks" not in how


def test_the_best_inception_score_is_the_largest(tmp_path, drawn):
    rows = [{"step": s, "inception_score": v} for s, v in ((1, 3.0), (2, 5.0), (3, 4.0))]
    _, _, said = drawn(make(tmp_path / "a", rows), "--best")
    assert (said["runs"]["a"]["inception_score"]["value"], said["best"]) == (5.0, True)


def test_figures_of_other_samples_are_not_joined(tmp_path, drawn):
    """A log of N = 500, and 5,000 at the end: curves are of the first, points of the second."""
    rows = [scores(10, 8.0), scores(20, 7.0)]
    files = {"eval.json": result(1.0, 5000)}
    both = [make(tmp_path / name, rows, files, timesteps=T) for name, T in (("a", 5), ("b", 6))]
    panels, how, _ = drawn(*both)
    assert by_first_word(panels)["Fréchet"]["a"] == ([10, 20], [8.0, 7.0])
    first, second = (label for label in panels if "score" in label or "distance" in label)
    assert (
        how["title"] == "" and "), N = 500, against" in first and "), N = 5000, against" in second
    )
    panels, how, _ = drawn(*both, "--over", "timesteps")
    assert by_first_word(panels)["Fréchet"][""] == ((5, 6), (1.0, 1.0))
    assert how["title"].startswith("N = 5000,")
    # What a run has alone is compared with nothing: the way that both have goes before.
    more = make(tmp_path / "c", rows, {"eval.json": result(2.0, 9000)}, timesteps=7)
    panels, how, _ = drawn(both[0], more, "--over", "timesteps")
    assert by_first_word(panels)["Fréchet"][""] == ((5, 7), (7.0, 7.0))


def test_what_is_not_finite_is_not_drawn(tmp_path, drawn):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": None}]
    panels, _, _ = drawn(make(tmp_path / "a", rows))
    assert panels == {"loss": {"a": ([1], [2.0])}}


def test_the_command_leaves_a_figure_a_table_and_a_json(runs, tmp_path):
    done = succeed(COMMAND, *runs, "--names", "T 100,T 20,T 1000", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "curves.md").read_text()
    header = "| run | timesteps | schedule | loss | Fréchet distance |"
    assert header in text and header in done.out  # lr is the same in all, out says nothing
    assert "| T 20 | 20 | cosine | 0.05 at 20 | 9 at 20 |" in text and "| - |" in text
    assert "toy classifier, N = 500, against toy:test (9 images); 4 images, 20 terms |" in text
    assert f"python -m evaluation.curves {runs[0]}" in text and "(curves.png)" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_other_runs_and_settings_are_kept_in_other_folders(runs):
    def of(*names, **how):
        return str(curves.folder_of(curves.Config(**how), names))

    found = [of("a", "b"), of("a", "c"), of("a", "b", over="timesteps"), of("a", "b", best=True)]
    assert len(set(found)) == 4 and found[0] == os.path.join("runs", "curves-a-b")
    long = [of(*(f"a-very-long-name-{i}" for i in range(12))), of(*["a-very-long-name-0"] * 12)]
    assert len(set(long)) == 2 and all(len(path) < 140 for path in long)


def test_runs_of_one_name_are_told_apart(tmp_path):
    rows = [{"step": 1, "loss": 2.0}]
    paths = [make(tmp_path / name / "run", rows) for name in ("a", "b")]
    assert curves.short_names(paths) == ["a/run", "b/run"]
    (paths[0] / "ckpt.pt").touch()
    assert curves.short_names([paths[0] / "ckpt.pt"]) == ["run"]


def test_what_is_no_run_or_has_nothing_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = make(tmp_path / "nothing", [{"step": 1, "lr": 0.1}], {"other.json": [1, "a"]})
    for argv, told in (
        ([], "name the folders of runs"),
        ([runs[0], tmp_path / "empty"], "is no run: it has no log.jsonl"),
        ([tmp_path / "missing"], "is no run"),
        ([nothing], "has nothing to draw"),
        ([runs[0], runs[0]], "the same run twice"),
        ([*runs, "--names", "a,b"], "expected 3 different names"),
        ([*runs, "--names", "a,b,a"], "expected 3 different names"),
        ([*runs, "--over", "timestep"], "has no such setting; did you mean timesteps?"),
    ):
        assert told in refused(COMMAND, *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_torn_or_of_others_is_passed_over(runs, drawn):
    one, two, _ = runs
    with open(one / "log.jsonl", "a") as f:
        f.write('7\n{"loss": 3}\n{"step": 30, "lo')
    (one / "curve.json").write_text('[{"step')
    (one / "nll.json").write_text('["no", "bits"]')
    kept = result(3.0, 500) | {"a": "runs/two/ckpt-000010.pt"}
    (two / "later.json").write_text(json.dumps(kept))  # not of the last step
    panels, _, said = drawn(one, two)
    assert by_first_word(panels)["loss"]["one"] == ([10, 20], [1 / 10, 1 / 20])
    assert "bits_per_dim" not in said["runs"]["one"]
    assert said["runs"]["two"]["frechet"]["steps"] == [10, 10, 20]


def test_scores_of_which_nothing_else_was_logged_say_so(tmp_path, drawn):
    make(tmp_path / "a|b", [{"step": 5, "loss": 1.0, "frechet": 2.0}])
    make(tmp_path / "c", [{"step": 5, "loss": 1.0}])
    drawn(tmp_path / "a|b", tmp_path / "c")
    *_, first, second = (tmp_path / "out" / "curves.md").read_text().split("\n\n!")[0].splitlines()
    assert first.startswith("| a\\|b |") and first.endswith("| N and reference were not logged |")
    assert second.endswith("| - | - |")


def test_curves_of_other_runs_replace_no_others(runs, drawn, tmp_path):
    first = drawn(*runs)[2]
    assert drawn(*runs[:2])[2]["runs"].keys() == {"one", "two"}
    assert json.loads((tmp_path / "out" / "curves.json").read_text()) == first
    assert drawn(*runs)[2] == first and len([*(tmp_path / "out").glob("curves*.json")]) == 2
