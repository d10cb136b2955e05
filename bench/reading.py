"""How much a reader of a chapter has to read: files, settings, and what one step passes through.

    python bench/reading.py                        all chapters
    python bench/reading.py ddpm_pixel --files     one, with the executed lines of each file

Columns, a chapter being a script in the project's root:

    lines      of the file
    fields     of its Config that are its own, not those that every command has
    train      lines of its longest function named train...
    loads      project files that `import CHAPTER` loads, and their lines
    training   project files that one training step passes through, and how many lines it executes;
               a row more for each further training loop
    sampling   the same of one step of each generator that walks from noise to images, or back

A line is executed if its statement is, so that a call over three lines counts three. Comments,
blank lines and docstrings never count. Chapters run on the CPU with --smoke on a few small images,
those that only sample on what chapter 1 made there. Of the training steps after the first the
shortest is shown, which writes no log and no checkpoint; of the sampling steps after the first the
longest, which draws noise if any does. A new chapter needs nothing here.

Exit code 1 if a chapter fails or is longer than LIMITS, or if a step of chapter 1 is.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import json
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # in place of bench/, where this file would hide the module of its name

from runtime.commandline import BadInput, RunConfig, entry  # noqa: E402

FIRST = "ddpm_pixel"
LIMITS = {"lines": 500, "fields": 40, "train": 60, "skips": 0}  # of every chapter
FIRST_LOADS = 20  # files that importing chapter 1 loads
FIRST_STEPS = {"training": 8, "sampling": 7}  # files that one of its steps passes through
FIRST_LINES = 200  # lines that one of its steps executes
SHORT = "--steps 5 --log-every 5 --save-every 5 --sample-every 0"
HEADING = f"{'':20}{'lines':>6}{'fields':>8}{'train':>7}  {'loads':16}{'training':34}sampling"


# ------------------------------------------------------------------------ what stands in a file


def chapters():
    """The stems of the scripts in the root."""
    return sorted(path.stem for path in REPO.glob("*.py"))


def own_fields(tree):
    """How many settings the class Config of a module adds, without class variables."""
    configs = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    body = configs[0].body if configs else []
    fields = [n for n in body if isinstance(n, ast.AnnAssign)]
    return sum("ClassVar" not in ast.unparse(n.annotation) for n in fields)


def longest_training(tree):
    """Lines of the longest function named train..., 0 if there is none."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return max(
        (n.end_lineno - n.lineno + 1 for n in found if n.name.startswith("train")), default=0
    )


def of_file(path):
    """{what LIMITS names: count} of a chapter."""
    text = Path(path).read_text()
    tree = ast.parse(text)
    return {
        "lines": len(text.splitlines()),
        "fields": own_fields(tree),
        "train": longest_training(tree),
        "skips": text.count("# fmt" + ": skip"),
    }


def code_lines(text):
    """Numbers of the lines that are neither blank, nor comment only, nor of a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        holds = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if holds and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def statements(text):
    """{line: first line of the innermost statement there}; of `if`, `for`, ... only the head."""
    starts = {}

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                body = getattr(child, "body", None)
                end = body[0].lineno - 1 if body else child.end_lineno
                for line in range(child.lineno, max(end, child.lineno) + 1):
                    starts[line] = child.lineno
            visit(child)

    visit(ast.parse(text))
    return starts


def whole_statements(executed):
    """{file: lines that its statements with a line in `executed` {file: lines} have}."""
    found = {}
    for name, lines in executed.items():
        text = (REPO / name).read_text()
        starts = statements(text)
        begun = {starts[line] for line in lines if line in starts}
        found[name] = {line for line in code_lines(text) if starts.get(line) in begun}
    return found


# ------------------------------------------------------------------------- what a step executes


def project_file(filename):
    """The path in the project of a module's file, or None if it is another's or this one."""
    path = Path(filename)
    if not path.is_relative_to(REPO) or path == Path(__file__).resolve():
        return None
    name = path.relative_to(REPO)
    return None if name.parts[0].startswith(".") else str(name)


def files_of(modules):
    """The project's files among those of modules, given by name, sorted."""
    files = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return sorted({name for name in (project_file(file) for file in files if file) if name})


