"""A misspelled setting is told its nearest; a word that is near to none is not told any."""

from runtime.commandline import BadInput, flag, parse
from runtime.typed_flags import edits, near, scripts_with

import dataclasses
import importlib
import itertools
import random
import typing
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = [path.stem for path in sorted(REPO.glob("*.py"))]


def config_of(script):
    return importlib.import_module(script).Config


def names_of(script):
    """The settings that are flags."""
    known = dataclasses.fields(config_of(script))
    return [field.name for field in known if typing.get_origin(field.type) is not typing.Annotated]


def misspelled(name):
    """Words that one slip of the hand makes of it: a letter wrong, missing, too many, swapped."""
    i = len(name) // 2
    found = {name[:i] + "q" + name[i + 1 :], name[:i] + name[i + 1 :], f"{name}q"}
    found |= {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]}
    return {word for word in found if same(word) and set(word) & set(name)}


def same(word):
    return word.replace("_", "").casefold()


def test_every_setting_of_every_script_is_suggested_for_one_slip():
    script_of = {name: script for script in SCRIPTS for name in names_of(script)}
    assert len(script_of) > 140
    for name, script in script_of.items():
        names = names_of(script)
        for word in misspelled(name):
            found = near(word, names)
            as_near = edits(same(word), same(found)) <= edits(same(word), same(name))
            assert found == name or (found in names and as_near), (word, name, found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_near_to_none_is_sent_to_help(script):
    for word in ("foo", "xyzzy", "fps", "verbose", "quux_wibble", "i", "hidden"):
        assert near(word, names_of(script)) == ""


def test_what_is_said_on_the_command_line_and_of_a_file(tmp_path):
    said = {
        "--foo": "see --help",
        "--batch-sise": "did you mean --batch-size?",
        "--batch": "did you mean --batch-size?",
        "--no-flpi": "did you mean --no-flip?",
        "--no-lr": "see --help",
        "--ae-steps": "a setting of dit.py, ldm_cfg.py: see --help",
        "--no-attention": "a setting of stable_diffusion.py: see --help",
    }
    config = config_of("ddpm_pixel")
    for typed, hint in said.items():
        with pytest.raises(BadInput) as refused:
            parse(config, "", [typed, "1"] if not typed.startswith("--no") else [typed])
        assert str(refused.value) == f"unknown flag {typed}; {hint}"
    (tmp_path / "a.yaml").write_text("ae_steps: 3\n")
    with pytest.raises(BadInput, match="key 'ae_steps'; a setting of dit.py, ldm_cfg.py"):
        parse(config, "", ["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "--schedule cosin",
            "--schedule cosin: expected one of linear, cosine, sigmoid, sigmoid-beta; "
            "did you mean cosine?",
        ),
        (
            "--schedule x",
            "--schedule x: expected one of linear, cosine, sigmoid, sigmoid-beta",
        ),
        ("--steps 3.5", "--steps 3.5: expected a whole number"),
        ("--lr 1,5", "--lr 1,5: expected a number"),
        ("--lr", "--lr: expected a number after it"),
        ("--channel-mult 1 b", "--channel-mult 1 b: expected whole numbers"),
        ("--data", "--data: expected a text after it"),
        (
            "--schedule",
            "--schedule: expected one of linear, cosine, sigmoid, sigmoid-beta after it",
        ),
    ],
)
def test_a_value_that_a_setting_does_not_take_is_told_what_it_takes(words, said):
    with pytest.raises(BadInput) as refused:
        parse(config_of("ddpm_pixel"), "", words.split())
    assert str(refused.value) == said


def test_scripts_with_a_setting_have_it():
    have = {script: set(names_of(script)) for script in SCRIPTS}
    bases = {script: config_of(script).__base__ for script in SCRIPTS}
    base = {s: {f.name for f in dataclasses.fields(kind)} for s, kind in bases.items()}
    for name in set().union(*have.values()):
        told = {file.removesuffix(".py") for file in scripts_with(flag(name))}
        assert told <= {script for script in SCRIPTS if name in have[script]}, name
        assert {s for s in SCRIPTS if name in have[s] - base[s]} <= told, name


def test_edits_count_as_a_search_does():
    """Against the definition, which tries every way."""
    letters = "ab"
    random_words = random.Random(0)
    for _ in range(200):
        a, b = ("".join(random_words.choices(letters, k=random_words.randrange(6))) for _ in "ab")
        assert edits(a, b) == slow_edits(a, b) == edits(b, a)


def slow_edits(a, b):
    """The same by its definition: every way to part both words into pieces that are alike."""
    if not a or not b:
        return len(a) + len(b)
    ways = [slow_edits(a[1:], b[1:]) + (a[0] != b[0])]
    ways += [slow_edits(a[1:], b) + 1, slow_edits(a, b[1:]) + 1]
    if a[:2] == b[1::-1] and len(a) > 1 and len(b) > 1:
        ways.append(slow_edits(a[2:], b[2:]) + 1)
    return min(ways)


def test_edits_of_known_words():
    known = {("kitten", "sitting"): 3, ("ab", "ba"): 1, ("", "abc"): 3, ("ca", "abc"): 3}
    for (a, b), count in known.items():
        assert edits(a, b) == count
    for a, b in itertools.product(["abc", "acb"], repeat=2):
        assert edits(a, b) == (a != b)
