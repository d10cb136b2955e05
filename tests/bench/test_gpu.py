"""bench/gpu.py: rehearsed on a CPU; its driver with stages of a second; its tables and goals."""

from runtime.commandline import BadInput

import importlib
import json
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import launching
import pytest
import torch

from bench import gpu_rows, wheels
from bench.gpu_goals import goals
from bench.gpu_rows import Job, append, latest, read
from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("the program needs triton, not interpreting", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu():
    """The module; as a program it puts the project's folder in place of its own on the path."""
    path, sys.path[:] = sys.path.copy(), ["replaced", *sys.path]
    try:
        yield importlib.import_module("bench.gpu")
    finally:
        sys.path[:] = path


@pytest.fixture
def quiet(gpu, monkeypatch):
    """Nobody's signals are handled by what main() settles."""
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)


# -------------------------------------------------------------------------------- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(gpu, tmp_path_factory):
    """(exit code, OUT) of the whole program, with small shapes.

    The command line of each stage is started by the tests' fork server: its imports, a dozen times
    three seconds, are then made once.
    """
    out = tmp_path_factory.mktemp("gpu") / "day"

    def run_stage(name, out, rehearse, limit):
        _, program, *flags = gpu.command_of(name, out, rehearse)
        assert program == str(gpu.REPO / "bench" / "gpu.py")
        done = launching.run("bench.gpu", *flags, limit=10 * limit)
        with open(out / "log.txt", "a") as log:
            log.write(done.out + done.err)
        return "" if done.code == 0 else f"ended with exit code {done.code}"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(gpu, "run_stage", run_stage)
        patch.setattr(gpu.signal, "signal", lambda *_: None)
        gpu.main(["--rehearse", "--out", str(out)])
    return ended.value.code, out


@pytest.mark.slow  # a minute, for all that use the rehearsal
def test_every_stage_comes_to_its_end(gpu, rehearsal):
    code, out = rehearsal
    rows = read(out)
    log = (out / "log.txt").read_text()[-3000:]
    assert gpu_rows.failures(rows, gpu.STAGES) == [], log
    assert code == 0, log
    for name in gpu.STAGES:
        assert gpu_rows.is_done(rows, name) and latest(rows, name), name
    assert json.loads((out / "gpu.json").read_text())["rows"] == rows
    text = (out / "gpu.md").read_text()
    assert "A rehearsal on a CPU: no number here means anything." in text
    assert all(f"## {name}, " in text for name in gpu.STAGES if name != "compiled")


@pytest.mark.slow  # a minute, for all that use the rehearsal
def test_each_way_to_compute_has_its_number(rehearsal):
    rows = read(rehearsal[1])
    kernels = {of for of, row in latest(rows, "kernels").items() if row.get("us", 0) > 0}
    kernels |= set(latest(rows, "compiled"))
    for operation, ways in {
        "group_norm": {"here", "eager", "autocast", "compiled"},
        "attention": {"here", "eager", "compiled"},
        "sampling": {"here", "eager", "compiled"},
    }.items():
        assert {of[3] for of in kernels if of[0] == operation} >= ways
    for stage in ("unet", "latent", "dit"):
        found = {of: row["images_s"] for of, row in latest(rows, stage).items() if "ms" in row}
        for what in ("forward", "step"):
            for side in ("here", "diffusers"):
                ways = {side, f"{side}, compiled", f"{side}, one graph"}
                assert {of[1] for of in found if of[0] == what} >= ways
        assert min(found.values()) > 0
    same = latest(rows, "sampling")
    assert same["sample 17", "alone on the device, fp32"]["apart"] == 0  # the device is the CPU
    assert same["sample 17", "in a batch of 32, fp32"]["right"]
    assert len(latest(rows, "verify")) > 60
    traces = sorted(path.name for path in rehearsal[1].glob("trace-*"))
    assert traces == ["trace-sampling.json.gz", "trace-training-step.json.gz"]
    assert len(list(rehearsal[1].iterdir())) <= 8  # as many as some machines give back


