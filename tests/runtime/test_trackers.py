"""--tensorboard and --wandb: what a run logs goes there, too, and one that goes on is the same."""

from runtime import commandline, trackers
from runtime.commandline import BadInput, RunConfig
from runtime.files import read_log

import json
import math
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from run_folders import names
from toy_run import Alone, make, train

import ddpm_pixel

GRID = np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1)
SILENT = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def grid(run):
    """What a chapter does at --sample-every 4."""
    if run.due(4):
        run.save_grid(lambda: GRID, columns=2)


def finished(folder, stop=None, **settings):
    """A run, with a grid at its end unless it stops; nothing is closed where it does."""
    run = train(make(folder, **settings), stop=stop, each=grid)
    if stop is None:
        Image.fromarray(np.full((6, 6), 99, np.uint8)).save(run.folder / "samples.png")
        run.disk.finish()
    return run


# ----------------------------------------------------------------------- before any work begins


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_said_before_data_are_prepared(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ddpm_pixel.py", "--gpus", "0", f"--{name}"])
    with pytest.raises(BadInput, match=f"--{name} needs its package: pip install {name}"):
        ddpm_pixel.main()
    assert not names(tmp_path)
    commandline.check_run(RunConfig(gpus=0, dry_run=True, **{name: True}))  # tells nobody
    monkeypatch.setenv("RANK", "1")
    commandline.check_run(RunConfig(gpus=0, **{name: True}))  # the first process says it


class Failure(Exception):
    """What wandb raises."""


class Fake:
    """The package, which keeps what it is told: of each run its facts and what it logs."""

    Error = Failure

    def __init__(self, mode="offline", known=False):
        self.runs, self.known = [], known
        settings = types.SimpleNamespace(mode=mode)
        self.setup = lambda: types.SimpleNamespace(settings=settings)

    def login(self):
        if not self.known:
            raise Failure("No API key.\nUse `wandb login`.")

    def init(self, **about):
        kept = types.SimpleNamespace(about=about, rows=[], metrics=[], closed=False)
        kept.log = kept.rows.append
        kept.define_metric = lambda *names, **how: kept.metrics.append((names, how))
        kept.finish = lambda: setattr(kept, "closed", True)
        self.runs.append(kept)
        return kept

    def Image(self, path):
        return "image", np.asarray(Image.open(path)).tolist()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Fake())
    return sys.modules["wandb"]


def test_nobody_logged_in_is_said_before_any_work(monkeypatch):
    cfg = RunConfig(gpus=0, wandb=True)
    for mode, known, good in (("online", False, False), ("online", True, True), ("offline", 0, 1)):
        monkeypatch.setitem(sys.modules, "wandb", Fake(mode, known))
        if good:
            commandline.check_run(cfg)
        else:
            said = "--wandb: No API key. Use `wandb login`; or set WANDB_MODE=offline"
            with pytest.raises(BadInput, match=said) as told:
                commandline.check_run(cfg)
            assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------- what it is told


def test_wandb_is_told_all_that_is_logged(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = finished(tmp_path / "runs" / "mine", wandb=True)
    (kept,) = fake.runs
    rows = [row for row in kept.rows if "samples" not in row]
    assert rows == read_log(run.log_path) and len(rows) == 10
    grids = [(row["step"], row["samples"][0]) for row in kept.rows if "samples" in row]
    assert grids == [(4, "image"), (8, "image"), (10, "image")] and kept.closed
    assert kept.rows[-1]["samples"][1] == [[99] * 6] * 6
    about = kept.about
    assert about["name"] == "mine" and about["project"] == "diffusion-book"
    assert about["config"]["batch_size"] == 8 and about["resume"] == "allow"
    assert kept.metrics == [(("*",), {"step_metric": "step"})]


def test_a_run_that_goes_on_is_the_same_one_there(fake, tmp_path):
    finished(tmp_path, wandb=True, stop=5)  # its checkpoint is of step 3
    finished(tmp_path, wandb=True)
    finished(tmp_path, wandb=True, resume="never")
    first, second, third = fake.runs
    assert first.about["id"] == second.about["id"] != third.about["id"]
    assert [row["step"] for row in second.rows][0] == 4 and not first.closed
    assert [row["step"] for row in third.rows][0] == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Failure("no server")])
