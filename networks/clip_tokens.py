"""Text -> token ids: byte-pair encoding, as CLIP reads the prompts of Stable Diffusion.

Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016
(arXiv:1508.07909), section 3.2: byte-pair encoding.
Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, section 2.2:
bytes in place of characters, so that 256 symbols write every text.
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP),
2021 (arXiv:2103.00020), section 2.4: lower case, 49,152 symbols and two that frame the text.

A network wants numbers. One number for each word would need endless words, one for each byte makes
long rows. So common words are one token, rare ones several, and training found where to cut: begin
with single bytes, join the pair of neighbours that is most frequent in a large text, write it down,
and again, 48,894 times. That list of merges is the tokenizer. A new word is joined by the same
merges in the order of the list; </w> marks the symbol that ends a word, so that "art" in "artful"
and "art" alone are two tokens:

    "a castle, glowing"     words:  a  castle  ,  glowing
    glowing     g l o w i n g</w>       merge 1 of the list is "i n": no other pair comes earlier
                g l o w in g</w>        8: "in g</w>"
                g l o w ing</w>         38: "l o"
                g lo w ing</w>          538: "lo w"
                g low ing</w>           7772: "low ing</w>"
                g lowing</w>            17926: "g lowing</w>"
                glowing</w>             one token, 18437
    moonlit     moon lit</w>            two, for no merge joins them: 6334 4350

    tok = Tokenizer.of_folder("stable-diffusion-v1-5")      or .of_file("bpe_simple_vocab_16e6...")
    tokens = tok(["a castle, glowing"])     (1,77): 49406, the ids, 49407 as often as there is room

The ids are those of transformers' CLIPTokenizer, version 5, except for what nobody types:
characters younger than the Unicode of the Python that runs (3.10: version 13, of 2020) are neither
letters nor numbers here and keep their case; where one letter has two accents, and one of them is
younger than Unicode 9, the two are put in order here and not there; and half of a surrogate pair is
refused in one line. Special tokens in capitals are plain text; transformers reads them so, too,
unless a tokenizer_config.json marks them as "normalized".

OpenAI's own tokenizer differs on what ftfy repairs (it makes curly quotes straight, takes ligatures
and full-width letters apart, drops control characters) and on html ("&amp;" is "&" there); it
lowers a Greek final sigma to another letter, takes special tokens in capitals, too, and misses them
right after another symbol.
"""

from runtime.commandline import BadInput
from runtime.files import check_file
from runtime.limits import read_whole
from runtime.processes import say_once

import gzip
import json
import math
import re
import unicodedata
import zlib
from itertools import pairwise
from pathlib import Path

import torch

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
FILES = ("vocab.json", "merges.txt", "tokenizer.json")
ADDED = ("added_tokens.json", "tokenizer_config.json")
MERGES = 48894  # of CLIP's vocabulary; with 512 symbols of bytes and the 2 special tokens 49,408
FIXED = re.compile(rf"{'|'.join(map(re.escape, SPECIAL))}|'s|'t|'re|'ve|'m|'ll|'d")
RUN = re.compile("L+|N|S+| ")
SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode's White_Space; Python counts four separators more


def byte_symbols():
    """{byte: a character that can be seen}, in the order of the vocabulary.

    Bytes that Latin-1 prints stand for themselves, the other 68 for the characters from 256 on: so
    no symbol is a space or a line break, and a list of merges is plain text.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTES = byte_symbols()


def clean(text):
    """Accents joined to their letters (NFC), each run of white space one blank, lower case."""
    text = SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(map(str.lower, text))  # one by one: a Greek final sigma depends on its word


def kind(character):
    """L: a letter, N: a number, S: any other symbol, " ": white space."""
    if SPACE.match(character):
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "S"


def split(text):
    """Cleaned text as words: runs of letters, single digits, runs of symbols, 's, 't, 're ..."""
    kinds, i, words = "".join(map(kind, text)), 0, []
    while i < len(text):
        end = (FIXED.match(text, i) or RUN.match(kinds, i)).end()
        if kinds[i] != " ":
            word = text[i:end]  # a special token that was typed in capitals is three words
            words += [word[:2], word[2:-2], word[-2:]] if word in SPECIAL else [word]
        i = end
    return words


