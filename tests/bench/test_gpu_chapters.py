"""bench/gpu_chapters.py: every command of the book has its line, and one that fails its row."""

import sys
from pathlib import Path

from bench import gpu_chapters
from bench.gpu_rows import Job, latest, read


def test_every_command_of_the_book_is_run(repo):
    lines = (*gpu_chapters.FIRST, *gpu_chapters.TRAININGS, *gpu_chapters.OTHERS)
    assert {line.split()[0] for line in lines} == {path.stem for path in repo.glob("*.py")}
    folders = [gpu_chapters.arguments(line, Path("a"), True)[-1] for line in lines]
    assert len({*folders}) == len(lines)


def test_a_command_that_fails_says_why_and_one_that_hangs_too(tmp_path, monkeypatch):
    def arguments(line, folder, rehearse):
        return [sys.executable, "-c", line]

    monkeypatch.setattr(gpu_chapters, "arguments", arguments)
    monkeypatch.setattr(gpu_chapters, "LIMIT", 1)
    job, hangs = Job("chapters", tmp_path), "import time; time.sleep(60)"
    for line in ("print(1)", "raise SystemExit('why')", hangs):
        gpu_chapters.run(job, tmp_path, line)
    found = latest(read(tmp_path), "chapters")
    assert found["print(1)",]["right"]
    failed = found["raise SystemExit('why')",]
    assert failed["right"] is False and failed["last"] == "why"
    assert found[hangs,]["failed"].startswith("TimeoutExpired: ")
