"""Which class is meant by a word of --classes, and what is said of one that is not there."""

from runtime.commandline import BadInput
from runtime.typed_flags import near

import math
import re
import unicodedata


def class_index(part, names, aliases=()):
    """The index into the list `names` that `part` means: a name, an alias, or else an index.

    aliases: other names -> index. Names are compared in Unicode's composed form, in which no two
    look alike. Where a name is a number that is not its own index, numbers are names and nothing
    else. Raises BadInput with the choice for what is not there, and for a name of two classes.
    """
    known = {} if _numbered_otherwise(names) else {str(i): i for i in range(len(names))}
    known |= dict(aliases) | {_composed(name): i for i, name in enumerate(names)}
    known |= {name: i for i, name in enumerate(names)}
    if names.count(part) > 1:
        found = [str(i) for i, name in enumerate(names) if name == part]
        raise BadInput(f"--classes {part}: {' and '.join(found)} have this name; type the number")
    index = known.get(part, known.get(_composed(part)))
    if index is None:
        wrong = f"--classes {_shown(part)}: there is {_choice(names)}"
        raise BadInput(wrong + _hint(part, names, known))
    return index


def _composed(text):
    return unicodedata.normalize("NFC", text)


def _shown(text):
    """`text` in one line; in quotes where it is no part of a list as it stands."""
    plain = text.isprintable() and text == text.strip() and "," not in text
    return text[:60] if plain else repr(text)[:60]


def _number(text):
    """The number that a text says, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numbered_otherwise(names):
    """Whether a name is a number, but not that of its place."""
    return any(_number(name) not in (None, i) for i, name in enumerate(names))


def _choice(names, most=20):
    """'0 cat, 1 dog', without an index that would be taken for a name."""
    alone = _numbered_otherwise(names) or all(name == str(i) for i, name in enumerate(names))
    shown = ["" if alone else f"{i} " for i in range(len(names))][:most]
    shown = [index + _shown(name) for index, name in zip(shown, names, strict=False)]
    return (", ".join(shown) or "no class") + " ..." * (len(names) > most)


def _hint(part, names, known):
    """What may have been meant; known: {what can be typed: index}."""
    if ends := re.fullmatch(r"(\d{1,4})-(\d{1,4})", part):
        pieces = [str(i) for i in range(int(ends[1]), int(ends[2]) + 1)]
        shown = ",".join(pieces[:3] + ["..."] * (len(pieces) > 4) + pieces[3:][-1:])
        typed = f"; type {shown}" if pieces and known.keys() >= set(pieces) else ""
        return f"{typed}; a range is not taken"
    if len(pieces := part.split()) > 1 and known.keys() >= set(pieces):
        return f"; type {','.join(pieces)}"
    if part.casefold() == "all":
        return "; leave --classes out for all"
    plain, value = part.casefold().strip(), _number(part)
    alike = [name for name in names if name.casefold().strip() == plain]
    alike += [name for name in names if name.split(",")[0].strip() == part]
    alike += [name for name in names if value is not None and _number(name) == value]
    alike += [found] if value is None and (found := near(part, names)) else []
    if not alike:
        told = value is not None and _numbered_otherwise(names)
        return "; where names are numbers, a number is a name" if told else ""
    meant, index = f"; did you mean {_shown(alike[0])}?", names.index(alike[0])
    if _shown(alike[0]) == alike[0]:
        return meant
    by_number = known.get(str(index)) == index
    return f"{meant} type {index}" if by_number else f"{meant} that cannot be typed: rename it"
