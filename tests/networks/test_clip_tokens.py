"""The tokenizer of prompts equals transformers' CLIPTokenizer, and OpenAI's own on plain text."""

from runtime import processes
from runtime.commandline import BadInput

import gzip
import importlib.util
import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from reference_metrics import import_references

from networks.clip_tokens import BYTES, Tokenizer, clean

START, END = "<|startoftext|>", "<|endoftext|>"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
THUMB = "\U0001f44d\U0001f3fd"
TEXTS = {
    "English": [
        "a photograph of an astronaut riding a horse",
        "A Castle, glowing; (masterpiece:1.2), 8k -- trending on ArtStation!!! #wow @home",
        "antidisestablishmentarianism xqzzkw e-mail foo_bar C++ 3.14159 1,000,000 $5 50%",
    ],
    "contractions": ["it's I'm we're they've he'll she'd don't", "IT'S DON'T 'tall o'clock 'S !'s"],
    "emoji": [f"{FAMILY}{THUMB} \u2764\ufe0f a\U0001f600b", "\U0001f1fa\U0001f1f3 1\ufe0f\u20e3"],
    "flags of tags": ["\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"],
    "CJK": [
        "一只猫坐在窗前。東京タワーの夜景",
        "서울의 봄 \u1109\u1165\u110b\u116e\u11af",
        "ｆｕｌｌ　ｗｉｄｔｈ",
    ],
    "Arabic": ["قِطَّةٌ عَلَى السَّطْحِ ٱلْقَمَر", "ا\u0653\u0655 \u0644\u0651\u064e\u0644\u064e\u0651"],
    "Hebrew": ["שָׁלוֹם עֲלֵיכֶם", "\u05e9\u05bc\u05c1\u05b8 \ufb2c \u05e9\u05c1\u05bc"],
    "accents": [
        "Ça café naïve Ångström \u212b \u1e69",
        "Ca\u0327 cafe\u0301 A\u030a s\u0307\u0323 \u0301a",
    ],
    "case": ["ΟΔΥΣΣΕΥΣ Σ ΑΣ. İstanbul I ı ẞ ß ﬁ Ǆ K ſ", "Straße ÀÉÎÕÜ ДОМ ԱԲԳ \U00010400"],
    "controls": [
        "a\x00b \x01\x7f \x1b[31m a\x1cb\x1d\x1e\x1fc \x80 \x9f",
        "\x00",
        "\ufffd\ufffe\uffff",
    ],
    "zero width": [
        "a\u200bb\u200c\u200d\u2060c\ufeff \u00adsoft \u180e",
        "\u202eright\u202c \u2066x",
    ],
    "white space": [
        "  a \t\n\r\x0b\x0c b\u00a0c\u3000d\u2028e\u2029f\x85g\u1680h\u2007  ",
        "\n",
        " ",
    ],
    "numbers": ["١٢٣ ४५ ५ 四五 ⅧⅨ ½ ② x² 10³ 𝟘𝟙 \U00010107 ៣", "1st 2nd 42 007 1a2b"],
    "html": ["&amp; &lt;b&gt; &amp;amp; &#39; &eacute; <p>text</p> </w> a</w>b"],
    "special tokens": [
        f"a {END} b{START}c {START}{END}",
        f"{END}!! !!{END}!! {END}'s <|end{END} <|endoftext| >",
        "<|STARTOFTEXT|> <|EndOfText|>!! !!<|ENDOFTEXT|>!!",
        f"e{END}\u0301 \u00a0{END}\u3000x Α{START}Σ",
    ],
    "mathematics": ["∀x∈ℝ: ⌈x⌉ ≠ \u2260 =\u0338 ∑ √2 𝔸𝕓", "¯\\_(ツ)_/¯ ░▒▓ ♥ © ® ™ ¿¡"],
    "empty": ["", "\u3000 \t"],
}


@pytest.fixture(scope="module")
def published():
    """OpenAI's list of merges: a package ships it."""
    found = importlib.util.find_spec("clip")  # does not import it
    path = Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz") if found else Path()
    if not path.is_file():
        pytest.skip("clip-anytorch, whose vocabulary this reads, is not installed")
    return path