def any_of(words):
    """A pattern of one group that finds any of these words, the longest of those that begin alike.

    The text's other parts lie between them in what its split returns.
    """
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class Tokenizer:
    """tok(texts) -> int64 (B,77): start, a text's tokens, and the end as often as there is room.

    vocabulary  {token: id}, ids 0 ... n-1, with <|startoftext|> and <|endoftext|>
    merges      pairs of tokens, the first learned first
    source      what these came from, for BadInput where they do not fit together
    added       {token: (id, exact)} of words that are one token each, such as those that textual
                inversion (Gal et al. 2022, arXiv:2208.01618) teaches the text encoder. They are
                looked for before a text is split; as it was typed if exact, else as it is cleaned
    """

    def __init__(self, vocabulary, merges, source="the vocabulary", added=()):
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise BadInput(f"{source} is not CLIP's: {' and '.join(missing)} must be in it")
        for token, (i, _) in dict(added).items():
            if vocabulary.get(token, i) != i:
                raise BadInput(
                    f"{source} numbers {token!r} {vocabulary[token]}, and {i} where it is added"
                )
        added = {token: told for token, told in dict(added).items() if token not in SPECIAL}
        vocabulary = vocabulary | {token: i for token, (i, _) in added.items()}
        if set(vocabulary.values()) != set(range(len(vocabulary))):
            raise BadInput(
                f"{source} must number its tokens 0 ... {len(vocabulary) - 1}, each once"
            )
        for a, b in merges:
            if lacking := [token for token in (a, b, a + b) if token not in vocabulary]:
                raise BadInput(f"{source} lacks {lacking[0]!r}, which its merge {a!r} {b!r} needs")
        self.vocabulary = vocabulary
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = (vocabulary[token] for token in SPECIAL)
        self.exact = {token: vocabulary[token] for token in SPECIAL}
        self.exact |= {token: i for token, (i, exact) in added.items() if exact}
        self.added = {clean(token): i for token, (i, exact) in added.items() if not exact}
        self.patterns = any_of(self.exact), any_of(self.added)

    @classmethod
    def of_folder(cls, path):
        """Of a tokenizer's folder, or of a pipeline's: vocab.json + merges.txt, or tokenizer.json.

        The last is what transformers 5 writes. Tokens that were added to the vocabulary are read,
        too; if a word of textual inversion has several, "<cat>" and "<cat>_1", all are to be typed.
        BadInput, naming the file, where one is missing or holds something else.
        """
        folder = Path(path)
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        vocabulary, merges, whole = map(folder.joinpath, FILES)
        if whole.exists() and not (vocabulary.exists() and merges.exists()):
            model = read_object(whole).get("model")
            if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
                raise BadInput(f"{whole} holds no byte-pair encoding: expected model.merges in it")
            ids, added = check_ids(model.get("vocab"), whole), added_tokens(whole)
            return cls(ids, pairs(model["merges"], whole), whole, added)
        ids = check_ids(read_object(vocabulary), vocabulary)
        added = {}
        for name in ADDED:
            added |= added_tokens(folder / name) if (folder / name).is_file() else {}
        return cls(ids, pairs(read_text(merges).split("\n"), merges), folder, added)

    @classmethod
    def of_file(cls, path):
        """Of OpenAI's bpe_simple_vocab_16e6.txt.gz, packed or not: its first 48,894 merges.

        A shorter list makes a smaller vocabulary. BadInput, naming the file, where it is missing or
        damaged.
        """
        symbols, text = list(BYTES.values()), read_text(path)
        if re.match(r'\{\s*"', text):
            raise BadInput(
                f"{path} is JSON, not a list of merges: name the folder of vocab.json and "
                f"merges.txt, {Path(path).parent}"
            )
        if text.startswith("<") or "git-lfs" in text[:40]:
            raise BadInput(f"{path} is a web page or a pointer of Git LFS: fetch it again")
        merges = pairs(text.split("\n"), path)[:MERGES]
        tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges]
        return cls({token: i for i, token in enumerate([*tokens, *SPECIAL])}, merges, path)

    def __len__(self):
        return len(self.vocabulary)

    def join(self, word):
        """A word as tokens: its bytes; of all neighbours those learned first are joined; again."""
        *first, last = (BYTES[byte] for byte in word.encode())
        tokens = [*first, last + "</w>"]
        ranks = [self.ranks.get(pair, math.inf) for pair in pairwise(tokens)]
        while (rank := min(ranks, default=math.inf)) < math.inf:
            i = ranks.index(rank)  # of equal pairs the leftmost
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            del ranks[i]
            for j in range(max(i - 1, 0), min(i + 1, len(ranks))):  # the new token's own pairs
                ranks[j] = self.ranks.get((tokens[j], tokens[j + 1]), math.inf)
        return tokens

    def spell(self, text):
        """[(word of the cleaned text, its ids)]; a special or added token is a word, too.

        What the vocabulary lacks is read as the end, as transformers does. BadInput for half of a
        surrogate pair.
        """
        if half := re.search("[\ud800-\udfff]", text):
            raise BadInput(
                f"the prompt holds half of a character, U+{ord(half[0]):X}: type the whole one, "
                "or save the file of prompts as UTF-8"
            )
        words = []
        for typed in self.patterns[0].split(text):
            if typed in self.exact:
                words.append((typed, [self.exact[typed]]))
                continue
            for part in self.patterns[1].split(clean(typed)):
                if part in self.added:
                    words.append((part, [self.added[part]]))
                    continue
                for word in split(part):
                    ids = [self.vocabulary.get(token, self.end) for token in self.join(word)]
                    words.append((word, ids))
        return words

    def encode(self, text):
        """The ids of a text, without start and end."""
        return [i for _, ids in self.spell(text) for i in ids]

    def words(self, text, length=77):
        """[(word of the cleaned text, its positions in the row of tok([text], length))].

        Words of which the row holds nothing are left out.
        """
        found, first = [], 1  # the start is 0
        for word, ids in self.spell(text):
            end = min(first + len(ids), length - 1)
            if first < end:
                found.append((word, list(range(first, end))))
            first += len(ids)
        return found

    def __call__(self, texts, length=77):
        """int64 (B,length), length >= 2. Long texts are cut; a line names the words cut off."""
        rows = []
        for text in texts:
            row, cut = [self.start], []
            for word, ids in self.spell(text):
                row += ids
                cut += [word] if len(row) >= length else []
            if cut:
                rest = f" and {len(cut) - 20} more" if len(cut) > 20 else ""
                say_once(
                    f"note: a prompt is {len(row) - 1} tokens long, and {length - 2} are read; "
                    f"without these words: {' '.join(cut[:20])!r}{rest}"
                )
            row = row[: length - 1]
            rows.append(row + [self.end] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.int64)


