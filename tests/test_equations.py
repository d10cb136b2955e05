"""EQUATIONS.md: each number of a paper that the code's text names is in it, and the reverse.

A mention is "eq. 7", "eqs. 5 to 7", "section 3.1 and appendix G", "Algorithm 2", ... in a docstring
or comment. Its paper is the one named directly before it ("DDPM eq. 7", "Lu et al. 2022, algorithm
2") or after it ("table 1 of Karras et al. 2022"), or that of a mention which it continues, or the
head paper of its file. EQUATIONS.md says how a paper is called, and of which files it is the head.
"""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "networks", "evaluation", "runtime", "image_data", "bench")
FILES = [*REPO.glob("*.py"), *(path for room in ROOMS for path in (REPO / room).rglob("*.py"))]

KINDS = ["eq", "algorithm", "section", "table", "figure", "appendix", "proposition"]
WORDS = {kind: kind for kind in KINDS} | {f"{kind}s": kind for kind in KINDS}
WORDS |= {"equation": "eq", "equations": "eq", "alg": "algorithm"}
NUMBER = r"(?:\d+(?:\.\d+)*[a-f]?|[A-Z](?:\.\d+)*)(?!\w)"
MENTION = re.compile(
    rf"\b({'|'.join(sorted(WORDS, key=len, reverse=True))})\.? "
    rf"({NUMBER}(?:(?: and | to | or |-){NUMBER})*)",
    re.IGNORECASE,
)
# What may stand between a paper's name and the number, and between a mention and what continues it.
GAP = r"[)'’s,:]*(?: (?:19|20)\d\d)?[),:]*\s*\(?"
GOES_ON = r"[,;:]?\s*(?:and )?\(?"


class Paper(NamedTuple):
    title: str
    names: list  # as texts call it
    heads: list  # files whose unnamed mentions are of it
    rows: dict  # {(kind, number): [(file, function or class, "" for outside of them)]}


class Mention(NamedTuple):
    file: str
    owner: str  # function or class, "" outside of them
    line: int  # where its docstring or comment begins
    paper: str | None  # title in EQUATIONS.md; None where nothing says which
    kind: str
    number: str


# ------------------------------------------------------------------------------- what the code says


def spread(numbers):
    """["5", "6", "7"] of "5 to 7" and of "5-7"; ["12", "16"] of "12 and 16"."""
    parts = re.split(r"( and | to | or |-)", numbers)
    found = [parts[0]]
    for between, number in zip(parts[1::2], parts[2::2], strict=True):
        if between in (" to ", "-") and found[-1].isdigit() and number.isdigit():
            found += [str(n) for n in range(int(found[-1]) + 1, int(number))]
        found.append(number)
    return found