class Recorder:
    """What each training and sampling step executes, while `with` it.

    steps: {"training" or "sampling": {"file.py function": [{file: lines} of each step]}}. A
    training step lasts from one number that Run.steps() yields to the next. A sampling step is
    what a generator function of a chapter does from one yield to the next.
    """

    def __init__(self):
        self.steps = {"training": defaultdict(list), "sampling": defaultdict(list)}
        self.training = self.sampling = None  # {file: lines} of the step that is going on
        self.begun = defaultdict(int)  # how often each generator was entered
        self.names = {}  # project_file of what was seen

    def __enter__(self):
        from runtime.run import Run

        self.run, self.original = Run, Run.steps
        recorder = self

        def steps(run):
            """As Run.steps; what is executed between two of its numbers is recorded."""
            user = sys._getframe(1).f_code
            name = f"{recorder.name_of(user)} {user.co_name}"
            for step in recorder.original(run):
                if recorder.training is not None:
                    recorder.steps["training"][name].append(recorder.training)
                # The first step also begins the run, and the last one ends it.
                recorder.training = defaultdict(set) if step > run.first else None
                yield step
            recorder.training = None

        Run.steps = steps
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        self.run.steps = self.original

    def name_of(self, code):
        if code.co_filename not in self.names:
            self.names[code.co_filename] = project_file(code.co_filename)
        return self.names[code.co_filename]

    def called(self, frame, event, argument):
        """A function begins, or a generator goes on: whether its lines are to be seen."""
        code = frame.f_code
        name = self.name_of(code)
        if name is None:
            return None
        if self.walks(code, name):
            self.begun[frame] += 1
            if self.begun[frame] > 1 and self.sampling is None:
                self.sampling, self.walker = defaultdict(set), frame
        return self.happened

    @staticmethod
    def walks(code, name):
        """Whether it is a generator function of a chapter."""
        generates = code.co_flags & inspect.CO_GENERATOR and not code.co_name.startswith("<")
        return generates and "/" not in name

    def happened(self, frame, event, argument):
        name = self.names[frame.f_code.co_filename]
        if event == "line":
            for lines in (self.training, self.sampling):
                if lines is not None:
                    lines[name].add(frame.f_lineno)
        elif event == "return" and self.sampling is not None and frame is self.walker:
            if argument is not None:  # a generator that ends gives nothing
                self.steps["sampling"][f"{name} {frame.f_code.co_name}"].append(self.sampling)
            self.sampling = self.walker = None
        return self.happened


def one_of(steps, choose):
    """Of [{file: lines}] the one with the least (choose = min) or most lines, whole statements."""
    whole = [whole_statements(step) for step in steps]
    return choose(whole, key=lambda step: sum(map(len, step.values())))


# --------------------------------------------------------------------------- running a chapter