@pytest.fixture(scope="module")
def tok(published):
    return Tokenizer.of_file(published)


@pytest.fixture(scope="module")
def theirs_of():
    """transformers' class."""
    import_references()
    return pytest.importorskip("transformers").CLIPTokenizer


def write_folder(folder, tokens, merges):
    """vocab.json and merges.txt as they lie in the folder of a pipeline; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    """The published vocabulary in transformers' two files, written without our code."""
    merges = gzip.decompress(published.read_bytes()).decode().split("\n")[1:48895]
    printed = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    symbols = [*map(chr, printed), *(chr(256 + i) for i in range(256 - len(printed)))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    return write_folder(tmp_path_factory.mktemp("clip") / "tokenizer", tokens, merges)


@pytest.fixture(scope="module")
def theirs(folder, theirs_of):
    return theirs_of(str(folder / "vocab.json"), str(folder / "merges.txt"))


def ids(theirs, texts):
    """What transformers makes of each text, without start and end."""
    return theirs(texts, add_special_tokens=False).input_ids


def assert_same(tok, theirs, texts):
    for text, expected in zip(texts, ids(theirs, texts), strict=True):
        assert tok.encode(text) == expected, ascii(text)


# --------------------------------------------------------------------------- equal to transformers


def test_files_and_folders_give_the_published_vocabulary(tok, theirs, folder, published, tmp_path):
    unpacked = tmp_path / "vocabulary.txt"
    unpacked.write_bytes(gzip.decompress(published.read_bytes()))
    theirs.save_pretrained(tmp_path / "five")  # tokenizer.json, and neither of the two
    assert not (tmp_path / "five" / "vocab.json").exists()
    forms = [Tokenizer.of_file(unpacked), Tokenizer.of_folder(folder)]
    forms += [Tokenizer.of_folder(folder.parent), Tokenizer.of_folder(str(tmp_path / "five"))]
    assert len(tok) == 49408 and (tok.start, tok.end) == (49406, 49407)
    for form in [tok, *forms]:
        assert form.vocabulary == theirs.get_vocab()
        assert form.ranks == tok.ranks and len(form.ranks) == 48894


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_have_the_ids_of_transformers(kind, tok, theirs):
    assert_same(tok, theirs, TEXTS[kind])
    rows = theirs(TEXTS[kind], padding="max_length", max_length=77, truncation=True)
    assert torch.equal(tok(TEXTS[kind]), torch.tensor(rows.input_ids))


def test_the_ids_that_the_docstring_shows(tok):
    assert tok.encode("glowing") == [18437] and tok.encode("moonlit") == [6334, 4350]
    row = tok(["Moonlit"], length=6)
    assert row.dtype == torch.int64 and row.tolist() == [[49406, 6334, 4350, 49407, 49407, 49407]]


def known_characters():
    """What this Python's Unicode has, without halves of surrogate pairs."""
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]


def late_marks(characters):
    """What transformers does not put in order or join, for its table of accents is of Unicode 9."""
    from tokenizers import normalizers

    join, late = normalizers.NFC().normalize_str, set()
    for c in characters:
        parts = unicodedata.normalize("NFD", c)
        text = f"a{c}\u0334" if unicodedata.combining(c) else parts
        if text != c and join(text) != unicodedata.normalize("NFC", text):
            late |= {c, *parts}
    return late


def test_random_texts_of_all_of_unicode(tok, theirs):
    known = known_characters()
    late = late_marks(known)
    old = unicodedata.ucd_3_2_0  # what Unicode 3.2 had is not late
    assert len(late) < 200 and all(old.category(c) == "Cn" for c in late)
    pool = [c for c in known if c not in late]
    scripts = {}
    for c in pool:
        scripts.setdefault(unicodedata.name(c, "NONE").split()[0], []).append(c)
    scripts = [script for script in scripts.values() if len(script) > 3]
    bits = [text for texts in TEXTS.values() for text in texts] + ["'s", "'RE", "<|", "|>", " "]
    words = [token.removesuffix("</w>") for token in tok.vocabulary if token.isascii()]
    rng, texts = random.Random(17), []
    for _ in range(1000):
        script = rng.choice(scripts)
        texts.append("".join(rng.choices(pool, k=rng.randint(1, 30))))
        texts.append("".join(rng.choices(script, k=rng.randint(1, 20))))
        texts.append("".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(9)))
        sources = [rng.choice([bits, words, pool, script]) for _ in range(rng.randint(1, 12))]
        mixed = "".join(map(rng.choice, sources))
        mixed = unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKD"]), mixed)
        texts.append("".join(c for c in mixed if c not in late))
    assert_same(tok, theirs, texts)
    assert_same(tok, theirs, sorted(f"a{c}" for c in late))  # alone they are equal, too


