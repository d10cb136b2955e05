"""report.html: one file that shows a run, or compares several, and can be opened anywhere."""

from runtime import processes, report, seen, webpage
from runtime.commandline import BadInput
from runtime.files import read_log

import base64
import html
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from PIL import Image
from run_folders import names
from scipy.stats import binomtest
from toy_run import Alone, losses_of, make, train

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"meta", "link", "img", "br", "hr"}
EVIL = '<script>alert("1 & 2")</script>'


class Parsed(html.parser.HTMLParser):
    """A page: its elements in order, tables as rows of texts, and all text; tags must be closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.tables, self.said = [], [], [], []
        self.feed(Path(path).read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)
            if "table" in self.open and self.tables[-1]:
                self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())

    def of(self, tag, name):
        return [attrs[name] for kind, attrs in self.tags if kind == tag and name in attrs]


def check_alone(page, path):
    """Demand that a page asks for nothing, and that its links lead to files that are there."""
    assert not {"script", "iframe", "object", "video"} & {tag for tag, _ in page.tags}
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert all(source.startswith("data:image/") for source in sources)
    assert page.of("link", "href") == ["data:,"]
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    for place in page.of("a", "href"):
        assert not urlparse(place).scheme and not place.startswith("/")
        assert (path.parent / unquote(place)).exists(), place


def picture(path, width=60, height=40, kind="L", noise=True):
    generator = np.random.default_rng(width)
    shape = (height, width) if kind == "L" else (height, width, 3)
    pixels = generator.integers(0, 256, shape) if noise else np.zeros(shape)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


FIGURES = {
    "frechet": 2.345678,
    "frechet_interval": [2.1, 2.6],
    "inception_score": 8.1,
    "inception_score_std": 0.2,
    "kid": 0.01,
    "kid_error": 0.001,
    "precision": 0.75,
    "class_accuracy": 0.93,
    "n_generated": 1500,
    "n_reference": 10000,
    "features": "Inception features, pytorch-fid",
    "b": "cats & dogs:test",
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder of a run with scores, pictures and an odd name."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--classes", EVIL])
    return run_in(tmp_path / "a & b <i>")


def run_in(folder, **settings):
    def score(run):
        values = {
            "frechet": (run.step - 4) ** 2 + 1.5,
            "metric_n": 500,
            "metric_features": "noise classifier",
        }
        run.log(**values, metric_reference="noise:test", n_reference=20)
        if run.step == 5:
            run.save_grid(lambda: np.zeros((4, 4, 4, 1), np.uint8))

    run = train(make(folder, **settings), each=score)
    (run.folder / "eval.json").write_text(json.dumps(FIGURES))
    for name in ("samples.png", "forward.png", "reverse.png", "study.png"):
        picture(run.folder / name)
    run.disk.finish()
    return run.folder


# ----------------------------------------------------------------------------------- one run


def test_a_run_leaves_a_page_that_needs_nothing_else(made):
    path = made / "report.html"
    page = Parsed(path)
    check_alone(page, path)
    assert f"train.py --classes '{EVIL}'" in page.text and made.name in page.text
    assert {"ckpt.pt", "ckpt-previous.pt", "log.jsonl"} <= set(map(unquote, page.of("a", "href")))
    assert f"torch {__import__('torch').__version__}" in page.text and "1 process" in page.text
    assert "noise: 20 images 1x4x4, 3 classes; 0.00 M parameters" in page.text
    inside = {base64.b64decode(source.split(",")[1]) for source in page.of("img", "src")}
    shown = ["samples.png", "forward.png", "reverse.png", "study.png", "samples-000005.png"]
    assert inside == {(made / name).read_bytes() for name in shown}


def test_every_number_of_the_log_is_in_it(made):
    (table,) = [t for t in Parsed(made / "report.html").tables if t[0][0] == "step"]
    rows = read_log(made / "log.jsonl")
    assert len(rows) == 20 == len(table) - 1
    for row, cells in zip(rows, table[1:], strict=True):
        told = dict(zip(table[0], cells, strict=True))
        assert {name for name, text in told.items() if text} == row.keys()
        for name, value in row.items():
            same = told[name] == value if isinstance(value, str) else None
            assert same or float(told[name]) == pytest.approx(value, rel=1e-5)


def test_settings_that_are_not_as_by_default_come_first(made):
    page = Parsed(made / "report.html")
    own = next(dict(t) for t in page.tables if ["batch_size", "8"] in t)
    rest = next(dict(t) for t in page.tables if ["clip_grad", "1.0"] in t)
    few = {"steps": "10", "warmup": "3", "log_every": "1", "save_every": "3"}
    assert own == {"out": str(made), "batch_size": "8", **few} and not own.keys() & rest.keys()
    assert rest["classes"] == "–" and rest["flip"] == "no" and rest["ema"] == "0.998"
    config = (made / "config.yaml").read_text()
    assert config.index("warmup") < config.index("by default") < config.index("clip_grad")


def test_scores_have_their_interval_and_n(made):
    page = Parsed(made / "report.html")
    last, lowest, evaluated = (t[1:] for t in page.tables if t[0][0] == "score")
    assert last == [["Fréchet distance", "37.5", "", "500"]]
    assert lowest == [["Fréchet distance", "1.5", "", "500"]] and "lowest, step 4" in page.text
    rows = {row[0]: row[1:] for row in evaluated}
    assert rows["Fréchet distance (FID)"] == ["2.346", "2.1 to 2.6", "1,500"]
    assert rows["inception score"] == ["8.1", "± 0.2 between parts", "1,500"]
    assert rows["kernel distance"] == ["0.01", "0.00804 to 0.01196", "1,500"]
    ends = binomtest(1395, 1500).proportion_ci(method="wilson")
    assert rows["class accuracy"][1] == f"{ends.low:.4g} to {ends.high:.4g}"
    assert "against cats & dogs:test (10,000 images); Inception features" in page.text
    assert "against noise:test (20 images); noise classifier" in page.text


def test_a_curve_lies_where_its_numbers_are():
    """On a log axis 10 is in the middle between 1 and 100; what is not finite is left out."""
    svg = str(webpage.chart("loss", {"a": [(0, 1.0), (10, 10.0), (20, math.nan), (40, 100.0)]}))
    (line,) = re.findall(r'<polyline points="([^"]*)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in line.split())
    assert x1 - x0 == pytest.approx((x2 - x0) / 4, abs=0.2) and x0 < x2
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2) and y0 > y2 and "log axis" in svg
    straight = str(webpage.chart("lr", {"a": [(0, 1.0), (10, 10.0), (40, 100.0)]}, linear=True))
    (line,) = re.findall(r'<polyline points="([^"]*)"', straight)
    (_, y0), (_, y1), (_, y2) = (map(float, p.split(",")) for p in line.split())
    assert (y0 - y1) / (y0 - y2) == pytest.approx(9 / 99, abs=0.01)
    same = str(webpage.chart("same", {"a": [(1, 1.0), (2, 1.0 + 1e-12)]}))
    labels = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', same)
    assert len(labels) == len(set(labels)) > 1
    flat = {"one": [(5, 2.0)], "same": [(1, 0.0), (2, 0.0)], "none": [(1, math.inf)]}
    assert str(webpage.chart("flat", flat)).count("<polyline") == 2
    assert webpage.chart("empty", {"none": []}) == ""


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7.5), (1e-9, 2e-9), (50, 2500), (1e5, 1e5 + 1)])
def test_ticks_are_few_round_and_inside(low, high):
    found = webpage.ticks(low, high, False)
    assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert np.allclose(np.diff(found), found[1] - found[0], rtol=1e-6)
    assert f"{found[1] - found[0]:.0e}"[0] in "125"
    if low > 0:
        logs = webpage.ticks(low, high * 1000, True)
        assert 2 <= len(logs) <= 9 and {f"{v:.0e}"[0] for v in logs} <= set("1235")


def test_damaged_files_do_not_end_it(made, capsys):
    """A torn picture, log, config and score: what can be read is shown, and the page says which."""
    torn = made / "samples.png"
    torn.write_bytes(torn.read_bytes()[:300])
    (made / "forward.png").write_text("no picture")
    (made / "eval.json").write_text('{"frechet": 1')
    with open(made / "log.jsonl", "a") as f:
        f.write('[1]\n{"step": "x"}\n{"step": 11, "loss": NaN, "more": [1]}\n{"st')
    (made / "config.yaml").write_text("# a command\nsteps: [")
    report.refresh(made)
    page = Parsed(made / "report.html")
    assert page.text.count("cannot be read") == 3 and capsys.readouterr().err == ""
    assert len(page.of("img", "src")) == 3 and "11" in [row[0] for row in page.tables[-1]]


def test_its_size_is_bounded(made, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)
    Image.fromarray(noise).save(made / "study.png")  # 4.3 MB
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(made / "huge.png")
    page = Parsed((report.refresh(made), made / "report.html")[1])
    assert "scaled down from 1600 x 900, 4.3 MB" in page.text and "9000 x 9000" in page.text
    assert len(page.of("img", "src")) == 5
    monkeypatch.setattr(webpage, "MOST", 20_000)
    report.refresh(made)
    page = Parsed(made / "report.html")
    assert page.text.count("left out: the page would be too large") == 1
    assert sum(map(len, page.of("img", "src"))) < 20_000
    rows = "".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 5001))
    (made / "log.jsonl").write_text(rows)
    report.refresh(made)
    page, text = Parsed(made / "report.html"), (made / "report.html").read_text()
    assert "log.jsonl, 400 of 5000 rows" in page.text and len(text) < 150_000
    steps = [row[0] for row in page.tables[-1][1:]]
    assert len(steps) == 400 and steps[0] == "1" and steps[-1] == "5000"


def test_no_training_fails_by_it(made, monkeypatch, capsys):
    """A bug keeps its traceback, a full disk takes a line."""
    monkeypatch.setattr(report, "footer", lambda: 1 / 0)
    before = (made / "report.html").read_bytes()
    report.refresh(made)
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "footer" in said and "note: a bug" in said

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_run", full)
    report.refresh(made)
    said = capsys.readouterr().err
    assert said == f"note: {made / 'report.html'} was not written (No space left on device)\n"
    assert (made / "report.html").read_bytes() == before


def test_only_the_first_process_writes_it(made):
    (made / "report.html").unlink()
    run = make(made, world=Alone(rank=1, size=2))
    run.disk.report()
    run.disk.finish()
    assert not run.world.ends and "report.html" not in names(made)
    make(made).disk.finish()
    assert "report.html" in names(made)


def test_it_says_why_a_run_stopped_until_that_goes_on(tmp_path):
    run = make(tmp_path, save_every=3)
    with pytest.raises(BadInput):
        for step in run.steps():
            for part in run.parts(step):
                losses, level = losses_of(run, part)
                run.backward(losses * (math.nan if step == 4 else 1), level)
            run.descend()
    said = "stopped: the loss is not finite at step 4; the last good checkpoint is"
    assert said in Parsed(tmp_path / "report.html").text
    train(make(tmp_path, save_every=3)).disk.finish()
    page = Parsed(tmp_path / "report.html")
    assert "stopped:" not in page.text and "10 of 10 steps" in page.text


def test_commands_that_add_to_a_run_write_it_anew(made, tmp_path):
    """Without --out: they write to the folder of the checkpoint."""
    (made / "report.html").unlink()
    other = tmp_path / "other"
    other.mkdir()

    def draw(cfg, world):
        (made / "nll.json").write_text(json.dumps({"bits_per_dim": 1.25, "images": 16}))

    settings = {"gpus": 0, "sample": str(made / "ckpt.pt")}
    processes.launch(draw, types.SimpleNamespace(**settings, out=str(other)))
    assert not (made / "report.html").exists() and not names(other)
    processes.launch(draw, types.SimpleNamespace(**settings, out=""))
    page = Parsed(made / "report.html")
    assert [["bits per dimension", "1.25", "", "16"]] in [t[1:] for t in page.tables]


# ------------------------------------------------------------------------------- several runs


@pytest.fixture
def two(made):
    """Two runs."""
    return made, run_in(made.with_name("other"), lr=0.5, steps=6)


def compared(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()
    return Path(capsys.readouterr().out.strip().removeprefix("report: "))


def test_runs_are_compared(two, monkeypatch, capsys):
    path = compared(*two, monkeypatch=monkeypatch, capsys=capsys)
    assert path.parent == two[0].parent and re.match(r"report-a-b-i-other-[0-9a-f]{6}", path.stem)
    page = Parsed(path)
    check_alone(page, path)
    settings = {name: values for name, *values in page.tables[-1]}
    assert settings.pop("setting") == ["a & b <i>", "other"]
    assert settings == {"steps": ["10", "6"], "lr": ["0.001", "0.5"]}
    rows = [row for row in page.tables[0] if row[0] == "Fréchet distance (FID)"]
    assert [row[1:5] for row in rows] == [
        [n, "2.346", "2.1 to 2.6", "1,500"] for n in ("a & b <i>", "other")
    ]
    assert len(page.of("img", "src")) == 2  # the last grids
    assert f"--classes '{EVIL}'" in page.text
    assert path == compared(*two, monkeypatch=monkeypatch, capsys=capsys)  # its own page, again


def test_a_page_replaces_nobody_s_file(two, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    for many in (two[:1], two):
        with pytest.raises(BadInput, match=f"--out {mine} is there already, and no report"):
            compared(*many, "--out", mine, monkeypatch=monkeypatch, capsys=capsys)
    assert mine.read_text() == "<p>mine</p>"
    for many in (two[:1], two, two[:1]):
        out = tmp_path / "deep" / "page.html"
        assert out == compared(*many, "--out", out, monkeypatch=monkeypatch, capsys=capsys)
        check_alone(Parsed(out), out)
    known = compared(two[0] / "ckpt.pt", monkeypatch=monkeypatch, capsys=capsys)
    assert known == two[0] / "report.html"


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "no run is named"),
        (["missing"], "missing: there is no such folder"),
        (["empty"], "empty: it is no run"),
        (["RUN", "RUN"], "a run is named twice"),
    ],
)
def test_what_is_no_run_is_refused(arguments, why, made, monkeypatch, capsys):
    monkeypatch.chdir(made.parent)
    Path("empty").mkdir()
    given = [made if word == "RUN" else word for word in arguments]
    with pytest.raises(BadInput, match=why):
        compared(*given, monkeypatch=monkeypatch, capsys=capsys)
    assert names(made.parent) == [made.name, "empty"]


def test_names_of_runs_are_as_short_as_they_can_be():
    assert seen.names_of(["x/a", "x/b"]) == ["a", "b"]
    assert seen.names_of(["x/a/run", "x/b/run", "y/b"]) == ["a/run", "b/run", "y/b"]


# ---------------------------------------------------------------------------------- a browser


def opened(path, folder):
    """(the page as Chromium has it, lines of its console), from the file system."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    quiet += "--disable-background-networking --disable-component-update --enable-logging=stderr"
    command = [BROWSER, *quiet.split(), "--v=0", f"--user-data-dir={folder}", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is here")
def test_a_browser_has_nothing_to_say_about_the_pages(two, tmp_path, monkeypatch, capsys):
    both = compared(*two, monkeypatch=monkeypatch, capsys=capsys)
    for i, path in enumerate((two[0] / "report.html", both)):
        seen, told = opened(path, tmp_path / f"browser{i}")
        assert not told and "Curves" in seen and "<polyline" in seen
    bad = tmp_path / "bad.html"  # what asks for more is refused by the page itself
    bad.write_text(both.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/a.png">'))
    seen, told = opened(bad, tmp_path / "browser2")
    assert told and "Content Security Policy" in told[0]