def write_images(folder, size=16, count=32):
    """Gray images of two classes."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        path = Path(folder) / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size, size), np.uint8)
        Image.fromarray(pixels).save(path)


def flags(config, folder, checkpoint):
    """The command line for a short run of a chapter with this class Config."""
    data = ["--data", str(folder / "images"), "--data-root", str(folder / "data")]
    common = ["--smoke", "--gpus", "0", "--out", str(folder / "out"), *data]
    if issubclass(config, RunConfig):
        return [*common, *SHORT.split()]
    known = {field.name: str(field.type) for field in dataclasses.fields(config)}
    wanted = {"sample": checkpoint, "n": "4", "sample_steps": "5", "batch_size": "4"}
    typed = [("--" + name.replace("_", "-"), v) for name, v in wanted.items() if name in known]
    first = [str(checkpoint)] if "Positional" in known.get("checkpoint", "") else []
    return [*first, *common, *(part for pair in typed for part in pair)]


def drive(chapter, folder, checkpoint, modules):
    """{"loads": files, "training": {loop: {file: lines}}, "sampling": ...} of a chapter.

    Runs its main() in this process. modules: names of those that importing the chapter loads.
    """
    module = importlib.import_module(chapter)
    found = {"loads": files_of(modules), "error": ""}
    folder = Path(folder)
    write_images(folder / "images")
    recorder = Recorder()
    if hasattr(module, "Config") and hasattr(module, "main"):
        sys.argv = [f"{chapter}.py", *flags(module.Config, folder, checkpoint)]
        try:
            with recorder:
                module.main()
        except (BadInput, SystemExit) as stop:
            found["error"] = f"{' '.join(sys.argv)}: {stop}"
    for kind, choose in (("training", min), ("sampling", max)):
        steps = recorder.steps[kind].items()
        found[kind] = {name: one_of(each, choose) for name, each in steps}
    return found


# This process has imported runtime; what a chapter loads is seen in one that has nothing.
CHILD = """
import importlib, json, sys
chapter, folder, checkpoint, target = sys.argv[1:]
importlib.import_module(chapter)
modules = list(sys.modules)
from bench import reading
found = reading.drive(chapter, folder, checkpoint, modules)
plain = json.dumps(found, default=sorted)
open(target, "w").write(plain)
"""


def driven(chapter, folder, checkpoint=""):
    """drive() in a process of its own, with the steps' lines as lists.

    A chapter that fails loads and passes through nothing; "error" is the last line of what it said.
    """
    target = Path(folder) / "found.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, chapter, str(folder), str(checkpoint), str(target)],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or "nothing said").splitlines()[-1]
        return {"loads": [], "training": {}, "sampling": {}, "error": f"{chapter} failed: {said}"}
    return json.loads(target.read_text())


# ----------------------------------------------------------------------------------- the table


def lines_of(name):
    return len((REPO / name).read_text().splitlines())


def shown(step):
    """A step as it is printed: files and lines."""
    return f"{len(step)} files {sum(map(len, step.values()))}"


def rows(chapter, counts, found):
    """The lines of the table about a chapter: several if it has several loops."""
    loads = f"{len(found['loads'])} files {sum(map(lines_of, found['loads']))}"
    head = f"{chapter:20}{counts['lines']:>6}{counts['fields']:>8}{counts['train'] or '-':>7}"
    columns = [
        [f"{shown(step)} {name.split()[1]}" for name, step in found[kind].items()]
        for kind in ("training", "sampling")
    ]
    for i in range(max(1, *map(len, columns))):
        training, sampling = (column[i] if i < len(column) else "" for column in columns)
        first = f"{head}  {loads:16}" if i == 0 else " " * 59
        yield f"{first}{training:34}{sampling}".rstrip()


def broken(chapter, counts, found):
    """What of a chapter is beyond its limits, as lines."""
    for what, limit in LIMITS.items():
        if counts[what] > limit:
            yield f"{chapter}: {what} {counts[what]}, at most {limit}"
    if not found["loads"]:
        yield found["error"]
    if chapter != FIRST:
        return
    if len(found["loads"]) > FIRST_LOADS:
        yield f"{chapter}: loads {len(found['loads'])} files, at most {FIRST_LOADS}"
    for kind, limit in FIRST_STEPS.items():
        if not found[kind]:
            yield f"{chapter}: no {kind} step was seen; {found['error']}"
        for name, step in found[kind].items():
            lines = sum(map(len, step.values()))
            if len(step) > limit or lines > FIRST_LINES:
                yield (
                    f"{name}: a {kind} step passes {len(step)} files and {lines} lines, "
                    f"at most {limit} and {FIRST_LINES}"
                )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="by their names; all without")
    parser.add_argument("--files", action="store_true", help="executed lines of each file")
    args = parser.parse_args(arguments)
    unknown = set(args.chapters) - set(chapters())
    if unknown:
        raise BadInput(f"no chapter {min(unknown)}: there are {', '.join(chapters())}")
    faults, notes = [], []
    print(HEADING)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        checkpoint = base / FIRST / "out" / "ckpt.pt"
        first = driven(FIRST, base / FIRST)
        for chapter in args.chapters or chapters():
            counts = of_file(REPO / f"{chapter}.py")
            found = first if chapter == FIRST else driven(chapter, base / chapter, checkpoint)
            print("\n".join(rows(chapter, counts, found)), flush=True)
            if args.files:
                for kind in FIRST_STEPS:
                    for name, step in found[kind].items():
                        print(f"    a {kind} step of {name}:")
                        print("\n".join(f"{len(step[f]):8} {f}" for f in sorted(step)))
            faults += broken(chapter, counts, found)
            if found["loads"] and found["error"]:
                notes.append(f"did not run: {found['error']}")
    print("\n".join(["", *notes, *(faults or ["all within their limits"])]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    entry(main)