def test_merges_in_any_order_are_applied_as_transformers_applies_them(theirs_of):
    """No training wrote these lists: a later pair may come first, two pairs may make one token."""
    rng = random.Random(3)
    for _ in range(30):
        tokens = ["a", "b", "c", "a</w>", "b</w>", "c</w>"]
        merges = []
        while len(merges) < 12:
            a = rng.choice([token for token in tokens if not token.endswith("</w>")])
            b = rng.choice(tokens)
            if (a, b) not in merges and len(a + b) < 12:
                merges.append((a, b))
                tokens += [a + b] if a + b not in tokens else []
        rng.shuffle(merges)
        vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
        tok, theirs = Tokenizer(vocabulary, merges), theirs_of(vocabulary, merges)
        assert_same(tok, theirs, ["".join(rng.choices("abc", k=k)) for k in range(1, 40)])


def test_bytes_that_a_small_vocabulary_lacks_are_the_end_as_in_transformers(theirs_of):
    vocabulary = {START: 0, END: 1, "a": 2, "b</w>": 3, "ab</w>": 4}
    tok, theirs = Tokenizer(vocabulary, [("a", "b</w>")]), theirs_of(vocabulary, [("a", "b</w>")])
    assert tok.encode("ab xab é") == [4, 1, 4, 1, 1]
    assert_same(tok, theirs, ["ab xab é", "ba", "a"])


def test_half_of_a_surrogate_pair_is_refused(tok, theirs):
    for text in ("a\ud83d", "\udcff"):
        with pytest.raises(BadInput, match=f"half of a character, U\\+{ord(text[-1]):X}: type"):
            tok([text])
        with pytest.raises(TypeError):
            ids(theirs, [text])


# ------------------------------------------------------------------------- long texts, and the way


def test_a_long_prompt_is_cut_and_the_words_cut_off_are_said_once(tok, theirs, capsys, monkeypatch):
    monkeypatch.setattr(processes, "SAID", set())
    text = " ".join(f"{noun} {i}" for i, noun in enumerate(["castle", "moonlit", "fox"] * 50))
    rows = tok([text, "a castle", text])
    again = tok([text])
    expected = theirs([text], padding="max_length", max_length=77, truncation=True).input_ids
    assert rows.shape == (3, 77) and torch.equal(rows[2], rows[0])
    assert rows[:1].tolist() == again.tolist() == expected
    assert rows[1].tolist() == [49406, 320, 3540] + [49407] * 74
    line, nothing = capsys.readouterr().out.split("\n")
    words, seen = [word for word, _ in tok.spell(text)], len(tok.words(text))  # the last is whole
    assert [w for w, _ in tok.words(text)] == words[:seen] and nothing == ""
    assert f"{len(tok.encode(text))} tokens long, and 75 are read" in line
    assert repr(" ".join(words[seen : seen + 20])) in line
    assert f"and {len(words) - seen - 20} more" in line


def test_the_limit_is_exact_and_a_word_that_is_cut_in_two_is_named(tok, capsys, monkeypatch):
    monkeypatch.setattr(processes, "SAID", set())
    assert tok(["a fox"], length=4).tolist() == [[49406, 320, 3240, 49407]]
    assert capsys.readouterr().out == ""
    assert tok(["a Moonlit"], length=4).tolist() == [[49406, 320, 6334, 49407]]
    assert capsys.readouterr().out.endswith("without these words: 'moonlit'\n")
    assert tok.words("a Moonlit fox", length=4) == [("a", [1]), ("moonlit", [2])]
    assert tok.words("a Moonlit fox") == [("a", [1]), ("moonlit", [2, 3]), ("fox", [4])]


