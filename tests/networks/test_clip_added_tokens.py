"""Tokens that were added to CLIP's vocabulary have the ids of transformers' CLIPTokenizer."""

from runtime.commandline import BadInput

import json
import random
import shutil

import pytest
import tiny_stable_diffusion as tiny
from reference_metrics import import_references
from safetensors.torch import load_file, save_file

from networks.clip_tokens import Tokenizer
from networks.published.stable_diffusion import read_pipeline

START, END = "<|startoftext|>", "<|endoftext|>"
FIRST = len(tiny.vocabulary()[0])  # the id of the first that is added
ADDED = {"<cat-toy>": FIRST, "<cat-toy>_1": FIRST + 1, "<Big>": FIRST + 2, "Café": FIRST + 3}
TEXTS = [
    "a <cat-toy> of the house",
    "<cat-toy><cat-toy>_1!<cat-toy>_12 red<cat-toy>'s",
    "A <CAT-TOY> <big>s <BIG> cafe\u0301s CAFÉ the\u00a0<Big>\n",
    f"{END}<cat-toy>{START} < cat-toy > <cat-toy",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tokenizer's folder: vocab.json, merges.txt, and what transformers writes beside them."""
    import_references()
    folder = tmp_path_factory.mktemp("tokens")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """vocab.json and merges.txt alone."""
    where = tmp_path / "tokenizer"
    where.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(written / name, where)
    return where


def told(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def entry(content, **flags):
    how = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)
    return {"content": content} | how | flags


def texts():
    """TEXTS, and random ones of pieces that touch each other."""
    pieces = [*ADDED, *tiny.WORDS, START, END, " ", " ", "!", "'s", "_1", "1", "<", "É", "e\u0301"]
    pieces += [piece.upper() for piece in pieces if "|" not in piece]
    rng = random.Random(4)
    return TEXTS + ["".join(rng.choices(pieces, k=rng.randint(2, 9))) for _ in range(300)]


def assert_same(folder, count):
    from transformers import CLIPTokenizer

    theirs, ours = CLIPTokenizer.from_pretrained(folder), Tokenizer.of_folder(folder)
    assert len(ours) == len(theirs) == count
    for text in texts():
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, ascii(text)
    return ours


def test_added_tokens_have_the_ids_of_transformers(folder):
    told(folder, "added_tokens.json", ADDED)
    ours = assert_same(folder, FIRST + 4)
    assert ours.encode("a <cat-toy>") == [*ours.encode("a"), FIRST]
    assert ours.words("a <cat-toy> of")[1] == ("<cat-toy>", [2])


def test_a_folder_of_transformers_5_has_them_in_tokenizer_json(written, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(written)
    assert theirs.add_tokens(list(ADDED)) == 4
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert not (tmp_path / "vocab.json").exists()
    assert_same(tmp_path, FIRST + 4)


@pytest.mark.parametrize("normalized", [True, False])
def test_flags_in_a_tokenizer_config_are_obeyed(folder, normalized):
    """As transformers 4 writes them beside added_tokens.json. Not normalized: as it is typed."""
    told(folder, "added_tokens.json", ADDED)
    entries = {str(i): entry(token, normalized=normalized) for token, i in ADDED.items()}
    entries |= {
        str(FIRST - 2): entry(START, special=True, normalized=False),
        str(FIRST - 1): entry(END, special=True, normalized=False),
    }
    told(folder, "tokenizer_config.json", {"added_tokens_decoder": entries})
    ours = assert_same(folder, FIRST + 4)
    assert (ours.encode("<BIG>") == [ADDED["<Big>"]]) is normalized
    assert ours.encode("<Big>") == [ADDED["<Big>"]]


def test_the_special_tokens_alone_add_nothing(folder):
    told(folder, "added_tokens.json", {START: FIRST - 2, END: FIRST - 1})
    assert_same(folder, FIRST)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("added_tokens.json", {END: 3}, "numbers '<.endoftext.>' 541, and 3 where it is added"),
        ("added_tokens.json", {"<x>": FIRST + 1}, "must number its tokens"),
        ("added_tokens.json", {"<x>": 5}, "must number its tokens"),
        ("added_tokens.json", {"a</w>": FIRST}, "numbers 'a</w>' .* where it is added"),
        ("added_tokens.json", {"<x>": "1"}, "added token '<x>' must be text with a whole id"),
        ("added_tokens.json", {"": FIRST}, "added token '' must be text with a whole id"),
        ("added_tokens.json", [], "must hold a dictionary"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": entry("<x>")}}, "with a whole id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"542": 7}}, "must be text"),
        ("tokenizer_config.json", {"added_tokens_decoder": "x"}, "must be text"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(FIRST): entry("<x>", single_word=True)}},
            "added token '<x>': single_word true is not supported",
        ),
    ],
)
def test_what_cannot_be_added_is_refused(folder, name, content, words):
    told(folder, name, content)
    with pytest.raises(BadInput, match=f"tokenizer.*{words}") as refused:
        Tokenizer.of_folder(folder)
    assert "\n" not in str(refused.value)


def test_a_pipeline_of_textual_inversion_is_read(tmp_path_factory, tmp_path):
    """Its text encoder has one token more. Without the file that names it, it is said where."""
    sd = shutil.copytree(tiny.saved(tmp_path_factory.getbasetemp()), tmp_path / "sd")
    weights, config = (sd / "text_encoder" / n for n in ("model.safetensors", "config.json"))
    state = load_file(weights)
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    save_file(state | {name: state[name].new_ones(FIRST + 1, 64)}, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(vocab_size=FIRST + 1)))
    with pytest.raises(
        BadInput, match=f"knows {FIRST + 1} tokens, .* has {FIRST}.*added_tokens.js"
    ):
        read_pipeline(sd)
    told(sd / "tokenizer", "added_tokens.json", {"<cat-toy>": FIRST})
    assert read_pipeline(sd).tokenizer.encode("<cat-toy>") == [FIRST]
    assert read_pipeline(sd, sd / "tokenizer").tokenizer.encode("<Cat-Toy>") == [FIRST]


def test_a_vocabulary_that_is_no_list_of_merges_is_told(folder, tmp_path):
    (folder / "other.txt").write_text(json.dumps(tiny.vocabulary()[0], indent=2))
    for name in ("vocab.json", "other.txt"):
        with pytest.raises(BadInput, match=f"{name} is JSON, .* name the folder of .*{folder}"):
            Tokenizer.of_file(folder / name)
    for content in ("<!DOCTYPE html>\n<html lang>", "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "list.txt.gz").write_text(content)
        with pytest.raises(
            BadInput, match="list.txt.gz is a web page or a pointer.*fetch it again"
        ):
            Tokenizer.of_file(tmp_path / "list.txt.gz")