# ------------------------------------------------------------------------------ reading the files


def read_text(path):
    """The text of a UTF-8 file, packed with gzip or not; BadInput where it is none."""
    check_file(path)
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                data = read_whole(file, path)
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): fetch it again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def read_object(path):
    """The dictionary in a .json file; BadInput where it holds none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a dictionary, got a {type(value).__name__}")
    return value


def check_ids(vocabulary, path):
    """vocabulary, {token: id}; BadInput where it is anything else."""
    if not isinstance(vocabulary, dict) or {type(i) for i in vocabulary.values()} - {int}:
        raise BadInput(f"{path} is no vocabulary: expected a whole number for each token")
    return vocabulary


def added_tokens(path):
    """{token: (id, exact)} that a tokenizer.json, tokenizer_config.json or added_tokens.json adds.

    BadInput, naming the token, for what is none, and for those that are found as whole words alone.
    """
    told = read_object(path)
    if path.name == "added_tokens.json":
        entries = [{"content": token, "id": i} for token, i in told.items()]
    elif path.name == "tokenizer.json":
        entries = told.get("added_tokens") or []
    else:
        entries = told.get("added_tokens_decoder") or {}
        if isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values()):
            whole = {i: int(i) for i in entries if i.isdecimal() and len(i) < 10}
            entries = [e | {"id": whole.get(i, i)} for i, e in entries.items()]
    added = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {"content": entry}
        token, i = entry.get("content"), entry.get("id")
        if not isinstance(token, str) or not token or type(i) is not int:
            raise BadInput(f"{path}: added token {str(token)[:40]!r} must be text with a whole id")
        if entry.get("single_word"):
            raise BadInput(f"{path}: added token {token!r}: single_word true is not supported")
        added[token] = i, not entry.get("normalized", True)
    return added


def pairs(lines, path):
    """[(token, token)] of lines "a b", or of lists of two; a header and empty lines are none.

    BadInput for anything else.
    """
    found, header = [], bool(lines) and "#version" in str(lines[0])
    for number, line in enumerate(lines[header:], 1 + header):
        pair = line.split() if isinstance(line, str) else line
        if pair == []:
            continue
        if not isinstance(pair, list) or [type(token) for token in pair] != [str, str]:
            raise BadInput(f"{path}: expected two tokens in merge {number}, got {str(line)[:40]!r}")
        found.append(tuple(pair))
    return found