@pytest.mark.slow  # a minute, for all that use the rehearsal
def test_started_again_nothing_is_run_again(gpu, quiet, rehearsal, capsys):
    before = read(rehearsal[1])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", "--out", str(rehearsal[1])])
    assert ended.value.code == 0 and read(rehearsal[1]) == before
    printed = capsys.readouterr().out
    assert printed.count("finished before") == len(gpu.STAGES)


def test_without_diffusers_ours_is_timed_alone_and_a_row_says_so(tmp_path, monkeypatch):
    from bench import gpu_networks

    monkeypatch.setitem(sys.modules, "diffusers", None)
    gpu_networks.dit(Job("dit", tmp_path, rehearse=True))
    found = latest(read(tmp_path), "dit")
    assert "diffusers, which this compares with" in found["diffusers", "all"]["skipped"]
    assert {of[0] for of in found} == {"diffusers", "forward", "step"}
    assert {of[1] for of in found} >= {"here", "here, graph", "here, compiled", "here, one graph"}
    assert all(row["ms"] > 0 for of, row in found.items() if of[0] != "diffusers")


def test_where_diffusers_does_not_load_ours_is_timed_nevertheless(tmp_path, monkeypatch):
    from bench import gpu_networks

    def refused():
        raise ImportError("huggingface-hub>=0.34.0,<2.0 is required")

    monkeypatch.setattr(gpu_networks.instruments, "load_diffusers", refused)
    monkeypatch.setattr(gpu_networks, "time_sides", lambda job, sides, n: job.say(*sides[0][:1]))
    gpu_networks.unet(Job("unet", tmp_path, rehearse=True))
    found = latest(read(tmp_path), "unet")
    assert "ImportError: huggingface-hub" in found["diffusers", "all"]["skipped"]
    assert ("here",) in found


def test_a_network_without_its_graph_has_no_time(tmp_path, monkeypatch):
    from bench import gpu_networks

    monkeypatch.setattr(gpu_networks, "on_gpu", lambda: True)
    job, net = Job("unet", tmp_path), torch.nn.Linear(3, 3)
    for way in (gpu_networks.sampled(net), gpu_networks.recorded(Job("s", tmp_path, True), net)):
        with torch.no_grad(), job.row("step", "here, graph") as row:
            row["ms"] = way(torch.ones(2, 3)).sum().item()
        assert "no CUDA graph" in latest(read(tmp_path), "unet")["step", "here, graph"]["failed"]


# ------------------------------------------------------------------------------------ the kernels


def test_a_worker_that_cuda_has_left_does_not_silence_the_others(tmp_path, monkeypatch):
    from bench import gpu_kernels

    def verified(case, backward, device):
        if case.operation == "attention":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"right": True, "share": 0.5, "of": "result 0", "kernel": True}

    def workers():
        pools.append(ThreadPoolExecutor(1))
        return pools[-1]

    pools = []
    monkeypatch.setattr(gpu_kernels, "verified", verified)
    monkeypatch.setattr(gpu_kernels, "workers", workers)
    gpu_kernels.verify(Job("verify", tmp_path))
    found = latest(read(tmp_path), "verify")
    faults = sum("failed" in row for row in found.values())
    assert faults <= len(pools) <= faults + 1  # after each the others are asked in a new one
    for case in (*gpu_kernels.CASES, *gpu_kernels.MORE_CASES):
        row = found[case.operation, case.name, "forward"]
        assert ("failed" in row) == (case.operation == "attention") != ("right" in row)


# ----------------------------------------------------------------------------------- the driver


def test_a_stage_is_a_process_of_its_own(gpu, tmp_path):
    assert gpu.run_stage("facts", tmp_path, True, 100) == "", (tmp_path / "log.txt").read_text()
    assert latest(read(tmp_path), "facts")["copy",]["gb_s"] > 0


