"""What parse() says of flags that were typed: unknown ones, and those that would do nothing."""

from runtime.commandline import BadInput, flag, typed

import contextlib
import dataclasses
import math
import os
import re
import stat
import typing
from pathlib import Path

import torch

MOST = torch.finfo(torch.float32).max
MOST_WHOLE, MOST_SEED = 2**31 - 1, 2**63 - 1
MOST_GUIDANCE = 2.0**24  # above it float32 does not tell 1 + w from w
DASHES = dict.fromkeys([*range(0x2010, 0x2016), 0x2212], "-")  # other dashes, and minus
UNKEPT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters: bytes that are no UTF-8
HANDED_OVER = ("/dev/stdin", "/dev/fd/")
WRITTEN = frozenset({"out", "json"})
TRUTH = frozenset(["true", "false", "yes", "no", "on", "off", "0", "1"])
EVERYWHERE = frozenset({"config", "out", "smoke", "gpus"})  # they have a part in all


def placed(config_class):
    """Names of the settings that are no flags: they are told by their place."""
    kinds = {f.name: f.type for f in dataclasses.fields(config_class)}
    return {name for name, kind in kinds.items() if typing.get_origin(kind) is typing.Annotated}


def check_words(args, config_class):
    """Raise BadInput for a flag in other dashes than two hyphens, and for a switch with a value.

    Word processors and web pages make one long dash of two hyphens, with which a flag would be a
    text: one more of --prompt's.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(config_class)}
    switches = {name for name, kind in kinds.items() if kind is bool}
    places = placed(config_class)
    known = {*kinds} - places | {f"no_{name}" for name in switches}
    for word, after in zip(args, [*args[1:], ""], strict=False):
        name, _, value = word.partition("=")
        plain = name.translate(DASHES)
        setting = plain.lstrip("-").replace("-", "_")
        if not plain.startswith("-"):
            continue
        wrong = f"{name}: two hyphens are in front of a setting"
        if setting not in known:
            hint = closest(f"--{setting}", {*map(flag, known)}) if plain != name else ""
            if hint.removeprefix("; see --help"):
                raise BadInput(wrong + hint)
            continue
        if plain != name or not re.match("--[^-]", plain):
            raise BadInput(f"{wrong}: type {flag(setting)}")
        on = setting if setting in switches else setting.removeprefix("no_")
        value = value or ("" if places else after)
        if on in switches and value.casefold() in TRUTH:
            told = f"a switch takes no value, type {flag(on)} or {flag(f'no_{on}')}"
            raise BadInput(f"{name} {value}: {told}")


def check_typed(cfg, given):
    """Raise BadInput for one of the settings `given` by flags that would do nothing: see Script.

    Also for two tasks at once.
    """
    asked = [name for name in cfg.USES if getattr(cfg, name)]
    if len(asked) > 1:
        raise BadInput(f"{flag(asked[0])} and {flag(asked[1])}: one at a time")
    task = cfg.task()
    known = {field.name for field in dataclasses.fields(cfg)}
    used = known - cfg.IDLE if not task else cfg.USES[task] | set(cfg.USES) | EVERYWHERE
    for name in sorted(given & known - used):
        others = " or ".join(flag(other) for other, part in cfg.USES.items() if name in part)
        told = f"is for {others}" if others else "does nothing here"
        told = f"has no part in {flag(task)}" if task else told
        raise BadInput(f"{flag(name)} {told}: leave it out")
    # What a task reads from a checkpoint may yet give a setting that another one needs.
    check_idle(cfg, [n for n in given if not task or needed(cfg, n)[0] in given], given)


def check_idle(cfg, names, also=()):
    """Raise BadInput for one of these settings, which were typed, that does nothing in cfg.

    But for what is 0 itself, or needs a number that was typed as 0: so a sweep goes through. also:
    further settings that were typed.
    """
    for name in sorted(names):
        other = needed(cfg, name)[0]
        swept = _is_zero(getattr(cfg, name, None))
        swept |= _is_zero(getattr(cfg, other, None)) and bool(other in also or typed((other,)))
        if (why := idle(cfg, name)) and not swept:
            raise BadInput(f"{flag(name)} does nothing {why}: leave it out, or change that")


def _is_zero(value):
    """Whether it is the number 0, or several."""
    numbers = value if isinstance(value, tuple) else (value,)
    return all(number == 0 and not isinstance(number, bool) for number in numbers)


def needed(cfg, name):
    """(setting, values, whether it must be off instead of on) that `name` needs: see Script.

    What it needs in one task, such as --sample, stands under "sample:name".
    """
    needs = cfg.NEEDS.get(f"{cfg.task()}:{name}", cfg.NEEDS.get(name, ""))
    other, _, values = needs.partition("=")
    return other.removeprefix("!"), values, other.startswith("!")


def idle(cfg, name):
    """Why the setting `name` does nothing in cfg: "without --ae vq", "beside --x", or ""."""
    other, values, off = needed(cfg, name)
    if not hasattr(cfg, other):
        return ""
    value = getattr(cfg, other)
    on = any(value) if isinstance(value, tuple) else value
    if off:
        return f"beside {flag(other)}" if on else ""
    on = str(value) in values.split(",") if values else on
    return "" if on else f"without {flag(other)} {values.replace(',', ' or ')}".strip()


def check_within(cfg, names, low, high, what):
    """Raise BadInput for one of these settings, which were typed, that lies outside low .. high.

    The line says `what` low to high is. It rounds them so that what it names is within.
    """
    for name in names:
        if not low <= getattr(cfg, name) <= high:
            within = f"{inwards(low, math.ceil):.3g} to {inwards(high, math.floor):.3g}"
            told = f"{what} {within}; type a number of these, or leave it out"
            raise BadInput(f"{flag(name)} {getattr(cfg, name):g}: {told}")


def inwards(x, way):
    """x >= 0 with three digits, by math.floor or math.ceil; 0 and infinity are themselves."""
    if not 0 < x < math.inf:
        return x
    unit = 10.0 ** (math.floor(math.log10(x)) - 2)
    return way(x / unit) * unit


def beyond(value, most=MOST_WHOLE):
    """Those numbers of a setting, which may hold several, that are too large.

    A float is one that float32 does not hold, a whole number one above `most`.
    """
    numbers = value if isinstance(value, tuple) else (value,)
    limits = {float: MOST, int: most}
    return [v for v in numbers if type(v) in limits and not abs(v) <= limits[type(v)]]


def check_finite(cfg):
    """Raise BadInput for a number that float32 does not hold, unless that is its default.

    Also for whole numbers of more than 31 bits, of a seed of more than 63, and for guidance so
    large that a clamp would hide what becomes of it.
    """
    for name, value in vars(cfg).items():
        if not (bad := beyond(value, MOST_SEED if name == "seed" else MOST_WHOLE)):
            continue
        if isinstance(bad[0], int):
            raise BadInput(
                f"{flag(name)} {_short(bad[0])}: expected a whole number of fewer digits"
            )
        if value != getattr(type(cfg), name, None):
            raise BadInput(f"{flag(name)} {bad[0]:g}: expected a finite number, below {MOST:.1g}")
    if abs(w := getattr(cfg, "guidance", 0.0)) > MOST_GUIDANCE:
        raise BadInput(f"--guidance {w:g}: expected a number up to {MOST_GUIDANCE:.2g}, such as 3")


def _short(number):
    text = str(number)
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text)} digits)"


def check_texts(cfg):
    """Raise BadInput for a text that cannot be kept, and for a device or a pipe that is read.

    It could be neither the name of a file nor a line of config.yaml. A device might never end, and
    a pipe might never begin; what the shell hands over as /dev/stdin or /dev/fd/63 does.
    """
    for name, value in vars(cfg).items():
        for text in filter(UNKEPT.search, map(str, value if isinstance(value, tuple) else [value])):
            told = "type it in UTF-8, without NUL; rename a file whose name is otherwise"
            raise BadInput(f"{flag(name)} {text.encode('unicode_escape').decode()}: {told}")
        if name in WRITTEN or not isinstance(value, str) or value.startswith(HANDED_OVER):
            continue
        with contextlib.suppress(OSError):
            mode = os.stat(value).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BadInput(f"{flag(name)} {value} is a device or a pipe: name a file or folder")


def one_line(box, config_class):
    """tyro explains in a box of many lines; keep what was wrong and add the closest flag.

    Where the terminal's encoding has no such lines, there is no box, and the title has a rule.
    """
    lines = [re.sub(r"^\s*│\s?|\s*│\s*$", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    rules = [i for i, line in enumerate(lines) if re.fullmatch("──+|-{9,}", line)]
    begin = 0 if "╭" in box else rules.pop(0) + 1 if rules else 0
    text = " ".join(lines[begin : rules[0] if rules else len(lines)])
    unknown = re.match(r"Unrecognized options: (--[\w-]+)", text)
    if unknown:
        places = placed(config_class)
        fields = [f for f in dataclasses.fields(config_class) if f.name not in places]
        flags = [flag(f.name) for f in fields]
        flags += [flag(f"no_{f.name}") for f in fields if f.type is bool]
        return f"unknown flag {unknown[1]}{closest(unknown[1], flags)}"
    return wrong_value(text, config_class) or f"{text}; see --help"


def wrong_value(text, config_class):
    """What a setting takes, where tyro's text is on a value that it does not take; else ""."""
    named = re.search(r"(?:argument '|parsing )(--[\w-]+)", text)
    kinds = {flag(f.name): f.type for f in dataclasses.fields(config_class)}
    if not named or named[1] not in kinds:
        return ""
    name, kind = named[1], kinds[named[1]]
    told = re.search(r"choice '(.*)' for|: '(.*)'|: \[(.*)\]", text)
    word = re.sub("', '|^'|'$", " ", next(filter(None, told.groups()), "")).strip() if told else ""
    parts, several = typing.get_args(kind) or (kind,), typing.get_origin(kind) is tuple
    numbers = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}
    taken, hint = numbers.get(parts[0], ("a text", "texts"))[several], ""
    if typing.get_origin(kind) is typing.Literal:
        taken, hint = f"one of {', '.join(map(str, parts))}", near(word, [*map(str, parts)])
    if not word:
        return f"{name}: expected {taken} after it"
    return f"{name} {word}: expected {taken}" + f"; did you mean {hint}?" * bool(hint)