@pytest.mark.parametrize("when", ["log", "Image", "finish"])
def test_a_tracker_that_fails_ends_no_training(when, error, fake, tmp_path, monkeypatch, capsys):
    """At a row, a grid, its end; the other tracker is told all, and the report is whole."""
    board = types.SimpleNamespace(flag="--tensorboard", told=[])
    for name in ("log", "show", "close"):
        setattr(board, name, lambda *about, name=name: board.told.append((name, *about[:1])))
    monkeypatch.setattr(trackers, "TensorBoard", lambda *about: board)

    def fails(*about):
        raise error

    run = make(tmp_path, wandb=True, tensorboard=True)
    _, told = run.disk.trackers
    monkeypatch.setattr(*((fake, when) if when == "Image" else (told.run, when)), fails)
    train(run, each=grid)
    Image.fromarray(np.full((6, 6), 99, np.uint8)).save(run.folder / "samples.png")
    run.disk.finish()
    rows = [("log", step) for step in range(1, 11)]
    assert [row for row in board.told if row[0] == "log"] == rows and board.told[-1] == ("close",)
    assert [row for row in board.told if row[0] == "show"] == [("show", s) for s in (4, 8, 10)]
    assert "</html>" in (tmp_path / "report.html").read_text() and (tmp_path / "ckpt.pt").is_file()
    said = capsys.readouterr().err
    why = "No space left on device" if isinstance(error, OSError) else "no server"
    line = f"note: --wandb failed ({why}) and is told nothing more; all else goes on\n"
    assert said.count(line) == 1 and ("Traceback" in said) is isinstance(error, Failure)


def test_only_the_first_process_tells(fake, tmp_path):
    make(tmp_path, world=Alone(rank=1, size=2), wandb=True)
    assert not fake.runs and not names(tmp_path)


def test_what_is_no_finite_number_is_not_told(fake, tmp_path):
    run = make(tmp_path, wandb=True)
    run.log(loss=1.5, frechet=None, bad=math.nan, metric_features="words", metric_n=5)
    assert fake.runs[0].rows == [{"step": 0, "loss": 1.5, "metric_n": 5}]


def test_a_run_that_cannot_begin_there_says_so(fake, tmp_path, monkeypatch):
    def refused(**about):
        raise Failure("no such\nproject")

    monkeypatch.setattr(fake, "init", refused)
    with pytest.raises(BadInput, match="--wandb: no such project"):
        make(tmp_path, wandb=True)


# ------------------------------------------------------------------------------ the real packages


def test_tensorboard_files_hold_it_once(tmp_path):
    """Also after a kill: what was logged beyond the checkpoint is logged again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished(tmp_path, tensorboard=True, stop=5).disk.trackers[0].close()
    run = finished(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = read_log(run.log_path)
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows] and len(rows) == 10
    images = events.Images("samples")
    assert [(i.step, i.width, i.height) for i in images] == [(4, 14, 14), (8, 14, 14), (10, 6, 6)]


def test_a_run_that_starts_over_takes_the_place_of_the_one_before(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished(tmp_path, tensorboard=True, lr=0.5)
    run = finished(tmp_path, tensorboard=True, resume="never")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    rows = [(row["step"], pytest.approx(row["loss"])) for row in read_log(run.log_path)]
    assert [(event.step, event.value) for event in events] == rows


def records(path):
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB behind a header of 7."""
    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        part, at = part + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


def test_wandb_keeps_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in SILENT.items():
        monkeypatch.setenv(name, value)
    run = finished(tmp_path / "run", wandb=True)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    found, ids = [], set()
    for raw in records(path):
        record = Record.FromString(raw)
        items = record.history.item
        if items:
            found.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
        ids |= {record.run.run_id} - {""}
    logged = [row for row in found if "loss" in row]
    assert [(row["step"], row["loss"]) for row in logged] == [
        (row["step"], row["loss"]) for row in read_log(run.log_path)
    ]
    grids = [row for row in found if "samples" in row]
    assert [row["step"] for row in grids] == [4, 8, 10]
    assert len(list(path.parent.glob("files/media/images/*.png"))) == 3
    assert ids == {(run.folder / "wandb-id.txt").read_text()}


def test_two_runs_that_are_open_are_two(tmp_path, monkeypatch):
    """As an autoencoder's, and that of its latents."""
    pytest.importorskip("wandb")
    for name, value in SILENT.items():
        monkeypatch.setenv(name, value)
    first, second = (make(tmp_path / name, wandb=True) for name in ("autoencoder", "latents"))
    assert first.disk.trackers[0].run.id != second.disk.trackers[0].run.id
    for run in (first, second):
        run.disk.finish()
        assert len(list(run.folder.glob("wandb/offline-run-*"))) == 1


def test_asked_says_which():
    assert trackers.asked(RunConfig(gpus=0)) == set()
    both = RunConfig(gpus=0, wandb=True, tensorboard=True)
    assert trackers.asked(both) == {"wandb", "tensorboard"}