def texts(source):
    """[(first line, text)] of docstrings and comments; comments below each other are one."""
    found = [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    last = -1  # the line of a comment that stands alone, to which the next may belong
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (row, column), text = token.start, token.string.strip("#- ")
            alone = not token.line[:column].strip()
            if alone and row == last + 1:
                found[-1] = (found[-1][0], f"{found[-1][1]}\n{text}")
            else:
                found.append((row, text))
            last = row if alone else -1
    return found


@functools.cache
def owners(source):
    """[(first line, last line, name)] of functions and classes; Class.method comes after Class."""
    found = []

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.append((node.lineno, node.end_lineno, prefix + node.name))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


def mentions(source, file, papers):
    """The Mentions in a file's source."""
    if not MENTION.search(re.sub(r"[\s#]+", " ", source)):  # most files: it takes no parser to see
        return []
    called = {name: paper.title for paper in papers for name in paper.names}
    any_name = "|".join(map(re.escape, sorted(called, key=len, reverse=True))) or "(?!)"
    head = next((paper.title for paper in papers if file in paper.heads), None)
    spans, found = owners(source), []
    for line, text in texts(source):
        text = re.sub(r"\n\s*\n", " ¶ ", re.sub(r'"[^"]*",?', "", text))
        text = re.sub(r"\s+", " ", text)
        owner = ([name for first, last, name in spans if first <= line <= last] or [""])[-1]
        end, paper = 0, None
        for match in MENTION.finditer(text):
            ahead = text[end : match.start()]
            named = re.search(rf"(?<!\w)({any_name}){GAP}$", ahead)
            named = named or re.match(rf" of ({any_name})(?!\w)", text[match.end() :])
            if named:
                paper = called[named[1]]
            elif paper is None or not re.fullmatch(GOES_ON, ahead):
                paper = head
            end, kind = match.end(), WORDS[match[1].lower()]
            found += [Mention(file, owner, line, paper, kind, n) for n in spread(match[2])]
    return found


# ------------------------------------------------------------------------------ what the list says


def read_list(text):
    """The Papers of EQUATIONS.md's text. ValueError for a row that is not understood."""
    papers = []
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, rest = part.split("\n", 1)
        said = dict(re.findall(r"^(Called|Head paper of): (.*)$", rest, flags=re.MULTILINE))
        names, heads = (
            re.findall(r"`([^`]+)`", said.get(what, "")) for what in ("Called", "Head paper of")
        )
        rows = {}
        for line in re.findall(r"^\|(.*)\|$", rest, flags=re.MULTILINE):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            if cells[0] == "number" or not cells[0].strip("-"):
                continue
            match = MENTION.fullmatch(cells[0])
            if not match or len(cells) != 5:
                raise ValueError(
                    f"{title}: no row of five columns that begins with a number: {line}"
                )
            places = [place.partition(": ")[::2] for place in re.findall(r"`([^`]+)`", cells[2])]
            for number in spread(match[2]):
                rows[WORDS[match[1].lower()], number] = places
        papers.append(Paper(title, names, heads, rows))
    return papers


def faults(papers, sources):
    """What is wrong, a line each. sources: {file: text}."""
    found = [m for file, source in sources.items() for m in mentions(source, file, papers)]
    rows = {(paper.title, *row): places for paper in papers for row, places in paper.rows.items()}
    wrong = []
    for m in found:
        where = f"{m.file}:{m.line} {m.owner}: {m.kind} {m.number}"
        if m.paper is None:
            wrong.append(f"{where}: of which paper? Its name must stand before it")
        elif (m.paper, m.kind, m.number) not in rows:
            wrong.append(f"{where}: not in EQUATIONS.md, {m.paper}")
    seen = {(m.paper, m.kind, m.number, m.file, m.owner) for m in found}
    for (title, kind, number), places in rows.items():
        where = f"EQUATIONS.md, {title}, {kind} {number}"
        if not places:
            wrong.append(f"{where}: no place in the book")
        for file, owner in places:
            if file not in sources:
                wrong.append(f"{where}: no file {file}")
            elif owner and owner not in [name for *_, name in owners(sources[file])]:
                wrong.append(f"{where}: no {owner} in {file}")
            elif (title, kind, number, file, owner) not in seen:
                wrong.append(f"{where}: {file} {owner} does not name it")
    return wrong


# ------------------------------------------------------------------------------------------- tests


def test_the_list_is_the_book():
    sources = {str(path.relative_to(REPO)): path.read_text() for path in sorted(FILES)}
    papers = read_list((REPO / "EQUATIONS.md").read_text())
    assert not faults(papers, sources)


SMALL = """
## DDPM

Called: `DDPM`, `Ho et al. 2020`
Head paper of: `a.py`

| number | says | where | ours | seen |
|---|---|---|---|---|
| eq. 4 | q(x_t\\|x_0) | `a.py: noised` | | |
| eq. 6-7 | the posterior | `a.py: Chain.step`, `b.py` | | |

## ADM

Called: `ADM`

| number | says | where | ours | seen |
|---|---|---|---|---|
| section 3.1 | AdaGN | `b.py` | | |
"""
A = '''"""A chapter."""
def noised(x):
    """Equation 4."""
class Chain:
    def step(self):
        return 1  # eqs. 6 to 7
'''
B = '''"""Norms (ADM section 3.1) after Ho et al. 2020, "A Title, eq. 99",
eq. 6 and 7."""
'''


def faults_of(small=SMALL, a=A, b=B):
    return faults(read_list(small), {"a.py": a, "b.py": b})


def test_a_right_list_has_no_faults():
    assert faults_of() == []


@pytest.mark.parametrize(
    "wrong, fault",
    [
        (dict(a=A.replace("ion 4", "ion 5")), "a.py:3 noised: eq 5: not in EQUATIONS.md, DDPM"),
        (dict(a=A.replace("ion 4", "ion 5")), "DDPM, eq 4: a.py noised does not name it"),
        (dict(a=A.replace("6 to 7", "6")), "DDPM, eq 7: a.py Chain.step does not name it"),
        (dict(b=B.replace("ADM", "")), "b.py:1 : section 3.1: of which paper?"),
        (dict(b=B.replace("(ADM", "(table 2;")), "b.py:1 : table 2: of which paper?"),
        (dict(b=B.replace("ADM", "DDPM")), "b.py:1 : section 3.1: not in EQUATIONS.md, DDPM"),
        (dict(b=B + "# algorithm 2 of ADM"), "b.py:3 : algorithm 2: not in EQUATIONS.md, ADM"),
        (
            dict(b=B.replace("eq. 6 and 7", "eq. 6, figure 2")),
            "figure 2: not in EQUATIONS.md, DDPM",
        ),
        (dict(small=SMALL.replace("a.py: noised", "c.py: noised")), "DDPM, eq 4: no file c.py"),
        (dict(small=SMALL.replace("noised", "gone")), "DDPM, eq 4: no gone in a.py"),
        (dict(small=SMALL.replace("`a.py: noised`", "")), "DDPM, eq 4: no place in the book"),
    ],
)
def test_a_wrong_list_has_faults(wrong, fault):
    assert any(fault in line for line in faults_of(**wrong)), faults_of(**wrong)


def test_a_row_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="begins with a number"):
        read_list(SMALL.replace("| eq. 4 |", "| fourth |"))


def test_what_continues_a_mention_is_of_the_same_paper():
    (paper,) = read_list("## P\n\nCalled: `P`\n")
    found = mentions('"""See P section 2, table 3; and then eq. 5."""', "a.py", [paper])
    assert [(m.paper, m.kind, m.number) for m in found] == [
        ("P", "section", "2"),
        ("P", "table", "3"),
        (None, "eq", "5"),
    ]