def closest(word, words):
    """A hint at that of the settings `words` which is near to `word`, at scripts, or at --help.

    A setting that other scripts have, by just this name, is no misspelling of one of `words`.
    """
    if of := scripts_with(word, words):
        more = ", ..." * (len(of) > 3)
        return f"; a setting of {', '.join(of[:3])}{more}: see --help"
    found = near(word, words)
    return f"; did you mean {found}?" if found else "; see --help"


def scripts_with(word, words=()):
    """The chapters whose own Config has a setting of this name, such as --ae-steps.

    None for one of `words` that is --no-, but no switch.
    """
    name = word.removeprefix("--").removeprefix("no-").replace("-", "_")
    if not name.isidentifier() or {name, flag(name)} & {*words}:
        return []
    chapters = sorted(Path(__file__).resolve().parent.parent.glob("*.py"))
    line = re.compile(rf"^    {name}: (?!Annotated)[^\n]*=", re.MULTILINE)
    return [path.name for path in chapters if line.search(path.read_text("utf-8"))]


def near(word, words):
    """That of `words` which few edits make of `word`: one, or one in four letters; '' for none.

    One letter of two may differ, the only one may not. Case, dashes and underscores say nothing.
    Else the one that begins so, if there is just one: three letters or more.
    """
    typed_letters, plain = _plain(word), {other: _plain(other) for other in words if _plain(other)}
    far = {other: edits(typed_letters, letters) for other, letters in plain.items()}
    longer = {other: max(len(typed_letters), len(letters)) for other, letters in plain.items()}
    close = [o for o in plain if far[o] <= min(longer[o] - 1, max(1, longer[o] // 4))]
    if close:
        return min(close, key=far.get)
    begun = [other for other, letters in plain.items() if letters.startswith(typed_letters)]
    return begun[0] if len(begun) == 1 and len(typed_letters) > 2 else ""


def _plain(word):
    return re.sub("[-_ ]", "", word.casefold())


def edits(a, b):
    """Letters to change, add, leave out, or swap with the next, each once, to make a of b."""
    before, row = [], list(range(len(b) + 1))
    for i, letter in enumerate(a):
        last, before, row = before, row, [i + 1]
        for j, other in enumerate(b):
            cost = min(before[j] + (letter != other), before[j + 1] + 1, row[j] + 1)
            if i and j and (letter, a[i - 1]) == (b[j - 1], other):
                cost = min(cost, last[j - 1] + 1)
            row.append(cost)
    return row[-1]