SAY = "import sys; sys.path.insert(0, '.'); from bench.gpu_rows import append; "
PROGRAMS = {
    "well": SAY + "append({out!r}, stage='well', of=['a'], ms=1.5)",
    "fails": SAY + "append({out!r}, stage='fails', of=['a'], ms=2.5); print('why'); sys.exit(3)",
    "hangs": "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
    "'import time; time.sleep(60)  # {out}']); time.sleep(60)",
    "last": SAY + "append({out!r}, stage='last', of=['a'], ms=3.5)",
}


@pytest.fixture
def few(gpu, monkeypatch):
    """Stages of a second in place of the real ones."""
    stages = {name: gpu.Stage("", 20, ("what",)) for name in PROGRAMS}
    stages["hangs"] = gpu.Stage("", 1, ("what",))
    monkeypatch.setattr(gpu, "STAGES", stages)

    def command(name, out, rehearse):
        return [sys.executable, "-c", PROGRAMS[name].format(out=str(out))]

    monkeypatch.setattr(gpu, "command_of", command)
    return stages


def running(mark):
    """Processes whose command line has `mark`, other than this one."""
    lines = subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines()
    return [line for line in lines if mark in line and "ps -eo" not in line]


def test_what_fails_or_hangs_leaves_its_row_and_the_others_run(gpu, few, tmp_path, capfd):
    gpu.run_stages(list(few), tmp_path, True, 5)
    rows = read(tmp_path)
    ended = {row["stage"]: row for row in rows if "seconds" in row}
    assert list(ended) == list(few)
    assert ended["well"]["done"] and ended["last"]["done"]
    assert ended["fails"]["ended"] == "ended with exit code 3"
    assert ended["hangs"]["ended"] == "out of time after 1 s"
    assert latest(rows, "fails")[("a",)]["ms"] == 2.5  # what it knew by then is kept
    assert running(str(tmp_path)) == []  # nor does what it had started go on
    text = (tmp_path / "gpu.md").read_text()
    assert "- fails: ended with exit code 3" in text and "- hangs: out of time" in text
    out, err = capfd.readouterr()
    assert "fails: ended with exit code 3, " in out and "why" in err


def test_finished_stages_are_skipped_and_the_others_tried_again(gpu, few, tmp_path, monkeypatch):
    names = ["well", "fails", "last"]
    gpu.run_stages(names, tmp_path, True, 5)
    started = []
    monkeypatch.setattr(gpu, "run_stage", lambda name, *_: started.append(name) or "")
    gpu.run_stages(names, tmp_path, True, 5)
    assert started == ["fails"]
    assert all(gpu_rows.is_done(read(tmp_path), name) for name in names)
    assert gpu_rows.failures(read(tmp_path), names) == []


def test_without_time_no_stage_begins(gpu, few, tmp_path, capsys):
    gpu.run_stages(["well"], tmp_path, True, gpu.ENOUGH / 61)
    assert read(tmp_path) == [] and "no time is left" in capsys.readouterr().out


