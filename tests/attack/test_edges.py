"""What a machine does to a command: one line and an exit code; a bug keeps its traceback."""

from runtime import checkpoints
from runtime.commandline import BadInput, entry, parse
from runtime.edges import LISTENER, escaped
from runtime.files import save_json
from runtime.processes import run_alone

import errno
import importlib
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from launching import refused

from networks.published import unet

NAME = "a\x1b]0;title\x07\x1b[2J\x9b\u202eb"  # sets a title, clears the screen, turns the writing


NO_FILE = "is a device or a pipe: name a file or folder"
KEEPABLE = "type it in UTF-8, without NUL; rename a file whose name is otherwise"


def raising(error):
    def main():
        raise error

    return main


ENDS = {
    "a full disk": (
        OSError(errno.ENOSPC, "", "x/ckpt.pt"),
        "x/ckpt.pt: No space left on device; make",
    ),
    "a closed folder": (
        PermissionError(errno.EACCES, "", "x"),
        "x: Permission denied; name a file",
    ),
    "a disk that is only read": (OSError(errno.EROFS, "", "x"), "x: Read-only file system; name a"),
    "a long name": (OSError(errno.ENAMETOOLONG, "", "x"), "x: File name too long; type a shorter"),
    "no memory": (MemoryError(), "memory has ended (a large object); type a smaller --batch-size"),
    "numpy's": (
        MemoryError("Unable to allocate 9 PiB"),
        "memory has ended (Unable to allocate 9 PiB)",
    ),
    "torch's": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nx"),
        "memory has ended ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried)",
    ),
    "a GPU's": (
        torch.OutOfMemoryError("CUDA out of memory."),
        "memory has ended (CUDA out of memory.)",
    ),
    "several lines": (BadInput("one\n  two\n"), "one two"),
}


@pytest.mark.parametrize("error, message", ENDS.values(), ids=ENDS)
def test_what_the_machine_does_is_one_line(error, message, capsys):
    with pytest.raises(SystemExit) as stop:
        entry(raising(error))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "", "x"),
        BrokenPipeError(errno.EPIPE, "of a connection, while all that is printed is read"),
        RuntimeError("shapes differ"),
        OverflowError("int too large"),
        RecursionError(),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        entry(raising(error))


def test_names_from_files_steer_no_terminal(capsys):
    def main():
        print("\x1b[8mhidden", NAME, "über 猫\tx")
        print("\x1b[A\rbar", NAME, file=sys.stderr)
        raise BadInput(f"{NAME}\bno")

    with pytest.raises(SystemExit):
        entry(main)
    said = capsys.readouterr()
    plain = r"a\x1b]0;title\x07\x1b[2J\x9b\u202eb"
    assert said.out == f"\\x1b[8mhidden {plain} über 猫\tx\n"
    assert said.err == f"\x1b[A\rbar {plain}\nerror: {plain}\\x08no\n"
    assert escaped("über 猫 a b") == "über 猫 a b"


def test_a_hostile_name_of_a_data_set_is_refused_in_text():
    assert r"\x1b]0;title\x07" in refused("ddpm_pixel", "--data", NAME)


FULL = Path("/dev/full")  # Linux has it
on_linux = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
PRINTS = "import sys; sys.path.insert(0, {root!r}); from runtime.commandline import entry; "
PRINTS += "entry(lambda: print('line ' * 10**5))"


@on_linux
def test_a_reader_that_leaves_and_streams_that_are_closed():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    program = f'"{sys.executable}" -c "{PRINTS.format(root=root)}"'
    line = f"({program} | head -c 1; echo ${{PIPESTATUS[0]}}) ; {program} >&- 2>&-; echo $?; "
    line += f"{program} > /dev/full; echo $?"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.split() == ["l141", "0", "2"]
    assert done.stderr == "error: No space left on device; make room, and type the same again\n"


@on_linux
def test_devices_and_pipes_are_written_to_and_not_replaced(tmp_path):
    """--json /dev/full became a file of that name."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        save_json(pipe, {"a": 1})
        assert json.loads(read.result(timeout=20)) == {"a": 1}
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(BadInput, match=r"cannot write /dev/full .No space left on device"):
        save_json(FULL, {"a": 1})
    assert FULL.is_char_device()
    save_json("/dev/null", {"a": 1})


def told(*arguments, script="ddpm_pixel"):
    """What parse() says against a command line."""
    with pytest.raises(BadInput) as refusal:
        parse(importlib.import_module(script).Config, "", [str(word) for word in arguments])
    return str(refusal.value)


def test_a_device_or_a_pipe_is_read_by_nobody(tmp_path):
    """A device may never end, and a pipe never begin; the shell's own are another thing."""
    os.mkfifo(pipe := str(tmp_path / "pipe"))
    for path in filter(os.path.exists, (pipe, "/dev/zero", "/dev/full")):
        for name in ("sample", "resume", "data"):
            assert told(f"--{name}", path) == f"--{name} {path} {NO_FILE}"
        for name in ("weights", "vocabulary", "prompt-file", "image", "mask"):
            assert told(f"--{name}", path, script="stable_diffusion").endswith(NO_FILE)
    assert told(pipe, script="eval_fid") == f"--a {pipe} {NO_FILE}"
    parse(importlib.import_module("eval_fid").Config, "", ["--json", pipe])
    kept = importlib.import_module("stable_diffusion").Config
    assert parse(kept, "", ["--prompt-file", "/dev/stdin"]).prompt_file == "/dev/stdin"


