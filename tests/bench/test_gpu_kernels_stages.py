"""bench/gpu_kernels.py: what a sanitizer finds, and the inputs of what is timed."""

import importlib.util
import sys

import pytest
import torch

from bench.gpu_rows import Job, latest, narrow, read
from kernels.dispatch import INTERPRET

if INTERPRET or importlib.util.find_spec("triton") is None:
    pytest.skip("the program needs triton, not interpreting", allow_module_level=True)

from bench import gpu_kernels

SANITIZED = """import sys
print("========= COMPUTE-SANITIZER")
for i in range({passes}): print("right:", i + 1)
print({blocks!r})
print("========= {summary}")
sys.exit({code})"""


def race(first, *others):
    """A hazard as racecheck tells it, between "VERB access at PLACE"s."""
    lines = [f"========= Error: Race reported between {first}"]
    lines += [f"=========     and {other} [8 hazards]" for other in others]
    return "\n".join([*lines, "========= "])


def wrote(kernel, offset, line=248):
    return f"Write access at {kernel}+{offset:#x} in group_norm_silu.py:{line}"


FMHA = "Write access at fmha_cutlassB_f32(PyTorchMemEffAttention::Kernel<float, (bool)1>::Params)"
COPIES = race(wrote("group_norm_forward", 0x4A00), wrote("group_norm_forward", 0x4A00))
LATER = race(wrote("group_norm_backward", 0x20), wrote("group_norm_backward", 0x30))
THEIRS = race(f"{FMHA}+0x38a0", f"{FMHA}+0x73d0", f"{FMHA}+0x7470")
READ = race("Read access at _dq_kernel+0x10 in attention.py:9", wrote("_dq_kernel", 0x10))
BEYOND = """========= Invalid __global__ read of size 4 bytes
=========     at _forward_kernel+0x5a0 in attention.py:140
=========     by thread (0,0,0) in block (1,0,0)
=========     Access to 0x7f0000000000 is out of bounds
========= """
HAZARDS = "RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"


def sanitized(folder, monkeypatch, blocks, summary, code, fewer=0):
    """{of: row} of `sanitize`, with a program that prints this in place of compute-sanitizer."""
    passes = len(gpu_kernels.passes(gpu_kernels.RAGGED)) - fewer
    program = folder / "compute-sanitizer"
    given = {"passes": passes, "blocks": "\n".join(blocks), "summary": summary, "code": code}
    program.write_text(f"#!{sys.executable}\n{SANITIZED.format(**given)}\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_kernels.shutil, "which", lambda _: str(program))
    gpu_kernels.sanitize(Job("sanitize", folder))
    return latest(read(folder), "sanitize")


@pytest.mark.parametrize(
    ("fewer", "blocks", "summary", "code", "clean"),
    [
        (0, [], "ERROR SUMMARY: 0 errors", 0, True),
        (0, [], HAZARDS.format(0, 0), 0, True),
        (0, [THEIRS, THEIRS], HAZARDS.format(2, 2), 9, True),
        (0, [THEIRS, COPIES], HAZARDS.format(2, 2), 9, False),
        (0, [LATER], HAZARDS.format(1, 1), 9, False),
        (0, [COPIES, READ], HAZARDS.format(2, 2), 9, False),
        (0, [BEYOND], "ERROR SUMMARY: 1 error", 9, False),
        (0, [THEIRS], HAZARDS.format(2, 2), 9, False),  # there was one more
        (0, [THEIRS], HAZARDS.format(1, 1), 1, False),  # it ended in another way
        (0, [], "ERROR SUMMARY: 10 errors", 9, False),
        (1, [], "ERROR SUMMARY: 0 errors", 0, False),
        (0, [], "Error: Device not supported", 0, False),
    ],
)
def test_a_sanitizer_must_have_looked_to_the_end(
    tmp_path, monkeypatch, fewer, blocks, summary, code, clean
):
    found = sanitized(tmp_path, monkeypatch, blocks, summary, code, fewer)
    ours = [row["clean"] for (_, whose), row in found.items() if whose == "ours"]
    assert ours == [clean, clean]  # of memcheck and of racecheck
    assert not any("clean" in row for (_, whose), row in found.items() if whose != "ours")


def test_what_a_sanitizer_finds_is_told_by_kernel(tmp_path, monkeypatch):
    blocks = [COPIES, LATER, THEIRS, COPIES, THEIRS]
    found = sanitized(tmp_path, monkeypatch, blocks, HAZARDS.format(5, 5), 9)
    ours, others = found["racecheck", "ours"], found["racecheck", "others'"]
    assert ours["found"] == "2 write-write of one instruction, 1 write-write"
    assert ours["kernels"] == "group_norm_forward 2, group_norm_backward 1"
    assert ours["texts"]["write-write"].startswith("Error: Race reported between Write access at")
    assert "group_norm_silu.py:248 [8 hazards]" in ours["texts"]["write-write of one instruction"]
    assert others["found"] == "2 write-write" and others["kernels"] == "fmha_cutlassB_f32 2"
    table = "\n".join(narrow(found, ["tool", "whose"]))
    assert "| racecheck | ours | NO |" in table and "Race reported" not in table


def test_errors_of_memory_are_told_as_they_are(tmp_path, monkeypatch):
    found = sanitized(tmp_path, monkeypatch, [BEYOND], "ERROR SUMMARY: 1 error", 9)
    assert found["memcheck", "ours"]["found"] == "1 Invalid __global__ read of size 4 bytes"
    assert found["memcheck", "ours"]["kernels"] == "_forward_kernel 1"
    assert found["memcheck", "others'"]["found"] == "nothing"


def test_the_gradient_of_a_result_lies_in_memory_as_the_result_does(tmp_path):
    """Else a backward pass would be timed with the copy that puts it in order."""

    class Turned:
        """Its reference gives another order of memory, as PyTorch's group norm does on a GPU."""

        def inputs(self, device):
            return {"x": torch.zeros(2, 6, 4, 4, device=device)}

        def run(self, inputs):
            return (inputs["x"].contiguous(memory_format=torch.channels_last),)

        def reference(self, inputs):
            return (inputs["x"],)

    _, dy = gpu_kernels.made(Turned(), True, "cpu")
    assert dy.is_contiguous(memory_format=torch.channels_last) and not dy.requires_grad
    for case, backward in gpu_kernels.passes(gpu_kernels.RAGGED):
        inputs, dy = gpu_kernels.made(case, backward, "cpu")
        assert dy is None or dy.stride() == case.run(inputs)[0].stride(), case.name