def test_a_stage_gets_no_more_than_the_time_that_is_left(gpu, few, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(gpu, "run_stage", lambda *given: limits.append(given[3]) or "")
    few["well"] = gpu.Stage("", 1000, ("what",))
    gpu.run_stages(["well"], tmp_path, True, 0.5)
    assert 29 < limits[0] <= 30


def test_bad_input_is_one_line(gpu, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="--minutes must be greater than 0, got 0"):
        gpu.main(["--out", str(tmp_path), "--minutes", "0"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadInput, match="no GPU here; type --rehearse"):
        gpu.main(["--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------- the rows


def test_a_row_is_on_the_disk_at_once_and_a_torn_one_does_no_harm(tmp_path):
    job = Job("stage", tmp_path)
    job.say("a", 1, ms=2.0)
    with open(tmp_path / gpu_rows.FILE, "a") as file:
        file.write('{"stage": "sta')  # killed while it wrote
    job.say("b", ms=3.0)
    job.say("a", 1, ms=4.0)
    found = latest(read(tmp_path), "stage")
    assert {of: row["ms"] for of, row in found.items()} == {("a", "1"): 4.0, ("b",): 3.0}


def test_an_exception_is_said_in_place_of_numbers(tmp_path, capsys):
    job = Job("stage", tmp_path)
    with job.row("a") as row:
        row["ms"] = 1.0
        raise ValueError("no\nsuch thing")
    with job.row("b") as row:
        row["ms"] = 1.0
    assert latest(read(tmp_path), "stage")["a",]["failed"] == "ValueError: no such thing"
    assert job.known("b") and not job.known("a") and not job.known("c")
    with pytest.raises(RuntimeError), job.row("c"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert "illegal" in latest(read(tmp_path), "stage")["c",]["failed"]


def test_tables_are_made_of_rows():
    found = {
        ("norm", "here"): {"stage": "s", "of": ["norm", "here"], "us": 10.0, "gb_s": 1234.5},
        ("norm", "eager"): {"us": 25.0},
        ("norm", "flash"): {"failed": "why"},
        ("softmax", "eager"): {"us": 3.0},
    }
    assert gpu_rows.pivoted(found, ["what"], "us") == [
        "| what | here, us | gb_s | eager | × | flash | × |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        "| norm | 10 | 1234 | 25 | 2.50 | failed |  |",
        "| softmax |  |  | 3 |  |  |  |",
    ]
    assert gpu_rows.narrow({("a", "b"): {"right": False}, ("c",): {"ms": 1 / 3}}, ["x", "y"]) == [
        "| x | y | right | ms |",
        "| --- | --: | --: | --: |",
        "| a | b | NO |  |",
        "| c |  |  | 0.3333 |",
    ]


def rows_of(**stages):
    """Rows: {stage: {words of a row, with / between: values}}."""
    return [
        {"stage": stage, "of": of.split("/"), **values}
        for stage, found in stages.items()
        for of, values in found.items()
    ]


def test_goals_say_whether_they_are_met():
    assert all(line.startswith("- not measured: ") for line in goals([]))
    shape = "128x256x16x16 bf16"
    rows = rows_of(
        verify={f"group_norm/{shape}/forward": {"right": True}},
        sanitize={"memcheck/ours": {"clean": True}, "memcheck/others'": {"found": "nothing"}},
        kernels={
            f"group_norm/{shape}/forward/here": {"us": 10.0, "copy_share": 0.85, "kernel": True},
            f"group_norm/{shape}/backward/here": {"us": 20.0, "copy_share": 0.6, "kernel": True},
            "attention/a/forward/here": {"us": 10.0, "kernel": True},
            "attention/a/forward/flash": {"us": 9.5},
            "attention/a/forward/cudnn": {"us": 12.0},
            "attention/none planned/forward/here": {"us": 99.0, "kernel": False},
            "attention/none planned/forward/cudnn": {"us": 9.0},
        },
        compiled={f"group_norm/{shape}/forward/compiled": {"us": 9.0}},
        unet={
            "step/here": {"ms": 20.0},
            "step/here, graph": {"ms": 15.0},
            "step/diffusers": {"ms": 30.0},
            "step/diffusers, compiled": {"ms": 14.0},
        },
        sampling={"update/of a DDIM step": {"launches": 1, "share": 0.004}},
        chapters={"edm": {"right": True}, "ddim --sample {edm}": {"right": False}},
    )
    assert verdicts(rows) == [*["so far"] * 3, "NO", "NO", "so far", "yes", "NO", "yes", "NO"]
    rows += [{"stage": name, "done": True} for name in ("verify", "sanitize", "kernels")]
    assert verdicts(rows) == [*["yes"] * 3, "NO", "NO", "yes", "yes", "NO", "yes", "NO"]
    assert goals(rows)[-1] == "- NO: every chapter runs; wrong: ddim --sample {edm}"
    text = "\n".join(goals(rows))
    assert "least 0.90, 128x256x16x16 bf16 forward" in text  # of torch.compile's 9 over our 10
    assert "here 1.50, here, graph 2.00" in text
    more = rows_of(verify={"attention/a/forward": {"right": False}})
    assert goals(rows + more)[0] == "- NO: every kernel is right; wrong: attention a forward"


def verdicts(rows):
    return [line.split(":")[0].removeprefix("- ") for line in goals(rows)]


def test_what_failed_is_not_met():
    rows = rows_of(
        verify={"a": {"right": True}, "b": {"failed": "why"}},
        sanitize={
            "memcheck/ours": {"clean": True},
            "racecheck/ours": {"clean": False},
            "racecheck/others'": {"failed": "why"},
        },
        kernels={
            "attention/a/forward/here": {"us": 1.0, "kernel": True},
            "attention/a/forward/flash": {"us": 9.0},
            "attention/b/forward/here": {"failed": "why"},
        },
    )
    rows += [{"stage": name, "done": True} for name in ("verify", "sanitize", "kernels")]
    assert goals(rows)[0] == "- NO: every kernel is right; wrong: b"
    told = "sanitizers find nothing in our kernels; not clean: racecheck ours, racecheck others'"
    assert goals(rows)[1] == f"- NO: {told}"
    assert goals(rows)[5].startswith("- so far: attention")


def test_steps_are_compared_with_what_is_theirs_at_best_and_ours_by_a_command():
    steps = {"here": 20.0, "here, one graph": 1.0, "diffusers": 40.0}
    rows = rows_of(unet={f"step/{way}": {"ms": ms} for way, ms in steps.items()})
    assert goals(rows)[6].endswith("1.3 times as fast as diffusers; here 2.00")
    rows += rows_of(unet={"step/diffusers, channels_last": {"ms": 25.0}})
    assert goals(rows)[6].startswith("- NO: ") and goals(rows)[6].endswith("here 1.25")


# ------------------------------------------------------------------------------------- the wheels


def wheel(folder, name, code):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", code)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")


def test_what_is_missing_comes_from_wheels_also_in_processes(tmp_path, repo):
    wheel(tmp_path / ".whl", "not_there_at_all", "number = 17")
    wheel(tmp_path / ".whl", "numpy", "raise SystemExit('the installed one is wanted')")
    assert [path.name for path in wheels.missing(tmp_path / ".whl")] == [
        "not_there_at_all-1.0-py3-none-any.whl"
    ]
    inner = "import not_there_at_all, numpy; print(not_there_at_all.number)"
    code = "import sys, subprocess; from bench import wheels; wheels.unpack(sys.argv[1]); "
    code += f"subprocess.run([sys.executable, '-c', {inner!r}], check=True); {inner}"
    line = [sys.executable, "-c", code, str(tmp_path / ".whl")]
    assert subprocess.check_output(line, cwd=repo, text=True) == "17\n17\n"
    assert wheels.unpack(tmp_path / "no such folder") is None


def test_rows_of_several_processes_are_all_there(tmp_path, repo):
    code = "import sys; from bench.gpu_rows import append\n"
    code += "for i in range(50): append(sys.argv[1], stage=sys.argv[2], of=[str(i)], x='y' * 200)"
    lines = [[sys.executable, "-c", code, str(tmp_path), name] for name in "abc"]
    processes = [subprocess.Popen(line, cwd=repo) for line in lines]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    rows, start = read(tmp_path), time.time()
    assert {name: len(latest(rows, name)) for name in "abc"} == dict.fromkeys("abc", 50)
    append(tmp_path, stage="a", of=["0"], time=start)
    assert latest(read(tmp_path), "a")["0",]["time"] == start
