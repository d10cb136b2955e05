"""bench/busy.py: each way to wait gets its own turns, and the table says what they were."""

from runtime.commandline import BadInput

import importlib
import io
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def bench():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.busy")
    finally:
        sys.path[:] = path


def test_a_way_is_its_variables_and_what_is_imported_first(bench):
    ways = bench.ways_to_wait([7, 900])
    assert ways == {
        "default": ({}, "torch"),
        "OMP_WAIT_POLICY=PASSIVE": ({"OMP_WAIT_POLICY": "PASSIVE"}, "torch"),
        "GOMP_SPINCOUNT=7": ({"GOMP_SPINCOUNT": "7"}, "torch"),
        "GOMP_SPINCOUNT=900": ({"GOMP_SPINCOUNT": "900"}, "torch"),
        "as our scripts": ({}, "runtime"),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP and affinity are Linux's")
def test_workers_train_with_the_threads_that_they_name(bench, monkeypatch, capfd):
    """Two real processes; what this process's own environment says is not theirs."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    every = bench.ways_to_wait([77])
    ways = {name: every[name] for name in ("GOMP_SPINCOUNT=77", "as our scripts")}
    processors = os.sched_getaffinity(0)
    threads = min(2, len(processors))
    found = bench.measure(ways, [0, 1], rounds=2, seconds=0.01, threads=threads)
    assert os.sched_getaffinity(0) == processors
    assert found.keys() == ways.keys()
    for rates in found.values():
        assert rates.keys() == {0, 1}
        assert all(len(each) == 2 and min(each) > 0 for each in rates.values())
    seen = [line for line in capfd.readouterr().err.splitlines() if "GOMP_SPINCOUNT" in line]
    for variable in bench.VARIABLES:
        monkeypatch.delenv(variable)
    program = "import runtime, os; print(os.environ['GOMP_SPINCOUNT'])"
    ours = subprocess.check_output([sys.executable, "-c", program], cwd=bench.REPO)
    assert [int(line.split("'")[1]) for line in seen] == [77, int(ours)]


def test_a_worker_counts_steps_until_the_time_is_over(bench, monkeypatch, capsys):
    clock = [0.0]

    def step():
        clock[0] += 0.4

    monkeypatch.setattr(bench, "training_step", lambda: step)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1.0\n0.1\n"))
    bench.work(1)
    ready, *turns = capsys.readouterr().out.splitlines()
    assert ready == "ready"
    assert [[round(float(x), 6) for x in turn.split()] for turn in turns] == [[3, 1.2], [1, 0.4]]


def test_a_worker_that_fails_is_an_error(bench):
    with (
        pytest.raises(RuntimeError, match="the training step failed"),
        bench.worker({}, "no_such_module", 1),
    ):
        pass


def test_busy_processes_run_only_within(bench, monkeypatch):
    started = []

    def start(command):
        started.append(subprocess_popen(command))
        return started[-1]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", start)
    with bench.busy(2):
        assert len(started) == 2 and all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)


RATES = {
    "default": {0: [10, 12, 11], 2: [0.1, 0.3, 0.2]},
    "GOMP_SPINCOUNT=7": {0: [12, 12, 12], 2: [4, 4, 4]},
    "as our scripts": {0: [12, 11, 13], 2: [2, 3, 4]},
}


def test_the_table_has_medians(bench):
    heading, *rows = bench.table(RATES, [0, 2])
    assert " ".join(heading.split()) == "steps a second beside 0 busy 2 busy"
    assert [row.rsplit(maxsplit=2) for row in rows] == [
        ["default", "11.00", "0.20"],
        ["GOMP_SPINCOUNT=7", "12.00", "4.00"],
        ["as our scripts", "12.00", "3.00"],
    ]


def test_what_is_promised_is_compared_round_by_round(bench):
    assert bench.times_as_fast(RATES, "default", 2) == pytest.approx(20)  # of 20, 10, 20
    lines, kept = bench.verdict(RATES, [0, 2])
    assert kept and len(lines) == 2
    assert "beside 0: 1.000 of the best, GOMP_SPINCOUNT=7" in lines[0] and "yes" in lines[0]
    assert "beside 2: 20.0 times the default" in lines[1] and "yes" in lines[1]
    slow = RATES | {"as our scripts": {0: [11, 11, 11], 2: [1, 1, 1]}}
    lines, kept = bench.verdict(slow, [0, 2])
    assert not kept and all(line.endswith("NO") for line in lines)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rounds", "0"], "--rounds must be greater than 0, got 0"),
        (["--seconds", "-1"], "--seconds must be greater than 0, got -1.0"),
        (["--busy", "0", "-2"], "--busy must be at least 0, got -2"),
        (["--spins", "-5"], "--spins must be at least 0, got -5"),
    ],
)
def test_bad_input_is_named(bench, flags, named):
    with pytest.raises(BadInput, match=named):
        bench.parse(flags)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_more_threads_than_processors_are_refused(bench):
    many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(BadInput, match=f"--threads {many}: there are"), bench.few_processors(many):
        pass