def decoded(tok, ids):
    """The words that ids spell: the inverse of encode, but for the spaces between words."""
    tokens, bytes_of = {i: t for t, i in tok.vocabulary.items()}, {s: b for b, s in BYTES.items()}
    words, word = [], b""
    for i in ids:
        ends = tokens[i].endswith("</w>") or i >= tok.start
        text = tokens[i].removesuffix("</w>") if len(tokens[i]) > 4 else tokens[i]
        word += text.encode() if i >= tok.start else bytes(bytes_of[c] for c in text)
        if ends:
            words.append(word.decode())
            word = b""
    assert word == b""  # every word is ended
    return words


@pytest.mark.parametrize("kind", TEXTS)
def test_ids_spell_the_cleaned_text(kind, tok):
    for text in TEXTS[kind]:
        words = tok.words(text, length=9999)
        positions = [i for _, places in words for i in places]
        assert positions == list(range(1, 1 + len(tok.encode(text))))
        assert decoded(tok, tok.encode(text)) == [word for word, _ in words]
        if END not in text and START not in text:
            assert "".join(word for word, _ in words) == clean(text).replace(" ", "")


def test_cleaning():
    assert clean(" A\u030a\u00a0\n\x85B\u3000ΑΣ\x1c\u0130 ") == " å b ας\x1ci\u0307 ".replace(
        "ς", "σ"
    )


def test_characters_that_python_does_not_know_are_spelled_byte_by_byte(tok):
    unknown = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == "Cn"]
    for c in random.Random(5).sample(unknown, 200):
        assert decoded(tok, tok.encode(f"a {c}!")) == ["a", c + "!"]


# --------------------------------------------------------------------------------- equal to OpenAI


