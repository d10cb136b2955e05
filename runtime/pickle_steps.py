"""Pickles read instruction by instruction: nothing that a file names is looked up or called.

Python's own reader imports what a file names and calls it, and what numpy does with a state that a
file gives can read or write any memory. Here a name is a text, and each reader says what stands for
a call of the few names that it knows. Instructions are counted, lengths compared with what is
there, and so is what calls are given, which may be one long text again and again: a file cannot
take more memory than a few times its own size, and some hundred bytes for each instruction.
"""

from runtime.commandline import BadInput

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
MOST_GIVEN = 4  # times the bytes that were read, and a megabyte: what calls may be given so far


@dataclass(slots=True)
class Name:
    """A function or class that the file names, by that name only."""

    name: str


@dataclass(frozen=True)
class Kind:
    """What a kind of pickle may hold.

    what: its name in messages. names: those that may be in it. described(name, arguments): what
    stands for the result of a call. completed(value, state): gives that the state that follows it.
    longest: so many instructions at most.
    """

    what: str
    names: frozenset
    described: Callable
    completed: Callable
    longest: int


def shown(value):
    """A text of a file, short and on one line, and of all else its type.

    Of some hundred bytes that name each other a repr has more letters than there is memory.
    """
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _length(given):
    """How many letters and bytes a call is given: what it makes of them is no longer."""
    given = given if isinstance(given, tuple) else (given,)
    return sum(len(one) for one in given if isinstance(one, str | bytes | bytearray))


def read_steps(stream, kind):
    """What a pickle of this Kind describes, in plain containers and what stands for its calls.

    stream: its bytes, at hand as a whole, so that a length beyond their end reserves no memory.
    BadInput for what the Kind has not; torn ones raise nearly anything.
    """
    stack, marks, memo, given = [], [], {}, 0

    def after_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(n):
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return tuple(items)

    def give(arguments, position):
        nonlocal given
        given += _length(arguments)
        if given > MOST_GIVEN * position + 1_000_000:
            raise BadInput(f"gives {given:,} bytes to calls, far more than any {kind.what} has")
        return arguments

    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count == kind.longest:
            raise BadInput(
                f"has more than {kind.longest} instructions, more than any {kind.what} has"
            )
        match opcode.name:
            case "PROTO" | "FRAME" | "BINPERSID":
                pass  # a storage's description is left as it is
            case "STOP":
                (value,) = stack
                return value
            case name if name in LITERALS:
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE" | "EMPTY_SET":  # no set of a module has anything in it
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(after_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(pop(int(opcode.name[-1])))
            case "APPEND" | "APPENDS":
                items = pop(1) if opcode.name == "APPEND" else after_mark()
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = pop(2) if opcode.name == "SETITEM" else after_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # The hash of nested tuples can exhaust the stack.
                    if not isinstance(key, str | bytes):
                        raise BadInput(f"has a {type(key).__name__} as a key of a dictionary")
                    dict.__setitem__(stack[-1], key, value)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument.replace(" ", ".") if argument else ".".join(pop(2))
                if name not in kind.names:
                    raise BadInput(f"holds {shown(name)}, which no {kind.what} does: not read")
                stack.append(Name(name))
            case "REDUCE" | "NEWOBJ":
                function, arguments = pop(2)
                stack.append(kind.described(function.name, give(arguments, position)))
            case "BUILD":
                (state,) = pop(1)
                kind.completed(stack[-1], give(state, position))
            case name:
                raise BadInput(f"is no pickle of any {kind.what}: it has the instruction {name}")