def test_texts_that_no_file_could_hold_are_refused(tmp_path):
    path = tmp_path / "some.yaml"
    assert told("--out", "a\udcff") == r"--out a\udcff: " + KEEPABLE
    assert told("--prompt", "a", "\udcff", script="stable_diffusion").endswith(KEEPABLE)
    for text in ("a\\0b", "\\uD800", "~\\0"):
        path.write_text(f'out: "{text}"\n')
        assert told("--config", path).endswith(KEEPABLE)


def test_aliases_of_aliases_take_no_memory(tmp_path):
    """Thirty lines of << that double each other would be a billion settings."""
    path, whole = tmp_path / "laughs.yaml", "{steps: 1}"
    for i in range(30):
        whole = f"{{<<: [&a{i} {whole}, *a{i}]}}"
    path.write_text(f"<<: {whole}\n")
    assert "takes in too much" in told("--config", path)
    texts = "&a0 [x, x]"
    for i in range(30):
        texts = f"&a{i + 1} [{texts}, *a{i}]"
    path.write_text(f"prompt: {texts}\n")
    assert "--prompt takes [text, ...]" in told("--config", path, script="stable_diffusion")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_tyro_tells_is_one_line_in_every_encoding(encoding, monkeypatch):
    """Where there are no lines to draw a box, its rules of hyphens stood in the message."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert told("--steps", "3", "4") == "Unrecognized options: 4; see --help"
    assert told("--stepz", "3") == "unknown flag --stepz; did you mean --steps?"
    assert told("--steps") == "--steps: expected a whole number after it"
    assert told("a", "--more", "c", script="eval_fid") == "unknown flag --more; see --help"
    long = told("--steps", "3", "9" * 5000)
    assert long.startswith("Unrecognized options: 999") and "--" not in long[:-10]


def test_a_long_message_is_cut_in_its_middle(capsys):
    with pytest.raises(SystemExit):
        entry(raising(BadInput("begin " + 5000 * "9" + " end")))
    said = capsys.readouterr().err
    assert len(said) < 1500 and said.startswith("error: begin") and said.endswith(" end\n")


def test_a_refusal_is_said_where_nobody_listens(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(LISTENER, str(tmp_path / "gone" / "file"))
    with pytest.raises(SystemExit):
        entry(raising(BadInput("no")))
    assert capsys.readouterr().err == "error: no\n"


def test_the_refusal_of_a_command_that_we_start_is_a_part_of_ours(capfd, tmp_path, monkeypatch):
    says = f"import os; open(os.environ[{LISTENER!r}], 'a').write('error: no\\n'); exit(2)"
    assert run_alone([sys.executable, "-c", says]) == "no"
    assert run_alone([sys.executable, "-c", "exit(7)"]) == "exit code 7"
    assert run_alone([sys.executable, "-c", ""]) == ""
    monkeypatch.setenv(LISTENER, str(tmp_path / "heard"))
    with pytest.raises(SystemExit):
        entry(raising(BadInput("no")))
    assert (tmp_path / "heard").read_text() == "error: no\n" and capfd.readouterr().err == ""


def test_values_that_no_network_takes(monkeypatch):
    """--ema without a decay and --num-head-channels -1 were tracebacks."""
    published = importlib.import_module("networks.published.__main__").Config
    monkeypatch.setattr(sys, "argv", ["x", "--ema"])
    with pytest.raises(BadInput, match="--ema names no decay"):
        checkpoints.typed_ema(parse(published, ""))
    with pytest.raises(BadInput, match="--num-head-channels -1: expected a number from 0 for x.pt"):
        unet._typed({"num_head_channels": -1}, {}, "openai", "x.pt")


def test_huge_numbers_are_refused():
    for number in (2**31, -(2**31), 10**30):
        line = refused("ddpm_pixel", "--steps", number)
        assert (
            f"--steps {number}"[:15] in line and "expected a whole number of fewer digits" in line
        )
    assert "(31 digits)" in line
    assert "fewer digits" in refused("ddpm_pixel", "--channel-mult", 1, 10**30)
    assert "fewer digits" in refused("ddpm_pixel", "--seed", 2**63)