@pytest.fixture(scope="module")
def openai(published):
    """OpenAI's SimpleTokenizer, from its file alone: the package imports torchvision."""
    for needed in ("ftfy", "regex"):
        pytest.importorskip(needed)
    path = published.with_name("simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(published))


def test_plain_text_has_the_ids_of_openai(tok, openai):
    assert openai.encoder == tok.vocabulary and openai.bpe_ranks == tok.ranks
    kinds = ("English", "contractions", "CJK", "accents", "numbers", "empty")
    texts = [text for kind in kinds for text in TEXTS[kind]]
    texts = [text for text in texts if "ｆ" not in text]  # ftfy makes it an f
    texts.append(TEXTS["special tokens"][0])
    rng = random.Random(8)
    words = [token.removesuffix("</w>") for token in tok.vocabulary if token.isascii()]
    words = [word for word in words if "&" not in word and "|" not in word]
    texts += [" ".join(rng.choices(words, k=10)) for _ in range(500)]
    for text in texts:
        assert tok.encode(text) == openai.encode(text), ascii(text)


@pytest.mark.parametrize(
    "text",
    [
        "\u201ccurly\u201d",
        "&amp;",
        "ΟΔΟΣ",
        "<|ENDOFTEXT|>",
        "!<|endoftext|>",
        "ﬁsh",
        "Ａ",
        "a\x00b",
    ],
)
def test_where_openai_differs_it_is_transformers_that_is_followed(text, tok, theirs, openai):
    assert openai.encode(text) != tok.encode(text) == ids(theirs, [text])[0]


# --------------------------------------------------------------------------------------- bad input


def test_a_shorter_list_of_merges_makes_a_smaller_vocabulary(tmp_path):
    path = tmp_path / "small.txt.gz"
    path.write_bytes(gzip.compress(b'"small#version: 0.2\nc a\nca t</w>\n'))
    tok = Tokenizer.of_file(path)
    assert len(tok) == 516 and (tok.start, tok.end) == (514, 515)
    assert tok.encode("CAT ca") == [513, ord("c") - 33, 256 + ord("a") - 33]


NAMES = (START.encode(), END.encode())
WHOLE = [START, END, "a", "b</w>", "ab</w>"]


@pytest.mark.parametrize(
    "tokens, merges, told",
    [
        (["a", START], [], r"tokenizer is not CLIP's: <\|endoftext\|> must be in it"),
        (WHOLE, ["a b</w>", "b</w> a"], r"tokenizer lacks 'b</w>a', which its merge 'b</w>' 'a'"),
        (WHOLE, ["x y"], "lacks 'x', which"),
        (WHOLE, ["a b</w>", "a"], r"merges\.txt: expected two tokens in merge 3, got 'a'"),
        (WHOLE, ["a b</w> c"], r"merges\.txt: expected two tokens in merge 2, got 'a b</w> c'"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(tokens, merges, told, tmp_path):
    folder = write_folder(tmp_path / "tokenizer", tokens, merges)
    with pytest.raises(BadInput, match=told):
        Tokenizer.of_folder(tmp_path)
    assert Tokenizer.of_folder(write_folder(folder, WHOLE, [])).encode("ab") == [2, 3]


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("vocab.json", None, r"vocab\.json cannot be read: No such file"),
        ("merges.txt", None, r"merges\.txt cannot be read: No such file"),
        ("vocab.json", b'{"\xff": 1}', r"vocab\.json is not UTF-8 text \(byte 2\)"),
        ("merges.txt", b"a \xff\n", r"merges\.txt is not UTF-8 text \(byte 2\)"),
        ("vocab.json", b'{"a": 1', r"vocab\.json is no JSON"),
        ("vocab.json", b"[" * 100000, r"vocab\.json is no JSON"),
        ("vocab.json", b"[1]", r"vocab\.json must hold a dictionary, got a list"),
        ("vocab.json", b'{"a": "b"}', r"vocab\.json is no vocabulary: expected a whole number"),
        ("vocab.json", b'{"a": true}', r"vocab\.json is no vocabulary"),
        ("vocab.json", b'{"%s": 0, "%s": 2}' % NAMES, r"number its tokens 0 \.\.\. 1, each once"),
        ("vocab.json", b'{"%s": 0, "%s": 0}' % NAMES, "each once"),
    ],
)
def test_a_damaged_folder_is_refused(name, content, told, tmp_path):
    folder = write_folder(tmp_path / "tokenizer", WHOLE, ["a b</w>"])
    path = folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadInput, match=told) as refused:
        Tokenizer.of_folder(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "model, told",
    [
        (None, "no byte-pair encoding"),
        ({"type": "WordLevel", "vocab": {}}, "no byte-pair encoding"),
        ({"vocab": [], "merges": []}, "no vocabulary"),
        ({"vocab": {t: i for i, t in enumerate(WHOLE)}, "merges": [3]}, "merge 1, got '3'"),
        ({"vocab": {t: i for i, t in enumerate(WHOLE)}, "merges": [["a", 3]]}, "two tokens"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(model, told, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(BadInput, match=rf"tokenizer\.json.*{told}"):
        Tokenizer.of_folder(tmp_path)
    whole = {"vocab": {t: i for i, t in enumerate(WHOLE)}, "merges": ["a b</w>"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": whole}))
    assert Tokenizer.of_folder(tmp_path).encode("ab") == [4]


@pytest.mark.parametrize(
    "damage", ["torn", "changed", "no blocks", "header", "other", "absent", "folder"]
)
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    whole = gzip.compress(b"#version\n" + b"\n".join(b"%c x" % c for c in b"abcdefghijk"))
    changed = bytearray(whole)
    changed[20] ^= 0xFF
    content, told = {
        "torn": (whole[:-9], "is a damaged gzip file"),
        "changed": (bytes(changed), "is a damaged gzip file"),
        "no blocks": (whole[:10] + b"\xff" * 30, "is a damaged gzip file"),
        "header": (whole[:5], "is a damaged gzip file"),
        "other": (b"PK\x03\x04\xff\xfe", "is not UTF-8 text"),
        "absent": (None, "cannot be read: No such file"),
        "folder": (None, "cannot be read: Is a directory"),
    }[damage]
    if content:
        path.write_bytes(content)
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(BadInput, match=f"^{re.escape(str(path))} {told}"):
        Tokenizer.of_file(path)
